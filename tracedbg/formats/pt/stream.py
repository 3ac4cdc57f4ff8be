"""One stream of Intel PT packets into native events; the texts, counts and limits that all PT inputs share."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tracedbg import wire
from tracedbg._decode import ffi, lib
from tracedbg.writer import TraceWriter

ROWS = 1 << 12  # events taken from the decoder at a time

RECORD = "perf record -a -e intel_pt/branch=0,event/k"

_COUNTS = {
    lib.PT_N_PACKETS: "packets", lib.PT_N_PSB: "psb", lib.PT_N_CFE: "control_flow_events", lib.PT_N_UNKNOWN: "unknown_events",
    lib.PT_N_IF: "interrupt_flag_changes", lib.PT_N_OVF: "overflows", lib.PT_N_STOP: "stops", lib.PT_N_PAUSE: "pauses",
    lib.PT_N_DAMAGE: "damaged_places", lib.PT_N_SKIPPED: "bytes_skipped", lib.PT_N_TSC: "tsc_packets",
    lib.PT_N_ORPHAN: "events_without_address",
}  # fmt: skip

_DAMAGE = {
    lib.PT_D_PACKET: "not a packet; read on at the next PSB",
    lib.PT_D_EVENT: "an EVD that does not belong to what follows; read on at the next PSB",
    lib.PT_D_STATUS: "a packet that a PSB+ cannot hold; read on at the next PSB",
    lib.PT_D_CUT: "cut short within a packet",
}

_FIDELITY = {
    "rsp": "Intel PT has no RSP, CS, SS or RFLAGS, nor any stack; of RFLAGS only that IF changed",
    "source": "unknown: a device interrupt, an NMI, an exception or an INT n of one vector look the same; known is only that of a"
    " #PF (it has CR2), of an INT n or SYSCALL under FRED, and of an NMI that ends a guest's run",
    "code": "error codes are not traced",
    "returns": "IRET, ERETU and ERETS look the same; without RSP it is not known which frame one popped; addr is the target of"
    " its branch, where branches are traced",
    "stores": "stores are not traced",
    "filters": "what runs outside of the filters of the trace (CPL, CR3, addresses) leaves nothing; such pauses are no gaps",
    "source_index": "offset of the event's CFE packet in the AUX data",
}


@dataclass(frozen=True, slots=True)
class Clock:
    """What turns MTC packets into TSC ticks: ticks of the crystal * n / d, and the bits of it that MTC leaves out."""

    n: int = 0
    d: int = 0
    shift: int = 0


class Texts:
    """The texts of marks, in the trace when they are needed first."""

    def __init__(self, writer: TraceWriter) -> None:
        self.table = ffi.new("struct pt_text[]", lib.PT_MARKS)
        self._writer = writer

    def need(self, number: int) -> None:
        """Put a text into the trace."""
        text = _text(number).encode()
        self.table[number].at = self._writer.payload(text)
        self.table[number].size = len(text)


def _text(number: int) -> str:
    if number >= lib.PT_M_UNKNOWN:
        return f"control-flow event of type {number - lib.PT_M_UNKNOWN}, not known here"
    if number >= lib.PT_M_UIRET:
        return "UIRET"
    if number >= lib.PT_M_UINTR:
        return f"user interrupt {number - lib.PT_M_UINTR}"
    if number >= lib.PT_M_SIPI:
        return f"SIPI, start at {(number - lib.PT_M_SIPI) << 12:#x}"
    return f"VM exit for vector {number}"


class Stream:
    """Decodes one stream. `cpu`: that of its events."""

    def __init__(self, texts: Texts, cpu: int, *, clock: Clock | None = None, events: bool = False) -> None:
        self.cpu = cpu
        self._state = ffi.new("struct pt_stream *")
        self._state.cpu = cpu
        self._state.events = events
        if clock is not None:
            self._state.ctc_n, self._state.ctc_d, self._state.mtc_shift = clock.n, clock.d, clock.shift
        self._texts = texts
        self._rest = b""  # the bytes before the next packet, as many as are needed, and the beginning of one
        self._at = 0  # of that packet in it

    @property
    def offset(self) -> int:
        """Of the byte behind all that was fed."""
        return int(self._state.offset) + len(self._rest) - self._at

    def feed(self, data: bytes, *, last: bool = False) -> Iterator[bytes]:
        """Events of more bytes. `last`: no more follow."""
        data = self._rest + data
        source, at, out = ffi.from_buffer(data), ffi.new("uint64_t *", self._at), bytearray(ROWS * wire.EVENT_SIZE)
        rows = ffi.from_buffer(out)
        while True:
            n = lib.pt_decode(self._state, source, len(data), at, last, self._texts.table, rows, ROWS)
            assert n >= 0
            if n:
                yield bytes(memoryview(out)[: n * wire.EVENT_SIZE])
            if self._state.mark:
                self._texts.need(self._state.mark - 1)
            elif n + lib.PT_ROOM <= ROWS:
                break
        keep = max(at[0] - lib.PT_HISTORY, 0)
        self._rest, self._at = data[keep:], at[0] - keep

    def gap(self, offset: int | None = None) -> bytes:
        """Say that something is missing here; `offset`: the stream goes on there, at the next PSB."""
        rows = self._say(lib.pt_gap, offset is not None)
        if offset is not None:
            self._rest, self._at = b"", 0
            self.start(offset)
        return rows

    def settle(self, time: int) -> bytes:
        """An event that has waited for what it is bound to since long before a time."""
        return self._say(lib.pt_settle, time)

    @property
    def waits(self) -> int:
        """Time of an event that waits for what it is bound to; none: the greatest."""
        return int(lib.pt_waits(self._state))

    def _say(self, what: Callable[..., int], argument: int) -> bytes:
        out = bytearray(lib.PT_ROOM * wire.EVENT_SIZE)
        while True:
            n = what(self._state, argument, self._texts.table, ffi.from_buffer(out), lib.PT_ROOM)
            assert n >= 0
            if not self._state.mark:
                return bytes(out[: n * wire.EVENT_SIZE])
            self._texts.need(self._state.mark - 1)

    def start(self, offset: int) -> None:
        """Where the stream begins."""
        self._state.offset = self._state.lost_at = offset

    @property
    def counts(self) -> Counter[str]:
        """How many of what."""
        return Counter({name: int(self._state.counts[number]) for number, name in _COUNTS.items()})

    @property
    def damage(self) -> list[str]:
        """The first damaged places."""
        known = min(self._state.counts[lib.PT_N_DAMAGE], lib.PT_DAMAGES)
        return [f"at {self._state.damage_at[n]:#x}: {_DAMAGE[self._state.damage[n]]}" for n in range(known)]


def counted(streams: Sequence[Stream]) -> dict[str, int]:
    """Counts of all streams together."""
    total: Counter[str] = Counter()
    for stream in streams:
        total += stream.counts
    return dict(sorted(total.items()))


def fidelity(clock: Clock, counts: dict[str, int], hz: int) -> dict[str, str]:
    """What Intel PT cannot know; `hz`: of the TSC, 0 not known."""
    told = dict(_FIDELITY)
    if not counts.get("tsc_packets"):
        told["time"] = "there is no TSC packet in it: no times, and no order between the CPUs"
    elif clock.n and clock.d:
        told["time"] = "TSC, in between MTC packets, whose ratio the file has (CYC packets are not used)"
    else:
        told["time"] = (
            "TSC of the last TSC packet before (one comes with each PSB): the ratio for MTC packets is not known, CYC packets"
            " are not used; the order between CPUs is only so exact"
        )
    if counts.get("tsc_packets") and not hz:
        told["time"] += "; the frequency is not known (--cpu-hz)"
    return told


class Merge:
    """Writes events of several streams in the order of their times; those of one stream stay in their own order."""

    def __init__(self, writer: TraceWriter) -> None:
        self.held = 0  # bytes
        self._writer = writer
        self._runs: Any = ffi.new("struct pt_run[]", 1)
        self._queues: list[deque[bytes]] = []  # of each stream: the events that its run is in, and those behind them
        self._more: list[bool] = []
        self._out = bytearray(ROWS * wire.EVENT_SIZE)

    def stream(self) -> int:
        """A new stream; its number."""
        number = len(self._queues)
        runs = ffi.new("struct pt_run[]", number + 1)
        ffi.memmove(runs, self._runs, number * ffi.sizeof("struct pt_run"))
        self._runs = runs
        self._queues.append(deque())
        self._more.append(False)
        return number

    def add(self, number: int, rows: bytes) -> None:
        """Events of a stream."""
        self._queues[number].append(rows)
        self.held += len(rows)
        if len(self._queues[number]) == 1:
            self._begin(number)

    def wait(self, number: int, more: bool) -> None:
        """Whether nothing behind this stream's last event can be written, for more of it will come."""
        self._more[number] = more

    def empty(self, number: int) -> bool:
        """Whether no event of it is held."""
        return not self._queues[number]

    def write(self, limit: int = (1 << 64) - 1) -> None:
        """Write what does not lie behind `limit`, up to where a stream that is waited for has no more."""
        out, going = ffi.from_buffer(self._out), bool(self._queues)
        while going:
            for number, queue in enumerate(self._queues):
                self._runs[number].open = self._more[number] or len(queue) > 1
            n = lib.pt_merge(self._runs, len(self._queues), limit, out, ROWS)
            assert n >= 0
            self._writer.append(memoryview(self._out)[: n * wire.EVENT_SIZE])
            self.held -= n * wire.EVENT_SIZE
            going = n == ROWS
            for number, queue in enumerate(self._queues):
                if queue and self._runs[number].at == self._runs[number].count:
                    queue.popleft()
                    self._begin(number)
                    going = going or bool(queue)

    def _begin(self, number: int) -> None:
        queue, run = self._queues[number], self._runs[number]
        run.events = ffi.from_buffer(queue[0]) if queue else ffi.NULL  # the queue keeps it alive
        run.at, run.count = 0, len(queue[0]) // wire.EVENT_SIZE if queue else 0
