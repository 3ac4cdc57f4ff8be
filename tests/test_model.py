"""The C core against the slow model on random traces.

TRACEDBG_MODEL_SEEDS sets how many sequences are compared: 5,000 if unset. The long run, at night or before a release:

    TRACEDBG_MODEL_SEEDS=100000 python -m pytest tests/test_model.py

A failure prints the smallest plan and the smallest list of events that show it, and the command that plays the plan again.
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable

import hypothesis
import pytest
from hypothesis import HealthCheck, Verbosity, given, settings
from hypothesis import strategies as st
from model import Model
from modeldiff import STATS_FIELDS, Disagreement, check, explain
from randscenes import SCENES
from randtrace import Coverage, Plan, plan_of, random_trace, written_trace

from tracedbg import wire
from tracedbg.replay import Replay
from tracedbg.state import Context

SEQUENCES = int(os.environ.get("TRACEDBG_MODEL_SEEDS", "5000"))
SEEDED = SEQUENCES // 2  # of them made by plan_of and counted: Hypothesis, which makes the others, varies few worlds often
CHUNK = 500  # examples of one Hypothesis run: it remembers each, and its memory grows with them
CHUNKS = -(-(SEQUENCES - SEEDED) // CHUNK)
LEAST = 3  # how often everything must occur in the seeded plans

SEEDS = st.integers(0, (1 << 24) - 1)  # drawn evenly up to this size
PLANS = st.builds(
    Plan, SEEDS, st.lists(st.tuples(st.sampled_from(SCENES), SEEDS), min_size=3, max_size=30).map(tuple)
)


def for_plans(number: int, examples: int, holds: Callable[[Plan], None]) -> None:
    """Check a property of plans. The same number gives the same plans: seeded, nothing is kept between runs."""
    quiet = settings(
        max_examples=examples,
        database=None,
        deadline=None,
        verbosity=Verbosity.quiet,
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    hypothesis.seed(number)(quiet(given(PLANS)(holds)))()


# -- the core is the model ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(SEQUENCES < 2000, reason="few sequences: not everything occurs in them")
def test_seeded_plans_reach_everything_and_core_is_the_model() -> None:
    coverage = Coverage()
    for seed in range(SEEDED):
        try:
            check(plan_of(seed), coverage.add)
        except Disagreement as error:
            pytest.fail(f"seed {seed}\n{explain(error)}", pytrace=False)
    assert coverage.missing(LEAST) == []


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_core_is_the_model(chunk: int) -> None:
    def agrees(plan: Plan) -> None:
        check(plan)

    try:
        for_plans(chunk, CHUNK, agrees)
    except Disagreement as error:
        pytest.fail(explain(error), pytrace=False)


# -- the way to a position does not matter ------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [1, 2, 7])
def test_seek_is_a_fresh_run(interval: int) -> None:
    """A position reached from anywhere, backwards too, is the position reached by going forward."""

    def holds(plan: Plan) -> None:
        r = random.Random(plan.world)
        with random_trace(plan) as trace:
            forward = []
            with Replay(trace, snapshot_interval=1 << 20) as replay:
                for position in range(trace.count + 1):
                    replay.seek(position)
                    forward.append(replay.digest())
            with Replay(trace, snapshot_interval=interval, max_snapshots=r.choice((0, 2, 3))) as replay:
                if r.random() < 0.5:
                    while replay.scan(r.choice((1, 5, 1 << 20))):
                        pass
                for _ in range(30):
                    position = r.randrange(trace.count + 1)
                    if r.random() < 0.5:
                        replay.seek(position)
                    else:
                        while replay.seek_some(position, r.choice((1, 3))):
                            pass
                    assert replay.position == position
                    assert replay.digest() == forward[position], f"{plan}, position {position}"

    for_plans(interval, max(SEQUENCES // 25, 3), holds)


def test_findings_do_not_depend_on_the_way() -> None:
    """Scanning in pieces, with seeks between, finds what scanning in one go finds."""

    def holds(plan: Plan) -> None:
        r = random.Random(plan.world)
        with random_trace(plan) as trace:
            with Replay(trace) as replay:
                replay.scan_all()
                findings, stats = replay.findings(), replay.stats()
            with Replay(trace, snapshot_interval=r.choice((1, 3))) as replay:
                while replay.scan(r.choice((1, 2, 9))):
                    if r.random() < 0.3:
                        replay.seek(r.randrange(trace.count + 1))
                assert replay.findings() == findings, f"{plan}"
                for name in (*STATS_FIELDS, "settled", "ist_deliveries", "findings", "open_at_end"):
                    assert getattr(replay.stats(), name) == getattr(stats, name), f"{plan}: {name}"

    for_plans(0, max(SEQUENCES // 25, 3), holds)


# -- the generator ------------------------------------------------------------------------------------------------------


def test_plans_are_stable_and_survive_the_file_format() -> None:
    for plan in map(plan_of, (0, 1, 7, 50)):
        with random_trace(plan) as one, written_trace(plan) as other:
            assert bytes(one.events) == bytes(other.events)
            assert bytes(one.payload) == bytes(other.payload)
            assert (one.memory, one.cpus, one.count) == (other.memory, other.cpus, len(other.events) // wire.EVENT_SIZE)
            assert dataclasses.replace(one.layout, names={}) == other.layout
            assert Model(one).digest(one.count) == Model(other).digest(other.count)


def test_leaving_a_scene_out_keeps_the_others() -> None:
    """What makes a plan shrink: the first scene's events do not depend on the later ones."""
    for seed in range(20):
        plan = plan_of(seed)
        with random_trace(plan) as whole, random_trace(Plan(plan.world, plan.steps[:-1])) as part:
            assert bytes(whole.events)[: part.count * wire.EVENT_SIZE] == bytes(part.events)


def test_context_is_complete() -> None:
    """The model's frames hold every field of a context that a frame has."""
    assert [f.name for f in dataclasses.fields(Context)] == ["rip", "cs", "rflags", "rsp", "ss", "code"]
