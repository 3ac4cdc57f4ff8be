"""Travel in time: over handlers and out of them, along a frame, to who wrote or reads a word; the history of positions."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from textual import on
from textual.binding import Binding, BindingType

from tracedbg.describe import hex_address
from tracedbg.errors import UsageError
from tracedbg.filter import of_cpu
from tracedbg.state import Event, EventFlag, Kind, Known, Touch
from tracedbg.tui.ask import AskScreen
from tracedbg.tui.base import MAX_BACK, Viewer
from tracedbg.tui.finding_list import FindingList
from tracedbg.tui.goto import address_range, code_at, parse_goto
from tracedbg.tui.journeys import (
    LOADS,
    Arrived,
    Delivery,
    FindMatch,
    FindTime,
    FrameEnd,
    FrameEvent,
    Listed,
    NextTouch,
    Nowhere,
    Underway,
    WriteHistory,
)
from tracedbg.tui.messages import Reported
from tracedbg.tui.rows import RowKind
from tracedbg.tui.session import Journey, JourneyReport, Match, SourceSearch
from tracedbg.tui.stack_view import StackView
from tracedbg.tui.write_list import WriteScreen

PATIENCE = 0.3  # seconds that a journey may take before the screen says so
WORD = 8
RUN_TO = "run to: 12, symbol, address, write ADDR, read ADDR, return, here"  # here: the word or the finding in hand


class Travel(Viewer):
    """The part of the viewer that finds its way through a trace."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("o", "step_over", "step over the handler", show=False),
        Binding("O", "step_out", "out of the handler", show=False),
        Binding("u", "to_delivery", "back to the delivery", show=False),
        Binding("p", "frame_event(1)", "next event of the frame", show=False),
        Binding("P", "frame_event(-1)", "previous event of the frame", show=False),
        Binding("R", "run_to", "run to", show=False),
        Binding("ctrl+n", "jump_forward", "forward in the history", show=False),
        Binding("w", "writer", "who wrote the word", show=False),
        Binding("r", "reader", "who reads it next", show=False),
        Binding("W", "writes", "all writes of the word", show=False),
    ]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ahead: list[int] = []  # where Ctrl-N goes
        self._journey: Journey | None = None
        self._what = ""  # that the journey is after
        self._followed: tuple[int, int] | None = None  # a frame by its delivery, and the event of it that was gone to
        self._writes: WriteScreen | None = None

    # -- journeys ------------------------------------------------------------------------------------------------------

    def look_for(self, wish: SourceSearch | Journey) -> None:
        if isinstance(wish, Journey):
            self._set_out(wish, wish.what if isinstance(wish, FindMatch) else "event at that time or later")
        else:
            super().look_for(wish)

    def _set_out(self, journey: Journey, what: str) -> None:
        self._journey, self._what = journey, what
        self._message = ""
        self.session.wish(journey)
        self.set_timer(PATIENCE, partial(self._still_going, journey))

    def _still_going(self, journey: Journey) -> None:
        if journey is self._journey and not self._message and not isinstance(journey, WriteHistory):
            self._say(f"looking for {self._what} ... (Esc stops)")

    def _seek(self) -> None:
        self._journey = None  # a wish for another place has ended it
        super()._seek()

    @on(Reported)
    def _travelled(self, message: Reported) -> None:
        report = message.report
        if not isinstance(report, JourneyReport) or report.journey is not self._journey:
            return
        if isinstance(report, Underway):
            if self._message:
                self._say(f"looking for {self._what} ... {report.at * 100 // max(report.total, 1)}% (Esc stops)")
        elif isinstance(report, Listed):
            self._listed(report)
        elif isinstance(report, Arrived):
            self._arrived(report)
        elif isinstance(report, Nowhere):
            self._nowhere(report)

    def _arrived(self, report: Arrived) -> None:
        journey = report.journey
        self._journey = None
        self.go_to(report.index)
        event = self._event()
        if event is None:
            return
        if isinstance(journey, FrameEvent) and report.frame is not None:
            self._followed = (report.frame.entry, report.index)
            self._say(self.words.life_text(event, report.frame, report.touch))
        elif isinstance(journey, FrameEnd) and report.frame is not None:
            self._say(self.words.end_text(event, report.frame))
        elif isinstance(journey, Delivery) and report.frame is not None:
            self._say(self.words.life_text(event, report.frame, report.touch))
        elif isinstance(journey, NextTouch):
            self._say(self.words.touch_text(event, report.touch))
        elif report.wrapped:
            self._say("past the end, from the beginning on")

    def _nowhere(self, report: Nowhere) -> None:
        self._seek()  # the journey has taken the place of a view that was still to come
        journey, frame = report.journey, report.frame
        if isinstance(journey, FindMatch):
            self._say(f"no {'' if journey.wrap else 'further '}{journey.what}")
        elif isinstance(journey, FindTime):
            self._say("no event at that time or later")
        elif frame is None and isinstance(journey, FrameEnd) and not journey.outer:
            self._say("its frame could not be placed, so its return is not known")
        elif frame is None and isinstance(journey, (FrameEnd, Delivery, FrameEvent)):
            self._say("no handler runs here, as far as known")
        elif frame is not None and isinstance(journey, FrameEvent):
            way = "further" if journey.direction > 0 else "earlier"
            self._say(f"no {way} event of the frame of {self.words.frame_brief(frame)}")
        elif frame is not None:
            self._say(f"{self.words.frame_brief(frame)} has not ended when the trace does")
        else:
            self._say(f"no further {self._what}")

    def action_cancel(self) -> None:
        if self._journey is not None and not self.screen.has_class("asking"):
            self._seek()
            self._say("stopped")
        else:
            super().action_cancel()

    # -- frames --------------------------------------------------------------------------------------------------------

    def _on_cpu(self) -> Event | None:
        """The selected event, if it is known whose it is."""
        event = self._event()
        if event is None or not event.known & Known.CPU or event.cpu >= self.trace.cpus:
            self._say("it is not known which CPU the selected event is of" if event is not None else "the trace has no events")
            return None
        return event

    def action_step_over(self) -> None:
        """Over the handler that a delivery calls; of other events: to the next one of their CPU."""
        event = self._on_cpu()
        if event is None:
            return
        if event.kind is Kind.DELIVER and not event.flags & EventFlag.FAILED:
            self._set_out(FrameEnd(event), f"the end of {self.words.delivery_brief(event)}@{event.index}")
        else:
            self.session.wish(Match(event.index + 1, 1, f"event of cpu {event.cpu}", of_cpu(event.cpu)))

    def action_step_out(self) -> None:
        """To the return of the frame that the selected event runs in."""
        if (event := self._on_cpu()) is not None:
            self._set_out(FrameEnd(event, outer=True), "the end of the handler that this runs in")

    def action_to_delivery(self) -> None:
        """Back to the delivery of the frame that the selected event runs in."""
        if (event := self._on_cpu()) is not None:
            self._set_out(Delivery(event), "the delivery of the handler that this runs in")

    def action_frame_event(self, direction: int) -> None:
        """To another event of the frame in hand."""
        if (event := self._on_cpu()) is not None:
            entry = self._followed[0] if self._followed is not None and self._followed[1] == self.selected else None
            self._set_out(FrameEvent(event, direction, entry), f"{'next' if direction > 0 else 'previous'} event of the frame")

    # -- words ---------------------------------------------------------------------------------------------------------

    def _word(self) -> int | None:
        """Address of the word under the cursor of the stack pane."""
        stacks = self.query_one("#stacks", StackView)
        number = stacks.cursor
        row = stacks.row(number)
        while row is not None and row.kind in (RowKind.FRAME, RowKind.WAS):  # a caption stands above its first word
            number += 1 if row.kind is RowKind.FRAME else -1
            row = stacks.row(number)
        if row is None or row.addr is None:
            self._say("the cursor of the stack pane is on no word")
            return None
        return row.addr

    def action_writer(self) -> None:
        """To the event that wrote the word."""
        stacks = self.query_one("#stacks", StackView)
        row = stacks.row(stacks.cursor)
        if row is not None and row.writer is not None:
            self.go_to(row.writer)
        elif self._word() is not None:
            self._say("nothing in the trace wrote this")

    def action_reader(self) -> None:
        """To the next event that reads, pops or copies the word."""
        if (addr := self._word()) is not None:
            self._touch(LOADS, addr, addr + WORD)

    def _touch(self, touch: Touch, lo: int, hi: int) -> None:
        what = "reader" if touch & LOADS else "store"
        self._set_out(NextTouch(self.selected + 1, touch, lo, hi), f"{what} of {hex_address(lo)}")

    def action_writes(self) -> None:
        """The list of all writes of the word."""
        if (addr := self._word()) is None:
            return
        self._writes = WriteScreen(self.words, addr, self.selected)
        self._set_out(WriteHistory(addr, addr + WORD), "")
        self.push_screen(self._writes, self._writes_closed)

    def _listed(self, report: Listed) -> None:
        if self._writes is not None:
            self._writes.take(report)
        if report.done:
            self._seek()

    def _writes_closed(self, event: int | None) -> None:
        self._writes = None
        if event is not None:
            self.go_to(event)
        elif self._journey is not None:
            self._seek()

    # -- run to --------------------------------------------------------------------------------------------------------

    def action_run_to(self) -> None:
        if self.trace.count:
            self.push_screen(AskScreen(RUN_TO), self._run_to)
        else:
            self._say("the trace has no events")

    def _run_to(self, text: str | None) -> None:
        """Forward to the first event that meets a condition."""
        if text is None:
            return
        verb, _, rest = text.strip().partition(" ")
        try:
            if verb in ("", "here"):
                self._run_here()
            elif verb in ("write", "read"):
                span = address_range(rest.strip(), self.words.symbols)
                if span is None:
                    raise UsageError(f"`{verb} ADDRESS` needs an address, as in `{verb} 0xffff8300bffd2fd8`")
                self._touch(Touch.WRITE if verb == "write" else LOADS, span[0], max(span[1], min(span[0] + WORD, 1 << 64)))
            elif verb == "return":
                self.action_step_out()
            elif (code := address_range(text.strip(), self.words.symbols)) is not None and not text.strip().isdigit():
                self.look_for(code_at(code, text.strip(), self.place(), wrap=False))
            else:
                self._run_to_goal(text)
        except UsageError as error:
            self._say(str(error))

    def _run_to_goal(self, text: str) -> None:
        goal = parse_goto(text, self.place())
        if not isinstance(goal, int):
            self.look_for(goal)
        elif goal < self.selected:
            raise UsageError(f"event {goal} lies behind: `:` goes there")
        else:
            self.go_to(goal)

    def _run_here(self) -> None:
        """To what the cursor of the pane with the focus is on."""
        focused = self.focused
        if isinstance(focused, FindingList) and focused.count:
            self._run_to_goal(f"finding {focused.cursor + 1}")
        elif (addr := self._word()) is not None:
            self._touch(LOADS | Touch.WRITE, addr, addr + WORD)

    # -- history -------------------------------------------------------------------------------------------------------

    def go_to(self, index: int, *, jump: bool = True, finding: int | None = None) -> None:
        if jump and index != self.selected:
            self._ahead.clear()
        super().go_to(index, jump=jump, finding=finding)

    def action_jump_back(self) -> None:
        if self._back:
            self._ahead = [*self._ahead[1 - MAX_BACK :], self.selected]
        super().action_jump_back()

    def action_jump_forward(self) -> None:
        """Undo going back."""
        if self._ahead:
            self._back = [*self._back[1 - MAX_BACK :], self.selected]
            self.go_to(self._ahead.pop(), jump=False)
        else:
            self._say("no jump to go forward to")
