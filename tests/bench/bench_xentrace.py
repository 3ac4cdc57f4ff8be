"""Speed of the xentrace reader against `xenalyze --dump-all` (to /dev/null) on the same file.

    python tests/bench/bench_xentrace.py FILE [TURNS [REPEAT]]

Both are taken in turn, and the medians are printed: of wall-clock time, and of CPU time, which other work on the machine
disturbs less. REPEAT: of a temporary file that holds FILE so many times, with later and later TSCs (250 times the HVM sample
are 300 MB). XENALYZE_MODE=--svm-mode is passed on. A file of some megabytes shows the speed without the start of the processes.
"""

from __future__ import annotations

import array
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import BinaryIO

from tracedbg.formats import open_input

WRAP = 0x1F002  # its TSC is garbage


def ours(path: str) -> tuple[float, float]:
    """Seconds of wall-clock and of CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    open_input(path).close()
    return time.perf_counter() - wall, time.process_time() - cpu


def xenalyze(words: list[str]) -> tuple[float, float]:
    """The same of its process."""
    wall = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{words[0]} failed")
    return time.perf_counter() - wall, used.ru_utime + used.ru_stime


def memory(path: str) -> int:
    """The highest resident memory of a process that reads the file, in MB."""
    code = f"from tracedbg.formats import open_input\nopen_input({path!r}).close()\nprint(open('/proc/self/status').read())"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return next(int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("VmHWM:")) // 1024


def repeat(path: str, times: int, out: BinaryIO) -> None:
    """Write the records of a file several times, each time later by as long as they last."""
    words = array.array("I", Path(path).read_bytes())
    places, at = [], 0
    while at < len(words):
        header = words[at]
        if header >> 31 and header & 0x0FFFFFFF != WRAP:
            places.append(at + 1)
        at += 1 + (header >> 28 & 7) + (header >> 31) * 2
    stamps = [words[place] | words[place + 1] << 32 for place in places]
    span = max(stamps) - min(stamps) + 1_000_000
    for turn in range(times):
        for place, stamp in zip(places, stamps, strict=True):
            later = stamp + turn * span
            words[place], words[place + 1] = later & 0xFFFFFFFF, later >> 32
        out.write(words.tobytes())
    out.flush()


def measure(path: str, turns: int) -> None:
    """Print MB/s and records a second of each, and the ratios."""
    with open_input(path) as trace:
        records, events = trace.meta["counts"]["records"], trace.count
    size = Path(path).stat().st_size / 1e6
    print(f"{size:.1f} MB, {records:,} records, {events:,} events, medians of {turns}")
    words = ["xenalyze", "--dump-all", *os.environ.get("XENALYZE_MODE", "").split(), path]
    there = shutil.which("xenalyze") is not None
    pairs = [(ours(path), xenalyze(words) if there else (0.0, 0.0)) for _ in range(turns)]
    wall, cpu, their_wall, their_cpu = (statistics.median(pair[who][what] for pair in pairs) for who in (0, 1) for what in (0, 1))
    print(f"open_input   {size / wall:8.1f} MB/s  {records / wall / 1e6:6.2f} million records/s  CPU {cpu:7.3f} s", end="")
    print(f"  memory {memory(path)} MB")
    if not there:
        sys.exit("xenalyze is not installed")
    print(f"xenalyze     {size / their_wall:8.1f} MB/s  {records / their_wall / 1e6:6.2f} million records/s", end="")
    print(f"  CPU {their_cpu:7.3f} s")
    print(f"ratio        {their_wall / wall:8.2f} x     of CPU time {their_cpu / cpu:.2f} x")


def main() -> None:
    """Measure a file, or a longer one made of it."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    path, turns, times = sys.argv[1], *(int(word) for word in (*sys.argv[2:4], *("5", "0")[len(sys.argv) - 2 :]))
    if not times:
        measure(path, turns)
        return
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        repeat(path, times, file.file)
        measure(file.name, turns)


if __name__ == "__main__":
    main()
