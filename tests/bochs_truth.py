"""What a recorded CPU model says of itself against what the replay says of the trace made of it.

Frames, memory and state of the CPUs; bochs_verdicts.py has the findings. Every function returns the differences in
words; an empty list is agreement. Event numbers are those of the recording. Deviations of the model from the manual are
named where they are excepted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bochs import RETURNS, Scenario
from bochs_layout import Record, length, number

from tracedbg import x86
from tracedbg.replay import Replay
from tracedbg.state import CpuState, Kind

SLOTS = ("rip", "cs", "rflags", "rsp", "ss")
MASKS = ((1 << 64) - 1, 0xFFFF, 0xFFFFFFFF & ~x86.RFLAGS_RF, (1 << 64) - 1, 0xFFFF)  # RF: debuggers and CPUs differ in it
FRED_SIZE = 64
FRED_UNKNOWN = {5 * 8 + 7: 1, **{2 * 8 + n: 1 for n in range(3, 8)}}  # bytes of a FRED frame that the replay leaves open


def source_number(scenario: Scenario, index: int | None) -> int | None:
    """The recording's number of an event of the trace."""
    return None if index is None else scenario.trace.event(index).source_index


# -- frames --------------------------------------------------------------------------------------------------------------


def frames(scenario: Scenario) -> list[str]:
    """Address range, vector, CPU and saved context of every frame, and the state in which its handler begins."""
    wrong: list[str] = []
    with Replay(scenario.trace) as replay:
        for truth in scenario.truth["frames"]:
            entry = truth["entry"]
            index = scenario.index[entry]
            replay.seek(index + 1)
            frame = replay.last_frame()
            if truth["aborted"]:
                _check(wrong, entry, "frame of an aborted delivery", frame, None)
                continue
            if entry not in scenario.entered:
                continue  # the recording ends inside the delivery
            if frame is None:
                wrong.append(f"{entry}: no frame, {truth['frame']} is one")
                continue
            enter = scenario.trace.event(scenario.entered[entry])
            lo, hi = (number(a) for a in truth["frame"]) if truth["size"] else (enter.rsp, frame.hi)
            _check(wrong, entry, "frame", (hex(frame.lo), hex(frame.hi)), (hex(lo), hex(hi)))
            _check(wrong, entry, "vector, CPU", (frame.vector, frame.cpu), (truth["vec"], truth["cpu"]))
            saved = {name: getattr(frame.saved, name) for name in SLOTS}
            _check(wrong, entry, "context", saved, {name: number(truth["interrupted"][name]) for name in SLOTS})
            if truth["err"] is not None:
                _check(wrong, entry, "error code", frame.saved.code, truth["err"])
            after = replay.cpu(truth["cpu"])
            for name in ("rip", "rsp", "cs", "ss", "rflags"):
                value = getattr(after, name)
                if value is None and frame.fred and truth["interrupted"]["cpl"]:
                    continue  # CS and SS of a FRED handler come from STAR, which need not be recorded
                _check(wrong, entry, f"{name} of the handler", value, getattr(enter, name))
    return wrong


def _check(wrong: list[str], at: int, what: str, found: Any, truth: Any) -> None:
    if found != truth:
        wrong.append(f"{at}: {what}: replay {found}, CPU {truth}")


# -- memory --------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Byte:
    """A byte of memory; value None: not known. writer: the store, or the delivery that it belongs to."""

    value: int | None
    writer: int


def memory(scenario: Scenario) -> list[str]:
    """Every logged byte and who wrote it, after each store; every load finds what the replay holds; what returns pop."""
    wrong: list[str] = []
    bytes_: dict[int, Byte] = {}
    hidden: set[int] = set()  # shadow stacks: the atomic accesses are recorded, but not which of them store
    irets = {i["n"]: i for i in scenario.truth["irets"]}
    with Replay(scenario.trace) as replay:
        for record in scenario.records:
            n, kind = record["n"], record["e"]
            if kind == "x":
                hidden |= _span(record)
            elif kind == "deliver_begin":
                stores = [r for r in parts_of(scenario, n) if r["e"] == "w"]
                for r in stores:
                    _store(bytes_, r, n, known=True)
                replay.seek(scenario.index[n] + 1)
                for r in stores:
                    wrong += _compare(scenario, replay, bytes_, _span(r) - hidden, n)
            elif kind == "w" and "in" not in record:
                _store(bytes_, record, n, known=True)
                replay.seek(scenario.index[n] + 1)
                wrong += _compare(scenario, replay, bytes_, _span(record) - hidden, n)
            elif kind == "rw" and "in" not in record:
                wrong += _loaded(replay, bytes_, record, hidden)
                _store(bytes_, record, n, known=False)
                replay.seek(scenario.index[n] + 2)
                wrong += _compare(scenario, replay, bytes_, _span(record) - hidden, n)
            elif kind == "r":
                wrong += _loaded(replay, bytes_, record, hidden)
            elif kind == "insn_begin" and record["op"] in RETURNS:
                replay.seek(scenario.index[n])
                if n in irets:
                    wrong += _popped(scenario, replay, irets[n], hidden)
        replay.seek(scenario.trace.count)
        wrong += _compare(scenario, replay, bytes_, set(bytes_) - hidden, -1)
        for region in scenario.layout["logged_regions"]:
            lo, hi = number(region["lo"]), number(region["hi"])
            for word in replay.words(lo, hi):
                extra = [b for b in range(8) if word.known >> b & 1 and word.addr + b not in bytes_]
                if extra and not hidden & set(range(word.addr, word.addr + 8)):
                    wrong.append(f"end: nothing stored at {word.addr:#x} that the replay knows")
    return wrong


def rip_address(frame: Record) -> int:
    """The address of a frame's RIP slot."""
    lo, hi = (number(a) for a in frame["frame"])
    return hi - (56 if hi - lo == FRED_SIZE else 40)


def _span(record: Record) -> set[int]:
    return set(range(number(record["lin"]), number(record["lin"]) + length(record)))


def parts_of(scenario: Scenario, owner: int) -> Iterator[Record]:
    """The accesses that belong to a delivery or an instruction; they follow it, before the next of its CPU."""
    begin = scenario.by_number[owner]
    n = owner + 1
    while (record := scenario.by_number.get(n)) is not None:
        if record.get("in", record.get("ininsn")) == owner:
            yield record
        elif record["cpu"] == begin["cpu"] and record["e"] in ("deliver_begin", "insn_begin", "insn_end"):
            return
        n += 1


def _store(bytes_: dict[int, Byte], record: Record, writer: int, *, known: bool) -> None:
    at, size, value = number(record["lin"]), length(record), number(record["val"])
    cut = size > 8 and len(str(record["val"])) <= 18  # a recording of 64 bits only
    for b in range(size):
        bytes_[at + b] = Byte(value >> 8 * b & 0xFF if known and not cut else None, writer)


def _compare(scenario: Scenario, replay: Replay, bytes_: dict[int, Byte], span: set[int], at: int) -> list[str]:
    wrong: list[str] = []
    for a in sorted(span):
        truth = bytes_[a]
        words = replay.words(a, a + 1)
        b = a & 7
        if not words:
            wrong.append(f"{at}: nothing known at {a:#x}")
            continue
        known = bool(words[0].known >> b & 1)
        value = words[0].value >> 8 * b & 0xFF
        writer = source_number(scenario, words[0].writers[b])
        if writer != truth.writer:
            wrong.append(f"{at}: writer of {a:#x}: replay {writer}, CPU {truth.writer}")
        if known and truth.value is not None and value != truth.value:
            wrong.append(f"{at}: byte {a:#x}: replay {value:#x}, CPU {truth.value:#x}")
        if not known and truth.value is not None and not _left_open(scenario, truth.writer, a):
            wrong.append(f"{at}: byte {a:#x} is not known to the replay")
    return wrong


def _left_open(scenario: Scenario, writer: int, address: int) -> bool:
    """Bytes of a FRED frame that help/replay.md leaves unknown: flags of the event and of the interrupted context."""
    stores = [number(r["lin"]) for r in parts_of(scenario, writer) if r["e"] == "w" and "in" in r]
    if not scenario.layout.get("fred") or not stores:
        return False
    complete = len(stores) == FRED_SIZE // 8 or writer not in scenario.entered
    return complete and address - (max(stores) + 8 - FRED_SIZE) in FRED_UNKNOWN


def _loaded(replay: Replay, bytes_: dict[int, Byte], record: Record, hidden: set[int]) -> list[str]:
    """A load against the model of this file (is the recording itself whole?) and against the replay."""
    wrong: list[str] = []
    at, value = number(record["lin"]), number(record["val"])
    if length(record) > 8 and len(str(record["val"])) <= 18:
        return wrong
    for a in sorted(_span(record) - hidden):
        read = value >> 8 * (a - at) & 0xFF
        known = bytes_.get(a)
        if known is not None and known.value is not None and known.value != read:
            wrong.append(f"{record['n']}: the recording reads {read:#x} at {a:#x}, where {known.value:#x} was stored")
        words = replay.words(a, a + 1)
        if words and words[0].known >> (a & 7) & 1 and words[0].value >> 8 * (a & 7) & 0xFF != read:
            wrong.append(f"{record['n']}: load of {a:#x}: replay {words[0].value >> 8 * (a & 7) & 0xFF:#x}, CPU {read:#x}")
    return wrong


def _popped(scenario: Scenario, replay: Replay, iret: Record, hidden: set[int]) -> list[str]:
    """The slots that a return read: their writers by provenance, and the values in the event."""
    wrong: list[str] = []
    event = scenario.trace.event(scenario.index[iret["n"]])
    values = dict(zip(SLOTS, (event.addr, event.cs, event.rflags, event.value, event.ss), strict=True))
    first = event.rsp + (0 if iret["op"] == "iretq" else 8)
    for slot in iret["slots"]:
        at = number(slot["lin"])
        name = SLOTS[(at - first) // 8]
        mask = MASKS[SLOTS.index(name)] | (x86.RFLAGS_RF if name == "rflags" else 0)
        if values[name] != number(slot["val"]) & mask:
            wrong.append(f"{iret['n']}: popped {name}: event {values[name]:#x}, CPU {slot['val']}")
        if at in hidden or slot["writer_kind"] not in ("delivery", "software"):
            continue
        words = replay.words(at, at + 8)
        writer = source_number(scenario, words[0].writers[0]) if words else None
        truth = slot["writer_entry"] if slot["writer_kind"] == "delivery" else slot["written_by"]
        _check(wrong, iret["n"], f"writer of the popped {name}", writer, truth)
    return wrong


# -- state ---------------------------------------------------------------------------------------------------------------


def states(scenario: Scenario) -> list[str]:
    """Registers, NMI blocking, stack level and TSS of a CPU where the recording tells them."""
    wrong: list[str] = []
    with Replay(scenario.trace) as replay:
        for record in scenario.records:
            n, cpu, kind = record["n"], record["cpu"], record["e"]
            if kind == "deliver_begin":
                replay.seek(scenario.index[n])
                if record["type"] != "nmi":  # what stands before an NMI is "not blocked" by definition
                    _masking(wrong, n, replay.cpu(cpu), record["before"])
                _pointers(wrong, scenario, replay, record)
            elif kind == "deliver_end":
                replay.seek(scenario.entered[record["of"]] + 1)
                _state(wrong, n, replay.cpu(cpu), record["after"])
            elif kind == "insn_end" and record["op"] in RETURNS and not record["faulted"]:
                replay.seek(scenario.index[record["begin"]] + 1)
                state = replay.cpu(cpu)
                if not state.smm:
                    _state(wrong, n, state, record["after"])
            elif kind == "insn_end" and record["op"] == "rsm" and record["begin"] in scenario.index:
                replay.seek(scenario.index[record["begin"]] + 1)
                after = scenario.trace.event(min(scenario.index[record["begin"]] + 1, scenario.trace.count - 1))
                if after.kind is not Kind.UNBLOCK:  # RSM of this model unblocks NMIs (cpu/smm.cc), against SDM 34.8
                    _masking(wrong, n, replay.cpu(cpu), record["after"])
    return wrong


def _state(wrong: list[str], at: int, state: CpuState, truth: Record) -> None:
    for name in ("rip", "rsp", "cs", "ss"):
        value = getattr(state, name)
        if value is None:
            wrong.append(f"{at}: {name} is not known to the replay")
        else:
            _check(wrong, at, name, value, number(truth[name]))
    if state.rflags is not None:  # VM and reserved bits of what was popped stay as they are
        _check(wrong, at, "IF", bool(state.rflags & x86.RFLAGS_IF), bool(number(truth["rflags"]) & x86.RFLAGS_IF))
    _masking(wrong, at, state, truth)
    if state.fred and state.csl is not None:
        _check(wrong, at, "stack level", state.csl, truth["csl"])


def _masking(wrong: list[str], at: int, state: CpuState, truth: Record) -> None:
    if state.nmi_blocked is not None:
        _check(wrong, at, "NMIs blocked", state.nmi_blocked, bool(truth["nmi_blocked"]))
        if state.nmi_blocked:
            _check(wrong, at, "NMI pending", state.nmi_pending, bool(truth["nmi_pending"]))


def _pointers(wrong: list[str], scenario: Scenario, replay: Replay, record: Record) -> None:
    """The TSS pointers that a delivery reads are those that the replay holds."""
    tss = replay.tss(record["cpu"])
    for r in parts_of(scenario, record["n"]):
        if tss is None or r["e"] != "r" or length(r) != 8:
            continue
        offset = number(r["lin"]) - tss.base
        if offset in (4, 12, 20):
            _check(wrong, record["n"], "TSS.RSP", tss.rsp[(offset - 4) // 8], number(r["val"]))
        elif offset in range(0x24, 0x5C, 8):
            _check(wrong, record["n"], "TSS.IST", tss.ist[(offset - 0x24) // 8 + 1], number(r["val"]))
