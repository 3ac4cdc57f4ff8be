"""The [events] of a case file: one line an event, into 64-byte records."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from tracedbg import wire
from tracedbg.formats.case.fields import (
    ALL_KNOWN,
    DELIVER_WORDS,
    FIELDS,
    FLAGS,
    GATE_TYPES,
    GATE_WORDS,
    KINDS,
    PLAIN,
    SHAPES,
    SOURCES,
    Shape,
)
from tracedbg.formats.case.text import LABEL, NO_LABELS, CaseText, LineError, comment_lines, number, shown, split_comment
from tracedbg.state import EventFlag, Kind

_NAMES = {**{name: name for name in FIELDS}, "index": "source_index"}
_TYPES = {name: bits for bits, name in GATE_TYPES.items()}
MAX_INLINE = 4096  # bytes of one write: what the replay takes


@functools.cache
def _names(kind: int) -> tuple[dict[str, str], dict[str, str]]:
    """Name -> field in the lines of a kind, and behind `->` (empty: there is none)."""
    shape = SHAPES.get(kind, PLAIN)
    names = {**_NAMES, **{name: key for key, name in shape.aliases.items()}}
    if kind == Kind.DELIVER:
        names.update(DELIVER_WORDS)
    after = shape.after
    return names, {} if after is None else {**names, **{name: key for key, name in after.items()}}


@functools.cache
def first_words(kind: int) -> dict[str, int]:
    """The words that can stand directly behind a kind, and their values."""
    shape = SHAPES.get(kind, PLAIN)
    return {name: value for value, name in shape.names.items()} | shape.words


class Reader:
    """Reads event lines. `records` are the packed events; `payload` grows by the bytes that lines give."""

    def __init__(self, cpus: int, payload: bytearray, case: CaseText) -> None:
        self.cpus = cpus
        self.payload = payload
        self.case = case
        self.records = bytearray()
        self.count = 0

    def read(self, lines: Iterable[tuple[int, str]]) -> None:
        """Take all lines. Raises LineError."""
        above: list[str] = []
        for at, text in lines:
            body, comment = split_comment(text)
            words = body.split()
            if not words:
                above.append(comment or "")
                continue
            if words[0].endswith(":"):
                self._label(at, words.pop(0)[:-1])
                if not words:
                    raise LineError(at, "a label without an event")
            self._keep(above, self.count)
            above = []
            if comment:
                self.case.notes[self.count] = comment
            self.records += _Line(self, at, words).record()
            self.count += 1
        self._keep(above, self.count, last=True)

    def _label(self, at: int, name: str) -> None:
        if not LABEL.fullmatch(name) or name in NO_LABELS:
            raise LineError(at, f"{shown(name)} is no label (small letters, digits, - and _, a letter first)")
        if name in self.case.labels:
            raise LineError(at, f"label {shown(name)} is there twice")
        self.case.labels[name] = self.count

    def _keep(self, above: list[str], index: int, last: bool = False) -> None:
        lines = comment_lines(above, index, index if last else -1)
        if lines:
            self.case.comments[index] = lines


class _Line:
    """One event line while it is read."""

    def __init__(self, reader: Reader, at: int, words: list[str]) -> None:
        self.reader = reader
        self.at = at
        self.words = words
        self.next = 0
        self.values = dict.fromkeys(FIELDS, 0)
        self.given: set[str] = set()
        self.known = 0
        self.extra = 0
        self.flags = 0
        self.gate: dict[str, str] = {}

    def fail(self, message: str) -> LineError:
        return LineError(self.at, message)

    def record(self) -> bytes:
        """The packed event."""
        kind = self._kind()
        shape = SHAPES.get(kind, PLAIN)
        self._first(kind, shape)
        names, behind = _names(kind)
        while (word := self._take()) is not None:
            if word == "->" and behind:
                names = behind
            elif word in names:
                self._set(names[word], self._operand(word))
            elif not self._other(kind, word):
                hint = "a comment needs a blank behind #" if word[0] == "#" else "`tracedbg help case`"
                raise self.fail(f"{shown(word)} is no field of this event ({hint})")
        if self.gate:
            self._gate_code()
        if "cpu" not in self.given:
            if self.reader.cpus > 1:
                raise self.fail("which CPU? (`cpu ?`: not known)")
            self.known |= FIELDS["cpu"][0]
        v = self.values
        return wire.EVENT_PACK.pack(
            v["time"], v["rip"], v["rsp"], v["addr"], v["value"], v["rflags"], v["code"], v["source_index"], v["cpu"], v["cs"],
            v["ss"], self.known | self.extra, kind, v["arg"], v["source"], self.flags,
        )  # fmt: skip

    def _take(self) -> str | None:
        self.next += 1
        return self.words[self.next - 1] if self.next <= len(self.words) else None

    def _operand(self, name: str) -> str:
        word = self._take()
        if word is None:
            raise self.fail(f"{name}: nothing behind it")
        return word

    def _number(self, word: str, bits: int, what: str) -> int:
        return number(word, bits, self.at, what)

    def _kind(self) -> int:
        word = self._operand("event")
        if word == "kind":
            return self._number(self._operand(word), 8, word)
        if word not in KINDS:
            raise self.fail(f"no event kind {shown(word)}")
        return KINDS[word]

    def _first(self, kind: int, shape: Shape) -> None:
        """The field without a name, if the next word is a value."""
        if shape.first is None or self.next >= len(self.words):
            return
        word = self.words[self.next]
        values = first_words(kind)
        if word in values:
            self.next += 1
            self._set(shape.first, str(values[word]))
        elif word[0].isdigit() or word[0] == "?":
            self.next += 1
            self._set(shape.first, word)

    def _set(self, name: str, word: str) -> None:
        """`5` is a value, `?` unknown, `?5` unknown though the record holds a 5."""
        if name in self.given:
            raise self.fail(f"{name} is there twice")
        self.given.add(name)
        bit, bits = FIELDS[name]
        if word != "?":
            text = word.removeprefix("?")
            self.values[name] = SOURCES[text] if name == "source" and text in SOURCES else self._number(text, bits, name)
        if word[0] != "?":
            self.known |= bit

    def _other(self, kind: int, word: str) -> bool:
        """Flags, and what only some kinds have."""
        if word in FLAGS:
            self.flags |= FLAGS[word]
        elif word == "flags":
            self.flags |= self._number(self._operand(word), 8, word)
        elif word == "known":
            self.extra = self._number(self._operand(word), 16, word)
            if self.extra & ALL_KNOWN:
                raise self.fail("known: only bits without a field; a field that is given is known")
        elif word == "bytes" and kind in (Kind.WRITE, Kind.READ):
            self._bytes(self._operand(word))
        elif word in GATE_WORDS and kind == Kind.GATE:
            if word in self.gate:
                raise self.fail(f"{word} is there twice")
            self.gate[word] = "" if word == "absent" else self._operand(word)
        else:
            return False
        return True

    def _bytes(self, word: str) -> None:
        """Bytes that the event stores or loads: they go into the payload, and the event says where."""
        try:
            data = bytes.fromhex(word)
        except ValueError:
            raise self.fail(f"bytes: {shown(word)} is not pairs of hex digits") from None
        if len(data) > MAX_INLINE:
            raise self.fail(f"bytes: {len(data)} of them, at most {MAX_INLINE}")
        self._set("value", str(len(self.reader.payload)))
        self._set("code", str(len(data)))
        self.flags |= int(EventFlag.BYTES)
        self.reader.payload += data

    def _gate_code(self) -> None:
        kind = self.gate.get("type", "interrupt")
        code = self._number(self.gate.get("ist", "0"), 3, "ist")
        code |= (_TYPES[kind] if kind in _TYPES else self._number(kind, 4, "type")) << 8
        code |= self._number(self.gate.get("dpl", "0"), 2, "dpl") << 13
        code |= ("absent" not in self.gate) << 15
        self._set("code", str(code))
