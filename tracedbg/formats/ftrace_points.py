"""What the printed tracepoints of Linux are as native events.

Which tracepoint tells what, and when, is from the kernel's arch/x86/include/asm/trace/irq_vectors.h, arch/x86/mm/fault.c,
arch/x86/kernel/nmi.c, arch/x86/kernel/cpu/mce/core.c, kernel/irq/handle.c, and arch/x86/kvm/trace.h, which also has the words
that are printed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from tracedbg import wire, x86
from tracedbg.formats import ftrace_exits as exits
from tracedbg.formats.ftrace_lines import Record
from tracedbg.formats.ftrace_rows import GUEST, Rows
from tracedbg.state import EventFlag, Kind, Known, Source
from tracedbg.writer import TraceWriter

IN_NMI = "in NMI context: of an NMI, #MC, #DB, INT3 of the kernel, or #DF"
MAX_TEXTS = 4096  # of marks
MAX_HANDLERS = 8  # of one device interrupt
MAX_NAMES = 1024  # tracepoints that are told by their names

_IRQ_VECTORS = re.compile(r"vector=(\d{1,10})")
_FAULT = re.compile(r"address=(\S+) ip=(\S+) error_code=(?:0x)?([0-9a-fA-F]{1,16})\b")
_HEX = re.compile(r"(?:0x)?[0-9a-fA-F]{1,16}")
_NUMBER = re.compile(r"0x[0-9a-fA-F]{1,16}")
_PAIR = re.compile(r"\b([a-z_][a-z0-9_]*)[= ](0x[0-9a-fA-F]{1,16}|[0-9a-fA-F]{1,16})\b")
_NMI = re.compile(r"(?:handler=)?(\S{1,100}?)(?:\(\))? delta_ns[:=] ?-?\d+ handled[:=] ?(-?\d{1,10})")
_MCE = re.compile(
    r"CPU: (\d{1,5}), MCGc/s: [0-9a-f]+/([0-9a-f]{1,16}), MC(\d{1,10}): ([0-9a-f]{1,16}), .*?"
    r"RIP: ([0-9a-f]{1,4}):<([0-9a-f]{1,16})>, TSC: ([0-9a-f]{1,16})\b"
)
_IRQ = re.compile(r"irq=(\d{1,10})(?: (?:name|ret)=(.*))?")
_REASON = re.compile(r"\breason ([A-Za-z0-9_]+(?: excp)?)( FAILED_VMENTRY)?")
_EXCEPTION = re.compile(r"#([A-Z]{2})(?: \(0x([0-9a-f]{1,8})\))?")
_VIRQ = re.compile(r"(?:IRQ|Soft/INTn) 0x([0-9a-f]{1,8})|irq (\d{1,10})")
_ACCEPT = re.compile(r"apicid ([0-9a-f]{1,8}) vec (\d{1,10}) \((\w+)\|")

# In the output of -R (no print format) these fields are in hex without a prefix, as their print formats say %x.
_RAW_HEX = frozenset(
    {"rip", "guest_rip", "intr_info", "error_code", "info1", "info2", "apicid", "status", "mcgstatus", "ip", "tsc"}
)
_ACCEPTED = {"Fixed": None, "LowPrio": None, "NMI": x86.NMI}  # None: the vector of the record
_EXCEPTIONS = {name.lstrip("#"): vector for vector, name in x86.VECTOR_NAMES.items() if vector != x86.NMI}

# Interruption information (SDM Vol. 3C 25.8.3): type in 10:8.
_TYPES = {0: Source.INJECTED, 2: Source.NMI, 3: Source.EXCEPTION, 4: Source.SOFT_INT, 5: Source.SOFT_INT, 6: Source.SOFT_INT}
_VALID, _HAS_CODE, _TYPE_NMI = 1 << 31, 1 << 11, 2

_K_ADDR, _K_ARG, _K_CODE, _K_CPU = int(Known.ADDR), int(Known.ARG), int(Known.CODE), int(Known.CPU)
_K_RIP, _K_SOURCE, _K_TIME, _K_VALUE = int(Known.RIP), int(Known.SOURCE), int(Known.TIME), int(Known.VALUE)
_PACK = wire.EVENT_PACK.pack


@dataclass(slots=True)
class Host:
    """What is remembered of a CPU of the host."""

    number: int
    time: int = -1
    records: int = 0
    in_nmi: bool = False
    held: int | None = None  # the delivery of that entry, until the next exit says whether it was one
    held_was: tuple[int, int] = (0, 0)  # its source and vector
    irq: int = -1
    handlers: list[str] = field(default_factory=list)  # those that ran for it
    exited: int = -1  # the interrupt whose handler returned in the record number `exited_at`
    exited_at: int = -1


@dataclass(slots=True)
class Guest:
    """A virtual CPU: a thread of KVM."""

    pid: int
    number: int
    vcpu: int | None  # KVM's own number


@dataclass(slots=True)
class Points:
    """Makes native events of records."""

    rows: Rows
    writer: TraceWriter
    hosts: dict[int, Host] = field(default_factory=dict)
    guests: list[Guest] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)  # tracepoints
    counts: Counter[str] = field(default_factory=Counter)
    kvm_injects: bool = False  # kvm_entry tells what it injects
    flags_seen: bool = False
    nmi_hidden: bool = False  # what is in NMI context for sure does not say so
    _by_pid: dict[int, Guest] = field(default_factory=dict)
    _texts: dict[str, tuple[int, int]] = field(default_factory=dict)

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
        made = _POINTS.get(record.event)
        if made is not None and record.system in (None, made[0]):
            made[1](self, host, record)
        elif record.system in (None, "irq_vectors") and record.event.endswith("_entry"):
            self._vector(host, record)
        else:
            self.counts["skipped_records"] += 1

    def lost(self, cpu: int | None, count: int | None) -> None:
        """Records are missing: what was known is gone."""
        hosts = [*self.hosts.values()] if cpu is None else [self._host(cpu)]
        time = hosts[0].time if cpu is not None else -1
        known, value = (0, 0) if count is None else (_K_VALUE, count)
        for host in hosts:
            self._settle(host)
            host.in_nmi, host.irq, host.exited = False, -1, -1
        if cpu is None or self.guests:  # a guest's CPU may have run there
            self._add(None, time, Kind.GAP, known, value=value)
        else:
            self._add(cpu, time, Kind.GAP, known, value=value)
        self.counts["gaps"] += 1
        self.counts["lost"] += count or 0

    def finish(self) -> int:
        """The last events; returns the number of host CPUs."""
        for host in self.hosts.values():
            self._settle(host)
        return max(self.hosts, default=-1) + 1

    # -- what all use ---------------------------------------------------------------------------------------------------

    def _host(self, cpu: int) -> Host:
        host = self.hosts.get(cpu)
        if host is None:
            host = self.hosts[cpu] = Host(cpu)
        return host

    def _add(
        self, cpu: int | None, time: int, kind: Kind, known: int = 0, *, rip: int = 0, addr: int = 0, value: int = 0,
        code: int = 0, arg: int = 0, source: int = 0, flags: int = 0,
    ) -> int:  # fmt: skip
        if cpu is not None:
            known |= _K_CPU
        if time >= 0:
            known |= _K_TIME
        return self.rows.add(
            _PACK(max(time, 0), rip, 0, addr, value, 0, code, 0, cpu or 0, 0, 0, known, kind, arg, source, flags)
        )

    def _mark(self, host: Host, text: str) -> None:
        if text not in self._texts:
            if len(self._texts) >= MAX_TEXTS:
                return
            data = text.encode("utf-8", "replace")
            self._texts[text] = (self.writer.payload(data), len(data))
        at, size = self._texts[text]
        self._add(host.number, host.time, Kind.MARK, _K_VALUE | _K_CODE, value=at, code=size, flags=EventFlag.BYTES)

    def _odd(self) -> None:
        self.counts["odd_records"] += 1

    def _deliver(self, host: Host, record: Record, known: int, **fields: int) -> None:
        """A delivery to the host."""
        if record.flags is not None and record.flags[2] in "zZ" and not host.in_nmi:
            self._mark(host, IN_NMI)
            host.in_nmi = True
        self._add(host.number, host.time, Kind.DELIVER, known | _K_SOURCE, **fields)

    # -- the host -------------------------------------------------------------------------------------------------------

    def _vector(self, host: Host, record: Record) -> None:
        """irq_vectors:*_entry: in the handler of an interrupt of the local APIC, or of an IPI."""
        match = _IRQ_VECTORS.fullmatch(record.rest)
        if match is None:
            if record.system is None:  # another system's
                self.counts["skipped_records"] += 1
                return
        elif int(match[1]) <= 0xFF:
            self._deliver(host, record, _K_ARG, arg=int(match[1]), source=Source.FIXED)
            return
        self._odd()
        self._deliver(host, record, 0, source=Source.FIXED, flags=EventFlag.PARTIAL)

    def _fault(self, host: Host, record: Record) -> None:
        """exceptions:page_fault_*: what is printed as a symbol (%ps) has no offset, so the address is not known."""
        match = _FAULT.match(record.rest)
        known, rip, address, code = _K_ARG, 0, 0, 0
        if match is None:
            self._odd()
        else:
            code = int(match[3], 16)
            known |= _K_CODE
            if _NUMBER.fullmatch(match[1]):
                address, known = int(match[1], 16), known | _K_VALUE
            if _NUMBER.fullmatch(match[2]):
                rip, known = int(match[2], 16), known | _K_RIP
            if not known & _K_RIP:
                self.counts["faults_at_a_symbol"] += 1
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
        if match is None:
            self._mark(host, "NMI: a handler ran")
            return
        handled = int(match[2])
        self._mark(host, f"NMI: its handler {match[1]} ran" + (f", handled {handled}" if handled else ", not its NMI"))

    def _mce(self, host: Host, record: Record) -> None:
        """From a worker, some time later."""
        match = _MCE.match(record.rest)
        if match is not None:
            numbers = [int(part, 10 if n in (0, 2) else 16) for n, part in enumerate(match.groups())]
            cpu, status, bank, bank_status, cs, ip, tsc = numbers
        else:
            given = _pairs(record.rest)
            if "mcgstatus" not in given or "status" not in given:
                self._mark(host, "a machine check, recorded later")
                self._odd()
                return
            status, bank_status = given["mcgstatus"], given["status"]
            cpu, bank, cs, ip, tsc = (given.get(name, 0) for name in ("cpu", "bank", "cs", "ip", "tsc"))
        words = ["#MC" if status & x86.MCIP else "machine check without #MC (polled or CMCI)"]
        words[0] += ", recorded later"
        words.append(f"CPU {cpu}")
        if ip:
            words.append(f"RIP {cs:#x}:{ip:#x}")
        words += [f"MCG_STATUS {status:#x}", f"status {bank_status:#x}", f"bank {bank}"]
        if tsc:
            words.append(f"TSC {tsc}")
        self._mark(host, ", ".join(words))

    def _irq_entry(self, host: Host, record: Record) -> None:
        """A device interrupt runs each of its handlers once; one record a handler. The vector is not printed."""
        match = _IRQ.match(record.rest)
        if match is None:
            self._odd()
            return
        irq, handler = int(match[1]), match[2] or ""
        goes_on = host.exited_at == host.records - 1 and host.exited == host.irq == irq
        if goes_on and handler not in host.handlers and len(host.handlers) < MAX_HANDLERS:
            host.handlers.append(handler)
            self.counts["further_handlers"] += 1
            return
        host.irq, host.handlers = irq, [handler]
        self._deliver(host, record, 0, source=Source.EXTERNAL)

    def _irq_exit(self, host: Host, record: Record) -> None:
        match = _IRQ.match(record.rest)
        host.exited, host.exited_at = (-1 if match is None else int(match[1])), host.records
        self.counts["skipped_records"] += 1

    # -- guests ---------------------------------------------------------------------------------------------------------

    def _guest(self, pid: int, vcpu: int | None, add: bool = True) -> int | None:
        """The native CPU of a thread's vCPU; None: not known, or one too many."""
        found = self._by_pid.get(pid)
        if found is not None and (vcpu is None or found.vcpu is None or found.vcpu == vcpu):
            found.vcpu = found.vcpu if vcpu is None else vcpu
            return found.number
        if not add or len(self.guests) >= wire.MAX_CPUS // 2:
            return None
        self.rows.guests_come()
        # A thread number that was used again stands for its newest vCPU.
        made = self._by_pid[pid] = Guest(pid, GUEST + len(self.guests), vcpu)
        self.guests.append(made)
        return made.number

    def _settle(self, host: Host) -> None:
        """No exit will say whether the last injection was delivered."""
        if host.held is not None:
            self.rows.release(host.held)
            self.counts["injections_without_exit"] += 1
        host.held = None

    def _kvm_entry(self, host: Host, record: Record) -> None:
        given = _pairs(record.rest)
        self._settle(host)
        guest = self._guest(record.pid, given.get("vcpu", given.get("vcpu_id")))
        self._add(host.number, host.time, Kind.VMENTRY)
        info = given.get("intr_info")
        if info is None:
            return
        self.kvm_injects = True
        source = _source(info)
        if not info & _VALID or source is None:
            return
        if guest is None:
            self.counts["requests_without_vcpu"] += 1
            return
        known, rip, code = _K_ARG | _K_SOURCE, given.get("rip", 0), 0
        if "rip" in given:
            known |= _K_RIP
        if source == Source.EXCEPTION and info & _HAS_CODE and "error_code" in given:
            known, code = known | _K_CODE, given["error_code"] & 0xFFFFFFFF
        arg = info & 0xFF
        host.held = self._add(guest, host.time, Kind.DELIVER, known, rip=rip, code=code, arg=arg, source=source)
        host.held_was = (source, arg)
        self.rows.hold(host.held)

    def _kvm_exit(self, host: Host, record: Record) -> None:
        given = _pairs(record.rest)
        match = _REASON.search(record.rest)
        number = vendor = None
        if match is not None:
            vendor, number = exits.reason(match[1])
            if number is None and (plain := _NUMBER.fullmatch(match[1])):
                number = int(plain[0], 16) & 0xFFFFFFFF
        elif "exit_reason" in given:
            number = given["exit_reason"] & 0xFFFFFFFF
            vendor = {1: exits.VMX, 2: exits.SVM}.get(given.get("isa", 0))
        else:
            self._odd()
        failed = vendor == exits.VMX and bool((match and match[2]) or (number or 0) & _VALID)
        if failed:
            number = (number or 0) | _VALID
        info2, intr = given.get("info2", 0), given.get("intr_info")
        if vendor == exits.VMX and intr is None and "info2" in given:
            info2, intr = 0, info2  # before Linux 5.10, by -R
        if host.held is not None:
            # VMX: IDT-vectoring information (SDM Vol. 3C 25.9.3). SVM: EXITINTINFO (APM Vol. 2 15.7.2).
            was = (intr or 0) if vendor == exits.SVM else info2 if vendor == exits.VMX else 0
            undone = failed or bool(was & _VALID and (_source(was), was & 0xFF) == host.held_was)
            if undone:
                self.counts["undelivered_injections"] += 1
            if not self.rows.release(host.held, undone):
                self.counts["injections_without_exit"] += 1
            host.held = None
        known, addr = 0, 0
        if number is not None:
            known |= _K_CODE
        if vendor is not None:
            known |= _K_ARG
        for name in ("rip", "guest_rip"):
            if name in given:
                known, addr = known | _K_ADDR, given[name]
        source = 0
        base = None if number is None or failed else number & 0xFFFF if vendor == exits.VMX else number
        nmi = vendor == exits.SVM and base == exits.SVM_NMI
        if vendor == exits.VMX and base == exits.VMX_EXCEPTION_NMI and intr is not None:
            nmi = bool(intr & _VALID) and intr >> 8 & 7 == _TYPE_NMI
        if nmi:
            known, source = known | _K_SOURCE, Source.NMI
        self._add(host.number, host.time, Kind.VMEXIT, known, addr=addr, code=number or 0, arg=vendor or 0, source=source)
        # An NMI-window exit shows that an IRET came, not whose: as the end of blocking alone it would make the frame of the
        # last NMI look abandoned.

    def _request(self, host: Host, guest: int | None, vector: int | None, code: int | None = None) -> None:
        """What KVM injects, or wants to inject, into a guest."""
        if guest is None:
            self.counts["requests_without_vcpu"] += 1
        elif vector is None or vector > 0xFF:
            self._odd()
        else:
            known = _K_ARG | _K_SOURCE | (0 if code is None else _K_CODE)
            self._add(guest, host.time, Kind.RAISE, known, arg=vector, code=code or 0, source=Source.INJECTED)

    def _kvm_exception(self, host: Host, record: Record) -> None:
        vector = code = None
        if match := _EXCEPTION.match(record.rest):
            vector = _EXCEPTIONS.get(match[1])
            # Before Linux 5.19 a 0 stands for no error code, too.
            if match[2] is not None and vector in x86.ERROR_CODE_VECTORS:
                code = int(match[2], 16)
        elif "exception" in (given := _pairs(record.rest)):
            vector = given["exception"]
            code = given.get("error_code", 0) & 0xFFFFFFFF if given.get("has_error") else None
        self._request(host, self._guest(record.pid, None), vector, code)

    def _kvm_virq(self, host: Host, record: Record) -> None:
        vector = None
        if match := _VIRQ.match(record.rest):
            vector = int(match[1], 16) if match[1] else int(match[2])
        elif match := re.match(r"(?:irq|vector)=([0-9a-f]{1,8})\b", record.rest):
            # -R: in hex since there are soft ones.
            vector = int(match[1], 16) if "soft=" in record.rest else int(match[1]) if match[1].isdecimal() else None
        self._request(host, self._guest(record.pid, None), vector)

    def _kvm_accept(self, host: Host, record: Record) -> None:
        """A virtual LAPIC took it. Whose it is is known only in the thread of its own vCPU, and not in an interrupt on top."""
        match = _ACCEPT.match(record.rest)
        if match is not None:
            apic, vector, mode = int(match[1], 16), int(match[2]), match[3]
        else:
            given = _pairs(record.rest)
            if not {"apicid", "dm", "vec"} <= given.keys():
                self._odd()
                return
            apic, vector = given["apicid"], given["vec"]
            mode = {0: "Fixed", 1: "LowPrio", 4: "NMI"}.get(given["dm"] >> 8 & 7, "")  # as in the LAPIC's ICR
        if mode not in _ACCEPTED:
            self.counts["skipped_records"] += 1
            return
        guest = None
        if record.flags is not None and record.flags[2] == ".":
            guest = self._guest(record.pid, None, add=False)
        if guest is not None and self.guests[guest - GUEST].vcpu != apic:
            guest = None
        self._request(host, guest, vector if _ACCEPTED[mode] is None else _ACCEPTED[mode])


_POINTS: dict[str, tuple[str, Callable[[Points, Host, Record], None]]] = {
    "page_fault_user": ("exceptions", Points._fault),
    "page_fault_kernel": ("exceptions", Points._fault),
    "nmi_handler": ("nmi", Points._nmi_handler),
    "mce_record": ("mce", Points._mce),
    "irq_handler_entry": ("irq", Points._irq_entry),
    "irq_handler_exit": ("irq", Points._irq_exit),
    "kvm_entry": ("kvm", Points._kvm_entry),
    "kvm_exit": ("kvm", Points._kvm_exit),
    "kvm_inj_exception": ("kvm", Points._kvm_exception),
    "kvm_inj_virq": ("kvm", Points._kvm_virq),
    "kvm_apic_accept_irq": ("kvm", Points._kvm_accept),
}


def _source(info: int) -> Source | None:
    """What an interruption information injects."""
    source = _TYPES.get(info >> 8 & 7)
    return Source.MC if source == Source.EXCEPTION and info & 0xFF == x86.MACHINE_CHECK else source


def _pairs(text: str) -> dict[str, int]:
    """The numbers of `name value` and `name=value`."""
    found: dict[str, int] = {}
    for name, value in _PAIR.findall(text):
        if value.startswith("0x") or name in _RAW_HEX:
            found.setdefault(name, int(value, 16))
        elif value.isdecimal():
            found.setdefault(name, int(value))
    return found
