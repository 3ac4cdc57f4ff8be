"""CTF 1.8: a directory with the text `metadata` and a binary stream for each CPU, as Babeltrace and Trace Compass read it.

Sources: Common Trace Format 1.8.3 (diamon.org/ctf): packet header and context (5), event header and context (6), TSDL (7).
Each event has its native number as context, so that readers that merge streams by time can restore the order.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import uuid
from typing import TYPE_CHECKING, Any

from tracedbg import __version__, rules, wire
from tracedbg.describe import Words
from tracedbg.export import ctf_classes as classes
from tracedbg.export.axis import Axis, axis_of
from tracedbg.export.ctf_classes import EventClass, Shape
from tracedbg.export.ctf_text import CPU_STREAM, MAGIC, OTHER_STREAM, environment, metadata
from tracedbg.replay import Replay
from tracedbg.state import Finding, Kind
from tracedbg.text import clean
from tracedbg.trace import Trace

if TYPE_CHECKING:
    from tracedbg.formats import WriterOptions

HEADER = struct.Struct("<I16sI")  # magic, uuid, stream
CONTEXT = struct.Struct("<QQQQQ")  # begin, end, content, packet (bits), discarded
CPU_ID = struct.Struct("<I")
MAX_PACKET = 1 << 16  # bytes of events
ALL_PACKETS = 1 << 26  # bytes of events held for all streams together
MAX_CLASSES = 4096  # more: the classes have all fields
STEP = 1 << 12  # events between two looks at the progress
MAX_MESSAGE = 4000
MASK = (1 << 64) - 1

_TIME, _CPU = classes.TIME, classes.CPU
_DELIVER, _GAP = int(Kind.DELIVER), int(Kind.GAP)


def write(trace: Trace, path: str, options: WriterOptions) -> None:
    """As registry.Writer; `path` is an empty directory."""
    axis = axis_of(trace)
    ident = identity(trace)
    findings = _Findings(trace, options)
    for whole in (False, True):
        writer = _Writer(trace, path, axis, ident, whole=whole)
        if writer.write(findings, options):
            break
        writer.remove()
    env = environment(trace.meta, __version__, axis, trace.cpus)
    with open(os.path.join(path, "metadata"), "w", encoding="ascii", newline="\n") as file:
        file.writelines(f"{line}\n" for line in metadata(ident, axis, env, writer.classes, sorted(writer.used)))


def identity(trace: Trace) -> uuid.UUID:
    """An UUID for what a trace holds: the same for the same trace, wherever it lies."""
    digest = hashlib.sha256()
    head = {"cpus": trace.cpus, "clock_hz": trace.clock_hz, "meta": trace.meta, "version": __version__}
    try:
        digest.update(json.dumps(head, sort_keys=True).encode())
    except RecursionError:
        digest.update(b"?")
    digest.update(trace.layout.to_bytes())
    digest.update(trace.events)
    digest.update(trace.payload)
    return uuid.uuid5(uuid.NAMESPACE_URL, f"sha256:{digest.hexdigest()}")


class _Findings:
    """The findings by the event at which they are raised, with their final words."""

    def __init__(self, trace: Trace, options: WriterOptions) -> None:
        self.words = Words(trace, options.symbols)
        with Replay(trace) as replay:
            while replay.scan(1 << 18):
                options.progress(replay.scanned // 2, trace.count)
            found = replay.findings()
        self.at: dict[int, list[Finding]] = {}
        for finding in found:
            self.at.setdefault(finding.event, []).append(finding)


class _Stream:
    """One stream: events are collected to packets, packets to pieces of the file."""

    def __init__(self, path: str, ident: uuid.UUID, stream: int, cpu: int, room: int) -> None:
        self.path = path
        self.last = 0  # timestamp of the last event
        self.discarded = 0
        self._head = HEADER.pack(MAGIC, ident.bytes, stream)
        self._cpu = CPU_ID.pack(cpu) if stream == CPU_STREAM else b""
        self._room = room
        self._events = bytearray()
        self._done = bytearray()
        self._begin = 0
        self._end = 0

    def add(self, time: int, data: bytes) -> None:
        """Add an event."""
        if not self._events:
            self._begin = time
        self._end = time
        self._events += data
        if len(self._events) >= self._room:
            self.end_packet()

    def end_packet(self) -> None:
        """The events so far are a packet."""
        if not self._events:
            return
        size = 8 * (len(self._head) + CONTEXT.size + len(self._cpu) + len(self._events))
        self._done += self._head
        self._done += CONTEXT.pack(self._begin, self._end, size, size, self.discarded)
        self._done += self._cpu
        self._done += self._events
        self._events.clear()
        if len(self._done) >= self._room:
            self.flush()

    def lose(self, number: int) -> None:
        """Records were lost before the event that comes next: the packet before it ends."""
        self.end_packet()
        self.discarded = min(self.discarded + number, MASK)

    def flush(self) -> None:
        """Write what is there. Files are not kept open: there may be more CPUs than a process may have files."""
        if self._done:
            with open(self.path, "ab") as file:
                file.write(self._done)
            self._done.clear()

    def close(self) -> None:
        """End it."""
        self.end_packet()
        self.flush()


class _Writer:
    """Writes the streams, and finds the classes on the way. `whole`: one class a kind, with all fields."""

    def __init__(self, trace: Trace, path: str, axis: Axis, ident: uuid.UUID, *, whole: bool) -> None:
        self._trace = trace
        self._path = path
        self._timed = axis.timed
        self._cpus = trace.cpus
        self._payload = len(trace.payload)
        self._ident = ident
        self._whole = whole
        self._streams: dict[int, _Stream] = {}
        self._by_key: dict[tuple[Any, ...], EventClass] = {}
        self._by_shape: dict[object, EventClass] = {}
        self._room = max(min(MAX_PACKET, ALL_PACKETS // trace.cpus // 2), 1 << 12)
        self.used: set[int] = set()  # streams

    @property
    def classes(self) -> list[EventClass]:
        """The classes so far, by number."""
        return list(self._by_shape.values())

    def remove(self) -> None:
        """Take the files away."""
        for stream in self._streams.values():
            if os.path.exists(stream.path):
                os.unlink(stream.path)

    def write(self, findings: _Findings, options: WriterOptions) -> bool:
        """Write all streams; False if there are too many classes."""
        count, events, at = self._trace.count, self._trace.events, findings.at
        for first in range(0, count, STEP):
            options.progress((count + first) // 2, count)
            chunk = bytes(events[first * wire.EVENT_SIZE : (first + STEP) * wire.EVENT_SIZE])
            for index, values in enumerate(wire.EVENT_PACK.iter_unpack(chunk), first):
                self._event(index, values)
                if index in at:
                    for finding in at[index]:
                        self._finding(finding, findings.words)
            if len(self._by_shape) > MAX_CLASSES and not self._whole:
                return False
        for stream in self._streams.values():
            stream.close()
        return True

    def _stream(self, cpu: int) -> _Stream:
        """The stream of a CPU; -1: of what is of no CPU."""
        stream = self._streams.get(cpu)
        if stream is None:
            kind = OTHER_STREAM if cpu < 0 else CPU_STREAM
            self.used.add(kind)
            name = "no_cpu" if cpu < 0 else f"cpu_{cpu}"
            stream = self._streams[cpu] = _Stream(os.path.join(self._path, name), self._ident, kind, cpu, self._room)
        return stream

    def _event(self, index: int, values: tuple[int, ...]) -> None:
        known, kind, arg, source, flags = values[classes.KNOWN :]
        cpu = values[8] if known & _CPU and values[8] < self._cpus else -1
        stream = self._streams.get(cpu) or self._stream(cpu)
        behind = False
        if not self._timed:
            time = index
        elif known & _TIME and values[0] >= stream.last:
            time = values[0]
        else:
            time, behind = stream.last, True
        stream.last = time
        data = flags & classes.BYTES and not self._whole and classes.has_data(values, self._payload)
        key = (known, kind, flags, cpu < 0, behind, data, arg, source) if kind == _DELIVER else (
            known, kind, flags, cpu < 0, behind, data
        )  # fmt: skip
        event = self._by_key.get(key)
        if event is None:
            names = classes.name_choice(arg, source) if kind == _DELIVER else 0
            event = self._by_key[key] = self._class(known, kind, names, flags, cpu >= 0, behind, bool(data))
        if data:
            raw = bytes(self._trace.payload[values[4] : values[4] + values[6]])
            if kind == Kind.MARK:
                record = event.pack(event.number, time, index, *event.take(values)) + _string(raw.decode("utf-8", "replace"))
            else:
                record = event.pack(event.number, time, index, *event.take(values), len(raw)) + raw
        else:
            record = event.pack(event.number, time, index, *event.take(values))
        if kind != _GAP:
            stream.add(time, record)
            return
        # A packet of its own: readers place the loss between the packet before and its end.
        stream.lose(values[4] if known & classes.VALUE else 1)
        stream.add(time, record)
        stream.end_packet()

    def _class(self, known: int, kind: int, names: int, flags: int, of_cpu: bool, behind: bool, data: bool) -> EventClass:
        stream = CPU_STREAM if of_cpu else OTHER_STREAM
        if self._whole:
            return self._add(Shape(stream, kind, whole=True, behind=behind))
        known &= classes.ALL_KNOWN & ~(classes.CPU if of_cpu else 0)  # the packet has it
        if self._timed and not behind:
            known &= ~classes.TIME  # it is the timestamp
        if data:
            known &= ~(classes.VALUE | classes.CODE)
            flags &= ~classes.BYTES
        return self._add(Shape(stream, kind, known, names, bool(flags), data, behind))

    def _add(self, shape: Shape) -> EventClass:
        event = self._by_shape.get(shape)
        if event is None:
            event = self._by_shape[shape] = classes.make(shape, len(self._by_shape))
        return event

    def _finding(self, finding: Finding, words: Words) -> None:
        """A finding stands behind the event at which it is raised, in the stream of its CPU."""
        of_cpu = finding.cpu < self._trace.cpus
        stream = self._stream(finding.cpu if of_cpu else -1)
        numbers = (
            None if finding.victim is None else finding.victim.entry,
            None if finding.writer is None else finding.writer.entry,
            finding.consumer,
            finding.settled,
        )
        key = (of_cpu, tuple(number is not None for number in numbers), finding.lo < finding.hi)
        event = self._by_shape.get(key)
        if event is None:
            kind = CPU_STREAM if of_cpu else OTHER_STREAM
            event = self._by_shape[key] = classes.finding_class(kind, key[1], key[2], len(self._by_shape))
        if not self._timed:
            stream.last = max(stream.last, finding.event)
        data = event.pack(event.number, stream.last, finding.event)
        data += _string(rules.rule_id(finding.rule)) + _string(rules.finding_severity(finding))
        data += _string(rules.finding_evidence(finding).name.lower())
        data += struct.pack(f"<I{sum(key[1])}I", finding.count, *(number for number in numbers if number is not None))
        if key[2]:
            data += struct.pack("<QQ", finding.lo, finding.hi)
        stream.add(stream.last, data + _string(words.finding_message(finding)))


def _string(text: str) -> bytes:
    """A CTF string: UTF-8 that a terminal may show, ended by a zero byte."""
    return clean(text, MAX_MESSAGE).encode("utf-8", "replace") + b"\0"
