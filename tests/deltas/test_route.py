"""A pool picked by the input text: against the loop over rows and tokens, in training, generation, packing, beams and lanes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from deltaloom.attention import Segments
from deltaloom.attention import attention as attention_function
from deltaloom.checkpoint import native
from deltaloom.deltas._layout import Places
from deltaloom.deltas.base import Method, PrefixDelta
from deltaloom.deltas.lora import LoRA
from deltaloom.deltas.prefix import Prefix
from deltaloom.deltas.prompt import Prompt
from deltaloom.deltas.route import Route, RouteGate, text_means
from deltaloom.errors import RefusedError, SettingsError
from deltaloom.generate import generate
from deltaloom.train.checkpoints import read_checkpoint
from deltaloom.train.settings import TrainSettings
from deltaloom.tuned import Tuned, attach
from tests.contract.cases import perturb
from tests.toy_tokenizers import byte_level
from tests.toys import toy, toy_batch
from tests.train.pieces import assert_same, run, small, state_of

PREFIX, PROMPT = {"method": "prefix", "length": 2}, {"method": "prompt", "length": 2}
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]])


def routed(layout: str = "llama", delta: dict[str, object] = PREFIX, *, seed: int = 1, **settings: object) -> Tuned:
    tuned = attach(toy(layout), [Route(**({"delta": delta, "pool": 4, "top": 2} | settings))], seed=seed)
    perturb(tuned, size=0.3, seed=seed)
    with torch.no_grad():
        gate_of(tuned).weight.mul_(4)  # rows that choose alike would show nothing
    return tuned


def gate_of(tuned: Tuned, lane: str | None = None) -> RouteGate:
    (gate,) = [module for part in tuned.attached(lane) for module in part.attachment.shared.values()]
    assert isinstance(gate, RouteGate)
    return gate


def answers(model: torch.nn.Module, layout: str, rows: int = 3, **others: Tensor) -> Tensor:
    extra = {"decoder_input_ids": toy_batch(layout, rows=rows, time=4, seed=2)["labels"]} if layout == "t5" else {}
    with torch.no_grad():
        return model(**toy_batch(layout, rows=rows, labels=False), **extra, **others).logits


def by_the_book(gate: RouteGate, text: Tensor, spread: float = 1.0) -> dict[int, float]:
    """Entry -> weight of one text (tokens, d_model)."""
    f = (text.detach().double().mean(0) - gate.centre.double()) / spread
    p = torch.softmax(gate.weight.detach().double() @ f + gate.bias.detach().double(), 0)
    best = sorted(range(len(p)), key=lambda k: -float(p[k]))[:gate.top]
    return {k: float(p[k] / sum(p[j] for j in best)) for k in best}


@pytest.mark.parametrize("layout", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("delta", [PREFIX, PROMPT], ids=["prefix", "prompt"])
def test_each_row_has_the_weighted_choice_of_its_text(layout: str, delta: dict[str, object]) -> None:
    """Row by row with a plain method whose numbers are those chosen: prompts averaged; prefixes alone where one is picked."""
    tuned = routed(layout, delta, top=2 if delta is PROMPT else 1)
    mask = MASK if layout != "gpt2" else torch.ones_like(MASK)
    found = answers(tuned, layout, attention_mask=mask)
    gate, ids = gate_of(tuned), toy_batch(layout, labels=False)["input_ids"]
    table = toy(layout).get_input_embeddings()
    used = set()
    for row in range(3):
        weights = by_the_book(gate, table(ids[row][mask[row] > 0]))
        used |= set(weights)
        for k, weight in weights.items():
            assert float(gate.used()[row, k]) == pytest.approx(weight, rel=1e-4)
        plain: Method = Prompt(length=2, init="random") if delta is PROMPT else Prefix(length=2, init="random")
        alone = attach(toy(layout), [plain])
        state = {}
        for key in alone.delta_state():
            index, site, name = key.split(":")
            state[key] = sum(tuned.delta_state()[f"{index}:{site}:pool.{k}.{name}"] * w for k, w in weights.items())
        alone.load_delta_state(state)
        one = answers(alone, layout, attention_mask=mask)[row]
        real = mask[row] > 0 if found.ndim == 3 and layout != "t5" else slice(None)
        torch.testing.assert_close(found[row][real], one[real], atol=2e-5, rtol=1e-4)
    assert len(used) > 1


def test_two_prefixes_share_the_attention_by_their_weights() -> None:
    """log w on the scores of each key, against softmax written out for one module."""
    tuned = routed()
    answers(tuned, "llama")
    (site, delta), *_ = tuned.pairs()
    assert isinstance(delta, PrefixDelta)
    logs = delta.log_gate(torch.zeros(3, 7, 16))
    assert logs.shape == (3, 1, 8) and bool(((logs == -torch.inf).sum(-1) == 4).all())
    keys, values = (x.detach() for x in delta.keys_values())
    q = torch.randn(3, 4, 7, 4)
    k = v = torch.randn(3, 2, 7, 4)
    attention = tuned.model.get_submodule(site.path)
    attention.entries[0].value = torch.zeros(3, 7, 16)
    out, _ = attention_function(attention.base, q, k, v, None, scaling=0.5)
    for row in range(3):
        for head in range(4):
            for t in range(7):
                own = torch.cat([keys[:, head // 2], k[row, head // 2, :t + 1]])
                scores = own @ q[row, head, t] * 0.5
                scores[:8] += logs[row, 0].detach()
                want = scores.softmax(0) @ torch.cat([values[:, head // 2], v[row, head // 2, :t + 1]])
                torch.testing.assert_close(out[row, t, head].detach(), want, atol=1e-5, rtol=1e-4)


def test_the_mean_leaves_out_padding_and_packed_rows_count_each_for_themselves() -> None:
    x = torch.randn(3, 7, 5)
    want = torch.stack([x[row, MASK[row] > 0].mean(0) for row in range(3)])
    torch.testing.assert_close(text_means(x, Places(MASK > 0)), want)
    empty = text_means(x, Places(torch.zeros(3, 7, dtype=torch.bool)))
    torch.testing.assert_close(empty, x[:, 0])
    packed = torch.cat([x[row, :int(MASK[row].sum())] for row in range(3)])[None]
    torch.testing.assert_close(text_means(packed, Places(None, (7, 4, 2))), want)


def test_packed_rows_are_as_separate_ones() -> None:
    tuned, ids = routed(), toy_batch("llama", labels=False)["input_ids"]
    lengths = (7, 4, 2)
    segments = Segments(lengths)
    packed = torch.cat([ids[row, :length] for row, length in enumerate(lengths)])[None]
    labels = torch.full((3, 7), -100)
    labels[0, 5:], labels[1, 3:], labels[2, 1:] = 1, 1, 1
    layout = tuned.routing.layout
    flat = torch.cat([labels[row, :length] for row, length in enumerate(lengths)])[None]
    with torch.no_grad(), layout.reading(flat, lengths):
        together = tuned(input_ids=packed, position_ids=segments.positions(), segments=segments, use_cache=False).logits[0]
    start = 0
    for row, length in enumerate(lengths):
        with torch.no_grad(), layout.reading(labels[row:row + 1, :length]):
            alone = tuned(input_ids=ids[row:row + 1, :length]).logits[0]
        torch.testing.assert_close(together[start:start + length], alone, atol=2e-5, rtol=1e-4)
        start += length


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_what_is_learned_is_no_part_of_the_text(layout: str) -> None:
    tuned, batch = routed(layout), toy_batch(layout)
    batch["labels"][:, :3] = -100
    tuned(**batch)
    first = gate_of(tuned).used()
    batch["input_ids"][:, 3:] = 9
    tuned(**batch)
    assert torch.equal(gate_of(tuned).used(), first)
    tuned(input_ids=batch["input_ids"][:, :3])
    torch.testing.assert_close(gate_of(tuned).used(), first)
    tuned(input_ids=batch["input_ids"])
    assert not torch.allclose(gate_of(tuned).used(), first)


@pytest.mark.parametrize("delta", [PREFIX, PROMPT], ids=["prefix", "prompt"])
def test_while_a_text_is_written_the_choice_of_its_prompt_stays(delta: dict[str, object]) -> None:
    tuned, tokenizer = routed(delta=delta), byte_level()
    ids = toy_batch("llama", labels=False)["input_ids"].tolist()
    prompts = [ids[0], ids[1][:4], ids[2][:2]]
    texts = generate(tuned, tokenizer, prompts, max_new_tokens=5)
    for prompt, text in zip(prompts, texts, strict=True):
        row = list(prompt)
        while len(row) < len(prompt) + 5:
            labels = torch.tensor([[-100] * len(prompt) + [1] * (len(row) - len(prompt))])
            with torch.no_grad(), tuned.routing.layout.reading(labels):
                row.append(int(tuned(input_ids=torch.tensor([row])).logits[0, -1].argmax()))
            if row[-1] == tokenizer.eos_token_id:
                row.pop()
                break
        assert text == tokenizer.decode(row[len(prompt):], skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("layout", ["llama", "t5"])
def test_beams_have_the_choice_of_their_row(layout: str) -> None:
    tuned = routed(layout)
    ids = toy_batch(layout, labels=False)["input_ids"]
    settings = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        together = tuned.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        for row in range(3):
            alone = tuned.model.generate(ids[row:row + 1], attention_mask=torch.ones_like(ids[:1]), **settings)
            assert torch.equal(together[row], alone[0])


def test_lanes_choose_each_for_itself_and_row_by_row() -> None:
    tuned = attach(toy("llama"), [Route(delta=PREFIX, pool=3, top=1)], "a", seed=1)
    tuned.add("b", [Route(delta=PREFIX, pool=4, top=2), Prompt(length=2), LoRA(rank=2)], seed=2)
    perturb(tuned, "a", seed=3), perturb(tuned, "b", seed=4)
    alone = {}
    for lane in ("a", "b"):
        with tuned.use(lane):
            alone[lane] = answers(tuned, "llama")
    with tuned.use(["b", "a", "b"]):
        mixed = answers(tuned, "llama")
    for row, lane in enumerate("bab"):
        torch.testing.assert_close(mixed[row], alone[lane][row], atol=2e-5, rtol=1e-4)
    tuned.remove("a")
    assert len(tuned.readers()) == 1
    assert torch.equal(answers(tuned.detach(), "llama"), answers(toy("llama"), "llama"))


def test_single_picks_learn_and_the_balance_is_that_of_the_book() -> None:
    tuned = routed(top=1, balance=0.5).train()
    batch = toy_batch("llama")
    batch["labels"][:, :3] = -100
    tuned(**batch).loss.backward()
    gate = gate_of(tuned)
    assert gate.weight.grad is not None and float(gate.weight.grad.abs().max()) > 0
    texts = toy("llama").get_input_embeddings()(batch["input_ids"])[:, :3].double().mean(1).detach()
    centre = texts.mean(0)
    square = texts.square().mean()
    spread = ((square - centre.square().mean()).clamp_min(0) + 0.01 * square).sqrt()
    p = torch.softmax(((texts - centre) / spread) @ gate.weight.detach().double().T + gate.bias.detach().double(), -1)
    share = torch.bincount(p.argmax(-1), minlength=4) / 3
    assert float(tuned.penalty().detach()) == pytest.approx(float(0.5 * 4 * (share * p.mean(0)).sum()), rel=1e-4)
    torch.testing.assert_close(gate.centre.double(), centre, atol=1e-5, rtol=1e-4)
    tuned.eval()(input_ids=batch["input_ids"])
    assert int(gate.seen) == 1


def test_saved_and_resumed_bit_for_bit(tmp_path: Path) -> None:
    settings = TrainSettings(max_steps=6, batch_size=6, learning_rate=1e-2, save_every=1, keep_checkpoints=9)
    method = Route(delta=PREFIX, pool=3, top=1)
    whole = attach(small(), [method], seed=3)
    run(whole, settings, folder=tmp_path / "run")
    again = attach(small(), [method], seed=5)
    run(again, settings, resume=read_checkpoint(tmp_path / "run" / "step-3"))
    assert_same(state_of(again), state_of(whole))
    native.save(whole, tmp_path / "delta")
    loaded = native.load(small(), tmp_path / "delta")
    ids = toy_batch("gpt2", labels=False)["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, whole.eval()(input_ids=ids).logits)
    with pytest.raises(RefusedError):
        whole.merge()


@pytest.mark.parametrize(("settings", "message"), [
    ({"delta": PREFIX, "pool": 1}, "pool"), ({"delta": PREFIX, "pool": 2, "top": 3}, "more than there are"),
    ({"delta": {"method": "prefx"}}, "prefix"), ({"delta": {"method": "route", "delta": PREFIX}}, "pool of pools"),
    ({}, "delta")])
def test_settings_that_cannot_be_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Route(**settings)


@pytest.mark.parametrize(("layout", "delta"), [
    ("llama", {"method": "lora"}), ("llama", {**PREFIX, "reparametrise": 4}), ("vit", {**PREFIX, "init": "random"}),
    ("gpt2", {**PREFIX, "position_shift": True})])
def test_what_has_no_pool_leaves_the_model_alone(layout: str, delta: dict[str, object]) -> None:
    model = toy(layout)
    with pytest.raises(RefusedError, match=r"pool of|reads tokens"):
        attach(model, [Route(delta=delta, pool=2)])
    assert all(parameter.requires_grad for parameter in model.parameters())
