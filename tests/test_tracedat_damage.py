"""Damaged and cut trace.dat files."""

from __future__ import annotations

import gzip
import random
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tracedatcheck import (
    CODED,
    DATA,
    ENTRY,
    EXIT,
    FAULT,
    INJ_EXC,
    IRQ,
    POINTS,
    SAMPLES,
    T0,
    TIMER,
    VALID,
    all_kinds,
    entry,
    events,
    one,
    page_of,
    tick,
    vmexit,
)
from tracedatfile import NMI, PAGE, Buffer, File, Page

from tracedbg.errors import FormatError, UsageError
from tracedbg.formats import ReaderOptions, open_input
from tracedbg.state import Kind
from tracedbg.trace import Trace

Opener = Callable[..., Trace]


@pytest.fixture
def read(tmp_path: Path) -> Opener:
    def open_bytes(data: bytes, **options: Any) -> Trace:
        path = tmp_path / "x.dat"
        path.write_bytes(data)
        return open_input(str(path), options=ReaderOptions(**options))

    return open_bytes


def outcome(path: Path) -> tuple[str, Trace | None]:
    """How an input ends: an error in one line, a marked partial result, or a whole one."""
    try:
        trace = open_input(str(path))
    except (FormatError, UsageError) as error:
        assert "\n" not in str(error) and str(error).isprintable()
        return "error", None
    assert sum(trace.check()) == trace.count
    return ("partial" if "damage" in trace.meta else "whole"), trace


def test_a_page_that_is_not_readable_is_a_gap(read: Opener) -> None:
    good, bad = Page(T0 + 9).record(0, tick()).bytes(), Page(T0).record(1, tick()).raw(b"\x1c\0\0\0ab").bytes()
    huge = Page(T0 + 5).record(1, tick()).bytes(used=PAGE)
    broken = [(bad, [Kind.DELIVER, Kind.GAP, Kind.DELIVER]), (huge, [Kind.GAP, Kind.DELIVER])]
    for raw in (b"\0", b"\x00\0\0\0", b"\x00\0\0\0\3\0\0\0", b"\x3d\0\0\0\0\0\0\0", b"\x1e\0\0\0", b"\0\0\0\0\xff\xff\xff\xff"):
        broken.append((Page(T0).record(1, tick()).raw(raw).bytes(), [Kind.DELIVER, Kind.GAP, Kind.DELIVER]))
    for page, kinds in broken:
        file = one(page + good)
        for make in (file.six, lambda file=file: file.seven("zstd")):
            with read(make()) as trace:
                assert [e.kind for e in events(trace)] == kinds
                assert trace.meta["counts"]["damaged_pages"] == 1
                (told,) = trace.meta["damage"]
                assert "not readable to its end" in told and f"at {file.places['0']:#x}" in told


def test_a_damaged_chunk_ends_its_cpu_alone(read: Opener) -> None:
    pages = b"".join(Page(T0 + n).record(0, tick()).bytes() for n in range(30))
    file = File(POINTS, [Buffer({0: pages, 1: pages})])
    data = bytearray(file.seven("zlib"))
    second = file.places["0"] + 4 + 8 + int.from_bytes(data[file.places["0"] + 4 : file.places["0"] + 8], "little")
    data[second + 20] ^= 0xFF
    with read(bytes(data)) as trace:
        found = Counter((e.cpu, e.kind) for e in events(trace))
        assert found == {(0, Kind.DELIVER): 10, (0, Kind.GAP): 1, (1, Kind.DELIVER): 30}
        gap = next(e for e in events(trace) if e.kind is Kind.GAP)
        assert gap.time == T0 + 9 and "(CPU 0)" in trace.meta["damage"][0]


def test_bombs_do_not_go_off(read: Opener) -> None:
    file = one(page_of(tick()))
    data = bytearray(file.seven("zstd"))
    at = file.places["0"] + 4
    data[at + 4 : at + 8] = struct.pack("<I", 0xFFFFFFFF)
    with pytest.raises(FormatError, match="larger than its place"):
        read(bytes(data))
    import zstandard

    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))  # says its size
    assert len(bomb) < 10_000
    start = data[: file.places["0"]]
    swapped = bytes(start) + struct.pack("<III", 1, len(bomb), PAGE) + bomb
    listed = struct.pack("<IQQ", 0, file.places["0"], 8 + int.from_bytes(file.seven("zstd")[at : at + 4], "little"))
    tail = file.seven("zstd")[file.places["0"] + 12 + int.from_bytes(file.seven("zstd")[at : at + 4], "little") :]
    assert listed in tail
    moved = len(swapped) - (len(file.seven("zstd")) - len(tail))
    out = bytearray(swapped + tail.replace(listed, struct.pack("<IQQ", 0, file.places["0"], 8 + len(bomb))))
    whole = file.seven("zstd")
    old = struct.pack("<Q", len(whole) - len(tail))
    place = whole.index(old)
    out[place : place + 8] = struct.pack("<Q", len(whole) - len(tail) + moved)
    with pytest.raises(FormatError, match="another size"):
        read(bytes(out))


def small_files() -> dict[str, File]:
    """Small files, in small pages, with every kind of thing in them."""
    size = 512
    page, _ = all_kinds(size)
    guest = page_of(entry(VALID | 0x202), vmexit(48, info2=VALID | 0x202), entry(VALID | 0x30E | CODED), tick(), vmexit(8),
                    INJ_EXC.record(13, 1, 8, 0, pid=70), size=size)  # fmt: skip
    more = Page(T0 + 50, size=size).record(0, IRQ.record(9, "acpi")).record(2, FAULT.record(1, 2, 3, flags=NMI)).bytes(6)
    return {
        "top": File((TIMER, FAULT, IRQ), [Buffer({0: page + more, 1: page})], kallsyms=b"ffffffff81000000 T _text\n",
                    page_size=size),
        "two": File((ENTRY, EXIT, INJ_EXC), [Buffer({0: guest}), Buffer({1: page, 0: guest}, name="in")], page_size=size,
                    options=((14, struct.pack("<IIQ", 1, 1, 1)),)),
    }  # fmt: skip


def versions() -> list[tuple[str, bytes]]:
    return [
        (f"{name}-{kind}", file.six() if kind == "6" else file.seven(kind))
        for name, file in small_files().items() for kind in ("6", "none", "zlib", "zstd")
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "data"), versions(), ids=[name for name, _ in versions()])
def test_every_truncation_is_an_error_or_marked(name: str, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.dat"
    path.write_bytes(data)
    how, whole = outcome(path)
    assert how == "whole" and whole is not None
    count = whole.count
    whole.close()
    seen: Counter[str] = Counter()
    every = 1 if name in ("top-6", "two-zstd") else 7
    for size in range(0, len(data), every):
        if data[size:].strip(b"\0") or size % 61 == 0:  # of the zeros at the end, some
            path.write_bytes(data[:size])
            how, trace = outcome(path)
            seen[how] += 1
            if trace is not None:
                assert how == "partial", size  # no cut of a file is whole
                assert trace.count <= count + len(trace.meta["damage"])
                assert any(e.kind is Kind.GAP for e in events(trace))
                trace.close()
    assert seen["error"] and (seen["partial"] or not name.endswith("6"))


def mutate(data: bytes, r: random.Random) -> bytes:
    changed = bytearray(data)
    spots = [n for n in (r.randrange(len(changed)) for _ in range(64)) if changed[n] or r.random() < 0.05]
    for at in spots[: r.choice((1, 1, 2, 8))] or [r.randrange(len(changed))]:
        changed[at] = r.choice((0, 0xFF, r.randrange(256), changed[at] ^ 1 << r.randrange(8)))
    if r.random() < 0.05:
        at = r.randrange(len(changed))
        del changed[at : at + r.randrange(1, 9)]
    return bytes(changed)


def run_mutations(data: bytes, turns: int, seed: int, path: Path) -> Counter[str]:
    r, seen = random.Random(seed), Counter[str]()
    for _ in range(turns):
        changed = mutate(data, r)
        path.write_bytes(changed)
        how, trace = outcome(path)
        seen[how] += 1
        if trace is not None:
            assert trace.count <= len(data) and trace.cpus <= 4096
            trace.close()
    return seen


@pytest.mark.parametrize(("name", "data"), versions(), ids=[name for name, _ in versions()])
def test_mutations_end_well(name: str, data: bytes, tmp_path: Path) -> None:
    seen = run_mutations(data, 1250, 11, tmp_path / "x.dat")
    assert seen["error"] and seen["whole"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLES)
def test_mutations_of_samples_end_well(name: str, tmp_path: Path) -> None:
    raw = (DATA / SAMPLES[name]).read_bytes()
    seen = run_mutations(raw if name == "local" else gzip.decompress(raw), 10_000, 12, tmp_path / "x.dat")
    assert seen["error"] and seen["whole"] and seen["partial"]
