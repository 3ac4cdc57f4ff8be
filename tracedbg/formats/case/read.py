"""Case files: a trace, why it was made and what is expected of it, in one text file (`tracedbg help case`)."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tracedbg import wire
from tracedbg.errors import FormatError, UsageError
from tracedbg.formats.case import blocks, text
from tracedbg.formats.case.events import Reader
from tracedbg.formats.case.text import CaseText, LineError, Section
from tracedbg.formats.source import Input
from tracedbg.layout import REGION_READS, REGION_STACK, REGION_STORES, REGION_USER, Fidelity, Layout, Region, from_toml
from tracedbg.writer import TraceWriter

if TYPE_CHECKING:
    from tracedbg.formats import ReaderOptions

MAX_TOML = 8 << 20  # characters of a TOML section
FIDELITY = {
    "returns": Fidelity.RETURNS,
    "ss-zeroed": Fidelity.SS_ZEROED,
    "inferred": Fidelity.INFERRED,
    "guests": Fidelity.GUESTS,
}
REGIONS = {"user": REGION_USER, "stack": REGION_STACK, "stores": REGION_STORES, "reads": REGION_READS}
STACKS = ("added", "listed")

_TRACE_KEYS = ("cpus", "clock_hz", "fidelity", "stores", "reads", "stacks", "regions")


def sniff(head: bytes) -> bool:
    """Whether an input begins like a case file."""
    return text.begins(head, version=False)


def read(inputs: Sequence[Input], writer: TraceWriter, options: ReaderOptions) -> None:
    """Read a case file into the writer. Raises FormatError with the line."""
    source = inputs[0]
    if len(inputs) > 1:
        raise UsageError("several files are only read together when they are the thread files of one foreign log")
    if options.monitor or options.layout is not None or options.stores:
        raise UsageError("a case file has its own layout; convert it to a .tdbg to put another one on top")
    data = bytearray()
    for piece in source.chunks():
        data += piece
        if len(data) > text.MAX_TEXT:
            raise FormatError(source.path, f"a case file has at most {text.MAX_TEXT >> 20} MiB", len(data))
    try:
        parse(bytes(data), writer)
    except LineError as error:
        raise FormatError(source.path, str(error)) from None


def parse(data: bytes, writer: TraceWriter) -> CaseText:
    """Read the bytes of a case file into the writer; returns what is said around the events. Raises LineError."""
    head, found = text.sections(text.decode(data))
    for name, other in ((text.LAYOUT, text.LAYOUT_HEX), (text.SYMBOLS, text.SYMBOLS_HEX)):
        if name in found and other in found:
            raise LineError(found[other].line, f"[{other}] besides [{name}]")
    case = CaseText()
    text.read_head(head, case)
    case.expect = text.block(found[text.EXPECT].lines) if text.EXPECT in found else []
    budget = blocks.Budget()

    def hexed(name: str) -> bytes:
        section = found.get(name)
        return b"" if section is None else blocks.read_bytes(section.numbered(), budget, section.line)

    settings = Settings(found.get(text.TRACE))
    if text.LAYOUT_HEX in found:
        layout = settings.bare(hexed(text.LAYOUT_HEX), found[text.LAYOUT_HEX].line)
    else:
        layout = settings.layout(found.get(text.LAYOUT))
    if text.EVENTS not in found:
        raise LineError(1, "no [events]")
    payload = bytearray(hexed(text.BYTES))
    events = Reader(settings.cpus or max(len(layout.cpus), 1), payload, case)
    events.read(found[text.EVENTS].numbered())
    meta = _meta(found[text.META]) if text.META in found else {}
    said = case.to_meta()
    if said:
        if text.META_KEY in meta:
            raise LineError(found[text.META].line, f"[meta] has a {text.META_KEY!r}, and so has the text")
        meta[text.META_KEY] = said
    writer.cpus, writer.clock_hz, writer.layout, writer.meta = events.cpus, settings.clock_hz, layout, meta
    writer.symbols = hexed(text.SYMBOLS_HEX)
    if text.SYMBOLS in found:
        writer.symbols = symbol_bytes(found[text.SYMBOLS].lines)
    if text.MEMORY in found:
        writer.memory = blocks.read_ranges(found[text.MEMORY].numbered(), budget)
    writer.payload(bytes(payload))
    writer.append(events.records)
    return case


def symbol_bytes(lines: list[str]) -> bytes:
    """The SYMBOLS section that the lines stand for."""
    return "".join(f"{line}\n" for line in text.block(lines)).encode()


def _meta(section: Section) -> dict[str, Any]:
    try:
        meta = json.loads("\n".join(section.lines))
    except RecursionError:
        raise LineError(section.line, "[meta] is nested too deeply") from None
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError):
            raise LineError(section.line + error.lineno, f"[meta] is not JSON: {error.msg}") from None
        raise LineError(section.line, "[meta] is not JSON") from None
    if not isinstance(meta, dict):
        raise LineError(section.line, "[meta] is not a JSON object")
    return meta


# -- [trace] and [layout] -----------------------------------------------------------------------------------------------

_TOML_LINE = re.compile(r" \(at line (\d+), column \d+\)| \(at end of document\)")


def _source(section: Section) -> str:
    """The TOML of a section; it ends in a line break, so that errors at its end have a line."""
    source = "\n".join([*section.lines, ""])
    if len(source) > MAX_TOML:
        raise LineError(section.line, f"[{section.name}] is absurdly long")
    return source


def _toml_error(section: Section, message: str) -> LineError:
    """The error of a section's TOML, at the line of the file."""
    match = _TOML_LINE.search(message)
    line = section.line if match is None or match[1] is None else section.line + int(match[1])
    return LineError(line, f"[{section.name}]: {_TOML_LINE.sub('', message)}")


class Settings:
    """The keys of [trace], and the layout that they complete."""

    def __init__(self, section: Section | None) -> None:
        table = {} if section is None else self._table(section)
        self.line = 1 if section is None else section.line
        for key in table:
            if key not in _TRACE_KEYS:
                raise self._fail(f"unknown key {text.shown(key)} (known: {', '.join(_TRACE_KEYS)})")
        self.given = set(table)
        self.cpus = self._number(table, "cpus", wire.MAX_CPUS)
        if "cpus" in table and not self.cpus:
            raise self._fail("cpus is 0")
        self.clock_hz = self._number(table, "clock_hz", (1 << 64) - 1)
        self.fidelity = Fidelity.NONE
        for word in self._words(table, "fidelity"):
            if word not in FIDELITY:
                raise self._fail(f"fidelity: no {text.shown(word)} (known: {', '.join(FIDELITY)})")
            self.fidelity |= FIDELITY[word]
        self.more = {kind: self._ranges(table, name, kind) for name, kind in REGIONS.items() if name in ("stores", "reads")}
        self.stacks = table.get("stacks", STACKS[0])
        if self.stacks not in STACKS:
            raise self._fail(f"stacks is one of {', '.join(STACKS)}")
        self.order = [self._run(words) for words in self._words(table, "regions")]

    def _fail(self, message: str) -> LineError:
        return LineError(self.line, f"[trace]: {message}")

    def _table(self, section: Section) -> dict[str, Any]:
        try:
            return tomllib.loads(_source(section))
        except RecursionError:
            raise LineError(section.line, f"[{section.name}] is nested too deeply") from None
        except ValueError as error:
            raise _toml_error(section, f"not TOML: {error}") from None

    def _number(self, table: dict[str, Any], key: str, top: int) -> int:
        value = table.get(key, 0)
        if type(value) is not int or not 0 <= value <= top:
            raise self._fail(f"{key} is not a number up to {top}")
        return value

    def _words(self, table: dict[str, Any], key: str) -> list[str]:
        words = table.get(key, [])
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise self._fail(f"{key} is not a list of words")
        return words

    def _ranges(self, table: dict[str, Any], key: str, kind: int) -> list[Region]:
        ranges = table.get(key, [])
        result = []
        for pair in ranges if isinstance(ranges, list) else [None]:
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, (int, str)) for part in pair):
                raise self._fail(f'{key} is not a list of ranges ["0x1000", "0x2000"]')
            words = (part if isinstance(part, str) else f"{part:#x}" for part in pair)
            lo, hi = (text.number(word, 64, self.line, f"[trace]: {key}") for word in words)
            if lo >= hi:
                raise self._fail(f"{key}: a range ends before it begins")
            result.append(Region(lo, hi, kind))
        return result

    def _run(self, words: str) -> tuple[int, int]:
        """`stack 3` -> kind and count."""
        name, _, count = words.partition(" ")
        if name not in REGIONS:
            raise self._fail(f"regions: no {text.shown(name)} (known: {', '.join(REGIONS)})")
        return REGIONS[name], text.number(count or "1", 16, self.line, "[trace]: regions")

    def layout(self, section: Section | None) -> Layout:
        """The layout of the TOML and the keys. Raises LineError."""
        section = section or Section(text.LAYOUT, 1, [])
        try:
            layout = from_toml(_source(section), "")
        except FormatError as error:
            raise _toml_error(section, error.message) from None
        if self.stacks == STACKS[0]:
            layout = layout.with_stacks()
        regions = [*layout.regions, *self.more[REGION_STORES], *self.more[REGION_READS]]
        if self.order:
            regions = self._ordered(regions)
        layout = replace(layout, regions=tuple(regions), fidelity=self.fidelity)
        return self._checked(layout, section.line)

    def bare(self, data: bytes, line: int) -> Layout:
        """The layout of a LAYOUT section's bytes. Raises LineError."""
        extra = self.given - {"cpus", "clock_hz"}
        if extra:
            raise self._fail(f"{min(extra)} is part of [{text.LAYOUT_HEX}]")
        try:
            return self._checked(Layout.from_bytes(data, "", 0), line)
        except FormatError as error:
            raise LineError(line, f"[{text.LAYOUT_HEX}]: {error.message}") from None

    def _checked(self, layout: Layout, line: int) -> Layout:
        if self.cpus and len(layout.cpus) > self.cpus:
            raise LineError(line, f"the layout has {len(layout.cpus)} CPUs, [trace] {self.cpus}")
        try:
            layout.to_bytes()
        except ValueError as error:
            raise LineError(line, str(error)) from None
        return layout

    def _ordered(self, regions: list[Region]) -> list[Region]:
        """The regions in the order that [trace] gives, where the usual one is not theirs."""
        of_kind: dict[int, list[Region]] = {kind: [] for kind in REGIONS.values()}
        for region in reversed(regions):
            of_kind[region.kind].append(region)
        result = []
        for kind, count in self.order:
            if count > len(of_kind[kind]):
                raise self._fail("regions: more than there are")
            result += [of_kind[kind].pop() for _ in range(count)]
        if len(result) != len(regions):
            raise self._fail(f"regions: {len(result)} of {len(regions)}")
        return result
