"""QEMU `-d int` logs, with the monitor text that lies beside them, into a native trace."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tracedbg.errors import FormatError, UsageError
from tracedbg.formats.qemu import layout as qemu_layout
from tracedbg.formats.qemu import monitor as qemu_monitor
from tracedbg.formats.qemu.events import Events
from tracedbg.formats.qemu.monitor import Snapshot
from tracedbg.formats.qemu.order import Order
from tracedbg.formats.qemu.patterns import is_log
from tracedbg.formats.qemu.scan import Scan
from tracedbg.formats.qemu.stamps import SECOND
from tracedbg.formats.qemu.text import LogText
from tracedbg.formats.source import STDIN, Input, refuse_twice
from tracedbg.layout import Layout
from tracedbg.writer import TraceWriter

if TYPE_CHECKING:
    from tracedbg.formats import ReaderOptions

FORMAT = "qemu-int"

_FIDELITY = {
    "returns": "IRETs are not logged",
    "stores": "stores of software are not logged",
    "time": "the log has no time; -msg timestamp=on gives it, up to QEMU 10.1 only to trace events",
    "source": "LAPIC and 8259 interrupts cannot be told apart (external); -d trace:apic_*,trace:pic_* would tell",
    "ss": "QEMU zeroes SS on every IST switch",
    "rf": "RF in a pushed RFLAGS is the version's choice: QEMU 7.2 clears it, 10.0 sets it for faults and interrupts",
    "failed": "a v= line is an attempt; a failed one is known by the event after it",
}


def sniff(head: bytes) -> bool:
    """Whether a text begins like a QEMU log."""
    return is_log(head)


def read(inputs: Sequence[Input], writer: TraceWriter, options: ReaderOptions, *, native: bool = True) -> None:
    """Read the log (several inputs: one file a vCPU thread) into the writer, with layout and META.

    `native` False: without the scanner in C, for the tests to compare.
    """
    refuse_twice(inputs)
    snapshots, skipped = _snapshots(inputs[0], options)
    events = Events(inputs[0].path, writer, snapshots, options.layout or Layout())
    order = Order(events)
    # Files of threads are read line by line: the order of their events is known only then.
    scanner = Scan(order) if len(inputs) == 1 and native else None
    texts = [LogText(scanner) for _ in inputs]
    streams = [text.items(source.chunks()) for text, source in zip(texts, inputs, strict=True)]
    if len(inputs) == 1:
        order.run(streams[0])
    else:
        order.run_threads(streams)
    for text, source in zip(texts, inputs, strict=True):
        if not text.seen:
            raise FormatError(source.path, "not a QEMU -d int log", 0)
        events.counts.update(text.counts)
    if scanner is not None:
        scanner.finish()
    events.close()
    attempts = sum(text.causes.heads for text in texts)
    layout, told = qemu_layout.resolve(events, snapshots, options, attempts > events.counts["legacy"])
    if skipped:
        told["skipped"] = skipped
    seen = events.cpus.seen
    writer.cpus = max(len(seen), *(n + 1 for n in seen), len(layout.cpus), 1)
    writer.clock_hz = SECOND if any(text.stamps.any for text in texts) else 0
    writer.layout = layout
    writer.symbols = options.symbols or writer.symbols
    writer.meta = {
        **writer.meta,
        "source": _source(inputs, texts),
        "counts": {**_counts(events), **_asked(texts)},
        "fidelity": _fidelity(events, options, texts, attempts),
        "layout": told,
    }


def _snapshots(source: Input, options: ReaderOptions) -> tuple[list[Snapshot], list[str]]:
    """The monitor texts given, or those beside the log; and the names of files that only look like such."""
    if STDIN in options.monitor and (source.path == STDIN or options.monitor.count(STDIN) > 1):
        raise UsageError("standard input can only be read once")
    if options.monitor:
        return [qemu_monitor.read(path) for path in options.monitor], []
    if not source.is_file or not options.discover:
        return [], []
    folder = os.path.dirname(source.path)
    try:
        names = sorted(n for n in os.listdir(folder or ".") if n.startswith("mon_") and n.endswith(".txt"))
    except OSError:
        return [], []  # a folder that may not be listed: as if nothing lay there
    found, skipped = [], []
    for name in names:
        try:
            found.append(qemu_monitor.read(os.path.join(folder, name)))
        except FormatError:
            skipped.append(name)
    return found, skipped


def _source(inputs: Sequence[Input], texts: Sequence[LogText]) -> dict[str, Any]:
    files: list[dict[str, Any]] = [
        {"name": source.name, "sha256": source.sha256, "bytes": source.bytes, "lines": text.lines}
        for source, text in zip(inputs, texts, strict=True)
    ]
    result: dict[str, Any] = {"format": FORMAT, **files[0]}
    if len(files) > 1:
        result["files"] = files
        result["bytes"] = sum(source.bytes for source in inputs)
        result["lines"] = sum(text.lines for text in texts)
    return result


def _counts(events: Events) -> dict[str, int]:
    counts = {name: n for name, n in sorted(events.counts.items()) if n}
    unlogged = counts.pop("serviced", 0) - counts.pop("serviced_delivered", 0)
    if unlogged > 0:
        counts["serviced_unlogged"] = unlogged  # real mode: no `v=` line
    for name in ("torn_repaired", "torn_lost", "damaged", "other_lines"):
        counts.setdefault(name, 0)
    return counts


def _asked(texts: Sequence[LogText]) -> dict[str, int]:
    """Requests for NMIs in the trace lines, by way: they may have been masked, or held and merged."""
    asked: Counter[str] = Counter()
    for text in texts:
        asked.update(text.requests.asked)
    return {f"nmi_{way}": number for way, number in sorted(asked.items())}


def _fidelity(events: Events, options: ReaderOptions, texts: Sequence[LogText], attempts: int) -> dict[str, str]:
    told = dict(_FIDELITY)
    if events.counts["returns"]:
        where = "the given ranges" if options.stores else "ranges that the log does not name"
        told["returns"] = "every IRET is recorded by the plugin"
        told["stores"] = f"stores are recorded in {where}"
    if any(text.stamps.lines for text in texts):
        told["time"] = "wall clock, of the v= line itself"
    elif any(text.stamps.traces for text in texts):
        told["time"] = "wall clock, of the last trace line before the event; none before the first"
    if any(text.requests.told for text in texts):
        told["source"] = "fixed (LAPIC) and extint (8259) by the apic_* and pic_* trace lines; external where these do not tell"
    if mode := _mode(events, attempts, any(text.bare for text in texts)):
        told["mode"] = mode
    if len(events.cpus.seen) > 1:
        told["cpu"] = "told apart by TR base; numbers as in the monitor text, else by first appearance"
    return told


def _mode(events: Events, attempts: int, bare: bool) -> str:
    """What is not in long mode, and so not judged."""
    legacy, unlogged = events.counts["legacy"], events.counts["serviced"] - events.counts["serviced_delivered"]
    said = []
    if bare:
        said.append("no register dumps: long mode is assumed; RFLAGS, TR and IDT are unknown")
    if legacy:
        which = "all deliveries are" if legacy == attempts else f"{legacy:,} of {attempts:,} deliveries are"
        said.append(f"{which} in 32-bit mode: counted, not judged")
    if unlogged > 0:
        said.append(f"{unlogged:,} interrupt{'' if unlogged == 1 else 's'} without a v= line: real mode has none")
    return "; ".join(said)
