"""What the lines of QEMU's `-d int` log look like: formats.md 4.1, target/i386/tcg/seg_helper.c and cpu-dump.c of QEMU.

qemu-system-x86_64 prints addresses of the `v=` line with 16 digits, qemu-system-i386 with 8. A register dump has 16 digits where
the code that it interrupts is 64-bit code, else 8, but for GDT, IDT, CR2 and CR3, which have 16 wherever EFER.LMA is set.
"""

from __future__ import annotations

import re

_FIRST = rb" {0,5}([0-9]{1,10}): v=([0-9a-f]{2}) e=([0-9a-f]{4}) i=([01]) cpl=[0-3] "
_HEAD = _FIRST + rb"IP=([0-9a-f]{4}):(?P<ip>[0-9a-f]{16}) pc=[0-9a-f]{16} SP=([0-9a-f]{4}):(?P<sp>[0-9a-f]{16})"
# Of either width; what follows the last address is cut off only where it cannot be part of it.
_HEAD_ANY = _FIRST + (
    rb"IP=([0-9a-f]{4}):([0-9a-f]{8}(?P<wide>[0-9a-f]{8})?) pc=[0-9a-f]{8}(?(wide)[0-9a-f]{8}) "
    rb"SP=([0-9a-f]{4}):([0-9a-f]{8}(?(wide)[0-9a-f]{8}))"
)
HEAD = re.compile(_HEAD_ANY)
# The whole of an attempt in 64-bit code, nothing torn, with the line before it. Fixed columns are skipped unread, but RSP and RIP
# show that the dump is this line's, and no line may be so long that another thread's could stand in it.
WHOLE = re.compile(
    rb"(?:check_exception old: 0x([0-9a-f]{1,8}) new 0x([0-9a-f]{1,8})\n|Servicing hardware INT=0x([0-9a-f]{2})\n)?"
    + _HEAD
    + rb" (?:CR2=([0-9a-f]{16})|env->regs\[R_EAX\]=[0-9a-f]{16})\n"
    rb"RAX=(?s:.{143})RSP=(?P=sp)\n(?s:.{168})(?:R16=(?s:.{332}))?"
    rb"RIP=(?P=ip) RFL=([0-9a-f]{8}) (?s:.{27})SMM=([01]) [^\n]{0,90}\n"
    rb"ES =[^\n]{0,90}\n[^\n]{0,90}\n[^\n]{0,90}\n[^\n]{0,90}\n[^\n]{0,90}\n[^\n]{0,90}\n[^\n]{0,90}\n"
    rb"TR =[0-9a-f]{4} ([0-9a-f]{16}) [^\n]{0,90}\n"
    rb"GDT=[^\n]{0,90}\n"
    rb"IDT= {5}([0-9a-f]{16}) [^\n]{0,90}\n"
    rb"CR0=[0-9a-f]{8} CR2=([0-9a-f]{16}) [^\n]{0,90}\nDR0=[^\n]{0,90}\nDR6=[^\n]{0,90}\n(?:CCS=[^\n]{0,90}\n)?"
    rb"EFER=([0-9a-f]{16})\n"
)
PIECE = re.compile(
    rb"(?P<head>" + _HEAD_ANY + rb")"
    rb"|(?P<trace>(?:[0-9]{1,10}@[0-9]{1,12}\.[0-9]{6}:|(?:io)?apic_[a-z_]{4,30} |pic_[a-z_]{4,30} )[^\n]*)"
    rb"|check_exception old: 0x(?P<old>[0-9a-f]{1,8}) new 0x(?P<new>[0-9a-f]{1,8})(?![0-9a-f])"
    rb"|Servicing (?P<virtual>virtual )?hardware INT=0x(?P<serviced>[0-9a-f]{2})(?![0-9a-f])"
    rb"|(?P<tail> CR2=(?P<cr2>[0-9a-f]{16}|[0-9a-f]{8}(?![0-9a-f]))| env->regs\[R_EAX\]=(?:[0-9a-f]{16}|[0-9a-f]{8}))"
    rb"|(?P<block>[RE]AX=[0-9a-f]{8})"
    rb"|CPU Reset \(CPU (?P<reset>[0-9]{1,5})\)"
    rb"|SMM: (?P<smm>enter|after RSM)"
    rb"|CPU (?P<mcip>[0-9]{1,5}): Previous MCE still in progress, raising triple fault"
    rb"|(?P<triple>Triple fault)"
    rb"|PLG (?P<plugin>cpu=[^\n]*)"
)
CUT_HEAD = re.compile(rb" *[0-9]{1,10}(?:$|: ?$|: v)")
# A line without one of these holds no piece; in a register dump " CR2=" is ordinary. Trace lines have "@" or "pic_": looked for
# by themselves, because digits before would make these slow.
TORN_HINT = re.compile(rb": v=|check_e|Servic|R_EAX|AX=|CPU |SMM: |Triple|PLG ")
HINT = re.compile(TORN_HINT.pattern + rb"| CR2=")
REGISTERS = re.compile(
    rb"(?:R(?:AX|SI|8 |12|IP)|E(?:AX|SI|IP|S |FER)|[CSDFG]S |LDT|TR |GDT|IDT|CR0|DR[06]|CCS|FCW|FPR[0-7]|[XYZ]MM\d\d|R\d\d)="
)
IRET = re.compile(
    rb"PLG cpu=([0-9]{1,5}) iret pc=([0-9a-f]{16})\n"
    rb"PLG cpu=\1 iret-frame pc=\2 frame=([0-9a-f]{16}) rip=([0-9a-f]{16}) "
    rb"cs=([0-9a-f]{4,16}) rfl=([0-9a-f]{8,16}) rsp=([0-9a-f]{16}) ss=([0-9a-f]{4,16})\n"
)
PLUGIN = re.compile(
    rb"PLG cpu=([0-9]{1,5}) ([a-z-]{2,12}) pc=([0-9a-f]{16})"
    rb"(?: va=([0-9a-f]{16}) sz=([0-9]{1,3}) val=([0-9a-f]*))?\n"
)
FRAME = re.compile(
    rb"cpu=([0-9]{1,5}) iret-frame pc=([0-9a-f]{16}) frame=([0-9a-f]{16}) rip=([0-9a-f]{16}) "
    rb"cs=([0-9a-f]{4,16}) rfl=([0-9a-f]{8,16}) rsp=([0-9a-f]{16}) ss=([0-9a-f]{4,16})$"
)

IN_BLOCK = {
    "rip": re.compile(rb"^[RE]IP=([0-9a-f]{8,16}) (?:RFL|EFL)=([0-9a-f]{8}) .*?SMM=([01])", re.M),
    "sp": re.compile(rb"[RE]SP=([0-9a-f]{8,16})"),
    "cr2": re.compile(rb"^CR0=[0-9a-f]{8} CR2=([0-9a-f]{8,16})", re.M),
    "tr": re.compile(rb"^TR =[0-9a-f]{4} ([0-9a-f]{8,16}) ", re.M),
    "idt": re.compile(rb"^IDT= +([0-9a-f]{8,16}) ", re.M),
    "efer": re.compile(rb"^EFER=([0-9a-f]{16})", re.M),
}

_DATE = rb"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{6})?Z "
_SNIFF = re.compile(
    rb"^(?:" + _DATE + rb")?(?: *\d{1,10}: v=[0-9a-f]{2} e=[0-9a-f]{4} i=|Servicing (?:virtual )?hardware INT=0x"
    rb"|check_exception old: 0x|CPU Reset \(CPU \d+\)|SMM: (?:enter|after RSM)|PLG (?:install|cpu=))",
    re.M,
)
_WEAK = re.compile(
    rb"^-{8,}\r?\nIN:|^\d+@\d+\.\d{6}:[a-z0-9_]+ |^(?:" + _DATE + rb")?(?:io)?apic_[a-z_]{4,30} |^Trace \d+: 0x", re.M
)


def is_log(head: bytes) -> bool:
    """Whether a text begins like a QEMU log; other `-d` lines alone are enough at its beginning."""
    return _SNIFF.search(head) is not None or _WEAK.search(head) is not None
