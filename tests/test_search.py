"""The core's search against a slow loop over the records, and a few answers by hand."""

from __future__ import annotations

import random
import struct
from collections import Counter
from collections.abc import Iterator

import pytest
from randtrace import plan_of, random_trace
from samples import DO_NMI, IST_MC, NMI_RSP, race

from tracedbg.errors import ReplayError
from tracedbg.filter import ADDRESSES, MAX_FILTERS, Filter, Filters, Tally
from tracedbg.replay import Replay
from tracedbg.state import EventFlag, Kind, Known, Source
from tracedbg.trace import Trace
from tracedbg.writer import TraceWriter, build

TOP = 1 << 64
RECORD = struct.Struct("<5Q 3I 4H 4B")
K_RIP, K_RSP, K_ADDR, K_VALUE, K_CPU, K_ARG, K_SOURCE = 2, 4, 8, 16, 256, 2048, 4096


def slow_passes(record: bytes, f: Filter) -> bool:
    """What Filter says, of one record."""
    (_, rip, rsp, addr, value, _, code, _, cpu, _, _, known, kind, arg, source, flags) = RECORD.unpack(record)
    ok = f.kinds is None or (0 < kind <= 32 and kind in f.kinds)
    ok = ok and (f.args is None or (known & K_ARG > 0 and arg in f.args))
    ok = ok and (f.sources is None or (source if known & K_SOURCE and source < 10 else 0) in f.sources)
    ok = ok and (f.cpus is None or (known & K_CPU > 0 and cpu in f.cpus))
    ok = ok and flags & f.flags == f.flags
    if ok and f.ranges is not None:
        spans = []
        if known & f.fields & K_RIP:
            spans.append((rip, rip + 1))
        if known & f.fields & K_RSP:
            spans.append((rsp, rsp + 1))
        if known & f.fields & K_ADDR and not (kind == 1 and flags & 1):  # a failed delivery's is a number of words
            length = 1
            if kind in (4, 5) and flags & 32:
                length = code
            elif kind in (4, 5) and known & K_ARG:
                length = arg
            spans.append((addr, min(addr + max(length, 1), TOP)))
        if known & f.fields & K_VALUE and kind != 31 and not flags & 32:
            spans.append((value, value + 1))
        ok = any(lo < hi2 and lo2 < hi for lo, hi in spans for lo2, hi2 in f.ranges)
    return ok != f.invert


def slow_matches(trace: Trace, filters: Filters) -> list[int]:
    data = bytes(trace.events)
    return [n for n in range(trace.count) if all(slow_passes(data[n * 64 : n * 64 + 64], f) for f in filters)]


def noise_trace(r: random.Random) -> Trace:
    """Records in which any bit may be set, with few values so that filters meet them."""

    def fill(writer: TraceWriter) -> None:
        for _ in range(400):
            q = [r.choice((0, 7, 8, 0x1000, 0x1008, 0x2000, 1 << 40, TOP - 1, TOP - 8, r.getrandbits(64))) for _ in range(5)]
            words = (r.getrandbits(32), r.choice((0, 1, 64, 0x1000, 0xFFFFFFFF)), r.getrandbits(32))
            halves = (r.choice((0, 1, 2, 4095, 4096, 65535)), 8, 0, r.choice((0, 0x1FFF, 0xFFFF, r.getrandbits(16))))
            kind = r.choice((0, 1, 1, 1, 3, 4, 5, 31, 32, 33, 64, 65, 255))
            arg, source = r.choice((0, 1, 2, 8, 14, 63, 64, 255)), r.choice((0, 1, 2, 6, 9, 10, 33, 255))
            writer.append(RECORD.pack(*q, *words, *halves, kind, arg, source, r.choice((0, 1, 2, 32, 33, r.getrandbits(8)))))

    return build(fill, cpus=3)


def some(r: random.Random, values: list[int], most: int = 4) -> frozenset[int]:
    return frozenset(r.sample(values, min(r.randint(1, most), len(values))))


def random_filter(r: random.Random, trace: Trace) -> Filter:
    event = trace.event(r.randrange(trace.count))
    ranges = None
    if r.random() < 0.5:
        near = [event.rip, event.rsp, event.addr, event.value, 0, 8, 0x1000, TOP - 1]
        edges = sorted({max(0, min(TOP, r.choice(near) + r.randint(-9, 9))) for _ in range(2 * r.choice((1, 1, 2, 5)))})
        ranges = tuple(zip(edges[::2], edges[1::2], strict=False))
    return Filter(
        frozenset(Kind(n) for n in {int(event.kind), *some(r, list(range(1, 33)))}) if r.random() < 0.5 else None,
        frozenset({event.arg, *some(r, list(range(256)))}) if r.random() < 0.4 else None,
        frozenset(Source(n) for n in some(r, list(range(10)))) if r.random() < 0.3 else None,
        frozenset({min(event.cpu, 4095), *some(r, [0, 1, 2, 4095])}) if r.random() < 0.3 else None,
        ranges,
        r.choice((ADDRESSES, Known.RIP, Known.RSP, Known.ADDR, Known.VALUE, Known.RIP | Known.VALUE)),
        r.choice((EventFlag(0), EventFlag(0), EventFlag.FAILED, EventFlag.BYTES | EventFlag.FAILED)),
        r.random() < 0.3,
    )


def traces() -> Iterator[tuple[random.Random, Trace]]:
    for seed in range(30):
        yield random.Random(seed), random_trace(plan_of(seed))
        yield random.Random(seed), noise_trace(random.Random(seed))
    yield random.Random(0), race(40)


def test_random_filters_agree_with_a_slow_loop() -> None:
    sizes: Counter[str] = Counter()
    for r, trace in traces():
        with trace, Replay(trace) as replay:
            for _ in range(25):
                filters = tuple(random_filter(r, trace) for _ in range(r.choice((1, 1, 2, 3))))
                want = slow_matches(trace, filters)
                sizes["none" if not want else "all" if len(want) == trace.count else "some"] += 1
                got, after = replay.collect(filters, 0)
                assert (got.tolist(), after) == (want, trace.count), filters
                start = r.randrange(trace.count)
                assert replay.find_match(filters, start) == min((n for n in want if n >= start), default=None)
                assert replay.find_match(filters, start, -1) == max((n for n in want if n <= start), default=None)
    assert min(sizes[name] for name in ("none", "all", "some")) > 50


def test_collect_stops_where_it_was_told_and_goes_on_from_there() -> None:
    r = random.Random(7)
    with noise_trace(r) as trace, Replay(trace) as replay:
        filters = (Filter(kinds=frozenset({Kind.DELIVER, Kind.RETURN})),)
        want = slow_matches(trace, filters)
        assert 10 < len(want) < trace.count
        got: list[int] = []
        at = 0
        while at < trace.count:
            room, limit = r.randint(1, 5), r.randint(1, 20)
            some, after = replay.collect(filters, at, room, limit)
            assert len(some) <= room and at < after <= at + limit
            got += some
            at = after
        assert got == want
        assert replay.collect(filters, 0, 0)[1] == 0  # no room: nothing is passed over
        assert replay.collect(filters, trace.count) == (replay.collect(filters, 0, 0)[0], trace.count)


def test_a_search_looks_at_no_more_events_than_it_may() -> None:
    nmi = (Filter(kinds=frozenset({Kind.DELIVER}), args=frozenset({2})),)
    with race() as trace, Replay(trace) as replay:  # 0 NMI, 1 #MC, 2 return, 3 NMI
        assert replay.find_match(nmi, 1, 1, 2) is None
        assert replay.find_match(nmi, 1, 1, 3) == 3
        assert replay.find_match(nmi, 2, -1, 2) is None
        assert replay.find_match(nmi, 2, -1, 3) == 0
        assert replay.find_match(nmi, 0, -1, 0) is None
        assert replay.find_match(nmi, 4) is None and replay.find_match(nmi, -1) is None
        assert replay.find_match((), 2) == 2
        assert replay.position == 0 and replay.scanned == 0  # it only looks


@pytest.mark.parametrize(
    ("wanted", "events"),
    [
        (Filter(args=frozenset({18})), [1]),
        (Filter(ranges=((DO_NMI, DO_NMI + 1),)), [1, 2, 3]),  # RIP of both deliveries, target of the return
        (Filter(ranges=((DO_NMI, DO_NMI + 1),), fields=Known.ADDR), [2]),
        (Filter(ranges=((NMI_RSP, NMI_RSP + 1),), fields=Known.VALUE), [2]),
        (Filter(ranges=((IST_MC - 40, IST_MC),), fields=Known.RSP), [2]),
        (Filter(sources=frozenset({Source.NMI})), [0, 3]),
        (Filter(sources=frozenset({Source.NMI}), invert=True), [1, 2]),
        (Filter(sources=frozenset({Source.UNKNOWN})), [2]),
        (Filter(cpus=frozenset({1})), []),
        (Filter(ranges=()), []),
        (Filter(ranges=((0, TOP),)), [0, 1, 2, 3]),
    ],
)
def test_the_race(wanted: Filter, events: list[int]) -> None:
    with race() as trace, Replay(trace) as replay:
        assert replay.collect((wanted,), 0)[0].tolist() == events


@pytest.mark.parametrize(
    ("lo", "hi", "found"),
    [(0x1000, 0x1001, True), (0x1007, 0x1008, True), (0x1008, 0x1009, False), (0xFF0, 0x1000, False), (0xFF0, 0x1001, True)],
)
def test_a_write_is_found_by_each_of_its_bytes(lo: int, hi: int, found: bool) -> None:
    with build(lambda w: w.event(Kind.WRITE, cpu=0, addr=0x1000, arg=8, value=5)) as trace, Replay(trace) as replay:
        assert replay.collect((Filter(ranges=((lo, hi),)),), 0)[0].tolist() == ([0] if found else [])


def test_numbers_that_are_no_addresses_are_not_found_as_such() -> None:
    def fill(writer: TraceWriter) -> None:
        writer.event(Kind.DELIVER, cpu=0, arg=14, addr=3, flags=int(EventFlag.FAILED))
        writer.event(Kind.GAP, value=3)
        writer.event(Kind.MARK, value=3, code=1, flags=int(EventFlag.BYTES))
        writer.event(Kind.SYSCALL, cpu=0, addr=3)

    with build(fill) as trace, Replay(trace) as replay:
        assert replay.collect((Filter(ranges=((3, 4),)),), 0)[0].tolist() == [3]


@pytest.mark.parametrize("ranges", [((8, 16), (15, 20)), ((8, 16), (0, 4)), ((8, 8),), ((8, 16), (8, 16))])
def test_ranges_out_of_order_are_refused(ranges: tuple[tuple[int, int], ...]) -> None:
    with race() as trace, Replay(trace) as replay, pytest.raises(ReplayError, match="invalid argument"):
        replay.collect((Filter(ranges=ranges),), 0)


def test_as_many_filters_as_there_may_be_and_one_more() -> None:
    with race() as trace, Replay(trace) as replay:
        most = (Filter(cpus=frozenset({0})),) * MAX_FILTERS
        assert len(replay.collect(most, 0)[0]) == 4
        with pytest.raises(ReplayError, match=f"more than {MAX_FILTERS}"):
            replay.collect((*most, Filter()), 0)


def test_tally_counts_what_a_loop_counts() -> None:
    for _, trace in traces():
        events = [trace.event(n) for n in range(trace.count)]
        deliveries = [e for e in events if e.kind is Kind.DELIVER]
        want = Tally(
            len(deliveries),
            dict(Counter(e.arg for e in deliveries if e.known & Known.ARG)),
            dict(Counter(e.source if e.known & Known.SOURCE else Source.UNKNOWN for e in deliveries)),
            dict(Counter(e.cpu for e in events if e.known & Known.CPU and e.cpu < trace.cpus)),
        )
        with trace, Replay(trace) as replay:
            counting = replay.tally()
            while counting.step(97):
                pass
            assert counting.result() == want and counting.counted == trace.count
