"""Decoding with a cache: many prompts at once, or one prompt piece by piece for a chat.

Batches go through transformers' own `generate`, which knows every family's cache; this file adds what it leaves to its
caller: left padding, batches of similar length, soft prompts, stopping, and a random state that stays the caller's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper

from deltaloom.errors import RefusedError, UsageError
from deltaloom.tuned import Tuned

Prompt = str | Sequence[int]


def generate(model: PreTrainedModel | Tuned, tokenizer: Any, prompts: Sequence[Prompt], *, max_new_tokens: int = 64,
             temperature: float = 0.0, top_p: float = 1.0, seed: int = 0, batch_size: int = 8) -> list[str]:
    """The text that the model writes after each prompt (causal) or for each input (encoder-decoder), without special tokens.

    A prompt is a text, encoded with the tokenizer's own special tokens, or a list of token ids, taken as it is. Temperature
    0 always takes the likeliest token; then the batch size changes nothing but rounding. Writing ends at an end token.

    Raises:
        UsageError: an empty prompt, a number out of range. RefusedError: a model that cannot generate.
    """
    base = _generating(model)
    check_numbers(max_new_tokens, temperature, top_p, batch_size)
    rows = encoded(tokenizer, prompts)
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))  # longest first: memory fails early, pads are few
    texts = [""] * len(rows)
    with decoding(base, seed):
        for start in range(0, len(order), batch_size):
            chosen = order[start:start + batch_size]
            with _rows_of_routing(model, chosen, len(rows)):
                new = _batch(model, base, tokenizer, [rows[index] for index in chosen], max_new_tokens, temperature, top_p)
            for index, ids in zip(chosen, new, strict=True):
                texts[index] = text_of(tokenizer, ids)
    return texts


def stream(model: PreTrainedModel | Tuned, tokenizer: Any, prompt: Prompt, *, max_new_tokens: int = 512,
           temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> Iterator[str]:
    """Pieces of the text after one prompt, as soon as they are whole characters; joined they are what `generate` gives.

    For a chat, give `tokenizer.apply_chat_template(messages, add_generation_prompt=True)` as token ids.
    """
    base = _generating(model)
    check_numbers(max_new_tokens, temperature, top_p, 1)
    inputs = _inputs(model, base, tokenizer, encoded(tokenizer, [prompt]))
    return pieces_of(tokenizer, _tokens(base, tokenizer, inputs, max_new_tokens, temperature, top_p, seed))


def encoded(tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of prompts; texts get the tokenizer's own special tokens, as at the start of a document."""
    rows = [list(tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    empty = [index for index, row in enumerate(rows) if not row]
    if empty:
        raise UsageError("A prompt has no tokens, so there is nothing to go on from", got=f"prompts {empty[:8]}",
                         legal="at least one token each", hint="Begin with the tokenizer's start token, if it has one.")
    return rows


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Every token that ends a text: those of the model's generation settings (chat models have several) and the tokenizer's."""
    config = model.generation_config.eos_token_id if model.generation_config is not None else None
    found = [] if config is None else [config] if isinstance(config, int) else list(config)
    own = tokenizer.eos_token_id
    return found if own is None or own in found else [*found, own]


def _generating(model: PreTrainedModel | Tuned) -> PreTrainedModel:
    base = model.model if isinstance(model, Tuned) else model
    if not isinstance(base, PreTrainedModel) or not base.can_generate():
        raise RefusedError("This model cannot generate text", got=type(base).__name__,
                           legal="models with a language-model head (task causal-lm or seq2seq-lm)")
    return base


def check_numbers(max_new_tokens: int, temperature: float, top_p: float, batch_size: int) -> None:
    """Raises UsageError for settings of generation that are out of range; all of them at once."""
    problems = [message for wrong, message in (
        (max_new_tokens < 1, f"max_new_tokens must be at least 1, got {max_new_tokens}"),
        (temperature < 0, f"temperature must be 0 (always the likeliest token) or more, got {temperature}"),
        (not 0 < top_p <= 1, f"top_p must be above 0 and at most 1, got {top_p}"),
        (batch_size < 1, f"batch_size must be at least 1, got {batch_size}")) if wrong]
    if problems:
        raise UsageError("These settings of generation are not legal", problems=problems)


@contextmanager
def decoding(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Evaluation mode, no gradients and our own random state; mode and the caller's state are put back."""
    devices = [model.device] if model.device.type == "cuda" else []
    training = {module: module.training for module in model.modules()}
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(seed)
            model.eval()
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def _rows_of_routing(model: PreTrainedModel | Tuned, chosen: Sequence[int], total: int) -> Iterator[None]:
    """Where a tuned model has a delta for each row, those of the chosen rows."""
    lanes = model.routing.lanes if isinstance(model, Tuned) else None
    if not isinstance(model, Tuned) or not isinstance(lanes, tuple):
        yield
        return
    if len(lanes) != total:
        raise UsageError("Deltas are set row by row for another number of prompts", got=total, legal=len(lanes))
    with model.routing.set(tuple(lanes[index] for index in chosen)):
        yield


def _inputs(model: PreTrainedModel | Tuned, base: PreTrainedModel, tokenizer: Any,
            rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Padded ids and their mask, or what a soft prompt makes of them; causal models are padded on the left."""
    longest = max(len(row) for row in rows)
    fill = _fill_token(base, tokenizer)
    ids = torch.full((len(rows), longest), fill)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(0, len(row)) if base.config.is_encoder_decoder else slice(longest - len(row), longest)
        ids[index, where] = torch.tensor(row)
        mask[index, where] = 1
    inputs = {"input_ids": ids.to(base.device), "attention_mask": mask.to(base.device)}
    if isinstance(model, Tuned):
        with torch.no_grad():
            inputs, _ = model.prepared(inputs)
        inputs.pop("position_ids", None)  # taken from the mask at every step
    return inputs


def _fill_token(base: PreTrainedModel, tokenizer: Any) -> int:
    """A token for places that are never read; it need not be a pad token (many models have none)."""
    known = (tokenizer.pad_token_id, *end_tokens(base, tokenizer))
    return next((token for token in known if token is not None), 0)


def _batch(model: PreTrainedModel | Tuned, base: PreTrainedModel, tokenizer: Any, rows: Sequence[Sequence[int]],
           max_new_tokens: int, temperature: float, top_p: float) -> list[list[int]]:
    """The new tokens of each row, up to its first end token."""
    inputs = _inputs(model, base, tokenizer, rows)
    ends = end_tokens(base, tokenizer)
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    own = base.generation_config
    settings = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=ends or None, do_sample=temperature > 0,
                                pad_token_id=_fill_token(base, tokenizer), bos_token_id=own.bos_token_id,
                                decoder_start_token_id=own.decoder_start_token_id, forced_bos_token_id=own.forced_bos_token_id,
                                **sampling)
    if base.config.is_encoder_decoder:
        inputs = {"encoder_outputs": _encoder_outputs(base, inputs), "attention_mask": inputs["attention_mask"]}
    # What a call leaves open, transformers takes from the model's own settings (beams, penalties, forced ends): not here.
    base.generation_config = settings
    try:
        ids = base.generate(**inputs, generation_config=settings)  # type: ignore[operator]
    finally:
        base.generation_config = own
    if base.config.is_encoder_decoder:
        ids = ids[:, 1:]  # the decoder's start token
    elif "input_ids" in inputs:
        ids = ids[:, inputs["input_ids"].shape[1]:]
    return [_until(row, ends) for row in ids.tolist()]


def _encoder_outputs(base: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    encoder: Any = base.get_encoder()
    return encoder(**inputs)


def _until(ids: list[int], ends: Sequence[int]) -> list[int]:
    stop = next((index for index, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """Tokens as text, without special ones."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _tokens(base: PreTrainedModel, tokenizer: Any, inputs: dict[str, Any], max_new_tokens: int, temperature: float, top_p: float,
            seed: int) -> Iterator[int]:
    """New tokens one after another, without the end token."""
    ends = end_tokens(base, tokenizer)
    generator = torch.Generator(base.device).manual_seed(seed)
    step, ids = dict(inputs), list[int]()
    if base.config.is_encoder_decoder:
        with decoding(base, seed):
            outputs = _encoder_outputs(base, inputs)
        first = base.generation_config.forced_bos_token_id  # the language to write, for translation models
        ids = [] if first is None else [first]
        start = torch.tensor([[base.generation_config.decoder_start_token_id, *ids]], device=base.device)
        step = {"encoder_outputs": outputs, "attention_mask": inputs["attention_mask"], "decoder_input_ids": start}
    yield from ids
    word = "decoder_input_ids" if base.config.is_encoder_decoder else "input_ids"
    cache = None
    for _ in range(len(ids), max_new_tokens):
        with decoding(base, seed):  # entered anew for each token: between two of them the caller's own code runs
            output = base(**step, past_key_values=cache, use_cache=True)
        token = choose(output.logits[:, -1].float(), temperature, top_p, generator)
        if int(token) in ends:
            return
        yield int(token)
        cache = output.past_key_values
        step = {**step, word: token.view(1, 1)}
        step.pop("inputs_embeds", None)
        if not base.config.is_encoder_decoder:
            step["attention_mask"] = torch.nn.functional.pad(step["attention_mask"], (0, 1), value=1)


def pieces_of(tokenizer: Any, tokens: Iterable[int]) -> Iterator[str]:
    """Pieces of the text of tokens, each as soon as its characters are whole."""
    given, ids = "", list[int]()
    for token in tokens:
        ids.append(token)
        text = text_of(tokenizer, ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character: wait for the rest of its bytes
            yield text[len(given):]
            given = text
    rest = text_of(tokenizer, ids)
    if len(rest) > len(given):
        yield rest[len(given):]


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """The next token (1,) of scores (1, vocabulary): the likeliest at temperature 0, else one that is drawn."""
    if temperature == 0:
        return logits.argmax(-1)
    none = torch.empty(1, 0, dtype=torch.long)
    scores = TemperatureLogitsWarper(float(temperature))(none, logits)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(none, scores)
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)[0]
