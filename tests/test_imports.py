"""Who may import whom: the way of the data has one direction."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

# From left to right. A module imports what stands left of it, and within its own package.
ORDER = (
    {"errors", "text", "__init__"},
    {"x86", "wire", "state"},
    {"layout", "filter"},
    {"output", "elf"},
    {"trace", "symbols"},
    {"writer", "growing"},
    {"formats", "record"},
    {"replay", "catalogue"},
    {"rules"},
    {"describe"},
    {"baseline"},
    {"report", "export"},
    {"tui"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, inside of functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found.add(module)
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return found


def part(name: str) -> str:
    """`tracedbg.formats.source` -> formats."""
    return name.split(".")[1] if "." in name else "__init__"


def sources(root: Path) -> list[tuple[str, Path]]:
    package = root / "tracedbg"
    return [(path.relative_to(package).with_suffix("").parts[0], path) for path in sorted(package.rglob("*.py"))]


def test_every_module_has_a_place_in_the_order(root: Path) -> None:
    assert {own for own, _ in sources(root)} <= set(RANK)


def test_nobody_imports_to_the_right(root: Path) -> None:
    for own, path in sources(root):
        if own == "__main__":
            continue
        for name in imports(path):
            if not name.startswith("tracedbg.") or part(name) not in RANK:
                continue
            other = part(name)
            assert other == own or RANK[other] < RANK[own], f"{path.name} imports {name}"


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("construct", {"wire"}),
        ("tracedbg._core", {"replay"}),
        ("tracedbg._decode", {"formats"}),
        ("textual", {"tui"}),
        ("rich", {"tui"}),
        ("jsonschema", set()),
        ("pyarrow", {"export"}),
        ("sqlite3", {"export"}),
    ],
)
def test_heavy_modules_have_few_importers(root: Path, module: str, allowed: set[str]) -> None:
    for own, path in sources(root):
        if any(name == module or name.startswith(f"{module}.") for name in imports(path)):
            assert own in allowed, f"{path} imports {module}"


def loaded(root: Path, *words: str) -> set[str]:
    """Top-level modules that one run of the command line loads."""
    script = (
        "import sys\nfrom tracedbg.cli import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n"
        "    print('\\n'.join(sorted({m.split('.')[0] for m in sys.modules})), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return set(done.stderr.split())


@pytest.mark.parametrize("words", [("--help",), ("--version",), ("replay", "--help"), ("help",), ("explain", "fake-nmi")])
def test_help_loads_neither_the_viewer_nor_the_parser(root: Path, words: tuple[str, ...]) -> None:
    assert not loaded(root, *words) & {"textual", "rich", "construct", "cffi", "zstandard", "_cffi_backend"}


def test_replay_and_convert_do_not_load_the_viewer(root: Path, tmp_path: Path) -> None:
    from samples import write_race

    path = tmp_path / "race.tdbg"
    write_race(path)
    for words in (("replay", str(path)), ("convert", str(path), str(tmp_path / "other.tdbg")), ("info", str(path))):
        names = loaded(root, *words)
        assert "construct" in names
        assert not names & {"textual", "rich"}
