"""The nesting of the whole trace as a line of blocks per CPU; it is a scroll bar too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.strip import Strip

from tracedbg.tui.marks import GLYPHS
from tracedbg.tui.overview import Lane, Overview
from tracedbg.tui.pane import Painted

BLOCKS = " ▁▂▃▄▅▆▇█"
LABEL = 10  # columns before the blocks
GAP = "░"
UNKNOWN = "╌"  # not scanned yet
HERE = "▼"
_SCALE = -1  # in the place of a CPU
_LEVELS = {3: "error", 2: "warning", 1: "note"}
_PAGE = 10  # columns
_MOVE = Binding.Group("timeline", compact=True)


@dataclass(frozen=True, slots=True)
class Cell:
    """One column of a lane."""

    glyph: str
    style: str  # part of a component class


class TimelineBar(Painted, can_focus=True):
    """Lanes of an Overview under a scale, or one lane of all CPUs where there is one line. Picked says where the user went."""

    ALLOW_SELECT = False
    DEFAULT_CSS = "TimelineBar { height: 1; }"
    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "timeline--error", "timeline--warning", "timeline--note", "timeline--gap", "timeline--depth", "timeline--label",
        "timeline--here", "timeline--dim",
    }  # fmt: skip
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left,h", "column(-1)", "back", key_display="h", group=_MOVE),
        Binding("right,l", "column(1)", "forward", key_display="l", group=_MOVE),
        Binding("pageup", f"column(-{_PAGE})", "page back", show=False),
        Binding("pagedown", f"column({_PAGE})", "page forward", show=False),
        Binding("home,g", "edge(0)", "first event", show=False),
        Binding("end,G", "edge(1)", "last event", show=False),
    ]

    @dataclass
    class Picked(Message):
        """The user wants to go to an event; `dragging`: from where the mouse was just now."""

        event: int
        dragging: bool

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id)
        self.overview: Overview | None = None
        self.position = 0  # the selected event
        self.cpu: int | None = None  # its CPU
        self._cells: dict[tuple[int | None, int, bool], list[Cell]] = {}
        self._dragged = False

    def show_overview(self, overview: Overview | None) -> None:
        """Take a new survey of the trace."""
        self.overview = overview
        self._cells.clear()
        self.refresh()

    def set_position(self, event: int, cpu: int | None) -> None:
        """Say which event is selected, and its CPU."""
        if (event, cpu) != (self.position, self.cpu):
            self.position, self.cpu = event, cpu
            self.refresh()

    # -- columns -------------------------------------------------------------------------------------------------------

    @property
    def _width(self) -> int:
        return max(self.size.width - LABEL, 1)

    def _column(self, overview: Overview, bucket: int) -> int:
        """The column where a bucket begins."""
        if self._width < overview.buckets:
            return bucket * self._width // overview.buckets
        return -(-bucket * self._width // overview.buckets)

    def _event_at(self, x: int) -> int | None:
        """The first event of the column that the mouse is on; the last column stands for the end."""
        if self.overview is None:
            return None
        column = max(0, min(x - LABEL, self._width - 1))
        if column == self._width - 1:
            return self.overview.count - 1
        if self._width < self.overview.buckets:
            return self.overview.first(-(-column * self.overview.buckets // self._width))
        return self.overview.first(column * self.overview.buckets // self._width)

    def lanes(self) -> list[Lane]:
        """The lanes that there is room for: one for all CPUs, one for each, or all and the first of them with findings."""
        overview, rows = self.overview, self.size.height - 1
        if overview is None or not overview.lanes:
            return []
        every, own = overview.lanes[0], overview.lanes[1:]
        if rows < 1:
            return [every if len(own) != 1 else own[0]]
        if len(own) <= rows:
            return list(own)
        wanted = sorted(own, key=lambda lane: (lane.cpu != self.cpu, -max(lane.ranks), lane.cpu))[: rows - 1]
        return [every, *sorted(wanted, key=lambda lane: lane.cpu or 0)]

    def cells(self, lane: Lane) -> list[Cell]:
        """The columns of a lane."""
        key = (lane.cpu, self._width, self.size.height == 1)
        cells = self._cells.get(key)
        if cells is None and self.overview is not None:
            cells = self._cells[key] = self._make(self.overview, lane)
        return cells or []

    def _make(self, overview: Overview, lane: Lane) -> list[Cell]:
        width, buckets = self._width, overview.buckets
        deepest = max(overview.depth, 1)
        known = self._column(overview, overview.bucket(overview.scanned)) if overview.scanned < overview.count else width
        depths = [0] * width
        for column in range(width):
            lo = column * buckets // width if width >= buckets else -(-column * buckets // width)
            hi = max(-(-(column + 1) * buckets // width), lo + 1) if width < buckets else lo + 1
            depths[column] = max(lane.line.depths[lo:hi], default=0)
        cells = [
            Cell(BLOCKS[depth * 8 // deepest or bool(depth)], "depth") if n < known else Cell(UNKNOWN, "dim")
            for n, depth in enumerate(depths)
        ]
        for column, mark in self._marks(overview, lane).items():
            if mark.style != "note" or not depths[column] or self.size.height == 1:  # the scale has the notes too
                cells[column] = mark
        return cells

    def _marks(self, overview: Overview, lane: Lane) -> dict[int, Cell]:
        """Findings and gaps by column, the gravest of each."""
        ranks: dict[int, float] = {}
        for bucket, rank in enumerate(lane.ranks):
            gravity = max(rank, 1.5 if lane.line.gaps[bucket] else 0)  # a gap weighs more than a note
            if gravity:
                column = self._column(overview, bucket)
                ranks[column] = max(ranks.get(column, 0), gravity)
        return {n: Cell(GAP, "gap") if r == 1.5 else Cell(GLYPHS[_LEVELS[int(r)]], _LEVELS[int(r)]) for n, r in ranks.items()}

    # -- painting ------------------------------------------------------------------------------------------------------

    def render_line(self, y: int) -> Strip:
        base = self.base
        lanes = self.lanes()
        if not lanes or self.overview is None:
            return Strip.blank(self.size.width, base)
        if self.size.height > 1 and y == 0:
            return self._scale(self.overview, base)
        number = y - (self.size.height > 1)
        if number >= len(lanes):
            return Strip.blank(self.size.width, base)
        lane = lanes[number]
        mine = lane.cpu is not None and lane.cpu == self.cpu
        many = len(self.overview.lanes) > 2
        name = f"cpu {lane.cpu}" if lane.cpu is not None else "all CPUs" if many else "all"
        label = f"{'▸' if mine and many else ' '}{name}"[: LABEL - 1]
        style = base + self._part("here" if mine else "label")
        segments = [Segment(f"{label:<{LABEL}}", style), *self._blocks(lane, base)]
        return Strip(segments).crop_extend(0, self.size.width, base)

    def _blocks(self, lane: Lane, base: Style) -> Iterator[Segment]:
        cells, here = list(self.cells(lane)), self._here()
        if self.size.height == 1:  # the thumb is around its column, where nothing else has to be seen
            for n, glyph in ((here - 1, "▐"), (here + 1, "▌")):
                if 0 <= n < len(cells) and cells[n].style in ("depth", "dim"):
                    cells[n] = Cell(glyph, "here")
        before, current, after = cells[:here], cells[here : here + 1], cells[here + 1 :]
        for part, cursor in ((before, Style()), (current, Style(reverse=True, bold=True)), (after, Style())):
            for name, run in groupby(part, key=lambda cell: cell.style):
                yield Segment("".join(cell.glyph for cell in run), base + self._part(name) + cursor)

    def _here(self) -> int:
        return self._column(self.overview, self.overview.bucket(self.position)) if self.overview is not None else 0

    def _scale(self, overview: Overview, base: Style) -> Strip:
        """The deepest nesting, the marks of all CPUs, and the place of the selected event."""
        key = (_SCALE, self._width, False)
        if key not in self._cells:
            marks = self._marks(overview, overview.lanes[0])
            self._cells[key] = [marks.get(n, Cell("─", "dim")) for n in range(self._width)]
        cells, here = list(self._cells[key]), self._here()
        percent = f" {self.position * 100 // max(overview.count - 1, 1)}% "
        at = here + 1 if here + 1 + len(percent) <= self._width else here - len(percent)
        for n, digit in enumerate(percent):
            if at + n >= 0 and cells[at + n].style == "dim":
                cells[at + n] = Cell(digit, "label")
        cells[here] = Cell(HERE, "here")
        label = f" ≤{overview.depth} deep"[: LABEL - 1]
        segments = [Segment(f"{label:<{LABEL}}", base + self._part("label"))]
        for name, run in groupby(cells, key=lambda cell: cell.style):
            segments.append(Segment("".join(cell.glyph for cell in run), base + self._part(name)))
        return Strip(segments).crop_extend(0, self.size.width, base)

    def _part(self, name: str) -> Style:
        return self.part(f"timeline--{name}")

    def tell(self) -> str:
        """What is at the position, in words: colour and glyphs are short."""
        overview = self.overview
        if overview is None:
            return ""
        bucket, lane = overview.bucket(self.position), overview.lanes[0]
        first = overview.first(bucket)
        last = overview.first(bucket + 1) - 1
        line = lane.line
        where = f"event {first:,}" if first >= last else f"events {first:,}-{last:,}"
        if first >= overview.scanned:
            return f"{where}: not scanned yet"
        counts = (
            (line.deliveries[bucket], "delivery", "deliveries"),
            (line.findings[bucket], "finding", "findings"),
            (line.gaps[bucket], "gap", "gaps"),
        )
        parts = [f"nesting up to {line.depths[bucket]}"]
        parts += [f"{number:,} {one if number == 1 else more}" for number, one, more in counts if number]
        return f"{where}: {', '.join(parts)}"

    # -- keys and mouse ------------------------------------------------------------------------------------------------

    def _pick(self, event: int, dragging: bool = False) -> None:
        self.post_message(self.Picked(event, dragging))

    def action_column(self, columns: int) -> None:
        overview = self.overview
        if overview is None:
            return
        step = max(-(-overview.buckets // self._width), 1)
        bucket = overview.bucket(self.position) + columns * step
        if bucket >= overview.buckets:
            self._pick(overview.count - 1)
        else:
            self._pick(overview.first(max(bucket, 0)))

    def action_edge(self, end: int) -> None:
        if self.overview is not None:
            self._pick((self.overview.count - 1) * end)

    def on_mouse_down(self, event: events.MouseDown) -> None:
        target = self._event_at(event.x)
        if target is not None:
            self._dragged = True
            self.capture_mouse()
            self._pick(target)

    def on_mouse_move(self, event: events.MouseMove) -> None:
        target = self._event_at(event.x)
        if self._dragged and target is not None and target != self.position:
            self._pick(target, dragging=True)

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        event.stop()
        self.action_column(1)

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        event.stop()
        self.action_column(-1)

    def on_mouse_up(self, event: events.MouseUp) -> None:
        self._dragged = False
        self.release_mouse()
