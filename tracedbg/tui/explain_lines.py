"""The explanation of a finding laid out for a width: lines of styled text, many of which lead to an event."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tracedbg import rules
from tracedbg.describe import BytesRow, Words, headings, number_text, wrap
from tracedbg.describe.brief import brief_address
from tracedbg.state import Finding
from tracedbg.tui.marks import GLYPHS

MAX_TEXT = 110  # columns of prose: longer lines are hard to read
LEAST_TEXT = 24
LINK = 2  # columns for the mark of lines that lead somewhere

_BEFORE, _AFTER = LINK + 2 + 1 + 10 + 1, 1 + 16 + 1  # columns of a row of bytes beside address, own value and event

# Parts of a line: text and the name of its component style, empty for plain.
Part = tuple[str, str]

TITLE, LABEL, WRONG, QUIET = "explain--title", "explain--label", "stack--clobbered", "stack--left"
_MARKS = {headings.DIFFERS: "✗", headings.SAME: "=", headings.NOT_OVERWRITTEN: " ", "": "?"}


@dataclass(frozen=True, slots=True)
class Line:
    """One line. `event`: where Enter goes; `first`: begins an entry; `text`: what copying it gives."""

    parts: tuple[Part, ...]
    event: int | None = None
    first: bool = False
    text: str = ""


def explanation(finding: Finding, words: Words, width: int) -> list[Line]:
    """All that is said of a finding, in `width` columns."""
    room = max(min(width, MAX_TEXT), LEAST_TEXT)
    lines = [*_head(finding, words, room)]
    sections = (
        (headings.PARTS, _parts(finding, words, room)),
        (headings.CHAIN, _chain(finding, words, room)),
        (headings.BYTES, _table(finding, words, width)),
        (headings.EVIDENCE, _prose(words.evidence_text(finding), room)),
        (headings.MANUAL, _manual(finding, room)),
        (headings.PREVENTED, _list(words.prevention(finding), room)),
        (headings.FIXES, _list(rules.BY_RULE[finding.rule].fixes, room)),
        (headings.WHY, _prose(rules.BY_RULE[finding.rule].why, room)),
    )
    for heading, body in sections:
        section = list(body)
        if section:
            lines += [Line(()), Line(((heading.capitalize(), TITLE),)), *section]
    return lines


def _head(finding: Finding, words: Words, room: int) -> Iterator[Line]:
    level = rules.finding_severity(finding)
    info = rules.BY_RULE[finding.rule]
    head = f"{level}: {info.id}, {words.finding_place(finding)}"
    yield Line(((f"{GLYPHS[level]} {head}", f"marks--{level}"),), text=head)
    for line in wrap(info.title, " " * LINK, room):
        yield Line(((line, TITLE),), text=info.title)
    yield Line(())
    yield from _prose(words.finding_prose(finding), room)


def _prose(text: str, room: int) -> Iterator[Line]:
    for line in wrap(text, " " * LINK, room):
        yield Line(((line, ""),), text=text)


def _list(items: tuple[str, ...], room: int) -> Iterator[Line]:
    for item in items:
        for line in wrap(item, " " * LINK + "- ", room):
            yield Line(((line, ""),), text=item)


def _manual(finding: Finding, room: int) -> Iterator[Line]:
    refs = rules.finding_refs(finding)
    if refs:
        yield from _prose(f"{'; '.join(refs)} {rules.EDITIONS}", room)


def _entry(label: str, event: int, name: str, text: str, room: int) -> Iterator[Line]:
    """Lines that lead to an event: a label, the event's name, what there is to say of it."""
    indent = LINK + len(label)
    for number, line in enumerate(wrap(f"{name}: {text}", "", max(room - indent, LEAST_TEXT))):
        shown = label if number == 0 else " " * len(label)
        yield Line(((shown, LABEL), (line, "")), event, number == 0, f"{name}: {text}")


def _parts(finding: Finding, words: Words, room: int) -> Iterator[Line]:
    parts = words.finding_parts(finding)
    width = max((len(part.role) for part in parts), default=0) + 2
    for part in parts:
        yield from _entry(f"{part.role:<{width}}", part.event, words.event_name(part.event), part.text, room)


def _chain(finding: Finding, words: Words, room: int) -> Iterator[Line]:
    steps = words.finding_chain(finding)
    if len(steps) < 2:
        return
    digits = len(str(len(steps)))
    for number, step in enumerate(steps, 1):
        yield from _entry(f"{number:>{digits}}. ", step.event, words.event_name(step.event), step.text, room)


def _table(finding: Finding, words: Words, width: int) -> Iterator[Line]:
    rows = words.table_rows(finding)
    if not rows:
        return
    by = words.writing_event(finding)
    name, own = words.event_name(by), words.table_heads(finding)[0]
    least = max(16, len(own))  # columns of the frame's own values
    brief = _BEFORE + 16 + least + _AFTER + len(name) > width
    if brief:
        name = f"event {by}"
    digits = 9 if brief else 16
    spare = max(width - _BEFORE - digits - least - _AFTER - len(name), 0)
    longest = max((len(words.symbol(row.own) or "") for row in rows if row.slot == "rip"), default=0)
    values = max(least, min(longest, least + spare))
    blank = " " * LINK
    yield Line(((f"{blank}  {'address':<{digits}} {'slot':<10} {own:<{values}} {'now':<16} by", QUIET),))
    for row in rows:
        mark = words.row_mark(row)
        address = brief_address(row.addr) if brief else f"{row.addr:016x}"
        known = f"{address:<{digits}} {row.slot:<10} {number_text(row.own):<{values}} "
        style = WRONG if row.differs else QUIET
        parts = [(f"{_MARKS[mark]} ", style), (known, "" if row.differs else QUIET)]
        if row.overwritten:
            parts += [(f"{number_text(row.now):<16}", style), (f" {name}", "" if row.differs else QUIET)]
        else:
            parts = [(blank, ""), *parts, (words.now_text(row), QUIET)]
        yield Line(tuple(parts), by if row.overwritten else None, row.overwritten, number_text(row.now))
        yield from _symbols(row, words, _BEFORE + digits, values)
    yield Line(((f"{blank}{_MARKS[headings.DIFFERS]} {headings.DIFFERS}   {_MARKS[headings.SAME]} {headings.SAME}", QUIET),))


def _symbols(row: BytesRow, words: Words, indent: int, values: int) -> Iterator[Line]:
    """The names of the two places below their addresses, or below each other where they are long."""
    own = words.symbol(row.own) if row.slot == "rip" else None
    now = words.symbol(row.now) if row.slot == "rip" and row.overwritten else None
    blank = " " * indent
    if own and len(own) > values:
        yield Line(((f"{blank}own: {own}", QUIET),), text=own)
        own = ""
    if own or now:
        style = WRONG if row.differs else QUIET
        yield Line(((f"{blank}{own or '':<{values}} ", QUIET), (now or "", style)), text=now or own or "")
