"""Speed of the QEMU log reader against a plain findall and against reading the bytes, in one run.

    python tests/bench/bench_qemu_log.py LOG [TURNS]
"""

from __future__ import annotations

import gzip
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tracedbg.formats import ReaderOptions, open_input

_LINE = re.compile(rb": v=([0-9a-f]{2}) e=([0-9a-f]{4}) i=(\d) cpl=\d IP=(\w+):(\w+) pc=\w+ SP=(\w+):(\w+)")


def _median(work: Callable[[], object], turns: int) -> float:
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Print MB/s of each and the ratios."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    source = Path(sys.argv[1])
    turns = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "qemu.log"
        path.write_bytes(gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes())
        size = path.stat().st_size / 1e6
        plain = _median(path.read_bytes, turns)
        found = _median(lambda: _LINE.findall(path.read_bytes()), turns)
        read = _median(lambda: open_input(str(path), options=ReaderOptions(discover=False)).close(), turns)
        print(f"{size:.1f} MB, medians of {turns}")
        print(f"read bytes   {size / plain:8.0f} MB/s")
        print(f"findall      {size / found:8.0f} MB/s")
        print(f"open_input   {size / read:8.0f} MB/s   {read / found:.2f} x findall, {read / plain:.1f} x reading")


if __name__ == "__main__":
    main()
