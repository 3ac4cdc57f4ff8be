"""What a finding states: what happened, why it could, what came of it."""

from __future__ import annotations

from tracedbg import rules, x86
from tracedbg.describe.events import shutdown_words
from tracedbg.describe.names import Names, hex_address, slots_text
from tracedbg.state import Cause, Context, Evidence, Finding, Frame, Kind, Known, Mismatch, Rule, Settle, Source

OVERWRITES = frozenset(
    {Rule.FRAME_CLOBBERED, Rule.FRAME_CONSUMED_CORRUPT, Rule.RESUME_LOOP, Rule.FRAME_RELOCATED, Rule.FRAME_SAME_BYTES}
)

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
}

_MISMATCH_WORDS = {
    Mismatch.ENTER_RSP: "the handler was entered with another RSP than the TSS gives",
    Mismatch.ENTER_RIP: "the handler was entered at another address than the gate gives",
    Mismatch.ENTER_CS: "the handler was entered with another CS than the gate gives",
    Mismatch.NMI_BLOCKED: "an NMI was delivered while NMIs were blocked",
    Mismatch.IF_CLEAR: "a maskable interrupt was delivered with IF = 0",
}


class FindingWords(Names):
    """Says what a finding states."""

    def finding_line(self, finding: Finding, at: int | None = None) -> str:
        """One line: who did what to whom, why that was possible, what came of it."""
        return f"cpu {finding.cpu}, {self.event_name(finding.event)}: {self.finding_message(finding, at)}"

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

    def _overwrite(self, finding: Finding, rule: Rule) -> str:
        victim, writer = finding.victim, finding.writer
        whose = f"the frame of the {self.frame_name(victim)}" if victim is not None else "a frame"
        stack = self._place(finding)
        size = self._size(finding)
        if writer is None:
            return f"{whose} on {stack} was overwritten ({size})"
        if finding.raised_rule is Rule.FRAME_CONSUMED_CORRUPT:
            # No overwrite of an open frame was seen: foreign words came into it by software, or after it counted as left.
            return f"an IRET popped {whose} with words that the {self.frame_name(writer)} had stored ({size})"
        text = f"{self.frame_kind(writer)} overwrote {whose} on {stack} ({size})"
        return text + (" with the values that it already held" if rule is Rule.FRAME_SAME_BYTES else "")

    def _loop(self, finding: Finding) -> str:
        """A loop that was raised at its return, beside the finding of the overwrite."""
        victim, writer, popped = finding.victim, finding.writer, finding.popped
        whose = f"the frame of the {self.frame_name(victim)}" if victim is not None else "its frame"
        words = f"the words that the {self.frame_name(writer)} stored" if writer is not None else "words of another delivery"
        name = self.event_name(finding.event if finding.consumer is None else finding.consumer)
        place = f" to {self.address(popped.rip)}" if popped is not None and popped.rip is not None else ""
        if popped is not None and popped.rsp is not None:
            place += f", rsp {hex_address(popped.rsp)}"
        return f"{whose} holds {words}, so the IRET at {name} went{place}, back into its own handler"

    def _place(self, finding: Finding) -> str:
        """The stack of an overwrite: that of the writer, since only a stack switch overwrites."""
        frame = finding.writer or finding.victim
        return self.frame_stack(frame) if frame is not None else "its stack"

    def _size(self, finding: Finding) -> str:
        victim = finding.victim
        count = finding.hi - finding.lo
        whole = victim is not None and count < victim.hi - victim.lo
        size = f"{count} of {victim.hi - victim.lo} bytes" if victim is not None and whole else f"{count} bytes"
        return f"{size}, {slots_text(finding.slots)}" if finding.slots else size

    def cause(self, finding: Finding) -> str:
        """Why it could happen, as a clause; empty if the finding has no cause."""
        victim, writer = finding.victim, finding.writer
        match finding.cause:
            case Cause.NMI_UNBLOCKED:
                return self._unblocked(finding)
            case Cause.NMI_NEVER_BLOCKED:
                fake = victim is not None and victim.vector == x86.NMI
                return "a fake NMI does not block NMIs" if fake else "NMIs were not blocked, as only an NMI blocks them"
            case Cause.NMI_UNKNOWN:
                return "NMIs were blocked as far as the trace tells; what unblocked them is not recorded"
            case Cause.MC_UNMASKED:
                if victim is not None and victim.source is Source.MC:
                    return "nothing but MCIP holds off a machine check, and the first handler had cleared it"
                if victim is not None and victim.vector == x86.MACHINE_CHECK:
                    return "a fake #MC does not set MCIP, and nothing else holds off a machine check"
                return "nothing but MCIP holds off a machine check"
            case Cause.MASKABLE:
                return "IF was 1 in that handler, so a maskable interrupt could come"
            case Cause.SOFTWARE:
                return "it was raised by what ran inside that handler"
            case Cause.OTHER_CPU:
                cpus = f"cpu {writer.cpu} and cpu {victim.cpu}" if writer is not None and victim is not None else "two CPUs"
                return f"the TSSes of {cpus} name the same stack"
            case Cause.NONE:
                return ""

    def _unblocked(self, finding: Finding) -> str:
        frame = None if finding.cause_frame is None else self.event(finding.cause_frame)
        event = None if finding.cause_event is None else self.event(finding.cause_event)
        if frame is not None and frame.kind is Kind.DELIVER and finding.cause_frame is not None:
            whose = f"the {self.delivery_name(frame)} at {self.event_name(finding.cause_frame)}"
            if event is not None and event.kind is Kind.RETURN:
                return f"the IRET of {whose} had unblocked NMIs"
            return f"{whose} had returned by then, and its IRET unblocks NMIs"
        if event is not None and event.kind is Kind.RETURN and finding.cause_event is not None:
            return f"the IRET at {self.event_name(finding.cause_event)} had unblocked NMIs"
        if finding.cause_event is not None:
            return f"NMIs had been unblocked by {self.event_name(finding.cause_event)}"
        return "NMIs had been unblocked"

    def outcome(self, finding: Finding, at: int | None = None) -> str:
        """What came of an overwritten frame, as sentences; empty for other findings."""
        rule = rules.finding_rule(finding, at)
        match rule:
            case Rule.FRAME_CLOBBERED:
                return self._open_outcome(finding, at)
            case Rule.FRAME_CONSUMED_CORRUPT:
                return self._consumed(finding) + "."
            case Rule.RESUME_LOOP:
                times = f"; the trace has this return {finding.count:,} times" if finding.count > 1 else ""
                if finding.raised_rule is Rule.RESUME_LOOP:
                    return f"Each resume leads to the next one{times}."
                return f"{self._consumed(finding)}, back into its own handler, again and again{times}."
            case Rule.FRAME_RELOCATED:
                return self._survived(finding)
            case _:
                return ""

    def _open_outcome(self, finding: Finding, at: int | None) -> str:
        victim, writer = finding.victim, finding.writer
        if at is None and finding.settled is not None and finding.settled_by is Settle.DROPPED:
            return f"What became of it is not known: records are missing from {self.event_name(finding.settled)} on."
        when = "Still live at the end of the trace" if at is None else "Still live here"
        if rules.finding_evidence(finding, at) < Evidence.COMPUTED:
            when = "Whether it was still needed is not recorded"
        if victim is None or writer is None or not finding.differ & 0b1001:
            return f"{when}."
        if victim.hi != writer.hi:  # another top: RIP and RSP are not simply the writer's
            return f"{when}: if it is resumed from these bytes, not all of them are its own."
        text = f"{when}: if it is resumed from these bytes, the IRET goes to {self._other_place(writer.saved, victim.saved)}"
        return text + (", back into its own handler, again and again." if _own_handler(victim, writer) else ".")

    def _other_place(self, new: Context, old: Context) -> str:
        """`do_nmi+2 instead of default_idle+0xc6`; where RIP is the same, the RSPs tell them apart."""
        text = self.address(new.rip)
        if old.rip is not None and old.rip != new.rip:
            return f"{text} instead of {self.address(old.rip)}"
        if new.rsp is not None and old.rsp != new.rsp:
            text += f" with rsp {hex_address(new.rsp)}"
            if old.rsp is not None:
                text += f" instead of {hex_address(old.rsp)}"
        return text

    def _consumed(self, finding: Finding) -> str:
        name = self.event_name(finding.consumer) if finding.consumer is not None else "an unknown event"
        frame = f"event {finding.victim.entry}" if finding.victim is not None else "the frame"
        new, old = finding.popped, finding.victim.saved if finding.victim is not None else None
        if new is None or new.rip is None:
            return f"The IRET at {name} resumed {frame} from these bytes"
        where = self.address(new.rip) if old is None else self._other_place(new, old)
        return f"The IRET at {name}, the resume of {frame}, went to {where}"

    def _survived(self, finding: Finding) -> str:
        if finding.settled is None:
            return "Software had moved the frame before, so nothing was lost."
        name = self.event_name(finding.settled)
        match finding.settled_by:
            case Settle.RETURN:
                return f"No harm: its own words were back when the IRET at {name} popped them."
            case Settle.COPY:
                return f"No harm: the IRET at {name} popped a copy of it."
            case Settle.CONTEXT:
                return f"It survived: its RIP and RSP were running again at {name}."
            case Settle.ABOVE:
                return f"It survived: at {name} the CPU ran on the interrupted stack again, above the saved RSP."
            case Settle.CPL3:
                return f"It survived: the CPU ran at CPL 3 at {name}."
            case _:
                return f"It survived: its context had been resumed by {name}."

    def _user_stack(self, finding: Finding) -> str:
        frame = finding.writer or finding.victim
        what = self.frame_kind(frame) if frame is not None else "an event"
        place = f"at {self.address(frame.saved.rip)} " if frame is not None and frame.saved.rip is not None else ""
        return (
            f"{what} {place}was pushed at CPL 0 onto memory of user mode, "
            f"[{hex_address(finding.lo)}, {hex_address(finding.hi)}): its gate has no IST stack, and RSP was still user mode's"
        )

    def _fake(self, finding: Finding) -> str:
        event = self.event(finding.event)
        what = self.delivery_name(event) if event is not None else "a fake"
        real, guard = ("NMI", "NMIs are not blocked") if finding.rule is Rule.FAKE_NMI else ("#MC", "MCIP is not set")
        times = f", {finding.count:,} times in all" if finding.count > 1 else ""
        return f"{what} ran the {real} handler, but to the CPU it is none: {guard} by it{times}"

    def _double_fault(self, finding: Finding) -> str:
        failed = sorted(i for i in (finding.cause_event, finding.cause_frame) if i is not None)
        names = []
        for index in failed:
            event = self.event(index)
            if event is not None and event.kind is Kind.DELIVER:
                names.append(f"the {self.delivery_name(event)} at {self.event_name(index)}")
        event = self.event(finding.event)
        at = f" at {self.address(event.rip)}" if event is not None and event.known & Known.RIP else ""
        rsp = f" with rsp {hex_address(event.rsp)}" if event is not None and event.known & Known.RSP else ""
        if len(names) == 2:
            return f"#DF{at}{rsp}: {names[0]} could not be delivered, nor {names[1]} that this raised"
        if names:
            return f"#DF{at}{rsp}: {names[0]} could not be delivered"
        return f"#DF{at}{rsp}; what could not be delivered is not recorded"

    def _shut(self, finding: Finding) -> str:
        return f"the CPU shut down: {shutdown_words(finding.detail)}"

    def _lost(self, finding: Finding) -> str:
        event = self.event(finding.event)
        count = f"{event.value:,}" if event is not None and event.known & Known.VALUE else "an unknown number of"
        where = "this CPU" if event is not None and event.known & Known.CPU else "all CPUs"
        times = f" ({finding.count:,} gaps)" if finding.count > 1 else ""
        return f"{count} records of {where} are missing{times}; what was open before is unknown after"

    def _mismatch(self, finding: Finding) -> str:
        said = [text for bit, text in _MISMATCH_WORDS.items() if finding.detail & bit]
        event = self.event(finding.event)
        what = ""
        if event is not None and event.kind is Kind.DELIVER:
            what = f"{self.delivery_name(event)}: "
        times = f" ({finding.count:,} times)" if finding.count > 1 else ""
        return what + ("; ".join(said) or "the source and the rules differ") + times


def _own_handler(victim: Frame, writer: Frame) -> bool:
    """Whether the context that the writer saved lies in the victim's own handler: on its stack, below its frame."""
    rsp = writer.saved.rsp
    return rsp is not None and victim.stack_lo < rsp <= victim.rip_addr


_STATEMENTS = {
    Rule.USER_STACK: FindingWords._user_stack,
    Rule.FAKE_NMI: FindingWords._fake,
    Rule.FAKE_MCE: FindingWords._fake,
    Rule.DOUBLE_FAULT: FindingWords._double_fault,
    Rule.SHUTDOWN: FindingWords._shut,
    Rule.TRACE_GAP: FindingWords._lost,
    Rule.MODEL_MISMATCH: FindingWords._mismatch,
}
