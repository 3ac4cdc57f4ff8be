"""The construct declarations, the C structs and the Python enums say the same."""

from __future__ import annotations

import enum
import struct

import pytest

from tracedbg import state, wire
from tracedbg._core import ffi, lib
from tracedbg.layout import REGION_READS, REGION_STACK, REGION_STORES, REGION_USER, Fidelity


def construct_fields(layout) -> list[tuple[str, int, int]]:
    at, result = 0, []
    for part in layout.subcons:
        result.append((part.name, at, part.sizeof()))
        at += part.sizeof()
    return result


def c_fields(name: str) -> list[tuple[str, int, int]]:
    return [(field, f.offset, ffi.sizeof(f.type)) for field, f in ffi.typeof(name).fields]


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (wire.EVENT, "struct tdb_event"),
        (wire.GATE, "struct tdb_gate"),
        (wire.IDT, "struct tdb_idt"),
        (wire.TSS, "struct tdb_tss"),
        (wire.CPU_LAYOUT, "struct tdb_cpu_layout"),
        (wire.FRED, "struct tdb_fred"),
        (wire.REGION, "struct tdb_region"),
    ],
)
def test_construct_and_c_agree_field_by_field(layout, name: str) -> None:
    assert construct_fields(layout) == c_fields(name)
    assert layout.sizeof() == ffi.sizeof(name)


def test_packer_and_construct_agree() -> None:
    values = list(range(1, 17))
    names = [part.name for part in wire.EVENT.subcons]
    assert wire.EVENT_PACK.pack(*values) == wire.EVENT.build(dict(zip(names, values, strict=True)))
    assert wire.EVENT_PACK.size == wire.EVENT_SIZE == wire.EVENT.sizeof() == 64
    assert [struct.calcsize("<" + code) for code in "QQQQQIIIHHHHBBBB"] == [part.sizeof() for part in wire.EVENT.subcons]


def c_enum(name: str, prefix: str) -> dict[str, int]:
    return {key.removeprefix(prefix): int(value) for key, value in ffi.typeof(f"enum {name}").relements.items()}


@pytest.mark.parametrize(
    ("python", "name", "prefix"),
    [
        (state.Kind, "tdb_kind", "TDB_"),
        (state.Source, "tdb_source", "TDB_SRC_"),
        (state.Known, "tdb_known", "TDB_K_"),
        (state.EventFlag, "tdb_event_flag", "TDB_F_"),
        (state.Rule, "tdb_rule", "TDB_R_"),
        (state.Evidence, "tdb_evidence", "TDB_EV_"),
        (state.Cause, "tdb_cause", "TDB_CAUSE_"),
        (state.FrameStatus, "tdb_frame_status", "TDB_FRAME_"),
        (state.Settle, "tdb_settle", "TDB_SETTLE_"),
        (state.ShutdownReason, "tdb_shutdown", "TDB_SHUT_"),
        (state.Mismatch, "tdb_mismatch", "TDB_MM_"),
    ],
)
def test_enums_agree(python: type[enum.IntEnum], name: str, prefix: str) -> None:
    expected = c_enum(name, prefix)
    expected.pop("COUNT", None)
    assert {member.name: int(member) for member in python if member.name != "UNKNOWN" or "UNKNOWN" in expected} == expected


def test_region_kinds_and_fidelity_agree() -> None:
    assert c_enum("tdb_region_kind", "TDB_REGION_") == {
        "STACK": REGION_STACK,
        "USER": REGION_USER,
        "STORES": REGION_STORES,
        "READS": REGION_READS,
    }
    assert c_enum("tdb_fidelity", "TDB_FID_") == {bit.name: bit for bit in Fidelity}


def test_stats_slots_are_the_struct() -> None:
    assert list(state.Stats.__slots__) == [name for name, _ in ffi.typeof("struct tdb_stats").fields]
    settled = dict(ffi.typeof("struct tdb_stats").fields)["settled"].type
    assert settled.length == len(state.Settle) == lib.TDB_SETTLE_COUNT
