"""The thread that owns the Replay: it answers the newest wish of the screen, and goes on with the forward pass between wishes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

from tracedbg.state import Finding, Kind, Known, Position, Rule, Stack, Stats, Word

SLICE = 0.005  # seconds of work between two looks at the mailbox: a new wish waits no longer than that
REPORT = 0.05  # seconds between two reports of progress
SEARCH_STEP = 1 << 18  # events looked at in one call of find()
MAX_STACK = 1 << 16  # bytes of one stack that a view shows
MAX_VICTIMS = 512  # overwritten frames that a view looks up, newest first


class ReplayLike(Protocol):
    """What the viewer asks of replay.Replay."""

    @property
    def count(self) -> int: ...
    @property
    def scanned(self) -> int: ...
    @property
    def position(self) -> int: ...
    def scan(self, max_events: int) -> int: ...
    def seek_some(self, position: int, max_events: int) -> int: ...
    def state(self) -> Position: ...
    def words(self, lo: int, hi: int) -> tuple[Word, ...]: ...
    def findings(self, first: int = 0) -> tuple[Finding, ...]: ...
    def stats(self) -> Stats: ...
    def find(
        self,
        start: int,
        direction: int = ...,
        kinds: Iterable[Kind] = ...,
        vector: int | None = ...,
        cpu: int | None = ...,
        limit: int = ...,
    ) -> int | None: ...


OpenReplay = Callable[[], AbstractContextManager[ReplayLike]]


@dataclass(frozen=True, slots=True)
class StackWords:
    """A stack and its known words, by address, at a position and one event before it."""

    stack: Stack
    words: tuple[Word, ...]
    before: tuple[Word, ...]


@dataclass(frozen=True, slots=True)
class View:
    """Everything the screen shows of one position. `victims`: findings raised so far whose bytes lie on these stacks."""

    state: Position
    cpu: int
    stacks: tuple[StackWords, ...]
    victims: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class Seek:
    """Wish: the view of a position, with the stacks of one CPU."""

    position: int
    cpu: int


@dataclass(frozen=True, slots=True)
class Search:
    """Wish: the nearest event from `start` on in one direction. `what` words it for the user."""

    start: int
    direction: int
    what: str
    kinds: tuple[Kind, ...] = ()
    vector: int | None = None
    cpu: int | None = None


@dataclass(frozen=True, slots=True)
class SourceSearch:
    """Wish: the event that the source itself gave this number."""

    number: int


Wish = Seek | Search | SourceSearch


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the forward pass is; `findings` replace those from number `first` on."""

    scanned: int
    count: int
    first: int
    findings: tuple[Finding, ...]
    done: bool
    stats: Stats | None = None  # once done


@dataclass(frozen=True, slots=True)
class Found:
    """Answer to a search; `index` None: nothing there."""

    wish: Search | SourceSearch
    index: int | None


@dataclass(frozen=True, slots=True)
class Failed:
    """The session ended with an error."""

    error: Exception


Report = View | Progress | Found | Failed


class Pace:
    """Finds the number of events that take about SLICE seconds."""

    def __init__(self, events: int = 4096) -> None:
        self.events = events

    def took(self, seconds: float) -> None:
        if seconds < SLICE / 2:
            self.events = min(self.events * 2, 1 << 22)
        elif seconds > SLICE * 2:
            self.events = max(self.events // 2, 64)


class Session(threading.Thread):
    """Owns a Replay from open to close. `post` is called from this thread and must be thread-safe.

    A newer wish replaces an older one, also one under way. `idle` is set while no wish is open and the scan is complete.
    """

    def __init__(self, open_replay: OpenReplay, events: Any, post: Callable[[Report], None]) -> None:
        super().__init__(name="session", daemon=True)
        self.idle = threading.Event()
        self._open = open_replay
        self._events = events  # memory view of the records, for searches that the core does not offer
        self._post = post
        self._changed = threading.Condition()
        self._wish: Wish | None = None
        self._stopping = False
        self._ended = False
        self._scan_pace = Pace()
        self._seek_pace = Pace()
        self._findings: list[Finding] = []
        self._done = False
        self._reported = 0.0
        self._unreported = 0

    # -- called by the user interface ---------------------------------------------------------------------------------

    def wish(self, wish: Wish) -> None:
        """Ask for something; forgets what was asked before."""
        with self._changed:
            if not self._ended:
                self.idle.clear()
                self._wish = wish
                self._changed.notify()

    def stop(self) -> None:
        """End the thread and wait until the Replay is closed."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self.is_alive():
            self.join()

    # -- the thread ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        try:
            with self._open() as replay:
                self._loop(replay)
        except Exception as error:  # whatever it was, the thread that has a screen must tell it
            self._post(Failed(error))
        finally:
            with self._changed:
                self._ended = True
                self.idle.set()

    def _loop(self, replay: ReplayLike) -> None:
        while True:
            with self._changed:
                if self._stopping:
                    return
                wish, self._wish = self._wish, None
                if wish is None and self._done:
                    self.idle.set()
                    self._changed.wait()
                    continue
            if wish is not None:
                self._answer(replay, wish)
            if not self._done:
                self._scan(replay)

    def _abandoned(self) -> bool:
        return self._wish is not None or self._stopping

    def _scan(self, replay: ReplayLike) -> None:
        began = perf_counter()
        self._done = replay.scan(self._scan_pace.events) == 0
        self._scan_pace.took(perf_counter() - began)
        if self._done:
            # Settled findings have changed since they were raised: only now they say the final word.
            self._findings.clear()
            self._unreported = 0
        self._tell(replay)

    def _tell(self, replay: ReplayLike) -> None:
        """Report how far the forward pass is, but not too often."""
        now = perf_counter()
        if not self._done and now - self._reported < REPORT:
            return
        self._findings += replay.findings(len(self._findings))
        first, self._unreported = self._unreported, len(self._findings)
        self._reported = now
        stats = replay.stats() if self._done else None
        self._post(Progress(replay.scanned, replay.count, first, tuple(self._findings[first:]), self._done, stats))

    def _answer(self, replay: ReplayLike, wish: Wish) -> None:
        if isinstance(wish, Seek):
            view = self._view(replay, wish)
            if view is not None:
                self._post(view)
        elif isinstance(wish, Search):
            self._search(replay, wish)
        else:
            self._search_source(wish)

    def _travel(self, replay: ReplayLike, position: int) -> bool:
        """Move to a position in slices; False: a newer wish came first."""
        left = 1
        while left:
            began = perf_counter()
            left = replay.seek_some(position, self._seek_pace.events)
            self._seek_pace.took(perf_counter() - began)
            if left and not self._done:
                self._tell(replay)  # going where the forward pass has not been makes it
            if self._abandoned():
                return False
        return True

    def _view(self, replay: ReplayLike, wish: Seek) -> View | None:
        before: dict[tuple[int, int], tuple[Word, ...]] = {}
        if wish.position > 0:
            if not self._travel(replay, wish.position - 1):
                return None
            before = {(s.lo, s.hi): words for s, words in self._stacks(replay, replay.state(), wish.cpu)}
        if not self._travel(replay, wish.position):
            return None
        state = replay.state()
        stacks = tuple(StackWords(s, words, before.get((s.lo, s.hi), ())) for s, words in self._stacks(replay, state, wish.cpu))
        return View(state, wish.cpu, stacks, self._victims(replay, state, stacks))

    def _stacks(self, replay: ReplayLike, state: Position, cpu: int) -> list[tuple[Stack, tuple[Word, ...]]]:
        """The CPU's stacks with their words: its named ones, those with frames of it, and the one it runs on."""
        rsp = next((c.rsp for c in state.cpus if c.cpu == cpu), None)
        tops = {f.stack_hi for f in state.frames if f.cpu == cpu}
        result = []
        for stack in state.stacks:
            here = rsp is not None and stack.lo < rsp <= stack.hi
            if not here and stack.hi not in tops and not (stack.named and stack.cpu == cpu):
                continue
            lo = stack.lo
            if stack.hi - lo > MAX_STACK:
                # The top, where frames of an IST stack lie, or what surrounds RSP.
                lo = max(lo, (rsp if here and rsp is not None else stack.hi) - MAX_STACK)
            result.append((stack, replay.words(lo, min(stack.hi, lo + 2 * MAX_STACK))))
        return result

    def _victims(self, replay: ReplayLike, state: Position, stacks: tuple[StackWords, ...]) -> tuple[Finding, ...]:
        if len(self._findings) < state.raised:
            self._findings += replay.findings(len(self._findings))
        newest = self._findings[max(0, state.raised - MAX_VICTIMS) : state.raised]
        spans = [(s.stack.lo, s.stack.hi) for s in stacks]
        return tuple(
            f
            for f in newest
            if f.victim is not None
            and (f.writer is not None or f.raised_rule is Rule.NEIGHBOUR_OVERWRITE)
            and any(lo < f.victim.hi <= hi for lo, hi in spans)
        )

    def _search(self, replay: ReplayLike, wish: Search) -> None:
        at, index = wish.start, None
        while index is None and 0 <= at < replay.count:
            index = replay.find(at, wish.direction, wish.kinds, wish.vector, wish.cpu, SEARCH_STEP)
            at += wish.direction * SEARCH_STEP
            if self._abandoned():
                return
        self._post(Found(wish, index))

    def _search_source(self, wish: SourceSearch) -> None:
        """Source numbers need not rise, so every record is looked at; as one strided view that is fast enough."""
        with memoryview(self._events) as records, records.cast("I")[12::16] as numbers, records.cast("H")[29::32] as known:
            for at in range(0, len(numbers), SEARCH_STEP):
                chunk = numbers[at : at + SEARCH_STEP].tolist()
                while wish.number in chunk:
                    index = chunk.index(wish.number)
                    if known[at + index] & Known.SOURCE_INDEX:
                        self._post(Found(wish, at + index))
                        return
                    chunk[index] = -1  # a field that is not known holds anything
                if self._abandoned():
                    return
        self._post(Found(wish, None))
