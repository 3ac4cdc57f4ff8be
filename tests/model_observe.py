"""The slow model: what an event says about open frames (replay.md: "The chain", "Observe", "Windows")."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from model_records import ModelCpu, ModelEvent, ModelFrame, ModelStack
from model_state import State

from tracedbg import x86
from tracedbg.layout import Gate
from tracedbg.state import Cause, Evidence, FrameStatus, Rule, Settle, Source

CHAIN_STEPS = 64
COPY_WORDS = 64


class Observe(State):
    """Closings, and windows."""

    # -- the chain --------------------------------------------------------------------------------------------------

    def chain(self, cpu: int, rsp: int | None, without: Collection[int] = ()) -> set[int]:
        """Entries of the frames that are live as far as an RSP shows; `without`: those that are closed by now."""
        taken: set[int] = set()
        cur = rsp
        for _ in range(CHAIN_STEPS):
            if cur is None:
                break
            above = [f for f in self.on(self.stack_of(cur), cpu) if f.rip_addr >= cur and f.entry not in without]
            if not above:
                break
            frame = min(above, key=lambda f: (f.rip_addr, -f.entry))
            if frame.entry in taken:
                break
            taken.add(frame.entry)
            while (
                frame.saved.rsp is not None
                and self.stack_of(frame.saved.rsp) == frame.stack
                and frame.saved.rsp <= frame.rip_addr
                and frame.victim is not None
            ):
                victim = next((f for f in self.frames if f.entry == frame.victim and f.entry not in without), None)
                if victim is None or victim.entry in taken:
                    return taken
                taken.add(victim.entry)
                frame = victim
            if frame.saved.cs is None or x86.cpl(frame.saved.cs) != 0 or frame.saved.rsp is None:
                break
            cur = frame.saved.rsp
        return taken

    # -- observe ----------------------------------------------------------------------------------------------------

    def observe(self, cpu: ModelCpu, event: ModelEvent) -> None:
        """All of it, at a delivery."""
        assert event.cpu is not None
        number, rip, rsp = event.cpu, event.rip, event.rsp
        a: dict[int, Settle] = {}
        b: dict[int, Settle] = {}
        c: dict[int, Settle] = {}
        d: dict[int, Settle] = {}
        outer = event.cs is not None and x86.cpl(event.cs) != 0
        if outer:
            a = self.seen_at_cpl3(number)
        if rsp is not None:
            here = self.stack_of(rsp)
            oldest = self.interrupted_handler(number, here, rsp)
            for frame in self.on(here, number):
                if frame.status != FrameStatus.CLOBBERED and rsp > frame.rip_addr and frame.entry >= oldest:
                    b[frame.entry] = Settle.POPPED
            for frame in self.frames_of(number):
                saved = frame.saved
                if not frame.dedicated or saved.rsp is None or frame.entry < oldest:
                    continue
                outside = self.stack_of(saved.rsp)
                if outside == frame.stack:
                    continue
                if self.returns_recorded and frame.status == FrameStatus.CLOBBERED:
                    continue  # its return will tell
                if rip is not None and saved.rip == rip and saved.rsp == rsp:
                    c[frame.entry] = Settle.CONTEXT
                elif here == outside and rsp >= saved.rsp:
                    c[frame.entry] = Settle.ABOVE
            if not self.returns_recorded and event.rflags is not None and event.rflags & x86.RFLAGS_IF:
                live = self.chain(number, rsp, {**a, **b, **c})
                for frame in self.frames_of(number):
                    if (
                        frame.entry not in live
                        and frame.status != FrameStatus.CLOBBERED
                        and frame.dedicated
                        and frame.gate_type == x86.GATE_INTERRUPT
                        and frame.stack != here
                    ):
                        d[frame.entry] = Settle.IF
        if outer:
            self.see_user_rsp(cpu, event.cs, rsp)
        closed = self.close_observed(cpu, event, {**d, **c, **b, **a})
        self.stuck_if_blocked(cpu, event, closed, outer)

    def interrupted_handler(self, cpu: int, stack: ModelStack, rsp: int) -> int:
        """Entry of G, the frame whose handler was interrupted as far as recorded returns show it; else 0: nothing is older."""
        if not self.returns_recorded:
            return 0
        return max((f.entry for f in self.frames_of(cpu) if f.stack == stack and f.rip_addr >= rsp), default=0)

    def observe_a(self, cpu: ModelCpu, event: ModelEvent, cs: int | None, rsp: int | None, *, unblocks: bool) -> None:
        """Test a alone, of a context with that CS and RSP."""
        assert event.cpu is not None
        if cs is not None and x86.cpl(cs) != 0:
            self.see_user_rsp(cpu, cs, rsp)
            self.close_observed(cpu, event, self.seen_at_cpl3(event.cpu), unblocks=unblocks)

    @staticmethod
    def see_user_rsp(cpu: ModelCpu, cs: int | None, rsp: int | None) -> None:
        if cs is not None and x86.cpl(cs) == 3 and rsp is not None:
            cpu.user_rsp = rsp

    def seen_at_cpl3(self, cpu: int) -> dict[int, Settle]:
        """Test a without the RSP part: the frames that it closes."""
        return {f.entry: Settle.CPL3 for f in self.frames_of(cpu) if f.own and f.status != FrameStatus.CLOBBERED}

    def close_observed(
        self, cpu: ModelCpu, event: ModelEvent, reasons: dict[int, Settle], *, unblocks: bool = True
    ) -> list[ModelFrame]:
        """Close frames by entry; returns them."""
        closed = [f for f in self.frames if f.entry in reasons]
        for frame in closed:
            why = reasons[frame.entry]
            if frame.status == FrameStatus.CLOBBERED:
                self.settle(frame, Rule.FRAME_RELOCATED, Evidence.INFERRED, event.index, why)
            self.close(frame, why)
            if (
                unblocks
                and not self.returns_recorded
                and cpu.nmi.blocked
                and frame.cpu == event.cpu
                and cpu.nmi.since is not None
                and frame.entry >= cpu.nmi.since
            ):
                self.unblock(cpu, event, frame)
        return closed

    def stuck_if_blocked(self, cpu: ModelCpu, event: ModelEvent, closed: list[ModelFrame], outer: bool) -> None:
        """No IRET ended the blocking though the NMI's context was left."""
        victim = next((f for f in closed if f.cpu == event.cpu and f.entry == cpu.nmi.since), None)
        if self.returns_recorded and cpu.nmi.blocked and (victim is not None or outer):
            self.nmi_stuck(cpu, event, Evidence.COMPUTED, victim)

    def nmi_stuck(self, cpu: ModelCpu, event: ModelEvent, evidence: Evidence, victim: ModelFrame | None) -> None:
        """Once until NMIs are blocked anew or unblocked."""
        if cpu.nmi_stuck:
            return
        cpu.nmi_stuck = True
        lo, hi = (0, 0) if victim is None else (victim.lo, victim.hi)
        self.raise_finding(Rule.NMI_STUCK, evidence, event, cause_event=cpu.nmi.since, lo=lo, hi=hi, victim=victim)

    # -- windows ----------------------------------------------------------------------------------------------------

    def gate_of(self, cpu: ModelCpu, vector: int | None) -> Gate | None:
        return None if cpu.idt is None or vector is None else self.idts[cpu.idt].gates.get(vector)

    def next_frame(self, cpu: ModelCpu, ist: int) -> tuple[int, int] | None:
        """[lo, hi) of the next frame of an IST."""
        base = None if cpu.tss is None else self.tss[cpu.tss].ist[ist]
        if base is None or not x86.is_canonical(base):
            return None
        top = base & ~15
        return None if top < 40 else (top - 40, top)

    def ists_of(self, cpu: ModelCpu, vectors: list[int]) -> list[int]:
        """The ISTs that gates use, ascending."""
        gates = [self.gate_of(cpu, vector) for vector in vectors]
        return sorted({gate.ist for gate in gates if gate is not None and gate.present and gate.ist})

    def window(
        self, cpu: ModelCpu, event: ModelEvent, cause: Cause, vectors: list[int], frame: ModelFrame | None,
        cause_event: int | None, cause_frame: int | None = None,
    ) -> None:  # fmt: skip
        """A window opens for one frame, or for all of the CPU that are live. The kind is known by the vectors."""
        assert event.cpu is not None
        if cpu.fred:
            return  # nothing goes through an IST gate
        kind = {2: Cause.NMI_UNBLOCKED, 18: Cause.MC_UNMASKED}[vectors[0]] if len(vectors) == 1 else Cause.MASKABLE
        frames = [frame] if frame is not None else list(self.frames_of(event.cpu))
        if frame is None:
            chain = self.chain(event.cpu, cpu.rsp)
            frames = [f for f in frames if f.entry in chain or (self.returns_recorded and f.from_kernel)]
        for victim in frames:
            if not victim.ist or victim.status != FrameStatus.LIVE or kind in victim.looked_at:
                continue
            hit = self.next_over(cpu, vectors, victim)
            if hit is None:
                continue
            victim.looked_at.add(kind)
            if self.copied_below(victim):
                continue
            ist, lo, hi = hit
            self.fold(
                cpu, (Rule.REENTRY_WINDOW, ist, kind), Rule.REENTRY_WINDOW, Evidence.COMPUTED, event,
                lo=max(lo, victim.lo), hi=min(hi, victim.hi), cause=cause, cause_event=cause_event,
                cause_frame=cause_frame, victim=replace(victim),
            )  # fmt: skip

    def next_over(self, cpu: ModelCpu, vectors: list[int], victim: ModelFrame) -> tuple[int, int, int] | None:
        """The lowest IST of the gates whose next frame overlaps a frame, and where that is."""
        for ist in self.ists_of(cpu, vectors):
            where = self.next_frame(cpu, ist)
            if where is not None and victim.overlaps(*where):
                return ist, *where
        return None

    def copied_below(self, frame: ModelFrame) -> bool:
        """Five words in a row below the frame are its own."""
        saved = frame.saved
        words = [saved.rip, saved.cs, saved.rflags, saved.rsp, saved.ss]
        if None in words:
            return False
        starts = [frame.lo - 8 * n for n in range(1, COPY_WORDS + 1) if frame.lo >= 8 * n]
        return any(all(self.number_at(at + 8 * n) == word for n, word in enumerate(words)) for at in starts)

    def nmi_window(self, cpu: ModelCpu, event: ModelEvent, blocked_before: bool | None) -> None:
        """At a return, `unblock` or `rsm` that may have unblocked NMIs."""
        if blocked_before is not False and cpu.nmi.blocked is False and not cpu.smm:
            self.window(cpu, event, Cause.NMI_UNBLOCKED, [2], None, cpu.nmi.unblocked_by, cpu.nmi.unblock_frame)

    def mc_window(self, cpu: ModelCpu, event: ModelEvent, mcip_before: bool | None) -> None:
        """At `msr`."""
        if mcip_before is not False and cpu.mcip is False and cpu.mce is not False:
            self.window(cpu, event, Cause.MC_UNMASKED, [18], None, event.index)

    def maskable_window(self, cpu: ModelCpu, event: ModelEvent, if_before: bool, frame: ModelFrame | None = None) -> None:
        """At `flags` or `shadow`, or for the frame of a delivery."""
        if not if_before and cpu.if_set:
            self.window(cpu, event, Cause.MASKABLE, [2, 18, *range(32, 256)], frame, event.index)

    def delivery_windows(self, cpu: ModelCpu, event: ModelEvent, frame: ModelFrame) -> None:
        """Step 10: those that a delivery's frame opens."""
        may_be_nmi = event.source == Source.NMI or (event.source is None and event.arg == x86.NMI)
        may_be_mc = event.source == Source.MC or (event.source is None and event.arg == x86.MACHINE_CHECK)
        if not may_be_nmi and cpu.nmi.blocked is False:
            self.window(cpu, event, Cause.NMI_NEVER_BLOCKED, [2], frame, event.index)
        if not may_be_mc and cpu.mcip is False and cpu.mce is not False:
            self.window(cpu, event, Cause.MC_UNMASKED, [18], frame, event.index)
        self.maskable_window(cpu, event, False, frame)
