"""The rules of replay.md one by one, answers computed by hand: masking, windows, returns, and the state of a CPU.

Each rule has a case that it reports and a near miss that it does not.
"""

from __future__ import annotations

from typing import Any

import pytest
from model_bench import (
    IF_ON,
    KERNEL,
    MC_TOP,
    NMI_TOP,
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

from tracedbg.layout import Fidelity, Gate
from tracedbg.state import Cause, EventFlag, Evidence, Kind, Rule, Settle, Shadow, Source

pytestmark = both_sides

IN_NMI = {"rip": 0x100191, "rsp": 0x10DF00, "cs": 8, "ss": 0x10, "rflags": 0x46}
PF_IN_NMI = fault(14, IN_NMI, code=0)  # its frame is [10ded0, 10df00)
PF_IRET = iret(0x10DED8, IN_NMI)
NMI_IRET = iret(0x10DFD8)
UNBLOCK = other(Kind.UNBLOCK)
SMI, RSM = other(Kind.SMI), other(Kind.RSM)
IF_SET = other(Kind.FLAGS, rflags=0x246)
MCIP_OFF = other(Kind.MSR, code=0x17A, value=0)
UNRECORDED = layout(fidelity=Fidelity.NONE)

# -- NMIs that stay blocked ---------------------------------------------------------------------------------------------


def test_nmis_stay_blocked_in_user_mode(side: str) -> None:
    """The handler left without an IRET; said once, until NMIs are blocked anew."""
    end = play(side, [nmi(), fault(14, USER, code=0), fault(14, USER, code=0), nmi(USER), fault(14, USER, code=0)])
    first, second = end.of(Rule.NMI_STUCK)
    assert (first.event, first.evidence, first.cause_event) == (1, Evidence.COMPUTED, 0)
    assert (first.lo, first.hi, first.victim.entry) == (0x10DFD8, 0x10E000, 0)
    assert (second.event, second.cause_event, second.victim.entry) == (4, 3, 3)
    assert end.cpu.nmi_blocked


@pytest.mark.parametrize(
    ("events", "victims"),
    [
        ([nmi(), fault(14, KERNEL, code=0)], [0]),  # its context is seen again
        ([other(Kind.VMEXIT, source=Source.NMI), fault(14, USER, code=0)], [None]),
        ([nmi(), other(Kind.SYSRET, addr=0x400000)], [0]),
        ([nmi(), NMI_IRET, fault(14, USER, code=0)], []),
        ([nmi(), PF_IN_NMI], []),
        ([nmi(), other(Kind.SYSCALL, **USER)], []),
        ([nmi(), UNBLOCK, fault(14, USER, code=0)], []),
        ([fault(14, USER, code=0)], []),
    ],
)
def test_blocking_without_an_iret(side: str, events: Events, victims: list[int | None]) -> None:
    found = play(side, events).of(Rule.NMI_STUCK)
    assert [None if f.victim is None else f.victim.entry for f in found] == victims


def test_nmi_stuck_needs_recorded_returns(side: str) -> None:
    end = play(side, [nmi(), fault(14, USER, code=0)], UNRECORDED)
    assert end.of(Rule.NMI_STUCK) == []
    assert (end.cpu.nmi_blocked, end.cpu.nmi_unblocked_by, end.cpu.nmi_unblock_frame) == (False, 1, 0)


@pytest.mark.parametrize(("kind", "unblocked"), [(Kind.SYSCALL, True), (Kind.SYSENTER, True), (Kind.SYSRET, False)])
def test_what_user_mode_shows_of_nmis(side: str, kind: Kind, unblocked: bool) -> None:
    end = play(side, [nmi(), (kind, USER)], UNRECORDED)
    assert (end.frames, end.cpu.nmi_blocked) == ([], not unblocked)


def test_nmi_lost(side: str) -> None:
    request = other(Kind.RAISE, arg=2, source=Source.NMI)
    end = play(side, [request, nmi(), request, request, request])
    (finding,) = end.findings
    assert (finding.rule, finding.evidence, finding.event, finding.count) == (Rule.NMI_LOST, Evidence.RECORDED, 3, 2)
    assert finding.cause_event == 1  # what blocked NMIs
    end = play(side, [request, request, nmi(), request])  # not blocked: both are taken as far as known
    assert list(end.findings) == []
    assert end.cpu.nmi_pending


def test_an_nmi_that_ended_a_guests_run_on_svm_waits(side: str) -> None:
    """It is delivered after STGI (R19); on VMX the exit itself was its delivery (R18)."""
    stgi = other(Kind.UNBLOCK, arg=1)
    run = [other(Kind.VMENTRY), other(Kind.VMEXIT, arg=1, source=Source.NMI), stgi, nmi({})]
    end = play(side, run[:2], UNRECORDED)
    assert (end.cpu.nmi_blocked, end.cpu.gif) == (None, False)
    end = play(side, [*run, *run, *run], UNRECORDED)  # each NMI shows that the one before had returned
    assert list(end.findings) == []
    assert [f.entry for f in end.frames] == [11]


def test_a_guests_events_are_not_the_hosts(side: str) -> None:
    """Where both are in one stream: its NMI goes by its own tables, its IRET pops its own frame, even at the same addresses."""
    mixed = layout(fidelity=Fidelity.RETURNS | Fidelity.GUESTS)
    entry, out = other(Kind.VMENTRY), other(Kind.VMEXIT, arg=0, **KERNEL)
    guests = [nmi(), fault(14, USER, code=0), NMI_IRET, failed(nmi(), 5)]
    end = play(side, [nmi(), entry, *guests, out, NMI_IRET, nmi()], mixed)
    assert list(end.findings) == []
    assert ([f.entry for f in end.frames], end.cpu.guest) == ([8], False)
    end = play(side, [nmi(), entry, *guests], mixed)
    assert ([f.entry for f in end.frames], end.cpu.guest, end.cpu.rsp, end.cpu.nmi_since) == ([0], True, None, 0)


# -- returns whose frame is not recorded ----------------------------------------------------------------------------------

RETURN = other(Kind.RETURN)
BARE_NMI, BARE_MC, BARE_PF = other(Kind.DELIVER, arg=2), other(Kind.DELIVER, arg=18), other(Kind.DELIVER, arg=0x41)


@pytest.mark.parametrize(
    ("events", "clobbers", "left"),
    [
        ([BARE_NMI, RETURN, BARE_NMI, RETURN], [], []),
        ([BARE_NMI, BARE_PF, RETURN, RETURN, BARE_NMI], [], [4]),
        ([BARE_NMI, BARE_MC, RETURN, BARE_NMI], [(0, 3)], [0, 3]),             # the return was that of the #MC
        ([BARE_NMI, BARE_MC, RETURN, BARE_NMI, RETURN, RETURN], [(0, 3)], []),
        ([BARE_NMI, BARE_PF, RETURN, BARE_NMI], [(0, 3)], [0, 3]),             # that of a delivery that was not placed
        ([RETURN, RETURN, BARE_NMI, BARE_NMI], [(2, 3)], [2, 3]),              # those of before the trace began are nobody's
        ([BARE_PF, BARE_PF, RETURN, BARE_NMI, RETURN, BARE_NMI], [], [5]),     # a handler that left without one
        ([BARE_NMI, failed(BARE_MC), RETURN, BARE_NMI], [], [3]),              # a failed delivery has no handler
        ([BARE_NMI, other(Kind.RETURN, flags=int(EventFlag.FAULTED)), BARE_NMI], [(0, 2)], [0, 2]),
        ([BARE_PF, other(Kind.GAP), BARE_NMI, RETURN, BARE_NMI], [], [4]),
    ],
)  # fmt: skip
def test_returns_nest_where_no_rsp_says_more(side: str, events: Events, clobbers: list[tuple[int, int]], left: list[int]) -> None:
    end = play(side, events, UNRECORDED)
    found = end.of(Rule.FRAME_CLOBBERED)
    assert [(f.victim.entry, f.event) for f in found] == clobbers
    assert all((f.rule, f.evidence, f.settled) == (Rule.FRAME_CLOBBERED, Evidence.INFERRED, None) for f in found)
    assert [f.entry for f in end.frames if f.lo != 0x10BFD8] == left


# -- SMM ----------------------------------------------------------------------------------------------------------------


def test_an_iret_in_smm_unblocks_nmis_for_good(side: str) -> None:
    end = play(side, [nmi(), SMI, iret(0x30000), RSM])
    cpu = end.cpu
    assert (cpu.nmi_blocked, cpu.nmi_since, cpu.nmi_unblocked_by, cpu.nmi_unblock_frame) == (False, 0, 2, None)
    (finding,) = end.findings
    assert (finding.rule, finding.event, finding.cause) == (Rule.REENTRY_WINDOW, 3, Cause.NMI_UNBLOCKED)
    assert (finding.cause_event, finding.cause_frame) == (2, None)


def test_rsm_restores_the_blocking(side: str) -> None:
    end = play(side, [nmi(), SMI, deliver(2, Source.NMI, KERNEL), UNBLOCK, RSM])
    cpu = end.cpu
    assert (cpu.nmi_blocked, cpu.nmi_since, cpu.nmi_unblocked_by, cpu.smm) == (True, 0, None, False)
    assert list(end.findings) == []  # a delivery in SMM is not judged
    assert [f.entry for f in end.frames] == [0]
    assert play(side, [UNBLOCK, SMI]).cpu.nmi_blocked
    cpu = play(side, [UNBLOCK, SMI, RSM]).cpu
    assert (cpu.nmi_blocked, cpu.nmi_unblocked_by, cpu.rsp) == (False, 0, None)


def test_rsm_without_smi(side: str) -> None:
    cpu = play(side, [nmi(), RSM]).cpu
    assert (cpu.nmi_blocked, cpu.rsp) == (True, None)


# -- windows ------------------------------------------------------------------------------------------------------------


def test_a_return_in_the_handler_opens_a_window(side: str) -> None:
    end = play(side, [nmi(), PF_IN_NMI, PF_IRET, PF_IN_NMI, PF_IRET])
    (finding,) = end.findings
    assert (finding.rule, finding.evidence, finding.event, finding.count) == (Rule.REENTRY_WINDOW, Evidence.COMPUTED, 2, 1)
    assert (finding.lo, finding.hi, finding.victim.entry, finding.writer) == (0x10DFD8, NMI_TOP, 0, None)
    assert (finding.cause, finding.cause_event, finding.cause_frame) == (Cause.NMI_UNBLOCKED, 2, 1)


def copy(*words: int) -> Events:
    """Software stores words from 10df80 on, below the NMI's frame."""
    return [other(Kind.WRITE, addr=0x10DF80 + 8 * n, value=word, arg=8) for n, word in enumerate(words)]


OWN = (0x101000, 8, 0x46, WORK, 0x10)


@pytest.mark.parametrize(("words", "expected"), [(OWN, 0), (OWN[:4], 1), ((0x101001, *OWN[1:]), 1)])
def test_a_copy_below_the_frame_closes_the_window(side: str, words: tuple[int, ...], expected: int) -> None:
    assert len(play(side, [nmi(), *copy(*words), UNBLOCK]).of(Rule.REENTRY_WINDOW)) == expected


def at_distance(words: int) -> Events:
    return [other(Kind.WRITE, addr=0x10DFD8 - 8 * words + 8 * n, value=word, arg=8) for n, word in enumerate(OWN)]


@pytest.mark.parametrize(("words", "expected"), [(5, 0), (64, 0), (65, 1)])
def test_where_the_copy_may_stand(side: str, words: int, expected: int) -> None:
    assert len(play(side, [nmi(), *at_distance(words), UNBLOCK]).of(Rule.REENTRY_WINDOW)) == expected


FAKE = deliver(2, Source.EXTINT, IF_ON)
MCE_OFF = other(Kind.CR, arg=4, value=0)


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([UNBLOCK, FAKE], (Cause.NMI_NEVER_BLOCKED, 1)),
        ([FAKE], None),  # whether NMIs are blocked is not known
        ([UNBLOCK, nmi()], None),
        ([UNBLOCK, (Kind.DELIVER, {"arg": 2, **KERNEL})], None),  # it may be an NMI
        ([UNBLOCK, mc()], None),  # another stack
        ([nmi(), NMI_IRET], None),
        ([nmi(), UNBLOCK], (Cause.NMI_UNBLOCKED, 1)),
        ([nmi(), other(Kind.UNBLOCK, arg=1)], None),  # STGI
        ([nmi(), (Kind.RETURN, {"flags": EventFlag.FAULTED})], (Cause.NMI_UNBLOCKED, 1)),
        ([nmi(), (Kind.RETURN, {"flags": EventFlag.SMM})], None),
        ([nmi(), failed(nmi(IN_NMI), 5), UNBLOCK], None),  # overwritten already
        ([mc(), MCIP_OFF], (Cause.MC_UNMASKED, 1)),
        ([mc(), other(Kind.MSR, code=0x17A, value=5)], None),
        ([mc(), other(Kind.MSR, code=0x17B, value=0)], None),
        ([MCE_OFF, deliver(18, Source.MC, KERNEL), MCIP_OFF], None),
        ([MCIP_OFF, deliver(18, Source.EXTINT, IF_ON)], (Cause.MC_UNMASKED, 1)),
        ([deliver(18, Source.EXTINT, IF_ON)], None),
        ([MCIP_OFF, (Kind.DELIVER, {"arg": 18, **KERNEL})], None),
        ([nmi(), IF_SET], (Cause.MASKABLE, 1)),
        ([nmi(), other(Kind.FLAGS, rflags=0x46)], None),
        ([nmi(), other(Kind.SHADOW, arg=0)], (Cause.MASKABLE, 1)),
        ([nmi(), other(Kind.SHADOW, arg=1)], None),
        ([fault(1), IF_SET], None),  # no gate of an interrupt has #DB's stack
        ([fault(14, code=0), IF_SET], None),  # not through an IST gate
    ],
)
def test_windows(side: str, events: Events, expected: tuple[Cause, int] | None) -> None:
    found = play(side, events).of(Rule.REENTRY_WINDOW)
    assert [(f.cause, f.cause_event) for f in found] == ([] if expected is None else [expected])
    assert all(f.event == len(events) - 1 and f.evidence == Evidence.COMPUTED for f in found)


def test_a_trap_gate_opens_a_window_at_once(side: str) -> None:
    guest = layout(gates={18: Gate(0x100290, 8, 3, 0xF)})
    (finding,) = play(side, [mc(IF_ON)], guest).findings
    assert (finding.rule, finding.cause, finding.cause_event) == (Rule.REENTRY_WINDOW, Cause.MASKABLE, 0)
    assert (finding.lo, finding.hi, finding.victim.entry) == (0x10BFD8, MC_TOP, 0)
    assert list(play(side, [mc(IF_ON)]).findings) == []


def test_windows_of_one_kind_are_one_finding(side: str) -> None:
    (finding,) = play(side, [nmi(), IF_SET, NMI_IRET, nmi(), IF_SET]).findings
    assert (finding.event, finding.count) == (1, 2)


def test_a_window_is_looked_at_when_a_frame_would_overlap(side: str) -> None:
    """The pointer is moved away and back; the overlap is cut where the next frame begins."""
    away, partly = other(Kind.TSS, arg=10, value=0x10D000), other(Kind.TSS, arg=10, value=0x10DFF0)
    end = play(side, [nmi(), away, IF_SET, other(Kind.FLAGS, rflags=0x46), partly, IF_SET])
    (finding,) = end.findings
    assert (finding.event, finding.lo, finding.hi) == (5, 0x10DFD8, 0x10DFF0)


@pytest.mark.parametrize(("moves", "expected"), [([], 1), ([other(Kind.SETSP, value=WORK)], 0)])
def test_without_recorded_returns_only_the_chain(side: str, moves: Events, expected: int) -> None:
    assert len(play(side, [nmi(), *moves, UNBLOCK], UNRECORDED).of(Rule.REENTRY_WINDOW)) == expected
    assert len(play(side, [nmi(), *moves, UNBLOCK]).of(Rule.REENTRY_WINDOW)) == 1
    # A handler that came from user mode may have left the stack unseen.
    assert len(play(side, [nmi(USER), *moves, UNBLOCK]).of(Rule.REENTRY_WINDOW)) == expected


# -- returns ------------------------------------------------------------------------------------------------------------


def test_unmatched_return(side: str) -> None:
    end = play(side, [nmi(), NMI_IRET, NMI_IRET, NMI_IRET])
    (finding,) = end.findings
    assert (finding.rule, finding.evidence, finding.event, finding.count) == (Rule.UNMATCHED_RETURN, Evidence.RECORDED, 2, 2)
    assert (finding.lo, finding.hi, finding.writer.entry, finding.consumer) == (0x10DFD8, NMI_TOP, 0, 2)
    assert (finding.popped.rip, finding.popped.rsp, finding.victim) == (0x101000, WORK, None)


OTHERS = [fault(14, code=0), iret(0x126FA8)]


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([nmi(), NMI_IRET, *OTHERS * 7, NMI_IRET], 1),
        ([nmi(), NMI_IRET, *OTHERS * 8, NMI_IRET], 0),  # long ago
        ([nmi(), NMI_IRET, other(Kind.WRITE, addr=0x10DFD8, value=0x101000, arg=8), NMI_IRET], 0),  # software's own frame
        ([nmi(), NMI_IRET, iret(0x10DFD8, {**KERNEL, "rip": 0x101001})], 0),
        ([nmi(), NMI_IRET, other(Kind.GAP), NMI_IRET], 0),
        ([nmi(USER), *[iret(0x10DFD8, USER)] * 2], 0),  # user code can be resumed twice in one place
        ([nmi(), NMI_IRET, (Kind.RETURN, {"rsp": 0x10DFD8, "addr": 0x101000, "value": WORK})], 0),  # CPL unknown
    ],
)
def test_a_return_from_a_frame_that_was_consumed(side: str, events: Events, expected: int) -> None:
    assert len(play(side, events).of(Rule.UNMATCHED_RETURN)) == expected
    assert play(side, events, UNRECORDED).of(Rule.UNMATCHED_RETURN) == []


def test_only_the_compared_bytes_of_cs_and_ss_count(side: str) -> None:
    """The upper bytes of RFLAGS, CS and SS are unknown; what the IRET popped came from another delivery all the same."""
    inner = {"rip": 0x100191, "rsp": 0x10DF00, "cs": 0x18, "ss": 0x20, "rflags": 0x86}
    blur = [other(Kind.WRITE, addr=at, arg=length) for at, length in ((0x10DFE2, 6), (0x10DFEC, 4), (0x10DFFA, 6))]
    end = play(side, [nmi(), nmi(inner), *blur, iret(0x10DFD8, inner), iret(0x10DFD8, {**inner, "rip": 1, "rsp": 2})])
    settled = end.of(Rule.FRAME_CLOBBERED)[0]
    assert (settled.rule, settled.settled_by, settled.consumer) == (Rule.FRAME_CONSUMED_CORRUPT, Settle.RETURN, 6)


# -- requests and ends --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tpr", "vector", "source", "expected"),
    [
        (1, 18, Source.FIXED, 1), (2, 18, Source.FIXED, 1), (1, 31, Source.FIXED, 1), (0, 18, Source.FIXED, 0),
        (1, 32, Source.FIXED, 0), (3, 32, Source.FIXED, 0), (1, 18, Source.EXTINT, 0), (None, 18, Source.FIXED, 0),
    ],
)  # fmt: skip
def test_held_vector(side: str, tpr: int | None, vector: int, source: Source, expected: int) -> None:
    request = other(Kind.RAISE, arg=vector, source=source)
    found = play(side, [other(Kind.CR, arg=8, **({} if tpr is None else {"value": tpr})), request, request]).findings
    assert [(f.rule, f.evidence, f.detail, f.count) for f in found] == [
        (Rule.HELD_VECTOR, Evidence.RECORDED, vector, 2)
    ] * expected


PF, DF = failed(fault(14)), failed(fault(8))


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([PF, DF, other(Kind.SHUTDOWN)], (Rule.TRIPLE_FAULT, 1, 0, 0)),
        ([PF, DF, other(Kind.SHUTDOWN, arg=0)], (Rule.TRIPLE_FAULT, 1, 0, 0)),
        ([other(Kind.SHUTDOWN, arg=0)], (Rule.TRIPLE_FAULT, None, None, 0)),
        ([PF, DF, other(Kind.SHUTDOWN, arg=1)], (Rule.SHUTDOWN, None, None, 1)),
        ([DF, PF, other(Kind.SHUTDOWN)], (Rule.SHUTDOWN, None, None, 3)),
        ([failed(deliver(8, Source.SOFT_INT, KERNEL)), other(Kind.SHUTDOWN)], (Rule.SHUTDOWN, None, None, 3)),
        ([PF, DF, other(Kind.GAP), other(Kind.SHUTDOWN)], (Rule.SHUTDOWN, None, None, 3)),
    ],
)
def test_the_end(side: str, events: Events, expected: tuple[Rule, int | None, int | None, int]) -> None:
    last = play(side, events).findings[-1]
    assert (last.rule, last.cause_event, last.cause_frame, last.detail) == expected
    assert last.evidence == Evidence.RECORDED


# -- the state of a CPU -------------------------------------------------------------------------------------------------

SYSCALL_MSRS = [
    other(Kind.MSR, code=0xC0000081, value=0x0023001100000000), other(Kind.MSR, code=0xC0000082, value=0xFFFFFFFF81800000),
    other(Kind.MSR, code=0xC0000084, value=0x700), other(Kind.MSR, code=0x174, value=0x13),
    other(Kind.MSR, code=0x175, value=0x9000), other(Kind.MSR, code=0x176, value=0xFFFFFFFF81900000),
]  # fmt: skip


@pytest.mark.parametrize(
    ("event", "registers", "user_rsp", "ring_gap"),
    [
        (other(Kind.SYSCALL, **USER), (0xFFFFFFFF81800000, 0x7000, 0x10, 0x18, 0x46), 0x7000, 6),
        (other(Kind.SYSCALL, addr=5, rflags=0x746), (5, None, 0x10, 0x18, 0x46), None, 6),
        (other(Kind.SYSENTER, **USER), (0xFFFFFFFF81900000, 0x9000, 0x10, 0x18, 0x46), 0x7000, None),
        (other(Kind.SYSRET, addr=0x400000, rsp=0x7000), (0x400000, 0x7000, 0x33, 0x2B, None), 0x7000, None),
        (other(Kind.SYSRET, flags=EventFlag.FAULTED, rsp=0x7000), (None, 0x7000, None, None, None), None, 6),
    ],
)
def test_fast_system_calls(
    side: str, event: tuple[Kind, dict[str, int]], registers: tuple[Any, ...], user_rsp: int | None, ring_gap: int | None
) -> None:
    cpu = play(side, [*SYSCALL_MSRS, event]).cpu
    assert (cpu.rip, cpu.rsp, cpu.cs, cpu.ss, cpu.rflags) == registers
    assert (cpu.user_rsp, cpu.ring_gap) == (user_rsp, ring_gap)


@pytest.mark.parametrize(
    ("events", "field", "value"),
    [
        ([other(Kind.SHADOW, arg=0)], "shadow", Shadow.STI),
        ([other(Kind.SHADOW, arg=1), other(Kind.MARK), other(Kind.READ)], "shadow", Shadow.MOV_SS),
        ([other(Kind.SHADOW, arg=1), IF_SET], "shadow", Shadow.NONE),
        ([other(Kind.SHADOW, arg=1), other(Kind.SHADOW)], "shadow", Shadow.NONE),
        ([other(Kind.GS, arg=1, value=1 << 63)], "kernel_gs", True),
        ([other(Kind.GS, arg=1, value=0x7FFF), other(Kind.GS, arg=0)], "kernel_gs", True),
        ([other(Kind.GS, arg=0)], "kernel_gs", None),
        ([other(Kind.GS, arg=1, value=0), other(Kind.GS, arg=1)], "kernel_gs", None),
        ([other(Kind.CR, arg=8, value=0x1F)], "tpr", 0xF0),
        ([other(Kind.MSR, code=0x808, value=0x123)], "tpr", 0x23),
        ([other(Kind.CR, arg=4, value=1 << 32)], "fred", True),
        ([other(Kind.CR, arg=4, value=0x40)], "mce", True),
        ([other(Kind.CR, arg=4, value=0x40), other(Kind.CR, arg=4)], "mce", None),
        ([other(Kind.VMEXIT, arg=1)], "gif", False),
        ([other(Kind.VMEXIT, arg=1), other(Kind.VMENTRY)], "gif", True),
        ([other(Kind.VMENTRY)], "guest", True),
        ([other(Kind.VMENTRY), other(Kind.VMEXIT, rsp=0x9000)], "guest", False),
        ([other(Kind.VMENTRY), other(Kind.VMEXIT, rsp=0x9000)], "rsp", 0x9000),
        ([other(Kind.VMEXIT, source=Source.NMI)], "nmi_since", 0),
        ([other(Kind.VMEXIT)], "nmi_blocked", None),
        ([SMI], "smm", True),
        ([other(Kind.SYSCALL, **USER), other(Kind.VMENTRY)], "ring_gap", None),
        ([other(Kind.SYSCALL, **USER), other(Kind.SYSRET)], "ring_gap", None),
        ([other(Kind.SYSCALL, **USER), nmi({**KERNEL, "rsp": 0x7000})], "ring_gap", None),  # the handler has its own stack
        ([other(Kind.SYSCALL, **USER), nmi()], "ring_gap", None),
    ],
)
def test_one_field(side: str, events: Events, field: str, value: object) -> None:
    assert getattr(play(side, events).cpu, field) == value


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (other(Kind.INIT, arg=0), (False, False, False, 0, True, None, False)),
        (other(Kind.INIT, arg=1), (None, None, False, 0, True, None, False)),
        (other(Kind.GAP), (None, None, None, None, None, None, True)),
    ],
)
def test_what_ends_everything(side: str, event: tuple[Kind, dict[str, int]], expected: tuple[Any, ...]) -> None:
    at_user_rsp = {**KERNEL, "rsp": 0x7000}  # in the ring gap of the SYSCALL; the faulted SYSRET begins another
    before = [
        other(Kind.CR, arg=4, value=0x40), other(Kind.CR, arg=8, value=2), other(Kind.VMEXIT, arg=1),
        other(Kind.GS, arg=1, value=0), other(Kind.TOKEN, arg=2, value=1), other(Kind.SYSCALL, **USER), nmi(at_user_rsp),
        mc(at_user_rsp), other(Kind.SYSRET, rsp=0x7000, flags=int(EventFlag.FAULTED)), SMI, other(Kind.SHADOW, arg=0),
    ]  # fmt: skip
    held = play(side, before)
    assert (held.cpu.ring_gap, held.cpu.smm, held.cpu.shadow, held.cpu.tokens_busy) == (8, True, Shadow.STI, 4)
    assert [f.entry for f in held.frames] == [7]
    end = play(side, [*before, event])
    cpu = end.cpu
    assert (cpu.nmi_blocked, cpu.mcip, cpu.mce, cpu.tpr, cpu.gif, cpu.kernel_gs, cpu.gap) == expected
    assert (cpu.rsp, cpu.csl, cpu.ring_gap, cpu.shadow, cpu.smm, cpu.guest, cpu.tokens_known) == (
        None, None, None, Shadow.NONE, False, False, 0,
    )  # fmt: skip
    assert end.frames == []


@pytest.mark.parametrize(
    ("rsp", "evidence", "cause"), [(0x7000, Evidence.COMPUTED, Cause.RING_GAP), (0x6FF8, Evidence.INFERRED, Cause.NONE)]
)
def test_a_return_into_the_ring_gap_goes_on_with_it(side: str, rsp: int, evidence: Evidence, cause: Cause) -> None:
    gap = {**KERNEL, "rsp": 0x7000}
    there = {**KERNEL, "rsp": rsp}
    played = play(side, [other(Kind.SYSCALL, **USER), nmi(gap), iret(0x10DFD8, there), fault(14, there, code=0)])
    (finding,) = played.findings
    assert (finding.rule, finding.event, finding.evidence, finding.cause) == (Rule.USER_STACK, 3, evidence, cause)
    assert finding.cause_event == (0 if cause is Cause.RING_GAP else None)
