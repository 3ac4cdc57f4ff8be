"""The viewer as a home: help, commands, keys of one's own, colours, configuration, the mouse, scripts."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from samples import race, write_race
from test_tui import Screen, Script, Terminal, drive
from textual import events
from textual.binding import Binding

from tracedbg.commands import help as pages
from tracedbg.describe import Words
from tracedbg.errors import UsageError
from tracedbg.tui import config
from tracedbg.tui.actions import binding_id, either, key_label, own_bindings
from tracedbg.tui.app import TraceApp
from tracedbg.tui.config import Config
from tracedbg.tui.event_list import EventList
from tracedbg.tui.keys import key_of, script_of
from tracedbg.tui.shot import settle


def drive_with(wanted: Config, script: Script, *, size: tuple[int, int] = (120, 36)) -> None:
    """As drive(), with a configuration."""

    async def run() -> None:
        with race(6) as trace:
            app = TraceApp(trace, Words(trace))
            app.config = wanted
            async with app.run_test(size=size) as pilot:
                await settle(app, pilot)
                await script(Screen(app, pilot))

    asyncio.run(run())


def own(tmp_path: Path, text: str) -> Config:
    """The configuration that a file with this text gives."""
    path = tmp_path / "tracedbg" / "config.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return config.load(path)


def bound(app: TraceApp) -> list[Binding]:
    """Every binding with a description that a part of the viewer declares."""
    kinds = [k for k in type(app).__mro__ if k.__module__.startswith("tracedbg.")]
    return [b for k in kinds for b in own_bindings(k) if b.description]


# -- help and commands ---------------------------------------------------------------------------------------------------


def test_help_tells_about_the_pane_and_has_all_keys() -> None:
    async def script(screen: Screen) -> None:
        text = await screen.press("tab", "question_mark")
        assert "Here: Stacks" in text and "Stacks as memory" in text
        assert re.search(r"> <\s+next / previous stack", text)
        assert re.search(r"n N\s+next / previous finding", text)
        for binding in bound(screen.app):
            assert re.search(rf"(?m)[ ┃]{re.escape(key_label(binding.key))}(?= |┃)", text), binding
        assert "Here" not in await screen.press("escape")
        assert "Here: Findings" in await screen.press("tab", "tab", "question_mark")

    drive(race(6), script, size=(100, 140))


def test_help_on_a_small_terminal_scrolls() -> None:
    async def script(screen: Screen) -> None:
        text = await screen.press("question_mark")
        assert "Here: Events" in text and "error, warning, note" not in text
        assert "error, warning, note" in await screen.press("G", "k", "k", "k", "k")
        assert "Here: Events" in await screen.press("g")

    drive(race(6), script, size=(80, 24))


def test_palette_has_every_action_and_runs_it() -> None:
    async def script(screen: Screen) -> None:
        titles = {c.title for c in screen.app.get_system_commands(screen.app.screen)}
        for binding in bound(screen.app):
            if binding.action == "command_palette" or screen.app._check_action_state(binding.action, screen.app) is False:
                continue
            label = key_label(binding.key)
            assert any(re.search(rf"[( ]{re.escape(label)}[ )]", title) for title in titles), binding
        assert not [t for t in titles if "Scroll" in t or "Focus" in t]  # the toolkit's
        await screen.press("g", "ctrl+p")
        await screen.press(*"previous pane")
        await screen.pilot.pause(0.3)
        assert "previous pane  (Shift-Tab)" in screen.text()
        await screen.press("enter")
        await screen.pilot.pause(0.3)
        assert screen.app.focused is not None and screen.app.focused.id == "findings"

    drive(race(6), script)


def test_palette_runs_what_belongs_to_another_pane() -> None:
    async def script(screen: Screen) -> None:
        command = next(c for c in screen.app.get_system_commands(screen.app.screen) if c.title.startswith("Stacks: next stack"))
        await command.callback()
        assert screen.app.focused is not None and screen.app.focused.id == "stacks"
        assert "Stacks · 2 of " in screen.text()

    drive(race(6), script)


def test_footer_fits_80_columns_and_follows_the_pane() -> None:
    async def script(screen: Screen) -> None:
        for pane, hint in (("", "[] cpu  v vector"), ("tab", "<> stack  w writer"), ("tab", " nN"), ("tab", "Enter go there")):
            footer = (await screen.press(*filter(None, [pane]))).splitlines()[-1]
            assert footer.startswith(f" {hint}".replace("  nN", " nN")), footer
            assert "? help  q quit" in footer

    drive(race(6), script, size=(80, 24))


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        ("next finding", "previous finding", "next / previous finding"),
        ("forward", "back", "forward / back"),
        ("next", "next", "next"),
        ("a b c", "c", "a b c / c"),
    ],
)
def test_two_texts_as_one(one: str, other: str, both: str) -> None:
    assert either(one, other) == both


# -- keys ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("n", "n"), ("N", "N"), ("[", "left_square_bracket"), ("/", "slash"), (",", "comma"), ("-", "minus"), ("+", "plus"),
        ("Enter", "enter"), ("ESC", "escape"), ("PgDn", "pagedown"), ("Space", "space"), ("F12", "f12"), ("Ctrl-P", "ctrl+p"),
        ("ctrl+p", "ctrl+p"), ("C-p", "ctrl+p"), ("Shift-Tab", "shift+tab"), ("Ctrl-Alt-x", "ctrl+alt+x"),
    ],
)  # fmt: skip
def test_names_of_keys(text: str, key: str) -> None:
    assert key_of(text) == key


@pytest.mark.parametrize("text", ["", " ", "ab", "F13", "Ctrl-", "Hyper-x", "Ctrl-Foo", "\x1b", "\x00", "Ctrl-\x1b", "\n"])
def test_no_keys(text: str) -> None:
    with pytest.raises(UsageError, match="is no key"):
        key_of(text)


def test_script_of_keys() -> None:
    assert script_of("n n w : 1234 Enter Ctrl-O end") == [
        "n", "n", "w", "colon", "1", "2", "3", "4", "enter", "ctrl+o", "e", "n", "d",
    ]  # fmt: skip
    assert script_of("Nmi") == ["N", "m", "i"]
    assert script_of("") == []
    with pytest.raises(UsageError):
        script_of("Ctrl-Foo")


def test_ids_are_there_and_name_one_action_each() -> None:
    with race() as trace:
        app = TraceApp(trace, Words(trace))
    names: dict[str, str] = {}
    for _, binding in app._bindings:
        if binding.description and binding.action != "quit":
            name = binding_id(binding)
            assert re.fullmatch(r"[a-z0-9_]+", name)
            assert names.setdefault(name, binding.action) == binding.action
    text = pages.pages()["config"].read_text(encoding="utf-8")
    listed = set(re.findall(r"[a-z_]+", text.partition("    moving ")[2].partition("`forward`")[0]))
    assert set(names) <= listed, set(names) - listed


def test_keys_of_ones_own(tmp_path: Path) -> None:
    wanted = own(tmp_path, '[keys]\nnext_finding = ["x", "F7"]\nstack = "+"\nquit = "Ctrl-G"\nfirst = "^"\n')

    async def script(screen: Screen) -> None:
        await screen.press("circumflex_accent")
        assert screen.app.selected == 0
        await screen.press("x")
        assert screen.app.selected == 2
        await screen.press("f7")
        assert screen.app.selected == 3
        await screen.press("n")
        assert screen.app.selected == 3  # not any more
        await screen.press("N")
        assert screen.app.selected == 2  # still
        assert "x F7" in await screen.press("question_mark")
        await screen.press("escape")
        assert "Stacks · 2 of " in await screen.press("tab", "plus")
        await screen.press("q")
        assert screen.app.is_running
        await screen.pilot.press("ctrl+g")
        assert not screen.app._running or screen.app._exit

    assert not wanted.problems
    drive_with(wanted, script)


def test_a_key_given_to_the_viewer_is_taken_from_the_panes(tmp_path: Path) -> None:
    async def script(screen: Screen) -> None:
        await screen.press("G", "g")
        assert screen.app.selected == 5  # a finding, not the first event

    drive_with(own(tmp_path, '[keys]\nfinding_back = "g"\n'), script)


# -- configuration -------------------------------------------------------------------------------------------------------


def test_configuration_is_read(tmp_path: Path) -> None:
    got = own(tmp_path, 'theme = "light"\ncopy = "file"\nnoise = [0x20, 236]\n[keys]\nhelp = "F2"\n')
    assert (got.theme, got.copy, got.noise, dict(got.keys)) == ("light", "file", frozenset({0x20, 236}), {"help": ("f2",)})
    assert got.problems == ()
    assert own(tmp_path, "theme = 16\n").theme == "16"
    assert config.load(tmp_path / "none.toml") == Config(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("theme = ", "invalid|Invalid"),
        ('theme = "pink"', "theme is one of dark, light, 16, not 'pink'"),
        ("theme = [1]", "theme is one of"),
        ("copy = 1", "copy is one of"),
        ("noise = 3", "noise is a list of vectors"),
        ("noise = [256]", "noise is a list of vectors"),
        ("noise = [true]", "noise is a list of vectors"),
        ("keys = 1", "keys is a table"),
        ("[keys]\nhelp = 1", "keys: help: takes a key or a list"),
        ('[keys]\nhelp = ["F2", 1]', "keys: help: takes a key or a list"),
        ('[keys]\nhelp = "foo"', "keys: help: 'foo' is no key"),
        ('colour = "x"', "'colour' is not known"),
        ("\xff\x00", "nvalid"),
        ("x = " + "[" * 5000, "."),
    ],
)
def test_mistakes_are_one_line_each_and_not_fatal(tmp_path: Path, text: str, problem: str) -> None:
    got = own(tmp_path, text)
    assert len(got.problems) == 1
    assert re.search(problem, got.problems[0]) and got.problems[0].startswith("config.toml: ")
    assert got.problems[0].isprintable()

    async def script(screen: Screen) -> None:
        await screen.pilot.pause()
        assert "config.toml: " in screen.text().splitlines()[-2]
        assert "event 4 of 10" in await screen.press("j")

    if problem != ".":
        drive_with(got, script)


def test_file_that_is_no_text_or_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(b"\xff\xfe")
    assert len(config.load(path).problems) == 1
    assert config.load(tmp_path).problems == (f"{tmp_path.name}: is a directory",)
    path.write_bytes(b"#" * ((1 << 20) + 1))
    assert "larger than" in config.load(path).problems[0]


def test_unknown_action_is_told(tmp_path: Path) -> None:
    async def script(screen: Screen) -> None:
        await screen.pilot.pause()
        assert "there is no action 'nix'" in screen.text().splitlines()[-2]

    drive_with(own(tmp_path, '[keys]\nnix = "n"\n'), script)


def test_where_the_configuration_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert config.config_path() == tmp_path / "tracedbg" / "config.toml"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config.config_path() == tmp_path / ".config" / "tracedbg" / "config.toml"


@pytest.mark.parametrize(
    "text",
    ["", "# mine\n", 'theme = "dark" # yes\ncopy = "file"\n', "[keys]\nhelp = 'F2'\n", "copy = 'file'\n[keys]\ntheme = 'F5'\n"],
)
def test_keeping_a_theme_leaves_all_else(tmp_path: Path, text: str) -> None:
    path = tmp_path / "deep" / "config.toml"
    if text:
        path.parent.mkdir()
        path.write_text(text)
    before = tomllib.loads(text)
    config.keep(path, "theme", "light")
    after = tomllib.loads(path.read_text())
    assert after.pop("theme") == "light"
    before.pop("theme", None)
    assert after == before
    assert "# mine" in path.read_text() or "# mine" not in text
    assert os.listdir(path.parent) == ["config.toml"]


def test_a_file_with_mistakes_is_not_written_to(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    for text in ("theme = \n", '"theme" = "dark"\n', '# """\nx = """\ntheme = 1\n"""\n'):
        path.write_text(text)
        with pytest.raises(UsageError):
            config.keep(path, "theme", "light")
        assert path.read_text() == text


# -- colours -------------------------------------------------------------------------------------------------------------


def test_themes_cycle_and_the_choice_is_kept(tmp_path: Path) -> None:
    wanted = own(tmp_path, 'copy = "file"\n')
    assert wanted.path is not None

    async def script(screen: Screen) -> None:
        before = screen.text().splitlines()[:-2]
        grounds = {screen.app.current_theme.background}
        for name in ("light", "16", "dark"):
            text = await screen.press("T")
            assert f"theme {name}" in text.splitlines()[-2]
            assert text.splitlines()[:-2] == before  # the same text in all colours
            assert config.load(wanted.path).theme == name
            grounds.add(screen.app.current_theme.background)
        assert len(grounds) == 3

    drive_with(wanted, script)
    assert config.load(wanted.path).copy == "file"


def test_theme_that_cannot_be_kept_is_still_shown(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    async def script(screen: Screen) -> None:
        assert "theme light (not kept: not a directory)" in await screen.press("T")
        assert screen.app.theme == "tracedbg-light"

    drive_with(Config(tmp_path / "file" / "config.toml"), script)


def colours(screen: Screen) -> set[str]:
    """The colours that go to the terminal: of the filtered segments."""
    found = set()
    for strip in screen.app.screen._compositor.render_strips():
        for text, style, _ in strip.apply_filter(screen.app._filters[-1], screen.app.screen.styles.background):
            if text.strip() and style is not None:
                found |= {c.name for c in (style.color, style.bgcolor) if c is not None}
    return found


def test_no_color_means_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")

    async def script(screen: Screen) -> None:
        assert colours(screen) == {"default"}
        assert "✗ was 0xe010" in screen.text()
        strips = screen.app.screen._compositor.render_strips()
        row = next(s for s in strips if "▶" in s.text)
        assert any(style.reverse for text, style, _ in row if style is not None and "▶" in text)  # the cursor
        await screen.press("T")
        assert colours(screen) == {"default"}

    drive(race(), script)


def test_sixteen_colours_are_the_terminals() -> None:
    async def script(screen: Screen) -> None:
        for strip in screen.app.screen._compositor.render_strips():
            for text, style, _ in strip:
                for colour in (style.color, style.bgcolor) if style is not None and text.strip() else ():
                    assert colour is None or colour.triplet is None, (text, colour)

    drive_with(Config(theme="16"), script)


# -- mouse and sizes -----------------------------------------------------------------------------------------------------


def test_wheel_scrolls_and_the_cursor_stays() -> None:
    async def script(screen: Screen) -> None:
        pane = screen.app.query_one("#events", EventList)
        top = pane.scroll_offset.y
        await screen.pilot.resize_terminal(120, 12)
        await screen.press("g")
        pane.post_message(events.MouseScrollDown(pane, 1, 1, 0, 1, 0, False, False, False))
        await screen.pilot.pause(0.3)
        assert pane.scroll_offset.y > top and screen.app.selected == 0

    drive(race(6), script)


def test_double_clicks_go_somewhere_in_every_pane() -> None:
    async def script(screen: Screen) -> None:
        await screen.press("G")
        lines = screen.text().splitlines()
        y = next(n for n, line in enumerate(lines) if "NMI@3" in line)
        await screen.pilot.click(offset=(lines[y].index("NMI@3"), y), times=2)
        await settle(screen.app, screen.pilot)
        assert screen.app.selected == 3  # the writer of the word
        await screen.pilot.click("#events", offset=(5, 4), times=2)
        await settle(screen.app, screen.pilot)
        assert screen.app.selected == 3
        assert len(screen.app.screen_stack) == 2  # explained

    drive(race(6), script)


@pytest.mark.parametrize("size", [(20, 5), (40, 10), (80, 24), (300, 80)])
def test_every_size_shows_the_place(size: tuple[int, int]) -> None:
    async def script(screen: Screen) -> None:
        lines = screen.text().splitlines()
        assert len(lines) == size[1] and max(map(len, lines)) <= size[0]
        for key in ("tab", "tab", "tab", "question_mark", "escape", "z", "z", "j"):
            await screen.press(key)
        assert screen.app.selected == 3

    drive(race(6), script, size=size)


JOBS = """
set -m
"$0" -m tracedbg "$1"
echo "stopped $?"
fg >/dev/null
echo "ended $?"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs a shell with job control")
def test_suspended_and_back_the_screen_is_whole(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "race.tdbg"
    write_race(path)
    words = ("bash", "--norc", "-c", JOBS, sys.executable, str(path))
    terminal = Terminal(path, root, words=words, XDG_CONFIG_HOME=str(tmp_path))
    try:
        assert b"OVERWRITTEN" in terminal.read(b"OVERWRITTEN")
        os.write(terminal.master, b"\x1a")
        gone = terminal.read(b"stopped 1")
        assert b"\x1b[?1049l" in gone and b"stopped 1" in gone
        back = gone.split(b"stopped 1", 1)[1] + terminal.read(b"quit")  # the shell may have gone on already
        assert b"\x1b[?1049h" in back
        for part in (b"race.tdbg", b"Events", b"OVERWRITTEN", b"quit"):  # all of it, not only what has changed
            if part not in back:  # still to come
                back += terminal.read(part)
            assert part in back, part
        os.write(terminal.master, b"q")
        assert b"ended 0" in terminal.read()
    finally:
        terminal.close()


# -- scripts -------------------------------------------------------------------------------------------------------------


def test_picture_of_a_script(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    path, out = tmp_path / "race.tdbg", tmp_path / "out.svg"
    write_race(path, returns=6)
    run_cli("view", "--keys", ": 7 Enter", "--shot", out, "--size", "100x30", path, code=0)
    first = out.read_bytes()
    assert b"event&#160;7&#160;of&#160;10" in first
    done = run_cli("view", "--shot", out, path, code=2)
    assert "exists" in done.stderr and out.read_bytes() == first
    assert "is no key" in run_cli("view", "--keys", "Ctrl-Foo", "--shot", tmp_path / "x.svg", path, code=2).stderr
    assert "COLUMNSxROWS" in run_cli("view", "--size", "9x9", "--shot", tmp_path / "x.svg", path, code=2).stderr
    assert not (tmp_path / "x.svg").exists()


def test_page_about_the_configuration(run_cli: Callable[..., Any]) -> None:
    assert "config.toml" in run_cli("help", "config", code=0).stdout
