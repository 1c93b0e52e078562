"""The verifier on secure aggregation and shared noise: nothing honest is refused, and each rule finds what only it can find."""

from __future__ import annotations

import copy
import json
import random
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hansa.common import charter as words
from hansa.common import verifier
from hansa.common.cli import run
from hansa.common.errors import HansaError
from hansa.common.identity import canonical, sha256
from hansa.common.shared_noise import SharedGaussian, grid_for
from hansa.common.verifier import Bad, Terms, verify_bundle

sys.path.insert(0, str(Path(__file__).parent))
from bundles import OTHER, Draft, Item, Shape, any_secure_shape, digest, honest, result_for, signed_charter
from test_verifier import (
    COORD,
    L0,
    P0,
    P1,
    ROOT,
    SMALL,
    C,
    Lie,
    again,
    at,
    change,
    fresh,
    gaussian,
    other_run,
    verdict_of,
)

P2, L1, L2 = "hospital-2", "partners/hospital-1/ledger.jsonl", "partners/hospital-2/ledger.jsonl"
# Round 2 takes two attempts, hospital-2 is not in the second; nor in round 3, which it never hears of.
SECURE = Shape(
    partners=3, rounds=3, steps=1, kind="shared", quorum=2, secure=0, again=(2,), silent=((3, 0, "train", P2),)
)
TWICE = Shape(partners=3, rounds=2, steps=1, kind="shared", quorum=2, secure=0, retries=0)
FOUR = Shape(partners=4, rounds=1, steps=1, kind="shared", quorum=3, secure=1, evaluation="private")
LOCAL = Shape(partners=3, rounds=1, steps=2, kind="local", quorum=3, secure=0, sigma=40.0)
BARE = Shape(partners=3, rounds=1, steps=1, kind="none", quorum=3, secure=0, evaluation="none")
SHAPES = [SECURE, TWICE, FOUR, LOCAL, BARE]

# -- honest ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=["secure", "twice", "four", "local", "bare"])
def test_honest_bundle_is_verified(tmp_path: Path, shape: Shape) -> None:
    made = fresh(shape)
    verdict = verdict_of(made.write(tmp_path / "b"))
    assert (verdict["violations"], verdict["warnings"]) == ([], [])
    made.result = result_for(made, verdict)
    assert verdict_of(made.write(tmp_path / "b"))["violations"] == []


def test_no_false_alarm(tmp_path: Path) -> None:
    """Crashes in every exchange, retries, dropouts, other charters of either noise; half of them by our own writers."""
    codes, noises = set[str](), set[str]()
    for seed in range(16):
        made = honest(any_secure_shape(seed))
        verdict = verdict_of(made.write_for_real(tmp_path / "b") if seed % 2 else made.write(tmp_path / "b"))
        assert verdict["violations"] == [], (any_secure_shape(seed), verdict["violations"])
        codes |= {w["code"] for w in verdict["warnings"]}
        noises |= {p["noise"] for p in verdict["partners"].values()}
    assert {"recovered", "unanswered", "other_charter", "unreleased"} <= codes
    assert noises == {"local", "shared", "local and shared", "none"}


def test_what_is_told_of_shared_noise(tmp_path: Path) -> None:
    verdict = verdict_of(fresh(SECURE).write(tmp_path / "b"))
    assert (verdict["noise"], verdict["colluding"]) == ("shared", 0)
    assert verdict["secure_aggregation"] == {
        "quorum": 2, "colluding": 0, "retries": 1, "threshold": 2, "dimension": 72
    }  # fmt: skip
    charter = fresh(SECURE).signed.charter
    assert verdict["adversary"] == charter.adversary
    partner = verdict["partners"][P0]
    assert (partner["debits"], partner["rounds"]) == (4, 3)  # a round counts once
    assert verdict["partners"][P2]["rounds"] == 2
    (event,) = partner["events"]
    noise = charter.privacy.noise_multiplier or 0.0
    charged = SharedGaussian(1.0, noise, 0.5, grid_for(0.5, 72), 72, 2, 0, 1).charged
    assert event == {
        "mechanism": "shared-gaussian/1", "q": 1.0, "sigma": pytest.approx(charged.noise_multiplier, rel=1e-14), "steps": 1,
        "shared": {"sigma": noise, "clip": 0.5, "grid": grid_for(0.5, 72), "dimension": 72, "quorum": 2, "colluding": 0},
        "count": 4, "charter": "this",
    }  # fmt: skip
    assert event["sigma"] < noise
    lineage = next(iter(partner["lineages"].values()))
    for figures in (partner, lineage):
        assert (figures["noise"], figures["colluding"]) == ("shared", 0)
        assert figures["adversary"] == charter.adversary
    claim = verdict["claim"]
    for said in (
        "sum",
        "of 2 partners or more",
        "shared noise",
        charter.adversary,
        "mask",
        "cannot break",
        "cannot show",
    ):
        assert said in claim, said
    assert "before anything leaves" not in claim
    assert any("must really have been drawn" in limit for limit in verdict["limits"])


def test_of_local_noise_and_none_under_masks_as_much_is_said_as_is_so(tmp_path: Path) -> None:
    local = verdict_of(fresh(LOCAL).write(tmp_path / "b"))
    assert (local["noise"], local["colluding"]) == ("local", None)
    assert "(local noise), against everyone but the partner itself" in local["claim"]
    assert any("no ledger shows" in limit for limit in local["limits"])
    assert not any("really have been drawn" in limit for limit in local["limits"])
    bare = verdict_of(fresh(BARE).write(tmp_path / "b"))
    assert bare["claim"].startswith("There is no differential privacy guarantee")
    assert all(p["unbounded"] for p in bare["partners"].values())
    private = verdict_of(fresh(FOUR).write(tmp_path / "b"))["partners"][P0]  # its histograms have noise of their own
    assert (private["noise"], private["colluding"]) == ("local and shared", 1)
    plain = verdict_of(fresh(SMALL).write(tmp_path / "b"))
    assert (plain["noise"], plain["colluding"], plain["secure_aggregation"]) == ("local", None, None)
    assert not any("mask" in limit for limit in plain["limits"])


def test_the_same_words_as_the_charter() -> None:
    for colluding in (None, 0, 1, 2, 50):
        assert verifier._adversary(colluding) == words.adversary(colluding)


def shared(colluding: int, quorum: int = 4, sigma: float = 90.0) -> dict[str, Any]:
    return dict(SharedGaussian(1.0, sigma, 1.0, 2.0**-12, 72, quorum, colluding, 1).to_fields())


@pytest.mark.parametrize("shape", [SMALL, SECURE, FOUR], ids=["local", "t=0", "t=1"])
@pytest.mark.parametrize("colluding", [0, 1, 2])
def test_epsilon_over_charters_holds_against_the_weakest_adversary(
    tmp_path: Path, shape: Shape, colluding: int
) -> None:
    made = fresh(shape)
    other_run(made, made.index(P0, "budget") + 1, "x", shared(colluding))
    made.item(P0, "budget").data["budget"]["epsilon"] = "9.0"  # room for both; its violation is not what is looked at
    verdict = verdict_of(made.write(tmp_path / "b"))
    assert {v["what"].split(":")[0] for v in verdict["violations"]} == {"budget"}
    partner = verdict["partners"][P0]
    assert partner["colluding"] == (colluding if shape.secure is None else min(colluding, shape.secure))
    assert partner["adversary"] == words.adversary(partner["colluding"])
    assert ("local" in partner["noise"], "shared" in partner["noise"]) == (shape is not SECURE, True)
    told = [w for w in verdict["warnings"] if "noise that partners share under another charter" in w["what"]]
    weaker = shape.secure is None or colluding < shape.secure
    assert bool(told) == weaker
    charter = Terms.parse(made.signed.payload)
    claim = verifier._claim(charter, verdict["partners"])
    assert (f"Of {P0} noise was shared under other charters too" in claim) == weaker
    if weaker:
        assert words.adversary(colluding) in claim
    others = [e for e in partner["events"] if e["charter"] == "other"]
    assert [e["shared"]["colluding"] for e in others] == [colluding]


def test_what_another_charter_shows_of_secure_aggregation_is_as_good_as_what_it_hides(tmp_path: Path) -> None:
    for shown in (False, True):
        made = fresh(SMALL)
        made.item(P0, "budget").data["budget"]["epsilon"] = "9.0"
        other_run(made, made.index(P0, "budget") + 1, "x", shared(0))
        debit = next(i for i in made.books[P0] if i.charter == OTHER and i.kind == "debit")
        debit.data["masked"] = {"attempt": 3, "agreement": digest("theirs")}
        place = made.books[P0].index(debit) + 2
        request = {"request_id": "y", "request_sha256": digest("y"), "run_id": "x", "round": 1}
        more = {"attempt": 3, "agreement": digest("theirs"), "survivors": ["a", "b"]}
        made.add(P0, "survivors", OTHER, place, **request, **more)
        for item in made.books[P0]:
            item.shown = (shown if item.kind in ("debit", "survivors") else None) if item.charter == OTHER else None
        verdict = verdict_of(made.write(tmp_path / "b"))
        assert {v["what"].split(":")[0] for v in verdict["violations"]} == {"budget"}


# -- a run of our own ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rounds of four hospitals, with our own nodes and coordinator."""
    folder = tmp_path_factory.mktemp("played")
    text = (ROOT / "configs" / "heart-shared.yaml").read_text(encoding="utf-8")
    (folder / "config.yaml").write_text(text.replace("rounds: 20", "rounds: 3").replace("quorum: 4", "quorum: 3"))
    assert run(["simulate", str(folder / "config.yaml"), "--out", str(folder / "b")]) == 0
    return folder / "b"


def test_a_run_of_our_own_is_verified(played: Path) -> None:
    verdict = verdict_of(played)
    assert (verdict["violations"], verdict["warnings"]) == ([], [])
    charter = json.loads((played / "result.json").read_text())["privacy"]
    assert (verdict["noise"], verdict["adversary"]) == (charter["noise"], charter["adversary"])
    for partner in verdict["partners"].values():
        assert (partner["rounds"], partner["noise"], partner["colluding"]) == (3, "shared", 0)
        assert 0 < partner["epsilon"] < partner["epsilon_filter"] < 1
    held = [json.loads(line)["body"] for line in (played / "partners/hungary/ledger.jsonl").read_text().splitlines()]
    (plan,) = next(body["data"]["plan"] for body in held if body["type"] == "hold")
    assert plan["count"] == 3


# -- what is not there -----------------------------------------------------------------------------------------

OF_A_CUT = {"entries_missing", "file", "genesis", "closing", "model"}


@pytest.mark.parametrize("owner", [P0, P1, P2, C])
def test_a_ledger_that_is_cut_or_missing_contradicts_nobody(tmp_path: Path, owner: str) -> None:
    made = fresh(SECURE)
    folder = made.write(tmp_path / "b")
    path = folder / made.file(owner)
    lines = path.read_bytes().splitlines(keepends=True)
    for kept in range(len(lines)):
        path.write_bytes(b"".join(lines[:kept]))
        verdict = verdict_of(folder)
        assert {v["code"] for v in verdict["violations"]} <= OF_A_CUT, (kept, verdict["violations"])
        assert {v["file"] for v in verdict["violations"]} == {made.file(owner)}
    path.unlink()
    assert {v["file"] for v in verdict_of(folder)["violations"]} == {made.file(owner)}


def test_two_lists_are_found_in_a_ledger_alone(tmp_path: Path) -> None:
    """All others are missing, and it has no end itself."""
    made = fresh(SECURE)
    again(P0, "survivors", request_id="x", survivors=[P0, P1])(made)
    folder = made.write(tmp_path / "b")
    for owner in (P1, P2, C):
        (folder / made.file(owner)).unlink()
    path = folder / L0
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: made.index(P0, "survivors", 1) + 1]))
    assert ("two_lists", L0) in {(v["code"], v["file"]) for v in verdict_of(folder)["violations"]}


# -- properly signed lies --------------------------------------------------------------------------------------


def of(d: Draft, owner: str, kind: str, number: int, attempt: int = 0, purpose: str = "") -> Any:
    """The one such entry of a round's attempt."""
    found = [
        item
        for item in d.books[owner]
        if item.kind == kind
        and item.data["round"] == number
        and item.data.get("masked", item.data).get("attempt", 0) == attempt
        and item.data.get("purpose", purpose) == (purpose or item.data.get("purpose", ""))
    ]
    return found[0]


def other_event(**fields: Any) -> Lie:
    """Another event throughout a partner's ledger; its plan has its own hash."""

    def lie(d: Draft) -> None:
        plan = d.entry(P0, "hold")["plan"]
        for one in (plan[0], *(i.data for i in d.books[P0] if i.kind == "debit" and i.data["purpose"] == "train")):
            one["event"] = {**one["event"], **fields}
            one["event"] = {k: v for k, v in one["event"].items() if v is not None}
        for item in d.books[P0]:
            if "plan_sha256" in item.data:
                item.data["plan_sha256"] = sha256(canonical(plan))

    return lie


def other_count(owner: str, count: int) -> Lie:
    def lie(d: Draft) -> None:
        plan = d.entry(owner, "hold")["plan"]
        plan[0]["count"] = count
        for item in d.books[owner]:
            if "plan_sha256" in item.data:
                item.data["plan_sha256"] = sha256(canonical(plan))

    return lie


def renumber(number: int, before: int, after: int, owners: tuple[str, ...] = (P0, P1, P2, C)) -> Lie:
    """An attempt of a round has another number in some ledgers."""

    def lie(d: Draft) -> None:
        for owner in owners:
            for item in d.books[owner]:
                about = item.data.get("masked", item.data)
                if (item.data.get("round"), about.get("attempt")) == (number, before):
                    about["attempt"] = after

    return lie


def agreed(number: int, agreement: str, owners: tuple[str, ...] = (P0, P1, P2)) -> Lie:
    """The first attempt of a round has another agreement."""

    def lie(d: Draft) -> None:
        for owner in owners:
            for kind in ("debit", "survivors"):
                data = of(d, owner, kind, number, 0, "train" if kind == "debit" else "").data
                data.get("masked", data)["agreement"] = agreement

    return lie


def lists(number: int, names: list[str], owners: tuple[str, ...] = (P0, P1, P2)) -> Lie:
    return lambda d: [of(d, owner, "survivors", number).data.update(survivors=list(names)) for owner in owners]


def answers(number: int, purpose: str, owners: tuple[str, ...], outcome: str = "timeout") -> Lie:
    def lie(d: Draft) -> None:
        replies = of(d, C, "answers", number, 0, purpose).data["replies"]
        for owner in owners:
            reply = None if outcome == "timeout" else replies[owner]["reply_sha256"]
            replies[owner].update(outcome=outcome, reply_sha256=reply)

    return lie


def unasked(number: int, purpose: str, owner: str) -> Lie:
    """The coordinator never asked it that."""

    def lie(d: Draft) -> None:
        del of(d, C, "ask", number, 0, purpose).data["requests"][owner]
        del of(d, C, "answers", number, 0, purpose).data["replies"][owner]

    return lie


def both(*lies: Lie) -> Lie:
    return lambda d: [lie(d) for lie in lies]


def without_list(owner: str, number: int) -> Lie:
    return lambda d: d.drop(owner, d.books[owner].index(of(d, owner, "survivors", number)))


def moved(owner: str, kind: str, nth: int, before: str) -> Lie:
    """An entry to before the next one of some type, or to just after the last."""

    def lie(d: Draft) -> None:
        item = d.books[owner].pop(d.index(owner, kind, nth))
        place = d.index(owner, before, nth) if before != "release" else d.index(owner, before) + 1
        d.books[owner].insert(place, item)

    return lie


def one_retry_too_many(d: Draft) -> None:
    """hospital-2, which has debits left, is asked again after a round that was counted."""
    place = d.index(C, "round", 0) + 1
    request = {"request_id": "more", "request_sha256": digest("more")}
    at_ = {"run_id": "run-1", "round": 1, "purpose": "train", "attempt": 1}
    reply = {"request_id": "more", "outcome": "ok", "reply_sha256": digest("reply")}
    d.add(C, "answers", None, place, **at_, replies={P2: reply})
    d.add(C, "ask", None, place, **at_, requests={P2: request})
    debit = copy.deepcopy(of(d, P2, "debit", 1, 0, "train").data) | request
    debit["masked"] = {"attempt": 1, "agreement": digest("more")}
    end = d.index(P2, "release")
    commit = request | {"run_id": "run-1", "round": 1, "reply_sha256": digest("reply")}
    d.add(P2, "commit", None, end, **commit)
    d.add(P2, "debit", None, end, **debit)


def vectorless(d: Draft) -> None:
    """hospital-2 is on the list of round 3, of which it never heard; it signed and helped all the same."""
    for purpose in ("agree", "reveal"):
        of(d, C, "ask", 3, 0, purpose).data["requests"][P2] = {"request_id": purpose, "request_sha256": digest(purpose)}
        reply = {"request_id": purpose, "outcome": "timeout", "reply_sha256": None}
        of(d, C, "answers", 3, 0, purpose).data["replies"][P2] = reply
    of(d, C, "round", 3).data["partners"].append(P2)
    lists(3, [P0, P1, P2], (P0, P1))(d)


def answered_twice(purpose: str) -> Lie:
    def lie(d: Draft) -> None:
        item = of(d, C, "answers", 1, 0, purpose)
        data = copy.deepcopy(item.data)
        data["replies"][P0]["reply_sha256"] = digest("other")
        d.add(C, "answers", None, d.books[C].index(item) + 1, **data)

    return lie


def asked_twice(purpose: str, **fields: Any) -> Lie:
    def lie(d: Draft) -> None:
        item = of(d, C, "ask", 1, 0, purpose)
        data = copy.deepcopy(item.data)
        data["requests"][P0].update(fields)
        d.add(C, "ask", None, d.books[C].index(item) + 1, **data)

    return lie


def fewer_than_the_quorum(d: Draft) -> None:
    """Two of four are summed where three were agreed; everybody says so."""
    names = [P0, P1]
    for purpose in ("agree", "reveal"):
        for owner in (P2, "hospital-3"):
            unasked(1, purpose, owner)(d)
    for owner in (P2, "hospital-3"):
        without_list(owner, 1)(d)
    lists(1, names, (P0, P1))(d)
    of(d, C, "round", 1).data["partners"] = names


def survivors_of_none(d: Draft) -> None:
    commit = d.entry(P0, "commit")
    more = {"attempt": 0, "agreement": digest("x"), "survivors": [P0, P1], "request_id": "x"}
    data = {k: v for k, v in commit.items() if k != "reply_sha256"} | more
    d.add(P0, "survivors", None, d.index(P0, "release"), **data)


def agree_of_none(d: Draft) -> None:
    requests = {P0: {"request_id": "x", "request_sha256": digest("x")}}
    d.add(C, "ask", None, d.index(C, "round"), run_id="run-1", round=1, purpose="agree", requests=requests)


def second_debit(d: Draft) -> None:
    debit = copy.deepcopy(of(d, P2, "debit", 1, 0, "train").data)
    d.add(P2, "debit", None, d.index(P2, "release"), **debit | {"request_id": "x", "request_sha256": digest("x")})


def masked(d: Draft) -> dict[str, Any]:
    found: dict[str, Any] = of(d, P0, "debit", 1, 0, "train").data
    return found


# What a lie must be found by; `also`: what else finds it, because a lie of this kind contradicts several ledgers.
LIES: list[tuple[str, Shape, Lie, str, str, str, set[str]]] = [
    # the whole event is what was agreed, not only what it is charged as
    ("event_colluding", FOUR, other_event(colluding=0), L0, "terms", "events are not the charter's", set()),
    ("event_quorum", FOUR, other_event(quorum=4), L0, "terms", "events are not the charter's", set()),
    ("event_both", FOUR, other_event(quorum=4, colluding=2), L0, "terms", "events are not the charter's", set()),
    ("event_dimension", SECURE, other_event(dimension=71), L0, "terms", "events are not the charter's", set()),
    ("event_grid", SECURE, other_event(grid=repr(grid_for(0.5, 72) / 2)), L0, "terms", "events are not the charter's", set()),
    ("event_clip", SECURE, other_event(clip="0.25"), L0, "terms", "events are not the charter's", set()),
    ("event_sigma", SECURE, other_event(sigma="33.0"), L0, "terms", "events are not the charter's", set()),
    ("event_local", SECURE, other_event(mechanism="poisson-gaussian/1", clip=None, grid=None, dimension=None, quorum=None, colluding=None), L0, "terms", "events are not the charter's", set()),
    ("debit_of_another_promise", FOUR, at(lambda d: masked(d)["event"], colluding=0), L0, "not_held", "not in its hold", {"privacy_differs"}),
    ("event_one_share", SECURE, other_event(colluding=1), L0, "layout", "fewer than two shares", {"run_order", "not_done"}),
    # retries are held
    ("hold_without_retries", SECURE, other_count(P2, 3), L2, "terms", "rounds, 3 and retries, 1", set()),
    ("hold_more_retries", replace(SECURE, sigma=60.0), other_count(P0, 5), L0, "terms", "rounds, 3 and retries, 1", set()),
    # debits
    ("debit_of_no_attempt", SECURE, lambda d: masked(d).pop("masked"), L0, "terms", "of no attempt", {"run_order", "not_asked"}),
    ("debit_of_an_attempt_that_is_none", SMALL, lambda d: d.entry(P0, "debit").update(masked={"attempt": 0, "agreement": digest("x")}), L0, "terms", "that is none", {"not_asked"}),
    ("evaluation_of_an_attempt", FOUR, lambda d: of(d, P0, "debit", 1, 0, "evaluate").data.update(masked={"attempt": 1, "agreement": digest("x")}), L0, "terms", "that is none", {"not_asked"}),
    ("attempt_beyond_retries", SECURE, renumber(2, 1, 2), L0, "terms", "debit: attempt 2, the charter has 1 retries", {"record", "not_asked"}),
    ("debited_twice", SECURE, second_debit, L2, "repeated", "was debited before", {"not_asked"}),
    ("one_agreement_for_two_rounds", TWICE, agreed(2, digest("agreement", "run-1", 1, 0, [P0, P1, P2])), L0, "repeated", "its agreement for another", set()),
    ("masked_malformed", SECURE, lambda d: masked(d)["masked"].update(agreement="x"), L0, "layout", "agreement", {"run_order", "not_done", "privacy_differs"}),
    ("masked_more", SECURE, lambda d: masked(d)["masked"].update(more=1), L0, "layout", "masked", {"run_order", "not_done", "privacy_differs"}),
    # survivors
    ("two_lists", SECURE, again(P0, "survivors", request_id="x", survivors=[P0, P1]), L0, "two_lists", "another list was signed", {"not_asked", "lists_differ"}),
    ("list_of_another_agreement", SECURE, change(P0, "survivors", agreement=digest("x")), L0, "run_order", "no vector of the same", set()),
    ("list_of_another_attempt", SECURE, change(P0, "survivors", attempt=1), L0, "run_order", "no vector of the same", {"not_asked"}),
    ("list_before_the_vector", SECURE, moved(P0, "survivors", 0, "commit"), L0, "run_order", "no vector of the same", set()),
    ("list_after_the_release", SECURE, moved(P0, "survivors", 3, "release"), L0, "run_order", "no open hold", set()),
    ("list_without_oneself", SECURE, lists(1, [P1, P2], (P0,)), L0, "terms", "a list without hospital-0", {"lists_differ"}),
    ("list_with_a_stranger", SECURE, lists(1, [P0, P1, P2, "hospital-9"]), L0, "terms", "somebody who is no partner", {"lists_differ"}),
    ("list_below_the_quorum", FOUR, fewer_than_the_quorum, L0, "terms", "2 survivors, agreed are 3", {"record"}),
    ("list_unsorted", SECURE, lists(1, [P1, P0, P2], (P0,)), L0, "layout", "survivors", {"not_done"}),
    ("list_with_one_twice", SECURE, lists(1, [P0, P0, P1, P2], (P0,)), L0, "layout", "survivors", {"not_done"}),
    ("list_without_the_section", SMALL, survivors_of_none, L0, "terms", "agrees to no secure aggregation", {"not_asked"}),
    # the coordinator's record
    ("ask_without_attempt", SECURE, lambda d: of(d, C, "ask", 1, 0, "train").data.pop("attempt"), COORD, "record", "to train without an attempt", {"not_asked"}),
    ("open_with_attempt", SECURE, lambda d: d.entry(C, "ask").update(attempt=0), COORD, "record", "to open with an attempt", {"not_asked"}),
    ("train_with_attempt_and_no_section", SMALL, lambda d: d.entry(C, "ask", 1).update(attempt=0), COORD, "record", "to train with an attempt", {"not_asked"}),
    ("agree_without_the_section", SMALL, agree_of_none, COORD, "terms", "agrees to no secure aggregation", set()),
    ("asked_beyond_retries", SECURE, renumber(2, 1, 2), COORD, "terms", "attempt 2, the charter has 1 retries", {"record", "not_asked"}),
    ("retries_in_a_whole_run", SECURE, one_retry_too_many, COORD, "terms", "2 attempts beyond the first", set()),
    ("agree_without_a_vector", SECURE, vectorless, COORD, "record", "who sent no vector in this attempt", set()),
    ("agree_below_the_quorum", FOUR, fewer_than_the_quorum, COORD, "record", "2 survivors, agreed are 3", {"terms"}),
    ("reveal_of_fewer", SECURE, unasked(1, "reveal", P2), COORD, "record", "to open a sum asked of others", set()),
    ("reveal_unsigned", SECURE, answers(1, "agree", (P1, P2)), COORD, "record", "whose list 1 signed, needed are 2", set()),
    ("fold_unopened", SECURE, answers(1, "reveal", (P1, P2)), COORD, "record", "that 1 helped to open, needed are 2", set()),
    ("fold_of_fewer", SECURE, lambda d: of(d, C, "round", 1).data["partners"].remove(P2), COORD, "record", "folds a sum over others", set()),
    ("fold_of_an_earlier_attempt", SECURE, lambda d: of(d, C, "round", 2).data["partners"].append(P2), COORD, "record", "who gave no ok answer", set()),
    ("agree_failed", SECURE, answers(1, "agree", (P0,), "failed"), COORD, "record", "no work can fail", set()),
    ("reveal_failed", SECURE, answers(1, "reveal", (P0,), "failed"), COORD, "record", "no work can fail", set()),
    ("agree_answered_twice", SECURE, answered_twice("agree"), COORD, "record", "twice, differently", set()),
    ("agree_asked_twice", SECURE, asked_twice("agree", request_sha256=digest("x")), COORD, "record", "asked again with other", set()),
    ("reveal_asked_twice", SECURE, asked_twice("reveal", request_id="x"), COORD, "record", "asked again with other", set()),
    # both
    ("signed_but_no_list", SECURE, without_list(P0, 1), L0, "not_done", "no list of survivors for the ok answer to agree", set()),
    ("list_not_asked_for", SECURE, again(P0, "survivors", request_id="x"), L0, "not_asked", "a list of survivors that", set()),
    ("list_of_another_request", SECURE, change(P0, "survivors", request_sha256=digest("x")), L0, "not_asked", "a list of survivors that", set()),
    ("attempt_not_asked_for", SECURE, renumber(1, 0, 1, (P0,)), L0, "not_asked", "a debit that", set()),
    ("reveal_refused_in_one_ledger", SECURE, answers(1, "reveal", (P2,), "refused: paused"), L2, "not_done", "no refusal for 'paused' to reveal", set()),
    ("shown_another_attempt", SECURE, agreed(1, digest("x"), (P1,)), L1, "lists_differ", "another agreement for attempt 0 of round 1", set()),
    ("signed_another_list", SECURE, lists(1, [P1, P2], (P1,)), L1, "lists_differ", "than hospital-0 signed", set()),
    ("signed_others_than_asked", SECURE, both(lists(1, [P0, P1], (P0, P1)), without_list(P2, 1), answers(1, "agree", (P2,))), L0, "lists_differ", "than those who were asked", set()),
]  # fmt: skip


@pytest.mark.parametrize(("name", "shape", "lie", "file", "code", "what", "also"), LIES, ids=[row[0] for row in LIES])
def test_signed_lie_is_found(
    tmp_path: Path, name: str, shape: Shape, lie: Lie, file: str, code: str, what: str, also: set[str]
) -> None:
    made = fresh(shape)
    lie(made)
    verdict = verdict_of(made.write(tmp_path / "b"))
    found = [v for v in verdict["violations"] if (v["file"], v["code"]) == (file, code) and what in v["what"]]
    assert found, verdict["violations"]
    assert not any("malformed (" in v["what"] for v in verdict["violations"])
    assert {v["code"] for v in verdict["violations"]} == {code} | also, verdict["violations"]


def test_reveal_is_asked_again_with_other_words(tmp_path: Path) -> None:
    """After a crash it tells of others who signed. Who then refuses has refused one of the two."""
    made = fresh(SECURE)
    asked_twice("reveal", request_sha256=digest("again"))(made)
    answered_twice("reveal")(made)
    assert verdict_of(made.write(tmp_path / "b"))["violations"] == []
    for said in (digest("again"), of(made, C, "ask", 1, 0, "reveal").data["requests"][P0]["request_sha256"]):
        made = fresh(SECURE)
        asked_twice("reveal", request_sha256=digest("again"))(made)
        answers(1, "reveal", (P0,), "refused: paused")(made)
        request = of(made, C, "ask", 1, 0, "reveal").data["requests"][P0]["request_id"]
        refusal = {"run_id": "run-1", "round": 1, "reason": "paused", "detail": "x", "request_sha256": said}
        made.add(P0, "refuse", None, made.index(P0, "release"), request_id=request, **refusal)
        assert verdict_of(made.write(tmp_path / "b"))["violations"] == []


def test_a_list_that_was_signed_may_be_refused_when_it_is_asked_for_again(tmp_path: Path) -> None:
    """A site that paused meanwhile refuses everything that is not answered from its outbox; its first answer was lost."""
    made = fresh(SECURE)
    answers(1, "agree", (P2,), "refused: paused")(made)
    asked = of(made, C, "ask", 1, 0, "agree").data["requests"][P2]
    about = {"run_id": "run-1", "round": 1, "reason": "paused", "detail": "x"}
    made.add(P2, "refuse", None, made.index(P2, "release"), **asked, **about)
    verdict = verdict_of(made.write(tmp_path / "b"))
    assert verdict["violations"] == []
    assert [w["what"] for w in verdict["warnings"] if w["code"] == "unanswered"] == [
        "a list of survivors whose answer the coordinator did not record"
    ]


def of_any(made: Draft, kind: str, number: int, purpose: str) -> Item:
    """The first question or answer of that round, with an attempt or without."""
    return next(
        i for i in made.books[C] if i.kind == kind and (i.data["round"], i.data["purpose"]) == (number, purpose)
    )


@pytest.mark.parametrize("first", ["refused", "done"])
@pytest.mark.parametrize(("purpose", "kind"), [("open", "hold"), ("train", "commit"), ("evaluate", "public")])
def test_what_was_done_may_be_refused_before_or_after(tmp_path: Path, purpose: str, kind: str, first: str) -> None:
    """A site that paused is asked again later, and its answer is lost; or it is asked again when its run is over, and its key gone."""
    number, silent = (0, ((1, 0, "train", P2),)) if purpose == "open" else (1, ())
    made = fresh(Shape(partners=3, rounds=1, quorum=2, silent=silent))
    if purpose == "train":
        made.entry(C, "round")["partners"].remove(P2)
    asks, replies = (of_any(made, kind, number, purpose).data for kind in ("ask", "answers"))
    asked = asks["requests"][P2]
    replies["replies"][P2] |= {"outcome": "refused: paused", "reply_sha256": digest("no")}
    books = made.books[P2]
    (at_act,) = (n for n, i in enumerate(books) if i.kind == kind and i.data["request_id"] == asked["request_id"])
    about = {"run_id": "run-1", "round": number or None, "reason": "paused", "detail": "x"}
    made.add(P2, "refuse", None, at_act if first == "refused" else at_act + 1, **asked, **about)
    verdict = verdict_of(made.write(tmp_path / "b"))
    assert verdict["violations"] == []
    assert [w["what"] for w in verdict["warnings"]] == [f"a {kind} whose answer the coordinator did not record"]


# -- result.json ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [("kind", "local"), ("noise", "local"), ("noise", None), ("adversary", words.ADVERSARY), ("adversary", None)],
)
def test_result_says_another_noise_or_adversary(tmp_path: Path, key: str, value: str | None) -> None:
    made = fresh(SECURE)
    made.result = result_for(made, verdict_of(made.write(tmp_path / "b")))
    made.result["privacy"][key] = value
    if value is None:
        del made.result["privacy"][key]
    (found,) = verdict_of(made.write(tmp_path / "b"))["violations"]
    assert found["code"] == "result"
    assert found["what"].startswith(f"privacy: {key}" if key != "kind" else "privacy is not the charter's")


def test_result_counts_a_round_once(tmp_path: Path) -> None:
    made = fresh(SECURE)
    made.result = result_for(made, verdict_of(made.write(tmp_path / "b")))
    made.result["partners"][P0]["rounds"] = 4  # attempts
    assert [v["code"] for v in verdict_of(made.write(tmp_path / "b"))["violations"]] == ["result"]


# -- the charter ------------------------------------------------------------------------------------------------


def charter_of(shape: Shape, damage: Callable[[dict[str, Any]], Any]) -> Terms:
    fields = json.loads(signed_charter(shape)[0].payload)
    damage(fields)
    return Terms.parse(canonical(fields))


def secure(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda c: c["secure_aggregation"].update(fields)


def local(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda c: c["algorithm"]["local"].update(fields)


@pytest.mark.parametrize(
    ("shape", "damage", "what"),
    [
        (SECURE, lambda c: c.pop("secure_aggregation"), "without secure aggregation"),
        (SECURE, lambda c: c.update(secure_aggregation=None), "exactly the fields"),
        (SECURE, secure(more=1), "exactly the fields"),
        (SECURE, secure(colluding=-1), "colluding"),
        (SECURE, secure(colluding=99), "colluding"),
        (SECURE, secure(retries=10**6 + 1), "retries"),
        (SECURE, secure(dimension=0), "dimension"),
        (SECURE, secure(dimension=10**9 + 1), "dimension"),
        (SECURE, secure(colluding=True), "colluding"),
        (SECURE, secure(colluding=1), "cannot keep"),  # quorum 2, needed are 3
        (SECURE, lambda c: c.update(quorum=1), "cannot keep"),
        (SECURE, lambda c: c.update(quorum=4), "cannot keep"),
        (BARE, lambda c: c.update(quorum=1), "cannot keep"),
        (BARE, secure(colluding=2), "cannot keep"),  # a sum over all three, of which one alone would be protected by nobody
        (BARE, lambda c: c.update(partners=c["partners"][:2], quorum=2), "cannot keep"),
        (Shape(partners=5, rounds=1, steps=1, kind="shared", quorum=3, secure=0), secure(colluding=1), "cannot keep"),  # 2 * 3 - 5 = 1
        (SECURE, local(steps=2), "not one plain step"),
        (SECURE, lambda c: c["algorithm"]["local"]["optimizer"].update(name="adam"), "not one plain step"),
        (SECURE, lambda c: c["algorithm"]["local"]["optimizer"].update(momentum="0.9"), "not one plain step"),
        (SECURE, lambda c: c["algorithm"]["strategy"].update(name="fedprox"), "not one plain step"),
        (SECURE, lambda c: c["algorithm"].update(weighting="uniform"), "not one plain step"),
        (SECURE, lambda c: c["privacy"].update(noise_multiplier="0.3"), "charged as sigma"),
        (SECURE, lambda c: c["privacy"].update(noise_multiplier="0.2"), "allowed are"),
        (SECURE, lambda c: c["algorithm"].update(average_last="0.0"), "average_last"),
        (SECURE, lambda c: c["algorithm"].update(average_last="1.5"), "average_last"),
        (SECURE, lambda c: c["algorithm"].update(average_last=None), "decimal"),
        (SECURE, lambda c: c["privacy"].update(kind="other"), "malformed"),
    ],
)  # fmt: skip
def test_charter_whose_promise_cannot_be_kept(shape: Shape, damage: Callable[[dict[str, Any]], Any], what: str) -> None:
    charter_of(shape, lambda c: None)
    with pytest.raises(Bad, match=re.escape(what)):
        charter_of(shape, damage)


def test_a_population_has_no_secure_aggregation() -> None:
    clients = Shape(clients=1000, rounds=1, participation=0.1, evaluation="none", sigma=30.0)
    added = {"secure_aggregation": {"colluding": 0, "retries": 0, "dimension": 5}}
    with pytest.raises(Bad, match="cannot keep"):
        charter_of(clients, lambda c: c.update(added, quorum=3))


def test_charter_that_is_fine() -> None:
    terms = charter_of(SECURE, lambda c: c["algorithm"].update(average_last="0.5"))
    assert (terms.attempts, terms.colluding) == (4, 0)
    assert charter_of(LOCAL, lambda c: None).colluding is None
    assert charter_of(SMALL, lambda c: None).secure is None
    biggest = Shape(partners=100, rounds=1, steps=1, kind="shared", quorum=100, secure=98)
    assert charter_of(biggest, lambda c: None).colluding == 98


# -- the event --------------------------------------------------------------------------------------------------


def test_charged_as_our_own_accounting_charges_it() -> None:
    rng = random.Random(5)
    taken = 0
    for _ in range(3000):
        q, sigma, clip = rng.choice([1.0, 0.1]), 10 ** rng.uniform(-1, 3), 10 ** rng.uniform(-3, 3)
        dimension, colluding = rng.choice([1, 72, 10**4, 10**7, 10**9]), rng.randint(0, 3)
        quorum, grid = colluding + rng.randint(1, 98), grid_for(clip, dimension) * 2.0 ** rng.randint(-3, 12)
        fields: dict[str, Any] = {
            "mechanism": "shared-gaussian/1",
            "q": repr(q),
            "sigma": repr(sigma),
            "clip": repr(clip),
        }
        fields |= {"grid": repr(grid), "dimension": dimension, "quorum": quorum, "colluding": colluding, "steps": 3}
        try:
            charged = SharedGaussian(q, sigma, clip, grid, dimension, quorum, colluding, 3).charged
        except HansaError:
            with pytest.raises(Bad):
                verifier._event(fields)
            continue
        found = verifier._event(fields)
        assert isinstance(found, verifier.Shared)
        assert (found.q, found.steps) == (charged.sampling_rate, charged.steps)
        assert found.sigma == pytest.approx(charged.noise_multiplier, rel=1e-13)
        assert found[3:] == (sigma, clip, grid, dimension, quorum, colluding)
        taken += 1
    assert 500 < taken < 2900


def test_the_grid_is_the_charters() -> None:
    rng = random.Random(6)
    for _ in range(3000):
        clip, dimension = 10 ** rng.uniform(-6, 6), rng.randint(1, 10**9)
        grid = verifier._grid(clip, dimension)
        assert grid == grid_for(clip, dimension)
        assert grid <= clip / (256 * dimension**0.5) < 2 * grid
    assert verifier._grid(1.0, 1) == 2.0**-8  # itself a power of two
    assert verifier._grid(1.0, 72) == 2.0**-12


@pytest.mark.parametrize(
    "fields",
    [
        {"clip": "0"}, {"clip": "-1"}, {"grid": "0"}, {"grid": "-0.001"}, {"dimension": 0}, {"dimension": 72.0}, {"quorum": 1},
        {"quorum": True}, {"colluding": 3}, {"colluding": -1}, {"steps": 0}, {"q": "0"}, {"q": "1.1"}, {"sigma": "0.2"}, {"grid": "6.0"},
        {"more": 1}, {"sigma": "inf"}, {"clip": 1.0}, {"grid": "1e308"}, {"clip": "1e-300"}, {"dimension": 10**9 + 1},
    ],
)  # fmt: skip
def test_events_that_are_none(fields: dict[str, Any]) -> None:
    good: dict[str, Any] = shared(0)
    assert verifier._event(good)
    with pytest.raises(Bad):
        verifier._event(good | fields)


def test_extreme_events_are_answered() -> None:
    """No number overflows; more noise than 10⁹ is charged as that."""
    for fields in ({"sigma": "1e300"}, {"sigma": "1e300", "clip": "1e300"}, {"grid": "1e-300"}, {"grid": "1e-320"}):
        found = verifier._event(shared(0) | fields)
        assert isinstance(found, verifier.Shared)
        assert 80 < found.sigma <= 1e9


def test_two_events_of_one_price_are_two(tmp_path: Path) -> None:
    """What is held of one is not there for the other, in headers alone as well."""
    made = fresh(SMALL)
    made.item(P0, "budget").data["budget"]["epsilon"] = "9.0"
    event = verifier._event(shared(0))
    assert event is not None
    other_run(made, made.index(P0, "budget") + 1, "x", shared(0))
    debit = next(i for i in made.books[P0] if i.charter == OTHER and i.kind == "debit")
    for instead in (shared(0, quorum=3), shared(1), gaussian(event[1], steps=1)):
        changed = copy.deepcopy(made)
        changed.books[P0][made.books[P0].index(debit)].data["event"] = instead
        verdict = verify_bundle(changed.write(tmp_path / "b"))
        assert "not_held" in {v["code"] for v in verdict["violations"]}
