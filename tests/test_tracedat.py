"""The reader of trace.dat against trace-cmd: recorded answers, and what it says now."""

from __future__ import annotations

import gzip
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from tracedatcheck import DATA, SAMPLES, Line, events, needs_trace_cmd, reference, report, text_of

from tracedbg.formats import ReaderOptions, open_input
from tracedbg.state import Kind, Known, Source
from tracedbg.symbols import Symbols
from tracedbg.trace import Event, Trace


def check_event(trace: Trace, names: Symbols, event: Event, line: Line) -> None:
    """An event against its line: one record is one event where the tracepoints that are no events are kept as marks."""

    def address(text: str, value: int) -> bool:  # trace-cmd prints some as names
        return int(text, 16) == value if text.startswith("0x") else text == (names.lookup(value) or ("",))[0]

    assert (event.cpu, event.time) == (line.cpu, line.time)
    if line.name.startswith("page_fault"):
        assert (event.kind, event.arg, event.source) == (Kind.DELIVER, 14, Source.EXCEPTION)
        assert event.value == int(line.fields["address"], 16) and event.code == int(line.fields["error_code"], 16)
        assert address(line.fields["ip"], event.rip)
        assert event.known == Known.TIME | Known.CPU | Known.RIP | Known.VALUE | Known.CODE | Known.ARG | Known.SOURCE
    elif line.name.endswith("_entry") and "vector" in line.fields:
        assert (event.kind, event.arg, event.source) == (Kind.DELIVER, int(line.fields["vector"]), Source.FIXED)
        assert event.known == Known.TIME | Known.CPU | Known.ARG | Known.SOURCE
    elif line.name == "nmi_handler":
        assert text_of(trace, event) == f"NMI: its handler {line.fields['handler']} ran, not its NMI".replace(
            "mce_raise_notify", "mce_raise_notify [mce_inject]")  # fmt: skip
    elif line.name == "mce_record":
        told = text_of(trace, event)
        assert told.startswith("#MC, recorded later, CPU 0, RIP 0x10:0x") and "MCG_STATUS 0x5," in told
        assert f"bank {line.fields['bank']}," in told
    else:
        assert text_of(trace, event).partition(":")[2] == line.name
        if line.name == "kp":
            assert (event.rip, event.rsp) == (int(line.fields["__probe_ip"], 16), int(line.fields["sp"], 16))


def check(trace: Trace, text: str, names: Symbols) -> None:
    lines = reference(text)
    assert len(lines) > 500 and trace.count == len(lines)
    for event, line in zip(events(trace), lines, strict=True):
        check_event(trace, names, event, line)


def answer(name: str) -> str:
    return gzip.decompress((DATA / f"{name}.report.txt.gz").read_bytes()).decode()


def names_of(trace: Trace) -> Symbols:
    return Symbols.from_bytes(trace.symbols)


@pytest.mark.parametrize("name", SAMPLES)
def test_every_record_of_a_sample_is_read_as_trace_cmd_does(name: str) -> None:
    with open_input(str(DATA / SAMPLES[name]), options=ReaderOptions(keep_marks=True)) as trace:
        assert trace.foreign == "trace-dat" and "damage" not in trace.meta
        check(trace, answer(name), names_of(trace))
        assert trace.meta["counts"]["records"] == trace.count
        assert trace.clock_hz == (10**9 if name == "local" else 0)


@pytest.mark.parametrize("name", SAMPLES)
def test_without_marks_the_events_are_the_same(name: str) -> None:
    with open_input(str(DATA / SAMPLES[name])) as trace:
        lines = [
            line for line in reference(answer(name))
            if line.name.startswith(("page_fault", "nmi_", "mce_")) or ("vector" in line.fields and line.name.endswith("_entry"))
        ]  # fmt: skip
        assert trace.count == len(lines) > 100
        for event, line in zip(events(trace), lines, strict=True):
            check_event(trace, names_of(trace), event, line)
        counts = Counter(line.name for line in reference(answer(name)))
        assert {key.partition(":")[2]: n for key, n in trace.meta["tracepoints"].items()} == counts
        assert trace.meta["counts"]["skipped_records"] == sum(counts.values()) - len(lines)


@needs_trace_cmd
@pytest.mark.parametrize("name", SAMPLES)
def test_the_committed_answers_are_those_of_trace_cmd(name: str, tmp_path: Path) -> None:
    data = (DATA / SAMPLES[name]).read_bytes()
    assert reference(report(data if name == "local" else gzip.decompress(data), tmp_path)) == reference(answer(name))




def short(text: str) -> list[tuple[int, int, str]]:
    """CPU, microseconds, tracepoint of `trace-cmd report` without -t."""
    lines = re.findall(r"^.+-\d+\s+\[?(\d+)\S*?\]?\s+(\d+)\.(\d{6}): (\S+):", text, re.MULTILINE)
    return [(int(cpu), int(sec) * 10**6 + int(micro), name) for cpu, sec, micro, name in lines]


def test_the_whole_recording_of_version_7(shared: Path) -> None:
    folder = shared / "trace-dat"
    lines = short((folder / "trace-smp2.report.txt").read_text())
    with open_input(str(folder / "trace-smp2.dat"), options=ReaderOptions(keep_marks=True)) as trace:
        assert len(lines) == trace.count == 590
        assert [(e.cpu, (e.time + 500) // 1000) for e in events(trace)] == [line[:2] for line in lines]
        # As many vectors as the log of the CPU that ran it has, or fewer: it ran before and after, too.
        with gzip.open(folder / "trace-smp2.qemu-int.log.gz", "rt") as log:
            logged = Counter(re.findall(r"^ *\d+: v=(\w\w)", log.read(), re.MULTILINE))
        for vector, count in Counter(e.arg for e in events(trace) if e.kind is Kind.DELIVER).items():
            assert 0 < count <= logged[f"{vector:02x}"], hex(vector)


def test_the_whole_recording_of_version_6(shared: Path) -> None:
    folder = shared / "trace-dat"
    with open_input(str(folder / "trace-v6-tsc-kp-smp2.dat.gz"), options=ReaderOptions(keep_marks=True)) as trace:
        check(trace, (folder / "trace-v6-tsc-kp-smp2.report-R.txt").read_text(), names_of(trace))
        marks = [e for e in events(trace) if e.kind is Kind.MARK and text_of(trace, e) == "kprobes:kp"]
        sps = re.findall(r" kp: .*sp=(0x\w+)", (folder / "trace-v6-tsc-kp-smp2.report-l.txt").read_text())
        assert [e.rsp for e in marks] == [int(sp, 16) for sp in sps] and len(marks) == 20


@needs_trace_cmd
@pytest.mark.parametrize("name", ["trace-smp2.dat", "trace-v6-tsc-kp-smp2.dat.gz"])
def test_whole_recordings_are_read_as_trace_cmd_does(shared: Path, name: str, tmp_path: Path) -> None:
    data = (shared / "trace-dat" / name).read_bytes()
    with open_input(str(shared / "trace-dat" / name), options=ReaderOptions(keep_marks=True)) as trace:
        check(trace, report(gzip.decompress(data) if name.endswith(".gz") else data, tmp_path), names_of(trace))


@needs_trace_cmd
@pytest.mark.parametrize(
    "how", [("6",), ("7", "--compression", "none"), ("7", "--compression", "any")], ids=["6", "7-none", "7-zstd"]
)
@pytest.mark.parametrize("name", SAMPLES)
def test_what_trace_cmd_converts_has_the_same_events(name: str, how: tuple[str, ...], tmp_path: Path) -> None:
    data = (DATA / SAMPLES[name]).read_bytes()
    (tmp_path / "in.dat").write_bytes(data if name == "local" else gzip.decompress(data))
    words = ["trace-cmd", "convert", "--file-version", *how, "-i", "in.dat", "-o", "out.dat"]
    subprocess.run(words, cwd=tmp_path, capture_output=True, check=True, timeout=60)
    with open_input(str(tmp_path / "in.dat")) as first, open_input(str(tmp_path / "out.dat")) as second:
        assert bytes(first.events) == bytes(second.events) and first.count > 100
        assert first.symbols == second.symbols and first.clock_hz == second.clock_hz
        assert second.meta["source"]["version"] == int(how[0])
