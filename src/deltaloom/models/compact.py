"""Models with compact layers, through transformers' own `from_pretrained` and `save_pretrained`.

Importing this module registers the quantisation method "deltaloom" with transformers. It does two things: quantises the linear
layers inside the blocks while a dense checkpoint is read, one tensor after the other, so that the dense model is never in memory;
and reads a saved model with compact layers, whose `quantization_config` in config.json records the form of each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from deltaloom.architectures import split_path
from deltaloom.compact import Codec, CompactLinear, QuantisedLinear, codec_from, codec_record, empty_layer
from deltaloom.compact.face import (
    affine_shape,
    affine_weight,
    compact_layers,
    dense_layer,
    is_affine,
    put,
    stores_transposed,
    swap,
)
from deltaloom.errors import CheckpointError, DeltaloomError, RefusedError
from deltaloom.models.identity import backbone_prefix, fingerprint, sample_of
from deltaloom.models.pages import MappedFiles

METHOD = "deltaloom"


@register_quantization_config(METHOD)
class CompactConfig(QuantizationConfigMixin):
    """What config.json records of a model with compact layers: the form of each by its path.

    `codec` says what to quantise with while a dense checkpoint is read; `fingerprint` is that of the dense model, where every
    compact layer is nothing but its quantised layer. `tied` names factors that several layers share: each but the first, which
    is saved, with the first.
    """

    def __init__(self, codec: str | dict[str, Any] | None = None, layers: Mapping[str, Any] | None = None,
                 fingerprint: str | None = None, quant_method: str = METHOD, tied: Mapping[str, str] | None = None) -> None:
        """Forms are checked when a model is made of them; the rest here.

        Raises:
            CheckpointError: another method, or a wrong type. SettingsError: no such codec.
        """
        if quant_method != METHOD or not isinstance(layers, Mapping | None) or not isinstance(fingerprint, str | None) \
                or not isinstance(tied, Mapping | None) or not all(isinstance(name, str) for name in (tied or {}).values()):
            raise CheckpointError("quantization_config is not one of deltaloom", got=quant_method, legal=METHOD)
        self.quant_method = METHOD  # type: ignore[assignment]
        self.codec = None if codec is None else codec_record(codec_from(codec, "quantization_config.codec"))
        self.layers = dict(layers or {})
        self.fingerprint = fingerprint
        self.tied = dict(tied or {})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """What transformers calls with the record of a config.json.

        Raises:
            CheckpointError: keys that no such record has.
        """
        odd = sorted(config_dict.keys() - {"codec", "layers", "fingerprint", "quant_method", "tied"})
        if odd:
            raise CheckpointError("quantization_config has keys that deltaloom does not know", got=", ".join(map(str, odd))[:200],
                                  hint="Was it written by a later version?")
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"quant_method": METHOD, "codec": self.codec, "layers": self.layers, "fingerprint": self.fingerprint,
                "tied": self.tied}


@register_quantizer(METHOD)
class CompactQuantizer(HfQuantizer):
    """Reads compact layers, or makes them while it reads."""

    requires_calibration = False
    quantization_config: CompactConfig

    def __init__(self, quantization_config: CompactConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized and quantization_config.codec is None:
            raise RefusedError("there is nothing to quantise with", legal="CompactConfig(codec=...)")
        self.chosen: set[str] = set()
        self.samples: dict[str, tuple[tuple[int, ...], bytes]] = {}
        self.problems: list[str] = []
        # transformers fits a bias to the first axis of `weight` when it ties anything of a layer, which would cut a Conv1D's
        self.turned: list[CompactLinear] = []
        self.pages = MappedFiles(())

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.pre_quantized:
            apply_forms(model, self.quantization_config.layers, kwargs.get("dtype"))
            self.turned = [layer for layer in apply_ties(model, self.quantization_config.tied) if layer.transposed]
            for layer in self.turned:
                layer.transposed = False
        else:
            self.chosen = set(block_linears(model))
            self.pages = MappedFiles(kwargs.get("checkpoint_files") or ())
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """The weights of the linear layers inside the blocks."""
        path, _, name = param_name.rpartition(".")
        return name == "weight" and path in self.chosen

    def get_quantize_ops(self) -> ConversionOps:
        """What quantises one weight."""
        return _Quantise(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.problems:
            raise CheckpointError("weights of this model cannot be quantised", problems=self.problems[:20])
        for layer in self.turned:
            layer.transposed = True
        check_tensors(model)
        known = self.quantization_config.fingerprint
        if not self.pre_quantized:
            known = fingerprint(model, self.samples)
        self.samples = {}
        self.pages.release()
        record_forms(model, known)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Called when the model is saved: the forms are recorded as they are now."""
        record_forms(model, getattr(quantisation_of(model), "fingerprint", None))
        return None, {}

    def is_serializable(self) -> bool:
        """Yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through every compact layer."""
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        make_dense(model)
        return model.to(dtype)  # type: ignore[arg-type]


class _Quantise(ConversionOps):
    """One weight, as it comes from the file, into the quantised layer that takes the dense one's place."""

    def __init__(self, quantizer: CompactQuantizer) -> None:
        self.hf_quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str],
                **kwargs: Any) -> dict[str, list[Tensor]]:
        """Takes the dense weights in; nothing is left for transformers to put anywhere."""
        quantizer, model, missing_keys = self.hf_quantizer, kwargs["model"], kwargs.get("missing_keys")
        codec = codec_from(quantizer.quantization_config.codec)
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            path = name.rpartition(".")[0]
            old = model.get_submodule(path)
            if tuple(weight.shape) != tuple(old.weight.shape):
                continue  # it stays among the missing ones
            try:
                layer = quantised_of(old, weight, codec)
            except DeltaloomError as error:
                quantizer.problems.append(f"{name}: {error}")
                continue
            quantizer.samples[name] = (tuple(weight.shape), sample_of(weight))
            put(model, path, layer)
            quantizer.pages.release()
            if missing_keys is not None:
                missing_keys.discard(name)
        return {}


def quantised_of(old: nn.Module, weight: Tensor, codec: Codec) -> QuantisedLinear:
    """The quantised layer of a weight in the dense layer's own orientation; the bias is the dense layer's own parameter.

    Raises:
        RefusedError: the weight cannot be encoded.
    """
    turned = stores_transposed(old)
    layer = QuantisedLinear.from_weight(weight.T.contiguous() if turned else weight, None, codec)
    bias = old.bias
    if isinstance(bias, nn.Parameter):
        layer.bias = bias  # the very parameter, with what transformers notes on it
    layer.transposed = turned
    for tensor in layer.buffers():
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    layer._is_hf_initialized = bias is None  # type: ignore[assignment]
    return layer.train(old.training)


def block_linears(model: PreTrainedModel) -> list[str]:
    """Paths of the layers that are quantised: the linears inside the backbone's blocks, as `all-linear` names them.

    Not the head, not embeddings, no layer whose weight is tied to another, and no subclass, which may compute something else.
    """
    prefix = backbone_prefix(model)
    head = model.get_output_embeddings()
    tied = {name.rpartition(".")[0] for pair in model.all_tied_weights_keys.items() for name in pair}
    return [path for path, module in model.named_modules()
            if type(module) in (nn.Linear, Conv1D) and module is not head and path not in tied
            and path.startswith(prefix) and split_path(path)[1] is not None]


def quantise_model(model: PreTrainedModel, codec: Codec) -> PreTrainedModel:
    """A model in memory with its linears inside the blocks quantised, one after the other; the same object.

    Raises:
        RefusedError: the model has compact layers already, or a weight cannot be encoded; nothing has been changed then.
    """
    refuse_quantised(model)
    known = fingerprint(model)
    layers = {}
    for path in block_linears(model):
        old = model.get_submodule(path)
        layers[path] = QuantisedLinear.from_weight(affine_weight(old), getattr(old, "bias", None), codec)
    for path, layer in layers.items():
        swap(model, path, layer)
    record_forms(model, known)
    return model


def make_dense(model: PreTrainedModel) -> None:
    """Put dense layers of the dequantised weights in the places of all compact ones; the configuration forgets their forms."""
    for path, layer in compact_layers(model).items():
        put(model, path, dense_layer(layer))
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, CompactQuantizer):
        quantizer.remove_quantization_config(model)
    record_forms(model)


def settle_forms(model: nn.Module, *, keep: bool) -> None:
    """Before a merged model is saved: record the forms of its layers as they are now (`keep`), or make all of them dense."""
    if not isinstance(model, PreTrainedModel) or quantisation_of(model) is None:
        return
    if keep:
        record_forms(model)
    else:
        make_dense(model)


def refuse_quantised(model: nn.Module) -> None:
    """Refuse to quantise a second time."""
    layers = compact_layers(model)
    if layers or getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        raise RefusedError("this model is quantised or compressed already", got=f"{len(layers)} compact layers",
                           hint="Start from the model that it was made of, or leave `quantise` out.")


def apply_forms(model: PreTrainedModel, layers: Mapping[str, Any], dtype: torch.dtype | None = None) -> None:
    """Put empty compact layers in the places of dense ones, on the meta device, as a config.json records them.

    Paths are those of the model that was saved; with another head on the same backbone its prefix may come or go.

    Raises:
        CheckpointError: a path that is no affine layer of this model, or a form that does not fit it; nothing has been changed.
        SettingsError: a record that is no form.
    """
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    modules = dict(model.named_modules())
    made: dict[str, CompactLinear] = {}
    problems = []
    for path, form in layers.items():
        place = next((name for name in (path, prefix + path, path.removeprefix(prefix)) if name in modules), None)
        old = modules.get(place) if place is not None else None
        if place is None or old is None or not is_affine(old) or isinstance(old, CompactLinear):
            problems.append(f"{path}: this model has no linear layer there")
            continue
        sizes = (form.get("d_out"), form.get("d_in"), form.get("bias")) if isinstance(form, dict) else None
        if sizes is not None and sizes != (*affine_shape(old), old.bias is not None):
            problems.append(f"{path}: {sizes} in the record, {(*affine_shape(old), old.bias is not None)} in the model")
            continue
        weight = old.weight
        kind = dtype or (weight.dtype if isinstance(weight, Tensor) else torch.float32)
        made[place] = empty_layer(form, kind, where=f"quantization_config.layers.{path}")
    if problems:
        raise CheckpointError("quantization_config does not fit the model", problems=problems[:20],
                              hint="Is config.json the one of these weights?")
    for place, layer in made.items():
        swap(model, place, layer)


def apply_ties(model: PreTrainedModel, tied: Mapping[str, str]) -> list[CompactLinear]:
    """Let empty compact layers share the factors that a config.json says they share, also when the values are read;
    these layers.

    Raises:
        CheckpointError: a name that is no factor of a compact layer, or two factors of other shapes; nothing has been changed.
    """
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    layers = compact_layers(model)
    factors = {f"{path}.{name}": tensor for path, layer in layers.items()
               for name, tensor in layer.named_parameters(recurse=False) if name != "bias"}
    found, problems = {}, []
    for target, source in tied.items():
        pair = [next((name for name in (given, prefix + given, given.removeprefix(prefix)) if name in factors), None)
                for given in (target, source)]
        if pair[0] is None or pair[1] is None or pair[0] == pair[1] or factors[pair[0]].shape != factors[pair[1]].shape \
                or source in tied:
            problems.append(f"{target}: cannot be the same as {source}")
        else:
            found[pair[0]] = pair[1]
    if problems:
        raise CheckpointError("quantization_config.tied does not fit the model", problems=problems[:20])
    for target, source in found.items():
        path, _, name = target.rpartition(".")
        layers[path].register_parameter(name, layers[source.rpartition(".")[0]].get_parameter(source.rpartition(".")[2]))
    _note_ties(model, found)
    return [layers[target.rpartition(".")[0]] for target in found]


def shared_factors(model: nn.Module) -> dict[str, str]:
    """Factors of compact layers that are one parameter: the name of each but the first, with the name of the first."""
    first: dict[int, str] = {}
    found = {}
    for path, layer in compact_layers(model).items():
        for name, tensor in layer.named_parameters(recurse=False):
            if name != "bias":
                source = first.setdefault(id(tensor), f"{path}.{name}")
                if source != f"{path}.{name}":
                    found[f"{path}.{name}"] = source
    return found


def _note_ties(model: PreTrainedModel, tied: Mapping[str, str]) -> None:
    """Tell transformers, which reads the one when it loads and the other when it saves."""
    model.all_tied_weights_keys |= tied
    layers = compact_layers(model)
    for target, source in tied.items():
        path, _, name = target.rpartition(".")
        layers[path]._tied_weights_keys = {name: source}  # type: ignore[assignment]


def check_tensors(model: nn.Module) -> None:
    """Compare the tensors of loaded compact layers with what their forms say: transformers takes other types of integers.

    Raises:
        CheckpointError: types, sizes or values that no layer of the form has.
    """
    problems = []
    for path, layer in compact_layers(model).items():
        plan = empty_layer(layer.form(), layer.dtype).named_buffers()
        for name, empty in plan:
            found = layer.get_buffer(name)
            if found.is_meta:
                continue  # missing, which the loading report says
            if found.dtype != empty.dtype or found.shape != empty.shape:
                problems.append(f"{path}.{name}: {tuple(found.shape)} {found.dtype}, wanted {tuple(empty.shape)} {empty.dtype}")
            elif found.is_floating_point() and not bool(found.isfinite().all()):
                problems.append(f"{path}.{name}: values that are not finite")
    if problems:
        raise CheckpointError("the weights of compact layers are damaged", problems=problems[:20])


def record_forms(model: PreTrainedModel, known: str | None = None) -> None:
    """Note the forms of a model's compact layers in its configuration, so that `save_pretrained` writes them.

    `known` is the fingerprint of the dense model whose quantised layers these are; without, the compact model has its own.
    """
    forms = {path: layer.form() for path, layer in compact_layers(model).items()}
    if forms:
        tied = shared_factors(model)
        _note_ties(model, tied)
        model.config.quantization_config = CompactConfig(layers=forms, fingerprint=known, tied=tied)
    elif quantisation_of(model) is not None:
        del model.config.quantization_config


def quantisation_of(model: nn.Module) -> CompactConfig | None:
    """What a model's configuration records of its compact layers."""
    found = getattr(getattr(model, "config", None), "quantization_config", None)
    return found if isinstance(found, CompactConfig) else None


def form_of(model: nn.Module) -> str | None:
    """In one word how a model's layers are stored: None for dense, a codec's name where all share it, else "compact"."""
    layers = compact_layers(model).values()
    kinds: set[str] = {layer.codec.name if isinstance(layer, QuantisedLinear) and not layer.correction else ""
                       for layer in layers}
    if not kinds:
        return None
    return kinds.pop() if len(kinds) == 1 and "" not in kinds else "compact"
