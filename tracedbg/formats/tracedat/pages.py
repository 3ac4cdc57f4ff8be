"""The ring-buffer pages of the CPUs in a trace.dat, in blocks of whole pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tracedbg.errors import FormatError
from tracedbg.formats.tracedat.container import Buffer, CpuData
from tracedbg.formats.tracedat.file import Store

BLOCK = 256 << 10  # bytes of one CPU at a time
MAX_HELD = 256 << 20  # bytes of all CPUs' blocks
MAX_CHUNK = 64 << 20  # bytes of an unpacked chunk; trace-cmd packs 10 pages
MAX_RATIO, FREE = 800, 256 << 20  # as source.py: unpacked to packed, beyond the first bytes

Unpack = Callable[[bytes, int], bytes]


class Pages:
    """The pages of one CPU. `damage`: places in the file where they end too early, and why."""

    def __init__(self, store: Store, buffer: Buffer, data: CpuData, unpack: Unpack | None, block: int) -> None:
        self.buffer = buffer
        self.cpu = data.cpu
        self.at = data.at
        self.damage: list[tuple[int, str]] = []
        self._store = store
        self._end = data.at + data.size
        self._block = max(block // buffer.page_size, 1) * buffer.page_size
        self._unpack = unpack
        self._blocks = self._raw() if unpack is None else self._packed(unpack)

    def next(self) -> bytes:
        """The next pages; empty: there are no more."""
        return next(self._blocks, b"")

    def _told(self, at: int, what: str) -> None:
        self.damage.append((at, f"{what} (CPU {self.cpu})"))

    def _raw(self) -> Iterator[bytes]:
        at, page = self.at, self.buffer.page_size
        while at < self._end:
            data = self._store.read(at, min(self._block, self._end - at))
            whole = len(data) // page * page
            if whole:
                yield data[:whole] if whole < len(data) else data
            at += whole
            if whole < self._block:
                break
        if at < self._end:
            self._told(at, "pages are cut short")

    def _packed(self, unpack: Unpack) -> Iterator[bytes]:
        store, at, page = self._store, self.at, self.buffer.page_size
        rest, total = b"", 0
        try:
            count = int.from_bytes(store.whole(at, 4), "little")
            at += 4
            for _ in range(count):
                head = store.whole(at, 8)
                packed, size = int.from_bytes(head[:4], "little"), int.from_bytes(head[4:], "little")
                total += size
                if size > MAX_CHUNK or at + 8 + packed > self._end + 4 or (total > FREE and total > store.size * MAX_RATIO):
                    raise ValueError("a packed chunk larger than its place")
                rest += unpack(store.whole(at + 8, packed), size)
                at += 8 + packed
                whole = len(rest) // page * page
                if whole >= self._block:
                    yield rest[:whole]
                    rest = rest[whole:]
        except FormatError as error:
            self._told(at, error.message)
        except ValueError as error:
            self._told(at, str(error))
        whole = len(rest) // page * page
        if whole:
            yield rest[:whole]
        if whole < len(rest) and not self.damage:
            self._told(at, "pages are cut short")


def streams(store: Store, buffers: list[Buffer], unpack: Callable[[], Unpack]) -> list[Pages]:
    """The pages of all CPUs of these buffers. Raises FormatError where they cannot be what the file says."""
    parts = [(b, d) for b in buffers for d in b.cpus if d.size]
    end = 0
    for buffer, data in sorted(parts, key=lambda part: part[1].at):
        if data.at < end:
            raise FormatError(store.path, f"the pages of CPU {data.cpu} begin in those of another", data.at)
        end = min(data.at + data.size, store.size) + 4 * buffer.packed
    if sum(buffer.page_size for buffer, _ in parts) > MAX_HELD:
        raise FormatError(store.path, "pages too large for so many CPUs")
    block = min(BLOCK, MAX_HELD // max(len(parts), 1))
    return [Pages(store, b, d, unpack() if b.packed else None, block) for b, d in parts]
