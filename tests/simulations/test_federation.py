"""A whole federation in one folder: killed anywhere it goes on, to the same model, and its bundle verifies."""

from __future__ import annotations

import contextlib
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hansa.clients.datasets import RegisteredDataset
from hansa.common.config import Federation
from hansa.common.errors import ConfigError, DataError, OutputError, RunFailed, TaskError
from hansa.common.ledger import Ledger
from hansa.common.tasks import load_task
from hansa.server.checkpoint import Checkpoint
from hansa.simulations import federation
from hansa.simulations.federation import Simulation, private_folder
from hansa.simulations.result import make_result, save_result
from support import HEART, Killed, config, run, same_arrays, unwrapped, verified

LOCAL = {"epsilon": 1.0, "delta": 1e-4, "clip_norm": 1.0}
PRIVATE = {"kind": "private", "noise_multiplier": 20.0, "every": 2}
SMALL = {name: HEART[name] for name in ("cleveland", "switzerland")}


def algorithm(strategy: Any = None, rounds: int = 3, **more: Any) -> dict[str, Any]:
    local = {"steps": 1, "optimizer": {"lr": 0.2}}
    return {"rounds": rounds, "local": local, "strategy": strategy or {"name": "fedavg"}, **more}


def small(**changes: Any) -> Federation:
    """Two hospitals, one step a round, without privacy."""
    return config(**{"partners": SMALL, "quorum": 2, "algorithm": algorithm(), **changes})


STRATEGIES = [
    {"name": "fedavg"},
    {"name": "fedadam", "eta": 0.05},
    {"name": "fedavgm", "server_momentum": 0.9},
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=[s["name"] for s in STRATEGIES])
def test_killed_at_any_notification_it_ends_in_the_same_model(tmp_path: Path, strategy: dict[str, Any]) -> None:
    settings = small(algorithm=algorithm(strategy))
    reference, total = run(settings, tmp_path / "whole")
    assert reference.model is not None
    verified(tmp_path / "whole")
    # Every round begins and ends with a notification; two random ones in between and the last.
    rng = random.Random(strategy["name"])
    for die_at in sorted({*rng.sample(range(1, total), 4), total}):
        out = tmp_path / str(die_at)
        with pytest.raises(Killed):
            run(settings, out, die_at=die_at)
        outcome, _ = run(settings, out, resume=True)
        assert outcome.model is not None
        same_arrays(outcome.model, reference.model)
        assert outcome.history == reference.history
        verified(out)


def _die_at_entry(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Die after the number-th entry that is written to any ledger from now on."""
    original, written = Ledger.append, 0

    def append(self: Ledger, kind: str, body: Any, **more: Any) -> Any:
        nonlocal written
        entry = original(self, kind, body, **more)
        written += 1
        if written == number:
            raise Killed
        return entry

    monkeypatch.setattr(Ledger, "append", append)


@pytest.mark.parametrize("evaluation", [{"kind": "public"}, PRIVATE], ids=["public", "private"])
def test_killed_again_and_again_with_privacy_it_completes_within_its_hold(
    tmp_path: Path, evaluation: dict[str, Any]
) -> None:
    """Every few ledger entries of any ledger, until it gets through: no debit is lost, none is made twice."""
    settings = small(privacy=LOCAL, evaluation=evaluation)
    out, deaths = tmp_path / "out", 0
    rng = random.Random(7)
    while True:
        with pytest.MonkeyPatch.context() as patch:
            _die_at_entry(patch, rng.randint(4, 9))
            try:
                run(settings, out, resume=deaths > 0)
                break
            except Killed:
                deaths += 1
                assert deaths < 60
    assert deaths >= 3
    verdict = verified(out)
    evaluations = 2 if evaluation is PRIVATE else 0  # rounds 2 and 3
    for name in SMALL:
        bill = verdict["partners"][name]
        assert (bill["rounds"], bill["debits"], bill["uncommitted_debits"]) == (3, 3 + evaluations, 0)
        assert 0 < bill["epsilon_filter"] <= 1.0


def test_killed_between_the_last_entry_and_the_closing_checkpoint(tmp_path: Path) -> None:
    from hansa.server import rounds

    out, settings = tmp_path / "out", small()
    with pytest.MonkeyPatch.context() as patch:

        def die(*_: object) -> None:
            raise Killed

        patch.setattr(rounds, "write_whole", die)
        with pytest.raises(Killed):
            run(settings, out)
    assert not list(out.glob("closing/*"))
    run(settings, out, resume=True)
    verified(out)


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    out, settings = tmp_path / "out", small()
    first, _ = run(settings, out)
    files = {p: p.read_bytes() for p in out.rglob("*.jsonl")} | {p: p.read_bytes() for p in out.rglob("closing/*")}
    again, _ = run(settings, out, resume=True)
    assert {p: p.read_bytes() for p in files} == files
    assert first.model is not None
    assert again.model is not None
    same_arrays(first.model, again.model)
    verified(out)


def test_a_second_run_is_refused_and_stays_so(tmp_path: Path) -> None:
    """What `hansa demo` does in step 4, and then again after a restart."""
    out, settings = tmp_path / "out", small(privacy=LOCAL, algorithm=algorithm(rounds=1))
    for resume in (False, True):
        simulation = Simulation(settings, Path(), out, resume=resume)
        try:
            outcome = simulation.run()
            second = simulation.run(simulation.another_run(), only=["cleveland"])
            simulation.save_model(outcome.model or {})
            assert (outcome.why, second.why, second.model) == ("completed", "refused", None)
            assert simulation.gates["cleveland"].ledger.of("refuse")[0].body["reason"] == "budget"
            assert len(simulation.gates["cleveland"].ledger.of("refuse")) == 1
            save_result(out, make_result(simulation, outcome, [], {}))
        finally:
            simulation.close()
        verified(out)


def test_partial_participation_with_privacy(tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = config(quorum=2, privacy=LOCAL, algorithm=algorithm(rounds=2, participation=0.5))
    outcome, _ = run(settings, out)
    assert [h["partners"] for h in outcome.history] == [2, 2]
    verdict = verified(out)
    assert sum(p["rounds"] for p in verdict["partners"].values()) == 4


def test_nothing_of_a_key_or_a_row_is_in_the_bundle(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(small(), out)
    private = private_folder(out)
    keys = list(private.rglob("identity.key"))
    assert len(keys) == 3
    assert all(p.stat().st_mode & 0o077 == 0 for p in (*keys, *private.rglob("dataset.json")))
    secrets = [line for k in keys for line in k.read_bytes().splitlines() if b"PRIVATE" not in line]
    for path in (p for p in out.rglob("*") if p.is_file()):
        assert not any(s in unwrapped(path.read_bytes()) for s in secrets), path
    assert {p.name for p in out.iterdir()} == {
        "charter.json", "closing", "coordinator", "heads", "keys", "model.safetensors", "partners", "result.json"
    }  # fmt: skip


# -- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_of_another_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(small(algorithm=algorithm(rounds=1)), out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(OutputError, match=r"holds another run, which is finished") as caught:
        run(small(algorithm=algorithm(rounds=1)), out)
    assert "--resume" not in caught.value.hint
    (out / "result.json").rename(tmp_path / "result.json")
    with pytest.raises(OutputError, match=r"(?s)holds another run, which is not finished.*--resume"):
        run(small(algorithm=algorithm(rounds=1)), out)
    (tmp_path / "result.json").rename(out / "result.json")
    for other in (small(algorithm=algorithm(rounds=2)), small(algorithm=algorithm(rounds=1), seed=1)):
        for resume in (False, True):
            with pytest.raises(OutputError, match="run of another configuration") as caught:
                run(other, out, resume=resume)
            assert ("it began with" in caught.value.hint) is resume
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    private_folder(out).rename(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match=r"its private folder .*out\.private is missing"):
        run(small(algorithm=algorithm(rounds=1)), out, resume=True)


def test_a_folder_that_is_not_ours(tmp_path: Path) -> None:
    for folder in (tmp_path / "a", private_folder(tmp_path / "b")):
        folder.mkdir()
        (folder / "thesis.txt").write_text("two years of work")
    for out in (tmp_path / "a", tmp_path / "b"):
        for resume in (False, True):
            with pytest.raises(OutputError, match="not empty, and not a run of ours"):
                run(small(), out, resume=resume)
    assert (tmp_path / "a" / "thesis.txt").read_text() == "two years of work"


def test_two_processes_in_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = Simulation(small(), Path(), out)
    try:
        with pytest.raises(OutputError, match="another hansa process"):
            Simulation(small(), Path(), out, resume=True)
    finally:
        first.close()
    run(small(), out, resume=True)
    verified(out)


def test_a_damaged_run_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(small(algorithm=algorithm(rounds=1)), out)
    (private_folder(out) / "run.json").write_text("{")
    with pytest.raises(OutputError, match=r"run\.json"):
        run(small(algorithm=algorithm(rounds=1)), out, resume=True)


def test_a_damaged_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Killed):
        run(small(), out, die_at=12)
    (path,) = private_folder(out).rglob("*.checkpoint")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(OutputError, match="checkpoint is damaged"):
        run(small(), out, resume=True)


def test_data_that_changed_between_kill_and_resume(tmp_path: Path) -> None:
    from hansa.simulations.sources import packaged

    own = tmp_path / "own.csv"
    lines = packaged("package:heart-disease/cleveland.csv").read_text().splitlines(keepends=True)
    own.write_text("".join(lines))
    partners = {**SMALL, "cleveland": {"data": str(own), "declared_records": 240}}
    out, settings = tmp_path / "out", small(partners=partners)
    with pytest.raises(Killed):
        run(settings, out, die_at=6)
    own.write_text("".join(lines[:-1]))
    with pytest.raises(DataError, match="cleveland: the data differ from what"):
        run(settings, out, resume=True)
    own.write_text("".join(lines))
    run(settings, out, resume=True)
    verified(out)


def test_a_round_that_cannot_reach_its_quorum_goes_on_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, settings = tmp_path / "out", small(privacy=LOCAL)

    def fail(self: Any) -> Any:
        raise DataError("the disk is away")

    with monkeypatch.context() as patch:
        patch.setattr(RegisteredDataset, "open", fail)
        with pytest.raises(RunFailed, match=r"0 of 2 partners answered.*dataset not usable"):
            run(settings, out)
    run(settings, out, resume=True)
    bill = verified(out)["partners"]["cleveland"]
    assert bill["debits"] == 3, "the failed round's debit paid for its second attempt"


def test_a_checkpoint_that_lags_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Die before each checkpoint is written: replies come from the outboxes, noise and all."""
    out, settings, original = tmp_path / "out", small(privacy=LOCAL, evaluation=PRIVATE), Checkpoint.save
    died: set[tuple[int, bool]] = set()

    def save(self: Checkpoint, path: Path) -> None:
        if (self.round, self.trained) not in died:
            died.add((self.round, self.trained))
            raise Killed
        original(self, path)

    monkeypatch.setattr(Checkpoint, "save", save)
    for attempt in range(6):  # who accepted, then a step a round, and one more where it is measured
        with pytest.raises(Killed):
            run(settings, out, resume=attempt > 0)
    run(settings, out, resume=True)
    bill = verified(out)["partners"]["cleveland"]
    assert (bill["debits"], bill["uncommitted_debits"]) == (5, 0)


def test_a_population_whose_clients_have_keys_shares_its_noise_and_a_larger_one_may_not(tmp_path: Path) -> None:
    asked = {
        "partners": None,
        "task": "digits",
        "algorithm": algorithm(rounds=2),
        "privacy": {"noise": "shared", "epsilon": 4.0, "delta": 1e-4, "clip_norm": 1.0},
        "secure_aggregation": {"colluding": 1},
    }
    outcome, _ = run(config(**asked, population={"dataset": "digits", "clients": 5}, quorum=4), tmp_path / "run")
    assert outcome.why == "completed"
    assert [one["partners"] for one in outcome.history] == [5, 5]
    for clients, quorum in ((2, 2), (101, 101)):
        with pytest.raises(ValueError, match="3 to 100 partners with keys of their own"):
            config(**asked, population={"dataset": "digits", "clients": clients}, quorum=quorum)


# -- models that cannot be trained -----------------------------------------------------------------------------------------


class Product(torch.nn.Module):
    """What Opacus has no gradients by record of."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.out = torch.nn.Bilinear(inputs, inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        return self.out(x, x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("who", "engine"), [({}, ""), ({"population": "digits"}, "nodes"), ({"population": "digits"}, "cohort")]
)
@pytest.mark.parametrize(
    ("build", "protected", "words"),
    [
        (lambda i, c: 1 / 0, False, "build_model fails: ZeroDivisionError"),
        (lambda i, c: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(i, 1)), False, "the model gives"),
        (Product, True, "layer 'out' .Bilinear. has no per-record gradients"),
    ],
)
def test_a_model_that_cannot_be_trained_is_told_once_and_before_anything_is_charged(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    who: dict[str, Any],
    engine: str,
    build: Any,
    protected: bool,
    words: str,
) -> None:
    privacy = LOCAL if protected else {"kind": "none"}
    if who:
        dealt = {"dataset": "digits", "clients": 30, "partition": {"kind": "iid"}}
        settings = small(task="digits", partners=None, population=dealt, privacy=privacy)
    else:
        settings = small(privacy=privacy)
    task = load_task(settings.task)
    inputs = math.prod(task.schema.shape)
    monkeypatch.setattr(
        federation, "load_task", lambda _: replace(task, build_model=lambda: build(inputs, len(task.classes)))
    )
    with pytest.raises(TaskError, match=words):
        Simulation(settings, tmp_path, tmp_path / "out", engine=engine)
    assert list(tmp_path.iterdir()) == []


def test_a_client_without_rows_to_train_on_is_named(tmp_path: Path) -> None:
    dealt = {"dataset": "digits", "clients": 60, "partition": {"kind": "dirichlet", "alpha": 0.5, "min_records": 1}}
    settings = small(
        task="digits", partners=None, population=dealt, evaluation={"kind": "public", "test_fraction": 0.8}
    )
    with pytest.raises(ConfigError, match=r"client-00\d\d has no training row left") as caught:
        Simulation(settings, tmp_path, tmp_path / "out")
    assert "test_fraction" in caught.value.hint


def test_an_error_names_no_option_that_simulate_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(Simulation(small(), tmp_path, tmp_path / "out")) as made:
        for node in made.nodes.values():
            monkeypatch.setattr(node, "_rows", lambda: 1 / 0)
        with pytest.raises(RunFailed) as caught:
            made.run()
    assert caught.value.hint.endswith("--resume.")
    assert caught.match("cleveland, switzerland: invalid the node failed")
