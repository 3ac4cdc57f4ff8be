"""Finding things: `/` searches, `&` filters the list of events, `s` switches sources and CPUs on and off."""

from __future__ import annotations

from typing import Any, ClassVar

from textual import on
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.widgets import Input

from tracedbg.errors import UsageError
from tracedbg.filter import Filters
from tracedbg.text import clean
from tracedbg.tui.base import Viewer
from tracedbg.tui.event_list import EventList
from tracedbg.tui.hidden import Hidden, noise_vectors
from tracedbg.tui.matches import Matches
from tracedbg.tui.messages import Reported
from tracedbg.tui.search import HELP, parse_filters
from tracedbg.tui.search_bar import SearchBar
from tracedbg.tui.session import Found, Match, Progress, Searching
from tracedbg.tui.switches import SwitchScreen
from tracedbg.tui.tasks import Counted, Matched, MatchTask, TallyTask

MAX_LOOKED_UP = 10_000  # findings; more would hold up the screen
_FINDING = Binding.Group("finding", compact=True)
_MATCH = Binding.Group("match", compact=True)


class SearchPart(Viewer):
    """The parts of the viewer that search and filter."""

    BINDINGS: ClassVar[list[BindingType]] = [
        # With priority, as else keys typed ahead would be on their way to the pane and get lost.
        Binding("slash", "ask_search", "search", key_display="/", priority=True, id="ask_search"),
        Binding("ampersand", "ask_filter", "filter", key_display="&", priority=True, id="ask_filter"),
        Binding("s", "switches", "show", show=False, id="switches"),
        # Keys that a class binds replace those of its bases; of these two, check_action() lets one be.
        Binding("n", "next_finding(1)", "next finding", group=_FINDING, id="next_finding"),
        Binding("N", "next_finding(-1)", "previous finding", group=_FINDING, id="previous_finding"),
        Binding("n", "search_again(1)", "next match", group=_MATCH, id="search_again"),
        Binding("N", "search_again(-1)", "previous match", group=_MATCH, id="search_again_back"),
    ]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.matches: Matches | None = None  # None: there is no filter
        self.noise: frozenset[int] | None = None  # vectors that the user calls noise; None: the most frequent ones
        self.hidden = Hidden()
        self._search: tuple[str, Filters] | None = None
        self._filter: tuple[str, Filters] = ("", ())
        self._serial = 0  # of the task that collects the matches
        self._looking: Match | None = None
        self._counts: Counted | None = None
        self._outside: tuple[int, int] = (0, 0)  # findings counted, and those of them that the filter leaves out

    def on_mount(self) -> None:
        self.mount(SearchBar(), before="#goto")

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action in ("next_finding", "search_again"):
            return (self._search is not None) is (action == "search_again")
        if action in ("ask_search", "ask_filter") and (len(self.screen_stack) > 1 or isinstance(self.focused, Input)):
            return False  # the key is meant for the screen or the line on top
        return super().check_action(action, parameters)

    # -- the prompt ----------------------------------------------------------------------------------------------------

    def _ask(self, sign: str, text: str, placeholder: str) -> None:
        self.screen.add_class("asking", "finding")
        self.query_one(SearchBar).ask(sign, text, placeholder)

    def action_ask_search(self) -> None:
        self._ask("/", "", f"search: {HELP}")

    def action_ask_filter(self) -> None:
        self._ask("&", self._filter[0], f"show only: {HELP}")

    def action_cancel(self) -> None:
        if self.screen.has_class("finding"):
            self.screen.remove_class("finding")
        elif self._looking is not None and not self.screen.has_class("asking"):
            self._seek()  # a wish for the view takes the place of the search
            self._say("search stopped")
            return
        super().action_cancel()

    @on(Input.Submitted, "#find")
    def _typed(self, message: Input.Submitted) -> None:
        text = message.value.strip()
        bar = self.query_one(SearchBar)
        self.action_cancel()
        try:
            filters = parse_filters(text, self.words.symbols)
        except UsageError as error:
            if text:
                bar.remember(text)
            self._say(f"{bar.sign} {error}")
            return
        if text:
            bar.remember(text)
        if bar.sign == "/":
            self._search = (clean(text, 60), filters) if filters else None
            self.refresh_bindings()
            if filters:
                self.action_search_again(1)
            else:
                self._say("no search: n and N go to findings")
        else:
            self._filter = (text, filters)
            self._apply()

    # -- searching -----------------------------------------------------------------------------------------------------

    def action_search_again(self, direction: int) -> None:
        """To the next match, of those that the list shows."""
        if self._search is not None:
            text, filters = self._search
            where = " that the filter shows" if self.matches is not None else ""
            self._match(direction, f"match of {text}{where}", (*self._all(), *filters))

    def _match(self, direction: int, what: str, filters: Filters) -> None:
        self._looking = Match(self.selected + direction, direction, what, filters)
        self.session.wish(self._looking)

    def _seek(self) -> None:
        self._looking = None
        super()._seek()

    @on(Reported)
    def _search_reported(self, message: Reported) -> None:
        report = message.report
        if isinstance(report, Searching) and report.wish is self._looking:
            self._say(f"looking for a {report.wish.what}: {report.looked * 100 // report.total}%  (Esc stops)")
        elif isinstance(report, Found):
            self._looking = None
        elif isinstance(report, Matched) and report.serial == self._serial and self.matches is not None:
            self.matches.add(report.blocks, report.covered, report.done)
            self.query_one("#events", EventList).set_matches(self.matches)
            self._paint_header()
            self._paint_filter()
            if report.done:
                self._tell_outside()
                self.extend_filter()
        elif isinstance(report, Counted):
            self._counted(report)
        elif isinstance(report, Progress) and report.done:
            self.call_next(self._paint_filter)  # once all have taken the findings

    # -- filtering -----------------------------------------------------------------------------------------------------

    def _all(self) -> Filters:
        """What an event has to pass to be shown."""
        return (*self._filter[1], *self.hidden.filters())

    def _apply(self) -> None:
        """Show what passes the filter; without one, all."""
        filters = self._all()
        self.matches = Matches() if filters else None
        self._outside = (0, 0)
        if filters:
            task = MatchTask(filters)
            self._serial = task.serial
            self.session.start_task(task)
            self._say("")
        else:
            self.session.drop_task(MatchTask)
            self._say("all events are shown")
        self.query_one("#events", EventList).set_matches(self.matches)
        self._paint_header()
        self._paint_filter()

    def extend_filter(self) -> None:
        """Look at the events that have come since, if the trace has grown."""
        if self.matches is not None and self.matches.done and self.matches.covered < self.trace.count:
            task = MatchTask(self._all(), self.matches.covered)
            self._serial = task.serial
            self.session.start_task(task)

    def _header_note(self) -> str:
        note = super()._header_note()
        if self.matches is None:
            return note
        so_far = "" if self.matches.done else f" ({self.matches.covered * 100 // max(self.trace.count, 1)}%)"
        return f"{note}  filtered: {len(self.matches):,} of {self.trace.count:,}{so_far}"

    def _paint_filter(self) -> None:
        """The title of the list says what it leaves out."""
        pane = self.query_one("#events", EventList)
        if self.matches is None:
            pane.border_title = pane.BORDER_TITLE
            return
        text, hidden = clean(self._filter[0], 60), self.hidden.text()
        parts = [f"& {text}" if text else "", f"hidden: {hidden}" if hidden else "", self._outside_text()]
        pane.border_title = Content(" · ".join(("Events", *(p for p in parts if p))))  # no markup: the user typed it

    def _outside_text(self) -> str:
        if self.matches is None or not self.matches.done:
            return ""
        count = len(self.findings)
        if count > MAX_LOOKED_UP:
            return "findings may be filtered out"
        if self._outside[0] != count:
            outside = sum(not self.matches.place(f.event)[1] for f in self.findings.items)
            self._outside = (count, outside)
        outside = self._outside[1]
        return f"{outside:,} finding{'' if outside == 1 else 's'} filtered out" if outside else ""

    def _tell_outside(self) -> None:
        """What the filter leaves out and should not go unnoticed."""
        if self.matches is not None and not len(self.matches):
            self._say("no event passes the filter")
        elif text := self._outside_text():
            self._say(f"{text}; f and F still go there")

    def action_step(self, events: int) -> None:
        """With a filter from match to match."""
        if self.matches is None:
            super().action_step(events)
            return
        row, here = self.matches.place(self.selected)
        row += events - (events > 0 and not here)
        if 0 <= row < len(self.matches):
            self.go_to(self.matches[row], jump=False)
        elif events > 0 and not self.matches.done:
            self._match(1, "event that the filter shows", self._all())
        elif events < 0 and self.matches.covered < self.selected:
            self._match(-1, "event that the filter shows", self._all())
        else:
            self._say(f"no {'further' if events > 0 else 'earlier'} event that the filter shows")

    # -- switches ------------------------------------------------------------------------------------------------------

    def action_switches(self) -> None:
        screen = SwitchScreen(self.hidden)
        self.push_screen(screen, self._switched)
        if self._counts is not None and self._counts.counted == self.trace.count:
            self.call_after_refresh(self._counted, self._counts)
        else:
            self.session.start_task(TallyTask())

    def _counted(self, report: Counted) -> None:
        if report.done:
            self._counts = report
        if isinstance(self.screen, SwitchScreen):
            share = "" if report.done else f"{report.counted * 100 // max(self.trace.count, 1)}%"
            noise = self.noise if self.noise is not None else noise_vectors(report.tally, self.trace.layout)
            self.screen.show_tally(report.tally, noise, share)

    def _switched(self, hidden: Hidden | None) -> None:
        if hidden is not None and hidden != self.hidden:
            self.hidden = hidden
            self._apply()
