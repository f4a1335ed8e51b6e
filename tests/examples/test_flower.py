"""The example of a Flower federation runs as it is: a SuperLink, two SuperNodes, two parties, on a tiny model."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from tests.models.tiny import tokenizer

FLOWER = Path(__file__).parents[2] / "examples" / "flower"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_parties_and_the_server_end_with_the_written_out_mean(tmp_path):
    pytest.importorskip("flwr", reason="flwr is not installed: it does not fit constraints.txt, see docs/private.md#flower")
    torch.manual_seed(0)
    model = tmp_path / "model"
    BertModel(BertConfig(vocab_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                         max_position_embeddings=64)).save_pretrained(model)
    tokenizer().save_pretrained(model)
    spec = importlib.util.spec_from_file_location("start", FLOWER / "start.py")
    start = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(start)
    place = start.run(tmp_path / "f", str(model), rounds=2)
    common = load_file(place / "delta.safetensors")
    given = []
    for name in start.NAMES:
        with safe_open(tmp_path / "f" / name / "round.safetensors", "pt") as file:   # what it sent in the last round
            assert (file.metadata() or {})["count"] == "80"
            given.append({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        assert (tmp_path / "f" / name / "delta" / "delta.safetensors").read_bytes() == (place / "delta.safetensors").read_bytes()
    assert set(common) == set(given[0]) == set(given[1])
    for name, tensor in common.items():
        assert torch.equal(tensor, ((given[0][name].double() * 80 + given[1][name].double() * 80) / 160).float())
    assert any(not torch.equal(given[0][name], given[1][name]) for name in common)
