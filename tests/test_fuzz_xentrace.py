"""The xentrace decoder under AddressSanitizer and UndefinedBehaviorSanitizer with damaged files; needs only gcc."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from test_xentrace_model import stream

from tracedbg._decode import ffi
from tracedbg.formats.xentrace.decode import declaration


def test_damaged_files_under_sanitizers(root: Path, tmp_path: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    binary, form = tmp_path / "fuzz_xentrace", tmp_path / "format"
    sources = [root / "tests/fuzz_xentrace.c", root / "csrc/decode/merge.c", *sorted((root / "csrc/decode").glob("xentrace*.c"))]
    command = [
        compiler, "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all", f"-I{root}/csrc", f"-I{root}/csrc/decode", "-o", binary, *sources,
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=120)
    form.write_bytes(bytes(ffi.buffer(declaration()[0])))
    files = [tmp_path / f"{number}.bin" for number in range(10)]
    for number, path in enumerate(files):
        path.write_bytes(stream(random.Random(number)))
    done = subprocess.run(
        [binary, form, "1", os.environ.get("TRACEDBG_FUZZ", "1000"), *files], capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-4000:]
