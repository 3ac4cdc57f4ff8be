"""The text of QEMU's `-d int` log: blocks and lines in, items out; torn lines are put together again.

QEMU prints one delivery attempt in pieces: the `v=` line in three, then the register dump. The pieces of one vCPU thread never
mix with the inside of another's, but whole pieces of another thread can stand between them. A piece is recognised wherever it
begins, and a register dump finds its `v=` line by RIP and RSP.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from typing import Protocol

from tracedbg.formats.qemu import patterns
from tracedbg.formats.qemu.causes import Causes
from tracedbg.formats.qemu.dumps import MAX_TORN, Dumps
from tracedbg.formats.qemu.items import Attempt, Item, Note, Other, Plugin
from tracedbg.formats.qemu.requests import Requests
from tracedbg.formats.qemu.stamps import Stamps

MAX_LINE = 64 << 10
BATCH = 256  # items passed on at a time: few enough not to wake the garbage collector
NEED = 8 << 10  # bytes that hold any whole block: with less, wait for more
PATIENCE = 8  # doublings of the items read here before the scanner is asked again


class Scanner(Protocol):
    """Reads ordinary blocks faster, past this module; what is odd is left to it."""

    def scan(self, text: LogText, buffer: bytes, at: int, limit: int) -> int:
        """Read from `at` on whole blocks that begin before `limit`; returns where the first odd thing begins."""


class LogText:
    """Reads one log. `items()` runs once; afterwards `lines`, `counts`, `stamps` and `requests` tell of it.

    With a `scanner`, events that it reads are not among the items: it passes them on itself, when all items so far have been
    taken.
    """

    def __init__(self, scanner: Scanner | None = None) -> None:
        self.lines = 0
        self.counts: Counter[str] = Counter()
        self.seen = False  # anything of QEMU's
        self.stamps = Stamps()
        self.requests = Requests()
        self.causes = Causes(self.counts)
        self.dumps = Dumps(self.counts)
        self.fault_told = False  # a shutdown was, since the last `v=` line
        self._scanner = scanner
        self._cut = b""  # of a `v=` line that another thread's line cut in two
        self._other = 0  # lines that were not understood
        self._junk = False  # inside a line that is too long

    @property
    def bare(self) -> bool:
        """Whether the log has `v=` lines without register dumps."""
        return self.dumps.bare

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
        self.dumps.finish()
        self.counts["other_lines"] += self._other
        self.seen = self.seen or self.causes.heads > 0
        yield self.dumps.take()

    def _all(self, buffer: bytes, last: bool) -> Generator[list[Item], None, int]:
        limit = len(buffer) if last else len(buffer) - NEED
        at, stop, turns = -1, 0, 0
        while stop != at:
            at = stop
            if self._scanner is not None and self._calm:
                stop = self._scanner.scan(self, buffer, at, limit)
                # What is odd seldom comes alone: where the scanner finds nothing, it is asked less and less often.
                turns = 0 if stop > at else min(turns + 1, PATIENCE)
            # Behind a block read here there may be more of them.
            batch, lines, most = (BATCH, BATCH * 16, BATCH) if self._scanner is None else (1 << turns, 1 << turns, 2)
            blocks = self.dumps.blocks
            first, stop = stop, self._run(buffer, stop, last, batch, lines, most)
            turns = 0 if self.dumps.blocks > blocks + 1 else turns
            self.lines += buffer.count(b"\n", first, stop)
            yield self.dumps.take()
        return at

    @property
    def _calm(self) -> bool:
        return not self._junk and not self._cut and self.dumps.calm and not self.causes.waiting and self.requests.calm

    def _run(self, buffer: bytes, at: int, last: bool, batch: int, lines: int, most: int) -> int:
        """Read from `at` on whole blocks (at most `most` in a row) and lines, up to `batch` items; returns where to go on."""
        end = len(buffer)
        limit = end if last else end - NEED
        whole, iret, plugin = patterns.WHOLE.match, patterns.IRET.match, patterns.PLUGIN.match
        dumps, causes = self.dumps, self.causes
        out = dumps.out
        make = tuple.__new__
        while at < limit and len(out) < batch and lines > 0:
            calm = not dumps.waiting and dumps.block is None and not self._junk and not self._cut
            row = 0
            while calm and row < most and len(out) < batch and at < limit and (match := whole(buffer, at)):
                row += 1
                (old, new, serviced, number, v, e, soft, cs, ip, ss, sp, cr2, *rest) = match.groups()
                rflags, smm, tr, idt, cr2_after, efer = rest
                at = match.end()
                causes.heads += 1
                vector = int(v, 16)
                if vector == 8 and new is not None and int(new, 16) == 14:
                    cr2 = cr2_after
                if causes.checks or causes.services or (new is not None and int(new, 16) != vector) or (
                    serviced is not None and serviced != v
                ):
                    if new is not None:
                        causes.check(int(old, 16), int(new, 16), causes.heads - 1)
                    if serviced is not None:
                        asked = int(serviced, 16)
                        causes.service(asked, self.requests.serviced(asked, False), causes.heads - 1)
                    was, by, _ = causes.resolve(vector, soft == b"1")
                else:
                    was = -1 if old is None else int(old, 16)
                    by = 0 if serviced is None else self.requests.serviced(vector, False)
                fields = (
                    int(number), vector, int(e, 16), soft == b"1", int(cs, 16), int(ip, 16), int(ss, 16), int(sp, 16),
                    -1 if cr2 is None else int(cr2, 16), int(rflags, 16), tr, idt, efer, smm == b"1", was, by, False,
                    self.stamps.time,
                )  # fmt: skip
                # Attempt's own constructor, one of a million calls, would take twice as long.
                out.append(make(Attempt, fields))
                dumps.blocks += 1
                self.fault_told = False
            if at >= limit or len(out) >= batch or row >= most:
                break
            lines -= 1
            if buffer.startswith(b"PLG ", at) and not self._junk:
                match = iret(buffer, at)
                verb = b"iret-frame" if match else b""
                match = match or plugin(buffer, at)
                if match:
                    at = match.end()
                    groups = match.groups()
                    item = Plugin(int(groups[0]), verb or groups[1], groups[1:] if verb else groups[2:])
                    self.seen = True
                    dumps.put(item)
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
        dumps = self.dumps
        if not line and not self._cut and dumps.block is None:
            return
        if b"Z " in line:
            line = self.stamps.strip(line)
        if self._cut:
            line, self._cut = self._cut + line, b""
        traced = b"@" in line or b"pic_" in line
        if dumps.block is not None and not traced and not patterns.TORN_HINT.search(line, 4) and dumps.takes(line):
            dumps.line(line)
            return
        if not traced and not patterns.HINT.search(line):
            self._other += not patterns.REGISTERS.match(line) and not line.isspace() and line != b""
            return
        at = 0
        search = patterns.PIECE.search
        while match := search(line, at):
            if match.start() > at:
                self._between(line[at : match.start()], True)
            at = match.end()
            self.seen = True
            if match["block"] is not None:
                # The rest of the line is registers, up to another thread's piece.
                dumps.begin()
                cut = search(line, at)
                while cut is not None and cut["tail"] is not None:
                    cut = search(line, cut.end())
                stop = len(line) if cut is None else cut.start()
                dumps.line(line[match.start() : stop], cut is not None)
                at = stop
            else:
                self._piece(match)
        if at < len(line):
            used = self._between(line[at:], False)
            self._other += at == 0 and not used and not line.startswith(b"PLG install")

    def _between(self, text: bytes, cut: bool) -> bool:
        """Text between pieces: part of a line that was cut in two, or nothing of ours. Whether it was of use."""
        if cut and patterns.CUT_HEAD.match(text):
            if len(text) > MAX_TORN:
                self.counts["damaged"] += 1
                return False
            self._cut = text
            self.counts["torn_repaired"] += 1
        elif self.dumps.takes(text, cut):
            self.dumps.line(text, cut)
        elif text.strip():
            if b": v=" in text:
                self.counts["damaged"] += 1
            elif self.dumps.waiting:
                self.counts["torn_lost"] += 1
            return False
        return True

    def _piece(self, match: re.Match[bytes]) -> None:
        if match["head"] is not None:
            self._head(match["head"], match.start() > 0)
            return
        if match.start() > 0 and (match["old"] or match["serviced"] or match["trace"]):
            self.dumps.mark_torn()
        if match["trace"] is not None:
            self.requests.line(self.stamps.trace(match["trace"]))
        elif match["old"] is not None:
            old = int(match["old"], 16)
            if old == 8 and not self.fault_told:
                # An exception while #DF is delivered: the CPU shuts down; "Triple fault" is only printed with -d cpu_reset.
                self._shutdown(-1, 0)
            else:
                self.causes.check(old, int(match["new"], 16), self.causes.heads)
        elif match["serviced"] is not None:
            vector = int(match["serviced"], 16)
            self.causes.service(vector, self.requests.serviced(vector, match["virtual"] is not None), self.causes.heads)
        elif match["tail"] is not None:
            self.dumps.tail(match["cr2"])
        elif match["reset"] is not None:
            self.fault_told = False
            self._note(Note.RESET, int(match["reset"]), 0)
        elif match["smm"] is not None:
            self._note(Note.SMI if match["smm"] == b"enter" else Note.RSM, -1, 0)
        elif match["mcip"] is not None:
            self._shutdown(int(match["mcip"]), 1)
        elif match["triple"] is not None:
            if not self.fault_told:
                self._shutdown(-1, 0)
        elif match["plugin"] is not None:
            self._plugin(match["plugin"])

    def _note(self, note: Note, a: int, b: int) -> None:
        self.dumps.put(Other(note, a, b, self.stamps.time))

    def _shutdown(self, cpu: int, why: int) -> None:
        self.fault_told = True
        self._note(Note.SHUTDOWN, cpu, why)

    def _plugin(self, text: bytes) -> None:
        if frame := patterns.FRAME.match(text):
            groups = frame.groups()
            self.dumps.put(Plugin(int(groups[0]), b"iret-frame", groups[1:]))
        elif match := patterns.PLUGIN.match(b"PLG " + text + b"\n"):
            self.dumps.put(Plugin(int(match[1]), match[2], match.groups()[2:]))
        else:
            self.counts["plugin_unread"] += 1

    def _head(self, text: bytes, torn: bool) -> None:
        match = patterns.HEAD.match(text)
        assert match is not None
        number, v, e, soft, cs, ip, _, ss, sp = match.groups()
        if torn and self.dumps.waiting:
            self.dumps.mark_torn()
        self.causes.heads += 1
        self.fault_told = False
        vector = int(v, 16)
        old, serviced, cause = self.causes.resolve(vector, soft == b"1")
        attempt = Attempt(
            int(number), vector, int(e, 16), soft == b"1", int(cs, 16), int(ip, 16), int(ss, 16), int(sp, 16),
            -1, -1, b"", b"", b"", False, old, serviced, False, self.stamps.time,
        )  # fmt: skip
        self.dumps.head(attempt, cause)
