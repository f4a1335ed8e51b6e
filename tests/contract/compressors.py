"""What the contract suite of compressors runs: every file under compress/, with settings for tiny models, x four layouts."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaloom.compress.base import Compressor, Facts, Work, compressor_from
from deltaloom.models.compact import record_forms
from deltaloom.registry import names_in
from tests.compress.works import deep_toy, meta_of, work_on
from tests.toys import LAYOUTS, toy_batch

PACKAGE = "deltaloom.compress"
BLOCKS = 5
SHORT = {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-3}
INT8 = {"method": "quantise", "codec": "int8"}

# Settings to run a compressor with, each a case of its own.
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "correct": [{"rank": 2}],
    "distil": [{"train": SHORT}, {"train": SHORT, "loss": "hidden", "deltas": [{"method": "lora", "rank": 2}]}],
    "drop-layers": [{"keep": 3, "choose": choose} for choose in ("uniform", "block-influence", "cluster")],
    "emulator": [{"middle": 1, "keep_first": 1, "keep_last": 1},
                 {"middle": [{"method": "magnitude"}, INT8], "keep_first": 1, "keep_last": 1}],
    "gptq": [{"group": 8}],
    "heal": [{"train": SHORT}],
    "magnitude": [{}],
    "prune-heads": [{"share": 0.5}],
    "prune-neurons": [{"share": 0.3, "multiple": 4}],
    "quantise": [{"codec": "int8"}, {"codec": "nf4"}],
    "shared-basis": [{"ratio": 0.6}],
    "svd": [{"ratio": 0.6}],
    "wanda": [{}],
    "whitened-correct": [{"rank": 2}],
    "whitened-svd": [{"ratio": 0.6}],
}

# Steps that have to come before.
BEFORE: dict[str, list[dict[str, Any]]] = {"correct": [INT8], "whitened-correct": [INT8]}

# Layouts that a compressor refuses, and what it says.
REFUSED = {("prune-heads", "gpt2"): "as wide as their number says", ("prune-heads", "bert"): "as wide as their number says"}

# Settings that cannot be met, refused by the settings or on the sketch. A compressor without any amount has none.
IMPOSSIBLE: dict[str, list[dict[str, Any]]] = {
    "correct": [{"rank": 0}, {"rank": 99}],
    "distil": [{"deltas": [{"method": "lora", "targets": ["nowhere"]}]}, {"loss": "offsite", "keep_last": 9}],
    "drop-layers": [{"keep": BLOCKS}, {"ratio": 1.0}, {"keep": 1, "keep_first": 9}],
    "emulator": [{"middle": BLOCKS}, {"middle": 1, "keep_first": 4, "keep_last": 4}],
    "gptq": [{"group": 0}],
    "heal": [{"deltas": [{"method": "lora", "targets": ["nowhere"]}]}],
    "magnitude": [{"sparsity": 1.0}, {"sparsity": -0.1}, {"sparsity": "3:5"}],
    "prune-heads": [{"share": 1.0}, {"share": 0.01}],
    "prune-neurons": [{"share": 1.0}, {"share": 0.001}],
    "quantise": [{"codec": "int3"}],
    "shared-basis": [{"ratio": 0.001}, {"blocks": 1}],
    "svd": [{"ratio": 0.001}, {"ratio": 1.5}],
    "wanda": [{"sparsity": 1.0}, {"sparsity": "3:5"}],
    "whitened-correct": [{"rank": 0}],
    "whitened-svd": [{"ratio": 0.001}],
}


@dataclass(frozen=True)
class Case:
    """A compressor with settings, on a layout."""

    name: str
    index: int
    layout: str

    @property
    def id(self) -> str:
        return f"{self.name}{self.index if len(EXAMPLES.get(self.name, [{}])) > 1 else ''}-{self.layout}"

    def step(self) -> Compressor:
        return compressor_from({"method": self.name} | EXAMPLES.get(self.name, [{}])[self.index])

    def steps(self) -> list[Compressor]:
        return [*(compressor_from(record) for record in BEFORE.get(self.name, [])), self.step()]

    def work(self) -> Work:
        torch.manual_seed(0)
        return work_on(deep_toy(self.layout, BLOCKS), self.layout, original=lambda: deep_toy(self.layout, BLOCKS))

    def sketched(self) -> Any:
        model = meta_of(deep_toy(self.layout, BLOCKS))
        for step in self.steps():
            step.sketch(model)
        return model

    def applied(self) -> tuple[Work, Facts]:
        work = self.work()
        for step in self.steps():
            facts = step.apply(work)
        return work, facts


@functools.cache
def done(case: Case) -> tuple[Work, Facts]:
    """The work after the case's steps; not to be changed."""
    work, facts = case.applied()
    record_forms(work.model)
    return work, facts


def all_cases() -> list[Case]:
    return [Case(name, index, layout) for name in names_in(PACKAGE)
            for index in range(len(EXAMPLES.get(name, [{}]))) for layout in LAYOUTS if (name, layout) not in REFUSED]


def logits(model: Any, layout: str) -> Tensor:
    inputs = toy_batch(layout)
    if layout == "t5":
        inputs["decoder_input_ids"] = inputs.pop("labels")
    with torch.no_grad():
        return model.eval()(**inputs).logits
