"""Native traces: opening and checking `.tdbg` files."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, BinaryIO

from tracedbg import wire
from tracedbg.errors import FormatError
from tracedbg.layout import Layout
from tracedbg.output import os_error
from tracedbg.state import Event, EventFlag, Kind, Known, Source

SMALL = 64 << 20  # files up to this size are read whole and checked whole; larger ones, and those of our own, are mapped

Meta = dict[str, Any]

_KINDS = tuple(Kind)
_SOURCES = tuple(Source)


@dataclass(frozen=True, slots=True)
class MemoryRange:
    """Initial contents of stack memory."""

    addr: int
    data: bytes


class Trace:
    """A native trace: `events` is a read-only view of 64-byte records, the rest is decoded when opened.

    `unfinished` says that the writer did not finish the file; `ignored` is the number of trailing bytes not used;
    `foreign` is the name of the format that the trace was read from, None if it was native.
    Close order matters: who exported a pointer to `events` (Replay) is closed first.
    """

    def __init__(self, path: str, view: memoryview, owner: mmap.mmap | None) -> None:
        self.path = path
        self._view = view
        self._owner = owner
        self.unfinished = False
        self.ignored = 0
        self.foreign: str | None = None
        self.meta: Meta = {}
        self.layout = Layout()
        self.memory: tuple[MemoryRange, ...] = ()
        self.payload: memoryview = view[0:0]
        self.symbols = b""
        self.events: memoryview = view[0:0]
        self._checks: memoryview = view[0:0]
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Trace:
        """Open and check a file. Raises FormatError with path and offset."""
        name = os.fspath(path)
        try:
            with open(name, "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    return cls(name, memoryview(file.read()), None)
                return cls.from_file(file, name)
        except OSError as error:
            raise os_error(name, error) from None

    @classmethod
    def from_file(cls, file: BinaryIO, name: str, *, private: bool = False) -> Trace:
        """Open a trace from an open regular file. `private`: nobody else can cut it short while it is mapped."""
        size = os.fstat(file.fileno()).st_size
        if size <= SMALL and not private:
            file.seek(0)
            return cls(name, memoryview(file.read()), None)
        owner = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return cls(name, memoryview(owner), owner)

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "-") -> Trace:
        """Open a trace that is in memory."""
        return cls(name, memoryview(data), None)

    @property
    def count(self) -> int:
        """Number of events."""
        return len(self.events) // wire.EVENT_SIZE

    def event(self, index: int) -> Event:
        """Decode one event; an unknown kind or source is UNKNOWN. Raises IndexError outside the trace."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        at = index * wire.EVENT_SIZE
        values = wire.EVENT_PACK.unpack_from(self.events, at)
        kind = _KINDS[values[12]] if values[12] < len(_KINDS) else Kind.UNKNOWN
        source = _SOURCES[values[14]] if values[14] < len(_SOURCES) else Source.UNKNOWN
        (time, rip, rsp, addr, value, rflags, code, number, cpu, cs, ss, known, _, arg, _, flags) = values
        return Event(
            index, kind, time, rip, rsp, addr, value, rflags, code, number, cpu, cs, ss,
            Known(known & 0x1FFF), arg, source, EventFlag(flags & 0x7F),
        )  # fmt: skip

    def find_source_index(self, number: int) -> int | None:
        """The first event that has this number at its source (QEMU's N); None if there is none."""
        step = 1 << 22
        for at in range(0, len(self.events), step):
            chunk = self.events[at : at + step]
            # u32 12 of a record is its source_index, u16 29 its known bits.
            numbers, known = chunk.cast("I")[12::16].tolist(), chunk.cast("H")[29::32].tolist()
            for place, value in enumerate(numbers):
                if value == number and known[place] & Known.SOURCE_INDEX:
                    return at // wire.EVENT_SIZE + place
        return None

    def check(self) -> Iterator[int]:
        """Verify the checksums of the events block by block; yields the events covered so far. Raises FormatError."""
        sums = memoryview(self._checks).cast("I") if len(self._checks) else None
        block = wire.CRC_BLOCK * wire.EVENT_SIZE
        for number in range(len(sums) if sums is not None else 0):
            chunk = self.events[number * block : (number + 1) * block]
            if sums is not None and zlib.crc32(chunk) != sums[number]:
                raise FormatError(
                    self.path,
                    f"checksum of events {number * wire.CRC_BLOCK} to {number * wire.CRC_BLOCK + len(chunk) // 64 - 1} is wrong",
                    self.events_offset + number * block,
                )
            yield min((number + 1) * wire.CRC_BLOCK, self.count)

    def lengthen(self, view: memoryview) -> None:
        """Go on with a longer view of the same unfinished file. Who holds the old events keeps them."""
        self._view = view
        self._take_rest()

    def become(self, other: Trace) -> None:
        """Take all that another trace holds, which is not to be used any more."""
        vars(self).update(vars(other))

    def close(self) -> None:
        """Release the buffers.

        What others still hold (slices in the frames of an exception on its way, say) keeps the file mapped until they let
        go: no reason to hide that exception by another.
        """
        for view in (self.events, self.payload, self._checks, self._view):
            with contextlib.suppress(BufferError):
                view.release()
        if self._owner is not None:
            with contextlib.suppress(BufferError):
                self._owner.close()
            self._owner = None

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # -- reading ----------------------------------------------------------------------------------------------------

    def _fail(self, message: str, offset: int) -> FormatError:
        return FormatError(self.path, message, offset)

    def _read(self) -> None:
        size = len(self._view)
        if size == 0:
            raise self._fail("empty file", 0)
        if bytes(self._view[: min(8, size)]) != wire.MAGIC[: min(8, size)]:
            raise self._fail("not a tracedbg trace (wrong magic)", 0)
        width = wire.HEADER.sizeof()
        if size < width:
            raise self._fail(f"header is cut short ({size} of {width} bytes)", size)
        raw = bytes(self._view[:width])
        head = wire.parse(wire.HEADER, raw, self.path, 0)
        if head.major > wire.VERSION_MAJOR:
            version = f"{head.major}.{head.minor}"
            raise self._fail(f"format version {version} is newer than this program reads ({wire.VERSION_MAJOR}.x)", 8)
        if zlib.crc32(raw[:-4] + bytes(4)) != head.header_crc:
            raise self._fail("checksum of the header is wrong", 0)
        if not 1 <= head.cpus <= wire.MAX_CPUS:
            raise self._fail(f"absurd number of CPUs ({head.cpus})", 24)
        if head.section_count > wire.MAX_SECTIONS:
            raise self._fail(f"absurd number of sections ({head.section_count})", 28)
        self.cpus: int = head.cpus
        self.clock_hz: int = head.clock_hz
        self.version = (head.major, head.minor)
        self.unfinished = not head.flags & wire.FLAG_FINISHED
        sections = self._read_table(head, size)
        self._read_events(sections, size)
        self.payload = self._section(sections, "BYTES")[0]
        data, at = self._section(sections, "LAYOUT")
        if len(data):
            self.layout = Layout.from_bytes(bytes(data), self.path, at, self.cpus)
        data, at = self._section(sections, "META")
        self.meta = self._read_meta(bytes(data), at)
        names = self.meta.get("stack_names")
        if isinstance(names, dict):
            slots = {str(slot): slot for slot in range(1, 9)}
            self.layout.names.update({slots[k]: v for k, v in names.items() if k in slots and isinstance(v, str)})
        data, at = self._section(sections, "MEMORY")
        self.memory = self._read_memory(bytes(data), at)
        self.symbols = bytes(self._section(sections, "SYMBOLS")[0])

    def _read_table(self, head: Any, size: int) -> dict[int, tuple[int, int, int]]:
        width = wire.SECTION.sizeof()
        end = head.table_offset + head.section_count * width
        if end > size:
            raise self._fail("section table lies past the end of the file (truncated?)", min(head.table_offset, size))
        raw = bytes(self._view[head.table_offset : end])
        if zlib.crc32(raw) != head.table_crc:
            raise self._fail("checksum of the section table is wrong", head.table_offset)
        sections: dict[int, tuple[int, int, int]] = {}
        for number in range(head.section_count):
            at = head.table_offset + number * width
            entry = wire.parse(wire.SECTION, raw[number * width : (number + 1) * width], self.path, at)
            if entry.offset > size or entry.length > size - entry.offset:
                raise self._fail(f"section {number} lies past the end of the file (truncated?)", at)
            if entry.kind in sections:
                raise self._fail(f"section {number} is there twice", at)
            sections[entry.kind] = (entry.offset, entry.length, entry.crc)
        return sections

    def _section(self, sections: dict[int, tuple[int, int, int]], name: str) -> tuple[memoryview, int]:
        offset, length, crc = sections.get(wire.SECTION_KINDS[name], (0, 0, 0))
        data = self._view[offset : offset + length]
        if length and zlib.crc32(data) != crc:
            raise self._fail(f"checksum of the {name} section is wrong", offset)
        return data, offset

    def _read_events(self, sections: dict[int, tuple[int, int, int]], size: int) -> None:
        offset, length, _ = sections.get(wire.SECTION_KINDS["EVENTS"], (0, 0, 0))
        if offset % wire.ALIGN or length % wire.EVENT_SIZE:
            raise self._fail("EVENTS section is not aligned to 64 bytes", offset)
        self.events_offset: int = offset
        if self.unfinished and offset:
            self._take_rest()
            return
        self.events = self._view[offset : offset + length]
        if not self.unfinished:  # else there are none yet
            self._checks = self._section(sections, "CHECKS")[0]
            blocks = -(-self.count // wire.CRC_BLOCK)
            if len(self._checks) != 4 * blocks:
                raise self._fail("CHECKS section does not fit the number of events", offset)
            if size <= SMALL and self._owner is None:
                for _ in self.check():
                    pass

    def _take_rest(self) -> None:
        """What an unfinished file has behind the begin of its events are events."""
        rest = len(self._view) - self.events_offset
        length = rest // wire.EVENT_SIZE * wire.EVENT_SIZE
        # A crash may leave blocks that were allocated but never written: kind 0 is no event.
        while length and self._view[self.events_offset + length - 4] == 0:
            length -= wire.EVENT_SIZE
        self.ignored = rest - length
        self.events = self._view[self.events_offset : self.events_offset + length]

    def _read_meta(self, data: bytes, offset: int) -> Meta:
        if len(data) > wire.MAX_META:
            raise self._fail("META section is absurdly large", offset)
        if not data:
            return {}
        try:
            meta = json.loads(data)
        except (ValueError, RecursionError):
            raise self._fail("META section is not JSON", offset) from None
        if not isinstance(meta, dict):
            raise self._fail("META section is not a JSON object", offset)
        return meta

    def _read_memory(self, data: bytes, offset: int) -> tuple[MemoryRange, ...]:
        if not data:
            return ()
        width, record = wire.MEMORY_HEAD.sizeof(), wire.RANGE_PACK.size
        if len(data) < width:
            raise self._fail("MEMORY section is cut short", offset)
        count = wire.parse(wire.MEMORY_HEAD, data[:width], self.path, offset).count
        at = width + count * record
        if at > len(data):
            raise self._fail(f"absurd number of memory ranges ({count})", offset)
        result = []
        for number, (addr, length) in enumerate(wire.RANGE_PACK.iter_unpack(data[width:at])):
            if length > len(data) - at or addr + length > 1 << 64:
                raise self._fail(f"memory range {number} lies past the section's end", offset + width + number * record)
            result.append(MemoryRange(addr, data[at : at + length]))
            at += length
        return tuple(result)
