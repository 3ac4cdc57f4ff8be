"""Speed of the xentrace reader against `xenalyze --dump-all` (to /dev/null) on the same file.

    python tests/bench/bench_xentrace.py FILE [TURNS]

A file of some megabytes shows the speed without the start of the processes. XENALYZE_MODE=--svm-mode is passed on.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tracedbg.formats import open_input


def _median(work: Callable[[], object], turns: int) -> float:
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Print MB/s and records a second of each, and the ratio."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    path, turns = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 5
    with open_input(path) as trace:
        records, events = trace.meta["counts"]["records"], trace.count
    size = Path(path).stat().st_size / 1e6
    ours = _median(lambda: open_input(path).close(), turns)
    print(f"{size:.1f} MB, {records:,} records, {events:,} events, medians of {turns}")
    print(f"open_input   {size / ours:8.1f} MB/s  {records / ours / 1e6:6.2f} million records/s")
    if shutil.which("xenalyze") is None:
        sys.exit("xenalyze is not installed")
    words = ["xenalyze", "--dump-all", *os.environ.get("XENALYZE_MODE", "").split(), path]
    theirs = _median(lambda: subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True), turns)
    print(f"xenalyze     {size / theirs:8.1f} MB/s  {records / theirs / 1e6:6.2f} million records/s")
    print(f"ratio        {theirs / ours:8.2f} x")


if __name__ == "__main__":
    main()
