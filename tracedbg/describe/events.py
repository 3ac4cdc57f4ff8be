"""One line for each event."""

from __future__ import annotations

from tracedbg import x86
from tracedbg.describe.names import UNKNOWN, Names, hex_address
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


class EventWords(Names):
    """Says what an event is."""

    def event_line(self, event: Event) -> str:
        """One line for a list of events, without number and CPU."""
        return _EVENT_LINES[event.kind](self, event)

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
        text += self._at(event)
        has_code = event.arg in x86.ERROR_CODE_VECTORS and event.source in (Source.EXCEPTION, Source.UNKNOWN)
        if has_code and event.known & Known.CODE:
            text += f"  error code {event.code:#x}"
        if event.arg == x86.PAGE_FAULT and event.known & Known.VALUE:
            text += f"  cr2 {hex_address(event.value)}"
        return text + ("  (not in long mode)" if event.flags & EventFlag.LEGACY else "")

    def _return(self, event: Event) -> str:
        name = "IRET"
        where = f"  frame {hex_address(event.rsp)}" if event.known & Known.RSP else ""
        if event.flags & EventFlag.FAULTED:
            return f"{name} FAULTED{where}"
        text = f"{name} to {self.address(event.addr if event.known & Known.ADDR else None)}"
        if event.known & Known.VALUE:
            text += f"  rsp {hex_address(event.value)}"
        if event.known & Known.CS:
            text += f"  cpl {x86.cpl(event.cs)}"
        return text + where

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
        if event.known & Known.CODE:
            text += f"  IST {event.code & 7}" + ("" if event.code & 0x8000 else "  not present")
        return text

    def _raise(self, event: Event) -> str:
        return f"{self.delivery_name(event)} requested"

    def _msr(self, event: Event) -> str:
        text = f"MSR {event.code:#x} = {event.value:#x}" if event.known & Known.VALUE else f"MSR {event.code:#x} = {UNKNOWN}"
        if event.code == 0x17A and event.known & Known.VALUE:
            text += "  (MCIP set)" if event.value & 4 else "  (MCIP clear)"
        return text

    def _cr(self, event: Event) -> str:
        return f"CR{event.arg} = {event.value:#x}" if event.known & Known.VALUE else f"CR{event.arg} = {UNKNOWN}"

    def _flags(self, event: Event) -> str:
        if not event.known & Known.RFLAGS:
            return f"RFLAGS = {UNKNOWN}"
        return f"RFLAGS = {event.rflags:#x}  IF={event.rflags >> 9 & 1}"

    def _shutdown(self, event: Event) -> str:
        return f"shutdown: {shutdown_words(event.arg)}"

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
    Kind.ENTER: lambda words, e: f"handler entered{words._at(e)}",
    Kind.RETURN: EventWords._return,
    Kind.WRITE: EventWords._access,
    Kind.READ: EventWords._access,
    Kind.MOVE: lambda words, e: f"frame copied  {words._pair(e)}",
    Kind.SETSP: lambda words, e: f"rsp  {words._pair(e)}",
    Kind.TSS: EventWords._tss,
    Kind.GATE: EventWords._gate,
    Kind.LTR: lambda words, e: f"LTR  base {words._value(e)}",
    Kind.LIDT: lambda words, e: f"LIDT  base {words._value(e)}",
    Kind.SYSCALL: lambda words, e: f"SYSCALL{words._at(e)}",
    Kind.SYSRET: lambda words, e: f"SYSRET{words._at(e)}",
    Kind.SYSENTER: lambda words, e: f"SYSENTER{words._at(e)}",
    Kind.RAISE: EventWords._raise,
    Kind.UNBLOCK: lambda words, e: f"NMIs unblocked{words._at(e)}",
    Kind.SMI: lambda words, e: f"SMI{words._at(e)}",
    Kind.RSM: lambda words, e: f"RSM{words._at(e)}",
    Kind.MSR: EventWords._msr,
    Kind.CR: EventWords._cr,
    Kind.GS: lambda words, e: "SWAPGS",
    Kind.FLAGS: EventWords._flags,
    Kind.SHADOW: lambda words, e: "MOV SS shadow" if e.arg else "STI shadow",
    Kind.EOI: lambda words, e: "EOI",
    Kind.TOKEN: lambda words, e: f"shadow-stack token  {words._pair(e)}",
    Kind.VMEXIT: lambda words, e: f"VM exit{words._at(e)}",
    Kind.VMENTRY: lambda words, e: f"VM entry{words._at(e)}",
    Kind.MODE: lambda words, e: _MODES.get(e.arg, "unknown mode"),
    Kind.INIT: lambda words, e: "INIT" if e.arg else "RESET",
    Kind.SHUTDOWN: EventWords._shutdown,
    Kind.GAP: EventWords._gap,
    Kind.MARK: EventWords._mark,
}
