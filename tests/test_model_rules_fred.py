"""The rules of replay.md one by one, answers computed by hand: FRED (R35).

Levels 0-3 have the tops 108000, 10a000, 10c000, 110000; #DB is at level 1, #MC at 2, #DF at 3, all others at 0; a delivery
at the current level leaves 128 bytes free.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from model_bench import (
    DB_TOP,
    DF_TOP,
    KERNEL,
    MC_TOP,
    RSP0,
    USER,
    Events,
    both_sides,
    deliver,
    failed,
    fault,
    fred_layout,
    mc,
    nmi,
    other,
    play,
)
from model_bench import iret as pop

from tracedbg.layout import Fidelity
from tracedbg.state import Cause, EventFlag, Evidence, FrameStatus, Kind, Return, Rule, Source

pytestmark = both_sides

ENTRY = 0xFFFFFFFF81000000
STAR = other(Kind.MSR, code=0xC0000081, value=0x0023001000000000)
USER_GS = other(Kind.GS, arg=1, value=0)
FROM_USER = fault(14, USER, code=6, value=0xDEAD000)  # its frame is [107fc0, 108000)
HANDLER = {"rip": ENTRY + 0x10, "rsp": 0x107F10, "cs": 0x10, "ss": 0x18, "rflags": 2}
IN_DB = {**HANDLER, "rip": ENTRY + 0x110, "rsp": 0x109F48}


def test_a_fault_from_user_mode(side: str) -> None:
    end = play(side, [STAR, USER_GS, FROM_USER], fred_layout())
    assert {at: end.words[at] for at in range(0x107FC0, 0x108000, 8)} == {
        0x107FF8: (0, 0xFF),
        0x107FF0: (0xDEAD000, 0xFF),  # event data: CR2
        0x107FE8: (0x0003000E_0000002B, 0x7F),  # hardware exception 14, SS
        0x107FE0: (0x7000, 0xFF),
        0x107FD8: (0x10246, 0xFF),  # RF
        0x107FD0: (0x33, 0x07),  # from level 0
        0x107FC8: (0x400000, 0xFF),
        0x107FC0: (6, 0xFF),
    }
    cpu = end.cpu
    assert (cpu.rip, cpu.rsp, cpu.cs, cpu.ss, cpu.rflags) == (ENTRY, 0x107FC0, 0x10, 0x18, 2)
    assert (cpu.fred, cpu.csl, cpu.kernel_gs) == (True, 0, True)
    (frame,) = end.frames
    assert (frame.lo, frame.hi, frame.fred, frame.level, frame.from_level) == (0x107FC0, RSP0, True, 0, 0)
    assert (frame.has_code, frame.kernel_gs, frame.ist, frame.gate_type) == (True, False, 0, 0xE)
    assert list(end.findings) == []


def test_without_star_cs_and_ss_are_unknown(side: str) -> None:
    cpu = play(side, [FROM_USER], fred_layout()).cpu
    assert (cpu.cs, cpu.ss, cpu.kernel_gs) == (None, None, None)


@pytest.mark.parametrize(("rsp", "hi"), [(0x107F10, 0x107E80), (0x107F00, 0x107E80), (0x107F3F, 0x107E80), (0x107F40, 0x107EC0)])
def test_a_delivery_at_the_same_level_goes_on_below(side: str, rsp: int, hi: int) -> None:
    """128 bytes are left free, then it is aligned to 64."""
    end = play(side, [STAR, FROM_USER, fault(14, {**HANDLER, "rsp": rsp}, code=0, value=0)], fred_layout())
    assert (end.frames[1].hi, end.frames[1].level, end.frames[1].from_level) == (hi, 0, 0)
    assert (end.cpu.rip, end.cpu.rsp, end.cpu.cs, end.cpu.ss) == (ENTRY + 256, hi - 64, 0x10, 0x18)


def test_levels_go_up_and_the_stack_is_not_reset(side: str) -> None:
    """#DB from level 0 goes to level 1; #DB and #PF in it stay there, #MC goes to level 2."""
    events = [STAR, FROM_USER, fault(1, HANDLER), fault(1, IN_DB), mc({**IN_DB, "rsp": 0x109E00})]
    end = play(side, events, fred_layout())
    assert [(f.hi, f.level, f.from_level, f.dedicated) for f in end.frames] == [
        (RSP0, 0, 0, False), (DB_TOP, 1, 0, True), (0x109EC0, 1, 1, False), (MC_TOP, 2, 1, True),
    ]  # fmt: skip
    assert end.words[0x109EC0 - 48] == (0x10010, 0x07)  # CS 10, from level 1
    assert end.words[0x109EC0 - 24] == (0x00030001_00000018, 0x7F)
    assert end.words[0x109EC0 - 16] == (0, 0)  # DR6 is not known
    assert end.words[MC_TOP - 48] == (0x10010, 0x07)
    assert end.cpu.csl == 2
    assert list(end.findings) == []


@pytest.mark.parametrize(
    ("event", "hi"),
    [
        (fault(1, USER), RSP0),  # level 0 from user mode
        (fault(8, USER, code=0), DF_TOP),
        (mc(USER), RSP0),
    ],
)
def test_levels_from_user_mode(side: str, event: tuple[Kind, dict[str, int]], hi: int) -> None:
    (frame,) = play(side, [event], fred_layout()).frames
    assert (frame.hi, frame.from_level) == (hi, 0)


@pytest.mark.parametrize(("event", "hi"), [(fault(1, USER), DB_TOP), (mc(USER), RSP0), (fault(14, USER, code=0), RSP0)])
def test_an_exception_of_a_failed_delivery_is_nested(side: str, event: tuple[Kind, dict[str, int]], hi: int) -> None:
    (frame,) = play(side, [failed(nmi(USER)), event], fred_layout()).frames
    assert frame.hi == hi


@pytest.mark.parametrize(("vector", "source", "code", "level"), [
    (0x30, Source.FIXED, None, 2), (0x30, Source.EXTINT, None, 2), (0x30, Source.INJECTED, None, 2),
    (1, Source.SYSCALL, 2, 0), (0x80, Source.SOFT_INT, 2, 0), (1, Source.SOFT_INT, 2, 0), (1, Source.SOFT_INT, 1, 1),
])  # fmt: skip
def test_levels_by_source(side: str, vector: int, source: Source, code: int | None, level: int) -> None:
    """CONFIG 10:9 = 2 for interrupts; INT1 has the level of its vector, INT 1 none."""
    event = deliver(vector, source, {**HANDLER, "rflags": 0x202}, **({} if code is None else {"code": code}))
    frames = play(side, [FROM_USER, event], fred_layout(config=ENTRY | 0x480)).frames
    assert frames[1].level == level


@pytest.mark.parametrize(
    ("event", "ss_word", "data", "rip"),
    [
        (nmi(USER), (0x00020002_0004002B, 0x7F), (0, 0), 0x400000),
        (mc(USER), (0x00030012_0000002B, 0x7F), (0, 0xFF), 0x400000),
        (deliver(1, Source.SYSCALL, USER, code=2), (0x00070001_0002002B, 0x7F), (0, 0xFF), 0x400002),
        (deliver(0x80, Source.SOFT_INT, USER, code=2), (0x00040080_0002002B, 0x7F), (0, 0xFF), 0x400002),
        (deliver(3, Source.SOFT_INT, USER, code=2), (0x00040003_0002002B, 0x7F), (0, 0xFF), 0x400002),
        (deliver(3, Source.SOFT_INT, USER, code=1), (0x00060003_0000002B, 0x7F), (0, 0xFF), 0x400001),
        (deliver(4, Source.SOFT_INT, USER, code=1), (0x00060004_0000002B, 0x7F), (0, 0xFF), 0x400001),
        (deliver(1, Source.SOFT_INT, USER, code=1), (0x00050001_0000002B, 0x7F), (0, 0xFF), 0x400001),
        (deliver(0x30, Source.FIXED, USER), (0x00000030_0000002B, 0x7F), (0, 0xFF), 0x400000),
        (fault(14, USER, code=0), (0x0003000E_0000002B, 0x7F), (0, 0), 0x400000),
        (fault(13, USER, code=0), (0x0003000D_0000002B, 0x7F), (0, 0xFF), 0x400000),
    ],
)
def test_what_the_frame_tells_of_the_event(
    side: str, event: tuple[Kind, dict[str, int]], ss_word: tuple[int, int], data: tuple[int, int], rip: int
) -> None:
    words = play(side, [event], fred_layout()).words
    assert (words[RSP0 - 24], words[RSP0 - 16], words[RSP0 - 56]) == (ss_word, data, (rip, 0xFF))


@pytest.mark.parametrize(("arg", "bits"), [(0, 5), (1, 4)])
def test_the_shadow_of_sti_is_in_the_frame(side: str, arg: int, bits: int) -> None:
    words = play(side, [other(Kind.SHADOW, arg=arg), nmi(USER)], fred_layout()).words
    assert words[RSP0 - 24] == (0x00020002_0000002B | bits << 16, 0x7F)


@pytest.mark.parametrize(
    ("event", "changes"),
    [
        ((Kind.DELIVER, {"arg": 14, "code": 0, **USER}), {}),  # source unknown
        (fault(14, {**USER, "cs": 0x31}, code=0), {}),  # CPL1
        (fault(14, USER, code=0), {"config": None}),
        (fault(14, USER, code=0), {"rsp": (None, DB_TOP, MC_TOP, DF_TOP)}),
        (fault(14, USER, code=0), {"rsp": (0x8600111111111111, DB_TOP, MC_TOP, DF_TOP)}),
        (fault(14, USER, code=0), {"rsp": (0x3F, DB_TOP, MC_TOP, DF_TOP)}),
        (fault(8, USER, code=0), {"stklvls": None}),
        (deliver(3, Source.SOFT_INT, USER), {}),  # INT3 or INT 3
    ],
)
def test_a_delivery_that_cannot_be_placed(side: str, event: tuple[Kind, dict[str, int]], changes: dict[str, Any]) -> None:
    end = play(side, [event], fred_layout(**changes))
    assert (end.frames, end.cpu.rip, end.cpu.rsp, end.cpu.rflags) == ([], None, None, None)


@pytest.mark.parametrize(
    ("on", "config", "events", "csl"),
    [
        (True, ENTRY | 0x82, [], 2),  # at the start
        (False, ENTRY | 0x81, [], 1),  # also when FRED is off
        (True, None, [], None),
        (True, ENTRY, [other(Kind.MSR, code=0x1D4, value=ENTRY | 0x87)], 3),
        (True, ENTRY | 1, [other(Kind.MSR, code=0x1D4)], None),
        (True, ENTRY | 1, [other(Kind.GAP)], None),
    ],
)
def test_the_level_of_config(side: str, on: bool, config: int | None, events: Events, csl: int | None) -> None:
    guest = fred_layout(on=on, config=config)
    assert play(side, [*events, other(Kind.MARK)], guest).cpu.csl == csl
    if on:
        assert len(play(side, [*events, fault(14, KERNEL, code=0)], guest).frames) == (csl is not None)


def test_an_event_from_user_mode_needs_no_levels(side: str) -> None:
    assert len(play(side, [FROM_USER], fred_layout(stklvls=None)).frames) == 1


def test_a_level_with_the_stack_of_another(side: str) -> None:
    """Levels 1 and 2 share a top: #MC stores over #DB's live frame. CS and SS hold bytes that are not known."""
    events = [STAR, FROM_USER, fault(1, HANDLER), mc(IN_DB)]
    end = play(side, events, fred_layout(rsp=(RSP0, DB_TOP, DB_TOP, DF_TOP)))
    (finding,) = end.findings
    assert (finding.rule, finding.evidence, finding.cause) == (Rule.FRAME_CLOBBERED, Evidence.COMPUTED, Cause.MC_UNMASKED)
    assert (finding.lo, finding.hi, finding.slots, finding.differ) == (0x109FC0, DB_TOP, 0b111111, 0b011011)
    assert [f.status for f in end.frames] == [FrameStatus.LIVE, FrameStatus.CLOBBERED, FrameStatus.LIVE]
    assert end.frames[2].victim == 2


# -- ERET ---------------------------------------------------------------------------------------------------------------

NESTED_NMI = nmi(HANDLER)  # its frame is [107e40, 107e80)


def erets(at: int, to: dict[str, int], **more: int) -> tuple[Kind, dict[str, int]]:
    return pop(at, to, arg=Return.ERETS, **more)


def eretu(at: int, to: dict[str, int], **more: int) -> tuple[Kind, dict[str, int]]:
    return pop(at, to, arg=Return.ERETU, **more)


@pytest.mark.parametrize(
    ("event", "blocked", "by"),
    [
        (erets(0x107E40, HANDLER, code=4), False, (2, 1)),
        (erets(0x107E40, HANDLER), False, (2, 1)),  # it is the NMI's own frame
        (erets(0x107E40, HANDLER, code=3), True, (None, None)),
        (erets(0x107E48, HANDLER), None, (None, None)),  # where is that from?
        (erets(0x107E48, HANDLER, code=4), False, (2, None)),
        (erets(0x107E48, HANDLER, code=0), True, (None, None)),
        (erets(0x107E40, HANDLER, code=4, flags=EventFlag.FAULTED), True, (None, None)),
        (pop(0x107E48, HANDLER), False, (2, 1)),  # IRET
    ],
)
def test_what_unblocks_nmis(
    side: str, event: tuple[Kind, dict[str, int]], blocked: bool | None, by: tuple[int | None, int | None]
) -> None:
    user = {**HANDLER, "rip": 1, "rsp": 0x107F00} if event[1]["rsp"] == 0x107E48 and event[1].get("arg") else HANDLER
    moved = (event[0], {**event[1], "addr": user["rip"], "value": user["rsp"]})  # elsewhere: no copy of the frame either
    cpu = play(side, [FROM_USER, NESTED_NMI, moved], fred_layout()).cpu
    assert cpu.nmi_blocked is blocked
    assert (cpu.nmi_unblocked_by, cpu.nmi_unblock_frame) == by


def test_an_nmi_left_blocked_by_its_own_return(side: str) -> None:
    end = play(side, [FROM_USER, NESTED_NMI, erets(0x107E40, HANDLER, code=0), fault(14, USER, code=0)], fred_layout())
    (finding,) = end.findings  # once
    assert (finding.rule, finding.evidence, finding.event, finding.cause_event) == (Rule.NMI_STUCK, Evidence.RECORDED, 2, 1)
    assert (finding.lo, finding.hi, finding.victim.entry) == (0x107E40, 0x107E80, 1)
    guest = dataclasses.replace(fred_layout(), fidelity=Fidelity.NONE)  # that return was recorded
    assert len(play(side, [FROM_USER, NESTED_NMI, erets(0x107E40, HANDLER, code=0)], guest).of(Rule.NMI_STUCK)) == 1


LEVEL_BYTE = other(Kind.WRITE, addr=0x109F12, value=0xFE, arg=1)


@pytest.mark.parametrize(
    ("events", "csl"),
    [
        ([fault(1, HANDLER)], 1),
        ([fault(1, HANDLER), erets(0x109FC0, HANDLER)], 0),
        ([fault(1, HANDLER), fault(1, IN_DB), erets(0x109E80, IN_DB)], 1),
        ([fault(1, HANDLER), erets(0x109F00, {**HANDLER, "rsp": 0x107F00})], None),  # no frame, and that byte is not known
        ([LEVEL_BYTE, erets(0x109F00, {**HANDLER, "rsp": 0x107F00})], 2),
        ([LEVEL_BYTE, fault(1, HANDLER), erets(0x109FC0, {**HANDLER, "rsp": 0x107F00})], 0),  # the frame's own
        ([fault(1, HANDLER), eretu(0x107FC0, USER)], 0),
        ([fault(1, HANDLER), pop(0x109FC8, HANDLER)], 1),  # IRET leaves it
    ],
)
def test_the_level_after_a_return(side: str, events: Events, csl: int | None) -> None:
    assert play(side, [FROM_USER, *events], fred_layout()).cpu.csl == csl


def test_eretu(side: str) -> None:
    end = play(side, [STAR, USER_GS, FROM_USER, eretu(0x107FC0, USER)], fred_layout())
    cpu = end.cpu
    assert (cpu.rip, cpu.rsp, cpu.cs, cpu.user_rsp, cpu.kernel_gs, cpu.csl) == (0x400000, 0x7000, 0x33, 0x7000, False, 0)
    assert end.frames == []


def test_syscall_is_a_delivery(side: str) -> None:
    """No ring gap, and an event that says SYSCALL tells only that user mode ran."""
    cpu = play(side, [STAR, other(Kind.SYSCALL, addr=5, **USER)], fred_layout()).cpu
    assert (cpu.rip, cpu.rsp, cpu.cs, cpu.user_rsp, cpu.ring_gap) == (None, None, None, 0x7000, None)


@pytest.mark.parametrize(("source", "expected"), [(Source.SYSCALL, []), (Source.SOFT_INT, [Rule.FAKE_NMI])])
def test_sysenter_is_no_fake_nmi(side: str, source: Source, expected: list[Rule]) -> None:
    assert [f.rule for f in play(side, [deliver(2, source, USER, code=2)], fred_layout()).findings] == expected


def test_no_windows(side: str) -> None:
    """A frame of an IST gate, FRED switched on: the next NMI will not use its stack."""
    on = other(Kind.CR, arg=4, value=1 << 32)
    assert list(play(side, [nmi(), on, other(Kind.UNBLOCK)]).findings) == []
    assert [f.rule for f in play(side, [nmi(), other(Kind.UNBLOCK)]).findings] == [Rule.REENTRY_WINDOW]


def test_an_unmatched_eret_is_looked_for_eight_bytes_higher(side: str) -> None:
    at_lo = erets(0x107E40, HANDLER, code=4)
    end = play(side, [FROM_USER, NESTED_NMI, at_lo, at_lo], fred_layout())
    (finding,) = end.findings
    assert (finding.rule, finding.lo, finding.hi, finding.writer.entry) == (Rule.UNMATCHED_RETURN, 0x107E48, 0x107E70, 1)
