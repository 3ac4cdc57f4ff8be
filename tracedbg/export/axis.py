"""The time axis of an export: the trace's own time where it can be one, else the number of the event."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tracedbg import wire
from tracedbg.state import Known
from tracedbg.trace import Trace

NANO = 10**9
CHUNK = 1 << 14  # events looked at together
MAX_NS = 1 << 62  # viewers hold nanoseconds in 63 bits
MAX_TICKS = 1 << 63  # Babeltrace has a word for what is no time: 2^64 - 1
GLITCHES = 100  # of so many times one may lie before an earlier one of its CPU: more, and they are no axis

_TIME = int(Known.TIME)
_CPU = int(Known.CPU)
NO_CPU = -1  # events that are of no CPU of the trace


@dataclass(frozen=True, slots=True)
class Axis:
    """What stands for time. `timed`: the trace's own time, else the event number; `why`: why not, in words.

    `hz`: of the trace's time, 0: not known, a tick then counts as a nanosecond. `start`: the earliest time. `untimed`, `back`:
    events without a time, and with one before an earlier event's of the same CPU; they stand where the event before them does.
    """

    timed: bool
    hz: int
    start: int
    untimed: int
    back: int
    why: str = ""

    def ns(self, ticks: int) -> int:
        """Ticks in nanoseconds, rounded down."""
        return ticks * NANO // self.hz if self.hz else ticks

    @property
    def text(self) -> str:
        """What the axis is, for the head of an export."""
        if not self.timed:
            return f"number of the event: {self.why}"
        said = "time of the trace" if self.hz else "time of the trace, its unit is not known: a tick is shown as 1 ns"
        odd = [
            f"{number:,} {what}"
            for number, what in ((self.untimed, "without a time"), (self.back, "before an earlier one of the CPU"))
            if number
        ]
        if odd:
            said += f"; of the events, {' and '.join(odd)}: shown right after the event before on the CPU"
        return said


def axis_of(trace: Trace) -> Axis:
    """Look at all times of a trace.

    They are no axis if there are none, if they do not fit, or if more than one in GLITCHES goes back on its CPU: a few late
    records are a glitch, many are a clock that was set.
    """
    newest: dict[int, int] = {}
    start, end, timed, back = -1, 0, 0, 0
    for _, times, known, cpus in columns(trace):
        if not any(bits & _TIME for bits in known):
            continue
        for time, bits, cpu in zip(times, known, cpus, strict=True):
            if not bits & _TIME:
                continue
            timed += 1
            if time < newest.get(cpu, 0):
                back += 1
                continue
            newest[cpu] = time
            if time > end:
                end = time
            if not 0 <= start <= time:
                start = time
    untimed = trace.count - timed
    hz = trace.clock_hz if trace.clock_hz < MAX_TICKS else 0  # no clock is that fast; readers take it for a mistake
    axis = Axis(True, hz, max(start, 0), untimed, back)
    why = ""
    if not timed:
        why = "the trace has no time"
    elif axis.ns(end) >= MAX_NS or end >= MAX_TICKS:
        why = "the times of the trace are too large for an axis"
    elif back * GLITCHES > timed:
        why = f"{back:,} of {timed:,} times lie before an earlier one of the same CPU"
    return Axis(False, hz, 0, untimed, back, why) if why else axis


def columns(trace: Trace, offset: int = 0) -> Iterator[tuple[int, list[int], list[int], list[int]]]:
    """The number of the first event, times, known bits and CPUs (NO_CPU: unknown, or none of the trace) of CHUNK events each.

    `offset`: of the records to begin with.
    """
    size = CHUNK * wire.EVENT_SIZE
    for at in range(offset, len(trace.events), size):
        chunk = bytes(trace.events[at : at + size])
        with memoryview(chunk) as raw, raw.cast("Q") as longs, raw.cast("H") as shorts:
            times, known, cpus = longs[0::8].tolist(), shorts[29::32].tolist(), shorts[26::32].tolist()
        if trace.cpus <= max(cpus) or not all(bits & _CPU for bits in known):
            cpus = [cpu if bits & _CPU and cpu < trace.cpus else NO_CPU for cpu, bits in zip(cpus, known, strict=True)]
        yield at // wire.EVENT_SIZE, times, known, cpus
