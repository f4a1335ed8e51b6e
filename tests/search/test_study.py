"""Studies: killed and resumed, shared, pruned, refused; with trials that cost nothing."""

import json
import re
import signal

import optuna
import pytest

from deltaloom.errors import RefusedError, SettingsError
from deltaloom.search.settings import SearchSettings, bounds_of
from deltaloom.search.storage import without_secret
from deltaloom.search.workers import Slot, busy
from tests.search.pieces import LOSS, SIZE, TEMPLATE, cost, finish, start_worker, toy_study


def states(study):
    return [record.state for record in study.records()]


def test_a_search_killed_twice_proposes_the_same_and_repeats_nothing_finished(tmp_path):
    whole = toy_study(tmp_path / "whole")
    finish(whole)
    folder = tmp_path / "killed"
    folder.mkdir()
    for _ in range(2):
        worker = start_worker(folder, 8, 0.3)
        lines = [worker.stdout.readline().split() for _ in range(3)]
        assert [line[0] for line in lines] == ["begun", "done", "begun"]
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        worker.stdout.close()
        with (folder / "journal.log").open("ab") as journal:
            journal.write(b'{"op_code": 4, "worker_')  # what a write that was cut leaves
    assert not busy(folder)
    study = toy_study(folder, resume=True)
    before = {record.number: record for record in study.records() if record.state == "complete"}
    finish(study)
    records = study.records()
    assert [record for record in records if record.number in before] == list(before.values())
    lost = [record for record in records if record.state == "lost"]
    assert len(lost) == 2 and all("takes its settings" in record.reason for record in lost)
    for record in lost:
        successor = next(other for other in records if other.again == record.number)
        assert successor.parameters == record.parameters
    kept = sorted((record for record in records if record.state != "lost"), key=lambda record: record.number)
    assert len(kept) == 8 and {record.state for record in kept} == {"complete"}
    assert (sorted(json.dumps(record.parameters) for record in kept)
            == sorted(json.dumps(record.parameters) for record in whole.records()))


def test_two_workers_share_a_storage(tmp_path):
    workers = [start_worker(tmp_path, 10, 0.1) for _ in range(2)]
    said = [worker.communicate(timeout=200)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    study = toy_study(tmp_path, resume=True, trials=10)
    assert states(study) == ["complete"] * 10
    done = [int(number) for text in said for number in re.findall(r"done (\d+)", text)]
    assert sorted(done) == list(range(10))
    assert all(record.values["loss"] == pytest.approx(cost(record.parameters)) for record in study.records())


def test_a_living_workers_trial_is_left_to_it(tmp_path):
    first, second = Slot.take(tmp_path), Slot.take(tmp_path)
    assert (first.number, second.number) == (0, 1)
    one = toy_study(tmp_path, slot=first)
    asked = one.next()
    other = toy_study(tmp_path, slot=second, resume=True)
    assert other.take_back() == [] and states(other) == ["running"]
    first.close()
    assert other.take_back() == [asked.number] and states(other) == ["lost", "waiting"]
    assert other.take_back() == []
    assert other.next().parameters == asked.parameters
    second.close()


def curve(parameters):
    """The first objective at four evaluations."""
    return [cost(parameters) + 1 / step for step in (1, 2, 3, 4)]


def run_pruned(folder, objectives, pruner, trials=16):
    study = toy_study(folder, objectives=objectives, trials=trials, pruner=pruner, sampler="random")
    while (asked := study.next()) is not None:
        if any(asked.told(value) for value in curve(asked.parameters)):
            asked.prune("behind", 0.0)
        else:
            asked.complete([curve(asked.parameters)[-1], 7.0][:len(objectives)], {}, {}, 0.0)
    return study.records()


@pytest.mark.parametrize("pruner", ["median", "asha", "hyperband", "none"])
def test_pruning_goes_by_the_first_objective_as_optunas_pruner_says(pruner, tmp_path):
    single = run_pruned(tmp_path / "single", (LOSS,), pruner)
    several = run_pruned(tmp_path / "several", (LOSS, SIZE), pruner)
    assert [record.parameters for record in single] == [record.parameters for record in several]
    if pruner != "hyperband":  # its brackets go by the study's name
        assert [(record.state, record.curve) for record in single] == [(record.state, record.curve) for record in several]
    for records in (single, several):
        ends = {record.state for record in records}
        assert ends == ({"complete"} if pruner == "none" else {"complete", "pruned"})
    if pruner == "median":
        oracle = optuna.create_study(pruner=optuna.pruners.MedianPruner(n_startup_trials=4))
        for record in several:
            trial, ended = oracle.ask(), False
            for step, value in enumerate(curve(record.parameters), 1):
                trial.report(value, step)
                ended = ended or trial.should_prune()
                if ended:
                    assert record.curve == curve(record.parameters)[:step]
                    break
            assert record.state == ("pruned" if ended else "complete")
            oracle.tell(trial, None if ended else record.values["loss"],
                        state=optuna.trial.TrialState.PRUNED if ended else optuna.trial.TrialState.COMPLETE)


@pytest.mark.parametrize("sampler", ["tpe", "random", "gp", "nsga2"])
def test_samplers_by_name_fill_the_budget(sampler, tmp_path):
    study = toy_study(tmp_path, sampler=sampler, trials=12)
    finish(study)
    assert states(study) == ["complete"] * 12
    other = toy_study(tmp_path / "again", sampler=sampler, trials=12)
    finish(other)
    assert [record.parameters for record in other.records()] == [record.parameters for record in study.records()]


def test_a_grid_is_tried_out_whole_once_and_then_ends(tmp_path):
    template = TEMPLATE | {"train": {"learning_rate": {"choice": [0.1, 0.2]}}}
    study = toy_study(tmp_path, template=template, sampler="grid", trials=100)
    count = 0
    while (asked := study.next()) is not None:
        asked.complete([0.0], {}, {}, 0.0)
        count += 1
    assert count == study.space.size == 2 * (8 + 1)
    assert len({json.dumps(record.parameters, sort_keys=True) for record in study.records()}) == count


def test_what_always_fails_is_recorded_and_avoided(tmp_path):
    study = toy_study(tmp_path, trials=24)
    while (asked := study.next()) is not None:
        if asked.parameters["deltas"] == "bitfit":
            asked.fail("no site has a bias", 0.0)
        else:
            asked.complete([cost(asked.parameters)], {}, {}, 0.0)
    failed = [record for record in study.records() if record.state == "failed"]
    assert failed and all(record.reason == "no site has a bias" for record in failed)
    assert len(failed) < 12


def test_broken_constraints_are_told_and_never_best(tmp_path):
    study = toy_study(tmp_path, trials=20)
    while (asked := study.next()) is not None:
        excess = {"parameters <= 5": float(asked.parameters["deltas"] == "lora")}
        if asked.number % 2:
            asked.refuse("not trained: too large", {"parameters": 6.0}, excess, 0.0) if excess["parameters <= 5"] else \
                asked.complete([1.0], {}, excess, 0.0)
        else:
            asked.complete([cost(asked.parameters)], {"parameters": 6.0}, excess, 0.0)
    for record in study.records():
        assert (record.state == "infeasible") == (record.parameters["deltas"] == "lora")
        assert record.state == "complete" or "parameters <= 5" in record.reason or "too large" in record.reason


def test_the_default_sampler_takes_every_ending_with_two_objectives(tmp_path):
    study = toy_study(tmp_path, objectives=(LOSS, SIZE), trials=24, pruner="median")
    while (asked := study.next()) is not None:
        ending, value = asked.number % 4, cost(asked.parameters)
        asked.told(value)
        if ending == 0:
            asked.complete([value, 1.0], {}, {"parameters <= 5": -1.0}, 0.0)
        elif ending == 1:
            asked.prune("behind", 0.0)
        elif ending == 2:
            asked.fail("a reason", 0.0)
        else:
            asked.complete([value, 9.0], {}, {"parameters <= 5": 4.0}, 0.0)
    assert states(study) == ["complete", "pruned", "failed", "infeasible"] * 6
    assert set(study.importance()) == {"loss", "parameters"}


def test_the_time_budget_counts_what_was_spent_before(tmp_path):
    slot = Slot.take(tmp_path)
    study = toy_study(tmp_path, time="10s", slot=slot)
    study.next().complete([1.0], {}, {}, 6.0)
    again = toy_study(tmp_path, time="10s", resume=True, slot=slot)
    again.next().complete([1.0], {}, {}, 6.0)
    assert again.next() is None
    assert toy_study(tmp_path, time="10s", resume=True, slot=slot, workers=2).next() is not None


def test_another_search_is_refused_with_what_differs(tmp_path):
    toy_study(tmp_path).next()
    with pytest.raises(RefusedError, match="--resume"):
        toy_study(tmp_path)
    with pytest.raises(RefusedError, match="another search") as error:
        toy_study(tmp_path, template=TEMPLATE | {"train": {"learning_rate": {"log": [1e-4, 1.0]}}}, resume=True)
    assert "space, train.learning_rate, log: here [0.0001, 1.0], there [0.0001, 0.1]" in str(error.value)


def test_a_database_and_a_study_of_somebody_else(tmp_path):
    url = f"sqlite:///{tmp_path / 'search.db'}"
    toy_study(tmp_path, storage=url).next().complete([1.0], {}, {}, 0.0)
    assert states(toy_study(tmp_path, storage=url, resume=True)) == ["complete"]
    optuna.create_study(study_name="foreign", storage=url).ask()
    with pytest.raises(RefusedError, match="not made by deltaloom"):
        toy_study(tmp_path, storage=url, name="foreign", resume=True)
    with pytest.raises(SettingsError, match="cannot be opened") as error:
        toy_study(tmp_path, storage="nonsense://user:secret@host/name")
    assert "secret" not in str(error.value)
    assert without_secret("postgresql://me:pass@host:1/x") == "postgresql://***@host:1/x"


@pytest.mark.parametrize(("given", "said"), [
    ({"workers": 3, "trials": 2}, "contradictory budgets"), ({"sampler": "tpee"}, "'tpe'"), ({"pruner": "medial"}, "'median'"),
    ({"time": "soon"}, "duration"), ({"objectives": ["loss", "loss"]}, "twice"), ({"trials": 0}, "trials"),
    ({"constraints": {"loss": "small"}}, "<= NUMBER"), ({"constraints": {"loss": "<= 3%"}}, "share"),
    ({"constraints": {"parameters": "<= 0"}}, "nothing meets"), ({"cohort": 0}, "cohort"), ({"cohorts": 3}, "unknown key")])
def test_wrong_search_settings(given, said):
    with pytest.raises(SettingsError, match=said):
        SearchSettings.parse(given, "search")


def test_bounds():
    most, least = bounds_of({"parameters": "<= 0.5%", "accuracy": ">=0.8"})
    assert most.of(1000).excess(6) == 1 and most.of(1000).excess(5) == 0
    assert least.excess(0.9) == pytest.approx(-0.1) and least.of(10) is least
    assert (str(most), str(least)) == ("parameters <= 0.5%", "accuracy >= 0.8")
