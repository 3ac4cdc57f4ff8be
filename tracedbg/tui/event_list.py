"""The list of events: one line each, decoded when it is shown."""

from __future__ import annotations

from typing import ClassVar

from rich.segment import Segment
from rich.style import Style

from tracedbg.describe import Words
from tracedbg.state import Known
from tracedbg.trace import Trace
from tracedbg.tui.lines import LineList
from tracedbg.tui.marks import GLYPHS

PROBE = 32  # events looked at, at both ends, to see whether the source has numbers of its own
TIME_WIDTH = 100  # narrower lists have no column for the time
BRIEF_WIDTH = 64  # narrower ones say it in fewer words


class EventList(LineList):
    """Columns: marks, index, the source's number, CPU, time, the event in words."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "lines--cursor", "lines--focus", "marks--error", "marks--warning", "marks--note", "events--number", "events--part",
    }  # fmt: skip
    BORDER_TITLE = "Events"

    def __init__(self, trace: Trace, words: Words, *, id: str) -> None:
        super().__init__(id=id)
        self._trace = trace
        self._words = words
        self._marks: dict[int, str] = {}
        self._roles: dict[int, str] = {}
        self._digits = len(str(max(trace.count - 1, 0)))
        self._cpu_digits = len(str(max(trace.cpus - 1, 0)))
        self._source_width = 0
        self._start = 0

    def on_mount(self) -> None:
        count = self._trace.count
        ends = (*range(min(PROBE, count)), *range(max(count - PROBE, 0), count))
        events = [e for e in map(self._trace.event, ends) if e.known & Known.SOURCE_INDEX]
        numbers = [e.source_index for e in events if e.source_index != e.index]
        self._source_width = len(str(max(numbers))) + 1 if numbers else 0
        self._start = self._trace.event(0).time if count else 0
        self.set_count(self._trace.count)

    def set_marks(self, marks: dict[int, str]) -> None:
        """Severities of events with findings."""
        self._marks = marks
        self.forget()

    def set_roles(self, roles: dict[int, str]) -> None:
        """The events of the finding in hand and their parts in it (`victim`, `writer`, ...)."""
        if roles != self._roles:
            self._roles = roles
            self.forget()

    def line(self, index: int, width: int, base: Style, current: bool) -> list[Segment]:
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
        role = self._roles.get(index)
        if role:
            segments.append(Segment(f"[{role}] ", base + self.part("events--part")))
        segments.append(Segment(self._words.event_brief(event) if brief else self._words.event_line(event), base))
        return segments
