"""What every part of the viewer builds on: one screen that shows one position of a trace.

The parts are classes of their own that add actions and panes to `Viewer`; app.py puts them together.
"""

from __future__ import annotations

import gc
import signal
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, ClassVar

from rich.text import Text
from textual import events, on
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.widgets import Footer, Input, Static

from tracedbg.describe import Words
from tracedbg.errors import TracedbgError, UsageError
from tracedbg.filter import Filter, of_cpu
from tracedbg.report import not_judged, unknown_reasons
from tracedbg.state import Event, Kind, Known, Stats
from tracedbg.text import clean, clean_path
from tracedbg.trace import Trace
from tracedbg.tui.details import Details
from tracedbg.tui.event_list import EventList
from tracedbg.tui.facts import event_lines, state_lines
from tracedbg.tui.finding_list import FindingList
from tracedbg.tui.found import Findings
from tracedbg.tui.goto import HELP, Place, parse_goto
from tracedbg.tui.help import HelpScreen
from tracedbg.tui.lines import LineList
from tracedbg.tui.marks import GLYPHS
from tracedbg.tui.messages import Reported
from tracedbg.tui.session import (
    Failed,
    Found,
    Journey,
    Match,
    OpenReplay,
    Progress,
    ReplayLike,
    Seek,
    Session,
    SourceSearch,
    View,
)
from tracedbg.tui.stack_view import StackView
from tracedbg.tui.strip import StateStrip
from tracedbg.tui.theme import DARK, THEMES
from tracedbg.tui.timeline import TimelineBar

NARROW = 100  # columns; below, panes stand on each other
MAX_BACK = 256
PATIENCE = 0.2  # seconds
HOLD = 0.01  # seconds that a paint waits for the view, so that all panes change at once
MIN_TEXT = 40  # columns that text is wrapped to at least
PANES = ("events", "stacks", "details", "findings")
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}  # and what the viewer returns after them

_FINDING = Binding.Group("finding", compact=True)


class Viewer(App[int]):
    """Shows a trace, from position `start` on or from the first finding.

    The Replay lives in the session's thread; everything here is cheap.
    """

    CSS_PATH = Path(__file__).with_name("app.tcss")  # absolute: a subclass may live elsewhere
    TITLE = "tracedbg"
    ENABLE_COMMAND_PALETTE = False
    # The process is there for the viewer: what it begins with stays to the end. A full collection that looks at it, too, takes
    # longer than a key may.
    alone = False
    BINDINGS: ClassVar[list[BindingType]] = [
        # The ids are the names of these keys in the user's configuration: they stay.
        Binding("j,down", "step(1)", "forward", show=False, id="forward"),
        Binding("k,up", "step(-1)", "back", show=False, id="back"),
        Binding("l,right", "step(1)", "forward", show=False, id="forward_always"),
        Binding("h,left", "step(-1)", "back", show=False, id="back_always"),
        Binding("n", "next_finding(1)", "next finding", group=_FINDING, id="next_finding"),
        Binding("N", "next_finding(-1)", "previous finding", group=_FINDING, id="previous_finding"),
        Binding("f", "finding(1)", "next finding", show=False, id="finding"),
        Binding("F", "finding(-1)", "previous finding", show=False, id="finding_back"),
        Binding("left_square_bracket,comma", "same_cpu(-1)", "previous of CPU", show=False, id="previous_of_cpu"),
        Binding("right_square_bracket,full_stop", "same_cpu(1)", "next of CPU", show=False, id="next_of_cpu"),
        Binding("v", "same_vector(1)", "next delivery of the same vector", show=False, id="next_of_vector"),
        Binding("V", "same_vector(-1)", "previous delivery of the same vector", show=False, id="previous_of_vector"),
        Binding("colon", "ask", "go to", key_display=":", id="goto"),
        # The one with priority would stand first in the footer.
        Binding("tab", "pane(1)", "next pane", show=False, priority=True, id="next_pane"),
        Binding("f6", "pane(1)", "pane", key_display="Tab", id="next_pane"),
        Binding("shift+tab", "pane(-1)", "previous pane", show=False, priority=True, id="previous_pane"),
        Binding("z", "zoom", "zoom", show=False, id="zoom"),
        Binding("ctrl+o,backspace", "jump_back", "back", show=False, tooltip="back in the history", id="jump_back"),
        Binding("escape", "cancel", "cancel", show=False, id="cancel"),
        Binding("question_mark,f1", "help", "help", key_display="?", id="help"),
        Binding("q", "quit", "quit", id="quit"),
        Binding("ctrl+c", "interrupt", show=False, priority=True),
    ]

    def __init__(
        self, trace: Trace, words: Words, *, start: int | None = None, open_replay: OpenReplay | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.trace = trace
        self.words = words
        self.findings = Findings()
        self.selected = max(0, min((start or 1) - 1, trace.count - 1))
        self.view: View | None = None
        self.session = Session(open_replay or self._open_replay, trace.events, self._post)
        self._moved = start is not None  # the user chose a place: do not jump to the first finding
        self._scanned = 0
        self._done = False
        self._stats: Stats | None = None
        self._finding: int | None = None  # number of the finding that the details tell about
        self._last: int | None = None  # the one before stepping away: its events stay marked
        self._back: list[int] = []
        self._message = ""
        self._held = ExitStack()  # the paint that waits for a view

    def _open_replay(self) -> AbstractContextManager[ReplayLike]:
        from tracedbg.replay import Replay

        return Replay(self.trace)

    def _post(self, report: Any) -> None:
        self.post_message(Reported(report))

    # -- life ----------------------------------------------------------------------------------------------------------

    def compose(self) -> ComposeResult:
        yield Static(id="header", markup=False)
        yield StateStrip(self.words, id="strip")
        yield TimelineBar(id="timeline")
        with Container(id="panes"):
            yield (events := EventList(self.trace, self.words, id="events"))
            events.before_move = self._hold
            yield StackView(self.words, id="stacks")
            yield FindingList(self.words, id="findings")
            yield Details(id="details")
        yield Static(id="status", markup=False)
        yield Input(placeholder=f"go to: {HELP}", id="goto", select_on_focus=False)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        for theme in THEMES.values():
            self.register_theme(theme)
        self.theme = self.first_theme()
        self.animation_level = "none"
        self.query_one("#findings", FindingList).set_findings(self.findings.items, False)
        self.query_one("#events").focus()
        self.session.start()
        self._place(self.selected, center=True)
        if self.alone:
            self.call_after_refresh(gc.freeze)

    def first_theme(self) -> str:
        """The name of the theme to begin with."""
        return DARK.name

    def on_unmount(self) -> None:
        self.session.stop()

    def on_resize(self, event: events.Resize) -> None:
        self.screen_stack[0].set_class(event.size.width < NARROW, "narrow")  # also while the help lies on it
        self.call_after_refresh(self._paint)

    # -- moving --------------------------------------------------------------------------------------------------------

    def go_to(self, index: int, *, jump: bool = True, finding: int | None = None) -> None:
        """Select an event because the user wants to. `jump`: Backspace leads back from there."""
        self._moved = True
        self._message = ""
        self._finding = finding
        if jump and index != self.selected:
            self._back = [*self._back[1 - MAX_BACK :], self.selected]
        self._place(index, center=jump)

    def _place(self, index: int, *, center: bool) -> None:
        self.selected = max(0, min(index, self.trace.count - 1))
        if self._finding is None or self.findings.items[self._finding].event != self.selected:
            self._finding = self.findings.at(self.selected)
        self.query_one("#events", EventList).select(self.selected, center=center)
        if self._finding is not None:
            self._last = self._finding
            self.query_one("#findings", FindingList).set_cursor(self._finding)
        # The details wait for the view, which is there in a blink: painting them twice would cost more than it shows.
        self._paint_header()
        self._paint_status()
        self._seek()

    def _seek(self) -> None:
        self._hold()
        self.session.wish(Seek(self.selected + 1 if self.trace.count else 0, self._stack_cpu()))
        self.set_timer(PATIENCE, self._still_seeking)

    def _hold(self) -> None:
        """Let the paint wait for the view, but not for long."""
        self._held.close()
        self._held.enter_context(self.batch_update())
        self.set_timer(HOLD, self._held.close)

    def _still_seeking(self) -> None:
        """What the stack pane shows belongs to another event; say so once it takes longer than a blink."""
        if self.view is None or self.view.state.position != self.selected + 1:
            self.query_one("#stacks", StackView).border_title = f"Stacks · going to event {self.selected:,} ..."
            self._paint_details()

    def _event(self) -> Event | None:
        return self.words.event(self.selected)

    def finding_in_hand(self) -> int | None:
        """The finding that the details tell about, else the last one whose events are still marked."""
        for number in (self._finding, self._last):
            if number is not None and self.findings.valid(number) is not None:
                return number
        return None

    def _cpu(self) -> int:
        event = self._event()
        if event is not None and event.known & Known.CPU and event.cpu < self.trace.cpus:
            return event.cpu
        return self.view.cpu if self.view is not None else 0

    def _stack_cpu(self) -> int:
        """The CPU whose stacks are shown."""
        return self._cpu()

    # -- the session's reports -----------------------------------------------------------------------------------------

    @on(Reported)
    def _reported(self, message: Reported) -> None:
        report = message.report
        if isinstance(report, View):
            self._viewed(report)
            self._held.close()
        elif isinstance(report, Progress):
            self._progressed(report)
        elif isinstance(report, Found):
            self._found(report)
        elif isinstance(report, Failed):
            self._failed(report)

    def _viewed(self, view: View) -> None:
        self.view = view
        if self.trace.count:
            self.query_one("#stacks", StackView).show_view(view)
        self._paint()

    def _progressed(self, progress: Progress) -> None:
        self._scanned, self._done, self._stats = progress.scanned, progress.done, progress.stats
        if progress.findings or progress.done:
            self.findings.take(progress.first, progress.findings)
            self.query_one("#events", EventList).set_marks(self.findings.marks)
            self.query_one("#findings", FindingList).set_findings(self.findings.items, self._done)
        if not self._moved:
            self._open_at_finding()
        elif self._finding is None and progress.findings:
            self._finding = self.findings.at(self.selected)
            if self._finding is not None:
                self._last = self._finding
                self.query_one("#findings", FindingList).set_cursor(self._finding)
        self._paint()

    def _open_at_finding(self) -> None:
        """Start where it hurts: at the first error, or when all is known at the first of what is gravest."""
        number = self.findings.gravest() if self._done else self.findings.first("error")
        if number is not None:
            self._moved = True
            self._finding = number
            self._place(self.findings.items[number].event, center=True)

    def _found(self, found: Found) -> None:
        wish = found.wish
        if found.index is not None:
            self.go_to(found.index)
            return
        if isinstance(wish, SourceSearch):
            self._say(f"no event has the source number #{wish.number}")
        else:
            self._say(f"no {'further' if wish.direction > 0 else 'earlier'} {wish.what}")
        # The search has taken the place of a view that was still to come.
        self._seek()

    def _failed(self, failed: Failed) -> None:
        if not isinstance(failed.error, (TracedbgError, MemoryError)):
            raise failed.error
        self._done = True
        self._say(f"the replay ended: {clean(str(failed.error))}")

    # -- painting ------------------------------------------------------------------------------------------------------

    def _say(self, message: str) -> None:
        self._message = message
        self._paint_status()

    def _paint(self) -> None:
        self._paint_header()
        self._paint_status()
        self._paint_details()
        self.query_one("#events", EventList).set_roles(self._event_roles())

    def _paint_header(self) -> None:
        count, cpus = self.trace.count, self.trace.cpus
        name = clean_path(self.trace.path).rsplit("/", 1)[-1]
        text = Text(f" {name}", "bold", no_wrap=True, overflow="ellipsis")
        at = f"event {self.selected:,} of {count:,}" if count else "no events"
        at += self._header_note()
        scan = "" if self._done else f"  scanning {self._scanned * 100 // max(count, 1)}%"
        text.append(f"  {cpus} CPU{'' if cpus == 1 else 's'}  {at}{scan}", "not bold")
        if self.findings or self._done:
            text.append(f"  {self.findings.tally or 'no findings'}", "not bold")
        self.query_one("#header", Static).update(text, layout=False)

    def _event_roles(self) -> dict[int, str]:
        """What the list of events says of some of them: their parts in the finding in hand."""
        return self.findings.roles(self._last)

    def extend_filter(self) -> None:
        """Look at the events that have come since, if the trace has grown."""

    def _header_note(self) -> str:
        """What a part has to say beside the position."""
        return ""

    def _paint_status(self) -> None:
        text = Text(no_wrap=True, overflow="ellipsis")
        if self._message:
            text.append(f" {self._message}", "bold")
        elif self._finding is not None:
            finding = self.findings.items[self._finding]
            mark = GLYPHS[self.findings.levels[self._finding]]
            text.append(f" {mark} finding {self._finding + 1} of {len(self.findings)}: ", "bold")
            text.append(self.words.finding_message(finding))
        elif not self.trace.count:
            text.append(" The trace has no events.")
        elif self.selected in (roles := self.findings.roles(self._last)) and self._last is not None:
            text.append(f" [{roles[self.selected]}] in finding {self._last + 1}: ", "bold")
            text.append(self.words.finding_message(self.findings.items[self._last]))
        self.query_one("#status", Static).update(text, layout=False)

    def _paint_details(self) -> None:
        lines: list[str] = []
        title = "Details"
        if self._finding is not None and self._finding < len(self.findings):
            finding = self.findings.items[self._finding]
            title = f"Finding {self._finding + 1} of {len(self.findings)}"
            width = self.query_one("#details", Details).text_width
            lines += [*self.words.finding_text(finding, width=max(width, MIN_TEXT)), ""]
        elif self._done and self._stats is not None and self.trace.count and not self.findings:
            lines += [*self._nothing_found(self._stats), ""]
        if self.trace.count:
            lines += event_lines(self.trace.event(self.selected), self.words, self.trace.clock_hz)
        else:
            lines.append("The trace has no events.")
        if self.view is not None and self.view.state.position == self.selected + 1:
            lines += state_lines(self.view, self.words)
        self.query_one("#details", Details).show_lines(title, lines)

    def _nothing_found(self, stats: Stats) -> list[str]:
        layout = self.trace.layout
        reasons = (*unknown_reasons(self.trace, layout, stats), *not_judged(stats, layout))
        return self.words.nothing_found(stats, reasons)

    # -- messages of the panes -----------------------------------------------------------------------------------------

    @on(Details.Resized)
    def _details_resized(self) -> None:
        self._paint_details()

    @on(LineList.Moved)
    def _cursor_moved(self, message: LineList.Moved) -> None:
        if isinstance(message.lines, EventList):
            self.go_to(message.index, jump=abs(message.index - self.selected) > 1000)
        elif isinstance(message.lines, FindingList):
            self._moved = True
            self._finding = self._last = message.index
            self._paint()

    @on(LineList.Chosen)
    def _line_chosen(self, message: LineList.Chosen) -> None:
        if isinstance(message.lines, FindingList):
            self.go_to(self.findings.items[message.index].event, finding=message.index)
        elif isinstance(message.lines, EventList) and self._finding is not None:
            self.call_next(self.run_action, "explain")
        elif isinstance(message.lines, StackView):
            writer = message.lines.writer(message.index)
            if writer is None:
                self._say("nothing in the trace wrote this")
            else:
                self.go_to(writer)

    # -- actions -------------------------------------------------------------------------------------------------------

    def action_step(self, events: int) -> None:
        self.go_to(self.selected + events, jump=False)

    def action_finding(self, direction: int) -> None:
        if not self.findings:
            self._say("no findings" if self._done else "no findings so far")
            return
        if self._finding is not None and self.findings.items[self._finding].event == self.selected:
            number = self.findings.valid(self._finding + direction)  # several may belong to one event
        else:
            number = self.findings.beyond(self.selected, direction)
        if number is not None:
            self.go_to(self.findings.items[number].event, finding=number)
        else:
            self._say(f"no {'further' if direction > 0 else 'earlier'} finding{'' if self._done else ' so far'}")

    def action_next_finding(self, direction: int) -> None:
        """`n` and `N`, as long as no search has taken them."""
        self.action_finding(direction)

    def action_same_cpu(self, direction: int) -> None:
        cpu = self._cpu()
        self.session.wish(Match(self.selected + direction, direction, f"event of cpu {cpu}", of_cpu(cpu)))

    def action_same_vector(self, direction: int) -> None:
        event = self._event()
        if event is None or event.kind is not Kind.DELIVER or not event.known & Known.ARG:
            self._say("the selected event is not a delivery")
            return
        what = f"delivery of vector {event.arg:#x}"
        same = (Filter(kinds=frozenset({Kind.DELIVER}), args=frozenset({event.arg})),)
        self.session.wish(Match(self.selected + direction, direction, what, same))

    def action_pane(self, direction: int) -> None:
        if self.screen.has_class("asking") or len(self.screen_stack) > 1:
            return
        now = self.focused.id if self.focused is not None and self.focused.id in PANES else PANES[0]
        name = PANES[(PANES.index(now) + direction) % len(PANES)]
        self.screen.set_class(name == "findings", "listing")
        self.screen.minimize()
        self.query_one(f"#{name}").focus()

    def action_zoom(self) -> None:
        if self.screen.maximized is not None:
            self.screen.minimize()
        elif self.focused is not None:
            self.screen.maximize(self.focused, container=False)

    def action_jump_back(self) -> None:
        if self._back:
            index = self._back.pop()
            self.go_to(index, jump=False)
        else:
            self._say("no jump to come back from")

    def action_help(self) -> None:
        self.push_screen(HelpScreen(self.screen))

    # -- the prompt ----------------------------------------------------------------------------------------------------

    def action_ask(self) -> None:
        self.screen.add_class("asking")
        prompt = self.query_one("#goto", Input)
        prompt.value = ""
        prompt.focus()

    def action_cancel(self) -> None:
        if self.screen.has_class("asking"):
            self.screen.remove_class("asking")
            self.query_one("#events").focus()
        else:
            self.screen.minimize()
            self._say("")

    def action_interrupt(self) -> None:
        """Ctrl-C: out of the prompt, else out of the viewer, as the signal that it would be elsewhere."""
        if self.screen.has_class("asking"):
            self.action_cancel()
        else:
            self.exit(return_code=SIGNALS[signal.SIGINT])

    @on(Input.Submitted, "#goto")
    def _asked(self, message: Input.Submitted) -> None:
        self.action_cancel()
        if not message.value.strip():
            return
        try:
            target = parse_goto(message.value, self.place())
        except UsageError as error:
            self._say(str(error))
            return
        if isinstance(target, int):
            self.go_to(target)
        else:
            self.look_for(target)

    def place(self) -> Place:
        """What the goals of `:` are measured by."""
        count = self.trace.count
        began = self.trace.event(0).time if count else 0
        return Place(
            count, self.findings.items, self.selected, self.trace.cpus, self.trace.clock_hz, began, self.words.symbols
        )  # fmt: skip

    def look_for(self, wish: SourceSearch | Journey) -> None:
        """Ask the session for a place that has to be searched for."""
        self.session.wish(wish)
