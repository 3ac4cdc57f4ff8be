"""What the printed tracepoints of Linux are as native events.

Which tracepoint tells what, and when, is from the kernel's arch/x86/include/asm/trace/irq_vectors.h, arch/x86/mm/fault.c,
arch/x86/kernel/nmi.c, arch/x86/kernel/cpu/mce/core.c, kernel/irq/handle.c; those of KVM are in ftrace_guests.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from tracedbg import x86
from tracedbg.formats.ftrace.events import K_ARG, K_CODE, K_RIP, K_SOURCE, K_VALUE, Events, Host, pairs
from tracedbg.formats.ftrace.guests import Guests
from tracedbg.formats.ftrace.lines import Record
from tracedbg.formats.tracepoints import IN_NMI, mce_text, nmi_text
from tracedbg.state import EventFlag, Kind, Source

MAX_HANDLERS = 8  # of one device interrupt
MAX_NAMES = 1024  # tracepoints that are told by their names

_IRQ_VECTORS = re.compile(r"vector=(\d{1,10})")
_FAULT = re.compile(r"address=(\S+) ip=(\S+) error_code=(?:0x)?([0-9a-fA-F]{1,16})\b")
_NUMBER = re.compile(r"0x[0-9a-fA-F]{1,16}")
_NMI = re.compile(r"(?:handler=)?(\S{1,100}?)(?:\(\))? delta_ns[:=] ?-?\d+ handled[:=] ?(-?\d{1,10})")
_MCE = re.compile(
    r"CPU: (\d{1,5}), MCGc/s: [0-9a-f]+/([0-9a-f]{1,16}), MC(\d{1,10}): ([0-9a-f]{1,16}), .*?"
    r"RIP: ([0-9a-f]{1,4}):<([0-9a-f]{1,16})>, TSC: ([0-9a-f]{1,16})\b"
)
_IRQ = re.compile(r"irq=(\d{1,10})(?: (?:name|ret)=(.*))?")


@dataclass(slots=True)
class Points:
    """Makes native events of records."""

    _events: Events
    guests: Guests
    hosts: dict[int, Host] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)  # tracepoints
    flags_seen: bool = False
    nmi_hidden: bool = False  # what is in NMI context for sure does not say so

    def take(self, record: Record, timed: bool) -> None:
        """One record of a CPU that there can be. `timed`: its time counts."""
        host = self._host(record.cpu)
        host.records += 1
        host.time = record.time if timed else -1
        name = record.event if record.system is None else f"{record.system}:{record.event}"
        if name in self.seen or len(self.seen) < MAX_NAMES:
            self.seen[name] += 1
        flags = record.flags
        if flags is not None:
            self.flags_seen = True
            if flags[2] not in "zZ":
                host.in_nmi = False
        made, of_guest = _POINTS.get(record.event), _GUESTS.get(record.event)
        if made is not None and record.system in (None, made[0]):
            made[1](self, host, record)
        elif of_guest is not None and record.system in (None, "kvm"):
            of_guest(self.guests, host, record)
        elif record.system in (None, "irq_vectors") and record.event.endswith("_entry"):
            self._vector(host, record)
        else:
            self._events.counts["skipped_records"] += 1

    def lost(self, cpu: int | None, count: int | None) -> None:
        """Records are missing: what was known is gone."""
        hosts = [*self.hosts.values()] if cpu is None else [self._host(cpu)]
        time = hosts[0].time if cpu is not None else -1
        known, value = (0, 0) if count is None else (K_VALUE, count)
        for host in hosts:
            self.guests.settle(host)
            host.in_nmi, host.gif_clear, host.irq, host.exited = False, False, -1, -1
        if cpu is None or self.guests.found:  # a guest's CPU may have run there
            self._events.add(None, time, Kind.GAP, known, value=value)
        else:
            self._events.add(cpu, time, Kind.GAP, known, value=value)
        self._events.counts["gaps"] += 1
        self._events.counts["lost"] += count or 0

    def finish(self) -> int:
        """The last events; returns the number of host CPUs."""
        for host in self.hosts.values():
            self.guests.settle(host)
        return max(self.hosts, default=-1) + 1

    # -- what all use ---------------------------------------------------------------------------------------------------

    def _host(self, cpu: int) -> Host:
        host = self.hosts.get(cpu)
        if host is None:
            host = self.hosts[cpu] = Host(cpu)
        return host

    def _deliver(self, host: Host, record: Record, known: int, **fields: int) -> None:
        """A delivery to the host."""
        if host.gif_clear:  # KVM executes STGI before it records the exit
            self._events.add(host.number, host.time, Kind.UNBLOCK, K_ARG, arg=1)
            host.gif_clear = False
        if record.flags is not None and record.flags[2] in "zZ" and not host.in_nmi:
            self._events.mark(host, IN_NMI)
            host.in_nmi = True
        self._events.add(host.number, host.time, Kind.DELIVER, known | K_SOURCE, **fields)

    # -- the host -------------------------------------------------------------------------------------------------------

    def _vector(self, host: Host, record: Record) -> None:
        """irq_vectors:*_entry: in the handler of an interrupt of the local APIC, or of an IPI."""
        match = _IRQ_VECTORS.fullmatch(record.rest)
        if match is None:
            if record.system is None:  # another system's
                self._events.counts["skipped_records"] += 1
                return
        elif int(match[1]) <= 0xFF:
            self._deliver(host, record, K_ARG, arg=int(match[1]), source=Source.FIXED)
            return
        self._events.odd()
        self._deliver(host, record, 0, source=Source.FIXED, flags=EventFlag.PARTIAL)

    def _fault(self, host: Host, record: Record) -> None:
        """exceptions:page_fault_*: what is printed as a symbol (%ps) has no offset, so the address is not known."""
        match = _FAULT.match(record.rest)
        known, rip, address, code = K_ARG, 0, 0, 0
        if match is None:
            self._events.odd()
        else:
            code = int(match[3], 16)
            known |= K_CODE
            if _NUMBER.fullmatch(match[1]):
                address, known = int(match[1], 16), known | K_VALUE
            if _NUMBER.fullmatch(match[2]):
                rip, known = int(match[2], 16), known | K_RIP
            if not known & K_RIP:
                self._events.counts["faults_at_a_symbol"] += 1
        flags = 0 if match else EventFlag.PARTIAL
        self._deliver(
            host, record, known, rip=rip, value=address, code=code & 0xFFFFFFFF, arg=x86.PAGE_FAULT, source=Source.EXCEPTION,
            flags=flags,
        )  # fmt: skip

    def _nmi_handler(self, host: Host, record: Record) -> None:
        """After a handler of the NMI ran, once for each that is registered: no delivery."""
        if record.flags is not None and record.flags[2] not in "zZ":
            self.nmi_hidden = True
        match = _NMI.match(record.rest)
        self._events.mark(host, nmi_text(None, None) if match is None else nmi_text(match[1], int(match[2])))

    def _mce(self, host: Host, record: Record) -> None:
        """From a worker, some time later."""
        match = _MCE.match(record.rest)
        if match is not None:
            numbers = [int(part, 10 if n in (0, 2) else 16) for n, part in enumerate(match.groups())]
            given = dict(zip(("cpu", "mcgstatus", "bank", "status", "cs", "ip", "tsc"), numbers, strict=True))
        else:
            given = pairs(record.rest)
            if "mcgstatus" not in given or "status" not in given:
                given = {}
                self._events.odd()
        self._events.mark(host, mce_text(given.get))

    def _irq_entry(self, host: Host, record: Record) -> None:
        """A device interrupt runs each of its handlers once; one record a handler. The vector is not printed."""
        match = _IRQ.match(record.rest)
        if match is None:
            self._events.odd()
            return
        irq, handler = int(match[1]), match[2] or ""
        goes_on = host.exited_at == host.records - 1 and host.exited == host.irq == irq
        if goes_on and handler not in host.handlers and len(host.handlers) < MAX_HANDLERS:
            host.handlers.append(handler)
            self._events.counts["further_handlers"] += 1
            return
        host.irq, host.handlers = irq, [handler]
        self._deliver(host, record, 0, source=Source.EXTERNAL)

    def _irq_exit(self, host: Host, record: Record) -> None:
        match = _IRQ.match(record.rest)
        host.exited, host.exited_at = (-1 if match is None else int(match[1])), host.records
        self._events.counts["skipped_records"] += 1


_POINTS: dict[str, tuple[str, Callable[[Points, Host, Record], None]]] = {
    "page_fault_user": ("exceptions", Points._fault),
    "page_fault_kernel": ("exceptions", Points._fault),
    "nmi_handler": ("nmi", Points._nmi_handler),
    "mce_record": ("mce", Points._mce),
    "irq_handler_entry": ("irq", Points._irq_entry),
    "irq_handler_exit": ("irq", Points._irq_exit),
}
_GUESTS: dict[str, Callable[[Guests, Host, Record], None]] = {
    "kvm_entry": Guests.entry,
    "kvm_exit": Guests.exit,
    "kvm_inj_exception": Guests.exception,
    "kvm_inj_virq": Guests.virq,
    "kvm_apic_accept_irq": Guests.accept,
}
