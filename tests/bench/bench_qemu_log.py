"""Speed of the QEMU log reader against `grep -c v=` on the same file, and against the reader without its scanner in C.

    python tests/bench/bench_qemu_log.py LOG [TURNS]

The turns of all of them take turns, so that what else the machine does touches them alike.
"""

from __future__ import annotations

import gzip
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import zstandard

from tracedbg.formats import ReaderOptions, open_input
from tracedbg.formats.qemu import log as qemu_log
from tracedbg.formats.source import Input
from tracedbg.writer import TraceWriter

ALONE = ReaderOptions(discover=False)


def _unpacked(source: Path) -> bytes:
    data = source.read_bytes()
    if source.suffix == ".gz":
        return gzip.decompress(data)
    return zstandard.ZstdDecompressor().stream_reader(data).read() if source.suffix == ".zst" else data


def _python(path: Path) -> None:
    with tempfile.TemporaryFile() as file, Input(str(path)) as source:
        writer = TraceWriter(file)
        qemu_log.read([source], writer, ALONE, native=False)
        writer.close()


def main() -> None:
    """Print MB/s of each and the ratios."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    turns = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "qemu.log"
        path.write_bytes(_unpacked(Path(sys.argv[1])))
        size = path.stat().st_size / 1e6
        grep = ["grep", "-c", "v=", str(path)]
        works: dict[str, Callable[[], object]] = {
            "read bytes": path.read_bytes,
            "grep -c v=": lambda: subprocess.run(grep, stdout=subprocess.PIPE, check=True, env={**os.environ, "LC_ALL": "C"}),
            "open_input": lambda: open_input(str(path), options=ALONE).close(),
            "without C": lambda: _python(path),
        }
        times: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(turns):
            for name, work in works.items():
                start = time.perf_counter()
                work()
                times[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(taken) for name, taken in times.items()}
        print(f"{size:.1f} MB, medians of {turns}")
        for name, taken in medians.items():
            print(f"{name:12} {size / taken:8.0f} MB/s   {medians['grep -c v='] / taken:5.2f} x grep")


if __name__ == "__main__":
    main()
