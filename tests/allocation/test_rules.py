"""From scores to what stays: exact counts, ties, costs, invariance, order."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaloom.allocation import RULES, Scores, keep_within, relative_scores

sizes = st.integers(1, 12)


@st.composite
def cases(draw):
    """Scores of two decisions and costs, with ties and zeros."""
    n = draw(sizes)
    values = st.lists(st.one_of(st.sampled_from([0.0, 0.0, 1.0]), st.floats(1e-6, 1e3)), min_size=n, max_size=n)
    costs = draw(st.lists(st.integers(1, 9), min_size=n, max_size=n))
    now, before = draw(values), draw(values)
    target = draw(st.integers(1, sum(costs)))
    allowed = draw(st.integers(target, sum(costs)))
    return scores_of(now, before, costs, allowed, target)


def scores_of(now, before=None, costs=None, allowed=1.0, target=1.0):
    now = torch.tensor(now, dtype=torch.float64)
    before = torch.zeros_like(now) if before is None else torch.tensor(before, dtype=torch.float64)
    costs = torch.ones_like(now) if costs is None else torch.tensor(costs, dtype=torch.float64)
    return Scores(now, before, costs, float(allowed), float(target))


def kept(rule, scores):
    priority, most = RULES[rule](scores)
    return keep_within(priority, scores.costs, most)


def scaled(scores, by):
    return Scores(scores.now * by, scores.before * by, scores.costs, scores.allowed, scores.target)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, 2.5]), min_size=1, max_size=12), st.data())
def test_with_equal_costs_the_budget_keeps_exactly_the_best(now, data):
    number = data.draw(st.integers(1, len(now)))
    mask = kept("budget", scores_of(now, allowed=number + data.draw(st.floats(0, 0.99))))
    assert int(mask.sum()) == number
    expected = sorted(range(len(now)), key=lambda index: (-now[index], index))[:number]
    assert mask.nonzero().squeeze(1).tolist() == sorted(expected)


def test_equal_scores_do_not_all_fall():
    """A threshold of the k-th value with 'at most' keeps none of six zeros."""
    for value in (0.0, 0.3):
        for number in range(1, 7):
            assert kept("budget", scores_of([value] * 6, allowed=number)).tolist() == [index < number for index in range(6)]
    assert kept("budget", scores_of([1, 2, 3], allowed=3)).all()


@settings(max_examples=50, deadline=None)
@given(cases(), st.sampled_from(sorted(RULES)))
def test_one_component_stays_and_no_more_than_allowed(scores, rule):
    priority, most = RULES[rule](scores)
    mask = keep_within(priority, scores.costs, most)
    assert mask.any()
    cost = float(scores.costs[mask].sum())
    assert cost <= most + 1e-9 or int(mask.sum()) == 1
    if rule in ("budget", "capped"):
        assert cost <= scores.allowed or int(mask.sum()) == 1
    best = int(torch.sort(priority, descending=True, stable=True).indices[0])
    assert mask[best]
    room = most - cost
    assert not bool((scores.costs[~mask] < room - 1e-9 * max(1.0, most)).any()), "what would still fit was left out"


def test_nothing_allowed_keeps_the_best_one():
    assert kept("budget", scores_of([1.0, 3.0, 2.0], allowed=0.2)).tolist() == [False, True, False]


def test_costs_count():
    """Per cost the second is the best; the third does not fit any more, and what comes after it, which does, is taken."""
    scores = scores_of([6.0, 5.0, 8.0, 1.0], costs=[3, 1, 6, 1], allowed=5)
    assert kept("budget", scores).tolist() == [True, True, False, True]
    assert kept("budget", scores_of([6.0, 5.0, 8.0, 1.0], costs=[3, 1, 6, 1], allowed=10)).tolist() == [True, True, True, False]


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 40))
def test_sums_of_costs_that_are_just_allowed_fit_in_spite_of_rounding(n):
    costs = [0.1] * n
    assert kept("budget", scores_of([1.0] * n, costs=costs, allowed=0.1 * n)).all()


@settings(max_examples=50, deadline=None)
@given(cases(), st.sampled_from(["share", "effective", "capped", "budget"]), st.integers(-8, 8))
def test_the_size_of_the_gradients_does_not_matter(scores, rule, exponent):
    """Both score vectors times one number (a power of two: exact)."""
    assert torch.equal(kept(rule, scores), kept(rule, scaled(scores, 2.0**exponent)))


@settings(max_examples=50, deadline=None)
@given(cases())
def test_share_keeps_what_reaches_a_tenth_of_the_previous_mean(scores):
    before = scores.before if bool((scores.before > 0).any()) else scores.now
    expected = scores.now >= 0.1 * before.mean()
    mask = kept("share", scores)
    if expected.any():
        assert torch.equal(mask, expected)
    else:
        assert int(mask.sum()) == 1


def test_previous_scores_are_used():
    now, before = [1.0, 1.0, 0.05, 0.05], [1.0, 1.0, 1.0, 1.0]
    assert kept("share", scores_of(now, before)).tolist() == [True, True, False, False]
    assert kept("share", scores_of(now, [0.1, 0.1, 0.1, 0.1])).all()
    assert kept("share", scores_of(now, [0.0] * 4)).tolist() == [True, True, False, False]  # the first decision: the mean of now
    first, later = scores_of([1.0, 1.0, 0.0, 0.0]), scores_of([1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 8.0, 0.0])
    assert kept("effective", first).tolist() == [True, True, False, False]
    assert kept("effective", later).tolist() == [True, True, True, False]
    torch.testing.assert_close(relative_scores(later), (later.now / later.now.sum() + later.before / 9) / 2)


@settings(max_examples=50, deadline=None)
@given(sizes, st.floats(1e-3, 1e3))
def test_effective_keeps_all_of_equal_scores(n, value):
    assert kept("effective", scores_of([value] * n)).all()
    assert kept("effective", scores_of([0.0] * n)).all()


@pytest.mark.parametrize("n", range(1, 30))
def test_effective_counts_equal_scores_in_spite_of_rounding(n):
    assert kept("effective", scores_of([0.3] * n + [0.0] * 5)).tolist() == [True] * n + [False] * 5


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 12), st.data())
def test_effective_keeps_about_one_of_a_dominating_score(n, data):
    large = data.draw(st.integers(0, n - 1))
    mask = kept("effective", scores_of([1e6 if index == large else 1e-3 for index in range(n)]))
    assert mask[large] and int(mask.sum()) <= 2
    assert kept("effective", scores_of([float(index == large) for index in range(n)])).sum() == 1


@settings(max_examples=50, deadline=None)
@given(cases())
def test_effective_is_the_exponential_of_the_entropy(scores):
    shares = relative_scores(scores).tolist()
    count = math.exp(-sum(p * math.log(p) for p in shares if p > 0))
    assert int(kept("effective", scores).sum()) == math.ceil(count - 1e-9)


@settings(max_examples=50, deadline=None)
@given(cases())
def test_capped_lies_between_the_end_of_the_schedule_and_what_it_allows(scores):
    _, most = RULES["capped"](scores)
    _, wanted = RULES["effective"](scores)
    assert scores.target <= most <= scores.allowed
    assert most == wanted or most in (scores.target, scores.allowed)


def test_order_is_stable():
    mask = keep_within(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), torch.ones(5), 3)
    assert mask.tolist() == [True, True, False, True, False]
    assert keep_within(torch.ones(50_000), torch.ones(50_000), 100).nonzero().squeeze(1).tolist() == list(range(100))


@pytest.mark.parametrize("rule", sorted(RULES))
def test_scores_are_not_changed(rule):
    scores = scores_of([1.0, 2.0], [2.0, 1.0], [1, 2], 3, 1)
    before = scores.now.clone(), scores.before.clone(), scores.costs.clone()
    kept(rule, scores)
    assert all(torch.equal(a, b) for a, b in zip(before, (scores.now, scores.before, scores.costs), strict=True))
