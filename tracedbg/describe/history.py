"""What an event did to a frame or to bytes that somebody follows."""

from __future__ import annotations

from tracedbg.describe.brief import BriefWords
from tracedbg.describe.names import UNKNOWN
from tracedbg.state import Event, Frame, Hit, Kind, Touch


class HistoryWords(BriefWords):
    """Words for the life of a frame and the history of a word."""

    def end_text(self, event: Event, frame: Frame) -> str:
        """How an event ended a frame."""
        name = self.frame_brief(frame)
        if event.kind is Kind.RETURN:
            return f"{self.return_name(event.index)} from {name}"
        if event.kind is Kind.GAP:
            return f"records are lost here: what became of {name} is not known"
        if event.kind is Kind.INIT:
            return f"the CPU is reset: {name} is gone"
        return f"no return from {name} is recorded: this event shows that it was left"

    def life_text(self, event: Event, frame: Frame, touch: Touch) -> str:
        """What an event of a frame's life did to it; no touch: its delivery."""
        name = self.frame_brief(frame)
        if event.index == frame.entry:
            return f"{name}: its delivery"
        if touch & Touch.END and not (touch & Touch.WRITE and event.kind is Kind.DELIVER):
            return self.end_text(event, frame)
        if touch & Touch.WRITE:
            return f"{self.writer_text(event)} stored over the frame of {name}"
        if touch & Touch.COPY:
            return f"software copied the frame of {name} away"
        return f"{self.return_name(event.index)} popped words of the frame of {name}"

    def touch_text(self, event: Event, touch: Touch) -> str:
        """What an event did to bytes that somebody follows."""
        if touch & Touch.POP:
            return f"{self.return_name(event.index)} pops it"
        if touch & Touch.COPY:
            return "software copies it with its frame"
        return "software reads it" if touch & Touch.READ else f"{self.writer_text(event)} stores it"

    def writer_text(self, event: Event) -> str:
        """`NMI`, `#PF FAILED`, `write`, `move`: who stored."""
        return self.delivery_brief(event) if event.kind is Kind.DELIVER else event.kind.name.lower()

    @staticmethod
    def hit_value(hit: Hit) -> str:
        """The word after a store, 16 digits; `??` for each byte that is not known."""
        digits = f"{hit.value:016x}"
        pairs = (digits[14 - 2 * b : 16 - 2 * b] if hit.known >> b & 1 else UNKNOWN * 2 for b in range(7, -1, -1))
        return "".join(pairs)
