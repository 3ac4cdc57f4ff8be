"""Events, frames, stacks and findings in words: the one voice of the command line and the screen."""

from __future__ import annotations

from dataclasses import dataclass

from tracedbg import rules, x86
from tracedbg.errors import FormatError
from tracedbg.layout import SLOT_RSP0
from tracedbg.state import (
    Cause,
    Context,
    CpuState,
    Event,
    EventFlag,
    Evidence,
    Finding,
    Frame,
    FrameStatus,
    Kind,
    Known,
    Mismatch,
    Rule,
    Settle,
    ShutdownReason,
    Source,
    Stack,
    Word,
)
from tracedbg.symbols import Symbols
from tracedbg.text import WIDTH, clean, wrap
from tracedbg.trace import Trace

__all__ = ["BytesRow", "ChainStep", "WordRow", "Words", "clean", "hex_address", "slot_of", "slots_text", "wrap"]

UNKNOWN = "?"

# Slots from the lowest address up, as bit numbers; the error code lies below RIP.
_BY_ADDRESS = (5, 0, 1, 2, 3, 4)

OVERWRITES = frozenset(
    {Rule.FRAME_CLOBBERED, Rule.FRAME_CONSUMED_CORRUPT, Rule.RESUME_LOOP, Rule.FRAME_RELOCATED, Rule.FRAME_SAME_BYTES}
)

EVIDENCE_WORDS = {
    Evidence.RECORDED: "recorded",
    Evidence.COMPUTED: "computed",
    Evidence.INFERRED: "inferred",
    Evidence.UNKNOWN: "unknown",
}

SETTLE_WORDS = {
    Settle.RETURN: "returned",
    Settle.COPY: "returned through a copy",
    Settle.CONTEXT: "context seen again",
    Settle.ABOVE: "RSP seen above the saved one",
    Settle.IF: "IF=1 code ran off its stack",
    Settle.CPL3: "CPU ran at CPL 3",
    Settle.POPPED: "popped",
    Settle.OVERWRITTEN: "overwritten while open",
    Settle.DROPPED: "forgotten (gap, reset or limit)",
    Settle.NMI: "a genuine NMI came",
}

STATUS_WORDS = {FrameStatus.LIVE: "live", FrameStatus.CLOBBERED: "overwritten", FrameStatus.MOVED: "moved"}

SHUTDOWN_WORDS = {
    ShutdownReason.TRIPLE_FAULT: "a fault while #DF was being delivered (triple fault)",
    ShutdownReason.MCIP: "a machine check while MCIP was set",
    ShutdownReason.MCE_OFF: "a machine check with CR4.MCE clear",
    ShutdownReason.OTHER: "the reason is not recorded",
}

_MISMATCH_WORDS = {
    Mismatch.ENTER_RSP: "the handler was entered with another RSP than the TSS gives",
    Mismatch.ENTER_RIP: "the handler was entered at another address than the gate gives",
    Mismatch.ENTER_CS: "the handler was entered with another CS than the gate gives",
    Mismatch.NMI_BLOCKED: "an NMI was delivered while NMIs were blocked",
    Mismatch.IF_CLEAR: "a maskable interrupt was delivered with IF = 0",
}


@dataclass(frozen=True, slots=True)
class ChainStep:
    """One step of how it came about."""

    event: int
    text: str


@dataclass(frozen=True, slots=True)
class BytesRow:
    """A slot of an overwritten frame: what its own delivery stored and what is there now. None: unknown."""

    addr: int
    slot: str
    own: int | None
    now: int | None
    overwritten: bool
    differs: bool


@dataclass(frozen=True, slots=True)
class WordRow:
    """A word of stack memory in words. `mark` is `!` where the owner's word was overwritten, else a blank."""

    addr: int
    value: str
    slot: str
    owner: str
    writer: str
    mark: str


def hex_address(address: int) -> str:
    """`ffff8300bffd2fd8`; low addresses with 0x, as they do not look like addresses."""
    return f"{address:x}" if address >= 1 << 60 else f"{address:#x}"


def slot_of(frame: Frame, address: int) -> str:
    """The slot name of a word of a frame; empty outside of it."""
    number = _slot_number(frame, address)
    return "" if number is None else x86.SLOT_NAMES[number]


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


def _slot_number(frame: Frame, address: int) -> int | None:
    if not frame.lo <= address < frame.hi:
        return None
    return (4, 3, 2, 1, 0, 5)[min((frame.hi - 1 - address) // 8, 5)]


def _delivery(vector: int, source: Source, length: int | None) -> str:
    """The name of a delivery by vector and source; `length`: bytes of an INT instruction, where known."""
    fake = {x86.NMI: " (fake NMI)", x86.MACHINE_CHECK: " (fake #MC)"}.get(vector, "")
    if source is Source.NMI:
        return "NMI" if vector == x86.NMI else f"NMI with vector {vector:#x}"
    if source is Source.MC:
        return "#MC" if vector == x86.MACHINE_CHECK else f"#MC with vector {vector:#x}"
    if source is Source.SOFT_INT:
        short = {1: "int1", 3: "int3", 4: "into"}.get(vector) if length == 1 else None
        return short or f"int {vector if vector < 10 else f'{vector:#x}'}{fake}"
    if source is Source.EXCEPTION:
        return x86.VECTOR_NAMES.get(vector, f"exception {vector:#04x}")
    if source is Source.UNKNOWN:
        return x86.VECTOR_NAMES.get(vector, f"vector {vector:#04x}")
    kind = {Source.EXTINT: "8259 interrupt", Source.INJECTED: "injected event"}.get(source, "interrupt")
    return f"{kind} {vector:#04x}{fake}"


class Words:
    """Says what a trace, its replay and its findings hold. Names come from `symbols`, or from the trace itself."""

    def __init__(self, trace: Trace, symbols: Symbols | None = None) -> None:
        self.trace = trace
        self.symbols = Symbols.from_bytes(trace.symbols, trace.path) if symbols is None else symbols
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

    def frame_stack(self, frame: Frame) -> str:
        """The stack that a frame was stored on: `IST2`, `RSP0`, `the current stack`."""
        if frame.ist:
            return f"IST{frame.ist}"
        return "RSP0" if frame.saved.cs is not None and x86.cpl(frame.saved.cs) == 3 else "the current stack"

    def slots_text(self, mask: int) -> str:
        """`rip..ss` for neighbours, else a list."""
        return slots_text(mask)

    # -- events -----------------------------------------------------------------------------------------------------

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
        return f"shutdown: {_shutdown_words(event.arg)}"

    def _gap(self, event: Event) -> str:
        lost = f"{event.value:,} records lost" if event.known & Known.VALUE else "records lost, how many is unknown"
        return f"gap: {lost}" + ("" if event.known & Known.CPU else " on all CPUs")

    def _mark(self, event: Event) -> str:
        if event.flags & EventFlag.BYTES:
            data = bytes(self.trace.payload[event.value : event.value + min(event.code, 256)])
            return f"mark: {clean(data.decode('utf-8', 'replace'), 80)}"
        return "mark"

    # -- state ------------------------------------------------------------------------------------------------------

    def cpu_line(self, cpu: CpuState) -> str:
        """The state of one CPU in one line."""
        parts = [f"cpu {cpu.cpu}: rip {self.address(cpu.rip)}"]
        parts.append(f"rsp {UNKNOWN if cpu.rsp is None else hex_address(cpu.rsp)}")
        parts.append(f"cpl {UNKNOWN if cpu.cs is None else x86.cpl(cpu.cs)}")
        parts.append(f"IF={UNKNOWN if cpu.rflags is None else cpu.rflags >> 9 & 1}")
        parts.append(self.nmi_text(cpu))
        parts.append("MCIP " + {None: "unknown", True: "set", False: "clear"}[cpu.mcip])
        return "  ".join(parts)

    def nmi_text(self, cpu: CpuState) -> str:
        """`NMIs blocked since event 0`, `NMIs not blocked`, `NMI blocking unknown`."""
        if cpu.nmi_blocked is None:
            return "NMI blocking unknown"
        if not cpu.nmi_blocked:
            return "NMIs not blocked"
        text = "NMIs blocked" + (f" since {self.event_name(cpu.nmi_since)}" if cpu.nmi_since is not None else "")
        return text + (", one pending" if cpu.nmi_pending else "")

    def frame_line(self, frame: Frame) -> str:
        """One line for a list of open frames."""
        text = (
            f"{self.frame_name(frame)}  {self.frame_stack(frame)} [{hex_address(frame.lo)}, {hex_address(frame.hi)})  "
            f"resumes {self.address(frame.saved.rip)}"
        )
        if frame.saved.rsp is not None:
            text += f" rsp {hex_address(frame.saved.rsp)}"
        text += f"  {STATUS_WORDS[frame.status]}"
        return text + (f" by {self.event_name(frame.clobbered_by)}" if frame.clobbered_by is not None else "")

    def stack_line(self, stack: Stack) -> str:
        """`IST2 (NMI) of cpu 0 [lo, hi), 1 open frame`."""
        name = "stack" if stack.named else "stack, bounds assumed"
        if stack.named and stack.slot:
            name = self.stack_name(stack.slot, stack.cpu)
        plural = "" if stack.frames == 1 else "s"
        return f"{name} [{hex_address(stack.lo)}, {hex_address(stack.hi)}), {stack.frames} open frame{plural}"

    def word_row(self, word: Word, frames: tuple[Frame, ...]) -> WordRow:
        """A word of stack memory with its slot, its owner (the newest open frame there) and its writer."""
        value = f"{word.value:016x}"
        if word.known != 0xFF:
            digits = [value[14 - 2 * b : 16 - 2 * b] if word.known >> b & 1 else "??" for b in range(7, -1, -1)]
            value = "".join(digits)
        owners = [f for f in frames if f.lo <= word.addr < f.hi]
        slot = owner = ""
        mark = " "
        writers = list(dict.fromkeys(word.writers))
        if owners:
            newest = max(owners, key=lambda f: f.entry)
            slot = slot_of(newest, word.addr)
            owner = self.frame_name(newest)
            if any(w is not None and f.status is FrameStatus.CLOBBERED and w != f.entry for f in owners for w in writers):
                mark = "!"
        return WordRow(word.addr, value, slot, owner, self._writers_text(writers), mark)

    def _writers_text(self, writers: list[int | None]) -> str:
        if len(writers) > 1:
            return "several: " + ", ".join("initial" if w is None else f"event {w}" for w in writers)
        writer = writers[0] if writers else None
        if writer is None:
            return "initial contents"
        event = self.event(writer)
        if event is None:
            return f"event {writer}"
        if event.kind is Kind.DELIVER:
            return f"{self.event_name(writer)} {self.delivery_name(event)}"
        by = f" at {self.address(event.rip)}" if event.known & Known.RIP else ""
        return f"{self.event_name(writer)} {event.kind.name.lower()}{by}"

    # -- findings ---------------------------------------------------------------------------------------------------

    def finding_line(self, finding: Finding, at: int | None = None) -> str:
        """One line: who did what to whom, why that was possible, what came of it."""
        return f"cpu {finding.cpu}, {self.event_name(finding.event)}: {self.finding_message(finding, at)}"

    def finding_message(self, finding: Finding, at: int | None = None) -> str:
        """The line without CPU and event."""
        text = self.statement(finding, at)
        why = self.cause(finding)
        text += f": {why}." if why else "."
        outcome = self.outcome(finding, at)
        return f"{text} {outcome}" if outcome else text

    def statement(self, finding: Finding, at: int | None = None) -> str:
        """What happened, as a clause without an end: `NMI overwrote the frame of the NMI at event 0 on IST2 (...)`."""
        rule = rules.finding_rule(finding, at)
        if finding.raised_rule is Rule.RESUME_LOOP:
            return self._loop(finding)
        if rule in OVERWRITES:
            return self._overwrite(finding, rule)
        return _STATEMENTS[rule](self, finding)

    def _overwrite(self, finding: Finding, rule: Rule) -> str:
        victim, writer = finding.victim, finding.writer
        whose = f"the frame of the {self.frame_name(victim)}" if victim is not None else "a frame"
        stack = self._place(finding)
        size = self._size(finding)
        if writer is None:
            return f"{whose} on {stack} was overwritten ({size})"
        if finding.raised_rule is Rule.FRAME_CONSUMED_CORRUPT:
            # No overwrite of an open frame was seen: foreign words came into it by software, or after it counted as left.
            return f"an IRET popped {whose} with words that the {self.frame_name(writer)} had stored ({size})"
        text = f"{self.frame_kind(writer)} overwrote {whose} on {stack} ({size})"
        return text + (" with the values that it already held" if rule is Rule.FRAME_SAME_BYTES else "")

    def _loop(self, finding: Finding) -> str:
        """A loop that was raised at its return, beside the finding of the overwrite."""
        victim, writer, popped = finding.victim, finding.writer, finding.popped
        whose = f"the frame of the {self.frame_name(victim)}" if victim is not None else "its frame"
        words = f"the words that the {self.frame_name(writer)} stored" if writer is not None else "words of another delivery"
        name = self.event_name(finding.event if finding.consumer is None else finding.consumer)
        place = f" to {self.address(popped.rip)}" if popped is not None and popped.rip is not None else ""
        if popped is not None and popped.rsp is not None:
            place += f", rsp {hex_address(popped.rsp)}"
        return f"{whose} holds {words}, so the IRET at {name} went{place}, back into its own handler"

    def _place(self, finding: Finding) -> str:
        """The stack of an overwrite: that of the writer, since only a stack switch overwrites."""
        frame = finding.writer or finding.victim
        return self.frame_stack(frame) if frame is not None else "its stack"

    def _size(self, finding: Finding) -> str:
        victim = finding.victim
        count = finding.hi - finding.lo
        whole = victim is not None and count < victim.hi - victim.lo
        size = f"{count} of {victim.hi - victim.lo} bytes" if victim is not None and whole else f"{count} bytes"
        return f"{size}, {slots_text(finding.slots)}" if finding.slots else size

    def cause(self, finding: Finding) -> str:
        """Why it could happen, as a clause; empty if the finding has no cause."""
        victim, writer = finding.victim, finding.writer
        match finding.cause:
            case Cause.NMI_UNBLOCKED:
                return self._unblocked(finding)
            case Cause.NMI_NEVER_BLOCKED:
                fake = victim is not None and victim.vector == x86.NMI
                return "a fake NMI does not block NMIs" if fake else "NMIs were not blocked, as only an NMI blocks them"
            case Cause.NMI_UNKNOWN:
                return "NMIs were blocked as far as the trace tells; what unblocked them is not recorded"
            case Cause.MC_UNMASKED:
                if victim is not None and victim.source is Source.MC:
                    return "nothing but MCIP holds off a machine check, and the first handler had cleared it"
                if victim is not None and victim.vector == x86.MACHINE_CHECK:
                    return "a fake #MC does not set MCIP, and nothing else holds off a machine check"
                return "nothing but MCIP holds off a machine check"
            case Cause.MASKABLE:
                return "IF was 1 in that handler, so a maskable interrupt could come"
            case Cause.SOFTWARE:
                return "it was raised by what ran inside that handler"
            case Cause.OTHER_CPU:
                cpus = f"cpu {writer.cpu} and cpu {victim.cpu}" if writer is not None and victim is not None else "two CPUs"
                return f"the TSSes of {cpus} name the same stack"
            case Cause.NONE:
                return ""

    def _unblocked(self, finding: Finding) -> str:
        frame = None if finding.cause_frame is None else self.event(finding.cause_frame)
        event = None if finding.cause_event is None else self.event(finding.cause_event)
        if frame is not None and frame.kind is Kind.DELIVER and finding.cause_frame is not None:
            whose = f"the {self.delivery_name(frame)} at {self.event_name(finding.cause_frame)}"
            if event is not None and event.kind is Kind.RETURN:
                return f"the IRET of {whose} had unblocked NMIs"
            return f"{whose} had returned by then, and its IRET unblocks NMIs"
        if event is not None and event.kind is Kind.RETURN and finding.cause_event is not None:
            return f"the IRET at {self.event_name(finding.cause_event)} had unblocked NMIs"
        if finding.cause_event is not None:
            return f"NMIs had been unblocked by {self.event_name(finding.cause_event)}"
        return "NMIs had been unblocked"

    def outcome(self, finding: Finding, at: int | None = None) -> str:
        """What came of an overwritten frame, as sentences; empty for other findings."""
        rule = rules.finding_rule(finding, at)
        match rule:
            case Rule.FRAME_CLOBBERED:
                return self._open_outcome(finding, at)
            case Rule.FRAME_CONSUMED_CORRUPT:
                return self._consumed(finding) + "."
            case Rule.RESUME_LOOP:
                times = f"; the trace has this return {finding.count:,} times" if finding.count > 1 else ""
                if finding.raised_rule is Rule.RESUME_LOOP:
                    return f"It returns there for ever{times}."
                return f"{self._consumed(finding)}, back into its own handler, for ever{times}."
            case Rule.FRAME_RELOCATED:
                return self._survived(finding)
            case _:
                return ""

    def _open_outcome(self, finding: Finding, at: int | None) -> str:
        victim, writer = finding.victim, finding.writer
        if at is None and finding.settled is not None and finding.settled_by is Settle.DROPPED:
            return f"What became of it is not known: records are missing from {self.event_name(finding.settled)} on."
        when = "Still live at the end of the trace" if at is None else "Still live here"
        if rules.finding_evidence(finding, at) < Evidence.COMPUTED:
            when = "Whether it was still needed is not recorded"
        if victim is None or writer is None or not finding.differ & 0b1001:
            return f"{when}."
        if victim.hi != writer.hi:  # another top: RIP and RSP are not simply the writer's
            return f"{when}: if it is resumed from these bytes, not all of them are its own."
        text = f"{when}: if it is resumed from these bytes, the IRET goes to {self._other_place(writer.saved, victim.saved)}"
        return text + (", back into its own handler, for ever." if _own_handler(victim, writer) else ".")

    def _other_place(self, new: Context, old: Context) -> str:
        """`do_nmi+2 instead of default_idle+0xc6`; where RIP is the same, the RSPs tell them apart."""
        text = self.address(new.rip)
        if old.rip is not None and old.rip != new.rip:
            return f"{text} instead of {self.address(old.rip)}"
        if new.rsp is not None and old.rsp != new.rsp:
            text += f" with rsp {hex_address(new.rsp)}"
            if old.rsp is not None:
                text += f" instead of {hex_address(old.rsp)}"
        return text

    def _consumed(self, finding: Finding) -> str:
        name = self.event_name(finding.consumer) if finding.consumer is not None else "an unknown event"
        frame = f"event {finding.victim.entry}" if finding.victim is not None else "the frame"
        new, old = finding.popped, finding.victim.saved if finding.victim is not None else None
        if new is None or new.rip is None:
            return f"The IRET at {name} resumed {frame} from these bytes"
        where = self.address(new.rip) if old is None else self._other_place(new, old)
        return f"The IRET at {name}, the resume of {frame}, went to {where}"

    def _survived(self, finding: Finding) -> str:
        if finding.settled is None:
            return "Software had moved the frame before, so nothing was lost."
        name = self.event_name(finding.settled)
        match finding.settled_by:
            case Settle.RETURN:
                return f"No harm: its own words were back when the IRET at {name} popped them."
            case Settle.COPY:
                return f"No harm: the IRET at {name} popped a copy of it."
            case Settle.CONTEXT:
                return f"It survived: its RIP and RSP were running again at {name}."
            case Settle.ABOVE:
                return f"It survived: at {name} the CPU ran on the interrupted stack again, above the saved RSP."
            case Settle.CPL3:
                return f"It survived: the CPU ran at CPL 3 at {name}."
            case _:
                return f"It survived: its context had been resumed by {name}."

    def _user_stack(self, finding: Finding) -> str:
        frame = finding.writer or finding.victim
        what = self.frame_kind(frame) if frame is not None else "an event"
        place = f"at {self.address(frame.saved.rip)} " if frame is not None and frame.saved.rip is not None else ""
        return (
            f"{what} {place}was pushed at CPL 0 onto memory of user mode, "
            f"[{hex_address(finding.lo)}, {hex_address(finding.hi)}), as its gate has no IST stack"
        )

    def _fake(self, finding: Finding) -> str:
        event = self.event(finding.event)
        what = self.delivery_name(event) if event is not None else "a fake"
        real, guard = ("NMI", "NMIs are not blocked") if finding.rule is Rule.FAKE_NMI else ("#MC", "MCIP is not set")
        times = f", {finding.count:,} times in all" if finding.count > 1 else ""
        return f"{what} ran the {real} handler, though to the CPU it is none: {guard} in it{times}"

    def _double_fault(self, finding: Finding) -> str:
        failed = sorted(i for i in (finding.cause_event, finding.cause_frame) if i is not None)
        names = []
        for index in failed:
            event = self.event(index)
            if event is not None and event.kind is Kind.DELIVER:
                names.append(f"the {self.delivery_name(event)} at {self.event_name(index)}")
        event = self.event(finding.event)
        at = f" at {self.address(event.rip)}" if event is not None and event.known & Known.RIP else ""
        rsp = f" with rsp {hex_address(event.rsp)}" if event is not None and event.known & Known.RSP else ""
        if len(names) == 2:
            return f"#DF{at}{rsp}: {names[0]} could not be delivered, nor {names[1]} that this raised"
        if names:
            return f"#DF{at}{rsp}: {names[0]} could not be delivered"
        return f"#DF{at}{rsp}; what could not be delivered is not recorded"

    def _shut(self, finding: Finding) -> str:
        return f"the CPU shut down: {_shutdown_words(finding.detail)}"

    def _lost(self, finding: Finding) -> str:
        event = self.event(finding.event)
        count = f"{event.value:,}" if event is not None and event.known & Known.VALUE else "an unknown number of"
        where = "this CPU" if event is not None and event.known & Known.CPU else "all CPUs"
        times = f" ({finding.count:,} gaps)" if finding.count > 1 else ""
        return f"{count} records of {where} are missing{times}; what was open before is unknown after"

    def _mismatch(self, finding: Finding) -> str:
        said = [text for bit, text in _MISMATCH_WORDS.items() if finding.detail & bit]
        event = self.event(finding.event)
        what = ""
        if event is not None and event.kind is Kind.DELIVER:
            what = f"{self.delivery_name(event)}: "
        times = f" ({finding.count:,} times)" if finding.count > 1 else ""
        return what + ("; ".join(said) or "the source and the rules differ") + times

    def finding_chain(self, finding: Finding, at: int | None = None) -> tuple[ChainStep, ...]:
        """How it came about, in the order of events; with `at` no further than that position."""
        steps: list[ChainStep] = []
        if finding.rule in OVERWRITES:
            self._overwrite_chain(finding, steps)
        elif finding.rule is Rule.DOUBLE_FAULT:
            for index in sorted(i for i in (finding.cause_event, finding.cause_frame) if i is not None):
                event = self.event(index)
                if event is not None:
                    steps.append(ChainStep(index, self.event_line(event)))
            self._own_step(finding, steps)
        else:
            self._own_step(finding, steps)
        return tuple(step for step in steps if at is None or step.event < at)

    def _own_step(self, finding: Finding, steps: list[ChainStep]) -> None:
        event = self.event(finding.event)
        if event is not None:
            steps.append(ChainStep(finding.event, self.event_line(event)))

    def _overwrite_chain(self, finding: Finding, steps: list[ChainStep]) -> None:
        victim, writer = finding.victim, finding.writer
        if victim is not None:
            steps.append(ChainStep(victim.entry, self._entry_step(victim)))
        if finding.cause is Cause.NMI_UNBLOCKED:
            self._unblock_steps(finding, steps)
        if writer is not None:
            text = self._entry_step(writer)
            if victim is not None and finding.event == writer.entry:
                text += f", over {slots_text(finding.slots)} of the frame of event {victim.entry}"
            steps.append(ChainStep(writer.entry, text))
        if finding.rule is Rule.FRAME_RELOCATED and finding.settled is not None:
            steps.append(ChainStep(finding.settled, self._survived(finding).rstrip(".")))
        elif finding.consumer is not None:
            steps.append(ChainStep(finding.consumer, self._pop_step(finding)))

    def _entry_step(self, frame: Frame) -> str:
        where = self.address(frame.saved.rip) if frame.saved.rip is not None else "unknown code"
        rsp = f" (rsp {hex_address(frame.saved.rsp)})" if frame.saved.rsp is not None else ""
        text = f"{self.frame_kind(frame)} at {where}{rsp}"
        if frame.lo >= frame.hi:  # the core no longer had the frame, only its delivery
            return text
        return f"{text}, frame on {self.frame_stack(frame)} [{hex_address(frame.lo)}, {hex_address(frame.hi)})"

    def _unblock_steps(self, finding: Finding, steps: list[ChainStep]) -> None:
        entry, by = finding.cause_frame, finding.cause_event
        event = None if entry is None else self.event(entry)
        if entry is not None and event is not None and event.kind is Kind.DELIVER:
            at = f" at {self.address(event.rip)}" if event.known & Known.RIP else ""
            steps.append(ChainStep(entry, f"{self.delivery_name(event)}{at}, before that frame is resumed"))
        if by is None:
            return
        how = self.event(by)
        whose = f"of event {entry}" if entry is not None else "of an unknown frame"
        if how is not None and how.kind is Kind.RETURN:
            steps.append(ChainStep(by, f"IRET {whose} to {self.address(how.addr)}: NMIs are unblocked"))
        elif how is not None and how.kind is Kind.UNBLOCK:
            steps.append(ChainStep(by, "NMIs are unblocked"))
        else:
            what = self.delivery_name(event) if event is not None and event.kind is Kind.DELIVER else "frame"
            steps.append(ChainStep(by, f"by now the {what} {whose} has returned, and its IRET has unblocked NMIs"))

    def _pop_step(self, finding: Finding) -> str:
        popped = finding.popped
        if popped is None:
            return "IRET pops these bytes"
        rsp = f", rsp {hex_address(popped.rsp)}" if popped.rsp is not None else ""
        whose = f"the frame of event {finding.victim.entry}" if finding.victim is not None else "the frame"
        return f"IRET pops {whose}: rip {self.address(popped.rip)}{rsp}"

    def bytes_rows(self, finding: Finding) -> tuple[BytesRow, ...]:
        """The slots of the victim by ascending address: what it stored, and what the writer left there."""
        victim, writer = finding.victim, finding.writer
        if victim is None:
            return ()
        own = victim.saved.slots()
        new = writer.saved.slots() if writer is not None else (None,) * 6
        rows = []
        for addr in range(victim.lo, victim.hi, 8):
            number = _slot_number(victim, addr)
            if number is None:
                continue
            hit = bool(finding.slots >> number & 1)
            other = _slot_number(writer, addr) if writer is not None and hit else None
            now = new[other] if other is not None else (None if hit else own[number])
            rows.append(BytesRow(addr, x86.SLOT_NAMES[number], own[number], now, hit, bool(finding.differ >> number & 1)))
        return tuple(rows)

    def evidence_text(self, finding: Finding, at: int | None = None) -> str:
        """How it is known, in words."""
        evidence = rules.finding_evidence(finding, at)
        rule = rules.finding_rule(finding, at)
        word = EVIDENCE_WORDS[evidence]
        if rule in (Rule.FRAME_CONSUMED_CORRUPT, Rule.RESUME_LOOP):
            return f"{word}: the trace has the IRET and the words that it popped"
        if rule is Rule.FRAME_CLOBBERED or (rule is Rule.FRAME_SAME_BYTES):
            if evidence is Evidence.INFERRED:
                return f"{word}: the trace has no returns, and nothing else shows whether the frame was still in use"
            if evidence is Evidence.COMPUTED:
                return f"{word}: by the gate, the TSS and the interrupted RSPs the frame was still to be resumed"
        if rule is Rule.FRAME_RELOCATED:
            if evidence is Evidence.INFERRED:
                return f"{word}: the interrupted code was seen running again; the copy itself was not"
            return f"{word}: the trace has the copy or the return"
        if rule is Rule.USER_STACK:
            if evidence is Evidence.COMPUTED:
                return f"{word}: the frame lies in memory that the layout calls user memory"
            return f"{word}: RSP was close to the one last seen at CPL 3; a `user` range in the layout would settle it"
        return word

    def finding_text(self, finding: Finding, at: int | None = None, *, fixes: bool = True, width: int = WIDTH) -> list[str]:
        """A paragraph block for a mail."""
        rule = rules.finding_rule(finding, at)
        level = rules.finding_severity(finding, at)
        head = f"{level}: {rules.rule_id(rule)}, cpu {finding.cpu}, {self.event_name(finding.event)}"
        why = self.cause(finding)
        lines = [head, *wrap(_capital(f"{self.statement(finding, at)}{': ' + why if why else ''}."), "  ", width)]
        rows = self.bytes_rows(finding)
        if rows and finding.slots:
            lines += self._bytes_lines(finding, rows)
        chain = self.finding_chain(finding, at)
        if len(chain) > 1:
            lines.append("")
            for number, step in enumerate(chain, 1):
                lines += wrap(f"{self.event_name(step.event)}: {step.text}", f"  {number}. ", width)
        outcome = self.outcome(finding, at)
        if outcome and (len(chain) < 2 or chain[-1].text != outcome):
            lines += ["", *wrap(outcome, "  ", width)]
        lines.append("")
        lines += wrap(self.evidence_text(finding, at), "  evidence: ", width)
        refs = rules.finding_refs(finding, at)
        if refs:
            lines += wrap("; ".join(refs), "  manual:   ", width)
        if fixes and rules.BY_RULE[rule].fixes:
            lines.append("  known ways out:")
            for fix in rules.BY_RULE[rule].fixes:
                lines += wrap(fix, "  - ", width)
        return lines

    def _bytes_lines(self, finding: Finding, rows: tuple[BytesRow, ...]) -> list[str]:
        by = f"now, by event {finding.writer.entry}" if finding.writer is not None else "now"
        own = f"event {finding.victim.entry}'s own" if finding.victim is not None else "own"
        lines = ["", f"    {'address':<16}  {'slot':<10}  {own:<18}  {by}"]
        for row in rows:
            now = "not overwritten" if not row.overwritten else _number(row.now)
            mark = "  *" if row.differs else ""
            lines.append(f"    {row.addr:016x}  {row.slot:<10}  {_number(row.own):<18}  {now:<16}{mark}".rstrip())
            names = (self.symbol(row.own), self.symbol(row.now)) if row.slot == "rip" else (None, None)
            if len(names[0] or "") > 18:
                pairs = zip(("own", "now"), names, strict=True)
                lines += [f"    {'':<16}  {'':<10}  {when}: {name}" for when, name in pairs if name]
            elif any(names):
                lines.append(f"    {'':<16}  {'':<10}  {names[0] or '':<18}  {names[1] or '':<16}".rstrip())
        return lines


def _number(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value:x}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:] if text.startswith(("the ", "a ", "an ")) else text


def _shutdown_words(number: int) -> str:
    try:
        return SHUTDOWN_WORDS[ShutdownReason(number)]
    except ValueError:
        return SHUTDOWN_WORDS[ShutdownReason.OTHER]


def _own_handler(victim: Frame, writer: Frame) -> bool:
    """Whether the context that the writer saved lies in the victim's own handler: on its stack, below its frame."""
    rsp = writer.saved.rsp
    return rsp is not None and victim.stack_lo < rsp <= victim.rip_addr


_STATEMENTS = {
    Rule.USER_STACK: Words._user_stack,
    Rule.FAKE_NMI: Words._fake,
    Rule.FAKE_MCE: Words._fake,
    Rule.DOUBLE_FAULT: Words._double_fault,
    Rule.SHUTDOWN: Words._shut,
    Rule.TRACE_GAP: Words._lost,
    Rule.MODEL_MISMATCH: Words._mismatch,
}

_MODES = {0: "real mode", 1: "32-bit protected mode", 2: "long mode"}

_EVENT_LINES = {
    Kind.UNKNOWN: lambda words, e: "record of an unknown kind",
    Kind.DELIVER: Words._deliver,
    Kind.ENTER: lambda words, e: f"handler entered{words._at(e)}",
    Kind.RETURN: Words._return,
    Kind.WRITE: Words._access,
    Kind.READ: Words._access,
    Kind.MOVE: lambda words, e: f"frame copied  {words._pair(e)}",
    Kind.SETSP: lambda words, e: f"rsp  {words._pair(e)}",
    Kind.TSS: Words._tss,
    Kind.GATE: Words._gate,
    Kind.LTR: lambda words, e: f"LTR  base {words._value(e)}",
    Kind.LIDT: lambda words, e: f"LIDT  base {words._value(e)}",
    Kind.SYSCALL: lambda words, e: f"SYSCALL{words._at(e)}",
    Kind.SYSRET: lambda words, e: f"SYSRET{words._at(e)}",
    Kind.SYSENTER: lambda words, e: f"SYSENTER{words._at(e)}",
    Kind.RAISE: Words._raise,
    Kind.UNBLOCK: lambda words, e: f"NMIs unblocked{words._at(e)}",
    Kind.SMI: lambda words, e: f"SMI{words._at(e)}",
    Kind.RSM: lambda words, e: f"RSM{words._at(e)}",
    Kind.MSR: Words._msr,
    Kind.CR: Words._cr,
    Kind.GS: lambda words, e: "SWAPGS",
    Kind.FLAGS: Words._flags,
    Kind.SHADOW: lambda words, e: "MOV SS shadow" if e.arg else "STI shadow",
    Kind.EOI: lambda words, e: "EOI",
    Kind.TOKEN: lambda words, e: f"shadow-stack token  {words._pair(e)}",
    Kind.VMEXIT: lambda words, e: f"VM exit{words._at(e)}",
    Kind.VMENTRY: lambda words, e: f"VM entry{words._at(e)}",
    Kind.MODE: lambda words, e: _MODES.get(e.arg, "unknown mode"),
    Kind.INIT: lambda words, e: "INIT" if e.arg else "RESET",
    Kind.SHUTDOWN: Words._shutdown,
    Kind.GAP: Words._gap,
    Kind.MARK: Words._mark,
}
