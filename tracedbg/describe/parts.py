"""Who had a part in a finding, one line each: victim, writer, consumer, and what let it happen."""

from __future__ import annotations

from dataclasses import dataclass

from tracedbg.describe.chain import ChainWords
from tracedbg.describe.names import hex_address
from tracedbg.describe.overwrite import OVERWRITES
from tracedbg.state import Finding, Frame, Rule


@dataclass(frozen=True, slots=True)
class Part:
    """An event and its part in a finding: `victim`, `writer`, `consumer`, `cause`, or `at` where there is no other."""

    role: str
    event: int
    text: str


class PartWords(ChainWords):
    """Says who had which part in a finding."""

    def finding_parts(self, finding: Finding, at: int | None = None) -> tuple[Part, ...]:
        """The parts, each with its event; with `at` only those before that position."""
        victim, writer = finding.victim, finding.writer
        parts: list[Part] = []
        if victim is not None:
            parts.append(Part("victim", victim.entry, self._frame_part(victim)))
        double = finding.rule is Rule.DOUBLE_FAULT  # has two causes: the faults that could not be delivered
        for cause in (finding.cause_frame if double else None, finding.cause_event):
            if cause is not None and cause not in (finding.event, *_entries(finding)):
                self._event_part("cause", cause, parts)
        if writer is not None:
            # Without a victim nothing was overwritten: it is the delivery that the finding is about.
            parts.append(Part("writer" if victim is not None else "at", writer.entry, self._frame_part(writer)))
        elif finding.rule in OVERWRITES:
            self._event_part("writer", finding.event, parts)
        if finding.consumer is not None:
            parts.append(Part("consumer", finding.consumer, self._consumer_part(finding)))
        if not any(part.event == finding.event for part in parts):
            self._event_part("at", finding.event, parts)
        return tuple(part for part in parts if at is None or part.event < at)

    def _frame_part(self, frame: Frame) -> str:
        text = f"{self.frame_kind(frame)} at {self.address(frame.saved.rip)}"
        if frame.lo >= frame.hi:  # the core no longer had the frame, only its delivery
            return text
        return f"{text}, frame of {frame.hi - frame.lo} bytes on {self.frame_stack(frame)} at {hex_address(frame.lo)}"

    def _consumer_part(self, finding: Finding) -> str:
        popped = finding.popped
        name = self.return_name(finding.consumer)
        if popped is None or popped.rip is None:
            return f"{name} that popped these bytes"
        rsp = f", rsp {hex_address(popped.rsp)}" if popped.rsp is not None else ""
        return f"{name} to {self.address(popped.rip)}{rsp}"

    def _event_part(self, role: str, index: int, parts: list[Part]) -> None:
        event = self.event(index)
        if event is not None:
            parts.append(Part(role, index, ", ".join(self.event_line(event).split("  "))))


def _entries(finding: Finding) -> set[int]:
    return {frame.entry for frame in (finding.victim, finding.writer) if frame is not None}
