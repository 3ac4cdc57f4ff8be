"""The text of QEMU's `-d int` log: blocks and lines in, items out; torn lines are put together again.

QEMU prints one delivery attempt in pieces: the `v=` line in three, then the register dump. The pieces of one vCPU thread never
mix with the inside of another's, but whole pieces of another thread can stand between them. A piece is recognised wherever it
begins, and a register dump finds its `v=` line by RIP and RSP.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

MAX_LINE = 64 << 10
MAX_BLOCK = 64  # lines of one register dump
MAX_WAITING = 4096  # items of any kind behind such a line
MAX_TORN = 256  # bytes of a `v=` or register line that is put together from parts; real ones are shorter by half
WAIT = 16  # `v=` lines that may stand before the register dump of an earlier one
STALE = 2  # `v=` lines after which a Servicing or check_exception line belongs to none any more
BATCH = 256  # items passed on at a time: few enough not to wake the garbage collector
NEED = 8 << 10  # bytes that hold any whole block: with less, wait for more

NO_OLD = 0xFFFFFFFF  # check_exception's "no exception is being delivered"


class Note(IntEnum):
    """Items other than attempts."""

    RESET = 1  # a: CPU number
    SMI = 2
    RSM = 3
    SHUTDOWN = 4  # a: CPU number or -1, b: enum tdb_shutdown


class Attempt(NamedTuple):
    """One `v=` line with its register dump. -1: not there. `tr`, `idt`, `efer`: hex digits as printed.

    `cr2`: of a #PF, and of the #PF that became a #DF.
    """

    number: int
    vector: int
    code: int
    soft: int
    cs: int
    ip: int
    ss: int
    sp: int
    cr2: int
    rflags: int
    tr: bytes
    idt: bytes
    efer: bytes  # b"": no register dump
    smm: bool
    old: int  # check_exception's old; -1: no such line
    serviced: bool
    damaged: bool
    time: int


class Other(NamedTuple):
    """A line that is no attempt."""

    note: Note
    a: int
    b: int
    time: int


class Plugin(NamedTuple):
    """A line of the plugin: what it says after `PLG cpu=N`, as matched."""

    cpu: int
    verb: bytes
    fields: tuple[bytes, ...]


Item = Attempt | Other | Plugin

_HEAD = (
    rb" {0,5}([0-9]{1,10}): v=([0-9a-f]{2}) e=([0-9a-f]{4}) i=([01]) cpl=[0-3] "
    rb"IP=([0-9a-f]{4}):([0-9a-f]{16}) pc=[0-9a-f]{16} SP=([0-9a-f]{4}):([0-9a-f]{16})"
)
# The whole of an attempt in 64-bit code, nothing torn, with the line before it. Fixed columns are skipped unread.
_WHOLE = re.compile(
    rb"(?:check_exception old: 0x([0-9a-f]{1,8}) new 0x([0-9a-f]{1,8})\n|Servicing hardware INT=0x([0-9a-f]{2})\n)?"
    + _HEAD
    + rb" (?:CR2=([0-9a-f]{16})|env->regs\[R_EAX\]=[0-9a-f]{16})\n"
    rb"RAX=(?s:.{332})RIP=[0-9a-f]{16} RFL=([0-9a-f]{8}) (?s:.{27})SMM=([01]) [^\n]*\n"
    rb"ES =[^\n]*\n[^\n]*\n[^\n]*\n[^\n]*\n[^\n]*\n[^\n]*\n[^\n]*\n"
    rb"TR =[0-9a-f]{4} ([0-9a-f]{16}) [^\n]*\n"
    rb"GDT=[^\n]*\n"
    rb"IDT= {5}([0-9a-f]{16}) [^\n]*\n"
    rb"CR0=[0-9a-f]{8} CR2=([0-9a-f]{16}) [^\n]*\nDR0=[^\n]*\nDR6=[^\n]*\n(?:CCS=[^\n]*\n)?"
    rb"EFER=([0-9a-f]{16})\n"
)
_PIECE = re.compile(
    rb"(?P<head>" + _HEAD + rb")"
    rb"|check_exception old: 0x(?P<old>[0-9a-f]{1,8}) new 0x(?P<new>[0-9a-f]{1,8})(?![0-9a-f])"
    rb"|Servicing (?:hardware|virtual hardware) INT=0x(?P<serviced>[0-9a-f]{2})(?![0-9a-f])"
    rb"|(?P<tail> CR2=(?P<cr2>[0-9a-f]{16})| env->regs\[R_EAX\]=[0-9a-f]{16})"
    rb"|(?P<block>[RE]AX=[0-9a-f]{8})"
    rb"|CPU Reset \(CPU (?P<reset>[0-9]{1,5})\)"
    rb"|SMM: (?P<smm>enter|after RSM)"
    rb"|CPU (?P<mcip>[0-9]{1,5}): Previous MCE still in progress, raising triple fault"
    rb"|(?P<triple>Triple fault)"
    rb"|PLG (?P<plugin>cpu=[^\n]*)"
)
_CUT_HEAD = re.compile(rb" *[0-9]{1,10}(?:$|: ?$|: v)")
# A line without one of these holds no piece; in a register dump " CR2=" is ordinary.
_HINT = re.compile(rb": v=|check_e|Servic|R_EAX|AX=|CPU |SMM: |Triple|PLG | CR2=")
_TORN_HINT = re.compile(rb": v=|check_e|Servic|R_EAX|AX=|CPU |SMM: |Triple|PLG ")
_REGISTERS = re.compile(
    rb"(?:R(?:AX|SI|8 |12|IP)|E(?:AX|SI|IP|S |FER)|[CSDFG]S |LDT|TR |GDT|IDT|CR0|DR[06]|CCS|FCW|FPR[0-7]|[XYZ]MM\d\d|R\d\d)="
)
_IRET = re.compile(
    rb"PLG cpu=([0-9]{1,5}) iret pc=([0-9a-f]{16})\n"
    rb"PLG cpu=\1 iret-frame pc=\2 frame=([0-9a-f]{16}) rip=([0-9a-f]{16}) "
    rb"cs=([0-9a-f]{4,16}) rfl=([0-9a-f]{8,16}) rsp=([0-9a-f]{16}) ss=([0-9a-f]{4,16})\n"
)
_PLUGIN = re.compile(
    rb"PLG cpu=([0-9]{1,5}) ([a-z-]{2,12}) pc=([0-9a-f]{16})"
    rb"(?: va=([0-9a-f]{16}) sz=([0-9]{1,3}) val=([0-9a-f]*))?\n"
)
_FRAME = re.compile(
    rb"cpu=([0-9]{1,5}) iret-frame pc=([0-9a-f]{16}) frame=([0-9a-f]{16}) rip=([0-9a-f]{16}) "
    rb"cs=([0-9a-f]{4,16}) rfl=([0-9a-f]{8,16}) rsp=([0-9a-f]{16}) ss=([0-9a-f]{4,16})$"
)
_TRACE_LINE = re.compile(rb"[0-9]{1,10}@([0-9]{1,12})\.([0-9]{6}):")

_IN_BLOCK = {
    "rip": re.compile(rb"^[RE]IP=([0-9a-f]{8,16}) (?:RFL|EFL)=([0-9a-f]{8}) .*?SMM=([01])", re.M),
    "sp": re.compile(rb"[RE]SP=([0-9a-f]{8,16})"),
    "cr2": re.compile(rb"^CR0=[0-9a-f]{8} CR2=([0-9a-f]{8,16})", re.M),
    "tr": re.compile(rb"^TR =[0-9a-f]{4} ([0-9a-f]{8,16}) ", re.M),
    "idt": re.compile(rb"^IDT= +([0-9a-f]{8,16}) ", re.M),
    "efer": re.compile(rb"^EFER=([0-9a-f]{16})", re.M),
}

_SNIFF = re.compile(
    rb"^ *\d{1,10}: v=[0-9a-f]{2} e=[0-9a-f]{4} i=|^Servicing (?:virtual )?hardware INT=0x|^check_exception old: 0x"
    rb"|^CPU Reset \(CPU \d+\)|^SMM: (?:enter|after RSM)|^PLG (?:install|cpu=)",
    re.M,
)
_WEAK = re.compile(rb"^-{8,}\r?\nIN:|^\d+@\d+\.\d{6}:[a-z0-9_]+ |^Trace \d+: 0x", re.M)


def is_log(head: bytes) -> bool:
    """Whether a text begins like a QEMU log; other `-d` lines alone are enough at its beginning."""
    return _SNIFF.search(head) is not None or _WEAK.search(head) is not None


@dataclass(slots=True, eq=False)
class _Waiting:
    """A `v=` line whose register dump is still to come."""

    attempt: Attempt
    done: bool = False
    sure: bool = True  # the CR2 of the line can be trusted to be this line's
    torn: bool = False
    cause: int = -1  # the exception that became #DF


class LogText:
    """Reads one log. `items()` runs once; afterwards `lines`, `counts` and `timed` tell of it."""

    def __init__(self) -> None:
        self.lines = 0
        self.counts: Counter[str] = Counter()
        self.seen = False  # anything of QEMU's
        self.bare = False  # `v=` lines only
        self.timed = False
        self._blocks = 0
        self._heads = 0
        self._time = -1
        self._waiting: list[_Waiting | Item] = []
        self._open: list[_Waiting] = []  # those in it that are not done: looked through for every piece, so kept apart
        self._checks: list[tuple[int, int, int]] = []  # old, new, heads before it
        self._services: list[tuple[int, int]] = []  # vector, heads before it
        self._block: list[bytes] | None = None
        self._prefix = b""  # of a register line that another thread's line cut in two
        self._cut = b""  # of a `v=` line, likewise
        self._fault_told = False
        self._other = 0  # lines that were not understood
        self._junk = False  # inside a line that is too long
        self._out: list[Item] = []

    def items(self, chunks: Iterable[bytes]) -> Iterator[list[Item]]:
        """All items in the order of the log, in short lists (a generator step for each would cost a tenth of the time)."""
        buffer = b""
        for chunk in chunks:
            buffer += chunk
            if b"\r" in buffer:
                # A "\r" at the end may be half of a line end: it stays for the next chunk.
                cut = len(buffer) - buffer.endswith(b"\r")
                buffer = buffer[:cut].replace(b"\r\n", b"\n") + buffer[cut:]
            at = yield from self._all(buffer, False)
            buffer = buffer[at:]
        if buffer and not buffer.endswith(b"\n"):
            buffer += b"\n"
        yield from self._all(buffer, True)
        self._finish()
        yield self._take()

    def _all(self, buffer: bytes, last: bool) -> Generator[list[Item], None, int]:
        at = -1
        stop = 0
        while stop != at:
            at = stop
            stop = self._run(buffer, at, last)
            yield self._take()
        self.lines += buffer.count(b"\n", 0, at)
        return at

    def _take(self) -> list[Item]:
        out, self._out = self._out, []
        return out

    def _run(self, buffer: bytes, at: int, last: bool) -> int:
        """Read whole blocks and lines from `at` on, about BATCH of them; returns where to go on."""
        end = len(buffer)
        limit = end if last else end - NEED
        whole, iret, plugin = _WHOLE.match, _IRET.match, _PLUGIN.match
        out = self._out
        make = tuple.__new__
        while at < limit and len(out) < BATCH:
            calm = not self._waiting and self._block is None and not self._junk and not self._cut
            while calm and len(out) < BATCH and at < limit and (match := whole(buffer, at)):
                (old, new, serviced, number, v, e, soft, cs, ip, ss, sp, cr2, *rest) = match.groups()
                rflags, smm, tr, idt, cr2_after, efer = rest
                at = match.end()
                self._heads += 1
                vector = int(v, 16)
                if vector == 8 and new is not None and int(new, 16) == 14:
                    cr2 = cr2_after
                if self._checks or self._services or (new is not None and int(new, 16) != vector) or (
                    serviced is not None and serviced != v
                ):
                    if new is not None:
                        self._checks.append((int(old, 16), int(new, 16), self._heads - 1))
                    if serviced is not None:
                        self._service(int(serviced, 16), self._heads - 1)
                    was, by, _ = self._resolve(vector, soft == b"1")
                else:
                    was = -1 if old is None else int(old, 16)
                    by = serviced is not None
                fields = (
                    int(number), vector, int(e, 16), soft == b"1", int(cs, 16), int(ip, 16), int(ss, 16), int(sp, 16),
                    -1 if cr2 is None else int(cr2, 16), int(rflags, 16), tr, idt, efer, smm == b"1", was, by, False,
                    self._time,
                )  # fmt: skip
                # Attempt's own constructor, one of a million calls, would take twice as long.
                out.append(make(Attempt, fields))
                self._blocks += 1
                self._fault_told = False
            if at >= limit or len(out) >= BATCH:
                break
            if buffer.startswith(b"PLG ", at) and not self._junk:
                match = iret(buffer, at)
                verb = b"iret-frame" if match else b""
                match = match or plugin(buffer, at)
                if match:
                    at = match.end()
                    groups = match.groups()
                    item = Plugin(int(groups[0]), verb or groups[1], groups[1:] if verb else groups[2:])
                    self.seen = True
                    self._put(item)
                    continue
            stop = buffer.find(b"\n", at)
            if stop < 0:
                if end - at < MAX_LINE:
                    break
                # No log has such a line. What follows up to the next line end is skipped in pieces.
                self.counts["damaged"] += not self._junk
                self._junk = True
                return end
            line = buffer[at:stop]
            at = stop + 1
            if self._junk or len(line) > MAX_LINE:
                self.counts["damaged"] += not self._junk
                self._junk = False
                continue
            self._line(line)
        return at

    # -- lines that are not whole blocks ------------------------------------------------------------------------------

    def _line(self, line: bytes) -> None:
        if self._cut:
            line, self._cut = self._cut + line, b""
        if self._block is not None and not _TORN_HINT.search(line, 4) and (self._prefix or _REGISTERS.match(line)):
            self._register_line(line)
            return
        if not _HINT.search(line):
            if match := _TRACE_LINE.match(line):
                self._time = max(self._time, int(match[1]) * 1_000_000 + int(match[2]))
                self.timed = True
            else:
                self._other += not _REGISTERS.match(line) and not line.isspace() and line != b""
            return
        at = 0
        while match := _PIECE.search(line, at):
            if match.start() > at:
                self._between(line[at : match.start()], True)
            at = match.end()
            self.seen = True
            if match["block"] is not None:
                # The rest of the line is registers, up to another thread's piece.
                self._open_block()
                cut = _PIECE.search(line, at)
                while cut is not None and cut["tail"] is not None:
                    cut = _PIECE.search(line, cut.end())
                stop = len(line) if cut is None else cut.start()
                self._register_line(line[match.start() : stop], cut is not None)
                at = stop
            else:
                self._piece(match)
        if at < len(line):
            used = self._between(line[at:], False)
            self._other += at == 0 and not used and not line.startswith(b"PLG install")

    def _between(self, text: bytes, cut: bool) -> bool:
        """Text between pieces: part of a line that was cut in two, or nothing of ours. Whether it was of use."""
        if cut and _CUT_HEAD.match(text):
            if len(text) > MAX_TORN:
                self.counts["damaged"] += 1
                return False
            self._cut = text
            self.counts["torn_repaired"] += 1
        elif self._block is not None and (cut or self._prefix or _REGISTERS.match(text)):
            self._register_line(text, cut)
        elif text.strip():
            if b": v=" in text:
                self.counts["damaged"] += 1
            elif self._waiting:
                self.counts["torn_lost"] += 1
            return False
        return True

    def _piece(self, match: re.Match[bytes]) -> None:
        if match["head"] is not None:
            self._head(match)
        elif match["old"] is not None:
            old = int(match["old"], 16)
            torn = match.start() > 0
            if torn:
                self._mark_torn()
            if old == 8 and not self._fault_told:
                # An exception while #DF is delivered: the CPU shuts down; "Triple fault" is only printed with -d cpu_reset.
                self._fault_told = True
                self._put(Other(Note.SHUTDOWN, -1, 0, self._time))
            else:
                self._checks.append((old, int(match["new"], 16), self._heads))
                del self._checks[:-8]
        elif match["serviced"] is not None:
            if match.start() > 0:
                self._mark_torn()
            self._service(int(match["serviced"], 16), self._heads)
        elif match["tail"] is not None:
            self._tail(match["cr2"])
        elif match["reset"] is not None:
            self._fault_told = False
            self._put(Other(Note.RESET, int(match["reset"]), 0, self._time))
        elif match["smm"] is not None:
            self._put(Other(Note.SMI if match["smm"] == b"enter" else Note.RSM, -1, 0, self._time))
        elif match["mcip"] is not None:
            self._fault_told = True
            self._put(Other(Note.SHUTDOWN, int(match["mcip"]), 1, self._time))
        elif match["triple"] is not None:
            if not self._fault_told:
                self._put(Other(Note.SHUTDOWN, -1, 0, self._time))
            self._fault_told = True
        elif match["plugin"] is not None:
            self._plugin(match["plugin"])

    def _plugin(self, text: bytes) -> None:
        if frame := _FRAME.match(text):
            groups = frame.groups()
            self._put(Plugin(int(groups[0]), b"iret-frame", groups[1:]))
        elif match := _PLUGIN.match(b"PLG " + text + b"\n"):
            self._put(Plugin(int(match[1]), match[2], match.groups()[2:]))
        else:
            self.counts["plugin_unread"] += 1

    def _head(self, match: re.Match[bytes]) -> None:
        number, v, e, soft, cs, ip, ss, sp = match.groups()[1:9]
        if match.start() > 0 and self._waiting:
            self._mark_torn()
        self._heads += 1
        self._fault_told = False
        vector = int(v, 16)
        old, serviced, cause = self._resolve(vector, soft == b"1")
        attempt = Attempt(
            int(number), vector, int(e, 16), soft == b"1", int(cs, 16), int(ip, 16), int(ss, 16), int(sp, 16),
            -1, -1, b"", b"", b"", False, old, serviced, False, self._time,
        )  # fmt: skip
        waiting = _Waiting(attempt, done=self.bare, cause=cause)
        self._waiting.append(waiting)
        if not self.bare:
            self._open.append(waiting)
        if self._block is not None:
            self._close_block()
        if len(self._open) > WAIT:
            if not self._blocks:
                # No register dump ever came: only the `v=` lines were kept.
                self._all_bare()
            else:
                self._give_up(self._open[0])
        self._flush()

    def _tail(self, cr2: bytes | None) -> None:
        last = self._out[-1] if self.bare and self._out else None
        if type(last) is Attempt and last.vector == 14 and last.cr2 < 0 and cr2 is not None:
            self._out[-1] = last._replace(cr2=int(cr2, 16))  # passed on already: of the same line
            return
        wanted = [w for w in self._open if w.attempt.cr2 < 0 and w.attempt.vector == 14]
        if cr2 is None or not wanted:
            return
        # Two page faults may wait for theirs: then the register dump decides, which repeats it.
        wanted[0].attempt = wanted[0].attempt._replace(cr2=int(cr2, 16))
        for waiting in wanted:
            waiting.sure = waiting.sure and len(wanted) == 1

    def _service(self, vector: int, heads: int) -> None:
        self.counts["serviced"] += 1
        self._services.append((vector, heads))
        del self._services[:-8]

    def _resolve(self, vector: int, soft: bool) -> tuple[int, bool, int]:
        """What the check_exception (old, new) and Servicing lines that belong to a `v=` line say: old, serviced, new."""
        old, serviced, cause = -1, False, -1
        if not soft:
            for n in range(len(self._checks) - 1, -1, -1):
                was, new, _ = self._checks[n]
                # A fault during the delivery of a fault is delivered as #DF.
                if new == vector or (vector == 8 and was != NO_OLD):
                    old, cause = was, new
                    del self._checks[n]
                    break
            if old < 0:
                for n in range(len(self._services) - 1, -1, -1):
                    if self._services[n][0] == vector:
                        serviced = True
                        del self._services[n]
                        break
        newest = self._heads - STALE
        if self._checks:
            self._checks = [c for c in self._checks if c[2] > newest]
        if self._services:
            self._services = [s for s in self._services if s[1] > newest]
        if serviced:
            self.counts["serviced_delivered"] += 1
        return old, serviced, cause

    def _mark_torn(self) -> None:
        if self._open:
            self._open[0].torn = True
        elif self._block is not None:
            self.counts["torn_repaired"] += 1

    # -- register dumps ------------------------------------------------------------------------------------------------

    def _open_block(self) -> None:
        if self._block is not None:
            self._close_block()
        self._block = []

    def _register_line(self, text: bytes, cut: bool = False) -> None:
        if self._block is None:
            return
        if self._prefix:
            text, self._prefix = self._prefix + text, b""
        if cut and len(text) <= MAX_TORN:
            self._prefix = text
            return
        self._block.append(text)
        if text.startswith(b"EFER="):
            self._close_block()
        elif cut or len(self._block) > MAX_BLOCK:
            self.counts["damaged"] += 1
            self._block = None

    def _close_block(self) -> None:
        text = b"\n".join(self._block or ())
        self._block, self._prefix = None, b""
        found = {name: pattern.search(text) for name, pattern in _IN_BLOCK.items()}
        rip, sp, tr, idt, efer, cr2 = (found[name] for name in ("rip", "sp", "tr", "idt", "efer", "cr2"))
        heads = self._open
        if not heads:
            return  # of a reset or an SMM line
        self._blocks += 1
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

    # -- the order of the log --------------------------------------------------------------------------------------------

    def _put(self, item: Item) -> None:
        if not self._waiting:
            self._out.append(item)
            return
        self._waiting.append(item)
        if len(self._waiting) > MAX_WAITING:
            self._give_up(self._open[0])
            self._flush()

    def _flush(self) -> None:
        done = 0
        for entry in self._waiting:
            if isinstance(entry, _Waiting):
                if not entry.done:
                    break
                self._out.append(entry.attempt)
            else:
                self._out.append(entry)
            done += 1
        del self._waiting[:done]

    def _finish(self) -> None:
        if self._block is not None:
            self._close_block()
        if self._open and not self._blocks:
            self._all_bare()
        for waiting in tuple(self._open):
            self._give_up(waiting)
        self._flush()
        self.counts["other_lines"] += self._other
        self.seen = self.seen or self._heads > 0
