"""The screen that switches sources, CPUs and vectors on and off."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import ModalScreen

from tracedbg import x86
from tracedbg.filter import Tally
from tracedbg.state import Source
from tracedbg.tui.hidden import Hidden
from tracedbg.tui.lines import LineList

MAX_VECTORS = 24  # of a long list, the most frequent ones
NAMES = {
    Source.UNKNOWN: "source not known", Source.EXCEPTION: "exceptions", Source.NMI: "NMIs", Source.MC: "machine checks",
    Source.SOFT_INT: "software (INT n, INT3)", Source.FIXED: "local APIC", Source.EXTINT: "8259 (ExtINT)",
    Source.INJECTED: "injected by a VMM", Source.EXTERNAL: "interrupts, APIC or 8259", Source.SYSCALL: "FRED system calls",
}  # fmt: skip
GROUPS = {"sources": "Deliveries by source", "vectors": "Deliveries by vector", "cpus": "Events by CPU"}


class SwitchList(LineList):
    """A line for each switch, below the title of its group."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"lines--cursor", "lines--focus", "events--number"}
    BORDER_TITLE = "Show"

    def __init__(self, hidden: Hidden) -> None:
        super().__init__(id="switches")
        self.hidden = hidden
        self.noise: frozenset[int] = frozenset()
        self._rows: list[tuple[str, int | None, str]] = []  # group, number in it or None for the title, text

    def show_tally(self, tally: Tally, noise: frozenset[int]) -> None:
        """Say how many there are of each; what is hidden is listed even if it has none."""
        self.noise = noise
        total = max(tally.deliveries, 1)
        vectors = sorted(tally.vectors, key=lambda v: (-tally.vectors[v], v))[:MAX_VECTORS]
        vectors += sorted(self.hidden.vectors - set(vectors))
        rows: list[tuple[str, int | None, str]] = []
        for group, numbers in (
            ("sources", sorted({*tally.sources, *self.hidden.sources})),
            ("vectors", vectors),
            ("cpus", sorted({*tally.cpus, *self.hidden.cpus})),
        ):
            rows.append((group, None, GROUPS[group]))
            for n in numbers:
                if group == "sources":
                    name, count = NAMES[Source(n)], tally.sources.get(Source(n), 0)
                elif group == "vectors":
                    name, count = f"{n:#04x} {x86.VECTOR_NAMES.get(n, '')}".rstrip(), tally.vectors.get(n, 0)
                else:
                    name, count = f"cpu {n}", tally.cpus.get(n, 0)
                share = "" if group == "cpus" else f" {count * 100 / total:3.0f} %"
                rows.append((group, n, f"{name:<24} {count:>12,}{share}{'  noise' if group == 'vectors' and n in noise else ''}"))
        first = not self._rows
        self._rows = rows
        self.set_count(len(rows))
        if first and len(rows) > 1:
            self.set_cursor(1)

    def line(self, index: int, width: int, base: Style, current: bool) -> list[Segment]:
        group, number, text = self._rows[index]
        if number is None:
            return [Segment(text, base + Style(bold=True, underline=True))]
        off = number in getattr(self.hidden, group)
        style = base + self.part("events--number") if off else base
        return [Segment(f" [{' ' if off else 'x'}] {text}{'  hidden' if off else ''}", style)]

    def on_click(self, event: events.Click) -> None:
        offset = event.get_content_offset(self)
        row = self.count if offset is None else int(self.scroll_offset.y) + offset.y
        if row < self.count:
            self.set_cursor(row)
            self.toggle(row)
        event.prevent_default()  # here one click is enough

    def toggle(self, row: int, *, only: bool = False) -> None:
        """Switch what a row shows, on a title its whole group; `only`: the others of its group off."""
        if not self._rows:
            return
        group, number, _ = self._rows[row]
        all_of = frozenset(n for g, n, _ in self._rows if g == group and n is not None)
        now: frozenset[int] = getattr(self.hidden, group)
        if number is None:
            now = frozenset() if now else all_of
        elif only:
            now = all_of - {number}
        else:
            now = now ^ {number}
        self.hide(group, now)

    def hide(self, group: str, numbers: frozenset[int]) -> None:
        """Switch off these of a group, and no others."""
        if group == "sources":
            self.hidden = replace(self.hidden, sources=frozenset(Source(n) for n in numbers))
        elif group == "cpus":
            self.hidden = replace(self.hidden, cpus=numbers)
        else:
            self.hidden = replace(self.hidden, vectors=numbers)
        self.forget()


class SwitchScreen(ModalScreen[Hidden]):
    """All switches; what they say counts when the screen is closed."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "switch", "toggle"),
        Binding("o", "only", "only this"),
        Binding("n", "noise", "noise"),
        Binding("a", "everything", "show all"),
        Binding("escape,s,q", "close", "done", key_display="Esc"),
    ]

    def __init__(self, hidden: Hidden) -> None:
        super().__init__()
        self._list = SwitchList(hidden)

    def compose(self) -> ComposeResult:
        yield self._list

    def on_mount(self) -> None:
        self._list.border_subtitle = "Space toggle · o only this · n noise · a all · Esc done"
        self._list.focus()

    def show_tally(self, tally: Tally, noise: frozenset[int], share: str) -> None:
        """Fill in the numbers; `share`: how much has been counted, empty for all."""
        self._list.border_title = f"Show · counting {share}" if share else "Show"
        self._list.show_tally(tally, noise)

    @on(LineList.Chosen)
    def _chosen(self, message: LineList.Chosen) -> None:
        message.stop()
        self._list.toggle(message.index)

    @on(LineList.Moved)
    def _moved(self, message: LineList.Moved) -> None:
        message.stop()

    def action_switch(self) -> None:
        self._list.toggle(self._list.cursor)

    def action_only(self) -> None:
        self._list.toggle(self._list.cursor, only=True)

    def action_noise(self) -> None:
        noise, vectors = self._list.noise, self._list.hidden.vectors
        if not noise:
            self._list.border_title = "Show · no vector is mere noise"
        else:
            self._list.hide("vectors", vectors - noise if noise <= vectors else vectors | noise)

    def action_everything(self) -> None:
        self._list.hidden = Hidden()
        self._list.forget()

    def action_close(self) -> None:
        self.dismiss(self._list.hidden)
