"""Packed segments: exactly the results and gradients of separate rows, or a refusal."""

from __future__ import annotations

import pytest
import torch
import transformers as t
from torch import nn

from deltaloom.attention import PACKABLE, Segments, check_packable, install
from deltaloom.errors import RefusedError
from tests.dense import give_prefixes
from tests.toys import toy

DECODER = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
           "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OTHERS = {
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**DECODER)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**DECODER)),
    "smollm3": lambda: t.SmolLM3ForCausalLM(t.SmolLM3Config(**DECODER)),
    "olmo2": lambda: t.Olmo2ForCausalLM(t.Olmo2Config(**DECODER)),
    "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, hidden_dropout=0.0)),
    "bert": lambda: t.BertForTokenClassification(t.BertConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)),
    "distilbert": lambda: t.DistilBertForTokenClassification(t.DistilBertConfig(
        vocab_size=64, dim=16, hidden_dim=24, n_layers=2, n_heads=4)),
    "roberta": lambda: t.RobertaForTokenClassification(t.RobertaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)),
}
LENGTHS = (3, 5, 1, 2, 9, 4)


def packable(family: str) -> nn.Module:
    torch.manual_seed(0)
    return OTHERS[family]().eval() if family in OTHERS else toy(family)


@pytest.mark.parametrize("family", sorted(PACKABLE))
@pytest.mark.parametrize("prefix", [False, True])
def test_packed_segments_equal_separate_rows(family, prefix):
    model = packable(family)
    check_packable(model)
    install(model)
    segments = Segments(LENGTHS)
    slots = give_prefixes(model, rows=len(LENGTHS)) if prefix else []
    rows = [slot.given for slot in slots]
    ids = torch.randint(3, 64, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    positions = segments.positions()
    if family == "roberta":
        positions = positions + model.config.pad_token_id + 1
    named = {} if family == "distilbert" else {"position_ids": positions}
    if family == "distilbert":  # takes no position_ids: its embeddings are given with their positions
        table = model.distilbert.embeddings
        embedded = table.LayerNorm(table.word_embeddings(ids) + table.position_embeddings(positions))
        handle = table.register_forward_hook(lambda module, args, out: embedded if out.shape[1] == ids.shape[1] else out)
    weights = torch.randn(ids.shape[1], generator=torch.Generator().manual_seed(2))

    model.zero_grad()
    packed = model(ids, **named, segments=segments).logits
    (packed[0].logsumexp(-1) * weights).sum().backward()
    packed_grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    if family == "distilbert":
        handle.remove()

    model.zero_grad()
    separate = []
    for index, chunk in enumerate(ids[0].split(LENGTHS)):
        for slot, all_rows in zip(slots, rows, strict=True):
            slot.given = all_rows.select(torch.tensor([index]))
        separate.append(model(chunk[None]).logits[0])
    separate_logits = torch.cat(separate)
    (separate_logits.logsumexp(-1) * weights).sum().backward()
    torch.testing.assert_close(packed[0], separate_logits, atol=1e-5, rtol=1e-5)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(packed_grads[name], p.grad, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_packed_segments_under_checkpointing_and_in_bf16():
    segments = Segments(LENGTHS)
    ids = torch.randint(3, 64, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    grads = []
    for checkpointing in (False, True):
        model = toy("llama", dtype=torch.bfloat16).train()
        install(model)
        if checkpointing:
            model.activation_checkpointing_enable()
        model(ids, position_ids=segments.positions(), segments=segments).logits.float().square().sum().backward()
        grads.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert torch.equal(*grads)


def test_segments_are_refused_where_they_cannot_be_exact():
    for layout in ("t5", "bart", "vit"):
        with pytest.raises(RefusedError, match=model_type(layout)):
            check_packable(toy(layout))
    model = toy("llama")
    install(model)
    ids = torch.ones(1, 7, dtype=torch.long)
    for bad in (ids.expand(2, -1), ids[:, :6]):
        with pytest.raises(RefusedError, match="one row"):
            model(bad, segments=Segments((4, 3)))


def model_type(layout: str) -> str:
    return toy(layout).config.model_type


def test_groups_hold_every_segment_once_with_similar_lengths():
    lengths = (1, 2, 3, 4, 5, 8, 9, 64, 1000, 40)
    groups = Segments(lengths).groups()
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        sizes = [lengths[index] for index in group]
        assert max(sizes) <= 2 * min(sizes)
