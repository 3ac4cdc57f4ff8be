"""Native traces: opening, checking and writing `.tdbg` files."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import mmap
import os
import shutil
import stat
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

from tracedbg import wire
from tracedbg.errors import FormatError, UsageError
from tracedbg.layout import Layout
from tracedbg.state import Event, EventFlag, Kind, Known, Source

SMALL = 64 << 20  # files up to this size are read whole and checked whole; larger ones are mapped

Meta = dict[str, Any]

_KINDS = tuple(Kind)
_SOURCES = tuple(Source)


@dataclass(frozen=True, slots=True)
class MemoryRange:
    """Initial contents of stack memory."""

    addr: int
    data: bytes


def os_error(path: str, error: OSError) -> FormatError:
    """An OSError as the one line that a user reads."""
    if error.errno == errno.EISDIR:
        return FormatError(path, "is a directory")
    return FormatError(path, (error.strerror or str(error)).lower())


def output_place(path: str, force: bool) -> str | None:
    """The file that an output named `path` becomes when it is whole: the one behind links, so that a link stays a link.

    None: what is there is no file that could be replaced (a device, a FIFO), and is written to as it is. Raises UsageError
    if a file or a disk would be overwritten without `force`, FormatError for a directory.
    """
    if not path:
        raise UsageError("the name of the output is empty")
    real = os.path.realpath(path) if os.path.islink(path) else path
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return real
    except OSError as error:
        raise os_error(path, error) from None
    if stat.S_ISDIR(mode):
        raise FormatError(path, "is a directory")
    if (stat.S_ISREG(mode) or stat.S_ISBLK(mode)) and not force:
        raise UsageError(f"{path} exists; --force overwrites it")
    # A file that has no name any more (/proc/self/fd/N of a deleted one) cannot be replaced either.
    return real if stat.S_ISREG(mode) and os.path.exists(real) and os.path.samefile(path, real) else None


def create_beside(target: str) -> tuple[BinaryIO, str]:
    """A new file beside `target`, to be renamed to it, and its name. Raises OSError."""
    # Part of the name is enough to know whose it is; a name may have 255 bytes.
    handle, name = tempfile.mkstemp(prefix=f".{os.path.basename(target)[:40]}.", dir=os.path.dirname(target) or ".")
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(name, 0o666 & ~umask)
    return os.fdopen(handle, "w+b"), name


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
    def from_file(cls, file: BinaryIO, name: str) -> Trace:
        """Open a trace from an open regular file."""
        size = os.fstat(file.fileno()).st_size
        if size <= SMALL:
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
        if self.unfinished and offset:
            length = (size - offset) // wire.EVENT_SIZE * wire.EVENT_SIZE
            # A crash may leave blocks that were allocated but never written: kind 0 is no event.
            while length and self._view[offset + length - 4] == 0:
                length -= wire.EVENT_SIZE
            self.ignored = size - offset - length
        self.events_offset: int = offset
        self.events = self._view[offset : offset + length]
        if not self.unfinished:  # else there are none yet
            self._checks = self._section(sections, "CHECKS")[0]
            blocks = -(-self.count // wire.CRC_BLOCK)
            if len(self._checks) != 4 * blocks:
                raise self._fail("CHECKS section does not fit the number of events", offset)
            if size <= SMALL:
                for _ in self.check():
                    pass

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


class TraceWriter:
    """Writes a native trace in blocks; what a killed writer has written can be opened.

    `path` is written beside itself and renamed when finished (`atomic`), or in place for live recording; a device or a FIFO
    gets the finished trace at close. Leaving the context with an exception removes an atomic output. Layout, meta and
    symbols set before the first event are in the file from then on; later values replace them at close.
    """

    BLOCK = 4096  # events buffered before a write

    def __init__(
        self,
        path: str | os.PathLike[str] | BinaryIO,
        *,
        cpus: int = 1,
        clock_hz: int = 0,
        atomic: bool = True,
        force: bool = False,
    ) -> None:
        self.cpus = cpus
        self.clock_hz = clock_hz
        self.layout = Layout()
        self.meta: Meta = {}
        self.symbols = b""
        self.memory: list[MemoryRange] = []
        self.count = 0
        self._buffer = bytearray()
        self._payload = bytearray()
        self._checks = bytearray()
        self._crc = 0
        self._crc_events = 0
        self._events_offset = 0
        self._early: dict[str, tuple[bytes, int]] = {}  # sections that stand before the events, and where
        self._target: str | None = None
        self._place: str | None = None  # what the temporary file becomes
        self._temporary: str | None = None
        self._closed = False
        if isinstance(path, (str, os.PathLike)):
            self._target = os.fspath(path)
            self._file = self._create(self._target, atomic, force)
        else:
            self._file = path

    def _create(self, target: str, atomic: bool, force: bool) -> BinaryIO:
        self._place = output_place(target, force)
        try:
            if self._place is None:
                return cast(BinaryIO, tempfile.TemporaryFile())
            if not atomic:
                return open(self._place, "w+b")
            file, self._temporary = create_beside(self._place)
            return file
        except OSError as error:
            raise os_error(target, error) from None

    def event(self, kind: Kind, **fields: int) -> int:
        """Append one event; a field that is given is known. Returns its index. `known` adds or replaces the mask."""
        known = fields.pop("known", None)
        if known is None:
            known = 0
            for name in fields:
                known |= _KNOWN_OF.get(name, 0)
        get = fields.get
        self.append(
            wire.EVENT_PACK.pack(
                get("time", 0), get("rip", 0), get("rsp", 0), get("addr", 0), get("value", 0),
                get("rflags", 0), get("code", 0), get("source_index", 0),
                get("cpu", 0), get("cs", 0), get("ss", 0), known, kind, get("arg", 0), get("source", 0), get("flags", 0),
            )
        )  # fmt: skip
        return self.count - 1

    def append(self, records: bytes | bytearray | memoryview) -> None:
        """Append packed 64-byte records."""
        if len(records) % wire.EVENT_SIZE:
            raise ValueError("records are 64 bytes each")
        self._buffer += records
        self.count += len(records) // wire.EVENT_SIZE
        if len(self._buffer) >= self.BLOCK * wire.EVENT_SIZE:
            self.flush()

    def payload(self, data: bytes) -> int:
        """Keep bytes for the BYTES section; returns their offset, which goes into an event's value."""
        at = len(self._payload)
        self._payload += data
        return at

    def flush(self) -> None:
        """Write what is buffered. Raises FormatError if that cannot be written."""
        try:
            self._flush()
        except OSError as error:
            raise os_error(self._target or "output", error) from None

    def _flush(self) -> None:
        if not self._events_offset:
            self._begin()
        if not self._buffer:
            return
        at = 0
        while at < len(self._buffer):
            room = (wire.CRC_BLOCK - self._crc_events) * wire.EVENT_SIZE
            chunk = bytes(self._buffer[at : at + room])
            self._crc = zlib.crc32(chunk, self._crc)
            self._crc_events += len(chunk) // wire.EVENT_SIZE
            at += len(chunk)
            if self._crc_events == wire.CRC_BLOCK:
                self._seal()
        self._file.write(self._buffer)
        self._file.flush()
        self._buffer.clear()

    def close(self) -> None:
        """Finish the file."""
        if self._closed:
            return
        try:
            self._flush()
            if self._crc_events:
                self._seal()
            end = self._file.tell()
            sections: dict[str, bytes | None] = {
                "EVENTS": None,
                "LAYOUT": self._layout_bytes(),
                "MEMORY": self._memory_bytes(),
                "BYTES": bytes(self._payload),
                "META": self._meta_bytes(),
                "SYMBOLS": self.symbols,
                "CHECKS": bytes(self._checks),
            }
            table = []
            for name, data in sections.items():
                if data is None:
                    table.append((name, 0, self._events_offset, self.count * wire.EVENT_SIZE))
                elif self._early.get(name, (b"", 0))[0] == data:
                    if data:
                        table.append((name, zlib.crc32(data), self._early[name][1], len(data)))
                elif data:
                    end = self._pad(end)
                    self._file.write(data)
                    table.append((name, zlib.crc32(data), end, len(data)))
                    end += len(data)
            end = self._pad(end)
            raw = _table_bytes(table)
            self._file.write(raw)
            self._file.flush()
            self._file.seek(0)
            self._file.write(self._header(wire.FLAG_FINISHED, end, len(table), raw))
            self._file.flush()
            if self._target is not None:
                self._deliver(self._target)
            self._closed = True
        except BrokenPipeError:
            self.abort()
            raise
        except OSError as error:
            self.abort()
            raise os_error(self._target or "output", error) from None
        except BaseException:
            self.abort()
            raise

    def _deliver(self, target: str) -> None:
        if self._place is None:
            self._file.seek(0)
            with open(target, "wb") as out:
                shutil.copyfileobj(self._file, out)
        self._file.close()
        if self._temporary is not None and self._place is not None:
            os.replace(self._temporary, self._place)
            self._temporary = None

    def abort(self) -> None:
        """Give up: an atomic output is removed, an output in place stays as far as it was written."""
        if self._closed and self._temporary is None:
            return
        self._closed = True
        if self._target is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            if self._temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(self._temporary)
                self._temporary = None

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    # -- writing ----------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Header and first table: enough to open the file while it grows."""
        early = {"LAYOUT": self._layout_bytes(), "META": self._meta_bytes(), "SYMBOLS": self.symbols}
        early = {name: data for name, data in early.items() if data}
        at = wire.HEADER.sizeof() + (len(early) + 1) * wire.SECTION.sizeof()
        table, body = [], b""
        for name, data in early.items():
            pad = -at % wire.ALIGN
            table.append((name, zlib.crc32(data), at + pad, len(data)))
            self._early[name] = (data, at + pad)
            body += bytes(pad) + data
            at += pad + len(data)
        pad = -at % wire.ALIGN
        self._events_offset = at + pad
        table.append(("EVENTS", 0, self._events_offset, 0))
        raw = _table_bytes(table)
        header = self._header(0, wire.HEADER.sizeof(), len(table), raw)
        self._file.write(header + raw + body + bytes(pad))

    def _header(self, flags: int, table_offset: int, count: int, table: bytes) -> bytes:
        fields = {
            "magic": wire.MAGIC,
            "major": wire.VERSION_MAJOR,
            "minor": wire.VERSION_MINOR,
            "flags": flags,
            "clock_hz": self.clock_hz,
            "cpus": max(self.cpus, len(self.layout.cpus), 1),
            "section_count": count,
            "table_offset": table_offset,
            "reserved": 0,
            "reserved2": 0,
            "table_crc": zlib.crc32(table),
            "header_crc": 0,
        }
        raw: bytes = wire.HEADER.build(fields)
        return raw[:-4] + zlib.crc32(raw).to_bytes(4, "little")

    def _seal(self) -> None:
        self._checks += self._crc.to_bytes(4, "little")
        self._crc = 0
        self._crc_events = 0

    def _pad(self, at: int) -> int:
        pad = -at % wire.ALIGN
        self._file.write(bytes(pad))
        return at + pad

    def _layout_bytes(self) -> bytes:
        try:
            return self.layout.to_bytes()
        except ValueError as error:
            raise FormatError(self._target or "output", str(error)) from None

    def _meta_bytes(self) -> bytes:
        meta = dict(self.meta)
        if self.layout.names:
            meta["stack_names"] = {str(k): v for k, v in self.layout.names.items()}
        try:
            return json.dumps(meta, sort_keys=True, separators=(",", ":")).encode() if meta else b""
        except RecursionError:
            raise FormatError(self._target or "output", "META is nested too deeply") from None

    def _memory_bytes(self) -> bytes:
        if not self.memory:
            return b""
        head: bytes = wire.MEMORY_HEAD.build({"count": len(self.memory), "reserved": 0})
        ranges = b"".join(wire.RANGE_PACK.pack(m.addr, len(m.data)) for m in self.memory)
        return head + ranges + b"".join(m.data for m in self.memory)


_KNOWN_OF = {
    "time": Known.TIME,
    "rip": Known.RIP,
    "rsp": Known.RSP,
    "addr": Known.ADDR,
    "value": Known.VALUE,
    "rflags": Known.RFLAGS,
    "code": Known.CODE,
    "source_index": Known.SOURCE_INDEX,
    "cpu": Known.CPU,
    "cs": Known.CS,
    "ss": Known.SS,
    "arg": Known.ARG,
    "source": Known.SOURCE,
}


def _table_bytes(table: list[tuple[str, int, int, int]]) -> bytes:
    return b"".join(
        wire.SECTION.build({"kind": wire.SECTION_KINDS[name], "crc": crc, "offset": offset, "length": length, "reserved": 0})
        for name, crc, offset, length in table
    )


def build(writer_fill: Any, *, name: str = "-", cpus: int = 1) -> Trace:
    """Make a trace in memory: `writer_fill(writer)` writes it. For tests and small foreign files."""
    buffer = io.BytesIO()
    writer = TraceWriter(buffer, cpus=cpus)
    writer_fill(writer)
    writer.close()
    return Trace.from_bytes(buffer.getvalue(), name)


def is_trace(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins with the magic of a native trace."""
    try:
        with Path(path).open("rb") as file:
            return file.read(8) == wire.MAGIC
    except OSError:
        return False
