"""Layout as data: TSS, IDT, stacks and fidelity of a trace; its section bytes and its TOML form."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, replace
from enum import IntFlag
from importlib import resources
from pathlib import Path
from typing import Any

from tracedbg import wire, x86
from tracedbg.errors import FormatError, UsageError

IST_STACK_SIZE = 8192  # assumed where no bounds are given; the next lower top cuts it shorter
PAGE = 4096

REGION_STACK, REGION_USER, REGION_STORES, REGION_READS = range(4)
SLOT_RSP0 = 8


class Fidelity(IntFlag):
    """What the source records completely, and its known deviations; `enum tdb_fidelity`."""

    NONE = 0
    RETURNS = 1
    SS_ZEROED = 2


@dataclass(frozen=True, slots=True)
class Gate:
    """One IDT gate. type: 0xe interrupt, 0xf trap; ist: 0-7."""

    offset: int
    selector: int = 8
    ist: int = 0
    type: int = x86.GATE_INTERRUPT
    dpl: int = 0
    present: bool = True

    @classmethod
    def from_bytes(cls, raw: bytes) -> Gate:
        """Decode the 16 bytes of a 64-bit gate: SDM Vol. 3A figure 6-8."""
        low, mid, high = (
            int.from_bytes(raw[0:4], "little"),
            int.from_bytes(raw[4:8], "little"),
            int.from_bytes(raw[8:12], "little"),
        )
        return cls(
            offset=(low & 0xFFFF) | (mid & 0xFFFF0000) | (high << 32),
            selector=low >> 16,
            ist=mid & 7,
            type=mid >> 8 & 0xF,
            dpl=mid >> 13 & 3,
            present=bool(mid >> 15 & 1),
        )


@dataclass(frozen=True, slots=True)
class Idt:
    """An interrupt descriptor table; a vector missing from `gates` is unknown."""

    base: int
    gates: dict[int, Gate]

    @classmethod
    def from_bytes(cls, base: int, raw: bytes) -> Idt:
        """Decode as many whole gates as `raw` holds, at most 256."""
        count = min(len(raw) // 16, 256)
        return cls(base, {v: Gate.from_bytes(raw[v * 16 : v * 16 + 16]) for v in range(count)})


@dataclass(frozen=True, slots=True)
class Tss:
    """A 64-bit TSS: RSP0-2 and IST1-7 (ist[0] is unused); None: unknown. SDM Vol. 3A figure 7-11."""

    base: int
    rsp: tuple[int | None, ...] = (None, None, None)
    ist: tuple[int | None, ...] = (None,) * 8

    @classmethod
    def from_bytes(cls, base: int, raw: bytes) -> Tss:
        """Decode a TSS; slots past the end of `raw` are unknown."""

        def word(at: int) -> int | None:
            return int.from_bytes(raw[at : at + 8], "little") if at + 8 <= len(raw) else None

        return cls(
            base,
            tuple(word(4 + 8 * n) for n in range(3)),
            (None, *(word(0x24 + 8 * n) for n in range(7))),
        )


@dataclass(frozen=True, slots=True)
class Region:
    """A range of memory [lo, hi) with a meaning (REGION_*). slot: 1-7 IST, 8 RSP0, 0 other."""

    lo: int
    hi: int
    kind: int = REGION_STACK
    cpu: int = 0
    slot: int = 0


@dataclass(frozen=True, slots=True)
class CpuTables:
    """Indices into Layout.tss and Layout.idts of what a CPU has loaded at the start; None: unknown."""

    tss: int | None = None
    idt: int | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """All that decides where a frame goes. Tables are selected by base address when LTR and LIDT events name them."""

    tss: tuple[Tss, ...] = ()
    idts: tuple[Idt, ...] = ()
    cpus: tuple[CpuTables, ...] = ()
    regions: tuple[Region, ...] = ()
    fidelity: Fidelity = Fidelity.NONE
    names: dict[int, str] = field(default_factory=dict)  # slot -> what the system calls the stack ("NMI")

    @property
    def is_empty(self) -> bool:
        """Nothing is known of any TSS or IDT: no frame can be placed."""
        return not self.tss or not any(idt.gates for idt in self.idts)

    def with_stacks(self) -> Layout:
        """Add a stack region for each IST top and RSP0 that no region holds yet.

        Its size is IST_STACK_SIZE, cut at the next lower top of any CPU. Non-canonical and zero tops are poison.
        """
        stacks = [r for r in self.regions if r.kind == REGION_STACK]
        tops: dict[int, tuple[int, int]] = {}
        for cpu, tables in enumerate(self.cpus):
            if tables.tss is None:
                continue
            tss = self.tss[tables.tss]
            slots = [(n, tss.ist[n]) for n in range(1, 8)] + [(SLOT_RSP0, tss.rsp[0])]
            for slot, top in slots:
                if not top or not x86.is_canonical(top) or not x86.is_canonical(top - 1):
                    continue
                if any(r.lo < top <= r.hi for r in stacks):
                    continue
                tops.setdefault(top, (cpu, slot))
        ordered = sorted(set(tops) | {r.hi for r in stacks})
        added = []
        for top, (cpu, slot) in sorted(tops.items()):
            below = max((t for t in ordered if t < top), default=0)
            lo = max(below, top - IST_STACK_SIZE, 0)
            added.append(Region(lo, top, REGION_STACK, cpu, slot))
        return replace(self, regions=(*self.regions, *added))

    def to_bytes(self) -> bytes:
        """The LAYOUT section."""
        head = wire.LAYOUT_HEAD.build(
            {
                "tss_count": len(self.tss),
                "idt_count": len(self.idts),
                "cpu_count": len(self.cpus),
                "region_count": len(self.regions),
                "fidelity": int(self.fidelity),
                "reserved": 0,
            }
        )
        parts = [head]
        parts += [wire.TSS.build(_tss_record(t)) for t in self.tss]
        parts += [
            wire.CPU_LAYOUT.build(
                {"tss": -1 if t.tss is None else t.tss, "idt": -1 if t.idt is None else t.idt}
            )
            for t in self.cpus
        ]
        parts += [
            wire.REGION.build(
                {"lo": r.lo, "hi": r.hi, "cpu": r.cpu, "kind": r.kind, "slot": r.slot, "reserved": 0}
            )
            for r in self.regions
        ]
        parts += [wire.IDT.build(_idt_record(i)) for i in self.idts]
        return b"".join(parts)

    @classmethod
    def from_bytes(cls, data: bytes, path: str, offset: int) -> Layout:
        """Read a LAYOUT section; every count is checked against the bytes there are."""
        size = wire.LAYOUT_HEAD.sizeof()
        if len(data) < size:
            raise FormatError(path, "layout section is cut short", offset)
        head = wire.parse(wire.LAYOUT_HEAD, data[:size], path, offset)
        need = (
            size
            + head.tss_count * wire.TSS.sizeof()
            + head.cpu_count * wire.CPU_LAYOUT.sizeof()
            + head.region_count * wire.REGION.sizeof()
            + head.idt_count * wire.IDT.sizeof()
        )
        if need != len(data):
            raise FormatError(path, f"layout needs {need} bytes by its counts, has {len(data)}", offset)
        at = size

        def records(layout: Any, count: int) -> list[Any]:
            nonlocal at
            width = layout.sizeof()
            result = [
                wire.parse(layout, data[at + i * width : at + (i + 1) * width], path, offset + at + i * width)
                for i in range(count)
            ]
            at += count * width
            return result

        tss = tuple(_tss_value(r) for r in records(wire.TSS, head.tss_count))
        cpus = tuple(
            CpuTables(None if r.tss < 0 else r.tss, None if r.idt < 0 else r.idt)
            for r in records(wire.CPU_LAYOUT, head.cpu_count)
        )
        regions = tuple(Region(r.lo, r.hi, r.kind, r.cpu, r.slot) for r in records(wire.REGION, head.region_count))
        idts = tuple(_idt_value(r) for r in records(wire.IDT, head.idt_count))
        for tables in cpus:
            if (tables.tss or 0) >= max(len(tss), 1) or (tables.idt or 0) >= max(len(idts), 1):
                raise FormatError(path, "layout names a table that it does not hold", offset)
        if any(r.lo >= r.hi or r.kind > REGION_READS or r.slot > SLOT_RSP0 for r in regions):
            raise FormatError(path, "layout holds an impossible region", offset)
        return cls(tss, idts, cpus, regions, Fidelity(head.fidelity & 3))


def _tss_record(tss: Tss) -> dict[str, Any]:
    known = sum(1 << n for n, v in enumerate(tss.rsp) if v is not None)
    known |= sum(1 << (8 + n) for n, v in enumerate(tss.ist) if v is not None)
    return {
        "base": tss.base,
        "rsp": [v or 0 for v in tss.rsp],
        "ist": [v or 0 for v in tss.ist],
        "known": known,
        "reserved": 0,
    }


def _tss_value(record: Any) -> Tss:
    return Tss(
        record.base,
        tuple(v if record.known >> n & 1 else None for n, v in enumerate(record.rsp)),
        tuple(v if record.known >> (8 + n) & 1 else None for n, v in enumerate(record.ist)),
    )


def _idt_record(idt: Idt) -> dict[str, Any]:
    gates = []
    for vector in range(256):
        gate = idt.gates.get(vector)
        if gate is None:
            gates.append({"offset": 0, "selector": 0, "ist": 0, "type": 0, "dpl": 0, "flags": 0, "reserved": 0})
        else:
            gates.append(
                {
                    "offset": gate.offset,
                    "selector": gate.selector,
                    "ist": gate.ist,
                    "type": gate.type,
                    "dpl": gate.dpl,
                    "flags": 1 | (2 if gate.present else 0),
                    "reserved": 0,
                }
            )
    return {"base": idt.base, "gate": gates}


def _idt_value(record: Any) -> Idt:
    return Idt(
        record.base,
        {
            v: Gate(g.offset, g.selector, g.ist & 7, g.type & 15, g.dpl & 3, bool(g.flags & 2))
            for v, g in enumerate(record.gate)
            if g.flags & 1
        },
    )


# -- TOML ---------------------------------------------------------------------------------------------------------------


def load_toml(name: str) -> Layout:
    """Read a layout from a TOML file, or a preset by its name (`linux`, `xen`). `tracedbg help layout` has the keys."""
    if "/" not in name and not name.endswith(".toml"):
        preset = resources.files("tracedbg") / "presets" / f"{name}.toml"
        if not preset.is_file():
            raise UsageError(f"no layout preset {name!r} (a file name ends in .toml)")
        return from_toml(preset.read_text(encoding="utf-8"), name)
    try:
        text = Path(name).read_bytes().decode("utf-8")
    except OSError as error:
        raise FormatError(name, error.strerror or "cannot be read") from None
    except UnicodeDecodeError as error:
        raise FormatError(name, "not UTF-8 text", error.start) from None
    return from_toml(text, name)


def from_toml(text: str, path: str) -> Layout:
    """Parse the TOML form of a layout."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FormatError(path, f"not TOML: {error}") from None
    try:
        return _layout_of(table)
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise FormatError(path, f"layout: {error}") from None


def _layout_of(table: dict[str, Any]) -> Layout:
    unknown = set(table) - {"user", "stack", "cpu", "tss", "idt", "gates", "names"}
    if unknown:
        raise ValueError(f"unknown key {sorted(unknown)[0]!r}")
    regions = [Region(_u64(lo), _u64(hi, top=True), REGION_USER) for lo, hi in table.get("user", [])]
    for stack in table.get("stack", []):
        slot = stack.get("slot", 0)
        slot = SLOT_RSP0 if slot == "rsp0" else int(slot)
        if not 0 <= slot <= SLOT_RSP0:
            raise ValueError(f"stack slot {slot} is not 1-7 or 'rsp0'")
        regions.append(Region(_u64(stack["lo"]), _u64(stack["hi"], top=True), REGION_STACK, int(stack.get("cpu", 0)), slot))
    if any(r.lo >= r.hi for r in regions):
        raise ValueError("a range ends before it begins")
    tss = []
    for entry in table.get("tss", []):
        rsp: list[int | None] = [None, None, None]
        ist: list[int | None] = [None] * 8
        for key, value in entry.items():
            if key == "base":
                continue
            if key.startswith("rsp") and key[3:] in {"0", "1", "2"}:
                rsp[int(key[3:])] = _u64(value)
            elif key.startswith("ist") and key[3:] in {"1", "2", "3", "4", "5", "6", "7"}:
                ist[int(key[3:])] = _u64(value)
            else:
                raise ValueError(f"tss: unknown key {key!r}")
        tss.append(Tss(_u64(entry["base"]), tuple(rsp), tuple(ist)))
    idts = []
    for entry in table.get("idt", []):
        gates = {int(v, 0): _gate_of(g) for v, g in entry.get("gate", {}).items()}
        if any(not 0 <= v <= 255 for v in gates):
            raise ValueError("a gate's vector is not 0-255")
        idts.append(Idt(_u64(entry["base"]), gates))
    by_tss = {t.base: i for i, t in enumerate(tss)}
    by_idt = {t.base: i for i, t in enumerate(idts)}
    cpus = []
    for entry in table.get("cpu", []):
        cpus.append(CpuTables(by_tss.get(_u64(entry["tr"])) if "tr" in entry else None,
                              by_idt.get(_u64(entry["idt"])) if "idt" in entry else None))
    names = {(SLOT_RSP0 if k == "rsp0" else int(k.removeprefix("ist"))): str(v) for k, v in table.get("names", {}).items()}
    return Layout(tuple(tss), tuple(idts), tuple(cpus), tuple(regions), Fidelity.NONE, names)


def _gate_of(table: dict[str, Any]) -> Gate:
    return Gate(
        offset=_u64(table.get("handler", 0)),
        selector=int(table.get("selector", 8)),
        ist=_small(table.get("ist", 0), 7),
        type={"interrupt": x86.GATE_INTERRUPT, "trap": x86.GATE_TRAP}[table.get("type", "interrupt")],
        dpl=_small(table.get("dpl", 0), 3),
        present=bool(table.get("present", True)),
    )


def _small(value: Any, top: int) -> int:
    if not isinstance(value, int) or not 0 <= value <= top:
        raise ValueError(f"{value!r} is not 0-{top}")
    return value


def _u64(value: Any, top: bool = False) -> int:
    number = int(value, 0) if isinstance(value, str) else value
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < (1 << 64) + top:
        raise ValueError(f"{value!r} is not a 64-bit address")
    return min(number, (1 << 64) - 1)


def to_toml(layout: Layout) -> str:
    """The TOML form; reading it gives the layout back (but for fidelity, which belongs to a trace)."""
    lines = []
    user = [r for r in layout.regions if r.kind == REGION_USER]
    if user:
        lines.append("user = [" + ", ".join(f'["{r.lo:#x}", "{r.hi:#x}"]' for r in user) + "]")
    for tables in layout.cpus:
        lines.append("\n[[cpu]]")
        if tables.tss is not None:
            lines.append(f'tr = "{layout.tss[tables.tss].base:#x}"')
        if tables.idt is not None:
            lines.append(f'idt = "{layout.idts[tables.idt].base:#x}"')
    for tss in layout.tss:
        lines += ["\n[[tss]]", f'base = "{tss.base:#x}"']
        lines += [f'rsp{n} = "{v:#x}"' for n, v in enumerate(tss.rsp) if v is not None]
        lines += [f'ist{n} = "{v:#x}"' for n, v in enumerate(tss.ist) if n and v is not None]
    for region in layout.regions:
        if region.kind == REGION_STACK:
            slot = '"rsp0"' if region.slot == SLOT_RSP0 else str(region.slot)
            lines += ["\n[[stack]]", f'lo = "{region.lo:#x}"', f'hi = "{region.hi:#x}"', f"cpu = {region.cpu}", f"slot = {slot}"]
    for idt in layout.idts:
        lines += ["\n[[idt]]", f'base = "{idt.base:#x}"']
        for vector, gate in sorted(idt.gates.items()):
            kind = "trap" if gate.type == x86.GATE_TRAP else "interrupt"
            extra = "" if gate.present else ", present = false"
            lines.append(
                f'gate.{vector} = {{ handler = "{gate.offset:#x}", selector = {gate.selector:#x}, '
                f'ist = {gate.ist}, dpl = {gate.dpl}, type = "{kind}"{extra} }}'
            )
    return "\n".join(lines).lstrip("\n") + "\n"
