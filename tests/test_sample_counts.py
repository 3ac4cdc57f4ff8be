"""Every recorded log of QEMU, whole: the deliveries by vector are the lines that a plain search finds."""

from __future__ import annotations

import gzip
import re
import struct
from collections import Counter
from pathlib import Path

import zstandard

from tracedbg import wire
from tracedbg.formats import open_input
from tracedbg.state import Kind, Known

LINE = re.compile(rb"^ *\d+: v=([0-9a-f]{2}) ", re.MULTILINE)
TORN = re.compile(rb"\d+: v=([0-9a-f]{2}) e=")  # several threads write: it may stand anywhere in a line


def unpacked(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".gz":
        return gzip.decompress(data)
    return zstandard.ZstdDecompressor().decompressobj().decompress(data) if path.suffix == ".zst" else data


def delivered(path: Path) -> Counter[int | None]:
    found: Counter[int | None] = Counter()
    with open_input(str(path)) as trace:
        events = bytes(trace.events)
    for at in range(0, len(events), wire.EVENT_SIZE):
        if events[at + 60] == Kind.DELIVER:
            known = struct.unpack_from("<H", events, at + 58)[0]
            found[events[at + 61] if known & Known.ARG else None] += 1
    return found


def test_every_log_has_the_deliveries_that_a_search_finds(shared: Path) -> None:
    names = sorted(path for path in shared.rglob("*.log*") if path.is_file())
    assert len(names) >= 56
    for path in names:
        data = unpacked(path)
        expected = Counter(int(vector, 16) for vector in (TORN if "torn" in path.name else LINE).findall(data))
        assert delivered(path) == expected, path
