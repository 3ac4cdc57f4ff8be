"""The native trace format, declared with construct, and the one place where its bytes are parsed.

File: HEADER, section table (SECTION x n), sections aligned to 64 bytes. All integers are little-endian.
While a file is being written, `finished` is clear, the table stands behind the header, and EVENTS (length 0 in the table)
runs to the end of the file. Finishing appends the other sections and a new table, then rewrites the header.
"""

from __future__ import annotations

import struct
from typing import Any

import construct as c

from tracedbg.errors import FormatError

MAGIC = b"TDBG\r\n\x1a\n"
VERSION_MAJOR = 1
VERSION_MINOR = 0
ALIGN = 64
EVENT_SIZE = 64
CRC_BLOCK = 16384  # events per checksum in the CHECKS section

MAX_SECTIONS = 64
MAX_CPUS = 4096
MAX_META = 16 << 20
MAX_TABLES = 4096  # TSSs, IDTs
MAX_REGIONS = 65536

FLAG_FINISHED = 1

HEADER = c.Struct(
    "magic" / c.Bytes(8),
    "major" / c.Int16ul,
    "minor" / c.Int16ul,
    "flags" / c.Int32ul,
    "clock_hz" / c.Int64ul,  # ticks per second of `time`; 0: unknown or no time
    "cpus" / c.Int32ul,
    "section_count" / c.Int32ul,
    "table_offset" / c.Int64ul,
    "reserved" / c.Int64ul,
    "reserved2" / c.Int64ul,
    "table_crc" / c.Int32ul,
    "header_crc" / c.Int32ul,  # of the header with this field 0
)

SECTION_KINDS = {
    "EVENTS": 1,
    "LAYOUT": 2,
    "MEMORY": 3,
    "BYTES": 4,
    "META": 5,
    "SYMBOLS": 6,
    "MARKS": 7,
    "CHECKS": 8,  # CRC-32 of each CRC_BLOCK events
}

SECTION = c.Struct(
    "kind" / c.Int32ul,
    "crc" / c.Int32ul,  # CRC-32 of the section; EVENTS: 0, see CHECKS
    "offset" / c.Int64ul,
    "length" / c.Int64ul,
    "reserved" / c.Int64ul,
)

EVENT = c.Struct(
    "time" / c.Int64ul,
    "rip" / c.Int64ul,
    "rsp" / c.Int64ul,
    "addr" / c.Int64ul,
    "value" / c.Int64ul,
    "rflags" / c.Int32ul,
    "code" / c.Int32ul,
    "source_index" / c.Int32ul,
    "cpu" / c.Int16ul,
    "cs" / c.Int16ul,
    "ss" / c.Int16ul,
    "known" / c.Int16ul,
    "kind" / c.Int8ul,
    "arg" / c.Int8ul,
    "source" / c.Int8ul,
    "flags" / c.Int8ul,
)

GATE = c.Struct(
    "offset" / c.Int64ul,
    "selector" / c.Int16ul,
    "ist" / c.Int8ul,
    "type" / c.Int8ul,
    "dpl" / c.Int8ul,
    "flags" / c.Int8ul,  # 1 known, 2 present
    "reserved" / c.Int16ul,
)

IDT = c.Struct("base" / c.Int64ul, "gate" / c.Array(256, GATE))

TSS = c.Struct(
    "base" / c.Int64ul,
    "rsp" / c.Array(3, c.Int64ul),
    "ist" / c.Array(8, c.Int64ul),
    "known" / c.Int32ul,  # bit n: rsp[n]; bit 8+n: ist[n]
    "reserved" / c.Int32ul,
)

CPU_LAYOUT = c.Struct("tss" / c.Int32sl, "idt" / c.Int32sl)

FRED = c.Struct(
    "rsp" / c.Array(4, c.Int64ul),
    "stklvls" / c.Int64ul,
    "config" / c.Int64ul,
    "known" / c.Int32ul,  # bit 0-3: rsp[n]; 4: stklvls; 5: config
    "on" / c.Int32ul,
)

REGION = c.Struct(
    "lo" / c.Int64ul,
    "hi" / c.Int64ul,
    "cpu" / c.Int16ul,
    "kind" / c.Int8ul,
    "slot" / c.Int8ul,
    "assumed" / c.Int32ul,  # 1: nothing tells lo
)

LAYOUT_HEAD = c.Struct(
    "tss_count" / c.Int32ul,
    "idt_count" / c.Int32ul,
    "cpu_count" / c.Int32ul,
    "region_count" / c.Int32ul,
    "fidelity" / c.Int32ul,
    "fred_count" / c.Int32ul,  # FRED records behind the IDTs: one for each of the CPUs, or none
)

MEMORY_HEAD = c.Struct("count" / c.Int32ul, "reserved" / c.Int32ul)
MEMORY_RANGE = c.Struct("addr" / c.Int64ul, "length" / c.Int64ul)  # the bytes follow all ranges, in order


def _codes(layout: Any) -> str:
    if isinstance(layout, c.Renamed):
        return _codes(layout.subcon)
    if isinstance(layout, c.Array):
        return _codes(layout.subcon) * int(layout.count)
    if isinstance(layout, c.Struct):
        return "".join(_codes(part) for part in layout.subcons)
    return str(layout.fmtstr[1:])


def packer(layout: c.Construct[Any, Any]) -> struct.Struct:
    """A declaration of integers as a format of `struct`: for records of which there are many."""
    return struct.Struct("<" + _codes(layout))


# Bulk packing; the tests hold it against the declarations.
EVENT_PACK = packer(EVENT)
TSS_PACK = packer(TSS)
CPU_PACK = packer(CPU_LAYOUT)
FRED_PACK = packer(FRED)
REGION_PACK = packer(REGION)
GATE_PACK = packer(GATE)
RANGE_PACK = packer(MEMORY_RANGE)


def parse(layout: c.Construct[Any, Any], data: bytes | memoryview, path: str, offset: int) -> Any:
    """Parse `data` with a declaration; any failure becomes a FormatError at path, offset."""
    try:
        return layout.parse(bytes(data))
    except (c.ConstructError, UnicodeDecodeError, OverflowError) as error:
        first = str(error).strip().splitlines()
        raise FormatError(path, f"damaged record ({first[-1] if first else 'no detail'})", offset) from None
