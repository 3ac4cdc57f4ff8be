"""The replay against a CPU model that runs beside it: random guests, everything that the CPU did is the expectation.

A guest takes 0.06 s. `TRACEDBG_LIVE_SEEDS=N` runs N of them, and `TRACEDBG_LIVE_FIRST` begins elsewhere. A failure prints
a command that repeats it, with as few operations as still show it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

RUN = Path(__file__).with_name("livecpu_run.py")
SEEDS = int(os.environ.get("TRACEDBG_LIVE_SEEDS") or 400)
FIRST = int(os.environ.get("TRACEDBG_LIVE_FIRST") or 0)
WORKERS = min(2, os.cpu_count() or 1)


@cache
def missing() -> str:
    """Why the CPU model cannot be used; asked in another process, as it cannot be unloaded."""
    done = subprocess.run([sys.executable, "-c", "import bochscpu"], capture_output=True, text=True, check=False)
    return (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1] if done.returncode else ""


pytestmark = pytest.mark.skipif(bool(missing()), reason=f"no bochscpu-python: {missing()}")


def start(first: int, count: int, *words: str) -> subprocess.Popen[str]:
    """A process that runs guests."""
    return subprocess.Popen(
        [sys.executable, str(RUN), str(first), str(count), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def lines(worker: subprocess.Popen[str], count: int) -> list[dict[str, Any]]:
    """What it said of each guest."""
    out, error = worker.communicate(timeout=60 + count)
    assert worker.returncode == 0, error
    result = [json.loads(line) for line in out.splitlines()]
    assert len(result) == count
    return result


@pytest.fixture(scope="module")
def guests() -> list[dict[str, Any]]:
    share = [SEEDS // WORKERS + (n < SEEDS % WORKERS) for n in range(WORKERS)]
    workers = [start(FIRST + sum(share[:n]), share[n]) for n in range(WORKERS)]
    return [line for worker, count in zip(workers, share, strict=True) for line in lines(worker, count)]


def test_the_replay_does_what_the_cpu_did(guests: list[dict[str, Any]]) -> None:
    wrong = [g for g in guests if g["problems"]]
    text = [f"seed {g['seed']}: {g['problems'][0]}\n  {g.get('repeat', '')}" for g in wrong[:10]]
    assert not wrong, f"{len(wrong)} of {len(guests)} guests\n" + "\n".join(text)


# What 100 guests do at least; overwritten, consumed, loops: frames and returns of which a verdict was required.
LEAST = {
    "deliveries": 1800,
    "nmi": 350,
    "fixed": 40,
    "exception": 600,
    "soft-int": 900,
    "failed": 180,
    "from CPL3": 120,
    "returns": 1200,
    "faulted returns": 10,
    "held NMIs": 100,
    "TSS changes": 100,
    "gate changes": 20,
    "bytes": 80000,
    "overwritten": 500,
    "consumed": 90,
    "loops": 50,
    "popped twice": 10,
}
# The limits of livecpu_limits.py excuse no larger share of the overwrites and of the returns that pop foreign words.
MOST = {"excused: ": ("overwritten", 0.2), "excused pop: ": ("consumed", 0.02)}


def test_there_was_enough_of_everything(guests: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    total: Counter[str] = Counter()
    for guest in guests:
        total.update(guest["counts"])
    with capsys.disabled():
        print(f"\n{len(guests)} guests: " + ", ".join(f"{total[name]} {name}" for name in LEAST))
        print("  " + ", ".join(f"{n} {name}" for name, n in sorted(total.items()) if name not in LEAST))
    assert {name: total[name] for name, n in LEAST.items() if total[name] < n * len(guests) // 100} == {}
    for prefix, (name, share) in MOST.items():
        assert sum(n for excuse, n in total.items() if excuse.startswith(prefix)) <= share * total[name] + 5


@pytest.mark.parametrize("spoil", ["tss", "gate", "return", "store", "rflags"])
def test_an_error_in_a_recording_is_seen(spoil: str) -> None:
    said = lines(start(0, 12, "--spoil", spoil), 12)
    assert sum(bool(guest["problems"]) for guest in said) >= 10
