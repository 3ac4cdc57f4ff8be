"""Event lines of JSON Lines into 64-byte records: a short way for plain lines, a thorough one for all others and for errors."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from operator import itemgetter
from typing import Any, NoReturn, cast

from tracedbg import wire
from tracedbg.formats.jsonl.fields import (
    BYTES,
    FIELDS,
    FLAGS,
    FLAGS_PLACE,
    INLINE,
    KIND_PLACE,
    KINDS,
    KNOWN_PLACE,
    MAX_DEPTH,
    MAX_INLINE,
    SOURCE_PLACE,
    SOURCES,
)
from tracedbg.state import Kind
from tracedbg.text import clean

_HEX = re.compile(r"0x[0-9a-fA-F]+")
_BEGUN = re.compile(r"|-|\.|[eE][+-]?|t|tr|tru|f|fa|fal|fals|n|nu|nul")  # what can be left where a line was cut
_MOST_SHAPES = 4096  # remembered; a file has a few dozen

_Pick = Callable[[Any], tuple[Any, ...]]


class LineError(ValueError):
    """What is wrong with a line."""


class NotJson(LineError):
    """The line is not JSON. `cut`: it may be the beginning of one that is."""

    def __init__(self, message: str, cut: bool) -> None:
        super().__init__(message)
        self.cut = cut


# -- JSON ---------------------------------------------------------------------------------------------------------------


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise LineError(f"key {shown(key)} is there twice")
            seen.add(key)
    return value


def _constant(word: str) -> NoReturn:
    raise LineError(f"{word} is not JSON")


_STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant)


def parse(line: str) -> dict[str, Any]:
    """The object of a line: no key twice, no NaN, not nested too deeply. Raises LineError, NotJson."""
    try:
        value = _STRICT.decode(line)
    except LineError:
        raise
    except json.JSONDecodeError as error:
        raise NotJson(f"not JSON: {error.msg.lower()} at column {error.colno}", _is_cut(error)) from None
    except RecursionError:
        raise LineError(f"nested more than {MAX_DEPTH} deep") from None
    except ValueError:  # an integer of thousands of digits
        raise LineError("a number is absurdly long") from None
    if not isinstance(value, dict):
        raise LineError("not a JSON object")
    if depth(value) > MAX_DEPTH:
        raise LineError(f"nested more than {MAX_DEPTH} deep")
    return value


def _is_cut(error: json.JSONDecodeError) -> bool:
    """Whether more text could make it right: the string, number or word at which it fails reaches to the end of the line."""
    rest = error.doc[error.pos :].rstrip()
    if error.msg.startswith("Invalid \\u"):
        return len(rest) <= 5
    return error.msg.startswith("Unterminated string") or bool(_BEGUN.fullmatch(rest))


def depth(value: Any) -> int:
    """How deeply lists and objects are nested, as far as MAX_DEPTH + 1."""
    level, found = [value], 0
    while level and found <= MAX_DEPTH:
        level = [v for v in level if isinstance(v, (dict, list))]
        found += bool(level)
        level = [inner for v in level for inner in (v.values() if isinstance(v, dict) else v)]
    return found


def shown(value: Any) -> str:
    """A value of the file in an error."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    return clean(json.dumps(value) if not isinstance(value, int) or value.bit_length() <= 128 else "a huge number", 60)


def number(value: Any, bits: int, what: str) -> int:
    """A number, or one in hex as a string. Raises LineError."""
    if isinstance(value, str) and _HEX.fullmatch(value):
        value = int(value, 16)
    if type(value) is not int or not 0 <= value < 1 << bits:
        raise LineError(f'{what}: {shown(value)} is not a number up to {bits} bits, like 4660 or "0x1234"')
    return value


def hexed(value: Any, what: str) -> bytes:
    """Bytes as hex digits. Raises LineError."""
    if isinstance(value, str) and " " not in value and value.isascii():
        try:
            return bytes.fromhex(value)
        except ValueError:
            pass
    raise LineError(f"{what}: not pairs of hex digits")


# -- events -------------------------------------------------------------------------------------------------------------


class Events:
    """Makes records of lines. `payload` keeps bytes that a line gives and returns their place."""

    def __init__(self, payload: Callable[[bytes], int]) -> None:
        self._payload = payload
        self._shapes: dict[tuple[str, ...], _Shape | None] = {}
        self._scan = cast(Any, json.JSONDecoder()).scan_once

    def take(self, lines: list[str], first: int, rows: list[bytes]) -> int:
        """Append the records of plain lines from `first` on; returns the first line that is not plain, or their number.

        A plain line is an object of a kind by its name and of fields that are numbers. Whatever else a line may be is left
        to record(), which says what is wrong with it.
        """
        at = first
        scan, shapes, kinds, sources, pack = self._scan, self._shapes, KINDS, SOURCES, wire.EVENT_PACK.pack
        add = rows.append
        try:
            for at in range(first, len(lines)):
                line = lines[at]
                value, end = scan(line, 0)
                # Each member has a colon: as many as there are keys, and none of the keys is there twice.
                if end != len(line) or line.count(":") != len(value):
                    return at
                keys = (*value,)
                values = (*value.values(),)
                try:
                    shape = shapes[keys]
                except KeyError:
                    shape = self._shape(keys, values)
                # A truth would be an int to `struct`; any other wrong type is an error.
                if shape is None or "true" in line or "false" in line:
                    return at
                texts = shape.texts(values)
                # int() takes more than hex digits. With one x in each and nothing else but letters and digits they are "0x..".
                joined = "".join(texts)
                if shape.count and not (joined.isalnum() and joined.isascii() and joined.count("x") == shape.count):
                    return at
                source = 0 if shape.source is None else sources[values[shape.source]]
                numbers = [int(text, 16) for text in texts]
                add(pack(*shape.order((*values, *numbers, kinds[values[shape.kind]], source, 0, shape.known))))
        except (ValueError, StopIteration, RecursionError, KeyError, TypeError, AttributeError, struct.error):
            return at
        return len(lines)

    def _shape(self, keys: tuple[str, ...], values: tuple[Any, ...]) -> _Shape | None:
        shape = _Shape.of([*keys], [*map(type, values)])
        if len(self._shapes) < _MOST_SHAPES:
            self._shapes[keys] = shape
        return shape

    def record(self, value: dict[str, Any]) -> bytes:
        """The record of any event; its keys are EVENT_KEYS. Raises LineError."""
        record = [0] * 16
        record[KIND_PLACE] = _named(value["kind"], KINDS, "kind")
        for name, field in FIELDS.items():
            if name not in value:
                continue
            if name == "source":
                record[field.place] = _named(value[name], SOURCES, name)
            else:
                record[field.place] = number(value[name], field.bits, name)
            record[KNOWN_PLACE] |= field.known
        if "flags" in value:
            record[FLAGS_PLACE] = _flags(value["flags"])
        if "known" in value:
            record[KNOWN_PLACE] = number(value["known"], 16, "known")
        data = _inline(value, record[KIND_PLACE])
        if data is not None:
            record[4], record[6] = self._payload(data), len(data)
            record[KNOWN_PLACE] |= INLINE
            record[FLAGS_PLACE] |= BYTES
        return wire.EVENT_PACK.pack(*record)


class _Shape:
    """What plain lines with the same keys have in common: how to get from their values to a record.

    `texts`: picks the numbers in hex (`count` of them); `kind`, `source`: where the words are; `order`: picks the 16 parts of
    a record out of the values, the numbers, and kind, source, 0 and known behind them.
    """

    __slots__ = ("count", "kind", "known", "order", "source", "texts")

    def __init__(self, keys: list[str], texts: list[int], source: int | None) -> None:
        behind = len(keys) + len(texts)
        order = [behind + 2] * 16
        self.known = 0
        for at, key in enumerate(keys):
            if key != "kind":
                order[FIELDS[key].place] = len(keys) + texts.index(at) if at in texts else at
                self.known |= FIELDS[key].known
        order[KIND_PLACE] = behind
        if source is not None:
            order[SOURCE_PLACE] = behind + 1
        order[KNOWN_PLACE] = behind + 3
        self.kind = keys.index("kind")
        self.source = source
        self.count = len(texts)
        self.texts = _picker(texts)
        self.order: _Pick = itemgetter(*order)

    @classmethod
    def of(cls, keys: list[str], types: list[type]) -> _Shape | None:
        """None: such lines are not plain."""
        if dict(zip(keys, types, strict=True)).get("kind") is not str or not all(key == "kind" or key in FIELDS for key in keys):
            return None
        if not set(types) <= {int, str}:
            return None
        source = keys.index("source") if "source" in keys and types[keys.index("source")] is str else None
        texts = [at for at, kind in enumerate(types) if kind is str and keys[at] != "kind" and at != source]
        return cls(keys, texts, source)


def _picker(places: list[int]) -> _Pick:
    if len(places) > 1:
        return itemgetter(*places)
    only = slice(places[0], places[0] + 1) if places else slice(0)
    return lambda values: tuple(values[only])


def _named(value: Any, names: dict[str, int], what: str) -> int:
    """A name, or its number."""
    if isinstance(value, str) and value in names:
        return names[value]
    if isinstance(value, str) and not _HEX.fullmatch(value):
        raise LineError(f"no {what} {shown(value)} (known: {', '.join(names)})")
    return number(value, 8, what)


def _flags(value: Any) -> int:
    if not isinstance(value, list):
        return number(value, 8, "flags")
    flags = 0
    for word in value:
        if not isinstance(word, str) or word not in FLAGS:
            raise LineError(f"no flag {shown(word)} (known: {', '.join(FLAGS)})")
        if flags & FLAGS[word]:
            raise LineError(f"flag {shown(word)} is there twice")
        flags |= FLAGS[word]
    return flags


def _inline(value: dict[str, Any], kind: int) -> bytes | None:
    """The bytes that stand in the line."""
    keys = [key for key in ("bytes", "text") if key in value]
    if not keys:
        return None
    clash = [key for key in ("value", "code", *keys[1:]) if key in value]
    if clash:
        raise LineError(f"{clash[0]!r} besides {keys[0]!r}")
    if keys[0] == "bytes":
        data = hexed(value["bytes"], "bytes")
    else:
        if kind != Kind.MARK:
            raise LineError("only a mark has a text")
        if not isinstance(value["text"], str):
            raise LineError(f"text: {shown(value['text'])} is not a text")
        try:
            data = value["text"].encode()
        except UnicodeEncodeError:
            raise LineError("text: half of a surrogate pair") from None
    if not 0 < len(data) <= MAX_INLINE:
        raise LineError(f"{keys[0]}: {len(data)} bytes, not 1 to {MAX_INLINE}")
    return data
