"""What lines of trace events, stamps and 32-bit registers add to a QEMU log: known answers read off the logs' text by eye."""

from __future__ import annotations

import datetime
import gzip
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import CompletedText
from qemutext import DATA, block, deliveries, event, events, head, read_bytes, tail
from test_qemu_scan import ordinary, stamped

from tracedbg.formats import open_input
from tracedbg.formats.qemu.requests import Requests
from tracedbg.state import EventFlag, Kind, Known, Source

TRACED = DATA / "traced"


def sources(name: str) -> list[tuple[int, Source]]:
    return [(e.arg, e.source) for e in deliveries(open_input(str(TRACED / name)))]


# -- who asked --------------------------------------------------------------------------------------------------------


def test_vector_2_of_the_8259_is_an_extint_and_the_nmi_of_lint1_an_nmi() -> None:
    trace = open_input(str(TRACED / "b_pic.log.gz"))
    assert [(e.arg, e.source) for e in deliveries(trace)] == [(2, Source.EXTINT), (2, Source.NMI)]
    assert trace.meta["counts"]["nmi_lint1"] == 1
    assert "8259" in trace.meta["fidelity"]["source"]


def test_vector_18_that_the_icr_asked_for_is_fixed_and_the_other_a_machine_check() -> None:
    assert sources("c_lapic.log.gz") == [(18, Source.FIXED), (18, Source.MC)]


def test_ipis_of_two_cpus_are_fixed_and_each_nmi_was_asked_for() -> None:
    assert Counter(sources("smp2.log.gz")) == {
        (2, Source.NMI): 10, (3, Source.SOFT_INT): 13, (0x21, Source.FIXED): 7, (0x22, Source.FIXED): 2,
    }  # fmt: skip
    trace = open_input(str(TRACED / "smp2.log.gz"))
    assert trace.meta["counts"]["nmi_ipi"] == 10
    assert trace.meta["counts"]["other_lines"] == 0


def test_in_the_linux_log_the_vectors_of_icr_writes_are_fixed_and_the_timer_is_not_known() -> None:
    trace = open_input(str(DATA / "linux-boot/smp2-int+apic-trace-timestamps.log.gz"))
    assert Counter((e.arg, e.source) for e in deliveries(trace)) == {
        (2, Source.NMI): 1, (18, Source.MC): 2, (0xEC, Source.EXTERNAL): 13,
        (0xF6, Source.FIXED): 2, (0xFB, Source.FIXED): 1, (0xFD, Source.FIXED): 1,
    }  # fmt: skip
    assert trace.meta["counts"]["nmi_lint1"] == 2  # one line a CPU, whether its LINT1 is masked or not


@pytest.mark.parametrize("stamp", [b"", b"17@1795420394.580250:"])
def test_trace_lines_are_read_with_and_without_a_stamp(stamp: bytes, tmp_path: Path) -> None:
    text = gzip.decompress((TRACED / "b_pic.log.gz").read_bytes())
    lines = [stamp + line.split(b":", 1)[1] if b"@" in line else line for line in text.split(b"\n")]
    trace = read_bytes(tmp_path, b"\n".join(lines))
    assert [e.source for e in deliveries(trace)] == [Source.EXTINT, Source.NMI]
    assert bool(trace.clock_hz) == bool(stamp)
    assert trace.meta["counts"]["other_lines"] == 0


def test_without_trace_lines_nothing_is_said_of_lapic_and_8259() -> None:
    requests = Requests()
    assert requests.serviced(2, False) == Source.EXTERNAL
    assert not requests.told


def test_a_message_or_an_lvt_entry_tells_the_lapic() -> None:
    requests = Requests()
    requests.line(b"apic_deliver_irq dest 1 dest_mode 0 delivery_mode 1 vector 2 trigger_mode 0")
    assert requests.serviced(2, False) == Source.FIXED
    requests.line(b"apic_local_deliver vector 0 delivery mode 0")  # of an entry that nobody saw written
    assert requests.serviced(0xEC, False) == Source.EXTERNAL
    requests.line(b"apic_mem_writel 0x320 = 0x000200ec")
    assert requests.serviced(0xEC, False) == Source.EXTERNAL  # written, but it has not fired since
    requests.line(b"apic_local_deliver vector 0 delivery mode 0")
    assert requests.serviced(0xEC, False) == Source.FIXED
    assert requests.told


def test_registers_of_later_versions_are_read_too() -> None:
    requests = Requests()
    requests.line(b"apic_register_write register 0x30 = 0x100004012")
    requests.line(b"apic_register_write register 0x30 = 0x4400")
    assert requests.serviced(0x12, False) == Source.FIXED
    assert requests.asked == {"ipi": 1}


def test_what_the_8259_may_have_sent_is_external() -> None:
    """Without pic_interrupt: the vector that comes after its request may be its own, or one of the LAPIC before it."""
    requests = Requests()
    requests.line(b"apic_mem_writel 0x300 = 0x00004030")
    requests.line(b"apic_local_deliver vector 3 delivery mode 7")
    assert not requests.calm
    assert requests.serviced(0x30, False) == Source.EXTERNAL
    assert requests.serviced(8, False) == Source.EXTERNAL  # the LAPIC was not asked for it: the 8259 has been served
    assert requests.serviced(0x30, False) == Source.FIXED


def test_where_acknowledgements_are_traced_all_else_is_of_the_lapic() -> None:
    requests = Requests()
    requests.line(b"pic_interrupt irq 0 intno 8")
    assert requests.serviced(0x20, False) == Source.FIXED
    assert requests.serviced(8, False) == Source.EXTINT
    assert requests.serviced(8, False) == Source.FIXED
    assert requests.serviced(8, True) == Source.INJECTED


def test_requests_for_nmis_are_counted_by_way() -> None:
    requests = Requests()
    requests.line(b"apic_local_deliver vector 4 delivery mode 4")
    requests.line(b"apic_local_deliver vector 2 delivery mode 4")  # performance counters
    requests.line(b"apic_deliver_irq dest 255 dest_mode 0 delivery_mode 4 vector 0 trigger_mode 0")
    requests.line(b"apic_mem_writel 0x300 = 0x000c4400")
    assert requests.asked == {"lint1": 1, "lvt": 1, "message": 1, "ipi": 1}
    assert requests.serviced(0, False) == Source.EXTERNAL


@pytest.mark.parametrize("line", [b"", b"apic_local_deliver vector 9 delivery mode 4", b"pic_interrupt irq x", b"apic_deliver"])
def test_damaged_trace_lines_say_nothing(line: bytes) -> None:
    requests = Requests()
    requests.line(line)
    assert requests.calm and not requests.asked and set(requests.served) == {Source.EXTERNAL}


def test_the_finding_names_the_8259(run_cli: Callable[..., CompletedText]) -> None:
    monitor = DATA / "istlab/b_pic/mon_01_start.txt"
    said = run_cli("replay", TRACED / "b_pic.log.gz", "--monitor", monitor, code=0).stdout
    assert "fake-nmi" in said and "8259" in said


# -- times ------------------------------------------------------------------------------------------------------------


def test_the_time_of_an_event_is_that_of_the_last_trace_line() -> None:
    trace = open_input(str(TRACED / "c_lapic.log.gz"))
    assert trace.clock_hz == 1_000_000
    assert deliveries(trace)[0].time == 1795421227_995610
    trace = open_input(str(TRACED / "b_pic.log.gz"))
    assert [e.time for e in deliveries(trace)] == [1795421226_874387, 1795421226_937403]
    assert "trace line" in trace.meta["fidelity"]["time"]


def test_trace_lines_give_the_time_of_the_linux_log() -> None:
    trace = open_input(str(DATA / "linux-boot/smp2-int+apic-trace-timestamps.log.gz"))
    times = [e.time for e in deliveries(trace) if e.known & Known.TIME]
    assert len(times) == 20
    assert times == sorted(times)
    assert (times[0], times[-1] // 1_000_000) == (1795344787_269879, 1795344788)


def test_before_the_first_stamp_no_time_is_known(tmp_path: Path) -> None:
    text = event(0, 2, 0x1000, 0x9000) + "9@5.000007:apic_mem_readl 0x20 = 0\n" + event(1, 2, 0x1000, 0x9000)
    got = deliveries(read_bytes(tmp_path, text.encode()))
    assert [(bool(e.known & Known.TIME), e.time) for e in got] == [(False, 0), (True, 5_000_007)]


def test_a_clock_that_was_set_back_does_not_take_the_events_along(tmp_path: Path) -> None:
    text = "".join(f"9@{at}.000000:x y\n" + event(n, 2, 0x1000, 0x9000) for n, at in enumerate((10, 7, 12)))
    got = deliveries(read_bytes(tmp_path, text.encode()))
    assert [e.time for e in got] == [10_000_000, 10_000_000, 12_000_000]


def test_iso_stamps_in_every_piece_are_the_time_of_their_line(tmp_path: Path) -> None:
    plain = read_bytes(tmp_path, ordinary().encode())
    text = stamped(ordinary())
    trace = read_bytes(tmp_path, text.encode())
    bare = [e for e in events(plain) if e.kind == Kind.DELIVER]
    want = []
    for line in text.split("\n"):
        if ": v=" in line:
            at = datetime.datetime.fromisoformat(line.split()[0])
            want.append(round(at.timestamp() * 1_000_000))
    got = deliveries(trace)
    assert [e.time for e in got] == want
    assert all(e.known & Known.TIME for e in got)
    assert [(e.arg, e.source, e.rip, e.rsp, e.cpu, e.value, e.flags) for e in got] == [
        (e.arg, e.source, e.rip, e.rsp, e.cpu, e.value, e.flags) for e in bare
    ]
    assert trace.clock_hz == 1_000_000
    assert "v= line" in trace.meta["fidelity"]["time"]
    assert trace.meta["counts"]["other_lines"] == 0 == trace.meta["counts"]["torn_repaired"]


def test_a_stamped_line_that_is_torn_is_put_together(tmp_path: Path) -> None:
    stamp = "2026-02-28T23:59:59.999999Z "
    text = (
        stamp + event(0, 0x20, 0x1000, 0x9000)
        + stamp + head(1, 14, 0x2000, 0x9000) + stamp + "check_exception old: 0xffffffff new 0xd\n"
        + stamp + tail(14, 0x7000) + stamp + "\n" + block(0x2000, 0x9000, 0x7000)
        + "2026-03-01T00:00:00Z " + event(2, 0x20, 0x1000, 0x9000)
    )  # fmt: skip
    trace = read_bytes(tmp_path, text.encode())
    got = deliveries(trace)
    assert [(e.arg, e.value, e.flags) for e in got] == [(0x20, 0, 0), (14, 0x7000, 0), (0x20, 0, 0)]
    assert got[2].time - got[1].time == 1
    assert got[2].time == int(datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC).timestamp()) * 1_000_000


@pytest.mark.parametrize("stamp", ["2026-13-01T00:00:00Z ", "2026-00-10T00:00:00Z ", "2026-01-01T24:00:00Z ", "20260101T0000Z "])
def test_what_is_no_date_is_no_stamp(stamp: str, tmp_path: Path) -> None:
    trace = read_bytes(tmp_path, (event(0, 2, 0x1000, 0x9000) + stamp + event(1, 2, 0x1000, 0x9000)).encode())
    assert trace.clock_hz == 0
    assert len(deliveries(trace)) == 2


# -- 32-bit guests ----------------------------------------------------------------------------------------------------


def test_the_log_of_qemu_system_i386_has_addresses_of_8_digits() -> None:
    trace = open_input(str(DATA / "i386/boot.log.gz"))
    got = [(e.source_index, e.arg, e.rip, e.rsp, e.value, e.code) for e in deliveries(trace)]
    assert got == [(0, 14, 0x1000E3, 0x11D000, 0x80010011, 0), (1, 8, 0x1000E3, 0x11D000, 0, 0)]
    assert all(e.flags == EventFlag.LEGACY | EventFlag.FAILED for e in deliveries(trace))
    last = events(trace)[-1]
    assert (last.kind, last.arg, last.cpu) == (Kind.SHUTDOWN, 0, 0)
    counts = trace.meta["counts"]
    assert counts["damaged"] == counts["other_lines"] == 0


@pytest.mark.parametrize(
    ("name", "notes"),
    [
        ("kvm-unit-tests/i386_eventinj.log.gz", ("not judged: 29 deliveries outside of long mode", "no delivery could be")),
        ("kvm-unit-tests/realmode.log.gz", ("there is no delivery to judge",)),
    ],
)
def test_replay_says_that_nothing_can_be_judged(name: str, notes: tuple[str, ...], run_cli: Callable[..., CompletedText]) -> None:
    said = run_cli("replay", DATA / name, code=0).stdout
    assert "layout: none, and none is needed: no delivery is in long mode" in said
    assert all(note in said for note in notes)
    assert "cannot be placed" not in said


def test_info_says_how_much_is_in_32_bit_mode(tmp_path: Path, run_cli: Callable[..., CompletedText]) -> None:
    said = run_cli("info", DATA / "kvm-unit-tests/i386_eventinj.log.gz", code=0).stdout
    assert "mode: all deliveries are in 32-bit mode: counted, not judged" in said
    legacy = gzip.decompress((DATA / "i386/boot.log.gz").read_bytes()).decode()
    legacy = legacy[legacy.index("     0: v=") :]
    mixed = legacy[: legacy.index("check_exception")] + event(1, 2, 0x1000, 0x9000) + event(2, 2, 0x1004, 0x9000)
    (tmp_path / "mixed.log").write_text(mixed)
    said = run_cli("info", tmp_path / "mixed.log", code=0).stdout
    assert "mode: 1 of 3 deliveries are in 32-bit mode: counted, not judged" in said
    assert "frames cannot be placed" in said


def test_32_bit_code_of_a_64_bit_system_is_of_the_cpu_with_that_half_of_tr(tmp_path: Path) -> None:
    base = 0xFFFFFE0000003000
    wide = event(0, 2, 0x1000, 0x9000, tr=base)
    narrow = (
        head(1, 2, 0x1000, 0x9000, cs=0x23) + tail(2) + "\n"
        "EAX=00000000 EBX=00000000 ECX=00000000 EDX=00000000\nESI=00000000 EDI=00000000 EBP=00000000 ESP=00009000\n"
        "EIP=00001000 EFL=00000202 [-------] CPL=3 II=0 A20=1 SMM=0 HLT=0\n"
        + "".join(f"{name}S =0010 00000000 ffffffff 00cf9300 DPL=0 DS   [-WA]\n" for name in "ECSDFG")
        + "LDT=0000 00000000 0000ffff 00008200 DPL=0 LDT\nTR =0040 00003000 00004087 00008900 DPL=0 TSS64-avl\n"
        "GDT=     0000000000105000 0000007f\nIDT=     0000000000106000 00000fff\n"
        "CR0=80050033 CR2=0000000000000000 CR3=0000000000113000 CR4=00000060\n"
        "DR0=0000000000000000 DR1=0000000000000000 DR2=0000000000000000 DR3=0000000000000000 \n"
        "DR6=00000000ffff0ff0 DR7=0000000000000400\nCCS=00000000 CCD=00000001 CCO=LOGICL\nEFER=0000000000000501\n"
    )  # fmt: skip
    more = "".join(narrow.replace("     1:", f"{n:6d}:", 1) for n in range(2, 5))
    trace = read_bytes(tmp_path, (wide + narrow + more).encode())
    assert [(e.cpu, e.rip, e.rflags, e.flags) for e in deliveries(trace)][1:] == [(0, 0x1000, 0x202, 0)] * 4
    assert [e.value for e in events(trace) if e.kind == Kind.LTR] == [base]
