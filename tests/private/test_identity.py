"""Keys, certificates, invites, the register, the policy file."""

from __future__ import annotations

import json
import threading
import time

import pytest

from deltaloom.errors import CheckpointError, RefusedError, SettingsError, UsageError
from deltaloom.private import identity
from deltaloom.private.authority import Authority, Invite
from deltaloom.private.identity import INVITE, OWNER, PARTY
from deltaloom.private.membership import Membership, read_invite
from deltaloom.private.policy import Limits, Policy, Quotas, read_policy, write_policy
from deltaloom.private.refused import Refused


@pytest.fixture
def authority(tmp_path):
    return Authority.create(tmp_path / "owner", "acme")


def invite_file(tmp_path, invite: Invite, mode=0o600):
    path = tmp_path / "i.invite"
    path.write_text(json.dumps(invite.as_dict()))
    path.chmod(mode)
    return path


def enrolled(authority, tmp_path, party="a", seconds=1000.0) -> Membership:
    invite = authority.invite(party, "127.0.0.1:1")
    member = Membership.prepare(tmp_path / party, invite)
    caller = authority.check(invite.certificate.encode())
    member.accept(authority.enrol(caller, member.request(), seconds))
    return member


def test_every_secret_file_is_its_owners_alone(authority, tmp_path):
    member = enrolled(authority, tmp_path)
    files = [path for folder in (authority.folder, member.folder) for path in folder.iterdir()]
    assert {path.name for path in files} >= {"authority.key", "register.json", "party.key", "party.crt"}
    assert [path.name for path in files if path.stat().st_mode & 0o077 and path.name != "register.lock"] == []
    assert authority.folder.stat().st_mode & 0o777 == member.folder.stat().st_mode & 0o777 == 0o700


def test_a_secret_that_others_may_read_is_not_used(authority, tmp_path):
    member = enrolled(authority, tmp_path)
    (member.folder / "party.key").chmod(0o644)
    with pytest.raises(UsageError, match="others on this machine"):
        member.credential()
    with pytest.raises(UsageError, match="others on this machine"):
        read_invite(invite_file(tmp_path, authority.invite("b", "x:1"), 0o640))


def test_a_partys_key_never_leaves_its_folder(authority, tmp_path):
    member = enrolled(authority, tmp_path)
    key = (member.folder / "party.key").read_bytes()
    assert key.startswith(b"-----BEGIN PRIVATE KEY")
    secret = key.splitlines()[1]
    assert secret not in member.request()
    assert [path.name for path in authority.folder.rglob("*") if path.is_file() and secret in path.read_bytes()] == []


def test_a_certificate_says_name_role_and_key_and_who_made_it(authority, tmp_path):
    member = enrolled(authority, tmp_path)
    pem = member.credential().certificate
    subject = authority.check(pem)
    assert (subject.name, subject.role, subject.key) == ("a", PARTY, identity.request_key(member.request()))
    assert identity.issued_by(pem, member.authority) and identity.matches(member.credential().key, pem)
    other = Authority.create(tmp_path / "other", "acme")   # the same name, another key
    assert not identity.issued_by(pem, other.credential.certificate)
    with pytest.raises(Refused) as refusal:
        other.check(pem)
    assert refusal.value.reason == "unknown"


def test_the_name_in_a_request_does_not_matter(authority, tmp_path):
    invite = authority.invite("a", "x:1")
    request = identity.signing_request(identity.new_key(), "somebody-else")
    made = authority.enrol(authority.check(invite.certificate.encode()), request, 100)
    assert identity.subject_of(made).name == "a"


def test_a_request_that_its_key_did_not_sign_is_refused(authority):
    caller = authority.check(authority.invite("a", "x:1").certificate.encode())
    good = identity.signing_request(identity.new_key(), "a").decode().splitlines()
    middle = good[2]
    good[2] = middle[:10] + ("A" if middle[10] != "A" else "B") + middle[11:]
    for request in ("\n".join(good).encode(), b"", b"x" * 100, b"x" * 100_000):
        with pytest.raises(CheckpointError):
            authority.enrol(caller, request, 100)
    assert authority.parties() == {}


def test_roles_have_usages_that_cannot_be_swapped(authority):
    from cryptography import x509

    for role, usage in ((OWNER, "serverAuth"), (PARTY, "clientAuth"), (INVITE, "clientAuth")):
        made = identity.new_credential(authority.credential, "a", role, 100)
        extension = x509.load_pem_x509_certificate(made.certificate).extensions.get_extension_for_class(x509.ExtendedKeyUsage)
        assert [one._name for one in extension.value] == [usage]


def test_a_new_invite_revokes_the_partys_unused_ones(authority):
    first, second = (authority.invite("a", "x:1").certificate.encode() for _ in range(2))
    with pytest.raises(Refused, match="revoked"):
        authority.check(first)
    assert authority.check(second).role == INVITE


def test_an_invite_and_a_certificate_expire(authority, tmp_path, monkeypatch):
    invite = authority.invite("a", "x:1", seconds=1000.0)
    member = enrolled(authority, tmp_path, "b", seconds=1000.0)
    certificate = member.credential().certificate
    assert authority.check(certificate).name == "b"
    later = time.time() + 1001
    monkeypatch.setattr(time, "time", lambda: later)
    with pytest.raises(RefusedError, match="expired"):
        member.credential()
    for pem in (invite.certificate.encode(), certificate):
        with pytest.raises(Refused) as refusal:
            authority.check(pem)
        assert refusal.value.reason == "expired"
    with pytest.raises(RefusedError, match="time of this invite"):
        read_invite(invite_file(tmp_path, invite))


def test_a_revocation_is_seen_by_another_authority_object_of_the_folder(authority, tmp_path):
    pem = enrolled(authority, tmp_path).credential().certificate
    running = Authority(authority.folder)
    subject = running.check(pem)
    assert authority.revoke("a") == 2   # the invite and the certificate
    with pytest.raises(Refused, match="revoked"):
        running.check_again(subject)
    with pytest.raises(UsageError, match="unknown party"):
        authority.revoke("nobody")


def test_many_threads_lose_no_entry_of_the_register(authority):
    others = [Authority(authority.folder) for _ in range(4)]
    threads = [threading.Thread(target=lambda owner=owner, i=i: [owner.invite(f"p{i}-{j}", "x:1") for j in range(5)])
               for i, owner in enumerate(others)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(authority.register().issued) == 20


def test_a_join_that_was_cut_off_goes_on_with_the_same_key(authority, tmp_path):
    invite = authority.invite("a", "x:1")
    first = Membership.prepare(tmp_path / "a", invite)
    key = (first.folder / "party.key").read_bytes()
    again = Membership.prepare(tmp_path / "a", invite)
    assert (again.folder / "party.key").read_bytes() == key
    with pytest.raises(RefusedError, match="another party"):
        Membership.prepare(tmp_path / "a", authority.invite("b", "x:1"))


def test_a_certificate_for_another_key_or_of_another_owner_is_not_accepted(authority, tmp_path):
    member = Membership.prepare(tmp_path / "a", authority.invite("a", "x:1"))
    other = Authority.create(tmp_path / "other", "acme")
    for made in (identity.new_credential(authority.credential, "a", PARTY, 100).certificate,
                 identity.issue(other.credential, member.request(), "a", PARTY, 100),
                 identity.issue(authority.credential, member.request(), "b", PARTY, 100),
                 identity.issue(authority.credential, member.request(), "a", INVITE, 100)):
        with pytest.raises(CheckpointError):
            member.accept(made)
    assert not member.enrolled


@pytest.mark.parametrize("name", ["", "A", "a b", "../a", "-a", "a-", "a" * 64, "ä"])
def test_names_are_plain(authority, name):
    with pytest.raises(SettingsError):
        authority.invite(name, "x:1")


def test_an_invite_is_read_with_distrust(authority, tmp_path):
    invite = authority.invite("a", "x:1")
    other = authority.invite("b", "x:1")
    mixed = invite.model_copy(update={"party": "b"})
    crossed = invite.model_copy(update={"key": other.key})
    for bad in (mixed, crossed):
        with pytest.raises(RefusedError, match="contradicts"):
            read_invite(invite_file(tmp_path, bad))
    path = invite_file(tmp_path, invite)
    path.write_text("{")
    with pytest.raises(UsageError, match="no invite"):
        read_invite(path)


def test_an_authority_is_not_made_over_something(authority):
    with pytest.raises(RefusedError):
        Authority.create(authority.folder, "acme")


def test_the_policy_file_comes_back_with_its_comments(tmp_path):
    policy = Policy(cut=3, codecs=["bf16"], limits=Limits(in_flight=7), quotas=Quotas(tokens=10**9), methods=["x"])
    path = write_policy(tmp_path / "policy.yaml", policy)
    assert read_policy(path) == policy
    assert "# layers of the front" in path.read_text()
    assert read_policy(write_policy(path, Policy())) == Policy()


@pytest.mark.parametrize(("text", "match"), [("codecs: [zip]", "codecs"), ("cut: 0", "cut"), ("cutt: 1", "cut"),
                                             ("limits: {x: 1}", "x"), ("labels: []", "labels"), ("- a", "mapping"),
                                             (": :", "cannot be read")])
def test_an_illegal_policy_is_refused(tmp_path, text, match):
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=match):
        read_policy(path)
