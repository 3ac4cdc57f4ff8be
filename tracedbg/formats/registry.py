"""The formats: what each is called, who reads and who writes it. A module is imported when its turn comes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from tracedbg.errors import UsageError
from tracedbg.formats.source import Input
from tracedbg.layout import Layout
from tracedbg.text import clean

if TYPE_CHECKING:
    from tracedbg.symbols import Symbols
    from tracedbg.trace import Trace
    from tracedbg.writer import TraceWriter

NATIVE = "tracedbg"


@dataclass(frozen=True, slots=True)
class Format:
    """One format. `reader` and `writer` are modules (Reader, Writer); the native one is read by trace.py, written by writer.py.

    `suffixes`: an output of such a name is of this format. `extra`: of the package, that the writer needs. `options`: fields
    of ReaderOptions, beside those that every reader takes, that this reader knows. `parts`: of a directory, the names
    of its files (`*`: all others), the first of them always there, and how each begins: one with anything else is never replaced.
    """

    name: str
    what: str
    reader: str | None = None
    writer: str | None = None
    suffixes: tuple[str, ...] = ()
    extra: str | None = None
    text: bool = False
    directory: bool = False
    parts: tuple[tuple[str, bytes], ...] = ()
    options: tuple[str, ...] = ()

    @property
    def reads(self) -> bool:
        """Whether it can be an input."""
        return self.reader is not None or self.name == NATIVE

    @property
    def writes(self) -> bool:
        """Whether it can be an output."""
        return self.writer is not None or self.name == NATIVE


# Asked in this order whose an input is: those with a magic number first, the looser ones last.
FORMATS = (
    Format(
        NATIVE, "native: events, layout, memory, symbols and what the source could not know", suffixes=(".tdbg",),
        options=("stores",),
    ),
    Format(
        "xentrace", "binary file of Xen's xentrace, 3.2 and later", "tracedbg.formats.xentrace.read", options=("cpu_hz", "vendor")
    ),
    Format("perf-data", "perf.data with Intel PT and Event Trace", "tracedbg.formats.pt.perf_data", options=("cpu_hz",)),
    Format(
        "trace-dat", "trace.dat of trace-cmd, version 6 and 7 (Linux's own tracing)", "tracedbg.formats.tracedat.read",
        options=("cpu_hz", "keep_marks"),
    ),
    Format(
        "vmcore", "ELF dump of QEMU's dump-guest-memory: the frames of one instant", "tracedbg.formats.vmcore.read"
    ),
    Format(
        "case", "text: events, layout, prose and expectations in one file", "tracedbg.formats.case.read",
        "tracedbg.formats.case.write", suffixes=(".case",), text=True,
        options=("monitor", "stores"),  # refused by the reader: it has its own layout
    ),
    Format(
        "jsonl", "text: JSON Lines, a header and then an event a line, for scripts", "tracedbg.formats.jsonl.read",
        "tracedbg.formats.jsonl.write", suffixes=(".jsonl",), text=True, options=("stores",),
    ),
    Format(
        "qemu-int", "log of qemu-system-x86_64 -d int, one file or one a thread", "tracedbg.formats.qemu.log",
        options=("monitor", "stores"),
    ),
    Format(
        "ctf", "CTF 1.8 for Babeltrace, Trace Compass: a directory with a stream a CPU", writer="tracedbg.export.ctf",
        suffixes=(".ctf",), directory=True, parts=(("metadata", b"/* CTF 1.8"), ("*", b"\xc1\x1f\xfc\xc1")),
    ),
    Format(
        "intel-pt", "raw Intel PT (AUX) data with Event Trace, one file a CPU", "tracedbg.formats.pt.intel_pt",
        options=("cpu_hz",),
    ),
    Format(
        "ftrace-text", "text of perf script, trace-cmd report, or ftrace's own trace file", "tracedbg.formats.ftrace.text",
        options=("cpu_hz",),
    ),
    Format(
        "perfetto", "Perfetto's protobuf: frames as slices a stack, findings, flows", writer="tracedbg.export.perfetto",
        suffixes=(".pftrace", ".perfetto-trace"), extra="perfetto",
    ),
    Format(
        "chrome-json", "the same as JSON of Chrome's trace viewer: Perfetto, Speedscope", writer="tracedbg.export.chrome",
        suffixes=(".chrome.json",), text=True,
    ),
    Format(
        "sqlite", "database: events, frames with their ends, findings (`tracedbg help sqlite`)",
        writer="tracedbg.export.sqlite", suffixes=(".sqlite", ".db"),
    ),
    Format(
        "parquet", "Apache Parquet: the same as a directory of three columnar files",
        writer="tracedbg.export.parquet", suffixes=(".parquet",), extra="parquet", directory=True,
        parts=(("_tracedbg.json", b"{"), ("*", b"PAR1")),
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ReaderOptions:
    """What the user gives a reader beside the input itself.

    `monitor`: monitor texts for the layout (instead of those found beside the log); `stores`: address ranges whose
    software stores the source records completely; `discover`: look for layout files beside the input. `cpu_hz` (0: not
    known) and `vendor` (vmx, svm): of the CPU that a Xen trace is from. `keep_marks`: of a trace of an operating system, what is
    no event of the CPU, as marks.
    """

    from_format: str | None = None
    layout: Layout | None = None
    monitor: tuple[str, ...] = ()
    stores: tuple[tuple[int, int], ...] = ()
    symbols: bytes = b""
    discover: bool = True
    cpu_hz: int = 0
    vendor: str | None = None
    keep_marks: bool = False


@dataclass(frozen=True, slots=True)
class WriterOptions:
    """What a writer is given beside the trace. `names`: the symbols of the output, as trace.symbols has them; `symbols`: all
    that are known; `progress`: to be called with events done and their number."""

    names: bytes
    symbols: Symbols | None
    progress: Callable[[int, int], None]


class Reader(Protocol):
    """What the module of a foreign format that is read offers."""

    def sniff(self, head: bytes) -> bool:
        """Whether an input that begins so is of this format."""

    def read(self, inputs: Sequence[Input], writer: TraceWriter, options: ReaderOptions) -> None:
        """Read the inputs (several: the threads of one run) into the writer. Raises FormatError, UsageError."""


class Writer(Protocol):
    """What the module of a format that is written offers."""

    def write(self, trace: Trace, path: str, options: WriterOptions) -> None:
        """Write the empty file (or into the empty directory) `path`. Raises UsageError; an OSError is the caller's."""


# What an option is called on the command line, and whose it is.
_OPTIONS = {
    "monitor": "--monitor belongs to the log of an emulator; this trace takes --layout",
    "stores": "--stores belongs to a source that records stores",
    "cpu_hz": "--cpu-hz belongs to a trace whose times are the TSC",
    "vendor": "--vendor belongs to a trace of Xen's xentrace",
    "keep_marks": "--keep-marks belongs to a trace of Linux's own tracing",
}


def check_options(form: Format, options: ReaderOptions) -> None:
    """Refuse what a reader does not know. Raises UsageError."""
    for name, said in _OPTIONS.items():
        if getattr(options, name) and name not in form.options:
            raise UsageError(f"{form.name}: {said}")


def input_names() -> tuple[str, ...]:
    """Names for --from."""
    return tuple(form.name for form in FORMATS if form.reads)


def output_names() -> tuple[str, ...]:
    """Names for --to."""
    return tuple(form.name for form in FORMATS if form.writes)


def input_format(name: str) -> Format:
    """The format that is read by this name. Raises UsageError."""
    for form in FORMATS:
        if form.reads and form.name == name:
            return form
    raise UsageError(f"no input format {clean(name)!r} (known: {', '.join(input_names())})")


def output_format(path: str, wanted: str | None = None) -> Format:
    """The format to write: `wanted`, or by the suffix of the file. Raises UsageError if `wanted` does not exist."""
    if wanted is None:
        return next((form for form in FORMATS if form.writes and path.endswith(form.suffixes or ("\0",))), FORMATS[0])
    for form in FORMATS:
        if form.writes and form.name == wanted:
            return form
    raise UsageError(f"no output format {clean(wanted)!r} (known: {', '.join(output_names())})")


def reader(form: Format) -> Reader:
    """The module that reads a foreign format."""
    assert form.reader is not None
    return cast(Reader, importlib.import_module(form.reader))


def writer(form: Format) -> Writer:
    """The module that writes a format. Raises UsageError if what it needs is not installed."""
    assert form.writer is not None
    try:
        return cast(Writer, importlib.import_module(form.writer))
    except ModuleNotFoundError as error:
        if form.extra is None or (error.name or "").startswith("tracedbg"):
            raise
        raise UsageError(f"--to {form.name} needs more: pip install 'tracedbg[{form.extra}]'") from None
