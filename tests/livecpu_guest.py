"""Random guests: tables, stacks, and the operations, chosen while the guest runs by what it is doing.

`Guest(seed)` always gives the same guest. `Guest(seed, operations)` runs the given operations on the same tables.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass

from livecpu import GDT, IDT, PAGE, RAM, TSS_PAGE, Regs, Setup
from livecpu_code import ADDRESS, CODE, CODE_SIZE, COPIES, DISPATCH, INSTRUCTIONS, handler
from livecpu_truth import Truth

Operation = tuple[str, int, int, int]  # name, copy of its code, RBX, RCX

STACKS = 0x20000  # to USER_STACKS
USER_STACKS = 0x60000
USER_STACKS_END = 0x64000
MAIN_TOP = 0x5FF00
DOUBLE_FAULT_TOP = 0x5E000
HOLE, READONLY = 0x4C000, 0x70000  # pages that are not present, that cannot be written
NON_CANONICAL = 0x8000_0000_0000_1000
INT_VECTORS = (0, 1, 2, 3, 6, 18, *range(0x20, 0x30))
RFLAGS_RF = 1 << 16
RFLAGS_CHOICES = (0x2, 0x202, 0x102, 0x4002, 0x10002, 0x3202, 0x200202)


@dataclass(frozen=True)
class Gate:
    """A gate of the guest's IDT."""

    offset: int
    selector: int
    ist: int
    type: int
    dpl: int
    present: bool

    def to_bytes(self) -> bytes:
        low = self.offset & 0xFFFF | self.selector << 16 | self.ist << 32
        low |= (self.present << 7 | self.dpl << 5 | self.type) << 40 | (self.offset >> 16 & 0xFFFF) << 48
        return struct.pack("<QQ", low, self.offset >> 32)


def ist_of(memory: bytes | bytearray, vector: int) -> int:
    """The IST number in a gate as it stands in memory: SDM Vol. 3A figure 6-8."""
    return memory[IDT + 16 * vector + 4] & 7


class Guest:
    """A guest: what it starts with, and which operation comes next."""

    def __init__(self, seed: int, operations: list[Operation] | None = None, length: int = 60) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.given = operations
        self.done: list[Operation] = []
        self.length = length
        draw = self.random
        self.tss = TSS_PAGE + 8 * draw.randrange(0x100)
        self.tops = self._tops()
        self.gates = [self._gate(v) for v in range(256)]
        self.user_start = draw.random() < 0.3
        self.named = draw.random() < 0.5  # the layout names the stacks
        self.known_memory = draw.random() < 0.5  # the trace holds the first contents of memory
        self.weights = self._weights()
        self.truth = Truth(bytearray(RAM))
        self.setup = self._setup()
        self.truth.memory[:] = self.setup_memory()

    def setup_memory(self) -> bytearray:
        """RAM at the start, without page tables and code."""
        memory = bytearray(RAM)
        for at, data in self.setup.memory.items():
            memory[at : at + len(data)] = data
        return memory

    # -- tables -----------------------------------------------------------------------------------------------------

    def _tops(self) -> list[int]:
        """RSP0, then IST1-7."""
        draw = self.random
        bases = [STACKS + 0x2000 * (n + 1) for n in draw.sample(range(18), draw.randint(1, 5))]
        tops: list[int] = []
        crowded = draw.random() < 0.15
        for _ in range(8):
            kind = draw.random()
            if tops and kind < 0.25:
                top = draw.choice(tops)
            elif tops and crowded and kind < 0.45:  # so near that frames overlap in part
                top = draw.choice(tops) + draw.choice((8, 16, 24, 32, 48, 64, 96, -8, -16, -24, -40, -48, -64))
            elif tops and kind < 0.55:
                top = draw.choice(tops) + draw.choice((0x400, 0x1000, -0x400, 0x80, -0x80))
            else:
                top = draw.choice(bases)
            if draw.random() < 0.2:
                top += draw.randrange(-15 if crowded else 0, 16)  # downwards: to another aligned top
            if draw.random() < 0.05:  # the page below is a hole: some words of the frame fit
                top = HOLE + PAGE + draw.randrange(0, 57)
            tops.append(top)
        if draw.random() < 0.1:
            tops[draw.randrange(8)] = draw.choice((0, NON_CANONICAL))
        tops[7] = DOUBLE_FAULT_TOP
        return tops

    def _gate(self, vector: int) -> Gate:
        draw = self.random
        if vector == 8:  # a triple fault would end the emulator
            return Gate(handler(8, 0), 8, 7, 0xE, 0, True)
        ist = draw.choice((0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7))
        if vector in (0, 1, 2, 3, 6, 13, 14, 18) and draw.random() < 0.6:
            ist = draw.randint(1, 6)
        present = vector < 0x20 or draw.random() < 0.93
        return Gate(
            handler(vector, draw.randrange(2)), draw.choice((8, 8, 0x28)), ist, draw.choice((0xE, 0xE, 0xF)),
            draw.choice((0, 3)), present,
        )  # fmt: skip

    def _setup(self) -> Setup:
        draw = self.random
        tss = bytearray(104)
        struct.pack_into("<3Q", tss, 4, self.tops[0] & (1 << 64) - 1, draw.getrandbits(32), draw.getrandbits(32))
        struct.pack_into("<7Q", tss, 0x24, *self.tops[1:])
        fill = draw.choice((b"\0", b"\x90", b"\x5a\xa5"))
        memory = {
            STACKS: (fill * PAGE)[:PAGE] * ((USER_STACKS_END - STACKS) // PAGE),
            self.tss: bytes(tss),
            IDT: b"".join(g.to_bytes() for g in self.gates),
        }
        protected = {page for at in (CODE, GDT, READONLY) for page in range(at // PAGE, (at + 1) // PAGE + 1)}
        protected |= set(range(CODE // PAGE, (CODE + CODE_SIZE) // PAGE))
        start = Regs(min(DISPATCH), MAIN_TOP - draw.choice((0, 0, 8, 3)), 8, 0x10, draw.choice((2, 0x202)))
        return Setup(memory, self.tss, start, frozenset({HOLE // PAGE}), frozenset(protected))

    # -- operations -------------------------------------------------------------------------------------------------

    def _weights(self) -> dict[str, float]:
        draw = self.random
        names = {
            "return": 40, "int": 22, "int3": 5, "icebp": 2, "ud2": 4, "fault": 6, "icr-nmi": 12, "icr-fixed": 4, "eoi": 2,
            "sti": 1, "cli": 1, "push": 3, "adjust": 1, "user": 3, "edit": 4, "tss": 4, "gate": 1, "poke": 2, "wrong-return": 1,
            "copy-frame": 1, "nop": 1, "set-rsp": 0.3,
        }  # fmt: skip
        return {name: weight * draw.choice((0, 0.5, 1, 1, 2)) for name, weight in names.items() if name != "return"} | {
            "return": 40.0
        }

    def next(self, regs: Regs) -> tuple[int, int, int] | None:
        """The next operation and its operands, as the tape holds them; None: the end."""
        if self.given is not None:
            if len(self.done) == len(self.given):
                return None
            operation = self.given[len(self.done)]
        else:
            if len(self.done) == self.length:
                return None
            name, rbx, rcx = self._choose(regs)
            operation = (name, self.random.randrange(COPIES), rbx & (1 << 64) - 1, rcx & (1 << 64) - 1)
        self.done.append(operation)
        name, copy, rbx, rcx = operation
        return ADDRESS[name, copy], rbx, rcx

    def _choose(self, regs: Regs) -> tuple[str, int, int]:
        draw = self.random
        if not self.done:
            return "svr", 0x1FF, 0  # enables the local APIC
        if self.user_start and len(self.done) == 1:
            return self._user()
        frame = self.truth.now
        weights = dict(self.weights)
        depth = len(self.truth.chain())
        if frame.step < 0:  # nothing to return from
            weights["return"] = 0.5
            weights["edit"] = weights["copy-frame"] = 0
        elif depth > 5:
            weights["return"] *= depth / 3
        kind = draw.choices(list(weights), list(weights.values()))[0]
        return getattr(self, "_op_" + kind.replace("-", "_"))(regs)

    def _op_return(self, regs: Regs) -> tuple[str, int, int]:
        frame = self.truth.now
        if frame.step >= 0 and frame.rip_addr != regs.rsp:
            return "adjust", frame.rip_addr - regs.rsp, 0
        fault = INSTRUCTIONS.get(frame.saved[0]) if frame.step >= 0 and frame.saved[2] & RFLAGS_RF else None
        if fault is not None and not frame.edited and self.random.random() < 0.85:
            frame.edited = True  # go on behind the instruction that faulted
            return "store8", frame.rip_addr, frame.saved[0] + len(fault)
        return "iret", 0, 0

    def _op_wrong_return(self, _regs: Regs) -> tuple[str, int, int]:
        return self.random.choice((("iret", 0, 0), ("adjust", 8, 0), ("adjust", -8, 0)))

    def _op_int(self, _regs: Regs) -> tuple[str, int, int]:
        vector = self.random.choice(INT_VECTORS if self.random.random() < 0.98 else (8, 13, 14))
        return f"int {vector:#x}", 0, 0

    def _plain(self, name: str) -> tuple[str, int, int]:
        return name, 0, 0

    def _op_int3(self, _regs: Regs) -> tuple[str, int, int]:
        return self._plain("int3")

    def _op_icebp(self, _regs: Regs) -> tuple[str, int, int]:
        return self._plain("icebp")

    def _op_ud2(self, _regs: Regs) -> tuple[str, int, int]:
        return self._plain("ud2")

    def _op_sti(self, _regs: Regs) -> tuple[str, int, int]:
        return self._plain("sti")

    def _op_cli(self, _regs: Regs) -> tuple[str, int, int]:
        return self._plain("cli")

    def _op_eoi(self, _regs: Regs) -> tuple[str, int, int]:
        return self._plain("eoi")

    def _op_nop(self, _regs: Regs) -> tuple[str, int, int]:
        return self._plain("nop")

    def _op_fault(self, _regs: Regs) -> tuple[str, int, int]:
        return self.random.choice(
            (
                ("load", NON_CANONICAL, 0),
                ("load", HOLE + 0x100, 0),
                ("store8", HOLE + 0x200, 0),
                ("store8", READONLY + 0x10, 0),
                ("load-ss", NON_CANONICAL, 0),
            )
        )

    def _op_icr_nmi(self, _regs: Regs) -> tuple[str, int, int]:
        return "icr", 0x4400, 0  # delivery mode NMI, to APIC 0: SDM Vol. 3A 10.6.1

    def _op_icr_fixed(self, _regs: Regs) -> tuple[str, int, int]:
        return "icr", 0x4000 | self.random.choice((0x12, 0x20, 0x31, 0x42, 0x80, 0xEC)), 0

    def _op_push(self, _regs: Regs) -> tuple[str, int, int]:
        return "push", self.random.getrandbits(64), 0

    def _op_adjust(self, _regs: Regs) -> tuple[str, int, int]:
        return "adjust", -self.random.choice((8, 16, 40, 56, 3, 128)), 0

    def _op_set_rsp(self, _regs: Regs) -> tuple[str, int, int]:
        return "set-rsp", MAIN_TOP - 0x400, 0

    def _user(self) -> tuple[str, int, int]:
        draw = self.random
        return "user", draw.choice(sorted(DISPATCH)), USER_STACKS_END - 8 * draw.randrange(0x100)

    def _op_user(self, _regs: Regs) -> tuple[str, int, int]:
        return self._user()

    def _op_edit(self, regs: Regs) -> tuple[str, int, int]:
        """A handler edits its own frame, or one that it interrupted."""
        draw = self.random
        frames = [f for f in self.truth.chain() if f.step >= 0]
        frame = frames[0] if draw.random() < 0.7 else draw.choice(frames)
        slot, value = draw.choice(
            (
                (0, draw.choice(sorted(DISPATCH))),
                (2, draw.choice(RFLAGS_CHOICES)),
                (3, frame.saved[3] - draw.choice((8, 16, 32))),
                (3, frame.saved[3]),
                (0, frame.saved[0]),
            )
        )
        at = frame.rip_addr + 8 * slot
        if draw.random() < 0.2:
            return "store4", at, value
        if draw.random() < 0.2 and slot != 0:  # one byte of a RIP leads into the middle of an instruction
            return "store1", at, value
        return "store8", at, value

    def _op_copy_frame(self, _regs: Regs) -> tuple[str, int, int]:
        """One word of another frame goes into the handler's own."""
        frames = [f for f in self.truth.chain() if f.step >= 0]
        slot = self.random.randrange(5)
        return "store8", frames[0].rip_addr + 8 * slot, self.random.choice(frames).saved[slot]

    def _op_tss(self, _regs: Regs) -> tuple[str, int, int]:
        """IST shift: a slot moves down or up, to where another is, or back."""
        draw = self.random
        slot = draw.randrange(0, 7)
        at = self.tss + (4 if slot == 0 else 0x24 + 8 * (slot - 1))
        now = int.from_bytes(self.truth.memory[at : at + 8], "little")
        value = draw.choice((now - 0x400, now - 0x40, now + 0x40, now - 8, self.tops[slot], draw.choice(self.tops), now - 0x20))
        if draw.random() < 0.1:
            return "store4", at, value
        return "store8", at, value

    def _op_gate(self, _regs: Regs) -> tuple[str, int, int]:
        draw = self.random
        vector = draw.choice((*INT_VECTORS, 13, 14))
        return "store8", IDT + 16 * vector, int.from_bytes(self._gate(vector).to_bytes()[:8], "little")

    def _op_poke(self, regs: Regs) -> tuple[str, int, int]:
        """Stores near a frame or the running stack."""
        draw = self.random
        return draw.choice(("store8", "store4", "store1")), regs.rsp - draw.randrange(1, 0x80), draw.getrandbits(64)
