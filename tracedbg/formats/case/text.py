"""A case file as text: its sections, its header and prose, and the form in which these travel in META."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tracedbg.state import Rule
from tracedbg.text import clean

FIRST_LINE = "tracedbg case 1"
MAX_TEXT = 64 << 20  # bytes of a case file: about half a million events
MAX_LINES = 2 << 20
META_KEY = "case"

TRACE, LAYOUT, LAYOUT_HEX, MEMORY, EVENTS, EXPECT, BYTES, META, SYMBOLS, SYMBOLS_HEX = SECTIONS = (
    "trace", "layout", "layout-hex", "memory", "events", "expect", "bytes", "meta", "symbols", "symbols-hex",
)  # fmt: skip
HEADER_KEYS = ("title", "source", "rules", "near-miss")
RULE_IDS = {rule.name.lower().replace("_", "-"): rule for rule in Rule}

_HEAD = re.compile(r"\[([a-z][a-z-]*)\]")
LABEL = re.compile(r"[a-z][a-z0-9_-]{0,39}")
NO_LABELS = frozenset({"none", "initial"})  # words of [expect] where a label can stand
_NUMBER = re.compile(r"0x[0-9a-fA-F]{1,16}|[0-9]{1,20}")
_RULE = re.compile(r"R[1-9][0-9]?")


class LineError(ValueError):
    """Something wrong in a line of the file; `line` counts from 1."""

    def __init__(self, line: int, message: str) -> None:
        self.line = line
        super().__init__(f"line {line}: {message}")


@dataclass(frozen=True, slots=True)
class Section:
    """`[name]` at line `line`; its lines follow."""

    name: str
    line: int
    lines: list[str]

    def numbered(self) -> Iterable[tuple[int, str]]:
        """Its lines with their numbers."""
        return enumerate(self.lines, self.line + 1)


@dataclass(slots=True)
class CaseText:
    """What people write around the events. `notes`: behind an event; `comments`: lines above it ("" is a blank line)."""

    header: list[tuple[str, str]] = field(default_factory=list)
    prose: list[str] = field(default_factory=list)
    expect: list[str] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    notes: dict[int, str] = field(default_factory=dict)
    comments: dict[int, list[str]] = field(default_factory=dict)

    def values(self, key: str) -> list[str]:
        """The words of all header lines of that key (`rules`, `near-miss`)."""
        return [word for name, value in self.header if name == key for word in value.split()]

    def to_meta(self) -> dict[str, Any]:
        """As JSON values; what is empty is left out."""
        parts: dict[str, Any] = {
            "header": [list(pair) for pair in self.header],
            "prose": list(self.prose),
            "expect": list(self.expect),
            "labels": dict(self.labels),
            "notes": {str(n): text for n, text in self.notes.items()},
            "comments": {str(n): list(lines) for n, lines in self.comments.items()},
        }
        return {key: value for key, value in parts.items() if value}


# -- reading ------------------------------------------------------------------------------------------------------------


def decode(data: bytes) -> str:
    """The text of a file. Raises LineError if it is not UTF-8 or holds control characters."""
    if not begins(data):
        raise LineError(1, f"a case file begins with {FIRST_LINE!r}")
    if data.count(b"\n") > MAX_LINES:
        raise LineError(MAX_LINES, "a case file has no more lines than this")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LineError(data.count(b"\n", 0, error.start) + 1, "not UTF-8 text") from None
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    lines = text.split("\n")
    for number, line in enumerate(lines):
        lines[number] = line = line.removesuffix("\r").expandtabs()
        if not plain(line):
            raise LineError(number + 1, "control or formatting character")
    return "\n".join(lines)


def begins(data: bytes, *, version: bool = True) -> bool:
    """Whether bytes begin as a case file does, of this version or of any."""
    first = FIRST_LINE.encode()
    line = data.removeprefix(b"\xef\xbb\xbf")[: len(first) + 1]
    return line.rstrip() == first if version else line.startswith(first[:-1])


def plain(text: str) -> bool:
    """Whether a line holds nothing that a terminal could act on."""
    return clean(text, len(text)) == text


def sections(text: str) -> tuple[Section, dict[str, Section]]:
    """The head (all before the first section) and the sections by name. Raises LineError."""
    lines = [line.rstrip() for line in text.split("\n")]
    if lines[0] != FIRST_LINE:
        raise LineError(1, f"a case file begins with {FIRST_LINE!r}")
    current = head = Section("", 1, [])
    found: dict[str, Section] = {}
    for number, line in enumerate(lines[1:], 2):
        match = _HEAD.fullmatch(line) if line.startswith("[") else None
        if match is None or (match[1] not in SECTIONS and current.name == LAYOUT):  # TOML's own: [names]
            current.lines.append(line)
            continue
        name = match[1]
        if name not in SECTIONS:
            raise LineError(number, f"no section [{name}] (known: {', '.join(SECTIONS)})")
        if name in found:
            raise LineError(number, f"section [{name}] is there twice")
        current = found[name] = Section(name, number, [])
    return head, found


def read_head(head: Section, case: CaseText) -> None:
    """The header up to the first blank line, then prose. Raises LineError."""
    lines = list(head.numbered())
    at = 0
    for number, line in lines:
        if not line:
            break
        at += 1
        key, colon, value = line.partition(":")
        value = value.strip()
        if key not in HEADER_KEYS or not colon:
            raise LineError(number, f"{shown(line)} is no header line (keys: {', '.join(HEADER_KEYS)}; a blank line ends them)")
        if not value:
            raise LineError(number, f"{key}: nothing behind it")
        if key == "title" and any(name == key for name, _ in case.header):
            raise LineError(number, "a second title")
        for word in value.split() if key in ("rules", "near-miss") else ():
            if not (_RULE.fullmatch(word) if key == "rules" else word in RULE_IDS):
                raise LineError(number, f"{key}: {shown(word)} is no {'rule (R1 ...)' if key == 'rules' else 'finding'}")
        case.header.append((key, value))
    case.prose = block(line for _, line in lines[at:])


def block(lines: Iterable[str]) -> list[str]:
    """Lines without the blank ones at both ends."""
    result = list(lines)
    first = next((n for n, line in enumerate(result) if line), len(result))
    last = next((n for n in range(len(result), first, -1) if result[n - 1]), first)
    return result[first:last]


def split_comment(line: str) -> tuple[str, str | None]:
    """A line without its comment, and the comment: `#` at the beginning, or between blanks (`#PF` is none)."""
    if "#" not in line:
        return line, None
    if line.startswith("#"):
        return "", line[1:].strip()
    at = f"{line} ".find(" # ")
    return (line, None) if at < 0 else (line[:at], line[at + 2 :].strip())


def number(word: str, bits: int, line: int, what: str = "") -> int:
    """A decimal or 0x number of at most so many bits. Raises LineError."""
    value = int(word, 0 if word[:2] == "0x" else 10) if _NUMBER.fullmatch(word) else -1
    if not 0 <= value < 1 << bits:
        raise LineError(line, f"{what and what + ': '}{shown(word)} is not a number of {bits} bits")
    return value


def shown(text: str) -> str:
    """Text of the file in an error, which is one line."""
    return repr(clean(text, 60))


# -- META ---------------------------------------------------------------------------------------------------------------


def from_meta(value: Any, count: int) -> CaseText | None:
    """The text that a trace of `count` events carries; None if `to_meta` of no case file gives this value."""
    if not isinstance(value, dict) or not value:
        return None
    try:
        case = CaseText(
            [(key, text) for key, text in value.get("header", [])],
            value.get("prose", []),
            value.get("expect", []),
            value.get("labels", {}),
            {int(n): text for n, text in value.get("notes", {}).items()},
            {int(n): lines for n, lines in value.get("comments", {}).items()},
        )
        # Hostile META is told by what reading the text again gives.
        texts = [*(text for pair in case.header for text in pair), *case.prose, *case.expect, *case.labels, *case.notes.values()]
        texts += [line for lines in case.comments.values() for line in lines]
        if not all(isinstance(text, str) and plain(text) and text == text.rstrip() for text in texts):
            return None
        again = CaseText(labels=case.labels, notes=case.notes, comments=case.comments)
        head, found = sections("\n".join([FIRST_LINE, *head_lines(case), f"[{EXPECT}]", *case.expect]))
        read_head(head, again)
        again.expect = block(found[EXPECT].lines)
        if list(found) != [EXPECT] or again.to_meta() != value or not _fits(case, count):
            return None
    except (LineError, TypeError, ValueError, AttributeError, KeyError):
        return None
    return case


def _fits(case: CaseText, count: int) -> bool:
    """Whether labels, notes and comments can stand in the [events] of so many events."""
    labels = list(case.labels.values())
    return (
        all(LABEL.fullmatch(label) and label not in NO_LABELS for label in case.labels)
        and len(set(labels)) == len(labels)
        and all(type(n) is int and 0 <= n < count for n in labels)
        and all(0 <= n < count and note and note == note.strip() for n, note in case.notes.items())
        and all(0 <= n <= count and lines and lines == comment_lines(lines, n, count) for n, lines in case.comments.items())
    )


def comment_lines(lines: Iterable[str], index: int, count: int) -> list[str]:
    """Comment lines above event `index` in canonical form: one blank line at a time, none at the ends of the section."""
    result: list[str] = []
    for line in lines:
        line = line.strip()
        if line or (result[-1] if result else index > 0):
            result.append(line)
    if index == count and result and not result[-1]:
        result.pop()
    return result


def head_lines(case: CaseText) -> list[str]:
    """Header and prose as they stand in a file, behind the first line."""
    lines = [f"{key}: {value}" for key, value in case.header]
    return [*lines, "", *case.prose, *([""] if case.prose else [])]
