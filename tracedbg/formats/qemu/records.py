"""Records of a QEMU log on their way to the writer: the newest are kept back, because a later line may change them."""

from __future__ import annotations

from tracedbg import wire
from tracedbg.state import EventFlag, Kind, Known
from tracedbg.writer import TraceWriter

KEEP = 256  # newest records kept back from the file: the next lines may show that a delivery failed
FLUSH = 8192

SIZE = wire.EVENT_SIZE
PACK = wire.EVENT_PACK.pack
_AT_ADDR = 24  # offsets in a record
_AT_KNOWN = 58
_AT_FLAGS = 63


class Records:
    """Packed native events; `late` counts changes that came too late."""

    def __init__(self, writer: TraceWriter) -> None:
        self.writer = writer
        self.out = bytearray()
        self.base = 0  # index of the first record in `out`
        self.late = 0

    @property
    def count(self) -> int:
        """Records so far: the index of the next."""
        return self.base + len(self.out) // SIZE

    def record(
        self, kind: Kind, known: int, *, cpu: int = 0, rip: int = 0, value: int = 0, arg: int = 0, time: int = -1
    ) -> None:
        """Append an event of few fields; `time` -1: not known."""
        known = int(known) | (time >= 0)
        self.out += PACK(max(time, 0), rip, 0, 0, value, 0, 0, 0, cpu, 0, 0, known, int(kind), arg, 0, 0)

    def add_flags(self, index: int, flag: EventFlag) -> None:
        """Set a flag of an event."""
        at = (index - self.base) * SIZE
        if at >= 0:
            self.out[at + _AT_FLAGS] |= int(flag)
        else:
            self.late += 1

    def set_addr(self, index: int, addr: int) -> None:
        """Set the `addr` of an event."""
        at = (index - self.base) * SIZE
        if at >= 0:
            self.out[at + _AT_ADDR : at + _AT_ADDR + 8] = addr.to_bytes(8, "little")
            self.out[at + _AT_KNOWN] |= int(Known.ADDR)

    def trim(self) -> None:
        """Write what is old enough, if that is much."""
        if len(self.out) > FLUSH * SIZE:
            self.flush(KEEP)

    def flush(self, keep: int = 0) -> None:
        """Write all but the newest `keep` records."""
        count = max(len(self.out) // SIZE - keep, 0)
        self.writer.append(bytes(self.out[: count * SIZE]))
        del self.out[: count * SIZE]
        self.base += count
