"""The cut of real pretrained models: the whole model's bits, and its words."""

import pytest
import torch

from deltaloom import attention
from deltaloom.data.encode import Example
from deltaloom.data.settings import DataSettings
from deltaloom.deltas.prefix import Prefix
from deltaloom.evaluate.base import Targets
from deltaloom.evaluate.causal_lm import CausalLM
from deltaloom.generate import generate
from deltaloom.models import load_model
from deltaloom.private.back import Back
from deltaloom.private.bars import on_front
from deltaloom.private.cut import split
from deltaloom.private.decode import Writer
from deltaloom.private.front import FrontModel, Learner
from deltaloom.private.local import LocalChannel
from deltaloom.private.remote import RemoteBack
from deltaloom.private.replay import packed, run_back, run_front
from deltaloom.tuned import attach

pytestmark = pytest.mark.real
TEXTS = ["The film is a triumph of patience over plot, and I would see it again.", "Bring an umbrella; the match goes on anyway.",
         "Split learning sends the first layers' results to a server that computes the rest."]


def test_smollm2_split_after_two_blocks():
    loaded = load_model("bundled:smollm2-135m-instruct", task="causal-lm", dtype=torch.float32)
    model, tokenizer = loaded.model, loaded.tokenizer
    attention.install(model)
    front, back = split(model, "causal-lm", 2)
    assert front.tied and front.blocks == 30
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    task = CausalLM(DataSettings(train="rows.jsonl"), Targets(), model.config, tokenizer=tokenizer)
    batch = task.collate([Example(index, ids, [-100, *ids[1:]], len(ids)) for index, ids in enumerate(rows)])
    method = on_front(Prefix(length=8), front)
    gradients, losses, written = [], [], []
    for split_up in (False, True):
        tuned = attach(front.model if split_up else model, [method], tokenizer=tokenizer, seed=1)
        channel = LocalChannel(Back(back))
        learner = Learner(task, FrontModel(tuned, front, RemoteBack(channel, front))) if split_up else task
        loss, _ = learner.loss(tuned, batch)
        loss.backward()
        losses.append(loss.item())
        gradients.append([parameter.grad for parameter in tuned.delta_parameters().values()])
        prompts = [row[:6] for row in rows[:2]]
        writer = Writer(tuned, front, channel, tokenizer)
        written.append(writer.generate(prompts, max_new_tokens=12) if split_up
                       else generate(tuned, tokenizer, prompts, max_new_tokens=12, batch_size=1))
        tuned.detach()
    assert losses[0] == losses[1]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert written[0] == written[1]


def test_minilm_at_every_cut():
    loaded = load_model("bundled:minilm", task="sequence-classification", labels=["a", "b"], dtype=torch.float32)
    model = loaded.model
    attention.install(model)
    inputs = dict(loaded.tokenizer(TEXTS, padding=True, return_tensors="pt"))
    lengths = tuple(inputs["attention_mask"].sum(1).tolist())
    with torch.no_grad():
        whole = packed(run_front(model, inputs, False), "masked", lengths)
        for cut in range(1, 6):
            front, back = split(model, "sequence-classification", cut, head="party")
            flat = packed(run_front(front.model, inputs, False), "masked", lengths)
            assert torch.equal(packed(run_back(back.model, flat, lengths, (0,) * 3, "masked", False), "masked", lengths), whole)
