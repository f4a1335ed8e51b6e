"""The service in this process: replies are the back's, certificates decide who gets in, repeats, windows, quotas, policy."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import torch

from deltaloom.errors import RefusedError, UsageError
from deltaloom.private.audit import read_audit
from deltaloom.private.authority import Authority
from deltaloom.private.client import GrpcChannel, OwnerAway, Reconnect, join
from deltaloom.private.identity import PARTY, Credential, issue
from deltaloom.private.membership import Membership
from deltaloom.private.messages import (
    CloseRequest,
    ExtendRequest,
    ForgottenError,
    GradientRequest,
    Key,
    LossReply,
    OpenRequest,
    ScoreRequest,
)
from deltaloom.private.policy import Limits, Policy, Quotas
from deltaloom.private.refused import Refused
from deltaloom.private.round_messages import AnswerRequest, StandRequest
from deltaloom.private.transport import STREAM, secure_channel
from deltaloom.private.wire.convert import Refusal, Welcome, decode_message
from tests.private.owned import QUICK, channel, hello, joined, service, step_request
from tests.private.toy_owner import ToyBack
from tests.private.wired import BOUNDS, assemble, assert_same, frame_of, outputs_request, rows

pytestmark = pytest.mark.timeout(60)
HASTY = Reconnect(first_wait=0.02, longest_wait=0.1, patience=0.5)


def test_replies_over_the_wire_are_the_backs_bit_for_bit(tmp_path):
    with service(tmp_path / "o") as owner:
        member = joined(owner.authority, tmp_path, "a", owner.address)
        requests = [step_request(1), outputs_request(2, 0), GradientRequest(Key(2, 0), torch.ones(2, 16)),
                    ScoreRequest(Key(1, 0), rows(), torch.tensor([0, 4]), torch.tensor([7, 8]))]
        with channel(member) as wire:
            local = ToyBack()
            for request in requests:
                assert_same(wire.submit(request).result(10), local.answer("a", request))
            assert wire.facts == local.facts and wire.window == 4
            big = step_request(3)
            many = rows((100, 100), seed=5)
            big = type(big)(big.key, type(many)(many.hidden, many.lengths, many.offsets, many.layout), big.places, big.labels)
            assert_same(wire.submit(big).result(10), local.answer("a", big))


def test_sessions_go_over_their_own_streams(tmp_path):
    with service(tmp_path / "o") as owner:
        member = joined(owner.authority, tmp_path, "a", owner.address)
        with channel(member, purpose="inference", run="s1") as wire:
            local = ToyBack()
            requests = [OpenRequest("s1", 20), ExtendRequest("s1", rows((5,))), ExtendRequest("s1", rows((1,), (5,)), True),
                        CloseRequest("s1")]
            for request in requests:
                assert_same(wire.submit(request).result(10), local.answer("a", request))
            with pytest.raises(ForgottenError):
                wire.submit(ExtendRequest("s1", rows((1,), (6,)))).result(10)
        with channel(member) as wire, pytest.raises(Refused, match="cannot come on this stream"):
            wire.submit(OpenRequest("s1", 20)).result(10)


def test_two_parties_answers_of_a_round_become_the_weighted_mean(tmp_path):
    with service(tmp_path / "o") as owner:
        members = [joined(owner.authority, tmp_path, name, owner.address) for name in ("a", "b")]
        with channel(members[0], purpose="rounds") as one, channel(members[1], purpose="rounds") as two:
            values = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, 5.0, 5.0])]
            for wire, value, count in ((one, values[0], 1), (two, values[1], 3)):
                stand = wire.submit(StandRequest(have=-1)).result(10)
                assert stand.wanted and stand.phase.version == 0 and torch.equal(stand.common["a"], torch.zeros(3))
                assert wire.submit(AnswerRequest(stand.phase, {"a": value}, count)).result(10).status == "accepted"
            assert torch.equal(one.submit(StandRequest(have=0)).result(10).common["a"], (values[0] + 3 * values[1]) / 4)
            assert one.submit(StandRequest(have=1)).result(10).common is None


def test_a_repeat_gets_the_same_answer_and_is_computed_once(tmp_path):
    back = ToyBack(seconds=0.2)
    with service(tmp_path / "o", back) as owner:
        member = joined(owner.authority, tmp_path, "a", owner.address)
        with channel(member) as wire:
            first, second = wire.submit(step_request(1)), wire.submit(step_request(1))   # the second comes during the first
            assert_same(first.result(10), second.result(10))
        with channel(member) as wire:   # another stream of the same run
            assert_same(wire.submit(step_request(1)).result(10), first.result(10))
        assert len(back.calls) == 1
        assert owner.status()["repeats"] == 2


def test_a_request_with_the_same_key_and_other_bytes_is_a_new_one(tmp_path):
    back = ToyBack()
    with service(tmp_path / "o", back) as owner, channel(joined(owner.authority, tmp_path, "a", owner.address)) as wire:
        one, other = step_request(1), step_request(2)
        other = type(one)(one.key, other.rows, one.places, one.labels)
        assert not torch.equal(wire.submit(one).result(10).gradient, wire.submit(other).result(10).gradient)
        assert len(back.calls) == 2


def test_a_late_step_is_refused_and_a_late_repeat_is_answered(tmp_path):
    with service(tmp_path / "o") as owner, channel(joined(owner.authority, tmp_path, "a", owner.address)) as wire:
        first = wire.submit(step_request(2)).result(10)
        wire.submit(step_request(3)).result(10)
        assert_same(wire.submit(step_request(2)).result(10), first)
        with pytest.raises(Refused) as refusal:
            wire.submit(step_request(1)).result(10)
        assert refusal.value.reason == "late"
        assert wire.submit(step_request(4)).result(10)


class Counting(ToyBack):
    """Counts how many requests it has at once."""

    now = most = 0
    guard = threading.Lock()

    def answer(self, party, request):
        with self.guard:
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            return super().answer(party, request)
        finally:
            with self.guard:
                self.now -= 1


def raw_stream(owner, member, sent: list[bytes]) -> list:
    """What a stream hears that sends these frames without waiting for anything."""
    wire = secure_channel(owner.address, member.authority, member.credential())
    heard = []
    for chunk in wire.stream_stream(STREAM)(iter(sent), timeout=20):
        frame = assemble(chunk, asks=False)
        heard.append(decode_message(frame.header, frame.body, BOUNDS))
    wire.close()
    return heard


def test_a_party_that_ignores_the_window_is_slowed_and_answered(tmp_path):
    back = Counting(seconds=0.02)
    with service(tmp_path / "o", back, Policy(limits=Limits(in_flight=2))) as owner:
        member = joined(owner.authority, tmp_path, "a", owner.address)
        sent = [frame_of(hello()), *(frame_of(step_request(1, micro), id=micro + 1) for micro in range(12))]
        heard = raw_stream(owner, member, sent)
        assert [type(message) for message in heard] == [Welcome] + [LossReply] * 12
        assert back.most == 2


def test_a_frame_that_speaks_for_somebody_else_is_refused_and_so_is_a_second_hello(tmp_path):
    with service(tmp_path / "o") as owner:
        member = joined(owner.authority, tmp_path, "a", owner.address)
        joined(owner.authority, tmp_path, "b", owner.address)
        for sent, reasons in (([frame_of(hello(), party="b")], ["party"]),
                              ([frame_of(step_request(1))], ["order"]),
                              ([frame_of(hello()), frame_of(step_request(1), party="b"), frame_of(hello())], ["order", "party"])):
            heard = raw_stream(owner, member, sent)
            assert sorted(message.reason for message in heard if isinstance(message, Refusal)) == reasons


def test_no_more_than_the_window_is_under_way(tmp_path):
    back = Counting(seconds=0.05)
    policy = Policy(limits=Limits(in_flight=2))
    with service(tmp_path / "o", back, policy) as owner, channel(joined(owner.authority, tmp_path, "a", owner.address)) as wire:
        futures = [wire.submit(step_request(1, micro)) for micro in range(8)]
        assert [future.result(10).loss.shape for future in futures] == [()] * 8
        assert wire.window == back.most == 2


def test_an_error_of_one_request_leaves_the_stream_and_tells_no_more_than_its_kind(tmp_path):
    class Failing(ToyBack):
        def answer(self, party, request):
            if request.key.micro == 1:
                raise ZeroDivisionError("a secret of the owner")
            if request.key.micro == 2:
                raise RefusedError("this cannot be done")
            return super().answer(party, request)

    with service(tmp_path / "o", Failing()) as owner, channel(joined(owner.authority, tmp_path, "a", owner.address)) as wire:
        with pytest.raises(Refused, match="ZeroDivisionError") as refusal:
            wire.submit(step_request(1, 1)).result(10)
        assert refusal.value.reason == "failed" and "secret" not in str(refusal.value)
        with pytest.raises(RefusedError, match="this cannot be done"):
            wire.submit(step_request(1, 2)).result(10)
        assert wire.submit(step_request(1, 0)).result(10)


def test_a_request_that_takes_too_long_is_refused_and_the_stream_goes_on(tmp_path):
    policy = Policy(limits=Limits(request_seconds=0.2))
    back = ToyBack(seconds=0.6)
    with service(tmp_path / "o", back, policy) as owner, channel(joined(owner.authority, tmp_path, "a", owner.address)) as wire:
        with pytest.raises(Refused) as refusal:
            wire.submit(step_request(1)).result(10)
        assert refusal.value.reason == "deadline"
        back.seconds = 0.0
        assert wire.submit(step_request(2)).result(10)


@pytest.mark.parametrize(("quota", "good"), [({"requests": 2}, 2), ({"tokens": 20}, 2), ({"megabytes": 1}, 9)])
def test_a_quota_holds_and_a_restart_does_not_renew_it(tmp_path, quota, good):
    policy = Policy(quotas=Quotas(**quota))
    with service(tmp_path / "o", policy=policy) as owner:
        member = joined(owner.authority, tmp_path, "a", owner.address)
        other = joined(owner.authority, tmp_path, "b", owner.address)
        with channel(member) as wire:
            for step in range(1, good + 1):
                wire.submit(step_request(step)).result(10)
            if "megabytes" not in quota:
                with pytest.raises(Refused, match="quota"):
                    wire.submit(step_request(good + 1)).result(10)
        with channel(other) as wire:
            assert wire.submit(step_request(1)).result(10)
        used = owner.status()["used"]["a"]
    with service(tmp_path / "o", policy=policy) as owner:
        assert owner.status()["used"]["a"] == used
        if "megabytes" not in quota:
            with channel(member, address=owner.address) as wire, pytest.raises(Refused, match="quota"):
                wire.submit(step_request(9)).result(10)


@pytest.mark.parametrize("change", [{"cut": 3}, {"codec": "int8"}, {"labels": "home"}, {"method": "other"},
                                    {"guards": ["strange"]}, {"fingerprint": "0" * 64}])
def test_what_the_policy_does_not_allow_gets_no_stream(tmp_path, change):
    policy = Policy(codecs=["fp32"], labels=["owner"], methods=["toy"], guards=[])
    with service(tmp_path / "o", policy=policy) as owner:
        member = joined(owner.authority, tmp_path, "a", owner.address)
        with channel(member, **change) as wire, pytest.raises(Refused) as refusal:
            _ = wire.welcome
        assert refusal.value.reason == "policy"
        assert owner.status()["refused"] == {"policy": 1}


def test_a_required_guard_has_to_be_announced(tmp_path):
    policy = Policy(required_guards=["noise"])
    with service(tmp_path / "o", policy=policy) as owner:
        member = joined(owner.authority, tmp_path, "a", owner.address)
        with channel(member) as wire, pytest.raises(Refused, match="requires a guard"):
            _ = wire.welcome
        with channel(member, guards=["noise"]) as wire:
            assert wire.window == 4


def test_too_many_parties_or_streams_wait_until_there_is_room(tmp_path):
    policy = Policy(limits=Limits(parties=1, sessions=1))
    with service(tmp_path / "o", policy=policy) as owner:
        one, two = (joined(owner.authority, tmp_path, name, owner.address) for name in ("a", "b"))
        with channel(one) as first:
            _ = first.welcome
            with channel(two, reconnect=HASTY) as wire, pytest.raises(OwnerAway, match="too many parties"):
                _ = wire.welcome
            with channel(one, run="other", reconnect=HASTY) as wire, pytest.raises(OwnerAway, match="too many streams"):
                _ = wire.welcome
            waiting = GrpcChannel(two, hello(), QUICK)
            time.sleep(0.2)
        assert waiting.welcome.window == 4
        waiting.close()


def test_an_invite_is_good_once_and_for_nothing_else(tmp_path):
    with service(tmp_path / "o") as owner:
        invite = owner.authority.invite("a", owner.address)
        credential = (invite.key.encode(), invite.certificate.encode())
        member = Membership.prepare(tmp_path / "a", invite)
        with pytest.raises(UsageError, match="party join"):
            member.credential()
        member.folder.joinpath("party.crt").write_bytes(credential[1])
        key = member.folder.joinpath("party.key").read_bytes()
        member.folder.joinpath("party.key").write_bytes(credential[0])
        with channel(member) as wire, pytest.raises(Refused, match="may not open a stream"):
            _ = wire.welcome
        member.folder.joinpath("party.key").write_bytes(key)
        join(member, *credential)
        join(member, *credential)   # the answer was lost, say
        thief = Membership.prepare(tmp_path / "thief", invite)
        with pytest.raises(Refused) as refusal:
            join(thief, *credential)
        assert refusal.value.reason == "used" and not thief.enrolled
        with channel(member) as wire:
            assert wire.window == 4
        certificate = member.credential().certificate
        join(member, member.credential().key, certificate)   # renewal with its own certificate
        assert member.credential().certificate != certificate
        assert [record["what"] for record in read_audit(tmp_path / "o" / "audit.jsonl")].count("renewed") == 1


def test_a_revocation_reaches_a_running_stream_at_its_next_request(tmp_path):
    with service(tmp_path / "o") as owner:
        member, other = (joined(owner.authority, tmp_path, name, owner.address) for name in ("a", "b"))
        with channel(member) as wire, channel(other) as unaffected:
            wire.submit(step_request(1)).result(10)
            assert Authority(tmp_path / "o").revoke("a") >= 1   # as another process does
            with pytest.raises(Refused) as refusal:
                wire.submit(step_request(2)).result(10)
            assert refusal.value.reason == "revoked"
            assert unaffected.submit(step_request(1)).result(10)
        with channel(member) as wire, pytest.raises(Refused) as refusal:
            _ = wire.welcome
        assert refusal.value.reason == "revoked"
        with pytest.raises(Refused):
            join(member, *vars(member.credential()).values())
        with pytest.raises(RefusedError, match="revoked"):
            owner.authority.invite("a", owner.address)


def test_who_is_not_the_owners_gets_nowhere_and_a_party_cannot_be_the_owner(tmp_path):
    with service(tmp_path / "o") as owner, service(tmp_path / "elsewhere") as foreign:
        stranger = joined(foreign.authority, tmp_path, "a", foreign.address)
        with channel(stranger, reconnect=HASTY, address=owner.address) as wire, pytest.raises(OwnerAway):
            _ = wire.welcome   # the stranger does not trust this owner, nor this owner the stranger
        member = joined(owner.authority, tmp_path / "m", "a", owner.address)
        stranger.folder.joinpath("authority.crt").write_bytes(member.authority)   # as if it trusted this owner
        with channel(stranger, reconnect=HASTY, address=owner.address) as wire, pytest.raises(OwnerAway):
            _ = wire.welcome
        # A party that plays the owner with its own certificate is not believed by another party.
        own = member.credential()
        false = grpc.server(ThreadPoolExecutor(2))
        port = false.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(own.key, own.certificate)]))
        false.start()
        with pytest.raises(grpc.FutureTimeoutError):
            grpc.channel_ready_future(secure_channel(f"127.0.0.1:{port}", member.authority, own)).result(1)
        false.stop(None).wait()
        assert owner.status()["parties"] == {}


def test_an_expired_certificate_gets_nowhere(tmp_path, monkeypatch):
    with service(tmp_path / "o") as owner:
        member = joined(owner.authority, tmp_path, "a", owner.address)
        with channel(member) as wire:
            wire.submit(step_request(1)).result(10)
            later = time.time() + 91 * 86400
            monkeypatch.setattr(time, "time", lambda: later)
            with pytest.raises(Refused) as refusal:   # on the stream that was opened in time
                wire.submit(step_request(2)).result(10)
            assert refusal.value.reason == "expired"
            with pytest.raises(RefusedError, match="expired"):   # the client looks before it connects
                GrpcChannel(member, hello(), HASTY)
            monkeypatch.undo()
        key = member.credential().key
        old = Credential(key, issue(owner.authority.credential, member.request(), "a", PARTY, -3600))
        monkeypatch.setattr(Membership, "credential", lambda self: old)   # a client that does not look: the handshake refuses
        with channel(member, reconnect=HASTY) as wire, pytest.raises(OwnerAway):
            _ = wire.welcome


def test_status_metrics_and_audit_tell_facts_and_no_content(tmp_path):
    with service(tmp_path / "o") as owner:
        with channel(joined(owner.authority, tmp_path, "a", owner.address), codec="bf16") as wire:
            for step in (1, 2):
                wire.submit(step_request(step)).result(10)
            traffic = wire.traffic
            status = owner.status()
            assert status["parties"]["a"]["requests"] == {"loss": 2} and status["in_flight"] == 0
            assert status["streams"] == [{"party": "a", "purpose": "training", "streams": 1}]
            seen = status["parties"]["a"]
            assert status["used"]["a"] == {"requests": 2, "tokens": 14, "bytes": seen["up"] + seen["down"]}
            assert traffic.requests == 2 and traffic.up > seen["up"] > 0   # the hello is the client's alone
            assert status["seconds"]["loss"]["requests"] == 2
        text = owner.metrics.text()
        assert 'deltaloom_requests_total{party="a",kind="loss"} 2' in text
        owner.write_status()
        assert json.loads((tmp_path / "o" / "status.json").read_text())["running"]
    records = read_audit(tmp_path / "o" / "audit.jsonl")
    assert [record["what"] for record in records] == ["started", "enrolled", "connected", "loss", "loss", "stopped"]
    allowed = {"time", "who", "what", "address", "certificate", "by", "run", "purpose", "codec", "labels", "method", "guards",
               "step", "micro", "tokens", "up", "down", "ms", "outcome"}
    assert set().union(*records) <= allowed


def test_nan_in_a_request_never_leaves_the_party(tmp_path):
    from deltaloom.errors import NonFiniteError

    with service(tmp_path / "o") as owner, channel(joined(owner.authority, tmp_path, "a", owner.address)) as wire:
        request = step_request(1)
        request.rows.hidden[0, 0] = float("nan")
        with pytest.raises(NonFiniteError):
            wire.submit(request)
        assert all(wire.submit(step_request(1, micro)).result(10) for micro in range(6))   # the window is whole


def test_two_servers_do_not_run_on_one_folder(tmp_path):
    with service(tmp_path / "o"), pytest.raises(UsageError, match="another server"), service(tmp_path / "o"):
        pass
    with pytest.raises(UsageError, match="address"), service(tmp_path / "o", listen="256.1.1.1:1"):
        pass
    with service(tmp_path / "o") as owner:   # the folder is free again
        assert owner.status()["running"]


def test_a_stream_whose_party_sends_no_more_gets_its_answers_and_ends(tmp_path):
    """The answer may be ready before or after the end of the party's half is noticed."""
    back = ToyBack()
    with service(tmp_path / "o", back) as owner:
        member = joined(owner.authority, tmp_path, "a", owner.address)
        for step in range(1, 40):
            back.seconds = (step % 3) * 0.001
            sent = [frame_of(hello(run=f"r{step}")), frame_of(step_request(step), id=9)]
            assert [type(message) for message in raw_stream(owner, member, sent)] == [Welcome, LossReply]


def test_a_closed_channel_takes_nothing(tmp_path):
    with service(tmp_path / "o", ToyBack(seconds=0.5)) as owner:
        with channel(joined(owner.authority, tmp_path, "a", owner.address)) as wire:
            future = wire.submit(step_request(1))
        with pytest.raises(RefusedError, match="closed"):
            future.result(10)
        with pytest.raises(RefusedError, match="closed"):
            wire.submit(step_request(2))
