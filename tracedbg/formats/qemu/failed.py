"""Which attempts of a QEMU log failed: a `v=` line is printed before the delivery, and a failed one looks the same."""

from __future__ import annotations

from tracedbg import x86
from tracedbg.formats.qemu import monitor as qemu_monitor
from tracedbg.formats.qemu.cpus import MAX_TABLES, Cpu
from tracedbg.formats.qemu.items import NO_OLD, Attempt
from tracedbg.formats.qemu.monitor import Snapshot
from tracedbg.layout import Idt, Layout, Tss
from tracedbg.state import Source

_U64 = (1 << 64) - 1


def _never_canonical(addr: int) -> bool:
    """Not even with 57-bit linear addresses (LA57): the log does not say which are in use."""
    return 1 << 56 <= addr & _U64 < (1 << 64) - (1 << 56)


class Failures:
    """Judges attempts by the exception that comes next, with the tables of all snapshots and those given."""

    def __init__(self, snapshots: list[Snapshot], given: Layout) -> None:
        self._snapshots = snapshots
        self._given = given
        self._known: dict[tuple[int, int], list[tuple[Tss, Idt]]] = {}

    def failed(self, cpu: Cpu, a: Attempt, b: Attempt) -> bool:
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

    def words_stored(self, cpu: Cpu, a: Attempt, b: Attempt) -> int | None:
        """How many words of the frame of `a` were stored before the fault `b`; None: not certain."""
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

    def _frame_tops(self, cpu: Cpu, a: Attempt) -> list[tuple[int, int]]:
        """Where the frame of `a` would begin and the gate's selector, by each snapshot that knows; empty: unknown."""
        result = []
        for tss, idt in self._tables(cpu.tr, cpu.idt):
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

    def ist_tops(self, tr: int, idt: int) -> set[int]:
        """The tops of all IST stacks, rounded down to 16 as a delivery does, by each snapshot that knows."""
        return {top & ~15 for tss, _ in self._tables(tr, idt) for top in tss.ist if top is not None}

    def has_odd_top(self, tr: int, idt: int) -> bool:
        """Whether a frame that goes through a gate to an IST stack or RSP0 can begin at an address that is not canonical."""
        for tss, table in self._tables(tr, idt):
            tops = {tss.ist[gate.ist] if gate.ist else tss.rsp[0] for gate in table.gates.values()}
            if any(_never_canonical((top & ~15) - 1) for top in tops if top is not None):
                return True
        return False

    def _tables(self, tr: int | None, idt: int | None) -> list[tuple[Tss, Idt]]:
        if tr is None or idt is None:
            return []
        found = self._known.get((tr, idt))
        if found is None:
            given = self._given
            found = [(t, i) for t in given.tss for i in given.idts if t.base == tr and i.base == idt]
            for snapshot in self._snapshots:
                known_tss, known_idt = snapshot.tss_at(tr), snapshot.idt_at(idt)
                if known_tss is not None and known_idt is not None:
                    found.append((known_tss, known_idt))
            if len(self._known) < MAX_TABLES:
                self._known[tr, idt] = found
        return found
