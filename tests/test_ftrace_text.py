"""The text of ftrace, trace-cmd report and perf script: what each line is as an event, against counting in the text itself."""

from __future__ import annotations

import contextlib
import io
import random
import time
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tracedbg import wire
from tracedbg.errors import FormatError, UsageError
from tracedbg.formats import ReaderOptions, open_input, open_inputs, recognise
from tracedbg.formats.ftrace import exits as ftrace_exits
from tracedbg.formats.ftrace import rows as ftrace_rows
from tracedbg.formats.ftrace import text as ftrace_text
from tracedbg.formats.registry import input_names
from tracedbg.formats.source import Input
from tracedbg.state import Event, EventFlag, Kind, Known, Source
from tracedbg.trace import Trace
from tracedbg.writer import TraceWriter

DATA = Path(__file__).parent / "data" / "ftrace"
SAMPLES = ("report.txt", "report-R.txt", "report-l.txt", "script.txt")
RECORDED = (
    "trace-dat/trace-smp2.report.txt", "trace-dat/trace-v6-tsc-kp-smp2.report-R.txt",
    "trace-dat/trace-v6-tsc-kp-smp2.report-l.txt", "perf/perf-smp2.script.txt",
)  # fmt: skip
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(text)` -> the file."""

    def put(data: str | bytes) -> Path:
        path = tmp_path / "x.txt"
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    return put


def read(path: Path, **options: Any) -> Trace:
    return open_input(str(path), options=ReaderOptions(**options))


def events(path: Path, **options: Any) -> list[Event]:
    with read(path, **options) as trace:
        return [trace.event(n) for n in range(trace.count)]


def brief(event: Event) -> tuple[Any, ...]:
    """Kind, and the known fields that these sources have."""
    names = ("cpu", "time", "arg", "source", "code", "addr", "value", "rip")
    shown = {name: getattr(event, name) for name in names if event.known & Known[name.upper()]}
    if event.flags & EventFlag.BYTES:
        shown.pop("value"), shown.pop("code")
    return event.kind.name.lower(), shown


def one(line: str, write: Write, **options: Any) -> list[tuple[Any, ...]]:
    return [brief(event) for event in events(write(line + "\n"), **options)]


# -- against the text ---------------------------------------------------------------------------------------------------


def counted(text: str) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int | None, int | None, int]], Counter[str]]:
    """Interrupts (CPU, time, vector), page faults (CPU, time, CR2, RIP, code) and lines by event, by splitting words only."""
    interrupts, faults, names = [], [], Counter[str]()
    for line in text.splitlines():
        if "vector=" not in line and "address=" not in line:
            continue
        words = line.split()
        at = next(n for n, word in enumerate(words) if word.endswith(("_entry:", "_exit:")) or "page_fault" in word)
        name = words[at].rstrip(":").split(":")[-1]
        names[name] += 1
        if name.endswith("_exit"):
            continue
        if "[0" in line:
            cpu = int(line[line.index("[0") + 1 :].split("]")[0])
            stamp = line[line.index("]") + 1 :].split(":")[0].strip()
        else:  # -l: CPU and five flags stand before the time
            stamp = words[at - 1].rstrip(":")
            if stamp[0] in "01" and stamp[1] in ".d":
                cpu, stamp = int(stamp[0]), stamp[6:]
            else:
                cpu = int(words[at - 2][0])
        when = int(Decimal(stamp) * 10**9) if "." in stamp else int(stamp)
        if "vector=" in line:
            interrupts.append((cpu, when, int(line.split("vector=")[1])))
        else:
            address, rip, code = (part.split("=")[1] for part in words[at + 1 : at + 4])
            faults.append((cpu, when, number(address), number(rip), int(code, 16)))
    return interrupts, faults, names


def number(word: str) -> int | None:
    return int(word, 16) if word.startswith("0x") else None


def check_counts(path: Path) -> None:
    interrupts, faults, _ = counted(path.read_text())
    found = [e for e in events(path) if e.kind is Kind.DELIVER]
    assert all(e.known & Known.CPU and e.known & Known.TIME for e in found)
    fixed = [(e.cpu, e.time, e.arg) for e in found if e.source is Source.FIXED]
    assert fixed == interrupts and len(fixed) > 5
    raised = [
        (e.cpu, e.time, e.value if e.known & Known.VALUE else None, e.rip if e.known & Known.RIP else None, e.code)
        for e in found if e.source is Source.EXCEPTION
    ]  # fmt: skip
    assert raised == faults and len(faults) > 5
    assert all(e.arg == 14 and e.known & Known.CODE for e in found if e.source is Source.EXCEPTION)
    assert len(found) == len(fixed) + len(raised)
    assert not any(e.known & (Known.RSP | Known.CS | Known.SS | Known.RFLAGS) for e in found)


@pytest.mark.parametrize("name", SAMPLES)
def test_excerpts_are_what_they_say(name: str) -> None:
    check_counts(DATA / name)


@pytest.mark.parametrize("name", RECORDED)
def test_recordings_are_what_they_say(name: str, shared: Path) -> None:
    path = shared / name
    check_counts(path)
    text = path.read_text()
    with read(path) as trace:
        lines = [line for line in text.splitlines() if not line.startswith("cpus=")]
        assert trace.meta["counts"]["records"] == len(lines)
        assert sum(trace.meta["tracepoints"].values()) == len(lines)
        assert "other_lines" not in trace.meta["counts"] and "odd_records" not in trace.meta["counts"]
        marks = Counter(mark_text(trace, n) for n in range(trace.count) if trace.event(n).kind is Kind.MARK)
        assert trace.cpus == 2
    assert sum(marks.values()) == text.count("nmi_handler:") + text.count("mce_record:")
    for handler in ("nmi_cpu_backtrace_handler", "mce_raise_notify"):
        assert marks[f"NMI: its handler {handler} ran, not its NMI"] == text.count(handler)


def mark_text(trace: Trace, index: int) -> str:
    event = trace.event(index)
    return bytes(trace.payload[event.value : event.value + event.code]).decode()


def test_two_forms_of_one_recording_are_the_same_events(shared: Path) -> None:
    """-R and -l of the same file: all events and the texts of all marks."""
    one_way, other = (shared / "trace-dat" / f"trace-v6-tsc-kp-smp2.report-{form}.txt" for form in "Rl")
    with read(one_way) as raw, read(other) as latency:
        assert bytes(raw.events) == bytes(latency.events) and bytes(raw.payload) == bytes(latency.payload)
        assert raw.count > 190
        assert raw.clock_hz == 0
    with read(one_way, cpu_hz=2_400_000_000) as timed:
        assert timed.clock_hz == 2_400_000_000


def test_what_a_machine_check_says() -> None:
    for name, tsc in (("report.txt", 0x949159279), ("report-R.txt", 0x1CD9EBC766), ("script.txt", 0xAF11098FE)):
        with read(DATA / name) as trace:
            texts = [mark_text(trace, n) for n in range(trace.count) if trace.event(n).kind is Kind.MARK]
        assert texts[-1] == (
            "#MC, recorded later, CPU 0, RIP 0x10:0xffffffff81a592eb, MCG_STATUS 0x5, status 0xbd000000000000c0, bank 9,"
            f" TSC {tsc}"
        )


# -- the forms of a line ------------------------------------------------------------------------------------------------

TIMER = {"cpu": 3, "time": 12_345_678_000, "arg": 236, "source": Source.FIXED}

FORMS = [
    ("          <idle>-0       [003]    12.345678: local_timer_entry:    vector=236", {}),  # trace-cmd report
    ("          <idle>-0       [003] d.h1.    12.345678: local_timer_entry: vector=236", {}),  # ftrace
    ("          <idle>-0       [003] d.h1    12.345678: local_timer_entry: vector=236", {}),  # before 5.18
    ("          <idle>-0       (-------) [003] d.h1.    12.345678: local_timer_entry: vector=236", {}),  # record-tgid
    ("            bash-1977    (   1977) [003] dNh1.    12.345678: local_timer_entry: vector=236", {}),
    (" CPU 1/KVM-1278472 [003] d..2 12.345678: local_timer_entry: vector=236", {}),  # a name with a blank
    ("           <...>-1 [003]    12.345678000: local_timer_entry:    vector=236", {}),  # report -t
    ("         swapper     0 [003]    12.345678:          irq_vectors:local_timer_entry: vector=236", {}),  # perf script
    ("Web Content  0/4711  [003]    12.345678:     1    irq_vectors:local_timer_entry: vector=236  ", {}),
    ("  <idle>-0       3d.h1.    12.345678: local_timer_entry:    vector=236", {}),  # report -l
    ("  <idle>-0         3d.h1. 12345678us : local_timer_entry: vector=236", {}),  # latency-format
    ("[   99.000001]   <idle>-0         3d.h1. 12345678us!: local_timer_entry: vector=236\r", {}),  # ftrace_dump_on_oops
    ("          <idle>-0     [003]12345678: local_timer_entry:     vector=236", {"time": 12345678}),  # a clock of ticks
    ("  <idle>-0       3d.h..12345678: local_timer_entry:     vector=236", {"time": 12345678}),
    ("  <idle>-0       3d.hff12345678: local_timer_entry:     vector=236", {"time": 12345678}),
    ("          <idle>-0       [003]    12.345678: fancy_new_entry:    vector=236", {}),  # an interrupt of a later kernel
]


@pytest.mark.parametrize(("line", "more"), FORMS, ids=range(len(FORMS)))
def test_a_line_of_each_form(line: str, more: dict[str, int], write: Write) -> None:
    assert one(line, write) == [("deliver", {**TIMER, **more})]


def test_where_the_flags_end_is_learned(write: Write) -> None:
    """`d.h.1` and 12345 in one word: five flags, as in the lines before."""
    text = "".join(f"  <idle>-0       3d.h.{rest}: irq_work_entry: vector=246\n" for rest in (".12345000", "112345678"))
    assert [e.time for e in events(write(text))] == [12345000, 12345678]


@pytest.mark.parametrize(
    "line",
    [
        "[   12.345678] usb 1-1: new device",
        "12.345678: local_timer_entry: vector=236",
        "local_timer_entry: vector=236",
        "          <idle>-0       [003]    12.345678 local_timer_entry vector=236",
        "     0: v=02 e=0000 i=0 cpl=0 IP=0010:ffffffff81a592eb pc=ffffffff81a592eb SP=0018:ffffc9000009bed8",
        "1234@1699999999.123456:apic_deliver_irq dest 1",
        "        ffffffff81a07e42 asm_exc_nmi+0x2 ([kernel.kallsyms])",
        '{"tracedbg": 1}',
        "",
    ],
)
def test_other_lines_are_none(line: str, write: Write) -> None:
    with Input(str(write(f"{line}\n{line}\n "))) as source:
        assert not ftrace_text.sniff(source.head)
    with pytest.raises(FormatError, match="no line of a tracepoint in it"):
        open_input(str(write(line + "\n")), from_format="ftrace-text")


LINE = "  task-7  [001] d..1.  1.000001: "

FAULT = {"arg": 14, "source": Source.EXCEPTION}
INTR = "EXTERNAL_INTERRUPT rip 0x1000 info1 0x0000000000000000 info2 0x0000000000000000 intr_info 0x800000ec error_code 0x0"
REST = "rip 0x1000 info1 0x0 info2 0x0 intr_info"

MEANINGS: list[tuple[str, str | None, dict[str, Any]]] = [
    ("local_timer_exit: vector=236", None, {}),
    ("sched_switch: prev_comm=a", None, {}),
    ("some_entry: foo=1 vector=236", None, {}),
    (
        "page_fault_user: address=0x7f01 ip=0x400123 error_code=0x14",
        "deliver", {**FAULT, "code": 0x14, "value": 0x7F01, "rip": 0x400123},
    ),
    (
        "page_fault_kernel: address=0xffff888000000000 ip=copy_user_generic error_code=0x2",
        "deliver", {**FAULT, "code": 2, "value": 0xFFFF888000000000},
    ),
    ("page_fault_kernel: address=vsyscall_gtod ip=foo error_code=0x2", "deliver", {**FAULT, "code": 2}),
    ("irq_handler_entry: irq=24 name=virtio0-req.0", "deliver", {"source": Source.EXTERNAL}),
    ("irq_handler_exit: irq=24 ret=handled", None, {}),
    ("exceptions:local_timer_entry: vector=236", None, {}),  # of another system than it should be
    ("irq_vectors:page_fault_user: address=0x1 ip=0x2 error_code=0x3", None, {}),
    ("kvm_entry: vcpu 0, rip 0x1000", "vmentry", {}),
    (f"kvm_exit: vcpu 0 reason {INTR}", "vmexit", {"arg": 0, "code": 1, "addr": 0x1000}),
    (
        f"kvm_exit: vcpu 0 reason EXCEPTION_NMI {REST} 0x80000202 error_code 0x0",
        "vmexit", {"arg": 0, "code": 0, "addr": 0x1000, "source": Source.NMI},
    ),
    (f"kvm_exit: vcpu 0 reason EXCEPTION_NMI {REST} 0x8000030e error_code 0x0", "vmexit", {"arg": 0, "code": 0, "addr": 0x1000}),
    (
        "kvm_exit: reason EXIT_NMI rip 0x4015c2 info 0 0",
        "vmexit", {"arg": 1, "code": 0x61, "addr": 0x4015C2, "source": Source.NMI},
    ),
    ("kvm_exit: vcpu 1 reason nmi rip 0x1 info1 0x0", "vmexit", {"arg": 1, "code": 0x61, "addr": 1, "source": Source.NMI}),
    ("kvm_exit: vcpu 1 reason npf rip 0xfc95a info1 0x0", "vmexit", {"arg": 1, "code": 0x400, "addr": 0xFC95A}),
    ("kvm_exit: vcpu 1 reason PF excp rip 0x1 info1 0x0", "vmexit", {"arg": 1, "code": 0x4E, "addr": 1}),
    (
        "kvm_exit: vcpu 1 reason EPT_VIOLATION FAILED_VMENTRY rip 0x1 info1 0x0",
        "vmexit", {"arg": 0, "code": 1 << 31 | 48, "addr": 1},
    ),
    ("kvm_exit: vcpu 1 reason 0x4d rip 0x1 info1 0x0", "vmexit", {"code": 0x4D, "addr": 1}),  # printed without a name
    ("kvm_exit: vcpu 1 reason NOVELTY rip 0x1 info1 0x0", "vmexit", {"addr": 1}),
    (
        "kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0 info2=0 intr_info=800000ec error_code=0 vcpu_id=0",
        "vmexit", {"arg": 0, "code": 1, "addr": 0x1000},
    ),
    (
        "kvm_exit: exit_reason=0 guest_rip=0x1000 isa=1 info1=0 info2=80000202",  # of a kernel before 5.10
        "vmexit", {"arg": 0, "code": 0, "addr": 0x1000, "source": Source.NMI},
    ),
    (
        "kvm_exit: exit_reason=97 guest_rip=0x1000 isa=2",
        "vmexit", {"arg": 1, "code": 97, "addr": 0x1000, "source": Source.NMI},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("said", "kind", "fields"), MEANINGS, ids=[said for said, *_ in MEANINGS])
def test_what_a_tracepoint_means(said: str, kind: str | None, fields: dict[str, Any], write: Write) -> None:
    common = {"cpu": 1, "time": 1_000_001_000}
    assert one(LINE + said, write) == ([] if kind is None else [(kind, {**common, **fields})])


def test_marks(write: Write) -> None:
    text = (
        LINE + "nmi_handler: perf_event_nmi_handler() delta_ns: -5 handled: 1\n"
        + LINE + "nmi_handler: handler=perf_event_nmi_handler delta_ns=77 handled=2\n"
        + LINE + "nmi_handler: something else\n"
        + LINE + "mce_record: CPU: 3, MCGc/s: 1000c14/0, MC5: 8c00004000010090, IPID: 0, ADDR/MISC/SYND: 0/0/0,"
        " RIP: 00:<0000000000000000>, TSC: 0, PROCESSOR: 0:306e4\n"
        + LINE + "mce_record: cut\n"
    )  # fmt: skip
    with read(write(text)) as trace:
        texts = [mark_text(trace, n) for n in range(trace.count)]
        assert trace.meta["counts"]["odd_records"] == 1
    assert texts == [
        "NMI: its handler perf_event_nmi_handler ran, handled 1",
        "NMI: its handler perf_event_nmi_handler ran, handled 2",
        "NMI: a handler ran",
        "machine check without #MC (polled or CMCI), recorded later, CPU 3, MCG_STATUS 0x0, status 0x8c00004000010090, bank 5",
        "a machine check, recorded later",
    ]


def test_nmi_context_is_marked_once(write: Write) -> None:
    """The flag z or Z before a delivery: in an NMI, or what else has that flag."""
    text = "".join(
        f" t-1 [000] {flags} 1.{n:06}: {said}\n"
        for n, (flags, said) in enumerate([
            ("d.z1.", "page_fault_kernel: address=0x1 ip=0x2 error_code=0x0"),
            ("d.z1.", "page_fault_kernel: address=0x1 ip=0x2 error_code=0x0"),
            ("d.z1.", "nmi_handler: a() delta_ns: 1 handled: 1"),
            ("d..1.", "irq_work_exit: vector=246"),
            ("d.Z1.", "page_fault_kernel: address=0x1 ip=0x2 error_code=0x0"),
        ])
    )  # fmt: skip
    with read(write(text)) as trace:
        kinds = [trace.event(n).kind.name for n in range(trace.count)]
        assert kinds == ["MARK", "DELIVER", "DELIVER", "MARK", "MARK", "DELIVER"]
        assert mark_text(trace, 0) == mark_text(trace, 4) and mark_text(trace, 0).startswith("in NMI context")
        assert trace.meta["fidelity"]["context"].startswith("the flag NMI")
    with read(write(text.replace("d.z1.", "d.h1.").replace("d.Z1.", "d.h1."))) as trace:  # as trace-cmd report -l prints it
        assert trace.meta["fidelity"]["context"] == "the text does not tell which records were in NMI context"


def test_one_interrupt_with_several_handlers(write: Write) -> None:
    lines = [
        "irq_handler_entry: irq=9 name=a", "irq_handler_exit: irq=9 ret=unhandled", "irq_handler_entry: irq=9 name=b",
        "irq_handler_exit: irq=9 ret=handled", "irq_handler_entry: irq=9 name=a", "irq_handler_exit: irq=9 ret=handled",
        "irq_handler_entry: irq=9 name=b", "irq_handler_exit: irq=9 ret=handled", "irq_handler_entry: irq=9 name=c",
        "irq_handler_exit: irq=9 ret=handled", "softirq_entry: vec=1", "irq_handler_entry: irq=9 name=b",
    ]  # fmt: skip
    with read(write("".join(f"{LINE}{line}\n" for line in lines))) as trace:
        assert [trace.event(n).kind for n in range(trace.count)] == [Kind.DELIVER] * 3
        assert trace.meta["counts"]["further_handlers"] == 3


# -- records that are lost ----------------------------------------------------------------------------------------------

AFTER = LINE + "irq_work_entry: vector=246\n"

LOST: list[tuple[str, dict[str, Any]]] = [
    ("CPU:1 [LOST 204 EVENTS]", {"cpu": 1, "value": 204}),
    ("CPU:1 [LOST EVENTS]", {"cpu": 1}),
    ("CPU:7 [204600 EVENTS DROPPED]", {"cpu": 7, "value": 204600}),
    ("CPU:7 [EVENTS DROPPED]", {"cpu": 7}),
    ("##### CPU 2 buffer started ####", {"cpu": 2}),
    ("         swapper     0 [003]    12.345678: PERF_RECORD_LOST lost 77", {"cpu": 3, "value": 77}),
    ("         swapper     0     12.345678: PERF_RECORD_LOST_SAMPLES lost 5", {"value": 5}),
    ("# entries-in-buffer/entries-written: 140080/250280   #P:4", {"value": 110200}),
]


@pytest.mark.parametrize(("line", "fields"), LOST, ids=[line for line, _ in LOST])
def test_lost_records_are_a_gap(line: str, fields: dict[str, Any], write: Write) -> None:
    with read(write(f"{line}\n{AFTER}")) as trace:
        assert brief(trace.event(0)) == ("gap", fields)
        assert trace.meta["counts"]["gaps"] == 1 and trace.meta["counts"].get("lost", 0) == fields.get("value", 0)
        assert trace.cpus == (4 if "#P" in line else max(fields.get("cpu", 0), 1) + 1)


def test_a_gap_has_the_time_of_what_came_before(write: Write) -> None:
    found = events(write(f"{AFTER}CPU:1 [LOST 2 EVENTS]\n"))
    assert brief(found[1]) == ("gap", {"cpu": 1, "time": 1_000_001_000, "value": 2})


def test_nothing_lost_is_no_gap(write: Write) -> None:
    text = "# tracer: nop\n#\n# entries-in-buffer/entries-written: 9/9   #P:4\n#\n" + AFTER
    with read(write(text)) as trace:
        assert trace.count == 1 and trace.cpus == 4 and trace.meta["counts"] == {"records": 1, "other_lines": 3}


# -- guests -------------------------------------------------------------------------------------------------------------


def kvm(*lines: tuple[int, int, str]) -> str:
    """(CPU, thread, text): lines a microsecond apart."""
    return "".join(f" CPU 0/KVM-{pid} [{cpu:03}] d.... 5.{n:06}: {said}\n" for n, (cpu, pid, said) in enumerate(lines))


INJECT = "kvm_entry: vcpu 0, rip 0x1000 intr_info {} error_code 0x00000000"
SVM_EXIT = "kvm_exit: vcpu 0 reason npf rip 0x1 info1 0x0 info2 0x80000202 intr_info"
EXIT = "kvm_exit: vcpu 0 reason {} rip 0x2000 info1 0x0000000000000000 info2 {} intr_info 0x00000000 error_code 0x00000000"


def test_guests_are_cpus_of_their_own_behind_the_hosts(write: Write) -> None:
    """Two threads on two CPUs; a host CPU that comes late does not disturb their numbers."""
    text = kvm(
        (1, 501, INJECT.format("0x80000202")), (1, 501, EXIT.format("HLT", "0x0000000000000000")),
        (0, 502, "kvm_entry: vcpu 1, rip 0x3000 intr_info 0x80000b0d error_code 0x00000018"),
        (5, 9, "irq_work_entry: vector=246"),
        (0, 502, "kvm_inj_virq: IRQ 0xec"),
    )  # fmt: skip
    with read(write(text)) as trace:
        found = [brief(trace.event(n)) for n in range(trace.count)]
        assert trace.cpus == 8
        assert trace.meta["vcpus"] == {"cpu 6": "vCPU 0 of thread 501", "cpu 7": "vCPU 1 of thread 502"}
        assert trace.meta["fidelity"]["guest"].startswith("what KVM injects and the CPU then delivers")
    for event in found:
        event[1].pop("time")
    assert found == [
        ("vmentry", {"cpu": 1}),
        ("deliver", {"cpu": 6, "arg": 2, "source": Source.NMI, "rip": 0x1000}),
        ("vmexit", {"cpu": 1, "arg": 0, "code": 12, "addr": 0x2000}),
        ("vmentry", {"cpu": 0}),
        ("deliver", {"cpu": 7, "arg": 13, "source": Source.EXCEPTION, "rip": 0x3000, "code": 0x18}),
        ("deliver", {"cpu": 5, "arg": 246, "source": Source.FIXED}),
        ("raise", {"cpu": 7, "arg": 0xEC, "source": Source.INJECTED}),
    ]


@pytest.mark.parametrize(
    ("info", "out", "failed"),
    [
        ("0x80000202", EXIT.format("HLT", "0x0000000000000000"), False),
        ("0x80000202", EXIT.format("EPT_VIOLATION", "0x0000000080000202"), True),  # IDT-vectoring: the NMI was not delivered
        ("0x80000202", EXIT.format("EPT_VIOLATION", "0x000000008000030e"), False),  # another event
        ("0x800000ec", EXIT.format("EPT_VIOLATION", "0x00000000800000ec"), True),
        ("0x80000312", EXIT.format("EPT_VIOLATION", "0x0000000080000312"), True),
        ("0x80000202", EXIT.format("INVALID_STATE FAILED_VMENTRY", "0x0000000000000000"), True),
        ("0x80000202", "kvm_exit: vcpu 0 reason EPT_VIOLATION rip 0x1 info 0 80000202", False),  # which info it is is not said
        ("0x80000202", f"{SVM_EXIT} 0x80000202 error_code 0x0", True),  # EXITINTINFO
        ("0x80000202", f"{SVM_EXIT} 0x00000000 error_code 0x0", False),
    ],
)
def test_whether_an_injection_was_delivered(info: str, out: str, failed: bool, write: Write) -> None:
    with read(write(kvm((0, 1, INJECT.format(info)), (0, 1, out)))) as trace:
        assert trace.event(1).kind is Kind.DELIVER
        assert bool(trace.event(1).flags & EventFlag.FAILED) == failed
        assert trace.meta["counts"].get("undelivered_injections", 0) == failed
        assert "injections_without_exit" not in trace.meta["counts"]


@pytest.mark.parametrize(("reason", "made"), [("HLT", 0), ("npf", 1)])
def test_gif_is_set_again_before_an_exit_of_svm_is_recorded(reason: str, made: int, write: Write) -> None:
    exits, tick = (0, 1, f"kvm_exit: vcpu 0 reason {reason} rip 0x1 info1 0x0"), (0, 1, "local_timer_entry: vector=236")
    with read(write(kvm((0, 1, "kvm_entry: vcpu 0"), exits, tick, tick, (0, 1, "kvm_entry: vcpu 0"), tick))) as trace:
        stgi = [n for n in range(trace.count) if trace.event(n).kind is Kind.UNBLOCK]
        assert stgi == [2] * made and all(trace.event(n).arg == 1 and trace.event(n).cpu == 0 for n in stgi)


@pytest.mark.parametrize(
    ("info", "source"),
    [
        ("0x800000ec", Source.INJECTED), ("0x80000202", Source.NMI), ("0x80000301", Source.EXCEPTION), ("0x80000312", Source.MC),
        ("0x80000480", Source.SOFT_INT), ("0x80000501", Source.SOFT_INT), ("0x80000603", Source.SOFT_INT),
        ("0x00000202", None), ("0x80000102", None), ("0x80000702", None), ("0x00000000", None),
    ],
)  # fmt: skip
def test_what_an_entry_injects(info: str, source: Source | None, write: Write) -> None:
    found = events(write(kvm((0, 1, INJECT.format(info)))))
    assert [e.source for e in found if e.kind is Kind.DELIVER] == ([] if source is None else [source])


REQUESTS = [
    ("kvm_inj_exception: #UD (0x0)", 6, None),
    ("kvm_inj_exception: #GP (0x0)", 13, 0),
    ("kvm_inj_exception: #PF (0x3) [reinjected]", 14, 3),
    ("kvm_inj_exception: #DB", 1, None),
    ("kvm_inj_exception: exception=14 has_error=1 error_code=3 reinjected=0", 14, 3),
    ("kvm_inj_exception: exception=6 has_error=0 error_code=0", 6, None),
    ("kvm_inj_virq: IRQ 0xec [reinjected]", 0xEC, None),
    ("kvm_inj_virq: Soft/INTn 0x80", 0x80, None),
    ("kvm_inj_virq: irq 236", 236, None),
    ("kvm_inj_virq: irq=236", 236, None),
    ("kvm_inj_virq: irq=36 soft=0 reinjected=0", 0x36, None),
    ("kvm_apic_accept_irq: apicid 0 vec 236 (Fixed|edge)", 236, None),
    ("kvm_apic_accept_irq: apicid 0 vec 0 (NMI|edge)", 2, None),
    ("kvm_apic_accept_irq: apicid=0 dm=1024 tm=0 vec=0", 2, None),  # APIC_DM_NMI
    ("kvm_apic_accept_irq: apicid 0 vec 154 (SIPI|edge)", None, None),
    ("kvm_apic_accept_irq: apicid 1 vec 236 (Fixed|edge)", None, None),  # another vCPU's
    ("kvm_inj_exception: what", None, None),
    ("kvm_inj_virq: IRQ 0x100", None, None),
]


@pytest.mark.parametrize(("said", "vector", "code"), REQUESTS, ids=[said for said, *_ in REQUESTS])
def test_requests(said: str, vector: int | None, code: int | None, write: Write) -> None:
    found = [e for e in events(write(kvm((0, 1, "kvm_entry: vcpu 0, rip 0x1"), (0, 1, said)))) if e.kind is Kind.RAISE]
    assert [(e.cpu, e.arg, e.source, e.code if e.known & Known.CODE else None) for e in found] == (
        [] if vector is None else [(1, vector, Source.INJECTED, code)]
    )


def test_an_accepted_interrupt_in_an_interrupt_or_unknown_context_is_nobodys(write: Write) -> None:
    said = "kvm_apic_accept_irq: apicid 0 vec 236 (Fixed|edge)"
    text = kvm((0, 1, "kvm_entry: vcpu 0, rip 0x1"), (0, 1, said), (0, 1, said))
    for change in ("d.h..", ""):
        lines = text.splitlines()
        lines[1] = lines[1].replace("d....", change)
        with read(write("\n".join(lines) + "\n")) as trace:
            assert [trace.event(n).kind for n in range(trace.count)] == [Kind.VMENTRY, Kind.RAISE]
            assert trace.meta["counts"]["requests_without_vcpu"] == 1


def test_an_nmi_window_is_an_exit_and_no_more(write: Write) -> None:
    """It shows that an IRET came, not whose."""
    found = events(write(kvm((0, 1, EXIT.format("NMI_WINDOW", "0x0000000000000000")))))
    assert [(e.kind, e.cpu, e.code) for e in found] == [(Kind.VMEXIT, 0, 8)]


def test_a_gap_with_guests_is_of_all_cpus(write: Write) -> None:
    text = kvm((0, 1, INJECT.format("0x80000202"))) + "CPU:0 [LOST 3 EVENTS]\n" + kvm((0, 1, EXIT.format("HLT", "0x80000202")))
    with read(write(text)) as trace:
        assert brief(trace.event(2)) == ("gap", {"time": 5 * 10**9, "value": 3})
        assert not trace.event(1).flags & EventFlag.FAILED
        assert trace.meta["counts"]["injections_without_exit"] == 1


def test_guests_wait_in_a_file(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many events, an injection that is never settled: memory is bounded, numbers and order are right."""
    monkeypatch.setattr(ftrace_rows, "BLOCK", 64 * 50)
    monkeypatch.setattr(ftrace_rows, "MOST_HELD", 64 * 200)
    many = [(0, 7, "irq_work_entry: vector=246")] * 3000
    text = kvm(*many, (2, 1, INJECT.format("0x80000202")), *many, (2, 1, EXIT.format("HLT", "0x80000202")))
    with read(write(text)) as trace:  # one block of text: the injection waits as long
        assert trace.count == 6003 and trace.cpus == 4
        assert [trace.event(n).cpu for n in (0, 2999, 3000, 3001, 3002, 6002)] == [0, 0, 2, 3, 0, 2]
        assert trace.event(3001).flags & EventFlag.FAILED
    *before, last = text.splitlines(keepends=True)
    with read(write("".join([*before, *["#" * 1000 + "\n"] * 1200, last]))) as trace:
        assert trace.count == 6003 and trace.cpus == 4
        assert [trace.event(n).cpu for n in (0, 2999, 3000, 3001, 3002, 6002)] == [0, 0, 2, 3, 0, 2]
        assert not trace.event(3001).flags & EventFlag.FAILED
        assert trace.meta["counts"]["injections_without_exit"] == 1


def test_too_many_cpus(write: Write) -> None:
    text = " t-1 [4095] 1.0: irq_work_entry: vector=246\n t-1 [4096] 1.0: irq_work_entry: vector=246\n"
    with read(write(text)) as trace:
        assert (trace.count, trace.cpus, trace.meta["counts"]["odd_records"]) == (1, 4096, 1)
    with pytest.raises(FormatError, match="CPUs of the host and of guests: 4097, at most 4096"):
        read(write(text + kvm((0, 1, "kvm_entry: vcpu 0"))))


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("EXCEPTION_NMI", (0, 0)), ("NMI_WINDOW", (0, 8)), ("PREEMPTION_TIMER", (0, 52)), ("XRSTORS", (0, 64)),
        ("CPUID", (0, 10)), ("cpuid", (1, 0x72)), ("nmi", (1, 0x61)), ("EXIT_NMI", (1, 0x61)), ("EXIT_INTR", (1, 0x60)),
        ("EXIT_EXCP_MC", (1, 0x52)), ("MC excp", (1, 0x52)), ("iret", (1, 0x74)), ("EXIT_WRITE_CR0", (1, 0x10)),
        ("npf", (1, 0x400)), ("NMI", (None, None)),
    ],
)  # fmt: skip
def test_names_of_exits(name: str, number: tuple[int | None, int | None]) -> None:
    assert ftrace_exits.reason(name) == number


# -- odd and hostile text -----------------------------------------------------------------------------------------------


def test_odd_records(write: Write) -> None:
    said = ("irq_vectors:x_entry: vector=256", "irq_vectors:x_entry: what", "page_fault_user: what", "irq_handler_entry: what")
    text = "".join(f"{LINE}{one}\n" for one in said)
    with read(write(text)) as trace:
        found = [brief(trace.event(n)) for n in range(trace.count)]
        assert trace.meta["counts"]["odd_records"] == 4
        assert all(trace.event(n).flags == EventFlag.PARTIAL for n in range(trace.count))
    common = {"cpu": 1, "time": 1_000_001_000}
    assert found == [
        ("deliver", {**common, "source": Source.FIXED}),
        ("deliver", {**common, "source": Source.FIXED}),
        ("deliver", {**common, "source": Source.EXCEPTION, "arg": 14}),
    ]


def test_times_of_another_kind_are_not_known(write: Write) -> None:
    text = "".join(f" t-1 [000] {stamp}: irq_work_entry: vector=246\n" for stamp in ("1.0", "77", "99999999999999999999.0"))
    with read(write(text)) as trace:
        assert [bool(trace.event(n).known & Known.TIME) for n in range(3)] == [True, False, False]
        assert trace.meta["counts"]["odd_times"] == 2


def test_a_last_line_without_an_end_is_not_read(write: Write) -> None:
    """vector=236 cut to vector=2 would be an NMI."""
    with read(write(AFTER + LINE + "local_timer_entry: vector=2")) as trace:
        assert [trace.event(n).kind for n in range(trace.count)] == [Kind.DELIVER, Kind.GAP]
        assert trace.meta["damage"] == [f"at {len(AFTER):#x}: the last line has no end, and is not read"]


def test_options(write: Write) -> None:
    with pytest.raises(UsageError, match="--cpu-hz: the times of this text are no ticks"):
        read(write(AFTER), cpu_hz=5)
    with pytest.raises(UsageError, match="--monitor belongs to"):
        read(write(AFTER), monitor=("x",))
    with pytest.raises(UsageError, match="--stores belongs to"):
        read(write(AFTER), stores=((1, 2),))
    with pytest.raises(UsageError, match="not one recording"):
        open_inputs([str(write(AFTER))] * 2)
    with read(write(AFTER), symbols=b"1 a\n") as trace:
        assert trace.symbols == b"1 a\n"


def test_limits(write: Write) -> None:
    with pytest.raises(FormatError, match="line 2 is longer than 1 MiB") as caught:
        read(write(AFTER + "x" * (3 << 20)))
    assert caught.value.offset == len(AFTER)
    names = "".join(f" t-1 [000] 1.0: event_{n}: x\n" for n in range(3000))
    with read(write(names)) as trace:
        assert len(trace.meta["tracepoints"]) == 1024 and trace.meta["counts"]["skipped_records"] == 3000


@pytest.mark.parametrize("filler", [" ", "-1 ", "[001] ", "1", "a-1 [0", "x" * 7 + " 1 [001] 1.1: ", "CPU:1 [", "d.h1."])
def test_long_lines_do_not_take_long(filler: str, write: Write) -> None:
    line = filler * (100_000 // len(filler)) + "\n"
    began = time.process_time()
    with contextlib.suppress(FormatError):
        read(write(AFTER + line))
    assert time.process_time() - began < 5


@pytest.mark.parametrize("name", SAMPLES)
def test_every_truncation(name: str, write: Write) -> None:
    """The events of the whole lines, and a gap for what is cut; an error as long as there is none."""
    data = b"".join((DATA / name).read_bytes().splitlines(keepends=True)[1::7])  # each line a record
    path = write(data)
    whole = events(path)
    for size in range(1, len(data)):
        path.write_bytes(data[:size])
        lines, cut = data[:size].count(b"\n"), data[:size].rsplit(b"\n", 1)[-1].strip()
        if not lines:
            with pytest.raises(FormatError):
                read(path)
            continue
        found = events(path)
        if cut:
            assert found.pop().kind is Kind.GAP, size
        assert [brief(e) for e in found] == [brief(e) for e in whole[: len(found)]], size
        path.write_bytes(b"".join(data.splitlines(keepends=True)[:lines]))
        assert len(found) == len(events(path)), size


@pytest.mark.parametrize("name", [*SAMPLES, "kvm"])
def test_mutations_end_in_an_error_or_a_trace(name: str) -> None:
    if name == "kvm":
        data = kvm(
            *[(n % 3, n % 5, said) for n, (said, *_) in enumerate(REQUESTS[::4])], (0, 1, INJECT.format("0x80000202")),
            (0, 1, EXIT.format("EPT_VIOLATION", "0x80000202")), (1, 2, "irq_handler_entry: irq=9 name=a"),
        ).encode()  # fmt: skip
    else:
        data = b"".join((DATA / name).read_bytes().splitlines(keepends=True)[::6])
    rng = random.Random(name)
    fine = 0
    for number in range(10_000):
        out = bytearray(data)
        for _ in range(rng.choice((1, 2, 4))):
            at = rng.randrange(len(out))
            match rng.randrange(5):
                case 0:
                    out[at] = rng.randrange(256)
                case 1:
                    del out[at : at + rng.randrange(1, 30)]
                case 2:
                    out[at:at] = rng.choice((b"9" * 25, b"\x1b[2J", b"\n", b"[", b"]", b":", b"0x", b"-", b"\xff", b"f" * 18))
                case 3:
                    out[at] ^= 1 << rng.randrange(8)
                case _:
                    other = rng.randrange(len(out))
                    out[at:at] = out[other : other + rng.randrange(80)]
        fine += outcome(bytes(out), number % 50 == 0)
    assert fine > 9_000


def outcome(data: bytes, whole: bool) -> bool:
    """Whether it was read; nothing but an error of ours may come."""

    class Source(io.BytesIO):
        path, name, sha256, bytes = "x", "x", "", len(data)

        def chunks(self) -> list[bytes]:
            return [data]

    out = io.BytesIO()
    writer = TraceWriter(out)
    try:
        ftrace_text.read([Source()], writer, ReaderOptions())  # type: ignore[list-item]
        if whole:
            writer.close()
            with Trace.from_bytes(out.getvalue()) as trace:
                assert trace.cpus <= wire.MAX_CPUS
                assert all(trace.event(n).cpu < trace.cpus for n in range(trace.count))
    except (FormatError, UsageError) as error:
        assert str(error).isprintable()
        return False
    return True


def test_recognised_and_told(run_cli: Callable[..., Any]) -> None:
    for name in SAMPLES:
        with Input(str(DATA / name)) as source:
            assert recognise(source).name == "ftrace-text"
    said = run_cli("info", DATA / "script.txt", code=0).stdout
    assert ": ftrace-text\n" in said and "  nmi: nmi_handler comes after a handler ran" in said
    assert "27 deliveries cannot be placed on a stack" in run_cli("replay", DATA / "script.txt", code=3).stdout


@pytest.mark.parametrize(
    ("recording", "text", "unit"),
    [
        ("trace-dat/trace-smp2.dat", "trace-dat/trace-smp2.report.txt", 1000),
        ("trace-dat/trace-v6-tsc-kp-smp2.dat.gz", "trace-dat/trace-v6-tsc-kp-smp2.report-R.txt", 1),
    ],
)
def test_the_text_says_what_the_recording_says(recording: str, text: str, unit: int, shared: Path) -> None:
    """But for what is not printed: RIP where a symbol stands for it, the module of a handler, the digits below a microsecond."""
    if "trace-dat" not in input_names():
        pytest.skip("no reader of trace.dat")

    def told(path: Path) -> list[tuple[Any, ...]]:
        with read(path) as trace:
            rows = []
            for n in range(trace.count):
                kind, fields = brief(trace.event(n))
                fields["time"] = round(fields["time"] / unit)
                if fields.get("rip", 0) >> 63:
                    del fields["rip"]
                note = mark_text(trace, n).replace(" [mce_inject]", "") if kind == "mark" else ""
                rows.append((kind, fields, note))
            return rows

    assert told(shared / text) == told(shared / recording)
