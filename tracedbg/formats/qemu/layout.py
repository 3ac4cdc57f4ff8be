"""The layout of a QEMU log: which monitor text is of its machine, and what the user gave beside it."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tracedbg.errors import FormatError
from tracedbg.formats.qemu.events import Events
from tracedbg.formats.qemu.monitor import Snapshot
from tracedbg.layout import REGION_STORES, CpuTables, Fidelity, Layout, Region

if TYPE_CHECKING:
    from tracedbg.formats import ReaderOptions

Pairs = Counter[tuple[int, int]]  # (TR base, IDT base) -> 64-bit events


def resolve(
    events: Events, snapshots: list[Snapshot], options: ReaderOptions, judged: bool
) -> tuple[Layout, dict[str, Any]]:
    """The layout, and what META says of it (`judged`: there are deliveries that need one).

    Raises FormatError if no snapshot is of the log's machine.
    """
    pairs: Pairs = Counter()
    for tables in events.cpus.tables.values():
        if tables.count and tables.tr:
            pairs[tables.tr, tables.idt] += tables.count
    told: dict[str, Any] = {}
    layout = Layout()
    chosen = _choose(snapshots, pairs, not options.monitor)
    if chosen is not None:
        layout = _numbered(chosen.layout(extra=pairs), events)
        told = {
            "origin": "monitor",
            "file": os.path.basename(chosen.name),
            "snapshots": [os.path.basename(s.name) for s in snapshots],
            "matching": sum(n for pair, n in pairs.items() if chosen.holds(*pair)),
        }
        if len(snapshots) > 1:
            told["agree"] = _agree(snapshots, chosen, pairs)
    if options.layout is not None:
        layout = _merge(options.layout, layout)
        told["origin"] = "file" if chosen is None else "file and monitor"
    layout = _numbered(layout, events)
    numbered = any(cpu.tss is not None for cpu in layout.cpus)
    if len(events.cpus.seen) <= 1 and len(layout.tss) == len(layout.idts) == 1 and not numbered:
        layout = replace(layout, cpus=(CpuTables(0, 0),))  # one CPU, one table of each kind: they belong together
    if layout.is_empty and judged:
        told["missing"] = True
        told["commands"] = _commands(events)
    elif layout.is_empty:
        told["needless"] = True  # nothing in it can be judged
    layout = layout.with_stacks()
    fidelity = layout.fidelity | Fidelity.SS_ZEROED
    if events.counts["returns"]:
        fidelity |= Fidelity.RETURNS
    stores = tuple(Region(lo, hi, REGION_STORES) for lo, hi in options.stores)
    return replace(layout, fidelity=fidelity, regions=(*layout.regions, *stores)), told


def _choose(snapshots: list[Snapshot], pairs: Pairs, discovered: bool) -> Snapshot | None:
    """The snapshot whose tables the most 64-bit events use; of equals the last by name. None: there are no snapshots."""
    if not snapshots:
        return None
    if not pairs:
        return snapshots[-1]
    best: tuple[int, Snapshot] | None = None
    for snapshot in snapshots:
        matching = sum(n for pair, n in pairs.items() if snapshot.holds(*pair))
        if matching and (best is None or matching >= best[0]):
            best = (matching, snapshot)
    if best is None:
        where = " (found beside the log: move it away, or name the right one with --monitor)" if discovered else ""
        raise FormatError(
            snapshots[0].name, f"monitor text of another machine: no 64-bit event of the log has its TR and IDT bases{where}"
        )
    return best[1]


def _agree(snapshots: list[Snapshot], chosen: Snapshot, pairs: Pairs) -> bool:
    """Whether every snapshot has the same IST pointers, RSP0 and gates as the chosen one, as far as both have them."""
    mine = chosen.layout(extra=pairs)
    tss = {t.base: (t.rsp[0], t.ist) for t in mine.tss}
    gates = {(i.base, v): g for i in mine.idts for v, g in i.gates.items()}
    for snapshot in snapshots:
        theirs = snapshot.layout(extra=pairs)
        if any(tss.get(t.base, (t.rsp[0], t.ist)) != (t.rsp[0], t.ist) for t in theirs.tss):
            return False
        if any(gates.get((i.base, v), g) != g for i in theirs.idts for v, g in i.gates.items()):
            return False
    return True


def _numbered(layout: Layout, events: Events) -> Layout:
    """The tables of CPUs that only the log knows, by their last TR and IDT bases."""
    by_tss = {t.base: i for i, t in enumerate(layout.tss)}
    by_idt = {t.base: i for i, t in enumerate(layout.idts)}
    cpus = list(layout.cpus)
    for number, cpu in sorted(events.cpus.seen.items()):
        cpus += [CpuTables()] * (number + 1 - len(cpus))
        if cpus[number] == CpuTables() and cpu.tr is not None and cpu.idt is not None:
            cpus[number] = CpuTables(by_tss.get(cpu.tr), by_idt.get(cpu.idt))
    return replace(layout, cpus=tuple(cpus))


def _merge(given: Layout, found: Layout) -> Layout:
    """The given layout, with the tables that only the monitor text has."""
    tss = [*given.tss, *(t for t in found.tss if all(t.base != g.base for g in given.tss))]
    idts = [*given.idts, *(t for t in found.idts if all(t.base != g.base for g in given.idts))]
    by_tss = {t.base: i for i, t in enumerate(tss)}
    by_idt = {t.base: i for i, t in enumerate(idts)}
    cpus = []
    for number in range(max(len(given.cpus), len(found.cpus))):
        mine = given.cpus[number] if number < len(given.cpus) else CpuTables()
        other = found.cpus[number] if number < len(found.cpus) else CpuTables()
        cpus.append(
            CpuTables(
                mine.tss if mine.tss is not None or other.tss is None else by_tss[found.tss[other.tss].base],
                mine.idt if mine.idt is not None or other.idt is None else by_idt[found.idts[other.idt].base],
            )
        )
    return Layout(
        tuple(tss),
        tuple(idts),
        tuple(cpus),
        (*given.regions, *found.regions),
        given.fidelity | found.fidelity,
        {**found.names, **given.names},
    )


def _commands(events: Events) -> list[str]:
    """Monitor commands that print the tables, for each CPU of the log."""
    bases = {number: (cpu.tr, cpu.idt) for number, cpu in sorted(events.cpus.seen.items())}
    result = []
    for number, (tr, idt) in (bases or {0: (None, None)}).items():
        result += [f"cpu {number}", "info registers"]
        result.append(f"x /26xw {tr:#x}" if tr else "x /26xw BASE   (the second number of TR in info registers)")
        result.append(f"x /512xg {idt:#x}" if idt else "x /512xg BASE   (the first number of IDT in info registers)")
    return result
