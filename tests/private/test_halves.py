import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaloom.errors import CheckpointError
from deltaloom.private.cut import split
from deltaloom.private.halves import load_half, save_half
from deltaloom.private.replay import packed, run_back, run_front
from tests.private.pieces import task_name, three_blocks
from tests.toy_tokenizers import byte_level

LENGTHS = (7, 4, 5)


def batch():
    ids = torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "attention_mask": (torch.arange(7) < torch.tensor(LENGTHS)[:, None]).long()}


@pytest.fixture
def folders(tmp_path):
    def make(layout, head="owner"):
        halves = split(three_blocks(layout), task_name(layout), 1, head=head)
        for half in halves:
            save_half(half, tmp_path / half.part, byte_level() if half.part == "front" else None)
        return halves
    return make, tmp_path


@pytest.mark.parametrize("head", ["owner", "party"])
@pytest.mark.parametrize("layout", ["llama", "gpt2", "gemma", "bert", "distilbert", "roberta", "llama-classifier"])
def test_halves_saved_and_loaded_apart_compute_the_same_bits(folders, layout, head):
    make, folder = folders
    front, back = make(layout, head)
    again, tokenizer = load_half(folder / "front", "front")
    behind, none = load_half(folder / "back", "back")
    assert tokenizer.decode([5, 6]) == byte_level().decode([5, 6]) and none is None
    assert (again.facts(), behind.facts()) == (front.facts(), back.facts())
    assert (again.head, again.tied, again.blocks) == (head, front.tied, 2)
    found = []
    for first, second in ((front, back), (again, behind)):
        hidden = run_front(first.model, batch(), first.is_decoder)
        flat = packed(hidden, "masked", LENGTHS)
        found.append(packed(run_back(second.model, flat, LENGTHS, (0,) * 3, "masked", second.is_decoder), "masked", LENGTHS))
    assert torch.equal(found[0], found[1])
    holder = behind if head == "owner" else again
    assert holder.has_head and (layout != "llama" or holder.model.get_output_embeddings().weight.shape == (64, 16))


@pytest.mark.parametrize("layout", ["llama", "gpt2", "bert"])
def test_a_folder_holds_nothing_of_the_other_half(folders, layout):
    make, folder = folders
    front, _ = make(layout)
    whole = three_blocks(layout).state_dict()
    ours, theirs = load_file(folder / "front" / "model.safetensors"), load_file(folder / "back" / "model.safetensors")

    def values(tensors):
        return {tensor.numpy().tobytes() for tensor in tensors.values()}

    shared = values(ours) & values(theirs)
    assert len(shared) == (1 if front.tied else 0)  # the output matrix, which the party holds as table of tokens
    assert values(ours) | values(theirs) == values(whole)
    assert front.tied == (layout == "gpt2") == json.loads((folder / "front" / "half.json").read_text())["tied"]
    blocks = {name.split(".")[2] for name in ours if ".layers." in name or ".h." in name}
    assert blocks <= {"0"}


def test_damage_is_told(folders):
    make, folder = folders
    make("llama")
    with pytest.raises(CheckpointError, match="the other half"):
        load_half(folder / "front", "back")
    weights = folder / "back" / "model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    for wrong, what in (({**tensors, "stray": tensors[name].clone()}, "stray: stray"),
                        ({key: value for key, value in tensors.items() if key != name}, f"missing: {name}"),
                        ({**tensors, name: torch.zeros(1, 2, 3)}, f"shape of {name}")):
        save_file(wrong, weights)
        with pytest.raises(CheckpointError, match=what):
            load_half(folder / "back")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_half(folder / "back")
    record = folder / "back" / "half.json"
    for text in ("{", "[]", json.dumps(json.loads(record.read_text()) | {"cut": 9}),
                 json.dumps(json.loads(record.read_text()) | {"more": 1}), json.dumps({"part": "back"}),
                 json.dumps(json.loads(record.read_text()) | {"task": "token-classification"})):
        record.write_text(text)
        with pytest.raises(Exception, match=r"no half|cannot be cut|at least one block"):
            load_half(folder / "back")
