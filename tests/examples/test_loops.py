"""The example scripts with loops of others run, on a tiny model and on the bundled one."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from tests.models.tiny import tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"


def script(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny(tmp_path):
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                         max_position_embeddings=64)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


def test_own_loop_on_a_tiny_model(tiny, capsys):
    first, last = script("own_loop").main(tiny, steps=6, size=4)
    assert math.isfinite(first) and math.isfinite(last)
    assert "differs by 0\n" in capsys.readouterr().out


def test_hf_trainer_on_a_tiny_model(tiny):
    assert math.isfinite(script("hf_trainer").main(tiny, steps=3, size=4))


@pytest.mark.real
def test_the_loop_learns_on_the_bundled_model():
    first, last = script("own_loop").main(steps=25, size=8)
    assert last < first
