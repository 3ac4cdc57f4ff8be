"""The report as text, to read and to paste into a mail."""

from __future__ import annotations

from collections.abc import Iterator

from tracedbg import rules
from tracedbg.describe import SETTLE_WORDS
from tracedbg.report import Result, layout_notes, not_judged, verdict
from tracedbg.state import Finding, Rule, Settle
from tracedbg.text import WIDTH, clean, clean_path, wrap

AGAIN = 5  # further events of equal findings that are named


def render(result: Result, *, verbose: bool = False, fail_on: str = "error") -> Iterator[str]:
    """The lines of one trace's report."""
    yield headline(result)
    for note in (*layout_notes(result.trace), *not_judged(result.stats, result.trace.layout)):
        yield from wrap(note, "  ", WIDTH)
    groups = fold(result)
    for group in groups[: result.limit]:
        yield ""
        yield from _group(result, group, verbose)
    yield from _omitted(result, groups)
    if verbose:
        yield ""
        yield from stats_lines(result)
    yield ""
    yield f"verdict: {verdict(result, fail_on)}"


def render_short(result: Result) -> Iterator[str]:
    """The headline and a line or two for each finding, above a state."""
    yield headline(result)
    groups = fold(result)
    for group in groups[: result.limit]:
        yield from finding_lines(result, group)
    yield from _omitted(result, groups)


def _omitted(result: Result, groups: list[list[Finding]]) -> Iterator[str]:
    omitted = result.lost if result.limit is None else result.lost + sum(map(len, groups[result.limit :]))
    if omitted:
        yield ""
        yield f"{omitted:,} more finding{' is' if omitted == 1 else 's are'} not shown"


def headline(result: Result) -> str:
    """One line: name, events, CPUs, source."""
    trace = result.trace
    cpus = f"{trace.cpus} CPU{'' if trace.cpus == 1 else 's'}"
    events = f"{trace.count:,} event{'' if trace.count == 1 else 's'}"
    text = f"{clean_path(result.name)}: {events}, {cpus}"
    source = source_text(result)
    if source:
        text += f", from {source}"
    if trace.unfinished:
        text += ", not finished by its writer"
    return text


def source_text(result: Result) -> str:
    """What recorded the trace, as far as META says."""
    value = result.trace.meta.get("source")
    if isinstance(value, str):
        return clean(value)
    table = value if isinstance(value, dict) else {}
    form = table.get("format", result.trace.meta.get("format"))
    tool = table.get("tool")
    return ", ".join(clean(part) for part in (form, tool) if isinstance(part, str))


def fold(result: Result) -> list[list[Finding]]:
    """Equal findings together; what is new before what is known, errors first, then in the order of the first."""
    groups: dict[tuple[object, ...], list[Finding]] = {}
    for finding in result.findings:
        rule = rules.finding_rule(finding, result.position)
        key = (rule, result.severity(finding), finding.number in result.known, result.signature(finding))
        groups.setdefault(key, []).append(finding)
    return sorted(groups.values(), key=lambda group: result.order(group[0]))


def _group(result: Result, group: list[Finding], verbose: bool) -> Iterator[str]:
    first = group[0]
    words, at = result.words, result.position
    known = first.number in result.known
    if verbose or (result.severity(first) == "error" and not known and not _told_before(result, first)):
        head, *rest = words.finding_text(first, at, fixes=verbose)
        yield f"known {head}" if known else head
        yield from rest
        yield from _again(result, group)
    else:
        yield from finding_lines(result, group)
        yield from wrap(words.evidence_text(first, at), "  evidence: ", WIDTH)


def _told_before(result: Result, finding: Finding) -> bool:
    """A loop whose victim, writer and consumer the finding of the consumed frame tells already."""
    if finding.rule is not Rule.RESUME_LOOP or finding.victim is None:
        return False
    return any(
        f.rule is Rule.FRAME_CONSUMED_CORRUPT and f.consumer == finding.consumer and f.victim is not None
        and f.victim.entry == finding.victim.entry
        for f in result.findings
    )  # fmt: skip


def finding_lines(result: Result, group: list[Finding]) -> Iterator[str]:
    """A group of equal findings in short."""
    first = group[0]
    rule = rules.rule_id(rules.finding_rule(first, result.position))
    level = f"known {result.severity(first)}" if first.number in result.known else result.severity(first)
    line = result.words.finding_line(first, result.position)
    yield from wrap(line, f"{level}: {rule}, ", WIDTH, "  ")
    yield from _again(result, group)


def _again(result: Result, group: list[Finding]) -> Iterator[str]:
    if len(group) > 1:
        yield from wrap(again(result, group), "  ", WIDTH)


def again(result: Result, group: list[Finding]) -> str:
    """How often a group of equal findings came, and where: `3 times, first at event 5; again at 9, 12`."""
    words, first = result.words, group[0]
    others = ", ".join(words.event_name(f.event).removeprefix("event ") for f in group[1 : 1 + AGAIN])
    more = f" and {len(group) - 1 - AGAIN:,} more" if len(group) > 1 + AGAIN else ""
    cpus = len({f.cpu for f in group})
    where = f" on {cpus:,} CPUs" if cpus > 1 else ""
    return f"{len(group):,} times{where}, first at {words.event_name(first.event)}; again at {others}{more}"


def stats_lines(result: Result) -> Iterator[str]:
    """Counters of the replay, for -v."""
    s = result.stats
    yield (
        f"deliveries: {s.deliveries:,} ({s.judged:,} placed, {s.unjudged:,} not placed, {s.legacy:,} not in long mode, "
        f"{s.failed:,} failed); returns: {s.returns:,}; writes: {s.writes:,}; gaps: {s.gaps:,}"
    )
    ist = [f"{result.words.stack_name(n)} {count:,}" for n, count in enumerate(s.ist_deliveries) if n and count]
    yield f"on IST stacks: {', '.join(ist) or 'none'}; without: {s.ist_deliveries[0]:,}"
    settled = [f"{SETTLE_WORDS[Settle(n)]} {count:,}" for n, count in enumerate(s.settled) if count]
    yield from wrap(f"frames on IST stacks settled by: {', '.join(settled) or 'nothing'}", "", WIDTH, "  ")
    yield f"overwritten frames whose fate is open at the end: {s.open_at_end:,}"
    if s.bad_events:
        yield f"events that make no sense: {s.bad_events:,}, the first is event {s.first_bad}"
    if s.pages_forgotten:
        yield f"stack pages forgotten for want of room: {s.pages_forgotten:,}"
