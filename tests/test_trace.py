"""Native files: what is written is read back, and what is damaged is said with path and offset."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

import pytest

from tracedbg import wire
from tracedbg.errors import FormatError, TracedbgError, UsageError
from tracedbg.layout import CpuTables, Fidelity, Gate, Idt, Layout, Region, Tss, from_toml, to_toml
from tracedbg.state import EventFlag, Kind, Known, Source
from tracedbg.trace import MemoryRange, Trace, TraceWriter, build

LAYOUT = Layout(
    tss=(Tss(0x105100, (0x108000, None, None), (None, 0x110000, 0x10E000, 0x10C000, 0x10A000, None, 0, 0)),),
    idts=(Idt(0x106000, {2: Gate(0x100190, 8, 2), 3: Gate(0x1001A0, 8, 0, 0xF, 3, False)}),),
    cpus=(CpuTables(0, 0), CpuTables(None, None)),
    regions=(Region(0x111000, 0x113000, 1),),
    fidelity=Fidelity.RETURNS,
).with_stacks()


def fill(writer: TraceWriter) -> None:
    writer.layout = LAYOUT
    writer.meta = {"source": {"format": "test"}}
    writer.symbols = b"1000 2000 name\n"
    writer.memory.append(MemoryRange(0x10DFC0, bytes(range(64))))
    at = writer.payload(b"0123456789abcdef")
    writer.event(Kind.DELIVER, cpu=1, arg=2, source=Source.NMI, rip=0x100BAB, rsp=0x11CFA8, cs=8, ss=0x10, rflags=0x97, time=5)
    writer.event(Kind.WRITE, cpu=1, addr=0x10DFC8, value=at, code=16, flags=EventFlag.BYTES)


def small_file() -> bytes:
    buffer = io.BytesIO()
    writer = TraceWriter(buffer, cpus=2, clock_hz=1000)
    fill(writer)
    writer.close()
    return buffer.getvalue()


def test_a_trace_comes_back_as_written() -> None:
    with Trace.from_bytes(small_file()) as trace:
        assert (trace.count, trace.cpus, trace.clock_hz, trace.unfinished) == (2, 2, 1000, False)
        assert trace.layout == LAYOUT
        assert trace.meta == {"source": {"format": "test"}}
        assert trace.symbols == b"1000 2000 name\n"
        assert trace.memory == (MemoryRange(0x10DFC0, bytes(range(64))),)
        assert bytes(trace.payload) == b"0123456789abcdef"
        event = trace.event(0)
        assert (event.kind, event.rip, event.rsp, event.cs, event.ss, event.rflags, event.time) == (
            Kind.DELIVER, 0x100BAB, 0x11CFA8, 8, 0x10, 0x97, 5,
        )  # fmt: skip
        assert Known.ADDR not in event.known and Known.SOURCE in event.known
        assert trace.event(1).flags == EventFlag.BYTES


def test_same_input_same_bytes() -> None:
    assert small_file() == small_file()


def test_stack_regions_follow_the_tops() -> None:
    # Tops 108000 (RSP0), 10a000, 10c000, 10e000, 110000: each 8 KiB, cut at the next lower top.
    stacks = {(r.slot, r.lo, r.hi) for r in LAYOUT.regions if r.kind == 0}
    assert stacks == {
        (8, 0x106000, 0x108000), (4, 0x108000, 0x10A000), (3, 0x10A000, 0x10C000), (2, 0x10C000, 0x10E000),
        (1, 0x10E000, 0x110000),
    }  # fmt: skip


def test_poisoned_tops_make_no_stack() -> None:
    layout = Layout(tss=(Tss(0, (None,) * 3, (None, 0x8600111111111111, 0, *(None,) * 5)),), cpus=(CpuTables(0),)).with_stacks()
    assert layout.regions == ()


def test_layout_toml_round_trip() -> None:
    back = from_toml(to_toml(LAYOUT), "x.toml")
    assert back.tss == LAYOUT.tss and back.idts == LAYOUT.idts and back.cpus == LAYOUT.cpus
    assert set(back.regions) == set(LAYOUT.regions)


@pytest.mark.parametrize(
    "text",
    ["user = [[1]]", "user = 3", "nonsense = 1", "[[tss]]\nist1 = 5", "[[tss]]\nbase = -1", "[[idt]]\nbase = 0\ngate.300 = {}",
     "[[stack]]\nlo = 5\nhi = 4", "user = [[\"0x10\", \"zz\"]]", "= =", "[[idt]]\nbase = 0\ngate.2 = {ist = 9}", "cpu = [1]"],
)  # fmt: skip
def test_bad_toml_is_one_line(text: str) -> None:
    with pytest.raises(FormatError) as caught:
        from_toml(text, "x.toml")
    assert str(caught.value).startswith("x.toml: ") and "\n" not in str(caught.value)


def test_cut_at_every_byte_is_an_error_with_an_offset() -> None:
    data = small_file()
    for cut in range(len(data)):
        with pytest.raises(FormatError) as caught:
            Trace.from_bytes(data[:cut], "cut.tdbg")
        assert caught.value.offset is not None and str(caught.value).startswith("cut.tdbg: offset 0x")


def test_every_damaged_byte_is_noticed_or_harmless() -> None:
    data = small_file()
    with Trace.from_bytes(data) as good:
        reference = (bytes(good.events), good.layout, good.meta, good.symbols, good.memory, bytes(good.payload))
    unnoticed = 0
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 0xFF
        try:
            with Trace.from_bytes(bytes(damaged)) as trace:
                assert (
                    bytes(trace.events), trace.layout, trace.meta, trace.symbols, trace.memory, bytes(trace.payload)
                ) == reference  # fmt: skip
                unnoticed += 1
        except FormatError:
            pass
    # Only the padding between sections and the table for the time of writing are not covered by a checksum.
    assert unnoticed < 8 * 64 + 5 * 32


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty file"),
        (b"TDBG", "cut short"),
        (b"hello world, this is not a trace at all" * 3, "wrong magic"),
    ],
)
def test_not_a_trace(data: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Trace.from_bytes(data, "x")


def rebuilt(**changes: int) -> bytes:
    import zlib

    data = bytearray(small_file())
    head = wire.HEADER.parse(bytes(data[:64]))
    head.update(changes)
    head.pop("_io", None)
    head["header_crc"] = 0
    raw = wire.HEADER.build(head)
    data[:64] = raw[:-4] + zlib.crc32(raw).to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"major": 2}, "newer than this program reads"),
        ({"cpus": 0}, "absurd number of CPUs"),
        ({"cpus": 5000}, "absurd number of CPUs"),
        ({"section_count": 0xFFFFFFFF}, "absurd number of sections"),
        ({"table_offset": 1 << 62}, "past the end"),
    ],
)
def test_absurd_headers(changes: dict[str, int], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Trace.from_bytes(rebuilt(**changes), "x")


def test_absurd_layout_counts() -> None:
    data = LAYOUT.to_bytes()
    for field in range(4):
        bad = bytearray(data)
        bad[field * 4 : field * 4 + 4] = b"\xff\xff\xff\x7f"
        with pytest.raises(FormatError, match="needs"):
            Layout.from_bytes(bytes(bad), "x", 0)


def test_a_killed_writer_leaves_a_readable_file(tmp_path: Path) -> None:
    path = tmp_path / "live.tdbg"
    writer = TraceWriter(path, cpus=2, atomic=False)
    fill(writer)
    writer.flush()
    for _ in range(10_000):
        writer.event(Kind.MARK, cpu=0)
    size = os.path.getsize(path)
    with Trace.open(path) as trace:
        assert trace.unfinished and trace.count == (size - trace.events_offset) // 64 and trace.count >= 2 + 8192
        assert trace.layout == LAYOUT and trace.event(0).rip == 0x100BAB
    with open(path, "r+b") as file:  # cut inside a record
        file.truncate(size - 10)
    with Trace.open(path) as trace:
        assert trace.ignored == 54
    with open(path, "ab") as file:  # blocks that were allocated but never written
        file.write(bytes(10 + 64 * 3))
    with Trace.open(path) as trace:
        assert trace.count == (size - trace.events_offset) // 64 - 1
    writer.abort()
    assert path.exists()


def test_an_atomic_writer_leaves_nothing_half_written(tmp_path: Path) -> None:
    path = tmp_path / "out.tdbg"
    with pytest.raises(RuntimeError), TraceWriter(path) as writer:
        fill(writer)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with TraceWriter(path, cpus=2) as writer:
        fill(writer)
    assert [p.name for p in tmp_path.iterdir()] == ["out.tdbg"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o444
    with pytest.raises(UsageError, match="--force"):
        TraceWriter(path)
    with TraceWriter(path, cpus=2, force=True) as writer:
        fill(writer)
    assert path.read_bytes()[:8] == wire.MAGIC


def test_a_directory_and_a_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(TracedbgError) as caught:
            Trace.open(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_checksums_of_events_are_verified(tmp_path: Path) -> None:
    path = tmp_path / "big.tdbg"
    with TraceWriter(path) as writer:
        for number in range(40_000):
            writer.event(Kind.MARK, cpu=0, value=number)
    data = bytearray(path.read_bytes())
    with Trace.from_bytes(bytes(data)) as trace:
        at = trace.events_offset + 64 * 20_000
        assert list(trace.check()) == [16384, 32768, 40000]
    data[at] ^= 1
    with pytest.raises(FormatError, match="events 16384 to 32767"):
        Trace.from_bytes(bytes(data))


def test_event_of_an_unknown_kind_is_shown_as_unknown() -> None:
    with build(lambda w: w.append(wire.EVENT_PACK.pack(*[0] * 12, 77, 0, 99, 0))) as trace:
        event = trace.event(0)
        assert event.kind == Kind.UNKNOWN and event.source == Source.UNKNOWN
