"""Rows: what the records of the formats become, one frozen class a kind; tasks read rows and never a file's columns."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Row(ABC):
    """One row; `where` is its place in its file, for messages."""

    where: str

    @property
    @abstractmethod
    def source(self) -> str:
        """What the model is given: rows with equal sources count as duplicates."""

    @property
    @abstractmethod
    def target(self) -> str:
        """What the model should answer, as text; empty where the row has none."""


@dataclass(frozen=True, slots=True)
class TextRow(Row):
    """A text, or a pair of texts, with a label: a class name, or a number for regression."""

    text: str
    text_pair: str | None = None
    label: str | float | None = None

    @property
    def source(self) -> str:
        """The text, and the second one below it."""
        return self.text if self.text_pair is None else f"{self.text}\n{self.text_pair}"

    @property
    def target(self) -> str:
        """The label."""
        return "" if self.label is None else str(self.label)


@dataclass(frozen=True, slots=True)
class PromptRow(Row):
    """A prompt and its completion (absent when only predicting)."""

    prompt: str
    completion: str | None = None

    @property
    def source(self) -> str:
        """The prompt."""
        return self.prompt

    @property
    def target(self) -> str:
        """The completion."""
        return self.completion or ""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat; `role` is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class ChatRow(Row):
    """A chat; the loss is on its assistant turns."""

    messages: tuple[Message, ...]

    @property
    def asked(self) -> tuple[Message, ...]:
        """The chat without a last assistant turn: what an answer is generated from."""
        return self.messages[:-1] if self.messages[-1].role == "assistant" else self.messages

    @property
    def source(self) -> str:
        """Every turn before the last answer."""
        return "\n".join(f"{turn.role}: {turn.content}" for turn in self.asked)

    @property
    def target(self) -> str:
        """The last answer."""
        return self.messages[-1].content if self.messages[-1].role == "assistant" else ""


@dataclass(frozen=True, slots=True)
class PlainRow(Row):
    """A text of which every token is learned."""

    text: str

    @property
    def source(self) -> str:
        """The text."""
        return self.text

    @property
    def target(self) -> str:
        """Nothing apart from the text itself."""
        return ""


@dataclass(frozen=True, slots=True)
class TokensRow(Row):
    """Words with a tag each."""

    tokens: tuple[str, ...]
    tags: tuple[str, ...] | None = None

    @property
    def source(self) -> str:
        """The words."""
        return " ".join(self.tokens)

    @property
    def target(self) -> str:
        """The tags."""
        return " ".join(self.tags or ())


@dataclass(frozen=True, slots=True)
class ImageRow(Row):
    """An image, as a file or as the bytes of one, with a class name."""

    image: Path | bytes
    label: str | None = None

    @property
    def source(self) -> str:
        """A digest of the image file's bytes."""
        data = self.image if isinstance(self.image, bytes) else self.image.read_bytes()
        return hashlib.sha256(data).hexdigest()

    @property
    def target(self) -> str:
        """The label."""
        return self.label or ""
