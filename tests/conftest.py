"""Fixtures of all tests: where things are, running the command line, golden files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the long tests")
    parser.addoption("--bochs", metavar="DIR", help="take the scenarios below DIR for tests/test_bochs.py, and no others")
    parser.addoption("--update-golden", action="store_true", help="write the golden files instead of comparing with them")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="long run: --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


def shared_folder() -> Path:
    """Where the real recordings would be."""
    return Path(os.environ.get("TRACEDBG_DATA") or ROOT.parent / "shared" / "data")


@pytest.fixture(scope="session")
def root() -> Path:
    """The top of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The real recordings: $TRACEDBG_DATA, or beside the repository; the test is skipped without them."""
    folder = shared_folder()
    if not folder.is_dir():
        pytest.skip("no recordings beside the repository")
    return folder


CompletedText = subprocess.CompletedProcess[str]


@pytest.fixture
def run_cli(tmp_path: Path) -> Callable[..., CompletedText]:
    """`run_cli("replay", "x.tdbg", code=1)`: the command line as a process, in a folder of its own."""

    def run(*words: object, code: int | None = None, stdin: bytes = b"", binary: bool = False, **env: str) -> Any:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", **env}
        done = subprocess.run(
            [sys.executable, "-m", "tracedbg", *map(str, words)], input=stdin, capture_output=True, cwd=tmp_path,
            env=environment, timeout=120, check=False,
        )  # fmt: skip
        if code is not None:
            assert done.returncode == code, f"exit {done.returncode}\n{done.stdout!r}\n{done.stderr.decode('utf-8', 'replace')}"
        if binary:
            return done
        return subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8")
        )

    return run


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with a file of tests/golden; --update-golden writes it."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode("utf-8"))
        assert text == path.read_bytes().decode("utf-8"), f"differs from tests/golden/{name}"

    return compare
