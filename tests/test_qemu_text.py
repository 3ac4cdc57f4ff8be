"""The text of QEMU logs: CPUs, torn lines, numbers, failed deliveries."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

from qemutext import DATA, block, deliveries, event, events, head, read_bytes, tail

from tracedbg.formats import ReaderOptions, open_input, open_inputs
from tracedbg.formats.qemu import text as qemu_text
from tracedbg.state import EventFlag, Kind, Known

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


def test_chunks_of_any_size_give_the_same_items() -> None:
    text = gzip.decompress((DATA / "linux/nest_plugin_excerpt.log.gz").read_bytes())[:120000].replace(b"\n", b"\r\n")

    def items(size: int) -> list[Any]:
        reader = qemu_text.LogText()
        return [i for b in reader.items(text[n : n + size] for n in range(0, len(text), size)) for i in b]

    want = items(len(text))
    assert len(want) > 300
    for size in (1009, 8191, 16384, 50000):
        assert items(size) == want


def test_other_lines_in_between_change_nothing(tmp_path: Path) -> None:
    plain = (DATA / "istlab/a/qemu.log").read_bytes()
    other = b"----------------\nIN: \n0x00100bab:  48 89 c3                 movq     %rax, %rbx\n\nTrace 0: 0x7f0 [0/1/2/3]\n"
    mixed = plain.replace(b"     1: v=", other + b"     1: v=").replace(b"CPU Reset", other + b"CPU Reset")
    assert bytes(read_bytes(tmp_path, other * 3 + mixed).events) == bytes(read_bytes(tmp_path, plain).events)


def test_lines_that_are_not_understood_are_counted(tmp_path: Path) -> None:
    noise = "this is no log\n\nCPU of some other program\n  and more\n"
    assert read_bytes(tmp_path, ("CPU Reset (CPU 0)\n" + noise * 5).encode()).meta["counts"]["other_lines"] == 15
    plain = event(0, 0x20, 0x1000, 0x9000) + "CPU Reset (CPU 0)\n" + block(0x1000, 0x9000)
    after = "FCW=037f FSW=0000 [ST=0] FTW=00 MXCSR=00001f80\nFPR0=0000000000000000 0000 FPR1=0000000000000000 0000\n"
    for text in (plain, plain + after, "12@1.000001:apic_deliver_irq x\n" + plain):
        assert read_bytes(tmp_path, text.encode()).meta["counts"]["other_lines"] == 0
    for name in ("linux/l2_torn_excerpt.log.gz", "istlab-plugin/a/qemu.log.gz", "kvm-unit-tests/eventinj.log.gz"):
        assert open_input(str(DATA / name)).meta["counts"]["other_lines"] == 0
