"""The packets of Intel PT: against perf's own examples, and against a slow lexer."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from pathlib import Path

import pt_asm as asm
import pt_model as model
import pytest

from tracedbg._decode import ffi, lib

EXAMPLES = Path(__file__).parent / "data" / "pt" / "packets.txt"
NAMES = [
    "PAD", "TNT", "TIP", "TIP_PGE", "TIP_PGD", "FUP", "MODE_EXEC", "MODE_TSX", "TSC", "MTC", "CYC", "TMA", "CBR", "PIP", "VMCS",
    "PSB", "PSBEND", "OVF", "STOP", "MNT", "PTW", "EXSTOP", "MWAIT", "PWRE", "PWRX", "BBP", "BIP", "BEP", "CFE", "EVD", "TRIG",
]  # fmt: skip


def examples(text: str) -> list[tuple[bytes, str]]:
    found = []
    for line in text.splitlines():
        raw, _, meaning = line.partition("\t")
        found.append((bytes.fromhex(raw), meaning))
    return found


def lex(data: bytes, block: int = 0, *, cap: int = 0) -> tuple[list[model.Packet], str]:
    """As model.lex, by the C lexer; `cap`: packets a call."""
    found, at, state = [], ffi.new("uint64_t *"), ffi.new("int *", block)
    out = ffi.new("struct pt_packet[]", cap or len(data) + 1)
    source = ffi.from_buffer(data)
    while at[0] < len(data):
        start = at[0]
        n = lib.pt_lex(source, len(data), at, state, out, cap or len(data) + 1)
        if n < 0:
            assert n == lib.DEC_E_FORMAT and at[0] == start
            return found, "bad"
        if not n:
            return found, "short"
        for p in out[0:n]:
            raw = data[p.offset : p.offset + p.size]
            found.append(model.Packet(NAMES[p.type], raw, p.aux, p.value, p.ip))
    return found, "whole"


def said(p: model.Packet) -> str:
    """In perf's words."""
    name = p.name.replace("_", ".")
    match p.name:
        case "TNT":
            return tnt(p)
        case "TIP" | "TIP_PGE" | "TIP_PGD" | "FUP":
            return f"{name} {p.value:#x}" if p.aux else f"{name} no ip"
        case "MODE_EXEC":
            return f"MODE.Exec IF:{p.value >> 2 & 1} {(16, 64, 32)[p.value & 3]}"
        case "MODE_TSX":
            return f"MODE.TSX TXAbort:{p.value >> 1 & 1} InTX:{p.value & 1}"
        case "STOP":
            return "TraceSTOP"
        case "TMA":
            return f"TMA CTC {p.value:#x} FC {p.aux:#x}"
        case "PIP":
            return f"PIP {p.value >> 1:#x} (NR={p.value & 1})"
        case "PTW":
            return f"PTWRITE {p.value:#x} IP:{p.ip}"
        case "EXSTOP" | "BEP":
            return f"{name} IP:{p.ip}"
        case "MWAIT":
            return f"MWAIT {p.value:#x} Hints {p.value & 0xFF:#x} Extensions {p.value >> 32 & 3:#x}"
        case "PWRE":
            return f"PWRE {p.value:#x} HW:{p.value >> 7 & 1} CState:{p.value >> 12 & 15} Sub-CState:{p.value >> 8 & 15}"
        case "PWRX":
            last, deepest, wake = p.value >> 4 & 15, p.value & 15, p.value >> 8 & 15
            return f"PWRX {p.value:#x} Last CState:{last} Deepest CState:{deepest} Wake Reason {wake:#x}"
        case "BBP":
            return f"BBP SZ {4 if p.aux else 8}-byte Type {p.value:#x}"
        case "BIP":
            return f"BIP ID {p.aux:#04x} Value {p.value:#x}"
        case "CFE":
            return f"CFE IP:{p.ip} Type {p.aux:#04x} Vector {p.value:#x}"
        case "EVD":
            return f"EVD Type {p.aux:#04x} Payload {p.value:#x}"
        case "PAD" | "PSB" | "PSBEND" | "OVF":
            return name
        case _:
            return f"{name} {p.value:#x}"


def tnt(p: model.Packet) -> str:
    return "TNT " + "".join("NT"[p.value >> n & 1] for n in reversed(range(p.aux))) + f" ({p.aux})"


def check_examples(pairs: list[tuple[bytes, str]]) -> None:
    assert len(pairs) >= 120
    for raw, meaning in pairs:
        block = len(raw) - 1 if meaning.startswith("BIP") else 0
        packets, end = lex(raw, block)
        assert [said(p) for p in packets] == [meaning] and end == "whole"
        for size in range(1, len(raw)):
            assert lex(raw[:size], block) == ([], "short"), (raw, size)


def test_perf_means_the_same() -> None:
    check_examples(examples(EXAMPLES.read_text()))


def test_the_installed_perf_means_the_same() -> None:
    perf = shutil.which("perf")
    if perf is None:
        pytest.skip("no perf here")
    words = [perf, "test", "-v", "Intel PT packet decoder"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    lines = re.findall(r"^Decoded ok: ((?:[0-9a-f]{2} )+) *(.*?)\s*$", done.stdout + done.stderr, re.MULTILINE)
    if not lines:
        pytest.skip("this perf does not print its examples")
    check_examples([(bytes.fromhex(raw), meaning) for raw, meaning in lines])


def test_the_slow_lexer_means_the_same() -> None:
    for raw, meaning in examples(EXAMPLES.read_text()):
        packets, end = model.lex(raw, len(raw) - 1 if meaning.startswith("BIP") else 0)
        assert [said(p) for p in packets] == [meaning] and end == "whole"


def random_packet(r: random.Random) -> bytes:
    pattern, _, payload = r.choice(model.TABLE)
    raw = bytearray(int("".join(r.choice("01") if bit == "." else bit for bit in bits), 2) for bits in pattern.split())
    if payload == "ip":
        raw[0] = raw[0] & 0x1F | r.choice(list(model.IP_BYTES)) << 5
        payload = model.IP_BYTES[raw[0] >> 5]
    end = b"\x02\x33" if raw[:2] == b"\x02\x63" else b""  # no block stays open
    return bytes(raw) + r.randbytes(int(payload)) + end


def stream(r: random.Random, packets: int) -> bytes:
    out = b""
    for _ in range(packets):
        kind = r.random()
        if kind < 0.15:
            out += asm.tnt(*(r.randrange(2) for _ in range(r.randrange(1, 7))))
        elif kind < 0.3:
            out += asm.cyc(r.getrandbits(r.randrange(1, 64)))
        elif kind < 0.4:  # a block, whose items look like branches outside of it
            wide = r.choice((4, 8))
            out += bytes([0x02, 0x63, (wide == 4) << 7 | r.randrange(32)])
            out += b"".join(bytes([r.randrange(32) << 3 | 4]) + r.randbytes(wide) for _ in range(r.randrange(5)))
            out += r.choice((b"\x02\x33", b"\x02\xb3", asm.tip(1, 0)))
        else:
            out += random_packet(r)
    return out


def same(data: bytes) -> str:
    expected = model.lex(data)
    assert lex(data) == expected, data.hex()
    return expected[1]


def test_random_streams_of_packets_are_read_alike() -> None:
    r = random.Random(3)
    for _ in range(300):
        data = stream(r, 40)
        assert same(data) == "whole"
        cut = data[: r.randrange(len(data))]
        same(cut)
        assert lex(data, cap=r.randrange(1, 9)) == lex(data)


def test_random_bytes_are_read_alike() -> None:
    r = random.Random(4)
    ends = {same(r.randbytes(r.randrange(1, 40))) for _ in range(3000)}
    ends |= {same(b"\x02" + r.randbytes(12)) for _ in range(3000)}
    ends |= {same(bytes(r.choice((0, 2, 3, 7, 0x82, 0x99, 0xD9, r.randrange(256))) for _ in range(20))) for _ in range(3000)}
    assert ends == {"bad", "short", "whole"}


def test_every_pair_of_first_bytes_is_read_alike() -> None:
    for first in range(256):
        for second in range(0, 256, 1 if first in (0x02, 0x99, 0xD9) else 51):
            for tail in (b"", bytes(14), b"\xff" * 14):
                same(bytes([first, second]) + tail)


def test_mutations_are_read_alike() -> None:
    r = random.Random(5)
    for _ in range(1000):
        data = bytearray(stream(r, 12))
        for _ in range(r.randrange(1, 4)):
            data[r.randrange(len(data))] = r.randrange(256)
        same(bytes(data))


@pytest.mark.parametrize("before", [b"", b"\x00", b"\x02\x82", b"\x82", b"\x59\x02", b"\x02\x82" * 3, bytes(37)])
def test_a_psb_is_found_wherever_it_lies(before: bytes) -> None:
    for shift in range(17):
        data = bytes(shift) + before + asm.PSB + b"\x23\x99"
        keep = ffi.new("uint64_t *")
        # What comes before can end like a PSB: of a longer run the last 16 bytes are it.
        expected = data.rfind(asm.PSB)
        assert lib.pt_sync(ffi.from_buffer(data), len(data), 0, 1, keep) == expected
        for size in range(expected + 16):
            part = data[:size]
            assert lib.pt_sync(ffi.from_buffer(part), size, 0, 0, keep) == size
            assert keep[0] <= expected, "its beginning would be thrown away"


def test_arguments_are_checked() -> None:
    packet = ffi.new("struct pt_packet *")
    assert lib.pt_packet(ffi.NULL, 1, 0, packet) == lib.DEC_E_ARG
    assert lib.pt_packet(b"\x04", 1, 5, packet) == lib.DEC_E_ARG
    assert lib.pt_packet(b"", 0, 0, packet) == 0
