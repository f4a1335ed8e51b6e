"""The account of what was released: the written-out sums of a run, none forgotten by a kill, none counted twice."""

import json
import math
from collections import Counter

import pytest
import torch

from deltaloom.errors import CheckpointError, DeltaloomError, ResourceError
from deltaloom.private import account as module
from deltaloom.private.account import Account, text_name, unpromised
from deltaloom.private.accountant import Cost, gaussian_epsilon
from deltaloom.private.back import Back
from deltaloom.private.cut import split
from deltaloom.private.decode import Writer
from deltaloom.private.front import FrontModel, Learner
from deltaloom.private.guards.base import Chain, parse_guards
from deltaloom.private.local import LocalChannel
from deltaloom.private.messages import ExtendRequest, GradientRequest, GuardContext, Key, LossRequest, OutputsRequest
from deltaloom.private.remote import RemoteBack
from deltaloom.report.privacy import privacy_of, privacy_text, promise_text
from deltaloom.train.checkpoints import latest_checkpoint
from deltaloom.train.loop import train
from deltaloom.tuned import attach
from tests.private.pieces import PREFIX, examples, feed_for, recorded, run_front, settings_for, task_for, task_name, three_blocks
from tests.private.test_decode import PROMPTS
from tests.toy_tokenizers import byte_level

KEY, DELTA = bytes(range(32)), 1e-6
NOISE = [{"guard": "gaussian", "norm": 1.0, "sigma": 4.0}]
BOTH = [*NOISE, {"guard": "gaussian", "norm": 0.1, "sigma": 2.0, "crossing": "gradient"}]
MU = 2 * 1.0 / 4.0


def account(folder, guards=NOISE, run="run"):
    chain = Chain(parse_guards(guards), KEY)
    return chain, Account(folder / "released.jsonl", chain, KEY, run)


def by_unit(made, scope="run", crossing="hidden states"):
    return {row["unit"]: row for row in made.rows(DELTA) if row["scope"] == scope and row["crossing"] == crossing}


def listened(layout, guards, labels, head="owner", **settings):
    """A guarded run, and the requests that it sent."""
    front, owner = split(three_blocks(layout), task_name(layout), 1, head=head)
    sent = []
    channel = LocalChannel(Back(owner), outward=lambda request: sent.append(request) or request)
    run_front(layout, front, channel, [PREFIX], settings_for(**settings), labels=labels, guards=guards)
    return sent


@pytest.mark.parametrize("layout, labels, head, packing", [("llama", "owner", "owner", True), ("gpt2", "home", "owner", False),
                                                           ("bert", "home", "party", False)])
def test_the_account_is_the_written_out_sum_over_what_was_sent(tmp_path, layout, labels, head, packing):
    chain, made = account(tmp_path, BOTH)
    sent = listened(layout, [chain, made], labels, head, max_steps=5, packing=packing)
    forward = [each for each in sent if isinstance(each, (LossRequest, OutputsRequest))]
    lengths = Counter(length for each in forward for length in each.rows.lengths)
    rows = sum(length * times for length, times in lengths.items())
    lines = by_unit(made)
    assert lines["one release"]["mu"] == MU and lines["one release"]["epsilon"] == gaussian_epsilon(MU, DELTA)
    assert lines["all rows"]["releases"] == rows and lines["all rows"]["mu"] == pytest.approx(MU * math.sqrt(rows))
    times = Counter()
    for each in forward:  # each text goes once an epoch: the most often sent one
        for part in each.rows.hidden.split(each.rows.lengths):
            times[len(part)] += 1
    own = {text_name(example.input_ids): len(example.input_ids) for example in examples(layout)}
    assert len(own) == len(examples(layout))
    most = lines["row"]["releases"]
    assert most == math.ceil(5 * 6 / len(own)) and lines["row"]["mu"] == pytest.approx(MU * math.sqrt(most))
    assert lines["text"]["mu"] <= MU * math.sqrt(most * max(own.values())) + 1e-9
    assert lines["text"]["epsilon"] == gaussian_epsilon(lines["text"]["mu"], DELTA)
    back = [each for each in sent if isinstance(each, GradientRequest)]
    gradients = by_unit(made, crossing="gradients at label positions")
    assert gradients["all rows"]["releases"] == sum(len(each.gradient) for each in back)
    assert gradients["all rows"]["mu"] == pytest.approx(0.1 * math.sqrt(gradients["all rows"]["releases"]))
    assert (tmp_path / "released.jsonl").stat().st_mode & 0o077 == 0


def test_every_text_is_counted_by_itself(tmp_path):
    chain, made = account(tmp_path)
    texts = [text_name([1, 2, 3]), text_name([4, 5]), text_name([1, 2, 3])]
    hidden = torch.randn(8, 4)
    made.outgoing(chain.outgoing(hidden, context := GuardContext("hidden", "training", Key(1, 0), (3, 2, 3), "r", tuple(texts))),
                  context)
    lines = by_unit(made)
    assert (lines["row"]["releases"], lines["all rows"]["releases"]) == (2, 8)
    assert lines["row"]["mu"] == pytest.approx(MU * math.sqrt(2)) and lines["text"]["mu"] == pytest.approx(MU * math.sqrt(6))
    entry = json.loads((tmp_path / "released.jsonl").read_text())
    assert not {name for name, _ in entry["texts"]} & set(texts)  # a name that nobody without the key can guess
    with pytest.raises(CheckpointError, match="names of their texts"):
        made.outgoing(hidden, GuardContext("hidden", "training", Key(1, 1), (8,), "r"))


def trained(folder, layers, *, stop_at=None, resume=None):
    front, back = split(three_blocks("llama"), "causal-lm", 1)

    def stopping(request):
        if request.key.step == stop_at and request.key.micro == 1:
            raise DeltaloomError("the process was killed")
        return request

    channel = LocalChannel(Back(back), outward=stopping)
    settings, task = settings_for(save_every=2, max_steps=6), task_for("llama", front.model)
    tuned = attach(front.model, [PREFIX])
    remote = RemoteBack(channel, front, layers, run="r")
    try:
        train(tuned, Learner(task, FrontModel(tuned, front, remote)), feed_for(task, examples("llama"), settings),
              settings=settings, folder=folder, resume=resume, before_step=remote.begin)
    finally:
        channel.close()


def test_a_kill_forgets_no_release_and_a_resumed_run_counts_none_twice(tmp_path):
    """Killed at step 6, resumed from step 4: the same bytes of steps 5 and 6 leave again, and are the same release."""
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = account(tmp_path / "whole")
    trained(tmp_path / "whole" / "run", whole)
    cut = account(tmp_path / "cut")
    with pytest.raises(DeltaloomError, match="killed"):
        trained(tmp_path / "cut" / "run", cut, stop_at=6)
    again = account(tmp_path / "cut")
    before = by_unit(cut[1])
    assert by_unit(again[1]) == before and 0 < before["all rows"]["releases"] < by_unit(whole[1])["all rows"]["releases"]
    checkpoint = latest_checkpoint(tmp_path / "cut" / "run", recorded()[0])
    assert checkpoint.step == 4
    trained(tmp_path / "cut" / "run", again, resume=checkpoint)
    assert again[1].rows(DELTA) == whole[1].rows(DELTA)
    anew = account(tmp_path / "cut", run="another")
    assert by_unit(anew[1])["all rows"]["releases"] == 0 and by_unit(anew[1], "folder") == {
        unit: row | {"scope": "folder"} for unit, row in by_unit(whole[1]).items() if unit != "one release"}


def test_other_bytes_at_the_same_place_are_a_further_release(tmp_path):
    chain, made = account(tmp_path)
    context = GuardContext("hidden", "training", Key(1, 0), (3,), "r", ("t",))
    hidden = torch.randn(3, 4)
    for _ in range(2):
        made.outgoing(chain.outgoing(hidden, context), context)
    assert by_unit(made)["row"]["releases"] == 1
    made.outgoing(chain.outgoing(hidden + 1e-6, context), context)
    assert by_unit(made)["row"]["releases"] == 2


def test_decoding_releases_each_row_of_a_text_once(tmp_path):
    chain, made = account(tmp_path)
    front, back = split(three_blocks("llama"), "causal-lm", 1)
    sent = []
    channel = LocalChannel(Back(back), outward=lambda request: sent.append(request) or request)
    Writer(attach(front.model, [PREFIX]), front, channel, byte_level(), (chain, made)).generate(PROMPTS[:1], max_new_tokens=5)
    rows = sum(sum(each.rows.lengths) for each in sent if isinstance(each, ExtendRequest))
    lines = by_unit(made)
    assert (lines["row"]["releases"], lines["all rows"]["releases"]) == (1, rows)
    assert lines["row"]["mu"] == MU and lines["text"]["mu"] == lines["all rows"]["mu"] == pytest.approx(MU * math.sqrt(rows))


def test_nothing_leaves_that_could_not_be_written_down(tmp_path, monkeypatch):
    chain, made = account(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "write", full)
    sent = []
    front, back = split(three_blocks("llama"), "causal-lm", 1)
    channel = LocalChannel(Back(back), outward=lambda request: sent.append(request) or request)
    with pytest.raises(ResourceError):
        run_front("llama", front, channel, [PREFIX], settings_for(), labels="owner", guards=[chain, made])
    assert sent == [] and by_unit(made)["all rows"]["releases"] == 0


def test_a_line_that_a_kill_cut_is_passed_over_and_told(tmp_path):
    _, made = account(tmp_path)
    context = [GuardContext("hidden", "training", Key(step, 0), (2,), "r", ("t",)) for step in range(3)]
    made.outgoing(torch.ones(2, 4), context[0])
    path = tmp_path / "released.jsonl"
    with path.open("ab") as file:
        file.write(path.read_bytes()[:40])
    _, again = account(tmp_path)
    again.outgoing(torch.ones(2, 4) * 2, context[1])
    _, third = account(tmp_path)
    assert (again.cut_lines, third.cut_lines) == (1, 1) and by_unit(third)["row"]["releases"] == 2
    path.write_text('{"run": "r", "crossing": "hidden"}\n')
    with pytest.raises(CheckpointError, match="nobody wrote"):
        account(tmp_path)


def test_what_is_not_promised_is_said():
    noisy = {"hidden": Cost(mu=1.0), "gradient": Cost()}
    assert ["nothing is promised" in way for way in unpromised({}, labels="home", rounds=False, masked=False)] == [True, False]
    assert [way.split(":")[0] for way in unpromised(noisy, labels="home", rounds=True, masked=True)] == [
        "gradients at label positions", "the update of each round"]
    assert [way.split(":")[0] for way in unpromised(noisy, labels="owner", rounds=False, masked=False)] == ["labels"]
    assert unpromised({"hidden": Cost(mu=1.0), "gradient": Cost(mu=1.0)}, labels="home", rounds=False, masked=False) == []


def test_people_read_the_figures_or_that_there_are_none(tmp_path):
    chain, made = account(tmp_path)
    context = GuardContext("hidden", "training", Key(1, 0), (2,), "r", ("t",))
    made.outgoing(chain.outgoing(torch.ones(2, 4), context), context)
    found = {"promised": True, "delta": DELTA, "rows": made.rows(DELTA), "unpromised": ["labels: <sent>"]}
    shown = privacy_text(found)
    assert "one text, over all its rows" in shown and "all runs" not in shown and "NOT promised: labels: <sent>" in shown
    assert "0.5" in promise_text(found) and "delta 1e-06" in promise_text(found)
    none = {"promised": False, "delta": DELTA, "rows": [], "unpromised": ["hidden states"]}
    for said in (privacy_text(none), promise_text(none)):
        assert "nothing is promised" in said and "hidden states" in said
    assert privacy_of({}) is None and privacy_of({"rows": [3, {"mu": "x"}], "unpromised": 3}).promised is False
