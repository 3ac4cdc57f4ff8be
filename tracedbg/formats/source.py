"""Bytes of an input file: from a file or a pipe, plain or compressed, in bounded pieces."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import zlib
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import BinaryIO

import zstandard

from tracedbg.errors import FormatError, UsageError
from tracedbg.output import os_error

CHUNK = 1 << 20
HEAD = 1 << 20  # bytes looked at to recognise a format
GZIP_FEED = 64 << 10  # bytes unpacked at a time: what follows a member's end is copied for each of many small members
ZSTD_FEED = 1 << 10  # zstd has no bound for what one call gives: a block of 4 bytes is 128 KiB, so 32 MiB come from this
STDIN = "-"

_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
PACKED = (_GZIP, _ZSTD)
# A log compresses 10 to 100 times, a run of equal bytes 1,000 times (gzip) and more: beyond this it is a bomb.
_MAX_RATIO = 800
_FREE = 256 << 20  # bytes of output that no ratio is asked of


class Input:
    """An input opened for one pass. `head` is its decompressed beginning; `chunks()` gives all of it, once."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.name = "stdin" if path == STDIN else os.path.basename(path)
        self.is_file = False
        self.place: tuple[int, int] | None = None  # of a file: which it is, whatever it is called
        self.raw_bytes = 0
        self.bytes = 0
        self._digest = hashlib.sha256()
        self._owned = path != STDIN
        self.packed = False  # whether what is read comes out of gzip or zstd
        try:
            self._file: BinaryIO = open(path, "rb") if self._owned else sys.stdin.buffer  # noqa: SIM115 (closed by close())
        except OSError as error:
            raise os_error(path, error) from None
        except ValueError:
            raise FormatError(path, "not a file name") from None
        try:
            if self._owned:
                found = os.fstat(self._file.fileno())
                self.is_file = stat.S_ISREG(found.st_mode)
                self.place = (found.st_dev, found.st_ino) if self.is_file else None
            self._stream = self._pieces()
            self._first: list[bytes] = []
            size = 0
            for piece in self._stream:
                self._first.append(piece)
                size += len(piece)
                if size >= HEAD:
                    break
        except BaseException:
            self.close()
            raise
        self.head = b"".join(self._first)[:HEAD]
        if not self.head:
            self.close()
            raise FormatError(path, "empty file", 0)

    def chunks(self) -> Iterator[bytes]:
        """The decompressed bytes. Raises FormatError for damage and read errors."""
        first, self._first = self._first, []
        yield from first
        yield from self._stream

    @property
    def sha256(self) -> str:
        """Digest of the bytes as they lie in the file, as far as read."""
        return self._digest.hexdigest()

    def close(self) -> None:
        """Close the file; standard input stays open."""
        if self._owned:
            self._file.close()

    def __enter__(self) -> Input:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _raw(self) -> Iterator[bytes]:
        # A pipe may have less than asked for at hand: read1 passes on what is there.
        read = self._file.read if self.is_file else getattr(self._file, "read1", self._file.read)
        while True:
            try:
                data: bytes = read(CHUNK)
            except OSError as error:
                raise os_error(self.path, error) from None
            if not data:
                return
            self._digest.update(data)
            self.raw_bytes += len(data)
            yield data

    def _pieces(self) -> Iterator[bytes]:
        raw = self._raw()
        start = b""
        for data in raw:
            start += data
            if len(start) >= 4:
                break
        self.packed = start.startswith(PACKED)
        if start[:2] == _GZIP:
            source = self._gunzip(start, raw)
        elif start[:4] == _ZSTD:
            source = self._unzstd(start, raw)
        else:
            source = _prepend(start, raw)
        for piece in source:
            if piece:
                self.bytes += len(piece)
                yield piece

    def _gunzip(self, start: bytes, raw: Iterator[bytes]) -> Iterator[bytes]:
        stream = zlib.decompressobj(wbits=31)
        for data, rest in _slices(_prepend(start, raw), GZIP_FEED):
            while data:
                if stream.eof:  # members follow each other; zero padding behind the last is allowed
                    data = data.lstrip(b"\0")
                    if not data:
                        break
                    stream = zlib.decompressobj(wbits=31)
                try:
                    piece = stream.decompress(data, CHUNK)
                except zlib.error:
                    raise FormatError(self.path, "damaged gzip data", self.raw_bytes - rest - len(data)) from None
                data = stream.unused_data if stream.eof else stream.unconsumed_tail
                self._check_ratio(piece)
                yield piece
        while not stream.eof:
            piece = stream.decompress(b"", CHUNK)
            if not piece:
                raise FormatError(self.path, "gzip data is cut short", self.raw_bytes)
            yield piece

    def _unzstd(self, start: bytes, raw: Iterator[bytes]) -> Iterator[bytes]:
        unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 27)
        stream = unpacker.decompressobj()
        out: list[bytes] = []
        size = 0
        for data, rest in _slices(_prepend(start, raw), ZSTD_FEED):
            while data:
                if stream.eof:  # frames follow each other
                    stream = unpacker.decompressobj()
                try:
                    piece = stream.decompress(data)
                except zstandard.ZstdError:
                    raise FormatError(self.path, "damaged zstd data", self.raw_bytes - rest - len(data)) from None
                data = stream.unused_data if stream.eof else b""
                if piece:
                    out.append(piece)
                    size += len(piece)
            if size >= CHUNK or not rest:  # what a pipe gave is passed on before waiting for more
                piece = b"".join(out)
                self._check_ratio(piece)
                yield piece
                out, size = [], 0
        if not stream.eof:
            raise FormatError(self.path, "zstd data is cut short", self.raw_bytes)

    def _check_ratio(self, piece: bytes) -> None:
        total = self.bytes + len(piece)
        if total > _FREE and total > self.raw_bytes * _MAX_RATIO:
            raise FormatError(self.path, f"expands more than {_MAX_RATIO} times: not a log", self.raw_bytes)


def refuse_twice(inputs: Sequence[Input]) -> None:
    """Refuse a file that is there twice, for readers that take each for a thread or a CPU of its own. Raises UsageError."""
    seen: dict[tuple[int, int], str] = {}
    for source in inputs:
        if source.place is None:
            continue
        if source.place in seen:
            raise UsageError(f"{source.path} is the same file as {seen[source.place]}")
        seen[source.place] = source.path


def _prepend(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


def _slices(pieces: Iterator[bytes], size: int) -> Iterator[tuple[bytes, int]]:
    """Short slices of the pieces; with each, how many bytes of its piece come after it."""
    for piece in pieces:
        for at in range(0, len(piece), size):
            yield piece[at : at + size], max(len(piece) - at - size, 0)
