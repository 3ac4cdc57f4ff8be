"""The report as annotations of GitHub Actions: workflow commands, one a line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tracedbg import rules
from tracedbg.describe import headings
from tracedbg.replay import Replay
from tracedbg.report import Result, verdict
from tracedbg.report.markdown import command
from tracedbg.report.text import again, fold
from tracedbg.state import Finding
from tracedbg.text import clean, clean_path

LEVELS = {"error": "error", "warning": "warning", "note": "notice"}
MAX_TITLE = 255  # characters
MAX_MESSAGE = 1 << 14  # characters of a line; GitHub keeps 64 KiB of a message


def data(text: str) -> str:
    """A message as the runner reads it back."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def value(text: str) -> str:
    """A property as the runner reads it back."""
    return data(text).replace(":", "%3A").replace(",", "%2C")


def annotation(level: str, title: str, lines: Sequence[str]) -> str:
    """One command. `lines` come from traces: they are made fit first, so that only our own line ends are left."""
    text = "\n".join(clean(line, MAX_MESSAGE) for line in lines)
    return f"::{LEVELS[level]} title={value(clean(title, MAX_TITLE))}::{data(text)}"


class Form:
    """Annotations as the traces come: the worst findings first, as GitHub shows only the first ten of a level."""

    def __init__(self, fail_on: str = "error") -> None:
        self._fail_on = fail_on

    def trace(self, result: Result, replay: Replay, inputs: Sequence[str]) -> Iterator[str]:
        """The annotations of one trace; none for a clean one."""
        name, groups = clean_path(result.name), fold(result)
        for group in groups[: result.limit]:
            yield self._finding(result, group, command(inputs, group[0].event), name)
        omitted = result.lost if result.limit is None else result.lost + sum(map(len, groups[result.limit :]))
        if omitted:
            text = f"{omitted:,} more finding{' is' if omitted == 1 else 's are'} not shown"
            yield annotation("note", f"tracedbg: {name}", [text])
        said = verdict(result, self._fail_on)
        if result.unknown and not result.reaches(self._fail_on):
            yield annotation("warning", f"tracedbg: unknown: {name}", [said])
        elif not result.findings and said != "clean":
            yield annotation("note", f"tracedbg: {name}", [said])

    def failed(self, name: str, error: str) -> Iterator[str]:
        """A trace that could not be read."""
        yield annotation("error", f"tracedbg: unreadable: {clean_path(name)}", [error])

    def end(self) -> Iterator[str]:
        """Nothing more."""
        return iter(())

    def _finding(self, result: Result, group: list[Finding], view: str, name: str) -> str:
        first = group[0]
        words, at = result.words, result.position
        known = first.number in result.known
        level = result.severity(first)
        title = f"{'known ' if known else ''}{level}: {rules.rule_id(rules.finding_rule(first, at))}: {name}"
        chain = words.finding_chain(first, at)
        lines = [
            words.finding_line(first, at),
            *([again(result, group)] if len(group) > 1 else []),
            *(f"{n}. {words.event_name(step.event)}: {step.text}" for n, step in enumerate(chain, 1) if len(chain) > 1),
            f"{headings.EVIDENCE}: {words.evidence_text(first, at)}",
            view,
        ]
        return annotation("note" if known else level, title, lines)
