"""What an export says beside events and frames: the trace, its layout, its findings, each as rows of plain values."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import IntEnum

from tracedbg import baseline, rules
from tracedbg.describe import Words
from tracedbg.replay import Replay
from tracedbg.state import Cause, Event, EventFlag, Finding, Frame, Kind, Known, Source, Stats
from tracedbg.text import clean
from tracedbg.trace import Trace
from tracedbg.x86 import SLOT_NAMES

ALL_CPUS = 0xFFFF  # as the CPU of a finding
FINDINGS_AT_ONCE = 1024
MAX_TEXT = 4096  # characters of one text of META


def word(member: IntEnum) -> str:
    """An enum member as reports write it: `nmi-unblocked`."""
    return member.name.lower().replace("_", "-")


def meta_rows(trace: Trace) -> Iterator[tuple[str, str]]:
    """META: a text as it is (without what a terminal could act on), all else as JSON; sorted by name."""
    found: dict[str, str] = {}
    for name, value in trace.meta.items():
        found.setdefault(clean(name, 40), clean(value, MAX_TEXT) if isinstance(value, str) else _json(value))
    yield from sorted(found.items())


def _json(value: object) -> str:
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=True)
    except RecursionError:
        return '"(nested too deeply)"'


def count_rows(stats: Stats) -> Iterator[tuple[str, int]]:
    """What the replay counted; not how it went about it."""
    for field in fields(Stats):
        value = getattr(stats, field.name)
        if isinstance(value, int) and field.name not in ("snapshots", "pages", "frames", "interval", "bytes", "first_bad"):
            yield field.name, value


def delivery_name(words: Words, vector: int, source: int, short: bool | int) -> str:
    """What deliveries of a vector from a source are called; `short`: by an INT of one byte."""
    known = Known.ARG | Known.SOURCE | Known.CODE
    kind = Source(source) if source in set(Source) else Source.UNKNOWN
    event = Event(0, Kind.DELIVER, 0, 0, 0, 0, 0, 0, 1 if short else 2, 0, 0, 0, 0, known, vector, kind, EventFlag(0))
    return words.delivery_name(event)


def slot_list(mask: int) -> str:
    """Words of a frame, by name: `rip cs rflags`."""
    return " ".join(name for n, name in enumerate(SLOT_NAMES) if mask >> n & 1)


@dataclass(frozen=True, slots=True)
class FindingRow:
    """One finding with its final word; the fields are columns of every export."""

    finding: int
    rule: str
    severity: str
    evidence: str
    cpu: int | None
    event: int
    count: int
    raised_as: str
    settled: int | None
    settled_by: str | None
    cause: str | None
    cause_event: int | None
    cause_frame: int | None
    victim: int | None
    writer: int | None
    consumer: int | None
    lo: int | None
    hi: int | None
    slots: str
    differ: str
    popped_rip: int | None
    popped_cs: int | None
    popped_rflags: int | None
    popped_rsp: int | None
    popped_ss: int | None
    message: str
    signature: str


def all_findings(replay: Replay) -> Iterator[Finding]:
    """The findings of a replay that has made its forward pass, a few at a time."""
    first = 0
    while found := replay.findings(first, FINDINGS_AT_ONCE):
        yield from found
        first += len(found)


def finding_row(finding: Finding, words: Words) -> FindingRow:
    """A finding as a row."""
    popped = finding.popped
    some = finding.hi > finding.lo
    return FindingRow(
        finding.number,
        rules.rule_id(finding.rule),
        rules.finding_severity(finding),
        rules.finding_evidence(finding).name.lower(),
        None if finding.cpu == ALL_CPUS else finding.cpu,
        finding.event,
        finding.count,
        rules.rule_id(finding.raised_rule),
        finding.settled,
        None if finding.settled_by is None else word(finding.settled_by),
        None if finding.cause is Cause.NONE else word(finding.cause),
        finding.cause_event,
        finding.cause_frame,
        _entry(finding.victim),
        _entry(finding.writer),
        finding.consumer,
        finding.lo if some else None,
        finding.hi if some else None,
        slot_list(finding.slots),
        slot_list(finding.differ),
        *((None,) * 5 if popped is None else (popped.rip, popped.cs, popped.rflags, popped.rsp, popped.ss)),
        words.finding_line(finding),
        baseline.signature(finding, words),
    )


def _entry(frame: Frame | None) -> int | None:
    return None if frame is None else frame.entry
