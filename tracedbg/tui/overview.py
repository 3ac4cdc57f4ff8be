"""The whole trace in a bounded number of stretches: what the timeline shows, made in the session's thread."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from tracedbg import rules
from tracedbg.state import Finding, Timeline

BUCKETS = 2048  # stretches of a trace
LANES = 16  # CPUs that have a line of their own
_RANKS = {level: rules.rank(level) + 1 for level in rules.SEVERITIES}


class HasTimeline(Protocol):
    """What a survey asks of replay.Replay."""

    @property
    def count(self) -> int: ...
    @property
    def scanned(self) -> int: ...
    def timeline(self, cpu: int | None, buckets: int, first: int = ..., count: int | None = ...) -> Timeline: ...


@dataclass(frozen=True, slots=True)
class Lane:
    """One CPU, or all (None). `ranks`: by bucket the gravest finding, 0 none, else 1 + rules.rank()."""

    cpu: int | None
    line: Timeline
    ranks: bytes


@dataclass(frozen=True, slots=True)
class Overview:
    """The trace as far as scanned; the first lane is that of all CPUs."""

    count: int
    scanned: int
    buckets: int
    lanes: tuple[Lane, ...]

    @property
    def depth(self) -> int:
        """The deepest nesting."""
        return max(self.lanes[0].line.depths, default=0)

    def bucket(self, event: int) -> int:
        """The bucket of an event."""
        return min(event * self.buckets // max(self.count, 1), self.buckets - 1)

    def first(self, bucket: int) -> int:
        """The first event of a bucket."""
        return -(-bucket * self.count // self.buckets)


class Survey:
    """Keeps the gravest finding of each bucket as findings come in."""

    def __init__(self, count: int, cpus: int) -> None:
        self.count = count
        self.cpus = cpus
        self.buckets = min(BUCKETS, count)
        self._ranks: dict[int, bytearray] = {}  # by CPU; -1: all

    def reset(self, count: int | None = None) -> None:
        """Forget the findings: their final words are to come. `count`: the events that the trace has by now."""
        if count is not None:
            self.count, self.buckets = count, min(BUCKETS, count)
        self._ranks.clear()

    def take(self, findings: Iterable[Finding]) -> None:
        """Take findings in."""
        for finding in findings:
            if finding.event >= self.count:  # the trace has grown, and this one will come again
                continue
            bucket = finding.event * self.buckets // self.count
            rank = _RANKS[rules.finding_severity(finding)]
            for cpu in (-1, finding.cpu):
                ranks = self._ranks.setdefault(cpu, bytearray(self.buckets))
                ranks[bucket] = max(ranks[bucket], rank)

    def overview(self, replay: HasTimeline) -> Overview | None:
        """The trace as it is known now; None: it has no events."""
        if not self.buckets:
            return None
        lanes = [self._lane(replay, None), *(self._lane(replay, cpu) for cpu in self._chosen())]
        return Overview(self.count, replay.scanned, self.buckets, tuple(lanes))

    def _chosen(self) -> list[int]:
        """The CPUs with a lane, those with the gravest and most findings first if there are too many."""

        def key(cpu: int) -> tuple[int, int, int]:
            ranks = self._ranks.get(cpu, b"")
            return (-max(ranks, default=0), sum(not rank for rank in ranks) - len(ranks), cpu)

        return sorted(sorted(range(self.cpus), key=key)[:LANES]) if self.cpus > LANES else list(range(self.cpus))

    def _lane(self, replay: HasTimeline, cpu: int | None) -> Lane:
        ranks = self._ranks.get(-1 if cpu is None else cpu)
        line = replay.timeline(cpu, self.buckets, 0, self.count)
        return Lane(cpu, line, bytes(ranks if ranks is not None else self.buckets))
