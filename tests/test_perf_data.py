"""perf.data: the walk over its records, its AUX data, and what its header says of their clock."""

from __future__ import annotations

import gzip
import random
import shutil
import struct
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import perf_asm
import pytest
from perf_asm import EVENT, MTC, TSC, attr, aux, info, lost, perf_data, pipe_data, record
from pt_asm import cfe, fup, mtc, psbp, tma, tsc
from pt_random import recording

from tracedbg.errors import FormatError, UsageError
from tracedbg.formats import open_input, open_inputs
from tracedbg.formats.pt import perf_data as reader
from tracedbg.formats.pt import perf_records
from tracedbg.formats.source import Input
from tracedbg.state import Kind, Known
from tracedbg.trace import Event, Trace

Run = Callable[..., subprocess.CompletedProcess[str]]
Opener = Callable[..., Trace]
SOME = psbp() + tsc(1000) + cfe(1, 32) + cfe(2)


@pytest.fixture
def read(tmp_path: Path) -> Opener:
    def opener(data: bytes, **options: Any) -> Trace:
        path = tmp_path / "perf.data"
        path.write_bytes(data)
        return open_input(str(path), **options)

    return opener


def events(trace: Trace) -> Iterator[Event]:
    return (trace.event(n) for n in range(trace.count))


def vectors(trace: Trace) -> list[tuple[int, int, int]]:
    return [(e.cpu, e.arg, e.time) for e in events(trace) if e.kind is Kind.DELIVER]


# -- recordings without PT ----------------------------------------------------------------------------------------------


def test_a_recording_without_pt_is_refused(shared: Path, run_cli: Run) -> None:
    done = run_cli("info", shared / "perf" / "perf-smp2.data", code=2)
    assert "without Intel PT data" in done.stderr and "`perf script`" in done.stderr
    assert done.stderr.count("\n") == 1 and not done.stdout


def test_records_are_those_that_perf_counts(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # `perf report -D` of this file: 322 SAMPLE, 65 COMM, 64 FORK, 62 MMAP2, 22 MMAP and 9 of other types. The file is walked
    # as if it had AUX data; its header says that it does not.
    monkeypatch.setattr(perf_records, "_FEATURE_AUXTRACE", 1)
    path = str(shared / "perf" / "perf-smp2.data")
    with Input(path) as source:
        file = perf_records.PerfFile(path, source.chunks())
        assert list(file.walk()) == [] and file.damage is None
        assert file.records == 544
        assert [a.type for a in file.attrs] == [2] * 25 + [1]  # 25 tracepoints, and a dummy
        assert file.attrs[0].config == 0x50 and file.attrs[0].sample_id_all
    with pytest.raises(FormatError, match="without Intel PT"):
        open_input(path)


def test_other_aux_data_are_refused(read: Opener) -> None:
    with pytest.raises(FormatError, match=r"not Intel PT's \(type 2\)"):
        read(perf_data(info(kind=2), aux(0, 0, SOME)))
    for data in (perf_data(info()), perf_data(info(), features=0), perf_data(info(), aux(0, 0, b""))):
        with pytest.raises(FormatError, match=r"without Intel PT|no PSB"):
            read(data)


# -- AUX data -----------------------------------------------------------------------------------------------------------


def test_cpus_and_offsets(read: Opener) -> None:
    data = perf_data(info(), aux(3, 64, SOME), aux(1, 0, psbp() + tsc(2000) + cfe(1, 33)))
    with read(data) as trace:
        assert vectors(trace) == [(3, 32, 1000), (1, 33, 2000)]
        assert trace.cpus == 4 and trace.clock_hz == 2_000_000_000
        assert trace.event(0).source_index == 64 + len(psbp()) + 8
    assert gzip.compress(data)[:2] == b"\x1f\x8b"
    with read(gzip.compress(data)) as trace:
        assert trace.count == 3


def test_a_stream_goes_on_in_the_next_record(read: Opener) -> None:
    stream = psbp() + b"".join(tsc(1000 + n) + cfe(1, n, ip=True) + fup(0x1000 + n) for n in range(100))
    r = random.Random(1)
    for _ in range(20):
        cuts = sorted({0, len(stream), *(r.randrange(len(stream)) for _ in range(6))})
        pieces = [aux(0, a, stream[a:b]) for a, b in pairwise(cuts)]
        with read(perf_data(info(), *pieces)) as trace:
            assert vectors(trace) == [(0, n, 1000 + n) for n in range(100)]
            assert [e.rip for e in events(trace)] == [0x1000 + n for n in range(100)]


def test_rounds_are_merged_as_they_come(read: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    # Four CPUs; perf reads their buffers in turn, and those that have nothing leave no record.
    r = random.Random(2)
    whole = sorted((1000 + n * 7, r.randrange(4), n % 256) for n in range(2000))
    queues: list[list[tuple[int, int]]] = [[], [], [], []]
    records, offset, at, now = [info()], [0] * 4, 0, 1000
    first = [True] * 4
    while at < len(whole) or any(queues):
        for cpu in range(4):
            now += r.randrange(400)
            while at < len(whole) and whole[at][0] <= now:
                queues[whole[at][1]].append((whole[at][0], whole[at][2]))
                at += 1
            if queues[cpu]:
                data = (psbp() if first[cpu] else b"") + b"".join(tsc(t) + cfe(1, v) for t, v in queues[cpu])
                first[cpu], queues[cpu] = False, []
                records.append(aux(cpu, offset[cpu], data, reference=now))
                offset[cpu] += len(data)
    held = []
    write = reader.Merge.write

    def spy(self: Any, limit: int = (1 << 64) - 1) -> None:
        held.append(self.held)
        write(self, limit)

    monkeypatch.setattr(reader.Merge, "write", spy)
    with read(perf_data(*records)) as trace:
        assert [(time, cpu, vector) for cpu, vector, time in vectors(trace)] == whole
        assert "unordered" not in trace.meta["counts"]
    assert max(held) < len(whole) * 64 // 10
    # References that say nothing, or too much: all is kept until it is too much, or comes out of order, but nothing is lost.
    for reference in (0, 1 << 60):
        monkeypatch.setattr(reader, "MAX_HELD", 20_000)
        wrong = [r_[:24] + struct.pack("<Q", reference) + r_[32:] if r_[0] == 71 else r_ for r_ in records]
        with read(perf_data(*wrong)) as trace:
            assert sorted((time, cpu, vector) for cpu, vector, time in vectors(trace)) == whole
            assert reference or trace.meta["counts"]["unordered"] > 0


def test_a_pipe(read: Opener) -> None:
    with read(pipe_data(info(), aux(0, 0, SOME))) as trace:
        assert vectors(trace) == [(0, 32, 1000)] and "damage" not in trace.meta


def test_a_recording_that_was_killed(read: Opener) -> None:
    data = perf_data(info(), aux(0, 0, SOME), finished=False)
    with read(data) as trace:
        assert trace.count == 2 and "damage" not in trace.meta
    with read(data[:-1]) as trace:
        assert [e.kind for e in events(trace)] == [Kind.DELIVER, Kind.GAP, Kind.GAP]
        assert not trace.event(2).known & Known.CPU
        assert len(trace.meta["damage"]) == 2


def test_lost_data_are_gaps(read: Opener) -> None:
    one, two = psbp() + tsc(1000) + cfe(1, 32), cfe(1, 33) + psbp() + tsc(3000) + cfe(1, 34)
    told = lost(1, 0, len(one))
    with read(perf_data(info(), aux(0, 0, one), told, aux(1, 0, one + two))) as trace:
        assert [(e.cpu, e.kind) for e in events(trace)] == [
            (0, Kind.DELIVER), (1, Kind.DELIVER), (1, Kind.GAP), (1, Kind.DELIVER), (1, Kind.DELIVER),
        ]  # fmt: skip
        assert trace.meta["counts"]["truncations"] == 1
    # Told too late, it is a gap where the stream goes on; other flags are none.
    with read(perf_data(info(), aux(1, 0, one), told, aux(1, len(one), two))) as trace:
        assert [e.kind for e in events(trace)] == [Kind.DELIVER, Kind.GAP, Kind.DELIVER, Kind.DELIVER]
    with read(perf_data(info(), lost(1, 0, len(one), flags=2), aux(1, 0, one + two))) as trace:
        assert Kind.GAP not in [e.kind for e in events(trace)]
    # Without a CPU in it nobody knows whose they are: said, not guessed.
    with read(perf_data(info(), told, aux(1, 0, one + two), attrs=(attr(sample_type=7),))) as trace:
        assert Kind.GAP not in [e.kind for e in events(trace)] and "does not say on which CPU" in trace.meta["fidelity"]["lost"]


def test_a_stream_with_a_hole(read: Opener) -> None:
    one, two = psbp() + tsc(1000) + cfe(1, 32), cfe(1, 33) + psbp() + tsc(3000) + cfe(1, 34)
    with read(perf_data(info(snapshot=1), aux(0, 0, one), aux(0, 5000, two))) as trace:
        assert [(e.kind, e.arg) for e in events(trace)] == [(Kind.DELIVER, 32), (Kind.GAP, 0), (Kind.DELIVER, 34)]
        assert trace.event(2).source_index == 5000 + len(two) - 4 and "snapshot" in trace.meta["fidelity"]
    # Snapshots overlap: what is there already is not read again.
    with read(perf_data(info(snapshot=1), aux(0, 0, one), aux(0, 20, one[20:] + two), aux(0, 20, one[20:]))) as trace:
        assert [e.arg for e in events(trace)] == [32, 33, 34]


def test_recorded_by_thread(read: Opener) -> None:
    with read(perf_data(info(), aux(0xFFFFFFFF, 0, SOME, idx=0), aux(0xFFFFFFFF, 0, SOME, idx=1))) as trace:
        assert {e.cpu for e in events(trace)} == {0, 1} and "by thread" in trace.meta["fidelity"]["cpu"]


# -- what the header says -----------------------------------------------------------------------------------------------


def test_the_clock(read: Opener, run_cli: Run, tmp_path: Path) -> None:
    stream = psbp() + tsc(84_000) + tma(1000, 0) + mtc(1001 >> 3) + mtc((1000 >> 3) + 1) + cfe(4)
    config = EVENT | TSC | 1 | MTC | 3 << 14
    with read(perf_data(info(), aux(0, 0, stream), attrs=(attr(config=config),))) as trace:
        assert trace.event(0).time == 84_000 + 84 * 8 and "MTC packets, whose ratio" in trace.meta["fidelity"]["time"]
    for bad in (info(n=0), info(d=0), info(n=1 << 40)):
        with read(perf_data(bad, aux(0, 0, stream), attrs=(attr(config=config),))) as trace:
            assert trace.event(0).time == 84_000 and "not known" in trace.meta["fidelity"]["time"]
    with read(perf_data(info(), aux(0, 0, stream))) as trace:  # an attribute without MTC
        assert trace.event(0).time == 84_000
    clocks = ((31, 1 << 30, 2_000_000_000), (32, 1_789_569_706, 2_400_000_000), (0, 0, 0), (64, 1, 0), (63, 1, (1 << 63) - 1))
    for shift, mult, hz in clocks:
        with read(perf_data(info(shift=shift, mult=mult), aux(0, 0, stream))) as trace:
            assert abs(trace.clock_hz - hz) <= 2
    assert "clock 1,000,000,000 Hz" in run_cli("info", "--cpu-hz", "1G", tmp_path / "perf.data", code=0).stdout


def test_filters_are_told(read: Opener, run_cli: Run, tmp_path: Path) -> None:
    for flags, words in ((1 << 4, "user mode was left out"), (1 << 5, "kernel mode was left out")):
        with read(perf_data(info(), aux(0, 0, SOME), attrs=(attr(flags=flags | 1 << 18),))) as trace:
            assert words in trace.meta["fidelity"]["filters"]
    with read(perf_data(info(filter_=b"filter 0x10/0x20\x1b[31m@/bin/x"), aux(0, 0, SOME))) as trace:
        assert "filter 0x10/0x20" in trace.meta["fidelity"]["filter"]
    assert "\x1b" not in run_cli("info", tmp_path / "perf.data", code=0).stdout


def test_options(read: Opener, tmp_path: Path) -> None:
    read(perf_data(info(), aux(0, 0, SOME))).close()
    path = str(tmp_path / "perf.data")
    with pytest.raises(UsageError, match="one file"):
        open_inputs([path, shutil.copy(path, tmp_path / "other")])


# -- damage -------------------------------------------------------------------------------------------------------------


def outcome(path: Path) -> tuple[str, Trace | None]:
    try:
        trace = open_input(str(path), from_format="perf-data")
    except FormatError as error:
        assert "\n" not in str(error) and (error.offset is not None)
        return "error", None
    assert [0, *trace.check()][-1] == trace.count
    return ("partial" if "damage" in trace.meta else "whole"), trace


def small() -> bytes:
    streams = [psbp() + tsc(1000 + n) + cfe(1, 32 + n, ip=True) + fup(0x1000) + cfe(2) for n in range(2)]
    return perf_data(info(), record(3, bytes(24)), lost(1, 0, 20), aux(0, 0, streams[0]), aux(1, 0, streams[1]), record(68))


def test_every_truncation(tmp_path: Path) -> None:
    path, data = tmp_path / "x", small()
    seen: Counter[str] = Counter()
    for size in range(1, len(data)):
        path.write_bytes(data[:size])
        how, trace = outcome(path)
        seen[how] += 1
        if trace is not None:
            kinds = [e.kind for e in events(trace)]
            assert (how == "partial" and Kind.GAP in kinds) or size >= len(data) - 24  # an index that is not read
            trace.close()
    assert seen["partial"] > 40 and seen["error"] > 300


def test_mutations_end_well(tmp_path: Path) -> None:
    path, data, r = tmp_path / "x", small(), random.Random(7)
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
            assert trace.count < 100
            trace.close()
    assert all(seen[how] > 100 for how in ("error", "partial", "whole"))


@pytest.mark.parametrize("size", [4, 6, 8, 15])
def test_a_head_of_the_aux_data_that_is_cut_is_read_as_far_as_it_goes(size: int, tmp_path: Path) -> None:
    whole = info()
    cut = struct.pack("<IHH", 70, 0, 8 + size) + whole[8 : 8 + size]
    (tmp_path / "x").write_bytes(perf_data(cut, aux(0, 0, SOME)))
    with open_input(str(tmp_path / "x")) as trace:
        assert trace.count > 0 and not trace.clock_hz


@pytest.mark.slow
def test_ten_thousand_mutations_of_the_walk_end_well(tmp_path: Path) -> None:
    data, r = recording(3, steps=20), random.Random(8)
    for _ in range(10_000):
        changed = bytearray(data)
        for _ in range(r.choice((1, 2, 30))):
            changed[r.randrange(len(changed))] = r.randrange(256)
        (tmp_path / "x").write_bytes(changed)
        _, trace = outcome(tmp_path / "x")
        if trace is not None:
            trace.close()


def test_sizes_that_cannot_be(read: Opener) -> None:
    good = perf_data(info(), aux(0, 0, SOME))
    for at, value in ((24, 1 << 62), (32, 1 << 62), (40, 1 << 62), (40, 1), (16, 0), (8, 20)):
        changed = bytearray(good)
        struct.pack_into("<Q", changed, at, value)
        with pytest.raises(FormatError, match=r"perf\.data"):
            read(bytes(changed))
    huge = perf_data(info(), perf_asm.record(71, struct.pack("<QQQIIII", 1 << 62, 0, 0, 0, 0, 0, 0)) + SOME, finished=False)
    with read(huge) as trace:
        assert [e.kind for e in events(trace)] == [Kind.DELIVER, Kind.RETURN, Kind.GAP]
        assert "cut short" in trace.meta["damage"][0]
    for bad in (aux(0, 0, SOME, idx=9) + aux(0, 0, SOME, idx=8), aux(70_000, 0, SOME, idx=1) + aux(0, 0, SOME)):
        with read(perf_data(info(), bad)) as trace:
            assert "AUX data of a CPU that cannot be" in trace.meta["damage"][0]
