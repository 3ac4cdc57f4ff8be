"""Random traces with a meaning: a small simulated kernel whose nested events mostly continue where they left off.

`random_trace(seed)` always gives the same trace. Run as a program it prints how often each rule, cause, way of settling
and event kind occurred in the first 2,000 seeds, and fails if one never did.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from dataclasses import dataclass, field

from model import Model

from tracedbg import wire, x86
from tracedbg.layout import (
    REGION_READS,
    REGION_STACK,
    REGION_STORES,
    REGION_USER,
    CpuTables,
    Fidelity,
    Gate,
    Idt,
    Layout,
    Region,
    Tss,
)
from tracedbg.state import Cause, EventFlag, Evidence, FrameStatus, Kind, Known, Rule, Settle, Source
from tracedbg.trace import MemoryRange, Trace
from tracedbg.writer import TraceWriter, build

MASK = (1 << 64) - 1
POISON = 0x8600111111111111
KERNEL_CS, KERNEL_SS, USER_CS, USER_SS = 0x08, 0x10, 0x33, 0x2B
UNKNOWN_KIND = 77
FIELD_BITS = {
    "rip": Known.RIP,
    "rsp": Known.RSP,
    "addr": Known.ADDR,
    "value": Known.VALUE,
    "rflags": Known.RFLAGS,
    "code": Known.CODE,
    "cpu": Known.CPU,
    "cs": Known.CS,
    "ss": Known.SS,
    "arg": Known.ARG,
    "source": Known.SOURCE,
}
DROPPABLE = ("rip", "rsp", "addr", "value", "rflags", "code", "cs", "ss", "source", "arg")
PLAIN_KINDS = (
    Kind.READ, Kind.SMI, Kind.RSM, Kind.CR, Kind.GS, Kind.SHADOW, Kind.EOI, Kind.TOKEN, Kind.VMEXIT, Kind.VMENTRY,
    Kind.MODE, Kind.MARK,
)  # fmt: skip
AREAS = (
    0x0000_0000_0000_1000,
    0x0000_0000_0010_6000,
    0x0000_7FFF_FFFE_0000,
    0xFFFF_8000_0000_0000,
    0xFFFF_8300_BFFD_0000,
    0xFFFF_FE00_0000_3000,
    0xFFFF_FFFF_FFFC_0000,
)
VECTORS = (0, 1, 2, 2, 2, 2, 3, 6, 8, 13, 14, 14, 18, 18, 18, 21, 29, 0x20, 0x30, 0x80, 0xEC)


@dataclass
class Context:
    """What a CPU was doing."""

    rip: int
    rsp: int
    cs: int
    ss: int
    rflags: int

    def copy(self) -> Context:
        return Context(self.rip, self.rsp, self.cs, self.ss, self.rflags)


@dataclass
class Shot:
    """One delivered frame as the kernel knows it."""

    lo: int
    hi: int
    saved: Context  # as stored
    code: int | None
    stored_at: int | None = None  # RIP slot of a copy that software made

    @property
    def rip_addr(self) -> int:
        return self.hi - 40


@dataclass
class Cpu:
    tss: int | None
    idt: int | None
    now: Context
    nest: list[Shot] = field(default_factory=list)
    last_return: dict[str, int] | None = None


class Kernel:
    """Makes the events of one trace."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.r = random.Random(seed)
        self.records: list[bytes] = []
        self.payload = bytearray()
        self.memory: dict[int, int] = {}  # aligned word -> value, as the simulated machine has it
        self.initial: list[MemoryRange] = []
        self.dead: list[Shot] = []  # frames that were returned from
        self.drop = self.r.choice((0, 0, 0, 0.01, 0.05, 0.2))
        self.nonsense = self.r.choice((0.01, 0.05, 0.15))
        self.deep = seed % 101 == 50
        self.layout = self.make_layout()
        self.cpus = []
        for number in range(self.cpu_count):
            tables = self.layout.cpus[number] if number < len(self.layout.cpus) else CpuTables()
            self.cpus.append(Cpu(tables.tss, tables.idt, self.idle()))
        self.tss = [list(t.ist) for t in self.layout.tss]
        self.rsp0 = [t.rsp[0] for t in self.layout.tss]
        self.gates = [dict(i.gates) for i in self.layout.idts]

    # -- layout -----------------------------------------------------------------------------------------------------

    def make_layout(self) -> Layout:
        r = self.r
        self.cpu_count = r.choice((1, 1, 1, 2, 2, 3))
        area = r.choice(AREAS)
        self.area = area
        size = r.choice((0x40, 0x80, 0x100, 0x200, 0x1000, 0x1000, 0x2000))
        self.user_area = r.choice((0x0000_7FFE_0000_0000, 0x111000, (area + 0x20000) & MASK))
        tops = [(area + size * n) & MASK for n in range(1, 12)]
        tsses, regions = [], []
        for number in range(self.cpu_count):
            ist: list[int | None] = [None]
            for slot in range(1, 8):
                kind = r.random()
                if kind < 0.04:
                    top: int | None = None
                elif kind < 0.10:
                    top = r.choice((POISON, POISON, 1 << 47, 1 << 56, (1 << 56) - 8, MASK - (1 << 56) + 1, MASK - (1 << 56)))
                elif kind < 0.12:
                    top = 0
                elif kind < 0.20:
                    top = r.choice(tops) - r.choice((1, 4, 8, 0x18, 0x20, 0x28))
                elif kind < 0.35:
                    top = r.choice(tops)
                elif number and kind < 0.45:
                    top = tsses[0].ist[slot]
                else:
                    top = tops[(slot - 1 + 3 * number) % len(tops)]
                ist.append(top)
            rsp0 = r.choice((tops[7 + number], tops[8], (area + 0x8000) & MASK, None))
            tsses.append(Tss(0x500000 + 0x68 * number, (rsp0, POISON, None), tuple(ist)))
        if r.random() < 0.15 and self.cpu_count > 1:
            tables = [CpuTables(0, 0) for _ in range(self.cpu_count)]
        else:
            tables = [CpuTables(n, 0) for n in range(self.cpu_count)]
        idts = [self.make_idt(0x600000)]
        if r.random() < 0.3:
            idts.append(self.make_idt(0x601000))
            tables[-1] = CpuTables(tables[-1].tss, 1)
        if r.random() < 0.05:
            tables[r.randrange(len(tables))] = CpuTables(r.choice((0, None)), r.choice((0, None)))
        if r.random() < 0.05:
            tables.pop()
        if r.random() < 0.5:
            regions.append(Region(self.user_area, (self.user_area + 0x3000) & MASK, REGION_USER))
        if r.random() < 0.1:
            regions.append(Region(area, area + r.choice((0x40, 0x1000)), REGION_USER))
        if r.random() < 0.2:
            regions.append(Region(area, area + 0x1000, REGION_STORES))
        if r.random() < 0.1:
            regions.append(Region(area, area + 0x2000, REGION_READS))
        for _ in range(r.choice((0, 0, 0, 1, 3))):
            hi = (r.choice(tops) + r.choice((0, 0, 0, -0x20, 0x10, 8))) & MASK
            lo = max(hi - r.choice((0x30, 0x80, size, 0x3000)), 0)
            regions.append(Region(lo, hi, REGION_STACK, r.randrange(self.cpu_count), r.randrange(9)))
        fidelity = Fidelity(r.choice((0, 0, 1, 1, 1, 2, 3)))
        layout = Layout(tuple(tsses), tuple(idts), tuple(tables), tuple(x for x in regions if x.lo < x.hi), fidelity)
        if r.random() < 0.75:
            layout = layout.with_stacks()
        for _ in range(r.choice((0, 1, 1))):
            at = area + r.randrange(0, 3 * size)
            self.initial.append(MemoryRange(at, bytes(r.randrange(256) for _ in range(r.choice((3, 40, 200))))))
        self.work_area = (area + 0x10000 + r.choice((0, 8, 0xFF0))) & MASK
        return layout

    def make_idt(self, base: int) -> Idt:
        r = self.r
        gates = {}
        share = r.random() < 0.3  # several vectors on few stacks
        for vector in sorted(set(VECTORS)):
            if r.random() < 0.04:
                continue
            ist = r.choice((0, 0, 1, 2, 3)) if vector not in (2, 18) else r.choice((0, 1, 2, 2, 2, 2, 3, 3, 4, 5, 6, 7))
            if share:
                ist = r.choice((0, 2))
            kind = x86.GATE_TRAP if r.random() < 0.12 else x86.GATE_INTERRUPT
            present = r.random() > 0.02
            if r.random() < 0.02:
                kind = r.choice((0, 5, 12))
            gates[vector] = Gate(0xFFFF_FFFF_8010_0000 + vector * 0x40, KERNEL_CS, ist, kind, r.choice((0, 3)), present)
        return Idt(base, gates)

    def idle(self) -> Context:
        r = self.r
        if r.random() < 0.4:
            return self.user_context()
        return Context(self.kernel_rip(), self.work_rsp(), KERNEL_CS, KERNEL_SS, 0x246)

    def user_context(self) -> Context:
        r = self.r
        return Context(0x400000 + r.randrange(0x40), self.user_area + 0x1000 + 8 * r.randrange(0x80), USER_CS, USER_SS, 0x246)

    def kernel_rip(self) -> int:
        return 0xFFFF_FFFF_8000_0000 + self.r.randrange(0x40)

    def work_rsp(self) -> int:
        return (self.work_area + 8 * self.r.randrange(0x300)) & MASK

    # -- records ----------------------------------------------------------------------------------------------------

    def emit(self, kind: int, drop: bool = True, **fields: int) -> int:
        r = self.r
        known = 0
        for name in fields:
            known |= FIELD_BITS.get(name, 0)
        if drop and self.drop:
            for name in DROPPABLE:
                if name in fields and r.random() < self.drop * (0.3 if name in ("arg", "source") else 1):
                    known &= ~FIELD_BITS[name]
                    if r.random() < 0.7:
                        fields[name] = 0  # otherwise it is left there and must not be looked at
        get = fields.get
        self.records.append(
            wire.EVENT_PACK.pack(
                0, get("rip", 0) & MASK, get("rsp", 0) & MASK, get("addr", 0) & MASK, get("value", 0) & MASK,
                get("rflags", 0), get("code", 0), len(self.records), get("cpu", 0), get("cs", 0), get("ss", 0),
                known, kind, get("arg", 0), get("source", 0), get("flags", 0),
            )
        )  # fmt: skip
        return len(self.records) - 1

    def poke(self, addr: int, value: int) -> None:
        """The simulated machine stores a word (aligned ones are enough for it)."""
        if addr % 8 == 0:
            self.memory[addr & MASK] = value

    def peek(self, addr: int, default: int) -> int:
        return self.memory.get(addr & MASK, default)

    # -- deliveries -------------------------------------------------------------------------------------------------

    def source_of(self, vector: int) -> Source:
        r = self.r
        if vector == 2:
            others = (Source.SOFT_INT, Source.EXTINT, Source.EXTERNAL, Source.INJECTED, Source.UNKNOWN)
            return r.choice((Source.NMI,) * 8 + others)
        if vector == 18:
            return r.choice((Source.MC,) * 6 + (Source.SOFT_INT, Source.FIXED, Source.EXTINT, Source.INJECTED, Source.UNKNOWN))
        if vector < 32:
            return r.choice((Source.EXCEPTION,) * 8 + (Source.SOFT_INT, Source.FIXED, Source.UNKNOWN))
        return r.choice((Source.FIXED, Source.FIXED, Source.EXTINT, Source.INJECTED, Source.EXTERNAL, Source.SOFT_INT))

    def run_on(self, cpu: Cpu) -> None:
        """What the code did since the last event: it pushed, changed the stack, or left frames without a record."""
        r = self.r
        now = cpu.now
        kind = r.random()
        if kind < 0.62:
            now.rsp = (now.rsp - 8 * r.randrange(0, 20)) & MASK
            now.rip = (now.rip + r.randrange(3)) & MASK
        elif kind < 0.72:
            now.rsp = self.work_rsp()
        elif kind < 0.88 and cpu.nest and (not self.layout.fidelity & Fidelity.RETURNS or r.random() < 0.25):
            for _ in range(r.choice((1, 1, 1, 2, 9))):
                if not cpu.nest:
                    break
                shot = cpu.nest.pop()
                cpu.now = now = shot.saved.copy()
                self.dead.append(shot)
            if r.random() < 0.4:
                now.rsp = (now.rsp + 8 * r.randrange(0, 9)) & MASK
            if r.random() < 0.4:
                now.rip += r.randrange(1, 9)
        elif kind < 0.91:
            cpu.now = self.user_context()
            if r.random() < 0.8:
                cpu.nest.clear()
        elif kind < 0.93:  # behind SYSCALL: kernel code on the user's stack
            user = self.user_context()
            cpu.now = Context(self.kernel_rip(), user.rsp, KERNEL_CS, KERNEL_SS, 0x46)
        elif kind < 0.95 and cpu.nest:  # a frame's own stack, above it
            now.rsp = (cpu.nest[-1].hi + 8 * r.randrange(-4, 3)) & MASK
            if r.random() < 0.3:
                now.cs = r.choice((KERNEL_CS, USER_CS))
        if r.random() < 0.3 and now.cs == KERNEL_CS:
            now.rflags = r.choice((0x46, 0x246, 0x10246, 0x4346))
        if r.random() < 0.02:
            now.cs = r.choice((KERNEL_CS, USER_CS, 0x19, 0x1A, 0xE008))

    def place(self, cpu: Cpu, vector: int, source: int) -> tuple[int, int, Gate] | None:
        if cpu.idt is None or vector not in self.gates[cpu.idt]:
            return None
        gate = self.gates[cpu.idt][vector]
        base: int | None = cpu.now.rsp
        if gate.ist:
            base = None if cpu.tss is None else self.tss[cpu.tss][gate.ist]
        elif cpu.now.cs & 3 == 3:
            base = None if cpu.tss is None else self.rsp0[cpu.tss]
        if base is None or not x86.is_canonical(base) or base < 64 or not gate.present or gate.type < 14:
            return None
        code = source == Source.EXCEPTION and vector in x86.ERROR_CODE_VECTORS
        hi = base & ~15
        return hi - (48 if code else 40), hi, gate

    def deliver(self, number: int, vector: int | None = None, source: Source | None = None, *, still: bool = False) -> None:
        r = self.r
        cpu = self.cpus[number]
        if not still:
            self.run_on(cpu)
        now = cpu.now
        vector = r.choice(VECTORS) if vector is None else vector
        if r.random() < 0.02:
            vector = r.randrange(256)
        source = self.source_of(vector) if source is None else source
        if source in (Source.FIXED, Source.EXTINT, Source.EXTERNAL) and r.random() < 0.8:
            now.rflags |= x86.RFLAGS_IF
        code = r.choice((0, 2, 0x18)) if source == Source.EXCEPTION else r.choice((1, 2))
        fields = {"cpu": number, "arg": vector, "rip": now.rip, "rsp": now.rsp, "cs": now.cs, "ss": now.ss, "rflags": now.rflags}
        if source != Source.UNKNOWN or r.random() < 0.5:
            fields["source"] = source
        if source in (Source.EXCEPTION, Source.SOFT_INT):
            fields["code"] = code
        kind = r.random()
        if kind < 0.02:
            self.emit(Kind.DELIVER, flags=EventFlag.LEGACY, **fields)
            return
        if kind < 0.06:
            self.failed(fields)
            return
        spot = self.place(cpu, vector, source)
        self.emit(Kind.DELIVER, **fields)
        if spot is None:
            return
        lo, hi, gate = spot
        saved = now.copy()
        if source == Source.SOFT_INT:
            saved.rip = (saved.rip + code) & MASK
        if source == Source.EXCEPTION and vector in x86.FAULT_VECTORS:
            saved.rflags |= x86.RFLAGS_RF
        shot = Shot(lo, hi, saved, code if hi - lo == 48 else None)
        for at, value in zip(range(hi - 40, hi, 8), (saved.rip, saved.cs, saved.rflags, saved.rsp, saved.ss), strict=True):
            self.poke(at, value)
        cpu.nest.append(shot)
        flags = now.rflags & ~(x86.RFLAGS_TF | x86.RFLAGS_NT | x86.RFLAGS_RF)
        if gate.type == x86.GATE_INTERRUPT:
            flags &= ~x86.RFLAGS_IF
        cpu.now = Context(gate.offset, lo, gate.selector, 0 if now.cs & 3 else now.ss, flags)
        if r.random() < 0.08:
            self.enter(number)

    def failed(self, fields: dict[str, int]) -> None:
        r = self.r
        fields = dict(fields)
        if r.random() < 0.8:
            fields["addr"] = r.choice((0, 1, 3, 5, 6, 99))
        self.emit(Kind.DELIVER, flags=EventFlag.FAILED, **fields)
        spot = self.place(self.cpus[fields["cpu"]], fields["arg"], fields.get("source", 0))
        if spot is not None:
            pushed = ("ss", "rsp", "rflags", "cs", "rip")[: fields.get("addr", 0)]
            for n, name in enumerate(pushed):
                self.poke(spot[1] - 8 - 8 * n, fields[name])
            if pushed and r.random() < 0.4:
                self.ret(fields["cpu"])
        if r.random() < 0.5:
            fields["arg"] = 14
            fields["source"] = Source.EXCEPTION
            if r.random() < 0.6:
                self.emit(Kind.DELIVER, flags=EventFlag.FAILED, **fields)
            self.deliver(fields["cpu"], 8, Source.EXCEPTION, still=r.random() < 0.8)

    def enter(self, number: int) -> None:
        r = self.r
        now = self.cpus[number].now
        wrong = r.random() < 0.4
        self.emit(
            Kind.ENTER,
            cpu=number,
            rip=now.rip + (r.choice((0, 1)) if wrong else 0),
            rsp=now.rsp - (r.choice((0, 8)) if wrong else 0),
            cs=now.cs ^ (r.choice((0, 0x10)) if wrong else 0),
            ss=now.ss,
            rflags=now.rflags,
        )

    # -- returns ----------------------------------------------------------------------------------------------------

    def popped(self, shot: Shot, from_memory: bool) -> Context:
        saved = shot.saved
        if not from_memory:
            return saved.copy()
        at = shot.rip_addr
        return Context(
            self.peek(at, saved.rip),
            self.peek(at + 24, saved.rsp),
            self.peek(at + 8, saved.cs) & 0xFFFF,
            self.peek(at + 32, saved.ss) & 0xFFFF,
            self.peek(at + 16, saved.rflags) & 0xFFFFFFFF,
        )

    def emit_return(self, number: int, rsp: int, to: Context, flags: int = 0) -> None:
        cpu = self.cpus[number]
        fields = {
            "cpu": number, "rip": cpu.now.rip, "rsp": rsp, "addr": to.rip, "value": to.rsp,
            "cs": to.cs, "ss": to.ss, "rflags": to.rflags, "flags": flags,
        }  # fmt: skip
        cpu.last_return = fields
        self.emit(Kind.RETURN, **fields)
        cpu.now = to.copy()

    def ret(self, number: int) -> None:
        r = self.r
        cpu = self.cpus[number]
        kind = r.random()
        if not cpu.nest:
            if cpu.last_return is not None and kind < 0.4:
                for _ in range(r.choice((1, 2, 4))):
                    self.emit(Kind.RETURN, **cpu.last_return)
            elif self.dead and kind < 0.7:
                shot = r.choice(self.dead)
                self.emit_return(number, shot.rip_addr, self.popped(shot, r.random() < 0.7))
            else:
                self.emit_return(number, self.work_rsp(), self.idle())
            return
        if kind < 0.04:
            self.emit(Kind.RETURN, cpu=number, rsp=cpu.nest[-1].rip_addr, rip=cpu.now.rip, flags=EventFlag.FAULTED)
            return
        if kind < 0.10:  # a frame made by hand: back to itself
            self.emit_return(number, (cpu.now.rsp - 40) & MASK, cpu.now)
            return
        if kind < 0.14 and cpu.last_return is not None:
            for _ in range(r.choice((1, 1, 3))):
                self.emit(Kind.RETURN, **cpu.last_return)
            return
        pick = -1 if kind < 0.9 else r.randrange(len(cpu.nest))
        shot = cpu.nest.pop(pick)
        self.dead.append(shot)
        way = r.random()
        rsp = shot.rip_addr
        if shot.stored_at is not None and way < 0.6:
            rsp = shot.stored_at
            to = self.popped(shot, False)
        elif way < 0.75:
            to = self.popped(shot, True)
        elif way < 0.88:
            to = self.popped(shot, False)
        elif way < 0.92:
            rsp = self.work_rsp()
            to = self.popped(shot, False)
        elif way < 0.96:
            to = self.popped(shot, r.random() < 0.5)
            setattr(to, r.choice(("rip", "rsp")), self.work_rsp())
        else:
            other = r.choice([s for c in self.cpus for s in c.nest] + self.dead)
            to = self.popped(shot, True)
            for name in ("rip", "cs", "rflags", "rsp", "ss"):
                if r.random() < 0.5:
                    setattr(to, name, getattr(other.saved, name))
        if r.random() < 0.03:
            to.rflags ^= x86.RFLAGS_RF
        if r.random() < 0.03:
            number = r.randrange(self.cpu_count)
        self.emit_return(number, rsp, to)

    # -- stores -----------------------------------------------------------------------------------------------------

    def any_shot(self, number: int) -> Shot | None:
        shots = self.cpus[number].nest or [s for c in self.cpus for s in c.nest] or self.dead
        return self.r.choice(shots[-4:]) if shots else None

    def store_words(self, number: int, at: int, words: list[int], drop: bool = True) -> None:
        """Store 64-bit words one by one or as a block."""
        if self.r.random() < 0.6:
            offset = len(self.payload)
            self.payload += b"".join((w & MASK).to_bytes(8, "little") for w in words)
            self.emit(Kind.WRITE, drop, cpu=number, addr=at, value=offset, code=8 * len(words), flags=EventFlag.BYTES)
        else:
            for n, word in enumerate(words):
                self.emit(Kind.WRITE, drop, cpu=number, addr=at + 8 * n, value=word, arg=8)
        for n, word in enumerate(words):
            self.poke(at + 8 * n, word)

    def write(self, number: int) -> None:
        r = self.r
        shot = self.any_shot(number)
        kind = r.random()
        if shot is None or kind < 0.15:
            self.random_write(number)
            return
        saved = shot.saved
        own = [saved.rip, saved.cs, saved.rflags, saved.rsp, saved.ss]
        if kind < 0.45:  # repair
            self.store_words(number, shot.rip_addr, own)
        elif kind < 0.65:  # edit one slot
            n = r.randrange(5)
            own[n] ^= r.choice((0, 1, 0x10, 0x200, 0x10000, 1 << 40)) if n in (0, 3) else r.choice((0, 1, 0x10, 0x200))
            value = own[n] | (r.choice((0, 0, 0xE010000500000000)) if n in (1, 2, 4) else 0)
            at = shot.rip_addr + 8 * n
            if r.random() < 0.3:  # only its upper bytes
                low = r.randrange(1, 8)
                value = r.getrandbits(64) << 8 * low & MASK | self.peek(at, value) & (1 << 8 * low) - 1
                self.emit(Kind.WRITE, cpu=number, addr=at + low, value=value >> 8 * low, arg=8 - low)
            else:
                self.emit(Kind.WRITE, cpu=number, addr=at, value=value, arg=8)
            self.poke(at, value)
        elif kind < 0.8:  # copy the frame away
            words = [self.peek(shot.rip_addr + 8 * n, word) for n, word in enumerate(own)]
            at = self.work_rsp() if r.random() < 0.6 else (shot.rip_addr - 8 * r.randrange(1, 12)) & MASK
            self.store_words(number, at, words)
            shot.stored_at = at
        elif kind < 0.9:  # copy another frame over it
            other = r.choice([s for c in self.cpus for s in c.nest] + self.dead[-3:])
            words = [other.saved.rip, other.saved.cs, other.saved.rflags, other.saved.rsp, other.saved.ss]
            self.store_words(number, shot.rip_addr, words)
        else:
            length = r.randrange(1, 9)
            self.emit(Kind.WRITE, cpu=number, addr=shot.lo + r.randrange(-8, 56), value=r.getrandbits(64), arg=length)

    def random_write(self, number: int) -> None:
        r = self.r
        at = self.random_address()
        if r.random() < 0.3:
            length = r.choice((0, 1, 7, 40, 300, 300, 4096, 4097))
            offset = len(self.payload)
            self.payload += r.randbytes(min(length, 400))  # a longer one runs over the end
            if r.random() < 0.2:
                offset = r.choice((MASK, MASK - 20, 1 << 40))
            self.emit(Kind.WRITE, cpu=number, addr=at, value=offset, code=length, flags=EventFlag.BYTES)
        else:
            length = r.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 9, 255))
            fields = {"cpu": number, "addr": at, "arg": length}
            if r.random() < 0.8:
                fields["value"] = r.getrandbits(64)
            self.emit(Kind.WRITE, **fields)

    def random_address(self) -> int:
        r = self.r
        kind = r.random()
        if kind < 0.5:
            return (self.area + r.randrange(0, 0x3000)) & MASK
        if kind < 0.6:
            return (self.area + 0x1000 * r.randrange(1, 4) - r.randrange(0, 9)) & MASK
        if kind < 0.7:
            return r.choice((0, 1, 8, 39, 40, 41, 48, MASK, MASK - 7, MASK - 15, MASK - 40, MASK - 39))
        return r.choice((self.work_rsp(), self.user_area + r.randrange(0x2000), r.getrandbits(64)))

    def move(self, number: int) -> None:
        r = self.r
        shot = self.any_shot(number)
        at = self.random_address() if shot is None or r.random() < 0.1 else r.choice((shot.lo, shot.rip_addr))
        to = self.work_rsp() if r.random() < 0.7 else at + 8 * r.randrange(-6, 7)
        self.emit(Kind.MOVE, cpu=number, addr=at, value=to)
        if shot is not None and at == shot.rip_addr:
            shot.stored_at = to & MASK
            saved = shot.saved
            for n, word in enumerate((saved.rip, saved.cs, saved.rflags, saved.rsp, saved.ss)):
                self.poke(to + 8 * n, self.peek(at + 8 * n, word))

    # -- scenes -----------------------------------------------------------------------------------------------------

    def scene_unblocked(self, number: int) -> None:
        """NMI, an exception in it whose return unblocks NMIs, NMI again: then a consumer, or a repair."""
        r = self.r
        self.deliver(number, 2, Source.NMI)
        self.deliver(number, r.choice((1, 3, 14, 18)))
        if r.random() < 0.8:
            self.ret(number)
        self.deliver(number, r.choice((2, 2, 2, 18)), still=r.random() < 0.5)
        for _ in range(r.randrange(5)):
            if r.random() < 0.3:
                self.write(number)
            else:
                self.ret(number)

    def scene_same_bytes(self, number: int) -> None:
        """The same context interrupted twice."""
        r = self.r
        before = self.cpus[number].now.copy()
        self.deliver(number, 2, still=True)
        if r.random() < 0.5:
            self.cpus[number].now = before
        self.deliver(number, 2, still=True)
        if r.random() < 0.5:
            self.ret(number)

    def scene_fake(self, number: int) -> None:
        r = self.r
        vector = r.choice((2, 18))
        self.deliver(number, vector, r.choice((Source.SOFT_INT, Source.EXTINT, Source.FIXED, Source.INJECTED)))
        self.deliver(number, vector)
        for _ in range(r.randrange(4)):
            self.ret(number)

    def scene_deep(self, number: int) -> None:
        """More frames on one stack than are kept."""
        r = self.r
        cpu = self.cpus[number]
        vectors = [v for v, g in self.gates[cpu.idt or 0].items() if g.ist == 0 and g.present and g.type >= 14]
        cpu.now = Context(self.kernel_rip(), (self.work_area + 0x3000) & MASK, KERNEL_CS, KERNEL_SS, 0x246)
        for _ in range(r.randrange(60, 110)):
            self.deliver(number, r.choice(vectors or [3]), still=True)
            if r.random() < 0.02:
                self.ret(number)

    def control(self, number: int) -> None:
        """Events that change tables, masks and registers."""
        r = self.r
        cpu = self.cpus[number]
        kind = r.choice(
            (Kind.SETSP, Kind.SETSP, Kind.TSS, Kind.TSS, Kind.GATE, Kind.LTR, Kind.LIDT, Kind.SYSCALL, Kind.SYSRET, Kind.SYSENTER,
             Kind.RAISE, Kind.RAISE, Kind.UNBLOCK, Kind.UNBLOCK, Kind.MSR, Kind.FLAGS, Kind.ENTER)
        )  # fmt: skip
        if kind == Kind.SETSP:
            cpu.now.rsp = self.work_rsp()
            self.emit(kind, cpu=number, value=cpu.now.rsp)
        elif kind == Kind.TSS:
            slot = r.choice((0, 0, 1, 9, 10, 10, 11, 12, 15, 3, 8, 16, 255))
            value = r.choice((self.area + 0x100 * r.randrange(1, 64), self.area + 0x1000, POISON, 0)) & MASK
            self.emit(kind, cpu=number, arg=slot, value=value)
            if cpu.tss is not None and slot == 0:
                self.rsp0[cpu.tss] = value
            elif cpu.tss is not None and 9 <= slot <= 15:
                self.tss[cpu.tss][slot - 8] = value
        elif kind == Kind.GATE:
            vector = r.choice(VECTORS)
            ist, type_ = r.choice((0, 1, 2, 3)), r.choice((14, 14, 15, 12))
            gate = Gate(0xFFFF_FFFF_8020_0000 + vector, KERNEL_CS, ist, type_, 0, r.random() < 0.9)
            code = gate.ist | gate.type << 8 | gate.present << 15 | r.choice((0, 0x80200000, 0x6000))
            self.emit(kind, cpu=number, arg=vector, value=gate.offset, cs=gate.selector, code=code)
            if cpu.idt is not None:
                self.gates[cpu.idt][vector] = gate
        elif kind == Kind.LTR:
            base = r.choice([t.base for t in self.layout.tss] * 3 + [0x123000])
            self.emit(kind, cpu=number, value=base)
            cpu.tss = next((n for n, t in enumerate(self.layout.tss) if t.base == base), None)
        elif kind == Kind.LIDT:
            base = r.choice([i.base for i in self.layout.idts] * 3 + [0x123000])
            self.emit(kind, cpu=number, value=base)
            cpu.idt = next((n for n, i in enumerate(self.layout.idts) if i.base == base), None)
        elif kind == Kind.RAISE:
            self.emit(kind, cpu=number, arg=r.choice((2, 2, 2, 18)), source=r.choice((Source.NMI, Source.NMI, Source.FIXED)))
        elif kind == Kind.MSR:
            self.emit(kind, cpu=number, code=r.choice((0x17A, 0x17A, 0x1B)), value=r.choice((0, 4, 5, 0xFB)))
        elif kind == Kind.FLAGS:
            cpu.now.rflags = r.choice((0x46, 0x246))
            self.emit(kind, cpu=number, rflags=cpu.now.rflags)
        elif kind == Kind.ENTER:
            self.enter(number)
        elif kind == Kind.SYSRET:
            self.emit(kind, cpu=number)
            cpu.now = self.user_context()
        else:
            self.emit(kind, cpu=number)

    def odd(self, number: int) -> None:
        """Nonsense and the ends of things."""
        r = self.r
        kinds = ("gap", "gap", "init", "shutdown", "plain", "plain", "kind", "cpu", "no cpu", "random", "random", "deliver")
        kind = r.choice(kinds)
        cpu = self.cpus[number]
        if kind == "gap":
            fields = {"cpu": number} if r.random() < 0.6 else {}
            self.emit(Kind.GAP, value=r.randrange(1000), **fields)
        elif kind == "init":
            self.emit(Kind.INIT, cpu=number, arg=r.randrange(2))
            cpu.nest.clear()
            cpu.tss = cpu.idt = None
            if r.random() < 0.8:
                self.emit(Kind.LTR, cpu=number, value=self.layout.tss[0].base)
                self.emit(Kind.LIDT, cpu=number, value=self.layout.idts[0].base)
                cpu.tss = cpu.idt = 0
        elif kind == "shutdown":
            self.emit(Kind.SHUTDOWN, cpu=number, arg=r.randrange(4))
        elif kind == "plain":
            self.emit(r.choice(PLAIN_KINDS), cpu=number, addr=self.random_address(), value=r.getrandbits(64), arg=r.randrange(9))
        elif kind == "kind":
            self.emit(r.choice((0, 33, UNKNOWN_KIND, 255)), cpu=number, addr=self.random_address(), arg=8, value=1)
        elif kind == "cpu":
            self.emit(r.choice((Kind.DELIVER, Kind.RETURN, Kind.WRITE, Kind.GAP)), cpu=r.choice((self.cpu_count, 4096, 65535)),
                      arg=2, rsp=self.random_address(), addr=self.random_address(), value=1, source=Source.NMI)  # fmt: skip
        elif kind == "no cpu":
            self.emit(r.choice((Kind.DELIVER, Kind.RETURN, Kind.WRITE, Kind.INIT, Kind.MARK)), arg=2, rsp=self.random_address(),
                      addr=self.random_address(), value=1)  # fmt: skip
        elif kind == "deliver":
            cs = r.choice((8, 0x33, 0x19, 0))
            cpu.now = Context(r.getrandbits(64), self.random_address(), cs, r.getrandbits(16), r.getrandbits(32))
            self.deliver(number, still=True)
        else:
            fields = {name: r.getrandbits(16) for name in ("cs", "ss")}
            fields |= {name: self.random_address() for name in ("rip", "rsp", "addr", "value")}
            fields |= {"rflags": r.getrandbits(32), "code": r.getrandbits(32), "arg": r.getrandbits(8), "source": r.randrange(9)}
            chosen = {name: value for name, value in fields.items() if r.random() < 0.8}
            self.emit(r.choice(list(Kind)), cpu=number, flags=r.choice((0, 0, 1, 2, 4, 8, 16, 32, 64)), **chosen)

    def step(self) -> None:
        r = self.r
        number = r.randrange(self.cpu_count) if r.random() < 0.5 else 0
        if r.random() < self.nonsense:
            self.odd(number)
            return
        choice = r.choices(
            (self.deliver, self.ret, self.write, self.move, self.control, self.scene_unblocked, self.scene_same_bytes,
             self.scene_fake),
            (34, 24, 12, 4, 10, 7, 3, 3),
        )[0]  # fmt: skip
        choice(number)

    def events(self) -> None:
        length = self.r.randrange(5, 61)
        if self.deep:
            self.scene_deep(0)
            length += len(self.records)
        while len(self.records) < length:
            self.step()

    # -- results ----------------------------------------------------------------------------------------------------

    def fill(self, writer: TraceWriter) -> None:
        """Write all of it with a TraceWriter."""
        writer.layout = self.layout
        writer.memory = list(self.initial)
        writer.payload(bytes(self.payload))
        writer.append(b"".join(self.records))


def make_kernel(seed: int) -> Kernel:
    """The events of a seed, made but not written."""
    kernel = Kernel(seed)
    kernel.events()
    return kernel


def written_trace(seed: int) -> Trace:
    """The trace of a seed, through the file format (slow: a layout's tables take most of the time)."""
    kernel = make_kernel(seed)
    return build(kernel.fill, name=f"seed {seed}", cpus=kernel.cpu_count)


def assembled(kernel: Kernel, records: list[bytes] | None = None) -> Trace:
    """A trace with the events of a kernel, or some of them, without the way through bytes."""
    trace = build(lambda writer: None, name=f"seed {kernel.seed}", cpus=kernel.cpu_count)
    trace.layout = kernel.layout
    trace.memory = tuple(kernel.initial)
    trace.payload = memoryview(bytes(kernel.payload))
    trace.events = memoryview(b"".join(kernel.records if records is None else records))
    return trace


def random_trace(seed: int) -> Trace:
    """The trace of a seed."""
    return assembled(make_kernel(seed))


COUNTERS = ("events", "judged", "unjudged", "legacy", "failed", "returns", "writes", "gaps", "bad_events")


def coverage(seeds: range) -> dict[str, Counter[str]]:
    """How often each thing occurs, by the model."""
    table: dict[str, Counter[str]] = {
        "kind": Counter({k.name: 0 for k in Kind if k}),
        "rule": Counter({x.name: 0 for x in Rule}),
        "settled as": Counter({x.name: 0 for x in (Rule.FRAME_RELOCATED, Rule.FRAME_CONSUMED_CORRUPT)}),
        "settled by": Counter({x.name: 0 for x in (Settle.CONTEXT, Settle.ABOVE)}),
        "evidence": Counter({x.name: 0 for x in Evidence if x != Evidence.UNKNOWN}),
        "cause": Counter({x.name: 0 for x in Cause}),
        "settle reason": Counter({x.name: 0 for x in Settle}),
        "open at end": Counter({x.name: 0 for x in FrameStatus}),
        "counters": Counter(
            dict.fromkeys((*COUNTERS, "folded"), 0)
        ),
        "IST": Counter({str(n): 0 for n in range(8)}),
    }
    for seed in seeds:
        trace = random_trace(seed)
        model = Model(trace).run(trace.count)
        for index in range(trace.count):
            number = trace.events[index * wire.EVENT_SIZE + 60]
            table["kind"][Kind(number).name if 0 < number <= max(Kind) else "(unknown kind)"] += 1
        for finding in model.findings:
            table["rule"][finding.raised_rule.name] += 1
            table["evidence"][finding.evidence.name] += 1
            table["counters"]["folded"] += finding.count > 1
            if finding.victim is not None:
                table["cause"][finding.cause.name] += 1
            if finding.settled is not None:
                table["settled as"][finding.rule.name] += 1
            if finding.settled_by is not None:
                table["settled by"][finding.settled_by.name] += 1
        for name in COUNTERS:
            table["counters"][name] += getattr(model.stats, name)
        for number, count in enumerate(model.stats.settled):
            table["settle reason"][Settle(number).name] += count
        for number, count in enumerate(model.stats.ist_deliveries):
            table["IST"][str(number)] += count
        for frame in model.frames:
            table["open at end"][frame.status.name] += 1
        trace.close()
    return table


def main() -> int:
    seeds = range(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
    table = coverage(seeds)
    missing = []
    for title, counts in table.items():
        print(f"{title}:")
        for name, count in counts.items():
            print(f"    {name:24} {count:8}")
            if not count:
                missing.append(f"{title} {name}")
    if missing:
        print("never occurred:", ", ".join(missing))
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
