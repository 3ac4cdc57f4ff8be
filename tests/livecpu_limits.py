"""What the replay cannot tell, by what the CPU did: each limit that excuses a difference, with its reason."""

from __future__ import annotations

from livecpu import Delivery, Iret
from livecpu_truth import Activation, Overwrite, Pop, Truth

from tracedbg.layout import REGION_STACK, Layout

Stack = tuple[int, int]  # lo, hi


class Limits:
    """Asks a complete recording."""

    def __init__(self, truth: Truth, layout: Layout) -> None:
        self.truth = truth
        self.regions = sorted((r.hi, r.lo) for r in layout.regions if r.kind == REGION_STACK)

    def stack(self, at: int) -> Stack:
        """The stack of an address, as the layout divides memory."""
        for hi, lo in self.regions:
            if lo < at <= hi:
                return lo, hi
        block = (at - 1) & -0x4000
        return block, block + 0x4000

    def overwrite(self, over: Overwrite) -> str | None:
        """Why an overwrite by an IST delivery need not be reported."""
        victim = self.truth.by_step[over.victim]
        mine, its = self.stack(over.hi), self.stack(victim.hi)
        if its != mine and not (self.leaves(over) and its == self.stack(mine[0])):
            # It is looked for on the writer's stack and, if the writer left that, on the one below.
            return "the victim fills the stack above" if its > mine else "two stacks below"
        return self.left(over.victim, over.step)

    def leaves(self, over: Overwrite) -> bool:
        """Whether the writer's frame begins below its stack."""
        return over.lo < self.stack(over.hi)[0]

    def foreign(self, pop: Pop) -> bool:
        """Whether a return must be reported: it popped another delivery's words over its handler's own frame.

        What is pushed without a stack switch is not judged (after an IST reset it can hit a frame): then RIP or RSP must differ.
        """
        hit = any(o.victim == pop.own and o.ist and o.differ for o in self.truth.overwrites)
        return bool(pop.foreign if hit else pop.foreign.keys() & {"rip", "rsp"})

    def pop(self, pop: Pop, taken: set[int]) -> str | None:
        """Why words of another delivery that a return popped over its own frame need not be reported."""
        if pop.own is None:
            return None
        if pop.own in taken:
            return "taken before"
        # Once it is known to be overwritten, RSP proves nothing any more.
        seen = (o.step for o in self.truth.overwrites if o.victim == pop.own and o.ist and o.differ and not self.overwrite(o))
        return self.left(pop.own, next(seen, pop.step))

    def named(self, pop: Pop, victim: int, taken: set[int]) -> str | None:
        """Why a return may be taken for that of an older frame at this place. taken: those for which it was done before.

        The replay takes the newest frame there that is still open. None: it is not that one, or the handler has its own.
        """
        younger = {s for s in pop.others if s > victim} | ({pop.own} if pop.own is not None else set())
        if victim not in pop.others or any(s not in taken and self.left(s, pop.step) is None for s in younger):
            return None
        if pop.own is not None:
            return "own frame looked left"
        running = self.truth.running[pop.step]
        return "own frame used up" if running.rip_addr == pop.at and running.returned(pop.step) else None

    def left(self, victim: int, until: int) -> str | None:
        """How a frame looked left, at a delivery up to `until`, though its handler had not returned.

        An interrupted RSP above a frame says that it was popped, one above what the frame saved that the other stack is
        in use again. Neither holds after an IST reset, so the replay looks for the frame of the running handler: the
        reason says why that cannot be found.
        """
        frame = self.truth.by_step[victim]
        home, saved = self.stack(frame.hi), self.stack(frame.saved[3])
        for number in range(victim + 1, until + 1):
            step = self.truth.steps[number]
            after = step.after if isinstance(step, Iret) else step.before if isinstance(step, Delivery) else None
            if after is not None and after.cs & 3:
                return "CPL3"  # handlers left by a frame made by hand: user mode runs, and an old word can bring them back
            if not isinstance(step, Delivery) or step.failed:
                continue
            rsp, here = step.before.rsp, self.stack(step.before.rsp)
            popped = here == home and rsp > frame.rip_addr
            above = here == saved != home and rsp >= frame.saved[3]
            why = self._unseen(self.truth.running[number], victim, number, rsp)
            if why is not None and (popped or above):
                return f"{'popped' if popped else 'above'}, {why}"
        return None

    def _unseen(self, running: Activation, victim: int, number: int, rsp: int) -> str | None:
        """Why the frame of the running handler is not seen above RSP on the stack of RSP; None: it is, or nothing excuses it."""
        if running.step < victim:
            return None
        if running.returned(number):
            return "own frame used up"  # a return popped it with another delivery's RSP, and the handler runs on
        if running.lo <= self.stack(running.hi)[0]:
            return "own frame fills its stack"  # RSP below it is on the next stack: tops closer than a frame
        if running.rip_addr < rsp or self.stack(running.hi) != self.stack(rsp):
            return "RSP moved"
        return None
