"""SARIF, JUnit, annotations and HTML: what other programs read, with hostile names in it."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft4Validator
from samples import CLOBBER, LOOP, STATS, fill_race, race, write_race

from tracedbg.catalogue import CATALOGUE
from tracedbg.describe import Words
from tracedbg.layout import Layout
from tracedbg.replay import Replay
from tracedbg.report import Result, github, html, html_text, html_timeline, junit, sarif, unknown_reasons
from tracedbg.state import Cause, Evidence, Finding, Kind, Rule
from tracedbg.text import clean
from tracedbg.trace import Trace
from tracedbg.writer import TraceWriter, build

Cli = Callable[..., subprocess.CompletedProcess[str]]

FORMS = ("sarif", "junit", "github", "html")
MODULES = {"sarif": sarif, "junit": junit, "github": github, "html": html}
FAKE = replace(
    CLOBBER, number=1, rule=Rule.FAKE_NMI, raised_rule=Rule.FAKE_NMI, evidence=Evidence.RECORDED, victim=None, writer=None,
    cause=Cause.NONE, cause_event=None, cause_frame=None, slots=0, differ=0, lo=0, hi=0, event=0,
)  # fmt: skip
SAME = replace(CLOBBER, number=2, rule=Rule.FRAME_SAME_BYTES, raised_rule=Rule.FRAME_SAME_BYTES, differ=0)

# Markup, ends of quoting, commands of a runner, placeholders and links.
HOSTILE = (
    "<script>alert(1)</script>",
    "\" onmouseover='x' &amp;",
    "]]><x/>",
    "%0A::error::x",
    "::stop-commands::z ##[error]",
    "{0}[here](http://evil.example/)",
    "</style></title><b>",
    "${{secrets.X}}<!--",
)
ESC = "\x1b[31m\u202e\x00"


def result(*findings: Finding, trace: Trace | None = None, **change: object) -> Result:
    trace = trace or race(returns=3)
    return replace(Result("race.tdbg", trace, Words(trace), findings, STATS), **change)  # type: ignore[arg-type]


def replayed(trace: Trace, replay: Replay, name: str = "race.tdbg") -> Result:
    """What the command line would report."""
    replay.scan_all()
    unknown = unknown_reasons(trace, replay.layout, replay.stats())
    return Result(name, trace, Words(trace), replay.findings(), replay.stats(), unknown=unknown)


def rendered(name: str, *results: Result, fail_on: str = "error", failed: tuple[tuple[str, str], ...] = ()) -> str:
    """A whole document."""
    form = MODULES[name].Form(fail_on)
    lines: list[str] = []
    for value in results:
        with Replay(value.trace) as replay:
            replay.scan_all()
            lines += form.trace(value, replay, (value.name,))
    for path, error in failed:
        lines += form.failed(path, error)
    lines += form.end()
    return "".join(f"{line}\n" for line in lines)


def hostile(symbol: str, name: str) -> Result:
    """The race as the core judges it, with a symbol and a file of these names."""

    def fill(writer: TraceWriter) -> None:
        fill_race(writer, returns=2)
        symbols = (f"ffff82d0402f9b40 ffff82d0402f9d00 {symbol}", f"ffff82d04032a240 ffff82d04032a440 {symbol}2")
        writer.symbols = "".join(f"{line}\n" for line in symbols).encode()
        writer.meta = {"source": {"format": symbol + ESC, "tool": name}, "layout": {"origin": symbol, "assumption": [symbol]}}

    trace = build(fill)
    with Replay(trace) as replay:
        value = replayed(trace, replay, name)
    assert value.words.symbol(0xFFFF82D04032A242) == f"{symbol}2+2"  # the name did get in
    return value


# -- SARIF --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def schema(root: Path) -> Draft4Validator:
    """The official schema; the page beside it says where it is from."""
    text = gzip.decompress((root / "tests/data/sarif/sarif-schema-2.1.0.json.gz").read_bytes())
    assert hashlib.sha256(text).hexdigest() in (root / "tests/data/sarif/README.md").read_text()
    Draft4Validator.check_schema(json.loads(text))
    return Draft4Validator(json.loads(text), format_checker=Draft4Validator.FORMAT_CHECKER)


def run_of(text: str, schema: Draft4Validator) -> dict[str, Any]:
    """The only run of a document that the schema accepts."""
    document = json.loads(text)
    assert [error.message for error in schema.iter_errors(document)] == []
    (run,) = document["runs"]
    assert isinstance(run, dict)
    return run


def test_sarif_of_every_sample_is_valid(root: Path, schema: Draft4Validator) -> None:
    form = sarif.Form()
    rules = set()
    for path in sorted((root / "traces").glob("*.tdbg")):
        with Trace.open(path) as trace, Replay(trace) as replay:
            assert list(form.trace(replayed(trace, replay, f"traces/{path.name}"), replay, ())) == []
            rules |= {finding.rule for finding in replay.findings()}
    run = run_of("\n".join(form.end()), schema)
    assert len(rules) > 12 and {CATALOGUE[r["ruleIndex"]].rule for r in run["results"]} == rules
    for one in run["results"]:
        assert run["tool"]["driver"]["rules"][one["ruleIndex"]]["id"] == one["ruleId"]
        where = one["locations"][0]["physicalLocation"]["artifactLocation"]
        assert run["artifacts"][where["index"]]["location"]["uri"] == where["uri"]
        steps = [step for flow in one.get("codeFlows", []) for thread in flow["threadFlows"] for step in thread["locations"]]
        assert sorted(step["executionOrder"] for step in steps) == list(range(1, len(steps) + 1))


def test_the_schema_does_refuse(schema: Draft4Validator) -> None:
    document = json.loads(rendered("sarif", result(LOOP)))
    document["runs"][0]["results"][0]["level"] = "fatal"
    document["runs"][0]["colour"] = "red"
    assert len(list(schema.iter_errors(document))) == 2


def test_sarif_of_the_loop(schema: Draft4Validator) -> None:
    text = rendered("sarif", result(LOOP))
    assert text.isascii() and text == rendered("sarif", result(LOOP))
    run = run_of(text, schema)
    assert run["artifacts"][0]["location"] == {"uri": "race.tdbg"}
    assert run["artifacts"][0]["properties"]["verdict"] == "1 error"
    (one,) = run["results"]
    assert (one["ruleId"], one["level"], one["occurrenceCount"], one["suppressions"]) == ("resume-loop", "error", 1, [])
    signature = "resume-loop stack=ist2 victim=0x02/nmi@default_idle writer=0x02/nmi@do_nmi"
    assert one["partialFingerprints"][sarif.FINGERPRINT] == signature
    assert one["message"]["text"].startswith("cpu 0, event 3 (#571): NMI overwrote the frame of the NMI at event 0 (#569)")
    logical = {place["kind"]: place["fullyQualifiedName"] for place in one["locations"][0]["logicalLocations"]}
    assert logical == {"cpu": "cpu 0", "stack": "cpu 0/IST2", "event": "cpu 0/event 3", "function": "do_nmi"}
    (thread,) = one["codeFlows"][0]["threadFlows"]
    assert thread["id"] == "cpu 0"
    events = [step["location"]["logicalLocations"][1]["fullyQualifiedName"] for step in thread["locations"]]
    assert events == ["cpu 0/event 0", "cpu 0/event 1", "cpu 0/event 2", "cpu 0/event 3", "cpu 0/event 5"]
    assert thread["locations"][2]["location"]["message"]["text"] == "IRET of event 1 to do_nmi+2: NMIs are unblocked"
    roles = [place["message"]["text"].split(":")[0] for place in one["relatedLocations"]]
    assert roles == ["victim", "cause", "writer", "consumer"]
    assert one["properties"]["evidence"] == "recorded"
    assert one["properties"]["bytes"] == [["0xffff8300bffd2fd8", "0xffff8300bffd3000"]]


def test_sarif_fingerprints_are_those_of_the_bug_not_of_the_recording(schema: Draft4Validator) -> None:
    here = run_of(rendered("sarif", result(LOOP, CLOBBER)), schema)["results"]
    later = replace(LOOP, event=5, cpu=0, count=7, consumer=6)
    there = run_of(rendered("sarif", result(later, name="other.tdbg")), schema)["results"]
    assert here[0]["partialFingerprints"] == there[0]["partialFingerprints"]
    assert here[0]["partialFingerprints"]["primaryLocationLineHash"] != here[1]["partialFingerprints"]["primaryLocationLineHash"]


def test_sarif_rules_are_the_catalogue(schema: Draft4Validator) -> None:
    rules = run_of(rendered("sarif"), schema)["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == [info.id for info in CATALOGUE]
    fake = next(rule for rule in rules if rule["id"] == "fake-nmi")
    assert (fake["name"], fake["defaultConfiguration"]) == ("FakeNmi", {"level": "warning"})
    for rule, info in zip(rules, CATALOGUE, strict=True):
        assert all(ref in rule["help"]["text"] for ref in info.refs) and rule["properties"]["references"] == list(info.refs)
        assert all(fix in rule["help"]["text"] for fix in info.fixes)
        assert not set("{}<>") & set(rule["help"]["markdown"]) and "](" not in rule["help"]["text"]


def test_sarif_folds_and_suppresses(schema: Draft4Validator) -> None:
    again = [replace(CLOBBER, number=n, event=3 + n) for n in range(3)]
    run = run_of(rendered("sarif", result(*again, replace(FAKE, number=3), known=frozenset({0, 1, 2}))), schema)
    new, known = run["results"]
    assert new["ruleId"] == "fake-nmi" and new["suppressions"] == []
    assert known["occurrenceCount"] == 3 and known["properties"]["events"] == [3, 4, 5]
    assert known["suppressions"] == [
        {"kind": "external", "status": "accepted", "justification": "the baseline accepts this finding"}
    ]


def test_sarif_says_what_is_unknown_unreadable_or_left_out(schema: Draft4Validator) -> None:
    unknown = result(SAME, FAKE, unknown=("records are missing (1 gap)",), limit=1)
    run = run_of(rendered("sarif", unknown, failed=(("bad.tdbg", "bad.tdbg: no trace"),)), schema)
    (invocation,) = run["invocations"]
    assert invocation["executionSuccessful"] is False
    notes = [(note["level"], note["message"]["text"]) for note in invocation["toolExecutionNotifications"]]
    assert notes == [
        ("warning", "unknown: records are missing (1 gap)"),
        ("note", "1 more finding is not shown"),
        ("error", "bad.tdbg: no trace"),
    ]
    assert [one["ruleId"] for one in run["results"]] == ["fake-nmi"]
    assert run["artifacts"][1]["location"] == {"uri": "bad.tdbg"}


def test_sarif_of_several_cpus_has_a_flow_for_each(schema: Draft4Validator) -> None:
    def fill(writer: TraceWriter) -> None:
        fill_race(writer)
        writer.event(Kind.MARK, cpu=1)

    trace = build(fill, cpus=2)
    finding = replace(CLOBBER, victim=replace(CLOBBER.victim, entry=4, cpu=1))  # type: ignore[type-var]
    (one,) = run_of(rendered("sarif", result(finding, trace=trace)), schema)["results"]
    flows = {flow["id"]: [step["executionOrder"] for step in flow["locations"]] for flow in one["codeFlows"][0]["threadFlows"]}
    assert flows == {"cpu 0": [2, 3, 4], "cpu 1": [1]}


@pytest.mark.parametrize(
    ("path", "uri"),
    [
        ("a b/c.tdbg", "a%20b/c.tdbg"),
        ("/x/y.tdbg", "file:///x/y.tdbg"),
        ("c:x", "c%3Ax"),  # not a scheme
        ("javascript:alert(1)", "javascript%3Aalert%281%29"),
        ("100%#?", "100%25%23%3F"),
        ("\udcff\u00e4", "%FF%C3%A4"),  # a byte that is no UTF-8, and a letter that is
    ],
)
def test_sarif_names_of_files(path: str, uri: str) -> None:
    assert sarif.uri(path) == uri


def test_sarif_of_standard_input_has_no_uri(schema: Draft4Validator) -> None:
    run = run_of(rendered("sarif", result(CLOBBER, name="-")), schema)
    assert run["artifacts"][0]["location"] == {"description": {"text": "standard input"}}
    assert run["results"][0]["locations"][0]["physicalLocation"] == {"artifactLocation": {"index": 0}}


def test_sarif_messages_have_no_placeholders_and_no_links() -> None:
    assert sarif.message("a {0} [b](http://c) [d, e)")["text"] == "a {{0}} [b\\](http://c) [d, e)"


# -- JUnit --------------------------------------------------------------------------------------------------------------


def suites(text: str) -> list[ET.Element]:
    """The suites, after a look at the sums."""
    top = ET.fromstring(text)
    assert text.isascii() and top.tag == "testsuites"
    found = list(top)
    for suite in found:
        order = [child.tag for child in suite]
        assert order == sorted(order, key=("properties", "testcase", "system-out").index)
        for key, inside in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert int(suite.get(key, "?")) == len(suite.findall(f"testcase/{inside}"))
        assert int(suite.get("tests", "?")) == len(suite.findall("testcase"))
    for key in ("tests", "failures", "errors"):
        assert int(top.get(key, "?")) == sum(int(suite.get(key, "?")) for suite in found)
    return found


def cases(suite: ET.Element) -> dict[str, str]:
    """What became of the test cases that are not just passed."""
    inside = {case.get("name", "?"): [child.tag for child in case] for case in suite.findall("testcase")}
    return {name: tags[0] for name, tags in inside.items() if tags}


def test_junit_has_a_case_for_each_rule_of_each_trace() -> None:
    found = suites(rendered("junit", result(), result(LOOP, FAKE, SAME, name="b.tdbg")))
    assert [suite.get("name") for suite in found] == ["race.tdbg", "b.tdbg"]
    for suite in found:
        names = [case.get("name") for case in suite.findall("testcase")]
        assert names == ["trace", *(info.id for info in CATALOGUE)]
        assert {case.get("classname") for case in suite.findall("testcase")} == {suite.get("name")}
    assert cases(found[0]) == {}
    assert cases(found[1]) == {"resume-loop": "failure", "fake-nmi": "system-out", "frame-same-bytes": "system-out"}
    failure = found[1].find("testcase/failure")
    assert failure is not None and failure.get("type") == "error"
    assert (failure.get("message") or "").startswith("cpu 0, event 3 (#571): NMI overwrote the frame")
    assert "\n    ffff8300bffd2fd8  rip         ffff82d0402f9c06    ffff82d04032a242  *\n" in (failure.text or "")
    assert (found[1].findtext("system-out") or "").endswith("\nverdict: 1 error, 1 warning, 1 note")


def test_junit_fails_by_what_is_asked_for() -> None:
    value = result(LOOP, FAKE, SAME)
    assert cases(suites(rendered("junit", value, fail_on="warning"))[0]) == {
        "resume-loop": "failure", "fake-nmi": "failure", "frame-same-bytes": "system-out",
    }  # fmt: skip
    known = replace(value, known=frozenset({LOOP.number}))
    assert cases(suites(rendered("junit", known))[0])["resume-loop"] == "skipped"
    both = result(LOOP, replace(LOOP, number=5), known=frozenset({5}))
    (suite,) = suites(rendered("junit", both))
    assert cases(suite)["resume-loop"] == "failure"
    assert "known error: resume-loop" in (suite.findtext("testcase/failure") or "")


def test_junit_counts_what_it_does_not_spell_out() -> None:
    (suite,) = suites(rendered("junit", result(LOOP, FAKE, limit=1), fail_on="warning"))
    told = {case.get("name"): case.findtext("failure") for case in suite.findall("testcase") if case.find("failure") is not None}
    assert told["fake-nmi"] == "not shown" and (told["resume-loop"] or "").startswith("error: resume-loop, cpu 0")


def test_junit_of_a_trace_that_cannot_be_judged_or_read() -> None:
    text = rendered("junit", result(unknown=("records are missing (1 gap)",)), failed=(("bad.tdbg", "bad.tdbg: no <trace>"),))
    unknown, bad = suites(text)
    assert cases(unknown) == {"trace": "error"} and cases(bad) == {"trace": "error"}
    reasons = [(e.get("type"), e.get("message")) for suite in (unknown, bad) for e in suite.findall("testcase/error")]
    assert reasons == [("unknown", "records are missing (1 gap)"), ("unreadable", "bad.tdbg: no <trace>")]


# -- annotations --------------------------------------------------------------------------------------------------------


def commands(text: str) -> Iterator[tuple[str, str, str]]:
    """Level, title and message as the runner understands them: https://github.com/actions/runner, ActionCommand.cs."""
    for line in text.splitlines():
        match = re.fullmatch(r"::(error|warning|notice) title=([^,:\r\n]*)::([^\r\n]*)", line)
        assert match is not None, line
        title, message = match[2], match[3]
        for sign, code in ((":", "%3A"), (",", "%2C")):
            title = title.replace(code, sign)
        for sign, code in (("\r", "%0D"), ("\n", "%0A"), ("%", "%25")):
            title, message = title.replace(code, sign), message.replace(code, sign)
        yield match[1], title, message


def test_escapes_of_the_runner() -> None:
    assert github.data("50%\r\n: a,b") == "50%25%0D%0A: a,b"
    assert github.value("50%\r\n: a,b") == "50%25%0D%0A%3A a%2Cb"
    assert github.value("%3A") == "%253A"


def test_annotations_come_worst_first() -> None:
    found = list(commands(rendered("github", result(SAME, FAKE, LOOP))))
    assert [(level, title) for level, title, _ in found] == [
        ("error", "error: resume-loop: race.tdbg"),
        ("warning", "warning: fake-nmi: race.tdbg"),
        ("notice", "note: frame-same-bytes: race.tdbg"),
    ]
    lines = found[0][2].split("\n")
    assert lines[0].startswith("cpu 0, event 3 (#571): NMI overwrote the frame of the NMI at event 0 (#569)")
    assert lines[3] == "3. event 2: IRET of event 1 to do_nmi+2: NMIs are unblocked"
    assert lines[-2] == "evidence: recorded: the trace has the IRET and the words that it popped"
    assert lines[-1] == "tracedbg view race.tdbg --at 3"


def test_annotations_of_known_findings_do_not_alarm() -> None:
    ((level, title, _),) = commands(rendered("github", result(LOOP, known=frozenset({0}))))
    assert (level, title) == ("notice", "known error: resume-loop: race.tdbg")


def test_annotations_where_nothing_was_found() -> None:
    assert rendered("github", result()) == ""
    gap = result(unknown=("records are missing (1 gap)",))
    assert list(commands(rendered("github", gap))) == [
        ("warning", "tracedbg: unknown: race.tdbg", "unknown: records are missing (1 gap)")
    ]
    blind = result(stats=replace(STATS, judged=0, legacy=3))
    assert list(commands(rendered("github", blind))) == [
        ("notice", "tracedbg: race.tdbg", "clean, but no delivery could be judged")
    ]
    assert list(commands(rendered("github", failed=(("a,b:c", "a,b:c: no trace"),)))) == [
        ("error", "tracedbg: unreadable: a,b:c", "a,b:c: no trace")
    ]
    assert [title for _, title, _ in commands(rendered("github", result(LOOP, FAKE, limit=1)))][-1] == "tracedbg: race.tdbg"


# -- HTML ---------------------------------------------------------------------------------------------------------------


FETCHING = frozenset(
    {"script", "link", "img", "iframe", "object", "embed", "form", "base", "use", "image", "foreignobject", "audio", "video"}
)


class Page(HTMLParser):
    """A strict reader: every element is closed in order, and nothing leads out of the page."""

    VOID = frozenset({"meta"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        ids = [attrs["id"] for _, attrs in self.tags if "id" in attrs]
        assert len(ids) == len(set(ids))
        for tag, attrs in self.tags:
            assert tag not in FETCHING
            assert not any(name.startswith("on") or name in ("src", "style", "srcset", "xlink:href") for name in attrs), attrs
            if "href" in attrs:
                assert (attrs["href"] or "")[:1] == "#" and (attrs["href"] or "")[1:] in ids
            if tag == "meta" and "http-equiv" in attrs:
                assert attrs["http-equiv"] == "Content-Security-Policy" and "default-src 'none'" in (attrs["content"] or "")
        assert sum("http-equiv" in attrs for _, attrs in self.tags) == 1
        assert not re.search(r"url\(|@import|://|javascript:", text.partition("<style>")[2].partition("</style>")[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style" and data.strip():
            self.text.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"comment {data!r}")


def page(text: str) -> tuple[Page, ET.Element]:
    """As HTML and, as it is written to be that too, as XML."""
    assert text.isascii() and text.startswith("<!DOCTYPE html>\n")
    return Page(text), ET.fromstring(text)


def rows(element: ET.Element) -> list[list[str]]:
    """The cells of a table's body."""
    return [["".join(cell.itertext()) for cell in row] for row in element.findall("tbody/tr")]


def test_html_of_the_loop() -> None:
    trace = race(returns=5)
    with Replay(trace) as replay:
        value = replayed(trace, replay)
    text = rendered("html", value)
    assert text == rendered("html", value)
    seen, top = page(text)
    assert top.findtext("head/title") == "tracedbg: race.tdbg"
    assert "prefers-color-scheme: dark" in (top.findtext("head/style") or "")
    verdict = top.find("body/section/p[@class='verdict error']")
    assert verdict is not None and verdict.text == "verdict: 2 errors, 1 warning"
    article = top.find("body/section/article")
    assert article is not None and article.findtext("h2") == "error: frame-consumed-corrupt, cpu 0, event 3 (#571)"
    before, stack = article.findall("div/table")
    assert rows(before) == [
        ["ffff8300bffd2fd8", "rip", "ffff82d0402f9c06 default_idle+0xc6", "ffff82d04032a242 do_nmi+2", "differs"],
        ["ffff8300bffd2fe0", "cs", "e008", "e008", "same value"],
        ["ffff8300bffd2fe8", "rflags", "206", "46", "differs"],
        ["ffff8300bffd2ff0", "rsp", "ffff8300bffd7e98", "ffff8300bffd2f48", "differs"],
        ["ffff8300bffd2ff8", "ss", "e010", "0", "differs"],
    ]
    assert (stack.findtext("caption") or "").startswith("IST2 (NMI) [ffff8300bffd2000, ffff8300bffd3000)")
    mine = "NMI at event 3 (#571)"
    assert rows(stack)[0] == ["!", "ffff8300bffd2fd8", "ffff82d04032a242", "rip", mine, "event 3 (#571) NMI", "do_nmi+2"]
    assert len(rows(stack)) == 5
    steps = ["".join(item.itertext()) for item in article.findall("ol/li")]
    assert len(steps) == 5 and steps[2] == "event 2: IRET of event 1 to do_nmi+2: NMIs are unblocked"
    assert article.findtext("pre/code") == "tracedbg view race.tdbg --at 3"
    assert {"Would have prevented it", "Known ways out", "Why it matters"} <= {h.text for h in article.findall("h3")}
    assert [row[1] for row in rows(top.findall("body/section/div/table")[0])] == [
        "frame-consumed-corrupt", "resume-loop", "reentry-window",
    ]  # fmt: skip
    assert seen.tags[-1][0] == "footer"


def test_the_timeline() -> None:
    """Nine events, one CPU: two frames open after events 1 and 3, none after the IRET that pops the first one's."""
    trace = race(returns=5)
    with Replay(trace) as replay:
        value = replayed(trace, replay)
        groups = [[finding] for finding in value.findings]
        picture = ET.fromstring("".join(html_timeline.figure(value, replay, groups, ["a", "b", "c"])))
        depths = replay.timeline(0, 9).depths
    assert depths == (1, 2, 1, 2, 1, 0, 0, 0, 0)
    svg = picture.find("div/svg")
    assert svg is not None
    marks = svg.findall("a")
    assert {mark.get("href") for mark in marks} == {"#a", "#b", "#c"}
    places = {mark.get("href"): float((mark[0].get("points") or "").split(",")[0]) + 5 for mark in marks}
    # 878 units for 9 events from 70 on.
    assert [round((places[f"#{name}"] - 70) * 9 / 878) for name in "abc"] == [finding.event for finding in value.findings]
    area = svg.find("path[@class='area']")
    assert area is not None and (area.get("d") or "").startswith("M70 46H70V30")  # one of two: half of 32 above 46


def test_every_sample_is_a_page_a_suite_and_annotations(root: Path) -> None:
    paths = sorted((root / "traces").glob("*.tdbg"))
    forms = {name: MODULES[name].Form("error") for name in ("html", "junit", "github")}
    lines: dict[str, list[str]] = {name: [] for name in forms}
    failing = 0
    for path in paths:
        with Trace.open(path) as trace, Replay(trace) as replay:
            value = replayed(trace, replay, path.name)
            failing += value.reaches("error")
            for name, form in forms.items():
                lines[name] += form.trace(value, replay, (path.name,))
    texts = {name: "".join(f"{line}\n" for line in (*lines[name], *form.end())) for name, form in forms.items()}
    _, top = page(texts["html"])
    sections = top.findall("body/section")
    assert [section.findtext("h1") for section in sections] == [path.name for path in paths]
    assert sum(section.find("p[@class='verdict error']") is not None for section in sections) == failing > 10
    found = suites(texts["junit"])
    assert sum(suite.find("testcase/failure") is not None for suite in found) == failing
    alarmed = {title.rpartition(": ")[2] for level, title, _ in commands(texts["github"]) if level == "error"}
    assert len(alarmed) == failing


def test_html_at_a_position_knows_no_later_events() -> None:
    trace = race(returns=5)
    with Replay(trace) as replay:
        value = replayed(trace, replay)
    raised = tuple(finding for finding in value.findings if finding.event < 4)
    _, top = page(rendered("html", replace(value, findings=raised, position=4)))
    text = "".join(top.itertext())
    assert "as known after event 3" in text and "frame-clobbered" in text
    assert "frame-consumed-corrupt" not in text and "The stacks after event 3 (#571)" in text
    assert top.find("body/section/figure/div/svg/line[@class='at']") is not None


def test_html_of_several_traces_is_one_page() -> None:
    unknown = result(LOOP, name="c.tdbg", known=frozenset({0}), unknown=("records are missing (1 gap)",))
    values = (result(LOOP, FAKE), result(), unknown)
    seen, top = page(rendered("html", *values, failed=(("bad<>.tdbg", "bad<>.tdbg: no trace"),)))
    sections = top.findall("body/section")
    assert [section.findtext("h1") for section in sections] == ["race.tdbg", "race.tdbg", "c.tdbg", "bad<>.tdbg"]
    said = [[p.get("class") for p in section.findall("p") if "verdict" in (p.get("class") or "")] for section in sections]
    assert said == [["verdict error"], ["verdict clean"], ["verdict unknown"], ["verdict error"]]
    assert "known error: resume-loop, cpu 0, event 3 (#571)" in seen.text
    _, only = page(rendered("html", failed=(("x", "x: no trace"),)))
    assert only.findtext("body/section/h1") == "x"


def test_html_shows_only_what_is_asked_for() -> None:
    seen, top = page(rendered("html", result(LOOP, FAKE, SAME, limit=1)))
    assert len(top.findall("body/section/article")) == 1 and "2 more findings are not shown" in seen.text


# -- hostile names ------------------------------------------------------------------------------------------------------


def test_text_is_cleaned_where_it_is_escaped() -> None:
    assert html_text.text("\x1b<\u202e'&\xe9\n") == "?&lt;?&#x27;&amp;&#233;?"
    assert junit.content(["\x00]]>", "\ufffe&\xe9"]) == "?]]&gt;\n?&amp;&#233;"
    assert junit.attribute("\x01\"<\xe9\n") == "'?\"&lt;&#233;?'"
    assert github.annotation("note", "a\nb", ["c\rd", "e"]) == "::notice title=a?b::c?d%0Ae"


@pytest.mark.parametrize("symbol", HOSTILE)
def test_hostile_names_stay_text(symbol: str, schema: Draft4Validator) -> None:
    """In every form the names come out as they are, or cleaned; and nothing else does."""
    name = f"{symbol}{ESC}.tdbg"
    value = hostile(symbol, name)
    assert {finding.rule for finding in value.findings} >= {Rule.FRAME_CONSUMED_CORRUPT}
    shown = clean(name, 4096)
    assert shown.endswith("?[31m??.tdbg")

    seen, top = page(rendered("html", value))
    assert top.findtext("body/section/h1") == shown
    assert any(f"{symbol}2+2" in text for text in seen.text)

    (suite,) = suites(rendered("junit", value))
    assert suite.get("name") == shown and f"{symbol}2+2" in (suite.findtext("testcase/failure") or "")

    found = list(commands(rendered("github", value)))
    assert len(found) == len(value.findings)  # no name makes a command of its own
    assert all(title.endswith(shown) for _, title, _ in found) and f"{symbol}2+2" in found[0][2]

    run = run_of(rendered("sarif", value), schema)
    texts = [one["message"]["text"] for one in run["results"]]
    assert any(symbol.replace("{", "{{").replace("}", "}}").replace("](", "\\](") + "2+2" in text for text in texts)
    assert all(re.fullmatch(r"[A-Za-z0-9._~%/-]+", artifact["location"]["uri"]) for artifact in run["artifacts"])
    for form in FORMS:
        assert not set(rendered(form, value)) & {"\x1b", "\u202e", "\0"}


# -- the command line ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_exit_codes_and_files_are_those_of_the_other_forms(run_cli: Cli, tmp_path: Path, form: str) -> None:
    write_race(tmp_path / "race.tdbg", returns=2)
    write_race(tmp_path / "bare.tdbg", layout=Layout())
    (tmp_path / "bad.tdbg").write_bytes(b"no trace")
    printed = run_cli("replay", "--format", form, "race.tdbg", code=1)
    assert printed.stderr == "" and str(tmp_path) not in printed.stdout
    done = run_cli("replay", "--format", form, "-o", "out", "--write-baseline", "known.json", "race.tdbg", code=1)
    assert done.stdout == "" and (tmp_path / "out").read_text() == printed.stdout
    assert run_cli("replay", "--format", form, "bare.tdbg", code=3).stdout
    both = run_cli("replay", "--format", form, "bad.tdbg", "race.tdbg", code=2)
    assert "bad.tdbg" in both.stdout and "bad.tdbg" in both.stderr
    assert run_cli("replay", "--format", form, "-o", "none", "bad.tdbg", code=2).stdout == ""
    assert not (tmp_path / "none").exists()
    known = run_cli("replay", "--format", form, "--baseline", "known.json", "race.tdbg", code=0).stdout
    marks = {"sarif": '"status": "accepted"', "junit": "<skipped", "github": "title=known error", "html": "known error: "}
    assert marks[form] in known and marks[form] not in printed.stdout


@pytest.mark.parametrize("form", FORMS)
def test_standard_input_and_positions(run_cli: Cli, tmp_path: Path, form: str) -> None:
    write_race(tmp_path / "race.tdbg", returns=2)
    data = (tmp_path / "race.tdbg").read_bytes()
    assert "frame-consumed-corrupt" in run_cli("replay", "--format", form, "-", stdin=data, code=1).stdout
    early = run_cli("replay", "--format", form, "--at", "3", "race.tdbg", code=1).stdout
    assert "frame-clobbered" in early
    assert "resume-loop, cpu" not in early and "error: resume-loop" not in early and '"ruleId": "resume-loop"' not in early
