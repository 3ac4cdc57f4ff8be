"""The report as one HTML page that needs nothing else: no network, no script, every name from a trace escaped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tracedbg import __version__, rules
from tracedbg.describe import headings, number_text
from tracedbg.replay import Replay
from tracedbg.report import Result, html_stacks, html_timeline, layout_notes, not_judged, verdict
from tracedbg.report.html_style import POLICY, STYLE
from tracedbg.report.html_text import items, mono, table, tag, text
from tracedbg.report.markdown import command
from tracedbg.report.text import again, fold, source_text
from tracedbg.state import Finding
from tracedbg.text import clean_path

MAX_STACKS = 25  # findings of a trace whose stacks are shown; the others have the command that shows them


class Form:
    """Writes the page as the traces come."""

    def __init__(self, fail_on: str = "error") -> None:
        self._fail_on = fail_on
        self._traces = 0

    def trace(self, result: Result, replay: Replay, inputs: Sequence[str]) -> Iterator[str]:
        """One trace; moves the view of the replay."""
        yield from self._begin(result.name)
        place = f"t{self._traces}"
        groups = fold(result)
        shown = groups[: result.limit]
        anchors = [f"{place}-f{number}" for number in range(1, len(shown) + 1)]
        yield from _headline(result, self._fail_on)
        yield from html_timeline.figure(result, replay, shown, anchors)
        if shown:
            yield from _contents(result, shown, anchors)
        omitted = result.lost if result.limit is None else result.lost + sum(map(len, groups[result.limit :]))
        if omitted:
            yield f"<p>{omitted:,} more finding{' is' if omitted == 1 else 's are'} not shown</p>"
        for number, (group, anchor) in enumerate(zip(shown, anchors, strict=True)):
            first = group[0]
            yield f'<article id="{anchor}" class="{result.severity(first)}">'
            yield from _finding(result, group)
            if number < MAX_STACKS:
                yield from _stacks(result, replay, first)
            yield tag("pre", tag("code", text(command(inputs, first.event))))
            yield "</article>"
        yield "</section>"

    def failed(self, name: str, error: str) -> Iterator[str]:
        """A trace that could not be read."""
        yield from self._begin(name)
        yield tag("h1", text(clean_path(name)))
        yield tag("p", text(error), "verdict error")
        yield "</section>"

    def end(self) -> Iterator[str]:
        """The end of the page."""
        yield tag("footer", f"tracedbg {text(__version__)}")
        yield "</body>"
        yield "</html>"

    def _begin(self, name: str) -> Iterator[str]:
        """The head of the page before the first trace, and the section of a trace."""
        if not self._traces:
            yield "<!DOCTYPE html>"
            yield '<html lang="en">'
            yield "<head>"
            yield '<meta charset="utf-8"/>'
            yield f'<meta http-equiv="Content-Security-Policy" content="{text(POLICY)}"/>'
            yield '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
            yield tag("title", text(f"tracedbg: {clean_path(name)}"))
            yield f"<style>{STYLE}</style>"
            yield "</head>"
            yield "<body>"
        self._traces += 1
        yield f'<section id="t{self._traces}">'


def _headline(result: Result, fail_on: str) -> Iterator[str]:
    trace = result.trace
    yield tag("h1", text(clean_path(result.name)))
    facts = [f"{trace.count:,} event{'' if trace.count == 1 else 's'}", f"{trace.cpus} CPU{'' if trace.cpus == 1 else 's'}"]
    source = source_text(result)
    facts += [f"from {source}"] if source else []
    facts += ["not finished by its writer"] if trace.unfinished else []
    facts += [f"as known after event {result.position - 1}"] if result.position else []
    facts += ["as known at the start"] if result.position == 0 else []
    yield tag("p", text(", ".join(facts)), "dim")
    worst = next((level for level, number in result.counts(known=False).items() if number), "clean")
    kind = "unknown" if result.unknown and not result.reaches(fail_on) else worst
    yield tag("p", text(f"verdict: {verdict(result, fail_on)}"), f"verdict {kind}")
    notes = (*layout_notes(trace), *not_judged(result.stats, trace.layout))
    if notes:
        yield from items("ul", notes)


def _contents(result: Result, groups: Sequence[Sequence[Finding]], anchors: Sequence[str]) -> Iterator[str]:
    """The findings in a table, each with a link to where it is told."""
    rows = []
    for group, anchor in zip(groups, anchors, strict=True):
        first = group[0]
        level = result.severity(first)
        known = "known " if first.number in result.known else ""
        link = f'<a href="#{anchor}">{text(rules.rule_id(rules.finding_rule(first, result.position)))}</a>'
        where = text(result.words.finding_place(first))
        rows.append(("", (tag("span", text(known + level), level), link, where, f"{len(group):,}")))
    yield from table("", ("severity", "finding", "first at", "times"), rows)


def _finding(result: Result, group: Sequence[Finding]) -> Iterator[str]:
    """All that is said of a finding."""
    first = group[0]
    words, at = result.words, result.position
    rule = rules.finding_rule(first, at)
    known = first.number in result.known
    head = f"{'known ' if known else ''}{result.severity(first)}: {rules.rule_id(rule)}, {words.finding_place(first)}"
    yield tag("h2", text(head))
    yield tag("p", text(words.finding_prose(first, at)))
    if len(group) > 1:
        yield tag("p", text(again(result, list(group))))
    if known:
        yield tag("p", "A baseline accepts this finding.")
    parts = words.finding_parts(first, at)
    if parts:
        yield "<dl>"
        for part in parts:
            yield f"<dt>{text(part.role)}</dt><dd>{text(f'{words.event_name(part.event)}: {part.text}')}</dd>"
        yield "</dl>"
    yield from _bytes(result, first)
    chain = words.finding_chain(first, at)
    if len(chain) > 1:
        yield tag("h3", text(headings.CHAIN.capitalize()))
        yield from items("ol", (f"{words.event_name(step.event)}: {step.text}" for step in chain))
    yield tag("h3", text(headings.WHY.capitalize()))
    yield tag("p", text(rules.BY_RULE[rule].why))
    yield "<dl>"
    yield f"<dt>{text(headings.EVIDENCE)}</dt><dd>{text(words.evidence_text(first, at))}</dd>"
    refs = rules.finding_refs(first, at)
    if refs:
        yield f"<dt>{text(headings.MANUAL)}</dt><dd>{text('; '.join((*refs[:-1], f'{refs[-1]} {rules.EDITIONS}')))}</dd>"
    yield "</dl>"
    for heading, ways in ((headings.PREVENTED, words.prevention(first, at)), (headings.FIXES, rules.BY_RULE[rule].fixes)):
        if ways:
            yield tag("h3", text(heading.capitalize()))
            yield from items("ul", ways)


def _bytes(result: Result, finding: Finding) -> Iterator[str]:
    """The frame's words before and after."""
    words = result.words
    rows = words.table_rows(finding, result.position)
    if not rows:
        return
    yield tag("h3", text(headings.BYTES.capitalize()))
    cells = []
    for row in rows:
        own, now = (_value(result, row.slot, value) for value in (row.own, row.now))
        mark = text(words.row_mark(row))
        mark = tag("b", mark) if row.differs else mark
        shown = (mono(f"{row.addr:016x}"), text(row.slot), own, now if row.overwritten else "", mark)
        cells.append(("hit" if row.differs else "", shown))
    yield from table("", ("address", "slot", *words.table_heads(finding), ""), cells)


def _value(result: Result, slot: str, value: int | None) -> str:
    name = result.words.symbol(value) if slot == "rip" else None
    return mono(number_text(value)) + (f" {text(name)}" if name else "")


def _stacks(result: Result, replay: Replay, finding: Finding) -> Iterator[str]:
    """The stacks just after the event at which it was raised."""
    position = finding.event + 1
    replay.seek(position if result.position is None else min(position, result.position))
    yield tag("h3", text(f"The stacks after {result.words.event_name(finding.event)}"))
    yield from html_stacks.render(replay, result.words, finding)
