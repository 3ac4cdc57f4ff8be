"""ELF dumps of QEMU's dump-guest-memory into a native trace: the frames that one instant shows, as deliveries.

Nothing is needed but the dump: TR leads to the TSS, its IST pointers to the stacks, CR3 through the page tables to their bytes.
"""

from __future__ import annotations

import bisect
import mmap
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tracedbg.errors import FormatError, UsageError
from tracedbg.formats.source import CHUNK, Input
from tracedbg.formats.vmcore.events import Events, contested, words
from tracedbg.formats.vmcore.notes import Bytes, Cpu, Dump
from tracedbg.formats.vmcore.pages import PAGE, Space
from tracedbg.formats.vmcore.stacks import Stacks, Top, Walk, ist_name, tops_of
from tracedbg.layout import REGION_STACK, CpuTables, Fidelity, Gate, Idt, Layout, Region, Tss
from tracedbg.output import spool_error
from tracedbg.trace import MemoryRange
from tracedbg.writer import TraceWriter

if TYPE_CHECKING:
    from tracedbg.formats import ReaderOptions

FORMAT = "vmcore"
MAX_STACK = 32 << 10  # bytes below a top that are searched for its guard page
MAX_KEPT = 8192  # pages of stacks kept in the trace
MAX_CPUS_TOLD = 256
_TSS_SIZE = 0x68
_IDT_SIZE = 4096
_ELF = b"\x7fELF"
_ET_CORE = b"\x04\0"

_REFUSED = (
    (b"KDUMP   ", "a kdump-compressed dump: it has no TR, so the IST stacks are not known"),
    (b"makedumpfile\0", "a flattened dump of makedumpfile: it has no TR, so the IST stacks are not known"),
    (b"PAGEDU64", "a Windows dump: it has no TR, so the IST stacks are not known"),
)

_FIDELITY = {
    "deliveries": "inferred from the stacks of one instant: those that must have been for the frames that lie there, outermost"
    " first; what had returned before the dump is not known",
    "vector": "known where only one gate leads to an IST stack, or RIP is at the begin of a handler",
    "source": "not known; of vector 8 taken for an exception",
    "time": "none",
    "returns": "not known; one is inferred where RSP is back on the stack that a frame interrupted",
    "stores": "not known; memory is as dumped",
    "frames": "those on IST stacks; frames that were pushed where RSP stood are not looked for",
}


def sniff(head: bytes) -> bool:
    """Whether an input is an ELF core file, or a dump that read() refuses by name."""
    return (head[:4] == _ELF and head[16:18] == _ET_CORE) or head.startswith(tuple(magic for magic, _ in _REFUSED))


def read(inputs: Sequence[Input], writer: TraceWriter, options: ReaderOptions) -> None:
    """Read a dump into the writer. Raises FormatError, UsageError."""
    if len(inputs) > 1:
        raise UsageError("a dump holds all CPUs; several files are not one recording")
    given = options.layout
    if given is not None and (given.tss or given.idts or given.cpus):
        raise UsageError("a dump has its own TSS and IDT: --layout can only add names and user memory")
    source = inputs[0]
    for magic, what in _REFUSED:
        if source.head.startswith(magic):
            raise FormatError(source.path, f"{what}; dump the guest with QEMU's dump-guest-memory, as ELF", 0)
    if not source.head.startswith(_ELF):
        raise FormatError(source.path, "not an ELF file", 0)  # before all of it is copied
    with _contents(source) as data:
        parse(data, source.path, writer, given or Layout())
        writer.meta["source"] = {"format": FORMAT, "name": source.name, "bytes": len(data)}
    writer.symbols = options.symbols or writer.symbols


def parse(data: Bytes, path: str, writer: TraceWriter, given: Layout) -> None:
    """Read the bytes of a dump into the writer; `given`: names and user memory. Raises FormatError."""
    reader = _Reader(Dump(data, path), writer)
    reader.run(given)
    meta: dict[str, Any] = {
        "counts": {
            "cpus": len(reader.dump.cpus),
            "memory_bytes": reader.dump.memory_bytes,
            "live_frames": sum(not link.left for stacks in reader.found for link in stacks.chain),
        },
        "fidelity": _FIDELITY,
        "layout": {"origin": "the dump"},
        "examined": reader.told(),
    }
    if reader.events.unknown:
        meta["layout"]["missing"] = True
    if reader.damage:
        meta["damage"] = reader.damage
    writer.meta = {**writer.meta, **meta}


@contextmanager
def _contents(source: Input) -> Iterator[Bytes]:
    """All bytes of the input for random access: the file itself, or what it unpacks to, in a temporary file."""
    try:
        if source.is_file and source.bytes == source.raw_bytes:
            with open(source.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                if data[:4] == _ELF:  # and not packed to just as many bytes
                    yield data
                    return
        with tempfile.TemporaryFile() as spool:
            zeros = bytes(CHUNK)
            size = 0
            for piece in source.chunks():
                size += len(piece)
                if piece == zeros[: len(piece)]:  # most of a guest's memory; a hole costs nothing
                    spool.seek(size)
                else:
                    spool.write(piece)
            spool.truncate(size)
            spool.flush()
            with mmap.mmap(spool.fileno(), 0, access=mmap.ACCESS_READ) as data:
                yield data
    except OSError as error:
        raise spool_error(source.path, error) from None


@dataclass(slots=True)
class _Tables:
    """What one CPU has loaded."""

    cpu: Cpu
    space: Space
    tss: Tss
    idt: Idt


class _Reader:
    """Goes through the CPUs: first their tables, which bound each other's stacks, then the stacks."""

    def __init__(self, dump: Dump, writer: TraceWriter) -> None:
        self.dump = dump
        self.damage = list(dump.damage)
        self.found: list[Stacks] = []
        self.events = Events(writer)
        self._writer = writer
        self._tables: list[_Tables] = []
        self._lost: dict[int, str] = {}  # CPUs of which nothing can be said, and why
        self._gates: dict[bytes, Gate] = {}

    def run(self, given: Layout) -> None:
        """Read all of it into the writer."""
        for cpu in self.dump.cpus:
            self._load(cpu)
        cpus = len(self.dump.cpus) + self.dump.lost
        layout = self._layout(given)
        named = sorted(((r.lo, r.hi) for r in layout.regions if r.kind == REGION_STACK), key=lambda stack: stack[::-1])
        ends = [hi for _, hi in named]
        for tables in self._tables:
            lows = {}
            for pointer in filter(None, tables.tss.ist):
                at = bisect.bisect_left(ends, pointer)
                if at < len(named) and named[at][0] < pointer:
                    lows[pointer] = named[at][0]
            tops = tops_of(tables.space, tables.cpu, tables.tss, tables.idt, lows)
            self.found.append(Walk(tables.space, tables.cpu, tops, named).run())
        self._same_place()
        self._writer.cpus = cpus
        self._writer.layout = layout
        self._writer.memory = self._memory()
        for number, why in sorted(self._lost.items()):
            self.events.mark(number, why)
            if self.dump.cpus[number].long_mode or not self.found:  # in other modes there is no IST
                self.events.gap(number)
        for number in range(len(self.dump.cpus), cpus):
            self.events.gap(number)
        self._write()

    def _load(self, cpu: Cpu) -> None:
        if not cpu.long_mode:
            self._lost[cpu.number] = "the CPU is not in long mode"
        elif cpu.fred:
            self._lost[cpu.number] = "the CPU uses FRED, whose stack pointers are MSRs that a dump has not"
        if cpu.number in self._lost:
            return
        space = Space(self.dump, cpu.cr3, cpu.levels)
        tss, idt = self._tss(space, cpu), self._idt(space, cpu)
        if tss is None or not idt.gates:
            what = "TSS" if tss is None else "IDT"
            base = cpu.tr.base if tss is None else cpu.idt.base
            why = "a page table is not in the dump" if space.holes else "it is not mapped, or not in the dump"
            self._lost[cpu.number] = f"no {what} at {base:#x}: {why}"
            self.damage.append(f"cpu {cpu.number}: {self._lost[cpu.number]}")
            return
        self._tables.append(_Tables(cpu, space, tss, idt))

    def _tss(self, space: Space, cpu: Cpu) -> Tss | None:
        size = min(cpu.tr.limit + 1, _TSS_SIZE)
        raw = space.read(cpu.tr.base, size)
        return None if raw is None or size < 0x24 + 8 else Tss.from_bytes(cpu.tr.base, raw)

    def _idt(self, space: Space, cpu: Cpu) -> Idt:
        """The gates of the pages that are there."""
        count = min(cpu.idt.limit + 1, _IDT_SIZE) // 16
        table = space.read(cpu.idt.base, 16 * count)
        gates: dict[int, Gate] = {}
        for vector in range(count):
            raw = space.read(cpu.idt.base + 16 * vector, 16) if table is None else table[16 * vector : 16 * vector + 16]
            if raw is None:
                continue
            gate = self._gates.get(raw)
            if gate is None:
                gate = self._gates[raw] = Gate.from_bytes(raw)
            gates[vector] = gate
        return Idt(cpu.idt.base, gates)

    def _layout(self, given: Layout) -> Layout:
        tss: dict[Tss, int] = {}
        idts: list[Idt] = []
        numbers: dict[tuple[int, tuple[tuple[int, Gate], ...]], int] = {}
        cpus = [CpuTables() for _ in range(len(self.dump.cpus))]
        for tables in self._tables:
            key = (tables.idt.base, tuple(tables.idt.gates.items()))
            if key not in numbers:
                numbers[key] = len(idts)
                idts.append(tables.idt)
            cpus[tables.cpu.number] = CpuTables(tss.setdefault(tables.tss, len(tss)), numbers[key])
        # The frames of a chain are live: nothing returned between their deliveries but what is said.
        fidelity = Fidelity.INFERRED | Fidelity.RETURNS
        layout = replace(given, tss=tuple(tss), idts=tuple(idts), cpus=tuple(cpus), fidelity=fidelity).with_stacks()
        spaces = {tables.cpu.number: tables.space for tables in self._tables}
        tops = sorted(r.hi for r in layout.regions if r.kind == REGION_STACK)
        below = dict(zip(tops[1:], tops, strict=False))
        return replace(layout, regions=tuple(_guarded(r, spaces.get(r.cpu), below.get(r.hi, 0)) for r in layout.regions))

    def _same_place(self) -> None:
        """A trace has one memory: CPUs whose page tables show other bytes at the same stack cannot both be told."""
        first: dict[int, tuple[int, int]] = {}
        kept: list[tuple[_Tables, Stacks]] = []
        for tables, stacks in zip(self._tables, self.found, strict=True):
            other = next(
                (
                    first[t.hi][0]
                    for t in stacks.tops
                    if t.physical is not None and first.get(t.hi, (0, t.physical))[1] != t.physical
                ),
                None,
            )
            if other is not None:
                why = f"its stacks have the addresses of CPU {other}'s and lie in other memory: not looked at"
                self._lost[stacks.cpu.number] = why
                self.damage.append(f"cpu {stacks.cpu.number}: {why}")
                continue
            for top in stacks.tops:
                if top.physical is not None:
                    first.setdefault(top.hi, (stacks.cpu.number, top.physical))
            kept.append((tables, stacks))
        self._tables, self.found = [t for t, _ in kept], [s for _, s in kept]

    def _memory(self) -> list[MemoryRange]:
        """The pages of the stacks that are used, and of those on which the chains go on."""
        wanted: dict[int, Space] = {}
        for tables, stacks in zip(self._tables, self.found, strict=True):
            ranges = [(_used(top, stacks), top.pointer) for top in stacks.tops if top.physical is not None] + stacks.seen
            for lo, hi in ranges:
                for number in range(lo >> 12, (hi - 1 >> 12) + 1):
                    wanted.setdefault(number, tables.space)
        if len(wanted) > MAX_KEPT:
            self.damage.append(f"of {len(wanted):,} pages of stacks only {MAX_KEPT:,} are kept")
        kept: list[tuple[int, bytearray]] = []
        for number in sorted(wanted)[:MAX_KEPT]:
            data = wanted[number].read(number << 12, PAGE)
            if data is None:
                continue
            if kept and kept[-1][0] + len(kept[-1][1]) == number << 12:
                kept[-1][1].extend(data)
            else:
                kept.append((number << 12, bytearray(data)))
        return [MemoryRange(addr, bytes(data)) for addr, data in kept]

    def _write(self) -> None:
        shared = contested(self.found)
        for hi, users in sorted(shared.items()):
            numbers = ", ".join(str(stacks.cpu.number) for stacks, _ in users)
            for stacks, top in users:
                stacks.stops = f"CPUs {numbers} all run on {ist_name(top)}, top {hi:#x}: one frame overwrote the others"
                at = next(i for i, link in enumerate(stacks.chain) if link.top is top)
                stacks.chain[at:] = [replace(stacks.chain[at], frame=None)]
        for tables, stacks in zip(self._tables, self.found, strict=True):
            self.events.cpu(stacks, tables.idt, shared)

    def told(self) -> dict[str, str]:
        """For `info`: each CPU in words."""
        width = len(str(len(self.dump.cpus) - 1))
        lost = list(self._lost.items())
        told = {f"cpu {number:>{width}}": why for number, why in lost[:MAX_CPUS_TOLD]}
        shown = self.found[: MAX_CPUS_TOLD - len(told)]
        for stacks in shown:
            told |= {f"cpu {stacks.cpu.number:>{width}} {name}".rstrip(): text for name, text in words(stacks).items()}
        more = len(self.found) - len(shown) + max(len(lost) - MAX_CPUS_TOLD, 0)
        if more:
            told["others"] = f"{more} more CPUs"
        return told


def _used(top: Top, stacks: Stacks) -> int:
    """The lowest address on a stack that the chain speaks of."""
    pointers = [stacks.cpu.rsp, *(link.frame.rsp for link in stacks.chain if link.frame is not None)]
    return min([top.hi - 8, *(rsp for rsp in pointers if top.holds(rsp))])


def _guarded(region: Region, space: Space | None, below: int) -> Region:
    """A stack down to its guard page, if it has one."""
    if not region.assumed or space is None:
        return region
    limit = max(region.hi - MAX_STACK, below, 0)
    at = region.hi - 1 & -PAGE
    while at >= limit and space.page(at) is not None:
        at -= PAGE
    lo = at + PAGE
    return replace(region, lo=lo) if limit <= at and lo < region.hi else region
