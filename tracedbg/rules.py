"""The catalogue of findings: what each means, why it matters, where the manual says so, how real systems avoid it."""

from __future__ import annotations

from dataclasses import dataclass

from tracedbg.state import Cause, Evidence, Finding, Rule, ShutdownReason

SEVERITIES = ("note", "warning", "error")  # weakest first


@dataclass(frozen=True, slots=True)
class Info:
    """One rule of the catalogue. `severity` is that of a recorded or computed finding."""

    rule: Rule
    id: str
    severity: str
    title: str
    why: str
    refs: tuple[str, ...]
    fixes: tuple[str, ...]


# Sections are numbered as in the editions up to 2022.
EDITIONS = "(section numbers of the editions up to 2022; chapter 6 is chapter 7 in the newest)"
REF_IST = "SDM Vol. 3A 6.14.5"
REF_FRAME = "SDM Vol. 3A 6.14.2"
REF_NMI = "SDM Vol. 3A 6.7"
REF_NMI_BLOCKING = "SDM Vol. 3A 6.7.1"
REF_IF = "SDM Vol. 3A 6.8.1"
REF_DOUBLE_FAULT = "SDM Vol. 3A 6.15, interrupt 8"
REF_MACHINE_CHECK = "SDM Vol. 3A 6.15, interrupt 18"
REF_MCIP = "SDM Vol. 3B 15.3.1.2"
REF_LAPIC = "SDM Vol. 3A 10.5.2"
REF_SYSCALL = "SDM Vol. 3A 5.8.8"

_COPY = (
    "copy the frame off the top of the IST stack before anything can IRET, and let a nested NMI only mark it for a repeat "
    "(Linux, asm_exc_nmi in entry_64.S)"
)
_LEAVE = "leave the IST stack at entry when the event came from user mode (Linux) or from a guest (Xen)"
_SHIFT = "move the TSS pointer while the stack is in use, so that the next delivery lands below (Linux: #VC, and #DB until 5.7)"
_FRED = "FRED: a delivery at the current stack level goes on below RSP, it never starts again at the top"
_NO_IRET = "keep everything that IRETs (breakpoints, page faults, #MC that returns) out of the NMI handler"

CATALOGUE: tuple[Info, ...] = (
    Info(
        Rule.FRAME_CLOBBERED,
        "frame-clobbered",
        "error",
        "A frame that was still to be resumed was overwritten",
        "A gate with an IST number loads RSP from the TSS at every delivery, also while that stack is in use. The new frame "
        "lands on the bytes of the old one, and the context that the old one saved is gone unless software copied it first. "
        "Whether it was resumed from these bytes is not known at the end of the trace; if it is, the CPU goes on in the "
        "wrong place.",
        (REF_IST, REF_NMI_BLOCKING),
        (_COPY, _LEAVE, _SHIFT, _FRED),
    ),
    Info(
        Rule.FRAME_CONSUMED_CORRUPT,
        "frame-consumed-corrupt",
        "error",
        "A return popped a frame that another delivery had overwritten",
        "The IRET took words that its own entry did not store: they are those of a later delivery on the same stack. The "
        "context that was interrupted first is never resumed, and the code that runs instead runs a second time, on a stack "
        "that may be in use.",
        (REF_IST, REF_NMI_BLOCKING),
        (_COPY, _LEAVE, _SHIFT, _FRED),
    ),
    Info(
        Rule.RESUME_LOOP,
        "resume-loop",
        "error",
        "A return resumes its own handler again and again",
        "The overwritten frame now holds a RIP and RSP inside the handler that returns through it. Each IRET resumes that "
        "handler, which runs to the same IRET and pops the same words: a livelock. With NMIs taken on this stack, the "
        "watchdog's NMI is no way out.",
        (REF_IST, REF_NMI_BLOCKING),
        (_COPY, _LEAVE, _NO_IRET, _FRED),
    ),
    Info(
        Rule.FRAME_RELOCATED,
        "frame-relocated",
        "note",
        "A frame was overwritten, and its context was resumed all the same",
        "Software had copied the frame away, or wrote its words back, before the return. That is how the NMI entry of Linux "
        "works: reusing the top of the stack is part of its protocol.",
        (REF_IST, REF_NMI_BLOCKING),
        ("nothing to fix where the entry code copies the frame on purpose",),
    ),
    Info(
        Rule.FRAME_SAME_BYTES,
        "frame-same-bytes",
        "note",
        "A frame was overwritten with the values that it already held",
        "Two deliveries interrupted the same RIP with the same RSP, so the second frame is a copy of the first. This one did "
        "no harm; the same race one instruction later does.",
        (REF_IST,),
        (_COPY, _LEAVE, _SHIFT, _FRED),
    ),
    Info(
        Rule.USER_STACK,
        "user-stack",
        "error",
        "A frame of CPL 0 was stored on a stack that user mode chose",
        "SYSCALL does not load RSP, and neither does SYSRET on the way out. An event without an IST stack between SYSCALL and "
        "the kernel's own stack switch is pushed wherever user mode left RSP: user mode can read and change the frame, and "
        "with a bad RSP the push faults.",
        (REF_SYSCALL, REF_FRAME, REF_IST),
        (
            "give NMI, #MC, #DB and #DF an IST stack: they can come at any instruction (Linux, Xen)",
            "FRED: SYSCALL switches the stack itself, so there is no such gap",
        ),
    ),
    Info(
        Rule.FAKE_NMI,
        "fake-nmi",
        "warning",
        "Vector 2 was delivered by something that is not an NMI",
        "INT 2, an 8259 or an interrupt message with vector 2 runs the NMI handler, but the CPU does not block NMIs for it. A "
        "genuine NMI can then come inside the handler and land on the same IST stack. The IRET of the fake also ends the "
        "blocking of a genuine NMI.",
        (REF_NMI, REF_NMI_BLOCKING),
        (
            "program the 8259 away from the exception vectors before IF is set",
            "do not use INT 2 to run the NMI handler; call it, as Xen does after a VM exit for an NMI",
            "the local APIC itself refuses vectors 0 to 15; interrupt remapping keeps devices from choosing vectors",
        ),
    ),
    Info(
        Rule.FAKE_MCE,
        "fake-mce",
        "warning",
        "Vector 18 was delivered by something that is not a machine check",
        "INT 18, an 8259 or an interrupt message with vector 0x12 runs the #MC handler without setting MCIP. A genuine #MC can "
        "then come inside the handler and land on the same IST stack.",
        (REF_MCIP, REF_LAPIC),
        (
            "run with TPR = 0x10, which holds back vectors 0x10 to 0x1f from the local APIC (Xen since 2011, Linux since 5.4)",
            "interrupt remapping keeps devices from choosing vectors",
        ),
    ),
    Info(
        Rule.DOUBLE_FAULT,
        "double-fault",
        "error",
        "A fault came while another one was being delivered",
        "#DF means that the CPU could not deliver an exception: mostly the push of its frame faulted because RSP was bad or "
        "the stack had run into its guard page. #DF is an abort: its saved RIP is not reliable.",
        (REF_DOUBLE_FAULT,),
        ("give #DF an IST stack of its own, so that the report of a bad RSP does not become a triple fault",),
    ),
    Info(
        Rule.SHUTDOWN,
        "shutdown",
        "error",
        "The CPU shut down",
        "A fault while #DF was being delivered (triple fault), a machine check while MCIP was still set, or one with CR4.MCE "
        "clear ends in shutdown. Most boards reset then, and nothing is left in memory to say why.",
        (REF_DOUBLE_FAULT, REF_MCIP),
        (
            "clear MCIP as the last step of the #MC handler, not earlier: until then a second #MC shuts down, after it a "
            "second #MC overwrites the frame",
        ),
    ),
    Info(
        Rule.TRACE_GAP,
        "trace-gap",
        "note",
        "Records of the trace are missing",
        "What happened in the gap is not known. Frames that were open before it and the NMI blocking of the CPU are unknown "
        "after it, and no finding rests on them.",
        (),
        ("record with larger buffers, or fewer event classes",),
    ),
    Info(
        Rule.MODEL_MISMATCH,
        "model-mismatch",
        "warning",
        "The trace contradicts the rules of the architecture",
        "The source recorded something that the rules do not allow: an entry at another RSP or handler than the TSS and IDT "
        "give, a maskable interrupt with IF clear, an NMI while NMIs were blocked. The layout belongs to another moment or "
        "another machine, the source differs from the manual, or a record is wrong.",
        (REF_IST, REF_IF),
        ("give the layout that was in force (`tracedbg help layout`)",),
    ),
)

BY_RULE = {info.rule: info for info in CATALOGUE}
BY_ID = {info.id: info for info in CATALOGUE}

_CAUSE_REFS = {
    Cause.NMI_UNBLOCKED: REF_NMI_BLOCKING,
    Cause.NMI_NEVER_BLOCKED: REF_NMI,
    Cause.NMI_UNKNOWN: REF_NMI_BLOCKING,
    Cause.MC_UNMASKED: REF_MCIP,
    Cause.MASKABLE: REF_IF,
}

_SHUTDOWN_REFS: dict[int, tuple[str, ...]] = {
    ShutdownReason.TRIPLE_FAULT: (REF_DOUBLE_FAULT,),
    ShutdownReason.MCIP: (REF_MCIP,),
    ShutdownReason.MCE_OFF: (REF_MACHINE_CHECK,),
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
    refs = list(BY_RULE[rule].refs)
    extra = _CAUSE_REFS.get(finding.cause)
    if extra is not None and extra not in refs:
        refs.append(extra)
    if finding.cause in (Cause.MC_UNMASKED, Cause.MASKABLE, Cause.SOFTWARE, Cause.OTHER_CPU) and REF_NMI_BLOCKING in refs:
        refs.remove(REF_NMI_BLOCKING)  # NMI blocking had no part in it
    return tuple(refs)


def rank(level: str) -> int:
    """Order of a severity: 0 note, 1 warning, 2 error."""
    return SEVERITIES.index(level)


def can_be_inferred(rule: Rule) -> bool:
    """Whether the replay may raise a rule on inferred evidence."""
    return rule in (Rule.FRAME_CLOBBERED, Rule.USER_STACK)
