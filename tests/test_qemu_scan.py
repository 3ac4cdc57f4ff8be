"""The scanner in C against the reader in Python: the same trace, byte for byte, whatever the log."""

from __future__ import annotations

import gzip
import os
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from qemutext import DATA, block, event, head, native_trace, tail

from tracedbg import _decode, wire
from tracedbg.formats import ReaderOptions, source
from tracedbg.formats.qemu.scan import Scan
from tracedbg.formats.qemu.text import LogText
from tracedbg.layout import CpuTables, Gate, Idt, Layout, Tss
from tracedbg.state import EventFlag, Kind
from tracedbg.trace import Trace

TURNS = int(os.environ.get("TRACEDBG_QEMU_TURNS", "150"))
STAMP = "2026-11-23T08:00:{:02d}.{:06d}Z "


def stamped(text: str) -> str:
    """A log as QEMU after 10.1 prints it with `-msg timestamp=on`: a time before whatever one call prints."""
    count = 0

    def stamp(match: re.Match[str]) -> str:
        nonlocal count
        count += 1
        return STAMP.format(count // 1000 % 60, count) + match[0]

    pieces = r"^(?= *\d+: v=|Servic|check_e|CPU R|SMM)| CR2=[0-9a-f]+(?=\n)| env->|(?<=\w)\n(?=[RE]AX)"
    return re.sub(pieces, stamp, text, flags=re.M)


def ordinary() -> str:
    """Events of two CPUs of every sort that the scanner takes."""
    check = "check_exception old: 0xffffffff new 0x{:x}\n"
    two = 0x105168
    return (
        event(0, 2, 0x1000, 0x9000)
        + event(1, 18, 0x1000, 0x9000, tr=two)
        + "Servicing hardware INT=0x20\n" + event(2, 0x20, 0x1000, 0x9000)
        + check.format(14) + event(3, 14, 0x1000, 0x9000, 0x5000, e=6, cs=0x33)
        + check.format(14) + event(4, 14, 0x1000, 0x9000, 0x5000, e=6, cs=0x33)
        + "12@7.000001:apic_mem_readl 0x20 = 0x00000000\n" + event(5, 3, 0x1000, 0x9000, i=1)
        + "apic_report_irq_delivered coalescing 1\n" + event(6, 0x80, 0x1004, 0x9000, i=1, tr=two)
        + check.format(13) + event(7, 13, 0x2000, 0x9000, e=0x18)
        + "Servicing hardware INT=0x02\n" + event(8, 2, 0x1000, 0xA000, tr=two)
        + check.format(14) + event(9, 14, 0x3000, 0x9000, 0x8FF8, e=2)
        + check.format(14) + event(10, 14, 0x3000, 0x9000, 0x5000, e=2)
        + event(11, 0xF0, 0x3000, 0x9000)
    )  # fmt: skip


def text_of(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".gz":
        return gzip.decompress(data)
    return zstandard.ZstdDecompressor().stream_reader(data).read() if path.suffix == ".zst" else data


def blocks(name: str, most: int) -> bytes:
    """The beginning of a recording's events."""
    text = text_of(DATA / name)
    at = max(text.find(b": v=") - 200, 0)
    return text[at : at + most]


SAMPLES: dict[str, Callable[[], bytes]] = {
    "ordinary": lambda: ordinary().encode(),
    "stamped": lambda: stamped(ordinary()).encode(),
    "torn": lambda: blocks("linux/l2_torn_excerpt.log.gz", 15000),
    "race": lambda: blocks("istlab/smprace_ud_ipi/torn_excerpt.log.gz", 15000),
    "traced": lambda: blocks("traced/smp2.log.gz", 15000),
    "8259": lambda: text_of(DATA / "traced/b_pic.log.gz"),
    "i386": lambda: text_of(DATA / "i386/boot.log.gz"),
    "32-bit": lambda: blocks("kvm-unit-tests/i386_eventinj.log.gz", 12000),
    "faults": lambda: blocks("kvm-unit-tests/eventinj.log.gz", 15000),
    "plugin": lambda: blocks("istlab-plugin/g/qemu.log.gz", 9000),
}

PIECES = (
    "check_exception old: 0xffffffff new 0xe\n", "check_exception old: 0xe new 0xe\n", "check_exception old: 0x8 new 0xd\n",
    "Servicing hardware INT=0x20\n", "Servicing hardware INT=0x02\n", "Servicing virtual hardware INT=0x20\n",
    "CPU Reset (CPU 0)\n", "SMM: enter\n", "Triple fault\n", "CPU 0: Previous MCE still in progress, raising triple fault\n",
    "17@1795420394.580250:pic_interrupt irq 10 intno 2\n", "apic_local_deliver vector 3 delivery mode 7\n",
    "17@1795420394.580251:apic_mem_writel 0x300 = 0x00004020\n", "17@1795420394.580251:apic_mem_writel 0x310 = 0x00004020\n",
    "apic_mem_writel 0xb0 = 0x00000000\n",
    "17@1795420394.999999:apic_mem_readl 0x20 = 0x00000000\n", "9@9.000009:whatever CPU R_EAX Z \n", "apic_set_irq v=\n",
    STAMP.format(7, 7), STAMP.format(0, 0), "1969-01-01T00:00:00Z ", "2026-13-01T00:00:00Z ", "2026-02-30T24:00:00.5Z ",
    head(3, 14, 0x1000, 0x9000), tail(14, 0x5000), tail(3), "\n", "\r", " ", "0", "f", "PLG cpu=0 iret pc=0000000000001000\n",
    "RAX=0000000000000001 ", "EAX=00000001 ", "EFER=0000000000000500\n", "R16=", ">", "Z ",
    event(4, 2, 0x1000, 0x9000), event(5, 14, 0x1000, 0x9000, 0x8FF8, e=2), block(0x1000, 0x9000),
)  # fmt: skip


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A log with a few changes: bytes, lines lost, doubled or swapped, pieces of others in between."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at = rng.randrange(len(out))
        line = out.rfind(b"\n", 0, at) + 1
        stop = out.find(b"\n", at) + 1 or len(out)
        match rng.randrange(8):
            case 0:
                out[at] = rng.randrange(256)
            case 1:
                out[at] = rng.choice(b"0123456789abcdef \n:=")
            case 2:
                del out[at : at + rng.choice((1, 2, 60, 1400))]
            case 3:
                del out[line:stop]
            case 4:
                out[line:line] = out[line:stop]
            case 5:
                out[line:line] = rng.choice(PIECES).encode()
            case 6:
                out[at:at] = rng.choice(PIECES).encode()
            case _:
                other = rng.randrange(len(out))
                out[line:line] = out[other : other + rng.randrange(1, 3000)]
        if not out:
            out += b"\n"
    return bytes(out)


def same(path: Path, data: bytes) -> bytes | str:
    path.write_bytes(data)
    got = native_trace(path, native=True)
    assert got == native_trace(path, native=False)
    return got


@pytest.mark.parametrize("name", SAMPLES)
def test_mutated_logs_give_the_same_trace(name: str, tmp_path: Path) -> None:
    data = SAMPLES[name]()
    assert len(same(tmp_path / "log", data)) > 1000
    rng = random.Random(name)
    kinds = set()
    for turn in range(TURNS):
        got = same(tmp_path / "log", mutated(data, rng))
        kinds.add(type(got))
        assert bytes in kinds, turn


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLES)
def test_ten_thousand_mutated_logs_give_the_same_trace(name: str, tmp_path: Path) -> None:
    data = SAMPLES[name]()
    rng = random.Random(f"slow {name}")
    for _ in range(10_000):
        same(tmp_path / "log", mutated(data, rng))


@pytest.mark.parametrize("name", SAMPLES)
def test_a_log_cut_anywhere_gives_the_same_trace(name: str, tmp_path: Path) -> None:
    data = SAMPLES[name]()
    for cut in range(1, len(data), 1 if len(data) < 3000 else 61):
        same(tmp_path / "log", data[:cut])


def read_by(scanner: bool, data: bytes, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, bytes | str]:
    """How many blocks the scanner took of a log that comes in chunks, and the trace."""
    taken = 0
    plain = Scan.scan

    def scan(self: Scan, text: LogText, buffer: bytes, at: int, limit: int) -> int:
        nonlocal taken
        before = text.causes.heads
        stop = plain(self, text, buffer, at, limit)
        taken += text.causes.heads - before
        return stop

    with monkeypatch.context() as patch:
        patch.setattr(Scan, "scan", scan)
        patch.setattr(source, "CHUNK", size)
        patch.setattr(source, "HEAD", 1)
        path = tmp_path / "log"
        path.write_bytes(data)
        trace = native_trace(path, native=scanner)
        return taken, trace


@pytest.mark.parametrize(
    ("name", "blocks_of_it"),
    [("ordinary", 10), ("stamped", 10), ("32-bit", 7), ("faults", 8)],
)
def test_the_scanner_reads_what_is_ordinary(
    name: str, blocks_of_it: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, _ = read_by(True, SAMPLES[name](), 1 << 20, tmp_path, monkeypatch)
    assert taken >= blocks_of_it
    assert read_by(False, SAMPLES[name](), 1 << 20, tmp_path, monkeypatch)[0] == 0


@pytest.mark.parametrize("size", [511, 4096, 8192, 10007])
def test_chunks_of_any_size_give_the_same_trace(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(event(n, (0x20, 2, 14, 3)[n % 4], 0x1000 + n, 0x9000, 0x5000, i=int(n % 4 == 3)) for n in range(60))
    taken, want = read_by(False, text.encode(), 1 << 20, tmp_path, monkeypatch)
    assert taken == 0
    taken, got = read_by(True, text.encode(), size, tmp_path, monkeypatch)
    assert got == want
    assert taken > 40


@pytest.mark.parametrize(
    "name",
    [
        "linux/l2/qemu.log.gz", "istlab/smprace_ud_ipi/qemu.log.gz", "linux-boot/smp2-stress-pagefaults.log.zst",
        "xen-boot/smp1-boot.log.zst", "kvm-unit-tests/vmexit_ipi_halt.log.gz",
        "linux-boot/smp2-int+apic-trace-timestamps.log.gz",
    ],
)  # fmt: skip
def test_the_recordings_give_the_same_trace_and_every_v_line(name: str, shared: Path, tmp_path: Path) -> None:
    data = text_of(shared / "qemu" / name)
    trace = same(tmp_path / "log", data)
    assert isinstance(trace, bytes)
    (tmp_path / "trace.tdbg").write_bytes(trace)
    with Trace.open(tmp_path / "trace.tdbg") as opened:
        records = bytes(opened.events)
    got = Counter(vector for kind, vector in zip(records[60::64], records[61::64], strict=True) if kind == Kind.DELIVER)
    assert got == Counter(int(v, 16) for v in re.findall(rb": v=([0-9a-f]{2}) e=", data))


@pytest.mark.parametrize(("rsp0", "failed"), [(0x110000, False), (0x8600111111111110, True)])
def test_gp_where_the_event_before_was_delivered(rsp0: int, failed: bool, tmp_path: Path) -> None:
    """A #GP without error code, at the place of a vector 0x20 from CPL 3: its delivery failed only if RSP0 is not canonical."""
    tables = Layout(
        tss=(Tss(0x105100, (rsp0, None, None), (None,) * 8),),
        idts=(Idt(0x106000, {vector: Gate(0x100000 + vector, 8, 0) for vector in (13, 0x20)}),),
        cpus=(CpuTables(0, 0),),
    )
    text = "".join(event(n, (0x20, 13)[n % 2], 0x1000 + n // 2, 0x9000, cs=0x33) for n in range(40)).encode()
    (tmp_path / "log").write_bytes(text)
    options = ReaderOptions(discover=False, layout=tables)
    got = [native_trace(tmp_path / "log", native=native, options=options) for native in (True, False)]
    assert got[0] == got[1]
    assert isinstance(got[0], bytes)
    (tmp_path / "t.tdbg").write_bytes(got[0])
    with Trace.open(tmp_path / "t.tdbg") as trace:
        delivered = [e for e in map(trace.event, range(trace.count)) if e.kind == Kind.DELIVER]
        assert [bool(e.flags & EventFlag.FAILED) for e in delivered] == [failed, False] * 20


def test_the_scanner_refuses_what_it_cannot_trust() -> None:
    ffi, lib = _decode.ffi, _decode.lib
    state = ffi.new("struct qlog *")
    out = ffi.new("uint64_t[]", 8)
    table = ffi.new("uint8_t[256]")
    assert lib.qlog_scan(ffi.NULL, b"x", 1, 1, out, 1) == lib.DEC_E_ARG
    assert lib.qlog_scan(state, b"x", 1, 1, out, 1) == lib.DEC_E_ARG
    state.served = table
    assert lib.qlog_scan(state, b"x", 1, 2, out, 1) == lib.DEC_E_ARG
    assert lib.qlog_scan(state, ffi.NULL, 0, 0, out, 1) == lib.DEC_E_ARG
    assert lib.qlog_scan(state, b"x", 1, 1, ffi.NULL, 1) == lib.DEC_E_ARG
    assert lib.qlog_scan(state, b"x", 1, 1, out, 1) == 0 == state.used


@pytest.mark.parametrize("line", [f"{verb} pc=0000000000101000{rest}" for verb in ("st", "iret-frame") for rest in ("", " va=")])
def test_lines_of_the_plugin_that_lack_what_they_tell(line: str, tmp_path: Path) -> None:
    log = event(0, 2, 0x1000, 0x9000) + event(1, 3, 0x2000, 0x8000, i=1) + f"PLG cpu=0 {line}\n" + event(2, 14, 0x3000, 0x7000)
    got = same(tmp_path / "log", log.encode())
    assert isinstance(got, bytes)
    (tmp_path / "t.tdbg").write_bytes(got)
    with Trace.open(tmp_path / "t.tdbg") as trace:
        kinds = Counter(trace.event(n).kind for n in range(trace.count))
        assert kinds[Kind.DELIVER] == 3 and not kinds[Kind.WRITE] and not kinds[Kind.RETURN]


def test_many_tables_that_share_a_slot_give_the_same_trace(tmp_path: Path) -> None:
    """More TR bases than the scanner has slots: what it forgets, the reader in Python still knows."""
    bases = [0x100000 + 0x80 * n for n in range(1500)]
    text = "".join(event(n, 0x20, 0x1000, 0x9000, tr=bases[n % 1500]) for n in range(4500))
    assert len(same(tmp_path / "log", text.encode())) > 4500 * 64


def test_both_know_the_same_sizes() -> None:
    assert _decode.lib.QLOG_CPUS >= wire.MAX_CPUS
