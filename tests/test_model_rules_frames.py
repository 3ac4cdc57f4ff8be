"""The rules of replay.md one by one, answers computed by hand: frames and stacks, and what later events say about them.

Each rule has a case that it reports and a near miss that it does not.
"""

from __future__ import annotations

import dataclasses

import pytest
from model_bench import (
    DF_TOP,
    IF_ON,
    KERNEL,
    MC_TOP,
    NMI_TOP,
    RSP0,
    STACKS,
    USER,
    WORK,
    Events,
    both_sides,
    deliver,
    failed,
    fault,
    iret,
    layout,
    nmi,
    other,
    play,
)

from tracedbg.layout import Fidelity, Layout, Region, Tss
from tracedbg.state import Cause, Evidence, FrameStatus, Kind, Rule, Settle, Source

pytestmark = both_sides

# -- overflow and neighbours --------------------------------------------------------------------------------------------

ENTRY = deliver(0x30, Source.EXTINT, USER)  # its frame is [107fd8, 108000), the next bytes below the stack of #DB
ASSUMED = layout(regions=tuple(Region(r.lo, r.hi, slot=r.slot, assumed=r.slot == 4) for r in STACKS))

UNNAMED_BELOW = layout(regions=ASSUMED.regions[:4])  # the stack of RSP0 has no name
THROUGH_IST = dataclasses.replace(
    UNNAMED_BELOW, tss=(Tss(0x105100, (RSP0, None, None), (None, DF_TOP, NMI_TOP, MC_TOP, 0x108020, None, None, None)),)
)


def low(rsp: int) -> tuple[Kind, dict[str, int]]:
    """#GP near the lower end of #DB's stack."""
    return fault(13, {**KERNEL, "rsp": rsp}, code=0)


def test_a_frame_begins_below_its_stack(side: str) -> None:
    end = play(side, [low(0x108020), low(0x108020), low(0x10A010), low(0x108020)])
    first, second, third = end.findings
    assert (first.rule, first.evidence, first.lo, first.hi) == (Rule.STACK_OVERFLOW, Evidence.COMPUTED, 0x107FF0, 0x108000)
    assert (first.count, first.writer.entry, first.victim) == (2, 0, None)
    assert (second.lo, second.hi, third.event) == (0x109FE0, 0x10A000, 3)


@pytest.mark.parametrize("rsp", [0x108030, 0x10803F])
def test_a_frame_at_the_very_end_of_its_stack(side: str, rsp: int) -> None:
    assert list(play(side, [ENTRY, low(rsp)]).findings) == []


@pytest.mark.parametrize(("guest", "neighbours"), [(ASSUMED, 1), (UNNAMED_BELOW, 0), (THROUGH_IST, 1)])
def test_no_overflow_of_an_assumed_stack(side: str, guest: Layout, neighbours: int) -> None:
    """But what lies below is overwritten all the same, where a stack with a name begins there, or the frame is dedicated."""
    event = fault(1) if guest is THROUGH_IST else low(0x108020)
    end = play(side, [ENTRY, event], guest)
    assert [f.rule for f in end.findings] == [Rule.NEIGHBOUR_OVERWRITE] * neighbours
    assert end.frames[0].status == (FrameStatus.CLOBBERED if neighbours else FrameStatus.LIVE)


@pytest.mark.parametrize(
    ("rsp", "fidelity", "evidence"),
    [
        (WORK, Fidelity.RETURNS, Evidence.COMPUTED),
        (WORK, Fidelity.NONE, Evidence.INFERRED),
        (0x11FF00, Fidelity.NONE, Evidence.COMPUTED),  # the frame is on the chain
    ],
)
def test_evidence_of_a_neighbour(side: str, rsp: int, fidelity: Fidelity, evidence: Evidence) -> None:
    """No stack has a name; #DB's frame begins in the block below that of its top."""
    guest = layout(regions=(), fidelity=fidelity, ist=(None, DF_TOP, NMI_TOP, MC_TOP, 0x120010, None, None, None))
    below = deliver(0x30, Source.EXTINT, {**IF_ON, "rsp": 0x120000})
    (finding,) = play(side, [below, fault(1, {**KERNEL, "rsp": rsp})], guest).findings
    assert (finding.rule, finding.evidence, finding.cause) == (Rule.NEIGHBOUR_OVERWRITE, evidence, Cause.NONE)
    assert (finding.lo, finding.hi, finding.slots) == (0x11FFE8, 0x120000, 0b11100)
    assert (finding.victim.entry, finding.writer.entry) == (0, 1)


def test_home_is_the_stack_that_the_frame_was_meant_for(side: str) -> None:
    """A push behind the overflow goes on below the same stack."""
    (finding,) = play(side, [low(0x108020), store(0x107FE8, 0, 0x107FE8)]).findings
    assert (finding.rule, finding.evidence, finding.count) == (Rule.STACK_OVERFLOW, Evidence.COMPUTED, 2)


def test_an_overflow_overwrites_the_neighbour(side: str) -> None:
    """Its error code lands on RSP, its RIP on SS; a second one finds the frame clobbered."""
    end = play(side, [ENTRY, low(0x108020), low(0x108020)])
    overflow, finding = end.findings
    assert (overflow.rule, finding.rule, finding.evidence) == (Rule.STACK_OVERFLOW, Rule.NEIGHBOUR_OVERWRITE, Evidence.COMPUTED)
    assert (finding.lo, finding.hi, finding.slots, finding.differ) == (0x107FF0, 0x108000, 0b11000, 0b11000)
    assert (finding.cause, finding.victim.entry, finding.writer.entry) == (Cause.NONE, 0, 1)
    assert (end.frames[0].status, end.frames[0].clobbered_by) == (FrameStatus.CLOBBERED, 2)


def store(addr: int, value: int, rsp: int | None) -> tuple[Kind, dict[str, int]]:
    return other(Kind.WRITE, addr=addr, value=value, arg=8, **({} if rsp is None else {"rsp": rsp}))


ON_DB = other(Kind.SETSP, value=0x108010)


def test_a_push_below_the_stack(side: str) -> None:
    push = store(0x107FF0, 0, 0x107FF0)
    end = play(side, [ENTRY, ON_DB, push, push])
    overflow, finding = end.findings
    assert (overflow.rule, overflow.evidence, overflow.count) == (Rule.STACK_OVERFLOW, Evidence.RECORDED, 2)
    assert (overflow.lo, overflow.hi, overflow.writer) == (0x107FF0, 0x107FF8, None)
    assert (finding.rule, finding.evidence, finding.count) == (Rule.NEIGHBOUR_OVERWRITE, Evidence.RECORDED, 1)
    assert (finding.lo, finding.hi, finding.slots, finding.differ) == (0x107FF0, 0x107FF8, 0b01000, 0b01000)
    assert (finding.victim.entry, finding.writer, end.frames[0].status) == (0, None, FrameStatus.LIVE)


@pytest.mark.parametrize(
    ("event", "inferred"),
    [
        (store(0x107FF0, 0, None), 1),
        (store(0x107FF0, 0x7000, None), 0),  # the same value
        (store(0x107FF0, 0, 0x108010), 0),  # not a push: on purpose
        (store(0x108000, 0, 0x108000), 0),
        (store(0x107FD0, 0, None), 0),  # below the frame
    ],
)
def test_other_stores(side: str, event: tuple[Kind, dict[str, int]], inferred: int) -> None:
    found = play(side, [ENTRY, ON_DB, event]).findings
    assert [(f.rule, f.evidence) for f in found] == [(Rule.NEIGHBOUR_OVERWRITE, Evidence.INFERRED)] * inferred
    assert list(play(side, [ENTRY, other(Kind.SETSP, value=WORK), event]).findings) == []  # home has no name
    assert list(play(side, [ENTRY, ON_DB, event], ASSUMED).findings) == []


# -- what the interrupted context says ----------------------------------------------------------------------------------

IN_NMI = {"rip": 0x100191, "rsp": 0x10DF00, "cs": 8, "ss": 0x10, "rflags": 0x46}
UNBLOCK = other(Kind.UNBLOCK)
UNRECORDED = layout(fidelity=Fidelity.NONE)
DB_ON_WORK = (None, DF_TOP, NMI_TOP, MC_TOP, 0x127F00, None, None, None)


def at(rsp: int) -> dict[str, int]:
    return {**IN_NMI, "rip": 0x100195, "rsp": rsp}


@pytest.mark.parametrize(("fidelity", "left"), [(Fidelity.RETURNS, [0, 1, 3, 4]), (Fidelity.NONE, [0, 3, 4])])
def test_an_ist_reset_pops_nothing(side: str, fidelity: Fidelity, left: list[int]) -> None:
    """#PF in the NMI handler, an NMI in that: its handler runs above the frame of #PF, which is not done."""
    events = [nmi(), fault(14, IN_NMI, code=0), UNBLOCK, nmi(at(0x10DE80)), fault(14, at(0x10DF80), code=0)]
    assert [f.entry for f in play(side, events, layout(fidelity=fidelity)).frames] == left


@pytest.mark.parametrize("fidelity", [Fidelity.RETURNS, Fidelity.NONE])
def test_a_younger_frame_below_rsp_was_popped(side: str, fidelity: Fidelity) -> None:
    events = [nmi(), fault(14, IN_NMI, code=0), fault(14, at(0x10DF80), code=0)]
    assert [f.entry for f in play(side, events, layout(fidelity=fidelity)).frames] == [0, 2]


@pytest.mark.parametrize(("fidelity", "left"), [(Fidelity.RETURNS, [0, 1, 2]), (Fidelity.NONE, [1, 2])])
def test_the_handler_of_another_frame_is_no_sign(side: str, fidelity: Fidelity, left: list[int]) -> None:
    """#DB in the NMI handler has its stack above the RSP that the NMI interrupted."""
    events = [nmi(), fault(1, IN_NMI), fault(14, at(0x127E00), code=0)]
    assert [f.entry for f in play(side, events, layout(fidelity=fidelity, ist=DB_ON_WORK)).frames] == left


@pytest.mark.parametrize(("guest", "left", "settled"), [(layout(), [0, 2], None), (UNRECORDED, [2], Settle.ABOVE)])
def test_a_clobbered_frame_and_an_rsp_above(side: str, guest: Layout, left: list[int], settled: Settle | None) -> None:
    """With recorded returns its own is waited for: a handler may move its RSP."""
    end = play(side, [nmi(), failed(nmi(IN_NMI), 5), fault(14, at(WORK + 8), code=0)], guest)
    assert [f.entry for f in end.frames] == left
    (finding,) = end.of(Rule.FRAME_CLOBBERED)
    assert (finding.rule, finding.settled_by) == (Rule.FRAME_RELOCATED if settled else Rule.FRAME_CLOBBERED, settled)
    assert [f.entry for f in play(side, [nmi(), fault(14, at(WORK + 8), code=0)], guest).frames] == [1]  # a live one


def test_a_clobbered_frame_whose_context_is_seen_again(side: str) -> None:
    events: Events = [nmi(), failed(nmi(IN_NMI), 5), fault(14, KERNEL, code=0)]
    assert [f.entry for f in play(side, events).frames] == [0, 2]  # its recorded return will tell
    end = play(side, events, UNRECORDED)
    assert [f.entry for f in end.frames] == [2]
    (finding,) = end.of(Rule.FRAME_CLOBBERED)
    assert (finding.rule, finding.settled_by, finding.settled_evidence) == (
        Rule.FRAME_RELOCATED, Settle.CONTEXT, Evidence.INFERRED,
    )  # fmt: skip


def test_another_turn_of_the_loop(side: str) -> None:
    """Three NMIs in one place: the second return consumes the second frame; the third goes round and does not reach the first."""
    inner = at(0x10DE80)
    turn = iret(0x10DFD8, inner)
    events: Events = [nmi(), UNBLOCK, nmi(IN_NMI), UNBLOCK, nmi(inner)]
    end = play(side, [*events, turn, turn, turn, turn])
    (loop,) = end.of(Rule.RESUME_LOOP)
    assert (loop.event, loop.victim.entry, loop.writer.entry, loop.count) == (6, 2, 4, 3)
    assert [(f.entry, f.status) for f in end.frames] == [(0, FrameStatus.CLOBBERED)]
    assert [(f.victim.entry, f.settled) for f in end.of(Rule.FRAME_CLOBBERED)] == [(0, None), (2, 6)]
    end = play(side, [*events, turn, turn, iret(0x10DFD8, IN_NMI)])  # not that loop
    assert end.frames == []


def test_the_running_handler_is_found_before_anything_is_closed(side: str) -> None:
    """The NMI's frame is newer and above RSP, so the older one below RSP is not popped, though CPL3 closes the NMI's."""
    guest = dataclasses.replace(layout(), regions=())
    events: Events = [fault(14, at(0x10DF00), code=0), nmi(at(0x10DE00)), fault(14, {**USER, "rsp": 0x10DF90}, code=0)]
    assert [f.entry for f in play(side, events, guest).frames] == [0, 2]
