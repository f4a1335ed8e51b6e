"""What reaches the layers on calibration rows, block by block, each block seeing what the compressed ones before it made.

Bounded memory: the sums of one block's layers (or of `span` blocks), and one hidden state for each calibration batch. The
model's own forward runs each time, with the finished blocks answering from memory and a stop behind the block in question,
so that masks, positions and what encoder and decoder exchange are the model's business and no family needs code here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaloom.attention import Segments
from deltaloom.data.batches import Batch
from deltaloom.data.encode import IGNORED
from deltaloom.errors import NonFiniteError, RefusedError, SettingsError
from deltaloom.sites import Site, family_of


@dataclass
class Inputs:
    """Sums over the real tokens that reached a layer; layers that read one tensor share one of these."""

    squares: Tensor                # (d_in,) float64, sums of x_j^2
    gram: Tensor | None = None     # (d_in, d_in) float64, sum of x x^T; None where it was not asked for
    tokens: int = 0

    def add(self, rows: Tensor) -> None:
        """Count rows (n, d_in). Products of a batch in float32 (float64 inputs: in float64), sums in float64."""
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if self.gram is None:
            self.squares += rows.square().sum(0, dtype=torch.float64)
        else:
            self.gram += (rows.T @ rows).double()
            self.squares = self.gram.diagonal()
        self.tokens += len(rows)

    def product(self) -> Tensor:
        """The Gram matrix.

        Raises:
            RefusedError: it was not asked for.
        """
        if self.gram is None:
            raise RefusedError("calibration was asked for norms of inputs, not for their products")
        return self.gram


def calibrated(model: PreTrainedModel, batches: Sequence[Batch], sites: Sequence[Site], *, gram: bool,
               span: int = 1) -> Iterator[dict[str, Inputs]]:
    """For each `span` blocks in the order in which they run: their sites' paths with what reached them.

    Whoever iterates may replace or change these layers before asking for the next blocks, which then see the change.

    Raises:
        SettingsError: no calibration rows. RefusedError: a layer gets inputs of which padding cannot be told, or none.
        NonFiniteError: inputs that are no finite numbers.
    """
    if not batches:
        raise SettingsError("this needs calibration rows, and there are none", hint="Give a file of rows that are like yours.")
    run = _Run(model, batches, {f"{site.stack}.{site.layer}" for site in sites})
    was_training = model.training
    model.eval()
    try:
        done = 0
        for first, last in _spans(run.order, sites, span):
            inside = [site for site in sites if f"{site.stack}.{site.layer}" in run.order[first:last + 1]]
            counter = _Counter(model, inside, gram)
            run.go(done, first, last, counter)
            done = first
            yield counter.result()
    finally:
        model.train(was_training)


def _spans(order: Sequence[str], sites: Sequence[Site], span: int) -> list[tuple[int, int]]:
    """First and last index of each `span` blocks, of one stack, that have sites."""
    wanted = {f"{site.stack}.{site.layer}": site.stack for site in sites}
    places = [(index, wanted[path]) for index, path in enumerate(order) if path in wanted]
    spans: list[list[tuple[int, str]]] = []
    for place in places:
        if spans and len(spans[-1]) < span and spans[-1][-1][1] == place[1]:
            spans[-1].append(place)
        else:
            spans.append([place])
    return [(each[0][0], each[-1][0]) for each in spans]


# ---- running the model block by block -----------------------------------------------------------------------------------


class _Stop(Exception):
    """The block in question has run; nothing behind it is needed."""


@dataclass
class _Run:
    """The model's blocks in the order in which they run, and what the last finished block of each stack put out."""

    model: PreTrainedModel
    batches: Sequence[Batch]
    needed: set[str]
    order: list[str] = field(default_factory=list)
    saved: dict[str, dict[int, Any]] = field(default_factory=dict)  # stack -> batch -> output
    once: bool = True  # each block runs once; where one runs several times nothing is answered from memory

    def __post_init__(self) -> None:
        paths = {path for path, _ in self.model.named_modules() if self._is_block(path)}
        calls: list[str] = []
        with ExitStack() as stack:
            for path in sorted(paths):
                hook = self.model.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: calls.append(path))
                stack.callback(hook.remove)
            with _evaluating(self.model):
                self._forward(self.batches[0])
        self.order, self.once = list(dict.fromkeys(calls)), len(set(calls)) == len(calls)
        missing = self.needed - set(self.order)
        if missing:
            raise RefusedError("blocks with targets do not run on the calibration rows", got=", ".join(sorted(missing)[:4]),
                               hint="Leave them out of the targets.")

    def _is_block(self, path: str) -> bool:
        stack, _, number = path.rpartition(".")
        return number.isdigit() and any(stack == needed.rpartition(".")[0] for needed in self.needed)

    def go(self, done: int, first: int, last: int, counter: _Counter) -> None:
        """Run all batches through the blocks up to `last`, counting in `first` to `last`; those before `done` are finished."""
        finished = self.order[:done] if self.once else []
        current = [0]
        with ExitStack() as stack:
            for path in finished:
                stack.enter_context(_answering(self.model.get_submodule(path), self.saved[path.rpartition(".")[0]], current))
            for path in self.order[done:first] if self.once else []:
                kept = self.saved.setdefault(path.rpartition(".")[0], {})
                stack.callback(self.model.get_submodule(path).register_forward_hook(_keeping(kept, current)).remove)
            for hook in counter.hooks():
                stack.callback(hook.remove)
            if self.once:
                stack.callback(self.model.get_submodule(self.order[last]).register_forward_hook(_stop).remove)
            stack.enter_context(_evaluating(self.model))
            for index, batch in enumerate(self.batches):
                current[0] = index
                counter.start(batch)
                try:
                    self._forward(batch)
                except _Stop:
                    continue

    def _forward(self, batch: Batch) -> None:
        options = {"use_cache": False} if self.model.can_generate() else {}
        self.model.base_model(**batch.to(self.model.device).inputs, **options)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@contextmanager
def _answering(block: nn.Module, saved: dict[int, Any], current: list[int]) -> Iterator[None]:
    """The block returns what its stack's last finished block returned, without computing anything."""
    before = block.__dict__.get("forward")
    block.__dict__["forward"] = lambda *_, **__: saved[current[0]]
    try:
        yield
    finally:
        if before is None:
            del block.__dict__["forward"]
        else:
            block.__dict__["forward"] = before


def _keeping(kept: dict[int, Any], current: list[int]) -> Callable[[nn.Module, Any, Any], None]:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        kept[current[0]] = output
    return keep


def _stop(module: nn.Module, args: Any, output: Any) -> None:
    raise _Stop


# ---- counting -----------------------------------------------------------------------------------------------------------


class _Counter:
    """Sums of the inputs of layers; those that read the very same tensor are counted once."""

    def __init__(self, model: PreTrainedModel, sites: Sequence[Site], gram: bool) -> None:
        self._model, self._gram = model, gram
        self._layers = {site.path: model.get_submodule(site.path) for site in sites}
        self._from_encoder = _reading_the_encoder(model, sites)
        self._owner: dict[str, str] = {}
        self._sums: dict[str, Inputs] = {}
        self._masks: tuple[Tensor | None, Tensor | None] = (None, None)
        self._seen: list[tuple[Tensor, str]] = []  # keeps the tensors, so that no other takes their identity

    def start(self, batch: Batch) -> None:
        """A new batch: which of its tokens are real, for the encoder's states (or the only ones) and the decoder's."""
        self._masks, self._seen = _real_tokens(batch, self._model), []

    def hooks(self) -> list[Any]:
        """Counting hooks on all layers."""
        return [layer.register_forward_pre_hook(lambda _, args, path=path: self._count(path, args[0]))
                for path, layer in self._layers.items()]

    def result(self) -> dict[str, Inputs]:
        """The sums by path.

        Raises:
            RefusedError: layers that no token reached. NonFiniteError: sums that are no finite numbers.
        """
        idle = [path for path in self._layers if path not in self._owner or not self._sums[self._owner[path]].tokens]
        if idle:
            raise RefusedError("no token of the calibration rows reaches these layers", problems=idle[:8],
                               hint="Give more rows, or leave the layers out of the targets.")
        bad = [path for path, sums in self._sums.items() if not sums.squares.isfinite().all()]
        if bad:
            raise NonFiniteError("the inputs of layers are no finite numbers", got=", ".join(bad[:4]),
                                 hint="Load the model in bf16 or fp32: fp16 overflows.")
        return {path: self._sums[self._owner[path]] for path in self._layers}

    def _count(self, path: str, x: Tensor) -> None:
        first = next((name for tensor, name in self._seen if tensor is x), path)
        owner = self._owner.setdefault(path, first)
        if owner != path and owner == first:
            return  # the same tensor has been counted
        if owner != first:
            raise RefusedError("layers read one tensor for some rows and different ones for others", got=f"{owner}, {path}",
                               hint="Leave one of them out of the targets.")
        self._seen.append((x, path))
        encoder, decoder = self._masks
        rows = _rows(x, encoder if path in self._from_encoder else decoder, path)
        if path not in self._sums:
            zeros = torch.zeros(x.shape[-1], dtype=torch.float64, device=x.device)
            square = zeros.new_zeros(len(zeros), len(zeros)) if self._gram else None
            self._sums[path] = Inputs(zeros, square)
        self._sums[path].add(rows)


def _real_tokens(batch: Batch, model: PreTrainedModel) -> tuple[Tensor | None, Tensor | None]:
    """Masks (rows, time) of the real tokens of the encoder's states and of the decoder's; None: all are real."""
    device = model.device
    if "input_ids" not in batch.inputs or isinstance(batch.inputs.get("segments"), Segments):
        return None, None
    ids = batch.inputs["input_ids"]
    given = batch.inputs.get("attention_mask")
    if given is None:
        given = torch.arange(ids.shape[1])[None, :] < batch.lengths.cpu()[:, None]
    mask = given.to(device).bool()
    if not model.config.is_encoder_decoder:
        return mask, mask
    return mask, None if batch.labels is None else (batch.labels != IGNORED).to(device)


def _reading_the_encoder(model: PreTrainedModel, sites: Sequence[Site]) -> set[str]:
    """Paths of the layers whose inputs are the encoder's states: its own, and keys and values of cross-attention."""
    if not model.config.is_encoder_decoder:
        return set()
    family = family_of(model)
    crossing = family.branches.get("cross_attention") if family is not None else None
    if crossing is None:
        raise RefusedError("which layers of this encoder-decoder read the encoder is not known", got=model.config.model_type,
                           hint="A row in deltaloom/architectures.py says it.")
    module = crossing[0].rpartition(".")[0]
    found = set()
    for site in sites:
        inside = site.path.removeprefix(f"{site.stack}.{site.layer}.").rpartition(".")[0]
        crosses = fnmatchcase(inside, module) and site.role in ("k", "v")
        if crosses or not any("decoder" in part for part in site.stack.split(".")):
            found.add(site.path)
    return found


def _rows(x: Tensor, mask: Tensor | None, path: str) -> Tensor:
    """The inputs (n, d_in) of real tokens."""
    if mask is None or bool(mask.all()):
        return x.reshape(-1, x.shape[-1])
    if x.shape[:-1] == mask.shape:
        return x[mask]
    if x.ndim == 2 and len(x) == mask.numel():
        return x[mask.flatten()]
    raise RefusedError("padding cannot be told from tokens in the inputs of a layer", got=f"{path}: {tuple(x.shape)}",
                       legal=f"{tuple(mask.shape)} in front of the width",
                       hint="Calibrate with rows of one length, or leave the layer out of the targets.")
