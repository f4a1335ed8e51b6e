"""The schema of headers: for each kind of frame its fields, its tensors, and the shapes these must have.

A shape is a tuple of words; a word has one size within a frame, so that the hidden states have as many tokens as the rows'
lengths say, and a gradient as many places as its outputs. `Bounds` says how large each word may be on this stream.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from deltaloom.private.identity import NAME
from deltaloom.private.refused import REASONS, Refused
from deltaloom.private.wire import checks
from deltaloom.private.wire.checks import Check
from deltaloom.private.wire.codecs import codec_named
from deltaloom.private.wire.frame import ALIGNMENT, padded
from deltaloom.private.wire.integers import WIDTHS

CROSSING, EXACT, INTEGERS, VALUES = "crossing", "exact", "integers", "values"
DTYPES = ("float32", "bfloat16", "float16")
LOSSLESS = "fp32"
RAW, WIDE = "bytes", "i64"
EXACT_BYTES = {(RAW, "uint8"): 1, (WIDE, "int64"): 8}   # what values of rounds may be besides floating-point
TENSOR_NAME = r"[A-Za-z0-9_.:/-]+"
MOST_TENSORS = 1024
MOST_NAME = 200


@dataclass(frozen=True)
class Entry:
    """A tensor of a kind: how it travels, and its shape in words."""

    name: str
    group: str
    shape: tuple[str, ...] = ()
    optional: bool = False


@dataclass(frozen=True)
class Kind:
    """What a frame of this kind has. `rows`: lengths, offsets, layout too. `many`: further tensors of free names and shapes."""

    name: str
    asks: bool
    fields: dict[str, Check] = field(default_factory=dict)
    tensors: tuple[Entry, ...] = ()
    rows: bool = False
    many: bool = False


@dataclass(frozen=True)
class Bounds:
    """What is allowed on a stream; the same for both directions. A size of 0 for `outputs`: the owner has no head."""

    width: int
    outputs: int
    positions: int | None
    tokens: int
    rows: int
    values: int
    session_tokens: int
    codecs: frozenset[str]
    known: dict[str, int] = field(default_factory=dict)

    def expecting(self, known: dict[str, int]) -> Bounds:
        """The same with sizes that a reply must have because of its request."""
        return replace(self, known=known)

    @property
    def most_body(self) -> int:
        """Bytes of the largest legal body."""
        hidden = 4 * self.tokens * (self.width + 1)
        outputs = max(4 * self.places(columns) * (columns + 1) for columns in (self.width, self.outputs))
        return max(hidden + outputs + 16 * self.tokens, 8 * self.values) + 2 * ALIGNMENT * MOST_TENSORS

    def places(self, columns: int) -> int:
        """Places that a tensor with so many columns may have: as much as the hidden states take, or one place each row."""
        return self.tokens if columns <= self.width else max(self.rows, self.tokens * self.width // max(columns, 1))


@dataclass(frozen=True)
class TensorHead:
    """One tensor of a frame: where its bytes lie in the body."""

    name: str
    codec: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Head:
    """A header that was checked: `size` bytes of body belong to it."""

    kind: Kind
    id: int
    party: str
    step: int
    micro: int
    fields: dict[str, Any]
    tensors: dict[str, TensorHead]
    size: int

    @property
    def tokens(self) -> int:
        """Tokens of the rows, 0 without rows."""
        return sum(self.fields.get("lengths", ()))


LAYOUT = checks.word("packed", "padded", "masked")
OUTPUT = checks.word("hidden", "logits")
SESSION = checks.name("[A-Za-z0-9_-]+")
WORD = "[a-z0-9][a-z0-9_-]*"
ROUND = checks.whole(0, 2 ** 31)
PHASE = {"round": ROUND, "attempt": ROUND, "version": ROUND, "phase": checks.name(WORD)}
HIDDEN = Entry("hidden", CROSSING, ("tokens", "width"))
PLACES = Entry("places", INTEGERS, ("places",))
LABELS = Entry("labels", INTEGERS, ("places",))
OUTPUTS = Entry("outputs", CROSSING, ("places", "columns"))
ROWS = {"lengths": checks.whole_list(1), "offsets": checks.whole_list(), "layout": LAYOUT}
ENVELOPE = {"kind": checks.name(WORD), "id": checks.whole(), "party": checks.name(NAME.pattern, empty=True),
            "step": checks.whole(), "micro": checks.whole(0, 2 ** 31),
            "fields": Check("a map", lambda value: isinstance(value, dict)),
            "tensors": Check(f"a list of up to {MOST_TENSORS}",
                             lambda value: isinstance(value, list) and len(value) <= MOST_TENSORS)}
HELLO = {"run": SESSION, "purpose": checks.word("training", "inference", "rounds"), "package": checks.text(40),
         "codec": checks.name(WORD), "cut": checks.whole(), "method": checks.name(WORD), "guards": checks.names(WORD),
         "labels": checks.word("owner", "home"), "fingerprint": checks.text(100)}
WELCOME = {"facts": checks.facts(), "window": checks.whole(1, 1024), "limits": checks.facts(), "audit": checks.text(100)}
KINDS = {kind.name: kind for kind in (
    Kind("hello", True, HELLO),
    Kind("welcome", False, WELCOME),
    Kind("refusal", False, {"reason": checks.word(*REASONS), "message": checks.text(4000)}),
    Kind("loss", True, {"weights": checks.numbers(optional=True)}, (HIDDEN, PLACES, LABELS), rows=True),
    Kind("loss-reply", False, {}, (Entry("loss", EXACT), Entry("gradient", CROSSING, ("tokens", "width")))),
    Kind("outputs", True, {"output": OUTPUT, "keep": checks.flag()}, (HIDDEN, PLACES), rows=True),
    Kind("outputs-reply", False, {}, (OUTPUTS,)),
    Kind("gradient", True, {}, (Entry("gradient", CROSSING, ("places", "columns")),)),
    Kind("gradient-again", True, {"output": OUTPUT, "keep": checks.flag()},
         (Entry("gradient", CROSSING, ("places", "columns")), HIDDEN, PLACES), rows=True),
    Kind("gradient-reply", False, {}, (Entry("gradient", CROSSING, ("tokens", "width")),)),
    Kind("score", True, {}, (HIDDEN, PLACES, LABELS), rows=True),
    Kind("score-reply", False, {}, (Entry("losses", EXACT, ("places",)),)),
    Kind("open", True, {"session": SESSION, "max_length": checks.whole(1)}),
    Kind("extend", True, {"session": SESSION, "logits": checks.flag()}, (HIDDEN,), rows=True),
    Kind("extend-reply", False, {"token": checks.whole(0, 2 ** 32)}, (Entry("logits", CROSSING, ("outputs",), optional=True),)),
    Kind("close", True, {"session": SESSION}),
    Kind("done", False),
    Kind("stand", True, {"have": checks.whole(-1), "join": checks.flag()}),
    Kind("stand-reply", False, {**PHASE, "label": checks.text(200), "wanted": checks.flag(), "done": checks.flag(),
                                "seconds": checks.number(optional=True), "has_common": checks.flag()}, many=True),
    Kind("answer", True, {**PHASE, "count": checks.whole()}, many=True),
    Kind("answer-reply", False, {"status": checks.word("accepted", "repeat", "late")}),
    Kind("leave", True),
)}


def check_header(header: dict[str, Any], bounds: Bounds, *, asks: bool) -> Head:
    """The header as a checked record.

    `asks`: the frame comes from the party. No memory is taken for what the header only claims.

    Raises:
        Refused: "schema" (fields), "dtype" (codecs and types) or "shape" (sizes, lengths, offsets).
    """
    for what, got, legal in checks.wrong(ENVELOPE, header):
        _refuse("schema", f"the field '{what}' of a header is illegal", got, legal)
    kind = KINDS.get(header["kind"])
    if kind is None or kind.asks != asks:
        _refuse("schema", "this kind of frame does not come from here", header["kind"],
                ", ".join(name for name, one in KINDS.items() if one.asks == asks))
    fields = header["fields"]
    for what, got, legal in checks.wrong({**kind.fields, **(ROWS if kind.rows else {})}, fields):
        _refuse("schema", f"the field '{what}' of a frame '{kind.name}' is illegal", got, legal)
    sizes = {"width": bounds.width, "outputs": bounds.outputs, **bounds.known}
    if kind.rows:
        _check_rows(fields, bounds)
        sizes["tokens"] = sum(fields["lengths"])
    if "output" in fields:
        sizes["columns"] = bounds.width if fields["output"] == "hidden" else bounds.outputs
    tensors, size = _check_tensors(kind, header["tensors"], sizes, bounds)
    return Head(kind, header["id"], header["party"], header["step"], header["micro"], fields, tensors, size)


def _check_rows(fields: dict[str, Any], bounds: Bounds) -> None:
    lengths, offsets = fields["lengths"], fields["offsets"]
    if not 1 <= len(lengths) <= bounds.rows or len(offsets) != len(lengths):
        _refuse("shape", "the number of rows is illegal", f"{len(lengths)} lengths, {len(offsets)} offsets",
                f"1 to {bounds.rows}, equal")
    if sum(lengths) > bounds.tokens:
        _refuse("shape", "too many tokens in one request", sum(lengths), f"up to {bounds.tokens}")
    longest = max(length + offset for length, offset in zip(lengths, offsets, strict=True))
    most = bounds.positions if bounds.positions is not None else max(bounds.tokens, bounds.session_tokens)
    if longest > most:
        _refuse("shape", "a row reaches beyond the last position", longest, f"up to {most}")


def _check_tensors(kind: Kind, listed: list[Any], sizes: dict[str, int], bounds: Bounds) -> tuple[dict[str, TensorHead], int]:
    entries = {entry.name: entry for entry in kind.tensors}
    found: dict[str, TensorHead] = {}
    start = values = 0
    for item in listed:
        name, codec, dtype, shape = _item(item)
        if name in found or (name not in entries and not kind.many):
            _refuse("schema", f"a tensor of a frame '{kind.name}' comes twice or is unknown", name, ", ".join(entries))
        entry = entries.get(name) or Entry(name, VALUES)
        values += math.prod(shape)
        if name in entries:
            _check_shape(entry, shape, sizes, bounds)
        elif len(shape) > 8 or values > bounds.values:
            _refuse("shape", "an update has too many values", f"{values} up to '{name}'", f"up to {bounds.values}, 8 dimensions")
        size = _sized(entry, codec, dtype, shape, bounds)
        found[name] = TensorHead(name, codec, dtype, shape, start, size)
        start += padded(size)
    missing = [entry.name for entry in kind.tensors if not entry.optional and entry.name not in found]
    if missing:
        _refuse("schema", f"a frame '{kind.name}' lacks a tensor", ", ".join(found) or "nothing", missing[0])
    return found, start


def _item(item: object) -> tuple[str, str, str, tuple[int, ...]]:
    legal = "[name, codec, dtype, shape]"
    if not isinstance(item, list) or len(item) != 4:
        _refuse("schema", "the entry of a tensor is illegal", repr(item)[:80], legal)
    name, codec, dtype, shape = item
    if not checks.name(TENSOR_NAME, MOST_NAME).holds(name) or type(codec) is not str or type(dtype) is not str \
            or not checks.whole_list(0, 2 ** 40).holds(shape) or len(shape) > 8:
        _refuse("schema", "the entry of a tensor is illegal", repr(item)[:80], legal)
    return name, codec, dtype, tuple(shape)


def _check_shape(entry: Entry, shape: tuple[int, ...], sizes: dict[str, int], bounds: Bounds) -> None:
    if len(shape) != len(entry.shape):
        _refuse("shape", f"'{entry.name}' has the wrong number of dimensions", shape, f"({', '.join(entry.shape)})")
    for word, size in zip(entry.shape, shape, strict=True):
        if sizes.setdefault(word, size) != size:
            _refuse("shape", f"'{entry.name}' does not fit", shape, f"{word} = {sizes[word]}")
    columns = sizes.get("columns", bounds.width)
    if columns not in (bounds.width, bounds.outputs) or ("columns" in entry.shape and columns == 0):
        _refuse("shape", f"'{entry.name}' has columns that the back does not have", columns,
                f"{bounds.width} or {bounds.outputs}")
    most = min(bounds.places(columns), sizes.get("tokens", bounds.tokens))
    if sizes.get("tokens", 0) > bounds.tokens or sizes.get("places", 0) > most:
        _refuse("shape", f"'{entry.name}' is too large", shape, f"up to {bounds.tokens} tokens, places among them")


def _sized(entry: Entry, codec: str, dtype: str, shape: tuple[int, ...], bounds: Bounds) -> int:
    """The bytes of a tensor, if it may travel like this."""
    if entry.group == INTEGERS and codec in WIDTHS and dtype == "int64":
        return WIDTHS[codec] * math.prod(shape)
    if entry.group == VALUES and (codec, dtype) in EXACT_BYTES:
        return EXACT_BYTES[codec, dtype] * math.prod(shape)
    allowed = bounds.codecs if entry.group == CROSSING else {LOSSLESS} if entry.group in (EXACT, VALUES) else set()
    if codec not in allowed or dtype not in DTYPES:
        _refuse("dtype", f"'{entry.name}' may not travel like this", f"{codec[:40]} for {dtype[:40]}",
                ", ".join(sorted(allowed)) or entry.group)
    return codec_named(codec).size(shape)


def _refuse(reason: str, what: str, got: object, legal: object) -> NoReturn:
    raise Refused(reason, what, got=got, legal=legal)
