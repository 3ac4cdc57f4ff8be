"""What `tracedbg info` says of a trace: truthfully, and in a bounded number of lines."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from tracedbg.state import Kind
from tracedbg.writer import TraceWriter

Run = Callable[..., subprocess.CompletedProcess[str]]


def second_line(run_cli: Run, path: Path) -> str:
    return run_cli("info", path, code=0).stdout.splitlines()[1]


def test_times_of_an_unknown_clock_are_not_no_clock(tmp_path: Path, run_cli: Run) -> None:
    path = tmp_path / "x.tdbg"
    for timed, hz, said in ((0, 0, "no clock"), (1, 0, "a clock of unknown frequency"), (1, 3, "clock 3 Hz")):
        with TraceWriter(path, clock_hz=hz, force=True) as writer:
            for number in range(70_000):  # more than are looked at together, and only the last one has a time
                writer.event(Kind.EOI, cpu=0, **({"time": 5} if timed and number == 69_999 else {}))
        assert second_line(run_cli, path) == f"events: 70,000, 1 CPU, {said}"


def test_the_header_of_a_case_is_shown(root: Path, tmp_path: Path, run_cli: Run) -> None:
    case = root / "tests" / "cases" / "01-fake-nmi-then-nmi.case"
    run_cli("convert", case, "x.tdbg", code=0)
    for path in (case, tmp_path / "x.tdbg"):
        lines = run_cli("info", path, code=0).stdout.splitlines()
        at = lines.index("case:")
        assert lines[at + 1 : at + 4] == [
            "  title: Fake NMI through the 8259, then a genuine one",
            "  source: xen-devel 2012, on reentrant NMIs and MCEs",
            "  rules: R2 R3 R5 R6 R15 R16 R28",
        ]
    (tmp_path / "bare.case").write_text("tracedbg case 1\n\n[events]\neoi   # a comment\n")
    assert "case:" not in run_cli("info", "bare.case", code=0).stdout.splitlines()


def test_odd_headers_of_a_case(tmp_path: Path, run_cli: Run) -> None:
    for header in (5, {"a": 1}, [5, ["title"], ["x", 3], [[], {}], ["\x1b[31m", "\x1b[32m"]], "text"):
        with TraceWriter(tmp_path / "x.tdbg", force=True) as writer:
            writer.event(Kind.EOI)
            writer.meta = {"case": {"header": header}}
        assert "\x1b" not in run_cli("info", "x.tdbg", code=0).stdout


def test_a_meta_of_many_keys_is_cut(tmp_path: Path, run_cli: Run) -> None:
    path = tmp_path / "x.tdbg"
    with TraceWriter(path) as writer:
        writer.event(Kind.EOI)
        writer.meta = {**{f"k{n:05}": n for n in range(50_000)}, "long": {f"i{n:05}": "x" for n in range(50_000)}}
    lines = run_cli("info", path, code=0).stdout.splitlines()
    assert len(lines) < 500 and "and 49,801 more keys of META" in lines
    with TraceWriter(path, force=True) as writer:
        writer.event(Kind.EOI)
        writer.meta = {"fidelity": {f"i{n:05}": "x" for n in range(50_000)}, "flat": {f"i{n:05}": n for n in range(50_000)}}
    done = run_cli("info", path, code=0).stdout
    assert "  and 49,800 more" in done.splitlines() and len(done) < 20_000
