"""Writing a trace as JSON Lines, from which it comes back byte for byte (`tracedbg help jsonl`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TextIO

from tracedbg import wire
from tracedbg.errors import UsageError
from tracedbg.formats.jsonl.event import depth
from tracedbg.formats.jsonl.fields import (
    ALL_FLAGS,
    BYTES,
    CHUNK,
    FIELDS,
    FLAGS,
    FLAGS_PLACE,
    INLINE,
    KIND_PLACE,
    KIND_WORDS,
    KNOWN_PLACE,
    MAX_DEPTH,
    MAX_INLINE,
    MAX_LINE,
    MAX_SAFE,
    SOURCE_WORDS,
    VERSION,
)
from tracedbg.formats.jsonl.layout import to_json
from tracedbg.state import Kind
from tracedbg.trace import Trace

if TYPE_CHECKING:
    from tracedbg.formats import WriterOptions

STEP = 1 << 14  # events taken at a time
_MOST_SHAPES = 4096
_ROOM = MAX_LINE - (64 << 10)  # for one value of a line

_Record = tuple[int, ...]


def write(trace: Trace, path: str, options: WriterOptions) -> None:
    """As registry.Writer."""
    with open(path, "w", encoding="ascii", newline="\n") as out:
        write_text(trace, out, symbols=options.names, progress=options.progress)


def write_text(
    trace: Trace, out: TextIO, *, symbols: bytes | None = None, progress: Callable[[int, int], None] | None = None
) -> None:
    """Write the trace; `symbols`: instead of its own. Raises UsageError if META cannot be written."""
    for line in _head_lines(trace, trace.symbols if symbols is None else symbols):
        out.write(f"{line}\n")
    events = Lines(bytes(trace.payload))
    for at in range(0, len(trace.events), STEP * wire.EVENT_SIZE):
        lines = events.of(trace.events[at : at + STEP * wire.EVENT_SIZE])
        out.write("\n".join(lines))
        out.write("\n")
        if progress is not None:
            progress(at // wire.EVENT_SIZE, trace.count)
    for data in _chunks(events.rest()):
        out.write(f'{{"bytes": "{data.hex()}"}}\n')
    out.write('{"end": true}\n')


def _head_lines(trace: Trace, symbols: bytes) -> Iterator[str]:
    layout = to_json(trace.layout)
    header: dict[str, Any] = {"tracedbg": VERSION, "cpus": trace.cpus}
    if trace.clock_hz:
        header["clock_hz"] = trace.clock_hz if trace.clock_hz <= MAX_SAFE else f"{trace.clock_hz:#x}"
    if layout and len(json.dumps(layout)) <= _ROOM:
        header["layout"] = layout
    yield json.dumps({**header, "end": True})
    meta = dict(trace.meta)
    meta.pop("stack_names", None)  # they are those of the layout
    if layout is None or (layout and "layout" not in header):
        for data in _chunks(trace.layout.to_bytes()):
            yield f'{{"layout_hex": "{data.hex()}"}}'
        if trace.layout.names:
            meta["stack_names"] = {str(slot): name for slot, name in trace.layout.names.items()}
    yield from _meta_lines(meta)
    for memory in trace.memory:
        for at in range(0, max(len(memory.data), 1), CHUNK):
            more = ', "continued": true' if at else ""
            yield f'{{"memory": "{memory.addr + at:#x}", "bytes": "{memory.data[at : at + CHUNK].hex()}"{more}}}'
    yield from _symbol_lines(symbols)


def _meta_lines(meta: dict[str, Any]) -> Iterator[str]:
    """One line, if every JSON reader takes it; else its text in parts."""
    try:
        text = json.dumps(meta, sort_keys=True)
        if depth(meta) < MAX_DEPTH and len(text) <= _ROOM:
            yield '{"meta": ' + json.dumps(meta, sort_keys=True, allow_nan=False) + "}"
            return
    except RecursionError:
        raise UsageError("META is nested too deeply for JSON Lines") from None
    except ValueError:  # infinite numbers are not JSON
        pass
    text = json.dumps(meta, sort_keys=True, separators=(",", ":"))
    for at in range(0, len(text), CHUNK):
        yield json.dumps({"meta_text": text[at : at + CHUNK]})


def _symbol_lines(symbols: bytes) -> Iterator[str]:
    try:
        lines = symbols.decode().removesuffix("\n").split("\n") if symbols.endswith(b"\n") else []
    except UnicodeDecodeError:
        lines = []
    if not lines or max(map(len, lines)) > CHUNK:
        for data in _chunks(symbols):
            yield f'{{"symbols_hex": "{data.hex()}"}}'
        return
    for at in range(0, len(lines), 32):
        yield json.dumps({"symbols": lines[at : at + 32]})


def _chunks(data: bytes) -> Iterator[bytes]:
    for at in range(0, len(data), CHUNK):
        yield data[at : at + CHUNK]


class Lines:
    """The lines of events, in order. Bytes of the payload stand in the line of the event that uses them next."""

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        self._at = 0  # bytes of it that stand in lines already
        self._shapes: dict[tuple[int, int, int, int], _Shape] = {}

    def rest(self) -> bytes:
        """What no event's line had."""
        return self._payload[self._at :]

    def of(self, records: memoryview) -> list[str]:
        """The lines of these records."""
        lines: list[str] = []
        add, shapes = lines.append, self._shapes
        for record in wire.EVENT_PACK.iter_unpack(records):
            key = (record[11], record[12], record[14], record[15])
            try:
                shape = shapes[key]
            except KeyError:
                shape = self._shape(key)
            if record[0] > MAX_SAFE or shape.hidden(record) != shape.zeros or shape.inline:
                add(self._any(record))
            else:
                add(shape.text % shape.shown(record))
        return lines

    def _shape(self, key: tuple[int, int, int, int]) -> _Shape:
        shape = _Shape(*key)
        if len(self._shapes) < _MOST_SHAPES:
            self._shapes[key] = shape
        return shape

    def _any(self, record: _Record) -> str:
        """Any record: fields that hold something though they are not known, bytes."""
        known, kind, flags = record[KNOWN_PLACE], record[KIND_PLACE], record[FLAGS_PLACE]
        data = self._inline(record)
        more = ""
        if data is not None:
            flags &= ~BYTES
            more = _data(kind, data)
        printed, parts = 0, [_kind(kind)]
        for name, field in FIELDS.items():
            value = record[field.place]
            if (not value and not known & field.known) or (data is not None and name in ("value", "code")):
                continue
            printed |= field.known
            parts.append(f'"{name}": {_value(name, value)}')
        parts += _flags(flags)
        if data is not None:
            printed |= INLINE
        if printed != known:
            parts.append(f'"known": "{known:#x}"')
        return "{" + ", ".join(parts) + more + "}"

    def _inline(self, record: _Record) -> bytes | None:
        """The bytes of an event, if they are the next of the payload."""
        value, code = record[4], record[6]
        if not record[FLAGS_PLACE] & BYTES or record[KNOWN_PLACE] & INLINE != INLINE or value != self._at:
            return None
        if not 0 < code <= min(MAX_INLINE, len(self._payload) - value):
            return None
        self._at += code
        return self._payload[value : value + code]


class _Shape:
    """What the lines of records with the same known bits, kind, source and flags have in common.

    `text` with the parts that `shown` picks out of a record is its line, if those that `hidden` picks are `zeros`.
    """

    __slots__ = ("hidden", "inline", "shown", "text", "zeros")

    def __init__(self, known: int, kind: int, source: int, flags: int) -> None:
        names = [name for name, field in FIELDS.items() if known & field.known]
        places = [FIELDS[name].place for name in names if name != "source"]
        others = [field.place for name, field in FIELDS.items() if name not in names]
        parts = [_kind(kind)]
        for name in names:
            if name == "source":
                parts.append(f'"source": {_value(name, source)}')
            else:
                parts.append(f'"{name}": %d' if FIELDS[name].decimal else f'"{name}": "0x%x"')
        parts += _flags(flags)
        printed = sum(FIELDS[name].known for name in names)
        if printed != known:
            parts.append(f'"known": "{known:#x}"')
        self.text = "{" + ", ".join(parts) + "}"
        # Two places at least, so that a tuple comes out; kind and flags are those of the shape.
        self.shown: Callable[[_Record], Any] = itemgetter(*places) if len(places) > 1 else _few(places)
        self.hidden: Callable[[_Record], Any] = itemgetter(*others, KIND_PLACE, FLAGS_PLACE)
        self.zeros = (*[0] * len(others), kind, flags)
        self.inline = bool(flags & BYTES)


def _few(places: list[int]) -> Callable[[_Record], tuple[int, ...]]:
    return lambda record: tuple(record[place] for place in places)


def _kind(kind: int) -> str:
    word = KIND_WORDS.get(kind)
    return f'"kind": "{word}"' if word else f'"kind": {kind}'


def _value(name: str, value: int) -> str:
    if name == "source":
        return f'"{SOURCE_WORDS[value]}"' if value in SOURCE_WORDS else f"{value}"
    return f"{value}" if FIELDS[name].decimal and value <= MAX_SAFE else f'"{value:#x}"'


def _flags(flags: int) -> list[str]:
    if not flags:
        return []
    if flags & ~ALL_FLAGS:
        return [f'"flags": {flags}']
    return [f'"flags": {json.dumps([word for word, bit in FLAGS.items() if flags & bit])}']


def _data(kind: int, data: bytes) -> str:
    """A note as text, other bytes in hex."""
    if kind == Kind.MARK:
        try:
            return f', "text": {json.dumps(data.decode())}'
        except UnicodeDecodeError:
            pass
    return f', "bytes": "{data.hex()}"'
