import io
import math
import unicodedata
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from deltaloom.report import text
from deltaloom.report.text import DASH


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (2_400_000, "2.4 MB"),
        (302_112, "302 kB"),
        (999_960, "1.0 MB"),
        (99_960, "100 kB"),
        (5e15, "5000 TB"),
        (None, DASH),
        (math.nan, DASH),
        (-2000, "\u22122.0 kB"),
    ],
)
def test_byte_size(value, written):
    assert text.byte_size(value) == written


@pytest.mark.parametrize(
    ("ranks", "written"), [([], DASH), ([4, 4], "4"), ([2, 8, 6, 6], "5.5 (2 to 8)"), ((0, 2000), "1,000 (0 to 2,000)")]
)
def test_rank_range(ranks, written):
    assert text.rank_range(ranks) == written


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (0.4, "0.4s"),
        (9.96, "10s"),
        (59.94, "60s"),
        (59.96, "1m 00s"),
        (200, "3m 20s"),
        (3599.7, "1h 00m"),
        (7500, "2h 05m"),
        (97200, "1d 03h"),
        (None, DASH),
        (-1, DASH),
        (math.inf, DASH),
    ],
)
def test_duration(seconds, written):
    assert text.duration(seconds) == written


@pytest.mark.parametrize(
    ("function", "value", "written"),
    [
        (text.count, 1234567, "1,234,567"),
        (text.count, None, DASH),
        (text.figure, 0.87141, "0.8714"),
        (text.figure, 1e-5, "1e-05"),
        (text.figure, 12345.6, "12,346"),
        (text.measured, 0.83, "0.8300"),
        (text.measured, 1.0, "1.000"),
        (text.measured, 1234.0, "1,234"),
        (text.measured, 0.0, "0"),
        (text.signed, 0.33, "+0.3300"),
        (text.signed, -0.2, "\u22120.2000"),
        (text.signed, 0.0, "±0"),
        (text.share, 0.0123, "1.23%"),
        (text.quantity, 8.58e7, "85.8 M"),
        (text.quantity, 12.0, "12 "),
        (text.quantity, 1e20, "100,000 P"),
    ],
)
def test_numbers(function, value, written):
    assert function(value) == written


@given(st.floats() | st.none())
def test_every_number_has_a_text(value):
    for function in (
        text.count,
        text.figure,
        text.measured,
        text.signed,
        text.share,
        text.byte_size,
        text.duration,
        text.quantity,
    ):
        assert function(value)


@given(st.text())
def test_printable_text_cannot_steer_a_terminal_or_break_xml(value):
    clean = text.printable(value)
    assert len(clean) == len(value)
    assert not [letter for letter in clean if unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\n\t"]
    ElementTree.fromstring(f"<a>{clean.replace('&', '').replace('<', '')}</a>")


def test_one_line_is_one_line_and_cut():
    assert text.one_line("a\n b\x1b[31m\tc") == "a b\ufffd[31m c"
    assert text.one_line("x" * 50, 10) == "x" * 9 + "…"


def test_a_table_aligns_numbers_right_and_takes_no_markup(capsys):
    text.print_table("Sizes", ("name", "number"), [("[red]a[/red]", "5"), ("b", "1,234"), ("c", None)])
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert "[red]a[/red]" in shown.err
    assert next(line for line in lines if line.startswith("[red]")).rstrip().endswith("    5")
    assert text.table_text(("name", "number"), [("b", "1,234")]).splitlines()[-1] == "b      1,234"


def test_a_table_can_go_to_a_given_console():
    stream = io.StringIO()
    text.print_table("T", ("a",), [("b",)], Console(width=40, file=stream))
    assert "b" in stream.getvalue()


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=80))
def test_smoothed_stays_between_lowest_and_highest_and_begins_with_the_first(values):
    curve = text.smoothed(values)
    assert len(curve) == len(values)
    assert curve[0] == pytest.approx(values[0])
    assert min(values) - 1e-6 <= min(curve) and max(curve) <= max(values) + 1e-6


def test_the_smoother_is_the_weighted_mean_and_leaves_out_what_is_not_finite():
    smoother, weight = text.Smoother(0.25), 0.25
    values = [3.0, 1.0, 4.0, 1.5]
    for value in (values[0], math.nan, *values[1:]):
        got = smoother(value)
    weights = [weight * (1 - weight) ** age for age in reversed(range(4))]
    assert got == pytest.approx(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
