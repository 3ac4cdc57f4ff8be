"""What was found of the stacks as events of a native trace, outermost first, and in words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Sequence

from tracedbg import x86
from tracedbg.formats.vmcore.notes import Cpu
from tracedbg.formats.vmcore.stacks import FRAME, Link, Saved, Stacks, Top, ist_name
from tracedbg.layout import Idt
from tracedbg.state import EventFlag, Kind, Source
from tracedbg.writer import TraceWriter

STUB = 16  # bytes: RIP within so many of a gate's handler, and of no other, is in that handler


class Events:
    """Writes the events of one CPU after the other. `unknown`: overwrites that no event can say."""

    def __init__(self, writer: TraceWriter) -> None:
        self.unknown = 0
        self._writer = writer

    def cpu(self, stacks: Stacks, idt: Idt, shared: Container[int]) -> None:
        """The deliveries that must have been, and the registers as dumped. `shared`: tops that several CPUs run on."""
        cpu, chain = stacks.cpu.number, stacks.chain
        if stacks.stops:
            self.mark(cpu, stacks.stops)
        for link in reversed(chain):
            vector = None if link.top.hi in shared else _vector(stacks, link, idt)
            if link.frame is None and vector is None:
                self.unknown += 1
            self._deliver(cpu, link, vector)
            if vector is None:
                continue
            place = link.top.hi - FRAME
            if link.copy is not None:
                self._writer.event(Kind.MOVE, cpu=cpu, addr=place, value=link.copy)
            if link.left and link.frame is not None:
                self._return(cpu, link.frame)
        self.mark(cpu, "the dump")
        now = stacks.cpu
        self._writer.event(Kind.ENTER, cpu=cpu, rip=now.rip, rsp=now.rsp, rflags=now.rflags, cs=now.cs, ss=now.ss)

    def gap(self, cpu: int) -> None:
        """Of this CPU nothing can be said."""
        self._writer.event(Kind.GAP, cpu=cpu)

    def mark(self, cpu: int, text: str) -> None:
        """A note."""
        data = text.encode()
        at = self._writer.payload(data)
        self._writer.event(Kind.MARK, cpu=cpu, value=at, code=len(data), flags=EventFlag.BYTES)

    def _deliver(self, cpu: int, link: Link, vector: int | None) -> None:
        fields: dict[str, int] = {"cpu": cpu}
        if vector is not None:
            fields["arg"] = vector
            if vector == x86.DOUBLE_FAULT:  # its error code is 0 (SDM Vol. 3A 6.15)
                fields |= {"source": Source.EXCEPTION, "code": 0}
            elif vector in x86.ERROR_CODE_VECTORS:
                if link.frame is None or link.top.code is None:
                    fields["source"] = Source.EXCEPTION
                else:
                    fields["code"] = link.top.code & 0xFFFFFFFF
        saved = link.frame
        if saved is not None:
            fields |= {"rip": saved.rip, "cs": saved.cs, "rflags": saved.rflags, "rsp": saved.rsp, "ss": saved.ss}
        self._writer.event(Kind.DELIVER, **fields)
        if saved is not None and vector is not None and not link.older:
            self._upper_halves(cpu, saved)

    def _upper_halves(self, cpu: int, saved: Saved) -> None:
        """What software stored above CS and RFLAGS, so that memory is as dumped."""
        for slot, value in ((1, saved.cs), (2, saved.rflags)):
            word = int.from_bytes(saved.raw[8 * slot : 8 * slot + 8], "little")
            if word != value:
                self._writer.event(Kind.WRITE, cpu=cpu, addr=saved.at + 8 * slot, arg=8, value=word)

    def _return(self, cpu: int, saved: Saved) -> None:
        self._writer.event(
            Kind.RETURN, cpu=cpu, arg=0, rsp=saved.at, addr=saved.rip, cs=saved.cs, rflags=saved.rflags, value=saved.rsp,
            ss=saved.ss,
        )  # fmt: skip


def _vector(stacks: Stacks, link: Link, idt: Idt) -> int | None:
    """Whose frame it is, where that is known."""
    vectors = link.top.vectors
    if len(vectors) == 1:
        return vectors[0]
    if link.place is None and stacks.chain[0] is link:  # its handler is what runs
        return running(stacks.cpu, vectors, idt)
    return None


def running(cpu: Cpu, vectors: Sequence[int], idt: Idt) -> int | None:
    """The one of these vectors at the begin of whose handler the CPU is."""
    near = [v for v, gate in idt.gates.items() if gate.present and 0 <= cpu.rip - gate.offset < STUB]
    if not near:
        return None
    last = max(idt.gates[v].offset for v in near)
    found = [v for v in near if idt.gates[v].offset == last]
    return found[0] if len(found) == 1 and found[0] in vectors else None


def contested(found: Sequence[Stacks]) -> dict[int, list[tuple[Stacks, Top]]]:
    """Tops that are live for more than one CPU: one of them overwrote the frame of another."""
    users: defaultdict[int, list[tuple[Stacks, Top]]] = defaultdict(list)
    for stacks in found:
        for link in stacks.chain:
            if not link.older and not link.left:
                users[link.top.hi].append((stacks, link.top))
    return {hi: of for hi, of in users.items() if len(of) > 1}


def words(stacks: Stacks) -> dict[str, str]:
    """What was found of one CPU: where it runs, and each IST stack."""
    cpu = stacks.cpu
    on = next((f" on {ist_name(top)}" for top in stacks.tops if top.holds(cpu.rsp)), "")
    order = " < ".join(f"IST{_slots(link.top)}" for link in stacks.chain)
    told = {"": f"RSP {cpu.rsp:#x}{on}" + (f"; newest frame first: {order}" if order else "") + f"; {stacks.stops}"}
    for top in stacks.tops:
        links = [link for link in stacks.chain if link.top is top]
        if links:
            text = "; before that ".join(_link_words(link) for link in links)
        elif top.frame is not None:
            text = f"stale frame at {top.frame.at:#x} {_saved_words(top.frame)}"
            if not top.frame.cs & 3 and top.lo < top.frame.rsp <= top.frame.at:
                text += ", which had overwritten an older one: it interrupted code on this stack"
        else:
            text = "no frame at its top" if top.physical is not None else "not mapped"
        told[ist_name(top)] = text + (f"; doubtful: {' and '.join(top.doubts)}" if top.doubts else "")
    return told


def _slots(top: Top) -> str:
    return "+".join(str(n) for n in top.slots)


def _link_words(link: Link) -> str:
    place = f"frame at {link.top.hi - FRAME:#x}"
    if link.frame is None:
        return f"{place}: live, overwritten, its words are not known"
    saved = _saved_words(link.frame)
    if link.older:
        return f"{place} {saved}: overwritten, a copy is at {link.copy or 0:#x}"
    how = "done, RSP is back on the stack that it interrupted" if link.left else "live"
    if link.place is not None and not link.left:
        how += f", its handler moved to another stack ({'copy' if link.copy == link.place else 'pointer'} at {link.place:#x})"
    return f"{place} {saved}: {how}"


def _saved_words(saved: Saved) -> str:
    return f"(rip {saved.rip:#x} rsp {saved.rsp:#x} cs {saved.cs:#x} ss {saved.ss:#x} rflags {saved.rflags:#x})"
