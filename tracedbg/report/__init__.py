"""Reports of a replay: what a trace's verdict is, and its forms (text, JSON)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tracedbg import baseline, rules
from tracedbg.describe import Words
from tracedbg.layout import Layout
from tracedbg.state import Finding, Stats
from tracedbg.text import clean
from tracedbg.trace import Trace


@dataclass(frozen=True, slots=True)
class Result:
    """All that a report says of one trace; `position` None: the end, with the final words."""

    name: str
    trace: Trace
    words: Words
    findings: tuple[Finding, ...]
    stats: Stats
    position: int | None = None
    limit: int | None = None  # findings to show (as text: entries, each of equal findings)
    lost: int = 0  # findings beyond what the core keeps
    unknown: tuple[str, ...] = field(default=())
    known: frozenset[int] = frozenset()  # numbers of the findings that a baseline accepts

    @property
    def shown(self) -> tuple[Finding, ...]:
        """The findings that a report of single findings spells out: the first ones, or of too many the worst."""
        if self.limit is None or len(self.findings) <= self.limit:
            return self.findings
        return tuple(sorted(sorted(self.findings, key=self.order)[: self.limit], key=lambda finding: finding.number))

    @property
    def omitted(self) -> int:
        """How many findings are counted only, in a report of single findings."""
        return self.lost + len(self.findings) - len(self.shown)

    def order(self, finding: Finding) -> tuple[bool, int, int]:
        """Sort key: what is new before what is known, errors first, then as raised."""
        return (finding.number in self.known, -rules.rank(self.severity(finding)), finding.number)

    def severity(self, finding: Finding) -> str:
        """Severity as known at the position."""
        return rules.finding_severity(finding, self.position)

    def signature(self, finding: Finding) -> str:
        """What is the same of a finding in another recording (see baseline.py)."""
        return baseline.signature(finding, self.words)

    def counts(self, *, known: bool = True) -> dict[str, int]:
        """Findings by severity, worst first; with or without those that a baseline accepts."""
        found = dict.fromkeys(reversed(rules.SEVERITIES), 0)
        for finding in self.findings:
            if known or finding.number not in self.known:
                found[self.severity(finding)] += 1
        return found

    @property
    def known_count(self) -> int:
        """Findings that a baseline accepts."""
        return sum(finding.number in self.known for finding in self.findings)

    def reaches(self, fail_on: str) -> bool:
        """Whether a finding that no baseline accepts reaches a severity."""
        return any(n and rules.rank(level) >= rules.rank(fail_on) for level, n in self.counts(known=False).items())


def meta_dict(trace: Trace, key: str) -> dict[str, Any]:
    """A table of META; empty if it is missing or something else."""
    value = trace.meta.get(key)
    return value if isinstance(value, dict) else {}


def meta_texts(table: dict[str, Any], key: str) -> tuple[str, ...]:
    """A text or a list of texts of META, fit for a terminal."""
    value = table.get(key)
    items = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(clean(item, 2000) for item in items if isinstance(item, str))


_ORIGINS = {"file": "as given", "monitor": "monitor text", "file and monitor": "as given, and monitor text"}


def layout_notes(trace: Trace) -> list[str]:
    """Where the layout comes from and what is assumed of it, a line each."""
    table = meta_dict(trace, "layout")
    if trace.layout.is_empty and table.get("needless") is True:
        return ["layout: none, and none is needed: no delivery is in long mode"]
    if trace.layout.is_empty:
        return ["layout: none; frames cannot be placed (`tracedbg help layout`)"]
    notes = []
    origin = ", ".join(_ORIGINS.get(text, text) for text in meta_texts(table, "origin"))
    files = ", ".join(meta_texts(table, "file"))
    snapshots = table.get("snapshots")
    several = len(snapshots) if isinstance(snapshots, list) else 1
    if origin:
        notes.append(f"layout: {origin}{f' {files}' if files else ''}{f', of {several} snapshots' if several > 1 else ''}")
    notes += [f"assumed: {text}" for text in meta_texts(table, "assumption")]
    if "monitor" in origin and several > 1 and table.get("agree") is True:
        notes.append(f"assumed: TSS and IDT stayed as the {several} snapshots have them, which agree")
    elif "monitor" in origin and several > 1:
        notes.append("assumed: TSS and IDT stayed as this snapshot has them; other snapshots differ")
    elif "monitor" in origin:
        notes.append("assumed: TSS and IDT were the same while the trace was recorded as when they were read")
    return notes


def unknown_reasons(trace: Trace, layout: Layout, stats: Stats, lost: int = 0) -> tuple[str, ...]:
    """Why the fate of some frame cannot be known; empty if it can. `lost`: findings that the core could not keep."""
    reasons = []
    missing = meta_dict(trace, "layout").get("missing")
    if stats.unjudged and (layout.is_empty or missing):
        lacks = "no layout" if layout.is_empty else "the layout is incomplete"
        reasons.append(f"{lacks}: {_deliveries(stats.unjudged)} cannot be placed on a stack")
    if stats.gaps:
        reasons.append(f"records are missing ({stats.gaps:,} gap{'' if stats.gaps == 1 else 's'})")
    if stats.judged and stats.returns and trace.meta.get("returns") == "unplaced":
        reasons.append("the trace has returns without RSP: which frames they popped is not known")
    if stats.judged and trace.meta.get("returns") == "none":
        reasons.append("the trace has neither RSP nor returns: which frames were still in use is not known")
    if lost:
        reasons.append(f"{lost:,} finding{' is' if lost == 1 else 's are'} more than the replay keeps")
    return tuple(reasons)


def verdict(result: Result, fail_on: str = "error") -> str:
    """`1 error, 2 notes`, `clean`, or `unknown: ...` where nothing was found and something may be there."""
    parts = [f"{n} {level}{'' if n == 1 else 's'}" for level, n in result.counts(known=False).items() if n]
    if result.known_count:
        parts.append(f"{result.known_count} known")
    said = ", ".join(parts)
    if not result.reaches(fail_on) and result.unknown:
        return f"unknown: {'; '.join(result.unknown)}" + (f" ({said})" if said else "")
    if not said and not result.stats.judged and result.stats.deliveries + result.stats.legacy:
        return "clean, but no delivery could be judged"
    if not said and meta_dict(result.trace, "layout").get("needless") is True:
        return "clean, but there is no delivery to judge"
    if result.known_count and len(parts) == 1:
        return f"clean ({said})"
    return said or "clean"


def not_judged(stats: Stats, layout: Layout) -> list[str]:
    """Deliveries and events that no verdict covers, a line for each reason."""
    notes = []
    if stats.legacy:
        notes.append(f"not judged: {_deliveries(stats.legacy)} outside of long mode")
    if stats.unjudged and not layout.is_empty:
        notes.append(f"not judged: {_deliveries(stats.unjudged)} with a TSS, a gate or registers that are not known")
    if stats.bad_events:
        skipped = "1 event that makes" if stats.bad_events == 1 else f"{stats.bad_events:,} events that make"
        notes.append(f"skipped: {skipped} no sense, the first is event {stats.first_bad}")
    return notes


def _deliveries(count: int) -> str:
    return f"{count:,} {'delivery' if count == 1 else 'deliveries'}"
