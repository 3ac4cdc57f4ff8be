"""The life of every frame, as the forward pass tells it: beside the slow model, beside the view at every position, by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from model import Model
from model_state import ModelFrame
from randtrace import plan_of, random_trace
from samples import IST_NMI, OUTER, race

from tracedbg import wire
from tracedbg.errors import ReplayError
from tracedbg.export.lives import CHUNK, Life, lives
from tracedbg.formats import open_input
from tracedbg.replay import Replay
from tracedbg.state import Frame, FrameStatus, Kind, Settle
from tracedbg.trace import Trace

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "traces").glob("*.tdbg"), *(ROOT / "tests" / "cases").glob("*.case")])
PLANS = 300


def silent(done: int, total: int) -> None:
    assert 0 < done <= total


def told(trace: Trace, **options: Any) -> list[Life]:
    with Replay(trace, **options) as replay:
        return list(lives(replay, silent))


class Watched(Model):
    """The slow model, with a list of the frames that it closes."""

    def __init__(self, trace: Trace, **options: Any) -> None:
        self.ends: list[tuple[int, int, Settle]] = []  # entry, event, why
        self.now = 0
        super().__init__(trace, **options)

    def apply(self, index: int) -> None:
        self.now = index
        super().apply(index)

    def close(self, frame: ModelFrame, why: Settle) -> None:
        self.ends.append((frame.entry, self.now, why))
        super().close(frame, why)


def seen(trace: Trace, **options: Any) -> tuple[dict[int, Frame], dict[int, int], dict[int, int], dict[int, Frame]]:
    """By delivery of a frame: the frame when it is first seen, its end, who is first seen to have stored over it, and the
    frame when it is last seen, looking at the view behind every event."""
    opened: dict[int, Frame] = {}
    ends: dict[int, int] = {}
    over: dict[int, int] = {}
    before: dict[int, Frame] = {}
    last: dict[int, Frame] = {}
    with Replay(trace, **options) as replay:
        for index in range(trace.count):
            replay.seek(index + 1)
            after = {f.entry: f for f in replay.frames()}
            ends.update((entry, index) for entry in before if entry not in after)
            opened.update((entry, f) for entry, f in after.items() if entry not in opened)
            for entry, f in after.items():
                if f.clobbered_by is not None:
                    over.setdefault(entry, f.clobbered_by)
            last.update(after)
            before = after
    return opened, ends, over, last


def check(trace: Trace, **options: Any) -> list[Life]:
    """Everything that can be checked of one trace."""
    found = told(trace, **options)
    opened, ends, over, last = seen(trace, **options)
    by_entry = {life.frame.entry: life for life in found}
    assert len(by_entry) == len(found) and by_entry.keys() == opened.keys()
    for entry, life in by_entry.items():
        assert life.frame == opened[entry]
        assert life.end == ends.get(entry)
        assert (life.end is None) == (life.settle is None)
        if life.overwritten != over.get(entry):  # stored over and ended by one event: no position shows it
            assert entry not in over and life.overwritten == life.end
            assert life.settle in (Settle.OVERWRITTEN, Settle.DROPPED)
        elif life.status != last[entry].status or life.finding != last[entry].finding:
            assert life.overwritten == over[entry] and life.end is not None  # the same, once more
    ended = [life.end for life in found if life.end is not None]
    still = [life.frame.entry for life in found if life.end is None]
    assert ended == sorted(ended) and still == sorted(still)
    assert [life.end for life in found] == [*ended, *(None for _ in still)]
    return found


def compare(trace: Trace, found: list[Life], **options: Any) -> None:
    """With what the model closes, at which events, for which reasons."""
    model = Watched(trace, **options).run(trace.count)
    assert isinstance(model, Watched)
    mine = [(life.frame.entry, life.end, life.settle) for life in found if life.end is not None]
    assert sorted(mine, key=str) == sorted(model.ends, key=str)
    assert [life.frame.entry for life in found if life.end is None] == [f.entry for f in model.frames]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_lives_are_what_the_positions_show(path: Path) -> None:
    with open_input(str(path)) as trace:
        found = check(trace)
        compare(trace, found)
        if trace.count:
            check(trace, snapshot_interval=1, max_frames=3)


def randoms() -> Iterator[tuple[int, Trace]]:
    for seed in range(PLANS):
        with random_trace(plan_of(seed)) as trace:
            yield seed, trace


def test_lives_of_random_traces() -> None:
    reasons: Counter[Settle | None] = Counter()
    statuses: Counter[FrameStatus] = Counter()
    same = open_over = at_once = 0
    for seed, trace in randoms():
        options = {"max_frames": 5} if seed % 3 == 0 else {}
        found = check(trace, **options)
        compare(trace, found, **options)
        reasons.update(life.settle for life in found)
        statuses.update(life.status for life in found)
        same += sum(life.overwritten is not None and life.status is FrameStatus.LIVE for life in found)
        open_over += sum(life.overwritten is not None and life.end is None for life in found)
        at_once += sum(life.overwritten is not None and life.overwritten == life.end for life in found)
    assert set(reasons) == {None, *Settle}, reasons
    assert set(statuses) == set(FrameStatus) and min(statuses.values()) > 10, statuses
    assert min(same, open_over, at_once) > 2


def test_the_race_in_numbers() -> None:
    with race() as trace:
        machine_check, first, second = told(trace)
    assert (machine_check.frame.entry, machine_check.end, machine_check.settle) == (1, 2, Settle.RETURN)
    assert machine_check.overwritten is machine_check.finding is None
    assert (first.frame.entry, first.end, first.settle, first.overwritten) == (0, None, None, 3)
    assert (first.status, first.finding) == (FrameStatus.CLOBBERED, 1)  # 0: the window
    # As it was stored, not as it is now.
    assert first.frame.saved == OUTER and first.frame.status is FrameStatus.LIVE and first.frame.clobbered_by is None
    assert (first.frame.lo, first.frame.hi, first.frame.ist) == (IST_NMI - 40, IST_NMI, 2)
    assert (second.frame.entry, second.frame.victim, second.end, second.overwritten) == (3, 0, None, None)
    with race(2) as trace:
        # The second NMI's IRET, then one more, for which the overwritten frame is the only one left there.
        assert [(x.frame.entry, x.end, x.settle) for x in told(trace)] == [
            (1, 2, Settle.RETURN), (3, 4, Settle.RETURN), (0, 5, Settle.RETURN),
        ]  # fmt: skip


def test_findings_are_there_when_the_last_life_was_taken() -> None:
    with race(2) as trace, Replay(trace) as replay, Replay(trace) as other:
        assert len(list(lives(replay, silent))) == 3 and replay.scanned == trace.count
        other.scan_all()
        assert replay.findings() == other.findings() and replay.stats() == other.stats() and replay.findings()


def test_only_a_fresh_replay_tells_lives() -> None:
    with race() as trace, Replay(trace) as replay:
        replay.scan(1)
        with pytest.raises(ReplayError, match="which has begun"):
            next(lives(replay, silent))


def test_the_view_adds_nothing_to_the_journal() -> None:
    with race(2) as trace, Replay(trace, snapshot_interval=1) as replay:
        replay.journal(True)
        replay.seek(trace.count)  # makes the scan
        assert [life.frame.entry for life in replay.ended()] == [1, 3, 0]
        for position in (0, 3, trace.count, 1, trace.count):
            replay.seek(position)
        assert len(replay.ended()) == 0 and len(replay.unended()) == 0
        replay.journal(False)
        assert len(replay.ended()) == 0


def test_a_journal_that_nobody_asked_for_stays_empty() -> None:
    with race(2) as trace, Replay(trace) as replay:
        replay.scan_all()
        assert len(replay.ended()) == 0
        replay.journal(True)  # from here on
        assert len(replay.ended()) == 0


def test_lives_that_are_given_up_leave_no_journal() -> None:
    with race(2) as trace:
        replay = Replay(trace)
        some = lives(replay, silent)
        next(some)
        replay.close()
        some.close()  # the journal went with the replay


def test_columns_are_the_same_frames() -> None:
    for seed in range(20):
        with random_trace(plan_of(seed)) as trace, Replay(trace) as replay:
            replay.journal(True)
            replay.scan_all()
            batch = replay.ended()
            all_of = list(batch)
            assert len(batch) == len(all_of)
            assert list(batch.column("frame.entry")) == [x.frame.entry for x in all_of]
            assert list(batch.column("frame.hi")) == [x.frame.hi for x in all_of]
            assert list(batch.column("end")) == [x.end for x in all_of]
            assert list(batch.column("settle")) == [x.settle for x in all_of]
            rips = zip(batch.column("frame.saved.rip"), batch.column("frame.saved.known"), strict=True)
            assert [rip if known & 2 else None for rip, known in rips] == [x.frame.saved.rip for x in all_of]


def test_memory_stays_bounded_however_long_the_trace() -> None:
    """The journal of a stretch is let go before the next: what is kept does not grow with the trace."""

    def fill(events: int) -> Trace:
        record = wire.EVENT_PACK.pack(0, 1, 0x9000, 0, 0, 0, 0, 0, 0, 8, 16, 0x1F46, Kind.DELIVER, 32, 5, 0)
        from tracedbg.layout import CpuTables, Gate, Idt, Layout
        from tracedbg.writer import TraceWriter, build

        def write(writer: TraceWriter) -> None:
            writer.layout = Layout(idts=(Idt(0x6000, {32: Gate(0x100, 8, 0)}),), cpus=(CpuTables(None, 0),))
            writer.append(record * events)

        return build(write)

    with fill(3 * CHUNK) as trace, Replay(trace) as replay:
        steps = []
        replay.journal(True)
        while replay.scan(CHUNK):
            steps.append(len(replay.ended()))
        # Each delivery interrupts the same place: the frame of the one before it was popped.
        assert steps == [CHUNK - 1, CHUNK, CHUNK] and len(replay.unended()) == 1
