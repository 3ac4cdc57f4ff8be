"""Clocks, options, refusals and format texts of trace.dat."""

from __future__ import annotations

import gzip
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tracedatcheck import DATA, POINTS, SOFT, VALID, entry, one, page_of, tick, vmexit
from tracedatfile import Buffer, File

from tracedbg.errors import FormatError, UsageError
from tracedbg.formats import ReaderOptions, open_input, open_inputs
from tracedbg.formats.tracedat import text as tracedat_text
from tracedbg.trace import Trace

Opener = Callable[..., Trace]


@pytest.fixture
def read(tmp_path: Path) -> Opener:
    def open_bytes(data: bytes, **options: Any) -> Trace:
        path = tmp_path / "x.dat"
        path.write_bytes(data)
        return open_input(str(path), options=ReaderOptions(**options))

    return open_bytes


@pytest.mark.parametrize(
    ("clock", "options", "hz"),
    [
        ("local", (), 10**9), ("mono_raw", (), 10**9), ("x86-tsc", (), 0), ("uptime", (), 100), ("counter", (), 0),
        ("x86-tsc", ((14, struct.pack("<IIQ", 4194304, 23, 0)),), 2 * 10**9),  # 0.5 ns a tick
        ("x86-tsc", ((14, struct.pack("<IIQ", 0, 23, 0)),), 0), ("x86-tsc", ((14, b"short"),), 0),
    ],
)  # fmt: skip
def test_clocks(clock: str, options: Any, hz: int, read: Opener) -> None:
    file = File(POINTS, [Buffer({0: page_of(tick())}, clock=clock)], clock=clock, options=options)
    for data in (file.six(), file.seven()):
        with read(data) as trace:
            assert trace.clock_hz == hz and trace.meta["source"]["clock"] == clock
            assert ("--cpu-hz" in trace.meta["fidelity"]["time"]) == (clock == "x86-tsc" and not hz)


def test_statistics_and_shifts_are_told(read: Opener) -> None:
    stat = b"CPU: 0\nentries: 7\noverrun: 12\ncommit overrun: 0\nbytes: 9\ndropped events: 3\nread events: 4\n\0"
    file = one(page_of(tick()), options=((2, stat), (2, stat), (7, b"1000\0")))
    with read(file.seven()) as trace:
        counts = trace.meta["counts"]
        assert (counts["overrun"], counts["dropped_events"]) == (24, 6) and "commit_overrun" not in counts
        assert "not moved by the file's OFFSET" in trace.meta["fidelity"]["time"]


def test_options(read: Opener, run_cli: Callable[..., Any], tmp_path: Path) -> None:
    tsc = File(POINTS, [Buffer({0: page_of(tick())}, clock="x86-tsc")], clock="x86-tsc").six()
    with read(tsc, cpu_hz=2_400_000_000) as trace:
        assert trace.clock_hz == 2_400_000_000
    with pytest.raises(UsageError, match="not the TSC"):
        read(one(page_of(tick())).six(), cpu_hz=1)
    for options in ({"monitor": ("x",)}, {"stores": ((0, 1),)}, {"vendor": "vmx"}):
        with pytest.raises(UsageError):
            read(tsc, **options)
    path = tmp_path / "x.dat"
    with pytest.raises(UsageError, match="one file"):
        open_inputs([str(path), shutil.copy(path, f"{path}.2")])
    path.write_bytes(one(page_of(tick(), SOFT.record(3))).six())
    assert "mark" in run_cli("info", "--keep-marks", path, code=0).stdout
    run_cli("convert", path, "x.tdbg", code=0)
    run_cli("info", "--keep-marks", "x.tdbg", code=2)
    log = Path(__file__).parent / "data" / "xentrace" / "pv.bin.gz"
    assert "--keep-marks" in run_cli("info", "--keep-marks", log, code=2).stderr


def test_pipes_and_packed_files(run_cli: Callable[..., Any]) -> None:
    data = (DATA / "local.dat").read_bytes()
    plain = run_cli("info", DATA / "local.dat", code=0).stdout.splitlines()[1:]
    piped = run_cli("info", "-", code=0, stdin=data).stdout.splitlines()[1:]
    packed = run_cli("info", "-", code=0, stdin=gzip.compress(data)).stdout.splitlines()[1:]
    for other in (piped, packed):
        assert [x for x in other if "name:" not in x and "sha256" not in x] == [
            x for x in plain if "name:" not in x and "sha256" not in x]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ((10, b"5\0"), "version '5'"), ((10, b"8\0"), "version '8'"), ((12, b"\1"), "big-endian"), ((13, b"\3"), "longs of 3"),
    ],
)  # fmt: skip
def test_files_that_are_not_read(change: tuple[int, bytes], what: str, read: Opener) -> None:
    data = bytearray(one(page_of(tick())).six())
    data[change[0] : change[0] + len(change[1])] = change[1]
    with pytest.raises(FormatError, match=what):
        read(bytes(data))


def test_latency_traces_are_refused(read: Opener) -> None:
    data = one(page_of(tick())).six().replace(b"flyrecord\0", b"latency  \0")
    with pytest.raises(FormatError, match="latency"):
        read(data)


def test_unknown_packing_is_refused(read: Opener) -> None:
    data = one(page_of(tick())).seven("none").replace(b"none\0", b"lzma\0", 1)
    with pytest.raises(FormatError, match="'lzma'"):
        read(data)


def test_overlapping_pages_are_refused(read: Opener) -> None:
    file = File(POINTS, [Buffer({0: page_of(tick()), 1: page_of(tick())})])
    data = file.six()
    at = data.index(b"flyrecord\0") + 10
    data = data[: at + 16] + data[at : at + 8] + data[at + 24 :]
    with pytest.raises(FormatError, match="begin in those of another"):
        read(data)


def test_sections_of_options_that_never_end_are_refused(read: Opener) -> None:
    data = bytearray(one(page_of(tick())).seven())
    first = int.from_bytes(data[25:33], "little")
    at = data.index(struct.pack("<HI", 0, 8), first)
    data[at + 6 : at + 14] = struct.pack("<Q", first)
    with pytest.raises(FormatError, match="do not end"):
        read(bytes(data))


def test_format_texts() -> None:
    text = (
        "name: x\nID: 7\nformat:\n\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;\n\n"
        "\tfield:const char * what;\toffset:8;\tsize:8;\tsigned:0;\n\tfield:char comm[16];\toffset:16;\tsize:16;\tsigned:0;\n"
        "\tfield:__data_loc char[] name;\toffset:32;\tsize:4;\tsigned:1;\n\tfield:bad;\toffset:x;\tsize:4;\n"
        '\nprint fmt: "%s", REC->what\n\tfield:int never;\toffset:0;\tsize:4;\tsigned:1;\n'
    )
    form = tracedat_text.event("s", text)
    assert form is not None and form.full_name == "s:x" and form.number == 7
    places = {name: (one.at, one.size, one.is_number) for name, one in form.fields.items()}
    assert places == {
        "common_type": (0, 2, True), "what": (8, 8, True), "comm": (16, 16, False), "name": (32, 4, True),
    }  # fmt: skip
    for bad in ("", "name: x\n", "ID: 7\n", "name: x\nID: 99999\n", "name: x\nID: -1\n"):
        assert tracedat_text.event("s", bad) is None


def test_formats_of_linux_6_1(shared: Path) -> None:
    texts = (shared / "trace-dat" / "event-formats-6.1.txt").read_text().split("== ")[1:]
    for text in texts:
        path, _, body = text.partition("\n")
        form = tracedat_text.event(path.split("/")[-3], body)
        assert form is not None and form.name == path.split("/")[-2]
        assert len(form.fields) == body.count("\tfield:") and form.fields["common_pid"].at == 4


def test_info_is_honest(run_cli: Callable[..., Any], read: Opener, tmp_path: Path) -> None:
    said = run_cli("info", DATA / "local.dat", code=0).stdout
    for text in ("IRETs are not traced", "no tracepoint has RSP", "a mark, no delivery", "clock local"):
        assert text in said
    path = tmp_path / "g.dat"
    path.write_bytes(one(page_of(entry(VALID | 0x202), vmexit(30))).six())
    said = run_cli("info", path, code=0).stdout
    assert "vCPU 0 of thread 70" in said and "nor interrupts that are posted" in said
