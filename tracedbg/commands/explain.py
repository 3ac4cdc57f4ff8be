"""`tracedbg explain`: the catalogue of findings and the rules of the architecture, offline."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterator
from importlib import resources

from tracedbg.errors import UsageError
from tracedbg.text import clean, wrap

NAME = "explain"
HELP = "explain a finding or a rule: why it matters, what raises it, the manual, known fixes"
EPILOG = """\
examples:
  tracedbg explain                       list the findings
  tracedbg explain frame-clobbered
  tracedbg explain R12                   a rule of the architecture (R1 to R36)
"""

_RULE = re.compile(r"[Rr]0*([0-9]{1,4})", re.ASCII)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("id", nargs="?", metavar="ID", help="id of a finding, or R and the number of a rule")


def run(args: argparse.Namespace) -> int:
    """Print one finding or rule, or the list."""
    if args.id is None:
        lines = _table()
    else:
        number = _RULE.fullmatch(args.id)
        lines = _rule(int(number[1])) if number is not None else _finding(args.id.lower(), args.id)
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def sections(page: str) -> dict[str, str]:
    """The sections of a help page: heading (without backticks) -> text."""
    text = (resources.files("tracedbg") / "help" / f"{page}.md").read_text(encoding="utf-8")
    found = {}
    for part in text.split("\n## ")[1:]:
        heading, _, body = part.partition("\n")
        found[heading.strip("`")] = body.strip()
    return found


def _table() -> list[str]:
    from tracedbg import rules

    width = max(len(info.id) for info in rules.CATALOGUE)
    ranked = sorted(rules.CATALOGUE, key=lambda info: -rules.rank(info.severity))
    return [f"{info.id:<{width}}  {info.severity:<7}  {info.title}" for info in ranked]


def _rule(number: int) -> list[str]:
    found = sections("rules")
    for heading, body in found.items():
        if heading.startswith(f"R{number} "):
            return [heading, "", *_wrapped(body)]
    raise UsageError(f"no rule R{number}: they are R1 to R{len(found)} (`tracedbg help rules`)")


def _finding(name: str, asked: str) -> list[str]:
    from tracedbg import rules

    info = rules.BY_ID.get(name)
    if info is None:
        close = [one for one in rules.BY_ID if name and name in one][:3] or difflib.get_close_matches(name, rules.BY_ID, 3, 0.75)
        hint = f"; did you mean {' or '.join(close)}?" if close else "; `tracedbg explain` lists them"
        raise UsageError(f"no finding {clean(asked)!r}{hint}")
    lines = [f"{info.id} ({info.severity})", info.title, "", *wrap(info.why, "")]
    if info.severity == "error" and rules.can_be_inferred(info.rule):
        lines += ["", "Where the evidence is only inferred it is a warning."]
    lines += ["", *_wrapped(sections("findings")[info.id])]
    if info.refs:
        lines += ["", *wrap("; ".join(info.refs), "Manual: ")]
        lines += wrap(rules.EDITIONS, "        ")
    if info.fixes:
        lines += ["", "Known ways out:"]
        for fix in info.fixes:
            lines += wrap(fix, "- ")
    return lines


def _wrapped(body: str) -> Iterator[str]:
    """The paragraphs and lists of a section, as wide as a mail."""
    for number, paragraph in enumerate(body.split("\n\n")):
        if number:
            yield ""
        for item in re.split(r"\n(?=- )", paragraph):
            mark = "- " if item.startswith("- ") else ""
            yield from wrap(item.removeprefix(mark), mark)
