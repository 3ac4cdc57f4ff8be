"""The command line as a user meets it: exit codes, streams, files, hostile names."""

from __future__ import annotations

import gzip
import json
import os
import pty
import shlex
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from samples import CS, DEFAULT_IDLE, LAYOUT, TASK_RSP, fill_race, write_race

from tracedbg import __version__
from tracedbg.layout import Layout, to_toml
from tracedbg.state import Kind, Source
from tracedbg.trace import Trace
from tracedbg.writer import TraceWriter

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def race_file(tmp_path: Path) -> Path:
    """The race without returns: an error, and the warning of the window that it went through."""
    write_race(tmp_path / "race.tdbg")
    return tmp_path / "race.tdbg"


@pytest.fixture
def clean_file(tmp_path: Path) -> Path:
    """One NMI and its return: clean."""
    with TraceWriter(tmp_path / "clean.tdbg") as writer:
        writer.layout = LAYOUT
        writer.event(Kind.DELIVER, cpu=0, rip=DEFAULT_IDLE, rsp=TASK_RSP, cs=CS, ss=0, rflags=0x206, arg=2, source=Source.NMI)
        writer.event(Kind.RETURN, cpu=0, rsp=0xFFFF8300BFFD2FD8, addr=DEFAULT_IDLE, value=TASK_RSP, rflags=0x206, cs=CS, ss=0)
    return tmp_path / "clean.tdbg"


@pytest.fixture
def gap_file(tmp_path: Path) -> Path:
    """A gap and nothing else."""
    with TraceWriter(tmp_path / "gap.tdbg") as writer:
        writer.layout = LAYOUT
        writer.event(Kind.GAP, cpu=0, value=7)
    return tmp_path / "gap.tdbg"


# -- exit codes ---------------------------------------------------------------------------------------------------------


def test_findings_exit_1_and_the_report_is_on_stdout(run_cli: Cli, race_file: Path) -> None:
    done = run_cli("replay", race_file, code=1)
    assert done.stdout.endswith("\nverdict: 1 error, 1 warning\n")
    assert "frame-clobbered" in done.stdout
    assert done.stderr == ""


def test_clean_exits_0(run_cli: Cli, clean_file: Path) -> None:
    assert run_cli("replay", clean_file, code=0).stdout.endswith("verdict: clean\n")


def test_a_gap_exits_3(run_cli: Cli, gap_file: Path) -> None:
    assert "verdict: unknown: records are missing (1 gap) (1 note)" in run_cli("replay", gap_file, code=3).stdout


def test_no_layout_exits_3_and_says_how_to_get_one(run_cli: Cli, tmp_path: Path) -> None:
    write_race(tmp_path / "bare.tdbg", layout=Layout())
    done = run_cli("replay", "bare.tdbg", code=3)
    assert "verdict: unknown: no layout: 3 deliveries cannot be placed on a stack" in done.stdout
    assert "give it with --layout" in done.stderr


def test_the_monitor_commands_of_the_importer_are_printed(run_cli: Cli, tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "bare.tdbg") as writer:
        fill_race(writer)
        writer.layout = Layout()
        writer.meta = {"layout": {"missing": True, "commands": ["info registers -a", "x /26xw 0x5000\x1b[31m"]}}
    done = run_cli("replay", "bare.tdbg", code=3)
    assert done.stderr.splitlines()[1:] == ["    info registers -a", "    x /26xw 0x5000?[31m"]


def write_gap(path: Path, *, overwrite: bool, fake: bool = False) -> None:
    """An NMI; with `overwrite` a second one over its frame; then a gap, and an NMI on the same stack after it."""
    with TraceWriter(path) as writer:
        fill_race(writer) if overwrite else writer.event(
            Kind.DELIVER, cpu=0, arg=2, source=Source.EXTINT if fake else Source.NMI,
            rip=DEFAULT_IDLE, rsp=TASK_RSP, rflags=0x206, cs=CS, ss=0,
        )  # fmt: skip
        writer.layout = LAYOUT
        writer.event(Kind.GAP, cpu=0, value=7)
        writer.event(
            Kind.DELIVER, cpu=0, arg=2, source=Source.NMI, rip=DEFAULT_IDLE, rsp=TASK_RSP - 64, rflags=0x206, cs=CS, ss=0
        )


def test_after_a_gap_an_overwrite_is_not_claimed(run_cli: Cli, tmp_path: Path) -> None:
    """The frame that was open before may have been returned from in the gap: no finding, but no clean verdict either."""
    write_gap(tmp_path / "gap.tdbg", overwrite=False)
    done = run_cli("replay", "gap.tdbg", code=3)
    assert "frame-clobbered" not in done.stdout
    assert done.stdout.endswith("verdict: unknown: records are missing (1 gap) (1 note)\n")


def test_what_was_found_before_a_gap_stands(run_cli: Cli, tmp_path: Path) -> None:
    write_gap(tmp_path / "gap.tdbg", overwrite=True)
    assert run_cli("replay", "gap.tdbg", code=1).stdout.endswith("verdict: 1 error, 1 warning, 1 note\n")
    run_cli("replay", "--write-baseline", "known.json", "gap.tdbg", code=1)
    assert "unknown: records are missing" in run_cli("replay", "--baseline", "known.json", "gap.tdbg", code=3).stdout


def test_a_warning_and_a_gap(run_cli: Cli, tmp_path: Path) -> None:
    write_gap(tmp_path / "gap.tdbg", overwrite=False, fake=True)
    assert "fake-nmi" in run_cli("replay", "gap.tdbg", code=3).stdout
    run_cli("replay", "--fail-on", "warning", "gap.tdbg", code=1)
    run_cli("replay", "--exit-zero", "gap.tdbg", code=0)


# -- baselines ----------------------------------------------------------------------------------------------------------


def test_a_baseline_makes_the_known_pass(run_cli: Cli, race_file: Path, tmp_path: Path) -> None:
    done = run_cli("replay", "--write-baseline", "known.json", race_file, code=1)
    assert done.stderr == "" and done.stdout.endswith("verdict: 1 error, 1 warning\n")
    entries = json.loads((tmp_path / "known.json").read_text())["findings"]
    signature = "frame-clobbered stack=ist2 victim=0x02/nmi@default_idle writer=0x02/nmi@do_nmi"
    window = "reentry-window stack=ist2 victim=0x02/nmi cause=nmi-unblocked"
    assert [(e["signature"], e["severity"], e["count"]) for e in entries] == [(signature, "error", 1), (window, "warning", 1)]
    done = run_cli("replay", "--baseline", "known.json", race_file, code=0)
    assert "known error: frame-clobbered, cpu 0, event 3 (#571): NMI overwrote" in " ".join(done.stdout.split())
    assert done.stdout.endswith("verdict: clean (2 known)\n") and done.stderr == ""
    report = json.loads(run_cli("replay", "--baseline", "known.json", "--format", "json", race_file, code=0).stdout)
    found = [(f["signature"], f["known"], f["severity"]) for f in report["traces"][0]["findings"]]
    assert found == [(window, True, "warning"), (signature, True, "error")]  # in the order of the events
    run_cli("replay", "--baseline", "known.json", "--at", "start", race_file, code=0)
    at_end = run_cli("replay", "--baseline", "known.json", "--at", "end", race_file, code=0).stdout
    assert "known error: frame-clobbered" in at_end


def test_a_new_finding_counts_beside_a_baseline(run_cli: Cli, race_file: Path, tmp_path: Path) -> None:
    write_race(tmp_path / "loop.tdbg", returns=3)
    run_cli("replay", "--write-baseline", "known.json", race_file, code=1)
    done = run_cli("replay", "--baseline", "known.json", race_file, "loop.tdbg", code=1)
    assert "known error: frame-clobbered" in done.stdout and "\nerror: resume-loop" in done.stdout
    # Of the loop's recording alone the clobber is settled otherwise: it did not appear.
    done = run_cli("replay", "--baseline", "known.json", "loop.tdbg", code=1)
    assert done.stderr.startswith("tracedbg: known.json: 1 of the baseline did not appear: frame-clobbered stack=ist2 ")
    assert done.stderr.count("\n") == 1


def test_another_recording_of_the_race_is_known(run_cli: Cli, race_file: Path, tmp_path: Path) -> None:
    """Three NMIs that return before it: every event has another number."""
    with TraceWriter(tmp_path / "again.tdbg") as writer:
        for _ in range(3):
            at = {"cpu": 0, "cs": CS, "ss": 0, "rflags": 0x206}
            writer.event(Kind.DELIVER, rip=DEFAULT_IDLE + 9, rsp=TASK_RSP - 32, arg=2, source=Source.NMI, **at)
            writer.event(Kind.RETURN, rsp=0xFFFF8300BFFD2FD8, addr=DEFAULT_IDLE + 9, value=TASK_RSP - 32, **at)
        fill_race(writer)
    run_cli("replay", "--write-baseline", "known.json", race_file, code=1)
    assert "event 9 (#571)" in run_cli("replay", "again.tdbg", code=1).stdout
    assert run_cli("replay", "--baseline", "known.json", "again.tdbg", code=0).stderr == ""


def test_the_baseline_file_is_an_output_like_others(run_cli: Cli, race_file: Path, clean_file: Path, tmp_path: Path) -> None:
    run_cli("replay", "--write-baseline", "known.json", "clean.tdbg", code=0)
    first = (tmp_path / "known.json").read_bytes()
    assert json.loads(first)["findings"] == []
    refused = run_cli("replay", "--write-baseline", "known.json", "race.tdbg", code=2)
    assert refused.stdout == "" and refused.stderr == "tracedbg: known.json exists; --force overwrites it\n"
    run_cli("replay", "--write-baseline", "known.json", "--force", "race.tdbg", "missing", code=2)
    assert (tmp_path / "known.json").read_bytes() == first
    run_cli("replay", "--baseline", "known.json", "--write-baseline", "known.json", "--force", "race.tdbg", code=1)
    assert len(json.loads((tmp_path / "known.json").read_bytes())["findings"]) == 2
    done = run_cli("replay", "--write-baseline", "-", "-o", "report.txt", "race.tdbg", code=1)
    assert done.stdout.encode() == (tmp_path / "known.json").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clean.tdbg", "known.json", "race.tdbg", "report.txt"]


def test_a_baseline_from_standard_input(run_cli: Cli, race_file: Path, tmp_path: Path) -> None:
    run_cli("replay", "--write-baseline", "known.json", "race.tdbg", code=1)
    known = (tmp_path / "known.json").read_bytes()
    run_cli("replay", "--baseline", "-", "race.tdbg", stdin=known, code=0)
    assert "standard input can be read only once" in run_cli("replay", "--baseline", "-", "-", stdin=known, code=2).stderr


def test_more_findings_than_the_replay_keeps_are_not_clean(root: Path, tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "fakes.tdbg") as writer:
        writer.layout = LAYOUT
        for vector, source in ((2, Source.EXTINT), (18, Source.FIXED)):
            writer.event(
                Kind.DELIVER, cpu=0, arg=vector, source=source, rip=DEFAULT_IDLE, rsp=TASK_RSP, rflags=0x206, cs=CS, ss=0
            )
    limit = "import tracedbg.replay as r\nr.Replay.__init__.__kwdefaults__['max_findings'] = {}"
    done = run_script(root, tmp_path, limit.format(2), "replay", "fakes.tdbg")
    assert done.returncode == 0 and done.stdout.endswith("\nverdict: 2 warnings\n")
    done = run_script(root, tmp_path, limit.format(1), "replay", "fakes.tdbg")
    assert done.returncode == 3 and "\n1 more finding is not shown\n" in done.stdout
    assert done.stdout.endswith("\nverdict: unknown: 1 finding is more than the replay keeps (1 warning)\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--baseline", "missing"], "missing: no such file or directory"),
        (["--baseline", "."], ".: is a directory"),
        (["--baseline", "race.tdbg"], "race.tdbg: "),
        (["--baseline", "text"], "text: offset 0x0: not JSON: "),
        (["--write-baseline", "."], ".: is a directory"),
        (["--write-baseline", ""], "the name of the output is empty"),
        (["--write-baseline", "no/where"], "no/where: no such file or directory"),
        (["--write-baseline", "-"], "cannot both go to standard output"),
        (["--write-baseline", "/dev/stdout", "-o", "-"], "cannot both go to standard output"),
        (["--write-baseline", "x", "-o", "./x"], "--write-baseline and -o name the same file"),
    ],
)
def test_mistakes_with_baselines(run_cli: Cli, race_file: Path, tmp_path: Path, words: list[str], said: str) -> None:
    (tmp_path / "text").write_text("hello")
    done = run_cli("replay", *words, "race.tdbg", code=2)
    assert done.stderr.startswith("tracedbg: ") and done.stderr.count("\n") == 1 and said in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["race.tdbg", "text"]


@pytest.mark.parametrize(("fail_on", "code"), [("error", 3), ("warning", 3), ("note", 1)])
def test_fail_on(run_cli: Cli, gap_file: Path, fail_on: str, code: int) -> None:
    run_cli("replay", "--fail-on", fail_on, gap_file, code=code)


def test_exit_zero(run_cli: Cli, race_file: Path, gap_file: Path) -> None:
    run_cli("replay", "--exit-zero", race_file, gap_file, code=0)
    run_cli("replay", "--exit-zero", race_file, "missing.tdbg", code=2)


def test_of_several_traces_the_worst_counts(run_cli: Cli, race_file: Path, clean_file: Path, gap_file: Path) -> None:
    run_cli("replay", clean_file, gap_file, code=3)
    run_cli("replay", clean_file, gap_file, race_file, code=1)
    done = run_cli("replay", "missing.tdbg", race_file, code=2)
    assert "verdict: 1 error" in done.stdout  # the others still have their verdict
    assert done.stderr == "tracedbg: missing.tdbg: no such file or directory\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["replay", "missing"], "missing: no such file or directory"),
        (["replay", "."], ".: is a directory"),
        (["replay"], "required: TRACE"),
        (["replay", "--format", "xml", "x"], "invalid choice: 'xml'"),
        (["replay", "--stores", "20-10", "x"], "is not LO-HI in hex"),
        (["replay", "--layout", "plan9", "x"], "no layout preset 'plan9'"),
        (["replay", "--max-findings", "-3", "x"], "--max-findings"),
        (["replay", "--from", "vhs", "race.tdbg"], "no input format 'vhs'"),
        (["replay", "--at", "4", "race.tdbg"], "has no such event (the last is 3)"),
        (["replay", "--at", "0x3", "race.tdbg"], "--at takes the number of an event"),
        (["replay", "--monitor", "m", "race.tdbg"], "--monitor belongs to the log of an emulator"),
        (["replay", "--symbols", "race.tdbg", "race.tdbg"], "not a line of a symbol map"),
        (["replay", "-", "-"], "standard input can be read only once"),
        (["info", "-", "-"], "standard input can be read only once"),
        (["convert", "-", "-", "out.tdbg"], "standard input can be read only once"),
        (["convert", "race.tdbg", ""], "the name of the output is empty"),
        (["replay", "-o", "", "race.tdbg"], "the name of the output is empty"),
        (["convert", "race.tdbg", "--force", "."], ".: is a directory"),
        (["repaly", "race.tdbg"], "repaly: no such file or command; did you mean replay?"),
        (["race.tdbg"], "the viewer needs a terminal"),
        (["view", "race.tdbg"], "the viewer needs a terminal"),
        (["explain", "frame-cloberred"], "did you mean frame-clobbered?"),
        (["help", "layuot"], "did you mean layout?"),
        (["convert", "race.tdbg"], "required: OUT"),
        (["convert", "race.tdbg", "race.tdbg"], "race.tdbg exists; --force overwrites it"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(run_cli: Cli, race_file: Path, words: list[str], said: str) -> None:
    done = run_cli(*words, code=2)
    assert done.stdout == ""
    assert done.stderr.startswith("tracedbg: ") and done.stderr.count("\n") == 1
    assert said in done.stderr


def test_no_command_prints_the_help(run_cli: Cli) -> None:
    assert "usage: tracedbg" in run_cli(code=2).stderr


def test_version_and_help(run_cli: Cli) -> None:
    assert run_cli("--version", code=0).stdout == f"tracedbg {__version__}\n"
    assert "examples:" in run_cli("--help", code=0).stdout
    for verb in ("replay", "convert", "info", "view", "explain", "help"):
        assert "examples:" in run_cli(verb, "--help", code=0).stdout


def test_a_damaged_trace_names_the_offset(run_cli: Cli, race_file: Path) -> None:
    data = race_file.read_bytes()
    race_file.write_bytes(data[: len(data) // 2])
    assert "race.tdbg: offset 0x" in run_cli("replay", "race.tdbg", code=2).stderr


# -- streams ------------------------------------------------------------------------------------------------------------


def test_a_reader_that_goes_away_is_no_error(race_file: Path, root: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tracedbg", "replay", "-v", "--stacks", *[str(race_file)] * 200],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 141
    process.stderr.close()


def test_a_full_disk_is_one_line(race_file: Path, root: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tracedbg", "replay", str(race_file)], stdout=full, stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(root)}, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == b"tracedbg: cannot write: no space left on device\n"


def test_ctrl_c_exits_130(root: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tracedbg", "replay", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)}, cwd=tmp_path, preexec_fn=heed_signals,
    )  # fmt: skip
    time.sleep(1.0)  # it waits for the rest of its input
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"")
    assert b"Traceback" not in err


def test_standard_input(run_cli: Cli, race_file: Path) -> None:
    data = race_file.read_bytes()
    for stdin in (data, gzip.compress(data)):
        done = run_cli("replay", "-", stdin=stdin, code=1)
        assert done.stdout.startswith("-: 4 events, 1 CPU")


def test_names_cannot_act_on_a_terminal(run_cli: Cli, race_file: Path, tmp_path: Path) -> None:
    name = "a\x1b[31mb\u202e"
    (tmp_path / name).write_bytes(race_file.read_bytes())
    done = run_cli("replay", name, code=1)
    assert "\x1b" not in done.stdout and "\u202e" not in done.stdout
    done = run_cli("replay", name + "2", code=2)
    assert "\x1b" not in done.stderr
    done = run_cli("replay", "--bad\x1b[31m", code=2)
    assert "\x1b" not in done.stderr
    raw = run_cli("replay", b"\xff\xfe.tdbg".decode("utf-8", "surrogateescape"), code=2)
    assert raw.stderr.endswith("no such file or directory\n")


def test_a_narrow_locale_escapes_instead_of_failing(run_cli: Cli, race_file: Path, tmp_path: Path) -> None:
    (tmp_path / "ä.tdbg").write_bytes(race_file.read_bytes())
    done = run_cli("replay", "ä.tdbg", code=1, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.stdout.startswith("\\xe4.tdbg: 4 events")


def test_the_same_input_gives_the_same_bytes(run_cli: Cli, race_file: Path) -> None:
    for form in ("text", "json"):
        first = run_cli("replay", "--format", form, race_file, PYTHONHASHSEED="1").stdout
        assert run_cli("replay", "--format", form, race_file, PYTHONHASHSEED="2").stdout == first


# -- replay -------------------------------------------------------------------------------------------------------------


def test_json(run_cli: Cli, race_file: Path, clean_file: Path) -> None:
    report = json.loads(run_cli("replay", "--format", "json", "race.tdbg", "missing", "clean.tdbg", code=2).stdout)
    assert [trace["name"] for trace in report["traces"]] == ["race.tdbg", "missing", "clean.tdbg"]
    assert [f["rule"] for f in report["traces"][0]["findings"]] == ["reentry-window", "frame-clobbered"]
    assert report["traces"][1]["error"] == "missing: no such file or directory"
    assert report["traces"][2]["verdict"] == "clean"


def test_output_file(run_cli: Cli, race_file: Path, tmp_path: Path) -> None:
    done = run_cli("replay", "-o", "out.txt", race_file, code=1)
    assert done.stdout == ""
    assert (tmp_path / "out.txt").read_text().endswith("verdict: 1 error, 1 warning\n")
    assert "out.txt exists; --force overwrites it" in run_cli("replay", "-o", "out.txt", race_file, code=2).stderr
    run_cli("replay", "-o", "out.txt", "--force", race_file, code=1)
    run_cli("replay", "-o", "never.txt", "missing", code=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.txt", "race.tdbg"]  # nothing half-written
    assert "no such file or directory" in run_cli("replay", "-o", "no/where.txt", race_file, code=2).stderr


def test_at_shows_what_is_known_by_then(run_cli: Cli, race_file: Path) -> None:
    before = run_cli("replay", "--at", "1", "--stacks", race_file, code=1).stdout
    assert "state after event 1 (#570) of 4: cpu 0, #MC  at do_nmi+2" in before
    assert "frame-clobbered" not in before
    assert "  NMI at event 0 (#569)  IST2" in before
    after = run_cli("replay", "--at", "3", "--stacks", race_file, code=1).stdout
    assert "frame-clobbered" in after
    assert "  ! ffff8300bffd2fd8  ffff82d04032a242  rip" in after
    assert "state at the start" in run_cli("replay", "--at", "start", race_file, code=1).stdout
    assert "state after event 3" in run_cli("replay", "--at", "end", race_file, code=1).stdout


def test_stacks_alone_are_shown_at_the_first_of_the_worst_findings(run_cli: Cli, race_file: Path) -> None:
    done = run_cli("replay", "--stacks", race_file, code=1).stdout
    assert "verdict: 1 error" in done and "state after event 3 (#571)" in done


def test_verbose_has_counters_and_fixes(run_cli: Cli, race_file: Path) -> None:
    done = run_cli("replay", "-v", race_file, code=1).stdout
    assert "known ways out:" in done
    assert "deliveries: 3 (3 placed" in done
    assert "on IST stacks: IST1 (MC) 1, IST2 (NMI) 2; without: 0" in done


def test_max_findings(run_cli: Cli, race_file: Path) -> None:
    done = run_cli("replay", "--max-findings", "0", race_file, code=1).stdout
    assert "\n2 more findings are not shown\n" in done and "frame-clobbered" not in done
    assert "verdict: 1 error, 1 warning\n" in done
    done = run_cli("replay", "--max-findings", "1", race_file, code=1).stdout
    assert "\n1 more finding is not shown\n" in done and "frame-clobbered" in done and "reentry-window" not in done
    assert "not shown" not in run_cli("replay", "--max-findings", "2", race_file, code=1).stdout
    report = json.loads(run_cli("replay", "--max-findings", "0", "--format", "json", race_file, code=1).stdout)["traces"][0]
    assert (report["findings"], report["omitted"], report["counts"]["error"]) == ([], 2, 1)
    assert "2 more findings are not shown" in run_cli("replay", "--max-findings", "0", "--at", "end", race_file, code=1).stdout


def test_a_layout_is_laid_over_a_native_trace(run_cli: Cli, tmp_path: Path) -> None:
    write_race(tmp_path / "bare.tdbg", layout=Layout())
    (tmp_path / "tables.toml").write_text(to_toml(replace(LAYOUT, regions=())))
    done = run_cli("replay", "--layout", "xen", "--layout", "tables.toml", "bare.tdbg", code=1)
    assert "verdict: 1 error" in done.stdout
    run_cli("convert", "--layout", "tables.toml", "--layout", "xen", "bare.tdbg", "full.tdbg", code=0)
    assert run_cli("replay", "full.tdbg", code=1).stdout.endswith("verdict: 1 error, 1 warning\n")


# -- convert ------------------------------------------------------------------------------------------------------------


def test_convert_keeps_everything(run_cli: Cli, race_file: Path, tmp_path: Path) -> None:
    run_cli("convert", race_file, "copy.tdbg", code=0)
    assert (tmp_path / "copy.tdbg").read_bytes() == race_file.read_bytes()
    assert stat.S_IMODE((tmp_path / "copy.tdbg").stat().st_mode) & 0o444 == 0o444
    piped = run_cli("convert", "-", "-", stdin=race_file.read_bytes(), binary=True, code=0)
    assert piped.stdout == race_file.read_bytes()


def test_convert_lists_the_formats(run_cli: Cli) -> None:
    lines = run_cli("convert", "--list", code=0).stdout.splitlines()
    rows = {line.split()[0]: line.split()[1:3] for line in lines[1 : lines.index("")]}
    assert rows["tracedbg"] == ["x", "x"] and rows["case"] == ["x", "x"] and rows["qemu-int"] == ["x", "-"]
    for name, (reads, writes) in rows.items():
        done = run_cli("convert", "--to", name, "nowhere", "out", code=2)
        assert ("no output format" in done.stderr) == (writes == "-")
        done = run_cli("info", "--from", name, __file__, code=2)
        assert ("no input format" in done.stderr) == (reads == "-")


def test_every_format_has_a_row_in_the_help(run_cli: Cli) -> None:
    page = run_cli("help", "formats", code=0).stdout
    rows = "".join(line for line in page.splitlines() if line.startswith("|"))
    names = [line.split()[0] for line in run_cli("convert", "--list", code=0).stdout.split("\n\n")[0].splitlines()[1:]]
    assert len(names) > 10 and [name for name in names if f"`{name}`" not in rows] == []


def test_convert_takes_only_the_symbols_that_it_needs(run_cli: Cli, race_file: Path, tmp_path: Path) -> None:
    (tmp_path / "xen.map").write_text(
        "ffff82d040201e00 T nmi\nffff82d040201f00 T machine_check\nffff82d040202000 T unused\n"
        "ffff82d0402f9b40 t default_idle\nffff82d0402fa000 T other\nffff82d04032a240 T do_nmi_new\nffff82d04032a300 T rest\n"
    )
    run_cli("convert", "--symbols", "xen.map", race_file, "named.tdbg", code=0)
    with Trace.open(tmp_path / "named.tdbg") as trace:
        names = [line.split()[2] for line in trace.symbols.decode().splitlines()]
    assert names == ["nmi", "machine_check", "default_idle", "do_nmi_new"]
    assert "do_nmi_new+2" in run_cli("replay", "named.tdbg", code=1).stdout


def test_convert_leaves_nothing_behind_when_it_fails(run_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"\0" * 100)
    run_cli("convert", "bad", "out.tdbg", code=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad"]


# -- outputs that are no plain files ------------------------------------------------------------------------------------


@pytest.fixture
def fifo(tmp_path: Path) -> tuple[Path, list[bytes], threading.Thread]:
    """A FIFO, and what is read from it."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    got: list[bytes] = []
    thread = threading.Thread(target=lambda: got.append(path.read_bytes()), daemon=True)
    thread.start()
    return path, got, thread


@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize(("words", "code"), [(["replay", "race.tdbg", "-o", "fifo"], 1), (["convert", "race.tdbg", "fifo"], 0)])
def test_a_fifo_is_written_to(
    run_cli: Cli, race_file: Path, fifo: tuple[Path, list[bytes], threading.Thread], words: list[str], code: int, force: list[str]
) -> None:
    path, got, thread = fifo
    assert run_cli(*words, *force, code=code).stderr == ""
    thread.join(20)
    assert stat.S_ISFIFO(path.lstat().st_mode)
    assert got == [race_file.read_bytes()] if words[0] == "convert" else got[0].endswith(b"verdict: 1 error, 1 warning\n")


def test_a_device_stays_a_device(run_cli: Cli, race_file: Path, tmp_path: Path) -> None:
    node = tmp_path / "null"  # not the one of the machine: this test must not break it
    try:
        os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        node.open("wb").close()
    except OSError:
        pytest.skip("device nodes cannot be made here")
    for force in ([], ["--force"]):
        run_cli("convert", "race.tdbg", "null", *force, code=0)
        run_cli("replay", "race.tdbg", "-o", "null", *force, code=1)
    assert stat.S_ISCHR(node.lstat().st_mode)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["null", "race.tdbg"]


def test_a_link_stays_and_its_target_is_replaced(run_cli: Cli, race_file: Path, tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    assert "exists; --force" in run_cli("replay", "race.tdbg", "-o", "link.txt", code=2).stderr
    run_cli("replay", "race.tdbg", "-o", "link.txt", "--force", code=1)
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "real.txt").read_text().endswith("verdict: 1 error, 1 warning\n")


def test_dev_stdout_is_standard_output(run_cli: Cli, race_file: Path, tmp_path: Path) -> None:
    assert run_cli("replay", "race.tdbg", "-o", "/dev/stdout", code=1).stdout.endswith("verdict: 1 error, 1 warning\n")
    assert run_cli("convert", "race.tdbg", "/dev/stdout", code=0, binary=True).stdout == race_file.read_bytes()


@pytest.mark.parametrize("name", ["x" * 255, "ä" * 127])
def test_long_names_of_outputs(run_cli: Cli, race_file: Path, tmp_path: Path, name: str) -> None:
    run_cli("convert", "race.tdbg", name, code=0)
    run_cli("replay", "race.tdbg", "-o", name, "--force", code=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["race.tdbg", name]


# -- what goes wrong around the program -----------------------------------------------------------------------------------


def heed_signals() -> None:
    """In a child: what started the tests may have ignored them (nohup, a shell's background)."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def run_script(root: Path, folder: Path, script: str, *words: object, **env: str) -> subprocess.CompletedProcess[str]:
    """`main(words)` in a process of its own, after something was changed."""
    text = f"import os, signal, sys, time\n{script}\nfrom tracedbg.cli import main\nsys.exit(main(sys.argv[1:]))\n"
    return subprocess.run(
        [sys.executable, "-c", text, *map(str, words)], capture_output=True, text=True, check=False, timeout=60, cwd=folder,
        env={**os.environ, "PYTHONPATH": str(root), **env}, preexec_fn=heed_signals,
    )  # fmt: skip


BROKEN = "import tracedbg.commands.explain as e\ndef run(args): raise ZeroDivisionError('x\\x1b\\ny')\ne.run = run"


def test_an_internal_error_is_no_finding(root: Path, tmp_path: Path) -> None:
    done = run_script(root, tmp_path, BROKEN, "explain")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "tracedbg: internal error: ZeroDivisionError: x??y (please report)\n"
    done = run_script(root, tmp_path, BROKEN, "explain", TRACEDBG_TRACEBACK="1")
    assert done.returncode == 2 and "Traceback" in done.stderr


def test_ctrl_c_while_modules_are_loaded_exits_130(root: Path, tmp_path: Path, race_file: Path) -> None:
    script = (
        "class Finder:\n    def find_spec(self, name, *rest):\n        if name == 'tracedbg.replay': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Finder())"
    )
    done = run_script(root, tmp_path, script, "replay", race_file)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\n")


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_signal_leaves_nothing_half_written(root: Path, tmp_path: Path, race_file: Path, name: str, code: int) -> None:
    script = (
        "import tracedbg.commands.common as c\n"
        f"def at(*rest):\n    os.kill(os.getpid(), signal.{name})\n    time.sleep(20)\nc.Progress.at = at"
    )
    done = run_script(root, tmp_path, script, "convert", "race.tdbg", "out.tdbg")
    assert (done.returncode, done.stdout, done.stderr.strip()) == (code, "", "")
    assert [p.name for p in tmp_path.iterdir()] == ["race.tdbg"]


def test_a_signal_that_is_ignored_stays_ignored(root: Path, tmp_path: Path, race_file: Path) -> None:
    script = (
        "import tracedbg.commands.common as c\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "def at(*rest):\n    os.kill(os.getpid(), signal.SIGHUP)\nc.Progress.at = at"
    )
    assert run_script(root, tmp_path, script, "convert", "race.tdbg", "out.tdbg").returncode == 0


def test_an_error_of_a_mapped_trace_is_not_hidden(root: Path, tmp_path: Path, race_file: Path) -> None:
    script = "import tracedbg.trace as t\nt.SMALL = 0"
    done = run_script(root, tmp_path, script, "convert", "race.tdbg", "no/where.tdbg")
    assert (done.returncode, done.stderr) == (2, "tracedbg: no/where.tdbg: no such file or directory\n")
    script += (
        "\nimport tracedbg.commands.common as c\n"
        "def at(*rest): raise OSError(28, 'No space left on device')\nc.Progress.at = at"
    )
    done = run_script(root, tmp_path, script, "convert", "race.tdbg", "out.tdbg")
    assert done.returncode == 2 and "no space left" in done.stderr and done.stderr.count("\n") == 1


UNBUFFERED = pytest.mark.parametrize("unbuffered", ["", "1"])


@UNBUFFERED
@pytest.mark.parametrize(
    ("words", "redirection", "code"),
    [
        ("--help", ">/dev/full", 2),
        ("--version", ">/dev/full", 2),
        ("replay --help", ">/dev/full", 2),
        ("explain", ">/dev/full", 2),
        ("replay race.tdbg", ">/dev/full", 2),
        ("replay missing", "2>/dev/full", 2),
        ("replay --nonsense", "2>/dev/full", 2),
        ("", "2>/dev/full", 2),
        ("replay bare.tdbg", "2>/dev/full", 3),
        ("replay race.tdbg", ">&-", 2),
        ("--version", ">&-", 2),
        ("info race.tdbg", "2>&-", 0),
        ("replay missing", "2>&-", 2),
        ("replay race.tdbg", "<&-", 1),
        ("replay -", "<&-", 2),
        ("race.tdbg", "<&-", 2),
        ("replay race.tdbg", "<&- >&- 2>&-", 2),
    ],
)
def test_streams_that_are_full_or_closed(
    root: Path, race_file: Path, tmp_path: Path, words: str, redirection: str, code: int, unbuffered: str
) -> None:
    write_race(tmp_path / "bare.tdbg", layout=Layout())
    line = f"{shlex.quote(sys.executable)} -m tracedbg {words} {redirection}"
    done = subprocess.run(
        ["sh", "-c", line], capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root), "PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == (code == 2 and "2>" not in redirection), done.stderr
    assert done.stderr == "" or done.stderr.startswith("tracedbg: ")


def test_the_viewer_needs_stderr_too(root: Path, race_file: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "tracedbg", str(race_file)], stdin=theirs, stdout=theirs, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root), "TERM": "xterm"}, cwd=tmp_path,
    )  # fmt: skip
    try:
        _, err = process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        pytest.fail("the viewer runs without seeing its terminal")
    finally:
        os.close(ours)
        os.close(theirs)
    assert process.returncode == 2 and b"the viewer needs a terminal" in err


def test_the_monitor_commands_of_many_cpus_are_cut(run_cli: Cli, tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "bare.tdbg") as writer:
        fill_race(writer)
        writer.layout = Layout()
        writer.meta = {"layout": {"commands": [line for n in range(9) for line in (f"cpu {n}", f"x /26xw {n:#x}")]}}
    said = run_cli("replay", "bare.tdbg", code=3).stderr.splitlines()
    assert said[-3:] == ["    cpu 3", "    x /26xw 0x3", "    and 5 more CPUs"] and len(said) == 10


@pytest.mark.parametrize("packed", [False, True])
def test_a_layout_is_laid_over_a_native_trace_however_it_comes(run_cli: Cli, tmp_path: Path, packed: bool) -> None:
    write_race(tmp_path / "bare.tdbg", layout=Layout())
    (tmp_path / "tables.toml").write_text(to_toml(replace(LAYOUT, regions=())))
    data = (tmp_path / "bare.tdbg").read_bytes()
    data = gzip.compress(data) if packed else data
    (tmp_path / "again").write_bytes(data)
    os.mkfifo(tmp_path / "fifo")
    threading.Thread(target=lambda: (tmp_path / "fifo").write_bytes(data), daemon=True).start()
    for name, stdin in (("again", b""), ("fifo", b""), ("-", data)):
        done = run_cli("replay", "--layout", "tables.toml", name, stdin=stdin, code=1)
        assert "verdict: 1 error" in done.stdout
        assert run_cli("info", "-", stdin=data, code=0).stdout.startswith("-: native trace, format 1.0\n")


def test_a_layout_of_more_cpus_than_the_trace(run_cli: Cli, tmp_path: Path) -> None:
    write_race(tmp_path / "bare.tdbg", layout=Layout())
    (tmp_path / "two.toml").write_text(to_toml(replace(LAYOUT, regions=(), cpus=LAYOUT.cpus * 2)))
    assert "events, 2 CPUs" in run_cli("replay", "--layout", "two.toml", "bare.tdbg", code=1).stdout
    run_cli("convert", "--layout", "two.toml", "bare.tdbg", "two.tdbg", code=0)
    assert "events, 2 CPUs" in run_cli("replay", "two.tdbg", code=1).stdout


# -- info, explain, help ------------------------------------------------------------------------------------------------


def test_info(run_cli: Cli, race_file: Path, golden: Callable[[str, str], None]) -> None:
    golden("info-race.txt", run_cli("info", "--check", "-v", "race.tdbg", code=0).stdout)


def test_info_of_damage(run_cli: Cli, race_file: Path) -> None:
    data = bytearray(race_file.read_bytes())
    with Trace.open(race_file) as trace:
        data[trace.events_offset + 70] ^= 1
    race_file.write_bytes(data)
    assert "checksum of events 0 to 3 is wrong" in run_cli("info", "--check", "race.tdbg", code=2).stderr


def test_info_of_nothing(run_cli: Cli, tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "empty.tdbg"):
        pass
    assert "events: 0, 1 CPU" in run_cli("info", "-v", "empty.tdbg", code=0).stdout
    assert run_cli("replay", "empty.tdbg", code=0).stdout.endswith("verdict: clean\n")


def test_info_of_every_vector_and_source_takes_seconds(run_cli: Cli, tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "all.tdbg") as writer:
        for number in range(65536):
            writer.event(Kind.DELIVER, arg=number & 255, source=number >> 8, rip=number)
    begin = time.monotonic()
    said = run_cli("info", "all.tdbg", code=0).stdout
    assert time.monotonic() - begin < 20
    assert "  deliver            65,536\n" in said


def test_info_of_a_deep_meta(run_cli: Cli, tmp_path: Path) -> None:
    deep: object = "bottom"
    for n in range(400):
        deep = [deep] if n % 2 else {"k": deep}
    with TraceWriter(tmp_path / "deep.tdbg") as writer:
        writer.meta = {"a": deep, "b": {"c": "text", "d": deep}, "e": [["flat"]]}
    said = run_cli("info", "deep.tdbg", code=0).stdout
    assert "…" in said and "bottom" not in said and "e: flat\n" in said


def test_help_pages(run_cli: Cli) -> None:
    listed = run_cli("help", code=0).stdout
    topics = [line.split()[0] for line in listed.splitlines()]
    assert {"ci", "findings", "formats", "layout", "replay", "rules"} <= set(topics)
    for topic in topics:
        assert run_cli("help", topic, code=0).stdout.startswith("# ")


# -- real recordings ----------------------------------------------------------------------------------------------------


def dump_layout(path: Path) -> str:
    """The TOML layout of a recorded dump of TSS and IDT."""
    from tracedbg.layout import CpuTables, Idt, Tss

    raw = path.read_bytes()
    dump = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    tss = tuple(Tss.from_bytes(int(cpu["tr_base"], 16), bytes.fromhex(cpu["tss_hex"])) for cpu in dump["vcpus"])
    idts = {int(cpu["idt_base"], 16): bytes.fromhex(cpu["idt_hex"]) for cpu in dump["vcpus"]}
    bases = list(idts)
    cpus = tuple(CpuTables(n, bases.index(int(cpu["idt_base"], 16))) for n, cpu in enumerate(dump["vcpus"]))
    return to_toml(Layout(tss, tuple(Idt.from_bytes(base, data) for base, data in idts.items()), cpus))


@pytest.mark.parametrize(
    ("case", "system", "code", "said"),
    [
        ("xen-nested/smp1-xnmi_mce_nmi", "xen", 1, "verdict: 1 error"),
        ("xen-nested/smp1-xnmi_masked", "xen", 0, "verdict: clean"),
        ("xen-nested/smp1-xmce_in_nmi", "xen", 0, "verdict: clean"),
        ("linux-nested/smp1-nest_nmi_masked", "linux", 0, "verdict: 1 note"),
        ("linux-nested/smp1-nest_nmi_masked_nokp", "linux", 0, "verdict: clean"),
        ("linux-nested/smp1-mce_in_nmi", "linux", 0, "verdict: clean"),
    ],
)
def test_the_known_verdicts(
    run_cli: Cli, shared: Path, tmp_path: Path, case: str, system: str, code: int, said: str
) -> None:
    base = shared / "qemu" / case
    dump = next(base.parent.glob(f"{base.name}.dump.json*"))
    (tmp_path / "layout.toml").write_text(dump_layout(dump))
    symbols = {"xen": "xen-syms-4.17-amd64.map.gz", "linux": "kallsyms-linux-6.1.0-56-amd64-nokaslr.txt.gz"}[system]
    options = ("--layout", system, "--layout", "layout.toml", "--symbols", shared / "symbols" / symbols)
    done = run_cli("replay", *options, f"{base}.log.gz", code=code)
    assert done.stdout.endswith(f"{said}\n")
    # The native trace says the same, with names and layout of its own.
    run_cli("convert", *options, f"{base}.log.gz", "native.tdbg", code=0)
    native = run_cli("replay", "native.tdbg", code=code)
    assert native.stdout.splitlines()[1:] == done.stdout.splitlines()[1:]


@pytest.mark.parametrize(
    ("case", "options", "code", "said"),
    [
        ("istlab/a", [], 0, "verdict: 1 warning"),  # the log alone proves no more
        ("istlab/a0", [], 0, "verdict: clean"),
        ("istlab/b_pic", [], 0, "verdict: 2 warnings"),
        ("istlab/c_lapic", [], 0, "verdict: 2 warnings"),
        ("istlab/d_mcip", [], 1, "verdict: 1 error"),
        ("istlab/e_int1", [], 0, "verdict: 1 warning"),
        ("istlab/f_ist_ipi", [], 0, "verdict: clean"),
        ("istlab/f_noist_ipi", ["--layout", "user.toml"], 1, "verdict: 1 error"),
        ("istlab/x_df", [], 1, "verdict: 1 error"),
        ("istlab-plugin/a", ["--stores", "106000-113000"], 0, "verdict: 1 warning, 1 note"),
        ("istlab-plugin/g", ["--stores", "106000-113000"], 1, "verdict: 2 errors, 1 warning"),
    ],
)
def test_the_known_verdicts_of_the_bare_metal_guest(
    run_cli: Cli, shared: Path, tmp_path: Path, case: str, options: list[str], code: int, said: str
) -> None:
    (tmp_path / "user.toml").write_text('user = [["0x111000", "0x113000"]]\n')
    done = run_cli("replay", *options, shared / "qemu" / case / "qemu.log", code=code)
    assert done.stdout.endswith(f"{said}\n")


def test_the_report_for_a_mail(
    run_cli: Cli, shared: Path, tmp_path: Path, golden: Callable[[str, str], None]
) -> None:
    folder = shared / "qemu" / "xen-nested"
    (tmp_path / "layout.toml").write_text(dump_layout(folder / "smp1-xnmi_mce_nmi.dump.json.gz"))
    (tmp_path / "race.log.gz").write_bytes((folder / "smp1-xnmi_mce_nmi.log.gz").read_bytes())
    symbols = shared / "symbols" / "xen-syms-4.17-amd64.map.gz"
    done = run_cli("replay", "--layout", "xen", "--layout", "layout.toml", "--symbols", symbols, "race.log.gz", code=1)
    golden("report-xen-log.txt", done.stdout)
