"""The interactive viewer: its parts put together, and its run."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from textual.pilot import Pilot

from tracedbg.describe import Words
from tracedbg.errors import UsageError
from tracedbg.growing import Growing
from tracedbg.text import clean_path
from tracedbg.trace import Trace
from tracedbg.tui import config
from tracedbg.tui.base import SIGNALS
from tracedbg.tui.explain import Explanations
from tracedbg.tui.export import Exports
from tracedbg.tui.follow import Following
from tracedbg.tui.home import Home
from tracedbg.tui.marking import Marking
from tracedbg.tui.picture import PicturePart
from tracedbg.tui.searching import SearchPart
from tracedbg.tui.shot import press, shoot
from tracedbg.tui.travel import Travel

DUMB = frozenset({"dumb", "unknown"})  # terminals that cannot place text


class TraceApp(PicturePart, Explanations, Exports, SearchPart, Travel, Marking, Following, Home):
    """The whole viewer."""


async def _run(app: TraceApp, keys: Sequence[str]) -> None:
    """Run the app; signals that end it leave the terminal as it was. `keys` are pressed before the user's."""

    async def play(pilot: Pilot[Any]) -> None:
        await press(app, pilot, keys, None)  # a long trace takes its time

    loop = asyncio.get_running_loop()
    for number, code in SIGNALS.items():
        loop.add_signal_handler(number, partial(app.exit, return_code=code))
    try:
        await app.run_async(auto_pilot=play if keys else None)
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)


@dataclass(frozen=True)
class Choices:
    """What a command line may say of the viewer; `keys` are pressed once the scan has reported, each after the other."""

    start: int | None = None  # a position: N + 1 shows event N
    inputs: tuple[str, ...] = ()  # words of a command line that open the same trace, for what is copied and exported
    keys: tuple[str, ...] = ()
    growing: Growing | None = None  # the trace is still being written


def new_app(trace: Trace, words: Words, choices: Choices, wanted: config.Config) -> TraceApp:
    """The viewer as its user wants it."""
    app = TraceApp(trace, words, start=choices.start)
    app.inputs, app.growing, app.config = choices.inputs, choices.growing, wanted
    app.copy_to = wanted.copy or app.copy_to
    app.noise = wanted.noise
    return app


def picture(trace: Trace, words: Words, choices: Choices, size: tuple[int, int]) -> str:
    """The screen as SVG; the same for all users."""
    title = f"tracedbg {clean_path(trace.path).rsplit('/', 1)[-1]}"
    return asyncio.run(shoot(new_app(trace, words, choices, config.Config()), size, choices.keys, title, None))


def run_app(trace: Trace, words: Words, choices: Choices | None = None) -> int:
    """Run the viewer until the user quits; the exit code. The Replay is closed when it returns, the trace is not."""
    term = os.environ.get("TERM", "")
    if term in DUMB:
        text = f"the viewer needs a terminal that can place text, which TERM={term} cannot"
        raise UsageError(f"{text}; `tracedbg replay TRACE` prints the verdict")
    choices = choices or Choices()
    app = new_app(trace, words, choices, config.load())
    app.alone = True
    try:
        asyncio.run(_run(app, choices.keys))
    finally:
        app.session.stop()
    return app.return_code or 0
