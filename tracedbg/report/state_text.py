"""One position of a replay as text: CPUs, open frames, stacks as memory."""

from __future__ import annotations

from collections.abc import Iterator

from tracedbg.describe import Words, hex_address
from tracedbg.replay import Replay
from tracedbg.state import Frame, Stack, Word
from tracedbg.text import wrap

KEEP = 2  # equal words shown before a run is folded


def render(replay: Replay, words: Words, *, stacks: bool) -> Iterator[str]:
    """The state at the view's position."""
    state = replay.state()
    last = words.event(state.position - 1) if state.position else None
    if last is None:
        yield "state at the start"
    else:
        where = words.event_name(last.index)
        yield f"state after {where} of {replay.count:,}: cpu {last.cpu}, {words.event_line(last)}"
    for cpu in state.cpus:
        yield from wrap(words.cpu_line(cpu), "  ", 120, "    ")
    yield "open frames:" if state.frames else "open frames: none"
    for frame in state.frames:
        yield from wrap(words.frame_line(frame), "  ", 120, "    ")
    if stacks:
        yield from stack_lines(replay, words, state.stacks, state.frames)


def stack_lines(replay: Replay, words: Words, stacks: tuple[Stack, ...], frames: tuple[Frame, ...]) -> Iterator[str]:
    """Each stack as memory, lowest address first; stacks of which nothing is known are named in one line."""
    empty = []
    for stack in stacks:
        memory = replay.words(stack.lo, stack.hi)
        if not memory:
            empty.append(words.stack_line(stack))
            continue
        yield ""
        yield words.stack_line(stack)
        yield f"    {'address':<16}  {'value':<16}  {'slot':<10}  {'frame':<28}  written by"
        yield from _word_lines(words, memory, frames)
    if empty:
        yield ""
        yield "nothing is known of the contents of:"
        yield from (f"  {line}" for line in empty)


def _word_lines(words: Words, memory: tuple[Word, ...], frames: tuple[Frame, ...]) -> Iterator[str]:
    run = 0
    last: Word | None = None
    for word in memory:
        if last is not None and word.addr != last.addr + 8:
            yield from _folded(run)
            run = 0
            yield f"    ... {hex_address(last.addr + 8)} to {hex_address(word.addr)} unknown"
        owned = any(f.lo <= word.addr < f.hi for f in frames)
        same = last is not None and not owned and (word.value, word.known, word.writers) == (last.value, last.known, last.writers)
        run = run + 1 if same else run
        if not same:
            yield from _folded(run)
            run = 0
        last = word
        if run < KEEP:
            yield _word_line(words, word, frames)
    yield from _folded(run)


def _folded(run: int) -> Iterator[str]:
    if run >= KEEP:
        yield f"    ... {run - KEEP + 1:,} more words the same"


def _word_line(words: Words, word: Word, frames: tuple[Frame, ...]) -> str:
    row = words.word_row(word, frames)
    symbol = words.symbol(word.value) if word.known == 0xFF else None
    tail = f"  {symbol}" if symbol else ""
    return f"  {row.mark} {row.addr:016x}  {row.value}  {row.slot:<10}  {row.owner:<28}  {row.writer}{tail}".rstrip()
