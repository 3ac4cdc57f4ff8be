"""Runs guests on the CPU model, each in a process of its own, and checks the replay of each recording.

    python tests/livecpu_run.py FIRST COUNT         one JSON line a guest
    python tests/livecpu_run.py --seed N [--operations JSON] [--spoil KIND] [--strict]
                                                    one guest in words: its steps, its findings, what does not agree

It needs the package bochscpu-python. A guest that disagrees is made smaller by dropping operations, the last ones first.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import signal
import sys
import traceback
from typing import Any

from livecpu import Delivery, Iret, Machine, Step, Store
from livecpu_check import run, show
from livecpu_guest import Operation
from livecpu_trace import SPOILS

from tracedbg import rules
from tracedbg.replay import Replay

SECONDS = 30  # for one guest; it takes 0.05
TRIES = 150  # of making a guest smaller


class Guests:
    """The machine, and processes forked from it."""

    def __init__(self, spoil: str | None = None, strict: bool = False) -> None:
        self.machine = Machine()
        self.spoil, self.strict = spoil, strict
        gc.collect()
        gc.freeze()  # children would copy every page that a collection touches

    def result(self, seed: int, operations: list[Operation] | None = None) -> dict[str, Any]:
        """Problems, counts and operations of one guest."""
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            signal.alarm(SECONDS)
            try:
                checked = run(self.machine, seed, operations, self.spoil, self.strict)
                answer = {"problems": checked.problems, "counts": checked.counts, "operations": checked.guest.done}
            except BaseException:
                answer = {"problems": [traceback.format_exc()], "counts": {}, "operations": operations or []}
            with os.fdopen(write, "wb") as out:
                out.write(json.dumps(answer).encode())
            os._exit(0)  # an ordinary exit would free the emulator, which fails
        os.close(write)
        with os.fdopen(read, "rb") as source:
            data = source.read()
        _, status = os.waitpid(child, 0)
        if not data:
            text = f"the emulator ended with status {os.waitstatus_to_exitcode(status)}: a triple fault?"
            return {"problems": [text], "counts": {}, "operations": operations or []}
        answer = json.loads(data)
        return {**answer, "operations": [tuple(o) for o in answer["operations"]]}

    def smaller(self, seed: int, operations: list[Operation]) -> list[Operation]:
        """Drop operations from the end, then one by one, as long as something does not agree."""
        tries = TRIES

        def fails(candidate: list[Operation]) -> bool:
            nonlocal tries
            tries -= 1
            return tries >= 0 and bool(self.result(seed, candidate)["problems"])

        step = len(operations) // 2
        while step:
            while len(operations) > step and fails(operations[:-step]):
                operations = operations[:-step]
            step //= 2
        for at in reversed(range(len(operations))):
            candidate = operations[:at] + operations[at + 1 :]
            if fails(candidate):
                operations = candidate
        return operations


def command(seed: int, operations: list[Operation] | None, strict: bool) -> str:
    """The shell command that repeats a guest."""
    words = ["python", "tests/livecpu_run.py", "--seed", str(seed), *(["--strict"] if strict else [])]
    if operations is not None:
        words += ["--operations", json.dumps(operations, separators=(",", ":"))]
    return shlex.join(words)


def many(first: int, count: int, spoil: str | None, strict: bool) -> None:
    """JSON lines."""
    guests = Guests(spoil, strict)
    for seed in range(first, first + count):
        answer = guests.result(seed)
        line: dict[str, Any] = {"seed": seed, "problems": answer["problems"], "counts": answer["counts"]}
        if answer["problems"] and spoil is None:
            operations = guests.smaller(seed, answer["operations"])
            line["repeat"] = command(seed, operations if answer["operations"] else None, strict)
        print(json.dumps(line), flush=True)


def one(seed: int, operations: list[Operation] | None, spoil: str | None, strict: bool) -> None:
    """A guest in words."""
    checked = run(Machine(), seed, operations, spoil, strict)
    with Replay(checked.trace) as replay:
        for number, step in enumerate(checked.truth.steps):
            replay.seek(checked.first.get(number + 1, checked.trace.count))
            frames = [f"{checked.step_of[f.entry]}{'' if f.status == 0 else '!'}" for f in replay.frames()]
            print(f"{number:3} {words(step):100} open: {' '.join(frames)}")
        replay.scan_all()
        for f in replay.findings():
            victim = "-" if f.victim is None else checked.step_of[f.victim.entry]
            consumer = "-" if f.consumer is None else checked.step_of[f.consumer]
            name = rules.rule_id(f.rule)
            print(f"finding {name}: step {checked.step_of.get(f.event)}, victim {victim}, consumer {consumer}, {f.detail:#x}")
    print("\n".join(checked.problems) or "all agree")


def words(step: Step) -> str:
    """A step in one line."""
    if isinstance(step, Delivery):
        where = f"[{step.lo:x}, {step.hi:x})" if step.stores else "nothing"
        return f"{'failed ' if step.failed else ''}vector {step.vector} ({step.how}) at {show(step.before)} stores {where}"
    if isinstance(step, Iret):
        return f"iret from {step.before.rsp:x} " + ("faults" if step.after is None else f"to {show(step.after)}")
    if isinstance(step, Store):
        return f"store {step.addr:x} {step.data[::-1].hex()}"
    return str(step)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare the replay with a CPU model.")
    parser.add_argument("first", type=int, nargs="?", default=0)
    parser.add_argument("count", type=int, nargs="?", default=1)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--operations", type=json.loads)
    parser.add_argument("--spoil", choices=SPOILS, help="put an error into each recording")
    parser.add_argument("--strict", action="store_true", help="known limits of the replay are no excuse")
    options = parser.parse_args()
    try:
        if options.seed is None:
            many(options.first, options.count, options.spoil, options.strict)
        else:
            operations = None if options.operations is None else [tuple(o) for o in options.operations]
            one(options.seed, operations, options.spoil, options.strict)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)  # see Guests.result


if __name__ == "__main__":
    main()
