"""The guests of KVM in printed tracepoints: each vCPU is a native CPU, apart from those of the host.

The words are those of the kernel's arch/x86/kvm/trace.h, and of libtraceevent's plugins/plugin_kvm.c.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from tracedbg import wire, x86
from tracedbg.formats.ftrace import exits
from tracedbg.formats.ftrace.events import K_ADDR, K_ARG, K_CODE, K_RIP, K_SOURCE, Events, Host, pairs
from tracedbg.formats.ftrace.lines import Record
from tracedbg.formats.ftrace.rows import GUEST
from tracedbg.state import Kind, Source

_NUMBER = re.compile(r"0x[0-9a-fA-F]{1,16}")
_REASON = re.compile(r"\breason ([A-Za-z0-9_]+(?: excp)?)( FAILED_VMENTRY)?")
_EXCEPTION = re.compile(r"#([A-Z]{2})(?: \(0x([0-9a-f]{1,8})\))?")
_VIRQ = re.compile(r"(?:IRQ|Soft/INTn) 0x([0-9a-f]{1,8})|irq (\d{1,10})")
_ACCEPT = re.compile(r"apicid ([0-9a-f]{1,8}) vec (\d{1,10}) \((\w+)\|")

_ACCEPTED = {"Fixed": None, "LowPrio": None, "NMI": x86.NMI}  # None: the vector of the record
_EXCEPTIONS = {name.lstrip("#"): vector for vector, name in x86.VECTOR_NAMES.items() if vector != x86.NMI}

# Interruption information (SDM Vol. 3C 25.8.3): type in 10:8.
_TYPES = {0: Source.INJECTED, 2: Source.NMI, 3: Source.EXCEPTION, 4: Source.SOFT_INT, 5: Source.SOFT_INT, 6: Source.SOFT_INT}
_VALID, _HAS_CODE, _TYPE_NMI = 1 << 31, 1 << 11, 2


@dataclass(slots=True)
class Guest:
    """A virtual CPU: a thread of KVM."""

    pid: int
    number: int
    vcpu: int | None  # KVM's own number


@dataclass(slots=True)
class Guests:
    """Makes events of KVM's tracepoints."""

    _events: Events
    found: list[Guest] = field(default_factory=list)
    injects: bool = False  # kvm_entry tells what it injects
    _by_pid: dict[int, Guest] = field(default_factory=dict)

    def _guest(self, pid: int, vcpu: int | None, add: bool = True) -> int | None:
        """The native CPU of a thread's vCPU; None: not known, or one too many."""
        found = self._by_pid.get(pid)
        if found is not None and (vcpu is None or found.vcpu is None or found.vcpu == vcpu):
            found.vcpu = found.vcpu if vcpu is None else vcpu
            return found.number
        if not add or len(self.found) >= wire.MAX_CPUS // 2:
            return None
        self._events.rows.guests_come()
        # A thread number that was used again stands for its newest vCPU.
        made = self._by_pid[pid] = Guest(pid, GUEST + len(self.found), vcpu)
        self.found.append(made)
        return made.number

    def settle(self, host: Host) -> None:
        """No exit will say whether the last injection was delivered."""
        if host.held is not None:
            self._events.rows.release(host.held)
            self._events.counts["injections_without_exit"] += 1
        host.held = None

    def entry(self, host: Host, record: Record) -> None:
        """kvm_entry: on the host, and in the guest what is injected."""
        given = pairs(record.rest)
        self.settle(host)
        host.gif_clear = False
        guest = self._guest(record.pid, given.get("vcpu", given.get("vcpu_id")))
        self._events.add(host.number, host.time, Kind.VMENTRY)
        info = given.get("intr_info")
        if info is None:
            return
        self.injects = True
        source = _source(info)
        if not info & _VALID or source is None:
            return
        if guest is None:
            self._events.counts["requests_without_vcpu"] += 1
            return
        known, rip, code = K_ARG | K_SOURCE, given.get("rip", 0), 0
        if "rip" in given:
            known |= K_RIP
        if source == Source.EXCEPTION and info & _HAS_CODE and "error_code" in given:
            known, code = known | K_CODE, given["error_code"] & 0xFFFFFFFF
        arg = info & 0xFF
        host.held = self._events.add(guest, host.time, Kind.DELIVER, known, rip=rip, code=code, arg=arg, source=source)
        host.held_was = (source, arg)
        self._events.rows.hold(host.held)

    def exit(self, host: Host, record: Record) -> None:
        """kvm_exit: it also says whether the last injection was delivered."""
        given = pairs(record.rest)
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
            self._events.odd()
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
                self._events.counts["undelivered_injections"] += 1
            if not self._events.rows.release(host.held, undone):
                self._events.counts["injections_without_exit"] += 1
            host.held = None
        host.gif_clear = vendor == exits.SVM
        known, addr = 0, 0
        if number is not None:
            known |= K_CODE
        if vendor is not None:
            known |= K_ARG
        for name in ("rip", "guest_rip"):
            if name in given:
                known, addr = known | K_ADDR, given[name]
        source = 0
        base = None if number is None or failed else number & 0xFFFF if vendor == exits.VMX else number
        nmi = vendor == exits.SVM and base == exits.SVM_NMI
        if vendor == exits.VMX and base == exits.VMX_EXCEPTION_NMI and intr is not None:
            nmi = bool(intr & _VALID) and intr >> 8 & 7 == _TYPE_NMI
        if nmi:
            known, source = known | K_SOURCE, Source.NMI
        self._events.add(host.number, host.time, Kind.VMEXIT, known, addr=addr, code=number or 0, arg=vendor or 0, source=source)
        # An NMI-window exit shows that an IRET came, not whose: as the end of blocking alone it would make the frame of the
        # last NMI look abandoned.

    def _request(self, host: Host, guest: int | None, vector: int | None, code: int | None = None) -> None:
        """What KVM injects, or wants to inject, into a guest."""
        if guest is None:
            self._events.counts["requests_without_vcpu"] += 1
        elif vector is None or vector > 0xFF:
            self._events.odd()
        else:
            known = K_ARG | K_SOURCE | (0 if code is None else K_CODE)
            self._events.add(guest, host.time, Kind.RAISE, known, arg=vector, code=code or 0, source=Source.INJECTED)

    def exception(self, host: Host, record: Record) -> None:
        """kvm_inj_exception: a request."""
        vector = code = None
        if match := _EXCEPTION.match(record.rest):
            vector = _EXCEPTIONS.get(match[1])
            # Before Linux 5.19 a 0 stands for no error code, too.
            if match[2] is not None and vector in x86.ERROR_CODE_VECTORS:
                code = int(match[2], 16)
        elif "exception" in (given := pairs(record.rest)):
            vector = given["exception"]
            code = given.get("error_code", 0) & 0xFFFFFFFF if given.get("has_error") else None
        self._request(host, self._guest(record.pid, None), vector, code)

    def virq(self, host: Host, record: Record) -> None:
        """kvm_inj_virq: a request."""
        vector = None
        if match := _VIRQ.match(record.rest):
            vector = int(match[1], 16) if match[1] else int(match[2])
        elif match := re.match(r"(?:irq|vector)=([0-9a-f]{1,8})\b", record.rest):
            # -R: in hex since there are soft ones.
            vector = int(match[1], 16) if "soft=" in record.rest else int(match[1]) if match[1].isdecimal() else None
        self._request(host, self._guest(record.pid, None), vector)

    def accept(self, host: Host, record: Record) -> None:
        """kvm_apic_accept_irq: a virtual LAPIC took it. Whose it is shows only in the thread of its vCPU, not in an interrupt."""
        match = _ACCEPT.match(record.rest)
        if match is not None:
            apic, vector, mode = int(match[1], 16), int(match[2]), match[3]
        else:
            given = pairs(record.rest)
            if not {"apicid", "dm", "vec"} <= given.keys():
                self._events.odd()
                return
            apic, vector = given["apicid"], given["vec"]
            mode = {0: "Fixed", 1: "LowPrio", 4: "NMI"}.get(given["dm"] >> 8 & 7, "")  # as in the LAPIC's ICR
        if mode not in _ACCEPTED:
            self._events.counts["skipped_records"] += 1
            return
        guest = None
        if record.flags is not None and record.flags[2] == ".":
            guest = self._guest(record.pid, None, add=False)
        if guest is not None and self.found[guest - GUEST].vcpu != apic:
            guest = None
        self._request(host, guest, vector if _ACCEPTED[mode] is None else _ACCEPTED[mode])


def _source(info: int) -> Source | None:
    """What an interruption information injects."""
    source = _TYPES.get(info >> 8 & 7)
    return Source.MC if source == Source.EXCEPTION and info & 0xFF == x86.MACHINE_CHECK else source
