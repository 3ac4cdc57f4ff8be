"""The line in which a search or a filter is typed."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.widgets import Input, Static

MAX_HISTORY = 100


class HistoryInput(Input):
    """Up and down bring back what was typed before."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "recall(-1)", "earlier", show=False),
        Binding("down", "recall(1)", "later", show=False),
    ]

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id, select_on_focus=False)
        self.past: list[str] = []
        self._at = 0
        self._draft = ""

    def begin(self, text: str, past: list[str]) -> None:
        """Ask anew."""
        self.value = self._draft = text
        self.past = past
        self._at = len(past)
        self.cursor_position = len(text)

    def action_recall(self, direction: int) -> None:
        at = self._at + direction
        if not 0 <= at <= len(self.past):
            return
        if self._at == len(self.past):
            self._draft = self.value
        self._at = at
        self.value = self.past[at] if at < len(self.past) else self._draft
        self.cursor_position = len(self.value)


class SearchBar(Horizontal):
    """`/` or `&`, and what is typed after it; each has a history of its own."""

    def __init__(self) -> None:
        super().__init__(id="search-bar")
        self.sign = "/"
        self._past: dict[str, list[str]] = {}

    def compose(self) -> ComposeResult:
        yield Static(self.sign, id="search-sign", markup=False)
        yield HistoryInput(id="find")

    def ask(self, sign: str, text: str, placeholder: str) -> None:
        """Take the focus and ask."""
        self.sign = sign
        self.query_one("#search-sign", Static).update(sign)
        prompt = self.query_one("#find", HistoryInput)
        prompt.placeholder = placeholder
        prompt.begin(text, self._past.setdefault(sign, []))
        self.screen.set_focus(prompt)  # focus() would come later than keys that were typed ahead

    def remember(self, text: str) -> None:
        """Keep what was typed for the next time."""
        past = self._past.setdefault(self.sign, [])
        if text in past:
            past.remove(text)
        past[:] = [*past[1 - MAX_HISTORY :], text]
