"""The words for events, frames and findings, written out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from samples import (
    CLOBBER,
    DEFAULT_IDLE,
    DO_NMI,
    INNER,
    IST_NMI,
    LAYOUT,
    LOOP,
    OUTER,
    STATS,
    VICTIM,
    WRITER,
    frame,
    race,
)

from tracedbg.describe import ChainStep, Words, clean, hex_address, saved_word, slot_of, slots_text
from tracedbg.layout import CpuTables, Fred, Idt, Layout, Region
from tracedbg.state import (
    Cause,
    CpuState,
    Evidence,
    FrameStatus,
    Kind,
    Known,
    Mismatch,
    Rule,
    Settle,
    Shadow,
    ShutdownReason,
    Source,
    Stack,
    Word,
)
from tracedbg.symbols import Symbols
from tracedbg.trace import Trace
from tracedbg.writer import TraceWriter, build


@pytest.fixture
def words() -> Words:
    return Words(race(returns=2))


def one(kind: Kind, **fields: int) -> tuple[Words, str]:
    """The line of a single event."""
    trace = build(lambda writer: writer.event(kind, **fields))
    words = Words(trace)
    return words, words.event_line(trace.event(0))


def line(kind: Kind, **fields: int) -> str:
    return one(kind, **fields)[1]


# -- names --------------------------------------------------------------------------------------------------------------


def test_events_carry_the_number_of_their_source(words: Words) -> None:
    assert words.event_name(0) == "event 0 (#569)"
    assert words.event_name(2) == "event 2"  # the source has no number for it
    assert words.event_name(99) == "event 99"


def test_a_source_number_equal_to_the_index_is_not_repeated() -> None:
    trace = build(lambda writer: writer.event(Kind.MARK, source_index=0))
    assert Words(trace).event_name(0) == "event 0"


def test_addresses_are_symbols_or_hex(words: Words) -> None:
    assert words.address(DO_NMI) == "do_nmi+2"
    assert words.address(DEFAULT_IDLE) == "default_idle+0xc6"
    assert words.address(IST_NMI) == "ffff8300bffd3000"
    assert words.address(0x10DFD8) == "0x10dfd8"
    assert words.address(None) == "?"
    assert hex_address(0xFFFFFE000000DFD8) == "fffffe000000dfd8"


def test_symbols_given_win_over_those_of_the_trace() -> None:
    given = Symbols([(DO_NMI, DO_NMI + 16, "other")])
    assert Words(race(), given).address(DO_NMI) == "other"


@pytest.mark.parametrize(
    ("vector", "source", "code", "name"),
    [
        (2, Source.NMI, None, "NMI"),
        (18, Source.MC, None, "#MC"),
        (2, Source.SOFT_INT, None, "int 2 (fake NMI)"),
        (2, Source.SOFT_INT, 2, "int 2 (fake NMI)"),
        (18, Source.SOFT_INT, 2, "int 0x12 (fake #MC)"),
        (2, Source.EXTERNAL, None, "interrupt 0x02 (fake NMI)"),
        (2, Source.EXTINT, None, "8259 interrupt 0x02 (fake NMI)"),
        (18, Source.FIXED, None, "interrupt 0x12 (fake #MC)"),
        (2, Source.INJECTED, None, "injected event 0x02 (fake NMI)"),
        (14, Source.EXCEPTION, None, "#PF"),
        (9, Source.EXCEPTION, None, "exception 0x09"),
        (3, Source.SOFT_INT, 1, "int3"),
        (1, Source.SOFT_INT, 1, "int1"),
        (3, Source.SOFT_INT, 2, "int 3"),
        (0x80, Source.SOFT_INT, 2, "int 0x80"),
        (0xEC, Source.EXTERNAL, None, "interrupt 0xec"),
        (0x11, Source.FIXED, None, "interrupt 0x11"),  # not an #AC, though it runs its handler
        (1, Source.SYSCALL, 2, "SYSCALL"),
        (2, Source.SYSCALL, 2, "SYSENTER"),  # vector 2 of FRED's own list: no fake NMI
        (2, Source.UNKNOWN, None, "NMI"),
        (0xEC, Source.UNKNOWN, None, "vector 0xec"),
    ],
)
def test_deliveries(vector: int, source: Source, code: int | None, name: str) -> None:
    fields = {"arg": vector, "source": source} | ({"code": code} if code is not None else {})
    assert line(Kind.DELIVER, **fields) == name


def test_stacks_carry_the_names_of_their_system(words: Words) -> None:
    assert words.stack_name(2) == "IST2 (NMI)"
    assert words.stack_name(3) == "IST3"
    assert words.stack_name(8) == "RSP0"
    assert words.stack_name(0) == "current stack"
    assert words.stack_name(2, 0) == "IST2 (NMI)"  # one CPU: no need to say which
    two = Words(build(lambda writer: writer.event(Kind.MARK), cpus=2))
    assert two.stack_name(2, 1) == "IST2 of cpu 1"


def test_slots() -> None:
    assert slots_text(0b11111) == "rip..ss"
    assert slots_text(0b111111) == "error-code..ss"
    assert slots_text(0b100001) == "error-code, rip"
    assert slots_text(0b11000) == "rsp, ss"
    assert slots_text(0b01001) == "rip, rsp"
    assert slots_text(0b11100) == "rflags..ss"
    assert slots_text(0b10110) == "cs, rflags, ss"
    assert slots_text(0) == "none"


def test_slot_of_a_word() -> None:
    names = [slot_of(VICTIM, IST_NMI - 8 * n) for n in range(7)]
    assert names == ["", "ss", "rsp", "rflags", "cs", "rip", ""]
    with_code = replace(VICTIM, lo=IST_NMI - 48, has_code=True)
    assert slot_of(with_code, IST_NMI - 48) == "error-code"


# -- state --------------------------------------------------------------------------------------------------------------

CPU = CpuState(
    cpu=0, rip=DO_NMI, rsp=0xFFFF8300BFFD2FD8, cs=0xE008, ss=0, rflags=0x46, user_rsp=None, event=3, nmi_blocked=True,
    nmi_pending=True, nmi_since=0, nmi_unblocked_by=None, nmi_unblock_frame=None, mcip=False, gap=False, tss=0, idt=0,
)  # fmt: skip


def test_cpu_line(words: Words) -> None:
    assert words.cpu_line(CPU) == (
        "cpu 0: rip do_nmi+2  rsp ffff8300bffd2fd8  cpl 0  IF=0  NMIs blocked since event 0 (#569), one pending  MCIP clear"
    )
    blank = replace(CPU, rip=None, rsp=None, cs=None, rflags=None, nmi_blocked=None, mcip=None)
    assert words.cpu_line(blank) == "cpu 0: rip ?  rsp ?  cpl ?  IF=?  NMI blocking unknown  MCIP unknown"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"mce": True, "tpr": 0x10, "gif": False}, "CR4.MCE set  TPR 0x10  GIF=0"),
        ({"mce": False, "tpr": 0, "gif": True}, "CR4.MCE clear  TPR 0x00  GIF=1"),
        ({"kernel_gs": True}, "GS base the kernel's"),
        ({"kernel_gs": False}, "GS base user mode's"),
        ({"fred": True, "csl": 2}, "FRED level 2"),
        ({"fred": True}, "FRED level ?"),
        ({"csl": 0}, ""),  # says nothing without FRED
        ({"tokens_known": 0b1110, "tokens_busy": 0b0100}, "shadow-stack tokens: IST1 free, IST2 busy, IST3 free"),
        ({"tokens_busy": 0b0100}, ""),
        ({"shadow": Shadow.STI}, "STI shadow"),
        ({"shadow": Shadow.MOV_SS, "smm": True}, "MOV SS shadow  in SMM"),
        ({"guest": True}, "a guest runs"),
        ({"ring_gap": 2}, "RSP is user mode's since the RETURN at event 2"),
    ],
)
def test_what_few_traces_tell_of_a_cpu_is_said_where_it_is_known(words: Words, change: dict[str, Any], text: str) -> None:
    assert words.cpu_line(replace(CPU, **change)) == words.cpu_line(CPU) + (f"  {text}" if text else "")


def test_a_frame_over_the_kernel_says_whose_gs_base_it_has(words: Words) -> None:
    assert "  GS base user mode's  live" in words.frame_line(replace(WRITER, kernel_gs=False))
    assert "GS base" not in words.frame_line(replace(WRITER, kernel_gs=True))
    user = replace(WRITER, kernel_gs=False, saved=replace(INNER, cs=0x33))  # what its handler expects
    assert "GS base" not in words.frame_line(user)


FRED_FRAME = frame(3, 2, Source.NMI, 0x8000, INNER, lo=0x8000 - 64, fred=True, has_code=True, level=2, from_level=0)


def test_the_words_of_a_fred_frame() -> None:
    names = [slot_of(FRED_FRAME, 0x8000 - 8 * n) for n in range(10)]
    assert names == ["", "zero", "event-data", "ss+info", "rsp", "rflags", "cs", "rip", "error-code", ""]
    assert saved_word(FRED_FRAME, 0x8000 - 8) == (0, (1 << 64) - 1)
    assert saved_word(FRED_FRAME, 0x8000 - 16) is None  # the event data is not in a Frame
    # SS word: SS in bits 0-15, the vector in bits 32-39; CS word: CS, and the level that was interrupted in bits 16-23.
    assert saved_word(replace(FRED_FRAME, saved=OUTER), 0x8000 - 24) == (0x2_0000_E010, 0xFF_0000_FFFF)
    assert saved_word(replace(FRED_FRAME, from_level=1, level=2), 0x8000 - 48) == (0x1_E008, 0xFF_FFFF)
    assert saved_word(FRED_FRAME, 0x8000 - 56) == (DO_NMI, (1 << 64) - 1)
    assert saved_word(FRED_FRAME, 0x8000 - 64) is None  # not known here


def test_the_stacks_of_fred_are_named_by_level(words: Words) -> None:
    assert words.frame_stack(FRED_FRAME) == "FRED level 2"
    same = replace(FRED_FRAME, level=2, from_level=2)
    assert words.frame_stack(same) == "the current stack"
    assert words.frame_stack(replace(same, level=0, from_level=0, saved=replace(INNER, cs=0x33))) == "FRED level 0"

    def fill(writer: TraceWriter) -> None:
        fred = Fred(True, (0x4000, 0x6000, 0x8000, None))
        writer.layout = Layout(cpus=(CpuTables(fred=fred),), regions=(Region(0x7000, 0x8000),))

    two = Words(build(fill, cpus=1))
    assert two.stack_line(Stack(0x7000, 0x8000, 0, 0, True, 0)) == "FRED level 2 [0x7000, 0x8000), 0 open frames"
    assert two.stack_line(Stack(0x9000, 0xA000, 0, 0, True, 0)).startswith("stack [")
    assert two.stack_title(Stack(0x7000, 0x8000, 5, 0, True, 0)) == "stack"


def test_frame_line(words: Words) -> None:
    assert words.frame_line(WRITER) == (
        "NMI at event 3 (#571)  IST2 [ffff8300bffd2fd8, ffff8300bffd3000)  resumes do_nmi+2 rsp ffff8300bffd2f48  live"
    )
    hit = replace(VICTIM, status=FrameStatus.CLOBBERED, clobbered_by=3)
    assert words.frame_line(hit).endswith("overwritten by event 3 (#571)")


def test_stack_line(words: Words) -> None:
    stack = Stack(IST_NMI - 0x1000, IST_NMI, 0, 2, True, 1)
    assert words.stack_line(stack) == "IST2 (NMI) [ffff8300bffd2000, ffff8300bffd3000), 1 open frame"
    assert words.stack_line(replace(stack, named=False, frames=2)).startswith("stack, bounds assumed [")


def test_word_rows(words: Words) -> None:
    hit = replace(VICTIM, status=FrameStatus.CLOBBERED, clobbered_by=3)
    rip = Word(IST_NMI - 40, DO_NMI, 0xFF, (3,) * 8)
    row = words.word_row(rip, (hit, WRITER))
    assert (row.value, row.slot, row.owner, row.writer, row.mark) == (
        "ffff82d04032a242", "rip", "NMI at event 3 (#571)", "event 3 (#571) NMI", "!",
    )  # fmt: skip
    own = words.word_row(replace(rip, writers=(0,) * 8), (VICTIM,))
    assert own.mark == " "
    mixed = words.word_row(Word(IST_NMI - 40, 0x11223344, 0x0F, (None,) * 4 + (2,) * 4), ())
    assert mixed.value == "????????11223344"
    assert mixed.writer == "several: initial, event 2"
    assert words.word_row(Word(0x1000, 0, 0xFF, (None,) * 8), ()).writer == "initial contents"


# -- findings -----------------------------------------------------------------------------------------------------------

OVERWROTE = "NMI overwrote the frame of the NMI at event 0 (#569) on IST2 (40 bytes, rip..ss)"
BECAUSE = "the IRET of the #MC at event 1 (#570) had unblocked NMIs"


def test_an_overwrite_that_is_open_is_worded_conditionally(words: Words) -> None:
    assert words.finding_line(CLOBBER) == (
        f"cpu 0, event 3 (#571): {OVERWROTE}: {BECAUSE}. Still live at the end of the trace: if it is resumed from these "
        "bytes, the IRET goes to do_nmi+2 instead of default_idle+0xc6, back into its own handler, again and again."
    )


def test_an_inferred_overwrite_claims_less(words: Words) -> None:
    text = words.outcome(replace(CLOBBER, evidence=Evidence.INFERRED))
    assert text.startswith("Whether it was still needed is not recorded: if it is resumed from these bytes")


def test_a_loop_says_so(words: Words) -> None:
    assert words.finding_line(LOOP) == (
        f"cpu 0, event 3 (#571): {OVERWROTE}: {BECAUSE}. The IRET at event 5, the resume of event 0, went to do_nmi+2 "
        "instead of default_idle+0xc6, back into its own handler, again and again; the trace has this return 1,973 times."
    )


def test_before_it_was_settled_a_finding_says_what_was_known(words: Words) -> None:
    assert "Still live here" in words.finding_line(LOOP, at=5)
    assert "again and again; the trace has" in words.finding_line(LOOP, at=6)
    assert [step.event for step in words.finding_chain(LOOP, at=5)] == [0, 1, 2, 3]


def test_where_rip_is_the_same_rsp_tells(words: Words) -> None:
    same = replace(CLOBBER, victim=replace(VICTIM, saved=replace(OUTER, rip=DO_NMI)))
    assert "goes to do_nmi+2 with rsp ffff8300bffd2f48 instead of ffff8300bffd7e98" in words.outcome(same)


def test_a_consumed_frame(words: Words) -> None:
    eaten = replace(LOOP, rule=Rule.FRAME_CONSUMED_CORRUPT)
    assert words.outcome(eaten) == (
        "The IRET at event 5, the resume of event 0, went to do_nmi+2 instead of default_idle+0xc6."
    )


def test_the_chain_in_order(words: Words) -> None:
    assert words.finding_chain(LOOP) == (
        ChainStep(
            0, "NMI at default_idle+0xc6 (rsp ffff8300bffd7e98), frame on IST2 [ffff8300bffd2fd8, ffff8300bffd3000)"
        ),
        ChainStep(1, "#MC at do_nmi+2, before that frame is resumed"),
        ChainStep(2, "IRET of event 1 to do_nmi+2: NMIs are unblocked"),
        ChainStep(
            3,
            "NMI at do_nmi+2 (rsp ffff8300bffd2f48), frame on IST2 [ffff8300bffd2fd8, ffff8300bffd3000), "
            "over rip..ss of the frame of event 0",
        ),
        ChainStep(5, "IRET pops the frame of event 0: rip do_nmi+2, rsp ffff8300bffd2f48"),
    )


def test_where_the_return_is_not_recorded_the_chain_says_by_now(words: Words) -> None:
    seen = replace(CLOBBER, cause_event=3)
    assert words.cause(seen) == "the #MC at event 1 (#570) had returned by then, and its IRET unblocks NMIs"
    assert words.finding_chain(seen)[2] == ChainStep(3, "by now the #MC of event 1 has returned, and its IRET has unblocked NMIs")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"cause": Cause.NMI_UNBLOCKED, "cause_frame": None}, "the IRET at event 2 had unblocked NMIs"),
        ({"cause": Cause.NMI_UNBLOCKED, "cause_frame": None, "cause_event": None}, "NMIs had been unblocked"),
        ({"cause": Cause.NMI_UNKNOWN},
         "NMIs were blocked as far as the trace tells; what unblocked them is not recorded"),
        ({"cause": Cause.NMI_NEVER_BLOCKED, "victim": replace(VICTIM, source=Source.SOFT_INT)}, "a fake NMI does not block NMIs"),
        ({"cause": Cause.NMI_NEVER_BLOCKED, "victim": replace(VICTIM, vector=1)},
         "NMIs were not blocked, as only an NMI blocks them"),
        ({"cause": Cause.MC_UNMASKED, "victim": replace(VICTIM, vector=18, source=Source.MC)},
         "nothing but MCIP holds off a machine check, and the first handler had cleared it"),
        ({"cause": Cause.MC_UNMASKED, "victim": replace(VICTIM, vector=18, source=Source.FIXED)},
         "a fake #MC does not set MCIP, and nothing else holds off a machine check"),
        ({"cause": Cause.MASKABLE}, "IF was 1 in that handler, so a maskable interrupt could come"),
        ({"cause": Cause.SOFTWARE}, "it was raised by what ran inside that handler"),
        ({"cause": Cause.OTHER_CPU, "writer": replace(WRITER, cpu=1)}, "the TSSes of cpu 1 and cpu 0 name the same stack"),
        ({"cause": Cause.NONE}, ""),
    ],
)  # fmt: skip
def test_causes(words: Words, change: dict[str, object], text: str) -> None:
    assert words.cause(replace(CLOBBER, **change)) == text  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("by", "text"),
    [
        (Settle.RETURN, "No harm: its own words were back when the IRET at event 5 popped them."),
        (Settle.COPY, "No harm: the IRET at event 5 popped a copy of it."),
        (Settle.CONTEXT, "It survived: its RIP and RSP were running again at event 5."),
        (Settle.ABOVE, "It survived: at event 5 the CPU ran on the interrupted stack again, above the saved RSP."),
        (Settle.CPL3, "It survived: the CPU ran at CPL 3 at event 5."),
    ],
)
def test_survivors(words: Words, by: Settle, text: str) -> None:
    assert words.outcome(replace(CLOBBER, rule=Rule.FRAME_RELOCATED, settled=5, settled_by=by)) == text


def test_moved_before(words: Words) -> None:
    moved = replace(CLOBBER, rule=Rule.FRAME_RELOCATED, raised_rule=Rule.FRAME_RELOCATED)
    assert words.outcome(moved) == "Software had moved the frame before, so nothing was lost."


def test_same_bytes(words: Words) -> None:
    same = replace(CLOBBER, rule=Rule.FRAME_SAME_BYTES, raised_rule=Rule.FRAME_SAME_BYTES, differ=0)
    assert words.statement(same) == f"{OVERWROTE} with the values that it already held"
    assert words.outcome(same) == ""


def test_part_of_a_frame(words: Words) -> None:
    part = replace(CLOBBER, lo=IST_NMI - 16, slots=0b11000)
    assert "on IST2 (16 of 40 bytes, rsp, ss)" in words.statement(part)


def test_bytes_rows_by_address(words: Words) -> None:
    rows = words.bytes_rows(CLOBBER)
    assert [(row.addr, row.slot, row.own, row.now, row.differs) for row in rows] == [
        (0xFFFF8300BFFD2FD8, "rip", DEFAULT_IDLE, DO_NMI, True),
        (0xFFFF8300BFFD2FE0, "cs", 0xE008, 0xE008, False),
        (0xFFFF8300BFFD2FE8, "rflags", 0x206, 0x46, True),
        (0xFFFF8300BFFD2FF0, "rsp", 0xFFFF8300BFFD7E98, 0xFFFF8300BFFD2F48, True),
        (0xFFFF8300BFFD2FF8, "ss", 0xE010, 0, True),
    ]


def test_bytes_rows_where_the_tops_differ(words: Words) -> None:
    # The writer's frame begins 16 bytes lower: its SS lies on the victim's RFLAGS.
    writer = frame(3, 2, Source.NMI, IST_NMI - 16, INNER)
    rows = words.bytes_rows(replace(CLOBBER, writer=writer, slots=0b00111, lo=IST_NMI - 40, hi=IST_NMI - 16))
    assert [(row.slot, row.now, row.overwritten) for row in rows] == [
        ("rip", 0x46, True), ("cs", INNER.rsp, True), ("rflags", 0, True), ("rsp", OUTER.rsp, False), ("ss", OUTER.ss, False),
    ]  # fmt: skip


def findings_of(kind: Kind, rule: Rule, fields: dict[str, int], **change: object) -> str:
    words, _ = one(kind, **fields)
    base = replace(
        CLOBBER, rule=rule, raised_rule=rule, event=0, victim=None, writer=None, cause=Cause.NONE, cause_event=None,
        cause_frame=None, slots=0, differ=0, lo=0, hi=0,
    )  # fmt: skip
    return words.finding_line(replace(base, **change))  # type: ignore[arg-type]


def test_fakes() -> None:
    text = findings_of(Kind.DELIVER, Rule.FAKE_NMI, {"arg": 2, "source": Source.SOFT_INT}, count=3)
    assert text == (
        "cpu 0, event 0: int 2 (fake NMI) ran the NMI handler, but to the CPU it is none: NMIs are not blocked by it, "
        "3 times in all."
    )
    text = findings_of(Kind.DELIVER, Rule.FAKE_MCE, {"arg": 18, "source": Source.EXTERNAL})
    assert "ran the #MC handler" in text and "MCIP is not set by it." in text


def test_user_stack() -> None:
    where = frame(0, 2, Source.NMI, 0x112000, replace(OUTER, rip=0x100486))
    text = findings_of(Kind.DELIVER, Rule.USER_STACK, {"arg": 2, "source": 2}, writer=where, lo=0x111FD8, hi=0x112000)
    assert text == (
        "cpu 0, event 0: NMI at 0x100486 was pushed at CPL 0 onto memory of user mode, [0x111fd8, 0x112000): its gate has "
        "no IST stack, and RSP was still user mode's."
    )


def test_double_fault() -> None:
    def fill(writer: TraceWriter) -> None:
        at = {"rip": 0x101F23, "rsp": 0x123456789000, "cs": 8, "cpu": 0}
        writer.event(Kind.DELIVER, arg=3, source=Source.SOFT_INT, code=1, flags=1, **at)
        writer.event(Kind.DELIVER, arg=14, source=Source.EXCEPTION, flags=1, **at)
        writer.event(Kind.DELIVER, arg=8, source=Source.EXCEPTION, **at)

    words = Words(build(fill))
    finding = replace(
        CLOBBER, rule=Rule.DOUBLE_FAULT, raised_rule=Rule.DOUBLE_FAULT, event=2, cause=Cause.NONE, cause_event=1, cause_frame=0,
        victim=None, writer=None, slots=0, differ=0,
    )  # fmt: skip
    assert words.finding_line(finding) == (
        "cpu 0, event 2: #DF at 0x101f23 with rsp 0x123456789000: the int3 at event 0 could not be delivered, nor the #PF at "
        "event 1 that this raised."
    )
    assert [step.event for step in words.finding_chain(finding)] == [0, 1, 2]
    alone = replace(finding, cause_event=None, cause_frame=None)
    assert words.finding_line(alone).endswith("; what could not be delivered is not recorded.")


def test_shutdown_gap_and_mismatch() -> None:
    assert findings_of(Kind.SHUTDOWN, Rule.SHUTDOWN, {"arg": 1}, detail=int(ShutdownReason.MCIP)) == (
        "cpu 0, event 0: the CPU shut down: a machine check while MCIP was set."
    )
    assert findings_of(Kind.GAP, Rule.TRACE_GAP, {"value": 12, "cpu": 0}) == (
        "cpu 0, event 0: 12 records of this CPU are missing; what was open before is unknown after."
    )
    every = findings_of(Kind.GAP, Rule.TRACE_GAP, {"value": 12}, cpu=0xFFFF)
    assert every.startswith("all CPUs, event 0: 12 records of all CPUs are missing")
    both = int(Mismatch.ENTER_RSP | Mismatch.ENTER_CS)
    text = findings_of(Kind.ENTER, Rule.MODEL_MISMATCH, {}, detail=both)
    assert "another RSP than the TSS gives; " in text and "another CS than the gate gives." in text


@pytest.mark.parametrize("rule", list(Rule))
def test_every_rule_can_be_said_with_nothing_known(words: Words, rule: Rule) -> None:
    bare = replace(
        CLOBBER, rule=rule, raised_rule=rule, event=99, victim=None, writer=None, cause_event=None, cause_frame=None,
        slots=0, differ=0, lo=0, hi=0,
    )  # fmt: skip
    for at in (None, 1):
        assert words.finding_line(bare, at)
        assert words.finding_text(bare, at)
        words.finding_chain(bare, at)


def test_the_block_for_a_mail(words: Words, golden) -> None:  # type: ignore[no-untyped-def]
    text = "\n".join(words.finding_text(LOOP)) + "\n"
    assert max(map(len, text.splitlines())) <= 78
    golden("describe-loop.txt", text)


def test_clean() -> None:
    assert clean("plain") == "plain"
    assert clean("\x1b[31mred\x07") == "?[31mred?"
    assert clean("a\u202eb\u2028c\x85d") == "a?b?c?d"
    assert clean("ä→") == "ä→"
    assert clean("\udc80x") == "?x"
    assert clean("x" * 500) == "x" * 157 + "..."


def test_the_trace_names_the_stacks_and_they_are_clean() -> None:
    trace: Trace = race()
    trace.layout.names[2] = "N\x1bMI"
    try:
        assert Words(trace).stack_name(2) == "IST2 (N?MI)"
    finally:
        trace.layout.names[2] = "NMI"


def test_known_bits_rule_what_is_said() -> None:
    _, text = one(Kind.DELIVER, arg=2, source=2, rip=0x1000, rsp=0x2000, known=int(Known.ARG | Known.SOURCE | Known.RSP))
    assert text == "NMI  rsp 0x2000"


def test_brief_forms_begin_with_what_matters() -> None:
    def fill(writer: TraceWriter) -> None:
        writer.symbols = f"{DO_NMI:x} {DO_NMI + 64:x} do_nmi\n".encode()
        writer.event(Kind.WRITE, rip=DO_NMI + 2, addr=IST_NMI - 48, arg=8, value=0x18)
        writer.event(Kind.WRITE, rip=0x1000, addr=0x2000, arg=4)
        writer.event(Kind.READ)
        writer.event(Kind.DELIVER, rip=DO_NMI, arg=2, source=Source.NMI)
        writer.event(Kind.DELIVER, arg=2, source=Source.EXTINT)
        writer.event(Kind.DELIVER, arg=18, source=Source.SOFT_INT)
        writer.event(Kind.DELIVER, arg=0xEC, source=Source.FIXED)
        writer.event(Kind.DELIVER, arg=3, source=Source.SOFT_INT, code=1)
        writer.event(Kind.DELIVER, source=Source.FIXED)

    trace = build(fill)
    words = Words(trace)
    assert words.event_brief(trace.event(0)) == "write …bffd2fd0 by do_nmi+2 = 0x18 (8 bytes)"
    assert words.event_brief(trace.event(1)) == "write 0x2000 by 0x1000 (4 bytes)"
    assert words.event_brief(trace.event(2)).startswith("read ?")
    assert words.event_brief(trace.event(3)) == words.event_line(trace.event(3))
    said = [words.delivery_brief(trace.event(n)) for n in range(3, 9)]
    assert said == ["NMI", "fake NMI", "fake #MC", "intr 0xec", "int3", "delivery of an unknown vector"]
    assert words.frame_brief(VICTIM) == "NMI@0"
    assert words.finding_brief(CLOBBER).startswith("@3 NMI overwrote the frame of the NMI at event 0")


def test_nothing_found_says_what_the_scan_covered() -> None:
    words = Words(race())
    assert words.nothing_found(None) == ["The scan of all 4 events found nothing: no findings."]
    assert words.nothing_found(STATS)[1:] == ["3 of 3 deliveries were judged."]
    assert words.nothing_found(replace(STATS, deliveries=0, judged=0))[1:] == ["It has no deliveries to judge."]
    assert words.nothing_found(STATS, ("records are missing",))[2:] == ["It is not known to be clean:", "- records are missing"]


def test_no_place_names_what_the_layout_lacks() -> None:
    def first(layout: Layout) -> str:
        return " ".join(Words(build(lambda writer: setattr(writer, "layout", layout))).no_place())

    assert first(LAYOUT) == ""
    assert "neither TSS nor IDT is known" in first(Layout())
    assert "no IDT is known, and only the IDT says" in first(Layout(tss=LAYOUT.tss, idts=(Idt(0x6000, {}),)))
    assert "no TSS is known, and only the TSS says" in first(Layout(idts=LAYOUT.idts))
    assert first(Layout(cpus=(CpuTables(fred=Fred(config=0x1000)),))) == ""  # FRED needs no table
    assert "neither TSS" in first(Layout(cpus=(CpuTables(fred=Fred(on=False, config=0x1000)),)))


def test_the_table_of_bytes_fits_a_narrow_pane(words: Words) -> None:
    lines = words.finding_text(LOOP, width=58)
    assert "  …bffd2fd8 rip        ffff82d0402f9c06 ffff82d04032a242 *" in lines
    assert max(map(len, lines)) <= 58
