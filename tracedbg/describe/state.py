"""A line for a CPU, a frame, a stack, a word of stack memory."""

from __future__ import annotations

from dataclasses import dataclass

from tracedbg import x86
from tracedbg.describe.names import UNKNOWN, Names, hex_address, slot_of
from tracedbg.state import CpuState, Frame, FrameStatus, Kind, Known, Shadow, Stack, Word

SHADOW_WORDS = {Shadow.STI: "STI shadow", Shadow.MOV_SS: "MOV SS shadow"}
STATUS_WORDS = {FrameStatus.LIVE: "live", FrameStatus.CLOBBERED: "overwritten", FrameStatus.MOVED: "moved"}


@dataclass(frozen=True, slots=True)
class WordRow:
    """A word of stack memory in words. `mark` is `!` where the owner's word was overwritten, else a blank."""

    addr: int
    value: str
    slot: str
    owner: str
    writer: str
    mark: str


class StateWords(Names):
    """Says what a CPU and its stacks hold."""

    def cpu_line(self, cpu: CpuState) -> str:
        """The state of one CPU in one line."""
        parts = [f"cpu {cpu.cpu}: rip {self.address(cpu.rip)}"]
        parts.append(f"rsp {UNKNOWN if cpu.rsp is None else hex_address(cpu.rsp)}")
        parts.append(f"cpl {UNKNOWN if cpu.cs is None else x86.cpl(cpu.cs)}")
        parts.append(f"IF={UNKNOWN if cpu.rflags is None else cpu.rflags >> 9 & 1}")
        parts.append(self.nmi_text(cpu))
        parts.append("MCIP " + {None: "unknown", True: "set", False: "clear"}[cpu.mcip])
        return "  ".join((*parts, *self._more(cpu)))

    def _more(self, cpu: CpuState) -> list[str]:
        """What few traces tell: said where it is known."""
        parts = []
        if cpu.mce is not None:
            parts.append(f"CR4.MCE {'set' if cpu.mce else 'clear'}")
        if cpu.tpr is not None:
            parts.append(f"TPR {cpu.tpr:#04x}")
        if cpu.gif is not None:
            parts.append(f"GIF={int(cpu.gif)}")
        if cpu.kernel_gs is not None:
            parts.append(f"GS base {'the kernel' if cpu.kernel_gs else 'user mode'}'s")
        if cpu.fred:
            parts.append(f"FRED level {UNKNOWN if cpu.csl is None else cpu.csl}")
        tokens = [f"IST{n} {'busy' if cpu.tokens_busy >> n & 1 else 'free'}" for n in range(1, 8) if cpu.tokens_known >> n & 1]
        if tokens:
            parts.append(f"shadow-stack tokens: {', '.join(tokens)}")
        if cpu.shadow:
            parts.append(SHADOW_WORDS[cpu.shadow])
        if cpu.smm:
            parts.append("in SMM")
        if cpu.guest:
            parts.append("a guest runs")
        if cpu.ring_gap is not None:
            event = self.event(cpu.ring_gap)
            what = f"the {event.kind.name} at " if event is not None else ""
            parts.append(f"RSP is user mode's since {what}{self.event_name(cpu.ring_gap)}")
        return parts

    def nmi_text(self, cpu: CpuState) -> str:
        """`NMIs blocked since event 0`, `NMIs not blocked`, `NMI blocking unknown`."""
        if cpu.nmi_blocked is None:
            return "NMI blocking unknown"
        if not cpu.nmi_blocked:
            return "NMIs not blocked"
        text = "NMIs blocked" + (f" since {self.event_name(cpu.nmi_since)}" if cpu.nmi_since is not None else "")
        return text + (", one pending" if cpu.nmi_pending else "")

    def frame_line(self, frame: Frame) -> str:
        """One line for a list of open frames."""
        text = (
            f"{self.frame_name(frame)}  {self.frame_stack(frame)} [{hex_address(frame.lo)}, {hex_address(frame.hi)})  "
            f"resumes {self.address(frame.saved.rip)}"
        )
        if frame.saved.rsp is not None:
            text += f" rsp {hex_address(frame.saved.rsp)}"
        if frame.kernel_gs is False and frame.saved.cs is not None and x86.cpl(frame.saved.cs) == 0:
            text += "  GS base user mode's"  # of CPL 0: its handler cannot tell by the saved CS (R33)
        text += f"  {STATUS_WORDS[frame.status]}"
        return text + (f" by {self.event_name(frame.clobbered_by)}" if frame.clobbered_by is not None else "")

    def stack_line(self, stack: Stack) -> str:
        """`IST2 (NMI) of cpu 0 [lo, hi), 1 open frame`."""
        plural = "" if stack.frames == 1 else "s"
        return f"{self.stack_title(stack)} [{hex_address(stack.lo)}, {hex_address(stack.hi)}), {stack.frames} open frame{plural}"

    def word_row(self, word: Word, frames: tuple[Frame, ...]) -> WordRow:
        """A word of stack memory with its slot, its owner (the newest open frame there) and its writer."""
        value = f"{word.value:016x}"
        if word.known != 0xFF:
            digits = [value[14 - 2 * b : 16 - 2 * b] if word.known >> b & 1 else "??" for b in range(7, -1, -1)]
            value = "".join(digits)
        owners = [f for f in frames if f.lo <= word.addr < f.hi]
        slot = owner = ""
        mark = " "
        writers = list(dict.fromkeys(word.writers))
        if owners:
            newest = max(owners, key=lambda f: f.entry)
            slot = slot_of(newest, word.addr)
            owner = self.frame_name(newest)
            if any(w is not None and f.status is FrameStatus.CLOBBERED and w != f.entry for f in owners for w in writers):
                mark = "!"
        return WordRow(word.addr, value, slot, owner, self._writers_text(writers), mark)

    def _writers_text(self, writers: list[int | None]) -> str:
        if len(writers) > 1:
            return "several: " + ", ".join("initial" if w is None else f"event {w}" for w in writers)
        writer = writers[0] if writers else None
        if writer is None:
            return "initial contents"
        event = self.event(writer)
        if event is None:
            return f"event {writer}"
        if event.kind is Kind.DELIVER:
            return f"{self.event_name(writer)} {self.delivery_name(event)}"
        by = f" at {self.address(event.rip)}" if event.known & Known.RIP else ""
        return f"{self.event_name(writer)} {event.kind.name.lower()}{by}"
