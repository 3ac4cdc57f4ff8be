"""A stack as rows of a screen: words from high addresses down, frames with their captions, folds where nothing is to be seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum

from tracedbg.describe import OVERWRITES, Words, saved_word, slot_of, word_name
from tracedbg.state import EventFlag, Finding, Frame, FrameStatus, Kind, Known, Return, Rule, Stack, Word
from tracedbg.tui.session import StackWords, View

FOLD = 4  # that many words with one value and one writer become one row
WORD = 8
UNKNOWN_VALUE = "?" * 16
MASK = (1 << 64) - 1


class RowKind(Enum):
    STACK = "stack"
    FRAME = "frame"
    WORD = "word"
    FOLD = "fold"
    NOTE = "note"


class Status(Enum):
    """What became of a frame, as far as known at the position; its glyph says it without colour."""

    NONE = " "
    LIVE = "●"
    MOVED = "→"
    LEFT = "○"
    CLOBBERED = "✗"
    SURVIVED = "~"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the stack pane. Words have `addr` and `value`, other rows `text`, frames a `brief` one too."""

    kind: RowKind
    text: str = ""
    brief: str = ""
    addr: int | None = None
    value: str = ""
    slot: str = ""
    owner: str = ""
    edge: str = " "
    status: Status = Status.NONE  # of the frame of a caption; of a word: CLOBBERED if it was overwritten in an open frame
    was: str = ""  # the value before, where it is another one
    by: str = ""  # who overwrote it
    changed: bool = False  # by the event of this position
    taken: bool = False  # popped or read by it
    rsp: bool = False
    name: str = ""  # symbols of a RIP
    writer: int | None = None


@dataclass(frozen=True, slots=True)
class _Owner:
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


def build_rows(view: View, words: Words) -> tuple[Row, ...]:
    """All rows of the stacks of a view."""
    rows: list[Row] = []
    empty = []
    placed = False
    for entry in _ordered(view):
        owners = _owners(view, entry, words)
        placed = placed or bool(owners) or (entry.stack.named and entry.stack.slot != 0)
        here = _rsp_on(view, entry.stack)
        if not entry.words and not owners and not here:
            empty.append(words.stack_title(entry.stack))
            continue
        head = words.stack_line(entry.stack) + (", in use" if here else "")
        rows.append(Row(RowKind.STACK, head))
        rows += _stack_rows(view, entry, owners, words)
    why = words.no_place()
    if why and not placed:  # a trace may bring TSS and gates as events
        return (*(Row(RowKind.NOTE, text) for text in why), *rows)
    if empty:
        rows.append(Row(RowKind.FOLD, "nothing known of " + ", ".join(empty)))
    return tuple(rows)


def focus_row(rows: tuple[Row, ...]) -> int:
    """The row that a reader wants to see first: what this event overwrote, else changed, else RSP."""
    tests: tuple[Callable[[Row], bool], ...] = (
        lambda r: r.changed and r.status is Status.CLOBBERED,
        lambda r: r.taken,
        lambda r: r.changed,
        lambda r: r.rsp,
        lambda r: r.status is Status.CLOBBERED,
    )
    for test in tests:
        for number, row in enumerate(rows):
            if test(row):
                return number
    return 0


def _rsp_on(view: View, stack: Stack) -> bool:
    rsp = _rsp(view)
    return rsp is not None and stack.lo < rsp <= stack.hi


def _rsp(view: View) -> int | None:
    return next((c.rsp for c in view.state.cpus if c.cpu == view.cpu), None)


def _ordered(view: View) -> list[StackWords]:
    """The stack in use first, then those with open frames, then those where something is known; each by slot."""

    def key(entry: StackWords) -> tuple[bool, bool, bool, int, int]:
        stack = entry.stack
        return (not _rsp_on(view, stack), not stack.frames, not entry.words, stack.slot or 99, stack.lo)

    return sorted(view.stacks, key=key)


# -- frames -------------------------------------------------------------------------------------------------------------


def _owners(view: View, entry: StackWords, words: Words) -> dict[int, _Owner]:
    """Frames of a stack by their entry: open ones, overwritten ones whose evidence is still there, left ones."""
    stack = entry.stack
    owners: dict[int, _Owner] = {}
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


def _frame_owner(frame: Frame, status: Status, text: str, words: Words, by: int | None = None) -> _Owner:
    short = words.frame_brief(frame)
    caption = f"{words.frame_name(frame)}: {text}"
    return _Owner(frame.entry, frame.lo, frame.hi, short, caption, f"{short}: {text}", status, frame, by, frame.fred)


def _by(finding: Finding) -> int:
    """Who overwrote the victim: a delivery, or the store that the finding was raised at."""
    return finding.writer.entry if finding.writer is not None else finding.event


def _gone(failed: bool) -> str:
    return "not delivered" if failed else "left"


def _open(frame: Frame, words: Words, store: int | None) -> _Owner:
    """An open frame; `store`: the one that left its own stack and hit this frame."""
    if frame.status is FrameStatus.CLOBBERED and frame.clobbered_by is not None:
        text = f"still to resume, OVERWRITTEN by event {frame.clobbered_by}"
        return _frame_owner(frame, Status.CLOBBERED, text, words, frame.clobbered_by)
    if frame.status is FrameStatus.MOVED:
        return _frame_owner(frame, Status.MOVED, "moved, software copied it", words)
    if store is not None:
        return _frame_owner(frame, Status.CLOBBERED, f"live, OVERWRITTEN by event {store}", words, store)
    return _frame_owner(frame, Status.LIVE, "live", words)


def _victim(finding: Finding, victim: Frame, position: int, words: Words) -> _Owner:
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


def _left(number: int, lo: int, hi: int, words: Words, fred: bool) -> _Owner | None:
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
    return _Owner(number, lo, hi, short, caption, f"{short}: {text}", Status.LEFT, None, fred=fred)


_SHORT = {"error-code": "err", "event-data": "data", "ss+info": "ss"}  # to fit the column


def _slot(owner: _Owner, addr: int) -> str:
    name = slot_of(owner.frame, addr) if owner.frame is not None else word_name((owner.hi - 1 - addr) // WORD, owner.fred)
    return _SHORT.get(name, name)


def _saved(owner: _Owner, addr: int) -> tuple[int, int] | None:
    """The word that the frame's own delivery stored at an address, and a mask of its known bits."""
    return None if owner.frame is None else saved_word(owner.frame, addr)


# -- words --------------------------------------------------------------------------------------------------------------


def _stack_rows(view: View, entry: StackWords, owners: dict[int, _Owner], words: Words) -> Iterator[Row]:
    by_addr = {w.addr: w for w in entry.words}
    before = {w.addr: w for w in entry.before}
    rsp = _rsp(view) if _rsp_on(view, entry.stack) else None
    taken = _taken(view, words)
    addrs = set(by_addr)
    for owner in owners.values():
        addrs.update(range(owner.lo & ~7, owner.hi, WORD))
    if rsp is not None:
        addrs.add(rsp & ~7)
    ordered = sorted(addrs, reverse=True)
    at = 0
    expected = entry.stack.hi - WORD
    selected = view.state.position - 1
    while at < len(ordered):
        addr = ordered[at]
        if addr < expected:
            yield _fold((expected - addr) // WORD, "unknown")
        here = [o for o in owners.values() if o.lo <= addr < o.hi]
        for owner in sorted((o for o in here if addr == o.hi - WORD), key=lambda o: o.entry):
            row = Row(RowKind.FRAME, owner.caption, owner.brief, status=owner.status, writer=owner.entry)
            yield replace(row, changed=owner.entry == selected)
        count = _run(ordered, at, by_addr, before, owners, rsp)
        if count >= FOLD and addr not in taken:
            yield _fold(count, f"{by_addr[addr].value:#x}")
        else:
            count = 1
            row = _word_row(addr, by_addr.get(addr), before.get(addr), here, selected, words)
            yield replace(row, rsp=rsp is not None and addr == rsp & ~7, taken=addr in taken)
        at += count
        expected = addr - count * WORD


def _taken(view: View, words: Words) -> range:
    """Addresses of the words that the event of this position popped or read."""
    event = words.event(view.state.position - 1)
    if event is not None and event.kind is Kind.RETURN and event.known & Known.RSP and not event.flags & EventFlag.FAULTED:
        eret = event.known & Known.ARG and event.arg in (Return.ERETU, Return.ERETS)
        lo = event.rsp + (WORD if eret else 0)  # they skip the error code that RSP is at
        return range(lo, lo + 5 * WORD, WORD)
    if event is not None and event.kind is Kind.READ and event.known & Known.ADDR:
        length = event.code if event.flags & EventFlag.BYTES else event.arg
        return range(event.addr & ~7, event.addr + length, WORD)
    return range(0)


def _fold(count: int, what: str) -> Row:
    return Row(RowKind.FOLD, f"··· {count} word{'' if count == 1 else 's'} {what}")


def _run(
    ordered: list[int], at: int, by_addr: dict[int, Word], before: dict[int, Word], owners: dict[int, _Owner], rsp: int | None
) -> int:
    """Length of the run of equal words from `at` on, outside of frames and not changed just now."""
    first = by_addr.get(ordered[at])
    count = 0
    while first is not None and at + count < len(ordered):
        addr = ordered[at + count]
        word = by_addr.get(addr)
        if addr != first.addr - count * WORD or word is None or (rsp is not None and addr == rsp & ~7):
            break
        if (word.value, word.known, word.writers) != (first.value, first.known, first.writers) or before.get(addr) != word:
            break
        if any(o.lo <= addr < o.hi for o in owners.values()):
            break
        count += 1
    return count


def _word_row(addr: int, word: Word | None, old: Word | None, here: list[_Owner], selected: int, words: Words) -> Row:
    writers = word.writers if word is not None else (None,) * WORD
    writer = next((w for w in writers if w is not None), None)
    owner = next((o for o in here if o.entry == writer), None)
    # Frames below the newest one at this address whose own word is gone: the last of them is what the writer destroyed.
    lost = [o for o in here if o.by is not None and any(w != o.entry for w in writers)]
    victim = max(lost, key=lambda o: o.entry, default=None)
    shown = owner or victim or max(here, key=lambda o: o.entry, default=None)
    row = Row(
        RowKind.WORD,
        addr=addr,
        value=_value(word),
        slot=_slot(shown, addr) if shown is not None else "",
        owner=shown.short if owner is not None and shown is not None else _writer_name(writer, words),
        edge=_edge(shown, addr),
        changed=selected in writers or (word is not None and old != word),
        name=_symbol(word, words) if shown is not None and _slot(shown, addr) == "rip" else "",
        writer=writer,
    )
    if victim is not None:
        return _overwritten(row, victim, addr, word, words)
    if row.changed and old is not None and word is not None and old.known == 0xFF and old.value != word.value:
        return replace(row, was=f"{old.value:#x}")
    return row


def _overwritten(row: Row, victim: _Owner, addr: int, word: Word | None, words: Words) -> Row:
    saved = _saved(victim, addr)
    own = None if saved is None else saved[0]
    by = f"event {row.writer if row.writer is not None else victim.by}"
    if saved is not None and word is not None and _same(saved, word):
        return replace(row, by=by)  # overwritten with the same value: `was` stays empty
    name = row.name
    if row.slot == "rip" and (symbol := words.symbol(own)):
        name = f"{name or '?'}, was {symbol}"
    return replace(row, status=victim.status, was="?" if own is None else f"{own:#x}", by=by, name=name)


def _same(saved: tuple[int, int], word: Word) -> bool:
    """Whether a word holds what a frame's own delivery stored, as far as the delivery says what it stored."""
    value, mask = saved
    known = sum(0xFF << 8 * b for b in range(WORD) if word.known >> b & 1)
    return not mask & ~known and not (value ^ word.value) & mask


def _symbol(word: Word | None, words: Words) -> str:
    return (words.symbol(word.value) or "") if word is not None and word.known == 0xFF else ""


def _writer_name(writer: int | None, words: Words) -> str:
    if writer is None:
        return ""
    event = words.event(writer)
    if event is None:
        return f"event@{writer}"
    return f"{words.delivery_brief(event) if event.kind is Kind.DELIVER else event.kind.name.lower()}@{writer}"


def _value(word: Word | None) -> str:
    if word is None:
        return UNKNOWN_VALUE
    value = f"{word.value & MASK:016x}"
    return "".join(value[14 - 2 * b : 16 - 2 * b] if word.known >> b & 1 else "??" for b in range(7, -1, -1))


def _edge(owner: _Owner | None, addr: int) -> str:
    if owner is None:
        return " "
    return "╰" if addr <= owner.lo + 7 else "│"
