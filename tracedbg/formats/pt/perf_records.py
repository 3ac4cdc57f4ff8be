"""The records of a perf.data file that Intel PT needs, in one pass: linux tools/perf/Documentation/perf.data-file-format.txt.

A file is a header, the attributes of its events, records. A record is u32 type, u16 misc, u16 size, its payload; behind an
AUXTRACE record come so many bytes of AUX data as it says.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from tracedbg.errors import FormatError

MAGIC = b"PERFILE2"
BLOCK = 1 << 20  # bytes of AUX data given at a time

AUX = 11
HEADER_ATTR = 64
AUXTRACE_INFO = 70
AUXTRACE = 71

_HEADER = struct.Struct("<8sQQQQQQ")  # magic, size, attr size, attrs offset and size, data offset and size
_PIPE_HEADER = 16
_FLAGS_AT, _FEATURE_AUXTRACE = 72, 18
_RECORD = struct.Struct("<IHH")
_AUXTRACE = struct.Struct("<QQQIIII")  # size, offset, reference, idx, tid, cpu, reserved
_MAX_ATTRS = 1 << 20  # bytes
_WANTED = frozenset((AUX, HEADER_ATTR, AUXTRACE_INFO))


@dataclass(frozen=True, slots=True)
class Attr:
    """struct perf_event_attr, as far as it matters."""

    type: int
    config: int
    sample_type: int
    flags: int

    @property
    def exclude_user(self) -> bool:
        """Not traced at CPL3."""
        return bool(self.flags >> 4 & 1)

    @property
    def exclude_kernel(self) -> bool:
        """Not traced at CPL0."""
        return bool(self.flags >> 5 & 1)

    @property
    def sample_id_all(self) -> bool:
        """Records that are no samples end with a sample ID."""
        return bool(self.flags >> 18 & 1)


@dataclass(frozen=True, slots=True)
class Record:
    """A record other than AUX data."""

    type: int
    at: int  # offset in the file
    payload: bytes


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an AUX buffer. `offset`: in its stream; `first`: the record's first piece; `reference`: TSC when it was read."""

    at: int  # offset in the file
    idx: int
    cpu: int
    offset: int
    reference: int
    data: bytes
    first: bool


def attr(raw: bytes) -> Attr:
    """An attribute of at least 48 bytes."""
    kind, _, config, _, sample_type, _, flags = struct.unpack_from("<IIQQQQQ", raw)
    return Attr(kind, config, sample_type, flags)


class PerfFile:
    """Goes through a file once. `attrs`: those in the header, or, of a pipe, those seen; `damage`: file offset, what."""

    def __init__(self, path: str, pieces: Iterator[bytes]) -> None:
        self.attrs: list[Attr] = []
        self.damage: tuple[int, str] | None = None
        self.records = 0
        self._path = path
        self._pieces = pieces
        self._data = b""
        self._at = 0
        self._offset = 0
        self._end: int | None = None  # of the records, None: of the input
        self._begin()

    def walk(self) -> Iterator[Record | Chunk]:
        """The records that matter, and AUX data in pieces."""
        while self._end is None or self._offset < self._end:
            at = self._offset
            head = self._peek(_RECORD.size)
            if not head and self._end is None:
                return
            if len(head) < _RECORD.size:
                self._cut()
                return
            kind, _, size = _RECORD.unpack(head)
            if size < _RECORD.size:
                self.damage = (at, "not a record; the rest is not read")
                return
            record = self._peek(size) if kind == AUXTRACE or kind in _WANTED else head
            if len(record) < (size if record is not head else len(head)) or not self._skip(size):
                self._cut()
                return
            self.records += 1
            if kind == AUXTRACE:
                if size < _RECORD.size + _AUXTRACE.size:
                    self.damage = (at, "an AUXTRACE record that is too short; the rest is not read")
                    return
                yield from self._aux(at, record)
                if self.damage is not None:
                    return
            elif kind in _WANTED:
                if kind == HEADER_ATTR and size >= _RECORD.size + 48 and len(self.attrs) < _MAX_ATTRS >> 7:
                    self.attrs.append(attr(record[_RECORD.size :]))
                yield Record(kind, at, record[_RECORD.size :])

    def _aux(self, at: int, record: bytes) -> Iterator[Chunk]:
        left, offset, reference, idx, _, cpu, _ = _AUXTRACE.unpack_from(record, _RECORD.size)
        first = True
        while left:
            data = self._peek(min(left, BLOCK))
            if data:
                yield Chunk(at, idx, cpu, offset, reference, data, first)
            self._skip(len(data))
            if len(data) < min(left, BLOCK):
                self._cut()
                return
            first = False
            offset += len(data)
            left -= len(data)

    def _begin(self) -> None:
        head = self._peek(_HEADER.size)
        if not head.startswith(MAGIC):
            raise FormatError(self._path, "not a perf.data", 0)
        size = int.from_bytes(head[8:16], "little")
        if len(head) >= _PIPE_HEADER and size == _PIPE_HEADER:  # `perf record -o -`
            self._skip(_PIPE_HEADER)
            return
        head = self._peek(_FLAGS_AT + 8)
        if len(head) < _FLAGS_AT + 8 or size < _FLAGS_AT + 8:
            raise FormatError(self._path, "perf.data without a whole header", 0)
        _, _, attr_size, attrs_at, attrs_size, data_at, data_size = _HEADER.unpack_from(head)
        if attr_size < 48 + 16 or attrs_size > _MAX_ATTRS or attrs_at < size or attrs_at + attrs_size > data_at:
            raise FormatError(self._path, "perf.data with a damaged header", 0)
        if data_size and not int.from_bytes(head[_FLAGS_AT : _FLAGS_AT + 8], "little") >> _FEATURE_AUXTRACE & 1:
            raise no_trace(self._path)
        if self._skip(attrs_at):
            raw = self._peek(attrs_size)
            self.attrs = [attr(raw[n : n + 48]) for n in range(0, len(raw) - attr_size + 1, attr_size)]
        if not self._skip(data_at - self._offset):
            raise FormatError(self._path, "perf.data that ends before its records", self._offset)
        if data_size:  # else perf did not get to the end: it is written then
            self._end = data_at + data_size

    def _cut(self) -> None:
        self.damage = (self._offset, "cut short")

    def _peek(self, size: int) -> bytes:
        """The next bytes, fewer only at the end of the input."""
        while len(self._data) - self._at < size and (piece := next(self._pieces, None)) is not None:
            self._data = self._data[self._at :] + piece
            self._at = 0
        return self._data[self._at : self._at + size]

    def _skip(self, size: int) -> bool:
        """Go on; False: the input ends before that."""
        while len(self._data) - self._at < size and (piece := next(self._pieces, None)) is not None:
            here = len(self._data) - self._at
            size -= here
            self._offset += here
            self._data, self._at = piece, 0
        done = min(size, len(self._data) - self._at)
        self._offset += done
        self._at += done
        return done == size


def no_trace(path: str) -> FormatError:
    """The input has no Intel PT."""
    return FormatError(path, "perf.data without Intel PT data; for other events give me the output of `perf script`", 0)
