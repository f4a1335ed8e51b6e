"""How much the layers of a model share over depth: their weight gradients at the start, their increments after training.

For a group of n layers with matrices G_1..G_n (d_out, d_in), each divided by its Frobenius norm:

    rho      = largest eigenvalue of the Gram matrix <G_i, G_j> over its trace; 1/n for uncorrelated layers, 1 for equal ones
    cosine   = mean |<G_i, G_j>| over i != j
    input k  = mean over layers of the energy |G_i P|^2 inside ONE subspace of k input dimensions, the best one: the sum of
               the k largest eigenvalues of sum_i G_i^T G_i, over n;  output k likewise with G_i G_i^T
    own k    = the same with a subspace for each layer (its largest singular directions): the most that is possible
    chance k = of input or output, with the same singular values but independent random directions: what a few layers of low
               rank have in any case
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deltaloom
from deltaloom.compact.face import affine_weight
from deltaloom.deltas.base import method_from
from deltaloom.jobs.estimate import block_linears
from deltaloom.jobs.prepare import Prepared, parse_parts, prepare
from deltaloom.jobs.runfile import parse_run
from deltaloom.sites import Site, all_sites
from deltaloom.train.feed import ExampleFeed
from deltaloom.train.modes import training_mode
from deltaloom.tuned import Tuned, attach
from evidence.catalogue import MODELS, deltas_of
from evidence.runs import Spec, run_file, silence

SIZES = (8, 16, 32)
GRADIENT_ROWS = 256
TRAINED: dict[str, dict[str, Any]] = {  # what increments are taken of: its deltas (None: of the catalogue) and its rate
    "lora small": {"candidate": "lora", "budget": "small", "rate": {"sst2": 3e-3, "e2e": 6e-3}},
    "full": {"deltas": [{"method": "full"}], "rate": {"sst2": 1e-4, "e2e": 1e-4}}}


def depth_records(task: str, data: Path, limit: int | None) -> list[dict[str, Any]]:
    """One record a source: gradients, and the increments of each trained delta."""
    records = [{"depth": task, "source": "gradients", "limit": limit, "groups": measured(weight_gradients(task, data, limit))}]
    for name in TRAINED:
        records.append({"depth": task, "source": f"increments of {name}", "limit": limit,
                        "groups": measured(increments(task, name, data, limit))})
    return records


def weight_gradients(task: str, data: Path, limit: int | None) -> dict[Site, Tensor]:
    """The gradient of the mean loss over the first training rows for every block linear, dropout off."""
    prepared = prepared_task(task, data, limit or GRADIENT_ROWS)
    model = prepared.loaded.model
    sites = block_linears(all_sites(model))
    tuned = attach(model, [method_from({"method": "full", "targets": [site.path for site in sites]})])
    feed = ExampleFeed(prepared.examples, prepared.task.collate, prepared.parts.train)
    counted = 0.0
    with training_mode(tuned, False):
        for step in feed.steps(0):
            for micro in step:
                loss, count = prepared.task.loss(tuned, feed.batch(micro, torch.device("cpu")))
                loss.backward()
                counted += float(count)
    found = {site: delta.get_parameter("weight").grad for site, delta in tuned.pairs()}
    return {site: gradient / counted for site, gradient in found.items() if gradient is not None}


def increments(task: str, name: str, data: Path, limit: int | None) -> dict[Site, Tensor]:
    """What training added to every block linear: the folded weight less the frozen one, from the saved delta."""
    choice = TRAINED[name]
    deltas = choice.get("deltas") or deltas_of(choice["candidate"], choice["budget"], task)
    spec = Spec(task, "held", name, choice.get("budget", ""), deltas, choice["rate"][task], 0, limit)
    source, kind = MODELS[task]
    with tempfile.TemporaryDirectory() as place:
        with silence():
            deltaloom.tune(run_file(spec, data, Path(place)), overwrite=True)
        labels = ["negative", "positive"] if task == "sst2" else None
        tuned = deltaloom.load(deltaloom.load_model(source, task=kind, labels=labels, dtype=torch.bfloat16).model,
                               Path(place) / "run")
    return added(tuned)


def added(tuned: Tuned) -> dict[Site, Tensor]:
    """The increment of every block linear that carries a delta; several deltas of one site add up in their order."""
    with tuned.bare() as model:
        weights = {site.path: affine_weight(model.get_submodule(site.path)).detach().float()
                   for site in block_linears(all_sites(model))}
    changed: dict[Site, Tensor] = {}
    for site, delta in tuned.pairs():
        if site.path in weights and site.part is None:
            before = changed[site] + weights[site.path] if site in changed else weights[site.path]
            with torch.no_grad():
                changed[site] = delta.fold(before, None)[0] - weights[site.path]
    return changed


def prepared_task(task: str, data: Path, rows: int) -> Prepared:
    """Model and encoded rows as the main job has them."""
    with tempfile.TemporaryDirectory() as place:
        run = parse_run(run_file(Spec(task, "dev", "", "", [{"method": "full"}], 1e-3, 0, rows), data, Path(place)),
                        base=Path.cwd())
        return prepare(run, parse_parts(run), say=lambda line: None)


# ---- the figures ----------------------------------------------------------------------------------------------------

def measured(matrices: Mapping[Site, Tensor]) -> list[dict[str, Any]]:
    """The figures of every group: sites of one shape and role."""
    groups: dict[tuple[str, int, int], list[Tensor]] = defaultdict(list)
    for site, matrix in matrices.items():
        groups[(site.role, site.d_out, site.d_in)].append(matrix)
    return [{"group": role, "d_out": d_out, "d_in": d_in, **group_figures(torch.stack(parts))}
            for (role, d_out, d_in), parts in groups.items()]


def group_figures(stack: Tensor) -> dict[str, Any]:
    """The figures of one group, stack (n, d_out, d_in); layers that did not change are left out and counted."""
    norms = torch.linalg.matrix_norm(stack)
    kept = stack[norms > 0] / norms[norms > 0, None, None]
    count = len(kept)
    if count == 0:
        return {"layers": 0, "unchanged": len(stack)}
    flat = kept.flatten(1).double()
    gram = flat @ flat.T
    raw = gram * torch.outer(norms[norms > 0], norms[norms > 0]).double()
    off = gram.abs().sum() - gram.diagonal().abs().sum()
    figures: dict[str, Any] = {
        "layers": count, "unchanged": len(stack) - count, "rho": share_of_largest(gram), "rho_weighted": share_of_largest(raw),
        "cosine": float(off / (count * (count - 1))) if count > 1 else None}
    own = torch.linalg.svdvals(kept).square()  # (n, least of both dimensions)
    for side, common in (("input", torch.einsum("noi,noj->ij", kept, kept)), ("output", torch.einsum("noi,npi->op", kept, kept))):
        energies = torch.linalg.eigvalsh(common.double()).flip(0)
        figures[side] = {str(size): float(energies[:size].sum() / count) for size in SIZES}
        figures[f"{side}_chance"] = by_chance(own, stack.shape[2 if side == "input" else 1])
    figures["own"] = {str(size): float(own[:, :size].sum(1).mean()) for size in SIZES}
    return figures


def by_chance(own: Tensor, width: int) -> dict[str, float]:
    """Energy inside one common subspace when each layer, own (n, r) squared singular values, has random directions."""
    generator = torch.Generator().manual_seed(0)
    common = torch.zeros(width, width)
    for values in own:
        basis = torch.linalg.qr(torch.randn(width, own.shape[1], generator=generator))[0]
        common += (basis * values) @ basis.T
    energies = torch.linalg.eigvalsh(common.double()).flip(0)
    return {str(size): float(energies[:size].sum() / len(own)) for size in SIZES}


def share_of_largest(gram: Tensor) -> float:
    """The largest eigenvalue over the trace."""
    return float(torch.linalg.eigvalsh(gram)[-1] / gram.trace())
