"""Where a round's time went: the phases are the whole of it, each is where its work is, and nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from e2e_support import call, federation, write
from hansa.clients import app as node_app
from hansa.common.config import load_config
from hansa.server.checkpoint import Checkpoint
from hansa.simulations import profile
from hansa.simulations.federation import Simulation
from hansa.simulations.profile import CHECKPOINT, EVALUATE, FOLD, MASKS, OTHER, RECORD, SEND, STEP, TRAIN, WAIT, Profile

POPULATION = federation(
    rounds=2,
    who="task: digits\npopulation: {dataset: digits, clients: 110}",
    privacy="{kind: local, epsilon: 4.0, delta: 1.0e-3, clip_norm: 1.0}",
    steps=1,
    rate=0.5,
).replace("rounds: 2", "rounds: 2\n  participation: 0.1")
SHARED = federation(
    rounds=2,
    steps=1,
    rate=0.5,
    privacy="{noise: shared, epsilon: 1.0, delta: 1.0e-4, clip_norm: 1.0}",
    more="secure_aggregation: {colluding: 0}\n",
).replace("quorum: 2", "quorum: 3")


@pytest.fixture
def measured(tmp_path: Path) -> Iterator[Callable[..., tuple[Profile, list[float]]]]:
    """Run a federation with a profile: the profile, and what the round loop says that each round took."""
    made: list[Simulation] = []

    def run(text: str, prepare: Callable[[Simulation], Any] = lambda _: nullcontext()) -> tuple[Profile, list[float]]:
        found, seconds = Profile(), list[float]()

        def heard(event: str, **facts: Any) -> None:
            if event == "done":
                seconds.append(facts["seconds"])

        config = load_config(write(tmp_path / "c.yaml", text))
        simulation = Simulation(config, tmp_path, tmp_path / f"out{len(made)}", notify=found.notify(heard))
        made.append(simulation)
        with prepare(simulation), found.measuring(simulation):
            simulation.run()
        return found, seconds

    yield run
    for simulation in made:
        simulation.close()


@pytest.mark.parametrize("text", [federation(rate=0.5), POPULATION, SHARED], ids=["partners", "population", "masks"])
def test_the_phases_are_the_whole_round(text: str, measured: Any) -> None:
    found, seconds = measured(text)
    assert len(found.rounds) == len(seconds) > 1
    for phases, took in zip(found.rounds, seconds, strict=True):
        assert sum(phases.values()) == pytest.approx(took, rel=0.05)
        assert all(spent > 0 for spent in phases.values())
        assert phases[OTHER] < took / 4, phases
        known = {RECORD, SEND, WAIT, FOLD, STEP, EVALUATE, CHECKPOINT}
        if text == POPULATION:  # as its trainer tells it
            known |= {TRAIN + what for what in ("reading rows", "training")}
            assert known - {WAIT} <= set(phases) - {OTHER} <= known
            continue
        known |= {TRAIN + what for what in ("forward and backward", "sampling", "noise")}
        assert set(phases) - {OTHER} == (known | {MASKS} if text == SHARED else known)
    fields = found.fields()
    assert sum(p["share"] for p in fields["phases"].values()) == pytest.approx(1)
    assert fields["total_s"] == pytest.approx(sum(seconds), rel=0.05)
    assert (fields["rounds"], fields["first_s"]) == (len(seconds), sum(found.rounds[0].values()))


@pytest.mark.parametrize(
    ("owner", "name", "phase"),
    [
        (node_app, "train_locally", TRAIN + "forward and backward"),
        (Checkpoint, "save", CHECKPOINT),
        (profile.ServerOptimizer, "step", STEP),
        pytest.param(profile.Ledger, "append", RECORD, marks=pytest.mark.soak),
        pytest.param(profile.Coordinator, "_receive", FOLD, marks=pytest.mark.soak),
        (node_app, "scores_of", EVALUATE),
        pytest.param(node_app.Outbox, "put", WAIT, marks=pytest.mark.soak),
    ],
)
def test_slow_work_shows_in_its_phase(
    owner: Any, name: str, phase: str, measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, calls = getattr(owner, name), []

    def slow(*arguments: Any, **named: Any) -> Any:
        calls.append(0)
        time.sleep(0.2)  # more than any phase takes on a busy machine
        return work(*arguments, **named)

    monkeypatch.setattr(owner, name, slow)
    found, _ = measured(federation(rounds=2))
    assert calls
    assert found.rounds[1][phase] >= 0.19, found.rounds[1]


def test_afterwards_everything_is_as_it_was(measured: Any) -> None:
    taps = [(owner, name) for owner, name, _ in profile._TAPS]
    before = [vars(owner)[name] for owner, name in taps]
    grids: list[Any] = []
    measured(federation(rounds=1), lambda simulation: grids.append(simulation) or nullcontext())
    assert [vars(owner)[name] for owner, name in taps] == before
    (simulation,) = grids
    assert not {"push_messages", "pull_messages"} & set(vars(simulation.grid))
    assert not set(profile._RECORDS) & set(vars(simulation.coordinator._records))


def test_a_grid_tells_what_its_workers_did(measured: Any) -> None:
    """More seconds than there were, of several workers, and fewer; what was before a round is in none."""
    told = iter(
        [{"stale": 99.0}, {"forward and backward": 3000.0, "noise": 1000.0}, {}, {"forward and backward": 1e-6}]
    )

    def prepare(simulation: Simulation) -> Any:
        simulation.grid.profile = lambda: next(told)  # type: ignore[attr-defined]
        return nullcontext()

    found, seconds = measured(federation(rounds=2), prepare)
    first, second = found.rounds
    assert first[TRAIN + "forward and backward"] == pytest.approx(3 * first[TRAIN + "noise"])
    assert first.get(WAIT, 0.0) == pytest.approx(0, abs=1e-9)
    assert second[TRAIN + "forward and backward"] == pytest.approx(1e-6)
    assert second[WAIT] > 1e-3
    assert TRAIN + "noise" not in second
    assert not any("stale" in phase for one in found.rounds for phase in one)
    for phases, took in zip(found.rounds, seconds, strict=True):
        assert sum(phases.values()) == pytest.approx(took, rel=0.05)


def test_of_no_round_there_is_nothing_to_tell() -> None:
    assert Profile().fields() == {"rounds": 0, "total_s": 0, "first_s": None, "round_s": None, "phases": {}}
    profile.profile_table(Profile().fields())


def test_the_command_prints_and_keeps_it(tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", federation())
    out = tmp_path / "out"
    done = call("simulate", config, "--out", out, "--profile").expect(0)
    done.says("where the time of a round went", "select and record", "train: forward and backward", "checkpoint")
    report = call("simulate", config, "--out", tmp_path / "two", "--profile", "--format", "json").expect(0).json()
    kept = report["result"]["timings"]["profile"]
    assert (kept["rounds"], kept["total_s"] <= report["result"]["timings"]["training_s"]) == (3, True)
    without = call("simulate", config, "--out", tmp_path / "three", "--format", "json").expect(0).json()
    assert "profile" not in without["result"]["timings"]


def test_of_several_seeds_the_mean_is_printed_and_each_is_kept(tmp_path: Path) -> None:
    config, out = write(tmp_path / "c.yaml", federation(rounds=2)), tmp_path / "out"
    done = call("simulate", config, "--out", out, "--seeds", "2", "--profile").expect(0)
    done.says("the mean of 4 rounds of 2 runs", "train: forward and backward", "timings.profile of its result.json")
    done.says("epsilon spent, odometer", "epsilon: the largest of any partner; record level")
    each = [json.loads((out / f"seed-{n}" / "result.json").read_text())["timings"]["profile"] for n in (3, 4)]
    both = json.loads((out / "sweep.json").read_text())["profile"]
    assert both["round_s"] == pytest.approx(sum(one["round_s"] for one in each) / 2)
    assert sum(phase["share"] for phase in both["phases"].values()) == pytest.approx(1)


def test_what_is_not_in_every_round_has_its_mean() -> None:
    found = Profile()
    found.rounds = [{FOLD: 9.0}, {FOLD: 1.0}, {FOLD: 1.0}, {FOLD: 1.0, EVALUATE: 3.0}]
    fields = found.fields()
    assert fields["phases"] == {FOLD: {"mean_s": 1.0, "share": 0.5}, EVALUATE: {"mean_s": 1.0, "share": 0.5}}
    assert (fields["round_s"], fields["first_s"]) == (2.0, 9.0)
    other = {**fields, "phases": {FOLD: {"mean_s": 4.0, "share": 1.0}}, "round_s": 4.0}
    together = profile.over_runs([fields, other, Profile().fields()])
    assert (together["runs"], together["rounds"], together["round_s"]) == (2, 8, 3.0)
    assert together["phases"] == {FOLD: {"mean_s": 2.5, "share": 2.5 / 3}, EVALUATE: {"mean_s": 0.5, "share": 0.5 / 3}}


def test_the_innermost_phase_is_running(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(profile.time, "perf_counter", lambda: now)
    found = Profile()
    heard = found.notify(lambda *_, **__: None)
    with found._in(FOLD):  # outside of a round
        now += 100
    heard("round", round=1)
    now += 1
    with found._in(FOLD):
        now += 2
        with contextlib.suppress(ValueError), found._in(RECORD):
            now += 4
            raise ValueError
        now += 8
    with found._in(EVALUATE):
        now += 16
        with found._in(SEND):  # an evaluation's own
            now += 32
        with found._in(RECORD):
            now += 64
    now += 128
    heard("done", round=1, metrics={}, seconds=255.0)
    now += 256
    assert found.rounds == [{OTHER: 1 + 128, FOLD: 2 + 8, RECORD: 4 + 64, EVALUATE: 16 + 32}]
