import json
import re

import pytest

from deltaloom import events
from deltaloom.report.facts import read_run
from deltaloom.report.page import render, write_report
from deltaloom.report.ranks import MOST_CHANGES, MOST_HISTORIES, rank_histories
from deltaloom.report.rankview import columns, rank_views

from .folders import classification_run, rank_change, save_record
from .test_heat import cells_of

ROLES = ("q", "k", "v", "o", "gate", "up", "down")


def record(step, **values):
    return {"event": "RankChanged", "step": step, "rows": "layer", "ranks": {"q": [4, 2]}, "importance": {"q": [0.5, 0.25]},
            "parameters": 60, "budget": 64, "residual": 0.1} | values


def records_of(changes):
    return [json.loads(json.dumps(change.record())) for change in changes]


def test_a_history_is_what_the_events_say():
    changes = [rank_change(step, step / 9, layers=5) for step in range(1, 10)]
    (history,) = rank_histories(records_of(changes), [])
    assert history.rows == "layer" and history.steps == tuple(range(1, 10))
    for group in history.groups:
        assert [list(row) for row in group.ranks] == [change.ranks[group.name] for change in changes]
        assert [list(row) for row in group.importance] == [change.importance[group.name] for change in changes]
        assert group.totals == (sum(changes[0].ranks[group.name]), sum(changes[-1].ranks[group.name]))
    for key in ("parameters", "budget", "residual"):
        assert getattr(history, key) == tuple((change.step, getattr(change, key)) for change in changes)


def test_of_a_step_that_ran_twice_the_later_record_counts():
    (history,) = rank_histories([record(1), record(2), record(1, ranks={"q": [9, 9]}), record(3)], [])
    assert history.steps == (1, 2, 3) and history.groups[0].ranks == ((9, 9), (4, 2), (4, 2))


def test_each_controller_has_its_own_history():
    mixed = [record(1), record(1, rows="frequency"), record(1, ranks={"v": [1]}, importance={})]
    mixed += [record(2), record(2, rows="frequency")]
    found = rank_histories(mixed, [])
    assert [(history.rows, [group.name for group in history.groups], history.steps) for history in found] == [
        ("layer", ["q"], (1, 2)), ("frequency", ["q"], (1, 2)), ("layer", ["v"], (1,))]
    missing = []
    assert len(rank_histories([record(1, ranks={str(i): [1]}, importance={}) for i in range(9)], missing)) == MOST_HISTORIES
    assert missing == ["only the ranks of the first 4 of 9 controllers are shown"]


def test_many_changes_are_thinned_with_the_first_and_the_last():
    (history,) = rank_histories([record(step) for step in range(1, 5001)], [])
    assert len(history.steps) == MOST_CHANGES and (history.steps[0], history.steps[-1]) == (1, 5000)


@pytest.mark.parametrize(
    ("values", "ranks", "importance"),
    [
        ({"ranks": {"q": [4, "x", -1, 10**9, True, 2.6]}, "importance": None}, (4, None, None, None, None, 3), (None,) * 6),
        ({"ranks": 7, "importance": {"q": [-1.0, 1e-3, None]}}, (None, None, None), (None, 0.001, None)),
        ({"ranks": {"q": [1]}, "importance": {"q": [1, 2]}}, (1, None), (1.0, 2.0)),
    ],
)
def test_damaged_numbers_are_unknown(values, ranks, importance):
    (history,) = rank_histories([record(1, **values)], [])
    assert history.groups[0].ranks == (ranks,) and history.groups[0].importance == (importance,)
    assert rank_views([history])[0].ranks


def test_records_without_a_step_or_a_group_are_left_out():
    assert rank_histories([record(None), record(1, ranks=None, importance=[]), record("x")], []) == ()


@pytest.mark.parametrize(
    ("steps", "most", "expected"),
    [
        ([10], 80, [0]),
        ([10, 20, 30], 80, [0, 1, 2]),
        ([1, 301, 600, 900, 1200], 80, [0, 1, 2, 3, 4]),      # steps that rounding moved
        ([10, 20, 50], 80, [0, 1, 1, 1, 2]),                  # what was decided holds until the next change
        (list(range(0, 1000, 10)), 3, [24, 74, 99]),
        ([5, 6], 1, [1]),
    ],
)
def test_columns_are_even_in_steps(steps, most, expected):
    assert columns(steps, most) == expected


def test_the_maps_show_the_ranks():
    changes = [record(10, ranks={"q": [1, 2, 0]}), record(20, ranks={"q": [9, 0, 5]})]
    (view,) = rank_views(rank_histories(changes, []))
    drawn = {int(tone): path for path, tone in re.findall(r'<path d="([^"]+)" class="h(\d)"', view.ranks[0].svg)}
    assert cells_of(drawn) == {(0, 0): 0, (0, 1): 8, (1, 0): 1, (2, 1): 4}
    assert view.rank_legend == [(rank - 1, str(rank)) for rank in range(1, 10)]
    assert view.ranks[0].note == "total rank 3 \u2192 14" and "layer 0: rank 1 \u2192 9" in view.ranks[0].svg


def test_importance_is_over_the_median_of_its_step():
    """All scores fall a thousandfold while training: the picture of who matters more stays as it is."""
    falling = [record(step, importance={"q": [4 * size, size], "k": [size, 0.25 * size]}) for step, size in ((1, 0.1), (4, 1e-4))]
    (view,) = rank_views(rank_histories(falling, []))
    assert [chart.note for chart in view.importance] == ["mean 2.5\u00d7 \u2192 2.5\u00d7", "mean 0.62\u00d7 \u2192 0.62\u00d7"]
    found = {int(tone): path for path, tone in re.findall(r'<path d="([^"]+)" class="h(\d)"', view.importance[0].svg)}
    assert cells_of(found)[0, 0] == cells_of(found)[0, 1] == 8


def run_with(folder, changes):
    classification_run(folder)
    kept = [line for line in (folder / "events.jsonl").read_text().splitlines() if "RankChanged" not in line]
    (folder / "events.jsonl").write_text("\n".join(kept) + "\n")
    sink = events.JsonLines(folder / "events.jsonl")
    for change in changes:
        sink(change)
    sink.close()
    return folder


@pytest.mark.parametrize("rows", ["layer", "frequency"])
def test_many_groups_rows_and_changes_stay_small(tmp_path, rows):
    groups = tuple(f"{role} {stack}" for stack in ("encoder", "decoder") for role in ROLES)
    changes = [rank_change(step, step / 300, rows=rows, layers=60, groups=groups, rank=32) for step in range(1, 301)]
    html = write_report([run_with(tmp_path / "run", changes)], tmp_path / "report.html").read_bytes()
    assert len(html) < 400_000 and html.count(b'class="heat"') == 28


def test_a_few_groups_have_all_columns_and_hover_texts(tmp_path):
    changes = [rank_change(step, step / 200, layers=30, groups=ROLES) for step in range(1, 201)]
    facts = read_run(run_with(tmp_path / "run", changes))
    (view,) = rank_views(facts.ranks)
    assert view.hover and all('d="M0 29h80"' in chart.svg for chart in (*view.ranks, *view.importance))
    assert "a line is a layer" in view.reading and "Rest the pointer on a line for its first" in render([facts], ["one"])


def test_a_run_without_changed_ranks_and_without_a_delta_has_no_such_sections(tmp_path):
    folder = run_with(tmp_path / "run", [])
    (folder / "delta" / "delta.json").unlink()
    html = write_report([folder], tmp_path / "report.html").read_text()
    assert "Ranks while training" not in html and "resemble" not in html and 'href="#ranks"' not in html
    assert "delta.json is missing" not in html


def test_the_residual_is_drawn_where_something_is_kept_orthonormal():
    assert len(rank_views(rank_histories([record(1), record(2)], []))[0].curves) == 2
    assert len(rank_views(rank_histories([record(1, residual=0.0), record(2, residual=0)], []))[0].curves) == 1


def test_the_table_of_depth_tells_rho_beside_1_over_n(tmp_path):
    folder = classification_run(tmp_path / "run")
    html = write_report([folder], tmp_path / "report.html").read_text()
    row = re.search(r"<tr><th>lora</th><td>q</td>.*?</tr>", html).group()
    assert re.findall(r"<td[^>]*>([^<]*)</td>", row) == ["q", "384 \u00d7 384", "6", "5.5 (2 to 8)", "0.1700", "0.1667", "0.0031"]
    assert "means that the N layers have learned unrelated things" in html


@pytest.mark.parametrize(
    "groups",
    [None, 3, [7, None, "x"], [{}], [{"role": "q", "layers": 0, "rho": 0.5}], [{"role": "q", "layers": -3, "rho": 0.5}],
     [{"role": "q", "layers": 4, "rho": None, "ranks": ["x"], "shape": 3, "method": 9}]],
)
def test_a_damaged_record_of_groups_shows_nothing(tmp_path, groups):
    folder = classification_run(tmp_path / "run")
    save_record(folder, groups=groups)
    facts = read_run(folder)
    assert facts.depth == () and "resemble" not in render([facts], ["one"])


def test_a_damaged_delta_file_is_noted(tmp_path):
    folder = classification_run(tmp_path / "run")
    (folder / "delta" / "delta.json").write_text('{"groups": [')
    facts = read_run(folder)
    assert facts.depth == () and any(note.startswith("delta.json cannot be read") for note in facts.missing)


def test_too_many_groups_are_cut_and_said(tmp_path):
    folder = classification_run(tmp_path / "run")
    save_record(folder, groups=[{"role": f"role {i}", "shape": [2, 3], "layers": 2, "rho": 0.6} for i in range(100)])
    facts = read_run(folder)
    assert len(facts.depth) == 40 and "only the first 40 of 100 groups of the saved delta are shown" in facts.missing
    assert facts.depth[0].method == "" and facts.depth[0].shape == "2 \u00d7 3"
