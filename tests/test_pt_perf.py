"""Intel PT against perf: the same files, its recorded answers, and the perf that is installed."""

from __future__ import annotations

import gzip
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import perf_asm
import pt_model
import pytest
from pt_random import recording
from test_pt_packets import lex, said, stream

from tracedbg.formats import open_input
from tracedbg.state import EventFlag, Kind, Known
from tracedbg.trace import Event, Trace

DATA = Path(__file__).parent / "data" / "pt"
TYPES = {
    Kind.DELIVER: "INTR", Kind.RETURN: "IRET", Kind.SMI: "SMI", Kind.RSM: "RSM", Kind.INIT: "INIT", Kind.VMENTRY: "VMENTRY",
    Kind.VMEXIT: "VMEXIT", Kind.SHUTDOWN: "SHUTDOWN",
}  # fmt: skip
# Name, seed and what is in it. The answers in tests/data/pt are those of perf 6.1.
FILES = {
    "plain": {"seed": 1, "cpus": 2},
    "clock": {"seed": 2, "cpus": 2, "clock": True},
    "overflow": {"seed": 3, "cpus": 1, "overflows": True},
}
LINE = re.compile(r"^\[(\d+)\] +(\d+)\.(\d{9}): +(?:evt|iflag): +(.*?) +([0-9a-f]+) *$")
CFE = re.compile(r"cfe: (\w+) IP: ([01]) vector: (\d+)(?: PFA: (0x\w+))?(?: VMXQ: (0x\w+))?(?: VMXR: (0x\w+))?")


class Line(NamedTuple):
    """One event: what, its address, vector, and what EVD packets said."""

    time: int | None  # ns
    what: str
    ip: int | None = None
    vector: int = 0
    data: tuple[int | None, ...] = (None, None, None)  # page-fault address, exit qualification, reason


def answer(text: str) -> dict[int, list[Line]]:
    """What perf says, by CPU."""
    found: dict[int, list[Line]] = {}
    for line in text.splitlines():
        if error := re.search(r"instruction trace error.* cpu (\d+) .*Overflow packet", line):
            found.setdefault(int(error[1]), []).append(Line(None, "gap"))
            continue
        parts = LINE.match(line)
        assert parts is not None, line
        time, ip = int(parts[2]) * 10**9 + int(parts[3]), int(parts[5], 16)
        if cfe := CFE.match(parts[4]):
            data = tuple(None if cfe[n] is None else int(cfe[n], 16) for n in (4, 5, 6))
            event = Line(time, cfe[1], ip if cfe[2] == "1" else None, int(cfe[3]), data)
        else:
            event = Line(time, re.sub(r"IFLAG: [01]->([01]) non branch", r"IF=\1", parts[4]), ip)
        found.setdefault(int(parts[1]), []).append(event)
    return found


def text_of(trace: Trace, event: Event) -> str:
    assert event.kind is Kind.MARK and event.flags & EventFlag.BYTES
    return bytes(trace.payload[event.value : event.value + event.code]).decode()


def told(trace: Trace) -> dict[int, list[Line]]:
    """What the reader says, as perf would."""
    found: dict[int, list[Line]] = {}
    for n in range(trace.count):
        e = trace.event(n)
        assert e.known & Known.CPU and e.known & Known.TIME
        lines, time = found.setdefault(e.cpu, []), e.time // 2  # the files' TSC has 2 GHz
        ip = e.rip if e.known & Known.RIP else None
        value = (e.known & Known.VALUE and e.value) or None  # perf does not print what is 0
        if e.kind is Kind.MARK:
            text = text_of(trace, e)
            if text.startswith("VM exit"):
                lines[-1] = lines[-1]._replace(what="VMEXIT_INTR", vector=int(text.split()[-1]))
            elif text.startswith("SIPI"):
                lines.append(Line(time, "SIPI", ip, int(text.split()[-1], 16) >> 12))
            else:
                lines.append(Line(time, "13" if text == "UIRET" else "12", ip, 0 if text == "UIRET" else int(text.split()[-1])))
        elif e.kind is Kind.FLAGS:
            lines.append(Line(time, f"IF={e.arg}", ip))
        elif e.kind is Kind.GAP:
            lines.append(Line(None, "gap"))
        elif e.kind is Kind.VMEXIT:
            ip = e.addr if e.known & Known.ADDR else None
            lines.append(Line(time, "VMEXIT", ip, 0, (None, value, (e.known & Known.CODE and e.code) or None)))
        else:
            vector = e.arg if e.kind is Kind.DELIVER else 0
            lines.append(Line(time, TYPES[e.kind], ip, vector, (value, None, None)))
    return found


def news(lines: list[Line]) -> list[Line]:
    """Without an IF that is what it was (perf tells each MODE.Exec), and without gaps: perf does not tell their place."""
    found, flag = [], "IF=1"
    for line in lines:
        if line.what != flag and line.what != "gap":
            found.append(line)
        if line.what.startswith("IF="):
            flag = line.what
    return found


def ask_perf(path: Path) -> str:
    """What `perf script` makes of a file; skips where there is none that can."""
    perf = shutil.which("perf")
    if perf is None:
        pytest.skip("no perf here")
    done = subprocess.run(
        [perf, "script", "--ns", "--itrace=Ie", "-F", "time,event,synth,ip,cpu", "-i", str(path)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    if "cfe:" not in done.stdout:
        pytest.skip("this perf does not decode Event Trace")
    # Errors go to the one, events to the other: their order among each other is that of their times.
    errors = [line for line in done.stderr.splitlines() if "Overflow packet" in line]
    return done.stdout + "".join(f"{line}\n" for line in errors)


def compare(path: Path, reference: str) -> None:
    expected = answer(reference)
    with open_input(str(path)) as trace:
        found = told(trace)
        times = [trace.event(n).time for n in range(trace.count)]
    assert found.keys() == expected.keys()
    for cpu, lines in found.items():
        assert news(lines) == news(expected[cpu])
        assert lines.count(Line(None, "gap")) == expected[cpu].count(Line(None, "gap"))
    assert times == sorted(times)


@pytest.mark.parametrize("name", FILES)
def test_the_recorded_answers(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.data"
    path.write_bytes(recording(**FILES[name]))  # type: ignore[arg-type]
    reference = gzip.decompress((DATA / f"{name}.perf.txt.gz").read_bytes()).decode()
    assert reference.count("cfe:") > 200
    compare(path, reference)


@pytest.mark.parametrize("seed", range(10, 16))
def test_the_installed_perf(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "x.data"
    path.write_bytes(recording(seed, cpus=seed % 3 + 1, clock=seed % 2 == 0, overflows=seed % 4 == 1))
    compare(path, ask_perf(path))


def test_packets_as_the_installed_perf_dumps_them(tmp_path: Path) -> None:
    perf = shutil.which("perf")
    if perf is None:
        pytest.skip("no perf here")
    r = random.Random(9)
    data = b""
    while len(data) < 50_000:
        part = stream(r, 20)
        if all(p.name != "TRIG" for p in pt_model.lex(part)[0]):  # newer than this perf
            data += part
    path = tmp_path / "x.data"
    path.write_bytes(perf_asm.perf_data(perf_asm.info(), perf_asm.aux(0, 0, data)))
    done = subprocess.run([perf, "script", "-D", "-i", str(path)], capture_output=True, text=True, check=False, timeout=60)
    dump = re.findall(r"^\. +([0-9a-f]{8}):  ((?:[0-9a-f]{2} )+) *([A-Z].*?)\s*$", done.stdout + done.stderr, re.MULTILINE)
    if not dump:
        pytest.skip("this perf does not dump packets")
    at, mine = 0, []
    for packet in lex(data)[0]:
        if packet.name != "PAD":  # perf takes those behind a packet for a part of it
            mine.append((f"{at:08x}", said(packet)))
        at += len(packet.raw)
    assert mine == [(offset, meaning) for offset, _, meaning in dump if meaning != "PAD"]
