"""The part of the viewer that shows where one is: the strip, the timeline, and whose stacks are shown."""

from __future__ import annotations

from typing import ClassVar

from textual import events, on
from textual.binding import Binding, BindingType

from tracedbg.tui.base import Viewer
from tracedbg.tui.overview import Survey
from tracedbg.tui.session import Progress, View
from tracedbg.tui.strip import StateStrip
from tracedbg.tui.timeline import TimelineBar

WIDE = 140  # columns from which on the stacks get more room
BARE = 30  # lines below which strip and timeline have one each
EACH = 8  # lines of the screen for each lane of the timeline
STRIP = 100  # columns below which the strip gets a second line on a tall screen
TALL = 40


class PicturePart(Viewer):
    """Strip, timeline, and the stacks of other CPUs."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("t", "timeline", "timeline", show=False),
        Binding("c", "other_cpu(1)", "stacks of the next CPU", show=False),
        Binding("C", "other_cpu(-1)", "stacks of the previous CPU", show=False),
    ]

    AUTO_FOCUS = "#events"
    _watched: int | None = None  # the CPU whose stacks the user wants, whatever event is selected

    def on_mount(self) -> None:
        self.session.survey = Survey(self.trace.count, self.trace.cpus)

    def on_resize(self, event: events.Resize) -> None:
        width, height = event.size
        self.screen_stack[0].set_class(width >= WIDE, "wide")
        rows = 1 if height < BARE else 1 + max(1, min(self.trace.cpus, height // EACH - 1))
        self.query_one("#timeline").styles.height = rows
        self.query_one("#strip").styles.height = 2 if width < STRIP and height >= TALL else 1

    # -- what the base class tells ---------------------------------------------------------------------------------------

    def _place(self, index: int, *, center: bool) -> None:
        super()._place(index, center=center)
        self._mark_place()

    def _mark_place(self) -> None:
        bar = self.query_one("#timeline", TimelineBar)
        bar.set_position(self.selected, self._cpu())
        if bar.has_focus:
            self._say(f"timeline: {bar.tell()}")

    def _progressed(self, progress: Progress) -> None:
        super()._progressed(progress)
        if progress.overview is not None:
            self.query_one("#timeline", TimelineBar).show_overview(progress.overview)
            self._mark_place()

    def _viewed(self, view: View) -> None:
        super()._viewed(view)
        if self.trace.count:
            self.query_one("#strip", StateStrip).show_view(view)

    def _stack_cpu(self) -> int:
        return self._watched if self._watched is not None else super()._stack_cpu()

    # -- actions -------------------------------------------------------------------------------------------------------

    def action_timeline(self) -> None:
        """To the timeline, and back to the events."""
        bar = self.query_one("#timeline", TimelineBar)
        if bar.has_focus:
            self.query_one("#events").focus()
            self._say("")
        else:
            bar.focus()
            self._say(f"timeline: {bar.tell()}")

    def action_other_cpu(self, direction: int) -> None:
        """The stacks of each CPU in turn, then again those of the selected event's CPU."""
        cpus = self.trace.cpus
        if cpus == 1:
            self._say("the trace has one CPU")
            return
        turn = [None, *range(cpus)]
        self._watched = turn[(turn.index(self._watched) + direction) % len(turn)]
        self._say(f"stacks of cpu {self._watched}" if self._watched is not None else "stacks of the selected event's CPU")
        self._seek()

    @on(TimelineBar.Picked)
    def _picked(self, message: TimelineBar.Picked) -> None:
        if self.trace.count:
            self.go_to(message.event, jump=not message.dragging)
