"""What a search looks for, as plain values: the core compares events with it (replay.py)."""

from __future__ import annotations

from dataclasses import dataclass

from tracedbg.state import EventFlag, Kind, Known, Source

ADDRESSES = Known.RIP | Known.RSP | Known.ADDR | Known.VALUE  # the fields of an event that may hold addresses
NO_FLAGS = EventFlag(0)
MAX_FILTERS = 64  # in one search; TDB_MAX_FILTERS


@dataclass(frozen=True, slots=True)
class Filter:
    """A test of an event: it passes if it passes each part that is not None, with `invert` if it does not.

    A field that the trace does not know passes no part but `sources` with UNKNOWN; records of an unknown kind pass no
    `kinds`. `args` is compared with the event's `arg`, which is the vector where it has one. `ranges` are (lo, hi), hi
    exclusive and at most 2**64, sorted and disjoint: one of `fields` lies in one of them; of a write or a read, one byte of
    it. `flags`: all of them are set.
    """

    kinds: frozenset[Kind] | None = None
    args: frozenset[int] | None = None
    sources: frozenset[Source] | None = None
    cpus: frozenset[int] | None = None
    ranges: tuple[tuple[int, int], ...] | None = None
    fields: Known = ADDRESSES
    flags: EventFlag = NO_FLAGS
    invert: bool = False


Filters = tuple[Filter, ...]  # an event passes if it passes all of them


def of_cpu(cpu: int) -> Filters:
    """The events of a CPU."""
    return (Filter(cpus=frozenset({cpu})),)


@dataclass(frozen=True, slots=True)
class Tally:
    """How many events: deliveries by vector and by source, events of all kinds by CPU."""

    deliveries: int
    vectors: dict[int, int]
    sources: dict[Source, int]
    cpus: dict[int, int]
