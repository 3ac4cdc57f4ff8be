"""The session thread: the newest wish wins, the scan goes on, the end is clean."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from samples import STATS, race

from tracedbg.filter import Filter
from tracedbg.replay import Replay
from tracedbg.state import Finding, Kind, Position, Stats, Word
from tracedbg.tui.session import Failed, Found, Match, Progress, Seek, Session, SourceSearch, View


class SlowReplay:
    """A trace of which an event takes a microsecond; notes where it went."""

    count = 1_000_000

    def __init__(self) -> None:
        self.scanned = 0
        self.position = 0
        self.closed = False
        self.seeks: list[int] = []

    def _work(self, events: int) -> None:
        time.sleep(events * 1e-6)

    def scan(self, max_events: int) -> int:
        taken = min(max_events, self.count - self.scanned)
        self._work(taken)
        self.scanned += taken
        return taken

    def seek_some(self, position: int, max_events: int) -> int:
        if not self.seeks or self.seeks[-1] != position:
            self.seeks.append(position)
        if position < self.position:
            self.position = 0
        step = min(max_events, position - self.position)
        self._work(step)
        self.position += step
        return position - self.position

    def state(self) -> Position:
        return Position(self.position, (), (), (), 0)

    def words(self, lo: int, hi: int) -> tuple[Word, ...]:
        return ()

    def findings(self, first: int = 0) -> tuple[Finding, ...]:
        return ()

    def stats(self) -> Stats:
        return STATS


@contextmanager
def running(replay: Any, events: Any = b"") -> Any:
    """A session of a replay, and what it posts."""
    posted: list[Any] = []

    @contextmanager
    def opened() -> Any:
        yield replay
        replay.closed = True

    session = Session(opened, events, posted.append)
    session.start()
    try:
        yield SimpleNamespace(session=session, posted=posted)
    finally:
        session.stop()
        assert not session.is_alive()
        assert replay.closed


def views(posted: list[Any]) -> list[int]:
    return [r.state.position for r in posted if isinstance(r, View)]


def test_newest_wish_wins() -> None:
    replay = SlowReplay()
    with running(replay) as run:
        for position in (900_000, 800_000, 5):
            run.session.wish(Seek(position, 0))
            time.sleep(0.02)
        while not views(run.posted):
            time.sleep(0.001)
        assert views(run.posted) == [5]


def test_a_wish_is_answered_while_the_scan_runs() -> None:
    replay = SlowReplay()
    with running(replay) as run:
        time.sleep(0.03)
        began = time.perf_counter()
        run.session.wish(Seek(1, 0))
        while not views(run.posted):
            time.sleep(0.001)
        assert time.perf_counter() - began < 0.3
        assert 0 < replay.scanned < replay.count


def test_idle_is_set_when_all_is_scanned_and_answered() -> None:
    with running(SlowReplay()) as run:
        assert run.session.idle.wait(10)
        progress = [r for r in run.posted if isinstance(r, Progress)]
        assert progress[-1].done and progress[-1].scanned == SlowReplay.count
        assert [p.scanned for p in progress] == sorted(p.scanned for p in progress)
        run.session.wish(Seek(7, 0))
        assert not run.session.idle.is_set() or views(run.posted)
        assert run.session.idle.wait(10)
        assert views(run.posted) == [7]


def test_stop_does_not_wait_for_a_long_way() -> None:
    with running(SlowReplay()) as run:
        run.session.wish(Seek(1_000_000, 0))
        time.sleep(0.02)
        began = time.perf_counter()
        run.session.stop()
        assert time.perf_counter() - began < 0.3


def test_an_error_of_the_replay_is_posted() -> None:
    replay = SlowReplay()
    replay.scan = lambda max_events: 1 // 0  # type: ignore[method-assign]
    posted: list[Any] = []

    @contextmanager
    def opened() -> Any:
        yield replay

    session = Session(opened, b"", posted.append)
    session.start()
    session.join(10)
    assert isinstance(posted[-1], Failed) and isinstance(posted[-1].error, ZeroDivisionError)
    session.wish(Seek(1, 0))  # nobody is there to answer, and nobody may wait for it
    assert session.idle.is_set()


def test_real_replay_gives_the_words_before_and_after() -> None:
    with race(6) as trace:
        posted: list[Any] = []
        session = Session(lambda: Replay(trace), trace.events, posted.append)
        session.start()
        try:
            session.wish(Seek(4, 0))
            assert session.idle.wait(10)
            view = next(r for r in posted if isinstance(r, View))
            stack = next(s for s in view.stacks if s.stack.slot == 2)
            assert [w.value for w in stack.words] != [w.value for w in stack.before]
            assert {w.writers[0] for w in stack.words} == {3} and {w.writers[0] for w in stack.before} == {0}
            assert [f.event for f in view.victims] == [3]
            session.wish(SourceSearch(570))
            assert session.idle.wait(10)
            assert posted[-1] == Found(SourceSearch(570), 1)
            session.wish(SourceSearch(0))  # RETURNs have no number, though the field holds 0
            assert session.idle.wait(10)
            assert posted[-1].index is None
            wish = Match(2, -1, "x", (Filter(kinds=frozenset({Kind.DELIVER}), args=frozenset({18})),))
            session.wish(wish)
            assert session.idle.wait(10)
            assert posted[-1] == Found(wish, 1)
        finally:
            session.stop()
    assert "session" not in {t.name for t in threading.enumerate()}
