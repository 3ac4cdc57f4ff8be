"""The stacks of the selected event's CPU as memory."""

from __future__ import annotations

from typing import ClassVar

from rich.segment import Segment
from rich.style import Style

from tracedbg.describe import Words
from tracedbg.tui.facts import cpu_summary
from tracedbg.tui.lines import LineList
from tracedbg.tui.rows import Row, RowKind, Status, build_rows, focus_row
from tracedbg.tui.session import View

_FIXED = 2 + 1 + 16 + 8  # marks, blank, value, slot
_CAPTION = 1 + 3  # what stands before a caption
_SHORT, _LONG = 9, 16  # digits of an address
_OWNER_MAX = 16
_NAME_MIN = 10  # columns that each of two symbols needs
_NAME_LEAST = 6  # fewer tell nothing
_AND_WAS = ", was "
_RSP = len("◀ RSP")

_STYLES = {
    Status.LIVE: "stack--live",
    Status.MOVED: "stack--left",
    Status.LEFT: "stack--left",
    Status.CLOBBERED: "stack--clobbered",
    Status.SURVIVED: "stack--left",
}


class StackView(LineList):
    """Rows of rows.py. Enter on a word goes to the event that wrote it."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "lines--cursor", "lines--focus", "stack--name", "stack--live", "stack--left", "stack--clobbered", "stack--changed",
        "stack--rsp", "stack--fold", "stack--addr", "stack--note",
    }  # fmt: skip
    BORDER_TITLE = "Stacks"

    def __init__(self, words: Words, *, id: str) -> None:
        super().__init__(id=id)
        self._words = words
        self._rows: tuple[Row, ...] = ()
        self._owner_width = self._was_width = self._phrase_width = self._name_width = 0

    def show_view(self, view: View) -> None:
        """Take the rows of another position."""
        self._rows = build_rows(view, self._words)
        # Columns are as wide as this view needs them, so that rows stand below each other.
        self._owner_width = max((len(_owner(r.owner)) + 1 for r in self._rows if r.owner), default=0)
        overwritten = [r for r in self._rows if r.was]
        self._was_width = max((len(_was(r, False)) for r in overwritten), default=0)
        self._phrase_width = max((len(_was(r, True)) for r in overwritten), default=0)
        self._name_width = max((min(len(r.name), _OWNER_MAX) for r in overwritten), default=0)
        self.set_count(len(self._rows))
        cpu = next((c for c in view.state.cpus if c.cpu == view.cpu), None)
        self.border_title = f"Stacks · {cpu_summary(cpu)}" if cpu is not None else "Stacks"
        first = focus_row(self._rows)
        self.cursor = first
        # The captions of the frame and the name of the stack belong to its first word.
        lead = 0
        while first - lead > 0 and self._rows[first - lead - 1].kind in (RowKind.FRAME, RowKind.STACK) and lead < 4:
            lead += 1
        self.scroll_to(y=0, animate=False, force=True)
        self.show(min(first + 6, max(len(self._rows) - 1, 0)))
        self.show(first, above=lead)

    def writer(self, index: int) -> int | None:
        """The event that wrote the word of a row."""
        return self._rows[index].writer if 0 <= index < len(self._rows) else None

    def line(self, index: int, width: int, base: Style, current: bool) -> list[Segment]:
        row = self._rows[index]
        if row.kind is RowKind.STACK:
            name = base + self.part("stack--name")
            return [Segment("═ ", name), Segment(f"{row.text} ", name), Segment("═" * width, name)]
        if row.kind is RowKind.NOTE:
            return [Segment(" ", base), Segment(row.text, base + self.part("stack--note"))]
        if row.kind is RowKind.FOLD:
            return [Segment("   ", base), Segment(row.text, base + self.part("stack--fold"))]
        if row.kind is RowKind.FRAME:
            style = base + self.part(_STYLES[row.status])
            edge = "╭" if row.status in (Status.LIVE, Status.LEFT, Status.MOVED) else " "
            text = row.text if len(row.text) + _CAPTION <= width else row.brief
            return [Segment(" ", base), Segment(f"{edge}{row.status.value} {text}", style)]
        return self._word(row, width, base)

    def _word(self, row: Row, width: int, base: Style) -> list[Segment]:
        rest = width - _FIXED - _RSP - self._owner_width
        phrase = rest >= _SHORT + self._phrase_width
        full = rest >= _LONG + (self._phrase_width if phrase else self._was_width) + self._name_width
        with_owner = rest >= _SHORT + self._was_width
        clobbered = row.status is Status.CLOBBERED
        changed = base + self.part("stack--changed") if row.changed else base
        touched = base + self.part("stack--changed") if row.changed or row.taken else base
        digits = f"{row.addr:016x}"
        segments = [
            Segment("*" if row.changed else "<" if row.taken else " ", touched),
            Segment(row.edge, base + self.part("stack--left")),
            Segment(digits if full else f"…{digits[-_SHORT + 1 :]}", base + self.part("stack--addr")),
            Segment(" ", base),
            Segment(row.value, base + self.part("stack--clobbered") if clobbered else changed),
            Segment(f" {row.slot:<6} ", base),
        ]
        if with_owner or not row.was:
            segments.append(Segment(f"{_owner(row.owner):<{self._owner_width}}", base))
        if clobbered:
            segments.append(Segment(_was(row, phrase), base + self.part("stack--clobbered")))
        elif row.status is Status.SURVIVED:
            segments.append(Segment(f"~ was {row.was} ", base + self.part("stack--left")))
        elif row.by:
            same = f"= same value, {row.by} " if phrase else "= same value "
            segments.append(Segment(same, base + self.part("stack--left")))
        elif row.was:
            segments.append(Segment(f"was {row.was} ", base + self.part("stack--changed")))
        if row.rsp:
            segments.append(Segment("◀ RSP ", base + self.part("stack--rsp")))
        if row.name:
            room = width - sum(segment.cell_length for segment in segments)
            segments.append(Segment(_names(row.name, room), base + self.part("stack--left")))
        return segments


def _was(row: Row, phrase: bool) -> str:
    return f"✗ overwritten by {row.by} (was {row.was}) " if phrase else f"✗ was {row.was} "


def _owner(text: str) -> str:
    """The name of an owner cut to the width of its column; the number of its event stays."""
    if len(text) <= _OWNER_MAX:
        return text
    head, _, number = text.rpartition("@")
    return f"{head[: max(_OWNER_MAX - len(number) - 2, 1)]}…@{number}"


def _names(text: str, room: int) -> str:
    """Symbols cut to a width in the middle, so that the offset in the function stays."""
    if len(text) <= room:
        return text
    if room < _NAME_LEAST:
        return ""
    parts = text.split(_AND_WAS)
    each = max((room - len(_AND_WAS) * (len(parts) - 1)) // len(parts), 0)
    if each < _NAME_MIN:  # both do not fit: what is there now matters more
        parts, each = parts[:1], room
    return _AND_WAS.join(elide(part, each) for part in parts)


def elide(name: str, room: int) -> str:
    """`asm_common_inter…+0x1d`."""
    if len(name) <= room:
        return name
    tail = name[name.rfind("+") :] if "+" in name[-8:] else ""
    head = room - len(tail) - 1
    return f"{name[:head]}…{tail}" if head > 0 else name[: max(room, 0)]
