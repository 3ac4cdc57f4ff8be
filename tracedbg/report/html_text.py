"""Text and elements of the HTML page. Everything that is not a constant of this program goes through here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from tracedbg.text import clean

LIMIT = 1 << 14  # characters of one piece of text


def text(value: object) -> str:
    """Text as it is shown: no markup, no control character, ASCII only."""
    return escape(clean(str(value), LIMIT)).encode("ascii", "xmlcharrefreplace").decode("ascii")


def tag(name: str, content: str, kind: str = "") -> str:
    """An element around what is HTML already."""
    return f'<{name} class="{kind}">{content}</{name}>' if kind else f"<{name}>{content}</{name}>"


def items(name: str, lines: Iterable[object]) -> Iterator[str]:
    """A list (`ul` or `ol`) of plain text."""
    yield f"<{name}>"
    yield from (tag("li", text(line)) for line in lines)
    yield f"</{name}>"


def table(caption: str, heads: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> Iterator[str]:
    """A table of cells that are HTML already; a row is its class and its cells, one cell goes over the whole width."""
    yield '<div class="scroll"><table>'
    if caption:
        yield tag("caption", text(caption))
    yield tag("thead", tag("tr", "".join(tag("th", text(head)) for head in heads)))
    yield "<tbody>"
    for kind, cells in rows:
        if len(cells) == 1:
            yield tag("tr", f'<td class="dim" colspan="{len(heads)}">{cells[0]}</td>')
        else:
            yield tag("tr", "".join(tag("td", cell) for cell in cells), kind)
    yield "</tbody></table></div>"


def mono(value: object) -> str:
    """A number or an address."""
    return tag("span", text(value), "mono")
