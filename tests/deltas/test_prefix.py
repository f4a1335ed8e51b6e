"""Prefix tuning: a text as prefix is the text before the text; PEFT's files, both ways; the network that makes prefixes."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers as t
from torch import Tensor, nn

from deltaloom.attention import Segments, prefix_slot
from deltaloom.deltas import _positions
from deltaloom.deltas import prefix as prefix_module
from deltaloom.deltas._positions import turned
from deltaloom.deltas.base import PeftPart, PrefixDelta
from deltaloom.deltas.lora import LoRA
from deltaloom.deltas.prefix import Prefix
from deltaloom.errors import CheckpointError, RefusedError, SettingsError
from deltaloom.tuned import Tuned, attach, restore
from tests.contract.cases import perturb, steps
from tests.toys import toy, toy_batch

TEXT = [11, 30, 7, 52]
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # in PEFT


class Words:
    """A tokenizer of numbers."""

    all_special_ids = (0, 1, 2)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [int(word) for word in text.split()]}


def as_prefix(model: nn.Module, tokens: list[int] = TEXT, **settings) -> Tuned:
    method = Prefix(length=len(tokens), init="text", text=" ".join(map(str, tokens)), **settings)
    return attach(model, [method], tokenizer=Words())


def smollm3() -> nn.Module:
    """Rotated keys in the first layer, none in the second."""
    torch.manual_seed(0)
    return t.SmolLM3ForCausalLM(t.SmolLM3Config(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        no_rope_layers=[1, 0], pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()


def yarn() -> nn.Module:
    """Rotations that also scale."""
    torch.manual_seed(0)
    scaled = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    return t.LlamaForCausalLM(t.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        rope_parameters=scaled)).eval()


MODELS = {"smollm3": smollm3, "yarn": yarn}
ROTARY = ["llama", "qwen3", "gemma", "phi", "phi3", "smollm3", "yarn"]


def model_of(name: str) -> nn.Module:
    return MODELS[name]() if name in MODELS else toy(name)


# ---------------------------------------------------------------- a text as prefix

@pytest.mark.parametrize("name", [*ROTARY, "gpt2"])
def test_a_text_as_prefix_is_the_text_before_the_text(name: str) -> None:
    ids = toy_batch("llama", labels=False)["input_ids"]
    with torch.no_grad():
        want = model_of(name)(torch.cat([torch.tensor([TEXT] * len(ids)), ids], 1)).logits[:, len(TEXT):]
        tuned = as_prefix(model_of(name), position_shift=name == "gpt2")
        torch.testing.assert_close(tuned(input_ids=ids).logits, want, atol=2e-5, rtol=2e-5)


def test_without_a_shift_the_text_keeps_its_positions_in_a_table() -> None:
    ids = toy_batch("gpt2", labels=False)["input_ids"]
    tuned = as_prefix(toy("gpt2"))
    model = toy("gpt2")
    with torch.no_grad():
        cache = model(torch.tensor([TEXT] * len(ids)), use_cache=True).past_key_values
        want = model(ids, past_key_values=cache, position_ids=torch.arange(7)[None].expand(3, -1)).logits
        torch.testing.assert_close(tuned(input_ids=ids).logits, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation_goes_on_from_a_text_as_prefix(name: str) -> None:
    ids = toy_batch("llama", labels=False)["input_ids"]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want = toy(name).generate(torch.cat([torch.tensor([TEXT] * 3), ids], 1), **settings)[:, -6:]
    tuned = as_prefix(toy(name), position_shift=name == "gpt2")
    assert torch.equal(tuned.model.generate(ids, **settings)[:, -6:], want)


@pytest.mark.parametrize("layout", ["bert", "t5", "bart", "distilbert"])
def test_a_text_as_prefix_holds_the_models_own_keys_of_it(layout: str) -> None:
    tuned = as_prefix(toy(layout))
    first = next(delta for _, delta in tuned.pairs())
    model = toy(layout)
    own = model.get_submodule({"bert": "bert.encoder.layer.0.attention.self.key", "t5": "encoder.block.0.layer.0.SelfAttention.k",
                               "bart": "model.encoder.layers.0.self_attn.k_proj",
                               "distilbert": "distilbert.transformer.layer.0.attention.k_lin"}[layout])
    seen: list[Tensor] = []
    own.register_forward_hook(lambda module, args, output: seen.append(output))
    inputs = {"input_ids": torch.tensor([TEXT])}
    model(**inputs, **({"decoder_input_ids": inputs["input_ids"]} if model.config.is_encoder_decoder else {}))
    torch.testing.assert_close(first.keys_values()[0].flatten(1), seen[0][0])


def test_vocabulary_starts_from_random_tokens_by_seed_and_a_short_text_begins_again() -> None:
    def keys(seed: int, **settings) -> Tensor:
        tuned = attach(toy("llama"), [Prefix(length=6, **settings)], seed=seed, tokenizer=Words())
        return tuned.pairs()[0][1].keys_values()[0]

    assert torch.equal(keys(1, init="vocabulary"), keys(1, init="vocabulary"))
    assert not torch.equal(keys(1, init="vocabulary"), keys(2, init="vocabulary"))
    assert torch.equal(keys(1), keys(1, init="vocabulary"))
    assert keys(1).std() > 5 * keys(1, init="random").std() > 0
    image = attach(toy("vit"), [Prefix(length=6)]).pairs()[0][1].keys_values()[0]
    assert 0.015 < image.std() < 0.025, "a model without tokens starts from small random values"
    assert torch.equal(keys(0, init="text", text="5 9 5 9 5 9"), keys(0, init="text", text="5 9"))
    assert torch.equal(keys(0, init="text", text="5 9 5 9 5 9 40"), keys(0, init="text", text="5 9"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_layers_with_rotated_keys_are_turned(dtype) -> None:
    model = smollm3().to(dtype)
    sites = Prefix().sites(model)
    keys = [torch.randn(5, 2, 4) for _ in sites]
    first, second = turned(model, sites, keys, 3)
    assert torch.equal(second, keys[1]) and not torch.allclose(first, keys[0], atol=0.1)


def test_a_rotation_of_another_kind_is_refused(monkeypatch) -> None:
    model = toy("llama")
    sites = Prefix().sites(model)
    keys = [torch.randn(5, 2, 4) for _ in sites]
    with monkeypatch.context() as patched:  # whatever the family's own function does is what counts
        patched.setattr(t.models.llama.modeling_llama, "rotate_half",
                        lambda x: torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2))
        turned(model, sites, keys, 3)
    with monkeypatch.context() as patched:
        patched.setattr(_positions, "_turn", lambda model, attention, keys, by: keys.float())
        with pytest.raises(RefusedError, match="common way"):
            turned(model, sites, keys, 3)
    model.model.rotary_emb.rope_type = "dynamic"
    with pytest.raises(RefusedError, match="plain"):
        turned(model, sites, keys, 3)


def test_turning_forth_and_back_and_by_parts() -> None:
    model = toy("llama")
    sites = Prefix().sites(model)
    keys = [torch.randn(5, 2, 4) for _ in sites]
    there = turned(model, sites, keys, 9)
    assert not torch.allclose(there[0], keys[0], atol=0.1)
    for got, want in zip(turned(model, sites, there, -9), keys, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    for got, want in zip(turned(model, sites, turned(model, sites, keys, 4), 5), there, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- places

def test_a_subset_of_layers_changes_nothing_below_it() -> None:
    tuned = attach(toy("llama"), [Prefix(length=3, layers="1")])
    assert [site.layer for site, _ in tuned.pairs()] == [1]
    hidden = []
    tuned.model.model.layers[0].register_forward_hook(lambda module, args, output: hidden.append(output))
    batch = toy_batch("llama")
    with tuned.use(None):
        plain = tuned(**batch).logits
    assert not torch.allclose(tuned(**batch).logits, plain, atol=1e-4)
    assert torch.equal(hidden[0], hidden[1])


@pytest.mark.parametrize("layout", ["llama", "gpt2", "qwen3"])
def test_a_prefix_on_some_layers_leaves_the_first_token_as_it_is(layout: str) -> None:
    """Packed or padded on either side, in a batch or alone, and while decoding with a cache."""
    tuned = attach(toy(layout), [Prefix(length=3, layers="0")])
    perturb(tuned)
    ids = toy_batch(layout, labels=False)["input_ids"]
    with torch.no_grad():
        with tuned.use(None):
            plain = tuned(input_ids=ids).logits
        found = tuned(input_ids=ids).logits
        torch.testing.assert_close(found[:, 0], plain[:, 0])
        assert (found[:, 1:] - plain[:, 1:]).abs().amin(1).amax() > 1e-5
        pads = torch.full((len(ids), 2), 3)
        mask = torch.cat([torch.zeros_like(pads), torch.ones_like(ids)], 1)
        places = (mask.cumsum(1) - 1).clamp_min(0)
        left = tuned(input_ids=torch.cat([pads, ids], 1), attention_mask=mask, position_ids=places).logits[:, 2:]
        torch.testing.assert_close(left, found, atol=1e-5, rtol=1e-5)
        cache = tuned(input_ids=ids[:, :1], use_cache=True)
        rest = tuned(input_ids=ids[:, 1:], past_key_values=cache.past_key_values).logits
        torch.testing.assert_close(torch.cat([cache.logits, rest], 1), found, atol=1e-5, rtol=1e-5)
        lengths = (ids.shape[1],) * len(ids)
        segments = Segments(lengths)
        packed = tuned(input_ids=ids.reshape(1, -1), position_ids=segments.positions(), segments=segments).logits
        torch.testing.assert_close(packed.view(found.shape), found, atol=1e-5, rtol=1e-5)


def test_who_sees_a_prefix_follows_from_its_settings() -> None:
    assert not Prefix().spares_first and not Prefix(layers="0", first_token="sees").spares_first
    assert Prefix(first_token="alone").spares_first and Prefix(targets=("re:.*self_attn",)).spares_first
    both = attach(toy("llama"), [Prefix(length=2, first_token="sees"), Prefix(length=3, first_token="alone")])
    rows = prefix_slot(both.model.model.layers[0].self_attn).rows(2)
    assert rows.spared.tolist() == [[False] * 2 + [True] * 3]


def test_two_prefixes_of_one_delta_follow_one_another() -> None:
    ids = toy_batch("llama", labels=False)["input_ids"]
    methods = [Prefix(length=2, init="text", text=text) for text in ("11 30", "11 30")]
    tuned = attach(toy("llama"), methods, tokenizer=Words())
    keys = [delta.keys_values() for _, delta in tuned.pairs()]
    with torch.no_grad():
        both = tuned(input_ids=ids).logits
        one = attach(toy("llama"), [Prefix(length=4)])
        for index, (_, delta) in enumerate(one.pairs()):
            delta.keys.copy_(torch.cat([keys[index][0]] * 2))
            delta.values.copy_(torch.cat([keys[index][1]] * 2))
        torch.testing.assert_close(both, one(input_ids=ids).logits)


def test_detach_gives_back_the_attention_function_and_bf16_works() -> None:
    model = toy("llama", dtype=torch.bfloat16)
    before = model(**toy_batch("llama")).logits
    function = model.config._attn_implementation
    tuned = attach(model, [Prefix(length=3), LoRA(rank=2)])
    assert all(p.dtype == torch.float32 for p in tuned.delta_parameters().values())
    steps(tuned, toy_batch("llama"), 2)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in tuned.delta_parameters().values())
    model = tuned.detach()
    assert model.config._attn_implementation == function
    assert torch.equal(model(**toy_batch("llama")).logits, before)


def test_merging_refuses_and_says_why() -> None:
    tuned = attach(toy("llama"), [Prefix(length=3)])
    with pytest.raises(RefusedError, match="DirectPrefix"):
        tuned.merge()


# ---------------------------------------------------------------- the network

def network_of(tuned: Tuned) -> prefix_module.PrefixNetwork:
    return tuned.attached()[0].attachment.shared["network"]


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    counted: list[int] = []
    forward = prefix_module.PrefixNetwork.forward
    monkeypatch.setattr(prefix_module.PrefixNetwork, "forward", lambda self: (counted.append(1), forward(self))[1])
    return counted


@pytest.mark.parametrize("layout", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_network_runs_once_a_step_and_gives_the_gradients_of_what_it_made(layout, checkpointing, calls) -> None:
    tuned = attach(toy(layout), [Prefix(length=3, reparametrise=5)]).train()
    batch = toy_batch(layout)
    if checkpointing:
        tuned.checkpoint_activations()
    tuned(**batch).loss.backward()
    assert len(calls) == (2 if checkpointing else 1)  # the first block, run again, asks again
    got = [parameter.grad for parameter in network_of(tuned).parameters()]

    oracle = attach(toy(layout), [Prefix(length=3)]).train()  # the same keys and values as parameters, then the chain rule
    made = network_of(tuned)()
    pieces, start = [], 0
    for _, delta in oracle.pairs():
        for parameter in (delta.keys, delta.values):
            size = parameter[0].numel()
            parameter.data.copy_(made[:, start:start + size].view(parameter.shape))
            pieces.append(parameter)
            start += size
    oracle(**batch).loss.backward()
    want = torch.autograd.grad(made, list(network_of(tuned).parameters()), torch.cat([p.grad.flatten(1) for p in pieces], 1))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_forwards_before_their_backwards(checkpointing) -> None:
    grads = []
    for together in (False, True):
        tuned = attach(toy("llama"), [Prefix(length=3, reparametrise=5)]).train()
        if checkpointing:
            tuned.checkpoint_activations()
        batches = [toy_batch("llama", seed=seed) for seed in (1, 2)]
        if together:
            for loss in [tuned(**batch).loss for batch in batches]:
                loss.backward()
        else:
            for batch in batches:
                tuned(**batch).loss.backward()
        grads.append([parameter.grad for parameter in network_of(tuned).parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_without_gradients_the_network_runs_once_until_its_parameters_move(calls) -> None:
    tuned = attach(toy("llama"), [Prefix(length=3, reparametrise=5)])
    batch = toy_batch("llama")
    with torch.no_grad():
        first = tuned(**batch).logits
        tuned(**batch)
        assert len(calls) == 1
        tuned.model.generate(batch["input_ids"], max_new_tokens=4, pad_token_id=0)
        assert len(calls) == 1
    perturb(tuned)
    with torch.no_grad():
        assert not torch.allclose(tuned(**batch).logits, first)
    assert len(calls) == 2


def test_decoder_alone_and_copies_after_a_step() -> None:
    tuned = attach(toy("t5"), [Prefix(length=3, reparametrise=5)]).train()
    batch = toy_batch("t5")
    with torch.no_grad():
        encoded = tuned.model.get_encoder()(batch["input_ids"])
    for _ in range(2):  # the encoder's layers, the first ones, are not asked
        tuned(encoder_outputs=encoded, labels=batch["labels"]).loss.backward()
    tuned(**batch)
    copied = copy.deepcopy(tuned)
    assert torch.equal(copied(**batch).logits, tuned(**batch).logits)
    perturb(copied)
    assert not torch.equal(copied(**batch).logits, tuned(**batch).logits)


def test_the_network_is_in_the_state_once_and_goes_on_from_it() -> None:
    tuned = attach(toy("llama"), [Prefix(length=3, reparametrise=5)])
    steps(tuned, toy_batch("llama"), 2)
    state = {key: tensor.clone() for key, tensor in tuned.delta_state().items()}
    assert {key.split(":")[1] for key in state} == {"shared.network"}
    assert tuned.counts()[0] == sum(tensor.numel() for tensor in state.values()) == 3 * 8 + (8 * 5 + 5) + (5 * 32 + 32)
    other = attach(toy("llama"), [Prefix(length=3, reparametrise=5)], seed=9)
    other.load_delta_state(state)
    for one in (tuned, other):
        steps(one, toy_batch("llama"), 2)
    assert all(torch.equal(tensor, other.delta_state()[key]) for key, tensor in tuned.delta_state().items())


def test_a_saved_one_comes_back_without_the_text_it_began_with() -> None:
    tuned = as_prefix(toy("llama"))
    with torch.no_grad():
        want = tuned(**toy_batch("llama")).logits
        assert torch.equal(restore(toy("llama"), tuned.saved())(**toy_batch("llama")).logits, want)


# ---------------------------------------------------------------- PEFT

def task_of(layout: str) -> str:
    return "SEQ_CLS" if layout == "bert" else "CAUSAL_LM"


def peft_steps(model: nn.Module, batch: dict[str, Tensor]) -> None:
    chosen = [p for name, p in model.named_parameters() if "prompt_encoder" in name]
    optimizer = torch.optim.Adam(chosen, lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


def part_of(model: nn.Module) -> PeftPart:
    config = {key: getattr(value, "value", value) for key, value in model.peft_config["default"].to_dict().items()}
    tensors = {key: x for key, x in peft.get_peft_model_state_dict(model).items() if key == "prompt_embeddings"}
    return PeftPart(config, tensors)


def taken(model: nn.Module, part: PeftPart, method: type) -> Tuned:
    reading = method.from_peft(part, model)
    assert reading.used == set(part.tensors)
    tuned = attach(model, [reading.method])
    tuned.load_delta_state({f"0:{site}:{key}": x for site, own in reading.state.items() for key, x in own.items()})
    return tuned


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("layout", [*ROTARY, "gpt2", "bert"])
def test_a_prefix_that_peft_trained_gives_the_same(layout: str, projection: bool) -> None:
    torch.manual_seed(3)
    batch = {**toy_batch(layout), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    batch["attention_mask"][1, 4:] = 0
    trained = peft.get_peft_model(model_of(layout), peft.PrefixTuningConfig(
        task_type=task_of(layout), num_virtual_tokens=4, prefix_projection=projection, encoder_hidden_size=6))
    peft_steps(trained, batch)
    trained.eval()
    tuned = taken(model_of(layout), part_of(trained), Prefix)
    with torch.no_grad():
        got, want = tuned(**batch).logits, trained(**batch).logits
    real = batch["attention_mask"].bool() if layout != "bert" else slice(None)
    torch.testing.assert_close(got[real], want[real], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("reparametrise", [None, 5])
@pytest.mark.parametrize("layout", [*ROTARY, "gpt2", "bert"])
def test_peft_gives_the_same_with_a_prefix_of_ours(layout: str, reparametrise: int | None) -> None:
    batch = toy_batch(layout)
    tuned = attach(model_of(layout), [Prefix(length=4, reparametrise=reparametrise, position_shift=layout in ("gpt2", "bert"))])
    perturb(tuned, size=0.5)
    steps(tuned, batch, 2)
    attached = tuned.attached()[0]
    with tuned.bare() as bare:
        part = attached.method.to_peft(attached.attachment, bare)
    config = peft.PrefixTuningConfig(task_type=task_of(layout), inference_mode=True,
                                     **{key: value for key, value in part.config.items() if key != "peft_type"})
    other = peft.get_peft_model(model_of(layout), config)
    other.prompt_encoder["default"].load_prompt_embeddings(part.tensors["prompt_embeddings"])
    other.eval()
    batch = {**batch, "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    with torch.no_grad():
        torch.testing.assert_close(tuned(**batch).logits, other(**batch).logits, atol=2e-5, rtol=2e-5)
    again = taken(model_of(layout), PeftPart({**config.to_dict(), "peft_type": "PREFIX_TUNING", "task_type": None}, part.tensors),
                  Prefix)
    for (_, ours), (_, back) in zip(prefixes(tuned), prefixes(again), strict=True):
        for one, other_one in zip(ours.keys_values(), back.keys_values(), strict=True):
            torch.testing.assert_close(one, other_one, atol=1e-5, rtol=1e-5)


def prefixes(tuned: Tuned) -> list[tuple]:
    return [(site, delta) for site, delta in tuned.pairs() if isinstance(delta, PrefixDelta)]


def to_peft(tuned: Tuned) -> PeftPart:
    attached = tuned.attached()[0]
    with tuned.bare() as bare:
        return attached.method.to_peft(attached.attachment, bare)


@pytest.mark.parametrize("layout, settings, reason", [
    ("t5", {}, "decoder alone"), ("bart", {}, "decoder alone"), ("llama", {"layers": (0,)}, "every layer"),
    ("llama", {"first_token": "alone"}, "first token"), ("gpt2", {}, "position_shift"), ("bert", {}, "position_shift")])
def test_what_peft_cannot_hold_is_refused(layout: str, settings: dict, reason: str) -> None:
    with pytest.raises(RefusedError, match=reason):
        to_peft(attach(toy(layout), [Prefix(length=3, **settings)]))


def test_damaged_peft_files_are_refused() -> None:
    model = toy("llama")
    good = to_peft(attach(model, [Prefix(length=3)]))
    with pytest.raises(CheckpointError, match="prompt_embeddings"):
        Prefix.from_peft(PeftPart(good.config, {}), model)
    for wrong in (good.tensors["prompt_embeddings"][:, :-1], good.tensors["prompt_embeddings"][0]):
        with pytest.raises(CheckpointError, match="does not fit"):
            Prefix.from_peft(PeftPart(good.config, {"prompt_embeddings": wrong}), toy("llama"))
    with pytest.raises(RefusedError, match="flavour"):
        Prefix.from_peft(PeftPart({**good.config, "flavour": 3}, good.tensors), toy("llama"))


# ---------------------------------------------------------------- refusals

@pytest.mark.parametrize("settings, reason", [
    ({"length": 0}, "length"), ({"init": "text"}, "text"), ({"text": "a"}, "text"), ({"layers": "x"}, "layers"),
    ({"first_token": "never"}, "first_token"), ({"reparametrise": 8, "init": "vocabulary"}, "network"),
    ({"size": 3}, "unknown key")])
def test_wrong_settings(settings: dict, reason: str) -> None:
    with pytest.raises(SettingsError, match=reason):
        Prefix(**settings)


def test_wrong_models() -> None:
    with pytest.raises(RefusedError, match="table of positions"):
        attach(toy("llama"), [Prefix(position_shift=True)])
    with pytest.raises(RefusedError, match="shifted"):
        attach(toy("bart"), [Prefix(position_shift=True)])
    with pytest.raises(SettingsError, match="tokenizer"):
        attach(toy("llama"), [Prefix(init="text", text="a")])
    with pytest.raises(RefusedError, match="token embeddings"):
        attach(toy("vit"), [Prefix(init="vocabulary")])
    bloom = t.BloomForCausalLM(t.BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(RefusedError, match="bloom"):
        attach(bloom, [Prefix()])
    assert all(p.requires_grad for p in bloom.parameters())
