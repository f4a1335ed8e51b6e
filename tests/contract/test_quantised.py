"""The laws of the contract suite on quantised bases: every method, four layouts, NF4 and int8."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from deltaloom.compact.face import compact_layers
from tests.contract import cases, test_methods
from tests.contract.cases import Case, all_cases
from tests.toys import quantised_toy

CODECS = ("nf4", "int8")
LAWS = {
    "birth": partial(test_methods.test_nothing_changes_at_birth, dtype=torch.float32),
    "birth in bf16": partial(test_methods.test_nothing_changes_at_birth, dtype=torch.bfloat16),
    "only deltas train": test_methods.test_only_deltas_train,
    "gradients": test_methods.test_every_delta_parameter_gets_a_finite_gradient,
    "loss falls": test_methods.test_loss_falls_the_same_for_the_same_seed,
    "state": test_methods.test_state_goes_to_another_model_bit_for_bit,
    "detach": test_methods.test_detach_gives_the_model_back,
    "half precision": test_methods.test_half_precision_model_keeps_full_precision_deltas,
    "composition": partial(test_methods.test_composes_with_lora, first=True),
    "composition, turned": partial(test_methods.test_composes_with_lora, first=False),
    "checkpointing": partial(test_methods.test_activation_checkpointing_gives_the_same_gradients, own=True),
    "lanes": test_methods.test_lanes_by_call_and_by_row,
}


def pairs() -> list[object]:
    """Each method with one codec on each layout; the other codec, and further settings, are slow."""
    found = []
    for number, case in enumerate(all_cases()):
        for index, codec in enumerate(CODECS):
            first = case.index == 0 and (number + number // 4) % 2 == index
            found.append(pytest.param(case, codec, id=f"{case.id}-{codec}", marks=() if first else pytest.mark.slow))
    return found


@pytest.mark.parametrize(("case", "codec"), pairs())
def test_the_laws_hold_on_a_quantised_base(case: Case, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def toy(layout, seed=0, dtype=torch.float32):
        return quantised_toy(layout, codec, seed, dtype)

    assert len(compact_layers(toy(case.layout))) >= 8
    for module in (cases, test_methods):
        monkeypatch.setattr(module, "toy", toy)
    for name, law in LAWS.items():
        try:
            law(case=case)
        except (AssertionError, RuntimeError) as error:
            raise AssertionError(f"{name}: {error}") from error
    if case.layout != "bert" and case.name != "prompt":
        test_methods.test_generation_with_a_cache_equals_greedy_choice_without(case=case)
