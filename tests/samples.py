"""Hand-made traces and findings: the race of two NMIs with a machine check between them, with numbers as on the real machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tracedbg.layout import CpuTables, Gate, Idt, Layout, Tss
from tracedbg.state import (
    Cause,
    Context,
    Evidence,
    Finding,
    Frame,
    FrameStatus,
    Kind,
    Rule,
    Source,
    Stats,
)
from tracedbg.trace import Trace
from tracedbg.writer import TraceWriter, build

DEFAULT_IDLE = 0xFFFF82D0402F9C06
DO_NMI = 0xFFFF82D04032A242
TASK_RSP = 0xFFFF8300BFFD7E98
NMI_RSP = 0xFFFF8300BFFD2F48
IST_MC, IST_NMI = 0xFFFF8300BFFD2000, 0xFFFF8300BFFD3000
CS, SS = 0xE008, 0xE010

SYMBOLS = (
    b"ffff82d0402f9b40 ffff82d0402f9d00 default_idle\n"
    b"ffff82d04032a240 ffff82d04032a440 do_nmi\n"
)

LAYOUT = Layout(
    tss=(Tss(0x5000, (0xFFFF8300BFFD7FA0, None, None), (None, IST_MC, IST_NMI, *(None,) * 5)),),
    idts=(Idt(0x6000, {2: Gate(0xFFFF82D040201E00, CS, 2), 18: Gate(0xFFFF82D040201F00, CS, 1)}),),
    cpus=(CpuTables(0, 0),),
    names={1: "MC", 2: "NMI"},
).with_stacks()


def fill_race(writer: TraceWriter, *, returns: int = 0) -> None:
    """NMI, #MC inside it, NMI after the IRET of the #MC; then `returns` IRETs through the overwritten frame."""
    writer.layout = LAYOUT
    writer.symbols = SYMBOLS
    writer.meta = {"source": {"format": "hand"}}
    first = {"cpu": 0, "cs": CS}
    writer.event(
        Kind.DELIVER, rip=DEFAULT_IDLE, rsp=TASK_RSP, rflags=0x206, ss=SS, arg=2, source=Source.NMI, source_index=569, **first
    )
    inner = {"cpu": 0, "rip": DO_NMI, "rsp": NMI_RSP, "rflags": 0x46, "cs": CS, "ss": 0}
    writer.event(Kind.DELIVER, arg=18, source=Source.MC, source_index=570, **inner)
    writer.event(Kind.RETURN, cpu=0, rsp=IST_MC - 40, addr=DO_NMI, value=NMI_RSP, rflags=0x46, cs=CS, ss=0)
    writer.event(Kind.DELIVER, arg=2, source=Source.NMI, source_index=571, **inner)
    for _ in range(returns):
        writer.event(Kind.RETURN, cpu=0, rsp=IST_NMI - 40, addr=DO_NMI, value=NMI_RSP, rflags=0x46, cs=CS, ss=0)


def race(returns: int = 0) -> Trace:
    """The race as a trace in memory."""
    return build(lambda writer: fill_race(writer, returns=returns), name="race.tdbg")


def frame(entry: int, vector: int, source: Source, hi: int, saved: Context, **more: object) -> Frame:
    """A frame of 40 bytes below `hi`."""
    ist = {IST_NMI: 2, IST_MC: 1}.get(hi, 0)
    value = Frame(
        entry=entry, cpu=0, vector=vector, source=source, ist=ist, lo=hi - 40, hi=hi, saved=saved, status=FrameStatus.LIVE,
        has_code=False, gate_type=0xE, stack_lo=hi - 0x1000, stack_hi=hi, clobbered_by=None, victim=None, finding=None,
    )  # fmt: skip
    return replace(value, **more)  # type: ignore[arg-type]


OUTER = Context(DEFAULT_IDLE, CS, 0x206, TASK_RSP, SS, None)
INNER = Context(DO_NMI, CS, 0x46, NMI_RSP, 0, None)
VICTIM = frame(0, 2, Source.NMI, IST_NMI, OUTER)
WRITER = frame(3, 2, Source.NMI, IST_NMI, INNER, victim=0)

CLOBBER = Finding(
    number=0, rule=Rule.FRAME_CLOBBERED, raised_rule=Rule.FRAME_CLOBBERED, evidence=Evidence.COMPUTED,
    settled_evidence=Evidence.UNKNOWN, cause=Cause.NMI_UNBLOCKED, cause_event=2, cause_frame=1, slots=0b11111, differ=0b11101,
    detail=0, event=3, settled=None, settled_by=None, consumer=None, count=1, cpu=0, lo=IST_NMI - 40, hi=IST_NMI,
    victim=VICTIM, writer=WRITER, popped=None,
)  # fmt: skip

LOOP = replace(
    CLOBBER, rule=Rule.RESUME_LOOP, settled=5, settled_evidence=Evidence.RECORDED, consumer=5, count=1973, popped=INNER
)

STATS = Stats(
    events=4, deliveries=3, judged=3, unjudged=0, legacy=0, failed=0, returns=1, writes=0, gaps=0, findings=1,
    settled=(1, 0, 0, 0, 0, 0, 0, 0, 0), ist_deliveries=(0, 1, 2, 0, 0, 0, 0, 0), open_at_end=1, pages_forgotten=0,
    bad_events=0, snapshots=1, pages=2, frames=1, interval=4096, bytes=0,
)  # fmt: skip


def write_race(path: Path, *, returns: int = 0, layout: Layout = LAYOUT) -> None:
    """The race as a native trace."""
    with TraceWriter(path) as writer:
        fill_race(writer, returns=returns)
        writer.layout = layout
