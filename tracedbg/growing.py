"""A native trace that is still being written, followed by copying it: what its writer does to the file harms no reader."""

from __future__ import annotations

import enum
import mmap
import os
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from tracedbg import wire
from tracedbg.errors import FormatError, UsageError
from tracedbg.output import os_error
from tracedbg.trace import Trace

STEP = 16 << 20  # bytes copied in one go
ROOM = 64 << 20  # bytes of address space to begin with
TAIL = 4096  # bytes before the end that must not have changed


class Change(enum.Enum):
    """What has become of the file since it was last looked at."""

    NONE = enum.auto()
    MORE = enum.auto()  # events: the trace is longer
    FINISHED = enum.auto()  # the writer has finished it; the trace may be longer
    OTHER = enum.auto()  # finished, and what was known before holds no longer: to be replayed from the beginning


class Growing:
    """Follows a file. `trace` is the trace as far as copied, the same object all the time; `behind` says that there is more.

    A mapping of the file itself would kill the reader (SIGBUS) as soon as somebody truncates it, so the copy is mapped: a
    temporary file without a name. `adapt` does to each reading of the file what its user wants done (a layout of his own).
    """

    def __init__(self, path: str, adapt: Callable[[Trace], None] | None = None) -> None:
        self.path = path
        self.behind = False
        self._adapt = adapt
        self._source = -1
        self._copy = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        self._whole: memoryview = memoryview(b"")
        self._owner: mmap.mmap | None = None
        try:
            self._open()
        except OSError as error:
            self.close()
            raise os_error(path, error) from None
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        self._source = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
        found = os.fstat(self._source)
        if not stat.S_ISREG(found.st_mode):
            raise UsageError(f"{self.path}: only a file can be followed")
        head = self._head = os.pread(self._source, wire.HEADER.sizeof(), 0)
        if found.st_size and not head.startswith(wire.MAGIC[: len(head)]):
            raise FormatError(self.path, "not a native trace, and only those can be followed", 0)
        if _finished(head):
            self.trace = Trace.open(self.path)
        else:
            size = min(found.st_size, max(STEP, self._sections_end(head)))
            self._fill(0, size)
            self.behind = size < found.st_size
            self.trace = Trace(self.path, self._whole[:size], None)
            if not self.trace.events_offset:
                raise FormatError(self.path, "no place for events", 0)
        if self._adapt is not None:
            self._adapt(self.trace)

    @property
    def finished(self) -> bool:
        """Nothing more is to come."""
        return not self.trace.unfinished

    def poll(self) -> Change:
        """Look at the file again and copy at most STEP bytes of what is new. Raises FormatError if it is another one now."""
        if self.finished:
            return Change.NONE
        try:
            return self._poll()
        except OSError as error:
            raise os_error(self.path, error) from None

    def _poll(self) -> Change:
        held, named = os.fstat(self._source), os.stat(self.path)
        if (held.st_dev, held.st_ino) != (named.st_dev, named.st_ino):
            raise self._lost("has been replaced by another")
        done = self.trace.events_offset + len(self.trace.events)
        if held.st_size < done:
            raise self._lost("has been truncated")
        head = os.pread(self._source, len(self._head), 0)
        finished = _finished(head)
        tail = max(done - TAIL, len(head))
        if (head != self._head and not finished) or os.pread(self._source, done - tail, tail) != self._whole[tail:done]:
            raise self._lost("has been written anew")
        end = os.fstat(self._source).st_size  # at least what the header speaks of
        size = end if finished else min(end, done + STEP)
        self.behind = size < end
        self._fill(done, size)
        if finished:
            return self._finish(head, size)
        before = self.trace.count
        if size > done:
            self.trace.lengthen(self._whole[:size])
        return Change.MORE if self.trace.count > before else Change.NONE

    def _finish(self, head: bytes, size: int) -> Change:
        os.pwrite(self._copy.fileno(), head, 0)  # the copy is mapped shared
        old, new = self.trace, Trace(self.path, self._whole[:size], None)
        if self._adapt is not None:
            self._adapt(new)
        same = (
            new.count >= old.count and new.events_offset == old.events_offset and new.cpus == old.cpus
            and new.layout == old.layout and new.memory == old.memory and new.payload == old.payload
            and new.symbols == old.symbols and new.clock_hz == old.clock_hz
        )  # fmt: skip
        old.become(new)
        return Change.FINISHED if same else Change.OTHER

    def close(self) -> None:
        """Close files and trace."""
        trace = getattr(self, "trace", None)
        if trace is not None:
            trace.close()
        with suppress(BufferError):  # whoever still holds a part of it keeps it mapped
            self._whole.release()
        self._copy.close()
        if self._source >= 0:
            os.close(self._source)
            self._source = -1

    def __enter__(self) -> Growing:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # -- the copy ---------------------------------------------------------------------------------------------------

    def _lost(self, what: str) -> FormatError:
        return FormatError(self.path, f"the file {what}")

    def _sections_end(self, head: bytes) -> int:
        """Where the last section ends that stands before the events. A table that is damaged is Trace's to report."""
        end = 0
        with suppress(FormatError):
            fields = wire.parse(wire.HEADER, head, self.path, 0)
            width = wire.SECTION.sizeof()
            length = min(fields.section_count, wire.MAX_SECTIONS) * width
            table = os.pread(self._source, length, min(fields.table_offset, 1 << 62))
            for at in range(0, len(table), width):
                section = wire.parse(wire.SECTION, table[at : at + width], self.path, 0)
                end = max(end, section.offset + section.length)
        return end

    def _fill(self, start: int, end: int) -> None:
        """Copy a part of the file. One that ends before is left as it is: the next look finds out."""
        self._mapped(end)
        while start < end:
            data = os.pread(self._source, min(end - start, 1 << 20), start)
            if not data:
                raise self._lost("has been truncated")
            at = 0
            while at < len(data):
                at += os.pwrite(self._copy.fileno(), memoryview(data)[at:], start + at)
            start += len(data)

    def _mapped(self, size: int) -> None:
        """Have at least so many bytes of the copy mapped: rarely another mapping, since each has room for twice as much."""
        if self._owner is not None and size <= len(self._owner):
            return
        room = max(2 * size, ROOM)
        os.ftruncate(self._copy.fileno(), room)  # what is not written takes no space
        self._owner = mmap.mmap(self._copy.fileno(), room, access=mmap.ACCESS_READ)
        self._whole = memoryview(self._owner)


def _finished(head: bytes) -> bool:
    """Whether a header says so; one that is cut or damaged says nothing."""
    try:
        return bool(wire.parse(wire.HEADER, head, "", 0).flags & wire.FLAG_FINISHED)
    except FormatError:
        return False
