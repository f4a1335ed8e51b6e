"""The script that is run where a GPU is at hand at least runs: on a CPU, at a tiny size, and its sides begin and learn alike."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "cuda_step.py"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT asks transformers by its old name
def test_all_sides_take_the_same_steps():
    spec = importlib.util.spec_from_file_location("cuda_step", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    words = ("--layers 1 --width 16 --ffn 24 --heads 2 --kv-heads 1 --vocab 64 --rank 2 --rows 2 --tokens 12 --steps 1 --warm 1 "
             "--rounds 1 --dtype fp32 --device cpu")
    found = script.main(script.arguments(words.split()))
    sides = found["sides"]
    assert set(sides) == {"ours", "peft", "plain"}
    first = sides["plain"]["first_loss"]
    for side in sides.values():
        assert side["first_loss"] == pytest.approx(first, rel=1e-5)
        assert side["last_loss"] == pytest.approx(first, rel=0.05)
        assert side["trained"] == sides["ours"]["trained"] > 0
        assert side["seconds"] > 0 and side["floor_flops"] == sides["ours"]["floor_flops"]
        assert side["tokens_per_second"] == pytest.approx(24 / side["seconds"])
        assert 0 < side["share_of_peak"] < 1
    inside = 16 * (16 + 8 + 8 + 16) + 3 * 16 * 24  # weights of the block's linears
    assert sides["ours"]["floor_flops"] == 24 * int(4 * inside + 4 * 16 * 64 * 0.5 + 6 * sides["ours"]["trained"])
