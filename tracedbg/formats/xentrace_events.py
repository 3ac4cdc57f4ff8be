"""What the records of xentrace are as native events.

The layouts are those of Xen's xen/include/public/trace.h; who writes a record, and when, is said where it matters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tracedbg import wire, x86
from tracedbg.state import EventFlag, Kind, Known, Source
from tracedbg.writer import TraceWriter

VMX, SVM = 0, 1
VENDORS = {"vmx": VMX, "svm": SVM}

NESTED = 0x400  # VM entry and exit of a nested guest, SVM only
VMENTRY = 0x81001
EXIT, EXIT64, SVM_EXIT, SVM_EXIT64 = 0x81002, 0x81102, 0x81003, 0x81103
SVM_NMI = 0x61  # exit reason

_LOST_RECORDS = 0x1F001
# Reasons that only one vendor has. SVM: INTR and what follows (APM volume 2, appendix C). VMX: accesses to control registers
# that do not exist, on SVM (CR1, CR5-7, CR9-15, read and written): interrupt window, task switch, CPUID, HLT, I/O, MSRs ...
_SVM_REASONS = frozenset((*range(0x60, 0xA8), *range(0x400, 0x404)))
_VMX_REASONS = frozenset(n for n in range(0x20) if n % 16 in (1, 5, 6, 7, *range(9, 16)))
_NO_ERROR_CODE = 0xFFFFFFFF  # X86_EVENT_NO_EC
_WINDOW_VECTORS = {3: x86.NMI, 4: x86.MACHINE_CHECK}  # enum hvm_intsrc

# Plain numbers: an OR of enum members costs more than all else that is done for an event.
_K_ADDR = int(Known.ADDR)
_K_ARG = int(Known.ARG)
_K_CODE = int(Known.CODE)
_K_CPU = int(Known.CPU)
_K_RIP = int(Known.RIP)
_K_SOURCE = int(Known.SOURCE)
_K_TIME = int(Known.TIME)
_K_VALUE = int(Known.VALUE)

ROW = wire.EVENT_SIZE
_PACK = wire.EVENT_PACK.pack


@dataclass(slots=True)
class Window:
    """Events of one window: packed, in the order of its records. `start` is the CPU's position of the first (bytes)."""

    cpu: int
    start: int
    rows: bytearray = field(default_factory=bytearray)

    def drop(self, size: int) -> None:
        """Forget events at the beginning."""
        del self.rows[:size]
        self.start += size


@dataclass(slots=True)
class Cpu:
    """What is remembered of a CPU. Positions are bytes of its events since the beginning, -1: none."""

    number: int
    windows: list[Window] = field(default_factory=list)  # the last two: their events can still be corrected
    tsc: int = -1
    entry_at: int = -1  # the last VM entry
    exit_at: int = -1  # the last VM exit
    stgi_at: int = -1  # the exit after which GIF was said to be set
    intr_at: int = -1  # the last delivery that VMX acknowledged by an exit and that is not recorded as handled yet
    intr_vector: int = -1  # its vector
    irq_at: int = -1  # the last delivery of an interrupt that was recorded as handled

    def begin(self) -> Window:
        """Begin a window."""
        last = self.windows[-1] if self.windows else None
        window = Window(self.number, 0 if last is None else last.start + len(last.rows))
        self.windows = [*self.windows[-1:], window]
        return window

    @property
    def in_exit(self) -> bool:
        """Whether the last of VM entry and VM exit was an exit."""
        return self.exit_at > self.entry_at


class Events:
    """Makes native events of single records. `vendor` None: recognised by the exits."""

    def __init__(self, writer: TraceWriter, vendor: int | None = None) -> None:
        self.vendor = vendor
        self.counts: Counter[str] = Counter()
        self._writer = writer
        self._texts: dict[str, tuple[int, int]] = {}
        self._vectors: dict[int, int] = {}  # IRQ -> vector, as far as bindings were recorded
        self.makers: dict[int, Callable[[Cpu, int, Sequence[int]], None]] = {
            _LOST_RECORDS: self._lost, VMENTRY: self._entry, VMENTRY | NESTED: self._entry,
            0x82002: self._page_fault, 0x82102: self._page_fault64, 0x82003: self._exception,
            0x82004: self._virq, 0x82005: self._virq, 0x8200F: self._intr, 0x82010: self._nmi, 0x82011: self._smi,
            0x82015: self._mce, 0x82020: self._intr_window, 0x82023: self._trap, 0x82024: self._debug,
            0x201003: self._pv_trap, 0x201103: self._pv_trap64, 0x201004: self._pv_fault, 0x201104: self._pv_fault64,
            0x802003: self._bind, 0x802004: self._unbind, 0x802006: self._bind, 0x802007: self._unmapped,
            0x802008: self._handled,
        }  # fmt: skip
        for event in (EXIT, SVM_EXIT):
            for nested in (0, NESTED):
                self.makers[event | nested] = self._exit
                self.makers[event | 0x100 | nested] = self._exit64

    def _add(
        self, cpu: Cpu, kind: Kind, known: int = 0, *, time: int = -1, rip: int = 0, addr: int = 0, value: int = 0,
        code: int = 0, arg: int = 0, source: int = 0, flags: int = 0,
    ) -> int:  # fmt: skip
        """One event at the CPU's time (`time`: another one); its position."""
        time = cpu.tsc if time < 0 else time
        known |= _K_CPU
        if time >= 0:
            known |= _K_TIME
        window = cpu.windows[-1]
        place = window.start + len(window.rows)
        window.rows += _PACK(max(time, 0), rip, 0, addr, value, 0, code, 0, cpu.number, 0, 0, known, kind, arg, source, flags)
        return place

    def _mark(self, cpu: Cpu, text: str) -> None:
        if text not in self._texts:
            self._texts[text] = (self._writer.payload(text.encode()), len(text))
        at, size = self._texts[text]
        self._add(cpu, Kind.MARK, _K_VALUE | _K_CODE, value=at, code=size, flags=EventFlag.BYTES)

    def _lost(self, cpu: Cpu, event: int, data: Sequence[int]) -> None:
        # u32 records, u16 domain, u16 vCPU, u64 TSC of the first one lost. The record's own TSC is that of their end.
        lost, first = data[0], data[2] | data[3] << 32
        self.counts["lost"] += lost
        self._gap(cpu, _K_VALUE, time=min(first, cpu.tsc) if cpu.tsc >= 0 else first, value=lost)

    def cut(self, cpu: Cpu) -> None:
        """Say that records of the CPU are missing, nobody knows how many."""
        self._gap(cpu)

    def _gap(self, cpu: Cpu, known: int = 0, **fields: int) -> None:
        self._add(cpu, Kind.GAP, known, **fields)
        self.counts["gaps"] += 1
        self._vectors.clear()
        cpu.entry_at = cpu.exit_at = cpu.stgi_at = cpu.intr_at = cpu.irq_at = -1

    def _entry(self, cpu: Cpu, event: int, data: Sequence[int]) -> None:
        cpu.entry_at = self._add(cpu, Kind.VMENTRY)

    def _exit(self, cpu: Cpu, event: int, data: Sequence[int]) -> None:
        self._vmexit(cpu, event, data[0], data[1])

    def _exit64(self, cpu: Cpu, event: int, data: Sequence[int]) -> None:
        self._vmexit(cpu, event, data[0], data[1] | data[2] << 32)

    def _vmexit(self, cpu: Cpu, event: int, reason: int, rip: int) -> None:
        """`rip` is the guest's: the RIP of a native VM exit is the host's, so it goes into `addr`."""
        if self.vendor is None:
            # Before Xen 4.19 SVM wrote its exits with the VMX number.
            if event & 0xFF == SVM_EXIT & 0xFF or reason in _SVM_REASONS:
                self.vendor = SVM
            elif reason in _VMX_REASONS:
                self.vendor = VMX
            else:
                self.counts["exits_of_unknown_vendor"] += 1
        known, source = _K_ADDR | _K_CODE, 0
        if self.vendor is not None:
            known |= _K_ARG
        if self.vendor == SVM and reason == SVM_NMI:
            known, source = known | _K_SOURCE, Source.NMI
        cpu.exit_at = self._add(cpu, Kind.VMEXIT, known, addr=rip, code=reason, arg=self.vendor or 0, source=source)

    def _exit_was(self, cpu: Cpu, source: Source) -> None:
        """A record inside a VM exit says why it came about."""
        if not cpu.in_exit:
            self.counts["odd_records"] += 1
            return
        for window in cpu.windows:
            at = cpu.exit_at - window.start
            if 0 <= at < len(window.rows):
                set_source(window.rows, at, source)

    def _deliver(self, cpu: Cpu, vector: int | None, source: Source, **fields: int) -> int:
        """A delivery to the hypervisor. On SVM an exit clears GIF; Xen has set it again by the time that it records anything."""
        if self.vendor == SVM and cpu.in_exit and cpu.stgi_at != cpu.exit_at:
            self._add(cpu, Kind.UNBLOCK, _K_ARG, arg=1)
            cpu.stgi_at = cpu.exit_at
        known = _K_SOURCE if vector is None else _K_SOURCE | _K_ARG
        return self._add(cpu, Kind.DELIVER, known | fields.pop("known", 0), arg=vector or 0, source=source, **fields)

    def _raise(self, cpu: Cpu, vector: int, known: int = 0, **fields: int) -> None:
        """Something that Xen injects, or wants to inject, into the guest: the CPU's own state does not change by it."""
        if vector > 0xFF:
            raise ValueError("vector")
        self._add(cpu, Kind.RAISE, known | _K_ARG | _K_SOURCE, arg=vector, source=Source.INJECTED, **fields)

    # Into an HVM guest.

    def _page_fault(self, cpu: Cpu, event: int, data: Sequence[int]) -> None:
        self._raise(cpu, x86.PAGE_FAULT, _K_CODE | _K_VALUE, code=data[0], value=data[1])

    def _page_fault64(self, cpu: Cpu, event: int, data: Sequence[int]) -> None:
        self._raise(cpu, x86.PAGE_FAULT, _K_CODE | _K_VALUE, code=data[0], value=data[1] | data[2] << 32)

    def _exception(self, cpu: Cpu, event: int, data: Sequence[int]) -> None:
        coded = data[1] != _NO_ERROR_CODE
        self._raise(cpu, data[0], _K_CODE if coded else 0, code=data[1] if coded else 0)

    def _virq(self, cpu: Cpu, event: int, data: Sequence[int]) -> None:
        self._raise(cpu, data[0])

    def _intr_window(self, cpu: Cpu, event: int, data: Sequence[int]) -> None:
        # What has to wait until the guest can take it. An interrupt comes again as INJ_VIRQ; for an NMI this is all there is.
        vector = _WINDOW_VECTORS.get(data[1])
        if vector is not None:
            self._raise(cpu, vector)

    # Taken by the hypervisor in a VM exit.

    def _intr(self, cpu: Cpu, event: int, data: Sequence[int]) -> None:
        # VMX: acknowledged by the exit, with its vector, and handled after this record. SVM: delivered when GIF was set
        # again, before Xen records the exit, and recorded as handled by then if it was a device's.
        vector = data[0] if len(data) and data[0] <= 0xFF else None
        if vector is not None:
            cpu.intr_at, cpu.intr_vector = self._deliver(cpu, vector, Source.EXTERNAL), vector
        elif cpu.irq_at <= cpu.entry_at:
            self._deliver(cpu, None, Source.EXTERNAL)

    def _nmi(self, cpu: Cpu, event: int, data: Sequence[int]) -> None:
        # VMX: Xen calls the handler as a function, then unblocks NMIs with an IRET. SVM: delivered when GIF was set again.
        self._exit_was(cpu, Source.NMI)
        if self.vendor == SVM:
            self._deliver(cpu, x86.NMI, Source.NMI)

    def _mce(self, cpu: Cpu, event: int, data: Sequence[int]) -> None:
        self._exit_was(cpu, Source.MC)

    def _smi(self, cpu: Cpu, event: int, data: Sequence[int]) -> None:
        self._mark(cpu, "VM exit for an SMI")

    def _trap(self, cpu: Cpu, event: int, data: Sequence[int]) -> None:
        self._mark(cpu, f"VM exit for the guest's exception {data[0] & 0xFF}")

    def _debug(self, cpu: Cpu, event: int, data: Sequence[int]) -> None:
        self._mark(cpu, "VM exit for the guest's #DB")

    # Of PV guests: what the CPU delivered to Xen while the guest ran, and Xen passes on to the guest.

    def _pv_trap(self, cpu: Cpu, event: int, data: Sequence[int]) -> None:
        self._pv(cpu, data[0], data[1])

    def _pv_trap64(self, cpu: Cpu, event: int, data: Sequence[int]) -> None:
        self._pv(cpu, data[0] | data[1] << 32, data[2])

    def _pv(self, cpu: Cpu, rip: int, trap: int) -> None:
        """`trap`: vector 14:0, has an error code 15, the error code 31:16."""
        vector, coded, code = trap & 0x7FFF, trap >> 15 & 1, trap >> 16 if trap >> 15 & 1 else 0
        known = _K_RIP | (_K_CODE if coded else 0)
        if vector in (x86.NMI, x86.MACHINE_CHECK) or vector >= 32:
            # A virtual NMI or #MC, or INT n that Xen emulates: no delivery to the CPU with this vector.
            self._raise(cpu, vector, known, rip=rip, code=code)
        elif vector in (3, 4):  # INT3, INTO: `rip` is behind the instruction
            self._raise(cpu, vector, known, rip=rip)
        else:
            self._deliver(cpu, vector, Source.EXCEPTION, known=known, rip=rip, code=code)

    def _pv_fault(self, cpu: Cpu, event: int, data: Sequence[int]) -> None:
        self._pv_page(cpu, data[0], data[1], data[2])

    def _pv_fault64(self, cpu: Cpu, event: int, data: Sequence[int]) -> None:
        self._pv_page(cpu, data[0] | data[1] << 32, data[2] | data[3] << 32, data[4])

    def _pv_page(self, cpu: Cpu, rip: int, address: int, code: int) -> None:
        known = _K_RIP | _K_VALUE | _K_CODE
        self._deliver(cpu, x86.PAGE_FAULT, Source.EXCEPTION, known=known, rip=rip, value=address, code=code)

    # Interrupts of the hypervisor.

    def _bind(self, cpu: Cpu, event: int, data: Sequence[int]) -> None:
        # u16 IRQ, u16 vector (xenalyze reads two u32).
        if data[0] >> 16 <= 0xFF:
            self._vectors[data[0] & 0xFFFF] = data[0] >> 16

    def _unbind(self, cpu: Cpu, event: int, data: Sequence[int]) -> None:
        self._vectors.pop(data[0] & 0xFFFF, None)

    def _unmapped(self, cpu: Cpu, event: int, data: Sequence[int]) -> None:
        if data[0] > 0xFF:
            raise ValueError("vector")
        self._deliver(cpu, data[0], Source.EXTERNAL)

    def _handled(self, cpu: Cpu, event: int, data: Sequence[int]) -> None:
        # u32 IRQ, low halves of the TSC before and after its handler ran.
        irq, began = data[0], data[1]
        vector = self._vectors.get(irq)
        if cpu.in_exit and cpu.intr_at > cpu.exit_at and vector in (None, cpu.intr_vector):
            cpu.intr_at = -1
            return  # the one of TRC_HVM_INTR
        # The record comes after the handler, and after whatever that recorded: the CPU's events stay in order.
        time = cpu.tsc - (cpu.tsc - began & 0xFFFFFFFF)
        rows = cpu.windows[-1].rows
        if not rows or time < int.from_bytes(rows[-ROW : 8 - ROW], "little"):
            time = cpu.tsc
        cpu.irq_at = self._deliver(cpu, vector, Source.EXTERNAL, time=time)


def set_source(rows: bytearray, at: int, source: Source) -> None:
    """Put the source into an event that has none."""
    known = int.from_bytes(rows[at + 58 : at + 60], "little") | _K_SOURCE
    rows[at + 58 : at + 60] = known.to_bytes(2, "little")
    rows[at + 62] = source
