"""`tracedbg view`: the interactive viewer."""

from __future__ import annotations

import argparse
import re
import sys
from typing import TYPE_CHECKING

from tracedbg.commands import common
from tracedbg.errors import UsageError
from tracedbg.text import clean

if TYPE_CHECKING:
    from tracedbg.growing import Growing
    from tracedbg.trace import Trace

NAME = "view"
HELP = "step through a trace on the terminal (also: tracedbg TRACE)"
EPILOG = """\
examples:
  tracedbg crash.tdbg
  tracedbg view --monitor mon.txt qemu.log
  tracedbg view --follow live.tdbg
  tracedbg view --keys "n e" --shot finding.svg crash.tdbg

Colours, keys and noise: `tracedbg help config`.
"""
SIZE = (120, 36)  # columns, rows of a picture


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("traces", nargs="+", metavar="TRACE", help="native trace or foreign log")
    common.threads_argument(parser)
    parser.add_argument("--at", metavar="N", help="begin after event N (or `start`, `end`; default: at the first finding)")
    parser.add_argument("--follow", action="store_true", help="the trace is still being written: show what is added to it")
    parser.add_argument(
        "--keys", metavar="KEYS", default="", help="keys to press once the trace is scanned, as in `n n w : 1234 Enter`"
    )
    parser.add_argument("--shot", metavar="FILE.svg", help="draw the screen instead of showing it: needs no terminal")
    parser.add_argument("--size", metavar="COLSxROWS", type=_size, default=SIZE, help="of --shot (default: 120x36)")
    parser.add_argument("--force", action="store_true", help="overwrite the file of --shot")
    common.input_arguments(parser)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9][0-9]{1,2})x([1-9][0-9]{1,2})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{clean(text, 30)!r} is not COLUMNSxROWS, as in 120x36")
    return int(match[1]), int(match[2])


def run(args: argparse.Namespace) -> int:
    """Open the viewer, if there is a terminal, or draw it."""
    if args.shot is not None:
        common.check_output(args.shot, args.force)
    elif not all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):  # it is drawn on stderr
        raise UsageError("the viewer needs a terminal; `tracedbg replay TRACE` prints the verdict")
    recordings = common.recordings(args)
    if len(recordings) > 1:
        raise UsageError("the viewer shows one trace (the files of one recording: --threads)")
    inputs = common.Inputs(args)
    if args.follow and args.shot is None:
        with inputs.follow(recordings[0]) as growing:
            return _view(args, inputs, growing.trace, growing)
    with inputs.open(recordings[0]) as trace:
        return _view(args, inputs, trace, None)


def _view(args: argparse.Namespace, inputs: common.Inputs, trace: Trace, growing: Growing | None) -> int:
    from tracedbg.commands.reproduce import input_words
    from tracedbg.describe import Words
    from tracedbg.tui import app
    from tracedbg.tui.keys import script_of

    start = None if args.at is None else common.position_of(args.at, trace)
    choices = app.Choices(start, input_words(args, common.recordings(args)[0]), tuple(script_of(args.keys)), growing)
    words = Words(trace, inputs.symbols)
    if args.shot is None:
        return app.run_app(trace, words, choices)
    svg = app.picture(trace, words, choices, args.size)
    with common.text_output(args.shot, args.force) as file:
        file.write(svg)
    return common.CLEAN
