"""What leaves the viewer: copies to the clipboard and to a file, and exports into the current directory."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import ModalScreen
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from tracedbg import rules
from tracedbg.output import create_beside
from tracedbg.report import markdown
from tracedbg.text import clean_path
from tracedbg.tui.base import Viewer
from tracedbg.tui.details import Details
from tracedbg.tui.event_list import EventList
from tracedbg.tui.finding_list import FindingList
from tracedbg.tui.stack_view import StackView
from tracedbg.tui.svg import tidy

MAX_STEM = 60  # characters of a trace's name in the name of an export
MAX_TRIES = 1000  # names tried for one export


def state_dir() -> Path:
    """Where the XDG Base Directory specification wants state. Raises RuntimeError where there is no home directory."""
    given = os.environ.get("XDG_STATE_HOME", "")
    base = Path(given) if os.path.isabs(given) else Path.home() / ".local" / "state"  # a relative one is to be ignored
    return base / "tracedbg"


def keep_copy(text: str) -> Path:
    """Write a copy to `copy.md` of the state directory, readable by its owner only. Raises OSError, RuntimeError."""
    path = state_dir() / "copy.md"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file, temporary = create_beside(str(path))
    try:
        with file:
            os.chmod(temporary, 0o600)
            file.write(text.encode("utf-8", "backslashreplace"))
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    return path


def file_stem(path: str) -> str:
    """The name of a trace as part of another name: nothing in it that a shell or a terminal acts on."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", os.path.basename(path).removesuffix(".tdbg"))
    return name.strip("._-")[:MAX_STEM].rstrip("._-") or "trace"


def write_new(stem: str, suffix: str, text: str) -> str:
    """Write a file of the current directory that did not exist, and give its name. Raises OSError."""
    for number in range(MAX_TRIES):
        name = f"{stem}-{number}{suffix}" if number else f"{stem}{suffix}"
        try:
            file = open(name, "x", encoding="utf-8", errors="backslashreplace", newline="\n")  # noqa: SIM115 (closed below)
        except FileExistsError:
            continue
        try:
            with file:
                file.write(text)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
        return name
    raise FileExistsError(f"{MAX_TRIES} files of that name exist")


def _why(error: Exception) -> str:
    return ((error.strerror if isinstance(error, OSError) else None) or str(error)).lower()


def _shown(path: Path) -> str:
    """A path as people write it."""
    text, home = clean_path(str(path)), os.path.expanduser("~")
    return f"~{text[len(home):]}" if home != "/" and text.startswith(home + "/") else text


class ExportScreen(ModalScreen[str]):
    """Asks what to export; returns `svg`, `md` or nothing."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("s", "choose('svg')", "screen as SVG"),
        Binding("m", "choose('md')", "finding as Markdown"),
        Binding("j", "move(1)", show=False),
        Binding("k", "move(-1)", show=False),
        Binding("escape,q,x", "dismiss", "cancel", show=False),
    ]

    def __init__(self, finding: str | None) -> None:
        super().__init__()
        self._finding = finding

    def compose(self) -> ComposeResult:
        what = f"{self._finding} as Markdown" if self._finding is not None else "no finding is selected"
        options = OptionList(
            Option("s  the screen as SVG", id="svg"),
            Option(f"m  {what}", id="md", disabled=self._finding is None),
            id="export",
            markup=False,
        )
        options.border_title = "Export into the current directory"
        yield options

    def on_mount(self) -> None:
        options = self.query_one(OptionList)
        options.highlighted = 0
        options.focus()

    def action_choose(self, what: str) -> None:
        if what != "md" or self._finding is not None:
            self.dismiss(what)

    def action_move(self, lines: int) -> None:
        options = self.query_one(OptionList)
        if lines > 0:
            options.action_cursor_down()
        else:
            options.action_cursor_up()

    @on(OptionList.OptionSelected)
    def _selected(self, message: OptionList.OptionSelected) -> None:
        self.dismiss(message.option_id)


class Exports(Viewer):
    """Adds copying and exporting."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "copy", "copy", show=False),
        Binding("Y", "copy_finding", "copy finding", show=False),
        Binding("x", "export", "export", show=False),
    ]

    copy_to: str = "both"  # or `terminal`, `file`
    inputs: tuple[str, ...] = ()  # the words of a command line that open this trace; empty: its path

    def action_copy(self) -> None:
        text = self._under_cursor()
        if text:
            self._copy(text, f"the {'word' if ' ' not in text else 'lines' if chr(10) in text else 'line'}")
        else:
            self._say("nothing to copy here")

    def action_copy_finding(self) -> None:
        number = self.finding_in_hand()
        if number is None:
            self._say("no finding is selected")
        else:
            self._copy(self._markdown(number), f"finding {number + 1}")

    def action_export(self) -> None:
        number = self.finding_in_hand()
        self.push_screen(ExportScreen(None if number is None else f"finding {number + 1}"), self._export_chosen)

    def _under_cursor(self) -> str:
        """The word or line under the cursor of the pane that has the focus. A widget may say so itself by copy_text()."""
        pane = self.focused
        own = getattr(pane, "copy_text", None)
        if callable(own):
            return str(own())
        if isinstance(pane, StackView):
            row = pane.row(pane.cursor)
            return (row.value or row.text).strip() if row is not None else ""
        if isinstance(pane, FindingList) and self.findings.valid(pane.cursor) is not None:
            return self.words.finding_line(self.findings.items[pane.cursor])
        if isinstance(pane, Details):
            return "\n".join(pane.lines)
        event = self._event()
        if isinstance(pane, EventList) and event is not None:
            return f"{self.words.event_name(event.index)}: {self.words.event_line(event)}"
        return ""

    def _markdown(self, number: int) -> str:
        return markdown.one(self.findings.items[number], self.words, self.inputs or (self.trace.path,))

    def _copy(self, text: str, what: str) -> None:
        """To the clipboard of the terminal, which never answers whether it took it, and to a file."""
        places = []
        if self.copy_to != "terminal":
            try:
                places.append(_shown(keep_copy(text)))
            except (OSError, RuntimeError) as error:
                if self.copy_to == "file":
                    self._say(f"cannot copy {what}: {_why(error)}")
                    return
                places.append(f"no file ({_why(error)})")
        if self.copy_to != "file":
            self.copy_to_clipboard(text)
            places.append("the clipboard (if the terminal allows it)")
        self._say(f"copied {what} to {' and '.join(places)}")

    def _export_chosen(self, what: str | None) -> None:
        if what is not None:
            self.call_after_refresh(self._export, what)  # without the menu in the picture

    def _export(self, what: str) -> None:
        number = self.finding_in_hand()
        stem = f"tracedbg-{file_stem(self.trace.path)}"
        if what == "md" and number is not None:
            rule = rules.rule_id(self.findings.items[number].rule)
            stem, text = f"{stem}-finding-{number + 1}-{rule}", self._markdown(number)
        else:
            what, stem = "svg", f"{stem}-event-{self.selected}"
            text = tidy(self.export_screenshot(title=f"tracedbg {clean_path(os.path.basename(self.trace.path))}"))
        try:
            self._say(f"wrote {write_new(stem, f'.{what}', text)}")
        except OSError as error:
            self._say(f"cannot write {stem}.{what}: {_why(error)}")
