"""Training over a cut with guards: what leaves is guarded, a run repeats itself, and what labels at home are worth."""

import pytest
import torch

from deltaloom.private.back import Back
from deltaloom.private.cut import split
from deltaloom.private.guards.base import Chain
from deltaloom.private.guards.gaussian import Gaussian
from deltaloom.private.leakage import Gradients, measure_labels
from deltaloom.private.local import LocalChannel
from deltaloom.private.messages import GradientRequest, LossRequest, OutputsRequest
from tests.private.pieces import PREFIX, run_front, settings_for, task_name, three_blocks

KEY, OTHER = bytes(32), bytes(range(32))


class Listening(LocalChannel):
    """A channel that keeps what was sent."""

    def __init__(self, back: Back) -> None:
        super().__init__(back)
        self.sent: list[object] = []

    def submit(self, request):
        self.sent.append(request)
        return super().submit(request)


def listened(layout: str, labels: str, guards=(), head: str = "owner"):
    front, owner = split(three_blocks(layout), task_name(layout), 1, head=head)
    channel = Listening(Back(owner))
    ran = run_front(layout, front, channel, [PREFIX], settings_for(), labels=labels, guards=guards)
    return ran, channel.sent, owner


@pytest.mark.parametrize("layout", ("llama", "gpt2"))
@pytest.mark.parametrize("labels", ("owner", "home"))
def test_a_guarded_run_repeats_itself_and_sends_nothing_unguarded(layout, labels):
    guard = Gaussian(norm=1.0, sigma=0.5)
    plain, bare, _ = listened(layout, labels)
    ran, noisy, _ = listened(layout, labels, [Chain([guard], KEY)])
    again, repeated, _ = listened(layout, labels, [Chain([guard], KEY)])
    other, _, _ = listened(layout, labels, [Chain([guard], OTHER)])
    assert all(torch.equal(ran.state[name], again.state[name]) for name in ran.state)
    assert ran.losses == again.losses != other.losses != plain.losses
    rows = [[each.rows.hidden for each in sent if isinstance(each, (LossRequest, OutputsRequest))]
            for sent in (bare, noisy, repeated)]
    assert len(rows[0]) == len(rows[1]) > 0
    for before, after, twice in zip(*rows, strict=True):
        assert torch.equal(after, twice) and float((before - after).norm(dim=1).min()) > 0.1
    first = rows[0][0] / rows[0][0].norm(dim=1, keepdim=True).clamp(min=1.0)  # the first step's rows are those of the same prefix
    assert float((rows[1][0] - first).std()) == pytest.approx(0.5, rel=0.15)


def labels_of(layout: str) -> torch.Tensor:
    """The labels of the run's rows, in the order in which they are sent."""
    return torch.cat([each.labels for each in listened(layout, "owner")[1] if isinstance(each, LossRequest)])


def gradients_in(sent: list[object]) -> torch.Tensor:
    return torch.cat([each.gradient for each in sent if isinstance(each, GradientRequest)])


def test_labels_at_home_do_not_hide_labels_from_the_owner_of_the_head():
    """The gradient by logits is p - y: the owner needs nothing to read every label off it."""
    _, sent, _ = listened("llama", "home")
    assert torch.equal(gradients_in(sent).argmin(dim=1), labels_of("llama"))


def test_noise_on_gradients_hides_labels_at_its_price():
    chain = Chain([Gaussian(norm=0.1, sigma=20.0, crossing="gradient")], KEY)
    _, sent, _ = listened("llama", "home", [chain])
    assert float((gradients_in(sent).argmin(dim=1) == labels_of("llama")).float().mean()) < 0.15


def test_a_new_head_at_the_party_still_shows_which_samples_share_a_label():
    """Three classes, a head that the owner does not have: with one known sample of each, gradients say most of the rest."""
    labels = labels_of("bert")
    gradients = gradients_in(listened("bert", "home", head="party")[1])
    known = {label: int((labels == label).nonzero()[0]) for label in range(3)}
    found = measure_labels(Gradients(gradients, torch.zeros_like(gradients), None, known), labels)
    assert found["label-directions"]["recovered"] > found["label-directions"]["majority"] + 0.2
