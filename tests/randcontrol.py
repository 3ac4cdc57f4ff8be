"""Stores and control events of a random trace, and nonsense."""

from __future__ import annotations

from collections.abc import Callable

from randevents import Events
from randlayout import KERNEL_CS, KERNEL_SS, MASK, POISON, USER_CS, VECTORS
from randmachine import Context, Cpu

from tracedbg.layout import Gate
from tracedbg.state import EventFlag, Kind, Source

UNKNOWN_KIND = 77
PLAIN_KINDS = (Kind.READ, Kind.EOI, Kind.MODE, Kind.MARK)
MCG_STATUS, X2APIC_TPR, STAR, LSTAR, FMASK, SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP = (
    0x17A, 0x808, 0xC0000081, 0xC0000082, 0xC0000084, 0x174, 0x175, 0x176,
)  # fmt: skip
FRED_RSP0, FRED_STKLVLS, FRED_CONFIG = 0x1CC, 0x1D0, 0x1D4
STAR_VALUE = (USER_CS - 16) << 48 | KERNEL_CS << 32
CR4_MCE, CR4_FRED = 1 << 6, 1 << 32


class Control(Events):
    """What software does: stores, tables, MSRs, masks; and what no source would write."""

    # -- stores -----------------------------------------------------------------------------------------------------

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
        """A store on or near a frame: a repair, an edit, a copy, a push."""
        r = self.r
        shot = self.any_shot(number)
        kind = r.random()
        if shot is None or kind < 0.12:
            self.random_write(number)
            return
        saved = shot.saved
        own = saved.words()
        if kind < 0.35:  # repair
            self.store_words(number, shot.rip_addr, own)
        elif kind < 0.5:  # edit one slot
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
        elif kind < 0.65:  # copy the frame away
            words = [self.peek(shot.rip_addr + 8 * n, word) for n, word in enumerate(own)]
            at = self.work_rsp() if r.random() < 0.4 else (shot.lo - 8 * r.randrange(1, 70)) & MASK
            self.store_words(number, at, words)
            shot.stored_at = at
        elif kind < 0.72:  # copy another frame over it
            other = r.choice([s for c in self.cpus for s in c.nest] + self.dead[-3:])
            self.store_words(number, shot.rip_addr, other.saved.words())
        elif kind < 0.87:
            self.pushes_down(number, r.randrange(1, 5))
        else:
            length = r.randrange(1, 9)
            self.emit(Kind.WRITE, cpu=number, addr=shot.lo + r.randrange(-8, 56), value=r.getrandbits(64), arg=length)

    def pushes_down(self, number: int, count: int) -> None:
        """Stores of which the source knows that they are pushes."""
        r = self.r
        now = self.cpus[number].now
        for _ in range(count):
            length = r.choice((8, 8, 8, 8, 2, 16))
            now.rsp = (now.rsp - length) & MASK
            fields = {"cpu": number, "addr": now.rsp, "rsp": now.rsp, "value": r.getrandbits(64), "arg": length}
            if length == 16:
                fields |= {"value": len(self.payload), "code": 16, "flags": EventFlag.BYTES}
                self.payload += r.randbytes(16)
            self.emit(Kind.WRITE, **fields)

    def random_write(self, number: int) -> None:
        r = self.r
        at = self.random_address()
        more = {} if r.random() < 0.6 else {"rsp": at if r.random() < 0.5 else self.random_address()}
        if r.random() < 0.3:
            length = r.choice((0, 1, 7, 40, 300, 300, 4096, 4097))
            offset = len(self.payload)
            self.payload += r.randbytes(min(length, 400))  # a longer one runs over the end
            if r.random() < 0.2:
                offset = r.choice((MASK, MASK - 20, 1 << 40))
            self.emit(Kind.WRITE, cpu=number, addr=at, value=offset, code=length, flags=EventFlag.BYTES, **more)
        else:
            length = r.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 9, 255))
            if r.random() < 0.8:
                more["value"] = r.getrandbits(64)
            self.emit(Kind.WRITE, cpu=number, addr=at, arg=length, **more)

    def move(self, number: int) -> None:
        """Software copies a frame and says so."""
        r = self.r
        shot = self.any_shot(number)
        at = self.random_address() if shot is None or r.random() < 0.1 else r.choice((shot.lo, shot.rip_addr))
        to = self.work_rsp() if r.random() < 0.6 else at + 8 * r.randrange(-60, 7)
        self.emit(Kind.MOVE, cpu=number, addr=at, value=to)
        if shot is not None and at == shot.rip_addr:
            shot.stored_at = to & MASK
            for n, word in enumerate(shot.saved.words()):
                self.poke(to + 8 * n, self.peek(at + 8 * n, word))

    # -- registers and tables ---------------------------------------------------------------------------------------

    def msr(self, number: int, code: int, value: int) -> None:
        """WRMSR, or what a source knows of an MSR."""
        cpu = self.cpus[number]
        self.emit(Kind.MSR, cpu=number, code=code, value=value)
        if FRED_RSP0 <= code < FRED_RSP0 + 4:
            cpu.fred_rsp[code - FRED_RSP0] = value
        elif code == FRED_STKLVLS:
            cpu.stklvls = value
        elif code == FRED_CONFIG:
            cpu.config = value

    def random_msr(self, number: int) -> None:
        r, world = self.r, self.world
        values: dict[int, Callable[[], int]] = {
            MCG_STATUS: lambda: r.choice((0, 4, 5, 0xFB)),
            X2APIC_TPR: lambda: r.choice((0, 0x10, 0x20, 0xF0, 0x1F0)),
            STAR: lambda: r.choice((STAR_VALUE, STAR_VALUE, STAR_VALUE | 3 << 32, r.getrandbits(64))),
            LSTAR: self.kernel_rip,
            FMASK: lambda: r.choice((0, 0x200, 0x4700, 0x257FD5)),
            SYSENTER_CS: lambda: r.choice((KERNEL_CS, KERNEL_CS | 3, 0, r.getrandbits(20))),
            SYSENTER_ESP: lambda: r.choice((world.tops[7], world.tops[8], self.work_rsp())),
            SYSENTER_EIP: self.kernel_rip,
            **{FRED_RSP0 + n: lambda: r.choice((*world.tops, *world.tops, POISON, 0)) for n in range(4)},
            FRED_STKLVLS: world.stklvls,
            FRED_CONFIG: world.fred_config,
            0x1B: lambda: 0xFEE00000,
        }
        code = r.choice(list(values))
        self.msr(number, code, values[code]())

    def cr(self, number: int) -> None:
        r = self.r
        cpu = self.cpus[number]
        kind = r.random()
        if kind < 0.35:
            self.emit(Kind.CR, cpu=number, arg=8, value=r.choice((0, 1, 2, 15, 0x21)))
        elif kind < 0.95:
            if r.random() < 0.85 and cpu.config is None:
                for code in (FRED_CONFIG, FRED_STKLVLS):
                    self.msr(number, code, self.world.fred_config() if code == FRED_CONFIG else self.world.stklvls())
                for level in range(4):
                    self.msr(number, FRED_RSP0 + level, self.world.tops[level or 7])
            cpu.fred = r.random() < 0.5
            value = (CR4_FRED if cpu.fred else 0) | (CR4_MCE if r.random() < 0.7 else 0) | 0x20
            self.emit(Kind.CR, cpu=number, arg=4, value=value)
        else:
            self.emit(Kind.CR, cpu=number, arg=r.choice((0, 3)), value=r.getrandbits(64))

    def tables(self, number: int) -> None:
        """A TSS slot, a gate, LTR or LIDT."""
        r, world = self.r, self.world
        cpu = self.cpus[number]
        kind = r.choice((Kind.TSS, Kind.TSS, Kind.GATE, Kind.LTR, Kind.LIDT))
        if kind == Kind.TSS:
            slot = r.choice((0, 0, 1, 9, 10, 10, 11, 12, 15, 3, 8, 16, 255))
            value = r.choice((world.area + 0x100 * r.randrange(1, 64), r.choice(world.tops), POISON, 0)) & MASK
            self.emit(kind, cpu=number, arg=slot, value=value)
            if cpu.tss is not None and slot == 0:
                self.rsp0[cpu.tss] = value
            elif cpu.tss is not None and 9 <= slot <= 15:
                self.ist[cpu.tss][slot - 8] = value
        elif kind == Kind.GATE:
            vector = r.choice(VECTORS)
            ist, type_ = r.choice((0, 1, 2, 3)), r.choice((14, 14, 14, 15, 12))
            gate = Gate(0xFFFF_FFFF_8020_0000 + vector, KERNEL_CS, ist, type_, 0, r.random() < 0.9)
            code = gate.ist | gate.type << 8 | gate.present << 15 | r.choice((0, 0x80200000, 0x6000))
            self.emit(kind, cpu=number, arg=vector, value=gate.offset, cs=gate.selector, code=code)
            if cpu.idt is not None:
                self.gates[cpu.idt][vector] = gate
        elif kind == Kind.LTR:
            self.load_tables(number, tss=r.choice([t.base for t in self.layout.tss] * 8 + [0x123000]))
        else:
            self.load_tables(number, idt=r.choice([i.base for i in self.layout.idts] * 8 + [0x123000]))

    def load_tables(self, number: int, tss: int | None = None, idt: int | None = None) -> None:
        cpu = self.cpus[number]
        if tss is not None:
            self.emit(Kind.LTR, cpu=number, value=tss)
            cpu.tss = next((n for n, t in enumerate(self.layout.tss) if t.base == tss), None)
        if idt is not None:
            self.emit(Kind.LIDT, cpu=number, value=idt)
            cpu.idt = next((n for n, i in enumerate(self.layout.idts) if i.base == idt), None)

    def control(self, number: int) -> None:
        """An event that changes masks or registers."""
        r = self.r
        cpu = self.cpus[number]
        kind = r.choice(
            (Kind.SETSP, Kind.SETSP, Kind.RAISE, Kind.UNBLOCK, Kind.FLAGS, Kind.FLAGS, Kind.ENTER, Kind.GS, Kind.GS, Kind.SHADOW,
             Kind.SHADOW, Kind.TOKEN)
        )  # fmt: skip
        if kind == Kind.SETSP:
            cpu.now.rsp = self.work_rsp() if r.random() < 0.7 else (r.choice(self.world.tops) - 8 * r.randrange(8)) & MASK
            self.emit(kind, cpu=number, value=cpu.now.rsp)
        elif kind == Kind.RAISE:
            self.emit(kind, cpu=number, arg=r.choice((2, 2, 18, r.randrange(40))), source=r.choice((2, 2, 5, 5, 6, 8)))
        elif kind == Kind.UNBLOCK:
            self.emit(kind, cpu=number, **({} if r.random() < 0.4 else {"arg": r.choice((0, 1, 2))}))
        elif kind == Kind.FLAGS:
            cpu.now.rflags = r.choice((0x46, 0x246))
            self.emit(kind, cpu=number, rflags=cpu.now.rflags)
        elif kind == Kind.ENTER:
            self.enter(number)
        elif kind == Kind.GS:
            value = r.choice((0, 0x7F00_0000_0000, 0xFFFF_8880_0000_0000))
            self.emit(kind, cpu=number, **({"arg": 0} if r.random() < 0.6 else {"arg": r.choice((1, 1, 1, 2)), "value": value}))
        elif kind == Kind.SHADOW:
            arg = r.choice((0, 0, 1, 1, 2))
            self.emit(kind, cpu=number, arg=arg, rip=cpu.now.rip)
            if arg == 0:
                cpu.now.rflags |= 0x200
        else:
            self.token(number, r.choice((0, 1, 2, 2, 3, 7, 8, 255)), r.choice((None, 0, 1)), r.choice((0, 1)))

    def token(self, number: int, ist: int, held: int | None, holds: int) -> None:
        at = 0x7000 + 0x1000 * ist
        fields = {} if held is None else {"code": at | held}
        self.emit(Kind.TOKEN, cpu=number, arg=ist, addr=at, value=at | holds, **fields)

    # -- nonsense ---------------------------------------------------------------------------------------------------

    def reset(self, number: int) -> None:
        """RESET or INIT, and most often the loading of tables behind it."""
        r = self.r
        self.emit(Kind.INIT, cpu=number, arg=r.randrange(2))
        old = self.cpus[number]
        self.cpus[number] = Cpu(None, None, old.now)
        if r.random() < 0.8:
            self.load_tables(number, self.layout.tss[0].base, self.layout.idts[0].base)

    def odd(self, number: int) -> None:
        """What no source would write, and the ends of things."""
        r = self.r
        kinds = ("gap", "gap", "init", "shutdown", "plain", "kind", "cpu", "no cpu", "random", "random", "random", "deliver")
        kind = r.choice(kinds)
        if kind == "gap":
            fields = {"cpu": number} if r.random() < 0.6 else {}
            self.emit(Kind.GAP, value=r.randrange(1000), **fields)
        elif kind == "init":
            self.reset(number)
        elif kind == "shutdown":
            self.emit(Kind.SHUTDOWN, cpu=number, **({} if r.random() < 0.3 else {"arg": r.randrange(5)}))
        elif kind == "plain":
            self.emit(r.choice(PLAIN_KINDS), cpu=number, addr=self.random_address(), value=r.getrandbits(64), arg=r.randrange(9))
        elif kind == "kind":
            self.emit(r.choice((0, 33, UNKNOWN_KIND, 255)), cpu=number, addr=self.random_address(), arg=8, value=1)
        elif kind == "cpu":
            self.emit(r.choice(list(Kind)), cpu=r.choice((self.world.cpu_count, 4096, 65535)), arg=2, rsp=self.random_address(),
                      addr=self.random_address(), value=1, source=Source.NMI)  # fmt: skip
        elif kind == "no cpu":
            self.emit(r.choice(list(Kind)), arg=2, rsp=self.random_address(), addr=self.random_address(), value=1)
        elif kind == "deliver":
            cs = r.choice((8, 0x33, 0x19, 0))
            rsp = self.random_address() & (MASK if r.random() < 0.5 else ~15)
            self.cpus[number].now = Context(r.getrandbits(64), rsp, cs, r.getrandbits(16), r.getrandbits(32))
            self.deliver(number, still=True)
        else:
            self.random_event(number)

    def random_event(self, number: int) -> None:
        """Any kind with any fields."""
        r = self.r
        fields = {name: r.getrandbits(16) for name in ("cs", "ss")}
        fields |= {name: self.random_address() for name in ("rip", "rsp", "addr", "value")}
        fields |= {"rflags": r.getrandbits(32), "code": r.getrandbits(32), "arg": r.getrandbits(8), "source": r.randrange(11)}
        if r.random() < 0.5:
            fields["arg"] = r.randrange(10)
        if r.random() < 0.5:
            fields["cs"], fields["ss"] = r.choice(((KERNEL_CS, KERNEL_SS), (USER_CS, 0x2B)))
        if r.random() < 0.5:
            fields["code"] = r.randrange(9)
        chosen = {name: value for name, value in fields.items() if r.random() < 0.8}
        self.emit(r.choice(list(Kind)), cpu=number, flags=r.choice((0, 0, 0, 1, 2, 4, 8, 16, 32, 64)), **chosen)
