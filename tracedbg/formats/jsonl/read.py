"""JSON Lines into a native trace: a header line, then an event a line (`tracedbg help jsonl`)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tracedbg import wire
from tracedbg.errors import FormatError, UsageError
from tracedbg.formats.jsonl import layout as jsonl_layout
from tracedbg.formats.jsonl.event import Events, LineError, NotJson, hexed, number, parse, shown
from tracedbg.formats.jsonl.fields import EVENT_KEYS, HEADER_KEYS, MAX_LINE, VERSION
from tracedbg.formats.source import Input
from tracedbg.layout import REGION_STORES, Layout, Region
from tracedbg.state import Kind, Known
from tracedbg.trace import MemoryRange
from tracedbg.writer import TraceWriter

if TYPE_CHECKING:
    from tracedbg.formats import ReaderOptions

FORMAT = "jsonl"
_U64 = (1 << 64) - 1
_FIRST = re.compile(rb'[ \t\r]*\{[ \t\r]*"tracedbg"[ \t\r]*:')
_CPU, _K_CPU = 26, int(Known.CPU)  # in u16 of a record: cpu; `known` is three further
_WORDS = wire.EVENT_SIZE // 2


def sniff(head: bytes) -> bool:
    """Whether the first line is a header: an object with the key `tracedbg`, which no report of this program has."""
    if _FIRST.match(head):
        return True
    line, newline, _ = head.partition(b"\n")
    if not newline or not line.lstrip().startswith(b"{") or b'"tracedbg"' not in line:
        return False
    try:
        return "tracedbg" in parse(line.decode())
    except ValueError:
        return False


def read(inputs: Sequence[Input], writer: TraceWriter, options: ReaderOptions) -> None:
    """Read the lines into the writer. Raises FormatError with line and offset; what is cut short ends in a gap."""
    if len(inputs) > 1:
        raise UsageError("JSON Lines hold all CPUs in one file; several files are not one recording")
    source = inputs[0]
    reader = _Reader(source, writer, options)
    cut = reader.run()
    reader.finish()
    damage = [] if cut is None else [cut]
    if reader.meta is None:
        writer.meta = {
            "source": {"format": FORMAT, "name": source.name, "sha256": source.sha256, "bytes": source.bytes}, **writer.meta
        }  # fmt: skip
    if damage:
        writer.event(Kind.GAP)  # of all CPUs: nobody knows whose events would have come
        told = writer.meta.get("damage")
        writer.meta = {**writer.meta, "damage": [*(told if isinstance(told, list) else []), *damage]}


class _Reader:
    """Goes through the lines of one file."""

    def __init__(self, source: Input, writer: TraceWriter, options: ReaderOptions) -> None:
        self.meta: dict[str, Any] | None = None
        self._source = source
        self._writer = writer
        self._options = options
        self._events = Events(writer.payload)
        self._rows: list[bytes] = []
        self._line = 0  # lines before those that are being read
        self._offset = 0  # of the first of those
        self._cpus = 0  # said by the header
        self._top = 0  # the greatest CPU of an event
        self._promised = self._ended = False
        self._layout: Layout | None = None
        self._layout_hex: list[bytes] = []
        self._meta_text: list[str] = []
        self._meta_size = 0
        self._symbols: list[bytes] = []
        self._memory: list[tuple[int, bytearray]] = []
        self._begun = self._settled = False
        self._sections = {
            "tracedbg": self._second, "kind": self._event, "memory": self._range, "bytes": self._bytes,
            "symbols": self._symbol_lines, "symbols_hex": self._symbol_bytes, "meta": self._meta, "meta_text": self._meta_part,
            "layout_hex": self._layout_part, "end": self._end,
        }  # fmt: skip

    def run(self) -> str | None:
        """Read all lines; returns what to say if they are cut short."""
        rest = b""
        for piece in self._source.chunks():
            rest += piece
            size = rest.rfind(b"\n") + 1
            if size:
                self._block(rest[:size])
                rest = rest[size:]
            self._check_length(len(rest), 0)
        if rest.strip():
            try:
                self._lines([self._decode(rest)], last=True)
            except NotJson as error:
                if not self._line or not error.cut:
                    raise self._fail(str(error)) from None
                return f"line {self._line + 1} is cut short"
        if not self._line:
            raise FormatError(self._source.path, "no header line", 0)
        if self._promised and not self._ended:
            return f"cut short behind line {self._line}: the header promises a line with `end`"
        return None

    # -- lines ----------------------------------------------------------------------------------------------------------

    def _block(self, block: bytes) -> None:
        """Whole lines."""
        if len(block) > MAX_LINE:
            for at, line in enumerate(block.split(b"\n")):
                self._check_length(len(line), at)
        try:
            text = block.decode()
        except UnicodeDecodeError as error:
            whole = block.rfind(b"\n", 0, error.start) + 1
            self._block(block[:whole])  # an earlier line may be wrong, too
            raise self._fail("not UTF-8 text", error.start - whole) from None
        self._lines(text.split("\n")[:-1])
        self._offset += len(block)

    def _check_length(self, size: int, at: int) -> None:
        if size > MAX_LINE:
            self._line += at
            raise FormatError(self._source.path, f"line {self._line + 1} is longer than {MAX_LINE >> 20} MiB", self._offset)

    def _decode(self, line: bytes) -> str:
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                raise NotJson("not UTF-8 text", cut=True) from None
            raise self._fail("not UTF-8 text", error.start) from None

    def _lines(self, lines: list[str], last: bool = False) -> None:
        at = 0
        try:
            while at < len(lines):
                if self._begun and not self._ended:
                    at = self._events.take(lines, at, self._rows)
                if at < len(lines):
                    self._other(lines[at])
                    at += 1
        except NotJson as error:
            if last:
                raise
            raise self._at(lines, at, str(error)) from None
        except LineError as error:
            raise self._at(lines, at, str(error)) from None
        except FormatError as error:  # of a part that knows no lines
            raise self._at(lines, at, error.message) from None
        self._line += len(lines)
        self._flush()

    def _at(self, lines: list[str], at: int, message: str) -> FormatError:
        self._line += at
        return self._fail(message, sum(len(line.encode()) + 1 for line in lines[:at]))

    def _fail(self, message: str, behind: int = 0) -> FormatError:
        return FormatError(self._source.path, f"line {self._line + 1}: {message}", self._offset + behind)

    def _flush(self) -> None:
        if not self._rows:
            return
        self._settle()
        rows = b"".join(self._rows)
        self._rows.clear()
        if not self._cpus:
            words = memoryview(rows).cast("H")
            top = max(words[_CPU::_WORDS])
            if top > self._top:
                known = (words[at] for at in range(_CPU, len(words), _WORDS) if words[at + 3] & _K_CPU)
                self._top = max(self._top, max(known, default=0))
                if self._top >= wire.MAX_CPUS:
                    raise self._fail(f"CPU {self._top}: there are at most {wire.MAX_CPUS}")
        self._writer.append(rows)

    def _other(self, line: str) -> None:
        """A line that is not a plain event."""
        if not line or line.isspace():
            return
        value = parse(line)
        if not self._begun:
            self._header(value)
            return
        if self._ended:
            raise LineError("a line behind that with `end`")
        name = next((key for key in self._sections if key in value), None)
        if name is None:
            raise LineError(f"neither an event (it has no 'kind') nor one of {', '.join([*self._sections][2:])}")
        allowed = {"kind": EVENT_KEYS, "memory": ("memory", "bytes", "continued")}.get(name, (name,))
        for key in value:
            if key not in allowed:
                raise LineError(f"unknown key {shown(key)} in a line of {name!r} (known: {', '.join(allowed)})")
        self._sections[name](value)

    # -- what they say --------------------------------------------------------------------------------------------------

    def _header(self, value: dict[str, Any]) -> None:
        if "tracedbg" not in value:
            raise LineError('not a header, like {"tracedbg": 1, "cpus": 2}')
        version = number(value["tracedbg"], 32, "tracedbg")
        if version != VERSION:
            raise LineError(f"version {version} of the format is not known (this program reads {VERSION})")
        for key in value:
            if key not in HEADER_KEYS:
                raise LineError(f"unknown key {shown(key)} (a header's: {', '.join(HEADER_KEYS)})")
        if "cpus" in value:
            self._cpus = number(value["cpus"], 16, "cpus")
            if not 1 <= self._cpus <= wire.MAX_CPUS:
                raise LineError(f"cpus: {self._cpus} is not 1 to {wire.MAX_CPUS}")
        self._writer.clock_hz = number(value.get("clock_hz", 0), 64, "clock_hz")
        if "end" in value and not isinstance(value["end"], bool):
            raise LineError("end is not true or false")
        self._promised = value.get("end", False)
        if "layout" in value:
            self._take_layout(jsonl_layout.from_json(value["layout"], self._source.path))
        self._writer.cpus = self._cpus or 1
        self._begun = True

    def _take_layout(self, layout: Layout) -> None:
        if self._options.layout is not None:
            raise UsageError("the input has its own layout; convert it to a .tdbg to put another one on top")
        if self._cpus and len(layout.cpus) > self._cpus:
            raise LineError(f"the layout has {len(layout.cpus)} CPUs, the header {self._cpus}")
        self._layout = self._writer.layout = layout

    def _event(self, value: dict[str, Any]) -> None:
        self._rows.append(self._events.record(value))

    def _bytes(self, value: dict[str, Any]) -> None:
        self._writer.payload(hexed(value["bytes"], "bytes"))

    def _range(self, value: dict[str, Any]) -> None:
        addr, data = number(value["memory"], 64, "memory"), hexed(value.get("bytes"), "bytes")
        if addr + len(data) > 1 << 64:
            raise LineError("memory: past the end of the address space")
        more = value.get("continued", False)
        if not isinstance(more, bool):
            raise LineError("continued is not true or false")
        if not more:
            self._memory.append((addr, bytearray(data)))
        elif self._memory and self._memory[-1][0] + len(self._memory[-1][1]) == addr:
            self._memory[-1][1].extend(data)
        else:
            raise LineError("continued: no range ends at this address")

    def _symbol_lines(self, value: dict[str, Any]) -> None:
        lines = value["symbols"]
        if not isinstance(lines, list) or not all(isinstance(line, str) and "\n" not in line for line in lines):
            raise LineError("symbols is not a list of lines")
        try:
            self._symbols.append("".join(f"{line}\n" for line in lines).encode())
        except UnicodeEncodeError:
            raise LineError("symbols: half of a surrogate pair") from None

    def _symbol_bytes(self, value: dict[str, Any]) -> None:
        self._symbols.append(hexed(value["symbols_hex"], "symbols_hex"))

    def _meta(self, value: dict[str, Any]) -> None:
        if self.meta is not None or self._meta_text:
            raise LineError("a second line of 'meta'")
        if not isinstance(value["meta"], dict):
            raise LineError("meta is not an object")
        self.meta = self._writer.meta = value["meta"]

    def _meta_part(self, value: dict[str, Any]) -> None:
        text = value["meta_text"]
        if not isinstance(text, str):
            raise LineError("meta_text is not a text")
        if self._settled or self._rows or self.meta is not None:
            raise LineError("'meta_text' behind an event, or besides 'meta'")
        self._meta_size += len(text)
        if self._meta_size > wire.MAX_META:
            raise LineError(f"meta_text: more than {wire.MAX_META >> 20} MiB")
        self._meta_text.append(text)

    def _layout_part(self, value: dict[str, Any]) -> None:
        if self._settled or self._rows or self._layout is not None:
            raise LineError("'layout_hex' behind an event, or besides the layout of the header")
        self._layout_hex.append(hexed(value["layout_hex"], "layout_hex"))

    def _end(self, value: dict[str, Any]) -> None:
        if value["end"] is not True:
            raise LineError("end is not true")
        self._ended = True

    def _second(self, value: dict[str, Any]) -> None:
        raise LineError("a second header")

    def finish(self) -> None:
        """What may come anywhere, and is whole only at the end."""
        self._settle()
        writer = self._writer
        writer.cpus = self._cpus or self._top + 1
        writer.symbols = b"".join(self._symbols) or self._options.symbols
        writer.memory = [MemoryRange(addr, bytes(data)) for addr, data in self._memory]

    def _settle(self) -> None:
        """What stands before the first event goes into the file before it: there it is from the first moment on."""
        if self._settled:
            return
        self._settled = True
        writer, options = self._writer, self._options
        try:
            if self._layout_hex:
                self._take_layout(Layout.from_bytes(b"".join(self._layout_hex), "", 0))
            if self._meta_text:
                self.meta = writer.meta = _whole_meta("".join(self._meta_text))
        except (FormatError, LineError) as error:
            raise self._fail(error.message if isinstance(error, FormatError) else str(error)) from None
        layout = writer.layout if self._layout is not None else (options.layout or Layout()).with_stacks()
        if options.stores:
            added = tuple(Region(lo, min(hi, _U64), REGION_STORES) for lo, hi in options.stores)
            layout = replace(layout, regions=(*layout.regions, *added))
        writer.layout = layout
        writer.symbols = b"".join(self._symbols) or options.symbols


def _whole_meta(text: str) -> dict[str, Any]:
    try:
        meta = json.loads(text)
    except RecursionError:
        raise LineError("meta_text is nested too deeply") from None
    except ValueError:
        raise LineError("meta_text is not JSON") from None
    if not isinstance(meta, dict):
        raise LineError("meta_text is not a JSON object")
    return meta
