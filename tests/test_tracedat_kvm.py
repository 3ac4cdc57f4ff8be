"""What KVM traced, as events of the host and of guest CPUs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tracedatcheck import ACCEPT, CODED, ENTRY, INJ_EXC, INJ_VIRQ, POINTS, T0, VALID, entry, events, one, page_of, tick, vmexit
from tracedatfile import HARDIRQ, SOFTIRQ, Buffer, File, Page, Point

from tracedbg.formats import ReaderOptions, open_input
from tracedbg.layout import load_toml
from tracedbg.replay import Replay
from tracedbg.state import EventFlag, Kind, Known, Source
from tracedbg.trace import Trace

Opener = Callable[..., Trace]


@pytest.fixture
def read(tmp_path: Path) -> Opener:
    def open_bytes(data: bytes, **options: Any) -> Trace:
        path = tmp_path / "x.dat"
        path.write_bytes(data)
        return open_input(str(path), options=ReaderOptions(**options))

    return open_bytes


@pytest.mark.parametrize(
    ("info", "source", "vector", "coded"),
    [
        (0x31, Source.INJECTED, 0x31, False), (0x202, Source.NMI, 2, False), (0x30E | CODED, Source.EXCEPTION, 14, True),
        (0x312, Source.MC, 18, False), (0x480, Source.SOFT_INT, 0x80, False), (0x501, Source.SOFT_INT, 1, False),
        (0x603, Source.SOFT_INT, 3, False), (0x306, Source.EXCEPTION, 6, False),
    ],
)  # fmt: skip
def test_injections_are_deliveries_to_the_guests_cpu(info: int, source: Source, vector: int, coded: bool, read: Opener) -> None:
    with read(one(page_of(entry(VALID | info, code=6), vmexit(30))).six()) as trace:
        assert [(e.kind, e.cpu) for e in events(trace)] == [(Kind.VMENTRY, 0), (Kind.DELIVER, 1), (Kind.VMEXIT, 0)]
        e = trace.event(1)
        assert (e.source, e.arg, e.rip, e.time - T0, e.flags) == (source, vector, 0x1000, 1, 0)
        assert bool(e.known & Known.CODE) == coded and (not coded or e.code == 6)
        out = trace.event(2)
        assert (out.code, out.addr, out.arg) == (30, 0x2000, 0) and not out.known & (Known.SOURCE | Known.RIP)
        assert trace.cpus == 2 and trace.meta["vcpus"] == {"cpu 1": "vCPU 0 of thread 70"}


@pytest.mark.parametrize("info", [0x202, VALID | 0x731, VALID | 0x131, 0])
def test_what_is_not_valid_or_no_vector_is_not_injected(info: int, read: Opener) -> None:
    with read(one(page_of(entry(info), vmexit(30))).six()) as trace:
        assert [e.kind for e in events(trace)] == [Kind.VMENTRY, Kind.VMEXIT]


@pytest.mark.parametrize(
    ("out", "failed"),
    [
        (vmexit(48, info2=VALID | 0x202), True),                       # VMX: EPT violation while the NMI was delivered
        (vmexit(48, info2=VALID | 0x30E | CODED), False),              # a #PF of the guest, after the NMI
        (vmexit(0x80000021), True),                                    # the VM entry failed
        (vmexit(0x400, isa=2, intr=VALID | 0x202), True),              # SVM: EXITINTINFO
        (vmexit(0x400, isa=2, info2=VALID | 0x202), False),            # an address
        (vmexit(0, intr=VALID | 0x202), False),                        # a host NMI ended the guest's run
    ],
)  # fmt: skip
def test_the_vm_exit_tells_whether_it_was_delivered(out: bytes, failed: bool, read: Opener) -> None:
    with read(one(page_of(entry(VALID | 0x202), out)).six()) as trace:
        assert bool(trace.event(1).flags & EventFlag.FAILED) == failed
        assert trace.meta["counts"].get("undelivered_injections", 0) == failed


def test_a_held_injection_stays_in_order(read: Opener) -> None:
    # The handler of the NMI that ends the guest's run is recorded before the VM exit; CPU 1 goes on meanwhile.
    first = Page(T0).record(5, entry(VALID | 0x202)).record(5, tick()).record(5, vmexit(0, intr=VALID | 0x202)).bytes()
    second = Page(T0).record(1, tick(0x40)).record(6, tick(0x41)).record(20, tick(0x42)).bytes()
    with read(File(POINTS, [Buffer({0: first, 1: second})]).six()) as trace:
        assert [(e.time - T0, e.cpu, e.kind) for e in events(trace)] == [
            (1, 1, Kind.DELIVER), (5, 0, Kind.VMENTRY), (5, 2, Kind.DELIVER), (7, 1, Kind.DELIVER), (10, 0, Kind.DELIVER),
            (15, 0, Kind.VMEXIT), (27, 1, Kind.DELIVER),
        ]  # fmt: skip
        out = trace.event(5)
        assert out.source is Source.NMI and out.known & Known.SOURCE


def test_an_injection_without_its_vm_exit(read: Opener) -> None:
    pages = page_of(entry(VALID | 0x202), *[tick()] * 50) + page_of(entry(VALID | 0x202)) + Page(T0 + 99).bytes(5)
    with read(one(pages + page_of(entry(VALID | 0x202))).six()) as trace:
        deliveries = [e for e in events(trace) if e.cpu == 1]
        assert [e.arg for e in deliveries] == [2, 2, 2] and not any(e.flags for e in deliveries)
        assert trace.meta["counts"]["injections_without_exit"] == 3


def test_vm_exits_for_nmis_and_windows(read: Opener) -> None:
    outs = (vmexit(0, intr=VALID | 0x202), vmexit(0, intr=VALID | 0x30E), vmexit(8), vmexit(0x61, isa=2), vmexit(8, isa=2))
    with read(one(page_of(entry(), *outs)).six()) as trace:
        told = [(e.kind, e.cpu, e.source) for e in events(trace)][1:]
        assert told == [
            (Kind.VMEXIT, 0, Source.NMI), (Kind.VMEXIT, 0, Source.UNKNOWN), (Kind.VMEXIT, 0, Source.UNKNOWN),
            (Kind.VMEXIT, 0, Source.NMI), (Kind.VMEXIT, 0, Source.UNKNOWN),
        ]  # fmt: skip
        assert [e.arg for e in events(trace) if e.kind is Kind.VMEXIT] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(("isa", "made"), [(1, 0), (2, 1)])
def test_gif_is_set_again_before_an_exit_of_svm_is_recorded(isa: int, made: int, read: Opener) -> None:
    page = page_of(entry(), vmexit(0x61, isa=isa), tick(), tick(), entry(), vmexit(0x78, isa=isa), entry(), tick())
    with read(one(page).six()) as trace, Replay(trace) as replay:
        replay.scan_all()
        assert list(replay.findings()) == []  # GIF = 0 would have held the interrupts
        stgi = [n for n, e in enumerate(events(trace)) if e.kind is Kind.UNBLOCK]
        assert stgi == [2] * made and all(trace.event(n).arg == 1 and trace.event(n).cpu == 0 for n in stgi)


def test_before_linux_5_10_info2_is_the_interruption(read: Opener) -> None:
    fields = (("unsigned int", "exit_reason"), ("unsigned long", "guest_rip"), ("u32", "isa"), ("u64", "info1"), ("u64", "info2"))
    old = Point("kvm", "kvm_exit", 301, fields)
    page = page_of(entry(VALID | 0x202), old.record(0, 1, 1, 0, VALID | 0x202))
    with read(File((ENTRY, old), [Buffer({0: page})]).six()) as trace:
        assert not trace.event(1).flags and trace.event(2).source is Source.NMI


def test_each_thread_of_kvm_is_a_cpu(read: Opener) -> None:
    payloads = (entry(VALID | 0x202, vcpu=0, pid=70), entry(VALID | 0x202, vcpu=0, pid=80), entry(VALID | 0x202, vcpu=1, pid=71),
                entry(VALID | 0x202, vcpu=0, pid=70), entry(VALID | 0x202, vcpu=3, pid=70))  # fmt: skip
    with read(one(page_of(*payloads)).six()) as trace:
        assert [e.cpu for e in events(trace) if e.kind is Kind.DELIVER] == [1, 2, 3, 1, 4]
        assert trace.meta["vcpus"]["cpu 4"] == "vCPU 3 of thread 70" and trace.cpus == 5


def test_requests(read: Opener) -> None:
    payloads = (
        INJ_EXC.record(13, 1, 8, 0, pid=70), INJ_EXC.record(6, 0, 99, 0, pid=70), INJ_VIRQ.record(0xF3, 0, 0, pid=70),
        entry(vcpu=4, pid=70), ACCEPT.record(4, 0x400, 0, 0, pid=70), ACCEPT.record(4, 0x100, 0, 0x55, pid=70),
        ACCEPT.record(5, 0, 0, 0x56, pid=70), ACCEPT.record(4, 0, 0, 0x57, pid=70, flags=HARDIRQ),
        ACCEPT.record(4, 0x500, 0, 0, pid=70), ACCEPT.record(4, 0, 0, 0x58, pid=71),
        ACCEPT.record(4, 0, 0, 0x59, pid=70, flags=SOFTIRQ), INJ_VIRQ.record(0x300, 0, 0, pid=70),
    )  # fmt: skip
    with read(one(page_of(*payloads)).six()) as trace:
        raised = [e for e in events(trace) if e.kind is Kind.RAISE]
        assert [e.arg for e in raised] == [13, 6, 0xF3, 2, 0x55]
        assert all(e.cpu == 1 and e.source is Source.INJECTED for e in raised)
        assert [e.code if e.known & Known.CODE else None for e in raised] == [8, None, None, None, None]
        assert trace.meta["counts"]["requests_without_vcpu"] == 4 and trace.meta["counts"]["odd_records"] == 1


def test_the_older_name_of_an_injected_vector(read: Opener) -> None:
    old = Point("kvm", "kvm_inj_virq", 303, (("unsigned int", "irq"),))
    with read(File((old,), [Buffer({0: page_of(old.record(0x31))})]).six()) as trace:
        assert (trace.event(0).kind, trace.event(0).arg) == (Kind.RAISE, 0x31)


def test_a_gap_where_guests_run_is_one_of_all_cpus(read: Opener) -> None:
    pages = Page(T0).bytes(3) + page_of(entry(), vmexit(30)) + Page(T0 + 50).bytes(4)
    with read(one(pages).six()) as trace:
        gaps = [e for e in events(trace) if e.kind is Kind.GAP]
        assert [bool(e.known & Known.CPU) for e in gaps] == [True, False] and [e.value for e in gaps] == [3, 4]


def test_a_guests_nmis_are_placed_on_its_own_stacks(read: Opener, run_cli: Callable[..., Any], tmp_path: Path) -> None:
    # NMI, an exit because NMIs can be taken again, NMI: in its ordinary order nothing is claimed.
    pages = page_of(entry(VALID | 0x202), vmexit(8), entry(VALID | 0x202, rip=0x1234), vmexit(30), tick())
    layout = tmp_path / "guest.toml"
    layout.write_text(
        '[[tss]]\nbase = "0x5000"\nist2 = "0x9000"\n[[idt]]\nbase = "0x6000"\ngate.2 = {ist = 2}\n'
        '[[cpu]]\n[[cpu]]\ntr = "0x5000"\nidt = "0x6000"\n'
    )
    with read(one(pages).six(), layout=load_toml(str(layout))) as trace, Replay(trace) as replay:
        assert trace.cpus == 2
        replay.seek(trace.count)
        (frame,) = replay.frames()
        assert (frame.cpu, frame.vector, frame.ist, frame.hi, frame.saved.rip) == (1, 2, 2, 0x9000, 0x1234)
        assert not replay.findings()
    path = tmp_path / "x.dat"
    assert "no layout" in run_cli("replay", path, code=3).stdout
    said = run_cli("replay", "--layout", layout, path, code=3).stdout
    assert "1 delivery" in said  # the timer: the host's CPU has no layout
    assert "unknown: the trace has neither RSP nor returns" in said  # nothing found is not clean
