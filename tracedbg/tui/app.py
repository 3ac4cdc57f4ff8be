"""The interactive viewer: its parts put together, and its run."""

from __future__ import annotations

import asyncio
import os
from functools import partial

from tracedbg.describe import Words
from tracedbg.errors import UsageError
from tracedbg.trace import Trace
from tracedbg.tui.base import SIGNALS, Viewer

DUMB = frozenset({"dumb", "unknown"})  # terminals that cannot place text


class TraceApp(Viewer):
    """The whole viewer."""


async def _run(app: TraceApp) -> None:
    """Run the app; signals that end it leave the terminal as it was."""
    loop = asyncio.get_running_loop()
    for number, code in SIGNALS.items():
        loop.add_signal_handler(number, partial(app.exit, return_code=code))
    try:
        await app.run_async()
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)


def run_app(trace: Trace, words: Words, *, start: int | None = None) -> int:
    """Run the viewer until the user quits; the exit code. `start` is a position: N + 1 shows event N.

    The Replay is closed when it returns, the trace is not.
    """
    term = os.environ.get("TERM", "")
    if term in DUMB:
        text = f"the viewer needs a terminal that can place text, which TERM={term} cannot"
        raise UsageError(f"{text}; `tracedbg replay TRACE` prints the verdict")
    app = TraceApp(trace, words, start=start)
    try:
        asyncio.run(_run(app))
    finally:
        app.session.stop()
    return app.return_code or 0
