"""Going on from a checkpoint: only as the same run."""

from __future__ import annotations

from collections.abc import Mapping

from deltaloom.errors import CheckpointError
from deltaloom.events import Acted, Emitter
from deltaloom.train.checkpoints import Checkpoint
from deltaloom.train.progress import Progress
from deltaloom.train.settings import FREE_TO_CHANGE, TrainSettings


def check_same(checkpoint: Checkpoint, settings: TrainSettings, identity: Mapping[str, str]) -> None:
    """Refuse another run's checkpoint.

    Raises:
        CheckpointError: settings that decide what is trained differ, or the identity does; every difference is named.
    """
    saved, now = checkpoint.parts["settings"], settings.as_dict()
    keys = [key for key in now if key not in FREE_TO_CHANGE and saved.get(key) != now[key]]
    problems = [f"train.{key}: {saved.get(key)!r} in the checkpoint, {now[key]!r} now" for key in keys]
    known = checkpoint.parts["identity"]
    problems += [f"{key}: {known.get(key)!r} in the checkpoint, {identity.get(key)!r} now"
                 for key in sorted({*known, *identity}) if known.get(key) != identity.get(key)]
    if problems:
        raise CheckpointError("the checkpoint is of another run", got=str(checkpoint.path), problems=problems,
                              hint="Resume with what the run began with, or start anew with --overwrite.")


def resumed_progress(checkpoint: Checkpoint, settings: TrainSettings, emit: Emitter) -> Progress:
    """The checkpoint's progress; where time alone limits the run and was changed, its steps change in proportion."""
    progress = Progress(**checkpoint.parts["progress"])
    before = TrainSettings(**checkpoint.parts["settings"]).time_limit
    limit = settings.time_limit
    alone = settings.max_steps is None and settings.epochs is None
    if alone and before and limit and before != limit:
        progress.total_steps = max(progress.step, round(progress.total_steps * limit / before))
        reason = f"max_time is now {settings.max_time}: {progress.total_steps} steps"
        emit(Acted(step=progress.step, action="planned", reason=reason))
    return progress
