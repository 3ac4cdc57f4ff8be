"""Pictures of a screen: equal screens as equal files, which any viewer draws alike."""

from __future__ import annotations

import re

CELL = 12.2  # width of a character in the pictures
_BLANKS = re.compile(
    r'(?P<head><text [^>]*?)x="(?P<x>[0-9.]+)"(?P<middle>[^>]*?)textLength="(?P<length>[0-9.]+)"(?P<tail>[^>]*>)'
    r"(?P<blanks>(?:&#160;)+)(?=[^<])"
)


def tidy(svg: str) -> str:
    """A picture without random ids, fonts from elsewhere, and blanks that some viewers drop."""
    # Rich makes the ids of a picture from a checksum of its contents; a fixed one keeps the differences between versions small.
    found = re.search(r"terminal-\d+", svg)
    if found is not None:
        svg = svg.replace(found[0], "terminal-tracedbg")
    # The fonts would come from elsewhere; every viewer has a monospace one.
    svg = re.sub(r"\s*@font-face \{[^}]*\}", "", svg)
    # Some viewers drop the blanks at the beginning of a text, though they are no-break spaces: begin further right instead.
    return _BLANKS.sub(_shift, svg)


def _shift(match: re.Match[str]) -> str:
    blanks = match["blanks"].count("&#160;")
    x, length = float(match["x"]) + CELL * blanks, float(match["length"]) - CELL * blanks
    return f'{match["head"]}x="{x:.1f}"{match["middle"]}textLength="{length:.1f}"{match["tail"]}'
