"""The stacks at a violation as tables: the words around the frames that the finding is about, and who wrote them."""

from __future__ import annotations

from collections.abc import Iterator

from tracedbg.describe import Words
from tracedbg.replay import Replay
from tracedbg.report.html_text import mono, table, tag, text
from tracedbg.state import Finding, Frame, Stack, Word

AROUND = 64  # bytes shown above and below what the finding is about
MAX_WORDS = 128  # of a stack, shown
HEADS = ("", "address", "value", "slot", "frame", "written by", "symbol")


def render(replay: Replay, words: Words, finding: Finding) -> Iterator[str]:
    """CPU, open frames and stacks at the view's position, as far as they belong to a finding."""
    state = replay.state()
    ranges = _ranges(finding)
    cpu = state.cpus[finding.cpu] if finding.cpu < len(state.cpus) else None
    rsp = None if cpu is None else cpu.rsp
    stacks = [stack for stack in state.stacks if _holds(stack, ranges, rsp)]
    if cpu is not None:
        yield tag("p", _line(words.cpu_line(cpu)))
    for stack in stacks:
        frames = tuple(frame for frame in state.frames if stack.lo < frame.hi <= stack.hi or stack.lo <= frame.lo < stack.hi)
        for frame in frames:
            yield tag("p", _line(words.frame_line(frame)))
        memory = replay.words(stack.lo, stack.hi)
        if memory:
            near = ranges if any(lo < stack.hi and stack.lo < hi for lo, hi in ranges) else [(rsp or stack.lo, rsp or stack.lo)]
            yield from table(words.stack_line(stack), HEADS, _rows(words, memory, frames, near))
        else:
            yield f'<p class="dim">{text(words.stack_line(stack))}: nothing is known of its contents</p>'


def _line(said: str) -> str:
    """A line of a state; its columns are set apart by blanks, which HTML would not show."""
    return text(", ".join(part for part in said.split("  ") if part))


def _ranges(finding: Finding) -> list[tuple[int, int]]:
    """What the finding is about: its bytes and its frames."""
    ranges = [(frame.lo, frame.hi) for frame in (finding.victim, finding.writer) if frame is not None]
    return sorted({(lo, hi) for lo, hi in (*ranges, (finding.lo, finding.hi)) if lo < hi})


def _holds(stack: Stack, ranges: list[tuple[int, int]], rsp: int | None) -> bool:
    """Whether a stack has bytes of the finding, or is the one in use (RSP = hi is an empty one)."""
    return any(lo < stack.hi and stack.lo < hi for lo, hi in ranges) or (rsp is not None and stack.lo < rsp <= stack.hi)


def _rows(
    words: Words, memory: tuple[Word, ...], frames: tuple[Frame, ...], near: list[tuple[int, int]]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Rows of the words near the ranges, lowest address first; what lies between is counted."""
    shown = [word for word in memory if any(lo - AROUND <= word.addr < hi + AROUND for lo, hi in near)][:MAX_WORDS]
    kept = {word.addr for word in shown}
    hidden = 0
    last: Word | None = None
    for word in memory:
        if word.addr not in kept:
            hidden += 1
            continue
        if hidden:
            yield _note(f"{hidden:,} more word{'' if hidden == 1 else 's'}")
        elif last is not None and word.addr != last.addr + 8:
            yield _note("unknown")
        hidden, last = 0, word
        yield _row(words, word, frames, near)
    if hidden:
        yield _note(f"{hidden:,} more word{'' if hidden == 1 else 's'}")


def _note(said: str) -> tuple[str, tuple[str, ...]]:
    return "", (text(f"... {said}"),)


def _row(words: Words, word: Word, frames: tuple[Frame, ...], near: list[tuple[int, int]]) -> tuple[str, tuple[str, ...]]:
    row = words.word_row(word, frames)
    symbol = words.symbol(word.value) if word.known == 0xFF else None
    inside = any(lo <= word.addr < hi for lo, hi in near)
    cells = (text(row.mark.strip()), mono(f"{row.addr:016x}"), mono(row.value), text(row.slot), text(row.owner), text(row.writer))
    return "hit" if inside else "", (*cells, text(symbol or ""))
