"""`deltaloom tune` from end to end on tiny models: every task, every method, lists of them, and what a run leaves behind."""

import json
import re

import pytest
import yaml

from tests.jobs.small import files_of, run_values, write_run

PROMISED = {"run", "metrics", "base_metrics", "trainable_parameters", "final_parameters", "head_parameters", "total_parameters",
            "delta_bytes", "flops_per_token", "seconds", "tokens", "tokens_per_second", "peak_memory_bytes"}
FILES = {"run.yaml", "environment.json", "events.jsonl", "metrics.json", "report.html", "README.md", "predictions.jsonl",
         "delta/delta.json", "delta/delta.safetensors"}
LORA, PREFIX, BITFIT = {"method": "lora", "rank": 2}, {"method": "prefix", "length": 3}, {"method": "bitfit"}
RUNS = [
    ("classes", [LORA]),
    ("classes", [PREFIX, LORA, BITFIT]),
    ("numbers", [{"method": "bottleneck"}]),
    ("tags", [{"method": "norms"}]),
    ("prompts", [{"method": "dora", "rank": 2}]),
    ("prompts", [{"method": "prompt", "length": 3}]),
    ("chats", [{"method": "ia3"}]),
    ("chats", [PREFIX, LORA]),
    ("pairs", [LORA]),
    ("pairs", [{"method": "full", "targets": "attention"}]),
]


NAMES = [f"{kind}-{'+'.join(entry['method'] for entry in deltas)}" for kind, deltas in RUNS]


@pytest.mark.parametrize(("kind", "deltas"), RUNS, ids=NAMES)
def test_a_run_leaves_what_was_promised(kind, deltas, models, tmp_path, command):
    values = run_values(kind, models, tmp_path, deltas)
    result = command.json("tune", write_run(tmp_path, values))
    assert set(result) >= PROMISED
    found = files_of(tmp_path / "run")
    assert set(found) >= FILES
    rest = {name for name in set(found) - FILES if not re.match(r"(checkpoints/step-\d+|delta/peft)/", name)}
    assert rest == set()
    assert any(name.startswith("checkpoints/step-4/") for name in found)
    stored = json.loads(found["metrics.json"])
    assert stored == result
    assert result["trainable_parameters"] > 0 and result["tokens"] > 0
    assert result["delta_bytes"] == len(found["delta/delta.json"]) + len(found["delta/delta.safetensors"])
    assert set(result["metrics"]) == set(result["base_metrics"]) and result["metrics"]
    assert len(found["predictions.jsonl"].splitlines()) == 12
    assert str(tmp_path) not in found["README.md"].decode()
    resolved = yaml.safe_load(found["run.yaml"])
    assert resolved["origins"]["train.max_steps"] == "file" and resolved["origins"]["train.warmup"] == "default"
