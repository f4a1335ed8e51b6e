import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaloom.errors import CheckpointError, RefusedError, SettingsError
from deltaloom.models import auto_precision, describe, load_model, meta_model
from tests.models import tiny

CASES = [("llama", "causal-lm"), ("gpt2", "causal-lm"), ("t5", "seq2seq-lm"), ("bert", "sequence-classification"),
         ("gpt2", "sequence-classification"), ("bert", "token-classification"), ("bert", "regression"),
         ("vit", "image-classification")]
LABELS = ["bad", "good", "odd"]


def labels_for(task):
    return LABELS if task.endswith("-classification") else None


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_every_task_loads_the_saved_backbone(kind, task, tmp_path):
    folder = tiny.save(kind, tmp_path / "m")
    loaded = load_model(folder, task=task, labels=labels_for(task))
    saved, now = tiny.model(kind).base_model.state_dict(), loaded.model.base_model.state_dict()
    shared = [name for name in saved if name in now]
    assert len(shared) >= len(saved) - 2  # a pooler may be left out
    for name in shared:
        assert torch.equal(saved[name], now[name]), name
    heads = [name for name, _ in loaded.model.named_parameters() if name.startswith(("classifier", "score"))]
    assert set(loaded.new_parameters) == set(heads)
    assert (loaded.tokenizer is None) == (task == "image-classification") == (loaded.processor is not None)
    assert not loaded.model.training and loaded.commit is None


def test_labels_size_and_name_the_head(tmp_path):
    loaded = load_model(tiny.save("bert", tmp_path), task="sequence-classification", labels=LABELS)
    assert loaded.model.config.id2label == dict(enumerate(LABELS))
    assert loaded.model.config.label2id == {label: index for index, label in enumerate(LABELS)}
    assert loaded.model.classifier.weight.shape == (3, 16)


def test_regression_has_one_output(tmp_path):
    loaded = load_model(tiny.save("bert", tmp_path), task="regression")
    assert loaded.model.classifier.weight.shape == (1, 16)
    assert loaded.model.config.problem_type == "regression"


def test_a_new_head_follows_the_callers_seed(tmp_path):
    folder = tiny.save("bert", tmp_path)
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        heads.append(load_model(folder, task="sequence-classification", labels=LABELS).model.classifier.weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_a_saved_head_is_kept_without_labels_and_replaced_when_the_size_differs(tmp_path):
    first = load_model(tiny.save("bert", tmp_path / "a"), task="sequence-classification", labels=LABELS)
    first.model.save_pretrained(tmp_path / "b")
    first.tokenizer.save_pretrained(tmp_path / "b")
    again = load_model(tmp_path / "b", task="sequence-classification")
    assert torch.equal(again.model.classifier.weight, first.model.classifier.weight)
    assert again.new_parameters == () and again.model.config.id2label == dict(enumerate(LABELS))
    other = load_model(tmp_path / "b", task="sequence-classification", labels=["x", "y"])
    assert other.new_parameters == ("classifier.bias", "classifier.weight")
    assert other.fingerprint == again.fingerprint


def test_dtype_is_the_checkpoints_own_unless_asked(tmp_path):
    tiny.model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    assert load_model(tmp_path, task="causal-lm").model.dtype == torch.bfloat16
    assert load_model(tmp_path, task="causal-lm", dtype=torch.float32).model.dtype == torch.float32


def test_a_missing_pad_token_gets_a_stand_in_and_a_note(tmp_path):
    loaded = load_model(tiny.save("gpt2", tmp_path, pad=False), task="causal-lm")
    assert loaded.tokenizer.pad_token == "<eos>" and loaded.model.config.pad_token_id == 2
    assert any("pad token" in note for note in loaded.notes)


def test_sharded_weights_load(tmp_path):
    folder = tiny.save("llama", tmp_path, shard="4KB")
    assert (folder / "model.safetensors.index.json").is_file()
    loaded = load_model(folder, task="causal-lm")
    assert torch.equal(loaded.model.model.norm.weight, tiny.model("llama").model.norm.weight)


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_backbone_tensor_is_an_error_with_its_name(tmp_path):
    folder = tiny.save("bert", tmp_path)
    change_weights(folder, lambda tensors: tensors.pop("encoder.layer.1.output.dense.weight"))
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.1\.output\.dense\.weight"):
        load_model(folder, task="sequence-classification", labels=LABELS)


def test_a_backbone_tensor_without_a_place_is_an_error(tmp_path):
    folder = tiny.save("bert", tmp_path)
    change_weights(folder, lambda tensors: tensors.update({"encoder.layer.7.output.dense.bias": torch.zeros(16)}))
    with pytest.raises(CheckpointError, match=r"layer\.7"):
        load_model(folder, task="sequence-classification", labels=LABELS)


def test_a_backbone_tensor_of_another_shape_is_an_error(tmp_path):
    folder = tiny.save("bert", tmp_path)
    change_weights(folder, lambda tensors: tensors.update({"encoder.layer.0.output.dense.weight": torch.zeros(16, 31)}))
    with pytest.raises(CheckpointError, match=r"layer\.0\.output\.dense\.weight"):
        load_model(folder, task="sequence-classification", labels=LABELS)


def test_unused_head_tensors_are_noted(tmp_path):
    loaded = load_model(tiny.save("bert", tmp_path), task="token-classification", labels=LABELS)
    assert any("pooler" in note for note in loaded.notes)


def test_a_language_model_head_is_never_made_up(tmp_path):
    with pytest.raises(CheckpointError, match=r"cls\.predictions"):
        load_model(tiny.save("bert", tmp_path), task="causal-lm")


def test_a_tokenizer_larger_than_the_embeddings_is_refused(tmp_path):
    folder = tiny.save("llama", tmp_path)
    big = tiny.tokenizer()
    big.add_tokens([f"w{number}" for number in range(20)])
    big.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="30 tokens"):
        load_model(folder, task="causal-lm")


def test_a_task_that_the_architecture_lacks(tmp_path):
    with pytest.raises(CheckpointError, match="no seq2seq-lm model"):
        load_model(tiny.save("bert", tmp_path), task="seq2seq-lm")


@pytest.mark.parametrize(("task", "labels", "says"), [
    ("causal", None, "Did you mean 'causal-lm'"), ("regression", ["a", "b"], "no labels"),
    ("sequence-classification", ["a"], "two or more"), ("sequence-classification", ["a", "a"], "each once")])
def test_wrong_tasks_and_labels(task, labels, says, tmp_path):
    with pytest.raises(SettingsError, match=says):
        load_model(tmp_path, task=task, labels=labels)


@pytest.mark.parametrize(("source", "kind", "says"), [
    ("no such model", SettingsError, "org/name"), ("./nowhere", CheckpointError, "no such model folder"),
    ("x.gguf", CheckpointError, "no such GGUF"), ("some/model/folder", CheckpointError, "no such model folder")])
def test_sources_that_are_nothing(source, kind, says):
    with pytest.raises(kind, match=says):
        load_model(source, task="causal-lm")


def test_a_weights_file_is_not_a_source(tmp_path):
    folder = tiny.save("bert", tmp_path)
    with pytest.raises(CheckpointError, match="name the folder"):
        load_model(folder / "model.safetensors", task="regression")


def test_code_that_comes_with_a_model_is_refused(tmp_path):
    folder = tiny.save("bert", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own-thing", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('was run')\n")
    with pytest.raises(RefusedError, match="code of its own"):
        load_model(folder, task="sequence-classification", labels=LABELS)


def test_a_hub_id_offline_says_where_it_looked():
    with pytest.raises(CheckpointError, match=r"(?s)some-org/some-model at revision v1.*Looked in .*bundled:NAME"):
        load_model("some-org/some-model@v1", task="causal-lm", offline=True)


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_describe_counts_what_loading_gives(kind, task, tmp_path):
    folder = tiny.save(kind, tmp_path)
    facts = describe(folder, task=task, labels=labels_for(task))
    loaded = load_model(folder, task=task, labels=labels_for(task)).model
    assert facts.parameters == sum(parameter.numel() for parameter in loaded.parameters())
    assert facts.architecture == type(loaded).__name__
    assert (facts.d_model, facts.layers) == (16, 2)
    assert facts.weight_bytes == 4 * facts.parameters
    assert all(parameter.is_meta for parameter in meta_model(folder, task=task, labels=labels_for(task)).parameters())


def test_precision_has_a_reason():
    precision = auto_precision("cpu")
    assert precision.name in ("bf16", "fp32") and "CPU" in precision.reason
    assert auto_precision("meta").dtype == torch.float32


def test_listing_models_needs_no_torch():
    code = ("import sys; from deltaloom.models import bundled_models; [b.present for b in bundled_models()]; "
            "assert not {'torch', 'transformers'} & set(sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
