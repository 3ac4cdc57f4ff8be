"""`tracedbg convert`: foreign traces into one native file with layout and symbols, and traces into the formats of other tools."""

from __future__ import annotations

import argparse
import itertools
import shutil
import struct
import sys
import tempfile
from typing import TYPE_CHECKING, BinaryIO, cast

from tracedbg.commands import common
from tracedbg.errors import UsageError
from tracedbg.text import clean_path

if TYPE_CHECKING:
    from tracedbg.formats import Format
    from tracedbg.symbols import Symbols
    from tracedbg.trace import Trace
    from tracedbg.writer import TraceWriter

NAME = "convert"
HELP = "read a foreign trace into a native one (.tdbg), or write a trace in the format of another tool"
EPILOG = """\
examples:
  tracedbg convert --list                             the formats
  tracedbg convert --symbols xen-syms.map qemu.log crash.tdbg
  tracedbg convert --monitor mon.txt qemu.log.gz crash.tdbg
  tracedbg convert x.1 x.2 x.3 run.tdbg               one log a thread (-d int,tid -D x.%d)
  tracedbg convert --symbols System.map old.tdbg new.tdbg
  tracedbg convert crash.tdbg crash.pftrace           for ui.perfetto.dev
  tracedbg convert crash.tdbg crash.case              as text, to read, edit and send (`tracedbg help case`)
"""

CHUNK = 1 << 16  # events copied at a time


class _List(argparse.Action):
    """--list: print the formats and stop, whatever else is missing on the command line."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        sys.stdout.writelines(f"{line}\n" for line in listing())
        sys.stdout.flush()
        parser.exit()


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("inputs", nargs="+", metavar="IN", help="inputs; several are the thread files of one run; - is stdin")
    parser.add_argument("output", metavar="OUT", help="what to write: a native trace, or another format; - is stdout")
    parser.add_argument("--to", dest="to_format", metavar="FMT", help="output format (default: by the suffix of OUT)")
    parser.add_argument("--list", action=_List, nargs=0, help="list the formats and exit")
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    common.input_arguments(parser)


def listing() -> list[str]:
    """The formats, a line each."""
    from tracedbg.formats.registry import FORMATS

    rows = [("name", "in", "out", "suffix", "what")]
    for form in FORMATS:
        more = f" (needs tracedbg[{form.extra}])" if form.extra else ""
        marks = ("x" if form.reads else "-", "x" if form.writes else "-")
        rows.append((form.name, *marks, form.suffixes[0] if form.suffixes else "-", form.what + more))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append("")
    lines.append("An input is recognised by its content. Verdicts are written by `tracedbg replay --format`:")
    lines.append("text, json, markdown, sarif, junit, github, html.")
    return lines


def run(args: argparse.Namespace) -> int:
    """Read the inputs, write the trace."""
    from tracedbg import formats

    common.read_once(args.inputs)
    form = formats.output_format(args.output, args.to_format)
    to_stdout = args.output in common.STDOUT
    if to_stdout and form.directory:
        raise UsageError(f"--to {form.name} writes a directory: give its name")
    if to_stdout and not form.text and sys.stdout.isatty():
        raise UsageError(f"--to {form.name} is binary: give a file, or send stdout elsewhere")
    if form.directory:
        common.check_directory(args.output, args.force, form)
    else:
        common.check_output(args.output, args.force)
    inputs = common.Inputs(args)
    with inputs.open(args.inputs) as trace:
        if form.name == formats.NATIVE and not to_stdout:
            _write_native(trace, args.output, args.force, inputs.symbols)
        elif to_stdout:
            _to_stdout(form, trace, inputs.symbols)
        else:
            output = (
                common.new_directory(args.output, args.force, form)
                if form.directory
                else common.new_file(args.output, args.force)
            )
            with output as path:
                _write_foreign(form, trace, path, inputs.symbols)
        count, cpus = trace.count, trace.cpus
    if sys.stderr.isatty():
        common.message(f"{clean_path(args.output)}: {count:,} events of {cpus} CPU{'' if cpus == 1 else 's'}")
    return common.CLEAN


def _to_stdout(form: Format, trace: Trace, symbols: Symbols | None) -> None:
    """By way of a file: a writer may go back in it, and nothing is written if it fails."""
    from tracedbg import formats
    from tracedbg.output import spool_error
    from tracedbg.writer import TraceWriter

    whole = False
    try:
        with tempfile.NamedTemporaryFile() as file:
            if form.name == formats.NATIVE:
                writer = TraceWriter(cast(BinaryIO, file), cpus=trace.cpus, clock_hz=trace.clock_hz)
                _copy(trace, writer, symbols)
                writer.close()
            else:
                _write_foreign(form, trace, file.name, symbols)
            whole = True
            with open(file.name, "rb") as written:
                shutil.copyfileobj(written, sys.stdout.buffer)
            sys.stdout.buffer.flush()
    except OSError as error:
        if whole:
            raise
        raise spool_error("-", error) from None


def _write_native(trace: Trace, output: str, force: bool, symbols: Symbols | None) -> None:
    from tracedbg.writer import TraceWriter

    with TraceWriter(output, cpus=trace.cpus, clock_hz=trace.clock_hz, force=force) as writer:
        _copy(trace, writer, symbols)


def _write_foreign(form: Format, trace: Trace, path: str, symbols: Symbols | None) -> None:
    from tracedbg.formats import WriterOptions, registry

    progress = common.Progress("convert")
    try:
        options = WriterOptions(names=_symbols(trace, symbols), symbols=symbols, progress=progress.at)
        registry.writer(form).write(trace, path, options)
    finally:
        progress.done()


def _symbols(trace: Trace, symbols: Symbols | None) -> bytes:
    """The names that go into the output: those that the trace has, or of a map the ones that it needs."""
    return trace.symbols if symbols is None else symbols.subset(code_addresses(trace)).to_bytes()


def _copy(trace: Trace, writer: TraceWriter, symbols: Symbols | None) -> None:
    writer.layout = trace.layout
    writer.meta = dict(trace.meta)
    writer.meta.pop("stack_names", None)  # the writer takes them from the layout
    writer.memory = list(trace.memory)
    writer.symbols = _symbols(trace, symbols)
    if len(trace.payload):
        writer.payload(bytes(trace.payload))
    progress = common.Progress("convert")
    try:
        step = CHUNK * 64
        for at in range(0, len(trace.events), step):
            writer.append(trace.events[at : at + step])
            progress.at(at // 64, trace.count)
    finally:
        progress.done()


def code_addresses(trace: Trace) -> set[int]:
    """Every address of code that a report may name: interrupted, returned to, saved, and the handlers of used vectors."""
    from tracedbg.state import Kind, Source

    found: set[int] = set()
    vectors: set[int] = set()
    jumps = {int(Kind.RETURN), int(Kind.GATE)}
    step = CHUNK * 64
    for at in range(0, len(trace.events), step):
        chunk = bytes(trace.events[at : at + step])
        words = struct.unpack(f"<{len(chunk) // 8}Q", chunk)
        kinds = chunk[60::64]
        found.update(words[1::8])
        if not jumps.isdisjoint(kinds):
            chosen = [kind in jumps for kind in kinds]
            found.update(itertools.compress(words[3::8], chosen))
            found.update(itertools.compress(words[4::8], chosen))
        delivered = [kind == Kind.DELIVER for kind in kinds]
        vectors.update(itertools.compress(chunk[61::64], delivered))
        for n in (n for n, source in enumerate(chunk[62::64]) if source == Source.SOFT_INT and delivered[n]):
            found.add(words[8 * n + 1] + (words[8 * n + 5] >> 32))  # code: the length of the INT instruction
    for idt in trace.layout.idts:
        found.update(gate.offset for vector, gate in idt.gates.items() if vector in vectors)
    return found
