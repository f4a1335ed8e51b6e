"""The six bars of a finished private tuning: what each step was worth, measured by whoever has model, emulator and all rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from deltaloom import attention
from deltaloom.checkpoint import native
from deltaloom.data.encode import Example
from deltaloom.data.read import Rows, read_rows
from deltaloom.data.settings import DataSettings
from deltaloom.evaluate.base import Task
from deltaloom.jobs.prepare import Parts, head_methods
from deltaloom.models import load_model
from deltaloom.private.bars import check_emulator
from deltaloom.private.means.base import Weighed
from deltaloom.private.means.weighted import Weighted
from deltaloom.train.feed import ExampleFeed
from deltaloom.train.loop import train
from deltaloom.train.settings import TrainSettings
from deltaloom.tuned import SavedDelta, Tuned, attach, restore

Scores = dict[str, float]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Parties:
    """What the parties left: the delta that each tuned on the emulator, and its rows; all in the clear, for comparison only."""

    emulated: Mapping[str, Path]
    rows: Mapping[str, Path]


def bars(model: str, emulator: str, parts: Parts, parties: Parties, held: Path, central: TrainSettings, *, cut: int, seed: int,
         split_tuned: Scores, say: Say) -> dict[str, Scores]:
    """The bars by name; `split_tuned` is what the parties measured over the cut.

    Raises:
        RefusedError: the emulator's front is not the model's.
    """
    kind = parts.task
    settings = parts.data
    own = {name: _read(path, settings, kind) for name, path in parties.rows.items()}
    scored = _read(held, settings, kind)
    targets = kind.prepare(settings, [row for rows in own.values() for row in rows.rows], scored.rows)
    names = list(targets.labels.names) if targets.labels else None
    small = load_model(emulator, task=kind.name, labels=names)
    task = kind(settings, targets, small.model.config, tokenizer=small.tokenizer)
    examples = task.encode(scored.rows)
    found: dict[str, Scores] = {}

    def note(name: str, model: nn.Module) -> Scores:
        scores = task.metrics(task.predict_all(model, examples), scored.rows)
        say(f"  {name}: " + ", ".join(f"{key} {value:.4g}" for key, value in scores.items()))
        return scores

    attention.install(small.model)
    mean = joined({name: native.read(path)[0] for name, path in parties.emulated.items()},
                  {name: len(rows) for name, rows in own.items()})
    whole = load_model(model, task=kind.name, labels=names, dtype=small.model.dtype)
    check_emulator(whole.model, small.model, cut)
    attention.install(whole.model)
    found["base"] = note("base", whole.model)
    found["emulator"] = note("emulator", small.model)
    found["emulator_tuned"] = note("emulator_tuned", restore(small.model, mean))
    tuned = restore(whole.model, mean)
    found["plugged_in"] = note("plugged_in", tuned)
    found["split_tuned"] = split_tuned
    everything = [example for rows in own.values() for example in task.encode(rows.rows)]
    _train(tuned, task, everything, central, seed)
    found["central_front"] = note("central_front", tuned)
    tuned.detach()
    tuned = attach(whole.model, parts.methods, heads=head_methods(whole, parts.methods), tokenizer=whole.tokenizer, seed=seed)
    _train(tuned, task, everything, central, seed)
    found["central"] = note("central", tuned)
    tuned.detach()
    return found


def joined(deltas: Mapping[str, SavedDelta], rows: Mapping[str, int]) -> SavedDelta:
    """The mean of the parties' deltas by rows, as the first round makes it."""
    updates = [Weighed({key: tensor.double() for key, tensor in deltas[name].state.items()}, rows[name])
               for name in sorted(deltas)]
    first = next(iter(deltas.values()))
    mean = Weighted().combine(updates)
    state: dict[str, Tensor] = {key: mean[key].to(tensor.dtype) for key, tensor in first.state.items()}
    return replace(first, state=state)


def _read(path: Path, settings: DataSettings, kind: type[Task]) -> Rows:
    return read_rows([str(path)], settings, Path.cwd(), accepts=kind.formats, numbers=kind.numbers)


def _train(tuned: Tuned, task: Task, examples: Sequence[Example], settings: TrainSettings, seed: int) -> None:
    feed = ExampleFeed(examples, task.pack if settings.packing else task.collate, settings, seed=seed)
    train(tuned, task, feed, settings=settings, seed=seed)
