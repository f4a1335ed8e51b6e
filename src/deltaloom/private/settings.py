"""`PrivateSettings`: the `private` section of a party's run file."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from deltaloom.errors import SettingsError
from deltaloom.private.guards.base import Guard, RowGuard, UpdateGuard, guard_named, parse_guards
from deltaloom.private.policy import CODECS
from deltaloom.registry import names_in
from deltaloom.settings import Settings


class PrivateSettings(Settings):
    """What private tuning needs besides an ordinary run."""

    cut: int = Field(2, ge=1, description="blocks in the front, here; the owner says how many, and deltas sit on these only")
    labels: Literal["home", "owner"] = Field("home", description="where the loss is computed; owner: the labels, which of a "
                                             "language model are text, go to the owner, and half as much crosses the cut")
    codec: str = Field("bf16", description="how tensors travel: fp32, bf16 or int8")
    guards: tuple[dict[str, Any], ...] = Field((), description="[{guard: NAME, ...}], in order; what protects the first result")
    update_guard: str | None = Field(None, description="what hides single updates in joint rounds; as the owner's rounds have it")
    mailbox: str | None = Field(None, description="a socket in the party's folder, or elsewhere, at which another engine brings "
                                "joint rounds; default: the owner's own, if it holds any")
    dp_delta: float = Field(1e-6, gt=0, lt=1, description="the probability with which a stated epsilon may fail: far below one "
                            "over the number of tokens; what guards are worth is stated at it")
    window: int = Field(4, ge=1, le=256, description="micro-batches under way at once; the owner may allow fewer")
    patience: float = Field(600.0, gt=0, description="seconds without the owner after which the command gives up")
    personal: tuple[dict[str, Any], ...] = Field((), description="methods of the personal delta; default: those of `deltas`")

    def check(self) -> None:
        """Whether names and guards are known.

        Raises:
            SettingsError: they are not.
        """
        legal = names_in(CODECS)
        if self.codec not in legal:
            raise SettingsError("private.codec", got=self.codec, legal=legal)
        wrong = [guard.name for guard in self.row_guards() if not isinstance(guard, RowGuard)]
        if wrong:
            raise SettingsError("private.guards: this guards updates of rounds, not rows", got=wrong[0],
                                hint=f"Write update_guard: {wrong[0]}.")
        if self.guard_of_updates() is not None and self.mailbox is not None:
            raise SettingsError("private.update_guard: this hides updates in the owner's own rounds only",
                                got=self.update_guard, hint="Leave update_guard out, or the mailbox.")

    def row_guards(self) -> tuple[Guard, ...]:
        """The guards of what crosses the cut."""
        return parse_guards([dict(guard) for guard in self.guards], "private.guards")

    def guard_of_updates(self) -> UpdateGuard | None:
        """The guard of a round's update, if there is one."""
        return update_guard_named(self.update_guard, "private.update_guard")


def update_guard_named(name: str | None, where: str) -> UpdateGuard | None:
    """A guard of updates with its defaults; None for None.

    Raises:
        SettingsError: unknown, or a guard of rows.
    """
    if name is None:
        return None
    made = guard_named(name)()
    if not isinstance(made, UpdateGuard):
        raise SettingsError(f"{where}: this guards rows, not updates of rounds", got=name)
    return made


def parse_private(values: object) -> PrivateSettings:
    """The section of a run file, checked.

    Raises:
        SettingsError: an unknown key, codec or guard, or an illegal value.
    """
    settings = PrivateSettings.parse(values, "private")
    settings.check()
    return settings
