"""All that is said of a finding, with the bytes of the frame, as a block of text for a mail."""

from __future__ import annotations

from tracedbg import rules
from tracedbg.describe.chain import ChainWords
from tracedbg.describe.names import UNKNOWN
from tracedbg.describe.overwrite import OVERWRITES
from tracedbg.describe.values import BytesRow
from tracedbg.state import Cause, Evidence, Finding, Rule
from tracedbg.text import WIDTH, wrap

EVIDENCE_WORDS = {
    Evidence.RECORDED: "recorded",
    Evidence.COMPUTED: "computed",
    Evidence.INFERRED: "inferred",
    Evidence.UNKNOWN: "unknown",
}


TABLE_WIDTH = 74  # the widest line of the table of bytes


class ParagraphWords(ChainWords):
    """Says all about a finding."""

    def evidence_text(self, finding: Finding, at: int | None = None) -> str:
        """How it is known, in words."""
        evidence = rules.finding_evidence(finding, at)
        rule = rules.finding_rule(finding, at)
        word = EVIDENCE_WORDS[evidence]
        if rule in (Rule.FRAME_CONSUMED_CORRUPT, Rule.RESUME_LOOP):
            return f"{word}: the trace has the {self.return_name(finding.consumer)} and the words that it popped"
        if rule is Rule.FRAME_CLOBBERED or (rule is Rule.FRAME_SAME_BYTES):
            if evidence is Evidence.INFERRED:
                return f"{word}: the trace has no returns, and nothing else shows whether the frame was still in use"
            if evidence is Evidence.COMPUTED:
                fred = finding.writer is not None and finding.writer.fred
                by = "FRED's stack levels" if fred else "the gate, the TSS"
                return f"{word}: by {by} and the interrupted RSPs the frame was still to be resumed"
        if rule is Rule.FRAME_RELOCATED:
            if evidence is Evidence.INFERRED:
                return f"{word}: the interrupted code was seen running again; the copy itself was not"
            return f"{word}: the trace has the copy or the return"
        reason = self._evidence_reason(finding, rule, evidence)
        return f"{word}: {reason}" if reason else word

    def _evidence_reason(self, finding: Finding, rule: Rule, evidence: Evidence) -> str:
        """What a finding that overwrites no frame of its own stack rests on."""
        recorded, computed = evidence is Evidence.RECORDED, evidence is Evidence.COMPUTED
        match rule:
            case Rule.USER_STACK if finding.cause in (Cause.RING_GAP, Cause.MOV_SS):
                return "RSP is the one that user mode had; nothing in the trace loaded another"
            case Rule.USER_STACK if computed:
                return "the frame lies in memory that the layout calls user memory"
            case Rule.USER_STACK:
                return "RSP was close to the one last seen at CPL 3; a `user` range in the layout would settle it"
            case Rule.NEIGHBOUR_OVERWRITE | Rule.STACK_OVERFLOW:
                if recorded:
                    return "the trace has the push, the layout the bounds of the stack"
                return "by RSP and the bounds of the stack in the layout" if computed else "RSP at this store is not recorded"
            case Rule.ERROR_CODE_MISMATCH:
                return "the trace has the return" if recorded else "what the handler does with the missing word is not recorded"
            case Rule.TOKEN_BUSY:
                return "the trace has the token" if recorded else "the token was busy; why the delivery failed is not recorded"
            case Rule.REENTRY_WINDOW:
                return "by the gate, the TSS and what masks events here, whether one came or not"
            case Rule.NMI_STUCK:
                if recorded:
                    return "the trace has the return and the SS word that it popped"
                return "the trace has every return, and none of them unblocked NMIs"
            case Rule.NMI_LOST:
                return "the trace has the requests"
            case Rule.HELD_VECTOR:
                return "the trace has the request and the task priority"
            case Rule.UNMATCHED_RETURN:
                return "the trace has every return, and who wrote the words that this one popped"
            case _:
                return ""

    def finding_text(self, finding: Finding, at: int | None = None, *, fixes: bool = True, width: int = WIDTH) -> list[str]:
        """A paragraph block for a mail."""
        rule = rules.finding_rule(finding, at)
        level = rules.finding_severity(finding, at)
        head = f"{level}: {rules.rule_id(rule)}, {self.finding_place(finding)}"
        why = self.cause(finding)
        said = _capital(f"{self.statement(finding, at)}{': ' + why if why else ''}.")
        outcome = self.outcome(finding, at)
        lines = [head, *wrap(f"{said} {outcome}" if outcome else said, "  ", width)]
        rows = self.bytes_rows(finding)
        if rows and finding.slots and rule in OVERWRITES:
            lines += self._bytes_lines(finding, rows, width)
        chain = self.finding_chain(finding, at)
        if len(chain) > 1:
            lines.append("")
            for number, step in enumerate(chain, 1):
                lines += wrap(f"{self.event_name(step.event)}: {step.text}", f"  {number}. ", width)
        lines.append("")
        lines += wrap(self.evidence_text(finding, at), "  evidence: ", width)
        refs = rules.finding_refs(finding, at)
        if refs:
            lines += wrap("; ".join(refs), "  manual:   ", width)
        if fixes and rules.BY_RULE[rule].fixes:
            lines.append("  known ways out:")
            for fix in rules.BY_RULE[rule].fixes:
                lines += wrap(fix, "  - ", width)
        return lines

    def _bytes_lines(self, finding: Finding, rows: tuple[BytesRow, ...], width: int) -> list[str]:
        if width < TABLE_WIDTH:
            return self._bytes_narrow(rows)
        by = f"now, by event {finding.writer.entry if finding.writer is not None else finding.event}"
        own = f"event {finding.victim.entry}'s own" if finding.victim is not None else "own"
        lines = ["", f"    {'address':<16}  {'slot':<10}  {own:<18}  {by}"]
        for row in rows:
            now = "not overwritten" if not row.overwritten else _number(row.now)
            mark = "  *" if row.differs else ""
            lines.append(f"    {row.addr:016x}  {row.slot:<10}  {_number(row.own):<18}  {now:<16}{mark}".rstrip())
            names = (self.symbol(row.own), self.symbol(row.now)) if row.slot == "rip" else (None, None)
            if len(names[0] or "") > 18:
                pairs = zip(("own", "now"), names, strict=True)
                lines += [f"    {'':<16}  {'':<10}  {when}: {name}" for when, name in pairs if name]
            elif any(names):
                lines.append(f"    {'':<16}  {'':<10}  {names[0] or '':<18}  {names[1] or '':<16}".rstrip())
        return lines

    def _bytes_narrow(self, rows: tuple[BytesRow, ...]) -> list[str]:
        """The table for a narrow pane: the end of the address, the slot, the two values; names below."""
        lines = ["", f"  {'address':<9} {'slot':<10} {'own':<16} now"]
        for row in rows:
            now = "not overwritten" if not row.overwritten else _number(row.now)
            mark = " *" if row.differs else ""
            lines.append(f"  …{row.addr & 0xFFFFFFFF:08x} {row.slot:<10} {_number(row.own):<16} {now:<16}{mark}".rstrip())
            if row.slot == "rip":
                pairs = (("own", self.symbol(row.own)), ("now", self.symbol(row.now)))
                lines += [f"  {'':<9} {'':<10} {when}: {name}" for when, name in pairs if name]
        return lines


def _number(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value:x}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:] if text.startswith(("the ", "a ", "an ")) else text
