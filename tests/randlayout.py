"""Random worlds: the tables, stacks and memory in which a random trace takes place."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tracedbg import x86
from tracedbg.layout import (
    REGION_READS,
    REGION_STACK,
    REGION_STORES,
    REGION_USER,
    SLOT_RSP0,
    CpuTables,
    Fidelity,
    Fred,
    Gate,
    Idt,
    Layout,
    Region,
    Tss,
)
from tracedbg.trace import MemoryRange

MASK = (1 << 64) - 1
POISON = 0x8600111111111111
KERNEL_CS, KERNEL_SS, USER_CS, USER_SS = 0x08, 0x10, 0x33, 0x2B
EDGES = (POISON, POISON, 1 << 47, 1 << 56, (1 << 56) - 8, MASK - (1 << 56) + 1, MASK - (1 << 56), 0, 8, 0x28)
AREAS = (
    0x0000_0000_0000_1000,
    0x0000_0000_0010_6000,
    0x0000_7FFF_FFFE_0000,
    0xFFFF_8000_0000_0000,
    0xFFFF_8300_BFFD_0000,
    0xFFFF_FE00_0000_3000,
    0xFFFF_FFFF_FFFC_0000,
)
VECTORS = (0, 1, 1, 2, 2, 2, 2, 3, 4, 6, 8, 13, 14, 14, 18, 18, 18, 21, 29, 0x20, 0x30, 0x80, 0xEC)
BLOCK = 1 << 14
TOPS = 11  # stack tops side by side: IST1-7 of CPU 0 are the first seven


@dataclass
class World:
    """Where a trace takes place. `size` is the distance of neighbouring stack tops in bytes."""

    r: random.Random
    cpu_count: int
    area: int
    size: int
    user_area: int
    work_area: int
    tops: list[int]
    layout: Layout
    initial: list[MemoryRange]
    drop: float  # how often a field is unknown

    @classmethod
    def make(cls, seed: int) -> World:
        """The world of a seed."""
        r = random.Random(seed)
        count = r.choice((1, 1, 1, 2, 2, 3))
        area = r.choice(AREAS)
        size = r.choice((0x40, 0x80, 0x100, 0x200, 0x1000, 0x1000, 0x2000))
        user = r.choice((0x0000_7FFE_0000_0000, 0x111000, (area + 0x20000) & MASK))
        work = (area + 0x10000 + r.choice((0, 8, 0xFF0))) & MASK
        tops = [(area + size * n) & MASK for n in range(1, TOPS + 1)]
        initial = []
        for _ in range(r.choice((0, 1, 1))):
            data = bytes(r.randrange(256) for _ in range(r.choice((3, 40, 200))))
            initial.append(MemoryRange(area + r.randrange(3 * size), data))
        drop = r.choice((0, 0, 0, 0.01, 0.05, 0.2))
        world = cls(r, count, area, size, user, work, tops, Layout(), initial, drop)
        world.layout = world.make_layout()
        return world

    def make_layout(self) -> Layout:
        r = self.r
        tsses = [self.make_tss(0)]
        tsses += [self.make_tss(number, tsses[0]) for number in range(1, self.cpu_count)]
        idts = [self.make_idt(0x600000)]
        shared = r.random() < 0.15
        tables = [CpuTables(0 if shared else n, 0) for n in range(self.cpu_count)]
        if r.random() < 0.3:
            idts.append(self.make_idt(0x601000))
            tables[-1] = CpuTables(tables[-1].tss, 1)
        if r.random() < 0.05:
            tables[r.randrange(len(tables))] = CpuTables(r.choice((0, None)), r.choice((0, None)))
        if r.random() < 0.45:
            tables = [CpuTables(t.tss, t.idt, self.make_fred() if r.random() < 0.85 else None) for t in tables]
        if r.random() < 0.05:
            tables.pop()
        fidelity = Fidelity(r.choice((0, 0, 1, 1, 1, 2, 3)) | (4 if r.random() < 0.1 else 0) | (8 if r.random() < 0.2 else 0))
        regions = tuple(x for x in self.make_regions(tsses) if x.lo < x.hi)
        layout = Layout(tuple(tsses), tuple(idts), tuple(tables), regions, fidelity)
        return layout.with_stacks() if r.random() < 0.6 else layout

    def make_tss(self, number: int, first: Tss | None = None) -> Tss:
        r, tops = self.r, self.tops
        ist: list[int | None] = [None]
        for slot in range(1, 8):
            kind = r.random()
            top: int | None = tops[(slot - 1 + 3 * number) % TOPS]
            if kind < 0.04:
                top = None
            elif kind < 0.09:
                top = r.choice(EDGES)
            elif kind < 0.14:
                top = (r.choice(tops) - r.choice((1, 4, 8, 0x18, 0x20, 0x28))) & MASK
            elif kind < 0.21:
                top = r.choice(tops)
            elif kind < 0.25:  # about the end of a 16 KiB block, which is a stack where no region is
                top = (self.area | BLOCK - 1) + 1 + r.choice((0, 0, 0x10, 0x20)) & MASK
            elif first is not None and kind < 0.35:
                top = first.ist[slot]
            ist.append(top)
        rsp0 = r.choice((tops[7 + number], tops[7 + number], tops[8], (self.area + 0x8000) & MASK, None))
        return Tss(0x500000 + 0x68 * number, (rsp0, POISON, None), tuple(ist))

    def make_idt(self, base: int) -> Idt:
        r = self.r
        gates = {}
        share = r.random() < 0.3  # several vectors on few stacks
        for vector in sorted({*range(34), *VECTORS}):
            if r.random() < 0.04:
                continue
            ist = r.choice((0, 0, 1, 2, 3)) if vector not in (2, 18) else r.choice((0, 1, 2, 2, 2, 2, 3, 3, 4, 5, 6, 7))
            if share:
                ist = r.choice((0, 2))
            kind = x86.GATE_TRAP if r.random() < 0.12 else x86.GATE_INTERRUPT
            if r.random() < 0.02:
                kind = r.choice((0, 5, 12))
            dpl = r.choice((0, 3)) if vector in (1, 3, 4, 0x80) else r.choice((0, 0, 0, 3))
            gates[vector] = Gate(0xFFFF_FFFF_8010_0000 + vector * 0x40, KERNEL_CS, ist, kind, dpl, r.random() > 0.02)
        return Idt(base, gates)

    def make_fred(self) -> Fred:
        r = self.r
        rsp: list[int | None] = [r.choice((self.tops[7], self.tops[8]))]
        for level in range(1, 4):
            kind = r.random()
            rsp.append(None if kind < 0.05 else r.choice(EDGES) if kind < 0.1 else self.tops[level if kind < 0.9 else 1])
        stklvls = None if r.random() < 0.04 else self.stklvls()
        config = None if r.random() < 0.04 else self.fred_config()
        return Fred(r.random() < 0.75, tuple(rsp), stklvls, config)

    def stklvls(self) -> int:
        """IA32_FRED_STKLVLS: two bits a vector; NMI, #DB, #MC, #DF have levels of their own most often."""
        r = self.r
        value = sum(r.choice((0, 1, 2, 3)) << 2 * vector for vector in (1, 2, 8, 18))
        return value | (r.getrandbits(64) if r.random() < 0.2 else 0)

    def fred_config(self) -> int:
        """IA32_FRED_CONFIG: the handlers' page, bits 10:9 the level of interrupts, bits 8:6 the bytes to skip."""
        r = self.r
        return 0xFFFF_FFFF_8030_0000 | r.choice((0, 0, 1, 2, 3)) << 9 | r.choice((0, 0, 1, 2, 7)) << 6 | r.choice((0, 0, 8))

    def make_regions(self, tsses: list[Tss]) -> list[Region]:
        r, area, size = self.r, self.area, self.size
        regions = []
        if r.random() < 0.5:
            regions.append(Region(self.user_area, (self.user_area + 0x3000) & MASK, REGION_USER))
        if r.random() < 0.1:
            regions.append(Region(area, area + r.choice((0x40, 0x1000)), REGION_USER))
        if r.random() < 0.2:
            regions.append(Region(area, area + 0x1000, REGION_STORES))
        if r.random() < 0.1:
            regions.append(Region(area, area + 0x2000, REGION_READS))
        if r.random() < 0.5:  # stacks side by side without a guard between them, of known size
            owners = {}
            for cpu, tss in enumerate(tsses):
                for slot in range(1, 8):
                    owners.setdefault(tss.ist[slot], (cpu, slot))
                owners.setdefault(tss.rsp[0], (cpu, SLOT_RSP0))
            for number, top in enumerate(self.tops):
                cpu, slot = owners.get(top, (0, 0 if number % 2 else number % 9))
                regions.append(Region(top - size, top, REGION_STACK, cpu, slot, r.random() < 0.08))
            if r.random() < 0.3:  # a hole, or a guard
                at = next(n for n, region in enumerate(regions) if region.kind == REGION_STACK)
                del regions[r.randrange(at, len(regions))]
        for _ in range(r.choice((0, 0, 0, 1, 3))):
            hi = (r.choice(self.tops) + r.choice((0, 0, 0, -0x20, 0x10, 8))) & MASK
            lo = max(hi - r.choice((0x30, 0x80, size, 0x3000)), 0)
            regions.append(Region(lo, hi, REGION_STACK, r.randrange(self.cpu_count), r.randrange(9), r.random() < 0.3))
        return regions
