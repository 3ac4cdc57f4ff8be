"""What is switched off: sources and CPUs that the list of events leaves out, and vectors that are only noise."""

from __future__ import annotations

from dataclasses import dataclass

from tracedbg import x86
from tracedbg.filter import Filter, Filters, Tally
from tracedbg.layout import Layout
from tracedbg.state import Source
from tracedbg.tui.search import NO_SYSCALL, SOURCE_KINDS

NOISE_SHARE = 0.9  # of the deliveries
NOISE_VECTORS = 4  # more that make up that much together are no noise but what the trace is about
SUBJECTS = frozenset({x86.NMI, x86.DOUBLE_FAULT, x86.MACHINE_CHECK})


@dataclass(frozen=True, slots=True)
class Hidden:
    """Switched off; what has no source, vector or known CPU stays."""

    sources: frozenset[Source] = frozenset()
    cpus: frozenset[int] = frozenset()
    vectors: frozenset[int] = frozenset()

    def filters(self) -> Filters:
        """What lets all the others pass."""
        result = []
        if self.sources:
            result.append(Filter(kinds=SOURCE_KINDS, sources=self.sources, invert=True))
        if self.cpus:
            result.append(Filter(cpus=self.cpus, invert=True))
        if self.vectors:
            result.append(Filter(SOURCE_KINDS, self.vectors, NO_SYSCALL, invert=True))
        return tuple(result)

    def text(self) -> str:
        """`2 CPUs, 1 vector`; empty: nothing is hidden."""
        counts = ((len(self.sources), "source"), (len(self.cpus), "CPU"), (len(self.vectors), "vector"))
        return ", ".join(f"{n} {name}{'' if n == 1 else 's'}" for n, name in counts if n)


def noise_vectors(tally: Tally, layout: Layout) -> frozenset[int]:
    """The fewest vectors that make up more than NOISE_SHARE of the deliveries, if few do, without those on an IST stack."""
    left = NOISE_SHARE * tally.deliveries
    noise: set[int] = set()
    for vector, count in sorted(tally.vectors.items(), key=lambda item: (-item[1], item[0])):
        noise.add(vector)
        left -= count
        if left < 0:
            break
    ist = {vector for idt in layout.idts for vector, gate in idt.gates.items() if gate.ist}
    return frozenset(noise) - SUBJECTS - ist if left < 0 and len(noise) <= NOISE_VECTORS else frozenset()
