"""The configuration file of the viewer. What is wrong in it is told and left out; it never keeps a trace from being opened."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tracedbg.errors import UsageError
from tracedbg.output import create_beside
from tracedbg.text import clean, clean_path
from tracedbg.tui.keys import key_of

THEMES = ("dark", "light", "16")
COPY_TO = ("both", "terminal", "file")
MAX_SIZE = 1 << 20  # bytes of a configuration that is read


@dataclass(frozen=True)
class Config:
    """What the user wants; None: nothing said. `keys`: by id of an action its keys. `problems`: a line each."""

    path: Path | None = None
    theme: str | None = None
    copy: str | None = None
    noise: frozenset[int] | None = None
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def config_path() -> Path | None:
    """Where the XDG Base Directory specification wants it; None if there is no home directory."""
    given = os.environ.get("XDG_CONFIG_HOME", "")
    try:
        base = Path(given) if os.path.isabs(given) else Path.home() / ".config"  # a relative one is to be ignored
    except RuntimeError:
        return None
    return base / "tracedbg" / "config.toml"


def load(path: Path | None = None) -> Config:
    """Read the configuration; a file that is not there says nothing."""
    path = path or config_path()
    if path is None:
        return Config()
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_SIZE + 1)
    except FileNotFoundError:
        return Config(path)
    except OSError as error:
        return Config(path, problems=(f"{_name(path)}: {(error.strerror or str(error)).lower()}",))
    try:
        if len(raw) > MAX_SIZE:
            raise ValueError("larger than 1 MiB")
        return _read(path, tomllib.loads(raw.decode()))
    except (ValueError, RecursionError) as error:  # of UTF-8 and of TOML are ValueErrors
        return Config(path, problems=(f"{_name(path)}: {clean(str(error), 200)}",))


def _name(path: Path) -> str:
    return clean_path(path.name)


def _read(path: Path, table: dict[str, Any]) -> Config:
    problems: list[str] = []

    def wrong(what: str) -> None:
        problems.append(f"{_name(path)}: {what}")

    def choice(name: str, choices: tuple[str, ...]) -> str | None:
        value = table.pop(name, None)
        if value is None or str(value) in choices:
            return None if value is None else str(value)
        wrong(f"{name} is one of {', '.join(choices)}, not {clean(str(value), 30)!r}")
        return None

    theme, copy = choice("theme", THEMES), choice("copy", COPY_TO)
    noise = table.pop("noise", None)
    if noise is not None and not (isinstance(noise, list) and all(type(n) is int and 0 <= n < 256 for n in noise)):
        wrong("noise is a list of vectors, as in [0x20, 0xec]")
        noise = None
    keys: dict[str, tuple[str, ...]] = {}
    wanted = table.pop("keys", {})
    if not isinstance(wanted, dict):
        wrong("keys is a table: [keys]")
        wanted = {}
    for action, value in wanted.items():
        names = [value] if isinstance(value, str) else value
        try:
            if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
                raise UsageError("takes a key or a list of keys")
            keys[action] = tuple(key_of(n) for n in names)
        except UsageError as error:
            wrong(f"keys: {clean(action, 30)}: {error}")
    for name in table:
        wrong(f"{clean(name, 30)!r} is not known")
    return Config(path, theme, copy, None if noise is None else frozenset(noise), keys, tuple(problems))


def keep(path: Path, name: str, value: str) -> None:
    """Set one text of the file, all else in it stays. Raises OSError, and UsageError if the file is none that could be read."""
    old = ""
    with suppress(FileNotFoundError):
        old = path.read_bytes().decode("utf-8", "replace")
    table = _table(old)
    if table is None:
        raise UsageError(f"{_name(path)} has mistakes")
    line = f'{name} = "{value}"'
    head, rest = _split(old)
    head, count = re.subn(rf"(?m)^[ \t]*{name}[ \t]*=[^\n]*", line, head, count=1)
    new = head + rest if count else f"{line}\n{old}"
    if _table(new) != {**table, name: value}:
        raise UsageError(f"{_name(path)} is not understood well enough to change it")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file, temporary = create_beside(os.path.realpath(path))
    try:
        with file:
            file.write(new.encode())
        os.replace(temporary, os.path.realpath(path))
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _table(text: str) -> dict[str, Any] | None:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError):
        return None


def _split(text: str) -> tuple[str, str]:
    """What stands before the first table, and the rest."""
    match = re.search(r"(?m)^[ \t]*\[", text)
    return (text, "") if match is None else (text[: match.start()], text[match.start() :])
