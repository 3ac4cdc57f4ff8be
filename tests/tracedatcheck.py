"""What the tests of the trace.dat reader share: what trace-cmd says, tracepoints of Linux, pages with records of them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tracedatfile import PAGE, Buffer, File, Page, Point

from tracedbg.state import EventFlag, Kind, Known, Source
from tracedbg.trace import Event, Trace

DATA = Path(__file__).parent / "data" / "trace-dat"
SAMPLES = {"local": "local.dat", "tsc": "tsc.dat.gz"}
T0 = 5_000_000_000
VALID, CODED = 1 << 31, 1 << 11
needs_trace_cmd = pytest.mark.skipif(shutil.which("trace-cmd") is None, reason="trace-cmd is not installed")


class Line(NamedTuple):
    """What one line of `trace-cmd report -R -t` says: CPU, time (ns or ticks), tracepoint, fields."""

    cpu: int
    time: int
    name: str
    fields: dict[str, str]


LINE = re.compile(r"^\s*.+-\d+\s+\[(\d+)\]\s*(?:(\d+)\.)?(\d+):\s+(\S+):\s*(.*)$")


def reference(text: str) -> list[Line]:
    """The lines of trace-cmd about records."""
    found = []
    for line in text.splitlines():
        if (parts := LINE.match(line)) is not None:
            time = int(parts[3]) if parts[2] is None else int(parts[2]) * 10**9 + int(parts[3].ljust(9, "0"))
            fields = dict(word.partition("=")[::2] for word in parts[5].split() if "=" in word)
            found.append(Line(int(parts[1]), time, parts[4], fields))
    return found


def events(trace: Trace) -> Iterator[Event]:
    return (trace.event(n) for n in range(trace.count))


def text_of(trace: Trace, event: Event) -> str:
    assert event.kind is Kind.MARK and event.flags & EventFlag.BYTES and event.known & (Known.VALUE | Known.CODE)
    return bytes(trace.payload[event.value : event.value + event.code]).decode()


def report(data: bytes, folder: Path, *words: str) -> str:
    """What trace-cmd says of a file."""
    (folder / "report.dat").write_bytes(data)
    done = subprocess.run(
        ["trace-cmd", "report", "-R", "-t", *words, "report.dat"], cwd=folder, capture_output=True, check=True, timeout=60
    )
    return done.stdout.decode("utf-8", "replace")


_UINT, _LONG = "unsigned int", "unsigned long"

VECTOR = (("int", "vector"),)
TIMER = Point("irq_vectors", "local_timer_entry", 92, VECTOR)
TIMER_EXIT = Point("irq_vectors", "local_timer_exit", 91, VECTOR)
FAULT = Point("exceptions", "page_fault_kernel", 117, ((_LONG, "address"), (_LONG, "ip"), (_LONG, "error_code")))
IRQ = Point("irq", "irq_handler_entry", 152, (("int", "irq"), ("__data_loc char[]", "name")))
IRQ_EXIT = Point("irq", "irq_handler_exit", 151, (("int", "irq"), ("int", "ret")))
SOFT = Point("irq", "softirq_entry", 150, ((_UINT, "vec"),))
# arch/x86/kvm/trace.h of Linux 6.14
ENTRY = Point(
    "kvm", "kvm_entry", 300,
    ((_UINT, "vcpu_id"), (_LONG, "rip"), ("bool", "immediate_exit"), ("u32", "intr_info"), ("u32", "error_code"),),
)  # fmt: skip
EXIT = Point(
    "kvm", "kvm_exit", 301,
    ((_UINT, "exit_reason"), (_LONG, "guest_rip"), ("u32", "isa"), ("u64", "info1"), ("u64", "info2"),
     ("u32", "intr_info"), ("u32", "error_code"), (_UINT, "vcpu_id"),),
)  # fmt: skip
INJ_EXC = Point(
    "kvm", "kvm_inj_exception", 302,
    (("u8", "exception"), ("u8", "has_error"), ("u32", "error_code"), ("bool", "reinjected"),),
)  # fmt: skip
INJ_VIRQ = Point("kvm", "kvm_inj_virq", 303, ((_UINT, "vector"), ("bool", "soft"), ("bool", "reinjected")))
ACCEPT = Point("kvm", "kvm_apic_accept_irq", 304, (("u32", "apicid"), ("u16", "dm"), ("u16", "tm"), ("u8", "vec")))
POINTS = (TIMER, TIMER_EXIT, FAULT, IRQ, IRQ_EXIT, SOFT, ENTRY, EXIT, INJ_EXC, INJ_VIRQ, ACCEPT)


def tick(vector: int = 0xEC, **fields: int) -> bytes:
    return TIMER.record(vector, **fields)


def one(pages: bytes, **given: Any) -> File:
    return File(POINTS, [Buffer({0: pages})], **given)


def times(trace: Trace) -> list[int]:
    return [e.time - T0 for e in events(trace)]


def agrees(trace: Trace, data: bytes, folder: Path) -> bool:
    """Whether trace-cmd, if it is there, has the same deliveries of the timer at the same times."""
    if shutil.which("trace-cmd") is None:
        return True
    lines = [line for line in reference(report(data, folder)) if line.name == "local_timer_entry"]
    found = [(e.cpu, e.time) for e in events(trace) if e.kind is Kind.DELIVER and e.source is Source.FIXED]
    return found == [line[:2] for line in lines]


def all_kinds(size: int = PAGE) -> tuple[bytes, list[int]]:
    """A page with every kind of record, and the times of its deliveries."""
    page = Page(T0, size=size).record(0, tick()).record(7, tick()).taken_back(100, tick()).record(1, tick())
    page.extend(1 << 40).record(5, tick()).stamp(T0 + (1 << 41)).record(2, tick()).long(3, tick()).long(4, tick()[:11] + b"\0")
    page.record(1, SOFT.record(1)).record(1, tick()).rest(b"\xff" * 40)
    base = 1 << 41
    return page.bytes(), [0, 7, 108, 108 + (1 << 40) + 5, base + 2, base + 5, base + 9, base + 11]


def entry(info: int = 0, *, code: int = 0, vcpu: int = 0, rip: int = 0x1000, pid: int = 70) -> bytes:
    return ENTRY.record(vcpu, rip, 0, info, code, pid=pid)


def vmexit(reason: int, *, isa: int = 1, info2: int = 0, intr: int = 0, vcpu: int = 0, rip: int = 0x2000, pid: int = 70) -> bytes:
    return EXIT.record(reason, rip, isa, 0, info2, intr, 0, vcpu, pid=pid)


def page_of(*payloads: bytes, size: int = PAGE) -> bytes:
    page = Page(T0, size=size)
    for payload in payloads:
        page.record(1, payload)
    return page.bytes()
