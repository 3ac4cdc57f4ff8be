"""Speed of the trace.dat reader against `trace-cmd report` (to /dev/null) on the same file.

    python tests/bench/bench_tracedat.py [FILE [TURNS [TIMES]]]

FILE (default: the sample of version 6 in tests/data) is made TIMES (default 2,000) times as long first: its pages again and
again, with their times moved on, in a temporary trace.dat of version 6. TIMES 0: FILE as it is.
"""

from __future__ import annotations

import gzip
import resource
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tracedbg.formats import ReaderOptions, open_input

SAMPLE = Path(__file__).parents[1] / "data" / "trace-dat" / "tsc.dat.gz"
PAGE = 4096


def longer(raw: bytes, times: int, to: Path) -> None:
    """Write a trace.dat of version 6 with `times` times its pages."""
    at = raw.index(b"flyrecord\0") + 10
    cpus = []
    while (place := struct.unpack_from("<QQ", raw, at)) and place[0] % PAGE == 0 and place[1] % PAGE == 0 and place[0]:
        cpus.append(place)
        at += 16
    pages = [[raw[n : n + PAGE] for n in range(where, where + size, PAGE)] for where, size in cpus]
    stamps = [struct.unpack_from("<Q", page)[0] for part in pages for page in part]
    span = 2 * (max(stamps) - min(stamps)) + (1 << 30)
    place, table = cpus[0][0], b""
    for _, size in cpus:
        table += struct.pack("<QQ", place, size * times)
        place += size * times
    with to.open("wb") as file:
        file.write(raw[: at - 16 * len(cpus)] + table + raw[at : cpus[0][0]])
        for part in pages:
            for turn in range(times):
                for page in part:
                    file.write(struct.pack("<Q", struct.unpack_from("<Q", page)[0] + turn * span) + page[8:])


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Print MB/s and records a second of each, the ratio, and the memory taken."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else SAMPLE
    turns = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    times = int(sys.argv[3]) if len(sys.argv) > 3 else 2000
    with tempfile.TemporaryDirectory() as folder:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        big = Path(folder) / "big.dat"
        if times:
            longer(raw, times, big)
        else:
            big.write_bytes(raw)
        _measure(big, turns)


def _measure(path: Path, turns: int) -> None:
    size = path.stat().st_size / 1e6
    with open_input(str(path)) as trace:
        records, events = trace.meta["counts"]["records"], trace.count
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    marks = ReaderOptions(keep_marks=True)
    works: dict[str, Callable[[], object]] = {
        "open_input": lambda: open_input(str(path)).close(),
        "open_input --keep-marks": lambda: open_input(str(path), options=marks).close(),
    }
    if shutil.which("trace-cmd") is None:
        print("trace-cmd is not installed")
    else:
        for words in (["report"], ["report", "-R"]):
            command = ["trace-cmd", *words, str(path)]
            works[" ".join(command[:-1])] = lambda command=command: subprocess.run(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True
            )
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(turns):  # in turn: what else the machine does meets all of them
        for name, work in works.items():
            taken[name].append(_seconds(work))
    print(f"{size:.1f} MB, {records:,} records, {events:,} events, medians of {turns}, {memory:.0f} MiB at most")
    ours = statistics.median(taken["open_input"])
    for name, seconds in taken.items():
        median = statistics.median(seconds)
        print(f"{name:<24} {median:7.3f} s {size / median:8.1f} MB/s {records / median / 1e6:7.2f} million records/s"
              f"  {median / ours:6.2f} x")  # fmt: skip


if __name__ == "__main__":
    main()
