"""Why it could happen, as a clause."""

from __future__ import annotations

from tracedbg import x86
from tracedbg.describe.names import Names, return_kind
from tracedbg.state import Cause, EventFlag, Finding, Kind, Rule, Source


class CauseWords(Names):
    """Says why a finding could come about."""

    def cause(self, finding: Finding) -> str:
        """Why it could happen, as a clause; empty if the finding has no cause."""
        if finding.raised_rule is Rule.REENTRY_WINDOW:
            return self._open(finding)
        victim, writer = finding.victim, finding.writer
        match finding.cause:
            case Cause.NMI_UNBLOCKED:
                return self._unblocked(finding, "had", "had")
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
            case Cause.RING_GAP:
                return self._ring_gap(finding)
            case Cause.MOV_SS:
                return self._mov_ss(finding)
            case Cause.NONE:
                return ""

    def _unblocked(self, finding: Finding, has: str, have: str) -> str:
        """What ended the blocking of NMIs; `has`, `have`: had, where it is the past of what happened then."""
        frame = None if finding.cause_frame is None else self.event(finding.cause_frame)
        event = None if finding.cause_event is None else self.event(finding.cause_event)
        if frame is not None and frame.kind is Kind.DELIVER and finding.cause_frame is not None:
            whose = f"the {self.delivery_name(frame)} at {self.event_name(finding.cause_frame)}"
            if event is not None and event.kind is Kind.RETURN:
                return f"the {return_kind(event)} of {whose} {has} unblocked NMIs"
            return f"{whose} had returned by then, and its IRET unblocks NMIs"
        if event is not None and event.kind is Kind.RETURN and finding.cause_event is not None:
            how = " in SMM" if event.flags & EventFlag.SMM else ", which faulted," if event.flags & EventFlag.FAULTED else ""
            return f"the {return_kind(event)} at {self.event_name(finding.cause_event)}{how} {has} unblocked NMIs"
        if finding.cause_event is not None:
            return f"NMIs {have} been unblocked by {self.event_name(finding.cause_event)}"
        return f"NMIs {have} been unblocked"

    def _open(self, finding: Finding) -> str:
        """Why a window is open: in the present tense, as nothing came yet."""
        victim = finding.victim
        event = None if finding.cause_event is None else self.event(finding.cause_event)
        name = "an event" if finding.cause_event is None else self.event_name(finding.cause_event)
        match finding.cause:
            case Cause.NMI_UNBLOCKED:
                return self._unblocked(finding, "has", "have")
            case Cause.NMI_NEVER_BLOCKED:
                fake = victim is not None and victim.vector == x86.NMI
                return "a fake NMI does not block NMIs" if fake else "NMIs are not blocked, as only an NMI blocks them"
            case Cause.MC_UNMASKED:
                if event is not None and event.kind is Kind.MSR:
                    return f"{name} has cleared MCIP, and nothing else holds off a machine check"
                if victim is not None and victim.vector == x86.MACHINE_CHECK:
                    return "a fake #MC does not set MCIP, and nothing else holds off a machine check"
                return "MCIP is clear, and nothing else holds off a machine check"
            case Cause.MASKABLE:
                if event is not None and event.kind is Kind.DELIVER:
                    return "its gate leaves IF set"
                return f"{'STI at ' if event is not None and event.kind is Kind.SHADOW else ''}{name} has set IF"
            case _:
                return ""

    def _ring_gap(self, finding: Finding) -> str:
        event = None if finding.cause_event is None else self.event(finding.cause_event)
        if event is None or finding.cause_event is None:
            return f"{self._no_switch(finding)}, and RSP was still user mode's"
        name = f"the {event.kind.name} at {self.event_name(finding.cause_event)}"
        if event.kind is Kind.SYSRET:
            return f"{self._no_switch(finding)}, and {name} had faulted with RSP already user mode's"
        return f"{self._no_switch(finding)}, and {name} does not load RSP"

    def _mov_ss(self, finding: Finding) -> str:
        shadow = f" at {self.event_name(finding.cause_event)}" if finding.cause_event is not None else ""
        after = f" at {self.event_name(finding.cause_frame)}" if finding.cause_frame is not None else ""
        why = f"MOV SS{shadow} had held it back until after the SYSCALL{after}, which does not load RSP"
        return f"{why}, and {self._no_switch(finding)}"

    def _no_switch(self, finding: Finding) -> str:
        """Why the delivery of a user-stack did not switch stacks."""
        frame = finding.writer or finding.victim
        return "its stack level is not above the current one" if frame is not None and frame.fred else "its gate has no IST stack"
