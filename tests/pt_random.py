"""Random streams of Intel PT with Event Trace and without branches, as a CPU sends them."""

from __future__ import annotations

import random

from perf_asm import EVENT, MTC, TSC, attr, aux, info, perf_data, record
from pt_asm import OVF, PAD, PSB, PSBEND, cbr, cfe, evd, fup, mode, mtc, tma, tsc

TSC0 = 1 << 40
PLAIN = (2, 3, 4, 5, 6, 7, 8, 10, 12, 13)  # IRET SMI RSM SIPI INIT VMENTRY VMEXIT SHUTDOWN UINTR UIRET
NO_IP = (4, 5)  # RSM, SIPI never have an address


class Source:
    """Writes one CPU's packets. `clock`: MTC packets, as a CTC of TSC / 84 gives them; `overflows`: some."""

    def __init__(self, r: random.Random, *, clock: bool = False, overflows: bool = False) -> None:
        self.r = r
        self.out = b""
        self.now = TSC0 + r.randrange(1 << 20)
        self.iflag = True
        self.clock = clock
        self.overflows = overflows
        self.ctc = self.now // 84 >> 3

    def ip(self) -> bytes:
        """A FUP; addresses are packed as far as they can be, for that they lie in one half or the other."""
        r = self.r
        if r.random() < 0.2:
            return fup(r.choice((0xFFFF_FFFF_8100_0000, 0x7F00_0000_0000)) + r.getrandbits(20))
        return fup(r.getrandbits(16), 1) if r.random() < 0.5 else fup(r.getrandbits(31), 2)

    def status(self) -> None:
        self.out += PSB + tsc(self.now)
        if self.clock:
            self.out += tma(self.now // 84 & 0xFFFF, self.now % 84)
            self.ctc = self.now // 84 >> 3
        self.out += cbr(20) + mode(iflag=self.iflag) + PSBEND
        self.out += cfe(2, ip=True) + fup(0xFFFF_FFFF_8100_0000)  # the first address is whole

    def event(self) -> None:
        r = self.r
        kind = r.choice((1, 1, 1, 2, 2, 9, *PLAIN))
        ip = kind not in NO_IP and r.random() < 0.7
        vector = 0
        if kind == 1:
            vector = r.choice((2, 14, 14, 18, 32, r.randrange(256)))
            if vector == 14 and r.random() < 0.9:
                self.out += evd(0, r.getrandbits(64))
        elif kind in (8, 9):
            if r.random() < 0.7:
                self.out += evd(1, r.getrandbits(32))
            self.out += evd(2, r.randrange(70))
        if kind in (5, 9, 12):
            vector = r.randrange(256)
        self.out += cfe(kind, vector, ip=ip)
        if ip:  # perf wants the FUP directly behind
            self.out += self.ip()

    def between(self) -> None:
        r = self.r
        if r.random() < 0.2:
            self.out += r.choice((PAD, PAD * 3))  # no CYC: perf estimates times by them

    def step(self) -> None:
        r = self.r
        what = r.random()
        self.now += r.randrange(1, 3000)
        while self.clock and self.now // 84 >> 3 > self.ctc:
            self.ctc += 1
            self.out += mtc(self.ctc & 0xFF)
        if what < 0.03:
            self.status()
        elif what < 0.7:
            self.event()
        elif what < 0.85:
            self.iflag = not self.iflag if r.random() < 0.8 else self.iflag
            self.out += mode(iflag=self.iflag) + self.ip()
        elif what < 0.9 and not self.clock:
            self.out += tsc(self.now)
        elif self.overflows and what < 0.92:
            self.out += OVF
            self.status()
        else:
            self.between()

    def stream(self, steps: int) -> bytes:
        self.status()
        for _ in range(steps):
            self.step()
        return self.out


def recording(seed: int, *, cpus: int = 2, steps: int = 400, clock: bool = False, overflows: bool = False) -> bytes:
    """A perf.data file with streams of that many CPUs."""
    r = random.Random(seed)
    config = EVENT | TSC | 1 | (MTC | 3 << 14 if clock else 0)
    records = [info(n=84 if clock else 0, d=1 if clock else 0)]
    for cpu in range(cpus):
        sample = b"\x01\0\0\0" * 2 + (TSC0 >> 2).to_bytes(8, "little") + cpu.to_bytes(8, "little") + b"\x07" + bytes(7)
        records.append(record(3, b"\x01\0\0\0" * 2 + b"init\0\0\0\0" + sample))  # COMM
        records.append(record(12, b"\x01\0\0\0" * 2 + sample))  # ITRACE_START
    for cpu in range(cpus):
        data = Source(r, clock=clock, overflows=overflows).stream(steps)
        records.append(aux(cpu, 0, data + bytes(-len(data) % 8), reference=TSC0 << 1))
    return perf_data(*records, attrs=(attr(config=config),))
