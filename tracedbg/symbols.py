"""Addresses to names: ELF files, kallsyms, System.map, nm output and Xen's maps, and the SYMBOLS section of a native trace."""

from __future__ import annotations

import gzip
import io
import os
import re
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import pairwise
from typing import BinaryIO

import zstandard

from tracedbg.errors import FormatError
from tracedbg.text import clean

MAX_FILE = 512 << 20  # bytes of a map, unpacked
MAX_LINE = 4096
MAX_SYMBOLS = 4_000_000
MAX_LINES = 2 * MAX_SYMBOLS
MAX_REACH = 1 << 20  # no symbol reaches further than this past its start
HIGH_HALF = 1 << 47
FIRST_ADDRESS = 0x1000  # below: offsets and counters, not code

# `addr [size] type name [module]`; nm -C names hold blanks.
_LINE = re.compile(rb"^(?:0x)?([0-9a-fA-F]{1,16})[ \t]+(?:([0-9a-fA-F]{8,16})[ \t]+)?([A-Za-z?-])[ \t]+(\S.*)$")
_IGNORED = re.compile(rb"^[ \t]*+(?:[UwvN][ \t].*|[^\s].*:)?[ \t]*$")  # undefined, `file.o:` headers, blank lines
_SKIPPED_TYPES = frozenset(b"AaUN?-")  # absolute (per-CPU offsets), undefined, debugging
_TEXT_TYPES = frozenset(b"TtWwi")


class Symbols:
    """A sorted table of symbols. Names are clean (see text.py); ends are exclusive."""

    def __init__(self, entries: Iterable[tuple[int, int, str]] = ()) -> None:
        """`entries`: (start, end, name), sorted by start, without overlap."""
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._names: list[str] = []
        for start, end, name in entries:
            self._starts.append(start)
            self._ends.append(end)
            self._names.append(name)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[tuple[int, int, str]]:
        return zip(self._starts, self._ends, self._names, strict=True)

    @classmethod
    def load(cls, path: str) -> Symbols:
        """Read a map file, plain or packed with gzip or zstd. Raises FormatError with path and offset."""
        try:
            with open(path, "rb") as file:
                return cls.parse(_unpack(file, path), path)
        except OSError as error:
            raise FormatError(path, (error.strerror or str(error)).lower()) from None

    @classmethod
    def parse(cls, data: bytes, path: str = "-") -> Symbols:
        """Read an ELF file or the text of a map."""
        if data[:4] == b"\x7fELF":
            return cls._of_elf(data, path)
        found: list[tuple[int, tuple[int, int, bool], int, bytes]] = []
        hidden = 0
        at = 0
        for number, raw in enumerate(io.BytesIO(data)):  # split() would take 8 bytes for an empty line
            offset, at = at, at + len(raw)
            if number >= MAX_LINES:
                raise FormatError(path, f"more than {MAX_LINES} lines", offset)
            line = raw.rstrip(b"\r\n")
            match = _LINE.match(line) if len(line) <= MAX_LINE else None
            if match is None:
                if len(line) > MAX_LINE or not _IGNORED.match(line):
                    raise FormatError(path, "not a line of a symbol map (address, type, name)", offset)
                continue
            address, size, kind, name = int(match[1], 16), int(match[2] or b"0", 16), match[3], match[4]
            if address == 0:
                hidden += 1
            if kind[0] in _SKIPPED_TYPES or address < FIRST_ADDRESS:
                continue
            # Of several names for one address: code before data, no leading underscores, global before local.
            order = (int(kind[0] not in _TEXT_TYPES), len(name) - len(name.lstrip(b"_")), kind.islower())
            found.append((address, order, size, name))
            if len(found) > MAX_SYMBOLS:
                raise FormatError(path, f"more than {MAX_SYMBOLS} symbols", offset)
        if not found:
            if hidden:
                raise FormatError(path, "all addresses are 0: kptr_restrict hid them when the file was read")
            raise FormatError(path, "no symbols in it")
        return cls._of_found(found)

    @classmethod
    def _of_elf(cls, data: bytes, path: str) -> Symbols:
        from tracedbg.elf import elf_symbols  # only who gives an ELF file waits for its parser

        found = []
        for symbol in elf_symbols(data, path, MAX_SYMBOLS):
            if symbol.address >= FIRST_ADDRESS:
                name = symbol.name
                order = (int(not symbol.is_code), len(name) - len(name.lstrip(b"_")), symbol.is_local)
                found.append((symbol.address, order, symbol.size, name))
        if not found:
            raise FormatError(path, "no symbols in it")
        return cls._of_found(found)

    @classmethod
    def _of_found(cls, found: list[tuple[int, tuple[int, int, bool], int, bytes]]) -> Symbols:
        found.sort(key=lambda item: (item[0], item[1]))
        if found[-1][0] >= HIGH_HALF:
            # The map of a kernel in the high half: what lies low are per-CPU offsets.
            found = [item for item in found if item[0] >= HIGH_HALF]
        return cls(_entries(found))

    def lookup(self, address: int) -> tuple[str, int] | None:
        """The symbol that holds an address, and the offset in it."""
        i = bisect_right(self._starts, address) - 1
        if i < 0 or address >= self._ends[i]:
            return None
        return self._names[i], address - self._starts[i]

    def name(self, address: int) -> str | None:
        """`do_nmi`, `do_nmi+2`, `default_idle+0xc6`, `scsi_done+0x10 [scsi_mod]`."""
        found = self.lookup(address)
        if found is None:
            return None
        name, offset = found
        if not offset:
            return name
        plus = f"+{offset}" if offset < 10 else f"+{offset:#x}"
        head, bracket, module = name.partition(" [")
        return f"{head}{plus}{bracket}{module}"

    def subset(self, addresses: Iterable[int]) -> Symbols:
        """Only the symbols that these addresses need."""
        wanted = {bisect_right(self._starts, address) - 1 for address in addresses if self.lookup(address) is not None}
        return Symbols((self._starts[i], self._ends[i], self._names[i]) for i in sorted(wanted))

    def to_bytes(self) -> bytes:
        """The SYMBOLS section: a line `start end name` each, hex, sorted."""
        return b"".join(b"%x %x %s\n" % (start, end, name.encode()) for start, end, name in self)

    @classmethod
    def from_bytes(cls, data: bytes, path: str = "-", offset: int = 0) -> Symbols:
        """Read a SYMBOLS section. Raises FormatError."""
        entries: list[tuple[int, int, str]] = []
        last = 0
        for line in data.splitlines():
            parts = line.split(b" ", 2)
            try:
                start, end = int(parts[0], 16), int(parts[1], 16)
                name = clean(parts[2].decode("utf-8", "replace"))
            except (ValueError, IndexError):
                raise FormatError(path, "SYMBOLS section: not a line of it", offset) from None
            if not last <= start < end <= 1 << 64 or len(entries) >= MAX_SYMBOLS:
                raise FormatError(path, "SYMBOLS section is not in order", offset)
            entries.append((start, end, name))
            last = end
            offset += len(line) + 1
        return cls(entries)


def _entries(found: list[tuple[int, tuple[int, int, bool], int, bytes]]) -> Iterator[tuple[int, int, str]]:
    """One entry per address, the preferred name first in `found`."""
    starts = sorted({item[0] for item in found})
    following = dict(pairwise(starts))
    seen = -1
    for address, _, size, raw in found:
        if address == seen:
            continue
        seen = address
        reach = address + (min(size, MAX_REACH) or MAX_REACH)
        end = min(following.get(address, reach), reach, 1 << 64)
        yield address, end, _name(raw)


def _name(raw: bytes) -> str:
    """`T arch/x86/nmi.c#do_nmi_stats` (Xen) -> do_nmi_stats; `scsi_done\\t[scsi_mod]` -> `scsi_done [scsi_mod]`."""
    text = raw.decode("utf-8", "replace").strip()
    head, tab, module = text.partition("\t[")
    head = head.rpartition("#")[2] or head
    return clean(head.strip() + (" [" + module if tab else ""))


def _unpack(file: BinaryIO, path: str) -> bytes:
    """The text of a map file, at most MAX_FILE bytes of it."""
    data = file.read(MAX_FILE + 1)
    if data.startswith(b"\x1f\x8b"):
        pieces = iter(partial(gzip.GzipFile(fileobj=io.BytesIO(data)).read, 1 << 20), b"")
    elif data.startswith(b"\x28\xb5\x2f\xfd"):
        pieces = _unzstd(data)
    else:
        pieces = iter((data,))
    out = io.BytesIO()
    try:
        for piece in pieces:
            if out.tell() + len(piece) > MAX_FILE:
                raise FormatError(path, f"larger than {MAX_FILE >> 20} MiB", out.tell())
            out.write(piece)
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise FormatError(path, f"damaged packing: {error}", out.tell()) from None
    return out.getvalue()


def _unzstd(data: bytes) -> Iterator[bytes]:
    """All frames, in bounded pieces; raises EOFError if the last is not whole (zstandard's own reader just stops)."""
    unpacker = zstandard.ZstdDecompressor()
    at, stream = 0, unpacker.decompressobj()
    while at < len(data):
        if stream.eof:
            stream = unpacker.decompressobj()
        part = data[at : at + 1024]  # one call gives at most 32 MiB from that
        yield stream.decompress(part)
        at += len(part) - (len(stream.unused_data) if stream.eof else 0)
    if not stream.eof:
        raise EOFError("zstd data is cut short")


def load(path: str | os.PathLike[str]) -> Symbols:
    """Read a map file."""
    return Symbols.load(os.fspath(path))
