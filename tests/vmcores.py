"""A small writer of ELF dumps as QEMU's dump-guest-memory makes them: guest memory with page tables, and the notes."""

from __future__ import annotations

import gzip
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PAGE = 4096
MASK = (1 << 64) - 1

GDT = 0xFFFFFE0000001000
IDT = 0xFFFFFE0000000000
CODE = 0xFFFFFFFF81000000
TSS = 0xFFFFFE0000003000
# Tops of two-page stacks with a guard page below each: IST1 #DF, IST2 NMI, IST3 #DB, IST4 #MC.
DF_TOP, NMI_TOP, DB_TOP, MC_TOP = (0xFFFFFE0000010000 + 0x3000 * n for n in range(4))
RSP0_TOP = 0xFFFFFE0000008000
THREAD = 0xFFFFC90000010000  # a 16 KiB stack
THREAD_TOP = THREAD + 0x4000
KERNEL_CS, KERNEL_SS, USER_CS, USER_SS = 0x10, 0x18, 0x33, 0x2B
HANDLERS = {vector: CODE + 0x100 * vector for vector in range(256)}
ISTS = {8: 1, 2: 2, 1: 3, 18: 4}  # vector -> IST
CR4 = 0x20


def gate(offset: int, ist: int = 0, kind: int = 0xE, present: bool = True) -> bytes:
    low = offset & 0xFFFF | KERNEL_CS << 16
    middle = ist | kind << 8 | present << 15 | offset & 0xFFFF0000
    return struct.pack("<IIII", low, middle, offset >> 32, 0)


def descriptor(dpl: int, *, code: bool, long: bool = True) -> int:
    """A flat segment of 4 GiB."""
    return 0xFFFF | (0x93 | dpl << 5 | (8 if code else 0)) << 40 | 0xF << 48 | (long and code) << 53 | (not long) << 54 | 1 << 55


def note(name: bytes, kind: int, desc: bytes) -> bytes:
    name += b"\0"
    return struct.pack("<III", len(name), len(desc), kind) + name + bytes(-len(name) % 4) + desc + bytes(-len(desc) % 4)


@dataclass
class Cpu:
    """Registers of the note; the defaults are those of an idle kernel thread."""

    rip: int = CODE + 0x10000
    rsp: int = THREAD_TOP - 0x200
    rflags: int = 0x46
    cs: int = KERNEL_CS
    ss: int = KERNEL_SS
    cs_flags: int = 0xAF9B00
    tr: int = TSS
    tr_limit: int = 0x67
    gdt: int = GDT
    gdt_limit: int = 0x7F
    idt: int = IDT
    idt_limit: int = 0xFFF
    cr0: int = 0x80050033
    cr3: int = 0x1000
    cr4: int = CR4
    version: int = 1
    size: int = 440

    def status(self, number: int) -> bytes:
        """NT_PRSTATUS in long mode: 336 bytes, the PID at 32."""
        return note(b"CORE", 1, (bytes(32) + struct.pack("<I", number + 1)).ljust(336, b"\0"))

    def state(self) -> bytes:
        """QEMU's note."""
        registers = [0] * 18
        registers[6], registers[16], registers[17] = self.rsp, self.rip, self.rflags
        flat = (0x10, 0xFFFFFFFF, 0xCF9300, 0, 0)
        segments = [flat] * 10
        segments[0] = (self.cs, 0xFFFFFFFF, self.cs_flags, 0, 0)
        segments[5] = (self.ss, 0xFFFFFFFF, 0xCF9300, 0, 0)
        segments[7] = (0x40, self.tr_limit, 0x8B00, 0, self.tr)
        segments[8] = (0, self.gdt_limit, 0, 0, self.gdt)
        segments[9] = (0, self.idt_limit, 0, 0, self.idt)
        raw = struct.pack("<II18Q", self.version, self.size, *registers)
        raw += b"".join(struct.pack("<IIIIQ", *s) for s in segments)
        raw += struct.pack("<5Q", self.cr0, 0, 0xDEAD, self.cr3, self.cr4) + bytes(8)
        return note(b"QEMU", 0, raw[: self.size])


@dataclass
class Guest:
    """Physical pages and the page tables that show them. `levels`: 4 or 5."""

    levels: int = 4
    root: int = 0x1000
    pages: dict[int, bytearray] = field(default_factory=dict)
    free: int = 0x2000

    def page(self, physical: int) -> bytearray:
        return self.pages.setdefault(physical & -PAGE, bytearray(PAGE))

    def entry(self, at: int, value: int | None = None) -> int:
        page = self.page(at)
        if value is not None:
            page[at % PAGE : at % PAGE + 8] = value.to_bytes(8, "little")
        return int.from_bytes(page[at % PAGE : at % PAGE + 8], "little")

    def take(self, count: int = 1, align: int = PAGE) -> int:
        self.free = -(-self.free // align) * align
        at, self.free = self.free, self.free + count * PAGE
        return at

    def place_of(self, linear: int, level: int = 1) -> int:
        """Where the entry of an address lies in its table of that level, made if need be."""
        table = self.root
        for n in range(self.levels, level, -1):
            at = table + (linear >> 3 + 9 * n & 511) * 8
            if not self.entry(at) & 1:
                self.entry(at, self.take() | 7)
            table = self.entry(at) & 0xFFFFFFFFFF000
        return table + (linear >> 3 + 9 * level & 511) * 8

    def map(self, linear: int, physical: int | None = None, count: int = 1, flags: int = 3) -> int:
        """Map pages; returns their physical address."""
        physical = self.take(count) if physical is None else physical
        for n in range(count):
            self.entry(self.place_of(linear + n * PAGE), physical + n * PAGE | flags)
            self.page(physical + n * PAGE)
        return physical

    def physical(self, linear: int) -> int:
        return (self.entry(self.place_of(linear)) & 0xFFFFFFFFFF000) + linear % PAGE

    def write(self, linear: int, data: bytes) -> None:
        for n, byte in enumerate(data):
            at = self.physical(linear + n)
            self.page(at)[at % PAGE] = byte

    def words(self, linear: int, *values: int) -> None:
        self.write(linear, b"".join((value & MASK).to_bytes(8, "little") for value in values))

    def frame(
        self, top: int, rip: int, rsp: int, *, cs: int = KERNEL_CS, ss: int = KERNEL_SS, rflags: int = 0x246, **code: int
    ) -> None:
        """What a delivery stores below a top; `code`: its error code."""
        self.words(top - 40, rip, cs, rflags, rsp, ss)
        if code:
            self.words(top - 48, code["code"])

    def loads(self) -> list[tuple[int, bytes]]:
        """Runs of pages."""
        runs: list[tuple[int, bytearray]] = []
        for at in sorted(self.pages):
            if runs and runs[-1][0] + len(runs[-1][1]) == at:
                runs[-1][1].extend(self.pages[at])
            else:
                runs.append((at, bytearray(self.pages[at])))
        return [(at, bytes(data)) for at, data in runs]


def tss_bytes(rsp0: int, ists: Sequence[int]) -> bytes:
    raw = bytearray(0x68)
    struct.pack_into("<Q", raw, 4, rsp0)
    struct.pack_into(f"<{len(ists)}Q", raw, 0x24, *ists)
    return bytes(raw)


def kernel(levels: int = 4, ists: dict[int, int] | None = None, tops: Sequence[int] | None = None) -> Guest:
    """A guest with GDT, IDT, one TSS, its stacks, code, and a thread's stack; `ists`: vector -> IST."""
    guest = Guest(levels)
    guest.page(guest.root)
    tops = (DF_TOP, NMI_TOP, DB_TOP, MC_TOP) if tops is None else tops
    guest.map(IDT)
    guest.map(GDT)
    guest.map(TSS)
    guest.map(CODE, count=2)
    guest.map(CODE + 0x10000)
    guest.map(RSP0_TOP - PAGE)
    guest.map(THREAD, count=4)
    for top in sorted(set(tops)):
        guest.map((top - 1 & -PAGE) - PAGE, count=2)
    gates = b"".join(gate(HANDLERS[v], (ISTS if ists is None else ists).get(v, 0)) for v in range(256))
    guest.write(IDT, gates)
    entries = [0] * 16
    entries[KERNEL_CS >> 3], entries[KERNEL_SS >> 3] = descriptor(0, code=True), descriptor(0, code=False)
    entries[USER_CS >> 3], entries[USER_SS >> 3] = descriptor(3, code=True), descriptor(3, code=False)
    guest.words(GDT, *entries)
    guest.write(TSS, tss_bytes(RSP0_TOP, tops))
    return guest


def elf(
    cpus: Sequence[Cpu], loads: Sequence[tuple[int, bytes]], *, statuses: int | None = None, notes: bytes | None = None,
    again: Sequence[int] = (), machine: int = 62, kind: int = 4,
) -> bytes:  # fmt: skip
    """The file. `again`: numbers of loads that a second header names, as -p makes them."""
    if notes is None:
        notes = b"".join(c.status(n) for n, c in enumerate(cpus)) if statuses is None else Cpu().status(0) * statuses
        notes += b"".join(c.state() for c in cpus)
    count = 1 + len(loads) + len(again)
    at = 64 + 56 * count
    headers = struct.pack("<IIQQQQQQ", 4, 0, at, 0, 0, len(notes), len(notes), 0)
    body, names = notes, []
    for physical, data in loads:
        names.append(struct.pack("<IIQQQQQQ", 1, 0, at + len(body), 0, physical, len(data), len(data), 0))
        body += data
    headers += b"".join([*names, *(names[n] for n in again)])
    head = (
        b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", kind, machine, 1, 0, 64, 0, 0, 64, 56, count, 64, 0, 0)
    )
    return head + headers + body


def dump(guest: Guest, *cpus: Cpu, **more: Any) -> bytes:
    """The dump of a guest."""
    return elf(cpus or (Cpu(),), guest.loads(), **more)


# Physical memory that the excerpts of real dumps keep: tables and stacks of the guest, its page tables, where its handlers run.
KEPT = ((0x105000, 0x111000), (0x113000, 0x119000), (0x11C000, 0x11D000), (0x120000, 0x121000), (0x124000, 0x129000))


def excerpt(data: bytes) -> bytes:
    """A dump with a part of its memory and the same notes."""
    (at,) = struct.unpack_from("<Q", data, 32)
    (count,) = struct.unpack_from("<H", data, 56)
    headers = [struct.unpack_from("<IIQQQQQQ", data, at + 56 * n) for n in range(count)]
    (notes,) = [data[h[2] : h[2] + h[5]] for h in headers if h[0] == 4]
    low = next(h for h in headers if h[0] == 1 and h[4] == 0)
    return elf([], [(lo, data[low[2] + lo : low[2] + hi]) for lo, hi in KEPT], notes=notes)


if __name__ == "__main__":
    for source, target in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        Path(target).write_bytes(gzip.compress(excerpt(Path(source).read_bytes()), mtime=0))
