"""Drives the decoder in C over the pages of all CPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tracedbg import wire
from tracedbg._decode import ffi, lib
from tracedbg.errors import FormatError
from tracedbg.formats.tracedat.events import MCE_RECORD, Point, Table, mark, number_in
from tracedbg.formats.tracedat.pages import Pages
from tracedbg.formats.tracedat.text import Field, PageFormat
from tracedbg.formats.tracepoints import IN_NMI, mce_text, nmi_text
from tracedbg.symbols import Symbols
from tracedbg.writer import TraceWriter

ROOM = 16384  # events taken at a time
MAX_TEXTS = 4096  # of marks
MAX_STREAMS = int(lib.FTR_MAX_STREAMS)

_COUNTS = {
    "records": lib.FTR_C_RECORDS, "odd_records": lib.FTR_C_ODD, "unknown_records": lib.FTR_C_UNKNOWN,
    "gaps": lib.FTR_C_GAPS, "lost": lib.FTR_C_LOST, "damaged_pages": lib.FTR_C_DAMAGED,
    "further_handlers": lib.FTR_C_SHARED, "undelivered_injections": lib.FTR_C_UNDELIVERED,
    "injections_without_exit": lib.FTR_C_UNSETTLED, "requests_without_vcpu": lib.FTR_C_NO_VCPU,
}  # fmt: skip


class Decoder:
    """Reads all pages, once."""

    def __init__(
        self, made: Table, page: PageFormat, pages: Sequence[Pages], hosts: int, writer: TraceWriter,
        kallsyms: Callable[[], bytes],
    ) -> None:  # fmt: skip
        """At most MAX_STREAMS `pages`. `hosts`: CPUs of the host; `kallsyms`: its symbols, if they are needed."""
        self._points = made.points
        self._pages = pages
        self._writer = writer
        self._kallsyms = kallsyms
        self._symbols: Symbols | None = None
        self._texts: dict[str, bytes] = {}
        self._keep: list[Any] = []  # what C points to
        self._state: Any = ffi.new("struct ftr_state *")
        self._fill_points(made)
        self._fill_streams(page, hosts)
        self._blocks: list[Any] = [None] * len(pages)

    def run(self) -> None:
        """Write the events of all pages."""
        state = self._state
        out = bytearray(ROOM * wire.EVENT_SIZE)
        room = ffi.from_buffer(out)
        view = memoryview(out)
        while True:
            count = lib.ftr_run(state, room, ROOM)
            assert count >= 0  # the state is sound
            if count:
                self._writer.append(view[: count * wire.EVENT_SIZE])
            if state.stream_wanted == lib.FTR_NONE:
                if count < ROOM:
                    return
            elif state.point_asked == lib.FTR_NONE:
                self._give(state.stream_wanted)
            else:
                self._answer(self._points[state.point_asked - 1])

    @property
    def records(self) -> int:
        """Records read."""
        return int(self._state.count[lib.FTR_C_RECORDS])

    @property
    def point_counts(self) -> list[int]:
        """Records of each tracepoint of the table."""
        return [int(self._state.point[n + 1].count) for n in range(len(self._points))]

    @property
    def damaged(self) -> list[tuple[int, int]]:
        """Pages that are not readable to their end: which stream, and where in it."""
        return [(int(d.stream), int(d.at)) for d in self._state.damage[0 : self._state.damages]]

    @property
    def vcpus(self) -> dict[str, str]:
        """Which thread, and which of KVM's vCPUs, the native CPUs behind those of the host are."""
        state, found = self._state, {}
        for n in range(state.vcpus):
            one = state.vcpu[n]
            name = "vCPU" if one.id == lib.FTR_NONE else f"vCPU {one.id}"
            found[f"cpu {state.first_vcpu + n}"] = f"{name} of thread {one.pid}"
        return found

    def counts(self) -> dict[str, int]:
        """What was counted, as far as there was any."""
        counts = {name: int(self._state.count[number]) for name, number in _COUNTS.items()}
        done = (lib.FTR_SKIP, lib.FTR_IRQ_EXIT)
        points = zip(self._points, self.point_counts, strict=True)
        counts["skipped_records"] = sum(n for point, n in points if point.what in done) + counts["unknown_records"]
        return {name: n for name, n in counts.items() if n or name == "records"}

    def names(self) -> bytes:
        """The SYMBOLS section for where the host was interrupted. A guest's addresses may be the same: then there is none."""
        state = self._state
        if not state.codes or state.vcpus:
            return b""
        return self._names().subset(int(address) for address in state.code if address).to_bytes()

    def _names(self) -> Symbols:
        if self._symbols is None:
            try:
                self._symbols = Symbols.parse(self._kallsyms())
            except FormatError:  # there are none, or they are hidden
                self._symbols = Symbols()
        return self._symbols

    # -- what C works with ---------------------------------------------------------------------------------------------

    def _fill_points(self, made: Table) -> None:
        state = self._state
        points = ffi.new("struct ftr_point[]", len(made.points) + 1)
        numbers = ffi.new("uint16_t[65536]")
        for n, point in enumerate(made.points, 1):
            numbers[point.form.number] = n
            to = points[n]
            to.what = point.what
            ffi.memmove(to.event, point.event, wire.EVENT_SIZE)
            for slot, (one, where) in enumerate(point.fields):
                _set(to.field[slot], one, where)
        self._keep += [points, numbers]
        state.point, state.points, state.number = points, len(made.points) + 1, numbers
        common = next((p.form.fields for p in made.points if "common_type" in p.form.text), {})
        for name in ("type", "flags", "pid"):
            _set(getattr(state, name), common.get(f"common_{name}"), 0)
        ffi.memmove(state.note, mark(self._writer, IN_NMI), wire.EVENT_SIZE)

    def _fill_streams(self, page: PageFormat, hosts: int) -> None:
        state, pages = self._state, self._pages
        streams = ffi.new("struct ftr_stream[]", max(len(pages), 1))
        for stream, part in zip(streams, pages, strict=False):
            stream.cpu, stream.page_size = part.cpu, part.buffer.page_size
            stream.held = stream.irq = stream.exited = lib.FTR_NONE
        self._keep.append(streams)
        state.stream, state.streams = streams, len(pages)
        state.commit_at, state.long_size, state.data_at = page.commit_at, page.long_size, page.data_at
        state.first_vcpu = hosts
        state.stream_wanted = state.point_asked = lib.FTR_NONE

    def _give(self, number: int) -> None:
        """The next pages of a stream."""
        stream, part = self._state.stream[number], self._pages[number]
        stream.base += stream.size
        data = part.next()
        self._blocks[number] = view = ffi.from_buffer(data)
        stream.data, stream.size, stream.at = ffi.cast("const uint8_t *", view), len(data), 0
        if not data:
            stream.last = 1
            stream.cut = bool(part.damage)

    def _answer(self, point: Point) -> None:
        """The text of a mark that is not the same for every record."""
        state = self._state
        data = bytes(ffi.buffer(state.record, state.record_size))
        is_mce = (point.form.system, point.form.name) == MCE_RECORD

        def number(name: str) -> int | None:
            return number_in(point.form, name, data)

        text = mce_text(number) if is_mce else self._nmi_text(number)
        if text not in self._texts:
            if len(self._texts) >= MAX_TEXTS:
                text = point.form.full_name
            self._texts[text] = self._texts.get(text) or mark(self._writer, text)
        fields = wire.EVENT_PACK.unpack(self._texts[text])
        lib.ftr_answer(state, fields[4], fields[6])

    def _nmi_text(self, number: Callable[[str], int | None]) -> str:
        address = number("handler")
        handler = None if address is None else self._names().name(address) or f"{address:#x}"
        return nmi_text(handler, number("handled"))


def _set(to: Any, one: Field | None, where: int) -> None:
    if one is not None and one.is_number:
        to.at, to.size, to.to = one.at, one.size, where
