"""Ways into the QEMU log reader: packed, piped, damaged, hostile."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from qemutext import ALONE, DATA, deliveries, event, events, head, read_bytes, tail

from tracedbg import wire
from tracedbg.errors import FormatError, UsageError
from tracedbg.formats import ReaderOptions, open_input
from tracedbg.formats.qemu import monitor as qemu_monitor
from tracedbg.formats.source import Input
from tracedbg.symbols import Symbols

# -- ways in -----------------------------------------------------------------------------------------------------------------


def test_every_packing_line_end_and_a_pipe_give_the_same_events(tmp_path: Path) -> None:
    path = DATA / "istlab/a/qemu.log"
    plain = path.read_bytes()
    want = bytes(open_input(str(path), options=ALONE).events)
    for data in (
        plain,
        plain.replace(b"\n", b"\r\n"),
        gzip.compress(plain),
        gzip.compress(plain[:1000]) + gzip.compress(plain[1000:]),
        zstandard.compress(plain),
        zstandard.compress(plain[:999]) + zstandard.compress(plain[999:]),
    ):
        assert bytes(read_bytes(tmp_path, data).events) == want
    program = (
        "import sys; from tracedbg.formats import open_input;"
        "t = open_input('-'); sys.stdout.write(bytes(t.events).hex() + ' ' + t.meta['source']['name'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input=plain, capture_output=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert done.stdout.decode() == want.hex() + " stdin"


def test_what_is_no_log_is_refused_in_one_line(tmp_path: Path) -> None:
    def fails(data: bytes | None, message: str, path: Path | None = None) -> None:
        if data is not None:
            path = tmp_path / "bad"
            path.write_bytes(data)
        with pytest.raises(FormatError, match=message) as caught:
            open_input(str(path))
        assert "\n" not in str(caught.value)

    fails(b"", "empty file")
    fails(b"hello world\n" * 100, "not a trace or log")
    fails(b"\0" * 5000, "not a trace or log")
    fails(gzip.compress(b"CPU Reset (CPU 0)\n" * 1000)[:-20], "gzip")
    fails(gzip.compress(os.urandom(50000))[:200] + b"x" * 300, "gzip")
    fails(zstandard.compress(os.urandom(50000))[:20000] + b"x" * 3000, "zstd|not a trace")
    fails(None, "is a directory", tmp_path)
    fails(None, "no such file", tmp_path / "none")
    fails((DATA / "istlab/a/mon_01_start.txt").read_bytes(), "monitor")
    with pytest.raises(FormatError, match="not a QEMU -d int log"):
        (tmp_path / "bad").write_bytes(b"hello\n")
        open_input(str(tmp_path / "bad"), from_format="qemu-int")
    with pytest.raises(UsageError, match="no input format"):
        open_input(str(tmp_path / "bad"), from_format="nonsense")


def test_hostile_text_never_raises_anything_but_format_error(tmp_path: Path) -> None:
    plain = gzip.decompress((DATA / "linux/l2_torn_excerpt.log.gz").read_bytes())
    plugin = gzip.decompress((DATA / "linux/nest_plugin_excerpt.log.gz").read_bytes())[:40000]
    seeds = [plain, plugin, b"PLG cpu=99999 st pc=" + b"f" * 16 + b" va=" + b"f" * 16 + b" sz=999 val=" + b"f" * 3000 + b"\n"]
    rng = random.Random(1)
    for turn in range(150):
        data = bytearray(seeds[turn % 3] + plain[:2000])
        for _ in range(rng.randrange(1, 30)):
            at = rng.randrange(len(data))
            match rng.randrange(5):
                case 0:
                    data[at] = rng.randrange(256)
                case 1:
                    del data[at : at + rng.randrange(1, 400)]
                case 2:
                    other = rng.randrange(len(data))
                    data[at:at] = data[other : other + rng.randrange(1, 600)]
                case 3:
                    data[at:at] = rng.choice([b"\n", b"\r", b"\0", b"9" * 30, b": v=300 ", b"CPU Reset (CPU 99999)\n"])
                case _:
                    data[at:at] = rng.choice([b"check_exception old: 0x8 new 0xe\n", b"PLG cpu=0 iret pc=0000000000000001\n"])
        try:
            trace = read_bytes(tmp_path, bytes(data), ReaderOptions(from_format="qemu-int", discover=False))
        except FormatError:
            continue
        events(trace)


def test_too_many_tr_bases_are_no_machine(tmp_path: Path) -> None:
    text = "".join(event(n, 0x20, 0x1000, 0x9000, tr=0x100000 + 0x80 * n) for n in range(4200))
    with pytest.raises(FormatError, match="different TR bases"):
        read_bytes(tmp_path, text.encode())


def test_a_line_without_end_is_skipped_in_bounded_memory(tmp_path: Path) -> None:
    text = event(0, 0x20, 0x1000, 0x9000).encode() + b"x" * (9 << 20) + b"\n" + event(1, 0x20, 0x1000, 0x9000).encode()
    trace = read_bytes(tmp_path, text)
    assert [e.source_index for e in deliveries(trace)] == [0, 1]
    assert trace.meta["counts"]["damaged"] == 1


def test_a_bomb_is_refused() -> None:
    stream = zstandard.ZstdCompressor(level=3)
    data = stream.compress(b"CPU Reset (CPU 0)\n" + b"\0" * (300 << 20))
    program = "import sys; from tracedbg.formats import open_input; open_input('-')"
    done = subprocess.run(
        [sys.executable, "-c", program], input=data, capture_output=True, cwd=Path(__file__).parents[1]
    )
    assert b"FormatError" in done.stderr
    assert b"not a log" in done.stderr


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress], ids=["gzip", "zstd"])
def test_a_packed_log_that_is_cut_short_is_refused_wherever_it_is_cut(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    plain = (DATA / "istlab/a/qemu.log").read_bytes()
    data = pack(plain) + pack(plain[:999])
    whole = len(pack(plain))
    for cut in [*range(5, len(data), 97), whole - 1, whole + 1, len(data) - 1]:
        path = tmp_path / "log"
        path.write_bytes(data[:cut])
        with pytest.raises(FormatError, match="data is cut short") as caught:
            open_input(str(path), options=ReaderOptions(from_format="qemu-int", discover=False))
        assert caught.value.offset == cut
    assert read_bytes(tmp_path, data[:whole]).count == 5  # between two frames nothing is missing


def test_many_empty_frames_and_members_take_linear_time(tmp_path: Path) -> None:
    plain = (DATA / "istlab/a/qemu.log").read_bytes()
    for pack in (gzip.compress, zstandard.compress):
        start = time.process_time()
        assert read_bytes(tmp_path, pack(b"") * ((2 << 20) // len(pack(b""))) + pack(plain)).count == 5
        assert time.process_time() - start < 6


def test_what_zstd_expands_to_comes_in_bounded_pieces(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(zstandard.compress(b"CPU Reset (CPU 0)\n" + b"\0" * (200 << 20)))
    with Input(str(path)) as opened:
        assert max(len(piece) for piece in opened.chunks()) <= 64 << 20
        assert opened.bytes == (200 << 20) + 18


HOSTILE = {
    "newlines": b"\n",
    "returns": b"\r\n",
    "spaces": b" ",
    "tabs": b"\t",
    "digits": b"1",
    "nuls": b"\0",
    "dashes": b"-",
    "cpu": b"CPU#",
    "cpu lines": b"CPU#0 \n",
    "cpu digits": b"CPU#" + b"1" * 4000 + b" ",
    "v": b": v=",
    "v lines": b"1: v\n",
    "heads": b" 1: v=02 e=0000 i=0 cpl=0 IP=0008:",
    "spaces before v": b" " * 60000 + b": v=\n",
    "digits before v": b"1" * 60000 + b": v=\n",
    "tails": b" CR2=0000000000000000\n",
    "long tails": b" CR2=0000000000000000",
    "registers": b"RAX=00000000",
    "small dumps": b"EAX=00000000\nEFER=\n",
    "torn registers": b"RIP=Triple fault\n",
    "times": b"1@1.",
    "long times": b"1" * 4000 + b"@",
    "plugin": b"PLG cpu=0 st pc=" + b"0" * 16 + b"\n",
    "plugin values": b"PLG cpu=0 st pc=" + b"0" * 16 + b" va=" + b"0" * 16 + b" sz=1 val=" + b"0" * 4000 + b"\n",
    "escapes": b"\x1b[1",
    "backspaces": b"a\x08",
    "memory": b"0000000000105100: 0x00000000\n",
    "words": b" 0x00000000",
    "words with blanks": b" " * 500 + b"00",
    "memory commands": b"xp " + b" " * 500,
}


@pytest.mark.parametrize("piece", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_is_read_in_linear_time(tmp_path: Path, piece: bytes) -> None:
    size = 1 << 18
    lead = (head(0, 3, 0x1000, 0x9000) + tail(3) + "\n").encode()
    many = b"Triple fault\nCPU Reset (CPU 0)\n" * 2000  # that wait behind the `v=` line without a register dump
    text = (piece * (size // len(piece) + 1))[:size]
    lines = b"".join(text[at : at + 60000] + b": v=\n" for at in range(0, size, 60000))  # none longer than the limit
    two = lead + (head(1, 14, 0x1000, 0x9000) + "\n").encode() + many
    start = time.process_time()
    for data in (text, lines, two + text, two + lines, lead + b"RAX=00000000\n" + lines, b"0000000000105100:" + text):
        for form in (None, "qemu-int"):
            with contextlib.suppress(FormatError):
                read_bytes(tmp_path, data, ReaderOptions(from_format=form, discover=False))
        with contextlib.suppress(FormatError):
            qemu_monitor.parse(data, "m")
        with contextlib.suppress(FormatError):
            Symbols.parse(data)
    assert time.process_time() - start < 10  # a tenth of it is usual; what grows with the square takes minutes


@pytest.mark.parametrize("first", ["     1: v", "1: v=02 ", "RAX=0000000000000001 ", "RSI=0"], ids=["v", "v=", "rax", "rsi"])
def test_a_line_that_is_torn_without_end_is_damaged_once_it_is_longer_than_a_real_one(tmp_path: Path, first: str) -> None:
    begin = event(0, 0x20, 0x1000, 0x9000) + head(1, 3, 0x1000, 0x9000) + tail(3) + "\n"
    if first.startswith("RSI"):
        begin += "RAX=0000000000000001\n"
    text = begin + first + ("x" * 1000 + "Triple fault\n") * 1000 + event(2, 0x20, 0x1000, 0x9000)
    start = time.process_time()
    trace = read_bytes(tmp_path, text.encode())
    assert time.process_time() - start < 10
    assert [e.source_index for e in deliveries(trace)][0::2] == [0, 2]
    counts = trace.meta["counts"]
    assert counts["damaged"] >= 1
    assert counts["torn_repaired"] <= 2


def converted(log: Path, out: Path) -> bytes:
    """What `tracedbg convert` makes of a log."""
    subprocess.run([sys.executable, "-m", "tracedbg", "convert", str(log), str(out)], check=True, timeout=120)
    return out.read_bytes()


def test_a_trace_says_which_foreign_format_it_was_read_from(tmp_path: Path) -> None:
    log = DATA / "istlab/a/qemu.log"
    assert open_input(str(log)).foreign == "qemu-int"
    native = tmp_path / "a.tdbg"
    converted(log, native)
    packed = tmp_path / "a.tdbg.zst"
    packed.write_bytes(zstandard.compress(native.read_bytes()))
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    feeder = threading.Thread(target=fifo.write_bytes, args=(native.read_bytes(),))
    feeder.start()
    for path in (native, packed, fifo):
        assert open_input(str(path)).foreign is None
    feeder.join()
    for path in (native, packed):
        for form in (None, "tracedbg"):
            with pytest.raises(UsageError, match="--monitor belongs to the log of an emulator"):
                open_input(str(path), from_format=form, options=ReaderOptions(monitor=("mon_01.txt",)))


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/urandom"])
def test_a_device_named_as_a_native_trace_is_refused_at_once(name: str) -> None:
    with pytest.raises(FormatError, match="wrong magic"):
        open_input(name, from_format="tracedbg")


def test_monitor_text_may_be_packed_or_on_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, monitor = DATA / "istlab/a/qemu.log", DATA / "istlab/a/mon_01_start.txt"
    want = open_input(str(log), options=ReaderOptions(monitor=(str(monitor),))).layout
    assert not want.is_empty
    for pack in (gzip.compress, zstandard.compress):
        path = tmp_path / "mon"
        path.write_bytes(pack(monitor.read_bytes()))
        assert open_input(str(log), options=ReaderOptions(monitor=(str(path),))).layout == want
        path.write_bytes(pack(monitor.read_bytes())[:-9])
        with pytest.raises(FormatError, match="cut short"):
            open_input(str(log), options=ReaderOptions(monitor=(str(path),)))
    path.write_bytes(zstandard.compress(b"\n" * (qemu_monitor.MAX_TEXT + 1)))
    with pytest.raises(FormatError, match="too large"):
        open_input(str(log), options=ReaderOptions(monitor=(str(path),)))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(monitor.read_bytes())))
    assert open_input(str(log), options=ReaderOptions(monitor=("-",))).layout == want
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(log.read_bytes())))
    with pytest.raises(UsageError, match="standard input"):
        open_input("-", options=ReaderOptions(monitor=("-",)))


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    log = DATA / "istlab/a/qemu.log"
    first, second = (converted(log, tmp_path / f"{n}.tdbg") for n in range(2))
    assert first == second
    assert str(DATA).encode() not in first and first.startswith(wire.MAGIC)
