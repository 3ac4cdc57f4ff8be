"""Travel in time as the user does it: keys in, text of the screen out; goals of `:`; the file of marks."""

from __future__ import annotations

import asyncio
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from samples import CS, DEFAULT_IDLE, DO_NMI, IST_NMI, LAYOUT, NMI_RSP, SS, SYMBOLS, TASK_RSP, race, write_race
from test_tui import Screen, drive

from tracedbg.describe import Words
from tracedbg.errors import UsageError
from tracedbg.filter import Filter
from tracedbg.replay import Replay
from tracedbg.state import Kind, Known, Source
from tracedbg.symbols import Symbols
from tracedbg.trace import Trace
from tracedbg.tui import markfile
from tracedbg.tui.app import TraceApp
from tracedbg.tui.goto import Place, address_range, parse_goto
from tracedbg.tui.journeys import FindMatch, FindTime
from tracedbg.tui.jumps import JumpList
from tracedbg.tui.markfile import Marks
from tracedbg.tui.session import SourceSearch
from tracedbg.tui.shot import settle
from tracedbg.writer import TraceWriter, build


def status(screen: Screen) -> str:
    """The line that says what happened."""
    return str(screen.app.query_one("#status").render())


async def at(screen: Screen, event: int, *keys: str) -> int:
    """Where keys lead from an event."""
    await screen.goto(str(event))
    await screen.press(*keys)
    return screen.app.selected


# -- frames -------------------------------------------------------------------------------------------------------------
# The race: 0 NMI, 1 #MC in it, 2 its IRET, 3 NMI over the frame of 0, 4 IRET of 3, 5 IRET through the frame of 0, 6 ... the loop.


def test_over_the_handler_to_its_return() -> None:
    async def script(screen: Screen) -> None:
        assert await at(screen, 1, "o") == 2 and "IRET from #MC@1" in status(screen)
        assert await at(screen, 3, "o") == 4 and "IRET from NMI@3" in status(screen)
        assert await at(screen, 0, "o") == 5 and "IRET from NMI@0" in status(screen)
        assert await at(screen, 2, "o") == 3  # a step, as nothing is called

    drive(race(6), script)


def test_out_of_the_handler_and_back_to_its_delivery() -> None:
    async def script(screen: Screen) -> None:
        assert await at(screen, 1, "O") == 5  # #MC came in the handler of 0
        assert await at(screen, 2, "O") == 5  # after the IRET that handler goes on
        assert await at(screen, 4, "O") == 5
        assert await at(screen, 0, "O") == 0 and "no handler runs here" in status(screen)
        assert await at(screen, 2, "u") == 1 and "#MC@1: its delivery" in status(screen)
        assert await at(screen, 1, "u") == 0 and "NMI@0: its delivery" in status(screen)
        assert await at(screen, 3, "u") == 0
        assert await at(screen, 4, "u") == 3
        assert await at(screen, 0, "u") == 0 and "no handler runs here" in status(screen)

    drive(race(6), script)


def test_a_frame_that_never_ends_is_said() -> None:
    async def script(screen: Screen) -> None:
        assert await at(screen, 3, "o") == 3 and "NMI@3 has not ended when the trace does" in status(screen)
        assert await at(screen, 2, "O") == 2 and "NMI@0 has not ended when the trace does" in status(screen)

    drive(race(), script)


def test_the_events_of_a_frame() -> None:
    async def script(screen: Screen) -> None:
        assert await at(screen, 0, "p") == 3 and "NMI stored over the frame of NMI@0" in status(screen)
        assert await screen.press("p") and screen.app.selected == 4
        assert "IRET popped words of the frame of NMI@0" in status(screen)  # those that 3 had left there
        assert await screen.press("p") and screen.app.selected == 5 and "IRET from NMI@0" in status(screen)
        assert await screen.press("p") and screen.app.selected == 5
        assert "no further event of the frame of NMI@0" in status(screen)
        assert await screen.press("P", "P", "P") and screen.app.selected == 0
        assert "no earlier event of the frame of NMI@0" in await screen.press("P")
        # From elsewhere it is the frame that the event stored, ended or runs in.
        assert await at(screen, 3, "p") == 4 and "IRET from NMI@3" in status(screen)
        assert await at(screen, 2, "P") == 1 and "#MC@1: its delivery" in status(screen)

    drive(race(6), script)


def fill_left(writer: TraceWriter) -> None:
    """Returns are not recorded: that the NMI came where the #MC had been shows that it was left."""
    writer.layout = LAYOUT
    inner = {"cpu": 0, "rip": DO_NMI, "rsp": NMI_RSP, "rflags": 0x46, "cs": CS, "ss": 0}
    writer.event(Kind.DELIVER, cpu=0, rip=DEFAULT_IDLE, rsp=TASK_RSP, rflags=0x206, cs=CS, ss=SS, arg=2, source=Source.NMI)
    writer.event(Kind.DELIVER, arg=18, source=Source.MC, **inner)
    writer.event(Kind.DELIVER, arg=3, source=Source.EXCEPTION, **inner)  # no gate: not placed
    writer.event(Kind.GAP, cpu=0)
    writer.event(Kind.MARK)


def test_ends_without_a_return_are_told_as_what_they_are() -> None:
    async def script(screen: Screen) -> None:
        assert await at(screen, 1, "o") == 2 and "no return from #MC@1 is recorded: this event shows" in status(screen)
        assert await at(screen, 0, "o") == 3 and "records are lost here: what became of NMI@0" in status(screen)
        assert await at(screen, 2, "o") == 2 and "its frame could not be placed" in status(screen)
        assert await at(screen, 4, "o", "O", "u", "p") == 4 and "not known which CPU" in status(screen)

    drive(build(fill_left), script)


# -- words --------------------------------------------------------------------------------------------------------------


def test_writer_and_reader_of_the_word_in_hand() -> None:
    async def script(screen: Screen) -> None:
        assert await at(screen, 3, "r") == 4 and "IRET pops it" in status(screen)
        assert await at(screen, 4, "r") == 5
        assert await at(screen, 4, "w") == 3
        await screen.goto("9")
        assert f"no further reader of {IST_NMI - 8:x}" in await screen.press("r")

    drive(race(6), script)


def test_write_history_lists_who_stored_what_and_jumps() -> None:
    async def script(screen: Screen) -> None:
        await screen.goto("5")
        text = await screen.press("W")
        assert f"Writes of {IST_NMI - 8:x}: 2" in text  # the uppermost of the words that the IRET pops
        assert "at default_idle+0xc6" in screen.line(f"{SS:016x}") and "▶ " in screen.line(f"  3  {0:016x}")
        await screen.press("k", "enter")
        assert screen.app.selected == 0
        await screen.goto("5")
        await screen.press("W", "escape")
        assert screen.app.selected == 5 and "event 5 of 10" in screen.text()
        screen.app.query_one("#stacks").focus()
        assert "the cursor of the stack pane is on no word" in await screen.press("g", "W")
        assert "on no word" in await screen.press("r")
        assert f"Writes of {IST_NMI - 8:x}: 2" in await screen.press("j", "W")  # the caption of a frame: its first word

    drive(race(6), script)


def test_write_history_says_which_stores_changed_nothing() -> None:
    def fill(writer: TraceWriter) -> None:
        writer.layout = LAYOUT
        for value in (1, 1, 2):
            writer.event(Kind.WRITE, cpu=0, addr=IST_NMI - 8, arg=8, value=value, rsp=IST_NMI - 8)
        writer.event(Kind.SETSP, cpu=0, value=IST_NMI - 8)

    async def script(screen: Screen) -> None:
        text = await screen.press("G", "W")
        lines = [line for line in text.splitlines() if "  000000000000000" in line]
        assert len(lines) == 3 and ["same value" in line for line in lines] == [False, True, False]

    drive(build(fill), script)


# -- run to -------------------------------------------------------------------------------------------------------------


async def run_to(screen: Screen, text: str) -> int:
    await screen.pilot.press("R")
    await screen.pilot.pause()
    screen.app.screen.query_one("Input").value = text  # type: ignore[attr-defined]
    await screen.press("enter")
    return screen.app.selected


def test_run_to() -> None:
    async def script(screen: Screen) -> None:
        await screen.goto("0")
        assert await run_to(screen, "2") == 2
        assert await run_to(screen, "1") == 2 and "event 1 lies behind" in status(screen)
        assert await run_to(screen, f"write {IST_NMI - 40:#x}") == 3 and "NMI stores it" in status(screen)
        assert await run_to(screen, f"write {IST_NMI - 40:#x}") == 3 and "no further store of" in status(screen)
        assert await run_to(screen, f"read {IST_NMI - 40:#x}") == 4
        assert await run_to(screen, "return") == 5
        assert await run_to(screen, "do_nmi") == 5 and "no further event at do_nmi" in status(screen)
        assert await at(screen, 0) == 0 and await run_to(screen, "do_nmi") == 1
        assert await run_to(screen, "write nowhere") == 1 and "needs an address" in status(screen)
        assert await run_to(screen, "finding 2") == 3
        assert await run_to(screen, "here") == 4
        await screen.pilot.press("R")
        await screen.press("escape")
        assert screen.app.selected == 4

    drive(race(6), script)


# -- history of positions -----------------------------------------------------------------------------------------------


def test_back_and_forward_in_the_history() -> None:
    async def script(screen: Screen) -> None:
        for event in ("1", "5", "8"):
            await screen.goto(event)
        assert await screen.press("backspace") and screen.app.selected == 5
        assert await screen.press("ctrl+o") and screen.app.selected == 1
        assert await screen.press("ctrl+n") and screen.app.selected == 5
        assert await screen.press("ctrl+n") and screen.app.selected == 8
        assert "no jump to go forward to" in await screen.press("ctrl+n")
        assert await screen.press("backspace", "backspace") and screen.app.selected == 1
        await screen.goto("2")  # a jump from there forgets what lay ahead
        assert "no jump to go forward to" in await screen.press("ctrl+n")
        assert await screen.press("backspace") and screen.app.selected == 1

    drive(race(6), script)


# -- goals of the prompt ------------------------------------------------------------------------------------------------

SPANS = Symbols([(0x1000, 0x1100, "do_nmi"), (0x2000, 0x2010, "ret+1")])
HERE = Place(count=1000, selected=500, cpus=4, clock_hz=1_000_000, began=7_000, symbols=SPANS)


def code(lo: int, hi: int) -> tuple[Filter, ...]:
    return (Filter(ranges=((lo, hi),), fields=Known.RIP),)


@pytest.mark.parametrize(
    ("text", "goal"),
    [
        ("12", 12), ("1,2", 12), ("0x10", 16), ("start", 0), ("end", 999), ("50%", 500), ("100%", 999), ("0.1 %", 1),
        ("+100", 600), ("- 100", 400), ("+501", 999), ("-501", 0), ("#571", SourceSearch(571)),
        ("t 7100", FindTime(7100)), ("t 0.1ms", FindTime(7100)), ("t 1.2ms", FindTime(8200)), ("T 3 s", FindTime(3_007_000)),
        ("t 1ns", FindTime(7001)), ("t 100us", FindTime(7100)),
    ],
)  # fmt: skip
def test_goals(text: str, goal: object) -> None:
    assert parse_goto(text, HERE) == goal


@pytest.mark.parametrize(
    ("text", "lo", "hi"),
    [
        ("do_nmi", 0x1000, 0x1100), ("do_nmi+0x12", 0x1012, 0x1013), ("do_nmi+2", 0x1002, 0x1003), ("ret+1", 0x2000, 0x2010),
        ("@0x10", 0x10, 0x11), ("@10", 0x10, 0x11), ("0xffff82d04032a242", DO_NMI, DO_NMI + 1),
        ("FFFF82D04032A242", DO_NMI, DO_NMI + 1),
    ],
)  # fmt: skip
def test_goals_that_are_code(text: str, lo: int, hi: int) -> None:
    goal = parse_goto(text, HERE)
    assert isinstance(goal, FindMatch) and (goal.start, goal.filters, goal.wrap) == (501, code(lo, hi), True)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("1000", "past the last one, 999"), ("101%", "past the end"), ("finding 1", "no finding 1"), ("cpu 4", "the trace has 4"),
        ("t 1.5", "without a unit"), ("nowhere", "cannot go to 'nowhere'"), ("do_nmi+0x100", "cannot go to"),
        ("\x1b[31m", r"'\?\[31m'"),
    ],
)  # fmt: skip
def test_goals_that_are_none(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        parse_goto(text, HERE)


def test_a_time_in_seconds_needs_a_clock() -> None:
    with pytest.raises(UsageError, match="give ticks"):
        parse_goto("t 1s", Place(count=10))
    assert parse_goto("t 5", Place(count=10)) == FindTime(5)
    with pytest.raises(UsageError, match="no events"):
        parse_goto("1", Place(count=0))
    assert address_range("do_nmi", None) is None


def test_goals_that_are_searched_for() -> None:
    def fill(writer: TraceWriter) -> None:
        writer.symbols = SYMBOLS
        for n, rip in enumerate((DEFAULT_IDLE, DO_NMI, 0x5000, DEFAULT_IDLE)):
            writer.event(Kind.DELIVER, cpu=n % 2, rip=rip, time=1000 + 500 * n, arg=32, source=Source.FIXED)

    data = io.BytesIO()
    with TraceWriter(data, cpus=3, clock_hz=1_000_000) as writer:
        fill(writer)
    trace = Trace.from_bytes(data.getvalue(), "times.tdbg")

    async def script(screen: Screen) -> None:
        async def goes(text: str) -> int:
            await screen.goto(text)
            return screen.app.selected

        await screen.goto("0")
        assert await goes("default_idle") == 3
        assert await goes("default_idle") == 0 and "from the beginning on" in status(screen)
        assert await goes("0x5000") == 2
        assert await goes("0x6000") == 2 and "no event at 0x6000" in status(screen)
        assert await goes("t 0.4ms") == 1
        assert await goes("t 1ms") == 2
        assert await goes("t 2500") == 3
        assert await goes("t 1h") == 3 and "cannot go to" in status(screen)
        assert await goes("t 9s") == 3 and "no event at that time or later" in status(screen)
        assert await goes("cpu 0") == 0 and await goes("cpu 0") == 2 and await goes("cpu 1") == 3
        assert await goes("cpu 2") == 3 and "no event of CPU 2" in status(screen)

    drive(trace, script)


# -- long ways ----------------------------------------------------------------------------------------------------------


class SlowReplay(Replay):
    """Needs a while for every step of a journey."""

    def watch(self, *args: Any, **options: Any) -> Any:
        time.sleep(0.02)
        return super().watch(*args, **{**options, "limit": 1}) if self.position < 5 else ()


def test_a_long_journey_says_so_and_can_be_stopped() -> None:
    async def run() -> None:
        with race(6) as trace:
            app = TraceApp(trace, Words(trace), open_replay=lambda: SlowReplay(trace), start=1)
            async with app.run_test(size=(120, 36)) as pilot:
                screen = Screen(app, pilot)
                await settle(app, pilot)
                await pilot.press("o")
                await asyncio.sleep(0.6)
                await pilot.pause()
                assert "looking for the end of NMI@0 ..." in status(screen) and "Esc stops" in status(screen)
                await screen.press("escape")
                assert "stopped" in status(screen) and app.selected == 0
                assert "event 0 of 10" in screen.text()
                await pilot.press("o")
                await screen.press("j")  # any other wish ends it too
                assert app.selected == 1
                await asyncio.sleep(0.5)
                assert app.selected == 1 and "looking" not in status(screen)

    asyncio.run(run())


# -- marks --------------------------------------------------------------------------------------------------------------


def file_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.marks.json")


async def mark(screen: Screen, note: str) -> None:
    await screen.pilot.press("m")
    await screen.pilot.pause()
    screen.app.screen.query_one("Input").value = note  # type: ignore[attr-defined]
    await screen.press("enter")


def test_marks_are_kept_beside_the_trace(tmp_path: Path) -> None:
    path = tmp_path / "race.tdbg"
    write_race(path, returns=6)

    async def first(screen: Screen) -> None:
        assert "no marks" in await screen.press("M")
        await screen.goto("7")
        await mark(screen, "here the loop turns for good")
        assert "[mark here the l…]" in screen.text()
        await screen.goto("2")
        await mark(screen, "")
        assert "[cause, mark] IRET" in screen.line("▶! 2 ")

    async def second(screen: Screen) -> None:
        text = await screen.press("M")
        assert "Marks (2)" in text and "here the loop turns" in text and "d removes" in text
        await screen.press("G", "enter")
        assert screen.app.selected == 7
        assert "mark cleared" in await screen.press("m")
        assert "Marks (1)" in await screen.press("M")
        assert "Marks (0)" in await screen.press("d")
        await screen.press("escape")

    drive(Trace.open(str(path)), first)
    content = json.loads(file_of(path).read_text())
    assert content["marks"] == [{"event": 2, "note": ""}, {"event": 7, "note": "here the loop turns for good"}]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    drive(Trace.open(str(path)), second)
    assert not file_of(path).exists()


def test_marks_of_another_trace_are_said_and_left_alone(tmp_path: Path) -> None:
    path, other = tmp_path / "race.tdbg", tmp_path / "other.tdbg"
    write_race(path)
    write_race(other, returns=3)
    with Trace.open(str(other)) as trace:
        marks = Marks(trace)
        marks.set(1, "x")
        assert not marks.problem
    data = file_of(other).read_bytes()
    file_of(path).write_bytes(data)

    async def script(screen: Screen) -> None:
        assert "belongs to another trace" in status(screen) and "marks live until the viewer ends" in status(screen)
        await mark(screen, "mine")
        assert "marked; marks live until the viewer ends" in status(screen)
        assert "belongs to another trace" in await screen.press("M")

    drive(Trace.open(str(path)), script, size=(200, 40))
    assert file_of(path).read_bytes() == data


def test_marks_survive_the_growth_of_their_trace(tmp_path: Path) -> None:
    path = tmp_path / "race.tdbg"
    write_race(path)
    with Trace.open(str(path)) as trace:
        Marks(trace).set(3, "x")
    path.unlink()
    write_race(path, returns=5)
    with Trace.open(str(path)) as trace:
        assert Marks(trace).notes == {3: "x"}


def test_digest_is_of_the_events() -> None:
    with race() as a, race() as b, race(1) as longer:
        assert markfile.digest(a, 4) == markfile.digest(b, 4) == markfile.digest(longer, 4)
        assert len({markfile.digest(longer, n) for n in range(6)}) == 6


def test_marks_that_cannot_be_written_live_for_the_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "race.tdbg"
    write_race(path)

    def refuse(target: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(markfile, "create_beside", refuse)
    with Trace.open(str(path)) as trace:
        marks = Marks(trace)
        marks.set(1, "a")
        assert "not written" in marks.problem and "permission denied" in marks.problem
        marks.set(2, "b\x1b[0m")
        assert marks.notes == {1: "a", 2: "b?[0m"}
        monkeypatch.setattr(markfile, "MAX_MARKS", 2)
        with pytest.raises(UsageError, match="limit"):
            marks.set(3, "c")
    assert not file_of(path).exists()


def good() -> dict[str, Any]:
    with race() as trace:
        return {"schema": markfile.SCHEMA, "version": 1, "events": 4, "digest": markfile.digest(trace, 4), "marks": []}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"schema": "x"}, "not a file of marks"), ({"version": 2}, "another version"), ({"events": 5}, "another trace"),
        ({"events": True}, "another trace"), ({"digest": 3}, "another trace"), ({"marks": 3}, "no list"),
        ({"marks": [{"event": 4, "note": ""}]}, "mark 0"), ({"marks": [{"event": -1, "note": ""}]}, "mark 0"),
        ({"marks": [{"event": 1}]}, "mark 0"), ({"marks": [7]}, "mark 0"), (None, "is not JSON"), ([], "not a file of marks"),
    ],
)  # fmt: skip
def test_damaged_files_of_marks_are_said(tmp_path: Path, change: Any, why: str) -> None:
    path = tmp_path / "race.tdbg"
    write_race(path)
    text = "{" * 100_000 if change is None else json.dumps({**good(), **change} if isinstance(change, dict) else change)
    file_of(path).write_text(text)
    with Trace.open(str(path)) as trace:
        marks = Marks(trace)
        assert why in marks.problem and marks.is_wrong and "race.tdbg.marks.json" in marks.problem
        assert marks.notes == {}


def test_places_that_are_no_file_for_marks(tmp_path: Path) -> None:
    path = tmp_path / "race.tdbg"
    write_race(path)
    file_of(path).mkdir()
    with Trace.open(str(path)) as trace:
        assert "is a directory" in Marks(trace).problem
    with race() as trace:  # no file of that name
        marks = Marks(trace)
        marks.set(0, "x")
        assert "not a file" in marks.problem and not marks.is_wrong


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    path, real = tmp_path / "race.tdbg", tmp_path / "elsewhere.json"
    write_race(path)
    real.write_text(json.dumps(good()))
    file_of(path).symlink_to(real)
    with Trace.open(str(path)) as trace:
        Marks(trace).set(2, "x")
    assert file_of(path).is_symlink() and json.loads(real.read_text())["marks"] == [{"event": 2, "note": "x"}]


def test_lists_on_a_small_screen() -> None:
    async def script(screen: Screen) -> None:
        await screen.goto("5")
        text = await screen.press("W")
        assert "Writes of" in text and "Enter jumps" in text
        assert screen.app.screen.query_one(JumpList).count == 2
        await screen.press("question_mark", "q")
        assert screen.app.is_running and len(screen.app.screen_stack) == 1

    drive(race(6), script, size=(80, 24))
