"""Hands the declaration of xentrace's records to the decoder in C, and the bytes of a file through it."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from functools import cache
from typing import Any

from tracedbg import wire
from tracedbg._decode import ffi, lib
from tracedbg.formats.xentrace.events import CPU_CHANGE, MADE_UP, REASONS, RECORDS, SVM_NMI, WAITING, Part, Record, Vendor

MAX_HELD = 64 << 20  # bytes of events that wait for those of other CPUs

DAMAGE = {
    lib.XT_CUT_SHORT: "cut short",
    lib.XT_NO_WINDOW: "no window begins here; the rest is not read",
    lib.XT_INSIDE: "a window begins inside of another",
    lib.XT_TOO_LONG: "a record is longer than its window",
}
COUNTS = ("lost", "gaps", "odd_records", "exits_of_unknown_vendor", "unordered")

_VENDORS = {None: lib.XT_UNKNOWN, Vendor.VMX: lib.XT_VMX, Vendor.SVM: lib.XT_SVM}
_PARTS = ("code", "value", "rip", "time", "irq", "coded")


class Decoder:
    """Turns the bytes of a file into native events, in the order of their TSCs. `vendor` None: recognised by the exits.

    `text_at`: offset in the trace's BYTES of the texts that the notes name; texts() has them in the end.
    """

    UNREADABLE = 2  # of told.ended: what follows cannot be read

    def __init__(self, vendor: Vendor | None = None, *, text_at: int = 0) -> None:
        held = MAX_HELD // wire.EVENT_SIZE
        # Pages that are never touched cost nothing; the memory goes when the last view of it goes.
        self._area = ffi.from_buffer(mmap.mmap(-1, lib.xt_size(held)))
        self._decoder = ffi.cast("xt *", self._area)
        declared, self._texts = declaration()
        form = ffi.new("struct xt_format *", declared[0])
        form.vendor, form.text_at = _VENDORS[vendor], text_at
        if lib.xt_open(self._area, held, form) < 0:
            raise ValueError("the declaration of the records is not one that the decoder takes")
        self._rest = b""
        self.told = ffi.new("struct xt_told *")

    def feed(self, data: bytes, *, last: bool = False) -> Iterator[memoryview]:
        """Take the next bytes of the file (`last`: there are no more); gives packed events, each to be used before the next."""
        data = self._rest + data if self._rest else data
        at = 0
        events, count = ffi.new("struct tdb_event **"), ffi.new("uint64_t *")
        with ffi.from_buffer(data) as view:
            while True:
                at += lib.xt_read(self._decoder, view + at, len(data) - at, last, events, count)
                if not count[0]:
                    break
                yield memoryview(ffi.buffer(events[0], count[0] * wire.EVENT_SIZE))
        self._rest = data[at:]
        lib.xt_tell(self._decoder, self.told)

    def texts(self) -> bytes:
        """The texts that were used."""
        return "".join(self._texts[n] for n in self.told.text[0 : self.told.texts]).encode()

    @property
    def vendor(self) -> Vendor | None:
        """Whose exits they are, as far as given or recognised."""
        return next(vendor for vendor, number in _VENDORS.items() if number == self.told.vendor)


@cache
def declaration() -> tuple[Any, tuple[str, ...]]:
    """What xentrace_events.py declares, as the decoder takes it (struct xt_format), and the texts of the notes."""
    form = ffi.new("struct xt_format *")
    form.window, form.nmi_reason, form.records = CPU_CHANGE, SVM_NMI, len(RECORDS)
    texts: list[str] = []
    for place, record in enumerate(RECORDS):
        _record(form.record[place], record, len(texts))
        texts += record.texts
    form.texts = len(texts)
    form.length = [len(text.encode()) for text in texts]
    for reason, vendor in REASONS.items():
        form.reason[reason] = _VENDORS[vendor]
    for vector in MADE_UP:
        form.made_up[vector] = 1
    for source, vector in WAITING.items():
        form.wait[source] = vector
    return form, tuple(texts)


def _record(out: Any, record: Record, text: int) -> None:
    out.event, out.make = record.event, getattr(lib, f"XT_{record.make.name}")
    out.words, out.source, out.vendor = record.least, record.source, _VENDORS[record.vendor]
    out.none, out.text = record.no_code, text
    if isinstance(record.vector, Part):
        _part(out.vector, record.vector)
    else:
        out.arg = record.vector
    for name in _PARTS:
        if (part := getattr(record, name)) is not None:
            _part(getattr(out, name), part)


def _part(out: Any, part: Part) -> None:
    out.word, out.shift, out.bits = part.word, part.shift, part.bits
