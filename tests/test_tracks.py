"""Exports for viewers of timelines: both say the same, slices nest, and every life of a frame is there as what it was."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from randtrace import plan_of, random_trace
from samples import fill_race, race
from timelines import Row, read_chrome, read_perfetto

from tracedbg import wire
from tracedbg.export import chrome, lanes, tracks
from tracedbg.export import clock as clocks
from tracedbg.export.axis import axis_of
from tracedbg.export.clock import Clock
from tracedbg.export.lives import lives
from tracedbg.formats import WriterOptions, open_input, registry
from tracedbg.replay import Replay
from tracedbg.state import Kind, Known, Settle, Source
from tracedbg.trace import Trace
from tracedbg.writer import TraceWriter, build

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "traces").glob("*.tdbg"), *(ROOT / "tests" / "cases").glob("*.case")])


def options(trace: Trace, progress: Callable[[int, int], None] = lambda done, total: None) -> WriterOptions:
    return WriterOptions(names=trace.symbols, symbols=None, progress=progress)


def chrome_rows(trace: Trace, path: Path) -> tuple[dict[str, Any], list[Row]]:
    chrome.write(trace, str(path), options(trace))
    return read_chrome(path)


def perfetto_rows(trace: Trace, path: Path) -> tuple[dict[str, Any], list[Row]]:
    pytest.importorskip("perfetto")
    registry.writer(registry.output_format("x", "perfetto")).write(trace, str(path), options(trace))
    return read_perfetto(path)


def spell(row: Row) -> str:
    """A row as a line, for expectations that can be read."""
    time = f"{row.begin / 1000:g}" if row.end is None else f"{row.begin / 1000:g}..{row.end / 1000:g}"
    flows = "".join(f" {phase}{number}" for number, phase in row.flows)
    return f"{row.track} | {time} | {'  ' * row.depth}{row.name}{flows}"


THE_RACE = """\
IST1 (MC) | 3..4 | #MC
IST2 (NMI) | 2..4.999 | NMI, overwritten s1
IST2 (NMI) | 5..6 | NMI t1
events | 7..8 | IRET to do_nmi+2 f1
events | 8 | IRET to do_nmi+2
events | 9 | IRET to do_nmi+2
findings | 4 | reentry-window
findings | 5 | frame-consumed-corrupt
findings | 7 | resume-loop
"""


@pytest.mark.parametrize("rows", [chrome_rows, perfetto_rows])
def test_the_race_on_xen(tmp_path: Path, rows: Callable[[Trace, Path], tuple[dict[str, Any], list[Row]]]) -> None:
    with Trace.open(ROOT / "traces" / "xen-nmi-mce-nmi.tdbg") as trace:
        head, found = rows(trace, tmp_path / "out")
    assert {row.group for row in found} == {"cpu 0 (no time: event N at N µs)"}
    assert head["time"] in ("number of the event: the trace has no time", {"number of the event: the trace has no time"})
    assert [spell(row) for row in sorted(found, key=lambda row: row.key) if row.begin < 10_000] == THE_RACE.splitlines()
    # The loop: every further IRET, to the end of the trace.
    rest = [row for row in found if row.begin >= 8_000]
    assert [row.begin for row in rest] == list(range(8_000, 1_979_000, 1000))
    assert {row.name for row in rest} == {"IRET to do_nmi+2"}
    victim = next(row for row in found if row.name == "NMI, overwritten")
    assert victim.args == {
        "event": 2, "source_index": 569, "vector": 2, "source": "nmi", "stack": "IST2 (NMI)", "lo": "0xffff8300bffd2fd8",
        "hi": "0xffff8300bffd3000", "saved_rip": "0xffff82d0402f9c06", "saved_cs": "0xe008", "saved_rflags": "0x206",
        "saved_rsp": "0xffff8300bffd7e98", "saved_ss": "0xe010", "interrupted": "default_idle+0xc6", "overwritten_by": 5,
        "verdict": "frame-consumed-corrupt", "ended_by": 7, "end": "returned",
    }  # fmt: skip
    writer = next(row for row in found if row.name == "NMI")
    assert (writer.args["overwrote"], writer.args["source_index"]) == (2, 571)
    finding = next(row for row in found if row.name == "resume-loop")
    assert (finding.category, finding.args["times"], finding.args["victim"], finding.args["consumer"]) == ("error", 1972, 2, 7)
    assert finding.args["message"].startswith("the frame of the NMI at event 2 (#569) holds the words that the NMI at event 5")


def stretched(trace: Trace, seed: int) -> Trace:
    """The same events with times: some equal, some missing, a few that go back."""
    rng = random.Random(seed)
    records = bytearray(trace.events)
    now = 10_000
    for at in range(0, len(records), 64):
        values = list(wire.EVENT_PACK.unpack_from(records, at))
        now += rng.choice((0, 0, 1, 2, 50))
        values[0] = now - (rng.random() < 0.004) * 300
        values[11] = values[11] | Known.TIME if rng.random() < 0.95 else values[11] & ~Known.TIME
        wire.EVENT_PACK.pack_into(records, at, *values)

    def fill(writer: TraceWriter) -> None:
        writer.clock_hz = rng.choice((10**9, 2_400_000_000, 1_000_000, 0))
        writer.layout, writer.symbols, writer.memory = trace.layout, trace.symbols, list(trace.memory)
        writer.payload(bytes(trace.payload))
        writer.append(bytes(records))

    return build(fill, cpus=trace.cpus)


def check(trace: Trace, path: Path) -> list[Row]:
    """Both files say the same, and every life, every finding and every other event of note is there."""
    _, mine = chrome_rows(trace, path)
    _, other = perfetto_rows(trace, path)
    mine.sort(key=lambda row: row.key)
    for row in mine:
        row.flows.sort()
    for row in other:
        row.flows.sort()
    assert mine == sorted(other, key=lambda row: row.key)
    at = Clock(trace).at
    frames = {row.args["event"]: row for row in mine if row.category == "frame"}
    with Replay(trace) as replay:
        told = list(lives(replay, lambda done, total: None))
        findings = replay.findings()
    assert len(frames) == sum(row.category == "frame" for row in mine) == len(told)
    silent = {life.frame.entry for life in told}
    for life in told:
        row, frame = frames[life.frame.entry], life.frame
        assert row.group.startswith(f"cpu {frame.cpu}")
        assert row.begin == at(frame.entry)
        gone = life.overwritten is not None and (life.end is None or life.overwritten < life.end)
        if gone and life.overwritten is not None:
            ended = Clock(trace).end if life.end is None else at(life.end)
            assert row.end == max(min(at(life.overwritten) - 1, ended), row.begin + 1)
        elif life.end is not None:
            assert row.end == max(at(life.end), row.begin + 1)
            if life.settle in (Settle.RETURN, Settle.COPY):
                silent.add(life.end)
        else:
            assert row.end == Clock(trace).end > max(map(at, range(trace.count)))
        assert (row.args["lo"], row.args["hi"]) == (f"{frame.lo:#x}", f"{frame.hi:#x}")
        assert row.args.get("saved_rip") == (None if frame.saved.rip is None else f"{frame.saved.rip:#x}")
        assert row.args.get("ended_by") == life.end
        assert ("overwritten" in row.name) == (life.overwritten is not None)
    told_of = [row for row in mine if row.track == "findings"]
    assert sorted((row.args["event"], row.args["finding"]) for row in told_of) == [(f.event, f.number) for f in findings]
    events = {row.args["event"]: row for row in mine if row.track == "events"}
    for index in range(trace.count):
        event = trace.event(index)
        if event.kind in (Kind.GAP, Kind.INIT, Kind.SHUTDOWN, Kind.MARK) or (
            event.kind in (Kind.DELIVER, Kind.RETURN) and index not in silent
        ):
            assert events[index].begin == at(index)
    return mine


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_both_say_what_the_replay_knows(path: Path, tmp_path: Path) -> None:
    with open_input(str(path)) as trace:
        rows = check(trace, tmp_path / "out")
        with Replay(trace) as replay:
            replay.scan_all()
            flows = [f for f in replay.findings() if f.victim and f.writer and f.consumer not in (None, f.writer.entry)]
    chains: dict[int, dict[str, int]] = {}
    for row in rows:
        for number, phase in row.flows:
            chains.setdefault(number, {})[phase] = row.args["event"]
    for finding in flows:
        assert finding.victim is not None and finding.writer is not None
        assert {"s": finding.victim.entry, "t": finding.writer.entry, "f": finding.consumer} in chains.values()


@pytest.mark.parametrize("seed", range(60))
def test_random_traces(seed: int, tmp_path: Path) -> None:
    with random_trace(plan_of(seed)) as trace:
        check(trace, tmp_path / "out")
        check(stretched(trace, seed), tmp_path / "out")


@pytest.mark.slow
def test_more_random_traces(tmp_path: Path) -> None:
    for seed in range(60, 1500):
        test_random_traces(seed, tmp_path)


def test_flows_go_from_victim_to_writer_to_consumer(tmp_path: Path) -> None:
    _, rows = chrome_rows(race(returns=3), tmp_path / "out")
    stops = sorted((number, "stf".index(phase), row.args["event"]) for row in rows for number, phase in row.flows)
    assert stops == [(1, 0, 0), (1, 1, 3), (1, 2, 5)]


def test_a_log_without_a_layout_shows_its_deliveries(tmp_path: Path) -> None:
    def fill(writer: TraceWriter) -> None:
        fill_race(writer)
        writer.layout = type(writer.layout)()

    _, rows = chrome_rows(build(fill), tmp_path / "out")
    assert [(row.track, row.name) for row in rows] == [
        ("events", "NMI, no frame known"), ("events", "#MC, no frame known"), ("events", "IRET to do_nmi+2"),
        ("events", "NMI, no frame known"),
    ]  # fmt: skip


# -- time -----------------------------------------------------------------------------------------------------------------


def timed(*times: int | None, hz: int = 10**9, cpus: int = 1) -> Trace:
    def fill(writer: TraceWriter) -> None:
        writer.clock_hz = hz
        for number, time in enumerate(times):
            writer.event(Kind.EOI, cpu=number % cpus, **({} if time is None else {"time": time}))

    return build(fill, cpus=cpus)


@pytest.mark.parametrize(
    ("times", "hz", "moments"),
    [
        ((1000, 1005, 1010), 10**9, [0, 5, 10]),
        ((1000, 1005, 1010), 2 * 10**9, [0, 2, 5]),
        ((1000, 1005, 1010), 0, [0, 5, 10]),
        ((1000, 1000, 1000, 1002), 10**9, [0, 2, 4, 6]),
        ((1000, 1001, 1002, 1003), 0, [0, 1, 2, 3]),
        ((1000, None, None, 1001, 1100), 10**9, [0, 2, 4, 6, 100]),
        ((None, 1000, 1010), 10**9, [0, 2, 10]),
        ((None, None), 10**9, [0, 1000]),
    ],
)
def test_moments(times: tuple[int | None, ...], hz: int, moments: list[int]) -> None:
    trace = timed(*times, hz=hz)
    clock = Clock(trace)
    assert [clock.at(index) for index in range(trace.count)] == moments
    assert clock.end == moments[-1] + clock.unit


def test_each_cpu_has_its_own_moments() -> None:
    clock = Clock(timed(10, 10, 10, 10, cpus=2))
    assert [clock.at(index) for index in range(4)] == [0, 0, 2, 2]


def test_moments_are_the_same_from_block_to_block(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(3)
    times = [1000 + number - (rng.random() < 0.005) * 90 if rng.random() < 0.9 else None for number in range(5000)]
    trace = timed(*times, cpus=3)
    whole = Clock(trace)
    expected = [whole.at(index) for index in range(trace.count)]
    monkeypatch.setattr("tracedbg.export.axis.CHUNK", 64)
    monkeypatch.setattr(clocks, "CHUNK", 64)
    monkeypatch.setattr(clocks, "BLOCKS", 2)
    parts = Clock(trace)
    order = rng.sample(range(trace.count), trace.count)
    assert {index: parts.at(index) for index in order} == dict(enumerate(expected))
    for cpu in range(3):
        mine = expected[cpu::3]
        assert all(a < b for a, b in pairwise(mine))


def test_what_the_axis_is_stands_in_the_file(tmp_path: Path) -> None:
    def fill(writer: TraceWriter) -> None:
        fill_race(writer)
        writer.clock_hz = 2_000_000_000
        writer.event(Kind.DELIVER, cpu=0, time=5000, arg=2, source=Source.NMI)

    trace = build(fill)
    head, rows = chrome_rows(trace, tmp_path / "out")
    assert head["time"] == "time of the trace; of the events, 4 without a time: shown right after the event before on the CPU"
    assert {row.group for row in rows} == {"cpu 0"}
    trace.clock_hz = 0
    head, rows = chrome_rows(trace, tmp_path / "out")
    assert head["time"].startswith("time of the trace, its unit is not known: a tick is shown as 1 ns")
    assert {row.group for row in rows} == {"cpu 0 (unit of time unknown: 1 tick = 1 ns)"}
    assert axis_of(trace).untimed == 4


# -- lanes ----------------------------------------------------------------------------------------------------------------


def crosses(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether two stretches can not stand on one lane, the first outside or inside of the second or beside it."""
    inside = (b[0] <= a[0] and a[1] <= b[1]) or (a[0] <= b[0] and b[1] <= a[1])
    return not inside and a[0] < b[1] and b[0] < a[1]


def test_lanes_by_hand() -> None:
    found = lanes.Lanes()
    assert found.place(3, 5) == 0
    assert found.place(5, 6) == 0
    assert found.place(2, 8) == 0  # around both
    assert found.place(9, 12) == 0
    assert found.place(7, 10) == 1  # across two
    assert found.place(0, 1) == 0  # late, beside
    assert found.place(0, 2) == 1  # late, and what begins where it ends was there before
    assert found.place(3, 4) == 1  # late, inside of what may have inner ones there
    assert found.place(12, 13) == 0
    assert found.place(7, 14) == 1


@pytest.mark.parametrize("kept", [4096, 8])
def test_what_shares_a_lane_nests(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "MAX_KEPT", kept)
    rng = random.Random(kept)
    for _ in range(60):
        spans = [(begin, begin + rng.choice((1, 3, 10, 60))) for begin in (rng.randrange(300) for _ in range(80))]
        if rng.random() < 0.7:
            spans.sort(key=lambda span: (span[1], -span[0]))
        placed: dict[int, list[tuple[int, int]]] = {}
        found = lanes.Lanes()
        for span in spans:
            placed.setdefault(found.place(*span), []).append(span)
        for on in placed.values():
            assert not any(crosses(a, b) for n, a in enumerate(on) for b in on[:n])


# -- files and the command line ---------------------------------------------------------------------------------------------


def test_the_same_trace_gives_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("perfetto")
    for name in ("chrome-json", "perfetto"):
        written = []
        for number in range(2):
            with Trace.open(ROOT / "traces" / "linux-nested-nmi.tdbg") as trace:
                path = tmp_path / f"{name}{number}"
                registry.writer(registry.output_format("x", name)).write(trace, str(path), options(trace))
                written.append(path.read_bytes())
        assert written[0] == written[1]


def test_the_table_of_texts_begins_again_before_it_grows_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("perfetto")
    from tracedbg.export import perfetto

    with Trace.open(ROOT / "traces" / "linux-nested-nmi.tdbg") as trace:
        _, before = perfetto_rows(trace, tmp_path / "a")
        monkeypatch.setattr(perfetto, "MAX_INTERNED", 30)
        _, after = perfetto_rows(trace, tmp_path / "b")
    assert before == after
    assert len((tmp_path / "b").read_bytes()) > len((tmp_path / "a").read_bytes())


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    def fill(writer: TraceWriter) -> None:
        fill_race(writer, returns=2)
        writer.symbols = 'ffff82d04032a240 ffff82d04032a440 do"\\nmi\u202e</script>é\n'.encode()
        writer.layout.names[2] = 'N"M\x1b[31mI\n'

    trace = build(fill)
    rows = check(trace, tmp_path / "out")
    assert "IST2 (N\"M?[31mI?)" in {row.track for row in rows}
    assert 'do"\\nmi?</script>é+2' in {row.args.get("interrupted") for row in rows}
    trace.layout.names.clear()


@pytest.mark.parametrize(
    ("name", "magic"), [("a.chrome.json", b'{"displayTimeUnit"'), ("a.pftrace", b"\n"), ("a.perfetto-trace", b"\n")]
)
def test_the_suffix_says_what_is_written(tmp_path: Path, run_cli: Callable[..., Any], name: str, magic: bytes) -> None:
    if "chrome" not in name:
        pytest.importorskip("perfetto")
    done = run_cli("convert", ROOT / "traces" / "xen-nmi-mce-nmi-log.tdbg", name, code=0)
    assert (done.stdout, done.stderr) == ("", "")
    assert (tmp_path / name).read_bytes().startswith(magic)


def test_without_the_package_one_line_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "perfetto").mkdir()
    hidden = "raise ModuleNotFoundError('No module named perfetto', name='perfetto')\n"
    (tmp_path / "perfetto" / "__init__.py").write_text(hidden)
    done = subprocess.run(
        [sys.executable, "-m", "tracedbg", "convert", str(ROOT / "traces" / "xen-nmi-mce-nmi-log.tdbg"), "out.pftrace"],
        cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "tracedbg: --to perfetto needs more: pip install 'tracedbg[perfetto]'\n"
    assert not (tmp_path / "out.pftrace").exists()


def damaged() -> Iterator[Trace]:
    """Records of anything."""
    rng = random.Random(11)
    for number in range(200):
        records = bytearray(rng.randbytes(64 * rng.randrange(1, 60)))
        if number % 2:
            for at in range(0, len(records), 64):
                records[at + 52 : at + 54] = b"\0\0"
                records[at + 60] = rng.choice((1, 1, 3, 3, 4, 31, 29, 200))

        def fill(writer: TraceWriter, records: bytearray = records, number: int = number) -> None:
            fill_race(writer)
            writer.clock_hz = number % 3
            writer.append(bytes(records))

        yield build(fill)


def test_records_of_anything(tmp_path: Path) -> None:
    for trace in damaged():
        check(trace, tmp_path / "out")


def test_progress_goes_to_the_end(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    with Trace.open(ROOT / "traces" / "linux-nested-nmi.tdbg") as trace:
        chrome.write(trace, str(tmp_path / "out"), options(trace, lambda done, total: seen.append((done, total))))
        assert seen[-1] == (trace.count, trace.count)
    assert seen == sorted(seen)


def test_tracks_are_declared_before_they_are_used(tmp_path: Path) -> None:
    with Trace.open(ROOT / "traces" / "linux-nested-nmi.tdbg") as trace:
        known: set[int] = set()
        for told in tracks.story(trace, options(trace), Clock(trace)):
            if isinstance(told, tracks.Item):
                assert told.track in known
            else:
                assert told.number not in known
                assert not isinstance(told, tracks.Track) or told.group in known
                known.add(told.number)
