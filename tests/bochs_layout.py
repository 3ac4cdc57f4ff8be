"""The layout.json of a recorded scenario (tests/bochs.py) as a Layout."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

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

Record = dict[str, Any]

FRED_WORDS = 8
SMALLEST_STACK = 256  # bytes; two tops closer than that are one stack, entered at two places


def number(value: Any) -> int:
    """A number of the recording: addresses are "0x" strings."""
    return int(value, 16) if isinstance(value, str) else int(value)


def length(record: Record) -> int:
    """Bytes of a memory access."""
    return int(record["len"])


def tss_of(table: Record) -> Tss:
    """A TSS of layout.json; RSP1 and RSP2 are not in it."""
    ist = table.get("ist", {})
    rsp = tuple(number(table[f"rsp{n}"]) if f"rsp{n}" in table else None for n in range(3))
    return Tss(number(table["base"]), rsp, (None, *(number(ist[str(n)]) if str(n) in ist else None for n in range(1, 8))))


_GATE_TYPE = re.compile(r"(int|trap)(?:_dpl([0-3]))?(_np)?$")


def gate_of(entry: Record, selector: int) -> Gate:
    """A gate of layout.json: type "int" or "trap", with "_dpl3" for one that CPL 3 may use."""
    match = _GATE_TYPE.match(entry["type"])
    if match is None:
        raise ValueError(f"gate of type {entry['type']!r}")
    kind = x86.GATE_INTERRUPT if match[1] == "int" else x86.GATE_TRAP
    return Gate(number(entry["handler"]), selector, int(entry["ist"]), kind, int(match[2] or 0), match[3] is None)


def stack_regions(data: Record, tables: tuple[Tss, ...]) -> tuple[Region, ...]:
    """The stacks of layout.json, cut at every IST top and RSP0 inside one that leaves room above it for another stack."""
    slots: dict[int, tuple[int, int]] = {}
    for cpu, tss in enumerate(tables):
        for slot, top in ((SLOT_RSP0, tss.rsp[0]), *((n, tss.ist[n]) for n in range(1, 8))):
            if top:
                slots.setdefault(top, (cpu, slot))
    regions = []
    for stack in data["stack_regions"]:
        lo, end = number(stack["lo"]), number(stack["hi"])
        tops = sorted(top for top in slots if lo < top <= end)
        cuts = [top for top, above in zip(tops, [*tops[1:], end], strict=True) if above - top >= SMALLEST_STACK] if tops else []
        for hi in (*cuts, end):
            cpu, slot = max(((t, slots[t]) for t in tops if lo < t <= hi), default=(0, (0, 0)))[1]
            regions.append(Region(lo, hi, REGION_STACK, cpu, slot))
            lo = hi
        if str(stack["name"]).startswith("user"):
            regions.append(Region(number(stack["lo"]), end, REGION_USER))
    return tuple(regions)


def logged_regions(data: Record, records: list[Record]) -> list[tuple[int, int]]:
    """Memory of which every load and store is in the recording, as far as they are ordinary ones.

    A shadow stack is left out: what its pushes and pops (`x`) store is told, but not which of them are stores.
    """
    touched = [number(r["lin"]) for r in records if r["e"] == "x"]
    ranges = [(number(r["lo"]), number(r["hi"])) for r in data.get("logged_regions", ())]
    return [(lo, hi) for lo, hi in ranges if lo < hi and not any(lo <= at < hi for at in touched)]


def layout_of(data: Record, records: list[Record]) -> Layout:
    """The layout at the start mark. A CPU that loads its own TSS during the recording has none at first."""
    extra = data.get("ap_tss") or []
    tables = tuple(tss_of(t) for t in (data["tss"], *(extra if isinstance(extra, list) else [extra])))
    selector = int(data["gdt"]["kernel_cs"])
    gates = {int(g["vec"]): gate_of(g, selector) for g in data["idt"]["gates"]}
    if data["idt"].get("default"):  # interrupt gates without IST; where their stubs are is seen when one is entered
        stubs = _first_handlers(records)
        gates = {v: Gate(stubs.get(v, 0), selector) for v in range(256)} | gates
    regions = stack_regions(data, tables)
    logged = logged_regions(data, records)
    regions += tuple(Region(lo, hi, kind) for lo, hi in logged for kind in (REGION_STORES, REGION_READS))
    idt = Idt(number(data["idt"]["base"]), gates)
    cpus = []
    for cpu in range(int(data["cpus"])):
        own = next((r for r in records if r["cpu"] == cpu and r["e"] in ("tr", "start")), None)
        fred = Fred(on=_fred_first(records, cpu)) if data.get("fred") else None
        if own is None:
            cpus.append(CpuTables(min(cpu, len(tables) - 1), 0, fred))
        elif own["e"] == "tr":
            cpus.append(CpuTables(None, None, fred))
        else:
            base = number(own["tss"])
            tss = next((n for n, t in enumerate(tables) if t.base == base), None)
            cpus.append(CpuTables(tss, 0 if number(own["idt"]) == idt.base else None, fred))
    return Layout(tables, (idt,), tuple(cpus), regions, Fidelity.RETURNS).with_stacks()


def _first_handlers(records: list[Record]) -> dict[int, int]:
    begins = {r["n"]: r for r in records if r["e"] == "deliver_begin"}
    found: dict[int, int] = {}
    for r in records:
        if r["e"] == "deliver_end":
            found.setdefault(int(begins[r["of"]]["vec"]), number(r["after"]["rip"]))
    return found


def _fred_first(records: list[Record], cpu: int) -> bool:
    """Whether a CPU's first complete delivery is one of FRED (it is switched on by a CR4 write, which is not recorded)."""
    words = Counter(r["in"] for r in records if r["e"] == "w" and "in" in r)
    first = next((r["of"] for r in records if r["e"] == "deliver_end" and r["cpu"] == cpu), None)
    return first is None or words[first] == FRED_WORDS


SLOT_OFFSETS = {**{n: 4 + 8 * n for n in range(3)}, **{8 + n: 0x24 + 8 * (n - 1) for n in range(1, 8)}}  # SDM figure 7-11


class TssMemory:
    """The pointers of every TSS as memory, by base and slot (0-2 RSPn, 9-15 IST1-7); None: not known."""

    def __init__(self, tables: tuple[Tss, ...]) -> None:
        self.slots: dict[int, dict[int, int | None]] = {
            t.base: {**{n: t.rsp[n] for n in range(3)}, **{8 + n: t.ist[n] for n in range(1, 8)}} for t in tables
        }

    def write(self, record: Record) -> list[tuple[int, int]]:
        """Take over a store of any length and place; returns base and slot of what it touched."""
        at, size = number(record["lin"]), length(record)
        raw = None if record["e"] == "rw" or size > 8 else number(record["val"])
        touched = []
        for base, slots in self.slots.items():
            for slot, offset in SLOT_OFFSETS.items():
                lo, hi = max(at, base + offset), min(at + size, base + offset + 8)
                if lo >= hi:
                    continue
                old, mask = slots[slot], (1 << 8 * (hi - lo)) - 1
                if raw is None or (old is None and hi - lo < 8):
                    slots[slot] = None
                else:
                    shift = 8 * (lo - base - offset)
                    slots[slot] = (old or 0) & ~(mask << shift) | (raw >> 8 * (lo - at) & mask) << shift
                touched.append((base, slot))
        return touched

    def read(self, record: Record) -> list[tuple[int, int]]:
        """A delivery read a pointer: it is returned, and taken over, if it is not the one that is known."""
        for base, slots in self.slots.items():
            for slot, offset in SLOT_OFFSETS.items():
                if number(record["lin"]) == base + offset and length(record) == 8 and slots[slot] != number(record["val"]):
                    slots[slot] = number(record["val"])
                    return [(base, slot)]
        return []
