"""Int4 quantisation whose codes are chosen for the inputs that occur: GPTQ.

Columns are rounded one after the other, and the columns still to come make up for the error in the layer's outputs (see
_gptq.py for the formula). Blocks are quantised in order, each for the inputs that the quantised ones before it give.

Source: Frantar et al., "GPTQ: Accurate post-training quantization for generative pre-trained transformers" (ICLR 2023).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from transformers import PreTrainedModel

from deltaloom.compact import QuantisedLinear
from deltaloom.compact.codecs.int4 import Int4
from deltaloom.compact.face import affine_weight
from deltaloom.compress._calibration import calibrated
from deltaloom.compress._gptq import Order, rounded
from deltaloom.compress._layers import OnlyBlocks, TargetLayers, dense_layer, dense_sites, put_layer
from deltaloom.compress._rounding import bits_figures, quantised_record, sketch_quantised
from deltaloom.compress.base import Compressor, Facts, Work
from deltaloom.sites import Site


class GPTQ(Compressor):
    """Calibrated int4."""

    name: ClassVar[str] = "gptq"
    calibrates: ClassVar[bool] = True

    targets: TargetLayers = "all-linear"
    layers: OnlyBlocks = None
    group: int = Field(128, ge=2, le=65536, multiple_of=2, description="columns that share a scale and zero point")
    damping: float = Field(0.01, ge=0, le=10, description="added to the inputs' Gram matrix, as a share of its mean diagonal")
    order: Order = Field("energy", description="columns in which order: natural, or largest inputs first")

    def sites(self, model: PreTrainedModel) -> list[Site]:
        """The target layers; errors as `dense_sites`."""
        return dense_sites(model, self.targets, self.layers)

    def sketch(self, model: PreTrainedModel) -> None:
        """Empty quantised layers."""
        for site in self.sites(model):
            sketch_quantised(model, site.path, Int4(group=self.group))

    def apply(self, work: Work) -> Facts:
        """Block by block."""
        model, codec, facts = work.model, Int4(group=self.group), Facts()
        sites = self.sites(model)
        for block in calibrated(model, work.batches, sites, gram=True):
            for path, inputs in block.items():
                layer = dense_layer(model, path)
                weight = affine_weight(layer)
                codes, scales, zeros = rounded(weight, inputs.product(), codec, self.damping, self.order)
                tensors = codec.pack(codes, scales, zeros)
                new = QuantisedLinear.from_tensors(tensors, weight.shape[1], weight.shape[0], layer.bias, codec, weight.dtype)
                facts.layers.append(quantised_record(path, weight, new, inputs.product()))
                put_layer(model, path, new)
            work.say(f"Quantised {len(facts.layers)} of {len(sites)} layers")
        facts.figures |= bits_figures(facts.layers)
        return facts
