"""A sink that writes the run's scalars for TensorBoard; only made when asked for, and only then tensorboard is imported."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

from deltaloom import events
from deltaloom.errors import UsageError

_STEP_SCALARS = ("loss", "penalty", "learning_rate", "gradient_norm", "padding", "memory_bytes", "floor_share")


class TensorBoard:
    """Writes `train/...`, `eval/...`, `rank/...` (a group's total rank) and `kept/...` scalars into `folder`.

    Uses tensorboard's own writer, not torch's, so that the report stays free of torch.

    Raises:
        UsageError: tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise UsageError("log.tensorboard is on and tensorboard is not installed", got=str(error),
                             hint="Install it with `pip install 'deltaloom[tensorboard]'`, or set it to false.") from error
        folder.mkdir(parents=True, exist_ok=True)
        self._event: Any = event_pb2.Event
        self._summary: Any = summary_pb2.Summary
        self._writer: Any = EventFileWriter(str(folder))
        self._open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __call__(self, event: events.Event) -> None:
        """Write the scalars of a step, an evaluation or a rank change; other events have none."""
        if isinstance(event, events.Step):
            scalars = {f"train/{name}": value for name in _STEP_SCALARS if (value := getattr(event, name)) is not None}
            if event.seconds > 0:
                scalars["train/tokens_per_second"] = event.tokens / event.seconds
            self._write(event.step, event.time, scalars)
        elif isinstance(event, events.Evaluated):
            self._write(event.step, event.time, {f"eval/{name}": value for name, value in event.metrics.items()})
        elif isinstance(event, events.RankChanged):
            scalars = {f"rank/{name}": float(sum(ranks)) for name, ranks in event.ranks.items()}
            scalars |= {"kept/parameters": event.parameters, "kept/budget": event.budget, "kept/residual": event.residual}
            self._write(event.step, event.time, scalars)

    def close(self) -> None:
        """Write everything out; may be called several times."""
        if self._open:
            self._open = False
            self._writer.close()

    def _write(self, step: int, time: float, scalars: dict[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=float(value)) for name, value in scalars.items()]
        self._writer.add_event(self._event(step=step, wall_time=time, summary=self._summary(value=values)))
