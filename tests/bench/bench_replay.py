"""Replay speed: `python tests/bench/bench_replay.py [EVENTS]`. Prints events/s and the ratio to reading the same bytes."""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from synth import write_storm

from tracedbg.replay import Replay
from tracedbg.trace import Trace


def timed(work) -> float:  # type: ignore[no-untyped-def]
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    events = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000_000
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/storm.tdbg"
        count = write_storm(path, events)
        with Trace.open(path) as trace:
            import zlib

            scans, reads, opens = [], [], []
            for _ in range(5):
                reads.append(timed(lambda: zlib.adler32(trace.events)))
                opens.append(timed(lambda: Trace.open(path).close()))
                with Replay(trace) as replay:
                    scans.append(timed(replay.scan_all))
            scan, read = statistics.median(scans), statistics.median(reads)
            print(f"{count} events, {count * 64 / 1e6:.0f} MB")
            print(f"replay  {count / scan / 1e6:6.1f} M events/s   {count * 64 / scan / 1e6:7.0f} MB/s")
            print(f"read    {count / read / 1e6:6.1f} M events/s   {count * 64 / read / 1e6:7.0f} MB/s   (adler32)")
            print(f"ratio   {scan / read:6.2f} times the plain read; open {statistics.median(opens) * 1e3:.2f} ms")
            with Replay(trace) as replay:
                replay.scan_all()
                stats = replay.stats()
                said = f"{stats.snapshots} snapshots every {stats.interval} events, {stats.pages} pages"
                print(f"findings {stats.findings}, {said}")
                pick = random.Random(1)
                seeks = [timed(lambda: replay.seek(pick.randrange(count))) for _ in range(200)]
                print(f"seek    median {statistics.median(seeks) * 1e3:.2f} ms, worst {max(seeks) * 1e3:.2f} ms of 200")


if __name__ == "__main__":
    main()
