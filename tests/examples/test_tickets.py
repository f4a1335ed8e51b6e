import collections
import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

EXAMPLES = Path(__file__).parents[2] / "examples"


def script():
    spec = importlib.util.spec_from_file_location("make_tickets", EXAMPLES / "tickets" / "make_tickets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(part):
    text = (EXAMPLES / "tickets" / f"{part}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("part", ["train", "dev"])
def test_the_script_writes_the_same_bytes(part, tmp_path):
    script().main(tmp_path)
    assert (tmp_path / f"{part}.jsonl").read_bytes() == (EXAMPLES / "tickets" / f"{part}.jsonl").read_bytes()


def test_train_and_dev_share_no_sentence_of_meaning():
    made = script()
    for table in (made.CORES, made.DISTRACTORS):
        parts = {part: {re.sub(r"\W", "", text.lower()) for label in table for text in table[label][part]}
                 for part in ("train", "dev")}
        assert parts["train"].isdisjoint(parts["dev"])


def test_labels_are_balanced_and_texts_unique_and_of_ordinary_length():
    for part, each in (("train", 100), ("dev", 30)):
        counts = collections.Counter(row["label"] for row in rows(part))
        assert len(counts) == 6 and set(counts.values()) == {each}
    texts = [row["text"] for part in ("train", "dev") for row in rows(part)]
    assert len(set(texts)) == len(texts)
    assert all(8 <= len(text.split()) <= 60 for text in texts)


def test_counting_words_is_not_enough():
    train, dev = rows("train"), rows("dev")
    words = CountVectorizer()
    model = LogisticRegression(C=10, max_iter=2000)
    model.fit(words.fit_transform([row["text"] for row in train]), [row["label"] for row in train])
    assert model.score(words.transform([row["text"] for row in dev]), [row["label"] for row in dev]) < 0.75


def test_the_run_file_names_files_that_exist():
    run = yaml.safe_load((EXAMPLES / "tickets.yaml").read_text(encoding="utf-8"))
    for key in ("train", "eval"):
        assert (EXAMPLES / run["data"][key]).is_file()
