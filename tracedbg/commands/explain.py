"""`tracedbg explain`: the catalogue of findings, offline."""

from __future__ import annotations

import argparse
import difflib
import sys

from tracedbg.errors import UsageError
from tracedbg.text import clean, wrap

NAME = "explain"
HELP = "explain a finding: why it matters, the manual, known fixes"
EPILOG = """\
examples:
  tracedbg explain                       list the findings
  tracedbg explain frame-clobbered
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("id", nargs="?", metavar="ID", help="id of a finding")


def run(args: argparse.Namespace) -> int:
    """Print one rule, or the list."""
    from tracedbg import rules

    if args.id is None:
        width = max(len(info.id) for info in rules.CATALOGUE)
        for info in sorted(rules.CATALOGUE, key=lambda info: -rules.rank(info.severity)):
            sys.stdout.write(f"{info.id:<{width}}  {info.severity:<7}  {info.title}\n")
        return 0
    if args.id not in rules.BY_ID:
        close = difflib.get_close_matches(args.id, rules.BY_ID, 1)
        hint = f"; did you mean {close[0]}?" if close else "; `tracedbg explain` lists them"
        raise UsageError(f"no finding {clean(args.id)!r}{hint}")
    info = rules.BY_ID[args.id]
    lines = [f"{info.id} ({info.severity})", info.title, "", *wrap(info.why, "")]
    if info.severity == "error" and rules.can_be_inferred(info.rule):
        lines += ["", "Where the evidence is only inferred it is a warning."]
    if info.refs:
        lines += ["", *wrap("; ".join(info.refs), "Manual: ")]
        lines += wrap(rules.EDITIONS, "        ")
    if info.fixes:
        lines += ["", "Known ways out:"]
        for fix in info.fixes:
            lines += wrap(fix, "- ")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0
