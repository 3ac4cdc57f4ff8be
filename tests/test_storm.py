"""Storms: NMIs, #MCs, #DBs, faults and interrupts on several CPUs, a million events, every frame returned from properly.

Where no window opens nothing may be raised: a debugger that cries wolf on a healthy machine is thrown away. Where handlers
open windows, those are counted here once more, by the sentences of `tracedbg help replay` alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
from bench.synth import FULL, MCG_STATUS, MSR, RET, pack, storm, storm_layout

from tracedbg.layout import Fidelity
from tracedbg.replay import Replay
from tracedbg.state import Cause, Evidence, Finding, Kind, Rule, Source, Stats
from tracedbg.writer import TraceWriter, build

IF = 0x200
TOPS = {"db": 0x8000, "nmi": 0xC000, "mc": 0x10000}
VECTOR = {
    "db": (1, Source.EXCEPTION),
    "nmi": (2, Source.NMI),
    "mc": (18, Source.MC),
    "pf": (14, Source.EXCEPTION),
    "irq": (0xEC, Source.FIXED),
}


class Context(NamedTuple):
    rip: int
    rsp: int
    cs: int
    ss: int
    rflags: int
    masked: frozenset[str] = frozenset()  # what must not come here: a frame of it is live on its IST stack


class Open(NamedTuple):
    """A delivery that is not returned from. Its frame is placed by hand: tops of the layout, 16-aligned."""

    kind: str
    entry: int
    rip_addr: int
    saved: Context


class Window(NamedTuple):
    """The first reentry-window of a CPU, and how many there were of its kind."""

    cpu: int
    cause: Cause
    event: int
    victim: int
    cause_frame: int | None
    lo: int
    count: int


class Cpu:
    """A CPU whose kernel nests properly.

    `careful`: nothing that ends with an IRET comes inside the NMI handler (R12), and MCIP is cleared when no frame lies on the
    #MC's stack. Else anything nests in anything but itself, and the #MC handler clears MCIP before it returns (R24).
    """

    def __init__(self, number: int, pick: random.Random, trace: list[bytes], *, careful: bool) -> None:
        self.number, self.pick, self.trace, self.careful = number, pick, trace, careful
        self.base = 0xFFFFFE0000000000 + number * 0x40000
        self.now = Context(0x401000, 0x7FFF00000000 + number * 0x100000, 0x33, 0x2B, 0x202)
        self.stack: list[Open] = []
        self.mcip = False
        self.nmi_unblocked = False  # known to be
        self.looked: set[int] = set()
        self.windows: dict[Cause, Window] = {}

    def step(self) -> None:
        now, roll = self.now, self.pick.random()
        if self.mcip and self.careful and "mc" not in now.masked and roll < 0.2:
            self.clear_mcip()
            return
        inside_nmi = self.careful and self.stack and self.stack[-1].kind == "nmi"
        if self.stack and (inside_nmi or roll < 0.55 or len(self.stack) > 12):
            self.leave()
            return
        if roll > 0.9:  # the code runs on: another RIP and another depth of its own stack
            top = self.stack[-1].rip_addr - 8 if self.stack else now.rsp
            rsp = now.rsp if now.cs & 3 else top - 8 * self.pick.randrange(1, 40)
            self.now = now._replace(rip=now.rip + 4, rsp=rsp)
        self.enter(self.pick.choice([kind for kind in VECTOR if self.can_come(kind)]))

    def can_come(self, kind: str) -> bool:
        if kind == "irq":
            return bool(self.now.rflags & IF)
        return kind not in self.now.masked and not (kind == "mc" and self.mcip)

    def enter(self, kind: str) -> None:
        vector, source = VECTOR[kind]
        now = self.now
        user = now.cs & 3
        top = self.base + TOPS[kind] if kind in TOPS else self.base + 0x3000 if user else now.rsp & ~15
        rf = 0x10000 if kind == "pf" else 0
        self.stack.append(Open(kind, len(self.trace), top - 40, now._replace(rflags=now.rflags | rf)))
        self.trace.append(pack(Kind.DELIVER, FULL, cpu=self.number, rip=now.rip, rsp=now.rsp, cs=now.cs, ss=now.ss,
                               rflags=now.rflags, arg=vector, source=source))  # fmt: skip
        masked = now.masked | {kind} if kind in TOPS else now.masked
        lo = top - (48 if kind == "pf" else 40)
        self.now = Context(0xFFFFFFFF81000000 + vector * 16, lo - 0x60, 0x10, 0 if user else now.ss, 2, masked)
        if kind == "nmi":
            self.nmi_unblocked = False
        elif kind == "mc":
            self.mcip = True

    def leave(self) -> None:
        if self.mcip and not self.careful and self.stack[-1].kind == "mc":
            self.clear_mcip()
        left = self.stack.pop()
        back = left.saved
        self.now = back._replace(rip=back.rip + 8)
        if not self.nmi_unblocked:  # "NMIs were not known to be unblocked before, and are after it, at a return: every V"
            self.nmi_unblocked = True
            self.window(Cause.NMI_UNBLOCKED, "nmi", left.entry)
        self.trace.append(pack(Kind.RETURN, RET, cpu=self.number, rip=0xFFFFFFFF81FF0000, rsp=left.rip_addr, addr=back.rip,
                               value=back.rsp, rflags=back.rflags, cs=back.cs, ss=back.ss))  # fmt: skip

    def clear_mcip(self) -> None:
        self.mcip = False
        self.window(Cause.MC_UNMASKED, "mc", None)  # "MCIP was not known to be clear and is after `msr`: every V"
        self.trace.append(pack(Kind.MSR, MSR, cpu=self.number, code=MCG_STATUS))

    def window(self, cause: Cause, kind: str, by: int | None) -> None:
        """Here the next frame of an IST overlaps V if V is of the same kind: each has a top of its own, which never moves."""
        for v in self.stack:
            if v.kind == kind and v.entry not in self.looked:
                self.looked.add(v.entry)
                new = Window(self.number, cause, len(self.trace), v.entry, by, self.base + TOPS[kind] - 40, 0)
                old = self.windows.get(cause, new)
                self.windows[cause] = old._replace(count=old.count + 1)


def run(events: int, cpus: int, seed: int, *, careful: bool) -> tuple[list[bytes], list[Window]]:
    """At least `events` events of a storm, and the windows that its handlers open."""
    pick = random.Random(seed)
    trace: list[bytes] = []
    machines = [Cpu(number, pick, trace, careful=careful) for number in range(cpus)]
    while len(trace) < events:
        pick.choice(machines).step()
    return trace, sorted((w for cpu in machines for w in cpu.windows.values()), key=lambda w: w.event)


def replayed(records: list[bytes], cpus: int, fidelity: Fidelity = Fidelity.RETURNS) -> tuple[tuple[Finding, ...], Stats]:
    def fill(w: TraceWriter) -> None:
        w.layout = replace(storm_layout(cpus), fidelity=fidelity)
        w.append(b"".join(records))

    with build(fill, cpus=cpus) as trace, Replay(trace) as replay:
        replay.scan_all()
        stats = replay.stats()
        assert stats.unjudged == 0 and stats.bad_events == 0 and stats.judged == stats.deliveries
        return replay.findings(), stats


def said(findings: tuple[Finding, ...]) -> list[str]:
    return [f"event {f.event}: {f.rule.name} {f.evidence.name}" for f in findings]


def windows_of(findings: tuple[Finding, ...]) -> list[Window]:
    """The findings, which all have to be windows as the page describes them."""
    result = []
    for f in findings:
        assert (f.rule, f.evidence, f.cause_event) == (Rule.REENTRY_WINDOW, Evidence.COMPUTED, f.event)
        assert f.victim is not None and f.hi == f.lo + 40
        result.append(Window(f.cpu, f.cause, f.event, f.victim.entry, f.cause_frame, f.lo, f.count))
    return result


def test_a_million_events_without_a_window_raise_nothing() -> None:
    records, windows = run(1_000_000, 4, 1, careful=True)
    findings, stats = replayed(records, 4)
    assert said(findings) == [] and windows == []
    assert all(stats.ist_deliveries[n] > len(records) // 100 for n in (1, 2, 3))


@pytest.mark.parametrize("seed", range(20))
def test_storms_of_many_shapes_without_a_window_raise_nothing(seed: int) -> None:
    cpus = 1 + seed % 5
    assert said(replayed(run(5_000, cpus, seed, careful=True)[0], cpus)[0]) == []


@pytest.mark.parametrize(("seed", "events"), [(1, 200_000), *((seed, 5_000) for seed in range(2, 22))])
def test_where_handlers_open_windows_those_are_counted_and_nothing_else(seed: int, events: int) -> None:
    cpus = 1 + seed % 5
    records, windows = run(events, cpus, seed, careful=False)
    # An IRET inside the NMI handler, MCIP cleared on the #MC's stack: often, on every CPU.
    assert len(windows) == 2 * cpus and all(w.count > events // cpus // 500 for w in windows)
    assert windows_of(replayed(records, cpus)[0]) == windows


def test_the_storm_of_the_benchmarks_raises_nothing() -> None:
    findings, stats = replayed([storm(4)] * 3, 4)
    assert said(findings) == []
    assert stats.ist_deliveries[1:4] == (12, 12, 12)


def unmask(cpu: Cpu, kind: str) -> None:
    cpu.now = cpu.now._replace(masked=cpu.now.masked - {kind})


def second_nmi(cpu: Cpu) -> None:
    cpu.enter("nmi")
    cpu.enter("pf")
    cpu.leave()
    unmask(cpu, "nmi")
    cpu.enter("nmi")


def second_mc(cpu: Cpu) -> None:
    cpu.enter("mc")
    cpu.clear_mcip()
    unmask(cpu, "mc")
    cpu.enter("mc")


def second_mc_while_mcip(cpu: Cpu) -> None:
    cpu.enter("mc")
    cpu.trace.append(pack(Kind.MSR, MSR, cpu=cpu.number, code=MCG_STATUS, value=4))  # read, written back: still in progress
    unmask(cpu, "mc")
    cpu.enter("mc")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (second_nmi, ["event 2: REENTRY_WINDOW COMPUTED", "event 3: FRAME_CLOBBERED COMPUTED"]),
        (second_mc, ["event 1: REENTRY_WINDOW COMPUTED", "event 2: FRAME_CLOBBERED COMPUTED"]),
        (second_mc_while_mcip, ["event 2: MODEL_MISMATCH COMPUTED", "event 2: FRAME_CLOBBERED COMPUTED"]),
    ],
)
def test_a_storm_that_is_not_clean_does_raise(shape: Callable[[Cpu], None], expected: list[str]) -> None:
    cpu = Cpu(0, random.Random(0), [], careful=False)
    shape(cpu)
    assert said(replayed(cpu.trace, 1)[0]) == expected


def test_deliveries_alone_of_a_clean_storm_raise_nothing() -> None:
    """Without returns: each round begins in user mode or in code with IF=1, as a log of a healthy machine shows it."""
    pick = random.Random(7)
    trace: list[bytes] = []
    machines = [Cpu(number, pick, trace, careful=True) for number in range(3)]
    user = [cpu.now for cpu in machines]
    for _ in range(20_000):
        cpu = pick.choice(machines)
        cpu.now = user[cpu.number]
        if pick.random() < 0.5:
            rip, rsp = 0xFFFFFFFF82000000 + 16 * pick.randrange(99), 0xFFFFC90000003F00 - 8 * pick.randrange(300)
            cpu.now = Context(rip, rsp, 0x10, 0x18, 0x202)
        cpu.stack.clear()  # whatever came before was returned from
        for kind in pick.sample(["irq", "pf", "db", "nmi", "mc"], pick.randrange(1, 6)):
            if cpu.can_come(kind):
                cpu.enter(kind)
                if cpu.mcip and len(cpu.stack) == 1 and kind != "mc":
                    cpu.clear_mcip()  # now that the trace shows that the #MC's frame is gone
    findings, stats = replayed(trace, 3, Fidelity.NONE)
    assert said(findings) == []
    assert all(count > 2000 for count in stats.ist_deliveries[1:4])
