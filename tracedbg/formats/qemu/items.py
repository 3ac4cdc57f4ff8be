"""What a QEMU log says, item by item: attempts of delivery, notes, lines of the plugin."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

NO_OLD = 0xFFFFFFFF  # check_exception's "no exception is being delivered"


class Note(IntEnum):
    """Items other than attempts."""

    RESET = 1  # a: CPU number
    SMI = 2
    RSM = 3
    SHUTDOWN = 4  # a: CPU number or -1, b: enum tdb_shutdown


class Attempt(NamedTuple):
    """One `v=` line with its register dump. -1: not there. `tr`, `idt`, `efer`: hex digits as printed.

    `cr2`: of a #PF, and of the #PF that became a #DF.
    """

    number: int
    vector: int
    code: int
    soft: int
    cs: int
    ip: int
    ss: int
    sp: int
    cr2: int
    rflags: int
    tr: bytes
    idt: bytes
    efer: bytes  # b"": no register dump
    smm: bool
    old: int  # check_exception's old; -1: no such line
    serviced: int  # enum tdb_source of the Servicing line before it; 0: no such line
    damaged: bool
    time: int  # microseconds, of the last stamp before it


class Other(NamedTuple):
    """A line that is no attempt."""

    note: Note
    a: int
    b: int
    time: int


class Plugin(NamedTuple):
    """A line of the plugin: what it says after `PLG cpu=N`, as matched."""

    cpu: int
    verb: bytes
    fields: tuple[bytes, ...]


Item = Attempt | Other | Plugin
