"""The progress of a run for a person at a terminal: one live line there, plain lines elsewhere; everything goes to stderr."""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from deltaloom import events
from deltaloom.report import text
from deltaloom.report.text import Smoother

_RECENT = 50  # steps that speed, padding and time left are averaged over


class TerminalProgress:
    """A sink that shows the run: a context manager, so that the live line is gone and counts are told whatever happens.

    On a terminal (and not TERM=dumb) one line is redrawn; elsewhere a plain line comes every `every_seconds`, or every
    `every_steps` steps if given. Evaluations are printed when they come, a warning's first message at once and its later
    ones as a count at the end. NO_COLOR is respected.
    """

    def __init__(self, stream: TextIO | None = None, *, every_seconds: float = 5.0, every_steps: int | None = None,
                 width: int | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        stream = stream or sys.stderr
        interactive = stream.isatty()
        self.console = Console(file=stream, force_terminal=interactive, highlight=False, markup=False, emoji=False, width=width,
                               soft_wrap=not interactive)
        self.every_seconds, self.every_steps, self._clock = every_seconds, every_steps, clock
        self._live: Live | None = None
        self._interactive = interactive and not self.console.is_dumb_terminal
        self._loss = Smoother()
        self._recent: deque[events.Step] = deque(maxlen=_RECENT)
        self._total: int | None = None
        self._printed_at: float | None = None
        self._printed_step: int | None = None
        self._warned: Counter[str] = Counter()
        self._told: Counter[str] = Counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __call__(self, event: events.Event) -> None:
        """Show one event; kinds that have no line of their own are left to the report."""
        if isinstance(event, events.Step):
            self._step(event)
        elif isinstance(event, events.Started):
            self._started(event)
        elif isinstance(event, events.Evaluated):
            metrics = ", ".join(f"{name} {text.measured(value)}" for name, value in event.metrics.items())
            self._say(f"evaluation at step {event.step:,}: {metrics or 'no metrics'}{' (best so far)' if event.best else ''}")
        elif isinstance(event, events.Warned):
            self._warn(event)
        elif isinstance(event, events.Acted):
            self._say(f"step {event.step:,}: {event.action}: {event.reason}")
        elif isinstance(event, events.Finished):
            self._finished(event)

    def close(self) -> None:
        """Remove the live line and tell how often each kind of warning came; may be called several times."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        for kind, number in self._warned.items():
            if number > self._told[kind]:
                self._say(f"warning: {kind}: {number:,} in all", "yellow")
        self._told = Counter(self._warned)

    def line(self, width: int | None = None) -> str:
        """The progress as one line: what does not fit into `width` columns is left out, the least needed first."""
        kept = self._parts() if self._recent else []
        while width is not None and len(kept) > 1 and len("  ".join(part for _, part in kept)) > width:
            least = max(kept, key=lambda part: part[0])
            kept = [part for part in kept if part is not least]
        return "  ".join(part for _, part in kept)

    def _parts(self) -> list[tuple[int, str]]:
        """Pieces of the line in reading order, each with its rank of need (0: never left out)."""
        last = self._recent[-1]
        seconds = sum(step.seconds for step in self._recent)
        tokens = sum(step.tokens for step in self._recent)
        padding = sum(step.padding for step in self._recent) / len(self._recent)
        parts = [(0, f"step {last.step:,}" + (f"/{self._total:,}" if self._total is not None else "")),
                 (1, f"loss {text.measured(self._loss.value)}"), (4, f"lr {text.figure(last.learning_rate)}")]
        if seconds > 0:
            parts.append((3, f"{text.figure(tokens / seconds)} tok/s"))
        parts.append((5, f"pad {text.share(padding)}"))
        if last.floor_share is not None:
            parts.append((6, f"floor {text.share(last.floor_share)}"))
        if last.memory_bytes:
            parts.append((7, text.byte_size(last.memory_bytes)))
        if self._total is not None and self._total >= last.step:
            parts.append((2, f"{text.duration(seconds / len(self._recent) * (self._total - last.step))} left"))
        return parts

    def _started(self, event: events.Started) -> None:
        self._total = event.total_steps
        self._recent.clear()
        begun = f"going on at step {event.step:,}" if event.step else "training"
        plan = f" for {event.total_steps:,} steps" if event.total_steps is not None else ""
        share = event.trainable_parameters / event.total_parameters if event.total_parameters else None
        self._say(f"{begun}{plan}: {event.trainable_parameters:,} of {event.total_parameters:,} parameters ({text.share(share)})")

    def _step(self, event: events.Step) -> None:
        self._loss(event.loss)
        self._recent.append(event)
        if self._interactive:
            if self._live is None:
                self._live = Live(console=self.console, transient=True, auto_refresh=False, redirect_stdout=False,
                                  redirect_stderr=False)
                self._live.start()
            if self._printed_at is None or self._clock() - self._printed_at >= 0.1 or event.step == self._total:
                self._printed_at = self._clock()
                self._live.update(self._drawn(event), refresh=True)
        elif self._due(event.step):
            self._printed_at, self._printed_step = self._clock(), event.step
            self._say(self.line())

    def _due(self, step: int) -> bool:
        if self._printed_at is None or step == self._total:
            return True
        if self.every_steps is not None:
            return step - (self._printed_step or 0) >= self.every_steps
        return self._clock() - self._printed_at >= self.every_seconds

    def _drawn(self, event: events.Step) -> Text | Table:
        width = self.console.width - 1
        if self._total is None or width < 60:
            return Text(self.line(width), no_wrap=True, overflow="ellipsis")
        bar = 16 if width < 110 else 24
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_column(width=bar)
        grid.add_column(no_wrap=True, overflow="ellipsis")
        grid.add_row(ProgressBar(total=max(1, self._total), completed=event.step, width=bar), Text(self.line(width - bar - 1)))
        return grid

    def _warn(self, event: events.Warned) -> None:
        if event.kind not in self._warned:
            self._told[event.kind] = max(1, event.count)
            times = f" ({event.count:,} times)" if event.count > 1 else ""
            self._say(f"warning: {event.kind}: {event.message}{times}", "yellow")
        self._warned[event.kind] += max(1, event.count)

    def _finished(self, event: events.Finished) -> None:
        self.close()
        took = f"{text.duration(event.seconds)}, {event.tokens:,} tokens"
        speed = f", {text.figure(event.tokens / event.seconds)} tok/s" if event.seconds > 0 else ""
        self._say(f"ended at step {event.step:,} ({event.reason}): {took}{speed}")

    def _say(self, line: str, style: str = "") -> None:
        self.console.print(Text(text.printable(line).replace("\n", " "), style=style))
