"""The engine ray: Flower's simulation runtime keeps a Grid's promises, gives the bits that any engine gives, and survives its workers."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grid_contract import CONTRACT
from hansa.clients.engine import Wordless
from hansa.common.errors import ConfigError, RunFailed
from hansa.common.flower import Context, Message
from hansa.simulations import ray_engine
from hansa.simulations.clients import clients_of
from hansa.simulations.execution import Execution
from hansa.simulations.federation import COHORT, RAY, Simulation
from hansa.simulations.result import make_result
from link_support import plain_app
from support import NO_PRIVACY, config, same_arrays, verified

PLAN = Execution(batched=True, chunk=4, workers=0)
with_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'hansa[ray]'"
)


def population(steps: int = 2, **changes: Any) -> Any:
    local = {"steps": steps, "sampling_rate": 0.5, "optimizer": {"lr": 0.2}}
    made = {
        "name": "digits",
        "task": "digits",
        "partners": None,
        "population": {"dataset": "digits", "clients": 60, "partition": {"kind": "iid", "min_records": 2}},
        "algorithm": {"rounds": 3, "participation": 0.5, "local": local},
        "evaluation": {"kind": "public", "every": 3, "test_fraction": 0.2},
        "privacy": NO_PRIVACY,
        "quorum": 20,
    }
    return config(**{**made, **changes})


def run(out: Path, engine: str, settings: Any = None, **options: Any) -> tuple[Any, dict[str, Any]]:
    simulation = Simulation(settings or population(), Path(), out, engine=engine, **{"execution": PLAN, **options})
    try:
        outcome = simulation.run()
        assert outcome.model is not None
        simulation.save_model(outcome.model)
        return outcome, make_result(simulation, outcome, outcome.refusals, {})
    finally:
        simulation.close()


def processes(root: int | None = None) -> dict[int, str]:
    """Descendants of a process that are there, and what they are called."""
    parents, names = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            stat, line = (path / "stat").read_text(), (path / "cmdline").read_bytes()
        except OSError:
            continue
        state, parent = stat.rpartition(")")[2].split()[:2]
        if state != "Z":
            parents[int(path.name)], names[int(path.name)] = int(parent), line.replace(b"\0", b" ").decode().strip()
    found = {root or os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: names[pid] for pid in found if pid in names and pid != (root or os.getpid())}


def workers(root: int | None = None) -> list[int]:
    """Ray processes that train."""
    return [pid for pid, name in processes(root).items() if name.startswith("ray::ClientAppActor")]


def test_without_ray_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "hansa.simulations.runtime", raising=False)
    with pytest.raises(ConfigError) as caught:
        run(tmp_path / "out", RAY)
    assert "pip install 'hansa[ray]'" in str(caught.value)
    assert not (tmp_path / "out").exists()


class Named(Wordless):
    """The contract's app, on nodes that are called by their number."""

    def __init__(self) -> None:
        super().__init__(plain_app())

    def __reduce__(self) -> Any:
        return Named, ()

    def __call__(self, message: Message, context: Context) -> Message:
        context.node_config["name"] = f"n{context.node_config['partition-id']}"
        return super().__call__(message, context)


@with_ray
@pytest.mark.slow
def test_flowers_simulation_runtime_keeps_the_contract_of_every_grid() -> None:
    from hansa.simulations.runtime import Runtime

    runtime = Runtime(Named(), 3, 1)
    try:
        for check in CONTRACT:
            check(runtime.grid, list(runtime.grid.get_node_ids()))
    finally:
        runtime.close()
    assert not [name for name in processes().values() if "ray" in name]


@with_ray
@pytest.mark.soak
@pytest.mark.parametrize("batched", [True, False])
def test_one_plan_gives_the_bits_that_every_engine_gives(tmp_path: Path, batched: bool) -> None:
    plan = PLAN.model_copy(update={"batched": batched})
    reference, _ = run(tmp_path / "here", COHORT, execution=plan)
    outcome, result = run(tmp_path / "ray", RAY, execution=plan, workers=3)
    same_arrays(outcome.model, reference.model)
    assert outcome.history == reference.history
    assert (result["engine"], result["execution"]["workers"], result["execution"]["chunk"]) == (RAY, 3, 4)
    assert result["execution"]["batched"] is batched
    verified(tmp_path / "ray")


@with_ray
@pytest.mark.soak
def test_a_worker_killed_in_the_middle_of_a_round_changes_nothing(tmp_path: Path) -> None:
    """A real SIGKILL from outside, in every round; chunks are long enough to be hit."""
    settings = population(steps=400)
    reference, _ = run(tmp_path / "here", COHORT, settings)
    killed: dict[int, list[int]] = {}
    answers: list[tuple[int, str]] = []

    def notify(event: str, **facts: Any) -> None:
        if event == "answer" and facts["kind"] == "train":
            answers.append((facts["round"], facts["partner"]))
            if len(killed.setdefault(facts["round"], [])) < 1:
                busy = [pid for pid in workers() if "CPU" or pid]
                os.kill(busy[0], signal.SIGKILL)
                killed[facts["round"]].append(busy[0])

    outcome, _ = run(tmp_path / "ray", RAY, settings, workers=2, notify=notify)
    assert len({pid for pids in killed.values() for pid in pids}) == 3
    same_arrays(outcome.model, reference.model)
    assert len(answers) == len(set(answers)) == 90
    verified(tmp_path / "ray")
