"""Events of several CPUs into one order, by TSC, in bounded memory."""

from __future__ import annotations

import struct
from itertools import accumulate
from operator import itemgetter

from tracedbg import wire
from tracedbg.formats.xentrace_events import Window
from tracedbg.writer import TraceWriter

_ROW = wire.EVENT_SIZE
MAX_HELD = 64 << 20  # bytes of events


class Merge:
    """Takes windows in the order of the file and writes their events.

    The tool polls the CPUs in turn and writes all that a CPU has, a window each. What it finds in the round after the next
    is younger than everything in this one, so two rounds are enough. A round ends where the CPU number does not rise.
    The events of one CPU stay in the order of their records, whatever their TSCs say.
    """

    def __init__(self, writer: TraceWriter) -> None:
        self.unordered = 0  # how often what was held became too much, and was written before its time
        self._writer = writer
        self._old: list[Window] = []  # the round before
        self._new: list[Window] = []

    def begin(self, cpu: int) -> None:
        """Before a window of this CPU is read."""
        if self._new and cpu <= self._new[-1].cpu:
            self._round()

    def add(self, window: Window) -> None:
        """A window whose first events are there; more may come until the next one begins."""
        self._new.append(window)

    def check(self) -> None:
        """Write what is held, if that is too much."""
        if sum(len(w.rows) for w in self._old) + sum(len(w.rows) for w in self._new) > MAX_HELD:
            self.unordered += len({w.cpu for w in (*self._old, *self._new)}) > 1
            self._write(self._old + self._new)
            self._old = []

    def close(self) -> None:
        """Write the rest."""
        self._write(self._old + self._new)
        self._old, self._new = [], []

    def _round(self) -> None:
        old, new = self._old, [w for w in self._new if w.rows]
        if old and len({w.cpu for w in (*old, *new)}) > 1:
            limit = max(max(_times(w)) for w in old)
            for window in new:
                keep = sum(1 for _ in filter(limit.__ge__, accumulate(_times(window), max)))
                if keep:
                    early = Window(window.cpu, window.start, window.rows[: keep * _ROW])
                    window.drop(keep * _ROW)
                    old.append(early)
        self._write(old)
        self._old, self._new = [w for w in new if w.rows], []

    def _write(self, windows: list[Window]) -> None:
        windows = [w for w in windows if w.rows]
        if len({w.cpu for w in windows}) > 1:
            keys: list[int] = []
            highest: dict[int, int] = {}
            for window in windows:
                times = list(accumulate(_times(window), max, initial=highest.get(window.cpu, 0)))[1:]
                highest[window.cpu] = times[-1]
                keys += times
            rows = [row for w in windows for (row,) in struct.iter_unpack(f"{_ROW}s", w.rows)]
            order = sorted(range(len(rows)), key=keys.__getitem__)
            self._writer.append(b"".join(itemgetter(*order)(rows)))
        else:
            for window in windows:
                self._writer.append(window.rows)
        for window in windows:
            window.drop(len(window.rows))


def _times(window: Window) -> list[int]:
    return memoryview(window.rows).cast("Q")[:: _ROW // 8].tolist()
