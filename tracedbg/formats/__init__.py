"""Foreign trace formats: recognising an input by its content and reading it into a native trace."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, cast

from tracedbg import wire
from tracedbg.errors import FormatError, UsageError
from tracedbg.formats import qemu_monitor
from tracedbg.formats.source import Input
from tracedbg.layout import Layout
from tracedbg.text import clean
from tracedbg.trace import Trace
from tracedbg.writer import TraceWriter

NATIVE = "tracedbg"
CASE = "case"
XENTRACE = "xentrace"
OUTPUTS = (NATIVE, CASE)

# Name -> module with sniff() and read(); a module is imported when its turn comes.
_MODULES = {
    XENTRACE: "tracedbg.formats.xentrace",
    CASE: "tracedbg.formats.case",
    "qemu-int": "tracedbg.formats.qemu_log",
}


@dataclass(frozen=True, slots=True)
class ReaderOptions:
    """What the user gives a reader beside the input itself.

    `monitor`: monitor texts for the layout (instead of those found beside the log); `stores`: address ranges whose
    software stores the source records completely; `discover`: look for layout files beside the input. `cpu_hz` (0: not
    known) and `vendor` (vmx, svm): of the CPU that a Xen trace is from.
    """

    from_format: str | None = None
    layout: Layout | None = None
    monitor: tuple[str, ...] = ()
    stores: tuple[tuple[int, int], ...] = ()
    symbols: bytes = b""
    discover: bool = True
    cpu_hz: int = 0
    vendor: str | None = None


class Reader(Protocol):
    """What a format module offers."""

    def sniff(self, head: bytes) -> bool:
        """Whether an input that begins so is of this format."""

    def read(self, inputs: Sequence[Input], writer: TraceWriter, options: ReaderOptions) -> None:
        """Read the inputs (several: the threads of one run) into the writer. Raises FormatError."""


def names() -> tuple[str, ...]:
    """Names for --from."""
    return (NATIVE, *_MODULES)


def output_format(path: str, wanted: str | None = None) -> str:
    """The format to write: `wanted`, or by the suffix of the file. Raises UsageError if `wanted` does not exist."""
    if wanted is None:
        return CASE if path.endswith(".case") else NATIVE
    if wanted not in OUTPUTS:
        raise UsageError(f"no output format {clean(wanted)!r} (known: {', '.join(OUTPUTS)})")
    return wanted


def recognise(source: Input, wanted: str | None = None) -> str:
    """The name of an input's format. Raises FormatError if it is none, UsageError if `wanted` does not exist."""
    if wanted is not None:
        if wanted not in names():
            raise UsageError(f"no input format {wanted!r} (known: {', '.join(names())})")
        return wanted
    if source.head.startswith(wire.MAGIC[: len(source.head)]):
        return NATIVE
    for name in _MODULES:
        if _module(name).sniff(source.head):
            return name
    if qemu_monitor.looks_like_monitor(source.head):
        raise FormatError(source.path, "QEMU monitor text, not a log: it goes with the log as --monitor", 0)
    known = "a QEMU -d int log, a xentrace file, a case file, a native trace"
    raise FormatError(source.path, f"not a trace or log that this program reads ({known})", 0)


def open_input(path: str, *, from_format: str | None = None, options: ReaderOptions | None = None) -> Trace:
    """Open a native trace, or read a foreign one into a temporary native trace. `-` is standard input.

    The trace's `foreign` is the name of the foreign format; None: it is a native one.
    """
    return open_inputs([path], from_format=from_format, options=options)


def open_inputs(paths: Sequence[str], *, from_format: str | None = None, options: ReaderOptions | None = None) -> Trace:
    """As open_input, for one recording that lies in several files (one a thread)."""
    options = options or ReaderOptions()
    inputs = _open_all(paths)
    try:
        form = recognise(inputs[0], from_format or options.from_format)
        if form != XENTRACE and (options.cpu_hz or options.vendor):
            raise UsageError("--cpu-hz and --vendor belong to a trace of Xen's xentrace")
        if form == NATIVE:
            return _open_native(inputs, options)
        # The file lives as long as the trace's mapping of it; nothing is left behind.
        with tempfile.TemporaryFile() as file:
            writer = TraceWriter(cast(Any, file))
            _read(form, inputs, writer, options)
            writer.close()
            trace = Trace.from_file(cast(Any, file), paths[0])
            trace.foreign = form
            return trace
    finally:
        for source in inputs:
            source.close()


def _open_all(paths: Sequence[str]) -> list[Input]:
    if not paths:
        raise UsageError("no input")
    inputs: list[Input] = []
    try:
        for path in paths:
            inputs.append(Input(path))
    except BaseException:
        for source in inputs:
            source.close()
        raise
    return inputs


def _open_native(inputs: list[Input], options: ReaderOptions) -> Trace:
    source = inputs[0]
    if options.monitor:
        raise UsageError("--monitor belongs to the log of an emulator; a native trace takes --layout")
    if len(inputs) > 1:
        raise UsageError("several files are only read together when they are the thread files of one foreign log")
    if source.is_file and source.raw_bytes >= 8 and source.bytes == source.raw_bytes:
        return Trace.open(source.path)
    if not source.head.startswith(wire.MAGIC[: len(source.head)]):
        raise FormatError(source.path, "not a tracedbg trace (wrong magic)", 0)  # before all of it is copied
    with tempfile.TemporaryFile() as file:
        for piece in source.chunks():
            file.write(piece)
        file.flush()
        return Trace.from_file(cast(Any, file), source.path)


def _read(form: str, inputs: list[Input], writer: TraceWriter, options: ReaderOptions) -> None:
    reader = _module(form)
    for source in inputs[1:]:
        if not reader.sniff(source.head):
            raise FormatError(source.path, f"not of the format of {inputs[0].path} ({form})", 0)
    reader.read(inputs, writer, options)


def _module(name: str) -> Reader:
    return cast(Reader, import_module(_MODULES[name]))
