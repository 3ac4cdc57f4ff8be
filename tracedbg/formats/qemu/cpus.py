"""The CPUs of a QEMU log, which names none: they are told apart by the TR base of the register dump."""

from __future__ import annotations

from dataclasses import dataclass, field

from tracedbg import wire
from tracedbg.errors import FormatError
from tracedbg.formats.qemu.items import Attempt, Plugin
from tracedbg.formats.qemu.monitor import Snapshot
from tracedbg.layout import Layout

MAX_CPUS = wire.MAX_CPUS
MAX_TABLES = 1 << 16  # pairs of TR and IDT bases remembered
_LMA = 1 << 10


@dataclass(slots=True)
class Tables:
    """What the register dumps of one (TR, IDT) pair mean."""

    cpu: int
    tr: int
    idt: int
    known: bool  # the CPU is known
    count: int = 0  # 64-bit events


@dataclass(slots=True)
class Cpu:
    """What is remembered of a CPU between events."""

    tr: int | None = None
    idt: int | None = None
    long_mode: bool = False
    last: Attempt | None = None  # the last event, if it was an attempt
    last_source: int = 0
    last_at: int = -1  # index of its record
    return_at: int = -1  # index of the last event, if it was a RETURN
    return_rip: int = 0
    iret: int | None = None  # pc of an `iret` line whose frame has not come
    pushes: list[int] = field(default_factory=list)  # words that the CPU pushes itself, still to be seen as stores
    pushed: list[Plugin] = field(default_factory=list)  # stores held back because they look like these


class Cpus:
    """The CPUs seen, and whose the tables are."""

    def __init__(self, path: str, snapshots: list[Snapshot], given: Layout) -> None:
        self.path = path
        self.seen: dict[int, Cpu] = {}
        self.tables: dict[tuple[bytes, bytes], Tables] = {}
        self.single = False  # the log says that there is one CPU only
        self._of_tr: dict[int, int] = {}
        self.long_efer: set[bytes] = set()
        for number, cpu in enumerate(given.cpus):
            if cpu.tss is not None and given.tss[cpu.tss].base:
                self._of_tr.setdefault(given.tss[cpu.tss].base, number)
        for snapshot in snapshots:
            for number, block in sorted(snapshot.cpus.items()):
                if block.tr:
                    self._of_tr.setdefault(block.tr, number)

    def add(self, number: int) -> Cpu:
        """A CPU that is new. Raises FormatError if there are too many."""
        if number >= MAX_CPUS:
            raise FormatError(self.path, f"absurd CPU number {number}", 0)
        cpu = self.seen[number] = Cpu()
        return cpu

    def number_of(self, cpu: Cpu) -> int:
        """The number of one of them."""
        return next(n for n, c in self.seen.items() if c is cpu)

    def only(self) -> int | None:
        """The number of the only one."""
        return next(iter(self.seen), 0) if len(self.seen) <= 1 else None

    def of_thread(self, item: Attempt, taken: set[int]) -> int:
        """The CPU of a thread's log, whose first attempt this is."""
        number = self._of_tr.get(int(item.tr or b"0", 16))
        if number is None or number in taken:
            number = next(n for n in range(len(taken) + 1) if n not in taken)
        return number

    def is_long(self, efer: bytes) -> bool:
        """Whether an EFER says long mode; one that does is remembered in `long_efer`."""
        if not int(efer, 16) & _LMA:
            return False
        if len(self.long_efer) < 64:
            self.long_efer.add(efer)
        return True

    def new_tables(self, tr: bytes, idt: bytes, efer: bytes) -> Tables:
        """Those of a register dump, as printed, that is not in `tables`; `efer` empty: there was no dump."""
        base = int(tr or b"0", 16)
        table = int(idt or b"0", 16)
        if not efer:
            # No register dump: the CPU is known if there is only one.
            numbers = {*self._of_tr.values(), *self.seen}
            return Tables(min(numbers, default=0), 0, 0, len(numbers) <= 1)
        if len(tr) == 8 and int(efer, 16) & _LMA:
            # A dump in 32-bit code of a 64-bit system cuts the TR base to 32 bits.
            base = next((b for b in self._of_tr if b & 0xFFFFFFFF == base), base)
        if base in self._of_tr:
            cpu = self._of_tr[base]
        elif base == 0 or self.single:
            cpu = 0  # before LTR nothing names the CPU
        else:
            cpu = self._free_number()
            self._of_tr[base] = cpu
        tables = Tables(cpu, base, table, True)
        if len(self.tables) < MAX_TABLES:
            self.tables[tr, idt] = tables
        return tables

    def _free_number(self) -> int:
        taken = set(self._of_tr.values())
        if len(taken) >= MAX_CPUS:
            raise FormatError(self.path, f"more than {MAX_CPUS} different TR bases: not one machine", 0)
        return next(n for n in range(MAX_CPUS) if n not in taken)
