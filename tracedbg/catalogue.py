"""The catalogue of findings: what each means, why it matters, where the manual says so, how real systems avoid it."""

from __future__ import annotations

from dataclasses import dataclass

from tracedbg.state import Rule


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
REF_RETURN = "SDM Vol. 3A 6.14.3"
REF_ERROR_CODE = "SDM Vol. 3A 6.13"
REF_GATE = "SDM Vol. 3A 6.12.1"
REF_NMI = "SDM Vol. 3A 6.7"
REF_NMI_BLOCKING = "SDM Vol. 3A 6.7.1"
REF_IF = "SDM Vol. 3A 6.8.1"
REF_MOV_SS = "SDM Vol. 3A 6.8.3"
REF_DOUBLE_FAULT = "SDM Vol. 3A 6.15, interrupt 8"
REF_MACHINE_CHECK = "SDM Vol. 3A 6.15, interrupt 18"
REF_MCIP = "SDM Vol. 3B 15.3.1.2"
REF_LAPIC = "SDM Vol. 3A 10.5.2"
REF_APIC_ERRORS = "SDM Vol. 3A 10.5.3"
REF_PRIORITY = "SDM Vol. 3A 10.8.3"
REF_SYSCALL = "SDM Vol. 3A 5.8.8"
REF_TOKEN = "SDM Vol. 2A, INT n"
REF_GIF = "APM Vol. 2 15.17"

_COPY = (
    "copy the frame off the top of the IST stack before anything can IRET, and let a nested NMI only mark it for a repeat "
    "(Linux, asm_exc_nmi in entry_64.S)"
)
_LEAVE = "leave the IST stack at entry when the event came from user mode (Linux) or from a guest (Xen)"
_SHIFT = "move the TSS pointer while the stack is in use, so that the next delivery lands below (Linux: #VC, and #DB until 5.7)"
_FRED = "FRED: a delivery at the current stack level goes on below RSP, it never starts again at the top"
_NO_IRET = "keep everything that IRETs (breakpoints, page faults, #MC that returns) out of the NMI handler"
_DF_STACK = "give #DF an IST stack of its own, so that the report of a bad RSP does not become a triple fault"
_GUARD = "an unmapped page below every stack, the IST stacks too (Linux: cpu_entry_area)"

CATALOGUE: tuple[Info, ...] = (
    Info(
        Rule.FRAME_CLOBBERED,
        "frame-clobbered",
        "error",
        "A frame that was still to be resumed was overwritten",
        "A gate with an IST number loads RSP from the TSS at every delivery, also while that stack is in use. The new frame "
        "lands on the bytes of the old one, and the context that the old one saved is gone unless software copied it first. "
        "Whether it was resumed from these bytes is not known at the end of the trace; if it is, the CPU goes on in the wrong "
        "place.",
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
        "INT 18, an 8259 or an interrupt message with vector 0x12 runs the #MC handler without setting MCIP. A genuine #MC "
        "can then come inside the handler and land on the same IST stack.",
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
        (_DF_STACK,),
    ),
    Info(
        Rule.SHUTDOWN,
        "shutdown",
        "error",
        "The CPU shut down",
        "A machine check while MCIP was still set, one with CR4.MCE clear, or a fault while #DF was being delivered "
        "(`triple-fault`) ends in shutdown. Most boards reset then, and nothing is left in memory to say why.",
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
    Info(
        Rule.NEIGHBOUR_OVERWRITE,
        "neighbour-overwrite",
        "error",
        "A store that left its own stack overwrote a frame on the stack below",
        "Stacks that touch are one memory to the CPU: what is pushed below the bottom of one lands at the top of the next, "
        "where the frame of another handler is still to be resumed. The handler that overflowed runs on without a sign of it; "
        "the other one returns to a place that nobody interrupted.",
        (REF_FRAME, REF_IST),
        (
            _GUARD,
            "Xen with shadow stacks makes the pages between the IST stacks read-only shadow-stack pages, which no push can write",
            "order the stacks so that the one that overflows cannot reach the one that has to report it (Xen, 2020: #DF)",
        ),
    ),
    Info(
        Rule.STACK_OVERFLOW,
        "stack-overflow",
        "error",
        "A store or a frame went below the bottom of its stack",
        "Below a stack lies a guard page, another stack or something else. A guard page turns the push into a #PF that cannot "
        "be pushed either, so it ends in #DF; without one, memory of somebody else is overwritten and nothing faults.",
        (REF_FRAME, REF_DOUBLE_FAULT),
        (
            _GUARD,
            _DF_STACK,
            "stacks of their own for NMI, #DB and #MC keep these from adding to the depth of the kernel stack (Linux)",
        ),
    ),
    Info(
        Rule.ERROR_CODE_MISMATCH,
        "error-code-mismatch",
        "error",
        "A handler and the CPU disagree whether there is an error code",
        "Only the exceptions 8, 10 to 14, 17, 21, 29 and 30 push an error code. INT n, an interrupt or an NMI with such a "
        "vector does not, but runs the same handler: that one takes the saved RIP for the error code, and its IRET pops CS as "
        "RIP, RFLAGS as CS and so on. A device that may choose its vector can steer that (CVE-2011-1898).",
        (REF_ERROR_CODE, REF_FRAME),
        (
            "test RSP at entry: the frame is aligned, so bit 3 of RSP says whether there is an error code (Xen's entry stubs)",
            "TPR = 0x10 holds back interrupts with vectors 0x10 to 0x1f, and a look at the ISR tells those that come (Xen)",
            "interrupt remapping keeps devices from choosing vectors; DPL 0 gates keep user mode from INT n",
        ),
    ),
    Info(
        Rule.TRIPLE_FAULT,
        "triple-fault",
        "error",
        "A fault came while #DF was being delivered",
        "Nothing is left that could report the first fault: the CPU shuts down, and most boards reset. Mostly #DF had no good "
        "stack, or the IDT, the GDT or the handler itself was not mapped at that moment.",
        (REF_DOUBLE_FAULT,),
        (
            _DF_STACK,
            "keep IDT, GDT, TSS and the handlers of NMI and #MC mapped and valid at every instruction (Xen had an NMI between "
            "the load of CR3 and of the GDT)",
        ),
    ),
    Info(
        Rule.TOKEN_BUSY,
        "token-busy",
        "error",
        "A delivery found the shadow stack of its IST number in use",
        "With supervisor shadow stacks each IST stack has a token that is busy while the stack is in use. A second delivery "
        "there faults instead of going on unseen; the words of the ordinary frame may have been stored before, so the first "
        "frame may be gone all the same. A token that was left busy on a stack without a handler costs the next event in the "
        "same way.",
        (REF_TOKEN, REF_IST),
        (
            "clear the busy bits where the stacks start afresh: at boot of a CPU and after S3 (Xen, e421ed0f68)",
            _LEAVE,
            "FRED: deliveries use no supervisor tokens",
        ),
    ),
    Info(
        Rule.REENTRY_WINDOW,
        "reentry-window",
        "warning",
        "A frame could have been overwritten: what shares its stack was not held off",
        "While the frame was still to be resumed, an event with a gate to the same IST stack could have been delivered: NMIs "
        "were not blocked, MCIP was clear, or IF was set. That none came at that moment is luck, and the next run may have "
        "less.",
        (REF_IST,),
        (
            _COPY,
            _LEAVE,
            _NO_IRET,
            "clear MCIP last, and DR7 at the entry of NMI and #MC (Linux since 5.8): a few instructions stay open all the same",
        ),
    ),
    Info(
        Rule.NMI_STUCK,
        "nmi-stuck",
        "warning",
        "NMIs stay blocked: the handler of an NMI went away without an IRET",
        "Nothing but IRET (with FRED: a return that pops the NMI bit of its frame) ends the blocking. Where the NMI's context "
        "was left by RET, SYSRET, a switch to another task or a faulting ERETU, neither the watchdog nor an NMI from another "
        "CPU comes through any more, and a hang stays silent.",
        (REF_NMI_BLOCKING,),
        (
            "IRET to the next instruction where the NMI path does not end in one (Xen, enable_nmis: at kexec, after tboot)",
            "leave the NMI handler by IRET at once and do the rest from a self-IPI (Xen, d463b005bb)",
            "FRED: return through ERETS with the NMI bit copied when ERETU faulted (Xen, 99edc6c2a0)",
        ),
    ),
    Info(
        Rule.NMI_LOST,
        "nmi-lost",
        "warning",
        "An NMI came while another one was waiting: it is lost",
        "While NMIs are blocked the CPU keeps one request. A further one changes nothing: the handler runs once for both, and "
        "a source that it does not ask has called in vain.",
        (REF_NMI_BLOCKING,),
        ("ask every source at every NMI instead of counting NMIs (Linux: its list of NMI handlers)",),
    ),
    Info(
        Rule.HELD_VECTOR,
        "held-vector",
        "note",
        "An interrupt is held back by the priority of the local APIC",
        "The local APIC delivers a vector only if its upper four bits are above those of TPR and of what is in service. With "
        "TPR = 0x10 the vectors 0x10 to 0x1f wait in IRR for ever: held, not dropped. That keeps a fake #MC out; that there "
        "was a request at all says that something sends with the vector of an exception.",
        (REF_PRIORITY,),
        ("nothing to fix where TPR is set for that (Xen since 2011, Linux since 5.4); find the sender",),
    ),
    Info(
        Rule.ILLEGAL_VECTOR,
        "illegal-vector",
        "warning",
        "An interrupt was sent with a vector below 16",
        "The local APIC does not deliver vectors 0 to 15: it sets no bit of IRR, only ESR. The interrupt is gone, though its "
        "sender believes that it was taken. For the same reason a message with vector 2 is no fake NMI; an 8259 can do that.",
        (REF_LAPIC, REF_APIC_ERRORS),
        ("keep an entry masked until it has its vector, and read ESR: bit 6 received, bit 5 sent",),
    ),
    Info(
        Rule.UNMATCHED_RETURN,
        "unmatched-return",
        "warning",
        "A return popped a frame that another return had popped before",
        "Every return of the trace is recorded, and the words that this one took belong to a delivery that was returned from "
        "already. RSP was wrong, or the stack was another one than the handler believed: a context is resumed twice, and the "
        "one that should have been resumed is not.",
        (REF_RETURN,),
        ("record the changes of RSP and the stores to the stacks: then the trace says how RSP came there",),
    ),
)
