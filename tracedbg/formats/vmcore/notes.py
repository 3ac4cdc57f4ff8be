"""What an ELF dump of QEMU's dump-guest-memory holds: the registers of each CPU and physical memory.

QEMU writes for each CPU an NT_PRSTATUS note, which has no TR, and then for each CPU a note named QEMU, which has (qemu:
target/i386/arch_dump.c). PT_LOADs give memory by physical address; with paging on (`-p`) several of them show the same bytes.
"""

from __future__ import annotations

import bisect
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, cast

from elftools.elf.elffile import ELFFile

from tracedbg import wire
from tracedbg.errors import FormatError

Bytes = mmap.mmap

MAX_SEGMENTS = 1 << 20
MAX_NOTES = 64 << 20  # bytes of notes that are looked at; a CPU has about 800
_MAX_DAMAGES = 20  # told one by one

_PHDR = struct.Struct("<IIQQQQQQ")  # p_type p_flags p_offset p_vaddr p_paddr p_filesz p_memsz p_align: ELF-64, figure 8
_PT_LOAD, _PT_NOTE = 1, 4
_NOTE = struct.Struct("<III")  # namesz descsz type
_NT_PRSTATUS = 1

# struct QEMUCPUState: version, size, rax rbx rcx rdx rsi rdi rsp rbp r8-r15 rip rflags, 10 segments (selector limit flags pad
# base), CR0-CR4. Since QEMU 2.12 the base of KERNEL_GS follows (440 bytes in all, else 432).
_STATE = struct.Struct("<II18Q" + "IIIIQ" * 10 + "5Q")
_VERSION = 1
_RSP, _RIP, _RFLAGS = 2 + 6, 2 + 16, 2 + 17
_SEGMENTS, _CS, _SS, _TR, _GDT, _IDT = 2 + 18, 0, 5, 7, 8, 9
_CR = _SEGMENTS + 5 * 10

_CS_L = 1 << 21  # of the descriptor's high half: 64-bit code (SDM Vol. 3A 5.2.1)
CR0_PG, CR4_PAE, CR4_LA57 = 1 << 31, 1 << 5, 1 << 12
CR4_FRED = 1 << 32


@dataclass(frozen=True, slots=True)
class Table:
    """A descriptor table or segment: linear base, and the offset of its last byte."""

    base: int
    limit: int


@dataclass(frozen=True, slots=True)
class Cpu:
    """One CPU when the dump was made."""

    number: int
    rip: int
    rsp: int
    rflags: int
    cs: int
    ss: int
    code64: bool  # CS is a 64-bit code segment
    tr: Table
    gdt: Table
    idt: Table
    cr0: int
    cr3: int
    cr4: int

    @property
    def cpl(self) -> int:
        """Privilege level: that of SS would be it in other modes too, but in 64-bit code both agree."""
        return self.cs & 3

    @property
    def long_mode(self) -> bool:
        """Whether gates and TSS are those of long mode. EFER is not in the note: 32-bit code at CPL 0 is not."""
        paging = self.cr0 & CR0_PG and self.cr4 & CR4_PAE
        return bool(paging) and (self.code64 or self.cpl != 0)

    @property
    def levels(self) -> int:
        """Levels of its page tables: SDM Vol. 3A 4.1.1."""
        return 5 if self.cr4 & CR4_LA57 else 4

    @property
    def fred(self) -> bool:
        """Whether events are delivered by FRED."""
        return bool(self.cr4 & CR4_FRED)


class Dump:
    """An ELF dump: `cpus` in the order of their notes, and `physical()` memory. `damage`: what is wrong with the rest.

    `lost`: CPUs that have an NT_PRSTATUS note, but none of QEMU. Raises FormatError if it is no such dump.
    """

    def __init__(self, data: Bytes, path: str) -> None:
        self.cpus: list[Cpu] = []
        self.damage: list[str] = []
        self.lost = 0
        self.memory_bytes = 0
        self._data = data
        self._path = path
        notes, loads = self._segments()
        statuses = 0
        for name, kind, desc in self._notes(notes):
            if name == b"CORE\0" and kind == _NT_PRSTATUS:
                statuses += 1
            elif name == b"QEMU\0" and kind == 0:
                if len(self.cpus) == wire.MAX_CPUS:
                    self._bad(f"more than {wire.MAX_CPUS} CPUs")
                    break
                self._cpu(desc)
        if not self.cpus:
            raise FormatError(
                path,
                "no note of QEMU in this dump, so TR and the IST stacks are not known: a dump of dump-guest-memory has them,"
                " one of kdump or makedumpfile has not" + (f" ({self.damage[0]})" if self.damage else ""),
                0,
            )
        self.lost = min(max(statuses - len(self.cpus), 0), wire.MAX_CPUS - len(self.cpus))
        if self.lost:
            self._bad(f"{self.lost} of {statuses} CPUs have no note of QEMU")
        self._map(loads)
        if len(self.damage) > _MAX_DAMAGES:
            self.damage[_MAX_DAMAGES:] = [f"and {len(self.damage) - _MAX_DAMAGES} more"]

    def physical(self, addr: int, size: int) -> bytes | None:
        """Physical memory; None: not all of it is in the dump."""
        found = b""
        while True:
            at = bisect.bisect_right(self._starts, addr) - 1
            if at < 0:
                return None
            begin, length, offset = self._loads[at]
            part = self._data[offset + addr - begin : offset + min(addr - begin + size, length)] if addr - begin < length else b""
            if len(part) == size and not found:
                return part
            if not part:
                return None
            found += part
            addr += len(part)
            size -= len(part)
            if not size:
                return found

    # -- ELF ------------------------------------------------------------------------------------------------------------

    def _bad(self, what: str) -> None:
        self.damage.append(what)

    def _segments(self) -> tuple[list[tuple[int, int]], list[tuple[int, int, int]]]:
        """PT_NOTEs (offset, size) and PT_LOADs (physical address, size, offset), as far as they lie in the file."""
        data, path = self._data, self._path
        try:
            image = ELFFile(cast(IO[bytes], data))
            header = image.header
            if image.elfclass != 64 or not image.little_endian or header["e_machine"] != "EM_X86_64":
                raise FormatError(path, "a dump of a guest whose CPU was not in long mode, or not of x86-64", 0)
            count, at, size = image.num_segments(), header["e_phoff"], header["e_phentsize"]
        except FormatError:
            raise
        except Exception as error:  # whatever a damaged file does to the parser
            raise FormatError(path, f"damaged ELF header ({type(error).__name__})", 0) from None
        if size != _PHDR.size or count > MAX_SEGMENTS:
            raise FormatError(path, f"absurd ELF header: {count} segment headers of {size} bytes", 0)
        raw = data[at : at + count * size]
        if len(raw) < count * size:
            self._bad(f"the segment headers are cut short at {len(data):#x}")
        notes: list[tuple[int, int]] = []
        loads: list[tuple[int, int, int]] = []
        for kind, _, offset, _, physical, length, _, _ in _PHDR.iter_unpack(raw[: len(raw) // size * size]):
            if kind not in (_PT_LOAD, _PT_NOTE) or not length:
                continue
            if offset + length > len(data):
                what = "notes" if kind == _PT_NOTE else f"memory at {physical:#x}"
                self._bad(f"the file ends at {len(data):#x}, before its {what} of {length:,} bytes")
                length = max(len(data) - offset, 0)
            if kind == _PT_NOTE:
                notes.append((offset, length))
            elif length:
                loads.append((physical, length, offset))
        return notes, loads

    def _notes(self, places: list[tuple[int, int]]) -> Iterator[tuple[bytes, int, bytes]]:
        """Name, type and contents of each note: ELF-64, section 5."""
        budget = MAX_NOTES
        for offset, length in places:
            data, at = self._data[offset : offset + min(length, budget)], 0
            if len(data) < length and length > budget:
                self._bad(f"more than {MAX_NOTES >> 20} MiB of notes")
            budget -= len(data)
            while at + _NOTE.size <= len(data):
                names, size, kind = _NOTE.unpack_from(data, at)
                name_at = at + _NOTE.size
                desc_at = name_at + (names + 3 & ~3)
                if desc_at + size > len(data):
                    self._bad(f"the note at {offset + at:#x} is longer than its segment")
                    break
                yield data[name_at : name_at + min(names, 8)], kind, data[desc_at : desc_at + size]
                at = desc_at + (size + 3 & ~3)

    def _cpu(self, desc: bytes) -> None:
        number = len(self.cpus)
        if len(desc) < _STATE.size:
            raise FormatError(self._path, f"the note of CPU {number} has {len(desc)} bytes, not {_STATE.size} or more", 0)
        state = _STATE.unpack_from(desc)
        if state[0] != _VERSION:
            raise FormatError(self._path, f"the note of CPU {number} is of version {state[0]}, not {_VERSION}", 0)

        def segment(n: int) -> tuple[int, int, int, int]:
            selector, limit, flags, _, base = state[_SEGMENTS + 5 * n : _SEGMENTS + 5 * n + 5]
            return selector & 0xFFFF, limit, flags, base

        cs, _, flags, _ = segment(_CS)
        tr, gdt, idt = (Table(base, limit) for _, limit, _, base in map(segment, (_TR, _GDT, _IDT)))
        self.cpus.append(
            Cpu(
                number, rip=state[_RIP], rsp=state[_RSP], rflags=state[_RFLAGS] & 0xFFFFFFFF, cs=cs, ss=segment(_SS)[0],
                code64=bool(flags & _CS_L), tr=tr, gdt=gdt, idt=idt, cr0=state[_CR], cr3=state[_CR + 3], cr4=state[_CR + 4],
            )
        )  # fmt: skip

    def _map(self, loads: list[tuple[int, int, int]]) -> None:
        """Make the segments disjoint: where two overlap, the one that begins first counts."""
        self._loads: list[tuple[int, int, int]] = []
        end = 0
        told = False
        for begin, size, offset in sorted(loads):
            if self._loads and begin < end:
                first, _, other = self._loads[-1]
                # With -p a page that is mapped twice is in two segments, as the same bytes of the file.
                if not told and offset - begin != other - first:
                    told = True
                    self._bad(f"two segments say what is at physical {begin:#x}")
                cut = min(end - begin, size)
                begin, size, offset = begin + cut, size - cut, offset + cut
            if size:
                self._loads.append((begin, size, offset))
                end = begin + size
        self._starts = [begin for begin, _, _ in self._loads]
        self.memory_bytes = sum(size for _, size, _ in self._loads)
