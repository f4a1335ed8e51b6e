"""What the contract suite runs: every method that has a file under deltas/, with settings for tiny models, x four layouts."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaloom.deltas.base import InputDelta, Method, PrefixDelta
from deltaloom.registry import class_named, names_in
from deltaloom.tuned import Tuned, attach
from tests.deltas.decoders import decoder_for
from tests.toys import LAYOUTS, toy, toy_batch

PACKAGE = "deltaloom.deltas"

# Settings to run a method with, each a case of its own. A method without an entry runs with its defaults.
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "adalora": [{"rank": 2, "reserve": 2}],
    "auto": [{"budget": 300}],
    "bottleneck": [
        {"placement": "houlsby", "size": 4, "activation": "gelu"},
        {"placement": "pfeiffer", "size": 4, "activation": "silu"},
        {"placement": "parallel", "size": 4, "scale": "learned"},
    ],
    "dora": [{"rank": 4}],
    "fact-tk": [{"rank": 4, "scale": 3.0}, {"rank": 3, "targets": ("q", "k", "v", "down")}],
    "fact-tt": [{"rank": 4, "scale": 3.0}, {"rank": 3, "targets": ("q", "k", "v", "down")}],
    "gated": [{"delta": {"method": "lora", "rank": 4}}, {"delta": {"method": "prefix", "length": 3}}],
    "intrinsic": [{"over": {"method": "lora", "rank": 2}, "dimension": 60, "scale": 2.0}],
    "intrinsic-prompt": [{"decoder": decoder_for}],
    "lora": [{"rank": 4}, {"rank": 4, "targets": ("q", "k", "v", "down")}],
    "lotr": [{"rank": 4}, {"rank": 3, "targets": ("q", "k", "v", "down")}],
    "prefix": [{"length": 3}],
    "prompt": [{"length": 3}],
    "route": [{"delta": {"method": "prefix", "length": 3}, "pool": 2}, {"delta": {"method": "prompt", "length": 3}, "pool": 2}],
    "tsvd": [{"rank": 2, "transform": "identity"}, {"rank": 2, "transform": "haar", "targets": ("q", "k", "v", "down")},
             {"rank": 1, "transform": "frame"}, {"rank": 2, "transform": "learned"}, {"rank": 2, "preset": "literal"}],
    "tucker1": [{"rank": 2, "basis": "gradient"}, {"rank": 3, "targets": ("q", "k", "v", "down")}],
}

# Reasons why a call with different deltas row by row is refused.
ROWS_REFUSED = {("full", "t5"): "row by row", ("prompt", "bert"): "row by row",
                ("intrinsic-prompt", "bert"): "row by row", ("route1", "bert"): "row by row"}

# Methods that choose by the text of a whole row, with the reason why a text in the making has to be written with a cache.
CHOOSES_ONCE = {"route": "the choice is the prompt's; read as a whole, a longer row is another text"}

# Methods some of whose parameters have no effect in exact arithmetic, with the reason.
WITHOUT_EFFECT = {"bitfit": "the bias of keys moves all scores of a query alike", "full": "as with bitfit"}

# Largest allowed |a - b| / (1 + |b|), by dtype and by what is compared.
TOLERANCE: dict[tuple[torch.dtype, str], float] = {
    (torch.float64, "fold"): 1e-10,
    (torch.float64, "fold:dora"): 1e-6,    # its row norms are computed in float32
    (torch.float32, "merge"): 2e-5,
    (torch.float32, "rows"): 1e-5,         # other batch sizes take other paths through the matrix products
    (torch.float32, "checkpointing"): 1e-6,
    (torch.float32, "cache"): 1e-4,
    (torch.float32, "full"): 1e-6,
    (torch.float64, "full"): 1e-12,
}


@dataclass(frozen=True)
class Case:
    """A method with settings, on a layout."""

    name: str
    index: int
    layout: str

    @property
    def refusal_by_rows(self) -> str:
        """Why different deltas row by row are refused, by the method or by one of its examples; empty where they are not."""
        return ROWS_REFUSED.get((self.name, self.layout), ROWS_REFUSED.get((f"{self.name}{self.index}", self.layout), ""))

    @property
    def id(self) -> str:
        number = f"{self.index}" if len(EXAMPLES.get(self.name, [{}])) > 1 else ""
        return f"{self.name}{number}-{self.layout}"

    def method(self, **changes: Any) -> Method:
        settings = {key: value(self.layout) if callable(value) else value  # what belongs to one layout's model is made for it
                    for key, value in (EXAMPLES.get(self.name, [{}])[self.index] | changes).items()}
        return class_named(PACKAGE, self.name, Method, "method")(**settings)

    def tuned(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tuned:
        return attach(toy(self.layout, dtype=dtype), [self.method()], seed=seed)

    def batch(self, dtype: torch.dtype = torch.float32, labels: bool = True) -> dict[str, Tensor]:
        return toy_batch(self.layout, labels=labels)


def all_cases(layouts: tuple[str, ...] = LAYOUTS) -> list[Case]:
    return [Case(name, index, layout) for name in names_in(PACKAGE)
            for index in range(len(EXAMPLES.get(name, [{}]))) for layout in layouts]


def perturb(tuned: Tuned, lane: str | None = None, seed: int = 0, size: float = 0.1) -> None:
    """Random changes of a lane's parameters, so that what it does shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.delta_parameters(lane).values():
            parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter)


def steps(tuned: Tuned, batch: dict[str, Tensor], count: int, lr: float = 1e-2) -> None:
    """Adam steps on one batch, in training mode."""
    optimizer = torch.optim.Adam(tuned.delta_parameters().values(), lr=lr)
    tuned.train()
    for _ in range(count):
        optimizer.zero_grad()
        (tuned(**batch).loss + tuned.penalty()).backward()
        optimizer.step()
    tuned.eval()


def logits(model: nn.Module, layout: str, rows: int = 3) -> Tensor:
    with torch.no_grad():
        return model(**toy_batch(layout, rows=rows)).logits


def state(tuned: Tuned, lane: str | None = None) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in tuned.delta_state(lane).items()}


def gradients(tuned: Tuned, lane: str | None = None) -> dict[str, Tensor]:
    return {key: parameter.grad.clone() for key, parameter in tuned.delta_parameters(lane).items() if parameter.grad is not None}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that attaching could change in a model."""
    return {"state": copy.deepcopy(model.state_dict()), "grad": {n: p.requires_grad for n, p in model.named_parameters()},
            "modules": [(n, type(m), m.training) for n, m in model.named_modules()]}


def assert_same_snapshot(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["modules"] == after["modules"]
    assert before["grad"] == after["grad"]
    assert_same_tensors(before["state"], after["state"])


def assert_same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [key for key in a if a[key].dtype != b[key].dtype or not torch.equal(a[key], b[key])]
    assert not different


def assert_near(got: Tensor, expected: Tensor, what: str) -> None:
    bound = TOLERANCE.get((got.dtype, what), TOLERANCE.get((got.dtype, what.partition(":")[0]), 0.0))
    worst = ((got - expected).abs() / (1 + expected.abs())).max().item()
    assert worst <= bound, f"{what}: {worst:.2e} > {bound:.0e}"


def birth_reason(tuned: Tuned) -> str:
    """Why this delta changes the model at birth; empty if it must not."""
    return next((delta.changes_at_birth for _, delta in tuned.pairs() if delta.changes_at_birth), "")


def inside_layers(tuned: Tuned) -> bool:
    """Whether all deltas live in layers, rather than in front of the input or of an attention's keys."""
    return not any(isinstance(delta, InputDelta | PrefixDelta) for _, delta in tuned.pairs())
