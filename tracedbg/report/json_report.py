"""The report as JSON: the only form that is a promise. Fields are added, never changed or taken away, within a version."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tracedbg import __version__, rules
from tracedbg.report import Result, layout_notes, meta_dict, verdict
from tracedbg.report.text import source_text
from tracedbg.state import Cause, Context, Finding, Frame, Source
from tracedbg.text import clean, clean_path
from tracedbg.x86 import SLOT_NAMES

SCHEMA = "tracedbg.replay"
SCHEMA_VERSION = 1


def dumps(document: dict[str, Any]) -> str:
    """JSON text, ASCII only: no byte of it can act on a terminal."""
    return json.dumps(document, indent=2, ensure_ascii=True, allow_nan=False) + "\n"


def document(traces: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The whole report."""
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "tool": {"name": "tracedbg", "version": __version__},
        "traces": list(traces),
    }


def failed(name: str, error: str) -> dict[str, Any]:
    """A trace that could not be read."""
    return {"name": clean_path(name), "error": clean(error, 4096)}


def trace_report(result: Result, fail_on: str = "error") -> dict[str, Any]:
    """One trace."""
    trace, stats = result.trace, result.stats
    report: dict[str, Any] = {
        "name": clean_path(result.name),
        "events": trace.count,
        "cpus": trace.cpus,
        "source": source_text(result) or None,
        "layout": {
            "known": not trace.layout.is_empty,
            "notes": layout_notes(trace),
            "missing": bool(meta_dict(trace, "layout").get("missing")),
        },
        "verdict": verdict(result, fail_on),
        "unknown": list(result.unknown),
        "findings": [finding_report(result, finding) for finding in result.shown],
        "omitted": result.omitted,
        "counts": {
            **result.counts(),
            "known": result.known_count,
            "deliveries": stats.deliveries,
            "judged": stats.judged,
            "unjudged": stats.unjudged,
            "legacy": stats.legacy,
            "failed": stats.failed,
            "returns": stats.returns,
            "writes": stats.writes,
            "gaps": stats.gaps,
            "open_at_end": stats.open_at_end,
            "skipped": stats.bad_events,
        },
    }
    if result.position is not None:
        report["position"] = result.position
    return report


def finding_report(result: Result, finding: Finding) -> dict[str, Any]:
    """One finding, as known at the position of the result."""
    words, at = result.words, result.position
    rule = rules.finding_rule(finding, at)
    settled = finding.settled is not None and (at is None or at > finding.settled)
    report: dict[str, Any] = {
        "rule": rules.rule_id(rule),
        "severity": result.severity(finding),
        "evidence": rules.finding_evidence(finding, at).name.lower(),
        "cpu": finding.cpu,
        "event": finding.event,
        "source_index": words.source_index(finding.event),
        "count": finding.count,
        "victim": _frame(result, finding.victim),
        "writer": _frame(result, finding.writer),
        "consumer": _consumer(result, finding),
        "cause": None if finding.cause is Cause.NONE else finding.cause.name.lower().replace("_", "-"),
        "bytes": [[f"{finding.lo:#x}", f"{finding.hi:#x}"]] if finding.hi > finding.lo else [],
        "slots": [name for n, name in enumerate(SLOT_NAMES) if finding.slots >> n & 1],
        "differ": bool(finding.differ),
        "values": [
            {"addr": f"{row.addr:#x}", "slot": row.slot, "own": _hex(row.own), "now": _hex(row.now), "differs": row.differs}
            for row in words.bytes_rows(finding)
        ],
        "raised_as": rules.rule_id(finding.raised_rule),
        "settled": finding.settled if settled else None,
        "settled_by": finding.settled_by.name.lower() if settled and finding.settled_by is not None else None,
        "chain": [{"event": step.event, "text": step.text} for step in words.finding_chain(finding, at)],
        "message": words.finding_line(finding, at),
        "refs": list(rules.finding_refs(finding, at)),
        "signature": result.signature(finding),
        "known": finding.number in result.known,
    }
    return report


def _frame(result: Result, frame: Frame | None) -> dict[str, Any] | None:
    if frame is None:
        return None
    return {
        "event": frame.entry,
        "source_index": result.words.source_index(frame.entry),
        "cpu": frame.cpu,
        "vector": frame.vector,
        "source": "unknown" if frame.source is Source.UNKNOWN else frame.source.name.lower().replace("_", "-"),
        "stack": result.words.frame_stack(frame).removeprefix("the "),
        "lo": f"{frame.lo:#x}",
        "hi": f"{frame.hi:#x}",
        "saved": _context(result, frame.saved),
    }


def _consumer(result: Result, finding: Finding) -> dict[str, Any] | None:
    if finding.consumer is None or (result.position is not None and finding.consumer >= result.position):
        return None
    return {
        "event": finding.consumer,
        "source_index": result.words.source_index(finding.consumer),
        "popped": None if finding.popped is None else _context(result, finding.popped),
    }


def _context(result: Result, context: Context) -> dict[str, Any]:
    values: dict[str, Any] = {
        name: _hex(value) for name, value in zip(SLOT_NAMES, context.slots(), strict=True) if value is not None
    }
    symbol = result.words.symbol(context.rip)
    if symbol is not None:
        values["symbol"] = symbol
    return values


def _hex(value: int | None) -> str | None:
    return None if value is None else f"{value:#x}"
