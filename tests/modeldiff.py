"""The C core beside the slow model: where they part, and the smallest list of events that shows it.

Run as a program with the words of a failure's "again" line it plays that plan once more.
"""

from __future__ import annotations

import ast
import dataclasses
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from model import Model, ModelFinding, ModelFrame, decode
from randtrace import Kernel, Plan, assembled

from tracedbg.layout import Layout
from tracedbg.replay import Replay
from tracedbg.state import EventFlag, Finding, Kind
from tracedbg.trace import Trace

TOP = (1 << 64) - 1
MODEL_OPTIONS = ("max_frames", "iret_fault_unblocks", "nmi_fail_blocks")
FINDING_FIELDS = [f.name for f in dataclasses.fields(ModelFinding) if f.name not in ("victim", "writer")]
SUBFRAME_FIELDS = (
    "entry", "cpu", "vector", "source", "ist", "lo", "hi", "gate_type", "has_code", "saved", "fred", "level", "from_level",
)  # fmt: skip
RAISED_FIELDS = (
    "raised_rule", "evidence", "cause", "cause_event", "cause_frame", "event", "cpu", "lo", "hi", "slots", "differ", "detail",
)  # fmt: skip
STATS_FIELDS = (
    "events", "deliveries", "judged", "unjudged", "legacy", "failed", "returns", "writes", "gaps", "bad_events",
)  # fmt: skip


@dataclass
class Difference:
    """The first thing in which model and core differ."""

    position: int
    lines: list[str]

    @property
    def key(self) -> str:
        """What differs, without numbers."""
        return re.sub(r"\d+|\(.*?\)", "", self.lines[0].split(": model")[0])

    def __str__(self) -> str:
        return "\n".join([f"at position {self.position}:", *self.lines])


class Disagreement(Exception):
    """Core and model differ on a plan."""

    def __init__(self, plan: Plan, difference: Difference) -> None:
        super().__init__(f"{plan}: {difference}")
        self.plan = plan
        self.difference = difference


# -- what differs -------------------------------------------------------------------------------------------------------


def show(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:#x}" if not hasattr(value, "name") else f"{value.name}"
    return str(value)


def diff(title: str, names: list[str] | tuple[str, ...], model: Any, core: Any) -> list[str]:
    lines = []
    for name in names:
        want, got = getattr(model, name), getattr(core, name)
        if want != got:
            lines.append(f"  {title} {name}: model {show(want)}, core {show(got)}")
    return lines


def field_names(item: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(item)]


def diff_lists(title: str, model: list[Any], core: list[Any], one: Callable[[str, Any, Any], list[str]]) -> list[str]:
    if model == core:
        return []
    for number, (want, got) in enumerate(zip(model, core, strict=False)):
        if lines := one(f"{title} {number}", want, got):
            return lines
    if len(model) != len(core):
        extra = (model if len(model) > len(core) else core)[min(len(model), len(core))]
        side = "model" if len(model) > len(core) else "core"
        return [f"  {title}s: model {len(model)}, core {len(core)}; only in {side}: {extra}"]
    return []


def finding_title(finding: ModelFinding) -> str:
    return f"finding {finding.number} ({finding.raised_rule.name} at event {finding.event})"


def diff_finding(title: str, want: ModelFinding, got: Finding) -> list[str]:
    title = finding_title(want)
    lines = diff(title, FINDING_FIELDS, want, got)
    for name in ("victim", "writer"):
        lines += diff_subframe(f"{title} {name}", getattr(want, name), getattr(got, name))
    return lines


def diff_subframe(title: str, want: ModelFrame | None, got: Any) -> list[str]:
    if want is None or got is None:
        return [] if want is None and got is None else [f"  {title}: model {want}, core {got}"]
    return diff(title, SUBFRAME_FIELDS if got.hi else SUBFRAME_FIELDS[:4], want, got)


def diff_view(model: Model, replay: Replay) -> list[str]:
    """Everything that can be seen at one position."""
    lines: list[str] = []
    for number in range(len(model.cpus)):
        want = model.cpu_state(number)
        lines += diff(f"cpu {number}", field_names(want), want, replay.cpu(number))
    frames = [f.state() for f in model.frames]
    words = model.word_list()
    lines += diff_lists("frame", frames, list(replay.frames()), lambda t, a, b: diff(f"{t} ({a.entry})", field_names(a), a, b))
    lines += diff_lists("word", words, list(replay.words(0, TOP)), lambda t, a, b: diff(f"{t} {a.addr:#x}", field_names(a), a, b))
    for want, got in zip(model.findings, replay.findings()[: replay.raised()], strict=False):
        title = finding_title(want)
        rules = model.rule_at(want, model.position), got.rule_at(model.position)
        if rules[0] != rules[1]:
            lines.append(f"  {title} rule at the position: model {rules[0].name}, core {rules[1].name}")
        lines += diff(title, RAISED_FIELDS, want, got)
        for name in ("victim", "writer"):
            lines += diff_subframe(f"{title} {name}", getattr(want, name), getattr(got, name))
    if replay.raised() != len(model.findings):
        extra = [finding_title(f) for f in model.findings[replay.raised() :]]
        extra += [f"only in the core: {f}" for f in replay.findings()[len(model.findings) : replay.raised()]]
        lines.append(f"  findings raised: model {len(model.findings)}, core {replay.raised()}; {extra[0]}")
    return lines


def diff_scan(model: Model, replay: Replay) -> list[str]:
    """What the whole scan found."""
    stats = replay.stats()
    lines = diff_lists("finding", model.findings, list(replay.findings()), diff_finding)
    lines += diff("stats", STATS_FIELDS, model.stats, stats)
    for name in ("settled", "ist_deliveries"):
        if tuple(getattr(model.stats, name)) != tuple(getattr(stats, name)):
            lines.append(f"  stats {name}: model {tuple(getattr(model.stats, name))}, core {tuple(getattr(stats, name))}")
    if stats.findings != len(model.findings):
        lines.append(f"  stats findings: model {len(model.findings)}, core {stats.findings}")
    if stats.open_at_end != model.open_clobbered():
        lines.append(f"  stats open_at_end: model {model.open_clobbered()}, core {stats.open_at_end}")
    return lines


def compare(
    trace: Trace,
    positions: list[int],
    config: dict[str, int],
    seen: Callable[[Trace, Model], None] | None = None,
) -> Difference | None:
    """Compare the core with the model at some positions, reached in that order and from the start, and at the end.

    seen: called with the model at its end.
    """
    options: dict[str, Any] = {k: v for k, v in config.items() if k in MODEL_OPTIONS}
    model = Model(trace, **options)
    digests = {}
    with Replay(trace, **config) as replay:
        replay.scan_all()
        wrong = []
        for position in sorted({*positions, trace.count}):
            digests[position] = model.digest(position)
            if len(positions) <= 3 and position != trace.count:  # all that can be seen there, not only its digest
                replay.seek(position)
                if diff_view(model, replay):
                    wrong.append(position)
        for position in [*positions, trace.count]:
            replay.seek(position)
            if replay.position != position or replay.digest() != digests[position]:
                wrong.append(position)
        if seen is not None:
            seen(trace, model)
        if not wrong:
            lines = diff_view(model, replay) + diff_scan(model, replay)
            return Difference(trace.count, lines) if lines else None
        # Look for the first position at which they part, for the reader.
        model = Model(trace, **options)
        for position in range(trace.count + 1):
            replay.seek(position)
            same = model.digest(position) == replay.digest()
            if lines := diff_view(model, replay):
                return Difference(position, lines)
            if not same:
                return Difference(position, ["  (the digests differ, nothing else that can be seen does)"])
        return Difference(min(wrong), ["  (only when that position is reached in another way)"])


# -- plans --------------------------------------------------------------------------------------------------------------


def config_of(plan: Plan) -> dict[str, int]:
    """Options of the replay for a plan."""
    r = random.Random(plan.world ^ 0x5EED)
    config: dict[str, int] = {"snapshot_interval": r.choice((0, 0, 1, 2, 7, 16)), "max_snapshots": r.choice((0, 0, 2, 3, 8))}
    if r.random() < 0.15:
        config["max_frames"] = r.choice((1, 2, 3, 8))
    if r.random() < 0.3:
        config["iret_fault_unblocks"] = False
    if r.random() < 0.3:
        config["nmi_fail_blocks"] = False
    return config


def positions_of(plan: Plan, count: int) -> list[int]:
    """Positions to look at: two, or now and then all of them in some order."""
    r = random.Random(plan.world ^ 0x905)
    if r.random() < 0.02:
        positions = list(range(count + 1))
        r.shuffle(positions)
        return positions
    return [r.randrange(count + 1) for _ in range(2)]


def check(plan: Plan, seen: Callable[[Trace, Model], None] | None = None) -> None:
    """Raise Disagreement if core and model differ on a plan."""
    with assembled(Kernel(plan)) as trace:
        difference = compare(trace, positions_of(plan, trace.count), config_of(plan), seen)
    if difference is not None:
        raise Disagreement(plan, difference)


def minimised(records: list[bytes], fails: Callable[[list[bytes]], bool]) -> list[bytes]:
    """Delta debugging: a list of events that still fails, of which none can be left out."""
    size = max(len(records) // 2, 1)
    while True:
        at, shorter = 0, False
        while at < len(records):
            rest = records[:at] + records[at + size :]
            if len(rest) < len(records) and fails(rest):
                records, shorter = rest, True
            else:
                at += size
        if size == 1 and not shorter:
            return records
        size = max(size // 2, 1)


def listing(trace: Trace) -> Iterator[str]:
    """The events of a trace, one a line, without what is not known."""
    for index in range(trace.count):
        event = decode(trace, index)
        kind = Kind(event.kind).name.lower() if 0 < event.kind <= max(Kind) else f"kind {event.kind}"
        known = {f.name: getattr(event, f.name) for f in dataclasses.fields(event) if f.name not in ("index", "kind", "flags")}
        fields = " ".join(f"{name}={value:#x}" for name, value in known.items() if value is not None)
        yield f"  {index:3} {kind} {fields}" + (f" {EventFlag(event.flags & 0x7F)!r}" if event.flags else "")


def layout_lines(layout: Layout, vectors: set[int]) -> Iterator[str]:
    """A layout in hexadecimal, of the gates only those of some vectors, NMI and #MC."""

    def hexed(text: str) -> str:
        return re.sub(r"\d{4,}", lambda match: f"{int(match[0]):#x}", text)

    for entry in (*layout.tss, *layout.cpus, *sorted(layout.regions, key=lambda region: region.lo)):
        yield "  " + hexed(str(entry))
    yield f"  {layout.fidelity!r}"
    for number, idt in enumerate(layout.idts):
        yield from (hexed(f"  idt {number} {v}: {gate}") for v, gate in idt.gates.items() if v in {*vectors, 2, 18})


def explain(error: Disagreement) -> str:
    """A message with which the difference can be worked on."""
    plan, difference = error.plan, error.difference
    kernel, config = Kernel(plan), config_of(plan)

    def fails(records: list[bytes]) -> bool:
        with assembled(kernel, records) as trace:
            found = compare(trace, list(range(trace.count + 1)), config)
            return found is not None and found.key == difference.key

    again = (plan.world, plan.steps)
    lines = [f'again: python tests/modeldiff.py "{again}"', f"options: {config}", str(difference)]
    records = kernel.records
    if fails(records):
        records = minimised(records, fails)
    with assembled(kernel, records) as trace:
        small = compare(trace, list(range(trace.count + 1)), config)
        lines += ["", f"smallest trace that shows a difference, {trace.count} of {len(kernel.records)} events:", *listing(trace)]
        lines += [str(small), "", "layout:"]
        used = {event.arg for event in (decode(trace, i) for i in range(trace.count)) if event.kind == Kind.DELIVER}
        lines += list(layout_lines(trace.layout, {vector for vector in used if vector is not None}))
    return "\n".join(lines)


def main() -> int:
    world, steps = ast.literal_eval(sys.argv[1])
    try:
        check(Plan(world, tuple(steps)))
    except Disagreement as error:
        print(explain(error))
        return 1
    print("core and model agree")
    return 0


if __name__ == "__main__":
    sys.exit(main())
