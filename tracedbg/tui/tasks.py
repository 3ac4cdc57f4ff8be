"""Work of the session's thread that goes on between the wishes of the screen: in slices, with reports."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

from tracedbg.filter import Filters, Tally

ROOM = 1 << 16  # matches of one slice
_SERIALS = count(1)


class CountingLike(Protocol):
    """What the viewer asks of replay.Counting."""

    @property
    def counted(self) -> int: ...
    def step(self, max_events: int) -> int: ...
    def result(self) -> Tally: ...


class SearchableLike(Protocol):
    """What searches and tasks ask of replay.Replay."""

    @property
    def count(self) -> int: ...
    def find_match(self, filters: Filters, start: int, direction: int = ..., limit: int = ...) -> int | None: ...
    def collect(self, filters: Filters, start: int, room: int = ..., limit: int = ...) -> tuple[array[int], int]: ...
    def tally(self) -> CountingLike: ...


@dataclass(frozen=True, slots=True)
class Matched:
    """The next matches of a task, and the events it has looked at; `serial` says of which task."""

    serial: int
    blocks: tuple[array[int], ...]
    covered: int
    done: bool


@dataclass(frozen=True, slots=True)
class Counted:
    """A tally so far."""

    tally: Tally
    counted: int
    done: bool


class Task(Protocol):
    """One of each class goes on at a time; a newer one replaces the older."""

    done: bool

    def step(self, replay: SearchableLike, events: int) -> None:
        """Look at so many events more."""

    def report(self) -> Any:
        """What is new since the last report."""


class MatchTask:
    """Collects the events that pass filters, from `start` on."""

    def __init__(self, filters: Filters, start: int = 0) -> None:
        self.filters = filters
        self.serial = next(_SERIALS)
        self.done = False
        self._at = start
        self._blocks: list[array[int]] = []

    def step(self, replay: SearchableLike, events: int) -> None:
        end = min(self._at + events, replay.count)
        while self._at < end:
            block, self._at = replay.collect(self.filters, self._at, ROOM, end - self._at)
            if block:
                self._blocks.append(block)
        self.done = self._at >= replay.count

    def report(self) -> Matched:
        blocks, self._blocks = tuple(self._blocks), []
        return Matched(self.serial, blocks, self._at, self.done)


class TallyTask:
    """Counts all events."""

    def __init__(self) -> None:
        self.done = False
        self._counting: CountingLike | None = None

    def step(self, replay: SearchableLike, events: int) -> None:
        if self._counting is None:
            self._counting = replay.tally()
        self.done = self._counting.step(events) == 0

    def report(self) -> Counted:
        assert self._counting is not None  # there is a step before each report
        return Counted(self._counting.result(), self._counting.counted, self.done)
