"""Deliveries and returns of a random trace."""

from __future__ import annotations

from randlayout import KERNEL_CS, MASK, USER_CS, VECTORS
from randmachine import WORDS, Context, Cpu, Machine, Shot, return_kind

from tracedbg import x86
from tracedbg.layout import Fidelity
from tracedbg.state import EventFlag, Kind, Return, Source

MASKABLE = (Source.FIXED, Source.EXTINT, Source.EXTERNAL)
OTHER_NMI = (Source.SOFT_INT, Source.EXTINT, Source.EXTERNAL, Source.INJECTED, Source.UNKNOWN)
OTHER_MC = (Source.SOFT_INT, Source.FIXED, Source.EXTINT, Source.INJECTED, Source.UNKNOWN)


class Events(Machine):
    """What happens to a CPU: an event is delivered, or tried to be; a handler returns, rightly or not."""

    # -- deliveries -------------------------------------------------------------------------------------------------

    def source_of(self, cpu: Cpu, vector: int) -> Source:
        r = self.r
        if cpu.fred and vector in (1, 2) and r.random() < 0.15:
            return Source.SYSCALL
        if vector == 2:
            return r.choice((Source.NMI,) * 8 + OTHER_NMI)
        if vector == 18:
            return r.choice((Source.MC,) * 6 + OTHER_MC)
        if vector < 32:
            return r.choice((Source.EXCEPTION,) * 8 + (Source.SOFT_INT, Source.FIXED, Source.UNKNOWN))
        return r.choice((Source.FIXED, Source.FIXED, Source.EXTINT, Source.INJECTED, Source.EXTERNAL, Source.SOFT_INT))

    def leave_frames(self, cpu: Cpu, count: int) -> None:
        """Handlers are left without a record of it."""
        for _ in range(min(count, len(cpu.nest))):
            shot = cpu.nest.pop()
            cpu.now = shot.saved.copy()
            cpu.csl = shot.from_level
            self.dead.append(shot)

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
            self.leave_frames(cpu, r.choice((1, 1, 1, 2, 9)))
            now = cpu.now
            if r.random() < 0.4:
                now.rsp = (now.rsp + 8 * r.randrange(0, 9)) & MASK
            if r.random() < 0.4:
                now.rip = (now.rip + r.randrange(1, 9)) & MASK
        elif kind < 0.91:
            cpu.now = now = self.user_context()
            if r.random() < 0.8:
                cpu.nest.clear()
                cpu.csl = 0
        elif kind < 0.93:  # behind SYSCALL: kernel code on the user's stack
            cpu.now = now = Context(self.kernel_rip(), self.user_context().rsp, KERNEL_CS, 0x10, 0x46)
        elif kind < 0.95 and cpu.nest:  # a frame's own stack, above it
            now.rsp = (cpu.nest[-1].hi + 8 * r.randrange(-4, 3)) & MASK
            if r.random() < 0.3:
                now.cs = r.choice((KERNEL_CS, USER_CS))
        if r.random() < 0.3 and now.cs == KERNEL_CS:
            now.rflags = r.choice((0x46, 0x246, 0x10246, 0x4346))
        if r.random() < 0.02:
            now.cs = r.choice((KERNEL_CS, USER_CS, 0x19, 0x1A, 0xE008))

    def request(self, number: int, vector: int, source: Source, code: int) -> dict[str, int]:
        """The fields of a delivery to the context of a CPU."""
        r = self.r
        now = self.cpus[number].now
        fields = {"cpu": number, "arg": vector, "rip": now.rip, "rsp": now.rsp, "cs": now.cs, "ss": now.ss, "rflags": now.rflags}
        if source != Source.UNKNOWN or r.random() < 0.5:
            fields["source"] = source
        if source in (Source.EXCEPTION, Source.SOFT_INT, Source.SYSCALL) or r.random() < 0.03:
            fields["code"] = code
        if r.random() < 0.3:
            fields["value"] = r.choice((0, 0x1000, r.getrandbits(64)))  # CR2, or FRED's event data
        return fields

    def deliver(
        self,
        number: int,
        vector: int | None = None,
        source: Source | None = None,
        *,
        still: bool = False,
        code: int | None = None,
        plain: bool = False,
    ) -> Shot | None:
        """Deliver an event, most often with success. still: the code has not gone on; plain: nothing odd happens to it."""
        r = self.r
        cpu = self.cpus[number]
        if not still:
            self.run_on(cpu)
        now = cpu.now
        if vector is None:
            vector = r.choice(VECTORS) if r.random() < 0.98 else r.randrange(256)
        source = self.source_of(cpu, vector) if source is None else source
        if source in MASKABLE and (plain or r.random() < 0.8):
            now.rflags |= x86.RFLAGS_IF
        if code is None:
            code = r.choice((0, 2, 0x18)) if source == Source.EXCEPTION else r.choice((1, 2))
        fields = self.request(number, vector, source, code)
        kind = 1.0 if plain else r.random()
        if kind < 0.02:
            self.emit(Kind.DELIVER, flags=r.choice((EventFlag.LEGACY, EventFlag.SMM)), **fields)
            return None
        if kind < 0.05:
            self.failed(number, vector, source, code)
            return None
        shot = self.place(cpu, vector, source, code)
        self.emit(Kind.DELIVER, not plain, **fields)
        if shot is not None:
            self.take(cpu, shot)
            if not plain and r.random() < 0.06:
                self.enter(number)
        return shot

    def attempt(self, number: int, vector: int, source: Source, code: int, words: int | None) -> None:
        """A delivery that dies after having stored some words."""
        fields = self.request(number, vector, source, code)
        if words is not None:
            fields["addr"] = words
        self.emit(Kind.DELIVER, flags=EventFlag.FAILED, **fields)
        cpu = self.cpus[number]
        shot = self.place(cpu, vector, source, code)
        if shot is not None:
            self.push(shot, words or 0)

    def failed(self, number: int, vector: int, source: Source, code: int) -> None:
        """An attempt, often another one behind it, and what they end in."""
        r = self.r
        words = None if r.random() < 0.2 else r.choice((0, 1, 3, 5, 6, 8, 99))
        self.attempt(number, vector, source, code, words)
        if words and self.cpus[number].nest and r.random() < 0.3:
            self.ret(number)
        if r.random() < 0.5:
            self.attempt(number, r.choice((14, 13, 12, 11, 1)), Source.EXCEPTION, 0, r.choice((0, 2, 6)))
        kind = r.random()
        if kind < 0.4:
            self.deliver(number, 8, Source.EXCEPTION, still=r.random() < 0.8, code=0)
        elif kind < 0.6:
            self.deliver(number, r.choice((14, 13, 12, 3)), still=True)
        elif kind < 0.8:
            self.attempt(number, 8, Source.EXCEPTION, 0, r.choice((0, 1)))
            fields = {} if r.random() < 0.6 else {"arg": r.randrange(4)}
            self.emit(Kind.SHUTDOWN, cpu=number, **fields)

    def enter(self, number: int) -> None:
        """The state after a delivery as the source has it; sometimes it says otherwise."""
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

    def emit_return(self, number: int, rsp: int, to: Context, shot: Shot | None = None, **more: int) -> None:
        """A return that pops `to`; with a FRED frame it is ERETU or ERETS."""
        r = self.r
        cpu = self.cpus[number]
        fields = {
            "cpu": number, "rip": cpu.now.rip, "rsp": rsp, "addr": to.rip, "value": to.rsp,
            "cs": to.cs, "ss": to.ss, "rflags": to.rflags, **more,
        }  # fmt: skip
        if shot is not None and shot.fred:
            kind = return_kind(shot)
            if r.random() < 0.05:
                kind = r.choice(list(Return))
            fields.setdefault("arg", kind)
            if fields["arg"] != Return.IRET and r.random() < 0.8:
                nmi = shot.source == Source.NMI
                fields.setdefault("code", (4 if nmi else 0) ^ (4 if r.random() < 0.12 else 0) | r.choice((0, 0, 3)))
            cpu.csl = 0 if kind == Return.ERETU else shot.from_level
        elif r.random() < 0.3:
            fields.setdefault("arg", Return.IRET)
        cpu.last_return = fields
        self.emit(Kind.RETURN, **fields)
        cpu.now = to.copy()

    def return_from(self, number: int, shot: Shot, from_memory: bool = True) -> None:
        """An ordinary return through a frame of the CPU."""
        cpu = self.cpus[number]
        cpu.nest = [s for s in cpu.nest if s is not shot]
        self.dead.append(shot)
        self.emit_return(number, shot.lo if shot.fred else shot.rip_addr, self.popped(shot, from_memory), shot)

    def ret(self, number: int) -> None:
        """Some return: through the newest frame most often."""
        r = self.r
        cpu = self.cpus[number]
        kind = r.random()
        if not cpu.nest:
            self.return_to_nothing(number)
            return
        if kind < 0.05:
            self.faulted_return(number, cpu.nest[-1])
            return
        if kind < 0.10:  # a frame made by hand: back to itself
            self.emit_return(number, (cpu.now.rsp - 40) & MASK, cpu.now)
            return
        if kind < 0.14 and cpu.last_return is not None:
            for _ in range(r.choice((1, 1, 3))):
                self.emit(Kind.RETURN, **cpu.last_return)
            return
        shot = cpu.nest[-1 if kind < 0.9 else r.randrange(len(cpu.nest))]
        way = r.random()
        if way < 0.70:
            self.return_from(number, shot, way < 0.6 or shot.stored_at is None)
            return
        cpu.nest.remove(shot)
        self.dead.append(shot)
        self.odd_return(number if r.random() < 0.95 else r.randrange(self.world.cpu_count), shot)

    def return_to_nothing(self, number: int) -> None:
        """A return where no frame is open."""
        r = self.r
        cpu = self.cpus[number]
        kind = r.random()
        if cpu.last_return is not None and kind < 0.4:
            for _ in range(r.choice((1, 2, 4))):
                self.emit(Kind.RETURN, **cpu.last_return)
        elif self.dead and kind < 0.7:
            shot = r.choice(self.dead)
            self.emit_return(number, shot.lo if shot.fred else shot.rip_addr, self.popped(shot, r.random() < 0.7), shot)
        else:
            self.emit_return(number, self.work_rsp(), self.idle())

    def faulted_return(self, number: int, shot: Shot) -> None:
        fields = {"cpu": number, "rsp": shot.rip_addr, "rip": self.cpus[number].now.rip}
        if shot.fred and self.r.random() < 0.6:
            fields |= {"arg": return_kind(shot), "rsp": shot.lo}
        self.emit(Kind.RETURN, flags=EventFlag.FAULTED, **fields)

    def odd_return(self, number: int, shot: Shot) -> None:
        """A return elsewhere, of edited words, of parts of another frame, or off by the error code."""
        r = self.r
        way = r.random()
        rsp = shot.lo if shot.fred else shot.rip_addr
        if way < 0.25:
            rsp = shot.stored_at if shot.stored_at is not None else self.work_rsp()
            to = self.popped(shot, False)
        elif way < 0.45:
            to = self.popped(shot, r.random() < 0.5)
            setattr(to, r.choice(("rip", "rsp")), self.work_rsp())
        elif way < 0.65:
            other = r.choice([s for c in self.cpus for s in c.nest] + self.dead)
            to = self.popped(shot, True)
            for name in WORDS:
                if r.random() < 0.5:
                    setattr(to, name, getattr(other.saved, name))
        elif way < 0.75:  # the other instruction, at the place where it looks
            rsp = shot.rip_addr if r.random() < 0.5 else shot.lo
            self.emit_return(number, rsp, self.popped(shot, True), arg=r.choice((0, 1, 2, 3, 255)))
            return
        else:
            self.shifted_return(number, shot)
            return
        if r.random() < 0.1:
            to.rflags ^= x86.RFLAGS_RF
        self.emit_return(number, rsp, to, shot)

    def shifted_return(self, number: int, shot: Shot) -> None:
        """The handler dropped an error code that was never pushed, or did not drop it."""
        r = self.r
        words = shot.saved.words()
        if shot.code is None:
            rsp, words = shot.rip_addr + 8, [*words[1:], self.peek(shot.hi, 0)]
        else:
            rsp, words = shot.rip_addr - 8, [shot.code, *words[:4]]
        to = Context(words[0], words[3], words[1] & 0xFFFF, words[4] & 0xFFFF, words[2] & 0xFFFFFFFF)
        if r.random() < 0.1:
            to.rip ^= 1
        if r.random() < 0.35:
            fields = {"cpu": number, "rsp": rsp, "flags": EventFlag.FAULTED}
            if r.random() < 0.6:
                fields |= {"addr": to.rip, "value": to.rsp, "cs": to.cs, "ss": to.ss, "rflags": to.rflags}
            self.emit(Kind.RETURN, **fields)
            return
        self.emit_return(number, rsp & MASK, to)
