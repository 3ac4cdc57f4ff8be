"""The command line: chooses the verb, and maps errors to exit codes in one place."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from tracedbg import __version__
from tracedbg.commands import common, convert, explain, help, info, replay, view
from tracedbg.errors import TracedbgError, UsageError
from tracedbg.text import clean_path

VERBS = {module.NAME: module for module in (view, replay, info, convert, explain, help)}

DESCRIPTION = "Debug what nested interrupts do to x86-64 stacks."
EPILOG = """\
examples:
  tracedbg crash.tdbg                    step through a trace (on a terminal)
  tracedbg replay qemu.log               which frames were overwritten, and did it matter
  tracedbg convert qemu.log crash.tdbg   log, layout and symbols in one file
  tracedbg explain resume-loop           what a finding means
  tracedbg help layout                   a page of the manual
"""


class Parser(argparse.ArgumentParser):
    """A parser that reports a mistake as every other error is reported."""

    def error(self, message: str) -> NoReturn:
        """One line, and where to read on."""
        common.message(f"{message} (see {self.prog} --help)")
        self.exit(common.USAGE)


def parser() -> Parser:
    """The whole command line."""
    raw = argparse.RawDescriptionHelpFormatter
    top = Parser(prog="tracedbg", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw, allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"tracedbg {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="COMMAND", title="commands", parser_class=Parser)
    for name, module in VERBS.items():
        sub = verbs.add_parser(
            name, help=module.HELP, description=module.HELP[0].upper() + module.HELP[1:] + ".", epilog=module.EPILOG,
            formatter_class=raw, allow_abbrev=False,
        )  # fmt: skip
        module.arguments(sub)
    return top


def with_verb(argv: Sequence[str]) -> list[str]:
    """`TRACE ...` is short for `view TRACE ...`."""
    words = list(argv)
    first = next((word for word in words if not word.startswith("-") or word == "-"), None)
    if first is None or first in VERBS or words[0] in ("-h", "--help", "--version"):
        return words
    if first != "-" and not os.path.lexists(first):
        close = difflib.get_close_matches(first, VERBS, 1)
        raise UsageError(f"{clean_path(first)}: no such file or command" + (f"; did you mean {close[0]}?" if close else ""))
    return ["view", *words]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # whatever the locale can print, the rest is escaped
            reconfigure(errors="backslashreplace")
    try:
        return _run(with_verb(sys.argv[1:] if argv is None else argv))
    except TracedbgError as error:
        common.message(str(error))
        return common.USAGE
    except MemoryError:
        common.message("out of memory")
        return common.USAGE
    except BrokenPipeError:
        return _pipe_closed()
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            sys.stderr.write("\n")
        return common.INTERRUPTED
    except OSError as error:
        # Inputs and outputs that are files have reported themselves; what is left is stdout.
        common.message(f"cannot write: {(error.strerror or str(error)).lower()}")
        return common.USAGE


def _run(words: list[str]) -> int:
    top = parser()
    try:
        args = top.parse_args(words)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else common.USAGE
        sys.stdout.flush()
        return code
    if args.verb is None:
        top.print_help(sys.stderr)
        return common.USAGE
    code = int(VERBS[args.verb].run(args))
    sys.stdout.flush()
    return code


def _pipe_closed() -> int:
    """The reader went away (`| head`): no message, and none from the interpreter's last flush either."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return common.BROKEN_PIPE
