"""Ring-buffer pages made by hand: every kind of record, lost ones, several CPUs and buffers."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tracedatcheck import (
    DATA,
    FAULT,
    IRQ,
    IRQ_EXIT,
    POINTS,
    SAMPLES,
    SOFT,
    T0,
    VECTOR,
    agrees,
    all_kinds,
    events,
    one,
    reference,
    report,
    text_of,
    tick,
    times,
)
from tracedatfile import HARDIRQ, NMI, PAGE, Buffer, File, Page, Point

from tracedbg.formats import ReaderOptions, open_input
from tracedbg.formats.tracedat import decode as tracedat_decode
from tracedbg.formats.tracedat import pages as tracedat_pages
from tracedbg.state import EventFlag, Kind, Known, Source
from tracedbg.trace import Trace

Opener = Callable[..., Trace]


@pytest.fixture
def read(tmp_path: Path) -> Opener:
    def open_bytes(data: bytes, **options: Any) -> Trace:
        path = tmp_path / "x.dat"
        path.write_bytes(data)
        return open_input(str(path), options=ReaderOptions(**options))

    return open_bytes


@pytest.mark.parametrize("version", ["6", "none", "zlib", "zstd"])
def test_every_kind_of_record_counts_its_time(version: str, read: Opener, tmp_path: Path) -> None:
    page, expected = all_kinds()
    later = Page(T0 + (1 << 42)).record(0, tick()).bytes()
    file = one(page + later)
    data = file.six() if version == "6" else file.seven(version)
    with read(data) as trace:
        assert times(trace) == [*expected, 1 << 42]
        assert trace.meta["counts"]["records"] == 10 and "damage" not in trace.meta
        assert version == "zlib" or agrees(trace, data, tmp_path)  # this trace-cmd is built without zlib


def test_an_absolute_time_has_59_bits_and_keeps_what_is_above(read: Opener) -> None:
    top = 3 << 59
    page = Page(top + 1000).record(0, tick()).stamp(2000).record(1, tick()).stamp(5).record(1, tick())
    with read(one(page.bytes()).six()) as trace:
        assert [e.time for e in events(trace)] == [top + 1000, top + 2001, top + (1 << 59) + 6]


def test_a_time_before_the_one_before_is_kept_as_it_is(read: Opener) -> None:
    page = Page(T0).record(9, tick()).stamp(T0 + 3).record(0, tick())
    with read(one(page.bytes()).six()) as trace:
        assert times(trace) == [9, 3]


def test_a_commit_of_four_bytes(read: Opener, tmp_path: Path) -> None:
    pages = Page(T0, long_size=4).record(3, tick()).bytes() + Page(T0 + 9, long_size=4).record(0, tick()).bytes(77)
    data = one(pages, long_size=4).six()
    with read(data) as trace:
        assert [(e.kind, e.time - T0) for e in events(trace)] == [(Kind.DELIVER, 3), (Kind.GAP, 9), (Kind.DELIVER, 9)]
        assert trace.event(1).value == 77 and agrees(trace, data, tmp_path)


def test_pages_of_another_size(read: Opener, tmp_path: Path) -> None:
    pages = b"".join(Page(T0 + n, size=16384).record(0, tick()).bytes() for n in range(5))
    with read(one(pages, page_size=16384).six()) as trace:
        assert times(trace) == [0, 1, 2, 3, 4]


def test_missed_events_are_gaps(read: Opener, tmp_path: Path) -> None:
    full = Page(T0 + 200).record(0, tick())
    while len(full.data) <= PAGE - 16 - 12:
        full.record(1, SOFT.record(1))
    assert PAGE - 16 - len(full.data) < 8  # no room for the count
    pages = (
        Page(T0).record(5, tick()).bytes() + Page(T0 + 100).record(4, tick()).bytes(77)
        + full.bytes(5, counted=False) + Page(T0 + 300 + (1 << 20)).record(0, tick()).bytes(5, counted=False)
    )  # fmt: skip
    data = one(pages).six()
    with read(data) as trace:
        assert [e.kind for e in events(trace)] == [Kind.DELIVER, *(Kind.GAP, Kind.DELIVER) * 3]
        gaps = [e for e in events(trace) if e.kind is Kind.GAP]
        assert [(e.cpu, e.time - T0, e.value if e.known & Known.VALUE else None) for e in gaps] == [
            (0, 100, 77), (0, 200, None), (0, 300 + (1 << 20), None),
        ]  # fmt: skip
        assert trace.meta["counts"]["lost"] == 77 and trace.meta["counts"]["gaps"] == 3
        assert agrees(trace, data, tmp_path)
    if shutil.which("trace-cmd"):
        told = report(data, tmp_path)
        assert told.count("LOST") + told.count("DROPPED") == 3 and "[77 EVENTS DROPPED]" in told


def test_cpus_are_merged_by_time_as_trace_cmd_does(read: Opener, tmp_path: Path) -> None:
    r = random.Random(3)
    pages: dict[int, bytes] = {}
    expected = []
    for cpu in (0, 1, 2, 5):
        at, data = T0, b""
        for _ in range(r.randrange(1, 8)):
            page = Page(at)
            for n in range(r.randrange(1, 60)):
                delta = r.choice((0, 1, 5, 1000)) if n else 0
                at += delta
                page.record(delta, tick(0x20 + cpu))
                expected.append((at, cpu))
            data += page.bytes()
            at += 1
        pages[cpu] = data
    file = File(POINTS, [Buffer(pages)])
    for data in (file.six(), file.seven(), file.seven("zstd")):
        with read(data) as trace:
            assert [(e.time, e.cpu) for e in events(trace)] == sorted(expected)
            assert all(e.arg == 0x20 + e.cpu for e in events(trace)) and trace.cpus == 6
            assert agrees(trace, data, tmp_path)


@pytest.mark.parametrize("block", [PAGE, 3 * PAGE])
def test_blocks_and_room_do_not_show(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SAMPLES.values():
        with open_input(str(DATA / name), options=ReaderOptions(keep_marks=True)) as trace:
            whole = bytes(trace.events)
        monkeypatch.setattr(tracedat_pages, "BLOCK", block)
        monkeypatch.setattr(tracedat_decode, "ROOM", 3)
        with open_input(str(DATA / name), options=ReaderOptions(keep_marks=True)) as trace:
            assert bytes(trace.events) == whole
        monkeypatch.undo()


def test_chunks_need_not_hold_whole_pages(read: Opener) -> None:
    pages = b"".join(Page(T0 + n).record(0, tick()).bytes() for n in range(9))
    for chunk in (100, PAGE - 1, 5000):
        with read(one(pages, chunk=chunk).seven("zstd")) as trace:
            assert times(trace) == list(range(9))


def test_instances_are_merged(read: Opener, tmp_path: Path) -> None:
    mine = {0: Page(T0).record(2, tick(0x31)).bytes(), 1: Page(T0).record(9, tick(0x32)).bytes()}
    buffers = [Buffer({0: Page(T0).record(4, tick(0x30)).bytes()}), Buffer(mine, name="mine")]
    for data in (File(POINTS, buffers).six(), File(POINTS, buffers).seven("zstd"), File(POINTS, buffers).seven()):
        with read(data) as trace:
            assert [(e.time - T0, e.cpu, e.arg) for e in events(trace)] == [(2, 0, 0x31), (4, 0, 0x30), (9, 1, 0x32)]
            assert "top, mine" in trace.meta["fidelity"]["buffers"]
        if shutil.which("trace-cmd"):
            assert [(x.cpu, x.time - T0) for x in reference(re.sub(r"(?m)^ *mine:", "", report(data, tmp_path)))] == [
                (0, 2), (0, 4), (1, 9)]  # fmt: skip


def test_an_instance_with_another_clock_is_left_out(read: Opener) -> None:
    buffers = [Buffer({0: Page(T0).record(4, tick()).bytes()}),
               Buffer({0: Page(T0).record(2, tick()).bytes()}, name="mine", clock="x86-tsc")]  # fmt: skip
    with read(File(POINTS, buffers).seven()) as trace:
        assert times(trace) == [4] and trace.meta["fidelity"]["buffers"] == "not read, their clock is another: mine"


def test_offsets_come_from_the_file(read: Opener) -> None:
    fields = (("u32", "error_code"), ("u16", "filler"), ("u64", "ip"), ("u64", "address"))
    moved = Point("exceptions", "page_fault_user", 9, fields, shift=4)
    page = Page(T0).record(0, moved.record(7, 0, 0x401000, 0xDEAD000))
    with read(File((moved,), [Buffer({0: page.bytes()})]).six()) as trace:
        e = trace.event(0)
        assert (e.rip, e.value, e.code, e.arg) == (0x401000, 0xDEAD000, 7, 14)


def test_short_records_are_partial(read: Opener) -> None:
    page = Page(T0).record(0, FAULT.record(1, 2, 3)[:24]).record(1, tick()[:8]).record(1, tick(0x100)).record(1, b"")
    page.record(0, tick()[:4])
    with read(one(page.bytes() + Page(T0).record(0, tick()).bytes()).six()) as trace:
        assert [e.kind for e in events(trace)][:3] == [Kind.DELIVER] * 3
        assert (trace.event(0).value, trace.event(0).rip) == (1, 2) and not trace.event(0).known & Known.CODE
        for n in range(3):
            assert trace.event(n).flags & EventFlag.PARTIAL
        assert not trace.event(1).known & Known.ARG and not trace.event(2).known & Known.ARG


def test_tracepoints_without_their_fields_are_skipped(read: Opener) -> None:
    bare = Point("irq_vectors", "local_timer_entry", 92, (("int", "other"),))
    with read(File((bare, SOFT), [Buffer({0: Page(T0).record(0, bare.record(5)).bytes()})]).six()) as trace:
        assert trace.count == 0 and "irq_vectors:local_timer_entry" in trace.meta["fidelity"]["formats"]


def test_unknown_tracepoints_are_counted(read: Opener) -> None:
    other = Point("x", "y", 1000, VECTOR)
    with read(one(Page(T0).record(0, other.record(5)).record(1, tick()).bytes()).six(), keep_marks=True) as trace:
        assert trace.count == 1 and trace.meta["counts"]["unknown_records"] == trace.meta["counts"]["skipped_records"] == 1


def test_the_flag_nmi_is_told_before_a_delivery_once(read: Opener) -> None:
    page = Page(T0).record(0, FAULT.record(1, 2, 0, flags=NMI)).record(1, FAULT.record(1, 2, 0, flags=NMI | HARDIRQ))
    page.record(1, SOFT.record(1)).record(1, FAULT.record(1, 2, 0, flags=NMI)).record(1, FAULT.record(1, 2, 0, flags=HARDIRQ))
    with read(one(page.bytes()).six()) as trace:
        kinds = [e.kind for e in events(trace)]
        assert kinds == [Kind.MARK, Kind.DELIVER, Kind.DELIVER, Kind.MARK, Kind.DELIVER, Kind.DELIVER]
        assert text_of(trace, trace.event(0)) == "in NMI context: of an NMI, #MC, #DB, INT3 of the kernel, or #DF"


def test_several_handlers_of_one_interrupt_are_one_delivery(read: Opener) -> None:
    a, b, c = IRQ.record(9, "acpi"), IRQ.record(9, "i2c_designware"), IRQ.record(10, "i2c_designware")
    out, out10 = IRQ_EXIT.record(9, 0), IRQ_EXIT.record(10, 1)
    page = Page(T0)
    for payload in (a, out, b, out, a, out, b, out, c, out10, a, out, SOFT.record(1), b, out, a, out, a):
        page.record(1, payload)
    with read(one(page.bytes()).six()) as trace:
        found = [(e.time - T0, e.source, bool(e.known & Known.ARG)) for e in events(trace)]
        assert found == [(n, Source.EXTERNAL, False) for n in (1, 5, 9, 11, 14, 18)]
        assert trace.meta["counts"]["further_handlers"] == 3
