"""Replay: the only owner of the C core. Everything it gives back is a plain frozen value of state.py."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import fields
from types import TracebackType
from typing import Any, Literal, TypeVar

from tracedbg._core import ffi, lib
from tracedbg.errors import ReplayError
from tracedbg.filter import MAX_FILTERS, Filter, Filters, Tally
from tracedbg.layout import Fred, Gate, Layout, Tss
from tracedbg.state import (
    NO_EVENT,
    Cause,
    Context,
    CpuState,
    Evidence,
    Finding,
    Frame,
    FrameStatus,
    Hit,
    Known,
    Life,
    Position,
    Rule,
    Settle,
    Shadow,
    Source,
    Stack,
    Stats,
    Timeline,
    Touch,
    Word,
)
from tracedbg.trace import Trace

T = TypeVar("T")

ABI = 8
CHUNK = 1 << 20  # events per call into the core when nobody asks for less

if lib.tdb_abi() != ABI:  # pragma: no cover - a stale build
    raise ImportError(f"tracedbg._core has ABI {lib.tdb_abi()}, this program needs {ABI}: rebuild it")


class Replay:
    """Replays a trace. One thread at a time per object; the trace must stay open until close().

    `scan` makes the forward pass that finds everything; `seek` moves the view to a position (the state after that many
    events), scanning first where the forward pass has not been.
    """

    def __init__(
        self,
        trace: Trace,
        *,
        layout: Layout | None = None,
        snapshot_interval: int = 0,
        max_snapshots: int = 0,
        max_pages: int = 0,
        max_frames: int = 0,
        max_findings: int = 0,
        max_bytes: int = 0,
        iret_fault_unblocks: bool = True,
        nmi_fail_blocks: bool = True,
    ) -> None:
        self.trace = trace
        self.layout = trace.layout if layout is None else layout
        self.count = trace.count
        self._core: Any = None
        self._events: Any = None
        self._payload: Any = None
        self._last_filters: tuple[Filters, Any, list[Any]] | None = None
        config = ffi.new("struct tdb_config *")
        lib.tdb_config_init(config)
        config.iret_fault_unblocks = iret_fault_unblocks
        config.nmi_fail_blocks = nmi_fail_blocks
        for name, value in (
            ("snapshot_interval", snapshot_interval),
            ("max_snapshots", max_snapshots),
            ("max_pages", max_pages),
            ("max_frames", max_frames),
            ("max_findings", max_findings),
            ("max_bytes", max_bytes),
        ):
            if not 0 <= value < 1 << 32 and name != "max_bytes":
                raise ReplayError(f"{name} {value} is not a 32-bit number")
            if value:
                setattr(config, name, value)
        layout_c, _keep = _layout_struct(self.layout, trace)  # the core copies it
        out = ffi.new("tdb_replay **")
        try:
            events = self._events = ffi.from_buffer("struct tdb_event[]", trace.events)
            payload = self._payload = ffi.from_buffer("uint8_t[]", trace.payload)
            self._check(lib.tdb_open(config, events, trace.count, trace.cpus, payload, len(trace.payload), layout_c, out))
        except BaseException:  # the trace can be closed whatever happened
            self._release()
            raise
        self._core = out[0]

    @property
    def _handle(self) -> Any:
        if self._core is None:
            raise ReplayError("the replay is closed")
        return self._core

    def close(self) -> None:
        """Release the core, then the buffers of the trace."""
        if self._core is not None:
            lib.tdb_close(self._core)
            self._core = None
        self._release()

    def _release(self) -> None:
        for buffer in (self._events, self._payload):
            if buffer is not None:
                ffi.release(buffer)
        self._events = self._payload = None

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _check(self, status: int) -> int:
        if status < 0:
            raise ReplayError(f"replay core: {ffi.string(lib.tdb_strerror(status)).decode()}")
        return status

    def extend(self) -> None:
        """Go on with the events that the trace has grown by (Trace.lengthen). Neither scan nor view moves.

        Raises ReplayError if those that were there before are other ones now.
        """
        view = self.trace.events  # once: another thread may lengthen it again
        count = len(view) // ffi.sizeof("struct tdb_event")
        events = ffi.from_buffer("struct tdb_event[]", view)
        try:
            self._check(lib.tdb_extend(self._handle, events, count))
        except BaseException:
            ffi.release(events)
            raise
        ffi.release(self._events)
        self._events, self.count = events, count

    # -- moving -----------------------------------------------------------------------------------------------------

    @property
    def scanned(self) -> int:
        """Events covered by the forward pass."""
        return int(lib.tdb_scanned(self._handle))

    @property
    def position(self) -> int:
        """Position of the view."""
        return int(lib.tdb_position(self._handle))

    def scan(self, max_events: int = CHUNK) -> int:
        """Go on with the forward pass; returns the events taken, 0 at the end."""
        return self._check(lib.tdb_scan(self._handle, max_events))

    def scan_all(self) -> None:
        """Finish the forward pass."""
        while self.scan():
            pass

    def seek_some(self, position: int, max_events: int) -> int:
        """Move towards a position; returns the events still to go, 0 when there."""
        return self._check(lib.tdb_seek_some(self._handle, self._clamp(position), max_events))

    def seek(self, position: int) -> None:
        """Move the view to a position, clamped to the trace."""
        while self.seek_some(position, CHUNK):
            pass

    def _clamp(self, position: int) -> int:
        return min(max(position, 0), self.count)

    # -- searching --------------------------------------------------------------------------------------------------

    def find_match(self, filters: Filters, start: int, direction: int = 1, limit: int = 1 << 62) -> int | None:
        """The first event from `start` on (included) that passes all filters, of `limit` events; None if there is none."""
        if not 0 <= start < self.count:
            return None
        found = lib.tdb_find_filter(self._handle, *self._filters(filters), start, direction, limit)
        return None if found == lib.TDB_E_RANGE else self._check(found)

    def collect(self, filters: Filters, start: int, room: int = 1 << 16, limit: int = 1 << 62) -> tuple[array[int], int]:
        """The events from `start` on that pass all filters, at most `room`, of `limit` events; and the event to go on from."""
        out, after = ffi.new("uint32_t[]", room), ffi.new("uint64_t *")
        found = self._check(lib.tdb_collect(self._handle, *self._filters(filters), start, limit, out, room, after))
        result = array("I")
        result.frombytes(ffi.buffer(out, found * 4))
        return result, int(after[0])

    def tally(self) -> Counting:
        """A count of all events, to be made in pieces."""
        return Counting(self)

    def _filters(self, filters: Filters) -> tuple[Any, int]:
        """Filters as the core wants them; the last ones are kept, as a search takes many calls."""
        if self._last_filters is None or self._last_filters[0] is not filters:
            self._last_filters = (filters, *_filter_structs(filters))
        return self._last_filters[1], len(filters)

    # -- history ----------------------------------------------------------------------------------------------------

    def watch(
        self, touch: Touch, lo: int = 0, hi: int = 0, frame: int = NO_EVENT, *, room: int = 1, limit: int = CHUNK
    ) -> tuple[Hit, ...]:
        """Move the view on and tell which events touch the bytes [lo, hi), or the frame that a delivery opened.

        Ends after `room` of them, after Touch.END, after `limit` events of work or at the end of the trace, with the view
        behind the last event looked at; call again to go on. Raises ReplayError if the frame is not open at the view.
        """
        what = ffi.new("struct tdb_watch *", {"lo": lo, "hi": hi, "frame": frame, "touch": int(touch)})
        out = ffi.new("struct tdb_hit[]", room)
        found = self._check(lib.tdb_watch(self._handle, what, limit, out, room))
        return tuple(Hit(h.event, Touch(h.touch), h.value, h.known) for h in out[0:found])

    def find_time(self, time: int, start: int = 0, limit: int = 1 << 62) -> int | None:
        """The first event from `start` on, of `limit`, whose time is known and not before `time`; None if there is none."""
        if not 0 <= start < self.count or time >= 1 << 64:
            return None
        found = lib.tdb_find_time(self._handle, start, max(time, 0), limit)
        return None if found < 0 else int(found)

    # -- the view ---------------------------------------------------------------------------------------------------

    def cpu(self, number: int) -> CpuState:
        """State of one CPU."""
        c = ffi.new("struct tdb_cpu *")
        self._check(lib.tdb_get_cpu(self._handle, number, c))
        return _cpu_value(number, c)

    def tss(self, cpu: int) -> Tss | None:
        """The TSS in use on a CPU, with the values it has at the position; None: unknown."""
        t = ffi.new("struct tdb_tss *")
        if lib.tdb_get_tss(self._handle, cpu, t) < 0:
            return None
        return Tss(
            t.base,
            tuple(t.rsp[n] if t.known >> n & 1 else None for n in range(3)),
            tuple(t.ist[n] if t.known >> (8 + n) & 1 else None for n in range(8)),
        )

    def gate(self, cpu: int, vector: int) -> Gate | None:
        """The gate that a CPU would use for a vector; None: unknown."""
        g = ffi.new("struct tdb_gate *")
        if lib.tdb_get_gate(self._handle, cpu, vector, g) < 0 or not g.flags & lib.TDB_GATE_KNOWN:
            return None
        return Gate(g.offset, g.selector, g.ist, g.type, g.dpl, bool(g.flags & lib.TDB_GATE_PRESENT))

    def stacks(self) -> tuple[Stack, ...]:
        """The named stacks and those with open frames, by address."""
        return self._all("struct tdb_stack[]", lib.tdb_get_stacks, _stack_value)

    def frames(self) -> tuple[Frame, ...]:
        """The open frames, in the order of their deliveries."""
        return self._all("struct tdb_frame[]", lib.tdb_get_frames, _frame_value)

    def words(self, lo: int, hi: int) -> tuple[Word, ...]:
        """Words of [lo, hi) with a known byte or a writer, by address."""
        return self._all(
            "struct tdb_word[]", lambda r, out, cap: lib.tdb_get_words(r, lo, min(hi, NO_ADDR), out, cap), _word_value
        )

    def last_frame(self) -> Frame | None:
        """The frame that the last applied event stored, if it was a delivery that could be placed."""
        f = ffi.new("struct tdb_frame *")
        return None if lib.tdb_get_last_frame(self._handle, f) < 0 else _frame_value(f)

    def state(self) -> Position:
        """CPUs, stacks and frames of the view in one go."""
        return Position(
            self.position,
            tuple(self.cpu(n) for n in range(self.trace.cpus)),
            self.stacks(),
            self.frames(),
            self.raised(),
            self.last_frame(),
        )

    def raised(self) -> int:
        """How many of findings() had been raised at the view's position."""
        return self._check(lib.tdb_findings_raised(self._handle))

    def digest(self) -> int:
        """A number for the whole state of the view; equal states have equal digests."""
        out = ffi.new("uint64_t *")
        self._check(lib.tdb_digest(self._handle, out))
        return int(out[0])

    # -- the scan ---------------------------------------------------------------------------------------------------

    def findings(self, first: int = 0, room: int = NO_EVENT) -> tuple[Finding, ...]:
        """Findings from number `first` on, at most `room`, as far as scanned, each with its final word."""
        total = min(max(self._check(lib.tdb_get_findings(self._handle, first, ffi.NULL, 0)) - first, 0), room)
        out = ffi.new("struct tdb_finding[]", max(total, 1))
        self._check(lib.tdb_get_findings(self._handle, first, out, total))
        return tuple(_finding_value(first + n, out[n]) for n in range(total))

    def stats(self) -> Stats:
        """Counters of the forward pass."""
        s = ffi.new("struct tdb_stats *")
        self._check(lib.tdb_get_stats(self._handle, s))
        values: dict[str, Any] = {f.name: getattr(s, f.name) for f in fields(Stats)}
        values["settled"], values["ist_deliveries"] = tuple(s.settled), tuple(s.ist_deliveries)
        values["first_bad"] = int(s.first_bad) if s.bad_events else None
        return Stats(**values)

    def timeline(self, cpu: int | None, buckets: int, first: int = 0, count: int | None = None) -> Timeline:
        """What `count` events (None: all others) from `first` on were like on a CPU (None: on any), in so many buckets."""
        count = max(self.count - first, 0) if count is None else count
        out = ffi.new("struct tdb_bucket[]", max(buckets, 1))
        number = NO_EVENT if cpu is None else cpu
        width = self._check(lib.tdb_timeline(self._handle, number, first, count, buckets, out))
        with memoryview(ffi.buffer(out)) as raw, raw.cast("I") as fields_of:
            return Timeline(width, *(tuple(fields_of[n::4].tolist()) for n in range(4)))

    # -- the life of frames -----------------------------------------------------------------------------------------

    def journal(self, on: bool) -> None:
        """Keep a journal of the frames that end in the forward pass from here on, or stop it and forget it."""
        if on or self._core is not None:
            lib.tdb_journal(self._handle, on)

    def ended(self) -> Lives:
        """The frames that have ended since the last call, in the order of their ends."""
        return self._lives(lib.tdb_take_ended)

    def unended(self) -> Lives:
        """The frames that are open where the forward pass stands, in the order of their deliveries."""
        return self._lives(lib.tdb_get_unended)

    def _lives(self, call: Callable[[Any, Any, int], int]) -> Lives:
        total = self._check(call(self._handle, ffi.NULL, 0))
        out = ffi.new("struct tdb_life[]", max(total, 1))
        return Lives(out, self._check(call(self._handle, out, total)))

    def _all(self, kind: str, call: Callable[[Any, Any, int], int], value: Callable[[Any], T]) -> tuple[T, ...]:
        """Ask for the total, then for all. Items are converted while `out`, which owns their memory, is alive."""
        total = self._check(call(self._handle, ffi.NULL, 0))
        out = ffi.new(kind, max(total, 1))
        self._check(call(self._handle, out, total))
        return tuple(value(out[n]) for n in range(total))


class Counting:
    """A tally under way, from the first event to the last."""

    def __init__(self, replay: Replay) -> None:
        self._replay = replay
        self._tally = ffi.new("struct tdb_tally *")
        self.counted = 0

    def step(self, max_events: int = CHUNK) -> int:
        """Count on; returns the events taken, 0 at the end."""
        taken = self._replay._check(lib.tdb_tally(self._replay._handle, self.counted, max_events, self._tally))
        self.counted += taken
        return taken

    def result(self) -> Tally:
        """What has been counted, without zeros."""
        t = self._tally
        return Tally(
            t.deliveries,
            {n: c for n, c in enumerate(t.vector) if c},
            {Source(n): c for n, c in enumerate(t.source) if c},
            {n: c for n, c in enumerate(t.cpu[0 : self._replay.trace.cpus]) if c},
        )


# Fields of `struct tdb_life` in the order in which Lives.__iter__ takes them.
_LIFE = (
    "frame.entry", "frame.cpu", "frame.vector", "frame.source", "frame.ist", "frame.lo", "frame.hi",
    "frame.saved.known", "frame.saved.rip", "frame.saved.cs", "frame.saved.rflags", "frame.saved.rsp", "frame.saved.ss",
    "frame.saved.code", "frame.has_code", "frame.gate_type", "frame.stack_lo", "frame.stack_hi", "frame.victim",
    "frame.fred", "frame.level", "frame.from_level", "frame.gs",
    "end", "settle", "overwritten", "status", "finding",
)  # fmt: skip
_CODES: dict[int, Literal["B", "H", "I", "Q", "q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}


LIFE_SIZE: int = ffi.sizeof("struct tdb_life")


def life_place(name: str) -> tuple[int, int]:
    """Offset and size of a field in the records of Lives: `end`, `frame.lo`, `frame.saved.rip`."""
    at, kind = 0, ffi.typeof("struct tdb_life")
    for part in name.split("."):
        field = dict(kind.fields)[part]
        at, kind = at + field.offset, field.type
    return at, ffi.sizeof(kind)


class Lives:
    """Frames from their deliveries to their ends: each as a Life, or in columns where there are many of them."""

    def __init__(self, out: Any, count: int) -> None:
        self._out = out
        self.data = memoryview(ffi.buffer(out))[: count * LIFE_SIZE]  # records of LIFE_SIZE bytes
        self._count = count

    def __len__(self) -> int:
        return self._count

    def column(self, name: str, *, signed: bool = False) -> memoryview[int]:
        """One field of all of them, as the core holds it; `signed`: 64-bit fields in two's complement."""
        at, size = life_place(name)
        code = "q" if signed and size == 8 else _CODES[size]
        return self.data.cast(code)[at // size :: LIFE_SIZE // size]

    def __iter__(self) -> Iterator[Life]:
        for row in zip(*(self.column(name).tolist() for name in _LIFE), strict=True):
            yield _life_value(row)


# Plain numbers: of lives there are millions, and `&` with an IntFlag makes an IntFlag.
_RIP, _CS, _RFLAGS, _RSP, _SS, _CODE = (
    int(bit) for bit in (Known.RIP, Known.CS, Known.RFLAGS, Known.RSP, Known.SS, Known.CODE)
)


def _life_value(row: tuple[int, ...]) -> Life:
    (
        entry, cpu, vector, source, ist, lo, hi,
        known, rip, cs, rflags, rsp, ss,
        code, has_code, gate_type, stack_lo, stack_hi, victim,
        fred, level, from_level, gs,
        end, settle, overwritten, status, finding,
    ) = row  # fmt: skip
    saved = Context(
        rip if known & _RIP else None,
        cs if known & _CS else None,
        rflags if known & _RFLAGS else None,
        rsp if known & _RSP else None,
        ss if known & _SS else None,
        code if known & _CODE else None,
    )
    frame = Frame(
        entry, cpu, vector, Source(source), ist, lo, hi, saved, FrameStatus.LIVE, bool(has_code), gate_type, stack_lo, stack_hi,
        None, _event(victim), None, bool(fred), level, from_level, None if gs > 1 else bool(gs),
    )  # fmt: skip
    why = None if settle >= lib.TDB_SETTLE_COUNT else Settle(settle)
    return Life(frame, _event(end), why, _event(overwritten), FrameStatus(status), _event(finding))


NO_ADDR = (1 << 64) - 1


def _event(number: int) -> int | None:
    return None if number == NO_EVENT else int(number)


def _context_value(c: Any) -> Context:
    known = c.known
    return Context(
        c.rip if known & Known.RIP else None,
        c.cs if known & Known.CS else None,
        c.rflags if known & Known.RFLAGS else None,
        c.rsp if known & Known.RSP else None,
        c.ss if known & Known.SS else None,
        c.code if known & Known.CODE else None,
    )


def _stack_value(s: Any) -> Stack:
    return Stack(s.lo, s.hi, s.cpu, s.slot, bool(s.flags & lib.TDB_STACK_NAMED), s.frames, bool(s.flags & lib.TDB_STACK_ASSUMED))


def _word_value(w: Any) -> Word:
    return Word(w.addr, w.value, w.known, tuple(_event(w.writer[b]) for b in range(8)))


def _frame_value(f: Any) -> Frame:
    return Frame(
        f.entry, f.cpu, f.vector, Source(f.source), f.ist, f.lo, f.hi, _context_value(f.saved), FrameStatus(f.status),
        bool(f.has_code), f.gate_type, f.stack_lo, f.stack_hi, _event(f.clobbered_by), _event(f.victim), _event(f.finding),
        bool(f.fred), f.level, f.from_level, None if f.gs > 1 else bool(f.gs),
    )  # fmt: skip


def _finding_value(number: int, f: Any) -> Finding:
    return Finding(
        number, Rule(f.rule), Rule(f.raised_rule), Evidence(f.evidence), Evidence(f.settled_evidence), Cause(f.cause),
        _event(f.cause_event), _event(f.cause_frame), f.slots, f.differ, f.detail, f.event, _event(f.settled),
        None if f.settled_by >= lib.TDB_SETTLE_COUNT else Settle(f.settled_by), _event(f.consumer), f.count, f.cpu, f.lo, f.hi,
        None if f.victim.entry == NO_EVENT else _frame_value(f.victim),
        None if f.writer.entry == NO_EVENT else _frame_value(f.writer),
        None if f.consumer == NO_EVENT else _context_value(f.popped),
    )  # fmt: skip


def _cpu_value(number: int, c: Any) -> CpuState:
    known = c.known
    nmi = bool(known & lib.TDB_CK_NMI)
    return CpuState(
        number,
        c.rip if known & lib.TDB_CK_RIP else None,
        c.rsp if known & lib.TDB_CK_RSP else None,
        c.cs if known & lib.TDB_CK_CS else None,
        c.ss if known & lib.TDB_CK_SS else None,
        c.rflags if known & lib.TDB_CK_RFLAGS else None,
        c.user_rsp if known & lib.TDB_CK_USER_RSP else None,
        _event(c.event),
        bool(c.nmi_blocked) if nmi else None,
        bool(c.nmi_pending),
        _event(c.nmi_since),
        _event(c.nmi_unblocked_by),
        _event(c.nmi_unblock_frame),
        bool(c.mcip) if known & lib.TDB_CK_MCIP else None,
        bool(c.gap),
        None if c.tss < 0 else c.tss,
        None if c.idt < 0 else c.idt,
        _event(c.ring_gap),
        c.csl if known & lib.TDB_CK_CSL else None,
        bool(c.gs) if known & lib.TDB_CK_GS else None,
        c.tpr if known & lib.TDB_CK_TPR else None,
        bool(c.mce) if known & lib.TDB_CK_MCE else None,
        bool(c.gif) if known & lib.TDB_CK_GIF else None,
        bool(c.fred),
        Shadow(c.shadow),
        bool(c.smm),
        bool(c.guest),
        c.token_known,
        c.token_busy,
    )


def _set_fred(out: Any, fred: Fred) -> None:
    out.on = fred.on
    for level, rsp in enumerate(fred.rsp):
        out.rsp[level] = rsp or 0
        out.known |= (rsp is not None) << level
    out.stklvls, out.config = fred.stklvls or 0, fred.config or 0
    out.known |= (lib.TDB_FK_STKLVLS if fred.stklvls is not None else 0) | (lib.TDB_FK_CONFIG if fred.config is not None else 0)


def _layout_struct(layout: Layout, trace: Trace) -> tuple[Any, list[Any]]:
    """The layout as C arrays; the list keeps them alive."""
    tss = ffi.new("struct tdb_tss[]", max(len(layout.tss), 1))
    for n, t in enumerate(layout.tss):
        tss[n].base = t.base
        for i, value in enumerate(t.rsp):
            tss[n].rsp[i] = value or 0
            tss[n].known |= (value is not None) << i
        for i, value in enumerate(t.ist):
            tss[n].ist[i] = value or 0
            tss[n].known |= (value is not None) << (8 + i)
    idts = ffi.new("struct tdb_idt[]", max(len(layout.idts), 1))
    for n, idt in enumerate(layout.idts):
        idts[n].base = idt.base
        for vector, gate in idt.gates.items():
            g = idts[n].gate[vector]
            g.offset, g.selector, g.ist, g.type, g.dpl = gate.offset, gate.selector, gate.ist, gate.type, gate.dpl
            g.flags = lib.TDB_GATE_KNOWN | (lib.TDB_GATE_PRESENT if gate.present else 0)
    tables = layout.cpus[: trace.cpus]
    cpus = ffi.new("struct tdb_cpu_layout[]", max(len(tables), 1))
    freds = ffi.new("struct tdb_fred[]", max(len(tables), 1))
    for n, entry in enumerate(tables):
        cpus[n].tss = -1 if entry.tss is None else entry.tss
        cpus[n].idt = -1 if entry.idt is None else entry.idt
        if entry.fred is not None:
            _set_fred(freds[n], entry.fred)
    regions = ffi.new("struct tdb_region[]", max(len(layout.regions), 1))
    for n, r in enumerate(layout.regions):
        regions[n].lo, regions[n].hi, regions[n].cpu, regions[n].kind, regions[n].slot = r.lo, r.hi, r.cpu, r.kind, r.slot
        regions[n].assumed = r.assumed
    memory = ffi.new("struct tdb_memory[]", max(len(trace.memory), 1))
    keep: list[Any] = [tss, idts, cpus, freds, regions, memory]
    for n, m in enumerate(trace.memory):
        data = ffi.from_buffer("uint8_t[]", m.data)
        keep.append(data)
        memory[n].addr, memory[n].length, memory[n].bytes = m.addr, len(m.data), data
    result = ffi.new("struct tdb_layout *")
    result.tss, result.idt, result.cpu, result.region, result.memory = tss, idts, cpus, regions, memory
    result.fred = freds
    result.tss_count, result.idt_count, result.cpu_count = len(layout.tss), len(layout.idts), len(tables)
    result.region_count, result.memory_count = len(layout.regions), len(trace.memory)
    result.fidelity = int(layout.fidelity)
    return result, keep


def _filter_structs(filters: Filters) -> tuple[Any, list[Any]]:
    """Filters as a C array; the list keeps their ranges alive."""
    if len(filters) > MAX_FILTERS:
        raise ReplayError(f"more than {MAX_FILTERS} filters")
    out = ffi.new("struct tdb_filter[]", max(len(filters), 1))
    keep = [_set_filter(out[n], f) for n, f in enumerate(filters)]
    return out, keep


def _set_filter(out: Any, f: Filter) -> Any:
    out.invert, out.fields, out.flags = f.invert, int(f.fields), int(f.flags)
    if f.flags:
        out.tests |= lib.TDB_FT_FLAGS
    if f.kinds is not None:
        out.tests |= lib.TDB_FT_KIND
        out.kinds = sum(1 << (kind - 1) for kind in f.kinds if kind)
    if f.args is not None:
        out.tests |= lib.TDB_FT_ARG
        for n in f.args:
            out.arg[n >> 6] |= 1 << (n & 63)
    if f.sources is not None:
        out.tests |= lib.TDB_FT_SOURCE
        out.sources = sum(1 << source for source in f.sources)
    if f.cpus is not None:
        out.tests |= lib.TDB_FT_CPU
        for n in f.cpus:
            out.cpu[n >> 6] |= 1 << (n & 63)
    if f.ranges is None:
        return None
    out.tests |= lib.TDB_FT_ADDRESS
    ranges = ffi.new("struct tdb_range[]", [(lo, hi - 1) for lo, hi in f.ranges])
    out.range, out.ranges = ranges, len(f.ranges)
    return ranges
