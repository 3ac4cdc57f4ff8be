"""QEMU log items into native events: sources, tables, failed deliveries, resets, shutdowns."""

from __future__ import annotations

from collections import Counter

from tracedbg import x86
from tracedbg.formats.qemu.cpus import MAX_CPUS, Cpu, Cpus
from tracedbg.formats.qemu.failed import Failures
from tracedbg.formats.qemu.items import Attempt, Item, Note, Other, Plugin
from tracedbg.formats.qemu.monitor import Snapshot
from tracedbg.formats.qemu.plugin import PluginLines
from tracedbg.formats.qemu.records import PACK, SIZE, Records
from tracedbg.layout import Layout
from tracedbg.state import EventFlag, Kind, Known
from tracedbg.writer import TraceWriter

ATTEMPT_KNOWN = int(
    Known.RIP | Known.RSP | Known.SOURCE_INDEX | Known.CPU | Known.CS | Known.SS | Known.ARG | Known.SOURCE
)


class Events:
    """Turns items into records; one per conversion."""

    def __init__(self, path: str, writer: TraceWriter, snapshots: list[Snapshot], given: Layout) -> None:
        self.counts: Counter[str] = Counter()
        self.records = Records(writer)
        self.cpus = Cpus(path, snapshots, given)
        self.failures = Failures(snapshots, given)
        self.plugin = PluginLines(self.records, self.cpus, self.counts)
        self.thread_cpu: int | None = None  # in the log of one thread
        self.stale: set[int] | None = set()  # CPUs whose state here is newer than the scanner's; None: all
        self._resets: set[int] = set()

    # -- attempts -----------------------------------------------------------------------------------------------------

    def attempt(self, a: Attempt) -> None:
        """One `v=` line."""
        (number, vector, code, soft, cs, ip, ss, sp, cr2, rflags, tr, idt, efer, smm, _, serviced, damaged, time) = a
        cpus = self.cpus
        tables = cpus.tables.get((tr, idt))
        if tables is None:
            tables = cpus.new_tables(tr, idt, efer)
        number_of_cpu = tables.cpu if self.thread_cpu is None else self.thread_cpu
        cpu = cpus.seen.get(number_of_cpu)
        if cpu is None:
            cpu = cpus.add(number_of_cpu)
        elif not tables.known and self.thread_cpu is None:
            cpu = Cpu()  # whose state this is nobody knows
        if self.stale is not None:
            self.stale.add(number_of_cpu)
        if cpu.pushes or cpu.iret is not None:
            self.plugin.settle(cpu)
            cpu.pushes = []
        # Plain numbers of Source, Known and EventFlag from here on: enum members would double the time of this path.
        if soft:
            source = 4
        elif serviced:
            source = serviced
        elif vector == 2:
            source = 2
        elif vector == 18:
            source = 3
        elif vector < 32:
            source = 1
        else:
            source = 8
        flags = 0
        known = ATTEMPT_KNOWN
        if efer:
            if efer in cpus.long_efer or cpus.is_long(efer):
                tables.count += 1
                cpu.long_mode = True
            else:
                flags = 64
                cpu.long_mode = False
                self.counts["legacy"] += 1
            if cpu.tr != tables.tr or cpu.idt != tables.idt:
                self._load(cpu, number_of_cpu, tables.tr, tables.idt)
            if not tables.tr:
                self.counts["before_ltr"] += 1
        if not tables.known and self.thread_cpu is None:
            self.counts["cpu_unknown"] += 1
            known &= ~int(Known.CPU)
        if damaged:
            flags |= 4
        if smm:
            flags |= 16
        if rflags >= 0:
            known |= 32
        else:
            rflags = 0
        value = 0
        if vector == 14 and source == 1 and cr2 >= 0:
            value = cr2
            known |= 16
        if source == 4:
            code = 1 if vector == 3 else 2
            known |= 64
        elif source == 1 and vector in x86.ERROR_CODE_VECTORS:
            known |= 64
        else:
            code = 0
        if time >= 0:
            known |= 1
        else:
            time = 0
        if source == 1:
            last = cpu.last
            if last is not None and last.ip == ip and last.sp == sp and self.failures.failed(cpu, last, a):
                self._mark_failed(cpu, last, a)
            if cpu.return_at >= 0 and cpu.return_rip == ip:
                self.records.add_flags(cpu.return_at, EventFlag.FAULTED)
        records = self.records
        cpu.last = a
        cpu.last_source = source
        cpu.last_at = records.base + len(records.out) // SIZE
        cpu.return_at = -1
        records.out += PACK(
            time, ip, sp, 0, value, rflags, code, number & 0xFFFFFFFF, number_of_cpu, cs, ss, known, 1, vector, source, flags
        )
        if self.plugin.seen:
            words = [ss, sp, rflags, cs, ip + (code if source == 4 else 0)]
            if source == 1 and vector in x86.ERROR_CODE_VECTORS:
                words.append(code)
            cpu.pushes = words

    def _load(self, cpu: Cpu, number: int, tr: int, idt: int) -> None:
        if cpu.tr != tr:
            cpu.tr = tr
            self.records.record(Kind.LTR, Known.CPU | Known.VALUE, cpu=number, value=tr)
        if cpu.idt != idt:
            cpu.idt = idt
            self.records.record(Kind.LIDT, Known.CPU | Known.VALUE, cpu=number, value=idt)

    def _mark_failed(self, cpu: Cpu, a: Attempt, b: Attempt) -> None:
        self.counts["failed"] += 1
        self.records.add_flags(cpu.last_at, EventFlag.FAILED)
        words = self.failures.words_stored(cpu, a, b)
        if words is not None:
            self.records.set_addr(cpu.last_at, words)

    # -- other items --------------------------------------------------------------------------------------------------

    def other(self, item: Item) -> None:
        """Everything that is no attempt."""
        if type(item) is Plugin:
            self.plugin.line(item)
            return
        self.stale = None
        if type(item) is Other:
            self._note(item)
        elif type(item) is Attempt:
            self.attempt(item)

    def gap(self, lost: int | None) -> None:
        """Attempts are missing (None: nobody knows how many)."""
        self.stale = None
        self.counts["gaps"] += 1
        if lost is not None:
            self.counts["lost"] += lost
        known = Known.VALUE if lost is not None else Known(0)
        self.records.record(Kind.GAP, known, value=min(lost or 0, (1 << 64) - 1))
        for cpu in self.cpus.seen.values():
            self.plugin.settle(cpu)
            cpu.last, cpu.return_at = None, -1

    def close(self) -> None:
        """Write what is held back; the log is at its end."""
        for cpu in self.cpus.seen.values():
            self.plugin.settle(cpu)
        self.records.flush()
        if self.records.late:
            self.counts["late"] += self.records.late

    def _note(self, item: Other) -> None:
        seen = self.cpus.seen
        if item.note == Note.RESET:
            self.counts["resets"] += 1
            self._resets.add(item.a)
            self.cpus.single = self._resets == {0}
            # Nothing came before the resets at power-on; there a reset says nothing.
            if item.a in seen:
                self.records.record(Kind.INIT, Known.CPU | Known.ARG, cpu=item.a, time=item.time)
                seen[item.a] = Cpu()
        elif item.note == Note.SHUTDOWN:
            self._shutdown(item)
        else:
            self.counts["smm"] += 1
            number = self._only_cpu()
            if number is not None and number in seen:
                kind = Kind.SMI if item.note == Note.SMI else Kind.RSM
                self.records.record(kind, Known.CPU, cpu=number, time=item.time)

    def _shutdown(self, item: Other) -> None:
        self.counts["shutdowns"] += 1
        seen = self.cpus.seen
        number = item.a if item.a >= 0 else None
        if number is None:
            # "Triple fault" names no CPU: it is the one that a #DF was to be delivered to last.
            double = [n for n, c in seen.items() if c.last is not None and c.last.vector == x86.DOUBLE_FAULT]
            number = double[0] if len(double) == 1 else self._only_cpu()
            for n in double if len(double) == 1 else ():
                self.counts["failed"] += 1
                self.records.add_flags(seen[n].last_at, EventFlag.FAILED)
        if number is None or number >= MAX_CPUS:
            self.records.record(Kind.SHUTDOWN, Known.ARG, arg=item.b, time=item.time)
        else:
            self.records.record(Kind.SHUTDOWN, Known.CPU | Known.ARG, cpu=number, arg=item.b, time=item.time)
            seen.setdefault(number, Cpu()).last = None

    def _only_cpu(self) -> int | None:
        return self.cpus.only() if self.thread_cpu is None else self.thread_cpu
