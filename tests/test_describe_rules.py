"""A sentence for each finding about masking, stacks and failed deliveries, written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from samples import CLOBBER, CS, DEFAULT_IDLE, DO_NMI, INNER, IST_MC, IST_NMI, LAYOUT, OUTER, SYMBOLS, VICTIM, frame, race

from tracedbg.describe import Words
from tracedbg.state import Cause, Context, EventFlag, Evidence, Finding, Kind, Mismatch, Rule, Source
from tracedbg.writer import TraceWriter, build

USER_RSP = 0x7FFC_1230
ENTRY = 0xFFFF82D040200000  # where SYSCALL goes


def finding(rule: Rule, event: int, **change: Any) -> Finding:
    """A computed finding without a cause or any frame."""
    base = replace(
        CLOBBER, rule=rule, raised_rule=rule, event=event, victim=None, writer=None, cause=Cause.NONE, cause_event=None,
        cause_frame=None, slots=0, differ=0, lo=0, hi=0,
    )  # fmt: skip
    return replace(base, **change)


def words_of(fill: Callable[[TraceWriter], None]) -> Words:
    def whole(writer: TraceWriter) -> None:
        writer.layout = LAYOUT
        writer.symbols = SYMBOLS
        fill(writer)

    return Words(build(whole))


def nmi(writer: TraceWriter, **more: int) -> None:
    writer.event(Kind.DELIVER, **{"cpu": 0, "arg": 2, "source": Source.NMI, "rip": DEFAULT_IDLE, "cs": CS, **more})


def steps(words: Words, value: Finding) -> list[tuple[int, str]]:
    return [(step.event, step.text) for step in words.finding_chain(value)]


# -- windows ------------------------------------------------------------------------------------------------------------

WINDOW = finding(Rule.REENTRY_WINDOW, 2, cause=Cause.NMI_UNBLOCKED, cause_event=2, cause_frame=1, victim=VICTIM,
                 lo=IST_NMI - 40, hi=IST_NMI)  # fmt: skip
ON_IST2 = "the frame of the NMI at event 0 (#569) on IST2 is live, and"


def test_a_window_says_what_could_come_and_since_when() -> None:
    words = Words(race())
    assert words.finding_line(WINDOW) == (
        f"cpu 0, event 2: {ON_IST2} another NMI would overwrite it (40 bytes): the IRET of the #MC at event 1 (#570) has "
        "unblocked NMIs."
    )
    assert steps(words, WINDOW)[1:] == [
        (1, "#MC at do_nmi+2, before that frame is resumed"),
        (2, "IRET of event 1 to do_nmi+2: NMIs are unblocked; from here on another NMI would be stored over "
            "[ffff8300bffd2fd8, ffff8300bffd3000)"),
    ]  # fmt: skip
    assert not any("address" in line for line in words.finding_text(WINDOW))  # nothing is overwritten: no table of bytes
    assert "; the first of 12 such windows)" in words.finding_line(replace(WINDOW, count=12))


FAKE_MC = replace(VICTIM, vector=18, source=Source.EXTINT)


@pytest.mark.parametrize(
    ("kind", "change", "text"),
    [
        (Kind.DELIVER, {"cause": Cause.NMI_NEVER_BLOCKED, "victim": replace(VICTIM, source=Source.SOFT_INT)},
         "an NMI would overwrite it (40 bytes): a fake NMI does not block NMIs."),
        (Kind.DELIVER, {"cause": Cause.NMI_NEVER_BLOCKED, "victim": replace(VICTIM, vector=1, source=Source.EXCEPTION)},
         "an NMI would overwrite it (40 bytes): NMIs are not blocked, as only an NMI blocks them."),
        (Kind.MSR, {"cause": Cause.MC_UNMASKED, "victim": replace(VICTIM, vector=18, source=Source.MC)},
         "another #MC would overwrite it (40 bytes): event 0 has cleared MCIP, and nothing else holds off a machine check."),
        (Kind.DELIVER, {"cause": Cause.MC_UNMASKED, "victim": FAKE_MC},
         "a machine check would overwrite it (40 bytes): a fake #MC does not set MCIP, and nothing else holds off a machine "
         "check."),
        (Kind.DELIVER, {"cause": Cause.MC_UNMASKED},
         "a machine check would overwrite it (40 bytes): MCIP is clear, and nothing else holds off a machine check."),
        (Kind.DELIVER, {"cause": Cause.MASKABLE},
         "a maskable interrupt through a gate to this stack would overwrite it (40 bytes): its gate leaves IF set."),
        (Kind.SHADOW, {"cause": Cause.MASKABLE}, "would overwrite it (40 bytes): STI at event 0 has set IF."),
        (Kind.FLAGS, {"cause": Cause.MASKABLE}, "would overwrite it (40 bytes): event 0 has set IF."),
        (Kind.UNBLOCK, {"cause": Cause.NMI_UNBLOCKED, "cause_frame": None},
         "another NMI would overwrite it (40 bytes): NMIs have been unblocked by event 0."),
    ],
)  # fmt: skip
def test_windows_by_cause(kind: Kind, change: dict[str, Any], text: str) -> None:
    words = words_of(lambda writer: writer.event(kind, cpu=0, rsp=0x1000))
    said = words.finding_line(replace(WINDOW, **{"event": 0, "cause_event": 0, **change}))
    assert said.endswith(text)


def test_an_iret_in_smm_unblocks_nmis_for_what_comes_after_rsm() -> None:
    def fill(writer: TraceWriter) -> None:
        nmi(writer)
        writer.event(Kind.SMI, cpu=0)
        writer.event(Kind.RETURN, cpu=0, addr=0x8000, flags=EventFlag.SMM)
        writer.event(Kind.RSM, cpu=0)

    words = words_of(fill)
    value = replace(WINDOW, event=3, cause_event=2, cause_frame=None)
    assert words.finding_line(value).endswith(": the IRET at event 2 in SMM has unblocked NMIs.")
    assert [text for _, text in steps(words, value)][1:] == [
        "IRET in SMM: NMIs are unblocked",
        "RSM; from here on another NMI would be stored over [ffff8300bffd2fd8, ffff8300bffd3000)",
    ]


# -- NMIs ---------------------------------------------------------------------------------------------------------------


def test_nmi_stuck_where_the_frame_was_left_without_an_iret() -> None:
    def fill(writer: TraceWriter) -> None:
        nmi(writer)
        writer.event(Kind.DELIVER, cpu=0, arg=0xEC, source=Source.FIXED, rip=DEFAULT_IDLE, cs=CS)
        writer.event(Kind.SYSRET, cpu=0)
        writer.event(Kind.DELIVER, cpu=0, arg=0xEC, source=Source.FIXED, rip=0x1000, cs=0x33)

    words = words_of(fill)
    until = "Until a return unblocks them the CPU takes no NMI: one is kept pending, further ones are lost."
    left = finding(Rule.NMI_STUCK, 1, cause_event=0, victim=VICTIM)
    assert words.finding_line(left) == (
        "cpu 0, event 1: NMIs stay blocked since the NMI at event 0: its frame has been left by now, and no return unblocked "
        f"them. {until}"
    )
    assert [event for event, _ in steps(words, left)] == [0, 1]
    assert words.statement(replace(left, event=2, victim=None)) == (
        "NMIs stay blocked since the NMI at event 0: SYSRET does not unblock them, and no other return did"
    )
    assert words.statement(replace(left, event=3, victim=None)) == (
        "NMIs stay blocked since the NMI at event 0: the CPU had gone to CPL 3 by now, and no return unblocked them"
    )
    assert words.statement(replace(left, cause_event=None)).startswith("NMIs stay blocked: the frame of the NMI at event 0 has")


def test_nmi_stuck_by_an_erets_without_the_nmi_bit() -> None:
    def fill(writer: TraceWriter) -> None:
        nmi(writer)
        writer.event(Kind.RETURN, cpu=0, arg=2, addr=DEFAULT_IDLE, code=0, rsp=0x7FC0)

    words = words_of(fill)
    value = finding(Rule.NMI_STUCK, 1, cause_event=0, victim=VICTIM, evidence=Evidence.RECORDED)
    assert words.statement(value) == "ERETS popped the frame of the NMI at event 0 without its NMI bit: NMIs stay blocked"
    assert words.evidence_text(value) == "recorded: the trace has the return and the SS word that it popped"


def test_nmi_blocking_of_a_vm_exit_has_its_name() -> None:
    words = words_of(lambda writer: writer.event(Kind.VMEXIT, cpu=0, arg=0, source=Source.NMI))
    value = finding(Rule.NMI_STUCK, 0, cause_event=0)
    assert words.statement(value).startswith("NMIs stay blocked since the VM exit for an NMI at event 0: ")


def test_nmi_lost() -> None:
    words = words_of(lambda writer: writer.event(Kind.RAISE, cpu=0, arg=2, source=Source.NMI))
    value = finding(Rule.NMI_LOST, 0, evidence=Evidence.RECORDED)
    assert words.finding_line(value) == (
        "cpu 0, event 0: an NMI was requested while NMIs were blocked and one was pending already: only one is kept, so this "
        "one is lost."
    )
    assert " was pending already, 4 times in all: only one" in words.finding_line(replace(value, count=4))


# -- vectors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vector", "what"),
    [(18, "interrupt 0x12 (fake #MC)"), (17, "interrupt 0x11, the vector of #AC,"), (22, "interrupt 0x16")],
)
def test_held_vector(vector: int, what: str) -> None:
    words = words_of(lambda writer: writer.event(Kind.RAISE, cpu=0, arg=vector, source=Source.FIXED))
    value = finding(Rule.HELD_VECTOR, 0, detail=vector, evidence=Evidence.RECORDED)
    assert words.finding_line(value) == (
        f"cpu 0, event 0: {what} was requested and is held back until TPR, which is 0x10 or higher, is lowered."
    )
    assert " was requested, 3 times in all, and is held back until TPR" in words.finding_line(replace(value, count=3))


def test_illegal_vector_requested_and_delivered() -> None:
    def fill(writer: TraceWriter) -> None:
        writer.event(Kind.RAISE, cpu=0, arg=15, source=Source.FIXED)
        writer.event(Kind.DELIVER, cpu=0, arg=2, source=Source.FIXED)

    words = words_of(fill)
    value = finding(Rule.ILLEGAL_VECTOR, 0, detail=15, evidence=Evidence.RECORDED, count=2)
    assert words.finding_line(value) == (
        "cpu 0, event 0: interrupt 0x0f was requested of the local APIC, which does not accept vectors 0 to 15: it is not "
        "delivered, 2 times in all."
    )
    assert words.finding_line(replace(value, event=1, detail=2, count=1)) == (
        "cpu 0, event 1: interrupt 0x02 (fake NMI) was delivered and is recorded as one of the local APIC, which does not "
        "accept vectors 0 to 15."
    )


# -- error codes --------------------------------------------------------------------------------------------------------


def test_an_error_code_that_may_be_missed() -> None:
    where = frame(0, 17, Source.FIXED, 0x9000, OUTER)
    words = words_of(lambda writer: writer.event(Kind.DELIVER, cpu=0, arg=17, source=Source.FIXED))
    value = finding(Rule.ERROR_CODE_MISMATCH, 0, evidence=Evidence.INFERRED, writer=where, lo=where.lo, hi=where.hi, detail=17)
    assert words.finding_line(value) == (
        "cpu 0, event 0: interrupt 0x11 stored no error code, and its vector is that of #AC, which has one: the handler may "
        "take the saved RIP for it, and every word above for the one below."
    )


def test_an_error_code_that_was_dropped_or_left_over() -> None:
    def fill(writer: TraceWriter) -> None:
        writer.event(Kind.DELIVER, cpu=0, arg=17, source=Source.FIXED)
        writer.event(Kind.RETURN, cpu=0, addr=CS, rsp=0x9000 - 32)
        writer.event(Kind.DELIVER, cpu=0, arg=14, source=Source.EXCEPTION, code=2)
        writer.event(Kind.RETURN, cpu=0, rsp=0x9000 - 48, flags=EventFlag.FAULTED)

    words = words_of(fill)
    short = frame(0, 17, Source.FIXED, 0x9000, OUTER)
    value = finding(
        Rule.ERROR_CODE_MISMATCH, 1, evidence=Evidence.RECORDED, victim=short, consumer=1, detail=17,
        popped=Context(CS, None, None, None, None, None),
    )  # fmt: skip
    assert words.finding_line(value) == (
        "cpu 0, event 1: IRET popped the frame of the interrupt 0x11 at event 0 one word too high, as if it had an "
        "error code to drop, so its CS, 0xe008, was taken for RIP."
    )
    assert [event for event, _ in steps(words, value)] == [0, 1]
    long = frame(2, 14, Source.EXCEPTION, 0x9000, replace(OUTER, code=2), lo=0x9000 - 48, has_code=True)
    value = finding(Rule.ERROR_CODE_MISMATCH, 3, evidence=Evidence.RECORDED, victim=long, consumer=3, detail=14)
    assert words.statement(value) == (
        "IRET popped the frame of the #PF at event 2 one word too low, at the error code that had not been "
        "dropped, so its error code was taken for RIP, and the IRET faulted"
    )


# -- tokens and faults --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "text"),
    [
        ({}, "Whether it had stored its frame by then is not recorded."),
        ({"addr": 0}, "By then it had stored nothing of its frame."),
        ({"addr": 1}, "By then it had stored 1 word of its frame."),
        ({"addr": 5}, "By then it had stored 5 words of its frame."),
    ],
)
def test_a_delivery_that_found_a_busy_token(stored: dict[str, int], text: str) -> None:
    def fill(writer: TraceWriter) -> None:
        nmi(writer)
        nmi(writer, rip=DO_NMI, flags=EventFlag.FAILED, **stored)

    words = words_of(fill)
    value = finding(Rule.TOKEN_BUSY, 1, detail=2, victim=VICTIM, writer=frame(1, 2, Source.NMI, IST_NMI, INNER))
    assert words.finding_line(value) == (
        "cpu 0, event 1: the delivery of NMI failed while the shadow-stack token of IST2 was busy, where the frame of the NMI "
        f"at event 0 is still open. {text}"
    )
    tail = "stored on IST2 [" if stored.get("addr") else "nothing known to be stored on IST2 ["
    assert f"NMI at do_nmi+2 (rsp ffff8300bffd2f48), which failed, {tail}" in steps(words, value)[1][1]


def test_a_token_that_was_seen_busy() -> None:
    words = words_of(lambda writer: writer.event(Kind.TOKEN, cpu=0, arg=2, addr=0x9FF8, code=1, value=1))
    value = finding(Rule.TOKEN_BUSY, 0, detail=2, evidence=Evidence.RECORDED)
    assert words.finding_line(value) == "cpu 0, event 0: the shadow-stack token of IST2 was to be taken and was busy."


def test_triple_fault_names_what_could_not_be_delivered() -> None:
    def fill(writer: TraceWriter) -> None:
        writer.event(Kind.DELIVER, cpu=0, arg=14, source=Source.EXCEPTION, flags=EventFlag.FAILED)
        writer.event(Kind.DELIVER, cpu=0, arg=8, source=Source.EXCEPTION, flags=EventFlag.FAILED)
        writer.event(Kind.SHUTDOWN, cpu=0, arg=0)

    words = words_of(fill)
    value = finding(Rule.TRIPLE_FAULT, 2, cause_event=1, cause_frame=0, evidence=Evidence.RECORDED)
    assert words.finding_line(value) == (
        "cpu 0, event 2: the CPU shut down (triple fault): the #PF at event 0 could not be delivered, nor the #DF at event 1."
    )
    assert [event for event, _ in steps(words, value)] == [0, 1, 2]
    other = replace(value, cause_event=0, cause_frame=None)  # no #DF is recorded: the #PF alone explains nothing
    shut = "the CPU shut down (triple fault)"
    assert words.statement(other) == f"{shut}; the last delivery before that failed is the #PF at event 0"
    bare = replace(value, cause_event=None, cause_frame=None)
    assert words.statement(bare).endswith("; what could not be delivered is not recorded")


@pytest.mark.parametrize(
    ("bit", "vector", "part"),
    [
        (Mismatch.GATE, 3, "the gate or the stack pointer that it names cannot deliver it"),
        (Mismatch.MC_SHUTDOWN, 18, "a machine check was delivered where it shuts the CPU down"),
        (Mismatch.TPR, 18, "an interrupt was delivered that the task priority holds back"),
        (Mismatch.GIF, 2, "it was delivered while GIF was 0"),
        (Mismatch.TOKEN, 2, "it was delivered though the shadow-stack token of its IST stack was busy"),
        (Mismatch.DOUBLE_FAULT, 8, "a double fault was delivered, but the two failed deliveries before it do not make one"),
        (Mismatch.DOUBLE_FAULT, 13, "it came while another exception could not be delivered, and the two make a double fault"),
    ],
)
def test_mismatches(bit: Mismatch, vector: int, part: str) -> None:
    words = words_of(lambda writer: writer.event(Kind.DELIVER, cpu=0, arg=vector, source=Source.EXCEPTION))
    said = words.statement(finding(Rule.MODEL_MISMATCH, 0, detail=int(bit)))
    assert said.count(": ") == 1 and said.partition(": ")[2].startswith(part)


def test_every_mismatch_has_words() -> None:
    words = Words(race())
    for bit in Mismatch:
        assert "the source and the rules differ" not in words.statement(finding(Rule.MODEL_MISMATCH, 0, detail=int(bit)))


# -- stacks -------------------------------------------------------------------------------------------------------------

# IST2 ends where IST1 begins: what goes below IST_MC from above lands on the top of the #MC stack.
LOWER = frame(0, 18, Source.MC, IST_MC, OUTER)
OVER = frame(1, 14, Source.EXCEPTION, IST_MC + 32, replace(INNER, code=0), lo=IST_MC - 16, has_code=True, ist=0)


def fill_overflow(writer: TraceWriter) -> None:
    writer.event(Kind.DELIVER, cpu=0, arg=18, source=Source.MC, rip=DEFAULT_IDLE)
    writer.event(Kind.DELIVER, cpu=0, arg=14, source=Source.EXCEPTION, rip=DO_NMI)
    writer.event(Kind.WRITE, cpu=0, rip=DO_NMI, rsp=IST_MC - 16, addr=IST_MC - 16, arg=8, value=0x1234)
    writer.event(Kind.WRITE, cpu=0, rip=DO_NMI, addr=IST_MC - 38, arg=4, value=0xAABBCCDD)


def test_stack_overflow_by_a_frame_and_by_a_push() -> None:
    words = words_of(fill_overflow)
    value = finding(Rule.STACK_OVERFLOW, 1, writer=OVER, lo=IST_MC - 16, hi=IST_MC)
    assert words.finding_line(value) == (
        "cpu 0, event 1: #PF did not fit (rsp ffff8300bffd2f48): 16 of the 48 bytes of its frame lie below the bottom of IST2 "
        "at ffff8300bffd2000."
    )
    push = finding(Rule.STACK_OVERFLOW, 2, lo=IST_MC - 16, hi=IST_MC - 8, evidence=Evidence.RECORDED, count=7)
    assert words.finding_line(push) == (
        "cpu 0, event 2: 8 bytes of a push at do_nmi+2, [ffff8300bffd1ff0, ffff8300bffd1ff8), lie below the bottom of its stack, "
        "7 times in all."
    )


def test_a_frame_that_reached_into_the_stack_below() -> None:
    words = words_of(fill_overflow)
    value = finding(
        Rule.NEIGHBOUR_OVERWRITE, 1, victim=LOWER, writer=OVER, slots=0b11000, differ=0b11000, lo=IST_MC - 16, hi=IST_MC
    )
    assert words.finding_line(value) == (
        "cpu 0, event 1: #PF was pushed below the bottom of IST2 and overwrote the frame of the #MC at event 0 on IST1 (16 of "
        "40 bytes, rsp, ss). Still live at the end of the trace: if it is resumed from these bytes, not all of them are its own."
    )
    assert [event for event, _ in steps(words, value)] == [0, 1]
    # The frame of the #PF has its RIP at the victim's SS, and its error code at the victim's RSP.
    now = {row.slot: row.now for row in words.bytes_rows(value) if row.overwritten}
    assert now == {"rsp": 0, "ss": DO_NMI}


def test_a_neighbour_that_was_popped_later_still_says_how_it_was_hit() -> None:
    words = words_of(fill_overflow)
    value = finding(
        Rule.NEIGHBOUR_OVERWRITE, 1, victim=LOWER, writer=OVER, slots=0b11000, differ=0b11000, lo=IST_MC - 16, hi=IST_MC
    )
    eaten = replace(value, rule=Rule.FRAME_CONSUMED_CORRUPT, settled=3, consumer=3, popped=replace(OUTER, rsp=0))
    assert words.finding_line(eaten).startswith("cpu 0, event 1: #PF was pushed below the bottom of IST2 and overwrote the frame")
    assert words.outcome(eaten).startswith("The IRET at event 3, the resume of event 0, went to default_idle+0xc6 with rsp 0x0")


def test_a_push_into_the_stack_below_has_its_bytes() -> None:
    words = words_of(fill_overflow)
    push = finding(
        Rule.NEIGHBOUR_OVERWRITE, 2, victim=LOWER, slots=0b01000, differ=0b01000, lo=IST_MC - 16, hi=IST_MC - 8,
        evidence=Evidence.RECORDED,
    )  # fmt: skip
    assert words.finding_line(push) == (
        "cpu 0, event 2: a push at do_nmi+2 went below the bottom of IST2 and overwrote the frame of the #MC at event 0 on IST1 "
        "(8 of 40 bytes, rsp). What became of it is not known: if it is resumed from these bytes, the IRET goes to "
        "default_idle+0xc6 with rsp 0x1234 instead of ffff8300bffd7e98."
    )
    assert [(r.slot, r.own, r.now) for r in words.bytes_rows(push) if r.differs] == [("rsp", OUTER.rsp, 0x1234)]
    assert any("now, by event 2" in line for line in words.finding_text(push))


def test_a_store_that_may_be_a_push_claims_no_more() -> None:
    words = words_of(fill_overflow)
    store = finding(
        Rule.NEIGHBOUR_OVERWRITE, 3, victim=LOWER, slots=0b00001, differ=0b00001, lo=IST_MC - 38, hi=IST_MC - 34,
        evidence=Evidence.INFERRED,
    )  # fmt: skip
    assert words.statement(store) == (
        "a store at do_nmi+2 overwrote the frame of the #MC at event 0 on IST1 (4 of 40 bytes, rip); the CPU ran on IST2, the "
        "stack above, so it may be a push below the bottom of that"
    )
    # Bytes 2-5 of RIP ffff82d0402f9c06.
    (row,) = [r for r in words.bytes_rows(store) if r.overwritten]
    assert row.now == 0xFFFF_AABB_CCDD_9C06
    unknown = replace(store, victim=replace(LOWER, saved=replace(OUTER, rip=None)))
    (row,) = [r for r in words.bytes_rows(unknown) if r.overwritten]
    assert row.now is None  # four bytes of an unknown word


def test_part_of_a_frame_by_a_failed_delivery() -> None:
    def fill(writer: TraceWriter) -> None:
        nmi(writer)
        nmi(writer, rip=DO_NMI, flags=EventFlag.FAILED, addr=2)

    words = words_of(fill)
    part = frame(1, 2, Source.NMI, IST_NMI, INNER, lo=IST_NMI - 16)
    value = finding(
        Rule.FRAME_CLOBBERED, 1, cause=Cause.NMI_NEVER_BLOCKED, victim=replace(VICTIM, source=Source.SOFT_INT), writer=part,
        slots=0b11000, differ=0b11000, lo=IST_NMI - 16, hi=IST_NMI,
    )  # fmt: skip
    # RIP is the victim's own, so what is wrong is RSP, and the handler is not its own.
    assert words.finding_line(value) == (
        "cpu 0, event 1: NMI, whose delivery failed, overwrote the frame of the NMI at event 0 on IST2 (16 of 40 bytes, rsp, "
        "ss): a fake NMI does not block NMIs. Still live at the end of the trace: if it is resumed from these bytes, the IRET "
        "goes to default_idle+0xc6 with rsp ffff8300bffd2f48 instead of ffff8300bffd7e98."
    )
    assert [row.slot for row in words.bytes_rows(value) if row.overwritten] == ["rsp", "ss"]
    assert "which failed, stored on IST2 [ffff8300bffd2ff0, ffff8300bffd3000), over rsp, ss of" in steps(words, value)[1][1]


def fill_gap(writer: TraceWriter) -> None:
    writer.event(Kind.SHADOW, cpu=0, arg=1, rip=0x1002)
    writer.event(Kind.SYSCALL, cpu=0, rip=0x1002, rsp=USER_RSP, cs=0x33, addr=ENTRY)
    writer.event(Kind.DELIVER, cpu=0, arg=1, source=Source.EXCEPTION, rip=ENTRY, rsp=USER_RSP, cs=CS)
    writer.event(Kind.SYSRET, cpu=0, rsp=USER_RSP, flags=EventFlag.FAULTED)


GAP_FRAME = frame(2, 1, Source.EXCEPTION, 0x7FFC_1230, replace(INNER, rip=ENTRY, rsp=USER_RSP))
GAP = finding(Rule.USER_STACK, 2, cause=Cause.RING_GAP, cause_event=1, writer=GAP_FRAME, lo=GAP_FRAME.lo, hi=GAP_FRAME.hi)
PUSHED = (
    "#DB at ffff82d040200000 was pushed at CPL 0 onto the stack that user mode left in RSP, [0x7ffc1208, 0x7ffc1230): "
)


def test_user_stack_in_the_gap_after_syscall() -> None:
    words = words_of(fill_gap)
    assert words.finding_line(GAP) == (
        f"cpu 0, event 2: {PUSHED}its gate has no IST stack, and the SYSCALL at event 1 does not load RSP."
    )
    assert [event for event, _ in steps(words, GAP)] == [1, 2]
    assert "computed: RSP is the one that user mode had" in words.evidence_text(GAP)
    faulted = words.cause(replace(GAP, cause_event=3))
    assert faulted == "its gate has no IST stack, and the SYSRET at event 3 had faulted with RSP already user mode's"


def test_user_stack_that_is_only_inferred_says_may() -> None:
    words = words_of(fill_gap)
    value = replace(GAP, cause=Cause.NONE, cause_event=None, evidence=Evidence.INFERRED)
    assert words.statement(value) == (
        "#DB at ffff82d040200000 was pushed at CPL 0 onto what may be memory of user mode, [0x7ffc1208, 0x7ffc1230): its gate "
        "has no IST stack, and RSP was close to the one last seen at CPL 3"
    )
    fred = replace(GAP, cause=Cause.NONE, writer=replace(GAP_FRAME, fred=True))
    assert "its stack level is not above the current one, and RSP was still user mode's" in words.statement(fred)


def test_user_stack_after_mov_ss() -> None:
    words = words_of(fill_gap)
    value = replace(GAP, cause=Cause.MOV_SS, cause_event=0, cause_frame=1)
    assert words.finding_line(value) == (
        f"cpu 0, event 2: {PUSHED}MOV SS at event 0 had held it back until after the SYSCALL at event 1, which does not load "
        "RSP, and its gate has no IST stack."
    )
    assert [event for event, _ in steps(words, value)] == [0, 1, 2]


def test_an_unmatched_return() -> None:
    def fill(writer: TraceWriter) -> None:
        nmi(writer)
        for _ in range(2):
            writer.event(Kind.RETURN, cpu=0, rsp=IST_NMI - 40, addr=DEFAULT_IDLE, value=OUTER.rsp or 0)

    words = words_of(fill)
    value = finding(
        Rule.UNMATCHED_RETURN, 2, consumer=2, writer=VICTIM, popped=OUTER, lo=VICTIM.lo, hi=VICTIM.hi, evidence=Evidence.RECORDED
    )
    assert words.finding_line(value) == (
        "cpu 0, event 2: IRET popped the RIP that the NMI at event 0 had stored, and went to default_idle+0xc6 with rsp "
        "ffff8300bffd7e98: that frame had been returned from before, and no open frame is there."
    )
    assert [event for event, _ in steps(words, value)] == [0, 2]
    assert steps(words, value)[0][1].endswith("; it has been returned from")


# -- FRED ---------------------------------------------------------------------------------------------------------------


def test_returns_of_fred_have_their_names() -> None:
    def fill(writer: TraceWriter) -> None:
        nmi(writer)
        nmi(writer, rip=DO_NMI)
        writer.event(Kind.RETURN, cpu=0, arg=2, rsp=0x7FC0, addr=DO_NMI, value=0x6000)

    words = words_of(fill)
    shape: dict[str, Any] = {"lo": 0x8000 - 64, "fred": True, "has_code": True, "level": 2}
    victim = frame(0, 2, Source.NMI, 0x8000, replace(OUTER, code=0), **shape)
    writer = frame(1, 2, Source.NMI, 0x8000, replace(INNER, code=0), **shape)
    value = finding(
        Rule.FRAME_CLOBBERED, 1, victim=victim, writer=writer, slots=0b111111, differ=0b01001, lo=0x8000 - 64, hi=0x8000
    )
    assert words.finding_line(value) == (
        "cpu 0, event 1: NMI overwrote the frame of the NMI at event 0 on FRED level 2 (64 bytes, error-code..ss). Still live "
        "at the end of the trace: if it is resumed from these bytes, the ERETS goes to do_nmi+2 instead of default_idle+0xc6."
    )
    eaten = replace(value, rule=Rule.FRAME_CONSUMED_CORRUPT, settled=2, consumer=2, popped=replace(INNER, code=0))
    assert words.outcome(eaten).startswith("The ERETS at event 2, the resume of event 0, went to do_nmi+2")
    assert steps(words, eaten)[-1][1].startswith("ERETS pops the frame of event 0: rip do_nmi+2")
    # Six rows of eight words: the zero and the event data have no slot. CS and SS are selectors.
    assert [(r.addr, r.slot, r.own, r.now) for r in words.bytes_rows(value)] == [
        (0x7FC0, "error-code", 0, 0), (0x7FC8, "rip", DEFAULT_IDLE, DO_NMI), (0x7FD0, "cs", CS, CS),
        (0x7FD8, "rflags", 0x206, 0x46), (0x7FE0, "rsp", OUTER.rsp, INNER.rsp), (0x7FE8, "ss", 0xE010, 0),
    ]  # fmt: skip
