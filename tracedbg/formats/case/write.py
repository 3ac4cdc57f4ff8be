"""Writing a trace as a case file: the canonical form, from which the trace comes back byte for byte."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, TextIO

from tracedbg import wire
from tracedbg.errors import UsageError
from tracedbg.formats.case import blocks, text
from tracedbg.formats.case.events import MAX_INLINE
from tracedbg.formats.case.fields import (
    ALL_KNOWN,
    DECIMAL,
    FIELDS,
    FLAGS,
    GATE_BITS,
    GATE_TYPES,
    KINDS,
    PLAIN,
    SHAPES,
    SOURCES,
    deliver_names,
)
from tracedbg.formats.case.read import FIDELITY, REGIONS, STACKS, Settings, symbol_bytes
from tracedbg.formats.case.text import CaseText
from tracedbg.layout import SLOT_RSP0, Layout, Region, to_toml
from tracedbg.state import EventFlag, Kind, Known
from tracedbg.trace import Trace

if TYPE_CHECKING:
    from tracedbg.formats import WriterOptions

_KIND_WORDS = {int(kind): word for word, kind in KINDS.items()}
_SOURCE_WORDS = {number: word for word, number in SOURCES.items()}
_PLACES = ("time", "rip", "rsp", "addr", "value", "rflags", "code", "source_index", "cpu", "cs", "ss")  # in the record
_BYTES = int(EventFlag.BYTES)
_INLINE = int(Known.VALUE | Known.CODE)
_CPU, _CODE = int(Known.CPU), int(Known.CODE)


def write(trace: Trace, path: str, options: WriterOptions) -> None:
    """As registry.Writer."""
    with open(path, "w", encoding="utf-8", newline="\n") as out:
        write_text(trace, out, symbols=options.names)


def write_text(trace: Trace, out: TextIO, *, symbols: bytes | None = None) -> None:
    """Write the trace; `symbols`: instead of its own. Raises UsageError if it is too large for a case file."""
    size = 0
    for number, line in enumerate(_lines(trace, trace.symbols if symbols is None else symbols), 1):
        size += len(line.encode()) + 1
        if size > text.MAX_TEXT or number > text.MAX_LINES:
            limit = f"{text.MAX_TEXT >> 20} MiB of text or {text.MAX_LINES:,} lines"
            raise UsageError(f"the trace is too large for a case file (more than {limit})")
        out.write(f"{line}\n")


def _lines(trace: Trace, symbols: bytes) -> Iterator[str]:
    if len(trace.payload) + sum(len(m.data) for m in trace.memory) > blocks.MAX_BYTES:
        raise UsageError(f"the trace is too large for a case file (more than {blocks.MAX_BYTES >> 20} MiB of memory)")
    meta = dict(trace.meta)
    meta.pop("stack_names", None)  # they are those of the layout
    case = text.from_meta(meta.get(text.META_KEY), trace.count)
    if case is not None:
        del meta[text.META_KEY]
    case = case or CaseText()
    events = Lines(trace, case)
    yield text.FIRST_LINE
    yield from text.head_lines(case)
    keys, layout, named = _layout_lines(trace)
    if trace.layout.names and not named:
        meta["stack_names"] = {str(slot): name for slot, name in trace.layout.names.items()}
    yield from keys
    yield from layout
    if trace.memory:
        yield from _section(text.MEMORY)
        yield from blocks.range_lines(trace.memory)
    yield from _section(text.EVENTS)
    yield from events
    if case.expect:
        yield from _section(text.EXPECT)
        yield from case.expect
    if len(trace.payload) and not events.inline:
        yield from _section(text.BYTES)
        yield from blocks.rows(0, bytes(trace.payload))
    if meta:
        yield from _section(text.META)
        yield from _meta_lines(meta)
    yield from _symbol_lines(symbols)


def _section(name: str) -> tuple[str, str]:
    return "", f"[{name}]"


def _meta_lines(meta: dict[str, object]) -> list[str]:
    for indent in (1, None):  # the encoder of one line reaches deeper
        try:
            return json.dumps(meta, sort_keys=True, indent=indent).split("\n")
        except RecursionError:
            continue
    raise UsageError("META is nested too deeply for a case file")


def _symbol_lines(symbols: bytes) -> Iterator[str]:
    if not symbols:
        return
    try:
        lines = symbols.decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError:
        lines = []
    if all(text.plain(line) and line == line.rstrip() and line[:1] != "[" for line in lines) and symbol_bytes(lines) == symbols:
        yield from _section(text.SYMBOLS)
        yield from lines
    else:
        yield from _section(text.SYMBOLS_HEX)
        yield from blocks.rows(0, symbols)


# -- [trace] and [layout] -----------------------------------------------------------------------------------------------


def _layout_lines(trace: Trace) -> tuple[list[str], list[str], bool]:
    """[trace] and [layout], and whether the names of the stacks are in them.

    The shortest of several forms that gives the layout back: the reader says whether it does.
    """
    layout = trace.layout
    settings = [f"cpus = {trace.cpus}"]
    if trace.clock_hz:
        settings.append(f"clock_hz = {trace.clock_hz}")
    listed = replace(layout, regions=tuple(r for r in layout.regions if not r.assumed))
    for names in (layout.names, {}):
        wanted = replace(layout, names=names)
        for given, stacks in ((listed, STACKS[0]), (layout, STACKS[0]), (layout, STACKS[1])):
            body = to_toml(given).strip("\n").split("\n") if given != Layout() else []
            if names and "[names]" not in body:
                body += ["", *_name_lines(names)]
            keys = [*settings, *_completing(wanted), *([f'stacks = "{stacks}"'] if stacks != STACKS[0] else [])]
            if _reads_as(keys, body, wanted):
                return [f"[{text.TRACE}]", *keys], [*_section(text.LAYOUT), *body] if body else [], bool(names)
    return [f"[{text.TRACE}]", *settings], [*_section(text.LAYOUT_HEX), *blocks.rows(0, layout.to_bytes())], False


def _reads_as(keys: list[str], body: list[str], layout: Layout) -> bool:
    try:
        return Settings(text.Section(text.TRACE, 1, keys)).layout(text.Section(text.LAYOUT, 1, body)) == layout
    except text.LineError:
        return False


def _by_kind(regions: list[Region]) -> list[Region]:
    """In the usual order: by kind, those of one kind as they are."""
    order = list(REGIONS.values())
    return sorted(regions, key=lambda r: order.index(r.kind))


def _completing(layout: Layout) -> list[str]:
    """The lines of [trace] for what the TOML does not say."""
    lines = []
    words = [word for word, bit in FIDELITY.items() if layout.fidelity & bit]
    if words:
        lines.append(f"fidelity = {json.dumps(words)}")
    for name in ("stores", "reads"):
        ranges = [[f"{r.lo:#x}", f"{r.hi:#x}"] for r in layout.regions if r.kind == REGIONS[name]]
        if ranges:
            lines.append(f"{name} = {json.dumps(ranges)}")
    if _by_kind(list(layout.regions)) != list(layout.regions):
        word_of = {kind: name for name, kind in REGIONS.items()}
        runs = [(word_of[kind], len(list(run))) for kind, run in groupby(r.kind for r in layout.regions)]
        lines.append(f"regions = {json.dumps([f'{word} {count}' for word, count in runs])}")
    return lines


def _name_lines(names: dict[int, str]) -> list[str]:
    keys = {SLOT_RSP0: "rsp0", **{n: f"ist{n}" for n in range(1, 8)}}
    return ["[names]", *(f"{keys[slot]} = {_quoted(name)}" for slot, name in sorted(names.items()) if slot in keys)]


def _quoted(name: str) -> str:
    """A TOML basic string, in printable ASCII."""
    return '"' + "".join(ch if " " <= ch <= "~" and ch not in '"\\' else f"\\U{ord(ch):08x}" for ch in name) + '"'


# -- [events] -----------------------------------------------------------------------------------------------------------


class Lines:
    """The lines of [events]. `inline`: all bytes of the payload stand in the lines of the events that use them."""

    def __init__(self, trace: Trace, case: CaseText) -> None:
        self.trace = trace
        self.case = case
        self._labels = {index: label for label, index in case.labels.items()}
        self._at = 0  # bytes of the payload written so far
        self.inline = False
        if len(trace.payload):
            self.inline = True
            for index in range(trace.count):
                self._inlined(index)
            self.inline = self._at == len(trace.payload)
            self._at = 0

    def __iter__(self) -> Iterator[str]:
        for index in range(self.trace.count + 1):
            for line in self.case.comments.get(index, ()):
                yield f"# {line}" if line else ""
            if index < self.trace.count:
                yield self._line(index)

    def _inlined(self, index: int) -> str | None:
        """The bytes of an event as hex, if they can stand in its line."""
        known, kind, _, _, flags = wire_tail(self.trace, index)
        if not self.inline or not flags & _BYTES or kind not in (Kind.WRITE, Kind.READ) or known & _INLINE != _INLINE:
            return None
        values = wire.EVENT_PACK.unpack_from(self.trace.events, index * wire.EVENT_SIZE)
        value, code = values[4], values[6]
        if value != self._at or not 0 < code <= min(MAX_INLINE, len(self.trace.payload) - value):
            return None
        self._at += code
        return bytes(self.trace.payload[value : value + code]).hex()

    def _line(self, index: int) -> str:
        numbers = wire.EVENT_PACK.unpack_from(self.trace.events, index * wire.EVENT_SIZE)
        values = dict(zip(_PLACES, numbers, strict=False))
        known, kind, values["arg"], values["source"], flags = wire_tail(self.trace, index)
        shape = SHAPES.get(kind, PLAIN)
        names = dict(shape.aliases)
        if kind == Kind.DELIVER:
            names = deliver_names(values["arg"], values["source"])
        words = [f"{self._labels[index]}:"] if index in self._labels else []
        words.append(_KIND_WORDS.get(kind) or f"kind {kind}")
        done = {*(shape.after or ())}
        if shape.first is not None:
            done.add(shape.first)
            value, is_known = values[shape.first], known & FIELDS[shape.first][0]
            if is_known and value in shape.names:
                words.append(shape.names[value])
            else:
                words += _operand(shape.first, value, bool(is_known))
        data = self._inlined(index)
        if data is not None:
            words.append(f"bytes {data}")
            done |= {"value", "code"}
            flags &= ~_BYTES
        for word, bit in FLAGS.items():
            if flags & bit:
                words.append(word)
                flags &= ~bit
        words += self._fields(values, known, kind, names, done)
        if shape.after:
            behind = [w for name in shape.after for w in _named(shape.after[name], name, values[name], known)]
            words += ["->", *behind] if behind else []
        if flags:
            words.append(f"flags {flags:#x}")
        if known & ~ALL_KNOWN:
            words.append(f"known {known & ~ALL_KNOWN:#x}")
        line = " ".join(words)
        return f"{line} # {self.case.notes[index]}" if index in self.case.notes else line

    def _fields(self, values: dict[str, int], known: int, kind: int, names: dict[str, str], done: set[str]) -> Iterator[str]:
        """The named fields before `->`."""
        for name in FIELDS:
            if name in done:
                continue
            if name == "cpu" and not values[name] and (self.trace.cpus == 1 or not known & _CPU):
                if not known & _CPU:
                    yield "cpu ?"
                continue
            if name == "code" and kind == Kind.GATE and known & _CODE and _is_plain_gate(values[name]):
                yield from _gate_words(values[name])
                continue
            yield from _named(names.get(name, "index" if name == "source_index" else name), name, values[name], known)


def wire_tail(trace: Trace, index: int) -> tuple[int, int, int, int, int]:
    """known, kind, arg, source, flags of a record."""
    at = index * wire.EVENT_SIZE + 58
    raw = trace.events[at : at + 6]
    return raw[0] | raw[1] << 8, raw[2], raw[3], raw[4], raw[5]


def _named(word: str, name: str, value: int, known: int) -> Iterator[str]:
    for operand in _operand(name, value, bool(known & FIELDS[name][0])):
        yield f"{word} {operand}"


def _operand(name: str, value: int, known: bool) -> Iterator[str]:
    """`5`; `?5` for a value that is there but not known; nothing for an unknown field that is 0."""
    if not known and not value:
        return
    shown = f"{value}" if name in DECIMAL else f"{value:#x}"
    if name == "source":
        shown = _SOURCE_WORDS.get(value, shown)
    yield shown if known else f"?{shown}"


def _is_plain_gate(code: int) -> bool:
    return not code & ~GATE_BITS and code >> 8 & 15 in GATE_TYPES


def _gate_words(code: int) -> Iterator[str]:
    yield f"ist {code & 7}"
    if GATE_TYPES[code >> 8 & 15] != "interrupt":
        yield f"type {GATE_TYPES[code >> 8 & 15]}"
    if code >> 13 & 3:
        yield f"dpl {code >> 13 & 3}"
    if not code >> 15 & 1:
        yield "absent"
