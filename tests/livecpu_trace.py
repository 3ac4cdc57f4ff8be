"""A recording of the CPU model as a native trace."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from livecpu import IDT, Delivery, Iret, SetRsp, Store
from livecpu_guest import STACKS, USER_STACKS, USER_STACKS_END, Guest

from tracedbg import x86
from tracedbg.layout import REGION_USER, CpuTables, Fidelity, Gate, Idt, Layout, Region, Tss
from tracedbg.state import EventFlag, Kind, Source
from tracedbg.trace import MemoryRange, Trace
from tracedbg.writer import TraceWriter, build

SPOILS = ("tss", "gate", "return", "store", "rflags")  # errors put into the recording: the check has to see each
SOURCES = {"nmi": Source.NMI, "fixed": Source.FIXED, "exception": Source.EXCEPTION, "soft-int": Source.SOFT_INT}


class Native:
    """The trace of a guest's recording: `first` has the first event of each step, `step_of` the step of those events."""

    def __init__(self, guest: Guest, spoil: str | None) -> None:
        self.guest, self.spoil = guest, spoil
        self.first: dict[int, int] = {}
        self.step_of: dict[int, int] = {}
        self.counts: Counter[str] = Counter()
        self._memory = guest.setup_memory()
        self.trace: Trace = build(self._write, name=f"seed {guest.seed}")

    def last(self, number: int) -> int:
        """The last event of a step: of a store to a table, the WRITE."""
        return self.first.get(number + 1, self.trace.count) - 1

    def _layout(self) -> Layout:
        guest, memory = self.guest, self._memory
        tss = Tss.from_bytes(guest.tss, bytes(memory[guest.tss : guest.tss + 104]))
        idt = Idt.from_bytes(IDT, bytes(memory[IDT : IDT + 0x1000]))
        if self.spoil == "tss":
            tss = replace(tss, ist=tuple(i and (i + 16) % (1 << 64) for i in tss.ist))
        if self.spoil == "gate":
            idt = replace(idt, gates={v: replace(g, ist=g.ist % 7 + 1) for v, g in idt.gates.items()})
        regions = [Region(USER_STACKS, USER_STACKS_END, REGION_USER)]
        layout = Layout((tss,), (idt,), (CpuTables(0, 0),), tuple(regions), Fidelity.RETURNS)
        return layout.with_stacks() if guest.named else layout

    def _write(self, writer: TraceWriter) -> None:
        writer.layout = self._layout()
        if self.guest.known_memory:
            writer.memory = [MemoryRange(STACKS, bytes(self._memory[STACKS:USER_STACKS_END]))]
        for number, step in enumerate(self.guest.truth.steps):
            self.first[number] = writer.count
            self.step_of[writer.count] = number
            if isinstance(step, Delivery):
                self._write_delivery(writer, step)
                for store in step.stores:
                    self._memory[store.addr : store.addr + len(store.data)] = store.data
            elif isinstance(step, Iret):
                self._write_iret(writer, step)
            elif isinstance(step, Store):
                self._write_store(writer, step)
            elif isinstance(step, SetRsp):
                writer.event(Kind.SETSP, cpu=0, value=step.rsp)
            else:
                writer.event(Kind.RAISE, cpu=0, arg=x86.NMI, source=Source.NMI)

    def _write_delivery(self, writer: TraceWriter, step: Delivery) -> None:
        fields = dict(zip(("rip", "rsp", "cs", "ss", "rflags"), step.before, strict=True))
        if step.how == "soft-int":
            fields["code"] = step.length
        elif step.how == "exception" and step.vector in x86.ERROR_CODE_VECTORS and len(step.stores) == 6:
            fields["code"] = int.from_bytes(step.stores[-1].data[:4], "little")
        if self.spoil == "rflags":
            fields["rflags"] ^= 1
        if step.failed:
            fields |= {"flags": EventFlag.FAILED, "addr": len(step.stores)}
        writer.event(Kind.DELIVER, cpu=0, arg=step.vector, source=SOURCES[step.how], **fields)

    def _write_iret(self, writer: TraceWriter, step: Iret) -> None:
        before = step.before
        if self.spoil == "return":
            writer.event(Kind.MARK, cpu=0)
            return
        if step.after is None:
            writer.event(Kind.RETURN, cpu=0, arg=0, rip=before.rip, rsp=before.rsp, flags=EventFlag.FAULTED)
            return
        rip, cs, rflags, rsp, ss = (step.word(n) for n in range(5))
        writer.event(
            Kind.RETURN, cpu=0, arg=0, rip=before.rip, rsp=before.rsp,
            addr=rip, cs=cs & 0xFFFF, rflags=rflags & 0xFFFFFFFF, value=rsp, ss=ss & 0xFFFF,
        )  # fmt: skip

    def _write_store(self, writer: TraceWriter, step: Store) -> None:
        lo, hi = step.addr, step.addr + len(step.data)
        self._memory[lo:hi] = step.data
        tss = self.guest.tss
        for slot, at in ((0, tss + 4), *((8 + n, tss + 0x24 + 8 * (n - 1)) for n in range(1, 8))):
            if at < hi and lo < at + 8:
                self.counts["TSS changes"] += 1
                writer.event(Kind.TSS, cpu=0, arg=slot, value=int.from_bytes(self._memory[at : at + 8], "little"))
        for vector in range(max((lo - IDT) // 16, 0), min((hi - 1 - IDT) // 16 + 1, 256)):
            gate = Gate.from_bytes(bytes(self._memory[IDT + 16 * vector : IDT + 16 * vector + 16]))
            code = gate.ist | gate.type << 8 | gate.dpl << 13 | gate.present << 15
            self.counts["gate changes"] += 1
            writer.event(Kind.GATE, cpu=0, arg=vector, value=gate.offset, cs=gate.selector, code=code)
        value = int.from_bytes(step.data, "little") ^ (self.spoil == "store")
        writer.event(Kind.WRITE, cpu=0, addr=lo, arg=hi - lo, value=value)
