"""QEMU log items into native events: sources, CPUs, tables, failed deliveries, a plugin's returns and stores."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from tracedbg import wire, x86
from tracedbg.errors import FormatError
from tracedbg.formats import qemu_monitor
from tracedbg.formats.qemu_monitor import Snapshot
from tracedbg.formats.qemu_text import NO_OLD, Attempt, Item, Note, Other, Plugin
from tracedbg.layout import Idt, Layout, Tss
from tracedbg.state import EventFlag, Kind, Known, Source
from tracedbg.writer import TraceWriter

MAX_CPUS = wire.MAX_CPUS
HOLD = 8  # events that may stand before one with a lower number: the counter is read before the line is printed
KEEP = 256  # newest records kept back from the file: the next lines may show that a delivery failed
FLUSH = 8192
MAX_TABLES = 1 << 16  # pairs of TR and IDT bases remembered

_LMA = 1 << 10
_ATTEMPT_KNOWN = int(
    Known.RIP | Known.RSP | Known.SOURCE_INDEX | Known.CPU | Known.CS | Known.SS | Known.ARG | Known.SOURCE
)
_U64 = (1 << 64) - 1
_PACK = wire.EVENT_PACK.pack
_SIZE = wire.EVENT_SIZE
_AT_KNOWN = 58  # offsets in a record
_AT_FLAGS = 63
_AT_ADDR = 24
_VERBS = {b"swapgs": Kind.GS, b"syscall": Kind.SYSCALL, b"sysret": Kind.SYSRET}
_RETURN_KNOWN = int(
    Known.RIP | Known.RSP | Known.ADDR | Known.VALUE | Known.RFLAGS | Known.CPU | Known.CS | Known.SS
)
_WRITE_KNOWN = int(Known.RIP | Known.ADDR | Known.VALUE | Known.CPU | Known.ARG)


def _never_canonical(addr: int) -> bool:
    """Not even with 57-bit linear addresses (LA57): the log does not say which are in use."""
    return 1 << 56 <= addr & _U64 < (1 << 64) - (1 << 56)


@dataclass(slots=True)
class Tables:
    """What the register dumps of one (TR, IDT) pair mean."""

    cpu: int
    tr: int
    idt: int
    known: bool  # the CPU is known
    count: int = 0  # 64-bit events


@dataclass(slots=True)
class _Cpu:
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


class Events:
    """Turns items into records; one per conversion."""

    def __init__(self, path: str, writer: TraceWriter, snapshots: list[Snapshot], given: Layout) -> None:
        self.path = path
        self.writer = writer
        self.snapshots = snapshots
        self.given = given
        self.counts: Counter[str] = Counter()
        self.out = bytearray()
        self.base = 0  # index of the first record in `out`
        self.cpus: dict[int, _Cpu] = {}
        self.tables: dict[tuple[bytes, bytes], Tables] = {}
        self.known_tables: dict[tuple[int, int], list[tuple[Tss, Idt]]] = {}
        self.long_efer: set[bytes] = set()
        self.cpu_of_tr: dict[int, int] = {}
        self.thread_cpu: int | None = None
        self.single = False  # the log says that there is one CPU only
        self.resets: set[int] = set()
        self.expected: int | None = None
        self.held: list[Item] = []
        self.held_attempts = 0
        self.plugin = False
        for number, cpu in enumerate(given.cpus):
            if cpu.tss is not None and given.tss[cpu.tss].base:
                self.cpu_of_tr.setdefault(given.tss[cpu.tss].base, number)
        for snapshot in snapshots:
            for number, block in sorted(snapshot.cpus.items()):
                if block.tr:
                    self.cpu_of_tr.setdefault(block.tr, number)

    # -- the order of events ------------------------------------------------------------------------------------------

    def run(self, batches: Iterator[list[Item]]) -> None:
        """One log."""
        for batch in batches:
            for item in batch:
                if not self.held and type(item) is Attempt and item.number == self.expected:
                    self.expected += 1
                    self.attempt(item)
                else:
                    self._ordered(item)
            if len(self.out) > FLUSH * _SIZE:
                self._flush(KEEP)
        self._release(True)

    def run_threads(self, streams: list[Iterator[list[Item]]]) -> None:
        """One log a vCPU thread: QEMU numbers the events of all threads with one counter."""
        cpus: dict[int, int] = {}

        def keyed(stream: Iterator[list[Item]], number: int) -> Iterator[tuple[int, int, int, Item]]:
            at, order = -1, 0
            for batch in stream:
                for item in batch:
                    if type(item) is Attempt:
                        at = max(at, item.number)
                    order += 1
                    yield at, number, order, item

        for _, stream, _, item in heapq.merge(*(keyed(s, n) for n, s in enumerate(streams)), key=lambda k: k[:3]):
            if type(item) is Attempt and stream not in cpus:
                cpus[stream] = self._thread(item, set(cpus.values()))
            # Before its first event a thread is not known to be a vCPU's.
            self.thread_cpu = cpus.get(stream)
            if type(item) is not Attempt:
                self.other(item)
                continue
            if self.expected is not None and item.number > self.expected:
                self._gap(item.number - self.expected)
            self.expected = max(self.expected or 0, item.number + 1)
            self.attempt(item)
            if len(self.out) > FLUSH * _SIZE:
                self._flush(KEEP)

    def _thread(self, item: Attempt, taken: set[int]) -> int:
        number = self.cpu_of_tr.get(int(item.tr or b"0", 16))
        if number is None or number in taken:
            number = next(n for n in range(len(taken) + 1) if n not in taken)
        return number

    def _ordered(self, item: Item) -> None:
        """An item that is no attempt, or whose number is not the next one."""
        if type(item) is not Attempt:
            if self.held:
                self.held.append(item)
                if len(self.held) > HOLD * 64:
                    self._release(True)
            else:
                self.other(item)
            return
        if self.expected is None:
            self.expected = item.number
        if item.number < self.expected and self.expected - item.number > HOLD:
            # The counter began anew: another run was appended. What lies between is not known.
            self._release(True)
            self.counts["restarts"] += 1
            self._gap(None)
            self.expected = item.number
        self.held.append(item)
        self.held_attempts += 1
        self._release(self.held_attempts > HOLD)

    def _release(self, force: bool) -> None:
        """Pass on what is held, in the log's own order, once no number is missing before it (`force`: in spite of one)."""
        if self.expected is None:
            return
        numbers = {i.number for i in self.held if type(i) is Attempt and i.number >= self.expected}
        if numbers and not force and max(numbers) - self.expected + 1 != len(numbers):
            return
        held, self.held, self.held_attempts = self.held, [], 0
        for item in held:
            if type(item) is not Attempt:
                self.other(item)
                continue
            if item.number > self.expected:
                missing = item.number - self.expected - sum(self.expected <= n < item.number for n in numbers)
                if missing:
                    self._gap(missing)
            elif item.number < self.expected and item.number not in numbers:
                # Two threads read the counter before either of them raised it.
                self.counts["numbers_twice"] += 1
            numbers.discard(item.number)
            self.expected = max(self.expected, item.number + 1)
            self.attempt(item)

    def _gap(self, lost: int | None) -> None:
        self.counts["gaps"] += 1
        if lost is not None:
            self.counts["lost"] += lost
        known = Known.VALUE if lost is not None else Known(0)
        self._record(Kind.GAP, known, value=min(lost or 0, (1 << 64) - 1))
        for cpu in self.cpus.values():
            self._settle(cpu)
            cpu.last, cpu.return_at = None, -1

    # -- attempts -------------------------------------------------------------------------------------------------------

    def attempt(self, a: Attempt) -> None:
        """One `v=` line."""
        (number, vector, code, soft, cs, ip, ss, sp, cr2, rflags, tr, idt, efer, smm, _, serviced, damaged, time) = a
        tables = self.tables.get((tr, idt))
        if tables is None:
            tables = self._new_tables(tr, idt, efer)
        number_of_cpu = tables.cpu if self.thread_cpu is None else self.thread_cpu
        cpu = self.cpus.get(number_of_cpu)
        if cpu is None:
            cpu = self._new_cpu(number_of_cpu)
        elif not tables.known and self.thread_cpu is None:
            cpu = _Cpu()  # whose state this is nobody knows
        if cpu.pushes or cpu.iret is not None:
            self._settle(cpu)
            cpu.pushes = []
        # Plain numbers of Source, Known and EventFlag from here on: enum members would double the time of this path.
        if soft:
            source = 4
        elif vector == 2:
            source = 8 if serviced else 2
        elif vector == 18:
            source = 8 if serviced else 3
        elif vector < 32 and not serviced:
            source = 1
        else:
            source = 8
        flags = 0
        known = _ATTEMPT_KNOWN
        if efer:
            if efer in self.long_efer or self._is_long(efer):
                tables.count += 1
                cpu.long_mode = True
            else:
                flags = 64
                cpu.long_mode = False
                self.counts["legacy"] += 1
            if cpu.tr != tables.tr or cpu.idt != tables.idt:
                self._load(cpu, number_of_cpu, tables)
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
            if last is not None and last.ip == ip and last.sp == sp and self._failed(cpu, last, a):
                self._mark_failed(cpu, last, a)
            if cpu.return_at >= 0 and cpu.return_rip == ip:
                self._patch_flags(cpu.return_at, EventFlag.FAULTED)
        cpu.last = a
        cpu.last_source = source
        cpu.last_at = self.base + len(self.out) // _SIZE
        cpu.return_at = -1
        self.out += _PACK(
            time, ip, sp, 0, value, rflags, code, number & 0xFFFFFFFF, number_of_cpu, cs, ss, known, 1, vector, source, flags
        )
        if self.plugin:
            words = [ss, sp, rflags, cs, ip + (code if source == 4 else 0)]
            if source == 1 and vector in x86.ERROR_CODE_VECTORS:
                words.append(code)
            cpu.pushes = words

    def _new_tables(self, tr: bytes, idt: bytes, efer: bytes) -> Tables:
        base = int(tr or b"0", 16)
        table = int(idt or b"0", 16)
        if not efer:
            # No register dump: the CPU is known if there is only one.
            numbers = {*self.cpu_of_tr.values(), *self.cpus}
            return Tables(min(numbers, default=0), 0, 0, len(numbers) <= 1)
        if len(tr) == 8 and int(efer, 16) & _LMA:
            # A dump in 32-bit code of a 64-bit system cuts the TR base to 32 bits.
            base = next((b for b in self.cpu_of_tr if b & 0xFFFFFFFF == base), base)
        if base in self.cpu_of_tr:
            cpu = self.cpu_of_tr[base]
        elif base == 0 or self.single:
            cpu = 0  # before LTR nothing names the CPU
        else:
            cpu = self._free_number()
            self.cpu_of_tr[base] = cpu
        tables = Tables(cpu, base, table, True)
        if len(self.tables) < MAX_TABLES:
            self.tables[tr, idt] = tables
        return tables

    def _is_long(self, efer: bytes) -> bool:
        if not int(efer, 16) & _LMA:
            return False
        if len(self.long_efer) < 64:
            self.long_efer.add(efer)
        return True

    def _free_number(self) -> int:
        taken = set(self.cpu_of_tr.values())
        if len(taken) >= MAX_CPUS:
            raise FormatError(self.path, f"more than {MAX_CPUS} different TR bases: not one machine", 0)
        return next(n for n in range(MAX_CPUS) if n not in taken)

    def _new_cpu(self, number: int) -> _Cpu:
        if number >= MAX_CPUS:
            raise FormatError(self.path, f"absurd CPU number {number}", 0)
        cpu = self.cpus[number] = _Cpu()
        return cpu

    def _load(self, cpu: _Cpu, number: int, tables: Tables) -> None:
        if cpu.tr != tables.tr:
            cpu.tr = tables.tr
            self._record(Kind.LTR, Known.CPU | Known.VALUE, cpu=number, value=tables.tr)
        if cpu.idt != tables.idt:
            cpu.idt = tables.idt
            self._record(Kind.LIDT, Known.CPU | Known.VALUE, cpu=number, value=tables.idt)

    # -- failed deliveries -------------------------------------------------------------------------------------------------

    def _failed(self, cpu: _Cpu, a: Attempt, b: Attempt) -> bool:
        """Whether attempt `a` failed with exception `b`, the next event of the CPU, at the same RIP and RSP.

        A handler that ran and came back may be interrupted at the same place, so the exception itself must say that it
        comes from the delivery: by QEMU's check_exception line, by its error code or by its address.
        """
        if a.cs != b.cs or (a.rflags >= 0 and b.rflags >= 0 and a.rflags != b.rflags):
            return False
        if b.old >= 0 and b.old != NO_OLD:
            return cpu.last_source == Source.EXCEPTION and b.old == a.vector
        if b.vector == x86.DOUBLE_FAULT:
            # #DF comes from nothing else than a failed delivery of one of these.
            return cpu.last_source == Source.EXCEPTION and a.vector in (0, 10, 11, 12, 13, 14)
        gate_bases = self._frame_tops(cpu, a)
        if b.vector in (10, 11, 12, 13):
            if b.code & 2:
                return b.code >> 3 == a.vector
            if a.soft and (a.vector != 3 or b.code):
                return True  # INT n itself raises nothing else
            if b.code:
                return any(b.code & 0xFFFC == selector & 0xFFFC for _, selector in gate_bases)
            return any(_never_canonical(top - 1) for top, _ in gate_bases)
        if b.vector != x86.PAGE_FAULT or b.code & 0x14 or b.cr2 < 0:
            return False  # user accesses and fetches are not the delivery's
        if x86.cpl(a.cs) == 3:
            return True  # at CPL 3 only a delivery accesses memory as supervisor
        if cpu.idt is not None and cpu.idt <= b.cr2 < cpu.idt + 4096 and b.cr2 - cpu.idt >> 4 == a.vector:
            return True
        if cpu.tr and cpu.tr <= b.cr2 < cpu.tr + qemu_monitor.TSS_BYTES:
            return True
        if not b.code & 2:
            return False
        tops = [top for top, _ in gate_bases] or [a.sp & ~15]
        if any(top - 48 <= b.cr2 < top for top in tops):
            return True
        return bool(a.soft) and a.vector != 3 and not gate_bases

    def _frame_tops(self, cpu: _Cpu, a: Attempt) -> list[tuple[int, int]]:
        """Where the frame of `a` would begin and the gate's selector, by each snapshot that knows; empty: unknown."""
        result = []
        for tss, idt in self._known_tables(cpu):
            gate = idt.gates.get(a.vector)
            if gate is None:
                continue
            top: int | None
            if gate.ist:
                top = tss.ist[gate.ist]
            elif x86.cpl(a.cs) == 3:
                top = tss.rsp[0]
            else:
                top = a.sp
            if top is not None:
                result.append((top & ~15, gate.selector))
        return result

    def _known_tables(self, cpu: _Cpu) -> list[tuple[Tss, Idt]]:
        if cpu.tr is None or cpu.idt is None:
            return []
        found = self.known_tables.get((cpu.tr, cpu.idt))
        if found is None:
            found = []
            found += [(t, i) for t in self.given.tss for i in self.given.idts if t.base == cpu.tr and i.base == cpu.idt]
            for snapshot in self.snapshots:
                tss, idt = snapshot.tss_at(cpu.tr), snapshot.idt_at(cpu.idt)
                if tss is not None and idt is not None:
                    found.append((tss, idt))
            if len(self.known_tables) < MAX_TABLES:
                self.known_tables[cpu.tr, cpu.idt] = found
        return found

    def _mark_failed(self, cpu: _Cpu, a: Attempt, b: Attempt) -> None:
        self.counts["failed"] += 1
        self._patch_flags(cpu.last_at, EventFlag.FAILED)
        words = self._words_stored(cpu, a, b)
        if words is not None:
            self._patch_addr(cpu.last_at, words)

    def _words_stored(self, cpu: _Cpu, a: Attempt, b: Attempt) -> int | None:
        """How many words of the frame were stored before the fault; None: not certain."""
        if b.vector in (10, 11, 12, 13):
            return 0  # raised by the gate, the TSS or the stack's address, before the first push
        cr2 = b.cr2  # of a #DF: that of the page fault which became one
        if cr2 < 0:
            return None
        tops = {top for top, _ in self._frame_tops(cpu, a)}
        if not tops and x86.cpl(a.cs) != 3:
            # Gate unknown: without IST the frame lies at RSP. Only a fault just there says so.
            tops = {a.sp & ~15}
        for top in tops:
            below = top - 8 - cr2
            if len(tops) == 1 and below >= 0 and below % 8 == 0 and below <= 40:
                return below // 8
        return None

    def _patch_flags(self, index: int, flag: EventFlag) -> None:
        at = (index - self.base) * _SIZE
        if at >= 0:
            self.out[at + _AT_FLAGS] |= int(flag)
        else:
            self.counts["late"] += 1

    def _patch_addr(self, index: int, words: int) -> None:
        at = (index - self.base) * _SIZE
        if at >= 0:
            self.out[at + _AT_ADDR : at + _AT_ADDR + 8] = words.to_bytes(8, "little")
            self.out[at + _AT_KNOWN] |= int(Known.ADDR)

    # -- other items -------------------------------------------------------------------------------------------------------

    def other(self, item: Item) -> None:
        """Everything that is no attempt."""
        if type(item) is Plugin:
            self._plugin_line(item)
        elif type(item) is Other:
            self._note(item)
        elif type(item) is Attempt:
            self.attempt(item)

    def _note(self, item: Other) -> None:
        if item.note == Note.RESET:
            self.counts["resets"] += 1
            self.resets.add(item.a)
            self.single = self.resets == {0}
            # Nothing came before the resets at power-on; there a reset says nothing.
            if item.a in self.cpus:
                self._record(Kind.INIT, Known.CPU | Known.ARG, cpu=item.a)
                self.cpus[item.a] = _Cpu()
        elif item.note == Note.SHUTDOWN:
            self._shutdown(item)
        else:
            self.counts["smm"] += 1
            number = self._only_cpu()
            if number is not None and number in self.cpus:
                kind = Kind.SMI if item.note == Note.SMI else Kind.RSM
                self._record(kind, Known.CPU, cpu=number)

    def _shutdown(self, item: Other) -> None:
        self.counts["shutdowns"] += 1
        number = item.a if item.a >= 0 else None
        if number is None:
            # "Triple fault" names no CPU: it is the one that a #DF was to be delivered to last.
            double = [n for n, c in self.cpus.items() if c.last is not None and c.last.vector == x86.DOUBLE_FAULT]
            number = double[0] if len(double) == 1 else self._only_cpu()
            for n in double if len(double) == 1 else ():
                self.counts["failed"] += 1
                self._patch_flags(self.cpus[n].last_at, EventFlag.FAILED)
        if number is None or number >= MAX_CPUS:
            self._record(Kind.SHUTDOWN, Known.ARG, arg=item.b)
        else:
            self._record(Kind.SHUTDOWN, Known.CPU | Known.ARG, cpu=number, arg=item.b)
            self.cpus.setdefault(number, _Cpu()).last = None

    def _only_cpu(self) -> int | None:
        if self.thread_cpu is not None:
            return self.thread_cpu
        return next(iter(self.cpus), 0) if len(self.cpus) <= 1 else None

    def _plugin_line(self, item: Plugin) -> None:
        self.plugin = True
        number = item.cpu
        cpu = self.cpus.get(number)
        if cpu is None or not cpu.long_mode:
            # In real and protected mode the plugin reads frames as if they were 64-bit ones.
            self.counts["plugin_early"] += 1
            return
        verb = item.verb
        if verb == b"st":
            self._store(cpu, item)
            return
        if verb == b"iret-frame" and cpu.iret is not None and cpu.iret == int(item.fields[0], 16):
            cpu.iret = None
        self._settle(cpu)
        if verb == b"iret-frame":
            pc, frame, rip, cs, rflags, rsp, ss = (int(f, 16) for f in item.fields)
            cpu.pushes = []
            cpu.last = None
            cpu.return_at, cpu.return_rip = self.base + len(self.out) // _SIZE, pc
            self.counts["returns"] += 1
            self.out += _PACK(
                0, pc, frame, rip, rsp, rflags & 0xFFFFFFFF, 0, 0, number, cs & 0xFFFF, ss & 0xFFFF,
                _RETURN_KNOWN, 3, 0, 0, 0,
            )  # fmt: skip
            return
        pc = int(item.fields[0], 16)
        cpu.pushes = []
        if verb == b"iret":
            cpu.last = None
            cpu.iret = pc
            return
        kind = _VERBS.get(verb)
        if kind is None:
            self.counts["plugin_other"] += 1
            return
        cpu.last, cpu.return_at = None, -1
        self.counts["plugin_events"] += 1
        self._record(kind, Known.CPU | Known.RIP, cpu=number, rip=pc)

    def _store(self, cpu: _Cpu, item: Plugin) -> None:
        if cpu.pushes:
            # The CPU's own pushes show up as stores of the instruction before, one after the other at descending addresses.
            held = cpu.pushed
            pc, va, size, value = item.fields
            want = cpu.pushes[len(held)]
            got = int(value or b"0", 16)
            fits = size == b"8" and (want == got if len(held) != 2 else (want ^ got) & ~x86.RFLAGS_RF == 0)
            if fits and held:
                fits = held[-1].fields[0] == pc and int(held[-1].fields[1], 16) - 8 == int(va, 16)
            if fits:
                held.append(item)
                if len(held) == len(cpu.pushes):
                    self.counts["cpu_pushes_dropped"] += len(held)
                    held.clear()
                    cpu.pushes = []
                return
            cpu.pushes = []
        self._settle(cpu)
        self._write(item)

    def _settle(self, cpu: _Cpu) -> None:
        """Pass on what was held back for a line that did not come."""
        held, cpu.pushed = cpu.pushed, []
        for item in held:
            self._write(item)
        if cpu.iret is not None:
            number = next(n for n, c in self.cpus.items() if c is cpu)
            self.counts["returns"] += 1
            self._record(Kind.RETURN, Known.CPU | Known.RIP, cpu=number, rip=cpu.iret)
            cpu.iret = None

    def _write(self, item: Plugin) -> None:
        pc, va, size, value = item.fields
        length = int(size)
        self.counts["writes"] += 1
        rip, addr, number = int(pc, 16), int(va, 16), int(value or b"0", 16)
        known = _WRITE_KNOWN if value else _WRITE_KNOWN & ~16
        while length > 0:
            part = min(length, 8)
            low = number & ((1 << 8 * part) - 1)
            self.out += _PACK(0, rip, 0, addr & _U64, low, 0, 0, 0, item.cpu, 0, 0, known, 4, part, 0, 0)
            addr += part
            number >>= 8 * part
            length -= part

    # -- records -----------------------------------------------------------------------------------------------------------

    def _record(
        self, kind: Kind, known: int, *, cpu: int = 0, rip: int = 0, value: int = 0, arg: int = 0
    ) -> None:
        self.out += _PACK(0, rip, 0, 0, value, 0, 0, 0, cpu, 0, 0, int(known), int(kind), arg, 0, 0)

    def close(self) -> None:
        """Write what is held back; the log is at its end."""
        for cpu in self.cpus.values():
            self._settle(cpu)
        self._flush(0)

    def _flush(self, keep: int) -> None:
        count = max(len(self.out) // _SIZE - keep, 0)
        self.writer.append(bytes(self.out[: count * _SIZE]))
        del self.out[: count * _SIZE]
        self.base += count
