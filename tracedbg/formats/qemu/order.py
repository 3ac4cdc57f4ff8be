"""The order of a QEMU log's events: one counter numbers those of all vCPUs, so what is missing is known."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

from tracedbg.formats.qemu.events import Events
from tracedbg.formats.qemu.items import Attempt, Item

HOLD = 8  # events that may stand before one with a lower number: the counter is read before the line is printed


class Order:
    """Passes items on to the events, with a gap where numbers are missing."""

    def __init__(self, events: Events) -> None:
        self.events = events
        self.expected: int | None = None  # the next number
        self._held: list[Item] = []
        self._held_attempts = 0

    @property
    def calm(self) -> bool:
        """Whether nothing is held back."""
        return not self._held and self.expected is not None

    def run(self, batches: Iterable[list[Item]]) -> None:
        """One log."""
        events = self.events
        for batch in batches:
            for item in batch:
                if not self._held and type(item) is Attempt and item.number == self.expected:
                    self.expected += 1
                    events.attempt(item)
                else:
                    self._ordered(item)
            events.records.trim()
        self._release(True)

    def run_threads(self, streams: list[Iterator[list[Item]]]) -> None:
        """One log a vCPU thread: QEMU numbers the events of all threads with one counter."""
        events = self.events
        cpus: dict[int, int] = {}

        def keyed(stream: Iterator[list[Item]], number: int) -> Iterator[tuple[int, int, int, Item]]:
            at, order = -1, 0
            for batch in stream:
                for item in batch:
                    if type(item) is Attempt:
                        at = max(at, item.number)
                    order += 1
                    yield at, number, order, item

        for _, stream, _, item in heapq.merge(*(keyed(s, n) for n, s in enumerate(streams)), key=lambda k: k[:3]):
            if type(item) is Attempt and stream not in cpus:
                cpus[stream] = events.cpus.of_thread(item, set(cpus.values()))
            # Before its first event a thread is not known to be a vCPU's.
            events.thread_cpu = cpus.get(stream)
            if type(item) is not Attempt:
                events.other(item)
                continue
            if self.expected is not None and item.number > self.expected:
                events.gap(item.number - self.expected)
            self.expected = max(self.expected or 0, item.number + 1)
            events.attempt(item)
            events.records.trim()

    def _ordered(self, item: Item) -> None:
        """An item that is no attempt, or whose number is not the next one."""
        if type(item) is not Attempt:
            if self._held:
                self._held.append(item)
                if len(self._held) > HOLD * 64:
                    self._release(True)
            else:
                self.events.other(item)
            return
        if self.expected is None:
            self.expected = item.number
        if item.number < self.expected and self.expected - item.number > HOLD:
            # The counter began anew: another run was appended. What lies between is not known.
            self._release(True)
            self.events.counts["restarts"] += 1
            self.events.gap(None)
            self.expected = item.number
        self._held.append(item)
        self._held_attempts += 1
        self._release(self._held_attempts > HOLD)

    def _release(self, force: bool) -> None:
        """Pass on what is held, in the log's own order, once no number is missing before it (`force`: in spite of one)."""
        if self.expected is None:
            return
        numbers = {i.number for i in self._held if type(i) is Attempt and i.number >= self.expected}
        if numbers and not force and max(numbers) - self.expected + 1 != len(numbers):
            return
        held, self._held, self._held_attempts = self._held, [], 0
        for item in held:
            if type(item) is not Attempt:
                self.events.other(item)
                continue
            if item.number > self.expected:
                missing = item.number - self.expected - sum(self.expected <= n < item.number for n in numbers)
                if missing:
                    self.events.gap(missing)
            elif item.number < self.expected and item.number not in numbers:
                # Two threads read the counter before either of them raised it.
                self.events.counts["numbers_twice"] += 1
            numbers.discard(item.number)
            self.expected = max(self.expected, item.number + 1)
            self.events.attempt(item)
