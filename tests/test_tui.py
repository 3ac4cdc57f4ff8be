"""The viewer as its user sees it: keys in, text of the screen out."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from samples import CS, DO_NMI, IST_NMI, LAYOUT, NMI_RSP, SS, SYMBOLS, fill_race, race, write_race
from textual.pilot import Pilot
from textual.widgets import Input

from tracedbg.describe import Words
from tracedbg.errors import ReplayError, UsageError
from tracedbg.layout import Idt, Layout
from tracedbg.state import EventFlag, Kind, Source
from tracedbg.trace import Trace
from tracedbg.tui.app import TraceApp, run_app
from tracedbg.tui.shot import settle, shoot
from tracedbg.tui.stack_view import elide
from tracedbg.writer import TraceWriter, build

Script = Callable[["Screen"], Awaitable[None]]


class Screen:
    """The app under test."""

    def __init__(self, app: TraceApp, pilot: Pilot[int]) -> None:
        self.app = app
        self.pilot = pilot

    async def press(self, *keys: str) -> str:
        for key in keys:
            await self.pilot.press(key)
            await settle(self.app, self.pilot)
        return self.text()

    async def goto(self, text: str) -> None:
        await self.pilot.press("colon")
        self.app.query_one("#goto", Input).value = text
        await self.press("enter")

    def text(self) -> str:
        return "\n".join(strip.text.rstrip() for strip in self.app.screen._compositor.render_strips())

    def line(self, part: str) -> str:
        """The only line with this text."""
        lines = [line for line in self.text().splitlines() if part in line]
        assert len(lines) == 1, f"{len(lines)} lines with {part!r}:\n{self.text()}"
        return lines[0]


def drive(trace: Trace, script: Script, *, size: tuple[int, int] = (120, 36), start: int | None = None) -> TraceApp:
    """Run a script against the viewer of a trace; afterwards nothing of it may be left."""

    async def run() -> TraceApp:
        app = TraceApp(trace, Words(trace), start=start)
        async with app.run_test(size=size) as pilot:
            await settle(app, pilot)
            await script(Screen(app, pilot))
        return app

    app = asyncio.run(run())
    assert not app.session.is_alive()
    assert not [t for t in threading.enumerate() if t.name == "session"]
    trace.close()  # fails if the Replay still held its buffers
    return app


def test_opens_at_the_first_finding_and_shows_what_was_overwritten() -> None:
    async def script(screen: Screen) -> None:
        text = screen.text()
        assert screen.app.selected == 3
        assert "NMI at event 0 (#569): still to resume, OVERWRITTEN by event 3" in text
        assert "NMI at event 3 (#571): live" in text
        rip = screen.line(f"✗ was {0xFFFF82D0402F9C06:#x}")
        assert f"{DO_NMI:x} rip" in rip and "◀ RSP" in rip
        rsp = screen.line(f"✗ was {0xFFFF8300BFFD7E98:#x}")
        assert f"{NMI_RSP:x} rsp" in rsp
        assert "✗ was 0xe010" in text
        assert "= same value" in screen.line("000000000000e008 cs     NMI@3")
        assert "✗ 1 error" in text and "[victim]" in text and "[overwrites]" in text

    drive(race(), script)


def test_wide_screen_says_overwritten_by_whom_in_each_row() -> None:
    async def script(screen: Screen) -> None:
        now, before = screen.line("rip    NMI@3"), screen.line("✗      was ffff82d0402f9c06 default_idle+0xc6 until event 3")
        assert now.index(f"{DO_NMI:x}") == before.index("ffff82d0402f9c06")  # digit below digit

    drive(race(), script, size=(180, 40))


def test_steps_and_jumps() -> None:
    async def script(screen: Screen) -> None:
        assert "event 2 of 10" in await screen.press("k")
        assert "event 3 of 10" in await screen.press("j")
        assert "event 4 of 10" in await screen.press("right")
        assert "event 3 of 10" in await screen.press("left")
        assert "event 9 of 10" in await screen.press("G")
        assert "event 9 of 10" in await screen.press("j")
        assert "event 0 of 10" in await screen.press("g")
        assert "event 0 of 10" in await screen.press("k")
        assert "event 9 of 10" in await screen.press("pagedown")
        assert "event 0 of 10" in await screen.press("pageup")
        assert "event 2 of 10" in await screen.press("n")  # the window
        assert "event 3 of 10" in await screen.press("n")  # the overwrite
        assert "event 5 of 10" in await screen.press("n")  # the loop
        assert "no further finding" in await screen.press("n")
        assert "event 3 of 10" in await screen.press("N")
        assert "event 2 of 10" in await screen.press("N")
        assert "no earlier finding" in await screen.press("N")
        assert "event 3 of 10" in await screen.press("backspace")

    drive(race(6), script)


def test_state_at_each_step_is_that_after_the_event() -> None:
    async def script(screen: Screen) -> None:
        text = await screen.press("g")
        assert "NMIs blocked since 0" in text and "OVERWRITTEN" not in text
        assert "NMI at event 0 (#569): live" in text
        assert "MCIP 1" in await screen.press("j")
        assert "NMIs not blocked" in await screen.press("j")
        assert "NMIs blocked since 3" in await screen.press("j")

    drive(race(), script)


def test_return_marks_the_words_it_pops() -> None:
    async def script(screen: Screen) -> None:
        text = await screen.press("n")
        assert "OVERWRITTEN by event 3, popped by event 5" in text
        assert "<" in screen.line("✗ was 0xffff82d0402f9c06").split("rip")[0]

    drive(race(6), script)


def test_goto_understands_numbers_percentages_places_and_source_numbers() -> None:
    async def script(screen: Screen) -> None:
        for text, index in (
            ("7", 7), ("50%", 5), ("end", 9), ("start", 0), ("finding 3", 5), ("f1", 2), ("f2", 3), ("#570", 1), ("100%", 9),
            ("0x4", 4),
        ):  # fmt: skip
            await screen.goto(text)
            assert screen.app.selected == index, text

    drive(race(6), script)


@pytest.mark.parametrize(
    "text",
    [
        "10", "99999999999999999999", "abc", "101%", "finding 9", "finding 0", "#9999", "!", "1e3", "[bold]x[red]",
        "\uff11", "finding \uff11", "#\uff15\uff17\uff10", "\u0663%", "f\u00a01",
    ],
)
def test_bad_goto_is_told_in_the_status_line(text: str) -> None:
    async def script(screen: Screen) -> None:
        before = screen.app.selected
        await screen.goto(text)
        assert screen.app.selected == before
        status = screen.text().splitlines()[-2]
        assert any(word in status for word in ("past", "cannot go to", "there is no finding", "no event has"))
        assert "event 4 of 10" in await screen.press("j")  # keys work again

    drive(race(6), script)


def test_escape_leaves_the_prompt() -> None:
    async def script(screen: Screen) -> None:
        await screen.press("colon", *"12", "q")
        assert screen.app.is_running and screen.app.query_one("#goto", Input).value == "12q"
        await screen.press("escape")
        assert "event 4 of 10" in await screen.press("j")

    drive(race(6), script)


def test_next_of_cpu_and_of_vector() -> None:
    def fill(writer: TraceWriter) -> None:
        for index in range(12):
            writer.event(Kind.DELIVER, cpu=index % 3, rip=0x1000, arg=32 + index % 4, source=Source.FIXED)

    async def script(screen: Screen) -> None:
        await screen.press("g", "right_square_bracket")
        assert screen.app.selected == 3
        await screen.press("right_square_bracket", "left_square_bracket", "v")
        assert screen.app.selected == 7
        await screen.press("V")
        assert screen.app.selected == 3
        await screen.press("g")
        assert "no earlier event of cpu 0" in await screen.press("left_square_bracket")
        assert "cpu 1" in await screen.press("j")

    drive(build(fill, cpus=3), script)


def test_panes_cycle_and_findings_jump() -> None:
    async def script(screen: Screen) -> None:
        names = []
        for _ in range(4):
            await screen.press("tab")
            names.append(screen.app.focused and screen.app.focused.id)
        assert names == ["stacks", "details", "findings", "events"]
        await screen.press("g", "shift+tab")
        assert screen.app.focused is not None and screen.app.focused.id == "findings"
        assert "resume-loop, cpu 0" in await screen.press("G")  # its text, still at the first event
        assert screen.app.selected == 0
        await screen.press("enter")
        assert screen.app.selected == 5

    drive(race(6), script)


def test_enter_on_a_word_goes_to_its_writer() -> None:
    async def script(screen: Screen) -> None:
        await screen.press("G", "tab", "g", "j", "j", "j", "enter")
        assert screen.app.selected == 3

    drive(race(6), script)


def test_click_selects_a_row() -> None:
    async def script(screen: Screen) -> None:
        await screen.pilot.click("#events", offset=(5, 3))
        await settle(screen.app, screen.pilot)
        assert screen.app.selected == 2
        await screen.pilot.click("#findings", offset=(5, 3), times=2)
        await settle(screen.app, screen.pilot)
        assert screen.app.selected == 5

    drive(race(6), script)


def test_small_terminal_shows_the_verdict() -> None:
    async def script(screen: Screen) -> None:
        text = screen.text()
        assert all(len(line) <= 80 for line in text.splitlines()) and len(text.splitlines()) == 24
        assert "✗ was 0xffff82d0402f9c06 ◀ RSP" in text and "OVERWRITTEN by event 3" in text
        assert "frame-clobbered" in text
        assert "Findings (2)" not in text
        assert "Findings (2)" in await screen.press("shift+tab")

    drive(race(), script, size=(80, 24))


def test_resizing_keeps_the_place() -> None:
    async def script(screen: Screen) -> None:
        for size in ((80, 24), (40, 10), (200, 60), (120, 36)):
            await screen.pilot.resize_terminal(*size)
            await settle(screen.app, screen.pilot)
            assert screen.app.selected == 3
        assert "✗ was 0xe010" in screen.text()
        await screen.press("question_mark")
        await screen.pilot.resize_terminal(80, 24)
        await screen.press("escape")
        assert screen.text().splitlines()[1].count("Stacks") == 0  # narrow: the panes stand on each other

    drive(race(), script)


def test_help_and_zoom() -> None:
    async def script(screen: Screen) -> None:
        assert "next / previous finding" in await screen.press("question_mark")
        assert "next / previous finding" not in await screen.press("q")
        assert screen.app.is_running
        assert "Events" not in await screen.press("tab", "z")
        assert "Events" in await screen.press("z")

    drive(race(), script)


def test_quit_ends_with_0() -> None:
    async def script(screen: Screen) -> None:
        await screen.pilot.press("q")

    assert not drive(race(), script).return_code


def test_start_is_a_position_and_is_not_left_for_a_finding() -> None:
    async def script(screen: Screen) -> None:
        assert screen.app.selected == 1

    drive(race(), script, start=2)


def test_empty_trace() -> None:
    async def script(screen: Screen) -> None:
        text = await screen.press(*"jkgGnNvlh", "enter", "tab", "enter", "j", "right_square_bracket", "pagedown", "y")
        assert "no events" in text
        await screen.press("colon", "1", "enter")

    drive(build(lambda writer: None), script)


def test_events_that_know_nothing() -> None:
    def fill(writer: TraceWriter) -> None:
        for kind in Kind:
            writer.event(kind)

    async def script(screen: Screen) -> None:
        for _ in Kind:
            await screen.press("j")
        assert f"event {len(Kind) - 1} of {len(Kind)}" in screen.text()

    drive(build(fill), script)


def test_impossible_records_are_rows_too() -> None:
    def fill(writer: TraceWriter) -> None:
        writer.append(bytes(range(60)) + bytes([200, 0, 77, 0]))
        writer.append(b"\xff" * 64)
        writer.event(Kind.MARK)

    async def script(screen: Screen) -> None:
        assert "event 0 of 3" in screen.text()
        assert "event 2 of 3" in await screen.press("j", "j", "right_square_bracket", "v")

    drive(build(fill), script)


def test_hostile_names_reach_no_terminal() -> None:
    evil = "\x1b]0;x\x07\x1b[31m[bold red]pwn[/]\u202e"

    def fill(writer: TraceWriter) -> None:
        LAYOUT.names[2] = evil
        try:
            writer.layout = LAYOUT
            writer.symbols = f"{DO_NMI:x} {DO_NMI + 64:x} do{evil}\n".encode()
            payload = writer.payload(evil.encode())
            writer.event(Kind.MARK, value=payload, code=len(evil.encode()), flags=int(EventFlag.BYTES))
            writer.event(
                Kind.DELIVER, cpu=0, rip=DO_NMI, rsp=NMI_RSP, cs=CS, ss=0, rflags=2, arg=2, source=Source.NMI, source_index=7
            )
            writer.flush()
            writer.close()
        finally:
            LAYOUT.names[2] = "NMI"

    async def script(screen: Screen) -> None:
        await screen.press("j")
        text = screen.text()
        assert not any((ord(c) < 32 and c != "\n") or c == "\x7f" or c == "\u202e" for c in text)
        assert "[bold red]pwn[/]" in text  # shown, not obeyed
        assert f"{IST_NMI:x}" in text

    drive(build(fill, name=f"dir/{evil}.tdbg"), script)


def test_trace_without_layout_says_so() -> None:
    def fill(writer: TraceWriter) -> None:
        writer.event(Kind.DELIVER, cpu=0, rip=1, arg=2, source=Source.NMI)

    async def script(screen: Screen) -> None:
        text = screen.text()
        assert "Frames cannot be placed: neither TSS nor IDT is known" in text and "--layout FILE" in text
        assert "It is not known to be clean" in text and "no layout: 1 delivery cannot be placed on a stack" in text

    drive(build(fill), script)


def test_failing_replay_is_told_and_the_list_stays() -> None:
    def fail() -> object:
        raise ReplayError("out of memory")

    async def run() -> None:
        with race() as trace:
            app = TraceApp(trace, Words(trace), open_replay=fail)  # type: ignore[arg-type]
            async with app.run_test(size=(100, 30)) as pilot:
                screen = Screen(app, pilot)
                await settle(app, pilot)
                assert "the replay ended: out of memory" in screen.text()
                await pilot.press("j")
                await pilot.pause()
                assert "event 1 of 4" in screen.text()

    asyncio.run(run())


def test_monochrome_screen_has_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = []

    async def script(screen: Screen) -> None:
        texts.append(screen.text())

    drive(race(), script)
    monkeypatch.setenv("NO_COLOR", "1")
    drive(race(), script)
    assert texts[0] == texts[1]
    assert "✗" in texts[1]


def test_pictures_of_equal_screens_are_equal() -> None:
    def picture() -> str:
        with race(6) as trace:
            return asyncio.run(shoot(TraceApp(trace, Words(trace)), (100, 30), ["n"], "t"))

    first = picture()
    assert first == picture()
    assert f"{DO_NMI:x}" in first


def test_scan_that_found_nothing_says_so() -> None:
    def fill(writer: TraceWriter) -> None:
        writer.layout = LAYOUT
        writer.event(
            Kind.DELIVER, cpu=0, rip=DO_NMI, rsp=NMI_RSP, cs=CS, ss=SS, rflags=0x46, arg=2, source=Source.NMI, source_index=7
        )

    async def script(screen: Screen) -> None:
        text = screen.text()
        assert "The scan of the only event found nothing: no findings." in text
        assert "1 of 1 delivery was judged." in text
        assert "not known to be clean" not in text and "cannot be placed" not in text

    drive(build(fill), script)
    drive(build(fill), script, size=(80, 24))


def test_layout_without_idt_names_what_is_missing() -> None:
    def fill(writer: TraceWriter) -> None:
        writer.layout = Layout(tss=LAYOUT.tss, idts=(Idt(0x6000, {}),), cpus=LAYOUT.cpus)
        writer.event(Kind.DELIVER, cpu=0, rip=DO_NMI, rsp=NMI_RSP, cs=CS, ss=SS, rflags=0x46, arg=2, source=Source.NMI)

    async def script(screen: Screen) -> None:
        assert "Frames cannot be placed: no IDT is known" in screen.text()

    drive(build(fill), script)


def fake_race(writer: TraceWriter) -> None:
    """A fake NMI from an 8259, stores of its handler, then the genuine NMI over its frame."""
    writer.layout = LAYOUT
    writer.symbols = SYMBOLS
    inner = {"cpu": 0, "rip": DO_NMI, "rsp": NMI_RSP, "rflags": 0x46, "cs": CS, "ss": 0}
    writer.event(Kind.DELIVER, cpu=0, rip=0x1000, rsp=0x9000, rflags=0x206, cs=CS, ss=SS, arg=2, source=Source.EXTINT)
    writer.event(Kind.WRITE, cpu=0, rip=DO_NMI, addr=IST_NMI - 48, arg=8, value=0x1122334455667788)
    writer.event(Kind.DELIVER, arg=2, source=Source.NMI, **inner)


def test_owner_of_a_word_keeps_the_number_of_its_event() -> None:
    async def script(screen: Screen) -> None:
        text = await screen.press("g")
        assert text.count("fake NMI@0") == 5
        assert "[overwrites]" not in screen.line("▶! 0 ")  # a fake has overwritten nothing
        assert "[overwrites] NMI" in await screen.press("n")

    drive(build(fake_race), script)


def test_caption_that_does_not_fit_is_said_in_fewer_words() -> None:
    async def script(screen: Screen) -> None:
        await screen.press("G")
        if screen.app.size.width < 100:
            assert "✗ fake NMI@0: still to resume, OVERWRITTEN by event 2" in screen.text()
        else:
            assert "✗ 8259 interrupt 0x02 (fake NMI) at event 0: still to resume, OVERWRITTEN by event 2" in screen.text()

    drive(build(fake_race), script, size=(70, 30))
    drive(build(fake_race), script, size=(200, 60))


def test_narrow_lists_put_first_what_matters() -> None:
    async def script(screen: Screen) -> None:
        store = screen.line("write ")
        assert f"write …{IST_NMI - 48 & 0xFFFFFFFF:08x} by do_nmi+2 = 0x" in store
        assert "frame-clobbered @2 NMI overwrote" in screen.text()

    drive(build(fake_race), script)

    async def wide(screen: Screen) -> None:
        assert f"write 8 @ {IST_NMI - 48:x} = 0x1122334455667788  at do_nmi+2" in screen.text()

    drive(build(fake_race), wide, size=(80, 24))


@pytest.mark.parametrize("size", [(80, 24), (120, 36), (200, 60)])
def test_long_symbols_keep_their_offset(size: tuple[int, int]) -> None:
    def fill(writer: TraceWriter) -> None:
        fill_race(writer)
        long = b"asm_common_interrupt_handler_with_a_long_name.isra.0.constprop.12"
        writer.symbols = SYMBOLS.replace(b"do_nmi", long).replace(b"default_idle", b"std::pair<int, int>::operator() const")

    async def script(screen: Screen) -> None:
        row = screen.line("◀ RSP")
        shown = row.split("◀ RSP")[1].strip()
        if size[0] == 120:  # whose word it is and what it was leave no room: then no stump either
            assert not shown and "NMI@3 ✗ was" in row
        else:
            assert shown.startswith("a") and shown.endswith("…+2")

    drive(build(fill), script, size=size)


def test_elide() -> None:
    assert elide("do_nmi+2", 8) == "do_nmi+2"
    assert elide("vprintk_emit+0x1d", 10) == "vpri…+0x1d"
    assert elide("vprintk_emit", 6) == "vprin…"
    assert elide("a+0x1234", 3) == "a+0"
    assert elide("name", 0) == ""


def test_double_fault_marks_both_that_could_not_be_delivered(root: Path) -> None:
    async def script(screen: Screen) -> None:
        assert "[cause] int3 FAILED" in screen.text() and "[cause] #PF FAILED" in screen.text()
        assert "[overwrites]" not in screen.text()

    drive(Trace.open(str(root / "traces" / "double-fault.tdbg")), script)


def test_ctrl_c_leaves_the_prompt_then_the_viewer() -> None:
    async def script(screen: Screen) -> None:
        await screen.press("colon", "1", "ctrl+c")
        assert screen.app.is_running and not screen.app.screen.has_class("asking")
        await screen.pilot.press("ctrl+c")

    assert drive(race(), script).return_code == 130


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_terminal_that_cannot_place_text_is_refused(monkeypatch: pytest.MonkeyPatch, term: str) -> None:
    monkeypatch.setenv("TERM", term)
    with race() as trace, pytest.raises(UsageError, match=f"TERM={term}"):
        run_app(trace, Words(trace))


class Terminal:
    """The viewer as a process on a terminal of its own."""

    def __init__(self, path: Path, root: Path, *, words: tuple[str, ...] = (), **env: str) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 36, 120, 0, 0))
        self.process = subprocess.Popen(
            words or [sys.executable, "-m", "tracedbg", str(path)],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(root), "TERM": "xterm-256color", **env},
        )  # fmt: skip
        os.close(slave)

    def read(self, until: bytes = b"", seconds: float = 60) -> bytes:
        """What comes until a text, or until the process has closed the terminal."""
        got = b""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not (until and until in got):
            if not select.select([self.master], [], [], 0.1)[0]:
                continue
            try:
                data = os.read(self.master, 1 << 16)
            except OSError:
                break
            if not data:
                break
            got += data
        return got

    def close(self) -> None:
        os.close(self.master)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_signals_leave_the_terminal_as_it_was(root: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    path = tmp_path / "race.tdbg"
    write_race(path)
    terminal = Terminal(path, root)
    try:
        assert b"OVERWRITTEN" in terminal.read(b"OVERWRITTEN")
        terminal.process.send_signal(number)
        rest = terminal.read()
        assert terminal.process.wait(30) == code
    finally:
        terminal.close()
    assert all(sequence in rest for sequence in (b"\x1b[?1049l", b"\x1b[?25h", b"\x1b[?1000l"))
    assert b"Traceback" not in rest


def test_dumb_terminal_gets_one_line(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "race.tdbg"
    write_race(path)
    terminal = Terminal(path, root, TERM="dumb")
    try:
        text = terminal.read()
        assert terminal.process.wait(30) == 2
    finally:
        terminal.close()
    assert text.count(b"\n") == 1 and b"TERM=dumb" in text and b"\x1b" not in text
