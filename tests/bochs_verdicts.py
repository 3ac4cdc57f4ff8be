"""The findings that a recorded scenario implies, against those of the replay.

They follow from truth.json, which is derived from recorded stores and loads alone. Deviations of the CPU model from the
manual, and overwrites that the replay leaves alone by its definition, are named where they are excepted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bochs import RETURNS, Scenario
from bochs_layout import Record, length, number
from bochs_truth import FRED_SIZE, MASKS, SLOTS, parts_of, rip_address, source_number

from tracedbg import rules, x86
from tracedbg.layout import REGION_STACK, REGION_USER
from tracedbg.replay import Replay
from tracedbg.state import Evidence, Finding, Frame, Mismatch, Rule, Source

FRAME_RULES = {
    Rule.FRAME_CLOBBERED,
    Rule.FRAME_CONSUMED_CORRUPT,
    Rule.RESUME_LOOP,
    Rule.FRAME_RELOCATED,
    Rule.FRAME_SAME_BYTES,
    Rule.NEIGHBOUR_OVERWRITE,
}
CS_SS = 1 << SLOTS.index("cs") | 1 << SLOTS.index("ss")
EVIDENCE = {Rule.RESUME_LOOP: Evidence.RECORDED, Rule.NEIGHBOUR_OVERWRITE: Evidence.INFERRED}  # the others: computed


@dataclass(frozen=True, slots=True)
class Expected:
    """A finding about a frame that follows from truth.json. differ None: the recording and the rule count differently."""

    rule: Rule
    raised: Rule
    victim: int
    writer: int | None
    lo: int
    hi: int
    slots: int
    differ: int | None
    consumer: int | None

    def __str__(self) -> str:
        words = f"{rules.rule_id(self.rule)} (raised {rules.rule_id(self.raised)}) of {self.victim} by {self.writer}"
        differ = "?" if self.differ is None else f"{self.differ:06b}"
        return f"{words} [{self.lo:#x}, {self.hi:#x}) slots {self.slots:06b} differ {differ} consumed by {self.consumer}"


def verdicts(scenario: Scenario) -> list[str]:
    """The findings are those that the recording implies, and of the rules about frames there are no others."""
    with Replay(scenario.trace) as replay:
        replay.scan_all()
        findings = replay.findings()
    judge = Judge(scenario)
    wanted, wrong = judge.expected(), []
    found = [f for f in findings if f.rule in FRAME_RULES]
    for expected in wanted:
        match = next((f for f in found if judge.same(f, expected)), None)
        if match is None:
            wrong.append(f"missing: {expected}")
        else:
            found.remove(match)
            if match.evidence is not EVIDENCE.get(expected.raised, Evidence.COMPUTED):
                wrong.append(f"evidence {match.evidence.name} of {expected}")
            if expected.rule is Rule.RESUME_LOOP and judge.rounds(expected) not in (None, match.count):
                wrong.append(f"{match.count} rounds, CPU {judge.rounds(expected)}: {expected}")
    for f in found:
        if not judge.excepted(f):
            wrong.append(f"not in the recording: {judge.words(f)}")
    return wrong + judge.others(findings)


class Judge:
    """Derives from records and truth what the replay has to find."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.frames: dict[int, Record] = {f["entry"]: f for f in scenario.truth["frames"]}
        self.irets: dict[int, Record] = {i["n"]: i for i in scenario.truth["irets"]}
        self.free: set[int] = set()  # victims of which the definition of the replay says nothing either way

    def expected(self) -> list[Expected]:
        """The findings about frames."""
        return [e for frame in self.frames.values() if not frame["aborted"] for e in self._of(frame)]

    def _of(self, victim: Record) -> Iterator[Expected]:
        entry, touched, same = victim["entry"], set[int](), False
        edited = {a for lo, hi in victim["edited_by_own_handler"] for a in range(number(lo), number(hi))}
        for over in sorted(victim["overwritten"], key=lambda o: o["first_n"]):
            lo, hi = number(over["bytes"][0][0]), number(over["bytes"][-1][1])
            if over["kind"] != "delivery":
                touched |= set(range(lo, hi))
                yield from self._neighbour(victim, over)
                continue
            writer = over["by_entry"]
            if not self._judged(victim, writer):
                self.free.add(entry)
                continue
            slots = self._mask(victim, [(number(a), number(b)) for a, b in over["bytes"]])
            differ: int | None = self._mask(victim, [(number(a), number(a) + 1) for a in over["changed"]])
            if (edited | touched) & set(range(lo, hi)):
                differ = None  # the recording compares with what the delivery stored, the rule with what is there
            if over["changed"]:
                rule, consumer, loop = self._outcome(victim)
                yield Expected(rule, Rule.FRAME_CLOBBERED, entry, writer, lo, hi, slots, differ, consumer)
                if loop is not None:
                    lo, hi = (number(a) for a in victim["frame"])
                    yield Expected(Rule.RESUME_LOOP, Rule.RESUME_LOOP, entry, loop, lo, hi, 0, 0, consumer)
                return  # later overwrites of a clobbered frame are no findings of their own
            if not same:
                same = True
                yield Expected(Rule.FRAME_SAME_BYTES, Rule.FRAME_SAME_BYTES, entry, writer, lo, hi, slots, differ, None)

    def _mask(self, victim: Record, ranges: list[tuple[int, int]]) -> int:
        """Slots as in a finding: bit 0 RIP ... 4 SS, 5 the error code. Of FRED's two words above SS there is none."""
        lo, hi = (number(a) for a in victim["frame"])
        rip = rip_address(victim)
        mask = 0
        for begin, end in ranges:
            for a in range(max(begin, lo), min(end, hi)):
                slot = (a - rip) // 8
                mask |= 0 if slot > 4 else 1 << (slot if slot >= 0 else 5)
        return mask

    def _judged(self, victim: Record, writer: int) -> bool:
        """Whether the replay judges an overwrite: only by a delivery that resets its stack pointer (IST, FRED level).

        Without a switch a delivery pushes below RSP, where frames were left; RSP0 is used anew by every entry from CPL3
        (help/replay.md, step 6). The same for a victim that was left by other means than a return before.
        """
        return self._dedicated(writer) and not self._left(victim, writer)

    def _dedicated(self, entry: int) -> bool:
        begin = self.scenario.by_number[entry]
        stores = [r for r in parts_of(self.scenario, entry) if r["e"] == "w"]
        if len(stores) == FRED_SIZE // 8 or (self.scenario.layout.get("fred") and entry not in self.scenario.entered):
            end = next((r for r in self.scenario.records if r["e"] == "deliver_end" and r["of"] == entry), None)
            level = 0 if begin["before"]["cpl"] else begin["before"]["csl"]
            return end is not None and end["after"]["csl"] > level
        return self.scenario.ist[entry] != 0

    def _left(self, victim: Record, writer: int) -> bool:
        """Whether the interrupted contexts show that the victim's handler is gone (help/replay.md, Observe a, b and c)."""
        hi = number(victim["frame"][1])
        for r in self.scenario.records:
            if r["cpu"] != victim["cpu"] or not victim["entry"] < r["n"] <= writer:
                continue
            if r["e"] == "insn_end" and r["op"] in (*RETURNS, "sysret") and not r["faulted"]:
                seen = r["after"]
                if seen["cpl"]:
                    return True
            elif r["e"] == "deliver_begin" and (r["n"] == writer or not self.frames[r["n"]]["aborted"]):
                seen = r["before"]
                stack = self._stack(number(seen["rsp"]))
                popped = stack == self._stack(hi) and number(seen["rsp"]) > rip_address(victim)
                if seen["cpl"] or (popped and not self._nested(victim, r, stack)) or self._above(victim, r):
                    return True
        return False

    def _above(self, victim: Record, begin: Record) -> bool:
        """Whether a delivery interrupts the stack that the victim's delivery did, there or above, where that is another stack."""
        was, now = number(victim["interrupted"]["rsp"]), number(begin["before"]["rsp"])
        stack = self._stack(was)
        if stack == self._stack(number(victim["frame"][1])) or self._stack(now) != stack or now < was:
            return False
        return not self._nested(victim, begin, stack)

    def _nested(self, victim: Record, begin: Record, stack: tuple[int, int]) -> bool:
        """Whether the code that a delivery interrupts runs below a frame newer than the victim: after the reset of an IST stack
        RSP passes through the values that the victim's own context had (the first lesson of the data)."""
        return any(
            victim["entry"] < f["entry"] < begin["n"]
            and not f["aborted"]
            and (f["closed_by"] is None or f["closed_by"] > begin["n"])
            and self._stack(number(f["frame"][1])) == stack
            and rip_address(f) >= number(begin["before"]["rsp"])
            for f in self.frames.values()
            if f["size"]
        )

    def _stack(self, address: int) -> tuple[int, int]:
        holds = [r for r in self.scenario.trace.layout.regions if r.kind == REGION_STACK and r.lo < address <= r.hi]
        best = min(holds, key=lambda r: (r.hi, r.lo), default=None)
        return (best.lo, best.hi) if best is not None else ((address - 1) >> 14, -1)

    def _neighbour(self, victim: Record, over: Record) -> Iterator[Expected]:
        """Software of another activation wrote into the frame: a stack that ran over, if the frame's stack is next below."""
        by = over["by_activation"]
        frame = self.frames.get(by) if isinstance(by, int) else None
        lo, hi = (number(a) for a in victim["frame"])
        if frame is None or self._stack(number(frame["frame"][1]))[0] != self._stack(hi)[1]:
            self.free.add(victim["entry"])
            return
        first = self.scenario.by_number[over["first_n"]]
        begin, end = max(lo, number(first["lin"])), min(hi, number(first["lin"]) + length(first))
        slots = self._mask(victim, [(begin, end)])
        rule = Rule.NEIGHBOUR_OVERWRITE
        yield Expected(rule, rule, victim["entry"], None, begin, end, slots, None, None)

    def _outcome(self, victim: Record) -> tuple[Rule, int | None, int | None]:
        """What became of a clobbered frame, by what the return of its own activation popped, slot by slot.

        Final rule, consumer, and the entry whose context was resumed a second time, if that was it (a loop).
        """
        iret = self.irets.get(victim["closed_by"] or -1)
        if iret is None or iret["activation"] != victim["entry"] or iret["faulted"] or len(iret["slots"]) < 5:
            return Rule.FRAME_CLOBBERED, None, None
        own = [number(victim["interrupted"][name]) & mask for name, mask in zip(SLOTS, MASKS, strict=True)]
        slots = sorted(iret["slots"], key=lambda s: number(s["lin"]))
        popped = [number(s["val"]) & mask for s, mask in zip(slots, MASKS, strict=True)]
        differ = [n for n in range(5) if own[n] != popped[n]]
        if number(slots[0]["lin"]) != rip_address(victim):  # a frame made by hand
            moved = not set(differ) - {SLOTS.index("rflags")}
            return (Rule.FRAME_RELOCATED if moved else Rule.FRAME_CLOBBERED), None, None
        if not differ:
            return Rule.FRAME_RELOCATED, None, None
        foreign = [n for n in differ if slots[n]["rel"] == "foreign_entry"]
        if not foreign:
            return Rule.FRAME_CLOBBERED, None, None
        writer = self.frames[slots[foreign[0]]["writer_entry"]]
        theirs = [number(writer["interrupted"][name]) for name in ("rip", "rsp")]
        loop = bool({0, 3} & set(differ)) and [popped[0], popped[3]] == theirs and writer["cpu"] == victim["cpu"] == iret["cpu"]
        return Rule.FRAME_CONSUMED_CORRUPT, iret["n"], writer["entry"] if loop else None

    def excepted(self, f: Finding) -> bool:
        """A finding beyond the recording's that the definition of the replay allows.

        Truth closes a frame too when its handler leaves by a frame made by hand; the replay keeps it open, as its context
        was not resumed (it is `overwritten_after_close_unpopped` then).
        """
        victim = self._entry(f.victim)
        if victim is None or victim in self.free:
            return victim is not None
        frame, writer = self.frames[victim], self._entry(f.writer)
        iret = self.irets.get(frame["closed_by"] or -1)
        if iret is None or writer is None or writer < iret["n"]:
            return False
        return number(iret["read_range"][0]) != rip_address(frame)

    def rounds(self, loop: Expected) -> int | None:
        """How often the loop's return popped the same words from the same place; None: not all returns are listed."""
        if self.scenario.truth["irets_total"] != len(self.irets):
            return None
        first = self.irets[loop.consumer or -1]
        again = [i for i in self.irets.values() if i["n"] > first["n"] and i["cpu"] == first["cpu"] and i["result"] == "orphan"]
        return 1 + sum([s["val"] for s in i["slots"]] == [s["val"] for s in first["slots"]] for i in again)

    # -- comparison

    def _entry(self, frame: Frame | None) -> int | None:
        return None if frame is None else source_number(self.scenario, frame.entry)

    def same(self, f: Finding, e: Expected) -> bool:
        """Whether a finding is the expected one, in every field."""
        consumer = source_number(self.scenario, f.consumer)
        rule = f.rule
        if rule is Rule.FRAME_RELOCATED and f.settled_evidence is Evidence.INFERRED and self._seen_again(e):
            rule = Rule.FRAME_CLOBBERED
        facts = (rule, f.raised_rule, self._entry(f.victim), self._entry(f.writer), f.lo, f.hi, f.slots, consumer)
        if facts != (e.rule, e.raised, e.victim, e.writer, e.lo, e.hi, e.slots, e.consumer):
            return False
        if e.differ is None or f.differ == e.differ:
            return True
        # of a FRED frame's CS and SS words the replay leaves bytes unknown (FRED_UNKNOWN): they may differ
        return f.victim is not None and f.victim.fred and f.differ | CS_SS == e.differ | CS_SS and f.differ & e.differ == e.differ

    def _seen_again(self, e: Expected) -> bool:
        """Whether what the frame's delivery interrupted seems to run on: after RET, by a frame that differs in SS or RFLAGS
        alone, or because its stack is in use again at that place.

        The replay takes that for survival (inferred) once it sees the context; no return of the frame shows it.
        """
        iret = self.irets.get(self.frames[e.victim]["closed_by"] or -1)
        by_frame = iret is not None and iret["activation"] == e.victim and str(iret["result"]).startswith("resumed_own")
        later = [r for r in self.scenario.records if r["n"] > (e.writer or 0)]
        by_ret = any(r["e"] == "resumed" and r["of"] == e.victim for r in later)
        seen = any(r["e"] == "deliver_begin" and self._above(self.frames[e.victim], r) for r in later)
        return e.rule is Rule.FRAME_CLOBBERED and (by_frame or by_ret or seen)

    def words(self, f: Finding) -> str:
        """A finding in the recording's numbers."""
        consumer = source_number(self.scenario, f.consumer)
        victim, writer = self._entry(f.victim), self._entry(f.writer)
        return (
            f"{rules.rule_id(f.rule)} (raised {rules.rule_id(f.raised_rule)}) of {victim} by {writer} [{f.lo:#x}, {f.hi:#x})"
            f" slots {f.slots:06b} differ {f.differ:06b} consumed by {consumer}"
        )

    # -- findings that are not about an overwritten frame

    def others(self, findings: tuple[Finding, ...]) -> list[str]:
        """Which of them there have to be, each set against the set the replay raised."""
        wrong: list[str] = []
        begins = [r for r in self.scenario.records if r["e"] == "deliver_begin"]
        done = [r for r in begins if not self.frames[r["n"]]["aborted"]]

        def cpus(rule: Rule) -> set[int]:
            return {f.cpu for f in findings if f.rule is rule}

        def check(what: str, found: Any, truth: Any) -> None:
            if found != truth:
                wrong.append(f"{what}: replay {sorted(found)}, CPU {sorted(truth)}")

        check("fake-nmi", cpus(Rule.FAKE_NMI), {r["cpu"] for r in done if r["vec"] == x86.NMI and r["type"] != "nmi"})
        mc = x86.MACHINE_CHECK  # of type exc it is the injected one
        check("fake-mce", cpus(Rule.FAKE_MCE), {r["cpu"] for r in done if r["vec"] == mc and r["type"] != "exc"})
        users = {r["n"] for r in done if self._on_user_stack(r)}
        check("user-stack", {source_number(self.scenario, f.event) for f in findings if f.rule is Rule.USER_STACK}, users)
        faults = {r["n"] for r in done if r["vec"] == x86.DOUBLE_FAULT and r["type"] == "exc"}
        check("double-fault", {source_number(self.scenario, f.event) for f in findings if f.rule is Rule.DOUBLE_FAULT}, faults)
        down = {r["cpu"] for r in self.scenario.records if r["e"] == "shutdown" or r.get("why") == "shutdown"}
        check("triple-fault", cpus(Rule.TRIPLE_FAULT) | cpus(Rule.SHUTDOWN), down)
        codes = {(f.cpu, f.writer.vector if f.writer else f.victim.vector if f.victim else None)
                 for f in findings if f.rule is Rule.ERROR_CODE_MISMATCH}  # fmt: skip
        check("error-code-mismatch", {c for c in codes if c[1] is not None}, self._misparsed(done))
        check("token-busy", cpus(Rule.TOKEN_BUSY), self._busy())
        check("trace-gap", cpus(Rule.TRACE_GAP), set())
        for f in findings:
            if f.rule is Rule.MODEL_MISMATCH and not self._deviation(f):
                wrong.append(f"model-mismatch at {source_number(self.scenario, f.event)}: {Mismatch(f.detail)!r}")
            if f.rule is Rule.UNMATCHED_RETURN and not self._unmatched(f):
                wrong.append(f"unmatched-return at {source_number(self.scenario, f.event)}")
        return wrong

    def _deviation(self, f: Finding) -> bool:
        """#MC of this model is an injection that knows neither MCIP nor CR4.MCE: no shutdown where SDM 15.3.1.2 has one."""
        return Mismatch(f.detail) is Mismatch.MC_SHUTDOWN and self.scenario.trace.event(f.event).source is Source.MC

    def _unmatched(self, f: Finding) -> bool:
        """The return resumed what had been resumed before: truth calls it orphan, or a return to the wrong place."""
        iret = self.irets.get(source_number(self.scenario, f.consumer) or -1)
        return iret is None or iret["result"] in ("orphan", "returned_wrong", "resumed_suspended", "resumed_outer")

    def _on_user_stack(self, begin: Record) -> bool:
        """Delivered from CPL0 without a switch, onto memory of user mode."""
        if begin["before"]["cpl"] or self._dedicated(begin["n"]) or not self.frames[begin["n"]]["size"]:
            return False
        lo, hi = (number(a) for a in self.frames[begin["n"]]["frame"])
        regions = self.scenario.trace.layout.regions
        return any(r.kind == REGION_USER and r.lo < hi and lo < r.hi for r in regions)

    def _misparsed(self, done: list[Record]) -> set[tuple[int, int]]:
        """Frames without the error code that the vector's handler drops; returns that are off by one word."""
        pairs = {
            (r["cpu"], r["vec"])
            for r in done
            if r["vec"] in x86.ERROR_CODE_VECTORS and r["type"] != "exc" and self.frames[r["n"]]["size"] == 40
        }
        for iret in self.irets.values():
            frame = self.frames.get(iret["activation"]) if isinstance(iret["activation"], int) else None
            if frame is not None and (frame["size"], iret.get("offset_in_own_frame")) in ((40, 8), (48, 0)):
                pairs.add((frame["cpu"], frame["vec"]))
        return pairs

    def _busy(self) -> set[int]:
        """CPUs of which a delivery found its shadow-stack token taken (held and left with the busy bit)."""
        found = set()
        for a, b in zip(self.scenario.records, self.scenario.records[1:], strict=False):
            if a["e"] == b["e"] == "x" and a["lin"] == b["lin"] and "in" in a and number(a["val"]) & number(b["val"]) & 1:
                found.add(a["cpu"])
        return found
