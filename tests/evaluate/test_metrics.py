import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from deltaloom.evaluate.metrics import bootstrap, class_table, confusion, entities, is_bio, macro_f1, pearson, ranks, spearman

CLASSES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None)
@given(pairs=CLASSES)
def test_class_metrics_equal_those_of_scikit_learn(pairs):
    truth, guess = np.array(pairs).T
    assert macro_f1(truth, guess, 4) == pytest.approx(sk.f1_score(truth, guess, average="macro", zero_division=0))
    assert (confusion(truth, guess, 4) == sk.confusion_matrix(truth, guess, labels=range(4))).all()
    precision, recall, f1, support = sk.precision_recall_fscore_support(truth, guess, labels=range(4), zero_division=np.nan)
    for index, row in enumerate(class_table(truth, guess, list("abcd"))):
        assert (row["class"], row["support"]) == ("abcd"[index], support[index])
        assert row["precision"] == pytest.approx(precision[index], nan_ok=True)
        assert row["recall"] == pytest.approx(recall[index], nan_ok=True)
        assert row["f1"] == pytest.approx(f1[index], nan_ok=True)


@settings(max_examples=100, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=30))
def test_correlations_equal_those_of_scipy(pairs):
    truth, guess = np.array(pairs, dtype=float).T
    assert (ranks(truth) == stats.rankdata(truth)).all()
    if len(set(truth)) > 1 and len(set(guess)) > 1:
        assert pearson(truth, guess) == pytest.approx(stats.pearsonr(truth, guess).statistic)
        assert spearman(truth, guess) == pytest.approx(stats.spearmanr(truth, guess).statistic)
    else:
        assert math.isnan(pearson(truth, guess))


@pytest.mark.parametrize(("tags", "found"), [
    ("O O", set()), ("B-X", {("X", 0, 1)}), ("B-X I-X O", {("X", 0, 2)}), ("B-X B-X", {("X", 0, 1), ("X", 1, 2)}),
    ("B-X I-Y", {("X", 0, 1), ("Y", 1, 2)}), ("O I-X I-X", {("X", 1, 3)}), ("I-X B-X I-X", {("X", 0, 1), ("X", 1, 3)}),
    ("B-X-Y I-X-Y", {("X-Y", 0, 2)})])
def test_entities_are_read_as_conlleval_does(tags, found):
    assert entities(tags.split()) == found
    assert entities(["B-X", None, "I-X"]) == {("X", 0, 1), ("X", 2, 3)}


def test_bio_tags_are_told_from_others():
    assert is_bio(["O", "B-X", "I-X"]) and is_bio(["B-X", "O"])
    for names in (["O"], ["B-X", "I-X"], ["NOUN", "O"], ["O", "B-"], ["O", "X-B"]):
        assert not is_bio(names)


def test_bootstrap_is_seeded_and_near_the_known_interval():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    arrays = {"x": values}
    low, high = bootstrap(arrays, lambda a: {"mean": float(a["x"].mean())}, seed=1)["mean"]
    half = 1.96 * values.std() / 20
    assert (low, high) == (pytest.approx(values.mean() - half, abs=0.05), pytest.approx(values.mean() + half, abs=0.05))
    assert bootstrap(arrays, lambda a: {"mean": float(a["x"].mean())}, seed=1)["mean"] == (low, high)
    assert bootstrap(arrays, lambda a: {"mean": float(a["x"].mean())}, seed=2)["mean"] != (low, high)
    assert all(math.isnan(value) for value in bootstrap(arrays, lambda a: {"never": math.nan}, resamples=5)["never"])


def test_bootstrap_keeps_the_arrays_of_a_row_together():
    arrays = {"x": np.arange(20.0), "y": np.arange(20.0) * 2}
    found = bootstrap(arrays, lambda a: {"same": float((a["y"] == 2 * a["x"]).all()), "last": float(a["x"].max()),
                                         "rows": float(len(a["x"]))}, resamples=50)
    assert found["same"] == (1.0, 1.0) and found["last"][1] == 19.0 and found["rows"] == (20.0, 20.0)
