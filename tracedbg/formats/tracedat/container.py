"""What a trace.dat holds, and where: version 6 (one part after the other) and 7 (sections that options point to).

trace-cmd: Documentation/trace-cmd/trace-cmd.dat.v6.5.txt and ...v7.5.txt. What the manual leaves out, from its own files: the
options of version 6 are those of 7; the CPUs of a BUFFER are those with data, each with its number; the data of a packed CPU
is u32 chunks, then u32 packed size, u32 size, bytes for each.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import zstandard

from tracedbg import wire
from tracedbg.errors import FormatError
from tracedbg.formats.tracedat.file import Cursor, Store

MAGIC = b"\x17\x08\x44tracing"
PACKINGS = ("none", "zlib", "zstd")

MAX_TEXT = 64 << 20  # bytes of one text, or of one unpacked section: kernel symbols are 15 MB
MAX_EVENTS = 65536  # an id has 16 bits
MAX_SYSTEMS = 16384
MAX_SECTIONS = 256  # of options
MAX_BUFFERS = 1024
MAX_NAME = 1024

_PACKED = 1
_OPTIONS, _CPUSTAT, _BUFFER, _CLOCK, _OFFSET, _CPUCOUNT, _TIME_SHIFT, _TSC2NSEC = 0, 2, 3, 4, 7, 8, 12, 14
_HEADERS, _FTRACE, _EVENTS, _SYMBOLS, _BUFFER_TEXT = 16, 17, 18, 19, 22


@dataclass(frozen=True, slots=True)
class CpuData:
    """Pages of one CPU: their place and size in the file (packed: of the count of chunks, and of the chunks)."""

    cpu: int
    at: int
    size: int


@dataclass(frozen=True, slots=True)
class Buffer:
    """A ring buffer: the top one (name empty) or an instance."""

    name: str
    clock: str
    page_size: int
    packed: bool
    cpus: tuple[CpuData, ...]


@dataclass(slots=True)
class Container:
    """The parts that are read. `events`: system and format text; `symbols`: place, size and packing of kallsyms."""

    version: int
    long_size: int
    page_size: int
    packing: str = "none"
    header_page: str = ""
    events: list[tuple[str, str]] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    clock: str = ""
    cpus: int = 0
    tsc: tuple[int, int] | None = None  # ns = TSC * mult >> shift
    shifted: list[str] = field(default_factory=list)  # options that would change times
    stats: dict[str, int] = field(default_factory=dict)  # what the CPUs' statistics say was lost
    symbols: tuple[int, int] | None = None  # where kallsyms is (version 7: its section), and its size


def sniff(head: bytes) -> bool:
    """Whether an input begins so."""
    return head.startswith(MAGIC)


def unpacker(packing: str) -> Callable[[bytes, int], bytes]:
    """A function of packed bytes and the size they have unpacked. It raises ValueError for damage and other sizes."""
    zstd = zstandard.ZstdDecompressor(max_window_size=1 << 27) if packing == "zstd" else None

    def unpack(data: bytes, size: int) -> bytes:
        try:
            if zstd is not None:
                if zstandard.frame_content_size(data) > size:  # it would be believed
                    raise ValueError("packed data of another size than the file says")
                out = zstd.decompress(data, max_output_size=max(size, 1))
            elif packing == "zlib":
                out = zlib.decompressobj().decompress(data, size + 1)
            else:
                raise ValueError("packed data in a file without packing")
        except (zstandard.ZstdError, zlib.error, MemoryError):
            raise ValueError("damaged packing") from None
        if len(out) != size:
            raise ValueError("packed data of another size than the file says")
        return out

    return unpack


def read(store: Store) -> Container:
    """Read everything but the pages. Raises FormatError."""
    cursor = Cursor(store, 0, store.size)
    if cursor.bytes(len(MAGIC)) != MAGIC:
        raise FormatError(store.path, "not a trace.dat", 0)
    version = cursor.text(16)
    if version not in ("6", "7"):
        raise FormatError(store.path, f"a trace.dat of version {version[:8]!r}: 6 and 7 are read", len(MAGIC))
    if cursor.number(1):
        raise FormatError(store.path, "a big-endian trace: not of an x86 CPU, and not read", cursor.at - 1)
    found = Container(int(version), cursor.number(1), cursor.number(4))
    if found.long_size not in (4, 8):
        raise cursor.fail(f"longs of {found.long_size} bytes")
    (_Six if version == "6" else _Seven)(store, found).run(cursor)
    if not found.header_page:
        raise FormatError(store.path, "no description of the pages (header_page)", cursor.at)
    for buffer in found.buffers:
        numbers = [part.cpu for part in buffer.cpus]
        if len(set(numbers)) != len(numbers):
            raise FormatError(store.path, "two places with the data of one CPU")
        if numbers and max(numbers) >= wire.MAX_CPUS:
            raise FormatError(store.path, f"more than {wire.MAX_CPUS} CPUs")
    return found


class _Common:
    """What both versions have."""

    def __init__(self, store: Store, found: Container) -> None:
        self.store = store
        self.found = found

    def headers(self, cursor: Cursor) -> None:
        if cursor.text(MAX_NAME) != "header_page":
            raise cursor.fail("header_page expected")
        self.found.header_page = self.blob(cursor, 8)
        if cursor.text(MAX_NAME) != "header_event":
            raise cursor.fail("header_event expected")
        self.blob(cursor, 8)

    def blob(self, cursor: Cursor, width: int) -> str:
        size = cursor.number(width)
        if size > MAX_TEXT:
            raise cursor.fail("a text larger than any")
        return cursor.bytes(size).decode("utf-8", "replace")

    def ftrace(self, cursor: Cursor) -> None:
        self._formats(cursor, "ftrace")

    def formats(self, cursor: Cursor) -> None:
        systems = cursor.number(4)
        if systems > MAX_SYSTEMS:
            raise cursor.fail("more event systems than there can be")
        for _ in range(systems):
            self._formats(cursor, cursor.text(MAX_NAME))

    def _formats(self, cursor: Cursor, system: str) -> None:
        count = cursor.number(4)
        if count + len(self.found.events) > MAX_EVENTS:
            raise cursor.fail("more events than there can be")
        for _ in range(count):
            self.found.events.append((system, self.blob(cursor, 8)))

    def option(self, number: int, data: bytes) -> None:
        """An option whose value is in itself."""
        found = self.found
        if number == _CLOCK:
            words = data.rstrip(b"\0\n ").decode("utf-8", "replace").split()
            found.clock = next((word[1:-1] for word in words if word.startswith("[") and word.endswith("]")), found.clock)
        elif number == _CPUCOUNT and len(data) >= 4:
            found.cpus = int.from_bytes(data[:4], "little")
        elif number == _TSC2NSEC and len(data) >= 16:
            found.tsc = (int.from_bytes(data[:4], "little"), int.from_bytes(data[4:8], "little"))
        elif number in (_OFFSET, _TIME_SHIFT):
            found.shifted.append("OFFSET" if number == _OFFSET else "TIME_SHIFT")
        elif number == _CPUSTAT:
            for line in data.rstrip(b"\0").decode("utf-8", "replace").splitlines():
                name, _, count = line.partition(": ")
                if name in ("overrun", "commit overrun", "dropped events") and count.isdecimal() and len(count) < 19:
                    key = name.replace(" ", "_")
                    found.stats[key] = found.stats.get(key, 0) + int(count)


class _Six(_Common):
    """One part after the other."""

    def run(self, cursor: Cursor) -> None:
        found = self.found
        self.headers(cursor)
        self.ftrace(cursor)
        self.formats(cursor)
        size = cursor.number(4)
        found.symbols = (cursor.skip(size), size)
        cursor.skip(cursor.number(4))  # printk
        cursor.skip(cursor.number(8))  # command lines
        found.cpus = cursor.number(4)
        instances: list[tuple[str, int]] = []
        cpus = self._cpus(cursor, instances)
        found.buffers.append(Buffer("", found.clock or "local", found.page_size, False, cpus))
        for name, at in instances:
            cpus = self._cpus(Cursor(self.store, at, self.store.size), None)
            found.buffers.append(Buffer(name, found.clock or "local", found.page_size, False, cpus))

    def _cpus(self, cursor: Cursor, instances: list[tuple[str, int]] | None) -> tuple[CpuData, ...]:
        """The options, if any, and where the CPUs' pages are."""
        tag = cursor.bytes(10)
        if tag.startswith(b"options"):
            while number := cursor.number(2):
                size = cursor.number(4)
                if size > MAX_TEXT:
                    raise cursor.fail("an option larger than any")
                data = cursor.bytes(size)
                if number == _BUFFER and instances is not None and size >= 8:
                    instances.append((data[8:].split(b"\0")[0].decode("utf-8", "replace"), int.from_bytes(data[:8], "little")))
                    if len(instances) > MAX_BUFFERS:
                        raise cursor.fail("more buffers than there can be")
                elif instances is not None:
                    self.option(number, data)
            tag = cursor.bytes(10)
        if tag.startswith(b"latency"):
            raise cursor.fail("a latency trace: text without records; not read")
        if not tag.startswith(b"flyrecord"):
            raise cursor.fail("no trace data where it should begin")
        if self.found.cpus > wire.MAX_CPUS:
            raise cursor.fail(f"more than {wire.MAX_CPUS} CPUs")
        return tuple(CpuData(cpu, cursor.number(8), cursor.number(8)) for cpu in range(self.found.cpus))


class _Seven(_Common):
    """Sections: u16 id, u16 flags, u32 name, u64 size; options name their places."""

    def run(self, cursor: Cursor) -> None:
        found = self.found
        found.packing = cursor.text(MAX_NAME)
        cursor.text(MAX_NAME)  # its version
        if found.packing not in PACKINGS:
            raise cursor.fail(f"packed with {found.packing[:20]!r}: none, zlib and zstd are read")
        self._unpack = unpacker(found.packing)
        next_at = cursor.number(8)
        seen: set[int] = set()
        buffers: list[bytes] = []
        parts: dict[int, int] = {}
        while next_at:
            if next_at in seen or len(seen) >= MAX_SECTIONS:
                raise FormatError(self.store.path, "the sections of options do not end", next_at)
            seen.add(next_at)
            options = self._section(next_at, _OPTIONS)
            next_at = self._options(options, buffers, parts)
        readers = {_HEADERS: self.headers, _FTRACE: self.ftrace, _EVENTS: self.formats}
        for number, reader in readers.items():
            if number in parts:
                reader(self._section(parts[number], number))
        if _SYMBOLS in parts:
            found.symbols = (parts[_SYMBOLS], 0)
        for data in buffers:
            found.buffers.append(self._buffer(data))

    def _options(self, cursor: Cursor, buffers: list[bytes], parts: dict[int, int]) -> int:
        """Take the options of a section; where the next one is, 0: nowhere."""
        while cursor.at < cursor.end:
            number, size = cursor.number(2), cursor.number(4)
            data = cursor.bytes(size)
            if number == 0:
                return int.from_bytes(data[:8], "little")
            if number == _BUFFER:
                buffers.append(data)
                if len(buffers) > MAX_BUFFERS:
                    raise cursor.fail("more buffers than there can be")
            elif number == _BUFFER_TEXT:
                raise cursor.fail("a latency trace: text without records; not read")
            elif number in (_HEADERS, _FTRACE, _EVENTS, _SYMBOLS) and size >= 8:
                parts[number] = int.from_bytes(data[:8], "little")
            else:
                self.option(number, data)
        raise cursor.fail("the options have no end")

    def _header(self, at: int) -> tuple[int, bool, int]:
        """Of a section: its id, whether it is packed, its size."""
        head = Cursor(self.store, at, self.store.size)
        number, flags, _, size = head.number(2), head.number(2), head.number(4), head.number(8)
        return number, bool(flags & _PACKED), size

    def _section(self, at: int, wanted: int) -> Cursor:
        """The inside of a section, unpacked."""
        number, packed, size = self._header(at)
        if number != wanted:
            raise FormatError(self.store.path, f"section {wanted} expected, not {number}", at)
        if at + 16 + size > self.store.size:
            raise FormatError(self.store.path, "cut short", self.store.size)
        body = Cursor(self.store, at + 16, at + 16 + size)
        if not packed:
            return body
        packed_size, whole = body.number(4), body.number(4)
        if whole > MAX_TEXT:
            raise FormatError(self.store.path, "a section larger than any", at)
        data = body.bytes(packed_size)
        try:
            return Cursor.of(self.store, at, self._unpack(data, whole))
        except ValueError as error:
            raise FormatError(self.store.path, str(error), at) from None

    def _buffer(self, data: bytes) -> Buffer:
        cursor = Cursor.of(self.store, 0, data)
        at = cursor.number(8)
        name, clock = cursor.text(MAX_NAME), cursor.text(MAX_NAME)
        page_size, count = cursor.number(4), cursor.number(4)
        if count > wire.MAX_CPUS:
            raise FormatError(self.store.path, f"more than {wire.MAX_CPUS} CPUs", at)
        number, packed, _ = self._header(at) if count else (_BUFFER, False, 0)
        if number != _BUFFER:
            raise FormatError(self.store.path, f"section {_BUFFER} expected, not {number}", at)
        cpus = tuple(CpuData(cursor.number(4), cursor.number(8), cursor.number(8)) for _ in range(count))
        return Buffer(name, clock or self.found.clock or "local", page_size, packed, cpus)


def symbols(store: Store, found: Container) -> bytes:
    """The kernel's symbols, as /proc/kallsyms has them; empty if there are none. Raises FormatError."""
    if found.symbols is None:
        return b""
    at, size = found.symbols
    if found.version == 6:
        return store.read(at, min(size, MAX_TEXT))
    body = _Seven(store, found)
    body._unpack = unpacker(found.packing)
    cursor = body._section(at, _SYMBOLS)
    size = cursor.number(4)
    return cursor.bytes(size) if size <= MAX_TEXT else b""
