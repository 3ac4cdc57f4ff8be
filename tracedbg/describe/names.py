"""Names of addresses, slots, stacks, events and frames."""

from __future__ import annotations

from tracedbg import x86
from tracedbg.errors import FormatError
from tracedbg.layout import REGION_STACK, SLOT_RSP0
from tracedbg.state import Event, EventFlag, Frame, Kind, Known, Return, Source, Stack
from tracedbg.symbols import Symbols
from tracedbg.text import clean
from tracedbg.trace import Trace

UNKNOWN = "?"
MASK = (1 << 64) - 1

# Slots from the lowest address up, as bit numbers; the error code lies below RIP.
_BY_ADDRESS = (5, 0, 1, 2, 3, 4)


def hex_address(address: int) -> str:
    """`ffff8300bffd2fd8`; low addresses with 0x, as they do not look like addresses."""
    return f"{address:x}" if address >= 1 << 60 else f"{address:#x}"


def slot_of(frame: Frame, address: int) -> str:
    """The name of a word of a frame; empty outside of it. FRED's SS word holds more than SS: `ss+info`."""
    if not frame.lo <= address < frame.hi:
        return ""
    return word_name((frame.hi - 1 - address) // 8, frame.fred)


def word_name(place: int, fred: bool) -> str:
    """The name of the word that is `place` words below the highest one of a frame; empty below the frame."""
    words = x86.FRED_WORDS if fred else x86.IDT_WORDS
    if place >= len(words):
        return ""
    number = words[place]
    if number is None:
        return x86.FRED_ABOVE[place]
    name = x86.SLOT_NAMES[number]
    return f"{name}+info" if fred and name == "ss" else name


def slots_text(mask: int) -> str:
    """`rip..ss` for neighbours, else a list: `rip, rsp`. Order: ascending addresses."""
    chosen = [n for n in _BY_ADDRESS if mask >> n & 1]
    if not chosen:
        return "none"
    places = [_BY_ADDRESS.index(n) for n in chosen]
    names = [x86.SLOT_NAMES[n] for n in chosen]
    if len(chosen) > 2 and places[-1] - places[0] == len(chosen) - 1:
        return f"{names[0]}..{names[-1]}"
    return ", ".join(names)


def slot_number(frame: Frame, address: int) -> int | None:
    """The slot (index into x86.SLOT_NAMES) of a word of a frame; None outside, and for the two upper words of FRED."""
    if not frame.lo <= address < frame.hi:
        return None
    words = x86.FRED_WORDS if frame.fred else x86.IDT_WORDS
    return words[min((frame.hi - 1 - address) // 8, len(words) - 1)]


def saved_word(frame: Frame, address: int) -> tuple[int, int] | None:
    """The word that the frame's own delivery stored at an address, and a mask of the bits known of it."""
    number = slot_number(frame, address)
    value = None if number is None else frame.saved.slots()[number]
    if number is None:
        return (0, MASK) if frame.fred and slot_of(frame, address) == x86.FRED_ABOVE[0] else None
    if value is None:
        return None
    if frame.fred and x86.SLOT_NAMES[number] == "ss":
        return value & 0xFFFF | frame.vector << 32, 0xFF_0000_FFFF
    if frame.fred and x86.SLOT_NAMES[number] == "cs":
        return value & 0xFFFF | frame.from_level << 16, 0xFF_FFFF
    return value, MASK


def _delivery(vector: int, source: Source, length: int | None) -> str:
    """The name of a delivery by vector and source; `length`: bytes of an INT instruction, where known."""
    fake = {x86.NMI: " (fake NMI)", x86.MACHINE_CHECK: " (fake #MC)"}.get(vector, "")
    if source is Source.NMI:
        return "NMI" if vector == x86.NMI else f"NMI with vector {vector:#x}"
    if source is Source.MC:
        return "#MC" if vector == x86.MACHINE_CHECK else f"#MC with vector {vector:#x}"
    if source is Source.SYSCALL:  # FRED; its vectors are no vectors of exceptions
        return {1: "SYSCALL", 2: "SYSENTER"}.get(vector, f"system call {vector:#04x}")
    if source is Source.SOFT_INT:
        short = {1: "int1", 3: "int3", 4: "into"}.get(vector) if length == 1 else None
        return short or f"int {vector if vector < 10 else f'{vector:#x}'}{fake}"
    if source is Source.EXCEPTION:
        return x86.VECTOR_NAMES.get(vector, f"exception {vector:#04x}")
    if source is Source.UNKNOWN:
        return x86.VECTOR_NAMES.get(vector, f"vector {vector:#04x}")
    kind = {Source.EXTINT: "8259 interrupt", Source.INJECTED: "injected event"}.get(source, "interrupt")
    return f"{kind} {vector:#04x}{fake}"


def return_kind(event: Event) -> str:
    """`IRET`, `ERETU` or `ERETS`."""
    number = event.arg if event.known & Known.ARG else Return.IRET
    return Return(number).name if number in set(Return) else Return.IRET.name


class Names:
    """The names of what a trace holds: the part of Words that all others build on."""

    def __init__(self, trace: Trace, symbols: Symbols | None = None) -> None:
        self.trace = trace
        self._given = symbols
        self.reload()

    def reload(self) -> None:
        """Take the names from the trace, also when it has become another."""
        trace = self.trace
        self.symbols = Symbols.from_bytes(trace.symbols, trace.path) if self._given is None else self._given
        self.stack_names = {slot: clean(name, 24) for slot, name in trace.layout.names.items()}

    # -- names ------------------------------------------------------------------------------------------------------

    def event(self, index: int) -> Event | None:
        """The event, None where there is none or it cannot be decoded."""
        try:
            return self.trace.event(index)
        except (IndexError, FormatError):
            return None

    def source_index(self, index: int) -> int | None:
        """The source's own number of an event, where it has one."""
        event = self.event(index)
        return event.source_index if event is not None and event.known & Known.SOURCE_INDEX else None

    def event_name(self, index: int) -> str:
        """`event 3 (#571)` where the source has a number of its own, else `event 3`."""
        number = self.source_index(index)
        return f"event {index}" if number is None or number == index else f"event {index} (#{number})"

    def address(self, address: int | None) -> str:
        """`do_nmi+2` where a symbol is known, else hex."""
        if address is None:
            return UNKNOWN
        return self.symbols.name(address) or hex_address(address)

    def symbol(self, address: int | None) -> str | None:
        """`do_nmi+2`, None without a symbol."""
        return None if address is None else self.symbols.name(address)

    def delivery_name(self, event: Event) -> str:
        """`NMI`, `#PF`, `int 2 (fake NMI)`, `interrupt 0xec`."""
        if not event.known & Known.ARG:
            return "delivery of an unknown vector"
        source = event.source if event.known & Known.SOURCE else Source.UNKNOWN
        return _delivery(event.arg, source, event.code if event.known & Known.CODE else None)

    def frame_kind(self, frame: Frame) -> str:
        """What was delivered: `NMI`, `#PF`, ..."""
        event = self.event(frame.entry)
        if event is not None and event.kind is Kind.DELIVER and event.arg == frame.vector:
            return self.delivery_name(event)
        return _delivery(frame.vector, frame.source, None)

    def frame_name(self, frame: Frame) -> str:
        """`NMI at event 0 (#569)`."""
        return f"{self.frame_kind(frame)} at {self.event_name(frame.entry)}"

    def failed(self, frame: Frame) -> bool:
        """Whether the delivery died before its handler: the frame is what it had stored by then."""
        event = self.event(frame.entry)
        return event is not None and bool(event.flags & EventFlag.FAILED)

    def return_name(self, index: int | None) -> str:
        """`IRET`, `ERETU` or `ERETS`: what the return at an event is."""
        event = None if index is None else self.event(index)
        return return_kind(event) if event is not None else "IRET"

    # -- stacks -----------------------------------------------------------------------------------------------------

    def stack_name(self, slot: int, cpu: int | None = None) -> str:
        """`IST2 (NMI)`, `RSP0`, `current stack`; with `cpu` where the trace has several: `IST2 (NMI) of cpu 1`."""
        name = self._stack_short(slot)
        system = self.stack_names.get(slot)
        if system:
            name += f" ({system})"
        return f"{name} of cpu {cpu}" if cpu is not None and self.trace.cpus > 1 and slot else name

    def _stack_short(self, slot: int) -> str:
        if slot == SLOT_RSP0:
            return "RSP0"
        return f"IST{slot}" if slot else "current stack"

    def stack_title(self, stack: Stack) -> str:
        """The name of a stack of a position: `IST2 (NMI) of cpu 0`, `FRED level 2`, `stack`."""
        if stack.named and stack.slot:
            return self.stack_name(stack.slot, stack.cpu)
        level = self._fred_level(stack.cpu, stack.hi) if stack.named else None
        if level is None:
            return "stack" if stack.named else "stack, bounds assumed"
        return f"FRED level {level}" + (f" of cpu {stack.cpu}" if self.trace.cpus > 1 else "")

    def _fred_level(self, cpu: int, top: int) -> int | None:
        """The level whose stack begins at an address, by what FRED's MSRs hold at the start."""
        cpus = self.trace.layout.cpus
        fred = cpus[cpu].fred if cpu < len(cpus) else None
        return fred.rsp.index(top) if fred is not None and top in fred.rsp else None

    def stack_ending_at(self, address: int) -> str:
        """The stack of the layout whose lowest byte is at an address; `its stack` where that is not one of them."""
        found = {
            (r.slot, r.cpu, r.hi): self._stack_short(r.slot) if r.slot else "the stack"
            for r in self.trace.layout.regions
            if r.kind == REGION_STACK and r.lo == address
        }
        return next(iter(found.values())) if len(set(found.values())) == 1 else "its stack"

    def frame_stack(self, frame: Frame) -> str:
        """The stack that a frame was stored on: `IST2`, `RSP0`, `FRED level 2`, `the current stack`."""
        if frame.ist:
            return f"IST{frame.ist}"
        user = frame.saved.cs is not None and x86.cpl(frame.saved.cs) == 3
        if frame.fred and (user or frame.dedicated):
            return f"FRED level {frame.level}"
        return "RSP0" if user else "the current stack"

    def slots_text(self, mask: int) -> str:
        """`rip..ss` for neighbours, else a list."""
        return slots_text(mask)
