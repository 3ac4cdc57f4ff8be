"""The reader of raw Intel PT data: recognising it, several CPUs, memory, damage, and what the command line says."""

from __future__ import annotations

import gzip
import io
import random
import resource
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from model_bench import layout
from pt_asm import OVF, PSB, PSBEND, cfe, evd, fup, mode, psbp, tip, tsc
from pt_random import TSC0, Source

from tracedbg.errors import FormatError, UsageError
from tracedbg.formats import ReaderOptions, open_input, open_inputs
from tracedbg.formats.pt import intel_pt
from tracedbg.formats.pt import stream as pt_stream
from tracedbg.layout import Fidelity
from tracedbg.replay import Replay
from tracedbg.state import Evidence, Kind, Known, Rule
from tracedbg.trace import Trace
from tracedbg.writer import TraceWriter

Run = Callable[..., subprocess.CompletedProcess[str]]


def sample(seed: int = 1, steps: int = 100, *, overflows: bool = True) -> bytes:
    return Source(random.Random(seed), overflows=overflows).stream(steps)


def kinds(trace: Trace) -> list[Kind]:
    return [trace.event(n).kind for n in range(trace.count)]


# -- recognising --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [0, 1, 77, 70_000])
def test_it_is_recognised_wherever_it_begins(before: int, tmp_path: Path) -> None:
    path = tmp_path / "aux.bin"
    path.write_bytes(tip(0x1234, 1) * before + sample())
    with open_input(str(path)) as trace:
        assert trace.foreign == "intel-pt" and trace.meta["source"]["format"] == "intel-pt"
        assert trace.meta["counts"].get("bytes_skipped", 0) == 3 * before
    path.with_suffix(".gz").write_bytes(gzip.compress(path.read_bytes()))
    with open_input(str(path.with_suffix(".gz"))) as packed, open_input(str(path)) as trace:
        assert bytes(packed.events) == bytes(trace.events)


def test_other_data_are_not() -> None:
    assert not intel_pt.sniff(b"")
    assert not intel_pt.sniff(bytes(1000))
    assert not intel_pt.sniff(b"\x02\x82" * 7)
    assert not intel_pt.sniff(PSB + b"\xff" * 100)
    assert not intel_pt.sniff(PSB + b"\x02\x82 text with a PSB in it")
    assert not intel_pt.sniff(PSB + cfe(1) + PSBEND)
    assert intel_pt.sniff(psbp())
    for seed in range(50):
        assert not intel_pt.sniff(PSB + random.Random(seed).randbytes(4096))


def test_what_is_no_trace_of_events_is_refused(tmp_path: Path, run_cli: Run) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(psbp(0x1000) + tip(0x2000) * 100)
    done = run_cli("info", path, code=2)
    assert "without Event Trace" in done.stderr and "intel_pt/branch=0,event/" in done.stderr and done.stderr.count("\n") == 1
    path.write_bytes(b"\x02\x23" * 100)
    with pytest.raises(FormatError, match="no PSB in it"):
        open_input(str(path), from_format="intel-pt")


# -- several CPUs -------------------------------------------------------------------------------------------------------


def test_files_of_several_cpus_are_merged_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    r = random.Random(6)
    whole: list[tuple[int, int, int]] = []
    paths = []
    for cpu in range(3):
        now, data = TSC0 + r.randrange(100), psbp()
        for n in range(700):
            now += r.choice((0, 1, 50, 400))
            data += tsc(now) + cfe(1, n % 256)
            whole.append((now, cpu, n % 256))
        path = tmp_path / f"{cpu}.bin"
        path.write_bytes(data)
        paths.append(str(path))
    whole.sort(key=lambda e: e[:2])  # of one time, the first CPU's first
    made = []
    for rows in (4096, 16, 9):
        monkeypatch.setattr(pt_stream, "ROWS", rows)
        with open_inputs(paths) as trace:
            events = [trace.event(n) for n in range(trace.count)]
            assert [(e.time, e.cpu, e.arg) for e in events] == whole
            assert trace.cpus == 3 and [f["name"] for f in trace.meta["source"]["files"]] == ["0.bin", "1.bin", "2.bin"]
            made.append(bytes(trace.events))
    assert made[0] == made[1] == made[2]


def test_a_cpu_keeps_its_order_whatever_its_clock_says(tmp_path: Path) -> None:
    one = psbp() + cfe(1, 40) + b"".join(tsc(t) + cfe(1, n) for n, t in enumerate((5, 1 << 50, 6, 3)))
    two = psbp() + tsc(7) + cfe(1, 99)
    paths = []
    for n, data in enumerate((one, two)):
        (tmp_path / f"{n}").write_bytes(data)
        paths.append(str(tmp_path / f"{n}"))
    with open_inputs(paths) as trace:
        assert [trace.event(n).arg for n in range(trace.count)] == [40, 0, 99, 1, 2, 3]


def test_all_files_have_to_be_streams(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(sample())
    (tmp_path / "b").write_bytes(b"text" * 100)
    with pytest.raises(FormatError, match=r"b.*not of the format"):
        open_inputs([str(tmp_path / "a"), str(tmp_path / "b")])


# -- bytes in pieces ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [8, 9, 64])
def test_blocks_do_not_show(rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    damaged = bytearray(sample(2, 300))
    for at in range(50, len(damaged), 500):
        damaged[at] = 0xC9
    path.write_bytes(damaged)
    with open_input(str(path)) as trace:
        whole, meta = bytes(trace.events), trace.meta
    monkeypatch.setattr(pt_stream, "ROWS", rows)
    with open_input(str(path)) as trace:
        assert bytes(trace.events) == whole and trace.meta == meta


def test_a_large_stream_needs_little_memory(tmp_path: Path) -> None:
    # 48 MB of packets, of which few are events; packed, it is small on disk.
    quiet = psbp(0x1000) + cfe(1, 32) + fup(0x1000) + tip(0x2000) + (b"\xa6" * 3 + tip(0x3000, 2)) * 6000
    path = tmp_path / "x.gz"
    with gzip.open(path, "wb", 1) as file:
        for _ in range(1000):
            file.write(quiet)
    assert len(quiet) > 48_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open_input(str(path)) as trace:
        assert trace.count == 2000 and trace.meta["counts"]["psb"] == 1000
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 24 << 10  # KiB


# -- damage -------------------------------------------------------------------------------------------------------------


def outcome(path: Path) -> tuple[str, Trace | None]:
    """How an input ends: an error with its place, a marked partial result, or a whole one."""
    try:
        trace = open_input(str(path), from_format="intel-pt")
    except FormatError as error:
        assert error.offset is not None and "\n" not in str(error)
        return "error", None
    assert [0, *trace.check()][-1] == trace.count
    return ("partial" if "damage" in trace.meta else "whole"), trace


def test_every_truncation(tmp_path: Path) -> None:
    path, data = tmp_path / "x", sample(3, 40)
    path.write_bytes(data)
    with open_input(str(path)) as trace:
        rows, gaps = bytes(trace.events), kinds(trace).count(Kind.GAP)
    seen: Counter[str] = Counter()
    for size in range(1, len(data)):
        path.write_bytes(data[:size])
        how, cut = outcome(path)
        seen[how] += 1
        if cut is None:
            assert size < 80  # before anything is known
            continue
        # Nothing is made up: all but the last event (whose address may be cut off) is a beginning of the whole.
        count = cut.count - (how == "partial")
        assert bytes(cut.events)[: (count - 1) * 64] == rows[: (count - 1) * 64]
        assert (kinds(cut).count(Kind.GAP) <= gaps) or how == "partial"
        if how == "partial":
            assert cut.event(cut.count - 1).kind is Kind.GAP
            assert cut.meta["damage"][-1].endswith("cut short within a packet")
        cut.close()
    assert seen["partial"] > seen["whole"] > 50


def mutated(r: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(r.choice((1, 1, 2, 8))):
        at = r.randrange(len(changed))
        changed[at] = r.choice((0, 0xFF, 2, 0x82, r.randrange(256), changed[at] ^ 1 << r.randrange(8)))
    if r.random() < 0.3:
        at = r.randrange(len(changed))
        del changed[at : at + r.randrange(1, 20)]
    if r.random() < 0.1:
        at = r.randrange(len(changed))
        changed[at:at] = r.choice((PSB, OVF, cfe(1, 3, ip=True), evd(0, 1), r.randbytes(9)))
    return bytes(changed)


def sound(rows: bytes, size: int, damaged: bool) -> None:
    """What is to be said of any stream: events of this CPU, and a gap wherever something was lost."""
    count, kinds_ = len(rows) // 64, set(rows[60::64])
    assert count <= size // 2 + 2 and kinds_ <= {int(kind) for kind in Kind}
    assert Kind.GAP in kinds_ or not damaged


def base(seed: int) -> bytes:
    return sample(seed, 30) + psbp(0x1000) + cfe(1, 32) + fup(0x1000) + tip(0x2000) + mode() + fup(0x3000)


@pytest.mark.parametrize("seed", range(4))
def test_mutations_of_streams_end_well(seed: int) -> None:
    r, data, texts = random.Random(seed), base(seed), pt_stream.Texts(TraceWriter(io.BytesIO()))
    seen: Counter[bool] = Counter()
    for _ in range(10_000):
        changed, stream = mutated(r, data), pt_stream.Stream(texts, 0)
        cut = r.randrange(len(changed))
        rows = b"".join((*stream.feed(changed[:cut]), *stream.feed(changed[cut:]), *stream.feed(b"", last=True)))
        assert stream.offset == len(changed)
        sound(rows, len(changed), bool(stream.damage))
        seen[bool(stream.damage)] += 1
    assert min(seen.values()) > 1000


def test_mutations_of_files_end_well(tmp_path: Path) -> None:
    path, r, data = tmp_path / "x", random.Random(1), base(1)
    seen: Counter[str] = Counter()
    for _ in range(1000):
        changed = mutated(r, data)
        path.write_bytes(changed)
        how, trace = outcome(path)
        seen[how] += 1
        if trace is not None:
            sound(bytes(trace.events), len(changed), how == "partial")
            trace.close()
    assert seen["partial"] > 100 and seen["whole"] > 100


def test_after_damage_all_is_as_before(tmp_path: Path) -> None:
    # Whatever is thrown in front of a PSB, what comes behind it is read as if nothing had been.
    r, path, clean = random.Random(8), tmp_path / "x", tsc(9) + sample(5, 20, overflows=False)
    path.write_bytes(clean)
    with open_input(str(path)) as trace:
        expected = [trace.event(n) for n in range(trace.count)]
    for _ in range(500):
        rubbish = r.randbytes(r.randrange(1, 60))
        path.write_bytes(sample(4, 5) + b"\xc9" + rubbish + clean[8:])
        with open_input(str(path)) as trace:
            last = [trace.event(n) for n in range(trace.count - len(expected), trace.count)]
            assert [(e.kind, e.known, e.rip, e.arg, e.value) for e in last] == [
                (e.kind, e.known, e.rip, e.arg, e.value) for e in expected
            ]
            assert Kind.GAP in kinds(trace) and trace.meta["damage"]


def test_many_damages_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes((psbp() + cfe(4) + b"\xc9") * 100)
    with open_input(str(path)) as trace:
        assert trace.meta["counts"]["damaged_places"] == 100 and len(trace.meta["damage"]) == 20
        assert kinds(trace) == [Kind.RSM, Kind.GAP] * 100


def test_runs_of_the_pattern_end(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for data in (PSB * 200_000, b"\x02" + PSB * 200_000, psbp() + cfe(4) + b"\xc9" + b"\x02\x82" * 500_000 + psbp() + cfe(4)):
        path.write_bytes(data)
        outcome(path)


# -- what it says -------------------------------------------------------------------------------------------------------


def test_options(tmp_path: Path, run_cli: Run) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(sample())
    for options in (ReaderOptions(monitor=("x",)), ReaderOptions(stores=((0, 1),)), ReaderOptions(vendor="vmx")):
        with pytest.raises(UsageError):
            open_input(str(path), options=options)
    assert "clock 2,400,000,000 Hz" in run_cli("info", "--cpu-hz", "2.4G", path, code=0).stdout
    said = run_cli("info", path, code=0).stdout
    for words in ("has no RSP", "the frequency is not known (--cpu-hz)", "leaves nothing", "is CPU 0", "overflows"):
        assert words in said
    done = run_cli("replay", "--fail-on", "warning", path)
    assert (done.returncode in (1, 3) and "no layout" in done.stdout) or "layout: none" in done.stdout
    assert done.stderr.count("\n") <= 2


def test_lines_of_events(tmp_path: Path, run_cli: Run) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(psbp() + mode(iflag=True) + fup(0x1000) + cfe(10, ip=True) + fup(0x2000))
    with open_input(str(path)) as trace:
        assert [trace.event(n).known & Known.ARG for n in range(2)] == [Known.ARG, 0]
    run_cli("convert", path, "x.tdbg", code=0)
    run_cli("convert", path, "x.case", code=0)
    text = (tmp_path / "x.case").read_text()
    assert "flags arg 1 rip 0x1000\nshutdown index" in text
    assert "The CPU shut down: the reason is not recorded." in run_cli("replay", "x.tdbg", code=1).stdout


# -- what can be concluded ----------------------------------------------------------------------------------------------

KERNEL = 0xFFFF_82D0_4020_0000
LAYOUT = """
[[cpu]]
tr = "0x1000"
idt = "0x2000"
[[tss]]
base = "0x1000"
ist1 = "0xffff8300bffd2000"
ist2 = "0xffff8300bffd3000"
[[idt]]
base = "0x2000"
gate.2 = { handler = "0xffff82d040201e00", ist = 2 }
gate.18 = { handler = "0xffff82d040201f00", ist = 1 }
"""


def delivered(vector: int, at: int, handler: int) -> bytes:
    return cfe(1, vector) + fup(KERNEL + at) + tip(KERNEL + handler)


def returned(at: int, to: int) -> bytes:
    return cfe(2, ip=True) + fup(KERNEL + at) + tip(KERNEL + to)


NMI_1, MC, NMI_2 = delivered(2, 0xC6, 0x1E00), delivered(18, 0x1E02, 0x1F00), delivered(2, 0x1E02, 0x1E00)


def test_nothing_is_made_of_nmis_one_after_the_other(tmp_path: Path, run_cli: Run) -> None:
    (tmp_path / "l.toml").write_text(LAYOUT)
    for n, data in enumerate((
        psbp(KERNEL) + b"".join(delivered(2, n, 0x1E00) + returned(0x1E90, n) for n in range(9)),
        psbp() + b"".join(cfe(1, 2, ip=True) + fup(KERNEL + n) + cfe(2, ip=True) + fup(KERNEL) for n in range(9)),
    )):  # fmt: skip
        (tmp_path / f"{n}.bin").write_bytes(data)
        done = run_cli("replay", "--layout", "l.toml", f"{n}.bin", code=3)
        assert "verdict: unknown: the trace has returns without RSP" in done.stdout and "warning" not in done.stdout


def test_an_nmi_in_an_nmi_is_inferred_from_the_targets(tmp_path: Path, run_cli: Run) -> None:
    # The IRET of the #MC went into the NMI handler: the frame of the first NMI was still there when the second one came.
    (tmp_path / "l.toml").write_text(LAYOUT)
    data = psbp(KERNEL) + NMI_1 + MC + returned(0x1F50, 0x1E02) + NMI_2 + returned(0x1E90, 0x1E02) + returned(0x1E90, 0x1E02)
    (tmp_path / "x.bin").write_bytes(data)
    done = run_cli("replay", "--layout", "l.toml", "x.bin", code=3)
    assert done.stdout.count("frame-clobbered") == 1 and "overwrote the frame of the" in done.stdout
    assert "does not say which frame a return popped" in done.stdout and "model-mismatch" not in done.stdout
    # It went elsewhere: that can have been the first NMI's.
    data = psbp(KERNEL) + NMI_1 + MC + returned(0x1F50, 0xC6) + NMI_2
    (tmp_path / "x.bin").write_bytes(data)
    assert "frame-clobbered" not in run_cli("replay", "--layout", "l.toml", "x.bin", code=3).stdout


def test_a_handler_that_is_not_the_gates(tmp_path: Path, run_cli: Run) -> None:
    (tmp_path / "l.toml").write_text(LAYOUT)
    (tmp_path / "x.bin").write_bytes(psbp(KERNEL) + delivered(2, 0xC6, 0x6666))
    assert "model-mismatch" in run_cli("replay", "--layout", "l.toml", "x.bin").stdout


# -- what the replay makes of it ----------------------------------------------------------------------------------------

NMI, MCHECK, HANDLER = 2, 18, 0xFFFFFFFF81E00000


def at(vector: int, ip: int) -> bytes:
    return cfe(1, vector, ip=True) + fup(ip)


def back(ip: int) -> bytes:
    return cfe(2, ip=True) + fup(ip)


ORDINARY = at(NMI, 0x101000) + back(HANDLER + 9)
INSIDE = at(NMI, 0x101000) + evd(0, 0x7000) + at(14, HANDLER) + back(0x100250) + back(HANDLER + 9)  # a #PF in the NMI


AGAIN = back(0x100290) + at(NMI, HANDLER + 2)  # the IRET inside of it unblocked NMIs


@pytest.mark.parametrize(
    ("events", "overwrites"),
    [
        (ORDINARY * 20, []),
        (INSIDE * 20, []),
        ((cfe(1, NMI) + cfe(2)) * 20, []),  # nothing but the events
        (ORDINARY + at(NMI, 0x101000) + at(MCHECK, HANDLER + 2) + AGAIN + back(HANDLER + 9) * 2, [(2, 5)]),
        (at(NMI, 0x101000) + evd(0, 0x7000) + at(14, HANDLER) + AGAIN, [(0, 3)]),
    ],
    ids=["ordinary", "page fault in it", "no addresses", "nmi, mc, iret, nmi", "nmi, page fault, iret, nmi"],
)
def test_a_handler_that_was_interrupted_is_told_from_one_that_returned(
    events: bytes, overwrites: list[tuple[int, int]], tmp_path: Path
) -> None:
    path = tmp_path / "aux.bin"
    path.write_bytes(psbp() + events + psbp())
    with open_input(str(path), options=ReaderOptions(layout=layout(fidelity=Fidelity.NONE))) as trace, Replay(trace) as replay:
        replay.scan_all()
        found = replay.findings()
        assert [(f.victim and f.victim.entry, f.event) for f in found] == overwrites
        assert all((f.rule, f.evidence) == (Rule.FRAME_CLOBBERED, Evidence.INFERRED) for f in found)
