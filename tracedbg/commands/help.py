"""`tracedbg help`: the pages of the manual, offline."""

from __future__ import annotations

import argparse
import difflib
import sys
from importlib import resources
from typing import TYPE_CHECKING

from tracedbg.errors import UsageError
from tracedbg.text import clean

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

NAME = "help"
HELP = "read a page of the manual"
EPILOG = """\
examples:
  tracedbg help                          list the pages
  tracedbg help layout
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("topic", nargs="?", metavar="TOPIC", help="name of a page")


def pages() -> dict[str, Traversable]:
    """Topic -> file, sorted."""
    folder = resources.files("tracedbg") / "help"
    found = {entry.name.removesuffix(".md"): entry for entry in folder.iterdir() if entry.name.endswith(".md")}
    return dict(sorted(found.items()))


def run(args: argparse.Namespace) -> int:
    """Print a page, or the list."""
    topics = pages()
    if args.topic is None:
        width = max(map(len, topics), default=0)
        for name, page in topics.items():
            title = page.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
            sys.stdout.write(f"{name:<{width}}  {title}\n")
        return 0
    wanted = topics.get(args.topic)
    if wanted is None:
        close = difflib.get_close_matches(args.topic, topics, 1)
        hint = f"; did you mean {close[0]}?" if close else "; `tracedbg help` lists them"
        raise UsageError(f"no page {clean(args.topic)!r}{hint}")
    sys.stdout.write(wanted.read_text(encoding="utf-8"))
    return 0
