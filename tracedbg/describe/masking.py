"""What findings about masking state: what should not have come, what will not come, what could come."""

from __future__ import annotations

from tracedbg import x86
from tracedbg.describe.names import hex_address
from tracedbg.describe.overwrite import OverwriteWords
from tracedbg.state import Cause, Event, Evidence, Finding, Kind, Known, Mismatch, Rule, Source

_MISMATCH_WORDS = {
    Mismatch.ENTER_RSP: "the handler was entered with another RSP than the TSS gives",
    Mismatch.ENTER_RIP: "the handler was entered at another address than the gate gives",
    Mismatch.ENTER_CS: "the handler was entered with another CS than the gate gives",
    Mismatch.NMI_BLOCKED: "an NMI was delivered while NMIs were blocked",
    Mismatch.IF_CLEAR: "a maskable interrupt was delivered with IF = 0",
    Mismatch.GATE: "the gate or the stack pointer that it names cannot deliver it (not present, another type, DPL below CPL, "
    "or no canonical address)",
    Mismatch.MC_SHUTDOWN: "a machine check was delivered where it shuts the CPU down (MCIP was set or CR4.MCE clear)",
    Mismatch.TPR: "an interrupt was delivered that the task priority holds back",
    Mismatch.GIF: "it was delivered while GIF was 0",
    Mismatch.TOKEN: "it was delivered though the shadow-stack token of its IST stack was busy",
}


def times(count: int) -> str:
    """`, 3 times in all` of what is folded; empty for one."""
    return f", {count:,} times in all" if count > 1 else ""


class MaskingWords(OverwriteWords):
    """Says what findings about blocking, priorities and windows state."""

    def _window(self, finding: Finding) -> str:
        victim = finding.victim
        whose = f"the frame of the {self.frame_name(victim)} on {self.frame_stack(victim)}" if victim is not None else "a frame"
        windows = f"; the first of {finding.count:,} such windows" if finding.count > 1 else ""
        return f"{whose} is live, and {self.window_guest(finding)} would overwrite it ({self._size(finding)}{windows})"

    def window_guest(self, finding: Finding) -> str:
        """What could come in a window: `another NMI`."""
        victim = finding.victim
        match finding.cause:
            case Cause.NMI_UNBLOCKED | Cause.NMI_NEVER_BLOCKED:
                return "another NMI" if victim is not None and victim.source is Source.NMI else "an NMI"
            case Cause.MC_UNMASKED:
                return "another #MC" if victim is not None and victim.source is Source.MC else "a machine check"
            case Cause.MASKABLE:
                return "a maskable interrupt through a gate to this stack"
            case _:
                return "another event"

    def blocker(self, finding: Finding) -> str:
        """What blocked NMIs: `the NMI at event 0 (#569)`; empty if that is not known."""
        event = None if finding.cause_event is None else self.event(finding.cause_event)
        if event is None or finding.cause_event is None:
            return ""
        name = self.event_name(finding.cause_event)
        what = {Kind.DELIVER: "NMI", Kind.VMEXIT: "VM exit for an NMI", Kind.SMI: "SMI"}.get(event.kind)
        return f"the {what} at {name}" if what else name

    def _stuck(self, finding: Finding) -> str:
        event, victim = self.event(finding.event), finding.victim
        by = self.blocker(finding)
        since = f" since {by}" if by else ""
        if finding.evidence is Evidence.RECORDED:  # an ERETU or ERETS, by the SS word that it popped
            whose = f"the frame of the {self.frame_name(victim)}" if victim is not None else "the frame of the NMI"
            return f"{self.return_name(finding.event)} popped {whose} without its NMI bit: NMIs stay blocked"
        if event is not None and event.kind is Kind.SYSRET:
            return f"NMIs stay blocked{since}: SYSRET does not unblock them, and no other return did"
        if victim is not None:
            whose = "its frame" if by else f"the frame of the {self.frame_name(victim)}"
            return f"NMIs stay blocked{since}: {whose} has been left by now, and no return unblocked them"
        cpl = f"CPL {x86.cpl(event.cs)}" if event is not None and event.known & Known.CS and x86.cpl(event.cs) else "user mode"
        return f"NMIs stay blocked{since}: the CPU had gone to {cpl} by now, and no return unblocked them"

    def _nmi_lost(self, finding: Finding) -> str:
        by = self.blocker(finding)
        blocked = f"NMIs were blocked{f' since {by}' if by else ''} and one was pending already"
        return f"an NMI was requested while {blocked}{times(finding.count)}: only one is kept, so this one is lost"

    def _vector(self, finding: Finding) -> str:
        """The interrupt of a held or illegal vector."""
        event = self.event(finding.event)
        return self.delivery_name(event) if event is not None and _has_vector(event) else f"interrupt {finding.detail:#04x}"

    def _held(self, finding: Finding) -> str:
        event = self.event(finding.event)
        number = event.arg if event is not None and _has_vector(event) else finding.detail
        name = x86.VECTOR_NAMES.get(number)
        whose = f", the vector of {name}," if name and number != x86.MACHINE_CHECK else ""
        # Bits 7:4 of the vector are not above those of TPR.
        counted = f"{times(finding.count)}," if finding.count > 1 else ""
        until = f"TPR, which is {number & 0xF0:#04x} or higher, is lowered"
        return f"{self._vector(finding)}{whose} was requested{counted} and is held back until {until}"

    def _illegal(self, finding: Finding) -> str:
        event = self.event(finding.event)
        if event is not None and event.kind is Kind.RAISE:
            return (
                f"{self._vector(finding)} was requested of the local APIC, which does not accept vectors 0 to 15: it is not "
                f"delivered{times(finding.count)}"
            )
        return (
            f"{self._vector(finding)} was delivered and is recorded as one of the local APIC, which does not accept vectors 0 "
            f"to 15{times(finding.count)}"
        )

    def _fake(self, finding: Finding) -> str:
        event = self.event(finding.event)
        what = self.delivery_name(event) if event is not None else "a fake"
        real, guard = ("NMI", "NMIs are not blocked") if finding.rule is Rule.FAKE_NMI else ("#MC", "MCIP is not set")
        return f"{what} ran the {real} handler, but to the CPU it is none: {guard} by it{times(finding.count)}"

    def _mismatch(self, finding: Finding) -> str:
        event = self.event(finding.event)
        said = [text for bit, text in _MISMATCH_WORDS.items() if finding.detail & bit]
        if finding.detail & Mismatch.DOUBLE_FAULT:
            said.append(_double(event))
        what = ""
        if event is not None and event.kind is Kind.DELIVER:
            what = f"{self.delivery_name(event)}: "
            if finding.detail & Mismatch.GATE and event.known & Known.RIP:
                what = f"{self.delivery_name(event)} at {self.address(event.rip)}: "
        counted = f" ({finding.count:,} times)" if finding.count > 1 else ""
        return what + ("; ".join(said) or "the source and the rules differ") + counted

    def _lost(self, finding: Finding) -> str:
        event = self.event(finding.event)
        count = f"{event.value:,}" if event is not None and event.known & Known.VALUE else "an unknown number of"
        where = "this CPU" if event is not None and event.known & Known.CPU else "all CPUs"
        gaps = f" ({finding.count:,} gaps)" if finding.count > 1 else ""
        return f"{count} records of {where} are missing{gaps}; what was open before is unknown after"

    def window_step(self, finding: Finding) -> str:
        """The last step of a window's chain."""
        where = f"[{hex_address(finding.lo)}, {hex_address(finding.hi)})"
        return f"from here on {self.window_guest(finding)} would be stored over {where}"


def _has_vector(event: Event) -> bool:
    return event.kind in (Kind.DELIVER, Kind.RAISE) and bool(event.known & Known.ARG)


def _double(event: Event | None) -> str:
    if event is not None and event.known & Known.ARG and event.arg == x86.DOUBLE_FAULT:
        return "a double fault was delivered, but the two failed deliveries before it do not make one"
    return "it came while another exception could not be delivered, and the two make a double fault"
