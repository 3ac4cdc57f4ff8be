"""How a finding came about, step by step."""

from __future__ import annotations

from dataclasses import dataclass

from tracedbg.describe.events import EventWords
from tracedbg.describe.findings import FindingWords
from tracedbg.describe.names import hex_address, return_kind, slots_text
from tracedbg.describe.overwrite import OVERWRITES
from tracedbg.state import Cause, Event, EventFlag, Finding, Frame, Kind, Known, Rule

# Rules whose frames are steps of how it came about, beside those of OVERWRITES.
_OF_FRAMES = frozenset(
    {
        Rule.USER_STACK, Rule.STACK_OVERFLOW, Rule.ERROR_CODE_MISMATCH, Rule.TOKEN_BUSY, Rule.NMI_STUCK, Rule.UNMATCHED_RETURN,
    }
)  # fmt: skip


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
        elif finding.rule is Rule.REENTRY_WINDOW:
            self._window_chain(finding, steps)
        else:
            self._plain_chain(finding, steps)
        return tuple(step for step in steps if at is None or step.event < at)

    def _plain_chain(self, finding: Finding, steps: list[ChainStep]) -> None:
        """The events that the finding names, each once: its causes, the frames, where it was raised."""
        frames = (finding.victim, finding.writer) if finding.rule in _OF_FRAMES else ()
        said = {frame.entry: self._entry_step(frame) for frame in frames if frame is not None}
        for index in (finding.cause_event, finding.cause_frame, finding.event):
            event = None if index is None else self.event(index)
            if index is not None and event is not None:
                said.setdefault(index, self.event_line(event))
        if finding.rule is Rule.UNMATCHED_RETURN and finding.writer is not None:
            said[finding.writer.entry] += "; it has been returned from"
        steps += [ChainStep(index, said[index]) for index in sorted(said)]

    def _window_chain(self, finding: Finding, steps: list[ChainStep]) -> None:
        victim = finding.victim
        if victim is not None:
            steps.append(ChainStep(victim.entry, self._entry_step(victim)))
        if finding.cause is Cause.NMI_UNBLOCKED:
            self._unblock_steps(finding, steps)
        elif finding.cause_event is not None and (victim is None or finding.cause_event != victim.entry):
            self._event_step(finding.cause_event, steps)
        if not steps or steps[-1].event < finding.event:
            self._event_step(finding.event, steps)
        if steps:
            last = steps.pop()
            steps.append(ChainStep(last.event, f"{last.text}; {self.window_step(finding)}"))

    def _event_step(self, index: int, steps: list[ChainStep]) -> None:
        event = self.event(index)
        if event is not None:
            steps.append(ChainStep(index, self.event_line(event)))

    def _overwrite_chain(self, finding: Finding, steps: list[ChainStep]) -> None:
        victim, writer = finding.victim, finding.writer
        if victim is not None:
            steps.append(ChainStep(victim.entry, self._entry_step(victim)))
        if finding.cause is Cause.NMI_UNBLOCKED:
            self._unblock_steps(finding, steps)
        over = f", over {slots_text(finding.slots)} of the frame of event {victim.entry}" if victim is not None else ""
        if writer is not None:
            text = self._entry_step(writer)
            if finding.event == writer.entry:
                text += over
            steps.append(ChainStep(writer.entry, text))
        elif (event := self.event(finding.event)) is not None:
            text = self.event_line(event)
            steps.append(ChainStep(finding.event, text + (over if event.kind is Kind.WRITE else "")))
        if finding.rule is Rule.FRAME_RELOCATED and finding.settled is not None:
            steps.append(ChainStep(finding.settled, self._survived(finding).rstrip(".")))
        elif finding.consumer is not None:
            steps.append(ChainStep(finding.consumer, self._pop_step(finding)))

    def _entry_step(self, frame: Frame) -> str:
        where = self.address(frame.saved.rip) if frame.saved.rip is not None else "unknown code"
        rsp = f" (rsp {hex_address(frame.saved.rsp)})" if frame.saved.rsp is not None else ""
        text = f"{self.frame_kind(frame)} at {where}{rsp}"
        if self.failed(frame):
            text += ", which failed"
        if frame.lo >= frame.hi:  # the core no longer had the frame, only its delivery
            return text
        part = "frame" if not self.failed(frame) else "stored" if self._stored_some(frame) else "nothing known to be stored"
        return f"{text}, {part} on {self.frame_stack(frame)} [{hex_address(frame.lo)}, {hex_address(frame.hi)})"

    def _stored_some(self, frame: Frame) -> bool:
        event = self.event(frame.entry)
        return event is not None and bool(event.known & Known.ADDR and event.addr)

    def _unblock_steps(self, finding: Finding, steps: list[ChainStep]) -> None:
        entry, by = finding.cause_frame, finding.cause_event
        event = None if entry is None else self.event(entry)
        if entry is not None and event is not None and event.kind is Kind.DELIVER and not _is_victim(finding, entry):
            at = f" at {self.address(event.rip)}" if event.known & Known.RIP else ""
            steps.append(ChainStep(entry, f"{self.delivery_name(event)}{at}, before that frame is resumed"))
        if by is None:
            return
        how = self.event(by)
        if how is not None and how.kind is Kind.RETURN:
            steps.append(ChainStep(by, f"{self._unblocking_return(how, entry)}: NMIs are unblocked"))
        elif how is not None and how.kind is not Kind.DELIVER:
            steps.append(ChainStep(by, "NMIs are unblocked" if how.kind is Kind.UNBLOCK else self.event_line(how)))
        else:
            what = self.delivery_name(event) if event is not None and event.kind is Kind.DELIVER else "frame"
            steps.append(ChainStep(by, f"by now the {what} {_whose(entry)} has returned, and its IRET has unblocked NMIs"))

    def _unblocking_return(self, event: Event, entry: int | None) -> str:
        name = return_kind(event)
        if event.flags & EventFlag.SMM:
            return f"{name} in SMM"
        if event.flags & EventFlag.FAULTED:
            return f"{name} {_whose(entry)} that faulted" if entry is not None else f"{name} that faulted"
        return f"{name} {_whose(entry)} to {self.address(event.addr if event.known & Known.ADDR else None)}"

    def _pop_step(self, finding: Finding) -> str:
        popped = finding.popped
        name = self.return_name(finding.consumer)
        if popped is None:
            return f"{name} pops these bytes"
        rsp = f", rsp {hex_address(popped.rsp)}" if popped.rsp is not None else ""
        whose = f"the frame of event {finding.victim.entry}" if finding.victim is not None else "the frame"
        return f"{name} pops {whose}: rip {self.address(popped.rip)}{rsp}"


def _whose(entry: int | None) -> str:
    return f"of event {entry}" if entry is not None else "from a frame that no delivery stored,"


def _is_victim(finding: Finding, entry: int) -> bool:
    return finding.victim is not None and finding.victim.entry == entry
