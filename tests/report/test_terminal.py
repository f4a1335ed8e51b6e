import io
import re

import pytest

from deltaloom import events
from deltaloom.report.terminal import TerminalProgress

from .folders import run_events


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def step(number, loss=1.0, **values):
    return events.Step(
        **{
            "step": number,
            "epoch": 0.0,
            "loss": loss,
            "penalty": 0.0,
            "learning_rate": 1e-3,
            "gradient_norm": 1.0,
            "tokens": 100,
            "padding": 0.1,
            "seconds": 0.5,
            **values,
        }
    )


def started(total=10):
    return events.Started(step=0, total_steps=total, trainable_parameters=1, total_parameters=100)


def lines_of(happened, **options):
    stream = io.StringIO()
    with TerminalProgress(stream, **options) as sink:
        for event in happened:
            sink(event)
    return stream.getvalue().splitlines()


def test_plain_lines_tell_all_and_hold_no_escapes():
    lines = lines_of([started(), step(1, floor_share=0.6, memory_bytes=2_400_000), step(10)], every_steps=100)
    assert lines == [
        "training for 10 steps: 1 of 100 parameters (1%)",
        "step 1/10  loss 1.000  lr 0.001  200 tok/s  pad 10%  floor 60%  2.4 MB  4.5s left",
        "step 10/10  loss 1.000  lr 0.001  200 tok/s  pad 10%  0.0s left",
    ]


def test_plain_lines_come_every_so_many_steps():
    lines = lines_of([step(number) for number in range(1, 31)], every_steps=10)
    assert [line.split()[1] for line in lines] == ["1", "11", "21"]


def test_plain_lines_come_every_so_many_seconds():
    now = iter(float(tick) for tick in range(1000))
    lines = lines_of([step(number) for number in range(1, 31)], every_seconds=10, clock=lambda: next(now))
    assert 2 <= len(lines) <= 4


def test_a_warning_is_told_once_and_counted():
    lines = lines_of(
        [
            events.Warned(kind="cut", message="a row was cut"),
            events.Warned(kind="cut", message="another", count=4),
            events.Warned(kind="twice", message="a row occurs twice", count=2),
        ]
    )
    assert lines == ["warning: cut: a row was cut", "warning: twice: a row occurs twice (2 times)", "warning: cut: 5 in all"]


def test_evaluations_actions_and_the_end_are_told():
    lines = lines_of(
        [
            events.Evaluated(step=5, metrics={"accuracy": 0.8}, best=True),
            events.Acted(step=6, action="stop", reason="enough"),
            events.Finished(step=6, reason="early_stop", seconds=2.0, tokens=1000),
        ]
    )
    assert lines == [
        "evaluation at step 5: accuracy 0.8000 (best so far)",
        "step 6: stop: enough",
        "ended at step 6 (early_stop): 2.0s, 1,000 tokens, 500 tok/s",
    ]


def test_no_event_makes_it_stumble_and_hostile_text_cannot_steer():
    lines = lines_of([*run_events(), events.Warned(kind="[red]", message="\x1b[2J[bold]\nnew line"), step(5, loss=float("nan"))])
    assert not [line for line in lines if "\x1b" in line]
    assert "warning: [red]: \ufffd[2J[bold] new line" in lines


@pytest.mark.parametrize("width", [10, 24, 40, 80])
def test_a_narrow_line_keeps_the_most_needed(width):
    sink = TerminalProgress(io.StringIO())
    sink(started(10))
    sink(step(3, memory_bytes=5_000_000, floor_share=0.5))
    line = sink.line(width)
    assert line.startswith("step 3/10") and len(line) <= max(width, len("step 3/10"))
    assert ("loss" in line) == (width >= 24)
    assert ("left" in line) == (width >= 40)
    assert "5.0 MB" in sink.line()


def test_the_line_on_a_terminal_is_redrawn_and_gone_at_the_end(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Screen()
    with TerminalProgress(stream, width=100) as sink:
        for event in (started(3), step(1), events.Evaluated(step=1, metrics={"loss": 1.0}), step(3)):
            sink(event)
    shown = stream.getvalue()
    assert "step 3/3" in shown and "evaluation at step 1" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor comes back
    assert "step" not in shown[shown.rindex("\x1b[2K") :]


def test_an_exception_gives_the_terminal_back(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Screen()
    with pytest.raises(KeyError), TerminalProgress(stream, width=100) as sink:
        sink(step(1))
        raise KeyError("broken")
    assert stream.getvalue().count("\x1b[?25h") == 1
    sink.close()
    assert stream.getvalue().count("\x1b[?25h") == 1


def test_no_color_is_respected(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Screen()
    with TerminalProgress(stream, width=100) as sink:
        for event in (started(3), events.Warned(kind="a", message="b"), step(1), step(3)):
            sink(event)
    assert not re.search(r"\x1b\[[0-9;]*m", stream.getvalue().replace("\x1b[0m", ""))


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Screen()
    with TerminalProgress(stream, width=100) as sink:
        sink(step(1))
    assert stream.getvalue().startswith("step 1") and "\x1b[?25" not in stream.getvalue()


def test_everything_goes_to_stderr(capsys):
    with TerminalProgress() as sink:
        sink(step(1))
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("step 1")
