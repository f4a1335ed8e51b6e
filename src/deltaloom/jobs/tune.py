"""The main job: train a delta as a run file says, evaluate it, save it, write the report."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import yaml

from deltaloom.checkpoint import native
from deltaloom.checkpoint.peft import write_peft
from deltaloom.checkpoint.record import read_record
from deltaloom.deltas.base import StepPlan, method_record
from deltaloom.errors import RefusedError, SettingsError
from deltaloom.evaluate.base import Prediction
from deltaloom.events import Acted, Attached, DataRead, Emitter, JsonLines, Sampled, Sink, Warned, finite
from deltaloom.files import write_atomic
from deltaloom.jobs.budget import check_numbers, exceeded
from deltaloom.jobs.doctor import environment
from deltaloom.jobs.engine import Engine, Here, Loop, feed_of, measured, written
from deltaloom.jobs.estimate import flops_per_token, matmul_rate
from deltaloom.jobs.folder import check_folder, clear_folder, folder_bytes, write_json
from deltaloom.jobs.opening import needs_delta
from deltaloom.jobs.prepare import DTYPES, Parts, Prepared, Say, head_methods, model_source, parse_parts, prepare
from deltaloom.jobs.runfile import Run, resolved_yaml
from deltaloom.jobs.scoring import Scores, class_rows, majority
from deltaloom.jobs.usage import tell_usage
from deltaloom.models.compact import form_of
from deltaloom.report.card import model_card
from deltaloom.report.facts import read_run
from deltaloom.report.page import write_report
from deltaloom.report.terminal import TerminalProgress
from deltaloom.report.text import byte_size, count, figure, table_text
from deltaloom.sites import all_sites
from deltaloom.train.loop import check_no_evaluation
from deltaloom.train.memory import give_back_freed_memory
from deltaloom.train.processes import processes
from deltaloom.train.progress import planned_steps
from deltaloom.train.run import TrainResult
from deltaloom.train.sharding import check_shard, shard_base
from deltaloom.train.team import SINGLE, Team
from deltaloom.tuned import SavedDelta, Tuned, attach, restore, settle

E = TypeVar("E", bound=Engine)
Through = Callable[[Prepared], E]
SETTLED = "deltas.yaml"  # in the run folder: the plain list of methods that a choice has come to
Prepare = Callable[..., Prepared]
"""As `prepare.prepare`."""


def tune(run: Run, *, resume: bool = False, overwrite: bool = False, say: Say = print,
         sinks: Sequence[Sink] = ()) -> dict[str, Any]:
    """Train, evaluate, save; gives back what metrics.json holds.

    `say` takes lines for people, `sinks` receive every event besides the run folder and the terminal. Under torchrun every
    process calls this; the first one alone speaks and writes.

    Raises:
        DeltaloomError: of the kind that says what happened; what was complete before is still there.
    """
    with processes() as team:
        if run.file.private and team.first:
            say("The section 'private' of the run file is for `deltaloom party`; this run trains here, with the whole model.")
        return carry_out(run, lambda prepared: _here(prepared, team), resume=resume, overwrite=overwrite, say=say, sinks=sinks,
                         team=team)


def carry_out(run: Run, through: Through[E], *, resume: bool = False, overwrite: bool = False, say: Say = print,
              sinks: Sequence[Sink] = (), make_ready: Prepare | None = None, show: bool = True,
              team: Team = SINGLE) -> dict[str, Any]:
    """A run from its file to its folder, with the engine that `through` makes when rows and model are ready; see `tune`.

    `make_ready` is asked for rows and model instead of `prepare`; without `show` the terminal shows no steps. `team` are the
    processes of the run, each of which calls this.
    """
    stages = in_stages(run, through, resume=resume, overwrite=overwrite, say=say, sinks=sinks, make_ready=make_ready, show=show,
                       team=team)
    training = next(stages)
    try:
        outcome: TrainResult | BaseException = training.engine.train(training.loop)
    except BaseException as error:
        outcome = error
    return finished(stages, outcome)


@dataclass(frozen=True)
class Ready(Generic[E]):
    """A run that is ready for its first step."""

    engine: E
    loop: Loop


Stages = Generator[Ready[E], TrainResult, dict[str, Any]]


def finished(stages: Stages[E], outcome: TrainResult | BaseException) -> dict[str, Any]:
    """What metrics.json holds, when a run in stages is told what its training came to; what ended the training is raised."""
    try:
        if isinstance(outcome, BaseException):
            stages.throw(outcome)
        else:
            stages.send(outcome)
    except StopIteration as end:
        return dict(end.value)
    raise RuntimeError("a run trains once")


def in_stages(run: Run, through: Through[E], *, resume: bool = False, overwrite: bool = False, say: Say = print,
              sinks: Sequence[Sink] = (), make_ready: Prepare | None = None, show: bool = True,
              team: Team = SINGLE) -> Stages[E]:
    """`carry_out` for a caller who trains by other means than `Engine.train`: up to there, and on from its result."""
    give_back_freed_memory()
    say = say if team.first else _silent
    parts = team.together(lambda: parse_parts(run))
    check_shard(parts.train, team)
    folder = Path(run.file.output or f"runs/{run.name}")
    team.once(lambda: check_folder(folder, resume=resume, overwrite=overwrite))
    make_ready = make_ready or partial(prepare, device=team.device.type)
    prepared = team.together(lambda: _ready(run, parts, folder, make_ready, resume, say))
    with ExitStack() as stack:
        engine = team.together(lambda: through(prepared))
        stack.callback(engine.close)
        prepared = engine.prepared
        team.together(lambda: check_numbers(parts.budget, engine.tuned, prepared.model_parameters))
        planned = planned_steps(parts.train, feed_of(prepared))
        if planned is not None:
            plan = StepPlan(planned)
            team.together(lambda: engine.check(plan))  # raises where the run is too short for them, before anything is removed
        team.together(engine.check_memory)
        early: list[Any] = []
        resumed = resume and engine.resume(folder, _identity(prepared), Emitter([early.append]))
        if not resumed:
            team.once(lambda: clear_folder(folder))
        emit = Emitter()
        if team.first:
            progress = [stack.enter_context(TerminalProgress())] if show else []
            log = JsonLines(folder / "events.jsonl")
            stack.callback(log.close)
            emit = Emitter([log, *_tensorboard(run, folder, stack), *sinks, *progress])
        for event in early:
            emit(event)
        return (yield from _run(engine, folder, emit, say, announced=resumed))


def _ready(run: Run, parts: Parts, folder: Path, make_ready: Prepare, resume: bool, say: Say) -> Prepared:
    """Rows and model, after what can be refused without them."""
    if parts.continued is not None and not resume and parts.continued.resolve().is_relative_to(folder.resolve()):
        raise RefusedError("the run would replace the delta that it goes on from", got=str(folder), hint="Choose another output.")
    record = read_record(needs_delta(parts.continued)) if parts.continued else None
    prepared = make_ready(run, parts, say=say, record=record)
    if not prepared.held:
        check_no_evaluation(parts.train)
        if parts.strategy is not None:
            raise SettingsError("a strategy watches evaluations, and there is nothing to evaluate on",
                                hint="Give data.eval or data.eval_fraction, or leave out the section strategy.")
    return prepared


def _here(prepared: Prepared, team: Team) -> Here:
    if prepared.parts.train.shard:  # before anything runs: the whole model may fit no device
        tuned = attached(prepared)
        shard_base(tuned, team)
        with tuned.bare() as model:
            before = measured(prepared, model, written(prepared.task), team)
        return Here(prepared, tuned, tuned, before, team)
    before = measured(prepared, prepared.loaded.model.to(team.device), written(prepared.task), team)  # type: ignore[arg-type]
    tuned = attached(prepared)
    return Here(prepared, tuned, tuned, before, team)


def _silent(text: str = "") -> None:
    """What the processes say that are not the first."""


def _run(engine: E, folder: Path, emit: Emitter, say: Say, *, announced: bool) -> Stages[E]:
    prepared, tuned, team = engine.prepared, engine.tuned, engine.team
    team.once(lambda: _write_first(prepared, folder, team))
    total = prepared.model_parameters
    deltas, heads = tuned.counts()
    label_share = prepared.facts["learned_tokens"] / max(prepared.facts["tokens"], 1)
    flops = flops_per_token(untouched_sites(tuned), deltas + heads, label_share)
    if not announced:
        _announce(prepared, tuned, total, emit)
    say(f"Delta: {count(deltas)} parameters ({deltas / total:.2%} of the model's {count(total)})"
        + (f", and a head of {count(heads)}" if heads else ""))
    rate = team.size * matmul_rate(DTYPES[prepared.precision], device=team.device) / flops
    result = yield Ready(engine, Loop(emit, folder, _identity(prepared), rate))
    _settle(tuned, result.step, folder if team.first else None, emit)
    scores, shown = engine.scores(), engine.shown()
    tell_usage(prepared.task, engine.model, tuned, prepared.held, engine.rows, result.step, emit)
    return team.once(lambda: _finish(engine, result, scores, shown, folder, emit, say, total=total, flops=flops,
                                     started=(deltas, heads)))


def _write_first(prepared: Prepared, folder: Path, team: Team) -> None:
    """What a run leaves before its first step."""
    write_atomic(folder / "run.yaml", resolved_yaml(_resolved(prepared, folder), prepared.run.origins))
    write_json(folder / "environment.json", environment() | {
        "threads": torch.get_num_threads(), "precision": prepared.precision, "processes": team.size})


def attached(prepared: Prepared) -> Tuned:
    """New deltas, or those of an earlier run, on the loaded model.

    Raises:
        CheckpointError: the earlier delta is damaged or of another base. TargetError, RefusedError: a method cannot be attached.
    """
    loaded = prepared.loaded
    if prepared.parts.continued is None:
        methods = (*prepared.parts.methods, *prepared.waiting)
        tuned = attach(loaded.model, methods, heads=head_methods(loaded, methods), tokenizer=loaded.tokenizer,
                       seed=prepared.run.file.seed)
        _let_wait(tuned, prepared)
        return tuned
    return restore(loaded.model, _continued(prepared, prepared.parts.continued))


def add_lane(tuned: Tuned, prepared: Prepared, name: str) -> None:
    """The same as a further lane of a model that is tuned already, which is then in use; raises as `attached`."""
    loaded = prepared.loaded
    if prepared.parts.continued is None:
        methods = (*prepared.parts.methods, *prepared.waiting)
        with tuned.bare():
            heads = head_methods(loaded, methods)
        tuned.add(name, methods, heads=heads, tokenizer=loaded.tokenizer, seed=prepared.run.file.seed)
        _let_wait(tuned, prepared)
    else:
        with tuned.bare():
            saved = _continued(prepared, prepared.parts.continued)
        tuned.add_saved(name, saved)


def _let_wait(tuned: Tuned, prepared: Prepared) -> None:
    for part in tuned.attached():
        if any(part.method is method for method in prepared.waiting):
            for _, module in part.named_deltas():
                module.requires_grad_(False)


def _continued(prepared: Prepared, source: Path) -> SavedDelta:
    saved, found = native.read(needs_delta(source))
    native.check_base(prepared.loaded.model, found.base, prepared.loaded.fingerprint)
    return saved


def _identity(prepared: Prepared) -> dict[str, str]:
    """What a resumed run must share: model, data, methods and seed."""
    digest = hashlib.sha256()
    for example in prepared.examples:
        digest.update(repr((example.input_ids, example.labels)).encode())
    methods = json.dumps([method_record(method) for method in prepared.parts.methods], sort_keys=True)
    form = form_of(prepared.loaded.model)
    model = prepared.loaded.fingerprint + (f" as {form}" if form else "")
    plan = prepared.parts.strategy
    return {"model": model, "data": digest.hexdigest()[:16], "deltas": methods,
            "task": prepared.task.name, "seed": str(prepared.run.file.seed),
            **({} if plan is None else {"strategy": plan.record()})}


def _announce(prepared: Prepared, tuned: Tuned, total: int, emit: Emitter) -> None:
    """The facts that the report begins with."""
    emit(DataRead(facts=prepared.facts))
    deltas, heads = tuned.counts()
    emit(Attached(table=site_table(tuned), delta_parameters=deltas, head_parameters=heads, total_parameters=total))
    for kind, message in prepared.notes:
        emit(Warned(kind=kind, message=message))


def site_table(tuned: Tuned) -> list[dict[str, Any]]:
    """One row for each method and role: how many sites, how many parameters, examples; and one for each shared module."""
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for index, attached in enumerate(tuned.attached()):
        for site, delta in attached.attachment.deltas.items():
            row = rows.setdefault((index, site.role), {
                "method": attached.method.name + (" (head)" if attached.is_head else ""), "target": site.role, "sites": 0,
                "parameters": 0, "examples": []})
            row["sites"] += 1
            row["parameters"] += sum(p.numel() for p in delta.parameters() if p.requires_grad)
            if len(row["examples"]) < 2:
                row["examples"].append(site.name)
        for name, module in attached.attachment.shared.items():
            own = sum(p.numel() for p in module.parameters() if p.requires_grad)
            rows[index, f"shared {name}"] = {"method": attached.method.name, "target": f"shared {name}", "sites": 0,
                                             "parameters": own, "examples": []}
    return list(rows.values())


def untouched_sites(tuned: Tuned) -> list[Any]:
    """All sites of the model as it is without deltas."""
    with tuned.bare() as model:
        return all_sites(model)


def _resolved(prepared: Prepared, folder: Path) -> dict[str, Any]:
    """The run file that makes the same run again from the run folder: relative paths start there."""
    run, parts = prepared.run, prepared.parts
    data = parts.data.as_dict()
    data |= {key: seen_from(folder, data[key], run.base) for key in ("train", "eval")}
    deltas = [method_record(method) for method in parts.methods]
    if parts.continued is not None:
        deltas = [{"from": seen_from(folder, str(parts.continued), Path.cwd())}]
    model = run.file.model if model_source(run) == run.file.model else seen_from(folder, run.file.model, run.base)
    return {"model": model, "task": prepared.task.name, "data": data, "deltas": deltas, "train": parts.train.as_dict(),
            "strategy": run.file.strategy,
            "base": parts.base.as_dict(), "budget": parts.budget.given(), "log": run.file.log.as_dict(),
            "private": run.file.private, "seed": run.file.seed, "output": run.file.output}


def seen_from(folder: Path, value: Any, base: Path) -> Any:
    """Relative paths that start at `base`, as they are from `folder`; others and None as they are."""
    if isinstance(value, list):
        return [seen_from(folder, item, base) for item in value]
    if value is None or Path(value).expanduser().is_absolute():
        return value
    return Path(os.path.relpath(base / value, folder)).as_posix()


def _finish(engine: Engine, result: TrainResult, scores: Scores, shown: Sequence[str], folder: Path, emit: Emitter, say: Say, *,
            total: int, flops: int, started: tuple[int, int]) -> dict[str, Any]:
    """The delta and its PEFT copy, predictions, metrics, card and report."""
    prepared, tuned, before, rows = engine.prepared, engine.tuned, engine.before, engine.rows
    task = prepared.task
    for index, (old, new) in enumerate(zip(before.answers, shown, strict=True)):
        emit(Sampled(row=index, input=rows[index].source, reference=rows[index].target, before=old, after=new))
    more = engine.told(emit)
    labels = list(prepared.labels.names) if prepared.labels else None
    base = {"source": prepared.loaded.source, "commit": prepared.loaded.commit, "fingerprint": prepared.loaded.fingerprint,
            "task": task.name, "labels": labels, "quantise": prepared.parts.base.quantise}
    native.save(tuned, folder / "delta", base=base, data=prepared.facts, seed=prepared.run.file.seed, replace=True)
    delta_bytes = folder_bytes(folder / "delta")
    try:
        write_peft(tuned, folder / "delta" / "peft", source=prepared.loaded.source, replace=True)
    except RefusedError as error:
        emit(Warned(kind="peft", message=f"no PEFT copy is written: {error}"))
    if rows:
        _write_predictions(folder / "predictions.jsonl", scores.predictions, rows, [example.row for example in prepared.held])
    deltas, heads = tuned.counts()
    for warning in exceeded(prepared.parts.budget, deltas, total):
        emit(warning)
    methods = [method_record(part.method) for part in tuned.attached() if not part.is_head]
    metrics = {
        "run": folder.name, "task": task.name, "model": prepared.loaded.source, "methods": methods,
        "metrics": scores.metrics, "base_metrics": before.scores.metrics, "majority": majority(rows, task),
        "primary": {"name": task.primary, "higher_is_better": task.higher_is_better},
        "intervals": task.intervals(scores.predictions, rows), "per_class": class_rows(task, scores.predictions, rows),
        "trainable_parameters": started[0], "final_parameters": deltas, "head_parameters": heads, "total_parameters": total,
        "delta_bytes": delta_bytes, "flops_per_token": flops, "seconds": result.seconds, "tokens": result.tokens,
        "tokens_per_second": result.tokens / result.seconds if result.seconds else 0.0,
        "peak_memory_bytes": result.peak_memory_bytes, "steps": result.step, "epochs": result.epochs, "reason": result.reason,
        "best_step": result.best_step, "evaluation_seconds": result.evaluation_seconds, "saving_seconds": result.saving_seconds,
        **more}
    write_json(folder / "metrics.json", metrics)
    write_atomic(folder / "README.md", model_card(read_run(folder)))
    write_report([folder], folder / "report.html")
    _tell(metrics, prepared, folder, say)
    return finite(metrics)


def _settle(tuned: Tuned, step: int, folder: Path | None, emit: Emitter) -> None:
    """Let methods that stand for others become these, and write the list that a run file would state (None: another does)."""
    if not settle(tuned) or folder is None:
        return
    parts = [part for part in tuned.attached() if not part.is_head]
    numbers = [sum(p.numel() for _, module in part.named_deltas() for p in module.parameters()) for part in parts]
    sizes = [f"{part.method.name} at {len(part.attachment.deltas)} places, {count(own)} numbers"
             for part, own in zip(parts, numbers, strict=True)]
    emit(Acted(step=step, action="settled", reason=f"the deltas are now {'; '.join(sizes)}: {SETTLED}"))
    records = [method_record(part.method) for part in parts]
    write_atomic(folder / SETTLED, yaml.safe_dump({"deltas": records}, sort_keys=False, allow_unicode=True, width=120))


def _write_predictions(path: Path, predictions: Sequence[Prediction], rows: Sequence[Any], numbers: Sequence[int]) -> None:
    lines = [json.dumps(finite({"row": number, "where": row.where, "target": row.target, **prediction}), ensure_ascii=False)
             for number, row, prediction in zip(numbers, rows, predictions, strict=True)]
    write_atomic(path, "\n".join(lines) + "\n")


def _tell(metrics: dict[str, Any], prepared: Prepared, folder: Path, say: Say) -> None:
    """The table that a person sees at the end."""
    rows = []
    for name, value in metrics["metrics"].items():
        low, high = metrics["intervals"].get(name, (None, None))
        base, common = metrics["base_metrics"].get(name), metrics["majority"].get(name)
        rows.append((name, figure(base), figure(common) if common is not None else "", figure(value),
                     f"{figure(low)} to {figure(high)}" if low is not None else ""))
    say("")
    if rows:
        say(table_text(("metric", "untuned", "majority", "tuned", "95% interval"), rows, f"{len(prepared.held)} evaluation rows"))
    say(f"Delta:  {folder / 'delta'} ({byte_size(metrics['delta_bytes'])}; the model has {byte_size(prepared.model_bytes)})")
    say(f"Report: {folder / 'report.html'}")


def _tensorboard(run: Run, folder: Path, stack: ExitStack) -> list[Sink]:
    if not run.file.log.tensorboard:
        return []
    from deltaloom.report.tensorboard import TensorBoard

    sink = TensorBoard(folder / "tensorboard")
    stack.callback(sink.close)
    return [sink]

