"""A real CPU model as an oracle: the PyPI package `bochscpu-python` runs a bare 64-bit guest and every step is recorded.

What is recorded is what the CPU did: registers at hooks, bytes that it stored and loaded. Nothing here knows a rule of
the project. A `Machine` lives until its process ends (the package frees a session wrongly, and a triple fault aborts),
so each guest runs in a process of its own: see livecpu_run.py.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import bochscpu
import bochscpu.memory
from livecpu_code import ADJUST, APIC_ICR, CODE, DISPATCH, IRETS, image, inside

RAM = 0x100000
PAGE = 0x1000
PML4, PDPT, PD, PT = 0x1000, 0x2000, 0x3000, 0x4000
GDT, IDT, TSS_PAGE, TAPE = 0x5000, 0x6000, 0x7000, 0x8000
TAPE_END = 0x10000
NO_EXECUTE, PRESENT, WRITABLE, USER = 1 << 63, 1, 2, 4
APIC_PAGE = APIC_ICR & -PAGE
LONGEST = 6000  # instructions; a guest that runs longer is stopped: a wrong return can loop
RW_READ, RW_WRITE, RW_BOTH = 0, 1, 3
DOUBLE_FAULT = 8
FAR_IRET = 15  # BX_INSTR_IS_IRET: the hook runs after the registers are loaded


class Regs(NamedTuple):
    """Registers that a delivery saves."""

    rip: int
    rsp: int
    cs: int
    ss: int
    rflags: int


@dataclass
class Store:
    """Bytes that an instruction stored."""

    addr: int
    data: bytes


@dataclass
class Delivery:
    """One attempt to enter a handler. `stores` in the order of the CPU; `after`: registers at the handler's first instruction."""

    vector: int
    how: str  # nmi, fixed, exception, soft-int
    before: Regs
    length: int = 0  # of INT n
    stores: list[Store] = field(default_factory=list)
    after: Regs | None = None
    failed: bool = False

    @property
    def lo(self) -> int:
        return min(s.addr for s in self.stores)

    @property
    def hi(self) -> int:
        return max(s.addr + len(s.data) for s in self.stores)


@dataclass
class Iret:
    """One IRETQ. `loads`: bytes read from the stack, by address; `after` None: it faulted."""

    before: Regs
    loads: dict[int, int] = field(default_factory=dict)
    after: Regs | None = None

    def word(self, slot: int) -> int:
        """The 8 bytes that were popped for slot 0-4: RIP, CS, RFLAGS, RSP, SS."""
        at = self.before.rsp + 8 * slot
        return int.from_bytes(bytes(self.loads[at + n] for n in range(8)), "little")


@dataclass
class SetRsp:
    """Software moved RSP."""

    rsp: int


@dataclass
class Request:
    """The guest asked its local APIC for an NMI to itself. `at_once`: it was delivered before the next instruction."""

    at_once: bool = False


Step = Store | Delivery | Iret | SetRsp | Request


class Setup(NamedTuple):
    """What a guest starts with. holes, readonly: pages (numbers) that are not present, not writable."""

    memory: dict[int, bytes]
    tss: int
    start: Regs
    holes: frozenset[int]
    readonly: frozenset[int]


class Machine:
    """The emulated computer: 1 MiB of RAM, linear = physical, one CPU with its local APIC."""

    def __init__(self) -> None:
        # Private: a forked child writes its own copy.
        self.ram = mmap.mmap(-1, RAM, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.ram))
        self.session = bochscpu.Session()
        self.session.missing_page_handler = self._missing
        for at in range(0, RAM, PAGE):
            bochscpu.memory.page_insert(at, base + at)
        self.cpu: Any = self.session.cpu
        self.error: BaseException | None = None

    def _missing(self, gpa: int) -> None:
        raise RuntimeError(f"the guest uses no such memory: {gpa:#x}")  # ends the process

    def put(self, at: int, *words: int) -> None:
        """Store words in RAM."""
        self.ram[at : at + 8 * len(words)] = struct.pack(f"<{len(words)}Q", *words)

    def load(self, setup: Setup) -> None:
        """Page tables, descriptors, code, registers."""
        self.put(PML4, PDPT | 7)
        self.put(PDPT, PD | 7)
        self.put(PD, PT | 7)
        code = image()
        for page in range(RAM // PAGE):
            if page not in setup.holes:
                runs = CODE <= page * PAGE < CODE + len(code)
                flags = PRESENT | USER | (0 if page in setup.readonly else WRITABLE) | (0 if runs else NO_EXECUTE)
                self.put(PT + 8 * page, page * PAGE | flags)
        self.put(PT + 8 * (APIC_PAGE // PAGE), 0xFEE00000 | PRESENT | WRITABLE | USER | 0x10 | NO_EXECUTE)
        self.put(GDT, 0, *(d | 1 << 40 for d in DESCRIPTORS))  # accessed: the CPU has no need to store that bit
        self.ram[CODE : CODE + len(code)] = code
        for at, data in setup.memory.items():
            self.ram[at : at + len(data)] = data
        self.cpu.state = _state(setup)

    def run(self, setup: Setup, choose: Callable[[Regs], tuple[int, int, int] | None], sink: Callable[[Step], None]) -> None:
        """Run until `choose`, asked at each dispatch for the next operation and its two operands, says None.

        `sink` gets every step, complete, in the order in which the CPU ended it.
        """
        self.load(setup)
        recorder = Recorder(self, choose, sink)
        self.session.run([recorder.hook()])
        if self.error is not None:
            raise self.error


class Recorder:
    """Turns the package's hooks into steps."""

    def __init__(self, machine: Machine, choose: Callable[[Regs], tuple[int, int, int] | None], sink: Callable[[Step], None]):
        self.machine, self.ram, self.cpu = machine, machine.ram, machine.cpu
        self.choose, self.sink = choose, sink
        self.origin = Regs(0, 0, 0, 0, 0)  # what a fault saves: registers before the instruction
        self.delivery: Delivery | None = None
        self.iret: Iret | None = None
        self.request: Request | None = None
        self.raised: int | None = None  # an exception that the hook before it announced
        self.adjusts = self.stopped = False
        self.hardware: str | None = None  # an interrupt that the hook before it announced
        self.pending: list[tuple[int, int]] = []  # stores that the hook announced: it runs before the bytes are there
        self.count = 0

    def hook(self) -> Any:
        hook = bochscpu.Hook()
        for name in ("before_execution", "exception", "interrupt", "hw_interrupt", "far_branch", "lin_access"):
            setattr(hook, name, self._guard(getattr(self, "on_" + name)))
        hook.hlt = self._guard(lambda: self.stop())
        return hook

    def _guard(self, call: Callable[..., None]) -> Callable[..., None]:
        # A Python exception must not cross the emulator's frames.
        def guarded(_session: Any, _cpu: int, *words: int) -> None:
            if self.stopped:
                return
            try:
                call(*words)
            except BaseException as error:
                self.machine.error = error
                self.stop()

        return guarded

    def stop(self) -> None:
        self.stopped = True
        self.machine.session.stop()

    def regs(self) -> Regs:
        cpu = self.cpu
        return Regs(cpu.rip, cpu.rsp, cpu.cs.selector, cpu.ss.selector, cpu.rflags)

    def settle(self) -> None:
        """The stores announced so far have happened."""
        for at, size in self.pending:
            store = Store(at, bytes(self.ram[at : at + size]))
            if self.delivery is not None:
                self.delivery.stores.append(store)
            else:
                self.sink(store)
        self.pending.clear()

    def complete(self, regs: Regs) -> None:
        """A boundary between instructions: what was under way has ended well."""
        self.settle()
        if self.delivery is not None:
            self.delivery.after = regs
            delivery, self.delivery = self.delivery, None
            self.sink(delivery)
        if self.adjusts:
            self.adjusts = False
            self.sink(SetRsp(regs.rsp))

    # -- hooks ------------------------------------------------------------------------------------------------------

    def on_before_execution(self, _instruction: int) -> None:
        regs = self.regs()
        self.complete(regs)
        self.request = None
        self.count += 1
        if self.count > LONGEST or regs.rip in inside():
            self.stop()
            return
        self.origin = regs
        if regs.rip in DISPATCH:
            tape = self.cpu.r15
            chosen = self.choose(regs) if TAPE <= tape <= TAPE_END - 24 else None
            if chosen is None:
                self.stop()
                return
            self.ram[tape : tape + 24] = struct.pack("<3Q", *chosen)
        elif regs.rip in IRETS:
            self.iret = Iret(regs)
        elif regs.rip in ADJUST:
            self.adjusts = True

    def on_far_branch(self, what: int, *_where: int) -> None:
        if what == FAR_IRET and self.iret is not None:
            self.origin = self.iret.after = self.regs()
            iret, self.iret = self.iret, None
            self.sink(iret)

    def on_hw_interrupt(self, vector: int, _cs: int, _rip: int) -> None:
        self.origin = self.regs()
        self.complete(self.origin)
        self.hardware = "nmi" if vector == 2 else "fixed"
        if self.hardware == "nmi" and self.request is not None:
            self.request.at_once = True

    def on_exception(self, vector: int, _code: int) -> None:
        self.settle()
        if self.raised is not None:  # it became a double fault; its own delivery never began
            self.sink(Delivery(self.raised, "exception", self.origin, failed=True))
        self.raised = vector
        if self.delivery is not None:
            self.delivery.failed = True
            delivery, self.delivery = self.delivery, None
            self.sink(delivery)
        elif self.iret is not None:
            iret, self.iret = self.iret, None
            self.sink(iret)
        elif vector == 1:
            self.origin = self.regs()  # a single step is a trap

    def on_interrupt(self, vector: int) -> None:
        now = self.regs()
        if self.raised is not None or self.hardware is not None:
            how, before, length = self.hardware or "exception", self.origin, 0
            if vector == DOUBLE_FAULT:  # an abort; the model stores the RF that the fault before it set
                before = before._replace(rflags=now.rflags)
        else:
            how, before, length = "soft-int", self.origin, now.rip - self.origin.rip
        self.raised, self.hardware = None, None
        self.delivery = Delivery(vector, how, before, length)

    def on_lin_access(self, at: int, _physical: int, size: int, _memtype: int, rw: int) -> None:
        if rw in (RW_WRITE, RW_BOTH) and at < RAM:
            self.pending.append((at, size))
        elif rw == RW_READ and self.iret is not None and 0 <= at - self.iret.before.rsp < 40:
            self.iret.loads.update(zip(range(at, at + size), self.ram[at : at + size], strict=True))
        elif rw == RW_WRITE and at == APIC_ICR and self.cpu.rbx & 0x700 == 0x400:
            self.request = Request()
            self.sink(self.request)


# 64-bit kernel code, data, user data, user code, a second kernel code segment (SDM Vol. 3A 3.4.5): 8 10 18 20 28
DESCRIPTORS = (0x00AF9A000000FFFF, 0x00CF92000000FFFF, 0x00CFF2000000FFFF, 0x00AFFA000000FFFF, 0x00AF9A000000FFFF)


def _segment(selector: int, attributes: int, base: int = 0, limit: int = 0xFFFFFFFF) -> Any:
    segment = bochscpu.Segment()
    segment.present, segment.selector, segment.attr = True, selector, attributes
    segment.base, segment.limit = base, limit
    return segment


def _table(base: int, limit: int) -> Any:
    table = bochscpu.GlobalSegment()
    table.base, table.limit = base, limit
    return table


def _state(setup: Setup) -> Any:
    state = bochscpu.State()
    state.cr0, state.cr3, state.cr4, state.efer = 0x80010033, PML4, 0x620, 0xD01  # paging, WP; PAE; long mode, NX
    state.apic_base = 0xFEE00900
    state.rip, state.rsp, _, _, state.rflags = setup.start
    state.cs, state.ss = _segment(8, 0xA09B), _segment(0x10, 0xC093)
    state.ds = state.es = state.fs = state.gs = _segment(0x10, 0xC093)
    state.tr, state.ldtr = _segment(0x30, 0x8B, setup.tss, 103), _segment(0, 0x82)
    state.gdtr, state.idtr = _table(GDT, 0x3F), _table(IDT, 0xFFF)
    state.r15 = TAPE
    return state
