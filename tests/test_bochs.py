"""A real CPU model as judge: recorded runs of Bochs against the replay of the traces made of them.

`pytest --bochs DIR` takes every scenario below DIR (folders with events.jsonl, layout.json, truth.json).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import bochs
import bochs_truth
import bochs_verdicts
import pytest

from tracedbg.layout import CpuTables, Fidelity, Gate, Idt, Layout, Region, Tss
from tracedbg.replay import Replay
from tracedbg.state import Kind, Rule, Source
from tracedbg.writer import TraceWriter, build

HERE = Path(__file__).resolve().parent


def folders(config: pytest.Config) -> list[Path]:
    """The scenarios to run: those of --bochs, else the committed ones and those of the recorded data."""
    chosen = config.getoption("--bochs")
    if chosen:
        roots = [Path(chosen)]
    else:
        data = Path(os.environ.get("TRACEDBG_DATA") or HERE.parent.parent / "shared" / "data")
        roots = [HERE / "data" / "bochs", data / "bochs"]
    found = {}
    for root in roots:
        for path in sorted(root.rglob("events.jsonl")):
            found[str(path.parent.relative_to(root))] = path.parent
    if chosen and not found:
        raise pytest.UsageError(f"--bochs: no scenario below {chosen}")
    return list(found.values())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test of each kind for each scenario."""
    if "folder" in metafunc.fixturenames:
        params = []
        for folder in folders(metafunc.config):
            params.append(pytest.param(folder, id=folder.name))
        metafunc.parametrize("folder", params)


@lru_cache(maxsize=4)
def scenario(folder: Path) -> bochs.Scenario:
    """Read once for all tests of a scenario."""
    return bochs.load(folder)


def test_frames(folder: Path) -> None:
    """Address range, vector and saved context of every frame."""
    assert bochs_truth.frames(scenario(folder)) == []


def test_memory(folder: Path) -> None:
    """Every logged byte and its writer; what loads and returns read."""
    assert bochs_truth.memory(scenario(folder)) == []


def test_states(folder: Path) -> None:
    """Registers, NMI blocking, FRED level and TSS pointers."""
    assert bochs_truth.states(scenario(folder)) == []


def test_verdicts(folder: Path) -> None:
    """Overwritten ranges and slots, consumption, wrong returns: all of them and no others."""
    assert bochs_verdicts.verdicts(scenario(folder)) == []


# -- the judge itself: a recording that was tampered with does not pass ------------------------------------------------------

COMMITTED = HERE / "data" / "bochs"
Tamper = Callable[[dict[str, Any]], None]


def _frame_lower(truth: dict[str, Any]) -> None:
    truth["frames"][0]["frame"][0] = hex(int(truth["frames"][0]["frame"][0], 16) - 8)


def _other_context(truth: dict[str, Any]) -> None:
    truth["frames"][0]["interrupted"]["rsp"] = "0x23fff0"


def _other_vector(truth: dict[str, Any]) -> None:
    truth["frames"][1]["vec"] = 4


def _other_writer(truth: dict[str, Any]) -> None:
    next(i for i in truth["irets"] if i["n"] == 86)["slots"][0]["writer_entry"] = 34


def _other_value(truth: dict[str, Any]) -> None:
    next(i for i in truth["irets"] if i["n"] == 86)["slots"][0]["val"] = "0x10121c"


def _not_overwritten(truth: dict[str, Any]) -> None:
    for frame in truth["frames"]:
        frame["overwritten"] = []


def _one_byte_less(truth: dict[str, Any]) -> None:
    over = next(f for f in truth["frames"] if f["overwritten"])["overwritten"][0]
    over["bytes"] = [["0x2c7fe0", "0x2c8000"]]


def _another_slot(truth: dict[str, Any]) -> None:
    next(f for f in truth["frames"] if f["overwritten"])["overwritten"][0]["changed"].append("0x2c7fe0")


def _by_another(truth: dict[str, Any]) -> None:
    next(f for f in truth["frames"] if f["overwritten"])["overwritten"][0]["by_entry"] = 10


def _resumed(truth: dict[str, Any]) -> None:
    next(f for f in truth["frames"] if f["overwritten"])["closed_by"] = None


@pytest.mark.parametrize(
    ("compare", "tamper"),
    [
        (bochs_truth.frames, _frame_lower),
        (bochs_truth.frames, _other_context),
        (bochs_truth.frames, _other_vector),
        (bochs_truth.memory, _other_writer),
        (bochs_truth.memory, _other_value),
        (bochs_verdicts.verdicts, _not_overwritten),
        (bochs_verdicts.verdicts, _one_byte_less),
        (bochs_verdicts.verdicts, _another_slot),
        (bochs_verdicts.verdicts, _by_another),
        (bochs_verdicts.verdicts, _resumed),
    ],
)
def test_tampered_truth_is_seen(compare: Callable[[bochs.Scenario], list[str]], tamper: Tamper) -> None:
    """Each part of truth.json is compared: a changed one is a difference."""
    told = bochs.load(COMMITTED / "mp1_two_cpus_own_ist")
    assert compare(told) == []
    told.truth = copy.deepcopy(told.truth)
    tamper(told.truth)
    assert compare(told) != []


@pytest.mark.parametrize(
    ("compare", "number", "name", "value"),
    [
        (bochs_truth.memory, 63, "val", "0x9"),  # a stored word of a frame
        (bochs_truth.memory, 66, "val", "0x2"),  # a word that software stores and pops again
        (bochs_truth.states, 65, "after", {"nmi_blocked": 0}),
        (bochs_truth.states, 80, "after", {"rsp": "0x2c7fc0"}),
    ],
)
def test_tampered_records_are_seen(compare: Callable[[bochs.Scenario], list[str]], number: int, name: str, value: Any) -> None:
    """The replay is compared with the records, not the records with themselves."""
    told = bochs.load(COMMITTED / "mp1_two_cpus_own_ist")
    record = told.by_number[number]
    record[name] = {**record[name], **value} if isinstance(value, dict) else value
    assert compare(told) != []


# -- what recordings of this kind taught ------------------------------------------------------------------------------------


def test_an_ist_reset_is_not_the_victims_context() -> None:
    """INT 65 (IST3), NMI (IST2), INT 65 again, its handler interrupted: RSP is what the NMI saved, but the NMI's frame lives.

    Its context is not back: the third delivery reset the stack. So the fifth overwrites a live frame.
    """
    gates = {2: Gate(0x1000, ist=2), 64: Gate(0x2000), 65: Gate(0x3000, ist=3)}
    tss = Tss(0x187000, (0x230000, None, None), (None, None, 0x208000, 0x20C000, *(None,) * 4))
    stacks = tuple(Region(hi - 0x2000, hi, slot=slot) for hi, slot in ((0x208000, 2), (0x20C000, 3), (0x240000, 0)))

    def fill(writer: TraceWriter) -> None:
        writer.layout = Layout((tss,), (Idt(0x185000, gates),), (CpuTables(0, 0),), stacks, Fidelity.RETURNS)
        for vector, source, rip, rsp in (
            (65, Source.SOFT_INT, 0x500, 0x240000),
            (2, Source.NMI, 0x3000, 0x20BFD8),
            (65, Source.SOFT_INT, 0x1000, 0x207FD8),
            (64, Source.SOFT_INT, 0x3000, 0x20BFD8),
            (2, Source.SOFT_INT, 0x2000, 0x20BFA8),
        ):
            known = {"code": 2} if source is Source.SOFT_INT else {}
            writer.event(Kind.DELIVER, cpu=0, arg=vector, source=source, rip=rip, rsp=rsp, cs=8, ss=16, rflags=2, **known)

    with Replay(build(fill)) as replay:
        replay.scan_all()
        found = [
            (f.victim.entry, f.writer.entry)
            for f in replay.findings()
            if f.rule is Rule.FRAME_CLOBBERED and f.victim and f.writer
        ]
    assert found == [(0, 2), (1, 4)]
