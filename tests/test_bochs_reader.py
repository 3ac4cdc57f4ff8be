"""The reader of recorded CPU runs (tests/bochs.py): hand-made records and the events they have to become."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import bochs
import bochs_layout
import pytest

from tracedbg.errors import FormatError
from tracedbg.layout import Region
from tracedbg.state import EventFlag, Kind, Known, Source

COMMITTED = Path(__file__).resolve().parent / "data" / "bochs"

BLOCK = {
    "cs": 8,
    "rip": "0x1000",
    "ss": 16,
    "rsp": "0x240000",
    "rflags": "0x6",
    "cpl": 0,
    "nmi_blocked": 0,
    "nmi_pending": 0,
    "csl": 0,
}


def recording(folder: Path, *events: dict[str, Any], **layout: Any) -> bochs.Scenario:
    """A scenario of hand-made events; `st`, `before`, `after` add to BLOCK."""
    start = {"e": "start", "st": {}, "tss": "0x187000", "idt": "0x185000", "tr": 48}
    lines = []
    for n, event in enumerate((start, *events)):
        event = {"n": n, "cpu": 0, "tick": n, "insn": n, **event}
        for name in {"st", "before", "after"} & event.keys():
            event[name] = BLOCK | event[name]
        lines.append(json.dumps(event))
    folder.joinpath("events.jsonl").write_text("\n".join(lines) + "\n")
    data = json.loads((COMMITTED / "p1_copy_first_ok" / "layout.json").read_text()) | layout
    folder.joinpath("layout.json").write_text(json.dumps(data))
    folder.joinpath("truth.json").write_text("{}")
    return bochs.load(folder)


def kinds(told: bochs.Scenario) -> list[tuple[Kind, int]]:
    """Kind and event number of every event but the first, which says that NMIs are not blocked."""
    events = [told.trace.event(i) for i in range(told.trace.count)]
    assert events[0].kind is Kind.UNBLOCK
    return [(e.kind, e.source_index) for e in events[1:]]


def access(kind: str, lin: int, size: int, val: str, **more: Any) -> dict[str, Any]:
    return {"e": kind, "reg": "x", "lin": hex(lin), "len": size, "val": val, "rip": "0x1000", **more}


def insn(op: str, begin: int, after: dict[str, Any], **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A recorded instruction without accesses; `begin` is its event number."""
    return (
        {"e": "insn_begin", "op": op, "before": {}, **more},
        {"e": "insn_end", "op": op, "begin": begin, "faulted": False, "after": after},
    )


def test_an_nmi_is_raised_once(tmp_path: Path) -> None:
    """A pin that is seen pending later is one request; a second one while the first is latched is another."""
    blocked = {"nmi_blocked": 1}
    told = recording(
        tmp_path,
        {"e": "inject", "kind": 1, "st": blocked},
        {"e": "mark", "v": 1, "st": {**blocked, "nmi_pending": 1}},
        {"e": "inject", "kind": 1, "st": {**blocked, "nmi_pending": 1}},
        {"e": "mark", "v": 2, "st": {**blocked, "nmi_pending": 1}},
    )
    assert kinds(told) == [(Kind.RAISE, 1), (Kind.MARK, 2), (Kind.RAISE, 3), (Kind.MARK, 4)]


def test_a_latched_nmi_is_raised_where_it_appears(tmp_path: Path) -> None:
    told = recording(
        tmp_path,
        {"e": "mark", "v": 1, "st": {"nmi_blocked": 1}},
        {"e": "mark", "v": 2, "st": {"nmi_blocked": 1, "nmi_pending": 1}},
    )
    assert kinds(told) == [(Kind.MARK, 1), (Kind.RAISE, 2), (Kind.MARK, 2)]


def test_rsm_that_unblocks_says_so(tmp_path: Path) -> None:
    """This model unblocks NMIs at RSM though they were blocked before the SMI; the trace holds that as an event."""
    told = recording(tmp_path, {"e": "inject", "kind": 3, "st": {"nmi_blocked": 1}}, *insn("rsm", 2, {}))
    assert kinds(told) == [(Kind.SMI, 1), (Kind.RSM, 2), (Kind.UNBLOCK, 3)]
    assert told.trace.event(told.index[2]).flags & EventFlag.SMM == 0  # RSM is the end of it


def test_flags_and_shadow(tmp_path: Path) -> None:
    """STI with IF clear covers one instruction; POPFQ does not."""
    enabled = {"rflags": "0x206", "rip": "0x1001"}
    told = recording(tmp_path, *insn("sti", 1, enabled), *insn("popfq", 3, enabled), *insn("swapgs", 5, {}))
    assert kinds(told) == [(Kind.FLAGS, 2), (Kind.SHADOW, 2), (Kind.FLAGS, 4), (Kind.GS, 6)]
    assert told.trace.event(2).rip == 0x1001


def test_stores(tmp_path: Path) -> None:
    """A wide store goes into BYTES; of a read-modify-write only the old value is known, so the new one is not."""
    told = recording(
        tmp_path,
        access("w", 0x25F000, 16, "0x" + "11" * 8 + "22" * 8),
        access("rw", 0x25F000, 4, "0x7"),
        access("w", 0x25F010, 2, "0xabcd"),
    )
    assert kinds(told) == [(Kind.WRITE, 1), (Kind.READ, 2), (Kind.WRITE, 2), (Kind.WRITE, 3)]
    wide, _, after, short = (told.trace.event(i) for i in range(1, 5))
    assert bytes(told.trace.payload[wide.value : wide.value + wide.code]) == b"\x22" * 8 + b"\x11" * 8
    assert not after.known & Known.VALUE and after.arg == 4
    assert (short.arg, short.value) == (2, 0xABCD)


def test_the_tss_is_memory(tmp_path: Path) -> None:
    """A store over two slots of the TSS changes both: IST2 is at 0x2c, IST3 at 0x34 (SDM figure 7-11)."""
    told = recording(tmp_path, access("w", 0x187030, 8, "0x0020b00000000001"))
    events = [told.trace.event(i) for i in range(2, told.trace.count)]
    assert [(e.kind, e.arg, e.value) for e in events] == [(Kind.TSS, 10, 0x1_00208000), (Kind.TSS, 11, 0x20B000)]


def delivery(n: int, vec: int, kind: str, words: int, *, end: str, rip: str = "0x1002", **more: Any) -> list[dict[str, Any]]:
    """A delivery on IST2 that stores `words` words; `rip` is the saved one, the instruction stands at 0x1000."""
    begin = {
        "e": "deliver_begin",
        "vec": vec,
        "type": kind,
        "push_err": False,
        "err": 0,
        "ext": 0,
        "before": {"rip": rip},
        **more,
    }
    stores = [access("w", 0x207FF8 - 8 * i, 8, hex(i), **{"in": n}) for i in range(words)]
    last = {"e": end, "of": n, "by_vec": 14} if end == "deliver_abort" else {"e": end, "of": n, "after": {"rsp": "0x207fd8"}}
    return [begin, *stores, last]


def test_an_aborted_delivery_says_how_much_it_stored(tmp_path: Path) -> None:
    told = recording(tmp_path, *delivery(1, 2, "nmi", 3, end="deliver_abort"))
    event = told.trace.event(told.index[1])
    assert (event.flags, event.addr, event.source, event.rip) == (EventFlag.FAILED, 3, Source.NMI, 0x1002)


@pytest.mark.parametrize(
    ("kind", "rip", "source", "start", "code"),
    [
        ("soft", "0x1002", Source.SOFT_INT, 0x1000, 2),
        ("soft_exc", "0x1001", Source.SOFT_INT, 0x1000, 1),
        ("priv_soft", "0x1001", Source.SOFT_INT, 0x1000, 1),
        ("soft", "0x9002", Source.SOFT_INT, 0x9000, 2),  # its stores name another instruction: the usual length
        ("intr", "0x1002", Source.EXTERNAL, 0x1002, None),
        ("nmi", "0x1002", Source.NMI, 0x1002, None),
        ("exc", "0x1002", Source.EXCEPTION, 0x1002, None),
    ],
)
def test_sources(tmp_path: Path, kind: str, rip: str, source: Source, start: int, code: int | None) -> None:
    """Software's own interrupts save the address after the instruction; the event has its address and length."""
    told = recording(tmp_path, *delivery(1, 3, kind, 5, end="deliver_end", rip=rip))
    event = told.trace.event(told.index[1])
    assert (event.source, event.rip) == (source, start)
    assert (event.code if event.known & Known.CODE else None) == code


def test_shutdown_once(tmp_path: Path) -> None:
    told = recording(tmp_path, {"e": "shutdown"}, {"e": "end", "why": "shutdown", "st": {}})
    assert kinds(told) == [(Kind.SHUTDOWN, 1)]


def test_stacks_are_cut_at_the_tops_in_them(tmp_path: Path) -> None:
    """IST2 and IST7 in one region: what lies above IST2's top belongs to neither."""
    tss = {"base": "0x187000", "rsp0": "0x230000", "ist": {"2": "0x206400", "7": "0x206200"}}
    told = recording(tmp_path, tss=tss, stack_regions=[{"name": "ist2", "lo": "0x206000", "hi": "0x208000"}], logged_regions=[])
    regions = [r for r in told.trace.layout.regions if r.lo >= 0x206000 and r.hi <= 0x208000]
    assert regions == [
        Region(0x206000, 0x206200, slot=7),
        Region(0x206200, 0x206400, slot=2),
        Region(0x206400, 0x208000, slot=0),
    ]


@pytest.mark.parametrize(("kind", "found"), [("int", (14, 0)), ("trap", (15, 0)), ("int_dpl3", (14, 3)), ("trap_dpl3", (15, 3))])
def test_gate_types(kind: str, found: tuple[int, int]) -> None:
    gate = bochs_layout.gate_of({"vec": 3, "handler": "0x1000", "ist": 3, "type": kind}, 8)
    assert (gate.type, gate.dpl, gate.ist, gate.offset, gate.selector) == (*found, 3, 0x1000, 8)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"n": 1,', "offset 0x2: not JSON"),
        (b"[1]", "offset 0x2: no event of a recording"),
        (b'{"n": 1, "e": "deliver_begin", "cpu": 0, "tick": 1}', "not a recording of this kind"),
        (
            b'{"n": 1, "e": "w", "cpu": 0, "tick": 1, "lin": "x", "len": 8, "val": "0x0", "rip": "0x0"}',
            "not a recording of this kind",
        ),
    ],
)
def test_damaged_recordings(tmp_path: Path, line: bytes, message: str) -> None:
    """One line with the file and the place, no traceback."""
    for name in ("layout.json", "truth.json"):
        shutil.copy(COMMITTED / "p1_copy_first_ok" / name, tmp_path)
    tmp_path.joinpath("events.jsonl").write_bytes(b"\n\n" + line + b"\n")
    with pytest.raises(FormatError, match=message) as caught:
        bochs.load(tmp_path)
    assert caught.value.path == str(tmp_path / "events.jsonl")


def test_a_gate_changed_unseen(tmp_path: Path) -> None:
    """The delivery reads IST3 (TSS 0x34) and begins elsewhere than the layout says: the gate is told anew."""
    events = delivery(1, 2, "nmi", 5, end="deliver_end")
    events.insert(1, access("r", 0x187034, 8, "0x20c000", **{"in": 1}))
    events[-1]["after"]["rip"] = "0x4000"
    told = recording(tmp_path, *events)
    assert [kind for kind, _ in kinds(told)] == [Kind.GATE, Kind.DELIVER, Kind.ENTER]
    gate = told.trace.event(1)
    assert (gate.arg, gate.value, gate.cs, gate.code) == (2, 0x4000, 8, 0x8E03)  # present, type 14, IST 3


def test_a_faulting_sysret(tmp_path: Path) -> None:
    begin, end = insn("sysret", 1, {})
    told = recording(tmp_path, begin, {**end, "faulted": True})
    assert kinds(told) == [(Kind.SYSRET, 1)]
    assert told.trace.event(1).flags & EventFlag.FAULTED
