"""Marks: set and clear them, see them in the list of events, jump to them."""

from __future__ import annotations

from typing import Any, ClassVar

from textual.binding import Binding, BindingType

from tracedbg.errors import UsageError
from tracedbg.tui.ask import AskScreen
from tracedbg.tui.base import Viewer
from tracedbg.tui.jumps import JumpScreen
from tracedbg.tui.markfile import MAX_NOTE, Marks

NOTE_SHOWN = 16  # characters of a note in the list of events


class Marking(Viewer):
    """The part of the viewer that keeps places."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("m", "mark", "set or clear a mark", show=False),
        Binding("M", "marks", "list of marks", show=False),
    ]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.marks = Marks(self.trace)

    def on_mount(self) -> None:
        if self.marks.is_wrong:
            self._say(self.marks.problem)

    def action_mark(self) -> None:
        """Mark the selected event, or take its mark away."""
        if not self.trace.count:
            self._say("the trace has no events")
        elif self.selected in self.marks.notes:
            self.marks.clear(self.selected)
            self._marked("mark cleared")
        else:
            hint = f"note for the mark of event {self.selected} (may be empty)"
            self.push_screen(AskScreen(hint, most=MAX_NOTE), self._set_mark)

    def _set_mark(self, note: str | None) -> None:
        if note is None:
            return
        try:
            self.marks.set(self.selected, note)
            self._marked("marked")
        except UsageError as error:
            self._say(str(error))

    def _marked(self, text: str) -> None:
        self._say(f"{text}; {self.marks.problem}" if self.marks.problem else text)
        self._paint()

    def _event_roles(self) -> dict[int, str]:
        roles = super()._event_roles()
        for event, note in self.marks.notes.items():
            text = f"mark {note}".strip()
            text = text if len(text) <= NOTE_SHOWN else f"{text[: NOTE_SHOWN - 1]}…"
            roles[event] = f"{roles[event]}, {text}" if event in roles else text
        return roles

    def action_marks(self) -> None:
        """The list of marks."""
        if not self.marks.notes:
            self._say("no marks: m sets one")
            return
        events = [event for event, _ in self.marks]

        def text(row: int) -> str:
            event = self.words.event(events[row])
            note = self.marks.notes.get(events[row], "")
            return f"{events[row]:>10,}  {note:<24}  {self.words.event_line(event) if event is not None else ''}"

        def remove(event: int) -> None:
            self.marks.clear(event)
            events.remove(event)
            self._marked("mark cleared")
            screen.show(f"Marks ({len(events)})", self.marks.problem)

        screen = JumpScreen(f"Marks ({len(events)})", events, text, self.selected, note=self.marks.problem, remove=remove)
        self.push_screen(screen, self._go_to_chosen)

    def _go_to_chosen(self, event: int | None) -> None:
        if event is not None:
            self.go_to(event)
