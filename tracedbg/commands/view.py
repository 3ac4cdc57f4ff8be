"""`tracedbg view`: the interactive viewer."""

from __future__ import annotations

import argparse
import sys

from tracedbg.commands import common
from tracedbg.errors import UsageError

NAME = "view"
HELP = "step through a trace on the terminal (also: tracedbg TRACE)"
EPILOG = """\
examples:
  tracedbg crash.tdbg
  tracedbg view --monitor mon.txt qemu.log
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("traces", nargs="+", metavar="TRACE", help="native trace or foreign log")
    common.threads_argument(parser)
    parser.add_argument("--at", metavar="N", help="begin after event N (or `start`, `end`; default: at the first finding)")
    common.input_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Open the viewer, if there is a terminal."""
    if not all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):  # it is drawn on stderr
        raise UsageError("the viewer needs a terminal; `tracedbg replay TRACE` prints the verdict")
    recordings = common.recordings(args)
    if len(recordings) > 1:
        raise UsageError("the viewer shows one trace (the files of one recording: --threads)")
    inputs = common.Inputs(args)
    with inputs.open(recordings[0]) as trace:
        from tracedbg.describe import Words
        from tracedbg.tui.app import run_app

        start = None if args.at is None else common.position_of(args.at, trace)
        return run_app(trace, Words(trace, inputs.symbols), start=start)
