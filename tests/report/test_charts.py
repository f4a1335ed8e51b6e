import math
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaloom.report.charts import Bar, Change, Series, bar_chart, before_after, line_chart
from deltaloom.report.svg import scale, thinned

finite = st.floats(allow_nan=False, allow_infinity=False)
curves = st.lists(st.tuples(st.integers(0, 10**6).map(float), finite), max_size=30).map(
    lambda points: sorted(dict(points).items())
)
names = st.text(max_size=40)


def assert_drawing(svg: str) -> ElementTree.Element:
    """Valid XML, an image with a label, every coordinate a finite number inside or near the canvas."""
    root = ElementTree.fromstring(svg)
    assert root.tag == "svg" and root.get("role") == "img" and root.get("aria-label")
    width, height = (float(part) for part in root.get("viewBox").split()[2:])
    for node in root.iter():
        for key in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height"):
            if node.get(key) is not None:
                assert -1 <= float(node.get(key)) <= max(width, height) + 1, (node.tag, key, node.get(key))
        for pair in (node.get("points") or "").split():
            x, y = map(float, pair.split(","))
            assert -1 <= x <= width + 1 and -1 <= y <= height + 1
    return root


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(names, curves), max_size=4), names, st.booleans(), st.booleans())
def test_line_charts_of_anything_are_valid_drawings(lines, title, log, zero):
    assert_drawing(
        line_chart(title, [Series(name, points, index) for index, (name, points) in enumerate(lines)], log=log, zero=zero)
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(names, finite, st.none() | finite, st.none() | finite), max_size=5))
def test_bars_of_anything_are_valid_drawings(bars):
    assert_drawing(bar_chart("bars", [Bar(*bar) for bar in bars]))


def test_before_and_after_tells_all_in_its_hover_title():
    root = assert_drawing(before_after("m", [Change("accuracy", 0.5, 0.8, 0.75, 0.85, 0.52), Change("new", None, 0.3)]))
    titles = [node.text for node in root.iter("title")]
    assert titles == [
        "accuracy: 0.8 after tuning (95% interval 0.75 to 0.85); the most frequent answer alone: 0.52; 0.5 before",
        "new: 0.3 after tuning",
    ]


def test_a_curve_goes_up_on_the_page_when_its_values_rise():
    root = assert_drawing(line_chart("rise", [Series("a", [(0.0, 1.0), (1.0, 2.0), (2.0, 5.0)])]))
    places = [tuple(map(float, pair.split(","))) for pair in next(root.iter("polyline")).get("points").split()]
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert [y for _, y in places] == sorted((y for _, y in places), reverse=True)


def test_one_curve_has_no_legend_and_several_have_each_name():
    one = line_chart("t", [Series("alone", [(0.0, 1.0), (1.0, 2.0)])])
    two = line_chart("t", [Series(name, [(0.0, 1.0), (1.0, 2.0)]) for name in ("first", "second")])
    assert ">alone<" not in one and ">first<" in two and ">second<" in two


def test_the_log_scale_says_so_and_is_linear_where_a_value_is_not_positive():
    assert "(log scale)" in line_chart("t", [Series("a", [(0.0, 1.0), (1.0, 100.0)])], y_label="nats", log=True)
    assert "(log scale)" not in line_chart("t", [Series("a", [(0.0, 0.0), (1.0, 100.0)])], y_label="nats", log=True)


def test_hover_columns_tell_every_curves_value():
    root = assert_drawing(line_chart("t", [Series("a", [(0.0, 1.0), (10.0, 2.0)]), Series("b", [(10.0, 7.0)])]))
    assert [node.text for node in root.iter("title")][-2:] == ["step 0\na: 1\nb: \u2013", "step 10\na: 2\nb: 7"]


def test_names_are_escaped():
    evil = '"><script>alert(1)</script>'
    for svg in (
        line_chart(evil, [Series(evil, [(0.0, 1.0)]), Series(evil, [(0.0, 1.0)])], x_label=evil, y_label=evil),
        bar_chart(evil, [Bar(evil, 1.0, detail=evil)]),
        before_after(evil, [Change(evil, 0.1, 0.2)]),
    ):
        assert "<script" not in svg
        assert_drawing(svg)


@given(st.lists(finite, min_size=1, max_size=20), st.booleans(), st.sampled_from([0, 4]))
def test_scales_keep_values_and_ticks_inside(values, zero, round_to):
    axis = scale(values, 0.0, 100.0, zero=zero, round_to=round_to)
    assert axis.low < axis.high
    assert all(-1e-6 <= axis(value) <= 100 + 1e-6 for value in values)
    ticks = axis.ticks(4)
    assert len(ticks) <= 8 and ticks == sorted(ticks)
    assert all(axis.low - 1e-6 * (axis.high - axis.low) <= tick <= axis.high + 1e-6 * (axis.high - axis.low) for tick in ticks)


@pytest.mark.parametrize(
    ("values", "ticks"),
    [([0, 10], [0, 2.5, 5, 7.5, 10]), ([0.31, 0.79], [0.4, 0.6]), ([-3, 3], [-2, 0, 2]), ([1e6, 5e6], [1e6, 2e6, 3e6, 4e6, 5e6])],
)
def test_ticks_are_round(values, ticks):
    assert scale(values, 0, 1).ticks(4) == pytest.approx(ticks)


def test_log_ticks_are_decades_or_their_parts():
    assert scale([1e-4, 1e2], 0, 1, log=True).ticks(7) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1, 10, 100])
    assert scale([3, 30], 0, 1, log=True).ticks(5) == pytest.approx([5, 10, 20])


def test_thinning_keeps_order_and_every_spike():
    points = [(float(i), math.sin(i / 50)) for i in range(5000)]
    points[1234] = (1234.0, 99.0)
    points[4321] = (4321.0, -99.0)
    kept = thinned(points, 100)
    assert len(kept) <= 100 and kept == sorted(kept)
    assert (1234.0, 99.0) in kept and (4321.0, -99.0) in kept
    assert thinned(points[:10], 100) == points[:10]
