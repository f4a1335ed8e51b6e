"""Frozen affine layers stored in fewer bytes: quantised or as two thin factors, behind the face that every delta uses."""

from __future__ import annotations

from deltaloom.compact.base import CompactLinear
from deltaloom.compact.codecs.base import Codec, codec_from, codec_names, codec_record
from deltaloom.compact.factored import FactoredLinear
from deltaloom.compact.forms import empty_layer
from deltaloom.compact.quantised import QuantisedLinear

__all__ = ["Codec", "CompactLinear", "FactoredLinear", "QuantisedLinear", "codec_from", "codec_names", "codec_record",
           "empty_layer"]
