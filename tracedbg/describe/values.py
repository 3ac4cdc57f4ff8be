"""The words of an overwritten frame, before and after."""

from __future__ import annotations

from dataclasses import dataclass

from tracedbg import x86
from tracedbg.describe.names import MASK, Names, saved_word, slot_number
from tracedbg.state import Event, EventFlag, Finding, Frame, Kind, Known

MAX_STORE = 4096  # bytes of a store; the core refuses longer ones


@dataclass(frozen=True, slots=True)
class BytesRow:
    """A slot of an overwritten frame: what its own delivery stored and what is there now. None: unknown."""

    addr: int
    slot: str
    own: int | None
    now: int | None
    overwritten: bool
    differs: bool


class ValueWords(Names):
    """Says which values were overwritten by which."""

    def bytes_rows(self, finding: Finding) -> tuple[BytesRow, ...]:
        """The slots of the victim by ascending address: what it stored, and what the writer left there.

        The zero and event data words of FRED have no slot and no row.
        """
        victim = finding.victim
        if victim is None:
            return ()
        own = victim.saved.slots()
        rows = []
        for addr in range(victim.lo, victim.hi, 8):
            number = slot_number(victim, addr)
            if number is None:
                continue
            hit = bool(finding.slots >> number & 1)
            now = self._now(finding, addr, own[number]) if hit else own[number]
            rows.append(BytesRow(addr, x86.SLOT_NAMES[number], own[number], now, hit, bool(finding.differ >> number & 1)))
        return tuple(rows)

    def _now(self, finding: Finding, addr: int, own: int | None) -> int | None:
        """What the writer left at the address of a slot: a delivery its words, a store its bytes among the frame's own."""
        if finding.writer is not None:
            return _word_of(finding.writer, finding.victim, addr)
        event = self.event(finding.event)
        data = self._stored(event) if event is not None and event.kind is Kind.WRITE else None
        if event is None or data is None:
            return None
        word = None if own is None else bytearray(own.to_bytes(8, "little"))
        lo, hi = max(addr, event.addr), min(addr + 8, event.addr + len(data))
        if hi - lo == 8:
            word = bytearray(8)
        if word is None or lo >= hi:
            return None
        word[lo - addr : hi - addr] = data[lo - event.addr : hi - event.addr]
        return int.from_bytes(word, "little")

    def _stored(self, event: Event) -> bytes | None:
        """The bytes of a store, None where they are not recorded."""
        if not event.known & Known.ADDR:
            return None
        if event.flags & EventFlag.BYTES:
            return bytes(self.trace.payload[event.value : event.value + min(event.code, MAX_STORE)])
        return event.value.to_bytes(8, "little")[: event.arg] if event.known & Known.VALUE else None


def _word_of(writer: Frame, victim: Frame | None, addr: int) -> int | None:
    """The word that the writer's delivery stored; where FRED stores more than the selector, both have to be of FRED."""
    word = saved_word(writer, addr)
    number = slot_number(writer, addr)
    if word is None:
        return None
    if number is not None and word[1] != MASK:
        alike = victim is not None and victim.fred and slot_number(victim, addr) == number
        return writer.saved.slots()[number] if alike else None
    return word[0]
