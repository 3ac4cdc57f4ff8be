"""How a finding came about, step by step."""

from __future__ import annotations

from dataclasses import dataclass

from tracedbg.describe.events import EventWords
from tracedbg.describe.findings import OVERWRITES, FindingWords
from tracedbg.describe.names import hex_address, slots_text
from tracedbg.state import Cause, Finding, Frame, Kind, Known, Rule


@dataclass(frozen=True, slots=True)
class ChainStep:
    """One step of how it came about."""

    event: int
    text: str


class ChainWords(FindingWords, EventWords):
    """Says how a finding came about."""

    def finding_chain(self, finding: Finding, at: int | None = None) -> tuple[ChainStep, ...]:
        """How it came about, in the order of events; with `at` no further than that position."""
        steps: list[ChainStep] = []
        if finding.rule in OVERWRITES:
            self._overwrite_chain(finding, steps)
        elif finding.rule is Rule.DOUBLE_FAULT:
            for index in sorted(i for i in (finding.cause_event, finding.cause_frame) if i is not None):
                event = self.event(index)
                if event is not None:
                    steps.append(ChainStep(index, self.event_line(event)))
            self._own_step(finding, steps)
        else:
            self._own_step(finding, steps)
        return tuple(step for step in steps if at is None or step.event < at)

    def _own_step(self, finding: Finding, steps: list[ChainStep]) -> None:
        event = self.event(finding.event)
        if event is not None:
            steps.append(ChainStep(finding.event, self.event_line(event)))

    def _overwrite_chain(self, finding: Finding, steps: list[ChainStep]) -> None:
        victim, writer = finding.victim, finding.writer
        if victim is not None:
            steps.append(ChainStep(victim.entry, self._entry_step(victim)))
        if finding.cause is Cause.NMI_UNBLOCKED:
            self._unblock_steps(finding, steps)
        if writer is not None:
            text = self._entry_step(writer)
            if victim is not None and finding.event == writer.entry:
                text += f", over {slots_text(finding.slots)} of the frame of event {victim.entry}"
            steps.append(ChainStep(writer.entry, text))
        if finding.rule is Rule.FRAME_RELOCATED and finding.settled is not None:
            steps.append(ChainStep(finding.settled, self._survived(finding).rstrip(".")))
        elif finding.consumer is not None:
            steps.append(ChainStep(finding.consumer, self._pop_step(finding)))

    def _entry_step(self, frame: Frame) -> str:
        where = self.address(frame.saved.rip) if frame.saved.rip is not None else "unknown code"
        rsp = f" (rsp {hex_address(frame.saved.rsp)})" if frame.saved.rsp is not None else ""
        text = f"{self.frame_kind(frame)} at {where}{rsp}"
        if frame.lo >= frame.hi:  # the core no longer had the frame, only its delivery
            return text
        return f"{text}, frame on {self.frame_stack(frame)} [{hex_address(frame.lo)}, {hex_address(frame.hi)})"

    def _unblock_steps(self, finding: Finding, steps: list[ChainStep]) -> None:
        entry, by = finding.cause_frame, finding.cause_event
        event = None if entry is None else self.event(entry)
        if entry is not None and event is not None and event.kind is Kind.DELIVER:
            at = f" at {self.address(event.rip)}" if event.known & Known.RIP else ""
            steps.append(ChainStep(entry, f"{self.delivery_name(event)}{at}, before that frame is resumed"))
        if by is None:
            return
        how = self.event(by)
        whose = f"of event {entry}" if entry is not None else "from a frame that no delivery stored,"
        if how is not None and how.kind is Kind.RETURN:
            steps.append(ChainStep(by, f"IRET {whose} to {self.address(how.addr)}: NMIs are unblocked"))
        elif how is not None and how.kind is Kind.UNBLOCK:
            steps.append(ChainStep(by, "NMIs are unblocked"))
        else:
            what = self.delivery_name(event) if event is not None and event.kind is Kind.DELIVER else "frame"
            steps.append(ChainStep(by, f"by now the {what} {whose} has returned, and its IRET has unblocked NMIs"))

    def _pop_step(self, finding: Finding) -> str:
        popped = finding.popped
        if popped is None:
            return "IRET pops these bytes"
        rsp = f", rsp {hex_address(popped.rsp)}" if popped.rsp is not None else ""
        whose = f"the frame of event {finding.victim.entry}" if finding.victim is not None else "the frame"
        return f"IRET pops {whose}: rip {self.address(popped.rip)}{rsp}"
