"""The merge of native events by time, against a plain sort."""

from __future__ import annotations

import random
from itertools import accumulate

import pytest

from tracedbg import wire
from tracedbg._decode import ffi, lib

U64 = (1 << 64) - 1


def row(time: int, number: int) -> bytes:
    return wire.EVENT_PACK.pack(time, 0, 0, 0, number, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0)


class Runs:
    """Runs in C. Each is a list of times; an event's value is its number over all runs."""

    def __init__(self, runs: list[list[int]], floors: list[int] | None = None) -> None:
        number = iter(range(sum(map(len, runs))))
        self.rows = [ffi.from_buffer(bytearray(b"".join(row(time, next(number)) for time in run))) for run in runs]
        self.run = ffi.new("struct dec_run[]", len(runs))
        for place, run in enumerate(runs):
            self.run[place].event = ffi.cast("struct tdb_event *", self.rows[place])
            self.run[place].count, self.run[place].floor = len(run), floors[place] if floors else 0
        self.heap = ffi.new("uint32_t[]", len(runs))

    def merge(self, cap: int, limit: int = U64) -> list[int]:
        out = ffi.new("char[]", cap * 64)
        n = lib.dec_merge(self.run, len(self.run), self.heap, limit, ffi.cast("struct tdb_event *", out), cap)
        assert 0 <= n <= cap
        return [wire.EVENT_PACK.unpack(part)[4] for part in (ffi.buffer(out)[at * 64 : at * 64 + 64] for at in range(n))]


def in_order(runs: list[list[int]], floors: list[int]) -> list[tuple[int, int]]:
    """(key, number) of all events, sorted by key, then by run; a key is no lower than the one before it in its run."""
    keys = [key for run, floor in zip(runs, floors, strict=True) for key in [*accumulate(run, max, initial=floor)][1:]]
    return sorted((key, number) for number, key in enumerate(keys))


def test_merge_is_a_stable_sort() -> None:
    for seed in range(500):
        r = random.Random(seed)
        top = r.choice((3, 100, U64))
        runs = [[r.randint(0, top) for _ in range(r.choice((0, 1, 5, 40)))] for _ in range(r.randrange(9))]
        if r.random() < 0.7:
            runs = [sorted(run) for run in runs]
        floors = [r.choice((0, 0, r.randint(0, top))) for _ in runs]
        expected = in_order(runs, floors)
        merged, made = Runs(runs, floors), []
        limits = [*sorted(r.randint(0, top) for _ in range(r.randrange(3))), U64]
        for limit in limits:
            while got := merged.merge(r.choice((1, 7, 1000)), limit):
                made += got
            assert made == [number for key, number in expected if key <= limit], seed
        assert not any(run.count for run in merged.run)


def test_runs_may_grow_between_calls() -> None:
    # What a streaming reader does: merge up to what is known of all, refill, go on; the floor stays.
    runs = Runs([[5, 9], [6, 7]])
    assert runs.merge(9, limit=7) == [0, 2, 3]
    more = ffi.from_buffer(bytearray(row(3, 7) + row(20, 8)))  # 3: after 7 in its run
    runs.run[1].event, runs.run[1].count = ffi.cast("struct tdb_event *", more), 2
    assert runs.merge(9, limit=7) == [7] and runs.merge(9) == [1, 8]


@pytest.mark.parametrize("what", ["run", "heap", "out", "event"])
def test_nothing_is_taken_from_nowhere(what: str) -> None:
    runs = Runs([[1]])
    out = ffi.new("char[64]")
    place = {"run": runs.run, "heap": runs.heap, "out": ffi.cast("struct tdb_event *", out)}
    if what == "event":
        runs.run[0].event = ffi.NULL
    else:
        place[what] = ffi.NULL
    assert lib.dec_merge(place["run"], 1, place["heap"], U64, place["out"], 1) == lib.DEC_E_ARG
