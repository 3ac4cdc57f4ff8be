"""Binary traces of Xen's xentrace into a native trace.

A file is a sequence of windows: a CPU_CHANGE record (CPU, size), then so many bytes of that CPU's records. It says neither the
frequency of the TSC nor, before Xen 4.19, whether the VM exits are those of VMX or SVM.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tracedbg import wire
from tracedbg.errors import FormatError, UsageError
from tracedbg.formats.source import Input
from tracedbg.formats.xentrace_events import VENDORS, Cpu
from tracedbg.formats.xentrace_merge import Merge
from tracedbg.formats.xentrace_records import CPU_CHANGE, DamagedWindow, Records
from tracedbg.layout import Layout
from tracedbg.state import Kind
from tracedbg.writer import TraceWriter

if TYPE_CHECKING:
    from tracedbg.formats import ReaderOptions

FORMAT = "xentrace"
BLOCK = 1 << 20  # bytes of records taken at a time

_WINDOW = struct.Struct("<III")
_MAX_DAMAGES = 20  # told one by one

_FIDELITY = {
    "rsp": "no record has RSP, CS, SS or RFLAGS, nor any stack",
    "returns": "IRETs are not traced",
    "stores": "stores are not traced",
    "deliveries": "Xen's own are traced only as device interrupts (IRQ handled), as host interrupts and NMIs that end a guest's"
    " run, and where an exception is passed on to a PV guest (vector, RIP and error code are those told to the guest);"
    " other NMIs, #MCs and IPIs, and every delivery inside an HVM guest, are not",
    "injection": "NMIs injected into an HVM guest are not traced, only that one had to wait (request of vector 2);"
    " interrupts injected by virtual interrupt delivery or posting are not traced either",
    "vmexit": "addr is the guest's RIP; the reason is the vendor's number",
    "vector": "an IRQ has its vector only if its binding was traced before",
}


def sniff(head: bytes) -> bool:
    """Whether an input begins with a window of a CPU."""
    if len(head) < _WINDOW.size:
        return False
    header, cpu, size = _WINDOW.unpack_from(head)
    return bool(header == CPU_CHANGE and cpu < wire.MAX_CPUS and size % 4 == 0)


def read(inputs: Sequence[Input], writer: TraceWriter, options: ReaderOptions) -> None:
    """Read a trace into the writer. What is damaged or cut short ends in a gap and in META's `damage`."""
    if len(inputs) > 1:
        raise UsageError("xentrace writes all CPUs into one file; several files are not one recording")
    source = inputs[0]
    reader = _Reader(source, writer, options)
    reader.run()
    records, layout = reader.records, (options.layout or Layout()).with_stacks()
    if not records.records:
        at, what = reader.damage[0] if reader.damage else (0, "no record in it")
        raise FormatError(source.path, f"not a trace of xentrace: {what}", at)
    writer.cpus = max(reader.cpus, default=0) + 1
    writer.clock_hz = options.cpu_hz
    writer.layout = layout
    writer.symbols = options.symbols or writer.symbols
    meta: dict[str, Any] = {
        "source": {"format": FORMAT, "name": source.name, "sha256": source.sha256, "bytes": source.bytes},
        "counts": {"records": records.records, "windows": reader.windows, **_counted(reader)},
        "fidelity": _fidelity(reader, options),
        "layout": {"origin": "file"} if options.layout is not None else {},
    }
    if reader.damage:
        meta["damage"] = [f"at {at:#x}: {what}" for at, what in reader.damage[:_MAX_DAMAGES]]
        meta["counts"]["damaged_places"] = len(reader.damage)
    writer.meta = {**writer.meta, **meta}


def _counted(reader: _Reader) -> dict[str, int]:
    counts = {name: n for name, n in sorted(reader.records.counts.items()) if n}
    if reader.merge.unordered:
        counts["unordered"] = reader.merge.unordered
    return counts


def _fidelity(reader: _Reader, options: ReaderOptions) -> dict[str, str]:
    told = dict(_FIDELITY)
    told["time"] = "TSC; handler records have none and get that of the record before"
    if not options.cpu_hz:
        told["time"] += "; the file does not say its frequency (--cpu-hz)"
    vendors = {number: name.upper() for name, number in VENDORS.items()}
    if reader.records.counts["exits_of_unknown_vendor"]:
        told["vendor"] = "some VM exits can be those of VMX or SVM (--vendor)"
    elif reader.records.vendor is not None and options.vendor is None:
        told["vendor"] = f"the exit reasons are those of {vendors[reader.records.vendor]}"
    return told


class _Reader:
    """Goes through the windows of one file."""

    def __init__(self, source: Input, writer: TraceWriter, options: ReaderOptions) -> None:
        self.records = Records(writer, None if options.vendor is None else VENDORS[options.vendor])
        self.merge = Merge(writer)
        self.cpus: dict[int, Cpu] = {}
        self.windows = 0
        self.damage: list[tuple[int, str]] = []  # file offset, what
        self._writer = writer
        self._bytes = _Bytes(source.chunks())

    def run(self) -> None:
        """Read all windows."""
        whole = True
        while whole and (head := self._bytes.peek(_WINDOW.size)):
            whole = self._header(head)
        self.merge.close()
        if not whole and self.records.records:
            self._writer.event(Kind.GAP)  # of all CPUs: nobody knows whose windows would have come

    def _header(self, head: bytes) -> bool:
        """A window with its header; False: there is none, and what follows cannot be read."""
        at = self._bytes.offset
        if len(head) < _WINDOW.size:
            self.damage.append((at, "cut short"))
            return False
        header, number, size = _WINDOW.unpack(head)
        if header != CPU_CHANGE or number >= wire.MAX_CPUS or size % 4:
            self.damage.append((at, "no window begins here; the rest is not read"))
            return False
        self._bytes.skip(_WINDOW.size)
        self.windows += 1
        cpu = self.cpus.setdefault(number, Cpu(number))
        self.merge.begin(number)
        self.merge.add(cpu.begin())
        self._window(cpu, size)
        return True

    def _window(self, cpu: Cpu, left: int) -> None:
        while left:
            data = self._bytes.peek(min(left, BLOCK))
            last = len(data) == left
            cut = not last and len(data) < BLOCK
            words = memoryview(data)[: len(data) & ~3].cast("I").tolist()
            try:
                taken = self.records.block(cpu, words, last) * 4
            except DamagedWindow as damage:
                what = "a window begins inside of another" if damage.header else "a record is longer than its window"
                self.damage.append((self._bytes.offset + damage.at, what))
                self.records.cut(cpu)
                self._bytes.skip(damage.at if damage.header else left)
                return
            self._bytes.skip(taken)
            left -= taken
            self.merge.check()
            if cut:
                self.damage.append((self._bytes.offset, "cut short"))
                self.records.cut(cpu)
                self._bytes.skip(left)
                return


class _Bytes:
    """The bytes of the input from `offset` on."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.offset = 0
        self._pieces = pieces
        self._data = b""
        self._at = 0  # of `offset` in it

    def peek(self, size: int) -> bytes:
        """The next bytes, fewer only at the end of the input."""
        while len(self._data) - self._at < size and (piece := next(self._pieces, None)) is not None:
            self._data = self._data[self._at :] + piece
            self._at = 0
        return self._data[self._at : self._at + size]

    def skip(self, size: int) -> None:
        """Go on."""
        self.offset += size
        self._at += size
        while self._at > len(self._data) and (piece := next(self._pieces, None)) is not None:
            self._at -= len(self._data)
            self._data = piece
        self._at = min(self._at, len(self._data))
