"""Where `:` goes: numbers, percentages, times, names of places."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from tracedbg.errors import UsageError
from tracedbg.filter import Filter
from tracedbg.state import Finding, Known
from tracedbg.symbols import Symbols
from tracedbg.text import clean
from tracedbg.tui.journeys import FindMatch, FindTime
from tracedbg.tui.session import SourceSearch

HELP = "12, +100, 50%, end, t 1.2ms, finding 2, cpu 1, #571, symbol, address"
UNITS = {"ns": 10**9, "us": 10**6, "µs": 10**6, "ms": 10**3, "s": 1}  # of each, what makes a second
TOP = 1 << 64

_FINDING = re.compile(r"(?:f|finding) *#?([0-9]{1,12})")
_SHARE = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,6})?) *%")
_TIME = re.compile(r"(?:t|time) *([0-9]{1,20}(?:\.[0-9]{1,12})?) *(ns|us|µs|ms|s)?")
_ADDRESS = re.compile(r"@? *(0x[0-9a-f]{1,16})|@ *([0-9a-f]{1,16})|([0-9a-f]{12,16})")
_SYMBOL = re.compile(r"(.+?)(?:\+(0x[0-9a-f]{1,16}|[0-9]{1,12}))?")


@dataclass(frozen=True, slots=True)
class Place:
    """What a goal is measured by: the trace, and where the user stands in it."""

    count: int
    findings: Sequence[Finding] = ()
    selected: int = 0
    cpus: int = 1
    clock_hz: int = 0
    began: int = 0  # time of the first event
    symbols: Symbols | None = None


Goal = int | SourceSearch | FindMatch | FindTime


def parse_goto(text: str, place: Place) -> Goal:
    """The event that the user means, or how to find it; UsageError says what is wrong, in words for the status line."""
    typed = text.strip()
    wanted = typed.lower().replace(",", "")
    if not place.count:
        raise UsageError("the trace has no events")
    if wanted in ("end", "last", "$"):
        return place.count - 1
    if wanted in ("start", "first"):
        return 0
    if match := _FINDING.fullmatch(wanted):
        return _finding(int(match[1]), place.findings)
    if match := _SHARE.fullmatch(wanted):
        share = Fraction(match[1])
        if share > 100:
            raise UsageError(f"{float(share):g}% is past the end")
        return min(int(place.count * share / 100), place.count - 1)
    if match := re.fullmatch(r"#([0-9]{1,12})", wanted):
        return SourceSearch(int(match[1]))
    if match := re.fullmatch(r"([+-]) *([0-9]{1,20})", wanted):
        steps = int(match[2]) if match[1] == "+" else -int(match[2])
        return max(0, min(place.selected + steps, place.count - 1))
    if match := re.fullmatch(r"cpu *([0-9]{1,5})", wanted):
        return _cpu(int(match[1]), place)
    if match := _TIME.fullmatch(wanted):
        return _time(match[1], match[2], place)
    if re.fullmatch(r"[0-9]{1,20}", wanted) or (wanted.startswith("0x") and _is_index(wanted, place)):
        index = int(wanted, 0) if wanted.startswith("0x") else int(wanted)
        if index >= place.count:
            raise UsageError(f"event {index} is past the last one, {place.count - 1}")
        return index
    if (span := address_range(typed, place.symbols)) is not None:
        return code_at(span, typed, place)
    raise UsageError(f"cannot go to {clean(typed, 30)!r}: {HELP}")


def code_at(span: tuple[int, int], name: str, place: Place, *, wrap: bool = True) -> FindMatch:
    """The next event whose RIP lies in a range; `name` is what the user called it."""
    what = f"event at {clean(name, 40)}"
    return FindMatch(place.selected + 1, (Filter(ranges=(span,), fields=Known.RIP),), what, wrap)


def address_range(text: str, symbols: Symbols | None) -> tuple[int, int] | None:
    """The addresses that a text names: `0x1234`, `@1234`, 12 and more hex digits, `do_nmi` (all of it), `do_nmi+2`."""
    if match := _ADDRESS.fullmatch(text.lower()):
        address = int(match[1] or match[2] or match[3], 16)
        return address, address + 1
    match = _SYMBOL.fullmatch(text)
    if match is None or symbols is None:
        return None
    offset = int(match[2], 0) if match[2] else None
    for start, end, name in symbols:
        if name == text:
            return start, end
        if name == match[1] and offset is not None and start + offset < end:
            return start + offset, start + offset + 1
    return None


def _is_index(wanted: str, place: Place) -> bool:
    """A hex number is that of an event where there is one, else an address."""
    return bool(re.fullmatch(r"0x[0-9a-f]{1,16}", wanted)) and int(wanted, 16) < place.count


def _finding(number: int, findings: Sequence[Finding]) -> int:
    if not 1 <= number <= len(findings):
        raise UsageError(f"there is no finding {number}; the trace has {len(findings)} so far")
    return findings[number - 1].event


def _cpu(number: int, place: Place) -> FindMatch:
    if number >= place.cpus:
        raise UsageError(f"there is no CPU {number}; the trace has {place.cpus}")
    return FindMatch(place.selected + 1, (Filter(cpus=frozenset({number})),), f"event of CPU {number}")


def _time(number: str, unit: str | None, place: Place) -> FindTime:
    """With a unit: since the first event, as the list of events shows it; without: ticks, as the records have it."""
    if unit is None:
        if "." in number:
            raise UsageError("a time without a unit is a number of ticks; units are ns, us, ms, s")
        return FindTime(int(number))
    if not place.clock_hz:
        raise UsageError("how fast the trace's clock is, is not known: give ticks, as in `t 1200`")
    ticks = Fraction(number) * place.clock_hz / UNITS[unit]
    return FindTime(min(place.began - (-ticks.numerator // ticks.denominator), TOP))
