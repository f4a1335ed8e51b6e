import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaloom.errors import CheckpointError
from deltaloom.models.files import INDEX, check_folder, read_header
from tests.models import tiny


@pytest.fixture
def folder(tmp_path):
    return tiny.save("bert", tmp_path / "m")


def test_a_whole_folder_passes(folder):
    check_folder(folder)
    assert "embeddings.word_embeddings.weight" in read_header(folder / "model.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_named(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        check_folder(folder)


def test_bytes_behind_the_end_are_noticed(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="describes"):
        check_folder(folder)


def test_no_config_says_what_is_there(folder):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json.*model\.safetensors"):
        check_folder(folder)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_damaged_config_is_named(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        check_folder(folder)


def test_pickles_are_refused_by_name(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickles.*pytorch_model\.bin"):
        check_folder(folder)


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        check_folder(folder)


def test_all_shard_problems_are_listed_together(tmp_path):
    folder = tiny.save("llama", tmp_path, shard="4KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) >= 3
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-3])
    with pytest.raises(CheckpointError) as caught:
        check_folder(folder)
    assert len(caught.value.problems) == 2
    assert shards[0].name in str(caught.value) and shards[1].name in str(caught.value)


def test_an_index_cannot_lead_out_of_the_folder(tmp_path):
    folder = tiny.save("llama", tmp_path / "m", shard="4KB")
    index = json.loads((folder / INDEX).read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "../elsewhere.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="elsewhere"):
        check_folder(folder)


def test_an_index_that_promises_too_much(tmp_path):
    folder = tiny.save("llama", tmp_path, shard="4KB")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.extra"] = next(iter(index["weight_map"].values()))
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks tensor 'model\.extra'"):
        check_folder(folder)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_header_is_an_error_of_ours_or_still_consistent(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    whole = WHOLE
    length = int.from_bytes(whole[:8], "little")
    position = data.draw(st.integers(0, 8 + length - 1))
    damaged = bytearray(whole)
    damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(bytes(damaged))
    try:
        header = read_header(path)
    except CheckpointError:
        return
    # A flip inside a name keeps the sizes right; the loader then misses the tensor by its name.
    assert sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values()) == len(whole) - 8 - length


def _whole() -> bytes:
    import torch
    from safetensors.torch import save

    return save({"a.weight": torch.ones(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16), "empty": torch.zeros(0)})


WHOLE = _whole()
