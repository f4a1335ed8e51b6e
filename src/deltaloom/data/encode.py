"""Encoding: rows to examples of token ids and labels.

Labels of language models are -100 where nothing is learned, and not shifted (the convention of transformers). A cut is never
silent: each example says how many of its tokens were lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaloom.data.chat import Draft, render_asked, render_chat
from deltaloom.data.labels import LabelMap
from deltaloom.data.records import Problems
from deltaloom.data.rows import ChatRow, ImageRow, PlainRow, PromptRow, Row, TextRow, TokensRow
from deltaloom.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
CHUNK = 1000  # texts a call of the tokenizer: its threads stay busy and memory stays small


@dataclass(frozen=True, slots=True)
class Example:
    """One row as the model takes it.

    `labels`: ids at every position (language models, tags), a class, a number, or None where the row has no target.
    `length` counts the tokens of a forward pass, for sequence to sequence of both sides. `cut` counts the tokens that
    max_length took. `prompt_length`: tokens before the first learned one. `words`: the position of each word's first token
    (None where it was cut or gave no token).
    """

    row: int
    input_ids: list[int]
    labels: list[int] | int | float | None
    length: int
    cut: int = 0
    prompt_length: int = 0
    token_type_ids: list[int] | None = None
    words: list[int | None] | None = None
    image: Path | bytes | None = None

    @property
    def answer_ids(self) -> list[int]:
        """Ids that the decoder of an encoder-decoder writes; empty for other examples."""
        return self.labels if isinstance(self.labels, list) and self.length > len(self.input_ids) else []


def joined(prompt: str, completion: str) -> tuple[str, int]:
    """Prompt and completion as one text, and where the completion starts in it.

    One space stands between them unless either brings white space. Spaces that end the prompt count to the completion,
    because tokenizers join a space to the word behind it: so the prompt's tokens are those that generation starts from.
    """
    glue = "" if prompt[-1:].isspace() or completion[:1].isspace() else " "
    return prompt + glue + completion, len(prompt.rstrip(" "))


def encode_causal(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Example]:
    """Examples for a decoder: loss on completions, on assistant turns, or on the whole of a plain text, and on EOS after it.

    Raises:
        DataError: rows whose target max_length cuts entirely; a tokenizer without EOS or without a chat template.
    """
    _check_tokenizer(tokenizer)
    drafts = _drafts(rows, tokenizer)
    end = _end_id(tokenizer) if any(not isinstance(row, ChatRow) for row in rows) else None
    problems = Problems()
    examples = []
    encodings = _running_text(rows, [draft.text for draft in drafts], tokenizer)
    for index, (row, draft, encoding) in enumerate(zip(rows, drafts, encodings, strict=True)):
        ids = list(encoding.ids)
        learned = [_token_range(encoding, start, stop) for start, stop in draft.learned]
        if not isinstance(row, ChatRow) and end is not None:
            ids += [end] if ids[-1:] != [end] else []
            learned = [range(learned[0].start if learned[0] else len(ids) - 1, len(ids))]
        example = _causal(index, ids, learned, max_length)
        if example.prompt_length == example.length:
            problems.add(row.where, f"max_length {max_length} cuts all that is learned (of {len(ids)} tokens)")
        examples.append(example)
    problems.check("rows that teach nothing", "Raise data.max_length, shorten the prompts, or leave these rows out.")
    return examples


def _drafts(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Draft]:
    """Each row as text, with its learned characters."""
    problems = Problems()
    chats = iter(render_chat([row for row in rows if isinstance(row, ChatRow)], tokenizer, problems))
    problems.check("chats cannot be put into the tokenizer's chat template")
    drafts = []
    for row in rows:
        if isinstance(row, ChatRow):
            drafts.append(next(chats))
        elif isinstance(row, PromptRow) and row.completion is not None:
            text, start = joined(row.prompt, row.completion)
            drafts.append(Draft(text, ((start, len(text)),)))
        elif isinstance(row, PlainRow):
            drafts.append(Draft(row.text, ((0, len(row.text)),)))
        else:
            problems.add(row.where, "no completion")
    problems.check("rows without a target cannot be learned from or scored")
    return drafts


def _token_range(encoding: Any, start: int, stop: int) -> range:
    """The positions from the token of the first of these characters to the token of the last one.

    A token of a single space has no characters of its own in some tokenizers: so the range also reaches back to the token that
    follows the last one before these characters.
    """
    first = _token_at(encoding, range(start, stop))
    last = _last_token_at(encoding, range(stop - 1, start - 1, -1))
    before = _last_token_at(encoding, range(start - 1, -1, -1))
    if first is None or last is None:
        return range(0)
    return range(first if before is None else min(first, before + 1), last + 1)


def _last_token_at(encoding: Any, characters: range) -> int | None:
    """The last token of the first of these characters that has one: a character of several bytes may have several."""
    token = _token_at(encoding, characters)
    if token is None:
        return None
    chars = encoding.token_to_chars(token)
    while (following := encoding.token_to_chars(token + 1)) is not None and chars[0] < following[1] and following[0] < chars[1]:
        token, chars = token + 1, following
    return token


def _token_at(encoding: Any, characters: range) -> int | None:
    """The first token of the first of these characters that has one (white space often has none)."""
    for character in characters:
        token = encoding.char_to_token(character)
        if token is not None:
            return int(token)
    return None


def _causal(row: int, ids: list[int], learned: list[range], max_length: int) -> Example:
    labels = [IGNORED] * len(ids)
    for part in learned:
        labels[part.start:part.stop] = ids[part.start:part.stop]
    labels[0] = IGNORED  # nothing predicts the first token
    kept = min(len(ids), max_length)
    prompt = next((index for index, label in enumerate(labels) if label != IGNORED), len(ids))
    return Example(row, ids[:kept], labels[:kept], kept, len(ids) - kept, min(prompt, kept))


def encode_prompts(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The token ids that generation starts from, the same as the unlearned start of the training examples.

    A plain text is a prompt as a whole. Nothing is cut.
    """
    _check_tokenizer(tokenizer)
    chats = iter(render_asked([row for row in rows if isinstance(row, ChatRow)], tokenizer))
    texts = [next(chats) if isinstance(row, ChatRow) else row.source.rstrip(" ") for row in rows]
    prompts = []
    for row, encoding in zip(rows, _running_text(rows, texts, tokenizer), strict=True):
        ids = list(encoding.ids)
        prompts.append(ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] and not isinstance(row, ChatRow) else ids)
    return prompts


def encode_seq2seq(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Example]:
    """Examples for an encoder-decoder: prompts go in, completions come out, each up to max_length tokens with its EOS.

    Raises:
        DataError: rows without a completion.
    """
    _check_tokenizer(tokenizer)
    problems = Problems()
    for row in rows:
        if not isinstance(row, PromptRow) or row.completion is None:
            problems.add(row.where, "no completion")
    problems.check("rows without a target cannot be learned from or scored")
    end = _end_id(tokenizer)
    sources = _fitted(tokenizer, [row.source for row in rows], None, max_length)
    targets = _fitted(tokenizer, [row.target for row in rows], None, max_length)
    examples = []
    for index, ((source, lost), (target, missed)) in enumerate(zip(sources, targets, strict=True)):
        labels = list(target.ids)
        if labels[-1:] != [end] and not missed:
            labels.append(end)
        examples.append(Example(index, list(source.ids), labels, len(source.ids) + len(labels), lost + missed))
    return examples


def encode_texts(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int,
                 labels: LabelMap | None) -> list[Example]:
    """Examples of texts or pairs with one label each: a class of `labels`, or a number where `labels` is None."""
    _check_tokenizer(tokenizer)
    texts = [row for row in rows if isinstance(row, TextRow)]
    pairs = [row.text_pair for row in texts]
    if any(pairs) and not all(pairs):
        problems = Problems()
        for row in texts:
            if not row.text_pair:
                problems.add(row.where, "no 'text_pair', which other rows have")
        problems.check("some rows are pairs and some are not")
    examples = []
    second = [pair or "" for pair in pairs] if any(pairs) else None
    for index, (encoding, cut) in enumerate(_fitted(tokenizer, [row.text for row in texts], second, max_length)):
        kinds = list(encoding.type_ids) if "token_type_ids" in tokenizer.model_input_names else None
        examples.append(Example(index, list(encoding.ids), _label(texts[index].label, labels), len(encoding.ids), cut,
                                token_type_ids=kinds))
    return examples


def encode_words(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, labels: LabelMap) -> list[Example]:
    """Examples of words with a tag each; the tag stands at the word's first token.

    Words are joined by single spaces and found again by their characters, so that every tokenizer sees them as in running text.
    """
    _check_tokenizer(tokenizer)
    words = [row for row in rows if isinstance(row, TokensRow)]
    examples = []
    texts = [" ".join(row.tokens) for row in words]
    for index, (encoding, cut) in enumerate(_fitted(tokenizer, texts, None, max_length)):
        row, start = words[index], 0
        places: list[int | None] = []
        for word in row.tokens:
            places.append(_token_at(encoding, range(start, start + len(word))))
            start += len(word) + 1
        kinds = list(encoding.type_ids) if "token_type_ids" in tokenizer.model_input_names else None
        examples.append(Example(index, list(encoding.ids), _tags(row, places, labels, len(encoding.ids)), len(encoding.ids), cut,
                                token_type_ids=kinds, words=places))
    return examples


def encode_images(rows: Sequence[Row], labels: LabelMap, patches: int = 1) -> list[Example]:
    """Examples of images, opened only when a batch is made; `patches` is what one costs in tokens."""
    return [Example(index, [], _label(row.label, labels), patches, image=row.image)
            for index, row in enumerate(rows) if isinstance(row, ImageRow)]


def _tags(row: TokensRow, places: list[int | None], labels: LabelMap, length: int) -> list[int] | None:
    if row.tags is None:
        return None
    found = [IGNORED] * length
    for place, tag in zip(places, labels.indices(row.tags), strict=True):
        if place is not None and found[place] == IGNORED:  # two words in one token: the first names it
            found[place] = tag
    return found


def _label(label: str | float | None, labels: LabelMap | None) -> int | float | None:
    return labels.index(label) if labels is not None and isinstance(label, str) else None if isinstance(label, str) else label


def _fitted(tokenizer: PreTrainedTokenizerBase, texts: list[str], pairs: list[str] | None,
            max_length: int) -> Iterator[tuple[Any, int]]:
    """Encodings of at most max_length tokens, each with the number of tokens it lost."""
    for index, encoding in enumerate(_encodings(tokenizer, texts, pairs)):
        size = len(encoding.ids)
        if size > max_length:
            pair = None if pairs is None else [pairs[index]]
            encoding = next(_encodings(tokenizer, [texts[index]], pair, truncation=True, max_length=max_length))
        yield encoding, size - len(encoding.ids)


def _running_text(rows: Sequence[Row], texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[Any]:
    """Encodings of rows' texts in order; a chat template writes its special tokens itself, other texts get the tokenizer's."""
    for start in range(0, len(rows), CHUNK):
        part = list(zip(rows[start:start + CHUNK], texts[start:start + CHUNK], strict=True))
        chats = _encodings(tokenizer, [text for row, text in part if isinstance(row, ChatRow)], special=False)
        others = _encodings(tokenizer, [text for row, text in part if not isinstance(row, ChatRow)])
        yield from (next(chats if isinstance(row, ChatRow) else others) for row, _ in part)


def _encodings(tokenizer: PreTrainedTokenizerBase, texts: list[str], pairs: list[str] | None = None, *, special: bool = True,
               truncation: bool = False, max_length: int | None = None) -> Iterator[Any]:
    for start in range(0, len(texts), CHUNK):
        part = slice(start, start + CHUNK)
        second = None if pairs is None else pairs[part]
        yield from tokenizer(texts[part], second, add_special_tokens=special, truncation=truncation, max_length=max_length,
                             verbose=False).encodings or []


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        raise DataError(f"{type(tokenizer).__name__} is no fast tokenizer, so tokens cannot be traced to their text",
                        hint="Use a model with a tokenizer.json.")


def _end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-sequence token, so completions could never end",
                        hint="Set tokenizer.eos_token in the model's folder (tokenizer_config.json).")
    return int(tokenizer.eos_token_id)


