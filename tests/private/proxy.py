"""A TCP proxy between a party and the owner that cuts, delays, holds, spoils, reorders and duplicates connections."""

from __future__ import annotations

import random
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

PIECE = 4096


@dataclass
class Fault:
    """What happens to one connection, after some bytes of either direction. `None`: never.

    cut: reset both sides. hold: pass nothing any more, and keep both sides open. spoil: change a byte. swap: exchange two pieces.
    delay: seconds before each piece. twin: send the party's bytes over a second connection to the owner too.
    """

    cut: int | None = None
    hold: int | None = None
    spoil: int | None = None
    swap: int | None = None
    delay: float = 0.0
    twin: bool = False


@dataclass
class Proxy:
    """Listens on a port of its own; `fault(n)` says what happens to the n-th connection, from 0."""

    target: Callable[[], str]
    fault: Callable[[int], Fault]
    connections: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Proxy:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.1)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread(self._accept)
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=5)
        self._listener.close()

    def _thread(self, run: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=run, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                party, _ = self._listener.accept()
            except TimeoutError:
                continue
            number, self.connections = self.connections, self.connections + 1
            self._thread(self._carry, party, self.fault(number))

    def _carry(self, party: socket.socket, fault: Fault) -> None:
        sockets = [party]
        try:
            owner = self._connect()
            sockets.append(owner)
            twin = self._connect() if fault.twin else None
            sockets += [twin] if twin else []
            self._pump(party, owner, twin, fault)
        except OSError:
            pass
        finally:
            for one in sockets:
                with suppress(OSError):
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")   # a reset, not an orderly end
                one.close()

    def _connect(self) -> socket.socket:
        host, _, port = self.target().rpartition(":")
        return socket.create_connection((host, int(port)), timeout=5)

    def _pump(self, party: socket.socket, owner: socket.socket, twin: socket.socket | None, fault: Fault) -> None:
        seen, kept = 0, b""
        while not self._stop.is_set():
            if fault.hold is not None and seen >= fault.hold:
                self._stop.wait(0.1)   # as a network that lost both ends: they hear nothing
                continue
            ready, _, _ = select.select([party, owner, *([twin] if twin else [])], [], [], 0.1)
            for source in ready:
                data = source.recv(PIECE)
                if source is twin:
                    twin = twin if data else None   # what the owner tells the twin reaches nobody
                    continue
                if not data:
                    return
                before, seen = seen, seen + len(data)
                if fault.cut is not None and seen >= fault.cut:
                    return
                if fault.spoil is not None and before <= fault.spoil < seen:
                    data = data[:-1] + bytes([data[-1] ^ 1])
                if fault.swap is not None and source is party and seen >= fault.swap and not kept:
                    kept, data = data, b""
                elif kept and source is party:
                    data, kept = data + kept, b"-"   # once
                    data = data[:-1] if kept == b"-" and data.endswith(b"-") else data
                time.sleep(fault.delay)
                (owner if source is party else party).sendall(data)
                if twin and source is party:
                    with suppress(OSError):
                        twin.sendall(data)


def random_cuts(seed: int, most: int) -> Callable[[int], Fault]:
    """Every connection is cut after a random number of bytes."""
    chance = random.Random(seed)
    return lambda number: Fault(cut=chance.randrange(1500, most))
