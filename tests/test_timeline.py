"""The summary of the scan by CPU and stretches of events, against a count by hand and a slow one."""

from __future__ import annotations

import random
from typing import Any

import pytest
from randtrace import Kernel, plan_of
from samples import race

from tracedbg.errors import ReplayError
from tracedbg.replay import Replay
from tracedbg.state import Kind, Known, Source, Timeline
from tracedbg.trace import Trace
from tracedbg.writer import TraceWriter, build

Event = dict[str, Any]


def slow(trace: Trace, cpu: int | None, first: int, count: int, buckets: int, width: int) -> Timeline:
    """Count by seeking to each position; what lies in a cell of `width` events stands at the cell's beginning."""
    deliveries, findings, gaps, depths = ([0] * buckets for _ in range(4))
    wanted = range(trace.cpus) if cpu is None else (cpu,)
    if not count:
        return Timeline(width, (), (), (), ())

    def bucket(event: int) -> int:
        return (max(event // width * width, first) - first) * buckets // count

    def inside(event: int) -> bool:
        """In a cell of which the stretch has an event."""
        return first // width * width <= event < -(-(first + count) // width) * width

    with Replay(trace) as replay:
        replay.scan_all()
        found = [(f.event, f.cpu) for f in replay.findings()]
        cells: dict[int, int] = {}
        for index in range(trace.count):
            replay.seek(index + 1)
            frames = replay.frames()
            cell = index // width
            cells[cell] = max(cells.get(cell, 0), *(sum(f.cpu == c for f in frames) for c in wanted))
            event = trace.event(index)
            known = bool(event.known & Known.CPU)
            if not inside(index) or (known and event.cpu not in wanted):
                continue
            deliveries[bucket(index)] += event.kind is Kind.DELIVER and known
            gaps[bucket(index)] += event.kind is Kind.GAP
        for index, of in found:
            if inside(index) and (of in wanted or of >= trace.cpus):
                findings[bucket(index)] += 1
    for index in range(first, first + count):
        n = (index - first) * buckets // count
        depths[n] = max(depths[n], cells[index // width])
    return Timeline(width, tuple(deliveries), tuple(findings), tuple(gaps), tuple(depths))


def scanned(trace: Trace) -> Replay:
    replay = Replay(trace)
    replay.scan_all()
    return replay


def test_the_race_event_by_event() -> None:
    """NMI, #MC, its IRET, an NMI over the first: two frames are open again, of which the first is lost."""
    with race() as trace, scanned(trace) as replay:
        assert replay.timeline(0, 4) == Timeline(1, (1, 1, 0, 1), (0, 0, 1, 1), (0,) * 4, (1, 2, 1, 2))
        assert replay.timeline(0, 2) == Timeline(1, (2, 1), (0, 2), (0, 0), (2, 2))
        assert replay.timeline(None, 1, 2, 1) == Timeline(1, (0,), (1,), (0,), (1,))


def test_nothing_is_told_beyond_the_scan() -> None:
    with race() as trace, Replay(trace) as replay:
        assert replay.timeline(0, 4) == Timeline(1, *((0,) * 4,) * 4)
        replay.scan(2)
        assert replay.timeline(0, 4) == Timeline(1, (1, 1, 0, 0), (0,) * 4, (0,) * 4, (1, 2, 0, 0))


def test_a_cpu_without_events_keeps_its_depth() -> None:
    def fill(writer: TraceWriter) -> None:
        at = {"rip": 0x1000, "rsp": 0x8000, "cs": 8, "ss": 0, "rflags": 2}
        writer.event(Kind.DELIVER, cpu=1, arg=2, source=Source.NMI, **at)
        for _ in range(5):
            writer.event(Kind.MARK, cpu=0)
        writer.event(Kind.GAP, cpu=1, value=1)
        writer.event(Kind.MARK, cpu=0)

    with race() as sample:
        layout = sample.layout

    def whole(writer: TraceWriter) -> None:
        from dataclasses import replace

        writer.layout = replace(layout, cpus=layout.cpus * 2)
        fill(writer)

    with build(whole, cpus=2) as trace, scanned(trace) as replay:
        assert replay.timeline(1, 4).depths == (1, 1, 1, 0)  # the gap ends what is known
        assert replay.timeline(0, 4).depths == (0, 0, 0, 0)
        assert replay.timeline(None, 4).depths == (1, 1, 1, 0)
        assert replay.timeline(1, 4).gaps == (0, 0, 0, 1)
        assert replay.timeline(0, 4).gaps == (0, 0, 0, 0)


def test_a_gap_of_no_cpu_counts_for_each_and_once_for_all() -> None:
    with build(lambda w: w.event(Kind.GAP, value=9), cpus=3) as trace, scanned(trace) as replay:
        for cpu in (0, 1, 2, None):
            line = replay.timeline(cpu, 1)
            assert (line.gaps, line.findings) == ((1,), (1,))


@pytest.mark.parametrize("seed", range(12))
def test_agrees_with_a_slow_count(seed: int) -> None:
    kernel = Kernel(plan_of(seed))
    pick = random.Random(seed)
    with build(kernel.fill, cpus=kernel.world.cpu_count) as trace, scanned(trace) as replay:
        for cpu in (None, *range(trace.cpus)):
            first = pick.choice((0, pick.randrange(trace.count)))
            count = pick.choice((trace.count - first, pick.randint(1, trace.count - first)))
            buckets = pick.choice((1, count, pick.randint(1, count)))
            assert replay.timeline(cpu, buckets, first, count) == slow(trace, cpu, first, count, buckets, 1)


def test_cells_are_merged_when_the_trace_is_longer(seed: int = 7) -> None:
    kernel = Kernel(plan_of(seed))

    def fill(writer: TraceWriter) -> None:
        while writer.count < 5000:
            kernel.fill(writer)

    with build(fill, cpus=kernel.world.cpu_count) as trace, scanned(trace) as replay:
        assert trace.count > 4096
        for cpu, buckets, first, count in (
            (None, 100, 0, trace.count), (0, 313, 0, trace.count), (0, 7, 1001, 2002), (None, 9, 4001, 9), (0, 3, 2047, 3)
        ):  # fmt: skip
            assert replay.timeline(cpu, buckets, first, count) == slow(trace, cpu, first, count, buckets, 4)


def test_many_cpus_have_fewer_cells() -> None:
    def fill(writer: TraceWriter) -> None:
        for n in range(300):
            writer.event(Kind.MARK, cpu=n)

    with build(fill, cpus=4096) as trace, scanned(trace) as replay:
        assert replay.timeline(None, 1).width == 8  # 64 cells of 8 hold 512 events, of 4 only 256


@pytest.mark.parametrize(
    ("cpu", "buckets", "first", "count", "why"),
    [
        (0, 0, 0, 4, "argument"), (0, 5, 0, 4, "argument"), (0, 1, 0, 0, "argument"),
        (1, 1, 0, 4, "outside"), (None, 1, 0, 5, "outside"), (0, 1, 4, 1, "outside"), (0, 1, 5, 1, "outside"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked(cpu: int | None, buckets: int, first: int, count: int, why: str) -> None:
    with race() as trace, scanned(trace) as replay, pytest.raises(ReplayError, match=why):
        replay.timeline(cpu, buckets, first, count)
