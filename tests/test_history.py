"""Who touched these bytes, when did this frame end: the core's walk over a trace beside the slow model's."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
from model import Model, decode
from randtrace import Kernel, assembled, plan_of
from samples import DO_NMI, IST_MC, IST_NMI, race

from tracedbg import wire
from tracedbg.errors import ReplayError
from tracedbg.replay import Replay
from tracedbg.state import EventFlag, FrameStatus, Hit, Kind, Known, Source, Touch
from tracedbg.trace import Trace
from tracedbg.writer import TraceWriter, build

BYTES = Touch.WRITE | Touch.READ | Touch.POP | Touch.COPY
PLANS = 250
TOP = 1 << 64

Spans = list[tuple[int, int]]


def loads(model: Model, index: int) -> tuple[Touch, range]:
    """What an event takes from memory, in the state before it, as tdb.h says."""
    nothing = Touch(0), range(0)
    event = decode(model.trace, index)
    if event.cpu is None or event.cpu >= len(model.cpus):
        return nothing
    if event.kind == Kind.READ and event.addr is not None:
        length = event.code if event.flags & EventFlag.BYTES else event.arg
        return Touch.READ, range(event.addr, min(event.addr + (length or 0), TOP))
    if event.kind == Kind.RETURN and event.rsp is not None:
        unseen = EventFlag.FAULTED | EventFlag.LEGACY | EventFlag.SMM
        if event.flags & unseen or model.cpus[event.cpu].smm or event.rsp > TOP - 65:
            return nothing
        lo = event.rsp + (8 if event.arg in (1, 2) else 0)
        return Touch.POP, range(lo, lo + 40)
    if event.kind == Kind.MOVE:
        live = (f for f in reversed(model.frames) if f.cpu == event.cpu and f.status is FrameStatus.LIVE)
        for frame in live:
            if event.addr in (frame.lo, frame.rip_addr):
                return Touch.COPY, range(event.addr or 0, frame.hi)
    return nothing


def value_at(model: Model, lo: int) -> tuple[int, int]:
    """The known bytes of [lo, lo + 8) and which they are."""
    cells = [model.memory.get((lo + n) % TOP, (None, None))[0] for n in range(8)]
    return sum((byte or 0) << 8 * n for n, byte in enumerate(cells)), sum((byte is not None) << n for n, byte in enumerate(cells))


def slow_walk(trace: Trace, spans: Spans) -> tuple[dict[tuple[int, int], list[Hit]], dict[int, int | None]]:
    """By span all events that touch it; by delivery of a frame the event that ended it (None: nothing did)."""
    model = Model(trace)
    hits: dict[tuple[int, int], list[Hit]] = {span: [] for span in spans}
    ends: dict[int, int | None] = {}
    for index in range(trace.count):
        touch, taken = loads(model, index)
        before = {f.entry for f in model.frames}
        model.apply(index)
        after = {f.entry for f in model.frames}
        ends.update(dict.fromkeys(before - after, index))
        ends.update(dict.fromkeys(after - before))
        for lo, hi in spans:
            found = touch if len(taken) and taken.start < hi and lo < taken.stop else Touch(0)
            if any(model.memory.get(a, (None, None))[1] == index for a in range(lo, hi)):
                found |= Touch.WRITE
            if found:
                hits[lo, hi].append(Hit(index, found, *value_at(model, lo)))
    return hits, ends


def some_spans(trace: Trace, r: random.Random) -> Spans:
    """Frames of a trace, words and bytes of them, and a piece that crosses pages."""
    frames = list(Model(trace).run(trace.count).frames)
    model = Model(trace)
    for index in range(trace.count):
        model.apply(index)
        if r.random() < 0.1:
            frames += model.frames[-1:]
    spans: Spans = []
    for frame in r.sample(frames, min(len(frames), 4)):
        at = r.randrange(frame.lo, frame.hi)
        page = (frame.hi & ~0xFFF) or 0x1000
        spans += [(frame.lo, frame.hi), (at & ~7, (at & ~7) + 8), (at, at + 1), (page - 24, page + 24)]
    return list(dict.fromkeys(spans)) or [(0x1000, 0x1008)]


def with_reads(kernel: Kernel, r: random.Random) -> tuple[Trace, Spans]:
    """The trace of a kernel with loads near what is watched, some of them damaged: random traces have few."""
    with assembled(kernel) as trace:
        spans = some_spans(trace, r)
    records = list(kernel.records)
    whole = Known.CPU | Known.ADDR | Known.ARG | Known.CODE
    for _ in range(len(records) // 10):
        addr = r.choice(r.choice(spans)) + r.randrange(-40, 9)
        flags = r.choice((0, 0, EventFlag.BYTES))
        cpu = r.choice((0, 0, 0, 0, 99))
        known = whole & ~r.choice((Known(0), Known(0), Known.CPU, Known.ADDR, Known.ARG, Known.CODE))
        record = (0, 0, 0, addr, 0, 0, r.choice((0, 8, 64)), 0, cpu, 0, 0, known, Kind.READ, r.choice((1, 2, 4, 8)), 0, flags)
        records.insert(r.randrange(len(records) + 1), wire.EVENT_PACK.pack(*record))
    return assembled(kernel, records), spans


def watched(replay: Replay, r: random.Random, touch: Touch, lo: int = 0, hi: int = 0, frame: int = 0) -> list[Hit]:
    """What the core tells from its view's position on, asked for in pieces of random size."""
    result: list[Hit] = []
    while replay.position < replay.count:
        result += replay.watch(touch, lo, hi, frame, room=r.choice((1, 3, 64)), limit=r.choice((1, 2, 17, 1 << 20)))
        if result and result[-1].touch & Touch.END:
            break
    return result


def test_touches_and_ends_are_those_of_the_model() -> None:
    seen: Counter[Touch] = Counter()
    ended = still_open = 0
    for seed in range(PLANS):
        r = random.Random(seed)
        trace, spans = with_reads(Kernel(plan_of(seed)), r)
        with trace:
            hits, ends = slow_walk(trace, spans)
            with Replay(trace, snapshot_interval=r.choice((0, 1, 7))) as replay:
                if r.random() < 0.5:  # else the walk itself makes the scan
                    replay.scan_all()
                for span in spans:
                    start = r.choice((0, r.randrange(trace.count)))
                    only = r.choice((BYTES, Touch.WRITE, Touch.READ | Touch.POP, Touch.COPY))
                    expected = [Hit(h.event, h.touch & only, h.value, h.known) for h in hits[span] if h.touch & only]
                    replay.seek(start)
                    assert watched(replay, r, only, *span) == [h for h in expected if h.event >= start], f"seed {seed}, {span}"
                    seen.update(bit for h in expected for bit in Touch if h.touch & bit)
                for entry in r.sample(sorted(ends), min(len(ends), 5)):
                    replay.seek(entry + 1)
                    found = watched(replay, r, Touch.END, frame=entry)
                    assert [h.event for h in found] == ([] if ends[entry] is None else [ends[entry]]), f"seed {seed}, {entry}"
                    ended += bool(found)
                    still_open += not found
                # The walk leaves the state that seeking leaves.
                position, digest = replay.position, replay.digest()
                replay.seek(0)
                replay.seek(position)
                assert replay.digest() == digest
    assert set(seen) == {Touch.WRITE, Touch.READ, Touch.POP, Touch.COPY} and min(seen.values()) > 20, seen
    assert ended > 100 and still_open > 20


def test_the_race_in_numbers() -> None:
    with race(2) as trace, Replay(trace) as replay:
        rip = IST_NMI - 40
        assert [(h.event, h.touch) for h in replay.watch(BYTES, rip, rip + 8, room=9)] == [
            (0, Touch.WRITE), (3, Touch.WRITE), (4, Touch.POP), (5, Touch.POP),
        ]  # fmt: skip
        replay.seek(0)
        (first,) = replay.watch(Touch.WRITE, rip, rip + 1)
        assert first.event == 0 and replay.position == 1
        assert replay.watch(Touch.WRITE, rip, rip + 1)[0].value == DO_NMI
        replay.seek(2)
        (end,) = replay.watch(Touch.END, frame=1, room=9)
        assert (end.event, end.touch, replay.position) == (2, Touch.END, 3)
        replay.seek(1)
        assert [h.event for h in replay.watch(BYTES | Touch.END, IST_NMI - 40, IST_NMI, 0, room=9)] == [3, 4, 5]
        replay.seek(0)
        assert [h.event for h in replay.watch(Touch.WRITE, IST_MC - 8, IST_MC, room=9)] == [1]


def test_what_cannot_be_watched_is_refused() -> None:
    with race() as trace, Replay(trace) as replay:
        bad: tuple[Callable[[], object], ...] = (
            lambda: replay.watch(Touch(0), 0, 8),
            lambda: replay.watch(Touch.WRITE, 8, 8),
            lambda: replay.watch(Touch.WRITE, 0, 65537),
            lambda: replay.watch(Touch.END, frame=0),  # not delivered yet
            lambda: replay.watch(Touch.END, frame=2),  # no delivery
        )
        for call in bad:
            with pytest.raises(ReplayError, match="invalid argument"):
                call()
        assert replay.watch(Touch.WRITE, 0, 65536) == () and replay.position == trace.count
        assert replay.watch(Touch.WRITE, IST_NMI - 8, IST_NMI) == ()  # nothing is left to look at


def test_the_last_byte_of_the_address_space() -> None:
    def fill(writer: TraceWriter) -> None:
        writer.event(Kind.WRITE, cpu=0, addr=TOP - 8, arg=8, value=1)
        writer.event(Kind.READ, cpu=0, addr=TOP - 4, arg=8)
        writer.event(Kind.READ, cpu=0, addr=0, arg=8)
        writer.event(Kind.READ, cpu=0, addr=TOP - 9, arg=1)
        writer.event(Kind.READ, cpu=0, addr=TOP - 1, arg=0)
        writer.event(Kind.RETURN, cpu=0, rsp=TOP - 8)

    with build(fill) as trace, Replay(trace) as replay:
        assert [h.event for h in replay.watch(BYTES, TOP - 8, TOP - 1, room=9)] == [0, 1]


def test_find_time_takes_known_times_in_the_order_of_the_trace() -> None:
    def fill(writer: TraceWriter) -> None:
        for time in (100, 300, None, 200, 400):
            known = {} if time is None else {"time": time}
            writer.event(Kind.DELIVER, cpu=0, arg=32, source=Source.FIXED, **known)

    with build(fill) as trace, Replay(trace) as replay:
        assert not trace.event(2).known & Known.TIME
        assert [replay.find_time(t) for t in (0, 100, 101, 300, 301, 401)] == [0, 0, 1, 1, 4, None]
        assert replay.find_time(150, 2) == 3
        assert replay.find_time(301, 0, 4) is None and replay.find_time(301, 1, 4) == 4
        assert replay.find_time(-1) == 0 and replay.find_time(1 << 64) is None and replay.find_time(0, 5) is None
