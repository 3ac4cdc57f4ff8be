"""What viewers of timelines are told: a group of tracks for each CPU, the lives of frames as slices on the track of their stack,
findings and other events as instants, and flows from an overwritten frame to what overwrote it and to what consumed it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from tracedbg import rules
from tracedbg.describe import SETTLE_WORDS, Words
from tracedbg.describe.names import return_kind
from tracedbg.export.clock import Clock
from tracedbg.export.lanes import Lanes
from tracedbg.export.lives import lives
from tracedbg.filter import Filter
from tracedbg.layout import REGION_STACK, SLOT_RSP0
from tracedbg.replay import Replay
from tracedbg.state import Event, EventFlag, Finding, Frame, Kind, Known, Life, Settle, Source
from tracedbg.text import clean
from tracedbg.trace import Trace
from tracedbg.x86 import SLOT_NAMES

if TYPE_CHECKING:
    from tracedbg.formats import WriterOptions

GROUP = 1 << 16  # tracks of a group at most; a track's number is group * GROUP + its own

# The order of the tracks of a group; IST1 to 7 and RSP0 by their slots.
FINDINGS, FRED, OTHER_STACKS, EVENTS = 0, 10, 30, 40
MAX_MESSAGE = 4000

# Events that are told beside the lives of frames: of deliveries and returns those that are no begin and no end of one.
_TOLD = frozenset({Kind.DELIVER, Kind.RETURN, Kind.GAP, Kind.INIT, Kind.SHUTDOWN, Kind.SMI, Kind.RSM, Kind.MARK})


_SOURCES = {source: source.name.lower().replace("_", "-") for source in Source}
_SAVED = tuple(f"saved_{name.replace('-', '_')}" for name in SLOT_NAMES)
_RETURNED = (Settle.RETURN, Settle.COPY)
_FAILED, _SOURCE_INDEX = int(EventFlag.FAILED), int(Known.SOURCE_INDEX)
OTHERS = "other stacks"  # the track of those that the layout does not name


class Arg(NamedTuple):
    """Something said of a slice or an instant. `hex`: a number that is shown as an address."""

    name: str
    value: int | str
    hex: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """A CPU, or what is of no CPU. Numbers begin with 1."""

    number: int
    name: str
    text: str  # what the time axis is


@dataclass(frozen=True, slots=True)
class Track:
    """A track of a group. It comes before everything that is on it."""

    number: int
    group: int
    name: str
    rank: int


@dataclass(frozen=True, slots=True)
class Flow:
    """One end or station of a flow: `step` 0 it begins here, 1 it goes on, 2 it ends."""

    number: int
    step: int


@dataclass(frozen=True, slots=True)
class Item:
    """A slice [begin, end), or an instant (end None), in ns."""

    track: int
    begin: int
    end: int | None
    name: str
    category: str
    args: tuple[Arg, ...]
    flows: tuple[Flow, ...] = ()


Told = Group | Track | Item


def story(trace: Trace, options: WriterOptions, clock: Clock) -> Iterator[Told]:
    """All that is to be told of a trace."""
    return _Story(trace, options, clock).tell()


class _Story:
    def __init__(self, trace: Trace, options: WriterOptions, clock: Clock) -> None:
        self._trace = trace
        self._progress = options.progress
        self._words = Words(trace, options.symbols)
        self._clock = clock
        self._groups: set[int] = set()
        self._tracks: dict[tuple[int, str, int], int] = {}
        self._counts: dict[int, int] = {}
        self._lanes: dict[tuple[int, str], Lanes] = {}
        named = [r for r in reversed(trace.layout.regions) if r.kind == REGION_STACK and r.slot]
        self._tops = {r.hi: (r.cpu, r.slot) for r in named}
        self._own_tops = {(r.cpu, r.hi): r.slot for r in named}
        self._done = bytearray(-(-trace.count // 8))  # a bit for each event: it is the begin or the end of a slice
        self._flows: dict[int, list[Flow]] = {}  # by the frame's entry, or the event
        self._verdicts: dict[int | None, str] = {}  # by the number of the finding
        self._stations: set[int] = set()  # events that a flow goes through, of no frame

    def tell(self) -> Iterator[Told]:
        """The story."""
        findings = self._findings()
        self._plan_flows(findings)
        self._verdicts = {finding.number: rules.rule_id(finding.rule) for finding in findings}
        for finding in findings:
            yield from self._finding(finding)
        with Replay(self._trace) as replay:
            for life in _inner_first(lives(replay, self._report)):
                yield from self._life(life)
            yield from self._events(replay)

    def _report(self, done: int, total: int) -> None:
        self._progress((total + done) // 2, total)

    def _findings(self) -> tuple[Finding, ...]:
        with Replay(self._trace) as replay:
            while replay.scan(1 << 18):
                self._progress(replay.scanned // 2, replay.count)
            return replay.findings()

    def _plan_flows(self, findings: Iterable[Finding]) -> None:
        """Which frames and events the flows go through: victim, writer, consumer; equal ones once.

        A flow goes forward in time: what clocks of CPUs that differ place before its cause is left out.
        """
        planned: set[tuple[int, ...]] = set()
        for finding in findings:
            if finding.victim is None:
                continue
            stops, frames = [finding.victim.entry], {finding.victim.entry}
            if finding.writer is not None:
                stops.append(finding.writer.entry)
                frames.add(finding.writer.entry)
            elif finding.slots and finding.event != finding.consumer:
                stops.append(finding.event)  # a store of software
            if finding.consumer is not None:
                stops.append(finding.consumer)
            kept = [
                stop for n, stop in enumerate(stops) if all(self._clock.at(other) < self._clock.at(stop) for other in stops[:n])
            ]
            if len(kept) < 2 or tuple(kept) in planned:
                continue
            planned.add(tuple(kept))
            for place, stop in enumerate(kept):
                step = 0 if place == 0 else 2 if place == len(kept) - 1 else 1
                self._flows.setdefault(stop, []).append(Flow(len(planned), step))
            self._stations |= set(kept) - frames

    # -- tracks -----------------------------------------------------------------------------------------------------

    def _track(self, cpu: int | None, name: str, rank: int, lane: int = 0) -> Iterator[Group | Track]:
        """Declare a track, and its group, where they are new."""
        number = self._trace.cpus + 1 if cpu is None else cpu + 1
        if number not in self._groups:
            self._groups.add(number)
            yield Group(number, self._group_name(cpu), self._clock.axis.text)
        key = (number, name, lane)
        if key not in self._tracks:
            place = self._counts[number] = self._counts.get(number, 0) + 1
            self._tracks[key] = number * GROUP + place
            yield Track(self._tracks[key], number, f"{name}, {lane + 1}" if lane else name, rank)

    def _number(self, cpu: int | None, name: str, lane: int = 0) -> int:
        return self._tracks[self._trace.cpus + 1 if cpu is None else cpu + 1, name, lane]

    def _group_name(self, cpu: int | None) -> str:
        name = "all CPUs, or not known" if cpu is None else f"cpu {cpu}"
        if not self._clock.axis.timed:
            return f"{name} (no time: event N at N µs)"
        return name if self._clock.axis.hz else f"{name} (unit of time unknown: 1 tick = 1 ns)"

    def _stack(self, frame: Frame) -> tuple[str, int]:
        """The name and the rank of the stack that a frame lies on; those that the layout does not name are one track."""
        own = self._own_tops.get((frame.cpu, frame.stack_hi))
        if own is not None:
            return self._words.stack_name(own), own
        other = self._tops.get(frame.stack_hi)
        if other is not None:
            return f"{self._words.stack_name(other[1])} of cpu {other[0]}", other[1]
        if frame.ist:
            return self._words.stack_name(frame.ist), frame.ist
        said = self._words.frame_stack(frame)
        if said.startswith("FRED"):
            return said, FRED + frame.level
        return (said, SLOT_RSP0) if said == "RSP0" else (OTHERS, OTHER_STACKS)

    # -- frames -----------------------------------------------------------------------------------------------------

    def _life(self, life: Life) -> Iterator[Told]:
        frame, at = life.frame, self._clock.at
        begin = at(frame.entry)
        end = self._clock.end if life.end is None else at(life.end)
        clipped = life.overwritten is not None and (life.end is None or life.overwritten < life.end)
        if clipped and life.overwritten is not None:  # the bytes are gone; what takes their place begins then
            end = min(end, at(life.overwritten) - 1)
        end = max(end, begin + 1)
        name, rank = self._stack(frame)
        lanes = self._lanes.get((frame.cpu, name))
        if lanes is None:
            lanes = self._lanes[frame.cpu, name] = Lanes()
        lane = lanes.place(begin, end)
        track = self._tracks.get((frame.cpu + 1, name, lane))
        if track is None:
            yield from self._track(frame.cpu, name, rank, lane)
            track = self._tracks[frame.cpu + 1, name, lane]
        self._mark(frame.entry)
        if life.end is not None and not clipped and life.settle in _RETURNED:
            self._mark(life.end)
        event = self._trace.event(frame.entry)
        named = event.arg == frame.vector
        kind = self._words.delivery_name(event) if named else self._words.frame_kind(frame)
        if int(event.flags) & _FAILED:
            kind += ", failed"
        if life.overwritten is not None:
            kind += ", overwritten"
        flows = tuple(self._flows.pop(frame.entry, ()))
        yield Item(track, begin, end, kind, "frame", self._frame_args(life, event, name), flows)

    def _frame_args(self, life: Life, event: Event, stack: str) -> tuple[Arg, ...]:
        frame = life.frame
        args = _numbers(event)
        args += (
            Arg("vector", frame.vector),
            Arg("source", _SOURCES[frame.source]),
            Arg("stack", self._words.frame_stack(frame).removeprefix("the ") if stack == OTHERS else stack),
            Arg("lo", frame.lo, True),
            Arg("hi", frame.hi, True),
        )
        args += [Arg(name, value, True) for name, value in zip(_SAVED, frame.saved.slots(), strict=True) if value is not None]
        symbol = self._words.symbol(frame.saved.rip)
        if symbol is not None:
            args.append(Arg("interrupted", symbol))
        if life.overwritten is not None:
            args.append(Arg("overwritten_by", life.overwritten))
        if life.finding in self._verdicts:
            args.append(Arg("verdict", self._verdicts[life.finding]))
        if frame.victim is not None:
            args.append(Arg("overwrote", frame.victim))
        if life.end is not None:
            args.append(Arg("ended_by", life.end))
        args.append(Arg("end", "open at the end of the trace" if life.settle is None else SETTLE_WORDS[life.settle]))
        return tuple(args)

    # -- findings ---------------------------------------------------------------------------------------------------

    def _finding(self, finding: Finding) -> Iterator[Told]:
        cpu = finding.cpu if finding.cpu < self._trace.cpus else None
        yield from self._track(cpu, "findings", FINDINGS)
        begin = self._clock.at(finding.event)
        name = rules.rule_id(finding.rule)
        severity = rules.finding_severity(finding)
        args = tuple(self._finding_args(finding, severity))
        yield Item(self._number(cpu, "findings"), begin, None, name, severity, args)

    def _finding_args(self, finding: Finding, severity: str) -> Iterator[Arg]:
        yield Arg("message", clean(self._words.finding_message(finding), MAX_MESSAGE))
        yield Arg("severity", severity)
        yield Arg("evidence", rules.finding_evidence(finding).name.lower())
        yield Arg("finding", finding.number)
        yield from _numbers(self._trace.event(finding.event))
        for name, event in (
            ("victim", None if finding.victim is None else finding.victim.entry),
            ("writer", None if finding.writer is None else finding.writer.entry),
            ("consumer", finding.consumer),
            ("settled", finding.settled),
        ):
            if event is not None:
                yield Arg(name, event)
        if finding.count > 1:
            yield Arg("times", finding.count)
        if finding.lo < finding.hi:
            yield Arg("lo", finding.lo, True)
            yield Arg("hi", finding.hi, True)

    # -- events -----------------------------------------------------------------------------------------------------

    def _events(self, replay: Replay) -> Iterator[Told]:
        """Events that are no begin and no end of a slice, and those that flows go through."""
        stations = sorted(self._stations, reverse=True)
        after, filters = 0, (Filter(kinds=_TOLD),)
        while after < replay.count:
            found, after = replay.collect(filters, after, 1 << 14, 1 << 20)
            for index in found:
                while stations and stations[-1] < index:
                    yield from self._event(stations.pop())
                if stations and stations[-1] == index:
                    stations.pop()
                    yield from self._event(index)
                elif not self._done[index >> 3] >> (index & 7) & 1:
                    yield from self._event(index)
        while stations:
            yield from self._event(stations.pop())

    def _event(self, index: int) -> Iterator[Told]:
        event = self._trace.event(index)
        cpu = event.cpu if event.known & Known.CPU and event.cpu < self._trace.cpus else None
        yield from self._track(cpu, "events", EVENTS)
        begin = self._clock.at(index)
        flows = tuple(self._flows.pop(index, ()))
        end = begin + self._clock.unit if flows else None  # flows need slices
        args = tuple(self._args_of(event))
        yield Item(self._number(cpu, "events"), begin, end, self._event_name(event), event.kind.name.lower(), args, flows)

    def _event_name(self, event: Event) -> str:
        if event.kind is Kind.RETURN:
            symbol = self._words.symbol(event.addr) if event.known & Known.ADDR else None
            faulted = " faulted" if event.flags & EventFlag.FAULTED else ""
            return f"{return_kind(event)}{faulted}" + (f" to {symbol}" if symbol else "")
        if event.kind is Kind.DELIVER:
            failed = event.flags & EventFlag.FAILED
            return f"{self._words.delivery_name(event)}{', failed' if failed else ', no frame known'}"
        return event.kind.name.lower()

    def _args_of(self, event: Event) -> Iterator[Arg]:
        yield from _numbers(event)
        yield Arg("line", clean(self._words.event_line(event), MAX_MESSAGE))
        if event.kind is Kind.RETURN and event.known & Known.RSP:
            yield Arg("frame", event.rsp, True)

    def _mark(self, index: int) -> None:
        self._done[index >> 3] |= 1 << (index & 7)


def _inner_first(told: Iterator[Life]) -> Iterator[Life]:
    """Frames that end together, the newest first: inner slices come before outer ones."""
    group: list[Life] = []
    for life in told:
        if group and group[0].end != life.end:
            yield from sorted(group, key=_entry, reverse=True)
            group.clear()
        group.append(life)
    yield from sorted(group, key=_entry, reverse=True)


def _entry(life: Life) -> int:
    return life.frame.entry


def _numbers(event: Event) -> list[Arg]:
    """The event's number, and the source's own."""
    args = [Arg("event", event.index)]
    if int(event.known) & _SOURCE_INDEX:
        args.append(Arg("source_index", event.source_index))
    return args
