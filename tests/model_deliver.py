"""The slow model: a delivery (replay.md, "Delivery", but step 4)."""

from __future__ import annotations

from dataclasses import replace

from model_place import MASKABLE, Place
from model_records import Failed, ModelCpu, ModelEvent, ModelFrame, ModelStack

from tracedbg import x86
from tracedbg.state import Cause, Evidence, FrameStatus, Mismatch, Rule, Settle, Source
from tracedbg.state import EventFlag as Flag

CONTRIBUTORY = (0, 10, 11, 12, 13, 21)
PAGE_FAULTS = (14, 20)


def makes_double_fault(first: int, second: int) -> bool:
    """The table of double faults (R20)."""
    if first in CONTRIBUTORY:
        return second in CONTRIBUTORY
    return first in PAGE_FAULTS and second in CONTRIBUTORY + PAGE_FAULTS


class Deliver(Place):
    """Steps 1-10."""

    def deliver(self, cpu: ModelCpu, event: ModelEvent) -> None:
        if event.flags & (Flag.LEGACY | Flag.SMM) or cpu.smm:
            self.stats.legacy += 1
            cpu.registers_unknown()
            cpu.home = None
            return
        if cpu.guest and self.guests:
            self.stats.deliveries += 1
            self.stats.unjudged += 1
            cpu.registers_unknown()
            cpu.home = None
            return
        cpu.rip, cpu.rsp, cpu.cs, cpu.ss, cpu.rflags = event.rip, event.rsp, event.cs, event.ss, event.rflags
        gap = cpu.ring_gap
        if gap is not None and None not in (gap.rsp, event.rsp) and event.rsp != gap.rsp:
            cpu.ring_gap = None
        if event.flags & Flag.FAILED:
            self.deliver_failed(cpu, event)
        else:
            self.deliver_whole(cpu, event)
            cpu.depth += 1

    def deliver_failed(self, cpu: ModelCpu, event: ModelEvent) -> None:
        self.stats.failed += 1
        frame = self.place(cpu, event)  # by what was known before D: D is not a failed delivery before itself
        last = Failed(event.index, event.arg, event.source == Source.EXCEPTION, (event.rip, event.code, event.value))
        cpu.failed, cpu.failed_before = last, cpu.failed
        if frame is not None:
            if frame.ist and cpu.tokens.get(frame.ist):
                self.token_busy(cpu, event, frame.ist, Evidence.COMPUTED, replace(frame))
            if event.addr:
                frame = frame.cut(event.addr)
                if frame.dedicated:
                    self.overwrite(cpu, event, frame)
                self.store_frame(frame)
        self.block(cpu, event)
        if event.source == Source.NMI and not self.nmi_fail_blocks:
            cpu.nmi.blocked = None

    def deliver_whole(self, cpu: ModelCpu, event: ModelEvent) -> None:
        self.stats.deliveries += 1
        # 1. Observe
        self.observe(cpu, event)
        # 2. Findings about the event itself; their writer is the frame, where it can be placed
        frame = self.place(cpu, event)  # before step 3: FRED asks for failed deliveries before D
        self.judge_event(cpu, event, self.unplaced(event) if frame is None else replace(frame))
        self.judge_masks(cpu, event, frame)
        # 3. Forget
        cpu.failed = cpu.failed_before = None
        cpu.tokens_raised.clear()
        # 4. Place
        if frame is None:
            self.stats.unjudged += 1
            cpu.registers_unknown()
            cpu.home = None
            self.block(cpu, event)
            return
        self.stats.judged += 1
        self.stats.ist_deliveries[frame.ist] += 1
        self.no_error_code(cpu, event, frame)
        outer = event.cs is not None and x86.cpl(event.cs) != 0
        # 5. User stack, overflow, neighbours
        if not frame.dedicated and not outer:
            self.user_stack(cpu, event, frame)
        self.overflow(cpu, event, frame)
        self.overwrite_neighbours(event, frame)
        # 6. Overwrite
        if frame.dedicated:
            self.overwrite(cpu, event, frame)
        elif outer:
            for other in self.on(frame.stack, frame.cpu):
                if other.status != FrameStatus.CLOBBERED and other.overlaps(frame.lo, frame.hi):
                    self.close(other, Settle.CPL3)
        # 7. Store, open
        self.store_frame(frame)
        frame.depth = cpu.depth
        self.open(frame)
        gap, cpu.ring_gap = cpu.ring_gap, None
        if gap is not None and gap.rsp is not None and gap.rsp == event.rsp:
            frame.ring_gap = gap.event
        if frame.ist in cpu.tokens:
            cpu.tokens[frame.ist] = True
        # 8. Masking
        self.block(cpu, event)
        # 9. Registers
        self.new_registers(cpu, event, frame, outer)
        cpu.placed = event.index
        # 10. Windows
        self.delivery_windows(cpu, event, frame)

    # -- steps 2 and 4: the event itself ----------------------------------------------------------------------------

    def judge_event(self, cpu: ModelCpu, event: ModelEvent, writer: ModelFrame) -> None:
        fakes = (
            (x86.NMI, (Source.NMI, Source.SYSCALL), Rule.FAKE_NMI),  # FRED's vector 2 of SYSENTER
            (x86.MACHINE_CHECK, (Source.MC,), Rule.FAKE_MCE),
        )
        for vector, genuine, rule in fakes:
            if event.arg == vector and event.source not in (None, *genuine):
                self.fold(cpu, (rule, event.source), rule, Evidence.RECORDED, event, writer=writer)
        self.illegal_vector(cpu, event, writer)
        if event.arg == x86.DOUBLE_FAULT and event.source == Source.EXCEPTION:
            self.raise_finding(Rule.DOUBLE_FAULT, Evidence.RECORDED, event, writer=writer, **self.last_failed(cpu))

    @staticmethod
    def last_failed(cpu: ModelCpu) -> dict[str, object]:
        """The last two failed deliveries, as a double or triple fault names them."""
        return {
            "cause_event": None if cpu.failed is None else cpu.failed.event,
            "cause_frame": None if cpu.failed_before is None else cpu.failed_before.event,
        }

    def judge_masks(self, cpu: ModelCpu, event: ModelEvent, frame: ModelFrame | None) -> None:
        """`model-mismatch`, in the order of the page."""
        vector, source = event.arg, event.source
        if_clear = event.rflags is not None and not event.rflags & x86.RFLAGS_IF
        if source in (Source.FIXED, Source.EXTINT, Source.EXTERNAL) and if_clear:
            self.mismatch(cpu, event, Mismatch.IF_CLEAR)
        if source == Source.NMI and cpu.nmi.blocked and self.returns_recorded:
            self.mismatch(cpu, event, Mismatch.NMI_BLOCKED)
        if not cpu.fred and self.gate_refuses(cpu, event):
            self.mismatch(cpu, event, Mismatch.GATE)
        if source == Source.MC and (cpu.mce is False or (cpu.mcip and cpu.mcg_status_seen)):
            self.mismatch(cpu, event, Mismatch.MC_SHUTDOWN)
        if source == Source.FIXED and vector is not None and self.held_by_tpr(cpu, vector):
            self.mismatch(cpu, event, Mismatch.TPR)
        if source == Source.EXCEPTION and vector is not None and self.against_the_table(cpu, event):
            self.mismatch(cpu, event, Mismatch.DOUBLE_FAULT)
        if source in (Source.NMI, Source.FIXED, Source.EXTINT, Source.EXTERNAL) and cpu.gif is False:
            self.mismatch(cpu, event, Mismatch.GIF)
        if frame is not None and frame.ist and cpu.tokens.get(frame.ist):
            self.mismatch(cpu, event, Mismatch.TOKEN)

    def gate_refuses(self, cpu: ModelCpu, event: ModelEvent) -> bool:
        gate = self.gate_of(cpu, event.arg)
        if gate is None:
            return False
        if not gate.present or gate.type not in (x86.GATE_INTERRUPT, x86.GATE_TRAP):
            return True
        may_be_int1 = event.arg == 1 and event.code in (1, None)
        if event.source == Source.SOFT_INT and not may_be_int1 and event.cs is not None and x86.cpl(event.cs) > gate.dpl:
            return True
        base = self.idt_base(cpu, event, gate)
        return base is not None and not x86.is_canonical(base)

    @staticmethod
    def held_by_tpr(cpu: ModelCpu, vector: int) -> bool:
        return vector >= 16 and cpu.tpr is not None and vector >> 4 <= cpu.tpr >> 4

    @staticmethod
    def against_the_table(cpu: ModelCpu, event: ModelEvent) -> bool:
        last, vector = cpu.failed, event.arg
        assert vector is not None
        if last is None or not last.is_exception or last.vector is None:
            return False
        if vector == x86.DOUBLE_FAULT:
            return last.vector not in CONTRIBUTORY + PAGE_FAULTS
        again = (last.vector, *last.told) == (vector, event.rip, event.code, event.value)
        return makes_double_fault(last.vector, vector) and not again

    def no_error_code(self, cpu: ModelCpu, event: ModelEvent, frame: ModelFrame) -> None:
        """The handler of such a vector drops an error code that is not there (R4)."""
        if frame.fred or frame.has_code or frame.vector not in x86.ERROR_CODE_VECTORS:
            return
        if event.source not in (None, Source.EXCEPTION):
            self.fold(
                cpu, (Rule.ERROR_CODE_MISMATCH, Evidence.INFERRED, frame.vector), Rule.ERROR_CODE_MISMATCH, Evidence.INFERRED,
                event, lo=frame.lo, hi=frame.hi, writer=replace(frame),
            )  # fmt: skip

    def token_busy(self, cpu: ModelCpu, event: ModelEvent, ist: int, evidence: Evidence, writer: ModelFrame | None) -> None:
        """Once for an IST until a delivery succeeds."""
        assert event.cpu is not None
        if ist in cpu.tokens_raised:
            return
        cpu.tokens_raised.add(ist)
        victim = next((f for f in reversed(list(self.frames_of(event.cpu))) if f.ist == ist), None)
        lo, hi = (0, 0) if victim is None else (victim.lo, victim.hi)
        self.raise_finding(Rule.TOKEN_BUSY, evidence, event, detail=ist, lo=lo, hi=hi, victim=victim, writer=writer)

    # -- step 5 -----------------------------------------------------------------------------------------------------

    def user_stack(self, cpu: ModelCpu, event: ModelEvent, frame: ModelFrame) -> None:
        """Without a stack switch."""
        gap = cpu.ring_gap
        in_gap = gap is not None and gap.rsp is not None and gap.rsp == event.rsp
        cause: tuple[Cause, int | None, int | None] = (Cause.NONE, None, None)
        if gap is not None and in_gap:
            cause = (Cause.RING_GAP, gap.event, None)
            if event.arg == 1 and event.source == Source.EXCEPTION and gap.shadow is not None:
                cause = (Cause.MOV_SS, gap.shadow, gap.event)
        if in_gap or any(frame.overlaps(r.lo, r.hi) for r in self.user_regions):
            evidence = Evidence.COMPUTED
        elif self.user_regions or frame.stack.named or cpu.user_rsp is None or event.rsp is None:
            return
        elif abs(cpu.user_rsp - event.rsp) < 4096:
            evidence = Evidence.INFERRED
        else:
            return
        self.raise_finding(
            Rule.USER_STACK, evidence, event, lo=frame.lo, hi=frame.hi, writer=replace(frame),
            cause=cause[0], cause_event=cause[1], cause_frame=cause[2],
        )  # fmt: skip

    def overflow(self, cpu: ModelCpu, event: ModelEvent, frame: ModelFrame) -> None:
        stack = frame.stack
        if stack.named and not stack.assumed and frame.lo < stack.lo:
            self.raise_overflow(cpu, event, Evidence.COMPUTED, stack, frame.lo, stack.lo, replace(frame))

    def overwrite_neighbours(self, event: ModelEvent, frame: ModelFrame) -> None:
        stack = frame.stack
        if frame.lo >= stack.lo:
            return
        below = self.stack_of(stack.lo)
        if not frame.dedicated and not (stack.named and (not stack.assumed or below.named)):
            return
        chain = self.chain(frame.cpu, event.rsp)
        new = frame.bytes()
        for victim in [f for f in self.frames if f.stack == below and f.overlaps(frame.lo, stack.lo)]:
            slots, differ = self.slots_hit(victim, new)
            if victim.status == FrameStatus.CLOBBERED:
                victim.clobbered_by = event.index
            elif differ:
                victim.finding = self.raise_finding(
                    Rule.NEIGHBOUR_OVERWRITE, self.evidence(victim, chain), event, lo=max(victim.lo, frame.lo),
                    hi=min(victim.hi, frame.hi), slots=slots, differ=differ, victim=replace(victim), writer=replace(frame),
                ).number  # fmt: skip
                victim.status, victim.clobbered_by = FrameStatus.CLOBBERED, event.index

    def raise_overflow(
        self, cpu: ModelCpu, event: ModelEvent, evidence: Evidence, stack: ModelStack, lo: int, hi: int, writer: ModelFrame | None
    ) -> None:
        """Counted instead if the CPU's last one is of the same stack."""
        if cpu.overflow is not None and cpu.overflow[0] == stack:
            self.findings[cpu.overflow[1]].count += 1
            return
        finding = self.raise_finding(Rule.STACK_OVERFLOW, evidence, event, lo=lo, hi=hi, writer=writer)
        cpu.overflow = stack, finding.number

    # -- step 6 -----------------------------------------------------------------------------------------------------

    def overwrite(self, cpu: ModelCpu, event: ModelEvent, frame: ModelFrame) -> None:
        """A dedicated frame."""
        chain = self.chain(frame.cpu, event.rsp)
        new = frame.bytes()
        for victim in list(self.frames):
            if victim.stack != frame.stack or not victim.overlaps(frame.lo, frame.hi):
                continue
            slots, differ = self.slots_hit(victim, new)
            cause, cause_event, cause_frame = self.cause(cpu, event, victim)
            facts: dict[str, object] = {
                "lo": max(victim.lo, frame.lo),
                "hi": min(victim.hi, frame.hi),
                "slots": slots,
                "differ": differ,
                "cause": cause,
                "cause_event": cause_event,
                "cause_frame": cause_frame,
                "victim": replace(victim),
                "writer": frame,
            }
            evidence = self.evidence(victim, chain)
            if victim.status == FrameStatus.MOVED:
                self.raise_finding(Rule.FRAME_RELOCATED, Evidence.RECORDED, event, **facts)
                self.close(victim, Settle.OVERWRITTEN)
            elif victim.status == FrameStatus.CLOBBERED:
                victim.clobbered_by = event.index
            elif (
                not self.returns_recorded
                and event.source == Source.NMI
                and cpu.nmi.blocked
                and victim.source == Source.NMI
                and victim.cpu == event.cpu
                and victim.entry == cpu.nmi.since
                and victim.entry not in chain
            ):
                self.close(victim, Settle.NMI)
            elif not differ:
                victim.clobbered_by = event.index
                if victim.finding is None:
                    victim.finding = self.raise_finding(Rule.FRAME_SAME_BYTES, evidence, event, **facts).number
                else:
                    self.findings[victim.finding].count += 1
            else:
                victim.clobbered_by = event.index
                victim.status = FrameStatus.CLOBBERED
                victim.finding = self.raise_finding(Rule.FRAME_CLOBBERED, evidence, event, **facts).number
                frame.victim = victim.entry  # in entry order: the newest stays

    def evidence(self, victim: ModelFrame, chain: set[int]) -> Evidence:
        """Whether the victim was live is known, or only likely."""
        return Evidence.COMPUTED if self.returns_recorded or victim.entry in chain else Evidence.INFERRED

    @staticmethod
    def cause(cpu: ModelCpu, event: ModelEvent, victim: ModelFrame) -> tuple[Cause, int | None, int | None]:
        nmi = cpu.nmi
        if victim.cpu != event.cpu:
            return Cause.OTHER_CPU, None, None
        if event.source == Source.NMI:
            if nmi.blocked or (nmi.blocked is None and not victim.source):
                return Cause.NMI_UNKNOWN, None, None
            if nmi.since is not None and nmi.unblocked_by is not None and nmi.unblocked_by > victim.entry:
                return Cause.NMI_UNBLOCKED, nmi.unblocked_by, nmi.unblock_frame
            return Cause.NMI_NEVER_BLOCKED, None, None
        if event.source == Source.MC:
            return Cause.MC_UNMASKED, None, None
        if event.source in MASKABLE:
            return Cause.MASKABLE, None, None
        return (Cause.SOFTWARE if event.source else Cause.NONE), None, None

    # -- steps 7 and 9 ----------------------------------------------------------------------------------------------

    def store_frame(self, frame: ModelFrame) -> None:
        for addr, byte in frame.bytes().items():
            self.store(addr, [byte], frame.entry)
        self.stored[frame.entry] = frame

    def new_registers(self, cpu: ModelCpu, event: ModelEvent, frame: ModelFrame, outer: bool) -> None:
        cpu.rsp, cpu.home = frame.lo, frame.stack
        cpu.rip, selector = frame.handler
        if frame.fred:
            if outer:
                star = cpu.msrs.star
                cpu.cs = None if star is None else star >> 32 & 0xFFFC
                cpu.ss = None if cpu.cs is None else cpu.cs + 8 & 0xFFFF
                cpu.gs = None if cpu.gs is None else True
            cpu.rflags, cpu.csl = 2, frame.level
            return
        cpu.cs = selector
        if self.ss_zeroed and frame.ist:
            cpu.ss = 0
        elif event.cs is None:
            cpu.ss = None  # whether CPL changed is not known
        elif outer:
            cpu.ss = 0
        if cpu.rflags is not None:
            cpu.rflags &= ~(x86.RFLAGS_TF | x86.RFLAGS_NT | x86.RFLAGS_RF)
            if frame.gate_type == x86.GATE_INTERRUPT:
                cpu.rflags &= ~x86.RFLAGS_IF
