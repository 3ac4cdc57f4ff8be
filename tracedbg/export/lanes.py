"""Slices of a track must nest: those that do not go to further lanes of it."""

from __future__ import annotations

from bisect import bisect_right

MAX_KEPT = 4096  # slices without an outer one, remembered for each lane


class Lane:
    """The stretches of a lane that are taken, disjoint and by time.

    Slices come in about the order of their ends, inner ones before outer ones, so only the outermost are remembered: a slice
    fits if all that it meets lies within it. One that comes late meets what begins where it ends, too: readers take the end of
    the one and the begin of the other in the order in which they came.
    """

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []

    def take(self, begin: int, end: int) -> bool:
        """Take a stretch; False: it does not fit."""
        lo, hi = bisect_right(self._ends, begin), bisect_right(self._begins, end)
        if lo < hi and (self._begins[lo] < begin or self._ends[hi - 1] > end):
            return False
        self._begins[lo:hi], self._ends[lo:hi] = [begin], [end]
        if len(self._begins) > MAX_KEPT:  # the oldest become one: what comes so late between them gets another lane
            half = MAX_KEPT // 2
            self._begins[:half], self._ends[:half] = [self._begins[0]], [self._ends[half - 1]]
        return True


class Lanes:
    """The lanes of one track."""

    def __init__(self) -> None:
        self._lanes: list[Lane] = []

    def place(self, begin: int, end: int) -> int:
        """The number of the lane that a slice goes to."""
        for number, lane in enumerate(self._lanes):
            if lane.take(begin, end):
                return number
        self._lanes.append(Lane())
        self._lanes[-1].take(begin, end)
        return len(self._lanes) - 1
