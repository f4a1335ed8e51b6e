"""Prompt tuning: a text as prompt is the text before the text; generation; PEFT's files, both ways."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers as t
from torch import Tensor

from deltaloom.deltas.base import PeftPart
from deltaloom.deltas.lora import LoRA
from deltaloom.deltas.prompt import Prompt
from deltaloom.errors import CheckpointError, RefusedError, SettingsError
from deltaloom.generate import generate, stream
from deltaloom.tuned import Tuned, attach, restore
from tests.contract.cases import perturb, steps
from tests.deltas.test_prefix import TEXT, Words, part_of, peft_steps, taken, task_of, to_peft
from tests.test_generate import PROMPTS, TOKENIZER
from tests.toys import toy, toy_batch

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # in PEFT


def as_prompt(layout: str, tokens: list[int] = TEXT) -> Tuned:
    return attach(toy(layout), [Prompt(length=len(tokens), init="text", text=" ".join(map(str, tokens)))], tokenizer=Words())


def in_front(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with the text's ids before its own."""
    rows = len(batch["input_ids"])
    found = {**batch, "input_ids": torch.cat([torch.tensor([TEXT] * rows), batch["input_ids"]], 1)}
    if "attention_mask" in batch:
        found["attention_mask"] = torch.cat([torch.ones(rows, len(TEXT), dtype=torch.long), batch["attention_mask"]], 1)
    return found


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("layout", ["llama", "gpt2", "gemma", "bert", "distilbert", "roberta", "t5", "bart"])
def test_a_text_as_prompt_is_the_text_before_the_text(layout: str, padded: bool) -> None:
    batch = toy_batch(layout, labels=layout in ("t5", "bart"))
    if padded:
        batch["attention_mask"] = torch.ones(3, 7, dtype=torch.long)
        batch["attention_mask"][1, 4:] = 0
    with torch.no_grad():
        got, want = as_prompt(layout)(**batch).logits, toy(layout)(**in_front(batch)).logits
    want = want if want.ndim == 2 or layout in ("t5", "bart") else want[:, len(TEXT):]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_losses_count_the_text_alone_and_hidden_states_leave_the_prompt_out() -> None:
    batch = toy_batch("llama")
    tuned = as_prompt("llama")
    full = in_front(batch)
    full["labels"] = torch.cat([torch.full((3, len(TEXT)), -100), batch["labels"]], 1)
    with torch.no_grad():
        torch.testing.assert_close(tuned(**batch).loss, toy("llama")(**full).loss)
        states, head = tuned.hidden(input_ids=batch["input_ids"])
        torch.testing.assert_close(head(states), tuned(**batch).logits)


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_positions_that_the_caller_gives_move_behind_the_prompt(layout: str) -> None:
    batch = toy_batch(layout, labels=False)
    positions = torch.tensor([[0, 1, 2, 5, 6, 7, 8]]).expand(3, -1)
    full = torch.cat([torch.arange(len(TEXT))[None].expand(3, -1), positions + len(TEXT)], 1)
    mask = torch.ones(3, 11, dtype=torch.long)  # or transformers reads the gap as the start of another row
    with torch.no_grad():
        got = as_prompt(layout)(**batch, position_ids=positions, attention_mask=mask[:, 4:]).logits
        want = toy(layout)(input_ids=in_front(batch)["input_ids"], position_ids=full, attention_mask=mask).logits[:, len(TEXT):]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["llama", "gpt2", "t5"])
def test_generation_goes_on_behind_the_prompt(layout: str) -> None:
    want = generate(toy(layout), TOKENIZER, [TEXT + prompt for prompt in PROMPTS], max_new_tokens=7)
    tuned = as_prompt(layout)
    for batch_size in (1, 3):
        assert generate(tuned, TOKENIZER, PROMPTS, max_new_tokens=7, batch_size=batch_size) == want
    assert ["".join(stream(tuned, TOKENIZER, prompt, max_new_tokens=7)) for prompt in PROMPTS] == want


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_generation_with_another_prompt_for_each_row(layout: str) -> None:
    tuned = as_prompt(layout)
    tuned.add("longer", [Prompt(length=6)], seed=3)
    lanes = ["default", None, "longer", "default", None]
    want = []
    for lane, prompt in zip(lanes, PROMPTS, strict=True):
        with tuned.use(lane):
            want += generate(tuned, TOKENIZER, [prompt], max_new_tokens=6)
    with tuned.use(lanes):
        assert generate(tuned, TOKENIZER, PROMPTS, max_new_tokens=6, batch_size=5) == want


def test_initial_rows() -> None:
    def rows(seed: int = 0, **settings) -> Tensor:
        return attach(toy("llama"), [Prompt(**settings)], seed=seed, tokenizer=Words()).pairs()[0][1].rows()

    table = toy("llama").get_input_embeddings().weight.detach()
    drawn = rows(init="vocabulary", length=200)
    found = (drawn[:, None] == table).all(-1)
    assert found.any(1).all() and not found[:, list(Words.all_special_ids)].any(), "special tokens are no words"
    assert found.any(0).sum() > 40, "few different tokens"
    assert torch.equal(rows(1), rows(1)) and not torch.equal(rows(1), rows(2))
    random = rows(init="random", length=400)
    assert abs(float(random.std().detach()) / float(table.std()) - 1) < 0.1
    assert torch.equal(rows(init="text", text="5 9", length=3), table[[5, 9, 5]])


def test_state_comes_back_and_other_methods_compose() -> None:
    tuned = attach(toy("llama"), [Prompt(length=3), LoRA(rank=2)])
    steps(tuned, toy_batch("llama"), 2)
    state = {key: tensor.clone() for key, tensor in tuned.delta_state().items()}
    other = attach(toy("llama"), [Prompt(length=3), LoRA(rank=2)], seed=4)
    other.load_delta_state(state)
    with torch.no_grad():
        assert torch.equal(other(**toy_batch("llama")).logits, tuned(**toy_batch("llama")).logits)
    with pytest.raises(RefusedError, match="PromptDelta"):
        tuned.merge()


def test_a_saved_one_comes_back_without_the_text_it_began_with() -> None:
    tuned = as_prompt("llama")
    with torch.no_grad():
        want = tuned(**toy_batch("llama")).logits
        assert torch.equal(restore(toy("llama"), tuned.saved())(**toy_batch("llama")).logits, want)


# ---------------------------------------------------------------- PEFT

@pytest.mark.parametrize("layout", ["llama", "gpt2", "bert"])
def test_a_prompt_that_peft_trained_gives_the_same(layout: str) -> None:
    torch.manual_seed(3)
    batch = {**toy_batch(layout), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    batch["attention_mask"][1, 4:] = 0
    trained = peft.get_peft_model(toy(layout), peft.PromptTuningConfig(task_type=task_of(layout), num_virtual_tokens=4))
    peft_steps(trained, batch)
    trained.eval()
    with torch.no_grad():
        got, want = taken(toy(layout), part_of(trained), Prompt)(**batch).logits, trained(**batch).logits
    torch.testing.assert_close(got, want if want.ndim == 2 else want[:, 4:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["llama", "gpt2", "bert"])
def test_peft_gives_the_same_with_a_prompt_of_ours(layout: str) -> None:
    batch = {**toy_batch(layout), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    tuned = attach(toy(layout), [Prompt(length=4)])
    perturb(tuned, size=0.5)
    part = to_peft(tuned)
    config = peft.PromptTuningConfig(task_type=task_of(layout), inference_mode=True,
                                     **{key: value for key, value in part.config.items() if key != "peft_type"})
    other = peft.get_peft_model(toy(layout), config)
    other.prompt_encoder["default"].embedding.weight.data.copy_(part.tensors["prompt_embeddings"])
    other.eval()
    with torch.no_grad():
        want = other(**batch).logits
        torch.testing.assert_close(tuned(**batch).logits, want if want.ndim == 2 else want[:, 4:], atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- refusals

def test_refusals() -> None:
    for model in (toy("llama-classifier"), t.GPT2ForSequenceClassification(t.GPT2Config(
            vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32))):
        with pytest.raises(RefusedError, match=type(model).__name__):
            attach(model, [Prompt()])
    with pytest.raises(RefusedError, match="t5"):
        to_peft(attach(toy("t5"), [Prompt(length=3)]))
    good = to_peft(attach(toy("llama"), [Prompt(length=3)]))
    with pytest.raises(CheckpointError, match="prompt_embeddings"):
        Prompt.from_peft(PeftPart(good.config, {}), toy("llama"))
    with pytest.raises(CheckpointError, match="does not fit"):
        Prompt.from_peft(PeftPart(good.config, {"prompt_embeddings": torch.zeros(3, 15)}), toy("llama"))
    with pytest.raises(RefusedError, match="t5"):
        Prompt.from_peft(good, toy("t5"))
    with pytest.raises(SettingsError, match="text"):
        Prompt(init="text")
    with pytest.raises(SettingsError, match="length"):
        Prompt(length=0)
    tuned = as_prompt("bert")
    tuned.add("other", [Prompt(length=2)])
    with tuned.use(["default", "other", None]), pytest.raises(RefusedError, match="causal"):
        tuned(**toy_batch("bert"))
