"""What the owner could recover of a party's text, labels and samples: the attacks, under the party's guards and under noise.

Tokens are attacked in the rows of the party's own front. Labels and membership are attacked in a rehearsal on the emulator, which
stands in for the owner's model (see `leakage_rehearsed`). Nothing is sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaloom.data.read import read_rows
from deltaloom.errors import DataError, SettingsError
from deltaloom.events import finite
from deltaloom.files import write_atomic
from deltaloom.jobs.folder import write_json
from deltaloom.jobs.leakage_rehearsed import NOT_REHEARSED, SECRET, around, rehearsed
from deltaloom.jobs.party_use import TunedFront, open_front
from deltaloom.private.attacks.base import Knowledge, TokenAttack, attacks_of
from deltaloom.private.guards.base import Guard, parse_guards
from deltaloom.private.leakage import Case, Leakage, Victim, measure, plant
from deltaloom.private.replay import run_front
from deltaloom.report.private import leakage_page, leakage_text

SHORTEST = 8                   # tokens of a text that is attacked
QUANTILE = 0.99                # of the rows' norms: noise is drawn for rows that are clipped there
Say = Callable[[str], None]


def leakage(folder: Path, data: Sequence[Path], *, rows: int = 12, noise: Sequence[float] = (1.0, 4.0),
            attacks: Sequence[str] = (), without_prefix: bool = True, personal: bool | None = None,
            say: Say = print) -> dict[str, Any]:
    """Attack the first `rows` texts of `data`, with the others as the attacker's public text; nothing is sent to anybody.

    noise: multiples of an activation's (for labels a gradient's) root mean square, each a further case. attacks: names, all for
    none; those on labels and members are left out with them. The tables are printed, and written to the party's folder as
    leakage.json and leakage.html.

    Raises:
        UsageError: nothing was tuned yet. DataError: too few rows. SettingsError: an unknown attack.
    """
    chosen = attacks_named(attacks)
    opened = open_front(folder, personal=personal)
    found = read_rows([str(path) for path in data], opened.task.settings, Path.cwd(), accepts=opened.task.formats,
                      numbers=opened.task.numbers)
    examples = [example for example in opened.task.encode(found.rows) if len(example.input_ids) >= SHORTEST]
    texts = [torch.tensor(example.input_ids) for example in examples]
    if len(texts) < 2 * rows:
        raise DataError("too few rows to attack some with the help of the others", got=len(texts), legal=f"at least {2 * rows}")
    measured = attacked(opened, texts, rows=rows, noise=noise, attacks=chosen, without_prefix=without_prefix, say=say)
    more = rehearsed(opened, examples, rows=rows, noise=noise, say=say) if not attacks else dict(NOT_REHEARSED)
    result = finite(measured.as_dict() | {"rows": rows, "public": len(texts) - rows} | more)
    say(leakage_text(result))
    write_json(folder / "leakage.json", result)
    write_atomic(folder / "leakage.html", leakage_page(folder.name, result))
    return result


def attacks_named(names: Sequence[str]) -> list[TokenAttack]:
    """Attacks on rows at the cut with their defaults.

    Raises:
        SettingsError: an unknown name.
    """
    known = {kind.name: kind for kind in attacks_of(TokenAttack)}
    odd = [name for name in names if name not in known]
    if odd:
        raise SettingsError("unknown attack", got=odd[0], legal=sorted(known))
    made = [known[name]() for name in (names or known)]
    return [attack for attack in made if isinstance(attack, TokenAttack)]


def attacked(opened: TunedFront, texts: Sequence[Tensor], *, rows: int, noise: Sequence[float], attacks: Sequence[TokenAttack],
             without_prefix: bool, say: Say) -> Leakage:
    """The table for texts (ids) of which the first `rows` are the victim's, with planted secrets."""
    front, tuned = opened.front, opened.tuned
    before, after = around(texts, SECRET)
    secret, public = list(texts[:rows]), texts[rows:]
    seen = sorted(set(torch.cat(list(public)).tolist()) - {*before, *after})
    planted, canaries = plant(secret, vocabulary=seen, length=SECRET, every=3, edges=(len(before), len(after)))

    def states(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return run_front(front.model, {"input_ids": ids}, front.is_decoder)

    def bare(ids: Tensor) -> Tensor:
        with tuned.use(None):
            return states(ids)

    tuned.eval()
    table = next(front.model.get_input_embeddings().parameters())
    fronts = {"with the prefix": states} | ({"without the prefix": bare} if without_prefix else {})
    known = {name: Knowledge(each, table, public, causal=front.is_decoder, before=before, after=after)
             for name, each in fronts.items()}
    hidden = [states(row[None])[0].float() for row in planted]
    cases = [Case("none"), *_own(opened), *_noisy(hidden, noise)]
    say(f"Attacking {rows} texts of {sum(map(len, planted))} tokens, {len(public)} public texts: {len(attacks)} attacks, "
        f"{len(cases)} cases")
    return measure(cases, known, Victim(tuple(planted), tuple(hidden), tuple(canaries)), attacks)


def _own(opened: TunedFront) -> list[Case]:
    guards = opened.settings.row_guards()
    return [Case("the run's guards", guards)] if guards else []


def _noisy(hidden: Sequence[Tensor], levels: Sequence[float]) -> list[Case]:
    """Clipped rows with Gaussian noise, in multiples of an activation's root mean square."""
    rows = torch.cat(list(hidden))[1:]  # the first token of a text has a norm of its own
    scale, norm = float(rows.pow(2).mean().sqrt()), float(rows.norm(dim=1).quantile(QUANTILE))
    cases = []
    for level in levels:
        if not (math.isfinite(level) and level > 0):
            raise SettingsError("noise is a multiple of the activations", got=level, legal="above 0")
        guards: tuple[Guard, ...] = parse_guards([{"guard": "gaussian", "norm": norm, "sigma": level * scale}], "noise")
        cases.append(Case(f"gaussian, {level:g} x rms", guards))
    return cases
