"""Symbols of ELF images, made here with the compiler and held against what its own `nm` says."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from tracedbg.errors import FormatError
from tracedbg.symbols import Symbols

SOURCE = """
.text
.globl do_nmi
.type do_nmi, @function
do_nmi: nop; nop; nop; ret
.size do_nmi, . - do_nmi
.globl asm_label
asm_label: nop; ret
.type local_one, @function
local_one: ret
.size local_one, 1
.set absolute_one, 0x1234
.globl absolute_one
.data
.globl some_data
.type some_data, @object
some_data: .quad 7
.size some_data, 8
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    gcc, ld = shutil.which("gcc"), shutil.which("ld")
    if gcc is None or ld is None:
        pytest.skip("no compiler")
    folder = tmp_path_factory.mktemp("elf")
    (folder / "a.s").write_text(SOURCE)
    subprocess.run([gcc, "-c", "-o", folder / "a.o", folder / "a.s"], check=True)
    where = ["-Ttext=0xffffffff81000000", "-Tdata=0xffffffff81200000", "-e", "do_nmi"]
    subprocess.run([ld, *where, "-o", folder / "vmlinux", folder / "a.o"], check=True)
    return folder / "vmlinux"


def test_symbols_of_an_image(image: Path) -> None:
    symbols = Symbols.load(str(image))
    base = 0xFFFFFFFF81000000
    assert symbols.name(base) == "do_nmi" and symbols.name(base + 2) == "do_nmi+2"
    assert symbols.name(base + 4) == "asm_label" and symbols.name(base + 6) == "local_one"
    assert symbols.name(base + 7) is None  # past the sized last one
    assert symbols.name(0xFFFFFFFF81200004) == "some_data+4"
    assert symbols.name(0x1234) is None


def test_the_image_says_what_nm_says(image: Path, tmp_path: Path) -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    listed = subprocess.run([nm, "-n", image], check=True, capture_output=True).stdout
    (tmp_path / "map").write_bytes(listed)
    of_map, of_image = Symbols.load(str(tmp_path / "map")), Symbols.load(str(image))
    assert {(start, name) for start, _, name in of_image} == {(start, name) for start, _, name in of_map}


def refused(data: bytes, path: Path) -> str:
    path.write_bytes(data)
    with pytest.raises(FormatError) as caught:
        Symbols.load(str(path))
    return str(caught.value)


def test_what_is_no_image(image: Path, tmp_path: Path) -> None:
    data = bytearray(image.read_bytes())
    assert "relocatable" in refused((image.parent / "a.o").read_bytes(), tmp_path / "x")
    data[18] = 183  # AArch64
    assert "not an ELF file for x86-64" in refused(bytes(data), tmp_path / "x")
    subprocess.run(["strip", "-o", tmp_path / "stripped", image], check=True)
    assert "stripped" in refused((tmp_path / "stripped").read_bytes(), tmp_path / "x")


def test_damaged_images_are_read_or_refused(image: Path, tmp_path: Path) -> None:
    pick, data = random.Random(3), image.read_bytes()
    path = tmp_path / "x"
    cuts = [data[:n] for n in range(4, len(data), max(1, len(data) // 200))]
    for n in range(300):
        copy = bytearray(data)
        for _ in range(pick.randrange(1, 12)):
            copy[pick.randrange(4, len(copy)) if n % 2 else pick.randrange(4, 64)] = pick.randrange(256)
        cuts.append(bytes(copy))
    for cut in cuts:
        path.write_bytes(cut)
        try:
            Symbols.load(str(path))
        except FormatError as error:
            assert "\n" not in str(error)
