"""What is said where there is nothing to show: no finding, no place for a frame."""

from __future__ import annotations

from tracedbg.describe.names import Names
from tracedbg.state import Stats


class ScanWords(Names):
    """Says what a scan did not find, and why frames have no place."""

    def nothing_found(self, stats: Stats | None, reasons: tuple[str, ...] = ()) -> list[str]:
        """The scan is over and found nothing; `reasons`: why there may be something all the same."""
        count = self.trace.count
        lines = [f"The scan of {'the only event' if count == 1 else f'all {count:,} events'} found nothing: no findings."]
        if stats is not None:
            all_of = stats.deliveries + stats.legacy
            what = "1 delivery was" if all_of == 1 else f"{all_of:,} deliveries were"
            lines.append(f"{stats.judged:,} of {what} judged." if all_of else "It has no deliveries to judge.")
        if reasons:
            lines += ["It is not known to be clean:", *(f"- {reason}" for reason in reasons)]
        return lines

    def no_place(self) -> list[str]:
        """Why frames cannot be placed on a stack, and what would help; empty if the layout has what it takes."""
        layout = self.trace.layout
        tss, idt = bool(layout.tss), any(table.gates for table in layout.idts)
        fred = any(cpu.fred is not None and cpu.fred.on and cpu.fred.config is not None for cpu in layout.cpus)
        if fred or (tss and idt):  # FRED needs neither table
            return []
        lacks = "no IDT is" if tss else "no TSS is" if idt else "neither TSS nor IDT is"
        tells = {
            "no IDT is": "only the IDT says which vectors switch to an IST stack",
            "no TSS is": "only the TSS says where the IST stacks and RSP0 begin",
        }.get(lacks, "only these say on which stack a delivery stores its frame")
        return [
            f"Frames cannot be placed: {lacks} known,",
            f"and {tells}.",
            "Open the trace with --layout FILE or --monitor FILE (see `tracedbg help layout`).",
        ]
