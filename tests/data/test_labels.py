from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaloom.data.labels import LabelMap, balanced_weights, check_known, counts, split
from deltaloom.data.rows import PlainRow, PromptRow, TextRow, TokensRow
from deltaloom.errors import DataError


def texts(labels):
    return [TextRow(f"a.jsonl:{index + 1}", f"text {index}", None, label) for index, label in enumerate(labels)]


def test_order_does_not_depend_on_rows_and_numbers_sort_as_numbers():
    assert LabelMap.of(["b", "a", "b"]).names == LabelMap.of(["a", "b"]).names == ("a", "b")
    assert LabelMap.of(["10", "9", "0", "-1"]).names == ("-1", "0", "9", "10")
    assert LabelMap.of(["10", "9", "x"]).names == ("10", "9", "x")


def test_json_and_back_and_damage_is_refused():
    labels = LabelMap(("b", "ä"))
    assert LabelMap.from_json(labels.to_json()) == labels
    assert labels.index("ä") == 1 and labels.indices(["ä", "b"]) == [1, 0]
    for text in ("{}", "[", "[1]", '["a", "a"]', "[]", "[" * 100_000, '"a"'):
        with pytest.raises(DataError):
            LabelMap.from_json(text)


def test_unknown_labels_are_listed_with_their_places():
    with pytest.raises(DataError, match="labels that the training rows do not have") as caught:
        check_known([*texts(["a", "c", "c"]), TokensRow("b.jsonl:9", ("x",), ("B-Y",))], LabelMap(("a",)))
    assert "'c' in 2 places: a.jsonl:2, a.jsonl:3" in str(caught.value) and "'B-Y' in 1 place: b.jsonl:9" in str(caught.value)
    check_known(texts(["a"]), LabelMap(("a", "b")))


def test_balanced_weights_make_classes_equal():
    rows, labels = texts(["a"] * 6 + ["b"] * 2), LabelMap(("a", "b"))
    weights = balanced_weights(rows, labels)
    assert weights[0] * 6 == pytest.approx(weights[1] * 2)
    assert sum(weights[labels.index(row.label)] for row in rows) == pytest.approx(len(rows))
    assert list(counts(rows)) == ["a", "b"]


@settings(max_examples=200, deadline=None)
@given(labels=st.lists(st.sampled_from("abcd"), min_size=2, max_size=60), fraction=st.floats(0.01, 0.5), seed=st.integers(0, 5))
def test_split_keeps_every_row_once_and_every_class_on_both_sides(labels, fraction, seed):
    rows = texts(labels)
    train, held = split(rows, fraction, seed)
    assert sorted([*train, *held], key=rows.index) == rows
    assert list(train) == sorted(train, key=rows.index)
    for name, count in Counter(labels).items():
        if count >= 2:
            assert name in counts(train) and name in counts(held)
        else:
            assert name in counts(train)
    assert split(rows, fraction, seed) == (train, held)
    classes = len(set(labels))
    assert abs(len(held) - fraction * len(rows)) <= classes + 1


def test_seeds_differ_and_shares_are_kept():
    rows = texts(["a"] * 800 + ["b"] * 200)
    train, held = split(rows, 0.1, 0)
    assert counts(held) == {"a": 80, "b": 20} and split(rows, 0.1, 1)[1] != held
    assert len(train) == 900
    many = texts([f"class {index % 20}" for index in range(300)])  # 1.5 rows of each: rounding is not always up
    assert len(split(many, 0.1, 0)[1]) == 30


def test_rows_with_the_same_prompt_stay_together():
    rows = [PromptRow(f"a:{index}", f"prompt {index // 4}", f"c {index}") for index in range(200)]
    train, held = split(rows, 0.2, 0)
    assert not {row.prompt for row in train} & {row.prompt for row in held}
    assert 40 <= len(held) <= 44
    same = [PlainRow(f"a:{index}", "same") for index in range(10)]
    assert len(split(same, 0.2, 0)[1]) == 2
    with pytest.raises(DataError):
        split(same[:1], 0.2, 0)
