"""The words of an event line in a case file, for the reader and the writer alike: tables, no logic."""

from __future__ import annotations

from dataclasses import dataclass, field

from tracedbg import x86
from tracedbg.state import EventFlag, Kind, Known, Return, ShutdownReason, Source

# Fields of a record in the order in which a line gives them; `index` is the source's own number of the event.
FIELDS = {
    "cpu": (int(Known.CPU), 16),
    "source_index": (int(Known.SOURCE_INDEX), 32),
    "time": (int(Known.TIME), 64),
    "source": (int(Known.SOURCE), 8),
    "addr": (int(Known.ADDR), 64),
    "arg": (int(Known.ARG), 8),
    "code": (int(Known.CODE), 32),
    "value": (int(Known.VALUE), 64),
    "rip": (int(Known.RIP), 64),
    "cs": (int(Known.CS), 16),
    "rflags": (int(Known.RFLAGS), 32),
    "rsp": (int(Known.RSP), 64),
    "ss": (int(Known.SS), 16),
}
ALL_KNOWN = 0x1FFF
DECIMAL = frozenset({"cpu", "source_index", "time", "arg"})  # written in decimal, the others in hex

FLAGS = {
    "failed": int(EventFlag.FAILED),
    "faulted": int(EventFlag.FAULTED),
    "partial": int(EventFlag.PARTIAL),
    "ext": int(EventFlag.EXT),
    "smm": int(EventFlag.SMM),
    "legacy": int(EventFlag.LEGACY),
}  # BYTES goes with `bytes HEX`

SOURCES = {source.name.lower().replace("_", "-"): int(source) for source in Source}
KINDS = {kind.name.lower(): kind for kind in Kind if kind}

_VECTORS = x86.VECTOR_NAMES
_VECTOR_WORDS = {word: n for n, name in _VECTORS.items() for word in (name, name.lstrip("#"), "#" + name.lstrip("#"))}
_SLOTS = {**{n: f"rsp{n}" for n in range(3)}, **{8 + n: f"ist{n}" for n in range(1, 8)}}
_GATE_TYPES = {x86.GATE_INTERRUPT: "interrupt", x86.GATE_TRAP: "trap"}


@dataclass(frozen=True, slots=True)
class Shape:
    """How events of one kind are written.

    `first`: the field that stands behind the kind without a name; `names`: its values that have one; `words`: further
    spellings. `aliases`: field -> the name it has here. `after`: the same behind `->`; None: there is no `->`.
    """

    first: str | None = None
    names: dict[int, str] = field(default_factory=dict)
    words: dict[str, int] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    after: dict[str, str] | None = None


def _vector(**aliases: str) -> Shape:
    return Shape("arg", _VECTORS, _VECTOR_WORDS, aliases)


def _choice(*names: str, **aliases: str) -> Shape:
    return Shape("arg", dict(enumerate(names)), {}, aliases)


_RING = Shape(after={"addr": "rip"})

SHAPES: dict[int, Shape] = {
    Kind.DELIVER: _vector(code="error", value="data", addr="words"),
    Kind.RETURN: Shape(
        "arg",
        {int(r): r.name.lower() for r in Return},
        after={"addr": "rip", "cs": "cs", "rflags": "rflags", "value": "rsp", "ss": "ss", "code": "ss-high"},
    ),
    Kind.WRITE: Shape(aliases={"arg": "len"}),
    Kind.READ: Shape(aliases={"arg": "len"}),
    Kind.MOVE: Shape(aliases={"addr": "from", "value": "to"}),
    Kind.SETSP: Shape(aliases={"addr": "from", "value": "to"}),
    Kind.TSS: Shape("arg", _SLOTS, {}, {"value": "="}),
    Kind.GATE: _vector(value="handler", cs="selector"),
    Kind.LTR: Shape(aliases={"value": "="}),
    Kind.LIDT: Shape(aliases={"value": "="}),
    Kind.SYSCALL: _RING,
    Kind.SYSRET: _RING,
    Kind.SYSENTER: _RING,
    Kind.RAISE: _vector(),
    Kind.UNBLOCK: _choice("nmi", "stgi"),
    Kind.MSR: Shape("code", aliases={"value": "="}),
    Kind.CR: Shape("arg", aliases={"value": "="}),
    Kind.GS: _choice("swapgs", "base", value="="),
    Kind.SHADOW: _choice("sti", "mov-ss"),
    Kind.TOKEN: Shape(
        "arg", {0: "other", **{n: f"ist{n}" for n in range(1, 8)}}, {}, {"addr": "at", "code": "held", "value": "="}
    ),
    Kind.VMEXIT: _choice("vmx", "svm", code="reason"),
    Kind.VMENTRY: _choice("plain", "vnmi"),
    Kind.MODE: _choice("real", "protected", "long"),
    Kind.INIT: _choice("reset", "init"),
    Kind.SHUTDOWN: _choice(*(reason.name.lower().replace("_", "-") for reason in ShutdownReason)),
    Kind.GAP: Shape(aliases={"value": "lost"}),
}
PLAIN = Shape()

# Further names of a delivery's fields; which one the writer takes depends on the event.
DELIVER_WORDS = {"error": "code", "length": "code", "cr2": "value", "data": "value", "words": "addr"}

# A gate's `code` is the dword at byte 4 of the descriptor: IST 0-2, type 8-11, DPL 13-14, present 15 (SDM figure 6-8).
GATE_BITS = 0xEF07
GATE_TYPES = _GATE_TYPES
GATE_WORDS = ("ist", "type", "dpl", "absent")


def deliver_names(vector: int, source: int) -> dict[str, str]:
    """What the fields of one delivery are called."""
    names = dict(SHAPES[Kind.DELIVER].aliases)
    if source in (Source.SOFT_INT, Source.SYSCALL):
        names["code"] = "length"
    if vector == x86.PAGE_FAULT:
        names["value"] = "cr2"
    return names
