"""Malformed frames without end: bytes changed blindly, and headers and bodies changed under a checksum that fits."""

from __future__ import annotations

import copy
import random
import struct
import zlib

import msgpack

from deltaloom.private.wire.frame import MAGIC, PREAMBLE, VERSION
from tests.private.wired import frame_of, replies, requests

ODD = [None, True, -1, 0, 1, 2 ** 63, -2 ** 63, 1.5, float("nan"), float("inf"), "", "x", "x" * 3000, "../../etc", [], [1], {},
       {"a": 1}, b"z", [[[[]]]], 2 ** 31, 2 ** 40, ["hidden", "fp32", "float32", [2 ** 40, 2 ** 40]]]


def packed_frame(header: object, body: bytes) -> bytes:
    """A frame whose preamble and checksum fit what it holds."""
    packed = header if isinstance(header, bytes) else msgpack.packb(header, use_bin_type=True)
    start = PREAMBLE.pack(MAGIC, VERSION, 0, len(packed), len(body)) + packed
    return start + body + struct.pack("<I", zlib.crc32(body, zlib.crc32(start)))


class Mutator:
    """Malformed frames, and some that happen to be legal, by a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.good = [frame_of(message, codec) for message in requests() for codec in ("fp32", "bf16", "int8")]
        self.good += [frame_of(message) for message in replies()]

    def frame(self) -> bytes:
        """The next one."""
        good = self.random.choice(self.good)
        ways = [self._bytes, self._bytes, self._header, self._header, self._packed, self._body, self._noise]
        return self.random.choice(ways)(good)

    def _bytes(self, good: bytes) -> bytes:
        data = bytearray(good)
        for _ in range(self.random.choice([1, 1, 2, 8])):
            where = self.random.randrange(len(data) + 1)
            match self.random.randrange(6):
                case 0 if where < len(data):
                    data[where] ^= 1 << self.random.randrange(8)
                case 1:
                    data[where:where] = self.random.randbytes(self.random.choice([1, 4, 100]))
                case 2:
                    del data[where:where + self.random.choice([1, 4, 100])]
                case 3:
                    del data[where:]
                case 4:
                    data += self.random.choice(self.good)
                case _:
                    data[where:where + 4] = struct.pack("<I", self.random.choice([0, 2 ** 31, 2 ** 32 - 1, 65_535]))
            data = data or bytearray(b"\0")
        return bytes(data)

    def _header(self, good: bytes) -> bytes:
        header, body = self._parts(good)
        for _ in range(self.random.choice([1, 1, 2, 3])):
            self._spoil(header)
        return packed_frame(header, body)

    def _packed(self, good: bytes) -> bytes:
        header, body = self._parts(good)
        packed = bytearray(msgpack.packb(header))
        for _ in range(self.random.choice([1, 3])):
            packed[self.random.randrange(len(packed))] = self.random.randrange(256)
        return packed_frame(bytes(packed), body)

    def _body(self, good: bytes) -> bytes:
        header, body = self._parts(good)
        data = bytearray(body or bytes(8))
        for _ in range(self.random.choice([1, 16])):
            where = self.random.randrange(len(data))
            data[where:where + 4] = self.random.choice([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff" * 4, self.random.randbytes(4)])
        return packed_frame(header, bytes(data[:len(body)] if self.random.random() < 0.7 else data))

    def _noise(self, good: bytes) -> bytes:
        return self.random.randbytes(self.random.choice([1, 19, 20, 500]))

    def _parts(self, good: bytes) -> tuple[dict, bytes]:
        size = PREAMBLE.unpack_from(good)[3]
        return msgpack.unpackb(good[PREAMBLE.size:PREAMBLE.size + size]), good[PREAMBLE.size + size:-4]

    def _spoil(self, node: dict | list) -> None:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = self.random.choice(keys)
        if isinstance(node[key], (dict, list)) and self.random.random() < 0.8:
            self._spoil(node[key])
        elif self.random.random() < 0.2:
            del node[key]
        elif isinstance(node[key], int) and abs(node[key]) < 2 ** 62 and self.random.random() < 0.5:
            node[key] += self.random.choice([-1, 1, 7, 10 ** 6])
        else:
            node[key] = copy.deepcopy(self.random.choice(ODD))
