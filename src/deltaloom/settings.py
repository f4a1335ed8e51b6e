"""`Settings`: the frozen, validated base of every part's own settings; unknown keys are refused with the nearest legal one."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from deltaloom.errors import SettingsError, did_you_mean

SHOWN = 200  # characters of a wrong value
_WHERE: ContextVar[str] = ContextVar("where", default="")  # the key path that `parse` was given


class Settings(BaseModel):
    """Settings of one part: keyword-only, stored as given, checked when made.

    Raises:
        SettingsError: an unknown key or an illegal value; all problems at once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, arbitrary_types_allowed=False,
                              allow_inf_nan=False, protected_namespaces=())

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise settings_error(type(self), error, _WHERE.get()) from None

    @classmethod
    def parse(cls, values: object, where: str) -> Self:
        """Settings from outside data (a section of a run file); `where` is the key path that errors name."""
        if not isinstance(values, dict):
            raise SettingsError(f"{where} must be a mapping of keys to values", got=values, legal=sorted(cls.model_fields))
        odd = [key for key in values if not isinstance(key, str)]
        if odd:
            raise SettingsError(f"{where}: keys must be words", got=odd[0], legal=sorted(cls.model_fields))
        token = _WHERE.set(where)
        try:
            return cls(**values)
        finally:
            _WHERE.reset(token)

    def given(self) -> dict[str, Any]:
        """What was set explicitly, as plain JSON values."""
        return self.model_dump(mode="json", exclude_unset=True)

    def as_dict(self) -> dict[str, Any]:
        """All settings, defaults included, as plain JSON values."""
        return self.model_dump(mode="json")


def settings_error(cls: type[BaseModel], error: ValidationError, where: str = "") -> SettingsError:
    """One error that names every problem by its key path."""
    details = error.errors(include_url=False)
    problems = [_problem(cls, detail, where) for detail in details]
    name = where or cls.__name__
    if len(problems) == 1:
        return SettingsError(f"{name}: {problems[0]}")
    return SettingsError(f"{name}: {len(problems)} settings are wrong", problems=problems)


def _problem(cls: type[BaseModel], detail: ErrorDetails, where: str) -> str:
    path = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        legal = sorted(cls.model_fields) if len(detail["loc"]) == 1 else []
        hint = did_you_mean(str(detail["loc"][-1]), legal)
        known = f"; legal: {', '.join(legal)}" if legal else ""
        return f"unknown key '{path}'{known}. {hint}".rstrip(". ")
    message = detail["msg"].removeprefix("Value error, ")
    got = "" if detail["type"] == "missing" else f", got {repr(detail['input'])[:SHOWN]}"
    return f"{path}: {message}{got}" if path else f"{message}"
