"""Text of QEMU logs made up by hand, and readers of it, for the tests of the QEMU log reader."""

from __future__ import annotations

import io
from pathlib import Path

from tracedbg.errors import FormatError
from tracedbg.formats import ReaderOptions, open_input
from tracedbg.formats.qemu import log as qemu_log
from tracedbg.formats.source import Input
from tracedbg.state import Event, Kind
from tracedbg.trace import Trace
from tracedbg.writer import TraceWriter

DATA = Path(__file__).parent / "data" / "qemu"
ALONE = ReaderOptions(discover=False)
QEMU = ReaderOptions(from_format="qemu-int", discover=False)

BLOCK = (
    "RAX=0000000000000001 RBX=0000000000000020 RCX=0000000000000001 RDX=000000000014e684\n"
    "RSI=000000000010309d RDI=00000000001032fb RBP=0000000000100370 RSP={sp:016x}\n"
    "R8 =000000000010b000 R9 =0000000000000000 R10=0000000000000000 R11=0000000000000000\n"
    "R12=0000000000000010 R13=0000000000000000 R14=0000000000000000 R15=0000000000000000\n"
    "RIP={ip:016x} RFL=00000246 [-------] CPL=0 II=0 A20=1 SMM=0 HLT=0\n"
    "ES =0010 0000000000000000 ffffffff 00cf9300 DPL=0 DS   [-WA]\n"
    "CS =0008 0000000000000000 ffffffff 00af9b00 DPL=0 CS64 [-RA]\n"
    "SS =0010 0000000000000000 ffffffff 00cf9300 DPL=0 DS   [-WA]\n"
    "DS =0010 0000000000000000 ffffffff 00cf9300 DPL=0 DS   [-WA]\n"
    "FS =0010 0000000000000000 ffffffff 00cf9300 DPL=0 DS   [-WA]\n"
    "GS =0010 0000000011110000 ffffffff 00cf9300 DPL=0 DS   [-WA]\n"
    "LDT=0000 0000000000000000 0000ffff 00008200 DPL=0 LDT\n"
    "TR =0028 {tr:016x} 00000067 00008900 DPL=0 TSS64-avl\n"
    "GDT=     0000000000105000 0000007f\n"
    "IDT=     0000000000106000 00000fff\n"
    "CR0=80010011 CR2={cr2:016x} CR3=0000000000113000 CR4=00000060\n"
    "DR0=0000000000000000 DR1=0000000000000000 DR2=0000000000000000 DR3=0000000000000000 \n"
    "DR6=00000000ffff0ff0 DR7=0000000000000400\n"
    "CCS=0000000000000000 CCD=0000000000000001 CCO=LOGICL\n"
    "EFER=0000000000000501\n"
)


def head(n: int, v: int, ip: int, sp: int, e: int = 0, i: int = 0, cs: int = 8) -> str:
    """A `v=` line up to SP."""
    return f"{n:6d}: v={v:02x} e={e:04x} i={i} cpl={cs & 3} IP={cs:04x}:{ip:016x} pc={ip:016x} SP=0010:{sp:016x}"


def tail(v: int, cr2: int = 0) -> str:
    """The rest of it."""
    return f" CR2={cr2:016x}" if v == 14 else " env->regs[R_EAX]=0000000000000001"


def block(ip: int, sp: int, cr2: int = 0, tr: int = 0x105100) -> str:
    """A register dump in 64-bit code."""
    return BLOCK.format(ip=ip, sp=sp, cr2=cr2, tr=tr)


def event(n: int, v: int, ip: int, sp: int, cr2: int = 0, tr: int = 0x105100, **more: int) -> str:
    """A whole block."""
    return head(n, v, ip, sp, **more) + tail(v, cr2) + "\n" + block(ip, sp, cr2, tr)


def events(trace: Trace) -> list[Event]:
    """All events."""
    return [trace.event(i) for i in range(trace.count)]


def deliveries(trace: Trace) -> list[Event]:
    """The deliveries and the attempts at one."""
    return [e for e in events(trace) if e.kind == Kind.DELIVER]


def read_bytes(tmp_path: Path, data: bytes, options: ReaderOptions = ALONE) -> Trace:
    """A log of these bytes."""
    path = tmp_path / "log"
    path.write_bytes(data)
    return open_input(str(path), options=options)


def scenario(name: str, options: ReaderOptions | None = None) -> Trace:
    """A recording of the bare-metal guest, with the monitor text beside it."""
    folder = DATA / name
    path = folder / "qemu.log"
    return open_input(str(path if path.exists() else folder / "qemu.log.gz"), options=options)


def native_trace(path: Path, *, native: bool, options: ReaderOptions = ALONE) -> bytes | str:
    """The native trace that a log becomes, with or without the scanner in C; or why it is none."""
    file = io.BytesIO()
    try:
        with Input(str(path)) as source:
            writer = TraceWriter(file)
            qemu_log.read([source], writer, options, native=native)
            writer.close()
    except FormatError as error:
        return str(error)
    return file.getvalue()
