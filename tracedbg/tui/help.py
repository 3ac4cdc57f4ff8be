"""The help: what the pane with the focus shows and can do, all keys, the glyphs. Keys are read off the bindings."""

from __future__ import annotations

import textwrap
from typing import Any, ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen, Screen
from textual.widgets import Static

from tracedbg.tui.actions import Action, actions_of, merged, own_bindings, pane_title
from tracedbg.tui.goto import HELP as GOTO

PANES = {
    "events": "The events of the trace, or those that the filter lets pass. All other panes are about the selected one.",
    "stacks": "Stacks as memory after the selected event, words of frames with their names. Enter or a double click on a word "
    "goes to the event that wrote it.",
    "details": "What is known of the finding and of the selected event, and the state of its CPU. Enter explains the finding.",
    "findings": "What the scan has found. The details tell about the selected one; Enter or a double click goes to its event.",
    "timeline": "The whole trace in one line a CPU: depth of nesting, findings, gaps. A click or dragging goes there.",
}
HEADINGS = {
    "Viewer": "In time, and between panes",
    "Travel": "Longer ways",
    "SearchPart": "Finding things",
    "PicturePart": "Timeline and CPUs",
    "Explanations": "Findings",
    "Marking": "Marks",
    "Exports": "Copies",
    "Home": "The viewer",
}
GLYPHS = (
    ("Frames", ""),
    ("●", "live: its context is still to be resumed"),
    ("✗", "overwritten while it was live; `was` is what its own delivery stored"),
    ("→ ○ ~ =", "moved (copied);  left;  overwritten: survived / same value"),
    ("* <", "written by this event;  popped or read by it"),
    ("◀ RSP", "where RSP points;  ?? unknown bytes;  ··· words folded"),
    ("▔▔", "bottom of the stack, or where it is assumed"),
    ("Findings", ""),
    ("✗ ! ·", "error, warning, note"),
    ("Timeline", ""),
    ("▁ to █", "open frames, up to the most that there are anywhere"),
    ("▼ ▐ ▌", "the selected event"),
    ("░ ╌", "records were lost;  not scanned yet"),
)
TEXTS = {  # of actions that can be said better than in the few words that a footer has room for
    "step": "next / previous event (in other panes j and k move in them)",
    "next_finding": "next / previous finding;  after a search: match",
    "same_cpu": "next / previous event of this CPU",
    "same_vector": "next / previous delivery of the same vector",
    "ask": f"go to: {GOTO}",
    "pane": "next / previous pane",
    "zoom": "make the pane as large as the screen, and back",
    "jump_back": "back to where the last jump began",
    "cancel": "end what is under way: a prompt, a search, the zoom",
    "step_over": "over the handler, to its return",
    "step_out": "out of the handler, to its return",
    "to_delivery": "back to the delivery of the current frame",
    "frame_event": "next / previous event of the frame: overwrites, copies, return",
    "run_to": "run to: 12, a symbol, write ADDR, read ADDR, return, here",
    "explain": "explain the finding: who, how, which bytes, the manual, fixes",
    "ask_search": "search: all words hold, a comma is `or`, ! inverts;  nothing: forget it",
    "ask_filter": "show only what matches;  nothing: show all;  ↑ ↓ what was typed before",
    "switches": "show and hide sources, vectors and CPUs",
    "timeline": "to the timeline, and back",
    "other_cpu": "stacks of the next / previous CPU, then again the event's",
    "stack": "next / previous stack",
    "copy": "copy the word or line under the cursor",
    "copy_finding": "copy the finding as Markdown",
    "theme": "next colours: dark, light, the terminal's 16; kept in the configuration",
    "suspend_process": "to the shell; `fg` comes back",
    "command_palette": "find a command by its name",
    "export": "export: the screen as SVG, the finding as Markdown",
}
NOTES = {  # rows without a key, behind those of a class
    "SearchPart": (
        "nmi  #pf  0x0e  deliver  return  write  msr ...  failed  fake",
        "ffff8300bffd2f48  0x1000-0x2000  do_nmi  do_*  rip:do_nmi  addr:0x1000",
        "src:extint  src:nmi,mc  cpu:3  cpu:0-3  !write",
    ),
}
KEY_WIDTH = 21  # columns
WIDTH = 78  # of the whole


class HelpScreen(ModalScreen[None]):
    """Help for a screen. Any of the keys that open or close things closes it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,question_mark,enter,f1", "dismiss", "close", show=False),
        Binding("j,down", "scroll(1)", "down", show=False),
        Binding("k,up", "scroll(-1)", "up", show=False),
        Binding("pagedown,space,ctrl+d,ctrl+f", "scroll(16)", "page down", show=False),
        Binding("pageup,ctrl+u,ctrl+b", "scroll(-16)", "page up", show=False),
        Binding("g,home", "scroll(-9999)", "top", show=False),
        Binding("G,end", "scroll(9999)", "bottom", show=False),
    ]

    def __init__(self, about: Screen[Any]) -> None:
        super().__init__()
        self._about = about

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="help-body") as body:
            body.border_title = "Help (Esc closes)"
            yield Static(self._text(), markup=False)

    def _text(self) -> Text:
        text = Text()

        def heading(title: str) -> None:
            text.append(f"{title}\n", "bold underline")

        width = max(min(WIDTH, self.app.size.width) - 6, 30)  # without border, padding and bar
        indent = "\n" + " " * KEY_WIDTH

        def row(keys: str, what: str) -> None:
            text.append(f"  {keys}  ".ljust(KEY_WIDTH), "bold")
            if len(keys) > KEY_WIDTH - 4:
                text.append(indent)
            text.append(indent.join(textwrap.wrap(what, width - KEY_WIDTH)) + "\n")

        pane = self._about.focused
        if pane is not None:
            heading(f"Here: {pane_title(pane) or 'this pane'}")
            if pane.id in PANES:
                text.append(textwrap.fill(PANES[pane.id], width, initial_indent="  ", subsequent_indent="  ") + "\n")
            for keys, what in merged(a for a in actions_of(pane) if not a.action.startswith("app.")):
                row(keys, what)
        if here := actions_of(self._about):
            heading("On this screen")
            for keys, what in merged(here):
                row(keys, what)
        for kind, actions in self._sections():
            heading(HEADINGS.get(kind, "More"))
            for keys, what in merged(actions, TEXTS):
                row(keys, what)
            for note in NOTES.get(kind, ()):
                row("", note)
        for keys, what in GLYPHS:
            if what:
                row(keys, what)
            else:
                heading(keys)
        text.rstrip()
        return text

    def _sections(self) -> list[tuple[str, list[Action]]]:
        """The actions of the viewer by the name of the class that declares them, the viewer's own first."""
        app = self._about.app
        left = actions_of(app)
        sections = []
        for kind in reversed([k for k in type(app).__mro__ if "BINDINGS" in k.__dict__ and k.__module__.startswith("tracedbg.")]):
            names = {binding.action for binding in own_bindings(kind)}
            mine = [a for a in left if a.action in names]
            left = [a for a in left if a.action not in names]
            if mine:
                sections.append((kind.__name__, mine))
        if left:
            sections.append(("", left))
        return sections

    def action_scroll(self, lines: int) -> None:
        self.query_one("#help-body", VerticalScroll).scroll_relative(y=lines, animate=False)
