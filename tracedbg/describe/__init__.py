"""Events, frames, stacks and findings in words: the one voice of the command line and the screen."""

from __future__ import annotations

from tracedbg.describe.brief import BriefWords
from tracedbg.describe.chain import ChainStep
from tracedbg.describe.events import SHUTDOWN_WORDS
from tracedbg.describe.findings import SETTLE_WORDS
from tracedbg.describe.history import HistoryWords
from tracedbg.describe.names import UNKNOWN, hex_address, saved_word, slot_of, slots_text, word_name
from tracedbg.describe.overwrite import OVERWRITES
from tracedbg.describe.paragraph import EVIDENCE_WORDS, number_text
from tracedbg.describe.parts import Part
from tracedbg.describe.scan import ScanWords
from tracedbg.describe.state import STATUS_WORDS, StateWords, WordRow
from tracedbg.describe.values import BytesRow
from tracedbg.text import clean, wrap

__all__ = [
    "EVIDENCE_WORDS",
    "OVERWRITES",
    "SETTLE_WORDS",
    "SHUTDOWN_WORDS",
    "STATUS_WORDS",
    "UNKNOWN",
    "BytesRow",
    "ChainStep",
    "Part",
    "WordRow",
    "Words",
    "clean",
    "hex_address",
    "number_text",
    "saved_word",
    "slot_of",
    "slots_text",
    "word_name",
    "wrap",
]


class Words(HistoryWords, BriefWords, StateWords, ScanWords):
    """Says what a trace, its replay and its findings hold. Names come from `symbols`, or from the trace itself."""
