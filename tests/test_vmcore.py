"""The reader of QEMU's ELF dumps: dumps made by hand with known answers, real ones, and what is refused."""

from __future__ import annotations

import gzip
import io
import json
import mmap
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zstandard
from dumpjson import load
from vmcores import (
    CODE,
    DB_TOP,
    DF_TOP,
    HANDLERS,
    IDT,
    KEPT,
    MC_TOP,
    NMI_TOP,
    RSP0_TOP,
    THREAD,
    THREAD_TOP,
    TSS,
    USER_CS,
    USER_SS,
    Cpu,
    Guest,
    dump,
    elf,
    kernel,
    note,
    tss_bytes,
)  # fmt: skip

from tracedbg.errors import FormatError, UsageError
from tracedbg.formats import ReaderOptions, open_input, open_inputs
from tracedbg.formats.vmcore import read as vmcore
from tracedbg.layout import REGION_STACK, Fidelity, Layout, Region, Tss
from tracedbg.replay import Replay
from tracedbg.state import Cause, Event, Evidence, Finding, Frame, FrameStatus, Kind, Known, Rule, Source
from tracedbg.trace import Trace
from tracedbg.writer import TraceWriter

DATA = Path(__file__).parent / "data"
IDLE, WORK, NMI_RIP, MC_RIP = CODE + 0x10000, CODE + 0x10020, CODE + 0x10200, CODE + 0x11F0
LA57 = 0x1020


def read(tmp_path: Path, data: bytes, options: ReaderOptions | None = None) -> Trace:
    path = tmp_path / "core.elf"
    path.write_bytes(data)
    return open_input(str(path), options=options)


def events(trace: Trace, *kinds: Kind) -> list[Event]:
    found = [trace.event(n) for n in range(trace.count)]
    return [event for event in found if not kinds or event.kind in kinds]


def delivered(trace: Trace, cpu: int = 0) -> list[tuple[int | None, int | None, int | None]]:
    """Vector, interrupted RIP and RSP of each delivery."""
    return [
        (
            e.arg if e.known & Known.ARG else None,
            e.rip if e.known & Known.RIP else None,
            e.rsp if e.known & Known.RSP else None,
        )
        for e in events(trace, Kind.DELIVER)
        if e.cpu == cpu
    ]


def marks(trace: Trace) -> list[str]:
    return [bytes(trace.payload[e.value : e.value + e.code]).decode() for e in events(trace, Kind.MARK)]


def replayed(trace: Trace) -> tuple[tuple[Finding, ...], tuple[Frame, ...]]:
    """Findings, and frames that are open at the end. Memory at the end is that of the dump."""
    with Replay(trace) as replay:
        replay.scan_all()
        replay.seek(trace.count)
        if not events(trace, Kind.GAP):
            for memory in trace.memory:
                words = replay.words(memory.addr, memory.addr + len(memory.data))
                assert b"".join(w.value.to_bytes(8, "little") for w in words) == memory.data
                assert all(w.known == 0xFF for w in words)
        return replay.findings(), replay.frames()


def verdict(trace: Trace) -> list[tuple[Rule, Evidence, int | None, int | None]]:
    """Rule, evidence and the vectors of victim and writer."""
    return [
        (f.rule, f.evidence, f.victim.vector if f.victim else None, f.writer.vector if f.writer else None)
        for f in replayed(trace)[0]
    ]


def excerpt(name: str) -> bytes:
    return gzip.decompress((DATA / "vmcore" / f"{name}.elf.gz").read_bytes())


# -- what a chain says ----------------------------------------------------------------------------------------------------


def test_an_idle_cpu_has_no_live_frame(tmp_path: Path) -> None:
    """What lies on the NMI stack is the frame of one that has returned."""
    guest = kernel()
    guest.frame(NMI_TOP, IDLE, THREAD_TOP - 0x200)
    with read(tmp_path, dump(guest)) as trace:
        assert trace.foreign == "vmcore" and "damage" not in trace.meta
        assert delivered(trace) == [] and verdict(trace) == []
        told = trace.meta["examined"]
        assert told["cpu 0 IST2 (NMI)"].startswith(
            f"stale frame at {NMI_TOP - 40:#x} (rip {IDLE:#x} rsp {THREAD_TOP - 0x200:#x} "
        )
        assert told["cpu 0 IST1 (#DF)"] == "no frame at its top"
        (last,) = events(trace, Kind.ENTER)
        assert (last.rip, last.rsp, last.cs, last.ss, last.rflags) == (IDLE, THREAD_TOP - 0x200, 0x10, 0x18, 0x46)


def test_a_stale_frame_tells_of_an_overwrite(tmp_path: Path) -> None:
    guest = kernel()
    guest.frame(NMI_TOP, NMI_RIP, NMI_TOP - 0x100)
    with read(tmp_path, dump(guest)) as trace:
        assert delivered(trace) == []
        assert "which had overwritten an older one" in trace.meta["examined"]["cpu 0 IST2 (NMI)"]


def test_bounds_that_are_given(tmp_path: Path) -> None:
    """A stack that a layout knows, with its pointer not at the end; and one of a CPU that is not there."""
    guest = kernel()
    guest.frame(NMI_TOP, NMI_RIP, NMI_TOP - 0x100)
    stacks = (Region(NMI_TOP - 0x1000, NMI_TOP + 0x100, slot=2), Region(0x5000, 0x6000, cpu=7, assumed=True))
    with read(tmp_path, dump(guest, Cpu(rsp=NMI_TOP - 0x80)), ReaderOptions(layout=Layout(regions=stacks))) as trace:
        assert verdict(trace) == [(Rule.FRAME_CLOBBERED, Evidence.INFERRED, 2, 2)]


def test_tables_and_stacks_are_those_of_the_dump(tmp_path: Path) -> None:
    guest = kernel()
    with read(tmp_path, dump(guest)) as trace:
        layout = trace.layout
        assert layout.tss == (Tss(TSS, (RSP0_TOP, 0, 0), (None, DF_TOP, NMI_TOP, DB_TOP, MC_TOP, 0, 0, 0)),)
        assert {v: g.ist for v, g in layout.idts[0].gates.items() if g.ist} == {8: 1, 2: 2, 1: 3, 18: 4}
        assert layout.idts[0].gates[14].offset == HANDLERS[14] and len(layout.idts[0].gates) == 256
        assert layout.fidelity == Fidelity.INFERRED | Fidelity.RETURNS
        stacks = {r.slot: (r.lo, r.hi, r.assumed) for r in layout.regions if r.kind == REGION_STACK}
        assert stacks == {
            1: (DF_TOP - 0x2000, DF_TOP, True), 2: (NMI_TOP - 0x2000, NMI_TOP, True), 3: (DB_TOP - 0x2000, DB_TOP, True),
            4: (MC_TOP - 0x2000, MC_TOP, True), 8: (RSP0_TOP - 0x1000, RSP0_TOP, True),
        }  # fmt: skip


def test_nmi_inside_mc_is_clean(tmp_path: Path) -> None:
    guest = kernel()
    guest.frame(MC_TOP, IDLE, THREAD_TOP - 0x200)
    guest.frame(NMI_TOP, MC_RIP, MC_TOP - 0x100, rflags=0x46)
    with read(tmp_path, dump(guest, Cpu(rip=NMI_RIP, rsp=NMI_TOP - 0x80))) as trace:
        assert delivered(trace) == [(18, IDLE, THREAD_TOP - 0x200), (2, MC_RIP, MC_TOP - 0x100)]
        assert all(not e.known & (Known.SOURCE | Known.TIME) for e in events(trace, Kind.DELIVER))
        findings, frames = replayed(trace)
        assert findings == ()
        assert [(f.vector, f.lo, f.hi, f.status) for f in frames] == [
            (18, MC_TOP - 40, MC_TOP, FrameStatus.LIVE), (2, NMI_TOP - 40, NMI_TOP, FrameStatus.LIVE),
        ]  # fmt: skip


@pytest.mark.parametrize("depth", [40, 0x68, 0x1000, 0x1FF8])
def test_recursion_on_one_stack(tmp_path: Path, depth: int) -> None:
    """The frame at the top interrupted code on its own stack: an older one stood there."""
    guest = kernel()
    guest.frame(NMI_TOP, NMI_RIP, NMI_TOP - depth, rflags=0x46)
    with read(tmp_path, dump(guest, Cpu(rip=NMI_RIP, rsp=NMI_TOP - 0x80))) as trace:
        assert delivered(trace) == [(2, None, None), (2, NMI_RIP, NMI_TOP - depth)]
        findings, frames = replayed(trace)
        (finding,) = findings
        assert (finding.rule, finding.evidence, finding.cause) == (Rule.FRAME_CLOBBERED, Evidence.INFERRED, Cause.NONE)
        assert (finding.lo, finding.hi, finding.settled) == (NMI_TOP - 40, NMI_TOP, None)
        assert finding.victim is not None and finding.victim.saved.slots() == (None,) * 6
        assert [f.status for f in frames] == [FrameStatus.CLOBBERED, FrameStatus.LIVE]


@pytest.mark.parametrize("depth", [0, 8, 32])
def test_a_saved_rsp_in_its_own_frame_proves_nothing(tmp_path: Path, depth: int) -> None:
    """Above the RIP slot: what had stood there was popped, at least in part."""
    guest = kernel()
    guest.frame(NMI_TOP, NMI_RIP, NMI_TOP - depth)
    with read(tmp_path, dump(guest, Cpu(rip=NMI_RIP, rsp=NMI_TOP - 0x80))) as trace:
        assert delivered(trace) == [(2, NMI_RIP, NMI_TOP - depth)] and verdict(trace) == []
        assert "is at the top of IST2 (NMI)" in marks(trace)[0]


def test_a_cycle_of_two_stacks(tmp_path: Path) -> None:
    """NMI, #MC inside it, NMI inside that: the first NMI's frame is gone, #MC's is not."""
    guest = kernel()
    guest.frame(MC_TOP, NMI_RIP, NMI_TOP - 0x100)
    guest.frame(NMI_TOP, MC_RIP, MC_TOP - 0x80)
    with read(tmp_path, dump(guest, Cpu(rip=NMI_RIP, rsp=NMI_TOP - 0x80))) as trace:
        assert delivered(trace) == [(2, None, None), (18, NMI_RIP, NMI_TOP - 0x100), (2, MC_RIP, MC_TOP - 0x80)]
        findings, frames = replayed(trace)
        assert verdict(trace) == [(Rule.FRAME_CLOBBERED, Evidence.INFERRED, 2, 2)]
        assert findings[0].victim is not None and findings[0].victim.entry < min(f.entry for f in frames[1:])
        assert [(f.vector, f.status) for f in frames] == [
            (2, FrameStatus.CLOBBERED), (18, FrameStatus.LIVE), (2, FrameStatus.LIVE),
        ]  # fmt: skip


def test_a_frame_from_user_mode_ends_the_chain(tmp_path: Path) -> None:
    guest = kernel()
    guest.frame(NMI_TOP, 0x401000, NMI_TOP - 0x100, cs=USER_CS, ss=USER_SS)  # wherever its RSP points
    with read(tmp_path, dump(guest, Cpu(rip=NMI_RIP, rsp=NMI_TOP - 0x80))) as trace:
        assert delivered(trace) == [(2, 0x401000, NMI_TOP - 0x100)] and verdict(trace) == []
        assert marks(trace)[0] == "the outermost frame is from CPL 3"


def test_at_cpl_3_nothing_is_live(tmp_path: Path) -> None:
    guest = kernel()
    guest.frame(NMI_TOP, NMI_RIP, NMI_TOP - 0x100)
    with read(tmp_path, dump(guest, Cpu(rip=0x401000, rsp=NMI_TOP - 0x80, cs=USER_CS, ss=USER_SS))) as trace:
        assert delivered(trace) == [] and verdict(trace) == []
        assert marks(trace)[0] == "the CPU is at CPL 3: no frame is live"


def test_double_fault_has_an_error_code(tmp_path: Path) -> None:
    """48 bytes; its saved RSP is in no memory, which is why it came."""
    guest = kernel()
    guest.frame(DF_TOP, IDLE, 0xFFFFC90000000010, code=0)
    with read(tmp_path, dump(guest, Cpu(rip=HANDLERS[8], rsp=DF_TOP - 48))) as trace:
        (event,) = events(trace, Kind.DELIVER)
        assert (event.arg, event.code, event.source) == (8, 0, Source.EXCEPTION)
        assert verdict(trace) == [(Rule.DOUBLE_FAULT, Evidence.INFERRED, None, 8)]
        (frame,) = replayed(trace)[1]
        assert (frame.lo, frame.hi, frame.has_code) == (DF_TOP - 48, DF_TOP, True)
        assert "doubtful: no memory is mapped at its RSP" in trace.meta["examined"]["cpu 0 IST1 (#DF)"]


def test_page_fault_on_an_ist_stack_keeps_its_error_code(tmp_path: Path) -> None:
    guest = kernel(ists={14: 2})
    guest.frame(NMI_TOP, IDLE, THREAD_TOP - 0x200, code=0x10003)
    with read(tmp_path, dump(guest, Cpu(rsp=NMI_TOP - 0x80))) as trace:
        (frame,) = replayed(trace)[1]
        assert (frame.vector, frame.lo, frame.saved.code, frame.source) == (14, NMI_TOP - 48, 0x10003, Source.UNKNOWN)


def test_what_xen_keeps_above_flags_and_cs(tmp_path: Path) -> None:
    guest = kernel()
    guest.words(MC_TOP - 40, IDLE, 0x1_0000_0010, 0xE010000500000046, THREAD_TOP - 0x200, 0)
    with read(tmp_path, dump(guest, Cpu(rip=MC_RIP, rsp=MC_TOP - 0x80))) as trace:
        assert delivered(trace) == [(18, IDLE, THREAD_TOP - 0x200)]
        assert [(e.addr, e.value) for e in events(trace, Kind.WRITE)] == [
            (MC_TOP - 32, 0x1_0000_0010), (MC_TOP - 24, 0xE010000500000046),
        ]  # fmt: skip
        assert verdict(trace) == []  # replayed() compares memory, too


@pytest.mark.parametrize(
    "words",
    [
        (1 << 47, 0x10, 0x246, THREAD, 0x18),  # RIP is not canonical
        (IDLE, 0x10, 0x246, 1 << 62, 0x18),  # RSP
        (IDLE, 0x18, 0x246, THREAD, 0x18),  # CS is data
        (IDLE, 0x50, 0x246, THREAD, 0x18),  # CS is not present
        (IDLE, 0x3, 0x246, THREAD, 0x3),  # CS is null
        (IDLE, 0x13, 0x246, THREAD, 0x2B),  # CS has not its ring
        (IDLE, 0x10, 0x246, THREAD, 0x2B),  # SS has another ring
        (IDLE, 0x108, 0x246, THREAD, 0),  # CS past the GDT
        (IDLE, 0x10, 0x244, THREAD, 0),  # RFLAGS without bit 1
        (IDLE, 0x10, 0x24E, THREAD, 0),  # RFLAGS with bit 3
        (IDLE, 0x10, 1 << 31 | 2, THREAD, 0),
        (IDLE, 0x10, 1 << 17 | 2, THREAD, 0),  # VM
        (IDLE, 1 << 40 | 0x10, 2, THREAD, 0),
        (IDLE, 1 << 20 | 0x10, 2, THREAD, 0),
        (IDLE, 0x10, 2, THREAD, 1 << 16),
        (IDLE, 0x14, 2, THREAD, 0),  # of an LDT at CPL 0
        (0, 0, 0, 0, 0),
    ],
)  # fmt: skip
def test_words_that_are_no_frame(tmp_path: Path, words: tuple[int, ...]) -> None:
    guest = kernel()
    guest.words(NMI_TOP - 40, *words)
    with read(tmp_path, dump(guest, Cpu(rsp=NMI_TOP - 0x80))) as trace:
        assert delivered(trace) == []
        assert marks(trace)[0].startswith(f"RSP {NMI_TOP - 0x80:#x} is on IST2 (NMI), but no frame lies at its top (none")
    guest.words(NMI_TOP - 40, IDLE, 0x10, 2, THREAD, 0)  # the same with what is right
    with read(tmp_path, dump(guest, Cpu(rsp=NMI_TOP - 0x80))) as trace:
        assert delivered(trace) == [(2, IDLE, THREAD)]


def test_a_misplaced_frame_is_named(tmp_path: Path) -> None:
    """The pointer in the TSS was a page lower when it was delivered (Linux did so for #DB)."""
    guest = kernel()
    guest.frame(DB_TOP - 0x1000, IDLE, THREAD_TOP - 0x200)
    with read(tmp_path, dump(guest, Cpu(rsp=DB_TOP - 0x1080))) as trace:
        assert delivered(trace) == []
        assert f"the highest that can be one is at {DB_TOP - 0x1028:#x}" in marks(trace)[0]


# -- handlers that leave their stack ----------------------------------------------------------------------------------------


def test_a_pointer_leads_back_to_the_ist_stack(tmp_path: Path) -> None:
    guest = kernel()
    guest.frame(NMI_TOP, IDLE, RSP0_TOP - 0x100)
    guest.words(THREAD_TOP - 0x100, NMI_TOP - 0x90)
    with read(tmp_path, dump(guest)) as trace:
        assert delivered(trace) == [(2, IDLE, RSP0_TOP - 0x100)] and verdict(trace) == []
        assert f"pointer at {THREAD_TOP - 0x100:#x}" in trace.meta["examined"]["cpu 0 IST2 (NMI)"]


@pytest.mark.parametrize(
    ("place", "pointer"),
    [
        (THREAD_TOP - 0x208, NMI_TOP - 0x90),  # below RSP
        (THREAD_TOP - 0x104, NMI_TOP - 0x90),  # not aligned
        (THREAD_TOP - 0x100, NMI_TOP - 0x20),  # into the frame
        (THREAD_TOP - 0x100, NMI_TOP),
        (THREAD_TOP - 0x100, DB_TOP - 0x90),  # no frame lies there
    ],
)
def test_what_leads_nowhere(tmp_path: Path, place: int, pointer: int) -> None:
    guest = kernel()
    guest.frame(NMI_TOP, IDLE, RSP0_TOP - 0x100)
    guest.words(place, pointer)
    with read(tmp_path, dump(guest)) as trace:
        assert delivered(trace) == []


def test_a_copy_leads_back_to_the_ist_stack(tmp_path: Path) -> None:
    guest = kernel()
    guest.frame(NMI_TOP, 0x401000, 0x7FFF0000, cs=USER_CS, ss=USER_SS)
    guest.frame(THREAD_TOP, 0x401000, 0x7FFF0000, cs=USER_CS, ss=USER_SS)  # as Linux moves NMIs from user mode
    with read(tmp_path, dump(guest)) as trace:
        assert delivered(trace) == [(2, 0x401000, 0x7FFF0000)] and verdict(trace) == []
        assert [(e.addr, e.value) for e in events(trace, Kind.MOVE)] == [(NMI_TOP - 40, THREAD_TOP - 40)]
        assert [f.status for f in replayed(trace)[1]] == [FrameStatus.MOVED]


def test_a_handler_elsewhere_that_was_interrupted_by_its_own_vector(tmp_path: Path) -> None:
    """What the newer frame interrupted held a pointer to its own registers on the same stack already; RSP is back there."""
    guest = kernel()
    guest.frame(NMI_TOP, WORK, THREAD_TOP - 0x180)
    guest.words(THREAD_TOP - 0x100, NMI_TOP - 0x90)
    with read(tmp_path, dump(guest)) as trace:
        assert delivered(trace) == [(2, None, None), (2, WORK, THREAD_TOP - 0x180)]
        (back,) = events(trace, Kind.RETURN)
        assert (back.rsp, back.addr, back.value) == (NMI_TOP - 40, WORK, THREAD_TOP - 0x180)
        assert verdict(trace) == [(Rule.FRAME_CLOBBERED, Evidence.INFERRED, 2, 2)]
        assert [(f.entry, f.status) for f in replayed(trace)[1]] == [(1, FrameStatus.CLOBBERED)]


def test_a_handler_on_the_stack_that_it_interrupted(tmp_path: Path) -> None:
    """The pointer lies below the saved RSP: that is the frame's own handler, as Linux does it for #VC."""
    guest = kernel()
    guest.frame(NMI_TOP, WORK, THREAD_TOP - 0x80)
    guest.words(THREAD_TOP - 0x100, NMI_TOP - 0x90)
    with read(tmp_path, dump(guest)) as trace:
        assert delivered(trace) == [(2, WORK, THREAD_TOP - 0x80)] and verdict(trace) == []


def test_the_scan_of_a_stack_ends_with_it(tmp_path: Path) -> None:
    guest = kernel()
    guest.map(THREAD_TOP, count=4)
    guest.frame(NMI_TOP, IDLE, RSP0_TOP - 0x100)
    guest.words(THREAD_TOP, NMI_TOP - 0x90)  # the stack above
    with read(tmp_path, dump(guest)) as trace:
        assert delivered(trace) == []


# -- Linux ------------------------------------------------------------------------------------------------------------------


def linux_nmi_stack(name: str) -> tuple[int, bytes]:
    """NMI stack of a Linux 6.1 guest: address and bytes of its upper part."""
    text = (DATA / "qemu" / "linux" / f"nest_plugin_nmi_ist_{name}.txt").read_text()
    rows = re.findall(r"^([0-9a-f]+): 0x([0-9a-f]+) 0x([0-9a-f]+)$", text, re.M)
    return int(rows[0][0], 16), b"".join(int(w, 16).to_bytes(8, "little") for row in rows for w in row[1:])


def test_linux_keeps_the_outermost_frame(tmp_path: Path) -> None:
    """Real bytes: the nested NMI has just stored its frame; Linux has the first one as a copy, and will repair it."""
    at, stack = linux_nmi_stack("k0_asm_exc_nmi")
    top = at + len(stack)
    assert top == 0xFFFFFE000000E000
    guest = kernel(5, tops=(DF_TOP, top, DB_TOP, MC_TOP))
    guest.write(at, stack)
    with read(tmp_path, dump(guest, Cpu(rip=HANDLERS[2], rsp=top - 40, cr4=LA57))) as trace:
        assert delivered(trace) == [(2, 0xFFFFFFFF812E9267, 0xFFA000000059BA38), (2, 0xFFFFFFFF81110005, 0xFFFFFE000000DE58)]
        (move,) = events(trace, Kind.MOVE)
        assert (move.addr, move.value) == (top - 40, top - 136)
        assert verdict(trace) == [(Rule.FRAME_RELOCATED, Evidence.INFERRED, 2, 2)]


def test_linux_without_nesting(tmp_path: Path) -> None:
    at, stack = linux_nmi_stack("after_step")
    top = at + len(stack)
    guest = kernel(5, tops=(DF_TOP, top, DB_TOP, MC_TOP))
    guest.write(at, stack)
    with read(tmp_path, dump(guest, Cpu(rsp=top - 0x1A8, cr4=LA57))) as trace:
        assert delivered(trace) == [(2, 0xFFFFFFFF812E9267, 0xFFA000000059BA38)] and verdict(trace) == []


@pytest.mark.parametrize("word", [0, 2, 0xFFFF8000])
def test_linux_words_count_only_while_an_nmi_executes(tmp_path: Path, word: int) -> None:
    at, stack = linux_nmi_stack("k0_asm_exc_nmi")
    top = at + len(stack)
    guest = kernel(5, tops=(DF_TOP, top, DB_TOP, MC_TOP))
    guest.write(at, stack)
    guest.words(top - 56, word)
    with read(tmp_path, dump(guest, Cpu(rip=HANDLERS[2], rsp=top - 40, cr4=LA57))) as trace:
        assert delivered(trace)[0] == (2, None, None)
        assert verdict(trace) == [(Rule.FRAME_CLOBBERED, Evidence.INFERRED, 2, 2)]


# -- Xen --------------------------------------------------------------------------------------------------------------------

XEN_RUN = DATA / "qemu" / "xen-nested" / "smp1-xnmi_mce_nmi"


def xen(nmi_frame: tuple[int, ...], mc_frame: tuple[int, ...] | None = None) -> tuple[Guest, dict[str, int]]:
    """A guest with the TSS, IDT and IST stacks of a real Xen; the frames are those that were read at the handlers' entries."""
    (vcpu,) = load(XEN_RUN.with_suffix(".dump.json.gz"))["vcpus"]
    bases = {key: int(vcpu[f"{key}_base"], 16) for key in ("tr", "idt", "gdt")}
    guest = Guest()
    guest.page(guest.root)
    for base in {base & -4096 for base in bases.values()}:
        guest.map(base)
    guest.map(bases["gdt"] + 0xE000)
    guest.words(bases["gdt"] + 0xE008, 0xAF9B000000FFFF, 0xCF93000000FFFF)
    guest.write(bases["tr"], bytes.fromhex(vcpu["tss_hex"]))
    guest.write(bases["idt"], bytes.fromhex(vcpu["idt_hex"]))
    guest.map(0xFFFF8300BFFD0000, count=8)  # Xen's stacks lie one behind the other, without guard pages
    for number, stack in vcpu["stacks"].items():
        if number.isdigit() and "hex" in stack:
            raw = bytes.fromhex(stack["hex"])
            guest.write(int(stack["top"], 16) - len(raw), raw)
    guest.words(0xFFFF8300BFFD3000 - 40, *nmi_frame)
    if mc_frame is not None:
        guest.words(0xFFFF8300BFFD2000 - 40, *mc_frame)
    return guest, bases


def xen_truth(number: int) -> tuple[int, ...]:
    """Frame at the number-th entry of a handler."""
    entries = [t for t in load(XEN_RUN.with_suffix(".truth.json.gz"))["truth"] if t["kind"] == "enter"]
    return tuple(int(word, 16) for word in entries[number]["frame"][:5])


def test_the_race_of_xen(tmp_path: Path) -> None:
    """NMI, #MC inside it, whose IRET unblocked NMIs, NMI at the same place: what a dump from then on shows."""
    guest, bases = xen(xen_truth(2), xen_truth(1))
    cpu = Cpu(
        rip=0xFFFF82D04032A240, rsp=0xFFFF8300BFFD2F48, cs=0xE008, ss=0, tr=bases["tr"], idt=bases["idt"], gdt=bases["gdt"],
        gdt_limit=0xE07F,
    )  # fmt: skip
    with read(tmp_path, dump(guest, cpu)) as trace:
        assert delivered(trace) == [(2, None, None), (2, 0xFFFF82D04032A242, 0xFFFF8300BFFD2F48)]
        assert verdict(trace) == [(Rule.FRAME_CLOBBERED, Evidence.INFERRED, 2, 2)]
        slots = {r.slot: (r.lo, r.hi) for r in trace.layout.regions if r.kind == REGION_STACK}
        assert slots[4] == (0xFFFF8300BFFD4000, 0xFFFF8300BFFD4FE0) and slots[2] == (0xFFFF8300BFFD2000, 0xFFFF8300BFFD3000)
        assert set(slots) == {1, 2, 3, 4, 8}  # not the poison
    guest, bases = xen(xen_truth(0), xen_truth(1))  # before the second NMI
    mc = replace(cpu, rip=0xFFFF82D0402020A0, rsp=0xFFFF8300BFFD2000 - 40)
    with read(tmp_path, dump(guest, mc)) as trace:
        assert delivered(trace) == [(2, *xen_truth(0)[0:4:3]), (18, *xen_truth(1)[0:4:3])] and verdict(trace) == []


# -- real dumps -------------------------------------------------------------------------------------------------------------


def check_after(trace: Trace) -> None:
    """vmcore-a-after: in the outer NMI's handler, the nested one has returned; its words lie at 0x10dfd8."""
    assert delivered(trace) == [(2, None, None), (2, 0x100BAB, 0x126FD0)]
    (now,) = events(trace, Kind.ENTER)
    assert (now.rip, now.rsp, now.cs, now.ss, now.rflags) == (0x1008F4, 0x126FC0, 8, 0, 0x46)
    findings, frames = replayed(trace)
    (finding,) = findings
    assert (finding.rule, finding.evidence) == (Rule.FRAME_CLOBBERED, Evidence.INFERRED)
    assert (finding.lo, finding.hi, finding.event) == (0x10DFD8, 0x10E000, 2)
    assert [(f.entry, f.status) for f in frames] == [(1, FrameStatus.CLOBBERED)]


def check_in_mce(trace: Trace) -> None:
    """vmcore-x_nmi_in_mce: an NMI inside a #MC; the guest printed both frames."""
    assert delivered(trace) == [(18, 0x100BF2, 0x11CFA8), (2, 0x100BAB, 0x126FD0)]
    findings, frames = replayed(trace)
    assert findings == ()
    assert [(f.vector, f.lo, f.saved.slots()[:5]) for f in frames] == [
        (18, 0x10BFD8, (0x100BF2, 8, 0x97, 0x11CFA8, 0x10)), (2, 0x10DFD8, (0x100BAB, 8, 0x97, 0x126FD0, 0)),
    ]  # fmt: skip


def check_int1(trace: Trace) -> None:
    """INT 1 in the handler of INT 1, which has returned; the guest printed both, and CLOBBERED."""
    assert delivered(trace) == [(1, None, None), (1, 0x101498, 0x126FD8)]
    assert verdict(trace) == [(Rule.FRAME_CLOBBERED, Evidence.INFERRED, 1, 1)]


def check_loop(trace: Trace) -> None:
    """As a-after, but in the seventh return through the frame that was overwritten."""
    assert delivered(trace) == [(2, None, None), (2, 0x100BAB, 0x126FD0)]
    assert verdict(trace) == [(Rule.FRAME_CLOBBERED, Evidence.INFERRED, 2, 2)]


def check_df(trace: Trace) -> None:
    """INT3 with an RSP where no memory is: #DF, whose handler runs; error code 0 at 0x10ffd0."""
    assert delivered(trace) == [(8, 0x101F23, 0x123456789000)]
    assert verdict(trace) == [(Rule.DOUBLE_FAULT, Evidence.INFERRED, None, 8)]
    assert [(f.lo, f.hi) for f in replayed(trace)[1]] == [(0x10FFD0, 0x110000)]


def check_two_cpus(trace: Trace) -> None:
    """NMIs on both CPUs have returned."""
    assert [t.base for t in trace.layout.tss] == [0x105100, 0x105168] and len(trace.layout.idts) == 1
    assert delivered(trace) == delivered(trace, 1) == [] and verdict(trace) == []
    told = trace.meta["examined"]
    assert told["cpu 0 IST2 (NMI)"].startswith("stale frame at 0x10dfd8 (rip 0x1020be rsp 0x11cfb0")
    assert told["cpu 1 IST2 (NMI)"].startswith("stale frame at 0x10efd8 (rip 0x101886 rsp 0x120fc0")


def check_waiting(trace: Trace) -> None:
    """CPU 1 is not started yet: it is in real mode, and no reason to doubt the rest."""
    assert marks(trace)[0] == "the CPU is not in long mode" and verdict(trace) == []
    assert trace.cpus == 2 and "damage" not in trace.meta and not events(trace, Kind.GAP)


CHECKS: dict[str, Callable[[Trace], None]] = {
    "a-after": check_after,
    "x_nmi_in_mce": check_in_mce,
    "e_int1-after": check_int1,
    "g-after": check_loop,
    "x_df": check_df,
    "smp2": check_two_cpus,
    "smp2-start": check_waiting,
}


@pytest.mark.parametrize("name", CHECKS)
def test_excerpts_of_real_dumps(tmp_path: Path, name: str) -> None:
    with read(tmp_path, excerpt(name)) as trace:
        assert "damage" not in trace.meta
        CHECKS[name](trace)


@pytest.mark.parametrize("name", ["a-after", "x_nmi_in_mce"])
def test_whole_real_dumps(shared: Path, tmp_path: Path, name: str) -> None:
    """The same answers, and the layout that QEMU's monitor and the guest printed."""
    path = shared / "vmcore" / f"vmcore-{name}.elf.zst"
    with open_input(str(path)) as trace:
        CHECKS[name](trace)
        assert trace.layout.tss[0].base == 0x105100 and trace.layout.idts[0].base == 0x106000
        printed = (shared / "vmcore" / f"vmcore-{name}.serial.txt").read_text()
        tops = {k: int(v, 16) for k, v in re.findall(r"(\w+)_top=([0-9a-f]+)", printed.split("cpu1")[0])}
        ist = trace.layout.tss[0].ist
        assert (ist[1], ist[2], ist[3], ist[4]) == (tops["df"], tops["nmi"], tops["mc"], tops["db"])
        assert f"RSP={events(trace, Kind.ENTER)[0].rsp:016x}" in (shared / "vmcore" / f"vmcore-{name}.monitor.txt").read_text()
        whole = bytes(trace.events)
    with read(tmp_path, excerpt(name)) as trace:
        assert bytes(trace.events) == whole


# -- several CPUs -----------------------------------------------------------------------------------------------------------

OTHER = 0x100000  # from the tables and stacks of CPU 0 to those of CPU 1


def two_cpus(shared_nmi: bool) -> Guest:
    """A second TSS, whose NMI stack is its own or that of CPU 0."""
    guest = kernel()
    tops = [top + OTHER for top in (DF_TOP, NMI_TOP, DB_TOP, MC_TOP)]
    if shared_nmi:
        tops[1] = NMI_TOP
    guest.map(TSS + OTHER)
    guest.map(RSP0_TOP + OTHER - 0x1000)
    for top in tops:
        if top != NMI_TOP:
            guest.map(top - 0x2000, count=2)
    guest.write(TSS + OTHER, tss_bytes(RSP0_TOP + OTHER, tops))
    return guest


def test_two_cpus_with_stacks_of_their_own(tmp_path: Path) -> None:
    guest = two_cpus(False)
    guest.frame(NMI_TOP, NMI_RIP, NMI_TOP - 0x80)
    guest.frame(NMI_TOP + OTHER, IDLE, THREAD_TOP - 0x400)
    second = Cpu(rip=NMI_RIP, rsp=NMI_TOP + OTHER - 0x80, tr=TSS + OTHER)
    with read(tmp_path, dump(guest, Cpu(rip=NMI_RIP, rsp=NMI_TOP - 0x80), second)) as trace:
        assert trace.cpus == 2 and len(trace.layout.tss) == 2 and len(trace.layout.idts) == 1
        assert [len(delivered(trace, n)) for n in (0, 1)] == [2, 1]
        (finding,) = replayed(trace)[0]
        assert (finding.rule, finding.cpu, finding.cause) == (Rule.FRAME_CLOBBERED, 0, Cause.NONE)


def test_two_cpus_on_one_stack(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    """One frame overwrote the other; which came first, one instant does not tell."""
    guest = two_cpus(True)
    guest.frame(NMI_TOP, IDLE, THREAD_TOP - 0x400)
    both = [Cpu(rip=NMI_RIP, rsp=NMI_TOP - 0x80), Cpu(rip=NMI_RIP, rsp=NMI_TOP - 0x180, tr=TSS + OTHER)]
    with read(tmp_path, dump(guest, *both)) as trace:
        assert [delivered(trace, n) for n in (0, 1)] == [[(None, None, None)]] * 2
        assert sum("CPUs 0, 1 all run on IST2 (NMI)" in text for text in marks(trace)) == 2
        assert verdict(trace) == []
    assert "unknown" in run_cli("replay", tmp_path / "core.elf", code=3).stdout
    idle = [both[0], replace(both[1], rsp=THREAD_TOP - 0x200)]  # the other one is elsewhere
    with read(tmp_path, dump(guest, *idle)) as trace:
        assert [delivered(trace, n) for n in (0, 1)] == [[(2, IDLE, THREAD_TOP - 0x400)], []]


def test_the_same_addresses_in_other_memory(tmp_path: Path) -> None:
    """Page tables of their own: the second CPU's stacks cannot be told in the same trace."""
    guest = kernel()
    other = kernel()
    guest.frame(NMI_TOP, IDLE, THREAD_TOP - 0x400)
    for at, page in other.pages.items():
        far = bytearray(page)
        for n in range(0, 4096, 8):
            entry = int.from_bytes(page[n : n + 8], "little")
            if entry & 1 and at < 0x40000 and entry >> 40 == 0 and 0x1000 <= entry & -4096 <= max(other.pages):
                far[n : n + 8] = (entry + 0x1000000).to_bytes(8, "little")
        guest.pages[at + 0x1000000] = far if is_table(other, at) else bytearray(page)
    cpus = [Cpu(rip=NMI_RIP, rsp=NMI_TOP - 0x80), Cpu(rip=NMI_RIP, rsp=NMI_TOP - 0x80, cr3=0x1001000)]
    with read(tmp_path, dump(guest, *cpus)) as trace:
        assert delivered(trace) == [(2, IDLE, THREAD_TOP - 0x400)] and delivered(trace, 1) == []
        assert "CPU 0's and lie in other memory" in trace.meta["damage"][0]
        assert [e.cpu for e in events(trace, Kind.GAP)] == [1]


def is_table(guest: Guest, at: int) -> bool:
    """Whether a physical page is a page table."""
    tables, level = {guest.root}, {guest.root}
    for _ in range(guest.levels - 1):
        level = {guest.entry(t + n) & 0xFFFFFFFFFF000 for t in level for n in range(0, 4096, 8) if guest.entry(t + n) & 1}
        tables |= level
    return at in tables


def test_one_stack_for_many_vectors(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    """Which exception it was is known only at the begin of a handler."""
    guest = kernel(ists=dict.fromkeys(range(32), 3))
    guest.frame(DB_TOP, IDLE, THREAD_TOP - 0x200, code=2)
    with read(tmp_path, dump(guest, Cpu(rip=HANDLERS[14] + 2, rsp=DB_TOP - 48))) as trace:
        assert delivered(trace) == [(14, IDLE, THREAD_TOP - 0x200)] and verdict(trace) == []
    with read(tmp_path, dump(guest, Cpu(rip=HANDLERS[14] + 16, rsp=DB_TOP - 0x80))) as trace:
        assert delivered(trace) == [(None, IDLE, THREAD_TOP - 0x200)] and verdict(trace) == []
    assert "clean" in run_cli("replay", tmp_path / "core.elf", code=0).stdout
    guest.frame(DB_TOP, IDLE, DB_TOP - 0x80)
    with read(tmp_path, dump(guest, Cpu(rip=IDLE, rsp=DB_TOP - 0x80))) as trace:
        assert delivered(trace) == [(None, None, None), (None, IDLE, DB_TOP - 0x80)]
    assert "unknown" in run_cli("replay", tmp_path / "core.elf", code=3).stdout  # an overwrite, of what nobody knows


# -- page tables --------------------------------------------------------------------------------------------------------------


def test_five_levels(tmp_path: Path) -> None:
    guest = kernel(5)
    guest.frame(NMI_TOP, IDLE, THREAD_TOP - 0x400)
    with read(tmp_path, dump(guest, Cpu(rsp=NMI_TOP - 0x80, cr4=LA57))) as trace:
        assert delivered(trace) == [(2, IDLE, THREAD_TOP - 0x400)]
    with pytest.raises(AssertionError), read(tmp_path, dump(guest, Cpu(rsp=NMI_TOP - 0x80))) as trace:
        assert delivered(trace)  # as four levels nothing is found


@pytest.mark.parametrize(("level", "size"), [(2, 2 << 20), (3, 1 << 30)])
@pytest.mark.parametrize("extra", [0, 1 << 12])  # PAT of a large page, no part of the address
def test_large_pages(tmp_path: Path, level: int, size: int, extra: int) -> None:
    """The NMI stack lies in a large page, not at its begin."""
    top = 0xFFFF888040000000 + 0x13000
    guest = kernel(tops=(DF_TOP, DB_TOP, DB_TOP, MC_TOP))
    guest.write(TSS, tss_bytes(RSP0_TOP, (DF_TOP, top, DB_TOP, MC_TOP)))
    at = guest.place_of(top, level)
    guest.entry(at, size | extra | 0x83)
    words = (IDLE, 0x10, 0x246, THREAD_TOP - 0x400, 0x18)
    page = guest.page(size + 0x12000)
    page[0x1000 - 40 :] = b"".join(w.to_bytes(8, "little") for w in words)
    with read(tmp_path, dump(guest, Cpu(rsp=top - 0x80))) as trace:
        assert delivered(trace) == [(2, IDLE, THREAD_TOP - 0x400)]


@pytest.mark.parametrize("level", [4, 5])
def test_a_large_page_of_level_4_is_none(tmp_path: Path, level: int) -> None:
    guest = kernel(5)
    guest.frame(NMI_TOP, IDLE, THREAD_TOP - 0x400)
    at = guest.place_of(NMI_TOP - 8, level)
    guest.entry(at, guest.entry(at) | 0x80)
    with read(tmp_path, dump(guest, Cpu(rsp=NMI_TOP - 0x80, cr4=LA57))) as trace:
        assert delivered(trace) == [] and trace.meta["damage"]


def test_tables_that_loop(tmp_path: Path) -> None:
    """Every entry of the only table leads to the table itself: all of memory is that page."""
    guest = Guest()
    page = guest.page(guest.root)
    for n in range(512):
        page[8 * n : 8 * n + 8] = (guest.root | 3).to_bytes(8, "little")
    with read(tmp_path, dump(guest)) as trace:
        assert trace.cpus == 1 and verdict(trace) == []


def test_a_table_that_is_not_in_the_dump(tmp_path: Path) -> None:
    with read(tmp_path, dump(kernel(), Cpu(cr3=0x5000000))) as trace:
        assert [e.kind for e in events(trace)] == [Kind.MARK, Kind.GAP]
        assert trace.meta["damage"] == [f"cpu 0: no TSS at {TSS:#x}: a page table is not in the dump"]


def test_no_code_is_mapped_at_rip(tmp_path: Path) -> None:
    guest = kernel()
    guest.frame(NMI_TOP, RSP0_TOP - 8, THREAD_TOP - 0x200)
    at = guest.place_of(RSP0_TOP - 8)
    guest.entry(at, guest.entry(at) | 1 << 63)
    with read(tmp_path, dump(guest, Cpu(rsp=NMI_TOP - 0x80))) as trace:
        assert trace.meta["examined"]["cpu 0 IST2 (NMI)"].endswith("doubtful: no code is mapped at its RIP")


# -- notes and segments -------------------------------------------------------------------------------------------------------


def racing() -> tuple[Guest, Cpu]:
    guest = kernel()
    guest.frame(NMI_TOP, NMI_RIP, NMI_TOP - 0x100)
    return guest, Cpu(rip=NMI_RIP, rsp=NMI_TOP - 0x80)


def test_notes_of_old_qemu(tmp_path: Path) -> None:
    guest, cpu = racing()
    with read(tmp_path, dump(guest, replace(cpu, size=432))) as trace:
        assert len(delivered(trace)) == 2 and "damage" not in trace.meta


def test_segments_that_paging_names_twice(tmp_path: Path) -> None:
    guest, cpu = racing()
    with read(tmp_path, dump(guest, cpu, again=(0,))) as trace:
        assert len(delivered(trace)) == 2 and "damage" not in trace.meta


def test_segments_that_contradict_each_other(tmp_path: Path) -> None:
    """The one that begins first counts."""
    guest, cpu = racing()
    loads = guest.loads()
    with read(tmp_path, elf([cpu], [*loads, (loads[0][0] + 0x1000, bytes(0x4000))])) as trace:
        assert len(delivered(trace)) == 2
        assert trace.meta["damage"] == [f"two segments say what is at physical {loads[0][0] + 0x1000:#x}"]


def test_segments_in_any_order_and_size(tmp_path: Path) -> None:
    """Pages of which each is a segment, or two, last ones first."""
    guest, cpu = racing()
    halves = [(at + n, bytes(page[n : n + 2040])) for at, page in guest.pages.items() for n in (0, 2040)]
    rest = [(at + 4080, bytes(page[4080:])) for at, page in guest.pages.items()]
    with read(tmp_path, elf([cpu], [*reversed(halves), *rest])) as trace:
        assert len(delivered(trace)) == 2 and "damage" not in trace.meta
        assert verdict(trace) == [(Rule.FRAME_CLOBBERED, Evidence.INFERRED, 2, 2)]


def test_a_cpu_without_a_note(tmp_path: Path) -> None:
    guest, cpu = racing()
    with read(tmp_path, dump(guest, cpu, statuses=3)) as trace:
        assert trace.cpus == 3 and trace.meta["damage"] == ["2 of 3 CPUs have no note of QEMU"]
        assert [e.cpu for e in events(trace, Kind.GAP)] == [1, 2]
        assert verdict(trace)[-1] == (Rule.FRAME_CLOBBERED, Evidence.INFERRED, 2, 2)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"cr0": 1}, "the CPU is not in long mode"),
        ({"cr4": 0}, "the CPU is not in long mode"),
        ({"cs_flags": 0xCF9B00}, "the CPU is not in long mode"),
        ({"cr4": 0x20 | 1 << 32}, "the CPU uses FRED, whose stack pointers are MSRs that a dump has not"),
        ({"tr": TSS + 0x10000000}, f"no TSS at {TSS + 0x10000000:#x}: it is not mapped, or not in the dump"),
        ({"tr_limit": 0x2A}, f"no TSS at {TSS:#x}: it is not mapped, or not in the dump"),
        ({"idt": IDT - 0x10000000}, f"no IDT at {IDT - 0x10000000:#x}: it is not mapped, or not in the dump"),
    ],
)
def test_a_cpu_of_which_nothing_can_be_said(tmp_path: Path, change: dict[str, int], why: str) -> None:
    guest, cpu = racing()
    with read(tmp_path, dump(guest, replace(cpu, **change), cpu)) as trace:
        assert marks(trace)[0] == why == trace.meta["examined"]["cpu 0"]
        assert [e.cpu for e in events(trace, Kind.GAP)] == ([] if "long mode" in why else [0])
        assert delivered(trace) == [] and len(delivered(trace, 1)) == 2


def test_no_cpu_in_long_mode(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    """Nothing was looked at: that is not clean."""
    guest, cpu = racing()
    with read(tmp_path, dump(guest, replace(cpu, cr0=1))) as trace:
        assert [e.kind for e in events(trace)] == [Kind.MARK, Kind.GAP]
    assert "unknown" in run_cli("replay", tmp_path / "core.elf", code=3).stdout


def test_compatibility_mode_at_cpl_3_is_long_mode(tmp_path: Path) -> None:
    guest, cpu = racing()
    with read(tmp_path, dump(guest, replace(cpu, cs=0x23, ss=USER_SS, cs_flags=0xCFFB00))) as trace:
        assert delivered(trace) == [] and events(trace, Kind.GAP) == []


def test_short_tables(tmp_path: Path) -> None:
    """Gates and IST slots behind the limits are not there."""
    guest, cpu = racing()
    with read(tmp_path, dump(guest, replace(cpu, idt_limit=16 * 2 - 1))) as trace:
        assert set(trace.layout.idts[0].gates) == {0, 1} and delivered(trace) == []
    with read(tmp_path, dump(guest, replace(cpu, tr_limit=0x24 + 8 * 2 - 1))) as trace:
        assert trace.layout.tss[0].ist == (None, DF_TOP, NMI_TOP, None, None, None, None, None)
        assert len(delivered(trace)) == 2


def test_notes_with_huge_sizes(tmp_path: Path) -> None:
    guest, cpu = racing()
    good = cpu.status(0) + cpu.state()
    for tail in (b"\xff" * 12, b"\xff\xff\xff\xff\0\0\0\0\0\0\0\0", b"\x05\0\0\0\xff\xff\xff\x7f\0\0\0\0QEMU\0\0\0\0"):
        with read(tmp_path, elf([cpu], guest.loads(), notes=good + tail)) as trace:
            assert len(delivered(trace)) == 2
            assert "is longer than its segment" in trace.meta["damage"][0]
    with pytest.raises(FormatError, match=r"no note of QEMU in this dump.*is longer than its segment"):
        read(tmp_path, elf([cpu], guest.loads(), notes=b"\xff" * 12 + good))


def test_foreign_notes_are_passed_over(tmp_path: Path) -> None:
    guest, cpu = racing()
    others = note(b"VMCOREINFO", 0, b"OSRELEASE=6.1\n") + note(b"CORE", 6, bytes(20)) + note(b"QEMU", 7, b"x") + note(b"", 0, b"")
    with read(tmp_path, elf([cpu], guest.loads(), notes=others + cpu.status(0) + others + cpu.state())) as trace:
        assert len(delivered(trace)) == 2 and "damage" not in trace.meta


# -- what is refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"KDUMP   " + bytes(4096), "a kdump-compressed dump: it has no TR"),
        (b"makedumpfile\0\0\0\0" + bytes(4096), "a flattened dump of makedumpfile: it has no TR"),
        (b"PAGEDU64" + bytes(4096), "a Windows dump: it has no TR"),
        (elf([Cpu()], [], notes=Cpu().status(0)), "no note of QEMU in this dump, so TR and the IST stacks are not known"),
        (elf([Cpu()], [], machine=3), "not in long mode, or not of x86-64"),
        (elf([Cpu()], [])[:4] + b"\x01" + elf([Cpu()], [])[5:], "damaged ELF header|not of x86-64"),
        (elf([Cpu()], [], notes=note(b"QEMU", 0, bytes(431))), "note of CPU 0 has 431 bytes, not 432 or more"),
        (elf([Cpu(version=2)], []), "note of CPU 0 is of version 2, not 1"),
        (elf([Cpu()], [], kind=2), "not a trace or log"),
        (b"\x7fELF", "not a trace or log"),
    ],
)
def test_what_is_refused(tmp_path: Path, data: bytes, why: str) -> None:
    with pytest.raises(FormatError, match=why) as caught:
        read(tmp_path, data)
    assert "\n" not in str(caught.value)


def test_options(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    guest, cpu = racing()
    path = tmp_path / "core.elf"
    path.write_bytes(dump(guest, cpu))
    with pytest.raises(UsageError, match="a dump holds all CPUs"):
        open_inputs([str(path), shutil.copy(path, f"{path}.2")])
    with pytest.raises(UsageError, match="has its own TSS and IDT"):
        read(tmp_path, dump(guest, cpu), ReaderOptions(layout=Layout(tss=(Tss(0x1000),))))
    for option, value in (("--monitor", "x"), ("--cpu-hz", "1G"), ("--vendor", "svm"), ("--stores", "0-1000")):
        assert "vmcore: " in run_cli("replay", option, value, path, code=2).stderr
    shown = run_cli("info", "--layout", "linux", path, code=0).stdout
    assert "IST2 (NMI)" in shown or "NMI" in shown
    assert "layout: the dump" in shown and "inferred from one instant" in shown


def test_verdict_and_exit_code(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    guest, cpu = racing()
    path = tmp_path / "core.elf"
    path.write_bytes(dump(guest, cpu))
    said = " ".join(run_cli("replay", path, code=0).stdout.split())
    assert "warning: frame-clobbered" in said
    assert "inferred: the dump shows that the newer frame interrupted a handler whose own frame stood at the same place" in said
    report = json.loads(run_cli("replay", "--fail-on", "warning", "--format", "json", path, code=1).stdout)
    (finding,) = report["traces"][0]["findings"]
    assert (finding["rule"], finding["evidence"], finding["severity"]) == ("frame-clobbered", "inferred", "warning")
    state = run_cli("replay", "--at", "end", "--stacks", path, code=0).stdout
    assert "registers as dumped" in state and f"{NMI_TOP - 40:016x}" in state
    run_cli("convert", path, tmp_path / "core.case", code=0)
    again = run_cli("replay", "--fail-on", "warning", "--format", "json", tmp_path / "core.case", code=1).stdout
    assert json.loads(again)["traces"][0]["findings"] == report["traces"][0]["findings"]


# -- compressed, cut and damaged ------------------------------------------------------------------------------------------------


def test_packed_and_piped_dumps_are_the_same(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    guest, cpu = racing()
    data = dump(guest, cpu)
    outputs = []
    for name, packed in (("a", data), ("b", gzip.compress(data)), ("c", zstandard.compress(data))):
        (tmp_path / name).write_bytes(packed)
        run_cli("convert", tmp_path / name, tmp_path / f"{name}.case", code=0)
        outputs.append((tmp_path / f"{name}.case").read_text().replace(f'"name":"{name}"', ""))
    run_cli("convert", "-", tmp_path / "d.case", code=0, stdin=data)
    outputs.append((tmp_path / "d.case").read_text())
    sections = [re.sub(r'"name": ?"[^"]*"', "", text) for text in outputs]
    assert sections[0] == sections[1] == sections[2] == sections[3] and "frame-clobbered" not in sections[0]


def test_holes_of_a_packed_dump_cost_nothing(tmp_path: Path) -> None:
    """32 MiB of zeros in between."""
    guest, cpu = racing()
    data = elf([cpu], [*guest.loads(), (0x10000000, bytes(32 << 20))])
    with read(tmp_path, zstandard.compress(data)) as trace:
        assert len(delivered(trace)) == 2 and trace.meta["source"]["bytes"] == len(data)


def outcome(data: bytes, whole: bool = True) -> str:
    """Reads it, and if `whole`, writes and replays it: how that ended."""
    file = io.BytesIO()
    writer = TraceWriter(file)
    try:
        with mmap.mmap(-1, len(data)) as area:
            area[:] = data
            vmcore.parse(area, "core", writer, Layout())
    except FormatError as error:
        assert "\n" not in str(error) and str(error).isprintable()
        return "refused"
    if whole:
        writer.close()
        with Trace.from_bytes(file.getvalue()) as trace:
            replayed(trace)
    return "damage" if "damage" in writer.meta else "whole"


def test_cut_at_any_point() -> None:
    """In the headers and notes at each byte, in memory at each page and a bit more."""
    guest, cpu = racing()
    data = dump(guest, cpu)
    begin = len(data) - sum(len(part) for _, part in guest.loads())
    ends = {outcome(data[:end]) for end in range(1, begin)}
    assert ends <= {"refused", "damage"}
    assert {outcome(data[:end]) for end in range(begin, len(data), 1000)} == {"damage"}
    assert outcome(data) == "whole"


def test_a_cut_dump_says_what_is_missing(tmp_path: Path) -> None:
    data = excerpt("a-after")
    with read(tmp_path, data[:-0x1000]) as trace:
        (what,) = trace.meta["damage"]
        assert what.startswith(f"the file ends at {len(data) - 0x1000:#x}, before its memory at 0x124000")
    with read(tmp_path, data[: len(data) // 2]) as trace:
        assert any("no TSS" in what or "no IDT" in what or "file ends" in what for what in trace.meta["damage"])


HOSTILE = (0, 1, 3, 0x83, 0x1003, (1 << 64) - 1, 1 << 63, 1 << 47, 0xFFFFF000, NMI_TOP - 40)


def mutate(seed: int, data: bytes, regions: list[tuple[int, int]]) -> bytes:
    """Some bytes of some regions become others; now and then a field of eight is a hostile number."""
    r = random.Random(seed)
    raw = bytearray(data)
    for _ in range(r.choice((1, 1, 2, 4, 16))):
        lo, hi = r.choice(regions)
        at = r.randrange(lo, hi)
        if r.random() < 0.4:
            at &= ~7
            value = r.choice((*HOSTILE, r.getrandbits(64)))
            raw[at : at + 8] = value.to_bytes(8, "little")
        else:
            raw[at] = r.getrandbits(8)
    return bytes(raw[: len(data)])


SAMPLES = {"a-after": 1000, "x_nmi_in_mce": 1000, "made": 8000}  # and how many mutations of each


def sample(name: str) -> tuple[bytes, list[tuple[int, int]]]:
    """A dump, and where its headers and notes, its page tables and its stacks lie."""
    if name == "made":
        guest, cpu = racing()
        guest.words(THREAD_TOP - 0x100, MC_TOP - 0x90)
        guest.frame(MC_TOP, NMI_RIP, NMI_TOP - 0x100)
        cpu = replace(cpu, idt_limit=16 * 19 - 1)
        data = elf([cpu, cpu], [(at, bytes(page)) for at, page in sorted(guest.pages.items())])
        begin = len(data) - 4096 * len(guest.pages)
        places = {at: begin + 4096 * n for n, at in enumerate(sorted(guest.pages))}
        tables = [(places[at], places[at] + 4096) for at in places if is_table(guest, at)]
        wanted = [guest.physical(top - 4096) for top in (NMI_TOP, MC_TOP)] + [guest.physical(at) for at in (TSS, IDT)]
        return data, [(0, begin)] * 4 + tables + [(places[at], places[at] + 4096) for at in wanted]
    data = excerpt(name)
    begin = len(data) - sum(hi - lo for lo, hi in KEPT)  # tables and stacks 0xc000, page tables 0x6000
    stacks = [(begin + at, begin + at + size) for at, size in ((0, 0x2000), (0x3000, 0x6000), (0xC000, 0x3000))]
    return data, [(0, begin)] * 3 + stacks


@pytest.mark.parametrize("name", SAMPLES)
def test_mutations(name: str) -> None:
    data, regions = sample(name)
    ends = Counter(outcome(mutate(seed, data, regions), seed % 50 == 0) for seed in range(SAMPLES[name]))
    assert set(ends) == {"refused", "damage", "whole"}, ends


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLES)
def test_many_mutations(name: str) -> None:
    data, regions = sample(name)
    for seed in range(1000, 10_000 if name != "made" else 50_000):
        outcome(mutate(seed, data, regions))
