"""The simulated kernel under a random trace: what each CPU does now, what it stored, and how its records are packed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from randlayout import KERNEL_CS, KERNEL_SS, MASK, USER_CS, USER_SS, World

from tracedbg import wire, x86
from tracedbg.layout import Gate
from tracedbg.state import Known, Return, Source

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
WORDS = ("rip", "cs", "rflags", "rsp", "ss")  # of a frame, from its RIP slot up
FRED_SIZE, FRED_BITS = 64, 0x1C0
LENGTHS = (Source.SOFT_INT, Source.SYSCALL)  # their `code` is the instruction's length


@dataclass
class Context:
    """What a CPU was doing."""

    rip: int
    rsp: int
    cs: int
    ss: int
    rflags: int

    def copy(self) -> Context:
        return replace(self)

    def words(self) -> list[int]:
        return [self.rip, self.cs, self.rflags, self.rsp, self.ss]


@dataclass
class Shot:
    """One delivered frame as the kernel knows it."""

    lo: int
    hi: int
    saved: Context  # as stored
    source: Source
    vector: int
    code: int | None = None
    fred: bool = False
    level: int = 0
    from_level: int = 0
    stored_at: int | None = None  # RIP slot of a copy that software made

    @property
    def rip_addr(self) -> int:
        return self.hi - (56 if self.fred else 40)


@dataclass
class Cpu:
    """What the kernel knows of a CPU, which is more than the trace says."""

    tss: int | None
    idt: int | None
    now: Context
    fred: bool = False
    fred_rsp: list[int | None] = field(default_factory=lambda: [None] * 4)
    stklvls: int | None = None
    config: int | None = None
    csl: int = 0
    nest: list[Shot] = field(default_factory=list)
    last_return: dict[str, int] | None = None


class Machine:
    """Makes the records of one trace; `r` is the chance of the step that runs."""

    def __init__(self, seed: int) -> None:
        self.world = World.make(seed)
        self.r = random.Random(seed)
        self.records: list[bytes] = []
        self.payload = bytearray()
        self.memory: dict[int, int] = {}  # aligned word -> value, as the simulated machine has it
        self.dead: list[Shot] = []  # frames that were returned from
        self.layout = self.world.layout
        self.cpus = []
        for tables in self.layout.cpus:
            self.cpus.append(Cpu(tables.tss, tables.idt, self.idle()))
            if tables.fred is not None:
                cpu, fred = self.cpus[-1], tables.fred
                cpu.fred, cpu.fred_rsp, cpu.stklvls, cpu.config = fred.on, list(fred.rsp), fred.stklvls, fred.config
                if self.r.random() < 0.8:  # from CPL3 the stack level is known
                    cpu.now = self.user_context()
        while len(self.cpus) < self.world.cpu_count:
            self.cpus.append(Cpu(None, None, self.idle()))
        self.ist = [list(t.ist) for t in self.layout.tss]
        self.rsp0 = [t.rsp[0] for t in self.layout.tss]
        self.gates = [dict(i.gates) for i in self.layout.idts]

    # -- contexts ---------------------------------------------------------------------------------------------------

    def idle(self) -> Context:
        return self.user_context() if self.r.random() < 0.4 else self.kernel_context()

    def kernel_context(self) -> Context:
        return Context(self.kernel_rip(), self.work_rsp(), KERNEL_CS, KERNEL_SS, 0x246)

    def user_context(self) -> Context:
        r = self.r
        rsp = self.world.user_area + 0x1000 + 8 * r.randrange(0x80)
        return Context(0x400000 + r.randrange(0x40), rsp & MASK, USER_CS, USER_SS, 0x246)

    def kernel_rip(self) -> int:
        return 0xFFFF_FFFF_8000_0000 + self.r.randrange(0x40)

    def work_rsp(self) -> int:
        return (self.world.work_area + 8 * self.r.randrange(0x300)) & MASK

    def random_address(self) -> int:
        r, area = self.r, self.world.area
        kind = r.random()
        if kind < 0.5:
            return (area + r.randrange(0, 0x3000)) & MASK
        if kind < 0.6:
            return (area + 0x1000 * r.randrange(1, 4) - r.randrange(0, 9)) & MASK
        if kind < 0.7:
            return r.choice((0, 1, 8, 39, 40, 41, 48, 63, 64, 65, MASK, MASK - 7, MASK - 15, MASK - 40, MASK - 39))
        return r.choice((self.work_rsp(), self.world.user_area + r.randrange(0x2000), r.getrandbits(64)))

    # -- records and memory -----------------------------------------------------------------------------------------

    def emit(self, kind: int, drop: bool = True, **fields: int) -> int:
        """Append a record; a field that is given is known, but for some that the world drops. Returns its index."""
        r = self.r
        known = 0
        for name in fields:
            known |= FIELD_BITS.get(name, 0)
        chance = self.world.drop
        if drop and chance:
            for name in DROPPABLE:
                if name in fields and r.random() < chance * (0.3 if name in ("arg", "source") else 1):
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

    # -- frames -----------------------------------------------------------------------------------------------------

    def gate(self, cpu: Cpu, vector: int) -> Gate | None:
        return None if cpu.idt is None else self.gates[cpu.idt].get(vector)

    def usable(self, cpu: Cpu, ist: int | None = None) -> list[int]:
        """Vectors whose gate can deliver; through that IST, if one is named."""
        gates = {} if cpu.idt is None else self.gates[cpu.idt]
        return [v for v, g in gates.items() if g.present and g.type >= 14 and (ist is None or g.ist == ist)]

    def place(self, cpu: Cpu, vector: int, source: Source, code: int) -> Shot | None:
        """The frame of a delivery to the CPU's context; None if there is none."""
        now = cpu.now
        saved = now.copy()
        if source in LENGTHS:
            saved.rip = (saved.rip + code) & MASK
        if source == Source.EXCEPTION and vector in x86.FAULT_VECTORS:
            saved.rflags |= x86.RFLAGS_RF
        has_code = source == Source.EXCEPTION and vector in x86.ERROR_CODE_VECTORS
        if cpu.fred:
            return self.place_fred(cpu, Shot(0, 0, saved, source, vector, code if has_code else 0, fred=True))
        gate = self.gate(cpu, vector)
        if gate is None or not gate.present or gate.type < 14:
            return None
        base: int | None = now.rsp
        if gate.ist:
            base = None if cpu.tss is None else self.ist[cpu.tss][gate.ist]
        elif now.cs & 3:
            base = None if cpu.tss is None else self.rsp0[cpu.tss]
        if base is None or not x86.is_canonical(base) or base < 64:
            return None
        hi = base & ~15
        return Shot(hi - (48 if has_code else 40), hi, saved, source, vector, code if has_code else None)

    def place_fred(self, cpu: Cpu, shot: Shot) -> Shot | None:
        cs, source, vector = cpu.now.cs & 3, shot.source, shot.vector
        if cs not in (0, 3) or cpu.config is None or cpu.stklvls is None or source == Source.UNKNOWN:
            return None
        shot.from_level = 0 if cs else cpu.csl
        level = cpu.stklvls >> 2 * vector & 3 if vector < 32 else 0
        if cs and vector != 8:
            level = 0
        elif source in (Source.FIXED, Source.EXTINT, Source.EXTERNAL, Source.INJECTED):
            level = cpu.config >> 9 & 3
        elif source == Source.SYSCALL or (source == Source.SOFT_INT and vector not in (1, 3, 4)):
            level = 0
        shot.level = max(level, shot.from_level)
        raised = cs != 0 or shot.level > shot.from_level
        base = cpu.fred_rsp[shot.level] if raised else (cpu.now.rsp - (cpu.config & FRED_BITS)) & MASK
        if base is None or not x86.is_canonical(base) or base < FRED_SIZE:
            return None
        shot.hi = base & ~63
        shot.lo = shot.hi - FRED_SIZE
        return shot

    def pushes(self, shot: Shot) -> list[int]:
        """The words of a frame in the order in which they are stored, from hi down."""
        saved = shot.saved
        if not shot.fred:
            return [*reversed(saved.words()), *([] if shot.code is None else [shot.code])]
        kinds = {Source.NMI: 2, Source.EXCEPTION: 3, Source.MC: 3, Source.SOFT_INT: 4, Source.SYSCALL: 7}
        extra = (4 if shot.source == Source.NMI else 0) | (2 if shot.source in LENGTHS else 0)
        ss = saved.ss | extra << 16 | shot.vector << 32 | kinds.get(shot.source, 0) << 48
        return [0, 0, ss, saved.rsp, saved.rflags, saved.cs | shot.from_level << 16, saved.rip, shot.code or 0]

    def push(self, shot: Shot, count: int = 8) -> None:
        """Store the first `count` words."""
        for n, word in enumerate(self.pushes(shot)[:count]):
            self.poke(shot.hi - 8 - 8 * n, word)

    def take(self, cpu: Cpu, shot: Shot) -> None:
        """Go on in the handler of a delivery."""
        now = cpu.now
        self.push(shot)
        cpu.nest.append(shot)
        if shot.fred:
            assert cpu.config is not None
            user = now.cs & 3 != 0
            rip = (cpu.config & ~0xFFF) + (0 if user else 256)
            cpu.now = Context(rip, shot.lo, KERNEL_CS if user else now.cs, KERNEL_SS if user else now.ss, 2)
            cpu.csl = shot.level
            return
        gate = self.gate(cpu, shot.vector)
        assert gate is not None
        flags = now.rflags & ~(x86.RFLAGS_TF | x86.RFLAGS_NT | x86.RFLAGS_RF)
        if gate.type == x86.GATE_INTERRUPT:
            flags &= ~x86.RFLAGS_IF
        cpu.now = Context(gate.offset, shot.lo, gate.selector, 0 if now.cs & 3 else now.ss, flags)

    def popped(self, shot: Shot, from_memory: bool) -> Context:
        """What a return through a frame pops: the stored context, or what lies in memory now."""
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

    def any_shot(self, number: int) -> Shot | None:
        """One of the newest frames of the CPU, else of any, else a consumed one."""
        shots = self.cpus[number].nest or [s for c in self.cpus for s in c.nest] or self.dead
        return self.r.choice(shots[-4:]) if shots else None


def return_kind(shot: Shot) -> Return:
    """The instruction that goes with a frame."""
    if not shot.fred:
        return Return.IRET
    return Return.ERETU if shot.saved.cs & 3 else Return.ERETS
