"""The replay against the truth of the recordings: predicted frames, memory, and the verdicts that are known.

The numbers of frames compared are written down by hand from the guest's print and the debugger's records, so that no
comparison can be empty.
"""

from __future__ import annotations

import gzip
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import truth
from conftest import ROOT, CompletedText
from dumpjson import layout_of_dump
from truth import Delivery, Verdict

from tracedbg import rules
from tracedbg.formats import ReaderOptions, open_input, open_inputs
from tracedbg.formats.qemu import monitor as qemu_monitor
from tracedbg.layout import Idt, Layout, from_toml
from tracedbg.replay import Replay
from tracedbg.state import Cause, Event, Finding, Kind, Rule, Settle, Source, Stats
from tracedbg.trace import Trace
from tracedbg.writer import TraceWriter, build

DATA = ROOT / "tests" / "data" / "qemu"
TRACES = ROOT / "traces"

USER = from_toml('user = [["0x111000", "0x113000"]]', "user.toml")


def logs(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.glob("qemu*.log*"))]


def open_scenario(name: str, layout: Layout | None = None) -> Trace:
    """A scenario of the bare-metal guest; its monitor text is found beside it."""
    return open_inputs(logs(DATA / name), options=ReaderOptions(layout=layout))


def layout_of(name: str, trace: Trace) -> Layout:
    """The monitor text prints 34 gates; the guest of smp2 uses one more, which only the RAM dump has."""
    if name != "istlab/smp2_tid":
        return trace.layout
    raw = gzip.decompress((DATA / name / "mem_01_start.bin.gz").read_bytes())
    assert [len(idt.gates) for idt in trace.layout.idts] == [34]
    return replace(trace.layout, idts=(Idt.from_bytes(truth.RAM_BASE, raw[:4096]),))


def scenario_deliveries(name: str) -> list[Delivery]:
    with open_scenario(name) as trace:
        return truth.deliveries(trace, layout_of(name, trace))


# -- frames as the guest printed them ------------------------------------------------------------------------------------

# Scenario -> handlers that printed their frame.
PRINTED = {
    "istlab/a": 3,
    "istlab/a0": 2,
    "istlab/b_int2": 2,
    "istlab/b_pic": 2,
    "istlab/c_lapic": 2,
    "istlab/d_mcip": 1,
    "istlab/e_int1": 2,
    "istlab/f_ist_ipi": 1,
    "istlab/f_noist_ipi": 1,
    "istlab/g": 3,
    "istlab/smp2_tid": 26,
    "istlab/x_df": 1,
    "istlab-plugin/a": 3,
    "istlab-plugin/b_pic": 2,
    "istlab-plugin/e_int1": 2,
    "istlab-plugin/g": 3,
    "istlab-qemu10/a": 3,
    "istlab-qemu10/e_icebp": 2,
}


def test_every_recorded_scenario_of_the_guest_is_in_the_tables() -> None:
    # Of smprace_ud_ipi the copy holds torn lines only; the whole log is compared below, where it is there.
    assert {f"{p.parent.name}/{p.name}" for p in DATA.glob("istlab*/*")} == {*PRINTED, "istlab/smprace_ud_ipi"}


@pytest.mark.parametrize(("name", "count"), PRINTED.items())
def test_every_predicted_frame_is_the_one_that_the_guest_printed(name: str, count: int) -> None:
    printed = truth.prints((DATA / name / "serial.txt").read_text())
    got = scenario_deliveries(name)
    assert len(printed) == len(got) == count
    for cpu in {p.cpu for p in printed}:
        want = [(p.vector, p.address, p.words) for p in printed if p.cpu == cpu]
        of_cpu = [d for d in got if d.event.cpu == cpu]
        assert [(d.event.arg, d.placed.rip_addr, truth.predicted(d.placed.saved)) for d in of_cpu] == want
        codes = [p.code for p in printed if p.cpu == cpu]
        assert [d.placed.saved.code or 0 for d in of_cpu] == codes
        assert [d.placed.lo for d in of_cpu] == [d.placed.rip_addr - 8 * d.placed.has_code for d in of_cpu]


def test_only_the_double_fault_of_the_guest_has_an_error_code() -> None:
    with_code = {n: [d.event.arg for d in scenario_deliveries(n) if d.placed.has_code] for n in PRINTED}
    assert {n: vectors for n, vectors in with_code.items() if vectors} == {"istlab/x_df": [8]}


# -- memory of the guest ---------------------------------------------------------------------------------------------------

# Scenario -> moment -> stack -> number of the delivery whose frame lies at its top. "before": the first handler runs;
# "after": the nested one has returned; "final": the first handler has returned. Where the nested frame overwrote the
# first, the guest's handler writes the first one back before its IRET (a, b, c, e), but not in g. Stacks that are not
# named are untouched.
CLOBBERED_ON = {"a": "nmi", "b_int2": "nmi", "b_pic": "nmi", "c_lapic": "mc", "e_int1": "db", "e_icebp": "db", "g": "nmi"}
MOMENTS: dict[str, dict[str, dict[str, int]]] = {
    **{
        name: {"before": {stack: 0}, "after": {stack: nested}, "final": {stack: nested if name == "g" else 0}}
        for name, stack in CLOBBERED_ON.items()
        for nested in [2 if name in ("a", "g") else 1]  # there the int3 is number 1
    },
    "a0": {"before": {"nmi": 0}, "after": {"nmi": 0}, "final": {"nmi": 1}},
    "d_mcip": {"before": {"mc": 0}, "vmstop": {"mc": 0}},
    "f_ist_ipi": {"before": {"nmi": 0}, "after": {"nmi": 0}, "final": {"nmi": 0}},
    "f_noist_ipi": {"before": {"user": 0}, "after": {"user": 0}, "final": {"user": 0}},
    "smp2_tid": {"final": {"nmi": 12, "nmi1": 24}},
    "x_df": {"final": {"df": 2}},
}
SNAP_MOMENT = {"outer-entry": "before", "outer-exit": "after", "end": "final", "df": "final"}

# Scenario -> frames at tops of stacks in its RAM dumps, and in its prints of stack memory.
IN_MEMORY = {
    "istlab/a": (3, 3),
    "istlab/a0": (3, 3),
    "istlab/b_int2": (3, 3),
    "istlab/b_pic": (3, 3),
    "istlab/c_lapic": (3, 3),
    "istlab/d_mcip": (2, 1),
    "istlab/e_int1": (3, 3),
    "istlab/f_ist_ipi": (4, 3),
    "istlab/f_noist_ipi": (4, 0),
    "istlab/g": (3, 2),
    "istlab/smp2_tid": (2, 1),
    "istlab/x_df": (1, 1),
    "istlab-plugin/a": (3, 3),
    "istlab-plugin/b_pic": (3, 3),
    "istlab-plugin/e_int1": (3, 3),
    "istlab-plugin/g": (3, 2),
    "istlab-qemu10/a": (3, 3),
    "istlab-qemu10/e_icebp": (3, 3),
}


def untouched(memory: dict[int, int], top: int) -> bool:
    """The guest begins with zeroes, with 0x5555 over the address on the #DF stacks, with 0x7777 on the user page."""
    return all(memory[a] in (0, 0x5555 << 48 | a, 0x7777 << 48 | a) for a in range(top - 40, top, 8))


def compare_tops(name: str, moment: str, memory: dict[int, int], tops: dict[str, int], got: list[Delivery]) -> int:
    """The tops of all stacks that a dump holds against the frames that should be there; how many those are."""
    frames = {d.event.source_index: d.placed for d in got}
    expected = MOMENTS[name.split("/")[1]].get(moment, {})
    compared = 0
    for stack, top in tops.items():
        if top - 8 not in memory:
            continue
        if stack not in expected:
            assert untouched(memory, top), (name, moment, stack)
            continue
        frame = frames[expected[stack]]
        assert frame.hi == top
        assert truth.frame_at(memory, frame.rip_addr) == truth.predicted(frame.saved), (name, moment, stack)
        if frame.has_code:
            assert memory[frame.lo] == frame.saved.code
        compared += 1
    return compared


@pytest.mark.parametrize(("name", "counts"), IN_MEMORY.items())
def test_ram_dumps_hold_the_predicted_frames_and_nothing_else(name: str, counts: tuple[int, int]) -> None:
    serial = (DATA / name / "serial.txt").read_text()
    tops = {**truth.stack_tops(serial), "user": 0x112000}
    got = scenario_deliveries(name)
    dumps = sorted((DATA / name).glob("mem_*.bin.gz"))
    assert len(dumps) == serial.count("@@ dump ") + (name == "istlab/d_mcip")  # there one more was taken at the shutdown
    moments = [re.fullmatch(r"mem_\d\d_(\w+)\.bin\.gz", p.name)[1] for p in dumps]  # type: ignore[index]
    assert moments[0] == "start"
    in_dumps = [compare_tops(name, m, truth.ram(p), tops, got) for m, p in zip(moments, dumps, strict=True)]
    assert (in_dumps[0], sum(in_dumps)) == (0, counts[0])
    said = truth.snapshots(serial)
    assert sum(compare_tops(name, SNAP_MOMENT[m], memory, tops, got) for m, memory in said) == counts[1]


def test_the_user_stack_of_the_syscall_gap_holds_the_predicted_frame() -> None:
    serial = (DATA / "istlab/f_noist_ipi/serial.txt").read_text()
    lines = re.findall(r"^USERSTACK \[rsp-(\w+)\]=(\w+)$", serial, re.M)
    memory = {0x112000 - int(at, 16): int(word, 16) for at, word in lines}
    (delivery,) = scenario_deliveries("istlab/f_noist_ipi")
    assert delivery.placed.rip_addr == 0x111FD8
    assert truth.frame_at(memory, 0x111FD8) == truth.predicted(delivery.placed.saved)
    assert memory[0x111FD0] == 0


# Scenario -> 8-byte words of the recorded range 0x107000..0x113000 that were ever stored (frame and 17 pushes in a, b, e),
# and recorded stores after the final dump: in g the handler is still on the IST stack when it prints "@@ exit".
PLUGIN_WORDS = {
    "istlab-plugin/a": (22, 0),
    "istlab-plugin/b_pic": (22, 0),
    "istlab-plugin/e_int1": (22, 0),
    "istlab-plugin/g": (40, 19),
}


@pytest.mark.parametrize(("name", "expected"), PLUGIN_WORDS.items())
def test_pushes_and_recorded_stores_give_the_memory_of_the_final_dump(name: str, expected: tuple[int, int]) -> None:
    memory = truth.ram(DATA / name / "mem_04_final.bin.gz")
    count, after = expected
    with open_scenario(name) as trace, Replay(trace) as replay:
        assert all(trace.event(trace.count - 1 - n).kind is Kind.WRITE for n in range(after))
        replay.seek(trace.count - after)
        words = [w for w in replay.words(0x107000, 0x113000) if w.known]
    assert len(words) == count
    for word in words:
        mask = truth.known_part(word)
        assert memory[word.addr] & mask == word.value & mask, hex(word.addr)


# -- frames as a debugger saw them, in real kernels ----------------------------------------------------------------------

NESTED = {  # log -> placed deliveries
    "linux-nested/smp1-mce_in_nmi": 103,
    "linux-nested/smp1-nest_nmi_masked": 49,
    "linux-nested/smp1-nest_nmi_masked_nokp": 47,
    "xen-nested/smp1-xmce_in_nmi": 118,
    "xen-nested/smp1-xnmi_masked": 121,
    "xen-nested/smp1-xnmi_mce_nmi": 3,
}
VECTORS = {"asm_exc_nmi": 2, "nmi": 2, "asm_exc_int3": 3, "asm_exc_machine_check": 18, "machine_check": 18}


def open_nested(name: str, dump: str | None = None) -> Trace:
    layout = layout_of_dump(DATA / f"{dump or name}.dump.json.gz")
    return open_input(str(DATA / f"{name}.log.gz"), options=ReaderOptions(layout=layout))


def nested_deliveries(name: str) -> list[Delivery]:
    with open_nested(name) as trace:
        return truth.deliveries(trace)


@pytest.mark.parametrize(("name", "count"), NESTED.items())
def test_every_delivery_in_a_nested_run_has_a_frame(name: str, count: int) -> None:
    got = nested_deliveries(name)
    assert (len(got), sum(d.frame is not None for d in got)) == (count, count)


@pytest.mark.parametrize(
    ("name", "entries", "readable"),
    [
        ("linux-nested/smp1-mce_in_nmi", 30, 28),
        ("linux-nested/smp1-nest_nmi_masked", 10, 8),
        ("linux-nested/smp1-nest_nmi_masked_nokp", 2, 0),
        ("xen-nested/smp1-xmce_in_nmi", 2, 2),
        ("xen-nested/smp1-xnmi_masked", 2, 2),
        ("xen-nested/smp1-xnmi_mce_nmi", 3, 3),
    ],
)
def test_every_handler_entry_has_the_predicted_rsp_and_frame(name: str, entries: int, readable: int) -> None:
    entered = truth.steps(DATA / f"{name}.truth.json.gz", "enter")
    watched = {VECTORS[s.what] for s in entered}
    got = [d for d in nested_deliveries(name) if d.event.arg in watched]
    assert [(VECTORS[s.what], s.rsp) for s in entered] == [(d.event.arg, d.placed.lo) for d in got]
    frames = [(s.words, truth.predicted(d.placed.saved)) for s, d in zip(entered, got, strict=True) if s.words]
    assert all(said == want for said, want in frames)
    assert (len(entered), len(frames)) == (entries, readable)


# Exits, sorted by what became of the frame between entry and exit:
#   in place   the IRET pops the frame where the delivery stored it, unchanged
#   unread     the same, but the debugger could not read the words
#   again      the frame was popped before: the livelock of Xen
#   nmi        Linux returns from an NMI through its copy, 0x38 bytes below the hardware's frame
#   repeat     that copy, redirected to repeat_nmi by a nested NMI
#   int3       Linux copies the frame of an int3 in the kernel 0x30 bytes down, and the kprobe changes RIP
EXITS: dict[str, dict[str, int]] = {
    "linux-nested/smp1-mce_in_nmi": {"in place": 29, "unread": 1, "nmi": 1, "int3": 6},
    "linux-nested/smp1-nest_nmi_masked": {"in place": 25, "unread": 1, "nmi": 1, "repeat": 1, "int3": 8},
    "linux-nested/smp1-nest_nmi_masked_nokp": {"in place": 21, "nmi": 2},
    "xen-nested/smp1-xmce_in_nmi": {"in place": 37},
    "xen-nested/smp1-xnmi_masked": {"in place": 46},
    "xen-nested/smp1-xnmi_mce_nmi": {"in place": 2, "again": 1972},
}
REPEAT_NMI = 0xFFFFFFFF81C01785
NMI_COPY, INT3_COPY = 0x38, 0x30


@pytest.mark.parametrize(("name", "expected"), EXITS.items())
def test_every_exit_pops_the_predicted_frame(name: str, expected: dict[str, int]) -> None:
    open_at: dict[int, list[Delivery]] = defaultdict(list)  # by address of the RIP slot, oldest first
    for delivery in nested_deliveries(name):
        open_at[delivery.placed.rip_addr].append(delivery)
    if name == "xen-nested/smp1-xnmi_mce_nmi":
        open_at[0xFFFF8300BFFD2FD8].pop(0)  # the first NMI's frame is overwritten: nobody ever pops it
    popped: dict[int, truth.Words] = {}
    seen: Counter[str] = Counter()
    for step in truth.steps(DATA / f"{name}.truth.json.gz", "exit"):
        here, nmis, int3s = (open_at[step.rsp + n] for n in (0, NMI_COPY, INT3_COPY))
        if step.words is None:
            assert here.pop().event.arg in (2, 18)  # the newest: a nested NMI returns first
            seen["unread"] += 1
        elif here:
            popped[step.rsp] = truth.predicted(here.pop(0).placed.saved)
            assert step.words == popped[step.rsp]
            seen["in place"] += 1
        elif step.rsp in popped:
            assert step.words == popped[step.rsp]
            seen["again"] += 1
        elif step.what == "iretq(nmi)" and step.words[0] == REPEAT_NMI:
            assert step.words[3] == step.rsp - 0x28
            seen["repeat"] += 1
        elif step.what == "iretq(nmi)":
            assert step.words == truth.predicted(nmis.pop(0).placed.saved)
            seen["nmi"] += 1
        else:
            delivery = int3s.pop(0)
            assert delivery.event.arg == 3
            assert step.words[1:] == truth.predicted(delivery.placed.saved)[1:]
            assert step.words[0] != delivery.placed.saved.rip
            seen["int3"] += 1
    assert seen == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # IST number -> the log's number of the delivery whose frame lies at the top of that stack at the end
        ("linux-nested/smp1-mce_in_nmi", {2: 151, 4: 152}),
        ("linux-nested/smp1-nest_nmi_masked", {2: 2}),
        ("linux-nested/smp1-nest_nmi_masked_nokp", {2: 50}),
        ("xen-nested/smp1-xmce_in_nmi", {1: 304, 2: 303}),
        ("xen-nested/smp1-xnmi_masked", {2: 110}),
        ("xen-nested/smp1-xnmi_mce_nmi", {1: 570, 2: 571}),
    ],
)
def test_the_dumped_ist_stacks_hold_the_newest_predicted_frames(name: str, expected: dict[int, int]) -> None:
    got = nested_deliveries(name)
    stacks = truth.dump_stacks(DATA / f"{name}.dump.json.gz")
    found = {}
    for top, memory in stacks.items():
        frame = truth.newest_on(got, top)
        if frame is not None:
            assert truth.frame_at(memory, frame.rip_addr) == truth.predicted(frame.saved)
            found[frame.ist] = next(d.event.source_index for d in got if d.event.index == frame.entry)
    assert found == expected


def test_the_nmi_stack_of_linux_holds_what_replay_of_pushes_and_stores_gives() -> None:
    # nest_plugin records every store to the stack; a debugger dumped it just before and just after event 3033.
    with open_excerpt() as trace, Replay(trace) as replay:
        nmi = next(e.index for e in truth.events(trace, Kind.DELIVER) if e.source_index == 3033)
        compared = []
        for stop, position in (("after_step", nmi), ("k0_asm_exc_nmi", nmi + 1)):
            memory = truth.monitor_words((DATA / f"linux/nest_plugin_nmi_ist_{stop}.txt").read_text())
            replay.seek(position)
            words = [w for w in replay.words(0xFFFFFE000000DE00, 0xFFFFFE000000E000) if w.known == 0xFF]
            assert {w.addr: w.value for w in words} == memory
            compared.append(len(words))
        frames = [d.placed for d in truth.deliveries(trace) if d.event.source_index in (3030, 3033)]
        assert [f.rip_addr for f in frames] == [0xFFFFFE000000DFD8] * 2
    assert compared == [64, 64]


# -- verdicts of the guest's scenarios ------------------------------------------------------------------------------------

NMI_FRAME = (0x10DFD8, 0x10E000)
MC_FRAME = (0x10BFD8, 0x10C000)
DB_FRAME = (0x109FD8, 0x10A000)


def clobber(victim: int, writer: int, frame: tuple[int, int]) -> Verdict:
    """What a log without returns can say of the guest's handlers, which leave the IST stack: no proof."""
    return Verdict("frame-clobbered", "warning", "frame-clobbered", "inferred", victim, writer, *frame)


def repaired(victim: int, writer: int, frame: tuple[int, int]) -> Verdict:
    """With returns and stores: proof of the overwrite, and of the copy written back."""
    return Verdict("frame-relocated", "note", "frame-clobbered", "computed", victim, writer, *frame)


def window(victim: int, frame: tuple[int, int]) -> Verdict:
    """With returns: the place where the next NMI would overwrite a live frame, before it comes."""
    return Verdict("reentry-window", "warning", "reentry-window", "computed", victim, None, *frame)


def fake(rule: str) -> Verdict:
    return Verdict(rule, "warning", rule, "recorded", None, 0, 0, 0)


def error(rule: str, evidence: str, writer: int | None = None, lo: int = 0, hi: int = 0) -> Verdict:
    return Verdict(rule, "error", rule, evidence, None, writer, lo, hi)


VERDICTS: dict[str, list[Verdict]] = {
    "istlab/a": [clobber(0, 2, NMI_FRAME)],
    "istlab/a0": [],
    "istlab/b_int2": [fake("fake-nmi"), clobber(0, 1, NMI_FRAME)],
    "istlab/b_pic": [fake("fake-nmi"), clobber(0, 1, NMI_FRAME)],
    "istlab/c_lapic": [fake("fake-mce"), clobber(0, 1, MC_FRAME)],
    "istlab/d_mcip": [error("shutdown", "recorded")],
    "istlab/e_int1": [clobber(0, 1, DB_FRAME)],
    "istlab/f_ist_ipi": [],
    "istlab/f_noist_ipi": [error("user-stack", "computed", 0, 0x111FD8, 0x112000)],
    "istlab/g": [clobber(0, 2, NMI_FRAME)],
    "istlab/smp2_tid": [],
    "istlab/x_df": [error("double-fault", "recorded", 2)],
    "istlab-plugin/a": [window(0, NMI_FRAME), repaired(0, 2, NMI_FRAME)],
    "istlab-plugin/b_pic": [fake("fake-nmi"), repaired(0, 1, NMI_FRAME)],
    "istlab-plugin/e_int1": [repaired(0, 1, DB_FRAME)],
    "istlab-plugin/g": [
        window(0, NMI_FRAME),
        Verdict("frame-consumed-corrupt", "error", "frame-clobbered", "computed", 0, 2, *NMI_FRAME),
        Verdict("resume-loop", "error", "resume-loop", "recorded", 0, 2, *NMI_FRAME),
    ],
    "istlab-qemu10/a": [clobber(0, 2, NMI_FRAME)],
    "istlab-qemu10/e_icebp": [clobber(0, 1, DB_FRAME)],
}


def test_every_scenario_of_the_guest_has_a_verdict() -> None:
    assert VERDICTS.keys() == PRINTED.keys()


@pytest.mark.parametrize(("name", "expected"), VERDICTS.items())
def test_replay_gives_the_known_verdict(name: str, expected: list[Verdict]) -> None:
    # The user page of the SYSCALL gap is in no log; for the others it is one more range.
    with open_scenario(name, USER) as trace:
        layout = replace(layout_of(name, trace), regions=trace.layout.regions)
        assert [truth.verdict(f, trace) for f in truth.findings(trace, layout)] == expected


@pytest.mark.parametrize("name", VERDICTS)
def test_the_guest_says_that_a_frame_was_clobbered_where_the_replay_does(name: str) -> None:
    serial = (DATA / name / "serial.txt").read_text()
    outer = truth.outer_frames(serial)
    with open_scenario(name) as trace:
        found = [f for f in truth.findings(trace) if f.raised_rule == Rule.FRAME_CLOBBERED]
    said = {line.split()[2] for line in serial.splitlines() if line.startswith("CLOBBERED")}
    assert ("yes" in said) == bool(found)
    if found:
        assert outer is not None
        assert len(found) == 1
        assert found[0].victim is not None and found[0].writer is not None
        was, now = truth.predicted(found[0].victim.saved), truth.predicted(found[0].writer.saved)
        assert (was, now) == outer
        assert truth.slot_names(found[0].differ) == truth.differing(*outer)
        assert truth.slot_names(found[0].slots) == ["rip", "cs", "rflags", "rsp", "ss"]


@pytest.mark.parametrize(
    ("name", "cause", "by"),
    [
        ("istlab/a", Cause.NMI_UNBLOCKED, 1),
        ("istlab/g", Cause.NMI_UNBLOCKED, 1),
        ("istlab-plugin/a", Cause.NMI_UNBLOCKED, 1),
        ("istlab-plugin/g", Cause.NMI_UNBLOCKED, 1),
        ("istlab-qemu10/a", Cause.NMI_UNBLOCKED, 1),
        ("istlab/b_int2", Cause.NMI_NEVER_BLOCKED, None),
        ("istlab/b_pic", Cause.NMI_NEVER_BLOCKED, None),
        ("istlab-plugin/b_pic", Cause.NMI_NEVER_BLOCKED, None),
        ("istlab/c_lapic", Cause.MC_UNMASKED, None),
        ("istlab/e_int1", Cause.SOFTWARE, None),
        ("istlab-qemu10/e_icebp", Cause.SOFTWARE, None),
    ],
)
def test_the_overwrite_has_its_known_cause(name: str, cause: Cause, by: int | None) -> None:
    with open_scenario(name) as trace:
        (found,) = (f for f in truth.findings(trace) if f.raised_rule == Rule.FRAME_CLOBBERED)
        frame = None if found.cause_frame is None else trace.event(found.cause_frame).source_index
    assert (found.cause, frame) == (cause, by)


def check_window(trace: Trace, found: Finding, iret: Event, of: int) -> None:
    """The window is that of NMIs, opened by this IRET, of the frame of the log's delivery `of`, and stays a warning."""
    assert (found.cause, found.event, found.cause_event) == (Cause.NMI_UNBLOCKED, iret.index, iret.index)
    assert found.cause_frame is not None and trace.event(found.cause_frame).source_index == of
    assert (found.count, found.settled) == (1, None)


@pytest.mark.parametrize("name", ["istlab-plugin/a", "istlab-plugin/g"])
def test_the_window_is_seen_at_the_iret_of_the_int3_before_the_nmi_comes(name: str) -> None:
    with open_scenario(name) as trace:
        iret = next(truth.events(trace, Kind.RETURN))
        second = [e for e in truth.events(trace, Kind.DELIVER) if e.source is Source.NMI][1]
        (found,) = (f for f in truth.findings(trace) if f.rule is Rule.REENTRY_WINDOW)
        check_window(trace, found, iret, 1)
        assert found.event < second.index


def test_without_the_user_range_nothing_is_said_of_the_syscall_gap() -> None:
    with open_scenario("istlab/f_noist_ipi") as trace:
        assert truth.findings(trace) == ()


def test_consumption_in_the_plugin_run_is_the_sixth_return_of_three_deliveries() -> None:
    # Returns: of the int3, of the nested NMI, and four times through the frame that it left.
    with open_scenario("istlab-plugin/g") as trace:
        returns = list(truth.events(trace, Kind.RETURN))
        window, consumed, loop = truth.findings(trace)
    assert window.event == returns[0].index
    assert [e.rsp for e in returns[1:]] == [0x10DFD8] * 5
    assert len(returns) == 6
    assert len({(e.addr, e.value, e.cs, e.ss, e.rflags) for e in returns[1:]}) == 1
    assert consumed.consumer == loop.event == returns[2].index
    assert loop.count == 4
    assert consumed.popped is not None and consumed.writer is not None
    assert truth.predicted(consumed.popped) == truth.predicted(consumed.writer.saved)


def test_the_cpus_own_pushes_in_a_plugin_log_are_not_taken_for_software() -> None:
    with open_scenario("istlab-plugin/b_pic") as trace:
        assert trace.meta["counts"]["cpu_pushes_dropped"] == 5
        first = next(truth.events(trace, Kind.DELIVER))
        second = next(e for e in truth.events(trace, Kind.DELIVER) if e.index > first.index)
        early = [e for e in truth.events(trace, Kind.WRITE) if e.index < second.index]
        assert early and all(e.addr < NMI_FRAME[0] for e in early)


def test_two_attempts_failed_before_the_double_fault() -> None:
    with open_scenario("istlab/x_df") as trace:
        attempts = [(e.source_index, e.arg, bool(e.flags & 1)) for e in truth.events(trace, Kind.DELIVER)]
        (found,) = truth.findings(trace)
        assert attempts == [(0, 3, True), (1, 14, True), (2, 8, False)]
        assert [trace.event(n).source_index for n in (found.cause_event, found.cause_frame) if n is not None] == [1, 0]


def test_the_frame_of_the_machine_check_is_live_at_the_shutdown() -> None:
    with open_scenario("istlab/d_mcip") as trace, Replay(trace) as replay:
        replay.seek(trace.count)
        assert [(trace.event(f.entry).source_index, f.status.name) for f in replay.frames()] == [(0, "LIVE")]
        assert [f.detail for f in truth.findings(trace)] == [1]  # a machine check with MCIP set


# -- verdicts of the real kernels -------------------------------------------------------------------------------------------

LINUX_FRAME = (0xFFFFFE000000DFD8, 0xFFFFFE000000E000)
XEN_FRAME = (0xFFFF8300BFFD2FD8, 0xFFFF8300BFFD3000)

NESTED_VERDICTS: dict[str, list[Verdict]] = {
    "linux-nested/smp1-nest_nmi_masked": [repaired(0, 2, LINUX_FRAME)],
    "linux-nested/smp1-nest_nmi_masked_nokp": [],
    "linux-nested/smp1-mce_in_nmi": [],
    "linux-nested/smp1-mce_in_mce_triple": [error("shutdown", "recorded")],
    "linux-nested/smp1-df_bad_rsp": [error("double-fault", "recorded", 525)],
    "xen-nested/smp1-xnmi_mce_nmi": [
        Verdict("frame-clobbered", "error", "frame-clobbered", "computed", 569, 571, *XEN_FRAME)
    ],
    "xen-nested/smp1-xnmi_masked": [],
    "xen-nested/smp1-xmce_in_nmi": [],
}
SAME_GUEST = "linux-nested/smp1-mce_in_nmi"  # for the logs without a dump of their own


@pytest.mark.parametrize(("name", "expected"), NESTED_VERDICTS.items())
def test_replay_gives_the_known_verdict_of_a_real_kernel(name: str, expected: list[Verdict]) -> None:
    own = (DATA / f"{name}.dump.json.gz").exists()
    with open_nested(name, None if own else SAME_GUEST) as trace:
        assert [truth.verdict(f, trace) for f in truth.findings(trace)] == expected


def test_every_log_of_a_nested_run_has_a_verdict() -> None:
    present = {f"{p.parent.name}/{p.name.removesuffix('.log.gz')}" for p in DATA.glob("*-nested/*.log.gz")}
    assert present == NESTED_VERDICTS.keys()


def test_the_page_fault_that_became_a_double_fault_on_linux_was_not_delivered() -> None:
    with open_nested("linux-nested/smp1-df_bad_rsp", SAME_GUEST) as trace:
        failed = [(e.source_index, e.arg) for e in truth.events(trace, Kind.DELIVER) if e.flags & 1]
        assert failed == [(524, 14)]
        double = next(d for d in truth.deliveries(trace) if d.event.arg == 8)
        # Unlike the guest's: RSP of the next int3 in the #DF handler lies on the stack where the frame was put.
        assert (double.placed.ist, double.placed.hi, double.placed.lo) == (1, 0xFFFFFE000000B000, 0xFFFFFE000000AFD0)
        after = next(e for e in truth.events(trace, Kind.DELIVER) if e.source_index == 526)
        assert double.placed.hi - 4096 < after.rsp < double.placed.lo


def test_the_nested_nmi_on_linux_was_let_in_by_the_iret_of_the_int3() -> None:
    with open_nested("linux-nested/smp1-nest_nmi_masked") as trace:
        (found,) = truth.findings(trace)
        assert found.cause is Cause.NMI_UNBLOCKED
        assert found.cause_frame is not None
        assert trace.event(found.cause_frame).source_index == 1


def test_the_log_of_the_xen_race_leaves_the_overwritten_frame_open() -> None:
    with open_nested("xen-nested/smp1-xnmi_mce_nmi") as trace, Replay(trace) as replay:
        replay.scan_all()
        (found,) = replay.findings()
        assert (found.settled, found.consumer) == (None, None)
        assert (found.cause, trace.event(found.cause_frame or 0).source_index) == (Cause.NMI_UNBLOCKED, 570)
        assert truth.slot_names(found.differ) == ["rip", "rflags", "rsp", "ss"]
        assert replay.stats().open_at_end == 1
        replay.seek(trace.count)
        open_frames = {trace.event(f.entry).source_index: f.status.name for f in replay.frames()}
    assert open_frames == {569: "CLOBBERED", 571: "LIVE"}


def test_with_the_returns_that_a_debugger_saw_the_xen_race_is_a_livelock() -> None:
    path = TRACES / "xen-nmi-mce-nmi.tdbg"
    if not path.exists():
        pytest.skip("traces/ has not been made")
    exits = truth.steps(DATA / "xen-nested/smp1-xnmi_mce_nmi.truth.json.gz", "exit")
    on_stack = [s for s in exits if s.rsp == XEN_FRAME[0]]
    assert len(on_stack) == 1973
    with Trace.open(path) as trace:
        returns = list(truth.events(trace, Kind.RETURN))
        words = [(e.rsp, truth.comparable(e.addr, e.cs, e.rflags, e.value, e.ss)) for e in returns]
        assert words == [(s.rsp, s.words) for s in exits]
        opened, consumed, loop = truth.findings(trace)
        assert [truth.verdict(f, trace) for f in (opened, consumed, loop)] == [
            window(569, XEN_FRAME),
            Verdict("frame-consumed-corrupt", "error", "frame-clobbered", "computed", 569, 571, *XEN_FRAME),
            Verdict("resume-loop", "error", "resume-loop", "recorded", 569, 571, *XEN_FRAME),
        ]
        check_window(trace, opened, returns[0], 570)  # the machine check's IRET
        # One of the returns is that of the NMI that wrote the frame; all others take its words once more.
        assert loop.count == len(on_stack) - 1
        assert consumed.consumer == loop.event == next(e.index for e in returns if e.rsp == XEN_FRAME[0]) + 1
        assert consumed.popped is not None
        assert (consumed.popped.rip, consumed.popped.rsp) == (0xFFFF82D04032A242, 0xFFFF8300BFFD2F48)  # do_nmi+2
        assert rules.finding_evidence(consumed).name == "RECORDED"


def open_excerpt() -> Trace:
    """The blocks around the nested NMI of linux/nest_plugin, with its IRETs and the stores into the NMI stack."""
    text = gzip.decompress((DATA / "linux/nest_plugin_mon_tss_idt.txt.gz").read_bytes())
    layout = qemu_monitor.parse(text, "mon_tss_idt.txt").layout().with_stacks()
    return open_input(str(DATA / "linux/nest_plugin_excerpt.log.gz"), options=ReaderOptions(layout=layout))


def check_nest_plugin(trace: Trace) -> None:
    """A frame overwritten and repaired by the kernel's protocol; nothing else, whatever the other IRETs pop.

    There is no window either: when the first int3's IRET unblocks NMIs, the kernel's copies of the frame stand below it.
    """
    (found,) = truth.findings(trace)
    assert truth.verdict(found, trace) == repaired(3030, 3033, LINUX_FRAME)
    assert rules.finding_evidence(found).name == "RECORDED"
    assert (found.settled_by, found.cause) == (Settle.COPY, Cause.NMI_UNBLOCKED)
    # Two IRETs stand between the NMIs, those of the kprobe's two int3 (3031, 3032); the first of them let the second NMI in.
    assert found.victim is not None and found.writer is not None and found.settled is not None
    between = [e.index for e in truth.events(trace, Kind.RETURN) if found.victim.entry < e.index < found.writer.entry]
    assert (len(between), found.cause_event) == (2, between[0])
    # The NMI handler of Linux returns through its copy of the frame.
    last = trace.event(found.settled)
    assert last.rsp == LINUX_FRAME[0] - NMI_COPY
    popped = truth.comparable(last.addr, last.cs, last.rflags, last.value, last.ss)
    assert popped == truth.predicted(found.victim.saved)


def test_the_nmi_protocol_of_linux_is_a_note() -> None:
    with open_excerpt() as trace:
        check_nest_plugin(trace)


def test_without_its_stores_the_copy_of_linux_is_not_seen_and_the_window_is_open() -> None:
    with open_excerpt() as trace:
        records = [bytes(trace.events[64 * n : 64 * n + 64]) for n in range(trace.count)]
        kept = [n for n in range(trace.count) if trace.event(n).kind is not Kind.WRITE]
        (closed,) = truth.findings(trace)

        def fill(writer: TraceWriter) -> None:
            writer.layout = trace.layout
            writer.append(b"".join(records[n] for n in kept))

        with build(fill, cpus=trace.cpus) as bare:
            opened = truth.findings(bare)[0]
            assert truth.verdict(opened, bare) == window(3030, LINUX_FRAME)
            assert opened.cause is Cause.NMI_UNBLOCKED
            assert kept[opened.event] == closed.cause_event


# -- large recordings ---------------------------------------------------------------------------------------------------------


def scan(trace: Trace) -> Stats:
    with Replay(trace) as replay:
        replay.scan_all()
        return replay.stats()


def settled_by_hand(events: list[Event], tops: dict[int, int]) -> Counter[str]:
    """Why each NMI frame of a log without returns is known to be done with, from the first line that shows it.

    Slow and by the book: per CPU the one frame at the top of its NMI stack, and each later line of that CPU.
    """
    reasons: Counter[str] = Counter()
    waiting: dict[int, Event] = {}
    for event in events:
        nmi, top = waiting.get(event.cpu), tops[event.cpu]
        on_nmi_stack = top - 4096 < event.rsp <= top
        if nmi is not None:
            reason = None
            if event.cs & 3:
                reason = "CPL3"
            elif on_nmi_stack:
                reason = "POPPED" if event.rsp > top - 40 else None
            elif (nmi.rip, nmi.rsp) == (event.rip, event.rsp):
                reason = "CONTEXT"
            elif (nmi.rsp - 1) >> 14 == (event.rsp - 1) >> 14 and event.rsp >= nmi.rsp:
                reason = "ABOVE"
            elif event.rflags & 0x200:
                reason = "IF"
            if reason is not None:
                reasons[reason] += 1
                del waiting[event.cpu]
        if event.arg == 2:
            assert event.cpu not in waiting, f"#{event.source_index} would overwrite a frame in use"
            waiting[event.cpu] = event
    reasons["open"] = len(waiting)
    return reasons


def test_l2_has_57_nmis_and_every_reuse_of_their_stack_is_settled(
    shared: Path, run_cli: Callable[..., CompletedText]
) -> None:
    path = shared / "qemu/linux/l2/qemu.log.gz"
    assert len(re.findall(rb": v=02 ", gzip.decompress(path.read_bytes()))) == 57
    with open_input(str(path)) as trace:
        got = list(truth.events(trace, Kind.DELIVER))
        tops = {cpu: trace.layout.tss[cpu].ist[2] or 0 for cpu in (0, 1)}
        assert truth.findings(trace) == ()
        stats = scan(trace)
    assert trace.cpus == 2
    assert trace.meta["counts"]["torn_repaired"] == 23
    assert stats.ist_deliveries == (66479, 0, 57, 0, 0, 0, 0, 0)
    settled = {s.name: n for s, n in zip(Settle, stats.settled, strict=True) if n}
    assert settled == {"CONTEXT": 28, "ABOVE": 9, "IF": 10, "CPL3": 10}
    assert stats.open_at_end == 0
    by_hand = settled_by_hand(got, tops)
    assert by_hand == {**settled, "open": 0}
    said = " ".join(run_cli("replay", "-v", path, code=0).stdout.split())
    assert "on IST stacks: IST2 57" in said
    assert "settled by: context seen again 28, RSP seen above the saved one 9, IF=1 code ran off its stack 10, CPU" in said
    assert "CPU ran at CPL 3 10 " in said
    assert said.endswith("verdict: clean")


def test_irets_to_self_and_irets_of_words_of_other_stores_raise_nothing_on_linux(shared: Path) -> None:
    with open_input(str(shared / "qemu/linux/nest_plugin/qemu.log.gz")) as trace:
        check_nest_plugin(trace)
        frames = truth.placed_frames(trace)
        memory: dict[int, int] = {}  # what the last recorded push or store left, by address; what was never stored is missing
        seen: Counter[str] = Counter()
        for index in range(trace.count):
            event = trace.event(index)
            if index in frames:
                frame = frames[index]
                words = truth.predicted(frame.saved)
                memory |= {frame.rip_addr + 8 * n: word for n, word in enumerate(words)}
                if frame.has_code:
                    memory[frame.lo] = frame.saved.code or 0
            elif event.kind is Kind.WRITE:
                address, shift = event.addr & ~7, 8 * (event.addr & 7)
                mask = (1 << 8 * event.arg) - 1 << shift
                memory[address] = memory.get(address, 0) & ~mask | event.value << shift & mask
            elif event.kind is Kind.RETURN:
                popped = truth.comparable(event.addr, event.cs, event.rflags, event.value, event.ss)
                stored = [memory.get(event.rsp + 8 * n) for n in range(5)]
                seen["returns"] += 1
                # To self: a frame pushed by hand (sync_core) that returns to the instruction after the 2-byte IRETQ, RSP
                # above the frame.
                to_self = (event.addr, event.value) == (event.rip + 2, event.rsp + 40)
                seen["to self"] += to_self
                assert to_self == (event.addr == event.rip + 2)
                if any(a is not None and a != b for a, b in zip(stored, popped, strict=True)):
                    # A store that was not recorded (outside the watched range) replaced words of a delivery.
                    seen["other stores"] += 1
                elif stored == list(popped):
                    seen["as stored"] += 1
                elif all(word is None for word in stored):
                    seen["never stored"] += 1
    assert seen == {
        "returns": 146_513,
        "to self": 100_906,
        "other stores": 57_285,
        "as stored": 43_765,
        "never stored": 45_463,
    }


def test_smprace_is_clean_and_its_last_frames_are_in_ram(shared: Path) -> None:
    folder = shared / "qemu/istlab/smprace_ud_ipi"
    serial = (folder / "serial.txt").read_text()
    with open_inputs(logs(folder)) as trace:
        assert truth.findings(trace) == ()
        stats = scan(trace)
        got = truth.deliveries(trace)
    assert len(got) == stats.judged == 40626
    assert stats.ist_deliveries[2] == sum(stats.settled) == 626
    nmis = [d for d in got if d.event.source is Source.NMI]
    # The guest's count is that of CPU 0.
    counted = re.search(r"NMI count=(\w+)", serial)
    assert counted is not None
    assert Counter(d.event.cpu for d in nmis) == {0: int(counted[1], 16), 1: 313}
    memory = truth.ram(folder / "mem_02_final.bin")
    tops = truth.stack_tops(serial)
    for stack in ("nmi", "nmi1"):
        frame = truth.newest_on(got, tops[stack])
        assert frame is not None
        assert truth.frame_at(memory, frame.rip_addr) == truth.predicted(frame.saved)
    assert all(untouched(memory, top) for stack, top in tops.items() if not stack.startswith("nmi") if top - 8 in memory)


@pytest.mark.parametrize(
    ("name", "dump", "judged", "on_ist"),
    [
        ("linux-boot/smp1-boot.log.zst", "linux-boot/smp1-nmi_user", 3505, {}),
        ("linux-boot/smp1-mce_srao_b.log.gz", "linux-boot/smp1-mce_srao_b", 24, {4: 1}),
        ("linux-boot/smp1-nmi_user.log.gz", "linux-boot/smp1-nmi_user", 552, {2: 2}),
        ("linux-boot/smp2-int+apic-trace-timestamps.log.gz", "linux-boot/smp2-idle", 20, {2: 1, 4: 2}),
        ("linux-boot/smp2-stress-pagefaults.log.zst", "linux-boot/smp2-idle", 53528, {2: 1, 4: 2}),
        ("xen-boot/smp1-boot.log.zst", "xen-boot/smp1-idle", 34804, {2: 2}),
        ("xen-boot/smp1-nmi2quick.log.gz", "xen-boot/smp1-nmi2quick", 123, {2: 2}),
    ],
)
def test_whole_boots_are_clean(shared: Path, name: str, dump: str, judged: int, on_ist: dict[int, int]) -> None:
    layout = layout_of_dump(shared / "qemu" / f"{dump}.dump.json")
    path = str(shared / "qemu" / name)
    with open_input(path, options=ReaderOptions(layout=layout)) as trace:
        assert truth.findings(trace) == ()
        stats = scan(trace)
        # Every frame on an IST stack was seen to be done with before the end.
        assert sum(stats.settled) == sum(on_ist.values())
    assert stats.judged == judged
    assert {n: count for n, count in enumerate(stats.ist_deliveries) if n and count} == on_ist
    with open_input(path, options=ReaderOptions(discover=False)) as trace:
        assert truth.findings(trace) == ()


def test_every_boot_log_is_in_the_table(shared: Path) -> None:
    marks = [m for m in test_whole_boots_are_clean.pytestmark if m.name == "parametrize"]  # type: ignore[attr-defined]
    present = {f"{p.parent.name}/{p.name}" for p in (shared / "qemu").glob("*-boot/*.log.*")}
    assert present == {row[0] for row in marks[0].args[1]}


@pytest.mark.parametrize(
    ("name", "code"),
    [  # 3: no layout is there, so that nothing can be judged; 0: there is nothing to judge (32-bit code, real mode)
        ("eventinj.log", 3),
        ("eventinj_plugin.log", 3),
        ("i386_eventinj.log", 0),
        ("ioapic.log", 3),
        ("realmode.log", 0),
        ("smptest.log", 3),
        ("syscall_plugin.log", 3),
        ("umip.log", 3),
        ("vmexit_ipi_halt.log.gz", 3),
    ],
)
def test_logs_of_public_tests_are_read_to_the_end(
    shared: Path, run_cli: Callable[..., CompletedText], name: str, code: int
) -> None:
    path = shared / "qemu/kvm-unit-tests" / name
    done = run_cli("replay", path, code=code)
    assert "Traceback" not in done.stderr
    with open_input(str(path)) as trace:
        assert truth.findings(trace) == ()
        raw = path.read_bytes()
        lines = re.findall(rb"^ *\d+: v=", gzip.decompress(raw) if path.suffix == ".gz" else raw, re.M)
        assert sum(1 for _ in truth.events(trace, Kind.DELIVER)) == len(lines)
