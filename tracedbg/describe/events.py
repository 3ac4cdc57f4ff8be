"""One line for each event."""

from __future__ import annotations

from tracedbg import x86
from tracedbg.describe.names import UNKNOWN, Names, hex_address, return_kind
from tracedbg.layout import Fidelity
from tracedbg.state import Event, EventFlag, Kind, Known, ShutdownReason, Source
from tracedbg.text import clean

SHUTDOWN_WORDS = {
    ShutdownReason.TRIPLE_FAULT: "a fault while #DF was being delivered (triple fault)",
    ShutdownReason.MCIP: "a machine check while MCIP was set",
    ShutdownReason.MCE_OFF: "a machine check with CR4.MCE clear",
    ShutdownReason.OTHER: "the reason is not recorded",
}


def shutdown_words(number: int) -> str:
    try:
        return SHUTDOWN_WORDS[ShutdownReason(number)]
    except ValueError:
        return SHUTDOWN_WORDS[ShutdownReason.OTHER]


def stored_words(count: int) -> str:
    """How much of its frame a failed delivery stored."""
    return f"{count:,} word{'' if count == 1 else 's'} of its frame stored" if count else "nothing of its frame stored"


class EventWords(Names):
    """Says what an event is."""

    def event_line(self, event: Event) -> str:
        """One line for a list of events, without number and CPU."""
        text = _EVENT_LINES[event.kind](self, event)
        return text + ("  (in SMM)" if event.flags & EventFlag.SMM else "")

    def _at(self, event: Event) -> str:
        """`  at RIP  rsp RSP  cpl N` as far as known."""
        parts = []
        if event.known & Known.RIP:
            parts.append(f"at {self.address(event.rip)}")
        if event.known & Known.RSP:
            parts.append(f"rsp {hex_address(event.rsp)}")
        if event.known & Known.CS:
            parts.append(f"cpl {x86.cpl(event.cs)}")
        return "".join(f"  {part}" for part in parts)

    def _deliver(self, event: Event) -> str:
        text = self.delivery_name(event)
        if event.flags & EventFlag.FAILED:
            text += " FAILED"
            if event.known & Known.ADDR:
                text += f", {stored_words(event.addr)}"
        text += self._at(event)
        exception = event.source in (Source.EXCEPTION, Source.UNKNOWN)
        if exception and event.arg in x86.ERROR_CODE_VECTORS and event.known & Known.CODE:
            text += f"  error code {event.code:#x}"
        if event.known & Known.VALUE:
            page = exception and event.arg == x86.PAGE_FAULT
            text += f"  cr2 {hex_address(event.value)}" if page else f"  event data {event.value:#x}"
        return text + ("  (not in long mode)" if event.flags & EventFlag.LEGACY else "")

    def _enter(self, event: Event) -> str:
        dumped = self.trace.layout.fidelity & Fidelity.INFERRED
        return f"{'registers as dumped' if dumped else 'handler entered'}{self._at(event)}"

    def _return(self, event: Event) -> str:
        name = return_kind(event)
        where = f"  frame {hex_address(event.rsp)}" if event.known & Known.RSP else ""
        if event.flags & EventFlag.FAULTED:
            return f"{name} FAULTED{where}"
        text = f"{name} to {self.address(event.addr if event.known & Known.ADDR else None)}"
        if event.known & Known.VALUE:
            text += f"  rsp {hex_address(event.value)}"
        if event.known & Known.CS:
            text += f"  cpl {x86.cpl(event.cs)}"
        text += where
        if name != "IRET" and event.known & Known.CODE:
            text += f"  NMI bit {'set' if event.code & x86.FRED_NMI else 'clear'}"
        return text

    def _ring(self, event: Event) -> str:
        """SYSCALL, SYSRET, SYSENTER: the state before, and the new RIP."""
        text = event.kind.name + (" FAULTED" if event.flags & EventFlag.FAULTED else "") + self._at(event)
        return text + (f"  -> {self.address(event.addr)}" if event.known & Known.ADDR else "")

    def _access(self, event: Event) -> str:
        verb = "write" if event.kind is Kind.WRITE else "read"
        length = event.code if event.flags & EventFlag.BYTES else event.arg
        text = f"{verb} {length} @ {hex_address(event.addr) if event.known & Known.ADDR else UNKNOWN}"
        if not event.flags & EventFlag.BYTES and event.known & Known.VALUE:
            text += f" = {event.value:#x}"
        return text + (f"  at {self.address(event.rip)}" if event.known & Known.RIP else "")

    def _pair(self, event: Event) -> str:
        """`a -> b` of addr and value."""
        old = hex_address(event.addr) if event.known & Known.ADDR else UNKNOWN
        return f"{old} -> {self._value(event)}"

    def _value(self, event: Event) -> str:
        return hex_address(event.value) if event.known & Known.VALUE else UNKNOWN

    def _tss(self, event: Event) -> str:
        slot = f"IST{event.arg - 8}" if event.arg >= 9 else f"RSP{event.arg}"
        return f"TSS {slot} = {self._value(event)}"

    def _gate(self, event: Event) -> str:
        text = f"gate {event.arg:#04x} = {self.address(event.value if event.known & Known.VALUE else None)}"
        if not event.known & Known.CODE:
            return text
        kind = event.code >> 8 & 0xF
        text += f"  IST {event.code & 7}" + {x86.GATE_INTERRUPT: "", x86.GATE_TRAP: "  trap gate"}.get(kind, f"  type {kind:#x}")
        return text + ("" if event.code & 0x8000 else "  not present")

    def _raise(self, event: Event) -> str:
        return f"{self.delivery_name(event)} requested"

    def _unblock(self, event: Event) -> str:
        return f"{'STGI: GIF = 1' if event.arg else 'NMIs unblocked'}{self._at(event)}"

    def _msr(self, event: Event) -> str:
        name = x86.MSR_NAMES.get(event.code)
        text = f"MSR {event.code:#x}{f' {name}' if name else ''} = "
        if not event.known & Known.VALUE:
            return text + UNKNOWN
        if event.code in (x86.MSR_LSTAR, x86.MSR_SYSENTER_EIP):
            return text + self.address(event.value)
        text += f"{event.value:#x}"
        if event.code == x86.MSR_MCG_STATUS:
            text += "  (MCIP set)" if event.value & x86.MCIP else "  (MCIP clear)"
        return text

    def _cr(self, event: Event) -> str:
        if not event.known & Known.VALUE:
            return f"CR{event.arg} = {UNKNOWN}"
        text = f"CR{event.arg} = {event.value:#x}"
        if event.arg == 4:
            fred = ", FRED set" if event.value & x86.CR4_FRED else ""
            text += f"  (MCE {'set' if event.value & x86.CR4_MCE else 'clear'}{fred})"
        if event.arg == 8:
            text += f"  (TPR {(event.value & 0xF) << 4:#04x})"
        return text

    def _gs(self, event: Event) -> str:
        if not event.arg:
            return "SWAPGS"
        if not event.known & Known.VALUE:
            return f"GS base = {UNKNOWN}"
        return f"GS base = {hex_address(event.value)}  ({'the kernel' if event.value >> 63 else 'user mode'}'s)"

    def _shadow(self, event: Event) -> str:
        covers = f"  covers {self.address(event.rip)}" if event.known & Known.RIP else ""
        return f"{'MOV SS' if event.arg else 'STI'} shadow{covers}"

    def _token(self, event: Event) -> str:
        """`shadow-stack token of IST2 taken`: what happened to its busy bit."""
        name = f"shadow-stack token of IST{event.arg}" if 1 <= event.arg <= 7 else "shadow-stack token"
        if not event.known & Known.VALUE:
            done = UNKNOWN
        elif not event.known & Known.CODE or not (event.code | event.value) & 1:
            done = "busy" if event.value & 1 else "free"
        else:
            done = {(0, 1): "taken", (1, 0): "released"}.get((event.code & 1, event.value & 1), "busy, not taken")
        return f"{name} {done}" + (f"  @ {hex_address(event.addr)}" if event.known & Known.ADDR else "")

    def _vmexit(self, event: Event) -> str:
        how = f" ({'SVM' if event.arg else 'VMX'})" if event.known & Known.ARG else ""
        nmi = " for an NMI" if event.known & Known.SOURCE and event.source is Source.NMI else ""
        reason = f", reason {event.code:#x}" if event.known & Known.CODE else ""
        return f"VM exit{how}{nmi}{reason}{self._at(event)}"

    def _vmentry(self, event: Event) -> str:
        return f"VM entry{', virtual NMIs' if event.arg & 1 else ''}{self._at(event)}"

    def _flags(self, event: Event) -> str:
        if not event.known & Known.RFLAGS:
            return f"RFLAGS = {UNKNOWN}" + (f"  IF={event.arg & 1}" if event.known & Known.ARG else "") + self._at(event)
        return f"RFLAGS = {event.rflags:#x}  IF={event.rflags >> 9 & 1}"

    def _shutdown(self, event: Event) -> str:
        return f"shutdown: {shutdown_words(event.arg if event.known & Known.ARG else ShutdownReason.OTHER)}"

    def _gap(self, event: Event) -> str:
        lost = f"{event.value:,} records lost" if event.known & Known.VALUE else "records lost, how many is unknown"
        return f"gap: {lost}" + ("" if event.known & Known.CPU else " on all CPUs")

    def _mark(self, event: Event) -> str:
        if event.flags & EventFlag.BYTES:
            data = bytes(self.trace.payload[event.value : event.value + min(event.code, 256)])
            return f"mark: {clean(data.decode('utf-8', 'replace'), 80)}"
        return "mark"


_MODES = {0: "real mode", 1: "32-bit protected mode", 2: "long mode"}

_EVENT_LINES = {
    Kind.UNKNOWN: lambda words, e: "record of an unknown kind",
    Kind.DELIVER: EventWords._deliver,
    Kind.ENTER: EventWords._enter,
    Kind.RETURN: EventWords._return,
    Kind.WRITE: EventWords._access,
    Kind.READ: EventWords._access,
    Kind.MOVE: lambda words, e: f"frame copied  {words._pair(e)}",
    Kind.SETSP: lambda words, e: f"rsp  {words._pair(e)}",
    Kind.TSS: EventWords._tss,
    Kind.GATE: EventWords._gate,
    Kind.LTR: lambda words, e: f"LTR  base {words._value(e)}",
    Kind.LIDT: lambda words, e: f"LIDT  base {words._value(e)}",
    Kind.SYSCALL: EventWords._ring,
    Kind.SYSRET: EventWords._ring,
    Kind.SYSENTER: EventWords._ring,
    Kind.RAISE: EventWords._raise,
    Kind.UNBLOCK: EventWords._unblock,
    Kind.SMI: lambda words, e: f"SMI{words._at(e)}",
    Kind.RSM: lambda words, e: f"RSM{words._at(e)}",
    Kind.MSR: EventWords._msr,
    Kind.CR: EventWords._cr,
    Kind.GS: EventWords._gs,
    Kind.FLAGS: EventWords._flags,
    Kind.SHADOW: EventWords._shadow,
    Kind.EOI: lambda words, e: "EOI",
    Kind.TOKEN: EventWords._token,
    Kind.VMEXIT: EventWords._vmexit,
    Kind.VMENTRY: EventWords._vmentry,
    Kind.MODE: lambda words, e: _MODES.get(e.arg, "unknown mode"),
    Kind.INIT: lambda words, e: "INIT" if e.arg else "RESET",
    Kind.SHUTDOWN: EventWords._shutdown,
    Kind.GAP: EventWords._gap,
    Kind.MARK: EventWords._mark,
}
