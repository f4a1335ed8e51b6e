"""The owner's policy file: what parties may do, and how much of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field

from deltaloom.errors import SettingsError, UsageError
from deltaloom.files import write_atomic
from deltaloom.private.refused import Refused
from deltaloom.registry import names_in
from deltaloom.settings import Settings

CODECS = "deltaloom.private.wire.codecs"
Count = Annotated[int, Field(ge=1, le=2 ** 40)]
HEAD = """# What parties may do. A running server reads this file when it starts.
"""


class Limits(Settings):
    """Hard limits, checked before anything is allocated."""

    tokens_per_frame: Count = Field(16384, description="positions of all rows of one request, padding included")
    rows_per_frame: int = Field(512, ge=1, le=2048, description="rows (or segments) of one request")
    update_values: Count = Field(2 ** 24, description="values of one round's update: a prefix has 10^4 to 10^7")
    in_flight: int = Field(4, ge=1, le=256, description="requests of one stream that are not answered yet")
    sessions: Count = Field(4, description="inference sessions of one party at once")
    session_tokens: Count = Field(4096, description="positions of one inference session")
    session_seconds: float = Field(1800, gt=0, description="an inference session ends after so long without a request")
    parties: Count = Field(16, description="parties connected at once")
    request_seconds: float = Field(300, gt=0, description="a request that takes longer is answered with a refusal")


class Quotas(Settings):
    """What one party may use altogether; null: as much as it likes."""

    requests: Count | None = None
    tokens: Count | None = None
    megabytes: Count | None = None


class Policy(Settings):
    """What the owner allows."""

    cut: Count = Field(2, description="layers of the front; the party's prefix sits only on these")
    methods: list[str] | None = Field(None, description="methods a party may announce; null: any")
    codecs: list[str] = Field(["fp32", "bf16", "int8"], description="how tensors may travel")
    labels: list[str] = Field(["owner", "home"], description="where labels may be: shared with the owner, or at home")
    guards: list[str] | None = Field(None, description="guards a party may announce; null: any")
    required_guards: list[str] = Field([], description="guards every party must announce")
    certificate_days: float = Field(90, gt=0, le=3650)
    limits: Limits = Limits()
    quotas: Quotas = Quotas()

    def check(self) -> None:
        """Whether the words of this policy are known.

        Raises:
            SettingsError: an unknown codec or place of labels.
        """
        for what, given, legal in (("codecs", self.codecs, names_in(CODECS)), ("labels", self.labels, ["owner", "home"])):
            odd = sorted(set(given) - set(legal))
            if odd or not given:
                raise SettingsError(f"policy.{what}", got=odd[0] if odd else given, legal=legal)

    def admit(self, *, cut: int, method: str, codec: str, labels: str, guards: list[str]) -> None:
        """Whether what a party announces is allowed.

        Raises:
            Refused: it is not; names what is.
        """
        for what, got, legal in (("cut", cut, [self.cut]), ("method", method, self.methods), ("codec", codec, self.codecs),
                                 ("place of labels", labels, self.labels)):
            if legal is not None and got not in legal:
                raise Refused("policy", f"the owner's policy does not allow this {what}", got=got, legal=legal)
        for guard in guards:
            if self.guards is not None and guard not in self.guards:
                raise Refused("policy", "the owner's policy does not allow this guard", got=guard, legal=self.guards)
        missing = [guard for guard in self.required_guards if guard not in guards]
        if missing:
            raise Refused("policy", "the owner's policy requires a guard that was not announced", got=missing[0],
                          legal=self.required_guards)


def read_policy(path: Path) -> Policy:
    """The policy of a file.

    Raises:
        UsageError: no such file, or no YAML. SettingsError: unknown keys or illegal values.
    """
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError("the policy file cannot be read", got=str(error)[:200],
                         hint=f"See {path.name} in the owner's folder.") from None
    policy = Policy.parse({} if record is None else record, path.name)
    policy.check()
    return policy


def write_policy(path: Path, policy: Policy) -> Path:
    """Write a policy with a comment for each key."""
    lines = [HEAD]
    for name, field in Policy.model_fields.items():
        comment = f"   # {field.description}" if field.description else ""
        value = policy.as_dict()[name]
        if isinstance(value, dict):
            lines.append(f"{name}:\n")
            nested = type(getattr(policy, name)).model_fields
            lines += [f"  {key}: {_yaml(one)}" + (f"   # {nested[key].description}\n" if nested[key].description else "\n")
                      for key, one in value.items()]
        else:
            lines.append(f"{name}: {_yaml(value)}{comment}\n")
    return write_atomic(path, "".join(lines))


def _yaml(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
