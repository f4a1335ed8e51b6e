"""Quantisation by rounding to the nearest: each weight of the targets stored by a codec (int8, nf4, int4), without data.

    W ~ decode(encode(W))

The formulas are the codecs' (deltaloom/compact/codecs). `gptq` chooses better codes for int4 from calibration rows.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, field_validator
from transformers import PreTrainedModel

from deltaloom.compact import QuantisedLinear, codec_from
from deltaloom.compact.face import affine_weight
from deltaloom.compress._layers import OnlyBlocks, TargetLayers, dense_layer, dense_sites, put_layer
from deltaloom.compress._rounding import bits_figures, quantised_record, sketch_quantised
from deltaloom.compress.base import Compressor, Facts, Work
from deltaloom.errors import SettingsError
from deltaloom.sites import Site


class Quantise(Compressor):
    """Rounding to a codec's nearest values."""

    name: ClassVar[str] = "quantise"

    targets: TargetLayers = "all-linear"
    layers: OnlyBlocks = None
    codec: str | dict[str, Any] = Field("nf4", description="a codec's name, or {codec: NAME, its settings}")

    @field_validator("codec")
    @classmethod
    def _known(cls, value: str | dict[str, Any]) -> str | dict[str, Any]:
        try:
            codec_from(value)
        except SettingsError as error:
            raise ValueError(str(error)) from None
        return value

    def sites(self, model: PreTrainedModel) -> list[Site]:
        """The target layers; errors as `dense_sites`."""
        return dense_sites(model, self.targets, self.layers)

    def sketch(self, model: PreTrainedModel) -> None:
        """Empty quantised layers."""
        codec = codec_from(self.codec)
        for site in self.sites(model):
            sketch_quantised(model, site.path, codec)

    def apply(self, work: Work) -> Facts:
        """Layer by layer."""
        codec, facts = codec_from(self.codec), Facts()
        for site in self.sites(work.model):
            layer = dense_layer(work.model, site.path)
            weight = affine_weight(layer)
            new = QuantisedLinear.from_weight(weight, layer.bias, codec)
            facts.layers.append(quantised_record(site.path, weight, new))
            put_layer(work.model, site.path, new)
        facts.figures |= bits_figures(facts.layers)
        return facts
