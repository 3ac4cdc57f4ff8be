"""What a finding of an overwritten frame states: by whom, which bytes, what came of it."""

from __future__ import annotations

from tracedbg import rules, x86
from tracedbg.describe.cause import CauseWords
from tracedbg.describe.names import hex_address, slots_text
from tracedbg.describe.values import ValueWords
from tracedbg.state import Context, Evidence, Finding, Frame, Known, Rule, Settle

OVERWRITES = frozenset(
    {
        Rule.FRAME_CLOBBERED, Rule.FRAME_CONSUMED_CORRUPT, Rule.RESUME_LOOP, Rule.FRAME_RELOCATED, Rule.FRAME_SAME_BYTES,
        Rule.NEIGHBOUR_OVERWRITE,
    }
)  # fmt: skip

_RIP, _RSP = 1 << x86.SLOT_NAMES.index("rip"), 1 << x86.SLOT_NAMES.index("rsp")


class OverwriteWords(CauseWords, ValueWords):
    """Says what overwrote a frame, and what came of it."""

    def _overwrite(self, finding: Finding, rule: Rule) -> str:
        if finding.raised_rule is Rule.NEIGHBOUR_OVERWRITE:
            return self._neighbour(finding)
        victim, writer = finding.victim, finding.writer
        whose = f"the frame of the {self.frame_name(victim)}" if victim is not None else "a frame"
        stack = self._place(finding)
        size = self._size(finding)
        if writer is None:
            return f"{whose} on {stack} was overwritten ({size})"
        if finding.raised_rule is Rule.FRAME_CONSUMED_CORRUPT:
            # No overwrite of an open frame was seen: foreign words came into it by software, or after it counted as left.
            back = self.return_name(finding.consumer)
            return f"an {back} popped {whose} with words that the {self.frame_name(writer)} had stored ({size})"
        failed = ", whose delivery failed," if self.failed(writer) else ""
        text = f"{self.frame_kind(writer)}{failed} overwrote {whose} on {stack} ({size})"
        return text + (" with the values that it already held" if rule is Rule.FRAME_SAME_BYTES else "")

    def _neighbour(self, finding: Finding) -> str:
        """A frame or a store that left the stack above the victim's."""
        victim, writer = finding.victim, finding.writer
        above = self.stack_ending_at(victim.stack_hi) if victim is not None else "its stack"
        whose = "a frame on the stack below"
        if victim is not None:
            whose = f"the frame of the {self.frame_name(victim)} on {self.frame_stack(victim)}"
        size = self._size(finding)
        if writer is not None:
            return f"{self.frame_kind(writer)} was pushed below the bottom of {above} and overwrote {whose} ({size})"
        event = self.event(finding.event)
        by = f" at {self.address(event.rip)}" if event is not None and event.known & Known.RIP else ""
        if finding.evidence < Evidence.COMPUTED:
            ran = "the stack above" if above in ("its stack", "the stack") else f"{above}, the stack above"
            return f"a store{by} overwrote {whose} ({size}); the CPU ran on {ran}, so it may be a push below the bottom of that"
        return f"a push{by} went below the bottom of {above} and overwrote {whose} ({size})"

    def _loop(self, finding: Finding) -> str:
        """A loop that was raised at its return, beside the finding of the overwrite."""
        victim, writer, popped = finding.victim, finding.writer, finding.popped
        whose = f"the frame of the {self.frame_name(victim)}" if victim is not None else "its frame"
        words = f"the words that the {self.frame_name(writer)} stored" if writer is not None else "words of another delivery"
        at = finding.event if finding.consumer is None else finding.consumer
        place = f" to {self.address(popped.rip)}" if popped is not None and popped.rip is not None else ""
        if popped is not None and popped.rsp is not None:
            place += f", rsp {hex_address(popped.rsp)}"
        back = f"{self.return_name(at)} at {self.event_name(at)}"
        return f"{whose} holds {words}, so the {back} went{place}, back into its own handler"

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

    # -- what came of it --------------------------------------------------------------------------------------------

    def _open_outcome(self, finding: Finding, at: int | None) -> str:
        victim, writer = finding.victim, finding.writer
        if at is None and finding.settled is not None and finding.settled_by is Settle.DROPPED:
            return f"What became of it is not known: records are missing from {self.event_name(finding.settled)} on."
        when = "Still live at the end of the trace" if at is None else "Still live here"
        if writer is None:
            when = "What became of it is not known"  # a store leaves the frame as live as it was, and is not followed
        if rules.finding_evidence(finding, at) < Evidence.COMPUTED and writer is not None:
            when = "Whether it was still needed is not recorded"
        if victim is None or not finding.differ & (_RIP | _RSP):
            return f"{when}."
        if writer is None and finding.differ & ~(_RIP | _RSP):
            return f"{when}: if it is resumed from these bytes, not all of them are its own."
        if writer is not None and (victim.hi != writer.hi or victim.fred != writer.fred):
            # Another top: RIP and RSP are not simply the writer's.
            return f"{when}: if it is resumed from these bytes, not all of them are its own."
        new = self._mixed(finding, victim)
        where = self._other_place(new, victim.saved)
        text = f"{when}: if it is resumed from these bytes, the {return_of(victim)} goes to {where}"
        own = finding.slots & _RIP and finding.slots & _RSP and writer is not None and _own_handler(victim, writer)
        return text + (", back into its own handler, again and again." if own else ".")

    def _mixed(self, finding: Finding, victim: Frame) -> Context:
        """RIP and RSP as they are in the frame now: what was not overwritten is its own."""
        now = {row.slot: row.now for row in self.bytes_rows(finding)}
        old = victim.saved
        return Context(now.get("rip", old.rip), old.cs, old.rflags, now.get("rsp", old.rsp), old.ss, old.code)

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
        back = self.return_name(finding.consumer)
        frame = f"event {finding.victim.entry}" if finding.victim is not None else "the frame"
        new, old = finding.popped, finding.victim.saved if finding.victim is not None else None
        if new is None or new.rip is None:
            return f"The {back} at {name} resumed {frame} from these bytes"
        where = self.address(new.rip) if old is None else self._other_place(new, old)
        return f"The {back} at {name}, the resume of {frame}, went to {where}"

    def _survived(self, finding: Finding) -> str:
        if finding.settled is None:
            return "Software had moved the frame before, so nothing was lost."
        name = self.event_name(finding.settled)
        back = self.return_name(finding.settled)
        match finding.settled_by:
            case Settle.RETURN:
                return f"No harm: its own words were back when the {back} at {name} popped them."
            case Settle.COPY:
                return f"No harm: the {back} at {name} popped a copy of it."
            case Settle.CONTEXT:
                return f"It survived: its RIP and RSP were running again at {name}."
            case Settle.ABOVE:
                return f"It survived: at {name} the CPU ran on the interrupted stack again, above the saved RSP."
            case Settle.CPL3:
                return f"It survived: the CPU ran at CPL 3 at {name}."
            case _:
                return f"It survived: its context had been resumed by {name}."


def _own_handler(victim: Frame, writer: Frame) -> bool:
    """Whether the context that the writer saved lies in the victim's own handler: on its stack, below its frame."""
    rsp = writer.saved.rsp
    return rsp is not None and victim.stack_lo < rsp <= victim.rip_addr


def return_of(victim: Frame) -> str:
    """What a frame will be returned through: the ERETs belong to FRED."""
    if not victim.fred:
        return "IRET"
    cs = victim.saved.cs
    return "ERET" if cs is None else "ERETU" if x86.cpl(cs) else "ERETS"
