"""The same in fewer words, for narrow columns: what matters most comes first, as the end may be cut off."""

from __future__ import annotations

from tracedbg import x86
from tracedbg.describe.names import UNKNOWN, hex_address
from tracedbg.describe.paragraph import ParagraphWords
from tracedbg.state import Event, EventFlag, Finding, Frame, Kind, Known, Source

DIGITS = 8  # of an address of the high half: that many differ within a machine's stacks


def brief_address(address: int) -> str:
    """`…000dfd8`: enough of an address to know it again."""
    text = hex_address(address)
    return text if len(text) <= DIGITS + 2 else f"…{text[-DIGITS:]}"


class BriefWords(ParagraphWords):
    """Says what an event, a frame or a finding is in a few words."""

    def event_brief(self, event: Event) -> str:
        """A store as `write …000dfd0 by nested_nmi+9 = 0x18`; others as event_line() has them."""
        if event.kind not in (Kind.WRITE, Kind.READ):
            return self.event_line(event)
        text = event.kind.name.lower() + f" {brief_address(event.addr) if event.known & Known.ADDR else UNKNOWN}"
        if event.known & Known.RIP:
            text += f" by {self.symbol(event.rip) or brief_address(event.rip)}"
        if not event.flags & EventFlag.BYTES and event.known & Known.VALUE:
            text += f" = {event.value:#x}"
        length = event.code if event.flags & EventFlag.BYTES else event.arg
        return f"{text} ({length} bytes)"

    def delivery_brief(self, event: Event) -> str:
        """`NMI`, `fake NMI`, `intr 0xec`."""
        source = event.source if event.known & Known.SOURCE else Source.UNKNOWN
        brief = self._brief(event.arg, source) if event.known & Known.ARG else ""
        return brief or self.delivery_name(event)

    def frame_brief(self, frame: Frame) -> str:
        """`NMI@507`, `fake NMI@2`."""
        return f"{self._brief(frame.vector, frame.source) or self.frame_kind(frame)}@{frame.entry}"

    def _brief(self, vector: int, source: Source) -> str:
        if source not in (Source.NMI, Source.MC, Source.EXCEPTION, Source.UNKNOWN, Source.SYSCALL):
            if vector in (x86.NMI, x86.MACHINE_CHECK):
                return "fake NMI" if vector == x86.NMI else "fake #MC"
            if source is not Source.SOFT_INT:
                return f"intr {vector:#04x}"
        return ""

    def finding_brief(self, finding: Finding) -> str:
        """The message of a finding, with the bare number of its event."""
        return f"@{finding.event} {self.finding_message(finding)}"
