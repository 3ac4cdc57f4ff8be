"""Events on their way into the trace: some may still be changed, and guest CPUs get their numbers at the end."""

from __future__ import annotations

import tempfile
from typing import IO

from tracedbg import wire
from tracedbg.state import EventFlag
from tracedbg.writer import TraceWriter

GUEST = 0x8000  # the first guest CPU, until the number of host CPUs is known
ROW = wire.EVENT_SIZE
BLOCK = 4096 * ROW
MOST_HELD = 16 * BLOCK  # bytes that wait for events that may be changed

_CPU, _WORDS = 26, ROW // 2


class Rows:
    """Collects packed events. Once a guest CPU has come they wait in a file."""

    def __init__(self, writer: TraceWriter) -> None:
        self._writer = writer
        self._rows = bytearray()
        self._start = 0  # bytes before those
        self._held: set[int] = set()
        self._spool: IO[bytes] | None = None

    def add(self, row: bytes) -> int:
        """Append an event; returns its place."""
        at = self._start + len(self._rows)
        self._rows += row
        return at

    def hold(self, at: int) -> None:
        """An event may still be marked as failed."""
        self._held.add(at)

    def release(self, at: int, failed: bool = False) -> bool:
        """It stays as it is, or failed. False: it had waited too long, and is out of reach."""
        if at not in self._held:
            return False
        self._held.discard(at)
        if failed:
            self._rows[at - self._start + ROW - 1] |= EventFlag.FAILED
        return True

    def flush(self) -> None:
        """Pass on what need not wait."""
        if len(self._rows) < BLOCK or (self._held and len(self._rows) < MOST_HELD):
            return
        self._held.clear()
        self._pass()

    def _pass(self) -> None:
        self._start += len(self._rows)
        if self._spool is None:
            self._writer.append(self._rows)
        else:
            self._spool.write(self._rows)
        self._rows = bytearray()

    def guests_come(self) -> None:
        """From now on events may be those of guest CPUs."""
        if self._spool is None:
            self._pass()
            self._spool = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)

    def finish(self, hosts: int) -> None:
        """Write all; guest CPUs are behind the `hosts` of the host."""
        self._held.clear()
        self._pass()
        if self._spool is None:
            return
        self._spool.seek(0)
        while block := bytearray(self._spool.read(BLOCK)):
            with memoryview(block) as view, view.cast("H") as words:
                for at in range(_CPU, len(words), _WORDS):
                    if words[at] >= GUEST:
                        words[at] += hosts - GUEST
            self._writer.append(block)

    def close(self) -> None:
        """Give the file back."""
        if self._spool is not None:
            self._spool.close()
