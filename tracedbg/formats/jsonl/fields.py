"""The keys of JSON Lines, for the reader and the writer alike: tables and limits, no logic (`tracedbg help jsonl`)."""

from __future__ import annotations

from dataclasses import dataclass

from tracedbg.formats.case import fields as case_fields
from tracedbg.state import EventFlag, Known

VERSION = 1
MAX_LINE = 4 << 20  # bytes
MAX_DEPTH = 32  # of lists and objects in a line
MAX_INLINE = 4096  # bytes of one write: what the replay takes
MAX_SAFE = (1 << 53) - 1  # the greatest integer that every JSON reader keeps (RFC 8259, section 6); beyond it: a string
CHUNK = 4096  # bytes that one line of the writer gives in hex

HEADER_KEYS = ("tracedbg", "cpus", "clock_hz", "layout", "end")


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a record: its place in wire.EVENT, its bit in `known`, its size in bits, written in decimal or in hex."""

    place: int
    known: int
    bits: int
    decimal: bool


_PLACES = ("time", "rip", "rsp", "addr", "value", "rflags", "code", "source_index", "cpu", "cs", "ss")
KNOWN_PLACE, KIND_PLACE, SOURCE_PLACE, FLAGS_PLACE = 11, 12, 14, 15
_PLACE = {**{name: place for place, name in enumerate(_PLACES)}, "arg": 13, "source": SOURCE_PLACE}
_ORDER = (
    "cpu", "source_index", "time", "arg", "source", "code", "addr", "value", "rip", "cs", "rflags", "rsp", "ss",
)  # fmt: skip

# In the order in which the writer gives them, between `kind` and `flags`.
FIELDS = {
    name: Field(_PLACE[name], *case_fields.FIELDS[name], decimal=name in case_fields.DECIMAL) for name in _ORDER
}
EVENT_KEYS = ("kind", *FIELDS, "flags", "known", "bytes", "text")

KINDS = {word: int(kind) for word, kind in case_fields.KINDS.items()}
KIND_WORDS = {number: word for word, number in KINDS.items()}
SOURCES = case_fields.SOURCES
SOURCE_WORDS = {number: word for word, number in SOURCES.items()}

BYTES = int(EventFlag.BYTES)
FLAGS = {**case_fields.FLAGS, "bytes": BYTES}
ALL_FLAGS = sum(FLAGS.values())
INLINE = int(Known.VALUE | Known.CODE)  # what `bytes` and `text` make known
