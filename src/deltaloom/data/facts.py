"""Facts of the data: what a person should know before trusting a run, as a plain mapping for events and reports."""

from __future__ import annotations

import base64
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deltaloom.data.encode import IGNORED, Example
from deltaloom.data.labels import LabelMap, counts, labels_of
from deltaloom.data.read import Rows
from deltaloom.data.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
SHOWN = 3


def data_facts(train: Rows, examples: Sequence[Example], evaluation: Rows | None = None,
               evaluation_examples: Sequence[Example] = (), *, tokenizer: PreTrainedTokenizerBase | None = None,
               labels: LabelMap | None = None) -> dict[str, Any]:
    """The facts, ready for JSON; `warnings` holds a sentence for each thing that a user should look at.

    `duplicates`: training rows whose source and target occurred before; `contradictions`: sources with several labels;
    `overlap`: evaluation rows whose source is also a training row's. `lengths`: quantiles of tokens an example.
    `vocabulary`: which token ids occur, see `overlap`.
    """
    sources = Counter(row.source for row in train.rows)
    held = evaluation.rows if evaluation is not None else ()
    facts: dict[str, Any] = {
        "format": train.format, "detected": train.detected, "unused_columns": list(train.unused),
        "rows": len(train), "eval_rows": len(held),
        "labels": counts(train.rows), "eval_labels": counts(held), "label_order": list(labels.names) if labels else [],
        "tokens": sum(example.length for example in examples), "learned_tokens": sum(_learned(example) for example in examples),
        "lengths": _quantiles([example.length for example in examples]),
        "truncated_rows": sum(example.cut > 0 for example in examples),
        "truncated_tokens": sum(example.cut for example in examples),
        "eval_truncated_rows": sum(example.cut > 0 for example in evaluation_examples),
        "eval_truncated_tokens": sum(example.cut for example in evaluation_examples),
        "duplicates": len(train) - len({(row.source, row.target) for row in train.rows}),
        "contradictions": _contradictions(train.rows), "overlap": sum(row.source in sources for row in held),
        "open_ends": _open_ends(examples, tokenizer), "vocabulary": _vocabulary(examples),
        "first_rows": [_first(train.rows[example.row], example, tokenizer, labels) for example in examples[:SHOWN]],
    }
    facts["warnings"] = list(_warnings(facts))
    return facts


def overlap(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """How far the facts of new data are covered by those of old data: shares of the new token ids and labels, and what is new."""
    known, met = _ids(old["vocabulary"]), _ids(new["vocabulary"])
    labels = sorted(set(new["labels"]) - set(old["labels"]))
    return {"known_tokens": len(known & met) / len(met) if met else 1.0, "new_tokens": len(met - known),
            "new_labels": labels, "known_labels": 1 - len(labels) / len(new["labels"]) if new["labels"] else 1.0}


def segments(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """An example's text in parts, each with whether the model learns to write it."""
    learned = [False] * len(example.input_ids)
    if isinstance(example.labels, list) and example.words is None and not example.answer_ids:
        learned = [label != IGNORED for label in example.labels]
    parts: list[tuple[bool, list[int]]] = []
    for token, flag in zip(example.input_ids, learned, strict=True):
        if not parts or parts[-1][0] != flag:
            parts.append((flag, []))
        parts[-1][1].append(token)
    return [{"text": tokenizer.decode(ids), "learned": flag} for flag, ids in parts]


def _first(row: Row, example: Example, tokenizer: PreTrainedTokenizerBase | None, labels: LabelMap | None) -> dict[str, Any]:
    shown: list[dict[str, Any]] = []
    if tokenizer is not None and example.input_ids:
        shown = segments(example, tokenizer)
        if example.answer_ids:
            shown.append({"text": tokenizer.decode(example.answer_ids), "learned": True})
    target = row.target
    if isinstance(example.labels, int) and labels is not None:
        target = f"{row.target} (class {example.labels})"
    return {"where": row.where, "tokens": example.length, "segments": shown, "target": "" if _is_written(example) else target}


def _is_written(example: Example) -> bool:
    """Whether the target is among the segments."""
    return isinstance(example.labels, list) and example.words is None


def _learned(example: Example) -> int:
    return sum(label != IGNORED for label in example.labels) if isinstance(example.labels, list) else 0


def _quantiles(lengths: list[int]) -> dict[str, float]:
    if not lengths:
        return {}
    ordered = sorted(lengths)
    found = {f"p{round(100 * share)}": float(ordered[round(share * (len(ordered) - 1))]) for share in QUANTILES}
    return {**found, "mean": sum(ordered) / len(ordered)}


def _contradictions(rows: Iterable[Row]) -> int:
    answers: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if labels_of(row):
            answers[row.source].add(row.target)
    return sum(len(found) > 1 for found in answers.values())


def _open_ends(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Whole examples of a language model whose last learned token is no special one: the model never learns to stop."""
    if tokenizer is None:
        return 0
    special = {*tokenizer.all_special_ids, *(token for token, added in tokenizer.added_tokens_decoder.items() if added.special)}
    found = 0
    for example in examples:
        if isinstance(example.labels, list) and example.words is None and not example.cut:
            last = next((label for label in reversed(example.labels) if label != IGNORED), None)
            found += last is not None and last not in special
    return found


def _vocabulary(examples: Sequence[Example]) -> dict[str, Any]:
    """The distinct token ids: their number, and a bit for each id in base64 (bit i of byte i // 8, lowest first)."""
    met: set[int] = set()
    for example in examples:
        met.update(example.input_ids)
        met.update(example.answer_ids)
    bits = bytearray(max(met, default=-1) // 8 + 1)
    for token in met:
        bits[token // 8] |= 1 << token % 8
    return {"size": len(met), "bits": base64.b64encode(bytes(bits)).decode()}


def _ids(vocabulary: Mapping[str, Any]) -> set[int]:
    bits = base64.b64decode(vocabulary["bits"])
    return {8 * place + bit for place, byte in enumerate(bits) for bit in range(8) if byte >> bit & 1}


def _warnings(facts: Mapping[str, Any]) -> Iterable[str]:
    for side, name in (("", "training"), ("eval_", "evaluation")):
        if cut := facts[f"{side}truncated_rows"]:
            yield (f"data.max_length cuts {cut} of {facts[f'{side}rows']} {name} rows "
                   f"({facts[f'{side}truncated_tokens']} tokens are lost)")
    if facts["overlap"]:
        yield f"{facts['overlap']} of {facts['eval_rows']} evaluation rows have the input of a training row: metrics flatter"
    if facts["duplicates"]:
        yield f"{facts['duplicates']} of {facts['rows']} training rows repeat an earlier one"
    if facts["contradictions"]:
        yield f"{facts['contradictions']} training inputs occur with several labels"
    if facts["open_ends"]:
        yield (f"{facts['open_ends']} rows end without an end-of-turn token: the chat template writes none, "
               "so the model does not learn to stop")
    missing = sorted(set(facts["labels"]) - set(facts["eval_labels"]))
    if facts["eval_labels"] and missing:
        yield f"labels without an evaluation row: {', '.join(missing[:10])}"
