"""Talking to a model in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from deltaloom.errors import RefusedError
from deltaloom.evaluate.base import Task
from deltaloom.generate import stream
from deltaloom.jobs.opening import delta_folder, open_source
from deltaloom.tuned import Tuned

HELP = "Write something; an empty line ends. /base switches the delta off and on, /new forgets the conversation."


def chat(source: str, *, deltas: Sequence[Path] = (), weights: str | None = None, temperature: float = 0.0,
         max_new_tokens: int = 256, seed: int = 0,
         read: Callable[[str], str] = input, write: Callable[[str], Any] | None = None) -> None:
    """Read a line, write the model's answer as it comes, until an empty line.

    Raises:
        RefusedError: the model writes no text.
    """
    is_model = not deltas and delta_folder(source) is None
    opened = open_source(source, deltas=deltas, weights=weights, task="causal-lm" if is_model else None)
    if not opened.task.generates:
        raise RefusedError("this model does not write text", got=opened.task.name, hint="Use `deltaloom predict`.")
    opened.model.eval()

    def answer(prompt: Any, turn: int) -> Iterator[str]:
        return stream(opened.model, opened.task.tokenizer, prompt, max_new_tokens=max_new_tokens,  # type: ignore[arg-type]
                      temperature=temperature, seed=seed + turn)

    converse(opened.task, opened.tuned, answer, read, write or sys.stdout.write)


def converse(task: Task, tuned: Tuned | None, answer: Callable[[Any, int], Iterator[str]], read: Callable[[str], str],
             write: Callable[[str], Any]) -> None:
    """Lines in, answers out as they come, until an empty line; `answer` takes a prompt and the number of turns before it."""
    write(HELP + "\n")
    turns: list[dict[str, str]] = []
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            return
        if not line:
            return
        if line == "/new":
            turns = []
        elif line == "/base":
            _switch(tuned, write)
        else:
            turns.append({"role": "user", "content": line})
            said = ""
            for piece in answer(prompt_of(task, turns), len(turns)):
                write(piece)
                sys.stdout.flush()
                said += piece
            write("\n")
            turns.append({"role": "assistant", "content": said})


def prompt_of(task: Task, turns: list[dict[str, str]]) -> Any:
    """The conversation in the tokenizer's own template; without one, the last line as it is."""
    tokenizer = task.tokenizer
    if tokenizer.chat_template is None:
        return turns[-1]["content"]
    encoded = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(_ids(encoded))


def _ids(encoded: Any) -> Iterator[int]:
    ids = encoded["input_ids"]
    yield from (ids[0] if ids and isinstance(ids[0], list) else ids)


def _switch(tuned: Tuned | None, write: Callable[[str], Any]) -> None:
    if tuned is None:
        write("There is no delta to switch.\n")
        return
    using = tuned.in_use()
    tuned.use(None if using else next(iter(tuned.lanes)))
    write("The bare model answers.\n" if using else "The tuned model answers.\n")
