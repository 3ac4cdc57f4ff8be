"""CTF: what is written against the trace, read by a small reader of the metadata, and by babeltrace2 where it is installed."""

from __future__ import annotations

import random
import re
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from ctfread import Directory
from ctfread import Event as Read
from samples import fill_race, race

from tracedbg import wire
from tracedbg.export import ctf
from tracedbg.export.axis import axis_of
from tracedbg.formats import WriterOptions
from tracedbg.state import Event, EventFlag, Kind, Known, Source
from tracedbg.trace import Trace
from tracedbg.writer import TraceWriter
from tracedbg.writer import build as build_trace

KNOWN_FIELDS = {
    "time": Known.TIME, "rip": Known.RIP, "rsp": Known.RSP, "addr": Known.ADDR, "value": Known.VALUE, "rflags": Known.RFLAGS,
    "code": Known.CODE, "source_index": Known.SOURCE_INDEX, "cs": Known.CS, "ss": Known.SS, "arg": Known.ARG,
    "source": Known.SOURCE,
}  # fmt: skip

# What a field is called where it is not called as in the record.
NAMES: dict[Kind, dict[str, str]] = {
    Kind.DELIVER: {"arg": "vector", "addr": "stored_words", "code": "error_code", "value": "event_data"},
    Kind.RETURN: {
        "arg": "instruction", "addr": "popped_rip", "cs": "popped_cs", "rflags": "popped_rflags", "value": "popped_rsp",
        "ss": "popped_ss", "code": "popped_ss_high",
    },
    Kind.WRITE: {"arg": "len"},
    Kind.READ: {"arg": "len"},
    Kind.MOVE: {"addr": "from", "value": "to"},
    Kind.SETSP: {"addr": "from", "value": "to"},
    Kind.TSS: {"arg": "slot"},
    Kind.GATE: {"arg": "vector", "value": "handler", "cs": "selector", "code": "descriptor_high"},
    Kind.LTR: {"value": "base"},
    Kind.LIDT: {"value": "base"},
    Kind.SYSCALL: {"addr": "new_rip"},
    Kind.SYSRET: {"addr": "new_rip"},
    Kind.SYSENTER: {"addr": "new_rip"},
    Kind.RAISE: {"arg": "vector"},
    Kind.UNBLOCK: {"arg": "what"},
    Kind.MSR: {"code": "msr"},
    Kind.CR: {"arg": "cr"},
    Kind.GS: {"arg": "how"},
    Kind.SHADOW: {"arg": "by"},
    Kind.TOKEN: {"arg": "slot", "code": "held"},
    Kind.VMEXIT: {"arg": "how", "code": "reason"},
    Kind.VMENTRY: {"arg": "how"},
    Kind.MODE: {"arg": "mode"},
    Kind.INIT: {"arg": "how"},
    Kind.SHUTDOWN: {"arg": "reason"},
    Kind.GAP: {"value": "lost"},
}  # fmt: skip


def made(fill: Callable[[TraceWriter], object], *, cpus: int = 1, clock_hz: int = 0) -> Trace:
    """A trace in memory."""

    def write(writer: TraceWriter) -> None:
        writer.clock_hz = clock_hz
        fill(writer)

    return build_trace(write, cpus=cpus)


def options(trace: Trace) -> WriterOptions:
    return WriterOptions(names=trace.symbols, symbols=None, progress=lambda done, total: None)


def export(trace: Trace, path: Path) -> tuple[Directory, list[Read]]:
    path.mkdir()
    ctf.write(trace, str(path), options(trace))
    directory = Directory(path)
    return directory, list(directory.events())


def babeltrace(path: Path) -> list[str]:
    """What babeltrace2 prints of a directory."""
    if shutil.which("babeltrace2") is None:
        pytest.skip("babeltrace2 is not installed")
    done = subprocess.run(
        ["babeltrace2", "--clock-cycles", "--no-delta", str(path)], capture_output=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()
    lines = [line for line in done.stderr.decode().splitlines() if not re.search("discarded .*event|^$", line)]
    assert not lines
    return done.stdout.decode().splitlines()


def expected(event: Event, payload: bytes, axis_timed: bool, last: int) -> dict[str, object]:
    """The fields of an event, by the table above."""
    names = dict(NAMES.get(event.kind, {}))
    if event.kind is Kind.DELIVER and event.source in (Source.SOFT_INT, Source.SYSCALL):
        names["code"] = "instruction_length"
    if event.kind is Kind.DELIVER and event.arg == 14:
        names["value"] = "cr2"
    found: dict[str, object] = {
        names.get(name, name): getattr(event, name) for name, bit in KNOWN_FIELDS.items() if event.known & bit
    }
    flags = int(event.flags)
    length = event.code
    if (
        event.flags & EventFlag.BYTES and event.kind in (Kind.WRITE, Kind.READ, Kind.MARK)
        and 0 < length <= 4096 and event.value + length <= len(payload)
    ):  # fmt: skip
        flags &= ~int(EventFlag.BYTES)
        found = {name: value for name, value in found.items() if name not in ("code", "value")}
        raw = payload[event.value : event.value + length]
        found |= {"text": raw.decode()} if event.kind is Kind.MARK else {"length": length, "bytes": list(raw)}
    if flags:
        found["flags"] = int(event.flags)
    if axis_timed:
        own = event.known & Known.TIME and event.time >= last
        if own:
            del found["time"]
        else:
            found["timestamp_of"] = 0
    return found


def compare(trace: Trace, read: list[Read]) -> None:
    """Every event, in the stream of its CPU, with exactly the fields that are known."""
    timed = axis_of(trace).timed
    events = {event.index: event for event in read if event.name != "finding"}
    assert len(events) == trace.count == sum(event.name != "finding" for event in read)
    last: dict[int | None, int] = {}
    for index in range(trace.count):
        event, found = trace.event(index), events[index]
        cpu = event.cpu if event.known & Known.CPU and event.cpu < trace.cpus else None
        assert found.cpu == cpu
        kind = wire.EVENT_PACK.unpack_from(trace.events, index * 64)[12]
        assert found.name == (event.kind.name.lower() if event.kind is not Kind.UNKNOWN else f"kind_{kind}")
        fields = expected(event, bytes(trace.payload), timed, last.get(cpu, 0))
        if cpu is None and event.known & Known.CPU:
            fields["cpu"] = event.cpu
        assert found.fields == fields
        if timed:
            time = max(event.time if event.known & Known.TIME else 0, last.get(cpu, 0))
            assert found.time == time
            last[cpu] = time
        else:
            assert found.time == index


def random_trace(seed: int, count: int, *, cpus: int = 3, timed: bool = True) -> Trace:
    """Records of all kinds with any fields known; few times, as most traces have them all."""
    rng = random.Random(seed)
    masks = [rng.randrange(1 << 13) for _ in range(40)]

    def fill(writer: TraceWriter) -> None:
        writer.payload(b"The quick brown fox's \"jump\" over \\ the lazy dog?")
        for number in range(count):
            known = rng.choice(masks) | Known.CPU * (rng.random() < 0.9)
            known = known | Known.TIME if timed and rng.random() < 0.95 else known & ~Known.TIME
            flags = rng.choice((0, 0, 0, 1, 2, 9, 32, 64, 40))
            writer.event(
                Kind(rng.randrange(1, 33)), known=int(known), time=1000 + 10 * number - (rng.random() < 0.005) * 500,
                rip=rng.getrandbits(64), rsp=rng.getrandbits(64), addr=rng.getrandbits(64), value=rng.choice((3, 7, 1 << 60)),
                rflags=rng.getrandbits(32), code=rng.choice((0, 5, 8, 60)), source_index=rng.getrandbits(32),
                cpu=rng.choice((0, 0, 1, 2, cpus)), cs=rng.getrandbits(16), ss=rng.getrandbits(16),
                arg=rng.choice((0, 1, 2, 14, 18, 200)), source=rng.choice((0, 1, 2, 4, 9)), flags=flags,
            )  # fmt: skip

    return made(fill, cpus=cpus, clock_hz=10**9)


FLAGSHIP = """\
[00000000000000000000] ltr: { cpu_id = 0 }, { index = 0 }, { base = 0xFFFF82D040579040 }
[00000000000000000001] lidt: { cpu_id = 0 }, { index = 1 }, { base = 0xFFFF82D040577000 }
[00000000000000000002] deliver: { cpu_id = 0 }, { index = 2 }, { source_index = 569, vector = ( "NMI" : container = 2 ), \
source = ( "nmi" : container = 2 ), rip = 0xFFFF82D0402F9C06, cs = 0xE008, rflags = 0x206, rsp = 0xFFFF8300BFFD7E98, \
ss = 0xE010 }
[00000000000000000003] deliver: { cpu_id = 0 }, { index = 3 }, { source_index = 570, vector = ( "#MC" : container = 18 ), \
source = ( "mc" : container = 3 ), rip = 0xFFFF82D04032A242, cs = 0xE008, rflags = 0x46, rsp = 0xFFFF8300BFFD2F48, ss = 0x0 }
[00000000000000000004] return: { cpu_id = 0 }, { index = 4 }, { rip = 0xFFFF82D0402017E4, rsp = 0xFFFF8300BFFD1FD8, \
popped_rip = 0xFFFF82D04032A242, popped_cs = 0xE008, popped_rflags = 0x46, popped_rsp = 0xFFFF8300BFFD2F48, popped_ss = 0x0 }
"""


def test_the_race_on_xen(root: Path, tmp_path: Path) -> None:
    with Trace.open(root / "traces" / "xen-nmi-mce-nmi.tdbg") as trace:
        directory, read = export(trace, tmp_path / "ctf")
        compare(trace, read)
    assert [event.text for event in read[:5]] == FLAGSHIP.splitlines()
    assert directory.clock == {
        "name": "event_number", "description": "number of the event: the trace has no time", "freq": "1000000000",
    }  # fmt: skip
    assert directory.env["source_format"] == "qemu-int"
    assert directory.env["fidelity_ss"] == "QEMU zeroes SS on every IST switch"
    findings = [event for event in read if event.name == "finding"]
    assert [(f.index, f.fields["rule"], f.fields["times"]) for f in findings] == [
        (4, "reentry-window", 1), (5, "frame-consumed-corrupt", 1), (7, "resume-loop", 1972),
    ]  # fmt: skip
    consumed = findings[1].fields
    assert (consumed["victim"], consumed["writer"], consumed["consumer"]) == (2, 5, 7)
    assert (consumed["severity"], consumed["lo"], consumed["hi"]) == ("error", 0xFFFF8300BFFD2FD8, 0xFFFF8300BFFD3000)
    assert "writer" not in findings[0].fields
    # A finding stands right behind its event.
    assert [event.index for event in read[4:9]] == [4, 4, 5, 5, 6]
    assert babeltrace(tmp_path / "ctf") == [event.text for event in read]


@pytest.mark.parametrize("name", ["linux-nested-nmi", "case-fred-nmi-bit", "double-fault", "mce-mcip-shutdown"])
def test_babeltrace_reads_the_same(root: Path, tmp_path: Path, name: str) -> None:
    with Trace.open(root / "traces" / f"{name}.tdbg") as trace:
        _, read = export(trace, tmp_path / "ctf")
        compare(trace, read)
    assert babeltrace(tmp_path / "ctf") == [event.text for event in read]


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_all_kinds_and_all_fields(tmp_path: Path, seed: int, timed: bool) -> None:
    trace = random_trace(seed, 3000, timed=timed)
    assert axis_of(trace).timed == timed
    directory, read = export(trace, tmp_path / "ctf")
    assert len(directory.classes) > 100
    compare(trace, read)
    lines = babeltrace(tmp_path / "ctf")
    # Streams are merged by time; events of one time come in any order.
    for stream in ("cpu_id = 0", "cpu_id = 1", "cpu_id = 2", "{ index"):
        assert [line for line in lines if f": {{ {stream}" in line or f": {stream}" in line] == [
            event.text for event in read if f": {{ {stream}" in event.text or f": {stream}" in event.text
        ]
    assert len(lines) == len(read)


def test_babeltrace_reads_a_recording_of_xen(shared: Path, tmp_path: Path, run_cli: Callable[..., object]) -> None:
    run_cli("convert", shared / "xentrace" / "xt-pv-smp1.bin", "--cpu-hz", "2G", "--to", "ctf", tmp_path / "ctf", code=0)
    directory = Directory(tmp_path / "ctf")
    assert directory.clock["name"] == "trace_time"
    assert directory.clock["freq"] == "2000000000"
    assert babeltrace(tmp_path / "ctf") == [event.text for event in directory.events()]


def test_records_that_were_lost(tmp_path: Path) -> None:
    def fill(writer: TraceWriter) -> None:
        writer.event(Kind.EOI, cpu=1, time=100)
        writer.event(Kind.GAP, cpu=1, time=120, value=9)
        writer.event(Kind.EOI, cpu=1, time=125)
        writer.event(Kind.GAP, cpu=1, time=130)
        writer.event(Kind.EOI, cpu=1, time=135)
        writer.event(Kind.GAP, time=140, value=(1 << 64) - 1)
        writer.event(Kind.GAP, time=150, value=7)

    directory, read = export(made(fill, cpus=2, clock_hz=10**9), tmp_path / "ctf")
    assert [(e.cpu, e.time, e.fields) for e in read if e.name == "gap"] == [
        (1, 120, {"lost": 9}), (1, 130, {}), (None, 140, {"lost": (1 << 64) - 1}), (None, 150, {"lost": 7}),
    ]  # fmt: skip
    # Each loss lies between the event before it and the gap; a counter cannot run over.
    assert directory.discarded == {"cpu_1": [(100, 120, 9), (125, 130, 1)], "no_cpu": [(0, 140, (1 << 64) - 1)]}
    babeltrace(tmp_path / "ctf")
    if shutil.which("babeltrace2"):
        said = subprocess.run(["babeltrace2", str(tmp_path / "ctf")], capture_output=True, check=True).stderr.decode()
        assert "discarded 9 events between [00:00:00.000000100] and [00:00:00.000000120]" in said


def test_a_time_that_goes_back_and_none_at_all(tmp_path: Path) -> None:
    def fill(writer: TraceWriter) -> None:
        for number in range(200):
            writer.event(Kind.EOI, cpu=0, time=1000 + number)
        writer.event(Kind.EOI, cpu=0, time=1100)
        writer.event(Kind.EOI, cpu=0)
        writer.event(Kind.EOI, cpu=1, time=1050)
        writer.event(Kind.EOI, cpu=0, time=1199)

    trace = made(fill, cpus=2, clock_hz=10**9)
    axis = axis_of(trace)
    assert (axis.timed, axis.start, axis.untimed, axis.back) == (True, 1000, 1, 1)
    assert "1 without a time and 1 before an earlier one of the CPU" in axis.text
    _, read = export(trace, tmp_path / "ctf")
    compare(trace, read)
    assert [(event.time, event.fields) for event in read if event.index >= 199] == [
        (1199, {}), (1199, {"timestamp_of": 0, "time": 1100}), (1199, {"timestamp_of": 0}), (1199, {}), (1050, {}),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("times", "why"),
    [
        ([5, 6, 3, 4, 5], "3 of 5 times lie before an earlier one of the same CPU"),
        ([5, 6, 1 << 63], "the times of the trace are too large for an axis"),
        ([], "the trace has no time"),
    ],
)
def test_times_that_are_no_axis(tmp_path: Path, times: list[int], why: str) -> None:
    def fill(writer: TraceWriter) -> None:
        writer.event(Kind.INIT, cpu=0)
        for time in times:
            writer.event(Kind.EOI, cpu=0, time=time)

    trace = made(fill)
    assert axis_of(trace).why == why
    directory, read = export(trace, tmp_path / "ctf")
    assert directory.env["time_axis"] == f"number of the event: {why}"
    assert [event.time for event in read] == list(range(len(times) + 1))
    assert [event.fields.get("time") for event in read[1:]] == times
    babeltrace(tmp_path / "ctf")


def test_too_many_classes_have_all_fields_and_the_known_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctf, "MAX_CLASSES", 50)
    trace = random_trace(7, 500)
    directory, read = export(trace, tmp_path / "ctf")
    assert len(directory.classes) < 33 * 2 * 2 + 10
    events = {event.index: event for event in read if event.name != "finding"}
    assert len(events) == trace.count
    for index in range(trace.count):
        event, found = trace.event(index), events[index].fields
        assert found["known"] == event.known
        assert found["flags"] == event.flags
        assert [found[name] for name in KNOWN_FIELDS] == [getattr(event, name) for name in KNOWN_FIELDS]
    assert sorted(babeltrace(tmp_path / "ctf")) == sorted(event.text for event in read)


def test_packets_end_where_they_are_full(tmp_path: Path) -> None:
    def fill(writer: TraceWriter) -> None:
        for number in range(9000):
            writer.event(Kind.WRITE, cpu=0, rip=number, addr=8 * number, value=number, arg=8)

    trace = made(fill)
    _, read = export(trace, tmp_path / "ctf")
    compare(trace, read)
    raw = (tmp_path / "ctf" / "cpu_0").read_bytes()
    packets = raw.count(bytes.fromhex("c11ffcc1"))
    # 14 bytes of header and context, 25 of fields: 351,000 bytes of events, in packets of 64 KiB or a little more.
    assert packets == -(-9000 * 39 // (65536 + 39 - 65536 % 39)) == 6
    assert len(raw) == 9000 * 39 + packets * (24 + 44)


def test_more_cpus_than_open_files(tmp_path: Path) -> None:
    def fill(writer: TraceWriter) -> None:
        for number in range(600):
            writer.event(Kind.EOI, cpu=number % 300)

    trace = made(fill, cpus=300)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        _, read = export(trace, tmp_path / "ctf")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    compare(trace, read)
    assert len(list((tmp_path / "ctf").iterdir())) == 301


def test_hostile_names(tmp_path: Path) -> None:
    def fill(writer: TraceWriter) -> None:
        fill_race(writer)
        nasty = 'a "quoted" \\ back\nslash \x1b[31m é \u202e };'
        writer.symbols = b"ffff82d04032a240 ffff82d04032a440 do\x07\"nmi'?\n"
        writer.meta = {
            "source": {"format": "hand", 'a"; }; y': nasty, "c": 5, "b": True, "neg": -1, "big": 1 << 70, "list": [1]},
            "fidelity": {"deep": {"er": 1}, "rf": "x" * 10000},
        }
        writer.meta["source"] |= {f"key{n}": n for n in range(200)}

    directory, read = export(made(fill), tmp_path / "ctf")
    assert directory.env["source_a______y"] == 'a "quoted" \\ back?slash ?[31m \\xe9 ? };'
    assert directory.env["source_c"] == "5"
    assert not {"source_b", "source_neg", "source_big", "source_list", "fidelity_deep"} & set(directory.env)
    assert len(directory.env) == 64
    assert directory.text.isascii()
    assert not re.search(r"[^\n\t -~]", directory.text)
    assert babeltrace(tmp_path / "ctf") == [event.text for event in read]


def test_the_same_trace_gives_the_same_bytes(tmp_path: Path) -> None:
    def tree(path: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in path.iterdir()}

    first, _ = export(random_trace(1, 500), tmp_path / "a")
    again, _ = export(random_trace(1, 500), tmp_path / "b")
    other, _ = export(random_trace(1, 499), tmp_path / "c")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert first.uuid == again.uuid != other.uuid


def test_an_empty_trace(tmp_path: Path) -> None:
    directory, read = export(made(lambda writer: None), tmp_path / "ctf")
    assert not read
    assert [path.name for path in (tmp_path / "ctf").iterdir()] == ["metadata"]
    assert directory.clock["name"] == "event_number"


def test_random_traces_are_written_whatever_they_hold(tmp_path: Path) -> None:
    rng = random.Random(5)
    for number in range(150):
        records = bytearray(rng.randbytes(64 * rng.randrange(1, 40)))
        if number % 2:  # records whose fields are known and whose CPU is there
            for at in range(0, len(records), 64):
                records[at + 52 : at + 54] = b"\0\0"
                records[at + 60] = rng.randrange(34)
        trace = made(lambda writer, records=records: writer.append(bytes(records)), clock_hz=rng.choice((0, 1, (1 << 64) - 1)))
        _, read = export(trace, tmp_path / f"{number}")
        assert sum(event.name != "finding" for event in read) == trace.count


@pytest.mark.parametrize("hz", [0, 1, 10**9, 1 << 63, (1 << 64) - 1])
@pytest.mark.parametrize("times", [(0, 1 << 63, (1 << 64) - 1), ((1 << 64) - 1,), (0, (1 << 63) - 1), (5, 6)])
def test_babeltrace_reads_any_time_of_any_clock(hz: int, times: tuple[int, ...], tmp_path: Path) -> None:
    trace = made(lambda writer: [writer.event(Kind.EOI, cpu=0, time=time) for time in times], clock_hz=hz)
    _, read = export(trace, tmp_path / "ctf")
    assert babeltrace(tmp_path / "ctf") == [event.text for event in read]
    assert len(read) == len(times)


def test_the_command_line(tmp_path: Path, run_cli: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    from samples import write_race

    write_race(tmp_path / "race.tdbg")
    run_cli("convert", "race.tdbg", "--to", "ctf", "out", code=0)
    before = (tmp_path / "out" / "cpu_0").read_bytes()
    assert len(list(Directory(tmp_path / "out").events())) == race().count + 2
    assert "exists; --force overwrites it" in run_cli("convert", "race.tdbg", "--to", "ctf", "out", code=2).stderr
    run_cli("convert", "race.tdbg", "--to", "ctf", "--force", "out", code=0)
    assert (tmp_path / "out" / "cpu_0").read_bytes() == before
    assert run_cli("convert", "race.tdbg", "--to", "ctf", "-", code=2).stderr == (
        "tracedbg: --to ctf writes a directory: give its name\n"
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    refused = run_cli("convert", "race.tdbg", "--to", "ctf", "--force", "mine", code=2)
    assert "holds other things than a trace" in refused.stderr
