"""Directories as outputs: what --force may throw away, and what is left when something goes wrong."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from samples import write_race

from tracedbg.commands import common
from tracedbg.errors import FormatError, UsageError
from tracedbg.formats.registry import output_format

CTF = output_format("x.ctf")

Run = Callable[..., subprocess.CompletedProcess[str]]



def foreign(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("other", ["notes.txt", "cpu_0.bak", "cpu_1", "index/x", "cpu_2/x", "race.tdbg"])
def test_only_a_trace_is_overwritten(other: str, tmp_path: Path, run_cli: Run) -> None:
    """--force throws away what a trace is made of, and nothing else that lies there."""
    write_race(tmp_path / "race.tdbg")
    out = tmp_path / "out.ctf"
    run_cli("convert", "race.tdbg", "out.ctf", code=0)
    (out / other).parent.mkdir(exist_ok=True)
    (out / other).write_bytes((tmp_path / "race.tdbg").read_bytes())
    before = foreign(out)
    refused = run_cli("convert", "race.tdbg", "--force", "out.ctf", code=2)
    assert "holds other things than a trace" in refused.stderr and refused.stderr.count("\n") == 1
    assert foreign(out) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.ctf", "race.tdbg"]


def test_a_folder_with_a_file_called_metadata(tmp_path: Path, run_cli: Run) -> None:
    write_race(tmp_path / "race.tdbg")
    out = tmp_path / "mine"
    out.mkdir()
    (out / "metadata").write_text("title: holidays\n")
    for words in (("--force",), ()):
        refused = run_cli("convert", "race.tdbg", "--to", "ctf", *words, "mine", code=2)
        assert "holds other things than a trace: not overwritten" in refused.stderr  # --force would not help, and is not named
    assert (out / "metadata").read_text() == "title: holidays\n"
    (out / "metadata").unlink()
    (tmp_path / "far").mkdir()
    (out / "metadata").symlink_to(tmp_path / "race.tdbg")
    run_cli("convert", "race.tdbg", "--to", "ctf", "--force", "mine", code=2)


def test_what_comes_while_the_trace_is_written_stays(tmp_path: Path) -> None:
    out = tmp_path / "out.ctf"
    with pytest.raises(UsageError, match="holds other things"), common.new_directory(str(out), True, CTF) as path:
        Path(path, "metadata").write_text("/* CTF 1.8 */\n")
        out.mkdir()
        (out / "thesis").write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["out.ctf"] and (out / "thesis").read_text() == "x"


def test_a_trace_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of the two renames fails, or a signal comes before it."""
    out = tmp_path / "out.ctf"
    out.mkdir()
    (out / "metadata").write_text("/* CTF 1.8 */\nold\n")
    rename = os.replace
    for error in (OSError(errno.EIO, "I/O error"), KeyboardInterrupt()):

        def fails(source: str, target: str, error: BaseException = error) -> None:
            if target == str(out) and Path(source, "metadata").read_text() == "new":
                raise error
            rename(source, target)

        monkeypatch.setattr(os, "replace", fails)
        kind = FormatError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(kind), common.new_directory(str(out), True, CTF) as path:
            Path(path, "metadata").write_text("new")
        assert [p.name for p in tmp_path.iterdir()] == ["out.ctf"]
        assert (out / "metadata").read_text() == "/* CTF 1.8 */\nold\n"
