"""The `*.dump.json` files of the nested runs as layouts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from tracedbg.layout import CpuTables, Idt, Layout, Tss


def load(path: Path) -> Any:
    """The JSON of a file, gzipped or not."""
    raw = path.read_bytes()
    return json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)


def layout_of_dump(path: Path) -> Layout:
    """TSS and IDT of each vCPU, with stacks."""
    tss: list[Tss] = []
    idts: list[Idt] = []
    cpus: list[CpuTables] = []
    for vcpu in sorted(load(path)["vcpus"], key=lambda v: v["cpu"]):
        tss.append(Tss.from_bytes(int(vcpu["tr_base"], 16), bytes.fromhex(vcpu["tss_hex"])))
        base = int(vcpu["idt_base"], 16)
        if all(i.base != base for i in idts):
            idts.append(Idt.from_bytes(base, bytes.fromhex(vcpu["idt_hex"])))
        cpus.append(CpuTables(len(tss) - 1, next(n for n, i in enumerate(idts) if i.base == base)))
    return Layout(tuple(tss), tuple(idts), tuple(cpus)).with_stacks()
