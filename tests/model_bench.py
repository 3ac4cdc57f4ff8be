"""What the tests of single rules share: one guest, short names for its events, and the model or the core to play them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
from model import Model, ModelFinding

from tracedbg.layout import CpuTables, Fidelity, Fred, Gate, Idt, Layout, Region, Tss
from tracedbg.replay import Replay
from tracedbg.state import CpuState, EventFlag, Finding, Frame, Kind, Rule, Source
from tracedbg.trace import Trace
from tracedbg.writer import TraceWriter, build

both_sides = pytest.mark.parametrize("side", ("model", "core"))

# IST1 #DF, IST2 NMI, IST3 #MC, IST4 #DB, and the stack of RSP0, one below the other with nothing between.
DF_TOP, NMI_TOP, MC_TOP, DB_TOP, RSP0 = 0x110000, 0x10E000, 0x10C000, 0x10A000, 0x108000
STACKS = (
    Region(0x10E000, DF_TOP, slot=1), Region(0x10C000, NMI_TOP, slot=2), Region(0x10A000, MC_TOP, slot=3),
    Region(0x108000, DB_TOP, slot=4), Region(0x106000, RSP0, slot=8),
)  # fmt: skip
GATES = {
    1: Gate(0x100180, 8, 4), 2: Gate(0x100190, 8, 2), 3: Gate(0x1001A0, 8, 0, dpl=3), 8: Gate(0x1001F0, 8, 1),
    9: Gate(0x100200), 13: Gate(0x100240), 14: Gate(0x100250), 15: Gate(0x100260), 16: Gate(0x100270), 17: Gate(0x100280),
    18: Gate(0x100290, 8, 3), 0x30: Gate(0x100300), 0x31: Gate(0x100310), 0x41: Gate(0x100410), 0x80: Gate(0x100800),
}  # fmt: skip
WORK = 0x126FD0  # a work stack that has no name
IF_ON = {"rip": 0x101000, "rsp": WORK, "cs": 8, "ss": 0x10, "rflags": 0x246}
KERNEL = {"rip": 0x101000, "rsp": WORK, "cs": 8, "ss": 0x10, "rflags": 0x46}
USER = {"rip": 0x400000, "rsp": 0x7000, "cs": 0x33, "ss": 0x2B, "rflags": 0x246}
RECORDED = Fidelity.RETURNS

Events = list[tuple[Kind, dict[str, int]]]


def layout(**changes: Any) -> Layout:
    """The guest; `gates` are added to its own, `ist` replaces the TSS pointers."""
    gates = {**GATES, **changes.pop("gates", {})}
    ist = changes.pop("ist", (None, DF_TOP, NMI_TOP, MC_TOP, DB_TOP, None, None, None))
    rsp0 = changes.pop("rsp0", RSP0)
    return Layout(
        **{
            "tss": (Tss(0x105100, (rsp0, None, None), ist),),
            "idts": (Idt(0x105000, gates),),
            "cpus": (CpuTables(0, 0),),
            "regions": STACKS,
            "fidelity": RECORDED,
            **changes,
        }
    )


# FRED: levels 1-3 have the tops of #DB, #MC and #DF; #DB is at level 1, #MC at 2, #DF at 3, interrupts at 0; 0x80 spare bytes.
FRED = Fred(True, (RSP0, DB_TOP, MC_TOP, DF_TOP), 1 << 2 | 2 << 36 | 3 << 16, 0xFFFFFFFF81000000 | 0x80)


def fred_layout(**changes: Any) -> Layout:
    return layout(cpus=(CpuTables(0, 0, dataclasses.replace(FRED, **changes)),))


@dataclass
class Played:
    """The end of a trace, by either side."""

    findings: list[ModelFinding] | tuple[Finding, ...]
    cpu: CpuState
    frames: list[Frame]
    words: dict[int, tuple[int, int]]  # address -> value, mask of known bytes

    def of(self, rule: Rule) -> list[Any]:
        return [f for f in self.findings if f.raised_rule == rule]

    def details(self) -> list[int]:
        return [f.detail for f in self.of(Rule.MODEL_MISMATCH)]


def trace_of(events: Events, guest: Layout, cpus: int) -> Trace:
    def fill(writer: TraceWriter) -> None:
        writer.layout = guest
        for kind, fields in events:
            writer.event(kind, **{"cpu": 0, **fields})

    return build(fill, cpus=cpus)


def play(side: str, events: Events, guest: Layout | None = None, cpus: int = 1, **options: Any) -> Played:
    """Play all events on "model" or "core"."""
    with trace_of(events, layout() if guest is None else guest, cpus) as trace:
        if side == "model":
            model = Model(trace, **options).run(trace.count)
            words = {w.addr: (w.value, w.known) for w in model.word_list()}
            return Played(model.findings, model.cpu_state(0), [f.state() for f in model.frames], words)
        with Replay(trace, **options) as replay:
            replay.scan_all()
            replay.seek(trace.count)
            words = {w.addr: (w.value, w.known) for w in replay.words(0, (1 << 64) - 1)}
            return Played(replay.findings(), replay.cpu(0), list(replay.frames()), words)


def deliver(vector: int, source: Source, at: dict[str, int], **more: int) -> tuple[Kind, dict[str, int]]:
    return Kind.DELIVER, {"arg": vector, "source": source, **at, **more}


def nmi(at: dict[str, int] = KERNEL, **more: int) -> tuple[Kind, dict[str, int]]:
    return deliver(2, Source.NMI, at, **more)


def mc(at: dict[str, int] = KERNEL, **more: int) -> tuple[Kind, dict[str, int]]:
    return deliver(18, Source.MC, at, **more)


def fault(vector: int, at: dict[str, int] = KERNEL, **more: int) -> tuple[Kind, dict[str, int]]:
    return deliver(vector, Source.EXCEPTION, at, **more)


def failed(event: tuple[Kind, dict[str, int]], words: int = 0) -> tuple[Kind, dict[str, int]]:
    return event[0], {**event[1], "addr": words, "flags": EventFlag.FAILED}


def iret(frame: int, to: dict[str, int] = KERNEL, **more: int) -> tuple[Kind, dict[str, int]]:
    """A return that pops `to` at `frame`, the address of the RIP word (ERET: of the error code)."""
    popped = {"addr": to["rip"], "value": to["rsp"], "cs": to["cs"], "ss": to["ss"], "rflags": to["rflags"]}
    return Kind.RETURN, {"rsp": frame, **popped, **more}


def other(kind: Kind, **fields: int) -> tuple[Kind, dict[str, int]]:
    return kind, fields
