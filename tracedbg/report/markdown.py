"""The report as Markdown, for issues and wikis. Names from a trace stay text: they begin no code, link, table or HTML."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence

from tracedbg import rules
from tracedbg.describe import BytesRow, Words, headings, number_text
from tracedbg.report import Result, layout_notes, not_judged, verdict
from tracedbg.report.text import again, fold, source_text
from tracedbg.state import Finding
from tracedbg.text import clean, clean_path

# What Markdown, its dialects or HTML could act on. GitHub makes links of #12, @name, http:// and www. after it has resolved
# escapes and entities, but never in code. A bracket alone is harmless: a link needs what follows it.
_ACTIVE = re.compile(
    r"(?P<code>(?:\#[0-9]+|@(?=[A-Za-z0-9])|://|[Ww]{3}\.)+)"
    r"|(?P<hard>[&<`|\\*~$]|(?<=\])[(\[:]|^[-+#>=]|^[0-9]+(?=[.)])|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))"
)


def escape(text: str) -> str:
    """Text for a paragraph or a cell: shown as it is, not obeyed. It is one line."""
    return _ACTIVE.sub(_harmless, clean(text, 4096))


def _harmless(match: re.Match[str]) -> str:
    return f"`{match['code']}`" if match["code"] else "".join(f"&#{ord(ch)};" for ch in match["hard"])


def code(text: str) -> str:
    """A code span, not for cells of a table."""
    text = clean(text, 4096)
    if not text:
        return ""
    fence = "`" * (_longest(text) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") or text.strip(" ") != text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def block(lines: Iterable[str], language: str = "") -> list[str]:
    """A block of code."""
    body = [clean(line, 1 << 16) for line in lines]
    fence = "`" * max(3, *(_longest(line) + 1 for line in body)) if body else "```"
    return [fence + language, *body, fence]


def _longest(text: str) -> int:
    """The longest run of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)


def quote(word: str) -> str:
    """A word of a command line for a POSIX shell; $'...' where it holds what no terminal should get."""
    if clean(word, len(word)) == word:
        return shlex.quote(word)
    safe = "".join(ch if clean(ch) == ch and ch not in "\\'" else _bytes(ch) for ch in word)
    # A hex digit after \xHH is no part of it in bash and ksh, but is in some others: end the word and go on.
    return re.sub(r"(\\x[0-9a-f]{2})(?=[0-9a-fA-F])", r"\1'$'", f"$'{safe}'")


def _bytes(ch: str) -> str:
    """A character as \\xHH; Python keeps the bytes of a file name that are no UTF-8 as surrogates."""
    kept = "\udc80" <= ch <= "\udcff"
    return "".join(f"\\x{byte:02x}" for byte in ch.encode("utf-8", "surrogateescape" if kept else "replace"))


def command(words: Sequence[str], event: int) -> str:
    """The command line that shows an event; `words`: the inputs and their options, as they were given."""
    return " ".join(("tracedbg view", *map(quote, words), f"--at {event}"))


def finding_lines(finding: Finding, words: Words, command_line: str, at: int | None = None) -> Iterator[str]:
    """All that is said of a finding, under a heading."""
    rule = rules.finding_rule(finding, at)
    level = rules.finding_severity(finding, at)
    yield f"## {escape(f'{level}: {rules.rule_id(rule)}, {words.finding_place(finding)}')}"
    yield ""
    yield escape(words.finding_prose(finding, at))
    parts = words.finding_parts(finding, at)
    if parts:
        yield ""
        for part in parts:
            yield f"- {part.role}: {escape(f'{words.event_name(part.event)}: {part.text}')}"
    rows = words.table_rows(finding, at)
    if rows:
        yield from ("", f"{headings.BYTES.capitalize()}:", "")
        yield from _table(finding, words, rows)
    chain = words.finding_chain(finding, at)
    if len(chain) > 1:
        yield from ("", f"{headings.CHAIN.capitalize()}:", "")
        for number, step in enumerate(chain, 1):
            yield f"{number}. {escape(f'{words.event_name(step.event)}: {step.text}')}"
    yield ""
    yield f"- {headings.EVIDENCE}: {escape(words.evidence_text(finding, at))}"
    refs = rules.finding_refs(finding, at)
    if refs:
        yield f"- {headings.MANUAL}: {escape('; '.join((*refs[:-1], f'{refs[-1]} {rules.EDITIONS}')))}"
    for heading, ways in ((headings.PREVENTED, words.prevention(finding, at)), (headings.FIXES, rules.BY_RULE[rule].fixes)):
        if ways:
            yield f"- {heading}:"
            yield from (f"  - {escape(way)}" for way in ways)
    yield ""
    yield from block([command_line], "sh")


def one(finding: Finding, words: Words, inputs: Sequence[str]) -> str:
    """A finding alone, for a message; `inputs` as command() takes them."""
    lines = finding_lines(finding, words, command(inputs, finding.event))
    trace = clean_path(words.trace.path).rsplit("/", 1)[-1]
    return "\n".join([*lines, "", f"Trace: {code(trace)}"]) + "\n"


def _table(finding: Finding, words: Words, rows: Sequence[BytesRow]) -> Iterator[str]:
    own, now = words.table_heads(finding)
    yield f"| address | slot | {escape(own)} | {escape(now)} | |"
    yield "|---|---|---|---|---|"
    for row in rows:
        mark = words.row_mark(row)
        mark = f"**{mark}**" if row.differs else mark
        left = _value(row.own, row, words)
        right = _value(row.now, row, words) if row.overwritten else ""
        yield f"| `{row.addr:016x}` | {row.slot} | {left} | {right} | {mark} |"


def _value(value: int | None, row: BytesRow, words: Words) -> str:
    symbol = words.symbol(value) if row.slot == "rip" else None
    return f"`{number_text(value)}`" + (f" {escape(symbol)}" if symbol else "")


def render(result: Result, inputs: Sequence[str], *, fail_on: str = "error") -> Iterator[str]:
    """The lines of one trace's report. Equal findings are told once."""
    trace, words = result.trace, result.words
    yield f"# tracedbg: {code(clean_path(result.name))}"
    yield ""
    facts = [f"{trace.count:,} event{'' if trace.count == 1 else 's'}", f"{trace.cpus} CPU{'' if trace.cpus == 1 else 's'}"]
    source = source_text(result)
    facts += [f"from {escape(source)}"] if source else []
    facts += ["not finished by its writer"] if trace.unfinished else []
    yield ", ".join(facts)
    yield ""
    yield f"**Verdict:** {escape(verdict(result, fail_on))}"
    notes = (*layout_notes(trace), *not_judged(result.stats, trace.layout))
    if notes:
        yield ""
        yield from (f"- {escape(note)}" for note in notes)
    groups = fold(result)
    for group in groups[: result.limit]:
        first = group[0]
        yield ""
        yield from finding_lines(first, words, command(inputs, first.event), result.position)
        more = [again(result, group)] if len(group) > 1 else []
        more += ["A baseline accepts this finding."] if first.number in result.known else []
        for line in more:
            yield ""
            yield escape(line)
    omitted = result.lost if result.limit is None else result.lost + sum(map(len, groups[result.limit :]))
    if omitted:
        yield ""
        yield f"{omitted:,} more finding{' is' if omitted == 1 else 's are'} not shown"
