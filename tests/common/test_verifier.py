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
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hansa.common import verifier
from hansa.common.accounting import Budget, PrivacyEvent, odometer
from hansa.common.audit_report import state
from hansa.common.identity import Envelope, canonical, sha256, write_envelope
from hansa.common.ledger import ENTRY_TYPE, read_ledger
from hansa.common.merkle import Tree, leaf_hash
from hansa.common.verifier import Chain, Coordinator, Odometer, Partner, Report, Unreadable, verify_bundle

sys.path.insert(0, str(Path(__file__).parent))  # `common.bundles` would be looked for in the package of that name
from bundles import (
    MODEL,
    NONE,
    OTHER,
    Draft,
    Shape,
    any_shape,
    dataset,
    digest,
    honest,
    identity,
    result_for,
    short,
    with_many_debits,
)

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "common" / "verifier.py"
VECTORS = ROOT / "tests" / "vectors"
P0, P1, C = "hospital-0", "hospital-1", "coordinator"
SMALL = Shape(partners=2, rounds=1, sigma=20.0)
FULL = Shape(partners=2, rounds=2, refused_run=True, steps=2)
PRIVATE = Shape(partners=2, rounds=2, evaluation="private", sigma=20.0)
PLAIN = Shape(partners=2, rounds=1, kind="none", evaluation="none")
DEAR = Shape(partners=2, rounds=1, sigma=0.35, careless=True)
TOO_DEAR = Shape(partners=2, rounds=1, sigma=1.0, careless=True)
TWO_RUNS = Shape(partners=2, rounds=1, sigma=30.0, runs=2)
SAMPLED = Shape(partners=2, rounds=2, q=0.1, steps=3, sigma=3.0)
CLIENTS = Shape(clients=1000, rounds=3, participation=0.1, evaluation="none", q=0.2, sigma=3.0)

_drafts: dict[str, Draft] = {}


def fresh(shape: Shape) -> Draft:
    """A draft that the test may change."""
    key = repr(shape)
    if key not in _drafts:
        _drafts[key] = honest(shape)
    return copy.deepcopy(_drafts[key])


def verdict_of(folder: Path) -> dict[str, Any]:
    """The verdict; something unreadable counts as a violation of that file."""
    try:
        verdict = verify_bundle(folder)
    except Unreadable as err:
        return {
            "verified": False,
            "violations": [{"code": "unreadable", "file": err.file, "line": err.line, "what": err.what}],
            "warnings": [],
        }
    json.dumps(verdict, allow_nan=False)
    assert verdict["verified"] == (not verdict["violations"])
    for found in verdict["violations"] + verdict["warnings"]:
        assert found["means"] == verifier.MEANS[found["code"]]
    return verdict


# -- honest bundles ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SMALL, FULL, PRIVATE, PLAIN, SAMPLED, CLIENTS], ids=lambda s: repr(s)[:60])
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


def test_no_false_alarm(tmp_path: Path) -> None:
    """Crashes, refusals, dropouts, other charters, several lineages, unfinished runs; half of them by our own writers."""
    codes, undisclosed, lineages = set[str](), 0, 0
    for seed in range(25):
        made = honest(any_shape(seed))
        verdict = verdict_of(made.write_for_real(tmp_path / "b") if seed % 2 else made.write(tmp_path / "b"))
        assert verdict["violations"] == [], (any_shape(seed), verdict["violations"])
        codes |= {w["code"] for w in verdict["warnings"]}
        undisclosed += sum(p["undisclosed"] for p in verdict["partners"].values())
        lineages = max(lineages, *(len(p["lineages"]) for p in verdict["partners"].values()))
    assert {
        "recovered",
        "restored",
        "uncommitted",
        "unanswered",
        "other_charter",
        "tail",
        "open_run",
        "unreleased",
    } <= codes
    assert undisclosed > 100
    assert lineages > 1


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
    verdict = verdict_of(fresh(PLAIN).write(tmp_path / "b"))
    assert "no differential privacy guarantee" in verdict["claim"]
    assert all(p["epsilon"] is None and p["epsilon_filter"] is None for p in verdict["partners"].values())


def test_summary_of_a_partner(tmp_path: Path) -> None:
    partner = verdict_of(fresh(FULL).write(tmp_path / "b"))["partners"][P0]
    assert (partner["debits"], partner["uncommitted_debits"], partner["rounds"], partner["refusals"]) == (2, 0, 2, 1)
    assert [(point["run"], point["round"]) for point in partner["trajectory"]] == [("run-1", 1), ("run-1", 2)]
    assert math.isclose(partner["trajectory"][-1]["epsilon_filter"], partner["epsilon_filter"], rel_tol=1e-12)
    assert partner["epsilon_filter"] <= partner["epsilon_cap"] == 1.0
    assert 0 < partner["epsilon"] <= partner["epsilon_filter"]
    assert partner["refusals_by_reason"] == {"budget": 1}
    assert partner["charter_epsilon"] == {"cap": 1.0, **{k: partner[k] for k in ("epsilon", "epsilon_filter")}}
    sigma = fresh(FULL).signed.charter.privacy.noise_multiplier
    event = {"mechanism": "poisson-gaussian/1", "q": 1.0, "sigma": sigma, "steps": 2}
    assert partner["events"] == [event | {"count": 2, "charter": "this"}]
    assert (partner["unbounded"], partner["undisclosed"], partner["entries"]) == (False, 0, len(fresh(FULL).books[P0]))
    first = dataset(P0, FULL)
    (lineage,) = partner["lineages"].items()
    assert lineage[0] == first["lineage"]
    assert lineage[1]["datasets"] == [{"dataset": first["dataset"], "declared": first["declared"]}]
    assert all(lineage[1][k] == partner[k] for k in ("epsilon", "epsilon_filter", "epsilon_cap", "delta", "unbounded"))
    assert partner["budget"] == fresh(FULL).entry(P0, "budget")["budget"]


def test_trajectory(tmp_path: Path) -> None:
    """After every debit, with the time it was made; both epsilons grow and end at the partner's."""
    made = fresh(SAMPLED)
    partner = verdict_of(made.write(tmp_path / "b"))["partners"][P0]
    places = [made.index(P0, "debit", n) for n in range(2)]
    assert [point["entry"] for point in partner["trajectory"]] == [place + 1 for place in places]
    times = [(made.start + timedelta(seconds=place)).strftime("%Y-%m-%dT%H:%M:%SZ") for place in places]
    assert [point["time"] for point in partner["trajectory"]] == times
    for key in ("epsilon", "epsilon_filter"):
        one, two = (point[key] for point in partner["trajectory"])
        assert 0 < one < two == partner[key]
    assert all(point["epsilon"] <= point["epsilon_filter"] for point in partner["trajectory"])


def test_population_of_100_000_is_cheap(tmp_path: Path) -> None:
    made = honest(Shape(clients=100_000, rounds=10, participation=0.1, evaluation="none", sigma=20.0))
    began = time.process_time()
    verdict = verdict_of(made.write(tmp_path / "b"))
    assert verdict["violations"] == []
    assert len(verdict["partners"]) < 40
    assert sum(p["clients"] for p in verdict["partners"].values()) == 100_000
    assert time.process_time() - began < 15
    debits = sum(p["debits"] * p["clients"] for p in verdict["partners"].values())
    assert debits == 10 * 10_000
    assert (
        sum(p["uncommitted_debits"] * p["clients"] for p in verdict["partners"].values()) == 10
    )  # one a round was not folded
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
        d.add(owner, kind, None, place + 1, **(copy.deepcopy(d.books[owner][place].data) | fields))

    return lie


def without(owner: str, kind: str, nth: int = 0) -> Lie:
    return lambda d: d.drop(owner, d.index(owner, kind, nth))


def at_end(owner: str, kind: str, charter: str | None = None, /, **data: Any) -> Lie:
    return lambda d: d.add(owner, kind, charter, **data) and d.close_later(owner)


def header(owner: str, kind: str, privacy: Any, nth: int = 0) -> Lie:
    """Another privacy event in its header than its body implies; a function changes what is implied."""

    def lie(d: Draft) -> None:
        at = d.index(owner, kind, nth)
        implied = copy.deepcopy(d.charges(owner)[at])
        d.books[owner][at].privacy = privacy(implied) if callable(privacy) else privacy

    return lie


def hide(owner: str, kind: str, nth: int = 0) -> Lie:
    return lambda d: setattr(d.item(owner, kind, nth), "shown", False)


def everywhere(kind: str, /, **fields: Any) -> Lie:
    return lambda d: [i.data.update(fields) for book in d.books.values() for i in book if i.kind == kind]


def reply(d: Draft, purpose: str, name: str = P0) -> dict[str, Any]:
    answers = next(i.data for i in d.books[C] if i.kind == "answers" and i.data["purpose"] == purpose)
    found: dict[str, Any] = answers["replies"][name]
    return found


def budget(d: Draft) -> dict[str, Any]:
    found: dict[str, Any] = d.entry(P0, "budget")["budget"]
    return found


def late_debit(d: Draft) -> None:
    """Its header, too, is as if it were within the hold."""
    place, release = d.index(P0, "debit", 1), d.index(P0, "release")
    debit = d.books[P0].pop(place)
    d.books[P0].insert(release, debit)


def swap_rounds(d: Draft) -> None:
    i, j = d.index(C, "round", 0), d.index(C, "round", 1)
    d.books[C][i], d.books[C][j] = d.books[C][j], d.books[C][i]


def more_rounds_than_held(d: Draft) -> None:
    d.add(P0, "debit", None, d.index(P0, "release"), **d.entry(P0, "debit") | {"request_id": "another"})


def other_run(d: Draft, at: int, run: str, event: dict[str, Any], count: int = 1, *, charter: bool = True) -> None:
    """A run under another charter: hold, debit, commit, release, as an auditor of this one sees them."""
    first = {i.data["dataset"]: i for i in d.books[P0] if i.kind == "dataset"}
    (name,) = list(first)[:1]
    request = {"request_id": f"{run}-0", "request_sha256": digest(run), "run_id": run}
    plan = [{"purpose": "train", "count": count, "event": event}]
    of = {"dataset": name, "plan_sha256": sha256(canonical(plan))}
    debit = {"round": 1, "purpose": "train", "event": event, "clip_norm": None, "declared_records": 200}
    entries = [
        ("hold", request | of | {"plan": plan, "software": "x"}),
        ("debit", request | of | debit | {"request_id": f"{run}-1"}),
        ("commit", request | {"request_id": f"{run}-1", "round": 1, "reply_sha256": digest("x")}),
        ("release", {"run_id": run, "why": "closed"}),
    ]
    if charter:
        entries.insert(0, ("charter", {"name": "other", "expires": "2030-01-01T00:00:00+00:00"}))
    for kind, data in reversed(entries):
        d.add(P0, kind, OTHER, at, **data)


def gaussian(sigma: float, q: float = 1.0, steps: int = 2) -> dict[str, Any]:
    return {"mechanism": "poisson-gaussian/1", "q": str(q), "sigma": str(sigma), "steps": steps}


def unprotected_then_protected(d: Draft) -> None:
    other_run(d, d.index(P0, "hold"), "x", NONE)


def under_another_charter(d: Draft, epsilon: float, delta: float, owner: str = P0) -> None:
    """The budget of a lineage came with a charter that is not this bundle's."""
    item = d.item(owner, "budget")
    item.data["budget"] = Budget.create(epsilon, delta).to_fields()
    item.charter = OTHER
    d.add(owner, "charter", OTHER, d.books[owner].index(item), name="other", expires="2030-01-01T00:00:00+00:00")


def fails(d: Draft, purpose: str, reply_sha256: str | None = None) -> None:
    """P0 answers that its work failed; it is not folded."""
    reply(d, purpose).update({"outcome": "failed"} | ({"reply_sha256": reply_sha256} if reply_sha256 else {}))
    if purpose == "train":
        d.entry(C, "round")["partners"].remove(P0)


def genesis_held_out(d: Draft) -> dict[str, Any]:
    found: dict[str, Any] = d.entry(P0, "dataset")["held_out"]
    return found


def declare(kind: str, of: Any = None, cutoff: Any = None, lineage: Any = None, number: int = 1) -> Lie:
    """One more data set, before the hold."""

    def lie(d: Draft) -> None:
        data = dataset(P0, SMALL, number) | {"declared": {"kind": kind, "of": of, "cutoff": cutoff}}
        data["lineage"] = lineage or data["lineage"]
        d.add(P0, "dataset", None, d.index(P0, "hold"), **data)
        d.books[P0][d.index(P0, "dataset", 1)].shown = True

    return lie


def first_dataset(part: str) -> str:
    return str(dataset(P0, SMALL)[part])


def hidden_debit(d: Draft, sigma: float | None = None) -> None:
    """A debit whose body stays with its owner, of what a shown hold reserved (or of something else)."""
    event = d.entry(P0, "debit")["event"] if sigma is None else gaussian(sigma)
    of = {"dataset": first_dataset("dataset"), "event": event, "purpose": "train", "run_id": "x"}
    d.add(P0, "debit", OTHER, d.index(P0, "debit"), **of)
    d.add(P0, "charter", OTHER, 2, name="other", expires="x")


def hidden_release(d: Draft) -> None:
    lineage, event = first_dataset("lineage"), d.entry(P0, "debit")["event"]
    item = d.add(P0, "release", OTHER, d.index(P0, "debit"), run_id="x", why="closed")
    item.privacy = {"lineage": lineage, "release": [[event, 1]]}


def other_charter_dear(d: Draft) -> None:
    """Another charter's run that its owner should have refused: only headers show it."""
    other_run(d, d.index(P0, "hold") + 1, "x", gaussian(2.0))


def moved_lineage(d: Draft) -> None:
    """The run is held on one lineage, its debits are charged to another one."""
    declare("disjoint", cutoff="2026-11-22")(d)
    d.entry(P0, "debit")["dataset"] = dataset(P0, SMALL, 1)["dataset"]


def evaluated_too_often(d: Draft) -> None:
    """Each of two rounds has one evaluation; the plan has one for both."""
    event = d.entry(C, "cohort-hold")["plan"][1]["event"]
    fields = {"run_id": "run-1", "purpose": "evaluate", "event": event, "clip_norm": None, "declared_records": 100}
    for number in (2, 1):
        d.add(C, "cohort-debit", None, d.index(C, "round", 0), **fields, round=number, clients=[[3, 7]])


COORD = "coordinator/ledger.jsonl"
L0 = f"partners/{P0}/ledger.jsonl"
R2 = "closing/run-2.json"
LIES: list[tuple[str, Shape, Lie, str, str, str]] = [  # name, bundle, lie, file, code, words
    # genesis, data sets, unknown things
    ("genesis_owner", SMALL, change(P0, "genesis", owner=P1), L0, "genesis", "owner, role, key"),
    ("genesis_role", SMALL, change(P0, "genesis", role="coordinator"), L0, "genesis", "owner, role, key"),
    ("genesis_key", SMALL, change(P0, "genesis", key=identity(P1).key), L0, "genesis", "owner, role, key"),
    ("genesis_not_simulated", SMALL, change(P0, "genesis", simulated=False), L0, "genesis", "owner, role, key"),
    ("genesis_dataset", SMALL, change(P0, "genesis", dataset=None), L0, "layout", "exactly the fields"),
    ("genesis_missing", SMALL, without(P0, "genesis"), L0, "genesis", "is genesis"),
    ("genesis_twice", SMALL, again(P0, "genesis"), L0, "genesis", "only the first"),
    ("genesis_hidden", SMALL, hide(P0, "genesis"), L0, "genesis", "it is shown"),
    ("genesis_of_a_charter", SMALL, lambda d: d.books[P0].__setitem__(0, replace(d.books[P0][0], charter=OTHER, shown=True)), L0, "layout", "charter"),
    ("run_of_no_charter", SMALL, lambda d: setattr(d.item(C, "run"), "charter", None), COORD, "layout", "charter"),
    ("held_out_kind", SMALL, at(genesis_held_out, kind="some"), L0, "layout", "held_out"),
    ("held_out_no_commitment", SMALL, at(genesis_held_out, commitment=None), L0, "layout", "held_out"),
    ("nothing_held_out_but_committed", PLAIN, at(genesis_held_out, commitment=digest("x")), L0, "layout", "held_out"),
    ("public_of_private_rows", SMALL, at(genesis_held_out, kind="private"), L0, "terms", "are not public"),
    ("dataset_twice", SMALL, declare("version", first_dataset("dataset"), None, first_dataset("lineage"), 0), L0, "repeated", "registered before"),
    ("lineage_twice", SMALL, again(P0, "dataset", dataset=short("x")), L0, "lineage", "opened before"),
    ("second_first", SMALL, declare("first"), L0, "lineage", "opens as first"),
    (
        "first_disjoint",
        SMALL,
        lambda d: d.entry(P0, "dataset")["declared"].update(kind="disjoint", cutoff="2026-11-22"),
        L0,
        "lineage",
        "opens as disjoint",
    ),
    ("disjoint_without_date", SMALL, declare("disjoint"), L0, "layout", "declared"),
    ("disjoint_from_before", SMALL, declare("disjoint", cutoff="2026-11-21"), L0, "lineage", "registered on"),
    ("disjoint_from_tomorrow", SMALL, declare("disjoint", cutoff="2026-11-23"), L0, "lineage", "yet to come"),
    ("disjoint_from_no_day", SMALL, declare("disjoint", cutoff="0001-99-99"), L0, "layout", "declared"),
    ("disjoint_of_something", SMALL, declare("disjoint", short("x"), "2026-01-01"), L0, "layout", "declared"),
    ("version_of_nothing", SMALL, declare("version"), L0, "layout", "declared"),
    ("version_with_a_date", SMALL, declare("version", short("x"), "2026-01-01"), L0, "layout", "declared"),
    ("version_of_a_stranger", SMALL, declare("version", short("x")), L0, "lineage", "not in its lineage"),
    ("version_elsewhere", SMALL, declare("version", first_dataset("dataset")), L0, "lineage", "not in its lineage"),
    (
        "version_opens",
        SMALL,
        lambda d: [
            declare("version", first_dataset("dataset"), None, first_dataset("lineage"))(d),
            header(P0, "dataset", {"lineage": short("x"), "open": "disjoint"}, 1)(d),
        ],
        L0,
        "privacy_differs",
        "header says",
    ),
    ("dataset_hidden", SMALL, hide(P0, "dataset"), L0, "hidden", "no entry shown"),
    ("unknown_type", SMALL, at_end(P0, "gift"), L0, "unknown", "unknown type"),
    ("coordinator_type_at_partner", SMALL, at_end(P0, "run", run_id="x"), L0, "unknown", "unknown type"),
    ("unknown_field", SMALL, change(P0, "commit", more=1), L0, "layout", "exactly the fields"),
    ("missing_field", SMALL, lambda d: d.entry(P0, "commit").pop("round"), L0, "layout", "exactly the fields"),
    ("unknown_mechanism", SMALL, at(lambda d: d.entry(P0, "debit")["event"], mechanism="laplace/1"), L0, "unknown", "laplace"),
    ("unknown_mechanism_version", SMALL, everywhere("debit", event={"mechanism": "none/2"}), L0, "unknown", "none/2"),
    ("huge_steps", SMALL, at(lambda d: d.entry(P0, "debit")["event"], steps=10**400), L0, "layout", "steps"),
    ("true_steps", SMALL, at(lambda d: d.entry(P0, "debit")["event"], steps=True), L0, "layout", "steps"),
    ("sigma_nan", SMALL, at(lambda d: d.entry(P0, "debit")["event"], sigma="nan"), L0, "layout", "decimal"),
    ("sigma_infinite", SMALL, at(lambda d: d.entry(P0, "debit")["event"], sigma="1e999"), L0, "layout", "decimal"),
    ("sigma_too_small", SMALL, at(lambda d: d.entry(P0, "debit")["event"], sigma="0.29"), L0, "layout", "0.3"),
    ("q_above_1", SMALL, at(lambda d: d.entry(P0, "debit")["event"], q="1.1"), L0, "layout", "q"),
    ("q_zero", SMALL, at(lambda d: d.entry(P0, "debit")["event"], q="0"), L0, "layout", "q"),
    ("deep_body", SMALL, change(P0, "charter", name=json.loads("[" * 40 + "]" * 40)), L0, "layout", "deep"),
    ("charter_other_name", SMALL, change(P0, "charter", name="other"), L0, "terms", "another name"),
    ("restored_beyond", SMALL, at_end(P0, "restored", length=1000), L0, "run_order", "stand before it"),
    # headers
    ("header_of_a_commit", SMALL, header(P0, "commit", {"lineage": short("x"), "open": "disjoint"}), L0, "privacy_differs", "charges nothing"),
    ("header_of_the_coordinator", SMALL, header(C, "run", {"lineage": short("x"), "open": "first"}), COORD, "privacy_differs", "charges nothing"),
    ("header_of_a_debit_missing", SMALL, header(P0, "debit", None), L0, "privacy_differs", "header says"),
    ("header_of_a_debit_cheaper", SMALL, header(P0, "debit", lambda p: p | {"debit": gaussian(99.0)}), L0, "privacy_differs", "header says"),
    ("header_of_a_hold_cheaper", SMALL, header(P0, "hold", lambda p: p | {"hold": []}), L0, "privacy_differs", "header says"),
    ("header_of_a_hold_larger", SMALL, header(P0, "hold", lambda p: p | {"hold": p["hold"] * 2}), L0, "privacy_differs", "header says"),
    ("header_of_a_budget", SMALL, header(P0, "budget", lambda p: p | {"budget": Budget.create(2.0, 1e-4).to_fields()}), L0, "privacy_differs", "header says"),
    ("header_of_a_release", SMALL, lambda d: [without(P0, "commit")(d), without(P0, "debit")(d), header(P0, "release", lambda p: p | {"release": []})(d)], L0, "privacy_differs", "header says"),
    ("header_of_two_kinds", SMALL, header(P0, "debit", lambda p: p | {"open": "first"}), L0, "unknown", "unknown form"),
    ("header_of_no_kind", SMALL, header(P0, "debit", lambda p: {"lineage": p["lineage"]}), L0, "unknown", "unknown form"),
    ("header_of_no_lineage", SMALL, header(P0, "debit", lambda p: {"debit": p["debit"]}), L0, "unknown", "unknown form"),
    ("header_of_an_odd_lineage", SMALL, header(P0, "debit", lambda p: p | {"lineage": "x"}), L0, "unknown", "unknown form"),
    ("header_of_an_unknown_kind", SMALL, header(P0, "debit", lambda p: {"lineage": p["lineage"], "gift": 1}), L0, "unknown", "unknown kind"),
    ("header_opens_oddly", SMALL, header(P0, "dataset", lambda p: p | {"open": "again"}), L0, "unknown", "opens as"),
    ("header_of_an_unknown_lineage", SMALL, header(P0, "debit", lambda p: p | {"lineage": short("x")}), L0, "lineage", "never opened"),
    ("header_of_three_events", SMALL, header(P0, "hold", lambda p: p | {"hold": p["hold"] * 3}), L0, "layout", "at most two"),
    ("header_of_no_pairs", SMALL, header(P0, "hold", lambda p: p | {"hold": [1]}), L0, "layout", "pairs"),
    ("header_of_negative_counts", SMALL, header(P0, "hold", lambda p: p | {"hold": [[gaussian(9.0), -1]]}), L0, "layout", "pairs"),
    # what is hidden
    ("hold_hidden", SMALL, hide(P0, "hold"), L0, "hidden", "a hold, before any other charter"),
    ("debit_hidden", SMALL, hide(P0, "debit"), L0, "hidden", "only a hold of this charter covers"),
    ("debit_hidden_among_others", SMALL, hidden_debit, L0, "hidden", "only a hold of this charter covers"),
    ("debit_hidden_of_nothing", SMALL, lambda d: hidden_debit(d, 77.0), L0, "not_held", "a debit of what is not held"),
    ("release_hidden", SMALL, hidden_release, L0, "not_held", "releases what is not held"),
    ("other_run_too_dear", SMALL, other_charter_dear, L0, "over_budget", "does not admit"),
    ("other_header_differs", SMALL, lambda d: [other_run(d, 4, "x", gaussian(50.0)), setattr(d.books[P0][6], "shown", True), setattr(d.books[P0][6], "privacy", {"lineage": first_dataset("lineage"), "debit": gaussian(51.0)})], L0, "privacy_differs", "header says"),
    ("charged_to_another_lineage", SMALL, moved_lineage, L0, "terms", "lineage than its hold's"),
    # budget
    ("budget_twice", SMALL, again(P0, "budget"), L0, "budget", "second budget"),
    ("budget_raised", SMALL, at(budget, epsilon="2.0"), L0, "budget", "charter's epsilon"),
    ("budget_delta_raised", SMALL, at(budget, delta="0.01"), L0, "budget", "delta"),
    ("budget_shares_above_delta", SMALL, at(budget, gaussian_delta="0.00009"), L0, "budget", "sum to more"),
    ("budget_share_negative", SMALL, at(budget, gaussian_delta="-0.00005"), L0, "budget", "positive"),
    ("budget_order_1", SMALL, lambda d: budget(d)["orders"].append([1, "1e-9"]), L0, "budget", "orders"),
    ("budget_order_huge", SMALL, lambda d: budget(d)["orders"].append([10**9, "1e-9"]), L0, "budget", "orders"),
    ("budget_orders_many", SMALL, lambda d: budget(d).update(orders=[[2, "1e-9"]] * 6), L0, "layout", "orders"),
    ("budget_other_lineage", SMALL, lambda d: [change(P0, "budget", lineage=short("x"))(d), header(P0, "budget", lambda p: p | {"lineage": first_dataset("lineage")})(d)], L0, "privacy_differs", "header says"),
    ("budget_client_level", SMALL, change(P0, "budget", unit="client"), L0, "layout", "unit"),
    ("budget_replace_one", SMALL, change(P0, "budget", adjacency="replace-one"), L0, "layout", "adjacency"),
    ("budget_missing", SMALL, without(P0, "budget"), L0, "no_budget", "none set"),
    ("charter_cap", DEAR, lambda d: under_another_charter(d, 200.0, 0.01), L0, "over_charter", "with this debit"),
    ("charter_cap_same_delta", DEAR, lambda d: under_another_charter(d, 200.0, 1e-4), L0, "over_charter", "with this debit"),
    # hold
    ("hold_twice", SMALL, again(P0, "hold", request_id="other"), L0, "repeated", "held before"),
    ("hold_without_charter", SMALL, without(P0, "charter"), L0, "unrecorded", "hold: before"),
    ("run_without_charter", SMALL, without(C, "charter"), COORD, "unrecorded", "run: before"),
    ("hold_other_event", SMALL, at(lambda d: d.entry(P0, "hold")["plan"][0]["event"], sigma="30.0"), L0, "terms", "not the charter's"),
    ("hold_other_count", SMALL, at(lambda d: d.entry(P0, "hold")["plan"][0], count=2), L0, "terms", "counts"),
    ("hold_other_hash", SMALL, change(P0, "hold", plan_sha256=digest("x")), L0, "terms", "plan_sha256"),
    ("hold_unprotected", SMALL, at(lambda d: d.entry(P0, "hold")["plan"][0], event=NONE), L0, "terms", "charter"),
    ("hold_other_dataset", SMALL, change(P0, "hold", dataset=short("other")), L0, "hidden", "no entry shown"),
    ("hold_too_dear", TOO_DEAR, lambda d: None, L0, "over_budget", "does not admit"),
    ("spent_too_much", TOO_DEAR, lambda d: None, L0, "over_budget", "more than the cap"),
    ("hold_after_unprotected", SMALL, unprotected_then_protected, L0, "no_budget", "unprotected round came before"),
    ("hold_expired", SMALL, lambda d: setattr(d, "start", d.signed.charter.expires), L0, "expired", "hold: after the charter expired"),
    # debit
    ("debit_without_hold", SMALL, without(P0, "hold"), L0, "run_order", "no hold"),
    ("debit_other_sigma", SMALL, at(lambda d: d.entry(P0, "debit")["event"], sigma="21.0"), L0, "not_held", "not in its hold"),
    ("debit_other_steps", SMALL, at(lambda d: d.entry(P0, "debit")["event"], steps=1), L0, "not_held", "not in its hold"),
    ("debit_other_q", SAMPLED, at(lambda d: d.entry(P0, "debit")["event"], q="0.05"), L0, "not_held", "not in its hold"),
    ("debit_unprotected", SMALL, change(P0, "debit", event=NONE), L0, "not_held", "not in its hold"),
    ("debit_other_purpose", SMALL, change(P0, "debit", purpose="evaluate"), L0, "not_held", "not in its hold"),
    ("debit_more_than_held", FULL, more_rounds_than_held, L0, "not_held", "not in its hold"),
    ("debit_more_than_held_by_header", FULL, more_rounds_than_held, L0, "not_held", "a debit of what is not held"),
    ("debit_request_twice", FULL, again(P0, "debit"), L0, "repeated", "same request twice"),
    ("debit_clip_norm", SMALL, change(P0, "debit", clip_norm="1.0"), L0, "terms", "clip_norm"),
    ("debit_no_clip_norm", SMALL, change(P0, "debit", clip_norm=None), L0, "terms", "clip_norm"),
    ("debit_evaluate_clip_norm", PRIVATE, change(P0, "debit", 2, clip_norm="0.5"), L0, "terms", "clip_norm"),
    ("debit_declared_records", SMALL, change(P0, "debit", declared_records=1000), L0, "terms", "declared_records"),
    ("debit_round_beyond", SMALL, change(P0, "debit", round=2), L0, "terms", "round 2"),
    ("debit_round_0", SMALL, change(P0, "debit", round=0), L0, "layout", "round"),
    ("debit_other_plan", SMALL, change(P0, "debit", plan_sha256=digest("x")), L0, "terms", "another plan"),
    ("debit_after_release", FULL, late_debit, L0, "run_order", "after its run was released"),
    ("debit_missing", SMALL, without(P0, "debit"), L0, "run_order", "no debit"),
    ("debit_expired", SMALL, lambda d: setattr(d, "start", d.signed.charter.expires - timedelta(seconds=d.index(P0, "debit"))), L0, "expired", "debit: after the charter expired"),
    ("debit_not_asked", SMALL, lambda d: [change(P0, k, request_id="own")(d) for k in ("debit", "commit")], L0, "not_asked", "not ask for"),
    # commit, public, release
    ("commit_missing", SMALL, without(P0, "commit"), L0, "not_done", "no commit for the ok answer"),
    ("commit_twice", SMALL, again(P0, "commit"), L0, "repeated", "same request twice"),
    ("commit_other_request", SMALL, change(P0, "commit", request_sha256=digest("x")), L0, "run_order", "no debit"),
    ("commit_other_round", SMALL, change(P0, "commit", round=3), L0, "run_order", "no debit"),
    ("commit_other_run", SMALL, change(P0, "commit", run_id="x"), L0, "run_order", "no debit"),
    ("commit_other_reply", SMALL, change(P0, "commit", reply_sha256=digest("x")), L0, "not_done", "another reply"),
    ("public_missing", SMALL, without(P0, "public"), L0, "not_done", "no public for the ok answer"),
    ("public_not_agreed", PRIVATE, lambda d: d.add(P0, "public", None, d.index(P0, "release"), request_id="x", request_sha256=digest("x"), run_id="run-1", round=1, reply_sha256=digest("x")), L0, "terms", "no public evaluation"),
    ("public_round_beyond", SMALL, change(P0, "public", round=2), L0, "terms", "no public evaluation"),
    ("public_without_hold", SMALL, change(P0, "public", run_id="x"), L0, "run_order", "no open hold for its run"),
    ("public_after_release", SMALL, lambda d: d.books[P0].append(d.books[P0].pop(d.index(P0, "public"))), L0, "run_order", "no open hold for its run"),
    ("public_other_reply", SMALL, change(P0, "public", reply_sha256=digest("x")), L0, "not_done", "another reply"),
    ("release_twice", SMALL, again(P0, "release"), L0, "run_order", "no open hold"),
    ("release_why", SMALL, change(P0, "release", why="bored"), L0, "layout", "why"),
    # the coordinator
    ("run_hidden", SMALL, hide(C, "run"), COORD, "record", "no open run"),
    ("run_twice", SMALL, again(C, "run"), COORD, "repeated", "exists"),
    ("ask_again_differently", SMALL, again(C, "ask", 1, requests={}), COORD, "layout", "requests"),
    ("ask_again_other_hash", SMALL, lambda d: [again(C, "ask", 1)(d), d.entry(C, "ask", 2)["requests"][P0].update(request_sha256=digest("x"))], COORD, "record", "asked again"),
    ("ask_stranger", SMALL, lambda d: d.entry(C, "ask", 1)["requests"].update(x=d.entry(C, "ask", 1)["requests"][P0]), COORD, "record", "no partner"),
    ("ask_round_beyond", SMALL, change(C, "ask", 1, round=2), COORD, "terms", "round 2"),
    ("ask_open_in_round_1", SMALL, change(C, "ask", 0, round=1), COORD, "record", "opens the run"),
    ("ask_evaluation_not_agreed", Shape(partners=2, rounds=1, sigma=20.0, evaluation="none"), again(C, "ask", 1, purpose="evaluate"), COORD, "terms", "no evaluation"),
    ("ask_dropped", SMALL, without(C, "ask", 1), COORD, "record", "not asked"),
    ("one_id_for_two", FULL, lambda d: d.entry(C, "ask", 3)["requests"][P0].update(request_id="run-1-1-train-hospital-0"), COORD, "record", "one request id"),
    ("answers_twice_differently", SMALL, lambda d: [again(C, "answers", 1)(d), d.entry(C, "answers", 2)["replies"][P0].update(reply_sha256=digest("x"))], COORD, "record", "answered the same request twice"),
    ("answer_other_request", SMALL, at(lambda d: reply(d, "train"), request_id="x"), COORD, "record", "another request"),
    ("answer_other_reply", SMALL, at(lambda d: reply(d, "train"), reply_sha256=digest("x")), L0, "not_done", "another reply"),
    ("answer_unknown_outcome", SMALL, at(lambda d: reply(d, "train"), outcome="maybe"), COORD, "layout", "outcome"),
    ("answer_ok_without_reply", SMALL, at(lambda d: reply(d, "train"), reply_sha256=None), COORD, "record", "outcome"),
    ("answer_refused_that_was_not", SMALL, at(lambda d: reply(d, "evaluate"), outcome="refused: budget"), L0, "not_done", "no refusal"),
    ("answer_refused_but_done", SMALL, at(lambda d: reply(d, "evaluate"), outcome="refused: budget"), L0, "not_asked", "recorded a refusal"),
    ("failed_other_reply", SMALL, lambda d: fails(d, "train", digest("x")), L0, "not_done", "another reply"),
    ("failed_without_commit", SMALL, lambda d: [fails(d, "train"), without(P0, "commit")(d)], L0, "not_done", "no commit for the failed answer"),
    ("failed_without_reply", SMALL, lambda d: [fails(d, "train"), reply(d, "train").update(reply_sha256=None)], COORD, "record", "outcome"),
    ("failed_but_folded", SMALL, lambda d: [again(C, "answers", 1)(d), d.entry(C, "answers", 2)["replies"][P0].update(outcome="failed")], COORD, "record", "that it failed"),
    ("failed_open", SMALL, lambda d: reply(d, "open").update(outcome="failed"), COORD, "record", "no work can fail"),
    ("round_quorum", SMALL, change(C, "round", partners=[]), COORD, "record", "different partners"),
    ("round_same_partner_twice", SMALL, change(C, "round", partners=[P0, P0]), COORD, "record", "different partners"),
    ("round_without_answer", SMALL, at(lambda d: reply(d, "train"), outcome="timeout", reply_sha256=None), COORD, "record", "no ok answer"),
    ("round_again_other_model", SMALL, again(C, "round", model_sha256=digest("x")), COORD, "record", "not the next round"),
    ("round_again_other_metrics", SMALL, again(C, "round", metrics={"auc": "0.99"}), COORD, "record", "not the next round"),
    ("round_out_of_order", FULL, swap_rounds, COORD, "record", "not the next round"),
    ("close_other_model", SMALL, change(C, "close", model_sha256=digest("x")), COORD, "record", "model of the last one"),
    ("close_more_rounds", SMALL, change(C, "close", rounds=2), COORD, "record", "number of rounds"),
    ("close_completed_early", FULL, lambda d: [without(C, "round", 1)(d), change(C, "close", rounds=1, model_sha256=d.entry(C, "round")["model_sha256"])(d)], COORD, "record", "completed at round 1"),
    ("close_missing", SMALL, without(C, "close"), "closing/run-1.json", "closing", "does not close"),
    ("after_the_close", SMALL, lambda d: d.add(C, "round", **d.entry(C, "round")), COORD, "record", "no open run"),
    # refusals
    ("refusal_missing", FULL, without(P0, "refuse"), L0, "not_done", "no refusal"),
    ("refusal_other_reason", FULL, change(P0, "refuse", reason="noise"), L0, "not_done", "no refusal"),
    ("refusal_not_asked", FULL, again(P0, "refuse", request_id="x"), L0, "not_asked", "did not ask for"),
    ("hidden_run", FULL, lambda d: [d.drop(C, d.index(C, k, n)) for k, n in (("close", 1), ("answers", 5), ("ask", 5), ("run", 1))], R2, "closing", "does not close"),
    # populations
    ("plan_of_three", SMALL, lambda d: d.entry(P0, "hold")["plan"].extend([{"purpose": "evaluate", "count": 1, "event": NONE}] * 2), L0, "layout", "one or two items"),
    ("plan_of_one_purpose_twice", SMALL, lambda d: d.entry(P0, "hold")["plan"].append(d.entry(P0, "hold")["plan"][0]), L0, "layout", "one purpose twice"),
    ("clients_more_debits_than_held", Shape(clients=200, rounds=2, evaluation="private", sigma=30.0), evaluated_too_often, COORD, "not_held", "2 debits for evaluate"),
    ("clients_other_budget", CLIENTS, change(C, "budget", clients=999), COORD, "budget", "clients"),
    ("clients_budget_twice", CLIENTS, again(C, "budget"), COORD, "budget", "second budget"),
    ("clients_budget_raised", CLIENTS, lambda d: d.entry(C, "budget")["budget"].update(epsilon="2.0"), COORD, "budget", "charter's epsilon"),
    ("clients_hold_other_plan", CLIENTS, at(lambda d: d.entry(C, "cohort-hold")["plan"][0], count=9), COORD, "terms", "counts"),
    ("clients_no_hold", CLIENTS, without(C, "cohort-hold"), COORD, "not_held", "not in the plan"),
    ("clients_no_budget", CLIENTS, without(C, "budget"), COORD, "no_budget", "no budget"),
    ("clients_held_twice", CLIENTS, again(C, "cohort-hold"), COORD, "repeated", "held before"),
    ("clients_other_event", CLIENTS, at(lambda d: d.entry(C, "cohort-debit")["event"], steps=1), COORD, "not_held", "not in the plan"),
    ("clients_clip_norm", CLIENTS, change(C, "cohort-debit", clip_norm="9.0"), COORD, "terms", "clip_norm"),
    ("clients_declared", CLIENTS, change(C, "cohort-debit", declared_records=1), COORD, "terms", "declared_records"),
    ("clients_beyond", CLIENTS, change(C, "cohort-debit", clients=[[0, 1000]]), COORD, "layout", "ranges"),
    ("clients_overlap", CLIENTS, change(C, "cohort-debit", clients=[[0, 5], [5, 9]]), COORD, "layout", "overlap"),
    ("clients_commit_more", CLIENTS, change(C, "cohort-commit", clients=[[0, 999]]), COORD, "run_order", "not all debited"),
    ("clients_commit_without_debit", CLIENTS, without(C, "cohort-debit"), COORD, "run_order", "no debit"),
    ("clients_debit_again_differs", CLIENTS, again(C, "cohort-debit", clients=[[0, 0]]), COORD, "repeated", "differs"),
    ("clients_round_beyond", CLIENTS, change(C, "cohort-debit", 2, round=4), COORD, "terms", "round 4"),
    ("clients_round_uncommitted", CLIENTS, without(C, "cohort-commit"), COORD, "record", "committed clients"),
    ("clients_too_dear", Shape(clients=200, rounds=3, evaluation="none", sigma=1.0), lambda d: None, COORD, "over_budget", "does not admit"),
    ("clients_spent_too_much", Shape(clients=200, rounds=3, evaluation="none", sigma=1.0), lambda d: None, COORD, "over_budget", "cap 1"),
    ("clients_debit_expired", CLIENTS, lambda d: setattr(d, "start", d.signed.charter.expires - timedelta(seconds=d.index(C, "cohort-debit"))), COORD, "expired", "cohort-debit: after the charter expired"),
    ("clients_charter_cap", Shape(clients=200, rounds=2, evaluation="none", sigma=0.35), lambda d: d.entry(C, "budget").update(budget=Budget.create(200.0, 0.01).to_fields()), COORD, "over_charter", "the charter's is"),
]  # fmt: skip


def found_of(folder: Path, shape: Shape, lie: Lie, file: str, code: str, what: str) -> list[dict[str, Any]]:
    """The violations that a lie is found by; there are some."""
    made = fresh(shape)
    lie(made)
    verdict = verdict_of(made.write(folder))
    assert not verdict["verified"]
    found = [v for v in verdict["violations"] if (v["file"], v["code"]) == (file, code) and what in v["what"]]
    assert found, verdict["violations"]
    return found


@pytest.mark.parametrize(("name", "shape", "lie", "file", "code", "what"), LIES, ids=[row[0] for row in LIES])
def test_signed_lie_is_found(
    tmp_path: Path, name: str, shape: Shape, lie: Lie, file: str, code: str, what: str
) -> None:
    found = found_of(tmp_path / "b", shape, lie, file, code, what)
    assert all("malformed (" not in v["what"] for v in found)  # by its rule, not by the safety net


def test_uncommitted_debit_is_a_warning_and_stays_charged(tmp_path: Path) -> None:
    made = fresh(SMALL)
    full = verdict_of(made.write(tmp_path / "b"))["partners"][P0]["epsilon"]
    made.drop(P0, made.index(P0, "commit"))
    reply(made, "train").update(outcome="timeout", reply_sha256=None)
    made.entry(C, "round")["partners"].remove(P0)
    verdict = verdict_of(made.write(tmp_path / "b"))
    assert verdict["violations"] == []
    place = made.index(P0, "debit") + 1
    assert {("uncommitted", L0, place)} == {(w["code"], w["file"], w["line"]) for w in verdict["warnings"]}
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
    """Its bodies are not shown; what it spent counts, and is told apart."""
    made = fresh(SMALL)
    before = verdict_of(made.write(tmp_path / "b"))["partners"][P0]
    other_run(made, made.index(P0, "hold") + 1, "x", gaussian(20.0))
    verdict = verdict_of(made.write(tmp_path / "b"))
    assert verdict["violations"] == []
    assert b"other" not in (tmp_path / "b" / L0).read_bytes()
    place = made.index(P0, "hold") + 4
    assert {("other_charter", L0, place)} == {(w["code"], w["file"], w["line"]) for w in verdict["warnings"]}
    partner = verdict["partners"][P0]
    assert partner["epsilon"] > before["epsilon"] * 1.2
    assert partner["epsilon_filter"] > before["epsilon_filter"] * 1.2
    assert partner["charter_epsilon"] == before["charter_epsilon"]
    assert (partner["rounds"], partner["debits"], partner["undisclosed"]) == (1, 2, 5)
    hidden, shown = partner["trajectory"]
    assert (hidden["charter"], hidden["time"], hidden["run"], hidden["round"]) == ("other", None, None, None)
    assert (hidden["entry"], shown["charter"]) == (place, "this")
    assert {e["charter"]: e["count"] for e in partner["events"]} == {"this": 1, "other": 1}


def test_another_charter_that_is_shown_is_as_good(tmp_path: Path) -> None:
    made = fresh(SMALL)
    other_run(made, made.index(P0, "hold") + 1, "x", gaussian(20.0))
    hidden = verdict_of(made.write(tmp_path / "b"))["partners"][P0]
    for item in made.books[P0]:
        item.shown = True
    verdict = verdict_of(made.write(tmp_path / "b"))
    assert verdict["violations"] == []
    shown = verdict["partners"][P0]
    assert shown["undisclosed"] == 0
    for key in ("epsilon", "epsilon_filter", "charter_epsilon", "events", "debits", "rounds"):
        assert shown[key] == hidden[key]


def test_two_lineages(tmp_path: Path) -> None:
    """The most of either counts; a data set of a lineage that was never held is not shown, nor charged."""
    made = fresh(TWO_RUNS)
    one = verdict_of(made.write(tmp_path / "b"))["partners"][P0]
    declare("disjoint", cutoff="2026-11-22")(made)
    second, place = dataset(P0, SMALL, 1), made.index(P0, "hold", 1)
    for kind in ("hold", "debit"):
        made.entry(P0, kind, 1)["dataset"] = second["dataset"]
    data = made.entry(P0, "budget") | {"lineage": second["lineage"]}
    made.add(P0, "budget", None, place, **data)
    verdict = verdict_of(made.write(tmp_path / "b"))
    assert verdict["violations"] == []
    partner = verdict["partners"][P0]
    first = dataset(P0, SMALL)["lineage"]
    assert set(partner["lineages"]) == {first, second["lineage"]}
    half = partner["lineages"][first]["epsilon"]
    assert half == partner["lineages"][second["lineage"]]["epsilon"] == partner["epsilon"]
    assert half < one["epsilon"] * 0.8
    assert partner["charter_epsilon"]["epsilon"] == half
    assert [point["lineage"] for point in partner["trajectory"]] == [first, second["lineage"]]
    assert [point["epsilon"] for point in partner["trajectory"]] == [half, half]

    made = fresh(TWO_RUNS)
    declare("disjoint", cutoff="2026-11-22")(made)
    made.item(P0, "dataset", 1).shown = None
    verdict = verdict_of(made.write(tmp_path / "b"))
    assert verdict["violations"] == []
    assert verdict["partners"][P0]["undisclosed"] == 1
    assert set(verdict["partners"][P0]["lineages"]) == {first}


def test_versions_and_overlaps_share_a_lineage(tmp_path: Path) -> None:
    made = fresh(TWO_RUNS)
    name, lineage = first_dataset("dataset"), first_dataset("lineage")
    declare("version", name, None, lineage)(made)
    declare("overlap", name, None, lineage, 2)(made)
    for kind in ("hold", "debit"):
        made.entry(P0, kind, 1)["dataset"] = dataset(P0, SMALL, 2)["dataset"]
    verdict = verdict_of(made.write(tmp_path / "b"))
    assert verdict["violations"] == []
    (one,) = verdict["partners"][P0]["lineages"].values()
    assert [d["declared"]["kind"] for d in one["datasets"]] == ["first", "version", "overlap"]
    assert verdict["partners"][P0]["epsilon"] == verdict["partners"][P1]["epsilon"]


def test_unprotected_rounds_of_another_charter(tmp_path: Path) -> None:
    """They make the lineage unbounded for everybody; what this charter itself spent is still said."""
    made = fresh(SMALL)
    other_run(made, made.index(P0, "hold") + 1, "x", NONE)
    verdict = verdict_of(made.write(tmp_path / "b"))
    assert verdict["violations"] == []
    partner = verdict["partners"][P0]
    assert (partner["unbounded"], partner["epsilon"], partner["epsilon_filter"]) == (True, None, None)
    assert partner["charter_epsilon"]["epsilon"] > 0
    assert all(point["epsilon_filter"] is None for point in partner["trajectory"])
    assert partner["events"][0] == {
        "mechanism": "none/1", "q": None, "sigma": None, "steps": None, "count": 1, "charter": "other"
    }  # fmt: skip


def test_populations_that_crash_or_are_not_protected(tmp_path: Path) -> None:
    made = honest(replace(CLIENTS, crashes=3))
    assert len(made.books[C]) > len(fresh(CLIENTS).books[C])
    verdict = verdict_of(made.write(tmp_path / "b"))
    assert verdict["violations"] == []
    assert verdict["partners"] == verdict_of(fresh(CLIENTS).write(tmp_path / "b"))["partners"]
    verdict = verdict_of(honest(Shape(clients=150, rounds=2, kind="none", evaluation="none")).write(tmp_path / "b"))
    assert verdict["violations"] == []
    assert all(client["epsilon"] is None and client["unbounded"] for client in verdict["partners"].values())
    assert all(client["charter_epsilon"]["epsilon"] is None for client in verdict["partners"].values())
    assert {e["mechanism"] for client in verdict["partners"].values() for e in client["events"]} == {"none/1"}


def test_population_after_its_checkpoint(tmp_path: Path) -> None:
    made = fresh(CLIENTS)
    verdict = verdict_of(made.write(tmp_path / "b"))
    entries = len(made.books[C])
    assert verdict["coordinator"]["witnessed"] == {"length": entries, "by": [], "closing": "run-1"}
    made.add(C, "recovered", torn_bytes=1, torn_sha256=digest("x"))
    assert verdict_of(made.write(tmp_path / "b"))["coordinator"]["tail"] == 1


def test_what_was_taken_before_a_budget_counts() -> None:
    """An evaluation with noise under a charter without protection: it is held and spent before any budget was fixed."""
    account = verifier.Account()
    budget = verifier.Budget.parse(Budget.create(1.0, 1e-4).to_fields())
    account.take((1.0, 50.0, 1), 3, True)
    account.take((1.0, 40.0, 1), 2, False)
    account.pools[True][1.0, 50.0, 1] -= 1
    account.debits.append(({}, (1.0, 50.0, 1), True))
    account.fix(budget)
    assert account.debited is not None
    assert account.charged is not None
    assert account.debited.epsilon() == verifier.filter_epsilon(budget, (((1.0, 50.0), 1),))
    assert account.charged.epsilon() == verifier.filter_epsilon(budget, (((1.0, 40.0), 2), ((1.0, 50.0), 3)))
    account.take((1.0, 40.0, 1), -2, False)
    assert account.charged.epsilon() == verifier.filter_epsilon(budget, (((1.0, 50.0), 3),))


def test_no_run_at_all(tmp_path: Path) -> None:
    made = fresh(SMALL)
    for owner in made.books:
        del made.books[owner][made.index(owner, "charter") + 1 :]
    made.closings.clear()
    made.model = None
    verdict = verdict_of(made.write(tmp_path / "b"))
    assert verdict["violations"] == []
    assert {w["code"] for w in verdict["warnings"]} == {"no_runs", "tail"}
    partner = verdict["partners"][P0]
    assert (partner["epsilon"], partner["epsilon_filter"], partner["epsilon_cap"], partner["delta"]) == (
        0,
        0,
        1.0,
        1e-4,
    )
    assert (partner["lineages"], partner["budget"], partner["events"], partner["trajectory"]) == ({}, None, [], [])


def test_charter_cap_names_the_first_debit_that_exceeds(tmp_path: Path) -> None:
    """One round fits in epsilon 1 at delta 1e-4 (0.677), two do not (1.001); the budget would pay for all three."""
    made = honest(Shape(partners=2, rounds=3, steps=1, sigma=4.5, careless=True))
    under_another_charter(made, 50.0, 1e-3)
    verdict = verdict_of(made.write(tmp_path / "b"))
    fits = next(n for n in range(3) if odometer([PrivacyEvent(1.0, 4.5, n + 1)], 1e-4) > 1)  # debits that fit
    assert fits > 0
    found = [v for v in verdict["violations"] if "with this debit" in v["what"]]
    assert [(v["code"], v["line"]) for v in found if v["file"] == L0] == [
        ("over_charter", made.index(P0, "debit", fits) + 1)
    ]
    assert verdict["partners"][P1]["epsilon_cap"] == 1.0


@pytest.mark.parametrize(("epsilon", "delta"), [(0.9, 1e-4), (3.0, 1e-4), (5.0, 1e-3), (5.0, 1e-6)])
@pytest.mark.parametrize("shape", [Shape(partners=2, rounds=2, q=0.05, steps=5), Shape(partners=2, rounds=2)])
def test_budget_of_another_charter_is_said_and_no_false_alarm(
    tmp_path: Path, shape: Shape, epsilon: float, delta: float
) -> None:
    """Calibrated to the charter's cap, under a filter whose orders fit another one: the charter still pays."""
    if epsilon < 1:
        shape = Shape(partners=2, rounds=2, sigma=30.0)
    made = fresh(shape)
    under_another_charter(made, epsilon, delta)
    verdict = verdict_of(made.write(tmp_path / "b"))
    assert verdict["violations"] == []
    warned = [w["what"] for w in verdict["warnings"] if w["code"] == "other_charter"]
    assert len(warned) == 1
    assert all(word in warned[0] for word in (repr(epsilon), repr(delta)))
    partner = verdict["partners"][P0]
    assert (partner["epsilon_cap"], partner["delta"], partner["charter_epsilon"]["cap"]) == (epsilon, delta, 1.0)


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
        "closing checkpoint in this bundle, run run-2,",
        "withhold",
        "coordinator's word",
        "report.html",
        "timings",
    ):
        assert word in limits
    (folder / "closing/run-2.json").unlink()
    assert "run run-1," in " ".join(verdict_of(folder)["limits"])
    shutil.rmtree(folder / "closing")
    assert "No good closing checkpoint" in " ".join(verdict_of(folder)["limits"])


def test_nothing_hostile_reaches_the_terminal(tmp_path: Path) -> None:
    nasty = "\x1b[2J\x1b]0;x\x07\u202e\u2066\u200b\x9b31m\n"
    made = fresh(FULL)
    at_end(P0, nasty)(made)
    made.entry(P1, "genesis")["owner"] = nasty
    folder = made.write(tmp_path / "b")
    (folder / f"keys/{nasty}.pem").write_bytes(b"")
    (folder / f"closing/{nasty}.json").write_bytes(b"")
    (folder / f"partners/{nasty}").mkdir()
    (folder / f"heads/{nasty}.jsonl").write_bytes(b"")
    (folder / "partners" / os.fsdecode(b"\xff\xfe")).mkdir()
    verdict = verdict_of(folder)
    assert {"unknown type", "no partner"} <= {
        w for w in ("unknown type", "no partner") if w in str(verdict["violations"])
    }
    for found in verdict["violations"] + verdict["warnings"]:
        assert (found["file"] + found["what"]).isprintable()
    report = Report()
    report.wrong("file", "f" * 10_000, None, "w" * 10_000)
    assert len(report.violations[0]["file"]) < 400 > len(report.violations[0]["what"]) - 200
    assert str(Unreadable("charter.json", 1, nasty)).isprintable()


def _many(made: Draft, count: int) -> None:
    """As many runs under another charter, each with another event."""
    place = made.index(P0, "hold")
    new = Draft(made.signed, made.people, {P0: [i for i in made.books[P0] if i.kind == "dataset"]})
    for n in range(count):
        other_run(new, len(new.books[P0]), f"x{n}", gaussian(100_000 + n, steps=1), charter=not n)
    made.books[P0][place:place] = new.books[P0][1:]
    made.closings[0][2][P0] += len(new.books[P0]) - 1


def test_two_thousand_holds_and_debits_are_cheap(tmp_path: Path) -> None:
    made = fresh(SMALL)
    _many(made, 1999)  # and the bundle's own event
    folder = made.write(tmp_path / "b")
    began = time.process_time()
    verdict = verdict_of(folder)
    assert time.process_time() - began < 15
    assert verdict["violations"] == []
    partner = verdict["partners"][P0]
    assert math.isclose(partner["trajectory"][-1]["epsilon_filter"], partner["epsilon_filter"], rel_tol=1e-12)
    assert len(partner["trajectory"]) == 2000
    assert 30 <= sum(point["epsilon"] is not None for point in partner["trajectory"]) <= 41


def test_many_kinds_and_hostile_ones(tmp_path: Path) -> None:
    """A small edition of tests/bench/test_audit.py: 600 entries of 50 sampled kinds, then 100 events from every corner."""
    rng = random.Random(1)
    kinds = [gaussian(10 ** rng.uniform(0.5, 1.3), 10 ** rng.uniform(-3, -1), rng.randint(1, 9)) for _ in range(50)]
    rates, sigmas, counts = (5e-324, 1e-300, 1e-9, 0.5, 1 - 1e-16), (0.3, 1.0, 1e9, 1e300), (1, 10**9)
    hostile = [gaussian(rng.choice(sigmas), rng.choice(rates), rng.choice(counts)) for _ in range(100)]
    for events in (4 * kinds, hostile):
        folder = with_many_debits(events).write(tmp_path / "b")
        began = time.process_time()
        verdict = verdict_of(folder)
        assert time.process_time() - began < 15
        assert verdict["violations"] == []
        partner = verdict["partners"][P0]
        assert partner["debits"] == len(events) + 1
        assert 0 < partner["epsilon"] <= partner["epsilon_filter"] < 1e15
        assert sum(e["count"] for e in partner["events"]) == len(events) + 1
    assert {w["code"] for w in verdict["warnings"]} == {"coarse", "other_charter"}


def test_different_events_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier, "MAX_EVENTS", 20)
    made = fresh(SMALL)
    _many(made, 19)
    assert verdict_of(made.write(tmp_path / "b"))["violations"] == []
    made = fresh(SMALL)
    _many(made, 20)
    found = verdict_of(made.write(tmp_path / "b"))["violations"]
    assert ("more", made.index(P0, "hold") + 1) in {(v["code"], v["line"]) for v in found}


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
    assert total.epsilon() == verifier.filter_epsilon(budget, verifier._history(spent))
    total.add((0.5, 0.3, 10**9), 10**9)  # as much as swallows every digit of the rest
    total.add((0.5, 0.3, 10**9), -(10**9))
    assert total.epsilon() == verifier.filter_epsilon(budget, verifier._history(spent))


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


def test_figures_of_a_ledger_that_was_not_read_to_its_end_are_said_to_be_that(copied: Path) -> None:
    lines = (copied / L0).read_bytes().splitlines(keepends=True)
    at = next(n for n, line in enumerate(lines) if b'"type":"debit"' in line)
    lines[at] = lines[at].replace(b'"time":"2026', b'"time":"2025', 1)
    (copied / L0).write_bytes(b"".join(lines))
    verdict = verdict_of(copied)
    cut, other = verdict["partners"][P0], verdict["partners"][P1]
    assert (cut["whole"], cut["entries"], cut["debits"]) == (False, at, 0)
    assert (other["whole"], other["debits"] > 0) == (True, True)
    assert not any(w["file"] == L0 and w["code"] in ("unreleased", "uncommitted") for w in verdict["warnings"])
    assert cut["unread"] == len(lines) - at
    assert state(cut) == ("bad", f"READ TO LINE {at}, {len(lines) - at} MORE UNREAD")
    assert state(other) == ("good", "within cap")


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
    made.add(P0, "recovered", torn_bytes=1, torn_sha256=digest("x"))
    verdict = verdict_of(made.write(tmp_path / "b"))
    assert verdict["verified"]
    length = len(made.books[P0])
    assert ("tail", L0, length) in {(w["code"], w["file"], w["line"]) for w in verdict["warnings"]}
    partner = verdict["partners"][P0]
    assert partner["tail"] == 1
    assert partner["witnessed"] == {"length": length - 1, "by": [P1, C], "closing": "run-1"}


def test_no_checkpoint_means_not_closed(copied: Path) -> None:
    shutil.rmtree(copied / "closing")
    found = verdict_of(copied)["violations"]
    assert {(v["code"], v["file"]) for v in found} == {("closing_missing", "closing/run-1.json")}


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
    ("fields", "code", "what"),
    [
        ({"seq": 3}, "entry_order", "sequence number"),
        ({"seq": True}, "layout", "seq"),
        ({"root": digest("another line")}, "entry_order", "does not follow"),
        ({"v": 3}, "unknown", "version 3"),
        ({"v": True}, "layout", "v is True"),
        ({"more": 1}, "layout", "exactly the fields"),
        ({"body_sha256": digest("another body")}, "entry_body", "another body"),
        ({"privacy": []}, "layout", "privacy"),
    ],
)
def test_signed_entry_that_does_not_fit_in_its_place(
    bundle: Path, fields: dict[str, Any], code: str, what: str
) -> None:
    """Each alone: a chain that is right in everything but one field."""
    first, second = (bundle / L0).read_bytes().splitlines()[:2]
    chain = Chain(Report(), identity(P0).key)
    chain.take(first)
    line = verifier._json(second)
    header = verifier._json(verifier._envelope(line["envelope"], ENTRY_TYPE)[0])

    def with_envelope(sealed: bytes) -> bytes:
        return canonical(line | {"envelope": json.loads(sealed)})

    with pytest.raises(verifier.Bad, match=what) as caught:
        chain.take(with_envelope(identity(P0).seal(ENTRY_TYPE, canonical(header | fields))))
    assert caught.value.code == code
    for sealed in (
        identity(P0).seal(ENTRY_TYPE, json.dumps(header, sort_keys=True).encode()),  # spaces
        identity(P1).seal(ENTRY_TYPE, canonical(header)),
        identity(P0).seal("application/json", canonical(header)),
    ):
        with pytest.raises(verifier.Bad):
            chain.take(with_envelope(sealed))
    signature, other = ((who.key, who.sign(ENTRY_TYPE, canonical(header))) for who in (identity(P0), identity(P1)))
    for signatures in ((), (signature, other), (signature, signature), ((other[0], signature[1]),)):
        with pytest.raises(verifier.Bad, match="alone"):
            chain.take(with_envelope(write_envelope(Envelope(ENTRY_TYPE, canonical(header), signatures))))
    good = with_envelope(identity(P0).seal(ENTRY_TYPE, canonical(header)))
    for bad in (good + b" ", canonical({"body": line["body"]}), canonical(line | {"more": 1}), b"[]"):
        with pytest.raises(verifier.Bad):
            chain.take(bad)
    assert chain.length == 1
    chain.take(good)
    assert chain.length == 2


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"time": "yesterday"}, "time"),
        ({"salt": "0"}, "salt"),
        ({"type": 7}, "type"),
        ({"charter": "x"}, "charter"),
        ({"data": []}, "data"),
        ({"more": 1}, "exactly the fields"),
    ],
)
def test_signed_body_of_another_form(bundle: Path, fields: dict[str, Any], what: str) -> None:
    line = verifier._json((bundle / L0).read_bytes().splitlines()[0])
    header = verifier._json(verifier._envelope(line["envelope"], ENTRY_TYPE)[0])
    body = line["body"] | fields
    sealed = identity(P0).seal(ENTRY_TYPE, canonical(header | {"body_sha256": sha256(canonical(body))}))
    with pytest.raises(verifier.Bad, match=what):
        Chain(Report(), identity(P0).key).take(canonical({"body": body, "envelope": json.loads(sealed)}))


def test_tree_is_that_of_the_other_implementation() -> None:
    mine, theirs = verifier.Tree(), Tree()
    for number in range(130):
        leaf = str(number).encode()
        theirs.append(leaf_hash(leaf))
        assert mine.add(leaf) == theirs.root().hex()


def test_rewritten_history_differs_from_the_checkpoint(tmp_path: Path) -> None:
    """A partner who signs another history of the same length is caught by what everyone countersigned."""
    made = fresh(SMALL)
    folder = made.write(tmp_path / "b")
    made.entry(P0, "genesis")["software"] = "other"
    other = made.write(tmp_path / "c")
    shutil.copy(other / L0, folder / L0)
    assert {(v["code"], v["file"], v["line"]) for v in verdict_of(folder)["violations"]} == {("entry_differs", L0, 1)}


def test_checkpoint_signers(tmp_path: Path) -> None:
    made = fresh(SMALL)
    folder = made.write(tmp_path / "b")
    path = folder / "closing/run-1.json"
    roots = {owner: made.lines(owner)[1] for owner in made.books}
    heads = [{"owner": o, "length": len(ls) - 1, "root": ls[-1]} for o, ls in roots.items()]
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
        [{**heads[0], "root": "x"}, *heads[1:]],
        [{**heads[0], "more": 1}, *heads[1:]],
    ):
        path.write_bytes(made.closing("run-1", sha256(MODEL), wrong))
        assert "closing/run-1.json" in files_of(verdict_of(folder))
    path.write_bytes(made.closing("run-1", digest("x"), heads))
    assert "closing/run-1.json" in files_of(verdict_of(folder))
    path.write_bytes(made.closing("run-2", sha256(MODEL), heads))
    assert "closing/run-1.json" in files_of(verdict_of(folder))
    ends = [{**item, "length": item["length"] - 1, "root": roots[item["owner"]][-2]} for item in heads]
    path.write_bytes(made.closing("run-1", sha256(MODEL), ends))  # from before the run was closed
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


def test_what_is_listed_is_bounded() -> None:
    report = Report()
    for number in range(verifier.MAX_FOUND + 5):
        report.warn("tail", "x", number, "y")
    assert len(report.warnings) == verifier.MAX_FOUND + 1
    assert [w["code"] for w in report.warnings[-2:]] == ["tail", "more"]
    assert report.warnings[-2]["line"] == verifier.MAX_FOUND - 1


def test_a_file_that_is_too_large(copied: Path) -> None:
    path = copied / f"keys/{P0}.pem"
    path.write_bytes(path.read_bytes() + b"\n" * 10_000)
    assert {(v["code"], v["file"]) for v in verdict_of(copied)["violations"]} == {("file", f"keys/{P0}.pem")}


def test_as_a_command(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verifier.main([str(copied)]) == 0
    assert json.loads(capsys.readouterr().out)["verified"] is True
    assert verifier.main([str(copied), "--against", str(copied / L0)]) == 0
    (copied / "model.safetensors").write_bytes(b"other")
    assert verifier.main([str(copied)]) == 1
    capsys.readouterr()
    for arguments in (
        [],
        [""],
        ["nowhere"],
        [str(copied), "--against"],
        [str(copied), "--other", "x"],
        ["a", "b", "c"],
    ):
        assert verifier.main(arguments) == 2
        told = capsys.readouterr()
        assert not told.out
        assert told.err.startswith("nowhere: no such" if arguments == ["nowhere"] else "usage: ")


# -- any byte ------------------------------------------------------------------------------------------------


def another(rng: random.Random, byte: int) -> int:
    return rng.choice([b for b in range(256) if b != byte])


@pytest.mark.parametrize("owner", [P0, P1, C])
def test_every_byte_of_every_ledger_line(bundle: Path, owner: str) -> None:
    rng = random.Random(owner)
    file = COORD if owner == C else f"partners/{owner}/ledger.jsonl"
    chain = Chain(Report(), identity(owner).key)
    for line in (bundle / file).read_bytes().splitlines():
        for place in range(len(line)):
            with pytest.raises(verifier.Bad):
                chain.take(line[:place] + bytes([another(rng, line[place])]) + line[place + 1 :])
        chain.take(line)  # unchanged it is fine


def test_every_byte_of_the_charter(copied: Path) -> None:
    rng, path = random.Random(1), copied / "charter.json"
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([another(rng, data[place])]) + data[place + 1 :])
        report = Report()
        try:
            verifier._load_charter(copied, report)
        except Unreadable as err:
            report.wrong("file", err.file, err.line, err.what)
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
                verifier.Witnesses(report, terms, books).read_closings(copied)
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
        item = data.draw(st.sampled_from(made.books[owner]))
        if data.draw(st.integers(0, 3)) == 0:
            item.privacy = copy.deepcopy(made.charges(owner)[made.books[owner].index(item)] or {"lineage": 1})
            spot: Any = item.privacy
        else:
            spot = item.data
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
        b'{"v":2,"seq":0,"root":"","body_sha256":"","privacy":' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}",
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
    line = b'{"envelope":' + identity(P0).seal(ENTRY_TYPE, payload) + b"}"
    body = b'{"body":' + payload + b"," + line[1:]
    for data in (line, body, payload):
        (copied / L0).write_bytes(data + b"\n")
        began = time.process_time()
        verdict = verdict_of(copied)
        assert time.process_time() - began < 3
        assert (L0, 1) in {(v["file"], v["line"]) for v in verdict["violations"]}


def test_very_long_line(copied: Path) -> None:
    with open(copied / L0, "wb") as file:
        file.truncate(300 * 2**20)  # sparse: zeros without a newline
    began = time.process_time()
    verdict = verdict_of(copied)
    assert time.process_time() - began < 5
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
        mine = Odometer().read(merged(history), 1e-5)
        theirs = odometer((PrivacyEvent(*e) for e in history), 1e-5)
        if not mine.plain:
            assert math.isclose(mine.epsilon, theirs, rel_tol=2e-3, abs_tol=2e-3), history
        assert mine.epsilon >= theirs * (1 - 2e-3) - 2e-3


def test_odometer_always_ends_with_a_bound() -> None:
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
        began = time.process_time()
        found = Odometer().read(merged(history), 1e-5)
        assert time.process_time() - began < 12, history
        assert math.isfinite(found.epsilon)
        assert found.epsilon <= verifier._gaussian_epsilon(verifier._mu(merged(history)), 1e-5)


def test_odometer_is_exact_enough() -> None:
    """As another implementation has it, and the exact curve where nothing is sampled; nothing from nothing."""
    for history in (
        [(0.1, 3.0, 60)],
        [(0.02, 0.8, 500), (1.0, 20.0, 30)],
        [(0.5, 2.0, 10), (0.05, 1.0, 100), (0.1, 1.5, 9)],
    ):
        found, other = Odometer().read(merged(history), 1e-5), odometer([PrivacyEvent(*e) for e in history], 1e-5)
        assert not found.plain
        assert abs(found.epsilon - other) < 1e-3 * max(1.0, other)
    exact = verifier._gaussian_epsilon(math.sqrt(60 / 9), 1e-5)
    assert Odometer().read((), 1e-5) == verifier.Reading(0.0)
    assert Odometer().read((((1.0, 3.0), 60),), 1e-5).epsilon == exact
    assert Odometer().read((((1e-9, 1.0), 10),), 1e-5).epsilon == 0.0  # noticed with less than delta


def test_losses_beyond_a_float_give_a_plain_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> float:
        raise OverflowError

    history = (((0.1, 3.0), 60),)
    good = Odometer().read(history, 1e-5)
    monkeypatch.setattr(Odometer, "at", staticmethod(fails))
    found = Odometer().read(history, 1e-5)
    assert found.plain
    assert good.epsilon < found.epsilon < math.inf


def test_whoever_writes_a_bundle_does_not_choose_how_long_its_audit_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    histories = [(((q, 3.0), 60),) for q in (0.1, 0.11, 0.12)]
    tight = [Odometer().read(history, 1e-5) for history in histories]
    one = Odometer()
    one.read(histories[0], 1e-5)
    monkeypatch.setattr(Odometer, "work", 1.5 * (one.work - one.left))  # the second uses it up
    bounded = Odometer()
    found = [bounded.read(history, 1e-5) for history in histories]
    assert (found[0], found[0].plain) == (tight[0], False)
    assert found[2].plain
    assert tight[2].epsilon < found[2].epsilon < 2 * tight[2].epsilon
    assert bounded.read(histories[0], 1e-5) == tight[0], "what is known costs nothing"


def test_all_ledgers_of_a_bundle_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Odometer] = []
    read = Odometer.read
    monkeypatch.setattr(Odometer, "read", lambda self, *about: (asked.append(self), read(self, *about))[1])
    made = fresh(DEAR)
    under_another_charter(made, 200.0, 0.01)  # so what its debits cost under their own is read, too
    assert not verdict_of(made.write(tmp_path / "b"))["verified"]
    assert len(asked) > 3
    assert len(set(map(id, asked))) == 1


def test_half_of_the_work_is_not_for_trajectories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = with_many_debits([gaussian(7.0, 0.1)] * 20)
    folder = made.write(tmp_path / "b")

    def points(work: int) -> list[float | None]:
        monkeypatch.setattr(Odometer, "work", work)
        partner = verdict_of(folder)["partners"]["hospital-0"]
        assert partner["epsilon"] == partner["trajectory"][-1]["epsilon"]
        return [point["epsilon"] for point in partner["trajectory"]]

    plenty, little = points(2**28), points(2**18)
    assert None not in plenty
    assert 0 < little.count(None) < len(little)
    assert little[-1] == plenty[-1]


def test_a_coarse_epsilon_is_said_and_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(5)
    made = with_many_debits([gaussian(rng.uniform(5, 9), rng.uniform(0.01, 0.1)) for _ in range(20)])
    verdict = verdict_of(made.write(tmp_path / "b"))
    assert "coarse" not in {w["code"] for w in verdict["warnings"]}
    made.result = result_for(made, verdict)
    made.result["partners"][P0]["epsilon"] *= 1.1
    assert files_of(verdict_of(made.write(tmp_path / "b"))) == {"result.json"}
    monkeypatch.setattr(Odometer, "kinds", 10)
    verdict = verdict_of(made.write(tmp_path / "b"))
    assert verdict["violations"] == []
    (told,) = [w["what"] for w in verdict["warnings"] if w["code"] == "coarse"]
    assert told.startswith(f"{P0}: of epsilon {verdict['partners'][P0]['epsilon']:.6g} about ")


def test_rounding_events_costs_little_and_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(7)
    history = merged([(10 ** rng.uniform(-3, -1), 10 ** rng.uniform(0.3, 1), rng.randint(1, 9)) for _ in range(60)])
    whole = Odometer().read(history, 1e-5)
    assert whole.rounded == 0
    before = whole.epsilon
    for kinds, within in ((30, 1.1), (8, 1.6), (2, 6.0)):
        monkeypatch.setattr(Odometer, "kinds", kinds)
        found = Odometer().read(history, 1e-5)
        assert before * (1 - 1e-3) <= found.epsilon <= whole.epsilon * within
        assert found.rounded > 0 or found.plain
        before = found.epsilon


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_rounded_events_are_no_cheaper(seed: int, most: int) -> None:
    """Every event goes to one with no smaller q and no larger sigma; no step is lost."""
    rng = random.Random(seed)
    kinds = {
        (10 ** rng.uniform(-6, -0.01), 10 ** rng.uniform(-0.5, 2)): rng.randint(1, 9) for _ in range(rng.randint(1, 30))
    }
    made = verifier._merged_kinds(kinds, 4, most)
    assert len(made) <= most
    assert sum(made.values()) == sum(kinds.values())
    for q, sigma in kinds:
        assert any(big >= q and small <= sigma for big, small in made)
    if most >= len(kinds):
        assert made == kinds


def test_what_is_hardly_noticed_is_left_out_and_paid_for() -> None:
    few = (((1e-12, 0.3), 3), ((0.1, 2.0), 50))
    one, both = Odometer().read(few[1:], 1e-5), Odometer().read(few, 1e-5)
    assert one.epsilon <= both.epsilon <= one.epsilon * 1.001
    assert both.rounded == 0


# -- alone ---------------------------------------------------------------------------------------------------


def test_runs_alone_in_an_empty_folder(bundle: Path, tmp_path: Path) -> None:
    shutil.copy(SOURCE, tmp_path / "verifier.py")

    # An environment with the same packages but ours: editable installs hang on .pth files, which -S leaves unread.
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in Path(numpy.__file__).parents[1].iterdir():
        if not entry.name.startswith(("hansa", "_")):
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
    assert run(str(bundle), "--against").returncode == 2
    assert run(str(bundle), "--other", str(bundle)).returncode == 2
    assert run(str(bundle), "--against", str(bundle)).returncode == 0
    assert run(str(bundle), "--against", "verifier.py").returncode == 2
    assert "--against PATH" in run("--help").stdout
    assert run("--help").returncode == 0


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
