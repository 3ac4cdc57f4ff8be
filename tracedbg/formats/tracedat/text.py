"""The texts in a trace.dat that say where the fields of pages and records lie (tracefs: events/header_page, events/*/*/format).

A line is `field:TYPE NAME; offset:N; size:N; signed:N;`, the name perhaps with `[N]` behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

_MAX_AT = 1 << 16


@dataclass(frozen=True, slots=True)
class Field:
    """One field: its offset in the record, its bytes, and what is before its name."""

    at: int
    size: int
    type: str

    @property
    def is_number(self) -> bool:
        """Whether it is one that can be read as such."""
        return self.size in (1, 2, 4, 8) and self.at < _MAX_AT


@dataclass(frozen=True)
class Format:
    """The format of a tracepoint's records. A trace has some thousand, of which a few are looked into."""

    system: str
    name: str
    number: int
    text: str

    @cached_property
    def fields(self) -> Mapping[str, Field]:
        """The fields by name. Those that all records have (`common_type` ...) are among them."""
        return fields(self.text)

    @property
    def full_name(self) -> str:
        """`irq_vectors:local_timer_entry`."""
        return f"{self.system}:{self.name}"


def _field(line: str) -> tuple[str, Field] | None:
    declared, *rest = line.removeprefix("field:").split(";")
    said = dict(part.strip().partition(":")[::2] for part in rest)
    at, size = said.get("offset", ""), said.get("size", "")
    if not (at.isdecimal() and size.isdecimal() and len(at) < 10 and len(size) < 10):
        return None
    kind, _, name = declared.partition("[")[0].replace("*", " ").strip().rpartition(" ")
    if declared.lstrip().startswith("__data_loc"):  # `__data_loc char[] name`
        kind, name = "__data_loc", declared.split()[-1]
    return name, Field(int(at), int(size), kind.strip())


def _lines(text: str) -> Iterator[str]:
    return (line.strip() for line in text.split("\n"))


def fields(text: str) -> dict[str, Field]:
    """The fields of a format text; of two with one name the first."""
    found: dict[str, Field] = {}
    for line in _lines(text):
        if line.startswith("field:") and (one := _field(line)) is not None:
            found.setdefault(*one)
    return found


def event(system: str, text: str) -> Format | None:
    """An event's format; None if the text is none."""
    head, _, body = text.partition("format:")
    name = number = ""
    for line in _lines(head):
        if line.startswith("name:"):
            name = name or line[5:].strip()
        elif line.startswith("ID:"):
            number = number or line[3:].strip()
    if not name or not number.isdecimal() or len(number) > 5 or int(number) > 0xFFFF:
        return None
    return Format(system, name, int(number), body.partition("print fmt:")[0])


@dataclass(frozen=True, slots=True)
class PageFormat:
    """Where things lie in a page. `long_size`: bytes of the word that says how much of it is used."""

    commit_at: int
    long_size: int
    data_at: int


def page(text: str) -> PageFormat | None:
    """The format of a page (header_page); None if the text does not say it."""
    found = fields(text)
    time, commit, data = found.get("timestamp"), found.get("commit"), found.get("data")
    if time is None or commit is None or data is None or (time.at, time.size) != (0, 8) or commit.size not in (4, 8):
        return None
    if commit.at < 8 or data.at < commit.at + commit.size or data.at > 256:
        return None
    return PageFormat(commit.at, commit.size, data.at)
