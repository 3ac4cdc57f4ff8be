"""check_exception and Servicing lines of a QEMU log, and the `v=` lines that they belong to."""

from __future__ import annotations

from collections import Counter

from tracedbg.formats.qemu.items import NO_OLD

STALE = 2  # `v=` lines after which such a line belongs to none any more
KEEP = 8


class Causes:
    """Lines that wait for their `v=` line."""

    def __init__(self, counts: Counter[str]) -> None:
        self.counts = counts
        self.heads = 0  # `v=` lines so far
        self.checks: list[tuple[int, int, int]] = []  # old, new, heads before it
        self.services: list[tuple[int, int, int]] = []  # vector, source, heads before it

    @property
    def waiting(self) -> bool:
        """Whether a line waits that the next `v=` line may not be the one of."""
        return bool(self.checks or self.services)

    def check(self, old: int, new: int, heads: int) -> None:
        """A check_exception line, `heads` of the `v=` lines before it."""
        self.checks.append((old, new, heads))
        del self.checks[:-KEEP]

    def service(self, vector: int, source: int, heads: int) -> None:
        """A Servicing line for an interrupt from `source` (enum tdb_source)."""
        self.counts["serviced"] += 1
        self.services.append((vector, source, heads))
        del self.services[:-KEEP]

    def resolve(self, vector: int, soft: bool) -> tuple[int, int, int]:
        """What the lines that belong to a `v=` line (counted already) say: old, the source serviced, new."""
        old, serviced, cause = -1, 0, -1
        if not soft:
            for n in range(len(self.checks) - 1, -1, -1):
                was, new, _ = self.checks[n]
                # A fault during the delivery of a fault is delivered as #DF.
                if new == vector or (vector == 8 and was != NO_OLD):
                    old, cause = was, new
                    del self.checks[n]
                    break
            if old < 0:
                for n in range(len(self.services) - 1, -1, -1):
                    if self.services[n][0] == vector:
                        serviced = self.services[n][1]
                        del self.services[n]
                        break
        newest = self.heads - STALE
        if self.checks:
            self.checks = [c for c in self.checks if c[2] > newest]
        if self.services:
            self.services = [s for s in self.services if s[2] > newest]
        if serviced:
            self.counts["serviced_delivered"] += 1
        return old, serviced, cause
