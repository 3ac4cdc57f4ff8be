"""What ftrace, `trace-cmd report` and `perf script` print, into a native trace.

Text says less than the recording that it was made of: where a trace.dat is at hand, that is to be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tracedbg import wire
from tracedbg.errors import FormatError, UsageError
from tracedbg.formats.ftrace.events import Events
from tracedbg.formats.ftrace.guests import Guests
from tracedbg.formats.ftrace.lines import Cpus, Lines, Lost, Record, Unit
from tracedbg.formats.ftrace.points import Points
from tracedbg.formats.ftrace.rows import Rows
from tracedbg.formats.source import Input
from tracedbg.formats.tracepoints import CONTEXT, FIDELITY, KVM
from tracedbg.layout import Layout
from tracedbg.state import Kind
from tracedbg.writer import TraceWriter

if TYPE_CHECKING:
    from tracedbg.formats import ReaderOptions

FORMAT = "ftrace-text"
MAX_LINE = 1 << 20  # bytes
SNIFFED = 200  # lines

_NO_CONTEXT = "the text does not tell which records were in NMI context"
_NO_INJECTION = (
    "what KVM injects is not printed for kvm_entry: only requests are known. Linux 6.14 and later have it; trace-cmd's plugin"
    " leaves it out (report -N prints it)"
)
_UNITS = {
    Unit.SECONDS: "seconds as printed, rounded to microseconds unless the text has more digits",
    Unit.MICROSECONDS: "microseconds as printed, since the begin of the buffer",
    Unit.TICKS: "ticks of the clock that was recorded with, which the text does not name",
}


def sniff(head: bytes) -> bool:
    """Whether a line near the beginning is that of a tracepoint."""
    lines = Lines()
    texts = head[: 64 << 10].decode("utf-8", "replace").split("\n")
    return any(isinstance(lines.read(text), Record) for text in texts[: SNIFFED if len(texts) > SNIFFED else -1])


def read(inputs: Sequence[Input], writer: TraceWriter, options: ReaderOptions) -> None:
    """Read the text into the writer. Lines that say nothing are counted; a last line that was cut ends in a gap."""
    if len(inputs) > 1:
        raise UsageError("a text holds all CPUs; several files are not one recording")
    reader = _Reader(inputs[0], writer, options)
    try:
        reader.run()
    finally:
        reader.rows.close()


class _Reader:
    """Reads one text."""

    def __init__(self, source: Input, writer: TraceWriter, options: ReaderOptions) -> None:
        self.source = source
        self.writer = writer
        self.options = options
        self.rows = Rows(writer)
        self.events = Events(self.rows, writer)
        self.guests = Guests(self.events)
        self.points = Points(self.events, self.guests)
        self.lines = Lines()
        self.unit: Unit | None = None
        self.cpus = 0  # said by the text
        self.records = self.others = self.number = 0
        self.damage: list[str] = []

    def run(self) -> None:
        """Read all lines."""
        rest, offset = b"", 0
        for piece in self.source.chunks():
            rest += piece
            size = rest.rfind(b"\n") + 1
            if size:
                for line in rest[:size].decode("utf-8", "replace").split("\n")[:-1]:
                    self._line(line)
                offset += size
                rest = rest[size:]
                self.rows.flush()
            if len(rest) > MAX_LINE:
                raise FormatError(self.source.path, f"line {self.number + 1} is longer than {MAX_LINE >> 20} MiB", offset)
        if rest.strip():
            # Half a number is a number, too: it cannot be told that a line is whole but by its end.
            self.damage.append(f"at {offset:#x}: the last line has no end, and is not read")
            self.events.counts["gaps"] += 1
        if not self.records:
            raise FormatError(self.source.path, "no line of a tracepoint in it", 0)
        hosts = max(self.points.finish(), self.cpus)
        cpus = hosts + len(self.guests.found)
        if cpus > wire.MAX_CPUS:
            raise FormatError(self.source.path, f"CPUs of the host and of guests: {cpus}, at most {wire.MAX_CPUS}")
        self.rows.finish(hosts)
        if self.damage:
            self.writer.event(Kind.GAP)
        layout = (self.options.layout or Layout()).with_stacks()
        self.writer.cpus = max(cpus, len(layout.cpus))
        self.writer.clock_hz = self._hz()
        self.writer.layout = layout
        self.writer.symbols = self.options.symbols or self.writer.symbols
        self.writer.meta = {**self.writer.meta, **self._meta(hosts)}

    def _line(self, line: str) -> None:
        self.number += 1
        said = self.lines.read(line)
        if isinstance(said, Record):
            self.records += 1
            if self.unit is None:
                self.unit = said.unit
            if said.cpu >= wire.MAX_CPUS:
                self.events.counts["odd_records"] += 1
                return
            timed = said.unit is self.unit and said.time < 1 << 64
            if not timed:
                self.events.counts["odd_times"] += 1
            self.points.take(said, timed)
        elif isinstance(said, Lost):
            if said.cpu is None or said.cpu < wire.MAX_CPUS:
                self.points.lost(said.cpu, said.count)
            else:
                self.events.counts["odd_records"] += 1
        elif isinstance(said, Cpus):
            if said.count <= wire.MAX_CPUS:
                self.cpus = max(self.cpus, said.count)
            if said.lost:
                self.points.lost(None, said.lost)
        elif line and not line.isspace():
            self.others += 1

    def _hz(self) -> int:
        """Ticks a second; 0: not known. Raises UsageError for a frequency where it is known."""
        if self.unit is Unit.TICKS:
            return self.options.cpu_hz
        if self.options.cpu_hz:
            raise UsageError("--cpu-hz: the times of this text are no ticks")
        return 10**9

    def _meta(self, hosts: int) -> dict[str, Any]:
        points, source = self.points, self.source
        counts = {"records": self.records, "other_lines": self.others, **self.events.counts}
        told = dict(FIDELITY)
        told["time"] = _UNITS[self.unit or Unit.TICKS]
        if self.unit is Unit.TICKS and not self.options.cpu_hz:
            told["time"] += "; if it is the TSC, give its frequency (--cpu-hz)"
        told["context"] = CONTEXT if points.flags_seen and not points.nmi_hidden else _NO_CONTEXT
        if self.events.counts["faults_at_a_symbol"]:
            told["rip"] = "the kernel's addresses are printed as symbols without an offset: RIP is not known there"
        if any(name.rpartition(":")[2].startswith("kvm_") for name in points.seen):
            told.update(KVM)
            if not self.guests.injects:
                told["guest"] = _NO_INJECTION
        meta: dict[str, Any] = {
            "source": {"format": FORMAT, "name": source.name, "sha256": source.sha256, "bytes": source.bytes},
            "counts": {name: n for name, n in counts.items() if n or name == "records"},
            "tracepoints": dict(sorted(points.seen.items())),
            "fidelity": told,
            "layout": {"origin": "file"} if self.options.layout is not None else {},
            "returns": "none",  # nor RSP
        }
        if self.guests.found:
            meta["vcpus"] = {
                f"cpu {hosts + n}": f"vCPU{'' if one.vcpu is None else f' {one.vcpu}'} of thread {one.pid}"
                for n, one in enumerate(self.guests.found)
            }
        if self.damage:
            meta["damage"] = self.damage
        return meta
