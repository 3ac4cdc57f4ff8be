"""Journeys through a trace that take their time: wishes that the session's thread works off in slices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import ClassVar

from tracedbg.filter import Filters
from tracedbg.state import Event, Frame, Hit, Kind, Known, Position, Touch
from tracedbg.tui.session import SEARCH_STEP, Journey, JourneyReport, Pace, ReplayLike

LOADS = Touch.READ | Touch.POP | Touch.COPY
NOTHING = Touch(0)
OF_FRAME = Touch.WRITE | Touch.COPY | Touch.POP | Touch.END
LISTING = 0.1  # seconds between two parts of a list
ROOM = 4096  # hits taken from the core in one call
BLOCK = 14  # an address without a named stack belongs to the 2**BLOCK bytes around it, as in the replay


@dataclass(frozen=True, slots=True)
class Underway(JourneyReport):
    """How far the journey is, in events."""

    passing: ClassVar[bool] = True
    at: int
    total: int


@dataclass(frozen=True, slots=True)
class Arrived(JourneyReport):
    """The journey has led to an event; `frame`: the one that it is about. `wrapped`: from the end on to the beginning."""

    index: int
    frame: Frame | None = None
    touch: Touch = NOTHING
    wrapped: bool = False


@dataclass(frozen=True, slots=True)
class Nowhere(JourneyReport):
    """There is no such event. `frame`: the one that was followed, if there was one."""

    frame: Frame | None = None


@dataclass(frozen=True, slots=True)
class Listed(JourneyReport):
    """More of a list; `done`: that was all."""

    hits: tuple[Hit, ...]
    at: int
    total: int
    done: bool


@dataclass(frozen=True, slots=True)
class Watched:
    """Bytes [lo, hi), or the frame that the delivery `entry` opened, and what is to be known of them."""

    touch: Touch
    lo: int = 0
    hi: int = 0
    entry: int = 0


# -- pieces of work -----------------------------------------------------------------------------------------------------


def travel(journey: Journey, replay: ReplayLike, position: int, pace: Pace) -> Iterator[JourneyReport]:
    """Bring the view to a position."""
    left = 1
    while left:
        began = perf_counter()
        left = replay.seek_some(position, pace.events)
        pace.took(perf_counter() - began)
        yield Underway(journey, position - min(left, position), position)


def watch(
    journey: Journey, replay: ReplayLike, pace: Pace, what: Watched, found: list[Hit], room: int = 1, stop: int | None = None
) -> Iterator[JourneyReport]:
    """Walk on from the view's position, until `found` has `room` hits more, or one that ends the frame, or to `stop`."""
    target = len(found) + room
    stop = replay.count if stop is None else min(stop, replay.count)
    while len(found) < target and replay.position < stop:
        began = perf_counter()
        limit = min(pace.events, stop - replay.position)
        found += replay.watch(what.touch, what.lo, what.hi, what.entry, room=min(target - len(found), ROOM), limit=limit)
        pace.took(perf_counter() - began)
        if _over(found):
            return
        yield Underway(journey, replay.position, replay.count)


def same_stack(state: Position, a: int, b: int) -> bool:
    """Whether two addresses belong to one stack."""
    stack = next((s for s in state.stacks if s.lo < a <= s.hi), None)
    return stack.lo < b <= stack.hi if stack is not None else (a - 1) >> BLOCK == (b - 1) >> BLOCK


def current_frame(state: Position, cpu: int, rsp: int | None, cs: int | None, but: int | None = None) -> Frame | None:
    """The frame whose handler runs on a CPU with this RSP and CS: the newest at or above RSP on its stack; else, where the
    handler has left its stack, the newest that RSP does not show to be left. `but`: a delivery that does not count."""
    if cs is not None and cs & 3:
        return None
    frames = [f for f in state.frames if f.cpu == cpu and f.entry != but]
    here = [f for f in frames if rsp is not None and f.stack_lo < rsp <= f.rip_addr]
    if not here:
        here = [f for f in frames if rsp is None or not _left(state, f, rsp)]
    return max(here, key=lambda f: f.entry, default=None)


def _left(state: Position, frame: Frame, rsp: int) -> bool:
    saved = frame.saved.rsp
    on_own = frame.stack_lo < rsp <= frame.stack_hi
    return on_own or (saved is not None and rsp >= saved and same_stack(state, saved, rsp))


def frame_around(state: Position, event: Event) -> Frame | None:
    """The frame that an event runs in; `state` is that after it. A delivery runs in what it interrupts."""
    if event.kind is Kind.DELIVER:
        rsp = event.rsp if event.known & Known.RSP else None
        cs = event.cs if event.known & Known.CS else None
        return current_frame(state, event.cpu, rsp, cs, event.index)
    cpu = next((c for c in state.cpus if c.cpu == event.cpu), None)
    return None if cpu is None else current_frame(state, event.cpu, cpu.rsp, cpu.cs)


# -- frames -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OfEvent(Journey):
    """About a frame that is found from an event."""

    event: Event

    def _states(self, replay: ReplayLike, pace: Pace, out: list[Position]) -> Iterator[JourneyReport]:
        """Put the states before and after the event into `out`."""
        for position in (self.event.index, self.event.index + 1):
            yield from travel(self, replay, position, pace)
            out.append(replay.state())

    def _closed(self, states: list[Position]) -> Frame | None:
        """The newest frame of the CPU that the event, a return, has closed."""
        if self.event.kind is not Kind.RETURN:
            return None
        after = {f.entry for f in states[1].frames}
        closed = [f for f in states[0].frames if f.entry not in after and f.cpu == self.event.cpu]
        return max(closed, key=lambda f: f.entry, default=None)


@dataclass(frozen=True, slots=True)
class FrameEnd(OfEvent):
    """The event that ends the frame that a delivery stored, or (`outer`) the one that the event runs in."""

    outer: bool = False

    def steps(self, replay: ReplayLike, pace: Pace) -> Iterator[JourneyReport]:
        states: list[Position] = []
        yield from self._states(replay, pace, states)
        frame = frame_around(states[1], self.event) if self.outer else states[1].last_frame
        if frame is None:
            yield Nowhere(self)
            return
        found: list[Hit] = []
        yield from watch(self, replay, pace, Watched(Touch.END, entry=frame.entry), found)
        yield Arrived(self, found[0].event, frame, Touch.END) if found else Nowhere(self, frame)


@dataclass(frozen=True, slots=True)
class Delivery(OfEvent):
    """The delivery of the frame that the event runs in; of a return: of the frame that it ends."""

    def steps(self, replay: ReplayLike, pace: Pace) -> Iterator[JourneyReport]:
        states: list[Position] = []
        yield from self._states(replay, pace, states)
        frame = self._closed(states) or frame_around(states[1], self.event)
        yield Nowhere(self) if frame is None else Arrived(self, frame.entry, frame)


@dataclass(frozen=True, slots=True)
class FrameEvent(OfEvent):
    """The next or previous event of a frame: its delivery, what stores over it, copies it or pops it, its end.

    `entry`: the delivery of the frame that is being followed; None: the frame that the event stored, ended or runs in.
    """

    direction: int = 1
    entry: int | None = None

    def steps(self, replay: ReplayLike, pace: Pace) -> Iterator[JourneyReport]:
        here, entry = self.event.index, self.entry
        if entry is None:
            states: list[Position] = []
            yield from self._states(replay, pace, states)
            mine = states[1].last_frame or self._closed(states) or frame_around(states[1], self.event)
            if mine is None:
                yield Nowhere(self)
                return
            entry = mine.entry
        yield from travel(self, replay, entry + 1, pace)
        frame = replay.state().last_frame
        if frame is None:
            yield Nowhere(self)
        elif self.direction > 0:
            yield from self._next(replay, pace, frame, here)
        else:
            yield from self._previous(replay, pace, frame, here)

    def _next(self, replay: ReplayLike, pace: Pace, frame: Frame, here: int) -> Iterator[JourneyReport]:
        found: list[Hit] = []
        while not _over(found) and replay.position < replay.count:
            yield from watch(self, replay, pace, _of(frame), found)
            if found and found[-1].event > here:
                yield Arrived(self, found[-1].event, frame, found[-1].touch)
                return
        yield Nowhere(self, frame)

    def _previous(self, replay: ReplayLike, pace: Pace, frame: Frame, here: int) -> Iterator[JourneyReport]:
        found: list[Hit] = []
        while not _over(found) and replay.position < here:
            yield from watch(self, replay, pace, _of(frame), found, ROOM, stop=here)
        if found:
            yield Arrived(self, found[-1].event, frame, found[-1].touch)
        elif here > frame.entry:
            yield Arrived(self, frame.entry, frame)
        else:
            yield Nowhere(self, frame)


def _of(frame: Frame) -> Watched:
    return Watched(OF_FRAME, frame.lo, frame.hi, frame.entry)


def _over(found: list[Hit]) -> bool:
    return bool(found) and bool(found[-1].touch & Touch.END)


# -- bytes --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NextTouch(Journey):
    """The first event from `start` on that touches the bytes [lo, hi)."""

    start: int
    touch: Touch
    lo: int
    hi: int

    def steps(self, replay: ReplayLike, pace: Pace) -> Iterator[JourneyReport]:
        found: list[Hit] = []
        yield from travel(self, replay, min(self.start, replay.count), pace)
        yield from watch(self, replay, pace, Watched(self.touch, self.lo, self.hi), found)
        yield Arrived(self, found[0].event, None, found[0].touch) if found else Nowhere(self)


@dataclass(frozen=True, slots=True)
class WriteHistory(Journey):
    """All stores to the bytes [lo, hi), oldest first, at most `limit`."""

    lo: int
    hi: int
    limit: int = 200_000

    def steps(self, replay: ReplayLike, pace: Pace) -> Iterator[JourneyReport]:
        told = 0
        found: list[Hit] = []
        yield from travel(self, replay, 0, pace)
        began = perf_counter()
        for report in watch(self, replay, pace, Watched(Touch.WRITE, self.lo, self.hi), found, self.limit):
            if perf_counter() - began < LISTING:
                yield report
                continue
            yield Listed(self, tuple(found[told:]), replay.position, replay.count, False)
            told, began = len(found), perf_counter()
        yield Listed(self, tuple(found[told:]), replay.position, replay.count, True)


# -- fields of events ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FindMatch(Journey):
    """The first event from `start` on that passes filters; `wrap`: past the end the trace begins anew."""

    start: int
    filters: Filters
    what: str
    wrap: bool = True

    def steps(self, replay: ReplayLike, pace: Pace) -> Iterator[JourneyReport]:
        count = replay.count
        spans = [(self.start, count)] + ([(0, min(self.start, count))] if self.wrap else [])
        for lo, hi in spans:
            for at in range(lo, hi, SEARCH_STEP):
                index = replay.find_match(self.filters, at, 1, min(SEARCH_STEP, hi - at))
                if index is not None:
                    yield Arrived(self, index, wrapped=index < self.start)
                    return
                yield Underway(self, at, count)
        yield Nowhere(self)


@dataclass(frozen=True, slots=True)
class FindTime(Journey):
    """The first event in the order of the trace that did not come before a time of its clock."""

    time: int

    def steps(self, replay: ReplayLike, pace: Pace) -> Iterator[JourneyReport]:
        for at in range(0, replay.count, SEARCH_STEP):
            index = replay.find_time(self.time, at, SEARCH_STEP)
            if index is not None:
                yield Arrived(self, index)
                return
            yield Underway(self, at, replay.count)
        yield Nowhere(self)

