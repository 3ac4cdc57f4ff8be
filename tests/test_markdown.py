"""The report as Markdown: what it says, and that nothing of a trace is obeyed by who renders it."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from samples import CLOBBER, LAYOUT, LOOP, STATS, SYMBOLS, fill_race, race, write_race

from tracedbg.describe import Words
from tracedbg.layout import Layout
from tracedbg.report import Result, markdown
from tracedbg.state import Cause, Finding
from tracedbg.trace import Trace
from tracedbg.writer import TraceWriter, build

EVIL = "x`</pre><script>alert(1)</script>[a](http://evil.example)**b** __c__"
WORSE = "x~~d~~ | e | &lt; $f$ #12 @octocat www.evil.example <!-- ![i](x) \\"
ACTIVE = {"html_inline", "html_block", "link_open", "image", "em_open", "s_open", "blockquote_open", "lheading_open"}


def result(*findings: Finding, trace: Trace | None = None, **change: object) -> Result:
    trace = trace or race(returns=3)
    base = Result(trace.path, trace, Words(trace), findings, STATS)
    return replace(base, **change)  # type: ignore[arg-type]


def text(value: Result, *inputs: str) -> str:
    return "\n".join(markdown.render(value, inputs or ("race.tdbg",))) + "\n"


def tokens(source: str) -> Iterator[Token]:
    """What a renderer with HTML, tables and links from bare addresses makes of it."""
    for token in MarkdownIt("gfm-like", {"html": True}).parse(source):
        yield token
        yield from token.children or ()


def plain(source: str) -> str:
    """The text that a reader sees."""
    return "".join(t.content for t in tokens(source) if t.type in ("text", "code_inline", "fence", "text_special"))


def test_the_report_of_the_race(golden: Callable[[str, str], None]) -> None:
    golden("report-race.md", text(result(CLOBBER, replace(LOOP, number=1))))


def test_the_command_line_prints_it(run_cli: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    write_race(tmp_path / "a b.tdbg")
    done = run_cli("replay", "--format", "markdown", "--stores", "1000-2000", "a b.tdbg", code=1)
    assert done.stdout.startswith("# tracedbg: `a b.tdbg`\n")
    assert "```sh\ntracedbg view --stores 1000-2000 'a b.tdbg' --at 3\n```\n" in done.stdout
    assert "**Verdict:** 1 error, 1 warning" in done.stdout
    assert "state after event" not in done.stdout
    state = run_cli("replay", "--format", "markdown", "--at", "1", "a b.tdbg", code=1).stdout
    assert "\n```text\nstate after event 1 (#570) of 4: " in state and state.endswith("\n```\n")
    assert "frame-clobbered" not in state  # not yet


def test_several_traces_and_a_limit(run_cli: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    write_race(tmp_path / "a.tdbg")
    write_race(tmp_path / "-b.tdbg")
    done = run_cli("replay", "--format", "markdown", "--max-findings", "1", "a.tdbg", "./-b.tdbg", code=1)
    assert done.stdout.count("# tracedbg: ") == 2 and "\n\n# tracedbg: `./-b.tdbg`\n" in done.stdout
    assert "tracedbg view ./-b.tdbg --at 3" in done.stdout
    assert done.stdout.count("\n1 more finding is not shown\n") == 2


def test_equal_findings_are_told_once() -> None:
    said = text(result(*(replace(CLOBBER, number=n) for n in range(3))))
    assert said.count("## error") == 1 and "3 times, first at event 3 (`#571`); again at 3 (`#571`), 3 (`#571`)\n" in said


def test_a_clean_trace_and_one_without_layout() -> None:
    assert text(result()) == "# tracedbg: `race.tdbg`\n\n7 events, 1 CPU, from hand\n\n**Verdict:** clean\n"
    trace = build(lambda writer: None)
    assert trace.layout == Layout() and "- layout: none; frames cannot be placed" in text(result(trace=trace))


def test_the_table_tells_values_apart() -> None:
    rows = [line for line in text(result(CLOBBER)).splitlines() if line.startswith("| `")]
    assert rows[0] == (
        "| `ffff8300bffd2fd8` | rip | `ffff82d0402f9c06` default_idle+0xc6 | `ffff82d04032a242` do_nmi+2 | **differs** |"
    )
    assert rows[1] == "| `ffff8300bffd2fe0` | cs | `e008` | `e008` | same value |"
    assert rows[4] == "| `ffff8300bffd2ff8` | ss | `e010` | `0` | **differs** |"
    part = [line for line in text(result(replace(CLOBBER, slots=0b1, differ=0b1))).splitlines() if line.startswith("| `")]
    assert part[1] == "| `ffff8300bffd2fe0` | cs | `e008` |  | not overwritten |"


@pytest.mark.parametrize(
    "name",
    [
        EVIL, WORSE, "`", "``a`", "|", "a|b", "\\|", "]", "[x]: http://e", "#571", "@a", "<b", "&amp;", "*a*", "_a_", "1. a",
        "a\nb", "[a](b)", "http://evil.example", "www.evil.example",
    ],
)  # fmt: skip
def test_names_are_text(name: str) -> None:
    def fill(writer: TraceWriter) -> None:
        names = dict(LAYOUT.names)
        try:
            LAYOUT.names[2] = name
            fill_race(writer)
            writer.meta = {"source": {"format": name}, "layout": {"origin": "file", "file": name, "assumption": [name]}}
            writer.symbols = SYMBOLS.replace(b"do_nmi", name.encode().replace(b"\n", b"")).replace(
                b"default_idle", f"d{name}".encode().replace(b"\n", b"")
            )
            writer.flush()
        finally:
            LAYOUT.names.clear()
            LAYOUT.names.update(names)

    trace = build(fill, name=f"dir/{name}.tdbg")
    said = text(result(CLOBBER, replace(LOOP, number=1), trace=trace), f"dir/{name}.tdbg")
    found = list(tokens(said))
    kinds = {token.type for token in found}
    assert not kinds & ACTIVE
    assert {t.content for t in found if t.type == "inline" and "verdict" in t.content.lower()} == {"**Verdict:** 2 errors"}
    assert sum(t.type == "strong_open" for t in found) == 1 + 2 * 4  # the verdict, and four words that differ in each table
    assert sum(t.type == "heading_open" for t in found) == 3
    assert sum(t.type == "td_open" for t in found) == 2 * 5 * 5 and sum(t.type == "th_open" for t in found) == 2 * 5
    assert sum(t.type == "fence" for t in found) == 2
    if "\n" not in name:
        seen = plain(said)  # shown, not dropped: as the source, and as the symbol of both values
        for shown in (f"from {name}", f"{name}+2", f"d{name}+0xc6"):
            assert shown in seen


def test_references_and_mentions_stand_in_code_only() -> None:
    """GitHub makes links of #12 and @name wherever they are text, also where the source has an entity."""
    said = markdown.escape("see #12, @octocat, foo@plt, http://a www.b #c @")
    outside = "".join(t.content for t in tokens(said) if t.type == "text")
    assert outside == "see , octocat, fooplt, httpa b #c @"


def test_code_holds_any_text() -> None:
    for name in ("a", "`", "``", "a`b``c", " a ", "` a"):
        (token,) = [t for t in tokens(f"x {markdown.code(name)} y") if t.type == "code_inline"]
        assert token.content == name
    assert markdown.block(["```", "a"], "sh") == ["````sh", "```", "a", "````"]
    assert markdown.block([]) == ["```", "```"]
    assert markdown.code("a\x1b[31m\n") == "`a?[31m?`"


@pytest.mark.parametrize(
    "name",
    [
        "plain.tdbg", "a b", "it's", "$(rm x)", "`x`", "a\nb", "\x1b]0;x\x07", "\x1bc\x1bff", "\u202e", "é", "\\'\n\\x41", "*",
        "~",
    ],
)  # fmt: skip
def test_commands_are_words_again_in_a_shell(name: str) -> None:
    said = markdown.command((name,), 7)
    assert all(ch.isprintable() for ch in said)
    done = subprocess.run(["bash", "-c", f"set -- {said}; printf %s \"$3\""], capture_output=True, check=True)
    assert done.stdout.decode() == name
    if name.isprintable():
        assert shlex.split(said) == ["tracedbg", "view", name, "--at", "7"]


def test_commands_keep_bytes_that_are_no_utf8() -> None:
    assert markdown.quote(b"a\xffb".decode("utf-8", "surrogateescape")) == "$'a\\xff'$'b'"
    assert markdown.quote("\ud800") == "$'\\x3f'"  # not a name that a file can have


def test_one_finding_is_a_message_of_its_own() -> None:
    trace = race(returns=3)
    said = markdown.one(LOOP, Words(trace), ("some dir/race.tdbg",))
    assert said.startswith("## error: resume-loop, cpu 0, event 3 (`#571`)\n\nNMI overwrote the frame of the NMI at event 0")
    assert said.endswith("```sh\ntracedbg view 'some dir/race.tdbg' --at 3\n```\n\nTrace: `race.tdbg`\n")
    for role, event in (("victim", "0 (`#569`)"), ("cause", "2"), ("writer", "3 (`#571`)"), ("consumer", "5")):
        assert f"\n- {role}: event {event}: " in said


def test_what_would_have_prevented_it_names_the_events() -> None:
    words = Words(race(returns=3))
    held, copied = words.prevention(CLOBBER)
    assert held == (
        "NMIs blocked until the IRET of event 0 (#569): without the IRET at event 2 the NMI at event 3 (#571) would have been "
        "kept pending"
    )
    assert copied == "the frame of event 0 (#569) copied off IST2, or IST2 left, before event 2"  # from there on it was luck
    other = replace(CLOBBER, cause=Cause.MASKABLE, cause_event=None, cause_frame=None)
    assert words.prevention(other)[0] == "IF = 0 until the IRET of event 0 (#569): the NMI at event 3 (#571) would have waited"
    assert words.prevention(other)[-1].endswith("before event 3 (#571)")
    assert words.prevention(replace(CLOBBER, victim=None)) == ()
    assert words.prevention(CLOBBER, 3) == words.prevention(CLOBBER)
