"""The report as SARIF 2.1.0 (an OASIS standard), for code scanning: one run of all traces, each trace an artifact of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote

from tracedbg import __version__, rules
from tracedbg.catalogue import Info
from tracedbg.describe import ChainStep, Words
from tracedbg.replay import Replay
from tracedbg.report import Result, json_report, layout_notes, not_judged, verdict
from tracedbg.report.markdown import escape
from tracedbg.report.text import again, fold, source_text
from tracedbg.state import Finding, Known
from tracedbg.text import clean

VERSION = "2.1.0"
SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
FINGERPRINT = "tracedbgSignature/v1"
MAX_EVENTS = 100  # of equal findings, named one by one

_RULES = list(rules.CATALOGUE)
_INDEX = {info.rule: number for number, info in enumerate(_RULES)}
# Of the JSON form: what a result says in a field of SARIF's own.
_SAID = frozenset({"rule", "severity", "message", "chain", "signature", "known"})


class Form:
    """Gathers traces; end() gives the document."""

    def __init__(self, fail_on: str = "error") -> None:
        self._fail_on = fail_on
        self._artifacts: list[dict[str, Any]] = []
        self._results: list[dict[str, Any]] = []
        self._notes: list[dict[str, Any]] = []
        self._whole = True

    def trace(self, result: Result, replay: Replay, inputs: Sequence[str]) -> Iterator[str]:
        """Take one trace; nothing is written before the end."""
        where = self._artifact(result.name, _trace_properties(result, self._fail_on))
        groups = fold(result)
        self._results += [_result(result, group, where) for group in groups[: result.limit]]
        for reason in result.unknown:
            self._note("warning", f"unknown: {reason}", where)
        for reason in not_judged(result.stats, result.trace.layout):
            self._note("note", reason, where)
        omitted = result.lost if result.limit is None else result.lost + sum(map(len, groups[result.limit :]))
        if omitted:
            self._note("note", f"{omitted:,} more finding{' is' if omitted == 1 else 's are'} not shown", where)
        return iter(())

    def failed(self, name: str, error: str) -> Iterator[str]:
        """A trace that could not be read."""
        self._whole = False
        self._note("error", error, self._artifact(name, None))
        return iter(())

    def end(self) -> Iterator[str]:
        """The document, in ASCII."""
        driver = {"name": "tracedbg", "version": __version__, "rules": [_rule(info) for info in _RULES]}
        invocation = {"executionSuccessful": self._whole, "toolExecutionNotifications": self._notes}
        run = {
            "tool": {"driver": driver},
            "invocations": [invocation],
            "artifacts": self._artifacts,
            "results": self._results,
        }
        yield json_report.dumps({"$schema": SCHEMA, "version": VERSION, "runs": [run]}).rstrip("\n")

    def _artifact(self, name: str, properties: dict[str, Any] | None) -> dict[str, Any]:
        """Declare a trace; its physical location."""
        location: dict[str, Any] = {"uri": uri(name)} if name != "-" else {"description": {"text": "standard input"}}
        artifact: dict[str, Any] = {"location": location, "roles": ["analysisTarget"]}
        if properties is not None:
            artifact["properties"] = properties
        self._artifacts.append(artifact)
        index = {"index": len(self._artifacts) - 1}
        # No region: the lines and bytes of a trace tell a reader nothing. No address: they do not fit a number of JSON.
        return {"artifactLocation": {"uri": location["uri"], **index} if "uri" in location else index}

    def _note(self, level: str, text: str, where: dict[str, Any]) -> None:
        self._notes.append({"level": level, "message": message(text), "locations": [{"physicalLocation": where}]})


def uri(path: str) -> str:
    """A file name as a URI reference (RFC 3986): relative where the name is, by its bytes."""
    encoded = quote(os.fsencode(path), safe="/")
    return f"file://{encoded}" if path.startswith("/") else encoded


def message(text: str) -> dict[str, str]:
    """A message without placeholders (3.11.5 of the standard) and without links (3.11.6), whatever names it holds."""
    text = clean(text, 1 << 16)
    return {"text": text.replace("{", "{{").replace("}", "}}").replace("](", "\\](")}


def _rule(info: Info) -> dict[str, Any]:
    refs = [*info.refs[:-1], f"{info.refs[-1]} {rules.EDITIONS}"] if info.refs else []
    lines = [info.why, *(["Manual: " + "; ".join(refs)] if refs else []), "Known ways out:", *(f"- {fix}" for fix in info.fixes)]
    marked = [escape(info.why), *([escape("Manual: " + "; ".join(refs))] if refs else []), "Known ways out:"]
    return {
        "id": info.id,
        "name": "".join(word.capitalize() for word in info.id.split("-")),
        "shortDescription": {"text": info.title},
        "fullDescription": {"text": info.why},
        "help": {
            "text": "\n".join(lines),
            "markdown": "\n\n".join(marked) + "\n\n" + "\n".join(f"- {escape(fix)}" for fix in info.fixes),
        },
        "defaultConfiguration": {"level": info.severity},
        "properties": {"references": list(info.refs), "tags": ["x86-64", "interrupts"]},
    }


def _trace_properties(result: Result, fail_on: str) -> dict[str, Any]:
    properties: dict[str, Any] = {
        "verdict": verdict(result, fail_on),
        "events": result.trace.count,
        "cpus": result.trace.cpus,
        "source": source_text(result) or None,
        "notes": layout_notes(result.trace),
    }
    if result.position is not None:
        properties["position"] = result.position
    return properties


def _result(result: Result, group: list[Finding], where: dict[str, Any]) -> dict[str, Any]:
    """A group of equal findings: the first of them, with their number."""
    finding, words, at = group[0], result.words, result.position
    rule = rules.finding_rule(finding, at)
    signature = result.signature(finding)
    text = words.finding_line(finding, at)
    related = [
        {"id": number, **_location(words, where, part.event, finding.cpu), "message": message(f"{part.role}: {part.text}")}
        for number, part in enumerate(words.finding_parts(finding, at), 1)
    ]
    detail = {key: value for key, value in json_report.finding_report(result, finding).items() if key not in _SAID}
    chain = words.finding_chain(finding, at)
    report: dict[str, Any] = {
        "ruleId": rules.rule_id(rule),
        "ruleIndex": _INDEX[rule],
        "level": result.severity(finding),
        "message": message(f"{text} ({again(result, group)})" if len(group) > 1 else text),
        "locations": [_location(words, where, finding.event, finding.cpu, finding)],
        "relatedLocations": related,
        "partialFingerprints": {
            FINGERPRINT: signature,
            # The one that GitHub's code scanning compares; without lines to hash it would take each upload for a new alert.
            "primaryLocationLineHash": f"{hashlib.sha256(signature.encode()).hexdigest()[:16]}:1",
        },
        "occurrenceCount": len(group),
        "suppressions": (
            [{"kind": "external", "status": "accepted", "justification": "the baseline accepts this finding"}]
            if finding.number in result.known
            else []
        ),
        "properties": {**detail, "events": [f.event for f in group[:MAX_EVENTS]]},
    }
    if chain:
        report["codeFlows"] = [{"threadFlows": _flows(words, where, chain, finding.cpu)}]
    return report


def _flows(words: Words, where: dict[str, Any], chain: Sequence[ChainStep], cpu: int) -> list[dict[str, Any]]:
    """The chain as a flow for each CPU; the order of the steps is that of all of them."""
    flows: dict[int, list[dict[str, Any]]] = {}
    for number, step in enumerate(chain, 1):
        own = _cpu_of(words, step.event, cpu)
        location = {**_location(words, where, step.event, own), "message": message(step.text)}
        flows.setdefault(own, []).append({"location": location, "executionOrder": number})
    return [{"id": _cpu_name(words, own), "locations": steps} for own, steps in sorted(flows.items())]


def _location(words: Words, where: dict[str, Any], index: int, cpu: int, finding: Finding | None = None) -> dict[str, Any]:
    """Where an event is: in the trace, and on which CPU, stack and function."""
    cpu = _cpu_of(words, index, cpu)
    name = _cpu_name(words, cpu)
    logical = [{"name": name, "fullyQualifiedName": name, "kind": "cpu"}]
    frame = None if finding is None else finding.victim or finding.writer
    if frame is not None:
        stack = words.frame_stack(frame).removeprefix("the ")
        logical.append({"name": stack, "fullyQualifiedName": f"{_cpu_name(words, frame.cpu)}/{stack}", "kind": "stack"})
    label = words.event_name(index)
    logical.append({"name": label, "fullyQualifiedName": f"{name}/event {index}", "kind": "event"})
    event = words.event(index)
    symbol = words.symbols.lookup(event.rip) if event is not None and event.known & Known.RIP else None
    if symbol is not None:
        function = clean(symbol[0])
        logical.append({"name": function, "fullyQualifiedName": function, "kind": "function"})
    return {"physicalLocation": where, "logicalLocations": logical}


def _cpu_of(words: Words, index: int, cpu: int) -> int:
    """The CPU of an event; `cpu` where it has none."""
    event = words.event(index)
    return event.cpu if event is not None and event.known & Known.CPU else cpu


def _cpu_name(words: Words, cpu: int) -> str:
    return f"cpu {cpu}" if cpu < words.trace.cpus else "all CPUs"
