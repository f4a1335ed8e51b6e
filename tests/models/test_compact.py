"""Loading that quantises, and compact models through transformers: the same tensors as quantising in memory, bad records."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from deltaloom.compact import QuantisedLinear, codec_from
from deltaloom.compact.face import compact_layers, model_bytes, parameter_count
from deltaloom.errors import CheckpointError, DeltaloomError, RefusedError, SettingsError
from deltaloom.models import describe, fingerprint, load_model, meta_model
from deltaloom.models.compact import CompactConfig, block_linears, form_of, quantise_model, record_forms
from tests.models.tiny import save

CLASSES = {"llama": AutoModelForCausalLM, "gpt2": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM, "bert": AutoModel}
TASKS = {"llama": "causal-lm", "gpt2": "causal-lm", "t5": "seq2seq-lm", "bert": "sequence-classification"}


def folder(kind, tmp_path, shard=None):
    save(kind, tmp_path / kind, shard=shard)
    return tmp_path / kind


def assert_same(a, b):
    own, other = a.state_dict(), b.state_dict()
    assert own.keys() == other.keys()
    assert [key for key in own if own[key].dtype != other[key].dtype or not torch.equal(own[key], other[key])] == []


@pytest.mark.parametrize("codec", ["nf4", "int8"])
@pytest.mark.parametrize("kind", CLASSES)
def test_quantising_while_loading_is_quantising_afterwards(kind, codec, tmp_path):
    place = folder(kind, tmp_path, shard="10KB")
    labels = ["a", "b", "c"] if kind == "bert" else None
    torch.manual_seed(0)
    loaded = load_model(place, task=TASKS[kind], labels=labels, quantise=codec)
    torch.manual_seed(0)
    dense = load_model(place, task=TASKS[kind], labels=labels)
    assert loaded.fingerprint == dense.fingerprint == fingerprint(loaded.model)
    assert loaded.new_parameters == dense.new_parameters
    linears, parameters = block_linears(dense.model), parameter_count(dense.model)
    expected = quantise_model(dense.model, codec_from(codec))
    assert_same(loaded.model, expected)
    assert list(compact_layers(loaded.model)) == linears == list(compact_layers(expected)) and len(linears) >= 8
    assert parameter_count(loaded.model) == parameters and form_of(loaded.model) == codec
    assert not any(tensor.is_meta for tensor in loaded.model.state_dict().values())
    assert not loaded.model.training and {layer.training for layer in compact_layers(loaded.model).values()} == {False}


@pytest.mark.parametrize("kind", CLASSES)
def test_a_saved_compact_model_loads_through_every_door(kind, tmp_path):
    place = folder(kind, tmp_path)
    model = CLASSES[kind].from_pretrained(place, quantization_config=CompactConfig(codec="nf4"))
    model.save_pretrained(tmp_path / "small", max_shard_size="5KB")
    again = CLASSES[kind].from_pretrained(tmp_path / "small")
    assert_same(again, model)
    assert fingerprint(again) == fingerprint(CLASSES[kind].from_pretrained(place))
    again.save_pretrained(tmp_path / "twice")
    assert_same(CLASSES[kind].from_pretrained(tmp_path / "twice"), model)
    if kind in ("llama", "bert"):
        other = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small", num_labels=2)
        assert len(compact_layers(other)) == len(compact_layers(model))


def test_load_model_and_facts_of_a_saved_compact_model(tmp_path):
    place = folder("llama", tmp_path)
    first = load_model(place, task="causal-lm", quantise="nf4", dtype=torch.bfloat16)
    first.model.save_pretrained(tmp_path / "small")
    first.tokenizer.save_pretrained(tmp_path / "small")
    again = load_model(tmp_path / "small", task="causal-lm")
    assert_same(again.model, first.model)
    assert again.fingerprint == first.fingerprint and again.model.dtype == torch.bfloat16
    facts, dense = describe(tmp_path / "small"), describe(place)
    assert facts.parameters == dense.parameters and facts.weight_bytes == model_bytes(again.model) < dense.weight_bytes / 2
    meta = meta_model(tmp_path / "small", task="causal-lm")
    shapes = {key: (t.shape, t.is_meta) for key, t in meta.state_dict().items()}
    assert shapes == {key: (t.shape, True) for key, t in again.model.state_dict().items()}
    with pytest.raises(RefusedError, match="already"):
        load_model(tmp_path / "small", task="causal-lm", quantise="int8")
    with pytest.raises(RefusedError, match="already"):
        quantise_model(again.model, codec_from("int8"))


def test_a_changed_compact_model_has_a_fingerprint_of_its_own(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder("llama", tmp_path), quantization_config=CompactConfig(codec="int8"))
    known = fingerprint(model)
    record_forms(model)
    own = fingerprint(model)
    assert own != known == fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path / "llama"))
    layer = next(iter(compact_layers(model).values()))
    layer.codes[0, 0] += 1
    assert fingerprint(model) != own


def test_what_is_never_quantised(tmp_path):
    model = load_model(folder("llama", tmp_path), task="causal-lm", quantise="nf4", dtype=torch.bfloat16).model
    assert type(model.lm_head) is torch.nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    t5 = load_model(folder("t5", tmp_path), task="seq2seq-lm", quantise="nf4").model
    paths = [path for path, module in t5.named_modules() if type(module) in (torch.nn.Embedding, torch.nn.Linear)]
    assert {path.rsplit(".", 1)[-1] for path in paths} == {"shared", "embed_tokens", "relative_attention_bias", "lm_head"}


def test_weights_that_cannot_be_quantised(tmp_path):
    place = folder("llama", tmp_path)
    state = load_file(place / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(state, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="up_proj"):
        load_model(place, task="causal-lm", quantise="nf4")
    with pytest.raises(SettingsError, match="nf4"):
        load_model(place, task="causal-lm", quantise="nf5")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="up_proj"):
        load_model(place, task="causal-lm", quantise="nf4")
    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(16, 32)
    save_file(state, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="up_proj"):
        load_model(place, task="causal-lm", quantise="nf4")


LAYER = "model.layers.0.mlp.up_proj"


def small(tmp_path):
    first = load_model(folder("llama", tmp_path), task="causal-lm", quantise="nf4")
    first.model.save_pretrained(tmp_path / "small")
    first.tokenizer.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


@pytest.mark.parametrize("change", [
    lambda q: q["layers"].update({"model.layers.9.mlp.up_proj": q["layers"][LAYER]}),
    lambda q: q["layers"].update({"model.norm": q["layers"][LAYER]}),
    lambda q: q["layers"].update({"": q["layers"][LAYER]}),
    lambda q: q["layers"][LAYER].update(d_in=2 ** 40),
    lambda q: q["layers"][LAYER].update(d_out=33),
    lambda q: q["layers"][LAYER].update(bias=True),
    lambda q: q["layers"][LAYER].update(codec="nf5"),
    lambda q: q["layers"][LAYER].update(codec="int8"),
    lambda q: q["layers"][LAYER].update(correction=10 ** 6),
    lambda q: q["layers"][LAYER].update(form="pickled"),
    lambda q: q["layers"].update({LAYER: 3}),
    lambda q: q["layers"].pop(LAYER),
    lambda q: q.update(layers=[1]),
    lambda q: q.update(fingerprint=3),
    lambda q: q.update(more=1),
    lambda q: q.update(codec={"codec": "nf4", "x": 1}),
], ids=str)
def test_records_from_outside_are_checked(change, tmp_path):
    place = small(tmp_path)
    config = json.loads((place / "config.json").read_text())
    change(config["quantization_config"])
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(DeltaloomError):
        load_model(place, task="causal-lm")


@pytest.mark.parametrize("change", ["type", "shape", "missing", "nan"])
def test_tensors_from_outside_are_checked(change, tmp_path):
    place = small(tmp_path)
    state = load_file(place / "model.safetensors")
    if change == "type":
        state[f"{LAYER}.codes"] = state[f"{LAYER}.codes"].to(torch.int32)
    elif change == "shape":
        state[f"{LAYER}.codes"] = state[f"{LAYER}.codes"][:-1].clone()
    elif change == "missing":
        del state[f"{LAYER}.steps"]
    else:
        state[f"{LAYER}.steps"] = torch.full_like(state[f"{LAYER}.steps"], float("nan"))
    save_file(state, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DeltaloomError):
        load_model(place, task="causal-lm")


def test_pages_of_a_model_that_was_read_before_stay_as_they_are(tmp_path):
    place = folder("llama", tmp_path)
    first = AutoModelForCausalLM.from_pretrained(place)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1.0)
    changed = {key: tensor.clone() for key, tensor in first.state_dict().items()}
    second = load_model(place, task="causal-lm", quantise="nf4")
    assert all(torch.equal(tensor, changed[key]) for key, tensor in first.state_dict().items())
    dense = load_model(place, task="causal-lm").model
    assert torch.equal(second.model.model.embed_tokens.weight, dense.model.embed_tokens.weight)


def test_files_are_as_small_as_the_codec_says(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2, "num_attention_heads": 9,
             "num_key_value_heads": 3}
    for codec, most in (("nf4", 0.52), ("int8", 1.01)):
        model = quantise_model(LlamaForCausalLM(LlamaConfig(**sizes)).bfloat16(), codec_from(codec))
        layers = compact_layers(model).values()
        weights = sum(layer.elements() for layer in layers)
        assert sum(layer.stored_bytes() for layer in layers) <= most * weights
        assert all(isinstance(layer, QuantisedLinear) for layer in layers)
        model.save_pretrained(tmp_path / codec)
        rest = sum(p.numel() * p.element_size() for p in model.parameters())
        header = 200 * len(model.state_dict())
        assert (tmp_path / codec / "model.safetensors").stat().st_size <= most * weights + rest + header
