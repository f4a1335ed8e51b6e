import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltaloom.data.formats import FORMATS, Reading, choose, visible
from deltaloom.data.read import read_data, read_rows
from deltaloom.data.rows import ChatRow, Message, PlainRow, PromptRow, TextRow, TokensRow
from deltaloom.data.settings import NAMES as COLUMNS
from deltaloom.data.settings import DataSettings
from deltaloom.errors import DataError, DeltaloomError, SettingsError

LANGUAGE = ("prompt-completion", "messages", "alpaca", "sharegpt", "text")
CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]

TURNS = ChatRow("a.jsonl:1", (Message("system", "s"), Message("user", "u"), Message("assistant", "a")))


def rows_of(folder, records, accepts=LANGUAGE, numbers=False, need_targets=True, **settings):
    (folder / "a.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    return read_rows(["a.jsonl"], DataSettings(train="a.jsonl", **settings), folder, accepts=accepts, numbers=numbers,
                     need_targets=need_targets)


@pytest.mark.parametrize(("record", "row", "accepts"), [
    ({"text": "t", "label": "x"}, TextRow("a.jsonl:1", "t", None, "x"), ("text-label",)),
    ({"text": "t", "text_pair": "p", "label": True}, TextRow("a.jsonl:1", "t", "p", "true"), ("text-label",)),
    ({"text": "t", "label": 3}, TextRow("a.jsonl:1", "t", None, "3"), ("text-label",)),
    ({"prompt": "p", "completion": "c"}, PromptRow("a.jsonl:1", "p", "c"), LANGUAGE),
    ({"messages": CHAT}, TURNS, LANGUAGE),
    ({"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}], "system": "s"},
     TURNS, LANGUAGE),
    ({"text": "t"}, PlainRow("a.jsonl:1", "t"), LANGUAGE),
    ({"tokens": ["a", "b"], "tags": ["O", "B-X"]}, TokensRow("a.jsonl:1", ("a", "b"), ("O", "B-X")), ("tokens",)),
    ({"tokens": ["a", "b"], "ner_tags": [0, 1]}, TokensRow("a.jsonl:1", ("a", "b"), ("0", "1")), ("tokens",)),
    ({"tokens": ["a"], "labels": ["O"]}, TokensRow("a.jsonl:1", ("a",), ("O",)), ("tokens",)),
])
def test_formats_are_detected_by_their_columns(tmp_path, record, row, accepts):
    assert rows_of(tmp_path, [record], accepts).rows == (row,)


def test_alpaca_is_the_known_wording(tmp_path):
    found = rows_of(tmp_path, [{"instruction": "Add.", "input": "1 2", "output": "3"},
                               {"instruction": "Hi.", "input": "", "output": "Ho."}])
    first, second = found.rows
    assert found.format == "alpaca" and first.completion == "3"
    assert first.prompt.endswith("the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    assert second.prompt.endswith("the request.\n\n### Instruction:\nHi.\n\n### Response:\n") and "paired" not in second.prompt


def test_columns_that_nothing_reads_are_named(tmp_path):
    assert rows_of(tmp_path, [{"text": "t", "label": "x", "id": 1}], ("text-label", "text")).unused == ("id",)


def test_ambiguous_columns_are_an_error_that_names_the_key(tmp_path):
    record = {"prompt": "p", "completion": "c", "messages": CHAT}
    with pytest.raises(DataError, match=r"several formats.*data\.format"):
        rows_of(tmp_path, [record])
    assert rows_of(tmp_path, [record], format="messages").format == "messages"


def test_no_fitting_format_names_columns_and_the_next_step(tmp_path):
    with pytest.raises(DataError, match="look like prompt-completion") as caught:
        rows_of(tmp_path, [{"prompt": "p", "completion": "c"}], ("text-label",))
    assert "text-label: text, label" in str(caught.value)
    with pytest.raises(DataError, match=r"data\.columns: \{label: NAME_IN_THE_FILE\}"):
        rows_of(tmp_path, [{"text": "p", "rating": 1.0}], ("text-label",))
    with pytest.raises(DataError, match="does not suit this task"):
        rows_of(tmp_path, [{"text": "p"}], ("text-label",), format="messages")
    with pytest.raises(DataError, match="Did you mean 'completions'"):
        rows_of(tmp_path, [{"prompt": "p", "completions": "c"}], format="prompt-completion")


def test_detection_depends_on_nothing_but_names():
    columns = {"text", "label", "prompt"}
    assert choose("auto", columns, Reading(), ("text-label",)).name == "text-label"
    assert {choose("auto", list(order), Reading(), ("text", "text-label")).name
            for order in (["text", "label"], ["label", "text"])} == {"text-label"}
    assert visible({"mr", "ref"}, {"prompt": "mr", "completion": "ref"}) == {"prompt", "completion"}


def test_columns_are_renamed_and_missing_ones_named(tmp_path):
    found = rows_of(tmp_path, [{"text": "p", "label": "c"}], columns={"prompt": "text", "completion": "label"})
    assert found.rows == (PromptRow("a.jsonl:1", "p", "c"),) and found.unused == ()
    with pytest.raises(DataError, match=r"columns\.prompt names 'mrr'.*Did you mean 'mr'"):
        rows_of(tmp_path, [{"mr": "p", "completion": "c"}], columns={"prompt": "mrr"})


def test_templates_use_any_column_and_refuse_unknown_ones(tmp_path):
    record = {"mr": "p", "n": 3, "ref": "c"}
    columns = {"prompt": "mr", "completion": "ref"}
    [row] = rows_of(tmp_path, [record], columns=columns, template="Data ({n}): {prompt} {{x}}\nText:").rows
    assert row.prompt == "Data (3): p {x}\nText:"
    assert rows_of(tmp_path, [record], columns={"completion": "ref"}, template="{mr}").rows[0].prompt == "p"
    assert rows_of(tmp_path, [{"title": "t", "label": "x"}], ("text-label",), template="T: {title}").rows[0].text == "T: t"
    with pytest.raises(SettingsError, match=r"'promt'.*legal: completion, mr, n, prompt, ref.*Did you mean 'prompt'"):
        rows_of(tmp_path, [record], columns=columns, template="{promt}")
    for bad in ("{", "{0.x}", "{prompt!r}", "{prompt:>4}", "{}", "no field", "{prompt[0]}"):
        with pytest.raises(SettingsError, match=r"data\.template"):
            rows_of(tmp_path, [record], columns=columns, template=bad)
    with pytest.raises(SettingsError, match="chat template"):
        rows_of(tmp_path, [{"messages": CHAT}], template="{messages}")


@pytest.mark.parametrize(("record", "words", "accepts", "numbers"), [
    ({"text": "  ", "label": "x"}, "'text' is empty", ("text-label",), False),
    ({"text": None, "label": "x"}, "'text' is null", ("text-label",), False),
    ({"text": 5, "label": "x"}, "'text' must be text, got 5", ("text-label",), False),
    ({"text": "\ud800", "label": "x"}, "surrogate", ("text-label",), False),
    ({"text": "t", "lable": "x"}, "'label' is missing. Did you mean 'lable'", ("text-label",), False),
    ({"text": "t", "label": float("nan")}, "label is NaN", ("text-label",), False),
    ({"text": "t", "label": 1.5}, "regression", ("text-label",), False),
    ({"text": "t", "label": []}, "a label must be", ("text-label",), False),
    ({"text": "t", "label": ""}, "label is empty", ("text-label",), False),
    ({"text": "t", "label": float("nan")}, "label is nan", ("text-label",), True),
    ({"text": "t", "label": "much"}, "must be a number", ("text-label",), True),
    ({"text": "t", "label": True}, "must be a number", ("text-label",), True),
    ({"prompt": "p", "completion": ""}, "'completion' is empty", LANGUAGE, False),
    ({"tokens": ["a", "b"], "tags": ["O"]}, "as long as 'tokens'", ("tokens",), False),
    ({"tokens": ["a", ""], "tags": ["O", "O"]}, "list of words", ("tokens",), False),
])
def test_bad_rows_name_their_line_and_reason(tmp_path, record, words, accepts, numbers):
    good = {"text": "t", "label": 1, "prompt": "p", "completion": "c", "tokens": ["a"], "tags": ["O"]}
    good = {name: good[name] for name in FORMATS[accepts[0]].columns(Reading())}
    with pytest.raises(DataError, match=words) as caught:
        rows_of(tmp_path, [good, record], accepts, numbers)
    assert "a.jsonl:2" in str(caught.value) and "a.jsonl:1" not in str(caught.value)


@pytest.mark.parametrize(("turns", "words"), [
    ([], "a list of turns"), ("hi", "a list of turns"), ([3], r"messages\[0\] must be an object"),
    ([{"role": "usr", "content": "u"}], "role is 'usr'; legal: system, user, assistant, tool"),
    ([{"role": "user", "content": None}], "content must be text"),
    ([{"role": "user", "content": "u"}, {"role": "assistant", "tool_calls": [1]}], "calls of tools"),
    ([{"role": "user", "content": " "}], "content is empty"),
    ([{"role": "user", "content": "u"}, {"role": "system", "content": "s"}, *CHAT[2:]], "may only come first"),
    ([{"role": "assistant", "content": "a"}], "must be the user's"),
    ([{"role": "user", "content": "u"}], "no assistant turn"),
    ([{"role": "system", "content": "u"}], "must be the user's"),
])
def test_bad_chats_say_which_turn(tmp_path, turns, words):
    with pytest.raises(DataError, match=words):
        rows_of(tmp_path, [{"messages": CHAT}, {"messages": turns}])


def test_numbers_may_be_text_as_in_tables(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na,1.5\nb,-2\n")
    found = read_rows(["a.csv"], DataSettings(train="a.csv"), tmp_path, accepts=("text-label",), numbers=True)
    assert [row.label for row in found.rows] == [1.5, -2.0]


def test_targets_may_be_absent_for_predictions(tmp_path):
    assert rows_of(tmp_path, [{"prompt": "p"}], need_targets=False).rows == (PromptRow("a.jsonl:1", "p", None),)
    found = rows_of(tmp_path, [{"text": "t"}, {"text": "t", "label": "x"}], ("text-label",), need_targets=False)
    assert [row.label for row in found.rows] == [None, "x"]
    assert rows_of(tmp_path, [{"messages": CHAT[:2]}], need_targets=False).rows[0].asked[-1].content == "u"
    with pytest.raises(DataError):
        rows_of(tmp_path, [{"prompt": "p"}])


def test_files_are_concatenated_and_relative_to_the_run_file(tmp_path):
    for name in ("a", "b"):
        rows = [{"text": name, "label": "x"}, {"text": name * 2, "label": "y"}]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = DataSettings(train=["a.jsonl", "b.jsonl"], eval="b.jsonl", max_rows=3)
    data = read_data(settings, tmp_path, accepts=("text-label",))
    assert [row.text for row in data.train.rows] == ["a", "aa", "b"]
    assert [row.where for row in data.eval.rows] == ["b.jsonl:1", "b.jsonl:2"]
    absolute = read_data(DataSettings(train=str(tmp_path / "a.jsonl")), tmp_path / "elsewhere", accepts=("text-label",))
    assert len(absolute.train) == 2 and absolute.eval is None
    with pytest.raises(SettingsError, match=r"data\.train"):
        read_data(DataSettings(), tmp_path, accepts=("text-label",))


def test_bad_rows_of_all_files_come_together(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "t", "label": "x"}\n{')
    (tmp_path / "b.jsonl").write_text('{"text": "", "label": "x"}')
    with pytest.raises(DataError) as caught:
        read_data(DataSettings(train=["a.jsonl", "b.jsonl"]), tmp_path, accepts=("text-label",))
    assert "a.jsonl:2" in str(caught.value) and "b.jsonl:1" in str(caught.value)


LEAF = st.none() | st.booleans() | st.floats() | st.text(max_size=4) | st.integers() | st.sampled_from(["user", "gpt"])
VALUE = st.recursive(LEAF,
                     lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                         st.sampled_from(["role", "content", "from", "value", "bytes"]) | st.text(max_size=2), inner, max_size=3),
                     max_leaves=6)
NAMES = st.sampled_from(COLUMNS)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(st.dictionaries(NAMES, VALUE, max_size=4), min_size=1, max_size=3), numbers=st.booleans(),
       need_targets=st.booleans(), accepts=st.sampled_from([LANGUAGE, ("text-label",), ("tokens",), ("image",), tuple(FORMATS)]))
def test_no_record_raises_anything_but_our_errors(tmp_path, records, numbers, need_targets, accepts):
    try:
        for row in rows_of(tmp_path, records, accepts, numbers, need_targets).rows:
            assert isinstance(row.source, str) and isinstance(row.target, str)
    except DeltaloomError:
        pass
