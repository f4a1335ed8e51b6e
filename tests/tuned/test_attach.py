"""Attaching, switching, leaving: what users of other libraries were hurt by, and what surrounds a forward call."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn

from deltaloom.deltas.base import AttachContext, Attachment
from deltaloom.deltas.bitfit import BitFit
from deltaloom.deltas.bottleneck import Bottleneck
from deltaloom.deltas.full import Full
from deltaloom.deltas.intrinsic import Intrinsic
from deltaloom.deltas.lora import LoRA
from deltaloom.deltas.prefix import Prefix
from deltaloom.errors import CheckpointError, RefusedError, SettingsError, TargetError
from deltaloom.sites import Site, all_sites, find_sites
from deltaloom.tuned import attach
from deltaloom.tuned.adapted import Adapted
from tests.contract.cases import assert_same_snapshot, assert_same_tensors, gradients, logits, perturb, snapshot, state
from tests.toys import LAYOUTS, MORE_LAYOUTS, toy, toy_batch

ALL = [*LAYOUTS, *MORE_LAYOUTS]


# ---- targets -----------------------------------------------------------------------------------------------------------


def test_one_target_of_several_without_a_match_is_an_error() -> None:
    with pytest.raises(TargetError, match="k_porj") as error:
        LoRA(targets=("q_proj", "k_porj")).sites(toy("llama"))
    assert "k_proj" in str(error.value)


def test_all_unmatched_targets_are_named_at_once() -> None:
    with pytest.raises(TargetError, match=r"one.*two"):
        LoRA(targets=("one", "q_proj", "two")).sites(toy("llama"))


def test_an_exclusion_that_excludes_nothing_is_an_error() -> None:
    with pytest.raises(TargetError, match="lm_haed"):
        LoRA(targets=("all", "!lm_haed")).sites(toy("llama"))


def test_layers_keep_only_these_blocks_and_name_those_that_exist() -> None:
    assert {site.layer for site in LoRA(layers=(1,)).sites(toy("llama"))} == {1}
    assert {site.layer for site in LoRA(layers="0-1").sites(toy("llama"))} == {0, 1}
    with pytest.raises(TargetError, match=r"legal: 0, 1"):
        LoRA(layers=(7,)).sites(toy("llama"))
    with pytest.raises(SettingsError, match="ranges"):
        LoRA(layers="one")


def test_one_block_of_several_without_a_site_is_an_error() -> None:
    """peft#1959 and its like: what matches nothing beside something that matches was skipped."""
    with pytest.raises(TargetError, match="block 7 has none of the targets"):
        LoRA(layers="0-1,7").sites(toy("llama"))
    with pytest.raises(TargetError, match="block 1 has none"):
        LoRA(targets="*layers.0.*", layers="0-1").sites(toy("llama"))


def test_one_target_of_several_outside_the_blocks_is_an_error() -> None:
    with pytest.raises(TargetError, match="'lm_head' names nothing in these blocks"):
        LoRA(targets=("q_proj", "lm_head"), layers="0-1").sites(toy("llama"))
    assert len(LoRA(targets=("all", "!lm_head"), layers="0").sites(toy("llama"))) == 7


@pytest.mark.parametrize("layout", ALL)
def test_all_linear_is_every_affine_layer_inside_the_blocks_and_nothing_else(layout: str) -> None:
    model = toy(layout)
    own = {path for path, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")
           and any(piece.isdigit() for piece in path.split("."))}
    assert {site.path for site in find_sites(model, "all-linear", ["linear"])} == own


@pytest.mark.parametrize("layout", ALL)
def test_site_names_are_unique_and_every_parameter_belongs_to_a_site(layout: str) -> None:
    model = toy(layout)
    sites = all_sites(model)
    assert len({site.name for site in sites}) == len(sites)
    covered = {site.path for site in sites if site.kind in ("linear", "embedding", "norm", "tensors")}
    assert {name.rpartition(".")[0] for name, _ in model.named_parameters(remove_duplicate=False)} == covered


def test_embeddings_that_do_more_than_look_up_are_no_embedding_sites() -> None:
    """BART's position table gets no ids but a tensor whose shape it reads."""
    assert {site.path.rsplit(".", 1)[-1] for site in find_sites(toy("bart"), "all", ["embedding"])} == {"shared", "embed_tokens"}
    tuned = attach(toy("bart"), [LoRA(rank=2, targets="all"), Full(targets="embed_positions")])
    tuned(**toy_batch("bart")).loss.backward()


# ---- attaching ---------------------------------------------------------------------------------------------------------


def test_attaching_twice_is_an_error_and_further_deltas_get_their_own_name() -> None:
    model = toy("llama")
    tuned = attach(model, [LoRA()])
    with pytest.raises(RefusedError, match="already"):
        attach(model, [LoRA()])
    with pytest.raises(RefusedError, match="attached already"):
        tuned.add("default", [LoRA()])
    tuned.add("other", [LoRA()])
    assert sorted(tuned.lanes) == ["default", "other"]


def test_attaching_around_prefixes_is_refused_too() -> None:
    """peft#2295: they are no wrappers in the model, and the second would have joined the first one's."""
    tuned = attach(toy("llama"), [Prefix(length=3)])
    answers = logits(tuned, "llama")
    with pytest.raises(RefusedError, match="already"):
        attach(tuned.model, [Prefix(length=3)], seed=4)
    assert torch.equal(logits(tuned, "llama"), answers)
    attach(tuned.detach(), [Prefix(length=3)])


@pytest.mark.parametrize("name", ["lora", "base", "lanes", "q_proj", "model", "weight", "default", "down", "0", "None"])
def test_a_delta_may_have_any_name_even_one_of_a_method_or_a_layer(name: str) -> None:
    tuned = attach(toy("llama"), [LoRA(rank=2), BitFit()], name)
    tuned.add("second", [LoRA(rank=2)])
    perturb(tuned, name)
    with tuned.use(name):
        answers = logits(tuned, "llama")
        other = attach(toy("llama"), [LoRA(rank=2), BitFit()], "elsewhere")
        other.load_delta_state(state(tuned))
        assert torch.equal(logits(other, "llama"), answers)
        tuned.remove("second")
        assert torch.equal(logits(tuned, "llama"), answers)
    tuned.remove(name)
    assert not any(isinstance(module, Adapted) for module in tuned.modules())


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "ä", "x" * 65])
def test_names_that_would_break_files_are_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="name"):
        attach(toy("llama"), [LoRA()], name)


def test_a_failing_second_delta_leaves_the_first_as_it_was() -> None:
    tuned = attach(toy("llama"), [LoRA(rank=2)], "a")
    perturb(tuned)
    before, answers = snapshot(tuned.model), logits(tuned, "llama")
    with pytest.raises(TargetError):
        tuned.add("b", [BitFit(), LoRA(targets="nowhere")])
    with pytest.raises(RefusedError, match="no effect"):
        tuned.add("b", [Full(), Full()])
    assert_same_snapshot(before, snapshot(tuned.model))
    assert torch.equal(logits(tuned, "llama"), answers)


def test_removing_a_delta_that_is_not_in_use_changes_nothing() -> None:
    tuned = attach(toy("llama"), [LoRA(rank=2)], "a")
    tuned.add("b", [LoRA(rank=2)])
    tuned.add("c", [Bottleneck(size=2)])
    perturb(tuned, "b")
    tuned.use("b")
    answers = logits(tuned, "llama")
    tuned.remove("a")
    tuned.remove("c")
    assert tuned.name == "b"
    assert torch.equal(logits(tuned, "llama"), answers)


def test_a_wrapped_layer_inside_a_wrapped_module() -> None:
    """ViT's embeddings have tensors of their own and layers inside."""
    model = toy("vit")
    before = snapshot(model)
    tuned = attach(model, [Full(targets=("embeddings", "projection"))])
    tuned.add("b", [Full(targets="projection")])
    tuned.use("default")
    tuned(**toy_batch("vit")).loss.backward()
    assert len(gradients(tuned)) == len(tuned.delta_parameters()) == 4
    with tuned.bare() as bare:
        assert not any(isinstance(module, Adapted) for module in bare.modules())
    tuned.remove("default")
    assert_same_snapshot(before, snapshot(tuned.detach()))


def test_a_wrapped_layer_directly_inside_a_wrapped_module() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.shift = nn.Linear(3, 3), nn.Parameter(torch.zeros(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) + self.shift

    model = nn.Sequential(Shifted())
    before = snapshot(model)
    tuned = attach(model, [Full()])
    tuned.model(torch.ones(2, 3)).sum().backward()
    assert tuned.never_ran() == []
    assert len(gradients(tuned)) == 3
    assert_same_snapshot(before, snapshot(tuned.detach()))
    tuned = attach(model, [Full(targets="re:0")], "outer")
    tuned.add("inner", [Full(targets="inner")])
    tuned.model(torch.ones(2, 3)).sum().backward()
    assert tuned.never_ran() == []
    assert_same_snapshot(before, snapshot(tuned.detach()))


def test_a_module_that_is_called_by_keywords() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.sinks = nn.Linear(3, 3), nn.Parameter(torch.ones(3))

        def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None = None, factor: float = 1.0) -> torch.Tensor:
            return self.q_proj(input=hidden) * self.sinks * factor + mask

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(mask=x, factor=2.0, hidden=x)

    model, x = nn.Sequential(Block()), torch.ones(2, 3)
    expected = model(x)
    tuned = attach(model, [Full(targets="0.attention"), LoRA(rank=1, targets="q_proj")])
    assert torch.equal(tuned.model(x), expected)
    tuned.model(x).sum().backward()
    assert len(gradients(tuned)) == 3
    assert tuned.never_ran() == []
    with pytest.raises(RefusedError, match="first input"):
        tuned.model[0].attention(mask=x)


def test_a_failure_while_attaching_leaves_the_model_as_it_was() -> None:
    class Broken(LoRA):
        def attach(self, sites: Sequence[Site], context: AttachContext) -> Attachment:
            made = super().attach(sites, context).deltas
            (last, delta) = made.popitem()
            return Attachment({**made, replace(last, path="no.such.layer"): delta})

    model = toy("llama")
    before = snapshot(model)
    with pytest.raises(AttributeError, match="no"):
        attach(model, [Broken()])
    assert_same_snapshot(before, snapshot(model))
    tuned = attach(model, [LoRA()], "a")
    with pytest.raises(AttributeError, match="no"):
        tuned.add("b", [Broken()])
    assert tuned.in_use() == ["a"]
    assert list(tuned.lanes) == ["a"]
    assert_same_snapshot(before, snapshot(tuned.detach()))


def test_a_new_delta_takes_the_model_s_mode() -> None:
    tuned = attach(toy("llama").eval(), [LoRA(rank=2, dropout=0.5)])
    perturb(tuned)
    assert not tuned.training
    assert torch.equal(logits(tuned, "llama"), logits(tuned, "llama"))
    tuned.train()
    assert not torch.equal(logits(tuned, "llama"), logits(tuned, "llama"))
    assert attach(toy("llama").train(), [LoRA()]).training


def test_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    tuned = attach(toy("llama"), [LoRA(rank=2)])
    other = attach(toy("llama"), [LoRA(rank=3), BitFit()])
    before = state(tuned)
    with pytest.raises(CheckpointError, match="unexpected"):
        tuned.load_delta_state(state(other))
    assert_same_tensors(before, state(tuned))


# ---- lanes -------------------------------------------------------------------------------------------------------------


def test_rows_that_do_not_fit_the_batch_are_refused() -> None:
    tuned = attach(toy("llama"), [LoRA()], "a")
    tuned.add("b", [LoRA()])
    with tuned.use(["a", "b"]), pytest.raises(RefusedError, match="2 rows"):
        tuned(**toy_batch("llama", rows=3))
    with pytest.raises(SettingsError, match="'c'"):
        tuned.use(["a", "c"])


def test_penalties_are_those_of_the_lanes_in_use() -> None:
    tuned = attach(toy("llama"), [LoRA()], "a")
    tuned.add("b", [LoRA()])
    assert tuned.in_use() == ["b"]
    with tuned.use(["a", None, "b", "a"]):
        assert tuned.in_use() == ["a", "b"]
        assert tuned.penalty() == 0
    with tuned.use(None):
        assert tuned.in_use() == []
        assert tuned.penalty() == 0


@pytest.mark.parametrize("layout", ["bert", "gpt2"])
def test_embeddings_and_positions_row_by_row(layout: str) -> None:
    """Positions come as one row for the whole batch."""
    tuned = attach(toy(layout), [LoRA(rank=2, targets="all")], "a")
    tuned.add("b", [LoRA(rank=2, targets="all")])
    perturb(tuned, "a", 1)
    perturb(tuned, "b", 2)
    with tuned.use("a"):
        a = logits(tuned, layout)
    with tuned.use("b"):
        b = logits(tuned, layout)
    with tuned.use(["b", "a", "b"]):
        torch.testing.assert_close(logits(tuned, layout), torch.stack((b[0], a[1], b[2])), atol=1e-5, rtol=1e-5)


# ---- checkpointing of activations ------------------------------------------------------------------------------------------


def test_reentrant_activation_checkpointing_is_refused() -> None:
    tuned = attach(toy("vit"), [LoRA()])
    tuned.model.activation_checkpointing_enable({"use_reentrant": True})
    tuned.train()
    with pytest.raises(RefusedError, match="reentrant"):
        tuned(**toy_batch("vit"))
    tuned.checkpoint_activations()
    tuned(**toy_batch("vit")).loss.backward()
    assert len(gradients(tuned)) == len(tuned.delta_parameters())


def test_checkpointing_may_be_switched_on_before_attaching() -> None:
    """peft#869: a prefix then raised an error of the cache, or was cut off."""
    found = []
    for checkpointing in (False, True):
        model = toy("llama")
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        tuned = attach(model, [Prefix(length=3), LoRA(rank=2)]).train()
        tuned(**toy_batch("llama")).loss.backward()
        found.append(gradients(tuned))
    assert found[0].keys() == found[1].keys() == tuned.delta_parameters().keys()
    for key, expected in found[0].items():
        torch.testing.assert_close(found[1][key], expected, rtol=1e-5, atol=1e-7)


def test_checkpointing_keeps_its_lanes_in_a_copy_too() -> None:
    tuned = attach(toy("llama"), [LoRA(rank=2)], "a")
    tuned.add("b", [LoRA(rank=2)])
    perturb(tuned, "a")
    tuned.checkpoint_activations()
    tuned.train()
    twin = copy.deepcopy(tuned)
    inputs = {**toy_batch("llama"), "use_cache": False}
    found = []
    for model, switched in ((tuned, "a"), (twin, "b")):
        with model.use("a"):
            loss = model(**inputs).loss
        with model.use(switched):
            loss.backward()
        found.append(gradients(model, "a"))
    assert found[0].keys() == found[1].keys() != set()
    assert_same_tensors(*found)


def test_checkpointing_does_not_send_gradients_to_frozen_embeddings() -> None:
    tuned = attach(toy("llama"), [LoRA(layers=(1,))])
    tuned.checkpoint_activations()
    outputs = []
    tuned.model.get_input_embeddings().register_forward_hook(lambda module, args, output: outputs.append(output.requires_grad))
    tuned.train()
    tuned(**toy_batch("llama"), use_cache=False).loss.backward()
    assert outputs == [False]


# ---- what surrounds a call ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_autocast_on_a_full_precision_model(layout: str) -> None:
    batch = toy_batch(layout)
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(toy(layout), layout)
        tuned = attach(toy(layout), [LoRA(rank=2), BitFit(), Bottleneck(size=2)])
        assert torch.equal(logits(tuned, layout), expected)
        tuned(**batch).loss.backward()
    found = gradients(tuned)
    assert len(found) == len(tuned.delta_parameters())
    assert {g.dtype for g in found.values()} == {torch.float32}
    assert all(torch.isfinite(g).all() for g in found.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inference_mode(layout: str) -> None:
    tuned = attach(toy(layout), [LoRA(rank=2), Bottleneck(size=2), Full(targets="re:.*[nN]orm.*|.*ln_.*")])
    perturb(tuned)
    expected = logits(tuned, layout)
    with torch.inference_mode():
        assert torch.equal(tuned(**toy_batch(layout)).logits, expected)
    tuned(**toy_batch(layout)).loss.backward()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_deep_copy_is_apart_from_its_original(layout: str) -> None:
    tuned = attach(toy(layout), [LoRA(rank=2), Bottleneck(size=2)], "a")
    tuned.add("b", [LoRA(rank=2)])
    perturb(tuned, "a")
    tuned.use("a")
    twin, answers = copy.deepcopy(tuned), logits(tuned, layout)
    assert torch.equal(logits(twin, layout), answers)
    twin.use("b")
    perturb(twin, "a", seed=9)
    assert torch.equal(logits(tuned, layout), answers)
    assert {id(p) for p in twin.parameters()}.isdisjoint({id(p) for p in tuned.parameters()})
    pairs = {id(p) for _, delta in twin.pairs("a") for p in delta.parameters()}
    inside = {id(p) for module in twin.modules() if isinstance(module, Adapted) for _, delta in module.items("a")
              for p in delta.parameters()}
    assert pairs == inside


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_double_precision(layout: str) -> None:
    tuned = attach(toy(layout), [LoRA(rank=2), Bottleneck(size=2)])
    perturb(tuned)
    expected = logits(tuned, layout)
    tuned.to(torch.float64)
    got = logits(tuned, layout)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got.float(), expected, atol=1e-4, rtol=1e-4)


def test_a_layer_that_ran_in_no_forward_call_is_known() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    for method in (LoRA(rank=1, targets="all"), Intrinsic(over={"method": "lora", "rank": 1, "targets": "all"}, dimension=5)):
        tuned = attach(Idle(), [method])
        tuned(torch.ones(1, 3))
        assert tuned.never_ran() == ["idle"]


def test_a_branch_whose_entry_does_not_run_says_so() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.down_proj = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.gate_proj(self.down_proj(x))

    tuned = attach(nn.Sequential(Block()), [Bottleneck(size=2)])
    with pytest.raises(RefusedError, match="without its input layer"):
        tuned.model(torch.ones(1, 3))


def test_nothing_here_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned = attach(toy("llama"), [LoRA()])
        tuned.checkpoint_activations()
        tuned.train()
        tuned(**toy_batch("llama"), use_cache=False).loss.backward()


def test_one_method_is_taken_out_of_a_lane_and_the_others_stay() -> None:
    methods = [Bottleneck(placement="parallel", size=4), BitFit(), LoRA(rank=2)]
    tuned, other = attach(toy("llama"), methods, seed=1), attach(toy("llama"), [methods[0], methods[2]], seed=1)
    perturb(tuned)
    expected = {key: tensor for key, tensor in state(tuned).items() if not key.startswith("1:")}
    tuned.add("again", [BitFit()])  # a second lane on the same layers
    perturb(tuned, "again")
    answers = logits(tuned, "llama")
    tuned.discard(tuned.attached("default")[1], "default")
    assert [part.method for part in tuned.attached("default")] == [methods[0], methods[2]]
    other.load_delta_state({f"{min(int(key[0]), 1)}{key[1:]}": tensor for key, tensor in expected.items()})
    with tuned.use("default"):
        assert torch.equal(logits(tuned, "llama"), logits(other, "llama"))
    with tuned.use("again"):
        assert torch.equal(logits(tuned, "llama"), answers)
    prefix = attach(toy("llama"), [Prefix(length=2), LoRA(rank=2)])
    with pytest.raises(RefusedError, match="cannot be taken out"):
        prefix.discard(prefix.attached()[0])
