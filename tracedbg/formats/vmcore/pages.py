"""Linear addresses of a dump: the page walk (SDM Vol. 3A 4.5). A walk reads one entry a level, whatever the tables hold."""

from __future__ import annotations

import struct

from tracedbg.formats.vmcore.notes import Dump

PAGE = 4096
_CACHE = 1 << 16  # pages remembered
_ADDRESS = (1 << 52) - PAGE  # bits 51:12 of an entry
_PRESENT, _LARGE, _NX = 1, 1 << 7, 1 << 63
_WORD = struct.Struct("<Q")


class Space:
    """Linear memory of a CPU by its CR3. `holes`: walks that ended at a table which is not in the dump."""

    def __init__(self, dump: Dump, cr3: int, levels: int) -> None:
        self.holes = 0
        self._dump = dump
        self._root = cr3 & _ADDRESS
        self._levels = levels
        self._bits = 12 + 9 * levels
        self._cache: dict[int, tuple[int, bool] | None] = {}

    def is_canonical(self, addr: int) -> bool:
        """Whether an address is canonical with so many levels: SDM Vol. 1 3.3.7.1."""
        top = addr >> (self._bits - 1)
        return top == 0 or top == (1 << (65 - self._bits)) - 1

    def page(self, addr: int) -> tuple[int, bool] | None:
        """Physical address of the page that holds an address, and whether code may run in it; None: not mapped."""
        number = addr >> 12
        if number not in self._cache:
            if len(self._cache) >= _CACHE:
                self._cache.clear()
            self._cache[number] = self._walk(addr) if self.is_canonical(addr) else None
        return self._cache[number]

    def _walk(self, addr: int) -> tuple[int, bool] | None:
        table, runs = self._root, True
        for level in range(self._levels, 0, -1):
            shift = 3 + 9 * level
            raw = self._dump.physical(table + (addr >> shift & 511) * 8, 8)
            if raw is None:
                self.holes += 1
                return None
            (entry,) = _WORD.unpack(raw)
            if not entry & _PRESENT:
                return None
            runs = runs and not entry & _NX
            if level == 1 or (entry & _LARGE and level < 4):
                size = 1 << shift
                return (entry & _ADDRESS & -size) + (addr & (size - 1) & -PAGE), runs
            if entry & _LARGE:  # reserved in level 4 and 5
                return None
            table = entry & _ADDRESS
        return None

    def read(self, addr: int, size: int) -> bytes | None:
        """Memory at an address; None: not all of it is mapped and in the dump."""
        parts = []
        while size > 0:
            page = self.page(addr)
            take = min(size, PAGE - addr % PAGE)
            part = None if page is None else self._dump.physical(page[0] + addr % PAGE, take)
            if part is None:
                return None
            parts.append(part)
            addr += take
            size -= take
        return b"".join(parts)

    def word(self, addr: int) -> int | None:
        """Eight bytes at an address."""
        raw = self.read(addr, 8)
        return None if raw is None else int.from_bytes(raw, "little")

    def has(self, addr: int) -> bool:
        """Whether the page of an address is mapped and its bytes are in the dump."""
        page = self.page(addr)
        return page is not None and self._dump.physical(page[0], 1) is not None

    def runs(self, addr: int) -> bool:
        """Whether code may run at an address."""
        page = self.page(addr)
        return page is not None and page[1]
