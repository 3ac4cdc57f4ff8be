"""The rules of replay.md one by one, answers computed by hand: what a delivery says about itself and about stacks.

Each rule has a case that it reports and a near miss that it does not.
"""

from __future__ import annotations

from typing import Any

import pytest
from model_bench import (
    IF_ON,
    KERNEL,
    USER,
    WORK,
    Events,
    both_sides,
    deliver,
    failed,
    fault,
    iret,
    layout,
    mc,
    nmi,
    other,
    play,
)

from tracedbg.layout import Gate
from tracedbg.state import Cause, EventFlag, Evidence, FrameStatus, Kind, Mismatch, Rule, Settle, Source

pytestmark = both_sides

IN_DB = {"rip": 0x100181, "rsp": 0x109F00, "cs": 8, "ss": 0, "rflags": 0x46}
IN_DF = {"rip": 0x1001F1, "rsp": 0x10FF00, "cs": 8, "ss": 0x10, "rflags": 0x46}
POISON = 0x8600111111111111

# -- failed deliveries --------------------------------------------------------------------------------------------------


def test_a_failed_delivery_overwrites_with_the_words_it_stored(side: str) -> None:
    end = play(side, [fault(1), failed(fault(1, IN_DB), 2)])
    (finding,) = end.findings
    assert (finding.rule, finding.evidence, finding.cause) == (Rule.FRAME_CLOBBERED, Evidence.COMPUTED, Cause.SOFTWARE)
    assert (finding.lo, finding.hi, finding.slots, finding.differ) == (0x109FF0, 0x10A000, 0b11000, 0b11000)  # ss, rsp
    (frame,) = end.frames  # the attempt opens none
    assert (frame.entry, frame.status, frame.clobbered_by) == (0, FrameStatus.CLOBBERED, 1)
    assert (end.words[0x109FF0], end.words[0x109FE8]) == ((0x109F00, 0xFF), (0x46, 0xFF))


def test_a_failed_delivery_that_stored_nothing(side: str) -> None:
    end = play(side, [fault(1), failed(fault(1, IN_DB), 0)])
    assert list(end.findings) == []
    assert end.frames[0].status == FrameStatus.LIVE


@pytest.mark.parametrize("event", [other(Kind.GAP), other(Kind.INIT, arg=1)])
def test_a_clobbered_frame_that_is_dropped(side: str, event: tuple[Kind, dict[str, int]]) -> None:
    """What became of it will never be known."""
    finding = play(side, [fault(1), failed(fault(1, IN_DB), 2), event]).findings[0]
    assert (finding.rule, finding.evidence, finding.settled) == (Rule.FRAME_CLOBBERED, Evidence.COMPUTED, 2)
    assert (finding.settled_by, finding.settled_evidence) == (Settle.DROPPED, Evidence.UNKNOWN)
    finding = play(side, [fault(1), failed(fault(1, IN_DB), 2), other(Kind.MARK)]).findings[0]
    assert (finding.settled, finding.settled_by) == (None, None)


@pytest.mark.parametrize(("words", "lo", "slots"), [(5, 0x10FFD8, 0b011111), (6, 0x10FFD0, 0b111111), (99, 0x10FFD0, 0b111111)])
def test_a_failed_delivery_is_cut_before_its_error_code(side: str, words: int, lo: int, slots: int) -> None:
    end = play(side, [fault(8, code=0), failed(fault(8, IN_DF, code=0), words)])
    (finding,) = end.of(Rule.FRAME_CLOBBERED)
    assert (finding.lo, finding.hi, finding.slots, finding.differ) == (lo, 0x110000, slots, 0b001001)  # rip, rsp
    assert (finding.writer.lo, finding.writer.has_code) == (lo, words >= 6)


@pytest.mark.parametrize("blocks", [True, False])
def test_a_failed_nmi_may_leave_nmis_blocked(side: str, blocks: bool) -> None:
    cpu = play(side, [failed(nmi())], nmi_fail_blocks=blocks).cpu
    assert (cpu.nmi_blocked, cpu.nmi_since, cpu.mcip) == (True if blocks else None, 0, None)
    cpu = play(side, [failed(mc())], nmi_fail_blocks=blocks).cpu
    assert (cpu.nmi_blocked, cpu.mcip) == (None, True)


# -- shadow-stack tokens ------------------------------------------------------------------------------------------------


def token(held: int | None, holds: int) -> tuple[Kind, dict[str, int]]:
    return other(Kind.TOKEN, arg=2, addr=0x9000, value=holds, **({} if held is None else {"code": held}))


FREE, BUSY = token(None, 0x9000), token(None, 0x9001)


def test_token_of_a_live_frame_is_busy(side: str) -> None:
    end = play(side, [FREE, nmi(), failed(nmi()), failed(nmi()), fault(14, code=0), failed(nmi())])
    first, second = end.of(Rule.TOKEN_BUSY)
    assert (first.event, first.evidence, first.detail) == (2, Evidence.COMPUTED, 2)
    assert (first.lo, first.hi, first.victim.entry, first.writer.entry) == (0x10DFD8, 0x10E000, 1, 2)
    assert (second.event, first.count) == (5, 1)  # a delivery succeeded in between
    assert (end.cpu.tokens_known, end.cpu.tokens_busy) == (4, 4)


@pytest.mark.parametrize(("events", "expected"), [([BUSY, failed(nmi())], 1), ([FREE, failed(nmi())], 0), ([failed(nmi())], 0)])
def test_token_without_a_frame(side: str, events: Events, expected: int) -> None:
    found = play(side, events).of(Rule.TOKEN_BUSY)
    assert [(f.detail, f.lo, f.hi, f.victim) for f in found] == [(2, 0, 0, None)] * expected


@pytest.mark.parametrize(("held", "holds", "expected"), [(0x9001, 0x9001, 1), (0x9000, 0x9001, 0), (0x9001, 0x9000, 0)])
def test_token_event_that_could_not_take_it(side: str, held: int, holds: int, expected: int) -> None:
    end = play(side, [token(held, holds), token(held, holds)])
    assert [(f.rule, f.evidence, f.event, f.writer) for f in end.findings] == [
        (Rule.TOKEN_BUSY, Evidence.RECORDED, 0, None)
    ] * expected
    assert end.cpu.tokens_busy == (holds & 1) << 2


def test_an_iret_frees_the_token(side: str) -> None:
    cpu = play(side, [FREE, nmi(), iret(0x10DFD8)]).cpu
    assert (cpu.tokens_known, cpu.tokens_busy) == (4, 0)
    assert play(side, [FREE, nmi(), other(Kind.GAP)]).cpu.tokens_known == 0


# -- the event itself ---------------------------------------------------------------------------------------------------


def test_illegal_vector(side: str) -> None:
    events = [other(Kind.RAISE, arg=15, source=Source.FIXED), deliver(15, Source.FIXED, IF_ON), deliver(5, Source.FIXED, IF_ON)]
    first, second = play(side, events).findings
    assert (first.rule, first.evidence, first.detail, first.count) == (Rule.ILLEGAL_VECTOR, Evidence.RECORDED, 15, 2)
    assert (first.lo, first.hi, first.writer) == (0, 0, None)  # of the request
    assert (second.detail, second.writer.entry, second.writer.hi) == (5, 2, 0)  # no gate: the record alone
    (placed,) = play(side, events[1:2]).findings
    assert (placed.writer.lo, placed.writer.hi) == (0x126FA8, WORK)


@pytest.mark.parametrize(
    "event",
    [
        deliver(16, Source.FIXED, IF_ON), deliver(15, Source.EXTINT, IF_ON), deliver(15, Source.EXTERNAL, IF_ON),
        other(Kind.RAISE, arg=16, source=Source.FIXED), other(Kind.RAISE, arg=15, source=Source.EXTINT),
    ],
)  # fmt: skip
def test_legal_vector(side: str, event: tuple[Kind, dict[str, int]]) -> None:
    assert list(play(side, [event]).findings) == []


@pytest.mark.parametrize(
    ("event", "changes", "expected"),
    [
        (deliver(0x30, Source.EXTINT, IF_ON), {"gates": {0x30: Gate(0x100300, present=False)}}, True),
        (deliver(0x30, Source.EXTINT, IF_ON), {"gates": {0x30: Gate(0x100300, type=0xC)}}, True),
        (deliver(0x30, Source.EXTINT, IF_ON), {}, False),
        (deliver(0x55, Source.EXTINT, IF_ON), {}, False),  # gate unknown
        (deliver(0x80, Source.SOFT_INT, USER, code=2), {}, True),
        (deliver(0x80, Source.SOFT_INT, USER, code=2), {"gates": {0x80: Gate(0x100800, dpl=3)}}, False),
        (deliver(0x80, Source.SOFT_INT, KERNEL, code=2), {}, False),
        (deliver(0x80, Source.EXTINT, USER), {}, False),
        (deliver(1, Source.SOFT_INT, USER, code=1), {}, False),  # INT1 does not look at the DPL
        (deliver(1, Source.SOFT_INT, USER), {}, False),
        (deliver(1, Source.SOFT_INT, USER, code=2), {}, True),  # INT 1 does
        (deliver(0x30, Source.EXTINT, USER), {"rsp0": POISON}, True),
        (deliver(0x30, Source.EXTINT, IF_ON), {"rsp0": POISON}, False),
        (deliver(0x30, Source.EXTINT, USER), {"rsp0": None}, False),
    ],
)
def test_a_gate_that_cannot_deliver(
    side: str, event: tuple[Kind, dict[str, int]], changes: dict[str, Any], expected: bool
) -> None:
    assert play(side, [event], layout(**changes)).details() == [Mismatch.GATE] * expected


MCE_OFF, MCE_ON = other(Kind.CR, arg=4, value=0), other(Kind.CR, arg=4, value=0x40)
MCIP_OFF, MCIP_ON = other(Kind.MSR, code=0x17A, value=0), other(Kind.MSR, code=0x17A, value=4)
TPR_3 = other(Kind.CR, arg=8, value=3)
GIF_OFF, GIF_ON = other(Kind.VMEXIT, arg=1), other(Kind.UNBLOCK, arg=1)


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([MCIP_ON, mc()], Mismatch.MC_SHUTDOWN),
        ([mc(), mc()], None),  # nobody tells here when MCIP is cleared
        ([MCIP_OFF, mc(), mc()], Mismatch.MC_SHUTDOWN),
        ([other(Kind.MSR, code=0x17A), mc(), mc()], Mismatch.MC_SHUTDOWN),
        ([MCIP_OFF, other(Kind.GAP), mc(), mc()], Mismatch.MC_SHUTDOWN),
        ([other(Kind.MSR, code=0x17B, value=4), mc(), mc()], None),
        ([MCE_OFF, mc()], Mismatch.MC_SHUTDOWN),
        ([MCIP_OFF, MCE_ON, mc()], None),
        ([mc()], None),
        ([TPR_3, deliver(0x31, Source.FIXED, IF_ON)], Mismatch.TPR),
        ([other(Kind.MSR, code=0x808, value=0x3F), deliver(0x30, Source.FIXED, IF_ON)], Mismatch.TPR),
        ([TPR_3, deliver(0x41, Source.FIXED, IF_ON)], None),
        ([TPR_3, deliver(0x31, Source.EXTINT, IF_ON)], None),
        ([deliver(0x31, Source.FIXED, IF_ON)], None),
        ([failed(fault(14)), fault(13, code=0)], Mismatch.DOUBLE_FAULT),
        ([failed(fault(14)), fault(14, code=0)], Mismatch.DOUBLE_FAULT),
        ([failed(fault(14, code=2)), fault(14, code=2, value=0x1000)], Mismatch.DOUBLE_FAULT),
        ([failed(fault(14, code=2)), fault(14, USER, code=2)], Mismatch.DOUBLE_FAULT),
        ([failed(fault(14, code=2)), fault(14, code=2)], None),  # a VM exit was in the way, and it is delivered again
        ([failed(fault(13, code=0)), failed(fault(13, code=0)), fault(13, code=0)], None),
        ([failed(fault(13)), fault(14, code=0)], None),  # contributory, then a page fault: one after the other
        ([failed(fault(1)), fault(13, code=0)], None),
        ([failed(nmi()), fault(14, code=0)], None),
        ([failed(fault(14)), deliver(0x30, Source.EXTINT, IF_ON)], None),
        ([failed(fault(14)), failed(fault(13)), fault(8, code=0)], None),
        ([failed(fault(1)), failed(fault(14)), fault(8, code=0)], None),  # the second fault need not be recorded
        ([failed(fault(14)), fault(8, code=0)], None),
        ([failed(fault(14)), failed(fault(1)), fault(8, code=0)], Mismatch.DOUBLE_FAULT),
        ([failed(fault(17)), fault(8, code=0)], Mismatch.DOUBLE_FAULT),
        ([failed(nmi()), fault(8, code=0)], None),  # not an exception
        ([failed(fault(1)), deliver(8, Source.EXTINT, IF_ON)], None),  # no #DF
        ([GIF_OFF, nmi()], Mismatch.GIF),
        ([GIF_OFF, deliver(0x30, Source.EXTERNAL, IF_ON)], Mismatch.GIF),
        ([GIF_OFF, GIF_ON, nmi()], None),
        ([GIF_OFF, other(Kind.VMENTRY), nmi()], None),
        ([GIF_OFF, fault(14, code=0)], None),
        ([other(Kind.VMEXIT, arg=0), nmi()], None),
        ([BUSY, nmi()], Mismatch.TOKEN),
        ([FREE, nmi()], None),
    ],
)
def test_what_the_state_holds_back(side: str, events: Events, expected: Mismatch | None) -> None:
    end = play(side, events)
    assert end.details() == ([] if expected is None else [expected])
    assert all(f.evidence == Evidence.COMPUTED and f.event == len(events) - 1 for f in end.of(Rule.MODEL_MISMATCH))


def test_mismatches_come_in_the_order_of_the_page_and_once(side: str) -> None:
    event = deliver(0x31, Source.FIXED, KERNEL)
    end = play(side, [TPR_3, GIF_OFF, event, event], layout(gates={0x31: Gate(0x100310, present=False)}))
    assert end.details() == [Mismatch.IF_CLEAR, Mismatch.GATE, Mismatch.TPR, Mismatch.GIF]
    assert [f.count for f in end.findings] == [2] * 4


# -- error codes --------------------------------------------------------------------------------------------------------


def test_no_error_code_for_a_handler_that_drops_one(side: str) -> None:
    event = deliver(17, Source.SOFT_INT, KERNEL, code=2)
    (finding,) = play(side, [event, event]).findings
    assert (finding.rule, finding.evidence, finding.count) == (Rule.ERROR_CODE_MISMATCH, Evidence.INFERRED, 2)
    assert (finding.lo, finding.hi, finding.writer.entry) == (0x126FA8, WORK, 0)


@pytest.mark.parametrize(
    "event",
    [
        deliver(9, Source.SOFT_INT, KERNEL, code=2), fault(17, code=0), failed(deliver(17, Source.SOFT_INT, KERNEL, code=2)),
        (Kind.DELIVER, {"arg": 17, "code": 0, **KERNEL}),  # source unknown: it has a code
    ],
)  # fmt: skip
def test_error_code_as_the_handler_has_it(side: str, event: tuple[Kind, dict[str, int]]) -> None:
    assert play(side, [event]).of(Rule.ERROR_CODE_MISMATCH) == []


def test_an_error_code_dropped_that_was_not_there(side: str) -> None:
    """RIP is popped from the CS word; vectors from 32 on are one finding."""
    events = [deliver(0x30, Source.EXTINT, IF_ON), iret(0x126FB0, {**KERNEL, "rip": 8})]
    end = play(side, events)
    (finding,) = end.findings
    assert (finding.rule, finding.evidence, finding.event) == (Rule.ERROR_CODE_MISMATCH, Evidence.RECORDED, 1)
    assert (finding.lo, finding.hi, finding.victim.entry, finding.consumer, finding.popped.rip) == (0x126FA8, WORK, 0, 1, 8)
    assert finding.writer is None
    assert end.frames == []
    assert (end.cpu.nmi_unblocked_by, end.cpu.nmi_unblock_frame) == (1, 0)
    (finding,) = play(side, [*events, deliver(0x31, Source.EXTINT, IF_ON), events[1]]).findings
    assert finding.count == 2


@pytest.mark.parametrize(
    ("first", "rsp", "rip", "flags", "expected", "left"),
    [
        (deliver(0x30, Source.EXTINT, IF_ON), 0x126FB0, 9, 0, False, 1),  # not what stands there
        (deliver(0x30, Source.EXTINT, IF_ON), 0x126FB8, 8, 0, False, 1),  # not one word
        (fault(17, code=5), 0x126FA0, 5, 0, True, 0),  # the code was not dropped
        (fault(17, code=5), 0x126FA0, 6, 0, False, 1),
        (fault(17, code=5), 0x126FB0, 8, 0, False, 1),  # with a code it is the other way round
        (deliver(0x30, Source.EXTINT, IF_ON), 0x126FB0, 8, EventFlag.FAULTED, True, 1),
        (deliver(0x30, Source.EXTINT, IF_ON), 0x126FB0, None, EventFlag.FAULTED, True, 1),
        (deliver(0x30, Source.EXTINT, IF_ON), 0x126FB0, None, 0, False, 1),
        (deliver(0x30, Source.EXTINT, IF_ON), 0x126FB0, 9, EventFlag.FAULTED, False, 1),
        (deliver(0x30, Source.EXTINT, IF_ON), 0x126FA8, None, EventFlag.FAULTED, False, 1),  # the frame itself
    ],
)
def test_a_frame_popped_one_word_off(
    side: str, first: tuple[Kind, dict[str, int]], rsp: int, rip: int | None, flags: int, expected: bool, left: int
) -> None:
    event = (Kind.RETURN, {"rsp": rsp, "flags": flags, **({} if rip is None else {"addr": rip})})
    end = play(side, [first, event])
    assert [f.evidence for f in end.of(Rule.ERROR_CODE_MISMATCH)] == [Evidence.RECORDED] * expected
    assert len(end.frames) == left


# -- user stack ---------------------------------------------------------------------------------------------------------

SYSCALL = other(Kind.SYSCALL, addr=0x103000, **USER)
MOV_SS, STI = other(Kind.SHADOW, arg=1, rip=0x400000), other(Kind.SHADOW, arg=0, rip=0x400000)
IN_GAP = {"rip": 0x103000, "rsp": 0x7000, "cs": 8, "ss": 0x10, "rflags": 0x46}
NO_DB_IST = layout(gates={1: Gate(0x100180)})


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([SYSCALL, fault(14, IN_GAP, code=0)], (Cause.RING_GAP, 0, None)),
        ([STI, SYSCALL, fault(1, IN_GAP)], (Cause.RING_GAP, 1, None)),
        ([MOV_SS, SYSCALL, fault(1, IN_GAP)], (Cause.MOV_SS, 0, 1)),
        ([MOV_SS, other(Kind.EOI), SYSCALL, fault(1, IN_GAP)], (Cause.MOV_SS, 0, 2)),
        ([MOV_SS, other(Kind.FLAGS, rflags=0x246), SYSCALL, fault(1, IN_GAP)], (Cause.RING_GAP, 2, None)),
        ([MOV_SS, SYSCALL, fault(14, IN_GAP, code=0)], (Cause.RING_GAP, 1, None)),
        ([other(Kind.SYSRET, flags=EventFlag.FAULTED, rsp=0x7000), fault(13, IN_GAP, code=0)], (Cause.RING_GAP, 0, None)),
    ],
)
def test_a_frame_in_the_ring_gap(side: str, events: Events, expected: tuple[Cause, int, int | None]) -> None:
    (finding,) = play(side, events, NO_DB_IST).of(Rule.USER_STACK)
    assert finding.evidence == Evidence.COMPUTED
    assert (finding.cause, finding.cause_event, finding.cause_frame) == expected
    assert finding.hi == 0x7000


@pytest.mark.parametrize(
    ("events", "inferred"),
    [
        ([SYSCALL, other(Kind.SETSP, value=WORK), fault(14, KERNEL, code=0)], 0),
        ([SYSCALL, nmi(IN_GAP)], 0),  # IST
        ([SYSCALL, fault(14, {**IN_GAP, "rsp": 0x6FF8}, code=0)], 1),  # only near the user's RSP
        ([other(Kind.SYSENTER, addr=0x103000, **USER), fault(14, IN_GAP, code=0)], 1),
        ([other(Kind.SYSRET, rsp=0x7000), fault(13, IN_GAP, code=0)], 1),
    ],
)
def test_out_of_the_ring_gap(side: str, events: Events, inferred: int) -> None:
    found = play(side, events).of(Rule.USER_STACK)
    assert [(f.evidence, f.cause) for f in found] == [(Evidence.INFERRED, Cause.NONE)] * inferred
