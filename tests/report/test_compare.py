import json
from pathlib import Path

import pytest

from deltaloom.errors import UsageError
from deltaloom.report.compare import compare_runs, run_names

from .folders import classification_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    return [
        classification_run(folder / "slow"),
        classification_run(folder / "fast", rate=1e-2, rank=16),
        classification_run(folder / "cut", steps=10, finished=False),
    ]


def test_it_tells_settings_that_differ_and_counts_the_others(runs):
    found = compare_runs(runs[:2])
    assert found.runs == ("slow", "fast")
    assert [(row.label, row.values) for row in found.group("settings")] == [
        ("deltas.0.rank", ("8", "16")),
        ("train.learning_rate", ("0.001", "0.01")),
    ]
    assert found.same_settings == 14 and found.missing == ()


def test_the_best_of_a_line_knows_which_way_is_better(runs):
    rows = {row.label: row for row in compare_runs(runs[:2]).rows}
    assert rows["accuracy"].best == (0,)
    assert rows["delta size"].best == (0,)
    assert rows["loss"].best == () and not rows["loss"].differs  # equal
    assert rows["trainable parameters"].best == () and rows["trainable parameters"].differs


def test_lower_is_better_for_losses(tmp_path, runs):
    other = classification_run(tmp_path / "other")
    result = json.loads((other / "metrics.json").read_text())
    result["metrics"]["loss"] = 0.2
    (other / "metrics.json").write_text(json.dumps(result))
    assert {row.label: row for row in compare_runs([runs[0], other]).rows}["loss"].best == (1,)


def test_an_unfinished_run_is_noted_and_no_contender_for_the_shortest_time(runs):
    found = compare_runs(runs)
    rows = {row.label: row for row in found.rows}
    assert rows["training time"].values[2] < rows["training time"].values[0]
    assert 2 not in rows["training time"].best
    assert rows["accuracy"].values == (0.8392, 0.7192, None)
    assert "cut: metrics.json is missing" in found.missing


def test_the_data_form_is_json_and_the_text_shows_the_same(runs):
    found = compare_runs(runs[:2])
    data = json.loads(json.dumps(found.as_dict()))
    assert data["runs"] == ["slow", "fast"]
    assert data["metrics"]["accuracy"] == [0.8392, 0.7192]
    assert data["sizes"]["delta size"] == [302112, 604224]
    lines = found.text().splitlines()
    assert next(line for line in lines if line.startswith("accuracy")).split()[-5:] == ["*", "0.5092", "→", "0.7192", "(+0.2100)"]
    assert lines[-1] == "14 settings are the same in all runs; * marks the best of a line."


def test_one_run_is_no_comparison(runs):
    with pytest.raises(UsageError, match="at least two"):
        compare_runs(runs[:1])


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["/a/x", "/a/y"], ["x", "y"]),
        (["/a/x", "/b/x"], ["a/x", "b/x"]),
        (["/a/c/x", "/b/c/x", "/b/c/y"], ["a/c/x", "b/c/x", "b/c/y"]),
        (["/a/x", "/a/x"], ["1: x", "2: x"]),
        (["/"], ["/"]),
    ],
)
def test_names_tell_runs_apart(folders, names):
    assert run_names([Path(folder) for folder in folders]) == names
