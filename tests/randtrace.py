"""Random traces with a meaning: a small simulated kernel whose nested events mostly continue where they left off.

A `Plan` says which trace: a world and a list of scenes, each with a seed of its own, so that leaving out one of them leaves
the others as they are. The same plan always gives the same trace. Run as a program this prints how often each rule,
cause, way of settling and event kind occurred in the first 2,000 plans of `plan_of`, and fails if one never did.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from model import Model
from randscenes import SCENES, Scenes

from tracedbg import wire
from tracedbg.layout import Fidelity
from tracedbg.state import Cause, Evidence, FrameStatus, Kind, Mismatch, Rule, Settle
from tracedbg.trace import Trace
from tracedbg.writer import TraceWriter, build

MOST_EVENTS = 600  # a plan's scenes end there


@dataclass(frozen=True)
class Plan:
    """A random trace in a few numbers."""

    world: int
    steps: tuple[tuple[str, int], ...]


def plan_of(seed: int) -> Plan:
    """The plan of a seed, for tests without Hypothesis."""
    r = random.Random(seed)
    steps = [(r.choice(SCENES), r.getrandbits(32)) for _ in range(r.choice((3, 5, 8, 8, 12, 20)))]
    if seed % 41 == 20:
        steps.append(("flood", r.getrandbits(32)))
    return Plan(r.getrandbits(32), tuple(steps))


class Kernel(Scenes):
    """Plays the scenes of a plan."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan.world)
        self.plan = plan
        for scene, seed in plan.steps:
            if len(self.records) >= MOST_EVENTS:
                break
            self.r.seed(seed)
            number = self.r.randrange(self.world.cpu_count) if self.r.random() < 0.5 else 0
            getattr(self, scene)(number)

    def fill(self, writer: TraceWriter) -> None:
        """Write all of it with a TraceWriter."""
        writer.layout = self.layout
        writer.memory = list(self.world.initial)
        writer.payload(bytes(self.payload))
        writer.append(b"".join(self.records))


def written_trace(plan: Plan) -> Trace:
    """The trace of a plan, through the file format (slow: a layout's tables take most of the time)."""
    kernel = Kernel(plan)
    return build(kernel.fill, name=repr(plan), cpus=kernel.world.cpu_count)


def assembled(kernel: Kernel, records: list[bytes] | None = None) -> Trace:
    """A trace with the events of a kernel, or some of them, without the way through bytes."""
    trace = build(lambda writer: None, name="random", cpus=kernel.world.cpu_count)
    trace.layout = kernel.layout
    trace.memory = tuple(kernel.world.initial)
    trace.payload = memoryview(bytes(kernel.payload))
    trace.events = memoryview(b"".join(kernel.records if records is None else records))
    return trace


def random_trace(plan: Plan) -> Trace:
    """The trace of a plan."""
    return assembled(Kernel(plan))


# -- coverage -----------------------------------------------------------------------------------------------------------

COUNTERS = ("events", "judged", "unjudged", "legacy", "failed", "returns", "writes", "gaps", "bad_events")
RULE_EVIDENCE = {
    Rule.FRAME_CLOBBERED: (Evidence.COMPUTED, Evidence.INFERRED),
    Rule.FRAME_CONSUMED_CORRUPT: (Evidence.RECORDED,),
    Rule.FRAME_SAME_BYTES: (Evidence.COMPUTED, Evidence.INFERRED),
    Rule.USER_STACK: (Evidence.COMPUTED, Evidence.INFERRED),
    Rule.NEIGHBOUR_OVERWRITE: (Evidence.COMPUTED, Evidence.RECORDED, Evidence.INFERRED),
    Rule.STACK_OVERFLOW: (Evidence.COMPUTED, Evidence.RECORDED),
    Rule.ERROR_CODE_MISMATCH: (Evidence.RECORDED, Evidence.INFERRED),
    Rule.TOKEN_BUSY: (Evidence.COMPUTED, Evidence.RECORDED),
    Rule.NMI_STUCK: (Evidence.COMPUTED, Evidence.RECORDED),
    Rule.MODEL_MISMATCH: (Evidence.COMPUTED, Evidence.RECORDED),
}
WINDOWS = (Cause.NMI_UNBLOCKED, Cause.NMI_NEVER_BLOCKED, Cause.MC_UNMASKED, Cause.MASKABLE)
CLOBBERS = tuple(cause for cause in Cause if cause not in (Cause.RING_GAP, Cause.MOV_SS))
USER_STACK = (Cause.NONE, Cause.RING_GAP, Cause.MOV_SS)
RULE_CAUSE = {Rule.REENTRY_WINDOW: WINDOWS, Rule.FRAME_CLOBBERED: CLOBBERS, Rule.USER_STACK: USER_STACK}


PRESENT = (
    "nmi_blocked", "nmi_pending", "mcip", "gap", "fred", "smm", "guest", "tpr", "csl", "ring_gap", "user_rsp", "tokens_known",
    "tokens_busy",
)  # fmt: skip
SETTLED_BY = (Settle.CONTEXT, Settle.ABOVE, Settle.RETURN, Settle.COPY, Settle.DROPPED)
FRAMES = ("fred", "idt", "fred raised", "fred at level 0", "more than 64", "more than 240")
EITHER = ("kernel_gs", "mce", "gif")
CPU_FACTS = (*PRESENT, *(f"{name} {n}" for name in EITHER for n in (0, 1)), "shadow STI", "shadow MOV_SS")


def pairs(table: dict[Rule, tuple[Cause, ...]] | dict[Rule, tuple[Evidence, ...]]) -> Counter[str]:
    return Counter({f"{rule.name} {value.name}": 0 for rule, values in table.items() for value in values})


def cpu_facts(model: Model) -> Iterable[str]:
    """What can be said of the CPUs at the end of a trace, by name."""
    for number in range(len(model.cpus)):
        state = model.cpu_state(number)
        yield from (name for name in PRESENT if getattr(state, name))
        yield from (f"{name} {value:d}" for name in EITHER if (value := getattr(state, name)) is not None)
        yield f"shadow {state.shadow.name}"




class Coverage:
    """How often each thing occurs, by the model."""

    def __init__(self) -> None:
        self.table: dict[str, Counter[str]] = {
            "kind": Counter({k.name: 0 for k in Kind if k}),
            "rule": Counter({x.name: 0 for x in Rule}),
            "rule, evidence": pairs(RULE_EVIDENCE),
            "rule, cause": pairs(RULE_CAUSE),
            "mismatch": Counter({x.name or "": 0 for x in Mismatch}),
            "settled as": Counter({x.name: 0 for x in (Rule.FRAME_RELOCATED, Rule.FRAME_CONSUMED_CORRUPT)}),
            "settled by": Counter({x.name: 0 for x in SETTLED_BY}),
            "evidence": Counter({x.name: 0 for x in Evidence if x != Evidence.UNKNOWN}),
            "cause": Counter({x.name: 0 for x in Cause}),
            "settle reason": Counter({x.name: 0 for x in Settle}),
            "open at end": Counter({x.name: 0 for x in FrameStatus}),
            "frames": Counter(dict.fromkeys(FRAMES, 0)),
            "counters": Counter(dict.fromkeys((*COUNTERS, "folded"), 0)),
            "IST": Counter({str(n): 0 for n in range(8)}),
            "cpu": Counter(dict.fromkeys(CPU_FACTS, 0)),
        }

    def add(self, trace: Trace, model: Model) -> None:
        """Count what is in a trace; the model is at its end."""
        table = self.table
        for index in range(trace.count):
            number = trace.events[index * wire.EVENT_SIZE + 60]
            table["kind"][Kind(number).name if 0 < number <= max(Kind) else "(unknown kind)"] += 1
        for finding in model.findings:
            rule = finding.raised_rule
            table["rule"][rule.name] += 1
            table["evidence"][finding.evidence.name] += 1
            table["counters"]["folded"] += finding.count > 1
            if rule in RULE_EVIDENCE and not trace.layout.fidelity & Fidelity.INFERRED:  # which makes all of them alike
                table["rule, evidence"][f"{rule.name} {finding.evidence.name}"] += 1
            if rule in RULE_CAUSE:
                table["rule, cause"][f"{rule.name} {finding.cause.name}"] += 1
            if rule == Rule.MODEL_MISMATCH:
                table["mismatch"].update(bit.name or "" for bit in Mismatch(finding.detail))
            if finding.victim is not None or finding.cause:
                table["cause"][finding.cause.name] += 1
            if finding.settled is not None:
                table["settled as"][finding.rule.name] += 1
            if finding.settled_by is not None:
                table["settled by"][finding.settled_by.name] += 1
        for name in COUNTERS:
            table["counters"][name] += getattr(model.stats, name)
        table["settle reason"].update({Settle(n).name: count for n, count in enumerate(model.stats.settled)})
        table["IST"].update({str(n): count for n, count in enumerate(model.stats.ist_deliveries)})
        for frame in model.frames:
            table["open at end"][frame.status.name] += 1
            table["frames"]["fred" if frame.fred else "idt"] += 1
            if frame.fred:
                table["frames"]["fred raised" if frame.level > frame.from_level else "fred at level 0"] += 1
        for number in (64, 240):
            table["frames"][f"more than {number}"] += len(model.frames) > number
        table["cpu"].update(cpu_facts(model))

    def missing(self, least: int = 1) -> list[str]:
        """What occurred less often than that."""
        return [f"{title}: {name} {n}" for title, counts in self.table.items() for name, n in counts.items() if n < least]


def coverage(seeds: Iterable[int]) -> Coverage:
    """Of the plans of some seeds."""
    result = Coverage()
    for seed in seeds:
        with random_trace(plan_of(seed)) as trace:
            result.add(trace, Model(trace).run(trace.count))
    return result


def main() -> int:
    result = coverage(range(int(sys.argv[1]) if len(sys.argv) > 1 else 2000))
    for title, counts in result.table.items():
        print(f"{title}:")
        for name, count in counts.items():
            print(f"    {name:36} {count:8}")
    if result.missing():
        print("never occurred:", "; ".join(result.missing()))
    return 1 if result.missing() else 0


if __name__ == "__main__":
    sys.exit(main())
