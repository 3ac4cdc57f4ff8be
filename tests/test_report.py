"""Reports: folding, order, verdicts, and the promise of the JSON form."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from samples import CLOBBER, IST_NMI, LOOP, OUTER, STATS, VICTIM, fill_race, race

from tracedbg.describe import Words
from tracedbg.layout import CpuTables, Gate, Idt, Layout, Tss
from tracedbg.replay import Replay
from tracedbg.report import Result, json_report, state_text, text, unknown_reasons, verdict
from tracedbg.state import Cause, Evidence, Finding, Kind, Rule, Settle, Source
from tracedbg.trace import Trace
from tracedbg.writer import TraceWriter, build


def result(*findings: Finding, trace: Trace | None = None, **change: object) -> Result:
    trace = trace or race(returns=3)
    base = Result("race.tdbg", trace, Words(trace), findings, STATS)
    return replace(base, **change)  # type: ignore[arg-type]


def lines(value: Result, **options: bool) -> list[str]:
    return list(text.render(value, **options))


FAKE = replace(
    CLOBBER, number=1, rule=Rule.FAKE_NMI, raised_rule=Rule.FAKE_NMI, evidence=Evidence.RECORDED, victim=None, writer=None,
    cause=Cause.NONE, cause_event=None, cause_frame=None, slots=0, differ=0, lo=0, hi=0, event=0,
)  # fmt: skip
SAME = replace(CLOBBER, number=2, rule=Rule.FRAME_SAME_BYTES, raised_rule=Rule.FRAME_SAME_BYTES, differ=0)


def test_the_report_of_the_race(golden: Callable[[str, str], None]) -> None:
    golden("report-race.txt", "\n".join(lines(result(CLOBBER))) + "\n")


def test_the_report_of_the_loop_with_details(golden: Callable[[str, str], None]) -> None:
    golden("report-loop-v.txt", "\n".join(lines(result(LOOP, FAKE, SAME), verbose=True)) + "\n")


def test_a_clean_report_is_short() -> None:
    assert lines(result()) == ["race.tdbg: 7 events, 1 CPU, from hand", "", "verdict: clean"]


def test_errors_come_first() -> None:
    said = [line for line in lines(result(SAME, FAKE, CLOBBER)) if line.startswith(("error", "warning", "note"))]
    assert [line.split(":")[0] for line in said] == ["error", "warning", "note"]
    assert lines(result(SAME, FAKE, CLOBBER))[-1] == "verdict: 1 error, 1 warning, 1 note"


def test_equal_findings_are_folded() -> None:
    again = [replace(CLOBBER, number=n, event=n) for n in range(12)]
    other = replace(CLOBBER, number=12, victim=replace(VICTIM, saved=replace(OUTER, rip=0x1234)))
    value = result(*again, other)
    assert [len(group) for group in text.fold(value)] == [12, 1]
    shown = " ".join(" ".join(lines(value)).split())
    assert "12 times, first at event 0 (#569); again at 1 (#570), 2, 3 (#571), 4, 5 and 6 more" in shown
    assert shown.endswith("verdict: 13 errors")


def test_equal_findings_of_several_cpus_are_one_entry() -> None:
    value = result(*(replace(CLOBBER, number=n, event=3, cpu=n % 2) for n in range(3)))
    assert "3 times on 2 CPUs, first at event 3 (#571); again at 3 (#571), 3 (#571)" in " ".join(" ".join(lines(value)).split())


def test_findings_that_a_baseline_accepts() -> None:
    """Shown after the new ones, marked, and no part of the numbers of the verdict."""
    fake = replace(FAKE, number=1)
    value = result(CLOBBER, fake, known=frozenset({0}))
    said = [line for line in lines(value) if line.startswith(("error", "warning", "known"))]
    assert [line.split(",")[0] for line in said] == ["warning: fake-nmi", "known error: frame-clobbered"]
    assert lines(value)[-1] == "verdict: 1 warning, 1 known"
    assert not value.reaches("error") and value.reaches("warning")
    assert lines(result(CLOBBER, known=frozenset({0})))[-1] == "verdict: clean (1 known)"
    assert lines(result(CLOBBER, fake, known=frozenset({0, 1})))[-1] == "verdict: clean (2 known)"
    reasons = ("records are missing (1 gap)",)
    said_unknown = verdict(result(CLOBBER, known=frozenset({0}), unknown=reasons))
    assert said_unknown == "unknown: records are missing (1 gap) (1 known)"
    verbose = lines(value, verbose=True)
    assert "known error: frame-clobbered, cpu 0, event 3 (#571)" in verbose
    assert "warning: fake-nmi, cpu 0, event 0 (#569)" in verbose
    # A known finding and a new one with one signature (the new one is worse) are two entries.
    assert len(text.fold(result(CLOBBER, replace(CLOBBER, number=1), known=frozenset({0})))) == 2


def test_a_limit_keeps_the_worst() -> None:
    notes = [replace(SAME, number=n, event=n) for n in range(4)]
    value = result(*notes, replace(FAKE, number=4), replace(CLOBBER, number=5), limit=2)
    assert [f.number for f in value.shown] == [4, 5] and value.omitted == 4
    assert [f["rule"] for f in json_report.trace_report(value)["findings"]] == ["fake-nmi", "frame-clobbered"]
    assert json_report.trace_report(value)["omitted"] == 4 and json_report.trace_report(value)["counts"]["note"] == 4
    said = lines(value)  # as text the four notes are one entry, the third
    assert said[-3:] == ["4 more findings are not shown", "", "verdict: 1 error, 1 warning, 4 notes"]
    assert not any(line.startswith("note") for line in said)
    assert not any(line.endswith("not shown") for line in lines(replace(value, limit=3)))
    known = replace(value, known=frozenset({5}), limit=1)
    assert [f.number for f in known.shown] == [4]  # what is new comes first
    assert [line for line in lines(replace(value, limit=0)) if ":" in line] == [
        "race.tdbg: 7 events, 1 CPU, from hand", "verdict: 1 error, 1 warning, 4 notes",
    ]  # fmt: skip
    assert [f.number for f in replace(value, limit=0).shown] == []


def test_findings_of_different_words_are_not_folded() -> None:
    inferred = replace(CLOBBER, evidence=Evidence.INFERRED)
    assert len(text.fold(result(CLOBBER, LOOP, inferred, FAKE))) == 4


def test_lines_fit_a_mail() -> None:
    value = result(LOOP, CLOBBER, FAKE, SAME)
    assert all(len(line) <= 78 for line in lines(value))


@pytest.mark.parametrize(
    ("findings", "fail_on", "said"),
    [
        ((), "error", "clean"),
        ((SAME,), "error", "1 note"),
        ((CLOBBER, CLOBBER, FAKE), "error", "2 errors, 1 warning"),
    ],
)
def test_verdicts(findings: tuple[Finding, ...], fail_on: str, said: str) -> None:
    assert verdict(result(*findings), fail_on) == said


def test_unknown_is_no_verdict_but_a_finding_outweighs_it() -> None:
    reasons = ("records are missing (1 gap)",)
    assert verdict(result(unknown=reasons)) == "unknown: records are missing (1 gap)"
    assert verdict(result(FAKE, unknown=reasons)) == "unknown: records are missing (1 gap) (1 warning)"
    assert verdict(result(FAKE, unknown=reasons), "warning") == "1 warning"
    assert verdict(result(CLOBBER, unknown=reasons)) == "1 error"


def test_reasons_for_unknown() -> None:
    trace = race()
    assert unknown_reasons(trace, trace.layout, STATS) == ()
    assert unknown_reasons(trace, trace.layout, replace(STATS, gaps=2)) == ("records are missing (2 gaps)",)
    lost = replace(STATS, unjudged=3)
    assert unknown_reasons(trace, Layout(), lost) == ("no layout: 3 deliveries cannot be placed on a stack",)
    assert unknown_reasons(trace, trace.layout, lost) == ()  # 16 early deliveries of a boot are no gap
    assert unknown_reasons(trace, Layout(), STATS) == ()  # nothing to place
    # An error may be among those that there was no room for.
    assert unknown_reasons(trace, trace.layout, STATS, 1) == ("1 finding is more than the replay keeps",)
    assert unknown_reasons(trace, trace.layout, STATS, 2000) == ("2,000 findings are more than the replay keeps",)


def test_names_and_meta_cannot_act_on_a_terminal() -> None:
    def fill(writer: TraceWriter) -> None:
        fill_race(writer)
        writer.meta = {"source": {"format": "q\x1b[31m", "tool": ["x"]}, "layout": {"origin": "\x07", "assumption": ["a\nb", 3]}}

    value = result(trace=build(fill), name="e\x1b[0mvil")
    shown = "\n".join(lines(value)) + json_report.dumps(json_report.trace_report(value))
    assert "\x1b" not in shown and "\x07" not in shown
    assert lines(value)[:3] == ["e?[0mvil: 4 events, 1 CPU, from q?[31m", "  layout: ?", "  assumed: a?b"]


@pytest.mark.parametrize("meta", [{"source": 3}, {"source": [1]}, {"layout": 7}, {"layout": {"snapshots": 3, "origin": 1}}])
def test_meta_of_the_wrong_shape_is_ignored(meta: dict[str, object]) -> None:
    def fill(writer: TraceWriter) -> None:
        fill_race(writer)
        writer.meta = meta

    value = result(trace=build(fill))
    assert lines(value)[0].startswith("race.tdbg: 4 events")
    json_report.trace_report(value)


# -- JSON ---------------------------------------------------------------------------------------------------------------


def test_json_fields_of_the_promise() -> None:
    report = json.loads(json_report.dumps(json_report.document([json_report.trace_report(result(LOOP))])))
    assert report["schema"] == "tracedbg.replay"
    assert report["schema_version"] == 1
    assert report["tool"]["name"] == "tracedbg"
    trace = report["traces"][0]
    assert {"name", "events", "cpus", "source", "findings", "counts"} <= set(trace)
    finding = trace["findings"][0]
    assert finding["rule"] == "resume-loop"
    assert finding["severity"] == "error"
    assert finding["evidence"] == "recorded"
    assert (finding["cpu"], finding["event"], finding["source_index"], finding["count"]) == (0, 3, 571, 1973)
    assert finding["victim"]["event"] == 0
    assert finding["victim"]["vector"] == 2
    assert finding["victim"]["source"] == "nmi"
    assert finding["victim"]["stack"] == "IST2"
    assert (finding["victim"]["lo"], finding["victim"]["hi"]) == ("0xffff8300bffd2fd8", "0xffff8300bffd3000")
    assert finding["writer"]["saved"]["symbol"] == "do_nmi+2"
    assert finding["consumer"]["event"] == 5
    assert finding["consumer"]["popped"]["rip"] == "0xffff82d04032a242"
    assert finding["bytes"] == [["0xffff8300bffd2fd8", "0xffff8300bffd3000"]]
    assert finding["slots"] == ["rip", "cs", "rflags", "rsp", "ss"]
    assert finding["differ"] is True
    assert [step["event"] for step in finding["chain"]] == [0, 1, 2, 3, 5]
    assert finding["message"].startswith("cpu 0, event 3 (#571): NMI overwrote")
    assert finding["refs"] == ["SDM Vol. 3A 6.14.5", "SDM Vol. 3A 6.7.1"]
    assert trace["counts"]["error"] == 1
    assert finding["signature"] == "resume-loop stack=ist2 victim=0x02/nmi@default_idle writer=0x02/nmi@do_nmi"
    assert finding["known"] is False and trace["counts"]["known"] == 0


def test_json_keeps_equal_findings_apart_and_marks_known_ones() -> None:
    value = result(CLOBBER, replace(CLOBBER, number=1, event=5), FAKE, known=frozenset({0, 1}))
    report = json_report.trace_report(replace(value, findings=(CLOBBER, replace(CLOBBER, number=1), replace(FAKE, number=2))))
    assert [f["known"] for f in report["findings"]] == [True, True, False]
    assert report["findings"][0]["signature"] == report["findings"][1]["signature"]
    assert report["counts"]["known"] == 2 and report["counts"]["error"] == 2 and report["verdict"] == "1 warning, 2 known"


def test_json_of_a_finding_that_is_raised_at_its_return() -> None:
    """The return is known from the event on at which the finding was raised, though nothing settles it later."""
    loop = replace(LOOP, raised_rule=Rule.RESUME_LOOP, event=5, settled=None)
    finding = json_report.finding_report(result(loop, position=6), loop)
    assert finding["consumer"]["event"] == 5 and finding["settled"] is None
    dropped = replace(CLOBBER, settled=5, settled_by=Settle.DROPPED)
    assert json_report.finding_report(result(dropped, position=6), dropped)["settled"] == 5
    assert json_report.finding_report(result(dropped, position=5), dropped)["settled"] is None


def test_json_at_a_position_knows_no_later_events() -> None:
    report = json_report.trace_report(result(LOOP, position=5))
    finding = report["findings"][0]
    assert (report["position"], finding["rule"], finding["evidence"]) == (5, "frame-clobbered", "computed")
    assert finding["consumer"] is None and finding["settled"] is None
    assert [step["event"] for step in finding["chain"]] == [0, 1, 2, 3]


def test_json_of_a_finding_without_frames() -> None:
    finding = json_report.finding_report(result(FAKE), FAKE)
    assert finding["victim"] is None and finding["writer"] is None and finding["bytes"] == [] and finding["slots"] == []


def test_json_is_ascii_and_the_same_twice() -> None:
    document = json_report.document([json_report.trace_report(result(LOOP, name="ä\u202e"))])
    assert json_report.dumps(document) == json_report.dumps(document)
    assert json_report.dumps(document).isascii()


# -- with the core ------------------------------------------------------------------------------------------------------


def test_the_core_and_the_words_agree_on_the_loop(golden: Callable[[str, str], None]) -> None:
    trace = race(returns=5)
    with Replay(trace) as replay:
        replay.scan_all()
        value = Result("race.tdbg", trace, Words(trace), replay.findings(), replay.stats())
    golden("report-race-core.txt", "\n".join(text.render(value)) + "\n")


def test_stacks_as_memory(golden: Callable[[str, str], None]) -> None:
    trace = race()
    with Replay(trace) as replay:
        replay.scan_all()
        replay.seek(4)
        said = "\n".join(state_text.render(replay, Words(trace), stacks=True)) + "\n"
    golden("stacks-race.txt", said)
    assert f"{IST_NMI - 40:016x}" in said


def test_equal_words_are_folded() -> None:
    def fill(writer: TraceWriter) -> None:
        fill_race(writer)
        data = bytes(8 * 100)
        writer.event(Kind.WRITE, cpu=0, addr=IST_NMI - 0x800, value=writer.payload(data), code=len(data), flags=32)

    trace = build(fill)
    with Replay(trace) as replay:
        replay.scan_all()
        replay.seek(replay.count)
        said = list(state_text.render(replay, Words(trace), stacks=True))
    assert "    ... 98 more words the same" in said
    assert any(line.endswith(" unknown") for line in said)




def test_what_was_not_judged_is_said() -> None:
    value = result(stats=replace(STATS, judged=0, legacy=3, findings=0))
    assert lines(value)[1] == "  not judged: 3 deliveries outside of long mode"
    assert lines(value)[-1] == "verdict: clean, but no delivery could be judged"
    value = result(stats=replace(STATS, unjudged=1))
    assert lines(value)[1] == "  not judged: 1 delivery with a TSS, a gate or registers that are not known"


def test_inferred_overwrites_fold_by_stack() -> None:
    """#DBs over #DBs whose return nothing shows, each at another place of the same thread: one line with a count."""

    def fill(writer: TraceWriter) -> None:
        gate = Gate(0x1000, 8, 1)
        tss = Tss(0x5000, ist=(None, 0x20000, *(None,) * 6))
        writer.layout = Layout((tss,), (Idt(0x6000, {1: gate}),), (CpuTables(0, 0),)).with_stacks()
        for number in range(5):
            at = {"rip": 0x9000 + number, "rsp": 0x90000 - 64 * number, "cs": 8, "ss": 0, "rflags": 2}
            writer.event(Kind.DELIVER, cpu=0, arg=1, source=Source.EXCEPTION, **at)

    with build(fill) as trace, Replay(trace) as replay:
        replay.scan_all()
        assert len(replay.findings()) == 4
        said = list(text.render(Result("x", trace, Words(trace), replay.findings(), replay.stats())))
    assert sum(line.startswith("warning: frame-clobbered") for line in said) == 1
    assert any("4 times, first at event 1" in line for line in said)
