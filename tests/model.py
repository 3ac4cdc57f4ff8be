"""A slow model of the replay: the oracle that the C core is compared with.

Written from tracedbg/help/replay.md alone, in its order and with its words, and for reading, not for speed: memory is a
dict of bytes, frames are small mutable records, stacks are computed when asked for. It never looks at csrc. The page's
sections: model_records and model_state (State), model_observe (chain, Observe, Windows), model_place, model_deliver (Delivery),
model_return (Return), model_events (Other events); here the events are handed out, and the results shown and hashed.
"""

from __future__ import annotations

from collections.abc import Iterable

from model_events import Events
from model_records import MASK, ModelEvent, ModelFinding, ModelFrame, decode

from tracedbg.state import NO_EVENT, CpuState, FrameStatus, Kind, Known, Rule, Shadow, Word

__all__ = ["Fnv", "Model", "ModelEvent", "ModelFinding", "ModelFrame", "decode"]

FNV_PRIME = 0x100000001B3
FNV_POWERS = tuple(pow(FNV_PRIME, n, 1 << 64) for n in range(9))
IN_THE_SHADOW = (Kind.ENTER, Kind.WRITE, Kind.READ, Kind.RAISE, Kind.EOI, Kind.TOKEN, Kind.MARK)  # do not end it


class Fnv:
    """FNV-1a, 64 bits, fed with u64 words as 8 little-endian bytes."""

    def __init__(self) -> None:
        self.value = 0xCBF29CE484222325

    def word(self, word: int) -> None:
        value = self.value
        left = 8
        while word:
            value = ((value ^ (word & 0xFF)) * FNV_PRIME) & MASK
            word >>= 8
            left -= 1
        self.value = value * FNV_POWERS[left] & MASK  # the zero bytes at the top

    def words(self, words: Iterable[int]) -> None:
        for word in words:
            self.word(word)


def none(number: int | None) -> int:
    return NO_EVENT if number is None else number


class Model(Events):
    """Replays a trace from its beginning, one event after the other."""

    # -- running ----------------------------------------------------------------------------------------------------

    def run(self, position: int) -> Model:
        """Go on to a position; there is no way back."""
        if not self.position <= position <= self.trace.count:
            raise ValueError(f"position {position}, at {self.position} of {self.trace.count}")
        while self.position < position:
            self.apply(self.position)
        return self

    def apply(self, index: int) -> None:
        """Apply the next event."""
        if index != self.position:
            raise ValueError(f"event {index} is not the next one ({self.position})")
        self.position += 1
        self.stats.events += 1
        event = decode(self.trace, index)
        if not 0 < event.kind <= max(Kind):
            self.stats.bad_events += 1
        elif event.cpu is None and event.kind == Kind.GAP:
            self.gap(event, list(range(len(self.cpus))))
        elif event.cpu is None or event.cpu >= len(self.cpus):
            self.stats.bad_events += 1
        else:
            self.apply_to_cpu(event, event.cpu)

    def apply_to_cpu(self, event: ModelEvent, number: int) -> None:
        cpu = self.cpus[number]
        after_delivery, cpu.placed = cpu.placed, None
        cpu.event = event.index
        shadow = cpu.shadow
        match event.kind:
            case Kind.DELIVER:
                self.deliver(cpu, event)
            case Kind.ENTER:
                self.enter(cpu, event, after_delivery)
            case Kind.RETURN:
                self.ret(cpu, event)
            case Kind.WRITE:
                self.write(cpu, event)
            case Kind.MOVE:
                self.move(event)
            case Kind.SETSP:
                self.setsp(cpu, event)
            case Kind.FLAGS:
                self.flags(cpu, event)
            case Kind.SHADOW:
                self.set_shadow(cpu, event)
            case Kind.TSS:
                self.tss_slot(cpu, event)
            case Kind.GATE:
                self.gate(cpu, event)
            case Kind.LTR | Kind.LIDT:
                self.ltr_lidt(cpu, event)
            case Kind.SYSCALL:
                self.syscall(cpu, event)
            case Kind.SYSENTER:
                self.sysenter(cpu, event)
            case Kind.SYSRET:
                self.sysret(cpu, event)
            case Kind.RAISE:
                self.request(cpu, event)
            case Kind.SMI:
                self.smi(cpu)
            case Kind.RSM:
                self.rsm(cpu, event)
            case Kind.UNBLOCK:
                self.unblocked(cpu, event)
            case Kind.MSR:
                self.msr(cpu, event)
            case Kind.CR:
                self.cr(cpu, event)
            case Kind.GS:
                self.gs(cpu, event)
            case Kind.TOKEN:
                self.token(cpu, event)
            case Kind.VMEXIT:
                self.vmexit(cpu, event)
            case Kind.VMENTRY:
                self.vmentry(cpu)
            case Kind.INIT:
                self.init(cpu, event)
            case Kind.SHUTDOWN:
                self.shutdown(cpu, event)
            case Kind.GAP:
                self.gap(event, [number])
        if cpu.shadow is shadow and event.kind not in IN_THE_SHADOW:
            cpu.shadow = None

    # -- results ----------------------------------------------------------------------------------------------------

    def cpu_state(self, number: int) -> CpuState:
        """As Replay.cpu() shows it."""
        c = self.cpus[number]
        return CpuState(
            number, c.rip, c.rsp, c.cs, c.ss, c.rflags, c.user_rsp, c.event, c.nmi.blocked, c.nmi_pending, c.nmi.since,
            c.nmi.unblocked_by, c.nmi.unblock_frame, c.mcip, c.gap, c.tss, c.idt,
            ring_gap=None if c.ring_gap is None else c.ring_gap.event,
            csl=c.csl,
            kernel_gs=c.gs,
            tpr=c.tpr,
            mce=c.mce,
            gif=c.gif,
            fred=c.fred,
            shadow=Shadow.NONE if c.shadow is None else c.shadow[0],
            smm=c.smm,
            guest=c.guest,
            tokens_known=sum(1 << ist for ist in c.tokens),
            tokens_busy=sum(1 << ist for ist, busy in c.tokens.items() if busy),
        )  # fmt: skip

    def word_list(self) -> list[Word]:
        """Every word with a known byte or a byte written by an event, by address."""
        result = []
        for at in sorted({addr & ~7 for addr in self.memory}):
            cells = [self.memory.get(at + n, (None, None)) for n in range(8)]
            if all(cell == (None, None) for cell in cells):
                continue
            value = sum((byte or 0) << 8 * n for n, (byte, _) in enumerate(cells))
            known = sum(1 << n for n, (byte, _) in enumerate(cells) if byte is not None)
            result.append(Word(at, value, known, tuple(writer for _, writer in cells)))
        return result

    def rule_at(self, finding: ModelFinding, position: int) -> Rule:
        settled = finding.settled is not None and finding.settled < position
        return finding.rule if settled else finding.raised_rule

    def digest(self, position: int | None = None) -> int:
        """Digest of the state at a position, which may lie ahead."""
        if position is not None:
            self.run(position)
        hash_ = Fnv()
        for number in range(len(self.cpus)):
            self.hash_cpu(hash_, self.cpu_state(number))
        for frame in self.frames:
            self.hash_frame(hash_, frame)
        for word in self.word_list():
            hash_.words((word.addr, word.value, word.known))
            hash_.words(none(writer) for writer in word.writers)
        hash_.word(len(self.findings))
        for finding in self.findings:
            hash_.words((self.rule_at(finding, self.position), finding.evidence, finding.cause, finding.event))
            hash_.word(NO_EVENT if finding.victim is None else finding.victim.entry)
            hash_.word(NO_EVENT if finding.writer is None else finding.writer.entry)
            hash_.words((finding.lo, finding.hi, finding.differ))
            hash_.words((none(finding.cause_event), finding.detail))
        return hash_.value

    @staticmethod
    def hash_cpu(hash_: Fnv, c: CpuState) -> None:
        fields = (
            c.rip, c.rsp, c.cs, c.ss, c.rflags, c.nmi_blocked, c.mcip, c.user_rsp, c.csl, c.kernel_gs, c.tpr, c.mce, c.gif,
        )  # fmt: skip
        hash_.word(sum(1 << n for n, value in enumerate(fields) if value is not None))
        hash_.words(value or 0 for value in (c.rip, c.rsp, c.cs, c.ss, c.rflags, c.user_rsp))
        hash_.word(none(c.event))
        hash_.words((int(c.nmi_blocked or 0), int(c.nmi_pending)))
        hash_.words((none(c.nmi_since), none(c.nmi_unblocked_by), none(c.nmi_unblock_frame)))
        hash_.words((int(c.mcip or 0), int(c.gap)))
        hash_.words(MASK if table is None else table for table in (c.tss, c.idt))
        hash_.word(none(c.ring_gap))
        hash_.words(int(value or 0) for value in (c.csl, c.kernel_gs, c.tpr, c.mce, c.gif))
        hash_.words((int(c.fred), int(c.shadow), int(c.smm), int(c.guest), c.tokens_known, c.tokens_busy))

    @staticmethod
    def hash_frame(hash_: Fnv, f: ModelFrame) -> None:
        hash_.words((f.entry, f.cpu, f.vector, f.source, f.ist, f.status, f.lo, f.hi))
        s = f.saved
        hash_.words(value or 0 for value in (s.rip, s.cs, s.rflags, s.rsp, s.ss, s.code))
        bits = (
            (s.rip, Known.RIP), (s.rsp, Known.RSP), (s.rflags, Known.RFLAGS),
            (s.code, Known.CODE), (s.cs, Known.CS), (s.ss, Known.SS),
        )  # fmt: skip
        hash_.word(sum(int(bit) for value, bit in bits if value is not None))
        hash_.words((none(f.clobbered_by), none(f.victim), none(f.finding)))
        hash_.words((int(f.fred), f.level, f.from_level, 2 if f.gs is None else int(f.gs)))

    def open_clobbered(self) -> int:
        return sum(f.status == FrameStatus.CLOBBERED for f in self.frames)
