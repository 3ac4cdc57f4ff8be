"""The traces that ship with the program say what traces/README.md says, and are what the recordings give."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from make_traces import CASES, make_cases

from tracedbg import rules
from tracedbg.replay import Replay
from tracedbg.state import Rule
from tracedbg.trace import Trace

ROOT = Path(__file__).parent.parent
TRACES = ROOT / "traces"

WINDOW = ("reentry-window", "warning", None, 1)  # raised at an IRET, which the log does not number

# name -> findings in the order raised: (rule, severity, source's number of the event that raised it, count)
EXPECTED: dict[str, list[tuple[str, str, int | None, int]]] = {
    "xen-nmi-mce-nmi": [WINDOW, ("frame-consumed-corrupt", "error", 571, 1), ("resume-loop", "error", None, 1972)],
    "xen-nmi-mce-nmi-log": [("frame-clobbered", "error", 571, 1)],
    "linux-nested-nmi": [("frame-relocated", "note", 3033, 1)],
    "fake-nmi-pic": [("fake-nmi", "warning", 0, 1), ("frame-relocated", "note", 1, 1)],
    "fake-mce-lapic": [("fake-mce", "warning", 0, 1), ("frame-clobbered", "warning", 1, 1)],
    "nmi-int3-nmi-consumed": [WINDOW, ("frame-consumed-corrupt", "error", 2, 1), ("resume-loop", "error", None, 4)],
    "nmi-int3-nmi": [WINDOW, ("frame-relocated", "note", 2, 1)],
    "nmi-int3-nmi-log": [("frame-clobbered", "warning", 2, 1)],
    "nmi-latched": [],
    "syscall-gap-no-ist": [("user-stack", "error", 0, 1)],
    "syscall-gap-ist": [],
    "mce-mcip-shutdown": [("shutdown", "error", None, 1)],
    "double-fault": [("double-fault", "error", 2, 1)],
}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_shipped_trace_gives_its_verdict(name: str) -> None:
    with Trace.open(TRACES / f"{name}.tdbg") as trace, Replay(trace) as replay:
        replay.scan_all()
        found = []
        for finding in replay.findings():
            event = trace.event(finding.event)
            number = event.source_index if event.known & 128 else None
            found.append((rules.rule_id(rules.finding_rule(finding)), rules.finding_severity(finding), number, finding.count))
        assert found == EXPECTED[name]
        assert replay.stats().unjudged == 0 and replay.stats().bad_events == 0


def test_the_readme_lists_every_trace_and_its_findings() -> None:
    rows = {}
    for line in (TRACES / "README.md").read_text().splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows[cells[0].strip("`")] = set(re.findall(r"`([a-z-]+)`", cells[3]))
    recorded = {name: {rule for rule, *_ in found} for name, found in EXPECTED.items()}
    assert rows == recorded | {name: said(name) for name in CASES}
    assert {path.stem for path in TRACES.glob("*.tdbg")} == set(EXPECTED) | set(CASES)


def said(name: str) -> set[str]:
    """The ids of a trace's findings; what they must be stands in the case that it is made from (test_cases.py)."""
    with Trace.open(TRACES / f"{name}.tdbg") as trace, Replay(trace) as replay:
        replay.scan_all()
        return {rules.rule_id(rules.finding_rule(finding)) for finding in replay.findings()}


def test_the_cases_give_the_same_bytes(tmp_path: Path) -> None:
    make_cases(tmp_path)
    assert len(CASES) == 15
    for name in CASES:
        assert (tmp_path / f"{name}.tdbg").read_bytes() == (TRACES / f"{name}.tdbg").read_bytes(), name


def test_the_flagship_names_the_place_by_itself() -> None:
    with Trace.open(TRACES / "xen-nmi-mce-nmi.tdbg") as trace, Replay(trace) as replay:
        replay.scan_all()
        window, consumed, loop = replay.findings()
        assert window.victim == consumed.victim and window.event < consumed.event
        assert consumed.victim is not None and consumed.writer is not None and consumed.popped is not None
        # do_nmi+2 and the frame as the debugger read them on the machine.
        assert (consumed.lo, consumed.hi) == (0xFFFF8300BFFD2FD8, 0xFFFF8300BFFD3000)
        assert consumed.victim.saved.rip == 0xFFFF82D0402F9C06
        assert consumed.popped.rip == consumed.writer.saved.rip == 0xFFFF82D04032A242
        assert loop.rule is Rule.RESUME_LOOP
        assert b"do_nmi" in trace.symbols and b"default_idle" in trace.symbols


def test_the_recordings_give_the_same_bytes(shared: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "tests/make_traces.py", shared, tmp_path], check=True)
    made = {path.name: path.read_bytes() for path in tmp_path.glob("*.tdbg")}
    assert set(made) == {f"{name}.tdbg" for name in EXPECTED}
    for name, data in made.items():
        assert data == (TRACES / name).read_bytes(), name
