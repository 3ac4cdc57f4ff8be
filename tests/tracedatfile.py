"""Writes trace.dat files of version 6 and 7 for the tests, their pages record by record, from trace-cmd's manual of the format.

Knows nothing of the reader. trace-cmd reads what it writes (tests/test_tracedat.py asks it).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import zstandard

PAGE = 4096
NMI, HARDIRQ, SOFTIRQ = 0x40, 0x08, 0x10

_SIZES = {"u8": 1, "u16": 2, "u32": 4, "u64": 8, "int": 4, "bool": 1, "unsigned int": 4, "unsigned long": 8}
_COMMON = (("unsigned short", "common_type", 0, 2), ("unsigned char", "common_flags", 2, 1),
           ("unsigned char", "common_preempt_count", 3, 1), ("int", "common_pid", 4, 4))  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A tracepoint: its fields as (type, name), laid out as C does."""

    system: str
    name: str
    number: int
    fields: tuple[tuple[str, str], ...]
    shift: int = 0  # bytes between the common fields and these

    def places(self) -> list[tuple[str, str, int, int]]:
        at, found = 8 + self.shift, []
        for kind, name in self.fields:
            size = 4 if kind.startswith("__data_loc") else _SIZES[kind]
            at += -at % size
            found.append((kind, name, at, size))
            at += size
        return found

    def text(self) -> str:
        lines = [f"name: {self.name}\nID: {self.number}\nformat:"]
        for kind, name, at, size in (*_COMMON, ("", "", 0, 0), *self.places()):
            sign = int(kind in ("int", "s64"))
            lines.append(f"\tfield:{kind} {name};\toffset:{at};\tsize:{size};\tsigned:{sign};" if name else "")
        shown = " ".join(f"{name}=%llx" for kind, name in self.fields if not kind.startswith("__data_loc"))
        args = "".join(f", (long long)REC->{name}" for kind, name in self.fields if not kind.startswith("__data_loc"))
        return "\n".join(lines) + f'\n\nprint fmt: "{shown}"{args}\n'

    def record(self, *values: int | str, pid: int = 1, flags: int = 0) -> bytes:
        places = self.places()
        data = bytearray(max((at + size for _, _, at, size in places), default=8))
        struct.pack_into("<HBBi", data, 0, self.number, flags, 0, pid)
        for (_, _, at, size), value in zip(places, values, strict=True):
            if isinstance(value, str):
                text = value.encode() + b"\0"
                value = len(data) | len(text) << 16
                data += text
            data[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        return bytes(data)


class Page:
    """A page of the ring buffer, by its time; the next record's delta is given with it."""

    def __init__(self, time: int, size: int = PAGE, long_size: int = 8) -> None:
        self.time = time
        self.data = b""
        self._size = size
        self._long = long_size

    def raw(self, data: bytes) -> Page:
        self.data += data
        return self

    def _word(self, kind: int, delta: int) -> bytes:
        return struct.pack("<I", kind | delta << 5)

    def record(self, delta: int, payload: bytes) -> Page:
        """A record with its length in the type, or, beyond 112 bytes, in a word of its own."""
        padded = payload + bytes(-len(payload) % 4)
        if len(padded) > 112:
            return self.long(delta, payload)
        return self.raw(self._word(len(padded) // 4, delta) + padded)

    def long(self, delta: int, payload: bytes) -> Page:
        """A record of type 0: its length in a word of its own, which counts."""
        padded = payload + bytes(-len(payload) % 4)
        return self.raw(self._word(0, delta) + struct.pack("<I", len(payload) + 4) + padded)

    def taken_back(self, delta: int, payload: bytes) -> Page:
        """A record that was discarded: type 29 with a delta, the payload's length in its first word."""
        return self.raw(self._word(29, delta) + struct.pack("<I", len(payload)) + payload[4:])

    def rest(self, garbage: bytes = b"") -> Page:
        """Padding up to the end."""
        return self.raw(self._word(29, 0) + garbage)

    def extend(self, delta: int) -> Page:
        return self.raw(self._word(30, delta & (1 << 27) - 1) + struct.pack("<I", delta >> 27))

    def stamp(self, time: int) -> Page:
        return self.raw(self._word(31, time & (1 << 27) - 1) + struct.pack("<I", time >> 27 & 0xFFFFFFFF))

    def bytes(self, missed: int | None = None, *, counted: bool = True, used: int | None = None) -> bytes:
        """The page; `missed`: records lost before it (`counted`: with their number)."""
        commit = len(self.data) if used is None else used
        body = self.data
        if missed is not None:
            commit |= 1 << 31
            if counted:
                commit |= 1 << 30
                body += missed.to_bytes(self._long, "little")
        page = struct.pack("<Q", self.time) + commit.to_bytes(self._long, "little") + body
        assert len(page) <= self._size
        return page + bytes(self._size - len(page))


def header_page(long_size: int = 8, size: int = PAGE) -> str:
    data = 8 + long_size
    return (
        "\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;\n"
        f"\tfield: local_t commit;\toffset:8;\tsize:{long_size};\tsigned:1;\n"
        "\tfield: int overwrite;\toffset:8;\tsize:1;\tsigned:1;\n"
        f"\tfield: char data;\toffset:{data};\tsize:{size - data};\tsigned:1;\n"
    )


HEADER_EVENT = (
    "# compressed entry header\n\ttype_len    :    5 bits\n\ttime_delta  :   27 bits\n\tarray       :   32 bits\n\n"
    "\tpadding     : type == 29\n\ttime_extend : type == 30\n\ttime_stamp : type == 31\n\tdata max type_len  == 28\n"
)


@dataclass
class Buffer:
    """Pages of CPUs."""

    cpus: dict[int, bytes]
    name: str = ""
    clock: str = "local"


@dataclass
class File:
    """A trace.dat: `options` are further ones, as number and data."""

    points: Sequence[Point]
    buffers: Sequence[Buffer]
    clock: str = "local"
    kallsyms: bytes = b""
    options: Sequence[tuple[int, bytes]] = ()
    long_size: int = 8
    page_size: int = PAGE
    chunk: int = 10 * PAGE
    places: dict[str, int] = field(default_factory=dict)  # of parts, for tests that damage them

    def _clock_option(self) -> tuple[int, bytes]:
        names = ["local", "global", "mono", "uptime", "x86-tsc"]
        return 4, " ".join(f"[{n}]" if n == self.clock else n for n in dict.fromkeys([*names, self.clock])).encode() + b"\n\0"

    def _cpu_count(self) -> int:
        return max((cpu for b in self.buffers for cpu in b.cpus), default=0) + 1

    def _headers(self) -> bytes:
        page, event = header_page(self.long_size, self.page_size).encode(), HEADER_EVENT.encode()
        return b"header_page\0" + _sized(page, 8) + b"header_event\0" + _sized(event, 8)

    def _formats(self) -> bytes:
        systems: dict[str, list[bytes]] = {}
        for point in self.points:
            systems.setdefault(point.system, []).append(point.text().encode())
        body = struct.pack("<I", len(systems))
        for name, texts in systems.items():
            body += name.encode() + b"\0" + struct.pack("<I", len(texts)) + b"".join(_sized(t, 8) for t in texts)
        return body

    def _start(self, version: bytes) -> bytes:
        return b"\x17\x08\x44tracing" + version + b"\0" + struct.pack("<BBI", 0, 8, self.page_size)

    def six(self) -> bytes:
        """Version 6. Instances have their options point behind the top buffer."""
        count = self._cpu_count()
        head = self._start(b"6") + self._headers() + struct.pack("<I", 0) + self._formats() + _sized(self.kallsyms, 4)
        head += _sized(b"", 4) + _sized(b"", 8) + struct.pack("<I", count)
        options = [self._clock_option(), *self.options]
        tables = [b"flyrecord\0"] * len(self.buffers)
        size = len(head) + 10 + sum(6 + len(d) for _, d in options) + 2
        size += sum(6 + 8 + len(b.name) + 1 for b in self.buffers[1:])
        table_at, at = [], size
        for _ in self.buffers:
            table_at.append(at)
            at += 10 + 16 * count
        data = b""
        at += -at % self.page_size
        start = at
        for n, buffer in enumerate(self.buffers):
            for cpu in range(count):
                pages = buffer.cpus.get(cpu, b"")
                tables[n] += struct.pack("<QQ", at, len(pages))
                self.places[f"{buffer.name}{cpu}"] = at
                data += pages
                at += len(pages)
        options += [(3, struct.pack("<Q", table_at[n]) + b.name.encode() + b"\0") for n, b in enumerate(self.buffers) if n]
        out = head + b"options  \0" + b"".join(struct.pack("<HI", n, len(d)) + d for n, d in options) + bytes(2)
        out += b"".join(tables)
        return out + bytes(start - len(out)) + data

    def seven(self, packing: str = "none") -> bytes:
        """Version 7."""
        out = bytearray(self._start(b"7") + packing.encode() + b"\0" + b"1\0")
        first = len(out)
        out += bytes(8)

        def section(number: int, body: bytes, packed: bool = True) -> int:
            at = len(out)
            if packed and packing != "none":
                small = _pack(packing, body)
                body = struct.pack("<II", len(small), len(body)) + small
            out.extend(struct.pack("<HHIQ", number, int(packed and packing != "none"), 0, len(body)) + body)
            return at

        options = []
        parts = ((16, self._headers()), (17, bytes(4)), (18, self._formats()), (19, _sized(self.kallsyms, 4)),
                 (20, bytes(4)), (21, bytes(8)))  # fmt: skip
        for number, body in parts:
            options.append((number, struct.pack("<Q", section(number, body))))
        options += [self._clock_option(), *self.options, (8, struct.pack("<I", self._cpu_count()))]
        out[first : first + 8] = struct.pack("<Q", len(out))
        body = b"".join(struct.pack("<HI", n, len(d)) + d for n, d in options)
        section(0, body + struct.pack("<HI", 0, 8) + bytes(8), packed=False)
        next_place = len(out) - 8
        buffers = []
        for buffer in self.buffers:
            at = len(out)
            out += struct.pack("<HHIQ", 3, int(packing != "none"), 0, 0)
            listed = b""
            for cpu, pages in sorted(buffer.cpus.items()):
                out += bytes(-len(out) % self.page_size)
                begin = len(out)
                self.places[f"{buffer.name}{cpu}"] = begin
                if packing == "none":
                    out += pages
                    size = len(pages)
                else:
                    chunks = [pages[i : i + self.chunk] for i in range(0, len(pages), self.chunk)]
                    packs = [(_pack(packing, c), len(c)) for c in chunks]
                    out += struct.pack("<I", len(packs)) + b"".join(struct.pack("<II", len(p), n) + p for p, n in packs)
                    size = len(out) - begin - 4
                listed += struct.pack("<IQQ", cpu, begin, size)
            data = struct.pack("<Q", at) + buffer.name.encode() + b"\0" + buffer.clock.encode() + b"\0"
            buffers.append((3, data + struct.pack("<II", self.page_size, len(buffer.cpus)) + listed))
            out[at + 8 : at + 16] = struct.pack("<Q", len(out) - at - 16)
        out[next_place : next_place + 8] = struct.pack("<Q", len(out))
        body = b"".join(struct.pack("<HI", n, len(d)) + d for n, d in buffers)
        section(0, body + struct.pack("<HI", 0, 8) + bytes(8), packed=False)
        return bytes(out)


def _sized(data: bytes, width: int) -> bytes:
    return len(data).to_bytes(width, "little") + data


def _pack(packing: str, data: bytes) -> bytes:
    if packing == "zlib":
        return zlib.compress(data)
    return zstandard.ZstdCompressor(write_content_size=False).compress(data)
