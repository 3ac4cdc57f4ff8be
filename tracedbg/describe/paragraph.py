"""All that is said of a finding, with the bytes of the frame, as a block of text for a mail."""

from __future__ import annotations

from tracedbg import rules
from tracedbg.describe.headings import DIFFERS, EVIDENCE, FIXES, MANUAL, NOT_OVERWRITTEN, PREVENTED, SAME
from tracedbg.describe.names import UNKNOWN
from tracedbg.describe.overwrite import OVERWRITES
from tracedbg.describe.prevent import PreventWords
from tracedbg.describe.values import BytesRow
from tracedbg.layout import Fidelity
from tracedbg.state import Cause, Evidence, Finding, Rule
from tracedbg.text import WIDTH, wrap

EVIDENCE_WORDS = {
    Evidence.RECORDED: "recorded",
    Evidence.COMPUTED: "computed",
    Evidence.INFERRED: "inferred",
    Evidence.UNKNOWN: "unknown",
}

# Why the events of a dump must have been.
_DUMPED = {
    Rule.FRAME_CLOBBERED: "the dump shows that the newer frame interrupted a handler whose own frame stood at the same place",
    Rule.FRAME_RELOCATED: "the dump has the newer frame, and a copy of the one that stood there before",
}

TABLE_WIDTH = 74  # the widest line of the table of bytes


class ParagraphWords(PreventWords):
    """Says all about a finding."""

    def evidence_text(self, finding: Finding, at: int | None = None) -> str:
        """How it is known, in words."""
        evidence = rules.finding_evidence(finding, at)
        rule = rules.finding_rule(finding, at)
        word = EVIDENCE_WORDS[evidence]
        if evidence is Evidence.INFERRED and self.trace.layout.fidelity & Fidelity.INFERRED:
            return f"{word}: {_DUMPED.get(rule, 'from one instant, a dump')}"
        if rule in (Rule.FRAME_CONSUMED_CORRUPT, Rule.RESUME_LOOP):
            return f"{word}: the trace has the {self.return_name(finding.consumer)} and the words that it popped"
        if rule is Rule.FRAME_CLOBBERED or (rule is Rule.FRAME_SAME_BYTES):
            if evidence is Evidence.INFERRED:
                if self.trace.meta.get("returns") == "unplaced":
                    return f"{word}: the trace does not say which frame a return popped, nor whether this one was still in use"
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

    def finding_prose(self, finding: Finding, at: int | None = None) -> str:
        """The message as sentences of their own: what happened, why it could, what came of it."""
        why = self.cause(finding)
        said = _capital(f"{self.statement(finding, at)}{': ' + why if why else ''}.")
        outcome = self.outcome(finding, at)
        return f"{said} {outcome}" if outcome else said

    def table_rows(self, finding: Finding, at: int | None = None) -> tuple[BytesRow, ...]:
        """The rows of the table of bytes; none where the finding overwrites nothing."""
        return self.bytes_rows(finding) if finding.slots and rules.finding_rule(finding, at) in OVERWRITES else ()

    def table_heads(self, finding: Finding) -> tuple[str, str]:
        """What stands above the two columns of values: `event 2's own`, `now, by event 5`."""
        own = f"event {finding.victim.entry}'s own" if finding.victim is not None else "own"
        return own, f"now, by event {self.writing_event(finding)}"

    def writing_event(self, finding: Finding) -> int:
        """The event that overwrote the bytes of a finding."""
        return finding.writer.entry if finding.writer is not None else finding.event

    def now_text(self, row: BytesRow) -> str:
        """What a slot holds now, in hex."""
        return number_text(row.now) if row.overwritten else NOT_OVERWRITTEN

    def row_mark(self, row: BytesRow) -> str:
        """How the two values of a row compare; empty where one is not known."""
        if not row.overwritten:
            return NOT_OVERWRITTEN
        if row.differs:
            return DIFFERS
        return SAME if row.own is not None and row.now == row.own else ""

    def finding_text(self, finding: Finding, at: int | None = None, *, fixes: bool = True, width: int = WIDTH) -> list[str]:
        """A paragraph block for a mail."""
        rule = rules.finding_rule(finding, at)
        level = rules.finding_severity(finding, at)
        head = f"{level}: {rules.rule_id(rule)}, {self.finding_place(finding)}"
        lines = [head, *wrap(self.finding_prose(finding, at), "  ", width)]
        rows = self.table_rows(finding, at)
        if rows:
            lines += self._bytes_lines(finding, rows, width)
        chain = self.finding_chain(finding, at)
        if len(chain) > 1:
            lines.append("")
            for number, step in enumerate(chain, 1):
                lines += wrap(f"{self.event_name(step.event)}: {step.text}", f"  {number}. ", width)
        lines.append("")
        lines += wrap(self.evidence_text(finding, at), f"  {EVIDENCE}: ", width)
        refs = rules.finding_refs(finding, at)
        if refs:
            lines += wrap("; ".join(refs), f"  {MANUAL}:   ", width)
        prevention = self.prevention(finding, at) if fixes else ()
        if prevention:
            lines.append(f"  {PREVENTED}:")
            for way in prevention:
                lines += wrap(way, "  - ", width)
        if fixes and rules.BY_RULE[rule].fixes:
            lines.append(f"  {FIXES}:")
            for fix in rules.BY_RULE[rule].fixes:
                lines += wrap(fix, "  - ", width)
        return lines

    def _bytes_lines(self, finding: Finding, rows: tuple[BytesRow, ...], width: int) -> list[str]:
        if width < TABLE_WIDTH:
            return self._bytes_narrow(rows)
        own, by = self.table_heads(finding)
        lines = ["", f"    {'address':<16}  {'slot':<10}  {own:<18}  {by}"]
        for row in rows:
            now = self.now_text(row)
            mark = "  *" if row.differs else ""
            lines.append(f"    {row.addr:016x}  {row.slot:<10}  {number_text(row.own):<18}  {now:<16}{mark}".rstrip())
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
            now = self.now_text(row)
            mark = " *" if row.differs else ""
            lines.append(f"  …{row.addr & 0xFFFFFFFF:08x} {row.slot:<10} {number_text(row.own):<16} {now:<16}{mark}".rstrip())
            if row.slot == "rip":
                pairs = (("own", self.symbol(row.own)), ("now", self.symbol(row.now)))
                lines += [f"  {'':<9} {'':<10} {when}: {name}" for when, name in pairs if name]
        return lines


def number_text(value: int | None) -> str:
    """A value of the table, in hex."""
    return UNKNOWN if value is None else f"{value:x}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:] if text.startswith(("the ", "a ", "an ")) else text
