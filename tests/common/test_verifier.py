"""The verifier: nothing honest is refused, nothing dishonest passes, and no bytes make it do anything but answer."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hansa.common import verifier
from hansa.common.accounting import Budget, PrivacyEvent, odometer
from hansa.common.identity import Envelope, canonical, sha256, write_envelope
from hansa.common.ledger import read_ledger
from hansa.common.verifier import Coordinator, Odometer, Partner, Report, Unreadable, verify_bundle

sys.path.insert(0, str(Path(__file__).parent))  # `common.bundles` would be looked for in the package of that name
from bundles import MODEL, Draft, Shape, digest, honest, identity, result_for

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "common" / "verifier.py"
VECTORS = ROOT / "tests" / "vectors"
P0, P1, C = "hospital-0", "hospital-1", "coordinator"
SMALL = Shape(partners=2, rounds=1, sigma=20.0)
FULL = Shape(partners=2, rounds=2, refused_run=True, steps=2)
PRIVATE = Shape(partners=2, rounds=2, evaluation="private", sigma=20.0)
NONE = Shape(partners=2, rounds=1, kind="none", evaluation="none")
DEAR = Shape(partners=2, rounds=1, sigma=0.35)
SAMPLED = Shape(partners=2, rounds=2, q=0.1, steps=3, sigma=3.0)
CLIENTS = Shape(clients=1000, rounds=3, participation=0.1, evaluation="none", q=0.2, sigma=3.0)

_drafts: dict[str, Draft] = {}


def fresh(shape: Shape) -> Draft:
    """A draft that the test may change."""
    key = repr(shape)
    if key not in _drafts:
        _drafts[key] = honest(shape)
    return copy.deepcopy(_drafts[key])


Draft.__deepcopy__ = lambda self, memo: Draft(  # type: ignore[attr-defined]
    self.signed,
    dict(self.people),
    copy.deepcopy(self.books, memo),
    copy.deepcopy(self.closings, memo),
    copy.deepcopy(self.result, memo),
    self.model,
    self.start,
)


def verdict_of(folder: Path) -> dict[str, Any]:
    """The verdict; something unreadable counts as a violation of that file."""
    try:
        verdict = verify_bundle(folder)
    except Unreadable as err:
        return {
            "verified": False,
            "violations": [{"file": err.file, "line": err.line, "what": err.what}],
            "warnings": [],
        }
    json.dumps(verdict, allow_nan=False)
    assert verdict["verified"] == (not verdict["violations"])
    return verdict


# -- honest bundles ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SMALL, FULL, PRIVATE, NONE, SAMPLED, CLIENTS], ids=lambda s: repr(s)[:60])
def test_honest_bundle_is_verified(tmp_path: Path, shape: Shape) -> None:
    made = fresh(shape)
    verdict = verdict_of(made.write(tmp_path / "b"))
    assert verdict["violations"] == []
    made.result = result_for(made, verdict)
    assert verdict_of(made.write(tmp_path / "b"))["violations"] == []
    assert verdict["checked"]["entries"] == sum(map(len, made.books.values()))
    assert verdict["simulated"] is True
    if not shape.clients:
        assert not verdict["warnings"]


def test_no_false_alarm_over_crashes_and_refusals(tmp_path: Path) -> None:
    warned = 0
    for seed in range(50):
        rng = random.Random(seed)
        shape = Shape(
            partners=rng.randint(2, 4),
            rounds=rng.randint(1, 4),
            evaluation=rng.choice(["none", "public", "private"]),
            kind=rng.choice(["local", "local", "local", "none"]),
            refused_run=rng.random() < 0.5,
            crashes=seed,
            participation=rng.choice([1.0, 0.6]),
            seed=seed,
        )
        verdict = verdict_of(honest(shape).write(tmp_path / "b"))
        assert verdict["violations"] == [], (shape, verdict["violations"])
        warned += bool(verdict["warnings"])
    assert warned > 10  # the crashes did happen


def test_claim_names_everything_that_a_guarantee_needs(tmp_path: Path) -> None:
    claim = verdict_of(fresh(SMALL).write(tmp_path / "b"))["claim"]
    for word in (
        "one record of that partner",
        "add-or-remove-one",
        "0.0001",
        "local noise",
        "everyone but the partner",
    ):
        assert word in claim
    verdict = verdict_of(fresh(NONE).write(tmp_path / "b"))
    assert "no differential privacy guarantee" in verdict["claim"]
    assert all(p["epsilon"] is None and p["epsilon_filter"] is None for p in verdict["partners"].values())


def test_summary_of_a_partner(tmp_path: Path) -> None:
    partner = verdict_of(fresh(FULL).write(tmp_path / "b"))["partners"][P0]
    assert (partner["debits"], partner["uncommitted_debits"], partner["rounds"], partner["refusals"]) == (2, 0, 2, 1)
    assert [point["round"] for point in partner["trajectory"]] == [1, 2]
    assert math.isclose(partner["trajectory"][-1]["epsilon_filter"], partner["epsilon_filter"], rel_tol=1e-12)
    assert partner["epsilon_filter"] <= partner["epsilon_cap"] == 1.0
    assert 0 < partner["epsilon"] <= partner["epsilon_filter"]


def test_population_of_100_000_is_cheap(tmp_path: Path) -> None:
    made = honest(Shape(clients=100_000, rounds=10, participation=0.1, evaluation="none", sigma=20.0))
    began = time.monotonic()
    verdict = verdict_of(made.write(tmp_path / "b"))
    assert verdict["violations"] == []
    assert len(verdict["partners"]) == 100_000
    assert time.monotonic() - began < 15
    debits = sum(p["debits"] for p in verdict["partners"].values())
    assert debits == 10 * 10_000
    assert sum(p["uncommitted_debits"] for p in verdict["partners"].values()) == 10  # one a round was not folded
    assert any("debit without a commit" in w["what"] for w in verdict["warnings"])


# -- properly signed lies ------------------------------------------------------------------------------------

Lie = Callable[[Draft], Any]


def change(owner: str, kind: str, nth: int = 0, /, **fields: Any) -> Lie:
    return lambda d: d.entry(owner, kind, nth).update(fields)


def at(path: Callable[[Draft], dict[str, Any]], /, **fields: Any) -> Lie:
    return lambda d: path(d).update(fields)


def again(owner: str, kind: str, nth: int = 0, /, **fields: Any) -> Lie:
    """The same entry once more, right after itself, with some fields changed."""

    def lie(d: Draft) -> None:
        place = d.index(owner, kind, nth)
        d.insert(owner, place + 1, kind, copy.deepcopy(d.books[owner][place][1]) | fields)

    return lie


def without(owner: str, kind: str, nth: int = 0) -> Lie:
    return lambda d: d.drop(owner, d.index(owner, kind, nth))


def before_end(owner: str, kind: str, body: dict[str, Any]) -> Lie:
    return lambda d: d.insert(owner, len(d.books[owner]), kind, body) or _closed_later(d, owner)


def _closed_later(d: Draft, owner: str) -> None:
    d.closings[-1][2][owner] = len(d.books[owner])


def everywhere(kind: str, /, **fields: Any) -> Lie:
    return lambda d: [body.update(fields) for book in d.books.values() for name, body in book if name == kind]


def reply(d: Draft, purpose: str, name: str = P0) -> dict[str, Any]:
    answers = next(b for k, b in d.books[C] if k == "answers" and b["purpose"] == purpose)
    found: dict[str, Any] = answers["replies"][name]
    return found


def budget(d: Draft) -> dict[str, Any]:
    found: dict[str, Any] = d.entry(P0, "budget")["budget"]
    return found


def late_debit(d: Draft) -> None:
    place = d.index(P0, "debit", 1)
    kind, body = d.books[P0].pop(place)
    release = d.index(P0, "release")
    d.books[P0].insert(release + 1, (kind, body))


def swap_rounds(d: Draft) -> None:
    i, j = d.index(C, "round", 0), d.index(C, "round", 1)
    d.books[C][i], d.books[C][j] = d.books[C][j], d.books[C][i]


def more_rounds_than_held(d: Draft) -> None:
    body = copy.deepcopy(d.entry(P0, "debit")) | {"request_id": "another"}
    d.insert(P0, d.index(P0, "release"), "debit", body)


def unprotected_then_protected(d: Draft) -> None:
    other = digest("another charter")
    at_place = d.index(P0, "hold")
    body = copy.deepcopy(d.entry(P0, "hold")) | {"run_id": "x", "request_id": "x-0", "charter_sha256": other}
    body["plan"] = [{"purpose": "train", "count": 1, "event": {"mechanism": "none/1"}}]
    debit = copy.deepcopy(d.entry(P0, "debit")) | {"run_id": "x", "request_id": "x-1", "charter_sha256": other}
    debit |= {"event": {"mechanism": "none/1"}, "clip_norm": None}
    expires = {"charter_sha256": other, "name": "other", "expires": "2030-01-01T00:00:00+00:00"}
    for kind, entry in (("debit", debit), ("hold", body), ("charter", expires)):
        d.insert(P0, at_place, kind, entry)


def under_another_charter(d: Draft, epsilon: float, delta: float, owner: str = P0) -> None:
    """The budget of a ledger came with a charter that is not this bundle's."""
    other, place = digest("another charter"), d.index(owner, "budget")
    body = d.entry(owner, "budget")
    body |= {"charter_sha256": other, "budget": Budget.create(epsilon, delta).to_fields()}
    expires = {"charter_sha256": other, "name": "other", "expires": "2030-01-01T00:00:00+00:00"}
    d.insert(owner, place, "charter", expires)


def fails(d: Draft, purpose: str, reply_sha256: str | None = None) -> None:
    """P0 answers that its work failed; it is not folded."""
    reply(d, purpose).update({"outcome": "failed"} | ({"reply_sha256": reply_sha256} if reply_sha256 else {}))
    if purpose == "train":
        d.entry(C, "round")["partners"].remove(P0)


COORD = "coordinator/ledger.jsonl"
L0 = f"partners/{P0}/ledger.jsonl"
LIES: list[tuple[str, Shape, Lie, str, str]] = [
    # rule 4 and 5: genesis, unknown things
    ("genesis_owner", SMALL, change(P0, "genesis", owner=P1), L0, "owner, role, key"),
    ("genesis_role", SMALL, change(P0, "genesis", role="coordinator"), L0, "owner, role, key"),
    ("genesis_key", SMALL, change(P0, "genesis", key=identity(P1).key), L0, "owner, role, key"),
    ("genesis_not_simulated", SMALL, change(P0, "genesis", simulated=False), L0, "owner, role, key"),
    ("genesis_without_dataset", SMALL, change(P0, "genesis", dataset=None), L0, "dataset"),
    (
        "genesis_old_dataset",
        SMALL,
        lambda d: d.entry(P0, "genesis")["dataset"].pop("held_out"),
        L0,
        "exactly the fields",
    ),
    (
        "genesis_held_out_kind",
        SMALL,
        at(lambda d: d.entry(P0, "genesis")["dataset"]["held_out"], kind="some"),
        L0,
        "held_out",
    ),
    (
        "genesis_held_out_no_commitment",
        SMALL,
        at(lambda d: d.entry(P0, "genesis")["dataset"]["held_out"], commitment=None),
        L0,
        "held_out",
    ),
    (
        "genesis_nothing_held_out_but_committed",
        NONE,
        at(lambda d: d.entry(P0, "genesis")["dataset"]["held_out"], commitment=digest("x")),
        L0,
        "held_out",
    ),
    (
        "public_of_private_rows",
        SMALL,
        at(lambda d: d.entry(P0, "genesis")["dataset"]["held_out"], kind="private"),
        L0,
        "are not public",
    ),
    ("charter_cap", DEAR, lambda d: under_another_charter(d, 200.0, 0.01), L0, "with this debit"),
    ("charter_cap_same_delta", DEAR, lambda d: under_another_charter(d, 200.0, 1e-4), L0, "with this debit"),
    (
        "clients_charter_cap",
        Shape(clients=200, rounds=2, evaluation="none", sigma=0.35),
        lambda d: under_another_charter(d, 200.0, 0.01, C),
        COORD,
        "the charter's is",
    ),
    (
        "debit_expired",
        SMALL,
        lambda d: setattr(d, "start", d.signed.charter.expires - timedelta(seconds=d.index(P0, "debit"))),
        L0,
        "debit: after the charter expired",
    ),
    (
        "clients_debit_expired",
        CLIENTS,
        lambda d: setattr(d, "start", d.signed.charter.expires - timedelta(seconds=d.index(C, "cohort-debit"))),
        COORD,
        "cohort-debit: after the charter expired",
    ),
    ("failed_other_reply", SMALL, lambda d: fails(d, "train", digest("x")), L0, "another reply"),
    (
        "failed_without_commit",
        SMALL,
        lambda d: [fails(d, "train"), without(P0, "commit")(d)],
        L0,
        "no commit for the failed answer",
    ),
    (
        "failed_without_reply",
        SMALL,
        lambda d: [fails(d, "train"), reply(d, "train").update(reply_sha256=None)],
        COORD,
        "outcome",
    ),
    (
        "failed_but_folded",
        SMALL,
        lambda d: [again(C, "answers", 1)(d), d.entry(C, "answers", 2)["replies"][P0].update(outcome="failed")],
        COORD,
        "that it failed",
    ),
    ("failed_open", SMALL, lambda d: reply(d, "open").update(outcome="failed"), COORD, "no work can fail"),
    ("genesis_missing", SMALL, without(P0, "genesis"), L0, "genesis"),
    ("genesis_twice", SMALL, again(P0, "genesis"), L0, "only the first"),
    ("unknown_type", SMALL, before_end(P0, "gift", {}), L0, "unknown type"),
    ("coordinator_type_at_partner", SMALL, before_end(P0, "run", {"run_id": "x"}), L0, "unknown type"),
    ("unknown_field", SMALL, change(P0, "commit", more=1), L0, "exactly the fields"),
    ("missing_field", SMALL, lambda d: d.entry(P0, "commit").pop("round"), L0, "exactly the fields"),
    ("unknown_mechanism", SMALL, at(lambda d: d.entry(P0, "debit")["event"], mechanism="laplace/1"), L0, "mechanism"),
    ("unknown_mechanism_version", SMALL, everywhere("debit", event={"mechanism": "none/2"}), L0, "event"),
    ("huge_steps", SMALL, at(lambda d: d.entry(P0, "debit")["event"], steps=10**400), L0, "steps"),
    ("true_steps", SMALL, at(lambda d: d.entry(P0, "debit")["event"], steps=True), L0, "steps"),
    ("sigma_nan", SMALL, at(lambda d: d.entry(P0, "debit")["event"], sigma="nan"), L0, "decimal"),
    ("sigma_infinite", SMALL, at(lambda d: d.entry(P0, "debit")["event"], sigma="1e999"), L0, "decimal"),
    ("sigma_too_small", SMALL, at(lambda d: d.entry(P0, "debit")["event"], sigma="0.29"), L0, "0.3"),
    ("q_above_1", SMALL, at(lambda d: d.entry(P0, "debit")["event"], q="1.1"), L0, "q"),
    ("deep_body", SMALL, change(P0, "charter", name=json.loads("[" * 40 + "]" * 40)), L0, "deep"),
    # rule 6: budget
    ("budget_twice", SMALL, again(P0, "budget"), L0, "second budget"),
    ("budget_raised", SMALL, at(budget, epsilon="2.0"), L0, "charter's epsilon"),
    ("budget_delta_raised", SMALL, at(budget, delta="0.01"), L0, "delta"),
    ("budget_shares_above_delta", SMALL, at(budget, gaussian_delta="0.00009"), L0, "sum to more"),
    ("budget_share_negative", SMALL, at(budget, gaussian_delta="-0.00005"), L0, "positive"),
    ("budget_order_1", SMALL, lambda d: budget(d)["orders"].append([1, "1e-9"]), L0, "orders"),
    ("budget_order_huge", SMALL, lambda d: budget(d)["orders"].append([10**9, "1e-9"]), L0, "orders"),
    ("budget_other_dataset", SMALL, change(P0, "budget", dataset="other"), L0, "another dataset"),
    ("budget_client_level", SMALL, change(P0, "budget", unit="client"), L0, "unit"),
    ("budget_replace_one", SMALL, change(P0, "budget", adjacency="replace-one"), L0, "adjacency"),
    ("budget_missing", SMALL, without(P0, "budget"), L0, "no budget"),
    # hold
    ("hold_twice", SMALL, again(P0, "hold", request_id="other"), L0, "held before"),
    ("hold_without_charter", SMALL, without(P0, "charter"), L0, "did not record before"),
    (
        "hold_other_event",
        SMALL,
        at(lambda d: d.entry(P0, "hold")["plan"][0]["event"], sigma="30.0"),
        L0,
        "not the charter's",
    ),
    ("hold_other_count", SMALL, at(lambda d: d.entry(P0, "hold")["plan"][0], count=2), L0, "counts"),
    (
        "hold_unprotected",
        SMALL,
        at(lambda d: d.entry(P0, "hold")["plan"][0], event={"mechanism": "none/1"}),
        L0,
        "charter",
    ),
    ("hold_other_dataset", SMALL, change(P0, "hold", dataset="other"), L0, "another dataset"),
    ("hold_too_dear", Shape(partners=2, rounds=1, sigma=1.0), lambda d: None, L0, "does not admit"),
    ("hold_after_unprotected", SMALL, unprotected_then_protected, L0, "unprotected round came before"),
    ("hold_expired", SMALL, lambda d: setattr(d, "start", d.signed.charter.expires), L0, "expired"),
    # debit
    ("debit_without_hold", SMALL, without(P0, "hold"), L0, "no hold"),
    ("debit_other_sigma", SMALL, at(lambda d: d.entry(P0, "debit")["event"], sigma="21.0"), L0, "not in its hold"),
    ("debit_other_steps", SMALL, at(lambda d: d.entry(P0, "debit")["event"], steps=1), L0, "not in its hold"),
    ("debit_other_q", SAMPLED, at(lambda d: d.entry(P0, "debit")["event"], q="0.05"), L0, "not in its hold"),
    ("debit_unprotected", SMALL, change(P0, "debit", event={"mechanism": "none/1"}), L0, "not in its hold"),
    ("debit_more_than_held", FULL, more_rounds_than_held, L0, "not in its hold"),
    ("debit_request_twice", FULL, again(P0, "debit"), L0, "same request twice"),
    ("debit_clip_norm", SMALL, change(P0, "debit", clip_norm="1.0"), L0, "clip_norm"),
    ("debit_no_clip_norm", SMALL, change(P0, "debit", clip_norm=None), L0, "clip_norm"),
    ("debit_evaluate_clip_norm", PRIVATE, change(P0, "debit", 2, clip_norm="0.5"), L0, "clip_norm"),
    ("debit_declared_records", SMALL, change(P0, "debit", declared_records=1000), L0, "declared_records"),
    ("debit_round_beyond", SMALL, change(P0, "debit", round=2), L0, "round 2"),
    ("debit_round_0", SMALL, change(P0, "debit", round=0), L0, "round"),
    ("debit_other_charter", SMALL, change(P0, "debit", charter_sha256=digest("x")), L0, "another charter"),
    ("debit_other_dataset", SMALL, change(P0, "debit", dataset="other"), L0, "dataset"),
    ("debit_after_release", FULL, late_debit, L0, "after its run was released"),
    ("debit_missing", SMALL, without(P0, "debit"), L0, "no debit"),
    (
        "debit_not_asked",
        SMALL,
        lambda d: [change(P0, k, request_id="own")(d) for k in ("debit", "commit")],
        L0,
        "not ask for",
    ),
    # commit, public, release
    ("commit_missing", SMALL, without(P0, "commit"), L0, "no commit for the ok answer"),
    ("commit_twice", SMALL, again(P0, "commit"), L0, "same request twice"),
    ("commit_other_request", SMALL, change(P0, "commit", request_sha256=digest("x")), L0, "no debit"),
    ("commit_other_reply", SMALL, change(P0, "commit", reply_sha256=digest("x")), L0, "another reply"),
    ("public_missing", SMALL, without(P0, "public"), L0, "no public for the ok answer"),
    (
        "public_not_agreed",
        PRIVATE,
        lambda d: d.insert(
            P0,
            d.index(P0, "release"),
            "public",
            {
                "request_id": "x",
                "request_sha256": digest("x"),
                "run_id": "run-1",
                "round": 1,
                "reply_sha256": digest("x"),
            },
        ),
        L0,
        "no public evaluation",
    ),
    ("public_other_reply", SMALL, change(P0, "public", reply_sha256=digest("x")), L0, "another reply"),
    ("release_twice", SMALL, again(P0, "release"), L0, "no open hold"),
    ("release_why", SMALL, change(P0, "release", why="bored"), L0, "why"),
    # rule 7: the coordinator
    ("run_other_charter", SMALL, change(C, "run", charter_sha256=digest("x")), COORD, "did not record before"),
    ("run_twice", SMALL, again(C, "run"), COORD, "exists"),
    ("ask_again_differently", SMALL, again(C, "ask", 1, requests={}), COORD, "requests"),
    (
        "ask_again_other_hash",
        SMALL,
        lambda d: [again(C, "ask", 1)(d), d.entry(C, "ask", 2)["requests"][P0].update(request_sha256=digest("x"))],
        COORD,
        "asked again",
    ),
    (
        "ask_stranger",
        SMALL,
        lambda d: d.entry(C, "ask", 1)["requests"].update(x=d.entry(C, "ask", 1)["requests"][P0]),
        COORD,
        "no partner",
    ),
    ("ask_round_beyond", SMALL, change(C, "ask", 1, round=2), COORD, "round 2"),
    ("ask_open_in_round_1", SMALL, change(C, "ask", 0, round=1), COORD, "opens the run"),
    (
        "ask_evaluation_not_agreed",
        Shape(partners=2, rounds=1, sigma=20.0, evaluation="none"),
        again(C, "ask", 1, purpose="evaluate"),
        COORD,
        "no evaluation",
    ),
    ("ask_dropped", SMALL, without(C, "ask", 1), COORD, "not asked"),
    (
        "answers_twice_differently",
        SMALL,
        lambda d: [again(C, "answers", 1)(d), d.entry(C, "answers", 2)["replies"][P0].update(reply_sha256=digest("x"))],
        COORD,
        "answered the same request twice",
    ),
    ("answer_other_request", SMALL, at(lambda d: reply(d, "train"), request_id="x"), COORD, "another request"),
    ("answer_other_reply", SMALL, at(lambda d: reply(d, "train"), reply_sha256=digest("x")), L0, "another reply"),
    ("answer_unknown_outcome", SMALL, at(lambda d: reply(d, "train"), outcome="maybe"), COORD, "outcome"),
    ("answer_ok_without_reply", SMALL, at(lambda d: reply(d, "train"), reply_sha256=None), COORD, "outcome"),
    (
        "answer_refused_that_was_not",
        SMALL,
        at(lambda d: reply(d, "evaluate"), outcome="refused: budget"),
        L0,
        "no refusal",
    ),
    ("round_quorum", SMALL, change(C, "round", partners=[]), COORD, "different partners"),
    ("round_same_partner_twice", SMALL, change(C, "round", partners=[P0, P0]), COORD, "different partners"),
    (
        "round_without_answer",
        SMALL,
        at(lambda d: reply(d, "train"), outcome="timeout", reply_sha256=None),
        COORD,
        "no ok answer",
    ),
    ("round_again_other_model", SMALL, again(C, "round", model_sha256=digest("x")), COORD, "not the next round"),
    ("round_again_other_metrics", SMALL, again(C, "round", metrics={"auc": "0.99"}), COORD, "not the next round"),
    ("round_out_of_order", FULL, swap_rounds, COORD, "not the next round"),
    (
        "close_other_model",
        SMALL,
        lambda d: [change(C, "close", model_sha256=digest("x"))(d)],
        COORD,
        "model of the last one",
    ),
    ("close_more_rounds", SMALL, change(C, "close", rounds=2), COORD, "number of rounds"),
    (
        "close_completed_early",
        FULL,
        lambda d: [
            without(C, "round", 1)(d),
            change(C, "close", rounds=1, model_sha256=d.entry(C, "round")["model_sha256"])(d),
        ],
        COORD,
        "completed after 1",
    ),
    ("close_missing", SMALL, without(C, "close"), "closing/run-1.json", "does not close"),
    # rule 8: refusals
    ("refusal_missing", FULL, without(P0, "refuse"), L0, "no refusal"),
    ("refusal_other_reason", FULL, change(P0, "refuse", reason="noise"), L0, "no refusal"),
    ("refusal_not_asked", FULL, again(P0, "refuse", request_id="x"), L0, "did not ask for"),
    (
        "hidden_run",
        FULL,
        lambda d: [d.drop(C, d.index(C, k, n)) for k, n in (("close", 1), ("answers", 5), ("ask", 5), ("run", 1))],
        "closing/run-2.json",
        "does not close",
    ),
    # populations
    ("clients_other_budget", CLIENTS, change(C, "budget", clients=999), COORD, "clients"),
    ("clients_hold_other_plan", CLIENTS, at(lambda d: d.entry(C, "cohort-hold")["plan"][0], count=9), COORD, "counts"),
    ("clients_no_hold", CLIENTS, without(C, "cohort-hold"), COORD, "not in the plan"),
    ("clients_held_twice", CLIENTS, again(C, "cohort-hold"), COORD, "held before"),
    (
        "clients_other_event",
        CLIENTS,
        at(lambda d: d.entry(C, "cohort-debit")["event"], steps=1),
        COORD,
        "not in the plan",
    ),
    ("clients_clip_norm", CLIENTS, change(C, "cohort-debit", clip_norm="9.0"), COORD, "clip_norm"),
    ("clients_declared", CLIENTS, change(C, "cohort-debit", declared_records=1), COORD, "declared_records"),
    ("clients_beyond", CLIENTS, change(C, "cohort-debit", clients=[[0, 1000]]), COORD, "ranges"),
    ("clients_overlap", CLIENTS, change(C, "cohort-debit", clients=[[0, 5], [5, 9]]), COORD, "overlap"),
    ("clients_commit_more", CLIENTS, change(C, "cohort-commit", clients=[[0, 999]]), COORD, "not all debited"),
    ("clients_commit_without_debit", CLIENTS, without(C, "cohort-debit"), COORD, "no debit"),
    ("clients_debit_again_differs", CLIENTS, again(C, "cohort-debit", clients=[[0, 0]]), COORD, "differs"),
    ("clients_round_beyond", CLIENTS, change(C, "cohort-debit", 2, round=4), COORD, "round 4"),
    ("clients_round_uncommitted", CLIENTS, without(C, "cohort-commit"), COORD, "committed clients"),
    (
        "clients_too_dear",
        Shape(clients=200, rounds=3, evaluation="none", sigma=1.0),
        lambda d: None,
        COORD,
        "does not admit",
    ),
]


@pytest.mark.parametrize(("name", "shape", "lie", "file", "what"), LIES, ids=[row[0] for row in LIES])
def test_signed_lie_is_found(tmp_path: Path, name: str, shape: Shape, lie: Lie, file: str, what: str) -> None:
    made = fresh(shape)
    lie(made)
    verdict = verdict_of(made.write(tmp_path / "b"))
    assert not verdict["verified"]
    found = [v for v in verdict["violations"] if v["file"] == file and what in v["what"]]
    assert found, verdict["violations"]
    assert all("malformed (" not in v["what"] for v in found)  # by its rule, not by the safety net


def test_uncommitted_debit_is_a_warning_and_stays_charged(tmp_path: Path) -> None:
    made = fresh(SMALL)
    full = verdict_of(made.write(tmp_path / "b"))["partners"][P0]["epsilon"]
    made.drop(P0, made.index(P0, "commit"))
    reply(made, "train").update(outcome="timeout", reply_sha256=None)
    made.entry(C, "round")["partners"].remove(P0)
    verdict = verdict_of(made.write(tmp_path / "b"))
    assert verdict["violations"] == []
    assert any("debit without a commit" in w["what"] and w["line"] for w in verdict["warnings"])
    assert (verdict["partners"][P0]["epsilon"], verdict["partners"][P0]["uncommitted_debits"]) == (full, 1)
    assert verdict["partners"][P0]["rounds"] == 0


def test_commit_that_no_answer_names(tmp_path: Path) -> None:
    made = fresh(SMALL)
    reply(made, "train").update(outcome="timeout", reply_sha256=None)
    made.entry(C, "round")["partners"].remove(P0)
    verdict = verdict_of(made.write(tmp_path / "b"))
    assert verdict["violations"] == []
    assert any("did not record" in w["what"] and w["file"] == L0 for w in verdict["warnings"])


def test_run_under_another_charter_is_charged_and_said(tmp_path: Path) -> None:
    made = fresh(SMALL)
    before = verdict_of(made.write(tmp_path / "b"))["partners"][P0]["epsilon"]
    other = digest("another charter")
    place = made.index(P0, "hold")
    hold = copy.deepcopy(made.entry(P0, "hold")) | {"run_id": "x", "request_id": "x-0", "charter_sha256": other}
    debit = copy.deepcopy(made.entry(P0, "debit")) | {"run_id": "x", "request_id": "x-1", "charter_sha256": other}
    charter = {"charter_sha256": other, "name": "other", "expires": "2030-01-01T00:00:00+00:00"}
    for kind, body in (("debit", debit), ("hold", hold), ("charter", charter)):
        made.insert(P0, place, kind, body)
    verdict = verdict_of(made.write(tmp_path / "b"))
    assert verdict["violations"] == []
    assert any("another charter" in w["what"] for w in verdict["warnings"])
    assert verdict["partners"][P0]["epsilon"] > before * 1.2
    assert verdict["partners"][P0]["rounds"] == 1


def test_charter_cap_names_the_first_debit_that_exceeds(tmp_path: Path) -> None:
    """One round fits in epsilon 1 at delta 1e-4 (0.677), two do not (1.001); the budget would pay for all three."""
    made = honest(Shape(partners=2, rounds=3, steps=1, sigma=4.5))
    under_another_charter(made, 50.0, 1e-3)
    verdict = verdict_of(made.write(tmp_path / "b"))
    fits = next(n for n in range(3) if odometer([PrivacyEvent(1.0, 4.5, n + 1)], 1e-4) > 1)  # debits that fit
    assert fits > 0
    found = [v for v in verdict["violations"] if "with this debit" in v["what"]]
    assert [v["line"] for v in found if v["file"] == L0] == [made.index(P0, "debit", fits) + 1]
    assert verdict["partners"][P1]["epsilon_cap"] == 1.0


@pytest.mark.parametrize(
    ("epsilon", "delta", "cap"), [(0.9, 1e-4, 0.9), (3.0, 1e-4, 1.0), (5.0, 1e-3, 1.0), (5.0, 1e-6, 1.0)]
)
@pytest.mark.parametrize("shape", [Shape(partners=2, rounds=2, q=0.05, steps=5), Shape(partners=2, rounds=2)])
def test_budget_of_another_charter_is_said_and_no_false_alarm(
    tmp_path: Path, shape: Shape, epsilon: float, delta: float, cap: float
) -> None:
    """Calibrated to the charter's cap, under a filter whose orders fit another one: the charter still pays."""
    if epsilon < 1:
        shape = Shape(partners=2, rounds=2, sigma=30.0)
    made = fresh(shape)
    under_another_charter(made, epsilon, delta)
    verdict = verdict_of(made.write(tmp_path / "b"))
    assert verdict["violations"] == []
    warned = [w["what"] for w in verdict["warnings"] if "budget of another charter" in w["what"]]
    assert len(warned) == 1
    assert all(word in warned[0] for word in (digest("another charter"), repr(epsilon), repr(delta)))
    partner = verdict["partners"][P0]
    assert (partner["epsilon_cap"], partner["delta"]) == (cap, 1e-4)


@pytest.mark.parametrize("purpose", ["train", "evaluate"])
def test_failed_answer_is_like_an_ok_one_that_is_not_folded(tmp_path: Path, purpose: str) -> None:
    for shape in (SMALL, PRIVATE):
        made = fresh(shape)
        fails(made, purpose)
        verdict = verdict_of(made.write(tmp_path / "b"))
        assert verdict["violations"] == []
        assert verdict["warnings"] == []
        assert verdict["partners"][P0]["epsilon"] > 0


def test_limits_say_what_is_not_checked(tmp_path: Path) -> None:
    made = fresh(FULL)
    folder = made.write(tmp_path / "b")
    limits = " ".join(verdict_of(folder)["limits"])
    for word in (
        "closing checkpoint in this bundle, run run-2:",
        "withhold",
        "coordinator's word",
        "report.html",
        "timings",
    ):
        assert word in limits
    (folder / "closing/run-2.json").unlink()
    assert "run run-1:" in " ".join(verdict_of(folder)["limits"])
    shutil.rmtree(folder / "closing")
    assert "No good closing checkpoint" in " ".join(verdict_of(folder)["limits"])


def test_nothing_hostile_reaches_the_terminal(tmp_path: Path) -> None:
    nasty = "\x1b[2J\x1b]0;x\x07\u202e\u2066\u200b\x9b31m\n"
    made = fresh(FULL)
    before_end(P0, nasty, {})(made)
    made.entry(P1, "refuse" if P1 == C else "genesis")["owner"] = nasty
    folder = made.write(tmp_path / "b")
    (folder / f"keys/{nasty}.pem").write_bytes(b"")
    (folder / f"closing/{nasty}.json").write_bytes(b"")
    (folder / f"partners/{nasty}").mkdir()
    (folder / "partners" / os.fsdecode(b"\xff\xfe")).mkdir()
    verdict = verdict_of(folder)
    assert {"unknown type", "no partner"} <= {
        w for w in ("unknown type", "no partner") if w in str(verdict["violations"])
    }
    for found in verdict["violations"] + verdict["warnings"]:
        assert (found["file"] + found["what"]).isprintable()
    report = Report()
    report.wrong("f" * 10_000, None, "w" * 10_000)
    assert len(report.violations[0]["file"]) < 400 > len(report.violations[0]["what"]) - 200
    assert str(Unreadable("charter.json", 1, nasty)).isprintable()


def _many(made: Draft, count: int) -> None:
    """As many runs under another charter, each with another event, held, debited and committed."""
    other, place = digest("another charter"), made.index(P0, "hold")
    hold, debit, commit = (made.entry(P0, kind) for kind in ("hold", "debit", "commit"))
    new: list[tuple[str, dict[str, Any]]] = [
        ("charter", {"charter_sha256": other, "name": "other", "expires": "2030-01-01T00:00:00+00:00"})
    ]
    for n in range(count):
        event = {"mechanism": "poisson-gaussian/1", "q": "1.0", "sigma": str(100_000 + n), "steps": 1}
        plan = [{"purpose": "train", "count": 1, "event": event}]
        of = {"run_id": f"x{n}", "charter_sha256": other, "plan_sha256": sha256(canonical(plan))}
        new.append(("hold", {**hold, **of, "request_id": f"h{n}", "plan": plan}))
        new.append(("debit", {**debit, **of, "request_id": f"d{n}", "event": event}))
        new.append(("commit", {**commit, "run_id": f"x{n}", "request_id": f"d{n}"}))
    made.books[P0][place:place] = new
    made.closings[0][2][P0] += len(new)


def test_two_thousand_holds_and_debits_are_cheap(tmp_path: Path) -> None:
    made = fresh(SMALL)
    _many(made, 1999)  # and the bundle's own event
    folder = made.write(tmp_path / "b")
    began = time.monotonic()
    verdict = verdict_of(folder)
    assert time.monotonic() - began < 10
    assert verdict["violations"] == []
    partner = verdict["partners"][P0]
    assert math.isclose(partner["trajectory"][-1]["epsilon_filter"], partner["epsilon_filter"], rel_tol=1e-9)
    assert len(partner["trajectory"]) == 2000


def test_different_events_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier, "MAX_EVENTS", 20)
    made = fresh(SMALL)
    _many(made, 19)
    assert verdict_of(made.write(tmp_path / "b"))["violations"] == []
    made = fresh(SMALL)
    _many(made, 20)
    found = verdict_of(made.write(tmp_path / "b"))["violations"]
    assert any("different events" in v["what"] and v["line"] == made.index(P0, "hold", 20) + 1 for v in found)


def test_what_was_held_or_given_back_is_counted_right() -> None:
    budget = verifier.Budget.parse(Budget.create(1.0, 1e-4).to_fields())
    total = verifier.Total(budget)
    rng, spent = random.Random(4), verifier.Counter()  # type: ignore[var-annotated]
    for _ in range(200):
        event, times = (rng.choice([0.1, 1.0]), rng.choice([5.0, 9.0]), rng.randint(1, 9)), rng.randint(1, 5)
        total.add(event, times)
        back = rng.randint(0, times)
        total.add(event, -back)
        verifier._charge(spent, event, times - back)
    assert math.isclose(total.epsilon(), verifier.filter_epsilon(budget, verifier._history(spent)), rel_tol=1e-9)


# -- files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An honest bundle with result.json; never changed, only copied."""
    folder = tmp_path_factory.mktemp("honest") / "b"
    made = fresh(SMALL)
    made.result = result_for(made, verdict_of(made.write(folder)))
    made.write(folder)
    assert verdict_of(folder)["verified"]
    return folder


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "b"))


def files_of(verdict: dict[str, Any]) -> set[str]:
    return {v["file"] for v in verdict["violations"]}


NEEDED = [
    "charter.json",
    "model.safetensors",
    COORD,
    L0,
    "closing/run-1.json",
    f"keys/{P0}.pem",
    "keys/coordinator.pem",
]


@pytest.mark.parametrize("file", NEEDED)
@pytest.mark.parametrize("how", ["gone", "empty", "folder", "fifo", "link", "binary", "unreadable bytes"])
def test_missing_or_odd_file(copied: Path, file: str, how: str) -> None:
    path = copied / file
    data = path.read_bytes()
    path.unlink()
    match how:
        case "empty":
            path.write_bytes(b"")
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "link":
            (copied / "elsewhere").write_bytes(data)
            path.symlink_to(copied / "elsewhere")
        case "binary":
            path.write_bytes(bytes(range(256)) * 20 + b"\n")
        case "unreadable bytes":
            path.write_bytes(b'{"payload":"\xff\xfe\\ud800"}\n')
    assert file in files_of(verdict_of(copied))


@pytest.mark.parametrize("folder", ["keys", "coordinator", "partners", "closing"])
def test_linked_or_missing_folder(copied: Path, folder: str) -> None:
    (copied / folder).rename(copied / "moved")
    assert not verdict_of(copied)["verified"]
    (copied / folder).symlink_to(copied / "moved")
    assert not verdict_of(copied)["verified"]


def test_no_folder_and_no_charter(tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match="no such folder"):
        verify_bundle(tmp_path / "none")
    with pytest.raises(Unreadable, match=r"charter\.json"):
        verify_bundle(tmp_path)


def test_extra_key_partner_and_checkpoint(copied: Path) -> None:
    (copied / "keys/extra.pem").write_bytes(b"")
    (copied / "partners/extra").mkdir()
    (copied / "closing/extra.json").write_bytes((copied / "closing/run-1.json").read_bytes())
    assert {"keys/extra.pem", "partners/extra", "closing/extra.json"} <= files_of(verdict_of(copied))


def test_key_in_another_form_of_pem(copied: Path) -> None:
    path = copied / f"keys/{P0}.pem"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert files_of(verdict_of(copied)) == {f"keys/{P0}.pem"}
    path.write_bytes((copied / f"keys/{P1}.pem").read_bytes())
    assert files_of(verdict_of(copied)) == {f"keys/{P0}.pem"}


def test_tail_after_the_newest_checkpoint_is_a_warning(tmp_path: Path) -> None:
    made = fresh(SMALL)
    made.books[P0].append(("recovered", {"torn_bytes": 1, "torn_sha256": digest("x")}))
    verdict = verdict_of(made.write(tmp_path / "b"))
    assert verdict["verified"]
    assert any(
        "after the newest checkpoint" in w["what"] and w["line"] == len(made.books[P0]) for w in verdict["warnings"]
    )


def test_no_checkpoint_means_not_closed(copied: Path) -> None:
    shutil.rmtree(copied / "closing")
    assert any("not closed (resume it)" in v["what"] for v in verdict_of(copied)["violations"])


def test_every_run_is_closed(tmp_path: Path) -> None:
    folder = fresh(FULL).write(tmp_path / "b")
    (folder / "closing/run-2.json").unlink()
    assert "closing/run-2.json" in files_of(verdict_of(folder))


@pytest.mark.parametrize("owner", [P0, P1, C])
def test_cutting_entries_off_the_end(tmp_path: Path, owner: str) -> None:
    made = fresh(FULL)
    folder = made.write(tmp_path / "b")
    path = folder / made.file(owner)
    lines = path.read_bytes().splitlines(keepends=True)
    for keep in range(len(lines)):
        path.write_bytes(b"".join(lines[:keep]))
        verdict = verdict_of(folder)
        assert not verdict["verified"]
        assert made.file(owner) in files_of(verdict)


def test_torn_last_line(copied: Path) -> None:
    path = copied / L0
    count = len(path.read_bytes().splitlines())
    path.write_bytes(path.read_bytes()[:-1])
    assert any(v["file"] == L0 and v["line"] == count and "torn" in v["what"] for v in verdict_of(copied)["violations"])


def test_lines_reordered_dropped_or_another_partners(copied: Path) -> None:
    path = copied / L0
    lines = path.read_bytes().splitlines(keepends=True)
    for changed, line in (
        ([*lines[:2], lines[3], lines[2], *lines[4:]], 3),
        ([*lines[:4], *lines[5:]], 5),
        ([*lines[:4], lines[3], *lines[4:]], 5),
        ((copied / f"partners/{P1}/ledger.jsonl").read_bytes().splitlines(keepends=True), 1),
    ):
        path.write_bytes(b"".join(changed))
        assert (L0, line) in {(v["file"], v["line"]) for v in verdict_of(copied)["violations"]}


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"seq": 3}, "sequence number"),
        ({"seq": True}, "seq"),
        ({"prev": digest("another line")}, "does not follow"),
        ({"v": 2}, "v is 2"),
        ({"v": True}, "v is True"),
        ({"time": "yesterday"}, "time"),
        ({"more": 1}, "exactly the fields"),
        ({"body": []}, "body"),
    ],
)
def test_signed_entry_that_does_not_fit_in_its_place(bundle: Path, fields: dict[str, Any], what: str) -> None:
    """Each alone: a chain that is right in everything but one field."""
    partner = Partner(Report(), verifier._load_charter(bundle, Report()), P0)
    first, second = (bundle / L0).read_bytes().splitlines(keepends=True)[:2]
    partner._entry(1, first)
    kind = "application/vnd.hansa.entry+json"
    payload = verifier._json(verifier._envelope(second[:-1], kind)[0])
    with pytest.raises(verifier.Bad, match=what):
        partner._entry(2, identity(P0).seal(kind, canonical(payload | fields)) + b"\n")
    for sealed in (
        identity(P0).seal(kind, json.dumps(payload, sort_keys=True).encode()),  # spaces
        identity(P1).seal(kind, canonical(payload)),
        identity(P0).seal("application/json", canonical(payload)),
        identity(P0).seal(kind, canonical(payload)) + b" ",
    ):
        with pytest.raises(verifier.Bad):
            partner._entry(2, sealed + b"\n")
    partner._entry(2, identity(P0).seal(kind, canonical(payload)) + b"\n")


def test_rewritten_history_differs_from_the_checkpoint(tmp_path: Path) -> None:
    """A partner who signs another history of the same length is caught by what everyone countersigned."""
    made = fresh(SMALL)
    folder = made.write(tmp_path / "b")
    made.entry(P0, "genesis")["software"] = "other"
    other = made.write(tmp_path / "c")
    shutil.copy(other / L0, folder / L0)
    length = len(made.books[P0])
    assert {(v["file"], v["line"]) for v in verdict_of(folder)["violations"]} == {(L0, length)}


def test_checkpoint_signers(tmp_path: Path) -> None:
    made = fresh(SMALL)
    folder = made.write(tmp_path / "b")
    path = folder / "closing/run-1.json"
    lines = {owner: made._lines(owner) for owner in made.books}
    heads = [{"owner": o, "length": len(ls), "head": sha256(ls[-1])} for o, ls in lines.items()]
    people = list(made.people.values())
    stranger = identity("stranger")
    for signers in ([], people[1:], people[:-1], [*people[:-1], stranger], [*people, stranger], [*people, people[0]]):
        path.write_bytes(made.closing("run-1", sha256(MODEL), heads, signers))
        assert "closing/run-1.json" in files_of(verdict_of(folder))
    for wrong in (
        heads[:-1],
        [*heads, heads[0]],
        [{**heads[0], "owner": "x"}, *heads[1:]],
        [{**heads[0], "length": 0}, *heads[1:]],
    ):
        path.write_bytes(made.closing("run-1", sha256(MODEL), wrong))
        assert "closing/run-1.json" in files_of(verdict_of(folder))
    path.write_bytes(made.closing("run-1", digest("x"), heads))
    assert "closing/run-1.json" in files_of(verdict_of(folder))
    path.write_bytes(made.closing("run-1", sha256(MODEL), heads))
    assert verdict_of(folder)["verified"]


def test_charter_signers(tmp_path: Path) -> None:
    made = fresh(SMALL)
    folder = made.write(tmp_path / "b")
    signatures = made.signed.signatures
    kind, payload = "application/vnd.hansa.charter+json", made.signed.payload
    stranger = identity("stranger")
    foreign = (stranger.key, stranger.sign(kind, payload))
    for made_by in (
        (),
        signatures[1:],
        signatures[::-1],
        (*signatures, foreign),
        (*signatures, signatures[0]),
        (foreign, *signatures[1:]),
        ((signatures[0][0], signatures[1][1]), *signatures[1:]),
    ):
        (folder / "charter.json").write_bytes(write_envelope(Envelope(kind, payload, made_by)) + b"\n")
        assert "charter.json" in files_of(verdict_of(folder))


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c.pop("privacy"),
        lambda c: c.update(format="hansa-charter/2"),
        lambda c: c["privacy"].update(epsilon="nan"),
        lambda c: c["privacy"].update(epsilon=None),
        lambda c: c["privacy"].update(kind="some"),
        lambda c: c["privacy"].update(noise_multiplier="0.1"),
        lambda c: c["algorithm"].update(rounds=10**400),
        lambda c: c["algorithm"].update(rounds=True),
        lambda c: c["algorithm"]["local"].update(steps="2"),
        lambda c: c["partners"][0].update(name="../../etc"),
        lambda c: c["partners"][0].update(name=c["partners"][1]["name"]),
        lambda c: c["partners"][0].update(key=c["partners"][1]["key"]),
        lambda c: c["partners"][0].update(key="zz"),
        lambda c: c.update(partners={}),
        lambda c: c.update(partners=[[]]),
        lambda c: c.update(partners=None),
        lambda c: c.update(coordinator=7),
        lambda c: c.update(expires="tomorrow"),
        lambda c: c.update(population=[]),
        lambda c: c.update(population={"clients": 10**12, "declared_records": 1}),
        lambda c: c.update(evaluation=None),
    ],
)
def test_malformed_charter(tmp_path: Path, damage: Callable[[dict[str, Any]], Any]) -> None:
    made = fresh(SMALL)
    folder = made.write(tmp_path / "b")
    charter = json.loads(made.signed.payload)
    damage(charter)
    payload, kind = canonical(charter), "application/vnd.hansa.charter+json"
    signatures = tuple((p.key, p.sign(kind, payload)) for p in made.people.values())
    (folder / "charter.json").write_bytes(write_envelope(Envelope(kind, payload, signatures)) + b"\n")
    assert "charter.json" in files_of(verdict_of(folder))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epsilon", 0.5),
        ("epsilon", None),
        ("epsilon", "0.1"),
        ("epsilon", True),
        ("epsilon", 10**400),
        ("epsilon_filter", 0.5),
        ("epsilon_cap", 2.0),
        ("delta", 1e-5),
        ("rounds", 2),
        ("rounds", None),
    ],
)
def test_result_says_something_else(copied: Path, field: str, value: object) -> None:
    path = copied / "result.json"
    result = json.loads(path.read_bytes())
    result["partners"][P0][field] = value
    path.write_text(json.dumps(result))
    assert files_of(verdict_of(copied)) == {"result.json"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda r: r.update(charter_sha256=digest("x")),
        lambda r: r.pop("charter_sha256"),
        lambda r: r.update(partners=[]),
        lambda r: r["partners"].pop(P0),
        lambda r: r["partners"].update(extra={}),
        lambda r: r["partners"][P0].pop("epsilon"),
        lambda r: r["partners"].update({P0: 7}),
        lambda r: r.update(final={"auc": 0.99}),
        lambda r: r.update(final={}),
        lambda r: r.pop("final"),
        lambda r: r.update(run_id="run-2"),
        lambda r: r.pop("run_id"),
        lambda r: r.update(run_id=[]),
        lambda r: r.update(rounds=[]),
        lambda r: r.pop("rounds"),
        lambda r: r["rounds"].append(r["rounds"][0]),
        lambda r: r["rounds"][0].update(round=2),
        lambda r: r["rounds"][0].update(round=True),
        lambda r: r["rounds"][0].update(metrics={"auc": 0.99}),
        lambda r: r["rounds"][0].update(metrics={}),
        lambda r: r["rounds"].__setitem__(0, 7),
        lambda r: r.pop("refusals"),
        lambda r: r.update(refusals=[7]),
        lambda r: r["refusals"].append({"partner": P0, "run_id": "run-1", "round": None, "reason": "budget"}),
        lambda r: r["refusals"].append({"partner": P0, "run_id": "run-1", "round": [], "reason": "budget"}),
        lambda r: r["partners"][P0].update(declared_records=1000),
        lambda r: r["partners"][P0].pop("declared_records"),
        lambda r: r["partners"][P0].pop("epsilon_cap"),
        lambda r: r.pop("privacy"),
        lambda r: r["privacy"].update(kind="none"),
        lambda r: r["privacy"].update(epsilon=0.5),
        lambda r: r["privacy"].update(delta=1e-6),
        lambda r: r["privacy"].update(noise_multiplier=99.0),
        lambda r: r["privacy"].update(clip_norm=None),
        lambda r: r["privacy"].pop("clip_norm"),
    ],
)
def test_result_damaged(copied: Path, damage: Callable[[dict[str, Any]], Any]) -> None:
    path = copied / "result.json"
    result = json.loads(path.read_bytes())
    damage(result)
    path.write_text(json.dumps(result))
    assert files_of(verdict_of(copied)) == {"result.json"}


def test_result_of_refusals(tmp_path: Path) -> None:
    """FULL has a second run that one partner refuses: run-1 is the result's, the refusal is listed once."""
    made = fresh(FULL)
    made.result = result_for(made, verdict_of(made.write(tmp_path / "b")))
    assert len(made.result["refusals"]) == 1
    assert verdict_of(made.write(tmp_path / "b"))["verified"]
    for lie in (
        lambda r: r.update(run_id="run-2"),
        lambda r: r["refusals"].clear(),
        lambda r: r["refusals"].append(r["refusals"][0]),
        lambda r: r["refusals"][0].update(reason="noise"),
        lambda r: r["refusals"][0].update(partner=P1),
        lambda r: r["rounds"].reverse(),
    ):
        other = copy.deepcopy(made)
        lie(other.result)
        assert files_of(verdict_of(other.write(tmp_path / "b"))) == {"result.json"}


@pytest.mark.parametrize("text", [b"", b"[]", b"[" * 100_000, b'{"a":NaN}', b'{"a":1,"a":1}', b"\xff", b"9" * 10_000])
def test_result_is_not_json(copied: Path, text: bytes) -> None:
    (copied / "result.json").write_bytes(text)
    assert files_of(verdict_of(copied)) == {"result.json"}


# -- any byte ------------------------------------------------------------------------------------------------


def another(rng: random.Random, byte: int) -> int:
    return rng.choice([b for b in range(256) if b != byte])


@pytest.mark.parametrize("owner", [P0, P1, C])
def test_every_byte_of_every_ledger_line(bundle: Path, owner: str) -> None:
    rng = random.Random(owner)
    terms = verifier._load_charter(bundle, Report())
    make = lambda: Coordinator(Report(), terms) if owner == C else Partner(Report(), terms, owner)  # noqa: E731
    lines = (bundle / make().file).read_bytes().splitlines(keepends=True)
    good = make()
    hashes: list[str] = []
    for number, line in enumerate(lines, start=1):
        for place in range(len(line)):
            changed = line[:place] + bytes([another(rng, line[place])]) + line[place + 1 :]
            good.hashes = list(hashes)
            with pytest.raises(verifier.Bad):
                good._entry(number, changed)
        good.hashes = list(hashes)
        good._entry(number, line)  # unchanged it is fine
        hashes = good.hashes


def test_every_byte_of_the_charter(copied: Path) -> None:
    rng, path = random.Random(1), copied / "charter.json"
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([another(rng, data[place])]) + data[place + 1 :])
        report = Report()
        try:
            verifier._load_charter(copied, report)
        except Unreadable as err:
            report.wrong(err.file, err.line, err.what)
        assert {v["file"] for v in report.violations} == {"charter.json"}


def test_every_byte_of_the_checkpoint_and_the_keys(copied: Path) -> None:
    rng, terms = random.Random(2), verifier._load_charter(copied, Report())
    book = Coordinator(Report(), terms)
    book.read(copied)
    books: dict[str, verifier.Book] = {C: book}
    for name in terms.declared:
        books[name] = Partner(Report(), terms, name)
        books[name].read(copied)
    files = ["closing/run-1.json", *(f"keys/{name}.pem" for name in terms.keys)]
    for file in files:
        data = (copied / file).read_bytes()
        for place in range(len(data)):
            (copied / file).write_bytes(data[:place] + bytes([another(rng, data[place])]) + data[place + 1 :])
            report = Report()
            if file.startswith("keys"):
                verifier._check_keys(copied, report, terms)
            else:
                verifier._check_closings(copied, report, terms, books, book.runs)
            assert file in {v["file"] for v in report.violations}
        (copied / file).write_bytes(data)


def test_random_bytes_of_the_whole_bundle(copied: Path) -> None:
    rng = random.Random(3)
    files = [*NEEDED, f"partners/{P1}/ledger.jsonl"]
    for _ in range(150):
        file = rng.choice(files)
        data = (copied / file).read_bytes()
        place = rng.randrange(len(data))
        (copied / file).write_bytes(data[:place] + bytes([another(rng, data[place])]) + data[place + 1 :])
        verdict = verdict_of(copied)
        assert file in files_of(verdict)
        if file.endswith("ledger.jsonl"):
            line = data[:place].count(b"\n") + 1
            lines = {v["line"] for v in verdict["violations"] if v["file"] == file}
            assert line in lines
        (copied / file).write_bytes(data)
    for file in files:  # the newline that ends a line is a byte too
        data = (copied / file).read_bytes()
        for match in list(re.finditer(rb"\n", data))[:3]:
            (copied / file).write_bytes(data[: match.start()] + b" " + data[match.end() :])
            assert file in files_of(verdict_of(copied))
        (copied / file).write_bytes(data)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_mutated_bundles_are_never_verified_and_never_crash(copied: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from([*NEEDED, "result.json"]))
    path = copied / file
    before = path.read_bytes()
    try:
        start = data.draw(st.integers(0, len(before)))
        stop = data.draw(st.integers(start, min(len(before), start + 50)))
        new = data.draw(
            st.binary(max_size=60) | st.sampled_from([b"\n", b"\0", b"[" * 5000, b'"', b"{}", before[:200]])
        )
        changed = before[:start] + new + before[stop:]
        path.write_bytes(changed)
        verdict = verdict_of(copied)
        if changed != before and file != "result.json":
            assert file in files_of(verdict)
    finally:
        path.write_bytes(before)


HOSTILE: list[object] = [
    None,
    True,
    0,
    -1,
    10**400,
    "",
    "x" * 20_000,
    "\x00",
    "1e5",
    "nan",
    "-0",
    [],
    [[]],
    [None],
    {},
    {"a": {}},
    {"mechanism": "none/1"},
    {"epsilon": "1"},
    [[2, "1e-9"]],
    "\U0010ffff",
    [[0, 10**400]],
    [["a", "b"]],
    ["a"],
]


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_signed_nonsense_never_crashes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """An insider signs any value anywhere: the answer is a verdict."""
    made = fresh(data.draw(st.sampled_from([FULL, PRIVATE, CLIENTS, SAMPLED])))
    for _ in range(data.draw(st.integers(1, 3))):
        owner = data.draw(st.sampled_from(sorted(made.books)))
        _, body = data.draw(st.sampled_from(made.books[owner]))
        spot: Any = body
        while True:  # somewhere inside
            keys = list(spot) if isinstance(spot, dict) else list(range(len(spot)))
            if not keys:
                break
            key = data.draw(st.sampled_from(keys))
            if isinstance(spot[key], dict | list) and spot[key] and data.draw(st.booleans()):
                spot = spot[key]
                continue
            spot[key] = copy.deepcopy(data.draw(st.sampled_from(HOSTILE)))
            break
    folder = tmp_path_factory.getbasetemp() / "nonsense"
    verdict_of(made.write(folder))


@pytest.mark.parametrize(
    "payload",
    [
        b'{"v":1' + b',"a":' + b"[" * 200_000 + b"}",
        b'{"v":1,"seq":0,"prev":"","time":"","type":"","body":' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}",
        b'{"seq":' + b"9" * 100_000 + b"}",
        b'{"v":1,"v":1}',
        b'{"v":NaN}',
        b'{"v":1.0}',
        b'{"v":"\\ud800"}',
        b'"' + b'\\"' * 1_000_000,
        b'["' * 500_000,
        b"\xff\xfe\x00",
        b"",
    ],
    ids=lambda p: ascii(p[:20]),
)
def test_hostile_payloads_are_cheap(copied: Path, payload: bytes) -> None:
    line = identity(P0).seal("application/vnd.hansa.entry+json", payload)
    for data in (line, payload):
        (copied / L0).write_bytes(data + b"\n")
        began = time.monotonic()
        verdict = verdict_of(copied)
        assert time.monotonic() - began < 3
        assert (L0, 1) in {(v["file"], v["line"]) for v in verdict["violations"]}


def test_very_long_line(copied: Path) -> None:
    with open(copied / L0, "wb") as file:
        file.truncate(300 * 2**20)  # sparse: zeros without a newline
    began = time.monotonic()
    verdict = verdict_of(copied)
    assert time.monotonic() - began < 5
    assert any(v["file"] == L0 and v["line"] == 1 and "longer" in v["what"] for v in verdict["violations"])


# -- accounting ----------------------------------------------------------------------------------------------


def histories(count: int, seed: int) -> list[list[tuple[float, float, int]]]:
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        found.append(
            [
                (rng.choice([1.0, 10 ** rng.uniform(-4, 0)]), 10 ** rng.uniform(-0.4, 2), int(10 ** rng.uniform(0, 4)))
                for _ in range(rng.randint(1, 3))
            ]
        )
    return found


def merged(history: list[tuple[float, float, int]]) -> verifier.History:
    spent: Any = verifier.Counter()
    for event in history:
        verifier._charge(spent, event)
    return verifier._history(spent)


def test_filter_agrees_with_accounting() -> None:
    budgets = (Budget.create(1.0, 1e-4), Budget.create(8.0, 1e-6))
    for history in histories(100, 5):
        for budget in budgets:
            mine = verifier.filter_epsilon(verifier.Budget.parse(budget.to_fields()), merged(history))
            theirs = budget.spent(PrivacyEvent(*event) for event in history)
            assert math.isclose(mine, theirs, rel_tol=1e-6, abs_tol=1e-9), history
            assert mine <= theirs * (1 + 1e-12) + 1e-12  # what the gate admits, the audit admits


def test_filter_by_hand() -> None:
    """One Gaussian step, mu = 1: delta(1; 1) = Phi(-1/2) - e Phi(-3/2) = 0.126936737507."""
    assert math.isclose(verifier._gaussian_epsilon(1.0, 0.126936737507), 1.0, rel_tol=1e-9)
    # order 2: ln(1 + q^2 (e^(1/sigma^2) - 1))
    assert math.isclose(verifier._renyi(0.3, 1.5, 2), math.log1p(0.09 * math.expm1(1 / 2.25)), rel_tol=1e-12)
    assert math.isclose(verifier._renyi(1e-9, 1.0, 2), 1e-18 * math.expm1(1), rel_tol=1e-9)  # nothing cancels
    assert verifier._renyi(1.0, 2.0, 8) == 1.0


def test_odometer_agrees_with_accounting() -> None:
    for history in histories(12, 6):
        mine, theirs = Odometer().epsilon(merged(history), 1e-5), odometer((PrivacyEvent(*e) for e in history), 1e-5)
        if mine is not None:
            assert math.isclose(mine, theirs, rel_tol=1e-6, abs_tol=1e-6), history


def test_odometer_always_ends() -> None:
    nasty = [
        [(0.9, 0.3, 10**9)],
        [(1e-9, 0.3, 10**9)],
        [(1e-9, 1e9, 10**9), (1.0, 0.3, 1)],
        [(0.001 * i, 0.3 + i / 10, 1000) for i in range(1, 100)],
        [(0.5, 0.3 + i / 100, 50_000) for i in range(16)],
        [(1e-300, 0.3, 5)],
        [(1 - 1e-16, 0.3, 10**6)],
    ]
    for history in nasty:
        began = time.monotonic()
        found = Odometer().epsilon(merged(history), 1e-5)
        assert time.monotonic() - began < 12, history
        assert found is None or found >= 0


# -- alone ---------------------------------------------------------------------------------------------------


def test_runs_alone_in_an_empty_folder(bundle: Path, tmp_path: Path) -> None:
    shutil.copy(SOURCE, tmp_path / "verifier.py")

    # An environment with the same packages but ours: editable installs hang on .pth files, which -S leaves unread.
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in Path(numpy.__file__).parents[1].iterdir():
        if not entry.name.startswith(("hansa", "_")) or entry.name == "_cffi_backend":
            (packages / entry.name).symlink_to(entry)
    for entry in Path(numpy.__file__).parents[1].glob("_cffi_backend*"):
        (packages / entry.name).symlink_to(entry)

    def python(code: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.append({str(packages)!r}); {code}"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return python(
            f"import runpy; sys.argv = {['verifier.py', *arguments]!r}; runpy.run_path('verifier.py', run_name='__main__')"
        )

    assert "No module named 'hansa'" in python("import hansa.common").stderr  # really alone
    done = run(str(bundle))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verified"] is True
    shutil.copytree(bundle, tmp_path / "bad")
    (tmp_path / "bad/model.safetensors").write_bytes(b"other")
    assert run("bad").returncode == 1
    assert run("nowhere").returncode == 2
    assert run().returncode == 2


def test_imports_nothing_of_ours() -> None:
    found = re.findall(r"^\s*(?:from|import) ([\w.]+)(?: import|$)", SOURCE.read_text(), flags=re.M)
    outside = {name.split(".")[0] for name in found} - sys.stdlib_module_names - {"__future__"}
    assert outside == {"cryptography", "dp_accounting"}


def test_other_reader_reads_the_same(bundle: Path) -> None:
    """What bundles.py writes is what common/ledger.py writes."""
    for file in (COORD, L0):
        entries, torn = read_ledger(bundle / file)
        assert entries
        assert torn == b""


def test_golden_vectors(tmp_path: Path) -> None:
    """Yesterday's bundle stays verified, byte for byte, and the generator still makes it."""
    folder = VECTORS / "bundle"
    assert verdict_of(folder)["violations"] == []
    verdict = json.loads((VECTORS / "verdict.json").read_bytes())
    found = {**verify_bundle(folder), "bundle": "bundle"}
    for name, partner in found["partners"].items():
        for key in ("epsilon", "epsilon_filter"):
            assert math.isclose(partner[key], verdict["partners"][name][key], rel_tol=1e-9)
    for one in (found, verdict):
        one.pop("partners")
    assert found == verdict
    subprocess.run([sys.executable, str(VECTORS / "make_vectors.py"), str(tmp_path)], check=True, timeout=60)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        assert (tmp_path / "bundle" / path.relative_to(folder)).read_bytes() == path.read_bytes(), path
