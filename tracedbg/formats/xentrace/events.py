"""The records of xentrace, and what each is as a native event: the declaration that csrc/decode/xentrace.h works by.

Layouts: Xen's xen/include/public/trace.h. A record is u32 header (event 27:0, words of payload 30:28, TSC included 31), u32 TSC
low and high if included, the payload; little-endian. Records of what happens inside a VM exit (0x82xxx) have no TSC.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from tracedbg import x86
from tracedbg.state import Source

CPU_CHANGE = 0x2001F003  # header of the record that begins a window: u32 CPU, u32 bytes of the window behind it
SVM_NMI = 0x61  # exit reason (APM volume 2, appendix C)

_NESTED = 0x400  # VM entry and exit of a nested guest, SVM only
_NO_ERROR_CODE = 0xFFFFFFFF  # X86_EVENT_NO_EC


class Vendor(Enum):
    """Whose virtualisation it is."""

    VMX = auto()
    SVM = auto()


class Make(Enum):
    """What is done with a record. The fields that it uses are said in csrc/decode/xentrace.h, enum xt_make."""

    WRAP = auto()  # fills the ring to its end; holds anything, its TSC too
    LOST = auto()  # a gap
    ENTRY = auto()
    EXIT = auto()
    RAISE = auto()  # a request for the guest: the CPU's own state does not change by what Xen injects, or wants to
    WAIT = auto()  # the same, as far as WAITING knows what waits
    EXIT_WAS = auto()  # says the source of the VM exit around it
    EXIT_NMI = auto()  # the same. VMX: Xen calls the handler as a function; SVM: delivered when GIF was set again
    INTR = auto()  # the exit was for an interrupt
    TRAP = auto()  # of a PV guest: a delivery to Xen, which passes it on, or a request (MADE_UP)
    DELIVER = auto()
    BIND = auto()  # an IRQ gets a vector
    UNBIND = auto()
    HANDLED = auto()  # a delivery, unless it is the one of INTR; the record comes after the handler
    MARK = auto()  # a note


@dataclass(frozen=True, slots=True)
class Part:
    """Where something lies in the payload: bits of a word from `shift` on; 64 bits are a word and the next, low one first."""

    word: int
    shift: int = 0
    bits: int = 32


@dataclass(frozen=True, slots=True)
class Record:
    """One kind of record.

    `vector`: a Part, or the vector itself. `coded`: 0 there says that there is no code; `no_code`: a code of this value does.
    `words`: of payload at least, None: as many as its parts need. A shorter one makes no event and is counted as odd.
    """

    event: int
    make: Make
    vector: Part | int = 0
    code: Part | None = None
    value: Part | None = None
    rip: Part | None = None
    time: Part | None = None
    irq: Part | None = None
    coded: Part | None = None
    source: Source = Source.UNKNOWN
    no_code: int = 1 << 32
    texts: tuple[str, ...] = ()
    words: int | None = None
    vendor: Vendor | None = None

    @property
    def least(self) -> int:
        """Words of payload that it has at least."""
        parts = (self.vector, self.code, self.value, self.rip, self.time, self.irq, self.coded)
        needed = max((part.word + (2 if part.bits > 32 else 1) for part in parts if isinstance(part, Part)), default=0)
        return needed if self.words is None else self.words


def _long(word: int) -> Part:
    return Part(word, bits=64)


def _exits(event: int, vendor: Vendor | None) -> tuple[Record, ...]:
    """VM exits: u32 reason, RIP of the guest in 32 or 64 bits."""
    return tuple(
        Record(event | long | nested, Make.EXIT, code=Part(0), value=_long(1) if long else Part(1), vendor=vendor)
        for nested in (0, _NESTED)
        for long in (0, 0x100)
    )


def _trap(event: int, word: int, rip: Part) -> Record:
    """A trap passed on to a PV guest. From `word` on: u16 vector 14:0 and "has an error code" 15, u16 error code."""
    return Record(
        event, Make.TRAP, vector=Part(word, bits=15), coded=Part(word, 15, 1), code=Part(word, 16, 16), rip=rip,
        source=Source.EXCEPTION,
    )  # fmt: skip


def _fault(event: int, rip: Part, address: Part, code: Part) -> Record:
    """A page fault passed on to a PV guest."""
    return Record(event, Make.DELIVER, vector=x86.PAGE_FAULT, rip=rip, value=address, code=code, source=Source.EXCEPTION)


_IRQ, _IRQ_VECTOR = Part(0, bits=16), Part(0, 16, 16)  # of a binding (xenalyze reads two u32)

RECORDS = (
    # TRC_LOST_RECORDS: u32 records, u16 domain, u16 vCPU, u64 TSC of the first one; its own TSC is that of their end
    Record(0x1F001, Make.LOST, value=Part(0), time=_long(2)),
    Record(0x1F002, Make.WRAP),
    # VM entries and exits. Before Xen 4.19 SVM wrote its exits with the number of VMX.
    Record(0x81001, Make.ENTRY),
    Record(0x81001 | _NESTED, Make.ENTRY),
    *_exits(0x81002, None),
    *_exits(0x81003, Vendor.SVM),
    # What Xen injects into an HVM guest: PF_INJECT, PF_INJECT64, INJ_EXC, INJ_VIRQ, REINJ_VIRQ; what has to wait: INTR_WINDOW,
    # u32 vector, u32 source, u32 vector that waits already (an interrupt comes again as INJ_VIRQ; for an NMI this is all)
    Record(0x82002, Make.RAISE, vector=x86.PAGE_FAULT, code=Part(0), value=Part(1)),
    Record(0x82102, Make.RAISE, vector=x86.PAGE_FAULT, code=Part(0), value=_long(1)),
    Record(0x82003, Make.RAISE, vector=Part(0), code=Part(1), no_code=_NO_ERROR_CODE),
    Record(0x82004, Make.RAISE, vector=Part(0)),
    Record(0x82005, Make.RAISE, vector=Part(0)),
    Record(0x82020, Make.WAIT, code=Part(1)),
    # What ended the run of an HVM guest: INTR (VMX: u32 vector, SVM: nothing), NMI, SMI, MCE, TRAP (u32 vector), TRAP_DEBUG
    Record(0x8200F, Make.INTR, vector=Part(0), source=Source.EXTERNAL, words=0),
    Record(0x82010, Make.EXIT_NMI, vector=x86.NMI, source=Source.NMI),
    Record(0x82011, Make.MARK, texts=("VM exit for an SMI",)),
    Record(0x82015, Make.EXIT_WAS, source=Source.MC),
    Record(0x82023, Make.MARK, value=Part(0, bits=8), texts=tuple(f"VM exit for the guest's exception {n}" for n in range(256))),
    Record(0x82024, Make.MARK, texts=("VM exit for the guest's #DB",)),
    # PV_TRAP, PV_TRAP64, PV_PAGE_FAULT, PV_PAGE_FAULT64: what the CPU delivered while the guest ran
    _trap(0x201003, 1, Part(0)),
    _trap(0x201103, 2, _long(0)),
    _fault(0x201004, Part(0), Part(1), Part(2)),
    _fault(0x201104, _long(0), _long(2), Part(4)),
    # Interrupts of Xen: BIND, CLEAR, ASSIGN_VECTOR (u16 IRQ, u16 vector, masks); UNMAPPED_VECTOR (u32 vector); HANDLED (u32 IRQ,
    # low halves of the TSC before and after its handler)
    Record(0x802003, Make.BIND, irq=_IRQ, vector=_IRQ_VECTOR),
    Record(0x802004, Make.UNBIND, irq=_IRQ),
    Record(0x802006, Make.BIND, irq=_IRQ, vector=_IRQ_VECTOR),
    Record(0x802007, Make.DELIVER, vector=Part(0), source=Source.EXTERNAL),
    Record(0x802008, Make.HANDLED, irq=Part(0), time=Part(1), source=Source.EXTERNAL),
)

# Exit reasons that only one vendor has. SVM: INTR and what follows (APM volume 2, appendix C). VMX: accesses to control
# registers that do not exist, on SVM (CR1, CR5-7, CR9-15, read and written): interrupt window, task switch, CPUID, HLT, MSRs ...
REASONS = {
    **dict.fromkeys((*range(0x60, 0xA8), *range(0x400, 0x404)), Vendor.SVM),
    **dict.fromkeys((n for n in range(0x20) if n % 16 in (1, 5, 6, 7, *range(9, 16))), Vendor.VMX),
}

# What waits, by the source of WAIT: enum hvm_intsrc.
WAITING = {3: x86.NMI, 4: x86.MACHINE_CHECK}

# Traps of PV guests that the CPU did not deliver to Xen as such: virtual NMIs and #MCs, INT n that Xen emulates, and INT3 and
# INTO, whose RIP is the one behind the instruction.
MADE_UP = frozenset((x86.NMI, 3, 4, x86.MACHINE_CHECK, *range(32, 256)))
