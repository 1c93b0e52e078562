"""Bundles of client-level runs: every client pays for every round, and nobody is named. Lies are properly signed."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # as in test_verifier.py
from bundles import COORDINATOR, Draft, Shape, honest, real, result_for
from hansa.common.accounting import PrivacyEvent, odometer
from hansa.common.charter import CENTRAL_ADVERSARY
from hansa.common.verifier import CENTRAL_ADVERSARY as THEIRS
from hansa.common.verifier import Unreadable, verify_bundle

CLIENTS = 2000
SHAPE = Shape(kind="central", clients=CLIENTS, participation=0.1, rounds=3, evaluation="public")


def written(made: Draft, tmp_path: Path) -> dict[str, Any]:
    return verify_bundle(made.write(tmp_path / "b"))


def test_an_honest_one(tmp_path: Path) -> None:
    made = honest(SHAPE)
    verdict = written(made, tmp_path)
    assert verdict["violations"] == []
    sigma = made.signed.charter.privacy.noise_multiplier
    (bill,) = verdict["partners"].values()
    assert bill["clients"] == CLIENTS
    assert (bill["debits"], bill["rounds"], bill["uncommitted_debits"]) == (3, 3, 0)
    assert bill["epsilon"] == pytest.approx(odometer([PrivacyEvent(0.1, sigma, 3)], 1e-4), rel=2e-3)
    assert bill["epsilon_filter"] <= 1.0
    assert bill["adversary"] == verdict["adversary"] == THEIRS == CENTRAL_ADVERSARY
    assert (bill["noise"], verdict["noise"], verdict["unit"]) == ("central", "central", "client")
    assert verdict["claim"].startswith(
        "The models of all rounds, together, are (epsilon, delta)-differentially private for one client"
    )


def of(kind: str, number: int = 0) -> Callable[[Draft], dict[str, Any]]:
    """The fields of an entry, to be changed."""
    return lambda made: made.entry(COORDINATOR, kind, number)


def changed(kind: str, **fields: Any) -> Callable[[Draft], None]:
    return lambda made: made.entry(COORDINATOR, kind).update(fields)


def event(**fields: Any) -> Callable[[Draft], None]:
    def change(made: Draft) -> None:
        entry = made.entry(COORDINATOR, "cohort-debit")
        entry["event"] = {**entry["event"], **fields}

    return change


def without(kind: str) -> Callable[[Draft], None]:
    def change(made: Draft) -> None:
        at = made.index(COORDINATOR, kind)
        del made.books[COORDINATOR][at]
        made.closings[:] = [(run, model, {COORDINATOR: n - 1}) for run, model, ((_, n),) in
                            ((r, m, tuple(h.items())) for r, m, h in made.closings)]  # fmt: skip

    return change


LIES: dict[str, tuple[Callable[[Draft], Any], str, str]] = {
    "a smaller rate": (event(q=real(0.05)), "not_held", "not in the plan"),
    "more noise": (event(sigma="100.0"), "not_held", "not in the plan"),
    "no event": (changed("cohort-debit", event={"mechanism": "none/1"}), "not_held", "not in the plan"),
    "another clip": (changed("cohort-debit", clip_norm="0.25"), "terms", "clip_norm"),
    "a cohort named": (changed("cohort-debit", clients=[[3, 3], [17, 20]]), "named", "tells who was asked"),
    "all but one": (changed("cohort-debit", clients=[[0, CLIENTS - 2]]), "named", "tells who was asked"),
    "who answered": (changed("cohort-commit", clients=[[3, 3], [17, 20]]), "named", "tells who was asked"),
    "a missing debit": (without("cohort-debit"), "run_order", "no debit of the same run"),
    "a missing commit": (without("cohort-commit"), "record", "2000 committed clients"),
    "a budget of records": (changed("budget", unit="record"), "budget", "unit is one client"),
    "who trained": (changed("round", partners=["client-0003"]), "record", "committed clients"),
}


@pytest.mark.parametrize(("lie", "code", "words"), LIES.values(), ids=LIES)
def test_lies(tmp_path: Path, lie: Callable[[Draft], Any], code: str, words: str) -> None:
    made = honest(SHAPE)
    lie(made)
    violations = written(made, tmp_path)["violations"]
    assert any(v["code"] == code and words in v["what"] for v in violations), violations


def test_a_plan_of_other_noise_is_not_the_charters(tmp_path: Path) -> None:
    made = honest(SHAPE)
    plan = made.entry(COORDINATOR, "cohort-hold")["plan"]
    plan[0] = {**plan[0], "event": {**plan[0]["event"], "sigma": "100.0"}}
    violations = written(made, tmp_path)["violations"]
    assert any("the plan's events are not the charter's" in v["what"] for v in violations)


def test_too_little_noise_is_over_the_charter(tmp_path: Path) -> None:
    made = honest(replace(SHAPE, sigma=0.4))
    codes = {v["code"] for v in written(made, tmp_path)["violations"]}
    assert {"over_budget", "over_charter"} <= codes


TERMS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "quorum": lambda c: c.update(quorum=1),
    "weighting": lambda c: c["algorithm"].update(weighting="declared"),
    "unit": lambda c: c["privacy"].update(unit="record"),
    "delta": lambda c: c["privacy"].update(delta="0.0005"),
    "evaluation": lambda c: c["evaluation"].update(kind="private", noise_multiplier="5.0"),
}


@pytest.mark.parametrize("change", TERMS.values(), ids=TERMS)
def test_terms_that_central_noise_cannot_keep_are_no_charter(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    from hansa.common.verifier import Bad, Terms

    payload = json.loads(honest(SHAPE).signed.payload)
    change(payload)
    with pytest.raises(Bad):
        Terms.parse(json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["privacy"].update(unit="record"), "unit is"),
        (lambda r: r["privacy"].pop("adversary"), "adversary is"),
        (lambda r: next(iter(r["partners"].values())).update(clients=1999), "not the number of clients"),
        (lambda r: r["refusals"].append({"partner": "client-0003", "run_id": "run-1", "round": 1, "reason": "x", "detail": ""}),
         "refusals name clients"),
    ],
)  # fmt: skip
def test_results_that_say_something_else(tmp_path: Path, change: Callable[[Any], Any], words: str) -> None:
    made = honest(SHAPE)
    folder = made.write(tmp_path / "b")
    result = result_for(made, verify_bundle(folder))
    for name, bill in verify_bundle(folder)["partners"].items():
        result["partners"][name]["clients"] = bill["clients"]
    (folder / "result.json").write_text(json.dumps(result))
    assert verify_bundle(folder)["violations"] == []
    change(result)
    (folder / "result.json").write_text(json.dumps(result))
    violations = verify_bundle(folder)["violations"]
    assert any(words in v["what"] for v in violations), violations


def test_it_cannot_be_between_partners(tmp_path: Path) -> None:
    """A charter of partners with central noise is unreadable: no node could keep its promise."""
    made = honest(Shape())
    folder = made.write(tmp_path / "b")
    text = json.loads((folder / "charter.json").read_text())
    assert verify_bundle(folder)["violations"] == []
    payload = json.loads(base64.b64decode(text["payload"]))
    payload["privacy"] |= {"kind": "central", "unit": "client"}
    payload["algorithm"]["weighting"], payload["quorum"] = "uniform", 0
    raw = json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    text["payload"] = base64.b64encode(raw).decode()
    (folder / "charter.json").write_text(json.dumps(text, sort_keys=True, separators=(",", ":")) + "\n")
    with pytest.raises(Unreadable, match="central noise between partners"):
        verify_bundle(folder)
