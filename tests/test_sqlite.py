"""The SQLite export: every value beside the trace, the lives and the report; the queries of its page; other programs read it."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from randtrace import plan_of, random_trace
from samples import DO_NMI, IST_MC, IST_NMI, LAYOUT, NMI_RSP, SYMBOLS, fill_race, race, write_race

from tracedbg import wire
from tracedbg.describe import SETTLE_WORDS, Words
from tracedbg.errors import FormatError, UsageError
from tracedbg.export import sqlite, sqlite_schema
from tracedbg.export.lives import lives
from tracedbg.formats import WriterOptions, open_input
from tracedbg.replay import Replay
from tracedbg.state import EventFlag, Kind, Known, Settle, Source
from tracedbg.trace import Trace
from tracedbg.writer import TraceWriter, build

ROOT = Path(__file__).parent.parent
TRACES = sorted((ROOT / "traces").glob("*.tdbg"))
CASES = sorted((ROOT / "tests" / "cases").glob("*.case"))
Run = Callable[..., subprocess.CompletedProcess[str]]


def silent(done: int, total: int) -> None:
    assert 0 < done <= total


def exported(trace: Trace, path: Path) -> sqlite3.Connection:
    path.unlink(missing_ok=True)
    path.touch()
    sqlite.write(trace, str(path), WriterOptions(names=trace.symbols, symbols=None, progress=silent))
    return sqlite3.connect(path)


def unsigned(value: int | None) -> int | None:
    return None if value is None else value % (1 << 64)


EVENT_COLUMNS = (
    "cpu", "time", "arg", "source", "rip", "cs", "rflags", "rsp", "ss", "addr", "value", "code", "source_index",
)  # fmt: skip


def slow_event(record: bytes) -> tuple[Any, ...]:
    """A row of `events` from 64 bytes, as tdb.h says."""
    fields = wire.EVENT.parse(record)
    row: list[Any] = [fields.kind]
    for name in EVENT_COLUMNS:
        known = fields.known & Known[name.upper()]
        if name == "value" and fields.flags & EventFlag.BYTES:
            known = 0
        row.append(fields[name] if known else None)
    return (*row, fields.flags & 0x7F)


def check(trace: Trace, path: Path) -> None:
    """Every value of a database beside what it was made from."""
    with closing(exported(trace, path)) as db, Replay(trace) as replay:
        columns = ", ".join(EVENT_COLUMNS)
        rows = db.execute(f"SELECT event, kind, {columns}, flags FROM events ORDER BY event").fetchall()
        assert [row[0] for row in rows] == list(range(trace.count))
        data = bytes(trace.events)
        for n, row in enumerate(rows):
            assert tuple(unsigned(v) for v in row[1:]) == slow_event(data[n * 64 : n * 64 + 64]), f"event {n}"

        told = {life.frame.entry: life for life in lives(replay, silent)}
        db.row_factory = sqlite3.Row
        frames = db.execute("SELECT * FROM frames ORDER BY event").fetchall()
        assert [row["event"] for row in frames] == sorted(told)
        for row in frames:
            life = told[row["event"]]
            f = life.frame
            assert (row["cpu"], row["vector"], row["source"], row["ist"]) == (f.cpu, f.vector, f.source, f.ist)
            assert [unsigned(row[n]) for n in ("stack_lo", "stack_hi", "lo", "hi")] == [f.stack_lo, f.stack_hi, f.lo, f.hi]
            saved = tuple(unsigned(row[n]) for n in ("rip", "cs", "rflags", "rsp", "ss", "error_code"))
            assert saved == f.saved.slots()
            assert (row["gate_type"], row["fred"], row["level"]) == (f.gate_type, f.fred, f.level)
            assert (row["from_level"], row["kernel_gs"], row["overwrote"]) == (f.from_level, f.kernel_gs, f.victim)
            assert (row["ended"], row["settle"], row["overwritten"]) == (life.end, life.settle, life.overwritten)
            assert (row["status"], row["finding"]) == (life.status, life.finding)

        check_findings(db, replay, Words(trace))
        stats = replay.stats()
        counts = dict(tuple(row) for row in db.execute("SELECT name, value FROM counts"))
        assert counts["deliveries"] == stats.deliveries and counts["unjudged"] == stats.unjudged
        assert counts["gaps"] == stats.gaps and counts["findings"] == stats.findings
        head = db.execute("SELECT events, cpus FROM trace").fetchone()
        assert tuple(head) == (trace.count, trace.cpus)


def check_findings(db: sqlite3.Connection, replay: Replay, words: Words) -> None:
    findings = replay.findings()
    rows = db.execute("SELECT * FROM findings ORDER BY finding").fetchall()
    assert len(rows) == len(findings)
    for row, f in zip(rows, findings, strict=True):
        assert row["message"] == words.finding_line(f)
        assert (row["event"], row["count"], row["consumer"], row["settled"]) == (f.event, f.count, f.consumer, f.settled)
        assert row["victim"] == (None if f.victim is None else f.victim.entry)
        assert row["writer"] == (None if f.writer is None else f.writer.entry)
        assert (unsigned(row["lo"]), unsigned(row["hi"])) == ((f.lo, f.hi) if f.hi > f.lo else (None, None))
        popped = [unsigned(row[f"popped_{n}"]) for n in ("rip", "cs", "rflags", "rsp", "ss")]
        assert popped == ([None] * 5 if f.popped is None else list(f.popped.slots()[:5]))
        steps = db.execute("SELECT event, text FROM finding_steps WHERE finding = ? ORDER BY step", (f.number,)).fetchall()
        assert [tuple(s) for s in steps] == [(s.event, s.text) for s in words.finding_chain(f)]
        held = db.execute("SELECT * FROM finding_bytes WHERE finding = ? ORDER BY slot", (f.number,)).fetchall()
        expected = sorted(words.bytes_rows(f), key=lambda r: r.slot) if f.slots else []
        assert [(unsigned(h["addr"]), h["slot"], unsigned(h["own"]), unsigned(h["now"])) for h in held] == [
            (r.addr, r.slot, r.own, r.now) for r in expected
        ]


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.name)
def test_every_value_of_the_samples(path: Path, tmp_path: Path) -> None:
    with open_input(str(path)) as trace:
        check(trace, tmp_path / "x.sqlite")


def test_every_value_of_cases_and_random_traces(tmp_path: Path) -> None:
    for path in CASES[::6]:
        with open_input(str(path)) as trace:
            check(trace, tmp_path / "x.sqlite")
    for seed in range(25):
        with random_trace(plan_of(seed)) as trace:
            check(trace, tmp_path / "x.sqlite")


def test_records_of_any_bits(tmp_path: Path) -> None:
    """Also those that make no sense: kinds and sources without a name, all known bits, offsets past the payload."""
    r = random.Random(7)

    def fill(writer: TraceWriter) -> None:
        for _ in range(500):
            numbers = [r.choice((0, 1, r.getrandbits(64), (1 << 64) - 1, 1 << 63)) for _ in range(5)]
            small = [r.getrandbits(32), r.choice((0, 3, 5000)), r.getrandbits(32)]
            words = [r.choice((0, 7, 0xFFFF)), r.getrandbits(16), r.getrandbits(16), r.getrandbits(16)]
            last = [r.choice((1, 3, 4, 15, 32, 77)), r.getrandbits(8), r.choice((1, 2, 4, 200)), r.getrandbits(8)]
            writer.append(wire.EVENT_PACK.pack(*numbers, *small, *words, *last))
        writer.payload(bytes(100))

    with build(fill, cpus=3) as trace:
        check(trace, tmp_path / "x.sqlite")
        with closing(sqlite3.connect(tmp_path / "x.sqlite")) as db:
            assert len(db.execute("SELECT * FROM v_events").fetchall()) == 500
            held = db.execute("SELECT length, hex FROM bytes").fetchall()
            assert held and all(length <= 100 and len(text) == 2 * length for length, text in held)


def test_the_race_by_hand(tmp_path: Path) -> None:
    with race(2) as trace, closing(exported(trace, tmp_path / "x.sqlite")) as db:
        assert db.execute("SELECT event, kind, name, source, symbol, rsp, source_index FROM v_events").fetchall()[:3] == [
            (0, "deliver", "NMI", "nmi", "default_idle+0xc6", "0xffff8300bffd7e98", 569),
            (1, "deliver", "#MC", "mc", "do_nmi+2", "0xffff8300bffd2f48", 570),
            (2, "return", "IRET", None, None, "0xffff8300bffd1fd8", None),
        ]
        assert db.execute("SELECT event, name, stack, ended, why, status, overwritten, rule FROM v_frames").fetchall() == [
            (0, "NMI", "IST2", 5, "returned", "clobbered", 3, "frame-consumed-corrupt"),
            (1, "#MC", "IST1", 2, "returned", "live", None, None),
            (3, "NMI", "IST2", 4, "returned", "live", None, None),
        ]
        # Literals of 64 bits are the numbers that are stored.
        found = "SELECT event FROM frames WHERE hi = 0xffff8300bffd3000 AND rip BETWEEN 0xffff82d040000000 AND 0xffff82d050000000"
        assert db.execute(found).fetchall() == [(0,), (3,)]
        assert db.execute("SELECT rsp, ss FROM events WHERE event = 2").fetchall() == [(IST_MC - 40 - (1 << 64), 0)]
        assert db.execute("SELECT time, addr FROM events WHERE event = 0").fetchall() == [(None, None)]
        assert db.execute("SELECT cpu, ist1, ist2, ist3, idt FROM cpus").fetchall() == [
            (0, IST_MC - (1 << 64), IST_NMI - (1 << 64), None, 0)
        ]
        assert db.execute("SELECT kind, name, slot FROM regions WHERE slot = 2").fetchall() == [("stack", "NMI", 2)]
        assert db.execute("SELECT name, words FROM settles WHERE settle = 0").fetchall() == [
            ("return", SETTLE_WORDS[Settle.RETURN])
        ]
        assert db.execute("PRAGMA user_version").fetchone() == (sqlite_schema.VERSION,)
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert (tmp_path / "x.sqlite").read_bytes()[68:72] == b"tdbg"


def test_findings_carry_the_words_of_replay(run_cli: Run, tmp_path: Path) -> None:
    for name in ("xen-nmi-mce-nmi.tdbg", "linux-nested-nmi.tdbg", "case-xsa-260.tdbg", "double-fault.tdbg"):
        done = run_cli("replay", "--format", "json", "--exit-zero", ROOT / "traces" / name, code=0)
        report = json.loads(done.stdout)["traces"][0]["findings"]
        run_cli("convert", "--force", ROOT / "traces" / name, "x.db", code=0)
        with closing(sqlite3.connect(tmp_path / "x.db")) as db:
            columns = ("rule", "severity", "evidence", "event", "message", "signature")
            rows = db.execute(f"SELECT {', '.join(columns)} FROM findings").fetchall()
            assert rows == [tuple(f[name] for name in columns) for f in report]
            for number, f in enumerate(report):
                steps = db.execute("SELECT event, text FROM finding_steps WHERE finding = ?", (number,)).fetchall()
                assert steps == [(step["event"], step["text"]) for step in f["chain"]]
                words = db.execute("SELECT slots, cause, settled_by FROM findings WHERE finding = ?", (number,)).fetchone()
                assert words == (" ".join(f["slots"]), f["cause"], f["settled_by"])


# -- the page -----------------------------------------------------------------------------------------------------------


def queries() -> dict[str, str]:
    """The queries of help/sqlite.md by the name in their first line."""
    page = (ROOT / "tracedbg" / "help" / "sqlite.md").read_text(encoding="utf-8")
    return {block.partition("\n")[0].removeprefix("-- "): block for block in re.findall(r"```sql\n(.*?)```", page, re.DOTALL)}


QUERIES = queries()


@pytest.fixture(scope="module")
def databases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, sqlite3.Connection]]:
    folder = tmp_path_factory.mktemp("sqlite")
    found = {}
    for path in TRACES:
        with open_input(str(path)) as trace:
            found[path.stem] = exported(trace, folder / f"{path.stem}.sqlite")
    yield found
    for db in found.values():
        db.close()


@pytest.mark.parametrize("name", QUERIES)
def test_the_queries_of_the_page_run(name: str, databases: dict[str, sqlite3.Connection]) -> None:
    assert sum(len(db.execute(QUERIES[name]).fetchall()) for db in databases.values()) > 0 or name == "nmi-in-mc-entry"


def test_what_some_queries_answer(databases: dict[str, sqlite3.Connection]) -> None:
    xen = databases["xen-nmi-mce-nmi"]
    assert xen.execute(QUERIES["interrupted-handlers"]).fetchall() == [
        (2, "NMI", "IST2", None), (3, "#MC", "IST1", "NMI at event 2"), (5, "NMI", "IST2", "NMI at event 2"),
    ]  # fmt: skip
    assert xen.execute(QUERIES["overwritten"]).fetchall() == [
        (2, "NMI", "IST2", 5, "NMI", "clobbered", 7, "returned", "frame-consumed-corrupt")
    ]
    assert xen.execute(QUERIES["depth"]).fetchall() == [(0, 2)]
    assert xen.execute(QUERIES["deliveries"]).fetchall() == [("NMI", 2, 2), ("#MC", 1, 1)]
    assert [row[:3] for row in xen.execute(QUERIES["findings"])] == [
        (1, "error", "frame-consumed-corrupt"), (2, "error", "resume-loop"), (0, "warning", "reentry-window"),
    ]  # fmt: skip


def test_nmis_that_interrupted_the_entry_of_a_machine_check(tmp_path: Path) -> None:
    entry = 0xFFFF82D040201F00  # the handler of gate 18 in samples.LAYOUT

    def fill(writer: TraceWriter) -> None:
        writer.layout = LAYOUT
        kernel = {"cpu": 0, "cs": 0xE008, "ss": 0, "rflags": 0x46}
        writer.event(Kind.DELIVER, rip=DO_NMI, rsp=NMI_RSP + 0x4000, arg=18, source=Source.MC, **kernel)
        writer.event(Kind.DELIVER, rip=entry + 4, rsp=IST_MC - 40, arg=2, source=Source.NMI, **kernel)  # this one
        writer.event(Kind.RETURN, cpu=0, rsp=IST_NMI - 40, addr=entry + 4, value=IST_MC - 40, rflags=0x46, cs=0xE008, ss=0)
        writer.event(Kind.DELIVER, rip=entry + 64, rsp=IST_MC - 96, arg=2, source=Source.NMI, **kernel)  # past the entry
        writer.event(Kind.DELIVER, rip=entry, rsp=IST_MC - 40, arg=2, source=Source.FIXED, **kernel)  # a fake one

    with build(fill) as trace, closing(exported(trace, tmp_path / "x.sqlite")) as db:
        assert db.execute(QUERIES["nmi-in-mc-entry"]).fetchall() == [(1, 0, 0, f"{entry + 4:#x}", 4)]


def test_the_page_names_every_table_and_view(tmp_path: Path) -> None:
    page = (ROOT / "tracedbg" / "help" / "sqlite.md").read_text(encoding="utf-8")
    with race() as trace, closing(exported(trace, tmp_path / "x.sqlite")) as db:
        names = [row[0] for row in db.execute("SELECT name FROM sqlite_schema WHERE type IN ('table', 'view')")]
        assert len(names) > 20 and all(f"`{name}`" in page for name in names)


def test_queries_take_the_indexes(tmp_path: Path) -> None:
    with race() as trace, closing(exported(trace, tmp_path / "x.sqlite")) as db:
        for query, index in (
            ("SELECT * FROM events WHERE kind = 1 AND arg = 18", "events_delivered"),
            ("SELECT * FROM events WHERE time BETWEEN 1 AND 2", "events_time"),
            ("SELECT * FROM frames WHERE vector = 2", "frames_vector"),
            ("SELECT * FROM frames WHERE overwritten = 3", "frames_overwritten"),
            ("SELECT * FROM v_frames WHERE event = 3", "INTEGER PRIMARY KEY"),
        ):
            plan = " ".join(row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {query}"))
            assert index in plan and "SCAN frames" not in plan, plan


# -- the command line ---------------------------------------------------------------------------------------------------


def test_the_command_line_of_sqlite_reads_it(run_cli: Run, tmp_path: Path) -> None:
    program = shutil.which("sqlite3")
    if program is None:
        pytest.skip("no sqlite3")
    write_race(tmp_path / "race.tdbg", returns=2)
    run_cli("convert", "race.tdbg", "race.sqlite", code=0)
    for query, answer in (
        ("SELECT name, symbol FROM v_events WHERE event = 1", "#MC|do_nmi+2"),
        ("SELECT count(*) FROM frames", "3"),
        ("SELECT rule FROM findings WHERE severity = 'error'", "frame-consumed-corrupt\nresume-loop"),
    ):
        done = subprocess.run(
            [program, "-init", os.devnull, "race.sqlite", query], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == answer
    schema = subprocess.run([program, "race.sqlite", ".schema frames"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "-- the first delivery that stored over it while it was open" in schema.stdout


def test_stdout_force_suffixes_and_the_same_bytes(run_cli: Run, tmp_path: Path) -> None:
    write_race(tmp_path / "race.tdbg")
    run_cli("convert", "race.tdbg", "a.sqlite", code=0)
    first = (tmp_path / "a.sqlite").read_bytes()
    refused = run_cli("convert", "race.tdbg", "a.sqlite", code=2)
    assert refused.stderr == "tracedbg: a.sqlite exists; --force overwrites it\n"
    run_cli("convert", "--force", "race.tdbg", "a.sqlite", code=0)
    run_cli("convert", "race.tdbg", "b.db", code=0)
    run_cli("convert", "race.tdbg", "--to", "sqlite", "c", code=0)
    piped = run_cli("convert", "race.tdbg", "--to", "sqlite", "-", code=0, binary=True)
    assert {(tmp_path / name).read_bytes() for name in ("a.sqlite", "b.db", "c")} == {first} == {piped.stdout}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.sqlite", "b.db", "c", "race.tdbg"]
    assert re.search(r"^sqlite +- +x +\.sqlite +", run_cli("convert", "--list", code=0).stdout, re.MULTILINE)


def test_a_full_disk_leaves_nothing(run_cli: Run, tmp_path: Path) -> None:
    write_race(tmp_path / "race.tdbg")
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "from tracedbg.cli import main\nsys.exit(main(['convert', 'race.tdbg', 'x.sqlite']))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("tracedbg: x.sqlite: ") and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["race.tdbg"]


def test_names_cannot_act_on_a_terminal(tmp_path: Path) -> None:
    evil = "\x1b]0;x\x07\u202e"

    def fill(writer: TraceWriter) -> None:
        fill_race(writer)
        writer.symbols = SYMBOLS.replace(b"do_nmi", b"do\x1b[31mnmi")
        writer.layout = replace(LAYOUT, names={1: "MC", 2: evil})
        writer.meta = {"damage": evil, evil: {evil: evil}, "deep": [1, [2, "\x7f"]]}
        data = evil.encode()
        writer.event(Kind.MARK, cpu=0, value=writer.payload(data), code=len(data), flags=EventFlag.BYTES)
        writer.event(Kind.WRITE, cpu=0, addr=8, value=0, code=len(data), flags=EventFlag.BYTES)

    with build(fill) as trace, closing(exported(trace, tmp_path / "x.sqlite")) as db:
        dump = "\n".join(db.iterdump())
        assert all(ch == "\n" or (ch.isprintable() and ch.isascii()) for ch in dump)
        assert dict(db.execute("SELECT name, value FROM meta"))["damage"] == "?]0;x??"
        held = evil.encode().hex()
        assert db.execute("SELECT hex, text FROM bytes").fetchall() == [(held, "?]0;x??"), (held, None)]
        assert db.execute("SELECT name FROM symbols WHERE name LIKE 'do%'").fetchall() == [("do?[31mnmi",)]


def test_damage_and_what_is_unknown_stay_told(run_cli: Run, tmp_path: Path) -> None:
    def fill(writer: TraceWriter) -> None:
        writer.meta = {"damage": "cut short at offset 0x40", "fidelity": {"returns": "none"}}
        writer.event(Kind.DELIVER, cpu=0, arg=2, source=Source.NMI)
        writer.event(Kind.GAP, value=7)

    with build(fill, cpus=2) as trace, closing(exported(trace, tmp_path / "x.sqlite")) as db:
        assert db.execute("SELECT name, value FROM meta").fetchall() == [
            ("damage", "cut short at offset 0x40"), ("fidelity", '{"returns": "none"}'),
        ]  # fmt: skip
        assert db.execute("SELECT cpu, rip, rsp, value, code FROM events").fetchall() == [
            (0, None, None, None, None), (None, None, None, 7, None),
        ]  # fmt: skip
        assert db.execute("SELECT value FROM counts WHERE name IN ('gaps', 'unjudged') ORDER BY name").fetchall() == [(1,), (1,)]
        assert db.execute("SELECT cpu, rule FROM findings").fetchall() == [(None, "trace-gap")]
        assert db.execute("SELECT clock_hz, returns_recorded FROM trace").fetchall() == [(None, 0)]
    unfinished = tmp_path / "live.tdbg"
    writer = TraceWriter(unfinished, atomic=False)
    fill_race(writer)
    writer.flush()
    run_cli("convert", "live.tdbg", "live.sqlite", code=0)
    with closing(sqlite3.connect(tmp_path / "live.sqlite")) as db:
        assert db.execute("SELECT unfinished, events FROM trace").fetchall() == [(1, 4)]


def test_an_empty_trace(tmp_path: Path) -> None:
    with build(lambda writer: None) as trace, closing(exported(trace, tmp_path / "x.sqlite")) as db:
        assert db.execute("SELECT events FROM trace").fetchone() == (0,)
        for table in ("events", "frames", "findings", "v_events", "v_frames", "v_findings"):
            assert db.execute(f"SELECT * FROM {table}").fetchall() == []


def test_an_old_library_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sqlite.sqlite3, "sqlite_version_info", (3, 36, 0))
    with race() as trace, pytest.raises(UsageError, match=r"needs SQLite 3\.37"):
        exported(trace, tmp_path / "x.sqlite")


def test_truncated_and_mutated_traces_end_in_a_database_or_an_error(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "race.tdbg", atomic=False)  # not finished: no checksum hides the events
    fill_race(writer, returns=2)
    writer.flush()
    whole = (tmp_path / "race.tdbg").read_bytes()
    r = random.Random(3)
    wrote = 0
    for n in range(300):
        data = bytearray(whole)
        if n % 2:
            data = data[: r.randrange(len(data) - 7 * 64 if n % 4 == 1 else 0, len(data))]
        else:
            for _ in range(r.randrange(1, 4)):
                data[r.randrange(len(data) - 6 * 64 if n % 4 else 0, len(data))] = r.getrandbits(8)
        try:
            trace = Trace.from_bytes(bytes(data))
        except FormatError:
            continue
        with trace:
            try:
                with closing(exported(trace, tmp_path / "x.sqlite")) as db:
                    assert db.execute("SELECT count(*) FROM v_frames").fetchone()[0] <= trace.count
                    wrote += 1
            except FormatError:  # of its symbols
                continue
    assert 150 < wrote < 300
