"""The budget over time: its formula, its ends, its decisions, and runs that are too short for it."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaloom.allocation import Schedule
from deltaloom.errors import SettingsError

RUNS = {"total": st.integers(2, 3000), "start": st.floats(0, 0.6), "end": st.floats(0, 0.39)}


def schedule_of(total, start, end, every=None):
    """A schedule, or None where there is none."""
    try:
        return Schedule.of_run(total, start, end, every)
    except SettingsError:
        return None


@settings(max_examples=50, deadline=None)
@given(**RUNS, initial=st.floats(1, 1e6), share=st.floats(0.01, 1))
def test_the_budget_falls_from_one_end_to_the_other(total, start, end, initial, share):
    schedule, target = schedule_of(total, start, end), initial * share
    if schedule is None:
        return
    values = [schedule.budget(step, initial, target) for step in range(total + 1)]
    assert all(a >= b for a, b in pairwise(values))
    assert set(values[:schedule.start + 1]) == {initial}
    assert set(values[schedule.last:]) == {target}
    assert values[schedule.last - 1] > target or initial == target or schedule.last - 1 == schedule.start or share > 0.999


@settings(max_examples=50, deadline=None)
@given(**RUNS, every=st.one_of(st.none(), st.integers(1, 50)))
def test_decisions_lie_after_the_start_on_the_interval_and_one_is_the_last(total, start, end, every):
    schedule = schedule_of(total, start, end, every)
    if schedule is None:
        return
    due = [step for step in range(total + 2) if schedule.due(step)]
    assert due[-1] == schedule.last >= 2 and due[0] > schedule.start
    assert all(step % schedule.every == 0 for step in due[:-1])
    expected = {step for step in range(schedule.every, schedule.last, schedule.every) if step > schedule.start}
    assert set(due) == expected | {schedule.last}
    assert schedule.every == (max(10, total // 200) if every is None else every)


def test_the_numbers_of_the_cubic_curve():
    schedule = Schedule.of_run(100, 0.1, 0.4, 10)
    assert (schedule.total, schedule.start, schedule.end, schedule.last) == (100, 10, 40, 60)
    values = [schedule.budget(step, 12, 8) for step in (0, 10, 20, 35, 50, 59, 60, 100)]
    assert values == pytest.approx([12, 12, 8 + 4 * 0.8**3, 8 + 4 * 0.125, 8 + 4 * 0.008, 8 + 4 * 0.02**3, 8, 8], rel=1e-12)
    assert [step for step in range(101) if schedule.due(step)] == [20, 30, 40, 50, 60]


@pytest.mark.parametrize(("total", "share", "steps"), [(100, 0.29, 29), (1000, 0.57, 570), (10, 0.7, 7), (9, 0.3, 2)])
def test_shares_of_the_run_are_not_one_step_short_by_rounding(total, share, steps):
    assert Schedule.of_run(total, share, 0.0, 1).start == steps
    assert Schedule.of_run(total, 0.0, share, 1).end == steps


@pytest.mark.parametrize(("total", "start", "end", "every"), [
    (0, 0.1, 0.4, None), (1, 0.1, 0.4, None), (10, 0.0, 0.9, None), (10, 0.5, 0.5, None), (10, 0.1, 0.4, 6), (100, 0.2, 0.7, 11)])
def test_a_run_too_short_for_its_decisions_is_refused(total, start, end, every):
    with pytest.raises(SettingsError, match="longer than the run") as caught:
        Schedule.of_run(total, start, end, every)
    message = str(caught.value)
    assert f"{total} optimizer steps" in message and "legal: every <=" in message and "lower start, end or every" in message


def test_the_shortest_runs_that_are_long_enough():
    assert Schedule.of_run(2, 0.1, 0.4, None).last == 2
    assert Schedule.of_run(100, 0.2, 0.7, 10).last == 30
    assert Schedule.of_run(10, 0.0, 0.8, None).last == 2
