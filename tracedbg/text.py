"""The one place where text from a trace, a map file or a file name is made fit for a terminal or a page."""

from __future__ import annotations

import textwrap
import unicodedata

MAX_NAME = 160
WIDTH = 78  # of text for mails

# Categories that a terminal may act on or that hide text: controls, formats (bidi marks), surrogates, private use,
# unassigned, line and paragraph separators.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def clean(text: str, limit: int = MAX_NAME) -> str:
    """Text without control characters and escapes (`?` stands for each), at most `limit` characters long."""
    if len(text) > limit:
        text = text[: max(limit - 3, 0)] + "..."
    if text.isascii() and text.isprintable():
        return text
    return "".join("?" if unicodedata.category(ch) in _UNSAFE else ch for ch in text)


def clean_path(path: str) -> str:
    """A file name as the user may have typed it; long ones stay whole."""
    return clean(path, 4096)


def wrap(text: str, first: str, width: int = WIDTH, rest: str | None = None) -> list[str]:
    """Text in lines: the first begins with `first`, the others with `rest` (default: blanks of that length)."""
    return textwrap.wrap(
        text,
        width,
        initial_indent=first,
        subsequent_indent=" " * len(first) if rest is None else rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
