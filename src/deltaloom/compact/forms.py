"""From the record of a compact layer's form to an empty layer of the same shapes. Records come from outside: all is checked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from pydantic import Field

from deltaloom.compact.base import CompactLinear
from deltaloom.compact.codecs.base import codec_from
from deltaloom.compact.factored import FactoredLinear
from deltaloom.compact.quantised import QuantisedLinear
from deltaloom.errors import SettingsError
from deltaloom.settings import Settings

LARGEST = 2 ** 24  # of a size; a matrix of a model of today has axes below 2^20


class _Form(Settings, ABC):
    kind: ClassVar[str]

    d_in: int = Field(ge=1, le=LARGEST, strict=True)
    d_out: int = Field(ge=1, le=LARGEST, strict=True)
    bias: bool = Field(strict=True)
    transposed: bool = Field(False, strict=True)

    @property
    @abstractmethod
    def inner(self) -> int:
        """The rank of its factors; 0 without."""

    @abstractmethod
    def layer(self, dtype: torch.dtype, device: torch.device | str) -> CompactLinear:
        """The empty layer."""

    def empty_bias(self, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor | None:
        """(d_out,), or None where the layer has none."""
        return torch.empty(self.d_out, dtype=dtype, device=device) if self.bias else None


class _Quantised(_Form):
    kind: ClassVar[str] = "quantised"

    codec: str
    settings: dict[str, Any] = Field(default_factory=dict)
    correction: int = Field(0, ge=0, le=LARGEST, strict=True)

    @property
    def inner(self) -> int:
        """The correction's."""
        return self.correction

    def layer(self, dtype: torch.dtype, device: torch.device | str) -> CompactLinear:
        """Raises SettingsError for an unknown codec."""
        codec = codec_from({"codec": self.codec, **self.settings})
        return QuantisedLinear(self.d_in, self.d_out, codec, bias=self.empty_bias(dtype, device), correction=self.correction,
                               dtype=dtype, device=device)


class _Factored(_Form):
    kind: ClassVar[str] = "factored"

    rank: int = Field(ge=1, le=LARGEST, strict=True)

    @property
    def inner(self) -> int:
        """The rank."""
        return self.rank

    def layer(self, dtype: torch.dtype, device: torch.device | str) -> CompactLinear:
        """Two empty factors."""
        right = torch.empty(self.rank, self.d_in, dtype=dtype, device=device)
        left = torch.empty(self.d_out, self.rank, dtype=dtype, device=device)
        return FactoredLinear(right, left, self.empty_bias(dtype, device))


FORMS: dict[str, type[_Form]] = {form.kind: form for form in (_Quantised, _Factored)}


def empty_layer(form: object, dtype: torch.dtype, device: torch.device | str = "meta", where: str = "form") -> CompactLinear:
    """A layer of the form that `CompactLinear.form` gave, without values.

    Raises:
        SettingsError: no record of a form; `where` is the key path that it names.
    """
    kind = form.get("form") if isinstance(form, dict) else None
    if not isinstance(form, dict) or kind not in FORMS:
        raise SettingsError(f"{where}: not the form of a compact layer", got=str(form)[:200], legal=list(FORMS))
    values = {key: value for key, value in form.items() if key != "form"}
    if kind == _Quantised.kind:
        known = {"d_in", "d_out", "bias", "transposed", "codec", "correction"}
        values["settings"] = {key: values.pop(key) for key in list(values) if key not in known}
    parsed = FORMS[kind].parse(values, where)
    if parsed.inner > min(parsed.d_in, parsed.d_out):
        raise SettingsError(f"{where}: a rank above the sizes of the layer", got=parsed.inner,
                            legal=f"up to {min(parsed.d_in, parsed.d_out)}")
    layer = parsed.layer(dtype, device)
    layer.transposed = parsed.transposed
    return layer
