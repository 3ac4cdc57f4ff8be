"""What the details pane says of an event: all fields that are known, and the state of its CPU after it."""

from __future__ import annotations

from tracedbg import x86
from tracedbg.describe import Words, hex_address
from tracedbg.state import Event, EventFlag, Kind, Known, Source
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
_STORED = "words saved"  # of a failed delivery

# What fields of a kind of event are called where that says more than their own name.
_LABELS: dict[Kind, dict[str, str]] = {
    Kind.DELIVER: {"arg": "vector"},
    Kind.RAISE: {"arg": "vector"},
    Kind.RETURN: {"rsp": "frame at", "addr": "popped rip", "value": "popped rsp", "context": "popped", "code": "ss bits 16+"},
    Kind.MOVE: {"addr": "from", "value": "to"},
    Kind.SETSP: {"addr": "from", "value": "to"},
    Kind.SYSCALL: {"addr": "new rip"},
    Kind.SYSRET: {"addr": "new rip"},
    Kind.SYSENTER: {"addr": "new rip"},
    Kind.SHADOW: {"rip": "covers"},
    Kind.TOKEN: {"addr": "token at", "code": "held", "value": "holds", "arg": "ist"},
    Kind.MSR: {"code": "msr"},
    Kind.VMEXIT: {"code": "reason"},
}


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
    labels = _labels(event)

    def add(name: str, text: str) -> None:
        result.append((labels.get(name, name), text))

    if known & Known.RIP:
        add("rip", _address(event.rip, words))
    if known & Known.RSP:
        add("rsp", hex_address(event.rsp))
    if known & Known.ADDR:
        add("addr", f"{event.addr:,}" if labels.get("addr") == _STORED else _address(event.addr, words))
    if known & Known.VALUE and not event.flags & EventFlag.BYTES:
        add("value", _address(event.value, words))
    registers = ((Known.CS, "cs", event.cs), (Known.SS, "ss", event.ss))
    selectors = [f"{name} {value:#x}" for bit, name, value in registers if known & bit]
    if known & Known.RFLAGS:
        names = [name for bit, name in _RFLAGS.items() if event.rflags & bit]
        selectors.append(f"rflags {event.rflags:#x}" + (f" ({' '.join(names)})" if names else ""))
    if selectors:
        add("context", "  ".join(selectors))
    if known & Known.CODE:
        add("code", f"{event.code:#x}")
    if known & Known.ARG:
        add("arg", f"{event.arg:#x}")
    if known & Known.SOURCE:
        add("source", event.source.name.lower().replace("_", " "))
    flags = [text for flag, text in _FLAGS.items() if event.flags & flag]
    if flags:
        add("flags", ", ".join(flags))
    return result


def _labels(event: Event) -> dict[str, str]:
    """The names of an event's fields; `rip` is `at` where it is the code that the event happened in."""
    labels = {"rip": "at", **_LABELS.get(event.kind, {})}
    if event.kind is Kind.DELIVER:
        software = event.known & Known.SOURCE and event.source in (Source.SOFT_INT, Source.SYSCALL)
        labels["code"] = "length" if software else "error code"
        if event.arg == x86.PAGE_FAULT and not software:
            labels["value"] = "cr2"
        if event.flags & EventFlag.FAILED:
            labels["addr"] = _STORED
    return labels


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
