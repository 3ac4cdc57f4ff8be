"""Where `:` goes: numbers, percentages, names of places."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tracedbg.errors import UsageError
from tracedbg.state import Finding
from tracedbg.text import clean
from tracedbg.tui.session import SourceSearch

HELP = "12, 50%, end, finding 2, #571 (source's number)"
_FINDING = re.compile(r"(?:f|finding) *#?([0-9]{1,12})")


def parse_goto(text: str, count: int, findings: Sequence[Finding]) -> int | SourceSearch:
    """The event that the user means; UsageError says what is wrong, in words for the status line."""
    wanted = text.strip().lower().replace(",", "")
    if not count:
        raise UsageError("the trace has no events")
    if wanted in ("end", "last", "$"):
        return count - 1
    if wanted in ("start", "first"):
        return 0
    if match := _FINDING.fullmatch(wanted):
        number = int(match[1])
        if not 1 <= number <= len(findings):
            raise UsageError(f"there is no finding {number}; the trace has {len(findings)} so far")
        return findings[number - 1].event
    if re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,6})?%", wanted):
        share = float(wanted[:-1])
        if share > 100:
            raise UsageError(f"{share:g}% is past the end")
        return min(int(count * share / 100), count - 1)
    if match := re.fullmatch(r"#([0-9]{1,12})", wanted):
        return SourceSearch(int(match[1]))
    if re.fullmatch(r"[0-9]{1,20}|0x[0-9a-f]{1,16}", wanted):
        index = int(wanted, 0) if wanted.startswith("0x") else int(wanted)
        if index >= count:
            raise UsageError(f"event {index} is past the last one, {count - 1}")
        return index
    raise UsageError(f"cannot go to {clean(text.strip(), 30)!r}: {HELP}")
