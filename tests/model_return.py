"""The slow model: a return (replay.md, "Return")."""

from __future__ import annotations

from dataclasses import replace

from model_deliver import Deliver
from model_records import MASK, SLOT_BITS, ModelCpu, ModelEvent, ModelFrame, RingGap, mask_of

from tracedbg import x86
from tracedbg.state import Context, Evidence, FrameStatus, Return, Rule, Settle, Source
from tracedbg.state import EventFlag as Flag

FRED_NMI_BIT = 4  # of `code`: bit 18 of the popped SS word


def differs(slot: str, stored: int | None, popped: int | None) -> bool:
    if stored is None or popped is None:
        return False
    ignore = x86.RFLAGS_RF if slot == "rflags" else 0
    return (stored ^ popped) & ~ignore & (1 << SLOT_BITS[slot]) - 1 != 0


class Resume(Deliver):
    """IRET, ERETU, ERETS."""

    def ret(self, cpu: ModelCpu, event: ModelEvent) -> None:
        self.stats.returns += 1
        blocked_before = cpu.nmi.blocked
        if event.flags & (Flag.LEGACY | Flag.SMM) or cpu.smm:
            self.unblock_by_iret(cpu, event, None)
            cpu.registers_unknown()
            cpu.home = None
            if cpu.smm:
                cpu.smm_iret = event.index
        elif cpu.guest and self.guests:
            cpu.registers_unknown()
            cpu.home = None
            return
        elif event.flags & Flag.FAULTED:
            if event.arg not in (Return.ERETU, Return.ERETS):
                if self.frame_at(event) is None and self.copied(event, self.popped(event)) is None:
                    self.shifted(cpu, event)
                if self.iret_fault_unblocks:
                    self.unblock_by_iret(cpu, event, None)
        else:
            self.ret_whole(cpu, event)
        if not event.flags & Flag.SMM:
            self.nmi_window(cpu, event, blocked_before)

    def ret_whole(self, cpu: ModelCpu, event: ModelEvent) -> None:
        assert event.cpu is not None
        popped = self.popped(event)
        cpu.depth = max(cpu.depth - 1, 0)
        # 1., 2.
        frame = self.frame_at(event)
        looping = cpu.loop is not None and (event.rsp, event.addr, event.value) == cpu.loop
        if looping and frame is not None and frame.entry < cpu.loop_victim:
            self.findings[cpu.loop_finding].count += 1
            frame = None
        elif frame is not None:
            self.consume(cpu, event, frame, popped)
        else:  # 3.
            frame = self.copied(event, popped)
            if frame is not None:
                if frame.status == FrameStatus.CLOBBERED:
                    self.settle(frame, Rule.FRAME_RELOCATED, Evidence.RECORDED, event.index, Settle.COPY)
                self.close_consumed(cpu, frame, Settle.COPY)
            elif event.rsp is None:
                self.nested(cpu, event, popped)
            else:
                frame = self.shifted(cpu, event)
                if frame is not None:
                    pass
                elif looping:
                    self.findings[cpu.loop_finding].count += 1
                else:
                    self.unmatched(cpu, event, popped)
        # 4.
        self.end_blocking(cpu, event, frame)
        # 5.
        if frame is not None and frame.ist in cpu.tokens:
            cpu.tokens[frame.ist] = False
        if event.arg == Return.ERETU:
            cpu.csl = 0
            cpu.gs = None if cpu.gs is None else False
        elif event.arg == Return.ERETS:
            cpu.csl = self.popped_level(event) if frame is None else frame.from_level
        # 6.
        cpu.rip, cpu.rsp, cpu.cs, cpu.ss, cpu.rflags = event.addr, event.value, event.cs, event.ss, event.rflags
        cpu.home = self.home_of(cpu.rsp)
        cpu.ring_gap = None
        to_kernel = event.cs is not None and x86.cpl(event.cs) == 0 and event.value is not None
        if frame is not None and frame.ring_gap is not None and to_kernel and event.value == frame.saved.rsp:
            cpu.ring_gap = RingGap(frame.ring_gap, event.value)
        self.observe_a(cpu, event, event.cs, event.value, unblocks=False)
        # 7. is the caller's

    def popped_level(self, event: ModelEvent) -> int | None:
        """The stack level in the CS word that an ERETS popped."""
        byte = None if event.rsp is None else self.byte(event.rsp + 18)
        return None if byte is None else byte & 3

    @staticmethod
    def popped(event: ModelEvent) -> Context:
        return Context(event.addr, event.cs, event.rflags, event.value, event.ss, None)

    def frame_at(self, event: ModelEvent) -> ModelFrame | None:
        """F: the newest open frame of this CPU at R, else of any."""
        if event.rsp is None:
            return None
        if event.arg in (Return.ERETU, Return.ERETS):
            there = [f for f in self.frames if f.fred and f.lo == event.rsp]
        else:
            there = [f for f in self.frames if f.rip_addr == event.rsp]
        mine = [f for f in there if f.cpu == event.cpu] or there
        return mine[-1] if mine else None

    def close_consumed(self, cpu: ModelCpu, frame: ModelFrame, why: Settle) -> None:
        cpu.consumed.append(frame.entry)
        self.close(frame, why)

    # -- step 2 -----------------------------------------------------------------------------------------------------

    def consume(self, cpu: ModelCpu, event: ModelEvent, frame: ModelFrame, popped: Context) -> None:
        """A return pops the bytes of an open frame."""
        differ = [slot for slot in SLOT_BITS if differs(slot, getattr(frame.saved, slot), getattr(popped, slot))]
        foreign = [slot for slot in differ if self.is_foreign(frame, slot, getattr(popped, slot))]
        if not differ:
            told = None not in (popped.rip, popped.rsp, frame.saved.rip, frame.saved.rsp)
            if frame.status == FrameStatus.CLOBBERED and told:
                self.settle(frame, Rule.FRAME_RELOCATED, Evidence.RECORDED, event.index, Settle.RETURN)
        elif foreign and (frame.status == FrameStatus.CLOBBERED or "rip" in foreign or "rsp" in foreign):
            writer = self.delivery_at(frame.slot_addr(foreign[0]))
            assert writer is not None
            if frame.status == FrameStatus.CLOBBERED:
                finding = self.settle(frame, Rule.FRAME_CONSUMED_CORRUPT, Evidence.RECORDED, event.index, Settle.RETURN)
            else:
                finding = self.raise_finding(
                    Rule.FRAME_CONSUMED_CORRUPT,
                    Evidence.RECORDED,
                    event,
                    lo=frame.slot_addr(foreign[0]),
                    hi=frame.slot_addr(foreign[-1]) + 8,
                    slots=mask_of(foreign),
                    differ=mask_of(foreign),
                    victim=replace(frame),
                    writer=writer,
                )
            finding.consumer, finding.popped = event.index, popped
            rip, rsp = popped.rip, popped.rsp
            if (
                ("rip" in differ or "rsp" in differ)
                and rip is not None
                and rsp is not None
                and (rip, rsp) == (writer.saved.rip, writer.saved.rsp)
                and frame.cpu == writer.cpu == event.cpu
            ):
                loop = self.raise_finding(
                    Rule.RESUME_LOOP,
                    Evidence.RECORDED,
                    event,
                    lo=frame.lo,
                    hi=frame.hi,
                    victim=replace(frame),
                    writer=writer,
                    consumer=event.index,
                    popped=popped,
                )
                assert event.rsp is not None
                cpu.loop, cpu.loop_finding, cpu.loop_victim = (event.rsp, rip, rsp), loop.number, frame.entry
        self.close_consumed(cpu, frame, Settle.RETURN)

    def is_foreign(self, frame: ModelFrame, slot: str, popped: int) -> bool:
        """The compared bytes are the popped ones, and another delivery wrote the lowest."""
        at = frame.slot_addr(slot)
        value = self.number_at(at, SLOT_BITS[slot] // 8)
        writer = self.delivery_at(at)
        return value is not None and not differs(slot, value, popped) and writer is not None and writer.entry != frame.entry

    # -- step 3 -----------------------------------------------------------------------------------------------------

    def copied(self, event: ModelEvent, popped: Context) -> ModelFrame | None:
        """a. The newest frame whose own values a return elsewhere popped."""
        wanted = (popped.rip, popped.cs, popped.rsp, popped.ss)
        if None in wanted:
            return None
        for frame in reversed(self.frames):
            saved = frame.saved
            if frame.cpu == event.cpu and frame.own and (saved.rip, saved.cs, saved.rsp, saved.ss) == wanted:
                return frame
        return None

    def nested(self, cpu: ModelCpu, event: ModelEvent, popped: Context) -> None:
        """b. R is unknown: deliveries and returns nest, as far as the popped words do not contradict it."""
        own = [f for f in self.frames if f.cpu == event.cpu and f.own]
        other = {f.entry for f in own if any(differs(s, getattr(f.saved, s), getattr(popped, s)) for s in SLOT_BITS)}
        if any(f.depth == cpu.depth and f.entry in other for f in own) and popped.rip is not None:
            further = [f.depth for f in own if f.depth < cpu.depth and f.saved.rip is not None and f.entry not in other]
            if further:
                cpu.depth, other = max(further), set()
        for frame in own:
            if frame.depth >= cpu.depth and frame.entry not in other:
                self.close(frame, Settle.NESTING)

    def shifted(self, cpu: ModelCpu, event: ModelEvent) -> ModelFrame | None:
        """c. The frame that an IRET with the wrong idea of an error code popped."""
        if event.arg in (Return.ERETU, Return.ERETS) or event.rsp is None:
            return None
        faulted = bool(event.flags & Flag.FAULTED)
        for frame in reversed(self.frames):
            if frame.cpu != event.cpu or frame.fred:
                continue
            if not frame.has_code and frame.rip_addr == event.rsp - 8:
                as_rip = frame.saved.cs
            elif frame.has_code and frame.rip_addr == event.rsp + 8:
                as_rip = frame.saved.code
            else:
                continue
            if event.addr is None:
                if not faulted:
                    return None
            elif as_rip != event.addr:
                return None
            rule, evidence = Rule.ERROR_CODE_MISMATCH, Evidence.RECORDED
            self.fold(
                cpu, (rule, evidence, min(frame.vector, 32)), rule, evidence, event, lo=frame.lo, hi=frame.hi,
                victim=replace(frame), consumer=event.index, popped=self.popped(event),
            )  # fmt: skip
            if not faulted:
                self.close_consumed(cpu, frame, Settle.RETURN)
            return frame
        return None

    def unmatched(self, cpu: ModelCpu, event: ModelEvent, popped: Context) -> None:
        """e. A return pops what a delivery stored, but that frame was consumed already."""
        if not self.returns_recorded or event.rsp is None or popped.rip is None or popped.rsp is None:
            return
        at = event.rsp + (8 if event.arg in (Return.ERETU, Return.ERETS) else 0)
        writer = self.delivery_at(at)
        if (
            popped.cs is not None
            and x86.cpl(popped.cs) == 0  # user code can be resumed twice in one place
            and at + 40 <= MASK
            and (self.number_at(at), self.number_at(at + 24)) == (popped.rip, popped.rsp)
            and writer is not None
            and self.delivery_at(at + 24) is writer
            and (writer.saved.rip, writer.saved.rsp) == (popped.rip, popped.rsp)
            and writer.entry in cpu.consumed
        ):
            self.fold(
                cpu, (Rule.UNMATCHED_RETURN,), Rule.UNMATCHED_RETURN, Evidence.RECORDED, event, lo=at, hi=at + 40,
                writer=writer, consumer=event.index, popped=popped,
            )  # fmt: skip

    # -- step 4 -----------------------------------------------------------------------------------------------------

    def unblock_by_iret(self, cpu: ModelCpu, event: ModelEvent, frame: ModelFrame | None) -> None:
        if cpu.nmi.blocked is not False:
            self.unblock(cpu, event, frame)

    def end_blocking(self, cpu: ModelCpu, event: ModelEvent, frame: ModelFrame | None) -> None:
        if event.arg not in (Return.ERETU, Return.ERETS):
            self.unblock_by_iret(cpu, event, frame)
        elif event.code is not None:
            if event.code & FRED_NMI_BIT:
                self.unblock_by_iret(cpu, event, frame)
            elif frame is not None and cpu.nmi.blocked and cpu.nmi.since == frame.entry:
                self.nmi_stuck(cpu, event, Evidence.RECORDED, replace(frame))
        elif frame is not None:
            if frame.source == Source.NMI:
                self.unblock_by_iret(cpu, event, frame)
        elif cpu.nmi.blocked is not False:
            cpu.nmi.blocked = None
