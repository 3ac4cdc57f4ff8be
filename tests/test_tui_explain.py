"""The explanation of a finding, copying and exporting, as a user sees them."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from samples import DO_NMI, IST_NMI, SYMBOLS, fill_race, race, write_race
from test_tui import Screen, Terminal, drive
from textual.widgets import OptionList

from tracedbg.describe import Words
from tracedbg.state import Kind, Source
from tracedbg.tui.app import TraceApp
from tracedbg.tui.explain import ExplainScreen, Explanation
from tracedbg.tui.explain_lines import explanation
from tracedbg.tui.export import file_stem, state_dir, write_new
from tracedbg.tui.shot import settle
from tracedbg.tui.stack_view import StackView
from tracedbg.writer import TraceWriter, build

OSC_52 = re.compile(rb"\x1b\]52;c;([A-Za-z0-9+/=]*)\x07")


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies and exports go into a folder of the test."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def body(screen: Screen) -> Explanation:
    return screen.app.screen.query_one("#explanation", Explanation)


async def wait_for(screen: Screen, part: str) -> None:
    """Wait until the screen says something; what a menu starts comes after the menu is gone."""
    for _ in range(100):
        if part in screen.text():
            return
        await screen.pilot.pause(0.02)
    raise AssertionError(f"no {part!r} in\n{screen.text()}")


def explaining(screen: Screen) -> bool:
    return isinstance(screen.app.screen, ExplainScreen)


@pytest.mark.parametrize("size", [(80, 24), (200, 60)])
def test_the_explanation_on_the_screen(golden: Callable[[str, str], None], size: tuple[int, int]) -> None:
    async def script(screen: Screen) -> None:
        lines = (await screen.press("e")).splitlines()
        assert explaining(screen)
        first = next(n for n, line in enumerate(lines) if "explained" in line)
        assert first == 0 if size == (80, 24) else first > 25  # a tall screen still shows the events and stacks above
        shown = "\n".join(lines[first:])
        golden(f"explain-{size[0]}x{size[1]}.txt", shown + "\n")
        assert all(len(line) <= size[0] for line in shown.splitlines())

    drive(race(6), script, size=size, start=4)


def test_all_of_it_can_be_reached_on_a_small_screen() -> None:
    """Every section scrolls into sight, with the facts of the race in it."""

    async def script(screen: Screen) -> None:
        pages = await screen.press("e")
        for _ in range(6):
            pages += await screen.press("pagedown")
        for part in (
            "✗ error: frame-consumed-corrupt, cpu 0, event 3 (#571)",
            "victim    event 0 (#569): NMI at default_idle+0xc6",
            "writer    event 3 (#571): NMI at do_nmi+2",
            "consumer  event 5: IRET to do_nmi+2",
            "2. event 1 (#570): #MC at do_nmi+2",
            "3. event 2: IRET of event 1 to do_nmi+2: NMIs are unblocked",
            "Evidence", "recorded: the trace has the IRET and the words that it popped",
            "Manual", "SDM Vol. 3A 6.14.5",
            "Would have prevented it", "NMIs blocked until the IRET of event 0 (#569)",
            "Known ways out", "copy the frame off the top of the IST stack",
            "Why it matters", "The IRET took words that its own entry did not store",
        ):  # fmt: skip
            assert part in pages, part

    drive(race(6), script, size=(80, 24), start=4)


def test_the_table_says_by_sign_and_word_what_differs() -> None:
    trace = race()
    with trace:
        app = TraceApp(trace, Words(trace))
        from tracedbg.replay import Replay

        with Replay(trace) as replay:
            while replay.scan(1000):
                pass
            finding = next(f for f in replay.findings() if f.slots)
        shown = explanation(finding, app.words, 140)
    lines = ["".join(text for text, _ in line.parts).rstrip() for line in shown]
    coloured = [line for line in shown if line.event == 3 and any(style == "stack--clobbered" for _, style in line.parts)]
    wrong = [line.parts[0][0] for line in coloured]
    assert wrong == ["✗ "] * 4  # and the same in colour: all but CS
    # The values are those of tests/samples.py: what the first NMI saved, and what the second one did.
    assert f"✗ {IST_NMI - 40:016x} rip        ffff82d0402f9c06  ffff82d04032a242 event 3 (#571)" in lines
    assert f"= {IST_NMI - 32:016x} cs         e008              e008             event 3 (#571)" in lines
    assert f"✗ {IST_NMI - 24:016x} rflags     206               46               event 3 (#571)" in lines
    assert f"✗ {IST_NMI - 8:016x} ss         e010              0                event 3 (#571)" in lines
    assert any(line.split() == ["default_idle+0xc6", "do_nmi+2"] for line in lines)
    assert "  ✗ differs   = same value" in lines


def test_enter_goes_to_the_event_and_closes_space_stays() -> None:
    async def script(screen: Screen) -> None:
        await screen.press("e", "enter")  # the victim
        assert not explaining(screen) and screen.app.selected == 0
        assert "event 3 of 10" in await screen.press("backspace")
        await screen.press("e", "tab", "tab", "tab", "space")  # cause, writer, consumer
        assert explaining(screen) and screen.app.selected == 5
        assert "▶◆ consumer" in screen.text() and "» victim" in screen.text()
        await screen.press("shift+tab", "shift+tab", "shift+tab", "shift+tab", "space")  # around the end: a row of bytes
        assert screen.app.selected == 3
        await screen.press("escape")
        assert not explaining(screen) and screen.app.selected == 3

    drive(race(6), script, size=(80, 24), start=4)


def test_a_click_on_a_link_goes_there() -> None:
    async def script(screen: Screen) -> None:
        lines = (await screen.press("e")).splitlines()
        prose = next(n for n, line in enumerate(lines) if "NMI overwrote" in line)
        await screen.pilot.click(offset=(10, prose))
        await settle(screen.app, screen.pilot)
        assert explaining(screen)
        await screen.pilot.click(offset=(10, next(n for n, line in enumerate(lines) if "1. event 0" in line)))
        await settle(screen.app, screen.pilot)
        assert not explaining(screen) and screen.app.selected == 0

    drive(race(6), script, start=4)


def test_enter_in_the_details_explains() -> None:
    async def script(screen: Screen) -> None:
        await screen.press("tab", "tab", "enter")
        assert explaining(screen)
        await screen.press("q")
        assert not explaining(screen)

    drive(race(6), script, start=4)


def test_next_and_previous_finding_inside() -> None:
    async def script(screen: Screen) -> None:
        assert "Finding 2 of 3, explained" in await screen.press("e")
        assert "resume-loop" in await screen.press("n") and screen.app.selected == 5
        assert "no further finding" in await screen.press("n")
        await screen.press("N", "N")
        assert "Finding 1 of 3, explained" in screen.text() and screen.app.selected == 2
        assert "no earlier finding" in await screen.press("F")

    drive(race(6), script, start=4)


def test_it_is_kept_when_stepping_away_and_refused_without_a_finding() -> None:
    async def script(screen: Screen) -> None:
        await screen.press("j", "e")
        assert screen.app.selected == 4 and "frame-consumed-corrupt, cpu 0, event 3" in screen.text()

    drive(race(6), script, start=4)

    async def none(screen: Screen) -> None:
        assert "no finding is selected; there is none" in await screen.press("e")
        assert "no finding is selected" in await screen.press("Y")
        assert "m  no finding is selected" in await screen.press("x")
        await screen.press("m")
        await screen.press("escape")
        assert list(Path().iterdir()) == []

    drive(build(lambda writer: writer.event(Kind.MARK)), none)


def test_resizing_keeps_the_line() -> None:
    async def script(screen: Screen) -> None:
        await screen.press("e", "tab", "tab")
        for size in ((40, 12), (200, 60), (80, 24)):
            await screen.pilot.resize_terminal(*size)
            await settle(screen.app, screen.pilot)
            line = body(screen)
            assert line.copy_text().startswith("event 3 (#571): NMI at do_nmi+2"), size
            assert 0 <= line.cursor - line.scroll_offset.y < line.scrollable_content_region.height
        await screen.press("enter")
        assert screen.app.selected == 3

    drive(race(6), script, start=4)


def test_a_finding_without_victim_leads_to_its_event() -> None:
    def fill(writer: TraceWriter) -> None:
        fill_race(writer)
        writer.event(Kind.DELIVER, cpu=0, rip=0x1000, rsp=0x9000, rflags=0x206, cs=0xE008, ss=0, arg=2, source=Source.EXTINT)

    async def script(screen: Screen) -> None:
        await screen.goto("4")
        assert "fake-nmi" in await screen.press("e")
        assert "▶◆ at  event 4: 8259 interrupt 0x02 (fake NMI) at 0x1000" in screen.text()

    drive(build(fill), script)


def test_hostile_names_are_shown_not_obeyed() -> None:
    evil = b"[red]x[/red]`<b>|\\"

    def fill(writer: TraceWriter) -> None:
        fill_race(writer)
        writer.symbols = SYMBOLS.replace(b"do_nmi", evil)

    async def script(screen: Screen) -> None:
        assert f"{evil.decode()}+2" in await screen.press("e")
        await screen.press("Y")
        await screen.press("x", "s")
        await wait_for(screen, "wrote tracedbg-bold_x_31m_a-event-3.svg")

    drive(build(fill, name="d/[bold]x\x1b[31m$(a).tdbg"), script, start=4)
    assert [path.name for path in Path().iterdir()] == ["tracedbg-bold_x_31m_a-event-3.svg"]
    copied = (state_dir() / "copy.md").read_text()
    assert "\x1b" not in copied and "<b>" not in copied and "Trace: `[bold]x?[31m$(a).tdbg`" in copied


# -- copying ------------------------------------------------------------------------------------------------------------


def clipboard(app: TraceApp) -> str:
    return app.clipboard


def kept() -> str:
    return (state_dir() / "copy.md").read_text(encoding="utf-8")


def test_y_copies_what_the_cursor_is_on() -> None:
    async def script(screen: Screen) -> None:
        said = await screen.press("y")
        assert "copied the line to ~/state/tracedbg/copy.md and the clipboard (if the terminal allows it)" in said
        assert clipboard(screen.app) == kept()
        assert kept().startswith("event 3 (#571): NMI  at do_nmi+2  rsp ffff8300bffd2f48")
        await screen.press("shift+tab", "y")
        assert kept().startswith("cpu 0, event 3 (#571): NMI overwrote")
        await screen.press("shift+tab", "y")
        assert "frame-consumed-corrupt" in kept() and "\n" in kept()
        await screen.press("shift+tab")
        stacks = screen.app.query_one("#stacks", StackView)
        rows = {row.addr: index for index in range(stacks.count) if (row := stacks.row(index)) is not None}
        stacks.set_cursor(rows[IST_NMI - 40])
        assert "copied the word" in await screen.press("y")
        assert kept() == f"{DO_NMI:x}"  # what is in the RIP word now
        await screen.press("e", "y")
        assert kept().startswith("event 0 (#569): NMI at default_idle+0xc6")
        await screen.press("shift+tab")  # around the start: the last row of bytes
        await screen.press("y")
        assert kept() == "0"  # what is in the SS word now

    drive(race(6), script, start=4)
    assert os.stat(state_dir() / "copy.md").st_mode & 0o777 == 0o600


def test_capital_y_copies_the_verdict() -> None:
    async def script(screen: Screen) -> None:
        screen.app.inputs = ("--monitor", "a b.txt", "race.tdbg")
        assert "copied finding 2 to ~/state/tracedbg/copy.md and the clipboard" in await screen.press("Y")
        assert clipboard(screen.app) == kept()

    drive(race(6), script, start=4)
    assert kept().startswith("## error: frame-consumed-corrupt, cpu 0, event 3 (`#571`)\n")
    assert "\n```sh\ntracedbg view --monitor 'a b.txt' race.tdbg --at 3\n```\n" in kept()
    assert "| `ffff8300bffd2fd8` | rip | `ffff82d0402f9c06` default_idle+0xc6 |" in kept()


def test_the_terminal_gets_the_copy(root: Path, own_folders: Path) -> None:
    path = own_folders / "race.tdbg"
    write_race(path)
    terminal = Terminal(path, root)
    try:
        assert b"OVERWRITTEN" in terminal.read(b"OVERWRITTEN")
        os.write(terminal.master, b"Y")
        found = OSC_52.search(terminal.read(b"copied finding"))
        assert found is not None
        said = base64.b64decode(found[1]).decode()
        os.write(terminal.master, b"q")
        terminal.read()
        assert terminal.process.wait(30) == 0
    finally:
        terminal.close()
    assert said == kept() and said.startswith("## error: frame-clobbered")
    assert f"tracedbg view {path} --at 3\n" in said


@pytest.mark.parametrize(("setting", "board", "file"), [("both", True, True), ("terminal", True, False), ("file", False, True)])
def test_a_setting_says_where_copies_go(setting: str, board: bool, file: bool) -> None:
    async def script(screen: Screen) -> None:
        screen.app.copy_to = setting
        said = await screen.press("y")
        assert ("the clipboard" in said) is board and ("copy.md" in said) is file
        assert bool(clipboard(screen.app)) is board

    drive(race(), script)
    assert (state_dir() / "copy.md").exists() is file


def test_a_copy_that_cannot_be_kept(own_folders: Path) -> None:
    (own_folders / "state").write_text("a file where the folder should be")

    async def script(screen: Screen) -> None:
        assert "to no file (" in await screen.press("y")
        screen.app.copy_to = "file"
        assert "cannot copy the line: " in await screen.press("y")

    drive(race(), script)


def test_the_state_folder_is_that_of_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/a")
    usual = "/home/a/.local/state/tracedbg"
    for given, expected in (("/s", "/s/tracedbg"), ("", usual), ("relative", usual)):
        monkeypatch.setenv("XDG_STATE_HOME", given)
        assert str(state_dir()) == expected
    monkeypatch.delenv("XDG_STATE_HOME")
    assert str(state_dir()) == usual


def test_copies_replace_a_link_and_not_what_it_leads_to(own_folders: Path) -> None:
    folder = own_folders / "state" / "tracedbg"
    folder.mkdir(parents=True)
    precious = own_folders / "precious"
    precious.write_text("mine")
    (folder / "copy.md").symlink_to(precious)

    async def script(screen: Screen) -> None:
        await screen.press("y")

    drive(race(), script)
    assert precious.read_text() == "mine" and not (folder / "copy.md").is_symlink()
    assert [path.name for path in folder.iterdir()] == ["copy.md"]


# -- exporting ----------------------------------------------------------------------------------------------------------


def test_exports_get_names_of_their_own_and_overwrite_nothing() -> None:
    async def script(screen: Screen) -> None:
        assert "s  the screen as SVG" in await screen.press("x")
        await screen.press("s")
        await wait_for(screen, "wrote tracedbg-race-event-3.svg")
        await screen.press("x", "enter")
        await wait_for(screen, "wrote tracedbg-race-event-3-1.svg")
        await screen.press("x", "j", "enter")
        await wait_for(screen, "wrote tracedbg-race-finding-2-frame-consumed-corrupt.md")
        await screen.press("x", "m")
        await wait_for(screen, "wrote tracedbg-race-finding-2-frame-consumed-corrupt-1.md")
        await screen.press("x", "escape")
        await screen.press("e", "x")
        assert screen.app.screen.query_one(OptionList)
        await screen.press("s")
        await wait_for(screen, "wrote tracedbg-race-event-3-2.svg")
        assert explaining(screen)

    drive(race(6), script, start=4)
    names = {path.name for path in Path().iterdir()}
    assert len(names) == 5
    first, second, third = (Path(f"tracedbg-race-event-3{n}.svg").read_text() for n in ("", "-1", "-2"))
    assert first.startswith("<svg") and "OVERWRITTEN" in first and "Export" not in first
    assert "http" not in re.sub(r'xmlns="[^"]*"', "", first).replace("https://www.textualize.io", "")
    assert "explained" not in second and "explained" in third
    assert Path("tracedbg-race-finding-2-frame-consumed-corrupt.md").read_text().startswith("## error: frame-consumed-corrupt")


def test_links_are_not_followed_and_errors_are_told(own_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.md").symlink_to(own_folders / "not there")
    assert write_new("a", ".md", "text") == "a-1.md"
    assert not (own_folders / "not there").exists()
    monkeypatch.setattr("tracedbg.tui.export.MAX_TRIES", 2)
    with pytest.raises(FileExistsError, match="2 files"):
        write_new("a", ".md", "text")

    async def script(screen: Screen) -> None:
        Path("a.md").unlink()
        Path("a-1.md").unlink()
        (own_folders / "work").rmdir()
        await screen.press("x", "s")
        await wait_for(screen, "cannot write tracedbg-race-event-3.svg: no such file or directory")

    drive(race(), script)


@pytest.mark.parametrize(
    ("path", "stem"),
    [
        ("a/b/race.tdbg", "race"), ("q.log", "q.log"), ("../..", "trace"), ("-rf *;.tdbg", "rf"), ("\x1b[2J\n.tdbg", "2J"),
        ("é.tdbg", "trace"), ("x" * 300, "x" * 60), ("-", "trace"), (".hidden", "hidden"), ("a\udcffb", "a_b"),
    ],
)  # fmt: skip
def test_names_of_exports_are_clean(path: str, stem: str) -> None:
    assert file_stem(path) == stem
