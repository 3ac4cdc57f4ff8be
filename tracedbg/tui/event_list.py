"""The list of events: one line each, decoded when it is shown."""

from __future__ import annotations

from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual.binding import Binding, BindingType

from tracedbg.describe import Words
from tracedbg.state import Known
from tracedbg.trace import Trace
from tracedbg.tui.lines import QUIET, LineList
from tracedbg.tui.marks import GLYPHS
from tracedbg.tui.matches import Matches

_CPU = Binding.Group("cpu", compact=True)
PROBE = 32  # events looked at, at both ends, to see whether the source has numbers of its own
TIME_WIDTH = 100  # narrower lists have no column for the time
BRIEF_WIDTH = 64  # narrower ones say it in fewer words


class EventList(LineList):
    """Columns: marks, index, the source's number, CPU, time, the event in words.

    With a filter its rows are the events that match, and the selected one where it does not.
    """

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "lines--cursor", "lines--focus", "marks--error", "marks--warning", "marks--note", "events--number", "events--part",
    }  # fmt: skip
    BORDER_TITLE = "Events"
    BINDINGS: ClassVar[list[BindingType]] = [  # what the app offers everywhere and the footer shows here
        *QUIET,
        Binding("left_square_bracket,comma", "app.same_cpu(-1)", "back", key_display="[", group=_CPU, id="previous_of_cpu"),
        Binding("right_square_bracket,full_stop", "app.same_cpu(1)", "on", key_display="]", group=_CPU, id="next_of_cpu"),
        Binding("v", "app.same_vector(1)", "vector", key_display="v", id="next_of_vector"),
        Binding("enter", "choose", "explain its finding", show=False, id="choose"),
    ]

    def __init__(self, trace: Trace, words: Words, *, id: str) -> None:
        super().__init__(id=id)
        self._trace = trace
        self._words = words
        self._marks: dict[int, str] = {}
        self._roles: dict[int, str] = {}
        self._digits = 0
        self._cpu_digits = len(str(max(trace.cpus - 1, 0)))
        self._source_width = 0
        self._start = 0
        self._event = 0
        self._matches: Matches | None = None
        self._extra: int | None = None  # row of the selected event, if it is none of the matches

    def on_mount(self) -> None:
        self._measure()
        self.set_count(self._trace.count)

    def grow(self) -> None:
        """The trace has become longer."""
        self._measure()
        self.forget()
        self._arrange()

    def _measure(self) -> None:
        """The widths of columns."""
        count = self._trace.count
        self._digits = len(str(max(count - 1, 0)))
        ends = (*range(min(PROBE, count)), *range(max(count - PROBE, 0), count))
        events = [e for e in map(self._trace.event, ends) if e.known & Known.SOURCE_INDEX]
        numbers = [e.source_index for e in events if e.source_index != e.index]
        self._source_width = len(str(max(numbers))) + 1 if numbers else 0
        self._start = self._trace.event(0).time if count else 0

    def set_marks(self, marks: dict[int, str]) -> None:
        """Severities of events with findings."""
        self._marks = marks
        self.forget()

    def set_roles(self, roles: dict[int, str]) -> None:
        """The events of the finding in hand and their parts in it (`victim`, `writer`, ...)."""
        if roles != self._roles:
            self._roles = roles
            self.forget()

    # -- rows and events ---------------------------------------------------------------------------------------------

    def select(self, event: int, *, center: bool = False) -> None:
        """Move the cursor to an event without telling anybody."""
        old, self._event = self._event, event
        row = self._arrange()
        if self._extra is not None and old != event:
            self.forget()  # the row of another event until now
        self.set_cursor(row, center=center)

    def set_matches(self, matches: Matches | None) -> None:
        """Show only these; call it again when they have grown."""
        anew = matches is not self._matches
        self._matches = matches
        self.forget()
        row = self._arrange()
        if anew or row != self.cursor:
            self.set_cursor(row, center=anew)

    def _arrange(self) -> int:
        """The row of the selected event; it gets one of its own if it has none."""
        row, extra, count = self._event, None, self._trace.count
        if self._matches is not None:
            row, found = self._matches.place(self._event)
            extra = None if found or not count else row
            count = len(self._matches) + (extra is not None)
        if (count, extra) != (self.count, self._extra):
            self._extra = extra
            self.set_count(count)
        return row

    def item(self, row: int) -> int:
        if self._matches is None:
            return row
        if self._extra is not None and row >= self._extra:
            return self._event if row == self._extra else self._matches[row - 1]
        return self._matches[row]

    # -- painting ------------------------------------------------------------------------------------------------------

    def line(self, row: int, width: int, base: Style, current: bool) -> list[Segment]:
        index = self.item(row)
        number = base + self.part("events--number")
        severity = self._marks.get(index)
        mark = Segment(f"{GLYPHS[severity]} ", base + self.part(f"marks--{severity}")) if severity else Segment("  ", base)
        segments = [Segment("▶" if current else " ", base), mark, Segment(f"{index:>{self._digits}} ", number)]
        event = self._trace.event(index)
        brief = width < BRIEF_WIDTH
        if self._source_width:
            source = f"#{event.source_index}" if event.known & Known.SOURCE_INDEX else ""
            if source or not brief:
                segments.append(Segment(f"{source:<{self._source_width}} ", number))
        if self._trace.cpus > 1:
            cpu = str(event.cpu) if event.known & Known.CPU else "?"
            segments.append(Segment(f"c{cpu:<{self._cpu_digits}} ", number))
        if width >= TIME_WIDTH and self._trace.clock_hz and event.known & Known.TIME:
            segments.append(Segment(f"{(event.time - self._start) / self._trace.clock_hz:>12.6f} ", number))
        if row == self._extra and self._matches is not None and self._matches.covered > index:
            segments.append(Segment("(filtered out) ", base + self.part("events--part")))
        role = self._roles.get(index)
        if role:
            segments.append(Segment(f"[{role}] ", base + self.part("events--part")))
        segments.append(Segment(self._words.event_brief(event) if brief else self._words.event_line(event), base))
        return segments
