"""`tracedbg replay`: the verdict on traces, as text or JSON."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

from tracedbg.commands import common
from tracedbg.errors import TracedbgError

if TYPE_CHECKING:
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
  tracedbg replay --at '#571' --stacks trace.tdbg     the stacks as memory after the source's event 571

exit codes: 0 nothing that --fail-on speaks of, 1 errors (or what --fail-on says), 2 wrong usage or unreadable,
3 unknown because of a gap or a missing layout
"""

MAX_CPUS_HINTED = 4
MAX_COMMANDS = 40


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("traces", nargs="+", metavar="TRACE", help="native trace or foreign log; - is standard input")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="form of the report (default: text)")
    parser.add_argument("--at", metavar="N", help="show the state after event N (or `start`, `end`) and what is known by then")
    parser.add_argument("--stacks", action="store_true", help="show the stacks as memory (default position: the first finding)")
    parser.add_argument("-v", "--verbose", action="store_true", help="details of every finding, known fixes, counters")
    parser.add_argument(
        "--fail-on", choices=("error", "warning", "note"), default="error", help="exit 1 from this severity on (default: error)"
    )
    parser.add_argument("--exit-zero", action="store_true", help="exit 0 whatever is found")
    parser.add_argument("--max-findings", metavar="N", type=_count, help="report at most N findings a trace")
    common.threads_argument(parser)
    parser.add_argument("-o", dest="output", metavar="FILE", help="write the report to FILE")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    common.input_arguments(parser)


def _count(text: str) -> int:
    if not text.isdecimal() or not text.isascii() or len(text) > 9:
        raise argparse.ArgumentTypeError("is not a number")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Replay each trace; the worst verdict is the exit code."""
    recordings = common.recordings(args)
    inputs = common.Inputs(args)
    if args.output is not None:
        common.check_output(args.output, args.force)
    reports: list[dict[str, Any]] = []
    codes: list[int] = []
    with common.text_output(args.output, args.force) as out:
        for number, paths in enumerate(recordings):
            try:
                code = _one(paths, number, inputs, args, out, reports)
            except TracedbgError as error:
                if len(recordings) == 1:
                    raise
                # The other traces still have their verdict.
                common.message(str(error))
                code = common.USAGE
                if args.format == "json":
                    from tracedbg.report import json_report

                    reports.append(json_report.failed(paths[0], str(error)))
            codes.append(code)
        if args.format == "json":
            from tracedbg.report import json_report

            out.write(json_report.dumps(json_report.document(reports)))
    if common.USAGE in codes:
        return common.USAGE
    if args.exit_zero:
        return common.CLEAN
    for code in (common.FINDINGS, common.UNKNOWN):
        if code in codes:
            return code
    return common.CLEAN


def _one(
    paths: list[str], number: int, inputs: common.Inputs, args: argparse.Namespace, out: TextIO, reports: list[dict[str, Any]]
) -> int:
    from tracedbg.describe import Words
    from tracedbg.replay import Replay

    path = paths[0]
    with inputs.open(paths) as trace:
        words = Words(trace, inputs.symbols)
        with Replay(trace) as replay:
            common.scan(replay, path)
            position = None if args.at is None else common.position_of(args.at, trace)
            final = _result(path, trace, words, replay, None, args.max_findings)
            shown = final if position is None else _result(path, trace, words, replay, position, args.max_findings)
            if args.format == "json":
                from tracedbg.report import json_report

                reports.append(json_report.trace_report(shown, args.fail_on))
            else:
                if number:
                    out.write("\n")
                for line in _text(shown, final, replay, words, args):
                    out.write(line + "\n")
        if final.stats.unjudged and trace.layout.is_empty:
            _hint(trace)
    if final.reaches(args.fail_on):
        return common.FINDINGS
    return common.UNKNOWN if final.unknown else common.CLEAN


def _result(path: str, trace: Trace, words: Words, replay: Replay, position: int | None, limit: int | None) -> Result:
    from tracedbg.report import Result, unknown_reasons

    findings = replay.findings()
    if position is not None:
        replay.seek(position)
        findings = findings[: replay.raised()]
    stats = replay.stats()
    lost = max(stats.findings - len(findings), 0) if position is None else 0
    unknown = unknown_reasons(trace, replay.layout, stats)
    return Result(path, trace, words, findings, stats, position, limit, lost, unknown)


def _text(shown: Result, final: Result, replay: Replay, words: Words, args: argparse.Namespace) -> Iterator[str]:
    from tracedbg.report import state_text, text

    if shown.position is None and not args.stacks:
        yield from text.render(shown, verbose=args.verbose, fail_on=args.fail_on)
        return
    if shown.position is None:
        first = min((f.event for f in final.findings), default=replay.count - 1)
        replay.seek(first + 1)
        yield from text.render(shown, verbose=args.verbose, fail_on=args.fail_on)
        yield ""
    else:
        yield text.headline(shown)
        for group in text.fold(shown):
            yield from text.finding_lines(shown, group)
        replay.seek(shown.position)
    yield from state_text.render(replay, words, stacks=args.stacks)


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
