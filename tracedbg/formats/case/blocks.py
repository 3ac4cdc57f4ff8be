"""Bytes in a case file: rows of hex, for memory, payload and what has no text form."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from tracedbg.formats.case.text import LineError, number, shown
from tracedbg.trace import MemoryRange

MAX_BYTES = 64 << 20  # of all rows of a file together: a row can stand for many bytes
ROW = 16
APART = "-"  # a line that ends a range though the next row goes on where it stops

_ROW = re.compile(r"(0x[0-9a-fA-F]{1,16}|[0-9]{1,20}):(?: (.*))?")
_REPEAT = re.compile(r"([0-9a-fA-F]{2}) x (\d{1,9}|0x[0-9a-fA-F]{1,8})")


class Budget:
    """How many bytes the rows of one file may still make."""

    def __init__(self) -> None:
        self.left = MAX_BYTES

    def take(self, line: int, count: int) -> None:
        """Raises LineError when there are too many."""
        self.left -= count
        if self.left < 0:
            raise LineError(line, f"more than {MAX_BYTES >> 20} MiB of bytes")


def read_ranges(lines: Iterable[tuple[int, str]], budget: Budget) -> list[MemoryRange]:
    """Rows `ADDR: 00 11 ..`, `ADDR: 00 x 4096` or `ADDR: words 0x1000 8`; one that goes on where the last stopped extends it.

    Raises LineError.
    """
    ranges: list[tuple[int, bytearray]] = []
    apart = True
    for line, text in lines:
        text = text.split("#", 1)[0].strip()
        if not text:
            continue
        if text == APART:
            apart = True
            continue
        match = _ROW.fullmatch(text)
        if match is None:
            raise LineError(line, f"{shown(text)} is not a row `ADDR: BYTES`")
        addr = number(match[1], 64, line, "address")
        data = _row(match[2] or "", line, budget)
        if addr + len(data) > 1 << 64:
            raise LineError(line, "the row goes past the end of memory")
        if apart or addr != ranges[-1][0] + len(ranges[-1][1]):
            ranges.append((addr, bytearray()))
        apart = False
        ranges[-1][1].extend(data)
    return [MemoryRange(addr, bytes(data)) for addr, data in ranges]


def read_bytes(lines: Iterable[tuple[int, str]], budget: Budget, line: int) -> bytes:
    """As read_ranges, for bytes without an address: one range that begins at 0. Raises LineError."""
    ranges = read_ranges(lines, budget)
    if len(ranges) > 1 or (ranges and ranges[0].addr):
        raise LineError(line, "the rows of this section go on from 0x0 without a gap")
    return ranges[0].data if ranges else b""


def _row(text: str, line: int, budget: Budget) -> bytes:
    repeat = _REPEAT.fullmatch(text)
    if repeat is not None:
        count = number(repeat[2], 32, line, "count")
        budget.take(line, count)
        return bytes.fromhex(repeat[1]) * count
    if text.startswith("words "):
        data = b"".join(number(word, 64, line, "word").to_bytes(8, "little") for word in text.split()[1:])
    else:
        try:
            data = bytes.fromhex(text)
        except ValueError:
            raise LineError(line, f"{shown(text)} is not pairs of hex digits") from None
    budget.take(line, len(data))
    return data


def rows(addr: int, data: bytes) -> Iterator[str]:
    """Canonical rows of a range: 16 bytes each, longer runs of one byte in one."""
    if not data:
        yield f"{addr:#x}:"
    at = 0
    while at < len(data):
        row = data[at : at + ROW]
        size = len(row)
        if len(row) == ROW and row.count(row[0]) == ROW:
            run = _run(data, at, row)
            if run > ROW:
                yield f"{addr + at:#x}: {row[0]:02x} x {run}"
                at += run
                continue
        yield f"{addr + at:#x}: {row.hex(' ')}"
        at += size


def _run(data: bytes, at: int, row: bytes) -> int:
    """Length of the run of whole equal rows from `at` on."""
    end = at + ROW
    while data[end : end + ROW] == row:
        end += ROW
    return end - at


def range_lines(ranges: Iterable[MemoryRange]) -> Iterator[str]:
    """Canonical rows of all ranges."""
    end = None
    for memory in ranges:
        if memory.addr == end:
            yield APART
        yield from rows(memory.addr, memory.data)
        end = memory.addr + len(memory.data)
