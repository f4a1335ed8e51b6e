"""Laws of the space of a search."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaloom.errors import SettingsError
from deltaloom.jobs.runfile import parse_run
from deltaloom.jobs.searchfile import KEYS
from deltaloom.search.space import Choice, Interval, open_places, parse_space

PLAIN = st.one_of(st.integers(-3, 3), st.booleans(), st.sampled_from(["a", "b", ""]), st.none(), st.floats(-1, 1))
INTERVALS = st.one_of(
    st.tuples(st.floats(1e-6, 1), st.floats(1.5, 10)).map(lambda ends: {"log": list(ends)}),
    st.tuples(st.floats(-5, 0), st.floats(0.5, 5)).map(lambda ends: {"uniform": list(ends)}),
    st.tuples(st.integers(-3, 0), st.integers(1, 3)).map(lambda ends: {"int": list(ends)}))
FINITE = st.tuples(st.integers(0, 1), st.integers(2, 3)).map(lambda ends: {"int": list(ends)})


def choices(inside):
    return st.lists(inside, min_size=2, max_size=3, unique_by=lambda value: json.dumps(value, sort_keys=True)).map(
        lambda options: {"choice": options})


def trees(leaves):
    return st.recursive(leaves, lambda inside: st.one_of(
        choices(inside), st.lists(inside, max_size=2), st.dictionaries(st.sampled_from(["rank", "alpha", "method"]), inside,
                                                                      min_size=2, max_size=3)), max_leaves=6)


TREES, FINITE_TREES = trees(st.one_of(PLAIN, INTERVALS)), trees(st.one_of(PLAIN, FINITE))


def space_of(tree):
    return parse_space({"train": {"learning_rate": {"log": [0.1, 1]}, "tree": tree}})


def picker(seed, seen):
    generator = random.Random(seed)

    def pick(dimension):
        if isinstance(dimension, Choice):
            value = generator.choice(dimension.options).label
        elif dimension.kind == "int":
            value = generator.randint(int(dimension.low), int(dimension.high))
        else:
            value = generator.uniform(dimension.low, dimension.high)
        assert dimension.name not in seen, "one name, two dimensions"
        seen[dimension.name] = value
        return value
    return pick


@settings(deadline=None, max_examples=60)
@given(TREES, st.integers(0, 99))
def test_what_is_filled_in_has_no_open_value_and_is_found_again_by_its_parameters(tree, seed):
    space, parameters = space_of(tree), {}
    filled = space.fill(picker(seed, parameters))
    assert open_places(filled) == []
    assert space.values(parameters) == filled == json.loads(json.dumps(filled))
    assert set(parameters) <= {dimension.name for dimension in space.dimensions}


@settings(deadline=None, max_examples=60)
@given(TREES)
def test_names_are_unique_and_stable(tree):
    space = space_of(tree)
    names = [dimension.name for dimension in space.dimensions]
    assert len(set(names)) == len(names)
    again = parse_space(json.loads(json.dumps(space.values_as_written())))
    assert again == space and again.described() == space.described()


@settings(deadline=None, max_examples=60)
@given(FINITE_TREES)
def test_a_finite_space_is_tried_out_whole_and_once(tree):
    space = parse_space({"train": {"size": {"int": [1, 2]}, "tree": tree}})
    every = [json.dumps(parameters, sort_keys=True) for _, parameters in zip(range(300), space.assignments(), strict=False)]
    assert len(set(every)) == len(every)
    assert len(every) == min(300, space.size)


def test_the_names_of_a_readers_space():
    space = parse_space({"model": "m", "data": {}, "train": {"learning_rate": {"log": [1e-4, 1e-2]}}, "deltas": {"choice": [
        [{"method": "lora", "rank": {"choice": [2, 4]}}], [{"method": "prefix", "length": {"int": [1, 4]}}, {"method": "lora"}],
        [{"method": "bitfit"}]]}})
    assert [dimension.name for dimension in space.dimensions] == [
        "train.learning_rate", "deltas", "deltas[lora].0.rank", "deltas[prefix+lora].0.length"]
    assert [option.label for option in space.dimensions[1].options] == ["lora", "prefix+lora", "bitfit"]
    assert space.dimensions[0] == Interval("train.learning_rate", "log", 1e-4, 1e-2)
    assert space.size is None
    parameters = {"train.learning_rate": 0.001, "deltas": "lora", "deltas[lora].0.rank": "4"}
    assert space.values(parameters)["deltas"] == [{"method": "lora", "rank": 4}]
    assert space.settings(parameters) == {"train.learning_rate": 0.001, "deltas": "lora", "deltas[lora].0.rank": 4}
    with pytest.raises(SettingsError, match=r"deltas\[lora\]\.0\.rank"):
        space.values({"train.learning_rate": 0.001, "deltas": "lora"})


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000))
def test_every_sampled_run_file_is_one(seed):
    space = parse_space({"model": "m", "task": "causal-lm", "data": {"train": "a", "eval": "b"}, "seed": 1, "deltas": {"choice": [
        [{"method": "lora", "rank": {"int": [1, 8]}, "dropout": {"uniform": [0, 0.5]}}], [{"method": "bitfit"}]]},
        "train": {"learning_rate": {"log": [1e-5, 1.0]}, "batch_size": {"choice": [4, 8]}, "packing": {"choice": [True, False]}}})
    parse_run(space.fill(picker(seed, {})), base=__import__("pathlib").Path())
    assert "search" in KEYS


@pytest.mark.parametrize(("value", "said"), [
    ({"log": [0, 1]}, "log has no zero"), ({"log": [-1, 1]}, "log has no zero"), ({"log": [2, 1]}, "must be below"),
    ({"uniform": [1, 1]}, "must be below"), ({"uniform": [0]}, "two numbers"), ({"uniform": ["a", 1]}, "two numbers"),
    ({"uniform": 3}, "two numbers"), ({"int": [1, 2.5]}, "whole numbers"), ({"log": [True, 2]}, "two numbers"),
    ({"choice": [1]}, "at least two"), ({"choice": "ab"}, "at least two"), ({"choice": [[1], [1]]}, "twice"),
    ({"choice": [1, {"log": [0, 1]}]}, "log has no zero")])
def test_a_wrong_space_says_what_is_wrong_and_where(value, said):
    with pytest.raises(SettingsError, match=said) as error:
        parse_space({"train": {"learning_rate": value}})
    assert "train.learning_rate" in str(error.value)


@pytest.mark.parametrize("place", ["seed", "output", "task", "data.eval", "data.train", "data.max_length", "train.metric", "data",
                                   "train"])
def test_where_a_space_makes_no_sense(place):
    section, _, key = place.partition(".")
    with pytest.raises(SettingsError, match="cannot be searched"):
        parse_space({section: {key: {"int": [1, 2]}} if key else {"int": [1, 2]}})


def test_settled_values_are_no_space():
    values = {"log": {"tensorboard": True}, "data": {"columns": {"text": "choice"}}, "deltas": [{"method": "lora"}]}
    assert open_places(values) == []
    with pytest.raises(SettingsError, match="the space is empty"):
        parse_space(values)
