import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaloom.data.batches import LEAST, collate, micro_batches, plan_steps
from deltaloom.data.encode import IGNORED, Example
from deltaloom.errors import SettingsError

LENGTHS = st.lists(st.integers(1, 300), min_size=0, max_size=300)


def flat(steps):
    return [index for step in steps for part in step for index in part]


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, size=st.integers(1, 40), seed=st.integers(0, 9), epoch=st.integers(0, 3), micro=st.integers(1, 4000))
def test_every_example_once_in_steps_of_the_asked_size(lengths, size, seed, epoch, micro):
    steps = plan_steps(lengths, batch_size=size, seed=seed, epoch=epoch, micro_tokens=micro)
    assert sorted(flat(steps)) == list(range(len(lengths)))
    sizes = [sum(map(len, step)) for step in steps]
    assert sum(sizes[index] != size for index in range(len(sizes))) <= 1 and all(0 < count <= size for count in sizes)
    for part in (part for step in steps for part in step):
        assert len(part) * max(lengths[index] for index in part) <= micro or len(part) == 1


@settings(max_examples=50, deadline=None)
@given(lengths=LENGTHS, tokens=st.integers(1, 3000), seed=st.integers(0, 9))
def test_steps_of_tokens_hold_at_most_that_many(lengths, tokens, seed):
    steps = plan_steps(lengths, batch_tokens=tokens, seed=seed)
    assert sorted(flat(steps)) == list(range(len(lengths)))
    for step in steps:
        held = flat([step])
        assert sum(lengths[index] for index in held) <= tokens or len(held) == 1


def test_plans_depend_on_seed_and_epoch_alone():
    lengths = [(index * 37) % 90 + 10 for index in range(500)]
    plan = plan_steps(lengths, batch_size=16, seed=1, epoch=0)
    torch.manual_seed(99)
    assert plan_steps(lengths, batch_size=16, seed=1, epoch=0) == plan
    assert plan_steps(lengths, batch_size=16, seed=2, epoch=0) != plan != plan_steps(lengths, batch_size=16, seed=1, epoch=1)
    code = ("from deltaloom.data.batches import plan_steps\n"
            "print(plan_steps([(i * 37) % 90 + 10 for i in range(500)], batch_size=16, seed=1, epoch=0))")
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "77"})
    assert other.stdout.strip() == str(plan)


def test_steps_have_little_padding_and_no_order_of_length():
    lengths = [(index * 7919) % 190 + 10 for index in range(4000)]
    steps = plan_steps(lengths, batch_size=16)
    padded = sum(len(part) * max(lengths[index] for index in part) for step in steps for part in step)
    assert 1 - sum(lengths) / padded < 0.05
    means = [sum(lengths[index] for index in flat([step])) / 16 for step in steps[:100]]
    rising = sum(first < second for first, second in pairwise(means))
    assert 30 < rising < 70


def test_a_micro_batch_is_cut_only_where_padding_is_wasted_and_parts_stay_large():
    lengths = [100] * 8 + [30] * 16
    assert [sorted(part) for part in micro_batches(range(24), lengths, 10_000)] == [list(range(8)), list(range(8, 24))]
    assert len(micro_batches(range(8), [100] * 8, 10_000)) == 1
    assert len(micro_batches(range(6), [100, 100, 10, 10, 10, 10], 10_000)) == 1  # halves would be too small
    assert len(micro_batches(range(28), [100] * 8 + [10] * 20, 10_000)) == 1  # so would the second one
    for part in micro_batches(range(24), lengths, 10_000):
        assert sum(lengths[index] for index in part) >= LEAST
    with pytest.raises(SettingsError):
        plan_steps([1], batch_size=2, batch_tokens=2)
    with pytest.raises(SettingsError):
        plan_steps([1], batch_size=0)


def test_causal_batches_keep_eos_that_is_also_the_pad_and_have_no_mask():
    first = Example(4, [5, 6, 2], [IGNORED, 6, 2], 3, prompt_length=1)
    second = Example(7, [5, 6, 7, 2, 2], [IGNORED, IGNORED, 7, 2, 2], 5)
    batch = collate([first, second], 2, "causal")
    assert batch.inputs.keys() == {"input_ids"}
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 2, 2, 2], [5, 6, 7, 2, 2]]
    assert batch.labels.tolist() == [[-100, 6, 2, -100, -100], [-100, -100, 7, 2, 2]]
    assert (batch.rows, batch.tokens, batch.padded_tokens, batch.lengths.tolist()) == ([4, 7], 8, 10, [3, 5])
    assert batch.to("cpu").inputs["input_ids"].equal(batch.inputs["input_ids"])
    assert batch.places.tolist() == [0, 1, 6, 7, 8]  # flat positions before a label, none across rows


def test_masks_come_from_lengths():
    examples = [Example(0, [3, 0, 0], 1, 3, token_type_ids=[0, 1, 1]), Example(1, [3], 0, 1, token_type_ids=[0])]
    batch = collate(examples, 0, "class")
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.inputs["token_type_ids"].tolist() == [[0, 1, 1], [0, 0, 0]]
    assert batch.labels.tolist() == [1, 0] and batch.labels.dtype == torch.long
    assert collate([Example(0, [3], 1.5, 1)], 0, "number").labels.dtype == torch.float32
    assert collate([Example(0, [3], 1, 1), Example(0, [3], None, 1)], 0, "class").labels is None
    tags = collate([Example(0, [3, 4], [IGNORED, 1], 2), Example(0, [3], [0], 1)], 0, "tags")
    assert tags.labels.tolist() == [[-100, 1], [0, -100]]


def test_decoder_inputs_are_labels_moved_by_one():
    examples = [Example(0, [5, 1], [8, 9, 1], 5), Example(1, [5, 6, 1], [1], 4)]
    batch = collate(examples, 0, "seq2seq", decoder_start=3)
    assert batch.inputs["decoder_input_ids"].tolist() == [[3, 8, 9], [3, 1, 0]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.labels.tolist() == [[8, 9, 1], [1, -100, -100]]
    assert batch.tokens == 9 and batch.padded_tokens == 12
    with pytest.raises(SettingsError, match="decoder_start_token_id"):
        collate(examples, 0, "seq2seq")
