"""The command line: chooses the verb, and maps errors to exit codes in one place."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, TextIO

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

    def _print_message(self, message: str, file: Any = None) -> None:
        """Without argparse's silence when it cannot write: `--help >/dev/full` has failed."""
        (file or sys.stderr).write(message)


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
    code = _guarded(argv)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            try:
                stream.flush()
            except BrokenPipeError:
                code = common.BROKEN_PIPE if stream is sys.stdout else code
                _drop(stream)
            except OSError:
                _drop(stream)
    return code


def _guarded(argv: Sequence[str] | None) -> int:
    try:
        _prepare_streams()
        return _run(with_verb(sys.argv[1:] if argv is None else argv))
    except TracedbgError as error:
        common.message(str(error))
        return common.USAGE
    except MemoryError:
        common.message("out of memory")
        return common.USAGE
    except BrokenPipeError:
        _drop(sys.stdout)  # the reader went away (`| head`): no message
        return common.BROKEN_PIPE
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            sys.stderr.write("\n")
        return common.INTERRUPTED
    except _Terminated as stop:
        return 128 + stop.number
    except OSError as error:
        # Inputs and outputs that are files have reported themselves; what is left is stdout.
        common.message(f"cannot write: {(error.strerror or str(error)).lower()}")
        return common.USAGE
    except Exception as error:
        # Here and only here: Python would exit with 1 for it, which says "findings" to a CI.
        if os.environ.get("TRACEDBG_TRACEBACK") == "1":
            with contextlib.suppress(OSError):
                traceback.print_exc()
        common.message(f"internal error: {type(error).__name__}: {error} (please report)")
        return common.USAGE


def _prepare_streams() -> None:
    """Standard streams that are there and can print anything."""
    # Python has None for what the caller closed (`<&-`), and the next file opened would take its number.
    for name, mode in (("stdin", "r"), ("stdout", "r"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (open as long as the process)
    if not sys.stdout.writable():
        raise UsageError("standard output is closed")
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # whatever the locale can print, the rest is escaped
            reconfigure(errors="backslashreplace")


def _run(words: list[str]) -> int:
    top = parser()
    try:
        args = top.parse_args(words)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else common.USAGE
        sys.stdout.flush()
        return code
    if args.verb is None:
        with contextlib.suppress(OSError):
            top.print_help(sys.stderr)
        return common.USAGE
    # The viewer has a terminal to put in order, and handlers of its own.
    with contextlib.nullcontext() if args.verb == view.NAME else _signals():
        code = int(VERBS[args.verb].run(args))
        sys.stdout.flush()
    return code


class _Terminated(BaseException):
    """SIGTERM or SIGHUP, as an exception: outputs that are not whole are removed on its way."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Turn the signals that end a process into exceptions. One that is ignored (nohup) stays so; the second one kills."""

    def stop(number: int, frame: object) -> NoReturn:
        signal.signal(number, signal.SIG_DFL)
        raise _Terminated(number)

    changed = []
    try:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is signal.SIG_DFL:
                    signal.signal(number, stop)
                    changed.append(number)
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


def _drop(stream: TextIO) -> None:
    """What a stream still holds goes nowhere: the interpreter's last flush would fail and change the exit code."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
