"""`tracedbg info`: what a trace holds, where its layout is from, and what its source cannot know."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tracedbg.commands import common
from tracedbg.text import clean, clean_path

if TYPE_CHECKING:
    from tracedbg.describe import Words
    from tracedbg.trace import Trace

NAME = "info"
HELP = "show what a trace holds and what it cannot know"
EPILOG = """\
examples:
  tracedbg info crash.tdbg
  tracedbg info --check big.tdbg         verify every checksum
"""

CHUNK = 1 << 16
MAX_CPUS_SHOWN = 16
MAX_LEVELS = 8  # of META, which may be nested
MAX_KEYS = 200  # of META, and of each object in it


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("traces", nargs="+", metavar="TRACE", help="native trace or foreign log; - is standard input")
    common.threads_argument(parser)
    parser.add_argument("--check", action="store_true", help="verify the checksums of all events")
    parser.add_argument("-v", "--verbose", action="store_true", help="replay it too: how frames were settled")
    common.input_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the facts."""
    recordings = common.recordings(args)
    inputs = common.Inputs(args)
    for number, paths in enumerate(recordings):
        if number:
            sys.stdout.write("\n")
        _show(paths, inputs, args)
    return common.CLEAN


def _show(paths: list[str], inputs: common.Inputs, args: argparse.Namespace) -> None:
    from tracedbg.describe import Words

    with inputs.open(paths) as trace:
        words = Words(trace, inputs.symbols)
        for line in _lines(paths[0], trace, words):
            sys.stdout.write(line + "\n")
        if args.check:
            progress = common.Progress("checksums")
            try:
                for done in trace.check():
                    progress.at(done, trace.count)
            finally:
                progress.done()
            said = "none yet, the file is not finished" if trace.unfinished else "all right"
            sys.stdout.write(f"checksums: {said}\n")
        if args.verbose:
            for line in _settled(paths[0], trace, words):
                sys.stdout.write(line + "\n")


def _lines(path: str, trace: Trace, words: Words) -> Iterator[str]:
    major, minor = trace.version
    unfinished = ", not finished by its writer" if trace.unfinished else ""
    form = f"native trace, format {major}.{minor}" if trace.foreign is None else trace.foreign
    yield f"{clean_path(path)}: {form}{unfinished}"
    if trace.ignored:
        yield f"  {trace.ignored:,} bytes at the end are not whole events and are not used"
    yield f"events: {trace.count:,}, {trace.cpus} CPU{'' if trace.cpus == 1 else 's'}, {_clock(trace)}"
    yield from _counts(trace, words)
    yield from _meta(trace)
    yield from _layout(trace, words)
    sizes = {"memory ranges": len(trace.memory), "payload bytes": len(trace.payload), "symbols": len(words.symbols)}
    held = [f"{count:,} {name}" for name, count in sizes.items() if count]
    if held:
        yield f"also holds: {', '.join(held)}"


def _clock(trace: Trace) -> str:
    from tracedbg.state import Known

    if trace.clock_hz:
        return f"clock {trace.clock_hz:,} Hz"
    for at in range(0, len(trace.events), CHUNK * 64):
        if any(known & Known.TIME for known in set(bytes(trace.events[at + 58 : at + CHUNK * 64 : 64]))):
            return "a clock of unknown frequency"
    return "no clock"


def _counts(trace: Trace, words: Words) -> Iterator[str]:
    from tracedbg.state import EventFlag, Kind, Source

    kinds: Counter[int] = Counter()
    cpus: Counter[int] = Counter()
    vectors: Counter[tuple[int, int]] = Counter()
    flags: Counter[int] = Counter()
    examples: dict[tuple[int, int], int] = {}
    for at in range(0, len(trace.events), CHUNK * 64):
        chunk = bytes(trace.events[at : at + CHUNK * 64])
        kind, arg, source = chunk[60::64], chunk[61::64], chunk[62::64]
        kinds.update(kind)
        flags.update(chunk[63::64])
        cpus.update(low | high << 8 for low, high in zip(chunk[52::64], chunk[53::64], strict=True))
        pairs = [(a, s) for k, a, s in zip(kind, arg, source, strict=True) if k == Kind.DELIVER]
        vectors.update(pairs)
        if len(examples) < len(vectors):
            for n, (k, a, s) in enumerate(zip(kind, arg, source, strict=True), at // 64):
                if k == Kind.DELIVER:
                    examples.setdefault((a, s), n)
    names = {int(kind): kind.name.lower() for kind in Kind}
    for number, count in sorted(kinds.items()):
        yield f"  {names.get(number, f'unknown kind {number}'):<12} {count:>12,}"
    if vectors:
        yield "deliveries by vector and source:"
    sources = {int(source): source.name.lower().replace("_", "-") for source in Source}
    for (vector, number), count in sorted(vectors.items()):
        event = words.event(examples[vector, number])
        name = words.delivery_name(event) if event is not None else "?"
        yield f"  {vector:#04x} {sources.get(number, '?'):<10} {count:>12,}  {name}"
    failed = sum(count for bits, count in flags.items() if bits & EventFlag.FAILED)
    legacy = sum(count for bits, count in flags.items() if bits & EventFlag.LEGACY)
    partial = sum(count for bits, count in flags.items() if bits & EventFlag.PARTIAL)
    for count, what in ((failed, "failed"), (legacy, "not in long mode"), (partial, "from damaged records")):
        if count:
            yield f"  {count:,} {what}"
    if trace.cpus > 1:
        shown = sorted(cpus.items())[:MAX_CPUS_SHOWN]
        more = f", and {len(cpus) - len(shown)} more CPUs" if len(cpus) > len(shown) else ""
        yield "by CPU: " + ", ".join(f"cpu {cpu}: {count:,}" for cpu, count in shown) + more


def _meta(trace: Trace) -> Iterator[str]:
    """META as `key: value` lines; the layout part has its own place."""
    items = sorted(trace.meta.items())
    for key, value in items[:MAX_KEYS]:
        if key in ("layout", "stack_names"):
            continue
        if key == "case":
            yield from _case(value)
            continue
        if isinstance(value, dict) and any(isinstance(item, str) for item in value.values()):
            yield f"{clean(key, 40)}:"
            yield from (f"  {clean(str(name), 40)}: {_plain(item)}" for name, item in sorted(value.items())[:MAX_KEYS])
            if len(value) > MAX_KEYS:
                yield f"  and {len(value) - MAX_KEYS:,} more"
        else:
            yield f"{clean(key, 40)}: {_plain(value)}"
    if len(items) > MAX_KEYS:
        yield f"and {len(items) - MAX_KEYS:,} more keys of META"


def _case(story: object) -> Iterator[str]:
    """Of a case file its header; the prose and what it expects are long."""
    header = story.get("header") if isinstance(story, dict) else None
    pairs = [pair for pair in header if isinstance(pair, list) and len(pair) == 2] if isinstance(header, list) else []
    if pairs:
        yield "case:"
        yield from (f"  {_plain(name)}: {_plain(text)}" for name, text in pairs[:MAX_KEYS])


def _plain(value: object, level: int = 1) -> str:
    if isinstance(value, (dict, list)) and level > MAX_LEVELS:
        return "…"
    if isinstance(value, dict):
        items = sorted(value.items(), key=lambda item: str(item[0]))
        more = f", and {len(items) - MAX_KEYS:,} more" if len(items) > MAX_KEYS else ""
        return ", ".join(f"{clean(str(k), 40)} {_plain(v, level + 1)}" for k, v in items[:MAX_KEYS]) + more
    if isinstance(value, list):
        more = f"; and {len(value) - 20} more" if len(value) > 20 else ""
        return "; ".join(_plain(item, level + 1) for item in value[:20]) + more
    if isinstance(value, str):
        return clean(value, 400)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return clean(json.dumps(value), 400)


def _layout(trace: Trace, words: Words) -> Iterator[str]:
    from tracedbg.describe import hex_address
    from tracedbg.layout import REGION_READS, REGION_STACK, REGION_STORES, REGION_USER, SLOT_RSP0, Fidelity
    from tracedbg.report import layout_notes
    from tracedbg.x86 import is_canonical, vector_name

    layout = trace.layout
    notes = layout_notes(trace)
    yield notes[0] if notes else "layout:"
    yield from (f"  {note}" for note in notes[1:])
    for cpu, tables in enumerate(layout.cpus[:MAX_CPUS_SHOWN]):
        tss = None if tables.tss is None else layout.tss[tables.tss]
        idt = None if tables.idt is None else layout.idts[tables.idt]
        tr = "unknown" if tss is None else hex_address(tss.base)
        yield f"  cpu {cpu}: TR {tr}, IDT {'unknown' if idt is None else hex_address(idt.base)}"
        if tss is None:
            continue
        tops = [(words.stack_name(n), tss.ist[n]) for n in range(1, 8)] + [(words.stack_name(SLOT_RSP0), tss.rsp[0])]
        for name, top in tops:
            if top:
                unused = "" if is_canonical(top) else "  (not canonical: unused)"
                yield f"    {name:<12} {hex_address(top)}{unused}"
    if len(layout.cpus) > MAX_CPUS_SHOWN:
        yield f"  and {len(layout.cpus) - MAX_CPUS_SHOWN} more CPUs"
    used = sorted({(gate.ist, vector) for idt in layout.idts for vector, gate in idt.gates.items() if gate.ist})
    if used:
        yield "  gates with an IST stack: " + ", ".join(f"{vector_name(vector)} on IST{ist}" for ist, vector in used[:40])
    kinds = {REGION_USER: "user memory", REGION_STORES: "stores recorded in", REGION_READS: "loads recorded in"}
    for region in layout.regions:
        if region.kind != REGION_STACK:
            yield f"  {kinds[region.kind]} [{hex_address(region.lo)}, {hex_address(region.hi)})"
    if layout.fidelity & Fidelity.INFERRED:
        yield "  the events are inferred from one instant: no finding is stronger than that"
    else:
        yield "  returns: " + ("every one is recorded" if layout.fidelity & Fidelity.RETURNS else "not all are recorded")
    if layout.fidelity & Fidelity.GUESTS:
        yield "  from VM entry to VM exit the events are the guest's: they are not judged"
    if layout.fidelity & Fidelity.SS_ZEROED:
        yield "  the source zeroes SS on an IST switch (QEMU TCG); hardware does not"


def _settled(path: str, trace: Trace, words: Words) -> Iterator[str]:
    from tracedbg.replay import Replay
    from tracedbg.report import Result
    from tracedbg.report.text import stats_lines

    with Replay(trace) as replay:
        common.scan(replay, path)
        yield from stats_lines(Result(path, trace, words, replay.findings(), replay.stats()))
