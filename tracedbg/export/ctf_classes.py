"""The event classes of a CTF trace: which fields the events of a kind have, what they are called, how they are packed.

A field that is not known is not there: events of one kind with other known fields are of another class of the same name.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from tracedbg.formats.case.fields import FIELDS, SHAPES, deliver_names
from tracedbg.state import EventFlag, Kind, Known

# Where the fields of formats.case_fields.FIELDS stand in an unpacked record (wire.EVENT); those behind them.
PLACES = ("time", "rip", "rsp", "addr", "value", "rflags", "code", "source_index", "cpu", "cs", "ss")
KNOWN, KIND, ARG, SOURCE, FLAGS = 11, 12, 13, 14, 15
_PLACE = {**{name: n for n, name in enumerate(PLACES)}, "arg": ARG, "source": SOURCE}
_CODES = {8: "B", 16: "H", 32: "I", 64: "Q"}
_TSDL = {8: "uint8", 16: "uint16", 32: "uint32", 64: "uint64"}
DECIMAL = frozenset(
    {"source_index", "time", "cpu", "len", "length", "instruction_length", "lost", "bytes_length", "cr", "stored_words"}
)

TIME, CPU, VALUE, CODE = (int(bit) for bit in (Known.TIME, Known.CPU, Known.VALUE, Known.CODE))
ALL_KNOWN = sum(Known)
BYTES = int(EventFlag.BYTES)
MAX_BYTES = 4096  # of an event, written out; the replay skips longer stores

# Fields that are called otherwise than in a record. A return has an RIP of its own beside the one that it popped.
_POPPED = {"addr": "popped_rip", "cs": "popped_cs", "rflags": "popped_rflags", "value": "popped_rsp", "ss": "popped_ss",
           "code": "popped_ss_high"}  # fmt: skip
_RING = {"addr": "new_rip"}
_NAMES: dict[int, dict[str, str]] = {
    Kind.RETURN: {"arg": "instruction", **_POPPED},
    Kind.WRITE: {"arg": "len"},
    Kind.READ: {"arg": "len"},
    Kind.MOVE: {"addr": "from", "value": "to"},
    Kind.SETSP: {"addr": "from", "value": "to"},
    Kind.TSS: {"arg": "slot"},
    Kind.GATE: {"arg": "vector", "value": "handler", "cs": "selector", "code": "descriptor_high"},
    Kind.LTR: {"value": "base"},
    Kind.LIDT: {"value": "base"},
    Kind.SYSCALL: _RING,
    Kind.SYSRET: _RING,
    Kind.SYSENTER: _RING,
    Kind.RAISE: {"arg": "vector"},
    Kind.UNBLOCK: {"arg": "what"},
    Kind.MSR: {"code": "msr"},
    Kind.CR: {"arg": "cr"},
    Kind.GS: {"arg": "how"},
    Kind.SHADOW: {"arg": "by"},
    Kind.TOKEN: {"arg": "slot", "code": "held"},
    Kind.VMEXIT: {"arg": "how", "code": "reason"},
    Kind.VMENTRY: {"arg": "how"},
    Kind.MODE: {"arg": "mode"},
    Kind.INIT: {"arg": "how"},
    Kind.SHUTDOWN: {"arg": "reason"},
    Kind.GAP: {"value": "lost"},
}
# The order of the fields in an event; of a return its own ones stand before those that it popped.
_ORDER = ("source_index", "arg", "source", "time", "cpu", "rip", "cs", "rflags", "rsp", "ss", "addr", "code", "value")
_RETURN_ORDER = ("source_index", "arg", "source", "time", "cpu", "rip", "rsp", "addr", "cs", "rflags", "value", "ss", "code")
_DELIVER = {"error": "error_code", "length": "instruction_length", "words": "stored_words"}


@dataclass(frozen=True, slots=True)
class Field:
    """One field: its name, its TSDL type, its code in struct; `place`: in an unpacked record."""

    name: str
    type: str
    code: str
    place: int


@dataclass(frozen=True, slots=True)
class Shape:
    """What makes an event class: its stream, kind and fields.

    `known`: fields that it has; `names`: by vector and source, of a delivery; `data`: bytes of the payload are in it.
    `behind`: the timestamp is not its own; `whole`: all fields are in it, with the known bits.
    """

    stream: int
    kind: int
    known: int = 0
    names: int = 0
    flags: bool = False
    data: bool = False
    behind: bool = False
    whole: bool = False


@dataclass(frozen=True, slots=True)
class EventClass:
    """A class with its number. `pack`: of the head and all fields of fixed size; `take`: the values of these from a record."""

    number: int
    name: str
    stream: int
    fields: tuple[tuple[str, str], ...]  # name with brackets for an array, TSDL type
    pack: Callable[..., bytes]
    take: Callable[[tuple[int, ...]], tuple[int, ...]]


HEAD = "<HQI"  # event header: id, timestamp; event context: index


def kind_name(kind: int) -> str:
    """`deliver`; `kind_77` for a number that is none."""
    return Kind(kind).name.lower() if 0 < kind <= max(Kind) else f"kind_{kind}"


def name_choice(vector: int, source: int) -> int:
    """A number for the names that the fields of a delivery have (case_fields.deliver_names)."""
    names = deliver_names(vector, source)
    return (names["code"] == "length") | (names["value"] == "cr2") << 1


def _field_name(shape: Shape, name: str) -> str:
    if shape.whole:
        return name
    if shape.kind == Kind.DELIVER:
        if name == "arg":
            return "vector"
        if name == "code":
            return _DELIVER["length" if shape.names & 1 else "error"]
        if name == "value":
            return "cr2" if shape.names & 2 else "event_data"
        return _DELIVER["words"] if name == "addr" else name
    return _NAMES.get(shape.kind, {}).get(name, name)


def enum_of(kind: int) -> str | None:
    """The name of the TSDL type of a kind's `arg`, if its values have names."""
    shape = SHAPES.get(kind)
    if shape is None or shape.first != "arg" or not shape.names:
        return None
    return "vector_t" if kind in (Kind.DELIVER, Kind.RAISE, Kind.GATE) else f"{kind_name(kind)}_t"


def _type(shape: Shape, name: str, shown: str, bits: int) -> str:
    if name == "source":
        return "source_t"
    if name == "arg" and not shape.whole:
        return enum_of(shape.kind) or _TSDL[bits]
    base = _TSDL[bits]
    return base if shown in DECIMAL else f"{base}_hex"


def fields_of(shape: Shape) -> list[Field]:
    """The fields of fixed size, in their order."""
    found = []
    if shape.whole:
        found.append(Field("known", "uint16_hex", "H", KNOWN))
    for name in _RETURN_ORDER if shape.kind == Kind.RETURN else _ORDER:
        bit, bits = FIELDS[name]
        if shape.known & bit or shape.whole:
            shown = _field_name(shape, name)
            found.append(Field(shown, _type(shape, name, shown, bits), _CODES[bits], _PLACE[name]))
    if shape.flags or shape.whole:
        found.append(Field("flags", "flags_t", "B", FLAGS))
    return found


def make(shape: Shape, number: int) -> EventClass:
    """The class of a shape."""
    fixed = fields_of(shape)
    listed = [(field.name, field.type) for field in fixed]
    codes = HEAD + "".join(field.code for field in fixed)
    if shape.behind:
        listed.insert(0, ("timestamp_of", "timestamp_t"))
        codes = HEAD + "x" + codes[len(HEAD) :]  # its only value is 0
    if shape.data and shape.kind == Kind.MARK:
        listed.append(("text", "string"))
    elif shape.data:
        listed += [("length", "uint32"), ("bytes[length]", "uint8_hex")]
        codes += "I"
    packer = struct.Struct(codes)
    take = _taker([field.place for field in fixed])
    return EventClass(number, kind_name(shape.kind), shape.stream, tuple(listed), packer.pack, take)


def _taker(places: list[int]) -> Callable[[tuple[int, ...]], tuple[int, ...]]:
    """What takes these values out of a record."""
    if len(places) > 1:
        return itemgetter(*places)
    return (lambda values: (values[places[0]],)) if places else (lambda values: ())


def has_data(values: Sequence[Any], payload: int) -> bool:
    """Whether the bytes of an event of this record are to be written out; `payload`: bytes that there are."""
    kind, at, length = values[KIND], values[4], values[6]
    return (
        bool(values[FLAGS] & BYTES)
        and kind in (Kind.WRITE, Kind.READ, Kind.MARK)
        and 0 < length <= MAX_BYTES
        and at + length <= payload
    )


# -- findings -----------------------------------------------------------------------------------------------------------

FINDING = "finding"
FINDING_NUMBERS = ("victim", "writer", "consumer", "settled")  # events; one that is not known is not there


def finding_class(stream: int, present: tuple[bool, ...], memory: bool, number: int) -> EventClass:
    """The class of findings that have these of FINDING_NUMBERS, and a range of bytes."""
    listed = [("rule", "string"), ("severity", "string"), ("evidence", "string"), ("times", "uint32")]
    listed += [(name, "uint32") for name, there in zip(FINDING_NUMBERS, present, strict=True) if there]
    if memory:
        listed += [("lo", "uint64_hex"), ("hi", "uint64_hex")]
    listed.append(("message", "string"))
    return EventClass(number, FINDING, stream, tuple(listed), struct.Struct(HEAD).pack, _taker([]))
