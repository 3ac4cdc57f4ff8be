"""A trace and its verdict as three Parquet files in a directory. help/parquet.md documents them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tracedbg import __version__, wire
from tracedbg.describe import Words
from tracedbg.export import facts
from tracedbg.export.arrow import Table, has, named, renamed, where, without
from tracedbg.export.lives import batches
from tracedbg.export.records import DELIVERIES, KNOWN_BITS, PLACES, payload
from tracedbg.layout import Fidelity
from tracedbg.replay import LIFE_SIZE, Lives, Replay, life_place
from tracedbg.state import NO_EVENT, EventFlag, FrameStatus, Kind, Known, Settle, Source
from tracedbg.text import clean
from tracedbg.trace import Trace

if TYPE_CHECKING:
    from tracedbg.formats import WriterOptions

SCHEMA = "tracedbg.parquet"
SCHEMA_VERSION = 1
MARKER = "_tracedbg.json"  # says what the directory is; readers of Parquet leave names with _ alone
ROWS = 1 << 17  # of a row group: what is in memory at a time

_TEXT = pa.dictionary(pa.int32(), pa.string())


def write(trace: Trace, path: str, options: WriterOptions) -> None:
    """As registry.Writer; `path` is an empty directory."""
    words = Words(trace, options.symbols)
    with Replay(trace, max_snapshots=2) as replay:  # nobody goes back
        with _File(path, "events", EVENTS) as events, _File(path, "frames", FRAMES) as frames:
            done = 0
            for lives in batches(replay, options.progress):
                if replay.scanned - done >= ROWS or replay.scanned == trace.count:
                    for first in range(done, replay.scanned, ROWS):
                        events.add(_events(trace, words, first, min(first + ROWS, replay.scanned)))
                    done = replay.scanned
                if len(lives):
                    frames.add(_frames(trace, words, lives))
        with _File(path, "findings", FINDINGS) as findings:
            for row in _findings(replay, words):
                findings.add_row(row)
        document = _document(replay)
    with open(os.path.join(path, MARKER), "w", encoding="ascii", newline="\n") as file:
        file.write(json.dumps(document, indent=2, ensure_ascii=True) + "\n")


class _File:
    """One file, written in row groups of ROWS rows."""

    def __init__(self, folder: str, name: str, schema: Any) -> None:
        said = {f"{SCHEMA}.version": str(SCHEMA_VERSION), f"{SCHEMA}.table": name}
        self._schema = schema.with_metadata(said)
        self._file: BinaryIO = open(os.path.join(folder, f"{name}.parquet"), "wb")  # noqa: SIM115 (closed by the context)
        self._writer = pq.ParquetWriter(self._file, self._schema, compression="zstd", version="2.6")
        self._waiting: list[Any] = []
        self._count = 0
        self._rows: list[dict[str, Any]] = []

    def __enter__(self) -> _File:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._flush_rows()
                self._write(self._waiting)
                self._writer.close()
        finally:
            with contextlib.suppress(Exception):  # the first error is the one that counts
                self._writer.close()
            self._writer.is_open = False  # else it would try once more, and print what comes of it
            self._file.close()

    def add(self, columns: dict[str, Any]) -> None:
        """Rows, as columns."""
        table = pa.table([columns[field.name] for field in self._schema], schema=self._schema)
        self._waiting.append(table)
        self._count += len(table)
        if self._count >= ROWS:
            whole = pa.concat_tables(self._waiting)
            end = self._count // ROWS * ROWS
            self._write([whole.slice(0, end)])
            self._waiting, self._count = [whole.slice(end)], self._count - end

    def add_row(self, row: dict[str, Any]) -> None:
        """One row of plain values."""
        self._rows.append(row)
        if len(self._rows) >= facts.FINDINGS_AT_ONCE:
            self._flush_rows()

    def _flush_rows(self) -> None:
        if self._rows:
            table = pa.Table.from_pylist(self._rows, schema=self._schema)
            self._rows = []
            self.add({name: table.column(name) for name in table.column_names})

    def _write(self, tables: list[Any]) -> None:
        if sum(map(len, tables)):
            whole = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
            self._writer.write_table(whole, row_group_size=ROWS)


# -- events ---------------------------------------------------------------------------------------------------------

_FLAGS = {
    "failed": EventFlag.FAILED, "faulted": EventFlag.FAULTED, "damaged": EventFlag.PARTIAL, "external": EventFlag.EXT,
    "smm": EventFlag.SMM, "legacy": EventFlag.LEGACY,
}  # fmt: skip
_NUMBERS = ("time", "arg", "rip", "cs", "rflags", "rsp", "ss", "addr", "value", "code", "source_index")
_WIDTHS = {1: pa.uint8(), 2: pa.uint16(), 4: pa.uint32(), 8: pa.uint64()}

EVENTS = pa.schema(
    [
        pa.field("event", pa.uint32(), nullable=False),
        pa.field("kind", _TEXT, nullable=False),
        pa.field("cpu", pa.uint16()),
        pa.field("name", _TEXT),
        pa.field("source", _TEXT),
        pa.field("symbol", _TEXT),
        *(pa.field(name, _WIDTHS[PLACES[name][1]]) for name in _NUMBERS),
        *(pa.field(name, pa.bool_(), nullable=False) for name in _FLAGS),
        pa.field("bytes", pa.binary()),
        pa.field("text", pa.string()),
    ]
)

_KINDS = [facts.word(Kind(n)) if n in set(Kind) and n else f"kind {n}" for n in range(256)]
_SOURCES = [facts.word(Source(n)) if n in set(Source) else f"source {n}" for n in range(256)]


def _events(trace: Trace, words: Words, first: int, end: int) -> dict[str, Any]:
    data = Table(trace.events[first * wire.EVENT_SIZE : end * wire.EVENT_SIZE], wire.EVENT_SIZE)
    raw = {name: data.column(*PLACES[name]) for name in PLACES}
    known, flags = raw["known"], raw["flags"]
    far = has(flags, EventFlag.BYTES)
    columns: dict[str, Any] = {
        name: where(has(known, bit), raw[name]) for name, bit in KNOWN_BITS.items() if name not in ("source", "value")
    }
    columns["value"] = where(pc.and_(has(known, Known.VALUE), pc.invert(far)), raw["value"])  # else it is an offset
    columns["event"] = pa.array(range(first, end), pa.uint32())
    columns["kind"] = named(raw["kind"], _KINDS)
    columns["source"] = named(where(has(known, Known.SOURCE), raw["source"]), _SOURCES)
    columns["name"] = _event_names(words, raw)
    columns["symbol"] = _symbols(words, columns["rip"])
    columns.update((name, has(flags, bit)) for name, bit in _FLAGS.items())
    columns["bytes"], columns["text"] = _payloads(trace, first, far)
    return columns


def _event_names(words: Words, raw: dict[str, Any]) -> Any:
    """What deliveries and requests are called; null for all other events."""
    known = raw["known"]
    delivered = pc.and_(pc.is_in(raw["kind"], value_set=pa.array(sorted(DELIVERIES), pa.uint8())), has(known, Known.ARG))
    source = pc.if_else(has(known, Known.SOURCE), raw["source"], pa.scalar(0, pa.uint8()))
    return _delivery_names(words, delivered, raw["arg"], source, pc.and_(has(known, Known.CODE), _is(raw["code"], 1)))


def _delivery_names(words: Words, chosen: Any, vector: Any, source: Any, one_byte: Any) -> Any:
    """Names by vector, source, and whether it is an INT of one byte; null where not `chosen`."""
    short = pc.and_(_is(source, Source.SOFT_INT), one_byte)
    key = pc.add(vector.cast(pa.uint32()), pc.multiply(source.cast(pa.uint32()), pa.scalar(256, pa.uint32())))
    key = pc.add(key, pc.if_else(short, pa.scalar(1 << 16, pa.uint32()), pa.scalar(0, pa.uint32())))
    values = pc.unique(key.filter(chosen)).sort()
    names = [facts.delivery_name(words, n & 0xFF, n >> 8 & 0xFF, bool(n >> 16)) for n in values.to_pylist()]
    return renamed(where(chosen, key), names, values)


def _is(column: Any, value: int) -> Any:
    return pc.equal(column, pa.scalar(int(value), column.type))


def _symbols(words: Words, addresses: Any) -> Any:
    """`do_nmi+2`; null without a symbol."""
    if not len(words.symbols):
        return pa.DictionaryArray.from_arrays(pa.nulls(len(addresses), pa.int32()), pa.array([], pa.string()))
    values = pc.unique(addresses).drop_null()
    return renamed(addresses, [words.symbol(address) for address in values.to_pylist()], values)


def _payloads(trace: Trace, first: int, far: Any) -> tuple[Any, Any]:
    """What events carry beside their records, and the text of marks."""
    count = len(far)
    places = pc.indices_nonzero(far).to_pylist()
    if not places:
        return pa.nulls(count, pa.binary()), pa.nulls(count, pa.string())
    data: list[bytes | None] = [None] * count
    texts: list[str | None] = [None] * count
    for place in places:
        data[place] = held = payload(trace, first + place)
        if held is not None and trace.event(first + place).kind is Kind.MARK:
            texts[place] = clean(held.decode("utf-8", "replace"), facts.MAX_TEXT)
    return pa.array(data, pa.binary()), pa.array(texts, pa.string())


# -- frames ---------------------------------------------------------------------------------------------------------

FRAMES = pa.schema(
    [
        pa.field("event", pa.uint32(), nullable=False),
        pa.field("cpu", pa.uint16(), nullable=False),
        pa.field("vector", pa.uint8(), nullable=False),
        pa.field("name", _TEXT, nullable=False),
        pa.field("source", _TEXT, nullable=False),
        pa.field("stack", _TEXT, nullable=False),
        pa.field("ist", pa.uint8(), nullable=False),
        *(pa.field(name, pa.uint64(), nullable=False) for name in ("stack_lo", "stack_hi", "lo", "hi")),
        pa.field("symbol", _TEXT),
        pa.field("rip", pa.uint64()),
        pa.field("cs", pa.uint16()),
        pa.field("rflags", pa.uint64()),
        pa.field("rsp", pa.uint64()),
        pa.field("ss", pa.uint16()),
        pa.field("error_code", pa.uint64()),
        pa.field("gate_type", pa.uint8(), nullable=False),
        pa.field("fred", pa.bool_(), nullable=False),
        pa.field("level", pa.uint8(), nullable=False),
        pa.field("from_level", pa.uint8(), nullable=False),
        pa.field("kernel_gs", pa.bool_()),
        pa.field("overwrote", pa.uint32()),
        pa.field("ended", pa.uint32()),
        pa.field("settle", _TEXT),
        pa.field("overwritten", pa.uint32()),
        pa.field("status", _TEXT, nullable=False),
        pa.field("finding", pa.uint32()),
    ]
)
_SAVED = {
    "rip": Known.RIP, "cs": Known.CS, "rflags": Known.RFLAGS, "rsp": Known.RSP, "ss": Known.SS, "code": Known.CODE,
}  # fmt: skip
_SAME = ("cpu", "vector", "ist", "stack_lo", "stack_hi", "lo", "hi", "gate_type", "level", "from_level")
_SETTLES = [facts.word(why) for why in Settle]
_STATUSES = [facts.word(status) for status in FrameStatus]
_USER, _RAISED, _FRED, _LEVEL = 128, 64, 32, 8  # bits of a number for the stack of a frame, above those for its IST


def _stack_names() -> list[str]:
    names = []
    for n in range(256):
        level = n // _LEVEL % 4
        if n % _LEVEL:
            names.append(f"IST{n % _LEVEL}")
        elif n & _FRED and n & (_USER | _RAISED):
            names.append(f"FRED level {level}")
        else:
            names.append("RSP0" if n & _USER else "current stack")
    return names


_STACKS = _stack_names()


def _frames(trace: Trace, words: Words, lives: Lives) -> dict[str, Any]:
    data = Table(lives.data, LIFE_SIZE)

    def column(name: str) -> Any:
        return data.column(*life_place(name))

    known = column("frame.saved.known")
    columns: dict[str, Any] = {name: column(f"frame.{name}") for name in _SAME}
    columns["event"] = entries = column("frame.entry")
    for name, bit in _SAVED.items():
        columns["error_code" if name == "code" else name] = where(has(known, bit), column(f"frame.saved.{name}"))
    source, fred, gs = column("frame.source"), column("frame.fred"), column("frame.gs")
    # Only an INT has a length that its name depends on.
    chosen = _is(source, Source.SOFT_INT)
    ones = [entry for entry in entries.filter(chosen).to_pylist() if _one_byte(trace, entry)]
    short = pc.is_in(entries, value_set=pa.array(ones, entries.type))
    columns["name"] = _delivery_names(words, pc.is_valid(entries), columns["vector"], source, short)
    columns["source"] = named(source, _SOURCES)
    columns["stack"] = named(_stack_numbers(columns, known, fred), _STACKS)
    columns["symbol"] = _symbols(words, columns["rip"])
    columns["fred"] = _is(fred, 1)
    columns["kernel_gs"] = where(pc.less(gs, pa.scalar(2, gs.type)), _is(gs, 1))
    settle = column("settle")
    columns["settle"] = named(where(pc.less(settle, pa.scalar(len(Settle), settle.type)), settle), _SETTLES)
    columns["status"] = named(column("status"), _STATUSES)
    for name, field in (("overwrote", "frame.victim"), ("ended", "end"), ("overwritten", "overwritten"), ("finding", "finding")):
        columns[name] = without(column(field), NO_EVENT)
    return columns


def _one_byte(trace: Trace, entry: int) -> bool:
    event = trace.event(entry)
    return bool(event.known & Known.CODE) and event.code == 1


def _stack_numbers(columns: dict[str, Any], known: Any, fred: Any) -> Any:
    """The number in _STACKS of each frame's stack, as describe's frame_stack() tells it."""
    cs = columns["cs"]
    user = pc.fill_null(pc.equal(pc.bit_wise_and(cs, pa.scalar(3, cs.type)), pa.scalar(3, cs.type)), False)
    number = pc.add(columns["ist"], pc.multiply(columns["level"], pa.scalar(_LEVEL, pa.uint8())))
    for test, bit in ((user, _USER), (pc.greater(columns["level"], columns["from_level"]), _RAISED), (_is(fred, 1), _FRED)):
        number = pc.add(number, pc.if_else(test, pa.scalar(bit, pa.uint8()), pa.scalar(0, pa.uint8())))
    return number


# -- findings -------------------------------------------------------------------------------------------------------

_FINDING_TYPES = {
    "finding": pa.uint32(), "cpu": pa.uint16(), "count": pa.uint32(), "lo": pa.uint64(), "hi": pa.uint64(),
    "popped_rip": pa.uint64(), "popped_cs": pa.uint16(), "popped_rflags": pa.uint64(), "popped_rsp": pa.uint64(),
    "popped_ss": pa.uint16(), "slots": pa.list_(pa.string()), "differ": pa.list_(pa.string()),
}  # fmt: skip
_STEP = pa.struct([("event", pa.uint32()), ("text", pa.string())])
_WORD = pa.struct(
    [("addr", pa.uint64()), ("slot", pa.string()), ("own", pa.uint64()), ("now", pa.uint64()), ("overwritten", pa.bool_()),
     ("differs", pa.bool_())]
)  # fmt: skip


def _finding_type(field: Any) -> Any:
    if field.name in _FINDING_TYPES:
        return _FINDING_TYPES[field.name]
    return pa.string() if "str" in field.type else pa.uint32()


FINDINGS = pa.schema(
    [
        *(pa.field(f.name, _finding_type(f), nullable="None" in str(f.type)) for f in fields(facts.FindingRow)),
        pa.field("steps", pa.list_(_STEP), nullable=False),
        pa.field("words", pa.list_(_WORD), nullable=False),
    ]
)


def _findings(replay: Replay, words: Words) -> Iterator[dict[str, Any]]:
    for finding in facts.all_findings(replay):
        row = asdict(facts.finding_row(finding, words))
        row["slots"], row["differ"] = row["slots"].split(), row["differ"].split()
        row["steps"] = [{"event": step.event, "text": step.text} for step in words.finding_chain(finding)]
        row["words"] = [asdict(r) for r in words.bytes_rows(finding)] if finding.slots else []
        yield row


def _document(replay: Replay) -> dict[str, Any]:
    """The file beside the tables: what holds for the trace as a whole."""
    trace, fidelity = replay.trace, replay.layout.fidelity
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "tool": f"tracedbg {__version__}",
        "events": trace.count,
        "cpus": trace.cpus,
        "clock_hz": trace.clock_hz or None,
        "unfinished": trace.unfinished,
        "returns_recorded": bool(fidelity & Fidelity.RETURNS),
        "ss_zeroed": bool(fidelity & Fidelity.SS_ZEROED),
        "inferred": bool(fidelity & Fidelity.INFERRED),
        "counts": dict(sorted(facts.count_rows(replay.stats()))),
        "meta": dict(facts.meta_rows(trace)),
    }
