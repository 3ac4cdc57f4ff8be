"""Signatures survive another recording of the same bug; baselines accept exactly what they name; hostile files are refused."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from samples import CLOBBER, DO_NMI, INNER, IST_MC, IST_NMI, LOOP, OUTER, VICTIM, WRITER, frame, race

from tracedbg import baseline
from tracedbg.describe import Words
from tracedbg.errors import FormatError
from tracedbg.state import Cause, Context, Evidence, Finding, Kind, Mismatch, Rule, ShutdownReason, Source
from tracedbg.symbols import Symbols
from tracedbg.writer import TraceWriter, build

RACE = "frame-clobbered stack=ist2 victim=0x02/nmi@default_idle writer=0x02/nmi@do_nmi"


@pytest.fixture
def words() -> Words:
    return Words(race())


def at(rule: Rule, base: Finding = CLOBBER, **change: object) -> Finding:
    """`base` as a finding of another rule."""
    return replace(base, rule=rule, raised_rule=rule, **change)  # type: ignore[arg-type]


def loose(rule: Rule, **change: object) -> Finding:
    """A finding without frames."""
    return at(rule, **{"victim": None, "writer": None, "cause": Cause.NONE, **change})


def test_the_signature_of_the_race(words: Words) -> None:
    assert baseline.signature(CLOBBER, words) == RACE
    assert baseline.signature(LOOP, words) == RACE.replace("frame-clobbered", "resume-loop")


def test_another_recording_has_the_same_signature(words: Words) -> None:
    """Other event numbers, another CPU, other addresses of the stack and in the same functions."""
    victim = replace(VICTIM, entry=90, cpu=3, saved=replace(OUTER, rip=0xFFFF82D0402F9B40, rsp=0x1000))
    writer = replace(WRITER, entry=97, cpu=3, hi=0x5000, lo=0x5000 - 40, saved=replace(INNER, rip=DO_NMI + 0x80))
    other = replace(CLOBBER, number=7, event=97, cpu=3, lo=0, hi=40, victim=victim, writer=writer, cause_event=95, count=3)
    assert baseline.signature(other, words) == RACE


@pytest.mark.parametrize(
    "other",
    [
        at(Rule.FRAME_SAME_BYTES),
        replace(CLOBBER, writer=replace(WRITER, ist=1)),
        replace(CLOBBER, writer=replace(WRITER, vector=18)),
        replace(CLOBBER, writer=replace(WRITER, source=Source.SOFT_INT)),
        replace(CLOBBER, victim=replace(VICTIM, vector=1)),
        replace(CLOBBER, victim=replace(VICTIM, saved=replace(OUTER, rip=DO_NMI))),
        replace(CLOBBER, writer=replace(WRITER, saved=replace(INNER, rip=0x1234))),
    ],
)
def test_another_bug_has_another_signature(words: Words, other: Finding) -> None:
    assert baseline.signature(other, words) != RACE


def test_signatures_hold_no_numbers_of_a_recording(words: Words) -> None:
    for rule in Rule:
        for base in (CLOBBER, loose(rule)):
            said = baseline.signature(at(rule, base), words)
            assert not re.search(r"0x[0-9a-f]{3,}|event [0-9]|#[0-9]", said), said
            assert said.startswith(rule.name.lower().replace("_", "-"))


def test_unknown_symbols_and_unknown_addresses_are_one() -> None:
    bare = Words(race(), Symbols())
    said = "frame-clobbered stack=ist2 victim=0x02/nmi@? writer=0x02/nmi@?"
    assert baseline.signature(CLOBBER, bare) == said
    lost = replace(CLOBBER, victim=replace(VICTIM, saved=Context(None, None, None, None, None, None)))
    assert baseline.signature(lost, bare) == said


def test_what_is_inferred_is_told_apart_by_stack_only(words: Words) -> None:
    inferred = replace(CLOBBER, evidence=Evidence.INFERRED)
    assert baseline.signature(inferred, words) == "frame-clobbered stack=ist2 victim=0x02/nmi writer=0x02/nmi"


def test_stacks(words: Words) -> None:
    def stack(**change: object) -> str:
        lone = replace(CLOBBER, victim=None, writer=replace(WRITER, **change))  # type: ignore[arg-type]
        return baseline.signature(lone, words).split()[1]

    assert stack(ist=7) == "stack=ist7"
    assert stack(ist=0, saved=replace(INNER, cs=0x33)) == "stack=rsp0"
    assert stack(ist=0, saved=replace(INNER, cs=0xE008)) == "stack=current"
    assert stack(ist=0, saved=replace(INNER, cs=None)) == "stack=current"
    assert stack(ist=0, fred=True, level=2) == "stack=level2"
    bare = replace(CLOBBER, writer=replace(WRITER, ist=0))  # a writer of which only the record is known
    assert baseline.signature(bare, words) == RACE


@pytest.mark.parametrize(
    ("finding", "said"),
    [
        (loose(Rule.SHUTDOWN, detail=ShutdownReason.MCIP, event=1), "shutdown event=deliver/0x12/mc@do_nmi reason=mcip"),
        (loose(Rule.SHUTDOWN, detail=99, event=99), "shutdown reason=other"),
        (loose(Rule.TRACE_GAP, event=2), "trace-gap event=iret"),
        (at(Rule.FAKE_NMI, victim=None), "fake-nmi stack=ist2 writer=0x02/nmi"),
        (loose(Rule.MODEL_MISMATCH, detail=Mismatch.IF_CLEAR | Mismatch.ENTER_CS, event=0),
         "model-mismatch event=deliver/0x02/nmi what=enter-cs+if-clear"),
        (loose(Rule.MODEL_MISMATCH, detail=0, event=99), "model-mismatch what=other"),
        (at(Rule.REENTRY_WINDOW, writer=None, cause=Cause.MC_UNMASKED),
         "reentry-window stack=ist2 victim=0x02/nmi cause=mc-unmasked"),
        (loose(Rule.HELD_VECTOR, detail=0x12, event=99), "held-vector vector=0x12"),
        (loose(Rule.ILLEGAL_VECTOR, detail=2, event=99), "illegal-vector vector=0x02"),
        (at(Rule.TOKEN_BUSY, victim=frame(1, 18, Source.MC, IST_MC, INNER), writer=None, detail=1),
         "token-busy stack=ist1 victim=0x12/mc@do_nmi token=ist1"),
        (loose(Rule.DOUBLE_FAULT, event=99), "double-fault"),
    ],
)  # fmt: skip
def test_signatures_of_the_other_rules(words: Words, finding: Finding, said: str) -> None:
    assert baseline.signature(finding, words) == said


def test_a_request_names_its_vector() -> None:
    def fill(writer: TraceWriter) -> None:
        writer.event(Kind.RAISE, cpu=0, arg=0x12, source=Source.FIXED)
        writer.event(Kind.RAISE, cpu=0)

    words = Words(build(fill))
    held = loose(Rule.HELD_VECTOR, detail=0x12, event=0)
    assert baseline.signature(held, words) == "held-vector event=raise/0x12/fixed vector=0x12"
    assert baseline.signature(loose(Rule.NMI_LOST, event=1), words) == "nmi-lost event=raise/?/unknown"


# -- the file -----------------------------------------------------------------------------------------------------------


def written(*findings: Finding) -> str:
    collector = baseline.Collector()
    collector.add(findings, Words(race()))
    out = io.StringIO()
    collector.write(out)
    return out.getvalue()


FAKE = at(Rule.FAKE_NMI, victim=None, evidence=Evidence.RECORDED, number=5)


def test_the_file_is_sorted_and_counts() -> None:
    text = written(FAKE, CLOBBER, replace(CLOBBER, number=2, event=9), LOOP)
    assert json.loads(text) == {
        "schema": "tracedbg.baseline",
        "schema_version": 1,
        "findings": [
            {"signature": "fake-nmi stack=ist2 writer=0x02/nmi", "severity": "warning", "count": 1,
             "line": "Vector 2 was delivered by something that is not an NMI (NMI, IST2)"},
            {"signature": RACE, "severity": "error", "count": 2,
             "line": "A frame that was still to be resumed was overwritten (NMI over NMI, IST2)"},
            {"signature": RACE.replace("frame-clobbered", "resume-loop"), "severity": "error", "count": 1,
             "line": "A return resumes its own handler again and again (NMI over NMI, IST2)"},
        ],
    }  # fmt: skip
    assert text.isascii() and text.endswith("}\n") and text == written(LOOP, replace(CLOBBER, event=9), CLOBBER, FAKE)


def test_what_was_written_is_known_and_nothing_else(words: Words) -> None:
    read = baseline.parse(written(CLOBBER, FAKE).encode())
    assert read.missing() is not None
    assert read.known(replace(CLOBBER, event=77, cpu=9), words)
    assert not read.known(LOOP, words)
    assert read.missing() == "-: 1 of the baseline did not appear: fake-nmi stack=ist2 writer=0x02/nmi"
    assert read.known(FAKE, words)
    assert read.missing() is None


def test_many_that_did_not_appear_are_one_line() -> None:
    entries = [{"signature": f"s{n}", "severity": "note"} for n in range(5)]
    document = {"schema": "tracedbg.baseline", "schema_version": 1, "findings": entries}
    read = baseline.parse(json.dumps(document).encode(), "k.json")
    assert read.missing() == "k.json: 5 of the baseline did not appear: s0; s1; s2; and 2 more"


def test_a_finding_that_became_worse_is_not_known(words: Words) -> None:
    """Without symbols a gap rule has one signature whatever its evidence; only the severity tells that it is proven now."""
    weak = at(Rule.ERROR_CODE_MISMATCH, victim=None, evidence=Evidence.INFERRED)
    proven = replace(weak, evidence=Evidence.RECORDED)
    assert baseline.signature(weak, words) == baseline.signature(proven, words)
    read = baseline.parse(written(weak).encode())
    assert read.known(weak, words) and not read.known(proven, words)
    assert read.missing() is None  # it did appear
    read = baseline.parse(written(weak, proven).encode())  # the worse one is what is accepted
    assert read.known(weak, words) and read.known(proven, words)


def document(**change: object) -> bytes:
    return json.dumps({"schema": "tracedbg.baseline", "schema_version": 1, "findings": [], **change}).encode()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "offset 0x0: not JSON: "),
        (b'{"schema": "\xc3\xa4", x', "offset 0x11: not JSON: "),
        (b"\x80", "offset 0x0: not UTF-8 text"),
        (b"[" * 200_000, "nested too deeply"),
        (b"1" * 10_000, "an impossible number"),
        (b"[]", "not a baseline"),
        (b'{"schema": "tracedbg.replay", "schema_version": 1}', "not a baseline"),
        (document(schema_version=2), "baseline of version 2, this program reads 1"),
        (document(schema_version=True), "baseline of version ?"),
        (document(schema_version="1\n"), "baseline of version ?"),
        (document(findings={}), "without a list `findings`"),
        (document(findings=[3]), "findings[0] is not an object"),
        (document(findings=[{"severity": "note"}]), "findings[0]: `signature` is not a line of text"),
        (document(findings=[{"signature": "", "severity": "note"}]), "`signature` is not"),
        (document(findings=[{"signature": "a\x1b[31m", "severity": "note"}]), "`signature` is not"),
        (document(findings=[{"signature": "\ud800", "severity": "note"}]), "`signature` is not"),
        (document(findings=[{"signature": "x" * 2049, "severity": "note"}]), "`signature` is not"),
        (document(findings=[{"signature": "x", "severity": "fatal"}]), "findings[0]: `severity` is none of note, warning, error"),
        (document(findings=[{"signature": "x", "severity": ["note"]}]), "`severity` is none of"),
        (document(findings=[{"signature": "x", "severity": "note", "count": 0}]), "`count` is not a number from 1 on"),
        (document(findings=[{"signature": "x", "severity": "note", "count": True}]), "`count` is not"),
        (document(findings=[{"signature": "x", "severity": "note", "count": 1.5}]), "`count` is not"),
        (document(findings=[{"signature": "x", "severity": "note", "line": 3}]), "`line` is not text"),
        (document(findings=[{"signature": "x", "severity": "note"}] * 2), "findings[1]: the signature was there before"),
        (b" " * ((16 << 20) + 1), "larger than 16 MiB"),
    ],
)
def test_hostile_files_are_one_line(data: bytes, said: str) -> None:
    with pytest.raises(FormatError, match=re.escape(said)) as caught:
        baseline.parse(data, "b.json")
    assert str(caught.value).startswith("b.json: ") and "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such file or directory"):
        baseline.load(str(tmp_path / "missing"))
    with pytest.raises(FormatError, match="is a directory"):
        baseline.load(str(tmp_path))
    if Path("/dev/zero").exists():
        with pytest.raises(FormatError, match="larger than 16 MiB"):
            baseline.load("/dev/zero")


def test_every_cut_and_flipped_byte_is_read_or_refused() -> None:
    data = written(CLOBBER, FAKE).encode()
    tries: list[Callable[[int], bytes]] = [lambda n: data[:n], lambda n: data[:n] + bytes([data[n] ^ 0x21]) + data[n + 1 :]]
    read = 0
    for number in range(len(data)):
        for one in tries:
            try:
                baseline.parse(one(number))
                read += 1
            except FormatError:
                pass
    assert 0 < read < len(data)  # flips inside of `line`


def test_the_top_of_the_stack_is_no_part_of_it(words: Words) -> None:
    moved = replace(CLOBBER, writer=replace(WRITER, hi=IST_NMI + 0x10000, lo=IST_NMI + 0x10000 - 40))
    assert baseline.signature(moved, words) == RACE
