"""A frame: what one side sends at once, and how it is taken apart with distrust.

    magic (4) | version (2) | flags (2, zero) | header bytes (4) | body bytes (8) | header: msgpack | body: buffers | CRC-32 (4)

All numbers are little-endian. A frame travels as chunks; the first holds everything up to the body's beginning, so a header is
judged before a single byte of the body is given room, and a body gets exactly the room that its header accounts for. The CRC
is against faults of machines and programs; against people there is TLS.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from deltaloom.errors import UsageError
from deltaloom.private.refused import Refused

try:
    import msgpack
except ImportError:
    raise UsageError("private tuning needs the package 'msgpack'", hint="pip install 'deltaloom[private]'") from None

MAGIC = b"DLTW"
VERSION = 1
PREAMBLE = struct.Struct("<4sHHIQ")
CHUNK = 512 * 1024          # bytes of one message of the transport: its best speed lies between 256 KiB and 1 MiB
MOST_HEADER = 64 * 1024     # 512 rows with their offsets take 4 KiB
MOST_ITEMS = 2048           # of a list or map in a header: msgpack makes room for what a list claims, at every level
ALIGNMENT = 8               # every buffer of a body begins at a multiple of it
CRC = struct.Struct("<I")


@dataclass(frozen=True)
class Frame:
    """A whole frame: its header, which the judge accepted, and its body."""

    header: Any
    body: memoryview
    bytes: int


def padded(size: int) -> int:
    """The next multiple of the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def encode_frame(header: dict[str, Any], buffers: Iterable[bytes]) -> bytes:
    """The bytes of a frame."""
    packed = msgpack.packb(header, use_bin_type=True)
    if len(packed) > MOST_HEADER:
        raise Refused("oversized", "a header that should be sent is too large", got=f"{len(packed)} bytes",
                      legal=f"up to {MOST_HEADER}")
    parts = [part for buffer in buffers for part in (buffer, bytes(padded(len(buffer)) - len(buffer)))]
    start = PREAMBLE.pack(MAGIC, VERSION, 0, len(packed), sum(map(len, parts))) + packed
    crc = zlib.crc32(start)
    for part in parts:
        crc = zlib.crc32(part, crc)
    return b"".join((start, *parts, CRC.pack(crc)))


def chunks(frame: bytes) -> Iterator[bytes]:
    """A frame in pieces of the transport's size."""
    view = memoryview(frame)
    for start in range(0, len(view), CHUNK):
        yield bytes(view[start:start + CHUNK])


class Assembler:
    """Chunks to frames; holds at most one frame, and gives room only to a body that the judge has sized.

    `judge` gets the header, a map of plain values, and returns what stands for it from then on and the bytes of its body.
    """

    def __init__(self, judge: Callable[[dict[str, Any]], tuple[Any, int]], most_body: int) -> None:
        self._judge = judge
        self._most = most_body
        self._header: Any = None
        self._body: bytearray | None = None
        self._filled = 0
        self._crc = 0
        self._tail = b""
        self._bytes = 0

    @property
    def inside(self) -> bool:
        """Whether a frame has begun and not ended."""
        return self._body is not None

    def feed(self, chunk: bytes) -> Frame | None:
        """The frame that this chunk completes, if it does.

        Raises:
            Refused: what came is no frame, or the judge refused its header; nothing after it on this stream has a meaning.
        """
        if not chunk or len(chunk) > CHUNK:
            _refuse("truncated" if not chunk else "oversized", "a chunk of illegal size", len(chunk), f"1 to {CHUNK} bytes")
        rest = memoryview(chunk)
        if self._body is None:
            rest = self._begin(rest)
        self._bytes += len(chunk)
        return self._take(rest)

    def finish(self) -> None:
        """The stream has ended.

        Raises:
            Refused: in the middle of a frame.
        """
        if self._body is not None:
            _refuse("truncated", "the stream ended inside a frame", self._filled, f"{len(self._body)} bytes and a checksum")

    def _begin(self, chunk: memoryview) -> memoryview:
        if len(chunk) < PREAMBLE.size:
            _refuse("truncated", "the beginning of a frame is missing", len(chunk), f"at least {PREAMBLE.size} bytes")
        magic, version, flags, header_bytes, body_bytes = PREAMBLE.unpack_from(chunk)
        if magic != MAGIC:
            _refuse("magic", "this is no frame of deltaloom", bytes(magic).hex(), MAGIC.hex())
        if version != VERSION or flags:
            _refuse("version", "the other side speaks another version of the protocol", f"version {version}, flags {flags}",
                    f"version {VERSION}, flags 0")
        if header_bytes > MOST_HEADER or body_bytes > self._most:
            _refuse("oversized", "a frame is too large", f"header {header_bytes}, body {body_bytes}",
                    f"up to {MOST_HEADER} and {self._most}")
        start = PREAMBLE.size + header_bytes
        if len(chunk) < start:
            _refuse("truncated", "a header is not whole in its first chunk", len(chunk), f"at least {start} bytes")
        header, size = self._judge(unpack_header(chunk[PREAMBLE.size:start]))
        if size != body_bytes:
            _refuse("shape", "a body has other bytes than its tensors", body_bytes, f"{size} bytes")
        self._header, self._body = header, bytearray(body_bytes)
        self._filled, self._tail, self._bytes = 0, b"", 0
        self._crc = zlib.crc32(chunk[:start])
        return chunk[start:]

    def _take(self, rest: memoryview) -> Frame | None:
        body = self._body
        if body is None:
            return None
        room = min(len(body) - self._filled, len(rest))
        part, rest = rest[:room], rest[room:]
        body[self._filled:self._filled + room] = part
        self._filled += room
        self._crc = zlib.crc32(part, self._crc)
        self._tail += bytes(rest[:CRC.size + 1])
        if len(rest) > CRC.size or len(self._tail) > CRC.size:
            _refuse("oversized", "bytes follow the end of a frame in one chunk", len(rest), f"{CRC.size} bytes of checksum")
        if len(self._tail) < CRC.size:
            return None
        if CRC.unpack(self._tail)[0] != self._crc:
            _refuse("checksum", "a frame did not arrive as it was sent", self._tail.hex(), None)
        frame = Frame(self._header, memoryview(body), self._bytes)
        self._header = self._body = None
        return frame


def unpack_header(raw: memoryview) -> dict[str, Any]:
    """The map of a header: plain values only, no key twice.

    Raises:
        Refused: anything else.
    """
    try:
        header = msgpack.unpackb(raw, raw=False, strict_map_key=True, max_ext_len=0, max_bin_len=0,
                                 max_str_len=MOST_HEADER, max_array_len=MOST_ITEMS, max_map_len=MOST_ITEMS,
                                 object_pairs_hook=_unique)
    except Exception as error:  # the parser's errors have several bases; all mean the same
        _refuse("header", "a header is not legal msgpack", f"{type(error).__name__}: {str(error)[:80]}", "one map")
    if not isinstance(header, dict):
        _refuse("header", "a header is no map", type(header).__name__, "one map")
    return header


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a key comes twice")
    return record


def _refuse(reason: str, what: str, got: object, legal: object) -> NoReturn:
    raise Refused(reason, what, got=got, legal=legal)
