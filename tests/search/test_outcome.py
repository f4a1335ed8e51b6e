"""Best trial and Pareto front against the definition."""

from hypothesis import given, settings
from hypothesis import strategies as st

from deltaloom.search.outcome import Objective, Record, best_of, pareto_front

UP, DOWN = Objective("accuracy", True), Objective("size", False)
POINTS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.sampled_from(["complete", "complete", "pruned", "failed"])))


def records_of(points):
    return [Record(index, state, values={"accuracy": float(a), "size": float(b)}) for index, (a, b, state) in enumerate(points)]


@settings(deadline=None, max_examples=60)
@given(POINTS)
def test_the_front_is_what_nobody_beats(points):
    records = records_of(points)
    whole = [(index, a, -b) for index, (a, b, state) in enumerate(points) if state == "complete"]
    expected = {i for i, a, b in whole
                if not any(c >= a and d >= b and ((c, d) != (a, b) or j < i) for j, c, d in whole if j != i)}
    front = pareto_front(records, [UP, DOWN])
    assert {record.number for record in front} == expected
    best = best_of(records, [UP, DOWN])
    if whole:
        assert best.values["accuracy"] == max(a for _, a, _ in whole)
        assert best.values["size"] == min(-b for _, a, b in whole if a == best.values["accuracy"])
        assert best.number in expected
    else:
        assert best is None


@settings(deadline=None, max_examples=60)
@given(POINTS)
def test_one_objective_has_one_best(points):
    front = pareto_front(records_of(points), [UP])
    assert len(front) == min(1, sum(state == "complete" for _, _, state in points))
