"""Packets of Intel PT, written by hand for tests: the layout of the SDM, volume 3C, chapter "Intel Processor Trace"."""

from __future__ import annotations

PAD = b"\x00"
PSB = b"\x02\x82" * 8
PSBEND = b"\x02\x23"
OVF = b"\x02\xf3"
STOP = b"\x02\x83"

_BYTES = {0: 0, 1: 2, 2: 4, 3: 6, 4: 6, 6: 8}


def _address(opcode: int, how: int, ip: int) -> bytes:
    return bytes([how << 5 | opcode]) + (ip & (1 << 8 * _BYTES[how]) - 1).to_bytes(_BYTES[how], "little")


def tip(ip: int = 0, how: int = 3) -> bytes:
    return _address(0x0D, how, ip)


def pge(ip: int = 0, how: int = 3) -> bytes:
    return _address(0x11, how, ip)


def pgd(ip: int = 0, how: int = 0) -> bytes:
    return _address(0x01, how, ip)


def fup(ip: int = 0, how: int = 3) -> bytes:
    return _address(0x1D, how, ip)


def tnt(*branches: int) -> bytes:
    """1 to 6 branches, the oldest first."""
    bits = 1
    for branch in branches:
        bits = bits << 1 | branch
    return bytes([bits << 1])


def mode(*, cs_l: bool = True, cs_d: bool = False, iflag: bool = False) -> bytes:
    return bytes([0x99, iflag << 2 | cs_d << 1 | cs_l])


def cfe(kind: int, vector: int = 0, *, ip: bool = False) -> bytes:
    return bytes([0x02, 0x13, ip << 7 | kind, vector])


def evd(kind: int, payload: int) -> bytes:
    return bytes([0x02, 0x53, kind]) + payload.to_bytes(8, "little")


def tsc(ticks: int) -> bytes:
    return b"\x19" + ticks.to_bytes(7, "little")


def tma(ctc: int, fast: int) -> bytes:
    return b"\x02\x73" + ctc.to_bytes(2, "little") + b"\x00" + fast.to_bytes(2, "little")


def mtc(ctc: int) -> bytes:
    return bytes([0x59, ctc])


def cyc(cycles: int) -> bytes:
    out, rest = [(cycles & 31) << 3 | 3], cycles >> 5
    if rest:
        out[0] |= 4
    while rest:
        out.append((rest & 127) << 1 | (rest > 127))
        rest >>= 7
    return bytes(out)


def cbr(ratio: int) -> bytes:
    return bytes([0x02, 0x03, ratio, 0])


def pip(cr3: int, *, nonroot: bool = False) -> bytes:
    return b"\x02\x43" + (cr3 >> 5 << 1 | nonroot).to_bytes(6, "little")


def psbp(ip: int | None = None, *, iflag: bool = False) -> bytes:
    """A PSB+ with a status of its own."""
    return PSB + (fup(ip) if ip is not None else b"") + mode(iflag=iflag) + PSBEND
