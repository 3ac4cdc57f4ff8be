"""Symbol maps of every kind, and what hostile ones do."""

from __future__ import annotations

import gzip
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from tracedbg.errors import FormatError
from tracedbg.symbols import MAX_REACH, Symbols

KALLSYMS = (
    b"0000000000000000 A fixed_percpu_data\n"
    b"0000000000034080 A steal_time\n"
    b"0000000000000000 D __per_cpu_start\n"
    b"ffffffff81000000 T _text\n"
    b"ffffffff81000000 T startup_64\n"
    b"ffffffff81000100 t local_one\n"
    b"ffffffff82000000 D jiffies\n"
    b"ffffffffc0201040 t scsi_done\t[scsi_mod]\n"
)


def test_kallsyms_drops_per_cpu_offsets_and_prefers_good_names() -> None:
    symbols = Symbols.parse(KALLSYMS)
    assert [name for _, _, name in symbols] == ["startup_64", "local_one", "jiffies", "scsi_done [scsi_mod]"]
    assert symbols.lookup(0x34080) is None


@pytest.mark.parametrize(
    ("address", "name"),
    [
        (0xFFFFFFFF81000000, "startup_64"),
        (0xFFFFFFFF81000009, "startup_64+9"),
        (0xFFFFFFFF8100000A, "startup_64+0xa"),
        (0xFFFFFFFF810000FF, "startup_64+0xff"),
        (0xFFFFFFFF81000100, "local_one"),
        (0xFFFFFFFFC0201042, "scsi_done+2 [scsi_mod]"),
        (0xFFFFFFFF80FFFFFF, None),
        (0, None),
        ((1 << 64) - 1, None),
    ],
)
def test_names_in_the_house_style(address: int, name: str | None) -> None:
    assert Symbols.parse(KALLSYMS).name(address) == name


def test_no_symbol_reaches_further_than_the_limit() -> None:
    symbols = Symbols.parse(KALLSYMS)
    last = 0xFFFFFFFFC0201040
    assert symbols.lookup(last + MAX_REACH - 1) == ("scsi_done [scsi_mod]", MAX_REACH - 1)
    assert symbols.lookup(last + MAX_REACH) is None
    assert symbols.lookup(0xFFFFFFFF81000100 + MAX_REACH) is None  # nor into the hole before the next


def test_nm_with_sizes_undefined_names_and_headers() -> None:
    text = (
        b"crash.o:\n\n0000000000001000 0000000000000010 T first\n0000000000001040 0000000000000010 t second\n"
        b"                 U printk\n                 w __weak_thing\n0000000000001100 W operator new(unsigned long)\n"
    )
    symbols = Symbols.parse(text)
    assert symbols.name(0x100F) == "first+0xf"
    assert symbols.name(0x1010) is None  # between two sized symbols
    assert symbols.name(0x1100) == "operator new(unsigned long)"


def test_xen_maps_lose_the_file_prefix() -> None:
    text = b"0xffff82d0402f9b40 t arch/x86/domain.c#default_idle\n0xffff82d04032a240 T do_nmi\n"
    symbols = Symbols.parse(text)
    assert symbols.name(0xFFFF82D0402F9C06) == "default_idle+0xc6"
    assert symbols.name(0xFFFF82D04032A242) == "do_nmi+2"


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress], ids=["plain", "gzip", "zstd"])
def test_files_may_be_packed(tmp_path: Path, pack) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "System.map"
    path.write_bytes(pack(KALLSYMS))
    assert len(Symbols.load(str(path))) == 4


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress], ids=["plain", "gzip", "zstd"])
def test_files_may_come_from_a_pipe(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)

    def feed() -> None:
        data = pack(KALLSYMS)
        with open(path, "wb", buffering=0) as file:
            file.write(data[:1])  # the first read gives less than the magic
            time.sleep(0.1)
            file.write(data[1:])

    feeder = threading.Thread(target=feed)
    feeder.start()
    assert len(Symbols.load(str(path))) == 4
    feeder.join()


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress], ids=["gzip", "zstd"])
def test_packed_files_may_have_several_parts_but_not_end_inside_of_one(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "map"
    first, second = pack(KALLSYMS[:200]), pack(KALLSYMS[200:])
    path.write_bytes(first + second)
    assert len(Symbols.load(str(path))) == 4
    for cut in (5, len(first) - 1, len(first) + 5, len(first + second) - 1):
        path.write_bytes((first + second)[:cut])
        with pytest.raises(FormatError, match="damaged packing"):
            Symbols.load(str(path))


def test_a_packed_file_that_expands_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracedbg.symbols.MAX_FILE", 1 << 20)
    for pack in (bytes, gzip.compress, zstandard.compress):
        path = tmp_path / "map"
        path.write_bytes(pack(b"\n" * (3 << 20)))
        with pytest.raises(FormatError, match="larger than 1 MiB"):
            Symbols.load(str(path))


def test_blank_lines_without_end_are_no_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracedbg.symbols.MAX_LINES", 100)
    with pytest.raises(FormatError, match="more than 100 lines"):
        Symbols.parse(b"\n" * 101)


def test_section_round_trip_and_subset() -> None:
    symbols = Symbols.parse(KALLSYMS)
    assert list(Symbols.from_bytes(symbols.to_bytes())) == list(symbols)
    few = symbols.subset([0xFFFFFFFF81000105, 0xFFFFFFFF81000101, 0x10, 0xFFFFFFFFC0201041])
    assert few.to_bytes() == (
        b"ffffffff81000100 ffffffff81100100 local_one\nffffffffc0201040 ffffffffc0301040 scsi_done [scsi_mod]\n"
    )
    assert len(Symbols.from_bytes(b"")) == 0


@pytest.mark.parametrize(
    ("data", "offset", "said"),
    [
        (b"", None, "no symbols"),
        (b"\n\n", None, "no symbols"),
        (b"\x7fELF\x02\x01", 0, "damaged ELF"),
        (b"ffffffff81000000 T ok\nnonsense here\n", 22, "not a line"),
        (b"\0" * 100, 0, "not a line"),
        (b"ffffffff81000000 T " + b"x" * 5000, 0, "not a line"),
        (b"11111111111111111 T too_long\n", 0, "not a line"),
        (b"0000000000000000 T a\n0000000000000000 T b\n", None, "kptr_restrict"),
    ],
)
def test_hostile_maps_are_one_error(data: bytes, offset: int | None, said: str) -> None:
    with pytest.raises(FormatError, match=said) as caught:
        Symbols.parse(data, "x.map")
    assert caught.value.offset == offset
    assert caught.value.path == "x.map"


@pytest.mark.parametrize("data", [gzip.compress(KALLSYMS)[:-12], zstandard.compress(KALLSYMS)[:4] + b"\xff" * 30])
def test_damaged_packing_is_one_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "m.gz"
    path.write_bytes(data)
    with pytest.raises(FormatError):
        Symbols.load(str(path))


@pytest.mark.parametrize(
    "data",
    [b"x", b"10 20", b"20 10 a\n", b"10 20 a\n18 28 b\n", b"10 1ffffffffffffffff a\n", b"-1 20 a\n", b"\xff\xfe\n"],
)
def test_hostile_sections_are_one_error(data: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        Symbols.from_bytes(data, "x.tdbg", 64)
    assert caught.value.offset is not None


def test_names_cannot_act_on_a_terminal() -> None:
    symbols = Symbols.parse(b"ffffffff81000000 T evil\x1b[31m\xc2\x9bname\n")
    assert symbols.name(0xFFFFFFFF81000000) == "evil?[31m?name"
    section = Symbols.from_bytes(b"1000 2000 a\x1b]0;x\x07b\n")
    assert section.name(0x1000) == "a?]0;x?b"
    long = Symbols.parse(b"ffffffff81000000 T " + b"n" * 1000 + b"\n").name(0xFFFFFFFF81000000)
    assert long is not None and len(long) == 160


def test_maps_of_the_real_systems(shared: Path) -> None:
    xen = Symbols.load(str(shared / "symbols" / "xen-syms-4.17-amd64.map.gz"))
    live = Symbols.load(str(shared / "symbols" / "proc-xen-xensyms.txt.gz"))
    linux = Symbols.load(str(shared / "symbols" / "kallsyms-linux-6.1.0-56-amd64-nokaslr.txt.gz"))
    for symbols in (xen, live):
        assert symbols.name(0xFFFF82D04032A242) == "do_nmi+2"
        assert symbols.name(0xFFFF82D0402F9C06) == "default_idle+0xc6"
    assert len(linux) > 90_000
    assert linux.name(0xFFFFFFFF81000000) == "startup_64"
    assert linux.name(0xFFFFFFFFC0201041) == "scsilun_to_int+1 [scsi_common]"
