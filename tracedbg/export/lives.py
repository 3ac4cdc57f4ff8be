"""The life of every frame: from the delivery that stored it to the event that ended it, and why it ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tracedbg.errors import ReplayError
from tracedbg.replay import Lives, Replay
from tracedbg.state import Life

__all__ = ["Life", "batches", "lives"]

CHUNK = 1 << 14  # events between two looks into the journal: it holds at most so many frames and those that were open


def lives(replay: Replay, progress: Callable[[int, int], None]) -> Iterator[Life]:
    """Every frame that was ever open: those that ended, in the order of their ends, then those open at the end, by delivery.

    Makes the forward pass of a replay that has not begun it (else ReplayError); when the last one was taken, the findings are
    there. Frames that one event ends come in an order that is always the same and means nothing.
    """
    for batch in batches(replay, progress):
        yield from batch


def batches(replay: Replay, progress: Callable[[int, int], None]) -> Iterator[Lives]:
    """The same in batches of bounded size, for those who want columns: those that ended in a stretch of the forward pass, of
    at most CHUNK events up to replay.scanned, then those open at the end. A batch may be empty."""
    if replay.scanned:
        raise ReplayError("the lives of frames are told by the forward pass, which has begun")
    replay.journal(True)
    try:
        while replay.scan(CHUNK):
            yield replay.ended()
            progress(replay.scanned, replay.count)
    finally:
        replay.journal(False)
    yield replay.unended()
