"""The records of the slow model: events, stacks, frames, findings, CPUs (replay.md, "State")."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from tracedbg import wire, x86
from tracedbg.layout import SLOT_RSP0, Fred, Gate
from tracedbg.state import Cause, Context, Evidence, FrameStatus, Known, Rule, Settle, Shadow, Source
from tracedbg.state import Frame as StateFrame
from tracedbg.trace import Trace

MASK = (1 << 64) - 1
CONSUMED_KEPT = 8
SLOTS = ("rip", "cs", "rflags", "rsp", "ss", "code")  # bit numbers of slot masks
SLOT_BITS = {"rip": 64, "cs": 16, "rflags": 32, "rsp": 64, "ss": 16}

Bytes = list[int | None]  # None: unknown


@dataclass
class ModelEvent:
    """One record; a field that is not known is None. `source` 0, or one that there is not, counts as not known."""

    index: int
    kind: int
    rip: int | None
    rsp: int | None
    addr: int | None
    value: int | None
    rflags: int | None
    code: int | None
    cpu: int | None
    cs: int | None
    ss: int | None
    arg: int | None
    source: int | None
    flags: int


def decode(trace: Trace, index: int) -> ModelEvent:
    """Read one record, also one of an unknown kind."""
    values = wire.EVENT_PACK.unpack_from(trace.events, index * wire.EVENT_SIZE)
    (_, rip, rsp, addr, value, rflags, code, _, cpu, cs, ss, known, kind, arg, source, flags) = values

    def have(bit: Known, number: int) -> int | None:
        return number if known & bit else None

    return ModelEvent(
        index,
        kind,
        have(Known.RIP, rip),
        have(Known.RSP, rsp),
        have(Known.ADDR, addr),
        have(Known.VALUE, value),
        have(Known.RFLAGS, rflags),
        have(Known.CODE, code),
        have(Known.CPU, cpu),
        have(Known.CS, cs),
        have(Known.SS, ss),
        have(Known.ARG, arg),
        (have(Known.SOURCE, source) or None) if source <= max(Source) else None,
        flags,
    )


@dataclass(frozen=True)
class ModelStack:
    """A stack: bytes [lo, hi), addresses (lo, hi]. slot 1-8 of a named one is per CPU."""

    lo: int
    hi: int
    named: bool
    slot: int
    assumed: bool = False  # lo is only a usual size

    @property
    def per_cpu(self) -> bool:
        return self.named and 1 <= self.slot <= SLOT_RSP0


@dataclass
class ModelFrame:
    """What one delivery stored. `image`: its words from hi down, 8 bytes each."""

    entry: int
    cpu: int
    vector: int
    source: int
    ist: int
    gate_type: int
    lo: int
    hi: int
    stack: ModelStack
    saved: Context
    has_code: bool
    status: FrameStatus = FrameStatus.LIVE
    clobbered_by: int | None = None
    victim: int | None = None
    finding: int | None = None
    fred: bool = False
    level: int = 0
    from_level: int = 0
    gs: bool | None = None
    image: list[Bytes] = field(default_factory=list)
    handler: tuple[int, int | None] = (0, None)  # RIP, and through a gate CS
    looked_at: set[Cause] = field(default_factory=set)  # kinds of windows
    neighbour: bool = False  # a write over it was reported
    ring_gap: int | None = None  # the SYSCALL or SYSRET in whose gap it came
    depth: int = 0  # of its CPU, before its delivery

    @property
    def rip_addr(self) -> int:
        return self.hi - (56 if self.fred else 40)

    @property
    def dedicated(self) -> bool:
        return self.ist != 0 or self.level > self.from_level

    @property
    def own(self) -> bool:
        """One of the CPU's own."""
        return self.stack.per_cpu or self.dedicated

    @property
    def from_kernel(self) -> bool:
        """It is known to have interrupted CPL 0."""
        return self.saved.cs is not None and x86.cpl(self.saved.cs) == 0

    def overlaps(self, lo: int, hi: int) -> bool:
        return self.lo < hi and lo < self.hi

    def slot_addr(self, slot: str) -> int:
        """Address of a word; SS is 32 bytes above RIP in both formats, the error code 8 below it."""
        return self.rip_addr + {"ss": 32, "rsp": 24, "rflags": 16, "cs": 8, "rip": 0, "code": -8}[slot]

    def bytes(self) -> dict[int, int | None]:
        """Address -> what the delivery stores there."""
        return {self.hi - 8 * n + at: byte for n, word in enumerate(self.image, 1) for at, byte in enumerate(word)}

    def cut(self, words: int) -> ModelFrame:
        """The frame of an attempt that stored its first words only."""
        image = self.image[:words]
        whole = len(image) == len(self.image)
        saved = self.saved if whole else replace(self.saved, code=None)
        return replace(self, lo=self.hi - 8 * len(image), image=image, saved=saved, has_code=self.has_code and whole)

    def state(self) -> StateFrame:
        """As the Python interface shows it."""
        return StateFrame(
            entry=self.entry,
            cpu=self.cpu,
            vector=self.vector,
            source=Source(self.source),
            ist=self.ist,
            lo=self.lo,
            hi=self.hi,
            saved=self.saved,
            status=self.status,
            has_code=self.has_code,
            gate_type=self.gate_type,
            stack_lo=self.stack.lo,
            stack_hi=self.stack.hi,
            clobbered_by=self.clobbered_by,
            victim=self.victim,
            finding=self.finding,
            fred=self.fred,
            level=self.level,
            from_level=self.from_level,
            kernel_gs=self.gs,
        )


@dataclass
class ModelFinding:
    """One verdict; the fields of state.Finding."""

    number: int
    rule: Rule
    raised_rule: Rule
    evidence: Evidence
    event: int
    cpu: int
    lo: int = 0
    hi: int = 0
    slots: int = 0
    differ: int = 0
    detail: int = 0
    cause: Cause = Cause.NONE
    cause_event: int | None = None
    cause_frame: int | None = None
    victim: ModelFrame | None = None
    writer: ModelFrame | None = None
    settled: int | None = None
    settled_by: Settle | None = None
    settled_evidence: Evidence = Evidence.UNKNOWN
    consumer: int | None = None
    popped: Context | None = None
    count: int = 1


@dataclass(frozen=True)
class Failed:
    """A failed delivery."""

    event: int
    vector: int | None
    is_exception: bool
    told: tuple[int | None, ...] = ()  # RIP, error code, value


@dataclass
class Nmi:
    """What is known of NMI blocking."""

    blocked: bool | None = None
    since: int | None = None
    unblocked_by: int | None = None
    unblock_frame: int | None = None


@dataclass
class Msrs:
    """FRED's, SYSCALL's and SYSENTER's; None: unknown."""

    fred_rsp: list[int | None] = field(default_factory=lambda: [None] * 4)
    stklvls: int | None = None
    config: int | None = None
    star: int | None = None
    lstar: int | None = None
    fmask: int | None = None
    sysenter_cs: int | None = None
    sysenter_esp: int | None = None
    sysenter_eip: int | None = None

    @classmethod
    def of(cls, fred: Fred) -> Msrs:
        return cls(list(fred.rsp), fred.stklvls, fred.config)

    @property
    def level(self) -> int | None:
        """The CSL that CONFIG holds."""
        return None if self.config is None else self.config & 3


@dataclass(frozen=True)
class RingGap:
    """RSP is still user mode's since this SYSCALL or SYSRET; `shadow`: the event of MOV SS's shadow that was there."""

    event: int
    rsp: int | None
    shadow: int | None = None


@dataclass
class ModelCpu:
    """State of one CPU; None: unknown or none."""

    tss: int | None = None
    idt: int | None = None
    rip: int | None = None
    rsp: int | None = None
    cs: int | None = None
    ss: int | None = None
    rflags: int | None = None
    home: ModelStack | None = None
    user_rsp: int | None = None
    event: int | None = None
    nmi: Nmi = field(default_factory=Nmi)
    nmi_pending: bool = False
    nmi_stuck: bool = False  # reported since NMIs were blocked
    mcip: bool | None = None
    mcg_status_seen: bool = False  # an `msr` event tells when MCIP is cleared
    mce: bool | None = None
    tpr: int | None = None
    gif: bool | None = None
    gs: bool | None = None  # True: the kernel's base
    tokens: dict[int, bool] = field(default_factory=dict)  # IST -> busy; missing: unknown
    tokens_raised: set[int] = field(default_factory=set)
    shadow: tuple[Shadow, int] | None = None  # and its event
    smm: bool = False
    smm_kept: Nmi = field(default_factory=Nmi)
    smm_iret: int | None = None
    guest: bool = False
    ring_gap: RingGap | None = None
    fred: bool = False
    csl: int | None = None
    msrs: Msrs = field(default_factory=Msrs)
    gap: bool = False
    placed: int | None = None  # the last event of this CPU, if it was a placed delivery
    failed: Failed | None = None
    failed_before: Failed | None = None
    loop: tuple[int, int, int] | None = None  # R, RIP, RSP
    loop_victim: int = 0  # entry
    loop_finding: int = 0
    depth: int = 0  # deliveries that no return has come for
    consumed: deque[int] = field(default_factory=lambda: deque(maxlen=CONSUMED_KEPT))  # entries, by returns
    overflow: tuple[ModelStack, int] | None = None  # the last one's stack, finding
    folds: dict[tuple[object, ...], int] = field(default_factory=dict)  # what is one finding -> its number

    def registers_unknown(self) -> None:
        self.rip = self.rsp = self.cs = self.ss = self.rflags = None

    @property
    def if_set(self) -> bool:
        """RFLAGS.IF is known to be set."""
        return self.rflags is not None and bool(self.rflags >> 9 & 1)


@dataclass
class ModelTss:
    base: int
    rsp: list[int | None]
    ist: list[int | None]


@dataclass
class ModelIdt:
    base: int
    gates: dict[int, Gate]


@dataclass
class ModelStats:
    events: int = 0
    deliveries: int = 0
    judged: int = 0
    unjudged: int = 0
    legacy: int = 0
    failed: int = 0
    returns: int = 0
    writes: int = 0
    gaps: int = 0
    bad_events: int = 0
    settled: list[int] = field(default_factory=lambda: [0] * len(Settle))
    ist_deliveries: list[int] = field(default_factory=lambda: [0] * 8)


def bytes_of(value: int | None, length: int) -> Bytes:
    if value is None:
        return [None] * length
    return [value >> 8 * n & 0xFF for n in range(length)]


def mask_of(slots: Iterable[str]) -> int:
    return sum(1 << SLOTS.index(slot) for slot in slots)
