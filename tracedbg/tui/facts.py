"""What the details pane says of an event: all fields that are known, and the state of its CPU after it."""

from __future__ import annotations

from tracedbg import x86
from tracedbg.describe import Words, hex_address
from tracedbg.state import CpuState, Event, EventFlag, Kind, Known
from tracedbg.tui.session import View

_FLAGS = {
    EventFlag.FAILED: "failed",
    EventFlag.FAULTED: "faulted",
    EventFlag.PARTIAL: "damaged record",
    EventFlag.EXT: "external",
    EventFlag.SMM: "in SMM",
    EventFlag.LEGACY: "not in long mode",
}
_RFLAGS = {x86.RFLAGS_TF: "TF", x86.RFLAGS_IF: "IF", x86.RFLAGS_NT: "NT", x86.RFLAGS_RF: "RF"}
_UNKNOWN = "?"


def cpu_summary(cpu: CpuState) -> str:
    """The state that decides what can come next, short enough for a title."""
    cpl = _UNKNOWN if cpu.cs is None else x86.cpl(cpu.cs)
    flag = _UNKNOWN if cpu.rflags is None else int(bool(cpu.rflags & x86.RFLAGS_IF))
    mcip = {None: _UNKNOWN, False: "0", True: "1"}[cpu.mcip]
    return f"cpu {cpu.cpu} · CPL {cpl} · IF {flag} · {_nmi(cpu)} · MCIP {mcip}"


def _nmi(cpu: CpuState) -> str:
    if cpu.nmi_blocked is None:
        return "NMIs ?"
    text = "NMIs blocked" if cpu.nmi_blocked else "NMIs not blocked"
    if cpu.nmi_blocked and cpu.nmi_since is not None:
        text += f" since {cpu.nmi_since}"
    return text + (", one pending" if cpu.nmi_pending else "")


def event_lines(event: Event, words: Words, clock_hz: int) -> list[str]:
    """The event itself."""
    head = [f"event {event.index}"]
    if event.known & Known.SOURCE_INDEX:
        head.append(f"source number #{event.source_index}")
    head.append(f"cpu {event.cpu if event.known & Known.CPU else _UNKNOWN}")
    if event.known & Known.TIME:
        head.append(f"time {event.time}" + (f" ({event.time / clock_hz:.6f} s)" if clock_hz else ""))
    lines = [" · ".join(head), f"  {words.event_line(event)}"]
    lines += [f"  {name:<11} {text}" for name, text in _fields(event, words)]
    return lines


def _fields(event: Event, words: Words) -> list[tuple[str, str]]:
    known = event.known
    result: list[tuple[str, str]] = []
    popped = event.kind is Kind.RETURN
    if known & Known.RIP:
        result.append(("at", _address(event.rip, words)))
    if known & Known.RSP:
        result.append(("frame at" if popped else "rsp", hex_address(event.rsp)))
    if known & Known.ADDR:
        result.append(("popped rip" if popped else "addr", _address(event.addr, words)))
    if known & Known.VALUE and not event.flags & EventFlag.BYTES:
        result.append(("popped rsp" if popped else "value", _address(event.value, words)))
    registers = ((Known.CS, "cs", event.cs), (Known.SS, "ss", event.ss))
    selectors = [f"{name} {value:#x}" for bit, name, value in registers if known & bit]
    if known & Known.RFLAGS:
        names = [name for bit, name in _RFLAGS.items() if event.rflags & bit]
        selectors.append(f"rflags {event.rflags:#x}" + (f" ({' '.join(names)})" if names else ""))
    if selectors:
        result.append(("popped" if popped else "context", "  ".join(selectors)))
    if known & Known.CODE:
        result.append(("code", f"{event.code:#x}"))
    if known & Known.ARG:
        result.append(("vector" if event.kind is Kind.DELIVER else "arg", f"{event.arg:#x}"))
    if known & Known.SOURCE:
        result.append(("source", event.source.name.lower().replace("_", " ")))
    flags = [text for flag, text in _FLAGS.items() if event.flags & flag]
    if flags:
        result.append(("flags", ", ".join(flags)))
    return result


def _address(address: int, words: Words) -> str:
    symbol = words.symbol(address)
    return hex_address(address) + (f"  {symbol}" if symbol else "")


def state_lines(view: View, words: Words) -> list[str]:
    """The frame that the event stored, the CPU after it, and its open frames."""
    lines = []
    if view.state.last_frame is not None:
        frame = view.state.last_frame
        lines.append(f"stored a frame on {words.frame_stack(frame)}, [{hex_address(frame.lo)}, {hex_address(frame.hi)})")
        if frame.victim is not None:
            lines.append(f"  over the open frame of {words.event_name(frame.victim)}")
    cpu = next((c for c in view.state.cpus if c.cpu == view.cpu), None)
    if cpu is not None:
        lines.append("then " + words.cpu_line(cpu))
    frames = [f for f in view.state.frames if f.cpu == view.cpu]
    lines.append("open frames:" if frames else "open frames: none")
    lines += [f"  {words.frame_line(f)}" for f in frames]
    return lines
