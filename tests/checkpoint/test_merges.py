from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor

from deltaloom.checkpoint import native
from deltaloom.checkpoint.convert import combine, put_back
from deltaloom.checkpoint.merges import dare, rule_of, ties
from deltaloom.deltas.full import Full
from deltaloom.deltas.lora import LoRA
from deltaloom.deltas.prefix import Prefix
from deltaloom.errors import RefusedError, SettingsError
from deltaloom.jobs.several import load_several
from deltaloom.tuned import Tuned, attach
from tests.contract.cases import logits, perturb
from tests.toys import LAYOUTS, toy

WEIGHTS = [0.5, 2.0, 1.0]


def matrices(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 7, generator=generator) for _ in range(3)]


def two_lanes(layout: str, targets=("q", "down")) -> Tuned:
    tuned = attach(toy(layout), [LoRA(rank=2, targets=targets)], "a")
    perturb(tuned, "a", seed=1, size=0.3)
    tuned.add("b", [LoRA(rank=3, alpha=5.0, targets=targets)], seed=2)
    perturb(tuned, "b", seed=2, size=0.3)
    return tuned


def ties_by_hand(changes: list[Tensor], weights: list[float], density: float) -> Tensor:
    trimmed = []
    for change in changes:
        smallest = sorted(change.abs().flatten().tolist(), reverse=True)[:int(density * change.numel())][-1]
        trimmed.append([[value if abs(value) >= smallest else 0.0 for value in row] for row in change.tolist()])
    out = torch.zeros_like(changes[0])
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            values = [(w, each[i][j]) for w, each in zip(weights, trimmed, strict=True)]
            sign = 1 if sum(w * v for w, v in values) >= 0 else -1
            same = [(w, v) for w, v in values if v * sign > 0]
            out[i, j] = sum(w * v for w, v in same) / sum(w for w, _ in same) if same else 0.0
    return out


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("weights", [WEIGHTS, [1.0, 1.0, 1.0]])
def test_ties_is_the_loop_over_elements(density: float, weights: list[float]) -> None:
    torch.testing.assert_close(ties(matrices(), weights, density), ties_by_hand(matrices(), weights, density))


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_ties_is_pefts_on_dense_matrices_of_equal_weight(density: float) -> None:
    """PEFT's own weights are left out of the sign and of the mean's denominator, so that unequal ones rescale the result."""
    want = merge_utils.ties(matrices(), torch.ones(3), density)
    torch.testing.assert_close(ties(matrices(), [1.0] * 3, density), want)


def test_dare_drops_and_rescales_by_a_stated_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(seed: int, density: float = 0.4) -> Tensor:
        return dare(matrices(), WEIGHTS, density, torch.Generator().manual_seed(seed))

    whole = sum(w * each for w, each in zip(WEIGHTS, matrices(), strict=True))
    torch.testing.assert_close(drawn(0, 1.0), whole)
    assert torch.equal(drawn(3), drawn(3)) and not torch.equal(drawn(3), drawn(4))
    single = dare(matrices()[:1], [1.0], 0.4, torch.Generator().manual_seed(0)) / matrices()[0]
    assert set(single.flatten().mul(0.4).round(decimals=5).tolist()) == {0.0, 1.0}
    mean = torch.stack([drawn(seed) for seed in range(1000)]).mean(0)
    spread = sum(w ** 2 * each.square() for w, each in zip(WEIGHTS, matrices(), strict=True)).mul(1.5 / 1000).sqrt()
    assert ((mean - whole).abs() < 4.5 * spread).all()
    generator = torch.Generator().manual_seed(3)  # PEFT's, with the same draws
    monkeypatch.setattr(torch, "bernoulli", lambda p: (torch.rand(p.shape, generator=generator) < p).to(p))
    torch.testing.assert_close(drawn(3), merge_utils.dare_linear(matrices(), torch.tensor(WEIGHTS), 0.4))


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", ["ties", "dare"])
def test_merged_lanes_are_the_rule_on_dense_increments_of_each_site(layout: str, how: str) -> None:
    tuned, weights = two_lanes(layout), {"a": 0.7, "b": 0.3}
    names = [site.name for site, _ in tuned.pairs("a")]
    dense = {name: [] for name in names}
    for lane in weights:
        for site, delta in tuned.pairs(lane):
            dense[site.name].append(delta.matrix())
    rule, again = (rule_of(how, [0.7, 0.3], density=0.6, seed=5) for _ in range(2))
    converted = combine(tuned, weights, rule=rule)
    order = list(converted.sites)
    want = {path: again(dense[path], [0.7, 0.3]) for path in order} if layout != "gpt2" else None
    if want is None:  # parts of a fused layer: the increments of the whole layer
        whole = {path: [] for path in order}
        for lane in weights:
            for path in order:
                parts = [(site, delta) for site, delta in tuned.pairs(lane) if site.path == path]
                change = torch.zeros(48 if parts[0][0].part else parts[0][0].d_out, parts[0][0].d_in)
                for site, delta in parts:
                    change[slice(*(site.part or (0, None)))] += delta.matrix()
                whole[path].append(change)
        want = {path: again(whole[path], [0.7, 0.3]) for path in order}
    assert converted.relative_error == 0
    for path in order:
        found = converted.saved.state[f"0:{path}:up"] @ converted.saved.state[f"0:{path}:down"]
        torch.testing.assert_close(found, want[path], atol=1e-5, rtol=1e-4)
        assert converted.sites[path] == (torch.linalg.matrix_rank(want[path]).item(), 0.0)
    cut = combine(tuned, weights, 2, rule=rule_of(how, [0.7, 0.3], density=0.6, seed=5))
    missing = total = 0.0
    for path in order:
        off = cut.saved.state[f"0:{path}:up"] @ cut.saved.state[f"0:{path}:down"] - want[path]
        assert cut.sites[path][1] == pytest.approx(float(off.norm() / want[path].norm()), rel=1e-3)
        missing, total = missing + float(off.square().sum()), total + float(want[path].square().sum())
    assert cut.relative_error == pytest.approx((missing / total) ** 0.5, rel=1e-3)
    assert logits(put_back(tuned.detach(), cut), layout).isfinite().all()


def test_svd_is_the_sum_truncated_to_an_error() -> None:
    tuned, weights = two_lanes("llama"), {"a": 0.5, "b": 0.5}
    converted = combine(tuned, weights, error=0.3, rule=rule_of("svd", [0.5, 0.5], truncated=True))
    assert 0 < converted.relative_error <= 0.3
    assert sum(rank for rank, _ in converted.sites.values()) < 5 * len(converted.sites)


@pytest.mark.parametrize("how,options,match", [
    ("tise", {}, "unknown way.*'ties'"), ("linear", {"density": 0.5}, "share of the elements"),
    ("ties", {"density": 0.0}, "share"), ("dare", {"density": 1.5}, "share"), ("svd", {}, "how far")])
def test_settings_without_a_meaning_are_refused(how: str, options: dict, match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        rule_of(how, [0.5, 0.5], **options)
    with pytest.raises(SettingsError, match="above 0"):
        rule_of("ties", [1.0, -1.0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_deltas_stack_in_order_or_average_exactly(layout: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    one = attach(toy(layout), [LoRA(rank=2, targets="q"), Prefix(length=2)])
    perturb(one, seed=1)
    native.save(one, first)
    two = attach(toy(layout), [LoRA(rank=3, targets=("q", "v"))])
    perturb(two, seed=2)
    native.save(two, second)
    by_hand = attach(toy(layout), [*(part.method for part in one.attached()), *(part.method for part in two.attached())])
    state = dict(one.delta_state()) | {f"2:{key.partition(':')[2]}": tensor for key, tensor in two.delta_state().items()}
    by_hand.load_delta_state(state)
    stack = load_several(toy(layout), [first, second], None)
    assert torch.equal(logits(stack, layout), logits(by_hand, layout))
    with pytest.raises(RefusedError, match="cannot be merged"):
        load_several(toy(layout), [first, second], [0.5, 0.5])
    average = load_several(toy(layout), [second, second], [0.5, 0.5])
    torch.testing.assert_close(logits(average, layout), logits(two, layout), atol=2e-5, rtol=1e-4)


def test_two_heads_do_not_stack_but_have_a_sum(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        tuned = attach(toy("bert"), [LoRA(rank=2, targets="q")], heads=[Full(targets="classifier")])
        perturb(tuned, seed=seed)
        native.save(tuned, tmp_path / name)
    model = toy("bert")
    with pytest.raises(RefusedError, match="--weights"):
        load_several(model, [tmp_path / "a", tmp_path / "b"], None)
    assert load_several(model, [tmp_path / "a", tmp_path / "b"], [0.5, 0.5]).counts()[1] > 0
