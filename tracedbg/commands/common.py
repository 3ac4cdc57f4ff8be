"""What several verbs share: input options, opening a trace, output that is whole or not there, progress."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, BinaryIO, TextIO

from tracedbg.errors import FormatError, UsageError
from tracedbg.text import clean, clean_path

if TYPE_CHECKING:
    from tracedbg.formats import Format
    from tracedbg.growing import Growing
    from tracedbg.layout import Layout
    from tracedbg.replay import Replay
    from tracedbg.symbols import Symbols
    from tracedbg.trace import Trace

STDOUT = ("-", "/dev/stdout")  # as the name of an output

CLEAN, FINDINGS, USAGE, UNKNOWN, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 3, 130, 141


def input_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say how an input is read."""
    group = parser.add_argument_group("input")
    group.add_argument(
        "--monitor", metavar="FILE", action="append", default=[], help="text of QEMU's monitor with the TSS and IDT (repeatable)"
    )
    group.add_argument(
        "--layout", metavar="FILE|PRESET", action="append", default=[],
        help="layout as a TOML file, or a preset: linux, xen (repeatable; `tracedbg help layout`)",
    )  # fmt: skip
    group.add_argument("--symbols", metavar="MAP", help="an ELF image (vmlinux), System.map, kallsyms, nm output or Xen's map")
    group.add_argument("--from", dest="from_format", metavar="FMT", help="input format, instead of recognising it by content")
    group.add_argument(
        "--stores", metavar="LO-HI", action="append", default=[], type=address_range,
        help="the source records every store into this range (repeatable)",
    )  # fmt: skip
    group.add_argument(
        "--cpu-hz", metavar="HZ", type=frequency, default=0, help="TSC frequency, for a trace without it, as 2400M or 2.4G"
    )
    group.add_argument("--vendor", choices=("vmx", "svm"), help="whose VM exits a Xen trace has (default: recognised)")
    group.add_argument("--keep-marks", action="store_true", help="of a trace.dat: tracepoints that are no CPU events, as marks")


def threads_argument(parser: argparse.ArgumentParser) -> None:
    """--threads, for verbs that otherwise take each file as a trace of its own."""
    parser.add_argument(
        "--threads", action="store_true", help="the files are one recording, one file a thread (QEMU's -d int,tid)"
    )


def read_once(paths: Sequence[str]) -> None:
    """Refuse inputs that name standard input twice."""
    if paths.count("-") > 1:
        raise UsageError("standard input can be read only once")


def recordings(args: argparse.Namespace) -> list[list[str]]:
    """The files of each recording."""
    read_once(args.traces)
    return [args.traces] if args.threads else [[path] for path in args.traces]


def address_range(text: str) -> tuple[int, int]:
    """`LO-HI` of hex numbers."""
    low, dash, high = text.partition("-")
    try:
        lo, hi = int(low, 16), int(high, 16)
    except ValueError:
        lo = hi = 0
    if not dash or not 0 <= lo < hi <= 1 << 64:
        raise argparse.ArgumentTypeError(f"{clean(text)!r} is not LO-HI in hex")
    return lo, hi


def frequency(text: str) -> int:
    """Hz: a number, with K, M or G behind it."""
    digits = text[:-1] if text[-1:] in ("K", "M", "G") else text
    scale = {"K": 10**3, "M": 10**6, "G": 10**9}.get(text[-1:], 1)
    whole, dot, part = digits.partition(".")
    hz = 0
    if digits.isascii() and whole.isdecimal() and len(digits) <= 20 and (part.isdecimal() or not dot):
        hz = int(whole) * scale + int(part or 0) * scale // 10 ** len(part)
    if not 0 < hz < 1 << 63:
        raise argparse.ArgumentTypeError(f"{clean(text)!r} is not a frequency, like 2400000000, 2400M or 2.4G")
    return hz


class Inputs:
    """The input options, checked once: layouts and symbols are read before any trace."""

    def __init__(self, args: argparse.Namespace) -> None:
        from tracedbg.layout import load_toml

        self.from_format: str | None = args.from_format
        self.monitor: tuple[str, ...] = tuple(args.monitor)
        self.stores: tuple[tuple[int, int], ...] = tuple(args.stores)
        self.cpu_hz: int = args.cpu_hz
        self.vendor: str | None = args.vendor
        self.keep_marks: bool = args.keep_marks
        self.layout: Layout | None = None
        for name in args.layout:
            layout = load_toml(name)
            self.layout = layout if self.layout is None else merge_layouts(self.layout, layout)
        self.symbols: Symbols | None = None
        if args.symbols is not None:
            from tracedbg.symbols import Symbols

            self.symbols = Symbols.load(args.symbols)

    def open(self, paths: Sequence[str]) -> Trace:
        """Open one recording. A native trace takes the layout that was given on top of its own."""
        from tracedbg import formats

        options = formats.ReaderOptions(
            from_format=self.from_format, layout=self.layout, monitor=self.monitor, stores=self.stores,
            cpu_hz=self.cpu_hz, vendor=self.vendor, keep_marks=self.keep_marks,
        )  # fmt: skip
        trace = formats.open_inputs(list(paths), options=options)
        if trace.foreign is None:
            self._add(trace)
        return trace

    def follow(self, paths: Sequence[str]) -> Growing:
        """Open a native trace that is still being written."""
        from tracedbg import formats
        from tracedbg.growing import Growing

        if len(paths) > 1 or paths[0] == "-" or self.monitor or self.from_format not in (None, formats.NATIVE):
            raise UsageError("--follow takes one native trace")
        return Growing(paths[0], self._add)

    def _add(self, trace: Trace) -> None:
        """What a reader would have taken from the options."""
        if self.layout is not None:
            trace.layout = merge_layouts(trace.layout, self.layout).with_stacks()
            trace.cpus = max(trace.cpus, len(trace.layout.cpus))
        if self.stores:
            from tracedbg.layout import REGION_STORES, Region

            added = tuple(Region(lo, min(hi, (1 << 64) - 1), REGION_STORES) for lo, hi in self.stores)
            trace.layout = replace(trace.layout, regions=(*trace.layout.regions, *added))


def merge_layouts(base: Layout, more: Layout) -> Layout:
    """`more` on top of `base`: its tables and names win, those that only base has stay, ranges are added."""
    from tracedbg.layout import CpuTables

    tss_given, idts_given, held = {t.base for t in more.tss}, {i.base for i in more.idts}, set(base.regions)
    tss = (*more.tss, *(t for t in base.tss if t.base not in tss_given))
    idts = (*more.idts, *(i for i in base.idts if i.base not in idts_given))
    tss_at = {t.base: n for n, t in enumerate(tss)}
    idt_at = {i.base: n for n, i in enumerate(idts)}
    cpus = []
    for number in range(max(len(base.cpus), len(more.cpus))):
        loaded_tss = loaded_idt = fred = None
        for layout in (base, more):
            tables = layout.cpus[number] if number < len(layout.cpus) else CpuTables()
            if tables.tss is not None:
                loaded_tss = tss_at[layout.tss[tables.tss].base]
            if tables.idt is not None:
                loaded_idt = idt_at[layout.idts[tables.idt].base]
            fred = tables.fred or fred
        cpus.append(CpuTables(loaded_tss, loaded_idt, fred))
    told = {r.hi for r in more.regions if not r.assumed}
    kept = (r for r in base.regions if not (r.assumed and r.hi in told))  # bounds that are known now
    regions = (*kept, *(r for r in more.regions if r not in held))
    names = {**base.names, **more.names}
    return replace(base, tss=tss, idts=idts, cpus=tuple(cpus), regions=regions, names=names)


def position_of(at: str, trace: Trace) -> int:
    """The position that --at names: N is the state after event N."""
    if at in ("start", "end"):
        return 0 if at == "start" else trace.count
    if at.startswith("#") and at[1:].isascii() and at[1:].isdecimal() and len(at) <= 11:
        found = trace.find_source_index(int(at[1:]))
        if found is None:
            raise UsageError(f"--at {at}: {clean_path(trace.path)} has no event with that number of the source")
        return found + 1
    if not (at.isascii() and at.isdecimal()) or len(at) > 12:
        raise UsageError("--at takes the number of an event, the source's number as `#571`, `start` or `end`")
    if int(at) >= trace.count:
        last = f"the last is {trace.count - 1}" if trace.count else "it has none"
        raise UsageError(f"--at {at}: {clean_path(trace.path)} has no such event ({last})")
    return int(at) + 1


class Progress:
    """A line on stderr while something takes long; silent if stderr is not a terminal."""

    def __init__(self, what: str) -> None:
        self.what = clean_path(what)
        self.active = sys.stderr.isatty()
        self._shown = False
        self._next = time.monotonic() + 0.5  # what is done before that needs no line

    def at(self, done: int, total: int) -> None:
        """Show how far it is."""
        if not self.active or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + 0.1
        self._shown = True
        percent = 100 * done // max(total, 1)
        sys.stderr.write(f"\r\x1b[K{self.what}: {done:,} of {total:,} events ({percent}%)")
        sys.stderr.flush()

    def done(self) -> None:
        """Take the line away."""
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._shown = False


def scan(replay: Replay, what: str) -> None:
    """The forward pass, with progress."""
    progress = Progress(what)
    try:
        while replay.scan(1 << 20):
            progress.at(replay.scanned, replay.count)
    finally:
        progress.done()


def check_output(path: str, force: bool) -> None:
    """Refuse an output that exists before any work is done."""
    from tracedbg.output import output_place

    if path not in STDOUT:
        output_place(path, force)


@contextlib.contextmanager
def text_output(path: str | None, force: bool) -> Iterator[TextIO]:
    """stdout, a file that appears when it is whole, or a device or FIFO as it is."""
    if path is None or path in STDOUT:
        yield sys.stdout
        return
    from tracedbg.output import create_beside, output_place

    place = output_place(path, force)
    temporary = None
    try:
        if place is None:
            binary: BinaryIO = open(path, "wb")  # noqa: SIM115 (closed with its wrapper)
        else:
            binary, temporary = create_beside(place)
        with io.TextIOWrapper(binary, encoding="utf-8", newline="\n") as file:
            yield file
        if temporary is not None and place is not None:
            os.replace(temporary, place)
            temporary = None
    except OSError as error:
        raise _cannot_write(path, error) from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


@contextlib.contextmanager
def new_file(path: str, force: bool) -> Iterator[str]:
    """The name of a file to write, which becomes `path` when it is whole; a device or FIFO is written to then."""
    from tracedbg.output import create_beside, output_place

    place = output_place(path, force)
    temporary = None
    try:
        if place is None:
            file, temporary = create_beside(os.path.join(tempfile.gettempdir(), "tracedbg"))
        else:
            file, temporary = create_beside(place)
        file.close()
        yield temporary
        if place is not None:
            os.replace(temporary, place)
            temporary = None
            return
        with open(temporary, "rb") as whole, open(path, "wb") as out:
            shutil.copyfileobj(whole, out)
    except OSError as error:
        raise _cannot_write(path, error) from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def check_directory(path: str, force: bool, form: Format) -> None:
    """Refuse an output directory that exists and is not empty: with `force` too, unless it holds what the format's writer
    makes, and nothing else."""
    from tracedbg.output import os_error

    if not path:
        raise UsageError("the name of the output is empty")
    if not os.path.lexists(path):
        return
    if not os.path.isdir(path) or os.path.islink(path):
        raise FormatError(path, "is there and no directory")
    try:
        names = os.listdir(path)
        if names and not _is_written(path, names, dict(form.parts)):
            raise UsageError(f"{path} holds other things than a trace: not overwritten")
    except OSError as error:
        raise os_error(path, error) from None
    if names and not force:
        raise UsageError(f"{path} exists; --force overwrites it")


def _is_written(path: str, names: Sequence[str], parts: dict[str, bytes]) -> bool:
    """Whether every file of a directory begins as those that a writer makes, and the first of them is there."""
    for name in names:
        begin = parts.get(name, parts["*"])
        place = os.path.join(path, name)
        if not stat.S_ISREG(os.lstat(place).st_mode):
            return False
        with open(place, "rb") as file:
            if file.read(len(begin)) != begin:
                return False
    return next(iter(parts)) in names


@contextlib.contextmanager
def new_directory(path: str, force: bool, form: Format) -> Iterator[str]:
    """The name of an empty directory to fill, which becomes `path` when it is whole."""
    check_directory(path, force, form)
    target = os.path.abspath(path)
    temporary = old = None
    try:
        temporary = tempfile.mkdtemp(prefix=f".{os.path.basename(target)[:40]}.", dir=os.path.dirname(target))
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o777 & ~umask)
        yield temporary
        check_directory(path, force, form)  # again: that may have taken long
        if os.path.isdir(target) and os.listdir(target):
            old = tempfile.mkdtemp(prefix=f".{os.path.basename(target)[:40]}.", dir=os.path.dirname(target))
            os.replace(target, old)
            os.replace(temporary, target)
        else:
            os.replace(temporary, target)
        temporary = None
    except OSError as error:
        raise _cannot_write(path, error) from None
    finally:
        if old is not None and not os.path.lexists(target):
            with contextlib.suppress(OSError):
                os.replace(old, target)
        for left in (temporary, old):
            if left is not None:
                shutil.rmtree(left, ignore_errors=True)


def _cannot_write(path: str, error: OSError) -> Exception:
    if error.errno == errno.EPIPE:
        return error
    return FormatError(path, (error.strerror or str(error)).lower())


def message(text: str, more: Iterable[str] = ()) -> None:
    """One line for the user, on stderr; what cannot be said there is not worth an error. `more`: lines below it."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"tracedbg: {clean(text, 4096)}\n")
        sys.stderr.writelines(f"    {line}\n" for line in more)
