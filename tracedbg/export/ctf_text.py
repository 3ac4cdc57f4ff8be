"""The metadata of a CTF trace: TSDL text (CTF 1.8.3 specification, section 7 and appendix B)."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Iterator, Mapping

from tracedbg import x86
from tracedbg.export.axis import NANO, Axis
from tracedbg.export.ctf_classes import EventClass, enum_of
from tracedbg.formats.case.fields import SHAPES, SOURCES
from tracedbg.state import EventFlag
from tracedbg.text import clean

MAGIC = 0xC1FC1FC1  # of a packet (CTF 1.8.3, section 5.1)
CPU_STREAM, OTHER_STREAM = 0, 1
LIMIT = 2000  # characters of one value of env
MAX_ENV = 64

_INTEGERS = """\
typealias integer { size = 8; align = 8; signed = false; base = 10; } := uint8;
typealias integer { size = 16; align = 8; signed = false; base = 10; } := uint16;
typealias integer { size = 32; align = 8; signed = false; base = 10; } := uint32;
typealias integer { size = 64; align = 8; signed = false; base = 10; } := uint64;
typealias integer { size = 8; align = 8; signed = false; base = 16; } := uint8_hex;
typealias integer { size = 16; align = 8; signed = false; base = 16; } := uint16_hex;
typealias integer { size = 32; align = 8; signed = false; base = 16; } := uint32_hex;
typealias integer { size = 64; align = 8; signed = false; base = 16; } := uint64_hex;
"""


def quote(text: str) -> str:
    """A TSDL string: printable ASCII, the two characters that mean something escaped."""
    shown = clean(text, LIMIT).encode("ascii", "backslashreplace").decode("ascii")
    return '"' + shown.replace("\\", "\\\\").replace('"', '\\"') + '"'


def identifier(text: str) -> str:
    """A name as TSDL takes it."""
    return re.sub(r"[^A-Za-z0-9_]", "_", text)[:64]


def _enum(name: str, bits: int, labels: Iterable[tuple[str, int | tuple[int, int]]]) -> Iterator[str]:
    yield f"typealias enum : uint{bits} {{"
    for label, value in labels:
        shown = f"{value[0]} ... {value[1]}" if isinstance(value, tuple) else f"{value}"
        yield f"\t{quote(label)} = {shown},"
    yield f"}} := {name};"
    yield ""


def _flags(value: int) -> str:
    """`failed ext`: readers do not take an enumeration for a set of bits, so every set has its label."""
    return " ".join(flag.name.lower() for flag in EventFlag if value & flag and flag.name)


def _enums() -> Iterator[str]:
    yield from _enum("vector_t", 8, ((x86.VECTOR_NAMES.get(n, f"{n:#04x}"), n) for n in range(256)))
    yield from _enum("source_t", 8, [*SOURCES.items(), ("reserved", (max(SOURCES.values()) + 1, 255))])
    for kind, shape in SHAPES.items():
        name = enum_of(kind)
        if name is not None and name != "vector_t":
            yield from _enum(name, 8, ((label, value) for value, label in shape.names.items()))
    yield from _enum("flags_t", 8, [("", 0), *((_flags(value), value) for value in range(1, 128)), ("undefined", (128, 255))])
    yield from _enum("timestamp_t", 8, [("an earlier event", 0)])


def metadata(
    ident: uuid.UUID, axis: Axis, env: Mapping[str, str | int], classes: Iterable[EventClass], streams: Iterable[int]
) -> Iterator[str]:
    """The lines of the file."""
    yield "/* CTF 1.8 */"
    yield ""
    yield from _INTEGERS.splitlines()
    yield ""
    yield from _enums()
    yield from (
        "trace {",
        "\tmajor = 1;",
        "\tminor = 8;",
        f'\tuuid = "{ident}";',
        "\tbyte_order = le;",
        "\tpacket.header := struct { uint32_hex magic; uint8 uuid[16]; uint32 stream_id; };",
        "};",
        "",
        "env {",
    )
    for name, value in env.items():
        yield f"\t{name} = {value if isinstance(value, int) else quote(value)};"
    clock = "trace_time" if axis.timed else "event_number"
    yield from (
        "};",
        "",
        "clock {",
        f"\tname = {clock};",
        f"\tdescription = {quote(axis.text)};",
        f"\tfreq = {axis.hz if axis.timed and axis.hz else NANO};",
        "};",
        "",
        f"typealias integer {{ size = 64; align = 8; signed = false; base = 10; map = clock.{clock}.value; }} := ticks;",
        "",
    )
    for stream in streams:
        cpu = " uint32 cpu_id;" if stream == CPU_STREAM else ""
        yield from (
            "stream {",
            f"\tid = {stream};",
            "\tpacket.context := struct { ticks timestamp_begin; ticks timestamp_end; uint64 content_size; "
            f"uint64 packet_size; uint64 events_discarded;{cpu} }};",
            "\tevent.header := struct { uint16 id; ticks timestamp; };",
            "\tevent.context := struct { uint32 index; };",
            "};",
            "",
        )
    for event in classes:
        fields = " ".join(f"{kind} {name};" for name, kind in event.fields)
        yield from (
            "event {",
            f"\tname = {quote(event.name)};",
            f"\tid = {event.number};",
            f"\tstream_id = {event.stream};",
            f"\tfields := struct {{ {fields} }};",
            "};",
            "",
        )


def environment(meta: Mapping[str, object], version: str, axis: Axis, cpus: int) -> dict[str, str | int]:
    """What is known of the trace as a whole: source and fidelity of META, and what the time axis is."""
    env: dict[str, str | int] = {
        "tracer_name": "tracedbg",
        "tracer_version": version,
        "cpus": cpus,
        "time_axis": axis.text,
        "events_discarded": "records lost; a gap of unknown size counts as 1",
        "unknown_fields": "are not there: events of one name can be of several classes",
    }
    for table in ("source", "fidelity"):
        values = meta.get(table)
        for key, value in sorted(values.items()) if isinstance(values, dict) else ():
            name = f"{table}_{identifier(key)}"
            if len(env) >= MAX_ENV or name in env:
                continue
            if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63):
                env[name] = value
    return env
