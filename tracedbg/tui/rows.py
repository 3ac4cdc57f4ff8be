"""A stack as rows of a screen: words from high addresses down, frames with their captions, folds where nothing is to be seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum

from tracedbg.describe import Words
from tracedbg.state import EventFlag, Kind, Known, Return, Stack, Word
from tracedbg.tui.owners import WORD, Owner, Status, own_word, owners_of, slot_name
from tracedbg.tui.session import MAX_STACK, StackWords, View

AND_WAS = ", was "  # between the symbols of a RIP that was overwritten
FOLD = 4  # that many words with one value and one writer become one row
UNKNOWN_VALUE = "?" * 16
MASK = (1 << 64) - 1


class RowKind(Enum):
    STACK = "stack"
    FRAME = "frame"
    WORD = "word"
    WAS = "was"
    FOLD = "fold"
    BOTTOM = "bottom"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the stack pane. Words have `addr` and `value`, other rows `text`, frames and stacks a `brief` one too.

    A row WAS is the second line of an overwritten word, where a column is too narrow for one.
    """

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
    old: str = ""  # the same, as 16 digits that stand below those of `value`
    by: str = ""  # who overwrote it
    changed: bool = False  # by the event of this position
    taken: bool = False  # popped or read by it
    rsp: bool = False
    name: str = ""  # symbols: of the value, and of a RIP before
    writer: int | None = None
    victim: int | None = None  # whose word it was


@dataclass(frozen=True, slots=True)
class StackRows:
    """One stack: its head, then its words from the top down to its bottom."""

    stack: Stack
    title: str
    rows: tuple[Row, ...]
    here: bool  # RSP is on it

    @property
    def place(self) -> tuple[bool, int, int]:
        """Where it stands beside others: first the stacks of RSP0 and of no slot, then IST1 to IST7."""
        return (self.stack.slot in range(1, 8), self.stack.slot % 8, self.stack.lo)


@dataclass(frozen=True, slots=True)
class Picture:
    """The stacks of a view, the one that matters most first."""

    stacks: tuple[StackRows, ...]
    notes: tuple[Row, ...]  # why there are no frames
    empty: tuple[Row, ...]  # stacks of which nothing is known

    def rows(self) -> tuple[Row, ...]:
        """All of them below each other."""
        return (*self.notes, *(row for stack in self.stacks for row in stack.rows), *self.empty)


def build_rows(view: View, words: Words) -> tuple[Row, ...]:
    """All rows of the stacks of a view."""
    return build_picture(view, words).rows()


def build_picture(view: View, words: Words) -> Picture:
    """The stacks of a view."""
    stacks: list[StackRows] = []
    empty = []
    placed = False
    for entry in _ordered(view):
        stack = entry.stack
        owners = owners_of(view, entry, words)
        placed = placed or bool(owners) or (stack.named and stack.slot != 0)
        here = _rsp_on(view, stack)
        title = words.stack_title(stack)
        if not entry.words and not owners and not here:
            empty.append(title)
            continue
        use = ", in use" if here else ""
        brief = f"{title}, {stack.frames} open{use}"
        head = Row(RowKind.STACK, words.stack_line(stack) + use, brief)
        rows = _stack_rows(view, entry, owners, words)
        stacks.append(StackRows(stack, title, (head, *rows), here))
    why = words.no_place()
    if why and not placed:  # a trace may bring TSS and gates as events
        return Picture(tuple(stacks), tuple(Row(RowKind.NOTE, text) for text in why), ())
    nothing = (Row(RowKind.FOLD, "nothing known of " + ", ".join(empty)),) if empty else ()
    if not stacks and not empty:
        where = "is not known" if _rsp(view) is None else "lies on no known stack"
        nothing = (Row(RowKind.FOLD, f"no frame is open, and RSP {where}"),)
    return Picture(tuple(stacks), (), nothing)


def in_two(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """The same with the old value of an overwritten word below the new one."""
    result: list[Row] = []
    for row in rows:
        now, _, before = row.name.partition(AND_WAS)
        if row.kind is RowKind.WORD and row.was:
            result.append(replace(row, was="", by="", name=now))
            result.append(replace(row, kind=RowKind.WAS, name=before, rsp=False, writer=row.victim))
        else:
            result.append(row)
    return tuple(result)


def focus_row(rows: tuple[Row, ...]) -> int:
    """The row that a reader wants to see first: what this event overwrote, else changed, else RSP, else what was written."""
    tests: tuple[Callable[[Row], bool], ...] = (
        lambda r: r.changed and r.status is Status.CLOBBERED,
        lambda r: r.taken,
        lambda r: r.changed,
        lambda r: r.rsp,
        lambda r: r.status is Status.CLOBBERED,
        lambda r: r.writer is not None,
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


# -- words --------------------------------------------------------------------------------------------------------------


def _stack_rows(view: View, entry: StackWords, owners: dict[int, Owner], words: Words) -> Iterator[Row]:
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
    yield from _bottom(entry.stack, expected + WORD, rsp)


def _bottom(stack: Stack, lowest: int, rsp: int | None) -> Iterator[Row]:
    """What lies below the lowest word that is shown: the rest of the stack, and where it ends."""
    if not stack.named:
        yield Row(RowKind.BOTTOM, "where this stack ends is not known", "end not known")
        return
    if stack.lo < lowest:
        yield _fold((lowest - stack.lo) // WORD, "unknown" if stack.hi - stack.lo <= MAX_STACK else "not shown")
    text = f"bottom {stack.lo:016x}"
    free = ""
    if rsp is not None:
        free = f", {rsp - stack.lo:,} bytes below RSP"
    if stack.assumed:
        yield Row(RowKind.BOTTOM, f"assumed {text} (a usual size){free}", f"assumed bottom …{stack.lo & 0xFFFFFFFF:08x}")
    else:
        yield Row(RowKind.BOTTOM, text + free, text)


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
    ordered: list[int], at: int, by_addr: dict[int, Word], before: dict[int, Word], owners: dict[int, Owner], rsp: int | None
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


def _word_row(addr: int, word: Word | None, old: Word | None, here: list[Owner], selected: int, words: Words) -> Row:
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
        slot=slot_name(shown, addr) if shown is not None else "",
        owner=shown.short if owner is not None and shown is not None else _writer_name(writer, words),
        edge=_edge(shown, addr),
        changed=selected in writers or (word is not None and old != word),
        name=_symbol(word, words),
        writer=writer,
    )
    if victim is not None:
        return _overwritten(row, victim, addr, word, words)
    if row.changed and old is not None and word is not None and old.known == 0xFF and old.value != word.value:
        return replace(row, was=f"{old.value:#x}", old=_value(old), victim=next((w for w in old.writers if w is not None), None))
    return row


def _overwritten(row: Row, victim: Owner, addr: int, word: Word | None, words: Words) -> Row:
    saved = own_word(victim, addr)
    own = None if saved is None else saved[0]
    by = f"event {row.writer if row.writer is not None else victim.by}"
    row = replace(row, victim=victim.entry)
    if saved is not None and word is not None and _same(saved, word):
        return replace(row, by=by)  # overwritten with the same value: `was` stays empty
    name = row.name
    if row.slot == "rip" and (symbol := words.symbol(own)):
        name = f"{name or '?'}{AND_WAS}{symbol}"
    old = UNKNOWN_VALUE if saved is None else _digits(saved[0], saved[1])
    return replace(row, status=victim.status, was="?" if own is None else f"{own:#x}", old=old, by=by, name=name)


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
    return _digits(word.value & MASK, sum(0xFF << 8 * b for b in range(WORD) if word.known >> b & 1))


def _digits(value: int, known: int) -> str:
    """The digits of a word; `known`: a mask of its known bits."""
    digits = f"{value:016x}"
    parts = (digits[14 - 2 * b : 16 - 2 * b] if known >> 8 * b & 0xFF == 0xFF else "??" for b in range(7, -1, -1))
    return "".join(parts)


def _edge(owner: Owner | None, addr: int) -> str:
    if owner is None:
        return " "
    return "╰" if addr <= owner.lo + 7 else "│"
