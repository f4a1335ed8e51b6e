"""How many optimizer steps fit into a time: tried on a few, so that the schedule knows its end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import torch

from deltaloom.train.feed import Feed
from deltaloom.train.modes import leaving_no_trace
from deltaloom.train.run import Learner
from deltaloom.train.team import Team
from deltaloom.tuned import Tuned

TRIES = 3  # steps spread over the first epoch, after one that warms up: lengths differ between steps


def steps_that_fit(tuned: Tuned, task: Learner, feed: Feed, limit: float, team: Team) -> tuple[int, float, float]:
    """(steps, seconds spent on finding out, seconds a step), for a limit in seconds that includes the finding out.

    Forward and backward passes only, which leave no trace. In several processes each tries its own rows,
    and the first one's times count.
    """
    began = time.perf_counter()
    steps = feed.steps(0)
    chosen = [steps[index * (len(steps) - 1) // max(1, TRIES - 1)] for index in range(TRIES)]
    taken = []
    with leaving_no_trace(tuned):
        for micro in [chosen[0], *chosen]:
            start = time.perf_counter()
            own, _ = team.share(partial(feed.dealt, micro))
            team.together(partial(_pass, tuned, task, feed, own))
            taken.append(time.perf_counter() - start)
            if team.agree(None, time.perf_counter() - began)[1] > 0.2 * limit:
                break
    tried = taken[1:] or taken
    each = sum(tried) / len(tried)
    spent = time.perf_counter() - began
    spent, each = team.once(lambda: [spent, each])
    return max(1, int((limit - spent) / max(each, 1e-6))), spent, each


def _pass(tuned: Tuned, task: Learner, feed: Feed, micro: Sequence[Sequence[int]]) -> None:
    loss = torch.zeros(())
    for indices in micro:
        loss, _ = task.loss(tuned, feed.batch(indices, tuned.device))
        loss.backward()
    float(loss.detach())  # waits for an accelerator
