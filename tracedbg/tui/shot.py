"""Pictures of the viewer, made by the viewer: `python -m tracedbg.tui.shot TRACE OUT.svg`."""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from textual.pilot import Pilot

from tracedbg.describe import Words
from tracedbg.errors import TracedbgError, UsageError
from tracedbg.symbols import Symbols
from tracedbg.trace import Trace
from tracedbg.tui.app import TraceApp

CELL = 12.2  # width of a character in the pictures
_BLANKS = re.compile(
    r'(?P<head><text [^>]*?)x="(?P<x>[0-9.]+)"(?P<middle>[^>]*?)textLength="(?P<length>[0-9.]+)"(?P<tail>[^>]*>)'
    r"(?P<blanks>(?:&#160;)+)(?=[^<])"
)
TIMEOUT = 60.0  # seconds that a scan or a seek may take


async def settle(app: TraceApp, pilot: Pilot[int]) -> None:
    """Wait until the session has answered everything and the screen shows it."""
    while True:
        if not await asyncio.to_thread(app.session.idle.wait, TIMEOUT):
            raise TimeoutError("the replay does not come to rest")
        await pilot.pause()
        if app.session.idle.is_set():  # else the answer was the reason for another wish
            return


async def shoot(app: TraceApp, size: tuple[int, int], keys: Sequence[str], title: str) -> str:
    """The screen as SVG after some keys."""
    async with app.run_test(size=size) as pilot:
        await settle(app, pilot)
        for key in keys:
            await pilot.press(key)
            await settle(app, pilot)
        svg = app.export_screenshot(title=title)
    return _tidy(svg)


def _tidy(svg: str) -> str:
    """Equal screens as equal files, which any viewer draws alike."""
    # Rich makes the ids of a picture from a checksum of its contents; a fixed one keeps the differences between versions small.
    found = re.search(r"terminal-\d+", svg)
    if found is not None:
        svg = svg.replace(found[0], "terminal-tracedbg")
    # The fonts would come from elsewhere; every viewer has a monospace one.
    svg = re.sub(r"\s*@font-face \{[^}]*\}", "", svg)
    # Some viewers drop the blanks at the beginning of a text, though they are no-break spaces: begin further right instead.
    return _BLANKS.sub(_shift, svg)


def _shift(match: re.Match[str]) -> str:
    blanks = match["blanks"].count("&#160;")
    x, length = float(match["x"]) + CELL * blanks, float(match["length"]) - CELL * blanks
    return f'{match["head"]}x="{x:.1f}"{match["middle"]}textLength="{length:.1f}"{match["tail"]}'


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{2,3})x(\d{2,3})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not COLUMNSxROWS")
    return int(match[1]), int(match[2])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tracedbg.tui.shot", description="Draw the viewer's screen as SVG.")
    parser.add_argument("trace")
    parser.add_argument("out")
    parser.add_argument("--keys", default="", help="keys to press first, as in j,j,n,tab")
    parser.add_argument("--size", type=_size, default=(120, 36), help="columns x rows (120x36)")
    parser.add_argument("--symbols", help="map file with names of addresses")
    parser.add_argument("--at", type=int, help="event to open at (the first finding)")
    args = parser.parse_args(argv)
    try:
        if args.at is not None and args.at < 0:
            raise UsageError("--at is negative")
        with Trace.open(args.trace) as trace:
            words = Words(trace, Symbols.load(args.symbols) if args.symbols else None)
            app = TraceApp(trace, words, start=None if args.at is None else args.at + 1)
            keys = [key for key in args.keys.split(",") if key]
            svg = asyncio.run(shoot(app, args.size, keys, f"tracedbg {Path(args.trace).name}"))
            Path(args.out).write_text(svg, encoding="utf-8")
    except (TracedbgError, OSError) as error:
        print(f"tracedbg: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
