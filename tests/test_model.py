"""The C core against the slow model, and the model against answers computed by hand.

TRACEDBG_MODEL_SEEDS sets how many random traces the comparison takes (10,000 if unset).
"""

from __future__ import annotations

import dataclasses
import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from model import Fnv, Model, ModelFinding, ModelFrame, decode
from randtrace import assembled, coverage, make_kernel, random_trace, written_trace

from tracedbg import wire
from tracedbg.layout import REGION_USER, CpuTables, Fidelity, Gate, Idt, Layout, Region, Tss
from tracedbg.replay import Replay
from tracedbg.state import Cause, Context, EventFlag, Evidence, Finding, FrameStatus, Kind, Mismatch, Rule, Settle, Source
from tracedbg.trace import Trace
from tracedbg.writer import TraceWriter, build

SEEDS = int(os.environ.get("TRACEDBG_MODEL_SEEDS", "10000"))
CHUNKS = 10
TOP = (1 << 64) - 1

# -- hand-computed answers ----------------------------------------------------------------------------------------------

# The bare-metal guest of the recordings: IST1 #DF, IST2 NMI, IST3 #MC, IST4 #DB.
GUEST = Layout(
    tss=(Tss(0x105100, (0x108000, None, None), (None, 0x110000, 0x10E000, 0x10C000, 0x10A000, None, None, None)),),
    idts=(
        Idt(
            0x106000,
            {
                1: Gate(0x100180, 8, 4, dpl=3),
                2: Gate(0x100190, 8, 2),
                3: Gate(0x1001A0, 8, 0, dpl=3),
                8: Gate(0x1001B0, 8, 1),
                14: Gate(0x1001C0, 8, 0),
                18: Gate(0x1001D0, 8, 3),
            },
        ),
    ),
    cpus=(CpuTables(0, 0),),
).with_stacks()
FLAGS = 0x97
RECORDED = Fidelity.RETURNS | Fidelity.SS_ZEROED
NMI_FIRST = {"cpu": 0, "arg": 2, "source": Source.NMI, "rip": 0x100BAB, "rsp": 0x11CFA8, "cs": 8, "ss": 0x10, "rflags": FLAGS}
INT3 = {"cpu": 0, "arg": 3, "source": 4, "code": 1, "rip": 0x100C36, "rsp": 0x126FD0, "cs": 8, "ss": 0, "rflags": 0x46}
INT3_RETURN = {"cpu": 0, "rsp": 0x126FA8, "addr": 0x100C37, "value": 0x126FD0, "cs": 8, "ss": 0, "rflags": 0x46}
NMI_AGAIN = {"cpu": 0, "arg": 2, "source": Source.NMI, "rip": 0x100BAB, "rsp": 0x126FD0, "cs": 8, "ss": 0, "rflags": FLAGS}
NMI_RETURN = {"cpu": 0, "rsp": 0x10DFD8, "addr": 0x100BAB, "value": 0x126FD0, "cs": 8, "ss": 0, "rflags": FLAGS}


def make(events: list[tuple[Kind, dict[str, int]]], layout: Layout, *, cpus: int = 1, payload: bytes = b"") -> Trace:
    def fill(writer: TraceWriter) -> None:
        writer.layout = layout
        writer.payload(payload)
        for kind, fields in events:
            writer.event(kind, **fields)

    return build(fill, cpus=cpus)


def play(events: list[tuple[Kind, dict[str, int]]], layout: Layout = GUEST, fidelity: Fidelity = RECORDED, **more: Any) -> Model:
    """The model at the end of the events."""
    trace = make(events, dataclasses.replace(layout, fidelity=fidelity), **more)
    model = Model(trace).run(trace.count)
    assert compare(trace, [*range(trace.count + 1)], {}) is None
    return model


def words_at(model: Model, lo: int, hi: int) -> dict[int, int]:
    return {w.addr: w.value for w in model.word_list() if lo <= w.addr < hi and w.known == 0xFF}


def test_first_nmi_of_the_guest() -> None:
    model = play([(Kind.DELIVER, NMI_FIRST)])
    (frame,) = model.frames
    assert (frame.lo, frame.hi, frame.ist, frame.stack.lo, frame.stack.hi) == (0x10DFD8, 0x10E000, 2, 0x10C000, 0x10E000)
    assert words_at(model, 0x10DFD8, 0x10E000) == {
        0x10DFD8: 0x100BAB, 0x10DFE0: 8, 0x10DFE8: 0x97, 0x10DFF0: 0x11CFA8, 0x10DFF8: 0x10,
    }  # fmt: skip
    cpu = model.cpus[0]
    assert (cpu.rip, cpu.rsp, cpu.cs, cpu.ss, cpu.rflags) == (0x100190, 0x10DFD8, 8, 0, 0x97)
    assert (cpu.nmi_blocked, cpu.nmi_since, cpu.nmi_unblocked_by, cpu.mcip) == (True, 0, None, None)
    assert model.findings == []


@pytest.mark.parametrize(
    ("fidelity", "recorded", "evidence"),
    [(RECORDED, True, Evidence.COMPUTED), (Fidelity.NONE, True, Evidence.INFERRED), (Fidelity.NONE, False, Evidence.INFERRED)],
)
def test_nested_nmi_of_the_guest(fidelity: Fidelity, recorded: bool, evidence: Evidence) -> None:
    """Scenario a: an int3 in the NMI handler returns, then NMI again; where no return is recorded the next event shows it."""
    ret = [(Kind.RETURN, INT3_RETURN)] if recorded else []
    events = [(Kind.DELIVER, NMI_FIRST), (Kind.DELIVER, INT3), *ret, (Kind.DELIVER, NMI_AGAIN)]
    model = play(events, fidelity=fidelity)
    (finding,) = model.findings
    last = len(events) - 1
    assert (finding.rule, finding.evidence, finding.event) == (Rule.FRAME_CLOBBERED, evidence, last)
    assert (finding.lo, finding.hi) == (0x10DFD8, 0x10E000)
    assert finding.slots == 0b11111  # not the error code
    assert finding.differ == 0b11000  # rsp and ss: 11cfa8, 10 -> 126fd0, 0
    assert (finding.cause, finding.cause_event, finding.cause_frame) == (Cause.NMI_UNBLOCKED, 2, 1)
    outer, inner = model.frames
    assert (outer.status, outer.clobbered_by, outer.finding) == (FrameStatus.CLOBBERED, last, 0)
    assert (inner.entry, inner.victim) == (last, 0)
    assert finding.settled is None


def test_int3_frame_of_the_guest() -> None:
    model = play([(Kind.DELIVER, NMI_FIRST), (Kind.DELIVER, INT3)])
    frame = model.frames[1]
    assert (frame.rip_addr, frame.saved.rip, frame.ist) == (0x126FA8, 0x100C37, 0)  # the instruction behind int3
    assert not frame.stack.named
    assert (frame.stack.lo, frame.stack.hi) == (0x124000, 0x128000)


def test_software_repairs_the_frame() -> None:
    events = [(Kind.DELIVER, NMI_FIRST), (Kind.DELIVER, INT3), (Kind.RETURN, INT3_RETURN), (Kind.DELIVER, NMI_AGAIN)]
    events.append((Kind.RETURN, NMI_RETURN))
    events.append((Kind.WRITE, {"cpu": 0, "addr": 0x10DFF0, "value": 0x11CFA8, "arg": 8}))
    events.append((Kind.WRITE, {"cpu": 0, "addr": 0x10DFF8, "value": 0x10, "arg": 8}))
    events.append((Kind.RETURN, {**NMI_RETURN, "value": 0x11CFA8, "ss": 0x10}))
    model = play(events)
    (finding,) = model.findings
    assert (finding.rule, finding.raised_rule) == (Rule.FRAME_RELOCATED, Rule.FRAME_CLOBBERED)
    assert (finding.settled, finding.settled_evidence) == (7, Evidence.RECORDED)
    assert model.frames == []
    assert model.stats.settled[Settle.RETURN] == 2


@pytest.mark.parametrize("returns", [0, 1, 2, 3, 1973])
def test_livelock(returns: int) -> None:
    """The NMI, #MC, NMI of the hypervisor: the first return is the inner NMI's own, the second consumes, the others go round."""
    idle, do_nmi, cs = 0xFFFF82D0402F9C06, 0xFFFF82D04032A242, 0xE008
    base = 0xFFFF8300BFFD0000
    layout = Layout(
        tss=(Tss(0x1, (base + 0x7FA0, None, None), (None, base + 0x2000, base + 0x3000, base + 0x4000, *[None] * 4)),),
        idts=(Idt(0x2, {2: Gate(0xFFFF82D040201EB0, cs, 2), 18: Gate(0xFFFF82D0402020A0, cs, 1)}),),
        cpus=(CpuTables(0, 0),),
        fidelity=RECORDED,
    ).with_stacks()
    outer = {"cpu": 0, "arg": 2, "source": Source.NMI, "rip": idle, "rsp": base + 0x7E98, "cs": cs, "ss": 0xE010, "rflags": 0x206}
    inner = {"cpu": 0, "rip": do_nmi, "rsp": base + 0x2F48, "cs": cs, "ss": 0, "rflags": 0x46}
    popped = {"cpu": 0, "addr": do_nmi, "value": base + 0x2F48, "cs": cs, "ss": 0, "rflags": 0x46}
    events = [
        (Kind.DELIVER, outer),
        (Kind.DELIVER, {**inner, "arg": 18, "source": Source.MC}),
        (Kind.RETURN, {**popped, "rsp": base + 0x1FD8}),
        (Kind.DELIVER, {**inner, "arg": 2, "source": Source.NMI}),
        *[(Kind.RETURN, {**popped, "rsp": base + 0x2FD8})] * returns,
    ]
    trace = make(events, layout)
    model = Model(trace).run(trace.count)
    finding = model.findings[0]
    assert (finding.raised_rule, finding.evidence, finding.event) == (Rule.FRAME_CLOBBERED, Evidence.COMPUTED, 3)
    assert (finding.cause, finding.cause_event, finding.cause_frame) == (Cause.NMI_UNBLOCKED, 2, 1)
    assert finding.victim is not None
    assert finding.victim.entry == 0
    assert (finding.lo, finding.hi, finding.slots, finding.differ) == (base + 0x2FD8, base + 0x3000, 0b11111, 0b11101)
    if returns < 2:
        assert finding.rule == Rule.FRAME_CLOBBERED
        assert len(model.findings) == 1
        assert len(model.frames) == 2 - returns
        return
    assert (finding.rule, finding.settled, finding.consumer) == (Rule.FRAME_CONSUMED_CORRUPT, 5, 5)
    loop = model.findings[1]
    assert (loop.rule, loop.event, loop.count) == (Rule.RESUME_LOOP, 5, returns - 1)
    assert loop.popped is not None
    assert (loop.popped.rip, loop.popped.rsp) == (do_nmi, base + 0x2F48)
    assert model.frames == []
    assert compare(trace, [0, 3, 4, 5, 6, trace.count], {}) is None


def test_double_fault_of_the_guest() -> None:
    """Scenario x_df: int3 and #PF die on an unmapped stack; #DF's error code lies at 10ffd0."""
    at = {"cpu": 0, "rip": 0x101F23, "rsp": 0x123456789000, "cs": 8, "ss": 0x10, "rflags": 2}
    events = [
        (Kind.DELIVER, {**at, "arg": 3, "source": Source.SOFT_INT, "code": 1, "addr": 0, "flags": EventFlag.FAILED}),
        (Kind.DELIVER, {**at, "arg": 14, "source": Source.EXCEPTION, "code": 2, "addr": 0, "flags": EventFlag.FAILED}),
        (Kind.DELIVER, {**at, "arg": 8, "source": Source.EXCEPTION, "code": 0}),
    ]
    model = play(events)
    (frame,) = model.frames
    assert (frame.lo, frame.hi, frame.saved.code) == (0x10FFD0, 0x110000, 0)
    assert words_at(model, 0x10FFD0, 0x110000)[0x10FFD0] == 0
    (finding,) = model.findings
    assert (finding.rule, {finding.cause_event, finding.cause_frame}) == (Rule.DOUBLE_FAULT, {0, 1})
    assert (model.stats.failed, model.stats.judged) == (2, 1)


def test_fault_stores_rf_and_an_error_code() -> None:
    """#PF at CPL0 from an odd RSP: aligned down, 48 bytes, the old RSP unaligned in the frame."""
    at = {"cpu": 0, "rip": 0x101000, "rsp": 0x126FDB, "cs": 8, "ss": 0x10, "rflags": 0x4346, "arg": 14, "code": 2}
    model = play([(Kind.DELIVER, {**at, "source": Source.EXCEPTION})])
    (frame,) = model.frames
    assert (frame.lo, frame.hi) == (0x126FA0, 0x126FD0)
    assert words_at(model, 0x126FA0, 0x126FD0) == {
        0x126FA0: 2, 0x126FA8: 0x101000, 0x126FB0: 8, 0x126FB8: 0x14346, 0x126FC0: 0x126FDB, 0x126FC8: 0x10,
    }  # fmt: skip
    cpu = model.cpus[0]
    assert (cpu.rsp, cpu.ss, cpu.rflags) == (0x126FA0, 0x10, 0x46)  # without TF, NT, IF


def test_int1_twice() -> None:
    """Scenario e_int1: int 1 in the handler of int 1 on IST4."""
    first = {"cpu": 0, "arg": 1, "source": 4, "code": 2, "rip": 0x101000, "rsp": 0x11CFA8, "cs": 8, "ss": 16, "rflags": 2}
    second = {**first, "rip": 0x100180, "rsp": 0x109F50}
    model = play([(Kind.DELIVER, first), (Kind.DELIVER, second)], fidelity=Fidelity.NONE)
    (finding,) = model.findings
    assert (finding.lo, finding.cause, finding.evidence) == (0x109FD8, Cause.SOFTWARE, Evidence.COMPUTED)  # on the chain
    assert finding.differ == 0b01001


def test_fake_then_genuine() -> None:
    """Scenario b_pic: a fake NMI through the 8259, then a genuine one."""
    fake = {**NMI_FIRST, "source": Source.EXTINT, "rip": 0x10065A, "rflags": 0x202}
    events = [(Kind.DELIVER, fake), (Kind.DELIVER, NMI_AGAIN), (Kind.DELIVER, {**fake, "rsp": 0x10DF00})]
    model = play(events, fidelity=Fidelity.NONE)
    first, clobber = model.findings[:2]
    assert (first.rule, first.count) == (Rule.FAKE_NMI, 2)
    assert (clobber.rule, clobber.cause) == (Rule.FRAME_CLOBBERED, Cause.NMI_NEVER_BLOCKED)


def test_maskable_with_if_clear() -> None:
    model = play([(Kind.DELIVER, {**NMI_FIRST, "source": Source.FIXED, "rflags": 0x46})])
    assert [(f.rule, f.detail) for f in model.findings] == [(Rule.FAKE_NMI, 0), (Rule.MODEL_MISMATCH, Mismatch.IF_CLEAR)]


def test_syscall_gap() -> None:
    """Scenario f_noist_ipi: an NMI without IST behind SYSCALL stores at 111fd8, in user memory."""
    gates = {**GUEST.idts[0].gates, 2: Gate(0x100190, 8, 0)}
    layout = dataclasses.replace(
        GUEST, idts=(Idt(0x106000, gates),), regions=(*GUEST.regions, Region(0x111000, 0x113000, REGION_USER))
    )
    nmi = {**NMI_FIRST, "rsp": 0x112000}
    model = play([(Kind.DELIVER, nmi)], layout)
    (finding,) = model.findings
    assert (finding.rule, finding.evidence, finding.lo) == (Rule.USER_STACK, Evidence.COMPUTED, 0x111FD8)
    layout = dataclasses.replace(layout, regions=GUEST.regions)
    before = {"cpu": 0, "arg": 3, "source": Source.SOFT_INT, "code": 1, "rip": 0x400000, "rsp": 0x112000, "cs": 0x33, "ss": 0x2B}
    back = {"cpu": 0, "rsp": 0x107FD8, "addr": 0x400001, "value": 0x112000, "cs": 0x33, "ss": 0x2B}
    model = play([(Kind.DELIVER, before), (Kind.RETURN, back), (Kind.SYSCALL, {"cpu": 0}), (Kind.DELIVER, nmi)], layout)
    (finding,) = model.findings
    assert (finding.rule, finding.evidence, finding.lo) == (Rule.USER_STACK, Evidence.INFERRED, 0x111FD8)


def test_survivor_is_seen_again() -> None:
    """Without returns: the outer context is interrupted again, so the overwritten frame had a copy."""
    events = [(Kind.DELIVER, NMI_FIRST), (Kind.DELIVER, {**NMI_AGAIN, "rsp": 0x10DF00}), (Kind.DELIVER, NMI_FIRST)]
    model = play(events, fidelity=Fidelity.NONE)
    finding = model.findings[0]
    assert (finding.raised_rule, finding.evidence) == (Rule.FRAME_CLOBBERED, Evidence.COMPUTED)
    assert (finding.rule, finding.settled, finding.settled_by) == (Rule.FRAME_RELOCATED, 2, Settle.CONTEXT)
    assert finding.settled_evidence == Evidence.INFERRED


@pytest.mark.parametrize(
    ("rsp", "code", "placed"), [(48, True, True), (47, True, False), (63, True, True), (47, False, False), (48, False, True)]
)
def test_frame_at_the_bottom_of_memory(rsp: int, code: bool, placed: bool) -> None:
    fault = {"cpu": 0, "arg": 14, "rip": 0x1000, "rsp": rsp, "cs": 8, "ss": 0, "rflags": 2, "code": 0}
    model = play([(Kind.DELIVER, {**fault, "source": Source.EXCEPTION if code else Source.FIXED, "rflags": 0x202})])
    assert len(model.frames) == placed
    assert (model.stats.judged, model.stats.unjudged) == (placed, not placed)


@pytest.mark.parametrize(("distance", "expected"), [(4095, 1), (4096, 0), (-4095, 1), (-4096, 0)])
def test_distance_from_the_user_stack(distance: int, expected: int) -> None:
    back = {"cpu": 0, "rsp": 0x1000, "addr": 0x400001, "value": 0x202000, "cs": 0x33, "ss": 0x2B}
    fault = {"cpu": 0, "arg": 14, "source": 1, "code": 0, "rip": 0x1000, "cs": 8, "ss": 0, "rflags": 2}
    model = play([(Kind.RETURN, back), (Kind.DELIVER, {**fault, "rsp": 0x202000 + distance})])
    assert [f.rule for f in model.findings] == [Rule.USER_STACK] * expected


def test_entry_from_cpl3_touches_its_own_stack_only() -> None:
    """A frame of the next stack whose lowest bytes lie below the boundary is not closed."""
    tss = Tss(0x1, (0x20000, None, None), (None,) * 8)
    idt = Idt(0x2, {3: Gate(0x1000, 8, 0), 1: Gate(0x2000, 8, 0)})
    layout = Layout((tss,), (idt,), (CpuTables(0, 0),))
    debug = {"cpu": 0, "arg": 1, "source": Source.EXCEPTION, "rip": 0x3000, "rsp": 0x20010, "cs": 8, "ss": 0, "rflags": 2}
    user = {"cpu": 0, "arg": 3, "source": 4, "code": 1, "rip": 0x400000, "rsp": 0x90000, "cs": 0x33, "ss": 0x2B, "rflags": 0x202}
    model = play([(Kind.DELIVER, debug), (Kind.DELIVER, user)], layout)
    assert [(f.lo, f.hi, f.stack.lo) for f in model.frames] == [(0x1FFE8, 0x20010, 0x20000), (0x1FFD8, 0x20000, 0x1C000)]


def test_chain_goes_on_with_the_overwritten_frame() -> None:
    """NMI, #DB in it, #DB in that (over the first), NMI: from the newest #DB by its victim to the NMI's frame."""
    at = {"cpu": 0, "cs": 8, "ss": 0, "rflags": 2}
    debug = {**at, "arg": 1, "source": Source.EXCEPTION}
    events = [
        (Kind.DELIVER, {**at, "arg": 2, "source": Source.NMI, "rip": 0x3000, "rsp": 0x50000}),
        (Kind.DELIVER, {**debug, "rip": 0x1001, "rsp": 0x10DE00}),
        (Kind.DELIVER, {**debug, "rip": 0x2001, "rsp": 0x109E00}),
        (Kind.DELIVER, {**at, "arg": 2, "source": Source.NMI, "rip": 0x2002, "rsp": 0x109D00}),
    ]
    last = play(events, fidelity=Fidelity.NONE).findings[-1]
    assert last.victim is not None
    assert (last.rule, last.victim.entry, last.evidence) == (Rule.FRAME_CLOBBERED, 0, Evidence.COMPUTED)
    # Without the first #DB nothing leads to the NMI's frame: that its own IRET let the second NMI come explains all.
    model = play(events[:1] + events[2:], fidelity=Fidelity.NONE)
    assert model.stats.settled[Settle.NMI] == 1
    assert all(finding.victim is None or finding.victim.entry != 0 for finding in model.findings)


def test_fnv() -> None:
    def plain(words: list[int]) -> int:
        value = 0xCBF29CE484222325
        for byte in b"".join(w.to_bytes(8, "little") for w in words):
            value = (value ^ byte) * 0x100000001B3 % (1 << 64)
        return value

    words = [0, 1, 0x100, TOP, 0xFF00000000000000, 0x10E000]
    hash_ = Fnv()
    hash_.words(words)
    assert hash_.value == plain(words)
    assert Fnv().value == plain([])


def test_digest_of_nothing_known() -> None:
    trace = make([], Layout())
    words = [0] * 7 + [0xFFFFFFFF, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0, 0, TOP, TOP, 0]
    hash_ = Fnv()
    hash_.words(words)
    assert Model(trace).digest(0) == hash_.value
    with Replay(trace) as replay:
        assert replay.digest() == hash_.value


# -- the core against the model -----------------------------------------------------------------------------------------

FINDING_FIELDS = [f.name for f in dataclasses.fields(ModelFinding) if f.name not in ("victim", "writer")]
SUBFRAME_FIELDS = ("entry", "cpu", "vector", "source", "ist", "lo", "hi", "gate_type", "has_code", "saved")
RAISED_FIELDS = (
    "raised_rule", "evidence", "cause", "cause_event", "cause_frame", "event", "cpu", "lo", "hi", "slots", "differ", "detail",
)  # fmt: skip
STATS_FIELDS = (
    "events", "deliveries", "judged", "unjudged", "legacy", "failed", "returns", "writes", "gaps", "bad_events",
)  # fmt: skip


@dataclass
class Difference:
    """The first thing in which model and core differ."""

    position: int
    lines: list[str]

    @property
    def key(self) -> str:
        """What differs, without numbers."""
        return re.sub(r"\d+|\(.*?\)", "", self.lines[0].split(": model")[0])

    def __str__(self) -> str:
        return "\n".join([f"at position {self.position}:", *self.lines])


def show(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:#x}" if not hasattr(value, "name") else f"{value.name}"
    return str(value)


def diff(title: str, names: list[str] | tuple[str, ...], model: Any, core: Any) -> list[str]:
    lines = []
    for name in names:
        want, got = getattr(model, name), getattr(core, name)
        if want != got:
            lines.append(f"  {title} {name}: model {show(want)}, core {show(got)}")
    return lines


def slot_names(item: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(item)]


def diff_lists(title: str, model: list[Any], core: list[Any], one: Callable[[str, Any, Any], list[str]]) -> list[str]:
    for number, (want, got) in enumerate(zip(model, core, strict=False)):
        if lines := one(f"{title} {number}", want, got):
            return lines
    if len(model) != len(core):
        extra = (model if len(model) > len(core) else core)[min(len(model), len(core))]
        side = "model" if len(model) > len(core) else "core"
        return [f"  {title}s: model {len(model)}, core {len(core)}; only in {side}: {extra}"]
    return []


def diff_finding(title: str, want: ModelFinding, got: Finding) -> list[str]:
    title = f"{title} ({want.raised_rule.name} at event {want.event})"
    lines = diff(title, FINDING_FIELDS, want, got)
    for name in ("victim", "writer"):
        lines += diff_subframe(f"{title} {name}", getattr(want, name), getattr(got, name))
    return lines


def diff_subframe(title: str, want: ModelFrame | None, got: Any) -> list[str]:
    if want is None or got is None:
        return [] if want is None and got is None else [f"  {title}: model {want}, core {got}"]
    return diff(title, SUBFRAME_FIELDS if got.hi else SUBFRAME_FIELDS[:4], want, got)


def diff_view(model: Model, replay: Replay) -> list[str]:
    """Everything that can be seen at one position."""
    lines: list[str] = []
    for number in range(len(model.cpus)):
        want = model.cpu_state(number)
        lines += diff(f"cpu {number}", slot_names(want), want, replay.cpu(number))
    frames = [f.state() for f in model.frames]
    words = model.word_list()
    lines += diff_lists("frame", frames, list(replay.frames()), lambda t, a, b: diff(f"{t} ({a.entry})", slot_names(a), a, b))
    lines += diff_lists("word", words, list(replay.words(0, TOP)), lambda t, a, b: diff(f"{t} {a.addr:#x}", slot_names(a), a, b))
    if replay.raised() != len(model.findings):
        lines.append(f"  findings raised: model {len(model.findings)}, core {replay.raised()}")
    else:
        for want, got in zip(model.findings, replay.findings()[: replay.raised()], strict=True):
            title = f"finding {want.number} ({want.raised_rule.name} at event {want.event})"
            rules = model.rule_at(want, model.position), got.rule_at(model.position)
            if rules[0] != rules[1]:
                lines.append(f"  {title} rule at the position: model {rules[0].name}, core {rules[1].name}")
            lines += diff(title, RAISED_FIELDS, want, got)
            for name in ("victim", "writer"):
                lines += diff_subframe(f"{title} {name}", getattr(want, name), getattr(got, name))
    return lines


def diff_scan(model: Model, replay: Replay) -> list[str]:
    """What the whole scan found."""
    stats = replay.stats()
    lines = diff_lists("finding", model.findings, list(replay.findings()), diff_finding)
    lines += diff("stats", STATS_FIELDS, model.stats, stats)
    for name in ("settled", "ist_deliveries"):
        if tuple(getattr(model.stats, name)) != tuple(getattr(stats, name)):
            lines.append(f"  stats {name}: model {tuple(getattr(model.stats, name))}, core {tuple(getattr(stats, name))}")
    if stats.findings != len(model.findings):
        lines.append(f"  stats findings: model {len(model.findings)}, core {stats.findings}")
    if stats.open_at_end != model.open_clobbered():
        lines.append(f"  stats open_at_end: model {model.open_clobbered()}, core {stats.open_at_end}")
    return lines


def compare(trace: Trace, positions: list[int], config: dict[str, int]) -> Difference | None:
    """Compare the core with the model at some positions (any order) and at the end."""
    model_config = {k: v for k, v in config.items() if k in ("max_frames", "iret_fault_unblocks")}
    model = Model(trace, **model_config)
    digests = {}
    for position in sorted({*positions, trace.count}):
        digests[position] = model.digest(position)
    with Replay(trace, **config) as replay:
        replay.scan_all()
        wrong = []
        for position in [*positions, trace.count]:
            replay.seek(position)
            if replay.position != position or replay.digest() != digests[position]:
                wrong.append(position)
        if not wrong:
            lines = diff_view(model, replay) + diff_scan(model, replay)
            return Difference(trace.count, lines) if lines else None
        # Look for the first position at which they part, for the reader.
        model = Model(trace, **model_config)
        for position in range(trace.count + 1):
            replay.seek(position)
            if model.digest(position) != replay.digest():
                lines = diff_view(model, replay)
                return Difference(position, lines or ["  (the digests differ, nothing else that can be seen does)"])
        return Difference(min(wrong), ["  (only when that position is reached in another way)"])


def minimised(records: list[bytes], fails: Callable[[list[bytes]], bool]) -> list[bytes]:
    """Delta debugging: a list of events that still fails, of which none can be left out."""
    size = max(len(records) // 2, 1)
    while True:
        at, shorter = 0, False
        while at < len(records):
            rest = records[:at] + records[at + size :]
            if len(rest) < len(records) and fails(rest):
                records, shorter = rest, True
            else:
                at += size
        if size == 1 and not shorter:
            return records
        size = max(size // 2, 1)


def listing(trace: Trace) -> Iterator[str]:
    for index in range(trace.count):
        event = decode(trace, index)
        kind = Kind(event.kind).name.lower() if 0 < event.kind <= max(Kind) else f"kind {event.kind}"
        known = {f.name: getattr(event, f.name) for f in dataclasses.fields(event) if f.name not in ("index", "kind", "flags")}
        fields = " ".join(f"{name}={value:#x}" for name, value in known.items() if value is not None)
        yield f"  {index:3} {kind} {fields}" + (f" {EventFlag(event.flags & 0x7F)!r}" if event.flags else "")


def config_of(seed: int) -> dict[str, int]:
    r = random.Random(seed ^ 0x5EED)
    config: dict[str, int] = {"snapshot_interval": r.choice((0, 0, 1, 2, 7, 16)), "max_snapshots": r.choice((0, 0, 2, 3, 8))}
    if r.random() < 0.15:
        config["max_frames"] = r.choice((1, 2, 3, 8))
    if r.random() < 0.3:
        config["iret_fault_unblocks"] = False
    return config


def positions_of(seed: int, count: int) -> list[int]:
    r = random.Random(seed ^ 0x905)
    if seed % 50 == 0:
        positions = list(range(count + 1))
        r.shuffle(positions)
        return positions
    return [r.randrange(count + 1) for _ in range(2)]


def explain(seed: int, difference: Difference) -> str:
    """A message with which the difference can be worked on."""
    kernel, config = make_kernel(seed), config_of(seed)

    def fails(records: list[bytes]) -> bool:
        with assembled(kernel, records) as trace:
            found = compare(trace, list(range(trace.count + 1)), config)
            return found is not None and found.key == difference.key

    lines = [f"seed {seed}, {config}: {difference}"]
    records = kernel.records
    if fails(records):
        records = minimised(records, fails)
    with assembled(kernel, records) as trace:
        small = compare(trace, list(range(trace.count + 1)), config)
        lines += ["", f"smallest trace that shows a difference, {trace.count} of {len(kernel.records)} events:", *listing(trace)]
        lines += [str(small), "", "layout:"]
        lines += [f"  {entry}" for entry in (*trace.layout.tss, *trace.layout.cpus, *trace.layout.regions)]
        lines += [f"  {trace.layout.fidelity!r}"]
        used = {event.arg for event in (decode(trace, i) for i in range(trace.count)) if event.kind == Kind.DELIVER}
        for number, idt in enumerate(trace.layout.idts):
            lines += [f"  idt {number} {vector}: {gate}" for vector, gate in idt.gates.items() if vector in used]
    return "\n".join(lines)


def check_seed(seed: int) -> None:
    with random_trace(seed) as trace:
        difference = compare(trace, positions_of(seed, trace.count), config_of(seed))
    if difference is not None:
        pytest.fail(explain(seed, difference), pytrace=False)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_core_is_the_model(chunk: int) -> None:
    for seed in range(chunk, SEEDS, CHUNKS):
        check_seed(seed)


@pytest.mark.parametrize("interval", [1, 2, 7])
def test_seek_is_a_fresh_run(interval: int) -> None:
    """A position reached from anywhere, backwards too, is the position reached by going forward."""
    for seed in range(interval, max(SEEDS // 25, 3), 3):
        r = random.Random(seed)
        with random_trace(seed) as trace:
            with Replay(trace, snapshot_interval=1 << 20) as replay:
                forward = []
                for position in range(trace.count + 1):
                    replay.seek(position)
                    forward.append(replay.digest())
            with Replay(trace, snapshot_interval=interval, max_snapshots=r.choice((0, 2, 3))) as replay:
                if r.random() < 0.5:
                    while replay.scan(r.choice((1, 5, 1 << 20))):
                        pass
                for _ in range(30):
                    position = r.randrange(trace.count + 1)
                    if r.random() < 0.5:
                        replay.seek(position)
                    else:
                        while replay.seek_some(position, r.choice((1, 3))):
                            pass
                    assert replay.position == position
                    assert replay.digest() == forward[position], f"seed {seed}, position {position}"


def test_findings_do_not_depend_on_the_way() -> None:
    """Scanning in pieces, with seeks between, finds what scanning in one go finds."""
    for seed in range(max(SEEDS // 50, 3)):
        r = random.Random(seed)
        with random_trace(seed) as trace:
            with Replay(trace) as replay:
                replay.scan_all()
                findings, stats = replay.findings(), replay.stats()
            with Replay(trace, snapshot_interval=r.choice((1, 3))) as replay:
                while replay.scan(r.choice((1, 2, 9))):
                    if r.random() < 0.3:
                        replay.seek(r.randrange(trace.count + 1))
                assert replay.findings() == findings, f"seed {seed}"
                for name in (*STATS_FIELDS, "settled", "ist_deliveries", "findings", "open_at_end"):
                    assert getattr(replay.stats(), name) == getattr(stats, name), f"seed {seed}: {name}"


# -- the generator ------------------------------------------------------------------------------------------------------


def test_generator_reaches_everything() -> None:
    missing = [f"{title} {name}" for title, counts in coverage(range(600)).items() for name, count in counts.items() if not count]
    assert missing == []


def test_seeds_are_stable_and_survive_the_file_format() -> None:
    for seed in (0, 1, 7, 50):
        with random_trace(seed) as one, written_trace(seed) as other:
            assert bytes(one.events) == bytes(other.events)
            assert bytes(one.payload) == bytes(other.payload)
            assert (one.memory, one.cpus, one.count) == (other.memory, other.cpus, len(other.events) // wire.EVENT_SIZE)
            assert dataclasses.replace(one.layout, names={}) == other.layout
            assert Model(one).digest(one.count) == Model(other).digest(other.count)


def test_context_is_complete() -> None:
    """The model's frames hold every field of a context that a frame has."""
    assert [f.name for f in dataclasses.fields(Context)] == ["rip", "cs", "rflags", "rsp", "ss", "code"]
