"""What a finding weighs: its severity, by the catalogue and by how it is known, and the sections of the manual."""

from __future__ import annotations

from tracedbg import catalogue as manual
from tracedbg.catalogue import CATALOGUE, EDITIONS, Info
from tracedbg.state import Cause, Evidence, Finding, Mismatch, Rule, ShutdownReason

__all__ = [
    "BY_ID", "BY_RULE", "CATALOGUE", "EDITIONS", "SEVERITIES", "Info", "can_be_inferred", "finding_evidence", "finding_refs",
    "finding_rule", "finding_severity", "rank", "rule_id", "severity",
]  # fmt: skip

SEVERITIES = ("note", "warning", "error")  # weakest first

BY_RULE = {info.rule: info for info in CATALOGUE}
BY_ID = {info.id: info for info in CATALOGUE}

_CAUSE_REFS = {
    Cause.NMI_UNBLOCKED: manual.REF_NMI_BLOCKING,
    Cause.NMI_NEVER_BLOCKED: manual.REF_NMI,
    Cause.NMI_UNKNOWN: manual.REF_NMI_BLOCKING,
    Cause.MC_UNMASKED: manual.REF_MCIP,
    Cause.MASKABLE: manual.REF_IF,
    Cause.RING_GAP: manual.REF_SYSCALL,
    Cause.MOV_SS: manual.REF_MOV_SS,
}

_MISMATCH_REFS = {
    Mismatch.ENTER_RSP: manual.REF_IST,
    Mismatch.ENTER_RIP: manual.REF_GATE,
    Mismatch.ENTER_CS: manual.REF_GATE,
    Mismatch.NMI_BLOCKED: manual.REF_NMI_BLOCKING,
    Mismatch.IF_CLEAR: manual.REF_IF,
    Mismatch.GATE: manual.REF_GATE,
    Mismatch.MC_SHUTDOWN: manual.REF_MCIP,
    Mismatch.TPR: manual.REF_PRIORITY,
    Mismatch.DOUBLE_FAULT: manual.REF_DOUBLE_FAULT,
    Mismatch.GIF: manual.REF_GIF,
    Mismatch.TOKEN: manual.REF_TOKEN,
}

_SHUTDOWN_REFS: dict[int, tuple[str, ...]] = {
    ShutdownReason.TRIPLE_FAULT: (manual.REF_DOUBLE_FAULT,),
    ShutdownReason.MCIP: (manual.REF_MCIP,),
    ShutdownReason.MCE_OFF: (manual.REF_MACHINE_CHECK,),
}

# Of an error whose evidence is weaker than computed no more is claimed than a warning.
_ERROR_NEEDS = Evidence.COMPUTED


def rule_id(rule: Rule) -> str:
    """The stable kebab-case id."""
    return BY_RULE[rule].id


def severity(rule: Rule, evidence: Evidence) -> str:
    """`error`, `warning` or `note`; an error that is only inferred is a warning."""
    level = BY_RULE[rule].severity
    return "warning" if level == "error" and evidence < _ERROR_NEEDS else level


def finding_rule(finding: Finding, at: int | None = None) -> Rule:
    """The rule as known at position `at`; None: the final word."""
    return finding.rule if at is None else finding.rule_at(at)


def finding_evidence(finding: Finding, at: int | None = None) -> Evidence:
    """How the verdict is known: by the fact that settled it, if it was settled otherwise than raised."""
    return finding.evidence if finding_rule(finding, at) == finding.raised_rule else finding.settled_evidence


def finding_severity(finding: Finding, at: int | None = None) -> str:
    """Severity of a finding as known at position `at`; None: the final word."""
    return severity(finding_rule(finding, at), finding_evidence(finding, at))


def finding_refs(finding: Finding, at: int | None = None) -> tuple[str, ...]:
    """The manual's sections: those of the rule, and the one of the cause."""
    rule = finding_rule(finding, at)
    if rule is Rule.SHUTDOWN:
        return _SHUTDOWN_REFS.get(finding.detail, ())
    if rule is Rule.MODEL_MISMATCH:
        return tuple(dict.fromkeys(ref for bit, ref in _MISMATCH_REFS.items() if finding.detail & bit))
    refs = list(BY_RULE[rule].refs)
    extra = _CAUSE_REFS.get(finding.cause)
    if extra is not None and extra not in refs:
        refs.append(extra)
    if finding.cause in (Cause.MC_UNMASKED, Cause.MASKABLE, Cause.SOFTWARE, Cause.OTHER_CPU) and manual.REF_NMI_BLOCKING in refs:
        refs.remove(manual.REF_NMI_BLOCKING)  # NMI blocking had no part in it
    return tuple(refs)


def rank(level: str) -> int:
    """Order of a severity: 0 note, 1 warning, 2 error."""
    return SEVERITIES.index(level)


def can_be_inferred(rule: Rule) -> bool:
    """Whether the replay may raise a rule on inferred evidence."""
    return rule in (
        Rule.FRAME_CLOBBERED, Rule.USER_STACK, Rule.ERROR_CODE_MISMATCH, Rule.NEIGHBOUR_OVERWRITE,
        Rule.DOUBLE_FAULT,  # of a dump, as are the others there
    )  # fmt: skip
