"""Binary traces of Xen's xentrace into a native trace.

A file is a sequence of windows: a CPU_CHANGE record (CPU, size), then so many bytes of that CPU's records. It says neither the
frequency of the TSC nor, before Xen 4.19, whether the VM exits are those of VMX or SVM.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tracedbg import wire
from tracedbg.errors import FormatError, UsageError
from tracedbg.formats.source import Input
from tracedbg.formats.xentrace.decode import COUNTS, DAMAGE, Decoder
from tracedbg.formats.xentrace.events import CPU_CHANGE, Vendor
from tracedbg.layout import Layout
from tracedbg.state import Kind
from tracedbg.writer import TraceWriter

if TYPE_CHECKING:
    from tracedbg.formats import ReaderOptions

FORMAT = "xentrace"
BLOCK = 1 << 20  # bytes taken at a time

_WINDOW = struct.Struct("<III")
_VENDORS = {"vmx": Vendor.VMX, "svm": Vendor.SVM}

_FIDELITY = {
    "rsp": "no record has RSP, CS, SS or RFLAGS, nor any stack",
    "returns": "IRETs are not traced",
    "stores": "stores are not traced",
    "deliveries": "Xen's own are traced only as device interrupts (IRQ handled), as host interrupts and NMIs that end a guest's"
    " run, and where an exception is passed on to a PV guest (vector, RIP and error code are those told to the guest);"
    " other NMIs, #MCs and IPIs, and every delivery inside an HVM guest, are not",
    "injection": "NMIs injected into an HVM guest are not traced, only that one had to wait (request of vector 2);"
    " interrupts injected by virtual interrupt delivery or posting are not traced either",
    "vmexit": "addr is the guest's RIP; the reason is the vendor's number",
    "vector": "an IRQ has its vector only if its binding was traced before",
}


def sniff(head: bytes) -> bool:
    """Whether an input begins with a window of a CPU."""
    if len(head) < _WINDOW.size:
        return False
    header, cpu, size = _WINDOW.unpack_from(head)
    return bool(header == CPU_CHANGE and cpu < wire.MAX_CPUS and size % 4 == 0)


def read(inputs: Sequence[Input], writer: TraceWriter, options: ReaderOptions) -> None:
    """Read a trace into the writer. What is damaged or cut short ends in a gap and in META's `damage`."""
    if len(inputs) > 1:
        raise UsageError("xentrace writes all CPUs into one file; several files are not one recording")
    source = inputs[0]
    layout = (options.layout or Layout()).with_stacks()
    decoder = Decoder(None if options.vendor is None else _VENDORS[options.vendor], text_at=writer.payload(b""))
    told = decoder.told
    for piece, last in _pieces(source):
        for events in decoder.feed(piece, last=last):
            writer.append(events)
        if told.ended:
            break
    damage = [(place.at, DAMAGE[place.what]) for place in told.damage[0 : min(told.damages, len(told.damage))]]
    if not told.records:
        at, what = damage[0] if damage else (0, "no record in it")
        raise FormatError(source.path, f"not a trace of xentrace: {what.partition(';')[0]}", at)
    if told.ended == decoder.UNREADABLE:
        writer.event(Kind.GAP)  # of all CPUs: nobody knows whose windows would have come
    writer.payload(decoder.texts())
    writer.cpus = told.cpus
    writer.clock_hz = options.cpu_hz
    writer.layout = layout
    writer.symbols = options.symbols or writer.symbols
    meta: dict[str, Any] = {
        "source": {"format": FORMAT, "name": source.name, "sha256": source.sha256, "bytes": source.bytes},
        "counts": {"records": told.records, "windows": told.windows, **_counted(told)},
        "fidelity": _fidelity(decoder, options),
        "layout": {"origin": "file"} if options.layout is not None else {},
        "returns": "none",  # nor RSP
    }
    if damage:
        meta["damage"] = [f"at {at:#x}: {what}" for at, what in damage]
        meta["counts"]["damaged_places"] = told.damages
    writer.meta = {**writer.meta, **meta}


def _pieces(source: Input) -> Iterator[tuple[bytes, bool]]:
    """The bytes of the input in pieces of at most BLOCK; the end is an empty one."""
    for chunk in source.chunks():
        if len(chunk) <= BLOCK:
            yield chunk, False
        else:
            for at in range(0, len(chunk), BLOCK):
                yield chunk[at : at + BLOCK], False
    yield b"", True


def _counted(told: Any) -> dict[str, int]:
    return {name: getattr(told, name) for name in sorted(COUNTS) if getattr(told, name)}


def _fidelity(decoder: Decoder, options: ReaderOptions) -> dict[str, str]:
    told = dict(_FIDELITY)
    told["time"] = "TSC; handler records have none and get that of the record before"
    if not options.cpu_hz:
        told["time"] += "; the file does not say its frequency (--cpu-hz)"
    if decoder.told.exits_of_unknown_vendor:
        told["vendor"] = "some VM exits can be those of VMX or SVM (--vendor)"
    elif decoder.vendor is not None and options.vendor is None:
        told["vendor"] = f"the exit reasons are those of {decoder.vendor.name}"
    return told
