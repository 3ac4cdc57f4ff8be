"""Short scenes of a random trace, each aimed at a sentence of the replay page that chance alone would seldom reach."""

from __future__ import annotations

from randcontrol import FMASK, LSTAR, MCG_STATUS, STAR, STAR_VALUE, X2APIC_TPR, Control
from randlayout import KERNEL_CS, KERNEL_SS, MASK, VECTORS
from randmachine import Context, Shot

from tracedbg import x86
from tracedbg.layout import REGION_STACK, Gate
from tracedbg.state import EventFlag, Kind, Source

ODD_NMI = (Source.SOFT_INT, Source.EXTINT, Source.FIXED, Source.INJECTED)


class Scenes(Control):
    """The scenes; `number` is the CPU that a scene begins on."""

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

    def forgotten(self, number: int) -> None:
        """What a CPU remembers, a gap or a reset that takes it away, and an event that would show it."""
        r = self.r
        scenes = (self.fault_pairs, self.fault_pairs, self.consumed, self.unmatched, self.tokens, self.ring_gap, self.lost,
                  self.guest, self.priorities)  # fmt: skip
        scene = r.choice(scenes)
        before = len(self.records)
        scene(number)
        count = len(self.records) - before
        del self.records[before + r.randrange(1, count + 1) if count else before :]
        way = r.random()
        if way < 0.4:
            self.emit(Kind.GAP, **({"cpu": number} if r.random() < 0.6 else {}))
        elif way < 0.7:
            self.reset(number)
        else:
            self.lose_track(number)
        if r.random() < 0.5:
            self.deliver(number, r.choice((8, 2, 14)), still=True, plain=True)
        elif r.random() < 0.4 and self.cpus[number].last_return is not None:
            self.emit(Kind.RETURN, **(self.cpus[number].last_return or {}))
        elif r.random() < 0.5:
            self.emit(Kind.SHUTDOWN, cpu=number)
        else:
            scene(number)

    def some_returns(self, number: int, most: int) -> None:
        for _ in range(self.r.randrange(most + 1)):
            if self.r.random() < 0.25:
                self.write(number)
            else:
                self.ret(number)

    # -- frames over frames -----------------------------------------------------------------------------------------

    def unblocked(self, number: int) -> None:
        """NMI, an exception in it whose return unblocks NMIs, NMI again: then a consumer, or a repair."""
        r = self.r
        self.nmi(number)
        self.deliver(number, r.choice((1, 3, 14, 18)))
        if r.random() < 0.8:
            self.ret(number)
        self.deliver(number, r.choice((2, 2, 2, 18)), still=r.random() < 0.5)
        self.some_returns(number, 4)

    def consumed(self, number: int) -> None:
        """The overwritten frame is returned through: its own IRET resumes the newer one's context, over and over."""
        r = self.r
        first = self.nmi(number)
        if self.on_stack(number, still=False) is not None:
            self.return_from(number, self.cpus[number].nest[-1])
        second = self.nmi(number, still=r.random() < 0.5)
        if first is None or second is None:
            return
        self.return_from(number, second)
        if r.random() < 0.3:
            self.write(number)
        for _ in range(r.choice((1, 1, 2, 3))):
            self.emit_return(number, first.lo if first.fred else first.rip_addr, self.popped(first, True), first)

    def same_bytes(self, number: int) -> None:
        """The same context interrupted twice."""
        r = self.r
        before = self.cpus[number].now.copy()
        self.deliver(number, 2, still=True)
        if r.random() < 0.5:
            self.cpus[number].now = before
        self.deliver(number, 2, still=True)
        if r.random() < 0.5:
            self.ret(number)

    def fake(self, number: int) -> None:
        vector = self.r.choice((2, 18))
        self.deliver(number, vector, self.r.choice(ODD_NMI))
        self.deliver(number, vector)
        self.some_returns(number, 3)

    def other_cpu(self, number: int) -> None:
        """Two CPUs whose TSSes name one stack."""
        other = self.other(number)
        mine, yours = self.cpus[number], self.cpus[other]
        if mine.tss is not None and yours.tss is not None and self.r.random() < 0.7:
            slot = self.r.choice((1, 2, 2, 3))
            value = self.ist[mine.tss][slot]
            if value is not None:
                self.emit(Kind.TSS, cpu=other, arg=8 + slot, value=value)
                self.ist[yours.tss][slot] = value
        first = self.nmi(number)
        way = self.r.random()
        if first is not None and way < 0.3:  # below the other CPU's RSP, which nobody switched
            yours.now = Context(self.kernel_rip(), (first.hi + 8 * self.r.randrange(4)) & MASK, KERNEL_CS, KERNEL_SS, 0x46)
            second = self.on_stack(other)
            if second is not None and self.r.random() < 0.5:
                self.return_from(other, second)
            if mine.nest:
                self.return_from(number, mine.nest[-1])
            return
        if first is not None and way < 0.5:
            yours.now = first.saved.copy()
        self.nmi(other, still=way < 0.5)
        self.ret(other)
        self.ret(number)

    def moved(self, number: int) -> None:
        """A handler copies its frame away and says so; another one comes."""
        shot = self.nmi(number)
        if shot is not None:
            to = self.work_rsp()
            self.emit(Kind.MOVE, cpu=number, addr=self.r.choice((shot.lo, shot.rip_addr)), value=to)
            shot.stored_at = to
        self.nmi(number)
        self.some_returns(number, 2)

    def partial(self, number: int) -> None:
        """An attempt stores some words over a live frame."""
        r = self.r
        vector = r.choice((2, 2, 18, 1, 3))
        self.deliver(number, vector, plain=True)
        self.run_on(self.cpus[number])
        self.failed(number, vector, self.source_of(self.cpus[number], vector), r.choice((0, 1, 2)))
        self.some_returns(number, 2)

    def flood(self, number: int) -> None:
        """More frames than are kept, of a stack or of a CPU's own."""
        r = self.r
        stacks = r.choice((1, 6, 6)) if self.world.size >= 0x1000 else 1
        tops = [(self.world.work_area + 0x3000) & MASK] if stacks == 1 else self.world.tops[:stacks]
        vectors = [v for v in self.usable(self.cpus[number], 0) if v > 31] or [0x30]
        for top in tops:
            self.cpus[number].now = Context(self.kernel_rip(), top, KERNEL_CS, KERNEL_SS, 0x246)
            for _ in range(r.randrange(60, 80)):
                self.deliver(number, r.choice(vectors), Source.FIXED, still=True, plain=True)
                if stacks == 1 and r.random() < 0.02:
                    self.ret(number)

    def cycle(self, number: int) -> None:
        """Handlers on IST stacks interrupt each other in turn: A, B, A over the first, B over its own."""
        r = self.r
        cpu = self.cpus[number]
        gates = {} if cpu.idt is None else self.gates[cpu.idt]
        dedicated = [v for v in self.usable(cpu) if gates[v].ist] or [2, 18]
        turn = [r.choice(dedicated) for _ in range(r.choice((2, 2, 3)))]
        for n in range(r.randrange(3, 8)):
            vector = turn[n % len(turn)]
            if cpu.nest and r.random() < 0.1:  # above the newest frame, on its stack
                cpu.now.rsp = (cpu.nest[-1].rip_addr + 8 * r.randrange(1, 8)) & MASK
            self.deliver(number, vector, r.choice((None, Source.SOFT_INT)), still=r.random() < 0.6, plain=True)
        self.some_returns(number, 3)

    # -- the ends of stacks -----------------------------------------------------------------------------------------

    def overflow(self, number: int) -> None:
        """A frame straddles the bottom of its stack, where the next stack may begin with a live frame."""
        r = self.r
        cpu = self.cpus[number]
        below = self.nmi(r.choice((number, number, self.other(number)))) if r.random() < 0.8 else None
        top = below.hi if below is not None and r.random() < 0.8 else self.bottom()
        for _ in range(r.choice((1, 1, 2))):
            rsp = top + r.choice((1, 8, 16, 24, 32, 32, 40, 47, 48, 56, 64))
            cpu.now = Context(self.kernel_rip(), rsp & MASK, KERNEL_CS, KERNEL_SS, 0x46)
            self.on_stack(number)
        self.some_returns(number, 2)

    def bottom(self) -> int:
        """Where a stack begins, or should."""
        begins = [region.lo for region in self.layout.regions if region.kind == REGION_STACK]
        return self.r.choice(begins if begins and self.r.random() < 0.6 else self.world.tops)

    def pushed_over(self, number: int) -> None:
        """Pushes run down into the stack below; or stores without a known RSP go there."""
        r = self.r
        cpu = self.cpus[number]
        below = self.nmi(r.choice((number, number, self.other(number))))
        top = below.hi if below is not None and r.random() < 0.8 else self.bottom()
        rsp = (top + r.choice((4, 8, 16, 40, 56))) & MASK
        cpu.now = Context(self.kernel_rip(), rsp, KERNEL_CS, KERNEL_SS, 0x46)
        way = r.random()
        if way < 0.3:
            self.emit(Kind.SETSP, cpu=number, value=rsp)
        elif way < 0.6:
            self.on_stack(number)
        elif way < 0.9 and self.usable(cpu):
            self.deliver(number, r.choice(self.usable(cpu)), plain=True)
        if r.random() < 0.15:
            self.lose_track(number)
        if r.random() < 0.6:
            self.pushes_down(number, r.randrange(1, 9))
        else:
            value = r.choice((0, r.getrandbits(64)))
            self.emit(Kind.WRITE, cpu=number, addr=(top - 8 * r.randrange(7)) & MASK, value=value, arg=r.choice((1, 8)))
        self.some_returns(number, 1)

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
            value = r.choice((0x8600111111111111, 1 << 56, 0, (1 << 56) - 1, 1 << 63))
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


# Each with its weight: about what a step of a trace should be.
WEIGHTS: dict[str, int] = {
    "deliver": 26, "ret": 18, "write": 9, "move": 3, "control": 8, "cr": 3, "random_msr": 4, "tables": 4, "odd": 8,
    "unblocked": 6, "consumed": 4, "same_bytes": 2, "fake": 2, "other_cpu": 3, "moved": 2, "partial": 3, "overflow": 5,
    "pushed_over": 5, "ring_gap": 5, "sysenter": 2, "sysret": 2, "fault_pairs": 4, "wrong_gate": 4, "wrong_code": 4,
    "machine_checks": 4, "priorities": 4, "guest": 4, "smm": 4, "tokens": 4, "lost": 2, "stuck": 5, "unmatched": 4, "window": 8,
    "cycle": 4, "forgotten": 4,
}  # fmt: skip
SCENES: tuple[str, ...] = tuple(name for name, weight in WEIGHTS.items() for _ in range(weight))
