"""Known answers: each tests/cases/*.case is replayed by the C core and by the slow model and held to what it expects."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from casecheck import ModelView, check, coverage
from casefile import KINDS, OPTIONS, STATE_FIELDS, Case, load, words_of

from tracedbg.errors import FormatError
from tracedbg.formats.case.text import LineError
from tracedbg.state import Cause, Evidence, FrameStatus, Mismatch, Settle, Shadow

CASES = sorted((Path(__file__).parent / "cases").glob("*.case"))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_case(path: Path) -> None:
    with load(path) as case:
        assert check(case) == []


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_a_case_says_what_it_is_and_what_it_expects(path: Path) -> None:
    with load(path) as case:
        keys = [key for key, _ in case.text.header]
        assert {"title", "source", "rules"} <= set(keys) and case.text.prose
        assert "verdict" in {e.kind for e in case.expect} and {e.kind for e in case.expect} - {"verdict", "finding"}


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_a_near_miss_is_not_hit(path: Path) -> None:
    with load(path) as case:
        covered = coverage(case)
    assert not covered.near_misses & (covered.raised | covered.final)


# -- the runner is not blind ----------------------------------------------------------------------------------------------

# Memory at 0x5000 holds 8 bytes at the start. A fake NMI, a genuine one in it, and both returns.
BASE = """\
tracedbg case 1
title: base

[trace]
cpus = 1
fidelity = ["returns"]

[layout]
[[cpu]]
tr = "0x1000"
idt = "0x2000"
[[tss]]
base = "0x1000"
ist2 = "0x208000"
[[idt]]
base = "0x2000"
gate.2 = { handler = "0x100200", ist = 2 }

[memory]
0x5000: words 0x1122334455667788

[events]
fake: deliver NMI source extint rip 0x101000 cs 0x8 rflags 0x202 rsp 0x240000 ss 0x10
nmi: deliver NMI source nmi rip 0x100240 cs 0x8 rflags 0x2 rsp 0x207f80 ss 0x10
inner: return iret rsp 0x207fd8 -> rip 0x100240 cs 0x8 rflags 0x2 rsp 0x207f80 ss 0x10
outer: return iret rsp 0x207fd8 -> rip 0x100240 cs 0x8 rflags 0x2 rsp 0x207f80 ss 0x10
part: write addr 0x5002 len 2 value 0xabcd

[expect]
"""

FAKE = "finding fake-nmi at fake: writer fake victim none evidence recorded cause none count 1 cpu 0 severity warning"
CLOBBER = (
    "finding frame-clobbered at nmi: victim fake writer nmi bytes 0x207fd8-0x208000 slots rip,cs,rflags,rsp,ss "
    "differ rip,rflags,rsp evidence computed cause nmi-never-blocked cause-event none cause-frame none settled outer "
    "as frame-consumed-corrupt settled-evidence recorded settled-by return consumer outer severity error"
)
LOOP = "finding resume-loop at outer: bytes 0x207fd8-0x208000 evidence recorded count 1"
FINDINGS = [FAKE, CLOBBER, LOOP]

# What holds, and the same with one thing wrong.
LINES = [
    ("frame fake: 0x207fd8-0x208000 ist2", "frame fake: 0x207fd0-0x208000 ist2"),
    ("frame fake: 0x207fd8-0x208000", "frame fake: 0x207fd8-0x208008"),
    ("frame nmi: 0x207fd8-0x208000 ist2", "frame nmi: 0x207fd8-0x208000 ist3"),
    ("frame nmi: 0x207fd8-0x208000", "frame nmi: 0x207fd8-0x208000 no-ist"),
    ("frame fake: 0x207fd8-0x208000 rip 0x101000", "frame fake: 0x207fd8-0x208000 rip 0x101001"),
    ("frame fake: 0x207fd8-0x208000 cs 8 code ?", "frame fake: 0x207fd8-0x208000 cs 8 code 0"),
    ("frame fake: 0x207fd8-0x208000 vector 2 cpu 0", "frame fake: 0x207fd8-0x208000 vector 3 cpu 0"),
    ("frame inner: none", "frame fake: none"),
    ("frame part: none", "frame part: 0x207fd8-0x208000"),
    ("word 0x207fd8 = 0x101000 by fake after fake", "word 0x207fd8 = 0x101001 by fake after fake"),
    ("word 0x207fd8 = 0x101000 before nmi", "word 0x207fd8 = 0x101000 before inner"),
    ("word 0x207fd8 = 0x100240 by nmi", "word 0x207fd8 = 0x100240 by fake"),
    ("word 0x207fd8 = unknown at start", "word 0x207fd8 = unknown after fake"),
    ("word 0x5000 = 0x1122334455667788 by initial at start", "word 0x5000 = 0x1122334455667788 by nmi at start"),
    (
        "word 0x5000 = 0x11223344abcd7788 by initial,initial,part,part,initial,initial,initial,initial",
        "word 0x5000 = 0x11223344abcd7788 by initial,initial,part,initial,initial,initial,initial,initial",
    ),
    ("byte 0x5002 = 0xcd by part", "byte 0x5002 = 0xcd by initial"),
    ("byte 0x5003 = 0xab by part", "byte 0x5003 = 0xac by part"),
    ("byte 0x5004 = 0x44 by initial", "byte 0x5004 = unknown"),
    ("byte 0x6000 = unknown", "byte 0x6000 = 0"),
    ("open after fake: fake live", "open after fake: fake clobbered"),
    ("open after nmi: fake clobbered, nmi", "open after nmi: nmi, fake clobbered"),
    ("open after inner: fake", "open after inner: fake, nmi"),
    ("open: none", "open after inner: none"),
    ("state cpu 0 after nmi: nmi-blocked yes", "state cpu 0 after nmi: nmi-blocked no"),
    ("state cpu 0 after fake: nmi-blocked ?", "state cpu 0 after fake: nmi-blocked no"),
    ("state cpu 0 after nmi: nmi_since nmi, rsp 0x207fd8", "state cpu 0 after nmi: nmi_since nmi, rsp 0x207fd0"),
    ("state cpu 0 after inner: nmi-unblocked-by 2", "state cpu 0 after inner: nmi-unblocked-by 3"),
    ("state cpu 0 after nmi: nmi-unblocked-by none", "state cpu 0 after inner: nmi-unblocked-by none"),
    ("state cpu 0 after fake: shadow none, gap no", "state cpu 0 after fake: shadow sti, gap no"),
    ("state cpu 0 at start: rip ?, tss 0, idt 0", "state cpu 0 at start: rip 0, tss 0, idt 0"),
    ("verdict error", "verdict warning"),
    ("verdict error", "verdict clean"),
]
WRONG_FACTS = [
    (CLOBBER, "victim fake", "victim nmi"),
    (CLOBBER, "victim fake", "victim none"),
    (CLOBBER, "writer nmi", "writer fake"),
    (CLOBBER, "bytes 0x207fd8-", "bytes 0x207fe0-"),
    (CLOBBER, "-0x208000", "-0x207ff8"),
    (CLOBBER, "slots rip,cs,", "slots rip,"),
    (CLOBBER, "differ rip,", "differ cs,rip,"),
    (CLOBBER, "differ rip,rflags,rsp", "differ none"),
    (CLOBBER, "evidence computed", "evidence recorded"),
    (CLOBBER, "cause nmi-never-blocked", "cause maskable"),
    (CLOBBER, "cause-event none", "cause-event inner"),
    (CLOBBER, "cause-frame none", "cause-frame fake"),
    (CLOBBER, "settled outer", "settled inner"),
    (CLOBBER, "settled outer", "settled none"),
    (CLOBBER, "as frame-consumed-corrupt", "as frame-relocated"),
    (CLOBBER, "as frame-consumed-corrupt ", ""),
    (CLOBBER, "settled-evidence recorded", "settled-evidence inferred"),
    (CLOBBER, "settled-by return", "settled-by cpl3"),
    (CLOBBER, "consumer outer", "consumer inner"),
    (CLOBBER, "consumer outer", "consumer none"),
    (CLOBBER, "severity error", "severity note"),
    (CLOBBER, "at nmi", "at inner"),
    (CLOBBER, "finding frame-clobbered", "finding frame-same-bytes"),
    (FAKE, "count 1", "count 2"),
    (FAKE, "cpu 0", "cpu 1"),
    (FAKE, "severity warning", "severity error"),
]


@pytest.fixture
def loaded(tmp_path: Path) -> Callable[[list[str]], Case]:
    """The base with these expectations."""

    def make(lines: list[str], base: str = BASE) -> Case:
        path = tmp_path / "base.case"
        path.write_text(base + "\n".join(lines) + "\n", encoding="utf-8")
        return load(path)

    return make


Load = Callable[..., Case]


def line_of(case: Case, text: str) -> int:
    return case.path.read_text(encoding="utf-8").split("\n").index(text) + 1


def test_what_holds_passes(loaded: Load) -> None:
    with loaded([*(right for right, _ in dict(LINES).items()), *FINDINGS]) as case:
        assert check(case) == []
        assert {e.kind for e in case.expect} == set(KINDS) - {"option"}


@pytest.mark.parametrize(("right", "wrong"), LINES, ids=[f"{n} {wrong}" for n, (_, wrong) in enumerate(LINES)])
def test_a_wrong_expectation_fails(loaded: Load, right: str, wrong: str) -> None:
    """Of the core and of the model, at its line, and nothing else does."""
    with loaded([right, *FINDINGS]) as case:
        assert check(case) == []
    with loaded([wrong, *FINDINGS]) as case:
        said = check(case)
        line = line_of(case, wrong)
    assert [message.split(": ")[:2] for message in said] == [[f"base.case:{line}", "core"], [f"base.case:{line}", "model"]], said


@pytest.mark.parametrize(("whole", "old", "new"), WRONG_FACTS, ids=[f"{old} {new}" for _, old, new in WRONG_FACTS])
def test_a_wrong_fact_of_a_finding_fails(loaded: Load, whole: str, old: str, new: str) -> None:
    assert whole.count(old) == 1
    wrong = whole.replace(old, new)
    with loaded([wrong if line == whole else line for line in FINDINGS]) as case:
        said = check(case)
        line = line_of(case, wrong)
    for view in ("core", "model"):
        assert any(message.startswith(f"base.case:{line}: {view}: ") for message in said), said


@pytest.mark.parametrize("missing", FINDINGS, ids=lambda line: line.split()[1])
def test_a_finding_that_is_not_listed_fails(loaded: Load, missing: str) -> None:
    with loaded([line for line in FINDINGS if line != missing]) as case:
        said = check(case)
    assert len(said) == 2 and all("was raised, but is not listed" in message for message in said)


def test_a_finding_that_is_listed_twice_fails(loaded: Load) -> None:
    with loaded([*FINDINGS, FAKE]) as case:
        said = check(case)
    assert len(said) == 2 and all("no fake-nmi was raised at event 0" in message for message in said)


def test_without_any_finding_listed_all_of_them_fail(loaded: Load) -> None:
    with loaded([]) as case:
        assert len(check(case)) == 6


def test_core_and_model_are_held_to_each_other(loaded: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ModelView.digest
    monkeypatch.setattr(ModelView, "digest", lambda self, position: right(self, position) ^ (position == 3))
    with loaded(FINDINGS) as case:
        assert check(case) == ["base.case: core and model differ at position 3"]


def test_options_reach_core_and_model(loaded: Load) -> None:
    """A faulting IRET unblocks NMIs, unless the option says otherwise."""
    base = BASE.replace("inner: return iret rsp", "inner: return iret faulted rsp")
    for option, state in (("yes", "no"), ("no", "yes")):
        with loaded([f"option iret-fault-unblocks {option}", f"state after inner: nmi-blocked {state}"], base) as case:
            assert case.options == {"iret-fault-unblocks": option == "yes"}
            assert not [message for message in check(case) if "nmi_blocked" in message]


def test_what_a_case_covers(loaded: Load) -> None:
    base = BASE.replace("title: base", "title: base\nnear-miss: fake-mce shutdown\nnear-miss: nmi-lost")
    with loaded([], base) as case:
        covered = coverage(case)
    assert covered.raised == {"fake-nmi", "frame-clobbered", "resume-loop"}
    assert covered.final == {"fake-nmi", "frame-consumed-corrupt", "resume-loop"}
    assert covered.near_misses == {"fake-mce", "shutdown", "nmi-lost"}


# -- mistakes in [expect] -----------------------------------------------------------------------------------------------

MISTAKES = [
    ("frmae fake: none", "'frmae' is no expectation"),
    ("_word 0", "'_word' is no expectation"),
    ("frame", "an event is missing"),
    ("frame 9: none", "there is no event 9, the last is 4"),
    ("frame first: none", "no event is labelled 'first'"),
    ("frame fake none", "'none' instead of :"),
    ("frame fake: 0x10", "'0x10' is not LO-HI"),
    ("frame fake: 0x10-0x10", "'0x10-0x10' is empty"),
    ("frame fake: 0x10-0x20 ist8", "a frame has no 'ist8'"),
    ("frame fake: 0x10-0x20 rip 1 rip 1", "rip is there twice"),
    ("frame fake: none ist2", "what is 'ist2'?"),
    ("word 0x1001 = 0", "0x1001 is not a multiple of 8"),
    ("word 0x1000 0", "'0' instead of ="),
    ("word 0x1000 = 0 by 0,1", "`by` takes one writer, or 8"),
    ("byte 0x1000 = 256", "value: '256' is not a number of 8 bits"),
    ("word 0x1000 = 0 after", "an event is missing"),
    ("word 0x1000 = 0 at noon", "'noon' instead of start or end"),
    ("open: fake lively", "what is 'lively'?"),
    ("state cpu 1: rip 0", "there is no CPU 1"),
    ("state: pc 0", "no field 'pc'"),
    ("state cpu 0 rip 0", "'rip' instead of :"),
    ("state: rip 0, rip 0", "rip is there twice"),
    ("state: mcip 1", "'1' instead of yes or no"),
    ("state: shadow dark", "shadow: no 'dark'"),
    ("finding fake-mni at fake", "finding: no 'fake-mni'"),
    ("finding fake-nmi", "at is missing"),
    ("finding fake-nmi at fake victim 0", "'victim' instead of :"),
    ("finding fake-nmi at fake: colour red", "a finding has no 'colour'"),
    ("finding fake-nmi at fake: count 1 count 1", "count is there twice"),
    ("finding fake-nmi at fake: slots rip,eax", "slots: no 'eax'"),
    ("finding fake-nmi at fake: evidence strong", "evidence: no 'strong'"),
    ("finding shutdown at fake: detail boredom", "detail: no 'boredom'"),
    ("finding model-mismatch at fake: detail enter-rsp,foo", "detail: no 'foo'"),
    ("verdict fine", "'fine' instead of clean or note or warning or error"),
    ("verdict error\nverdict error", "a second verdict"),
    ("option speed 5", "option: no 'speed'"),
    ("option iret-fault-unblocks 1", "'1' instead of yes or no"),
    ("option max-frames 1\noption max-frames 1", "option max-frames is there twice"),
    ("verdict error error", "what is 'error'?"),
]


@pytest.mark.parametrize(("lines", "said"), MISTAKES, ids=[lines for lines, _ in MISTAKES])
def test_a_mistake_in_an_expectation_names_its_line(loaded: Load, lines: str, said: str) -> None:
    with pytest.raises(LineError) as error:
        loaded(lines.split("\n"))
    last = BASE.count("\n") + len(lines.split("\n"))
    assert str(error.value).startswith(f"line {last}: ") and said in str(error.value)


def test_which_cpu_is_said_where_there_are_several(loaded: Load) -> None:
    base = BASE.replace("cpus = 1", "cpus = 2").replace(" deliver NMI", " deliver NMI cpu 1").replace("iret", "iret cpu 1")
    base = base.replace("write addr", "write cpu 1 addr")
    with pytest.raises(LineError, match="which CPU"):
        loaded(["state after nmi: rsp 0x207fd8"], base)
    with loaded(["state cpu 0 after nmi: rsp ?"], base) as case:
        assert not [message for message in check(case) if "rsp" in message]


def test_a_file_that_the_reader_refuses(loaded: Load) -> None:
    with pytest.raises(FormatError, match=r"base\.case: line 23: no event kind"):
        loaded([], BASE.replace("deliver NMI source extint", "eliver NMI source extint"))


def test_the_example_of_the_page_holds(loaded: Load, root: Path) -> None:
    page = (root / "tracedbg" / "help" / "case.md").read_text(encoding="utf-8")
    block = page.split("## An example\n")[1].split("\n## ")[0].strip("\n")
    with loaded([], "\n".join(line.removeprefix("    ") for line in block.split("\n")) + "\n") as case:
        assert check(case) == [] and len(case.expect) == 6


def test_the_page_names_every_word_of_an_expectation(root: Path) -> None:
    page = (root / "tracedbg" / "help" / "case.md").read_text(encoding="utf-8").split("## [expect]")[1]
    words = set(re.findall(r"[a-z0-9-]+", page))
    wanted = {*KINDS, *OPTIONS, *(name.replace("_", "-") for name in STATE_FIELDS)}
    for enum in (Cause, Evidence, FrameStatus, Mismatch, Settle, Shadow):
        wanted |= set(words_of(enum))
    assert wanted <= words
