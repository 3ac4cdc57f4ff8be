"""The stacks of a CPU as memory: side by side where there is room, else below each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.strip import Strip

from tracedbg.describe import Words
from tracedbg.state import Known
from tracedbg.tui.lines import QUIET, LineList
from tracedbg.tui.owners import Status
from tracedbg.tui.rows import Picture, Row, RowKind, StackRows, build_picture, focus_row, in_two
from tracedbg.tui.session import View
from tracedbg.tui.word_line import Columns, elide, row_line

__all__ = ["StackView", "elide"]

LEAST = 46  # columns that a stack needs: address, value, slot, owner, RSP
BELOW = 6  # lines that are to be seen below the one that matters
_STACKS = Binding.Group("stack", compact=True)


@dataclass(slots=True)
class _Column:
    """A stack, or all of them, on a stretch of the pane."""

    rows: tuple[Row, ...]
    width: int
    widths: Columns
    cursor: int = 0
    top: int = 0


class StackView(LineList):
    """Rows of rows.py. Enter on a word goes to the event that wrote it."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "lines--cursor", "lines--focus", "stack--name", "stack--live", "stack--left", "stack--clobbered", "stack--changed",
        "stack--rsp", "stack--fold", "stack--addr", "stack--note", "stack--moved",
    }  # fmt: skip
    BINDINGS: ClassVar[list[BindingType]] = [
        *QUIET,
        Binding("less_than_sign", "stack(-1)", "previous stack", key_display="<", group=_STACKS),
        Binding("greater_than_sign", "stack(1)", "next stack", key_display=">", group=_STACKS),
        Binding("w", "app.writer", "writer", key_display="w", id="writer"),
        Binding("enter", "choose", "to the writer of the word", show=False, id="choose"),
    ]
    BORDER_TITLE = "Stacks"

    def __init__(self, words: Words, *, id: str) -> None:
        super().__init__(id=id)
        self._words = words
        self._picture = Picture((), (), ())
        self._order: list[StackRows] = []  # as they stand beside each other
        self._columns: list[_Column] = []
        self._first = 0  # number of the first stack that is shown, of those beside each other
        self._at = 0  # the column with the cursor
        self._title = ""

    @property
    def _rows(self) -> tuple[Row, ...]:
        return self._columns[self._at].rows if self._columns else ()

    def show_view(self, view: View) -> None:
        """Take the rows of another position."""
        self._picture = build_picture(view, self._words)
        event = self._words.event(view.state.position - 1)
        other = ", not the event's" if event is not None and event.known & Known.CPU and event.cpu != view.cpu else ""
        self._title = f" · cpu {view.cpu}{other}" if self._words.trace.cpus > 1 else ""
        self._lay_out()

    # -- layout --------------------------------------------------------------------------------------------------------

    def _side_by_side(self) -> int:
        """How many stacks stand beside each other; 1: all of them stand below each other."""
        width = self.scrollable_content_region.width + 1
        return 1 if self._picture.notes else max(min(width // (LEAST + 1), len(self._picture.stacks)), 1)

    def _lay_out(self, wanted: StackRows | None = None) -> None:
        """Make the columns; `wanted`: the stack that gets the cursor, else the one that matters."""
        count, stacks = self._side_by_side(), self._picture.stacks
        room = self.scrollable_content_region.width
        if count == 1:
            self._order = list(stacks)
            self._columns = [self._column(self._picture.rows(), room)]
            self._at = self._first = 0
        else:
            matters = max(stacks, key=lambda s: (_weight(s), -stacks.index(s)))
            best = sorted([matters, *(s for s in stacks if s is not matters)][:count], key=lambda s: s.place)
            self._order = [*best, *sorted((s for s in stacks if s not in best), key=lambda s: s.place)]
            wanted = wanted if wanted is not None else matters
            number = self._order.index(wanted)
            self._first = max(0, number - count + 1)
            shown = self._order[self._first : self._first + count]
            each, more = divmod(room - (count - 1), count)
            rows = [s.rows for s in shown]
            rows[-1] += (*self._picture.empty, *self._unseen(count))
            self._columns = [self._column(r, each + (n < more)) for n, r in enumerate(rows)]
            self._at = number - self._first
        for column in self._columns:
            column.cursor = focus_row(column.rows)
            column.top = self._top(column)
        self._enter()

    def _unseen(self, count: int) -> tuple[Row, ...]:
        rest = [s.title for n, s in enumerate(self._order) if not self._first <= n < self._first + count]
        return (Row(RowKind.FOLD, f"also: {', '.join(rest)} (< >)"),) if rest else ()

    def _column(self, rows: tuple[Row, ...], width: int) -> _Column:
        widths = Columns.of(rows)
        if width < widths.one_line:
            rows = in_two(rows)
            widths = Columns.of(rows)
        return _Column(rows, width, widths)

    def _top(self, column: _Column) -> int:
        """The first line to show: the captions of the frame and the name of the stack belong to its first word."""
        first, rows, height = column.cursor, column.rows, self.scrollable_content_region.height
        lead = 0
        while lead < min(first, 4) and rows[first - lead - 1].kind in (RowKind.FRAME, RowKind.STACK, RowKind.FOLD):
            lead += 1
        bottom = min(first + BELOW, len(rows) - 1)
        return max(0, min(first - lead, len(rows) - height) if bottom >= height else 0)

    def _enter(self) -> None:
        """Let the pane scroll the column with the cursor."""
        column = self._columns[self._at]
        self.cursor = column.cursor
        self.set_count(len(column.rows))
        self.scroll_to(y=column.top, animate=False, force=True, immediate=True)
        self._entitle()

    def _entitle(self) -> None:
        many = len(self._picture.stacks)
        keys = f" · {self._number() + 1} of {many} < >" if many > 1 else ""
        self.border_title = f"Stacks{self._title}{keys}"

    def _number(self) -> int:
        """Number of the stack that the cursor is in."""
        if len(self._columns) > 1:
            return self._first + self._at
        heads = [n for n, row in enumerate(self._rows) if row.kind is RowKind.STACK]
        return max(sum(n <= self.cursor for n in heads) - 1, 0)

    def _leave(self) -> None:
        column = self._columns[self._at]
        column.cursor, column.top = self.cursor, int(self.scroll_target_y)

    def on_resize(self, event: events.Resize) -> None:
        self._lay_out()

    # -- keys and mouse ------------------------------------------------------------------------------------------------

    def action_stack(self, direction: int) -> None:
        """To the next stack, or the previous one."""
        if not self._columns:
            return
        if len(self._columns) == 1:
            heads = [n for n, row in enumerate(self._rows) if row.kind is RowKind.STACK]
            number = self._number() + direction
            if 0 <= number < len(heads):
                rows = self._rows[heads[number] : heads[number + 1] if number + 1 < len(heads) else None]
                self.scroll_to(y=heads[number], animate=False, force=True, immediate=True)
                self.set_cursor(heads[number] + (focus_row(rows) or min(1, len(rows) - 1)))
        elif 0 <= self._at + direction < len(self._columns):
            self._leave()
            self._at += direction
            self._enter()
        elif 0 <= self._first + self._at + direction < len(self._order):
            self._lay_out(self._order[self._first + self._at + direction])

    def on_click(self, event: events.Click) -> None:
        offset = event.get_content_offset(self)
        if offset is None:
            return
        left = 0
        for number, column in enumerate(self._columns):
            if left <= offset.x < left + column.width and number != self._at:
                self._leave()
                self._at = number
                self._enter()
            left += column.width + 1
        super().on_click(event)

    def set_cursor(self, index: int, *, center: bool = False) -> None:
        super().set_cursor(index, center=center)
        self._entitle()
        if len(self._columns) > 1:
            self.refresh()

    def writer(self, index: int) -> int | None:
        """The event that wrote the word of a row."""
        return self._rows[index].writer if 0 <= index < len(self._rows) else None

    def row(self, index: int) -> Row | None:
        """The row with a number in the column of the cursor."""
        return self._rows[index] if 0 <= index < len(self._rows) else None

    # -- painting ------------------------------------------------------------------------------------------------------

    def line(self, index: int, width: int, base: Style, current: bool) -> list[Segment]:
        column = self._columns[self._at]
        return row_line(self._rows[index], width, base, column.widths, self.part)

    def render_line(self, y: int) -> Strip:
        if len(self._columns) < 2:
            return super().render_line(y)
        between = Segment("┃", self.base + self.part("stack--fold"))
        segments: list[Segment] = []
        for number, column in enumerate(self._columns):
            active = number == self._at
            index = (int(self.scroll_offset.y) if active else column.top) + y
            segments += [*([between] if number else []), *self._cell(column, index, active and index == self.cursor)]
        return Strip(segments)

    def _cell(self, column: _Column, index: int, current: bool) -> Strip:
        if index >= len(column.rows):
            return Strip.blank(column.width, self.base)
        base = self.base
        if current:
            base += self.part("lines--focus" if self.has_focus else "lines--cursor")
        strip = Strip(row_line(column.rows[index], column.width, base, column.widths, self.part))
        if strip.cell_length > column.width:
            strip = Strip([*strip.crop(0, column.width - 1), Segment("…", base)])
        return strip.crop_extend(0, column.width, base)


def _weight(stack: StackRows) -> int:
    """How much a stack matters: what the event overwrote, took or changed, then where RSP is."""
    tests = (
        any(r.status is Status.CLOBBERED and r.changed for r in stack.rows),
        any(r.taken for r in stack.rows),
        any(r.changed for r in stack.rows),
        stack.here,
    )
    return sum(bool(test) << 3 - n for n, test in enumerate(tests))
