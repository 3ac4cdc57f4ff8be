"""What stands above the sections of an explanation, in every form of it."""

from __future__ import annotations

PARTS = "who"
CHAIN = "how it came about"
BYTES = "the bytes, before and after"
EVIDENCE = "evidence"
MANUAL = "manual"
PREVENTED = "would have prevented it"
FIXES = "known ways out"
WHY = "why it matters"

# Of the bytes that were overwritten.
DIFFERS = "differs"
SAME = "same value"
NOT_OVERWRITTEN = "not overwritten"
