"""Any place of an input, by offset: of the file itself, or of a temporary copy of what comes packed or through a pipe."""

from __future__ import annotations

import os
import tempfile
from typing import BinaryIO

from tracedbg.errors import FormatError
from tracedbg.formats.source import Input
from tracedbg.output import os_error, spool_error


class Store:
    """The bytes of an input. Takes all of it first, so that its digest is that of the whole."""

    def __init__(self, source: Input, magic: bytes) -> None:
        """`magic`: a file that begins so lies there unpacked."""
        self.path = source.path
        try:
            file = self._plain(source, magic)
            if file is None:
                file = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close())
                for piece in source.chunks():
                    file.write(piece)
                file.flush()
            else:
                for _ in source.chunks():
                    pass
            self._file: BinaryIO = file
            self.size = source.bytes
        except OSError as error:
            raise spool_error(source.path, error) from None

    @staticmethod
    def _plain(source: Input, magic: bytes) -> BinaryIO | None:
        if not source.is_file:
            return None
        file = open(source.path, "rb")  # noqa: SIM115 (closed by close())
        if os.pread(file.fileno(), len(magic), 0) == magic:
            return file
        file.close()
        return None

    def read(self, at: int, size: int) -> bytes:
        """The bytes [at, at + size), fewer only at the end. Raises FormatError for read errors."""
        if at >= self.size or size <= 0:
            return b""
        try:
            return os.pread(self._file.fileno(), min(size, self.size - at), at)
        except OSError as error:
            raise os_error(self.path, error) from None

    def whole(self, at: int, size: int) -> bytes:
        """The bytes [at, at + size). Raises FormatError if the file ends before."""
        data = self.read(at, size) if at + size <= self.size else b""
        if len(data) != size:
            raise FormatError(self.path, "cut short", min(at, self.size))
        return data

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Cursor:
    """Reads one thing after the other from a store, or from unpacked bytes of it. Everything is little-endian."""

    def __init__(self, store: Store, at: int, end: int, data: bytes | None = None) -> None:
        """From `at` up to `end`; `data`: an unpacked section, whose bytes are meant then. Errors name the place in the file."""
        self.at = at
        self.end = end
        self._store = store
        self._data = data
        self._origin = at

    @classmethod
    def of(cls, store: Store, at: int, data: bytes) -> Cursor:
        """Of unpacked bytes whose packed ones begin at `at`."""
        cursor = cls(store, 0, len(data), data)
        cursor._origin = at
        return cursor

    def fail(self, what: str) -> FormatError:
        """An error at this place."""
        return FormatError(self._store.path, what, self._origin if self._data is not None else self.at)

    def skip(self, size: int) -> int:
        """Pass over bytes; where they begin."""
        if size > self.end - self.at:
            raise self.fail("cut short")
        at = self.at
        self.at += size
        return at

    def bytes(self, size: int) -> bytes:
        """The next bytes."""
        if size > self.end - self.at:
            raise self.fail("cut short")
        data = self._store.whole(self.at, size) if self._data is None else self._data[self.at : self.at + size]
        self.at += size
        return data

    def number(self, size: int) -> int:
        """The next unsigned number."""
        return int.from_bytes(self.bytes(size), "little")

    def text(self, limit: int) -> str:
        """The next text, which ends with a 0."""
        room = min(limit + 1, self.end - self.at)
        data = self._store.read(self.at, room) if self._data is None else self._data[self.at : self.at + room]
        size = data.find(b"\0")
        if size < 0:
            raise self.fail("cut short" if room <= limit else f"a name of more than {limit} bytes")
        self.at += size + 1
        return data[:size].decode("utf-8", "replace")
