"""Monitor text: registers and memory by content."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from tracedbg.errors import FormatError
from tracedbg.formats.qemu import monitor as qemu_monitor
from tracedbg.formats.qemu.monitor import parse
from tracedbg.layout import SLOT_RSP0, Gate

DATA = Path(__file__).parent / "data" / "qemu"

WORDS = b"""(qemu) info registers
CPU#0
RAX=0000000000000060 RBX=000000000010309d RCX=0000000000000001 RDX=00000000000003fd
TR =0028 0000000000105100 00000067 00008900 DPL=0 TSS64-avl
GDT=     0000000000105000 0000007f
IDT=     0000000000106000 00000fff
(qemu) x /26xw 0x105100
0000000000105100: 0x00000000 0x00108000 0x00000000 0x00000000
0000000000105110: 0x00000000 0x00000000 0x00000000 0x00000000
0000000000105120: 0x00000000 0x00110000 0x00000000 0x0010e000
0000000000105130: 0x00000000 0x0010c000
(qemu) x /4xg 0x106000
0000000000106000: 0x00108e0000080170 0x0000000000000000
0000000000106010: 0x0010ee0400080180
"""


def test_words_of_32_bits_give_the_tss_and_missing_slots_are_unknown() -> None:
    snapshot = parse(WORDS, "m")
    tss = snapshot.tss_at(0x105100)
    assert tss is not None
    assert tss.rsp == (0x108000 << 0, 0, 0)
    # IST1 at 0x24, IST2 at 0x2c; IST3 (0x34) has only its low half.
    assert tss.ist == (None, 0x110000, 0x10E000, None, None, None, None, None)


def test_a_gate_that_is_there_by_half_is_unknown() -> None:
    idt = parse(WORDS, "m").idt_at(0x106000)
    assert idt is not None
    assert idt.gates == {0: Gate(offset=0x100170, selector=8, ist=0, type=0xE, dpl=0)}


def test_line_ends_of_a_terminal_and_words_without_0x_change_nothing() -> None:
    plain = parse(WORDS, "m")
    other = parse(WORDS.replace(b": 0x", b": ").replace(b" 0x", b" ").replace(b"\n", b"\r\n"), "m")
    assert other.tss_at(0x105100) == plain.tss_at(0x105100)
    assert other.idt_at(0x106000) == plain.idt_at(0x106000)
    assert other.pairs() == {(0x105100, 0x106000)}


def test_physical_memory_is_not_taken_for_linear() -> None:
    text = b"CPU#0\nTR =0028 0000000000105100 00000067 0\n(qemu) xp /2xw 0x105104\n0000000000105104: 0x00000001 0x00000002\n"
    assert parse(text.replace(b"xp /", b"x /"), "m").tss_at(0x105100) is not None
    assert parse(text, "m").tss_at(0x105100) is None


def test_two_cpus_keep_their_numbers_and_share_one_idt() -> None:
    layout = qemu_monitor.read(str(DATA / "istlab/smp2_tid/mon_02_final.txt")).layout().with_stacks()
    assert [t.base for t in layout.tss] == [0x105100, 0x105168]
    assert [(c.tss, c.idt) for c in layout.cpus] == [(0, 0), (1, 0)]
    assert layout.tss[1].ist[1:5] == (0x111000, 0x10F000, 0x10D000, 0x10B000)
    # The dump ends after 34 gates; the others are unknown, not absent.
    assert sorted(layout.idts[0].gates) == list(range(34))
    assert layout.idts[0].gates[2].ist == 2
    assert layout.idts[0].gates[18].ist == 3
    tops = {(r.cpu, r.slot): (r.lo, r.hi) for r in layout.regions}
    assert tops[0, 2] == (0x10D000, 0x10E000)
    assert tops[1, SLOT_RSP0][1] == 0x109000


def test_text_without_registers_and_memory_is_refused() -> None:
    with pytest.raises(FormatError, match="not QEMU monitor text"):
        parse(b"hello\n", "m")


def test_absurd_numbers_are_refused() -> None:
    with pytest.raises(FormatError, match="absurd CPU number"):
        parse(b"CPU#99999999\n", "m")


@pytest.mark.parametrize("text", [b"\0" * 100, b"\xff\xfe: 0x\n", b"CPU#0\nTR =zzzz\n: 0x00\n0x:\n", b"0" * 100000])
def test_bytes_that_are_no_text_never_raise_anything_but_format_error(text: bytes) -> None:
    with contextlib.suppress(FormatError):
        parse(text, "m")


def test_what_looks_like_monitor_text_is_told_by_a_line_of_its_own() -> None:
    for text in (WORDS, b"x\r\nCPU#0\r\n", b" \tCPU#12 \n", b"CPU#3"):
        assert qemu_monitor.looks_like_monitor(text)
    long = 1 << 20
    for text in (b"CPU#\n0\n", b"on CPU#0\n", b"CPU#0 is\n", b"\n" * long, b" " * long, b"CPU#" + b"0" * long + b"x"):
        assert not qemu_monitor.looks_like_monitor(text)
