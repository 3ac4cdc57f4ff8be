"""The list of findings."""

from __future__ import annotations

from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual.binding import Binding, BindingType

from tracedbg import rules
from tracedbg.describe import Words
from tracedbg.state import Finding
from tracedbg.tui.lines import QUIET, LineList
from tracedbg.tui.marks import GLYPHS

BRIEF_WIDTH = 80  # narrower lists say it in fewer words


class FindingList(LineList):
    """One line for each finding: severity, number, rule, what happened."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"lines--cursor", "lines--focus", "marks--error", "marks--warning", "marks--note"}
    BORDER_TITLE = "Findings"
    BINDINGS: ClassVar[list[BindingType]] = [*QUIET, Binding("enter", "choose", "go there", key_display="Enter", id="choose")]

    def __init__(self, words: Words, *, id: str) -> None:
        super().__init__(id=id)
        self._words = words
        self._findings: list[Finding] = []

    def set_findings(self, findings: list[Finding], done: bool) -> None:
        """`findings` is the app's list; it grows while the scan runs."""
        self._findings = findings
        self.set_count(len(findings))
        self.border_title = f"Findings ({len(findings)})" if findings else ("No findings" if done else "Findings: scanning")

    def line(self, index: int, width: int, base: Style, current: bool) -> list[Segment]:
        finding = self._findings[index]
        severity = rules.finding_severity(finding)
        style = base + self.part(f"marks--{severity}")
        rule = rules.rule_id(finding.rule)
        return [
            Segment("▶" if current else " ", base),
            Segment(f"{GLYPHS[severity]} {index + 1} {rule} ", style),
            Segment(self._words.finding_brief(finding) if width < BRIEF_WIDTH else self._words.finding_line(finding), base),
        ]
