"""Layout files: what is wrong in one is said in one line, and what a damaged LAYOUT section asks for is bounded."""

from __future__ import annotations

import struct
import time
from dataclasses import replace

import construct as c
import pytest

from tracedbg import wire
from tracedbg.errors import FormatError
from tracedbg.layout import REGION_STACK, CpuTables, Fred, Gate, Idt, Layout, Region, Tss, from_toml, load_toml, to_toml
from tracedbg.writer import build

TABLES = '[[tss]]\nbase = "0x5000"\nist2 = "0x9000"\n[[idt]]\nbase = "0x6000"\ngate.2 = {ist = 2}\n'


def refused(text: str) -> str:
    """The one line that a layout file is refused with."""
    with pytest.raises(FormatError) as caught:
        from_toml(text, "x.toml")
    said = str(caught.value)
    assert said.startswith("x.toml: ") and "\n" not in said and len(said) < 300
    return said


@pytest.mark.parametrize(
    "text",
    [
        "[[stack]]\nlo = 0\nhi = 16\ncpu = inf",
        "[[stack]]\nlo = 0\nhi = 16\ncpu = 70000",
        "[[stack]]\nlo = 0\nhi = 16\ncpu = -1",
        "[[stack]]\nlo = 0\nhi = 16\ncpu = true",
        "[[stack]]\nlo = 0\nhi = 16\nslot = inf",
        "[[stack]]\nlo = 0\nhi = 16\nslot = 9",
        "[[stack]]\nlo = 0\nhi = 16\nslot = 1.5",
        "[[stack]]\nlo = inf\nhi = 16",
        "[[idt]]\nbase = 0\ngate.2 = {selector = inf}",
        "[[idt]]\nbase = 0\ngate.2 = {selector = 70000}",
        "[[idt]]\nbase = 0\ngate.2 = {selector = -1}",
        "[[idt]]\nbase = 0\ngate.2 = {present = 7}",
        "[[idt]]\nbase = 0\ngate.2 = {type = []}",
        "[[idt]]\nbase = 0\ngate = 3",
        "user = " + "[" * 5000 + "]" * 5000,
        "user = [[0, " + "9" * 5000 + "]]",
        "user = [[0, 0x" + "f" * 5000 + "]]",
        'user = [["0x0", "0x' + "f" * 5000 + '"]]',
        "[names]\nist1 = 5",
        "[[cpu]]\n" * (wire.MAX_CPUS + 1),
        "[[stack]]\nlo = 0\nhi = 16\nassumed = 1",
        "[[cpu]]\nfred = 5",
        "[[cpu]]\nfred = {rsp0 = -1}",
        "[[cpu]]\nfred = {stklvls = inf}",
        "[[cpu]]\nfred = {config = [[]]}",
    ],
    ids=range(25),
)
def test_nonsense_is_one_line(text: str) -> None:
    refused(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[stack]]\nlo = 0\nhi = 16\nslto = 2", "stack: unknown key 'slto'"),
        ("[[cpu]]\ntss = 5", "cpu: unknown key 'tss'"),
        ("[[idt]]\nbase = 0\ngates = {}", "idt: unknown key 'gates'"),
        ("[[idt]]\nbase = 0\ngate.2 = {hander = 5}", "gate 2: unknown key 'hander'"),
        ("[[tss]]\nbase = 0\nist8 = 5", "tss: unknown key 'ist8'"),
        ('[names]\nist8 = "x"', "names: unknown key 'ist8'"),
        ('[names]\nnmi = "x"', "names: unknown key 'nmi'"),
        ("gates = 5", "unknown key 'gates'"),
        ('[[cpu]]\ntr = "0x5001"\n' + TABLES, "cpu 0: tr 0x5001 names no [[tss]] of this file"),
        ('[[cpu]]\n[[cpu]]\nidt = "0x5000"\n' + TABLES, "cpu 1: idt 0x5000 names no [[idt]] of this file"),
        ("[[idt]]\nbase = 0\ngate.2 = {}\ngate.0x2 = {}", "gate 2 is there twice"),
        ("[[cpu]]\n" * (wire.MAX_CPUS + 1), "x.toml: layout: absurd number of CPUs in the layout (4097, at most 4096)"),
        ("[[cpu]]\nfred = {rsp4 = 0}", "fred: unknown key 'rsp4'"),
        ("[[cpu]]\nfred = {on = 1}", "fred: on 1 is not true or false"),
        ('[[stack]]\nlo = 0\nhi = 16\nassumed = "yes"', "stack: assumed 'yes' is not true or false"),
        ("[[stack]]\nlo = 0", "stack: 'hi' is missing"),
        ("[[tss]]\nist1 = 0", "tss: 'base' is missing"),
    ],
)
def test_a_typo_is_named(text: str, said: str) -> None:
    assert said in refused(text)


def test_what_the_manual_shows_is_read() -> None:
    layout = from_toml('[names]\nist1 = "MC"\nrsp0 = "task"\n[[cpu]]\ntr = 0x5000\nidt = "0x6000"\n' + TABLES, "x.toml")
    assert layout.cpus == (CpuTables(0, 0),) and layout.names == {1: "MC", 8: "task"}
    assert from_toml(to_toml(layout), "x.toml").cpus == layout.cpus


def test_fred_and_assumed_bounds_are_read_and_written() -> None:
    text = """
[[cpu]]
fred = {rsp1 = "0x9000", rsp3 = 0, stklvls = "0x40", config = "0xffffffff81000080"}
[[cpu]]
[[cpu]]
fred = {on = false, rsp0 = 64}
[[stack]]
lo = 0
hi = 16
assumed = true
[[stack]]
lo = 16
hi = 32
"""
    layout = from_toml(text, "x.toml")
    assert [tables.fred for tables in layout.cpus] == [
        Fred(True, (None, 0x9000, None, 0), 0x40, 0xFFFFFFFF81000080), None, Fred(False, (64, None, None, None)),
    ]  # fmt: skip
    assert layout.regions == (Region(0, 16, assumed=True), Region(16, 32))
    assert from_toml(to_toml(layout), "x.toml") == layout


# -- the LAYOUT section ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declared", "packed"),
    [(wire.TSS, wire.TSS_PACK), (wire.CPU_LAYOUT, wire.CPU_PACK), (wire.REGION, wire.REGION_PACK), (wire.GATE, wire.GATE_PACK),
     (wire.FRED, wire.FRED_PACK), (wire.MEMORY_RANGE, wire.RANGE_PACK), (wire.EVENT, wire.EVENT_PACK)],
)  # fmt: skip
def test_bulk_formats_are_the_declarations(declared: c.Struct, packed: struct.Struct) -> None:
    assert packed.size == declared.sizeof()
    raw = bytes(range(1, declared.sizeof() + 1))
    flat: list[int] = []
    for part, value in ((part, declared.parse(raw)[part.name]) for part in declared.subcons):
        flat += list(value) if isinstance(part.subcon, c.Array) else [value]
    assert list(packed.unpack(raw)) == flat


FULL = Layout(
    tss=(Tss(1, (2, None, 0), (None, 3, 4, None, 5, 6, 7, (1 << 64) - 1)), Tss(0)),
    idts=(Idt(8, {0: Gate(9, 10, 7, 15, 3, False), 255: Gate((1 << 64) - 1)}), Idt(3, {})),
    cpus=(CpuTables(0, 1, Fred(True, (1, None, 3, (1 << 64) - 1), 64)), CpuTables(None, None), CpuTables(1, None)),
    regions=(Region(0, (1 << 64) - 1, 3, 0xFFFF, 8), Region(5, 6, assumed=True)),
)


def test_a_section_comes_back_and_is_as_declared() -> None:
    raw = FULL.to_bytes()
    assert Layout.from_bytes(raw, "x", 0) == FULL
    at = wire.LAYOUT_HEAD.sizeof()
    tss = wire.TSS.parse(raw[at:])
    assert (tss.base, list(tss.rsp), tss.ist[7], tss.known) == (1, [2, 0, 0], (1 << 64) - 1, 0b11110110_00000101)
    regions = raw[at + 2 * wire.TSS.sizeof() + 3 * wire.CPU_LAYOUT.sizeof() :]
    assert [wire.REGION.parse(regions[n * wire.REGION.sizeof() :]).assumed for n in (0, 1)] == [0, 1]
    freds = raw[-3 * wire.FRED.sizeof() :]  # one for each CPU, behind the IDTs
    fred = wire.FRED.parse(freds)
    assert (list(fred.rsp), fred.stklvls, fred.config) == ([1, 0, 3, (1 << 64) - 1], 64, 0)
    assert (fred.known, fred.on) == (0b01_1101, 1)
    assert not any(freds[wire.FRED.sizeof() :])
    idt = wire.IDT.parse(raw[-2 * wire.IDT.sizeof() - len(freds) :])
    assert idt.base == 8
    gate = idt.gate[0]
    assert (gate.offset, gate.selector, gate.ist, gate.type, gate.dpl, gate.flags) == (9, 10, 7, 15, 3, 1)
    assert idt.gate[1].flags == 0 and idt.gate[255].flags == 3


def section(tss: int = 0, idts: int = 0, cpus: int = 0, regions: int = 0) -> bytes:
    head = struct.pack("<6I", tss, idts, cpus, regions, 0, 0)
    region = wire.REGION_PACK.pack(0, 1, 0, 0, 0, 0)
    return head + bytes(104 * tss) + bytes(8 * cpus) + region * regions + bytes(4104 * idts)


@pytest.mark.parametrize(
    ("counts", "offset"),
    [({"tss": 4097}, 0), ({"idts": 4097}, 4), ({"cpus": 4097, "tss": 1, "idts": 1}, 8), ({"regions": 65537}, 12)],
)
def test_absurd_counts_are_refused_with_their_place(counts: dict[str, int], offset: int) -> None:
    with pytest.raises(FormatError, match="absurd number of") as caught:
        Layout.from_bytes(section(**counts), "x", 0x100)
    assert caught.value.offset == 0x100 + offset


@pytest.mark.parametrize("count", [1, 3, (1 << 32) - 1])
def test_fred_records_are_one_for_each_cpu_or_none(count: int) -> None:
    data = bytearray(section(cpus=2, tss=1, idts=1))
    data[20:24] = struct.pack("<I", count)
    with pytest.raises(FormatError, match=f"{count} FRED records for 2 CPUs") as caught:
        Layout.from_bytes(bytes(data), "x", 0x100)
    assert caught.value.offset == 0x114


def test_what_a_reader_refuses_is_not_written() -> None:
    with pytest.raises(FormatError, match="absurd number of TSSs"):
        build(lambda writer: setattr(writer, "layout", Layout(tss=(Tss(0),) * 4097)))
    assert "absurd number of IDTs" in refused("[[idt]]\nbase = 0\n" * 4097)


def test_more_cpus_than_the_trace_has_are_refused() -> None:
    with pytest.raises(FormatError, match="3 CPUs, the trace 2") as caught:
        Layout.from_bytes(FULL.to_bytes(), "x", 0x100, 2)
    assert caught.value.offset == 0x108


def test_a_large_section_is_read_and_written_in_seconds() -> None:
    begin = time.monotonic()
    data = section(tss=4096, idts=1500, cpus=4096, regions=65536)
    layout = Layout.from_bytes(data, "x", 0)
    assert len(layout.cpus) == 4096 and len(layout.regions) == 65536
    assert layout.to_bytes() == data
    assert time.monotonic() - begin < 10


def test_stacks_of_many_cpus_are_found_in_seconds() -> None:
    tops = [range(0x10000 * n, 0x10000 * n + 0x8000, 0x1000) for n in range(4096)]
    tss = tuple(Tss(at[0], (at[0] + 0x9000, None, None), (None, *at[1:])) for at in tops)
    regions = tuple(Region(0x10000 * n, 0x10000 * n + 0x800) for n in range(20000))
    layout = Layout(tss, (), tuple(CpuTables(n) for n in range(4096)), regions)
    begin = time.monotonic()
    stacks = layout.with_stacks().regions[len(regions) :]
    assert time.monotonic() - begin < 10
    assert len(stacks) == 8 * 4096
    assert Region(0x10800, 0x11000, REGION_STACK, 1, 1, assumed=True) in stacks[:20]


def test_a_top_inside_of_overlapping_stacks_gets_none() -> None:
    base = Layout((Tss(0, (0x5000, None, None)),), (), (CpuTables(0),))
    for regions, added in (
        ((Region(0x1000, 0x9000), Region(0x2000, 0x3000)), False),
        ((Region(0x4000, 0x5000),), False),
        ((Region(0x5000, 0x6000), Region(0x1000, 0x3000)), True),
    ):
        found = replace(base, regions=regions).with_stacks().regions
        assert (len(found) > len(regions)) is added
    assert found[-1] == Region(0x3000, 0x5000, REGION_STACK, 0, 8, assumed=True)


def test_a_layout_file_without_end_is_refused() -> None:
    with pytest.raises(FormatError, match=r"^/dev/zero: a layout file has at most 64 MiB$"):
        load_toml("/dev/zero")
    with pytest.raises(FormatError, match=r"^/none\.toml: no such file or directory$"):
        load_toml("/none.toml")
