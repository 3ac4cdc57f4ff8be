"""The JSON of Chrome's trace viewer ("Trace Event Format"), for ui.perfetto.dev, Speedscope and others.

Phases: M names of processes (CPUs) and threads (tracks), X slices, i instants, s t f flows. Times are microseconds. Slices of a
thread nest: those who read it move others elsewhere (perfetto.dev/docs/getting-started/other-formats).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from tracedbg import __version__
from tracedbg.export import tracks
from tracedbg.export.clock import Clock
from tracedbg.export.tracks import GROUP, Group, Item, Track
from tracedbg.trace import Trace

if TYPE_CHECKING:
    from tracedbg.formats import WriterOptions

_STEPS = "stf"


def write(trace: Trace, path: str, options: WriterOptions) -> None:
    """As registry.Writer."""
    clock = Clock(trace)
    with open(path, "w", encoding="ascii", newline="\n") as out:
        _write(out, trace, options, clock)


def _write(out: TextIO, trace: Trace, options: WriterOptions, clock: Clock) -> None:
    """One event a line."""
    head = {"tracedbg": __version__, "events": trace.count, "cpus": trace.cpus, "time": clock.axis.text}
    out.write(f'{{"displayTimeUnit": "ns",\n"otherData": {_json(head)},\n"traceEvents": [')
    between = "\n"
    for told in tracks.story(trace, options, clock):
        for line in _lines(told):
            out.write(between + line)
            between = ",\n"
    out.write("\n]}\n")


def _lines(told: tracks.Told) -> Iterator[str]:
    if isinstance(told, Group):
        place = f'"pid": {told.number}, "tid": {told.number * GROUP}'
        yield _meta("process_name", place, {"name": told.name})
        yield _meta("process_labels", place, {"labels": told.text})
        yield _meta("process_sort_index", place, {"sort_index": told.number})
    elif isinstance(told, Track):
        place = f'"pid": {told.group}, "tid": {told.number}'
        yield _meta("thread_name", place, {"name": told.name})
        yield _meta("thread_sort_index", place, {"sort_index": told.rank * GROUP + told.number % GROUP})
    else:
        yield from _item(told)


def _meta(what: str, place: str, args: dict[str, object]) -> str:
    return f'{{"ph": "M", {place}, "name": "{what}", "args": {_json(args)}}}'


def _item(item: Item) -> Iterator[str]:
    place = f'"pid": {item.track // GROUP}, "tid": {item.track}, "ts": {_micro(item.begin)}'
    head = f'"name": {_json(item.name)}, "cat": "{item.category}"'
    args = _json({name: f"{value:#x}" if is_address else value for name, value, is_address in item.args})
    if item.end is None:
        yield f'{{"ph": "i", "s": "t", {place}, {head}, "args": {args}}}'
        return
    yield f'{{"ph": "X", {place}, "dur": {_micro(item.end - item.begin)}, {head}, "args": {args}}}'
    for flow in item.flows:
        bind = ', "bp": "e"' if flow.step == 2 else ""
        yield f'{{"ph": "{_STEPS[flow.step]}", "id": {flow.number}, {place}, "name": "overwrite", "cat": "overwrite"{bind}}}'


def _micro(ns: int) -> str:
    """Nanoseconds as microseconds, exactly."""
    whole, part = divmod(ns, 1000)
    return f"{whole}.{part:03}".rstrip("0") if part else f"{whole}"


_json = json.JSONEncoder(ensure_ascii=True, allow_nan=False).encode  # json.dumps makes one at each call
