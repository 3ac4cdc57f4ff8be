"""A slow lexer for Intel PT packets, from the table of the packets alone: what the one in C is held against."""

from __future__ import annotations

from typing import NamedTuple

# First bytes, name, payload bytes behind them. A first byte is eight digits, 0, 1 or . for any.
TABLE = (
    ("00000000", "PAD", 0),
    ("...01101", "TIP", "ip"),
    ("...10001", "TIP_PGE", "ip"),
    ("...00001", "TIP_PGD", "ip"),
    ("...11101", "FUP", "ip"),
    ("10011001 000...0.", "MODE_EXEC", 0),  # CS.L, CS.D: not both
    ("10011001 000...01", "MODE_EXEC", 0),
    ("10011001 000...10", "MODE_EXEC", 0),
    ("10011001 001...0.", "MODE_TSX", 0),
    ("10011001 001...10", "MODE_TSX", 0),
    ("00011001", "TSC", 7),
    ("01011001", "MTC", 1),
    ("00000010 00000011", "CBR", 2),
    ("00000010 00010011", "CFE", 2),
    ("00000010 00100010", "PWRE", 2),
    ("00000010 00100011", "PSBEND", 0),
    ("00000010 .0110011", "BEP", 0),
    ("00000010 01000011", "PIP", 6),
    ("00000010 01010011", "EVD", 9),
    ("00000010 .1100010", "EXSTOP", 0),
    ("00000010 01100011", "BBP", 1),
    ("00000010 01110011 ........ ........ 00000000 ........ 0000000.", "TMA", 0),
    ("00000010 10000011", "STOP", 0),
    ("00000010 10100010", "PWRX", 5),
    ("00000010 11000010", "MWAIT", 8),
    ("00000010 11000011 10001000", "MNT", 8),
    ("00000010 11001000", "VMCS", 5),
    ("00000010 11110011", "OVF", 0),
    ("00000010 .0010010", "PTW", 4),
    ("00000010 .0110010", "PTW", 8),
    ("11011001 .0......", "TRIG", 1),
    ("11011001 .1......", "TRIG", 3),
    ("00000010 10000010 " * 7 + "00000010 10000010", "PSB", 0),
)
IP_BYTES = {0: 0, 1: 2, 2: 4, 3: 6, 4: 6, 6: 8}
KEEP_BLOCK = {"PAD", "TSC", "TMA", "MTC", "CYC", "CBR", "FUP", "MNT", "EXSTOP", "PWRE", "PWRX", "BIP"}


class Packet(NamedTuple):
    """`raw`: its bytes. The rest is what C says."""

    name: str
    raw: bytes
    aux: int
    value: int
    ip: int


def number(raw: bytes) -> int:
    return sum(byte << 8 * n for n, byte in enumerate(raw))


def matches(pattern: str, data: bytes) -> bool | None:
    """Whether data begin so; None: they end before that is known."""
    for n, bits in enumerate(pattern.split()):
        if n == len(data):
            return None
        if any(p not in (".", d) for p, d in zip(bits, f"{data[n]:08b}", strict=True)):
            return False
    return True


def variable(data: bytes) -> tuple[str, int] | str | None:
    """TNT and CYC, whose bits say how long they are: name and size; None: too short; a text: bad."""
    first = f"{data[0]:08b}"
    if first[7] == "0" and data[0] not in (0, 2):
        return "TNT", 1
    if first[6:] == "11":
        n = 1
        more = first[5] == "1"
        while more:
            if n == 10:
                return "bad"
            if n == len(data):
                return None
            more = f"{data[n]:08b}"[7] == "1"
            n += 1
        return "CYC", n
    if data[:2] == b"\x02\xa3":
        if len(data) < 8:
            return None
        return ("TNT", 8) if number(data[2:8]) > 1 else "bad"
    return "none"


def one(data: bytes, block: int) -> Packet | str | None:
    """The packet that data begin with; None: they end within it; a text: there is none."""
    if block and f"{data[0]:08b}"[5:] == "100":
        raw = data[: 1 + block]
        return Packet("BIP", raw, data[0] >> 3, number(raw[1:]), 0) if len(raw) == 1 + block else None
    found = variable(data)
    if isinstance(found, tuple):
        return fields(found[0], data[: found[1]])
    if found is None or found == "bad":
        return found
    short = False
    for pattern, name, payload in TABLE:
        how = matches(pattern, data)
        if how is None:
            short = True
        elif how:
            if payload == "ip":
                if data[0] >> 5 not in IP_BYTES:
                    return "bad"
                payload = IP_BYTES[data[0] >> 5]
            assert isinstance(payload, int)
            size = len(pattern.split()) + payload
            return fields(name, data[:size]) if len(data) >= size else None
    return None if short else "bad"


def fields(name: str, raw: bytes) -> Packet:
    aux = value = ip = 0
    match name:
        case "TNT":
            bits = f"{number(raw[2:]) if len(raw) == 8 else raw[0] >> 1:b}"
            aux, value = len(bits) - 1, int("0" + bits[1:], 2)
        case "TIP" | "TIP_PGE" | "TIP_PGD" | "FUP":
            aux, value = raw[0] >> 5, number(raw[1:])
        case "MODE_EXEC" | "MODE_TSX":
            value = raw[1] & 0x1F
        case "TSC" | "MTC":
            value = number(raw[1:])
        case "CYC":
            value = raw[0] >> 3 | sum(byte >> 1 << 5 + 7 * n for n, byte in enumerate(raw[1:]))
            value &= (1 << 64) - 1
        case "TMA":
            aux, value = number(raw[5:]), number(raw[2:4])
        case "CBR" | "PIP" | "VMCS" | "MWAIT" | "PWRE" | "PWRX":
            value = number(raw[2:])
        case "MNT":
            value = number(raw[3:])
        case "PTW":
            value, ip = number(raw[2:]), raw[1] >> 7
        case "EXSTOP" | "BEP":
            ip = raw[1] >> 7
        case "BBP":
            aux, value = raw[2] >> 7, raw[2] & 0x1F
        case "CFE":
            aux, value, ip = raw[2] & 0x1F, raw[3], raw[2] >> 7
        case "EVD":
            aux, value = raw[2] & 0x3F, number(raw[3:])
        case "TRIG":
            aux, value, ip = raw[1], number(raw[2:]), raw[1] >> 7
    return Packet(name, raw, aux, value, ip)


def after(packet: Packet, block: int) -> int:
    """Bytes of an item of the block behind a packet."""
    if packet.name == "BBP":
        return 4 if packet.aux else 8
    return block if packet.name in KEEP_BLOCK else 0


def lex(data: bytes, block: int = 0) -> tuple[list[Packet], str]:
    """All packets, and how they end: whole, short or bad."""
    found = []
    while data:
        packet = one(data, block)
        if packet is None:
            return found, "short"
        if isinstance(packet, str):
            return found, "bad"
        found.append(packet)
        block = after(packet, block)
        data = data[len(packet.raw) :]
    return found, "whole"
