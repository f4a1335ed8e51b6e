"""Attacks and the leakage table: strong when undefended, a guess when drowned in noise, and the rule for one word."""

import math

import pytest
import torch
from torch import nn

from deltaloom.errors import DataError
from deltaloom.private.attacks.base import PACKAGE, Gradients, Knowledge, MembershipAttack, TokenAttack, Updates, attacks_of
from deltaloom.private.attacks.inverter import Inverter
from deltaloom.private.attacks.label_matching import LabelMatching
from deltaloom.private.attacks.linear_probe import LinearProbe
from deltaloom.private.attacks.nearest_embedding import NearestEmbedding
from deltaloom.private.attacks.probe_table import ProbeTable
from deltaloom.private.attacks.sequential_matching import SequentialMatching
from deltaloom.private.attacks.sequential_prior import SequentialPrior
from deltaloom.private.guards.clip import Clip
from deltaloom.private.guards.dx_privacy import DxPrivacy
from deltaloom.private.guards.gaussian import Gaussian
from deltaloom.private.leakage import (
    Canary,
    Case,
    Recovered,
    Victim,
    auc,
    measure,
    measure_labels,
    measure_membership,
    plant,
    verdict,
)
from deltaloom.private.wire.codecs.bf16 import Bf16
from deltaloom.private.wire.codecs.int8 import Int8
from deltaloom.registry import names_in
from tests.toys import VOCABULARY, toy

BEFORE, AFTER = (1,), (2,)
TOKENS = range(3, VOCABULARY)


def text(rows: int, time: int, seed: int) -> list[torch.Tensor]:
    """A Markov chain whose tokens are as unevenly frequent as words: p(v) ~ 1 / rank, mixed with a few likely successors."""
    generator = torch.Generator().manual_seed(seed)
    frequency = 1.0 / torch.arange(1, len(TOKENS) + 1)
    successors = torch.randint(len(TOKENS), (len(TOKENS), 3), generator=torch.Generator().manual_seed(99))
    made = []
    for _ in range(rows):
        tokens = [int(torch.multinomial(frequency, 1, generator=generator))]
        while len(tokens) < time:
            if torch.rand(1, generator=generator) < 0.5:
                tokens.append(int(successors[tokens[-1], int(torch.randint(3, (1,), generator=generator))]))
            else:
                tokens.append(int(torch.multinomial(frequency, 1, generator=generator)))
        made.append(torch.tensor([*BEFORE, *(TOKENS[token] for token in tokens), *AFTER]))
    return made


def front(layout: str, layers: int = 1, shift: float = 0.0):
    """Embeddings and the first blocks of a toy; `shift` stands for a prefix that the attacker may not know.

    The blocks' matrices are made smaller: in pretrained models the first blocks add little to what the embeddings say.
    """
    model = toy(layout)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name and "wte" not in name:
                parameter.mul_(0.3)
    moved = torch.randn(16, generator=torch.Generator().manual_seed(7)) * shift

    def run(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, output_hidden_states=True).hidden_states[layers] + moved
    return run, model.get_input_embeddings().weight


def attacker(layout: str, layers: int = 1, shift: float = 0.0, rows: int = 150) -> Knowledge:
    run, table = front(layout, layers, shift)
    return Knowledge(run, table, text(rows, 12, seed=1), causal=layout != "bert", before=BEFORE, after=AFTER)


def victim_of(layout: str, layers: int = 1, shift: float = 0.0, rows: int = 24) -> Victim:
    planted, canaries = plant(text(rows, 12, seed=2), vocabulary=TOKENS, edges=(1, 1))
    run, _ = front(layout, layers, shift)
    with torch.no_grad():
        hidden = torch.unbind(run(torch.stack(planted)))
    return Victim(tuple(planted), hidden, tuple(canaries))


def power(victim: Victim) -> float:
    """The mean norm of a row."""
    return float(torch.cat(victim.hidden).norm(dim=1).mean())


def all_six(candidates: int = 16) -> list[TokenAttack]:
    """Every attack on tokens, with settings for tests."""
    return [NearestEmbedding(), ProbeTable(), LinearProbe(), Inverter(width=128, epochs=20, batch=64),
            SequentialMatching(candidates=candidates), SequentialPrior(candidates=candidates)]


def by_attack(leakage) -> dict[str, Recovered]:
    return {line.attack: line for line in leakage.table}


def test_the_folder_is_the_registry():
    assert attacks_of(TokenAttack) == sorted((type(each) for each in all_six()), key=lambda cls: cls.name)
    assert len(attacks_of(MembershipAttack)) == 2
    assert set(names_in(PACKAGE)) >= {"nearest-embedding", "probe-table", "linear-probe", "inverter", "sequential-matching"}


@pytest.mark.parametrize("layout", ("llama", "gpt2", "bert"))
def test_undefended_the_attacks_recover_nearly_everything(layout):
    victim = victim_of(layout, rows=16)
    found = by_attack(measure([Case("none")], {"with prefix": attacker(layout)}, victim, all_six()))
    strong = {"linear-probe", "inverter", "sequential-matching", "sequential-prior"}
    assert {name: line.top1 for name, line in found.items() if name in strong and line.top1 < 0.9} == {}
    assert max(line.texts for line in found.values()) > 0.9 and max(line.canaries for line in found.values()) > 0.9
    assert found["sequential-matching"].top1 > 0.98


def test_at_the_embeddings_even_the_simplest_attack_is_exact():
    """The llama's layer 0 is the embedding itself."""
    known, victim = attacker("llama", layers=0), victim_of("llama", layers=0)
    found = by_attack(measure([Case("none")], {"w": known}, victim, [NearestEmbedding()]))
    assert found["nearest-embedding"].top1 == 1.0


@pytest.mark.parametrize("codec", (Int8(), Bf16()), ids=lambda codec: codec.name)
def test_codes_hide_nothing(codec):
    victim = victim_of("llama")
    sent_rows = [codec.decode(memoryview(bytearray(codec.encode(row.contiguous()))), tuple(row.shape)) for row in victim.hidden]
    coded = Victim(victim.rows, tuple(sent_rows), victim.canaries)
    line = measure([Case("none")], {"w": attacker("llama", rows=40)}, coded, [SequentialMatching()]).table[0]
    assert line.top1 > 0.98


@pytest.mark.parametrize("layout", ("llama", "bert"))
@pytest.mark.parametrize("kind", ("gaussian", "dx"))
def test_in_very_strong_noise_the_attacks_fall_to_the_majority_guess(layout, kind):
    victim = victim_of(layout, rows=40)
    strength = 30 * power(victim)
    guards = {"gaussian": (Gaussian(norm=power(victim), sigma=strength),),
              "dx": (Clip(norm=power(victim)), DxPrivacy(eta=16 / (strength * 4)))}[kind]
    lines = measure([Case("noise", guards)], {"w": attacker(layout, rows=80)}, victim, all_six(8)).table
    assert len(lines) == 6
    for line in lines:
        chance = 3 * math.sqrt(line.majority * (1 - line.majority) / line.tokens)
        assert line.top1 <= line.majority + chance, line
    probe = next(line for line in lines if line.attack == "linear-probe")
    assert probe.top1 > line.majority / 2  # it learned the frequencies: what is left when rows say nothing
    assert all(line.canaries == 0 for line in lines)


def test_attacks_weaken_as_noise_grows_and_a_prior_helps_in_noise():
    victim, known = victim_of("llama", rows=30), attacker("llama", rows=80)
    norm = 2 * power(victim)
    cases = [Case(str(share), (Gaussian(norm=norm, sigma=share * power(victim) / 4),)) for share in (0.1, 1.0, 3.0)]
    table = measure(cases, {"w": known}, victim, all_six()).table
    for attack in {line.attack for line in table}:
        shares = [line.top1 for line in table if line.attack == attack]
        assert shares[0] >= shares[1] - 0.03 and shares[1] >= shares[2] - 0.03
    noisy = {line.attack: line.top1 for line in table if line.case == "3.0"}
    assert noisy["sequential-prior"] > noisy["sequential-matching"] + 0.02


def test_who_does_not_know_the_prefix_recovers_less_but_not_nothing():
    victim = victim_of("llama", shift=0.4)
    knowledge = {"with prefix": attacker("llama", shift=0.4), "without prefix": attacker("llama")}
    table = measure([Case("none")], knowledge, victim, [SequentialMatching(), LinearProbe()]).table
    shares = {(line.attack, line.knows): line.top1 for line in table}
    assert shares["sequential-matching", "with prefix"] > 0.98
    assert 0.2 < shares["sequential-matching", "without prefix"] < shares["sequential-matching", "with prefix"]


def test_texts_of_different_lengths_and_guesses_beyond_the_vocabulary():
    run, _ = front("llama")
    rows = [row[:length] for row, length in zip(text(4, 12, 3), (5, 9, 5, 14), strict=True)]
    rows = [torch.cat([row[:-1], torch.tensor(AFTER)]) for row in rows]
    with torch.no_grad():
        victim = Victim(tuple(rows), tuple(run(row[None])[0] for row in rows))
    known = attacker("llama", rows=60)
    for attack in (SequentialMatching(candidates=2, guesses=5), Inverter(epochs=2, guesses=100), NearestEmbedding(guesses=100)):
        line = measure([Case("none")], {"w": known}, victim, [attack]).table[0]
        assert line.tokens == sum(len(row) - 2 for row in rows) and line.canaries is None
    single = measure([Case("none")], {"w": known}, Victim((rows[0][:3],), (victim.hidden[0][:3],)), [LinearProbe()])
    assert single.table[0].tokens == 1
    with pytest.raises(DataError, match="no token"):
        measure([Case("none")], {"w": known}, Victim((rows[0][:2],), (victim.hidden[0][:2],)), [LinearProbe()])


def test_the_linear_probe_is_the_discriminant_of_a_library():
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    from deltaloom.private.attacks.base import sent
    from deltaloom.private.guards.base import Chain
    known, chain = attacker("llama"), Chain([Clip(norm=1e9)], bytes(32))
    seen = list(victim_of("llama").hidden)
    guarded, tokens = torch.cat(sent(chain, known.hidden)), torch.cat(list(known.public))
    library = LinearDiscriminantAnalysis(solver="lsqr").fit(guarded.numpy(), tokens)
    ours = torch.cat([guess[:, 0] for guess in LinearProbe(ridge=1e-9).recover(known, chain, seen)])
    assert float((ours == torch.tensor(library.predict(torch.cat(seen).numpy()))).float().mean()) > 0.99


def test_secrets_are_planted_where_they_may_be():
    rows = text(8, 12, seed=5)
    planted, canaries = plant(rows, vocabulary=[5, 6], length=4, every=2, edges=(1, 1))
    assert [canary.row for canary in canaries] == [0, 2, 4, 6]
    for canary in canaries:
        assert canary.start >= 1 and canary.stop <= 13 and set(planted[canary.row][canary.start:canary.stop].tolist()) <= {5, 6}
    assert torch.equal(planted[1], rows[1])
    with pytest.raises(DataError):
        plant(rows, vocabulary=[5], length=14, edges=(1, 1))


def test_the_word_protective_is_earned_by_numbers():
    def line(top1: float, tokens: int = 2000) -> Recovered:
        return Recovered("c", "a", "w", tokens, top1, top1, 0.0, None, 0.05)
    good = Case("c", (), accuracy=88.0)
    assert verdict(good, [line(0.02), line(0.05)], 90.0).protective
    refused = [(good, [line(0.02), line(0.11)], 90.0), (good, [line(0.095, 300)], 90.0), (good, [line(0.05)], 91.1),
               (Case("c"), [line(0.01)], 90.0), (good, [line(0.01)], None), (good, [line(0.0, 50)], 90.0)]
    for case, lines, reference in refused:
        assert not verdict(case, lines, reference).protective
    assert "a (w) recovers 11.0%" in verdict(good, [line(0.11)], 90.0).reason
    assert line(0.05).upper == pytest.approx(0.0604, abs=1e-3)  # Wilson interval of 100 of 2000
    assert Canary(0, 1, 2) != Canary(0, 1, 3)


# Labels.

def back(classes: int, width: int = 16, samples: int = 200, seed: int = 0, reduction: str = "sum"):
    """Outputs of a back, labels, a head, and the gradient of the loss by the outputs, from autograd."""
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(samples, width, generator=generator).requires_grad_()
    head = torch.randn(classes, width, generator=generator)
    labels = torch.multinomial(1.0 / torch.arange(1, classes + 1), samples, replacement=True, generator=generator)
    loss = nn.functional.cross_entropy(outputs @ head.T, labels, reduction=reduction)
    (gradients,) = torch.autograd.grad(loss, outputs)
    return outputs.detach(), head, labels, gradients


@pytest.mark.parametrize("reduction", ("sum", "mean"))
@pytest.mark.parametrize("classes", (2, 3, 500))
def test_whoever_owns_the_head_reads_every_label_off_the_gradient(classes, reduction):
    outputs, head, labels, gradients = back(classes, reduction=reduction)
    found = measure_labels(Gradients(gradients, outputs, head), labels)
    assert found == {"label-matching": {**found["label-matching"], "recovered": 1.0}}


def test_label_matching_is_the_written_out_cosine():
    outputs, head, _, gradients = back(5, samples=6)
    scores = LabelMatching().scores(Gradients(gradients, outputs, head))
    for row in range(6):
        for label in range(5):
            one = nn.functional.one_hot(torch.tensor(label), 5)
            would = ((outputs[row] @ head.T).softmax(0) - one) @ head
            cosine = float(nn.functional.cosine_similarity(would, gradients[row], dim=0))
            assert float(scores[row, label]) == pytest.approx(cosine, abs=1e-4)


def test_a_head_at_home_with_two_classes_hides_the_names_of_labels_only():
    outputs, _, labels, gradients = back(2)
    known = {label: int((labels == label).nonzero()[0]) for label in (0, 1)}
    found = measure_labels(Gradients(gradients, outputs, None, known), labels)
    assert found["label-directions"]["recovered"] == 1.0 and found["label-directions"]["auc"] == 1.0
    assert set(found) == {"label-directions", "label-norms"}
    assert found["label-norms"]["recovered"] < 1.0


def test_noise_on_gradients_takes_label_inference_to_the_majority():
    outputs, head, labels, gradients = back(3, samples=2000)
    noisy = gradients + 300 * torch.randn(gradients.shape, generator=torch.Generator().manual_seed(1))
    found = measure_labels(Gradients(noisy, outputs, head), labels)["label-matching"]
    assert found["recovered"] < found["majority"] + 0.03


# Membership.

def test_auc_is_the_count_of_pairs():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(6, (30,), generator=generator).float()
    positive = torch.rand(30, generator=generator) < 0.4
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in scores[positive] for b in scores[~positive]]
    assert auc(scores, positive) == pytest.approx(sum(pairs) / len(pairs))
    with pytest.raises(DataError):
        auc(scores, torch.ones(30, dtype=torch.bool))


def test_a_single_update_tells_members_better_than_the_mean_of_many():
    """Linear regression with more coordinates than samples: each party overfits, the mean dilutes."""
    generator = torch.Generator().manual_seed(3)
    width, each, parties = 200, 20, 6
    inputs = torch.randn(parties + 1, each, width, generator=generator)
    targets = torch.randn(parties + 1, each, generator=generator)

    def loss(values, sample):
        x, y = sample
        return (x @ values["w"] - y) ** 2

    def tuned(party: int) -> torch.Tensor:
        w = torch.zeros(width)
        for _ in range(3):
            w = w - 0.0003 * inputs[party].T @ (inputs[party] @ w - targets[party])
        return w
    ends = [tuned(party) for party in range(parties)]
    before = {"w": torch.zeros(width)}
    seen = {"single": Updates(before, {"w": ends[0]}, loss),
            "common": Updates(before, {"w": torch.stack(ends).mean(0)}, loss)}
    samples = [(inputs[party, i], targets[party, i]) for party in (0, parties) for i in range(each)]
    trained = torch.arange(2 * each) < each
    found = measure_membership(seen, samples, trained)
    assert set(found) == {"membership-loss", "membership-gradient"}
    for shares in found.values():
        assert shares["single"] > 0.85 and 0.5 < shares["common"] < shares["single"] - 0.02
