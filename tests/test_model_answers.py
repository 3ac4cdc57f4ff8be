"""The model, and the core beside it, against answers computed by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from model import Fnv, Model
from modeldiff import compare

from tracedbg.layout import REGION_USER, CpuTables, Fidelity, Gate, Idt, Layout, Region, Tss
from tracedbg.replay import Replay
from tracedbg.state import Cause, EventFlag, Evidence, FrameStatus, Kind, Mismatch, Rule, Settle, Source
from tracedbg.trace import Trace
from tracedbg.writer import TraceWriter, build

TOP = (1 << 64) - 1

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
    cpu = model.cpu_state(0)
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
    *windows, finding = model.findings
    assert [(w.rule, w.event, w.cause_event) for w in windows] == [(Rule.REENTRY_WINDOW, 2, 2)] * bool(fidelity)  # at the return
    last = len(events) - 1
    assert (finding.rule, finding.evidence, finding.event) == (Rule.FRAME_CLOBBERED, evidence, last)
    assert (finding.lo, finding.hi) == (0x10DFD8, 0x10E000)
    assert finding.slots == 0b11111  # not the error code
    assert finding.differ == 0b11000  # rsp and ss: 11cfa8, 10 -> 126fd0, 0
    assert (finding.cause, finding.cause_event, finding.cause_frame) == (Cause.NMI_UNBLOCKED, 2, 1)
    outer, inner = model.frames
    assert (outer.status, outer.clobbered_by, outer.finding) == (FrameStatus.CLOBBERED, last, len(windows))
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
    window, finding = model.findings
    assert (window.rule, window.event) == (Rule.REENTRY_WINDOW, 2)  # what came of it is the other finding
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
    window, finding = model.findings[:2]
    assert (window.rule, window.event, window.lo, window.hi) == (Rule.REENTRY_WINDOW, 2, base + 0x2FD8, base + 0x3000)
    assert (finding.raised_rule, finding.evidence, finding.event) == (Rule.FRAME_CLOBBERED, Evidence.COMPUTED, 3)
    assert (finding.cause, finding.cause_event, finding.cause_frame) == (Cause.NMI_UNBLOCKED, 2, 1)
    assert finding.victim is not None
    assert finding.victim.entry == 0
    assert (finding.lo, finding.hi, finding.slots, finding.differ) == (base + 0x2FD8, base + 0x3000, 0b11111, 0b11101)
    if returns < 2:
        assert finding.rule == Rule.FRAME_CLOBBERED
        assert len(model.findings) == 2
        assert len(model.frames) == 2 - returns
        return
    assert (finding.rule, finding.settled, finding.consumer) == (Rule.FRAME_CONSUMED_CORRUPT, 5, 5)
    loop = model.findings[2]
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


def test_inferred_events_prove_nothing_more() -> None:
    """The same overwrite as below, of events that a dump lets one infer: the weakest fact decides."""
    first = {"cpu": 0, "arg": 1, "source": 4, "code": 2, "rip": 0x101000, "rsp": 0x11CFA8, "cs": 8, "ss": 16, "rflags": 2}
    events = [(Kind.DELIVER, first), (Kind.DELIVER, {**first, "rip": 0x100180, "rsp": 0x109F50})]
    for fidelity in (Fidelity.INFERRED, Fidelity.INFERRED | Fidelity.RETURNS):
        (finding, *_) = play(events, fidelity=fidelity).findings
        assert (finding.rule, finding.evidence) == (Rule.FRAME_CLOBBERED, Evidence.INFERRED)
    back = {"cpu": 0, "arg": 0, "rsp": 0x109FD8, "addr": 0x101002, "cs": 8, "rflags": 2, "value": 0x11CFA8, "ss": 16}
    (finding, *_) = play([*events, (Kind.RETURN, back), (Kind.RETURN, back)], fidelity=Fidelity.INFERRED).findings
    assert finding.settled_evidence <= Evidence.INFERRED


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
    assert [(f.rule, f.detail) for f in model.findings] == [
        (Rule.FAKE_NMI, 0), (Rule.ILLEGAL_VECTOR, 2), (Rule.MODEL_MISMATCH, Mismatch.IF_CLEAR),
    ]  # fmt: skip


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
    words = [0] * 7 + [0xFFFFFFFF, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0, 0, TOP, TOP, 0xFFFFFFFF, *[0] * 11, 0]
    hash_ = Fnv()
    hash_.words(words)
    assert Model(trace).digest(0) == hash_.value
    with Replay(trace) as replay:
        assert replay.digest() == hash_.value
