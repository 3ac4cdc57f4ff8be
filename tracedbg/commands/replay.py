"""`tracedbg replay`: the verdict on traces, in one of several forms."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from tracedbg.commands import common
from tracedbg.errors import TracedbgError, UsageError

if TYPE_CHECKING:
    from tracedbg.baseline import Baseline, Collector
    from tracedbg.describe import Words
    from tracedbg.replay import Replay
    from tracedbg.report import Result
    from tracedbg.trace import Trace

NAME = "replay"
HELP = "say which frames were overwritten, by what, and whether it mattered"
EPILOG = """\
examples:
  tracedbg replay qemu.log                            the verdict; layout from mon_*.txt beside the log
  tracedbg replay --monitor mon.txt --symbols xen-syms.map qemu.log
  tracedbg replay --format json -o verdict.json *.tdbg
  tracedbg replay --format markdown trace.tdbg        for an issue or a wiki
  tracedbg replay --format html -o report.html *.tdbg one page, with the stacks at each finding
  tracedbg replay --at '#571' --stacks trace.tdbg     the stacks as memory after the source's event 571
  tracedbg replay --baseline known.json *.tdbg        only what is not in known.json counts

exit codes: 0 nothing that --fail-on speaks of, 1 errors (or what --fail-on says), 2 wrong usage or unreadable,
3 unknown because of a gap or a missing layout. `tracedbg help ci` tells more.
"""

MAX_CPUS_HINTED = 4
MAX_COMMANDS = 40
FORMS = ("text", "json", "markdown", "sarif", "junit", "github", "html")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("traces", nargs="+", metavar="TRACE", help="native trace or foreign log; - is standard input")
    parser.add_argument("--format", choices=FORMS, default="text", help="form of the report (default: text)")
    parser.add_argument("--at", metavar="N", help="show the state after event N (or `start`, `end`) and what is known by then")
    parser.add_argument("--stacks", action="store_true", help="show the stacks as memory (without --at: at the worst finding)")
    parser.add_argument("-v", "--verbose", action="store_true", help="details of every finding, known fixes, counters")
    parser.add_argument(
        "--fail-on", choices=("error", "warning", "note"), default="error", help="exit 1 from this severity on (default: error)"
    )
    parser.add_argument("--exit-zero", action="store_true", help="exit 0 whatever is found")
    parser.add_argument(
        "--max-findings", metavar="N", type=_count, help="print at most N findings a trace, the worst ones (equal ones are one)"
    )
    parser.add_argument("--baseline", metavar="FILE", help="findings in FILE are known: shown, but not counted for the exit code")
    parser.add_argument("--write-baseline", metavar="FILE", help="write the present findings to FILE, as a baseline")
    common.threads_argument(parser)
    parser.add_argument("-o", dest="output", metavar="FILE", help="write the report to FILE")
    parser.add_argument("--force", action="store_true", help="overwrite the output files")
    common.input_arguments(parser)


def _count(text: str) -> int:
    if not text.isdecimal() or not text.isascii() or len(text) > 9:
        raise argparse.ArgumentTypeError("is not a number")
    return int(text)


class _Form(Protocol):
    """A report of several traces that is one document. Each call gives the lines that can be written by then."""

    def trace(self, result: Result, replay: Replay, inputs: Sequence[str]) -> Iterator[str]: ...

    def failed(self, name: str, error: str) -> Iterator[str]: ...

    def end(self) -> Iterator[str]: ...


class _Json:
    """The JSON form."""

    def __init__(self, fail_on: str) -> None:
        self._fail_on = fail_on
        self._reports: list[dict[str, Any]] = []

    def trace(self, result: Result, replay: Replay, inputs: Sequence[str]) -> Iterator[str]:
        from tracedbg.report import json_report

        self._reports.append(json_report.trace_report(result, self._fail_on))
        return iter(())

    def failed(self, name: str, error: str) -> Iterator[str]:
        from tracedbg.report import json_report

        self._reports.append(json_report.failed(name, error))
        return iter(())

    def end(self) -> Iterator[str]:
        from tracedbg.report import json_report

        yield json_report.dumps(json_report.document(self._reports)).rstrip("\n")


def _form(args: argparse.Namespace) -> _Form | None:
    if args.format == "json":
        return _Json(args.fail_on)
    if args.format in ("sarif", "junit", "github", "html"):
        form: _Form = importlib.import_module(f"tracedbg.report.{args.format}").Form(args.fail_on)
        return form
    return None


@dataclass(slots=True)
class _Job:
    """What all traces of one run share."""

    args: argparse.Namespace
    inputs: common.Inputs
    known: Baseline | None  # the baseline to compare with
    present: Collector | None  # the one to write
    form: _Form | None  # None: text or Markdown, whose reports stand one below the other


def run(args: argparse.Namespace) -> int:
    """Replay each trace; the worst verdict is the exit code."""
    recordings = common.recordings(args)
    known, present = _baselines(args)
    job = _Job(args, common.Inputs(args), known, present, _form(args))
    if args.output is not None:
        common.check_output(args.output, args.force)
    codes: list[int] = []
    with common.text_output(args.output, args.force) as out:
        for number, paths in enumerate(recordings):
            try:
                code = _one(job, paths, number, out)
            except TracedbgError as error:
                if len(recordings) == 1:
                    raise
                # The other traces still have their verdict.
                common.message(str(error))
                code = common.USAGE
                if job.form is not None:
                    _write(out, job.form.failed(paths[0], str(error)))
            codes.append(code)
        if job.form is not None:
            _write(out, job.form.end())
    if common.USAGE in codes:
        if present is not None:
            common.message(f"{args.write_baseline}: not written, as a trace could not be read")
        return common.USAGE
    if known is not None and (gone := known.missing()) is not None:
        common.message(gone)
    if present is not None:
        with common.text_output(args.write_baseline, args.force) as file:
            present.write(file)
    if args.exit_zero:
        return common.CLEAN
    for code in (common.FINDINGS, common.UNKNOWN):
        if code in codes:
            return code
    return common.CLEAN


def _baselines(args: argparse.Namespace) -> tuple[Baseline | None, Collector | None]:
    """The baseline to compare with, read, and the one to write, empty; None where it is not asked for."""
    target = args.write_baseline
    if target is not None:
        if target in common.STDOUT and (args.output is None or args.output in common.STDOUT):
            raise UsageError("--write-baseline and the report cannot both go to standard output")
        if args.output is not None and os.path.realpath(target) == os.path.realpath(args.output):
            raise UsageError("--write-baseline and -o name the same file")
        common.check_output(target, args.force)
    if args.baseline is None and target is None:
        return None, None
    from tracedbg import baseline

    common.read_once([*args.traces, *([args.baseline] if args.baseline is not None else [])])
    known = None if args.baseline is None else baseline.load(args.baseline)
    return known, None if target is None else baseline.Collector()


def _one(job: _Job, paths: list[str], number: int, out: TextIO) -> int:
    """The verdict on one recording, to `out` or to the job's reports; its exit code."""
    from tracedbg.describe import Words
    from tracedbg.replay import Replay

    path, args = paths[0], job.args
    with job.inputs.open(paths) as trace:
        words = Words(trace, job.inputs.symbols)
        with Replay(trace) as replay:
            common.scan(replay, path)
            position = None if args.at is None else common.position_of(args.at, trace)
            final = _result(path, trace, words, replay, args.max_findings, job.known)
            shown = final if position is None else _known_by(position, final, replay)
            if job.form is not None:
                from tracedbg.commands.reproduce import input_words

                _write(out, job.form.trace(shown, replay, input_words(args, paths)))
            else:
                if number:
                    out.write("\n")
                text = _markdown if args.format == "markdown" else _text
                _write(out, text(shown, final, replay, words, args, paths))
        if job.present is not None:
            job.present.add(final.findings, words)
        if final.stats.unjudged and trace.layout.is_empty:
            _hint(trace)
    if final.reaches(args.fail_on):
        return common.FINDINGS
    return common.UNKNOWN if final.unknown else common.CLEAN


def _write(out: TextIO, lines: Iterator[str]) -> None:
    out.writelines(f"{line}\n" for line in lines)


def _result(
    path: str, trace: Trace, words: Words, replay: Replay, limit: int | None, baseline: Baseline | None
) -> Result:
    """What is known at the end of the trace."""
    from tracedbg.report import Result, unknown_reasons

    findings, stats = replay.findings(), replay.stats()
    lost = max(stats.findings - len(findings), 0)
    unknown = unknown_reasons(trace, replay.layout, stats, lost)
    known = frozenset(f.number for f in findings if baseline.known(f, words)) if baseline is not None else frozenset[int]()
    return Result(path, trace, words, findings, stats, None, limit, lost, unknown, known)


def _known_by(position: int, final: Result, replay: Replay) -> Result:
    """What of it is known at a position."""
    replay.seek(position)
    return replace(final, findings=final.findings[: replay.raised()], stats=replay.stats(), position=position, lost=0)


def _text(
    shown: Result, final: Result, replay: Replay, words: Words, args: argparse.Namespace, paths: list[str]
) -> Iterator[str]:
    from tracedbg.report import state_text, text

    if shown.position is None and not args.stacks:
        yield from text.render(shown, verbose=args.verbose, fail_on=args.fail_on)
        return
    if shown.position is None:
        yield from text.render(shown, verbose=args.verbose, fail_on=args.fail_on)
        yield ""
    else:
        yield from text.render_short(shown)
    replay.seek(_state_position(shown, final, replay))
    yield from state_text.render(replay, words, stacks=args.stacks)


def _state_position(shown: Result, final: Result, replay: Replay) -> int:
    """The position whose state is shown: that of --at, else where the worst finding was raised."""
    if shown.position is not None:
        return shown.position
    worst = min(final.findings, key=final.order, default=None)
    return replay.count if worst is None else worst.event + 1


def _markdown(
    shown: Result, final: Result, replay: Replay, words: Words, args: argparse.Namespace, paths: list[str]
) -> Iterator[str]:
    from tracedbg.commands.reproduce import input_words
    from tracedbg.report import markdown, state_text

    yield from markdown.render(shown, input_words(args, paths), fail_on=args.fail_on)
    if shown.position is not None or args.stacks:
        replay.seek(_state_position(shown, final, replay))
        yield ""
        yield from markdown.block(state_text.render(replay, words, stacks=args.stacks), "text")


def _hint(trace: Trace) -> None:
    """How to get the layout, on stderr."""
    from tracedbg.report import meta_dict, meta_texts

    commands = meta_texts(meta_dict(trace, "layout"), "commands")
    if commands:
        starts = [number for number, command in enumerate(commands) if command.startswith("cpu ")]
        more = len(starts) - MAX_CPUS_HINTED
        shown = commands[: starts[MAX_CPUS_HINTED] if more > 0 else MAX_COMMANDS]
        rest = [f"and {more} more CPU{'' if more == 1 else 's'}"] if more > 0 else []
        said = "the layout is missing; these commands of QEMU's monitor print it (then: --monitor FILE):"
        common.message(said, [*shown[:MAX_COMMANDS], *rest])
    else:
        common.message("the layout is missing: give it with --layout FILE (see `tracedbg help layout`)")
