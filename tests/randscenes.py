"""Short scenes of a random trace, each aimed at a sentence of the replay page that chance alone would seldom reach."""

from __future__ import annotations

from randlayout import KERNEL_CS, KERNEL_SS, MASK
from randmachine import Context
from randmasks import Masks

from tracedbg.layout import REGION_STACK
from tracedbg.state import Kind, Source

ODD_NMI = (Source.SOFT_INT, Source.EXTINT, Source.FIXED, Source.INJECTED)


class Scenes(Masks):
    """Scenes about frames over frames and the ends of stacks, and all those of Masks."""

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
        if self.cpus[number].fred:
            self.emit(Kind.CR, cpu=number, arg=4, value=0x60)
            self.cpus[number].fred = False
        self.load_tables(number, self.layout.tss[0].base, self.layout.idts[0].base)
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

    # -- what is forgotten ------------------------------------------------------------------------------------------

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


# Each with its weight: about what a step of a trace should be.
WEIGHTS: dict[str, int] = {
    "deliver": 26, "ret": 18, "write": 9, "move": 3, "control": 8, "cr": 3, "random_msr": 4, "tables": 4, "odd": 8,
    "unblocked": 6, "consumed": 4, "same_bytes": 2, "fake": 2, "other_cpu": 3, "moved": 2, "partial": 3, "overflow": 5,
    "pushed_over": 5, "ring_gap": 5, "sysenter": 2, "sysret": 2, "fault_pairs": 4, "wrong_gate": 4, "wrong_code": 4,
    "machine_checks": 4, "priorities": 4, "guest": 4, "smm": 4, "tokens": 4, "lost": 2, "stuck": 5, "unmatched": 4, "window": 8,
    "cycle": 4, "forgotten": 4,
}  # fmt: skip
SCENES: tuple[str, ...] = tuple(name for name, weight in WEIGHTS.items() for _ in range(weight))
