"""Lines of the recording plugin in a QEMU log: IRETs with what they popped, stores of software, ring changes."""

from __future__ import annotations

from collections import Counter

from tracedbg import x86
from tracedbg.formats.qemu.cpus import Cpu, Cpus
from tracedbg.formats.qemu.items import Plugin
from tracedbg.formats.qemu.records import PACK, Records
from tracedbg.state import Kind, Known

_U64 = (1 << 64) - 1
_VERBS = {b"swapgs": Kind.GS, b"syscall": Kind.SYSCALL, b"sysret": Kind.SYSRET}
FRAME_FIELDS = 7  # of an iret-frame: its pc, where the frame is, and what it holds
_RETURN_KNOWN = int(
    Known.RIP | Known.RSP | Known.ADDR | Known.VALUE | Known.RFLAGS | Known.CPU | Known.CS | Known.SS
)
_WRITE_KNOWN = int(Known.RIP | Known.ADDR | Known.VALUE | Known.CPU | Known.ARG)


class PluginLines:
    """Turns the plugin's lines into records."""

    def __init__(self, records: Records, cpus: Cpus, counts: Counter[str]) -> None:
        self.records = records
        self.cpus = cpus
        self.counts = counts
        self.seen = False

    def line(self, item: Plugin) -> None:
        """One line."""
        self.seen = True
        number = item.cpu
        cpu = self.cpus.seen.get(number)
        if cpu is None or not cpu.long_mode:
            # In real and protected mode the plugin reads frames as if they were 64-bit ones.
            self.counts["plugin_early"] += 1
            return
        verb = item.verb
        if (verb == b"st" and item.fields[1] is None) or (verb == b"iret-frame" and len(item.fields) != FRAME_FIELDS):
            self.counts["plugin_unread"] += 1
            return
        if verb == b"st":
            self._store(cpu, item)
            return
        if verb == b"iret-frame" and cpu.iret is not None and cpu.iret == int(item.fields[0], 16):
            cpu.iret = None
        self.settle(cpu)
        if verb == b"iret-frame":
            self._return(number, cpu, item)
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
        self.records.record(kind, Known.CPU | Known.RIP, cpu=number, rip=pc)

    def settle(self, cpu: Cpu) -> None:
        """Pass on what was held back for a line that did not come."""
        held, cpu.pushed = cpu.pushed, []
        for item in held:
            self._write(item)
        if cpu.iret is not None:
            self.counts["returns"] += 1
            self.records.record(Kind.RETURN, Known.CPU | Known.RIP, cpu=self.cpus.number_of(cpu), rip=cpu.iret)
            cpu.iret = None

    def _return(self, number: int, cpu: Cpu, item: Plugin) -> None:
        pc, frame, rip, cs, rflags, rsp, ss = (int(f, 16) for f in item.fields)
        cpu.pushes = []
        cpu.last = None
        cpu.return_at, cpu.return_rip = self.records.count, pc
        self.counts["returns"] += 1
        self.records.out += PACK(
            0, pc, frame, rip, rsp, rflags & 0xFFFFFFFF, 0, 0, number, cs & 0xFFFF, ss & 0xFFFF,
            _RETURN_KNOWN, 3, 0, 0, 0,
        )  # fmt: skip

    def _store(self, cpu: Cpu, item: Plugin) -> None:
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
        self.settle(cpu)
        self._write(item)

    def _write(self, item: Plugin) -> None:
        pc, va, size, value = item.fields
        length = int(size)
        self.counts["writes"] += 1
        rip, addr, number = int(pc, 16), int(va, 16), int(value or b"0", 16)
        known = _WRITE_KNOWN if value else _WRITE_KNOWN & ~16
        while length > 0:
            part = min(length, 8)
            low = number & ((1 << 8 * part) - 1)
            self.records.out += PACK(0, rip, 0, addr & _U64, low, 0, 0, 0, item.cpu, 0, 0, known, 4, part, 0, 0)
            addr += part
            number >>= 8 * part
            length -= part
