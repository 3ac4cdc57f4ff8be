"""The part of the viewer that follows a trace while it is being written."""

from __future__ import annotations

from dataclasses import replace

from textual.timer import Timer

from tracedbg.errors import FormatError
from tracedbg.growing import Change, Growing
from tracedbg.text import clean
from tracedbg.tui.base import Viewer
from tracedbg.tui.event_list import EventList
from tracedbg.tui.searching import SearchPart
from tracedbg.tui.session import Progress

POLL = 0.2  # seconds between two looks at the file
HURRY = 0.01  # the same while there is more in it than one look takes


class Following(Viewer):
    """Takes what is added to the file. Who is at the end stays there, all others stay where they are."""

    growing: Growing | None = None  # to be set before the run
    _looks: Timer | None = None

    def on_mount(self) -> None:
        if self.growing is None or self.growing.finished:
            return
        if not self._moved:  # as `tail -f` does
            self._moved, self.selected = True, max(self.trace.count - 1, 0)
        self._wait()

    def _header_note(self) -> str:
        return super()._header_note() + ("  following" if self._looks is not None else "")

    def _wait(self) -> None:
        self._looks = self.set_timer(HURRY if self.growing is not None and self.growing.behind else POLL, self._look)

    def _look(self) -> None:
        if self.growing is None:
            return
        at_end = self.selected >= self.trace.count - 1
        try:
            change = self.growing.poll()
        except FormatError as error:
            self._stop_following(f"following ended: {clean(error.message, 200)}")
            return
        if change is not Change.NONE:
            self._grown(change, at_end)
        if change is Change.FINISHED:
            self._stop_following(f"the trace is finished: {self.trace.count:,} events")
        elif change is Change.OTHER:
            self._stop_following("the trace is finished, and says more than was known: replayed anew")
        else:
            self._wait()

    def _stop_following(self, why: str) -> None:
        self._looks = None
        self._say(why)
        self._paint_header()

    def _grown(self, change: Change, at_end: bool) -> None:
        self.session.grow(self.trace.events, anew=change is Change.OTHER)
        self._done = False
        if change is Change.OTHER:
            self._begin_anew()
        self.query_one("#events", EventList).grow()
        self.extend_filter()
        if at_end or change is Change.OTHER:
            self._place(self.trace.count - 1 if at_end else self.selected, center=False)
        self._paint_header()

    def _begin_anew(self) -> None:
        """The findings of what the trace was taken for are void."""
        self.words.reload()
        if isinstance(self, SearchPart) and self.matches is not None:
            self._apply()
        self.view = self._finding = self._last = self._stats = None
        self.findings.take(0, ())
        self._scanned = 0

    def _progressed(self, progress: Progress) -> None:
        if progress.count < self.trace.count:  # the session has yet to hear of the newest events
            progress = replace(progress, done=False)
        super()._progressed(progress)
