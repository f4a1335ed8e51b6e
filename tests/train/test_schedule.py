from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaloom.train.schedule import factor


def test_linear_with_warmup_by_hand():
    assert [round(factor(step, 10, "linear", 0.2), 6) for step in range(1, 11)] == [
        round(x, 6) for x in (1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8)]


def test_cosine_is_half_way_down_in_the_middle():
    assert factor(6, 10, "cosine", 0.0) == pytest.approx(0.5)
    assert factor(1, 10, "cosine", 0.0) == 1.0


def test_constant_stays():
    assert {factor(step, 7, "constant", 0.0) for step in range(1, 8)} == {1.0}


@given(total=st.integers(1, 300), warmup=st.floats(0, 0.999), shape=st.sampled_from(["linear", "cosine", "constant"]))
def test_rises_over_its_share_then_falls_and_never_leaves_the_range(total, warmup, shape):
    values = [factor(step, total, shape, warmup) for step in range(1, total + 1)]
    assert all(0 < value <= 1 for value in values)
    top = min(math.ceil(warmup * total - 1e-9), total - 1)
    assert values[top] == 1.0
    assert values[:top + 1] == sorted(values[:top + 1])
    assert values[top:] == sorted(values[top:], reverse=True)
