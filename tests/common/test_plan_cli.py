"""What `hansa plan --ledger` counts: one budget, whole, and runs by charter and name."""

from __future__ import annotations

from pathlib import Path

import pytest

from hansa.common import plan_cli
from hansa.common.accounting import Budget, PrivacyEvent
from hansa.common.errors import LedgerError
from hansa.common.ledger import UNDISCLOSED, Entry
from hansa.common.plan import calibrated, events_of, plan_of
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
    sigma = calibrated(agreed.algorithm, agreed.privacy, agreed.evaluation)
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
            privacy = agreed.privacy.model_copy(update={"noise_multiplier": noise})
            return Budget.create(2.0, 1e-4).admits([*spent, *events_of(plan_of(algorithm, privacy, agreed.evaluation))])

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
