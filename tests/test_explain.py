"""`tracedbg explain`: every finding and every rule of the architecture has its text."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable

import pytest

from tracedbg import rules
from tracedbg.cli import main
from tracedbg.commands.explain import sections

Cli = Callable[..., subprocess.CompletedProcess[str]]
NUMBERS = [f"R{n}" for n in range(1, 37)]


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["explain", *words]) == 0
    return capsys.readouterr().out


def test_the_table_lists_all_worst_first(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [line.split(maxsplit=2) for line in said(capsys).splitlines()]
    assert len(rows) == 23 and {row[0] for row in rows} == set(rules.BY_ID)
    levels = [row[1] for row in rows]
    assert levels == ["error"] * 11 + ["warning"] * 8 + ["note"] * 4
    assert all(row[2] == rules.BY_ID[row[0]].title for row in rows)


@pytest.mark.parametrize("info", rules.CATALOGUE, ids=lambda info: info.id)
def test_every_finding(info: rules.Info, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, info.id)
    assert text.startswith(f"{info.id} ({info.severity})\n{info.title}\n\n")
    flat = " ".join(text.split())
    assert info.why in flat
    assert all(ref in flat for ref in info.refs) and all(fix in flat for fix in info.fixes)
    assert all(len(line) <= 78 for line in text.splitlines())
    places = [text.index(f"\n{part}") for part in ("Raised: ", "Not raised:\n\n- ", "Rules: ", "Known ways out:\n- ")]
    assert places == sorted(places)
    assert ("only inferred it is a warning" in text) == (info.severity == "error" and rules.can_be_inferred(info.rule))


def test_the_rules_that_a_finding_names_exist() -> None:
    named = set()
    for name, body in sections("findings").items():
        if name in rules.BY_ID:
            last = body.split("\n\n")[-1]
            assert re.fullmatch(r"Rules: (none|R\d+(, R\d+)*)", last), name
            named |= set(re.findall(r"R\d+", last))
    assert {"R2", "R12", "R21"} < named <= set(NUMBERS)


def test_the_rules_are_there_once_and_in_order() -> None:
    found = sections("rules")
    assert [heading.split()[0] for heading in found] == NUMBERS
    for heading, body in found.items():
        text, manual = body.rsplit("\n\n", 1)
        assert re.fullmatch(r"Manual: (SDM Vol\. [1-3][A-D]?,? |APM Vol\. 2 |Intel )\S.*", manual), heading
        assert text.endswith(".") and "\n\n" not in text and 10 <= len(text.split()) <= 110, heading


@pytest.mark.parametrize("name", ["R12", "r12", "R012"])
def test_a_rule(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, name)
    assert text.startswith("R12 IRET unblocks NMIs, even if it faults\n\n")
    assert text.endswith("\n\nManual: SDM Vol. 3A 6.7.1\n")


def test_a_name_in_capitals(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "NMI-Stuck") == said(capsys, "nmi-stuck")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("nmi-stuk", "no finding 'nmi-stuk'; did you mean nmi-stuck or nmi-lost?"),
        ("clobbered", "did you mean frame-clobbered?"),
        ("fake", "did you mean fake-nmi or fake-mce?"),
        ("\x1b[31m", "no finding '?[31m'; `tracedbg explain` lists them"),
        ("", "no finding ''; `tracedbg explain` lists them"),
        ("R0", "no rule R0: they are R1 to R36 (`tracedbg help rules`)"),
        ("R37", "no rule R37: they are R1 to R36"),
        ("R1x", "no finding 'R1x'; `tracedbg explain` lists them"),
    ],
)
def test_what_is_not_there_suggests_what_is(name: str, hint: str, run_cli: Cli) -> None:
    done = run_cli("explain", name, code=2)
    assert done.stdout == "" and done.stderr.count("\n") == 1 and hint in done.stderr
