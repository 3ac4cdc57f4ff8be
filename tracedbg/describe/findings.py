"""What a finding states: what happened, why it could, what came of it."""

from __future__ import annotations

from collections.abc import Callable

from tracedbg import rules
from tracedbg.describe.faults import FaultWords
from tracedbg.describe.overwrite import OVERWRITES
from tracedbg.state import Finding, Rule, Settle

ALL_CPUS = 0xFFFF  # as the CPU of a finding

SETTLE_WORDS = {
    Settle.RETURN: "returned",
    Settle.COPY: "returned through a copy",
    Settle.CONTEXT: "context seen again",
    Settle.ABOVE: "RSP seen above the saved one",
    Settle.IF: "IF=1 code ran off its stack",
    Settle.CPL3: "CPU ran at CPL 3",
    Settle.POPPED: "popped",
    Settle.OVERWRITTEN: "overwritten while open",
    Settle.DROPPED: "forgotten (gap, reset or limit)",
    Settle.NMI: "a genuine NMI came",
    Settle.NESTING: "returned, if returns nest",
}


class FindingWords(FaultWords):
    """Says what a finding states."""

    def finding_line(self, finding: Finding, at: int | None = None) -> str:
        """One line: who did what to whom, why that was possible, what came of it."""
        return f"{self.finding_place(finding)}: {self.finding_message(finding, at)}"

    def finding_place(self, finding: Finding) -> str:
        """`cpu 0, event 3 (#571)`; a gap of which no CPU is known is one of all."""
        cpu = "all CPUs" if finding.cpu == ALL_CPUS else f"cpu {finding.cpu}"
        return f"{cpu}, {self.event_name(finding.event)}"

    def finding_message(self, finding: Finding, at: int | None = None) -> str:
        """The line without CPU and event."""
        text = self.statement(finding, at)
        why = self.cause(finding)
        text += f": {why}." if why else "."
        outcome = self.outcome(finding, at)
        return f"{text} {outcome}" if outcome else text

    def statement(self, finding: Finding, at: int | None = None) -> str:
        """What happened, as a clause without an end: `NMI overwrote the frame of the NMI at event 0 on IST2 (...)`."""
        rule = rules.finding_rule(finding, at)
        if finding.raised_rule is Rule.RESUME_LOOP:
            return self._loop(finding)
        if rule in OVERWRITES:
            return self._overwrite(finding, rule)
        return _STATEMENTS[rule](self, finding)

    def outcome(self, finding: Finding, at: int | None = None) -> str:
        """What came of it, as sentences; empty where the statement has said all."""
        rule = rules.finding_rule(finding, at)
        match rule:
            case Rule.FRAME_CLOBBERED | Rule.NEIGHBOUR_OVERWRITE:
                return self._open_outcome(finding, at)
            case Rule.FRAME_CONSUMED_CORRUPT:
                return self._consumed(finding) + "."
            case Rule.RESUME_LOOP:
                again = f"; the trace has this return {finding.count:,} times" if finding.count > 1 else ""
                if finding.raised_rule is Rule.RESUME_LOOP:
                    return f"Each resume leads to the next one{again}."
                return f"{self._consumed(finding)}, back into its own handler, again and again{again}."
            case Rule.FRAME_RELOCATED:
                return self._survived(finding)
            case Rule.TOKEN_BUSY:
                return self._busy_outcome(finding)
            case Rule.NMI_STUCK:
                return "Until a return unblocks them the CPU takes no NMI: one is kept pending, further ones are lost."
            case _:
                return ""


_STATEMENTS: dict[Rule, Callable[[FindingWords, Finding], str]] = {
    Rule.USER_STACK: FindingWords._user_stack,
    Rule.FAKE_NMI: FindingWords._fake,
    Rule.FAKE_MCE: FindingWords._fake,
    Rule.DOUBLE_FAULT: FindingWords._double_fault,
    Rule.SHUTDOWN: FindingWords._shut,
    Rule.TRACE_GAP: FindingWords._lost,
    Rule.MODEL_MISMATCH: FindingWords._mismatch,
    Rule.STACK_OVERFLOW: FindingWords._overflow,
    Rule.ERROR_CODE_MISMATCH: FindingWords._error_code,
    Rule.TRIPLE_FAULT: FindingWords._triple_fault,
    Rule.TOKEN_BUSY: FindingWords._busy,
    Rule.REENTRY_WINDOW: FindingWords._window,
    Rule.NMI_STUCK: FindingWords._stuck,
    Rule.NMI_LOST: FindingWords._nmi_lost,
    Rule.HELD_VECTOR: FindingWords._held,
    Rule.ILLEGAL_VECTOR: FindingWords._illegal,
    Rule.UNMATCHED_RETURN: FindingWords._unmatched,
}
