"""Run files: what is read, what overrides do, origins; and that nothing but our own errors comes out of any text."""

import copy
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltaloom.errors import DeltaloomError, SettingsError
from deltaloom.jobs.prepare import parse_parts
from deltaloom.jobs.runfile import apply_override, parse_run, read_run_file, read_yaml, resolved_yaml

GOOD = {"model": "m", "task": "causal-lm", "data": {"train": "a.jsonl"}, "deltas": [{"method": "lora", "rank": 4}],
        "train": {"learning_rate": 1e-3}, "seed": 3}
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize(("text", "value"), [
    ("5e-4", 5e-4), ("1.0e-3", 1e-3), ("-.5E+2", -50.0), ("3", 3), ("true", True), ("null", None), ("''", ""),
    ("2024-01-01", "2024-01-01"),
    ("[a, 1e2]", ["a", 100.0]), ("{a: {b: 1}}", {"a": {"b": 1}}), ("e5", "e5"), ("{1: x}", {"1": "x"}), ("", None),
])
def test_values_are_read_as_people_mean_them(text, value):
    found = read_yaml(text, "here")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["a: 1\na: 2", "{a: {b: 1, b: 1}}", "? [a]\n: 1", "!!set {a}", "!!binary aGk=", "!!int ''",
                                  "!!bool maybe", "a: *b", "\x00", '"\\ud800"', "[" * 200 + "]" * 200, "!!float x", "a: &a [*a]",
                                  "!!python/name:os.system ''", "!!timestamp x"])
def test_what_is_no_plain_value_is_refused(text):
    with pytest.raises(SettingsError, match=r"^here.*YAML"):
        read_yaml(text, "here")


def test_overrides_set_values_anywhere_and_say_so(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    run = read_run_file(path, ["deltas.0.rank=7", "train.optimizer=sgd", "log.tensorboard=true", "data={train: b.jsonl}"])
    assert run.file.deltas[0] == {"method": "lora", "rank": 7} and run.file.train == {"learning_rate": 1e-3, "optimizer": "sgd"}
    assert run.file.log.tensorboard and run.file.data == {"train": "b.jsonl"}
    assert (run.name, run.base) == ("a", tmp_path)
    assert run.origins["deltas.0.rank"] == run.origins["data"] == "flag" and run.origins["deltas.0.method"] == "file"
    assert "data.train" not in run.origins
    sections = {"data": {"train": "b.jsonl"}, "seed": 3, "log": {"tensorboard": True}, "x": 1}
    again = yaml.safe_load(resolved_yaml(sections, run.origins))
    assert again["origins"] == {"data.train": "flag", "seed": "file", "log.tensorboard": "flag", "x": "default"}


def test_a_mapping_of_a_library_user_stays_as_it_is():
    values = copy.deepcopy(GOOD)
    assert parse_run(values, ["seed=9", "deltas.0.rank=1"], base=Path()).file.seed == 9
    assert values == GOOD


@pytest.mark.parametrize("override", ["", "a", "=1", "seed", "a.b=1", "deltas.1=3", "deltas.x=3", "deltas.²=3", "deltas.-1=3",
                                      "model.x.y=[", "train..x=1", "deltas.99999999999999999999.rank=1"])
def test_overrides_that_cannot_be_applied(override):
    with pytest.raises(SettingsError):
        parse_run(GOOD, [override], base=Path())


def test_all_problems_of_a_section_come_together():
    run = parse_run(GOOD | {"train": {"learning_rate": -1, "epochs": 0, "warm": 1}}, base=Path())
    with pytest.raises(SettingsError, match="train: 3 settings are wrong") as error:
        parse_parts(run)
    assert len(error.value.problems) == 3


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
TREES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.sampled_from(["model", "task", "data", "train", "deltas", "method", "lora", "rank", "from", "0", "log", "output"]) | PLAIN,
    inner, max_size=4), max_leaves=12)
KEYS = st.sampled_from(["model", "task", "data", "deltas", "train", "log", "seed", "output"])
PATHS = st.lists(KEYS | st.sampled_from(["0", "1", "rank", "", "²", "-"]) | st.text(max_size=3), max_size=4).map(".".join)
YAML_BITS = st.lists(st.sampled_from([*"[]{}:,-&*!?|>'\"#%@` \n\tab01.", "!!int ", "!!set ", "<<: ", "&a ", "*a", "model: ",
                                      "data: ", "\ufeff", "\u2028", "~"]), max_size=25).map("".join)
BYTES = st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode(errors="replace")) | YAML_BITS.map(str.encode)


@QUICK
@given(content=BYTES)
def test_no_file_brings_anything_but_our_errors(content, tmp_path):
    (tmp_path / "a.yaml").write_bytes(content)
    try:
        parse_parts(read_run_file(tmp_path / "a.yaml"))
    except DeltaloomError as error:
        assert str(error)


@QUICK
@given(values=st.dictionaries(KEYS, TREES, max_size=6), overrides=st.lists(st.tuples(PATHS, YAML_BITS), max_size=2))
def test_no_mapping_brings_anything_but_our_errors(values, overrides):
    try:
        parse_parts(parse_run(GOOD | values, [f"{path}={text}" for path, text in overrides], base=Path()))
    except DeltaloomError as error:
        assert str(error)


@QUICK
@given(values=TREES.filter(lambda value: isinstance(value, dict)), path=PATHS, value=PLAIN)
def test_an_override_is_applied_or_refused(values, path, value):
    try:
        key = apply_override(values, f"{path}={yaml.safe_dump(value)}")
    except DeltaloomError:
        return
    place = values
    for part in key.split("."):
        place = place[int(part)] if isinstance(place, list) else place[part]
    assert place == read_yaml(yaml.safe_dump(value), "value") or place != place
