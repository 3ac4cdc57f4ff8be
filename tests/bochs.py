"""Recordings of a CPU model (Bochs): `events.jsonl` and `layout.json` of a scenario as a native trace.

What the files hold is described in tests/data/README.md. Nothing is computed here that the recording says: a delivery
carries the interrupted context, an ENTER the state after it, a return the words that the CPU read.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from bochs_layout import FRED_WORDS, SLOT_OFFSETS, Record, TssMemory, layout_of, length, number

from tracedbg import x86
from tracedbg.errors import FormatError
from tracedbg.state import EventFlag, Kind, Return, Source
from tracedbg.trace import Trace
from tracedbg.writer import TraceWriter, build

U32 = (1 << 32) - 1
CR4_FRED = 1 << 32
CR4_MCE = 1 << 6
MSR_GS_BASE = 0xC0000101
RETURNS = {"iretq": Return.IRET, "erets": Return.ERETS, "eretu": Return.ERETU}
LENGTHS = {"soft": 2, "soft_exc": 1, "priv_soft": 1, "other": 2}  # INT n, INT3 and INTO, INT1, SYSCALL: bytes without prefixes
INJECT_NMI, INJECT_MC, INJECT_SMI = 1, 2, 3


@dataclass
class Scenario:
    """One recorded run. `index` maps an event number of the recording to that of the trace's event made of it."""

    name: str
    records: list[Record]
    layout: Record
    truth: Record
    trace: Trace
    index: dict[int, int]
    entered: dict[int, int]  # deliver_begin -> its ENTER
    ist: dict[int, int]  # deliver_begin -> IST number of its gate at that time
    by_number: dict[int, Record] = field(default_factory=dict)

    @property
    def cpus(self) -> int:
        return int(self.layout["cpus"])


def load(folder: Path) -> Scenario:
    """Read a scenario. Raises FormatError with the file and the offset of the line."""
    records = list(_lines(folder / "events.jsonl"))
    layout = _json(folder / "layout.json")
    truth = _json(folder / "truth.json")
    path = str(folder / "events.jsonl")
    try:
        reader = _Reader(records, layout)
        trace = build(reader.fill, name=path, cpus=int(layout["cpus"]))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, struct.error) as error:
        raise FormatError(path, f"not a recording of this kind: {type(error).__name__} {error}") from None
    numbers = {int(r["n"]): r for r in records}
    return Scenario(folder.name, records, layout, truth, trace, reader.index, reader.entered, reader.ist, numbers)


def _lines(path: Path) -> Iterator[Record]:
    offset = 0
    for line in path.read_bytes().splitlines(keepends=True):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise FormatError(str(path), f"not JSON: {error}", offset) from None
            if not isinstance(record, dict) or not {"n", "e", "cpu"} <= record.keys():
                raise FormatError(str(path), "no event of a recording", offset)
            yield record
        offset += len(line)


def _json(path: Path) -> Record:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise FormatError(str(path), error.strerror or "cannot be read") from None
    except ValueError as error:
        raise FormatError(str(path), f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(str(path), "not an object")
    return value


# -- events --------------------------------------------------------------------------------------------------------------


class _Reader:
    """Writes the events of a recording, in its order; a delivery and a return stand where they begin."""

    def __init__(self, records: list[Record], data: Record) -> None:
        self.records = records
        self.layout = layout_of(data, records)
        self.index: dict[int, int] = {}
        self.entered: dict[int, int] = {}
        self.ist: dict[int, int] = {}
        self.ends = {r["of"]: r for r in records if r["e"] in ("deliver_end", "deliver_abort")}
        self.insn_begins = {r["n"]: r for r in records if r["e"] == "insn_begin"}
        self.insn_ends = {r["begin"]: r for r in records if r["e"] == "insn_end"}
        self.parts: dict[int, list[Record]] = {}  # accesses of a delivery or a recorded instruction
        for r in records:
            owner = r.get("in", r.get("ininsn"))
            if owner is not None:
                self.parts.setdefault(owner, []).append(r)
        self.fred = {n: c.fred.on for n, c in enumerate(self.layout.cpus) if c.fred is not None}
        self.base = {n: self.layout.tss[c.tss].base for n, c in enumerate(self.layout.cpus) if c.tss is not None}
        self.tss = TssMemory(self.layout.tss)
        self.gates = dict(self.layout.idts[0].gates)
        self.unsaid: dict[int, set[int]] = {}  # slots of a TSS that changed while no CPU used it
        self.last_access: Record | None = None  # the last `x` that no TOKEN was made of
        self.tokens = self._token_places()
        self.cr2: dict[int, int] = {}
        self.pending: dict[int, bool] = {}
        self.raised: set[int] = set()  # CPUs whose pending NMI a RAISE has told already
        self.blocked: dict[int, bool] = {}
        self.smm: dict[int, bool] = {}  # CPUs in SMM; whether an IRET ran there
        self.before_smi: dict[int, bool] = {}
        self.restored: set[int] = set()  # CPUs whose RSM has just restored NMI blocking, by the manual
        self.down: set[int] = set()

    def _token_places(self) -> dict[int, tuple[int, int]]:
        """Address of each shadow-stack token that a delivery takes -> CPU and IST number; the table of them is not recorded."""
        places: dict[int, tuple[int, int]] = {}
        for r in self.records:
            if r["e"] == "deliver_begin":
                gate = self.layout.idts[0].gates.get(r["vec"])
                for old, _ in _pairs([p for p in self.parts.get(r["n"], ()) if p["e"] == "x"]):
                    if gate is not None and gate.ist:
                        places.setdefault(number(old["lin"]), (r["cpu"], gate.ist))
        return places

    def fill(self, writer: TraceWriter) -> None:
        """Write layout and events."""
        self.writer = writer
        writer.layout = self.layout
        writer.meta = {"source": {"format": "bochs"}}
        for record in self.records:
            method = getattr(self, "_" + record["e"], None)
            if method is not None:
                method(record)

    def _event(self, record: Record, kind: Kind, flags: int = 0, /, **fields: int | None) -> int:
        """An event at a record; a field that is None is not known."""
        if record["cpu"] in self.smm:
            flags |= EventFlag.SMM
        known = {name: value for name, value in fields.items() if value is not None}
        if "rflags" in known:
            known["rflags"] &= U32
        return self.writer.event(kind, flags=flags, time=record["tick"], source_index=record["n"], cpu=record["cpu"], **known)

    def _context(self, block: Record) -> dict[str, int | None]:
        return {name: number(block[name]) for name in ("rip", "rsp", "cs", "ss", "rflags")}

    def _seen(self, record: Record, block: Record, nmi: bool = False) -> None:
        """What a register block says of NMIs: an NMI that became pending, and at first that they are not blocked.

        The block before an NMI's delivery says "not blocked" by definition, so it says nothing.
        """
        cpu = record["cpu"]
        blocked, pending = bool(block["nmi_blocked"]), bool(block["nmi_pending"])
        if cpu not in self.blocked and not blocked and not nmi:
            self._event(record, Kind.UNBLOCK, arg=0)
        if cpu in self.restored:
            self.restored.discard(cpu)
            if nmi or not blocked:
                self._event(record, Kind.UNBLOCK, arg=0)
        if pending and not self.pending.get(cpu):
            if cpu not in self.raised:
                self._event(record, Kind.RAISE, arg=x86.NMI, source=Source.NMI)
            self.raised.discard(cpu)
        self.pending[cpu] = pending
        if not nmi:
            self.blocked[cpu] = blocked

    # -- start, end, marks

    def _start(self, record: Record) -> None:
        self._seen(record, record["st"])

    def _mark(self, record: Record) -> None:
        self._seen(record, record["st"])
        self.index[record["n"]] = self._event(record, Kind.MARK, value=record["v"])

    def _end(self, record: Record) -> None:
        if record["why"] == "shutdown":
            self._shutdown(record)

    def _shutdown(self, record: Record) -> None:
        if record["cpu"] not in self.down:  # Bochs shuts down for nothing but a triple fault
            self.down.add(record["cpu"])
            self.index[record["n"]] = self._event(record, Kind.SHUTDOWN, arg=0)

    def _exception(self, record: Record) -> None:
        self.cr2[record["cpu"]] = number(record["cr2"])

    def _inject(self, record: Record) -> None:
        self._seen(record, record["st"])
        kind = record["kind"]
        if kind == INJECT_NMI:
            self.raised.add(record["cpu"])
            self._event(record, Kind.RAISE, arg=x86.NMI, source=Source.NMI)
        elif kind == INJECT_MC:
            self._event(record, Kind.RAISE, arg=x86.MACHINE_CHECK, source=Source.MC)
        elif kind == INJECT_SMI:
            self.before_smi[record["cpu"]] = self.blocked.get(record["cpu"], False)
            self._event(record, Kind.SMI, **self._context(record["st"]))
            self.smm[record["cpu"]] = False

    # -- deliveries

    def _deliver_begin(self, record: Record) -> None:
        cpu, number_of = record["cpu"], record["n"]
        nmi = record["type"] == "nmi"
        self._seen(record, record["before"], nmi)
        if nmi:
            self.raised.discard(cpu)
        end = self.ends.get(number_of)
        stores = [p for p in self.parts.get(number_of, ()) if p["e"] == "w"]
        done = end is not None and end["e"] == "deliver_end"
        if cpu in self.fred and done and stores and self.fred[cpu] != (len(stores) == FRED_WORDS):
            self.fred[cpu] = not self.fred[cpu]
            # the write to CR4 is not recorded; MCE is taken to be set, as this model never shuts down for an #MC
            self._event(record, Kind.CR, arg=4, value=CR4_MCE | (CR4_FRED if self.fred[cpu] else 0))
        for p in self.parts.get(number_of, ()):
            if p["e"] == "r":  # a pointer that is not the known one was changed unseen
                self._tss_slots(p, self.tss.read(p))
        if done and not self.fred.get(cpu):
            self._gate(record, self.ends[number_of])
        gate = self.gates.get(record["vec"])
        self.ist[number_of] = gate.ist if gate is not None else 0
        fields = self._context(record["before"])
        vector = fields["arg"] = int(record["vec"])
        source = fields["source"] = _source(record)
        if record["type"] in LENGTHS:  # the frame holds the address after the instruction
            fields["code"] = code = _instruction_length(record, stores)
            fields["rip"] = number(record["before"]["rip"]) - code
        elif record["push_err"]:
            fields["code"] = int(record["err"])
        if source == Source.EXCEPTION and vector == x86.PAGE_FAULT:
            fields["value"] = self.cr2.get(cpu)
        elif self.fred.get(cpu) and len(stores) > 1:  # the event data has no other place in the recording
            fields["value"] = number(sorted(stores, key=lambda s: number(s["lin"]))[-2]["val"])
        if not done:  # its handler never began; what it stored did happen
            fields["addr"] = len(stores)
        self.index[number_of] = self._event(record, Kind.DELIVER, 0 if done else EventFlag.FAILED, **fields)
        if not done:
            self._tokens(number_of)

    def _deliver_end(self, record: Record) -> None:
        self.entered[record["of"]] = self._event(record, Kind.ENTER, **self._context(record["after"]))
        self._tokens(record["of"])
        self._seen(record, record["after"])

    def _gate(self, record: Record, end: Record) -> None:
        """A gate that is not the known one, by where the handler began and which pointer was read: it was changed unseen."""
        vector, old = int(record["vec"]), self.gates.get(record["vec"])
        if old is None:
            return
        base = self.base.get(record["cpu"], 0)
        reads = {number(p["lin"]) - base for p in self.parts.get(record["n"], ()) if p["e"] == "r"}
        read = [slot for slot, offset in SLOT_OFFSETS.items() if offset in reads]
        ist = max(read[0] - 8, 0) if read else old.ist
        new = replace(old, offset=number(end["after"]["rip"]), ist=ist)
        if new != old:
            self.gates[vector] = new
            code = new.ist | new.type << 8 | new.dpl << 13 | 1 << 15
            self._event(record, Kind.GATE, arg=vector, value=new.offset, cs=new.selector, code=code)

    # -- memory

    def _w(self, record: Record) -> None:
        if "in" not in record:
            self.index[record["n"]] = self._write(record, known=True)
            self._tss_slots(record, self.tss.write(record))
            if number(record["lin"]) in self.tokens and length(record) == 8:
                self._token(record, None, number(record["val"]))

    def _rw(self, record: Record) -> None:
        """A read-modify-write: its `val` is the old value, the new one is not recorded."""
        if "in" not in record:
            self._r(record)
            self._write(record, known=False)
            self._tss_slots(record, self.tss.write(record))

    def _write(self, record: Record, known: bool) -> int:
        size, at = length(record), number(record["lin"])
        value = number(record["val"]) if known else None
        fields: dict[str, int | None] = {"rip": number(record["rip"]), "addr": at}
        if size <= 8:
            return self._event(record, Kind.WRITE, arg=size, value=value, **fields)
        if value is not None and size > 8 and value < 1 << 64 and len(str(record["val"])) <= 18:
            value = None  # only the first 8 bytes fit into the recording
        if value is not None:
            value = self.writer.payload(value.to_bytes(size, "little"))
        return self._event(record, Kind.WRITE, EventFlag.BYTES, code=size, value=value, **fields)

    def _r(self, record: Record) -> None:
        if "in" in record or "ininsn" in record:
            return
        size = length(record)
        fields: dict[str, int | None] = {"rip": number(record["rip"]), "addr": number(record["lin"])}
        if size <= 8:
            index = self._event(record, Kind.READ, arg=size, value=number(record["val"]), **fields)
        else:
            index = self._event(record, Kind.READ, EventFlag.BYTES, code=size, **fields)
        self.index[record["n"]] = index

    # -- the TSS

    def _tss_slots(self, record: Record, changed: list[tuple[int, int]]) -> None:
        """Tell changed pointers; those of a TSS that no CPU uses yet when one loads it."""
        for base, slot in changed:
            user = next((cpu for cpu, used in self.base.items() if used == base), None)
            if user is None:
                self.unsaid.setdefault(base, set()).add(slot)
            else:
                self._event({**record, "cpu": user}, Kind.TSS, arg=slot, value=self.tss.slots[base][slot])

    def _tr(self, record: Record) -> None:
        base = number(record["base"])
        self.base[record["cpu"]] = base
        self.index[record["n"]] = self._event(record, Kind.LTR, value=base)
        self._tss_slots(record, [(base, slot) for slot in sorted(self.unsaid.pop(base, ()))])

    # -- shadow stacks

    def _tokens(self, owner: int) -> None:
        for old, new in _pairs([p for p in self.parts.get(owner, ()) if p["e"] == "x"]):
            self._token(old, number(old["val"]), number(new["val"]))

    def _token(self, record: Record, old: int | None, new: int) -> None:
        at = number(record["lin"])
        cpu, ist = self.tokens.get(at, (record["cpu"], 0))
        code = None if old is None else old & U32
        self._event({**record, "cpu": cpu}, Kind.TOKEN, arg=ist, addr=at, code=code, value=new)

    def _x(self, record: Record) -> None:
        """Outside deliveries and recorded instructions (SETSSBSY, CLRSSBSY): the second access of a token."""
        if "in" in record or "ininsn" in record:
            return
        last = self.last_access
        pairs = _pairs([last, record]) if last is not None and last["n"] == record["n"] - 1 else []
        self.last_access = None if pairs else record
        for old, new in pairs:
            self._token(old, number(old["val"]), number(new["val"]))

    # -- instructions

    def _insn_begin(self, record: Record) -> None:
        self._seen(record, record["before"])
        end = self.insn_ends.get(record["n"])
        faulted = end is None or bool(end["faulted"])
        op = record["op"]
        if op in RETURNS:
            self._return(record, end, faulted)
        elif op == "rsm" and end is None:
            self._rsm(record)
        elif op == "sysret" and faulted:  # at CPL0 with user mode's RSP (R31)
            context = self._context(record["before"])
            self.index[record["n"]] = self._event(record, Kind.SYSRET, EventFlag.FAULTED, **context)
        elif op in ("syscall", "sysret") and end is not None and not faulted and not self._is_event(record):
            kind = Kind.SYSCALL if op == "syscall" else Kind.SYSRET
            addr = number(end["after"]["rip"])
            self.index[record["n"]] = self._event(record, kind, addr=addr, **self._context(record["before"]))

    def _is_event(self, record: Record) -> bool:
        """With FRED a SYSCALL is delivered as an event; its deliver_begin stands for it."""
        return record["op"] == "syscall" and bool(self.fred.get(record["cpu"]))

    def _return(self, record: Record, end: Record | None, faulted: bool) -> None:
        before, how = record["before"], RETURNS[record["op"]]
        frame = number(before["rsp"])
        fields: dict[str, int | None] = {"arg": how, "rip": number(before["rip"]), "rsp": frame}
        read = {number(p["lin"]): number(p["val"]) for p in self.parts.get(record["n"], ()) if p["e"] == "r" and length(p) == 8}
        first = frame if how is Return.IRET else frame + 8
        words = [read.get(first + 8 * n) for n in range(5)]
        if end is not None and not faulted and None in words:  # a stack outside the logged regions: what came of it
            after = self._context(end["after"])
            words = [w if w is not None else after[name] for w, name in zip(words, _POPPED, strict=True)]
        rip, cs, rflags, rsp, ss = words
        fields |= {"addr": rip, "rflags": rflags, "value": rsp}
        fields["cs"] = None if cs is None else cs & 0xFFFF
        fields["ss"] = None if ss is None else ss & 0xFFFF
        if how is not Return.IRET:
            at = first + 32
            fields["code"] = read[at] >> 16 & U32 if at in read else None
        if record["cpu"] in self.smm and how is Return.IRET:
            self.smm[record["cpu"]] = True
        self.index[record["n"]] = self._event(record, Kind.RETURN, EventFlag.FAULTED if faulted else 0, **fields)
        self._tokens(record["n"])

    def _insn_end(self, record: Record) -> None:
        if not record["faulted"]:
            self._effect(record, self.insn_begins[record["begin"]])
        self._seen(record, record["after"])

    def _effect(self, record: Record, begin: Record) -> None:
        op, after = record["op"], record["after"]
        number_of = begin["n"]
        if op in ("sti", "cli", "popfq"):
            self.index[number_of] = self._event(record, Kind.FLAGS, rflags=number(after["rflags"]))
            raised = number(after["rflags"]) & ~number(begin["before"]["rflags"]) & x86.RFLAGS_IF
            if op == "sti" and raised:
                self._event(record, Kind.SHADOW, arg=0, rip=number(after["rip"]))
        elif op == "wrmsr":
            msr = number(begin["msr"]) & U32
            self.index[number_of] = self._event(record, Kind.MSR, code=msr, value=number(begin["val"]))
            if msr == MSR_GS_BASE:
                self._event(record, Kind.GS, arg=1, value=number(begin["val"]))
        elif op == "swapgs":
            self.index[number_of] = self._event(record, Kind.GS, arg=0)
        elif op == "lidt":  # the recording knows one IDT
            self.index[number_of] = self._event(record, Kind.LIDT, value=self.layout.idts[0].base)
        elif op == "rsm":
            self._rsm(begin)

    def _rsm(self, begin: Record) -> None:
        """Bochs unblocks NMIs at every RSM (cpu/smm.cc), SDM Vol. 3C 34.8 restores the blocking: the next block tells."""
        iret = self.smm.pop(begin["cpu"], False)
        self.index[begin["n"]] = self._event(begin, Kind.RSM)
        if self.before_smi.pop(begin["cpu"], True) and not iret:
            self.restored.add(begin["cpu"])


_POPPED = ("rip", "cs", "rflags", "rsp", "ss")


def _pairs(accesses: list[Record]) -> list[tuple[Record, Record]]:
    """Atomic accesses to tokens: two records in a row of one address, what it held and what it holds.

    A token holds its own address and the busy bit (SDM Vol. 1 17.2.3); a pushed word never does.
    """
    pairs, at = [], 0
    while at + 1 < len(accesses):
        old, new = accesses[at : at + 2]
        if old["lin"] == new["lin"] and number(new["val"]) & ~7 == number(new["lin"]):
            pairs.append((old, new))
            at += 1
        at += 1
    return pairs


def _source(record: Record) -> Source:
    match record["type"]:
        case "nmi":
            return Source.NMI
        case "intr":
            return Source.EXTERNAL  # by the local APIC or the 8259: the recording does not tell
        case "soft" | "soft_exc" | "priv_soft":
            return Source.SOFT_INT
        case "other":
            return Source.SYSCALL
        case "exc" if record["vec"] == x86.MACHINE_CHECK:  # Bochs has no #MC: it was injected
            return Source.MC
        case "exc":
            return Source.EXCEPTION
    raise ValueError(f"delivery of type {record['type']!r}")


def _instruction_length(record: Record, stores: list[Record]) -> int:
    """Bytes of an INT n or SYSCALL: from its own address (that of its stores) to the saved one."""
    saved = number(record["before"]["rip"])
    sizes = {saved - number(s["rip"]) for s in stores}
    return sizes.pop() if len(sizes) == 1 and min(sizes) in range(1, 16) else LENGTHS[record["type"]]
