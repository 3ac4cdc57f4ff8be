"""Holding the C core and the slow model to what a case file expects; what does not hold is a line of text."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from casefile import SAVED, STATE_FIELDS, Case, Expectation, word_of
from model import Model

from tracedbg import rules
from tracedbg.replay import Replay
from tracedbg.state import CpuState, EventFlag, Rule


class CoreView:
    """What the C core says."""

    name = "core"

    def __init__(self, case: Case) -> None:
        self.replay = Replay(case.trace, **arguments(Replay, case.options))
        self.replay.scan_all()

    def close(self) -> None:
        self.replay.close()

    def cpu(self, number: int, position: int) -> CpuState:
        self.replay.seek(position)
        return self.replay.cpu(number)

    def frame(self, event: int) -> Any:
        self.replay.seek(event + 1)
        return self.replay.last_frame()

    def word(self, addr: int, position: int) -> Any:
        self.replay.seek(position)
        return next(iter(self.replay.words(addr, addr + 8)), None)

    def frames(self, position: int) -> list[Any]:
        self.replay.seek(position)
        return list(self.replay.frames())

    def findings(self) -> list[Any]:
        return list(self.replay.findings())

    def digest(self, position: int) -> int:
        self.replay.seek(position)
        return self.replay.digest()


class ModelView:
    """What the slow model says."""

    name = "model"

    def __init__(self, case: Case) -> None:
        self.case = case
        self.at = [self._model(position) for position in range(case.trace.count + 1)]

    def _model(self, position: int) -> Model:
        return Model(self.case.trace, **arguments(Model, self.case.options)).run(position)

    def close(self) -> None:
        pass

    def cpu(self, number: int, position: int) -> CpuState:
        return self.at[position].cpu_state(number)

    def frame(self, event: int) -> Any:
        frame = self.at[event + 1].stored.get(event)
        failed = self.case.trace.event(event).flags & EventFlag.FAILED
        return None if frame is None or failed else frame.state()

    def word(self, addr: int, position: int) -> Any:
        return next((w for w in self.at[position].word_list() if w.addr == addr), None)

    def frames(self, position: int) -> list[Any]:
        return [frame.state() for frame in self.at[position].frames]

    def findings(self) -> list[Any]:
        return list(self.at[-1].findings)

    def digest(self, position: int) -> int:
        return self.at[position].digest()


def arguments(owner: Any, options: dict[str, int]) -> dict[str, Any]:
    """The options of a case as keyword arguments; one that the owner does not have is an error of the test."""
    result = {name.replace("-", "_"): value if name == "max-frames" else bool(value) for name, value in options.items()}
    missing = set(result) - set(inspect.signature(owner.__init__).parameters)
    assert not missing, f"{owner.__name__} has no option {missing}"
    return result


View = CoreView | ModelView


def check(case: Case) -> list[str]:
    """What does not hold, a line each: of the core, of the model, and where the two differ."""
    core, model = CoreView(case), ModelView(case)
    try:
        wrong = [line for view in (core, model) for line in check_view(case, view)]
        for position in range(case.trace.count + 1):
            if core.digest(position) != model.digest(position):
                wrong.append(f"{case.path.name}: core and model differ at position {position}")
                break
    finally:
        core.close()
    return wrong


def check_view(case: Case, view: View) -> list[str]:
    """What does not hold of one view."""
    wrong = []
    for expected in case.expect:
        if expected.kind == "finding":
            continue
        for message in CHECKS[expected.kind](view, expected):
            wrong.append(f"{case.path.name}:{expected.line}: {view.name}: {message}")
    for line, message in check_findings([e for e in case.expect if e.kind == "finding"], view.findings()):
        wrong.append(f"{case.path.name}:{line}: {view.name}: {message}")
    return wrong


def text_of(value: Any) -> str:
    if isinstance(value, list):  # writers
        names = ["initial" if writer is None else str(writer) for writer in value]
        return names[0] if len(set(names)) == 1 else ",".join(names)
    if isinstance(value, int) and not isinstance(value, bool) and not hasattr(value, "name"):
        return f"{value:#x}" if value > 255 else str(value)
    return word_of(value) if hasattr(value, "name") else "unknown" if value is None else str(value)


def differing(want: dict[str, Any], have: dict[str, Any]) -> Iterator[str]:
    for name, value in want.items():
        if have[name] != value:
            yield f"{name} is {text_of(have[name])}, expected {text_of(value)}"


def check_frame(view: View, expected: Expectation) -> Iterator[str]:
    frame = view.frame(expected.subject)
    if "none" in expected.want or frame is None:
        if (frame is None) != ("none" in expected.want):
            yield f"event {expected.subject} stored {'no frame' if frame is None else f'{frame.lo:#x}-{frame.hi:#x}'}"
        return
    have = {name: getattr(frame, name) for name in ("lo", "hi", "ist", "level", "from_level", "vector", "cpu")}
    yield from differing(expected.want, have | {name: getattr(frame.saved, name) for name in SAVED})


def check_word(view: View, expected: Expectation) -> Iterator[str]:
    size = 8 if expected.kind == "word" else 1
    first = expected.subject % 8 if size == 1 else 0
    word = view.word(expected.subject & ~7, expected.position)
    known = 0 if word is None else word.known >> first & (1 << size) - 1
    value = None if word is None or known != (1 << size) - 1 else word.value >> 8 * first & (1 << 8 * size) - 1
    have: dict[str, Any] = {"value": value, "by": [None] * size if word is None else list(word.writers[first : first + size])}
    if expected.want["value"] is None and known:
        have["value"] = f"known in part ({known:#x})" if value is None else value
    yield from differing(expected.want, have)


def check_open(view: View, expected: Expectation) -> Iterator[str]:
    have = [(frame.entry, word_of(frame.status)) for frame in view.frames(expected.position)]
    want = [(entry, status) for entry, status in expected.want["frames"]]
    if [e for e, _ in have] != [e for e, _ in want]:
        yield f"open frames are {[e for e, _ in have]}, expected {[e for e, _ in want]}"
        return
    for (entry, status), (_, wanted) in zip(have, want, strict=True):
        if wanted is not None and status != wanted:
            yield f"frame of event {entry} is {status}, expected {wanted}"


def check_state(view: View, expected: Expectation) -> Iterator[str]:
    state = view.cpu(expected.subject, expected.position)
    yield from differing(expected.want, {name: getattr(state, name) for name in STATE_FIELDS})


def check_verdict(view: View, expected: Expectation) -> Iterator[str]:
    ranks = [rules.rank(rules.finding_severity(finding)) for finding in view.findings()]
    yield from differing(expected.want, {"verdict": rules.SEVERITIES[max(ranks)] if ranks else "clean"})


CHECKS: dict[str, Callable[[View, Expectation], Iterator[str]]] = {
    "frame": check_frame, "word": check_word, "byte": check_word, "open": check_open, "state": check_state,
    "verdict": check_verdict,
}  # fmt: skip


def check_findings(expected: list[Expectation], findings: list[Any]) -> Iterator[tuple[int, str]]:
    """The list is complete: each finding is expected, each expectation is met. Those of one rule and event go in order."""
    open_: dict[tuple[Rule, int], list[Any]] = {}
    for finding in findings:
        open_.setdefault((finding.raised_rule, finding.event), []).append(finding)
    for wanted in expected:
        rule, event = wanted.subject
        candidates = open_.get((rule, event))
        if not candidates:
            yield wanted.line, f"no {word_of(rule)} was raised at event {event}"
            continue
        for message in differing(wanted.want, facts(candidates.pop(0))):
            yield wanted.line, f"{word_of(rule)} at {event}: {message}"
    last = max((e.line for e in expected), default=0)
    for (rule, event), rest in open_.items():
        for finding in rest:
            yield last, f"{word_of(rule)} at {event} (final word {word_of(finding.rule)}) was raised, but is not listed"


def facts(finding: Any) -> dict[str, Any]:
    """All that an expectation can ask of a finding."""
    names = (
        "rule", "evidence", "settled_evidence", "cause", "cause_event", "cause_frame", "slots", "differ", "detail", "settled",
        "settled_by", "consumer", "count", "cpu", "lo", "hi",
    )  # fmt: skip
    have = {name: getattr(finding, name) for name in names}
    for name in ("victim", "writer"):
        frame = getattr(finding, name)
        have[name] = None if frame is None else frame.entry
    have["severity"] = rules.finding_severity(finding)
    return have


# -- coverage -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coverage:
    """Finding ids of one case: raised at an event, the final word, and those that it nearly raises but must not."""

    raised: frozenset[str]
    final: frozenset[str]
    near_misses: frozenset[str]


def coverage(case: Case) -> Coverage:
    """What a case covers, by the C core."""
    view = CoreView(case)
    try:
        findings = view.findings()
    finally:
        view.close()
    return Coverage(
        frozenset(word_of(f.raised_rule) for f in findings),
        frozenset(word_of(f.rule) for f in findings),
        frozenset(case.text.values("near-miss")),
    )
