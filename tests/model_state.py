"""The slow model: what is kept from one event to the next, and what keeps it in order.

Written from tracedbg/help/replay.md alone ("State", and the limits in "Other events"), never from csrc.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from dataclasses import replace

from model_records import (
    MASK,
    SLOTS,
    ModelCpu,
    ModelEvent,
    ModelFinding,
    ModelFrame,
    ModelIdt,
    ModelStack,
    ModelStats,
    ModelTss,
    Msrs,
    Nmi,
    mask_of,
)

from tracedbg.layout import REGION_STACK, REGION_USER, Fidelity, Region
from tracedbg.state import Evidence, FrameStatus, Mismatch, Rule, Settle, Source
from tracedbg.trace import Trace

FRAMES_PER_STACK = 64
OWN_PER_CPU = 256


class State:
    """The state at a position, and what keeps it in order."""

    def __init__(
        self, trace: Trace, *, max_frames: int = 65536, iret_fault_unblocks: bool = True, nmi_fail_blocks: bool = True
    ) -> None:
        layout = trace.layout
        self.trace = trace
        self.max_frames = max_frames
        self.iret_fault_unblocks = iret_fault_unblocks
        self.nmi_fail_blocks = nmi_fail_blocks
        self.returns_recorded = bool(layout.fidelity & Fidelity.RETURNS)
        self.ss_zeroed = bool(layout.fidelity & Fidelity.SS_ZEROED)
        self.guests = bool(layout.fidelity & Fidelity.GUESTS)
        self.strongest = Evidence.INFERRED if layout.fidelity & Fidelity.INFERRED else Evidence.RECORDED
        self.tss = [ModelTss(t.base, list(t.rsp), list(t.ist)) for t in layout.tss]
        self.idts = [ModelIdt(i.base, dict(i.gates)) for i in layout.idts]
        self.cpus = [ModelCpu() for _ in range(trace.cpus)]
        for cpu, tables in zip(self.cpus, layout.cpus, strict=False):
            cpu.tss, cpu.idt = tables.tss, tables.idt
            if tables.fred is not None:
                cpu.fred, cpu.msrs = tables.fred.on, Msrs.of(tables.fred)
                cpu.csl = cpu.msrs.level
        self.regions: list[Region] = sorted((r for r in layout.regions if r.kind == REGION_STACK), key=lambda r: (r.hi, r.lo))
        self.region_tops = [r.hi for r in self.regions]
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

    # -- stacks and memory ------------------------------------------------------------------------------------------

    def stack_of(self, addr: int) -> ModelStack:
        """The named region with the smallest hi >= addr if its lo < addr, or the 16 KiB block."""
        at = bisect.bisect_left(self.region_tops, addr)
        if at < len(self.regions) and self.regions[at].lo < addr:
            region = self.regions[at]
            return ModelStack(region.lo, region.hi, True, region.slot, region.assumed)
        block = (addr - 1 & MASK) >> 14
        return ModelStack(block << 14, min(block + 1 << 14, MASK), False, 0)

    def home_of(self, rsp: int | None) -> ModelStack | None:
        return None if rsp is None else self.stack_of(rsp)

    def on(self, stack: ModelStack, cpu: int) -> list[ModelFrame]:
        """Open frames on a stack: those of the CPU, of any CPU if the stack is not a named one."""
        return [f for f in self.frames if f.stack == stack and (f.cpu == cpu or not stack.named)]

    def store(self, addr: int, data: Iterable[int | None], event: int) -> None:
        for offset, byte in enumerate(data):
            if addr + offset <= MASK:  # nothing goes on at 0
                self.memory[addr + offset] = (byte, event)

    def byte(self, addr: int) -> int | None:
        return self.memory.get(addr, (None, None))[0]

    def number_at(self, addr: int, length: int = 8) -> int | None:
        """The bytes in memory as a number, if all are known."""
        value = 0
        for n in range(length):
            byte = self.byte(addr + n)
            if byte is None:
                return None
            value |= byte << 8 * n
        return value

    def delivery_at(self, addr: int) -> ModelFrame | None:
        """The frame of the delivery that wrote a byte; None: something else did."""
        writer = self.memory.get(addr, (None, None))[1]
        return None if writer is None else self.stored.get(writer)

    def slots_hit(self, victim: ModelFrame, new: dict[int, int | None]) -> tuple[int, int]:
        """Slots of a frame with an overwritten byte; those with one that is not known to keep its value."""
        slots = differ = 0
        for slot in SLOTS if victim.has_code else SLOTS[:5]:
            at = victim.slot_addr(slot)
            hit = [a for a in range(at, at + 8) if a in new]
            if hit:
                slots |= mask_of([slot])
            if any(new[a] is None or self.byte(a) is None or new[a] != self.byte(a) for a in hit):
                differ |= mask_of([slot])
        return slots, differ

    # -- findings ---------------------------------------------------------------------------------------------------

    def raise_finding(self, rule: Rule, evidence: Evidence, event: ModelEvent, **fields: object) -> ModelFinding:
        evidence = min(evidence, self.strongest)
        finding = ModelFinding(len(self.findings), rule, rule, evidence, event.index, 0xFFFF if event.cpu is None else event.cpu)
        finding = replace(finding, **fields)  # type: ignore[arg-type]
        self.findings.append(finding)
        return finding

    def fold(
        self, cpu: ModelCpu, key: tuple[object, ...], rule: Rule, evidence: Evidence, event: ModelEvent, **fields: object
    ) -> None:
        """One finding for a key, then counted."""
        known = cpu.folds.get(key)
        if known is None:
            cpu.folds[key] = self.raise_finding(rule, evidence, event, **fields).number
        else:
            self.findings[known].count += 1

    def mismatch(self, cpu: ModelCpu, event: ModelEvent, detail: Mismatch) -> None:
        self.fold(cpu, (detail,), Rule.MODEL_MISMATCH, Evidence.COMPUTED, event, detail=int(detail))

    def illegal_vector(self, cpu: ModelCpu, event: ModelEvent, writer: ModelFrame | None) -> None:
        """A local APIC cannot deliver vectors 0-15."""
        if event.source == Source.FIXED and event.arg is not None and event.arg < 16:
            key = (Rule.ILLEGAL_VECTOR, event.arg)
            self.fold(cpu, key, Rule.ILLEGAL_VECTOR, Evidence.RECORDED, event, detail=event.arg, writer=writer)

    def settle(self, frame: ModelFrame, rule: Rule, evidence: Evidence, event: int, why: Settle) -> ModelFinding:
        """The fate of a clobbered frame became known."""
        assert frame.finding is not None
        finding = self.findings[frame.finding]
        finding.rule, finding.settled, finding.settled_by = rule, event, why
        finding.settled_evidence = min(evidence, self.strongest)
        return finding

    # -- open frames ------------------------------------------------------------------------------------------------

    def frames_of(self, cpu: int) -> Iterator[ModelFrame]:
        return (f for f in list(self.frames) if f.cpu == cpu)

    def close(self, frame: ModelFrame, why: Settle) -> None:
        self.frames = [f for f in self.frames if f is not frame]
        if frame.dedicated:
            self.stats.settled[why] += 1

    def drop(self, frame: ModelFrame, event: int) -> None:
        """Forget a frame; what becomes of a clobbered one will never be known."""
        if frame.status == FrameStatus.CLOBBERED and frame.finding is not None:
            self.settle(frame, self.findings[frame.finding].rule, Evidence.UNKNOWN, event, Settle.DROPPED)
        self.close(frame, Settle.DROPPED)

    def open(self, frame: ModelFrame) -> None:
        self.frames.append(frame)
        same = [f for f in self.frames if f.stack == frame.stack]
        if len(same) > FRAMES_PER_STACK:
            self.drop(same[0], frame.entry)
        if len(self.frames) > self.max_frames:
            self.drop(self.frames[0], frame.entry)
        own = [f for f in self.frames_of(frame.cpu) if f.own]
        if len(own) > OWN_PER_CPU:
            self.drop(own[0], frame.entry)

    # -- NMI blocking -----------------------------------------------------------------------------------------------

    def block(self, cpu: ModelCpu, event: ModelEvent) -> None:
        """Step 8: masking begins."""
        if event.source == Source.NMI:
            cpu.nmi = Nmi(True, event.index)
            cpu.nmi_pending = cpu.nmi_stuck = False
        if event.source == Source.MC:
            cpu.mcip = True

    def unblock(self, cpu: ModelCpu, event: ModelEvent, frame: ModelFrame | None) -> None:
        cpu.nmi.blocked, cpu.nmi.unblocked_by = False, event.index
        cpu.nmi.unblock_frame = None if frame is None else frame.entry
        cpu.nmi_stuck = False
