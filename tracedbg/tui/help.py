"""The help screen: keys and glyphs."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from tracedbg.tui.goto import HELP as GOTO

KEYS = (
    ("In time", ""),
    ("j k  ↓ ↑", "next / previous event (other panes: move in them)"),
    ("l h  → ←", "next / previous event, in every pane"),
    ("PgDn PgUp", "a page;  Ctrl-D Ctrl-U half a page"),
    ("g G  Home End", "first / last event"),
    ("n N  f F", "next / previous finding"),
    ("] [  . ,", "next / previous event of this CPU"),
    ("v V", "next / previous delivery of the same vector"),
    (":", f"go to: {GOTO}"),
    ("Ctrl-O Backspace", "back to where the last jump began"),
    ("In the panes", ""),
    ("Tab Shift-Tab", "next / previous pane"),
    ("z", "make the pane as large as the screen, and back"),
    ("Enter", "finding: to its event;  word: to the event that wrote it"),
    ("y", "copy what the details say"),
    ("? q", "this page;  quit (Ctrl-C too)"),
    ("Frames", ""),
    ("●", "live: its context is still to be resumed"),
    ("✗", "overwritten while it was live; `was` is what its own delivery stored"),
    ("→ ○ ~ =", "moved (copied);  left;  overwritten: survived / same value"),
    ("* <", "written by this event;  popped or read by it"),
    ("◀ RSP", "where RSP points;  ?? unknown bytes;  ··· words folded"),
    ("Findings", ""),
    ("✗ ! ·", "error, warning, note"),
)


class HelpScreen(ModalScreen[None]):
    """All keys. Any of the keys that open or close things closes it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,question_mark,enter,f1", "dismiss", "close", show=False),
        Binding("j,down", "scroll(1)", "down", show=False),
        Binding("k,up", "scroll(-1)", "up", show=False),
    ]

    def compose(self) -> ComposeResult:
        text = Text()
        for key, what in KEYS:
            if not what:
                text.append(f"{key}\n", "bold underline")
            else:
                text.append(f"  {key:<17}", "bold")
                text.append(f"{what}\n")
        text.rstrip()
        with VerticalScroll(id="help-body") as body:
            body.border_title = "Keys (Esc closes)"
            yield Static(text, markup=False)

    def action_scroll(self, lines: int) -> None:
        self.query_one("#help-body", VerticalScroll).scroll_relative(y=lines, animate=False)
