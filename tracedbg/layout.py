"""Layout as data: TSS, IDT, stacks and fidelity of a trace; its section bytes and its TOML form."""

from __future__ import annotations

import bisect
import itertools
import tomllib
from dataclasses import dataclass, field, replace
from enum import IntFlag
from importlib import resources
from typing import Any

from tracedbg import wire, x86
from tracedbg.errors import FormatError, UsageError

IST_STACK_SIZE = 8192  # assumed where no bounds are given; the next lower top cuts it shorter
MAX_TOML = 64 << 20  # bytes of a layout file: the tables of 4096 CPUs fit

REGION_STACK, REGION_USER, REGION_STORES, REGION_READS = range(4)
SLOT_RSP0 = 8


class Fidelity(IntFlag):
    """What the source records completely, and its known deviations; `enum tdb_fidelity`."""

    NONE = 0
    RETURNS = 1
    SS_ZEROED = 2
    INFERRED = 4  # the events are inferred from one instant
    GUESTS = 8  # from vmentry to vmexit the events are the guest's


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
    assumed: bool = False  # nothing tells lo: a usual size


@dataclass(frozen=True, slots=True)
class Fred:
    """FRED delivery of a CPU at the start: whether it is on (CR4.FRED), and its MSRs; None: unknown."""

    on: bool = True
    rsp: tuple[int | None, ...] = (None,) * 4  # IA32_FRED_RSP0-3
    stklvls: int | None = None
    config: int | None = None


@dataclass(frozen=True, slots=True)
class CpuTables:
    """Indices into Layout.tss and Layout.idts of what a CPU has loaded at the start; None: unknown."""

    tss: int | None = None
    idt: int | None = None
    fred: Fred | None = None


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
        return (not self.tss or not any(idt.gates for idt in self.idts)) and not any(c.fred for c in self.cpus)

    def with_stacks(self) -> Layout:
        """Add a stack region for each IST top and RSP0 that no region holds yet.

        Its size is IST_STACK_SIZE, cut at the next lower top of any CPU. Non-canonical and zero tops are poison.
        """
        stacks = sorted((r.lo, r.hi) for r in self.regions if r.kind == REGION_STACK)
        begins = [lo for lo, _ in stacks]
        ends = list(itertools.accumulate((hi for _, hi in stacks), max))  # how far any stack reaches that begins by then
        tops: dict[int, tuple[int, int]] = {}
        for cpu, tables in enumerate(self.cpus):
            if tables.tss is None:
                continue
            tss = self.tss[tables.tss]
            slots = [(n, tss.ist[n]) for n in range(1, 8)] + [(SLOT_RSP0, tss.rsp[0])]
            for slot, top in slots:
                if not top or not x86.is_canonical(top) or not x86.is_canonical(top - 1):
                    continue
                before = bisect.bisect_left(begins, top)
                if before and ends[before - 1] >= top:
                    continue
                tops.setdefault(top, (cpu, slot))
        ordered = sorted(set(tops) | {hi for _, hi in stacks})
        added = []
        for top, (cpu, slot) in sorted(tops.items()):
            at = bisect.bisect_left(ordered, top)
            below = ordered[at - 1] if at else 0
            lo = max(below, top - IST_STACK_SIZE, 0)
            added.append(Region(lo, top, REGION_STACK, cpu, slot, assumed=True))
        return replace(self, regions=(*self.regions, *added))

    def to_bytes(self) -> bytes:
        """The LAYOUT section. Raises ValueError if a reader would refuse it."""
        _check_counts(len(self.tss), len(self.idts), len(self.cpus), len(self.regions))
        head = wire.LAYOUT_HEAD.build(
            {
                "tss_count": len(self.tss),
                "idt_count": len(self.idts),
                "cpu_count": len(self.cpus),
                "region_count": len(self.regions),
                "fidelity": int(self.fidelity),
                "fred_count": len(self.cpus) if any(c.fred for c in self.cpus) else 0,
            }
        )
        parts = [head]
        parts += [_tss_bytes(t) for t in self.tss]
        parts += [wire.CPU_PACK.pack(-1 if t.tss is None else t.tss, -1 if t.idt is None else t.idt) for t in self.cpus]
        parts += [wire.REGION_PACK.pack(r.lo, r.hi, r.cpu, r.kind, r.slot, int(r.assumed)) for r in self.regions]
        parts += [_idt_bytes(i) for i in self.idts]
        if any(c.fred for c in self.cpus):
            parts += [_fred_bytes(c.fred or Fred(on=False)) for c in self.cpus]
        return b"".join(parts)

    @classmethod
    def from_bytes(cls, data: bytes, path: str, offset: int, max_cpus: int = wire.MAX_CPUS) -> Layout:
        """Read a LAYOUT section; every count is checked against its limit and against the bytes there are."""
        size = wire.LAYOUT_HEAD.sizeof()
        if len(data) < size:
            raise FormatError(path, "layout section is cut short", offset)
        head = wire.parse(wire.LAYOUT_HEAD, data[:size], path, offset)
        try:
            _check_counts(head.tss_count, head.idt_count, head.cpu_count, head.region_count)
        except _TooMany as error:
            raise FormatError(path, str(error), offset + error.at) from None
        if head.cpu_count > max_cpus:
            raise FormatError(path, f"the layout has {head.cpu_count} CPUs, the trace {max_cpus}", offset + 8)
        tss_at = size
        cpus_at = tss_at + head.tss_count * wire.TSS_PACK.size
        regions_at = cpus_at + head.cpu_count * wire.CPU_PACK.size
        idts_at = regions_at + head.region_count * wire.REGION_PACK.size
        if head.fred_count not in (0, head.cpu_count):
            raise FormatError(path, f"the layout has {head.fred_count} FRED records for {head.cpu_count} CPUs", offset + 20)
        fred_at = idts_at + head.idt_count * _IDT_SIZE
        need = fred_at + head.fred_count * wire.FRED_PACK.size
        if need != len(data):
            raise FormatError(path, f"layout needs {need} bytes by its counts, has {len(data)}", offset)
        tss = tuple(_tss_value(values) for values in wire.TSS_PACK.iter_unpack(data[tss_at:cpus_at]))
        freds = [_fred_value(values) for values in wire.FRED_PACK.iter_unpack(data[fred_at:need])] or [None] * head.cpu_count
        cpus = tuple(
            CpuTables(None if t < 0 else t, None if i < 0 else i, fred)
            for (t, i), fred in zip(wire.CPU_PACK.iter_unpack(data[cpus_at:regions_at]), freds, strict=True)
        )
        regions = tuple(
            Region(lo, hi, kind, cpu, slot, bool(assumed & 1))
            for lo, hi, cpu, kind, slot, assumed in wire.REGION_PACK.iter_unpack(data[regions_at:idts_at])
        )
        idts = tuple(_idt_value(data[at : at + _IDT_SIZE]) for at in range(idts_at, fred_at, _IDT_SIZE))
        for tables in cpus:
            if (tables.tss or 0) >= max(len(tss), 1) or (tables.idt or 0) >= max(len(idts), 1):
                raise FormatError(path, "layout names a table that it does not hold", offset)
        if any(r.lo >= r.hi or r.kind > REGION_READS or r.slot > SLOT_RSP0 for r in regions):
            raise FormatError(path, "layout holds an impossible region", offset)
        return cls(tss, idts, cpus, regions, Fidelity(head.fidelity & 15))


class _TooMany(ValueError):
    """A count of a layout beyond its limit; `at` is the place of the count in the section."""

    def __init__(self, message: str, at: int) -> None:
        super().__init__(message)
        self.at = at


_LIMITS = (("TSSs", wire.MAX_TABLES), ("IDTs", wire.MAX_TABLES), ("CPUs", wire.MAX_CPUS), ("regions", wire.MAX_REGIONS))


def _check_counts(*counts: int) -> None:
    for number, (count, (what, limit)) in enumerate(zip(counts, _LIMITS, strict=True)):
        if count > limit:
            raise _TooMany(f"absurd number of {what} in the layout ({count}, at most {limit})", 4 * number)


_GATE_KNOWN, _GATE_PRESENT = 1, 2
_IDT_SIZE = wire.IDT.sizeof()
_NO_GATE = bytes(wire.GATE_PACK.size)


def _tss_bytes(tss: Tss) -> bytes:
    known = sum(1 << n for n, v in enumerate(tss.rsp) if v is not None)
    known |= sum(1 << (8 + n) for n, v in enumerate(tss.ist) if v is not None)
    return wire.TSS_PACK.pack(tss.base, *(v or 0 for v in (*tss.rsp, *tss.ist)), known, 0)


def _tss_value(values: tuple[int, ...]) -> Tss:
    known = values[12]
    return Tss(
        values[0],
        tuple(v if known >> n & 1 else None for n, v in enumerate(values[1:4])),
        tuple(v if known >> (8 + n) & 1 else None for n, v in enumerate(values[4:12])),
    )


def _fred_bytes(fred: Fred) -> bytes:
    known = sum(1 << n for n, v in enumerate(fred.rsp) if v is not None)
    known |= (16 if fred.stklvls is not None else 0) | (32 if fred.config is not None else 0)
    return wire.FRED_PACK.pack(*(v or 0 for v in fred.rsp), fred.stklvls or 0, fred.config or 0, known, int(fred.on))


def _fred_value(values: tuple[int, ...]) -> Fred | None:
    """A record; None if it says nothing: no FRED."""
    known, on = values[6] & 63, bool(values[7] & 1)
    if not known and not on:
        return None
    return Fred(
        on,
        tuple(v if known >> n & 1 else None for n, v in enumerate(values[:4])),
        values[4] if known & 16 else None,
        values[5] if known & 32 else None,
    )


def _idt_bytes(idt: Idt) -> bytes:
    parts = [_NO_GATE] * 256
    for vector, g in idt.gates.items():
        flags = _GATE_KNOWN | (_GATE_PRESENT if g.present else 0)
        parts[vector] = wire.GATE_PACK.pack(g.offset, g.selector, g.ist, g.type, g.dpl, flags, 0)
    return idt.base.to_bytes(8, "little") + b"".join(parts)


def _idt_value(raw: bytes) -> Idt:
    return Idt(
        int.from_bytes(raw[:8], "little"),
        {
            vector: Gate(offset, selector, ist & 7, kind & 15, dpl & 3, bool(flags & _GATE_PRESENT))
            for vector, (offset, selector, ist, kind, dpl, flags, _) in enumerate(wire.GATE_PACK.iter_unpack(raw[8:]))
            if flags & _GATE_KNOWN
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
        with open(name, "rb") as file:
            data = file.read(MAX_TOML + 1)
        if len(data) > MAX_TOML:
            raise FormatError(name, f"a layout file has at most {MAX_TOML >> 20} MiB")
        text = data.decode("utf-8")
    except OSError as error:
        raise FormatError(name, (error.strerror or "cannot be read").lower()) from None
    except UnicodeDecodeError as error:
        raise FormatError(name, "not UTF-8 text", error.start) from None
    return from_toml(text, name)


def from_toml(text: str, path: str) -> Layout:
    """Parse the TOML form of a layout."""
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise FormatError(path, "not TOML: nested too deeply") from None
    except ValueError as error:  # numbers of thousands of digits too
        raise FormatError(path, f"not TOML: {error}") from None
    return from_table(table, path)


def from_table(table: dict[str, Any], path: str) -> Layout:
    """The layout of parsed TOML, or of another text with the same tables. Raises FormatError."""
    try:
        return _layout_of(table)
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError) as error:
        raise FormatError(path, f"layout: {error}") from None


_POINTERS = (*(f"rsp{n}" for n in range(3)), *(f"ist{n}" for n in range(1, 8)))
_SLOT_OF = {**{f"ist{n}": n for n in range(1, 8)}, "rsp0": SLOT_RSP0}


def _layout_of(table: dict[str, Any]) -> Layout:
    _check_keys(table, "", ("user", "stack", "cpu", "tss", "idt", "names"))
    regions = [Region(_u64(lo), _u64(hi, top=True), REGION_USER) for lo, hi in table.get("user", [])]
    for stack in table.get("stack", []):
        _check_keys(stack, "stack: ", ("lo", "hi", "cpu", "slot", "assumed"), ("lo", "hi"))
        slot = stack.get("slot", 0)
        slot = SLOT_RSP0 if slot == "rsp0" else _small(slot, SLOT_RSP0)
        owner = _small(stack.get("cpu", 0), 0xFFFF)
        assumed = stack.get("assumed", False)
        if not isinstance(assumed, bool):
            raise ValueError(f"stack: assumed {_shown(assumed)} is not true or false")
        regions.append(Region(_u64(stack["lo"]), _u64(stack["hi"], top=True), REGION_STACK, owner, slot, assumed))
    if any(r.lo >= r.hi for r in regions):
        raise ValueError("a range ends before it begins")
    tss = []
    for entry in table.get("tss", []):
        _check_keys(entry, "tss: ", ("base", *_POINTERS), ("base",))
        rsp = tuple(_u64(entry[f"rsp{n}"]) if f"rsp{n}" in entry else None for n in range(3))
        ist = tuple(_u64(entry[f"ist{n}"]) if n and f"ist{n}" in entry else None for n in range(8))
        tss.append(Tss(_u64(entry["base"]), rsp, ist))
    idts = []
    for entry in table.get("idt", []):
        _check_keys(entry, "idt: ", ("base", "gate"), ("base",))
        gates: dict[int, Gate] = {}
        for name, gate in entry.get("gate", {}).items():
            vector = _u64(name)
            if vector > 255:
                raise ValueError("a gate's vector is not 0-255")
            if vector in gates:
                raise ValueError(f"gate {vector} is there twice")
            gates[vector] = _gate_of(gate, vector)
        idts.append(Idt(_u64(entry["base"]), gates))
    by_tss = {t.base: i for i, t in enumerate(tss)}
    by_idt = {t.base: i for i, t in enumerate(idts)}
    _check_counts(len(tss), len(idts), len(table.get("cpu", [])), len(regions))
    cpus = []
    for number, entry in enumerate(table.get("cpu", [])):
        _check_keys(entry, "cpu: ", ("tr", "idt", "fred"))
        fred = _fred_of(entry["fred"]) if "fred" in entry else None
        cpus.append(CpuTables(_named(entry, number, "tr", "tss", by_tss), _named(entry, number, "idt", "idt", by_idt), fred))
    given = table.get("names", {})
    _check_keys(given, "names: ", tuple(_SLOT_OF))
    names = {_SLOT_OF[key]: _text(value) for key, value in given.items()}
    return Layout(tuple(tss), tuple(idts), tuple(cpus), tuple(regions), Fidelity.NONE, names)


def _check_keys(table: Any, where: str, known: tuple[str, ...], needed: tuple[str, ...] = ()) -> None:
    if not isinstance(table, dict):
        raise ValueError(f"{where}{_shown(table)} is not a table")
    for key in table:
        if key not in known:
            raise ValueError(f"{where}unknown key {_shown(key)}")
    for key in needed:
        if key not in table:
            raise ValueError(f"{where}{key!r} is missing")


def _named(entry: dict[str, Any], cpu: int, key: str, kind: str, known: dict[int, int]) -> int | None:
    """The index of the table whose base a CPU names."""
    if key not in entry:
        return None
    base = _u64(entry[key])
    if base not in known:
        raise ValueError(f"cpu {cpu}: {key} {base:#x} names no [[{kind}]] of this file")
    return known[base]


def _fred_of(table: Any) -> Fred:
    _check_keys(table, "fred: ", ("on", *(f"rsp{n}" for n in range(4)), "stklvls", "config"))
    on = table.get("on", True)
    if not isinstance(on, bool):
        raise ValueError(f"fred: on {_shown(on)} is not true or false")
    rsp = tuple(_u64(table[f"rsp{n}"]) if f"rsp{n}" in table else None for n in range(4))
    return Fred(on, rsp, *(_u64(table[key]) if key in table else None for key in ("stklvls", "config")))


_GATE_TYPES = {"interrupt": x86.GATE_INTERRUPT, "trap": x86.GATE_TRAP}


def _gate_of(table: Any, vector: int) -> Gate:
    _check_keys(table, f"gate {vector}: ", ("handler", "selector", "ist", "type", "dpl", "present"))
    kind, present = table.get("type", "interrupt"), table.get("present", True)
    if kind not in _GATE_TYPES and not (isinstance(kind, int) and not isinstance(kind, bool) and 0 <= kind <= 15):
        raise ValueError(f"gate {vector}: type {_shown(kind)} is not 'interrupt', 'trap' or 0-15")
    if not isinstance(present, bool):
        raise ValueError(f"gate {vector}: present {_shown(present)} is not true or false")
    return Gate(
        offset=_u64(table.get("handler", 0)),
        selector=_small(table.get("selector", 8), 0xFFFF),
        ist=_small(table.get("ist", 0), 7),
        type=_GATE_TYPES.get(kind, kind),
        dpl=_small(table.get("dpl", 0), 3),
        present=present,
    )


def _shown(value: Any) -> str:
    """A value of the file in an error, which is one line."""
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "a table"
    if isinstance(value, int) and value.bit_length() > 128:
        return "a huge number"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _small(value: Any, top: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= top:
        raise ValueError(f"{_shown(value)} is not 0-{top}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{_shown(value)} is not a text")
    return value


def _u64(value: Any, top: bool = False) -> int:
    number = int(value, 0) if isinstance(value, str) and len(value) <= 80 else value
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < (1 << 64) + top:
        raise ValueError(f"{_shown(value)} is not a 64-bit address")
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
        if tables.fred is not None:
            lines.append(_fred_line(tables.fred))
    for tss in layout.tss:
        lines += ["\n[[tss]]", f'base = "{tss.base:#x}"']
        lines += [f'rsp{n} = "{v:#x}"' for n, v in enumerate(tss.rsp) if v is not None]
        lines += [f'ist{n} = "{v:#x}"' for n, v in enumerate(tss.ist) if n and v is not None]
    for region in layout.regions:
        if region.kind == REGION_STACK:
            slot = '"rsp0"' if region.slot == SLOT_RSP0 else str(region.slot)
            lines += ["\n[[stack]]", f'lo = "{region.lo:#x}"', f'hi = "{region.hi:#x}"', f"cpu = {region.cpu}", f"slot = {slot}"]
            lines += ["assumed = true"] if region.assumed else []
    for idt in layout.idts:
        lines += ["\n[[idt]]", f'base = "{idt.base:#x}"']
        for vector, gate in sorted(idt.gates.items()):
            kind = next((f'"{name}"' for name, number in _GATE_TYPES.items() if number == gate.type), str(gate.type))
            extra = "" if gate.present else ", present = false"
            lines.append(
                f'gate.{vector} = {{ handler = "{gate.offset:#x}", selector = {gate.selector:#x}, '
                f'ist = {gate.ist}, dpl = {gate.dpl}, type = {kind}{extra} }}'
            )
    return "\n".join(lines).lstrip("\n") + "\n"


def _fred_line(fred: Fred) -> str:
    parts = [f"on = {'true' if fred.on else 'false'}"]
    parts += [f'rsp{n} = "{v:#x}"' for n, v in enumerate(fred.rsp) if v is not None]
    parts += [f'{key} = "{v:#x}"' for key, v in (("stklvls", fred.stklvls), ("config", fred.config)) if v is not None]
    return f"fred = {{ {', '.join(parts)} }}"
