"""Chunks, workers and plans: the same bits whoever computes them, nobody counted twice, whatever dies."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hansa.clients.datasets import Rows, Split
from hansa.clients.training import LocalSettings
from hansa.common.config import Federation
from hansa.common.errors import ConfigError, OutputError, Refusal, RunFailed
from hansa.common.tasks import Task
from hansa.common.tasks.schema import ArraySchema
from hansa.server.rounds import Coordinator
from hansa.simulations import federation
from hansa.simulations.execution import Execution, choose, load_execution
from hansa.simulations.federation import COHORT, Simulation
from hansa.simulations.result import make_result, save_result
from hansa.simulations.trainer import Trainer
from hansa.simulations.workers import Here, Workers
from support import same_arrays, sixty_clients, verified

CLIENTS = 23


class Made:
    """Clients of ragged sizes; `mishap` is called with a client's number when its rows are asked for."""

    declared_records = 6
    largest = 9
    evaluated = 0

    def __init__(self, mishap: Any = lambda number: None) -> None:
        self.mishap = mishap

    def __len__(self) -> int:
        return CLIENTS

    def open(self, number: int) -> Split:
        self.mishap(number)
        generator = torch.Generator().manual_seed(number)
        n = 2 + number % 7
        return Split(Rows(torch.randn(n, 5, generator=generator), torch.randint(0, 3, (n,), generator=generator)), None)  # type: ignore[arg-type]


def model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))


TASK = Task("made", "random rows", ArraySchema(shape=(5,), value_range=(-9, 9)), ("a", "b", "c"), model)
PLAIN = LocalSettings(3, 0.6, "sgd", 0.1, momentum=0.5)


def trainer(mishap: Any = lambda number: None, settings: LocalSettings = PLAIN) -> Trainer:
    torch.manual_seed(0)
    return (
        Trainer(TASK, model(), Made(), settings, 6, 0)
        if mishap is None
        else Trainer(TASK, model(), Made(mishap), settings, 6, 0)
    )


def chunks(size: int) -> list[list[int]]:
    return [list(range(at, min(at + size, CLIENTS))) for at in range(0, CLIENTS, size)]


WEIGHTS = np.linspace(-0.5, 0.5, sum(p.numel() for p in model().parameters())).astype(np.float32)


def folded(executor: Any, size: int = 4, number: int = 1) -> tuple[list[int], bytes]:
    """Who was trained, in order, and the float64 sum of the updates."""
    total, seen = np.zeros(WEIGHTS.size), []
    for clients, updates, outcomes in executor.train(number, WEIGHTS, chunks(size)):
        assert all(o.refused is None and not o.failed for o in outcomes)
        for client, update in zip(clients, updates, strict=True):
            total += update
            seen.append(client)
    return seen, total.tobytes()


def test_more_threads_here_than_in_a_worker_change_no_bit() -> None:
    """How a sum is divided among threads decides how it is rounded. In a process of its own: torch counts its threads at the start."""
    code = f"""
import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
import torch, test_crew
assert torch.get_num_threads() == 2
test_crew.wide_updates_are_the_same()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def wide_updates_are_the_same() -> None:
    """Of a model and batches that torch divides among threads, here and in a worker."""

    class Wide(Made):
        def open(self, number: int) -> Split:
            generator = torch.Generator().manual_seed(number)
            n = (64, 50, 64, 30)[number]
            x, y = torch.randn(n, 784, generator=generator), torch.randint(0, 10, (n,), generator=generator)
            return Split(Rows(x, y), None)  # type: ignore[arg-type]

    wide = torch.nn.Sequential(torch.nn.Linear(784, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    classes = tuple(f"class-{i}" for i in range(10))
    task = Task("wide", "random rows", ArraySchema(shape=(784,), value_range=(-9, 9)), classes, lambda: wide)
    weights = np.concatenate([p.detach().numpy().reshape(-1) for p in wide.parameters()])
    made = Trainer(task, wide, Wide(), LocalSettings(3, 1.0, "sgd", 0.1), 60, 0)

    def updates(executor: Any) -> bytes:
        return b"".join(some.tobytes() for _, some, _ in executor.train(1, weights, [[0, 1, 2, 3]]))

    here = updates(Here(made, batched=True))
    workers = Workers(made, 1, 4, batched=True)
    try:
        assert updates(workers) == here
    finally:
        workers.close()


@pytest.mark.parametrize("batched", [True, False])
def test_any_number_of_workers_gives_the_same_bits(batched: bool) -> None:
    here = folded(Here(trainer(), batched=batched))
    assert here[0] == list(range(CLIENTS))
    for count in (1, 2, 3):
        workers = Workers(trainer(), count, 4, batched=batched)
        try:
            assert folded(workers) == here
            assert folded(workers) == here  # places are used again
            assert folded(workers, number=2) != here
        finally:
            workers.close()


def test_who_keeps_all_updates_gets_each_one_unharmed() -> None:
    """More chunks than places: no place is written while somebody has what is in it."""
    expected = [updates.copy() for _, updates, _ in Here(trainer(), batched=True).train(1, WEIGHTS, chunks(2))]
    workers = Workers(trainer(), 2, 2, batched=True)
    try:
        kept = [updates for _, updates, _ in workers.train(1, WEIGHTS, chunks(2))]
        assert all(np.array_equal(a, b) for a, b in zip(kept, expected, strict=True))
        assert not workers._free
        del kept
        gc.collect()
        assert len(workers._free) == 6
        assert folded(workers, 2) == folded(Here(trainer(), batched=True), 2)
    finally:
        workers.close()


def test_a_round_that_is_broken_off_leaves_workers_and_places_fit_for_the_next() -> None:
    workers = Workers(trainer(), 2, 4, batched=True)
    try:
        rest = workers.train(1, WEIGHTS, chunks(4))
        next(rest)
        rest.close()
        assert folded(workers) == folded(Here(trainer(), batched=True))
    finally:
        workers.close()


@pytest.fixture
def once(tmp_path: Path) -> Any:
    """A mishap that strikes so many times over client 9, in whatever process."""

    def strike(times: int) -> Any:
        def mishap(number: int) -> None:
            if number == 9:
                for attempt in range(times):
                    try:
                        (tmp_path / str(attempt)).touch(exist_ok=False)
                    except FileExistsError:
                        continue
                    os.kill(os.getpid(), signal.SIGKILL)

        return mishap

    return strike


@pytest.mark.parametrize("times", [1, 2])
def test_a_worker_that_is_killed_over_a_chunk_is_replaced_and_nobody_counts_twice(once: Any, times: int) -> None:
    here = folded(Here(trainer(), batched=True))
    workers = Workers(trainer(once(times)), 2, 4, batched=True)
    before = {w.process.pid for w in workers._workers}
    try:
        assert folded(workers) == here
        assert len({w.process.pid for w in workers._workers} - before) >= 1
        assert folded(workers) == here
    finally:
        workers.close()


def test_a_chunk_that_kills_every_worker_ends_the_run_with_words(once: Any) -> None:
    workers = Workers(trainer(once(100)), 2, 4, batched=True)
    try:
        with pytest.raises(RunFailed, match="3 workers died"):
            folded(workers)
        assert len(workers._free) == 6
    finally:
        workers.close()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    """Also in the middle of a chunk: they would hold the run's lock until it is done."""
    code = f"""
import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
import os, signal, threading, time, test_crew
w = test_crew.Workers(test_crew.trainer(lambda number: number and time.sleep(100)), 3, 4, batched=True)
print(*[x.process.pid for x in w._workers], flush=True)
threading.Timer(1, os.kill, (os.getpid(), signal.SIGKILL)).start()
test_crew.folded(w)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    pids = [int(p) for p in done.stdout.split()]
    assert len(pids) == 3, done.stderr
    end = time.monotonic() + 10
    while any(alive(p) for p in pids):
        assert time.monotonic() < end, "a worker outlives its parent"
        time.sleep(0.05)


def test_nobody_waits_for_a_chunk_that_is_not_wanted_any_more() -> None:
    workers = Workers(trainer(lambda number: time.sleep(100 if number > 7 else 0)), 2, 4, batched=True)
    try:
        rest = workers.train(1, WEIGHTS, chunks(4))
        next(rest)
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            rest.throw(KeyboardInterrupt)
        assert time.monotonic() - began < 20
        gc.collect()
        assert len(workers._free) == 6
    finally:
        workers.close()


def test_a_simulation_that_is_over_leaves_nothing_behind(tmp_path: Path) -> None:
    """A sweep is many in one process."""

    def shared() -> int:
        return Path("/proc/self/maps").read_text().count("/dev/zero")

    gc.collect()
    before, alive_ones = shared(), []
    for seed in range(2):
        _, simulation = run(
            tmp_path / str(seed), sixty_clients(seed=seed), execution=Execution(batched=True, chunk=7, workers=2)
        )
        alive_ones.append(weakref.ref(simulation))
        del simulation
    gc.collect()
    assert [one() for one in alive_ones] == [None, None]
    assert shared() == before


@pytest.mark.parametrize("secret", [False, True])
def test_who_fails_is_not_told_where_nobody_may_learn_who_was_drawn(secret: bool, caplog: Any) -> None:
    def mishap(number: int) -> None:
        if number == 5:
            raise OSError("gone")

    made = trainer(mishap)
    made.secret = secret
    with caplog.at_level("DEBUG"):
        _, _, outcomes = next(Here(made, batched=True).train(1, WEIGHTS, [[4, 5]]))
        next(Here(made, batched=True).train(2, WEIGHTS, [[4, 5]]))
    assert [o.failed for o in outcomes] == [False, True]
    assert caplog.text.count("cannot be read") == (0 if secret else 1), "and once: a mistake is everybody's"


def test_what_goes_wrong_with_one_client_is_that_clients_alone() -> None:
    def mishap(number: int) -> None:
        if number == 5:
            raise OSError("gone")

    updates, outcomes = {}, {}
    for clients, some, ended in Here(trainer(mishap), batched=True).train(1, WEIGHTS, chunks(4)):
        updates |= dict(zip(clients, some, strict=True))
        outcomes |= dict(zip(clients, ended, strict=True))
    assert [c for c, o in outcomes.items() if o.failed] == [5]
    alone = next(Here(trainer(), batched=True).train(1, WEIGHTS, [[4, 6, 7]]))[1]
    assert np.array_equal(np.stack([updates[c] for c in (4, 6, 7)]), alone)


def test_an_update_that_is_not_finite_is_refused_alone() -> None:
    wild = LocalSettings(6, 1.0, "sgd", 1e30)
    _, updates, outcomes = next(Here(trainer(settings=wild), batched=True).train(1, WEIGHTS, [list(range(CLIENTS))]))
    fine = [bool(np.isfinite(u).all()) for u in updates]
    assert not all(fine)
    refused = (Refusal.NUMERIC.value, "the update is not finite")
    assert [o.refused for o in outcomes] == [None if f else refused for f in fine]


# -- plans ---------------------------------------------------------------------------------------------------------------


def test_the_fastest_plan_is_chosen() -> None:
    plan = choose(1.0, {1: 0.5, 8: 0.1, 64: 0.05}, 1000, 1)
    assert plan == Execution(batched=True, chunk=64, workers=0)
    assert choose(1.0, {1: 0.5, 8: 0.1, 64: 0.05}, 1000, 2).workers == 2
    assert choose(1.0, {8: 2.0}, 1000, 2) == Execution(batched=False, chunk=1, workers=2)
    assert choose(None, {1: 1e-5, 10: 1e-6}, 10, 2).workers == 0  # sooner done than handed over
    # 64 clients in one chunk would leave a worker idle
    assert choose(None, {32: 0.1, 64: 0.095}, 64, 2) == Execution(batched=True, chunk=32, workers=2)


def test_a_plan_in_words() -> None:
    assert Execution(batched=True, chunk=1, workers=1).words() == "1 client at once, in 1 process"
    assert Execution(batched=False, chunk=9, workers=2).words() == "clients one by one, in 2 processes"


def test_a_plan_is_read_from_a_file_or_a_result_and_nothing_else(tmp_path: Path) -> None:
    path, plan = tmp_path / "plan.json", Execution(batched=True, chunk=16, workers=2)
    for written in (plan.model_dump(), {"execution": {**plan.model_dump(), "tried": None}}):
        path.write_text(json.dumps(written))
        assert load_execution(path) == plan
    for bad, words in {
        "": "not JSON",
        '{"batched": true, "chunk": 4': "not JSON",
        "\x00": "not JSON",
        "[]": "no execution plan",
        "4.5": "no execution plan",
        "{}": "no execution plan",
        '{"execution": null}': "no execution plan",
        '{"batched": true, "chunk": 0, "workers": 2}': "chunk: .*greater than or equal to 1",
        '{"batched": true, "chunk": 1e8, "workers": 2}': "chunk: .*less than or equal to 100000",
        '{"batched": true, "chunk": 4.5}': "chunk: .*integer.*; workers: missing",
        '{"batched": true, "chunk": 1, "workers": 2, "wokers": 3}': "wokers: unknown key",
    }.items():
        path.write_text(bad)
        with pytest.raises(ConfigError, match=rf"plan\.json: .*{words}"):
            load_execution(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_execution(tmp_path / "none.json")


# -- a whole run ---------------------------------------------------------------------------------------------------------


def simulated(out: Path, settings: Federation, **options: Any) -> Iterator[Simulation]:
    simulation = Simulation(settings, Path(), out, engine=COHORT, **options)
    try:
        yield simulation
    finally:
        simulation.close()


def run(out: Path, settings: Federation, **options: Any) -> Any:
    for simulation in simulated(out, settings, **options):
        outcome = simulation.run()
        assert outcome.model is not None
        simulation.save_model(outcome.model)
        save_result(out, make_result(simulation, outcome, outcome.refusals, {}))
        return outcome, simulation
    raise AssertionError


@pytest.mark.parametrize("batched", [True, False])
def test_one_plan_gives_one_model_bit_by_bit_whoever_computes_it(tmp_path: Path, batched: bool) -> None:
    plan, settings = Execution(batched=batched, chunk=7, workers=0), sixty_clients()
    reference, _ = run(tmp_path / "0", settings, execution=plan)
    for workers in (1, 2):
        outcome, simulation = run(tmp_path / str(workers), settings, execution=plan, workers=workers)
        same_arrays(outcome.model, reference.model)
        assert simulation.crew.to_fields()["workers"] == workers
        verified(tmp_path / str(workers))


def test_there_are_no_more_workers_than_chunks_in_a_round(tmp_path: Path) -> None:
    settings, plan = sixty_clients(), Execution(batched=True, chunk=25, workers=1)
    for simulation in simulated(tmp_path / "out", settings, execution=plan, workers=1000):
        assert simulation.crew is not None
        assert simulation.crew.to_fields()["workers"] == 2  # for the 30 of a round
        assert len(multiprocessing.active_children()) == 2
        assert "in 2 processes (1000 would find no more chunks in a round)" in simulation.crew.words()


def test_a_run_that_goes_on_goes_on_by_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, out = sixty_clients(), tmp_path / "out"
    plan = Execution(batched=True, chunk=5, workers=2)
    reference, _ = run(tmp_path / "whole", settings, execution=plan)

    class Killed(BaseException):
        pass

    done, record = [0], Coordinator._record

    def dies(self: Any, state: Any) -> None:
        done[0] += 1
        if done[0] == 3:
            raise Killed
        record(self, state)

    monkeypatch.setattr(Coordinator, "_record", dies)
    with pytest.raises(Killed):
        run(out, settings, execution=plan)
    monkeypatch.undo()
    with pytest.raises(
        ConfigError, match="5 clients at once, in 2 processes"
    ):  # or result.json would be untrue of the first rounds
        run(out, settings, resume=True, execution=Execution(batched=True, chunk=6, workers=2))
    outcome, simulation = run(out, settings, resume=True, execution=plan.model_copy(update={"workers": 0}))
    assert simulation.crew.plan == plan.model_copy(update={"workers": 0})
    same_arrays(outcome.model, reference.model)
    verified(out)


def test_a_run_goes_on_with_the_code_and_the_data_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is signed of it would else be of two models, or of two data sets, and verify."""
    data = tmp_path / "mine"
    data.mkdir()
    rng = np.random.default_rng(0)
    np.save(data / "x.npy", rng.random((300, 1, 8, 8), np.float32))
    np.save(data / "y.npy", labels := rng.integers(0, 10, 300))
    population = {"dataset": "./mine", "clients": 60, "partition": {"kind": "iid", "min_records": 2}}
    settings, out = sixty_clients(population=population), tmp_path / "out"

    def again() -> Any:
        return Simulation(settings, tmp_path, out, engine=COHORT, resume=True)

    Simulation(settings, tmp_path, out, engine=COHORT).close()
    np.save(data / "y.npy", labels[::-1])
    with pytest.raises(OutputError, match="other data"):
        again()
    np.save(data / "y.npy", labels)
    with monkeypatch.context() as patch:
        patch.setattr(federation, "code_sha256", lambda _: "0" * 64)
        with pytest.raises(OutputError, match="other code of its task"):
            again()
    simulation = again()
    assert simulation.run().model is not None
    simulation.close()


def test_a_worker_killed_in_the_middle_of_a_round_changes_nothing(tmp_path: Path) -> None:
    """A real SIGKILL from outside, again and again."""
    settings, plan = sixty_clients(), Execution(batched=True, chunk=3, workers=2)
    reference, _ = run(tmp_path / "whole", settings, execution=plan)
    killed: list[int] = []

    def notify(event: str, **facts: Any) -> None:
        if event == "answer" and facts["kind"] == "train" and len(killed) < 5:
            victims = [c for c in multiprocessing.active_children() if c.pid not in killed]
            if victims:
                victims[0].kill()
                killed.append(victims[0].pid or 0)

    outcome, _ = run(tmp_path / "out", settings, execution=plan, notify=notify)
    assert len(killed) == 5
    same_arrays(outcome.model, reference.model)
    assert [h["partners"] for h in outcome.history] == [30, 30, 30]
    verified(tmp_path / "out")


@pytest.mark.parametrize(
    ("engine", "changes", "words"),
    [
        ("nodes", {"workers": 2}, "no workers"),
        (COHORT, {"secure_aggregation": {"colluding": 1}, "quorum": 32, "algorithm": None}, "secure aggregation"),
        (
            "nodes",
            {"population": {"dataset": "digits", "clients": 150, "partition": {"kind": "iid", "min_records": 2}}},
            "at most 100",
        ),
    ],
)
def test_an_engine_that_does_not_fit_is_refused(
    tmp_path: Path, engine: str, changes: dict[str, Any], words: str
) -> None:
    how = {"workers": changes["workers"]} if "workers" in changes else {}
    changes = {k: v for k, v in changes.items() if k != "workers"}
    local = {"steps": 1, "optimizer": {"lr": 0.2}}
    changes = {k: v if v is not None else {"rounds": 1, "local": local} for k, v in changes.items()}
    with pytest.raises(ConfigError, match=words):
        Simulation(sixty_clients(**changes), Path(), tmp_path / "out", engine=engine, **how)
    assert not (tmp_path / "out").exists()


def test_a_plan_that_the_model_cannot_have_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hansa.simulations import program

    monkeypatch.setattr(program, "LAYERS", {})
    with pytest.raises(ConfigError, match="many clients at once, but the model cannot"):
        run(tmp_path / "out", sixty_clients(), execution=Execution(batched=True, chunk=2, workers=0))
    outcome, simulation = run(tmp_path / "other", sixty_clients())
    assert not simulation.crew.plan.batched
    assert "not known" in simulation.crew.to_fields()["not_batched_because"]
    assert outcome.model is not None


@pytest.mark.parametrize("size", [CLIENTS, 4])
def test_rows_that_the_loss_fails_on_fail_for_their_client_alone(size: int) -> None:
    class Wrong(Made):
        def open(self, number: int) -> Split:
            split = super().open(number)
            if number == 5:
                split.train.y[0] = 7  # no class
            return split

    torch.manual_seed(0)
    made = Trainer(TASK, model(), Wrong(), PLAIN, 6, 0)
    done = list(Here(made, batched=True).train(1, WEIGHTS, chunks(size)))
    outcomes = [outcome for _, _, some in done for outcome in some]
    assert [number for number, outcome in enumerate(outcomes) if outcome.failed] == [5]
    alone = next(Here(trainer(), batched=True).train(1, WEIGHTS, [[6]]))[1][0]
    np.testing.assert_allclose(np.concatenate([u for _, u, _ in done])[6], alone, atol=1e-6)
