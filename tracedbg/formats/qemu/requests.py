"""Who asked for an interrupt: QEMU's trace events apic_* and pic_*, where the log has them (`-d int,trace:apic_*,trace:pic_*`).

Facts from hw/intc/trace-events, apic.c and i8259.c of QEMU. A `v=` line with a Servicing line before it is an interrupt of the
LAPIC or the 8259; nothing in `-d int` says of which. `pic_interrupt` is printed when the CPU acknowledges the 8259, just before
the Servicing line. A request of the LAPIC is one of: a write of the ICR, a message of the I/O APIC or MSI (`apic_deliver_irq`),
a local interrupt (`apic_local_deliver`, whose line has the number of the LVT entry, and stands there even if the entry is
masked: its vector is known if its LVT entry was seen written). Lines of all CPUs are taken together: which CPU a request goes
to is not in them.
"""

from __future__ import annotations

import re
from collections import Counter

_LINE = re.compile(
    rb"apic_local_deliver vector (?P<lvt>[0-5]) delivery mode (?P<mode>[0-7])"
    rb"|apic_deliver_irq dest [0-9]{1,10} dest_mode [0-9]{1,3} delivery_mode (?P<dm>[0-7]) vector (?P<vector>[0-9]{1,3}) "
    rb"|apic_mem_writel 0x(?P<offset>300|3[2-7]0) = 0x(?P<value>[0-9a-f]{8})"
    rb"|apic_register_write register 0x(?P<register>30|3[2-7]) = 0x(?P<word>[0-9a-f]{1,16})"
    rb"|pic_interrupt irq [0-9]{1,2} intno (?P<pic>[0-9]{1,3})"
)
_EXTERNAL, _FIXED, _EXTINT, _INJECTED = 8, 5, 6, 7  # Source; plain numbers, as in records
_LOWEST, _NMI, _EXT = 1, 4, 7  # delivery modes beside fixed (0)
_LINT1 = 4
_LVT = {0x32: 0, 0x33: 1, 0x34: 2, 0x35: 3, 0x36: 4, 0x37: 5}  # register -> number in apic_local_deliver
KEEP = 8  # acknowledged vectors of the 8259 that wait for their Servicing line


class Requests:
    """What the trace lines tell. `served[v]`: the source to name for a Servicing line of vector v, as long as `calm`."""

    def __init__(self) -> None:
        self.served = bytearray([_EXTERNAL]) * 256
        self.asked: Counter[str] = Counter()  # requests for NMIs, by way
        self.told = False  # a Servicing line was told to be of the LAPIC or the 8259
        self._fixed: set[int] = set()  # vectors that the LAPIC was asked for
        self._lvt: dict[int, set[int]] = {}  # vectors that an entry of any CPU's LVT had
        self._pic: list[int] = []  # acknowledged, the Servicing line has not come
        self._pic_traced = False
        self._ext = False  # the 8259 asked, and what the CPU took is not known

    @property
    def calm(self) -> bool:
        """Whether the next Servicing line needs nothing but `served`."""
        return not self._pic and not self._ext

    def line(self, text: bytes) -> None:
        """A line of a trace event, without its stamp."""
        match = _LINE.match(text)
        if match is None:
            return
        if match["pic"] is not None:
            self._acknowledged(int(match["pic"]))
        elif match["lvt"] is not None:
            self._local(int(match["lvt"]), int(match["mode"]))
        elif match["dm"] is not None:
            self._request(int(match["dm"]), int(match["vector"]), "message")
        else:
            register = int(match["offset"], 16) >> 4 if match["offset"] else int(match["register"], 16)
            value = int(match["value"] or match["word"], 16)
            if register == 0x30:
                self._request(value >> 8 & 7, value & 0xFF, "ipi")
            elif value >> 8 & 7 == 0:
                self._lvt.setdefault(_LVT[register], set()).add(value & 0xFF)

    def serviced(self, vector: int, virtual: bool) -> int:
        """The source of a Servicing line (`virtual`: of a virtual interrupt, by a hypervisor in the guest)."""
        if virtual:
            return _INJECTED
        if vector in self._pic:
            self._pic.remove(vector)
            self._ext, self.told = False, True
            return _EXTINT
        if self._ext:
            # The 8259's vectors are not in the lines of the LAPIC: one that the LAPIC was not asked for is the 8259's.
            self._ext = vector in self._fixed
            return _EXTERNAL
        source = self.served[vector]
        self.told = self.told or source != _EXTERNAL
        return source

    def _acknowledged(self, vector: int) -> None:
        if not self._pic_traced:
            # The 8259's acknowledgements are traced: what is serviced without one is the LAPIC's.
            self._pic_traced = True
            self.served[:] = bytes([_FIXED]) * 256
        self._ext = False
        self._pic.append(vector & 0xFF)
        del self._pic[:-KEEP]

    def _local(self, entry: int, mode: int) -> None:
        if mode == _NMI:
            self.asked["lint1" if entry == _LINT1 else "lvt"] += 1
        elif mode == _EXT:
            self._ext = not self._pic_traced
        elif mode == 0:
            for vector in self._lvt.get(entry, ()):
                self._ask(vector)

    def _request(self, mode: int, vector: int, way: str) -> None:
        if mode == _NMI:
            self.asked[way] += 1
        elif mode in (0, _LOWEST):
            self._ask(vector & 0xFF)

    def _ask(self, vector: int) -> None:
        self._fixed.add(vector)
        self.served[vector] = _FIXED
