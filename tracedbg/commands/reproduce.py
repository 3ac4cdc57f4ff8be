"""The words of a command line that open the same recording again."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def input_words(args: argparse.Namespace, paths: Sequence[str]) -> tuple[str, ...]:
    """The files of one recording with the input options that were given."""
    words: list[str] = []
    for option, values in (("--monitor", args.monitor), ("--layout", args.layout)):
        for value in values:
            words += (option, _file(value))
    if args.symbols is not None:
        words += ("--symbols", _file(args.symbols))
    if args.from_format is not None:
        words += ("--from", args.from_format)
    for lo, hi in args.stores:
        words += ("--stores", f"{lo:x}-{hi:x}")
    if args.threads:
        words.append("--threads")
    return (*words, *(_file(path) for path in paths))


def _file(path: str) -> str:
    """A file name that is not taken for an option."""
    return f"./{path}" if path.startswith("-") and path != "-" else path
