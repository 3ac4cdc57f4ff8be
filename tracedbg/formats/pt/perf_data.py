"""perf.data with Intel PT into a native trace: only the AUX data, and what the file says about their clock.

AUX data lie in the file in pieces, one AUX buffer (a CPU, or a thread) after the other, round after round. perf reads all buffers
in turn, so what it finds in a round is younger than the time at which the round before read the same buffer.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tracedbg import wire
from tracedbg._decode import lib
from tracedbg.errors import FormatError, UsageError
from tracedbg.formats.pt import intel_pt
from tracedbg.formats.pt.perf_records import AUX, AUXTRACE_INFO, MAGIC, Chunk, PerfFile, Record, no_trace
from tracedbg.formats.pt.stream import Clock, Merge, Stream, Texts, counted, fidelity
from tracedbg.formats.source import Input
from tracedbg.layout import Fidelity, Layout
from tracedbg.state import Kind
from tracedbg.text import clean
from tracedbg.writer import TraceWriter

if TYPE_CHECKING:
    from tracedbg.formats import ReaderOptions

FORMAT = "perf-data"
MAX_HELD = 64 << 20  # bytes of events
MAX_LOSSES = 4096  # AUX records that tell of lost data, kept for each CPU until their place is reached

_NO_CPU = 0xFFFFFFFF
_INTEL_PT = 1  # auxtrace type
_EVENT = 1 << 31  # IA32_RTIT_CTL.EventEn, as in the attribute's config
_TRUNCATED = 1  # AUX flag
# u64 of AUXTRACE_INFO (linux tools/perf/util/intel-pt.h)
_PMU, _SHIFT, _MULT, _SNAPSHOT, _MTC, _MTC_FREQ, _N, _D, _FILTER = 0, 1, 2, 8, 10, 11, 12, 13, 16
_CPU_BIT, _IDENTIFIER_BIT = 1 << 7, 1 << 16  # sample_type


def sniff(head: bytes) -> bool:
    """Whether an input begins like a perf.data file of a little-endian machine."""
    return head.startswith(MAGIC)


def read(inputs: Sequence[Input], writer: TraceWriter, options: ReaderOptions) -> None:
    """Read the Intel PT data of a file. What is damaged, lost or cut short ends in a gap and in META's `damage`."""
    if len(inputs) > 1:
        raise UsageError("perf-data: one file holds all CPUs")
    source = inputs[0]
    file = PerfFile(source.path, source.chunks())
    reader = _Reader(source.path, file, writer)
    reader.run()
    if not reader.streams:
        raise no_trace(source.path) if file.damage is None else FormatError(source.path, file.damage[1], file.damage[0])
    counts = counted(reader.streams)
    intel_pt.check(source.path, counts)
    if reader.lost:
        counts["truncations"] = reader.lost
    if reader.merge_late:
        counts["unordered"] = reader.merge_late
    writer.cpus = max(stream.cpu for stream in reader.streams) + 1
    writer.clock_hz = options.cpu_hz or reader.info.hz
    writer.layout = replace((options.layout or Layout()).with_stacks(), fidelity=Fidelity.GUESTS)
    writer.symbols = options.symbols or writer.symbols
    meta: dict[str, Any] = {
        "source": {"format": FORMAT, "name": source.name, "sha256": source.sha256, "bytes": source.bytes},
        "counts": counts,
        "fidelity": {**fidelity(reader.info.clock, counts, writer.clock_hz), **reader.told()},
        "layout": {"origin": "file"} if options.layout is not None else {},
        "returns": "unplaced",  # no RSP: see help/replay.md, Return
    }
    if damage := reader.damage():
        meta["damage"] = damage
    writer.meta = {**writer.meta, **meta}


class _Info:
    """What AUXTRACE_INFO and the attribute of the PMU say."""

    def __init__(self, path: str, file: PerfFile, record: Record | None) -> None:
        self.clock = Clock()
        self.hz = 0
        self.filter = ""
        self.snapshot = self.events = self.exclude_user = self.exclude_kernel = False
        if record is None:
            return
        kind = int.from_bytes(record.payload[:4], "little")
        if kind != _INTEL_PT:
            raise FormatError(path, f"perf.data with AUX data that are not Intel PT's (type {kind})", record.at)
        rest = record.payload[8:]
        words = struct.unpack_from(f"<{len(rest) // 8}Q", rest)
        word = dict(enumerate(words[: _FILTER + 1])).get
        shift, mult = word(_SHIFT, 0), word(_MULT, 0)
        if 0 < mult < 1 << 32 and shift < 64:
            self.hz = min((10**9 << shift) // mult, (1 << 63) - 1)
        self.snapshot = bool(word(_SNAPSHOT, 0))
        if size := word(_FILTER, 0):
            at = 8 + 8 * (_FILTER + 1)
            self.filter = clean(record.payload[at : at + min(size, 200)].split(b"\0")[0].decode("utf-8", "replace"), 200)
        for attr in file.attrs:
            if attr.type != word(_PMU, -1):
                continue
            self.events = bool(attr.config & _EVENT)
            self.exclude_user, self.exclude_kernel = attr.exclude_user, attr.exclude_kernel
            n, d, freq = word(_N, 0), word(_D, 0), word(_MTC_FREQ, 0)
            if attr.config & word(_MTC, 0) and 0 < n < 1 << 32 and 0 < d < 1 << 32 and freq:
                bits = (attr.config & freq) // (freq & -freq)
                if bits < 16:
                    self.clock = Clock(n, d, bits)


class _Reader:
    """Goes through the records of one file."""

    def __init__(self, path: str, file: PerfFile, writer: TraceWriter) -> None:
        self.info = _Info(path, file, None)
        self.streams: list[Stream] = []
        self.lost = 0  # AUX records that told of lost data
        self.merge_late = 0  # how often what was held became too much
        self.jumps = 0
        self.threads = False
        self._path = path
        self._file = file
        self._writer = writer
        self._texts = Texts(writer)
        self._merge = Merge(writer)
        self._numbers: dict[int, int] = {}  # AUX buffer -> stream
        self._read: dict[int, int] = {}  # stream -> TSC when its buffer was last read
        self._losses: dict[int, list[int]] = {}  # CPU -> offsets of its stream behind which data were lost
        self._place: int | None = 0  # of the CPU from the end of an AUX record's payload; 0: not looked for yet
        self._bad: list[tuple[int, str]] = []

    def run(self) -> None:
        """Read all records."""
        for item in self._file.walk():
            if isinstance(item, Chunk):
                self._chunk(item)
            elif item.type == AUXTRACE_INFO:
                if not self.streams:
                    self.info = _Info(self._path, self._file, item)
            elif item.type == AUX:
                self._aux_record(item)
        for number, stream in enumerate(self.streams):
            for rows in stream.feed(b"", last=True):
                self._merge.add(number, rows)
        if self._file.damage is not None and self.streams:
            self._merge.write()
            self._writer.event(Kind.GAP)  # of all CPUs: nobody knows whose data would have come
        self._merge.write()

    def _chunk(self, item: Chunk) -> None:
        number = self._numbers.get(item.idx)
        if number is None:
            self.threads = self.threads or item.cpu == _NO_CPU
            cpu = item.idx if item.cpu == _NO_CPU else item.cpu
            if cpu >= wire.MAX_CPUS or any(stream.cpu == cpu for stream in self.streams):
                self._bad.append((item.at, "AUX data of a CPU that cannot be; not read"))
                return
            number = self._numbers[item.idx] = self._merge.stream()
            self.streams.append(Stream(self._texts, cpu, clock=self.info.clock, events=self.info.events))
            self.streams[number].start(item.offset)
        if item.first and item.reference:
            # All other buffers were read since this one was read last: what is older than that is there.
            if (limit := self._read.get(number)) is not None and limit <= item.reference:
                self._write(limit)
            self._read[number] = item.reference
        for rows in self._fed(self.streams[number], item):
            self._merge.add(number, rows)
        if self._merge.held > MAX_HELD:
            self.merge_late += len(self.streams) > 1
            self._merge.write()

    def _write(self, limit: int) -> None:
        """Write what is older than `limit` and than what still waits for a packet."""
        for number, stream in enumerate(self.streams):
            if stream.waits <= limit:
                if rows := stream.settle(limit):
                    self._merge.add(number, rows)
                limit = min(limit, stream.waits - 1)
        if limit > 0:
            self._merge.write(limit)

    def _fed(self, stream: Stream, item: Chunk) -> Iterator[bytes]:
        data, offset = item.data, item.offset
        if offset < stream.offset:  # a snapshot holds the end of the one before
            data = data[stream.offset - offset :]
        elif offset > stream.offset:
            self.jumps += 1
            yield stream.gap(offset)
        losses = self._losses.get(stream.cpu, ())
        while data:
            upto = len(data)
            if losses and losses[0] - stream.offset < upto:
                upto = max(losses.pop(0) - stream.offset, 0)
                yield from stream.feed(data[:upto])
                yield stream.gap()
            else:
                yield from stream.feed(data)
            data = data[upto:]

    def _aux_record(self, record: Record) -> None:
        """Note a place behind which data were lost: u64 offset, size, flags, and at its end the sample ID with the CPU."""
        if len(record.payload) < 24:
            return
        offset, size, flags = struct.unpack_from("<QQQ", record.payload)
        if not flags & _TRUNCATED:
            return
        self.lost += 1
        if self._place == 0:
            self._place = self._cpu_place()
        if self._place is None or len(record.payload) < 24 + self._place:
            return
        (cpu,) = struct.unpack_from("<I", record.payload, len(record.payload) - self._place)
        losses = self._losses.setdefault(cpu, []) if cpu < wire.MAX_CPUS else []
        if len(losses) < MAX_LOSSES:
            losses.append((offset + size) % (1 << 64))

    def _cpu_place(self) -> int | None:
        attrs = self._file.attrs
        if not attrs or not all(a.sample_id_all and a.sample_type & _CPU_BIT for a in attrs):
            return None
        places = {16 if a.sample_type & _IDENTIFIER_BIT else 8 for a in attrs}
        return places.pop() if len(places) == 1 else None

    def told(self) -> dict[str, str]:
        """What this file cannot know, beside what Intel PT cannot."""
        told: dict[str, str] = {}
        if self.threads:
            told["cpu"] = "recorded by thread: the CPU is the number of the AUX buffer, a thread's, not a CPU's (record with -a)"
        if self.info.exclude_user or self.info.exclude_kernel:
            where = "user" if self.info.exclude_user else "kernel"
            told["filters"] = f"{where} mode was left out of the trace: what happened there leaves nothing"
        if self.info.filter:
            told["filter"] = f"recorded with the filter {self.info.filter}: what runs outside of it leaves nothing"
        if self.info.snapshot:
            told["snapshot"] = "recorded in snapshot mode: only the time before each snapshot is there, with gaps in between"
        if self.lost and self._place is None:
            told["lost"] = "data were lost (AUX records say so), but the file does not say on which CPU"
        return told

    def damage(self) -> list[str]:
        """What was damaged, in words."""
        found = [f"at {at:#x}: {what}" for at, what in self._bad]
        if self._file.damage is not None:
            found.append(f"at {self._file.damage[0]:#x}: {self._file.damage[1]}")
        found += [f"CPU {stream.cpu} {told}" for stream in self.streams for told in stream.damage]
        return found[: lib.PT_DAMAGES]
