"""Every refusal, before data is touched; and a budget that no crash, restart or second charter can stretch."""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hansa.clients import gate as module
from hansa.clients.datasets import RegisteredDataset
from hansa.clients.gate import Gate
from hansa.common.accounting import Budget, PrivacyEvent
from hansa.common.charter import SignedCharter
from hansa.common.errors import CharterError, DataError, LedgerError, Refusal, Refused
from hansa.common.ledger import Counter as Counts
from hansa.common.ledger import read_ledger
from hansa.common.messages import Manifest
from hansa.common.plan import evaluated_rounds, plan_of, plan_sha256
from support import (
    CODE,
    EXPIRES,
    NO_PRIVACY,
    SIGMA,
    Site,
    Source,
    charter,
    digest,
    forbidden,
    identity,
    request,
    tiny_task,
)

EVENT = PrivacyEvent(1.0, SIGMA, 1)
PRIVATE = {"kind": "private", "noise_multiplier": 8.0, "every": 2}
BUDGET = Budget.create(2.0, 1e-3)
FITS = BUDGET.most_steps(1.0, SIGMA) // 3  # runs of three rounds that the budget of `charter()` pays


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site("ada", tmp_path, Source())
    made.source.hook = forbidden  # a gate never reads data
    yield made
    if made.ledger is not None:
        made.ledger.close()


@contextlib.contextmanager
def refused(reason: Refusal, words: str = "") -> Iterator[None]:
    with pytest.raises(Refused, match=words or None) as caught:
        yield
    assert caught.value.reason is reason


def opened(gate: Gate, signed: SignedCharter, run: str = "run-1") -> None:
    ask = request(signed, "open", 0, run=run)
    gate.open_run(ask, digest(ask))


def train(gate: Gate, signed: SignedCharter, number: int = 1, run: str = "run-1", **changes: Any) -> Manifest:
    """Debit one round; returns the request."""
    ask = request(signed, "train", number, run=run, **changes)
    assert gate.debit(ask, digest(ask), "train") is None
    return ask


def committed(gate: Gate, ask: Manifest) -> None:
    gate.commit(ask, digest(ask), digest("reply"), public=False)


def exhaust(gate: Gate, signed: SignedCharter) -> None:
    """Hold runs until no more fits."""
    for number in range(FITS):
        opened(gate, signed, f"full-{number}")


# -- accepting a charter ---------------------------------------------------------------------------------------------


def test_a_charter_is_recorded_once_and_costs_nothing(site: Site) -> None:
    gate = site.gate(charter(), charter())
    assert site.kinds() == ["genesis", "dataset", "charter"]
    site.gate(charter())
    assert site.kinds() == ["genesis", "dataset", "charter"]
    assert gate.spent() == []
    assert gate.spent_epsilon() is None


def test_not_signed_by_everyone(site: Site) -> None:
    signed = charter()
    with pytest.raises(CharterError, match="not signed by cy"):
        site.gate(SignedCharter(signed.payload, tuple(s for s in signed.signatures if s[0] != identity("cy").key)))
    assert site.kinds() == ["genesis", "dataset"]


def test_expired_when_accepted(site: Site) -> None:
    with pytest.raises(CharterError, match="expired"):
        site.gate(charter(expires=datetime(2026, 1, 2, tzinfo=UTC)))


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [
        ({"simulated": False}, Refusal.SIMULATED, "simulated charter never"),
        ({"task__code_sha256": "d" * 64}, Refusal.TASK_CODE, "pins task code dddd"),
        (
            {"partners": [{"name": n, "key": identity(n).key, "declared_records": 40} for n in ("ben", "cy")]},
            Refusal.NOT_A_PARTNER,
            "ada with this key",
        ),
        (
            {"partners": [{"name": "ada", "key": identity("eve").key, "declared_records": 40}]},
            Refusal.NOT_A_PARTNER,
            "ada with this key",
        ),
    ],
)
def test_charters_that_are_not_for_this_gate(site: Site, change: dict[str, Any], reason: Refusal, words: str) -> None:
    signed = charter(**{**change, "quorum": 1})
    gate = site.gate()
    with refused(reason, words):
        gate.accept(signed, site.dataset, CODE)
    assert site.kinds() == ["genesis", "dataset"]
    with refused(Refusal.CHARTER_UNKNOWN):
        opened(gate, signed)


def test_a_real_gate_takes_no_simulated_charter_and_the_reverse(site: Site) -> None:
    site.simulated = False
    gate = site.gate()
    with refused(Refusal.SIMULATED):
        gate.accept(charter(), site.dataset, CODE)
    gate.accept(charter(simulated=False), site.dataset, CODE)
    opened(gate, charter(simulated=False))


@pytest.mark.parametrize("real_size", [35, 36, 44, 45])
def test_the_declared_size_within_its_tolerance(tmp_path: Path, real_size: int) -> None:
    site = Site("ada", tmp_path, Source(n=real_size))
    if real_size in (36, 44):  # 40 declared, 10 %
        site.gate(charter())
    else:
        with refused(Refusal.DATA, "within 10% of the declared 40"):
            site.gate(charter())


def test_a_ledger_is_of_one_dataset(site: Site, tmp_path: Path) -> None:
    """A new registration would begin with an unspent budget: the ledger of the old one does not serve it."""
    site.gate(charter())
    (tmp_path / "data" / "dataset.json").unlink()
    with pytest.raises(LedgerError, match="which is not registered here"):
        site.gate(charter())


def test_a_simulated_ledger_is_none_of_a_real_gate(site: Site) -> None:
    site.gate(charter())
    site.simulated = False
    with pytest.raises(LedgerError, match="says simulated: True"):
        site.gate()


# -- holds -----------------------------------------------------------------------------------------------------------


def test_a_hold_reserves_the_whole_plan(site: Site) -> None:
    signed = charter()
    gate = site.gate(signed)
    exhaust(gate, signed)
    with refused(Refusal.BUDGET, r"spent and held so far epsilon .*, with this run .*, cap 2 \(delta 0.001"):
        opened(gate, signed, "one-too-many")
    gate = site.gate(signed)
    with refused(Refusal.BUDGET):
        opened(gate, signed, "one-too-many")
    assert site.kinds().count("hold") == FITS > 0
    assert site.kinds().count("budget") == 1


def test_a_release_frees_only_what_was_never_debited(site: Site) -> None:
    signed = charter()
    gate = site.gate(signed)
    exhaust(gate, signed)
    asks = [train(gate, signed, n, "full-0") for n in (1, 2)]
    committed(gate, asks[0])
    gate.close_run("full-0", signed.sha256)
    gate.close_run("full-0", signed.sha256)
    assert site.kinds().count("release") == 1
    with refused(Refusal.BUDGET):
        opened(gate, signed, "whole")  # three rounds do not fit into what one left
    short = charter(algorithm__rounds=1)
    gate = site.gate(signed, short)
    opened(gate, short, "short")
    with refused(Refusal.BUDGET):
        opened(gate, short, "short-2") if BUDGET.most_steps(1.0, SIGMA) % 3 == 0 else exhaust_one_by_one(gate, short)


def exhaust_one_by_one(gate: Gate, short: SignedCharter) -> None:
    """Holds of one round until the budget says no (the remainder of the division by three)."""
    for number in range(4):
        opened(gate, short, f"rest-{number}")


def test_two_charters_share_one_budget(site: Site) -> None:
    """The first charter's cap is the dataset's for ever; another charter with a larger one changes nothing."""
    signed, greedy = charter(), charter(name="greedy", privacy__epsilon=50.0)
    gate = site.gate(signed, greedy)
    exhaust(gate, signed)
    for fresh in site.and_after_a_restart(gate, greedy, signed):
        with refused(Refusal.BUDGET, "cap 2"):
            opened(fresh, greedy, "greedy")


def test_who_never_ran_here_is_not_told_what_others_spent(site: Site) -> None:
    signed, greedy = charter(), charter(name="greedy", privacy__epsilon=50.0)
    gate = site.gate(signed, greedy)
    exhaust(gate, signed)
    with refused(Refusal.BUDGET, "with what other charters took, the rest does not pay for this run; cap 2"):
        opened(gate, greedy, "greedy")
    with refused(Refusal.BUDGET, "spent and held so far epsilon"):
        opened(gate, signed, "one-too-many")  # its own


def test_a_charter_s_own_cap_holds_where_the_dataset_s_is_larger(site: Site) -> None:
    """What a partner signed is what its charter says, whatever another charter agreed to before."""
    rich, poor = charter(name="rich", privacy__epsilon=50.0), charter(name="poor", privacy__epsilon=0.1)
    gate = site.gate(rich, poor)
    opened(gate, rich, "first")
    with refused(Refusal.BUDGET, "cap 0.1"):
        opened(gate, poor, "second")
    opened(gate, rich, "third")


def test_a_refused_run_does_not_fix_the_budget(site: Site) -> None:
    poor, signed = charter(name="poor", privacy__epsilon=0.01), charter()
    gate = site.gate(poor, signed)
    with refused(Refusal.BUDGET):
        opened(gate, poor, "too much")
    assert "budget" not in site.kinds()
    opened(gate, signed)
    assert site.kinds().count("budget") == 1


def test_a_lost_ledger_is_not_a_fresh_budget(site: Site) -> None:
    signed = charter()
    opened(site.gate(signed), signed)
    assert site.ledger is not None
    site.ledger.close()
    site.dataset.bind("0" * 32)  # the one that it has: nothing happens
    with pytest.raises(LedgerError, match="in another ledger"):
        site.dataset.bind("1" * 32)
    kept = RegisteredDataset.register(tiny_task(), Source(), site.folder / "data", public=True)
    with pytest.raises(LedgerError, match="Restore that ledger"):
        kept.bind("1" * 32)


def test_an_expired_hold_comes_free(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator that opens runs and stays away must not block the budget for ever."""
    short, signed = charter(name="short"), charter(expires=EXPIRES + timedelta(days=900))
    gate = site.gate(short, signed)
    exhaust(gate, short)
    with refused(Refusal.BUDGET):
        opened(gate, signed, "later")

    class Later(datetime):
        @classmethod
        def now(cls, zone: object = None) -> datetime:  # type: ignore[override]
            return EXPIRES + timedelta(days=1)

    # A reader of the ledger cannot free them, and counts as the gate will.
    (lineage,) = gate._standing.accounts
    assert gate._standing.held(lineage) == gate._standing.held(lineage, at=EXPIRES - timedelta(seconds=1)) != []
    assert gate._standing.held(lineage, at=EXPIRES) == []
    monkeypatch.setattr(module, "datetime", Later)
    opened(gate, signed, "later")
    released = [e.body["why"] for e in gate.ledger.of("release")]
    assert len(released) >= FITS
    assert set(released) == {"expired"}


def test_held_out_rows_that_are_private_never_leave_as_public(tmp_path: Path) -> None:
    site = Site("ada", tmp_path, Source(), public=False)
    with refused(Refusal.DATA, "not registered as public"):
        site.gate(charter(evaluation={"kind": "public"}))
    assert site.ledger is not None
    site.ledger.close()


def test_opening_again_is_the_same_hold(site: Site) -> None:
    signed = charter()
    gate = site.gate(signed)
    opened(gate, signed)
    opened(gate, signed)
    opened(site.gate(signed), signed)
    assert site.kinds().count("hold") == 1
    gate = site.gate(signed)
    other = request(signed, "open", 0, request_id="another")
    with refused(Refusal.REPLAY, "already held"):
        gate.open_run(other, digest(other))
    with refused(Refusal.REPLAY, "other content"):
        gate.open_run(request(signed, "open", 0), digest("other"))


def test_expired_after_it_was_accepted(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    signed = charter()
    gate = site.gate(signed)
    opened(gate, signed)
    ask = train(gate, signed, 1)

    class Later:
        @staticmethod
        def now(zone: object) -> datetime:
            return signed.charter.expires + timedelta(seconds=0)

    monkeypatch.setattr(module, "datetime", Later)
    for step in (
        lambda: opened(gate, signed, "run-2"),
        lambda: train(gate, signed, 2),
        lambda: gate.debit(ask, digest(ask), "train"),
        lambda: gate.admit_public(request(signed, "evaluate", 1), digest("e")),
    ):
        with refused(Refusal.CHARTER_EXPIRED, "expired"):
            step()
    gate.close_run("run-1", signed.sha256)
    assert site.kinds()[-1] == "release"


def test_a_run_is_closed_under_its_own_charter_alone(site: Site) -> None:
    """Another charter's coordinator cannot end it."""
    signed, other = charter(), charter(name="other")
    gate = site.gate(signed, other)
    opened(gate, signed)
    with refused(Refusal.CHARTER_UNKNOWN):
        gate.close_run("run-1", "e" * 64)
    assert gate.close_run("run-1", other.sha256) == gate.ledger.head(), "no such run under that charter"
    train(gate, signed)
    assert "release" not in site.kinds()


# -- debits ----------------------------------------------------------------------------------------------------------


def test_a_debit_carries_every_parameter_an_auditor_needs(site: Site) -> None:
    signed = charter()
    gate = site.gate(signed)
    opened(gate, signed)
    ask = train(gate, signed, 1)
    assert site.ledger is not None
    assert site.ledger.entries[-1].charter == signed.sha256
    assert site.ledger.entries[-1].privacy == {"lineage": site.dataset.lineage, "debit": EVENT.to_fields()}
    assert site.ledger.entries[-1].body == {
        "request_id": ask.request_id,
        "request_sha256": digest(ask),
        "run_id": "run-1",
        "round": 1,
        "purpose": "train",
        "plan_sha256": plan_sha256(plan_of(signed.charter)),
        "dataset": site.dataset.dataset_id,
        "event": {"mechanism": "poisson-gaussian/1", "q": "1.0", "sigma": "4.0", "steps": 1},
        "clip_norm": "1.0",
        "declared_records": 40,
    }
    assert gate.spent() == [EVENT]


def test_debited_but_not_committed_runs_again_and_is_charged_once(site: Site) -> None:
    signed = charter()
    opened(site.gate(signed), signed)
    ask = train(site.gate(signed), signed)
    for _ in range(3):
        gate = site.gate(signed)
        assert gate.debit(ask, digest(ask), "train") is None
    assert gate.spent() == [EVENT]
    committed(gate, ask)
    for fresh in site.and_after_a_restart(gate, signed):
        assert fresh.debit(ask, digest(ask), "train") == digest("reply"), "answered only from the outbox"
    assert site.kinds().count("debit") == site.kinds().count("commit") == 1


def test_the_same_id_with_another_hash(site: Site) -> None:
    signed = charter(evaluation={"kind": "public"})
    gate = site.gate(signed)
    opened(gate, signed)
    ask = train(gate, signed)
    for fresh in site.and_after_a_restart(gate, signed):
        for do in (
            fresh.debit,
            lambda a, h, _, g=fresh: g.admit_public(a, h),
            lambda a, h, _, g=fresh: g.open_run(a, h),
        ):
            with refused(Refusal.REPLAY, "other content"):
                do(ask, digest("other"), "train")
    assert gate.spent() == [EVENT]


def test_rounds(site: Site) -> None:
    signed = charter()
    gate = site.gate(signed)
    opened(gate, signed)
    for number in (0, -1, 4, 10**9):
        with refused(Refusal.ROUND, f"round {number} is not one to train"):
            train(gate, signed, number)
    train(gate, signed, 1)
    with refused(Refusal.ROUND):
        train(site.gate(signed), signed, 1, request_id="another")
    assert site.kinds().count("debit") == 1


def test_more_rounds_than_held(site: Site) -> None:
    """The rounds run out also where round numbers would allow more (here: another charter's run cannot lend any)."""
    signed, longer = charter(), charter(algorithm__rounds=4)
    gate = site.gate(signed, longer)
    opened(gate, signed)
    with refused(Refusal.NOT_HELD, "not open here"):
        train(gate, longer, 4)
    for number in (1, 2, 3):
        committed(gate, train(gate, signed, number))
    with refused(Refusal.NOT_HELD, "nothing more is held for train"):
        train(gate, signed, 3, request_id="another")


def test_what_needs_an_open_hold(site: Site) -> None:
    signed = charter(evaluation={"kind": "public"})
    gate = site.gate(signed)
    ask = request(signed, "evaluate", 1)
    with refused(Refusal.NOT_HELD, "not open here"):
        train(gate, signed)
    with refused(Refusal.NOT_HELD, "not open here"):
        gate.admit_public(ask, digest(ask))
    opened(gate, signed)
    pending = train(gate, signed)
    gate.close_run("run-1", signed.sha256)
    for fresh in site.and_after_a_restart(gate, signed):
        with refused(Refusal.NOT_HELD, "not open here"):
            train(fresh, signed, 2)
        with refused(Refusal.NOT_HELD, "not open here"):
            fresh.debit(pending, digest(pending), "train")
        with refused(Refusal.NOT_HELD, "not open here"):
            fresh.admit_public(ask, digest(ask))
    assert fresh.close_run("unknown", signed.sha256) == fresh.close_run("run-1", signed.sha256)


def test_private_evaluation_is_charged_as_its_own_event(site: Site) -> None:
    signed = charter(evaluation=PRIVATE)
    gate = site.gate(signed)
    opened(gate, signed)
    for number in (2, 3):
        ask = request(signed, "evaluate", number)
        assert gate.debit(ask, digest(ask), "evaluate") is None
    assert gate.spent() == [PrivacyEvent(1.0, 8.0, 1)] * 2
    assert site.ledger is not None
    assert site.ledger.entries[-1].body["clip_norm"] is None
    with refused(Refusal.NOT_HELD, "nothing more is held for evaluate"):
        ask = request(signed, "evaluate", 1)
        gate.debit(ask, digest(ask), "evaluate")
    with refused(Refusal.NOT_HELD, "no public evaluation"):
        gate.admit_public(request(signed, "evaluate", 1, request_id="p"), digest("p"))


def test_public_evaluation_is_free_and_once_a_round(site: Site) -> None:
    signed = charter(evaluation={"kind": "public"})
    gate = site.gate(signed)
    opened(gate, signed)
    ask = request(signed, "evaluate", 1)
    assert gate.admit_public(ask, digest(ask)) is None
    assert gate.admit_public(ask, digest(ask)) is None, "nothing was answered yet"
    gate.commit(ask, digest(ask), digest("r"), public=True)
    for fresh in site.and_after_a_restart(gate, signed):
        assert fresh.admit_public(ask, digest(ask)) == digest("r")
        other = request(signed, "evaluate", 1, request_id="another")
        with refused(Refusal.ROUND):
            fresh.admit_public(other, digest(other))
        with refused(Refusal.ROUND):
            fresh.admit_public(request(signed, "evaluate", 4), digest("4"))
    assert fresh.spent() == []
    with refused(Refusal.NOT_HELD, "nothing more is held for evaluate"):
        ask = request(signed, "evaluate", 2)
        fresh.debit(ask, digest(ask), "evaluate")


def test_unprotected_must_be_allowed_and_makes_the_budget_unbounded(site: Site) -> None:
    site.allow_unprotected = True
    plain, local = charter(privacy=NO_PRIVACY), charter()
    gate = site.gate(plain, local)
    opened(gate, local, "before")
    opened(gate, plain, "plain")
    assert not gate.unbounded()
    train(gate, plain, 1, "plain")
    for fresh in site.and_after_a_restart(gate, plain, local):
        assert fresh.unbounded()
        assert fresh.spent_epsilon() is None
        with refused(Refusal.BUDGET, "unprotected run made this budget unbounded"):
            opened(fresh, local, "after")
    assert site.ledger is not None
    assert site.ledger.of("debit")[0].body["event"] == {"mechanism": "none/1"}
    assert site.ledger.of("debit")[0].body["clip_norm"] is None


def test_refusals_are_recorded_once(site: Site) -> None:
    signed = charter()
    gate = site.gate(signed)
    no = Refused(Refusal.BUDGET, "spent")
    for ask in (request(signed, "open", 0), request(signed, "open", 0), request(signed, "train", 2)):
        gate.refuse(ask, digest(ask), no)
    gate = site.gate(signed)
    gate.refuse(request(signed, "open", 0), digest(request(signed, "open", 0)), no)
    assert site.ledger is not None
    assert [e.body["round"] for e in site.ledger.of("refuse")] == [None, 2]
    assert site.ledger.of("refuse")[0].body["reason"] == "budget"
    assert gate.spent() == []


def test_a_gate_reads_no_data(site: Site) -> None:
    """The source raises in every test of this file; here it is shown that it would be noticed."""
    site.gate(charter())
    with pytest.raises(AssertionError, match="data was read"):
        site.dataset.open()


def test_data_that_changed_is_not_registered_again(site: Site) -> None:
    site.gate(charter())
    site.source.split = Source(seed=5).split
    with pytest.raises(DataError, match="differ from what"):
        site.gate(charter())


# -- two coordinators, who choose the same names ---------------------------------------------------------------------


def test_equal_names_under_two_charters_are_two_runs(site: Site) -> None:
    one, two = charter(), charter(name="two")
    gate = site.gate(one, two)
    opened(gate, one)
    opened(gate, two)
    asks = {signed.sha256: train(gate, signed, 1) for signed in (one, two)}
    assert len({ask.request_id for ask in asks.values()}) == 1
    committed(gate, asks[one.sha256])
    for fresh in site.and_after_a_restart(gate, one, two):
        assert fresh.debit(asks[one.sha256], digest(asks[one.sha256]), "train") == digest("reply")
        assert fresh.debit(asks[two.sha256], digest(asks[two.sha256]), "train") is None, "not answered yet"
    gate = site.gate(one, two)
    gate.close_run("run-1", one.sha256)
    with refused(Refusal.NOT_HELD):
        train(gate, one, 2)
    train(gate, two, 2)
    assert [len(gate.spent(signed.sha256)) for signed in (one, two)] == [1, 2]


def test_what_one_holds_is_out_of_the_other_s_reach(site: Site) -> None:
    """The second asks for all that is left, trains it all, and comes back for more: the first finishes its run."""
    one, greedy = charter(), charter(name="greedy", privacy__epsilon=50.0)
    gate = site.gate(one, greedy)
    opened(gate, one)
    number = 0
    with refused(Refusal.BUDGET):
        while True:
            opened(gate, greedy, f"more-{number}")
            number += 1
    assert number == FITS - 1
    for run in range(number):
        for n in (1, 2, 3):
            train(gate, greedy, n, f"more-{run}")
    with refused(Refusal.NOT_HELD):
        train(gate, greedy, 1, "run-1")
    for n in (1, 2, 3):
        gate = site.gate(one, greedy)
        committed(gate, train(gate, one, n))
    assert len(gate.spent(one.sha256)) == 3


# -- a ledger that is not as it was ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "body", "words"),
    [
        ("gift", {}, "does not know"),
        ("debit", {"event": {"mechanism": "laplace/1"}}, "privacy event"),
        ("debit", {"event": {"mechanism": "poisson-gaussian/2", "q": "1.0", "sigma": "4.0", "steps": 1}}, "mechanism"),
        ("debit", {"event": {"mechanism": "none/2"}}, "privacy event"),
        ("debit", {"event": None}, "entry"),
        ("debit", {"run_id": "another"}, "does not say"),
        ("hold", {}, "does not say"),
        ("release", {"run_id": "another"}, "does not say"),
        ("budget", {"lineage": "f" * 32, "budget": {}}, "does not say|budget"),
    ],
)
def test_what_this_version_does_not_know_stops_the_node(
    site: Site, kind: str, body: dict[str, Any], words: str
) -> None:
    """A newer version, or another program with this key, wrote it: it may have spent something."""
    signed = charter()
    gate = site.gate(signed)
    opened(gate, signed)
    train(gate, signed)
    assert site.ledger is not None
    whole = {**gate.ledger.entries[-1].body, "round": 2, "request_id": "x"} if kind == "debit" else {}
    site.ledger.append(kind, {**whole, **body}, charter=signed.sha256)
    with pytest.raises(LedgerError, match=words):
        site.gate(signed)


@pytest.mark.parametrize("change", ["older", "cut", "flipped", "reordered", "another", "forked", "empty"])
def test_a_ledger_that_was_changed_stops_the_node(site: Site, change: str) -> None:
    signed = charter()
    gate = site.gate(signed)
    opened(gate, signed)
    path = site.folder / "ledger.jsonl"
    older = path.read_bytes()
    train(gate, signed)
    now = path.read_bytes()
    lines = now.splitlines(keepends=True)
    gate.ledger.close()
    match change:
        case "older":
            path.write_bytes(older)
        case "cut":
            path.write_bytes(b"".join(lines[:2]))
        case "flipped":
            path.write_bytes(now.replace(b'"round":1', b'"round":2'))
        case "reordered":
            path.write_bytes(b"".join([*lines[:-2], lines[-1], lines[-2]]))
        case "another":
            other = Site("ben", site.folder.parent / "ben", Source())
            other.gate(charter())
            path.write_bytes((other.folder / "ledger.jsonl").read_bytes())
        case "forked":
            path.write_bytes(older)
            (site.folder / "counter").rename(site.folder / "away")
            Counts(site.folder / "counter").renew(read_ledger(path)[0])
            train(site.gate(signed), signed, 2)
            assert site.ledger is not None
            site.ledger.close()
            (site.folder / "away").replace(site.folder / "counter")
        case "empty":
            path.write_bytes(b"")
    with pytest.raises(LedgerError):
        site.gate(signed)


@pytest.mark.parametrize("content", [None, b"", b"garbage", b"\xff" * 512, b" " * 512])
def test_a_counter_that_was_changed_stops_the_node(site: Site, content: bytes | None) -> None:
    signed = charter()
    opened(site.gate(signed), signed)
    counter = site.folder / "counter"
    if content is None:
        counter.unlink()
    else:
        counter.write_bytes(content)
    with pytest.raises(LedgerError, match="how long the ledger must be"):
        site.gate(signed)


# -- any history, any crash ------------------------------------------------------------------------------------------


class _Crash(BaseException):
    """The process dies here."""


class Histories(RuleBasedStateMachine):
    """Requests in any order from two coordinators, who choose equal run and request names; crashes around any ledger entry.

    The second coordinator sees everything and may ask anything: what the first one holds is its own all the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.site = Site("ada", Path(self.folder.name), Source())
        self.charters = [charter(evaluation=PRIVATE), charter(name="other", algorithm__rounds=2, privacy__epsilon=9.0)]
        self.debits: set[tuple[str, str]] = set()
        self.commits: set[tuple[str, str]] = set()
        self.crash_at: str | None = None

    def teardown(self) -> None:
        if self.site.ledger is not None:
            self.site.ledger.close()
        self.folder.cleanup()

    @initialize()
    def start(self) -> None:
        self.gate = self.site.gate(*self.charters)
        self.site.source.hook = forbidden
        self.arm()

    def arm(self) -> None:
        """Die in the next append, before its bytes are written or after they are on disk, if asked to."""
        ledger = self.gate.ledger
        original = ledger.append

        def append(kind: str, body: Any, **about: Any) -> Any:
            when, self.crash_at = self.crash_at, None
            if when == "before":
                raise _Crash
            entry = original(kind, body, **about)
            if when == "after":
                raise _Crash
            return entry

        ledger.append = append  # type: ignore[method-assign]

    def attempt(self, step: Callable[[], Any]) -> Any:
        """The step's result, or the name of what came instead. After a crash the node starts again."""
        try:
            return step()
        except Refused as err:
            return err.reason
        except _Crash:
            self.gate = self.site.gate(*self.charters)
            self.arm()
            return "crashed"
        finally:
            self.crash_at = None

    @rule(when=st.sampled_from(["before", "after"]))
    def next_append_crashes(self, when: str) -> None:
        self.crash_at = when

    @rule()
    def restart(self) -> None:
        self.gate = self.site.gate(*self.charters)
        self.arm()

    @rule(which=st.integers(0, 1), run=st.integers(0, 3))
    def open_run(self, which: int, run: int) -> None:
        ask = request(self.charters[which], "open", 0, run=f"run-{run}")
        self.attempt(lambda: self.gate.open_run(ask, digest(ask)))

    @rule(
        which=st.integers(0, 1),
        run=st.integers(0, 3),
        number=st.integers(0, 4),
        purpose=st.sampled_from(["train", "train", "evaluate"]),
        variant=st.sampled_from(["", "", "", "x"]),
        forged=st.sampled_from([False, False, False, True]),
    )
    def debit(self, which: int, run: int, number: int, purpose: str, variant: str, forged: bool) -> None:
        name = f"run-{run}.{number}.{purpose}{variant}"
        signed = self.charters[which]
        ask = request(signed, purpose, number, run=f"run-{run}", request_id=name)
        sha = digest("forged" if forged else ask)
        known = {(e.charter, e.body["request_id"]): e.body["request_sha256"] for e in self.gate.ledger.of("debit")}
        plan = plan_of(signed.charter)
        rounds = signed.charter.algorithm.rounds
        evaluated = evaluated_rounds(rounds, 1 if purpose == "train" else signed.charter.evaluation.every)
        owed = (
            self.left(signed.sha256, f"run-{run}", purpose) > 0
            and number in evaluated
            and any(item.purpose == purpose for item in plan)
            and not self.taken(signed.sha256, f"run-{run}", purpose, number)
        )
        crashes = self.crash_at is not None
        result = self.attempt(lambda: self.gate.debit(ask, sha, purpose))
        if known.get((signed.sha256, name), sha) != sha:
            assert result is Refusal.REPLAY
        elif (signed.sha256, name) in self.commits:
            assert result == digest("r"), "a committed request is answered only from the outbox"
        elif (signed.sha256, name) in known:
            assert result in (None, Refusal.NOT_HELD), "a debit stays good until its run is closed"
        elif owed and not crashes:
            assert result is None, "what is held was refused: somebody else took it"
        elif result == digest("r"):
            raise AssertionError("answered as committed, but was not")

    @rule(pick=st.integers(0, 50))
    def commit(self, pick: int) -> None:
        waiting = [e for e in self.gate.ledger.of("debit") if (e.charter, e.body["request_id"]) not in self.commits]
        if waiting:
            entry = waiting[pick % len(waiting)]
            b, (signed,) = entry.body, [one for one in self.charters if one.sha256 == entry.charter]
            ask = request(signed, b["purpose"], b["round"], run=b["run_id"], request_id=b["request_id"])
            self.attempt(lambda: self.gate.commit(ask, b["request_sha256"], digest("r"), public=False))

    @rule(which=st.integers(0, 1), run=st.integers(0, 3))
    def close_run(self, which: int, run: int) -> None:
        """It ends a run of its own charter, and nothing else."""
        others = {key: self.open(*key) for key in self.holds() if key != (self.charters[which].sha256, f"run-{run}")}
        self.attempt(lambda: self.gate.close_run(f"run-{run}", self.charters[which].sha256))
        assert {key: self.open(*key) for key in others} == others

    # What the ledger says, by other code than the gate's.

    def holds(self) -> dict[tuple[str, str], Any]:
        return {(str(e.charter), e.body["run_id"]): e.body for e in self.gate.ledger.of("hold")}

    def open(self, sha: str, run: str) -> bool:
        return not any((e.charter, e.body["run_id"]) == (sha, run) for e in self.gate.ledger.of("release"))

    def taken(self, sha: str, run: str, purpose: str, number: int | None = None) -> int:
        return sum(
            (e.charter, e.body["run_id"], e.body["purpose"]) == (sha, run, purpose)
            and number in (None, e.body["round"])
            for e in self.gate.ledger.of("debit")
        )

    def left(self, sha: str, run: str, purpose: str) -> int:
        hold = self.holds().get((sha, run))
        if hold is None or not self.open(sha, run):
            return 0
        wanted = sum(item["count"] for item in hold["plan"] if item["purpose"] == purpose)
        return int(wanted) - self.taken(sha, run, purpose)

    def held(self) -> list[PrivacyEvent]:
        """What open holds may still spend."""
        found: list[PrivacyEvent] = []
        for (sha, run), hold in self.holds().items():
            for item in hold["plan"]:
                assert item["count"] >= self.taken(sha, run, item["purpose"]), "more was debited than was held"
                found += [PrivacyEvent.from_fields(item["event"])] * self.left(sha, run, item["purpose"])
        return found

    @invariant()
    def the_cap_holds(self) -> None:
        if not hasattr(self, "gate"):
            return
        debits = [e.body for e in self.gate.ledger.of("debit")]
        budgets = self.gate.ledger.of("budget")
        assert len(budgets) <= 1
        spent = [PrivacyEvent.from_fields(b["event"]) for b in debits]
        if budgets:
            assert Budget.from_fields(budgets[0].body["budget"]).admits([*spent, *self.held()])
        else:
            assert not spent
        assert sorted(map(str, self.gate.spent())) == sorted(map(str, spent))

    @invariant()
    def what_is_told_of_the_headers_alone_balances(self) -> None:
        """As an auditor reads entries of other charters: holds, debits and releases, and not whose they are."""
        if not hasattr(self, "gate"):
            return
        left: Counter[str] = Counter()
        for entry in self.gate.ledger.entries:
            told = entry.privacy or {}
            for event, count in told.get("hold", []):
                left[str(event)] += count
            for event, count in [*told.get("release", []), *([[told["debit"], 1]] if "debit" in told else [])]:
                left[str(event)] -= count
                assert left[str(event)] >= 0
        held = Counter(str(event.to_fields()) for event in self.held())
        assert +left == held

    @invariant()
    def nothing_is_charged_or_answered_twice(self) -> None:
        if not hasattr(self, "gate"):
            return
        debits = [(str(e.charter), e.body["request_id"]) for e in self.gate.ledger.of("debit")]
        commits = [(str(e.charter), e.body["request_id"]) for e in self.gate.ledger.of("commit")]
        assert len(debits) == len(set(debits))
        assert len(commits) == len(set(commits))
        assert set(commits) <= set(debits)
        rounds = [
            (e.charter, e.body["run_id"], e.body["purpose"], e.body["round"]) for e in self.gate.ledger.of("debit")
        ]
        assert len(rounds) == len(set(rounds)), "one round was debited for two requests"
        assert self.debits <= set(debits), "a debit disappeared"
        assert self.commits <= set(commits), "a commit disappeared"
        self.debits, self.commits = set(debits), set(commits)


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
