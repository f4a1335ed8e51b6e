"""What the compressors that quantise share: the shape of the result, and the record of a layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deltaloom.compact import Codec, QuantisedLinear
from deltaloom.compact.face import affine_weight
from deltaloom.compress._layers import dense_layer, put_layer
from deltaloom.compress._lowrank import relative
from deltaloom.linalg.matrix import output_error


def sketch_quantised(model: nn.Module, path: str, codec: Codec) -> None:
    """Put an empty quantised layer in the place of a layer on the meta device."""
    layer = dense_layer(model, path)
    weight = affine_weight(layer)
    put_layer(model, path, QuantisedLinear(weight.shape[1], weight.shape[0], codec, bias=layer.bias, dtype=weight.dtype))


def quantised_record(path: str, weight: Tensor, layer: QuantisedLinear, gram: Tensor | None = None) -> dict[str, Any]:
    """The report's record of a layer: bits a weight, and relative errors of the weight and, with Gram, the outputs."""
    change = weight.double() - layer.dequantised(weight.dtype).double()
    record: dict[str, Any] = {"layer": path, "bits": 8 * layer.stored_bytes() / weight.numel(),
                              "weight_error": relative(output_error(change), output_error(weight))}
    if gram is not None:
        record["output_error"] = relative(output_error(change, gram), output_error(weight, gram))
    return record


def bits_figures(records: list[dict[str, Any]]) -> dict[str, float]:
    """Mean bits and errors of the layers."""
    keys = [key for key in ("bits", "weight_error", "output_error") if records and key in records[0]]
    return {f"mean_{key}": sum(record[key] for record in records) / len(records) for key in keys}
