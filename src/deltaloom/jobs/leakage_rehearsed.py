"""Attacks on labels and on membership, in a rehearsal on the emulator: its ends are those of the owner's model, bit for bit.

Labels: a training pass with labels at home, whatever the run's setting, because where labels are sent there is nothing to infer.
Membership: a joint round of PARTIES parties from the party's tuned values, with the run's own training settings; which of the
first party's rows, and of rows that nobody trained on, were trained on is told by its update alone, and by the mean of all.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deltaloom import attention
from deltaloom.checkpoint import native
from deltaloom.data.encode import IGNORED, Example
from deltaloom.errors import DataError, DeltaloomError, RefusedError
from deltaloom.jobs.party import TUNED
from deltaloom.jobs.party_use import TunedFront
from deltaloom.jobs.prepare import chosen_precision, model_source, parse_parts
from deltaloom.models import LoadedModel, load_model
from deltaloom.private.cut import front_hash, split
from deltaloom.private.guards.base import Guard, parse_guards
from deltaloom.private.leakage import Canary, measure_labels, measure_membership, plant
from deltaloom.private.rehearsal import Halves, coin_limit, gradients_seen, rehearsed_round
from deltaloom.train.settings import TrainSettings
from deltaloom.tuned import restore

PARTIES = 3         # in the rehearsed round
FEWEST = 4          # rows of a party
STEPS = 20          # of a party in the round, at most
SECRET = 4          # tokens of a planted secret
QUANTILE = 0.99     # of the gradients' norms: noise is drawn for gradients that are clipped there
EVALUATION = {"epochs": None, "max_time": None, "eval_every": None, "early_stop": None, "metric": None, "restore_best": False,
              "save_every": None, "packing": False}
NOT_REHEARSED: Mapping[str, Any] = {"labels": [], "membership": [], "not_rehearsed": "labels and members were left out"}
Say = Callable[[str], None]


def rehearsed(opened: TunedFront, examples: Sequence[Example], *, rows: int, noise: Sequence[float], say: Say) -> dict[str, Any]:
    """`labels`: a line for each case and attack; `membership`: a line for each attack and update; `not_rehearsed`: what is
    missing and why (the emulator is no longer there, or the rows are too few), or nothing."""
    try:
        loaded = _stand_in(opened)
    except DeltaloomError as error:
        say(f"Labels and membership are not attacked: {error}")
        return {"labels": [], "membership": [], "not_rehearsed": str(error)}
    found: dict[str, Any] = {"labels": _labels(opened, loaded, examples[:rows], noise), "membership": [], "not_rehearsed": ""}
    needed = FEWEST * (PARTIES + 1)
    if len(examples) < needed:
        found["not_rehearsed"] = f"membership needs at least {needed} rows, and there are {len(examples)}"
        say(f"Not attacked: {found['not_rehearsed']}")
    else:
        found["membership"] = _membership(opened, loaded, examples, say)
    return found


def _stand_in(opened: TunedFront) -> LoadedModel:
    """The run's emulator.

    Raises:
        RefusedError: its front is another one. DeltaloomError: it cannot be loaded.
    """
    run, front = opened.run, opened.front
    parts = parse_parts(run)
    labels = opened.task.targets.labels
    loaded = load_model(model_source(run), task=opened.task.name, labels=list(labels.names) if labels else None,
                        dtype=chosen_precision(parts.train.precision)[1], quantise=parts.base.quantise)
    if front_hash(loaded.model, front.cut) != front.front:
        raise RefusedError("the run's emulator has another front now", got=run.file.model)
    return loaded


def _labels(opened: TunedFront, loaded: LoadedModel, examples: Sequence[Example], noise: Sequence[float]) -> list[dict[str, Any]]:
    front, back = split(loaded.model, opened.task.name, opened.front.cut, head=opened.front.head)
    saved, _ = native.read(opened.folder / TUNED / "delta")
    halves = Halves(restore(front.model, saved), front, back)
    seen, _ = gradients_seen(halves, opened.task, examples)
    scale, norm = float(seen.gradients.pow(2).mean().sqrt()), float(seen.gradients.norm(dim=1).quantile(QUANTILE))
    own = opened.settings.row_guards()
    cases: list[tuple[str, tuple[Guard, ...]]] = [("none", ()), *([("the run's guards", own)] if own else [])]
    cases += [(f"gaussian on gradients, {level:g} x rms", parse_guards(
        [{"guard": "gaussian", "norm": norm, "sigma": level * scale, "crossing": "gradient"}], "noise")) for level in noise]
    lines = []
    for case, guards in cases:
        seen, labels = gradients_seen(halves, opened.task, examples, guards)
        lines += [{"case": case, "attack": attack, "labels": len(labels) - len(seen.known or ()),
                   "knows": f"a sample of each of {len(seen.known)} classes" if seen.known else "no sample", "auc": None, **found}
                  for attack, found in measure_labels(seen, labels).items()]
    halves.tuned.detach()
    return lines


def _membership(opened: TunedFront, loaded: LoadedModel, examples: Sequence[Example], say: Say) -> list[dict[str, Any]]:
    order = list(examples)
    random.Random(opened.run.file.seed).shuffle(order)
    each = len(order) // (PARTIES + 1)
    groups = [order[start:start + each] for start in range(0, each * (PARTIES + 1), each)]
    members, mine = _planted(groups[0], seed=1)
    others, theirs = _planted(groups[-1], seed=2)
    attention.install(loaded.model)
    saved, _ = native.read(opened.folder / TUNED / "delta")
    tuned = restore(loaded.model, saved)
    given = parse_parts(opened.run).train
    steps = min(STEPS, given.max_steps or STEPS)
    settings = TrainSettings(**given.given() | EVALUATION | {"max_steps": steps})
    say(f"Rehearsing a round of {PARTIES} parties with {each} rows each, {steps} steps, on the emulator")
    rehearsed = rehearsed_round(tuned, opened.task, [members, *groups[1:-1]], settings, seed=opened.run.file.seed)
    samples, trained = [*members, *others], torch.arange(2 * each) < each
    found = measure_membership(rehearsed.updates(), samples, trained)
    secret = sorted({*mine, *(each + place for place in theirs)})
    both = bool(mine and theirs)
    of_secrets = measure_membership(rehearsed.updates(), [samples[at] for at in secret], trained[secret]) if both else {}
    tuned.detach()
    return [{"attack": attack, "update": update, "members": each, "others": each, "auc": auc, "chance": 0.5,
             "coin": coin_limit(each, each), "canaries": of_secrets.get(attack, {}).get(update), "steps": steps}
            for attack, areas in found.items() for update, auc in areas.items()]


def _planted(examples: Sequence[Example], *, seed: int) -> tuple[list[Example], list[int]]:
    """Every second row with a random secret in it, learned where the row is; and which rows these are (none if too short)."""
    texts = [torch.tensor(example.input_ids) for example in examples]
    before, after = around(texts, SECRET)
    vocabulary = sorted(set(torch.cat(texts).tolist()) - {*before, *after})
    try:
        planted, canaries = plant(texts, vocabulary=vocabulary, length=SECRET, every=2, seed=seed,
                                  edges=(len(before), len(after)))
    except DataError:
        return list(examples), []
    return [_with(example, ids) for example, ids in zip(examples, planted, strict=True)], _rows(canaries)


def _rows(canaries: Sequence[Canary]) -> list[int]:
    return [canary.row for canary in canaries]


def _with(example: Example, ids: Tensor) -> Example:
    """The example with other tokens; what is learned of a language model's row are its own tokens."""
    tokens, labels = ids.tolist(), example.labels
    if isinstance(labels, list):
        labels = [IGNORED if label == IGNORED else token for label, token in zip(labels, tokens, strict=True)]
    return replace(example, input_ids=tokens, labels=labels)


def around(texts: Sequence[Tensor], secret: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that begin, and that end, every text: the template's; a `secret` of so many tokens fits between them."""
    lists = [text.tolist() for text in texts]
    room = min(map(len, lists)) - secret - 1
    before = next((n for n in range(room) if len({ids[n] for ids in lists}) > 1), max(0, room))
    room -= before
    after = next((n for n in range(max(0, room)) if len({ids[-1 - n] for ids in lists}) > 1), max(0, room))
    return tuple(lists[0][:before]), tuple(lists[0][len(lists[0]) - after:])
