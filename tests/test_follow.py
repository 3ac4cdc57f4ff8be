"""Traces that grow: the core with a longer array, the copy of a file that is being written, and the viewer on it."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from randtrace import plan_of, random_trace
from samples import LAYOUT, fill_race, write_race
from test_tui import Screen

from tracedbg import wire
from tracedbg.describe import Words
from tracedbg.errors import FormatError, ReplayError, UsageError
from tracedbg.growing import Change, Growing
from tracedbg.layout import Layout
from tracedbg.replay import Replay
from tracedbg.state import Kind, Position, Stats
from tracedbg.trace import Trace
from tracedbg.tui.app import TraceApp
from tracedbg.tui.shot import settle
from tracedbg.tui.timeline import TimelineBar
from tracedbg.writer import TraceWriter, build

SIZE = wire.EVENT_SIZE


# -- the core ----------------------------------------------------------------------------------------------------------


def all_of(replay: Replay) -> tuple[object, Stats, list[tuple[int, Position]]]:
    """Findings, counters, and the state at every position."""
    replay.scan_all()
    states = []
    for position in range(replay.count + 1):
        replay.seek(position)
        states.append((replay.digest(), replay.state()))
    return replay.findings(), replay.stats(), states


@pytest.mark.parametrize("seed", range(12))
def test_a_trace_that_came_in_pieces_replays_as_the_whole(seed: int) -> None:
    with random_trace(plan_of(seed)) as trace:
        whole = trace.events
        with Replay(trace, snapshot_interval=16) as replay:
            expected = all_of(replay)
        # Each piece in memory of its own, so that nobody reads the one before.
        cuts = sorted({0, *(trace.count * n // 5 for n in range(1, 5)), trace.count})
        trace.events = memoryview(bytes(whole[:0]))
        with Replay(trace, snapshot_interval=16) as replay:
            for n, cut in enumerate(cuts):
                trace.events = memoryview(bytes(whole[: cut * SIZE]))
                replay.extend()
                assert replay.count == cut
                if n % 2:
                    replay.scan_all()
                    replay.seek(cut // 2)
                else:
                    replay.scan(cut // 3)
            got = all_of(replay)
        trace.events = whole
    assert got[0] == expected[0]
    assert got[2] == expected[2]
    assert got[1] == expected[1]


def test_extending_moves_neither_scan_nor_view() -> None:
    with build(fill_race) as trace:
        whole = trace.events
        trace.events = whole[: 3 * SIZE]
        with Replay(trace) as replay:
            replay.scan_all()
            replay.seek(2)
            digest = replay.digest()
            trace.events = whole
            replay.extend()
            assert (replay.scanned, replay.position, replay.count) == (3, 2, 4)
            assert replay.digest() == digest
            replay.seek(4)
            assert replay.scanned == 4 and replay.findings()  # the overwrite is event 3


@pytest.mark.parametrize("change", ["shorter", "first", "last"])
def test_core_refuses_other_events(change: str) -> None:
    with build(fill_race) as trace:
        whole = trace.events
        records = bytearray(whole)
        if change == "shorter":
            del records[-SIZE:]
        else:
            records[0 if change == "first" else -1] ^= 1
            records += bytes(whole[:SIZE])
        with Replay(trace) as replay:
            trace.events = memoryview(bytes(records))
            with pytest.raises(ReplayError, match="invalid argument"):
                replay.extend()
            trace.events = whole
            assert replay.count == 4
            replay.scan_all()  # it still has its own
            replay.seek(4)


# -- a file that is being written ----------------------------------------------------------------------------------------


def writer_of(path: Path) -> TraceWriter:
    writer = TraceWriter(path, atomic=False)
    writer.layout = LAYOUT
    return writer


def marks(writer: TraceWriter, count: int) -> None:
    """Events that all differ."""
    for _ in range(count):
        writer.event(Kind.MARK, cpu=0, time=writer.count)
    writer.flush()


def times(trace: Trace) -> list[int]:
    return [trace.event(n).time for n in range(trace.count)]


def test_file_grows_and_is_finished(tmp_path: Path) -> None:
    path = tmp_path / "live.tdbg"
    writer = writer_of(path)
    marks(writer, 3)
    with Growing(str(path)) as growing:
        trace = growing.trace
        assert trace.unfinished and not growing.finished and times(trace) == [0, 1, 2]
        assert growing.poll() is Change.NONE
        marks(writer, 5000)
        assert growing.poll() is Change.MORE
        assert times(trace) == list(range(5003))
        marks(writer, 2)
        writer.close()
        assert growing.poll() is Change.FINISHED
        assert growing.finished and not trace.unfinished and times(trace) == list(range(5005))
        assert growing.poll() is Change.NONE


def test_half_a_record_waits_for_its_other_half(tmp_path: Path) -> None:
    path = tmp_path / "live.tdbg"
    writer = writer_of(path)
    marks(writer, 2)
    record = bytearray(SIZE)
    record[60] = Kind.MARK
    with Growing(str(path)) as growing, open(path, "ab") as file:
        file.write(record[:40])
        file.flush()
        assert growing.poll() is Change.NONE
        file.write(record[40:])
        file.flush()
        assert growing.poll() is Change.MORE
        assert growing.trace.count == 3
        file.write(bytes(SIZE))  # allocated, not written
        file.flush()
        assert growing.poll() is Change.NONE and growing.trace.count == 3
    writer.abort()


def test_much_at_once_is_taken_in_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracedbg.growing.STEP", 64 * SIZE)
    monkeypatch.setattr("tracedbg.growing.ROOM", 4096)  # mapped anew several times
    path = tmp_path / "live.tdbg"
    writer = writer_of(path)
    marks(writer, 500)
    with Growing(str(path)) as growing, Replay(growing.trace) as replay:
        steps = 0
        while growing.behind:
            assert growing.poll() is Change.MORE
            replay.extend()
            assert replay.count == growing.trace.count
            steps += 1
        assert steps >= 6
        assert times(growing.trace) == list(range(500))
        replay.scan_all()
        assert replay.scanned == 500
    writer.abort()


@pytest.mark.parametrize(
    ("change", "what"),
    [("truncate", "truncated"), ("replace", "replaced"), ("rewrite", "anew"), ("zero", "anew"), ("remove", "no such file")],
)
def test_file_that_is_not_the_same_any_more(tmp_path: Path, change: str, what: str) -> None:
    path = tmp_path / "live.tdbg"
    writer = writer_of(path)
    marks(writer, 300)
    with Growing(str(path)) as growing:
        if change == "truncate":
            os.truncate(path, path.stat().st_size - SIZE)
        elif change == "replace":
            shutil.copy(path, tmp_path / "other")
            os.replace(tmp_path / "other", path)
        elif change == "remove":
            path.unlink()
        elif change == "rewrite":  # the same program once more: same header, more events
            again = writer_of_force(path)
            for n in range(400):
                again.event(Kind.MARK, cpu=0, time=1000 + n)
            again.flush()
            again.abort()
        else:
            with open(path, "r+b") as file:
                file.write(bytes(SIZE))
        with pytest.raises(FormatError, match=what):
            growing.poll()
        assert times(growing.trace) == list(range(300))  # what was read stays readable
    writer.abort()


def writer_of_force(path: Path) -> TraceWriter:
    writer = TraceWriter(path, atomic=False, force=True)
    writer.layout = LAYOUT
    return writer


def test_finished_file_that_says_more_is_another_trace(tmp_path: Path) -> None:
    path = tmp_path / "live.tdbg"
    writer = TraceWriter(path, atomic=False)
    fill_race(writer)
    layout, writer.layout = writer.layout, Layout()
    writer.flush()
    writer.layout = layout  # learnt later
    with Growing(str(path)) as growing:
        assert not growing.trace.layout.tss
        writer.close()
        assert growing.poll() is Change.OTHER
        assert growing.trace.layout.tss == layout.tss
        with Replay(growing.trace) as replay:
            replay.scan_all()
            assert replay.findings()


def test_user_layout_is_put_on_each_reading(tmp_path: Path) -> None:
    path = tmp_path / "live.tdbg"
    writer = TraceWriter(path, atomic=False)
    marks(writer, 1)

    def adapt(trace: Trace) -> None:
        trace.layout = LAYOUT

    with Growing(str(path), adapt) as growing:
        assert growing.trace.layout is LAYOUT
        writer.close()
        assert growing.poll() is Change.FINISHED  # and not OTHER
        assert growing.trace.layout is LAYOUT


def test_sections_before_the_events_may_be_larger_than_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracedbg.growing.STEP", SIZE)
    path = tmp_path / "live.tdbg"
    writer = writer_of(path)
    writer.symbols = b"".join(b"%x %x name%d\n" % (n * 16, n * 16 + 16, n) for n in range(500))
    marks(writer, 3)
    with Growing(str(path)) as growing:
        while growing.behind:
            growing.poll()
        assert times(growing.trace) == [0, 1, 2] and len(growing.trace.symbols) == len(writer.symbols)
    writer.abort()


@pytest.mark.parametrize("length", range(0, 400, 7))
def test_file_cut_short_is_an_error_or_a_beginning(tmp_path: Path, length: int) -> None:
    path = tmp_path / "live.tdbg"
    writer = writer_of(path)
    marks(writer, 3)
    writer.abort()
    os.truncate(path, length)
    try:
        with Growing(str(path)) as growing:
            growing.poll()
    except FormatError:
        pass


def test_only_native_files_are_followed(tmp_path: Path) -> None:
    log = tmp_path / "qemu.log"
    log.write_text("     0: v=02 e=0000\n")
    with pytest.raises(FormatError, match="not a native trace"):
        Growing(str(log))
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(UsageError, match="only a file"):
        Growing(str(fifo))
    with pytest.raises(FormatError, match="empty file"):
        (tmp_path / "empty").touch()
        Growing(str(tmp_path / "empty"))


def test_finished_file_needs_no_copy(tmp_path: Path) -> None:
    path = tmp_path / "race.tdbg"
    write_race(path)
    with Growing(str(path)) as growing:
        assert growing.finished and growing.trace.count == 4
        assert growing.poll() is Change.NONE


# -- the viewer --------------------------------------------------------------------------------------------------------


Live = Callable[[TraceWriter, "Screen"], Awaitable[None]]


def follow(path: Path, begin: int, script: Live, *, start: int | None = None) -> None:
    """Run a script against the viewer of a trace that is being written, of which there are some events to begin with."""
    writer = writer_of(path)
    marks(writer, begin)

    async def run() -> None:
        with Growing(str(path)) as growing:
            app = TraceApp(growing.trace, Words(growing.trace), start=start)
            app.growing = growing
            async with app.run_test(size=(120, 36)) as pilot:
                await settle(app, pilot)
                await script(writer, Screen(app, pilot))
        assert not app.session.is_alive()

    asyncio.run(run())
    writer.abort()


async def until(screen: Screen, done: Callable[[str], bool]) -> str:
    """Wait for the screen to say something."""
    for _ in range(200):
        await asyncio.sleep(0.02)
        await settle(screen.app, screen.pilot)
        if done(screen.text()):
            return screen.text()
    raise AssertionError(screen.text())


def test_who_is_at_the_end_stays_there(tmp_path: Path) -> None:
    async def script(writer: TraceWriter, screen: Screen) -> None:
        assert "event 9 of 10  following" in screen.text()
        marks(writer, 90)
        text = await until(screen, lambda t: "of 100 " in t)
        assert "event 99 of 100  following" in text and "scanning" not in text
        assert "▶" in screen.line(" 99 mark")

    follow(tmp_path / "live.tdbg", 10, script)


def test_others_stay_where_they_are(tmp_path: Path) -> None:
    async def script(writer: TraceWriter, screen: Screen) -> None:
        assert "event 4 of 10" in screen.text()
        marks(writer, 5)
        assert "event 4 of 15" in await until(screen, lambda t: "of 15 " in t)
        assert "event 14 of 15" in await screen.press("G")
        marks(writer, 5)
        assert "event 19 of 20" in await until(screen, lambda t: "of 20 " in t)
        await screen.press("k")
        marks(writer, 5)
        assert "event 18 of 25" in await until(screen, lambda t: "of 25 " in t)

    follow(tmp_path / "live.tdbg", 10, script, start=5)


def test_findings_appear_as_they_are_written_and_take_nobody_away(tmp_path: Path) -> None:
    async def script(writer: TraceWriter, screen: Screen) -> None:
        assert "no findings" in await screen.press("g")
        fill_race(writer, returns=2)
        writer.flush()
        text = await until(screen, lambda t: "2 errors" in t)
        assert "event 0 of " in text
        await screen.press("n", "n")
        assert screen.app.selected == 13  # the NMI over the frame: the fourth event of the race

    follow(tmp_path / "live.tdbg", 10, script)


def test_finished_meanwhile(tmp_path: Path) -> None:
    async def script(writer: TraceWriter, screen: Screen) -> None:
        marks(writer, 7)
        writer.close()
        text = await until(screen, lambda t: "the trace is finished: 17 events" in t)
        assert "following" not in text and "event 16 of 17" in text

    follow(tmp_path / "live.tdbg", 10, script)


def test_finished_with_a_layout_is_replayed_anew(tmp_path: Path) -> None:
    async def script(writer: TraceWriter, screen: Screen) -> None:
        layout, writer.layout = writer.layout, LAYOUT
        assert not layout.tss and "no findings" in screen.text()
        writer.close()
        text = await until(screen, lambda t: "replayed anew" in t and "1 error" in t)
        assert "IST2 (NMI)" in text

    path = tmp_path / "live.tdbg"
    writer = TraceWriter(path, atomic=False)
    fill_race(writer)
    writer.layout = Layout()
    writer.flush()

    async def run() -> None:
        with Growing(str(path)) as growing:
            app = TraceApp(growing.trace, Words(growing.trace))
            app.growing = growing
            async with app.run_test(size=(120, 36)) as pilot:
                await settle(app, pilot)
                await script(writer, Screen(app, pilot))

    asyncio.run(run())


@pytest.mark.parametrize("change", ["truncated", "replaced"])
def test_lost_file_is_told_and_the_view_goes_on(tmp_path: Path, change: str) -> None:
    path = tmp_path / "live.tdbg"

    async def script(writer: TraceWriter, screen: Screen) -> None:
        if change == "truncated":
            os.truncate(path, 100)
        else:
            write_race(tmp_path / "other.tdbg")
            os.replace(tmp_path / "other.tdbg", path)
        text = await until(screen, lambda t: "following ended" in t)
        assert f"the file has been {change}" in text.splitlines()[-2] and "  following" not in text.splitlines()[0]
        assert "event 8 of 10" in await screen.press("k")
        assert "event 0 of 10" in await screen.press("g")

    follow(path, 10, script)


def test_filter_takes_in_what_comes(tmp_path: Path) -> None:
    async def script(writer: TraceWriter, screen: Screen) -> None:
        await screen.press("ampersand", *"mark", "enter")
        assert "filtered: 10 of 10" in screen.text()
        writer.event(Kind.GAP, cpu=0)
        marks(writer, 4)
        await until(screen, lambda t: "filtered: 14 of 15" in t)

    follow(tmp_path / "live.tdbg", 10, script)


def test_timeline_covers_what_came(tmp_path: Path) -> None:
    async def script(writer: TraceWriter, screen: Screen) -> None:
        marks(writer, 4000)
        await until(screen, lambda t: "of 4,010 " in t)
        overview = screen.app.query_one("#timeline", TimelineBar).overview
        assert overview is not None and overview.count == overview.scanned == 4010

    follow(tmp_path / "live.tdbg", 10, script)


def test_empty_beginning(tmp_path: Path) -> None:
    async def script(writer: TraceWriter, screen: Screen) -> None:
        assert "no events" in screen.text()
        marks(writer, 3)
        assert "event 2 of 3" in await until(screen, lambda t: "of 3 " in t)

    follow(tmp_path / "live.tdbg", 0, script)


def test_follow_needs_a_terminal_and_one_native_trace(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    path = tmp_path / "race.tdbg"
    write_race(path)
    done = run_cli("view", "--follow", path, code=2)
    assert "the viewer needs a terminal" in done.stderr and done.stderr.count("\n") == 1
