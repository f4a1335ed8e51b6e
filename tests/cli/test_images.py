"""Images from end to end: scikit-learn's digits as PNG files in a folder for each class, and as bytes in a parquet file."""

import io

import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from PIL import Image
from sklearn.datasets import load_digits

from tests.jobs.small import write_run

ROWS = 600  # of 1797


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder with train/ and dev/, the same rows in dev.parquet, and a small vision transformer."""
    root = tmp_path_factory.mktemp("digits")
    found = load_digits()
    table = {"image": [], "label": []}
    for index in range(ROWS):
        picture = Image.fromarray((found.images[index] * 15).astype("uint8")).resize((16, 16))
        part = "train" if index < ROWS * 3 // 4 else "dev"
        folder = root / part / f"digit {found.target[index]}"
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{index}.png")
        if part == "dev":
            memory = io.BytesIO()
            picture.save(memory, "PNG")
            table["image"].append(memory.getvalue())
            table["label"].append(folder.name)
    pyarrow.parquet.write_table(pyarrow.table(table), root / "dev.parquet")
    torch.manual_seed(0)
    config = transformers.ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                    image_size=16, patch_size=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                                    initializer_range=0.2)  # random, not pretrained: larger values learn faster
    transformers.ViTModel(config).save_pretrained(root / "vit")
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(root / "vit")
    return root


def test_digits_are_learned_from_folders_and_read_from_parquet(digits, command):
    run = {"model": "vit", "task": "image-classification", "data": {"train": "train", "eval": "dev"},
           "deltas": [{"method": "full", "targets": "all"}], "output": str(digits / "run"),
           "train": {"epochs": 12, "batch_size": 32, "learning_rate": 5e-3, "precision": "fp32"}}
    found = command.json("tune", write_run(digits, run))
    assert found["base_metrics"]["accuracy"] < 0.3
    assert found["metrics"]["accuracy"] > 0.55  # a plain loop of PyTorch comes to 0.74
    scored = command.json("eval", digits / "run", "--data", digits / "dev.parquet")
    assert scored["metrics"]["accuracy"] == found["metrics"]["accuracy"] and scored["rows"] == ROWS // 4
    assert command.json("merge", digits / "run", "-o", digits / "merged")["logits_max_error"] < 1e-4
    merged = command.json("eval", digits / "merged", "--task", "image-classification", "--data", digits / "dev.parquet")
    assert merged["metrics"]["accuracy"] == pytest.approx(found["metrics"]["accuracy"], abs=0.03)


def test_a_small_delta_and_predictions_without_labels(digits, command):
    run = {"model": "vit", "task": "image-classification", "data": {"train": "dev.parquet", "eval_fraction": 0.3},
           "deltas": [{"method": "lora", "rank": 2}, {"method": "norms"}], "output": str(digits / "small"),
           "train": {"max_steps": 2, "precision": "fp32"}}
    command.json("tune", write_run(digits, run, "small.yaml"))
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(digits / "dev.parquet").select(["image"]), digits / "new.parquet")
    done = command.json("predict", digits / "small", "--data", digits / "new.parquet", "-o", digits / "out.jsonl")
    assert done["rows"] == ROWS // 4


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_files_that_are_no_images_are_named(content, digits, tmp_path, command):
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "data" / name / "1.png")
    (tmp_path / "data" / "b" / "2.png").write_bytes(content)
    run = {"model": str(digits / "vit"), "task": "image-classification", "data": {"train": "data"},
           "deltas": [{"method": "lora"}], "output": str(tmp_path / "run")}
    assert "data/b/2.png" in command.refused("tune", write_run(tmp_path, run))
    assert not (tmp_path / "run").exists()
