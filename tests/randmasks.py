"""Scenes of a random trace about what lets an event come: the ring gap, faults, masks, tokens, NMI blocking and windows."""

from __future__ import annotations

from randcontrol import FMASK, LSTAR, MCG_STATUS, STAR, STAR_VALUE, X2APIC_TPR, Control
from randlayout import KERNEL_CS, KERNEL_SS, MASK, POISON, VECTORS
from randmachine import Context, Shot

from tracedbg import x86
from tracedbg.layout import Gate
from tracedbg.state import EventFlag, Kind, Source


class Masks(Control):
    """Each method is a scene, or a part of some; `number` is the CPU that it begins on."""

    def other(self, number: int) -> int:
        """Another CPU, if there is one."""
        return self.r.randrange(self.world.cpu_count) if self.r.random() < 0.3 else (number + 1) % self.world.cpu_count

    def nmi(self, number: int, *, still: bool = False) -> Shot | None:
        return self.deliver(number, 2, Source.NMI, still=still, plain=self.r.random() < 0.8)

    def on_stack(self, number: int, *, still: bool = True) -> Shot | None:
        """An event that stays on the current stack, as far as the IDT has one."""
        vectors = self.usable(self.cpus[number], 0) or list(VECTORS)
        vector = self.r.choice(vectors)
        source = Source.EXCEPTION if vector < 32 and vector not in (2, 18) else Source.FIXED
        return self.deliver(number, vector, source, still=still, plain=self.r.random() < 0.8)

    def lose_track(self, number: int) -> None:
        """An event after which registers and home stack are unknown."""
        r = self.r
        kind = r.choice((Kind.RSM, Kind.VMENTRY, Kind.VMEXIT, Kind.SYSENTER, Kind.DELIVER, Kind.DELIVER, Kind.RETURN))
        fields = {"arg": r.choice((2, 200)), "flags": r.choice((0, EventFlag.LEGACY))} if kind == Kind.DELIVER else {}
        if kind == Kind.RETURN:
            fields = {"flags": EventFlag.LEGACY} if r.random() < 0.5 else {}
        self.emit(kind, cpu=number, **fields)

    def some_returns(self, number: int, most: int) -> None:
        for _ in range(self.r.randrange(most + 1)):
            if self.r.random() < 0.25:
                self.write(number)
            else:
                self.ret(number)

    # -- the ring gap -----------------------------------------------------------------------------------------------

    def syscall(self, number: int, kind: Kind = Kind.SYSCALL) -> None:
        """The CPU enters the kernel by SYSCALL or SYSENTER."""
        r = self.r
        cpu = self.cpus[number]
        now = cpu.now
        fields = {"rip": now.rip, "rsp": now.rsp, "cs": now.cs, "ss": now.ss, "rflags": now.rflags}
        if r.random() < 0.5:
            fields["addr"] = self.kernel_rip()
        self.emit(kind, cpu=number, **fields)
        cpu.now = Context(fields.get("addr", self.kernel_rip()), now.rsp, KERNEL_CS, KERNEL_SS, now.rflags & ~0x200)

    def ring_gap(self, number: int) -> None:
        """SYSCALL, perhaps in the shadow of MOV SS, and an event before the kernel has its stack; or SYSRET faults."""
        r = self.r
        cpu = self.cpus[number]
        if cpu.fred and r.random() < 0.7:
            self.emit(Kind.CR, cpu=number, arg=4, value=0x60)
            cpu.fred = False
        if r.random() < 0.4:
            for code, value in ((STAR, STAR_VALUE), (LSTAR, self.kernel_rip()), (FMASK, 0x200)):
                self.msr(number, code, value)
        cpu.now = self.user_context()
        held = r.random() < 0.4
        if held:
            self.emit(Kind.SHADOW, cpu=number, rip=cpu.now.rip, arg=r.choice((1, 1, 1, 0)))
            if r.random() < 0.2:
                self.emit(r.choice((Kind.READ, Kind.WRITE, Kind.EOI, Kind.MARK, Kind.FLAGS)), cpu=number, addr=8, arg=8)
        if r.random() < 0.7:
            self.syscall(number)
        else:
            cpu.now.cs, cpu.now.ss = KERNEL_CS, KERNEL_SS
            fields = {"addr": 1 << 63} if r.random() < 0.5 else {}
            self.emit(Kind.SYSRET, cpu=number, rip=cpu.now.rip, rsp=cpu.now.rsp, flags=EventFlag.FAULTED, **fields)
        way = r.random()
        if way < 0.15:
            self.emit(Kind.SETSP, cpu=number, value=self.work_rsp())
        elif way < 0.25:
            self.deliver(number, r.choice((2, 18)), plain=True, still=True)
            self.ret(number)
        elif way < 0.3:
            cpu.now.rsp = self.work_rsp()
        if held and r.random() < 0.8:
            self.deliver(number, 1, Source.EXCEPTION, still=True, plain=True)
        else:
            self.on_stack(number)
        self.ret(number)

    def sysenter(self, number: int) -> None:
        r = self.r
        if r.random() < 0.5:
            for code, value in ((0x174, KERNEL_CS), (0x175, r.choice(self.world.tops)), (0x176, self.kernel_rip())):
                self.msr(number, code, value)
        self.cpus[number].now = self.user_context()
        self.syscall(number, r.choice((Kind.SYSENTER, Kind.SYSENTER, Kind.SYSCALL)))
        if r.random() < 0.5:
            self.on_stack(number)

    def sysret(self, number: int) -> None:
        to = self.user_context()
        fields = {"addr": to.rip, "rsp": to.rsp} if self.r.random() < 0.7 else {}
        self.emit(Kind.SYSRET, cpu=number, **fields)
        self.cpus[number].now = to

    # -- faults that deliveries end in ------------------------------------------------------------------------------

    def fault_pairs(self, number: int) -> None:
        """Two or three faults in a row; what they end in is right or wrong by the table of double faults."""
        r = self.r
        for _ in range(r.choice((1, 2, 2, 3))):
            vector = r.choice((14, 14, 20, 13, 11, 10, 0, 21, 1, 3, 6, 2, 8))
            source = Source.NMI if vector == 2 else r.choice((Source.EXCEPTION,) * 6 + (Source.SOFT_INT,))
            self.attempt(number, vector, source, 0, r.choice((None, 0, 0, 2)))
        kind = r.random()
        if kind < 0.7:
            vector = r.choice((8, 8, 14, 13, 20, 1, 6))
            self.deliver(number, vector, Source.EXCEPTION, still=True, code=0, plain=True)
        elif kind < 0.9:
            self.emit(Kind.SHUTDOWN, cpu=number, **({} if r.random() < 0.6 else {"arg": r.choice((0, 0, 1, 2, 3))}))

    def wrong_gate(self, number: int) -> None:
        """A delivery through a gate that cannot deliver, or to an impossible pointer; INT n from CPL3."""
        r = self.r
        cpu = self.cpus[number]
        vector = r.choice(VECTORS)
        way = r.random()
        if way < 0.5:
            ist, kind = r.choice((0, 0, 2)), r.choice((14, 14, 14, 15, 12, 0))
            code = ist | kind << 8 | r.choice((0, 3)) << 13 | (r.random() < 0.7) << 15
            self.emit(Kind.GATE, cpu=number, arg=vector, value=0xFFFF_FFFF_8040_0000, cs=KERNEL_CS, code=code)
            if cpu.idt is not None:
                self.gates[cpu.idt][vector] = Gate(0xFFFF_FFFF_8040_0000, KERNEL_CS, ist, kind, code >> 13 & 3, bool(code >> 15))
        elif way < 0.7 and cpu.tss is not None:
            slot = r.choice((1, 2, 3))
            value = r.choice((POISON, 1 << 56, 0, (1 << 56) - 1, 1 << 63))
            self.emit(Kind.TSS, cpu=number, arg=8 + slot, value=value)
            self.ist[cpu.tss][slot] = value
            vector = r.choice(self.usable(cpu, slot) or [2])
        if r.random() < 0.6:
            cpu.now = self.user_context()
            self.deliver(number, vector, Source.SOFT_INT, still=True, code=r.choice((1, 2)), plain=r.random() < 0.7)
        else:
            self.deliver(number, vector, plain=r.random() < 0.7)

    def wrong_code(self, number: int) -> None:
        """A vector with an error code that comes as an interrupt; a handler that drops a word too much or too few."""
        r = self.r
        if r.random() < 0.6:
            vector = r.choice((8, 13, 14, 17, 21, 30))
            self.deliver(number, vector, r.choice((Source.SOFT_INT, Source.FIXED, Source.EXTINT, Source.INJECTED)), plain=True)
        else:
            self.deliver(number, plain=True)
        nest = self.cpus[number].nest
        if nest and r.random() < 0.8:
            self.shifted_return(number, nest.pop())

    # -- what holds events back -------------------------------------------------------------------------------------

    def machine_checks(self, number: int) -> None:
        r = self.r
        if r.random() < 0.3:
            self.emit(Kind.CR, cpu=number, arg=4, value=r.choice((0, 0x40)) | self.cpus[number].fred << 32)
        if r.random() < 0.3:
            self.msr(number, MCG_STATUS, r.choice((0, 4)))
        self.deliver(number, 18, Source.MC, plain=True)
        if r.random() < 0.6:
            self.msr(number, MCG_STATUS, r.choice((0, 0, 0, 4)))
        if r.random() < 0.7:
            self.deliver(number, 18, Source.MC, plain=True)
        self.some_returns(number, 2)

    def priorities(self, number: int) -> None:
        """A vector that the task priority holds, or that the APIC refuses."""
        r = self.r
        if r.random() < 0.7:
            value = r.choice((0, 1, 1, 2, 3, 15))
            if r.random() < 0.5:
                self.emit(Kind.CR, cpu=number, arg=8, value=value)
            else:
                self.msr(number, X2APIC_TPR, value << 4)
        for _ in range(r.choice((1, 2, 3))):
            vector = r.choice((2, 13, 15, 16, 18, 18, 31, 32, 0x20, 0x30))
            if r.random() < 0.6:
                self.emit(Kind.RAISE, cpu=number, arg=vector, source=r.choice((Source.FIXED,) * 4 + (Source.EXTINT,)))
            if r.random() < 0.5:
                self.deliver(number, vector, Source.FIXED, plain=True)
                if r.random() < 0.3:
                    self.ret(number)

    def guest(self, number: int) -> None:
        """VM entries and exits, with an NMI for a reason; GIF."""
        r = self.r
        cpu = self.cpus[number]
        if r.random() < 0.6:
            self.emit(Kind.VMENTRY, cpu=number, arg=r.choice((0, 1)))
        host = self.kernel_context()
        fields: dict[str, int] = {}
        if r.random() < 0.8:
            fields = {"rip": host.rip, "rsp": host.rsp, "cs": host.cs, "ss": host.ss, "rflags": 0x46}
        if r.random() < 0.5:
            fields["source"] = r.choice((Source.NMI, Source.NMI, Source.EXTERNAL))
        self.emit(Kind.VMEXIT, cpu=number, arg=r.choice((0, 1, 1)), code=r.randrange(60), **fields)
        cpu.now = host
        if r.random() < 0.5:
            self.deliver(number, r.choice((2, 2, 0x30, 14)), plain=True)
        if r.random() < 0.5:
            self.emit(Kind.UNBLOCK, cpu=number, arg=r.choice((0, 1, 1)))
        if r.random() < 0.5:
            self.deliver(number, 2, r.choice((Source.NMI, Source.SOFT_INT)), plain=True)
            self.ret(number)

    def smm(self, number: int) -> None:
        """SMI and RSM, with deliveries and returns between."""
        r = self.r
        if r.random() < 0.6:
            self.nmi(number)
        before = self.cpus[number].now.copy()
        self.emit(Kind.SMI, cpu=number)
        for _ in range(r.choice((0, 1, 1, 2, 3))):
            kind = r.random()
            flags = r.choice((0, EventFlag.SMM))
            now = self.cpus[number].now
            if kind < 0.4:
                self.emit(Kind.RETURN, cpu=number, rsp=now.rsp, addr=now.rip, value=now.rsp, cs=now.cs, flags=flags)
            elif kind < 0.7:
                self.emit(Kind.DELIVER, flags=flags, **self.request(number, 2, Source.NMI, 0))
            elif kind < 0.8:
                self.emit(Kind.SMI, cpu=number)
            else:
                self.control(number)
        if r.random() < 0.9:
            self.emit(Kind.RSM, cpu=number)
        self.cpus[number].now = before
        if r.random() < 0.7:
            self.nmi(number)

    def tokens(self, number: int) -> None:
        """Shadow-stack tokens: taken, given back, busy when they should not be."""
        r = self.r
        cpu = self.cpus[number]
        vector = r.choice((2, 2, 18, 1))
        gate = self.gate(cpu, vector)
        ist = (gate.ist if gate is not None and not cpu.fred else 0) or 2
        self.token(number, ist, r.choice((None, 0)), r.choice((0, 1, 1)))
        if r.random() < 0.5:
            self.deliver(number, vector, plain=True)
        if r.random() < 0.4:
            self.ret(number)
        if r.random() < 0.5:
            for _ in range(r.choice((1, 2))):
                self.attempt(number, vector, self.source_of(cpu, vector), 0, r.choice((0, 5, None)))
        if r.random() < 0.4:
            self.token(number, ist, r.choice((0, 1, 1)), 1)
        if r.random() < 0.6:
            self.deliver(number, vector, plain=True)

    # -- NMI blocking and windows -----------------------------------------------------------------------------------

    def lost(self, number: int) -> None:
        """NMIs are raised while one runs."""
        self.nmi(number)
        for _ in range(self.r.choice((1, 2, 2, 3))):
            self.emit(Kind.RAISE, cpu=number, arg=2, source=Source.NMI)
        self.some_returns(number, 2)

    def stuck(self, number: int) -> None:
        """The NMI handler is left without IRET; or ERET pops a frame without its NMI bit."""
        r = self.r
        cpu = self.cpus[number]
        if r.random() < 0.3:  # once more, when NMIs are blocked anew
            self.nmi(number)
            self.sysret(number)
            cpu.nest.clear()
        shot = self.nmi(number)
        way = r.random()
        if shot is not None and shot.fred and way < 0.5:
            cpu.nest.remove(shot)
            to = self.popped(shot, True)
            self.emit_return(number, shot.lo, to, shot, code=0, arg=1 if to.cs & 3 else 2)
            return
        self.leave_frames(cpu, r.choice((0, 1, 1, 2)))
        if way < 0.3:
            cpu.now = self.user_context()
        elif way < 0.5 and shot is not None:
            cpu.now.rsp = (shot.rip_addr + r.choice((0, 1, 8, 40))) & MASK
        elif way < 0.8:
            self.sysret(number)
        self.deliver(number, r.choice((14, 0x30, 0x20, 2)), still=True, plain=True)

    def unmatched(self, number: int) -> None:
        """A return pops a frame that was consumed before."""
        r = self.r
        shot = self.deliver(number, r.choice(VECTORS), plain=True)
        if shot is None:
            return
        self.return_from(number, shot)
        for _ in range(r.choice((0, 1, 9))):
            self.on_stack(number, still=False)
            self.ret(number)
        self.cpus[number].now = self.kernel_context()
        self.emit_return(number, shot.lo if shot.fred else shot.rip_addr, self.popped(shot, True), shot)

    def window(self, number: int) -> None:
        """A frame on an IST stack, perhaps with a copy of it below, and what opens the way for the next event there."""
        r = self.r
        cpu = self.cpus[number]
        shot = self.deliver(number, r.choice((2, 2, 18, 1, 14)), plain=True)
        if shot is not None and r.random() < 0.4:
            at = (shot.lo - 8 * r.choice((1, 5, 6, 30, 63, 64, 65))) & MASK
            words = [self.peek(shot.rip_addr + 8 * n, word) for n, word in enumerate(shot.saved.words())]
            if r.random() < 0.2:
                words[r.randrange(5)] ^= 1
            self.store_words(number, at, words, drop=False)
        for _ in range(r.choice((1, 1, 2, 3))):
            way = r.randrange(6)
            if way == 0:
                cpu.now.rflags |= x86.RFLAGS_IF
                self.emit(Kind.FLAGS, cpu=number, rflags=cpu.now.rflags)
            elif way == 1:
                cpu.now.rflags |= x86.RFLAGS_IF
                self.emit(Kind.SHADOW, cpu=number, arg=0, rip=cpu.now.rip)
            elif way == 2:
                self.msr(number, MCG_STATUS, 0)
            elif way == 3:
                self.emit(Kind.UNBLOCK, cpu=number, arg=0)
            else:
                inner = self.on_stack(number, still=False)
                if inner is not None and r.random() < 0.8:
                    self.return_from(number, inner)
