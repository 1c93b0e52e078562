"""What `hansa plan --ledger` counts: one budget, whole, and runs by charter and name; and what secure aggregation comes to."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hansa.common import plan_cli
from hansa.common.accounting import Budget, PrivacyEvent
from hansa.common.charter import adversary
from hansa.common.cli import run
from hansa.common.errors import LedgerError
from hansa.common.ledger import UNDISCLOSED, Entry
from hansa.common.plan import calibrated, events_of, plan_of
from hansa.common.shared_noise import SharedGaussian, grid_for
from support import config

ALGORITHM = {"rounds": 3, "local": {"steps": 2, "optimizer": {"lr": 0.2}}}
PRIVACY = {"kind": "local", "epsilon": 1.0, "delta": 1e-4, "clip_norm": 1.0}
BUDGET = Budget.create(1.0, 1e-4)
EVENT = PrivacyEvent(1.0, 20.0, 2)
ITEM = {"purpose": "train", "count": 3, "event": EVENT.to_fields()}


def entry(seq: int, kind: str, body: dict, charter: str | None = None) -> Entry:
    return Entry(seq, "2026-01-01T00:00:00Z", kind, charter, body, None, b"", "", "")


def taken(*entries: Entry) -> tuple[Budget | None, list[PrivacyEvent], list[PrivacyEvent]]:
    return plan_cli._taken(Path("l.jsonl"), list(entries))


def test_two_coordinators_may_call_their_runs_the_same() -> None:
    _, spent, held = taken(
        entry(0, "hold", {"run_id": "a", "plan": [ITEM]}, "one"),
        entry(1, "hold", {"run_id": "a", "plan": [ITEM]}, "two"),
        entry(2, "debit", {"run_id": "a", "purpose": "train", "event": EVENT.to_fields()}, "one"),
        entry(3, "release", {"run_id": "a"}, "one"),
    )
    assert spent == [EVENT]
    assert held == [PrivacyEvent(1.0, 20.0, 6)]  # of the other, which is still open


def test_what_an_expired_charter_holds_is_free() -> None:
    """As at the node, which frees it before it admits anything."""
    entries = [
        entry(n, kind, body, sha)
        for n, (sha, kind, body) in enumerate(
            (sha, kind, body)
            for sha, expires in (("past", "2020-01-01T00:00:00+00:00"), ("now", "2999-01-01T00:00:00+00:00"))
            for kind, body in (("charter", {"expires": expires}), ("hold", {"run_id": sha, "plan": [ITEM]}))
        )
    ]
    assert taken(*entries[:2])[2] == []
    assert len(taken(*entries)[2]) == len(taken(*entries[2:])[2]) == 1


def test_what_would_be_miscounted_is_refused() -> None:
    with pytest.raises(LedgerError, match="not disclosed"):
        taken(entry(0, UNDISCLOSED, {}))
    one, two = (entry(n, "dataset", {"dataset": str(n), "lineage": str(n)}) for n in (0, 1))
    assert taken(one) == (None, [], [])
    with pytest.raises(LedgerError, match="several budgets"):
        taken(one, two)
    with pytest.raises(LedgerError, match="'spend', which this version does not know"):
        taken(entry(0, "spend", {}))


def test_what_a_ledger_has_left_never_changes_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is the one that the charter of this configuration describes; the budget of the ledger pays for it or not."""
    evaluation = {"kind": "private", "noise_multiplier": 60.0, "every": 2}
    agreed = config(algorithm={**ALGORITHM, "rounds": 5}, privacy=PRIVACY, evaluation=evaluation)
    fresh = plan_cli.planned(agreed)
    sigma = calibrated(agreed)
    assert (fresh["fits"], fresh["noise_multiplier"], fresh["stops"]) == (True, sigma, [])
    assert [row["fits"] for row in fresh["by_rounds"]] == [True, True, True, False]
    # What other caps need is what calibration gives for them, evaluation included.
    needed = {row["epsilon"]: row["noise_multiplier"] for row in fresh["noise_for_other_caps"]}
    assert needed[agreed.privacy.epsilon] == sigma
    for before in (1, 400, 10_000):
        spent = [PrivacyEvent(1.0, 40.0, before)]
        budget = Budget.create(2.0, 1e-4)
        monkeypatch.setattr(plan_cli, "_taken_before", lambda _, taken=(budget, spent, []): taken)
        found = plan_cli.planned(agreed, Path("l.jsonl"))
        assert found["noise_multiplier"] == sigma

        def pays(rounds: int, noise: float | None, spent: list[PrivacyEvent] = spent) -> bool:
            assert noise is not None
            algorithm = agreed.algorithm.model_copy(update={"rounds": rounds})
            terms = agreed.with_noise(noise).model_copy(update={"algorithm": algorithm})
            return Budget.create(2.0, 1e-4).admits([*spent, *events_of(plan_of(terms))])

        assert found["fits"] == pays(5, sigma) == (before == 1)
        assert found["stops"] == ([] if before == 1 else ["the ledger's budget"])
        fit = found["rounds_that_fit"]
        assert fit == 0 or pays(fit, sigma)
        assert fit >= 5 or not pays(fit + 1, sigma)
        if found["noise_that_fits"] is None:
            assert before == 10_000
        else:
            assert pays(5, found["noise_that_fits"])
            assert found["noise_that_fits"] >= sigma
        for row in found["noise_for_other_caps"]:
            assert row["fits"] == (row["noise_multiplier"] is not None and pays(5, row["noise_multiplier"]))
        assert len({row["fits"] for row in found["noise_for_other_caps"]}) == (1 if before == 10_000 else 2)


def test_unprotected_training_still_pays_for_private_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = config(privacy={"kind": "none"}, evaluation={"kind": "private", "noise_multiplier": 60.0})
    for spent, fits in (([], True), ([PrivacyEvent(1.0, 40.0, 10_000)], False)):
        monkeypatch.setattr(plan_cli, "_taken_before", lambda _, taken=(BUDGET, spent, []): taken)
        assert plan_cli.planned(bare, Path("l.jsonl"))["fits"] is fits
    assert plan_cli.planned(bare)["fits"]


# -- secure aggregation ----------------------------------------------------------------------------------------------------


SHARED = """\
name: shared
task: heart-disease
partners:
  a: {data: a.csv, declared_records: 240}
  b: {data: b.csv, declared_records: 235}
  c: {data: c.csv, declared_records: 100}
  d: {data: d.csv, declared_records: 160}
algorithm:
  rounds: 10
  local: {steps: 1, optimizer: {lr: 0.2}}
privacy: {noise: shared, epsilon: 1.0, delta: 1.0e-4, clip_norm: 1.0}
evaluation: {kind: none}
quorum: 3
secure_aggregation: {colluding: 1, retries: 2}
"""


@pytest.fixture
def plan(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def made(text: str, *more: str) -> tuple[int, str, str]:
        (tmp_path / "c.yaml").write_text(text)
        code = run(["plan", str(tmp_path / "c.yaml"), *more])
        told = capfd.readouterr()
        return code, " ".join(told.out.split()), told.err

    return made


def test_a_plan_says_what_secure_aggregation_comes_to(plan: Callable[..., tuple[int, str, str]]) -> None:
    code, shown, _ = plan(SHARED)
    assert code == 0
    for words in (
        "record level, add-or-remove-one, shared noise, delta 0.0001, against the coordinator and one partner, together",
        "sums over 3 or more (quorum N_min = 3)", "while at most 1 work with it (t = 1)", "threshold T = 3",
        "72 values in steps of 2^-12 in a ring of 32 bits: 288 bytes", "wraps is at most 2^-",
        "2 rounds of the run may be asked again (retries); each is paid for: the noise is calibrated for 12",
        "epsilon by rounds, each with 2 retries",
        "calibrated for the cap 1 (delta 0.0001, record level, add-or-remove-one), 10 rounds x 1 step",
        "shared noise: against the coordinator and one partner", "local noise: against everyone but the partner itself",
    ):  # fmt: skip
        assert words in shown, words
    told = json.loads(plan(SHARED, "--format", "json")[1])
    assert (told["noise"], told["privacy"]) == ("shared", "shared")
    assert told["adversary"] == adversary(1)
    assert told["secure_aggregation"]["vector_bytes"] == 288
    shared, local = told["placements"]["rows"]
    assert shared["noise_multiplier"] == told["noise_multiplier"]
    assert shared["noise_factor"] == math.sqrt(4 / 2)
    assert local["noise_factor"] == 2
    assert told["run"]["epsilon_filter"] == shared["epsilon_filter"] <= 1


def test_local_noise_under_secure_aggregation(plan: Callable[..., tuple[int, str, str]]) -> None:
    local = SHARED.replace("noise: shared", "noise: local").replace("steps: 1", "steps: 3")
    code, shown, _ = plan(local)
    assert code == 0
    assert "local noise, delta 0.0001, against everyone but the partner itself" in shown
    assert "no sum can wrap" in shown
    assert "no shared noise: algorithm.local.steps must be 1" in shown
    told = json.loads(plan(local, "--format", "json")[1])
    assert [row["noise"] for row in told["placements"]["rows"]] == ["local"]
    assert "algorithm.local.steps must be 1" in told["placements"]["missing"]["shared"]
    code, shown, _ = plan(SHARED.replace("noise: shared, epsilon: 1.0, delta: 1.0e-4, clip_norm: 1.0", "noise: none"))
    assert code == 0
    assert "epsilon is unbounded" in shown
    assert "2 rounds of the run may be asked again (retries)" in shown
    assert "paid for" not in shown


def test_without_retries_nothing_more_is_paid_for(plan: Callable[..., tuple[int, str, str]]) -> None:
    shown = plan(SHARED.replace(", retries: 2", ""))[1]
    assert "no round may be asked again (retries: 0)" in shown
    assert "paid for" not in shown
    assert "epsilon by rounds rounds" in shown, "and no word of it in the table's title"


def test_little_noise_is_no_row(plan: Callable[..., tuple[int, str, str]]) -> None:
    """Half of the least noise cannot be asked for, nor what is charged as less than the least."""
    few = SHARED.replace("epsilon: 1.0", "epsilon: 90").replace(
        "clip_norm: 1.0", "clip_norm: 1.0, noise_multiplier: 0.6"
    )
    told = json.loads(plan(few, "--format", "json")[1])
    assert [row["noise_multiplier"] for row in told["by_noise"]] == [0.45, 0.6, 0.9, 1.2]


def test_without_torch_only_secure_aggregation_needs_it(
    plan: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("hansa.common.tasks")] + ["torch"]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    code, _, err = plan(SHARED)
    assert code == 2
    assert "torch is not installed" in err
    assert "pip install 'hansa[train]'" in err
    bare = SHARED.replace("noise: shared", "noise: local").replace("secure_aggregation: {colluding: 1, retries: 2}", "")
    assert plan(bare)[0] == 0


def test_a_plan_for_a_model_that_cannot_be_trained_says_so(
    plan: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hansa.common import tasks

    broken = replace(tasks.load_task("digits"), build_model=lambda: 1 / 0)  # type: ignore[return-value, arg-type]
    monkeypatch.setattr(tasks, "load_task", lambda name: broken)
    bare = SHARED.replace("noise: shared", "noise: local").replace("secure_aggregation: {colluding: 1, retries: 2}", "")
    assert plan(bare)[0] == 0, "ours are known to work, and are not looked at"
    for text in (bare, SHARED):
        code, out, err = plan(text.replace("task: heart-disease", "task: mine"))
        assert (code, out) == (2, "")
        assert "build_model fails: ZeroDivisionError" in err


def test_another_dimension_than_the_tasks_is_refused(plan: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = plan(SHARED.replace("retries: 2", "retries: 2, dimension: 71"))
    assert code == 2
    assert "has 72 parameters" in err


def test_a_ledger_of_shared_noise_is_counted_as_charged() -> None:
    event = SharedGaussian(1.0, 20.0, 1.0, grid_for(1.0, 72), 72, 3, 1, 1)
    item = {"purpose": "train", "count": 3, "event": event.to_fields()}
    _, spent, held = taken(
        entry(0, "hold", {"run_id": "a", "plan": [item]}, "one"),
        entry(1, "debit", {"run_id": "a", "purpose": "train", "event": event.to_fields()}, "one"),
        entry(2, "survivors", {"run_id": "a", "round": 1}, "one"),
    )
    assert spent == [event.charged]
    assert held == [PrivacyEvent(1.0, event.charged.noise_multiplier, 2)]
