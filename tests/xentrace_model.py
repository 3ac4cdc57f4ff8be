"""The xentrace reader once more, one record at a time and in plain Python: slow, and independent of the declaration that the
decoder in C works by. tests/test_xentrace_model.py holds the two against each other.

Layouts: Xen's xen/include/public/trace.h.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate

from tracedbg import wire
from tracedbg.state import EventFlag, Kind, Known, Source

CPU_CHANGE = 0x2001F003
LOST, WRAP = 0x1F001, 0x1F002
ROOM = 3  # events for which there must be room before a record is taken

KNOWN = {name: int(Known[name.upper()]) for name in ("rip", "addr", "value", "code", "arg", "source")} | {"flags": 0}
CPU, TIME = int(Known.CPU), int(Known.TIME)  # plain numbers: an OR of enum members costs more than all else here

SVM_REASONS = {*range(0x60, 0xA8), *range(0x400, 0x404)}
VMX_REASONS = {1, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 17, 21, 22, 23, 25, 26, 27, 28, 29, 30, 31}


@dataclass(eq=False)
class Event:
    """A native event that can still be corrected."""

    cpu: int
    kind: Kind
    time: int | None
    known: int = 0
    fields: dict[str, int] = field(default_factory=dict)

    def pack(self) -> bytes:
        f = {name: self.fields.get(name, 0) for name in ("rip", "addr", "value", "code", "arg", "source", "flags")}
        known = self.known | CPU | (0 if self.time is None else TIME)
        return wire.EVENT_PACK.pack(
            self.time or 0, f["rip"], 0, f["addr"], f["value"], 0, f["code"], 0, self.cpu, 0, 0, known, self.kind, f["arg"],
            f["source"], f["flags"],
        )  # fmt: skip


@dataclass(eq=False)
class Window:
    cpu: int
    events: list[Event] = field(default_factory=list)


@dataclass(eq=False)
class Cpu:
    """`entry` ... are numbers of the CPU's events, -1 none."""

    number: int
    made: int = 0
    tsc: int | None = None
    entry: int = -1
    exit: int = -1
    stgi: int = -1
    intr: int = -1
    irq: int = -1
    intr_vector: int = -1
    exit_event: Event | None = None

    @property
    def in_exit(self) -> bool:
        return self.exit > self.entry


class Odd(Exception):
    """A record that makes no event."""


class Model:
    """Reads a whole file. `vendor`: None, 0 VMX, 1 SVM; `held`: events that are held at most."""

    def __init__(self, data: bytes, vendor: int | None = None, held: int = 1 << 20) -> None:
        self.data = data
        self.vendor = vendor
        self.held = held
        self.out: list[bytes] = []
        self.texts: dict[str, int] = {}
        self.counts: Counter[str] = Counter()
        self.damage: list[tuple[int, str]] = []
        self.cpus: dict[int, Cpu] = {}
        self.vectors: dict[int, int] = {}
        self.old: list[Window] = []
        self.new: list[Window] = []
        self.makers: dict[int, Callable[[Cpu, int, list[int]], None]] = {
            LOST: self.lost, 0x82002: self.inject_fault, 0x82102: self.inject_fault, 0x82003: self.inject_exception,
            0x82004: self.inject_interrupt, 0x82005: self.inject_interrupt, 0x82020: self.waits, 0x8200F: self.interrupt,
            0x82010: self.nmi, 0x82015: self.machine_check, 0x82011: self.note, 0x82023: self.note, 0x82024: self.note,
            0x201003: self.pv_trap, 0x201103: self.pv_trap, 0x201004: self.pv_fault, 0x201104: self.pv_fault,
            0x802003: self.bind, 0x802006: self.bind, 0x802004: self.unbind, 0x802007: self.unmapped, 0x802008: self.handled,
            0x81001: self.vm_entry, 0x81401: self.vm_entry,
        }  # fmt: skip
        for event in (0x81002, 0x81003, 0x81102, 0x81103):
            self.makers[event] = self.makers[event | 0x400] = self.vm_exit
        self.whole = self.file()
        self.write(self.old + self.new)

    # -- windows

    def file(self) -> bool:
        at = 0
        while at < len(self.data):
            head = self.data[at : at + 12]
            if len(head) < 12:
                self.damage.append((at, "cut short"))
                return False
            header, number, size = struct.unpack("<III", head)
            if header != CPU_CHANGE or number >= 4096 or size % 4:
                self.damage.append((at, "no window begins here; the rest is not read"))
                return False
            if self.new and number <= self.new[-1].cpu:
                self.round()
            self.counts["windows"] += 1
            self.new.append(Window(number))
            at = self.window(self.cpus.setdefault(number, Cpu(number)), at + 12, size)
        return True

    def window(self, cpu: Cpu, at: int, size: int) -> int:
        end = at + size
        while at < end:
            rest = self.data[at : min(end, at + 40)]
            header = int.from_bytes(rest[:4], "little")
            length = 4 + (header >> 28 & 7) * 4 + (header >> 31) * 8
            if len(rest) < 4 or length > len(rest):
                whole = end <= len(self.data)
                self.damage.append((at, "a record is longer than its window" if whole else "cut short"))
                self.cut(cpu)
                return end
            if header == CPU_CHANGE:
                self.damage.append((at, "a window begins inside of another"))
                self.cut(cpu)
                return at
            self.room()
            self.counts["records"] += 1
            self.record(cpu, header, [*struct.unpack(f"<{length // 4 - 1}I", rest[4:length])])
            at += length
        return at

    def cut(self, cpu: Cpu) -> None:
        self.room()
        self.gap(cpu, cpu.tsc)

    def room(self) -> None:
        windows = self.old + self.new
        if sum(len(w.events) for w in windows) + ROOM > self.held:
            self.counts["unordered"] += len({w.cpu for w in windows}) > 1
            self.write(windows)
            self.old = []

    def round(self) -> None:
        old, new = self.old, [w for w in self.new if w.events]
        if old and len({w.cpu for w in old + new}) > 1:
            limit = max(e.time or 0 for w in old for e in w.events)
            for w in new:
                early = sum(1 for _ in filter(limit.__ge__, accumulate((e.time or 0 for e in w.events), max)))
                old.append(Window(w.cpu, w.events[:early]))
                del w.events[:early]
        self.write(old)
        self.old, self.new = [w for w in new if w.events], []

    def write(self, windows: list[Window]) -> None:
        """By time; equal ones in the order of the windows. A CPU's event is no older than the one before it."""
        newest: dict[int, int] = {}
        keyed = []
        for w in windows:
            for e in w.events:
                newest[w.cpu] = max(newest.get(w.cpu, 0), e.time or 0)
                keyed.append((newest[w.cpu], e))
            w.events = []
        self.out += [e.pack() for _, e in sorted(keyed, key=lambda pair: pair[0])]

    # -- records

    def record(self, cpu: Cpu, header: int, data: list[int]) -> None:
        event = header & 0x0FFFFFFF
        if event == WRAP:
            return
        if header >> 31:
            cpu.tsc = data[0] | data[1] << 32
            del data[:2]
        maker = self.makers.get(event)
        if maker is not None:
            try:
                maker(cpu, event, data)
            except (Odd, IndexError):
                self.counts["odd_records"] += 1

    def add(self, cpu: Cpu, kind: Kind, time: int | None, **fields: int) -> Event:
        known = sum(KNOWN[name] for name in fields)
        event = Event(cpu.number, kind, time, known, fields)
        self.new[-1].events.append(event)
        cpu.made += 1
        return event

    def gap(self, cpu: Cpu, time: int | None, **fields: int) -> None:
        self.add(cpu, Kind.GAP, time, **fields)
        self.counts["gaps"] += 1
        self.vectors.clear()
        cpu.entry = cpu.exit = cpu.stgi = cpu.intr = cpu.irq = -1

    def lost(self, cpu: Cpu, event: int, data: list[int]) -> None:
        first = data[2] | data[3] << 32
        self.counts["lost"] += data[0]
        self.gap(cpu, first if cpu.tsc is None else min(first, cpu.tsc), value=data[0])

    def vm_entry(self, cpu: Cpu, event: int, data: list[int]) -> None:
        cpu.entry = cpu.made
        self.add(cpu, Kind.VMENTRY, cpu.tsc)

    def vm_exit(self, cpu: Cpu, event: int, data: list[int]) -> None:
        reason, rip = data[0], data[1] | (data[2] << 32 if event & 0x100 else 0)
        if self.vendor is None:
            if event & 1 or reason in SVM_REASONS:
                self.vendor = 1
            elif reason in VMX_REASONS:
                self.vendor = 0
            else:
                self.counts["exits_of_unknown_vendor"] += 1
        more = {} if self.vendor is None else {"arg": self.vendor}
        if self.vendor == 1 and reason == 0x61:
            more["source"] = Source.NMI
        cpu.exit = cpu.made
        cpu.exit_event = self.add(cpu, Kind.VMEXIT, cpu.tsc, addr=rip, code=reason, **more)

    def exit_was(self, cpu: Cpu, source: Source) -> None:
        if not cpu.in_exit:
            self.counts["odd_records"] += 1
        elif cpu.exit_event is not None:  # without effect if it is written already
            cpu.exit_event.fields["source"] = source
            cpu.exit_event.known |= KNOWN["source"]

    def deliver(self, cpu: Cpu, vector: int | None, source: Source, time: int | None, **fields: int) -> None:
        if self.vendor == 1 and cpu.in_exit and cpu.stgi != cpu.exit:
            self.add(cpu, Kind.UNBLOCK, time, arg=1)
            cpu.stgi = cpu.exit
        if vector is not None:
            fields["arg"] = vector
        self.add(cpu, Kind.DELIVER, time, source=source, **fields)

    def request(self, cpu: Cpu, vector: int, **fields: int) -> None:
        if vector > 0xFF:
            raise Odd
        self.add(cpu, Kind.RAISE, cpu.tsc, arg=vector, source=Source.INJECTED, **fields)

    def inject_fault(self, cpu: Cpu, event: int, data: list[int]) -> None:
        self.request(cpu, 14, code=data[0], value=data[1] | (data[2] << 32 if event & 0x100 else 0))

    def inject_exception(self, cpu: Cpu, event: int, data: list[int]) -> None:
        if data[1] == 0xFFFFFFFF:
            self.request(cpu, data[0])
        else:
            self.request(cpu, data[0], code=data[1])

    def inject_interrupt(self, cpu: Cpu, event: int, data: list[int]) -> None:
        self.request(cpu, data[0])

    def waits(self, cpu: Cpu, event: int, data: list[int]) -> None:
        if data[1] in (3, 4):
            self.request(cpu, 2 if data[1] == 3 else 18)

    def interrupt(self, cpu: Cpu, event: int, data: list[int]) -> None:
        if data and data[0] <= 0xFF:
            self.deliver(cpu, data[0], Source.EXTERNAL, cpu.tsc)
            cpu.intr, cpu.intr_vector = cpu.made - 1, data[0]
        elif cpu.irq <= cpu.entry:
            self.deliver(cpu, None, Source.EXTERNAL, cpu.tsc)

    def nmi(self, cpu: Cpu, event: int, data: list[int]) -> None:
        self.exit_was(cpu, Source.NMI)
        if self.vendor == 1:
            self.deliver(cpu, 2, Source.NMI, cpu.tsc)

    def machine_check(self, cpu: Cpu, event: int, data: list[int]) -> None:
        self.exit_was(cpu, Source.MC)

    def note(self, cpu: Cpu, event: int, data: list[int]) -> None:
        if event == 0x82011:
            text = "VM exit for an SMI"
        elif event == 0x82023:
            text = f"VM exit for the guest's exception {data[0] & 0xFF}"
        else:
            text = "VM exit for the guest's #DB"
        place = self.texts.setdefault(text, sum(map(len, self.texts)))
        self.add(cpu, Kind.MARK, cpu.tsc, value=place, code=len(text), flags=EventFlag.BYTES)

    def pv_trap(self, cpu: Cpu, event: int, data: list[int]) -> None:
        rip, trap = (data[0] | data[1] << 32, data[2]) if event & 0x100 else (data[0], data[1])
        vector = trap & 0x7FFF
        code = {"code": trap >> 16} if trap & 0x8000 else {}
        if vector in (2, 3, 4, 18) or vector >= 32:
            self.request(cpu, vector, rip=rip, **code)
        else:
            self.deliver(cpu, vector, Source.EXCEPTION, cpu.tsc, rip=rip, **code)

    def pv_fault(self, cpu: Cpu, event: int, data: list[int]) -> None:
        if event & 0x100:
            rip, address, code = data[0] | data[1] << 32, data[2] | data[3] << 32, data[4]
        else:
            rip, address, code = data[0], data[1], data[2]
        self.deliver(cpu, 14, Source.EXCEPTION, cpu.tsc, rip=rip, value=address, code=code)

    def bind(self, cpu: Cpu, event: int, data: list[int]) -> None:
        if data[0] >> 16 <= 0xFF:
            self.vectors[data[0] & 0xFFFF] = data[0] >> 16

    def unbind(self, cpu: Cpu, event: int, data: list[int]) -> None:
        self.vectors.pop(data[0] & 0xFFFF, None)

    def unmapped(self, cpu: Cpu, event: int, data: list[int]) -> None:
        if data[0] > 0xFF:
            raise Odd
        self.deliver(cpu, data[0], Source.EXTERNAL, cpu.tsc)

    def handled(self, cpu: Cpu, event: int, data: list[int]) -> None:
        irq, began = data[0], data[1]
        vector = self.vectors.get(irq)
        if cpu.in_exit and cpu.intr > cpu.exit and vector in (None, cpu.intr_vector):
            cpu.intr = -1
            return
        time, before = cpu.tsc, self.new[-1].events
        if cpu.tsc is not None and before:
            start = cpu.tsc - (cpu.tsc - began & 0xFFFFFFFF)
            if start >= (before[-1].time or 0):
                time = start
        self.deliver(cpu, vector, Source.EXTERNAL, time)
        cpu.irq = cpu.made - 1
