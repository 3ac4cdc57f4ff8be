"""Compares the replay of a recording with what the CPU really did."""

from __future__ import annotations

from collections import Counter

from livecpu import IDT, Delivery, Iret, Machine, Regs, Request, Step, Store
from livecpu_guest import STACKS, USER_STACKS_END, Guest, Operation, ist_of
from livecpu_limits import Limits
from livecpu_trace import Native
from livecpu_truth import MASKS, SLOTS, SOFTWARE, Pop

from tracedbg.replay import Replay
from tracedbg.state import Cause, CpuState, Finding, Rule

NAMES = (*SLOTS, "error-code")
OVERWRITES = (Rule.FRAME_CLOBBERED, Rule.FRAME_SAME_BYTES, Rule.NEIGHBOUR_OVERWRITE)
POPPED = (-1, 0xFFFF, 0xFFFFFFFF, -1, 0xFFFF)  # the bits of a word that a `return` event holds
RFLAGS_DEFINED = 0x3F7FD5  # SDM Vol. 1 figure 3-8, without bit 1, which is always set
RFLAGS_IF_IOPL = 0x3200


def record(machine: Machine, guest: Guest) -> None:
    """Run a guest; guest.truth has the recording."""

    def sink(step: Step) -> None:
        truth = guest.truth
        truth.add(step, ist_of(truth.memory, step.vector) if isinstance(step, Delivery) else 0)

    machine.run(guest.setup, guest.next, sink)
    for lo, hi in ((STACKS, USER_STACKS_END), (IDT, IDT + 0x1000), (guest.tss, guest.tss + 104)):
        assert guest.truth.memory[lo:hi] == machine.ram[lo:hi], "the recording misses a store"


class Checked:
    """A recording as a native trace, its replay, and what does not agree."""

    def __init__(self, guest: Guest, spoil: str | None = None, strict: bool = False) -> None:
        self.guest, self.truth, self.strict = guest, guest.truth, strict
        native = Native(guest, spoil)
        self.trace, self.first, self.step_of, self.last = native.trace, native.first, native.step_of, native.last
        self.limits = Limits(self.truth, self.trace.layout)
        self.problems: list[str] = []
        self.counts: Counter[str] = native.counts
        with Replay(self.trace) as replay:
            self._steps(replay)
            self._memory(replay)
            replay.scan_all()
            self._findings(replay.findings())
            stats = replay.stats()
        if stats.bad_events or stats.unjudged or stats.legacy:
            self.wrong(f"events that the replay could not use: {stats}")

    def wrong(self, text: str) -> None:
        self.problems.append(text)

    # -- step by step -----------------------------------------------------------------------------------------------

    def _steps(self, replay: Replay) -> None:
        for number, step in enumerate(self.truth.steps):
            here = f"step {number} ({type(step).__name__})"
            if isinstance(step, Delivery):
                self.counts["failed" if step.failed else "deliveries"] += 1
                self.counts[step.how] += not step.failed
                self.counts["from CPL3"] += not step.failed and bool(step.before.cs & 3)
                if step.how == "nmi" and not step.failed:
                    replay.seek(self.first[number])
                    if replay.cpu(0).nmi_blocked:
                        self.wrong(f"{here}: an NMI came, the replay says that they are blocked")
                replay.seek(self.first[number] + 1)
                self._delivery(replay, step, self.first[number], here)
            elif isinstance(step, Iret):
                self.counts["returns" if step.after is not None else "faulted returns"] += 1
                replay.seek(self.first[number] + 1)
                if step.after is not None:
                    self._registers(replay.cpu(0), step.after, here, returned_from=step.before.cs & 3)
                if replay.cpu(0).nmi_blocked is not False:
                    self.wrong(f"{here}: NMIs are not unblocked")
            elif isinstance(step, Request) and not step.at_once and number + 1 < len(self.truth.steps):
                replay.seek(self.first[number] + 1)
                if not replay.cpu(0).nmi_blocked or not replay.cpu(0).nmi_pending:
                    self.wrong(f"{here}: the CPU held the NMI, the replay says that NMIs are not blocked")
                self.counts["held NMIs"] += 1

    def _registers(self, cpu: CpuState, after: Regs, here: str, returned_from: int | None = None) -> None:
        got = (cpu.rip, cpu.rsp, cpu.cs, cpu.ss, cpu.rflags)
        if returned_from is not None and cpu.rflags is not None:
            # An IRET loads only the defined bits, and at CPL3 neither IOPL nor, below IOPL, IF (SDM Vol. 2A, IRET): the
            # replay takes the popped word as it is.
            loaded = RFLAGS_DEFINED & ~(RFLAGS_IF_IOPL if returned_from else 0)
            got = (*got[:4], cpu.rflags & loaded | after.rflags & ~loaded)
        if got != tuple(after):
            names = [n for n, g, a in zip(after._fields, got, after, strict=True) if g != a]
            self.wrong(f"{here}: {', '.join(names)}: CPU {show(after)}, replay {show(got)}")

    def _delivery(self, replay: Replay, step: Delivery, event: int, here: str) -> None:
        here += f" of vector {step.vector} ({step.how})"
        frame = replay.last_frame()
        if step.stores and step.hi < 48:
            return  # the rest would be below address 0: the replay places no such frame
        for store in step.stores:
            for word in replay.words(store.addr & ~7, (store.addr + len(store.data) + 7) & ~7):
                self._word(word.addr, word.value, word.known, word.writers, store, event, here)
            if not replay.words(store.addr & ~7, (store.addr & ~7) + 8):
                self.wrong(f"{here}: the CPU stored at {store.addr:#x}, the replay did not")
        if step.failed:
            if frame is not None:
                self.wrong(f"{here}: it failed and has a frame")
            return
        if frame is None:
            self.wrong(f"{here}: no frame")
            return
        if (frame.lo, frame.hi) != (step.lo, step.hi):
            self.wrong(f"{here}: CPU [{step.lo:#x}, {step.hi:#x}), replay [{frame.lo:#x}, {frame.hi:#x})")
        if step.after is not None:
            self._registers(replay.cpu(0), step.after, here)

    def _word(
        self, addr: int, value: int, known: int, writers: tuple[int | None, ...], store: Store, event: int, here: str
    ) -> None:
        for n in range(8):
            at = addr + n - store.addr
            if 0 <= at < len(store.data):
                self.counts["bytes"] += 1
                if not known >> n & 1 or value >> 8 * n & 0xFF != store.data[at] or writers[n] != event:
                    self.wrong(
                        f"{here}: byte {addr + n:#x}: CPU {store.data[at]:#x}, replay {value >> 8 * n & 0xFF:#x}"
                        f" (known {known >> n & 1}) of event {writers[n]}, not {event}"
                    )

    def _memory(self, replay: Replay) -> None:
        """At the end: every byte that the CPU stored, with its last writer, and no other writer anywhere."""
        replay.seek(self.trace.count)
        seen = {}
        # With first contents every word of the stacks is known: then only the pages that the CPU stored to are read.
        pages = {at // 0x1000 for at in self.truth.last} if self.guest.known_memory else range(0x100)
        for page in sorted(pages):
            for word in replay.words(page * 0x1000, (page + 1) * 0x1000):
                for n in range(8):
                    if word.writers[n] is not None:
                        seen[word.addr + n] = (word.value >> 8 * n & 0xFF, word.writers[n])
        want = {at: (self.truth.memory[at], self.last(number)) for at, number in self.truth.last.items()}
        for at in sorted(set(seen) | set(want)):
            if at >= 48 and seen.get(at) != want.get(at):
                self.wrong(f"at the end, byte {at:#x}: CPU (value, event) {want.get(at)}, replay {seen.get(at)}")
                break

    # -- findings ---------------------------------------------------------------------------------------------------

    def _findings(self, findings: tuple[Finding, ...]) -> None:
        self._overwrites(findings)
        self._pops(findings)
        for f in findings:
            self.counts[f"finding {f.rule.name}"] += 1
            if f.rule is Rule.FRAME_RELOCATED and f.settled is not None and f.victim is not None:
                self._survived(self.step_of[f.victim.entry], self.step_of[f.settled])
            if f.rule is Rule.MODEL_MISMATCH:
                self.wrong(f"finding {f.rule.name} at step {self.step_of.get(f.event)}: detail {f.detail:#x}")

    def _overwrites(self, findings: tuple[Finding, ...]) -> None:
        """A finding for every frame that an IST delivery really overwrote and whose handler will run again, and no other."""
        got: dict[tuple[int, bool], Said] = {}
        rule: dict[tuple[int, bool], Rule] = {}
        for f in findings:
            if f.raised_rule in OVERWRITES and f.victim is not None and f.writer is not None:
                key = self.step_of[f.victim.entry], f.raised_rule is not Rule.FRAME_SAME_BYTES
                got[key] = self.step_of[f.event], mask(f.slots), mask(f.differ)
                rule[key] = f.raised_rule
                if f.raised_rule is not Rule.NEIGHBOUR_OVERWRITE:
                    self._cause(f, key[0], self.step_of[f.event])
        really: dict[tuple[int, bool], list[Said]] = {}
        must: dict[tuple[int, bool], Said] = {}
        for o in self.truth.overwrites:
            key = o.victim, bool(o.differ)
            said = o.step, o.slots, o.differ
            if self.limits.leaves(o) if rule.get(key) is Rule.NEIGHBOUR_OVERWRITE else o.ist:
                really.setdefault(key, []).append(said)
            # The replay says it once for a frame: whatever comes after the first time adds nothing.
            if o.live and o.ist and key not in must and (o.victim, True) not in must:
                excuse = None if self.strict else self.limits.overwrite(o)
                if excuse is None:
                    must[key] = said
                elif got.get(key, (o.step + 1,))[0] > o.step:
                    self.counts[f"excused: {excuse}"] += 1
        for key, said in got.items():
            if said not in really.get(key, []):
                self.wrong(f"finding that frame of step {key[0]} was overwritten: {said}; CPU {really.get(key)}")
        for key, said in must.items():
            self.counts["overwritten"] += 1
            if key not in got or got[key][0] > said[0]:
                self.wrong(f"frame of step {key[0]} was overwritten: CPU {said}, replay {got.get(key)}")

    def _survived(self, victim: int, settled: int) -> None:
        """An overwritten frame whose context ran again in spite of that: by its own words, or its handler is left."""
        step = self.truth.steps[settled]
        if isinstance(step, Iret):
            if not self.truth.by_step[victim].holds(tuple(step.word(n) for n in range(5))):
                self.wrong(f"return at step {settled}: it does not pop the words of step {victim}")
        elif victim in self.truth.live[settled]:
            self.wrong(f"step {settled}: the replay says that step {victim} survived; its handler is still there")

    def _cause(self, f: Finding, victim: int, writer: int) -> None:
        """Why the writer could come: for an NMI, what the CPU did since the NMI before it."""
        how = self.truth.steps[writer].how
        want, event = (Cause.MASKABLE if how == "fixed" else Cause.SOFTWARE), None
        if how == "nmi":
            nmis = [n for n in range(writer) if getattr(self.truth.steps[n], "how", "") == "nmi"]
            ends = [n for n in range(nmis[-1] if nmis else writer, writer) if isinstance(self.truth.steps[n], Iret)]
            want = Cause.NMI_UNBLOCKED if ends and ends[0] > victim else Cause.NMI_NEVER_BLOCKED
            event = self.first[ends[0]] if want is Cause.NMI_UNBLOCKED else None
        self.counts[f"cause {want.name}"] += 1
        if f.cause is not want or (event is not None and f.cause_event != event):
            self.wrong(f"step {writer} over step {victim}: cause {want.name} {event}, replay {f.cause.name} {f.cause_event}")

    def _pops(self, findings: tuple[Finding, ...]) -> None:
        """Returns that pop another delivery's words are reported, and no other."""
        consumed = {f.consumer: f for f in findings if f.rule is Rule.FRAME_CONSUMED_CORRUPT}
        loops = {f.consumer: f for f in findings if f.rule is Rule.RESUME_LOOP}
        unmatched = [f for f in findings if f.rule is Rule.UNMATCHED_RETURN]
        twice: list[int] = []  # events that pop a frame a second time
        taken: set[int] = set()  # frames at which another handler returned, its own being used up
        done: list[int | None] = []  # the frame of each return so far
        for pop in self.truth.pops:
            event = self.first[pop.step]
            f = consumed.pop(event, None)
            loop = loops.pop(event, None)
            here = f"return at step {pop.step}"
            here_still = sorted(pop.others - taken)
            if pop.own is None and not pop.others and self._again(pop, done):
                twice.append(event)
            if pop.own is None:
                taken |= set(here_still[-1:])
            done.append(pop.own if pop.own is not None else here_still[-1] if here_still else None)
            if pop.own is not None and self.limits.foreign(pop):
                self.counts["consumed"] += 1
                if f is None:
                    excuse = None if self.strict else self.limits.pop(pop, taken)
                    self.counts[f"excused pop: {excuse}"] += 1
                    if excuse is None:
                        self.wrong(f"{here}: over the frame of step {pop.own} it pops words of {pop.foreign}; replay: nothing")
            if f is None:
                if loop is not None:
                    self.wrong(f"{here}: a loop without a frame consumed")
                continue
            victim = self.step_of[f.victim.entry] if f.victim is not None else -1
            self._popped(f, pop, victim, here)
            if victim != pop.own:
                excuse = None if self.strict else self.limits.named(pop, victim, taken)
                self.counts[f"excused, another frame named: {excuse}"] += 1
                taken.add(victim)
                if excuse is None:
                    self.wrong(f"{here}: CPU: frame of step {pop.own}, foreign {pop.foreign}; replay: frame of step {victim}")
                continue
            if (loop is not None) != pop.loops:
                self.wrong(f"{here}: the handler runs again: CPU {pop.loops}, replay {loop is not None}")
            self.counts["loops"] += pop.loops
        for f in (*consumed.values(), *loops.values()):
            self.wrong(f"{f.rule.name} at step {self.step_of.get(f.consumer or f.event)}, where nothing was popped")

        for f in unmatched:
            assert f.consumer is not None and f.writer is not None
            self._second(self.step_of[f.consumer], self.step_of[f.writer.entry], taken)
        self.counts["popped twice"] += len(twice)
        if twice and not (unmatched and unmatched[0].consumer <= twice[0]):
            self.wrong(f"return at step {self.step_of[twice[0]]}: the frame was popped before; replay: {unmatched}")

    def _again(self, pop: Pop, done: list[int | None]) -> bool:
        """Whether a return for which no frame is left pops one that its handler has returned from, not long ago."""
        frame = self.truth.by_step.get(pop.writers[0])
        if frame is None or frame.step not in [d for d in done if d is not None][-8:] or pop.writers[3] == SOFTWARE:
            return False
        if frame.popped is None or self.limits.left(frame.step, frame.popped) is not None:
            return False  # the replay did not see it returned from
        loop = next((p for p in reversed(self.truth.pops) if p.loops and p.step < pop.step), None)
        turns = loop is not None and (pop.at, pop.values[0], pop.values[3]) == (loop.at, loop.values[0], loop.values[3])
        copy = any(a.holds(pop.values) and a.step < pop.step and not a.returned(pop.step) for a in self.truth.activations)
        return not pop.values[1] & 3 and not turns and not copy

    def _second(self, step: int, writer: int, taken: set[int]) -> None:
        """A return said to pop a frame again: its delivery stored the RIP, and that place was returned from since."""
        pop = next(p for p in self.truth.pops if p.step == step)
        frame = self.truth.by_step[writer]
        before = [p for p in self.truth.pops if writer < p.step < step]
        own = pop.own is not None and (self.strict or self.limits.pop(pop, taken) is None)
        if own or pop.writers[0] != writer or not any(p.at == pop.at or frame.holds(p.values) for p in before):
            self.wrong(f"return at step {step}: replay: it pops the words of step {writer} again; CPU: {pop}")

    def _popped(self, f: Finding, pop: Pop, victim: int, here: str) -> None:
        """The words of a consumed frame: what was popped, and which of them another delivery had stored."""
        assert f.popped is not None
        if f.popped.slots()[:5] != tuple(v & m for v, m in zip(pop.values, POPPED, strict=True)):
            self.wrong(f"{here}: popped {pop.values}, replay {f.popped}")
        saved = self.truth.by_step[victim].saved
        words = zip(SLOTS, pop.values, saved, MASKS, pop.writers, strict=True)
        foreign = {name for name, value, was, bits, by in words if (value ^ was) & bits and by not in (SOFTWARE, victim)}
        if not foreign or (f.raised_rule is f.rule and mask(f.differ) != foreign):
            self.wrong(f"{here}: slots {sorted(foreign)} are another delivery's, replay {sorted(mask(f.differ))}")


Said = tuple[int, frozenset[str], frozenset[str]]  # step of the writer, slots overwritten, slots with other values


def mask(bits: int) -> frozenset[str]:
    """Slot names of a mask of the replay."""
    return frozenset(name for n, name in enumerate(NAMES) if bits >> n & 1)


def show(words: tuple[int | None, ...]) -> str:
    """Registers in words."""
    return " ".join("?" if w is None else f"{w:x}" for w in words)


def run(
    machine: Machine, seed: int, operations: list[Operation] | None = None, spoil: str | None = None, strict: bool = False
) -> Checked:
    """Record one guest and check it. spoil: put an error into the recording; strict: known limits are no excuse."""
    guest = Guest(seed, operations)
    record(machine, guest)
    return Checked(guest, spoil, strict)
