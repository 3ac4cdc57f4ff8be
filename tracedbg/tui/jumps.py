"""Lists of events that lie over the viewer: Enter jumps to one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.screen import ModalScreen
from textual.widgets import Static

from tracedbg.tui.lines import LineList

LEAST = 3  # lines of a list
EDGES = 6  # lines of the screen that it leaves free

TextOf = Callable[[int], str]
Remove = Callable[[int], None]


class JumpList(LineList):
    """One line for each row: `text(row)` gives it when it is shown."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"lines--cursor", "lines--focus"}

    def __init__(self, text: TextOf, *, id: str) -> None:
        super().__init__(id=id)
        self._text = text

    def line(self, index: int, width: int, base: Style, current: bool) -> list[Segment]:
        return [Segment("▶ " if current else "  ", base), Segment(self._text(index), base)]


class JumpScreen(ModalScreen[int | None]):
    """A list of events, in rising order; returns the one that was chosen, None after Escape."""

    DEFAULT_CSS = """
    JumpScreen { align: center middle; }
    JumpScreen > Container {
        width: 110; max-width: 100%; height: auto; max-height: 100%; border: heavy $accent; background: $surface; padding: 0 1;
    }
    JumpScreen JumpList { height: 3; background: $surface; }
    JumpScreen Static { height: auto; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,backspace", "dismiss", "close", show=False),
        Binding("d,delete", "remove", "remove", show=False),
        Binding("ctrl+c", "dismiss", show=False, priority=True),
    ]

    def __init__(
        self, title: str, events: Sequence[int], text: TextOf, at: int, *, note: str = "", remove: Remove | None = None
    ) -> None:
        """`text(row)` words a row; the cursor starts at the last row at or before the event `at`; `remove`: what d does."""
        super().__init__()
        self._title = title
        self._events = events
        self._text = text
        self._at = at
        self._note = note
        self._remove = remove
        self._moved = False

    def compose(self) -> ComposeResult:
        with Container() as box:
            box.border_title = self._title
            box.border_subtitle = "Enter jumps · " + ("d removes · " if self._remove is not None else "") + "Esc closes"
            note = Static(self._note, markup=False, id="jump-note")
            note.display = bool(self._note)
            yield note
            yield JumpList(self._text, id="jumps")

    def on_mount(self) -> None:
        self.query_one(JumpList).focus()
        self.present()

    def present(self) -> None:
        """Show what there is."""
        self.show(self._title, self._note)

    def show(self, title: str, note: str = "") -> None:
        """The list has grown or shrunk, or there is something else to say of it."""
        self.query_one(Container).border_title = title
        line = self.query_one("#jump-note", Static)
        line.update(note)
        line.display = bool(note)
        lines = self.query_one(JumpList)
        lines.styles.height = max(LEAST, min(len(self._events), self.app.size.height - EDGES - bool(note)))
        lines.set_count(len(self._events))
        if not self._moved:
            place = max((n for n, event in enumerate(self._events) if event <= self._at), default=0) if self._at >= 0 else 0
            lines.set_cursor(place, center=True)

    @on(LineList.Moved)
    def _cursor_moved(self, message: LineList.Moved) -> None:
        message.stop()
        self._moved = True

    @on(LineList.Chosen)
    def _chosen(self, message: LineList.Chosen) -> None:
        message.stop()
        self.dismiss(self._events[message.index])

    def action_remove(self) -> None:
        lines = self.query_one(JumpList)
        if self._remove is not None and lines.count:
            self._moved = True
            self._remove(self._events[lines.cursor])
