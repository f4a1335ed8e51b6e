"""A party or an owner that stops in the middle: the run goes on and ends with the same prefix, bit for bit."""

import pytest
import torch

from deltaloom.errors import DeltaloomError
from deltaloom.private.back import Back
from deltaloom.private.cut import split
from deltaloom.private.front import FrontModel, Learner
from deltaloom.private.local import LocalChannel
from deltaloom.private.messages import LossRequest
from deltaloom.private.remote import RemoteBack
from deltaloom.train.checkpoints import latest_checkpoint
from deltaloom.train.loop import train
from deltaloom.tuned import attach
from tests.private.pieces import examples, feed_for, recorded, settings_for, task_for, three_blocks
from tests.private.test_remote import prefix

SETTINGS = settings_for(save_every=1, max_steps=6)


def run(folder, *, stop_at=None, resume=None, window=1):
    front, back = split(three_blocks("llama"), "causal-lm", 1)
    seen = []

    def stopping(request):
        if isinstance(request, LossRequest):
            seen.append(request.key)
            if request.key.step == stop_at and request.key.micro == 1:
                raise DeltaloomError("the connection is gone")
        return request

    channel = LocalChannel(Back(back), window=window, outward=stopping)
    task = task_for("llama", front.model)
    tuned = attach(front.model, prefix("llama"))
    remote = RemoteBack(channel, front)
    try:
        train(tuned, Learner(task, FrontModel(tuned, front, remote)), feed_for(task, examples("llama"), SETTINGS),
              settings=SETTINGS, folder=folder, resume=resume, ahead=window, before_step=remote.begin)
    finally:
        channel.close()
    return tuned.delta_state(), seen


@pytest.mark.parametrize("window", [1, 3])
def test_a_run_that_lost_its_owner_goes_on_to_the_same_prefix(tmp_path, window):
    whole, keys = run(tmp_path / "whole", window=window)
    with pytest.raises(DeltaloomError, match="connection"):
        run(tmp_path / "cut", stop_at=4, window=window)
    emit, _ = recorded()
    again, later = run(tmp_path / "cut", resume=latest_checkpoint(tmp_path / "cut", emit), window=window)
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    assert sorted((key.step, key.micro) for key in later) == sorted((key.step, key.micro) for key in keys if key.step >= 4)
    assert len(set(keys)) == len(keys)
