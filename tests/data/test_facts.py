import json

from hypothesis import given
from hypothesis import strategies as st

from deltaloom.data.encode import Example, encode_causal, encode_seq2seq, encode_texts
from deltaloom.data.facts import _ids, _vocabulary, data_facts, overlap, segments
from deltaloom.data.labels import LabelMap
from deltaloom.data.read import Rows
from deltaloom.data.rows import ChatRow, Message, PlainRow, PromptRow, TextRow
from tests.toy_tokenizers import byte_level, unigram, word_piece

LABELS = LabelMap(("bad", "good"))


TOKENIZER = word_piece()


def facts_of(texts, held=(), max_length=64):
    tokenizer = TOKENIZER
    train, evaluation = (Rows(tuple(TextRow(f"{name}:{index}", text, None, label) for index, (text, label) in enumerate(pairs)),
                              "text-label", "text-label") for name, pairs in (("a", texts), ("b", held)))
    return data_facts(train, encode_texts(train.rows, tokenizer, max_length, LABELS), evaluation,
                      encode_texts(evaluation.rows, tokenizer, max_length, LABELS), tokenizer=tokenizer, labels=LABELS)


def test_counts_of_rows_labels_duplicates_contradictions_and_overlap():
    facts = facts_of([("the film", "good"), ("the film", "good"), ("the film", "bad"), ("is bad", "bad")],
                     [("the film", "good"), ("two", "good")])
    assert (facts["rows"], facts["eval_rows"], facts["duplicates"], facts["contradictions"], facts["overlap"]) == (4, 2, 1, 1, 1)
    assert facts["labels"] == {"bad": 2, "good": 2} and facts["eval_labels"] == {"good": 2}
    assert facts["lengths"]["p0"] <= facts["lengths"]["p50"] <= facts["lengths"]["p100"]
    words = " | ".join(facts["warnings"])
    assert "1 of 2 evaluation rows have the input" in words and "1 of 4 training rows repeat" in words
    assert "labels without an evaluation row: bad" in words and "several labels" in words
    assert json.loads(json.dumps(facts)) == facts


def test_cuts_are_a_warning_and_clean_data_has_none():
    facts = facts_of([("the film is good and the film is bad", "good"), ("two", "bad")], max_length=5)
    assert facts["truncated_rows"] == 1 and facts["truncated_tokens"] > 0
    assert "data.max_length cuts 1 of 2" in facts["warnings"][0]
    assert facts_of([("the film", "good"), ("two", "bad")])["warnings"] == []


def test_first_rows_show_what_is_learned():
    tokenizer = byte_level()
    chat = ChatRow("a:2", (Message("user", "u"), Message("assistant", "a")))
    rows = Rows((PromptRow("a:1", "the film is", "good"), chat), "x", "x")
    facts = data_facts(rows, encode_causal(rows.rows, tokenizer, 200), tokenizer=tokenizer)
    assert facts["first_rows"][0]["segments"] == [{"text": "the film is", "learned": False},
                                                  {"text": " good<|im_end|>", "learned": True}]
    assert facts["first_rows"][1]["segments"][-1] == {"text": "a<|im_end|>", "learned": True}
    assert facts["open_ends"] == 0 and facts["learned_tokens"] > 0
    pair = unigram()
    rows = Rows((PromptRow("a:1", "the film", "is good"),), "x", "x")
    shown = data_facts(rows, encode_seq2seq(rows.rows, pair, 64), tokenizer=pair)["first_rows"][0]["segments"]
    assert [part["learned"] for part in shown] == [False, True] and shown[1]["text"] == "is good</s>"
    assert facts_of([("the film", "good")])["first_rows"][0]["target"] == "good (class 1)"


def test_a_template_without_an_end_token_is_a_warning():
    tokenizer = byte_level("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
                           "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    rows = Rows((ChatRow("a:2", (Message("user", "u"), Message("assistant", "a"))),), "x", "x")
    examples = encode_causal(rows.rows, tokenizer, 200)
    assert segments(examples[0], tokenizer)[-1] == {"text": " a", "learned": True}  # byte-level BPE joins the space to the word
    facts = data_facts(rows, examples, tokenizer=tokenizer)
    assert facts["open_ends"] == 1 and "does not learn to stop" in facts["warnings"][0]
    cut = encode_causal([PlainRow("a:1", "the film is good")], tokenizer, 4)  # a cut row is counted as that alone
    assert data_facts(Rows((PlainRow("a:1", "the film is good"),), "x", "x"), cut, tokenizer=tokenizer)["open_ends"] == 0


@given(st.sets(st.integers(0, 5000)))
def test_vocabulary_is_a_bit_for_each_id(ids):
    vocabulary = _vocabulary([Example(0, sorted(ids), None, len(ids))])
    assert _ids(vocabulary) == ids and vocabulary["size"] == len(ids)


def test_overlap_of_two_data_sets():
    old, new = facts_of([("the film", "good")]), facts_of([("the film", "good"), ("is", "bad")])
    assert overlap(old, old) == {"known_tokens": 1.0, "new_tokens": 0, "new_labels": [], "known_labels": 1.0}
    found = overlap(old, new)
    assert 0 < found["known_tokens"] < 1 and found["new_labels"] == ["bad"] and found["known_labels"] == 0.5
    assert overlap(new, old)["known_tokens"] == 1.0
