"""Events made of printed tracepoints: what all of them need."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from tracedbg import wire
from tracedbg.formats.ftrace.rows import Rows
from tracedbg.state import EventFlag, Kind, Known
from tracedbg.writer import TraceWriter

MAX_TEXTS = 4096  # of marks

_PAIR = re.compile(r"\b([a-z_][a-z0-9_]*)[= ](0x[0-9a-fA-F]{1,16}|[0-9a-fA-F]{1,16})\b")

# In the output of -R (no print format) these fields are in hex without a prefix, as their print formats say %x.
_RAW_HEX = frozenset(
    {"rip", "guest_rip", "intr_info", "error_code", "info1", "info2", "apicid", "status", "mcgstatus", "ip", "tsc"}
)

# Plain numbers: an OR of enum members costs more than all else that is done for an event.
K_ADDR, K_ARG, K_CODE, K_CPU = int(Known.ADDR), int(Known.ARG), int(Known.CODE), int(Known.CPU)
K_RIP, K_SOURCE, K_TIME, K_VALUE = int(Known.RIP), int(Known.SOURCE), int(Known.TIME), int(Known.VALUE)
_PACK = wire.EVENT_PACK.pack


@dataclass(slots=True)
class Host:
    """What is remembered of a CPU of the host."""

    number: int
    time: int = -1  # of its last record; -1: not known
    records: int = 0
    in_nmi: bool = False
    gif_clear: bool = False  # an exit of SVM cleared GIF, and that it was set again was not told
    held: int | None = None  # what the last VM entry injected, until the next exit says whether it was delivered
    held_was: tuple[int, int] = (0, 0)  # its source and vector
    irq: int = -1  # the last device interrupt
    handlers: list[str] = field(default_factory=list)  # those that ran for it
    exited: int = -1  # the interrupt whose handler returned in the record number `exited_at`
    exited_at: int = -1


@dataclass(slots=True)
class Events:
    """Makes events; `counts`: what `info` tells beside them."""

    rows: Rows
    writer: TraceWriter
    counts: Counter[str] = field(default_factory=Counter)
    _texts: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(
        self, cpu: int | None, time: int, kind: Kind, known: int = 0, *, rip: int = 0, addr: int = 0, value: int = 0,
        code: int = 0, arg: int = 0, source: int = 0, flags: int = 0,
    ) -> int:  # fmt: skip
        """One event of a CPU (None: of all) at a time (-1: not known); its place."""
        if cpu is not None:
            known |= K_CPU
        if time >= 0:
            known |= K_TIME
        return self.rows.add(
            _PACK(max(time, 0), rip, 0, addr, value, 0, code, 0, cpu or 0, 0, 0, known, kind, arg, source, flags)
        )

    def mark(self, host: Host, text: str) -> None:
        """A note on a CPU."""
        if text not in self._texts:
            if len(self._texts) >= MAX_TEXTS:
                return
            data = text.encode("utf-8", "replace")
            self._texts[text] = (self.writer.payload(data), len(data))
        at, size = self._texts[text]
        self.add(host.number, host.time, Kind.MARK, K_VALUE | K_CODE, value=at, code=size, flags=EventFlag.BYTES)

    def odd(self) -> None:
        """A record does not say what it should."""
        self.counts["odd_records"] += 1


def pairs(text: str) -> dict[str, int]:
    """The numbers of `name value` and `name=value`."""
    found: dict[str, int] = {}
    for name, value in _PAIR.findall(text):
        if value.startswith("0x") or name in _RAW_HEX:
            found.setdefault(name, int(value, 16))
        elif value.isdecimal():
            found.setdefault(name, int(value))
    return found
