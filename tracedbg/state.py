"""What the replay says about one position, as plain frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag

NO_EVENT = 0xFFFFFFFF  # in event numbers from the core: none


class Kind(IntEnum):
    """Event kinds; the numbers of `enum tdb_kind`. UNKNOWN stands for numbers that are none."""

    UNKNOWN = 0
    DELIVER = 1
    ENTER = 2
    RETURN = 3
    WRITE = 4
    READ = 5
    MOVE = 6
    SETSP = 7
    TSS = 8
    GATE = 9
    LTR = 10
    LIDT = 11
    SYSCALL = 12
    SYSRET = 13
    SYSENTER = 14
    RAISE = 15
    UNBLOCK = 16
    SMI = 17
    RSM = 18
    MSR = 19
    CR = 20
    GS = 21
    FLAGS = 22
    SHADOW = 23
    EOI = 24
    TOKEN = 25
    VMEXIT = 26
    VMENTRY = 27
    MODE = 28
    INIT = 29
    SHUTDOWN = 30
    GAP = 31
    MARK = 32


class Source(IntEnum):
    """Where a delivery came from; the numbers of `enum tdb_source`."""

    UNKNOWN = 0
    EXCEPTION = 1
    NMI = 2
    MC = 3
    SOFT_INT = 4
    FIXED = 5
    EXTINT = 6
    INJECTED = 7
    EXTERNAL = 8
    SYSCALL = 9


class Return(IntEnum):
    """Which instruction a RETURN is: its `arg`; `enum tdb_return`."""

    IRET = 0
    ERETU = 1
    ERETS = 2


class Known(IntFlag):
    """Which fields of an event are valid; `enum tdb_known`."""

    TIME = 1
    RIP = 2
    RSP = 4
    ADDR = 8
    VALUE = 16
    RFLAGS = 32
    CODE = 64
    SOURCE_INDEX = 128
    CPU = 256
    CS = 512
    SS = 1024
    ARG = 2048
    SOURCE = 4096


class EventFlag(IntFlag):
    """`enum tdb_event_flag`."""

    FAILED = 1
    FAULTED = 2
    PARTIAL = 4
    EXT = 8
    SMM = 16
    BYTES = 32
    LEGACY = 64


class Rule(IntEnum):
    """Findings; the numbers of `enum tdb_rule`. The kebab-case ids are in rules.py."""

    FRAME_CLOBBERED = 0
    FRAME_CONSUMED_CORRUPT = 1
    RESUME_LOOP = 2
    FRAME_RELOCATED = 3
    FRAME_SAME_BYTES = 4
    USER_STACK = 5
    FAKE_NMI = 6
    FAKE_MCE = 7
    DOUBLE_FAULT = 8
    SHUTDOWN = 9
    TRACE_GAP = 10
    MODEL_MISMATCH = 11
    NEIGHBOUR_OVERWRITE = 12
    STACK_OVERFLOW = 13
    ERROR_CODE_MISMATCH = 14
    TRIPLE_FAULT = 15
    TOKEN_BUSY = 16
    REENTRY_WINDOW = 17
    NMI_STUCK = 18
    NMI_LOST = 19
    HELD_VECTOR = 20
    ILLEGAL_VECTOR = 21
    UNMATCHED_RETURN = 22


class Evidence(IntEnum):
    """How a fact is known; a finding is as strong as its weakest fact."""

    UNKNOWN = 0
    INFERRED = 1
    COMPUTED = 2
    RECORDED = 3


class Cause(IntEnum):
    """Why the writer could come while the victim was open; `enum tdb_cause`."""

    NONE = 0
    NMI_UNBLOCKED = 1
    NMI_NEVER_BLOCKED = 2
    NMI_UNKNOWN = 3
    MC_UNMASKED = 4
    MASKABLE = 5
    SOFTWARE = 6
    OTHER_CPU = 7
    RING_GAP = 8
    MOV_SS = 9


class FrameStatus(IntEnum):
    """`enum tdb_frame_status`."""

    LIVE = 0
    CLOBBERED = 1
    MOVED = 2


class Settle(IntEnum):
    """Why a frame stopped being open; `enum tdb_settle`."""

    RETURN = 0
    COPY = 1
    CONTEXT = 2
    ABOVE = 3
    IF = 4
    CPL3 = 5
    POPPED = 6
    OVERWRITTEN = 7
    DROPPED = 8
    NMI = 9
    NESTING = 10


class Shadow(IntEnum):
    """What holds events back for one instruction (SDM Vol. 3A 6.8.3)."""

    NONE = 0
    STI = 1
    MOV_SS = 2


class ShutdownReason(IntEnum):
    """`enum tdb_shutdown`."""

    TRIPLE_FAULT = 0
    MCIP = 1
    MCE_OFF = 2
    OTHER = 3


class Mismatch(IntFlag):
    """`enum tdb_mismatch`."""

    ENTER_RSP = 1
    ENTER_RIP = 2
    ENTER_CS = 4
    NMI_BLOCKED = 8
    IF_CLEAR = 16
    GATE = 32
    MC_SHUTDOWN = 64
    TPR = 128
    DOUBLE_FAULT = 256
    GIF = 512
    TOKEN = 1024


@dataclass(frozen=True, slots=True)
class Event:
    """One record of a trace. `index` is its position in the file, `source_index` the source's own number.

    A field whose bit is not set in `known` holds 0 and means nothing.
    """

    index: int
    kind: Kind
    time: int
    rip: int
    rsp: int
    addr: int
    value: int
    rflags: int
    code: int
    source_index: int
    cpu: int
    cs: int
    ss: int
    known: Known
    arg: int
    source: Source
    flags: EventFlag


@dataclass(frozen=True, slots=True)
class Context:
    """The words of a frame. `code` is the error code; None where unknown or not pushed."""

    rip: int | None
    cs: int | None
    rflags: int | None
    rsp: int | None
    ss: int | None
    code: int | None

    def slots(self) -> tuple[int | None, ...]:
        """Values in the order of x86.SLOT_NAMES."""
        return (self.rip, self.cs, self.rflags, self.rsp, self.ss, self.code)


@dataclass(frozen=True, slots=True)
class Frame:
    """An exception frame that a delivery stored: bytes [lo, hi), hi the aligned top."""

    entry: int
    cpu: int
    vector: int
    source: Source
    ist: int  # 1-7, 0: RSP0 or the current stack
    lo: int
    hi: int
    saved: Context
    status: FrameStatus
    has_code: bool
    gate_type: int
    stack_lo: int
    stack_hi: int
    clobbered_by: int | None
    victim: int | None
    finding: int | None
    fred: bool = False  # 64 bytes with an error code always (FRED), else 40 or 48
    level: int = 0  # FRED stack level of the handler
    from_level: int = 0  # FRED stack level of what it interrupted
    kernel_gs: bool | None = None  # GS base when it was stored: the kernel's, user mode's, unknown

    @property
    def rip_addr(self) -> int:
        """Address of the RIP slot: what RSP is at an IRET."""
        return self.hi - (56 if self.fred else 40)

    @property
    def dedicated(self) -> bool:
        """Stored through an IST gate or at a raised FRED level."""
        return self.ist != 0 or self.level > self.from_level


@dataclass(frozen=True, slots=True)
class Life:
    """A frame from its delivery to its end. The events are indices in the trace; None: there was none."""

    frame: Frame  # as it was stored
    end: int | None  # the event after which it was not open any more; None: open at the end
    settle: Settle | None  # why it ended
    overwritten: int | None  # the first delivery that stored over bytes of it while it was open
    status: FrameStatus = FrameStatus.LIVE  # when it ended
    finding: int | None = None  # number of the finding of that overwrite


@dataclass(frozen=True, slots=True)
class Stack:
    """A stack as memory [lo, hi). slot: 1-7 IST, 8 RSP0, 0 other; named: it comes from the layout."""

    lo: int
    hi: int
    cpu: int
    slot: int
    named: bool
    frames: int
    assumed: bool = False  # nothing tells lo: a usual size


@dataclass(frozen=True, slots=True)
class Word:
    """Eight bytes of stack memory. Bit b of `known`: byte b is known; writers[b]: the event that wrote it, None initial."""

    addr: int
    value: int
    known: int
    writers: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class CpuState:
    """State of one CPU at a position. None: unknown."""

    cpu: int
    rip: int | None
    rsp: int | None
    cs: int | None
    ss: int | None
    rflags: int | None
    user_rsp: int | None
    event: int | None
    nmi_blocked: bool | None
    nmi_pending: bool
    nmi_since: int | None
    nmi_unblocked_by: int | None
    nmi_unblock_frame: int | None
    mcip: bool | None
    gap: bool
    tss: int | None
    idt: int | None
    ring_gap: int | None = None  # the SYSCALL or SYSRET since which RSP is user mode's
    csl: int | None = None  # FRED stack level
    kernel_gs: bool | None = None  # whose GS base is in use
    tpr: int | None = None
    mce: bool | None = None  # CR4.MCE
    gif: bool | None = None  # SVM's global interrupt flag
    fred: bool = False
    shadow: Shadow = Shadow.NONE
    smm: bool = False
    guest: bool = False
    tokens_known: int = 0  # bit n: whether the shadow-stack token of IST n is busy is known
    tokens_busy: int = 0


@dataclass(frozen=True, slots=True)
class Finding:
    """One verdict. Event numbers are indices in the trace.

    `rule` is the final word, `raised_rule` what was known at `event`; `settled` is the event that settled it.
    `slots` and `differ` are masks over x86.SLOT_NAMES.
    """

    number: int
    rule: Rule
    raised_rule: Rule
    evidence: Evidence
    settled_evidence: Evidence
    cause: Cause
    cause_event: int | None
    cause_frame: int | None
    slots: int
    differ: int
    detail: int
    event: int
    settled: int | None
    settled_by: Settle | None
    consumer: int | None
    count: int
    cpu: int
    lo: int
    hi: int
    victim: Frame | None
    writer: Frame | None
    popped: Context | None

    def rule_at(self, position: int) -> Rule:
        """The rule as known after `position` events."""
        if self.settled is not None and position <= self.settled:
            return self.raised_rule
        return self.rule


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters of the forward pass."""

    events: int
    deliveries: int
    judged: int
    unjudged: int
    legacy: int
    failed: int
    returns: int
    writes: int
    gaps: int
    findings: int
    settled: tuple[int, ...]  # by Settle, frames on IST stacks
    ist_deliveries: tuple[int, ...]  # by IST number, [0] without
    open_at_end: int
    pages_forgotten: int
    bad_events: int
    snapshots: int
    pages: int
    frames: int
    interval: int
    bytes: int
    first_bad: int | None = None  # index of the first of the bad events


@dataclass(frozen=True, slots=True)
class Timeline:
    """What equal stretches of events were like on a CPU. `width`: events that a count may stand too early."""

    width: int
    deliveries: tuple[int, ...]
    findings: tuple[int, ...]
    gaps: tuple[int, ...]
    depths: tuple[int, ...]  # the greatest number of open frames after an event


class Touch(IntFlag):
    """What an event does to bytes, or to a frame, that are watched."""

    WRITE = 1  # stores some of them: a delivery, a failed one too, a write, a move
    READ = 2  # loads some of them (a read event)
    POP = 4  # a return pops some of them
    COPY = 8  # a move copies some of them
    END = 16  # the frame is not open any more after it


@dataclass(frozen=True, slots=True)
class Hit:
    """An event that touched what was watched; `value`: the 8 bytes from the first one on after it, bit b of `known`: byte b."""

    event: int
    touch: Touch
    value: int
    known: int


@dataclass(frozen=True, slots=True)
class Position:
    """Everything a screen shows of one position, taken in one go."""

    position: int
    cpus: tuple[CpuState, ...]
    stacks: tuple[Stack, ...]
    frames: tuple[Frame, ...]
    raised: int  # findings raised so far
    last_frame: Frame | None = None
