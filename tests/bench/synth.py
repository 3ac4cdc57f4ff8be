"""Large native traces for the benchmarks: the same events over and over, written in blocks."""

from __future__ import annotations

import struct

from tracedbg import wire
from tracedbg.layout import CpuTables, Fidelity, Gate, Idt, Layout, Tss
from tracedbg.state import Kind, Known, Source
from tracedbg.writer import TraceWriter

FULL = Known.RIP | Known.RSP | Known.RFLAGS | Known.CPU | Known.CS | Known.SS | Known.ARG | Known.SOURCE
RET = Known.RIP | Known.RSP | Known.ADDR | Known.VALUE | Known.RFLAGS | Known.CPU | Known.CS | Known.SS
STORE = Known.ADDR | Known.VALUE | Known.CPU | Known.ARG | Known.RIP
MSR = Known.CODE | Known.VALUE | Known.CPU
MCG_STATUS = 0x17A  # bit 2: MCIP


def storm_layout(cpus: int) -> Layout:
    """Per CPU its own TSS and stacks; one IDT: #DB IST1, NMI IST2, #MC IST3, the rest on the current stack."""
    tss, tables = [], []
    for cpu in range(cpus):
        base = 0xFFFFFE0000000000 + cpu * 0x40000
        tss.append(Tss(base, (base + 0x3000, None, None), (None, base + 0x8000, base + 0xC000, base + 0x10000, *(None,) * 4)))
        tables.append(CpuTables(cpu, 0))
    gates = {v: Gate(0xFFFFFFFF81000000 + v * 16, 0x10, {1: 1, 2: 2, 18: 3}.get(v, 0)) for v in range(256)}
    return Layout(tuple(tss), (Idt(0xFFFFFE00FF000000, gates),), tuple(tables), fidelity=Fidelity.RETURNS).with_stacks()


def pack(kind: Kind, known: int, *, cpu: int, rip: int = 0, rsp: int = 0, addr: int = 0, value: int = 0, rflags: int = 0,
         cs: int = 0, ss: int = 0, arg: int = 0, source: int = 0, code: int = 0) -> bytes:  # fmt: skip
    return wire.EVENT_PACK.pack(0, rip, rsp, addr, value, rflags, code, 0, cpu, cs, ss, known, kind, arg, source, 0)


def storm(cpus: int) -> bytes:
    """One round of properly nested NMIs, #MCs, #DBs, page faults and interrupts on every CPU.

    Nothing returns by IRET inside the NMI handler (R12), and MCIP is cleared when the #MC's frame is gone (R24): no window.
    """
    out = []
    for cpu in range(cpus):
        base = 0xFFFFFE0000000000 + cpu * 0x40000
        thread = 0xFFFFC90000000000 + cpu * 0x8000 + 0x3F00
        user = 0x7FFF00000000 + cpu * 0x10000
        nest = [  # vector, source, top of the frame's stack or None: the current one
            (0xEC, Source.FIXED, None),
            (14, Source.EXCEPTION, None),
            (1, Source.EXCEPTION, base + 0x8000),
            (18, Source.MC, base + 0x10000),
            (2, Source.NMI, base + 0xC000),
        ]
        rsp, rip, stack = thread, 0xFFFFFFFF82000000, []
        for vector, source, top in nest:
            flags = 0x202 if vector == 0xEC else 0x2
            kernel = {"cpu": cpu, "cs": 0x10, "ss": 0x18}
            out.append(pack(Kind.DELIVER, FULL, rip=rip, rsp=rsp, rflags=flags, arg=vector, source=source, **kernel))
            size = 48 if vector == 14 else 40
            lo = ((top or rsp) & ~15) - size
            rf = 0x10000 if vector == 14 else 0
            stack.append((vector, lo + size - 40, rip, rsp, flags | rf))
            for n in range(3):
                out.append(pack(Kind.WRITE, STORE, cpu=cpu, addr=lo - 8 - 8 * n, value=vector << 32 | n, arg=8))
            rsp, rip = lo - 0x60, 0xFFFFFFFF82000000 + vector * 0x100
        for vector, frame, back, sp, flags in reversed(stack):
            out.append(pack(Kind.RETURN, RET, rip=0xFFFFFFFF82FF0000, rsp=frame, addr=back, value=sp, rflags=flags, **kernel))
            if vector == 18:
                out.append(pack(Kind.MSR, MSR, cpu=cpu, code=MCG_STATUS))
        out.append(pack(Kind.SYSRET, Known.CPU, cpu=cpu))
        process = {"cpu": cpu, "cs": 0x33, "ss": 0x2B, "rflags": 0x202}
        out.append(pack(Kind.DELIVER, FULL, rip=0x401000, rsp=user, arg=0xEC, source=Source.FIXED, **process))
        out.append(pack(Kind.RETURN, RET, rsp=base + 0x3000 - 40, addr=0x401000, value=user, **process))
    return b"".join(out)


def write_storm(path: str, events: int, cpus: int = 4) -> int:
    """Write at least `events` events of clean storms; returns how many."""
    round_ = storm(cpus)
    per = len(round_) // struct.calcsize("<8Q")
    with TraceWriter(path, cpus=cpus, force=True) as writer:
        writer.layout = storm_layout(cpus)
        writer.meta = {"source": {"format": "synthetic"}}
        block = round_ * max(1, 65536 // per)
        while writer.count + len(block) // 64 <= events:
            writer.append(block)
        while writer.count < events:
            writer.append(round_)
        return writer.count
