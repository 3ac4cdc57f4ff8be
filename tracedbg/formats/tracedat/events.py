"""What the tracepoints of Linux are as native events: the table that the decoder in C goes by.

Which tracepoint tells what, and when, is from the kernel's arch/x86/include/asm/trace/irq_vectors.h, arch/x86/mm/fault.c,
arch/x86/kernel/nmi.c, arch/x86/kernel/cpu/mce/core.c, kernel/irq/handle.c and arch/x86/kvm/trace.h.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tracedbg import wire, x86
from tracedbg._decode import lib
from tracedbg.formats.tracedat.text import Field, Format
from tracedbg.state import EventFlag, Kind, Known, Source
from tracedbg.writer import TraceWriter

NMI_HANDLER = ("nmi", "nmi_handler")
MCE_RECORD = ("mce", "mce_record")

Places = tuple[tuple[str, int], ...]  # names of fields, and where they go


@dataclass(frozen=True, slots=True)
class Point:
    """What becomes of the records of one tracepoint. `fields` in the order that the decoder wants; None: there is no such."""

    form: Format
    what: int
    event: bytes = bytes(wire.EVENT_SIZE)
    fields: tuple[tuple[Field | None, int], ...] = ()


@dataclass(slots=True)
class Table:
    """All tracepoints of a trace. `unusable`: those that would tell something, but lack a field for it."""

    points: list[Point] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)
    kvm: bool = False  # records of KVM may come
    kvm_injects: bool = False  # kvm_entry tells what it injects (Linux 6.14 and later)
    kprobes: bool = False


def _event(kind: Kind, known: int = 0, *, arg: int = 0, source: int = 0, value: int = 0, code: int = 0, flags: int = 0) -> bytes:
    return wire.EVENT_PACK.pack(0, 0, 0, 0, value, 0, code, 0, 0, 0, 0, known, kind, arg, source, flags)


def mark(writer: TraceWriter, text: str) -> bytes:
    """A mark with a text."""
    data = text.encode("utf-8", "replace")
    known = Known.VALUE | Known.CODE
    return _event(Kind.MARK, known, value=writer.payload(data), code=len(data), flags=EventFlag.BYTES)


_FIXED = _event(Kind.DELIVER, Known.SOURCE, source=Source.FIXED)
_FAULT = _event(Kind.DELIVER, Known.ARG | Known.SOURCE, arg=x86.PAGE_FAULT, source=Source.EXCEPTION)
_EXTERNAL = _event(Kind.DELIVER, Known.SOURCE, source=Source.EXTERNAL)
_REQUEST = _event(Kind.RAISE, Known.SOURCE, source=Source.INJECTED)
_MARK = _event(Kind.MARK)

_FAULT_FIELDS: Places = (("ip", lib.FTR_TO_RIP), ("address", lib.FTR_TO_VALUE), ("error_code", lib.FTR_TO_CODE))


def _in_order(*names: str) -> Places:
    return tuple((name, lib.FTR_TO_NOTHING) for name in names)


# What to do, the event, the fields (where nothing says where they go: in the order that ftrace.h has), which must be there.
_KNOWN: dict[tuple[str, str], tuple[int, bytes, Places, tuple[str, ...]]] = {
    ("exceptions", "page_fault_user"): (lib.FTR_EVENT, _FAULT, _FAULT_FIELDS, ("ip", "address", "error_code")),
    ("exceptions", "page_fault_kernel"): (lib.FTR_EVENT, _FAULT, _FAULT_FIELDS, ("ip", "address", "error_code")),
    NMI_HANDLER: (lib.FTR_ASK, _MARK, _in_order("handler", "handled"), ("handler",)),
    MCE_RECORD: (lib.FTR_ASK, _MARK, (), ("mcgstatus",)),
    ("irq", "irq_handler_entry"): (lib.FTR_IRQ_ENTRY, _EXTERNAL, _in_order("irq", "name"), ("irq",)),
    ("irq", "irq_handler_exit"): (lib.FTR_IRQ_EXIT, _MARK, _in_order("irq"), ("irq",)),
    ("kvm", "kvm_entry"): (lib.FTR_KVM_ENTRY, _MARK, _in_order("vcpu_id", "rip", "intr_info", "error_code"), ()),
    ("kvm", "kvm_exit"): (
        lib.FTR_KVM_EXIT, _MARK, _in_order("guest_rip", "exit_reason", "isa", "info2", "intr_info"), ("exit_reason",),
    ),
    ("kvm", "kvm_inj_exception"): (
        lib.FTR_KVM_REQUEST, _REQUEST, _in_order("exception", "has_error", "error_code"), ("exception",),
    ),
    ("kvm", "kvm_inj_virq"): (lib.FTR_KVM_REQUEST, _REQUEST, _in_order("irq"), ("irq",)),  # newer: vector
    ("kvm", "kvm_apic_accept_irq"): (
        lib.FTR_KVM_ACCEPT, _REQUEST, _in_order("apicid", "dm", "vec"), ("apicid", "dm", "vec"),
    ),
}  # fmt: skip
_VECTOR: tuple[int, bytes, Places, tuple[str, ...]] = (lib.FTR_EVENT, _FIXED, (("vector", lib.FTR_TO_ARG),), ("vector",))


def table(forms: Iterable[Format], writer: TraceWriter, keep_marks: bool) -> Table:
    """The table for these formats; with `keep_marks` every tracepoint that is no event is a mark."""
    result = Table()
    for form in forms:
        result.kprobes |= "__probe_ip" in form.text
        entry = form.system == "irq_vectors" and form.name.endswith("_entry")
        known = _VECTOR if entry else _KNOWN.get((form.system, form.name))
        if known is not None and form.name == "kvm_inj_virq" and "vector" in form.fields:
            known = (*known[:2], _in_order("vector"), ("vector",))
        point = None if known is None else _point(form, *known)
        if known is not None and point is None:
            result.unusable.append(form.full_name)
        if point is not None and form.system == "kvm":
            result.kvm = True
            result.kvm_injects |= form.name == "kvm_entry" and "intr_info" in form.fields
        result.points.append(point or _other(form, writer, keep_marks))
    return result


def _point(form: Format, what: int, event: bytes, places: Places, needed: tuple[str, ...]) -> Point | None:
    fields = {name: one for name, one in form.fields.items() if one.is_number}
    if not all(name in fields for name in needed):
        return None
    return Point(form, what, event, tuple((fields.get(name), to) for name, to in places))


def _other(form: Format, writer: TraceWriter, keep_marks: bool) -> Point:
    """A tracepoint that is no event: skipped, or a mark. That of a kprobe has its place; a field `sp` of it is taken for RSP."""
    if not keep_marks:
        return Point(form, lib.FTR_SKIP)
    fields: tuple[tuple[Field, int], ...] = ()
    if "__probe_ip" in form.text:
        places = ((form.fields.get(name), to) for name, to in (("__probe_ip", lib.FTR_TO_RIP), ("sp", lib.FTR_TO_RSP)))
        fields = tuple((one, to) for one, to in places if one is not None and one.size == 8)
    return Point(form, lib.FTR_EVENT, mark(writer, form.full_name), fields)


def number_in(form: Format, name: str, data: bytes) -> int | None:
    """A field of a record; None if the record does not have it."""
    one = form.fields.get(name)
    if one is None or not one.is_number or one.at + one.size > len(data):
        return None
    return int.from_bytes(data[one.at : one.at + one.size], "little")


def by_count(points: Sequence[Point], counts: Sequence[int]) -> dict[str, int]:
    """Records of each tracepoint that has any."""
    found: dict[str, int] = {}
    for point, count in zip(points, counts, strict=True):
        if count:
            found[point.form.full_name] = found.get(point.form.full_name, 0) + count
    return found
