"""One line for each kind of event, written out by hand."""

from __future__ import annotations

import pytest
from samples import race

from tracedbg.describe import Words
from tracedbg.state import Kind
from tracedbg.writer import TraceWriter, build


def line(kind: Kind, **fields: int) -> str:
    trace = build(lambda writer: writer.event(kind, **fields))
    return Words(trace).event_line(trace.event(0))


def test_event_lines_of_the_race() -> None:
    words = Words(race())
    lines = [words.event_line(words.trace.event(n)) for n in range(4)]
    assert lines == [
        "NMI  at default_idle+0xc6  rsp ffff8300bffd7e98  cpl 0",
        "#MC  at do_nmi+2  rsp ffff8300bffd2f48  cpl 0",
        "IRET to do_nmi+2  rsp ffff8300bffd2f48  cpl 0  frame ffff8300bffd1fd8",
        "NMI  at do_nmi+2  rsp ffff8300bffd2f48  cpl 0",
    ]


@pytest.mark.parametrize(
    ("kind", "fields", "text"),
    [
        (Kind.DELIVER, {"arg": 14, "source": 1, "rip": 0x1000, "cs": 0x33, "code": 7, "value": 0x7000},
         "#PF  at 0x1000  cpl 3  error code 0x7  cr2 0x7000"),
        (Kind.DELIVER, {"arg": 3, "source": 4, "flags": 1}, "int 3 FAILED"),
        (Kind.DELIVER, {"arg": 2, "source": 2, "flags": 1, "addr": 2}, "NMI FAILED, 2 words of its frame stored"),
        (Kind.DELIVER, {"arg": 2, "source": 2, "flags": 1, "addr": 0}, "NMI FAILED, nothing of its frame stored"),
        (Kind.DELIVER, {"arg": 1, "source": 1, "value": 0x4000}, "#DB  event data 0x4000"),
        (Kind.DELIVER, {"arg": 14, "source": 4, "value": 0x4000}, "int 0xe  event data 0x4000"),
        (Kind.DELIVER, {"arg": 2, "source": 2, "flags": 16}, "NMI  (in SMM)"),
        (Kind.DELIVER, {"arg": 8, "source": 1, "flags": 64}, "#DF  (not in long mode)"),
        (Kind.DELIVER, {"source": 2}, "delivery of an unknown vector"),
        (Kind.RETURN, {"rsp": 0x2000, "flags": 2}, "IRET FAULTED  frame 0x2000"),
        (Kind.RETURN, {}, "IRET to ?"),
        (Kind.RETURN, {"arg": 0, "code": 4, "addr": 0x1000}, "IRET to 0x1000"),
        (Kind.RETURN, {"arg": 1, "addr": 0x1000, "cs": 0x33, "code": 0x0002_0000}, "ERETU to 0x1000  cpl 3  NMI bit clear"),
        (Kind.RETURN, {"arg": 2, "addr": 0x1000, "rsp": 0x3FC0, "code": 0x0002_0004},
         "ERETS to 0x1000  frame 0x3fc0  NMI bit set"),
        (Kind.RETURN, {"arg": 2, "flags": 2}, "ERETS FAULTED"),
        (Kind.RETURN, {"arg": 9}, "IRET to ?"),
        (Kind.WRITE, {"addr": 0x10DFD8, "value": 0x100BAB, "arg": 8, "rip": 0x100C00},
         "write 8 @ 0x10dfd8 = 0x100bab  at 0x100c00"),
        (Kind.READ, {"addr": 0x10DFD8, "arg": 4}, "read 4 @ 0x10dfd8"),
        (Kind.WRITE, {"addr": 0x10, "value": 0, "code": 64, "flags": 32}, "write 64 @ 0x10"),
        (Kind.MOVE, {"addr": 0x10, "value": 0x20}, "frame copied  0x10 -> 0x20"),
        (Kind.SETSP, {"value": 0x20}, "rsp  ? -> 0x20"),
        (Kind.TSS, {"arg": 10, "value": 0x3000}, "TSS IST2 = 0x3000"),
        (Kind.TSS, {"arg": 0, "value": 0x3000}, "TSS RSP0 = 0x3000"),
        (Kind.GATE, {"arg": 2, "value": 0x4000, "code": 0x8E02}, "gate 0x02 = 0x4000  IST 2"),
        (Kind.GATE, {"arg": 2, "value": 0x4000, "code": 0x0E00}, "gate 0x02 = 0x4000  IST 0  not present"),
        (Kind.GATE, {"arg": 3, "value": 0x4000, "code": 0xEF00}, "gate 0x03 = 0x4000  IST 0  trap gate"),
        (Kind.GATE, {"arg": 3, "value": 0x4000, "code": 0x8C00}, "gate 0x03 = 0x4000  IST 0  type 0xc"),
        (Kind.LTR, {"value": 0x5000}, "LTR  base 0x5000"),
        (Kind.LIDT, {}, "LIDT  base ?"),
        (Kind.RAISE, {"arg": 2, "source": 2}, "NMI requested"),
        (Kind.MSR, {"code": 0x17A, "value": 4}, "MSR 0x17a MCG_STATUS = 0x4  (MCIP set)"),
        (Kind.MSR, {"code": 0x17A, "value": 0}, "MSR 0x17a MCG_STATUS = 0x0  (MCIP clear)"),
        (Kind.MSR, {"code": 0x10}, "MSR 0x10 = ?"),
        (Kind.MSR, {"code": 0x808, "value": 0x10}, "MSR 0x808 X2APIC_TPR = 0x10"),
        (Kind.MSR, {"code": 0xC0000082, "value": 0x4000}, "MSR 0xc0000082 LSTAR = 0x4000"),
        (Kind.CR, {"arg": 4, "value": 0x40}, "CR4 = 0x40  (MCE set)"),
        (Kind.CR, {"arg": 4, "value": 1 << 32}, "CR4 = 0x100000000  (MCE clear, FRED set)"),
        (Kind.CR, {"arg": 8, "value": 2}, "CR8 = 0x2  (TPR 0x20)"),
        (Kind.CR, {"arg": 8}, "CR8 = ?"),
        (Kind.SYSCALL, {"rip": 0x1000, "rsp": 0x7000, "cs": 0x33, "addr": 0x4000},
         "SYSCALL  at 0x1000  rsp 0x7000  cpl 3  -> 0x4000"),
        (Kind.SYSRET, {"rsp": 0x7000, "flags": 2}, "SYSRET FAULTED  rsp 0x7000"),
        (Kind.UNBLOCK, {"arg": 0}, "NMIs unblocked"),
        (Kind.UNBLOCK, {"arg": 1}, "STGI: GIF = 1"),
        (Kind.GS, {"arg": 0}, "SWAPGS"),
        (Kind.GS, {"arg": 1, "value": 0xFFFF888000000000}, "GS base = ffff888000000000  (the kernel's)"),
        (Kind.GS, {"arg": 1, "value": 0x7000}, "GS base = 0x7000  (user mode's)"),
        (Kind.GS, {"arg": 1}, "GS base = ?"),
        (Kind.TOKEN, {"arg": 2, "addr": 0x9FF8, "code": 0x9FF8, "value": 0x9FF9},
         "shadow-stack token of IST2 taken  @ 0x9ff8"),
        (Kind.TOKEN, {"arg": 2, "code": 1, "value": 0}, "shadow-stack token of IST2 released"),
        (Kind.TOKEN, {"arg": 2, "code": 1, "value": 1}, "shadow-stack token of IST2 busy, not taken"),
        (Kind.TOKEN, {"arg": 2, "value": 1}, "shadow-stack token of IST2 busy"),
        (Kind.TOKEN, {"arg": 2, "value": 0}, "shadow-stack token of IST2 free"),
        (Kind.TOKEN, {"arg": 0}, "shadow-stack token ?"),
        (Kind.VMEXIT, {"arg": 0, "source": 2, "code": 0, "cs": 0x10}, "VM exit (VMX) for an NMI, reason 0x0  cpl 0"),
        (Kind.VMEXIT, {"arg": 1, "code": 0x61}, "VM exit (SVM), reason 0x61"),
        (Kind.VMENTRY, {"arg": 1}, "VM entry, virtual NMIs"),
        (Kind.VMENTRY, {"arg": 0}, "VM entry"),
        (Kind.RSM, {}, "RSM"),
        (Kind.FLAGS, {"rflags": 0x202}, "RFLAGS = 0x202  IF=1"),
        (Kind.FLAGS, {}, "RFLAGS = ?"),
        (Kind.SHADOW, {"arg": 1}, "MOV SS shadow"),
        (Kind.SHADOW, {"arg": 0, "rip": 0x1002}, "STI shadow  covers 0x1002"),
        (Kind.MODE, {"arg": 9}, "unknown mode"),
        (Kind.INIT, {"arg": 0}, "RESET"),
        (Kind.SHUTDOWN, {"arg": 1}, "shutdown: a machine check while MCIP was set"),
        (Kind.SHUTDOWN, {"arg": 200}, "shutdown: the reason is not recorded"),
        (Kind.GAP, {"value": 1234, "cpu": 0}, "gap: 1,234 records lost"),
        (Kind.GAP, {}, "gap: records lost, how many is unknown on all CPUs"),
        (Kind.MARK, {"value": 1 << 60, "code": 9, "flags": 32}, "mark: "),
    ],
)  # fmt: skip
def test_event_lines(kind: Kind, fields: dict[str, int], text: str) -> None:
    assert line(kind, **fields) == text


@pytest.mark.parametrize("kind", list(Kind))
def test_every_kind_has_a_line_with_nothing_known(kind: Kind) -> None:
    assert line(kind, known=0)
    assert line(kind, arg=255, flags=0xFF, value=(1 << 64) - 1, addr=(1 << 64) - 1, code=0xFFFFFFFF)


def test_marks_cannot_act_on_a_terminal() -> None:
    def fill(writer: TraceWriter) -> None:
        data = b"look\x1b[2J\nhere"
        writer.event(Kind.MARK, value=writer.payload(data), code=len(data), flags=32)

    trace = build(fill)
    assert Words(trace).event_line(trace.event(0)) == "mark: look?[2J?here"


def test_an_event_of_unknown_kind_is_said_to_be_one() -> None:
    trace = build(lambda writer: writer.append(bytes(60) + b"\xc8\0\0\0"))
    words = Words(trace)
    assert words.event_line(trace.event(0)) == "record of an unknown kind"
    assert words.event_name(0) == "event 0"
    assert words.event(1) is None
