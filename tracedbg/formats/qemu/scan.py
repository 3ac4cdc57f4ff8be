"""Ordinary blocks of a QEMU log by the scanner in C, straight into records; csrc/decode/qemu_log.h says what it leaves."""

from __future__ import annotations

from itertools import islice

from tracedbg import wire, x86
from tracedbg._decode import ffi, lib
from tracedbg.formats.qemu import monitor as qemu_monitor
from tracedbg.formats.qemu.cpus import MAX_CPUS, Cpu, Tables
from tracedbg.formats.qemu.events import Events
from tracedbg.formats.qemu.items import Attempt
from tracedbg.formats.qemu.order import Order
from tracedbg.formats.qemu.records import SIZE
from tracedbg.formats.qemu.text import LogText

MAX_EVENTS = 8192  # of one call
SOFT_INT, EXTERNAL = 4, 8  # Source
_UNPACK = wire.EVENT_PACK.unpack_from


class Scan:
    """The state that the scanner shares with `order` and its events: given before each call, taken back after it."""

    def __init__(self, order: Order) -> None:
        assert MAX_CPUS <= lib.QLOG_CPUS
        self._order = order
        self._state = ffi.new("struct qlog *")
        self._state.error_codes = sum(1 << vector for vector in x86.ERROR_CODE_VECTORS)
        self._state.tss_bytes = qemu_monitor.TSS_BYTES
        self._out = ffi.new("uint64_t[]", MAX_EVENTS * SIZE // 8)
        self._slots: dict[int, Tables] = {}
        self._given: set[int] = set()  # CPUs
        self._known = 0  # tables that were offered a slot

    def scan(self, text: LogText, buffer: bytes, at: int, limit: int) -> int:
        """Scanner.scan of qemu_text.py."""
        order, events, state = self._order, self._order.events, self._state
        if at >= limit or not order.calm or events.plugin.seen:
            return at
        assert order.expected is not None
        self._give(events)
        state.expected = order.expected
        state.time = text.stamps.time
        state.stamps = state.told = 0
        # The table is the reader's own: it changes with the lines that are read there.
        served = ffi.from_buffer(text.requests.served)
        state.served = ffi.cast("const uint8_t *", served)
        data = ffi.from_buffer(buffer)
        count = MAX_EVENTS
        while count == MAX_EVENTS:
            count = lib.qlog_scan(state, data + at, len(buffer) - at, max(limit - at, 0), self._out, MAX_EVENTS)
            assert count >= 0
            at += state.used
            text.lines += state.lines
            text.causes.heads += count
            text.dumps.blocks += count
            events.records.out += ffi.buffer(self._out, count * SIZE)
            self._take(events, count)
            events.records.trim()
            text.fault_told = text.fault_told and not count
            text.seen = text.seen or state.used > 0
        state.served = ffi.NULL
        order.expected = state.expected
        text.stamps.time = state.time
        text.stamps.traces = text.stamps.traces or bool(state.stamps & lib.QLOG_TRACE_STAMP)
        text.stamps.lines = text.stamps.lines or bool(state.stamps & lib.QLOG_LINE_STAMP)
        text.requests.told = text.requests.told or bool(state.told)
        return at

    def finish(self) -> None:
        """Give back what was counted."""
        for slot in list(self._slots):
            self._count(slot)
        events = self._order.events
        for name in ("legacy", "before_ltr"):
            if number := getattr(self._state, name):
                events.counts[name] += number
                setattr(self._state, name, 0)

    def _give(self, events: Events) -> None:
        """What the events of qemu_text.py changed."""
        cpus = events.cpus
        if len(cpus.tables) > self._known:
            for (tr, idt), tables in islice(cpus.tables.items(), self._known, None):
                if len(tr) in (8, 16) and len(idt) in (8, 16):
                    self._offer(tr, idt, tables)
            self._known = len(cpus.tables)
        if events.stale is None:
            events.stale = self._given | set(cpus.seen)
        for number in events.stale:
            self._give_cpu(number, cpus.seen.get(number))
        self._given |= events.stale
        events.stale.clear()

    def _offer(self, tr: bytes, idt: bytes, tables: Tables) -> None:
        slot = lib.qlog_slot(int(tr, 16), int(idt, 16))
        self._count(slot)
        self._slots[slot] = tables
        entry = self._state.tables[slot]
        entry.tr, entry.idt = int(tr, 16), int(idt, 16)
        entry.tr_base, entry.idt_base = tables.tr, tables.idt
        entry.cpu = tables.cpu
        tops = sorted(self._order.events.failures.ist_tops(tables.tr, tables.idt))
        entry.tops = min(len(tops), lib.QLOG_TOPS + 1)
        for n, top in enumerate(tops[: lib.QLOG_TOPS]):
            entry.top[n] = top
        entry.odd_top = self._order.events.failures.has_odd_top(tables.tr, tables.idt)
        entry.digits = 4 | (len(tr) == 16) | 2 * (len(idt) == 16)

    def _count(self, slot: int) -> None:
        tables = self._slots.get(slot)
        if tables is not None:
            tables.count += self._state.tables[slot].count
            self._state.tables[slot].count = 0

    def _give_cpu(self, number: int, cpu: Cpu | None) -> None:
        entry = self._state.cpu[number]
        entry.ready = cpu is not None and cpu.tr is not None and cpu.idt is not None
        if cpu is not None and entry.ready:
            entry.tr, entry.idt = cpu.tr, cpu.idt
            last = cpu.last
            entry.attempt = 0 if last is None else 1 if last.rflags >= 0 else 2
            if last is not None:
                entry.ip, entry.sp, entry.cs, entry.rflags = last.ip, last.sp, last.cs, max(last.rflags, 0)
                entry.soft = bool(last.soft)

    def _take(self, events: Events, count: int) -> None:
        """What the scanner's events changed: of each CPU the newest event counts."""
        state = self._state
        records = events.records
        first = len(records.out) // SIZE - count
        for n in range(state.touched):
            number = state.touch[n]
            entry = state.cpu[number]
            at = first + entry.last
            fields = _UNPACK(records.out, at * SIZE)
            time, ip, sp, _, value, rflags, code, index, _, cs, ss, _, _, vector, source, _ = fields
            cpu = events.cpus.seen[number]
            cpu.long_mode = bool(entry.long_mode)
            # Of an event that failed, what is asked later stands in the record; the rest is not there.
            cpu.last = Attempt(
                index, vector, code, source == SOFT_INT, cs, ip, ss, sp, value, rflags, b"", b"", b"", False, -1, 0, False, time
            )
            cpu.last_source = source
            cpu.last_at = records.base + at
            cpu.return_at = -1
