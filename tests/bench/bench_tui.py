"""How fast the viewer is on a large trace: `python tests/bench/bench_tui.py [EVENTS]` (10 million: a file of 640 MB).

first paint   from the start of the app to the first picture of the whole screen
key, first    from a key to the first paint that follows (the list has moved)
key, all      from a key to the paint that shows the state at the new event too
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

BEGAN = perf_counter()

from samples import CS, LAYOUT, TASK_RSP, fill_race  # noqa: E402

from tracedbg import wire  # noqa: E402
from tracedbg.describe import Words  # noqa: E402
from tracedbg.state import Kind, Known, Source  # noqa: E402
from tracedbg.trace import Trace  # noqa: E402
from tracedbg.tui.app import TraceApp  # noqa: E402
from tracedbg.writer import TraceWriter  # noqa: E402

IMPORTED = perf_counter() - BEGAN

_BOTH = Known.RSP | Known.RFLAGS | Known.CPU | Known.CS | Known.SS
_CONTEXT = int(_BOTH | Known.RIP | Known.ARG | Known.SOURCE | Known.SOURCE_INDEX)
_POPPED = int(_BOTH | Known.ADDR | Known.VALUE)
KEYS = (("step", "j"), ("step back", "k"), ("page", "pagedown"), ("page up", "pageup"))


def clean_pair(index: int) -> bytes:
    """An NMI out of the idle loop and its IRET."""
    rip = 0xFFFF82D0402F9C00 + index % 64
    nmi = wire.EVENT_PACK.pack(0, rip, TASK_RSP, 0, 0, 0x206, 0, index, 0, CS, 0xE010, _CONTEXT, Kind.DELIVER, 2, Source.NMI, 0)
    frame = 0xFFFF8300BFFD3000 - 40
    iret = wire.EVENT_PACK.pack(0, 0, frame, rip, TASK_RSP, 0x206, 0, 0, 0, CS, 0xE010, _POPPED, Kind.RETURN, 0, 0, 0)
    return nmi + iret


def write(path: Path, count: int) -> None:
    """Clean NMIs, and the race at nine tenths."""
    block = b"".join(clean_pair(i) for i in range(4096))
    with TraceWriter(path) as writer:
        writer.layout = LAYOUT
        for _ in range(count * 9 // 10 // 8192):
            writer.append(block)
        fill_race(writer, returns=6)
        while writer.count < count:
            writer.append(block[: (count - writer.count) * wire.EVENT_SIZE])


class TimedApp(TraceApp):
    """Notes the time of each paint."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.painted = asyncio.Event()
        self.paints: list[float] = []
        self.viewed = self.paints_before_view = 0

    def _display(self, screen: Any, renderable: Any) -> None:
        super()._display(screen, renderable)
        self.paints.append(perf_counter())
        self.painted.set()

    async def paint(self, after: int) -> float:
        """The time of the first paint after the first `after` ones."""
        while len(self.paints) <= after:
            self.painted.clear()
            await asyncio.wait_for(self.painted.wait(), 10)
        return self.paints[after]

    async def shown(self) -> float:
        """The time of the paint that follows the view of the selected event."""
        while self.viewed != self.selected + 1:
            await asyncio.sleep(0.0005)
        return await self.paint(self.paints_before_view)

    def _viewed(self, view: Any) -> None:
        self.paints_before_view, self.viewed = len(self.paints), view.state.position
        super()._viewed(view)


async def keys(app: TimedApp, names: Iterable[str]) -> tuple[list[float], list[float]]:
    """Milliseconds from each key to the first paint, and to the one that shows all."""
    first, whole = [], []
    for name in names:
        await asyncio.sleep(0.05)
        count, began = len(app.paints), perf_counter()
        app.simulate_key(name)
        first.append((await app.paint(count) - began) * 1e3)
        whole.append((await app.shown() - began) * 1e3)
    return first, whole


def show(name: str, values: list[float]) -> None:
    late = sorted(values)[min(len(values) - 1, int(len(values) * 0.95))]
    middle, worst = statistics.median(values), max(values)
    print(f"{name:<24} median {middle:6.1f}   95 % {late:6.1f}   worst {worst:6.1f} ms   of {len(values)}")


def anonymous() -> float:
    """Resident memory that no file backs, MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1e3
    return 0.0


async def run(path: Path, size: tuple[int, int]) -> None:
    with Trace.open(path) as trace:
        began = perf_counter()
        app = TimedApp(trace, Words(trace))
        app.alone = True
        async with app.run_test(size=size) as pilot:
            await pilot.pause(0.01)
            print(f"first paint              {(app.paints[0] - began) * 1e3:.0f} ms, of {trace.count:,} events")
            first = []
            while not app.session.idle.is_set() and len(first) < 400:
                count, pressed = len(app.paints), perf_counter()
                app.simulate_key("j")
                first.append((await app.paint(count) - pressed) * 1e3)
                await asyncio.sleep(0.01)
            show("step in the scan, first", first)
            await asyncio.to_thread(app.session.idle.wait)
            print(f"scan, screen alive       {perf_counter() - began:.2f} s")
            await pilot.pause()
            chance = random.Random(1)
            for title, key in KEYS:
                first, whole = await keys(app, [key] * 40)
                show(f"{title}, first", first)
                show(f"{title}, all", whole)
            first, jumps = [], []
            for _ in range(40):
                count, began = len(app.paints), perf_counter()
                app.go_to(chance.randrange(trace.count))
                first.append((await app.paint(count) - began) * 1e3)
                jumps.append((await app.shown() - began) * 1e3)
                await asyncio.sleep(0.05)
            show("far jump, first", first)
            show("far jump, all", jumps)
            print(f"memory beyond the file   {anonymous():.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("events", type=int, nargs="?", default=10_000_000)
    parser.add_argument("--columns", type=int, default=120)
    parser.add_argument("--rows", type=int, default=36)
    args = parser.parse_args()
    print(f"imports                  {IMPORTED * 1e3:.0f} ms")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "big.tdbg"
        write(path, args.events)
        asyncio.run(run(path, (args.columns, args.rows)))


if __name__ == "__main__":
    main()
