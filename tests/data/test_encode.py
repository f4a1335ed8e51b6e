import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaloom.data.encode import (
    IGNORED,
    encode_causal,
    encode_prompts,
    encode_seq2seq,
    encode_texts,
    encode_words,
    joined,
)
from deltaloom.data.labels import LabelMap
from deltaloom.data.rows import ChatRow, Message, PlainRow, PromptRow, TextRow, TokensRow
from deltaloom.errors import DataError
from tests.toy_tokenizers import FORGETFUL, byte_level, unigram, word_piece

BYTES, WITH_BOS = byte_level(), byte_level(bos=True)
CHAT = ChatRow("a:1", (Message("user", "What is two and two?"), Message("assistant", "It is four.\n#### 4"),
                       Message("user", " And three? "), Message("assistant", "Three."), Message("user", "Thanks")))


def learned(example, tokenizer):
    return tokenizer.decode([label for label in example.labels if label != IGNORED])


@pytest.mark.parametrize(("prompt", "completion", "text"), [
    ("a", "b", "a b"),
    ("a ", "b", "a b"), ("a", " b", "a b"), ("a\n", "b", "a\nb"), ("a", "\nb", "a\nb"), ("a  ", " b", "a   b")])
def test_prompt_and_completion_are_joined_by_one_space_unless_either_brings_white_space(prompt, completion, text):
    assert joined(prompt, completion)[0] == text


@pytest.mark.parametrize("bos", [False, True])
def test_only_the_completion_and_eos_are_learned(bos):
    tokenizer = byte_level(bos=bos)
    [example] = encode_causal([PromptRow("a:1", "name[Aromi]", "Aromi is good.")], tokenizer, 64)
    assert learned(example, tokenizer) == " Aromi is good.<|im_end|>"
    assert tokenizer.decode(example.input_ids) == "<s>" * bos + "name[Aromi] Aromi is good.<|im_end|>"
    assert example.labels[:example.prompt_length] == [IGNORED] * example.prompt_length
    assert example.labels[example.prompt_length:] == example.input_ids[example.prompt_length:]
    assert example.length == len(example.input_ids) == len(example.labels) and example.cut == 0


def test_eos_is_not_written_twice():
    tokenizer = unigram()
    [example] = encode_causal([PromptRow("a:1", "the film", "is good")], tokenizer, 64)
    assert example.input_ids.count(tokenizer.eos_token_id) == 1
    assert learned(example, tokenizer).strip() == "is good</s>"
    assert encode_prompts([PromptRow("a:1", "the film")], tokenizer)[0] == example.input_ids[:example.prompt_length]


WORD = st.text(alphabet="ab é\n.日", min_size=1, max_size=8).filter(lambda text: text.strip())


@settings(max_examples=150, deadline=None)
@given(prompt=WORD, completion=WORD, bos=st.booleans())
def test_generation_starts_from_the_tokens_that_training_saw(prompt, completion, bos):
    row, tokenizer = PromptRow("a:1", prompt, completion), WITH_BOS if bos else BYTES
    [example] = encode_causal([row], tokenizer, 100)
    text, start = joined(prompt, completion)
    assert tokenizer.decode(example.input_ids) == "<s>" * bos + text + "<|im_end|>"
    assert completion in learned(example, tokenizer)
    if not (prompt.endswith("\n") or completion[0].isspace()):
        assert encode_prompts([row], tokenizer)[0] == example.input_ids[:example.prompt_length]
        assert learned(example, tokenizer) == text[start:] + "<|im_end|>"


def test_plain_text_is_learned_whole_but_for_what_nothing_predicts():
    [example] = encode_causal([PlainRow("a:1", "the film is good")], BYTES, 64)
    assert example.labels[0] == IGNORED and example.labels[1:] == example.input_ids[1:]
    assert example.input_ids[-1] == BYTES.eos_token_id


def test_chats_learn_the_assistant_with_its_end_token_alone():
    [example] = encode_causal([CHAT], BYTES, 400)
    assert learned(example, BYTES) == "It is four.\n#### 4<|im_end|>Three.<|im_end|>"
    text = BYTES.decode(example.input_ids)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("Three.<|im_end|>")
    whole = BYTES.apply_chat_template([{"role": turn.role, "content": turn.content} for turn in CHAT.messages], tokenize=False)
    assert whole.startswith(text)


def test_chat_prompts_are_where_the_answer_starts():
    row = ChatRow("a:1", CHAT.messages[:2])
    [example] = encode_causal([row], BYTES, 400)
    assert encode_prompts([row], BYTES)[0] == example.input_ids[:example.prompt_length]
    assert encode_prompts([ChatRow("a:1", CHAT.messages[:1])], BYTES)[0] == example.input_ids[:example.prompt_length]


def test_rows_of_different_kinds_keep_their_order():
    rows = [PlainRow("a:1", "the film"), CHAT, PromptRow("a:3", "p", "c"), CHAT]
    examples = encode_causal(rows, byte_level(bos=True), 400)
    assert [example.row for example in examples] == [0, 1, 2, 3]
    assert examples[1].input_ids == examples[3].input_ids == encode_causal([CHAT], BYTES, 400)[0].input_ids
    assert examples[0].input_ids[0] == 0


def test_many_rows_are_the_same_as_one_by_one():
    rows = [PromptRow(f"a:{index}", f"p {index}", f"c {index * 7}") for index in range(2100)]
    together = encode_causal(rows, BYTES, 64)
    for index in (0, 999, 1000, 2099):
        assert together[index].input_ids == encode_causal([rows[index]], BYTES, 64)[0].input_ids


def test_a_template_that_rewrites_the_past_is_refused_with_the_reason():
    with pytest.raises(DataError, match=r"a:1: the chat template writes turn 1 differently"):
        encode_causal([CHAT], byte_level(FORGETFUL), 400)
    assert encode_causal([ChatRow("a:1", CHAT.messages[:2])], byte_level(FORGETFUL), 400)


def test_a_template_that_refuses_names_the_row():
    with pytest.raises(DataError, match="a:1: the template refuses: no such roles"):
        encode_causal([CHAT], byte_level("{{ raise_exception('no such roles') }}"), 400)
    with pytest.raises(DataError, match="no chat template"):
        encode_causal([CHAT], byte_level(None), 400)
    with pytest.raises(DataError, match="no end-of-sequence token"):
        encode_causal([PromptRow("a:1", "p", "c")], byte_level(eos=None), 400)


def test_cuts_are_counted_and_rows_that_teach_nothing_are_refused():
    row = PromptRow("a:1", "the film is", "good and good and good")
    [whole] = encode_causal([row], BYTES, 64)
    [cut] = encode_causal([row], BYTES, whole.length - 3)
    assert cut.input_ids == whole.input_ids[:-3] and cut.cut == 3 and cut.length == whole.length - 3
    assert cut.labels == whole.labels[:-3]
    with pytest.raises(DataError, match=r"a:1: max_length .* cuts all that is learned \(of \d+ tokens\)") as caught:
        encode_causal([row, PlainRow("a:2", "good")], BYTES, whole.prompt_length)
    assert "a:2" not in str(caught.value)
    with pytest.raises(DataError, match="a:7: no completion"):
        encode_causal([PromptRow("a:7", "p")], BYTES, 64)


def test_sequence_to_sequence_ends_both_sides_with_eos():
    tokenizer = unigram()
    rows = [PromptRow("a:1", "the film", "is good"), PromptRow("a:2", "the film is good and the film is bad", "the film")]
    first, second = encode_seq2seq(rows, tokenizer, 64)
    assert tokenizer.decode(first.input_ids) == "the film</s>" and tokenizer.decode(first.labels) == "is good</s>"
    assert first.answer_ids == first.labels and first.length == len(first.input_ids) + len(first.labels)
    short = encode_seq2seq(rows, tokenizer, 6)[1]
    assert len(short.input_ids) == 6 and short.input_ids[-1] == tokenizer.eos_token_id
    assert short.cut == len(second.input_ids) - 6 + max(0, len(second.labels) - 6)
    with pytest.raises(DataError, match="a:1: no completion"):
        encode_seq2seq([PromptRow("a:1", "p")], tokenizer, 64)


def test_texts_and_pairs():
    tokenizer, labels = word_piece(), LabelMap(("bad", "good"))
    [single] = encode_texts([TextRow("a:1", "the film is good", None, "good")], tokenizer, 64, labels)
    assert tokenizer.decode(single.input_ids) == "[CLS] the film is good [SEP]" and single.labels == 1
    [pair] = encode_texts([TextRow("a:1", "the film", "is bad", "bad")], tokenizer, 64, labels)
    assert tokenizer.decode(pair.input_ids) == "[CLS] the film [SEP] is bad [SEP]" and pair.labels == 0
    assert pair.token_type_ids == [0] * (pair.input_ids.index(3) + 1) + [1] * (len(pair.input_ids) - pair.input_ids.index(3) - 1)
    [cut] = encode_texts([TextRow("a:1", "the film is good and the film is bad", None, None)], tokenizer, 6, labels)
    assert len(cut.input_ids) == 6 and cut.input_ids[-1] == 3 and cut.cut > 0 and cut.labels is None
    [number] = encode_texts([TextRow("a:1", "the film", None, 1.5)], tokenizer, 64, None)
    assert number.labels == 1.5
    with pytest.raises(DataError, match="a:2: no 'text_pair'"):
        encode_texts([TextRow("a:1", "x", "y", "bad"), TextRow("a:2", "x", None, "bad")], tokenizer, 64, labels)


@pytest.mark.parametrize("tokenizer", [BYTES, word_piece(), unigram()], ids=["bytes", "pieces", "unigram"])
def test_tags_stand_at_the_first_token_of_each_word(tokenizer):
    labels = LabelMap(("B-X", "O"))
    row = TokensRow("a:1", ("Aromi", "is", "assistantly", "good"), ("B-X", "O", "O", "B-X"))
    [example] = encode_words([row], tokenizer, 64, labels)
    assert [example.labels[place] for place in example.words] == [0, 1, 1, 0]
    assert sum(label != IGNORED for label in example.labels) == 4
    starts = [*example.words, None]
    for word, start, stop in zip(row.tokens, starts, starts[1:], strict=False):
        seen = tokenizer.decode(example.input_ids[start:stop], skip_special_tokens=True).strip()
        assert seen.lower() == word.lower() or "[UNK]" in tokenizer.decode(example.input_ids[start:stop])
    [cut] = encode_words([row], tokenizer, 5, labels)
    assert cut.words[-1] is None and cut.cut > 0 and len(cut.input_ids) == 5


def test_words_without_a_token_and_rows_without_tags():
    [example] = encode_words([TokensRow("a:1", ("the", "\u200b", "film"))], word_piece(), 64, LabelMap(("O",)))
    assert example.words[1] is None and example.words[0] == 1 and example.labels is None
