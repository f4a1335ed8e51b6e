"""The example of a search runs as it is, with two trials of a few steps."""

from pathlib import Path

import pytest

from deltaloom.jobs.search import search
from deltaloom.jobs.searchfile import read_search_file

EXAMPLE = Path(__file__).parents[2] / "examples" / "search.yaml"


def test_the_example_is_a_legal_search():
    run = read_search_file(EXAMPLE)
    assert run.settings.trials == 12 and run.space.size is None
    assert [dimension.name for dimension in run.space.dimensions] == ["deltas", "deltas[lora].0.rank", "train.learning_rate"]


@pytest.mark.real
def test_the_example_finds_something(tmp_path):
    run = read_search_file(EXAMPLE, [f"output={tmp_path / 'run'}", "search.trials=2", "train.max_steps=3", "train.epochs=null",
                                     "data.max_rows=48", "train.eval_every=1"])
    found = search(run, say=lambda text: None)
    assert len(found["trials"]) == 2 and found["best"]["value"] > 0
    assert (tmp_path / "run" / "report.html").is_file()
