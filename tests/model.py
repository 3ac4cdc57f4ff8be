"""A slow model of the replay: the oracle that the C core is compared with.

Written from tracedbg/help/replay.md alone, in its order and with its words, and for reading, not for speed: memory is a
dict of bytes, frames are small mutable records, stacks are computed when asked for. It never looks at csrc.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from tracedbg import wire, x86
from tracedbg.layout import REGION_STACK, REGION_USER, SLOT_RSP0, Fidelity, Gate, Region
from tracedbg.state import (
    NO_EVENT,
    Cause,
    Context,
    CpuState,
    Evidence,
    FrameStatus,
    Kind,
    Known,
    Mismatch,
    Rule,
    Settle,
    ShutdownReason,
    Source,
    Word,
)
from tracedbg.state import EventFlag as Flag
from tracedbg.state import Frame as StateFrame
from tracedbg.trace import Trace

__all__ = ["Fnv", "Model", "ModelEvent", "ModelFinding", "ModelFrame", "decode"]

MASK = (1 << 64) - 1
MSR_MCG_STATUS = 0x17A
FRAMES_PER_STACK = 64
WATCHED_PER_CPU = 256
CHAIN_STEPS = 64
WRITE_MAX = 4096
SLOTS = ("rip", "cs", "rflags", "rsp", "ss", "code")  # bit numbers of slot masks
FNV_PRIME = 0x100000001B3
FNV_POWERS = tuple(pow(FNV_PRIME, n, 1 << 64) for n in range(9))
SLOT_BITS = {"rip": 64, "cs": 16, "rflags": 32, "rsp": 64, "ss": 16}


@dataclass
class ModelEvent:
    """One record; a field that is not known is None. `source` 0 counts as not known."""

    index: int
    kind: int
    rip: int | None
    rsp: int | None
    addr: int | None
    value: int | None
    rflags: int | None
    code: int | None
    cpu: int | None
    cs: int | None
    ss: int | None
    arg: int | None
    source: int | None
    flags: int


def decode(trace: Trace, index: int) -> ModelEvent:
    """Read one record, also one of an unknown kind."""
    values = wire.EVENT_PACK.unpack_from(trace.events, index * wire.EVENT_SIZE)
    (_, rip, rsp, addr, value, rflags, code, _, cpu, cs, ss, known, kind, arg, source, flags) = values

    def have(bit: Known, number: int) -> int | None:
        return number if known & bit else None

    return ModelEvent(
        index,
        kind,
        have(Known.RIP, rip),
        have(Known.RSP, rsp),
        have(Known.ADDR, addr),
        have(Known.VALUE, value),
        have(Known.RFLAGS, rflags),
        have(Known.CODE, code),
        have(Known.CPU, cpu),
        have(Known.CS, cs),
        have(Known.SS, ss),
        have(Known.ARG, arg),
        have(Known.SOURCE, source) or None,
        flags,
    )


@dataclass(frozen=True)
class ModelStack:
    """A stack: bytes [lo, hi), addresses (lo, hi]. slot 1-8 of a named one is per CPU."""

    lo: int
    hi: int
    named: bool
    slot: int

    @property
    def per_cpu(self) -> bool:
        return self.named and 1 <= self.slot <= SLOT_RSP0


@dataclass
class ModelFrame:
    """What one delivery stored."""

    entry: int
    cpu: int
    vector: int
    source: int
    ist: int
    gate_type: int
    lo: int
    hi: int
    stack: ModelStack
    saved: Context
    has_code: bool
    status: FrameStatus = FrameStatus.LIVE
    clobbered_by: int | None = None
    victim: int | None = None
    finding: int | None = None

    @property
    def rip_addr(self) -> int:
        return self.hi - 40

    def overlaps(self, lo: int, hi: int) -> bool:
        return self.lo < hi and lo < self.hi

    def slot_addr(self, slot: str) -> int:
        """Address of a word, from hi down: SS, RSP, RFLAGS, CS, RIP, error code."""
        return self.hi - {"ss": 8, "rsp": 16, "rflags": 24, "cs": 32, "rip": 40, "code": 48}[slot]

    def words(self) -> list[tuple[int, int | None]]:
        """Address and value of each word in the order of the pushes."""
        names = ["ss", "rsp", "rflags", "cs", "rip"] + (["code"] if self.has_code else [])
        return [(self.slot_addr(name), getattr(self.saved, name)) for name in names]

    def state(self) -> StateFrame:
        """As the Python interface shows it."""
        return StateFrame(
            entry=self.entry,
            cpu=self.cpu,
            vector=self.vector,
            source=Source(self.source),
            ist=self.ist,
            lo=self.lo,
            hi=self.hi,
            saved=self.saved,
            status=self.status,
            has_code=self.has_code,
            gate_type=self.gate_type,
            stack_lo=self.stack.lo,
            stack_hi=self.stack.hi,
            clobbered_by=self.clobbered_by,
            victim=self.victim,
            finding=self.finding,
        )


@dataclass
class ModelFinding:
    """One verdict; the fields of state.Finding."""

    number: int
    rule: Rule
    raised_rule: Rule
    evidence: Evidence
    event: int
    cpu: int
    lo: int = 0
    hi: int = 0
    slots: int = 0
    differ: int = 0
    detail: int = 0
    cause: Cause = Cause.NONE
    cause_event: int | None = None
    cause_frame: int | None = None
    victim: ModelFrame | None = None
    writer: ModelFrame | None = None
    settled: int | None = None
    settled_by: Settle | None = None
    settled_evidence: Evidence = Evidence.UNKNOWN
    consumer: int | None = None
    popped: Context | None = None
    count: int = 1


@dataclass
class ModelCpu:
    """State of one CPU; None: unknown or none."""

    tss: int | None = None
    idt: int | None = None
    rip: int | None = None
    rsp: int | None = None
    cs: int | None = None
    ss: int | None = None
    rflags: int | None = None
    user_rsp: int | None = None
    event: int | None = None
    nmi_blocked: bool | None = None
    nmi_pending: bool = False
    nmi_since: int | None = None
    nmi_unblocked_by: int | None = None
    nmi_unblock_frame: int | None = None
    mcip: bool | None = None
    gap: bool = False
    placed: int | None = None  # the last event of this CPU, if it was a placed delivery
    failed: int | None = None
    failed_before: int | None = None
    loop: tuple[int, int, int] | None = None  # R, RIP, RSP
    loop_finding: int = 0
    fakes: dict[tuple[Rule, int], int] = field(default_factory=dict)  # rule and source -> finding
    mismatches: dict[Mismatch, int] = field(default_factory=dict)  # kind -> finding


@dataclass
class ModelTss:
    base: int
    rsp: list[int | None]
    ist: list[int | None]


@dataclass
class ModelIdt:
    base: int
    gates: dict[int, Gate]


@dataclass
class ModelStats:
    events: int = 0
    deliveries: int = 0
    judged: int = 0
    unjudged: int = 0
    legacy: int = 0
    failed: int = 0
    returns: int = 0
    writes: int = 0
    gaps: int = 0
    bad_events: int = 0
    settled: list[int] = field(default_factory=lambda: [0] * len(Settle))
    ist_deliveries: list[int] = field(default_factory=lambda: [0] * 8)


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


class Model:
    """Replays a trace from its beginning, one event after the other."""

    def __init__(self, trace: Trace, *, max_frames: int = 65536, iret_fault_unblocks: bool = True) -> None:
        layout = trace.layout
        self.trace = trace
        self.max_frames = max_frames
        self.iret_fault_unblocks = iret_fault_unblocks
        self.returns_recorded = bool(layout.fidelity & Fidelity.RETURNS)
        self.ss_zeroed = bool(layout.fidelity & Fidelity.SS_ZEROED)
        self.tss = [ModelTss(t.base, list(t.rsp), list(t.ist)) for t in layout.tss]
        self.idts = [ModelIdt(i.base, dict(i.gates)) for i in layout.idts]
        self.cpus = [ModelCpu() for _ in range(trace.cpus)]
        for cpu, tables in zip(self.cpus, layout.cpus, strict=False):
            cpu.tss, cpu.idt = tables.tss, tables.idt
        self.stacks: list[Region] = sorted((r for r in layout.regions if r.kind == REGION_STACK), key=lambda r: (r.hi, r.lo))
        self.stack_tops = [r.hi for r in self.stacks]
        self.user_regions = [r for r in layout.regions if r.kind == REGION_USER]
        self.memory: dict[int, tuple[int | None, int | None]] = {}  # address -> byte (None: unknown), writer (None: initial)
        for memory in trace.memory:
            for offset, byte in enumerate(memory.data):
                self.memory[memory.addr + offset] = (byte, None)
        self.frames: list[ModelFrame] = []  # open, in entry order
        self.stored: dict[int, ModelFrame] = {}  # what each delivery stored, open or not
        self.findings: list[ModelFinding] = []
        self.stats = ModelStats()
        self.position = 0

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
            return
        if event.cpu is None:
            if event.kind == Kind.GAP:
                self.gap(event, list(range(len(self.cpus))))
            else:
                self.stats.bad_events += 1
            return
        if event.cpu >= len(self.cpus):
            self.stats.bad_events += 1
            return
        cpu = self.cpus[event.cpu]
        after_delivery, cpu.placed = cpu.placed, None
        cpu.event = index
        match event.kind:
            case Kind.DELIVER:
                self.deliver(cpu, event)
            case Kind.ENTER:
                self.enter(cpu, event, after_delivery)
            case Kind.RETURN:
                self.ret(cpu, event)
            case Kind.WRITE:
                self.write(event)
            case Kind.MOVE:
                self.move(event)
            case Kind.SETSP:
                cpu.rsp = event.value
            case Kind.FLAGS:
                cpu.rflags = event.rflags
            case Kind.TSS:
                self.tss_slot(cpu, event)
            case Kind.GATE:
                self.gate(cpu, event)
            case Kind.LTR:
                cpu.tss = find_base(self.tss, event.value)
            case Kind.LIDT:
                cpu.idt = find_base(self.idts, event.value)
            case Kind.SYSCALL:
                cpu.cs = cpu.ss = cpu.rip = cpu.rflags = None
            case Kind.SYSENTER:
                cpu.cs = cpu.ss = cpu.rip = cpu.rflags = cpu.rsp = None
            case Kind.SYSRET:
                cpu.cs = cpu.ss = cpu.rip = cpu.rflags = None
                self.close_observed(cpu, event, self.seen_at_cpl3(event.cpu), unblocks=False)
            case Kind.RAISE:
                if event.arg == x86.NMI and event.source == Source.NMI and cpu.nmi_blocked:
                    cpu.nmi_pending = True
            case Kind.RSM:
                self.registers_unknown(cpu)
            case Kind.UNBLOCK:
                cpu.nmi_blocked, cpu.nmi_unblocked_by, cpu.nmi_unblock_frame = False, index, None
            case Kind.MSR:
                if event.code == MSR_MCG_STATUS:
                    cpu.mcip = None if event.value is None else bool(event.value >> 2 & 1)
            case Kind.INIT:
                self.init(cpu, event)
            case Kind.SHUTDOWN:
                detail = ShutdownReason.OTHER if event.arg is None else event.arg
                self.raise_finding(Rule.SHUTDOWN, Evidence.RECORDED, event, detail=int(detail))
            case Kind.GAP:
                self.gap(event, [event.cpu])

    # -- stacks and memory ------------------------------------------------------------------------------------------

    def stack_of(self, addr: int) -> ModelStack:
        """The named region with the smallest hi >= addr if its lo < addr, or the 16 KiB block."""
        at = bisect.bisect_left(self.stack_tops, addr)
        if at < len(self.stacks) and self.stacks[at].lo < addr:
            region = self.stacks[at]
            return ModelStack(region.lo, region.hi, True, region.slot)
        block = (addr - 1 & MASK) >> 14
        return ModelStack(block << 14, min(block + 1 << 14, MASK), False, 0)

    def on(self, stack: ModelStack, cpu: int) -> list[ModelFrame]:
        """Open frames on a stack: those of the CPU, of any CPU if the stack is not a named one."""
        return [f for f in self.frames if f.stack == stack and (f.cpu == cpu or not stack.named)]

    def store(self, addr: int, data: Iterable[int | None], event: int) -> None:
        for offset, byte in enumerate(data):
            if addr + offset <= MASK:  # nothing goes on at 0
                self.memory[addr + offset] = (byte, event)

    def byte(self, addr: int) -> int | None:
        return self.memory.get(addr, (None, None))[0]

    # -- findings and frames ----------------------------------------------------------------------------------------

    def raise_finding(self, rule: Rule, evidence: Evidence, event: ModelEvent, **fields: object) -> ModelFinding:
        finding = ModelFinding(len(self.findings), rule, rule, evidence, event.index, 0xFFFF if event.cpu is None else event.cpu)
        finding = replace(finding, **fields)  # type: ignore[arg-type]
        self.findings.append(finding)
        return finding

    def settle(self, frame: ModelFrame, rule: Rule, evidence: Evidence, event: int, why: Settle) -> ModelFinding:
        """The fate of a clobbered frame became known."""
        assert frame.finding is not None
        finding = self.findings[frame.finding]
        finding.rule, finding.settled, finding.settled_by, finding.settled_evidence = rule, event, why, evidence
        return finding

    def close(self, frame: ModelFrame, why: Settle) -> None:
        self.frames = [f for f in self.frames if f is not frame]
        if frame.ist:
            self.stats.settled[why] += 1

    def open(self, frame: ModelFrame) -> None:
        self.frames.append(frame)
        same = [f for f in self.frames if f.stack == frame.stack]
        if len(same) > FRAMES_PER_STACK:
            self.close(same[0], Settle.DROPPED)
        if len(self.frames) > self.max_frames:
            self.close(self.frames[0], Settle.DROPPED)
        watched = [f for f in self.frames if f.cpu == frame.cpu and self.on_cpus_own(f)]
        if len(watched) > WATCHED_PER_CPU:
            self.close(watched[0], Settle.DROPPED)

    @staticmethod
    def on_cpus_own(frame: ModelFrame) -> bool:
        """Whether the frame lies on an IST or a per-CPU stack."""
        return bool(frame.ist) or frame.stack.per_cpu

    # -- delivery ---------------------------------------------------------------------------------------------------

    def deliver(self, cpu: ModelCpu, event: ModelEvent) -> None:
        assert event.cpu is not None
        if event.flags & Flag.LEGACY:
            self.stats.legacy += 1
            self.registers_unknown(cpu)
            return
        # 1. The interrupted registers
        cpu.rip, cpu.rsp, cpu.cs, cpu.ss, cpu.rflags = event.rip, event.rsp, event.cs, event.ss, event.rflags
        if event.flags & Flag.FAILED:
            self.stats.failed += 1
            cpu.failed, cpu.failed_before = event.index, cpu.failed
            frame = self.place(cpu, event)
            if frame is not None and event.addr is not None:
                self.stored[event.index] = frame
                for addr, value in frame.words()[: event.addr]:
                    self.store(addr, bytes_of(value, 8), event.index)
            return
        self.stats.deliveries += 1
        # 2. What the interrupted context says
        self.observe(cpu, event)
        # 3. Findings about the event itself; their writer is the frame, where it can be placed
        frame = self.place(cpu, event)
        writer = self.unplaced(event) if frame is None else replace(frame)
        if event.arg == x86.NMI and event.source not in (None, Source.NMI):
            self.fake(cpu, event, Rule.FAKE_NMI, writer)
        if event.arg == x86.MACHINE_CHECK and event.source not in (None, Source.MC):
            self.fake(cpu, event, Rule.FAKE_MCE, writer)
        if event.arg == x86.DOUBLE_FAULT and event.source == Source.EXCEPTION:
            self.raise_finding(
                Rule.DOUBLE_FAULT,
                Evidence.RECORDED,
                event,
                cause_event=cpu.failed,
                cause_frame=cpu.failed_before,
                writer=writer,
            )
        cpu.failed = cpu.failed_before = None
        if (
            event.source in (Source.FIXED, Source.EXTINT, Source.EXTERNAL)
            and event.rflags is not None
            and not event.rflags & x86.RFLAGS_IF
        ):
            self.mismatch(cpu, event, Mismatch.IF_CLEAR)
        if event.source == Source.NMI and cpu.nmi_blocked and self.returns_recorded:
            self.mismatch(cpu, event, Mismatch.NMI_BLOCKED)
        # 4. Place
        if frame is None:
            self.stats.unjudged += 1
            self.registers_unknown(cpu)
            self.block(cpu, event)
            return
        self.stats.judged += 1
        self.stats.ist_deliveries[frame.ist] += 1
        outer = event.cs is not None and x86.cpl(event.cs) != 0
        # 5. User stack
        if frame.ist == 0 and not outer:
            self.user_stack(cpu, event, frame)
        # 6. Overwrite
        if frame.ist:
            self.overwrite(cpu, event, frame)
        elif outer:
            for other in list(self.frames):
                if (
                    other.stack == frame.stack
                    and (other.cpu == frame.cpu or not other.stack.named)
                    and other.status != FrameStatus.CLOBBERED
                    and other.overlaps(frame.lo, frame.hi)
                ):
                    self.close(other, Settle.CPL3)
        # 7. Store, open, new state
        for addr, value in frame.words():
            self.store(addr, bytes_of(value, 8), event.index)
        self.stored[event.index] = frame
        self.open(frame)
        self.block(cpu, event)
        gate = self.gate_of(cpu, event)
        assert gate is not None
        cpu.rsp, cpu.rip, cpu.cs = frame.lo, gate.offset, gate.selector
        if self.ss_zeroed and frame.ist:
            cpu.ss = 0
        elif event.cs is None:
            cpu.ss = None  # whether CPL changed is not known
        elif x86.cpl(event.cs) != 0:
            cpu.ss = 0
        if cpu.rflags is not None:
            cpu.rflags &= ~(x86.RFLAGS_TF | x86.RFLAGS_NT | x86.RFLAGS_RF)
            if gate.type == x86.GATE_INTERRUPT:
                cpu.rflags &= ~x86.RFLAGS_IF
        cpu.placed = event.index

    def registers_unknown(self, cpu: ModelCpu) -> None:
        cpu.rip = cpu.rsp = cpu.cs = cpu.ss = cpu.rflags = None

    def block(self, cpu: ModelCpu, event: ModelEvent) -> None:
        if event.source == Source.NMI:
            cpu.nmi_blocked, cpu.nmi_since, cpu.nmi_pending = True, event.index, False
            cpu.nmi_unblocked_by = cpu.nmi_unblock_frame = None
        if event.source == Source.MC:
            cpu.mcip = True

    def fake(self, cpu: ModelCpu, event: ModelEvent, rule: Rule, writer: ModelFrame) -> None:
        assert event.source is not None
        known = cpu.fakes.get((rule, event.source))
        if known is None:
            finding = self.raise_finding(rule, Evidence.RECORDED, event, writer=writer)
            cpu.fakes[rule, event.source] = finding.number
        else:
            self.findings[known].count += 1

    def mismatch(self, cpu: ModelCpu, event: ModelEvent, detail: Mismatch) -> None:
        known = cpu.mismatches.get(detail)
        if known is None:
            finding = self.raise_finding(Rule.MODEL_MISMATCH, Evidence.COMPUTED, event, detail=int(detail))
            cpu.mismatches[detail] = finding.number
        else:
            self.findings[known].count += 1

    def unplaced(self, event: ModelEvent) -> ModelFrame:
        """A delivery of which nothing is known yet but the event."""
        assert event.cpu is not None
        saved = Context(event.rip, event.cs, event.rflags, event.rsp, event.ss, None)
        stack = ModelStack(0, 0, False, 0)
        return ModelFrame(event.index, event.cpu, event.arg or 0, event.source or 0, 0, 0, 0, 0, stack, saved, False)

    def gate_of(self, cpu: ModelCpu, event: ModelEvent) -> Gate | None:
        if cpu.idt is None or event.arg is None:
            return None
        return self.idts[cpu.idt].gates.get(event.arg)

    def place(self, cpu: ModelCpu, event: ModelEvent) -> ModelFrame | None:
        assert event.cpu is not None
        gate = self.gate_of(cpu, event)
        if gate is None or not gate.present or gate.type not in (x86.GATE_INTERRUPT, x86.GATE_TRAP):
            return None
        assert event.arg is not None
        base: int | None = None
        if gate.ist:
            base = None if cpu.tss is None else self.tss[cpu.tss].ist[gate.ist]
        elif event.cs is None:
            base = None
        elif x86.cpl(event.cs) != 0:
            base = None if cpu.tss is None else self.tss[cpu.tss].rsp[0]
        else:
            base = event.rsp
        if base is None or not x86.is_canonical(base):
            return None
        is_exception = event.source == Source.EXCEPTION
        has_code = event.arg in x86.ERROR_CODE_VECTORS and (is_exception or not event.source)
        if has_code and not event.source and event.code is None:
            return None  # 40 or 48 bytes: unknown
        size = 48 if has_code else 40
        hi = base & ~15
        if hi < size:
            return None
        rip, rflags = event.rip, event.rflags
        if event.source == Source.SOFT_INT:
            rip = None if rip is None or event.code is None else (rip + event.code) & MASK
        if rflags is not None and is_exception and event.arg in x86.FAULT_VECTORS:
            rflags |= x86.RFLAGS_RF
        saved = Context(rip, event.cs, rflags, event.rsp, event.ss, event.code if has_code else None)
        return ModelFrame(
            entry=event.index,
            cpu=event.cpu,
            vector=event.arg,
            source=event.source or 0,
            ist=gate.ist,
            gate_type=gate.type,
            lo=hi - size,
            hi=hi,
            stack=self.stack_of(hi),
            saved=saved,
            has_code=has_code,
        )

    def user_stack(self, cpu: ModelCpu, event: ModelEvent, frame: ModelFrame) -> None:
        evidence = None
        if self.user_regions:
            if any(frame.overlaps(r.lo, r.hi) for r in self.user_regions):
                evidence = Evidence.COMPUTED
        elif (
            not frame.stack.named
            and cpu.user_rsp is not None
            and event.rsp is not None
            and abs(cpu.user_rsp - event.rsp) < 4096
        ):
            evidence = Evidence.INFERRED
        if evidence is not None:
            self.raise_finding(Rule.USER_STACK, evidence, event, lo=frame.lo, hi=frame.hi, writer=replace(frame))

    def overwrite(self, cpu: ModelCpu, event: ModelEvent, frame: ModelFrame) -> None:
        chain = self.chain(event)
        new = {addr + n: byte for addr, value in frame.words() for n, byte in enumerate(bytes_of(value, 8))}
        for victim in list(self.frames):
            if victim.stack != frame.stack or not victim.overlaps(frame.lo, frame.hi):
                continue
            slots = differ = 0
            for bit, slot in enumerate(SLOTS):
                if slot == "code" and not victim.has_code:
                    continue
                at = victim.slot_addr(slot)
                hit = [a for a in range(at, at + 8) if a in new]
                if hit:
                    slots |= 1 << bit
                if any(new[a] is None or self.byte(a) is None or new[a] != self.byte(a) for a in hit):
                    differ |= 1 << bit
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
            evidence = Evidence.COMPUTED if self.returns_recorded or victim.entry in chain else Evidence.INFERRED
            if victim.status == FrameStatus.MOVED:
                self.raise_finding(Rule.FRAME_RELOCATED, Evidence.RECORDED, event, **facts)
                self.close(victim, Settle.OVERWRITTEN)
            elif victim.status == FrameStatus.CLOBBERED:
                victim.clobbered_by = event.index
            elif (
                not self.returns_recorded
                and event.source == Source.NMI
                and cpu.nmi_blocked
                and victim.cpu == event.cpu
                and victim.entry == cpu.nmi_since
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

    def cause(self, cpu: ModelCpu, event: ModelEvent, victim: ModelFrame) -> tuple[Cause, int | None, int | None]:
        if victim.cpu != event.cpu:
            return Cause.OTHER_CPU, None, None
        if event.source == Source.NMI:
            if cpu.nmi_blocked or (cpu.nmi_blocked is None and not victim.source):
                return Cause.NMI_UNKNOWN, None, None
            if (
                cpu.nmi_since is not None
                and cpu.nmi_unblocked_by is not None
                and cpu.nmi_unblocked_by > victim.entry
            ):
                return Cause.NMI_UNBLOCKED, cpu.nmi_unblocked_by, cpu.nmi_unblock_frame
            return Cause.NMI_NEVER_BLOCKED, None, None
        if event.source == Source.MC:
            return Cause.MC_UNMASKED, None, None
        if event.source in (Source.FIXED, Source.EXTINT, Source.EXTERNAL, Source.INJECTED):
            return Cause.MASKABLE, None, None
        if not event.source:
            return Cause.NONE, None, None
        return Cause.SOFTWARE, None, None

    def chain(self, event: ModelEvent) -> set[int]:
        """Entries of the frames that are live as far as the interrupted RSP shows."""
        assert event.cpu is not None
        taken: set[int] = set()
        cur = event.rsp
        for _ in range(CHAIN_STEPS):
            if cur is None:
                break
            above = [f for f in self.on(self.stack_of(cur), event.cpu) if f.rip_addr >= cur]
            if not above:
                break
            frame = min(above, key=lambda f: (f.rip_addr, -f.entry))
            if frame.entry in taken:
                break
            taken.add(frame.entry)
            while (
                frame.saved.rsp is not None
                and self.stack_of(frame.saved.rsp) == frame.stack
                and frame.saved.rsp <= frame.rip_addr
                and frame.victim is not None
            ):
                victim = next((f for f in self.frames if f.entry == frame.victim), None)
                if victim is None or victim.entry in taken:
                    return taken
                taken.add(victim.entry)
                frame = victim
            if frame.saved.cs is None or x86.cpl(frame.saved.cs) != 0 or frame.saved.rsp is None:
                break
            cur = frame.saved.rsp
        return taken

    # -- observe ----------------------------------------------------------------------------------------------------

    def seen_at_cpl3(self, cpu: int) -> dict[int, Settle]:
        """Test a without the RSP part: the frames that it closes."""
        return {
            f.entry: Settle.CPL3
            for f in self.frames
            if f.cpu == cpu and self.on_cpus_own(f) and f.status != FrameStatus.CLOBBERED
        }

    def observe(self, cpu: ModelCpu, event: ModelEvent) -> None:
        assert event.cpu is not None
        number, rip, rsp = event.cpu, event.rip, event.rsp
        a: dict[int, Settle] = {}
        b: dict[int, Settle] = {}
        c: dict[int, Settle] = {}
        d: dict[int, Settle] = {}
        if event.cs is not None and x86.cpl(event.cs) != 0:
            if rsp is not None and x86.cpl(event.cs) == 3:
                cpu.user_rsp = rsp
            a = self.seen_at_cpl3(number)
        if rsp is not None:
            here = self.stack_of(rsp)
            for frame in self.on(here, number):
                if frame.status != FrameStatus.CLOBBERED and rsp > frame.rip_addr:
                    b[frame.entry] = Settle.POPPED
            for frame in self.frames:
                saved = frame.saved
                if frame.cpu != number or not frame.ist or saved.rsp is None:
                    continue
                home = self.stack_of(saved.rsp)
                if home == frame.stack:
                    continue
                if rip is not None and saved.rip == rip and saved.rsp == rsp:
                    c[frame.entry] = Settle.CONTEXT
                elif here == home and rsp >= saved.rsp:
                    c[frame.entry] = Settle.ABOVE
            if not self.returns_recorded and event.rflags is not None and event.rflags & x86.RFLAGS_IF:
                for frame in self.frames:
                    if (
                        frame.cpu == number
                        and frame.status != FrameStatus.CLOBBERED
                        and frame.ist
                        and frame.gate_type == x86.GATE_INTERRUPT
                        and frame.stack != here
                    ):
                        d[frame.entry] = Settle.IF
        self.close_observed(cpu, event, {**d, **c, **b, **a})

    def close_observed(
        self, cpu: ModelCpu, event: ModelEvent, reasons: dict[int, Settle], *, unblocks: bool = True
    ) -> None:
        for frame in list(self.frames):
            why = reasons.get(frame.entry)
            if why is None:
                continue
            if frame.status == FrameStatus.CLOBBERED:
                self.settle(frame, Rule.FRAME_RELOCATED, Evidence.INFERRED, event.index, why)
            self.close(frame, why)
            if unblocks and not self.returns_recorded and cpu.nmi_blocked and frame.cpu == event.cpu:
                if cpu.nmi_since is None or frame.entry < cpu.nmi_since:
                    continue  # entered before NMIs were blocked: what left it says nothing
                cpu.nmi_blocked = False
                cpu.nmi_unblocked_by, cpu.nmi_unblock_frame = event.index, frame.entry

    # -- return -----------------------------------------------------------------------------------------------------

    def ret(self, cpu: ModelCpu, event: ModelEvent) -> None:
        assert event.cpu is not None
        self.stats.returns += 1
        if event.flags & Flag.FAULTED:
            if self.iret_fault_unblocks:
                self.unblock_by_return(cpu, event, None)
            return
        if event.flags & Flag.LEGACY:
            self.unblock_by_return(cpu, event, None)
            self.registers_unknown(cpu)
            return
        popped = Context(event.addr, event.cs, event.rflags, event.value, event.ss, None)
        frame: ModelFrame | None = None
        if event.rsp is not None:
            there = [f for f in self.frames if f.rip_addr == event.rsp]
            mine = [f for f in there if f.cpu == event.cpu]
            frame = (mine or there or [None])[-1]
        if frame is not None:
            self.consume(cpu, event, frame, popped)
        else:
            frame = self.copied(event, popped)
            if frame is not None:
                if frame.status == FrameStatus.CLOBBERED:
                    self.settle(frame, Rule.FRAME_RELOCATED, Evidence.RECORDED, event.index, Settle.COPY)
                self.close(frame, Settle.COPY)
            elif cpu.loop is not None and (event.rsp, event.addr, event.value) == cpu.loop:
                self.findings[cpu.loop_finding].count += 1
        self.unblock_by_return(cpu, event, frame)
        cpu.rip, cpu.rsp, cpu.cs, cpu.ss, cpu.rflags = event.addr, event.value, event.cs, event.ss, event.rflags
        if event.cs is not None and x86.cpl(event.cs) != 0:
            if event.value is not None and x86.cpl(event.cs) == 3:
                cpu.user_rsp = event.value
            self.close_observed(cpu, event, self.seen_at_cpl3(event.cpu))

    def unblock_by_return(self, cpu: ModelCpu, event: ModelEvent, frame: ModelFrame | None) -> None:
        if cpu.nmi_blocked is not False:
            cpu.nmi_blocked, cpu.nmi_unblocked_by = False, event.index
            cpu.nmi_unblock_frame = None if frame is None else frame.entry

    def consume(self, cpu: ModelCpu, event: ModelEvent, frame: ModelFrame, popped: Context) -> None:
        """A return pops the bytes of an open frame."""
        differ = [slot for slot in SLOT_BITS if differs(slot, getattr(frame.saved, slot), getattr(popped, slot))]
        foreign = [slot for slot in differ if self.is_foreign(frame, slot, getattr(popped, slot))]
        if not differ:
            told = None not in (popped.rip, popped.rsp, frame.saved.rip, frame.saved.rsp)
            if frame.status == FrameStatus.CLOBBERED and told:
                self.settle(frame, Rule.FRAME_RELOCATED, Evidence.RECORDED, event.index, Settle.RETURN)
        elif foreign and (frame.status == FrameStatus.CLOBBERED or "rip" in foreign or "rsp" in foreign):
            entry = self.memory[frame.slot_addr(foreign[0])][1]
            assert entry is not None
            writer = self.stored[entry]
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
                cpu.loop, cpu.loop_finding = (event.rsp, rip, rsp), loop.number
        self.close(frame, Settle.RETURN)

    def is_foreign(self, frame: ModelFrame, slot: str, popped: int) -> bool:
        at = frame.slot_addr(slot)
        data = [self.byte(at + n) for n in range(8)]
        if None in data:
            return False
        value = sum(byte << 8 * n for n, byte in enumerate(data) if byte is not None)
        writer = self.memory[at][1]
        return (
            not differs(slot, value, popped)
            and writer is not None
            and writer in self.stored
            and writer != frame.entry
        )

    def copied(self, event: ModelEvent, popped: Context) -> ModelFrame | None:
        """The newest frame whose own values a return elsewhere popped."""
        wanted = (popped.rip, popped.cs, popped.rsp, popped.ss)
        if None in wanted:
            return None
        for frame in reversed(self.frames):
            saved = frame.saved
            if frame.cpu == event.cpu and self.on_cpus_own(frame) and (saved.rip, saved.cs, saved.rsp, saved.ss) == wanted:
                return frame
        return None

    # -- other events -----------------------------------------------------------------------------------------------

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

    def write(self, event: ModelEvent) -> None:
        data = self.written(event)
        if event.addr is None or data is None:
            self.stats.bad_events += 1
            return
        self.stats.writes += 1
        self.store(event.addr, data, event.index)

    def written(self, event: ModelEvent) -> list[int | None] | None:
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

    def move(self, event: ModelEvent) -> None:
        for frame in reversed(self.frames):
            if (
                frame.cpu == event.cpu
                and frame.status == FrameStatus.LIVE
                and event.addr in (frame.lo, frame.rip_addr)
            ):
                assert event.addr is not None
                frame.status = FrameStatus.MOVED
                if event.value is not None:
                    self.store(event.value, [self.byte(a) for a in range(event.addr, frame.hi)], event.index)
                return

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

    def init(self, cpu: ModelCpu, event: ModelEvent) -> None:
        for frame in [f for f in self.frames if f.cpu == event.cpu]:
            self.close(frame, Settle.DROPPED)
        self.registers_unknown(cpu)
        cpu.user_rsp = cpu.failed = cpu.failed_before = cpu.loop = None
        cpu.tss = cpu.idt = None
        reset = event.arg == 0
        cpu.nmi_blocked, cpu.nmi_pending = False if reset else None, False
        cpu.nmi_since = cpu.nmi_unblocked_by = cpu.nmi_unblock_frame = None
        cpu.mcip = False if reset else None
        cpu.gap = False

    def gap(self, event: ModelEvent, numbers: list[int]) -> None:
        self.stats.gaps += 1
        self.raise_finding(Rule.TRACE_GAP, Evidence.RECORDED, event)
        for frame in [f for f in self.frames if f.cpu in numbers]:
            self.close(frame, Settle.DROPPED)
        for number in numbers:
            cpu = self.cpus[number]
            self.registers_unknown(cpu)
            cpu.user_rsp = cpu.failed = cpu.failed_before = cpu.loop = None
            cpu.nmi_blocked, cpu.nmi_pending = None, False
            cpu.nmi_since = cpu.nmi_unblocked_by = cpu.nmi_unblock_frame = None
            cpu.mcip = None
            cpu.gap = True
        self.memory.clear()

    # -- results ----------------------------------------------------------------------------------------------------

    def cpu_state(self, number: int) -> CpuState:
        """As Replay.cpu() shows it."""
        c = self.cpus[number]
        return CpuState(
            number, c.rip, c.rsp, c.cs, c.ss, c.rflags, c.user_rsp, c.event, c.nmi_blocked, c.nmi_pending, c.nmi_since,
            c.nmi_unblocked_by, c.nmi_unblock_frame, c.mcip, c.gap, c.tss, c.idt,
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
        for c in self.cpus:
            fields = (c.rip, c.rsp, c.cs, c.ss, c.rflags, c.nmi_blocked, c.mcip, c.user_rsp)
            hash_.word(sum(1 << n for n, value in enumerate(fields) if value is not None))
            hash_.words(value or 0 for value in (c.rip, c.rsp, c.cs, c.ss, c.rflags, c.user_rsp))
            hash_.word(none(c.event))
            hash_.words((int(c.nmi_blocked or 0), int(c.nmi_pending)))
            hash_.words((none(c.nmi_since), none(c.nmi_unblocked_by), none(c.nmi_unblock_frame)))
            hash_.words((int(c.mcip or 0), int(c.gap)))
            hash_.words(MASK if table is None else table for table in (c.tss, c.idt))
        for f in self.frames:
            hash_.words((f.entry, f.cpu, f.vector, f.source, f.ist, f.status, f.lo, f.hi))
            s = f.saved
            hash_.words(value or 0 for value in (s.rip, s.cs, s.rflags, s.rsp, s.ss, s.code))
            bits = (
                (s.rip, Known.RIP), (s.rsp, Known.RSP), (s.rflags, Known.RFLAGS),
                (s.code, Known.CODE), (s.cs, Known.CS), (s.ss, Known.SS),
            )  # fmt: skip
            hash_.word(sum(int(bit) for value, bit in bits if value is not None))
            hash_.words((none(f.clobbered_by), none(f.victim), none(f.finding)))
        for word in self.word_list():
            hash_.words((word.addr, word.value, word.known))
            hash_.words(none(writer) for writer in word.writers)
        hash_.word(len(self.findings))
        for finding in self.findings:
            hash_.words((self.rule_at(finding, self.position), finding.evidence, finding.cause, finding.event))
            hash_.word(NO_EVENT if finding.victim is None else finding.victim.entry)
            hash_.word(NO_EVENT if finding.writer is None else finding.writer.entry)
            hash_.words((finding.lo, finding.hi, finding.differ))
        return hash_.value

    def open_clobbered(self) -> int:
        return sum(f.status == FrameStatus.CLOBBERED for f in self.frames)


def find_base(tables: list[ModelTss] | list[ModelIdt], base: int | None) -> int | None:
    """The table with that base, if there is one."""
    return next((n for n, table in enumerate(tables) if base is not None and table.base == base), None)


def bytes_of(value: int | None, length: int) -> list[int | None]:
    if value is None:
        return [None] * length
    return [value >> 8 * n & 0xFF for n in range(length)]


def differs(slot: str, stored: int | None, popped: int | None) -> bool:
    if stored is None or popped is None:
        return False
    ignore = x86.RFLAGS_RF if slot == "rflags" else 0
    return (stored ^ popped) & ~ignore & (1 << SLOT_BITS[slot]) - 1 != 0


def mask_of(slots: list[str]) -> int:
    return sum(1 << SLOTS.index(slot) for slot in slots)
