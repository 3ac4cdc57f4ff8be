"""What Intel PT streams mean: the scenarios of libipt's tests (test/src/ptet*.ptt), built from packets, and what it says of them.

libipt tests the same packets with a disassembler. Here the events are expected, and the addresses that the packets give them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pt_asm import OVF, PSB, PSBEND, STOP, cfe, cyc, evd, fup, mode, mtc, pgd, pge, pip, psbp, tip, tma, tnt, tsc

from tracedbg.formats.pt.stream import Clock, Stream, Texts
from tracedbg.state import EventFlag, Kind, Known
from tracedbg.trace import Event, Trace
from tracedbg.writer import TraceWriter, build

INTR, IRET, SMI, RSM, SIPI, INIT, VMENTRY, VMEXIT, VMEXIT_INTR, SHUTDOWN = range(1, 11)
UINTR, UIRET, SWINTR, SYSCALL = 12, 13, 14, 15
CR2, QUALIFICATION, REASON = 0, 1, 2
L = [0x100000 + 16 * n for n in range(20)]  # labels, so that two bytes of an address are enough after the first
ON = psbp(L[0], iflag=True)  # a PSB+ inside of the filters, with branches
OFF = psbp(iflag=True)  # one without branches, or outside of the filters


def trace_of(data: bytes, *, events: bool = False, clock: Clock | None = None, step: int = 1 << 20) -> tuple[Trace, Stream]:
    made: list[Stream] = []

    def fill(writer: TraceWriter) -> None:
        stream = Stream(Texts(writer), 0, events=events, clock=clock)
        made.append(stream)
        for at in range(0, len(data), step):
            for rows in stream.feed(data[at : at + step]):
                writer.append(rows)
        for rows in stream.feed(b"", last=True):
            writer.append(rows)

    return build(fill), made[0]


def words(trace: Trace, event: Event) -> str:
    """One event in one line: all that is known of it but time, CPU and offset."""
    out = [event.kind.name.lower()]
    if event.flags & EventFlag.BYTES:
        out.append(repr(bytes(trace.payload[event.value : event.value + event.code]).decode()))
        return " ".join(out) + (f" rip={label(event.rip)}" if event.known & Known.RIP else "")
    if event.known & Known.ARG:
        out.append(f"{event.arg:#x}")
    if event.known & Known.SOURCE:
        out.append(event.source.name.lower())
    for name, bit in (("code", Known.CODE), ("rip", Known.RIP), ("addr", Known.ADDR), ("value", Known.VALUE)):
        if event.known & bit:
            value = getattr(event, name)
            out.append(f"{name}={label(value) if name in ('rip', 'addr') else hex(value)}")
    assert not event.known & (Known.RSP | Known.CS | Known.SS | Known.RFLAGS) and not event.flags
    return " ".join(out)


def label(ip: int) -> str:
    return f"l{L.index(ip)}" if ip in L else hex(ip)


def told(data: bytes, **options: object) -> list[str]:
    trace, _ = trace_of(data, **options)  # type: ignore[arg-type]
    expected = [words(trace, trace.event(n)) for n in range(trace.count)]
    for step in (1, 3, 16):  # however the bytes come
        again, _ = trace_of(data, step=step, **options)  # type: ignore[arg-type]
        assert bytes(again.events) == bytes(trace.events)
    return expected


def test_ptet() -> None:
    # No branches: every event stands alone, or has an address of its own.
    data = (
        OFF + mode(cs_l=False, cs_d=True) + fup(L[0]) + mode(iflag=True) + fup(L[1], 1)
        + evd(CR2, 0xF00BAA) + cfe(INTR, 14, ip=True) + fup(L[2], 1) + cfe(IRET) + cfe(INTR, 0x80)
        + cfe(IRET, ip=True) + fup(L[3], 1) + cfe(SMI, ip=True) + fup(L[4], 1) + cfe(RSM)
        + cfe(INIT, ip=True) + fup(L[5], 1) + cfe(SIPI, 0xCE)
        + evd(QUALIFICATION, 0xF00BAA) + evd(REASON, 0) + cfe(VMEXIT_INTR, 14, ip=True) + fup(L[6], 1)
        + cfe(VMENTRY, ip=True) + fup(L[6], 1) + evd(REASON, 10) + cfe(VMEXIT, ip=True) + fup(L[7], 1)
        + cfe(VMENTRY, ip=True) + fup(L[8], 1) + cfe(SHUTDOWN, ip=True) + fup(L[9], 1)
        + cfe(UINTR, 4, ip=True) + fup(L[10], 1) + cfe(UIRET, ip=True) + fup(L[11], 1)
        + evd(31, 0) + cfe(INTR, 128, ip=True) + fup(L[12], 1)
        + evd(31, 0) + evd(QUALIFICATION, 0xF00) + evd(31, 0) + evd(REASON, 0xBAA) + evd(31, 0)
        + cfe(VMEXIT_INTR, 14, ip=True) + fup(L[13], 1) + cfe(31, ip=True) + fup(L[14], 1) + cfe(31)
        + cfe(SWINTR, 3, ip=True) + fup(L[15], 1) + cfe(SYSCALL, ip=True) + fup(L[16], 1)
    )  # fmt: skip
    assert told(data) == [
        "flags 0x0 rip=l0", "flags 0x1 rip=l1",
        "deliver 0xe exception rip=l2 value=0xf00baa", "return", "deliver 0x80", "return rip=l3",
        "smi rip=l4", "rsm", "init 0x1 rip=l5", "mark 'SIPI, start at 0xce000'",
        "vmexit 0x0 code=0x0 addr=l6 value=0xf00baa", "mark 'VM exit for vector 14'", "vmentry rip=l6",
        "vmexit 0x0 code=0xa addr=l7", "vmentry rip=l8", "shutdown rip=l9",
        "mark 'user interrupt 4' rip=l10", "mark 'UIRET' rip=l11", "deliver 0x80 rip=l12",
        "vmexit 0x0 code=0xbaa addr=l13 value=0xf00", "mark 'VM exit for vector 14'",
        "mark 'control-flow event of type 31, not known here' rip=l14", "mark 'control-flow event of type 31, not known here'",
        "deliver 0x3 soft_int rip=l15", "deliver syscall rip=l16",
    ]  # fmt: skip


INT = evd(CR2, 0xF00BAA) + cfe(INTR, 14)


@pytest.mark.parametrize("name", ["int-iret", "int-eretu"])
def test_ptet_interrupt_and_return(name: str) -> None:
    # The TIP of a delivery is its handler, that of a return where it returned to. ERETU has no event type of its own.
    data = (
        ON + INT + fup(L[1], 1) + tip(L[5]) + cfe(IRET) + tip(L[1])
        + cfe(SWINTR, 0x80) + fup(L[2], 1) + tip(L[7]) + cfe(IRET) + tip(L[3]) + fup(L[4], 1) + pgd(L[4])
    )  # fmt: skip
    assert told(data) == [
        "deliver 0xe exception rip=l1 value=0xf00baa", "enter rip=l5", "return addr=l1",
        "deliver 0x80 soft_int rip=l2", "enter rip=l7", "return addr=l3",
    ]  # fmt: skip


def test_ptet_nested_returns() -> None:  # int-int-erets-eretu
    data = (
        ON + cfe(SWINTR, 42) + fup(L[1], 1) + tip(L[4]) + INT + fup(L[4], 1) + tip(L[7])
        + cfe(IRET) + tip(L[4]) + cfe(IRET) + tip(L[2]) + fup(L[3], 1) + pgd(L[3])
    )  # fmt: skip
    assert told(data) == [
        "deliver 0x2a soft_int rip=l1", "enter rip=l4", "deliver 0xe exception rip=l4 value=0xf00baa", "enter rip=l7",
        "return addr=l4", "return addr=l2",
    ]  # fmt: skip


def test_ptet_kernel_alone() -> None:  # int-iret-cpl_0
    data = (
        OFF + INT + pge(L[5]) + cfe(IRET, ip=True) + fup(L[5], 1) + pgd(L[1])
        + cfe(SWINTR, 0x80) + pge(L[7]) + cfe(IRET, ip=True) + fup(L[7], 1) + pgd(L[3])
    )  # fmt: skip
    assert told(data) == [
        "deliver 0xe exception value=0xf00baa", "enter rip=l5", "return rip=l5",
        "deliver 0x80 soft_int", "enter rip=l7", "return rip=l7",
    ]  # fmt: skip


def test_ptet_user_alone() -> None:  # int-iret-cpl_3
    data = (
        ON + INT + fup(L[1], 1) + pgd(L[1]) + cfe(IRET) + pge(L[1])
        + cfe(SWINTR, 0x80) + fup(L[2], 1) + pgd(L[2]) + cfe(IRET) + pge(L[3]) + fup(L[4], 1) + pgd(L[4])
    )  # fmt: skip
    assert told(data) == [
        "deliver 0xe exception rip=l1 value=0xf00baa", "return addr=l1", "deliver 0x80 soft_int rip=l2", "return addr=l3",
    ]  # fmt: skip


def test_ptet_init_sipi() -> None:
    data = ON + cfe(INIT) + fup(L[1], 1) + pgd(L[1]) + cfe(SIPI, 0xCE) + pge(L[2]) + fup(L[3], 1) + pgd(L[3])
    assert told(data) == ["init 0x1 rip=l1", "mark 'SIPI, start at 0xce000'"]


def test_ptet_smi_rsm() -> None:
    data = ON + cfe(SMI) + fup(L[1], 1) + pgd(L[1]) + cfe(RSM) + pge(L[1]) + fup(L[2], 1) + pgd(L[2])
    assert told(data) == ["smi rip=l1", "rsm"]


def test_ptet_user_interrupts() -> None:  # uint-uiret
    data = (
        ON + cfe(UINTR, 4) + fup(L[1], 1) + tip(L[5]) + cfe(UIRET, ip=True) + fup(L[5], 1) + tip(L[1])
        + cfe(UINTR, 5) + fup(L[2], 1) + tip(L[7]) + cfe(UIRET) + tip(L[3]) + fup(L[4], 1) + pgd(L[4])
    )  # fmt: skip
    assert told(data) == [
        "mark 'user interrupt 4' rip=l1", "mark 'UIRET' rip=l5", "mark 'user interrupt 5' rip=l2", "mark 'UIRET'",
    ]  # fmt: skip


EXIT1 = evd(QUALIFICATION, 0xF00BAA) + evd(REASON, 0) + cfe(VMEXIT_INTR, 14)
EXIT2 = evd(REASON, 10) + cfe(VMEXIT)


def test_ptet_host_and_guest() -> None:  # vmexit-vmentry
    data = (
        ON + EXIT1 + fup(L[1], 1) + pip(0xF00) + tip(L[5]) + cfe(VMENTRY, ip=True) + fup(L[5], 1) + pip(0xB00, nonroot=True)
        + tip(L[1]) + EXIT2 + fup(L[2], 1) + pip(0xF00) + tip(L[7])
        + cfe(VMENTRY, ip=True) + fup(L[7], 1) + pip(0xB00, nonroot=True) + tip(L[3]) + fup(L[4], 1) + pgd(L[4])
    )  # fmt: skip
    assert told(data) == [
        "vmexit 0x0 code=0x0 rip=l5 addr=l1 value=0xf00baa", "mark 'VM exit for vector 14'", "vmentry rip=l5 addr=l1",
        "vmexit 0x0 code=0xa rip=l7 addr=l2", "vmentry rip=l7 addr=l3",
    ]  # fmt: skip


def test_ptet_guest_alone() -> None:  # vmexit-vmentry-nonroot
    data = (
        ON + EXIT1 + fup(L[1], 1) + pgd(L[5]) + cfe(VMENTRY) + pge(L[1])
        + EXIT2 + fup(L[2], 1) + pgd(L[7]) + cfe(VMENTRY) + pge(L[3]) + fup(L[4], 1) + pgd(L[4])
    )  # fmt: skip
    assert told(data) == [
        "vmexit 0x0 code=0x0 addr=l1 value=0xf00baa", "mark 'VM exit for vector 14'", "vmentry addr=l1",
        "vmexit 0x0 code=0xa addr=l2", "vmentry addr=l3",
    ]  # fmt: skip


def test_ptet_host_alone() -> None:  # vmexit-vmentry-root
    data = OFF + EXIT1 + pge(L[5]) + cfe(VMENTRY) + pgd(L[1]) + pge(L[7]) + cfe(VMENTRY) + pgd(L[3])
    assert told(data) == [
        "vmexit 0x0 code=0x0 rip=l5 value=0xf00baa", "mark 'VM exit for vector 14'", "vmentry", "vmentry",
    ]  # fmt: skip


def test_ptet_interrupt_flag() -> None:  # mode_exec-if
    data = (
        PSB + PSBEND + mode() + pge(L[0]) + mode(iflag=True) + fup(L[2], 1) + mode() + fup(L[4], 1) + fup(L[4], 1) + pgd(L[4])
    )
    assert told(data, events=True) == ["flags 0x0 rip=l0", "flags 0x1 rip=l2", "flags 0x0 rip=l4"]
    # Without Event Trace the bit means nothing; that this is one is known from the second on: nothing else has a FUP.
    assert told(data) == ["flags 0x1 rip=l2", "flags 0x0 rip=l4"]


@pytest.mark.parametrize("events", [False, True])
def test_ptet_flag_that_did_not_change(events: bool) -> None:  # mode_exec-spurious
    data = (
        PSB + mode() + PSBEND + mode() + pge(L[0]) + mode() + fup(L[2], 1) + mode() + tip(L[4], 1) + fup(L[5], 1) + pgd(L[5])
    )
    assert told(data, events=events) == []


WRONG = [
    (evd(CR2, 0xF00), cfe(IRET)), (evd(CR2, 0xF00), evd(QUALIFICATION, 0)), (evd(QUALIFICATION, 0), cfe(INTR, 14)),
    (evd(REASON, 0), cfe(RSM)), (evd(REASON, 0), evd(CR2, 0xF00)),
    # And those that libipt's decoder refuses, but its tests leave out.
    (evd(CR2, 1), evd(CR2, 1)), (evd(REASON, 1), evd(REASON, 1)), (evd(CR2, 1), cfe(VMEXIT)), (evd(CR2, 1), cfe(SWINTR, 14)),
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_ptet_event_data_of_another_event(wrong: tuple[bytes, bytes]) -> None:
    before = ON + b"\x00" * 3
    data = before + b"".join(wrong) + fup(L[1], 1) + pgd(L[1]) + OFF + cfe(RSM)
    assert told(data) == ["gap", "rsm"]
    _, stream = trace_of(data)
    assert stream.damage == [
        f"at {len(before) + len(wrong[0]):#x}: an EVD that does not belong to what follows; read on at the next PSB"
    ]
    assert stream.counts["bytes_skipped"] == len(wrong[1]) + 3 + 1


# -- addresses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "ip", "is_"),
    [
        (1, 0x1234, 0xFFFF_8123_4567_1234), (2, 0x9ABCDEF0, 0xFFFF_8123_9ABC_DEF0), (3, 0x8000_0000_0001, 0xFFFF_8000_0000_0001),
        (3, 0x7FFF_FFFF_FFFF, 0x7FFF_FFFF_FFFF), (4, 0x1234_5678_9ABC, 0xFFFF_1234_5678_9ABC),
        (6, 0x1122_3344_5566_7788, 0x1122_3344_5566_7788),
    ],
)  # fmt: skip
@pytest.mark.parametrize("base", [tip, fup, pge, pgd])
def test_addresses_are_unpacked(how: int, ip: int, is_: int, base: object) -> None:
    assert callable(base)
    for between in (b"", tnt(1, 0), tip(0, 0)):
        data = ON + base(0xFFFF_8123_4567_89AB, 6) + between + b"\x00" * 12 + cfe(SMI, ip=True) + fup(ip, how)
        assert told(data) == [f"smi rip={is_:#x}"]


def test_the_last_address_is_gone_after_an_overflow() -> None:
    # What the first packets behind it are packed against is not agreed on (libipt: 0): such an address is not known.
    smi = cfe(SMI, ip=True)
    data = ON + cfe(RSM) + OVF + smi + fup(L[1], 1) + smi + fup(L[2]) + smi + fup(L[3], 1)
    assert told(data) == ["rsm", "gap", "smi", "smi rip=l2", "smi rip=l3"]


def test_an_address_that_is_left_out_is_unknown() -> None:
    assert told(ON + cfe(SMI, ip=True) + fup(0, 0) + cfe(INTR, 33, ip=True) + fup(0, 0) + tip(0, 0)) == ["smi", "deliver 0x21"]


# -- binding ------------------------------------------------------------------------------------------------------------


def test_an_address_is_bound_while_tracing_is_on_only() -> None:
    # The same two packets: with branches they belong together, without the FUP is that of the flag.
    pair = cfe(INTR, 0xEC) + mode() + fup(L[1])
    assert told(OFF + pair) == ["deliver 0xec", "flags 0x0 rip=l1"]
    data = ON + cfe(INTR, 0xEC) + fup(L[1]) + mode() + tip(L[2])
    assert told(data) == ["deliver 0xec rip=l1", "enter rip=l2", "flags 0x0 rip=l2"]


def test_clocks_do_not_part_what_belongs_together() -> None:
    some = b"\x00" + cyc(300) + mtc(7) + cyc(3)
    data = ON + cfe(INTR, 0xEC) + some + fup(L[1], 1) + some + pip(0x1000) + tip(L[2], 1)
    assert told(data) == ["deliver 0xec rip=l1", "enter rip=l2"]


@pytest.mark.parametrize("other", [tnt(1), cfe(RSM), evd(REASON, 1), fup(L[9]), PSB, OVF, STOP, pgd(), b"\x02\x62"])
def test_a_branch_later_is_not_the_return(other: bytes) -> None:
    assert told(ON + cfe(IRET, ip=True) + fup(L[3], 1) + other + pge(L[4]))[0] == "return rip=l3"


def test_an_event_whose_address_does_not_come() -> None:
    for end in (cfe(RSM), PSB + PSBEND, OVF, STOP, b""):
        data = ON + cfe(INTR, 3, ip=True) + end
        assert told(data)[0] == "deliver 0x3"
        assert trace_of(data)[1].counts["events_without_address"] == 1


def test_a_status_is_no_event() -> None:
    # A PSB+ in the stream: its FUP, mode and times are where things stand, whatever stood before.
    again = PSB + tsc(5) + tma(1, 2) + fup(L[7]) + mode(iflag=False) + pip(0x5000) + PSBEND
    data = ON + cfe(INTR, 32) + fup(L[1], 1) + tip(L[2], 1) + again + cfe(IRET) + tip(L[1], 1)
    assert told(data) == ["deliver 0x20 rip=l1", "enter rip=l2", "return addr=l1"]


def test_page_fault_data_goes_with_page_faults() -> None:
    assert told(OFF + evd(CR2, 0xDEAD) + cfe(INTR, 13)) == ["deliver 0xd"]  # nobody sends that
    assert told(OFF + cfe(INTR, 14)) == ["deliver 0xe"]  # INT 14?


def test_only_an_nmi_exits_with_reason_0_and_vector_2() -> None:
    told_ = told(OFF + evd(REASON, 0) + cfe(VMEXIT_INTR, 2) + evd(REASON, 1) + cfe(VMEXIT_INTR, 2) + cfe(VMEXIT_INTR, 2))
    assert told_[::2] == ["vmexit 0x0 nmi code=0x0", "vmexit 0x0 code=0x1", "vmexit 0x0"]


def test_a_vector_2_that_is_delivered_can_be_anything() -> None:
    assert told(OFF + cfe(INTR, 2) + cfe(INTR, 18)) == ["deliver 0x2", "deliver 0x12"]


# -- overflow, stop, pauses ---------------------------------------------------------------------------------------------


def test_an_overflow_is_a_gap() -> None:
    data = ON + cfe(INTR, 32) + fup(L[1], 1) + tip(L[2], 1) + OVF + cyc(9) + fup(L[3])
    data += cfe(INTR, 33) + fup(L[4], 1) + tip(L[5], 1)
    assert told(data) == ["deliver 0x20 rip=l1", "enter rip=l2", "gap", "deliver 0x21 rip=l4", "enter rip=l5"]
    # Tracing is off where the overflow ends: the FUP belongs to nothing, an event stands alone.
    data = ON + OVF + cfe(INTR, 33) + pge(L[5])
    assert told(data) == ["gap", "deliver 0x21", "enter rip=l5"]


def test_an_overflow_can_end_a_status() -> None:
    data = PSB + tsc(5) + mode(iflag=True) + OVF + fup(L[3]) + cfe(INTR, 33) + fup(L[4], 1) + tip(L[5], 1)
    assert told(data) == ["gap", "deliver 0x21 rip=l4", "enter rip=l5"]


def test_after_an_overflow_the_flag_is_told_again() -> None:
    data = OFF + mode() + fup(L[1]) + OVF + mode() + fup(L[2])
    assert told(data) == ["flags 0x0 rip=l1", "gap", "flags 0x0 rip=l2"]


def test_a_stop_is_a_gap_and_a_pause_is_not() -> None:
    data = ON + tip(L[1]) + pgd() + STOP + pge(L[2], 1) + cfe(SMI) + fup(L[3], 1) + pgd() + pge(L[1]) + pgd()
    assert told(data) == ["gap", "smi rip=l3"]
    counts = trace_of(data)[1].counts
    assert (counts["stops"], counts["pauses"]) == (1, 3)


# -- time ---------------------------------------------------------------------------------------------------------------


def times(data: bytes, clock: Clock | None = None) -> Iterator[int | None]:
    trace, _ = trace_of(data, clock=clock)
    for n in range(trace.count):
        event = trace.event(n)
        yield event.time if event.known & Known.TIME else None


def test_time_is_that_of_the_last_tsc() -> None:
    data = OFF + cfe(RSM) + tsc(1000) + cfe(RSM) + mtc(1) + cyc(7) + cfe(RSM) + tsc((1 << 56) - 1) + cfe(RSM)
    assert list(times(data)) == [None, 1000, 1000, (1 << 56) - 1]


def test_time_between_by_mtc() -> None:
    # The TSC runs 84 ticks for each of the crystal's (84/1); MTC has bits 10:3. At the TMA the CTC was 0x1001 since 10 ticks.
    clock = Clock(84, 1, 3)
    start = OFF + tsc(1_000_000) + tma(0x1001, 10)
    data = start + cfe(RSM) + mtc(0x01) + cfe(RSM) + mtc(0x02) + mtc(0x03) + cfe(RSM) + tsc(2_000_000) + mtc(9) + cfe(RSM)
    first = 999_990 + (0x1008 - 0x1001) * 84
    assert list(times(data, clock)) == [1_000_000, first, first + 2 * 8 * 84, 2_000_000]
    # 8 bits wrap; 0x1001 >> 3 is 0 in them.
    assert list(times(start + mtc(0xFF) + mtc(0x01) + cfe(RSM), clock)) == [999_990 + (0x1008 + 256 * 8 - 0x1001) * 84]
    # A ratio is used as a whole: no error adds up.
    many = start + b"".join(mtc(n % 256) for n in range(1, 1001)) + cfe(RSM)
    assert list(times(many, Clock(250, 3, 3))) == [999_990 + (0x1000 + 1000 * 8 - 0x1001) * 250 // 3]


def test_time_by_mtc_whose_bits_tma_does_not_have() -> None:
    # MTC has bits 19:12 of the CTC, TMA only 15:0: the upper four are not known before the first MTC.
    start = OFF + tsc(1_000_000) + tma(0x3FFF, 0)
    clock = Clock(2, 1, 12)
    assert list(times(start + mtc(0xA4) + cfe(RSM), clock)) == [1_000_000 + 2]
    assert list(times(start + mtc(0xA4) + mtc(0xA5) + cfe(RSM), clock)) == [1_000_000 + 2 + 4096 * 2]


# -- damage -------------------------------------------------------------------------------------------------------------


def test_what_comes_before_the_first_psb_is_skipped() -> None:
    data = b"\xff" * 5 + cfe(RSM) + OFF + cfe(SMI)
    assert told(data) == ["smi"]
    assert trace_of(data)[1].counts["bytes_skipped"] == 9


BAD = [b"\xc9", b"\x02\x04", b"\xad", b"\x99\xff", b"\x02\xc3\x89", b"\x02\x73\0\0\1\0\0", b"\x02\x82\x03"]


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_packet_is_a_gap_until_the_next_psb(bad: bytes) -> None:
    data = ON + cfe(RSM) + bad + cfe(SMI) + ON + cfe(INIT, ip=True) + fup(L[1], 1)
    assert told(data) == ["rsm", "gap", "init 0x1 rip=l1"]
    _, stream = trace_of(data)
    assert stream.damage == [f"at {len(ON) + 4:#x}: not a packet; read on at the next PSB"]


def test_a_psb_whose_beginning_was_taken_for_something_else() -> None:
    # A cut EVD takes the first bytes of what follows it; the rest of that PSB is no packet.
    for kept in range(3, 11):
        cut = evd(31, 0)[:kept]
        data = ON + cfe(RSM) + cut + ON + cfe(SMI, ip=True) + fup(L[1], 1)
        assert told(data) == ["rsm", "gap", "smi rip=l1"], kept


@pytest.mark.parametrize("other", [cfe(RSM), evd(0, 1), tip(L[1]), pgd(), tnt(1), STOP, b"\x02\x62", PSB])
def test_a_status_that_does_not_end(other: bytes) -> None:
    data = PSB + tsc(1) + other + cfe(SMI) + ON + cfe(INTR, 4) + fup(L[1])
    assert told(data)[0] == "gap"
    assert told(data)[-1] == "deliver 0x4 rip=l1"
    assert "a packet that a PSB+ cannot hold" in trace_of(data)[1].damage[0]


def test_event_data_does_not_outlive_a_psb() -> None:
    assert told(OFF + evd(CR2, 1) + OFF + cfe(INTR, 14)) == ["gap", "deliver 0xe"]


def test_texts_are_kept_once() -> None:
    trace, _ = trace_of(OFF + cfe(UIRET) * 5000 + cfe(SIPI, 1) * 3)
    assert trace.count == 5003 and bytes(trace.payload) == b"UIRETSIPI, start at 0x1000"


def test_offsets_of_events() -> None:
    data = bytes(7) + ON + cfe(RSM) + bytes(3) + cfe(SMI) + fup(L[1])
    trace, _ = trace_of(data)
    assert [trace.event(n).source_index for n in range(2)] == [7 + len(ON), 7 + len(ON) + 7]
    assert trace.event(0).kind is Kind.RSM
