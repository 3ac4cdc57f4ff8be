"""Signatures of findings, and files of findings that are known and accepted.

A signature says what is wrong and where, in terms that a second recording of the same bug has too: no event numbers,
no CPU, no addresses.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TextIO

from tracedbg import rules, x86
from tracedbg.describe import Words
from tracedbg.errors import FormatError
from tracedbg.state import Event, Evidence, Finding, Frame, Kind, Known, Mismatch, Return, Rule, ShutdownReason, Source
from tracedbg.text import clean

SCHEMA = "tracedbg.baseline"
SCHEMA_VERSION = 1
MAX_FILE = 16 << 20  # bytes
MAX_SIGNATURE = 2048  # characters: two symbol names and some words
NAMED = 3  # signatures spelled out in a message

# The replay counts these once for many events. What the first of them interrupted differs from one recording to the next.
_COUNTED = frozenset(
    {
        Rule.FAKE_NMI, Rule.FAKE_MCE, Rule.TRACE_GAP, Rule.MODEL_MISMATCH, Rule.ERROR_CODE_MISMATCH, Rule.REENTRY_WINDOW,
        Rule.NMI_STUCK, Rule.NMI_LOST, Rule.HELD_VECTOR, Rule.ILLEGAL_VECTOR, Rule.UNMATCHED_RETURN,
    }
)  # fmt: skip


def signature(finding: Finding, words: Words) -> str:
    """Rule, stack, and vector, source and interrupted symbol of victim and writer, as known at the end of the trace.

    `frame-clobbered stack=ist2 victim=0x02/nmi@default_idle writer=0x02/nmi@do_nmi`. A symbol that is not known is `?`.
    Symbols are left out where the finding is only inferred (all of a stack are one) or where the replay counts many as one.
    """
    rule = finding.rule
    placed = rule not in _COUNTED and rules.finding_evidence(finding) > Evidence.INFERRED
    parts = [rules.rule_id(rule)]
    frames = [frame for frame in (finding.writer, finding.victim) if frame is not None]
    if frames:
        # A writer that is known by its record alone has no stack of its own.
        parts.append(f"stack={_stack(next((frame for frame in frames if frame.dedicated), frames[0]))}")
    for role, one in (("victim", finding.victim), ("writer", finding.writer)):
        if one is not None:
            symbol = f"@{_symbol(words, one.saved.rip)}" if placed else ""
            parts.append(f"{role}={_delivery(one.vector, one.source)}{symbol}")
    event = None if frames else words.event(finding.event)
    if event is not None:
        symbol = f"@{_symbol(words, event.rip)}" if placed and event.known & Known.RIP else ""
        parts.append(f"event={_event(event)}{symbol}")
    return " ".join((*parts, *_detail(finding)))


def _stack(frame: Frame) -> str:
    if frame.fred:
        return f"level{frame.level}"
    if frame.ist:
        return f"ist{frame.ist}"
    return "rsp0" if frame.saved.cs is not None and x86.cpl(frame.saved.cs) == 3 else "current"


def _delivery(vector: int, source: Source) -> str:
    return f"{vector:#04x}/{_kebab(source.name)}"


def _event(event: Event) -> str:
    if event.kind in (Kind.DELIVER, Kind.RAISE):
        vector = f"{event.arg:#04x}" if event.known & Known.ARG else "?"
        source = event.source if event.known & Known.SOURCE else Source.UNKNOWN
        return f"{_kebab(event.kind.name)}/{vector}/{_kebab(source.name)}"
    if event.kind is Kind.RETURN and event.arg in set(Return):
        return _kebab(Return(event.arg).name)
    return _kebab(event.kind.name)


def _symbol(words: Words, address: int | None) -> str:
    found = None if address is None else words.symbols.lookup(address)
    return "?" if found is None else found[0]


def _detail(finding: Finding) -> list[str]:
    """What tells apart findings of these rules."""
    if finding.rule is Rule.SHUTDOWN:
        known = finding.detail in set(ShutdownReason)
        return [f"reason={_kebab((ShutdownReason(finding.detail) if known else ShutdownReason.OTHER).name)}"]
    if finding.rule is Rule.MODEL_MISMATCH:
        return [f"what={'+'.join(_kebab(bit.name or '') for bit in Mismatch if finding.detail & bit) or 'other'}"]
    if finding.rule is Rule.REENTRY_WINDOW:
        return [f"cause={_kebab(finding.cause.name)}"]
    if finding.rule in (Rule.HELD_VECTOR, Rule.ILLEGAL_VECTOR):
        return [f"vector={finding.detail:#04x}"]
    if finding.rule is Rule.TOKEN_BUSY:
        return [f"token=ist{finding.detail}"]
    return []


def _kebab(name: str) -> str:
    return name.lower().replace("_", "-")


@dataclass(frozen=True, slots=True)
class Entry:
    """A signature that is accepted up to a severity. `count` and `line` are for the reader of the file."""

    signature: str
    severity: str
    count: int = 1
    line: str = ""


@dataclass(slots=True)
class Baseline:
    """The accepted findings, and which of them were seen again."""

    path: str
    entries: dict[str, Entry]
    seen: set[str] = field(default_factory=set)

    def known(self, finding: Finding, words: Words) -> bool:
        """Whether a finding is accepted. One that is worse than when it was accepted is not: a warning that is now proven."""
        entry = self.entries.get(signature(finding, words))
        if entry is None:
            return False
        self.seen.add(entry.signature)
        return rules.rank(rules.finding_severity(finding)) <= rules.rank(entry.severity)

    def missing(self) -> str | None:
        """One line on what did not appear; None if all did."""
        gone = sorted(self.entries.keys() - self.seen)
        if not gone:
            return None
        more = f"; and {len(gone) - NAMED:,} more" if len(gone) > NAMED else ""
        return f"{self.path}: {len(gone):,} of the baseline did not appear: {'; '.join(gone[:NAMED])}{more}"


class Collector:
    """Gathers the present findings, to be written as a baseline."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}

    def add(self, findings: Iterable[Finding], words: Words) -> None:
        """The findings of one trace."""
        for finding in findings:
            name, severity = signature(finding, words), rules.finding_severity(finding)
            old = self.entries.get(name)
            if old is None:
                self.entries[name] = Entry(name, severity, 1, _line(finding, words))
            else:
                self.entries[name] = replace(old, severity=max(old.severity, severity, key=rules.rank), count=old.count + 1)

    def write(self, out: TextIO) -> None:
        """The file: JSON in ASCII, sorted by signature, to be kept under version control."""
        document = {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "findings": [asdict(self.entries[name]) for name in sorted(self.entries)],
        }
        out.write(json.dumps(document, indent=2, ensure_ascii=True) + "\n")


def _line(finding: Finding, words: Words) -> str:
    """For the reader, and the same for every finding of a signature."""
    title = rules.BY_RULE[finding.rule].title
    writer, victim = finding.writer, finding.victim
    frame = writer or victim
    if frame is None:
        return title
    kinds = [words.frame_kind(one) for one in (writer, victim) if one is not None]
    return f"{title} ({' over '.join(kinds)}, {words.frame_stack(frame).removeprefix('the ')})"


def load(path: str) -> Baseline:
    """Read a baseline; `-` is standard input. Raises FormatError with the path, and the offset where it is no JSON."""
    try:
        if path == "-":
            data = sys.stdin.buffer.read(MAX_FILE + 1)
        else:
            with open(path, "rb") as file:
                data = file.read(MAX_FILE + 1)
    except OSError as error:
        raise FormatError(path, (error.strerror or str(error)).lower()) from None
    return parse(data, path)


def parse(data: bytes, path: str = "-") -> Baseline:
    """A baseline from the bytes of its file."""
    if len(data) > MAX_FILE:
        raise FormatError(path, f"larger than {MAX_FILE >> 20} MiB")
    try:
        text = data.decode("utf-8")
        document = json.loads(text)
    except UnicodeDecodeError as error:
        raise FormatError(path, "not UTF-8 text", error.start) from None
    except json.JSONDecodeError as error:
        raise FormatError(path, f"not JSON: {error.msg.lower()}", len(text[: error.pos].encode())) from None
    except RecursionError:
        raise FormatError(path, "not a baseline: nested too deeply") from None
    except ValueError:  # a number of more digits than Python converts
        raise FormatError(path, "not a baseline: an impossible number") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise FormatError(path, "not a baseline (`tracedbg replay --write-baseline` makes one)")
    version = document.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        said = version if type(version) is int and 0 <= version < 1 << 32 else "?"
        raise FormatError(path, f"baseline of version {said}, this program reads {SCHEMA_VERSION}")
    listed = document.get("findings")
    if not isinstance(listed, list):
        raise FormatError(path, "baseline without a list `findings`")
    entries: dict[str, Entry] = {}
    for number, item in enumerate(listed):
        entry = _entry(item, path, number)
        if entry.signature in entries:
            raise FormatError(path, f"findings[{number}]: the signature was there before")
        entries[entry.signature] = entry
    return Baseline(path, entries)


def _entry(item: Any, path: str, number: int) -> Entry:
    if not isinstance(item, dict):
        raise FormatError(path, f"findings[{number}] is not an object")
    name, severity, count, line = (item.get(key) for key in ("signature", "severity", "count", "line"))
    if not isinstance(name, str) or not name or len(name) > MAX_SIGNATURE or name != clean(name, MAX_SIGNATURE):
        raise FormatError(path, f"findings[{number}]: `signature` is not a line of text")
    if severity not in rules.SEVERITIES:
        raise FormatError(path, f"findings[{number}]: `severity` is none of {', '.join(rules.SEVERITIES)}")
    if count is not None and (type(count) is not int or count < 1):
        raise FormatError(path, f"findings[{number}]: `count` is not a number from 1 on")
    if line is not None and not isinstance(line, str):
        raise FormatError(path, f"findings[{number}]: `line` is not text")
    return Entry(name, severity, count or 1, line or "")
