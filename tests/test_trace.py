"""Native files: what is written is read back, and what is damaged is said with path and offset."""

from __future__ import annotations

import io
import json
import os
import stat
import threading
import time
import zlib
from pathlib import Path

import pytest

from tracedbg import trace as trace_module
from tracedbg import wire
from tracedbg.errors import FormatError, ReplayError, TracedbgError, UsageError
from tracedbg.layout import CpuTables, Fidelity, Gate, Idt, Layout, Region, Tss, from_toml, to_toml
from tracedbg.replay import Replay
from tracedbg.state import EventFlag, Kind, Known, Source
from tracedbg.trace import MemoryRange, Trace
from tracedbg.writer import TraceWriter, build

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
        with pytest.raises(FormatError, match="absurd number of") as caught:
            Layout.from_bytes(bytes(bad), "x", 0)
        assert caught.value.offset == field * 4
    with pytest.raises(FormatError, match="needs"):
        Layout.from_bytes(data[:-1], "x", 0)


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


# -- outputs that are no plain files ------------------------------------------------------------------------------------


def reader_of(fifo: Path) -> tuple[threading.Thread, list[bytes]]:
    got: list[bytes] = []
    thread = threading.Thread(target=lambda: got.append(fifo.read_bytes()), daemon=True)
    thread.start()
    return thread, got


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("force", [True, False])
def test_a_fifo_is_written_to(tmp_path: Path, force: bool, atomic: bool) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    thread, got = reader_of(fifo)
    with TraceWriter(fifo, cpus=2, clock_hz=1000, force=force, atomic=atomic) as writer:
        fill(writer)
    thread.join(20)
    assert got == [small_file()]
    assert stat.S_ISFIFO(fifo.lstat().st_mode) and len(list(tmp_path.iterdir())) == 1


def test_a_device_stays_a_device(tmp_path: Path) -> None:
    node = tmp_path / "null"  # not the one of the machine: this test must not break it
    try:
        os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        node.open("wb").close()
    except OSError:
        pytest.skip("device nodes cannot be made here")
    (tmp_path / "link").symlink_to("null")
    for path in (node, tmp_path / "link"):
        for force in (True, False):
            with TraceWriter(path, cpus=2, force=force) as writer:
                fill(writer)
            with pytest.raises(RuntimeError), TraceWriter(path, cpus=2, force=force) as writer:
                raise RuntimeError
    assert stat.S_ISCHR(node.lstat().st_mode) and (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "null"]


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    target = tmp_path / "far" / "real.tdbg"
    target.write_bytes(b"old")
    link = tmp_path / "link.tdbg"
    link.symlink_to("far/real.tdbg")
    with pytest.raises(UsageError, match="--force"):
        TraceWriter(link)
    with TraceWriter(link, cpus=2, clock_hz=1000, force=True) as writer:
        fill(writer)
    assert link.is_symlink() and target.read_bytes() == small_file()
    target.unlink()  # a link to nothing: nothing is overwritten
    with TraceWriter(link, cpus=2, clock_hz=1000) as writer:
        fill(writer)
    assert link.is_symlink() and target.read_bytes() == small_file()


def test_names_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is a directory"):
        TraceWriter(tmp_path, force=True)
    with pytest.raises(UsageError, match="empty"):
        TraceWriter("", force=True)
    with pytest.raises(FormatError, match="too long"):
        TraceWriter(tmp_path / ("x" * 300))
    for name in ("x" * 255, "ä" * 127, "\udcff" * 250):
        with TraceWriter(tmp_path / name, cpus=2) as writer:
            fill(writer)
        assert (tmp_path / name).exists()


class Full(io.BytesIO):
    """A disk without space."""

    def write(self, data: object) -> int:
        raise OSError(28, "No space left on device")


def test_a_full_disk_is_said_whenever_it_is_noticed(tmp_path: Path) -> None:
    writer = TraceWriter(Full())
    fill(writer)
    with pytest.raises(FormatError, match="no space left"):
        writer.flush()
    writer = TraceWriter(tmp_path / "x.tdbg", cpus=2)
    fill(writer)
    writer._file.close()
    writer._file = Full()
    with pytest.raises(FormatError, match=r"x\.tdbg: no space left"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


def test_whatever_stops_the_end_of_a_file_leaves_nothing(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "x.tdbg")
    writer.meta = {"deep": 1}
    for _ in range(2000):
        writer.meta = {"deep": writer.meta}
    with pytest.raises(FormatError, match="nested too deeply"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


# -- mapped traces --------------------------------------------------------------------------------------------------------


@pytest.fixture
def mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trace:
    monkeypatch.setattr(trace_module, "SMALL", 0)
    (tmp_path / "big.tdbg").write_bytes(small_file())
    return Trace.open(tmp_path / "big.tdbg")


def test_slices_that_others_hold_do_not_hide_an_error(mapped: Trace) -> None:
    held = mapped.events[64:128]
    mapped.close()
    mapped.close()
    assert bytes(held)[60] == Kind.WRITE  # the mapping lives as long as the slice


def test_a_damaged_mapped_trace_is_said_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_module, "SMALL", 0)
    (tmp_path / "big.tdbg").write_bytes(small_file()[:-70])
    with pytest.raises(FormatError, match="offset"):
        Trace.open(tmp_path / "big.tdbg")


def test_a_replay_that_cannot_open_lets_go_of_the_trace(mapped: Trace) -> None:
    mapped.cpus = 1 << 40
    with pytest.raises((OverflowError, ReplayError)):
        Replay(mapped)
    mapped.events.release()
    mapped.close()


def test_a_closed_replay_says_so() -> None:
    with Trace.from_bytes(small_file()) as trace:
        with Replay(trace) as replay:
            replay.scan_all()
        replay.close()
        for call in (replay.scan, replay.findings, replay.stats, replay.digest, replay.stacks, lambda: replay.position,
                     lambda: replay.cpu(0), lambda: replay.tss(0), lambda: replay.find_match((), 0),
                     lambda: replay.seek(1)):  # fmt: skip
            with pytest.raises(ReplayError, match="the replay is closed"):
                call()


# -- more of damaged files ------------------------------------------------------------------------------------------------


def with_section(kind: str, data: bytes, *, finished: bool) -> bytes:
    """A file of no events and one section."""
    at = 64 + 2 * 32
    table = wire.SECTION.build({"kind": 1, "crc": 0, "offset": at, "length": 0, "reserved": 0}) + wire.SECTION.build(
        {"kind": wire.SECTION_KINDS[kind], "crc": zlib.crc32(data), "offset": at, "length": len(data), "reserved": 0}
    )
    head = {
        "magic": wire.MAGIC, "major": 1, "minor": 0, "flags": int(finished), "clock_hz": 0, "cpus": 1, "section_count": 2,
        "table_offset": 64, "reserved": 0, "reserved2": 0, "table_crc": zlib.crc32(table), "header_crc": 0,
    }  # fmt: skip
    raw = wire.HEADER.build(head)
    return raw[:-4] + zlib.crc32(raw).to_bytes(4, "little") + table + data


@pytest.mark.parametrize("size", [1, 4, 6, 64])
def test_an_unfinished_trace_has_no_checksums(size: int) -> None:
    with Trace.from_bytes(with_section("CHECKS", b"x" * size, finished=False)) as trace:
        assert list(trace.check()) == []


def test_names_of_stacks_are_texts_of_known_slots() -> None:
    meta = {"stack_names": {"x": "a", "1": "MC", "2": 5, "3": [["x"]], "9": "b", "9" * 5000: "c"}}
    with Trace.from_bytes(with_section("META", json.dumps(meta).encode(), finished=True)) as trace:
        assert trace.layout.names == {1: "MC"}


def test_many_memory_ranges_are_read_in_seconds() -> None:
    begin = time.monotonic()
    data = (500_000).to_bytes(8, "little") + bytes(16 * 500_000)
    with Trace.from_bytes(with_section("MEMORY", data, finished=True)) as trace:
        assert len(trace.memory) == 500_000
    assert time.monotonic() - begin < 10


def test_a_trace_has_the_cpus_of_its_layout() -> None:
    with build(lambda w: setattr(w, "layout", LAYOUT)) as trace:
        assert trace.cpus == 2
    bad = bytearray(small_file())
    bad[:64] = rebuilt(cpus=1)[:64]
    with pytest.raises(FormatError, match="2 CPUs, the trace 1"):
        Trace.from_bytes(bytes(bad), "x")


def test_a_native_trace_is_not_foreign() -> None:
    with Trace.from_bytes(small_file()) as trace:
        assert trace.foreign is None
