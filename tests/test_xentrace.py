"""The xentrace reader: against xenalyze, against records made by hand, and with damaged input."""

from __future__ import annotations

import gzip
import random
import re
import shutil
import struct
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tracedbg.errors import FormatError, UsageError
from tracedbg.formats import ReaderOptions, open_input, open_inputs
from tracedbg.formats.xentrace import decode as xentrace_decode
from tracedbg.formats.xentrace import read as xentrace
from tracedbg.state import EventFlag, Kind, Known, Source
from tracedbg.trace import Event, Trace

DATA = Path(__file__).parent / "data" / "xentrace"
SAMPLES = ("hvm", "pv", "smp")
TSC0 = 1_000_000

# AMD APM volume 2, appendix C, table C-1: the exits in the samples.
SVM_REASONS = {
    "VMEXIT_CR0_READ": 0x00, "VMEXIT_CR0_WRITE": 0x10, "VMEXIT_CR3_WRITE": 0x13, "VMEXIT_CR4_WRITE": 0x14,
    "VMEXIT_EXCEPTION_NM": 0x47, "VMEXIT_INTR": 0x60, "VMEXIT_NMI": 0x61, "VMEXIT_VINTR": 0x64, "VMEXIT_RDTSC": 0x6E,
    "VMEXIT_CPUID": 0x72, "VMEXIT_HLT": 0x78, "VMEXIT_IOIO": 0x7B, "VMEXIT_MSR": 0x7C, "VMEXIT_VMMCALL": 0x81,
    "VMEXIT_WBINVD": 0x89, "VMEXIT_NPF": 0x400,
}  # fmt: skip


class Line(NamedTuple):
    """What one line of `xenalyze -a` says: CPU, ns since the first record, and the event."""

    cpu: int
    time: int
    what: tuple[Any, ...]


LINE = re.compile(r"^.{2,3}\s*(\d+)\.(\d{9}) (\S+) d\S+v\S+ (.*)$")


def reference(text: str) -> list[Line]:
    """The lines of xenalyze about what the reader makes events of."""
    found = []
    for line in text.splitlines():
        parts = LINE.match(line)
        if parts is None:
            continue
        words = parts[4].split()
        what: tuple[Any, ...] | None = None
        match words[0]:
            case "vmentry":
                what = ("vmentry",)
            case "vmexit":
                what = ("vmexit", SVM_REASONS[words[2]], int(words[4], 16))
            case "inj_virq":
                what = ("raise", int(words[2]))
            case "trap":
                what = ("raise", int(words[1]), int(words[3], 16))  # the samples have virtual NMIs only
            case "nmi":
                what = ("nmi",)
            case "irq_handled":
                what = ("irq",)
            case text if text.startswith("page_fault["):
                low, high, cr2_low, cr2_high, code = (int(word, 16) for word in words[1:6])
                what = ("page-fault", low | high << 32, cr2_low | cr2_high << 32, code)
        if what is not None:
            cpu = next(n for n, sign in enumerate(parts[3]) if sign not in "-.|")
            found.append(Line(cpu, int(parts[1]) * 10**9 + int(parts[2]), what))
    return found


def first_tsc(raw: bytes) -> int:
    """The TSC of the first record that has one."""
    at = 12
    while True:
        (header,) = struct.unpack_from("<I", raw, at)
        if header >> 31:
            return int.from_bytes(raw[at + 4 : at + 12], "little")
        at += 4 + (header >> 28 & 7) * 4


def events(trace: Trace) -> Iterator[Event]:
    return (trace.event(n) for n in range(trace.count))


def nanoseconds(tsc: int, first: int) -> int:
    """As xenalyze reckons, with its 2.4 GHz."""
    return ((tsc - first) << 10) // ((2_400_000_000 << 10) // 1_000_000_000)


def told(trace: Trace, first: int) -> list[Line]:
    """What the reader says, in the words of `reference`."""
    found = []
    for event in events(trace):
        assert event.known & Known.CPU and event.known & Known.TIME
        what: tuple[Any, ...] | None = None
        match event.kind:
            case Kind.VMENTRY:
                what = ("vmentry",)
            case Kind.VMEXIT:
                what = ("vmexit", event.code, event.addr)
            case Kind.RAISE:
                assert event.source is Source.INJECTED
                what = ("raise", event.arg, event.rip) if event.known & Known.RIP else ("raise", event.arg)
            case Kind.DELIVER if event.source is Source.NMI:
                what = ("nmi",)
            case Kind.DELIVER if event.source is Source.EXCEPTION:
                assert event.arg == 14
                what = ("page-fault", event.rip, event.value, event.code)
        if what is not None:
            found.append(Line(event.cpu, nanoseconds(event.time, first), what))
    return found


def check(trace: Trace, raw: bytes, text: str) -> None:
    """Every event of the reference, with its CPU, its time and what it says, in the same order."""
    lines = reference(text)
    irqs = sum(line.what == ("irq",) for line in lines)
    lines = [line for line in lines if line.what != ("irq",)]
    assert len(lines) > 10
    assert told(trace, first_tsc(raw)) == lines
    exits = [e for e in events(trace) if e.kind is Kind.VMEXIT]
    nmis = [line.what[2] for line in lines if line.what[:2] == ("vmexit", 0x61)]
    assert [e.addr for e in exits if e.source is Source.NMI] == nmis
    # SVM: an exit for an interrupt is one delivery, whether its handling is recorded too or not.
    external = [e for e in events(trace) if e.kind is Kind.DELIVER and e.source is Source.EXTERNAL]
    interrupts = sum(line.what[:2] == ("vmexit", 0x60) for line in lines)
    assert max(irqs, interrupts) <= len(external) <= irqs + interrupts


def sample(name: str) -> bytes:
    return gzip.decompress((DATA / f"{name}.bin.gz").read_bytes())


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_are_read_as_xenalyze_does(name: str) -> None:
    text = gzip.decompress((DATA / f"{name}.xenalyze.txt.gz").read_bytes()).decode()
    with open_input(str(DATA / f"{name}.bin.gz")) as trace:
        assert trace.foreign == "xentrace" and "damage" not in trace.meta
        check(trace, sample(name), text)


@pytest.mark.parametrize("name", ["xt-hvm-svm", "xt-pv-smp1"])
def test_whole_recordings_are_read_as_xenalyze_does(shared: Path, name: str) -> None:
    folder = shared / "xentrace"
    text = gzip.decompress((folder / f"{name}.xenalyze-a.txt.gz").read_bytes()).decode("latin-1")
    with open_input(str(folder / f"{name}.bin")) as trace:
        check(trace, (folder / f"{name}.bin").read_bytes(), text)


@pytest.mark.skipif(shutil.which("xenalyze") is None, reason="xenalyze is not installed")
@pytest.mark.parametrize("name", SAMPLES)
def test_the_committed_answers_are_those_of_xenalyze(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(sample(name))
    mode = ["--svm-mode"] if name == "hvm" else []
    done = subprocess.run(["xenalyze", "-a", *mode, "x.bin"], cwd=tmp_path, capture_output=True, check=True, timeout=60)
    text = gzip.decompress((DATA / f"{name}.xenalyze.txt.gz").read_bytes()).decode()
    assert reference(done.stdout.decode("latin-1")) == reference(text)


@pytest.mark.skipif(shutil.which("xenalyze") is None, reason="xenalyze is not installed")
@pytest.mark.parametrize("name", ["xt-hvm-svm", "xt-pv-smp1"])
def test_the_recorded_answers_are_those_of_xenalyze(shared: Path, name: str) -> None:
    folder = shared / "xentrace"
    mode = ["--svm-mode"] if "svm" in name else []
    done = subprocess.run(["xenalyze", "-a", *mode, f"{name}.bin"], cwd=folder, capture_output=True, check=True, timeout=60)
    text = gzip.decompress((folder / f"{name}.xenalyze-a.txt.gz").read_bytes())
    assert reference(done.stdout.decode("latin-1")) == reference(text.decode("latin-1")) != []


# -- records made by hand; layouts: Xen's xen/include/public/trace.h ------------------------------------------------------


def record(event: int, *payload: int, tsc: int | None = None) -> bytes:
    stamp = b"" if tsc is None else struct.pack("<Q", TSC0 + tsc)
    header = event | len(payload) << 28 | (tsc is not None) << 31
    return struct.pack("<I", header) + stamp + struct.pack(f"<{len(payload)}I", *payload)


def window(cpu: int, *records: bytes) -> bytes:
    body = b"".join(records)
    return struct.pack("<III", 0x2001F003, cpu, len(body)) + body


Opener = Callable[..., Trace]


@pytest.fixture
def read(tmp_path: Path) -> Opener:
    def open_bytes(data: bytes, **options: Any) -> Trace:
        path = tmp_path / "x.bin"
        path.write_bytes(data)
        return open_input(str(path), options=ReaderOptions(**options))

    return open_bytes


def kinds(trace: Trace) -> list[Kind]:
    return [e.kind for e in events(trace)]


def exits(event: int, *reasons: int) -> bytes:
    return window(0, *(record(event, reason, 0x1000, 0xFFFF8000, tsc=n) for n, reason in enumerate(reasons)))


@pytest.mark.parametrize(
    ("event", "reason", "vendor"),
    [(0x81102, 0x7B, 1), (0x81102, 0x400, 1), (0x81102, 0x1E, 0), (0x81102, 10, 0), (0x81103, 0x30, 1), (0x81102, 0x30, None)],
)
def test_vendor_is_recognised(read: Opener, event: int, reason: int, vendor: int | None) -> None:
    with read(exits(event, reason, reason)) as trace:
        for e in events(trace):
            assert (e.arg if e.known & Known.ARG else None) == vendor
            assert (e.code, e.addr) == (reason, 0xFFFF800000001000) and not e.known & Known.RIP
        assert ("exits_of_unknown_vendor" in trace.meta["counts"]) == (vendor is None)


def test_vendor_can_be_given(read: Opener) -> None:
    with read(exits(0x81102, 0x61), vendor="svm") as trace:
        assert (trace.event(0).arg, trace.event(0).source) == (1, Source.NMI)
    with read(exits(0x81102, 0x61), vendor="vmx") as trace:
        assert trace.event(0).arg == 0 and not trace.event(0).known & Known.SOURCE


def test_exits_of_32_bit_and_nested_guests(read: Opener) -> None:
    r = [record(0x81003, 0x72, 0x80001000, tsc=1), record(0x81003, 0x61, 0x2000, tsc=2), record(0x81401, tsc=3)]
    with read(window(0, *r, record(0x81503, 0x7C, 0x3000, 1, tsc=4))) as trace:
        assert kinds(trace) == [Kind.VMEXIT, Kind.VMEXIT, Kind.VMENTRY, Kind.VMEXIT]
        assert [(e.code, e.addr) for e in events(trace)][::3] == [(0x72, 0x80001000), (0x7C, 0x1_0000_3000)]
        assert [bool(e.known & Known.SOURCE) for e in events(trace)] == [False, True, False, False]


def test_nmi_exit_of_vmx_is_no_delivery(read: Opener) -> None:
    # Exit reason 0 is "exception or NMI"; the record in it says which. Xen then calls the handler as a function.
    data = window(0, record(0x81001, tsc=0), record(0x81102, 0, 1, 0, tsc=5), record(0x82010), record(0x81001, tsc=9))
    with read(data, vendor="vmx") as trace:
        assert kinds(trace) == [Kind.VMENTRY, Kind.VMEXIT, Kind.VMENTRY]
        assert trace.event(1).source is Source.NMI and trace.event(1).known & Known.SOURCE


def test_nmi_exit_is_corrected_across_windows(read: Opener) -> None:
    data = window(0, record(0x81102, 0, 1, 0, tsc=5)) + window(0, record(0x82010), record(0x81001, tsc=9))
    with read(data, vendor="vmx") as trace:
        assert trace.event(0).source is Source.NMI


def test_nmi_exit_of_svm_is_delivered_when_gif_is_set(read: Opener) -> None:
    data = window(0, record(0x81103, 0x61, 1, 0, tsc=5), record(0x28001, 7, tsc=8), record(0x82010))
    with read(data) as trace:
        assert kinds(trace) == [Kind.VMEXIT, Kind.UNBLOCK, Kind.DELIVER]
        nmi = trace.event(2)
        assert (nmi.arg, nmi.source, nmi.time) == (2, Source.NMI, TSC0 + 8)  # the TSC of the record before


def test_interrupt_of_vmx_is_one_delivery(read: Opener) -> None:
    bind = record(0x802003, 0x31 << 16 | 0x10, *[0] * 6, tsc=0)
    handled = record(0x802008, 0x10, TSC0 + 6, TSC0 + 8, tsc=8)
    data = window(0, bind, record(0x81102, 1, 1, 0, tsc=5), record(0x8200F, 0x31), handled, handled)
    with read(data) as trace:
        found = [(e.arg, e.time - TSC0) for e in events(trace) if e.kind is Kind.DELIVER]
        assert found == [(0x31, 5), (0x31, 6)]  # the second `handled` is another interrupt, taken at its tsc_in


def test_injections_are_requests(read: Opener) -> None:
    data = window(
        0, record(0x81102, 10, 1, 0, tsc=5), record(0x82003, 18, 0xFFFFFFFF), record(0x82003, 13, 8),
        record(0x82102, 2, 0xDEAD0000, 0xFFFF8000), record(0x82004, 0xF3, 0), record(0x82020, 0xF3, 2, 0xFFFFFFFF),
        record(0x82020, 2, 3, 0xFFFFFFFF),
    )  # fmt: skip
    with read(data) as trace:
        raised = [e for e in events(trace) if e.kind is Kind.RAISE]
        assert [e.arg for e in raised] == [18, 13, 14, 0xF3, 2]
        assert [bool(e.known & Known.CODE) for e in raised] == [False, True, True, False, False]
        assert (raised[1].code, raised[2].code, raised[2].value) == (8, 2, 0xFFFF8000DEAD0000)
        assert Counter(kinds(trace)) == {Kind.VMEXIT: 1, Kind.RAISE: 5}


def test_pv_traps(read: Opener) -> None:
    data = window(
        0, record(0x201103, 0x1000, 0xFFFFFFFF, 0x00108000 | 13, tsc=1), record(0x201003, 0x2000, 6, tsc=2),
        record(0x201004, 0x3000, 0x4000, 5, tsc=3), record(0x201103, 0x5000, 0, 0xFFFF0002, tsc=4),
        record(0x201103, 0x6000, 0, 18, tsc=5),
    )  # fmt: skip
    with read(data) as trace:
        e = list(events(trace))
        assert [(x.kind, x.arg, x.rip) for x in e] == [
            (Kind.DELIVER, 13, 0xFFFFFFFF00001000), (Kind.DELIVER, 6, 0x2000), (Kind.DELIVER, 14, 0x3000),
            (Kind.RAISE, 2, 0x5000), (Kind.RAISE, 18, 0x6000),
        ]  # fmt: skip
        assert e[0].code == 0x10 and not e[1].known & Known.CODE and (e[2].value, e[2].code) == (0x4000, 5)
        assert not any(x.known & (Known.RSP | Known.CS | Known.SS | Known.RFLAGS) for x in e)


def test_lost_records_are_a_gap(read: Opener, run_cli: Callable[..., Any], tmp_path: Path) -> None:
    lost = record(0x1F001, 77, 1 | 2 << 16, TSC0 + 10, 0, tsc=30)
    with read(window(3, record(0x81001, tsc=9), lost, record(0x81001, tsc=40))) as trace:
        assert kinds(trace) == [Kind.VMENTRY, Kind.GAP, Kind.VMENTRY]
        gap = trace.event(1)
        assert (gap.value, gap.cpu, gap.time) == (77, 3, TSC0 + 10) and trace.cpus == 4
        assert trace.meta["counts"]["lost"] == 77
    run_cli("replay", tmp_path / "x.bin", code=3)


def test_wrap_records_and_unknown_ones_are_skipped(read: Opener) -> None:
    odd = [record(0x1F002, *[0x81001] * n, tsc=t) for n in range(8) for t in (None, 1 << 60)]
    with read(window(0, record(0x81001, tsc=1), *odd, record(0x8001234, 1), record(0x82004, 0x20, 0))) as trace:
        assert kinds(trace) == [Kind.VMENTRY, Kind.RAISE]
        assert trace.event(1).time == TSC0 + 1  # not the garbage in a wrap record


def test_short_payloads_make_no_event(read: Opener) -> None:
    ids = (0x1F001, 0x81102, 0x82003, 0x82004, 0x82102, 0x201103, 0x201104, 0x802003, 0x802007, 0x802008)
    with read(window(0, record(0x81001, tsc=1), *(record(event, tsc=2) for event in ids))) as trace:
        assert kinds(trace) == [Kind.VMENTRY] and trace.meta["counts"]["odd_records"] == len(ids)


def test_cpus_are_merged_by_tsc_in_any_window_order(read: Opener) -> None:
    # Three CPUs, 200 records, polled at random moments as the tool does: each poll gives all that a CPU has.
    r = random.Random(5)
    when = sorted(r.sample(range(10_000), 200))
    queue: dict[int, list[int]] = {0: [], 1: [], 2: []}
    expected, data, poll = [], b"", 0
    for tsc in when:
        cpu = r.randrange(3)
        while r.random() < 0.2:
            if queue[poll]:
                data += window(poll, *(record(0x81001, tsc=t) for t in queue[poll]))
                queue[poll] = []
            poll = (poll + 1) % 3
        queue[cpu].append(tsc)
        expected.append((cpu, TSC0 + tsc))
    for cpu in (poll, *range(3)):
        if queue[cpu]:
            data += window(cpu, *(record(0x81001, tsc=t) for t in queue[cpu]))
            queue[cpu] = []
    assert data.count(struct.pack("<I", 0x2001F003)) > 20
    with read(data) as trace:
        assert [(e.cpu, e.time) for e in events(trace)] == expected


def test_a_cpu_keeps_the_order_of_its_records(read: Opener) -> None:
    wild = window(0, *(record(0x81102, n, 0, 0, tsc=t) for n, t in enumerate((5, 1 << 50, 6, 3))))
    with read(wild + window(1, record(0x81001, tsc=5)) + window(0, record(0x81102, 4, 0, 0, tsc=7)), vendor="vmx") as trace:
        assert [e.code for e in events(trace) if e.kind is Kind.VMEXIT] == [0, 1, 2, 3, 4]


def test_what_is_held_is_bounded(read: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xentrace_decode, "MAX_HELD", 1000)
    monkeypatch.setattr(xentrace, "BLOCK", 256)
    one, two = (window(cpu, *(record(0x81001, tsc=2 * n + cpu) for n in range(100))) for cpu in (0, 1))
    with read(one + two) as trace:
        assert Counter(e.cpu for e in events(trace)) == {0: 100, 1: 100}
        for cpu in (0, 1):
            assert [e.time - TSC0 for e in events(trace) if e.cpu == cpu] == [2 * n + cpu for n in range(100)]
        assert trace.meta["counts"]["unordered"] > 0


@pytest.mark.parametrize("block", [40, 44, 52, 1000])
def test_blocks_do_not_show(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(DATA / "hvm.bin.gz")
    with open_input(path) as trace:
        whole = bytes(trace.events)
    monkeypatch.setattr(xentrace, "BLOCK", block)
    with open_input(path) as trace:
        assert bytes(trace.events) == whole


def test_options(read: Opener, run_cli: Callable[..., Any], tmp_path: Path) -> None:
    data = window(0, record(0x81001, tsc=1))
    with read(data) as trace:
        assert trace.clock_hz == 0 and "--cpu-hz" in trace.meta["fidelity"]["time"]
    with read(data, cpu_hz=2_400_000_000) as trace:
        assert trace.clock_hz == 2_400_000_000
    for options in ({"monitor": ("x",)}, {"stores": ((0, 1),)}):
        with pytest.raises(UsageError):
            read(data, **options)
    path = tmp_path / "x.bin"
    with pytest.raises(UsageError, match="one file"):
        open_inputs([str(path), shutil.copy(path, f"{path}.2")])
    assert "clock 2,400,000,000 Hz" in run_cli("info", "--cpu-hz", "2.4G", path, code=0).stdout
    run_cli("convert", "--cpu-hz", "2400M", "--vendor", "svm", path, "x.tdbg", code=0)
    assert "clock 2,400,000,000 Hz" in run_cli("info", "x.tdbg", code=0).stdout
    for bad in ("0", "-1", "2,4G", "G", "1e9", "9" * 30):
        run_cli("info", f"--cpu-hz={bad}", path, code=2)
    run_cli("replay", "--cpu-hz", "1G", "x.tdbg", code=2)


def test_replay_and_info_are_honest(run_cli: Callable[..., Any]) -> None:
    for name in SAMPLES:
        done = run_cli("replay", DATA / f"{name}.bin.gz", code=3)
        assert "no layout" in done.stdout
    said = run_cli("info", DATA / "hvm.bin.gz", code=0).stdout
    for text in ("NMIs injected into an HVM guest are not traced", "no record has RSP", "IRETs are not traced", "those of SVM"):
        assert text in said


def test_marks_have_a_text(read: Opener) -> None:
    with read(window(0, record(0x81103, 0x60, 1, 0, tsc=5), record(0x82011), record(0x82023, 3), record(0x82011))) as trace:
        marks = [e for e in events(trace) if e.kind is Kind.MARK]
        assert all(e.flags & EventFlag.BYTES for e in marks)
        texts = [bytes(trace.payload[e.value : e.value + e.code]).decode() for e in marks]
        assert texts == ["VM exit for an SMI", "VM exit for the guest's exception 3", "VM exit for an SMI"]


# -- damage -------------------------------------------------------------------------------------------------------------


def small(name: str) -> bytes:
    """Two short windows with the first records of a sample's first, and one more."""
    raw, cut = sample(name), []
    at = 12
    while len(cut) < 60:
        (header,) = struct.unpack_from("<I", raw, at)
        size = 4 + (header >> 28 & 7) * 4 + (header >> 31) * 8
        cut.append(raw[at : at + size])
        at += size
    return window(0, *cut[:30]) + window(1, *cut[30:]) + window(0, record(0x81001, tsc=1 << 60))


def outcome(path: Path) -> tuple[str, Trace | None]:
    """How an input ends: an error with its place, a marked partial result, or a whole one."""
    try:
        trace = open_input(str(path))
    except FormatError as error:
        assert error.offset is not None and "\n" not in str(error)
        return "error", None
    return ("partial" if "damage" in trace.meta else "whole"), trace


@pytest.mark.parametrize("name", SAMPLES)
def test_every_truncation_is_an_error_or_marked(name: str, tmp_path: Path) -> None:
    path, data = tmp_path / "x.bin", small(name)
    ends, at = set(), 0
    while at < len(data):
        at += 12 + struct.unpack_from("<I", data, at + 8)[0]
        ends.add(at)
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        how, trace = outcome(path)
        assert how == ("whole" if size in ends else "error" if size <= 12 else how)
        if size not in ends:
            assert how != "whole", size
        if trace is not None:
            # What came before the cut is there, and a gap says that something is missing.
            assert (Kind.GAP in kinds(trace)) == (how == "partial")
            trace.close()


@pytest.mark.parametrize("name", SAMPLES)
def test_truncations_of_whole_samples(name: str, tmp_path: Path) -> None:
    path, data = tmp_path / "x.bin", sample(name)
    r = random.Random(1)
    with open_input(str(DATA / f"{name}.bin.gz")) as whole:
        for size in [len(data) - 1, *(r.randrange(24, len(data)) for _ in range(40))]:
            path.write_bytes(data[:size])
            how, trace = outcome(path)
            if trace is not None:
                assert trace.count <= whole.count + 1
                trace.close()
            assert how != "whole" or data[size : size + 4] == struct.pack("<I", 0x2001F003)


@pytest.mark.parametrize("name", SAMPLES)
def test_mutations_end_well(name: str, tmp_path: Path) -> None:
    path, data = tmp_path / "x.bin", small(name)
    r = random.Random(2)
    seen: Counter[str] = Counter()
    for _ in range(2000):
        changed = bytearray(data)
        for _ in range(r.choice((1, 1, 2, 8))):
            at = r.randrange(len(changed))
            changed[at] = r.choice((0, 0xFF, r.randrange(256), changed[at] ^ 1 << r.randrange(8)))
        if r.random() < 0.2:
            at = r.randrange(len(changed))
            del changed[at : at + r.randrange(1, 9)]
        path.write_bytes(changed)
        how, trace = outcome(path)
        seen[how] += 1
        if trace is not None:
            assert sum(trace.check()) == trace.count
            assert trace.count <= len(changed) // 4 + 2
            trace.close()
    assert seen["partial"] and seen["whole"]


def test_errors_of_broken_files(read: Opener) -> None:
    too_long = window(0, b"\x01\x10\x08\xf0")
    for data, words in ((window(0), "no record"), (too_long, "longer than its window"), (window(0)[:11], "not a")):
        with pytest.raises(FormatError, match=words):
            read(data)
    with read(window(0, record(0x81001, tsc=1)) + b"garbage garbage") as trace:
        assert kinds(trace) == [Kind.VMENTRY, Kind.GAP] and not trace.event(1).known & Known.CPU
        assert trace.meta["damage"] == ["at 0x18: no window begins here; the rest is not read"]


def test_a_window_inside_of_another_is_read(read: Opener) -> None:
    # The size of the first window is wrong: it would swallow the second one.
    data = bytearray(window(0, record(0x81001, tsc=1)) + window(1, record(0x81001, tsc=2)))
    struct.pack_into("<I", data, 8, 36)
    with read(bytes(data)) as trace:
        assert [(e.kind, e.cpu) for e in events(trace)] == [(Kind.VMENTRY, 0), (Kind.GAP, 0), (Kind.VMENTRY, 1)]
        assert "a window begins inside of another" in trace.meta["damage"][0]


def test_a_huge_window_needs_no_memory(read: Opener) -> None:
    data = struct.pack("<III", 0x2001F003, 0, 0xFFFFFFFC) + record(0x81001, tsc=1) * 3
    with read(data) as trace:
        assert kinds(trace) == [Kind.VMENTRY] * 3 + [Kind.GAP] and "cut short" in trace.meta["damage"][0]
