"""A row of a stack as the segments of a line, as much of it as a column has room for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.segment import Segment
from rich.style import Style

from tracedbg.tui.owners import Status
from tracedbg.tui.rows import AND_WAS, Row, RowKind

_FIXED = 2 + 1 + 16 + 8  # marks, blank, value, slot
_CAPTION = 1 + 3  # what stands before a caption
_TINY, _SHORT, _LONG = 5, 9, 16  # digits of an address
_OWNER_MAX = 16
_NAME_MIN = 10  # columns that each of two symbols needs
_NAME_LEAST = 6  # fewer tell nothing
RSP = "◀ RSP "
SLOT = 6

_STYLES = {
    Status.LIVE: "stack--live",
    Status.MOVED: "stack--moved",
    Status.LEFT: "stack--left",
    Status.CLOBBERED: "stack--clobbered",
    Status.SURVIVED: "stack--left",
}


@dataclass(frozen=True, slots=True)
class Columns:
    """How wide the parts of the words of a column are, so that they stand below each other."""

    owner: int = 0
    was: int = 0
    phrase: int = 0
    name: int = 0

    @classmethod
    def of(cls, rows: tuple[Row, ...]) -> Columns:
        """What these rows need."""
        overwritten = [r for r in rows if r.was]
        return cls(
            max((len(_owner(r.owner)) + 1 for r in rows if r.owner), default=0),
            max((len(_was(r, False)) for r in overwritten), default=0),
            max((len(_was(r, True)) for r in overwritten), default=0),
            max((min(len(r.name), _OWNER_MAX) for r in overwritten), default=0),
        )

    @property
    def one_line(self) -> int:
        """The width in which an overwritten word fits on one line."""
        return _FIXED + _SHORT + self.owner + self.was + len(RSP) if self.was else 0


def row_line(row: Row, width: int, base: Style, columns: Columns, part: Callable[[str], Style]) -> list[Segment]:
    """One line. `part` gives a component style to add to `base`."""
    if row.kind is RowKind.STACK:
        name = base + part("stack--name")
        text = row.text if len(row.text) + 4 <= width else row.brief
        return [Segment("═ ", name), Segment(f"{text} ", name), Segment("═" * max(width - len(text) - 3, 0), name)]
    if row.kind is RowKind.NOTE:
        return [Segment(" ", base), Segment(row.text, base + part("stack--note"))]
    if row.kind is RowKind.FOLD:
        return [Segment("   ", base), Segment(row.text, base + part("stack--fold"))]
    if row.kind is RowKind.BOTTOM:
        text = row.text if len(row.text) + 3 <= width else row.brief
        return [Segment(f"▔▔ {text}", base + part("stack--fold"))]
    if row.kind is RowKind.FRAME:
        style = base + part(_STYLES[row.status])
        edge = "╭" if row.status in (Status.LIVE, Status.LEFT, Status.MOVED) else " "
        text = row.text if len(row.text) + _CAPTION <= width else row.brief
        return [Segment(" ", base), Segment(f"{edge}{row.status.value} {text}", style)]
    if row.kind is RowKind.WAS:
        return _before(row, width, base, part)
    return _word(row, width, base, columns, part)


def _before(row: Row, width: int, base: Style, part: Callable[[str], Style]) -> list[Segment]:
    """The old value below the new one, `✗ was` in the place of the address; the bytes that differ stand out."""
    style = base + part("stack--clobbered" if row.status is Status.CLOBBERED else "stack--changed")
    dim = base + part("stack--left")
    lead = 2 + _address_width(width) + 1
    glyph = row.status.value if row.status is not Status.NONE else " "
    segments = [Segment(f" {glyph}{'was':>{lead - 3}} ", style)]
    for old, new in zip(_pairs(row.old), _pairs(row.value), strict=True):
        segments.append(Segment(old, dim if old == new else style))
    by = f" until {row.by}" if row.by else ""
    room = width - lead - 16 - 1
    name = names(row.name, room - len(by)) if len(row.name) <= room - len(by) else names(row.name, room)
    text = f" {name}" if name else ""
    if len(text) + len(by) <= room + 1:
        text += by
    segments.append(Segment(text, dim))
    return segments


def _pairs(digits: str) -> list[str]:
    return [digits[n : n + 2] for n in range(0, 16, 2)]


def _address_width(width: int) -> int:
    if width < _FIXED + _SHORT + len(RSP) + 6:
        return _TINY
    return _SHORT


def _word(row: Row, width: int, base: Style, columns: Columns, part: Callable[[str], Style]) -> list[Segment]:
    rest = width - _FIXED - len(RSP) - columns.owner
    phrase = rest >= _SHORT + columns.phrase
    full = rest >= _LONG + (columns.phrase if phrase else columns.was) + columns.name
    with_owner = rest >= _SHORT + columns.was or not columns.was
    clobbered = row.status is Status.CLOBBERED
    changed = base + part("stack--changed") if row.changed else base
    touched = base + part("stack--changed") if row.changed or row.taken else base
    digits = f"{row.addr:016x}"
    size = _address_width(width)
    segments = [
        Segment("*" if row.changed else "<" if row.taken else " ", touched),
        Segment(row.edge, base + part("stack--left")),
        Segment(digits if full and size == _SHORT else f"…{digits[-size + 1 :]}", base + part("stack--addr")),
        Segment(" ", base),
        Segment(row.value, base + part("stack--clobbered") if clobbered else changed),
        Segment(f" {row.slot:<{SLOT}} ", base),
    ]
    if with_owner or not row.was:
        segments.append(Segment(f"{_owner(row.owner):<{columns.owner}}", base))
    if row.was and clobbered:
        segments.append(Segment(_was(row, phrase), base + part("stack--clobbered")))
    elif row.was and row.status is Status.SURVIVED:
        segments.append(Segment(f"~ was {row.was} ", base + part("stack--left")))
    elif row.by:
        same = f"= same value, {row.by} " if phrase else "= same value "
        segments.append(Segment(same, base + part("stack--left")))
    elif row.was:
        segments.append(Segment(f"was {row.was} ", base + part("stack--changed")))
    if row.rsp:
        segments.append(Segment(RSP, base + part("stack--rsp")))
    if row.name:
        room = width - sum(segment.cell_length for segment in segments)
        segments.append(Segment(names(row.name, room), base + part("stack--left")))
    return segments


def _was(row: Row, phrase: bool) -> str:
    return f"✗ overwritten by {row.by} (was {row.was}) " if phrase else f"✗ was {row.was} "


def _owner(text: str) -> str:
    """The name of an owner cut to the width of its column; the number of its event stays."""
    if len(text) <= _OWNER_MAX:
        return text
    head, _, number = text.rpartition("@")
    return f"{head[: max(_OWNER_MAX - len(number) - 2, 1)]}…@{number}"


def names(text: str, room: int) -> str:
    """Symbols cut to a width in the middle, so that the offset in the function stays."""
    if len(text) <= room:
        return text
    if room < _NAME_LEAST:
        return ""
    parts = text.split(AND_WAS)
    each = max((room - len(AND_WAS) * (len(parts) - 1)) // len(parts), 0)
    if each < _NAME_MIN:  # both do not fit: what is there now matters more
        parts, each = parts[:1], room
    return AND_WAS.join(elide(part, each) for part in parts)


def elide(name: str, room: int) -> str:
    """`asm_common_inter…+0x1d`."""
    if len(name) <= room:
        return name
    tail = name[name.rfind("+") :] if "+" in name[-8:] else ""
    head = room - len(tail) - 1
    return f"{name[:head]}…{tail}" if head > 0 else name[: max(room, 0)]
