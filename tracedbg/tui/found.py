"""What the scan has found so far, and where: the app's own book of findings."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from tracedbg import rules
from tracedbg.state import Finding, Rule
from tracedbg.tui.marks import GLYPHS


class Findings:
    """Findings in the order raised, which is that of their events. Taking new ones costs nothing for the old ones."""

    def __init__(self) -> None:
        self.items: list[Finding] = []
        self.levels: list[str] = []  # severity of each
        self.marks: dict[int, str] = {}  # gravest severity by event
        self.tally = ""  # `✗ 2 errors  · 1 note`
        self._events: list[int] = []

    def __len__(self) -> int:
        return len(self.items)

    def take(self, first: int, findings: Sequence[Finding]) -> None:
        """Replace those from number `first` on."""
        levels = [rules.finding_severity(f) for f in findings]
        self.items[first:] = findings
        self.levels[first:] = levels
        self._events[first:] = [f.event for f in findings]
        if first == 0:
            self.marks.clear()
        for finding, level in zip(findings, levels, strict=True):
            self.marks[finding.event] = max(self.marks.get(finding.event, level), level, key=rules.rank)
        self.tally = "  ".join(
            f"{GLYPHS[level]} {count:,} {level}{'' if count == 1 else 's'}"
            for level in reversed(rules.SEVERITIES)
            if (count := self.levels.count(level))
        )

    def at(self, event: int) -> int | None:
        """Number of the first of the gravest findings that an event raised."""
        numbers = range(bisect_left(self._events, event), bisect_right(self._events, event))
        return max(numbers, key=lambda n: (rules.rank(self.levels[n]), -n), default=None)

    def beyond(self, event: int, direction: int) -> int | None:
        """Number of the nearest finding after (direction 1) or before an event."""
        number = bisect_right(self._events, event) if direction > 0 else bisect_left(self._events, event) - 1
        return self.valid(number)

    def valid(self, number: int) -> int | None:
        """The number, if there is such a finding."""
        return number if 0 <= number < len(self.items) else None

    def first(self, level: str) -> int | None:
        """Number of the first finding of a severity."""
        return self.levels.index(level) if level in self.levels else None

    def gravest(self) -> int | None:
        """Number of the first finding of the gravest severity that there is."""
        return self.first(max(self.levels, key=rules.rank)) if self.levels else None

    def roles(self, number: int | None) -> dict[int, str]:
        """The events of a finding and their parts in it."""
        if number is None or self.valid(number) is None:
            return {}
        finding = self.items[number]
        victim = finding.victim
        # Without a victim the writer is just the delivery that the finding is about, and its mark says so.
        writer = finding.writer if victim is not None else None
        double = finding.rule is Rule.DOUBLE_FAULT
        parts = (
            (finding.consumer, "pops"),
            (finding.cause_frame if double else None, "cause"),
            (finding.cause_event, "cause"),
            (victim.entry if victim is not None else None, "victim"),
            (writer.entry if writer is not None else None, "overwrites"),
        )
        return {event: part for event, part in parts if event is not None}
