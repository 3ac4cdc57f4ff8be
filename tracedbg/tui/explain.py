"""The explanation of a finding as a screen: who, how, which bytes, by which rule, and what to do; its events are links."""

from __future__ import annotations

from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import ModalScreen
from textual.widgets import Footer

from tracedbg.describe import Words
from tracedbg.state import Finding
from tracedbg.tui.base import Viewer
from tracedbg.tui.details import Details
from tracedbg.tui.explain_lines import LINK, Line, explanation
from tracedbg.tui.lines import LineList
from tracedbg.tui.session import Progress

TALL = 50  # rows; from there on the viewer stays in sight above the explanation
LEADS, HERE = "» ", "◆ "  # before lines that lead to an event, and to the one that is selected
GUTTER = 1  # columns for the sign of the cursor


class Explanation(LineList):
    """The lines of an explanation. The cursor goes to any line; Enter and clicks follow those that lead somewhere."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "lines--cursor", "lines--focus", "marks--error", "marks--warning", "marks--note", "explain--title", "explain--label",
        "explain--link", "stack--clobbered", "stack--left",
    }  # fmt: skip

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "choose", "go", key_display="Enter")]

    def __init__(self, words: Words, finding: Finding, *, id: str) -> None:
        super().__init__(id=id)
        self._words = words
        self._finding = finding
        self._lines: list[Line] = []
        self._width = 0
        self._here: int | None = None

    def show_finding(self, finding: Finding) -> None:
        """Explain another finding, or say of the same one what is known by now."""
        same = finding.number == self._finding.number
        self._finding = finding
        self._build(keep=same)

    def set_here(self, event: int) -> None:
        """Mark the lines that lead to the selected event."""
        if event != self._here:
            self._here = event
            self.forget()

    def event_at(self, index: int) -> int | None:
        """Where a line leads."""
        return self._lines[index].event if 0 <= index < len(self._lines) else None

    def copy_text(self) -> str:
        """What the cursor is on, unwrapped; of a row of bytes the value that is there now."""
        return self._lines[self.cursor].text if self.cursor < len(self._lines) else ""

    def _build(self, *, keep: bool) -> None:
        self._width = self.scrollable_content_region.width
        old = self._links().index(self.cursor) if keep and self.cursor in self._links() else 0
        self._lines = explanation(self._finding, self._words, self._width - GUTTER)
        self.set_count(len(self._lines))
        links = self._links()
        self.cursor = links[min(old, len(links) - 1)] if links else 0
        if old:
            self.show(self.cursor)
        else:
            self.scroll_to(y=0, animate=False, force=True)
        self.forget()

    def _links(self) -> list[int]:
        return [number for number, line in enumerate(self._lines) if line.first]

    def line(self, index: int, width: int, base: Style, current: bool) -> list[Segment]:
        line = self._lines[index]
        segments = [Segment("▶" if current else " ", base)]
        if line.event is not None:
            mark = (HERE if line.event == self._here else LEADS) if line.first else " " * LINK
            segments.append(Segment(mark, base + self.part("explain--link")))
        segments += [Segment(text, base + self.part(style) if style else base) for text, style in line.parts]
        return segments

    def action_link(self, direction: int) -> None:
        """To the next line that leads somewhere, around the end."""
        links = self._links()
        if not links:
            return
        beyond = [n for n in links if (n > self.cursor if direction > 0 else n < self.cursor)]
        self.move_to((beyond or links)[0 if direction > 0 else -1])

    def on_resize(self, event: events.Resize) -> None:
        if self.scrollable_content_region.width != self._width:
            self._build(keep=bool(self._lines))

    def on_click(self, event: events.Click) -> None:
        event.prevent_default()
        offset = event.get_content_offset(self)
        index = int(self.scroll_offset.y) + offset.y if offset is not None else self.count
        if index >= self.count:
            return
        self.move_to(index)
        if self.event_at(index) is not None:
            self.post_message(self.Chosen(self, index))


class ExplainScreen(ModalScreen[int]):
    """Explains finding `number`; returns the event to go to."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "stay", "peek", key_display="Space"),
        Binding("tab", "link(1)", "link", key_display="Tab"),
        Binding("shift+tab", "link(-1)", "previous link", show=False),
        Binding("n,f", "finding(1)", "next", key_display="n"),
        Binding("N,F", "finding(-1)", "previous finding", show=False),
        Binding("y", "app.copy", "copy line", show=False),
        Binding("Y", "app.copy_finding", "copy", key_display="Y"),
        Binding("x", "app.export", "export", key_display="x"),
        Binding("escape,e,q", "close", "close", key_display="Esc"),
        Binding("question_mark,f1", "app.help", "help", show=False),
    ]

    def __init__(self, viewer: Viewer, number: int) -> None:
        super().__init__()
        self.viewer = viewer
        self.number = number

    def compose(self) -> ComposeResult:
        yield Explanation(self.viewer.words, self.viewer.findings.items[self.number], id="explanation")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self._lines.set_here(self.viewer.selected)
        self.say("")
        self._lines.focus()

    def on_resize(self, event: events.Resize) -> None:
        self.set_class(event.size.height >= TALL, "tall")

    @property
    def _lines(self) -> Explanation:
        return self.query_one("#explanation", Explanation)

    def say(self, message: str) -> None:
        """Tell something where the status line may be hidden: in the title."""
        title = f"Finding {self.number + 1} of {len(self.viewer.findings)}, explained"
        self._lines.border_title = Text(message or title)  # not markup

    def renew(self) -> None:
        """The findings have changed, as the scan goes on."""
        if self.is_mounted:
            self._lines.show_finding(self.viewer.findings.items[self.number])
            self.say("")

    def action_link(self, direction: int) -> None:
        self._lines.action_link(direction)

    def action_close(self) -> None:
        self.dismiss()

    @on(LineList.Chosen)
    def _chosen(self, message: LineList.Chosen) -> None:
        message.stop()
        event = self._lines.event_at(message.index)
        if event is not None:
            self.dismiss(event)

    @on(LineList.Moved)
    def _moved(self, message: LineList.Moved) -> None:
        message.stop()  # the viewer's own lists are others
        self.say("")

    def action_stay(self) -> None:
        event = self._lines.event_at(self._lines.cursor)
        if event is not None:
            self.viewer.go_to(event)
            self._lines.set_here(event)

    def action_finding(self, direction: int) -> None:
        number = self.viewer.findings.valid(self.number + direction)
        if number is None:
            self.say(f"no {'further' if direction > 0 else 'earlier'} finding")
            return
        self.number = number
        finding = self.viewer.findings.items[number]
        self.viewer.go_to(finding.event, finding=number)
        self._lines.show_finding(finding)
        self._lines.set_here(self.viewer.selected)
        self.say("")


class Explanations(Viewer):
    """Adds the explanation of the finding in hand."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("e", "explain", "explain", key_display="e")]

    def action_explain(self) -> None:
        number = self.finding_in_hand()
        if number is None:
            found = "n goes to the next one" if self.findings else "there is none" + ("" if self._done else " so far")
            self._say(f"no finding is selected; {found}")
            return
        self._moved = True  # the user looks at something: the scan must not take the place away
        self.push_screen(ExplainScreen(self, number), self._explained)

    def _explained(self, event: int | None) -> None:
        if event is None:
            return
        number = self.finding_in_hand()
        same = number is not None and self.findings.items[number].event == event
        self.go_to(event, finding=number if same else None)

    @on(Details.Chosen)
    def _details_chosen(self) -> None:
        self.action_explain()

    def action_pane(self, direction: int) -> None:
        if isinstance(self.screen, ExplainScreen):  # the key is the app's before it is the screen's
            self.screen.action_link(direction)
        else:
            super().action_pane(direction)

    def _progressed(self, progress: Progress) -> None:
        super()._progressed(progress)
        for screen in self.screen_stack:
            if isinstance(screen, ExplainScreen):
                screen.renew()

    def _say(self, message: str) -> None:
        super()._say(message)
        if isinstance(self.screen, ExplainScreen):
            self.screen.say(message)
