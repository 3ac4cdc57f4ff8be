"""The slow model: where a delivery puts its frame and what it stores (replay.md, "Delivery", step 4)."""

from __future__ import annotations

from model_observe import Observe
from model_records import MASK, Bytes, ModelCpu, ModelEvent, ModelFrame, ModelStack, bytes_of

from tracedbg import x86
from tracedbg.layout import Gate
from tracedbg.state import Context, Shadow, Source

MASKABLE = (Source.FIXED, Source.EXTINT, Source.EXTERNAL, Source.INJECTED)
INT1, INT3, INTO = 1, 3, 4
FRED_TYPES = {Source.NMI: 2, Source.EXCEPTION: 3, Source.MC: 3, Source.SOFT_INT: 4, Source.SYSCALL: 7}


class Place(Observe):
    """Step 4, through the IDT and by FRED. Nothing is changed here."""

    def place(self, cpu: ModelCpu, event: ModelEvent) -> ModelFrame | None:
        if event.arg is None:
            return None
        return self.place_fred(cpu, event, event.arg) if cpu.fred else self.place_idt(cpu, event, event.arg)

    @staticmethod
    def unplaced(event: ModelEvent) -> ModelFrame:
        """The record alone."""
        assert event.cpu is not None
        saved = Context(event.rip, event.cs, event.rflags, event.rsp, event.ss, None)
        stack = ModelStack(0, 0, False, 0)
        return ModelFrame(event.index, event.cpu, event.arg or 0, event.source or 0, 0, 0, 0, 0, stack, saved, False)

    # -- IDT --------------------------------------------------------------------------------------------------------

    def idt_base(self, cpu: ModelCpu, event: ModelEvent, gate: Gate) -> int | None:
        tss = None if cpu.tss is None else self.tss[cpu.tss]
        if gate.ist:
            return None if tss is None else tss.ist[gate.ist]
        if event.cs is None:
            return None
        if x86.cpl(event.cs) != 0:
            return None if tss is None else tss.rsp[0]
        return event.rsp

    def place_idt(self, cpu: ModelCpu, event: ModelEvent, vector: int) -> ModelFrame | None:
        assert event.cpu is not None
        gate = self.gate_of(cpu, vector)
        if gate is None or not gate.present or gate.type not in (x86.GATE_INTERRUPT, x86.GATE_TRAP):
            return None
        base = self.idt_base(cpu, event, gate)
        if base is None or not x86.is_canonical(base):
            return None
        has_code = vector in x86.ERROR_CODE_VECTORS and event.source in (Source.EXCEPTION, None)
        if has_code and event.source is None and event.code is None:
            return None  # 40 or 48 bytes: unknown
        size = 48 if has_code else 40
        hi = base & ~15
        if hi < size:
            return None
        saved = self.saved(event, vector, event.code if has_code else None)
        values = [saved.ss, saved.rsp, saved.rflags, saved.cs, saved.rip] + ([saved.code] if has_code else [])
        return ModelFrame(
            entry=event.index,
            cpu=event.cpu,
            vector=vector,
            source=event.source or 0,
            ist=gate.ist,
            gate_type=gate.type,
            lo=hi - size,
            hi=hi,
            stack=self.stack_of(hi),
            saved=saved,
            has_code=has_code,
            gs=cpu.gs,
            image=[bytes_of(value, 8) for value in values],
            handler=(gate.offset, gate.selector),
        )

    def saved(self, event: ModelEvent, vector: int, code: int | None) -> Context:
        """The words stored; the error code is the caller's."""
        rip, rflags = event.rip, event.rflags
        if event.source in (Source.SOFT_INT, Source.SYSCALL):
            rip = None if rip is None or event.code is None else (rip + event.code) & MASK
        if rflags is not None and event.source == Source.EXCEPTION and vector in x86.FAULT_VECTORS:
            rflags |= x86.RFLAGS_RF
        return Context(rip, event.cs, rflags, event.rsp, event.ss, code)

    # -- FRED -------------------------------------------------------------------------------------------------------

    def fred_level(self, cpu: ModelCpu, event: ModelEvent, vector: int) -> int | None:
        """The event's level."""
        assert event.cs is not None and cpu.msrs.config is not None
        is_exception = event.source == Source.EXCEPTION
        nested = is_exception and (vector == x86.DOUBLE_FAULT or cpu.failed is not None)
        if x86.cpl(event.cs) == 3 and not nested:
            return 0
        if event.source in MASKABLE:
            return cpu.msrs.config >> 9 & 3
        if event.source == Source.SYSCALL:
            return 0
        if event.source == Source.SOFT_INT and not (vector in (INT1, INT3, INTO) and event.code == 1):
            return 0
        return None if cpu.msrs.stklvls is None or vector >= 32 else cpu.msrs.stklvls >> 2 * vector & 3

    def place_fred(self, cpu: ModelCpu, event: ModelEvent, vector: int) -> ModelFrame | None:
        assert event.cpu is not None
        config = cpu.msrs.config
        if event.source is None or event.cs is None or x86.cpl(event.cs) not in (0, 3) or config is None:
            return None
        if event.source == Source.SOFT_INT and vector in (INT1, INT3, INTO) and event.code is None:
            return None  # INT1, INT3, INTO or INT n: unknown
        outer = x86.cpl(event.cs) == 3
        event_level = self.fred_level(cpu, event, vector)
        from_level = 0 if outer else cpu.csl
        if event_level is None or from_level is None:
            return None
        level = max(event_level, from_level)
        if outer or level > from_level:
            base = cpu.msrs.fred_rsp[level]
        else:
            base = None if event.rsp is None else (event.rsp - (config & 0x1C0)) & MASK
        if base is None or not x86.is_canonical(base):
            return None
        hi = base & ~63
        if hi < 64:
            return None
        with_code = event.source == Source.EXCEPTION and vector in x86.ERROR_CODE_VECTORS
        saved = self.saved(event, vector, event.code if with_code else 0)
        cs_word = [*bytes_of(saved.cs, 2), from_level, *[None] * 5]
        return ModelFrame(
            entry=event.index,
            cpu=event.cpu,
            vector=vector,
            source=event.source,
            ist=0,
            gate_type=x86.GATE_INTERRUPT,
            lo=hi - 64,
            hi=hi,
            stack=self.stack_of(hi),
            saved=saved,
            has_code=True,
            fred=True,
            level=level,
            from_level=from_level,
            gs=cpu.gs,
            image=[
                bytes_of(0, 8),
                self.event_data(event, vector),
                self.fred_ss_word(cpu, event, vector),
                bytes_of(saved.rsp, 8),
                bytes_of(saved.rflags, 8),
                cs_word,
                bytes_of(saved.rip, 8),
                bytes_of(saved.code, 8),
            ],
            handler=((config & ~0xFFF) + (0 if outer else 256), None),
        )

    @staticmethod
    def event_data(event: ModelEvent, vector: int) -> Bytes:
        told_elsewhere = event.source == Source.NMI or (event.source == Source.EXCEPTION and vector in (1, 7, 14))
        return bytes_of(0 if event.value is None and not told_elsewhere else event.value, 8)

    @staticmethod
    def fred_ss_word(cpu: ModelCpu, event: ModelEvent, vector: int) -> Bytes:
        """SS and the information on the event."""
        bits = 1 if cpu.shadow is not None and cpu.shadow[0] == Shadow.STI else 0
        bits |= 4 if event.source == Source.NMI else 0
        kind = FRED_TYPES.get(Source(event.source or 0), 0)
        if event.source == Source.SOFT_INT and event.code == 1 and vector in (INT1, INT3, INTO):
            kind = 5 if vector == INT1 else 6
        elif event.source in (Source.SOFT_INT, Source.SYSCALL):
            bits |= 2
        return [*bytes_of(event.ss, 2), bits, 0, vector, 0, kind, None]
