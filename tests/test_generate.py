"""Decoding: batches equal single prompts, the cache equals a loop without one, pads change nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltaloom.attention import PrefixRows, PrefixSlot, attention_shape, install, set_prefix_slot
from deltaloom.deltas.lora import LoRA
from deltaloom.errors import RefusedError, UsageError
from deltaloom.generate import encoded, end_tokens, generate, stream
from deltaloom.tuned import attach
from tests.toys import VOCABULARY, toy

BYTES = bytes(range(97, 123)) + b" " + "é€".encode()


class ByteTokenizer:
    """Tokens 3 and up are bytes; 0 is the pad, 1 the start, 2 the end."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [BYTES.index(byte) + 3 for byte in text.encode()]}

    def decode(self, ids, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = True) -> str:
        assert skip_special_tokens and not clean_up_tokenization_spaces
        return b"".join(bytes([BYTES[(token - 3) % len(BYTES)]]) for token in ids if token > 2).decode(errors="replace")


TOKENIZER = ByteTokenizer()
PROMPTS = [[5, 9, 11, 4], [7], [20, 21, 22, 23, 24, 25, 26], [3, 3], [40, 8, 33]]
CAUSAL = ("llama", "gpt2", "qwen3", "gemma", "phi")
BOTH = (*CAUSAL, "t5", "bart")


class Fixed(PrefixSlot):
    def __init__(self, keys, values) -> None:
        self.given = PrefixRows(keys, values)

    def rows(self, count: int) -> PrefixRows:
        return self.given


def with_prefix(model: nn.Module) -> nn.Module:
    install(model)
    generator = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if name.endswith(("self_attn", ".attn", "SelfAttention")):
            shape = (3, *attention_shape(module))
            set_prefix_slot(module, Fixed(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)))
    return model


def argmax_loop(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    """The dumb way: the whole text through the model for each token, no cache, no pads."""
    ends, new = end_tokens(model, TOKENIZER), []
    for _ in range(count):
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                start = model.generation_config.decoder_start_token_id
                logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[start, *new]])).logits
            else:
                logits = model(torch.tensor([prompt + new])).logits
        token = int(logits[0, -1].argmax())
        if token in ends:
            break
        new.append(token)
    return new


def prepared(layout: str, prefix: bool = False) -> nn.Module:
    model = toy(layout)
    return with_prefix(model) if prefix else model


def text(ids: list[int]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("layout", BOTH)
@pytest.mark.parametrize("prefix", [False, True])
def test_greedy_equals_the_loop_without_cache_in_any_batch(layout, prefix):
    model = prepared(layout, prefix)
    want = [text(argmax_loop(model, prompt, 9)) for prompt in PROMPTS]
    assert len(set(want)) > 1, "prompts do not matter here, so pads could not either"
    for batch_size in (1, 2, 8):
        assert generate(model, TOKENIZER, PROMPTS, max_new_tokens=9, batch_size=batch_size) == want


@pytest.mark.parametrize("layout", BOTH)
def test_stream_joined_is_generate(layout):
    model = prepared(layout, prefix=True)
    for prompt in PROMPTS:
        assert "".join(stream(model, TOKENIZER, prompt, max_new_tokens=9)) == generate(model, TOKENIZER, [prompt],
                                                                                      max_new_tokens=9)[0]


def force(model: nn.Module, tokens: list[int]) -> None:
    """Make the model write these tokens one after another, by its head alone: each state points at the next token."""
    order = [7, *tokens]

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
            self.step = 0

        def forward(self, hidden):
            logits = torch.zeros(*hidden.shape[:-1], VOCABULARY)
            logits[..., order[min(self.step + 1, len(order) - 1)]] = 9.0
            self.step += 1
            return logits

    model.lm_head = Head()


def test_every_end_token_stops_and_none_is_shown():
    for end in (2, 30, 31):
        model = prepared("llama")
        model.generation_config.eos_token_id = [30, 31]
        force(model, [5, 6, end, 9, 9])
        assert generate(model, TOKENIZER, [[7]], max_new_tokens=5) == ["cd"]
        force(model, [5, 6, end, 9, 9])
        assert "".join(stream(model, TOKENIZER, [7], max_new_tokens=5)) == "cd"
    assert end_tokens(model, TOKENIZER) == [30, 31, 2]


def test_stream_waits_for_whole_characters():
    model = prepared("llama")
    ids = TOKENIZER("a€é b")["input_ids"]
    force(model, [*ids, 2])
    assert list(stream(model, TOKENIZER, [7])) == ["a", "€", "é", " ", "b"]
    force(model, [*ids[:2], 2])
    assert "".join(stream(model, TOKENIZER, [7])) == generate_forced(ids[:2])


def generate_forced(ids: list[int]) -> str:
    model = prepared("llama")
    force(model, [*ids, 2])
    return generate(model, TOKENIZER, [[7]])[0]


def test_sampling_repeats_by_seed_and_leaves_the_callers_random_state():
    model = prepared("llama").train()
    settings = {"max_new_tokens": 8, "temperature": 1.5, "batch_size": 2}
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one = generate(model, TOKENIZER, PROMPTS, **settings, seed=1)
    streamed = list(stream(model, TOKENIZER, [5, 6], temperature=1.5, max_new_tokens=8, seed=3))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training and all(module.training for module in model.modules())
    torch.randn(3)
    assert generate(model, TOKENIZER, PROMPTS, **settings, seed=1) == one
    assert list(stream(model, TOKENIZER, [5, 6], temperature=1.5, max_new_tokens=8, seed=3)) == streamed
    assert generate(model, TOKENIZER, PROMPTS, **settings, seed=2) != one
    nearly_greedy = generate(model, TOKENIZER, PROMPTS, max_new_tokens=8, temperature=1.5, top_p=1e-6)
    assert nearly_greedy == generate(model, TOKENIZER, PROMPTS, max_new_tokens=8)
    assert "".join(stream(model, TOKENIZER, PROMPTS[0], max_new_tokens=8, temperature=1.5, top_p=1e-6)) == nearly_greedy[0]


def test_the_models_own_generation_settings_do_not_bend_the_result():
    model = prepared("llama")
    want = generate(model, TOKENIZER, PROMPTS, max_new_tokens=8)
    model.generation_config.update(repetition_penalty=5.0, num_beams=3, do_sample=True, no_repeat_ngram_size=1, temperature=0.1,
                                   forced_eos_token_id=2)
    own = model.generation_config
    assert generate(model, TOKENIZER, PROMPTS, max_new_tokens=8) == want
    assert model.generation_config is own


def test_translation_models_begin_with_their_language():
    model = prepared("bart")
    model.generation_config.forced_bos_token_id = 9
    got = generate(model, TOKENIZER, PROMPTS, max_new_tokens=6)
    assert all(one.startswith("g") for one in got)
    assert ["".join(stream(model, TOKENIZER, prompt, max_new_tokens=6)) for prompt in PROMPTS] == got


def test_texts_are_encoded_and_wrong_input_is_refused():
    model = prepared("llama")
    ids = TOKENIZER("hi you")["input_ids"]
    assert encoded(TOKENIZER, ["hi you", ids]) == [ids, ids]
    assert generate(model, TOKENIZER, ["hi you"]) == generate(model, TOKENIZER, [ids])
    assert generate(model, TOKENIZER, []) == []
    with pytest.raises(UsageError, match="no tokens"):
        generate(model, TOKENIZER, ["a", ""])
    with pytest.raises(UsageError, match=r"max_new_tokens.*\n.*temperature.*\n.*top_p.*\n.*batch_size"):
        generate(model, TOKENIZER, ["a"], max_new_tokens=0, temperature=-1, top_p=0, batch_size=0)
    with pytest.raises(RefusedError, match="BertForSequenceClassification"):
        generate(toy("bert"), TOKENIZER, ["a"])


def lively(model: nn.Module, names=("default",)):
    """A tuned model whose deltas do something."""
    tuned = attach(model, [LoRA(rank=2)], names[0])
    for name in names[1:]:
        tuned.add(name, [LoRA(rank=2)])
    for index, name in enumerate(names):
        generator = torch.Generator().manual_seed(index)
        for parameter in tuned.delta_parameters(name).values():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return tuned


@pytest.mark.parametrize("layout", ["llama", "t5"])
def test_tuned_models_generate_like_the_loop(layout):
    tuned = lively(prepared(layout))
    want = [text(argmax_loop(tuned.model, prompt, 8)) for prompt in PROMPTS]
    assert generate(tuned, TOKENIZER, PROMPTS, max_new_tokens=8, batch_size=2) == want
    with tuned.use(None):
        assert generate(tuned, TOKENIZER, PROMPTS, max_new_tokens=8) != want


def test_a_delta_for_each_row_follows_its_prompt_through_the_batches():
    tuned = lively(prepared("llama"), ("a", "b"))
    lanes = ["a", None, "b", "a", "b"]
    want = []
    for lane, prompt in zip(lanes, PROMPTS, strict=True):
        with tuned.use(lane):
            want += generate(tuned, TOKENIZER, [prompt], max_new_tokens=6)
    with tuned.use(lanes):
        assert generate(tuned, TOKENIZER, PROMPTS, max_new_tokens=6, batch_size=2) == want
        with pytest.raises(UsageError, match="another number"):
            generate(tuned, TOKENIZER, PROMPTS[:2])
