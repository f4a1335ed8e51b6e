"""The section `budget` of a run file, what a run may take at most; and the same as one text of the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from pydantic import Field, field_validator

from deltaloom.deltas.base import StepPlan
from deltaloom.errors import RefusedError, SettingsError
from deltaloom.events import Warned
from deltaloom.report.text import count
from deltaloom.settings import Settings
from deltaloom.train.memory import free_bytes
from deltaloom.train.settings import seconds
from deltaloom.tuned import Tuned

BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B")
POWERS = {"": 0, "k": 1, "M": 2, "G": 3, "T": 4}
FORMS = {"200000": "trained parameters", "0.25%": "a share of the model's parameters", "4GB": "of the model and of training",
         "20m": "time of training"}
LONGEST_PLAN = 1_000_000  # steps; only whether there is a controller matters


class BudgetSettings(Settings):
    """What a run may take at most; its time is `train.max_time`."""

    parameters: str | None = Field(None, description="trained numbers of the deltas at the end: a count, or a share, 0.25%")
    memory: str | None = Field(None, description="of the model and of training together: 4GB, 800MB, 2GiB")

    @field_validator("parameters", mode="before")
    @classmethod
    def _check_parameters(cls, value: object) -> object:
        text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
        if isinstance(text, str):
            _numbers(text, 1)
        return text

    @field_validator("memory", mode="before")
    @classmethod
    def _check_memory(cls, value: object) -> object:
        text = f"{value}B" if isinstance(value, int) and not isinstance(value, bool) else value
        if isinstance(text, str):
            _bytes(text)
        return text

    def numbers(self, total: int) -> int | None:
        """Trained numbers, with a model of `total` parameters; None without a limit."""
        return None if self.parameters is None else _numbers(self.parameters, total)

    @property
    def bytes(self) -> int | None:
        """Memory in bytes; None without a limit."""
        return None if self.memory is None else _bytes(self.memory)


def overrides_of(texts: Sequence[str], others: Sequence[str] = ()) -> list[str]:
    """The overrides of a run file that budgets of the command line stand for; `others` are those that it names itself.

    Raises:
        SettingsError: a text is no budget, or two limit the same.
    """
    found = {key.strip(): value.strip() for key, _, value in (each.partition("=") for each in others)}
    given = {_key_of(text.strip()): text for text in texts}
    for text in texts:
        key = _key_of(text.strip())
        if found.setdefault(key, text) != text:
            raise SettingsError("contradictory budgets", got=f"{found[key]} and {text}", legal=f"one for {key}",
                                hint="Name each limit once.")
    return [f"{key}='{text.strip()}'" for key, text in given.items()]


def check_numbers(budget: BudgetSettings, tuned: Tuned, total: int) -> None:
    """That deltas whose sizes stay as they are fit; of others that is known at the end (see `exceeded`).

    Raises:
        RefusedError: they do not.
    """
    limit, deltas = budget.numbers(total), tuned.counts()[0]
    if limit is not None and deltas > limit and keeps_its_size(tuned):
        raise RefusedError("the deltas have more numbers than budget.parameters allows", got=count(deltas),
                           legal=f"at most {count(limit)}", hint="Lower their ranks or sizes, or raise the budget; "
                           "`deltaloom plan RUN.yaml --advise` proposes what fits.")


def keeps_its_size(tuned: Tuned) -> bool:
    """Whether no controller changes the deltas while they train."""
    return not tuned.controllers(StepPlan(LONGEST_PLAN))


def exceeded(budget: BudgetSettings, deltas: int, total: int) -> list[Warned]:
    """A warning if what a run ended with is more than was allowed."""
    limit = budget.numbers(total)
    if limit is None or deltas <= limit:
        return []
    message = f"the deltas end with {count(deltas)} numbers; budget.parameters allows {count(limit)}"
    return [Warned(kind="budget", message=message)]


def memory_left(budget: BudgetSettings, device: torch.device, model_bytes: int = 0) -> int | None:
    """Bytes that a run may take beside what is loaded: what is free, within the budget; None if neither is known."""
    limits = [free_bytes(device), None if budget.bytes is None else max(0, budget.bytes - model_bytes)]
    return min((limit for limit in limits if limit is not None), default=None)


def _key_of(text: str) -> str:
    if re.fullmatch(r"\d+|\d*\.?\d+\s*%", text):
        return "budget.parameters"
    if BYTES.fullmatch(text):
        return "budget.memory"
    try:
        seconds(text if text.islower() else "")  # 20M would be minutes, or millions
    except ValueError:
        raise SettingsError("this is no budget", got=text,
                            legal=[f"{form} ({what})" for form, what in FORMS.items()]) from None
    return "train.max_time"


def _numbers(text: str, total: int) -> int:
    number, share, rest = text.strip().partition("%")
    if not share and number.isascii() and number.isdigit() and int(number) > 0:
        return int(number)
    try:
        part = float(number) / 100 if share else -1.0
    except ValueError:
        part = -1.0
    if rest or not 0 < part <= 1:
        raise ValueError("a budget of parameters is a count of at least one, such as 200000, or a share of the model's, such as "
                         "0.25%, at most 100%")
    return int(part * total)


def _bytes(text: str) -> int:
    found = BYTES.fullmatch(text.strip())
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** POWERS[found[2]]) if found else 0
    if not size:
        raise ValueError("memory is written 4GB, 800MB or 2GiB")
    return size
