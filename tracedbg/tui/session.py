"""The thread that owns the Replay: it answers the newest wish of the screen, and goes on with the forward pass between wishes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, ClassVar, Protocol

from tracedbg.filter import Filters
from tracedbg.state import CpuState, Finding, Hit, Known, Position, Rule, Stack, Stats, Timeline, Touch, Word
from tracedbg.tui.overview import Overview, Survey
from tracedbg.tui.tasks import Counted, Matched, SearchableLike, Task

SLICE = 0.005  # seconds of work between two looks at the mailbox: a new wish waits no longer than that
REPORT = 0.05  # seconds between two reports of progress
REST = 20  # after telling all findings, so many times as long until the next time
SURVEY = 0.25  # seconds between two overviews of the trace
SEARCH_STEP = 1 << 18  # records looked at between two looks at the mailbox
MAX_STACK = 1 << 16  # bytes of one stack that a view shows
MAX_VICTIMS = 512  # overwritten frames that a view looks up, newest first


class ReplayLike(SearchableLike, Protocol):
    """What the viewer asks of replay.Replay."""

    @property
    def count(self) -> int: ...
    @property
    def scanned(self) -> int: ...
    @property
    def position(self) -> int: ...
    def extend(self) -> None: ...
    def scan(self, max_events: int) -> int: ...
    def seek_some(self, position: int, max_events: int) -> int: ...
    def state(self) -> Position: ...
    def words(self, lo: int, hi: int) -> tuple[Word, ...]: ...
    def findings(self, first: int = 0) -> tuple[Finding, ...]: ...
    def stats(self) -> Stats: ...
    def timeline(self, cpu: int | None, buckets: int, first: int = ..., count: int | None = ...) -> Timeline: ...
    def find_time(self, time: int, start: int = ..., limit: int = ...) -> int | None: ...
    def watch(
        self, touch: Touch, lo: int = ..., hi: int = ..., frame: int = ..., *, room: int = ..., limit: int = ...
    ) -> tuple[Hit, ...]: ...


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
    was: CpuState | None = None  # the CPU one event before


@dataclass(frozen=True, slots=True)
class Seek:
    """Wish: the view of a position, with the stacks of one CPU."""

    position: int
    cpu: int


@dataclass(frozen=True, slots=True)
class SourceSearch:
    """Wish: the event that the source itself gave this number."""

    number: int


@dataclass(frozen=True, slots=True)
class Match:
    """Wish: the nearest event from `start` on in one direction that passes all filters. `what` words it for the user."""

    start: int
    direction: int
    what: str
    filters: Filters


class Journey:
    """Wish: a way through the trace that takes its time. A newer wish ends it, and then it has nothing to report any more."""

    def steps(self, replay: ReplayLike, pace: Pace) -> Iterator[JourneyReport]:
        """Go the way in slices of `pace.events`, each of which ends with a report."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class JourneyReport:
    """What a journey has to tell. `passing`: it may be left out, as another one follows soon."""

    passing: ClassVar[bool] = False
    journey: Journey


Wish = Seek | SourceSearch | Match | Journey


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the forward pass is; `findings` replace those from number `first` on."""

    scanned: int
    count: int
    first: int
    findings: tuple[Finding, ...]
    done: bool
    stats: Stats | None = None  # once done
    overview: Overview | None = None  # None: as before


@dataclass(frozen=True, slots=True)
class Found:
    """Answer to a search; `index` None: nothing there."""

    wish: SourceSearch | Match
    index: int | None


@dataclass(frozen=True, slots=True)
class Searching:
    """A search has looked at that many of the events that lie in its direction."""

    wish: Match
    looked: int
    total: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The session ended with an error."""

    error: Exception


Report = View | Progress | Found | Searching | Matched | Counted | JourneyReport | Failed


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

    A newer wish replaces an older one, also one under way; tasks go on between wishes. `idle` is set while no wish is open,
    no task is left and the scan is complete.
    """

    def __init__(self, open_replay: OpenReplay, events: Any, post: Callable[[Report], None]) -> None:
        super().__init__(name="session", daemon=True)
        self.idle = threading.Event()
        self._open = open_replay
        self._events = events  # memory view of the records, for searches that the core does not offer
        self._post = post
        self._changed = threading.Condition()
        self._wish: Wish | None = None
        self._tasks: list[Task] = []
        self._stopping = False
        self._ended = False
        self._scan_pace = Pace()
        self._seek_pace = Pace()
        self._search_pace = Pace(1 << 16)
        self._task_reported = 0.0
        self.survey: Survey | None = None  # to be set before the start
        self._surveyed = 0.0
        self._findings: list[Finding] = []
        self._done = False
        self._reported = 0.0
        self._unreported = 0
        self._grown: tuple[Any, bool] | None = None  # what grow() was told, until it is done
        self._owing: float | None = None  # when all findings are to be told once more
        self._rest_until = 0.0

    # -- called by the user interface ---------------------------------------------------------------------------------

    def wish(self, wish: Wish) -> None:
        """Ask for something; forgets what was asked before."""
        with self._changed:
            if not self._ended:
                self.idle.clear()
                self._wish = wish
                self._changed.notify()

    def start_task(self, task: Task) -> None:
        """Begin a task; one of the same class that is under way is given up."""
        with self._changed:
            if not self._ended:
                self.idle.clear()
                self._tasks = [*(t for t in self._tasks if type(t) is not type(task)), task]
                self._changed.notify()

    def drop_task(self, kind: type[Task]) -> None:
        """Give up the task of a class, if there is one."""
        with self._changed:
            self._tasks = [t for t in self._tasks if type(t) is not kind]
            self._changed.notify()

    def grow(self, events: Any, *, anew: bool = False) -> None:
        """The trace has become longer; `events`: all its records now. `anew`: they are others, to be replayed once more."""
        with self._changed:
            if not self._ended:
                self.idle.clear()
                self._grown = (events, anew or (self._grown is not None and self._grown[1]))
                if anew:
                    self._tasks = []
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
            again = True
            while again:
                with self._open() as replay:
                    again = self._loop(replay)
        except Exception as error:  # whatever it was, the thread that has a screen must tell it
            self._post(Failed(error))
        finally:
            with self._changed:
                self._ended = True
                self.idle.set()

    def _loop(self, replay: ReplayLike) -> bool:
        """Until the end (False), or until another Replay is needed."""
        while True:
            with self._changed:
                if self._stopping:
                    return False
                grown, self._grown = self._grown, None
                idle = grown is None and self._wish is None and not self._tasks and self._done
                if idle and self._owing is None:
                    self.idle.set()
                    self._changed.wait()
                    continue
                if idle and self._owing is not None and self._changed.wait(max(self._owing - perf_counter(), 0)):
                    continue
                wish, tasks = None, self._tasks
                if grown is None:
                    wish, self._wish = self._wish, None
            if grown is not None:
                self._events, self._done = grown[0], False
                if grown[1]:
                    self._forget()
                    return True
                replay.extend()
            elif idle:
                self._tell_all(replay)
            if wish is not None:
                self._answer(replay, wish)
            for task in tasks:
                self._work(replay, task)
            if not self._done:
                self._scan(replay)

    def _work(self, replay: ReplayLike, task: Task) -> None:
        """One slice of a task."""
        began = perf_counter()
        task.step(replay, self._search_pace.events)
        now = perf_counter()
        self._search_pace.took(now - began)
        if not task.done and now - self._task_reported < REPORT:
            return
        self._task_reported = now
        self._post(task.report())
        if task.done:
            with self._changed:
                self._tasks = [t for t in self._tasks if t is not task]

    def _abandoned(self) -> bool:
        return self._wish is not None or self._stopping

    def _scan(self, replay: ReplayLike) -> None:
        began = perf_counter()
        self._done = replay.scan(self._scan_pace.events) == 0
        self._scan_pace.took(perf_counter() - began)
        if not self._done:
            self._tell(replay)
        elif self._rest_until <= perf_counter():
            self._tell_all(replay)
        else:  # a trace that grows comes to its end again and again, and all findings may take a while
            self._tell(replay)
            self._owing = self._rest_until

    def _tell_all(self, replay: ReplayLike) -> None:
        """Settled findings have changed since they were raised: only at the end they say the final word."""
        began = perf_counter()
        self._forget()
        self._tell(replay)
        now = perf_counter()
        self._owing, self._rest_until = None, now + REST * (now - began)

    def _forget(self) -> None:
        self._findings.clear()
        self._unreported = 0
        self._owing = None

    def _tell(self, replay: ReplayLike) -> None:
        """Report how far the forward pass is, but not too often."""
        now = perf_counter()
        if not self._done and now - self._reported < REPORT:
            return
        self._findings += replay.findings(len(self._findings))
        first, self._unreported = self._unreported, len(self._findings)
        self._reported = now
        stats = replay.stats() if self._done else None
        new = tuple(self._findings[first:])
        self._post(Progress(replay.scanned, replay.count, first, new, self._done, stats, self._overview(replay, first, new, now)))

    def _overview(self, replay: ReplayLike, first: int, findings: tuple[Finding, ...], now: float) -> Overview | None:
        """The trace as known now, where it is wanted and not made just before."""
        if self.survey is None:
            return None
        if not first:
            self.survey.reset(replay.count)
        self.survey.take(findings)
        if not self._done and now - self._surveyed < SURVEY:
            return None
        self._surveyed = now
        return self.survey.overview(replay)

    def _answer(self, replay: ReplayLike, wish: Wish) -> None:
        if isinstance(wish, Seek):
            view = self._view(replay, wish)
            if view is not None:
                self._post(view)
        elif isinstance(wish, Match):
            self._match(replay, wish)
        elif isinstance(wish, Journey):
            self._journey(replay, wish)
        else:
            self._search_source(wish)

    def _journey(self, replay: ReplayLike, wish: Journey) -> None:
        told = perf_counter()
        for report in wish.steps(replay, self._seek_pace):
            if not report.passing or perf_counter() - told >= REPORT:
                told = perf_counter()
                self._post(report)
            if not self._done:
                self._tell(replay)
            if self._abandoned():
                return

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
        was = None
        if wish.position > 0:
            if not self._travel(replay, wish.position - 1):
                return None
            earlier = replay.state()
            was = next((c for c in earlier.cpus if c.cpu == wish.cpu), None)
            before = {(s.lo, s.hi): words for s, words in self._stacks(replay, earlier, wish.cpu)}
        if not self._travel(replay, wish.position):
            return None
        state = replay.state()
        stacks = tuple(StackWords(s, words, before.get((s.lo, s.hi), ())) for s, words in self._stacks(replay, state, wish.cpu))
        return View(state, wish.cpu, stacks, self._victims(replay, state, stacks), was)

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

    def _match(self, replay: ReplayLike, wish: Match) -> None:
        """Look in slices, and say how far it is once it takes longer than a blink."""
        total = max(replay.count - wish.start if wish.direction > 0 else wish.start + 1, 0)
        looked, index, reported = 0, None, perf_counter()
        while index is None and looked < total:
            began = perf_counter()
            events = self._search_pace.events
            index = replay.find_match(wish.filters, wish.start + wish.direction * looked, wish.direction, events)
            looked += events
            now = perf_counter()
            self._search_pace.took(now - began)
            if self._abandoned():
                return
            if index is None and now - reported >= REPORT:
                reported = now
                self._post(Searching(wish, min(looked, total), total))
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
