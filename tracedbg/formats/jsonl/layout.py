"""The layout in the header of JSON Lines: the tables of a layout file (`tracedbg help layout`), and what belongs to a trace."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tracedbg.errors import FormatError
from tracedbg.formats.case.read import FIDELITY, REGIONS
from tracedbg.layout import SLOT_RSP0, Fidelity, Fred, Gate, Layout, Region, Tss, from_table

_TABLE_KEYS = ("cpu", "tss", "idt", "stack", "user", "names")
_OWN_KEYS = ("fidelity", "stores", "reads", "regions")
_REGION_KEYS = ("kind", "lo", "hi", "cpu", "slot", "assumed")
_WORDS = {number: word for word, number in REGIONS.items()}
_SLOTS = {SLOT_RSP0: "rsp0", **{n: f"ist{n}" for n in range(1, 8)}}


def to_json(layout: Layout) -> dict[str, Any] | None:
    """The layout as the header has it; None if that form does not hold all of it (tables of one base, say)."""
    value: dict[str, Any] = {}
    words = [word for word, bit in FIDELITY.items() if layout.fidelity & bit]
    if words:
        value["fidelity"] = words
    if layout.cpus:
        value["cpu"] = [_cpu(layout, number) for number in range(len(layout.cpus))]
    if layout.tss:
        value["tss"] = [_tss(tss) for tss in layout.tss]
    if layout.regions or layout.tss:
        value["regions"] = [_region(region) for region in layout.regions]
    if layout.idts:
        value["idt"] = [
            {"base": f"{idt.base:#x}", "gate": {str(vector): _gate(gate) for vector, gate in sorted(idt.gates.items())}}
            for idt in layout.idts
        ]
    if layout.names:
        value["names"] = {_SLOTS.get(slot, "?"): name for slot, name in sorted(layout.names.items())}
    try:
        return value if from_json(value, "") == layout else None
    except FormatError:
        return None


def _cpu(layout: Layout, number: int) -> dict[str, Any]:
    tables = layout.cpus[number]
    value: dict[str, Any] = {}
    if tables.tss is not None:
        value["tr"] = f"{layout.tss[tables.tss].base:#x}"
    if tables.idt is not None:
        value["idt"] = f"{layout.idts[tables.idt].base:#x}"
    if tables.fred is not None:
        value["fred"] = _fred(tables.fred)
    return value


def _fred(fred: Fred) -> dict[str, Any]:
    named = [(f"rsp{n}", v) for n, v in enumerate(fred.rsp)] + [("stklvls", fred.stklvls), ("config", fred.config)]
    return {"on": fred.on, **{name: f"{v:#x}" for name, v in named if v is not None}}


def _tss(tss: Tss) -> dict[str, str]:
    named = [(f"rsp{n}", v) for n, v in enumerate(tss.rsp)] + [(f"ist{n}", v) for n, v in enumerate(tss.ist) if n]
    return {"base": f"{tss.base:#x}", **{name: f"{v:#x}" for name, v in named if v is not None}}


def _gate(gate: Gate) -> dict[str, Any]:
    value: dict[str, Any] = {"handler": f"{gate.offset:#x}"}
    usual = Gate(0)
    if gate.selector != usual.selector:
        value["selector"] = gate.selector
    if gate.ist:
        value["ist"] = gate.ist
    if gate.type != usual.type:
        value["type"] = gate.type
    if gate.dpl:
        value["dpl"] = gate.dpl
    if not gate.present:
        value["present"] = False
    return value


def _region(region: Region) -> dict[str, Any]:
    value: dict[str, Any] = {"kind": _WORDS[region.kind], "lo": f"{region.lo:#x}", "hi": f"{region.hi:#x}"}
    if region.cpu or region.kind == REGIONS["stack"]:
        value["cpu"] = region.cpu
    if region.slot:
        value["slot"] = _SLOTS[region.slot] if region.slot == SLOT_RSP0 else region.slot
    if region.assumed:
        value["assumed"] = True
    return value


def from_json(value: Any, path: str) -> Layout:
    """Read it back. `regions` are all there are; without them stacks of the usual size are added. Raises FormatError."""
    try:
        return _layout(value, path)
    except ValueError as error:
        raise FormatError(path, f"layout: {error}") from None


def _layout(value: Any, path: str) -> Layout:
    _keys(value, "", (*_TABLE_KEYS, *_OWN_KEYS))
    table = {key: value[key] for key in _TABLE_KEYS if key in value}
    fidelity = Fidelity.NONE
    for word in _items(value, "fidelity"):
        if not isinstance(word, str) or word not in FIDELITY:
            raise ValueError(f"fidelity is a list of {', '.join(FIDELITY)}")
        fidelity |= FIDELITY[word]
    if "regions" in value:
        for key in ("user", "stack", "stores", "reads"):
            if key in value:
                raise ValueError(f"{key!r} besides 'regions', which has them all")
        layout = from_table(table, path)
        regions = tuple(_region_of(entry, path) for entry in _items(value, "regions"))
    else:
        layout = from_table(table, path).with_stacks()
        more = [(pair, REGIONS[name]) for name in ("stores", "reads") for pair in _items(value, name)]
        regions = (*layout.regions, *(_range_of(pair, kind, path) for pair, kind in more))
    layout = replace(layout, regions=regions, fidelity=fidelity)
    layout.to_bytes()  # the limits of all counts
    return layout


def _keys(value: Any, where: str, known: tuple[str, ...]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where}not an object")
    for key in value:
        if key not in known:
            raise ValueError(f"{where}unknown key {key[:40]!r} (known: {', '.join(known)})")


def _items(value: dict[str, Any], key: str) -> list[Any]:
    items = value.get(key, [])
    if not isinstance(items, list):
        raise ValueError(f"{key} is not a list")
    return items


def _range_of(pair: Any, kind: int, path: str) -> Region:
    """A range `["0x1000", "0x2000"]`: checked as those of user memory are."""
    return replace(from_table({"user": [pair]}, path).regions[0], kind=kind)


def _region_of(entry: Any, path: str) -> Region:
    """A range of any kind: checked as a stack is."""
    _keys(entry, "regions: ", _REGION_KEYS)
    kind = entry.get("kind")
    if not isinstance(kind, str) or kind not in REGIONS:
        raise ValueError(f"regions: kind is one of {', '.join(REGIONS)}")
    stack = {key: value for key, value in entry.items() if key != "kind"}
    return replace(from_table({"stack": [stack]}, path).regions[0], kind=REGIONS[kind])
