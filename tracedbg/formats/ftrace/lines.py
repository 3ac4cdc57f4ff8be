"""The lines that print tracepoints of Linux: those of ftrace itself, of `trace-cmd report` and of `perf script`.

What they look like is from the kernel's kernel/trace/trace_output.c (trace_print_context, trace_print_lat_context) and trace.c,
libtraceevent's src/event-parse.c (data_latency_format) and trace-cmd's and perf's output, recorded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, auto

# irqs-off, need-resched, context, depth of preemption; then, if the kernel has them, that of migrate_disable or of the big lock.
_FLAGS = r"[.dDbBX?][^\s:]{2}[.0-9a-fA-F]"
_TIME = r"(?P<time>\d{1,20}(?:\.\d{1,9})?)(?P<us>us ?[!+#*@$]?)?\s?"
_EVENT = r":\s+(?:\d+\s+)?(?:(?P<system>[\w-]{1,64}):)?(?P<event>[A-Za-z_][\w.-]{0,127}):(?:\s+(?P<rest>.*))?$"

# TASK-PID (TGID) [CPU] FLAGS TIME: EVENT: ..., and perf's TASK PID/TID [CPU] TIME: SYSTEM:EVENT: ...
_USUAL = re.compile(
    r"(?:^|[-\s])(?:\d{1,10}/)?(?P<pid>\d{1,10})\s+(?:\([-\s\d]{1,12}\)\s+)?\[(?P<cpu>\d{1,5})\]\s*"
    rf"(?:(?P<flags>{_FLAGS}[.\da-f]{{0,2}})\s+)?" + _TIME + _EVENT
)
# TASK-PID CPUFLAGSTIME: EVENT: ... where a digit may be one of the flags or of the time
_LATENCY = re.compile(
    rf"-(?P<pid>\d{{1,10}})\s+(?P<cpu>\d{{1,5}})(?P<flags>{_FLAGS}(?:[.a-f]{{1,2}}|[.\da-f]{{1,2}}(?=\s))?)(?P<gap>\s*)"
    + _TIME + _EVENT
)  # fmt: skip
_LOST = re.compile(r"CPU:(?P<cpu>\d{1,5}) \[(?:LOST )?(?:(?P<lost>\d{1,19}) )?EVENTS(?: DROPPED)?\]")
_PERF_LOST = re.compile(r"(?:\[(?P<cpu>\d{1,5})\]\s.*)?\bPERF_RECORD_LOST(?:_SAMPLES)?\b.*?\blost (?P<lost>\d{1,19})")
_STARTED = re.compile(r"##### CPU (?P<cpu>\d{1,5}) buffer started ####")
_WRITTEN = re.compile(r"# entries-in-buffer/entries-written: (?P<kept>\d{1,19})/(?P<written>\d{1,19})\s+#P:(?P<cpus>\d{1,5})")
_CPUS = re.compile(r"cpus=(?P<cpus>\d{1,5})\s*$")


class Unit(Enum):
    """What a printed time counts."""

    SECONDS = auto()
    MICROSECONDS = auto()
    TICKS = auto()


@dataclass(slots=True)
class Record:
    """One tracepoint. `flags` None: not printed; `system` None: not printed. `time` in nanoseconds, or in ticks."""

    cpu: int
    pid: int
    flags: str | None
    time: int
    unit: Unit
    system: str | None
    event: str
    rest: str


@dataclass(slots=True)
class Lost:
    """Records that are missing. cpu None: nobody knows of which; count None: nobody knows how many."""

    cpu: int | None
    count: int | None


@dataclass(slots=True)
class Cpus:
    """How many CPUs the machine has."""

    count: int
    lost: int = 0  # records that were overwritten before the first one of the text


class Lines:
    """Reads lines; the form of the last one is tried first."""

    def __init__(self) -> None:
        self._first, self._second = _USUAL, _LATENCY
        self._width = 0  # of the flags of this text

    def read(self, line: str) -> Record | Lost | Cpus | None:
        """What a line says; None: nothing of this kind."""
        match = self._first.search(line)
        if match is None:
            match = self._second.search(line)
            if match is None:
                return _other(line)
            self._first, self._second = self._second, self._first
        pid, cpu, flags, time, us, system, event, rest = match.group(
            "pid", "cpu", "flags", "time", "us", "system", "event", "rest"
        )
        if match.re is _LATENCY:
            more = self._width - len(flags)
            if more > 0 and not match["gap"]:
                flags, time = flags + time[:more], time[more:] or "0"
            self._width = max(self._width, len(flags))
        whole, dot, part = time.partition(".")
        if dot:
            time, unit = int(whole) * 10**9 + int(part.ljust(9, "0")), Unit.SECONDS
        elif us:
            time, unit = int(whole) * 1000, Unit.MICROSECONDS
        else:
            time, unit = int(whole), Unit.TICKS
        return Record(int(cpu), int(pid), flags, time, unit, system, event, (rest or "").rstrip())


def _other(line: str) -> Lost | Cpus | None:
    if "[" in line and (match := _LOST.search(line)):
        return Lost(int(match["cpu"]), None if match["lost"] is None else int(match["lost"]))
    if "PERF_RECORD_LOST" in line and (match := _PERF_LOST.search(line)):
        return Lost(None if match["cpu"] is None else int(match["cpu"]), int(match["lost"]))
    if match := _STARTED.search(line):
        return Lost(int(match["cpu"]), None)
    if match := _WRITTEN.match(line):
        return Cpus(int(match["cpus"]), max(int(match["written"]) - int(match["kept"]), 0))
    if match := _CPUS.match(line):
        return Cpus(int(match["cpus"]))
    return None
