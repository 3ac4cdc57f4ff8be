"""The events that pass the filter, as the rows of a list: it grows while they are being collected."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable


class Matches:
    """Event numbers in rising order, in blocks as they came: four bytes for each, never copied."""

    def __init__(self) -> None:
        self.covered = 0  # events looked at
        self.done = False
        self._blocks: list[array[int]] = []
        self._starts: list[int] = []  # row of the first of each block
        self._firsts: list[int] = []  # the event there
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> int:
        if not 0 <= row < self._count:
            raise IndexError(row)
        block = bisect_right(self._starts, row) - 1
        return self._blocks[block][row - self._starts[block]]

    def add(self, blocks: Iterable[array[int]], covered: int, done: bool) -> None:
        """Take what was found since."""
        for block in blocks:
            self._blocks.append(block)
            self._starts.append(self._count)
            self._firsts.append(block[0])
            self._count += len(block)
        self.covered, self.done = covered, done

    def place(self, event: int) -> tuple[int, bool]:
        """The row of an event, or the one that it would have; and whether it is there."""
        number = bisect_right(self._firsts, event) - 1
        if number < 0:
            return 0, False
        block = self._blocks[number]
        at = bisect_left(block, event)
        return self._starts[number] + at, at < len(block) and block[at] == event
