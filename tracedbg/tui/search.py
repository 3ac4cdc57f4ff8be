"""What `/` and `&` look for: words of the user as filters. All words of a text must hold; `!` before a word inverts it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import reduce
from typing import Any

from tracedbg import x86
from tracedbg.errors import UsageError
from tracedbg.filter import MAX_FILTERS, Filter, Filters
from tracedbg.state import EventFlag, Kind, Known, Return, Source
from tracedbg.symbols import Symbols
from tracedbg.text import clean

HELP = "nmi  #pf  0x0e  write  do_nmi  ffff8300bffd2f48  src:extint  cpu:3  !word"
MAX_WORDS = MAX_FILTERS // 2  # the other half is for what is switched off
MAX_RANGES = 4096
MAX_CPU = 4095

# A vector is one of a delivery, a request or a gate; FRED's system calls have numbers of their own, which are no vectors.
VECTOR_KINDS = frozenset({Kind.DELIVER, Kind.RAISE, Kind.GATE})
NO_SYSCALL = frozenset(Source) - {Source.SYSCALL}
SOURCE_KINDS = frozenset({Kind.DELIVER, Kind.RAISE})

_VECTORS = {name.lower().removeprefix("#"): vector for vector, name in x86.VECTOR_NAMES.items()}
_KINDS = {kind.name.lower(): kind for kind in Kind if kind} | {
    "store": Kind.WRITE, "load": Kind.READ, "request": Kind.RAISE, "delivery": Kind.DELIVER, "copy": Kind.MOVE,
}  # fmt: skip
_SOURCES = {source.name.lower().replace("_", "-"): source for source in Source} | {
    "8259": Source.EXTINT, "pic": Source.EXTINT, "apic": Source.FIXED, "int": Source.SOFT_INT,
}  # fmt: skip
_FLAGS = {name.lower(): EventFlag[name] for name in ("FAILED", "FAULTED", "PARTIAL", "SMM", "LEGACY")}
_OTHERS = {
    "iret": Filter(kinds=frozenset({Kind.RETURN}), args=frozenset({Return.IRET})),
    "eretu": Filter(kinds=frozenset({Kind.RETURN}), args=frozenset({Return.ERETU})),
    "erets": Filter(kinds=frozenset({Kind.RETURN}), args=frozenset({Return.ERETS})),
    "swapgs": Filter(kinds=frozenset({Kind.GS}), args=frozenset({0})),
    "fake": Filter(
        kinds=frozenset({Kind.DELIVER}),
        args=frozenset({x86.NMI, x86.MACHINE_CHECK}),
        sources=frozenset({Source.SOFT_INT, Source.FIXED, Source.EXTINT, Source.INJECTED, Source.EXTERNAL}),
    ),
}
_FIELDS = {"rip": Known.RIP, "rsp": Known.RSP, "addr": Known.ADDR, "value": Known.VALUE}

_WORD = re.compile(r'(?:[^\s"]|"[^"]*")+')
_DECIMAL = re.compile(r"[0-9]{1,20}", re.ASCII)
_HEX = re.compile(r"0x([0-9a-f]{1,16})|([0-9a-f]{9,16})", re.ASCII)  # kernel addresses are shown without 0x


def parse_filters(text: str, symbols: Symbols) -> Filters:
    """The filters that a text stands for, none for an empty one; UsageError says what is wrong with it."""
    if text.count('"') % 2:
        raise UsageError("a quote is not closed")
    filters: list[Filter] = []
    invert = False
    for match in _WORD.finditer(text):
        word = match[0].lstrip("!")
        invert ^= (len(match[0]) - len(word)) % 2 == 1
        if word:  # else `! nmi`
            found = _word(word, symbols)
            filters.append(replace(found, invert=True) if invert else found)
            invert = False
    if invert:
        raise UsageError("nothing follows the !")
    if len(filters) > MAX_WORDS:
        raise UsageError(f"more than {MAX_WORDS} words")
    return tuple(filters)


def _word(word: str, symbols: Symbols) -> Filter:
    """One word: alternatives with commas between them, `key:` before the first holds for all. A quoted one is a symbol."""
    if '"' in word:
        return _symbol(word.replace('"', ""), symbols)
    key, colon, rest = word.partition(":")
    make = _keys(symbols).get(key.lower()) if colon else None
    if make is None:
        make, rest = lambda part: _bare(part, symbols), word
    parts = [part for part in rest.split(",") if part]
    if not parts:
        raise UsageError(f"nothing follows {clean(word, 30)!r}" if colon else "a comma alone says nothing")
    return reduce(_either, (make(part) for part in parts))


def _keys(symbols: Symbols) -> dict[str, Callable[[str], Filter]]:
    keys: dict[str, Callable[[str], Filter]] = {
        "cpu": _cpu,
        "src": _source,
        "source": _source,
        "kind": _kind,
        "vec": _vector,
        "vector": _vector,
        "sym": lambda part: _symbol(part, symbols),
    }
    for name, field in _FIELDS.items():
        keys[name] = lambda part, field=field: replace(_place(part, symbols), fields=field)  # type: ignore[misc]
    return keys


def _either(a: Filter, b: Filter) -> Filter:
    """Events that pass one or the other: a filter can say that if they differ in one list only."""
    names = [n for n in ("kinds", "args", "sources", "cpus", "ranges", "fields", "flags") if getattr(a, n) != getattr(b, n)]
    if not names:
        return a
    one, other = getattr(a, names[0]), getattr(b, names[0])
    if len(names) == 1 and isinstance(one, frozenset) and isinstance(other, frozenset):
        joined: Any = {names[0]: one | other}
        return replace(a, **joined)
    if names == ["ranges"] and one is not None and other is not None:
        return replace(a, ranges=merged((*one, *other)))
    raise UsageError("a comma joins words of one sort only, as in nmi,#mc or write,read")


# -- single words -------------------------------------------------------------------------------------------------------


def _bare(part: str, symbols: Symbols) -> Filter:
    word = part.lower()
    if word in _OTHERS:
        return _OTHERS[word]
    if word in _KINDS:
        return _kind(word)
    if word in _FLAGS:
        return Filter(flags=_FLAGS[word])
    if word.removeprefix("#") in _VECTORS or word.startswith("#") or _DECIMAL.fullmatch(word) or _short_hex(word):
        return _vector(word)
    return _place(part, symbols)


def _short_hex(word: str) -> bool:
    return re.fullmatch(r"0x[0-9a-f]{1,2}", word, re.ASCII) is not None


def _kind(part: str) -> Filter:
    kind = _KINDS.get(part.lower())
    if kind is None:
        raise UsageError(f"{clean(part, 30)!r} is no kind of event: {', '.join(sorted(k.name.lower() for k in Kind if k))}")
    return Filter(kinds=frozenset({kind}))


def _vector(part: str) -> Filter:
    word = part.lower()
    number = _VECTORS.get(word.removeprefix("#"))
    if number is None and (_DECIMAL.fullmatch(word) or _short_hex(word)):
        number = int(word, 16) if word.startswith("0x") else int(word)
    if number is None:
        raise UsageError(f"there is no vector {clean(part, 30)!r}")
    if number > 255:
        raise UsageError(f"there is no vector {number}; :{number} goes to an event")
    return Filter(VECTOR_KINDS, frozenset({number}), NO_SYSCALL)


def _source(part: str) -> Filter:
    source = _SOURCES.get(part.lower().replace("_", "-"))
    if source is None:
        names = ", ".join(s.name.lower().replace("_", "-") for s in Source)
        raise UsageError(f"{clean(part, 30)!r} is no source: {names}")
    return Filter(kinds=SOURCE_KINDS, sources=frozenset({source}))


def _cpu(part: str) -> Filter:
    match = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", part, re.ASCII)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if first > last or last > MAX_CPU:
        raise UsageError(f"{clean(part, 30)!r} is no CPU and no range of CPUs")
    return Filter(cpus=frozenset(range(first, last + 1)))


# -- addresses ----------------------------------------------------------------------------------------------------------


def _place(part: str, symbols: Symbols) -> Filter:
    """`A`, `A-B` (B is the first byte that no longer belongs to it), `A+LENGTH`, a symbol, `symbol+offset`."""
    word = part.lower()
    lo = _number(word)
    if lo is not None:
        return _range(lo, lo + 1, part)
    for sign in "-+":
        first, found, second = word.partition(sign)
        lo = _number(first) if found else None
        if lo is None:
            continue
        more = _number(second)
        if more is None:
            raise UsageError(f"{clean(part, 50)!r} is no range of addresses")
        return _range(lo, more if sign == "-" else lo + more, part)
    return _symbol(part, symbols)


def _number(word: str) -> int | None:
    """A number as an address is written."""
    if match := _HEX.fullmatch(word):
        return int(match[1] or match[2], 16)
    return int(word) if _DECIMAL.fullmatch(word) else None


def _range(lo: int, hi: int, part: str) -> Filter:
    if not lo < hi <= 1 << 64:
        raise UsageError(f"{clean(part, 50)!r} holds no address")
    return Filter(ranges=((lo, hi),))


def _symbol(part: str, symbols: Symbols) -> Filter:
    """A symbol: all that have this name, else all whose names begin so; with `*` always these."""
    name, plus, offset = part.partition("+")
    shift = _number(offset.lower()) if plus else None
    if shift is not None:
        starts = [(start + shift, start + shift + 1) for start, end, own in symbols if _own(own) == name and start + shift < end]
        if not starts:
            raise UsageError(f"no symbol {clean(name, 50)!r} reaches as far as +{shift:#x}")
        return Filter(ranges=merged(starts))
    prefix = part.removesuffix("*")
    begin = [(start, end, own) for start, end, own in symbols if own.startswith(prefix)] if prefix else []
    same = [(start, end) for start, end, own in begin if _own(own) == part]
    ranges = merged(same or [(start, end) for start, end, _ in begin])
    if not ranges:
        why = "no symbol begins so" if len(symbols) else "without symbols it is no name"
        raise UsageError(f"{clean(part, 50)!r}: no vector, kind or address, and {why}")
    if len(ranges) > MAX_RANGES:
        raise UsageError(f"more than {MAX_RANGES} symbols begin with {clean(prefix, 50)!r}")
    return Filter(ranges=ranges)


def _own(name: str) -> str:
    """Without the module."""
    return name.partition(" [")[0]


def merged(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ranges sorted, and joined where they touch."""
    result: list[tuple[int, int]] = []
    for lo, hi in sorted(ranges):
        if result and lo <= result[-1][1]:
            result[-1] = (result[-1][0], max(hi, result[-1][1]))
        else:
            result.append((lo, hi))
    return tuple(result)
