"""Chats as text: the tokenizer's chat template, and which characters of its result are assistant turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltaloom.data.records import Problems
from deltaloom.data.rows import ChatRow, Message
from deltaloom.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Draft:
    """A text and its learned parts, as (start, stop) characters."""

    text: str
    learned: tuple[tuple[int, int], ...]


def render_chat(rows: Sequence[ChatRow], tokenizer: PreTrainedTokenizerBase, problems: Problems) -> list[Draft]:
    """Chats as text; learned are the assistant turns with the token that ends them, but not what introduces them.

    A turn's place is found by rendering the chat up to it and up to its end: what the second adds is the turn. This holds
    only if the template never changes what it wrote before; where it does, the row goes to `problems`.
    """
    if rows:
        _check_template(tokenizer)
    return [_rendered(row, tokenizer, problems) for row in rows]


def render_asked(rows: Sequence[ChatRow], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Chats up to where the next answer starts, without spaces at the end (tokenizers join a space to the word behind it).

    Raises:
        DataError: the template refuses a chat, or there is none.
    """
    if rows:
        _check_template(tokenizer)
    problems = Problems()
    texts = [_apply(tokenizer, row, row.asked, problems, ask=True) or "" for row in rows]
    problems.check("chats cannot be put into the tokenizer's chat template")
    return [text.rstrip(" ") for text in texts]


def _rendered(row: ChatRow, tokenizer: PreTrainedTokenizerBase, problems: Problems) -> Draft:
    nothing = Draft("", ())
    last = max(index for index, turn in enumerate(row.messages) if turn.role == "assistant")
    text = _apply(tokenizer, row, row.messages[:last + 1], problems)  # what follows the last answer teaches nothing
    if text is None:
        return nothing
    learned = []
    for index, turn in enumerate(row.messages[:last + 1]):
        if turn.role != "assistant":
            continue
        before = _apply(tokenizer, row, row.messages[:index], problems, ask=True)
        upto = _apply(tokenizer, row, row.messages[:index + 1], problems)
        if before is None or upto is None:
            return nothing
        if not (text.startswith(upto) and upto.startswith(before)):
            problems.add(row.where, f"the chat template writes turn {index} differently once later turns follow, so the "
                         "assistant's tokens cannot be told apart: split the chat into one row for each answer")
            return nothing
        learned.append((len(before.rstrip(" ")), len(upto.rstrip())))
    return Draft(text[:learned[-1][1]], tuple(learned))


def _apply(tokenizer: PreTrainedTokenizerBase, row: ChatRow, turns: Sequence[Message], problems: Problems,
           ask: bool = False) -> str | None:
    import jinja2

    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))
    except (jinja2.TemplateError, TypeError) as error:  # templates refuse with TemplateError, or trip over a missing key
        problems.add(row.where, f"the template refuses: {error}")
        return None


def _check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template, so messages have no text",
                        hint="Use an instruct model, or rows of prompt and completion (data.format: prompt-completion).")
