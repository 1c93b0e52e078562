"""The engine ray: Flower's simulation runtime keeps a Grid's promises, gives the bits that any engine gives, and survives its workers."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from grid_contract import CONTRACT
from hansa.clients.engine import Wordless
from hansa.common.errors import ConfigError, RunFailed
from hansa.common.flower import Context, Message
from hansa.simulations import ray_engine
from hansa.simulations.execution import Execution
from hansa.simulations.federation import COHORT, RAY, Simulation
from hansa.simulations.result import make_result
from link_support import plain_app
from support import same_arrays, sixty_clients, verified

PLAN = Execution(batched=True, chunk=4, workers=0)
with_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'hansa[ray]'"
)


def run(out: Path, engine: str, settings: Any = None, **options: Any) -> tuple[Any, dict[str, Any]]:
    simulation = Simulation(settings or sixty_clients(), Path(), out, engine=engine, **{"execution": PLAN, **options})
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
    settings = sixty_clients(steps=150)
    reference, _ = run(tmp_path / "here", COHORT, settings)
    killed: dict[int, int] = {}
    answers: list[tuple[int, str]] = []

    def notify(event: str, **facts: Any) -> None:
        if event == "answer" and facts["kind"] == "train":
            answers.append((facts["round"], facts["partner"]))
            if facts["round"] not in killed:
                killed[facts["round"]] = workers()[0]
                os.kill(killed[facts["round"]], signal.SIGKILL)

    outcome, _ = run(tmp_path / "ray", RAY, settings, workers=2, notify=notify)
    assert len(set(killed.values())) == 3
    same_arrays(outcome.model, reference.model)
    assert len(answers) == len(set(answers)) == 90
    verified(tmp_path / "ray")


@with_ray
@pytest.mark.soak
def test_a_chunk_that_kills_every_worker_stops_the_run_and_it_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever trains round 2 dies; the run ends with an error, Ray too, and goes on from round 2."""
    reference, _ = run(tmp_path / "here", COHORT)
    deadly = tmp_path / "deadly"
    monkeypatch.setenv("HANSA_TEST_DEADLY", str(deadly))
    monkeypatch.setattr(ray_engine, "CohortApp", Deadly)
    deadly.touch()
    with pytest.raises(RunFailed, match="round 2: Ray's workers died over the same clients"):
        run(tmp_path / "ray", RAY, workers=1)
    assert not [name for name in processes().values() if "ray" in name]
    deadly.unlink()
    outcome, _ = run(tmp_path / "ray", RAY, workers=1, resume=True, execution=None)
    same_arrays(outcome.model, reference.model)
    verified(tmp_path / "ray")


class Deadly(ray_engine.CohortApp):
    """Ends its process in round 2, while a file is there."""

    def __init__(self, path: str = "") -> None:
        super().__init__()
        self.path = path or os.environ["HANSA_TEST_DEADLY"]

    def __reduce__(self) -> Any:
        return Deadly, (self.path,)

    def __call__(self, message: Message, context: Context) -> Message:
        if message.content["chunk"]["round"] == 2 and Path(self.path).exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(message, context)


@with_ray
@pytest.mark.soak
@pytest.mark.parametrize(
    ("what", "words"), [("rows", "other rows"), ("torch", "torch '.*' instead of 'another'"), ("task", "task '.*'")]
)
def test_a_machine_with_other_code_or_rows_is_refused_before_anything_is_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, words: str
) -> None:
    made = ray_engine.setup
    monkeypatch.setattr(ray_engine, "setup", lambda *a: json.dumps({**json.loads(made(*a)), what: "another"}).encode())
    with pytest.raises(ConfigError, match=words):
        run(tmp_path / "out", RAY, workers=1)
    assert not (tmp_path / "out").exists()
    assert not [name for name in processes().values() if "ray" in name]


@with_ray
@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_of_ray_outlives_a_run_that_is_stopped(tmp_path: Path, number: int) -> None:
    """Ctrl-C, at every process of the terminal, while chunks of a minute are trained; and a kill of the run alone."""
    code = f"""
import sys; sys.path[:0] = {[p for p in sys.path if p]!r}
from pathlib import Path
import test_ray
def notify(event, **facts):
    if event == "round": print("begun", flush=True)
test_ray.run(Path({str(tmp_path / "out")!r}), "ray", test_ray.sixty_clients(steps=100_000), workers=2, notify=notify)
"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, start_new_session=True
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"begun\n"
            time.sleep(1)
            there = set(processes(child.pid))
            assert len(workers(child.pid)) == 2
            began = time.monotonic()
            if number == signal.SIGINT:
                os.killpg(child.pid, number)
            else:
                child.kill()
            child.wait(30)
            while (left := {pid for pid in there if Path(f"/proc/{pid}/stat").exists() and not _zombie(pid)}) and (
                time.monotonic() - began
                < 100  # Ray's agents look several times, and then for a minute for someone to tell
            ):
                time.sleep(0.2)
            assert not left, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left]
            if number == signal.SIGINT:
                assert child.returncode == -signal.SIGINT or child.returncode == 1, child.stderr.read()  # type: ignore[union-attr]
                assert time.monotonic() - began < 20
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # what a failure leaves


def _zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
