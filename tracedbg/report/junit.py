"""The report as JUnit XML: a test suite for each trace, a test case for each rule, so that a CI knows them from run to run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from xml.sax.saxutils import escape, quoteattr

from tracedbg import rules
from tracedbg.replay import Replay
from tracedbg.report import Result, text, verdict
from tracedbg.state import Finding, Rule
from tracedbg.text import clean, clean_path

MAX_LINE = 1 << 14  # characters
WHOLE = "trace"  # the test case that fails where the trace cannot be read or judged


def content(lines: Sequence[str]) -> str:
    """Lines as character data in ASCII. What XML 1.0 cannot hold is gone with the control characters."""
    return _ascii(escape("\n".join(clean(line, MAX_LINE) for line in lines)))


def attribute(value: object) -> str:
    """A value with its quotes."""
    return _ascii(quoteattr(clean(str(value), MAX_LINE)))


def _ascii(value: str) -> str:
    return value.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _element(name: str, attributes: Mapping[str, object], lines: Sequence[str] = ()) -> str:
    head = " ".join((name, *(f"{key}={attribute(value)}" for key, value in attributes.items())))
    return f"<{head}>{content(lines)}</{name}>" if lines else f"<{head}/>"


class Form:
    """Gathers traces; end() gives the document, whose first line tells the totals."""

    def __init__(self, fail_on: str = "error") -> None:
        self._fail_on = fail_on
        self._suites: list[str] = []
        self._totals = {"tests": 0, "failures": 0, "errors": 0}

    def trace(self, result: Result, replay: Replay, inputs: Sequence[str]) -> Iterator[str]:
        """Take one trace; nothing is written before the end."""
        name = clean_path(result.name)
        suite = _Suite(name)
        if result.unknown:
            suite.case(WHOLE, _element("error", {"type": "unknown", "message": "; ".join(result.unknown)}), "errors")
        else:
            suite.case(WHOLE)
        folded = text.fold(result)
        groups: dict[Rule, list[list[Finding]]] = {}
        for group in folded:
            groups.setdefault(rules.finding_rule(group[0], result.position), []).append(group)
        shown = {group[0].number for group in folded[: result.limit]}
        for info in rules.CATALOGUE:
            self._rule(suite, result, info.id, groups.get(info.rule, []), shown)
        properties = {
            "events": result.trace.count,
            "cpus": result.trace.cpus,
            "source": text.source_text(result),
            "verdict": verdict(result, self._fail_on),
        }
        self._add(suite, properties, list(text.render(result, fail_on=self._fail_on)))
        return iter(())

    def failed(self, name: str, error: str) -> Iterator[str]:
        """A trace that could not be read."""
        suite = _Suite(clean_path(name))
        suite.case(WHOLE, _element("error", {"type": "unreadable", "message": error}), "errors")
        self._add(suite, {}, [])
        return iter(())

    def end(self) -> Iterator[str]:
        """The document, in ASCII."""
        yield '<?xml version="1.0" encoding="UTF-8"?>'
        yield _element("testsuites", {"name": "tracedbg", **self._totals})[:-2] + ">"
        yield from self._suites
        yield "</testsuites>"

    def _rule(self, suite: _Suite, result: Result, name: str, groups: list[list[Finding]], shown: set[int]) -> None:
        """One rule: it fails by what no baseline accepts and reaches --fail-on; the rest is told."""
        if not groups:
            suite.case(name)
            return
        lines: list[str] = []
        for group in groups:
            if group[0].number in shown:
                known = "known " if group[0].number in result.known else ""
                head, *rest = result.words.finding_text(group[0], result.position, fixes=False)
                lines += [f"{known}{head}", *rest, *([text.again(result, group)] if len(group) > 1 else []), ""]
        lines = lines[:-1] or ["not shown"]
        reaching = [group for group in groups if rules.rank(result.severity(group[0])) >= rules.rank(self._fail_on)]
        new = [group for group in reaching if group[0].number not in result.known]
        if new:
            first = new[0][0]
            about = {"type": result.severity(first), "message": result.words.finding_line(first, result.position)}
            suite.case(name, _element("failure", about, lines), "failures")
        elif reaching:
            told = f"the baseline accepts {sum(map(len, reaching)):,}"
            suite.case(name, _element("skipped", {"message": told}) + _element("system-out", {}, lines), "skipped")
        else:
            suite.case(name, _element("system-out", {}, lines))

    def _add(self, suite: _Suite, properties: Mapping[str, object], output: list[str]) -> None:
        for key in self._totals:
            self._totals[key] += suite.counts[key]
        self._suites.append("\n".join(suite.lines(properties, output)))


class _Suite:
    """The test cases of one trace."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
        self._cases: list[str] = []

    def case(self, name: str, inside: str = "", count: str | None = None) -> None:
        """A test case; `count`: what it is counted as, None: passed."""
        self.counts["tests"] += 1
        if count is not None:
            self.counts[count] += 1
        empty = _element("testcase", {"classname": self.name, "name": name})
        self._cases.append(f"    {empty[:-2]}>{inside}</testcase>" if inside else f"    {empty}")

    def lines(self, properties: Mapping[str, object], output: list[str]) -> Iterator[str]:
        """The suite, in the order that the schemas of CI systems want."""
        yield f"  {_element('testsuite', {'name': self.name, **self.counts})[:-2]}>"
        if properties:
            yield "    <properties>"
            yield from (f"      {_element('property', {'name': key, 'value': value})}" for key, value in properties.items())
            yield "    </properties>"
        yield from self._cases
        if output:
            yield f"    {_element('system-out', {}, output)}"
        yield "  </testsuite>"
