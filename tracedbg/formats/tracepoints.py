"""What Linux's tracepoints tell and cannot know, in words: the same for a trace.dat and for text."""

from __future__ import annotations

from collections.abc import Callable

from tracedbg import x86

IN_NMI = "in NMI context: of an NMI, #MC, #DB, INT3 of the kernel, or #DF"

FIDELITY = {
    "rsp": "no tracepoint has RSP, CS, SS or RFLAGS",
    "returns": "IRETs are not traced: a tracepoint *_exit comes before it, with exit work and perhaps another task in between",
    "stores": "stores are not traced",
    "deliveries": "only those with a tracepoint in their handler: IPIs and LAPIC interrupts (irq_vectors), device interrupts"
    " (irq, one for each round of an IRQ's handlers; the vector is not in it), page faults; the time is that of the tracepoint",
    "nmi": "nmi_handler comes after a handler ran, once for each registered one, and not for the vector: a mark, no delivery;"
    " how NMIs nest is not traced",
    "mc": "mce_record comes later, from a worker: a mark that says where and when",
}
KVM = {
    "cpu": "CPUs of the host have their own numbers; a guest's CPU is a CPU of its own behind them, one a thread of KVM (vcpus)",
    "vmexit": "addr is the guest's RIP; the reason is the vendor's number",
    "guest": "what KVM injects and the CPU then delivers, at the VM entry, failed where the next VM exit says that it was not;"
    " CR2, the length of an INT and everything that the guest does itself are not traced, nor interrupts that are posted or"
    " virtual, nor whether it goes to a nested guest",
}
CONTEXT = "the flag NMI of a record is also set in #MC, #DB, INT3 of the kernel and #DF: a mark before the delivery says so"


def nmi_text(handler: str | None, handled: int | None) -> str:
    """nmi_handler: it comes after a handler of the NMI ran, once for each that is registered."""
    if handler is None:
        return "NMI: a handler ran"
    said = "" if handled is None else f", handled {handled}" if handled else ", not its NMI"
    return f"NMI: its handler {handler} ran{said}"


def mce_text(field: Callable[[str], int | None]) -> str:
    """mce_record: it comes later, from a worker. `field`: a number of the record, None if it is not there."""
    status, cs, ip = field("mcgstatus"), field("cs"), field("ip")
    kind = "a machine check" if status is None else "#MC" if status & x86.MCIP else "machine check without #MC (polled or CMCI)"
    words = [f"{kind}, recorded later"]
    if (cpu := field("cpu")) is not None:
        words.append(f"CPU {cpu}")
    if cs is not None and ip:
        words.append(f"RIP {cs:#x}:{ip:#x}")
    words += [f"{name} {value:#x}" for name, value in (("MCG_STATUS", status), ("status", field("status"))) if value is not None]
    if (bank := field("bank")) is not None:
        words.append(f"bank {bank}")
    if tsc := field("tsc"):
        words.append(f"TSC {tsc}")
    return ", ".join(words)
