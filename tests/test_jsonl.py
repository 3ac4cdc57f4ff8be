"""JSON Lines: every byte of a trace survives them, hand-written ones are read, damage is named by its line or becomes a gap."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import random
import tracemalloc
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from jsonl_lines import BAD_HEADERS, BAD_LINES, UNSEEN
from samples import fill_race, write_race
from test_case_format import LAYOUTS, MEMORY, METAS, SIZES, bytes_event, deep, native

from tracedbg import wire
from tracedbg.errors import FormatError, UsageError
from tracedbg.formats import ReaderOptions, open_input, recognise
from tracedbg.formats.case import fields as case_fields
from tracedbg.formats.case import read as case
from tracedbg.formats.jsonl import event as jsonl_event
from tracedbg.formats.jsonl import fields as jsonl_fields
from tracedbg.formats.jsonl import read as jsonl_read
from tracedbg.formats.jsonl import write as jsonl_write
from tracedbg.formats.source import Input
from tracedbg.layout import Layout
from tracedbg.state import EventFlag, Kind, Known, Source
from tracedbg.trace import MemoryRange, Trace
from tracedbg.writer import TraceWriter, build

HEADER = '{"tracedbg": 1, "cpus": 1}'
U64 = (1 << 64) - 1
SCHEMA = json.loads((resources.files("tracedbg") / "schemas" / "trace.jsonl.schema.json").read_text(encoding="utf-8"))
Write = Callable[..., Path]


def validator(name: str | None = None) -> Any:
    schema = SCHEMA if name is None else {"$ref": f"#/$defs/{name}", "$defs": SCHEMA["$defs"]}
    return jsonschema.Draft202012Validator(schema)


ANY, FIRST = validator(), validator("header")
REST = jsonschema.Draft202012Validator({"oneOf": SCHEMA["oneOf"][1:], "$defs": SCHEMA["$defs"]})


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(text)` -> the file."""

    def put(data: str | bytes, name: str = "x.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    return put


def text_of(trace: Trace) -> str:
    out = io.StringIO()
    jsonl_write.write_text(trace, out)
    return out.getvalue()


def read(path: Path, **options: Any) -> Trace:
    return open_input(str(path), options=ReaderOptions(**options))


def check_round_trip(trace: Trace, write: Write) -> str:
    """Byte for byte, and text that stays and fits the schema; returns the text."""
    first = native(Trace.from_bytes(native(trace)))  # some values have several forms in memory, one in a file
    text = text_of(Trace.from_bytes(first))
    assert text.isascii()
    lines = text.split("\n")
    FIRST.validate(json.loads(lines[0]))
    for line in {*lines[1:-1]}:
        REST.validate(json.loads(line))
    with read(write(text)) as back:
        assert back.foreign == "jsonl"
        assert native(back) == first
        assert text_of(back) == text
    return text


def of(*lines: str) -> str:
    return "\n".join([HEADER, *lines, ""])


# -- byte for byte ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("cpus", [1, 3])
def test_any_record_survives(seed: int, cpus: int, write: Write) -> None:
    """Records of random bytes, and of a few bits: kinds, known bits, flags and sources that do not exist too."""
    rng = random.Random(seed)

    def sparse() -> bytes:
        numbers = [rng.choice((0, 0, 1, 2, rng.getrandbits(8), (1 << 8 * size) - 1)) for size in SIZES]
        numbers[11] = rng.getrandbits(13)
        numbers[12] = rng.randrange(34)
        numbers[13] = rng.randrange(20)
        return wire.EVENT_PACK.pack(*(n & (1 << 8 * size) - 1 for n, size in zip(numbers, SIZES, strict=True)))

    def fill(writer: TraceWriter) -> None:
        for _ in range(20):
            writer.append(rng.randbytes(64))
        for _ in range(80):
            writer.append(sparse())
        writer.payload(rng.randbytes(300))

    check_round_trip(build(fill, cpus=cpus), write)


@pytest.mark.parametrize("kind", range(34))
def test_each_field_of_each_kind_is_known_or_not(kind: int, write: Write) -> None:
    """Each field alone: known with a value, known and 0, not known though it holds one."""

    def fill(writer: TraceWriter) -> None:
        for field, (bit, _) in case_fields.FIELDS.items():
            for value in (0, 1, 9):
                for known in (0, bit, case_fields.ALL_KNOWN ^ bit):
                    writer.event(kind, known=known, **{field: value})  # type: ignore[arg-type]
        for flags in (*range(0, 256, 7), 128, 255):
            writer.event(kind, flags=flags)  # type: ignore[arg-type]

    check_round_trip(build(fill), write)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_survive(name: str, write: Write) -> None:
    def fill(writer: TraceWriter) -> None:
        writer.layout = LAYOUTS[name]
        writer.meta = {"source": {"format": "hand"}}
        writer.event(Kind.EOI, cpu=0)

    text = check_round_trip(build(fill), write)
    assert ("layout_hex" in text) == (name == "tables of one base")  # a CPU names its tables by their base


def test_a_layout_too_long_for_a_line_has_several(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl_write, "_ROOM", 100)
    assert '"layout_hex"' in check_round_trip(build(fill_race), write)


@pytest.mark.parametrize("name", MEMORY)
def test_memory_survives(name: str, write: Write) -> None:
    def fill(writer: TraceWriter) -> None:
        writer.memory = [*MEMORY[name], MemoryRange(0x100000, bytes(range(256)) * 40)]

    assert '"continued": true' in check_round_trip(build(fill), write)


def test_payload_in_order_stands_with_its_events(write: Write) -> None:
    def fill(writer: TraceWriter) -> None:
        bytes_event(writer, b"\0\x11\x22")
        writer.event(Kind.EOI, cpu=0)
        bytes_event(writer, bytes(4096), arg=3)
        writer.event(Kind.MARK, cpu=0, value=writer.payload(b"note \xc3\xa4\x1b"), code=8, flags=EventFlag.BYTES)

    text = check_round_trip(build(fill), write)
    assert '{"kind": "write", "cpu": 0, "addr": "0x1000", "bytes": "001122"}\n' in text
    assert '{"kind": "mark", "cpu": 0, "text": "note \\u00e4\\u001b"}\n' in text
    assert '{"bytes"' not in text


@pytest.mark.parametrize("what", ["unused", "twice", "backwards", "too long", "past the end", "none", "bytes in a mark"])
def test_any_other_payload_has_lines_of_its_own(what: str, write: Write) -> None:
    def fill(writer: TraceWriter) -> None:
        bytes_event(writer, b"abc")
        if what == "unused":
            writer.payload(bytes(9000))
        elif what == "too long":
            bytes_event(writer, bytes(4097))
        elif what == "bytes in a mark":
            writer.event(Kind.MARK, value=writer.payload(b"\xff\xfe"), code=2, flags=EventFlag.BYTES)
            writer.payload(b"x")
        else:
            at = {"twice": 0, "backwards": 2, "past the end": 3, "none": 3}[what]
            writer.payload(b"d")
            writer.event(Kind.READ, cpu=0, value=at, code=0 if what == "none" else 2, flags=EventFlag.BYTES)

    assert '\n{"bytes": "' in check_round_trip(build(fill), write)


@pytest.mark.parametrize(
    ("symbols", "key"),
    [
        (b"0000000000001000 t a\n0000000000002000 T b\n", "symbols"),
        (b"1000 t a\n" * 100, "symbols"),
        (b"\n1000 a\n", "symbols"),
        (b"\x1b[31m\r\n", "symbols"),
        ("1000 t ä\n".encode(), "symbols"),
        (b"\n", "symbols"),
        (b"0000000000001000 t a", "symbols_hex"),
        (b"\xff\xfe\n", "symbols_hex"),
        (b"a" * 5000 + b"\n", "symbols_hex"),
    ],
)
def test_symbols_survive(symbols: bytes, key: str, write: Write) -> None:
    def fill(writer: TraceWriter) -> None:
        writer.symbols = symbols

    assert f'\n{{"{key}": ' in check_round_trip(build(fill), write)


@pytest.mark.parametrize("name", METAS)
def test_meta_survives(name: str, write: Write) -> None:
    def fill(writer: TraceWriter) -> None:
        writer.meta = METAS[name]
        writer.event(Kind.EOI, cpu=0)

    text = check_round_trip(build(fill), write)
    assert ("meta_text" in text) == (name in ("nested", "numbers"))  # too deep, infinite


def test_meta_of_any_depth_that_is_written_in_one_line_is_read(write: Write) -> None:
    for levels in range(20, 40):
        check_round_trip(build(lambda writer, levels=levels: setattr(writer, "meta", {"a": deep(levels)})), write)


def test_clock_cpus_and_large_numbers_survive(write: Write) -> None:
    buffer = io.BytesIO()
    writer = TraceWriter(buffer, cpus=4096, clock_hz=U64)
    for time in (0, (1 << 53) - 1, 1 << 53, U64):
        writer.event(Kind.DELIVER, cpu=4095, time=time, source_index=0xFFFFFFFF)
    writer.close()
    text = check_round_trip(Trace.from_bytes(buffer.getvalue()), write)
    assert text.startswith('{"tracedbg": 1, "cpus": 4096, "clock_hz": "0xffffffffffffffff", "end": true}\n')
    assert '"time": 9007199254740991}' in text and '"time": "0x20000000000000"}' in text
    # What a reader with doubles makes of it is what is meant.
    assert all(abs(v) < 1 << 53 for line in text.splitlines() for v in json.loads(line).values() if type(v) is int)


@pytest.mark.parametrize("path", sorted((Path(__file__).parent.parent / "traces").glob("*.tdbg")), ids=lambda p: p.stem)
def test_sample_traces_survive(path: Path, write: Write) -> None:
    with Trace.open(path) as trace:
        text = text_of(trace)
    with read(write(text)) as back:
        assert native(back) == path.read_bytes()
    assert "_hex" not in text and "meta_text" not in text


@pytest.mark.parametrize("path", sorted((Path(__file__).parent / "cases").glob("*.case")), ids=lambda p: p.stem)
def test_the_corpus_survives(path: Path, write: Write) -> None:
    buffer = io.BytesIO()
    writer = TraceWriter(buffer)
    case.parse(path.read_bytes(), writer)
    writer.close()
    check_round_trip(Trace.from_bytes(buffer.getvalue()), write)


@pytest.mark.parametrize("seed", range(25))
def test_random_traces_survive(seed: int, write: Write) -> None:
    from randtrace import Kernel, plan_of

    check_round_trip(build(Kernel(plan_of(seed)).fill), write)


def test_a_trace_of_many_blocks_survives(write: Write) -> None:
    """More events than the reader and the writer take at a time; sections that stand before them stay there."""
    with Trace.open(Path(__file__).parent.parent / "traces" / "linux-nested-nmi.tdbg") as sample:
        events = bytes(sample.events) * 40

    def fill(writer: TraceWriter) -> None:
        fill_race(writer)
        writer.append(events)

    first = native(build(fill))
    with read(write(text_of(Trace.from_bytes(first)))) as back:
        assert back.count > 40_000
        assert native(back) == first


# -- what a line means --------------------------------------------------------------------------------------------------

LINES: list[tuple[str, Kind, dict[str, int]]] = [
    (
        '{"kind": "deliver", "cpu": 0, "source_index": 569, "arg": 2, "source": "nmi", "rip": "0x1000", "cs": 8,'
        ' "rflags": "0x202", "rsp": "0x2000", "ss": "0x10"}',
        Kind.DELIVER,
        {"cpu": 0, "source_index": 569, "arg": 2, "source": 2, "rip": 0x1000, "cs": 8, "rflags": 0x202, "rsp": 0x2000, "ss": 16},
    ),
    ('{"kind":"deliver","arg":14,"code":7,"value":85}', Kind.DELIVER, {"arg": 14, "code": 7, "value": 0x55}),
    ('{"value": "0X5", "kind": "cr", "arg": 4}'.replace("X", "x"), Kind.CR, {"arg": 4, "value": 5}),
    ('{"kind": "deliver", "source": 7, "arg": "0x02"}', Kind.DELIVER, {"source": 7, "arg": 2}),
    ('{"kind": "deliver", "source": "0x7"}', Kind.DELIVER, {"source": 7}),
    ('{"kind": "deliver", "source": "unknown"}', Kind.DELIVER, {"source": Source.UNKNOWN}),
    ('{"kind": "deliver", "flags": ["failed", "smm"], "addr": 2}', Kind.DELIVER, {"flags": 1 | 16, "addr": 2}),
    ('{"kind": "deliver", "flags": 129}', Kind.DELIVER, {"flags": 129}),
    ('{"kind": "return", "rsp": "0xFFFFFFFFFFFFFFFF"}', Kind.RETURN, {"rsp": U64}),
    ('{"kind": "return", "rsp": "0x00000000000000000010"}', Kind.RETURN, {"rsp": 16}),
    ('{"kind": "return", "rsp": 18446744073709551615}', Kind.RETURN, {"rsp": U64}),
    ('  {"kind"  :  "eoi"  ,  "cpu" : 0 }\t\r', Kind.EOI, {"cpu": 0}),
    ('{"\\u006bind": "eoi", "time": 0}', Kind.EOI, {"time": 0}),
    ('{"kind": "gap"}', Kind.GAP, {}),
    ('{"kind": 25}', Kind.TOKEN, {}),
    ('{"kind": "0x19"}', Kind.TOKEN, {}),
    ('{"kind": "eoi", "known": "0x8100", "cpu": 3}', Kind.EOI, {"cpu": 3, "known": 0x8100}),
    ('{"kind": "eoi", "known": 0, "cpu": 3}', Kind.EOI, {"cpu": 3, "known": 0}),
]


@pytest.mark.parametrize(("line", "kind", "fields"), LINES, ids=[line[0] for line in LINES])
def test_a_line_makes_this_record(line: str, kind: Kind, fields: dict[str, int], write: Write) -> None:
    expected = build(lambda writer: void(writer.event(kind, **fields)))
    REST.validate(json.loads(line))
    with read(write(of(line, line))) as trace:
        assert bytes(trace.events) == bytes(expected.events) * 2
    with read(write(of(line).rstrip("\n"))) as trace:  # no line break behind the last
        assert bytes(trace.events) == bytes(expected.events)


def void(_: object) -> None:
    """What a filler gives back."""


def test_the_short_way_and_the_thorough_one_agree() -> None:
    """On lines of every mix of keys, types and wrong values: the same record, or both refuse."""
    rng = random.Random(11)
    values: list[Any] = [
        0, 1, 255, 256, 65535, 65536, 1 << 32, U64, 1 << 64, -1, True, False, None, 1.0, 1e3, "0x0", "0x1f", "0xFFFF", "0X1",
        "0x", "0x_1", "0x1_0", " 0x1", "0x1 ", "+0x1", "-0x1", "1f", "12", "", "x", "0x١", "１", "0x" + "0" * 30 + "1",
        "0x1" + "0" * 16, "nmi", "deliver", "0xx1", "00x1", [], {}, [1], "a:b", "true",
    ]  # fmt: skip
    good = [0, 1, "0x1", "0x2f"]
    plain = taken = 0
    events = jsonl_event.Events(lambda data: 0)
    for _ in range(30_000):
        names = rng.sample([*jsonl_fields.FIELDS, "known"], rng.randrange(4))
        names += ["kind"] * (rng.random() < 0.95)
        members = [(name, rng.choice(good if rng.random() < 0.8 else values)) for name in names]
        members = [(n, rng.choice(["eoi", "deliver", v]) if n == "kind" else v) for n, v in members]
        if members and rng.random() < 0.1:
            members.append(rng.choice(members))
        line = "{" + ", ".join(f"{json.dumps(n)}: {json.dumps(v)}" for n, v in members) + "}"
        rows: list[bytes] = []
        jsonl_event.Events(lambda data: 0).take([line] * 2, 0, rows)  # the second time with what was remembered
        mixed: list[bytes] = []
        events.take([line], 0, mixed)  # with what was remembered of all lines
        try:
            record = events.record(jsonl_event.parse(line)) if any(n == "kind" for n, _ in members) else None
        except jsonl_event.LineError:
            record = None
        assert rows in ([], [record] * 2) and mixed in ([], [record]), line
        plain += bool(rows)
        taken += record is not None
    assert plain > 5_000 and taken > plain


def test_shapes_that_are_remembered_are_bounded(write: Write) -> None:
    rng = random.Random(3)
    events = jsonl_event.Events(lambda data: 0)
    lines = []
    for _ in range(jsonl_event._MOST_SHAPES + 500):
        names = rng.sample([*jsonl_fields.FIELDS], 8)
        lines.append(json.dumps({"kind": "eoi", **dict.fromkeys((n for n in names if n != "source"), 1)}))
    rows: list[bytes] = []
    assert events.take(lines, 0, rows) == len(lines)
    assert len(events._shapes) == jsonl_event._MOST_SHAPES
    assert rows == [events.record(json.loads(line)) for line in lines]


def test_a_hand_written_file(write: Write) -> None:
    """The example of the help page: what the first lines of the manual promise."""
    page = (resources.files("tracedbg") / "help" / "jsonl.md").read_text(encoding="utf-8")
    example = page.split("## An example")[1].split("The 8259")[0]
    path = write("\n".join(line.strip() for line in example.strip().splitlines()))
    with read(path) as trace:
        assert (trace.count, trace.cpus, trace.clock_hz) == (2, 1, 0)
        assert [(r.lo, r.hi, r.assumed) for r in trace.layout.regions] == [(0x206000, 0x208000, True)]
        assert trace.meta["source"]["format"] == "jsonl" and trace.meta["source"]["name"] == "x.jsonl"
        from tracedbg.replay import Replay

        with Replay(trace) as replay:
            replay.scan()
            found = replay.findings()
    assert [(f.rule.name, f.event) for f in found] == [("FAKE_NMI", 0), ("FRAME_CLOBBERED", 1)]


def test_cpus_are_counted_if_the_header_does_not_say(write: Write) -> None:
    with read(write('{"tracedbg": 1}\n{"kind": "eoi", "cpu": 5}\n{"kind": "eoi"}\n{"kind": "eoi", "known": 0, "cpu": 9}\n')) as t:
        assert t.cpus == 6
    with pytest.raises(FormatError, match="CPU 4096: there are at most 4096"):
        read(write('{"tracedbg": 1}\n{"kind": "eoi", "cpu": 4096}\n'))


def test_other_lines_stand_anywhere(write: Write) -> None:
    text = of(
        '{"kind": "write", "addr": 1, "bytes": "0a0B"}', "", '{"memory": 4096, "bytes": "00"}', '{"meta": {"a": 1}}', "   ",
        '{"bytes": "ff"}', '{"symbols": ["1000 t a"]}', '{"kind": "mark", "text": "é"}', '{"symbols": ["2000 t b"]}',
    )  # fmt: skip
    with read(write(text)) as trace:
        assert bytes(trace.payload) == b"\x0a\x0b\xff\xc3\xa9"
        assert trace.memory == (MemoryRange(0x1000, b"\0"),)
        assert trace.meta == {"a": 1}
        assert trace.symbols == b"1000 t a\n2000 t b\n"
        assert (trace.event(1).value, trace.event(1).code, trace.event(1).flags) == (3, 2, EventFlag.BYTES)


def test_options(write: Write) -> None:
    bare, held = write(of('{"kind": "eoi"}')), write('{"tracedbg": 1, "layout": {}}\n', "held.jsonl")
    layout = LAYOUTS["sample"]
    with read(bare, layout=layout, stores=((1, 2), (3, 1 << 64)), symbols=b"1 a\n") as trace:
        assert trace.layout.tss == layout.tss and trace.symbols == b"1 a\n"
        assert [(r.lo, r.hi) for r in trace.layout.regions if r.kind == 2] == [(1, 2), (3, U64)]
    with pytest.raises(UsageError, match="its own layout"):
        read(held, layout=layout)
    with pytest.raises(UsageError, match="--monitor belongs to"):
        read(bare, monitor=("x",))
    with pytest.raises(UsageError, match="--cpu-hz belongs to"):
        read(bare, cpu_hz=5)
    from tracedbg.formats import open_inputs

    with pytest.raises(UsageError, match="not one recording"):
        open_inputs([str(bare), str(bare)])


# -- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_refused_by_reader_and_schema(line: str, message: str, write: Write) -> None:
    path = write(of('{"kind": "eoi", "cpu": 0}', "", '{"kind": "mark", "text": "ä"}', line, '{"kind": "eoi", "cpu": 0}'))
    with pytest.raises(FormatError) as caught:
        read(path)
    assert caught.value.message.startswith("line 5: ") and message in caught.value.message
    assert caught.value.offset == path.read_bytes().index(b"\xc3") + len(b'\xc3\xa4"}\n')
    assert str(caught.value).isprintable() and len(str(caught.value)) < 700
    if line not in UNSEEN:
        assert not REST.is_valid(json.loads(line))


@pytest.mark.parametrize(("line", "message"), BAD_HEADERS, ids=range(len(BAD_HEADERS)))
def test_a_bad_header_is_refused_by_reader_and_schema(line: str, message: str, write: Write) -> None:
    path = write(line + "\n")
    with pytest.raises(FormatError) as caught:
        open_input(str(path), from_format="jsonl")
    assert caught.value.message.startswith("line 1: ") and message in caught.value.message
    if line not in UNSEEN:
        assert not FIRST.is_valid(json.loads(line))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"meta": {}}', '{"meta": {}}'], "line 3: a second line of 'meta'"),
        (['{"meta": {}}', '{"meta_text": "{}"}'], "line 3: 'meta_text' behind"),
        (['{"kind": "eoi"}', '{"meta_text": "{}"}'], "line 3: 'meta_text' behind"),
        (['{"kind": "eoi"}'] * 70_000 + ['{"layout_hex": "00"}'], "line 70002: 'layout_hex' behind"),
        (['{"meta_text": "{"}', '{"kind": "eoi"}'], "meta_text is not JSON"),
        (['{"meta_text": "[]"}'], "meta_text is not a JSON object"),
        (['{"meta_text": "' + "[" * 100_000 + '"}'], "meta_text is nested too deeply"),
        (['{"memory": 0, "bytes": "00"}', '{"memory": 2, "bytes": "00", "continued": true}'], "line 3: continued: no range"),
        (['{"memory": 0, "bytes": "00", "continued": true}'], "line 2: continued: no range"),
        (['{"memory": "0xffffffffffffffff", "bytes": "0000"}'], "line 2: memory: past the end"),
        (['{"layout_hex": "00"}'], "layout section is cut short"),
        (['{"end": true}', '{"kind": "eoi"}'], "line 3: a line behind that with `end`"),
        (['{"end": true}', "{"], "line 3: not JSON"),
    ],
)
def test_lines_that_do_not_go_together(lines: list[str], message: str, write: Write) -> None:
    with pytest.raises(FormatError, match=message.replace("`", ".").replace("(", ".")):
        read(write(of(*lines)))


def test_limits(write: Write) -> None:
    with pytest.raises(FormatError, match=r"line 3 is longer than 4 MiB") as caught:
        read(write(of('{"kind": "eoi"}', " " * (4 << 20) + '{"kind": "eoi"}')))
    assert caught.value.offset == len(of('{"kind": "eoi"}'))
    with pytest.raises(FormatError, match=r"line 2 is longer than 4 MiB"):  # with no end
        read(write(HEADER + "\n" + "x" * (6 << 20)))
    with read(write(of(" " * ((4 << 20) - 20) + '{"kind": "eoi"}'))) as trace:
        assert trace.count == 1
    with pytest.raises(FormatError, match=r"offset 0x1d: line 2: not UTF-8 text"):
        read(write(HEADER.encode() + b'\n{"\xff' + b'"}\n'))
    with pytest.raises(FormatError, match=r"line 2: no kind \"x\""):  # the first error counts
        read(write(HEADER.encode() + b'\n{"kind": "x"}\n\xff\n'))


def test_memory_is_bounded(write: Write) -> None:
    """Reading and writing 100,000 events takes no more memory than a few blocks."""
    with Trace.open(Path(__file__).parent.parent / "traces" / "linux-nested-nmi.tdbg") as sample:
        events = bytes(sample.events) * (100_000 // sample.count)
    big = build(lambda writer: writer.append(events))
    path = write(b"")
    tracemalloc.start()
    try:
        with path.open("w") as out:
            jsonl_write.write_text(big, out)
        wrote = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()

        class Sink(io.BytesIO):
            def write(self, data: Any) -> int:
                return len(data)

        with Input(str(path)) as source:
            jsonl_read.read([source], TraceWriter(Sink()), ReaderOptions())
        took = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 11 << 20
    assert wrote < 12 << 20 and took < 12 << 20, (wrote, took)


# -- recognised ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        (HEADER, True),
        ('  {  "tracedbg" :', True),
        ('{"cpus": 1, "tracedbg": 1}\n', True),
        ('{"cpus": 1, "tracedbg": 1}', False),  # not a whole line yet
        ('{"tracedbg"}', False),
        ('{"runs": [{"tracedbg": 1}]}\n', False),
        ('{"schema": "tracedbg.replay", "tool": {"name": "tracedbg"}}\n', False),
        ('{\n "tracedbg": 1\n}', False),
        ('{"kind": "eoi"}\n', False),
        ('[{"tracedbg": 1}]\n', False),
        ("tracedbg case 1\n", False),
    ],
)
def test_sniff(text: str, yes: bool, write: Write) -> None:
    with Input(str(write(text))) as source:
        try:
            name = recognise(source).name
        except FormatError:
            name = ""
    assert (name == "jsonl") == yes


def test_reports_are_no_traces(run_cli: Callable[..., Any], tmp_path: Path) -> None:
    write_race(tmp_path / "race.tdbg")
    for form in ("json", "sarif"):
        report = run_cli("replay", "--format", form, "--exit-zero", "race.tdbg", code=0).stdout
        (tmp_path / "report").write_text(report)
        done = run_cli("info", "report", code=2)
        assert "not a trace or log" in done.stderr
        compact = json.dumps(json.loads(report))
        (tmp_path / "report").write_text(compact + "\n")
        assert "not a trace or log" in run_cli("info", "report", code=2).stderr


def test_the_command_line(run_cli: Callable[..., Any], tmp_path: Path) -> None:
    write_race(tmp_path / "race.tdbg")
    first = (tmp_path / "race.tdbg").read_bytes()
    run_cli("convert", "race.tdbg", "race.jsonl", code=0)
    text = (tmp_path / "race.jsonl").read_bytes()
    assert run_cli("convert", "--to", "jsonl", "race.tdbg", "-", binary=True, code=0).stdout == text
    assert run_cli("convert", "-", "-", stdin=gzip.compress(text), binary=True, code=0).stdout == first
    assert run_cli("replay", "-", stdin=text, code=1).stdout.replace("stdin", "race.tdbg")
    (tmp_path / "cut.jsonl").write_bytes(text[:-40])
    said = run_cli("info", "cut.jsonl", code=0).stdout
    assert "damage: line 7 is cut short" in said and "  gap                     1\n" in said


# -- damage -------------------------------------------------------------------------------------------------------------


def sample_text() -> bytes:
    """All sorts of lines in little room."""

    def fill(writer: TraceWriter) -> None:
        fill_race(writer, returns=1)
        writer.meta = {"source": {"format": "hand"}, "ä": [1.5, {"b": None}]}
        writer.memory = [MemoryRange(0x1000, b"abc")]
        bytes_event(writer, b"\x00\x11")
        writer.event(Kind.MARK, value=writer.payload(b"note"), code=4, flags=EventFlag.BYTES)
        writer.event(Kind.EOI, cpu=1, known=int(Known.CPU | 0x8000), flags=0x81)
        writer.payload(b"rest")

    return text_of(build(fill)).encode()


def outcome(path: Path) -> tuple[int, list[str]] | str:
    """Events and damage, or the error; nothing else may happen."""
    try:
        with open_input(str(path), from_format="jsonl") as trace:
            damage = trace.meta.get("damage", [])
            text_of(trace)
            return trace.count, damage if isinstance(damage, list) else [str(damage)]
    except (FormatError, UsageError) as error:
        assert str(error).isprintable(), ascii(str(error))
        return str(error)


def test_every_truncation(write: Write) -> None:
    """A cut header is an error; else all whole events are there, and the gap."""
    text = sample_text()
    lines = text.splitlines(keepends=True)
    ends = [sum(map(len, lines[: n + 1])) for n in range(len(lines))]
    events = [line.startswith(b'{"kind"') for line in lines]
    for size in range(1, len(text)):
        got = outcome(write(text[:size]))
        # The line break behind a line may be missing.
        whole = sum(end - 1 <= size for end in ends)
        if not whole:
            assert isinstance(got, str) and "line 1: not JSON" in got, size
        elif whole == len(lines):
            assert got == (sum(events), []), size
        else:
            assert isinstance(got, tuple), (size, got)
            assert got[0] == sum(events[:whole]) + 1 and len(got[1]) == 1 and "cut short" in got[1][0], (size, got)


def test_a_line_without_an_end_that_is_wrong_is_not_cut(write: Write) -> None:
    for tail in ('{"kind": eoi}', '{"kind": "eoi",, "cpu": 1}', "{]", "}", '{"kind": "eoi"} {'):
        with pytest.raises(FormatError, match="line 3: not JSON"):
            read(write(of('{"kind": "eoi"}') + tail))


def mutate(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(out))
        match rng.randrange(6):
            case 0:
                out[at] = rng.randrange(256)
            case 1:
                del out[at : at + rng.randrange(1, 40)]
            case 2:
                out[at:at] = rng.choice(
                    (b'"', b"{", b"[", b"}", b"\n", b"-", b"0x", b"\0", b"9" * 30, b"\xff", b"\x1b[2J", b": ")
                )
            case 3:
                out[at] ^= 1 << rng.randrange(8)
            case 4:
                other = rng.randrange(len(out))
                out[at:at] = out[other : other + rng.randrange(60)]
            case _:
                lines = bytes(out).split(b"\n")
                rng.shuffle(lines)
                out[:] = b"\n".join(lines)
        out = out or bytearray(b"x")
    return bytes(out)


@pytest.mark.parametrize("part", range(4))
def test_mutations_end_in_an_error_or_a_trace(part: int, write: Write) -> None:
    text = sample_text()
    rng = random.Random(part)
    read_well = 0
    for number in range(2500):
        path = write(mutate(rng, text))
        if number % 8 == 0:
            read_well += isinstance(outcome(path), tuple)
            continue
        with contextlib.suppress(FormatError, UsageError), Input(str(path)) as source:
            jsonl_read.read([source], TraceWriter(io.BytesIO()), ReaderOptions())
            read_well += 1
    assert read_well > 30


# -- the schema ---------------------------------------------------------------------------------------------------------


def test_the_schema_is_one_and_knows_the_words_of_the_program() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    event, header = SCHEMA["$defs"]["event"]["properties"], SCHEMA["$defs"]["header"]["properties"]
    assert [*event] == [*jsonl_fields.EVENT_KEYS]
    assert {*header} == {*jsonl_fields.HEADER_KEYS}
    assert event["kind"]["anyOf"][0]["enum"] == [*jsonl_fields.KINDS]
    assert event["source"]["anyOf"][0]["enum"] == [*jsonl_fields.SOURCES]
    assert event["flags"]["anyOf"][0]["items"]["enum"] == [*jsonl_fields.FLAGS]
    for name, field in jsonl_fields.FIELDS.items():
        if name != "source":
            assert event[name]["$ref"] == f"#/$defs/u{field.bits}"


def test_the_help_page_names_every_key_and_kind() -> None:
    page = (resources.files("tracedbg") / "help" / "jsonl.md").read_text(encoding="utf-8")
    for word in (
        *jsonl_fields.EVENT_KEYS,
        *jsonl_fields.HEADER_KEYS,
        *jsonl_fields.KINDS,
        *jsonl_fields.SOURCES,
        *jsonl_fields.FLAGS,
    ):
        assert f"`{word}`" in page, word


def test_fields_lie_where_the_wire_has_them() -> None:
    names = [part.name for part in wire.EVENT.subcons]
    for name, field in jsonl_fields.FIELDS.items():
        assert names[field.place] == name
    assert names[jsonl_fields.KNOWN_PLACE] == "known" and names[jsonl_fields.KIND_PLACE] == "kind"
    assert names[jsonl_fields.FLAGS_PLACE] == "flags" and names[jsonl_fields.SOURCE_PLACE] == "source"


def test_an_empty_layout_and_no_layout_are_different(write: Write) -> None:
    with read(write('{"tracedbg": 1, "layout": {}}\n')) as trace:
        assert trace.layout == Layout()
