"""Guards in the split: what leaves is guarded, gradients go through, and noise is never used twice."""

import pytest
import torch

from deltaloom.private.back import Back
from deltaloom.private.cut import split
from deltaloom.private.decode import Writer
from deltaloom.private.front import FrontModel, Learner
from deltaloom.private.guards.base import Chain
from deltaloom.private.guards.gaussian import Gaussian
from deltaloom.private.local import LocalChannel
from deltaloom.private.remote import RemoteBack
from deltaloom.tuned import attach
from tests.private.pieces import examples, task_for, task_name, three_blocks
from tests.private.test_decode import PROMPTS
from tests.private.test_remote import prefix
from tests.toy_tokenizers import byte_level


class Doubled:
    """A guard that a test can follow: twice the hidden states, three times the gradients."""

    name = "doubled"

    def __init__(self):
        self.seen = []

    def outgoing(self, tensor, context):
        self.seen.append(context)
        return tensor * (2 if context.crossing == "hidden" else 3)


def parts(layout, guards, labels="owner", run=None):
    head = "owner" if labels == "owner" else "party"
    front, back = split(three_blocks(layout), task_name(layout), 1, head=head)
    sent = []
    channel = LocalChannel(Back(back), outward=lambda request: sent.append(request) or request)
    tuned = attach(front.model, prefix(layout))
    remote = RemoteBack(channel, front, guards, run)
    model = FrontModel(tuned, front, remote, labels)
    task = task_for(layout, front.model)
    return Learner(task, model), task.collate(examples(layout, 3)), remote, sent, Writer, front


def gradients(learner):
    return [parameter.grad for parameter in learner.model.tuned.delta_parameters().values()]


def test_what_leaves_went_through_the_guards_and_so_did_its_gradient():
    plain, guard = parts("llama", ()), Doubled()
    for learner, batch, remote, *_ in (plain, doubled := parts("llama", (guard,))):
        remote.begin(4)
        learner.loss(learner.model.tuned, batch)[0].backward()
    hidden = [each[3][0].rows.hidden for each in (plain, doubled)]
    assert torch.equal(hidden[1], 2 * hidden[0])
    learner, batch, remote, *_ = parts("llama", ())
    leaf, packing = learner.model.at_cut(batch.inputs, batch.lengths)
    reply = remote.channel.submit(doubled[3][0]).result()
    leaf.backward(2 * reply.gradient)
    for own, expected in zip(gradients(doubled[0]), gradients(learner), strict=True):
        torch.testing.assert_close(own, expected)
    context, = guard.seen
    assert (context.crossing, context.phase, context.key.step, context.lengths) == ("hidden", "training", 4, packing.lengths)


def test_gradients_of_outputs_are_guarded_too():
    guard = Doubled()
    learner, batch, remote, *_ = parts("bert", (guard,), labels="home")
    remote.begin(1)
    learner.loss(learner.model.tuned, batch)[0].backward()
    assert [context.crossing for context in guard.seen] == ["hidden", "gradient"]
    assert guard.seen[0].key == guard.seen[1].key


def test_noise_is_drawn_anew_unless_a_named_run_goes_on():
    def first(run, step=1):
        chain = Chain([Gaussian(norm=1.0, sigma=1.0)], bytes(32))
        learner, batch, remote, sent, *_ = parts("llama", (chain,), run=run)
        remote.begin(step)
        learner.loss(learner.model.tuned, batch)[0].backward()
        assert all(torch.isfinite(gradient).all() for gradient in gradients(learner))
        learner.task.predict(learner.model, batch)
        return [request.rows.hidden for request in sent]

    one, again, other, unnamed, unnamed_too = first("r"), first("r"), first("r", step=2), first(None), first(None)
    assert torch.equal(one[0], again[0])
    for two in (other, unnamed):
        assert not torch.equal(one[0], two[0])
    assert not torch.equal(unnamed[0], unnamed_too[0])
    assert not torch.equal(one[1], again[1])  # an evaluation is nothing that is resumed
    assert not torch.equal(one[0], one[1])


def test_sessions_of_the_same_text_have_other_noise():
    chain = Chain([Gaussian(norm=1.0, sigma=1.0)], bytes(32))
    front, back = split(three_blocks("llama"), "causal-lm", 1)
    sent = []
    channel = LocalChannel(Back(back), outward=lambda request: sent.append(request) or request)
    writer = Writer(attach(front.model, prefix("llama")), front, channel, byte_level(), (chain,))
    writer.generate([PROMPTS[0], PROMPTS[0]], max_new_tokens=1)
    first, second = (request.rows.hidden for request in sent if type(request).__name__ == "ExtendRequest")
    assert first.shape == second.shape and not torch.equal(first, second)
    assert float(first.norm(dim=1).min()) > 1.5  # clipped to 1, and noise of about 4


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_a_prefix_begins_with_the_models_own_keys_on_a_front_as_on_the_whole(layout):
    front, _ = split(three_blocks(layout), "causal-lm", 1)
    method = type(prefix(layout)[0])(**{**prefix(layout)[0].given(), "init": "vocabulary"})
    whole, half = (attach(model, [method], seed=4).delta_state() for model in (three_blocks(layout), front.model))
    assert all(torch.equal(tensor, half[name]) for name, tensor in whole.items())
