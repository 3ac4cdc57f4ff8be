"""The decoder of Intel PT under AddressSanitizer and UndefinedBehaviorSanitizer with hostile bytes, in pieces of any size."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_random_streams_under_sanitizers(tmp_path: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    binary = tmp_path / "fuzz_pt"
    command = [
        compiler, "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Wshadow", "-Wstrict-prototypes", "-Werror",
        "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{ROOT}/csrc", f"-I{ROOT}/csrc/decode", "-o", str(binary),
        str(ROOT / "tests/fuzz_pt.c"),
        *(str(ROOT / "csrc/decode" / f"{name}.c") for name in ("pt", "pt_bind", "pt_event", "pt_packet")),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    for seed in ("1", "2"):
        done = subprocess.run(
            [binary, seed, os.environ.get("TRACEDBG_FUZZ", "4000")], capture_output=True, text=True, timeout=1200, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]
