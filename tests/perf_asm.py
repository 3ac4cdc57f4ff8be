"""perf.data files with AUX data, written by hand for tests (linux tools/perf/Documentation/perf.data-file-format.txt)."""

from __future__ import annotations

import struct

PMU = 8  # a type of event, as sysfs gives it to intel_pt
BRANCH, EVENT, MTC, TSC = 1 << 13, 1 << 31, 1 << 9, 1 << 10
MTC_FREQ = 0x3C000
SAMPLE_ID_ALL = 1 << 18


def attr(
    kind: int = PMU, config: int = EVENT | TSC | 1, *, sample_type: int = 0x10087, flags: int = SAMPLE_ID_ALL
) -> bytes:  # IP, TID, TIME, CPU, IDENTIFIER
    raw = struct.pack("<IIQQQQQ", kind, 128, config, 1, sample_type, 4, flags)
    return raw + bytes(128 - len(raw))


def record(kind: int, payload: bytes = b"", misc: int = 0) -> bytes:
    payload += bytes(-len(payload) % 8)
    return struct.pack("<IHH", kind, misc, 8 + len(payload)) + payload


def info(
    *, kind: int = 1, shift: int = 31, mult: int = 1 << 30, n: int = 84, d: int = 1, snapshot: int = 0, filter_: bytes = b""
) -> bytes:
    """AUXTRACE_INFO: a TSC of 2 GHz, if nothing else is said."""
    words = [PMU, shift, mult, 0, 1, TSC, 1 << 11, 0, snapshot, 1, MTC, MTC_FREQ, n, d, 1 << 1, 20, len(filter_)]
    text = filter_ + bytes(8 - len(filter_) % 8) if filter_ else b""
    return record(70, struct.pack(f"<II{len(words)}Q", kind, 0, *words) + text + struct.pack("<QQQ", 1, 0, 0))


def aux(cpu: int, offset: int, data: bytes, *, idx: int | None = None, reference: int = 0) -> bytes:
    """AUXTRACE and the data behind it."""
    where = cpu if idx is None else idx
    return record(71, struct.pack("<QQQIIII", len(data), offset, reference, where, 0xFFFFFFFF, cpu, 0)) + data


def lost(cpu: int, offset: int, size: int, flags: int = 1) -> bytes:
    """AUX: pid, tid, time, cpu, reserved, identifier follow."""
    return record(11, struct.pack("<QQQ", offset, size, flags) + struct.pack("<IIQIIQ", 1, 1, 5, cpu, 0, 7))


def perf_data(*records: bytes, attrs: tuple[bytes, ...] = (attr(),), features: int = 1 << 18, finished: bool = True) -> bytes:
    """A file: header, attributes, records, and an empty index of the AUX data as its only feature."""
    body, end = b"".join(records), 104 + len(attrs) * 144
    data_at = end + 8 * len(attrs)  # behind them the IDs of the events, one each
    head = struct.pack("<8sQQQQQQQQ", b"PERFILE2", 104, 144, 104, end - 104, data_at, len(body) if finished else 0, 0, 0)
    head += struct.pack("<4Q", features, 0, 0, 0)
    out = head + b"".join(raw + struct.pack("<QQ", end + 8 * n, 8) for n, raw in enumerate(attrs))
    out += b"".join(struct.pack("<Q", 7 + n) for n in range(len(attrs))) + body
    if finished and features == 1 << 18:
        out += struct.pack("<QQ", len(out) + 16, 8) + bytes(8)
    return out


def pipe_data(*records: bytes, attrs: tuple[bytes, ...] = (attr(),)) -> bytes:
    """What `perf record -o -` writes."""
    return struct.pack("<8sQ", b"PERFILE2", 16) + b"".join(record(64, raw + bytes(8)) for raw in attrs) + b"".join(records)
