"""Known answers of the replay core, computed by hand from the manual's rules."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from tracedbg.filter import Filter, of_cpu
from tracedbg.layout import CpuTables, Fidelity, Gate, Idt, Layout, Region, Tss
from tracedbg.replay import Replay
from tracedbg.state import Cause, Evidence, Finding, FrameStatus, Kind, Mismatch, Rule, Settle, Source
from tracedbg.trace import MemoryRange
from tracedbg.writer import TraceWriter, build

# The bare-metal guest of the recorded runs: tops of its IST stacks, gates 1 -> IST4, 2 -> IST2, 8 -> IST1, 18 -> IST3.
IST = (None, 0x110000, 0x10E000, 0x10C000, 0x10A000, None, None, None)
GATES = {
    0: Gate(0x100170), 1: Gate(0x100180, 8, 4), 2: Gate(0x100190, 8, 2), 3: Gate(0x1001A0, 8, 0, dpl=3),
    8: Gate(0x1001F0, 8, 1), 13: Gate(0x100240), 14: Gate(0x100250), 18: Gate(0x100290, 8, 3), 32: Gate(0x100370, 8, 0, 0xF),
}  # fmt: skip
WORK = 0x126FD0  # the handlers' work stack
OUTER = {"rip": 0x100BAB, "rsp": 0x11CFA8, "cs": 8, "ss": 0x10, "rflags": 0x97}
USER = {"rip": 0x401000, "rsp": 0x7FF0, "cs": 0x33, "ss": 0x2B, "rflags": 0x246}
NESTED = {"rip": 0x100BAB, "rsp": WORK, "cs": 8, "ss": 0, "rflags": 0x97}


def layout(returns: bool = False, user: bool = False, cpus: int = 1) -> Layout:
    tss = tuple(Tss(0x105100 + 0x68 * n, (0x108000, None, None), IST) for n in range(cpus))
    regions = (Region(0x111000, 0x113000, 1),) if user else ()
    return Layout(
        tss, (Idt(0x106000, GATES),), tuple(CpuTables(n, 0) for n in range(cpus)), regions,
        Fidelity.RETURNS if returns else Fidelity.NONE,
    ).with_stacks()  # fmt: skip


def replayed(fill: Callable[[TraceWriter], None], *, cpus: int = 1, position: int | None = None, **options: int) -> Replay:
    replay = Replay(build(fill, cpus=cpus), **options)
    replay.scan_all()
    replay.seek(replay.count if position is None else position)
    return replay


def nmi(w: TraceWriter, **at: int) -> None:
    w.event(Kind.DELIVER, cpu=0, arg=2, source=Source.NMI, **at)


def check_nmi_window(
    finding: Finding, *, event: int, by: int, by_frame: int | None, victim: int, lo: int = 0x10DFD8, count: int = 1
) -> None:
    """NMIs are unblocked while the frame of `victim` lies at the top of the NMI's IST stack: a window, hit or not (R12)."""
    assert (finding.rule, finding.evidence, finding.cause) == (Rule.REENTRY_WINDOW, Evidence.COMPUTED, Cause.NMI_UNBLOCKED)
    assert (finding.event, finding.cause_event, finding.cause_frame, finding.count) == (event, by, by_frame, count)
    assert finding.victim is not None and (finding.victim.entry, finding.lo, finding.hi) == (victim, lo, lo + 40)
    assert (finding.writer, finding.settled, finding.consumer) == (None, None, None)


def words(replay: Replay, lo: int, hi: int) -> dict[int, int]:
    return {word.addr: word.value for word in replay.words(lo, hi)}


def test_an_nmi_stores_five_words_from_its_ist_top_down() -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout()
        nmi(w, **OUTER)

    with replayed(fill) as replay:
        assert words(replay, 0x10C000, 0x10E000) == {
            0x10DFF8: 0x10, 0x10DFF0: 0x11CFA8, 0x10DFE8: 0x97, 0x10DFE0: 8, 0x10DFD8: 0x100BAB,
        }  # fmt: skip
        (frame,) = replay.frames()
        assert (frame.lo, frame.hi, frame.ist, frame.stack_lo, frame.stack_hi) == (0x10DFD8, 0x10E000, 2, 0x10C000, 0x10E000)
        cpu = replay.cpu(0)
        assert (cpu.rip, cpu.rsp, cpu.cs, cpu.ss, cpu.rflags) == (0x100190, 0x10DFD8, 8, 0x10, 0x97)
        assert cpu.nmi_blocked and cpu.nmi_since == 0


@pytest.mark.parametrize("offset", range(16))
def test_the_frame_is_aligned_and_the_pushed_rsp_is_not(offset: int) -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout()
        at = {"rip": 0x1000, "rsp": 0x127000 - offset, "cs": 8, "ss": 0x10, "rflags": 2}
        w.event(Kind.DELIVER, cpu=0, arg=13, source=Source.EXCEPTION, code=0x18, **at)

    with replayed(fill) as replay:
        top = 0x127000 if offset == 0 else 0x126FF0  # RSP & ~15
        (frame,) = replay.frames()
        assert (frame.lo, frame.hi) == (top - 48, top)
        assert words(replay, top - 48, top) == {
            top - 8: 0x10, top - 16: 0x127000 - offset, top - 24: 0x10002, top - 32: 8, top - 40: 0x1000, top - 48: 0x18,
        }  # fmt: skip


def test_int_n_saves_the_next_instruction_and_no_error_code() -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout()
        w.event(Kind.DELIVER, cpu=0, arg=13, source=Source.SOFT_INT, code=2, rip=0x1000, rsp=0x127000, cs=8, ss=0x10, rflags=2)

    with replayed(fill) as replay:
        assert words(replay, 0x126000, 0x127000) == {
            0x126FF8: 0x10, 0x126FF0: 0x127000, 0x126FE8: 2, 0x126FE0: 8, 0x126FD8: 0x1002,
        }  # fmt: skip


def test_from_cpl3_the_stack_is_rsp0_and_ss_becomes_null() -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout()
        w.event(Kind.DELIVER, cpu=0, arg=14, source=Source.EXCEPTION, **USER, code=7)

    with replayed(fill) as replay:
        (frame,) = replay.frames()
        assert (frame.lo, frame.hi) == (0x108000 - 48, 0x108000)
        assert frame.saved.rflags == 0x10246  # RF is set in the image of a fault
        cpu = replay.cpu(0)
        assert (cpu.ss, cpu.rflags, cpu.user_rsp) == (0, 0x46, 0x7FF0)


def test_a_trap_gate_keeps_if_and_clears_tf_nt() -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout()
        w.event(Kind.DELIVER, cpu=0, arg=32, source=Source.EXTERNAL, rip=1, rsp=0x127000, cs=8, ss=0x10, rflags=0x4302)

    with replayed(fill) as replay:
        assert replay.cpu(0).rflags == 0x202


def test_nested_nmi_after_a_breakpoint_is_an_inferred_warning_without_returns() -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout()
        nmi(w, **OUTER)
        w.event(Kind.DELIVER, cpu=0, arg=3, source=Source.SOFT_INT, code=1, rip=0x100C36, rsp=WORK, cs=8, ss=0, rflags=0x46)
        nmi(w, **NESTED)

    with replayed(fill) as replay:
        (finding,) = replay.findings()
        assert (finding.rule, finding.evidence, finding.event) == (Rule.FRAME_CLOBBERED, Evidence.INFERRED, 2)
        assert (finding.lo, finding.hi, finding.slots) == (0x10DFD8, 0x10E000, 0b11111)
        assert finding.differ == 0b11000  # rsp and ss: rip, cs and rflags are the same bytes
        assert (finding.cause, finding.cause_event, finding.cause_frame) == (Cause.NMI_UNBLOCKED, 2, 1)
        assert finding.victim is not None and finding.victim.saved.rsp == 0x11CFA8
        outer, nested = replay.frames()
        assert (outer.status, outer.clobbered_by, nested.victim) == (FrameStatus.CLOBBERED, 2, 0)


def test_the_same_with_returns_is_computed_and_a_repair_settles_it() -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout(returns=True)
        nmi(w, **OUTER)
        w.event(Kind.DELIVER, cpu=0, arg=3, source=Source.SOFT_INT, code=1, rip=0x100C36, rsp=WORK, cs=8, ss=0, rflags=0x46)
        w.event(Kind.RETURN, cpu=0, rsp=0x126FA8, addr=0x100C37, value=WORK, cs=8, ss=0, rflags=0x46)
        nmi(w, **NESTED)
        w.event(Kind.RETURN, cpu=0, rsp=0x10DFD8, addr=0x100BAB, value=WORK, cs=8, ss=0, rflags=0x97)
        for addr, value in ((0x10DFF0, 0x11CFA8), (0x10DFF8, 0x10)):
            w.event(Kind.WRITE, cpu=0, addr=addr, value=value, arg=8)
        w.event(Kind.RETURN, cpu=0, rsp=0x10DFD8, addr=0x100BAB, value=0x11CFA8, cs=8, ss=0x10, rflags=0x97)

    with replayed(fill) as replay:
        window, finding = replay.findings()
        check_nmi_window(window, event=2, by=2, by_frame=1, victim=0)
        assert (finding.raised_rule, finding.evidence) == (Rule.FRAME_CLOBBERED, Evidence.COMPUTED)
        assert (finding.rule, finding.settled, finding.settled_evidence) == (Rule.FRAME_RELOCATED, 7, Evidence.RECORDED)
        assert finding.rule_at(7) == Rule.FRAME_CLOBBERED and finding.rule_at(8) == Rule.FRAME_RELOCATED
        assert finding.cause_event == 2 and finding.cause_frame == 1
        assert replay.frames() == ()
        replay.seek(5)
        assert words(replay, 0x10DFD8, 0x10E000)[0x10DFF0] == WORK
        replay.seek(8)
        assert words(replay, 0x10DFD8, 0x10E000)[0x10DFF0] == 0x11CFA8
        by = {word.addr: word.writers[0] for word in replay.words(0x10DFD8, 0x10E000)}
        assert by == {0x10DFD8: 3, 0x10DFE0: 3, 0x10DFE8: 3, 0x10DFF0: 5, 0x10DFF8: 6}


def test_consumption_of_foreign_bytes_and_the_loop_that_follows() -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout(returns=True)
        nmi(w, **OUTER)
        w.event(Kind.DELIVER, cpu=0, arg=3, source=Source.SOFT_INT, code=1, rip=0x100C36, rsp=WORK, cs=8, ss=0, rflags=0x46)
        w.event(Kind.RETURN, cpu=0, rsp=0x126FA8, addr=0x100C37, value=WORK, cs=8, ss=0, rflags=0x46)
        nmi(w, **NESTED)
        for _ in range(5):
            w.event(Kind.RETURN, cpu=0, rsp=0x10DFD8, addr=0x100BAB, value=WORK, cs=8, ss=0, rflags=0x97)

    with replayed(fill) as replay:
        window, corrupt, loop = replay.findings()
        check_nmi_window(window, event=2, by=2, by_frame=1, victim=0)
        assert (corrupt.rule, corrupt.event, corrupt.settled, corrupt.consumer) == (Rule.FRAME_CONSUMED_CORRUPT, 3, 5, 5)
        assert corrupt.popped is not None and corrupt.popped.rsp == WORK
        assert (loop.rule, loop.event, loop.count, loop.consumer) == (Rule.RESUME_LOOP, 5, 4, 5)
        assert loop.evidence == Evidence.RECORDED


def test_a_latched_nmi_after_the_return_reuses_the_slots_and_is_clean() -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout()
        nmi(w, **OUTER)
        nmi(w, **OUTER)

    with replayed(fill) as replay:
        assert replay.findings() == ()
        assert replay.stats().settled[Settle.CONTEXT] == 1


def test_two_cpus_whose_tss_name_one_stack() -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout(returns=True, cpus=2)
        w.event(Kind.DELIVER, cpu=1, arg=2, source=Source.NMI, **OUTER)
        w.event(Kind.DELIVER, cpu=0, arg=2, source=Source.NMI, **{**OUTER, "rsp": 0x11F000})

    with replayed(fill, cpus=2) as replay:
        (finding,) = replay.findings()
        assert (finding.rule, finding.cause, finding.cpu) == (Rule.FRAME_CLOBBERED, Cause.OTHER_CPU, 0)
        assert finding.victim is not None and finding.victim.cpu == 1 and finding.differ == 0b01000


def test_a_cycle_over_two_stacks_is_computed_by_the_chain() -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout()
        w.event(Kind.DELIVER, cpu=0, arg=1, source=Source.EXCEPTION, rip=0x1000, rsp=0x11C000, cs=8, ss=0x10, rflags=2)
        nmi(w, rip=0x2000, rsp=0x109F00, cs=8, ss=0x10, rflags=2)
        w.event(Kind.DELIVER, cpu=0, arg=1, source=Source.EXCEPTION, rip=0x3000, rsp=0x10DF00, cs=8, ss=0x10, rflags=2)

    with replayed(fill) as replay:
        (finding,) = replay.findings()
        assert (finding.rule, finding.evidence, finding.cause) == (Rule.FRAME_CLOBBERED, Evidence.COMPUTED, Cause.SOFTWARE)
        assert finding.victim is not None and finding.victim.entry == 0 and finding.event == 2


def test_a_clobbered_frame_whose_context_runs_again_had_been_moved() -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout()
        nmi(w, **OUTER)
        nmi(w, rip=0x2000, rsp=0x10DF00, cs=8, ss=0x10, rflags=2)
        w.event(Kind.DELIVER, cpu=0, arg=14, source=Source.EXCEPTION, code=0, **OUTER)

    with replayed(fill) as replay:
        (finding,) = replay.findings()
        assert (finding.raised_rule, finding.evidence, finding.cause) == (
            Rule.FRAME_CLOBBERED, Evidence.COMPUTED, Cause.NMI_UNKNOWN,
        )  # fmt: skip
        assert (finding.rule, finding.settled, finding.settled_by, finding.settled_evidence) == (
            Rule.FRAME_RELOCATED, 2, Settle.CONTEXT, Evidence.INFERRED,
        )  # fmt: skip


def test_after_user_mode_nothing_on_the_cpus_stacks_is_live() -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout()
        nmi(w, **OUTER)
        w.event(Kind.DELIVER, cpu=0, arg=14, source=Source.EXCEPTION, **USER, code=4)
        nmi(w, rip=0x5000, rsp=0x107E00, cs=8, ss=0, rflags=0x46)

    with replayed(fill) as replay:
        assert replay.findings() == ()
        assert replay.stats().settled[Settle.CPL3] == 1


def test_interrupts_on_show_that_the_handler_is_over() -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout()
        nmi(w, **OUTER)
        w.event(Kind.DELIVER, cpu=0, arg=32, source=Source.EXTERNAL, rip=0x9000, rsp=0x11C000, cs=8, ss=0x10, rflags=0x202)
        nmi(w, rip=0x5000, rsp=0x11BE00, cs=8, ss=0x10, rflags=0x46)

    with replayed(fill) as replay:
        assert replay.findings() == ()
        assert replay.stats().settled[Settle.IF] == 1
        assert replay.cpu(0).nmi_since == 2


def test_the_syscall_gap_without_ist_is_on_the_users_stack() -> None:
    gates = {**GATES, 2: Gate(0x100190, 8, 0)}

    def fill(w: TraceWriter) -> None:
        w.layout = replace(layout(user=True), idts=(Idt(0x106000, gates),))
        nmi(w, rip=0x100486, rsp=0x112000, cs=8, ss=0x10, rflags=6)

    with replayed(fill) as replay:
        (finding,) = replay.findings()
        assert (finding.rule, finding.evidence) == (Rule.USER_STACK, Evidence.COMPUTED)
        assert (finding.lo, finding.hi) == (0x111FD8, 0x112000)


def test_the_syscall_gap_with_ist_is_clean() -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout(user=True)
        nmi(w, rip=0x100486, rsp=0x112000, cs=8, ss=0x10, rflags=6)

    with replayed(fill) as replay:
        assert replay.findings() == ()


@pytest.mark.parametrize("source", [Source.SOFT_INT, Source.FIXED, Source.EXTINT, Source.EXTERNAL, Source.EXCEPTION])
def test_vectors_2_and_18_from_elsewhere_are_fakes_and_counted(source: Source) -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout()
        for _ in range(3):
            w.event(Kind.DELIVER, cpu=0, arg=2, source=source, code=2, rip=0x1000, rsp=0x11C000, cs=8, ss=0x10, rflags=0x202)
        w.event(Kind.DELIVER, cpu=0, arg=18, source=source, code=2, rip=0x1000, rsp=0x11C000, cs=8, ss=0x10, rflags=0x202)

    with replayed(fill) as replay:
        found = {finding.rule: finding.count for finding in replay.findings()}
        # A local APIC accepts no vector below 16 (R25), so that 2 cannot have come from there; 18 can.
        illegal = {Rule.ILLEGAL_VECTOR: 3} if source is Source.FIXED else {}
        assert found == {Rule.FAKE_NMI: 3, Rule.FAKE_MCE: 1, **illegal}
        assert replay.cpu(0).nmi_blocked is None and replay.cpu(0).mcip is None


def test_a_fake_nmi_does_not_block_so_the_genuine_one_hits_it() -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout(returns=True)
        w.event(Kind.DELIVER, cpu=0, arg=2, source=Source.EXTINT, rip=0x10065A, rsp=0x11CFA8, cs=8, ss=0x10, rflags=0x202)
        nmi(w, **NESTED)

    with replayed(fill) as replay:
        fake, clobbered = replay.findings()
        assert (fake.rule, clobbered.rule, clobbered.cause) == (Rule.FAKE_NMI, Rule.FRAME_CLOBBERED, Cause.NMI_NEVER_BLOCKED)


def test_failed_deliveries_and_the_double_fault_after_them() -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout()
        bad = {"cpu": 0, "rip": 0x101F23, "rsp": 0x123456789000, "cs": 8, "ss": 0x10, "rflags": 2}
        w.event(Kind.DELIVER, arg=3, source=Source.SOFT_INT, code=1, flags=1, **bad)
        w.event(Kind.DELIVER, arg=14, source=Source.EXCEPTION, code=2, flags=1, **bad)
        w.event(Kind.DELIVER, arg=8, source=Source.EXCEPTION, code=0, **bad)

    with replayed(fill) as replay:
        (finding,) = replay.findings()
        assert (finding.rule, finding.event, finding.cause_event, finding.cause_frame) == (Rule.DOUBLE_FAULT, 2, 1, 0)
        (frame,) = replay.frames()
        assert (frame.lo, frame.hi, frame.saved.code) == (0x10FFD0, 0x110000, 0)
        assert replay.stats().failed == 2


def test_an_aborted_delivery_stores_only_what_it_stored() -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout()
        w.event(Kind.DELIVER, cpu=0, arg=2, source=Source.NMI, flags=1, addr=2, **OUTER)

    with replayed(fill) as replay:
        assert words(replay, 0x10C000, 0x10E000) == {0x10DFF8: 0x10, 0x10DFF0: 0x11CFA8}
        assert replay.frames() == ()


def test_ist_values_are_read_anew_at_each_delivery() -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout(returns=True)
        nmi(w, **OUTER)
        w.event(Kind.TSS, cpu=0, arg=10, value=0x10DC00)
        w.event(Kind.UNBLOCK, cpu=0)
        nmi(w, rip=0x2000, rsp=0x10DF00, cs=8, ss=0x10, rflags=2)

    with replayed(fill) as replay:
        assert replay.findings() == ()
        assert [frame.lo for frame in replay.frames()] == [0x10DFD8, 0x10DBD8]


def test_enter_checks_the_prediction() -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout()
        nmi(w, **OUTER)
        w.event(Kind.ENTER, cpu=0, rip=0x100190, rsp=0x10DFD8, cs=8)
        nmi(w, **OUTER)
        w.event(Kind.ENTER, cpu=0, rip=0x100190, rsp=0x10DFD0, cs=0x10)

    with replayed(fill) as replay:
        (finding,) = replay.findings()
        assert (finding.rule, finding.event) == (Rule.MODEL_MISMATCH, 3)
        assert finding.detail == Mismatch.ENTER_RSP | Mismatch.ENTER_CS


def test_a_gap_makes_everything_unknown() -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout()
        nmi(w, **OUTER)
        w.event(Kind.GAP, cpu=0, value=7)
        nmi(w, rip=0x2000, rsp=0x10DF00, cs=8, ss=0x10, rflags=2)

    with replayed(fill) as replay:
        (gap,) = replay.findings()
        assert gap.rule == Rule.TRACE_GAP and replay.stats().gaps == 1
        replay.seek(2)
        assert replay.frames() == () and replay.words(0, 1 << 63) == () and replay.cpu(0).rsp is None and replay.cpu(0).gap


def test_initial_memory_has_no_writer() -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout()
        w.memory.append(MemoryRange(0x10DFF4, b"\x01\x02\x03\x04\x05"))
        w.event(Kind.MARK, cpu=0)

    with replayed(fill) as replay:
        low, high = replay.words(0x10D000, 0x10E000)
        assert (low.addr, low.value, low.known, set(low.writers)) == (0x10DFF0, 0x0403020100000000, 0xF0, {None})
        assert (high.addr, high.value, high.known) == (0x10DFF8, 5, 1)


def test_writers_are_kept_byte_by_byte() -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout()
        w.event(Kind.WRITE, cpu=0, addr=0x1000, value=0x1111111111111111, arg=8)
        w.event(Kind.WRITE, cpu=0, addr=0x1003, value=0x2222, arg=2)
        w.event(Kind.WRITE, cpu=0, addr=0x1006, value=0x33333333, arg=4)
        w.event(Kind.WRITE, cpu=0, addr=0x1000, arg=1)

    with replayed(fill) as replay:
        first, second = replay.words(0x1000, 0x1010)
        assert first.value == 0x3333112222111100 and first.known == 0b11111110
        assert first.writers == (3, 0, 0, 1, 1, 0, 2, 2)
        assert (second.value, second.known, second.writers[:3]) == (0x3333, 3, (2, 2, None))


def test_impossible_events_are_counted_and_skipped() -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout()
        w.event(Kind.DELIVER, cpu=70, arg=2, source=Source.NMI, **OUTER)
        w.event(Kind.DELIVER, arg=2, source=Source.NMI, **OUTER)  # CPU unknown
        w.event(Kind.WRITE, cpu=0, addr=0x1000, value=1, arg=9)
        w.event(Kind.WRITE, cpu=0, addr=0x1000, value=1 << 40, code=64, flags=32)
        w.event(Kind.TSS, cpu=0, arg=5, value=1)
        w.event(Kind.WRITE, cpu=0, addr=(1 << 64) - 4, value=(1 << 64) - 1, arg=8)
        w.event(Kind.RETURN, cpu=0, rsp=(1 << 64) - 8, addr=1, value=2, cs=8, ss=0, rflags=2)
        w.event(Kind.DELIVER, cpu=0, arg=13, source=Source.EXCEPTION, rip=1, rsp=8, cs=8, ss=0, rflags=2, code=0)

    with replayed(fill, cpus=2) as replay:
        stats = replay.stats()
        assert (stats.bad_events, stats.writes, stats.unjudged) == (5, 1, 1)
        assert stats.first_bad == 0


def test_memory_is_bounded_by_the_setting() -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout()
        for page in range(5000):
            w.event(Kind.WRITE, cpu=0, addr=page << 12, value=page, arg=8)

    with replayed(fill, max_pages=64) as replay:
        stats = replay.stats()
        assert stats.pages <= 64 and stats.pages_forgotten == 5000 - stats.pages
        end = replay.digest()
        replay.seek(2500)
        replay.seek(5000)
        assert replay.digest() == end


def test_open_frames_are_bounded() -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout()
        for n in range(2000):
            at = {"rip": n, "rsp": 0x1000000 + (n % 700) * 0x4000, "cs": 8, "ss": 0, "rflags": 2}
            w.event(Kind.DELIVER, cpu=0, arg=0, source=Source.EXCEPTION, **at)

    with replayed(fill, max_frames=100) as replay:
        assert replay.stats().frames <= 100


@pytest.mark.parametrize("interval", [1, 3, 64, 10_000])
def test_seeking_equals_running_forward(interval: int) -> None:
    pick = random.Random(interval)

    def fill(w: TraceWriter) -> None:
        w.layout = layout(returns=True)
        for n in range(300):
            if pick.random() < 0.5:
                nmi(w, rip=0x1000 + n, rsp=pick.choice((0x10DF00, 0x11C000, WORK)), cs=8, ss=0x10, rflags=2)
            else:
                w.event(Kind.RETURN, cpu=0, rsp=0x10DFD8, addr=0x1000 + n // 2, value=0x11C000, cs=8, ss=0x10, rflags=2)

    trace = build(fill)
    fresh = []
    with Replay(trace) as forward:
        forward.scan_all()
        for position in range(trace.count + 1):
            forward.seek(position)
            fresh.append(forward.digest())
    with Replay(trace, snapshot_interval=interval, max_snapshots=8) as replay:
        for _ in range(200):
            position = pick.randrange(trace.count + 1)
            replay.seek(position)
            if replay.scanned == trace.count:
                assert replay.digest() == fresh[position]
        replay.scan_all()
        for position in reversed(range(trace.count + 1)):
            replay.seek(position)
            assert replay.digest() == fresh[position]


def test_find_looks_both_ways() -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout(cpus=2)
        for n in range(10):
            w.event(Kind.DELIVER, cpu=n % 2, arg=2 if n % 3 else 14, source=Source.NMI, rip=n)
        w.event(Kind.MARK, cpu=0)

    with replayed(fill, cpus=2) as replay:
        marks = (Filter(kinds=frozenset({Kind.MARK})),)
        faults = (Filter(kinds=frozenset({Kind.DELIVER}), args=frozenset({14})),)
        assert replay.find_match(marks, 0) == 10
        assert replay.find_match(faults, 4) == 6
        assert replay.find_match(faults, 4, -1) == 3
        assert replay.find_match(of_cpu(0), 5) == 6
        assert replay.find_match(marks, 0, -1) is None and replay.find_match((), 99) is None


def test_snapshots_and_pages_stay_within_the_bytes_allowed() -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout()
        for n in range(60_000):
            w.event(Kind.WRITE, cpu=0, addr=(n * 7 % 4000) << 12 | n % 4096, value=n, arg=1)

    limit = 64 << 20
    with replayed(fill, snapshot_interval=64, max_pages=1000, max_bytes=limit) as replay:
        stats = replay.stats()
        # One interval's worth of copied pages may come on top before the next snapshot thins them out.
        assert stats.bytes < limit + 2 * 1000 * 24_000 and stats.interval > 64
        end = replay.digest()
        replay.seek(12_345)
        replay.seek(60_000)
        assert replay.digest() == end


def test_equal_bytes_at_one_place_are_one_note_with_a_count() -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout(returns=True)
        for _ in range(41):
            w.event(Kind.UNBLOCK, cpu=0)
            nmi(w, rip=0x100C00, rsp=0x10DF00, cs=8, ss=0x10, rflags=2)

    with replayed(fill) as replay:
        window, *findings = replay.findings()
        # Each event 2, 4, ... 80 unblocks NMIs over one frame more.
        check_nmi_window(window, event=2, by=2, by_frame=None, victim=1, count=40)
        assert {finding.rule for finding in findings} == {Rule.FRAME_SAME_BYTES}
        # The first frame is stored over 40 times, the second 39 times, ...: one finding each.
        assert [finding.count for finding in findings] == list(range(40, 0, -1))


def test_an_nmi_that_could_come_shows_that_the_last_one_returned() -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout()
        for n in range(6):  # ever deeper in code with IF=0, nothing else recorded
            nmi(w, rip=0x9000 + n, rsp=0x11CFA8 - 64 * n, cs=8, ss=0x10, rflags=0x46)

    with replayed(fill) as replay:
        assert replay.findings() == ()
        assert replay.stats().settled[Settle.NMI] == 5


def test_a_stale_frame_on_a_reused_thread_stack_is_no_victim() -> None:
    def fill(w: TraceWriter) -> None:
        base = layout(returns=True, cpus=2)
        tss = tuple(replace(t, rsp=(0x500000, None, None)) for t in base.tss)
        w.layout = replace(base, tss=tss, regions=())
        user = {"rip": 0x401000, "rsp": 0x7FF0, "cs": 0x33, "ss": 0x2B}
        w.event(Kind.DELIVER, cpu=0, arg=32, source=Source.FIXED, rflags=0x202, **user)  # the task dies in it
        w.event(Kind.DELIVER, cpu=1, arg=32, source=Source.FIXED, rflags=0x246, **user)  # the stack has another task
        back = {"rsp": 0x500000 - 40, "addr": 0x401000, "value": 0x7FF0, "cs": 0x33, "ss": 0x2B}
        w.event(Kind.RETURN, cpu=1, rflags=0x246, **back)
        w.event(Kind.RETURN, cpu=1, rflags=0x246, **back)  # of no frame; CPU 0's, which had other words, is long forgotten

    with replayed(fill, cpus=2) as replay:
        assert replay.findings() == ()  # user code may come to the same place twice: SYSCALL pushes such a frame unseen


def test_blocking_that_began_before_the_victim_is_still_the_cause() -> None:
    gates = {**GATES, 18: Gate(0x100290, 8, 2)}  # NMI and #MC share IST2

    def fill(w: TraceWriter) -> None:
        w.layout = replace(layout(returns=True), idts=(Idt(0x106000, gates),))
        nmi(w, **OUTER)
        w.event(Kind.TSS, cpu=0, arg=10, value=0x10DC00)
        w.event(Kind.DELIVER, cpu=0, arg=18, source=Source.MC, rip=0x100C00, rsp=0x10DF00, cs=8, ss=0x10, rflags=2)
        w.event(Kind.DELIVER, cpu=0, arg=3, source=Source.SOFT_INT, code=1, rip=0x100D00, rsp=0x10DB00, cs=8, ss=0x10, rflags=2)
        w.event(Kind.RETURN, cpu=0, rsp=0x10DAD8, addr=0x100D01, value=0x10DB00, cs=8, ss=0x10, rflags=2)
        nmi(w, rip=0x100D01, rsp=0x10DB00, cs=8, ss=0x10, rflags=2)

    with replayed(fill) as replay:
        window, finding = replay.findings()
        # IST2 points to 0x10dc00 now: what the next NMI would take is the frame of the #MC, not that of the NMI.
        check_nmi_window(window, event=4, by=4, by_frame=3, victim=2, lo=0x10DBD8)
        assert finding.victim is not None and finding.victim.vector == 18
        assert (finding.cause, finding.cause_event, finding.cause_frame) == (Cause.NMI_UNBLOCKED, 4, 3)


def test_a_frame_left_before_the_blocking_unblocks_nothing() -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout()
        w.event(Kind.DELIVER, cpu=0, arg=14, source=Source.EXCEPTION, code=0, rip=0x1000, rsp=0x126000, cs=8, ss=0x10, rflags=2)
        nmi(w, **OUTER)
        w.event(Kind.DELIVER, cpu=0, arg=3, source=Source.SOFT_INT, code=1, rip=0x100C36, rsp=WORK, cs=8, ss=0, rflags=0x46)

    with replayed(fill) as replay:
        assert replay.stats().deliveries == 3 and len(replay.frames()) == 2  # the #PF's frame was popped
        assert replay.cpu(0).nmi_blocked


def test_a_real_mode_return_unblocks_nmis_and_closes_nothing() -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout(returns=True)
        nmi(w, **OUTER)
        w.event(Kind.SMI, cpu=0)
        w.event(Kind.RETURN, cpu=0, rsp=0x8000, addr=0x1234, value=0x9000, cs=0xF003, ss=0, rflags=2, flags=64)
        w.event(Kind.RSM, cpu=0)
        nmi(w, rip=0x100C00, rsp=0x10DF00, cs=8, ss=0x10, rflags=2)

    with replayed(fill) as replay:
        window, finding = replay.findings()
        # R30: the IRET inside SMM does it, but no NMI comes before RSM.
        check_nmi_window(window, event=3, by=2, by_frame=None, victim=0)
        assert (finding.rule, finding.cause, finding.cause_event) == (Rule.FRAME_CLOBBERED, Cause.NMI_UNBLOCKED, 2)


def test_words_that_are_not_known_prove_no_repair() -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout(returns=True)
        nmi(w, **OUTER)
        w.event(Kind.UNBLOCK, cpu=0)
        nmi(w, **NESTED)
        w.event(Kind.RETURN, cpu=0, rsp=0x10DFD8)
        w.event(Kind.RETURN, cpu=0, rsp=0x10DFD8)

    with replayed(fill) as replay:
        window, finding = replay.findings()
        check_nmi_window(window, event=1, by=1, by_frame=None, victim=0)
        assert finding.rule == Rule.FRAME_CLOBBERED and finding.settled is None


def test_mismatches_of_one_kind_are_one_finding_with_a_count() -> None:
    def fill(w: TraceWriter) -> None:
        w.layout = layout()
        for _ in range(5):
            w.event(Kind.DELIVER, cpu=0, arg=32, source=Source.EXTERNAL, rip=1, rsp=0x127000, cs=8, ss=0x10, rflags=2)

    with replayed(fill) as replay:
        (finding,) = replay.findings()
        assert (finding.rule, finding.detail, finding.count) == (Rule.MODEL_MISMATCH, Mismatch.IF_CLEAR, 5)


def test_many_user_ranges_are_looked_up_and_merged() -> None:
    def fill(w: TraceWriter) -> None:
        ranges = tuple(Region(0x200000 + n * 0x2000, 0x200000 + n * 0x2000 + 0x1800, 1) for n in range(2000))
        w.layout = replace(layout(), regions=(*ranges, Region(0x200000, 0x201000, 1)))
        for rsp in (0x201810, 0x201840, 0x202000, 0x202010):
            w.event(Kind.DELIVER, cpu=0, arg=0, source=Source.EXCEPTION, rip=1, rsp=rsp, cs=8, ss=0, rflags=2)

    with replayed(fill) as replay:
        # [2017e8, 201810) reaches into the first range, [201fe8, 202010) into the second, the others lie between.
        assert [finding.event for finding in replay.findings()] == [0, 3]
