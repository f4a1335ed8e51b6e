import json

import pytest
import yaml

from deltaloom import events
from deltaloom.report.card import base_model, model_card
from deltaloom.report.facts import read_run

from .folders import classification_run, run_file


def header_of(card):
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_has_header_use_results_data_training_and_licence(tmp_path):
    card = model_card(read_run(classification_run(tmp_path / "sst2")))
    assert header_of(card) == {
        "library_name": "deltaloom",
        "base_model": "bundled:minilm",
        "tags": ["delta-tuning", "lora", "sequence-classification"],
    }
    for part in (
        "# sst2\n",
        'load_model("bundled:minilm", task="sequence-classification", labels=["negative", "positive"])',
        'deltaloom.load(base.model, "delta")',
        "| accuracy | 0.5092 | 0.8392 | +0.3300 | 0.8131 to 0.8651 |",
        "| training file | train.jsonl |",
        "| deltas.0.rank | 8 |",
        "| duplicate | 12 |",
        "## Licence",
        "302 kB",
    ):
        assert part in card, part


def test_the_card_holds_no_folders_secrets_or_rows(tmp_path):
    folder = classification_run(tmp_path / "sst2")
    run = run_file(1e-3, 8, "x")
    run["data"] |= {"train": ["/home/someone/hidden/a.jsonl", "C:\\Users\\someone\\b.csv"], "eval": "hidden/dev.jsonl"}
    run["deltas"].append({"from": "runs/hidden/delta", "note": "see /home/someone/notes.txt", "token": "hf_" + "a" * 30})
    run["train"]["resume_from"] = "~/hidden/step-3"
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    result = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps(result | {"model": "/home/someone/hidden/my-model"}))
    sink = events.JsonLines(folder / "events.jsonl")
    sink(events.Warned(kind="row", message="/home/someone/hidden/a.jsonl:3: odd row 'private text'"))
    sink.close()
    card = model_card(read_run(folder))
    for word in ("someone", "hidden/", "/home", "Users", "private text", "hf_a", "very slow", str(tmp_path)):
        assert word not in card, word
    for word in ("a.jsonl, b.csv", "dev.jsonl", "my-model", "notes.txt", "step-3", "| row | 1 |"):
        assert word in card, word


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        ("org/name", "org/name"),
        ("org/name@abc", "org/name@abc"),
        ("bundled:minilm", "bundled:minilm"),
        ("./models/x", "x"),
        ("/a/b/c", "c"),
        ("~/c/", "c"),
        ("a/b/c", "c"),
        ("C:\\models\\x", "x"),
        ("models/x.gguf", "x.gguf"),
        ("", ""),
    ],
)
def test_a_model_in_a_folder_is_named_by_its_last_part(model, shown):
    assert base_model(model) == shown


def test_hostile_names_cannot_leave_their_place(tmp_path):
    folder = classification_run(tmp_path / "run")
    evil = "x`\n---\n<script>|[a](http://b)\n# head\n```"
    result = json.loads((folder / "metrics.json").read_text())
    result |= {"task": evil, "methods": [{"method": evil}], "metrics": {evil: 0.5}, "per_class": [{"label": evil, "f1": 0.5}]}
    (folder / "metrics.json").write_text(json.dumps(result))
    card = model_card(read_run(folder))
    assert header_of(card)["tags"][1] == " ".join(evil.split())
    body = card.split("\n---\n", 1)[1]
    assert body.count("```") == 4
    headings = [line for line in body.splitlines() if line.startswith("# ")]
    assert headings == ["# run"]
    outside = body.replace(body[body.index("```python") : body.index("## Results")], "")
    assert "<script>" not in outside.replace("`" + " ".join(evil.replace("`", "'").split()) + "`", "")
    for line in outside.splitlines():
        if line.startswith("| x"):
            assert len(line.replace("\\|", "").split("|")) in (4, 7)


def test_an_unfinished_run_says_so_and_an_empty_folder_has_a_card(tmp_path):
    assert "ended early" in model_card(read_run(classification_run(tmp_path / "cut", steps=5, finished=False)))
    (tmp_path / "empty").mkdir()
    assert "# empty" in model_card(read_run(tmp_path / "empty"))
