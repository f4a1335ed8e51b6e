"""Leakage of the first result: all attacks on real models, undefended and under growing noise.

    python benchmarks/leakage.py --model smollm2 --data DIR [--cut 2] [--rows 12] [--output benchmarks/results/leakage.json]

DIR holds rated.movies.jsonl. The attacker trains on other texts of the same kind, once knowing the party's prefix, once not; it
tries all tokens that occur in the file. The prefix is tuned for a few steps on texts that neither side of the comparison uses.
Noise is a multiple of the root mean square of an activation, rows are clipped at the 99% quantile of their norms. Utility:
next-token accuracy of the same model on the guarded rows, without any tuning to the noise (language models only).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import deltaloom
from deltaloom.models import load_model
from deltaloom.private.attacks.base import Knowledge, TokenAttack
from deltaloom.private.attacks.inverter import Inverter
from deltaloom.private.attacks.linear_probe import LinearProbe
from deltaloom.private.attacks.nearest_embedding import NearestEmbedding
from deltaloom.private.attacks.probe_table import ProbeTable
from deltaloom.private.attacks.sequential_matching import SequentialMatching
from deltaloom.private.attacks.sequential_prior import SequentialPrior
from deltaloom.private.guards._noise import new_key
from deltaloom.private.guards.base import Chain
from deltaloom.private.guards.dx_privacy import DxPrivacy
from deltaloom.private.guards.gaussian import Gaussian
from deltaloom.private.leakage import Case, Victim, measure, plant

NOISE = (1.0, 2.0, 4.0, 8.0)
DELTA = 1e-6


class Reached(Exception):
    """The cut: nothing behind it has to run."""


class Cut:
    """A model that is watched, stopped or changed behind a block."""

    def __init__(self, tuned: Any, block: nn.Module) -> None:
        self.tuned, self._act = tuned, None
        self._act: Callable[[Tensor], Tensor] | None
        block.register_forward_hook(self._hook)

    def _hook(self, _: nn.Module, __: Any, output: Any) -> Any:
        if self._act is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        changed = self._act(hidden)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def front(self, ids: Tensor, prefix: bool) -> Tensor:
        found: list[Tensor] = []

        def stop(hidden: Tensor) -> Tensor:
            found.append(hidden)
            raise Reached
        self._act = stop
        try:
            with torch.no_grad(), self.tuned.use("default" if prefix else None):
                self.tuned(input_ids=ids)
        except Reached:
            pass
        finally:
            self._act = None
        return found[0]

    def logits(self, ids: Tensor, change: Callable[[Tensor], Tensor] | None = None, prefix: bool = True) -> Tensor:
        self._act = change
        try:
            with torch.no_grad(), self.tuned.use("default" if prefix else None):
                return self.tuned(input_ids=ids).logits
        finally:
            self._act = None


def texts(path: Path, tokenizer: Any, time: int) -> tuple[list[Tensor], tuple[int, ...], tuple[int, ...]]:
    """Rows of exactly `time` tokens and what stands around them."""
    empty = tokenizer("")["input_ids"]
    before, after = tuple(empty[:len(empty) // 2]), tuple(empty[len(empty) // 2:])
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        ids = tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
        if len(ids) >= time:
            rows.append(torch.tensor([*before, *ids[:time], *after]))
    return rows, before, after


def tune(tuned: Any, rows: Sequence[Tensor], steps: int, causal: bool) -> None:
    """A few steps of the prefix."""
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], 1e-2)
    for step in range(steps):
        ids = torch.stack([rows[(8 * step + offset) % len(rows)] for offset in range(8)])
        loss = tuned(input_ids=ids, labels=ids if causal else torch.arange(8) % 2).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def cases(hidden: Tensor, width: int) -> list[tuple[str, tuple[Any, ...]]]:
    scale = float(hidden.pow(2).mean(0).mean().sqrt()) if len(hidden) else 1.0
    norm = float(hidden.norm(dim=1).quantile(0.99))
    gaussian = [(f"gaussian {level} rms", (Gaussian(norm=norm, sigma=level * scale),)) for level in NOISE]
    return [("none", ()), *gaussian, ("dx-privacy 4.0 rms", (DxPrivacy(eta=width**0.5 / (4 * scale)),))]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=("smollm2", "minilm"), default="smollm2")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cut", type=int, default=2)
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--public", type=int, default=600)
    parser.add_argument("--time", type=int, default=20)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    began, causal = time.time(), options.model == "smollm2"
    loaded = (load_model("bundled:smollm2-135m-instruct", task="causal-lm", dtype=torch.float32) if causal else
              load_model("bundled:minilm", task="sequence-classification", labels=["no", "yes"], dtype=torch.float32))
    blocks = loaded.model.model.layers if causal else loaded.model.bert.encoder.layer
    block = blocks[options.cut - 1]
    table = loaded.model.get_input_embeddings().weight
    tuned = deltaloom.attach(loaded.model, [deltaloom.Prefix(length=8, layers=tuple(range(options.cut)))])
    cut = Cut(tuned, block)
    rows, before, after = texts(options.data / "rated.movies.jsonl", loaded.tokenizer, options.time)
    own, public, secret = rows[:200], rows[200:200 + options.public], rows[-options.rows:]
    tune(tuned, own, 20, causal)
    seen = torch.unique(torch.cat(public)).tolist()
    planted, canaries = plant(secret, vocabulary=[v for v in seen if v not in (*before, *after)], length=4, every=3,
                              edges=(len(before), len(after)))
    hidden = cut.front(torch.stack(planted), True)
    victim = Victim(tuple(planted), tuple(torch.unbind(hidden)), tuple(canaries))

    def prior(ids: Tensor) -> Tensor:
        return cut.logits(ids, prefix=False)[:, -1].log_softmax(1)

    words = torch.unique(torch.cat(rows))
    knowledge = {name: Knowledge(lambda ids, known=known: cut.front(ids, known), table, public, causal=causal, before=before,
                                 after=after, prior=prior if causal else None, tokens=words)
                 for name, known in (("with prefix", True), ("without prefix", False))}
    attacks: list[TokenAttack] = [NearestEmbedding(), ProbeTable(), LinearProbe(), Inverter(epochs=10),
                                  SequentialMatching(candidates=options.candidates),
                                  SequentialPrior(candidates=options.candidates)]
    inner = torch.cat([row[1 if causal and not before else len(before):] for row in knowledge["with prefix"].hidden])
    lines = []
    for name, guards in cases(inner, hidden.shape[-1]):
        chain = Chain(guards, new_key())
        accuracy = None
        if causal:
            ids = torch.stack(public[:40])
            logits = cut.logits(ids, lambda x, chain=chain: guarded(chain, x))
            accuracy = 100 * float((logits[:, :-1].argmax(2) == ids[:, 1:]).float().mean())
        leak = measure([Case(name, guards, accuracy)], knowledge, victim, attacks)
        cost = chain.cost()
        for line in leak.table:
            lines.append({**line.__dict__, "accuracy": accuracy, "mu": cost.mu, "eta": cost.eta})
            print(f"{name:20s} {line.attack:20s} {line.knows:15s} top1 {line.top1:.3f} top5 {line.top5:.3f} "
                  f"texts {line.texts:.2f} canaries {line.canaries:.2f} "
                  f"majority {line.majority:.3f} accuracy {accuracy or 0:.1f} mu {cost.mu:.1f} "
                  f"[{time.time() - began:.0f} s]", flush=True)
    if options.output:
        facts = {"model": options.model, "cut": options.cut, "tokens": options.rows * options.time, "public": len(public),
                 "seconds": time.time() - began, "table": lines}
        options.output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def guarded(chain: Chain, hidden: Tensor) -> Tensor:
    from deltaloom.private.messages import GuardContext, Key
    return chain.outgoing(hidden, GuardContext("hidden", "evaluation", Key(1, 0)))


if __name__ == "__main__":
    main()
