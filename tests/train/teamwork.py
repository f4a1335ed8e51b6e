"""Training runs as a team of processes carries them out, and a way to start such a team: `python -m tests.train.teamwork DIR`.

Each piece of work takes the team and a folder, and gives back tensors and facts; alone it is called with `SINGLE`. Two processes
do all of them one after another in one process group, because to start one takes seconds; what each found is written to
`DIR/NAME-NUMBER`.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from deltaloom.deltas.adalora import AdaLoRA
from deltaloom.deltas.base import Method
from deltaloom.deltas.lora import LoRA
from deltaloom.deltas.tsvd import TSVD
from deltaloom.deltas.tucker1 import Tucker1
from deltaloom.errors import DeltaloomError
from deltaloom.events import Acted, Evaluated, RankChanged, Step
from deltaloom.train.checkpoints import latest_checkpoint
from deltaloom.train.processes import processes
from deltaloom.train.progress import Goal
from deltaloom.train.settings import EarlyStop, TrainSettings
from deltaloom.train.sharding import shard_base
from deltaloom.train.strategy import Strategy, strategy_from
from deltaloom.train.team import Team
from deltaloom.tuned import Tuned, attach
from tests.contract.cases import all_cases
from tests.toys import toy
from tests.train.pieces import LanguageTask, Log, ToyMethod, feed, held_out_loss, rows, run, small, state_of

Found = tuple[dict[str, Tensor], dict[str, Any]]
# 25 rows in steps of 4, cut into micro-batches of 20 tokens: the last step of an epoch has one row, and process 1 none of it
PLAIN = TrainSettings(epochs=2, batch_size=4, learning_rate=1e-2, eval_every=5, save_every=3, keep_checkpoints=99)
DECIDING = TrainSettings(max_steps=10, batch_size=5, learning_rate=3e-2, optimizer="sgd", schedule="cosine", save_every=4,
                         keep_checkpoints=99)
RANKS: dict[str, Any] = {"rank": 1, "reserve": 3, "start": 0.2, "end": 0.4, "every": 2}
ADAPTIVE = {"adalora": AdaLoRA(**RANKS), "tsvd": TSVD(**RANKS), "tsvd-data": TSVD(**RANKS, transform="data"),
            "tucker1": Tucker1(**RANKS, basis="gradient")}


def source(settings: TrainSettings, **options: Any) -> Any:
    return feed(settings, rows(25), micro_tokens=20, **options)


def exact(methods: list[Any]) -> Tuned:
    """A model and deltas in float64, so that only the order of sums differs."""
    tuned = attach(small(0.0).double(), methods, seed=3)
    for parameter in tuned.delta_parameters().values():
        parameter.data = parameter.data.double()
    return tuned


def course(log: Log) -> dict[str, Any]:
    return {"losses": [(event.step, event.loss, event.penalty, event.gradient_norm, event.tokens) for event in log.of(Step)],
            "metrics": [(event.step, event.metrics, event.best) for event in log.of(Evaluated)],
            "ranks": [(event.step, event.ranks, event.parameters) for event in log.of(RankChanged)],
            "acted": [(event.step, event.action) for event in log.of(Acted)]}


def plain(team: Team, folder: Path) -> Found:
    """Penalty, controller, clipping, evaluation, AdamW; a step in which a process has no row."""
    tuned, log = exact([LoRA(rank=2), ToyMethod(weight=0.01)]), Log()
    result = run(tuned, PLAIN, log, feed=source(PLAIN), evaluate=held_out_loss, team=team)
    return state_of(tuned), course(log) | {"tokens": result.tokens, "step": result.step}


def deciding(name: str) -> Callable[[Team, Path], Found]:
    def work(team: Team, folder: Path) -> Found:
        tuned, log = attach(small(0.0), [ADAPTIVE[name]], seed=3), Log()
        run(tuned, DECIDING, log, feed=source(DECIDING), team=team)
        return state_of(tuned), course(log)

    return work


def half(team: Team, folder: Path) -> Found:
    """The first steps of `plain`, saved; the others go on from there in another number of processes."""
    tuned = exact([LoRA(rank=2), ToyMethod(weight=0.01)])

    def stop(step: int) -> None:
        if step == 7 and team.number == team.size - 1:  # of one process only; the step is still done, and saved
            os.kill(os.getpid(), 15)

    message = ""
    try:
        run(tuned, PLAIN, Log(), feed=source(PLAIN), evaluate=held_out_loss, team=team, before_step=stop,
            folder=folder / f"half-of-{team.size}")
    except DeltaloomError as error:
        message = f"{type(error).__name__}: {error} {error.known_to_all}"
    return state_of(tuned), {"message": message}


def resumed(before: int) -> Callable[[Team, Path], Found]:
    def work(team: Team, folder: Path) -> Found:
        tuned, log = exact([LoRA(rank=2), ToyMethod(weight=0.01)]), Log()
        checkpoint = latest_checkpoint(folder / f"half-of-{before}", log.emit) if team.first else None
        run(tuned, PLAIN, log, feed=source(PLAIN), evaluate=held_out_loss, team=team, resume=checkpoint)
        return state_of(tuned), course(log)

    return work


def dropout(team: Team, folder: Path) -> Found:
    """With dropout a run is one of its number of processes, bit for bit, resumed or not; the draws differ between them."""
    settings = TrainSettings(max_steps=6, batch_size=4, learning_rate=1e-2, save_every=2, keep_checkpoints=99)
    states: list[dict[str, Tensor]] = []
    seeds: list[list[int]] = []
    for resume in (False, True):
        tuned = attach(small(0.2), [LoRA(rank=2, dropout=0.2)], seed=3)
        place = folder / f"dropout-{team.size}"
        checkpoint = latest_checkpoint(place, Log().emit) if resume and team.first else None
        task = Seeded()
        run(tuned, settings, Log(), feed=source(settings), team=team, folder=place, resume=checkpoint, task=task)
        seeds.append(sorted(task.seeds))
        states.append(state_of(tuned))
        if team.first and not resume:
            for step in (4, 6):  # what was not there when the run was killed after its second step
                (place / f"step-{step}").rename(folder / f"gone-{team.size}-{step}")
        team.texts("")  # so that none looks for a checkpoint before these are gone
    tensors = {f"{number}/{name}": tensor for number, state in enumerate(states) for name, tensor in state.items()}
    return tensors, {"seeds": seeds}


class Seeded(LanguageTask):
    """Notes what the masks of each step are drawn from."""

    def __init__(self) -> None:
        self.seeds: set[int] = set()

    def loss(self, tuned: Tuned, batch: Any) -> tuple[Tensor, Tensor]:
        self.seeds.add(torch.initial_seed())
        return super().loss(tuned, batch)


class Failing(LanguageTask):
    """Fails, or is not finite, for the row of a number."""

    def __init__(self, row: int, how: str) -> None:
        self.row, self.how = row, how

    def loss(self, tuned: Tuned, batch: Any) -> tuple[Tensor, Tensor]:
        loss, count = super().loss(tuned, batch)
        if self.row in batch.rows and self.how == "nan":
            return loss * float("nan"), count
        if self.row in batch.rows:
            raise MemoryError if self.how == "memory" else ValueError("this row is odd")
        return loss, count


def failing(how: str) -> Callable[[Team, Path], Found]:
    def work(team: Team, folder: Path) -> Found:
        source_ = source(PLAIN)
        row = next(own[0][0] for step in source_.steps(0)[1:] if (own := source_.dealt(step, 1, 2)))  # at process 1 of two
        try:
            run(exact([LoRA(rank=2)]), PLAIN, Log(), feed=source_, team=team, task=Failing(row, how), evaluate=held_out_loss)
        except (DeltaloomError, ValueError) as error:
            told = error.known_to_all if isinstance(error, DeltaloomError) else None
            return {}, {"kind": type(error).__name__, "message": str(error), "told": told, "row": row,
                        "code": getattr(error, "exit_code", None)}
        return {}, {"kind": "none"}

    return work


def stopping(team: Team, folder: Path) -> Found:
    """Early stop and time limits, where the processes measure different values and times."""
    values = iter([0.5, 0.6, 0.7, 0.8, 0.9, 1.0] if team.first else [0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
    settings = TrainSettings(max_steps=6, batch_size=4, eval_every=1, early_stop=EarlyStop(patience=2))
    early = run(exact([LoRA(rank=2)]), settings, Log(), feed=source(settings), team=team,
                evaluate=lambda tuned: {"loss": next(values)})
    slow = TrainSettings(max_steps=50, max_time=0.3, batch_size=4)
    late = run(exact([LoRA(rank=2)]), slow, Log(), feed=source(slow), team=team,
               before_step=lambda step: time.sleep(0.1 if team.first else 0.01))
    alone = TrainSettings(max_time=0.4, batch_size=4)
    planned = run(exact([LoRA(rank=2)]), alone, Log(), feed=source(alone), team=team)
    return {}, {"early": (early.reason, early.step), "late": (late.reason, late.step), "planned": planned.total_steps,
                "steps": planned.step}


def strategic(team: Team, folder: Path) -> Found:
    """Rules that act on losses and values, go back to a checkpoint, and measure the noise."""
    settings = TrainSettings(max_steps=8, batch_size=4, learning_rate=1e-2, schedule="constant", eval_every=2, save_every=2)
    plan = strategy_from({"plateau": {"patience": 1}, "overfitting": False, "noise": {"above": 0.5}}, settings)
    course_ = Strategy(plan, Goal("loss", False), plan.waiting([]))
    values, tuned, log, noise = iter([1.0, 2.0, 3.0, 4.0]), exact([LoRA(rank=2)]), Log(), []

    def evaluate(tuned: Tuned) -> dict[str, float]:
        noise.append(course_.noise.state())
        return {"loss": next(values)}

    run(tuned, settings, log, feed=source(settings), evaluate=evaluate, team=team, strategy=course_,
        folder=folder / f"strategic-{team.size}")
    return state_of(tuned), {"rate": course_.rate, "noise": noise, "acted": course(log)["acted"]}


def by_ddp(team: Team, folder: Path) -> Found:
    """One step with the gradients of DistributedDataParallel, whose means are of processes and not of tokens."""
    settings = TrainSettings(max_steps=1, batch_size=8, learning_rate=0.1, optimizer="sgd", momentum=0.0, clip=None, warmup=0.0)
    ours, book = exact([LoRA(rank=2)]), exact([LoRA(rank=2)])
    run(ours, settings, Log(), feed=feed(settings, rows(16)), team=team)
    examples = feed(settings, rows(16))
    step = examples.steps(0)[0]
    own = [index for micro in examples.dealt(step, team.number, team.size) for index in micro]
    batch = examples.batch(own, torch.device("cpu"))
    whole = examples.batch([index for micro in step for index in micro], torch.device("cpu"))
    total = int((whole.labels[:, 1:] != -100).sum())
    wrapped: Any = nn.parallel.DistributedDataParallel(book) if team.size > 1 else book
    loss, _ = LanguageTask().loss(wrapped, batch)
    (loss * team.size / total).backward()
    torch.optim.SGD(list(book.delta_parameters().values()), lr=0.1).step()
    return {f"ours/{name}": tensor for name, tensor in state_of(ours).items()} | {
        f"ddp/{name}": tensor for name, tensor in state_of(book).items()}, {}


def exchanging(team: Team, folder: Path) -> Found:
    """What a team sends besides gradients."""
    first = {"tensor": torch.arange(6).view(2, 3), "mask": torch.tensor([True, False]), "numbers": [0.1, float("inf"), None],
             "text": "ä"}
    told = team.once(lambda: first)
    nothing = team.once(lambda: None)
    texts = team.texts("ä" * team.number)
    squares = team.spread(list(range(7)), lambda number: {"square": number ** 2, "third": number / 3})
    try:
        team.check_same("numbers", str(team.number))
        drifted = "none"
    except DeltaloomError as error:
        drifted = str(error)
    try:
        team.once(lambda: json.loads("{"))
        failed = "none"
    except Exception as error:
        failed = f"{type(error).__name__}: {error}"
    return {"tensor": told["tensor"], "mask": told["mask"]}, {
        "numbers": told["numbers"], "text": told["text"], "nothing": nothing, "texts": texts, "squares": squares,
        "drifted": drifted, "failed": failed}


class Forwards(LanguageTask):
    """Counts calls of the model."""

    def __init__(self) -> None:
        self.calls = 0

    def loss(self, tuned: Tuned, batch: Any) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return super().loss(tuned, batch)


def sharded(methods: Callable[[], list[Method]], layout: str = "llama", **train: Any) -> Callable[[Team, Path], Found]:
    """The base spread over the processes; alone it is whole."""
    def work(team: Team, folder: Path) -> Found:
        settings = PLAIN.model_copy(update={"epochs": 1, "optimizer": "sgd", "learning_rate": 0.05, **train})
        tuned, log, task = attach(toy(layout), methods(), seed=3), Log(), Forwards()
        whole = sum(parameter.numel() for parameter in tuned.parameters())
        if team.size > 1:
            shard_base(tuned, team)
        here = sum(_local(parameter).numel() for parameter in tuned.parameters())

        def evaluate(model: Tuned) -> dict[str, float]:
            held = feed(settings, rows(9, seed=9), micro_tokens=20)
            batches = [micro for step in held.steps(0) for micro in step]

            def work(micro: list[int]) -> list[float]:
                return [float(number) for number in LanguageTask().loss(model, held.batch(micro, model.device))]

            parts = team.spread(batches, work)
            return {"loss": sum(loss for loss, _ in parts) / sum(count for _, count in parts)}

        try:
            run(tuned, settings, log, feed=source(settings), evaluate=evaluate, team=team, task=task)
        finally:
            team.lockstep = False  # the group goes on with other work
        return state_of(tuned), course(log) | {"whole": whole, "here": here, "calls": task.calls}

    return work


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, torch.distributed.tensor.DTensor) else parameter


WORK: dict[str, Callable[[Team, Path], Found]] = {
    "plain": plain, **{name: deciding(name) for name in ADAPTIVE}, "half": half, "resumed": resumed(1), "dropout": dropout,
    **{how: failing(how) for how in ("nan", "memory", "odd")}, "stopping": stopping, "strategic": strategic, "ddp": by_ddp,
    "exchanging": exchanging, "sharded": sharded(lambda: [LoRA(rank=2)])}
# longer work, of the tier `slow`
MORE: dict[str, Callable[[Team, Path], Found]] = {
    "sharded-checkpointing": sharded(lambda: [LoRA(rank=2)], gradient_checkpointing=True),
    **{f"sharded-{case.id}": sharded(lambda case=case: [case.method()], case.layout, max_steps=3, epochs=None)
       for case in all_cases(("llama", "gpt2")) if case.name != "route"}}  # refused: it learns from a process's own rows


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def in_processes(size: int, work: Callable[[], None], seconds: float) -> list[int]:
    """Do something in forked processes with the variables that torchrun sets; their exit codes. None outlives `seconds`."""
    port, children = free_port(), []
    for number in range(size):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(number), "WORLD_SIZE": str(size), "LOCAL_RANK": str(number), "LOCAL_WORLD_SIZE": str(size),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            code = 1
            try:
                work()
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return [_code(child, time.monotonic() + seconds) for child in children]


def _code(child: int, until: float) -> int:
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return -99


def work_in_a_team(folder: Path, names: list[str]) -> None:
    with processes() as team:
        for name in names:
            began = time.perf_counter()
            tensors, facts = (WORK | MORE)[name](team, folder)
            whole = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
            save_file(whole, folder / f"{name}-{team.number}.safetensors")
            (folder / f"{name}-{team.number}.json").write_text(json.dumps(facts))
            if team.first:
                print(f"{name} {time.perf_counter() - began:.2f}", flush=True)


def gone(folder: Path) -> None:
    """Process 1 is killed in the middle of a step."""
    with processes() as team:
        def end(step: int) -> None:
            if step == 2 and not team.first:
                os.kill(os.getpid(), 9)

        try:
            run(exact([LoRA(rank=2)]), PLAIN, Log(), feed=source(PLAIN), team=team, evaluate=held_out_loss, before_step=end)
        except DeltaloomError as error:
            (folder / "gone.json").write_text(json.dumps([type(error).__name__, str(error)]))


if __name__ == "__main__":
    place, wanted = Path(sys.argv[1]), sys.argv[2:] or list(WORK)
    codes = in_processes(2, lambda: work_in_a_team(place, wanted), 250)
    if not sys.argv[2:]:
        codes += in_processes(2, lambda: gone(place), 60)[:1]
    sys.exit(max(abs(code) for code in codes))
