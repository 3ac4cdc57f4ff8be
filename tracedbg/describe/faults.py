"""What findings about stacks and failed deliveries state: where a frame had no business to be, and what went wrong there."""

from __future__ import annotations

from tracedbg import x86
from tracedbg.describe.events import shutdown_words
from tracedbg.describe.masking import MaskingWords, times
from tracedbg.describe.names import hex_address
from tracedbg.state import Cause, Event, EventFlag, Evidence, Finding, Kind, Known


class FaultWords(MaskingWords):
    """Says what findings about user stacks, overflows, error codes, tokens and faults state."""

    def _user_stack(self, finding: Finding) -> str:
        frame = finding.writer or finding.victim
        what = self.frame_kind(frame) if frame is not None else "an event"
        place = f"at {self.address(frame.saved.rip)} " if frame is not None and frame.saved.rip is not None else ""
        where = f"[{hex_address(finding.lo)}, {hex_address(finding.hi)})"
        if finding.cause in (Cause.RING_GAP, Cause.MOV_SS):
            return f"{what} {place}was pushed at CPL 0 onto the stack that user mode left in RSP, {where}"
        why = self._no_switch(finding)
        if finding.evidence < Evidence.COMPUTED:
            near = "RSP was close to the one last seen at CPL 3"
            return f"{what} {place}was pushed at CPL 0 onto what may be memory of user mode, {where}: {why}, and {near}"
        return f"{what} {place}was pushed at CPL 0 onto memory of user mode, {where}: {why}, and RSP was still user mode's"

    def _overflow(self, finding: Finding) -> str:
        stack = self.stack_ending_at(finding.hi)
        bottom = f"below the bottom of {stack}" + (f" at {hex_address(finding.hi)}" if stack != "its stack" else "")
        writer = finding.writer
        size = finding.hi - finding.lo
        if writer is not None:
            rsp = f" (rsp {hex_address(writer.saved.rsp)})" if writer.saved.rsp is not None else ""
            whole = writer.hi - writer.lo
            part = f"{min(size, whole)} of the {whole} bytes of its frame"
            return f"{self.frame_kind(writer)} did not fit{rsp}: {part} lie {bottom}{times(finding.count)}"
        event = self.event(finding.event)
        by = f" at {self.address(event.rip)}" if event is not None and event.known & Known.RIP else ""
        where = f"[{hex_address(finding.lo)}, {hex_address(finding.hi)})"
        return f"{size} bytes of a push{by}, {where}, lie {bottom}{times(finding.count)}"

    def _error_code(self, finding: Finding) -> str:
        victim, event = finding.victim, self.event(finding.event)
        if victim is None or finding.evidence < Evidence.COMPUTED:
            frame = finding.writer
            what = self.frame_kind(frame) if frame is not None else self.delivery_name(event) if event is not None else "an event"
            vector = frame.vector if frame is not None else event.arg if event is not None else finding.detail
            name = x86.VECTOR_NAMES.get(vector, f"vector {vector:#04x}")
            return (
                f"{what} stored no error code, and its vector is that of {name}, which has one{times(finding.count)}: the "
                "handler may take the saved RIP for it, and every word above for the one below"
            )
        faulted = event is not None and event.flags & EventFlag.FAULTED
        whose = f"the frame of the {self.frame_name(victim)}"
        popped = finding.popped
        taken = "its error code" if victim.has_code else "its CS"
        if popped is not None and popped.rip is not None:
            taken += f", {popped.rip:#x},"
        if victim.has_code:
            why = "one word too low, at the error code that had not been dropped"
        else:
            why = "one word too high, as if it had an error code to drop"
        end = f"{taken} was taken for RIP{', and the IRET faulted' if faulted else ''}"
        return f"IRET popped {whose} {why}, so {end}{times(finding.count)}"

    def _busy(self, finding: Finding) -> str:
        victim, event = finding.victim, self.event(finding.event)
        stack = f"IST{finding.detail}" if finding.detail else "its stack"
        token = f"the shadow-stack token of {stack}"
        open_there = f", where the frame of the {self.frame_name(victim)} is still open" if victim is not None else ""
        if event is not None and event.kind is Kind.DELIVER:
            return f"the delivery of {self.delivery_name(event)} failed while {token} was busy{open_there}"
        return f"{token} was to be taken and was busy{open_there}"

    def _busy_outcome(self, finding: Finding) -> str:
        event = self.event(finding.event)
        if event is None or event.kind is not Kind.DELIVER:
            return ""
        if event.known & Known.ADDR:
            return f"By then it had {_stored(event.addr)}."
        return "Whether it had stored its frame by then is not recorded."

    def _unmatched(self, finding: Finding) -> str:
        writer, popped = finding.writer, finding.popped
        at = finding.event if finding.consumer is None else finding.consumer
        whose = f"the {self.frame_name(writer)}" if writer is not None else "a delivery"
        to = ""
        if popped is not None and popped.rip is not None:
            to = f", and went to {self.address(popped.rip)}"
            to += f" with rsp {hex_address(popped.rsp)}" if popped.rsp is not None else ""
        return (
            f"{self.return_name(at)} popped the RIP that {whose} had stored{to}{times(finding.count)}: that frame had been "
            "returned from before, and no open frame is there"
        )

    def _failed_names(self, finding: Finding) -> list[str]:
        """The failed deliveries behind a double or triple fault, in order."""
        names = []
        for index in sorted(i for i in (finding.cause_event, finding.cause_frame) if i is not None):
            event = self.event(index)
            if event is not None and event.kind is Kind.DELIVER:
                names.append(f"the {self.delivery_name(event)} at {self.event_name(index)}")
        return names

    def _double_fault(self, finding: Finding) -> str:
        names = self._failed_names(finding)
        event = self.event(finding.event)
        at = f" at {self.address(event.rip)}" if event is not None and event.known & Known.RIP else ""
        rsp = f" with rsp {hex_address(event.rsp)}" if event is not None and event.known & Known.RSP else ""
        if len(names) == 2:
            return f"#DF{at}{rsp}: {names[0]} could not be delivered, nor {names[1]} that this raised"
        if names:
            return f"#DF{at}{rsp}: {names[0]} could not be delivered"
        return f"#DF{at}{rsp}; what could not be delivered is not recorded"

    def _triple_fault(self, finding: Finding) -> str:
        names = self._failed_names(finding)
        last = None if finding.cause_event is None else self.event(finding.cause_event)
        shut = "the CPU shut down (triple fault)"
        if len(names) == 2 and _is_double(last):
            return f"{shut}: {names[0]} could not be delivered, nor {names[1]}"
        if names and _is_double(last):
            return f"{shut}: {names[-1]} could not be delivered"
        if names:
            return f"{shut}; the last delivery before that failed is {names[-1]}"
        return f"{shut}; what could not be delivered is not recorded"

    def _shut(self, finding: Finding) -> str:
        return f"the CPU shut down: {shutdown_words(finding.detail)}"


def _is_double(event: Event | None) -> bool:
    return event is not None and event.kind is Kind.DELIVER and event.arg == x86.DOUBLE_FAULT


def _stored(count: int) -> str:
    return f"stored {count:,} word{'' if count == 1 else 's'} of its frame" if count else "stored nothing of its frame"
