"""What would have prevented a finding: the rule of the architecture that was missing, with the events of the trace in it."""

from __future__ import annotations

from tracedbg import rules, x86
from tracedbg.describe.overwrite import return_of
from tracedbg.describe.parts import PartWords
from tracedbg.state import Cause, Event, Finding, Frame, Kind, Rule, Source

_BY_CAUSE = frozenset({Rule.FRAME_CLOBBERED, Rule.FRAME_CONSUMED_CORRUPT, Rule.RESUME_LOOP, Rule.FRAME_SAME_BYTES})


class PreventWords(PartWords):
    """Says what would have made a finding impossible, each on its own. Fixes of real systems are in the catalogue."""

    def prevention(self, finding: Finding, at: int | None = None) -> tuple[str, ...]:
        """One line for each way; empty where the trace shows none, or nothing was lost."""
        victim, writer = finding.victim, finding.writer
        rule = rules.finding_rule(finding, at)
        if finding.raised_rule is Rule.NEIGHBOUR_OVERWRITE:
            return () if rule is Rule.FRAME_RELOCATED else (self._guard(victim),)
        if rule is Rule.USER_STACK and writer is not None:
            return (self._own_stack(writer),)
        if victim is None or rule not in (*_BY_CAUSE, Rule.REENTRY_WINDOW):
            return ()
        ways = [self._held_off(finding, victim), self._other_stack(victim, writer), self._copied(finding, victim)]
        return tuple(way for way in ways if way)

    def _held_off(self, finding: Finding, victim: Frame) -> str:
        """What would have kept the writer away while the frame was open; empty where nothing could."""
        guest, until = self._guest(finding), f"until the {return_of(victim)} of {self.event_name(victim.entry)}"
        match finding.cause:
            case Cause.NMI_UNBLOCKED:
                by = None if finding.cause_event is None else self.event(finding.cause_event)
                text = f"NMIs blocked {until}: "
                if by is not None and finding.cause_event is not None and by.kind is Kind.RETURN:
                    text += f"without the {self.return_name(finding.cause_event)} at {self.event_name(finding.cause_event)} "
                return f"{text}{guest} would have been kept pending"
            case Cause.NMI_NEVER_BLOCKED if victim.vector == x86.NMI and victim.source is not Source.NMI:
                return f"no {self.frame_kind(victim)}: a genuine NMI in its place blocks NMIs {until}"
            case Cause.MC_UNMASKED if victim.vector == x86.MACHINE_CHECK and victim.source is not Source.MC:
                return f"no {self.frame_kind(victim)}: a genuine #MC in its place sets MCIP, and a second one shuts the CPU down"
            case Cause.MC_UNMASKED if victim.source is Source.MC:
                return f"MCIP set {until}: {guest} would have shut the CPU down instead, as nothing holds it off"
            case Cause.MASKABLE:
                return f"IF = 0 {until}: {guest} would have waited"
            case Cause.SOFTWARE if finding.writer is not None:
                where = f" (here at {self.address(finding.writer.saved.rip)})" if finding.writer.saved.rip is not None else ""
                return f"nothing in the handler of {self.event_name(victim.entry)} that raises {guest}{where}"
            case Cause.OTHER_CPU:
                return "a stack of its own in the TSS of each CPU"
            case _:
                return ""

    def _guest(self, finding: Finding) -> str:
        return f"the {self.frame_name(finding.writer)}" if finding.writer is not None else self.window_guest(finding)

    def _other_stack(self, victim: Frame, writer: Frame | None) -> str:
        """Two vectors that share a stack could have one each."""
        if writer is None or writer.vector == victim.vector or writer.cpu != victim.cpu:
            return ""
        if victim.fred or not victim.ist or writer.ist != victim.ist:
            return ""
        return f"IST numbers of their own for vectors {victim.vector:#04x} and {writer.vector:#04x}, which share IST{victim.ist}"

    def _copied(self, finding: Finding, victim: Frame) -> str:
        """By when the frame had to be gone from where the next one lands."""
        writer = finding.writer
        if not victim.dedicated or (writer is not None and not (writer.lo < victim.hi and victim.lo < writer.hi)):
            return ""  # where the writer's frame lay elsewhere, software brought its words here
        by = finding.event if writer is None else min(finding.event, writer.entry)
        cause = None if finding.cause_event is None else self.event(finding.cause_event)
        if finding.cause_event is not None and _opens(cause) and victim.entry < finding.cause_event < by:
            by = finding.cause_event  # from here on it was luck
        stack = self.frame_stack(victim)
        return f"the frame of {self.event_name(victim.entry)} copied off {stack}, or {stack} left, before {self.event_name(by)}"

    def _guard(self, victim: Frame | None) -> str:
        above = self.stack_ending_at(victim.stack_hi) if victim is not None else "its stack"
        above = "the stack above" if above in ("its stack", "the stack") else above
        return f"an unmapped page below {above}: the store would have faulted instead of landing in this frame"

    def _own_stack(self, frame: Frame) -> str:
        if frame.fred:
            return f"a stack level of its own for the {self.frame_kind(frame)}, above the current one"
        return f"an IST number in the gate of vector {frame.vector:#04x}: its frame goes to that stack wherever RSP points"


def _opens(event: Event | None) -> bool:
    """Whether an event is what let the next one in, and not one that failed to hold it off."""
    return event is not None and event.kind is not Kind.DELIVER
