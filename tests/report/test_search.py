"""The page and the lines of a search, from records: nothing of it is trained."""

import xml.etree.ElementTree as ElementTree

import pytest

from deltaloom.report.parallel import Axis, Strand, parallel_chart
from deltaloom.report.search import search_page, search_text, trial_line
from deltaloom.search.outcome import Objective, Record

BAD = "<script>alert(1)</script>"
UP, DOWN = Objective("accuracy", True), Objective("parameters", False)


def record(number, state="complete", accuracy=0.5, parameters=100.0, **more):
    values = {"accuracy": accuracy, "parameters": parameters} if state in ("complete", "infeasible") else {}
    settings = {"train.learning_rate": 10.0 ** -number, "deltas": "lora" if number % 2 else BAD}
    if number % 2:
        settings["deltas[lora].0.rank"] = number
    return Record(number, state, settings=settings, values=values, seconds=1.5, **more)


RECORDS = [record(0, accuracy=0.6), record(1, accuracy=0.9, parameters=300.0), record(2, "failed", reason=BAD),
           record(3, "pruned", reason="behind"), record(4, accuracy=0.4), record(5, "infeasible", reason="breaks it"),
           record(6, "lost", reason="its worker died")]


def found(objectives=(UP, DOWN), best=True):
    names = [objective.name for objective in objectives]
    chosen = RECORDS if best else [each for each in RECORDS if each.state != "complete"]
    trials = [each.as_dict() | {"values": {k: v for k, v in each.values.items() if k in names}} for each in chosen]
    return {"run": "r", "trials": trials, "seconds": 9.0,
            "best": {"number": 1, "value": 0.9, "settings": RECORDS[1].settings} if best else None,
            "pareto": [{"number": 1}, {"number": 0}] if best else [],
            "objectives": [{"name": objective.name, "higher_is_better": objective.higher} for objective in objectives],
            "space": {"train.learning_rate": {"log": [1e-5, 1.0]}, "deltas": {"choice": {"lora": [], BAD: []}}},
            "search": {"sampler": "tpe", "pruner": "median", "time": None},
            "importance": {name: {"train.learning_rate": 0.7, "deltas": 0.3} for name in names} if best else {},
            "environment": {"threads": 2}}


@pytest.mark.parametrize("objectives", [(UP,), (UP, DOWN)])
@pytest.mark.parametrize("best", [True, False])
def test_the_page_is_whole_escaped_and_self_contained(objectives, best):
    page = search_page("a search", found(objectives, best))
    assert "<script" not in page and "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert ("Pareto front</h2>" in page) == (best and len(objectives) > 1)
    assert ("Importance</h2>" in page) == best
    assert page.count("<tr") > len(found(objectives, best)["trials"])
    for part in page.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + part.split("</svg>")[0] + "</svg>")


def test_the_best_line_of_the_history_only_gets_better():
    page = search_page("a search", found())
    line = page.split("accuracy of each trial")[2].split('points="')[1].split('"')[0]
    heights = [float(place.split(",")[1]) for place in line.split()]
    assert len(heights) == 3 and heights == sorted(heights, reverse=True)


def test_the_lines_on_the_terminal():
    assert trial_line(RECORDS, 1, (UP, DOWN), 8).startswith(
        "trial 1 (2 of 8): accuracy 0.9000, parameters 300.0 in 1.5s (best so far); train.learning_rate 0.1, deltas lora")
    failed = trial_line(RECORDS, 2, (UP, DOWN), 8)
    assert "failed: " in failed and "(best 0.9000, trial 1)" in failed
    text = search_text(found())
    rows = [line.split()[0] for line in text.splitlines()[2:5]]
    assert rows == ["1", "0", "4"] and "1 failed" in text and "1 cut off" in text


def test_parallel_coordinates_put_values_where_they_belong():
    axes = [Axis("rate", log=True), Axis("method"), Axis("rank")]
    strands = [Strand((1e-4, "lora", 2.0), 0.0, "worst"), Strand((1e-2, "prefix", None), 1.0, "best")]
    chart = ElementTree.fromstring(parallel_chart("t", axes, strands))
    lines = [each for each in chart.iter() if each.get("class", "").startswith("strand")]
    assert [line.get("class") for line in lines] == ["strand t0", "strand t8"]
    low, high = ([tuple(map(float, point.split(","))) for point in line.get("points").split()] for line in lines)
    assert [x for x, _ in low] == [x for x, _ in high]
    assert low[0][1] > high[0][1], "small numbers are below"
    assert high[2][1] > low[2][1], "what does not count is lowest"
