"""The IST stacks of a CPU in a dump: the frame at each top, and which of them are live, newest first.

From RSP on: on an IST stack the newest hardware frame lies at its top; its saved RSP leads to the next stack. A handler may have
moved off its IST stack: then it keeps a pointer to its registers there, or a copy of its frame, on the stack where it runs. A
frame whose handler is reached a second time was not the first at its place: an older one stood there, and is overwritten.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from tracedbg import x86
from tracedbg.formats.vmcore.notes import Cpu
from tracedbg.formats.vmcore.pages import PAGE, Space
from tracedbg.layout import Idt, Tss

FRAME = 40  # bytes from RIP to the top
BLOCK = 16 << 10  # a stack that nobody names is the aligned block of this size, as in the replay
MAX_STEPS = 64

_WORDS = struct.Struct("<5Q")  # rip cs rflags rsp ss
_ONE, _ZERO = 1 << 1, 1 << 3 | 1 << 5 | 1 << 15 | 0x3FF << 22  # RFLAGS: SDM Vol. 1 figure 3-8
_VM = 1 << 17

# Below the hardware frame of an NMI from CPL 0 Linux keeps (arch/x86/entry/entry_64.S, since 3.3, so since 5.7): a word, the
# word "NMI executing", the frame that its IRET pops, and the outermost frame, the one to resume in the end.
_LINUX_EXECUTING, _LINUX_IRET, _LINUX_OUTERMOST = 56, 96, 136  # bytes below the top


@dataclass(frozen=True, slots=True)
class Saved:
    """The five words of a frame; `at`: address of its RIP. CS, SS and RFLAGS as the CPU pops them."""

    at: int
    rip: int
    cs: int
    rflags: int
    rsp: int
    ss: int
    raw: bytes


@dataclass(frozen=True, slots=True)
class Top:
    """Where the frames of some IST pointers go: [hi - 40, hi), on a stack [lo, pointer)."""

    slots: tuple[int, ...]
    pointer: int
    lo: int
    vectors: tuple[int, ...]  # whose gates lead here
    frame: Saved | None  # None: no plausible frame lies there
    code: int | None  # the word below it, an error code if the vector has one
    physical: int | None  # where its last bytes lie; None: they are not mapped
    doubts: tuple[str, ...] = ()  # what speaks against the frame

    @property
    def hi(self) -> int:
        """The aligned top (SDM Vol. 3A 6.14.2)."""
        return self.pointer & ~15

    def holds(self, addr: int) -> bool:
        """Whether an RSP is on this stack."""
        return self.lo < addr <= self.pointer


@dataclass(frozen=True, slots=True)
class Link:
    """A frame that is, or was, live. `frame` None: its words are gone. `place`: of the pointer or copy that leads to it.

    `left`: its handler is done. `copy`: where software keeps its words. `older`: another frame lies at its place now.
    """

    top: Top
    frame: Saved | None
    place: int | None = None
    left: bool = False
    copy: int | None = None
    older: bool = False


@dataclass(slots=True)
class Stacks:
    """What was found of one CPU. `chain`: newest first; `stops`: why nothing more was found behind it."""

    cpu: Cpu
    tops: tuple[Top, ...] = ()
    chain: list[Link] = field(default_factory=list)
    stops: str = ""
    seen: list[tuple[int, int]] = field(default_factory=list)  # ranges of other stacks that were looked at

    def live(self, top: Top) -> Link | None:
        """The link of the frame that lies at a top."""
        return next((link for link in self.chain if link.top is top and not link.older), None)


def saved_at(space: Space, cpu: Cpu, at: int) -> Saved | None:
    """The frame whose RIP is at an address, if its words can be one's: canonical RIP and RSP, selectors, RFLAGS."""
    raw = space.read(at, FRAME)
    return None if raw is None else _saved(space, cpu, at, raw)


def _saved(space: Space, cpu: Cpu, at: int, raw: bytes) -> Saved | None:
    rip, cs, rflags, rsp, ss = _WORDS.unpack(raw)
    # Above 16 bits of CS Xen keeps a byte of its own, above 32 of RFLAGS flags.
    if cs >> 40 or cs & 0xFFFF0000 or ss >> 16 or not rflags & _ONE or rflags & (_ZERO | _VM):
        return None
    cs, rflags = cs & 0xFFFF, rflags & 0xFFFFFFFF
    if not space.is_canonical(rip) or not space.is_canonical(rsp) or not cs & ~3 or cs & 3 != ss & 3:
        return None
    return Saved(at, rip, cs, rflags, rsp, ss, raw) if _is_code(space, cpu, cs) else None


def _is_code(space: Space, cpu: Cpu, cs: int) -> bool:
    """Whether a selector names code of its ring; what is in no GDT that can be read may."""
    if cs & 4:  # an LDT is user mode's
        return cs & 3 != 0
    if (cs | 7) > cpu.gdt.limit:
        return False
    entry = space.word(cpu.gdt.base + (cs & ~7))
    if entry is None:
        return True
    kind = entry >> 40 & 0xFF  # type 3:0, S, DPL, P: SDM Vol. 3A figure 5-1
    code = kind & 0x98 == 0x98 and (kind & 4 != 0 or kind >> 5 & 3 == cs & 3)
    return code and (cs & 3 != 0 or bool(entry >> 53 & 1))


def tops_of(space: Space, cpu: Cpu, tss: Tss, idt: Idt, lows: dict[int, int]) -> tuple[Top, ...]:
    """Where its IST gates lead, by address; `lows`: the lowest address of the stack of a pointer."""
    vectors: dict[int, list[int]] = {}
    for vector, gate in idt.gates.items():
        pointer = tss.ist[gate.ist]
        if gate.ist and gate.present and gate.type in (x86.GATE_INTERRUPT, x86.GATE_TRAP) and pointer in lows:
            assert pointer is not None
            vectors.setdefault(pointer & ~15, []).append(vector)
    found = []
    for hi, leading in sorted(vectors.items()):
        pointers = sorted({p for p in tss.ist[1:] if p is not None and p & ~15 == hi and p in lows})
        slots = tuple(n for n in range(1, 8) if tss.ist[n] in pointers)
        frame = saved_at(space, cpu, hi - FRAME) if hi >= FRAME else None
        code = space.word(hi - 48) if frame is not None and hi >= 48 else None
        page = space.page(hi - 1) if hi else None
        physical = None if page is None else page[0] + (hi - 1) % PAGE
        doubts = () if frame is None else tuple(_doubts(space, frame))
        lo = lows[pointers[-1]]
        found.append(Top(slots, pointers[-1], lo, tuple(sorted(leading)), frame, code, physical, doubts))
    return tuple(found)


def _doubts(space: Space, frame: Saved) -> Iterator[str]:
    """User mode's memory need not be mapped in the kernel's page tables, nor its code."""
    if frame.cs & 3:
        return
    if not space.runs(frame.rip):
        yield "no code is mapped at its RIP"
    if not space.has(frame.rsp) and not space.has(max(frame.rsp - 1, 0)):
        yield "no memory is mapped at its RSP"


def linux_copies(space: Space, cpu: Cpu, top: Top, rsp: int) -> Saved | None:
    """The outermost frame that Linux keeps on an NMI stack, if its words are there and "NMI executing" says that they count."""
    if top.vectors != (x86.NMI,) or top.hi < _LINUX_OUTERMOST or rsp > top.hi - _LINUX_OUTERMOST:
        return None
    if space.word(top.hi - _LINUX_EXECUTING) != 1 or saved_at(space, cpu, top.hi - _LINUX_IRET) is None:
        return None
    return saved_at(space, cpu, top.hi - _LINUX_OUTERMOST)


class Walk:
    """Follows the chain of one CPU. `edges`: the begins of all named stacks, where no other stack goes on."""

    def __init__(self, space: Space, cpu: Cpu, tops: tuple[Top, ...], named: list[tuple[int, int]]) -> None:
        self._space = space
        self._cpu = cpu
        self._named = named
        self.stacks = Stacks(cpu, tops)

    def run(self) -> Stacks:
        """The chain from the CPU's RSP."""
        stacks, rsp = self.stacks, self._cpu.rsp
        if self._cpu.cpl:
            stacks.stops = f"the CPU is at CPL {self._cpu.cpl}: no frame is live"
            return stacks
        for _ in range(MAX_STEPS):
            after = self._step(rsp)
            if after is None:
                return stacks
            if after.cs & 3:
                stacks.stops = f"the outermost frame is from CPL {after.cs & 3}"
                return stacks
            rsp = after.rsp
        stacks.stops = f"not followed beyond {MAX_STEPS} frames"
        return stacks

    def _step(self, rsp: int) -> Saved | None:
        """Add the newest frame above an RSP; returns it, None: the chain ends."""
        top = next((top for top in self.stacks.tops if top.holds(rsp)), None)
        if top is not None:
            return self._on_stack(top, rsp)
        return self._off_stack(rsp)

    def _stop(self, why: str) -> Saved | None:
        self.stacks.stops = why
        return None

    def _on_stack(self, top: Top, rsp: int) -> Saved | None:
        name = ist_name(top)
        if rsp > top.hi - FRAME:
            return self._stop(f"RSP {rsp:#x} is at the top of {name}: it may be empty")
        if top.frame is None:
            return self._stop(f"RSP {rsp:#x} is on {name}, but no frame lies at its top {self._misplaced(top, rsp)}")
        if self.stacks.live(top) is not None:
            return self._older(top, rsp)
        kept = linux_copies(self._space, self._cpu, top, rsp)
        self.stacks.chain.append(Link(top, top.frame))
        if kept is not None and kept.raw != top.frame.raw and not top.holds(top.frame.rsp):
            return self._add_older(top, kept)
        return top.frame

    def _misplaced(self, top: Top, rsp: int) -> str:
        """Where a frame lies instead."""
        for at in range(top.hi - FRAME - 16, max(rsp, top.hi - 2 * PAGE) - 1, -16):
            if at >= rsp and saved_at(self._space, self._cpu, at) is not None:
                return f"(the highest that can be one is at {at:#x}: was the pointer in the TSS moved?)"
        return "(none below it either)"

    def _older(self, top: Top, rsp: int) -> Saved | None:
        """The code that a frame interrupted was a handler of a frame at the same place."""
        return self._add_older(top, linux_copies(self._space, self._cpu, top, rsp) if top.holds(rsp) else None)

    def _add_older(self, top: Top, kept: Saved | None) -> Saved | None:
        if any(link.older and link.top is top for link in self.stacks.chain):
            return self._stop(f"the frames before it on {ist_name(top)} are not known")
        self.stacks.chain.append(Link(top, kept, copy=None if kept is None else kept.at, older=True))
        if kept is None:
            self._stop(f"what the overwritten frame on {ist_name(top)} held is not known")
        return kept

    # -- handlers that run elsewhere -------------------------------------------------------------------------------------

    def _off_stack(self, rsp: int) -> Saved | None:
        end, data = self._above(rsp)
        begin = rsp + 7 & ~7
        pointers = self._pointers(begin, data)
        copies = {id(top): begin + at for top, at in self._copies(data)}
        nearest: tuple[int, Top, bool] | None = None
        for top in self.stacks.tops:
            for place, is_copy in ((pointers.get(id(top), [None])[0], False), (copies.get(id(top)), True)):
                if place is None or (is_copy and top.frame is not None and rsp <= top.frame.rsp <= place):
                    continue  # a copy above what it interrupted is older than the frame
                if nearest is None or place < nearest[0]:
                    nearest = (place, top, is_copy)
        if nearest is None:
            return self._stop(f"on the stack of RSP {rsp:#x} nothing leads to an IST stack")
        place, top, is_copy = nearest
        frame = top.frame
        assert frame is not None
        if self.stacks.live(top) is not None:
            return self._older(top, rsp)
        copy = place if is_copy else copies.get(id(top))
        if rsp <= frame.rsp < end and any(at >= frame.rsp for at in pointers.get(id(top), [])):
            # What it interrupted, and where the CPU runs again, had a frame there already.
            self.stacks.chain.append(Link(top, frame, place, left=True))
            return self._add_older(top, None)
        self.stacks.chain.append(Link(top, frame, place, copy=copy))
        return frame

    def _above(self, rsp: int) -> tuple[int, bytes]:
        """The end of the stack of an RSP that is on no IST stack, and its bytes from there on, as far as they are known."""
        end = -(-(rsp or 1) // BLOCK) * BLOCK
        for lo, hi in self._named:
            if lo < rsp <= hi:
                end = hi
                break
            if rsp <= lo < end:
                end = lo
        begin = rsp + 7 & ~7
        parts: list[bytes] = []
        at = begin
        while at < end and len(parts) < 2 * BLOCK // PAGE:
            part = self._space.read(at, min(PAGE - at % PAGE, end - at))
            if part is None:
                break
            parts.append(part)
            at += len(part)
        if at > begin:
            self.stacks.seen.append((begin, at))
        return end, b"".join(parts)

    def _pointers(self, begin: int, data: bytes) -> dict[int, list[int]]:
        """For each top (by id) the places of pointers to what a handler pushed there, lowest first."""
        words = memoryview(data)[: len(data) & ~7].cast("Q")
        tops = [top for top in self.stacks.tops if top.frame is not None]
        found: dict[int, list[int]] = {}
        if not tops:
            return found
        low, high = min(top.lo for top in tops), max(top.hi for top in tops)
        for number, word in enumerate(words):
            if low <= word <= high:
                for top in tops:
                    if top.lo <= word <= top.hi - FRAME:
                        found.setdefault(id(top), []).append(begin + 8 * number)
        return found

    def _copies(self, data: bytes) -> list[tuple[Top, int]]:
        found = []
        for top in self.stacks.tops:
            at = -1 if top.frame is None else data.find(top.frame.raw)
            while at >= 0 and at % 8 and top.frame is not None:
                at = data.find(top.frame.raw, at + 1)
            if at >= 0:
                found.append((top, at))
        return found


def ist_name(top: Top) -> str:
    """`IST2 (NMI)`."""
    slots = "+".join(str(n) for n in top.slots)
    named = ", ".join(x86.vector_name(v) for v in top.vectors[:4]) + (", ..." if len(top.vectors) > 4 else "")
    return f"IST{slots} ({named})"
