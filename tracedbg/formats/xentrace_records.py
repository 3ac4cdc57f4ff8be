"""The framing of xentrace records, and the loop over them.

A record is u32 header (event 27:0, words of payload 30:28, TSC included 31), u32 TSC low and high if included, the payload.
Little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from tracedbg.formats.xentrace_events import EXIT64, NESTED, ROW, SVM, SVM_EXIT64, SVM_NMI, VMENTRY, Cpu, Events, set_source
from tracedbg.state import Kind, Known, Source
from tracedbg.writer import TraceWriter

CPU_CHANGE = 0x2001F003  # header of the record that begins a window: u32 CPU, u32 bytes of the window behind it
MAX_RECORD = 40  # bytes
TSC = 1 << 31

_EVENT = 0x0FFFFFFF
_WRAP = 0x1F002  # fills the ring to its end; holds anything

# What the loop does with a header: the words of a record that makes no event (1 to 10), or one of these.
_ENTRY_ROW, _EXIT_ROW, _OTHER = 16, 17, 18
_MAX_HEADERS = 1 << 16  # kept of a damaged file

_PACK_ENTRY = struct.Struct("<II40x16s").pack  # time; the rest of a native event is 0, its last 16 bytes are given
_PACK_EXIT = struct.Struct("<II16xII12xI16s").pack  # time, addr, code
_TAIL = struct.Struct("<IHHHHBBBB").pack  # source_index, cpu, cs, ss, known, kind, arg, source, flags
_ENTRY_KNOWN = Known.TIME | Known.CPU
_EXIT_KNOWN = _ENTRY_KNOWN | Known.ADDR | Known.CODE


class DamagedWindow(Exception):
    """A record runs over the end of its window, or another window begins in it; `at`: bytes into the block."""

    def __init__(self, at: int, *, header: bool = False) -> None:
        super().__init__(at)
        self.at = at
        self.header = header


class Records(Events):
    """Goes through the records of the CPUs."""

    def __init__(self, writer: TraceWriter, vendor: int | None = None) -> None:
        super().__init__(writer, vendor)
        self.records = 0
        self._table: dict[int, int] = {}  # header -> what the loop does

    def block(self, cpu: Cpu, words: Sequence[int], last: bool) -> int:
        """Take the records that begin a block of words of the CPU's window; the words taken.

        `last`: the window ends with the block. Else a record at the end that is not all there is left for the next block.
        Raises DamagedWindow; what was read up to there is in the window.
        """
        window = cpu.windows[-1]
        out, place = window.rows, window.start + len(window.rows)
        table, end = self._table, len(words)
        vendor = self.vendor
        entry_tail, exit_tail, svm = self._tails(cpu.number)
        entry_at, exit_at = cpu.entry_at, cpu.exit_at
        at = count = 0
        seen = 0  # where the records begin whose TSCs are not in cpu.tsc yet
        stop = end - MAX_RECORD // 4  # a record that begins here, or before, is all there
        try:
            while at < end:
                if at > stop:
                    if at + _size(words[at]) <= end:
                        stop = at
                    elif last:
                        raise DamagedWindow(at * 4)
                    else:
                        break
                while at <= stop:
                    header = words[at]
                    count += 1
                    try:
                        action = table[header]
                    except KeyError:
                        action = self._learn(header)
                    if action < _ENTRY_ROW:
                        at += action
                    elif action == _ENTRY_ROW:
                        out += _PACK_ENTRY(words[at + 1], words[at + 2], entry_tail)
                        seen = at
                        at += 3
                        entry_at = place
                        place += ROW
                    elif action == _EXIT_ROW:
                        reason = words[at + 3]
                        out += _PACK_EXIT(words[at + 1], words[at + 2], words[at + 4], words[at + 5], reason, exit_tail)
                        seen = at
                        at += 6
                        exit_at = place
                        place += ROW
                        if reason == SVM_NMI and svm:
                            set_source(out, len(out) - ROW, Source.NMI)
                    else:
                        if header == CPU_CHANGE:
                            count -= 1
                            raise DamagedWindow(at * 4, header=True)
                        cpu.entry_at, cpu.exit_at = entry_at, exit_at
                        if not header & TSC:
                            cpu.tsc = _last_tsc(words, seen, at, cpu.tsc)
                        at = seen = self._other(cpu, words, at, header)
                        entry_at, exit_at = cpu.entry_at, cpu.exit_at
                        place = window.start + len(out)
                        if self.vendor is not vendor:
                            vendor = self.vendor
                            table.clear()
                            entry_tail, exit_tail, svm = self._tails(cpu.number)
        finally:
            cpu.entry_at, cpu.exit_at = entry_at, exit_at
            cpu.tsc = _last_tsc(words, seen, at, cpu.tsc)
            self.records += count
        return at

    def _tails(self, cpu: int) -> tuple[bytes, bytes, bool]:
        known = _EXIT_KNOWN if self.vendor is None else _EXIT_KNOWN | Known.ARG
        entry = _TAIL(0, cpu, 0, 0, _ENTRY_KNOWN, Kind.VMENTRY, 0, 0, 0)
        return entry, _TAIL(0, cpu, 0, 0, known, Kind.VMEXIT, self.vendor or 0, 0, 0), self.vendor == SVM

    def _learn(self, header: int) -> int:
        """What the loop does with a header."""
        event, action = header & _EVENT, _OTHER
        plain = event & ~NESTED
        if header & TSC and plain == VMENTRY and _size(header) == 3:
            action = _ENTRY_ROW
        elif header & TSC and plain in (EXIT64, SVM_EXIT64) and _size(header) == 6 and self.vendor is not None:
            action = _EXIT_ROW
        elif header != CPU_CHANGE and event not in self.makers:
            action = _size(header)
        if len(self._table) < _MAX_HEADERS:
            self._table[header] = action
        return action

    def _other(self, cpu: Cpu, words: Sequence[int], at: int, header: int) -> int:
        """One record that the loop does not do itself; the place of the next."""
        end = at + _size(header)
        at += 1
        if header & TSC:
            cpu.tsc = words[at] | words[at + 1] << 32
            at += 2
        event = header & _EVENT
        try:
            self.makers[event](cpu, event, words[at:end])
        except (IndexError, ValueError):  # a payload shorter than this event has: nobody writes that
            self.counts["odd_records"] += 1
        return end


def _size(header: int) -> int:
    """Words of a record."""
    return 1 + (header >> 28 & 7) + (header >> 31) * 2


def _last_tsc(words: Sequence[int], at: int, end: int, tsc: int) -> int:
    """The last TSC in whole records [at, end); `tsc` if there is none. Wrap records hold garbage."""
    while at < end:
        header = words[at]
        if header & TSC:
            if header & _EVENT != _WRAP:
                tsc = words[at + 1] | words[at + 2] << 32
            at += 3 + (header >> 28 & 7)
        else:
            at += 1 + (header >> 28)
    return tsc
