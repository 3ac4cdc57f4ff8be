"""The slow model: all other events (replay.md, "Other events")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from model_records import MASK, Bytes, ModelCpu, ModelEvent, ModelIdt, ModelStack, ModelTss, Msrs, Nmi, RingGap, bytes_of
from model_return import Resume

from tracedbg import x86
from tracedbg.layout import Gate
from tracedbg.state import EventFlag as Flag
from tracedbg.state import Evidence, FrameStatus, Kind, Mismatch, Rule, Shadow, ShutdownReason, Source

WRITE_MAX = 4096
MSR_MCG_STATUS = 0x17A
MSR_X2APIC_TPR = 0x808
PLAIN_MSRS = {
    0xC0000081: "star", 0xC0000082: "lstar", 0xC0000084: "fmask", 0x174: "sysenter_cs", 0x175: "sysenter_esp",
    0x176: "sysenter_eip", 0x1D0: "stklvls", 0x1D4: "config",
}  # fmt: skip
MSR_FRED_CONFIG = 0x1D4
MSR_FRED_RSP0 = 0x1CC


def find_base(tables: Sequence[ModelTss | ModelIdt], base: int | None) -> int | None:
    """The table with that base, if there is one."""
    return next((n for n, table in enumerate(tables) if base is not None and table.base == base), None)


def selectors(base: int | None) -> tuple[int | None, int | None]:
    """CS and SS that a fast system call loads."""
    return (None, None) if base is None else (base & 0xFFFC, (base & 0xFFFC) + 8 & 0xFFFF)


class Events(Resume):
    """One method for an event, in the order of the table."""

    def enter(self, cpu: ModelCpu, event: ModelEvent, after_delivery: int | None) -> None:
        if after_delivery is not None:
            detail = 0
            for name, bit in (("rsp", Mismatch.ENTER_RSP), ("rip", Mismatch.ENTER_RIP), ("cs", Mismatch.ENTER_CS)):
                seen, computed = getattr(event, name), getattr(cpu, name)
                if seen is not None and computed is not None and seen != computed:
                    detail |= bit
            if detail:
                self.raise_finding(Rule.MODEL_MISMATCH, Evidence.RECORDED, event, detail=detail, cause_event=after_delivery)
        for name in ("rip", "rsp", "cs", "ss", "rflags"):
            if getattr(event, name) is not None:
                setattr(cpu, name, getattr(event, name))
        if event.rsp is not None:
            cpu.home = self.stack_of(event.rsp)

    # -- memory -----------------------------------------------------------------------------------------------------

    def write(self, cpu: ModelCpu, event: ModelEvent) -> None:
        data = self.written(event)
        if event.addr is None or data is None:
            self.stats.bad_events += 1
            return
        self.stats.writes += 1
        if cpu.home is not None and cpu.home.named and not cpu.home.assumed:
            self.neighbours(cpu, event, cpu.home, event.addr, data)
        self.store(event.addr, data, event.index)

    def written(self, event: ModelEvent) -> Bytes | None:
        """The bytes that a write event stores; None: it does not make sense."""
        if not event.flags & Flag.BYTES:
            return bytes_of(event.value, event.arg) if event.arg is not None and 1 <= event.arg <= 8 else None
        if event.code is None or not 1 <= event.code <= WRITE_MAX:
            return None
        if event.value is None:
            return [None] * event.code
        payload = self.trace.payload
        if event.value + event.code > len(payload):
            return None
        return list(payload[event.value : event.value + event.code])

    def neighbours(self, cpu: ModelCpu, event: ModelEvent, home: ModelStack, addr: int, data: Bytes) -> None:
        """A push below the stack, or a write that may be one."""
        push = event.rsp is not None and event.rsp == addr
        end = addr + len(data)
        if push and addr < home.lo:
            self.raise_overflow(cpu, event, Evidence.RECORDED, home, addr, min(end, home.lo), None)
        elif event.rsp is not None:
            return
        below = self.stack_of(home.lo)
        if not below.named or below == home or below.hi != home.lo:
            return
        new = {addr + n: byte for n, byte in enumerate(data) if addr + n <= MASK}
        for victim in list(self.frames):
            if victim.stack != below or victim.status == FrameStatus.CLOBBERED or not victim.overlaps(addr, end):
                continue
            slots, differ = self.slots_hit(victim, new)
            if differ and not victim.neighbour:
                victim.neighbour = True
                evidence = Evidence.RECORDED if push else Evidence.INFERRED
                self.raise_finding(
                    Rule.NEIGHBOUR_OVERWRITE, evidence, event, lo=max(victim.lo, addr), hi=min(victim.hi, end), slots=slots,
                    differ=differ, victim=replace(victim),
                )  # fmt: skip

    def move(self, event: ModelEvent) -> None:
        for frame in reversed(self.frames):
            if frame.cpu == event.cpu and frame.status == FrameStatus.LIVE and event.addr in (frame.lo, frame.rip_addr):
                assert event.addr is not None
                frame.status = FrameStatus.MOVED
                if event.value is not None:
                    self.store(event.value, [self.byte(a) for a in range(event.addr, frame.hi)], event.index)
                return

    # -- registers and tables ---------------------------------------------------------------------------------------

    def setsp(self, cpu: ModelCpu, event: ModelEvent) -> None:
        cpu.rsp, cpu.home = event.value, self.home_of(event.value)
        cpu.ring_gap = None

    def flags(self, cpu: ModelCpu, event: ModelEvent) -> None:
        before = cpu.if_set
        cpu.rflags = event.rflags
        self.maskable_window(cpu, event, before)

    def set_shadow(self, cpu: ModelCpu, event: ModelEvent) -> None:
        before = cpu.if_set
        if event.arg == 0:
            cpu.shadow = (Shadow.STI, event.index)
            if cpu.rflags is not None:
                cpu.rflags |= x86.RFLAGS_IF
            self.maskable_window(cpu, event, before)
        elif event.arg == 1:
            cpu.shadow = (Shadow.MOV_SS, event.index)

    def tss_slot(self, cpu: ModelCpu, event: ModelEvent) -> None:
        if event.arg is None or not (event.arg <= 2 or 9 <= event.arg <= 15):
            self.stats.bad_events += 1
        elif cpu.tss is not None and event.arg <= 2:
            self.tss[cpu.tss].rsp[event.arg] = event.value
        elif cpu.tss is not None:
            self.tss[cpu.tss].ist[event.arg - 8] = event.value

    def gate(self, cpu: ModelCpu, event: ModelEvent) -> None:
        if event.arg is None:
            self.stats.bad_events += 1
            return
        if cpu.idt is None:
            return
        gates = self.idts[cpu.idt].gates
        if event.value is None or event.cs is None or event.code is None:
            gates.pop(event.arg, None)
            return
        code = event.code
        gates[event.arg] = Gate(event.value, event.cs, code & 7, code >> 8 & 15, code >> 13 & 3, bool(code >> 15 & 1))

    def ltr_lidt(self, cpu: ModelCpu, event: ModelEvent) -> None:
        if event.kind == Kind.LTR:
            cpu.tss = find_base(self.tss, event.value)
        else:
            cpu.idt = find_base(self.idts, event.value)

    # -- fast system calls ------------------------------------------------------------------------------------------

    def syscall(self, cpu: ModelCpu, event: ModelEvent) -> None:
        self.observe_a(cpu, event, event.cs, event.rsp, unblocks=True)
        if cpu.fred:
            cpu.registers_unknown()
            cpu.home = None
            return
        m = cpu.msrs
        cpu.rsp = cpu.rsp if event.rsp is None else event.rsp
        cpu.rip = m.lstar if event.addr is None else event.addr
        cpu.cs, cpu.ss = selectors(None if m.star is None else m.star >> 32)
        cpu.rflags = None if event.rflags is None or m.fmask is None else event.rflags & ~m.fmask
        mov_ss = cpu.shadow is not None and cpu.shadow[0] == Shadow.MOV_SS
        cpu.ring_gap = RingGap(event.index, event.rsp, cpu.shadow[1] if cpu.shadow is not None and mov_ss else None)

    def sysenter(self, cpu: ModelCpu, event: ModelEvent) -> None:
        self.observe_a(cpu, event, event.cs, event.rsp, unblocks=True)
        m = cpu.msrs
        cpu.rip = m.sysenter_eip if event.addr is None else event.addr
        cpu.rsp, cpu.home = m.sysenter_esp, self.home_of(m.sysenter_esp)
        cpu.cs, cpu.ss = selectors(m.sysenter_cs)
        cpu.rflags = None if event.rflags is None else event.rflags & ~x86.RFLAGS_IF
        cpu.ring_gap = None

    def sysret(self, cpu: ModelCpu, event: ModelEvent) -> None:
        assert event.cpu is not None
        if event.flags & Flag.FAULTED:
            cpu.rsp = cpu.rsp if event.rsp is None else event.rsp
            cpu.ring_gap = RingGap(event.index, event.rsp)
            return
        star = cpu.msrs.star
        cpu.rip, cpu.rflags = event.addr, None
        cpu.cs = None if star is None else (star >> 48) + 16 & 0xFFFF | 3
        cpu.ss = None if star is None else (star >> 48) + 8 & 0xFFFF | 3
        if event.rsp is not None:
            cpu.rsp = cpu.user_rsp = event.rsp
        cpu.ring_gap = None
        closed = self.close_observed(cpu, event, self.seen_at_cpl3(event.cpu), unblocks=False)
        self.stuck_if_blocked(cpu, event, closed, outer=True)

    # -- requests and masks -----------------------------------------------------------------------------------------

    def request(self, cpu: ModelCpu, event: ModelEvent) -> None:
        """RAISE"""
        if event.arg == x86.NMI and event.source == Source.NMI and cpu.nmi.blocked:
            if cpu.nmi_pending:
                self.fold(cpu, (Rule.NMI_LOST,), Rule.NMI_LOST, Evidence.RECORDED, event, cause_event=cpu.nmi.since)
            cpu.nmi_pending = True
        self.illegal_vector(cpu, event, None)
        if event.source == Source.FIXED and event.arg is not None and 16 <= event.arg < 32 and self.held_by_tpr(cpu, event.arg):
            key = (Rule.HELD_VECTOR, event.arg)
            self.fold(cpu, key, Rule.HELD_VECTOR, Evidence.RECORDED, event, detail=event.arg)

    def smi(self, cpu: ModelCpu) -> None:
        if not cpu.smm:
            cpu.smm, cpu.smm_kept, cpu.smm_iret = True, replace(cpu.nmi), None
            cpu.nmi.blocked = True

    def rsm(self, cpu: ModelCpu, event: ModelEvent) -> None:
        cpu.registers_unknown()
        cpu.home = None
        if cpu.smm:
            cpu.smm = False
            cpu.nmi = replace(cpu.smm_kept)
            if cpu.smm_iret is not None:
                cpu.nmi = Nmi(False, cpu.smm_kept.since, cpu.smm_iret, None)
                cpu.nmi_stuck = False
            self.nmi_window(cpu, event, cpu.smm_kept.blocked)

    def unblocked(self, cpu: ModelCpu, event: ModelEvent) -> None:
        if event.arg == 1:
            cpu.gif = True
            return
        before = cpu.nmi.blocked
        self.unblock(cpu, event, None)
        self.nmi_window(cpu, event, before)

    def msr(self, cpu: ModelCpu, event: ModelEvent) -> None:
        code, value = event.code, event.value
        if code == MSR_MCG_STATUS:
            before, cpu.mcg_status_seen = cpu.mcip, True
            cpu.mcip = None if value is None else bool(value >> 2 & 1)
            self.mc_window(cpu, event, before)
        elif code == MSR_X2APIC_TPR:
            cpu.tpr = None if value is None else value & 0xFF
        elif code in PLAIN_MSRS:
            setattr(cpu.msrs, PLAIN_MSRS[code], value)
            if code == MSR_FRED_CONFIG:
                cpu.csl = cpu.msrs.level
        elif code is not None and MSR_FRED_RSP0 <= code < MSR_FRED_RSP0 + 4:
            cpu.msrs.fred_rsp[code - MSR_FRED_RSP0] = value

    def cr(self, cpu: ModelCpu, event: ModelEvent) -> None:
        value = event.value
        if event.arg == 4:
            cpu.mce = None if value is None else bool(value >> 6 & 1)
            cpu.fred = cpu.fred if value is None else bool(value >> 32 & 1)
        elif event.arg == 8:
            cpu.tpr = None if value is None else (value & 15) << 4

    def gs(self, cpu: ModelCpu, event: ModelEvent) -> None:
        if event.arg == 0:
            cpu.gs = None if cpu.gs is None else not cpu.gs
        elif event.arg == 1:
            cpu.gs = None if event.value is None else bool(event.value >> 63)

    def token(self, cpu: ModelCpu, event: ModelEvent) -> None:
        if event.arg is None or not 1 <= event.arg <= 7 or event.value is None:
            return
        cpu.tokens[event.arg] = bool(event.value & 1)
        if event.code is not None and event.code & event.value & 1:
            self.token_busy(cpu, event, event.arg, Evidence.RECORDED, None)

    # -- guests, the ends of things ---------------------------------------------------------------------------------

    def vmexit(self, cpu: ModelCpu, event: ModelEvent) -> None:
        cpu.rip, cpu.rsp, cpu.cs, cpu.ss, cpu.rflags = event.rip, event.rsp, event.cs, event.ss, event.rflags
        cpu.home = self.home_of(cpu.rsp)
        cpu.ring_gap, cpu.guest = None, False
        if event.arg == 1:
            cpu.gif = False
        elif event.source == Source.NMI:
            self.block(cpu, event)

    def vmentry(self, cpu: ModelCpu) -> None:
        cpu.registers_unknown()
        cpu.home = cpu.ring_gap = None
        cpu.guest = cpu.gif = True

    def forget(self, cpu: ModelCpu) -> None:
        """What init and gap have in common."""
        cpu.registers_unknown()
        cpu.home = cpu.user_rsp = cpu.csl = cpu.gs = cpu.mcip = None
        cpu.tokens.clear()
        cpu.nmi, cpu.nmi_pending, cpu.nmi_stuck = Nmi(), False, False
        cpu.failed = cpu.failed_before = cpu.loop = None
        cpu.consumed.clear()
        cpu.depth = 0
        cpu.tokens_raised.clear()
        cpu.smm = cpu.guest = False
        cpu.shadow = cpu.ring_gap = None

    def init(self, cpu: ModelCpu, event: ModelEvent) -> None:
        assert event.cpu is not None
        for frame in self.frames_of(event.cpu):
            self.drop(frame, event.index)
        self.forget(cpu)
        cpu.tss = cpu.idt = None
        cpu.msrs = Msrs()
        cpu.fred, cpu.mce, cpu.tpr, cpu.gif, cpu.gap = False, False, 0, True, False
        if event.arg == 0:
            cpu.nmi.blocked = cpu.mcip = False

    def shutdown(self, cpu: ModelCpu, event: ModelEvent) -> None:
        last = cpu.failed
        double = last is not None and last.is_exception and last.vector == x86.DOUBLE_FAULT
        if event.arg == ShutdownReason.TRIPLE_FAULT or (event.arg is None and double):
            self.raise_finding(Rule.TRIPLE_FAULT, Evidence.RECORDED, event, **self.last_failed(cpu))
        else:
            detail = ShutdownReason.OTHER if event.arg is None else event.arg
            self.raise_finding(Rule.SHUTDOWN, Evidence.RECORDED, event, detail=int(detail))

    def gap(self, event: ModelEvent, numbers: list[int]) -> None:
        self.stats.gaps += 1
        self.raise_finding(Rule.TRACE_GAP, Evidence.RECORDED, event)
        for frame in [f for f in self.frames if f.cpu in numbers]:
            self.drop(frame, event.index)
        for number in numbers:
            cpu = self.cpus[number]
            self.forget(cpu)
            cpu.mce = cpu.tpr = cpu.gif = None
            cpu.gap = True
        self.memory.clear()
