"""The pane that tells all about one event or one finding."""

from __future__ import annotations

import textwrap
from typing import ClassVar

from rich.segment import Segment
from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.strip import Strip

from tracedbg.tui.pane import Pane

GUESS = 72
HANG = 2  # columns that the rest of a wrapped line is indented more than its beginning


class Details(Pane, can_focus=True):
    """Plain lines, wrapped; nothing in them is markup. No layout is needed when they change, which makes stepping cheap."""

    ALLOW_SELECT = False
    DEFAULT_CSS = """
    Details { overflow-x: hidden; overflow-y: scroll; scrollbar-size-vertical: 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("j", "scroll_down", "down", show=False, id="down"),
        Binding("k", "scroll_up", "up", show=False, id="up"),
        # Apart from j and k, as the inherited place of the arrows would turn the order in the footer.
        Binding("down", "scroll_down", "down", show=False, id="down"),
        Binding("up", "scroll_up", "up", show=False, id="up"),
        Binding("g,home", "scroll_home", "top", show=False, id="first"),
        Binding("G,end", "scroll_end", "bottom", show=False, id="last"),
        Binding("pagedown,ctrl+f,ctrl+d", "page_down", "page down", show=False, id="page_down"),
        Binding("pageup,ctrl+b,ctrl+u", "page_up", "page up", show=False, id="page_up"),
        Binding("enter", "choose", "explain", show=False, id="choose"),
    ]
    BORDER_TITLE = "Details"

    class Resized(Message):
        """There is another number of columns for text."""

    class Chosen(Message):
        """Enter was pressed: the user wants to know more."""

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id)
        self.lines: tuple[str, ...] = ()
        self._wrapped: list[str] = []
        self._width = 0

    @property
    def text_width(self) -> int:
        """Columns for text; before the first layout a guess."""
        return self.scrollable_content_region.width or GUESS

    def show_lines(self, title: str, lines: list[str]) -> None:
        """Replace what is said; the pane goes back to its top only if it says something else."""
        self.border_title = title
        if tuple(lines) != self.lines:
            self.lines = tuple(lines)
            self._wrap()
            self.scroll_to(y=0, animate=False, force=True)

    def action_choose(self) -> None:
        self.post_message(self.Chosen())

    def _wrap(self) -> None:
        self._wrapped = []
        for line in self.lines:
            indent = " " * (len(line) - len(line.lstrip()) + HANG)
            # Tables of findings are as wide as they are; prose comes wrapped, and only fields and long names are left.
            parts = textwrap.wrap(line, self.text_width, subsequent_indent=indent, drop_whitespace=True, break_on_hyphens=False)
            self._wrapped += parts or [""]
        self.set_height(len(self._wrapped))
        self.refresh()

    def on_resize(self, event: events.Resize) -> None:
        self._wrap()
        if self._width != self.text_width:
            self._width = self.text_width
            self.post_message(self.Resized())

    def render_line(self, y: int) -> Strip:
        width = self.scrollable_content_region.width
        index = int(self.scroll_offset.y) + y
        if not 0 <= index < len(self._wrapped):
            return Strip.blank(width, self.base)
        return Strip([Segment(self._wrapped[index], self.base)]).crop_extend(0, width, self.base)
