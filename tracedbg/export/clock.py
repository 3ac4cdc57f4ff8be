"""Nanoseconds of events for viewers that draw slices: no two events of a CPU at one moment, in the order of the trace."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from itertools import islice

from tracedbg import wire
from tracedbg.export.axis import CHUNK, NO_CPU, Axis, axis_of, columns
from tracedbg.state import Known
from tracedbg.trace import Trace

INDEX_UNIT = 1000  # ns from event to event where the number of the event stands for time: viewers think in microseconds
STEP = 2  # ns: room for a slice that ends before what comes next
BLOCKS = 64  # kept

_TIME = int(Known.TIME)


class Clock:
    """The moment of each event, in ns from the start of the trace.

    Where times are equal, go back or are not known, an event stands STEP behind the one before it on its CPU: so slices that
    begin at events nest as they did. Events of no CPU have an order of their own.
    """

    def __init__(self, trace: Trace) -> None:
        self.axis: Axis = axis_of(trace)
        self.unit = 1 if self.axis.timed else INDEX_UNIT
        self._trace = trace
        self._before: list[array[int]] = []  # by block: the last moment of each CPU before it
        self._blocks: OrderedDict[int, array[int]] = OrderedDict()
        self.end = trace.count * INDEX_UNIT  # behind the last event
        if self.axis.timed:
            self._look_through()

    def at(self, index: int) -> int:
        """The moment of an event."""
        if not self.axis.timed:
            return index * INDEX_UNIT
        number, place = divmod(index, CHUNK)
        block = self._blocks.get(number)
        if block is None:
            block = self._block(number)
            if len(self._blocks) > BLOCKS:
                self._blocks.popitem(last=False)
        else:
            self._blocks.move_to_end(number)
        return block[place]

    def _look_through(self) -> None:
        """Note where each block begins: one number for each CPU and 16,384 events."""
        last = array("q", [-STEP]) * (self._trace.cpus + 1)  # the last one: NO_CPU
        for _, times, known, cpus in columns(self._trace):
            self._before.append(last[:])
            self._run(last, times, known, cpus)
        self.end = max(last) + 1

    def _block(self, number: int) -> array[int]:
        size = CHUNK * wire.EVENT_SIZE
        _, times, known, cpus = next(islice(columns(self._trace, number * size), 1))
        block = self._blocks[number] = self._run(self._before[number][:], times, known, cpus)
        return block

    def _run(self, last: array[int], times: list[int], known: list[int], cpus: list[int]) -> array[int]:
        """The moments of a block; `last` goes on to its end."""
        start, hz = self.axis.start, self.axis.hz
        moments = array("q")
        for time, bits, cpu in zip(times, known, cpus, strict=True):
            moment = last[cpu] + STEP
            if bits & _TIME:
                own = (time - start) * 1_000_000_000 // hz if hz else time - start
                if own > last[cpu]:
                    moment = own
            last[cpu] = moment
            moments.append(moment)
        return moments


assert NO_CPU == -1  # the last place of the arrays
