"""QEMU logs into events: known answers read off the logs' text by eye."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zstandard
from dumpjson import layout_of_dump

from tracedbg import wire
from tracedbg.errors import FormatError, UsageError
from tracedbg.formats import ReaderOptions, open_input, open_inputs, qemu_monitor, qemu_text
from tracedbg.formats.source import Input
from tracedbg.layout import REGION_STORES, REGION_USER, CpuTables, Fidelity, from_toml
from tracedbg.state import Event, EventFlag, Kind, Known, Source
from tracedbg.symbols import Symbols
from tracedbg.trace import Trace

DATA = Path(__file__).parent / "data" / "qemu"
SHARED = Path(os.environ.get("TRACEDBG_DATA") or Path(__file__).parents[2] / "shared" / "data") / "qemu"
ALONE = ReaderOptions(discover=False)


def events(trace: Trace) -> list[Event]:
    return [trace.event(i) for i in range(trace.count)]


def deliveries(trace: Trace) -> list[Event]:
    return [e for e in events(trace) if e.kind == Kind.DELIVER]


def read_bytes(tmp_path: Path, data: bytes, options: ReaderOptions = ALONE) -> Trace:
    path = tmp_path / "log"
    path.write_bytes(data)
    return open_input(str(path), options=options)


def scenario(name: str, options: ReaderOptions | None = None) -> Trace:
    folder = DATA / name
    path = folder / "qemu.log"
    return open_input(str(path if path.exists() else folder / "qemu.log.gz"), options=options)


def shared(name: str) -> str:
    path = SHARED / name
    if not path.exists():
        pytest.skip("the shared data is not here")
    return str(path)


# -- known answers -----------------------------------------------------------------------------------------------------


def test_istlab_a_gives_the_nmi_the_int3_and_the_nmi_inside() -> None:
    trace = scenario("istlab/a")
    got = [(e.source_index, e.arg, e.source, e.rip, e.rsp, e.cs, e.ss, e.rflags, e.code) for e in deliveries(trace)]
    assert got == [
        (0, 2, Source.NMI, 0x100BAB, 0x11CFA8, 8, 0x10, 0x97, 0),
        (1, 3, Source.SOFT_INT, 0x100C36, 0x126FD0, 8, 0, 0x46, 1),
        (2, 2, Source.NMI, 0x100BAB, 0x126FD0, 8, 0, 0x97, 0),
    ]
    assert [(e.kind, e.value) for e in events(trace)[:2]] == [(Kind.LTR, 0x105100), (Kind.LIDT, 0x106000)]
    assert trace.layout.tss[0].ist[2] == 0x10E000
    assert trace.layout.idts[0].gates[2].ist == 2
    assert trace.layout.fidelity == Fidelity.SS_ZEROED
    assert trace.meta["layout"]["agree"] is True
    assert trace.meta["source"]["name"] == "qemu.log"


@pytest.mark.parametrize(
    ("name", "sources"),
    [
        ("istlab/a0", [(2, Source.NMI), (2, Source.NMI)]),
        ("istlab/b_int2", [(2, Source.SOFT_INT), (2, Source.NMI)]),
        ("istlab/b_pic", [(2, Source.EXTERNAL), (2, Source.NMI)]),
        ("istlab/c_lapic", [(18, Source.EXTERNAL), (18, Source.MC)]),
        ("istlab/d_mcip", [(18, Source.MC)]),
        ("istlab/e_int1", [(1, Source.SOFT_INT), (1, Source.SOFT_INT)]),
        ("istlab/f_ist_ipi", [(2, Source.NMI)]),
        ("istlab/f_noist_ipi", [(2, Source.NMI)]),
        ("istlab/g", [(2, Source.NMI), (3, Source.SOFT_INT), (2, Source.NMI)]),
        ("istlab-qemu10/a", [(2, Source.NMI), (3, Source.SOFT_INT), (2, Source.NMI)]),
        ("istlab-qemu10/e_icebp", [(1, Source.EXCEPTION), (1, Source.EXCEPTION)]),
    ],
)
def test_sources_are_told_apart(name: str, sources: list[tuple[int, Source]]) -> None:
    trace = scenario(name)
    assert [(e.arg, e.source) for e in deliveries(trace)] == sources
    assert not any(e.flags for e in deliveries(trace))


def test_the_length_of_int_n_is_2_and_of_int3_is_1() -> None:
    assert [e.code for e in deliveries(scenario("istlab/e_int1"))] == [2, 2]
    assert deliveries(scenario("istlab/x_df"))[0].code == 1


def test_layouts_with_and_without_ist_differ_in_the_nmi_gate() -> None:
    assert scenario("istlab/f_ist_ipi").layout.idts[0].gates[2].ist == 2
    assert scenario("istlab/f_noist_ipi").layout.idts[0].gates[2].ist == 0


def test_a_machine_check_with_mcip_set_is_a_shutdown() -> None:
    for trace in (scenario("istlab/d_mcip"), open_input(str(DATA / "linux-nested/smp1-mce_in_mce_triple.log.gz"))):
        last = events(trace)[-1]
        assert (last.kind, last.arg, last.cpu) == (Kind.SHUTDOWN, 1, 0)


def test_failed_attempts_before_a_double_fault_are_recognised() -> None:
    got = [(e.arg, e.flags, e.addr, bool(e.known & Known.ADDR), e.value) for e in deliveries(scenario("istlab/x_df"))]
    assert got == [
        (3, EventFlag.FAILED, 0, True, 0),
        (14, EventFlag.FAILED, 0, True, 0x123456788FF8),
        (8, EventFlag(0), 0, False, 0),
    ]


def test_a_page_fault_that_could_not_be_delivered_on_linux_is_failed() -> None:
    trace = open_input(str(DATA / "linux-nested/smp1-df_bad_rsp.log.gz"))
    failed = [(e.source_index, e.arg) for e in deliveries(trace) if e.flags & EventFlag.FAILED]
    assert failed == [(524, 14)]
    assert deliveries(trace)[2].arg == 8


def test_int_n_through_an_absent_segment_is_failed_and_the_repeated_one_is_not() -> None:
    # Events 11, 20, 23 are INT 0x21 with a code segment that is not present; 21 is the #NP whose push faults.
    trace = open_input(str(DATA / "kvm-unit-tests/eventinj.log.gz"))
    failed = [(e.source_index, e.arg, e.addr) for e in deliveries(trace) if e.flags & EventFlag.FAILED]
    assert failed == [(11, 0x21, 0), (20, 0x21, 0), (21, 11, 0), (23, 0x21, 0)]


def test_three_nmis_at_one_place_are_three_deliveries() -> None:
    trace = open_input(str(DATA / "kvm-unit-tests/eventinj.log.gz"))
    nmis = [e for e in deliveries(trace) if e.source == Source.NMI]
    assert [e.source_index for e in nmis] == [14, 15, 16, 17]
    assert not any(e.flags for e in nmis)


@pytest.mark.parametrize(
    "name", ["linux-nested/smp1-nest_nmi_masked", "linux-nested/smp1-mce_in_nmi", "xen-nested/smp1-xmce_in_nmi"]
)
def test_nothing_else_is_failed_in_ordinary_logs(name: str) -> None:
    assert not any(e.flags for e in deliveries(open_input(str(DATA / f"{name}.log.gz"))))


def test_the_xen_livelock_log_has_three_deliveries_and_a_dump_gives_its_layout() -> None:
    layout = layout_of_dump(DATA / "xen-nested/smp1-xnmi_mce_nmi.dump.json.gz")
    trace = open_input(str(DATA / "xen-nested/smp1-xnmi_mce_nmi.log.gz"), options=ReaderOptions(layout=layout))
    assert [(e.source_index, e.arg, e.source) for e in deliveries(trace)] == [
        (569, 2, Source.NMI), (570, 18, Source.MC), (571, 2, Source.NMI),
    ]  # fmt: skip
    assert trace.layout.tss[0].ist[2] == 0xFFFF8300BFFD3000
    assert trace.layout.cpus[0].tss == 0
    assert "missing" not in trace.meta["layout"]


def test_32_bit_events_are_legacy_and_real_mode_ones_are_counted() -> None:
    trace = open_input(str(DATA / "kvm-unit-tests/i386_eventinj.log.gz"))
    assert len(deliveries(trace)) == 29
    assert all(e.flags & EventFlag.LEGACY for e in deliveries(trace))
    assert trace.meta["counts"]["legacy"] == 29
    trace = open_input(str(DATA / "kvm-unit-tests/realmode.log.gz"))
    assert trace.count == 0
    assert trace.meta["counts"]["serviced_unlogged"] == 1


# -- CPUs --------------------------------------------------------------------------------------------------------------


def test_thread_files_merge_by_number_and_a_file_is_a_cpu() -> None:
    paths = [str(DATA / "istlab/smp2_tid" / f"qemu.{tid}.log") for tid in (8943, 8946, 8947)]
    for order in (paths, paths[::-1]):
        trace = open_inputs(order)
        got = deliveries(trace)
        assert [e.source_index for e in got] == list(range(26))
        assert [e.cpu for e in got[:4]] == [0, 0, 1, 0]
        assert {e.cpu for e in got[13:]} == {1}
        assert trace.cpus == 2


def test_one_thread_file_alone_has_gaps() -> None:
    trace = open_input(str(DATA / "istlab/smp2_tid/qemu.8946.log"))
    gaps = [e for e in events(trace) if e.kind == Kind.GAP]
    assert [(e.value, bool(e.known & Known.CPU)) for e in gaps] == [(1, False)]


def test_several_tr_bases_are_several_cpus_in_order_of_appearance() -> None:
    trace = open_input(str(DATA / "kvm-unit-tests/ioapic.log.gz"))
    assert trace.cpus == 4
    ltr = [(e.cpu, e.value) for e in events(trace) if e.kind == Kind.LTR]
    assert ltr == [(0, 0), (0, 0x1020F28), (1, 0x1020F90), (2, 0x1020FF8), (3, 0x1020EC0)]


def test_torn_lines_are_put_together_and_counted() -> None:
    for name in ("linux/l2_torn_excerpt.log.gz", "istlab/smprace_ud_ipi/torn_excerpt.log.gz"):
        trace = open_input(str(DATA / name))
        counts = trace.meta["counts"]
        text = gzip.decompress((DATA / name).read_bytes())
        assert len(deliveries(trace)) == text.count(b": v=") == 24
        assert (counts["torn_repaired"], counts["torn_lost"], counts["damaged"]) == (8, 0, 0)
        assert not any(e.flags for e in deliveries(trace))


def test_the_cr2_of_a_torn_page_fault_is_its_own() -> None:
    trace = open_input(str(DATA / "linux/l2_torn_excerpt.log.gz"))
    got = {e.source_index: (e.value, e.rip, e.cpu) for e in deliveries(trace)}
    assert got[9164] == (0x11CE380C, 0x529FAC, 1)
    assert got[9165] == (0x11CE1690, 0xFFFFFFFF819C6052, 0)


BLOCK = (
    "RAX=0000000000000001 RBX=0000000000000020 RCX=0000000000000001 RDX=000000000014e684\n"
    "RSI=000000000010309d RDI=00000000001032fb RBP=0000000000100370 RSP={sp:016x}\n"
    "R8 =000000000010b000 R9 =0000000000000000 R10=0000000000000000 R11=0000000000000000\n"
    "R12=0000000000000010 R13=0000000000000000 R14=0000000000000000 R15=0000000000000000\n"
    "RIP={ip:016x} RFL=00000246 [-------] CPL=0 II=0 A20=1 SMM=0 HLT=0\n"
    "ES =0010 0000000000000000 ffffffff 00cf9300 DPL=0 DS   [-WA]\n"
    "CS =0008 0000000000000000 ffffffff 00af9b00 DPL=0 CS64 [-RA]\n"
    "SS =0010 0000000000000000 ffffffff 00cf9300 DPL=0 DS   [-WA]\n"
    "DS =0010 0000000000000000 ffffffff 00cf9300 DPL=0 DS   [-WA]\n"
    "FS =0010 0000000000000000 ffffffff 00cf9300 DPL=0 DS   [-WA]\n"
    "GS =0010 0000000011110000 ffffffff 00cf9300 DPL=0 DS   [-WA]\n"
    "LDT=0000 0000000000000000 0000ffff 00008200 DPL=0 LDT\n"
    "TR =0028 {tr:016x} 00000067 00008900 DPL=0 TSS64-avl\n"
    "GDT=     0000000000105000 0000007f\n"
    "IDT=     0000000000106000 00000fff\n"
    "CR0=80010011 CR2={cr2:016x} CR3=0000000000113000 CR4=00000060\n"
    "DR0=0000000000000000 DR1=0000000000000000 DR2=0000000000000000 DR3=0000000000000000 \n"
    "DR6=00000000ffff0ff0 DR7=0000000000000400\n"
    "CCS=0000000000000000 CCD=0000000000000001 CCO=LOGICL\n"
    "EFER=0000000000000501\n"
)


def head(n: int, v: int, ip: int, sp: int, e: int = 0, i: int = 0, cs: int = 8) -> str:
    return f"{n:6d}: v={v:02x} e={e:04x} i={i} cpl={cs & 3} IP={cs:04x}:{ip:016x} pc={ip:016x} SP=0010:{sp:016x}"


def tail(v: int, cr2: int = 0) -> str:
    return f" CR2={cr2:016x}" if v == 14 else " env->regs[R_EAX]=0000000000000001"


def block(ip: int, sp: int, cr2: int = 0, tr: int = 0x105100) -> str:
    return BLOCK.format(ip=ip, sp=sp, cr2=cr2, tr=tr)


def event(n: int, v: int, ip: int, sp: int, cr2: int = 0, tr: int = 0x105100, **more: int) -> str:
    return head(n, v, ip, sp, **more) + tail(v, cr2) + "\n" + block(ip, sp, cr2, tr)


def test_two_threads_that_interleave_all_their_pieces_are_told_apart(tmp_path: Path) -> None:
    text = (
        event(0, 0x20, 0x1000, 0x9000)
        + event(1, 0x20, 0x1100, 0xA000, tr=0x105200)
        + head(2, 14, 0x2000, 0x9100)
        + head(3, 14, 0x2200, 0xA100)
        + tail(14, 0xBBB8)
        + tail(14, 0xAAA8)
        + "\n\n"
        + block(0x2200, 0xA100, 0xBBB8, 0x105200)
        + block(0x2000, 0x9100, 0xAAA8)
        + event(4, 0x20, 0x1000, 0x9000)
    )
    trace = read_bytes(tmp_path, text.encode())
    got = [(e.source_index, e.cpu, e.rip, e.value, int(e.flags)) for e in deliveries(trace)]
    assert got == [
        (0, 0, 0x1000, 0, 0),
        (1, 1, 0x1100, 0, 0),
        (2, 0, 0x2000, 0xAAA8, 0),
        (3, 1, 0x2200, 0xBBB8, 0),
        (4, 0, 0x1000, 0, 0),
    ]


def test_a_line_cut_in_two_anywhere_is_joined(tmp_path: Path) -> None:
    text = event(0, 0x20, 0x1000, 0x9000) + event(1, 0x21, 0x1004, 0x9008) + event(2, 0x20, 0x1000, 0x9000)
    for at in range(text.index("RSI="), text.rindex("EFER="), 37):
        torn = text[:at] + "check_exception old: 0xffffffff new 0xe\n" + text[at:]
        trace = read_bytes(tmp_path, torn.encode())
        got = [(e.source_index, e.arg, e.rip, e.rflags, int(e.flags)) for e in deliveries(trace)]
        assert got == [(0, 0x20, 0x1000, 0x246, 0), (1, 0x21, 0x1004, 0x246, 0), (2, 0x20, 0x1000, 0x246, 0)], at


def test_a_lost_register_dump_gives_a_partial_event(tmp_path: Path) -> None:
    text = "".join(event(n, 0x20, 0x1000 + n, 0x9000) for n in range(30))
    at = text.index("RAX=", text.index("     5:"))
    trace = read_bytes(tmp_path, (text[:at] + text[text.index("     6:") :]).encode())
    got = deliveries(trace)
    assert [e.source_index for e in got] == list(range(30))
    assert [e.source_index for e in got if e.flags & EventFlag.PARTIAL] == [5]
    assert not got[5].known & Known.RFLAGS
    assert trace.meta["counts"]["damaged"] == 1


def test_a_log_cut_anywhere_gives_what_is_complete(tmp_path: Path) -> None:
    text = (event(0, 0x20, 0x1000, 0x9000) + event(1, 14, 0x1004, 0x9008, 0x77)).encode()
    for cut in range(0, len(text), 61):
        if cut < 150:
            continue  # the first `v=` line is not there whole: no log
        trace = read_bytes(tmp_path, text[:cut], ReaderOptions(from_format="qemu-int", discover=False))
        assert len(deliveries(trace)) <= 2


# -- order and numbers --------------------------------------------------------------------------------------------------


def test_a_missing_number_is_a_gap_and_a_swapped_pair_is_none(tmp_path: Path) -> None:
    numbers = [7, 8, 10, 9, 11, 15, 16]
    trace = read_bytes(tmp_path, "".join(event(n, 0x20, 0x1000 + n, 0x9000) for n in numbers).encode())
    got = [(e.kind, e.value if e.kind == Kind.GAP else e.source_index) for e in events(trace)[2:]]
    assert got == [
        (Kind.DELIVER, 7), (Kind.DELIVER, 8), (Kind.DELIVER, 10), (Kind.DELIVER, 9), (Kind.DELIVER, 11),
        (Kind.GAP, 3), (Kind.DELIVER, 15), (Kind.DELIVER, 16),
    ]  # fmt: skip


def test_a_second_run_in_one_file_is_a_gap_of_unknown_size(tmp_path: Path) -> None:
    numbers = [*range(100, 120), *range(5)]
    trace = read_bytes(tmp_path, "".join(event(n, 0x20, 0x1000, 0x9000) for n in numbers).encode())
    gaps = [e for e in events(trace) if e.kind == Kind.GAP]
    assert [bool(e.known & Known.VALUE) for e in gaps] == [False]
    assert len(deliveries(trace)) == 25
    assert trace.meta["counts"]["restarts"] == 1


def test_a_log_of_its_v_lines_only_still_gives_events(tmp_path: Path) -> None:
    full = (DATA / "istlab/a/qemu.log").read_bytes()
    trace = read_bytes(tmp_path, b"".join(line + b"\n" for line in full.split(b"\n") if b" v=" in line))
    got = deliveries(trace)
    assert [(e.arg, e.rip, e.rsp) for e in got] == [(2, 0x100BAB, 0x11CFA8), (3, 0x100C36, 0x126FD0), (2, 0x100BAB, 0x126FD0)]
    assert not any(e.known & Known.RFLAGS for e in got)
    assert not any(e.flags for e in got)
    assert [e.kind for e in events(trace)] == [Kind.DELIVER] * 3
    assert "assumed" in trace.meta["fidelity"]["mode"]
    assert trace.meta["layout"]["commands"][:2] == ["cpu 0", "info registers"]


def test_v_lines_only_keep_the_address_of_every_page_fault(tmp_path: Path) -> None:
    text = "".join(head(n, 14, 0x1000 + n, 0x9000) + tail(14, 0x7000 + n) + "\n" for n in range(600))
    assert [e.value for e in deliveries(read_bytes(tmp_path, text.encode()))] == [0x7000 + n for n in range(600)]


def test_v_lines_only_take_the_tables_of_the_monitor_text(tmp_path: Path) -> None:
    full = (DATA / "istlab/a/qemu.log").read_bytes()
    lines = b"".join(line + b"\n" for line in full.split(b"\n") if b" v=" in line)
    trace = read_bytes(tmp_path, lines, ReaderOptions(monitor=(str(DATA / "istlab/a/mon_04_final.txt"),)))
    assert (trace.layout.cpus[0].tss, trace.layout.cpus[0].idt) == (0, 0)


# -- failed deliveries ---------------------------------------------------------------------------------------------------


def test_a_fault_that_comes_back_at_the_same_place_is_no_failure(tmp_path: Path) -> None:
    check = "check_exception old: 0xffffffff new 0xe\n"
    text = (
        check + event(0, 14, 0x1000, 0x9000, 0x5000, e=2)
        + check + event(1, 14, 0x1000, 0x9000, 0x6000, e=2)
        + "Servicing hardware INT=0x20\n" + event(2, 0x20, 0x1000, 0x9000)
        + check + event(3, 14, 0x1000, 0x9000, 0x7000, e=2)
    )  # fmt: skip
    assert not any(e.flags for e in deliveries(read_bytes(tmp_path, text.encode())))


def test_a_fault_of_user_code_after_a_breakpoint_at_the_same_place_is_no_failure(tmp_path: Path) -> None:
    text = event(0, 3, 0x1000, 0x9000, i=1, cs=0x33) + event(1, 14, 0x1000, 0x9000, 0x8FF8, e=6, cs=0x33)
    assert not any(e.flags for e in deliveries(read_bytes(tmp_path, text.encode())))


def test_an_nmi_whose_third_push_faults_stored_two_words(tmp_path: Path) -> None:
    check = "check_exception old: 0xffffffff new 0xe\n"
    text = event(0, 2, 0x1000, 0x9010) + check + event(1, 14, 0x1000, 0x9010, 0x8FF8, e=2)
    got = deliveries(read_bytes(tmp_path, text.encode()))
    assert (got[0].flags, got[0].addr, bool(got[0].known & Known.ADDR)) == (EventFlag.FAILED, 2, True)
    assert got[1].flags == EventFlag(0)


def test_an_error_code_that_names_the_gate_shows_the_failure(tmp_path: Path) -> None:
    check = "check_exception old: 0xffffffff new 0xd\n"
    text = event(0, 0x80, 0x1000, 0x9000, i=1, cs=0x33) + check + event(1, 13, 0x1000, 0x9000, e=0x402, cs=0x33)
    got = deliveries(read_bytes(tmp_path, text.encode()))
    assert [int(e.flags) for e in got] == [1, 0]
    assert got[1].code == 0x402


def test_a_general_protection_after_an_nmi_on_a_57_bit_stack_is_no_failure(tmp_path: Path) -> None:
    monitor = tmp_path / "m.txt"
    gate = "0000000000106020: 0x00108e0000080190 0x0000000000000000\n"
    tss = "0000000000105100: 0x0010800000000000 0x0000000000000000\n"
    monitor.write_text("CPU#0\nTR =0028 0000000000105100 00000067 0\nIDT=     0000000000106000 00000fff\n" + gate + tss)
    check = "check_exception old: 0xffffffff new 0xd\n"
    for sp, failed in ((0xFFA0000000693F40, 0), (0x8611111111111110, 1)):
        text = event(0, 2, 0x1000, sp) + check + event(1, 13, 0x1000, sp)
        trace = read_bytes(tmp_path, text.encode(), ReaderOptions(monitor=(str(monitor),)))
        assert [int(e.flags) for e in deliveries(trace)] == [failed, 0]


def test_a_third_fault_is_a_shutdown_once(tmp_path: Path) -> None:
    text = (
        event(0, 14, 0x1000, 0x9000, 0x8FF8, e=2)
        + "check_exception old: 0xe new 0xe\n" + event(1, 8, 0x1000, 0x9000, 0x8FF8)
        + "check_exception old: 0x8 new 0xe\nTriple fault\n"
    )  # fmt: skip
    got = events(read_bytes(tmp_path, text.encode()))[2:]
    assert [(e.kind, int(e.flags)) for e in got] == [(Kind.DELIVER, 1), (Kind.DELIVER, 1), (Kind.SHUTDOWN, 0)]
    assert got[2].arg == 0
    # The words that #PF stored are known from the CR2 of the fault that became #DF.
    assert got[0].addr == 0
    assert got[0].known & Known.ADDR


# -- the plugin ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "returns", "dropped"), [("a", 3, 0), ("b_pic", 2, 5), ("e_int1", 2, 0), ("g", 6, 0)])
def test_returns_are_recorded_and_the_cpus_own_pushes_are_not_stores(name: str, returns: int, dropped: int) -> None:
    trace = scenario(f"istlab-plugin/{name}")
    kinds = Counter(e.kind for e in events(trace))
    assert kinds[Kind.RETURN] == returns
    assert trace.meta["counts"].get("cpu_pushes_dropped", 0) == dropped
    assert trace.layout.fidelity == Fidelity.RETURNS | Fidelity.SS_ZEROED


def test_a_return_has_its_frame_and_what_it_popped() -> None:
    first = next(e for e in events(scenario("istlab-plugin/a")) if e.kind == Kind.RETURN)
    with gzip.open(DATA / "istlab-plugin/a/qemu.log.gz", "rt") as file:
        text = file.read()
    line = next(x for x in text[text.index(": v=") :].split("\n") if "iret-frame" in x)
    want = {k: int(v, 16) for k, v in (w.split("=") for w in line.split()[3:])}
    assert (first.rip, first.rsp, first.addr, first.value) == (want["pc"], want["frame"], want["rip"], want["rsp"])
    assert (first.cs, first.ss, first.rflags) == (want["cs"], want["ss"], want["rfl"])


def test_the_nested_nmi_excerpt_drops_the_pushes_of_event_3030_only() -> None:
    trace = open_input(str(DATA / "linux/nest_plugin_excerpt.log.gz"))
    got = events(trace)
    at = next(i for i, e in enumerate(got) if e.kind == Kind.DELIVER and e.source_index == 3030)
    assert (got[at + 1].kind, got[at + 1].addr) == (Kind.WRITE, 0xFFFFFE000000DFD0)
    assert trace.meta["counts"]["cpu_pushes_dropped"] == 5
    at = next(i for i, e in enumerate(got) if e.kind == Kind.DELIVER and e.source_index == 3033)
    assert got[at].rsp == 0xFFFFFE000000DE58
    back = next(e for e in got[at:] if e.kind == Kind.RETURN)
    assert (back.rsp, back.addr, back.value) == (0xFFFFFE000000DFD8, 0xFFFFFFFF81110005, 0xFFFFFE000000DE58)


def test_given_store_ranges_become_regions() -> None:
    trace = scenario("istlab-plugin/a", ReaderOptions(stores=((0x107000, 0x113000),)))
    assert [(r.lo, r.hi) for r in trace.layout.regions if r.kind == REGION_STORES] == [(0x107000, 0x113000)]


def test_syscalls_of_the_plugin_are_events() -> None:
    kinds = Counter(e.kind for e in events(open_input(str(DATA / "kvm-unit-tests/syscall_plugin.log.gz"))))
    assert (kinds[Kind.SYSCALL], kinds[Kind.SYSRET]) == (3, 2)


# -- layout ---------------------------------------------------------------------------------------------------------------


def test_a_snapshot_of_another_machine_is_an_error_that_names_it() -> None:
    other = str(DATA / "istlab/a/mon_01_start.txt")
    with pytest.raises(FormatError, match=r"mon_01_start.txt.*another machine"):
        open_input(str(DATA / "xen-nested/smp1-xnmi_mce_nmi.log.gz"), options=ReaderOptions(monitor=(other,)))


def test_ranges_of_a_toml_layout_join_the_tables_of_the_monitor_text() -> None:
    given = from_toml('user = [["0x111000", "0x113000"]]', "x.toml")
    trace = scenario("istlab/f_noist_ipi", ReaderOptions(layout=given))
    assert [(r.lo, r.hi) for r in trace.layout.regions if r.kind == REGION_USER] == [(0x111000, 0x113000)]
    assert trace.layout.tss[0].base == 0x105100
    assert trace.meta["layout"]["origin"] == "file and monitor"


def test_without_tables_the_monitor_commands_are_named() -> None:
    told = open_input(str(DATA / "linux-nested/smp1-mce_in_nmi.log.gz")).meta["layout"]
    assert told["missing"] is True
    assert told["commands"] == ["cpu 0", "info registers", "x /26xw 0xfffffe0000003000", "x /512xg 0xfffffe0000000000"]


# -- ways in -----------------------------------------------------------------------------------------------------------------


def test_every_packing_line_end_and_a_pipe_give_the_same_events(tmp_path: Path) -> None:
    path = DATA / "istlab/a/qemu.log"
    plain = path.read_bytes()
    want = bytes(open_input(str(path), options=ALONE).events)
    for data in (
        plain,
        plain.replace(b"\n", b"\r\n"),
        gzip.compress(plain),
        gzip.compress(plain[:1000]) + gzip.compress(plain[1000:]),
        zstandard.compress(plain),
        zstandard.compress(plain[:999]) + zstandard.compress(plain[999:]),
    ):
        assert bytes(read_bytes(tmp_path, data).events) == want
    program = (
        "import sys; from tracedbg.formats import open_input;"
        "t = open_input('-'); sys.stdout.write(bytes(t.events).hex() + ' ' + t.meta['source']['name'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input=plain, capture_output=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert done.stdout.decode() == want.hex() + " stdin"


def test_other_lines_in_between_change_nothing(tmp_path: Path) -> None:
    plain = (DATA / "istlab/a/qemu.log").read_bytes()
    other = b"----------------\nIN: \n0x00100bab:  48 89 c3                 movq     %rax, %rbx\n\nTrace 0: 0x7f0 [0/1/2/3]\n"
    mixed = plain.replace(b"     1: v=", other + b"     1: v=").replace(b"CPU Reset", other + b"CPU Reset")
    assert bytes(read_bytes(tmp_path, other * 3 + mixed).events) == bytes(read_bytes(tmp_path, plain).events)


def test_chunks_of_any_size_give_the_same_items() -> None:
    text = gzip.decompress((DATA / "linux/nest_plugin_excerpt.log.gz").read_bytes())[:120000].replace(b"\n", b"\r\n")

    def items(size: int) -> list[Any]:
        reader = qemu_text.LogText()
        return [i for b in reader.items(text[n : n + size] for n in range(0, len(text), size)) for i in b]

    want = items(len(text))
    assert len(want) > 300
    for size in (1009, 8191, 16384, 50000):
        assert items(size) == want


def test_trace_lines_give_the_time() -> None:
    trace = open_input(str(DATA / "linux-boot/smp2-int+apic-trace-timestamps.log.gz"))
    assert trace.clock_hz == 1_000_000
    times = [e.time for e in deliveries(trace) if e.known & Known.TIME]
    assert times == sorted(times)
    assert times[-1] // 1_000_000 == 1795344788


def test_what_is_no_log_is_refused_in_one_line(tmp_path: Path) -> None:
    def fails(data: bytes | None, message: str, path: Path | None = None) -> None:
        if data is not None:
            path = tmp_path / "bad"
            path.write_bytes(data)
        with pytest.raises(FormatError, match=message) as caught:
            open_input(str(path))
        assert "\n" not in str(caught.value)

    fails(b"", "empty file")
    fails(b"hello world\n" * 100, "not a trace or log")
    fails(b"\0" * 5000, "not a trace or log")
    fails(gzip.compress(b"CPU Reset (CPU 0)\n" * 1000)[:-20], "gzip")
    fails(gzip.compress(os.urandom(50000))[:200] + b"x" * 300, "gzip")
    fails(zstandard.compress(os.urandom(50000))[:20000] + b"x" * 3000, "zstd|not a trace")
    fails(None, "is a directory", tmp_path)
    fails(None, "no such file", tmp_path / "none")
    fails((DATA / "istlab/a/mon_01_start.txt").read_bytes(), "monitor")
    with pytest.raises(FormatError, match="not a QEMU -d int log"):
        (tmp_path / "bad").write_bytes(b"hello\n")
        open_input(str(tmp_path / "bad"), from_format="qemu-int")
    with pytest.raises(UsageError, match="no input format"):
        open_input(str(tmp_path / "bad"), from_format="nonsense")


def test_hostile_text_never_raises_anything_but_format_error(tmp_path: Path) -> None:
    plain = gzip.decompress((DATA / "linux/l2_torn_excerpt.log.gz").read_bytes())
    plugin = gzip.decompress((DATA / "linux/nest_plugin_excerpt.log.gz").read_bytes())[:40000]
    seeds = [plain, plugin, b"PLG cpu=99999 st pc=" + b"f" * 16 + b" va=" + b"f" * 16 + b" sz=999 val=" + b"f" * 3000 + b"\n"]
    rng = random.Random(1)
    for turn in range(150):
        data = bytearray(seeds[turn % 3] + plain[:2000])
        for _ in range(rng.randrange(1, 30)):
            at = rng.randrange(len(data))
            match rng.randrange(5):
                case 0:
                    data[at] = rng.randrange(256)
                case 1:
                    del data[at : at + rng.randrange(1, 400)]
                case 2:
                    other = rng.randrange(len(data))
                    data[at:at] = data[other : other + rng.randrange(1, 600)]
                case 3:
                    data[at:at] = rng.choice([b"\n", b"\r", b"\0", b"9" * 30, b": v=300 ", b"CPU Reset (CPU 99999)\n"])
                case _:
                    data[at:at] = rng.choice([b"check_exception old: 0x8 new 0xe\n", b"PLG cpu=0 iret pc=0000000000000001\n"])
        try:
            trace = read_bytes(tmp_path, bytes(data), ReaderOptions(from_format="qemu-int", discover=False))
        except FormatError:
            continue
        events(trace)


def test_too_many_tr_bases_are_no_machine(tmp_path: Path) -> None:
    text = "".join(event(n, 0x20, 0x1000, 0x9000, tr=0x100000 + 0x80 * n) for n in range(4200))
    with pytest.raises(FormatError, match="different TR bases"):
        read_bytes(tmp_path, text.encode())


def test_a_line_without_end_is_skipped_in_bounded_memory(tmp_path: Path) -> None:
    text = event(0, 0x20, 0x1000, 0x9000).encode() + b"x" * (9 << 20) + b"\n" + event(1, 0x20, 0x1000, 0x9000).encode()
    trace = read_bytes(tmp_path, text)
    assert [e.source_index for e in deliveries(trace)] == [0, 1]
    assert trace.meta["counts"]["damaged"] == 1


def test_a_bomb_is_refused() -> None:
    stream = zstandard.ZstdCompressor(level=3)
    data = stream.compress(b"CPU Reset (CPU 0)\n" + b"\0" * (300 << 20))
    program = "import sys; from tracedbg.formats import open_input; open_input('-')"
    done = subprocess.run(
        [sys.executable, "-c", program], input=data, capture_output=True, cwd=Path(__file__).parents[1]
    )
    assert b"FormatError" in done.stderr
    assert b"not a log" in done.stderr


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress], ids=["gzip", "zstd"])
def test_a_packed_log_that_is_cut_short_is_refused_wherever_it_is_cut(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    plain = (DATA / "istlab/a/qemu.log").read_bytes()
    data = pack(plain) + pack(plain[:999])
    whole = len(pack(plain))
    for cut in [*range(5, len(data), 97), whole - 1, whole + 1, len(data) - 1]:
        path = tmp_path / "log"
        path.write_bytes(data[:cut])
        with pytest.raises(FormatError, match="data is cut short") as caught:
            open_input(str(path), options=ReaderOptions(from_format="qemu-int", discover=False))
        assert caught.value.offset == cut
    assert read_bytes(tmp_path, data[:whole]).count == 5  # between two frames nothing is missing


def test_many_empty_frames_and_members_take_linear_time(tmp_path: Path) -> None:
    plain = (DATA / "istlab/a/qemu.log").read_bytes()
    for pack in (gzip.compress, zstandard.compress):
        start = time.monotonic()
        assert read_bytes(tmp_path, pack(b"") * ((2 << 20) // len(pack(b""))) + pack(plain)).count == 5
        assert time.monotonic() - start < 6


def test_what_zstd_expands_to_comes_in_bounded_pieces(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(zstandard.compress(b"CPU Reset (CPU 0)\n" + b"\0" * (200 << 20)))
    with Input(str(path)) as opened:
        assert max(len(piece) for piece in opened.chunks()) <= 64 << 20
        assert opened.bytes == (200 << 20) + 18


HOSTILE = {
    "newlines": b"\n",
    "returns": b"\r\n",
    "spaces": b" ",
    "tabs": b"\t",
    "digits": b"1",
    "nuls": b"\0",
    "dashes": b"-",
    "cpu": b"CPU#",
    "cpu lines": b"CPU#0 \n",
    "cpu digits": b"CPU#" + b"1" * 4000 + b" ",
    "v": b": v=",
    "v lines": b"1: v\n",
    "heads": b" 1: v=02 e=0000 i=0 cpl=0 IP=0008:",
    "spaces before v": b" " * 60000 + b": v=\n",
    "digits before v": b"1" * 60000 + b": v=\n",
    "tails": b" CR2=0000000000000000\n",
    "long tails": b" CR2=0000000000000000",
    "registers": b"RAX=00000000",
    "small dumps": b"EAX=00000000\nEFER=\n",
    "torn registers": b"RIP=Triple fault\n",
    "times": b"1@1.",
    "long times": b"1" * 4000 + b"@",
    "plugin": b"PLG cpu=0 st pc=" + b"0" * 16 + b"\n",
    "plugin values": b"PLG cpu=0 st pc=" + b"0" * 16 + b" va=" + b"0" * 16 + b" sz=1 val=" + b"0" * 4000 + b"\n",
    "escapes": b"\x1b[1",
    "backspaces": b"a\x08",
    "memory": b"0000000000105100: 0x00000000\n",
    "words": b" 0x00000000",
    "words with blanks": b" " * 500 + b"00",
    "memory commands": b"xp " + b" " * 500,
}


@pytest.mark.parametrize("piece", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_is_read_in_linear_time(tmp_path: Path, piece: bytes) -> None:
    size = 1 << 18
    lead = (head(0, 3, 0x1000, 0x9000) + tail(3) + "\n").encode()
    many = b"Triple fault\nCPU Reset (CPU 0)\n" * 2000  # that wait behind the `v=` line without a register dump
    text = (piece * (size // len(piece) + 1))[:size]
    lines = b"".join(text[at : at + 60000] + b": v=\n" for at in range(0, size, 60000))  # none longer than the limit
    two = lead + (head(1, 14, 0x1000, 0x9000) + "\n").encode() + many
    start = time.monotonic()
    for data in (text, lines, two + text, two + lines, lead + b"RAX=00000000\n" + lines, b"0000000000105100:" + text):
        for form in (None, "qemu-int"):
            with contextlib.suppress(FormatError):
                read_bytes(tmp_path, data, ReaderOptions(from_format=form, discover=False))
        with contextlib.suppress(FormatError):
            qemu_monitor.parse(data, "m")
        with contextlib.suppress(FormatError):
            Symbols.parse(data)
    assert time.monotonic() - start < 10  # a tenth of it is usual; what grows with the square takes minutes


@pytest.mark.parametrize("first", ["     1: v", "1: v=02 ", "RAX=0000000000000001 ", "RSI=0"], ids=["v", "v=", "rax", "rsi"])
def test_a_line_that_is_torn_without_end_is_damaged_once_it_is_longer_than_a_real_one(tmp_path: Path, first: str) -> None:
    begin = event(0, 0x20, 0x1000, 0x9000) + head(1, 3, 0x1000, 0x9000) + tail(3) + "\n"
    if first.startswith("RSI"):
        begin += "RAX=0000000000000001\n"
    text = begin + first + ("x" * 1000 + "Triple fault\n") * 1000 + event(2, 0x20, 0x1000, 0x9000)
    start = time.monotonic()
    trace = read_bytes(tmp_path, text.encode())
    assert time.monotonic() - start < 10
    assert [e.source_index for e in deliveries(trace)][0::2] == [0, 2]
    counts = trace.meta["counts"]
    assert counts["damaged"] >= 1
    assert counts["torn_repaired"] <= 2


def test_lines_that_are_not_understood_are_counted(tmp_path: Path) -> None:
    noise = "this is no log\n\nCPU of some other program\n  and more\n"
    assert read_bytes(tmp_path, ("CPU Reset (CPU 0)\n" + noise * 5).encode()).meta["counts"]["other_lines"] == 15
    plain = event(0, 0x20, 0x1000, 0x9000) + "CPU Reset (CPU 0)\n" + block(0x1000, 0x9000)
    after = "FCW=037f FSW=0000 [ST=0] FTW=00 MXCSR=00001f80\nFPR0=0000000000000000 0000 FPR1=0000000000000000 0000\n"
    for text in (plain, plain + after, "12@1.000001:apic_deliver_irq x\n" + plain):
        assert read_bytes(tmp_path, text.encode()).meta["counts"]["other_lines"] == 0
    for name in ("linux/l2_torn_excerpt.log.gz", "istlab-plugin/a/qemu.log.gz", "kvm-unit-tests/eventinj.log.gz"):
        assert open_input(str(DATA / name)).meta["counts"]["other_lines"] == 0


def converted(log: Path, out: Path) -> bytes:
    """What `tracedbg convert` makes of a log."""
    subprocess.run([sys.executable, "-m", "tracedbg", "convert", str(log), str(out)], check=True, timeout=120)
    return out.read_bytes()


def test_a_trace_says_which_foreign_format_it_was_read_from(tmp_path: Path) -> None:
    log = DATA / "istlab/a/qemu.log"
    assert open_input(str(log)).foreign == "qemu-int"
    native = tmp_path / "a.tdbg"
    converted(log, native)
    packed = tmp_path / "a.tdbg.zst"
    packed.write_bytes(zstandard.compress(native.read_bytes()))
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    feeder = threading.Thread(target=fifo.write_bytes, args=(native.read_bytes(),))
    feeder.start()
    for path in (native, packed, fifo):
        assert open_input(str(path)).foreign is None
    feeder.join()
    for path in (native, packed):
        for form in (None, "tracedbg"):
            with pytest.raises(UsageError, match="--monitor belongs to the log of an emulator"):
                open_input(str(path), from_format=form, options=ReaderOptions(monitor=("mon_01.txt",)))


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/urandom"])
def test_a_device_named_as_a_native_trace_is_refused_at_once(name: str) -> None:
    with pytest.raises(FormatError, match="wrong magic"):
        open_input(name, from_format="tracedbg")


def test_monitor_text_may_be_packed_or_on_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, monitor = DATA / "istlab/a/qemu.log", DATA / "istlab/a/mon_01_start.txt"
    want = open_input(str(log), options=ReaderOptions(monitor=(str(monitor),))).layout
    assert not want.is_empty
    for pack in (gzip.compress, zstandard.compress):
        path = tmp_path / "mon"
        path.write_bytes(pack(monitor.read_bytes()))
        assert open_input(str(log), options=ReaderOptions(monitor=(str(path),))).layout == want
        path.write_bytes(pack(monitor.read_bytes())[:-9])
        with pytest.raises(FormatError, match="cut short"):
            open_input(str(log), options=ReaderOptions(monitor=(str(path),)))
    path.write_bytes(zstandard.compress(b"\n" * (qemu_monitor.MAX_TEXT + 1)))
    with pytest.raises(FormatError, match="too large"):
        open_input(str(log), options=ReaderOptions(monitor=(str(path),)))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(monitor.read_bytes())))
    assert open_input(str(log), options=ReaderOptions(monitor=("-",))).layout == want
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(log.read_bytes())))
    with pytest.raises(UsageError, match="standard input"):
        open_input("-", options=ReaderOptions(monitor=("-",)))


# -- large logs ------------------------------------------------------------------------------------------------------------


def test_every_number_of_the_linux_log_gives_exactly_one_event() -> None:
    trace = open_input(shared("linux/l2/qemu.log.gz"))
    got = deliveries(trace)
    assert [e.source_index for e in got] == list(range(66540))
    assert not any(e.flags for e in got)
    counts = trace.meta["counts"]
    assert (counts["torn_repaired"], counts["torn_lost"], counts["damaged"]) == (23, 0, 0)
    assert Counter(e.source for e in got)[Source.NMI] == 57
    assert [c.tss for c in trace.layout.cpus] == [0, 1]
    assert trace.meta["layout"]["agree"] is True


@pytest.mark.parametrize(
    ("name", "count", "torn"),
    [
        ("istlab/smprace_ud_ipi/qemu.log.gz", 40626, 75),
        ("linux-boot/smp2-stress-pagefaults.log.zst", 53528, 65),
        ("linux-boot/smp1-boot.log.zst", 3509, 0),
        ("xen-boot/smp1-boot.log.zst", 34804, 0),
        ("kvm-unit-tests/vmexit_ipi_halt.log.gz", 32708, 0),
        ("linux/nest_plugin/qemu.log.gz", 43776, 0),
    ],
)
def test_large_logs_are_read_completely(name: str, count: int, torn: int) -> None:
    trace = open_input(shared(name))
    got = deliveries(trace)
    assert [e.source_index for e in got] == list(range(count))
    assert not any(e.flags for e in got)
    assert trace.meta["counts"]["torn_repaired"] == torn
    assert trace.meta["counts"]["torn_lost"] == trace.meta["counts"]["damaged"] == 0


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    log = DATA / "istlab/a/qemu.log"
    first, second = (converted(log, tmp_path / f"{n}.tdbg") for n in range(2))
    assert first == second
    assert str(DATA).encode() not in first and first.startswith(wire.MAGIC)


def test_a_given_layout_numbers_the_cpus() -> None:
    """The CPU of a log is the one whose TSS the layout gives it, not the first that the log shows."""
    layout = layout_of_dump(DATA / "linux-nested/smp1-nest_nmi_masked.dump.json.gz")
    tss = layout.tss[0]
    two = replace(layout, tss=(replace(tss, base=0x1000), tss), cpus=(CpuTables(0, 0), CpuTables(1, 0)), regions=())
    path = DATA / "linux-nested/smp1-nest_nmi_masked.log.gz"
    with open_input(str(path), options=ReaderOptions(layout=two)) as trace:
        delivered = [e for e in map(trace.event, range(trace.count)) if e.kind is Kind.DELIVER]
        assert {e.cpu for e in delivered} == {1} and trace.cpus == 2
