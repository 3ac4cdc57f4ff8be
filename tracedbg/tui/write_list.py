"""All stores to one word, as a list that grows while they are looked for."""

from __future__ import annotations

from tracedbg.describe import Words, hex_address
from tracedbg.state import Hit
from tracedbg.tui.journeys import Listed
from tracedbg.tui.jumps import JumpScreen


class WriteScreen(JumpScreen):
    """Event, value after it, who stored it."""

    def __init__(self, words: Words, addr: int, at: int) -> None:
        self._words = words
        self._hits: list[Hit] = []
        self._numbers: list[int] = []
        self._addr = addr
        self._last: Listed | None = None
        super().__init__("", self._numbers, self._row, at)

    def take(self, report: Listed) -> None:
        """More of them have been found."""
        self._hits += report.hits
        self._numbers += [hit.event for hit in report.hits]
        self._last = report
        if self.is_mounted:
            self.present()

    def present(self) -> None:
        count, last = len(self._hits), self._last
        if last is None:
            self.show(self._heading("looking ..."))
        elif last.done:
            first = "" if last.at >= last.total else "the first "
            self.show(self._heading(f"{first}{count:,}"), "" if count else "nothing in the trace wrote this")
        else:
            self.show(self._heading(f"{count:,} so far, {last.at * 100 // max(last.total, 1)}%"))

    def _heading(self, how_many: str) -> str:
        return f"Writes of {hex_address(self._addr)}: {how_many}"

    def _row(self, row: int) -> str:
        hit = self._hits[row]
        event = self._words.event(hit.event)
        if event is None:
            return f"{hit.event:>10,}"
        value = self._words.hit_value(hit)
        symbol = self._words.symbol(hit.value) if hit.known == 0xFF else None
        before = self._hits[row - 1] if row else None
        same = before is not None and (hit.value, hit.known) == (before.value, before.known)
        what = "same value" if same else symbol or ""
        return f"{hit.event:>10,}  {value}  {f'{what:<20}  ' if what else ''}{self._words.event_line(event)}"
