import re
from importlib.resources import files
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaloom.report.heat import TONES, heat_map, log_heat, paths, whole_heat

tones = st.none() | st.integers(0, TONES - 1)
tables = st.integers(1, 7).flatmap(lambda size: st.lists(st.lists(tones, min_size=size, max_size=size), min_size=1, max_size=7))
above_zero = st.floats(min_value=0, exclude_min=True, allow_infinity=False)


def cells_of(drawn: dict[int, str]) -> dict[tuple[int, int], int]:
    """The tone of each cell that the path data draw, followed stroke by stroke."""
    found = {}
    for tone, path in drawn.items():
        x = y = 0
        for name, first, second in re.findall(r"([Mmh])(-?\d+)(?: (\d+))?", path):
            if name == "h":
                assert not found.keys() & {(y, column) for column in range(x, x + int(first))}
                found.update({(y, column): tone for column in range(x, x + int(first))})
                x += int(first)
            else:
                x, y = (int(first), int(second)) if name == "M" else (x + int(first), y + int(second))
    return found


@given(tables)
def test_paths_draw_every_cell_and_no_other(table):
    expected = {(y, x): tone for y, row in enumerate(table) for x, tone in enumerate(row) if tone is not None}
    assert cells_of(paths(table)) == expected


@settings(max_examples=40, deadline=None)
@given(tables, st.text(max_size=20), st.text(max_size=20))
def test_heat_maps_of_anything_are_valid_drawings(table, title, rows):
    root = ElementTree.fromstring(heat_map(title, table, rows=rows, said=[rows] * len(table), steps=(1, 9)))
    assert root.get("role") == "img" and root.get("aria-label")
    width, height = (float(part) for part in root.get("viewBox").split()[2:])
    assert all(0 <= float(node.get("x")) <= width and 0 <= float(node.get("y")) <= height for node in root.iter("text"))
    drawn = {int(node.get("class")[1:]): node.get("d") for node in root.iter("path") if node.get("class")}
    assert drawn == paths(table)


def test_names_are_escaped():
    evil = '"><script>alert(1)</script>'
    assert "<script" not in heat_map(evil, [[1]], rows=evil, said=[evil], steps=(0, 1))


def test_equal_cells_are_one_stroke():
    assert paths([[3] * 80, [None, 3, 3, 5]]) == {3: "M0 0h80M1 1h2", 5: "M3 1h1"}


def test_rows_have_numbers_that_do_not_touch():
    for count in (1, 2, 6, 30, 32, 60, 61, 256):
        root = ElementTree.fromstring(heat_map("t", [[1]] * count, rows="layer", said=[], steps=(0, 1)))
        numbers = [(int(node.text), float(node.get("y"))) for node in root.iter("text") if node.get("text-anchor") == "end"][:-1]
        assert numbers[0][0] == 0 and numbers[-1][0] == count - 1
        assert all(b - a >= 13 for (_, a), (_, b) in pairwise(numbers))


@given(st.lists(st.integers(0, 10**6), max_size=40))
def test_whole_numbers_have_the_tone_of_the_class_that_names_them(values):
    heat = whole_heat(values)
    assert len(heat.labels) <= TONES
    spans = [[int(part.replace(",", "")) for part in label.split("\u2013")] for label in heat.labels]
    for value in values:
        inside = [tone for (tone, _), span in zip(heat.legend, spans, strict=True) if span[0] <= value <= span[-1]]
        assert inside == ([] if value == 0 else [heat.tone(value)])


def test_up_to_nine_ranks_have_a_tone_each():
    heat = whole_heat(range(1, 10))
    assert heat.labels == tuple("123456789") and [heat.tone(rank) for rank in range(10)] == [None, *range(9)]
    assert whole_heat([4, 4]).legend == [(8, "4")] and whole_heat([2, 3]).legend == [(0, "2"), (8, "3")]
    assert whole_heat([]).legend == [(8, "1")]


@given(st.lists(above_zero, max_size=40))
def test_a_higher_score_never_has_a_lower_tone(values):
    heat = log_heat(values)
    tones = [heat.tone(value) for value in sorted(values)]
    assert None not in tones and tones == sorted(tones)
    assert len(heat.labels) == len(set(heat.labels)) == len(heat.upper) <= TONES


def test_tones_of_scores_are_equal_ratios():
    heat = log_heat([2.0**power for power in range(10)])
    assert [heat.tone(1.5 * 2**power) for power in range(9)] == list(range(9))
    assert heat.tone(0.0) is None and heat.tone(None) is None and heat.tone(1e-300) == 0 and heat.tone(1e300) == 8
    assert log_heat([1.0, 1.02], "\u00d7").legend == [(8, "about 1\u00d7")]


def test_one_stray_score_does_not_take_the_scale():
    heat = log_heat([1e-9, *[1.0 + index / 100 for index in range(300)], 1e9])
    assert heat.upper[0] > 1 and heat.upper[-1] < 5


def luminance(colour: str) -> float:
    """WCAG's relative luminance of #rrggbb."""
    parts = [int(colour[place:place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("place", "darker"), [(0, True), (1, False), (2, True)], ids=["light", "dark", "print"])
def test_tones_go_away_from_the_paper_step_by_step_for_every_eye(place, darker):
    """Neighbours differ in luminance alone, so that colour-blind readers and grey printers tell them apart."""
    style = files("deltaloom.report").joinpath("page.css").read_text()
    ramp = [luminance(re.findall(rf"--h{tone}: (#[0-9a-f]{{6}})", style)[place]) for tone in range(TONES)]
    paper = luminance(re.findall(r"--paper: (#[0-9a-f]{3,6})", style)[place].replace("#fff;", "#ffffff").ljust(7, "f"))
    levels = [level + 0.05 for level in ([paper, *ramp] if darker else [*reversed(ramp), paper])]
    assert all(a / b >= 1.2 for a, b in pairwise(levels))
