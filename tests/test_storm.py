"""Clean storms: NMIs, #MCs, #DBs, faults and interrupts on several CPUs, a million events, every frame returned from properly.

Nothing may be raised: a debugger that cries wolf on a healthy machine is thrown away.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
from bench.synth import FULL, RET, pack, storm_layout

from tracedbg.layout import Fidelity
from tracedbg.replay import Replay
from tracedbg.state import Kind, Source
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


@dataclass
class Context:
    rip: int
    rsp: int
    cs: int
    ss: int
    rflags: int
    masked: frozenset[str]  # what must not come here: a frame of it is live on its IST stack
    frame: int = 0  # rip_addr of the frame to return from


class Cpu:
    """A CPU whose kernel nests properly. Frames are placed by hand: tops of the layout, 40 or 48 bytes below, 16-aligned."""


    def __init__(self, number: int, pick: random.Random) -> None:
        self.number, self.pick = number, pick
        self.base = 0xFFFFFE0000000000 + number * 0x40000
        self.now = Context(0x401000, 0x7FFF00000000 + number * 0x100000, 0x33, 0x2B, 0x202, frozenset())
        self.stack: list[Context] = []

    def step(self) -> bytes:
        user = self.now.cs & 3
        choices = [kind for kind in VECTOR if kind not in self.now.masked and (kind != "irq" or self.now.rflags & IF)]
        if self.stack and (self.pick.random() < 0.55 or len(self.stack) > 12):
            return self.leave()
        if self.pick.random() < 0.2:  # the code runs on: another RIP and another depth of its own stack
            top = (self.stack[-1].frame if self.stack else self.now.rsp + 8) - 8
            self.now = replace(self.now, rip=self.now.rip + 4, rsp=self.now.rsp if user else top - 8 * self.pick.randrange(1, 40))
        return self.enter(self.pick.choice(choices))

    def enter(self, kind: str) -> bytes:
        vector, source = VECTOR[kind]
        now = self.now
        top = self.base + TOPS[kind] if kind in TOPS else self.base + 0x3000 if now.cs & 3 else now.rsp & ~15
        size = 48 if kind == "pf" else 40
        out = pack(Kind.DELIVER, FULL, cpu=self.number, rip=now.rip, rsp=now.rsp, cs=now.cs, ss=now.ss, rflags=now.rflags,
                   arg=vector, source=source)  # fmt: skip
        saved = replace(now, rflags=now.rflags | (0x10000 if kind == "pf" else 0))
        self.stack.append(replace(saved, frame=top - 40))
        masked = now.masked | {kind} if kind in TOPS else now.masked
        if now.cs & 3:
            masked = frozenset({kind} if kind in TOPS else ())
        lo = top - size
        self.now = Context(0xFFFFFFFF81000000 + vector * 16, lo - 0x60, 0x10, 0 if now.cs & 3 else now.ss, 2, masked)
        return out

    def leave(self) -> bytes:
        back = self.stack.pop()
        self.now = replace(back, rip=back.rip + 8)
        return pack(Kind.RETURN, RET, cpu=self.number, rip=0xFFFFFFFF81FF0000, rsp=back.frame, addr=back.rip, value=back.rsp,
                    rflags=back.rflags, cs=back.cs, ss=back.ss)  # fmt: skip


def storm(events: int, cpus: int, seed: int) -> bytes:
    pick = random.Random(seed)
    machines = [Cpu(number, pick) for number in range(cpus)]
    return b"".join(pick.choice(machines).step() for _ in range(events))


def findings(records: bytes, cpus: int, fidelity: Fidelity) -> list[str]:
    def fill(w: TraceWriter) -> None:
        w.layout = replace(storm_layout(cpus), fidelity=fidelity)
        w.append(records)

    with build(fill, cpus=cpus) as trace, Replay(trace) as replay:
        replay.scan_all()
        stats = replay.stats()
        assert stats.unjudged == 0 and stats.bad_events == 0 and stats.judged == stats.deliveries
        if len(records) > 64 * 10_000:
            assert all(stats.ist_deliveries[n] > len(records) // 64 // 100 for n in (1, 2, 3))
        return [f"event {f.event}: {f.rule.name} {f.evidence.name}" for f in replay.findings()]


def test_a_million_events_of_clean_nesting_raise_nothing() -> None:
    assert findings(storm(1_000_000, 4, 1), 4, Fidelity.RETURNS) == []


@pytest.mark.parametrize("seed", range(20))
def test_clean_storms_of_many_shapes_raise_nothing(seed: int) -> None:
    assert findings(storm(5_000, 1 + seed % 5, seed), 1 + seed % 5, Fidelity.RETURNS) == []


def test_a_storm_that_is_not_clean_does_raise() -> None:
    cpu = Cpu(0, random.Random(0))
    records = cpu.enter("nmi") + cpu.enter("pf") + cpu.leave()
    cpu.now.masked -= {"nmi"}
    (found,) = findings(records + cpu.enter("nmi"), 1, Fidelity.RETURNS)
    assert found == "event 3: FRAME_CLOBBERED COMPUTED"


def test_deliveries_alone_of_a_clean_storm_raise_nothing() -> None:
    """Without returns: each round begins in user mode or in code with IF=1, as a log of a healthy machine shows it."""
    pick = random.Random(7)
    records = b""
    for _ in range(20_000):
        cpu = Cpu(pick.randrange(3), pick)
        if pick.random() < 0.5:
            rip, rsp = 0xFFFFFFFF82000000 + 16 * pick.randrange(99), 0xFFFFC90000003F00 - 8 * pick.randrange(300)
            cpu.now = Context(rip, rsp, 0x10, 0x18, 0x202, frozenset())
        for kind in pick.sample(["irq", "pf", "db", "nmi", "mc"], pick.randrange(1, 6)):
            if kind != "irq" or cpu.now.rflags & IF:
                records += cpu.enter(kind)
    assert findings(records, 3, Fidelity.NONE) == []
