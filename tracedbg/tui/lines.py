"""A list of any length that makes a line only when it is on the screen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.cache import LRUCache
from textual.message import Message
from textual.strip import Strip

from tracedbg.tui.pane import Pane

MOVE = Binding.Group("move", compact=True)
QUIET = (  # for panes whose footer has no room for what goes without saying
    Binding("j", "move(1)", "down", show=False, id="down"),
    Binding("k", "move(-1)", "up", show=False, id="up"),
)


class LineList(Pane, can_focus=True):
    """Lines with a cursor. A subclass gives `line()`; there is no widget per line and nothing is done per line in advance."""

    ALLOW_SELECT = False
    DEFAULT_CSS = """
    LineList { overflow-x: hidden; overflow-y: scroll; scrollbar-size-vertical: 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("j", "move(1)", "down", group=MOVE, id="down"),
        Binding("k", "move(-1)", "up", group=MOVE, id="up"),
        # Apart from j and k, as the inherited place of the arrows would turn the order in the footer.
        Binding("down", "move(1)", "down", show=False, id="down"),
        Binding("up", "move(-1)", "up", show=False, id="up"),
        Binding("pagedown,ctrl+f", "page(1)", "page down", show=False, id="page_down"),
        Binding("pageup,ctrl+b", "page(-1)", "page up", show=False, id="page_up"),
        Binding("ctrl+d", "page(0.5)", "half a page down", show=False, id="half_page_down"),
        Binding("ctrl+u", "page(-0.5)", "half a page up", show=False, id="half_page_up"),
        Binding("g,home", "edge(0)", "first", show=False, id="first"),
        Binding("G,end", "edge(-1)", "last", show=False, id="last"),
        Binding("enter", "choose", "choose", show=False, id="choose"),
    ]

    @dataclass
    class Moved(Message):
        """The user moved the cursor."""

        lines: LineList
        index: int

        @property
        def control(self) -> LineList:
            return self.lines

    @dataclass
    class Chosen(Message):
        """Enter was pressed on a line."""

        lines: LineList
        index: int

        @property
        def control(self) -> LineList:
            return self.lines

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id)
        self.count = 0
        self.cursor = 0
        self.before_move: Callable[[], None] | None = None  # called before the user's move is shown
        self._centering = False  # asked for before the size was known
        self._strips: LRUCache[tuple[int, bool, int], Strip] = LRUCache(1024)

    # -- for subclasses ----------------------------------------------------------------------------------------------

    def line(self, index: int, width: int, base: Style, current: bool) -> list[Segment]:
        """The segments of one line, each with a style that includes `base`."""
        raise NotImplementedError

    def item(self, row: int) -> int:
        """The number of what a row shows, for the messages."""
        return row

    # -- contents ----------------------------------------------------------------------------------------------------

    def set_count(self, count: int) -> None:
        """Say how many lines there are."""
        self.count = count
        self.cursor = min(self.cursor, max(count - 1, 0))
        self.set_height(count)
        self.forget()

    def forget(self) -> None:
        """What lines say has changed."""
        self._strips.clear()
        self.refresh()

    def set_cursor(self, index: int, *, center: bool = False) -> None:
        """Move the cursor without telling anybody, and bring it into view."""
        old, self.cursor = self.cursor, max(0, min(index, self.count - 1))
        self.refresh_line(old)
        self.refresh_line(self.cursor)
        self.show(self.cursor, center=center)

    def show(self, index: int, *, center: bool = False, above: int = 0) -> None:
        """Scroll only as far as it takes to see a line and `above` lines before it; with `center` it gets company."""
        height = self.scrollable_content_region.height
        if height <= 0:
            self._centering = center
            return
        margin = height // 4 if center else 0
        top = int(self.scroll_target_y)
        if top + max(above, margin) <= index < top + height - margin:
            return
        if center:
            top = index - height // 2
        elif index < top + above:
            top = index - above
        else:
            top = index - height + 1
        self.scroll_to(y=max(0, top), animate=False, force=True)

    # -- painting ----------------------------------------------------------------------------------------------------

    def render_line(self, y: int) -> Strip:
        width = self.scrollable_content_region.width
        index = int(self.scroll_offset.y) + y
        if not 0 <= index < self.count:
            return Strip.blank(width, self.base)
        current = index == self.cursor
        key = (index, current and self.has_focus, width * 2 + current)
        strip = self._strips.get(key)
        if strip is None:
            base = self.base
            if current:
                base += self.part("lines--focus" if self.has_focus else "lines--cursor")
            strip = Strip(self.line(index, width, base, current))
            if strip.cell_length > width > 1:  # a number that is cut must not look like another number
                strip = Strip([*strip.crop(0, width - 1), Segment("…", base)])
            strip = strip.crop_extend(0, width, base)
            self._strips[key] = strip
        return strip

    def notify_style_update(self) -> None:
        self._strips.clear()
        super().notify_style_update()

    def on_focus(self) -> None:
        self.refresh()

    def on_blur(self) -> None:
        self.refresh()

    def on_resize(self, event: events.Resize) -> None:
        self.show(self.cursor, center=self._centering)
        self._centering = False

    # -- keys and mouse ------------------------------------------------------------------------------------------------

    def move_to(self, index: int) -> None:
        """Move as the user does."""
        if not self.count:
            return
        index = max(0, min(index, self.count - 1))
        if index != self.cursor:
            if self.before_move is not None:
                self.before_move()
            self.set_cursor(index)
            self.post_message(self.Moved(self, self.item(index)))

    def action_move(self, lines: int) -> None:
        self.move_to(self.cursor + lines)

    def action_page(self, pages: float) -> None:
        height = max(self.scrollable_content_region.height, 1)
        self.move_to(self.cursor + int(pages * max(height - 1, 1)))

    def action_edge(self, index: int) -> None:
        self.move_to(index if index >= 0 else self.count + index)

    def action_choose(self) -> None:
        if self.count:
            self.post_message(self.Chosen(self, self.item(self.cursor)))

    def on_click(self, event: events.Click) -> None:
        offset = event.get_content_offset(self)
        if offset is None:
            return
        index = int(self.scroll_offset.y) + offset.y
        if index >= self.count:
            return
        if event.chain > 1:
            self.post_message(self.Chosen(self, self.item(index)))
        else:
            self.move_to(index)
