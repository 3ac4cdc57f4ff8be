"""The decoder of xentrace in C against the model in plain Python, on the samples and on random files."""

from __future__ import annotations

import gzip
import mmap
import random
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from xentrace_model import Model

from tracedbg import wire
from tracedbg._decode import ffi, lib
from tracedbg.formats.xentrace import decode as xentrace_decode
from tracedbg.formats.xentrace.decode import COUNTS, DAMAGE, Decoder, declaration
from tracedbg.formats.xentrace.events import REASONS, RECORDS, WAITING, Vendor

DATA = Path(__file__).parent / "data" / "xentrace"
IDS = sorted(record.event for record in RECORDS)
BORING = (0x82012, 0x8201A, 0x2220C, 0x20100D, 0x1F003, 0x0, 0xFFFFFFF, 0x81802)
VENDORS = (None, Vendor.VMX, Vendor.SVM)


def words(r: random.Random, count: int, tsc: int) -> list[int]:
    small = (0, 1, 2, 3, 4, 14, 18, 0x10, 0x30, 0x31, 0x60, 0x61, 0x7B, 0xFF, 0x100, 0x400, 0x800D, 0x108003, 0xFFFFFFFF)
    bound = 0x310000 | r.choice((0x10, 0x11))
    return [r.choice((*small, bound, tsc - r.randrange(200) & 0xFFFFFFFF, r.getrandbits(32))) for _ in range(count)]


def record(r: random.Random, tsc: int) -> bytes:
    """What a hypervisor may write, and sometimes what none does."""
    event = r.choice((0x81001, 0x81102, 0x81102, 0x8200F, 0x82010, 0x802008, 0x802003, *IDS, *IDS, r.choice(BORING)))
    with_tsc = r.random() < (0.1 if event & 0xFF000 == 0x82000 else 0.95)
    count = r.choice((0, 1, 2, 3, 4, 5, 6, 7, 7, 5, 3, 3))
    if event == 0x1F001:
        payload = [r.randrange(99), 0, tsc - r.randrange(99) & 0xFFFFFFFF, tsc >> 32]
    elif event & 0xFF000 == 0x81000 and r.random() < 0.9:
        payload = [r.choice((0, 1, 0x10, 0x30, 0x60, 0x61, 0x61, 0x7B, 0x400, 0x404)), r.getrandbits(32), 0xFFFF8000]
        payload = payload[: 0 if event & 0xFF == 1 else 3 if event & 0x100 else 2]
    else:
        payload = words(r, count, tsc)
    stamp = struct.pack("<Q", tsc) if with_tsc else b""
    return struct.pack("<I", event | len(payload) << 28 | with_tsc << 31) + stamp + struct.pack(f"<{len(payload)}I", *payload)


def stream(r: random.Random) -> bytes:
    """A file of some windows: several CPUs, polled in turn or in any order, TSCs that mostly rise, some damage."""
    cpus = r.choice(((0,), (0,), (0, 1), (0, 1), (0, 1, 2, 3), (5, 7, 4095), tuple(range(12))))
    clock = dict.fromkeys(cpus, r.choice((0, 1000, 1 << 40, (1 << 64) - 500)))
    step = r.choice((1, 5, 300))
    turns = [*cpus] * r.randrange(1, 8)
    if r.random() < 0.2:
        r.shuffle(turns)
    out = bytearray()
    for cpu in turns:
        body = b""
        for _ in range(r.choice((0, 1, 3, 10, 30))):
            clock[cpu] = (clock[cpu] + r.randrange(step)) & (1 << 64) - 1
            jump = r.choice((0, 0, 0, 0, 0, 0, 0, 1)) and r.randrange(-500, 500)
            body += record(r, (clock[cpu] + jump) & (1 << 64) - 1)
        out += struct.pack("<III", 0x2001F003, cpu, len(body)) + body
    match r.randrange(8):
        case 0:
            del out[r.randrange(len(out)) :]
        case 1 | 2:
            for _ in range(r.randrange(1, 4)):
                at = r.randrange(len(out))
                out[at] = r.choice((0, 0xFF, out[at] ^ 1 << r.randrange(8)))
        case 3:
            at = r.randrange(len(out))
            del out[at : at + 4 * r.randrange(1, 9)]
    return bytes(out)


def decoded(data: bytes, vendor: Vendor | None, pieces: list[int]) -> tuple[Decoder, bytes]:
    decoder, out, at = Decoder(vendor), [], 0
    for size in pieces:
        out += [bytes(part) for part in decoder.feed(data[at : at + size])]
        at += size
    out += [bytes(part) for part in decoder.feed(data[at:], last=True)]
    assert decoder.told.ended
    return decoder, b"".join(out)


def compare(data: bytes, number: int | None = None, held: int = 1 << 20, pieces: list[int] | None = None) -> Model:
    vendor = None if number is None else (Vendor.VMX, Vendor.SVM)[number]
    model = Model(data, number, held)
    decoder, out = decoded(data, vendor, pieces or [])
    for place, event in enumerate(model.out):
        mine = out[place * 64 : place * 64 + 64]
        assert mine == event, (place, wire.EVENT_PACK.unpack(mine or bytes(64)), wire.EVENT_PACK.unpack(event))
    told = decoder.told
    assert len(out) == len(model.out) * 64
    assert {name: getattr(told, name) for name in (*COUNTS, "records", "windows")} == {
        name: model.counts[name] for name in (*COUNTS, "records", "windows")
    }
    assert told.damages == len(model.damage)
    found = [(place.at, DAMAGE[place.what]) for place in told.damage[0 : min(told.damages, 20)]]
    assert found == model.damage[:20]
    assert told.cpus == max(model.cpus, default=-1) + 1
    assert (told.ended == 1) == model.whole
    assert decoder.texts() == "".join(model.texts).encode()
    assert decoder.vendor == (None if model.vendor is None else (Vendor.VMX, Vendor.SVM)[model.vendor])
    return model


@pytest.mark.parametrize("name", ["hvm", "pv", "smp"])
def test_samples(name: str) -> None:
    data = gzip.decompress((DATA / f"{name}.bin.gz").read_bytes())
    for vendor in (None, 0, 1):
        assert len(compare(data, vendor).out) > 20


@pytest.mark.parametrize("name", ["xt-hvm-svm", "xt-pv-smp1"])
def test_whole_recordings(shared: Path, name: str) -> None:
    compare((shared / "xentrace" / f"{name}.bin").read_bytes())


def mutated(r: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(r.choice((1, 1, 2, 8))):
        at = r.randrange(len(out))
        out[at] = r.choice((0, 0xFF, r.randrange(256), out[at] ^ 1 << r.randrange(8)))
    if r.random() < 0.2:
        at = r.randrange(len(out))
        del out[at : at + r.randrange(1, 9)]
    return bytes(out)


def excerpt(name: str, r: random.Random) -> bytes:
    """A few records from anywhere in a sample, in windows of two CPUs."""
    data, windows, at = gzip.decompress((DATA / f"{name}.bin.gz").read_bytes()), [], 0
    while at < len(data):
        size = struct.unpack_from("<I", data, at + 8)[0]
        windows.append(data[at + 12 : at + 12 + size])
        at += 12 + size
    out = b""
    for cpu in (0, 1, 0, 1):
        body, first, at = r.choice(windows), r.randrange(200), 0
        ends = [0]
        while at < len(body) and len(ends) < first + 12:
            header = struct.unpack_from("<I", body, at)[0]
            at += 4 + (header >> 28 & 7) * 4 + (header >> 31) * 8
            ends.append(at)
        body = body[ends[max(len(ends) - 12, 0)] : ends[-1]]
        out += struct.pack("<III", 0x2001F003, cpu, len(body)) + body
    return out


@pytest.mark.parametrize("name", ["hvm", "pv", "smp"])
def test_mutated_samples(name: str) -> None:
    seen: Counter[str] = Counter()
    r = random.Random(3)
    excerpts = [excerpt(name, r) for _ in range(50)]
    for number in range(8000):
        model = compare(mutated(r, excerpts[number % 50]))
        seen.update(what for _, what in model.damage)
        seen["whole"] += not model.damage
    assert {*seen} == {*DAMAGE.values(), "whole"}


@pytest.mark.parametrize("name", ["hvm", "pv", "smp"])
def test_mutated_whole_samples(name: str) -> None:
    data = gzip.decompress((DATA / f"{name}.bin.gz").read_bytes())
    r = random.Random(4)
    for _ in range(20):
        compare(mutated(r, data))


def streams(first: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[str] = Counter()
    for seed in range(first, first + count):
        r = random.Random(seed)
        data = stream(r)
        held = r.choice((1 << 20, 1 << 20, 8, 20, 100))
        monkeypatch.setattr(xentrace_decode, "MAX_HELD", held * 64)
        pieces = r.choice(([], [1] * 50, [r.randrange(100) for _ in range(40)], [len(data) // 2]))
        try:
            model = compare(data, r.choice((None, None, 0, 1)), held, pieces)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error
        seen.update(what for _, what in model.damage)
        seen.update(name for name, n in model.counts.items() if n)
        seen.update(f"kind {event[60]}" for event in model.out)
        seen["corrected"] += any(event[60] == 26 and event[62] == 3 for event in model.out)
    # All that can happen has happened: each kind of event and of damage, each counter.
    assert {*DAMAGE.values(), *COUNTS, *(f"kind {n}" for n in (1, 15, 16, 26, 27, 31, 32)), "corrected"} <= {*+seen}


def test_random_files(monkeypatch: pytest.MonkeyPatch) -> None:
    streams(0, 2000, monkeypatch)


@pytest.mark.slow
def test_many_random_files(monkeypatch: pytest.MonkeyPatch) -> None:
    streams(2000, 60_000, monkeypatch)


# -- what C refuses -------------------------------------------------------------------------------------------------------


def exit_record(form: Any) -> Any:
    return next(record for record in form.record if record.event == 0x81102)


@pytest.mark.parametrize(
    ("name", "value"),
    [("make", lib.XT_MAKES), ("words", 8), ("words", 2), ("event", 1 << 28), ("vendor", 3)],
)
def test_a_wrong_record_is_refused(name: str, value: int) -> None:
    assert opened(lambda form: setattr(exit_record(form), name, value)) == lib.DEC_E_ARG


@pytest.mark.parametrize("part", [(0, 1, 32), (0, 0, 33), (6, 0, 64), (3, 0, 32), (2, 8, 64)])
def test_a_field_outside_of_its_record_is_refused(part: tuple[int, int, int]) -> None:
    def change(form: Any) -> None:
        field = exit_record(form).value
        field.word, field.shift, field.bits = part

    assert opened(change) == lib.DEC_E_ARG


@pytest.mark.parametrize(("name", "value"), [("records", 65), ("texts", 513), ("texts", 3), ("vendor", 3)])
def test_a_wrong_declaration_is_refused(name: str, value: int) -> None:
    assert opened(lambda form: setattr(form, name, value)) == lib.DEC_E_ARG


def test_wrong_arguments_are_refused() -> None:
    assert opened(lambda form: None) == lib.DEC_OK
    assert opened(lambda form: form.reason.__setitem__(7, 3)) == lib.DEC_E_ARG
    assert opened(lambda form: None, offset=8) == lib.DEC_E_ARG
    assert lib.xt_size(7) == lib.xt_size((1 << 30) + 1) == lib.DEC_E_ARG and lib.xt_size(8) > 0
    assert lib.xt_read(ffi.NULL, b"", 0, 1, ffi.new("struct tdb_event **"), ffi.new("uint64_t *")) == lib.DEC_E_ARG


def opened(change: Callable[[Any], object], offset: int = 0) -> int:
    form = ffi.new("struct xt_format *", declaration()[0][0])
    change(form)
    area = ffi.from_buffer(mmap.mmap(-1, lib.xt_size(8) + 64))
    return int(lib.xt_open(area + offset, 8, form))


def test_cpus_and_words_are_the_same_on_both_sides() -> None:
    assert lib.XT_CPUS == wire.MAX_CPUS and len(RECORDS) <= lib.XT_RECORDS
    assert max(REASONS) < lib.XT_REASONS and max(WAITING) < 8
    assert len({record.event for record in RECORDS}) == len(RECORDS)


def test_a_cut_where_no_room_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xentrace_decode, "MAX_HELD", 8 * 64)
    entry = struct.pack("<IQ", 0x80081001, 5)
    data = struct.pack("<III", 0x2001F003, 0, 12) + entry + struct.pack("<III", 0x2001F003, 1, 72) + entry * 5
    model = compare(data + struct.pack("<III", 0x2001F003, 2, 12) + entry, held=8)
    assert [event[60] for event in model.out] == [27] * 6 + [31, 27] and model.counts["unordered"] == 1
