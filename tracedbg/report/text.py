"""The report as text, to read and to paste into a mail."""

from __future__ import annotations

from collections.abc import Iterator

from tracedbg import rules
from tracedbg.describe import SETTLE_WORDS
from tracedbg.report import Result, layout_notes, not_judged, verdict
from tracedbg.state import Evidence, Finding, Frame, Rule, Settle
from tracedbg.text import WIDTH, clean, clean_path, wrap

FoldKey = tuple[object, ...]


def render(result: Result, *, verbose: bool = False, fail_on: str = "error") -> Iterator[str]:
    """The lines of one trace's report."""
    yield headline(result)
    for note in (*layout_notes(result.trace), *not_judged(result.stats, result.trace.layout)):
        yield from wrap(note, "  ", WIDTH)
    groups = fold(result)
    groups.sort(key=lambda group: (-rules.rank(result.severity(group[0])), group[0].number))
    for group in groups:
        yield ""
        yield from _group(result, group, verbose)
    if result.omitted:
        yield ""
        yield f"{result.omitted:,} more finding{' is' if result.omitted == 1 else 's are'} not shown"
    if verbose:
        yield ""
        yield from stats_lines(result)
    yield ""
    yield f"verdict: {verdict(result, fail_on)}"


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
    """Findings that differ only in when they happened, together, in the order of the first."""
    groups: dict[FoldKey, list[Finding]] = {}
    for finding in result.shown:
        groups.setdefault(_fold_key(result, finding), []).append(finding)
    return list(groups.values())


def _fold_key(result: Result, finding: Finding) -> FoldKey:
    # Where it was interrupted tells apart what is known to have happened, not what is only inferred: that folds by stack.
    inferred = rules.finding_evidence(finding, result.position) <= Evidence.INFERRED

    def place(frame: Frame | None) -> tuple[object, ...]:
        if frame is None:
            return ()
        if inferred:
            return (frame.vector, frame.source, frame.ist)
        found = None if frame.saved.rip is None else result.words.symbols.lookup(frame.saved.rip)
        return (frame.vector, frame.source, frame.ist, found[0] if found is not None else frame.saved.rip)

    rule = rules.finding_rule(finding, result.position)
    frame = finding.writer or finding.victim
    stack = frame.hi if frame is not None and rule is not Rule.USER_STACK else None
    lone = finding.detail if frame is None else None
    event = result.words.event(finding.event) if frame is None else None
    what = (event.kind, event.arg, event.source) if event is not None else None
    return (rule, result.severity(finding), finding.cpu, stack, lone, what, place(finding.victim), place(finding.writer))


def _group(result: Result, group: list[Finding], verbose: bool) -> Iterator[str]:
    first = group[0]
    words, at = result.words, result.position
    if verbose or (result.severity(first) == "error" and not _told_before(result, first)):
        yield from words.finding_text(first, at, fixes=verbose)
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
        for f in result.shown
    )  # fmt: skip


def finding_lines(result: Result, group: list[Finding]) -> Iterator[str]:
    """A group of equal findings in short."""
    first = group[0]
    rule = rules.rule_id(rules.finding_rule(first, result.position))
    line = result.words.finding_line(first, result.position)
    yield from wrap(line, f"{result.severity(first)}: {rule}, ", WIDTH, "  ")
    yield from _again(result, group)


def _again(result: Result, group: list[Finding]) -> Iterator[str]:
    words, first = result.words, group[0]
    if len(group) > 1:
        others = ", ".join(words.event_name(f.event).removeprefix("event ") for f in group[1:6])
        more = f" and {len(group) - 6:,} more" if len(group) > 6 else ""
        times = f"{len(group):,} times, first at {words.event_name(first.event)}; again at {others}{more}"
        yield from wrap(times, "  ", WIDTH)


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
        yield f"events that make no sense: {s.bad_events:,}"
    if s.pages_forgotten:
        yield f"stack pages forgotten for want of room: {s.pages_forgotten:,}"
