"""QEMU monitor text: the TSS and IDT of each CPU from what `info registers` and `x /NNxw|g` print."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from tracedbg.errors import FormatError
from tracedbg.formats.source import Input
from tracedbg.layout import CpuTables, Gate, Idt, Layout, Tss

MAX_TEXT = 64 << 20
MAX_LINE = 4096
MAX_BYTES = 4 << 20  # of memory kept from one text
MAX_CPUS = 4096
TSS_BYTES = 0x68
_GATE_BYTES = 16

_ESCAPES = re.compile(rb"\x1b\[[0-9;]*[A-Za-z]|[^\x1b\n]\x08")
_CPU = re.compile(rb"^\s*CPU#(\d{1,9})\b")
_TR = re.compile(rb"^TR =[0-9a-f]{4} ([0-9a-f]{8}(?:[0-9a-f]{8})?) ([0-9a-f]{8})")
_IDT = re.compile(rb"^IDT= +([0-9a-f]{8}(?:[0-9a-f]{8})?) ([0-9a-f]{8})")
_MEMORY = re.compile(rb"^\s*(?:0x)?([0-9a-f]{8}(?:[0-9a-f]{8})?):((?:\s+(?:0x)?[0-9a-f]{2,16})+)\s*$")
_HEADING = re.compile(rb"^[ \t]*CPU#\d+[ \t\r]*$", re.M)  # no \s: it crosses lines, at every line to the end of the text
_PHYSICAL = re.compile(rb"\bxp\s*/")
_COMMAND = re.compile(rb"^(?:\(qemu\)|=|#)|\bx\s*/")


@dataclass(slots=True)
class CpuBlock:
    """Bases of one `CPU#n` register block, and the IDT's limit; None: not printed."""

    tr: int | None = None
    idt: int | None = None
    idt_limit: int = 0xFFF


@dataclass(slots=True)
class Snapshot:
    """One monitor text: CPUs by number, and linear memory byte by byte."""

    name: str
    cpus: dict[int, CpuBlock] = field(default_factory=dict)
    memory: dict[int, int] = field(default_factory=dict)

    def pairs(self) -> set[tuple[int, int]]:
        """(TR base, IDT base) of each CPU block."""
        return {(c.tr, c.idt) for c in self.cpus.values() if c.tr is not None and c.idt is not None}

    def holds(self, tr: int, idt: int) -> bool:
        """Whether these tables are of this machine: named by a CPU block, or both in the memory printed."""
        if self.cpus:
            return (tr, idt) in self.pairs()
        return self.tss_at(tr) is not None and self.idt_at(idt) is not None

    def tss_at(self, base: int) -> Tss | None:
        """The TSS at `base`; a slot of which a byte is missing is unknown. None: nothing of it was printed."""
        rsp = tuple(self._word(base + 4 + 8 * n) for n in range(3))
        ist = (None, *(self._word(base + 0x24 + 8 * n) for n in range(7)))
        if all(v is None for v in (*rsp, *ist)):
            return None
        return Tss(base, rsp, ist)

    def idt_at(self, base: int, limit: int = 0xFFF) -> Idt | None:
        """The IDT at `base`; a gate that is not there whole is unknown. None: no gate was printed."""
        gates = {}
        for vector in range(min((limit + 1) // _GATE_BYTES, 256)):
            raw = self._bytes(base + vector * _GATE_BYTES, _GATE_BYTES)
            if raw is not None:
                gates[vector] = Gate.from_bytes(raw)
        return Idt(base, gates) if gates else None

    def layout(self, extra: Iterable[tuple[int, int]] = ()) -> Layout:
        """The tables of every CPU block, and those at further (TR, IDT) bases as far as the memory holds them."""
        tss: dict[int, Tss] = {}
        idts: dict[int, Idt] = {}
        limits = {c.idt: c.idt_limit for c in self.cpus.values() if c.idt is not None}
        bases = [(c.tr, c.idt) for _, c in sorted(self.cpus.items())]
        for tr, idt in [*bases, *sorted(extra)]:
            if tr is not None and tr not in tss and (found := self.tss_at(tr)) is not None:
                tss[tr] = found
            if idt is not None and idt not in idts and (table := self.idt_at(idt, limits.get(idt, 0xFFF))) is not None:
                idts[idt] = table
        by_tss = {base: i for i, base in enumerate(tss)}
        by_idt = {base: i for i, base in enumerate(idts)}
        tables = []
        for number in range(max(self.cpus, default=-1) + 1):
            block = self.cpus.get(number, CpuBlock())
            tables.append(
                CpuTables(
                    by_tss.get(block.tr) if block.tr is not None else None,
                    by_idt.get(block.idt) if block.idt is not None else None,
                )
            )
        return Layout(tuple(tss.values()), tuple(idts.values()), tuple(tables))

    def _bytes(self, addr: int, size: int) -> bytes | None:
        get = self.memory.get
        found = [get(addr + n, -1) for n in range(size)]
        return None if -1 in found else bytes(found)

    def _word(self, addr: int) -> int | None:
        raw = self._bytes(addr, 8)
        return None if raw is None else int.from_bytes(raw, "little")


def parse(text: bytes, name: str) -> Snapshot:
    """Read monitor text by content; headings and prompts do not matter. Raises FormatError if nothing is in it."""
    result = Snapshot(name)
    block: CpuBlock | None = None
    physical = False
    text = _ESCAPES.sub(b"", text)
    at = 0
    for line in text.split(b"\n"):
        here, at = at, at + len(line) + 1
        line = line.rstrip(b"\r ")
        if not line or len(line) > MAX_LINE:
            continue
        if match := _MEMORY.match(line):
            # `xp` prints physical addresses, which are not what TR and IDT name.
            if not physical:
                _keep(result, match, here)
        elif match := _CPU.match(line):
            number = int(match[1])
            if number >= MAX_CPUS:
                raise FormatError(name, f"absurd CPU number {number}", here)
            block = result.cpus.setdefault(number, CpuBlock())
        elif match := _TR.match(line):
            block = result.cpus.setdefault(0, CpuBlock()) if block is None else block
            block.tr = int(match[1], 16)
        elif match := _IDT.match(line):
            block = result.cpus.setdefault(0, CpuBlock()) if block is None else block
            block.idt, block.idt_limit = int(match[1], 16), int(match[2], 16)
        elif _PHYSICAL.search(line):
            physical = True
        elif _COMMAND.search(line):
            physical = False
    if not result.cpus and not result.memory:
        raise FormatError(name, "no register block and no memory line: not QEMU monitor text", 0)
    return result


def read(path: str) -> Snapshot:
    """Read a file of monitor text, plain or packed."""
    pieces = []
    with Input(path) as source:
        for piece in source.chunks():
            pieces.append(piece)
            if source.bytes > MAX_TEXT:
                raise FormatError(path, "too large for monitor text", MAX_TEXT)
    return parse(b"".join(pieces), path)


def looks_like_monitor(head: bytes) -> bool:
    """Whether a text is monitor output rather than a log: said to the user who gives one as the log."""
    return _HEADING.search(head) is not None


def _keep(result: Snapshot, match: re.Match[bytes], offset: int) -> None:
    words = [w.removeprefix(b"0x") for w in match[2].split()]
    digits = len(words[0])
    # Decimal and signed formats have other widths: not memory as hex words.
    if digits not in (2, 4, 8, 16) or any(len(w) != digits for w in words):
        return
    addr = int(match[1], 16)
    for word in words:
        raw = int(word, 16).to_bytes(digits // 2, "little")
        for byte in raw:
            result.memory[addr] = byte
            addr += 1
    if len(result.memory) > MAX_BYTES:
        raise FormatError(result.name, "absurd amount of memory lines", offset)
