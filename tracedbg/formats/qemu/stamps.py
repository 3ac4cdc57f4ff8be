"""Times in a QEMU log. The log itself has none; `-msg timestamp=on` adds them, in a way that depends on the version.

Up to QEMU 10.1 the log backend of trace events prints `PID@SECONDS.MICROSECONDS:` before each of its lines, and nothing else
does (scripts/tracetool/backend/log.py). Later ones print an ISO 8601 time before whatever one call of qemu_log() prints, so
three times into a `v=` line, which three calls print (util/log.c); register dumps have none.
"""

from __future__ import annotations

import calendar
import re

_TRACE = re.compile(rb"[0-9]{1,10}@([0-9]{1,12})\.([0-9]{6}):")
_ISO = re.compile(
    rb"([0-9]{4})-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])T([01][0-9]|2[0-3]):([0-5][0-9]):([0-5][0-9]|60)(?:\.([0-9]{6}))?Z "
)
SECOND = 1_000_000


class Stamps:
    """The time of the last stamp, in microseconds since 1970 (-1: none yet). It never goes back."""

    def __init__(self) -> None:
        self.time = -1
        self.traces = False  # stamps of trace lines were seen
        self.lines = False  # stamps of any line were seen

    @property
    def any(self) -> bool:
        """Whether the log has times."""
        return self.traces or self.lines

    def strip(self, line: bytes) -> bytes:
        """A line without its ISO stamps; the first of them is its time."""
        match = _ISO.search(line)
        if match is None:
            return line
        self.lines = True
        year, month, day, hour, minute, second, micro = (int(group or b"0") for group in match.groups())
        seconds = calendar.timegm((year, month, day, hour, minute, second)) if year >= 1970 else 0
        self.time = max(self.time, seconds * SECOND + micro)
        return _ISO.sub(b"", line)

    def trace(self, text: bytes) -> bytes:
        """A trace line without its stamp."""
        match = _TRACE.match(text)
        if match is None:
            return text
        self.traces = True
        self.time = max(self.time, int(match[1]) * SECOND + int(match[2]))
        return text[match.end() :]
