from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaloom.errors import CheckpointError
from deltaloom.train.state import keep_random_states, pack, random_states, seed_everything, set_random_states, unpack

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
keys = st.text() | st.integers() | st.booleans()
values = st.recursive(plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=12)


def round_trip(value):
    tensors: dict[str, torch.Tensor] = {}
    return unpack(json.loads(json.dumps(pack(value, "", tensors))), tensors)


@given(values)
def test_nested_values_come_back(value):
    assert round_trip(value) == value


def test_tensors_tuples_and_odd_numbers_come_back():
    value = {"t": torch.arange(3), "deep": [{"u": torch.ones(2, dtype=torch.bfloat16)}], 5: (1, math.inf)}
    back = round_trip(value)
    assert torch.equal(back["t"], value["t"])
    assert back["deep"][0]["u"].dtype == torch.bfloat16
    assert back[5] == [1, math.inf]
    assert math.isnan(round_trip(math.nan))


def test_what_cannot_be_kept_is_refused_with_its_path():
    with pytest.raises(CheckpointError, match=r"set at /a/1"):
        pack({"a": [1, {2}]}, "", {})


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))]


def test_random_states_continue_every_generator():
    seed_everything(5)
    draws()
    np.random.randn()  # leaves a cached second Gaussian
    tensors: dict[str, torch.Tensor] = {}
    packed = json.dumps(pack(random_states(), "", tensors))
    expected = [draws() for _ in range(3)]
    seed_everything(99)
    set_random_states(unpack(json.loads(packed), tensors))
    assert [draws() for _ in range(3)] == expected


def test_a_block_can_draw_without_a_trace():
    seed_everything(1)
    expected = draws()
    seed_everything(1)
    with keep_random_states():
        draws()
    assert draws() == expected
