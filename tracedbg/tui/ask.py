"""A line at the bottom of the screen that asks for some text."""

from __future__ import annotations

from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import ModalScreen
from textual.widgets import Input


class AskScreen(ModalScreen[str | None]):
    """Returns what was typed, None after Escape."""

    DEFAULT_CSS = """
    AskScreen { align: left bottom; background: transparent; }
    AskScreen > Input { dock: bottom; height: 1; border: none; padding: 0 1; background: $surface; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,ctrl+c", "dismiss", "cancel", show=False, priority=True)]

    def __init__(self, hint: str, text: str = "", *, most: int = 0) -> None:
        super().__init__()
        self._hint = hint
        self._text = text
        self._most = most  # characters, 0: any number

    def compose(self) -> ComposeResult:
        yield Input(self._text, placeholder=self._hint, max_length=self._most, select_on_focus=False, compact=True)

    def on_mount(self) -> None:
        self.query_one(Input).focus()

    @on(Input.Submitted)
    def _submitted(self, message: Input.Submitted) -> None:
        message.stop()
        self.dismiss(message.value)
