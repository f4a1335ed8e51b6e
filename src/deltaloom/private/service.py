"""The owner's service: gRPC with mutual TLS, one method for enrolment and one for streams; who calls, and an orderly end.

Nobody without a certificate of the owner's authority gets past the handshake; an invite's certificate may enrol and nothing
else. What a frame means is the desk's matter, how a stream runs is the stream's.
"""

from __future__ import annotations

import fcntl
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn, TextIO

from deltaloom.errors import DeltaloomError, ResourceError, UsageError
from deltaloom.files import write_atomic
from deltaloom.private.audit import Audit
from deltaloom.private.authority import DAY, Authority
from deltaloom.private.desk import Desk, refusal_of
from deltaloom.private.identity import INVITE, PARTY, Subject, subject_of
from deltaloom.private.journal import log
from deltaloom.private.messages import Answering
from deltaloom.private.metrics import Metrics
from deltaloom.private.policy import Policy, read_policy
from deltaloom.private.refused import Refused
from deltaloom.private.round_messages import Coordinating
from deltaloom.private.stream import Stream
from deltaloom.private.transport import SERVER_OPTIONS, SERVICE, grpc
from deltaloom.private.usage import Usage
from deltaloom.private.wire.convert import Refusal
from deltaloom.private.wire.frame import chunks
from deltaloom.train.signals import polite_stop

STATUS_SECONDS = 2.0
GRACE = 10.0   # seconds for requests under way when the service stops
Place = tuple[str, str, str]   # party, purpose, run


class Service:
    """An owner's running server.

    Raises:
        UsageError: the folder is no owner's, the policy is illegal, or the address cannot be used.
        CheckpointError: the audit log is broken.
    """

    def __init__(self, folder: Path, executor: Answering, *, listen: str = "127.0.0.1:0", policy: Policy | None = None,
                 coordinator: Callable[[Audit], Coordinating] | None = None) -> None:
        """`coordinator` makes that of the joint rounds, once this server is the folder's only one."""
        self.folder = folder
        self.authority = Authority(folder)
        self.policy = read_policy(folder / "policy.yaml") if policy is None else policy
        self._lock = threading.Lock()
        self._streams: dict[Place, Stream] = {}
        self._stopping = False
        limits = self.policy.limits
        streams = limits.parties * (2 + limits.sessions)
        self._workers = ThreadPoolExecutor(limits.parties * (limits.in_flight + limits.sessions), "worker")
        self._held = self._hold()
        try:
            self.audit = Audit(folder / "audit.jsonl")
            self.metrics = Metrics()
            rounds = None if coordinator is None else coordinator(self.audit)
            self.desk = Desk(executor, self.policy, self.audit, self.metrics, Usage(self.audit.records()), rounds)
            self._server = grpc.server(ThreadPoolExecutor(streams + 8, "grpc"), options=SERVER_OPTIONS,
                                       maximum_concurrent_rpcs=streams + 8)
            methods = {"Stream": grpc.stream_stream_rpc_method_handler(self._stream),
                       "Enrol": grpc.unary_unary_rpc_method_handler(self._enrol)}
            self._server.add_registered_method_handlers(SERVICE, methods)
            self.address = self._bind(listen)
        except BaseException:
            self._held.close()
            raise

    def _hold(self) -> TextIO:
        """The folder's lock, held until the service or its process ends: two servers would write over one another's state."""
        held = (self.folder / "serving.lock").open("w")
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            held.close()
            raise UsageError("another server is running on this owner's folder", got=str(self.folder),
                             hint="Stop it first, or serve another folder.") from None
        return held

    def start(self) -> None:
        """Begin to serve."""
        self._server.start()
        self.audit.write("owner", "started", durable=True, address=self.address)
        log("started", address=self.address, parties=len(self.authority.parties()))
        self.write_status()

    def stop(self, grace: float = GRACE) -> None:
        """Take nothing new, answer what is under way, end all streams, and leave everything on the disk."""
        with self._lock:
            self._stopping = True
            streams = list(self._streams.values())
        for stream in streams:
            stream.end(Refusal("stopping", "The owner is shutting down; try again."))
        # gRPC waits for the streams, which end once their requests are answered, and cancels what is left after the grace.
        self._server.stop(grace).wait()
        self._workers.shutdown(wait=False, cancel_futures=True)
        try:
            self.audit.write("owner", "stopped", durable=True)
        except ResourceError as error:
            log("stop not noted", level=logging.WARNING, error=str(error))
        self.write_status()
        self._held.close()
        log("stopped")

    def serve_until_stopped(self) -> str | None:
        """Serve until a signal (SIGTERM, Ctrl-C) asks to stop; its name."""
        with polite_stop() as request:
            self.start()
            written = time.monotonic()
            while not request:
                time.sleep(0.1)
                if time.monotonic() - written >= STATUS_SECONDS:
                    written = time.monotonic()
                    self.write_status()
            log("stopping", signal=request.name)
        self.stop()
        return request.name

    def status(self) -> dict[str, Any]:
        """The facts of `owner status`."""
        used = {party: vars(self.desk.usage.of(party)) for party in self.authority.parties()}
        audit = {"lines": self.audit.head.lines, "hash": self.audit.head.hash}
        return {"address": self.address, "running": not self._stopping, "time": time.time(), **self.metrics.snapshot(),
                "used": used, "audit": audit}

    def write_status(self) -> None:
        """Leave the facts in the owner's folder for other commands: `status.json`, and `metrics.prom` for a collector."""
        try:
            write_atomic(self.folder / "status.json", json.dumps(self.status(), indent=1))
            write_atomic(self.folder / "metrics.prom", self.metrics.text())
        except ResourceError as error:
            log("status not written", level=logging.WARNING, error=str(error))

    def _bind(self, listen: str) -> str:
        credential = self.authority.server_credential()
        pairs = [(credential.key, credential.certificate)]
        secured = grpc.ssl_server_credentials(pairs, root_certificates=self.authority.credential.certificate,
                                              require_client_auth=True)
        try:
            port = self._server.add_secure_port(listen, secured)
        except RuntimeError:
            port = 0
        if not port:
            raise UsageError("the address to listen at cannot be used", got=listen, legal="host:port, a free port")
        return f"{listen.rpartition(':')[0]}:{port}"

    def _caller(self, context: Any) -> Subject:
        """Who calls, by the certificate that the handshake has verified.

        Raises:
            Refused: unknown, revoked or expired.
        """
        pem = context.auth_context().get("x509_pem_cert")
        if not pem:
            raise Refused("unknown", "a caller without a certificate")
        return self.authority.check(pem[0])

    def _enrol(self, request: bytes, context: Any) -> bytes:
        try:
            caller = self._caller(context)
            if caller.role not in (INVITE, PARTY):
                raise Refused("unknown", "this certificate may not enrol", got=caller.role)
            if caller.role == PARTY and caller.name not in self.authority.parties():
                raise Refused("unknown", "an unknown party", got=caller.name)
            made = self.authority.enrol(caller, request, self.policy.certificate_days * DAY)
            what = "enrolled" if caller.role == INVITE else "renewed"
            self.audit.write(caller.name, what, durable=True, certificate=subject_of(made).serial, by=caller.serial)
            log(what, party=caller.name)
            return made
        except DeltaloomError as error:
            refusal = self._note_refusal(error, "enrol")
            _abort(context, refusal)

    def _stream(self, incoming: Iterator[bytes], context: Any) -> Iterator[bytes]:
        try:
            caller = self._caller(context)
            if caller.role != PARTY:
                raise Refused("unknown", "this certificate may not open a stream", got=caller.role, hint="Enrol first.")
        except DeltaloomError as error:
            _abort(context, self._note_refusal(error, "stream"))
        stream = Stream(caller.name, self.desk, self._workers, lambda: self.authority.check_again(caller))
        try:
            visit = stream.greet(incoming)
            place = (caller.name, visit.hello.purpose, visit.hello.run)
            self._enter(place, stream)
        except DeltaloomError as error:
            yield from chunks(stream.refusal(self._note_refusal(error, caller.name)))
            return
        try:
            yield from stream.serve(incoming, visit)
        finally:
            self._leave(place, stream)

    def _enter(self, place: Place, stream: Stream) -> None:
        """Give a stream its place; an earlier one at the same place (its connection broke unseen) ends.

        Raises:
            Refused: too many parties or streams.
        """
        party, purpose, _ = place
        with self._lock:
            if self._stopping:
                raise Refused("stopping", "the owner is shutting down; try again")
            others = [one for one in self._streams if one != place]
            same = [one for one in others if one[:2] == (party, purpose)]
            limits = self.policy.limits
            if len({one[0] for one in others} | {party}) > limits.parties:
                raise Refused("busy", "too many parties are connected", legal=f"up to {limits.parties}")
            if len(same) >= (limits.sessions if purpose == "inference" else 1):
                raise Refused("busy", f"too many streams of this party for {purpose}", got=len(same) + 1)
            earlier = self._streams.get(place)
            self._streams[place] = stream
            self.metrics.opened(party, purpose)
            self.desk.leftovers.came(party, place[2])
        if earlier is not None:
            earlier.end(Refusal("superseded", "A newer stream of the same run took this one's place."))
        log("stream opened", party=party, purpose=purpose, run=place[2])

    def _leave(self, place: Place, stream: Stream) -> None:
        with self._lock:
            if self._streams.get(place) is stream:
                del self._streams[place]
            self.metrics.opened(place[0], place[1], -1)
            self.desk.leftovers.went(place[0], place[2])
        log("stream closed", party=place[0], purpose=place[1], run=place[2])

    def _note_refusal(self, error: DeltaloomError, where: str) -> Refusal:
        refusal = refusal_of(error)
        self.metrics.refused(refusal.reason)
        log("refused", where=where, reason=refusal.reason)
        if refusal.reason in ("unknown", "revoked", "expired", "used"):
            self.audit.write(where, "refused", reason=refusal.reason)
        return refusal


def _abort(context: Any, refusal: Refusal) -> NoReturn:
    context.abort(grpc.StatusCode.PERMISSION_DENIED, f"{refusal.reason}: {refusal.message[:500]}")
    raise RuntimeError("abort does not return")


