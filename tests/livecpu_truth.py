"""What really happened to the frames of a recording: by the bytes that the CPU stored and loaded, and by nothing else.

Every byte of RAM has its last writer. An activation is one run of a handler (or of the code under all handlers). A
delivery begins one; an IRET resumes the one whose registers the popped bytes hold: the interrupted activation of the
delivery that stored the RIP that was popped.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from livecpu import Delivery, Iret, Regs, Step, Store

SLOTS = ("rip", "cs", "rflags", "rsp", "ss")
RFLAGS_MASK = 0xFFFFFFFF & ~(1 << 16)  # RF says how it was interrupted, not what
MASKS = (-1, 0xFFFF, RFLAGS_MASK, -1, 0xFFFF)
SOFTWARE = -1


@dataclass(eq=False)
class Activation:
    """One run of a handler. step -1: it has no delivery (the start, or code entered by a hand-made frame)."""

    step: int = -1
    lo: int = 0
    hi: int = 0
    ist: int = 0
    saved: tuple[int, ...] = ()
    interrupted: Activation | None = None
    popped: int | None = None  # the step at which it popped its own frame
    edited: bool = False  # the guest has already moved its saved RIP on

    @property
    def rip_addr(self) -> int:
        return self.hi - 40

    def returned(self, before: int) -> bool:
        """Whether it popped its own frame before a step."""
        return self.popped is not None and self.popped < before

    def holds(self, values: tuple[int, ...]) -> bool:
        """Whether five popped words are the ones that its delivery stored."""
        return bool(self.saved) and all(not (v ^ s) & m for v, s, m in zip(values, self.saved, MASKS, strict=True))


@dataclass(frozen=True)
class Overwrite:
    """A delivery stored over bytes of a frame whose handler had not returned. slots, differ: names; live: its handler is
    among those that the running one interrupted, so it will run again."""

    step: int
    victim: int
    slots: frozenset[str]
    differ: frozenset[str]
    live: bool
    ist: int  # of the overwriting delivery
    failed: bool
    lo: int
    hi: int


@dataclass(frozen=True)
class Pop:
    """An IRET that was not faulted. own: the delivery whose handler executed it, if it popped at its own frame for the first
    time, else None; foreign: slots that another delivery stored, with other values than its own -> that delivery."""

    step: int
    at: int
    own: int | None
    foreign: dict[str, int]
    values: tuple[int, ...]
    writers: tuple[int, ...]  # who stored the lowest byte of each word
    loops: bool  # it resumes its own handler, or one that its own handler interrupted
    others: frozenset[int]  # further deliveries whose frames lie here and whose handlers have not returned


@dataclass
class Truth:
    """Follows a recording step by step."""

    memory: bytearray
    main: Activation = field(default_factory=Activation)
    steps: list[Step] = field(default_factory=list)
    activations: list[Activation] = field(default_factory=list)
    overwrites: list[Overwrite] = field(default_factory=list)
    pops: list[Pop] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.now = self.main
        self.writer: dict[int, int] = {}  # byte -> step of the delivery, or SOFTWARE
        self.last: dict[int, int] = {}  # byte -> step that stored it last
        self.by_step: dict[int, Activation] = {}
        self.live: list[frozenset[int]] = []  # before each step: the deliveries whose handlers run or will run again
        self.running: list[Activation] = []  # before each step

    def chain(self) -> list[Activation]:
        """The running activation and those that it interrupted, innermost first."""
        result: list[Activation] = []
        at: Activation | None = self.now
        while at is not None and at not in result:
            result.append(at)
            at = at.interrupted
        return result

    def add(self, step: Step, ist: int = 0) -> None:
        """The next step. ist: that of the gate, for a delivery."""
        number = len(self.steps)
        self.steps.append(step)
        self.live.append(frozenset(a.step for a in self.chain()))
        self.running.append(self.now)
        if isinstance(step, Store):
            self._store(step, number, SOFTWARE)
        elif isinstance(step, Delivery):
            self._deliver(step, number, ist)
        elif isinstance(step, Iret) and step.after is not None:
            self._pop(step, number, step.after)

    def _store(self, store: Store, number: int, writer: int) -> None:
        self.memory[store.addr : store.addr + len(store.data)] = store.data
        for at in range(store.addr, store.addr + len(store.data)):
            self.writer[at] = writer
            self.last[at] = number

    def _deliver(self, step: Delivery, number: int, ist: int) -> None:
        before = {s.addr + n: self.memory[s.addr + n] for s in step.stores for n in range(len(s.data))}
        live = self.chain()
        for store in step.stores:
            self._store(store, number, number)
        for frame in self.activations if step.stores else ():
            if frame.popped is None and frame.lo < step.hi and step.lo < frame.hi:
                self._overwrite(frame, step, number, before, frame in live, ist)
        if step.failed:
            return
        saved = tuple(int.from_bytes(self.memory[step.hi - 40 + 8 * n : step.hi - 32 + 8 * n], "little") for n in range(5))
        self.now = Activation(number, step.lo, step.hi, ist, saved, self.now)
        self.activations.append(self.now)
        self.by_step[number] = self.now

    def _overwrite(self, frame: Activation, step: Delivery, number: int, before: dict[int, int], live: bool, ist: int) -> None:
        names = (*SLOTS, "error-code")
        slots, differ = set(), set()
        for at in range(max(frame.lo, step.lo), min(frame.hi, step.hi)):
            name = names[(at - frame.rip_addr) // 8] if at >= frame.rip_addr else names[5]
            slots.add(name)
            if before[at] != self.memory[at]:
                differ.add(name)
        self.overwrites.append(
            Overwrite(number, frame.step, frozenset(slots), frozenset(differ), live, ist, step.failed, step.lo, step.hi)
        )

    def _pop(self, step: Iret, number: int, after: Regs) -> None:
        values = tuple(step.word(n) for n in range(5))
        at = step.before.rsp
        frame = self.now if self.now.step >= 0 and self.now.rip_addr == at else None
        foreign: dict[str, int] = {}
        if frame is not None:
            for n, name in enumerate(SLOTS):
                if (values[n] ^ frame.saved[n]) & MASKS[n]:
                    writer = self.writer.get(at + 8 * n, SOFTWARE)
                    if writer not in (SOFTWARE, frame.step):
                        foreign[name] = writer
        own = frame.step if frame is not None and frame.popped is None else None
        others = {a.step for a in self.activations if a.rip_addr == at and a.popped is None and a is not frame}
        if frame is not None and frame.popped is None:
            frame.popped = number
        writers = tuple(self.writer.get(at + 8 * n, SOFTWARE) for n in range(5))
        source = self.by_step.get(writers[0]) or self.by_step.get(writers[3])
        if source is not None and source.interrupted is not None:
            self.now = source.interrupted
        else:
            self.now = Activation()
        elsewhere = frame is not None and not foreign.keys().isdisjoint(("rip", "rsp"))
        loops = elsewhere and any(self._loops(frame, values, w) for w in foreign.values())
        self.pops.append(Pop(number, at, own, foreign, values, writers, loops, frozenset(others)))
        assert after.rip == values[0]

    def _loops(self, frame: Activation | None, values: tuple[int, ...], writer: int) -> bool:
        """Whether the context that was popped is the one that `writer` interrupted, in or under the handler of `frame`."""
        other = self.by_step.get(writer)
        return other is not None and (values[0], values[3]) == (other.saved[0], other.saved[3]) and frame in self.chain()
