"""The Parquet export, read again with pyarrow: every value beside the trace, the lives and the findings."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from randtrace import plan_of, random_trace
from samples import LAYOUT, SYMBOLS, fill_race, race, write_race

from tracedbg import wire
from tracedbg.describe import Words
from tracedbg.formats import WriterOptions, open_input
from tracedbg.replay import LIFE_SIZE, Replay
from tracedbg.state import EventFlag, FrameStatus, Kind, Known, Settle, Source
from tracedbg.trace import Trace
from tracedbg.writer import TraceWriter, build

ROOT = Path(__file__).parent.parent
TRACES = sorted((ROOT / "traces").glob("*.tdbg"))
CASES = sorted((ROOT / "tests" / "cases").glob("*.case"))
Run = Callable[..., subprocess.CompletedProcess[str]]

pq = pytest.importorskip("pyarrow.parquet")


def word(member: Any) -> str:
    return str(member.name.lower().replace("_", "-"))


def exported(trace: Trace, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of the three files."""
    from tracedbg.export import parquet

    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    parquet.write(trace, str(folder), WriterOptions(names=trace.symbols, symbols=None, progress=lambda done, total: None))
    assert sorted(path.name for path in folder.iterdir()) == [
        "_tracedbg.json", "events.parquet", "findings.parquet", "frames.parquet",
    ]  # fmt: skip
    return {name: pq.read_table(folder / f"{name}.parquet").to_pylist() for name in ("events", "frames", "findings")}


FLAGS = {
    "failed": EventFlag.FAILED, "faulted": EventFlag.FAULTED, "damaged": EventFlag.PARTIAL, "external": EventFlag.EXT,
    "smm": EventFlag.SMM, "legacy": EventFlag.LEGACY,
}  # fmt: skip
FIELDS = ("time", "cpu", "arg", "rip", "cs", "rflags", "rsp", "ss", "addr", "value", "code", "source_index")


def slow_event(trace: Trace, words: Words, index: int) -> dict[str, Any]:
    """A row of events.parquet, from 64 bytes as tdb.h says, and the words of describe."""
    record = wire.EVENT.parse(bytes(trace.events[index * 64 : index * 64 + 64]))
    event = trace.event(index)
    row: dict[str, Any] = {"event": index}
    row["kind"] = word(event.kind) if event.kind else f"kind {record.kind}"
    for name in FIELDS:
        row[name] = record[name] if record.known & Known[name.upper()] else None
    if record.flags & EventFlag.BYTES:
        row["value"] = None
    number = record.source if record.known & Known.SOURCE else None
    row["source"] = None if number is None else word(Source(number)) if number in set(Source) else f"source {number}"
    delivery = event.kind in (Kind.DELIVER, Kind.RAISE) and event.known & Known.ARG
    row["name"] = words.delivery_name(event) if delivery else None
    row["symbol"] = words.symbol(row["rip"])
    row.update((name, bool(record.flags & bit)) for name, bit in FLAGS.items())
    row["bytes"] = row["text"] = None
    whole = Known.VALUE | Known.CODE
    if record.flags & EventFlag.BYTES and record.known & whole == whole and record.code <= 4096:
        data = bytes(trace.payload[record.value : record.value + record.code])
        if record.value + record.code <= len(trace.payload):
            row["bytes"] = data
            if event.kind is Kind.MARK:
                row["text"] = data.decode("ascii", "replace")
    return row


def check(trace: Trace, folder: Path) -> None:
    """Every value beside what it was made from."""
    rows = exported(trace, folder)
    words = Words(trace)
    assert len(rows["events"]) == trace.count
    for n, row in enumerate(rows["events"]):
        assert row == slow_event(trace, words, n)
    with Replay(trace) as replay:
        replay.journal(True)
        replay.scan_all()
        lives = [*replay.ended(), *replay.unended()]
        assert len(rows["frames"]) == len(lives)
        for row, life in zip(rows["frames"], lives, strict=True):
            f = life.frame
            saved = dict(zip(("rip", "cs", "rflags", "rsp", "ss", "error_code"), f.saved.slots(), strict=True))
            assert row == {
                "event": f.entry, "cpu": f.cpu, "vector": f.vector, "name": words.frame_kind(f), "source": word(f.source),
                "stack": words.frame_stack(f).removeprefix("the "), "ist": f.ist, "stack_lo": f.stack_lo, "stack_hi": f.stack_hi,
                "lo": f.lo, "hi": f.hi, "symbol": words.symbol(f.saved.rip), **saved, "gate_type": f.gate_type, "fred": f.fred,
                "level": f.level, "from_level": f.from_level, "kernel_gs": f.kernel_gs, "overwrote": f.victim, "ended": life.end,
                "settle": None if life.settle is None else word(life.settle), "overwritten": life.overwritten,
                "status": word(life.status), "finding": life.finding,
            }  # fmt: skip
        findings = replay.findings()
        assert len(rows["findings"]) == len(findings)
        for row, f in zip(rows["findings"], findings, strict=True):
            assert (row["finding"], row["event"], row["count"]) == (f.number, f.event, f.count)
            assert row["message"] == words.finding_line(f)
            assert row["cpu"] == (None if f.cpu == 0xFFFF else f.cpu)
            assert (row["lo"], row["hi"]) == ((f.lo, f.hi) if f.hi > f.lo else (None, None))
            assert (row["consumer"], row["settled"], row["cause_event"]) == (f.consumer, f.settled, f.cause_event)
            assert row["steps"] == [{"event": s.event, "text": s.text} for s in words.finding_chain(f)]
            expected = words.bytes_rows(f) if f.slots else ()
            assert [(w["addr"], w["slot"], w["own"], w["now"], w["differs"]) for w in row["words"]] == [
                (r.addr, r.slot, r.own, r.now, r.differs) for r in expected
            ]


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.name)
def test_every_value_of_the_samples(path: Path, tmp_path: Path) -> None:
    with open_input(str(path)) as trace:
        check(trace, tmp_path / "x")


def test_every_value_of_cases_and_random_traces(tmp_path: Path) -> None:
    for path in CASES[::6]:
        with open_input(str(path)) as trace:
            check(trace, tmp_path / "x")
    for seed in range(25):
        with random_trace(plan_of(seed)) as trace:
            check(trace, tmp_path / "x")


def test_records_of_any_bits(tmp_path: Path) -> None:
    r = random.Random(7)

    def fill(writer: TraceWriter) -> None:
        for _ in range(500):
            numbers = [r.choice((0, 1, r.getrandbits(64), (1 << 64) - 1, 1 << 63)) for _ in range(5)]
            small = [r.getrandbits(32), r.choice((0, 1, 3, 5000)), r.getrandbits(32)]
            words = [r.choice((0, 7, 0xFFFF)), r.getrandbits(16), r.getrandbits(16), r.getrandbits(16)]
            last = [r.choice((0, 1, 3, 4, 15, 32, 77)), r.getrandbits(8), r.choice((1, 2, 4, 200)), r.getrandbits(8)]
            writer.append(wire.EVENT_PACK.pack(*numbers, *small, *words, *last))
        writer.payload(b"x" * 100)

    with build(fill, cpus=3) as trace:
        check(trace, tmp_path / "x")


def test_row_groups_are_bounded_and_nothing_is_lost_between_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tracedbg.export import lives, parquet

    monkeypatch.setattr(lives, "CHUNK", 64)
    for rows in (128, 100, 1000):
        monkeypatch.setattr(parquet, "ROWS", rows)
        with open_input(str(ROOT / "traces" / "linux-nested-nmi.tdbg")) as trace:
            check(trace, tmp_path / "x")
            meta = pq.ParquetFile(tmp_path / "x" / "events.parquet").metadata
            sizes = [meta.row_group(n).num_rows for n in range(meta.num_row_groups)]
            assert sum(sizes) == trace.count and max(sizes) <= rows and len(sizes) >= trace.count // (rows + 64)
            meta = pq.ParquetFile(tmp_path / "x" / "frames.parquet").metadata
            assert all(meta.row_group(n).num_rows <= rows for n in range(meta.num_row_groups))


def test_types_and_versions(tmp_path: Path) -> None:
    import pyarrow as pa

    with race(2) as trace:
        exported(trace, tmp_path / "x")
    schema = pq.read_schema(tmp_path / "x" / "events.parquet")
    assert schema.field("rip").type == pa.uint64() and schema.field("event").type == pa.uint32()
    assert pa.types.is_dictionary(schema.field("kind").type) and pa.types.is_dictionary(schema.field("symbol").type)
    assert not schema.field("event").nullable and schema.field("rip").nullable
    assert schema.metadata[b"tracedbg.parquet.version"] == b"1" and schema.metadata[b"tracedbg.parquet.table"] == b"events"
    kinds = pq.read_table(tmp_path / "x" / "events.parquet", columns=["kind"]).column("kind")
    assert sorted(kinds.chunk(0).dictionary.to_pylist()) == ["deliver", "return"]  # no names that do not occur
    document = json.loads((tmp_path / "x" / "_tracedbg.json").read_text(encoding="ascii"))
    assert (document["schema"], document["schema_version"], document["events"]) == ("tracedbg.parquet", 1, 6)
    assert document["counts"]["deliveries"] == 3 and document["clock_hz"] is None


def test_the_race_by_hand(tmp_path: Path) -> None:
    with race(2) as trace:
        rows = exported(trace, tmp_path / "x")
    keys = ("event", "name", "stack", "symbol", "ended", "settle", "status", "overwritten", "overwrote")
    assert [tuple(row[key] for key in keys) for row in rows["frames"]] == [
        (1, "#MC", "IST1", "do_nmi+2", 2, "return", "live", None, None),
        (3, "NMI", "IST2", "do_nmi+2", 4, "return", "live", None, 0),
        (0, "NMI", "IST2", "default_idle+0xc6", 5, "return", "clobbered", 3, None),
    ]
    assert rows["events"][0]["rsp"] == 0xFFFF8300BFFD7E98 and rows["events"][0]["time"] is None
    assert rows["findings"][1]["rule"] == "frame-consumed-corrupt"
    assert rows["findings"][1]["slots"] == ["rip", "cs", "rflags", "rsp", "ss"]


def test_the_places_of_names_are_those_of_the_enums() -> None:
    from tracedbg.export import parquet

    assert [parquet._SETTLES[why] for why in Settle] == [word(why) for why in Settle]
    assert [parquet._STATUSES[status] for status in FrameStatus] == [word(status) for status in FrameStatus]
    assert LIFE_SIZE % 8 == 0  # columns of 64 bits are taken in steps of it


def test_the_example_of_the_page(tmp_path: Path, run_cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "tracedbg" / "help" / "parquet.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    run_cli("convert", ROOT / "traces" / "xen-nmi-mce-nmi.tdbg", "crash.parquet", code=0)
    monkeypatch.chdir(tmp_path)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "parquet.md", "exec"), {})
    assert out.getvalue() == "2 IST2 default_idle+0xc6 5 clobbered\n"


def test_the_page_names_every_column(tmp_path: Path) -> None:
    page = (ROOT / "tracedbg" / "help" / "parquet.md").read_text(encoding="utf-8")
    with race() as trace:
        exported(trace, tmp_path / "x")
    for name in ("events", "frames"):
        assert all(f"`{column}`" in page for column in pq.read_schema(tmp_path / "x" / f"{name}.parquet").names)
    sql = (ROOT / "tracedbg" / "export" / "sqlite_schema.py").read_text(encoding="utf-8")
    assert all(column in sql or f"`{column}`" in page for column in pq.read_schema(tmp_path / "x" / "findings.parquet").names)


# -- the command line ---------------------------------------------------------------------------------------------------


def test_the_same_bytes_force_and_whose_directory_it_is(run_cli: Run, tmp_path: Path) -> None:
    write_race(tmp_path / "race.tdbg")
    run_cli("convert", "race.tdbg", "a.parquet", code=0)
    run_cli("convert", "--to", "parquet", "race.tdbg", "b", code=0)
    first = {path.name: path.read_bytes() for path in (tmp_path / "a.parquet").iterdir()}
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()} and len(first) == 4
    assert run_cli("convert", "race.tdbg", "a.parquet", code=2).stderr == "tracedbg: a.parquet exists; --force overwrites it\n"
    run_cli("convert", "--force", "race.tdbg", "a.parquet", code=0)
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "a.parquet").iterdir()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "metadata").write_text("of something else")
    refused = run_cli("convert", "--force", "--to", "parquet", "race.tdbg", "mine", code=2)
    assert refused.stderr == "tracedbg: mine holds other things than a trace: not overwritten\n"
    assert (tmp_path / "mine" / "metadata").read_text() == "of something else"
    refused = run_cli("convert", "--to", "parquet", "race.tdbg", "-", code=2)
    assert refused.stderr == "tracedbg: --to parquet writes a directory: give its name\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "b", "mine", "race.tdbg"]


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    script = f"{code}\nfrom tracedbg.cli import main\nsys.exit(main(['convert', 'race.tdbg', 'x.parquet']))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_without_pyarrow_one_line_says_what_to_install(tmp_path: Path) -> None:
    write_race(tmp_path / "race.tdbg")
    done = run_python("import sys\nsys.modules['pyarrow'] = None", tmp_path)
    assert done.returncode == 2
    assert done.stderr == "tracedbg: --to parquet needs more: pip install 'tracedbg[parquet]'\n"
    assert [path.name for path in tmp_path.iterdir()] == ["race.tdbg"]


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    write_race(tmp_path / "race.tdbg")
    limit = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))"
    )
    done = run_python(limit, tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("tracedbg: x.parquet: ") and "internal error" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["race.tdbg"]


def test_names_cannot_act_on_a_terminal(tmp_path: Path) -> None:
    evil = "\x1b]0;x\x07\u202e"

    def fill(writer: TraceWriter) -> None:
        fill_race(writer)
        writer.symbols = SYMBOLS.replace(b"do_nmi", b"do\x1b[31mnmi")
        writer.layout = replace(LAYOUT, names={2: evil})
        writer.meta = {"damage": evil, evil: {evil: evil}, "deep": [1, [2, "\x7f"]]}
        data = evil.encode()
        writer.event(Kind.MARK, cpu=0, value=writer.payload(data), code=len(data), flags=EventFlag.BYTES)

    def texts(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [text for item in value.values() for text in texts(item)]
        if isinstance(value, list):
            return [text for item in value for text in texts(item)]
        return [value] if isinstance(value, str) else []

    with build(fill) as trace:
        rows = exported(trace, tmp_path / "x")
    assert all(text.isprintable() and text.isascii() for table in rows.values() for text in texts(table))
    assert rows["events"][1]["symbol"] == "do?[31mnmi+2" and rows["events"][4]["text"] == "?]0;x??"
    document = (tmp_path / "x" / "_tracedbg.json").read_text(encoding="ascii")
    assert json.loads(document)["meta"]["damage"] == "?]0;x??" and "\x1b" not in document and "\x7f" not in document


def test_damage_and_an_empty_trace(tmp_path: Path) -> None:
    def fill(writer: TraceWriter) -> None:
        writer.meta = {"damage": "cut short at offset 0x40"}
        writer.event(Kind.GAP, value=7)

    with build(fill, cpus=2) as trace:
        rows = exported(trace, tmp_path / "x")
        assert rows["events"][0]["cpu"] is None and rows["events"][0]["value"] == 7
        assert [(row["rule"], row["cpu"]) for row in rows["findings"]] == [("trace-gap", None)]
    document = json.loads((tmp_path / "x" / "_tracedbg.json").read_text(encoding="ascii"))
    assert document["meta"] == {"damage": "cut short at offset 0x40"} and document["counts"]["gaps"] == 1
    with build(lambda writer: None) as trace:
        assert exported(trace, tmp_path / "x") == {"events": [], "frames": [], "findings": []}


def test_truncated_and_mutated_traces_end_in_files(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "race.tdbg", atomic=False)  # not finished: no checksum hides the events
    fill_race(writer, returns=2)
    writer.flush()
    whole = (tmp_path / "race.tdbg").read_bytes()
    r = random.Random(3)
    for n in range(150):
        data = bytearray(whole)
        if n % 2:
            data = data[: r.randrange(len(data) - 6 * 64, len(data))]
        else:
            for _ in range(r.randrange(1, 4)):
                data[r.randrange(len(data) - 6 * 64, len(data))] = r.getrandbits(8)
        with Trace.from_bytes(bytes(data)) as trace:
            assert len(exported(trace, tmp_path / "x")["events"]) == trace.count
