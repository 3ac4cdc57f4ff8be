"""The records of a trace in columns, as every export of all events takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tracedbg import wire
from tracedbg.state import EventFlag, Kind, Known
from tracedbg.trace import Trace

# Fields of a record whose validity is told by a bit of `known`.
KNOWN_BITS = {
    "time": Known.TIME, "rip": Known.RIP, "rsp": Known.RSP, "addr": Known.ADDR, "value": Known.VALUE,
    "rflags": Known.RFLAGS, "code": Known.CODE, "source_index": Known.SOURCE_INDEX, "cpu": Known.CPU, "cs": Known.CS,
    "ss": Known.SS, "arg": Known.ARG, "source": Known.SOURCE,
}  # fmt: skip

MAX_STORE = 4096  # bytes of one event; the core refuses longer stores
DELIVERIES = frozenset({int(Kind.DELIVER), int(Kind.RAISE)})  # kinds whose arg is a vector, with a source

_UNSIGNED: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}


def _places() -> dict[str, tuple[int, int]]:
    """Offset and size of each field of a record, from its declaration."""
    places, at = {}, 0
    for field in wire.EVENT.subcons:
        size: int = field.sizeof()
        places[str(field.name)] = (at, size)
        at += size
    return places


PLACES = _places()


@dataclass(frozen=True, slots=True)
class Records:
    """A stretch of events from `first` on."""

    first: int
    data: memoryview

    def __len__(self) -> int:
        return len(self.data) // wire.EVENT_SIZE

    def column(self, name: str, *, signed: bool = False) -> memoryview[int]:
        """One field of all of them, as it stands, known or not; `signed`: 64-bit fields in two's complement."""
        at, size = PLACES[name]
        code: Literal["B", "H", "I", "Q", "q"] = "q" if signed and size == 8 else _UNSIGNED[size]
        return self.data.cast(code)[at // size :: wire.EVENT_SIZE // size]


def records(trace: Trace, first: int, end: int) -> Records:
    """The events [first, end)."""
    return Records(first, trace.events[first * wire.EVENT_SIZE : end * wire.EVENT_SIZE])


def payload(trace: Trace, index: int) -> bytes | None:
    """The bytes that an event carries beside its record; None if it has none, more than any store, or not in the file."""
    event = trace.event(index)
    whole = Known.VALUE | Known.CODE
    end = event.value + event.code
    if not event.flags & EventFlag.BYTES or event.known & whole != whole or event.code > MAX_STORE or end > len(trace.payload):
        return None
    return bytes(trace.payload[event.value : end])
