"""Joint rounds that another engine carries: the party's process, with model and data in memory, waits at a socket for them.

    engine -> [ carry: one short process for each message ] -> socket -> [ Mailbox: the party's own process ] -> Participant

On the socket both speak the frames of our own wire, the caller in the owner's place: the party says which common values it has,
hears where the rounds stand, and answers. The caller may be code that came from elsewhere, and may run as another user: all that
it can do here is to bring common values that fit the party's own and take the answer away. Whoever may open the folder of the
socket may call.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from deltaloom.errors import DataError, DeltaloomError, RefusedError, SettingsError, UsageError
from deltaloom.private.messages import DoneReply
from deltaloom.private.refused import Refused
from deltaloom.private.round_messages import AnswerReply, AnswerRequest, RoundReply, RoundRequest, StandReply, StandRequest
from deltaloom.private.wire.convert import decode_message, encode_message
from deltaloom.private.wire.frame import CHUNK, Assembler, chunks
from deltaloom.private.wire.schema import LOSSLESS, Bounds, check_header

LONGEST_PATH = 100       # bytes of a socket's path; systems end at 103 to 107
SECONDS = 30.0           # that either side may take over a message that it has begun
TURN = 0.5               # seconds between two looks whether somebody calls
LENGTH = struct.Struct("<I")


class Mailbox:
    """A party's end; `ask` is what a `Participant` asks. Nothing is answered twice: a caller that comes again hears it anew."""

    def __init__(self, path: Path, party: str, own: Mapping[str, Tensor], *, say: Callable[[str], None] = print) -> None:
        """`own`: tensors whose names and shapes the common values must have. A file that a killed process left is replaced.

        Raises:
            SettingsError: the path is too long for a socket. UsageError: another process waits there, or no socket can be made.
        """
        self._path, self._party, self._say = path, party, say
        self._own = {name: tuple(tensor.shape) for name, tensor in own.items()}
        self._bounds = _bounds(own)
        self._caller: socket.socket | None = None
        self._told = False
        self._listener = _listen(path)

    def ask(self, request: RoundRequest) -> RoundReply:
        """The reply to one request; where the rounds stand is known when somebody calls, however long that takes."""
        if isinstance(request, StandRequest):
            return self._stand(request)
        if isinstance(request, AnswerRequest):
            return self._answer(request)
        self._hang_up()
        return DoneReply()

    def close(self) -> None:
        """Nobody waits here any longer."""
        self._hang_up()
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def _stand(self, request: StandRequest) -> StandReply:
        self._hang_up()
        if not self._told:
            self._say(f"Waiting at {self._path} for joint rounds.")
            self._told = True
        while True:
            caller = self._accept()
            try:
                _send(caller, request, self._party)
                stand = self._checked(_receive(caller, self._bounds, asks=False))
            except (OSError, DeltaloomError) as error:
                caller.close()
                self._say(f"A caller was turned away: {error}")
                continue
            self._caller = caller
            return stand

    def _answer(self, request: AnswerRequest) -> AnswerReply:
        caller = self._caller
        if caller is None:
            return AnswerReply("late")
        try:
            _send(caller, request, self._party)
            reply = _receive(caller, self._bounds, asks=False)
            if isinstance(reply, AnswerReply):
                return reply
            raise DataError("the caller did not take the answer", got=type(reply).__name__)
        except (OSError, Refused, DataError) as error:
            self._say(f"The answer could not be handed over ({error}); it is kept, and given to whoever asks again.")
            return AnswerReply("late")
        finally:
            self._hang_up()

    def _accept(self) -> socket.socket:
        while True:
            try:
                caller, _ = self._listener.accept()
            except TimeoutError:   # a look aside now and then lets signals through
                continue
            caller.settimeout(SECONDS)
            return caller

    def _checked(self, stand: object) -> StandReply:
        if not isinstance(stand, StandReply):
            raise DataError("this says not where the rounds stand", got=type(stand).__name__)
        if stand.told:
            raise RefusedError("guards of updates are for rounds that the owner holds", got=sorted(stand.told))
        if stand.common is None:
            raise DataError("the common values are missing")
        check_values(stand.common, self._own)
        return stand

    def _hang_up(self) -> None:
        if self._caller is not None:
            self._caller.close()
            self._caller = None


def carry(stand: StandReply, path: Path, *, patience: float = 60.0) -> AnswerRequest | None:
    """Bring the party at a socket where the rounds stand, and take its answer along; None if none is wanted.

    Waits up to `patience` seconds for somebody to be there, then as long as the party trains.

    Raises:
        UsageError: nobody is there. DataError: the party turned it away (its own log says why), or what it gave is no answer.
    """
    bounds = _bounds(stand.common or {})
    try:
        with _reached(path, patience) as party:
            _receive(party, bounds, asks=True)
            _send(party, stand, "")
            if not stand.wanted:
                return None
            party.settimeout(None)
            answer = _receive(party, bounds, asks=True, waited=SECONDS)
            if not isinstance(answer, AnswerRequest) or answer.phase != stand.phase:
                raise DataError("what the party gave is no answer to this round", got=type(answer).__name__)
            _send(party, AnswerReply("accepted"), "")
            return answer
    except (OSError, Refused) as error:
        raise DataError("the party ended the call; its own log says why", got=type(error).__name__) from None


def check_values(values: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Whether values have these names and shapes, and are floating-point; finite they are by the wire.

    Raises:
        DataError: they have not; names each.
    """
    problems = [f"'{name}' is missing" for name in shapes if name not in values]
    for name, tensor in values.items():
        if name not in shapes:
            problems.append(f"'{name}' is not among the party's own tensors")
        elif tuple(tensor.shape) != shapes[name] or not tensor.is_floating_point():
            problems.append(f"'{name}' is {tensor.dtype} {tuple(tensor.shape)}, not {shapes[name]}")
    if problems:
        raise DataError("these common values do not fit the delta here", problems=problems[:20])


def _bounds(values: Mapping[str, Tensor]) -> Bounds:
    """No hidden states travel here, and no more values than there are."""
    return Bounds(width=1, outputs=1, positions=None, tokens=1, rows=1, values=sum(one.numel() for one in values.values()),
                  session_tokens=1, codecs=frozenset({LOSSLESS}))


def _listen(path: Path) -> socket.socket:
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise SettingsError("the path of the mailbox is too long for a socket", got=str(path),
                            legal=f"up to {LONGEST_PATH} bytes", hint="Name a shorter one, in a folder that is yours.")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _clear(path)
        listener.bind(str(path))
        path.chmod(0o660)   # before anyone can connect; who comes as far as the file is the folder's to say
        listener.listen(8)
        listener.settimeout(TURN)
    except OSError as error:
        listener.close()
        raise UsageError("no mailbox can be made here", got=f"{path}: {error.strerror or error}",
                         hint="Name a place in a folder that exists and is yours.") from None
    except BaseException:
        listener.close()
        raise
    return listener


def _clear(path: Path) -> None:
    """Remove what a killed process left.

    Raises:
        UsageError: somebody waits there, or it is something else.
    """
    if not path.exists():
        return
    if not path.is_socket():
        raise UsageError("there is something else at the place of the mailbox", got=str(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trial:
        try:
            trial.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
    raise UsageError("another process waits at this mailbox", got=str(path), hint="Is this run under way already?")


def _reached(path: Path, patience: float) -> socket.socket:
    until = time.monotonic() + patience
    while True:
        party = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            party.connect(str(path))
            return party
        except OSError as error:
            party.close()
            if time.monotonic() > until:
                raise UsageError("the party's process does not wait at its mailbox", got=type(error).__name__,
                                 hint="Start it; it says where it waits.") from None
        time.sleep(TURN)


def _send(there: socket.socket, message: Any, party: str) -> None:
    for chunk in chunks(encode_message(message, id=1, party=party, codec=LOSSLESS)):
        there.sendall(LENGTH.pack(len(chunk)) + chunk)


def _receive(there: socket.socket, bounds: Bounds, *, asks: bool, waited: float | None = None) -> Any:
    """One message. `waited`: seconds that it may take from when it has begun, of a socket that waits for it without end.

    Raises:
        OSError: nothing came, or not in time. Refused: it is no frame, or not one that may come from there.
    """
    def judge(header: dict[str, Any]) -> tuple[Any, int]:
        head = check_header(header, bounds, asks=asks)
        return head, head.size

    assembler = Assembler(judge, bounds.most_body)
    while True:
        size, = LENGTH.unpack(_exactly(there, LENGTH.size))
        there.settimeout(waited if waited is not None else there.gettimeout())
        if size > CHUNK:
            raise Refused("oversized", "a chunk of illegal size", got=size, legal=f"1 to {CHUNK} bytes")
        frame = assembler.feed(_exactly(there, size))
        if frame is not None:
            return decode_message(frame.header, frame.body, bounds)


def _exactly(there: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = there.recv(size - len(parts))
        if not part:
            raise ConnectionResetError("the other side hung up")
        parts += part
    return bytes(parts)
