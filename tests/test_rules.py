"""The catalogue of findings is complete, and severities follow the evidence."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from samples import CLOBBER, LOOP

from tracedbg import rules
from tracedbg.state import Cause, Evidence, Mismatch, Rule, Settle, ShutdownReason


def test_every_rule_is_in_the_catalogue_once() -> None:
    assert sorted(info.rule for info in rules.CATALOGUE) == list(Rule)
    assert len(rules.BY_ID) == len(Rule)


@pytest.mark.parametrize("info", rules.CATALOGUE, ids=lambda info: info.id)
def test_entries_are_whole(info: rules.Info) -> None:
    assert info.id == info.rule.name.lower().replace("_", "-")
    assert info.severity in rules.SEVERITIES
    assert info.title and info.why.endswith(".") and not info.title.endswith(".")
    assert info.fixes
    section = r"SDM Vol\. \d[ABCD]? \d+(\.\d+)*(, interrupt \d+)?|SDM Vol\. 2A, INT n"
    assert all(re.fullmatch(section, ref) for ref in info.refs)
    assert info.refs or info.rule is Rule.TRACE_GAP


def test_severities_are_those_of_the_design() -> None:
    def of(severity: str) -> set[str]:
        return {i.id for i in rules.CATALOGUE if i.severity == severity}

    assert of("error") == {
        "frame-consumed-corrupt", "resume-loop", "frame-clobbered", "user-stack", "error-code-mismatch", "stack-overflow",
        "neighbour-overwrite", "double-fault", "triple-fault", "shutdown", "token-busy",
    }  # fmt: skip
    assert of("warning") == {
        "reentry-window", "fake-nmi", "fake-mce", "nmi-stuck", "nmi-lost", "illegal-vector", "model-mismatch", "unmatched-return",
    }
    assert of("note") == {"frame-relocated", "frame-same-bytes", "held-vector", "trace-gap"}


@pytest.mark.parametrize(
    ("evidence", "severity"),
    [(Evidence.RECORDED, "error"), (Evidence.COMPUTED, "error"), (Evidence.INFERRED, "warning"), (Evidence.UNKNOWN, "warning")],
)
def test_an_error_that_is_only_inferred_is_a_warning(evidence: Evidence, severity: str) -> None:
    assert rules.severity(Rule.FRAME_CLOBBERED, evidence) == severity
    for rule in (Rule.USER_STACK, Rule.ERROR_CODE_MISMATCH, Rule.NEIGHBOUR_OVERWRITE):
        assert rules.severity(rule, evidence) == severity
    assert rules.severity(Rule.FRAME_RELOCATED, evidence) == "note"
    assert rules.severity(Rule.FAKE_NMI, evidence) == "warning"


def test_a_settled_finding_is_as_strong_as_what_settled_it() -> None:
    weak = replace(LOOP, evidence=Evidence.INFERRED)
    assert rules.finding_evidence(weak) is Evidence.RECORDED
    assert rules.finding_severity(weak) == "error"
    assert rules.finding_severity(weak, at=4) == "warning"  # before the return it was an inferred overwrite
    survived = replace(
        CLOBBER, rule=Rule.FRAME_RELOCATED, settled=9, settled_by=Settle.CONTEXT, settled_evidence=Evidence.INFERRED
    )
    assert rules.finding_severity(survived) == "note"
    assert rules.finding_evidence(survived) is Evidence.INFERRED
    assert rules.finding_severity(survived, at=9) == "error"
    assert rules.finding_severity(survived, at=10) == "note"


def test_refs_name_the_section_of_the_cause() -> None:
    assert rules.finding_refs(CLOBBER) == ("SDM Vol. 3A 6.14.5", "SDM Vol. 3A 6.7.1")
    assert rules.finding_refs(replace(CLOBBER, cause=Cause.MC_UNMASKED)) == ("SDM Vol. 3A 6.14.5", "SDM Vol. 3B 15.3.1.2")
    assert rules.finding_refs(replace(CLOBBER, cause=Cause.OTHER_CPU)) == ("SDM Vol. 3A 6.14.5",)
    mcip = replace(CLOBBER, rule=Rule.SHUTDOWN, raised_rule=Rule.SHUTDOWN, detail=ShutdownReason.MCIP)
    assert rules.finding_refs(mcip) == ("SDM Vol. 3B 15.3.1.2",)
    gap = replace(CLOBBER, rule=Rule.USER_STACK, raised_rule=Rule.USER_STACK, cause=Cause.RING_GAP)
    assert rules.finding_refs(gap) == ("SDM Vol. 3A 5.8.8", "SDM Vol. 3A 6.14.2", "SDM Vol. 3A 6.14.5")
    assert rules.finding_refs(replace(gap, cause=Cause.MOV_SS))[-1] == "SDM Vol. 3A 6.8.3"
    window = replace(CLOBBER, rule=Rule.REENTRY_WINDOW, raised_rule=Rule.REENTRY_WINDOW)
    assert rules.finding_refs(window) == ("SDM Vol. 3A 6.14.5", "SDM Vol. 3A 6.7.1")


@pytest.mark.parametrize("bit", list(Mismatch))
def test_every_mismatch_has_its_section(bit: Mismatch) -> None:
    def refs(detail: int) -> tuple[str, ...]:
        value = replace(CLOBBER, rule=Rule.MODEL_MISMATCH, raised_rule=Rule.MODEL_MISMATCH, cause=Cause.NONE, detail=detail)
        return rules.finding_refs(value)

    assert len(refs(bit)) == 1
    assert set(refs(bit)) <= set(refs(bit | Mismatch.IF_CLEAR)) and "SDM Vol. 3A 6.8.1" in refs(bit | Mismatch.IF_CLEAR)
    assert refs(Mismatch.MC_SHUTDOWN) == ("SDM Vol. 3B 15.3.1.2",)
    assert refs(Mismatch.ENTER_RIP | Mismatch.ENTER_CS) == ("SDM Vol. 3A 6.12.1",)


def test_which_errors_can_be_warnings() -> None:
    assert {info.id for info in rules.CATALOGUE if rules.can_be_inferred(info.rule)} == {
        "frame-clobbered", "user-stack", "error-code-mismatch", "neighbour-overwrite", "double-fault",
    }  # fmt: skip


def test_severities_are_ordered() -> None:
    assert rules.SEVERITIES == ("note", "warning", "error")
    assert rules.rank("note") < rules.rank("warning") < rules.rank("error")


def test_the_help_page_lists_every_rule_with_its_severity(root: Path) -> None:
    page = (root / "tracedbg" / "help" / "findings.md").read_text(encoding="utf-8")
    for info in rules.CATALOGUE:
        assert page.count(f"| `{info.id}` | {info.severity} |") == 1
        assert page.count(f"\n## `{info.id}`\n") == 1
