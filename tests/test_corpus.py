"""The case files as a whole: every rule of the architecture, every finding and every severity has its known answers."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest
from casecheck import Coverage, coverage
from casefile import Case, load

from tracedbg import rules
from tracedbg.state import Cause, Mismatch, Rule, ShutdownReason

CASES = sorted((Path(__file__).parent / "cases").glob("*.case"))
IDS = [rules.rule_id(rule) for rule in Rule]

# Rules of tracedbg/help/rules.md that no replay can show right or wrong.
NOTHING_TO_COMPUTE = {
    "R29": "what a device may send is checked by the IOMMU, before there is an event; the trace has only what came through",
    # R36 says of user interrupts too that they store no frame of the supervisor: no event, so no case. Its #VC and #HV have some.
}

# Numbers of the collection of real cases (the names begin with them) that have no file.
NO_CASE = {
    44: "XSA-308, single step with the shadow of STI or MOV SS: the VM entry fails, no event is delivered and no frame is stored",
}


@dataclass(frozen=True)
class Entry:
    """What one case file contributes."""

    name: str
    title: str
    sources: list[str]
    rules: set[str]
    verdict: str
    covered: Coverage
    causes: set[Cause]  # that its expectations name
    details: dict[Rule, int]  # of its findings: bits of Mismatch; for `shutdown` bit N stands for reason N


@pytest.fixture(scope="module")
def corpus() -> list[Entry]:
    """All case files, replayed by the C core."""
    entries = []
    for path in CASES:
        with load(path) as case:
            header = defaultdict(list)
            for key, value in case.text.header:
                header[key].append(value)
            verdicts = [e.want["verdict"] for e in case.expect if e.kind == "verdict"]
            named = {word for line in header["rules"] for word in line.split()}
            causes, details = wanted_facts(case)
            entries.append(
                Entry(path.stem, header["title"][0], header["source"], named, verdicts[0], coverage(case), causes, details)
            )
    return entries


def wanted_facts(case: Case) -> tuple[set[Cause], dict[Rule, int]]:
    """Causes and details that the expectations of a case name; test_cases.py holds the replay to them."""
    causes: set[Cause] = set()
    details: dict[Rule, int] = defaultdict(int)
    for expected in case.expect:
        if expected.kind == "finding":
            rule, want = expected.subject[0], expected.want
            if "cause" in want:
                causes.add(Cause(want["cause"]))
            if "detail" in want:
                details[rule] |= 1 << want["detail"] if rule is Rule.SHUTDOWN else want["detail"]
    return causes, details


def number_of(name: str) -> tuple[str, int]:
    """`("", 8)` of 08a-mc-after-mcip-cleared, `("r", 8)` of r08-bad-gates."""
    found = re.fullmatch(r"(r?)(\d\d)[a-z]?-[a-z0-9-]+", name)
    assert found, f"{name}: NN-what-it-is, or rNN-what-it-is"
    return found[1], int(found[2])


def test_every_rule_of_the_architecture_decides_a_case(corpus: list[Entry]) -> None:
    wanted = {f"R{number}" for number in range(1, 37)}
    named = set().union(*(entry.rules for entry in corpus))
    assert named <= wanted
    assert wanted - named == set(NOTHING_TO_COMPUTE)


@pytest.mark.parametrize("finding", IDS)
def test_every_finding_is_raised_by_a_case(corpus: list[Entry], finding: str) -> None:
    assert [e.name for e in corpus if finding in e.covered.raised | e.covered.final]


@pytest.mark.parametrize("finding", IDS)
def test_every_finding_is_nearly_raised_by_a_case(corpus: list[Entry], finding: str) -> None:
    """By one that names it under `near-miss` and comes out without it."""
    assert [e.name for e in corpus if finding in e.covered.near_misses - e.covered.raised - e.covered.final]


def test_near_misses_are_findings(corpus: list[Entry]) -> None:
    assert set().union(*(entry.covered.near_misses for entry in corpus)) <= set(IDS)


def test_every_verdict_occurs(corpus: list[Entry]) -> None:
    assert {entry.verdict for entry in corpus} == {"clean", *rules.SEVERITIES}


@pytest.mark.parametrize("severity", rules.SEVERITIES)
def test_every_severity_is_that_of_a_final_word(corpus: list[Entry], severity: str) -> None:
    of = {info.id for info in rules.CATALOGUE if info.severity == severity}
    assert any(of & entry.covered.final for entry in corpus)


def test_every_cause_is_expected_by_a_case(corpus: list[Entry]) -> None:
    assert set(Cause) - set().union(*(entry.causes for entry in corpus)) == set()


def test_every_contradiction_and_reason_is_expected_by_a_case(corpus: list[Entry]) -> None:
    mismatches = reasons = 0
    for entry in corpus:
        mismatches |= entry.details.get(Rule.MODEL_MISMATCH, 0)
        reasons |= entry.details.get(Rule.SHUTDOWN, 0)
    assert [m.name for m in Mismatch if not m & mismatches] == []
    # A triple fault has a finding of its own.
    assert [r.name for r in ShutdownReason if not 1 << r & reasons] == ["TRIPLE_FAULT"]


def test_titles_and_names_are_unique(corpus: list[Entry]) -> None:
    titles = [entry.title.lower() for entry in corpus]
    assert [title for title in titles if titles.count(title) > 1] == []
    numbers = [re.match(r"r?\d\d[a-z]?", entry.name)[0] for entry in corpus]  # type: ignore[index]
    assert [number for number in numbers if numbers.count(number) > 1] == []


def test_a_case_has_a_source_or_is_one_of_a_rule(corpus: list[Entry]) -> None:
    for entry in corpus:
        kind, number = number_of(entry.name)
        if kind:
            assert f"R{number}" in entry.rules, f"{entry.name} is named after a rule that its header does not have"
        else:
            assert entry.sources and all(entry.sources), entry.name


def test_every_real_case_has_a_file(corpus: list[Entry]) -> None:
    have = {number for kind, number in (number_of(entry.name) for entry in corpus) if not kind}
    assert set(range(1, 45)) - have == set(NO_CASE)
