"""Raw Intel PT data, as a debugger, firmware or `perf-read-aux` saves them, into a native trace.

One file is the stream of one CPU; several files are those of several CPUs, in their order. The file says neither which CPU it
is from nor how its clocks relate, so time is that of the last TSC packet. It begins anywhere: what comes before the first PSB
cannot be read. Branches are skipped, so neither the traced code nor a disassembler is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tracedbg import wire
from tracedbg._decode import ffi, lib
from tracedbg.errors import FormatError, UsageError
from tracedbg.formats.pt.stream import RECORD, Clock, Merge, Stream, Texts, counted, fidelity
from tracedbg.formats.source import Input, refuse_twice
from tracedbg.layout import Fidelity, Layout
from tracedbg.writer import TraceWriter

if TYPE_CHECKING:
    from tracedbg.formats import ReaderOptions

FORMAT = "intel-pt"

_PSB = b"\x02\x82" * 8
_TRIES = 64  # beginnings that are looked at
_STATUS = frozenset((
    lib.PT_PSB, lib.PT_PAD, lib.PT_TSC, lib.PT_TMA, lib.PT_MTC, lib.PT_CYC, lib.PT_CBR, lib.PT_PIP, lib.PT_VMCS, lib.PT_MODE_EXEC,
    lib.PT_MODE_TSX, lib.PT_MNT, lib.PT_FUP,
))  # fmt: skip


def sniff(head: bytes) -> bool:
    """Whether there is a whole PSB+ in it: a PSB, the status packets that belong to it, and its end."""
    at = head.find(_PSB)
    for _ in range(_TRIES):
        if at < 0:
            return False
        if _whole(head[at : at + 256]):
            return True
        at = head.find(_PSB, at + 2)
    return False


def _whole(data: bytes) -> bool:
    packets = ffi.new("struct pt_packet[]", len(data))
    n = lib.pt_lex(ffi.from_buffer(data), len(data), ffi.new("uint64_t *"), ffi.new("int *"), packets, len(data))
    kinds = [packets[i].type for i in range(n)]
    end = next((i for i, kind in enumerate(kinds) if kind in (lib.PT_PSBEND, lib.PT_OVF)), 0)
    return end > 0 and _STATUS.issuperset(kinds[:end])


def read(inputs: Sequence[Input], writer: TraceWriter, options: ReaderOptions) -> None:
    """Read streams into the writer. What is damaged or cut short ends in a gap and in META's `damage`."""
    if len(inputs) > wire.MAX_CPUS:
        raise UsageError(f"at most {wire.MAX_CPUS} files, one a CPU")
    refuse_twice(inputs)
    texts = Texts(writer)
    streams = [Stream(texts, cpu) for cpu in range(len(inputs))]
    if len(inputs) == 1:
        for rows in _events(streams[0], inputs[0]):
            writer.append(rows)
    else:
        _together(streams, inputs, writer)
    counts = counted(streams)
    check(inputs[0].path, counts)
    writer.cpus = len(inputs)
    writer.clock_hz = options.cpu_hz
    writer.layout = replace((options.layout or Layout()).with_stacks(), fidelity=Fidelity.GUESTS)
    writer.symbols = options.symbols or writer.symbols
    meta: dict[str, Any] = {
        "source": _source(inputs),
        "counts": counts,
        "fidelity": fidelity(Clock(), counts, options.cpu_hz),
        "layout": {"origin": "file"} if options.layout is not None else {},
        "returns": "unplaced",  # no RSP: see help/replay.md, Return
    }
    meta["fidelity"]["cpu"] = "the data do not say which: the first file is CPU 0, the next CPU 1, and so on"
    if damage := [
        (f"{source.name} " if len(inputs) > 1 else "") + told
        for stream, source in zip(streams, inputs, strict=True)
        for told in stream.damage
    ]:
        meta["damage"] = damage[: lib.PT_DAMAGES]
    writer.meta = {**writer.meta, **meta}


def check(path: str, counts: dict[str, int]) -> None:
    """Refuse data from which nothing can be read. Raises FormatError."""
    if not counts.get("psb"):
        raise FormatError(path, "no PSB in it: not Intel PT, or too short to be read", 0)
    if not counts.get("control_flow_events") and not counts.get("interrupt_flag_changes"):
        raise FormatError(path, f"Intel PT without Event Trace: no control-flow event in it (record with `{RECORD}`)", 0)


def _source(inputs: Sequence[Input]) -> dict[str, Any]:
    told: dict[str, Any] = {"format": FORMAT, "name": inputs[0].name, "sha256": inputs[0].sha256, "bytes": inputs[0].bytes}
    if len(inputs) > 1:
        told["files"] = [{"name": i.name, "sha256": i.sha256, "bytes": i.bytes} for i in inputs]
    return told


def _events(stream: Stream, source: Input) -> Iterator[bytes]:
    for piece in source.chunks():
        yield from stream.feed(piece)
    yield from stream.feed(b"", last=True)


def _together(streams: Sequence[Stream], inputs: Sequence[Input], writer: TraceWriter) -> None:
    merge = Merge(writer)
    more: dict[int, Iterator[bytes]] = {}
    for stream, source in zip(streams, inputs, strict=True):
        number = merge.stream()
        merge.wait(number, True)
        more[number] = _events(stream, source)
    while more:
        for number in [n for n in more if merge.empty(n)]:
            rows = next(more[number], None)
            if rows is None:
                merge.wait(number, False)
                del more[number]
            else:
                merge.add(number, rows)
        merge.write()
