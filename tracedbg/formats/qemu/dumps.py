"""Register dumps of a QEMU log and the `v=` lines that they belong to; what lies between them keeps its place."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from tracedbg.formats.qemu import patterns
from tracedbg.formats.qemu.items import Attempt, Item

MAX_BLOCK = 64  # lines of one register dump
MAX_WAITING = 4096  # items of any kind behind a `v=` line without its dump
MAX_TORN = 256  # bytes of a `v=` or register line that is put together from parts; real ones are shorter by half
WAIT = 16  # `v=` lines that may stand before the register dump of an earlier one


@dataclass(slots=True, eq=False)
class _Waiting:
    """A `v=` line whose register dump is still to come."""

    attempt: Attempt
    done: bool = False
    sure: bool = True  # the CR2 of the line can be trusted to be this line's
    torn: bool = False
    cause: int = -1  # the exception that became #DF


class Dumps:
    """Items in the order of the log: `out` has those whose parts are all there."""

    def __init__(self, counts: Counter[str]) -> None:
        self.counts = counts
        self.out: list[Item] = []
        self.blocks = 0  # dumps of `v=` lines
        self.bare = False  # `v=` lines only
        self.waiting: list[_Waiting | Item] = []  # `v=` lines without their dump, and what came behind them
        self._open: list[_Waiting] = []  # those in it that are not done: looked through for every piece, so kept apart
        self.block: list[bytes] | None = None  # lines of a dump that has begun
        self._prefix = b""  # of a register line that another thread's line cut in two

    @property
    def calm(self) -> bool:
        """Whether nothing is waiting."""
        return not self.waiting and self.block is None

    def takes(self, text: bytes, cut: bool = False) -> bool:
        """Whether a text is a register line of the dump that has begun, or (`cut`) may be the beginning of one."""
        return self.block is not None and bool(cut or self._prefix or patterns.REGISTERS.match(text))

    # -- `v=` lines ---------------------------------------------------------------------------------------------------

    def head(self, attempt: Attempt, cause: int) -> None:
        """A `v=` line up to SP."""
        waiting = _Waiting(attempt, done=self.bare, cause=cause)
        self.waiting.append(waiting)
        if not self.bare:
            self._open.append(waiting)
        if self.block is not None:
            self._close_block()
        if len(self._open) > WAIT:
            if not self.blocks:
                # No register dump ever came: only the `v=` lines were kept.
                self._all_bare()
            else:
                self._give_up(self._open[0])
        self._flush()

    def tail(self, cr2: bytes | None) -> None:
        """The rest of a `v=` line."""
        last = self.out[-1] if self.bare and self.out else None
        if type(last) is Attempt and last.vector == 14 and last.cr2 < 0 and cr2 is not None:
            self.out[-1] = last._replace(cr2=int(cr2, 16))  # passed on already: of the same line
            return
        wanted = [w for w in self._open if w.attempt.cr2 < 0 and w.attempt.vector == 14]
        if cr2 is None or not wanted:
            return
        # Two page faults may wait for theirs: then the register dump decides, which repeats it.
        wanted[0].attempt = wanted[0].attempt._replace(cr2=int(cr2, 16))
        for waiting in wanted:
            waiting.sure = waiting.sure and len(wanted) == 1

    def mark_torn(self) -> None:
        """A line of another thread stood inside of one of these."""
        if self._open:
            self._open[0].torn = True
        elif self.block is not None:
            self.counts["torn_repaired"] += 1

    # -- register dumps -----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A dump begins."""
        if self.block is not None:
            self._close_block()
        self.block = []

    def line(self, text: bytes, cut: bool = False) -> None:
        """A line of the dump, or its part before another thread's line (`cut`)."""
        if self.block is None:
            return
        if self._prefix:
            text, self._prefix = self._prefix + text, b""
        if cut and len(text) <= MAX_TORN:
            self._prefix = text
            return
        self.block.append(text)
        if text.startswith(b"EFER="):
            self._close_block()
        elif cut or len(self.block) > MAX_BLOCK:
            self.counts["damaged"] += 1
            self.block = None

    def _close_block(self) -> None:
        text = b"\n".join(self.block or ())
        self.block, self._prefix = None, b""
        found = {name: pattern.search(text) for name, pattern in patterns.IN_BLOCK.items()}
        rip, sp, tr, idt, efer, cr2 = (found[name] for name in ("rip", "sp", "tr", "idt", "efer", "cr2"))
        heads = self._open
        if not heads:
            return  # of a reset or an SMM line
        self.blocks += 1
        if rip is None or sp is None:
            # Without these the dump cannot be told from another thread's.
            if len(heads) == 1:
                self._give_up(heads[0])
                self._flush()
            else:
                self.counts["torn_lost"] += 1
            return
        ip_at, sp_at = int(rip[1], 16), int(sp[1], 16)
        wide = len(rip[1]) == 16
        for waiting in heads:
            a = waiting.attempt
            # In 32-bit code the dump shows EIP, and IP is EIP too; RSP is cut to ESP.
            if (a.sp if wide else a.sp & 0xFFFFFFFF) == sp_at and (a.ip if wide else a.ip & 0xFFFFFFFF) == ip_at:
                break
        else:
            return
        damaged = tr is None or idt is None or efer is None
        own = -1 if cr2 is None else int(cr2[1], 16)
        waiting.attempt = a._replace(
            rflags=int(rip[2], 16),
            smm=rip[3] == b"1",
            tr=b"" if tr is None else tr[1],
            idt=b"" if idt is None else idt[1],
            efer=b"" if efer is None else efer[1],
            cr2=own if own >= 0 and (a.cr2 < 0 or not waiting.sure) and 14 in (a.vector, waiting.cause) else a.cr2,
            damaged=damaged,
        )
        self._done(waiting)
        if damaged:
            self.counts["damaged"] += 1
        elif waiting.torn:
            self.counts["torn_repaired"] += 1
        self._flush()

    # -- the order of the log -----------------------------------------------------------------------------------------

    def put(self, item: Item) -> None:
        """Any other item."""
        if not self.waiting:
            self.out.append(item)
            return
        self.waiting.append(item)
        if len(self.waiting) > MAX_WAITING:
            self._give_up(self._open[0])
            self._flush()

    def take(self) -> list[Item]:
        """The items that are complete."""
        out, self.out = self.out, []
        return out

    def finish(self) -> None:
        """The log is at its end."""
        if self.block is not None:
            self._close_block()
        if self._open and not self.blocks:
            self._all_bare()
        for waiting in tuple(self._open):
            self._give_up(waiting)
        self._flush()

    def _give_up(self, waiting: _Waiting) -> None:
        waiting.attempt = waiting.attempt._replace(damaged=True)
        self._done(waiting)
        self.counts["damaged"] += 1
        if waiting.torn:
            self.counts["torn_lost"] += 1

    def _done(self, waiting: _Waiting) -> None:
        waiting.done = True
        self._open.remove(waiting)

    def _all_bare(self) -> None:
        self.bare = True
        for waiting in self._open:
            waiting.done = True
        self._open = []

    def _flush(self) -> None:
        done = 0
        for entry in self.waiting:
            if isinstance(entry, _Waiting):
                if not entry.done:
                    break
                self.out.append(entry.attempt)
            else:
                self.out.append(entry)
            done += 1
        del self.waiting[:done]
