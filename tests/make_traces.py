"""Makes the traces in traces/.

`python tests/make_traces.py DATA [OUT]` makes those of the recorded data, `... --cases [OUT]` those of tests/cases.

DATA is the folder with qemu/ and symbols/. traces/README.md says what each trace shows. Same data, same bytes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from dumpjson import layout_of_dump, load

from tracedbg import formats
from tracedbg.commands.convert import code_addresses
from tracedbg.layout import Fidelity, Layout, from_toml, load_toml
from tracedbg.state import Kind
from tracedbg.symbols import Symbols
from tracedbg.trace import Trace
from tracedbg.writer import TraceWriter

USER = 'user = [["0x111000", "0x113000"]]\n'  # the guest's own user page, which no log tells


def istlab(data: Path, folder: str, *, user: bool = False) -> Trace:
    options = formats.ReaderOptions(layout=from_toml(USER, "user.toml") if user else None)
    return formats.open_input(str(data / "qemu" / folder / "qemu.log"), options=options)


def xen_layout(data: Path) -> Layout:
    preset = load_toml("xen")
    layout = layout_of_dump(data / "qemu/xen-nested/smp1-xnmi_mce_nmi.dump.json.gz")
    return replace(layout, regions=(*layout.regions, *preset.regions), names=preset.names)


def xen_symbols(data: Path) -> Symbols:
    return Symbols.load(str(data / "symbols/xen-syms-4.17-amd64.map.gz"))


def xen_log(data: Path) -> Trace:
    """The three lines of the log: an NMI, a machine check in it, an NMI after that one's IRET."""
    options = formats.ReaderOptions(layout=xen_layout(data))
    return formats.open_input(str(data / "qemu/xen-nested/smp1-xnmi_mce_nmi.log.gz"), options=options)


def xen_livelock(data: Path, writer: TraceWriter) -> None:
    """The log's deliveries with the returns that the debugger saw between and after them."""
    truth = load(data / "qemu/xen-nested/smp1-xnmi_mce_nmi.truth.json.gz")["truth"]
    symbols = xen_symbols(data)
    exit_rip = next(start for start, _, name in symbols if name == "restore_all_xen") + 0xA4
    with xen_log(data) as log:
        records = [bytes(log.events[i * 64 : i * 64 + 64]) for i in range(log.count)]
        kinds = [log.event(i).kind for i in range(log.count)]
        writer.layout = replace(log.layout, fidelity=log.layout.fidelity | Fidelity.RETURNS)
        writer.meta = dict(log.meta)
    writer.meta["fidelity"] = {
        **writer.meta["fidelity"],
        "returns": "from event 569 of the log on: every IRET of the hypervisor, seen by a debugger at its IRETQ",
    }
    at = 0

    def deliveries(count: int) -> None:
        nonlocal at
        while count or (at < len(records) and kinds[at] is not Kind.DELIVER):
            count -= kinds[at] is Kind.DELIVER
            writer.append(records[at])
            at += 1

    for step in truth:
        if step["kind"] == "enter":
            deliveries(1)
        elif step["kind"] == "exit":
            rip, cs, rflags, rsp, ss = (int(value, 16) for value in step["frame"][:5])
            # Xen keeps flags of its own in the upper half of the saved RFLAGS.
            writer.event(
                Kind.RETURN, cpu=0, rip=exit_rip, rsp=int(step["rsp"], 16), addr=rip, value=rsp, cs=cs, ss=ss,
                rflags=rflags & 0xFFFFFFFF,
            )  # fmt: skip


def linux_nested(data: Path) -> Trace:
    return formats.open_input(str(data / "qemu/linux/nest_plugin/excerpt.log"))


def linux_symbols(data: Path) -> Symbols:
    table = json.loads((data / "qemu/linux/nest_plugin/kallsyms.json").read_text())
    found = sorted((int(addr, 16), name) for name, addr in table.items() if int(addr, 16) > 1 << 63)
    ends = [addr for addr, _ in found[1:]] + [1 << 64]
    # The list names a few functions only: what lies far behind one of them is in another.
    return Symbols((addr, min(end, addr + 0x400), name) for (addr, name), end in zip(found, ends, strict=True))


def copy(trace: Trace, writer: TraceWriter) -> None:
    """All of a trace."""
    writer.cpus, writer.clock_hz = trace.cpus, trace.clock_hz
    writer.layout, writer.meta = trace.layout, trace.meta
    writer.payload(bytes(trace.payload))
    writer.append(trace.events)


def finish(path: Path, symbols: Symbols | None) -> None:
    """Add the symbols that the events of a trace need."""
    if symbols is None:
        return
    with Trace.open(path) as trace, TraceWriter(path, force=True) as writer:
        writer.symbols = symbols.subset(code_addresses(trace)).to_bytes()
        copy(trace, writer)


Maker = Callable[[Path], Trace]

TRACES: dict[str, tuple[Maker, Callable[[Path], Symbols] | None]] = {
    "xen-nmi-mce-nmi-log": (xen_log, xen_symbols),
    "fake-nmi-pic": (lambda d: istlab(d, "istlab-plugin/b_pic"), None),
    "nmi-int3-nmi": (lambda d: istlab(d, "istlab-plugin/a"), None),
    "nmi-int3-nmi-consumed": (lambda d: istlab(d, "istlab-plugin/g"), None),
    "nmi-int3-nmi-log": (lambda d: istlab(d, "istlab/a"), None),
    "nmi-latched": (lambda d: istlab(d, "istlab/a0"), None),
    "fake-mce-lapic": (lambda d: istlab(d, "istlab/c_lapic"), None),
    "mce-mcip-shutdown": (lambda d: istlab(d, "istlab/d_mcip"), None),
    "linux-nested-nmi": (linux_nested, linux_symbols),
    "syscall-gap-no-ist": (lambda d: istlab(d, "istlab/f_noist_ipi", user=True), None),
    "syscall-gap-ist": (lambda d: istlab(d, "istlab/f_ist_ipi", user=True), None),
    "double-fault": (lambda d: istlab(d, "istlab/x_df"), None),
}


# The most instructive of the written cases, as traces to open.
CASES = {
    "case-fake-nmi": "01-fake-nmi-then-nmi",
    "case-cve-2011-1898": "05a-msi-vector-17-shifted-return",
    "case-mc-after-mcip-cleared": "08a-mc-after-mcip-cleared",
    "case-cve-2015-5157": "11a-iret-fault-unblocks",
    "case-nmi-prologue-mc": "14a-nmi-mc-iret-nmi",
    "case-linux-nested-nmi": "14d-linux-nested-nmi-stores",
    "case-smi-with-iret": "15a-smi-with-iret-in-nmi-handler",
    "case-nmi-stuck": "21a-nmi-exit-enters-scheduler",
    "case-xsa-7": "23a-sysret-non-canonical-user-rsp",
    "case-xsa-260": "24a-mov-ss-syscall",
    "case-cve-2018-8897": "24c-mov-ss-int3-shared-stack",
    "case-vc-nmi-vc": "34-vc-nmi-vc",
    "case-neighbour": "37a-neighbour-by-delivery",
    "case-token-busy": "39a-token-left-busy-over-s3",
    "case-fred-nmi-bit": "42b-fred-nmi-bit-forgotten",
}


def make_cases(out: Path) -> None:
    for name, case in CASES.items():
        source = Path(__file__).parent / "cases" / f"{case}.case"
        with formats.open_input(str(source)) as trace, TraceWriter(out / f"{name}.tdbg", force=True) as writer:
            copy(trace, writer)


def main() -> None:
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent.parent / "traces"
    if sys.argv[1] == "--cases":
        make_cases(out)
    else:
        make_recorded(Path(sys.argv[1]), out)


def make_recorded(data: Path, out: Path) -> None:
    flagship = out / "xen-nmi-mce-nmi.tdbg"
    with TraceWriter(flagship, force=True) as writer:
        xen_livelock(data, writer)
    finish(flagship, xen_symbols(data))
    for name, (make, symbols) in TRACES.items():
        path = out / f"{name}.tdbg"
        with make(data) as trace, TraceWriter(path, force=True) as writer:
            copy(trace, writer)
        finish(path, symbols(data) if symbols else None)


if __name__ == "__main__":
    main()
