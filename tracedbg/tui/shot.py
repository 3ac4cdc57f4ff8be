"""Runs of the viewer by a script: until all is at rest, and as pictures."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from textual.pilot import Pilot

from tracedbg.tui.base import Viewer
from tracedbg.tui.svg import tidy

TIMEOUT = 60.0  # seconds that a scan or a seek may take


async def settle(app: Viewer, pilot: Pilot[int], patience: float | None = TIMEOUT) -> None:
    """Wait until the session has answered everything and the screen shows it. Raises TimeoutError."""
    while True:
        if not await asyncio.to_thread(app.session.idle.wait, patience):
            raise TimeoutError("the replay does not come to rest")
        await pilot.pause()
        if app.session.idle.is_set():  # else the answer was the reason for another wish
            return


async def press(app: Viewer, pilot: Pilot[int], keys: Sequence[str], patience: float | None = TIMEOUT) -> None:
    """Press keys, each when what the one before asked for is on the screen."""
    await settle(app, pilot, patience)
    for key in keys:
        if not app.is_running:
            return
        await pilot.press(key)
        await settle(app, pilot, patience)


async def shoot(
    app: Viewer, size: tuple[int, int], keys: Sequence[str], title: str, patience: float | None = TIMEOUT
) -> str:
    """The screen as SVG after some keys."""
    async with app.run_test(size=size) as pilot:
        await press(app, pilot, keys, patience)
        svg = app.export_screenshot(title=title)
    return tidy(svg)
