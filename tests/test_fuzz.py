"""The core under AddressSanitizer and UndefinedBehaviorSanitizer with hostile events; needs only gcc."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def sources() -> list[str]:
    """The C files of the replay core, as the build lists them."""
    modules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    return [str(ROOT / name) for module in modules if module["name"] == "tracedbg._core" for name in module["sources"]]


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    binary = tmp_path_factory.mktemp("fuzz") / "fuzz_replay"
    command = [
        compiler, "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all", "-Wl,--wrap=realloc", f"-I{ROOT}/csrc", "-o", str(binary), str(ROOT / "tests/fuzz_replay.c"),
        *sources(),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return binary


def run(fuzzer: Path, *arguments: str) -> None:
    done = subprocess.run([fuzzer, *arguments], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]


def test_random_events_under_sanitizers(fuzzer: Path) -> None:
    run(fuzzer, "1", os.environ.get("TRACEDBG_FUZZ", "1000"))


def test_random_bytes_as_events_under_sanitizers(fuzzer: Path, tmp_path: Path) -> None:
    pick = random.Random(5)
    files = []
    for number in range(40):
        path = tmp_path / f"{number}.events"
        path.write_bytes(pick.randbytes(pick.randrange(64 * 200)))
        files.append(str(path))
    run(fuzzer, "-f", *files)
