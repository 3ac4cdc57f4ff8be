"""QEMU logs into events: known answers read off the logs' text by eye."""

from __future__ import annotations

import gzip
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from dumpjson import layout_of_dump
from qemutext import DATA, deliveries, events, scenario

from tracedbg.errors import FormatError
from tracedbg.formats import ReaderOptions, open_input
from tracedbg.layout import REGION_STORES, REGION_USER, CpuTables, Fidelity, from_toml
from tracedbg.state import EventFlag, Kind, Known, Source

SHARED = Path(os.environ.get("TRACEDBG_DATA") or Path(__file__).parents[2] / "shared" / "data") / "qemu"


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


def test_a_given_layout_numbers_the_cpus() -> None:
    """The CPU of a log is the one whose TSS the layout gives it, not the first that the log shows."""
    layout = layout_of_dump(DATA / "linux-nested/smp1-nest_nmi_masked.dump.json.gz")
    tss = layout.tss[0]
    two = replace(layout, tss=(replace(tss, base=0x1000), tss), cpus=(CpuTables(0, 0), CpuTables(1, 0)), regions=())
    path = DATA / "linux-nested/smp1-nest_nmi_masked.log.gz"
    with open_input(str(path), options=ReaderOptions(layout=two)) as trace:
        delivered = [e for e in map(trace.event, range(trace.count)) if e.kind is Kind.DELIVER]
        assert {e.cpu for e in delivered} == {1} and trace.cpus == 2


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
