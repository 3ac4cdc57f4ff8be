"""All that is said of a finding, with the bytes of the frame, as a block of text for a mail."""

from __future__ import annotations

from dataclasses import dataclass

from tracedbg import rules, x86
from tracedbg.describe.chain import ChainWords
from tracedbg.describe.names import UNKNOWN, slot_number
from tracedbg.state import Evidence, Finding, Rule
from tracedbg.text import WIDTH, wrap

EVIDENCE_WORDS = {
    Evidence.RECORDED: "recorded",
    Evidence.COMPUTED: "computed",
    Evidence.INFERRED: "inferred",
    Evidence.UNKNOWN: "unknown",
}


@dataclass(frozen=True, slots=True)
class BytesRow:
    """A slot of an overwritten frame: what its own delivery stored and what is there now. None: unknown."""

    addr: int
    slot: str
    own: int | None
    now: int | None
    overwritten: bool
    differs: bool


TABLE_WIDTH = 74  # the widest line of the table of bytes


class ParagraphWords(ChainWords):
    """Says all about a finding."""

    def bytes_rows(self, finding: Finding) -> tuple[BytesRow, ...]:
        """The slots of the victim by ascending address: what it stored, and what the writer left there."""
        victim, writer = finding.victim, finding.writer
        if victim is None:
            return ()
        own = victim.saved.slots()
        new = writer.saved.slots() if writer is not None else (None,) * 6
        rows = []
        for addr in range(victim.lo, victim.hi, 8):
            number = slot_number(victim, addr)
            if number is None:
                continue
            hit = bool(finding.slots >> number & 1)
            other = slot_number(writer, addr) if writer is not None and hit else None
            now = new[other] if other is not None else (None if hit else own[number])
            rows.append(BytesRow(addr, x86.SLOT_NAMES[number], own[number], now, hit, bool(finding.differ >> number & 1)))
        return tuple(rows)

    def evidence_text(self, finding: Finding, at: int | None = None) -> str:
        """How it is known, in words."""
        evidence = rules.finding_evidence(finding, at)
        rule = rules.finding_rule(finding, at)
        word = EVIDENCE_WORDS[evidence]
        if rule in (Rule.FRAME_CONSUMED_CORRUPT, Rule.RESUME_LOOP):
            return f"{word}: the trace has the IRET and the words that it popped"
        if rule is Rule.FRAME_CLOBBERED or (rule is Rule.FRAME_SAME_BYTES):
            if evidence is Evidence.INFERRED:
                return f"{word}: the trace has no returns, and nothing else shows whether the frame was still in use"
            if evidence is Evidence.COMPUTED:
                return f"{word}: by the gate, the TSS and the interrupted RSPs the frame was still to be resumed"
        if rule is Rule.FRAME_RELOCATED:
            if evidence is Evidence.INFERRED:
                return f"{word}: the interrupted code was seen running again; the copy itself was not"
            return f"{word}: the trace has the copy or the return"
        if rule is Rule.USER_STACK:
            if evidence is Evidence.COMPUTED:
                return f"{word}: the frame lies in memory that the layout calls user memory"
            return f"{word}: RSP was close to the one last seen at CPL 3; a `user` range in the layout would settle it"
        return word

    def finding_text(self, finding: Finding, at: int | None = None, *, fixes: bool = True, width: int = WIDTH) -> list[str]:
        """A paragraph block for a mail."""
        rule = rules.finding_rule(finding, at)
        level = rules.finding_severity(finding, at)
        head = f"{level}: {rules.rule_id(rule)}, cpu {finding.cpu}, {self.event_name(finding.event)}"
        why = self.cause(finding)
        said = _capital(f"{self.statement(finding, at)}{': ' + why if why else ''}.")
        outcome = self.outcome(finding, at)
        lines = [head, *wrap(f"{said} {outcome}" if outcome else said, "  ", width)]
        rows = self.bytes_rows(finding)
        if rows and finding.slots:
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
        by = f"now, by event {finding.writer.entry}" if finding.writer is not None else "now"
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
