"""The rows of the stack pane and the facts of the details pane: frames of FRED, stores from another stack, new state."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from samples import CLOBBER, CS, DO_NMI, INNER, IST_MC, IST_NMI, LAYOUT, OUTER, SYMBOLS, VICTIM, frame

from tracedbg.describe import Words
from tracedbg.layout import CpuTables, Fred, Layout, Region
from tracedbg.state import (
    Cause,
    CpuState,
    EventFlag,
    Evidence,
    Finding,
    Frame,
    Kind,
    Position,
    Rule,
    Shadow,
    Source,
    Stack,
    Word,
)
from tracedbg.tui.facts import event_lines
from tracedbg.tui.owners import Status
from tracedbg.tui.rows import Picture, Row, RowKind, build_picture, build_rows, in_two
from tracedbg.tui.session import StackWords, View
from tracedbg.tui.strip import cpu_summary
from tracedbg.writer import TraceWriter, build

CPU = CpuState(
    cpu=0, rip=DO_NMI, rsp=None, cs=CS, ss=0, rflags=0x46, user_rsp=None, event=0, nmi_blocked=True, nmi_pending=False,
    nmi_since=0, nmi_unblocked_by=None, nmi_unblock_frame=None, mcip=False, gap=False, tss=0, idt=0,
)  # fmt: skip
TOP = 0x48000
STACK = Stack(TOP - 0x1000, TOP, 0, 0, True, 1)


def stored(hi: int, values: list[int | None], writer: int) -> list[Word]:
    """Words from `hi` down, all by one event; None: unknown bytes."""
    by = (writer,) * 8
    return [Word(hi - 8 * n, v or 0, 0 if v is None else 0xFF, by) for n, v in enumerate(values, 1)]


def view(
    stack: Stack, memory: list[Word], frames: tuple[Frame, ...] = (), victims: tuple[Finding, ...] = (), position: int = 1,
    **cpu: Any,
) -> View:  # fmt: skip
    state = Position(position, (replace(CPU, **cpu),), (stack,), frames, len(victims))
    return View(state, 0, (StackWords(stack, tuple(sorted(memory, key=lambda w: w.addr)), ()),), victims)


def word_rows(rows: tuple[Row, ...]) -> dict[int, Row]:
    return {row.addr: row for row in rows if row.kind is RowKind.WORD and row.addr is not None}


def captions(rows: tuple[Row, ...]) -> list[str]:
    return [row.text for row in rows if row.kind is RowKind.FRAME]


def fred_words(fill: Any) -> Words:
    def whole(writer: TraceWriter) -> None:
        writer.layout = Layout(
            cpus=(CpuTables(fred=Fred(rsp=(None, None, TOP, None), config=0)),), regions=(Region(STACK.lo, TOP),)
        )
        fill(writer)

    return Words(build(whole))


FRED = frame(0, 2, Source.NMI, TOP, replace(OUTER, code=0), lo=TOP - 64, fred=True, has_code=True, level=2)
# The whole SS word: SS, bit 18 (NMI), the vector in byte 4, type 2 in byte 6; the whole CS word: CS, level 0.
FRED_VALUES = [0, None, 0x0002_0002_0004_E010, OUTER.rsp, 0x206, 0xE008, OUTER.rip, 0]
FRED_SLOTS = ["zero", "data", "ss", "rsp", "rflags", "cs", "rip", "err"]


@pytest.mark.parametrize("open_frames", [(FRED,), ()])
def test_the_words_of_a_fred_frame_have_their_slots_open_or_left(open_frames: tuple[Frame, ...]) -> None:
    words = fred_words(lambda writer: writer.event(Kind.DELIVER, cpu=0, arg=2, source=Source.NMI))
    rows = build_rows(view(STACK, stored(TOP, FRED_VALUES, 0), open_frames, fred=True, csl=2), words)
    assert rows[0].text.startswith("FRED level 2 [0x47000, 0x48000)")
    found = word_rows(rows)
    assert [found[TOP - 8 * n].slot for n in range(1, 9)] == FRED_SLOTS
    assert [found[TOP - 8 * n].edge for n in range(1, 9)] == ["│"] * 7 + ["╰"]
    assert captions(rows) == [f"NMI at event 0: {'live' if open_frames else 'left'}"]


def test_a_fred_frame_is_compared_by_what_is_known_of_its_words() -> None:
    def fill(writer: TraceWriter) -> None:
        writer.event(Kind.DELIVER, cpu=0, arg=2, source=Source.NMI)
        writer.event(Kind.DELIVER, cpu=0, arg=18, source=Source.MC)

    words = fred_words(fill)
    over = frame(1, 18, Source.MC, TOP, replace(OUTER, code=0), lo=TOP - 64, fred=True, has_code=True, level=2)
    hit = replace(
        CLOBBER, event=1, victim=FRED, writer=over, cause=Cause.NONE, cause_event=None, cause_frame=None, slots=0b111111,
        differ=0b10000, lo=TOP - 64, hi=TOP,
    )  # fmt: skip
    values = [*FRED_VALUES[:2], 0x0003_0012_0000_E010, *FRED_VALUES[3:]]  # the same context; vector 18, type 3
    found = word_rows(build_rows(view(STACK, stored(TOP, values, 1), (), (hit,), 2, fred=True), words))
    assert found[TOP - 24].status is Status.CLOBBERED and found[TOP - 24].was == "0x20000e010"
    assert (found[TOP - 48].status, found[TOP - 48].by, found[TOP - 48].was) == (Status.NONE, "event 1", "")  # CS: the same
    assert (found[TOP - 56].status, found[TOP - 56].by) == (Status.NONE, "event 1")  # RIP too
    assert found[TOP - 16].was == "?"  # the event data of the victim is in no Frame


@pytest.mark.parametrize(("kind", "first"), [(0, TOP - 64), (1, TOP - 56), (2, TOP - 56)])
def test_a_return_takes_five_words_and_eret_skips_the_error_code(kind: int, first: int) -> None:
    words = fred_words(lambda writer: writer.event(Kind.RETURN, cpu=0, arg=kind, rsp=TOP - 64, addr=DO_NMI))
    found = word_rows(build_rows(view(STACK, stored(TOP, FRED_VALUES, 0), (), fred=True), words))
    assert sorted(addr for addr, row in found.items() if row.taken) == [first + 8 * n for n in range(5)]


def ist_words(fill: Any) -> Words:
    def whole(writer: TraceWriter) -> None:
        writer.layout, writer.symbols = LAYOUT, SYMBOLS
        fill(writer)

    return Words(build(whole))


def test_a_frame_that_a_store_overwrote_says_so_while_it_is_live() -> None:
    def fill(writer: TraceWriter) -> None:
        writer.event(Kind.DELIVER, cpu=0, arg=18, source=Source.MC)
        writer.event(Kind.WRITE, cpu=0, rsp=IST_MC - 8, addr=IST_MC - 8, arg=8, value=0x1234)

    words = ist_words(fill)
    victim = frame(0, 18, Source.MC, IST_MC, OUTER)
    stack = Stack(IST_MC - 0x1000, IST_MC, 0, 1, True, 1)
    memory = [*stored(IST_MC, [0x1234], 1), *stored(IST_MC - 8, [OUTER.rsp, 0x206, CS, OUTER.rip], 0)]
    push = replace(
        CLOBBER, rule=Rule.NEIGHBOUR_OVERWRITE, raised_rule=Rule.NEIGHBOUR_OVERWRITE, evidence=Evidence.RECORDED, event=1,
        victim=victim, writer=None, cause=Cause.NONE, cause_event=None, cause_frame=None, slots=0b10000, differ=0b10000,
        lo=IST_MC - 8, hi=IST_MC,
    )  # fmt: skip
    rows = build_rows(view(stack, memory, (victim,), (push,), 2), words)
    assert captions(rows) == ["#MC at event 0: live, OVERWRITTEN by event 1"]
    ss = word_rows(rows)[IST_MC - 8]
    assert (ss.status, ss.was, ss.by, ss.slot) == (Status.CLOBBERED, "0xe010", "event 1", "ss")
    assert word_rows(rows)[IST_MC - 16].status is Status.NONE
    closed = build_rows(view(stack, memory, (), (push,), 2), words)
    assert captions(closed) == ["#MC at event 0: OVERWRITTEN by event 1"]


def test_a_window_is_no_overwrite() -> None:
    words = ist_words(lambda writer: writer.event(Kind.DELIVER, cpu=0, arg=2, source=Source.NMI))
    window = replace(
        CLOBBER, rule=Rule.REENTRY_WINDOW, raised_rule=Rule.REENTRY_WINDOW, event=0, writer=None, slots=0, differ=0
    )
    stack = Stack(IST_NMI - 0x1000, IST_NMI, 0, 2, True, 1)
    memory = stored(IST_NMI, [0xE010, OUTER.rsp, 0x206, CS, OUTER.rip], 0)
    rows = build_rows(view(stack, memory, (VICTIM,), (window,)), words)
    assert captions(rows) == ["NMI at event 0: live"]


def test_what_a_failed_delivery_stored_is_no_frame_that_was_left() -> None:
    words = ist_words(lambda writer: writer.event(Kind.DELIVER, cpu=0, arg=2, source=Source.NMI, flags=EventFlag.FAILED, addr=2))
    stack = Stack(IST_NMI - 0x1000, IST_NMI, 0, 2, True, 0)
    rows = build_rows(view(stack, stored(IST_NMI, [0, INNER.rsp], 0)), words)
    assert captions(rows) == ["NMI at event 0: not delivered"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, ""),
        ({"mce": True, "gif": True, "tpr": 0, "kernel_gs": True, "tokens_known": 14}, ""),  # as on most CPUs
        ({"mce": False, "gif": False, "tpr": 0x10}, " · MCE 0 · GIF 0 · TPR 0x10"),
        ({"fred": True, "csl": 3}, " · FRED level 3"),
        ({"fred": True}, " · FRED level ?"),
        ({"kernel_gs": False}, " · GS user's"),
        ({"kernel_gs": False, "cs": 0x33}, ""),
        ({"ring_gap": 4}, " · in the SYSCALL gap"),
        ({"tokens_known": 14, "tokens_busy": 0b1010}, " · token IST1 IST3 busy"),
        ({"shadow": Shadow.MOV_SS, "smm": True, "guest": True}, " · MOV SS shadow · SMM · guest"),
    ],
)
def test_the_title_has_what_is_unusual(change: dict[str, Any], text: str) -> None:
    cpl = 3 if change.get("cs") else 0
    assert cpu_summary(replace(CPU, **change)) == f"cpu 0 · CPL {cpl} · IF 0 · NMIs blocked since 0 · MCIP 0{text}"


@pytest.mark.parametrize(
    ("kind", "fields", "lines"),
    [
        (Kind.DELIVER, {"arg": 2, "source": 2, "flags": 1, "addr": 3}, ["words saved 3"]),
        (Kind.DELIVER, {"arg": 14, "source": 1, "code": 2, "value": 0x7000}, ["cr2         0x7000", "error code  0x2"]),
        (Kind.DELIVER, {"arg": 14, "source": 4, "code": 2}, ["length      0x2"]),
        (Kind.DELIVER, {"arg": 1, "source": 9, "code": 2}, ["length      0x2"]),
        (Kind.RETURN, {"arg": 2, "code": 4, "addr": 0x1000}, ["popped rip  0x1000", "ss bits 16+ 0x4"]),
        (Kind.SYSCALL, {"rip": 0x1000, "addr": 0x4000}, ["at          0x1000", "new rip     0x4000"]),
        (Kind.SHADOW, {"arg": 0, "rip": 0x1002}, ["covers      0x1002"]),
        (Kind.TOKEN, {"arg": 2, "addr": 0x9FF8, "code": 1, "value": 0}, ["token at    0x9ff8", "holds       0x0"]),
        (Kind.TOKEN, {"arg": 2, "code": 1}, ["held        0x1", "ist         0x2"]),
        (Kind.VMEXIT, {"arg": 1, "code": 0x61}, ["reason      0x61"]),
        (Kind.RAISE, {"arg": 18, "source": 5}, ["vector      0x12"]),
    ],
)
def test_fields_are_called_what_they_are(kind: Kind, fields: dict[str, int], lines: list[str]) -> None:
    trace = build(lambda writer: writer.event(kind, cpu=0, **fields))
    said = event_lines(trace.event(0), Words(trace), 0)
    assert [line for line in lines if f"  {line}" not in said] == []


# -- the picture ----------------------------------------------------------------------------------------------------------


def overwritten() -> Picture:
    """The NMI of event 3 lies over the frame of that of event 0; CS is the same in both."""

    def fill(writer: TraceWriter) -> None:
        for vector, source in ((2, Source.NMI), (18, Source.MC), (3, Source.SOFT_INT), (2, Source.NMI)):
            writer.event(Kind.DELIVER, cpu=0, arg=vector, source=source)

    values: list[int | None] = [0, INNER.rsp, 0x46, CS, INNER.rip]
    newest = frame(3, 2, Source.NMI, IST_NMI, INNER, victim=0)
    stack = Stack(IST_NMI - 0x1000, IST_NMI, 0, 2, True, 1)
    shown = view(stack, stored(IST_NMI, values, 3), (newest,), (CLOBBER,), 4)
    return build_picture(shown, ist_words(fill))


def test_in_two_lines_the_old_value_stands_below_the_new_one() -> None:
    rows = overwritten().stacks[0].rows
    split = [r for r in in_two(rows) if r.kind in (RowKind.WORD, RowKind.WAS)]
    assert [r.kind.value for r in split] == ["word", "was", "word", "was", "word", "was", "word", "word", "was"]  # CS: the same
    assert [r.old for r in split if r.kind is RowKind.WAS] == [
        f"{v:016x}" for v in (OUTER.ss, OUTER.rsp, OUTER.rflags, OUTER.rip) if v is not None
    ]
    new, old = split[-2:]
    assert (new.value, new.name, new.was, new.writer) == (f"{DO_NMI:016x}", "do_nmi+2", "", 3)
    assert (old.name, old.by, old.writer, old.status) == ("default_idle+0xc6", "event 3", 0, Status.CLOBBERED)
    kept = [(r.kind, r.addr) for r in in_two(rows) if r.kind is not RowKind.WAS]
    assert kept == [(r.kind, r.addr) for r in rows]


def test_a_word_that_changed_shows_what_it_held() -> None:
    words = ist_words(lambda writer: writer.event(Kind.WRITE, cpu=0, addr=TOP - 8, arg=1, value=2))
    shown = view(STACK, [Word(TOP - 8, 0x1102, 0b11, (0, *(None,) * 7))])
    shown = replace(shown, stacks=(replace(shown.stacks[0], before=(Word(TOP - 8, 0x1101, 0xFF, (None,) * 8),)),))
    row = word_rows(build_rows(shown, words))[TOP - 8]
    assert (row.changed, row.value, row.was, row.old) == (True, "????????????1102", "0x1101", "0000000000001101")


def test_code_addresses_outside_of_frames_have_symbols() -> None:
    words = ist_words(lambda writer: writer.event(Kind.MARK, cpu=0))
    found = word_rows(build_rows(view(STACK, stored(TOP, [DO_NMI, 0x1234, None], 0)), words))
    assert [found[TOP - 8 * n].name for n in (1, 2, 3)] == ["do_nmi+2", "", ""]


@pytest.mark.parametrize(
    ("change", "rsp", "fold", "text"),
    [
        ({}, None, "··· 510 words unknown", "bottom 0000000000047000"),
        ({}, TOP - 8, "··· 510 words unknown", "bottom 0000000000047000, 4,088 bytes below RSP"),
        ({"assumed": True}, None, "··· 510 words unknown", "assumed bottom 0000000000047000 (a usual size)"),
        ({"lo": TOP - 0x20000, "hi": TOP}, None, "··· 16382 words not shown", f"bottom {TOP - 0x20000:016x}"),
        ({"lo": TOP - 16}, None, None, "bottom 0000000000047ff0"),
        ({"named": False}, None, None, "where this stack ends is not known"),
    ],
)
def test_below_the_last_word_is_the_bottom(change: dict[str, Any], rsp: int | None, fold: str | None, text: str) -> None:
    stack = replace(STACK, **change)
    memory = stored(TOP, [1, 2], 0)
    words = ist_words(lambda writer: writer.event(Kind.MARK, cpu=0))
    rows = build_rows(view(stack, memory, rsp=rsp), words)
    assert (rows[-1].kind, rows[-1].text) == (RowKind.BOTTOM, text)
    assert (rows[-2].text if rows[-2].kind is RowKind.FOLD else None) == fold


def test_runs_of_equal_words_fold_but_not_what_changed() -> None:
    words = ist_words(lambda writer: writer.event(Kind.MARK, cpu=0))
    memory = stored(TOP, [7, *(0xCC,) * 6, 8], 0)
    shown = view(STACK, memory, position=2)
    quiet = replace(shown, stacks=(replace(shown.stacks[0], before=shown.stacks[0].words),))
    folds = [r.text for r in build_rows(quiet, words) if r.kind is RowKind.FOLD]
    assert folds == ["··· 6 words 0xcc", "··· 504 words unknown"]
    assert [r.text for r in build_rows(shown, words) if r.kind is RowKind.FOLD] == ["··· 504 words unknown"]


def test_stacks_have_fixed_places_beside_each_other() -> None:
    words = ist_words(lambda writer: writer.event(Kind.MARK, cpu=0))
    stacks = [Stack(0x10000 * n, 0x10000 * n + 0x1000, 0, slot, True, 0) for n, slot in enumerate((3, 8, 1, 0), 1)]
    entries = tuple(StackWords(s, tuple(stored(s.hi, [1], 0)), ()) for s in stacks)
    state = Position(1, (replace(CPU, rsp=0x10800),), tuple(stacks), (), 0)
    picture = build_picture(View(state, 0, entries, ()), words)
    assert picture.stacks[0].stack.slot == 3 and picture.stacks[0].here  # RSP is there: it matters most
    assert [s.stack.slot for s in sorted(picture.stacks, key=lambda s: s.place)] == [8, 0, 1, 3]


@pytest.mark.parametrize(
    ("rsp", "said"),
    [(0x7000, "no frame is open, and RSP lies on no known stack"), (None, "no frame is open, and RSP is not known")],
)
def test_without_any_stack_the_pane_says_why_it_is_empty(rsp: int | None, said: str) -> None:
    nothing = View(Position(1, (replace(CPU, rsp=rsp),), (), (), 0), 0, (), ())
    with build(lambda w: setattr(w, "layout", LAYOUT)) as trace:
        assert [row.text for row in build_rows(nothing, Words(trace))] == [said]
