"""A trace and its verdict as an SQLite database. help/sqlite.md documents it, sqlite_schema.py declares it."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple
from itertools import compress
from typing import TYPE_CHECKING, Any

from tracedbg import __version__
from tracedbg.describe import SETTLE_WORDS, Words
from tracedbg.errors import UsageError
from tracedbg.export import facts, sqlite_schema
from tracedbg.export.lives import batches
from tracedbg.export.records import DELIVERIES, KNOWN_BITS, Records, payload, records
from tracedbg.layout import REGION_READS, REGION_STACK, REGION_STORES, REGION_USER, Fidelity
from tracedbg.replay import Lives, Replay
from tracedbg.state import NO_EVENT, EventFlag, FrameStatus, Kind, Known, Settle, Source
from tracedbg.symbols import Symbols
from tracedbg.text import clean
from tracedbg.trace import Trace

if TYPE_CHECKING:
    from tracedbg.formats import WriterOptions

OLDEST = (3, 37, 0)  # of the library: STRICT tables
PAGE = 8192
CACHE = 64 << 10  # KiB of pages in memory; what is larger goes to the file
AT_ONCE = 8  # rows of one statement
STEPS = 1_000_000  # of SQLite's machine between two looks for a Ctrl-C

Row = tuple[Any, ...]

_REGIONS = {REGION_STACK: "stack", REGION_USER: "user", REGION_STORES: "stores", REGION_READS: "reads"}


def write(trace: Trace, path: str, options: WriterOptions) -> None:
    """As registry.Writer."""
    if sqlite3.sqlite_version_info < OLDEST:
        raise UsageError(f"--to sqlite needs SQLite 3.37 or later; Python has {sqlite3.sqlite_version}")
    words = Words(trace, options.symbols)
    database = sqlite3.connect(path, isolation_level=None)
    try:
        with Replay(trace, max_snapshots=2) as replay:  # nobody goes back
            _fill(database, replay, words, options)
    except sqlite3.Error as error:
        raise _as_os_error(error) from None
    finally:
        database.close()


def _as_os_error(error: sqlite3.Error) -> BaseException:
    """A full disk as the OSError that it is."""
    name = getattr(error, "sqlite_errorname", "")
    if name == "SQLITE_INTERRUPT":
        return KeyboardInterrupt()
    if name == "SQLITE_FULL":
        return OSError(errno.ENOSPC, "no space left on device")
    return OSError(errno.EIO, f"SQLite: {clean(str(error))}")


def _fill(database: sqlite3.Connection, replay: Replay, words: Words, options: WriterOptions) -> None:
    trace = replay.trace
    # The file is nobody's until it is whole, and thrown away if it does not become so: no journal.
    for setting in (
        f"page_size = {PAGE}", "journal_mode = OFF", "synchronous = OFF", "locking_mode = EXCLUSIVE", f"cache_size = -{CACHE}",
    ):  # fmt: skip
        database.execute(f"PRAGMA {setting}")
    database.execute(f"PRAGMA application_id = {sqlite_schema.APPLICATION_ID}")
    database.execute(f"PRAGMA user_version = {sqlite_schema.VERSION}")
    database.set_progress_handler(lambda: 0, STEPS)  # in which Python notices a signal
    database.execute("BEGIN")
    _run(database, sqlite_schema.TABLES)
    names: set[tuple[int, int, int]] = set()
    done = 0
    for lives in batches(replay, options.progress):
        stretch = records(trace, done, replay.scanned)
        done = replay.scanned
        if len(stretch):
            _EVENTS.run(database, _event_columns(stretch))
            names |= _deliveries(stretch)
            _insert(database, "bytes", _byte_rows(trace, words, stretch))
        if len(lives):
            _FRAMES.run(database, _frame_columns(lives))
    _insert(database, "names", sorted((*key, facts.delivery_name(words, *key)) for key in names))
    _findings(database, replay, words)
    _facts(database, replay, words, options)
    _run(database, sqlite_schema.INDEXES)
    _run(database, sqlite_schema.VIEWS)
    database.execute("COMMIT")


def _run(database: sqlite3.Connection, script: str) -> None:
    """The statements of a script, in the transaction that is open (executescript() would end it)."""
    for statement in script.split(";\n"):
        if statement.strip():
            database.execute(statement)


def _insert(database: sqlite3.Connection, table: str, rows: Iterable[Row]) -> None:
    """Rows of few columns, all of them; numbers may be unsigned."""
    for row in rows:
        marks = ", ".join("?" * len(row))
        database.execute(f"INSERT INTO {table} VALUES ({marks})", [_signed(v) if isinstance(v, int) else v for v in row])


def _signed(value: int) -> int:
    """The same 64 bits as SQLite has them."""
    return value - (1 << 64) if value >= 1 << 63 else value


class _Insert:
    """Rows from columns. `values`: SQL for each column of the table, where `{n}` is item n of `width` that a row comes with."""

    def __init__(self, table: str, values: list[str], width: int) -> None:
        row = f"({', '.join(values)})"
        rows = [row.format(*(f"?{width * k + n}" for n in range(1, width + 1))) for k in range(AT_ONCE)]
        self._one, self._many = (f"INSERT INTO {table} VALUES {', '.join(rows[:count])}" for count in (1, AT_ONCE))

    def run(self, database: sqlite3.Connection, columns: list[Sequence[int]]) -> None:
        """Insert them; most of them several at once, as every statement takes its time."""
        end = len(columns[0]) // AT_ONCE * AT_ONCE
        database.executemany(self._many, zip(*(c[k:end:AT_ONCE] for k in range(AT_ONCE) for c in columns), strict=True))
        database.executemany(self._one, zip(*(c[end:] for c in columns), strict=True))


# -- events ---------------------------------------------------------------------------------------------------------

_EVENT_COLUMNS = (
    "kind", "cpu", "time", "arg", "source", "rip", "cs", "rflags", "rsp", "ss", "addr", "value", "code", "source_index", "flags",
    "known",
)  # fmt: skip


def _event_values() -> list[str]:
    """A record as it stands; SQLite itself makes NULL of what is not known, faster than Python could."""
    place = {name: f"{{{n}}}" for n, name in enumerate(_EVENT_COLUMNS, 1)}
    values = ["{0}"]
    for name in _EVENT_COLUMNS[:-1]:
        bit = KNOWN_BITS.get(name)
        test = "" if bit is None else f"{place['known']} & {int(bit)}"
        if name == "value":
            test += f" AND NOT {place['flags']} & {int(EventFlag.BYTES)}"  # it is an offset then
        shown = f"{place[name]} & 127" if name == "flags" else place[name]
        values.append(f"CASE WHEN {test} THEN {shown} END" if test else shown)
    return values


_EVENTS = _Insert("events", _event_values(), len(_EVENT_COLUMNS) + 1)


def _event_columns(stretch: Records) -> list[Sequence[int]]:
    numbers = range(stretch.first, stretch.first + len(stretch))
    return [numbers, *(stretch.column(name, signed=True).tolist() for name in _EVENT_COLUMNS)]


def _deliveries(stretch: Records) -> set[tuple[int, int, int]]:
    """Vector, source and whether it is an INT of one byte, of the deliveries: what their names depend on."""
    chosen = list(map(DELIVERIES.__contains__, stretch.column("kind").tolist()))
    columns = (compress(stretch.column(name).tolist(), chosen) for name in ("known", "arg", "source", "code"))
    found: set[tuple[int, int, int]] = set()
    for known, arg, source, code in set(zip(*columns, strict=True)):
        if known & Known.ARG:
            number = source if known & Known.SOURCE else 0
            found.add((arg, number, int(number == Source.SOFT_INT and bool(known & Known.CODE) and code == 1)))
    return found


def _byte_rows(trace: Trace, words: Words, stretch: Records) -> Iterator[Row]:
    flags = stretch.column("flags").tolist()
    for index in compress(range(stretch.first, stretch.first + len(stretch)), (f & EventFlag.BYTES for f in flags)):
        data = payload(trace, index)
        if data is not None:
            mark = trace.event(index).kind is Kind.MARK
            yield index, len(data), data.hex(), clean(data.decode("utf-8", "replace"), facts.MAX_TEXT) if mark else None


# -- frames ---------------------------------------------------------------------------------------------------------

_SAVED = {
    "rip": Known.RIP, "cs": Known.CS, "rflags": Known.RFLAGS, "rsp": Known.RSP, "ss": Known.SS, "code": Known.CODE,
}  # fmt: skip
_FRAME_FIELDS = (
    "frame.entry", "frame.cpu", "frame.vector", "frame.source", "frame.ist", "frame.stack_lo", "frame.stack_hi", "frame.lo",
    "frame.hi", *(f"frame.saved.{name}" for name in _SAVED), "frame.gate_type", "frame.fred", "frame.level",
    "frame.from_level", "frame.gs", "frame.victim", "end", "settle", "overwritten", "status", "finding",
)  # fmt: skip


def _frame_values() -> list[str]:
    known = f"{{{len(_FRAME_FIELDS)}}}"
    values = []
    for n, field in enumerate(_FRAME_FIELDS):
        value = f"{{{n}}}"
        if field.startswith("frame.saved."):
            value = f"CASE WHEN {known} & {int(_SAVED[field.rpartition('.')[2]])} THEN {value} END"
        elif field in ("frame.victim", "end", "overwritten", "finding"):
            value = f"nullif({value}, {NO_EVENT})"
        elif field == "frame.gs":
            value = f"CASE WHEN {value} < 2 THEN {value} END"
        elif field == "settle":
            value = f"CASE WHEN {value} < {len(Settle)} THEN {value} END"
        values.append(value)
    return values


_FRAMES = _Insert("frames", _frame_values(), len(_FRAME_FIELDS) + 1)


def _frame_columns(lives: Lives) -> list[Sequence[int]]:
    return [lives.column(name, signed=True).tolist() for name in (*_FRAME_FIELDS, "frame.saved.known")]


# -- findings and facts -----------------------------------------------------------------------------------------------


def _findings(database: sqlite3.Connection, replay: Replay, words: Words) -> None:
    for finding in facts.all_findings(replay):
        _insert(database, "findings", [astuple(facts.finding_row(finding, words))])
        steps = enumerate(words.finding_chain(finding), 1)
        _insert(database, "finding_steps", ((finding.number, n, step.event, step.text) for n, step in steps))
        rows = words.bytes_rows(finding) if finding.slots else ()
        _insert(
            database, "finding_bytes",
            ((finding.number, r.addr, r.slot, r.own, r.now, int(r.overwritten), int(r.differs)) for r in rows),
        )  # fmt: skip


def _facts(database: sqlite3.Connection, replay: Replay, words: Words, options: WriterOptions) -> None:
    trace, layout = replay.trace, replay.layout
    fidelity = layout.fidelity
    head = (
        sqlite_schema.VERSION, f"tracedbg {__version__}", trace.count, trace.cpus, trace.clock_hz or None, int(trace.unfinished),
        *(int(bool(fidelity & bit)) for bit in (Fidelity.RETURNS, Fidelity.SS_ZEROED, Fidelity.INFERRED)),
    )  # fmt: skip
    tables: dict[str, Callable[[], Iterable[Row]]] = {
        "trace": lambda: [head],
        "meta": lambda: facts.meta_rows(trace),
        "counts": lambda: sorted(facts.count_rows(replay.stats())),
        "kinds": lambda: ((int(kind), facts.word(kind)) for kind in Kind if kind),
        "sources": lambda: ((int(source), facts.word(source)) for source in Source),
        "settles": lambda: ((int(why), facts.word(why), SETTLE_WORDS[why]) for why in Settle),
        "statuses": lambda: ((int(status), facts.word(status)) for status in FrameStatus),
        "symbols": lambda: _symbol_rows(Symbols.from_bytes(options.names, trace.path)),
        "cpus": lambda: _cpu_rows(trace),
        "gates": lambda: _gate_rows(trace),
        "regions": lambda: _region_rows(trace, words),
    }
    for name, rows in tables.items():
        _insert(database, name, rows())


def _symbol_rows(symbols: Symbols) -> Iterator[Row]:
    # In the order of SQLite's numbers, as the table is.
    for start, end, name in sorted(symbols, key=lambda entry: _signed(entry[0])):
        head, bracket, module = name.partition(" [")
        yield start, end - 1, head, module.removesuffix("]") if bracket else None


def _cpu_rows(trace: Trace) -> Iterator[Row]:
    layout = trace.layout
    for cpu in range(trace.cpus):
        tables = layout.cpus[cpu] if cpu < len(layout.cpus) else None
        tss = None if tables is None or tables.tss is None else layout.tss[tables.tss]
        tops = (None,) * 8 if tss is None else (tss.rsp[0], *tss.ist[1:])
        fred = None if tables is None or tables.fred is None else int(tables.fred.on)
        yield cpu, None if tss is None else tss.base, None if tables is None else tables.idt, *tops, fred


def _gate_rows(trace: Trace) -> Iterator[Row]:
    for number, idt in enumerate(trace.layout.idts):
        for vector, g in sorted(idt.gates.items()):
            yield number, vector, idt.base, g.offset, g.selector, g.ist, g.type, g.dpl, int(g.present)


def _region_rows(trace: Trace, words: Words) -> Iterator[Row]:
    for number, r in enumerate(trace.layout.regions):
        stack = r.kind == REGION_STACK
        name = words.stack_names.get(r.slot) if stack else None
        yield (
            number, _REGIONS.get(r.kind, "other"), r.cpu if stack else None, r.slot if stack else None, name, r.lo, r.hi,
            int(r.assumed),
        )  # fmt: skip
