"""The frames on a stack: who owns which of its words, and what became of each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from tracedbg.describe import OVERWRITES, Words, saved_word, slot_of, word_name
from tracedbg.state import EventFlag, Finding, Frame, FrameStatus, Kind, Rule, Word
from tracedbg.tui.session import StackWords, View

WORD = 8


class Status(Enum):
    """What became of a frame, as far as known at the position; its glyph says it without colour."""

    NONE = " "
    LIVE = "●"
    MOVED = "→"
    LEFT = "○"
    CLOBBERED = "✗"
    SURVIVED = "~"


@dataclass(frozen=True, slots=True)
class Owner:
    """A frame on the stack, open or not."""

    entry: int
    lo: int
    hi: int
    short: str
    caption: str
    brief: str
    status: Status
    frame: Frame | None
    by: int | None = None  # who overwrote it
    fred: bool = False


def owners_of(view: View, entry: StackWords, words: Words) -> dict[int, Owner]:
    """Frames of a stack by their entry: open ones, overwritten ones whose evidence is still there, left ones."""
    stack = entry.stack
    owners: dict[int, Owner] = {}
    stores: dict[int, int] = {}  # frames that a store overwrote: for the core they are as live as before
    writers = {w.addr: w.writers for w in entry.words}
    held = {w for word in entry.words for w in word.writers}
    for finding in view.victims:
        victim, writer = finding.victim, finding.writer
        if finding.raised_rule not in OVERWRITES or victim is None or not stack.lo < victim.hi <= stack.hi:
            continue
        by = _by(finding)
        if any(by in writers.get(addr, ()) for addr in range(victim.lo & ~7, victim.hi, WORD)):
            owners[victim.entry] = _victim(finding, victim, view.state.position, words)
            if writer is None:
                stores[victim.entry] = by
        if writer is not None and writer.entry in held and writer.entry not in owners:
            owners[writer.entry] = _frame_owner(writer, Status.LEFT, _gone(words.failed(writer)), words)
    for frame in view.state.frames:
        if stack.lo < frame.hi <= stack.hi:
            owners[frame.entry] = _open(frame, words, stores.get(frame.entry))
    fred = next((c.fred for c in view.state.cpus if c.cpu == view.cpu), False)
    for number, (lo, hi) in _extents(entry.words).items():
        if number not in owners:
            left = _left(number, lo, hi, words, fred)
            if left is not None:
                owners[number] = left
    return owners


def _frame_owner(frame: Frame, status: Status, text: str, words: Words, by: int | None = None) -> Owner:
    short = words.frame_brief(frame)
    caption = f"{words.frame_name(frame)}: {text}"
    return Owner(frame.entry, frame.lo, frame.hi, short, caption, f"{short}: {text}", status, frame, by, frame.fred)


def _by(finding: Finding) -> int:
    """Who overwrote the victim: a delivery, or the store that the finding was raised at."""
    return finding.writer.entry if finding.writer is not None else finding.event


def _gone(failed: bool) -> str:
    return "not delivered" if failed else "left"


def _open(frame: Frame, words: Words, store: int | None) -> Owner:
    """An open frame; `store`: the one that left its own stack and hit this frame."""
    if frame.status is FrameStatus.CLOBBERED and frame.clobbered_by is not None:
        text = f"still to resume, OVERWRITTEN by event {frame.clobbered_by}"
        return _frame_owner(frame, Status.CLOBBERED, text, words, frame.clobbered_by)
    if frame.status is FrameStatus.MOVED:
        return _frame_owner(frame, Status.MOVED, "moved, software copied it", words)
    if store is not None:
        return _frame_owner(frame, Status.CLOBBERED, f"live, OVERWRITTEN by event {store}", words, store)
    return _frame_owner(frame, Status.LIVE, "live", words)


def _victim(finding: Finding, victim: Frame, position: int, words: Words) -> Owner:
    """An overwritten frame that is no longer open: what came of it is known at this position, or not yet."""
    writer = _by(finding)
    text = f"OVERWRITTEN by event {writer}"
    rule = finding.rule_at(position)
    if rule is Rule.FRAME_RELOCATED:
        return _frame_owner(victim, Status.SURVIVED, text.lower() + ", but its context survived", words, writer)
    if finding.consumer is not None and finding.consumer < position:
        text += f", popped by event {finding.consumer}"
    return _frame_owner(victim, Status.CLOBBERED, text, words, writer)


def _extents(memory: tuple[Word, ...]) -> dict[int, tuple[int, int]]:
    """Per writing event the range of the words that it wrote."""
    result: dict[int, tuple[int, int]] = {}
    for word in memory:
        writer = word.writers[0]
        if writer is not None:
            lo, hi = result.get(writer, (word.addr, word.addr))
            result[writer] = (min(lo, word.addr), max(hi, word.addr + WORD))
    return result


def _left(number: int, lo: int, hi: int, words: Words, fred: bool) -> Owner | None:
    """A frame that is no longer open, as far as its bytes still show it: its top is aligned and its size possible.

    `fred`: the CPU now delivers by FRED, whose frames have another alignment and size.
    """
    event = words.event(number)
    align, most = (64, 8) if fred else (16, 6)
    if event is None or event.kind is not Kind.DELIVER or hi % align or hi - lo > most * WORD:
        return None
    name = words.delivery_name(event)
    short = f"{words.delivery_brief(event)}@{number}"
    text = _gone(bool(event.flags & EventFlag.FAILED))
    caption = f"{name} at {words.event_name(number)}: {text}"
    return Owner(number, lo, hi, short, caption, f"{short}: {text}", Status.LEFT, None, fred=fred)


_SHORT = {"error-code": "err", "event-data": "data", "ss+info": "ss"}  # to fit the column


def slot_name(owner: Owner, addr: int) -> str:
    name = slot_of(owner.frame, addr) if owner.frame is not None else word_name((owner.hi - 1 - addr) // WORD, owner.fred)
    return _SHORT.get(name, name)


def own_word(owner: Owner, addr: int) -> tuple[int, int] | None:
    """The word that the frame's own delivery stored at an address, and a mask of its known bits."""
    return None if owner.frame is None else saved_word(owner.frame, addr)
