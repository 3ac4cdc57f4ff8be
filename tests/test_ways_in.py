"""Inputs that are not what the command line says they are, whatever the format."""

from __future__ import annotations

import gzip
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard
from pt_asm import cfe, psbp, tsc
from samples import write_race

from tracedbg.commands import common
from tracedbg.errors import FormatError, UsageError
from tracedbg.formats import ReaderOptions, open_input, open_inputs, registry
from tracedbg.formats.source import Input

Run = Callable[..., subprocess.CompletedProcess[str]]

# Formats that begin with a magic number, and what is said of a file without.
MAGIC = {
    "tracedbg": "not a tracedbg trace",
    "perf-data": "not a perf.data",
    "trace-dat": "not a trace.dat",
    "vmcore": "not an ELF file",
}


class Endless(Input):
    """An input that fails the test if much of it is read."""

    def chunks(self) -> Iterator[bytes]:
        for number, piece in enumerate(super().chunks()):
            assert number < 4, "read on although it is none"
            yield piece


@pytest.mark.parametrize("name", MAGIC)
def test_a_wrong_magic_is_told_before_all_is_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "zeros"
    with path.open("wb") as file:
        file.truncate(64 << 20)
    monkeypatch.setattr("tracedbg.formats.Input", Endless)
    with pytest.raises(FormatError, match=MAGIC[name]) as raised:
        open_input(str(path), from_format=name)
    assert raised.value.offset == 0
    path.write_bytes(b"some text\n" * 1000)
    with pytest.raises(FormatError, match=MAGIC[name]):
        open_input(str(path), from_format=name)


def test_a_xen_trace_that_is_none() -> None:
    with pytest.raises(FormatError) as raised:
        open_input("/dev/zero", from_format="xentrace")
    assert str(raised.value) == "/dev/zero: offset 0x0: not a trace of xentrace: no window begins here"


def test_one_file_is_not_two_threads(tmp_path: Path) -> None:
    log = tmp_path / "qemu.log"
    log.write_text("     0: v=02 e=0000 i=0 cpl=0 IP=0008:00001000 pc=00001000 SP=0010:00008000 env->regs[R_EAX]=0\n")
    (tmp_path / "link").symlink_to(log)
    for other in (log, tmp_path / "link", Path(f"{tmp_path}/./qemu.log")):
        with pytest.raises(UsageError, match="is the same file as"):
            open_inputs([str(log), str(other)])
    (tmp_path / "aux.bin").write_bytes(psbp() + tsc(1000) + cfe(1, 32))
    with pytest.raises(UsageError, match="is the same file as"):
        open_inputs([str(tmp_path / "aux.bin")] * 2)


def test_packed_twice(tmp_path: Path) -> None:
    path = tmp_path / "log.gz.gz"
    for packed in (gzip.compress(gzip.compress(b"x")), zstandard.compress(gzip.compress(b"x"))):
        path.write_bytes(packed)
        with pytest.raises(FormatError, match="packed twice"):
            open_input(str(path))


def test_follow_takes_the_name_of_the_format(tmp_path: Path) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    common.input_arguments(parser)
    write_race(tmp_path / "race.tdbg")
    growing = common.Inputs(parser.parse_args(["--from", registry.NATIVE])).follow([str(tmp_path / "race.tdbg")])
    assert growing.trace.count == 4
    with pytest.raises(UsageError, match="takes one native trace"):
        common.Inputs(parser.parse_args(["--from", "case"])).follow([str(tmp_path / "race.tdbg")])


def test_options_of_others_are_refused_in_the_same_words(tmp_path: Path) -> None:
    write_race(tmp_path / "race.tdbg")
    said = {}
    for number, options in enumerate((ReaderOptions(cpu_hz=1), ReaderOptions(vendor="svm"), ReaderOptions(keep_marks=True))):
        for form in ("tracedbg", "case"):
            with pytest.raises(UsageError) as raised:
                open_input(str(tmp_path / "race.tdbg"), from_format=form, options=options)
            said[number, form] = str(raised.value).removeprefix(f"{form}: ")
        assert said[number, "tracedbg"] == said[number, "case"]


@pytest.mark.parametrize(
    ("verb", "what"), [("race.tdbg", "native trace, format 1.0"), ("race.case", "case"), ("race.jsonl", "jsonl")]
)
def test_info_does_not_call_everything_a_log(verb: str, what: str, tmp_path: Path, run_cli: Run) -> None:
    write_race(tmp_path / "race.tdbg")
    if verb != "race.tdbg":
        run_cli("convert", "race.tdbg", verb, code=0)
    assert run_cli("info", verb, code=0).stdout.splitlines()[0] == f"{verb}: {what}"


@pytest.mark.parametrize("name", ["qemu", "vmcore", "trace.dat", "native", "stdout"])
def test_no_room_for_temporary_files_is_not_the_fault_of_the_input(name: str, root: Path, tmp_path: Path) -> None:
    """The limit of a file's size stands for a full disk: both are told by write()."""
    data = root / "tests" / "data"
    packed = {
        "qemu": (data / "qemu/istlab/a/qemu.log").read_bytes() * 20,
        "vmcore": (data / "vmcore/a-after.elf.gz").read_bytes(),
        "trace.dat": gzip.compress((data / "trace-dat/local.dat").read_bytes()),
        "native": gzip.compress((root / "traces/xen-nmi-mce-nmi.tdbg").read_bytes()),
        "stdout": (root / "traces/xen-nmi-mce-nmi.tdbg").read_bytes(),
    }[name]
    (tmp_path / "input").write_bytes(packed)
    (tmp_path / "spool").mkdir()

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))

    words = ["convert", "input", "-"] if name == "stdout" else ["info", "input"]
    done = subprocess.run(
        [sys.executable, "-m", "tracedbg", *words], cwd=tmp_path, capture_output=True, preexec_fn=limit, check=False,
        env={**os.environ, "PYTHONPATH": str(root), "TMPDIR": str(tmp_path / "spool")},
    )  # fmt: skip
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.decode() == f"tracedbg: {tmp_path}/spool (temporary files): file too large\n"
    assert not list((tmp_path / "spool").iterdir())
