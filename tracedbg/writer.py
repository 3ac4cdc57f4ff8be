"""Writing native traces: in blocks, so that what a killed writer has written can be opened."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
import zlib
from types import TracebackType
from typing import Any, BinaryIO, cast

from tracedbg import wire
from tracedbg.errors import FormatError
from tracedbg.layout import Layout
from tracedbg.output import create_beside, os_error, output_place, spool_error
from tracedbg.state import Kind, Known
from tracedbg.trace import MemoryRange, Meta, Trace


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
            raise self._failed(error) from None

    def _flush(self) -> None:
        if not self._events_offset:
            self._begin()
        if not self._buffer:
            return
        at = 0
        with memoryview(self._buffer) as view:
            while at < len(view):
                room = (wire.CRC_BLOCK - self._crc_events) * wire.EVENT_SIZE
                with view[at : at + room] as chunk:
                    self._crc = zlib.crc32(chunk, self._crc)
                    self._crc_events += len(chunk) // wire.EVENT_SIZE
                    at += len(chunk)
                if self._crc_events == wire.CRC_BLOCK:
                    self._seal()
            self._file.write(view)
        self._file.flush()
        self._buffer.clear()

    def _failed(self, error: OSError) -> FormatError:
        return spool_error("output", error) if self._target is None else os_error(self._target, error)

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
            raise self._failed(error) from None
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
