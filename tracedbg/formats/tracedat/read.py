"""trace.dat of trace-cmd, the recorder of Linux's own tracing, into a native trace.

The recorder knows neither the stack pointer nor any return, so nothing here is placed on a stack without more: what it has is
the vectors, the faults with their error codes, and, of a host with KVM, what was injected into which guest CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tracedbg import wire
from tracedbg.errors import FormatError, UsageError
from tracedbg.formats.source import Input
from tracedbg.formats.tracedat import container
from tracedbg.formats.tracedat import text as tracedat_text
from tracedbg.formats.tracedat.container import Buffer
from tracedbg.formats.tracedat.decode import MAX_STREAMS, Decoder
from tracedbg.formats.tracedat.events import Table, by_count, table
from tracedbg.formats.tracedat.file import Store
from tracedbg.formats.tracedat.pages import Pages, streams
from tracedbg.formats.tracedat.text import Format, PageFormat
from tracedbg.formats.tracepoints import CONTEXT, FIDELITY, KVM
from tracedbg.layout import Layout
from tracedbg.writer import TraceWriter

if TYPE_CHECKING:
    from tracedbg.formats import ReaderOptions

FORMAT = "trace-dat"
MAX_PAGE = 16 << 20

_MAX_DAMAGES = 20  # told one by one
_NANOSECONDS = frozenset({"local", "global", "mono", "mono_raw", "boot", "tai", "perf", "tsc2nsec"})
_JIFFIES = ("uptime", 100)  # trace_clock_jiffies() counts in USER_HZ
_TSC = "x86-tsc"

def sniff(head: bytes) -> bool:
    """Whether an input begins like a trace.dat."""
    return container.sniff(head)


def read(inputs: Sequence[Input], writer: TraceWriter, options: ReaderOptions) -> None:
    """Read a trace into the writer. Pages that are damaged or missing end in a gap and in META's `damage`."""
    if len(inputs) > 1:
        raise UsageError("trace-cmd writes all CPUs into one file; several files are not one recording")
    if not container.sniff(inputs[0].head):
        raise FormatError(inputs[0].path, "not a trace.dat", 0)  # before all of it is copied
    store = Store(inputs[0], container.MAGIC)
    try:
        _Reader(store, inputs[0], writer, options).run()
    finally:
        store.close()


class _Reader:
    """Reads one file."""

    def __init__(self, store: Store, source: Input, writer: TraceWriter, options: ReaderOptions) -> None:
        self.store = store
        self.source = source
        self.writer = writer
        self.options = options
        self.found = container.read(store)
        page = tracedat_text.page(self.found.header_page)
        if page is None:
            raise FormatError(store.path, "header_page is none of a kernel's")
        self.page: PageFormat = page
        self.forms = self._forms()
        self.buffers, self.left_out = self._buffers()

    def run(self) -> None:
        found = self.found
        hz = self._hz()
        made = table(self.forms, self.writer, self.options.keep_marks)
        pages = streams(self.store, self.buffers, lambda: container.unpacker(found.packing))
        if len(pages) > MAX_STREAMS:
            raise FormatError(self.store.path, "more CPUs in all buffers than can be read")
        hosts = max([part.cpu + 1 for part in pages] + [found.cpus if found.cpus <= wire.MAX_CPUS else 1, 1])
        decoder = Decoder(made, self.page, pages, hosts, self.writer, lambda: container.symbols(self.store, found))
        decoder.run()
        if not decoder.records and (damage := self._damage(pages, decoder)):
            raise FormatError(self.store.path, f"no record in it: {damage[0]}")
        layout = (self.options.layout or Layout()).with_stacks()
        self.writer.cpus = max(hosts + len(decoder.vcpus), len(layout.cpus))
        self.writer.clock_hz = hz
        self.writer.layout = layout
        self.writer.symbols = self.options.symbols or decoder.names() or self.writer.symbols
        self.writer.meta = {**self.writer.meta, **self._meta(made, pages, decoder, hz)}

    def _forms(self) -> list[Format]:
        """The formats of all tracepoints; of two with one number the first."""
        forms: dict[int, Format] = {}
        for system, text in self.found.events:
            form = tracedat_text.event(system, text)
            if form is not None:
                forms.setdefault(form.number, form)
        if not forms:
            raise FormatError(self.store.path, "no format of any tracepoint in it")
        return list(forms.values())

    def _buffers(self) -> tuple[list[Buffer], list[Buffer]]:
        """The buffers that are read: those with the clock of the first that has data; and the others."""
        full = [b for b in self.found.buffers if any(part.size for part in b.cpus)]
        for buffer in full:
            if not self.page.data_at + 8 <= buffer.page_size <= MAX_PAGE:
                raise FormatError(self.store.path, f"pages of {buffer.page_size} bytes")
        return [b for b in full if b.clock == full[0].clock], [b for b in full if b.clock != full[0].clock]

    def _clock(self) -> str:
        return self.buffers[0].clock if self.buffers else self.found.clock or "local"

    def _hz(self) -> int:
        """Ticks a second, 0: not known. Raises UsageError for a frequency where it is known."""
        clock, tsc = self._clock(), self.found.tsc
        if self.options.cpu_hz:
            if clock != _TSC:
                raise UsageError(f"--cpu-hz: the clock of this trace is {clock!r}, not the TSC")
            return self.options.cpu_hz
        if clock in _NANOSECONDS:
            return 10**9
        if clock == _TSC and tsc is not None and tsc[0] and tsc[1] < 64:
            hz = ((10**9 << tsc[1]) + tsc[0] // 2) // tsc[0]
            return hz if hz < 1 << 63 else 0
        return _JIFFIES[1] if clock == _JIFFIES[0] else 0

    def _damage(self, pages: Sequence[Pages], decoder: Decoder) -> list[str]:
        places = [(at, what) for part in pages for at, what in part.damage]
        for number, at in decoder.damaged:
            part = pages[number]
            where = f" (CPU {part.cpu})" if not part.buffer.packed else f" (CPU {part.cpu}, unpacked byte {at:#x})"
            places.append((part.at + (0 if part.buffer.packed else at), "a page is not readable to its end" + where))
        return [f"at {at:#x}: {what}" for at, what in sorted(places)]

    def _meta(self, made: Table, pages: Sequence[Pages], decoder: Decoder, hz: int) -> dict[str, Any]:
        source = self.source
        told = by_count(made.points, decoder.point_counts)
        meta: dict[str, Any] = {
            "source": {
                "format": FORMAT, "name": source.name, "sha256": source.sha256, "bytes": source.bytes,
                "version": self.found.version, "packing": self.found.packing, "clock": self._clock(),
            },
            "counts": {**decoder.counts(), **{name: n for name, n in self.found.stats.items() if n}},
            "tracepoints": told,
            "fidelity": self._fidelity(made, hz),
            "layout": {"origin": "file"} if self.options.layout is not None else {},
            "returns": "none",  # nor RSP
        }  # fmt: skip
        if decoder.vcpus:
            meta["vcpus"] = decoder.vcpus
        if damage := self._damage(pages, decoder):
            meta["damage"] = damage[:_MAX_DAMAGES]
        return meta

    def _fidelity(self, made: Table, hz: int) -> dict[str, str]:
        told, clock = {**FIDELITY, "context": CONTEXT}, self._clock()
        told["time"] = f"clock {clock}, as recorded"
        if not hz:
            told["time"] += "; the file does not say its frequency" + (" (--cpu-hz)" if clock == _TSC else "")
        if self.found.shifted:
            told["time"] += f"; not moved by the file's {' and '.join(sorted(set(self.found.shifted)))}"
        if made.kvm:
            told.update(KVM)
            if not made.kvm_injects:
                told["guest"] = "what KVM injects is not in kvm_entry (Linux 6.14 and later have it): only requests are traced"
        if made.kprobes and self.options.keep_marks:
            told["kprobes"] = "marks; an argument named sp is taken for RSP"
        if made.unusable:
            told["formats"] = "without a field that is needed, and skipped: " + ", ".join(made.unusable[:8])
        if len(self.buffers) > 1:
            names = ", ".join(b.name or "top" for b in self.buffers[:8])
            told["buffers"] = f"several are read ({names}): an event that more than one of them recorded comes more than once"
        if self.left_out:
            names = ", ".join(b.name or "top" for b in self.left_out[:8])
            told["buffers"] = f"not read, their clock is another: {names}"
        return told
