"""The text form of traces: every byte of a trace survives it, canonical text stays as it is, damage is named by its line."""

from __future__ import annotations

import gzip
import io
import random
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from samples import LAYOUT, fill_race, write_race

from tracedbg import wire
from tracedbg.errors import FormatError, UsageError
from tracedbg.formats import open_input
from tracedbg.formats.case import blocks as case_blocks
from tracedbg.formats.case import fields as case_fields
from tracedbg.formats.case import read as case
from tracedbg.formats.case import text as case_text
from tracedbg.formats.case import write as case_write
from tracedbg.formats.case.events import first_words
from tracedbg.formats.case.text import CaseText, LineError, from_meta
from tracedbg.layout import (
    REGION_READS,
    REGION_STORES,
    REGION_USER,
    CpuTables,
    Fidelity,
    Fred,
    Gate,
    Idt,
    Layout,
    Region,
    Tss,
)
from tracedbg.state import EventFlag, Kind, Known
from tracedbg.trace import MemoryRange, Trace
from tracedbg.writer import TraceWriter, build

U64 = (1 << 64) - 1
Fill = Callable[[TraceWriter], None]


def native(trace: Trace) -> bytes:
    """The bytes that `convert` writes for a trace."""
    buffer = io.BytesIO()
    writer = TraceWriter(buffer, cpus=trace.cpus, clock_hz=trace.clock_hz)
    writer.layout, writer.memory, writer.symbols = trace.layout, list(trace.memory), trace.symbols
    writer.meta = {key: value for key, value in trace.meta.items() if key != "stack_names"}
    writer.payload(bytes(trace.payload))
    writer.append(trace.events)
    writer.close()
    return buffer.getvalue()


def text_of(trace: Trace) -> str:
    out = io.StringIO()
    case_write.write_text(trace, out)
    return out.getvalue()


def trace_of(text: str) -> Trace:
    return build(lambda writer: void(case.parse(text.encode(), writer)))


def void(_: object) -> None:
    """What a filler gives back."""


def check_round_trip(trace: Trace) -> str:
    """Byte for byte, and text that stays; returns the text."""
    first = native(Trace.from_bytes(native(trace)))  # some values have several forms in memory, one in a file
    text = text_of(Trace.from_bytes(first))
    back = trace_of(text)
    assert native(back) == first
    assert text_of(back) == text
    return text


def made(fill: Fill, cpus: int = 1) -> Trace:
    return build(fill, cpus=cpus)


def case_of(events: str, *, cpus: int = 1, expect: str = "", more: str = "") -> str:
    return f"{case_text.FIRST_LINE}\n\n[trace]\ncpus = {cpus}\n{more}\n[events]\n{events}\n[expect]\n{expect}\n"


# -- byte for byte ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("cpus", [1, 3])
def test_any_record_survives(seed: int, cpus: int) -> None:
    """Records of random bytes, and of a few bits: kinds, known bits, flags and sources that do not exist too."""
    rng = random.Random(seed)

    def sparse() -> bytes:
        numbers = [rng.choice((0, 0, 1, 2, rng.getrandbits(8), (1 << 8 * size) - 1)) for size in SIZES]
        numbers[11] = rng.getrandbits(13)
        numbers[12] = rng.randrange(34)
        numbers[13] = rng.randrange(20)
        return wire.EVENT_PACK.pack(*(n & (1 << 8 * size) - 1 for n, size in zip(numbers, SIZES, strict=True)))

    def fill(writer: TraceWriter) -> None:
        for _ in range(40):
            writer.append(rng.randbytes(64))
        for _ in range(200):
            writer.append(sparse())
        writer.payload(rng.randbytes(300))

    check_round_trip(made(fill, cpus))


SIZES = (8, 8, 8, 8, 8, 4, 4, 4, 2, 2, 2, 2, 1, 1, 1, 1)


@pytest.mark.parametrize("kind", range(34))
def test_each_field_of_each_kind_is_known_or_not(kind: int) -> None:
    """Each field alone: known with a value, known and 0, not known though it holds one."""

    def fill(writer: TraceWriter) -> None:
        for field, (bit, _) in case_fields.FIELDS.items():
            for value in (0, 1, 2, 9):
                for known in (0, bit, case_fields.ALL_KNOWN ^ bit):
                    writer.event(kind, known=known, **{field: value})  # type: ignore[arg-type]
        for flags in range(256):
            writer.event(kind, flags=flags)  # type: ignore[arg-type]

    check_round_trip(made(fill))


LAYOUTS = {
    "none": Layout(),
    "sample": LAYOUT,
    "no names": replace(LAYOUT, names={}),
    "fidelity": replace(LAYOUT, fidelity=Fidelity.RETURNS | Fidelity.SS_ZEROED),
    "inferred": replace(LAYOUT, fidelity=Fidelity.INFERRED),
    "without its stacks": replace(LAYOUT, regions=()),
    "bounds that are known": replace(LAYOUT, regions=tuple(replace(r, assumed=False) for r in LAYOUT.regions)),
    "odd name": replace(LAYOUT, names={2: 'N"\\MI\n[events]\x1b', 8: "ä日🙂"}),
    "name that no TOML holds": replace(LAYOUT, names={2: "\ud800"}),
    "recorded ranges": replace(
        LAYOUT, regions=(*LAYOUT.regions, Region(0x1000, 0x2000, REGION_STORES), Region(0x1000, U64, REGION_READS))
    ),
    "ranges in another order": replace(
        LAYOUT,
        regions=(
            Region(0x1000, 0x2000, REGION_STORES),
            *LAYOUT.regions,
            Region(0, 0x1000, REGION_USER),
            Region(5, 6, REGION_READS),
            Region(7, 9, REGION_STORES),
        ),
    ),
    "store range of a CPU": replace(LAYOUT, regions=(Region(1, 2, REGION_STORES, 3, 4),)),
    "gate types": replace(LAYOUT, idts=(Idt(0x6000, {n: Gate(n, 8, n & 7, n & 15, n & 3, bool(n & 1)) for n in range(256)}),)),
    "empty gates": replace(LAYOUT, idts=(Idt(0x6000, {n: Gate(0, 0, 0, 0, 0, False) for n in range(256)}),)),
    "tables of one base": Layout(
        (Tss(1, (1, 2, None)), Tss(1)), (Idt(2, {}), Idt(2, {3: Gate(4)})), (CpuTables(0, 1), CpuTables(1, 0), CpuTables())
    ),
    "fred": Layout(
        cpus=(CpuTables(fred=Fred(True, (1, None, 3, U64), 4, 5)), CpuTables(), CpuTables(fred=Fred(False, config=0)))
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_survive(name: str) -> None:
    def fill(writer: TraceWriter) -> None:
        writer.layout = LAYOUTS[name]
        writer.meta = {"source": {"format": "hand"}}
        writer.event(Kind.EOI, cpu=0)

    text = check_round_trip(made(fill))
    raw = {"tables of one base", "store range of a CPU"}
    assert ("[layout-hex]" in text) == (name in raw)
    assert text.isascii() or name == "odd name"


def test_a_layout_is_written_short() -> None:
    """Stacks of the usual size are those that the reader adds."""
    text = text_of(made(fill_race))
    assert "[[stack]]" not in text and 'ist2 = "NMI"' in text and "[meta]" in text and "stack_names" not in text


MEMORY = {
    "one": [MemoryRange(0x1000, b"abc")],
    "side by side": [MemoryRange(0x1000, b"a" * 16), MemoryRange(0x1010, b"b"), MemoryRange(0x1011, b"")],
    "empty ones": [MemoryRange(0, b""), MemoryRange(0, b""), MemoryRange(U64, b""), MemoryRange(U64, b"x")],
    "runs": [MemoryRange(0x10, bytes(5000)), MemoryRange(0x2008, b"\xff" * 31 + bytes(33) + b"\xee" * 32)],
    "over each other": [MemoryRange(0x1000, bytes(64)), MemoryRange(0x1000, b"1" * 64)],
}


@pytest.mark.parametrize("name", MEMORY)
def test_memory_survives(name: str) -> None:
    def fill(writer: TraceWriter) -> None:
        writer.memory = MEMORY[name]

    check_round_trip(made(fill))


def bytes_event(writer: TraceWriter, data: bytes, **more: int) -> None:
    at = writer.payload(data)
    writer.event(Kind.WRITE, cpu=0, addr=0x1000, value=at, code=len(data), flags=EventFlag.BYTES, **more)


def test_payload_in_order_stands_with_its_events() -> None:
    def fill(writer: TraceWriter) -> None:
        bytes_event(writer, b"\0\x11\x22")
        writer.event(Kind.EOI, cpu=0)
        bytes_event(writer, bytes(4096), arg=3)

    text = check_round_trip(made(fill))
    assert "write bytes 001122 addr 0x1000\n" in text
    assert "[bytes]" not in text


@pytest.mark.parametrize("what", ["unused", "twice", "backwards", "too long", "past the end", "none", "by another kind"])
def test_any_other_payload_has_a_section(what: str) -> None:
    def fill(writer: TraceWriter) -> None:
        bytes_event(writer, b"abc")
        if what == "unused":
            writer.payload(b"x")
        elif what == "too long":
            bytes_event(writer, bytes(4097))
        elif what == "by another kind":
            writer.event(Kind.MARK, cpu=0, value=writer.payload(b"note"), code=4, flags=EventFlag.BYTES)
        else:
            at = {"twice": 0, "backwards": 2, "past the end": 3, "none": 3}[what]
            writer.payload(b"d")
            writer.event(Kind.READ, cpu=0, value=at, code=0 if what == "none" else 2, flags=EventFlag.BYTES)

    assert "[bytes]" in check_round_trip(made(fill))


@pytest.mark.parametrize(
    ("symbols", "section"),
    [
        (b"0000000000001000 t a\n0000000000002000 T b\n", "[symbols]"),
        (b"0000000000001000 t a", "[symbols-hex]"),
        (b"\n1000 a\n", "[symbols-hex]"),
        (b"[events]\n", "[symbols-hex]"),
        (b"\x1b[31m\n", "[symbols-hex]"),
        (b"\xff\xfe\n", "[symbols-hex]"),
        (b"a \n", "[symbols-hex]"),
        (b"\n", "[symbols-hex]"),
        (b"a\r\n", "[symbols-hex]"),
    ],
)
def test_symbols_survive(symbols: bytes, section: str) -> None:
    def fill(writer: TraceWriter) -> None:
        writer.symbols = symbols

    assert f"\n{section}\n" in check_round_trip(made(fill))


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


METAS: dict[str, Any] = {
    "plain": {"source": {"format": "x"}, "n": [1, 2.5, None, True], "ä": "\x1b[0m\n[events]"},
    "nested": {"a": deep(300)},
    "numbers": {"big": 10**300, "inf": float("inf")},
    "names that are none": {"stack_names": 5},
    "case of another make": {"case": 5},
    "empty case": {"case": {}},
    "case with an unknown key": {"case": {"color": "red"}},
    "case with a hostile title": {"case": {"header": [["title", "\x1b[2J"]]}},
    "case with a line break": {"case": {"prose": ["a\n[events]\nshutdown"]}},
    "case with a section": {"case": {"prose": ["[events]"]}},
    "case with a bad key": {"case": {"header": [["titel", "x"]]}},
    "case with blank ends": {"case": {"expect": ["", "verdict clean"]}},
    "case with a label of no event": {"case": {"labels": {"a": 2}}},
    "case with a label twice": {"case": {"labels": {"a": 0, "b": 0}}},
    "case with a truth": {"case": {"labels": {"a": True}}},
    "case with a word as label": {"case": {"labels": {"none": 0}}},
    "case with a note of no event": {"case": {"notes": {"2": "x"}}},
    "case with an empty note": {"case": {"notes": {"0": ""}}},
    "case with a number that is none": {"case": {"notes": {"00": "x"}}},
    "case with an empty comment": {"case": {"comments": {"0": []}}},
    "case with two blank lines": {"case": {"comments": {"1": ["", "", "x"]}}},
    "case with a text for a list": {"case": {"prose": "ab"}},
    "case with lists for texts": {"case": {"prose": [["a"]]}},
    "case with a surrogate": {"case": {"prose": ["\ud800"]}},
}


@pytest.mark.parametrize("name", METAS)
def test_meta_survives(name: str) -> None:
    def fill(writer: TraceWriter) -> None:
        writer.meta = METAS[name]
        writer.event(Kind.EOI, cpu=0)
        writer.event(Kind.EOI, cpu=0)

    trace = made(fill)
    text = check_round_trip(trace)
    assert text.isascii() and text.count("\n[events]\n") == 1  # what is not canonical stays in JSON
    assert trace_of(text).meta == {key: value for key, value in trace.meta.items() if key != "stack_names"}


def test_clock_cpus_and_numbers_of_the_source_survive() -> None:
    buffer = io.BytesIO()
    writer = TraceWriter(buffer, cpus=4096, clock_hz=U64)
    writer.event(Kind.DELIVER, cpu=4095, time=U64, source_index=0xFFFFFFFF)
    writer.close()
    text = check_round_trip(Trace.from_bytes(buffer.getvalue()))
    assert f"deliver cpu 4095 index 4294967295 time {U64}\n" in text


@pytest.mark.parametrize("path", sorted((Path(__file__).parent.parent / "traces").glob("*.tdbg")), ids=lambda p: p.stem)
def test_sample_traces_survive(path: Path) -> None:
    with Trace.open(path) as trace:
        text = text_of(trace)
    assert native(trace_of(text)) == path.read_bytes()
    assert "-hex]" not in text


@pytest.mark.parametrize("path", sorted((Path(__file__).parent / "cases").glob("*.case")), ids=lambda p: p.stem)
def test_the_corpus_survives(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    again = check_round_trip(trace_of(text))
    head, found = case_text.sections(text)
    other, back = case_text.sections(again)
    assert case_text.block(other.lines) == case_text.block(head.lines)
    assert case_text.block(back["expect"].lines) == case_text.block(found["expect"].lines)


# -- what a line means --------------------------------------------------------------------------------------------------

LINES: list[tuple[str, Kind, dict[str, int]]] = [
    (
        "deliver NMI source nmi rip 0x1000 cs 8 rflags 0x202 rsp 0x2000 ss 16",
        Kind.DELIVER,
        {"arg": 2, "source": 2, "rip": 0x1000, "cs": 8, "rflags": 0x202, "rsp": 0x2000, "ss": 0x10},
    ),
    ("deliver #NMI source 7", Kind.DELIVER, {"arg": 2, "source": 7}),
    ("deliver PF error 0x7 cr2 0x55", Kind.DELIVER, {"arg": 14, "code": 7, "value": 0x55}),
    ("deliver #BP source soft-int length 1", Kind.DELIVER, {"arg": 3, "source": 4, "code": 1}),
    ("deliver 0x20 data 5", Kind.DELIVER, {"arg": 32, "value": 5}),
    ("deliver #DF failed words 2", Kind.DELIVER, {"arg": 8, "addr": 2, "flags": 1}),
    ("deliver ext smm legacy partial faulted", Kind.DELIVER, {"flags": 8 | 16 | 64 | 4 | 2}),
    ("deliver ?2 source ?3 rip ?", Kind.DELIVER, {"arg": 2, "source": 3, "known": 256}),
    ("enter rip 1 rsp 2", Kind.ENTER, {"rip": 1, "rsp": 2}),
    (
        "return iret rip 1 rsp 2 -> rip 3 cs 4 rflags 5 rsp 6 ss 7",
        Kind.RETURN,
        {"arg": 0, "rip": 1, "rsp": 2, "addr": 3, "cs": 4, "rflags": 5, "value": 6, "ss": 7},
    ),
    ("return erets rsp 2 -> ss 0x10 ss-high 4", Kind.RETURN, {"arg": 2, "rsp": 2, "ss": 0x10, "code": 4}),
    ("return rsp 1", Kind.RETURN, {"rsp": 1}),
    ("write addr 0x1000 len 8 value 0x12 rsp 0x1000", Kind.WRITE, {"addr": 0x1000, "arg": 8, "value": 0x12, "rsp": 0x1000}),
    ("read addr 1 len 2", Kind.READ, {"addr": 1, "arg": 2}),
    ("move from 1 to 2", Kind.MOVE, {"addr": 1, "value": 2}),
    ("setsp from 1 to 2", Kind.SETSP, {"addr": 1, "value": 2}),
    ("tss ist2 = 0x208000", Kind.TSS, {"arg": 10, "value": 0x208000}),  # IST1 is slot 9
    ("tss rsp0 = 1", Kind.TSS, {"arg": 0, "value": 1}),
    ("gate #PF handler 1 selector 8 ist 2", Kind.GATE, {"arg": 14, "value": 1, "cs": 8, "code": 0x8E02}),
    ("gate 0x80 type trap dpl 3 absent", Kind.GATE, {"arg": 128, "code": 0x6F00}),
    ("gate 3 type 5", Kind.GATE, {"arg": 3, "code": 0x8500}),
    ("gate 3 code 0x12348e00", Kind.GATE, {"arg": 3, "code": 0x12348E00}),
    ("ltr = 5", Kind.LTR, {"value": 5}),
    ("lidt = 5", Kind.LIDT, {"value": 5}),
    ("syscall rip 1 rsp 2 -> rip 3", Kind.SYSCALL, {"rip": 1, "rsp": 2, "addr": 3}),
    ("sysret faulted rip 1", Kind.SYSRET, {"rip": 1, "flags": 2}),
    ("sysenter -> rip 3", Kind.SYSENTER, {"addr": 3}),
    ("raise #MC source fixed", Kind.RAISE, {"arg": 18, "source": 5}),
    ("unblock stgi", Kind.UNBLOCK, {"arg": 1}),
    ("smi", Kind.SMI, {}),
    ("rsm", Kind.RSM, {}),
    ("msr 0x17a = 4", Kind.MSR, {"code": 0x17A, "value": 4}),
    ("cr 4 = 0x40", Kind.CR, {"arg": 4, "value": 0x40}),
    ("gs swapgs", Kind.GS, {"arg": 0}),
    ("gs base = 9", Kind.GS, {"arg": 1, "value": 9}),
    ("flags rflags 2", Kind.FLAGS, {"rflags": 2}),
    ("shadow mov-ss rip 1", Kind.SHADOW, {"arg": 1, "rip": 1}),
    ("eoi", Kind.EOI, {}),
    ("token ist1 at 8 held 1 = 9", Kind.TOKEN, {"arg": 1, "addr": 8, "code": 1, "value": 9}),
    ("token other = 0", Kind.TOKEN, {"arg": 0, "value": 0}),
    ("vmexit svm source nmi reason 0x61", Kind.VMEXIT, {"arg": 1, "source": 2, "code": 0x61}),
    ("vmentry vnmi", Kind.VMENTRY, {"arg": 1}),
    ("mode long", Kind.MODE, {"arg": 2}),
    ("init init", Kind.INIT, {"arg": 1}),
    ("shutdown mce-off", Kind.SHUTDOWN, {"arg": 2}),
    ("gap lost 5 cpu ?", Kind.GAP, {"value": 5, "known": int(Known.VALUE)}),
    ("mark", Kind.MARK, {}),
    ("eoi known 0x8000", Kind.EOI, {"known": 0x8000 | 256}),
    ("eoi flags 0x80", Kind.EOI, {"flags": 0x80}),
    ("eoi time 5 index 6", Kind.EOI, {"time": 5, "source_index": 6}),
]


@pytest.mark.parametrize(("line", "kind", "fields"), LINES, ids=[line[0] for line in LINES])
def test_a_line_makes_this_record(line: str, kind: Kind, fields: dict[str, int]) -> None:
    buffer = io.BytesIO()
    writer = TraceWriter(buffer)
    writer.event(kind, **(fields if "known" in fields else {"cpu": 0, **fields}))
    writer.close()
    assert bytes(trace_of(case_of(line)).events) == bytes(Trace.from_bytes(buffer.getvalue()).events)


def test_a_kind_without_a_name() -> None:
    events = trace_of(case_of("kind 200 arg 3")).events
    assert (events[60], events[61]) == (200, 3)


def test_every_kind_has_its_line() -> None:
    assert {kind for _, kind, _ in LINES} == {kind for kind in Kind if kind}


def test_no_word_has_two_meanings() -> None:
    """The value without a name stands before the fields: none of its words is one of theirs."""
    for kind, shape in case_fields.SHAPES.items():
        names = {*case_fields.FIELDS, *case_fields.FLAGS, *shape.aliases.values(), "index", "flags", "known", "bytes", "->"}
        names |= {*case_fields.DELIVER_WORDS} if kind == Kind.DELIVER else set()
        names |= {*case_fields.GATE_WORDS} if kind == Kind.GATE else set()
        assert not names & set(first_words(kind)), kind


def test_memory_rows() -> None:
    rows = "# stack\n0x1000: 00 11ff # three\n0x1003: aa x 3\n0x2000: words 0x1000 8\n-\n8208: 01\n0x5:\n"
    assert trace_of(case_of("eoi", more=f"[memory]\n{rows}")).memory == (
        MemoryRange(0x1000, b"\x00\x11\xff\xaa\xaa\xaa"),
        MemoryRange(0x2000, (0x1000).to_bytes(8, "little") + (8).to_bytes(8, "little")),
        MemoryRange(0x2010, b"\x01"),
        MemoryRange(5, b""),
    )


def test_cpus_come_from_the_layout() -> None:
    head = f"{case_text.FIRST_LINE}\n\n[layout]\n[[cpu]]\n[[cpu]]\n[events]\n"
    assert trace_of(f"{head}eoi cpu 1").cpus == 2
    assert trace_of(case_of("", cpus=3)).cpus == 3
    with pytest.raises(LineError, match="line 7: which CPU"):
        trace_of(f"{head}eoi")


# -- what people write around the events -----------------------------------------------------------------------------------

STORY = """\
tracedbg case 1
title:   Two NMIs
near-miss: fake-nmi   nmi-lost
source: one
source: two
rules: R2 R36

First line,\twith a tab.
  An indented one: with "quotes", ä and 日本.

title: not a header any more


[events]

# The idle loop.
#second

\t# third
nmi1: deliver NMI
eoi #
eoi # behind # it

# the end

[expect]

verdict  clean # yes

"""


def test_what_is_written_around_the_events_survives() -> None:
    trace = trace_of(STORY)
    said = from_meta(trace.meta["case"], trace.count)
    assert said is not None
    assert said.header == [
        ("title", "Two NMIs"), ("near-miss", "fake-nmi   nmi-lost"), ("source", "one"), ("source", "two"), ("rules", "R2 R36"),
    ]  # fmt: skip
    assert said.values("near-miss") == ["fake-nmi", "nmi-lost"]
    assert said.prose == [
        "First line,     with a tab.", '  An indented one: with "quotes", ä and 日本.', "", "title: not a header any more",
    ]  # fmt: skip
    assert said.labels == {"nmi1": 0}
    assert said.notes == {2: "behind # it"}
    assert said.comments == {0: ["The idle loop.", "second", "", "third"], 3: ["", "the end"]}
    assert said.expect == ["verdict  clean # yes"]
    again = check_round_trip(trace)
    assert "\n# second\n\n# third\nnmi1: deliver NMI\neoi\neoi # behind # it\n\n# the end\n\n[expect]\nverdict  clean" in again


def test_line_ends_of_other_systems() -> None:
    text = case_of("a: eoi", expect="verdict clean")
    assert native(trace_of(text.replace("\n", "\r\n"))) == native(trace_of("\ufeff" + text)) == native(trace_of(text))


def test_an_empty_story_leaves_no_trace() -> None:
    assert trace_of(case_of("eoi")).meta == {}
    assert from_meta({}, 1) is None and from_meta(CaseText().to_meta(), 1) is None


# -- mistakes -----------------------------------------------------------------------------------------------------------

EVENT_MISTAKES = [
    ("delivr NMI", "no event kind 'delivr'"),
    ("deliver #XX", "'#XX' is no field of this event (a comment needs a blank behind #)"),
    ("eoi #comment", "a comment needs a blank behind #"),
    ("deliver NMI rip", "rip: nothing behind it"),
    ("deliver NMI rip 0x", "rip: '0x' is not a number of 64 bits"),
    ("deliver NMI rip 0x10000000000000000", "is not a number of 64 bits"),
    ("deliver NMI rip -1", "is not a number"),
    ("deliver NMI rip 1_0", "is not a number"),
    ("deliver NMI rip ٣", "is not a number"),
    ("deliver NMI rip 1 rip 2", "rip is there twice"),
    ("deliver NMI rip 1 rip ?", "rip is there twice"),
    ("deliver NMI error 1 length 2", "code is there twice"),
    ("deliver 256", "arg: '256' is not a number of 8 bits"),
    ("deliver NMI cs 0x10000", "cs: '0x10000' is not a number of 16 bits"),
    ("deliver NMI source pigeon", "source: 'pigeon' is not a number of 8 bits"),
    ("deliver NMI -> rip 5", "'->' is no field"),
    ("return -> rip 1 rip 2", "addr is there twice"),
    ("return -> rsp 1 -> rsp 2", "value is there twice"),
    ("eoi known 0x1", "known: only bits without a field"),
    ("eoi flags 256", "flags: '256' is not a number of 8 bits"),
    ("kind", "kind: nothing behind it"),
    ("kind 256", "kind: '256' is not a number of 8 bits"),
    ("eoi ist 1", "'ist' is no field of this event"),
    ("eoi bytes 00", "'bytes' is no field of this event"),
    ("write bytes 0", "bytes: '0' is not pairs of hex digits"),
    ("write bytes 00 value 1", "value is there twice"),
    ("write bytes " + "00" * 4097, "bytes: 4097 of them, at most 4096"),
    ("gate NMI ist 8", "ist: '8' is not a number of 3 bits"),
    ("gate NMI type call", "type: 'call' is not a number of 4 bits"),
    ("gate NMI absent absent", "absent is there twice"),
    ("gate NMI ist 1 code 5", "code is there twice"),
    ("Nmi: eoi", "'Nmi' is no label"),
    ("none: eoi", "'none' is no label"),
    (": eoi", "'' is no label"),
    ("a: # nothing", "a label without an event"),
    ("a: eoi\na: eoi", "label 'a' is there twice"),
    ("= 5", "no event kind '='"),
]


@pytest.mark.parametrize(("line", "said"), EVENT_MISTAKES, ids=[line[:40] for line, _ in EVENT_MISTAKES])
def test_mistakes_in_an_event_name_the_line(line: str, said: str) -> None:
    with pytest.raises(LineError) as error:
        trace_of(case_of(f"eoi\n{line}\neoi"))
    assert str(error.value).startswith(f"line {8 + line.count(chr(10))}: ") and said in str(error.value)
    assert len(str(error.value)) < 200


HEAD = f"{case_text.FIRST_LINE}\n"
MISTAKES = [
    ("", 1, "a case file begins with"),
    ("tracedbg case 2\n[events]\n", 1, "a case file begins with"),
    ("tracedbg case 1 \x00\xff\n", 1, "control or formatting character"),
    ("tracedbg case 1 x\n[events]\n", 1, "a case file begins with"),
    (HEAD, 1, "no [events]"),
    (f"{HEAD}\n[evnets]\n", 3, "no section [evnets]"),
    (f"{HEAD}\nprose\n[1]\n[note]\n[events]\n", 5, "no section [note]"),
    (f"{HEAD}[events]\n[events]\n", 3, "section [events] is there twice"),
    (f"{HEAD}titel: x\n\n[events]\n", 2, "'titel: x' is no header line"),
    (f"{HEAD}title x\n\n[events]\n", 2, "is no header line"),
    (f"{HEAD}title:\n\n[events]\n", 2, "title: nothing behind it"),
    (f"{HEAD}title: a\ntitle: b\n\n[events]\n", 3, "a second title"),
    (f"{HEAD}rules: R2 R100\n\n[events]\n", 2, "rules: 'R100' is no rule"),
    (f"{HEAD}near-miss: fake-mni\n\n[events]\n", 2, "near-miss: 'fake-mni' is no finding"),
    (f"{HEAD}\nbell \x07\n[events]\n", 3, "control or formatting character"),
    (f"{HEAD}\nright to left \u202e\n[events]\n", 3, "control or formatting character"),
    (f"{HEAD}[trace]\ncpu = 1\n[events]\n", 2, "[trace]: unknown key 'cpu'"),
    (f"{HEAD}[trace]\ncpus = 0\n[events]\n", 2, "cpus is 0"),
    (f"{HEAD}[trace]\ncpus = 4097\n[events]\n", 2, "cpus is not a number up to 4096"),
    (f"{HEAD}[trace]\ncpus = true\n[events]\n", 2, "cpus is not a number"),
    (f"{HEAD}[trace]\n\ncpus =\n[events]\n", 4, "[trace]: not TOML: Invalid value"),
    (f"{HEAD}[trace]\nfidelity = ['return']\n[events]\n", 2, "fidelity: no 'return'"),
    (f"{HEAD}[trace]\nfidelity = 'returns'\n[events]\n", 2, "fidelity is not a list of words"),
    (f"{HEAD}[trace]\nstores = [['0x2', '0x1']]\n[events]\n", 2, "a range ends before it begins"),
    (f"{HEAD}[trace]\nstores = [1]\n[events]\n", 2, "stores is not a list of ranges"),
    (f"{HEAD}[trace]\nreads = [[0, 0x{'f' * 9000}]]\n[events]\n", 2, "is not a number of 64 bits"),
    (f"{HEAD}[trace]\nstacks = 'mine'\n[events]\n", 2, "stacks is one of added, listed"),
    (f"{HEAD}[trace]\nregions = ['stack 2']\n[events]\n", 2, "regions: more than there are"),
    (f"{HEAD}[trace]\nstores = [[0, 1], [1, 2]]\nregions = ['stores']\n[events]\n", 2, "regions: 1 of 2"),
    (f"{HEAD}[trace]\nregions = ['hole 1']\n[events]\n", 2, "regions: no 'hole'"),
    (f"{HEAD}[layout]\n[[cpu]]\n\ntr = \n[events]\n", 5, "[layout]: not TOML: Invalid value"),
    (f"{HEAD}[layout]\ncolor = 1\n[events]\n", 2, "[layout]: layout: unknown key 'color'"),
    (f"{HEAD}[layout]\n[evnets]\neoi\n", 4, "[layout]: not TOML"),
    (f"{HEAD}[trace]\ncpus = 1\n[layout]\n[[cpu]]\n[[cpu]]\n[events]\n", 4, "the layout has 2 CPUs, [trace] 1"),
    (f"{HEAD}[layout]\n[layout-hex]\n[events]\n", 3, "[layout-hex] besides [layout]"),
    (f"{HEAD}[layout-hex]\n0x0: 00\n[events]\n", 2, "[layout-hex]: layout section is cut short"),
    (f"{HEAD}[trace]\nstacks = 'added'\n[layout-hex]\n0x0: 00 x 24\n[events]\n", 2, "stacks is part of [layout-hex]"),
    (f"{HEAD}[memory]\n0x1000 00\n[events]\n", 3, "'0x1000 00' is not a row"),
    (f"{HEAD}[memory]\n0x1000: 0\n[events]\n", 3, "'0' is not pairs of hex digits"),
    (f"{HEAD}[memory]\n0x1000: words 0x10000000000000000\n[events]\n", 3, "is not a number of 64 bits"),
    (f"{HEAD}[memory]\n0xffffffffffffffff: 0011\n[events]\n", 3, "the row goes past the end of memory"),
    (f"{HEAD}[memory]\n0x0: 00 x 99999999\n[events]\n", 3, "more than 64 MiB of bytes"),
    (f"{HEAD}[bytes]\n0x1: 00\n[events]\n", 2, "the rows of this section go on from 0x0 without a gap"),
    (f"{HEAD}[bytes]\n0x0: 00\n0x2: 00\n[events]\n", 2, "the rows of this section go on from 0x0 without a gap"),
    (f"{HEAD}[meta]\n{{\n\"a\": }}\n[events]\n", 4, "[meta] is not JSON: Expecting value"),
    (f"{HEAD}[meta]\n[1]\n[events]\n", 2, "[meta] is not a JSON object"),
    (f"{HEAD}[meta]\n{'[' * 5000}\n[events]\n", 2, "[meta] is nested too deeply"),
    (f"{HEAD}[meta]\n{'9' * 5000}\n[events]\n", 2, "[meta] is not JSON"),
    (f"{HEAD}title: x\n\n[meta]\n{{\"case\": 1}}\n[events]\n", 4, "[meta] has a 'case', and so has the text"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line", "said"), MISTAKES, ids=[f"{n} {mistake[2]}" for n, mistake in enumerate(MISTAKES)])
def test_mistakes_name_the_line(text: str, line: int, said: str) -> None:
    with pytest.raises(LineError) as error:
        trace_of(text)
    assert str(error.value).startswith(f"line {line}: ") and said in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 250


def test_the_error_has_path_and_line(tmp_path: Path) -> None:
    path = tmp_path / "x.case"
    path.write_text(case_of("eoi\neio"))
    with pytest.raises(FormatError) as error:
        open_input(str(path))
    assert str(error.value) == f"{path}: line 8: no event kind 'eio'"
    path.write_bytes(case_of("eoi").encode().replace(b"eoi", b"e\xff"))
    with pytest.raises(FormatError, match="line 7: not UTF-8 text"):
        open_input(str(path))


def full_text() -> str:
    """A file with all sections."""

    def fill(writer: TraceWriter) -> None:
        fill_race(writer)
        writer.layout = replace(writer.layout, idts=(Idt(0x6000, {2: Gate(5, 8, 2)}),))
        writer.memory = [MemoryRange(0x1000, b"abc")]
        writer.payload(b"abcd")

    text = text_of(made(fill))
    text = text.replace(case_text.FIRST_LINE, f"{case_text.FIRST_LINE}\ntitle: x\nrules: R1\n\nprose", 1)
    return text.replace("\n[bytes]", "\n# end\n\n[expect]\nverdict error\n\n[bytes]", 1)


def damaged(data: bytes) -> None:
    """Reading it gives a trace or says what is wrong; a trace can be written and read again."""
    try:
        trace = build(lambda writer: void(case.parse(data, writer)))
    except (LineError, FormatError) as error:
        assert "\n" not in str(error)
        return
    check_round_trip(trace)


def test_a_file_cut_anywhere() -> None:
    data = full_text().encode()
    assert {f"[{name}]" for name in case_text.SECTIONS if not name.endswith("-hex")} <= set(full_text().split("\n"))
    for end in range(len(data)):
        damaged(data[:end])


@pytest.mark.parametrize("seed", range(8))
def test_damaged_files(seed: int) -> None:
    rng = random.Random(seed)
    whole = full_text().encode()
    words = whole.split()
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 3, 10))):
            at = rng.randrange(len(data))
            what = rng.randrange(5)
            if what == 0:
                data[at] = rng.randrange(256)
            elif what == 1:
                del data[at : at + rng.choice((1, 3, 40))]
            elif what == 2:
                data[at:at] = rng.choice(words)
            elif what == 3:
                data[at:at] = b"\n" + rng.choice(words) + b"\n"
            else:
                end = at + rng.randrange(100)
                data[at:at] = data[at:end]
        damaged(bytes(data))


def test_a_trace_of_the_wrong_shape_is_refused_when_it_is_read(tmp_path: Path) -> None:
    """What the text may say, but no trace holds."""
    path = tmp_path / "x.case"
    path.write_text(case_of("eoi", more=f'[meta]\n{{"a": "{"x" * 200}"}}\n'))
    with open_input(str(path)) as trace:
        assert trace.foreign == "case" and trace.count == 1


# -- limits -------------------------------------------------------------------------------------------------------------


def test_files_that_are_too_large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "x.case"
    path.write_text(case_of("eoi\n" * 30))
    trace = trace_of(path.read_text())
    memory = made(lambda writer: writer.memory.append(MemoryRange(0, b"ab" * 50)))
    monkeypatch.setattr(case_text, "MAX_LINES", 20)
    with pytest.raises(FormatError, match="no more lines than this"):
        open_input(str(path))
    with pytest.raises(UsageError, match="too large for a case file"):
        text_of(trace)
    monkeypatch.setattr(case_text, "MAX_LINES", 100)
    monkeypatch.setattr(case_text, "MAX_TEXT", 100)
    with pytest.raises(FormatError, match="a case file has at most"):
        open_input(str(path))
    with pytest.raises(UsageError, match="too large for a case file"):
        text_of(trace)
    monkeypatch.setattr(case_text, "MAX_TEXT", 10000)
    monkeypatch.setattr(case_blocks, "MAX_BYTES", 99)
    with pytest.raises(UsageError, match="too large for a case file"):
        text_of(memory)
    monkeypatch.setattr(case_blocks, "MAX_BYTES", 100)
    text = text_of(memory)
    assert trace_of(text).memory == memory.memory
    monkeypatch.setattr(case_blocks, "MAX_BYTES", 99)
    with pytest.raises(LineError, match="of bytes"):
        trace_of(text)


def test_a_long_file_takes_no_longer_than_its_length() -> None:
    """Labels, comments, rows and payload of 40,000 events: a second or two, minutes if any of it were quadratic."""
    events = "".join(f"# c\nl{n}: write bytes {n:08x} addr {n} # note\n" for n in range(40_000))
    rows = "".join(f"{n * 16:#x}: {'00' * 15}{n & 255:02x}\n" for n in range(40_000))
    begun = time.monotonic()
    trace = trace_of(case_of(events, more=f"[memory]\n{rows}"))
    text = text_of(trace)
    assert time.monotonic() - begun < 60
    assert trace.count == 40_000 and len(trace.payload) == 160_000 and text.count("# note") == 40_000


# -- the command line -----------------------------------------------------------------------------------------------------

Cli = Callable[..., Any]


@pytest.fixture
def race(tmp_path: Path) -> Path:
    path = tmp_path / "race.tdbg"
    write_race(path)
    return path


def test_convert_by_suffix_and_by_name(run_cli: Cli, race: Path, tmp_path: Path) -> None:
    run_cli("convert", "race.tdbg", "race.case", code=0)
    text = (tmp_path / "race.case").read_text(encoding="utf-8")
    assert text.startswith("tracedbg case 1\n") and "deliver NMI" in text
    run_cli("convert", "race.case", "back.tdbg", code=0)
    assert (tmp_path / "back.tdbg").read_bytes() == race.read_bytes()
    assert run_cli("convert", "--to", "case", "race.tdbg", "-", code=0).stdout == text
    assert run_cli("convert", "--to", "case", "race.tdbg", "/dev/stdout", code=0).stdout == text
    run_cli("convert", "--to", "tracedbg", "race.case", "odd.case", code=0)
    assert (tmp_path / "odd.case").read_bytes() == race.read_bytes()
    assert "exists; --force" in run_cli("convert", "race.tdbg", "race.case", code=2).stderr
    run_cli("convert", "--force", "odd.case", "race.case", code=0)
    assert (tmp_path / "race.case").read_text(encoding="utf-8") == text


def test_a_case_file_is_read_like_a_trace(run_cli: Cli, race: Path, tmp_path: Path) -> None:
    run_cli("convert", "race.tdbg", "race.case", code=0)
    (tmp_path / "race.case.gz").write_bytes(gzip.compress((tmp_path / "race.case").read_bytes()))
    report = run_cli("replay", "race.tdbg", code=1).stdout.replace("race.tdbg", "X")
    for name in ("race.case", "race.case.gz"):
        assert run_cli("replay", name, code=1).stdout.replace(name, "X") == report
    done = run_cli("replay", "-", code=1, stdin=(tmp_path / "race.case").read_bytes())
    assert done.stdout.endswith(report.splitlines()[-1] + "\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["convert", "race.tdbg", "--to", "pdf", "x"], "no output format 'pdf' (known: tracedbg, case, "),
        (["replay", "--layout", "xen", "race.case"], "a case file has its own layout"),
        (["replay", "--stores", "0-1", "race.case"], "a case file has its own layout"),
        (["convert", "race.case", "race.case", "x.tdbg"], "several files are only read together"),
        (["replay", "--from", "case", "race.tdbg"], "race.tdbg: line 1: "),
        (["replay", "bad.case"], "bad.case: line 2: "),
        (["replay", "new.case"], "new.case: line 1: a case file begins with 'tracedbg case 1'"),
    ],
)
def test_mistakes_on_the_command_line(run_cli: Cli, race: Path, tmp_path: Path, words: list[str], said: str) -> None:
    run_cli("convert", "race.tdbg", "race.case", code=0)
    (tmp_path / "bad.case").write_text("tracedbg case 1\nx\n")
    (tmp_path / "new.case").write_text("tracedbg case 2\n")
    done = run_cli(*words, code=2)
    assert said in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""


def test_what_cannot_be_written_leaves_nothing_behind(run_cli: Cli, tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "big.tdbg") as writer:
        writer.memory = [MemoryRange(0, bytes((64 << 20) + 1))]
    assert "too large for a case file" in run_cli("convert", "big.tdbg", "big.case", code=2).stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big.tdbg"]


def test_prose_is_utf8_whatever_the_locale(run_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "x.case").write_text("tracedbg case 1\ntitle: Überlauf\n\n[trace]\ncpus = 1\n\n[events]\neoi\n", encoding="utf-8")
    done = run_cli("convert", "x.case", "--to", "case", "-", code=0, binary=True, PYTHONIOENCODING="ascii")
    assert done.stdout == (tmp_path / "x.case").read_bytes()


def test_names_of_a_map_are_taken_along(run_cli: Cli, race: Path, tmp_path: Path) -> None:
    (tmp_path / "xen.map").write_text("ffff82d0402f9b40 t idle\nffff82d040300000 T other\nffff82d040400000 T unused\n")
    run_cli("convert", "--symbols", "xen.map", "race.tdbg", "race.case", code=0)
    names = (tmp_path / "race.case").read_text().split("[symbols]\n")[1]
    assert "idle" in names and "unused" not in names


# -- the page -----------------------------------------------------------------------------------------------------------


def test_the_page_names_every_word(root: Path) -> None:
    page = (root / "tracedbg" / "help" / "case.md").read_text(encoding="utf-8")
    words = set(re.sub(r'[`",:|=]', " ", page).split())
    wanted = {*case_fields.KINDS, *case_fields.SOURCES, *case_fields.FLAGS, *case_fields.FIELDS, *case_text.HEADER_KEYS}
    wanted |= {*case_fields.DELIVER_WORDS, *case_fields.GATE_WORDS, *case._TRACE_KEYS, *case.FIDELITY}
    for shape in case_fields.SHAPES.values():
        wanted |= {*shape.aliases.values(), *(shape.after or {}).values()} - {"="}
        if shape.names is not case_fields.SHAPES[Kind.DELIVER].names:
            wanted |= {*shape.names.values()} - {f"ist{n}" for n in range(3, 7)} - {"rsp1", "ist1"}
    assert wanted - words - {"source_index"} == set()
    assert all(f"[{name}]" in page for name in case_text.SECTIONS)
