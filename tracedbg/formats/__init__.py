"""Foreign trace formats: recognising an input by its content and reading it into a native trace."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any, cast

from tracedbg import wire
from tracedbg.errors import FormatError, UsageError
from tracedbg.formats import registry
from tracedbg.formats.qemu import monitor as qemu_monitor
from tracedbg.formats.registry import NATIVE, Format, ReaderOptions, WriterOptions, output_format
from tracedbg.formats.source import PACKED, Input
from tracedbg.output import spool_error
from tracedbg.trace import Trace
from tracedbg.writer import TraceWriter

__all__ = ["NATIVE", "Format", "ReaderOptions", "WriterOptions", "open_input", "open_inputs", "output_format", "recognise"]


def recognise(source: Input, wanted: str | None = None) -> Format:
    """An input's format. Raises FormatError if it is none, UsageError if `wanted` does not exist."""
    if wanted is not None:
        return registry.input_format(wanted)
    if source.head.startswith(wire.MAGIC[: len(source.head)]):
        return registry.FORMATS[0]
    for form in registry.FORMATS:
        if form.reader is not None and registry.reader(form).sniff(source.head):
            return form
    if qemu_monitor.looks_like_monitor(source.head):
        raise FormatError(source.path, "QEMU monitor text, not a log: it goes with the log as --monitor", 0)
    if source.packed and source.head.startswith(PACKED):
        raise FormatError(source.path, "packed twice: unpack it once", 0)
    raise FormatError(source.path, "not a trace or log that this program reads (`tracedbg convert --list` has them)", 0)


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
        if form.name == NATIVE:
            return _open_native(inputs, options)
        registry.check_options(form, options)
        # The file lives as long as the trace's mapping of it; nothing is left behind.
        with tempfile.TemporaryFile() as file:
            writer = TraceWriter(cast(Any, file))
            _read(form, inputs, writer, options)
            writer.close()
            trace = Trace.from_file(cast(Any, file), paths[0], private=True)
            trace.foreign = form.name
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
    registry.check_options(registry.FORMATS[0], options)
    if len(inputs) > 1:
        raise UsageError("several files are only read together when they are the thread files of one foreign log")
    if source.is_file and source.raw_bytes >= 8 and source.bytes == source.raw_bytes:
        return Trace.open(source.path)
    if not source.head.startswith(wire.MAGIC[: len(source.head)]):
        raise FormatError(source.path, "not a tracedbg trace (wrong magic)", 0)  # before all of it is copied
    try:
        with tempfile.TemporaryFile() as file:
            for piece in source.chunks():
                file.write(piece)
            file.flush()
            return Trace.from_file(cast(Any, file), source.path)
    except OSError as error:
        raise spool_error(source.path, error) from None


def _read(form: Format, inputs: list[Input], writer: TraceWriter, options: ReaderOptions) -> None:
    reader = registry.reader(form)
    for source in inputs[1:]:
        if not reader.sniff(source.head):
            raise FormatError(source.path, f"not of the format of {inputs[0].path} ({form.name})", 0)
    reader.read(inputs, writer, options)
