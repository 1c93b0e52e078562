"""What the last passes of mutation testing found that no quick test of the verifier notices (docs/mutation-testing.md)."""

from __future__ import annotations

import copy
import json
import math
import random
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hansa.common import accounting, verifier
from hansa.common.identity import Envelope, write_envelope
from hansa.common.verifier import (
    Account,
    Act,
    Bad,
    Budget,
    Coordinator,
    Entry,
    Hold,
    Odometer,
    Partner,
    Population,
    Reading,
    Report,
    Run,
    Statement,
    Unreadable,
    Witnesses,
    filter_epsilon,
)

sys.path.insert(0, str(Path(__file__).parent))
from bundles import NONE, Kept, Shape, digest, identity, result_for
from test_verifier import CLIENTS, COORD, FULL, L0, P0, P1, PLAIN, PRIVATE, SMALL, TWO_RUNS, C, fresh, verdict_of
from test_verifier_mutants import EARLY, HELD, SAMPLED, bad, budget_fields, composed, curve, places, terms_of

# -- bytes ---------------------------------------------------------------------------------------------------


def test_what_is_counted_of_a_file_is_its_first_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 1,024 parts of a MiB: a file of holes may be of any size."""
    asked = []

    class Endless:
        @staticmethod
        def read(size: int) -> bytes:
            asked.append(size)
            return b"x\ny"

    monkeypatch.setattr(verifier, "_open", lambda *_: nullcontext(Endless))
    assert verifier._count(Path(), "file") == 1024 + 1  # the last line is torn
    assert asked == [2**20] * 1024


# -- accounting ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mu", "delta"), [(1e-4, 1e-5), (1e-5, 1e-6), (3e-6, 1e-9), (1e-3, 1e-12)])
def test_a_small_loss_is_found_as_exactly_as_a_large_one(mu: float, delta: float) -> None:
    """Nothing is relative to 1: epsilon is far below it here."""
    found = verifier._gaussian_epsilon(mu, delta)
    assert 0 < found < 0.01
    assert curve(mu, found) == pytest.approx(delta, rel=1e-6)


def test_what_next_to_nothing_costs_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound of at most 1e-4 is exact enough: nothing is composed for it, and it is neither rounded nor coarse."""
    asked = composed(monkeypatch, lambda _: 0.0)
    reading = Odometer().read((((0.5, 1e5), 1),), 1e-6)
    assert 0 < reading.epsilon < 1e-4
    assert (reading, asked) == (Reading(reading.epsilon), [])


def test_events_of_a_cheap_history_are_not_all_next_to_nothing() -> None:
    """A millionth is of what the history costs, however little that is."""
    for history in ((((1e-3, 10.0), 100), ((1e-3, 11.0), 100)), (((1e-4, 50.0), 1), ((1e-4, 60.0), 1))):
        assert Odometer()._rounded(history, 8) == dict(history)


def test_no_composition_is_larger_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where epsilon goes on moving, the interval is halved while the cells allow, and no further."""
    told = iter(range(1000, 0, -1))  # each moves by more than 5 in 10,000
    for cells in (20_000, 30_000, 40_000, 60_000):
        monkeypatch.setattr(Odometer, "cells", cells)
        asked = composed(monkeypatch, lambda _: float(next(told)))
        one, events = Odometer(), dict(SAMPLED)
        _, interval, moved = one._refined(events, 1e-5, 0.0)
        assert moved == 1.0
        used = [one._width(events, 1e-5) / at for _, at in asked]
        assert len(used) > 1
        assert asked[-1][1] == interval
        assert cells / 2 < used[-1] == max(used) <= cells


@pytest.mark.parametrize(("q", "sigma", "steps"), [(0.1, 3.0, 60), (0.02, 0.8, 500), (0.9, 2.0, 10)])
def test_what_is_composed_is_as_tight_as_by_the_other_odometer(q: float, sigma: float, steps: int) -> None:
    """Hardly any of delta goes to what is cut off."""
    other = accounting.odometer([accounting.PrivacyEvent(q, sigma, steps)], 1e-5)
    found = Odometer.at({(q, sigma): steps}, 1e-5, 4e-4)
    assert found == pytest.approx(other, rel=2e-3)


@pytest.mark.parametrize(("steps", "allowance"), [(1, 2.002e-13), (10**4, 2.2e-12)])
def test_of_a_delta_below_what_is_rounded_away_nothing_is_claimed(steps: int, allowance: float) -> None:
    """The FFT's rounding grows with the steps, and is taken off delta."""
    events = {(0.5, 40.0): steps}
    for part in (0.1, 0.5, 0.9, 0.99):
        assert Odometer.at(events, part * allowance, 1e-2) == math.inf
    assert Odometer.at(events, 20 * allowance, 1e-2) < 50


BY_SIGMA = {(0.1, 1.0): 2, (0.11, 50.0): 3, (0.12, 1.01): 5, (0.13, 51.0): 7}  # alike in sigma, whatever q is
BY_Q = {(0.001, 1.0): 2, (0.9, 1.1): 3, (0.0011, 1.2): 5, (0.91, 1.3): 7}


@pytest.mark.parametrize(
    ("events", "made"),
    [
        (BY_SIGMA, {(0.12, 1.0): 7, (0.13, 50.0): 10}),
        (BY_SIGMA, {(0.1, 1.0): 2, (0.12, 1.01): 5, (0.13, 50.0): 10}),
        (BY_Q, {(0.0011, 1.0): 7, (0.91, 1.1): 10}),
        (BY_Q, {(0.0011, 1.0): 7, (0.9, 1.1): 3, (0.91, 1.3): 7}),
        (
            BY_SIGMA | {(0.5, 20.0): 1, (0.51, 20.5): 1},
            {(0.1, 1.0): 2, (0.12, 1.01): 5, (0.11, 50.0): 3, (0.13, 51.0): 7, (0.51, 20.0): 2},
        ),
    ],
)
def test_events_that_are_alike_are_rounded_to_one(
    events: dict[tuple[float, float], int], made: dict[tuple[float, float], int]
) -> None:
    """Of two cuts, by q or by sigma, that which costs less; and always of the cell that costs most."""
    assert verifier._merged_kinds(events, 8, len(made)) == made


def test_the_cheaper_of_two_cuts_is_made() -> None:
    """What two cells cost by rounding is what their halves cost together, counted by hand here."""

    def cost(half: list[tuple[tuple[float, float], int]]) -> float:
        q, sigma = max(q for (q, _), _ in half), min(sigma for (_, sigma), _ in half)
        return sum(n * (verifier._renyi(q, sigma, 8) - verifier._renyi(*kind, 8)) for kind, n in half)

    rng, differ = random.Random(8), 0
    for _ in range(60):
        items = [((rng.uniform(0.01, 0.9), rng.uniform(0.8, 5.0)), rng.randint(1, 9)) for _ in range(rng.randint(4, 7))]
        by_q, by_sigma = sorted(items), sorted(items, key=lambda item: item[0][1])
        cuts = [(cut[: len(cut) // 2], cut[len(cut) // 2 :]) for cut in (by_q, by_sigma)]
        costs = [sum(map(cost, cut)) for cut in cuts]
        differ += costs[1] < costs[0]
        wanted: Counter[tuple[float, float]] = Counter()
        for half in cuts[costs.index(min(costs))]:
            wanted[max(q for (q, _), _ in half), min(s for (_, s), _ in half)] += sum(n for _, n in half)
        assert verifier._merged_kinds(dict(items), 8, 2) == wanted
    assert 10 < differ < 50


def test_what_is_cut_is_what_rounding_makes_dearer_not_what_is_dear() -> None:
    dear, cheap = {(0.5, 1.0): 500, (0.5, 1.0 + 1e-12): 500}, {(0.5, 20.0): 1, (0.5, 40.0): 1}
    assert verifier._merged_kinds(dear | cheap, 8, 3) == {(0.5, 1.0): 1000} | cheap


# -- charter and keys ----------------------------------------------------------------------------------------


def test_a_charter_that_not_all_have_signed_is_named_by_its_line(tmp_path: Path) -> None:
    made = fresh(SMALL)
    folder, signed = made.write(tmp_path / "b"), made.signed
    sealed = Envelope(verifier.CHARTER_TYPE, signed.payload, signed.signatures[1:])
    (folder / "charter.json").write_bytes(write_envelope(sealed) + b"\n")
    verdict = verdict_of(folder)
    assert places(verdict) == {("charter_signatures", "charter.json", 1)}
    assert f"not signed by {P0}" in {v["what"] for v in verdict["violations"]}


def test_signatures_beyond_everyones_are_looked_at_too() -> None:
    """As many again: whose they are, and whether they are good."""
    signed, terms, stranger = fresh(SMALL).signed, terms_of(SMALL), identity("mallory")
    mine = [(key, signature) for key, signature in signed.signatures]
    more = [(stranger.key, mine[0][1]), (mine[0][0], b"x" * 64), *mine]

    def told(made: list[tuple[str, bytes]]) -> list[str]:
        return [
            what.partition(":")[0].partition(" by the key")[0]
            for what in verifier._everyone_signed(Report(), verifier.CHARTER_TYPE, signed.payload, made, terms.keys)
        ]

    assert told(mine) == []
    assert told([*mine, *more[:2]]) == [
        "signed by a key that does not stand in the charter",
        "bad signature",
        "more signatures than signers",
    ]
    assert told([*mine, *mine, *more[:2]]) == ["more signatures than signers"]


def test_keys_after_a_strangers_are_looked_at_too(tmp_path: Path) -> None:
    folder = fresh(SMALL).write(tmp_path / "b")
    (folder / "keys/aaa.pem").write_bytes(b"")
    (folder / f"keys/{P1}.pem").write_bytes((folder / f"keys/{P0}.pem").read_bytes())
    assert places(verdict_of(folder)) == {("stranger", "keys/aaa.pem", None), ("key", f"keys/{P1}.pem", 1)}


# -- ledgers, entry by entry ---------------------------------------------------------------------------------

EVENT: verifier.Event = (1.0, 20.0, 2)
FIELDS = {"mechanism": "poisson-gaussian/1", "q": "1.0", "sigma": "20.0", "steps": 2}
X, Y = digest("x")[:32], digest("y")[:32]


def partner_of(shape: Shape = SMALL, **terms: Any) -> Partner:
    """The first partner's ledger, of which nothing was read."""
    return Partner(Report(), replace(terms_of(shape), **terms), P0)


def said(report: Report) -> list[tuple[str, int | None]]:
    return [(v["code"], v["line"]) for v in report.violations]


@pytest.mark.parametrize(
    "error", [ZeroDivisionError, AttributeError, KeyError, TypeError, ValueError, RecursionError, OverflowError]
)
def test_whatever_goes_wrong_with_an_entry_is_a_violation_of_its_line(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise error("x")

    monkeypatch.setattr(Partner, "_header", fails)
    partner = partner_of()
    partner._apply(Entry(7, verifier.HIDDEN, None))
    assert said(partner.report) == [("layout", 7)]


def test_until_when_a_charter_holds() -> None:
    """Up to the second before it expires, in whatever time zone that is said."""
    for expires in ("2026-11-22T01:50:00+00:00", "2026-11-22T03:50:00+02:00"):
        partner = partner_of(expires=expires)
        partner._not_expired(Entry(1, "hold", None, "2026-11-22T01:49:59Z"))
        for late in (EARLY, "2026-11-22T01:50:01Z", "2027-01-01T00:00:00Z"):
            with bad("expired"):
                partner._not_expired(Entry(1, "hold", None, late))


def test_what_a_charter_costs() -> None:
    """Its own filter's epsilon where that is within the cap; else the least that is known, tight or by plain bounds alone."""
    history, budget = (((0.1, 1.0), 60),), replace(HELD, epsilon=99.0)
    partner = partner_of(epsilon=1.0, delta=1e-5)
    tight, plain = Odometer().read(history, 1e-5).epsilon, verifier._plain(history, 1e-5)[0]
    own = filter_epsilon(budget.at(1.0, 1e-5), history)
    assert 1 < tight < plain < own
    assert partner._cost(budget, history) == tight
    assert partner._cost(budget, history, tight=False) == plain
    assert partner._cost(None, history) == tight
    partner.terms = replace(partner.terms, epsilon=own)
    assert partner._cost(budget, history) == own
    for nothing in (replace(partner.terms, epsilon=None), replace(partner.terms, delta=None)):
        partner.terms = nothing
        assert partner._cost(budget, history) == 0.0


def test_days_declarations_and_commitments() -> None:
    assert verifier._day("2026-11-22") is True
    for value in ("20261122", "2026-11-31", "2026-W47-7", "2026-11-22T00:00:00", "", None, 20261122, ["2026-11-22"]):
        assert verifier._day(value) is False
    fields: list[tuple[str, str | None, str | None, bool]] = [
        ("first", None, None, True),
        ("first", X, None, False),
        ("first", None, "2026-11-22", False),
        ("version", X, None, True),
        ("version", None, None, False),
        ("overlap", X, None, True),
        ("overlap", X, "2026-11-22", False),
        ("disjoint", None, "2026-11-22", True),
        ("disjoint", None, None, False),
        ("disjoint", X, "2026-11-22", False),
    ]
    for kind, of, cutoff, good in fields:
        assert verifier._declared({"kind": kind, "of": of, "cutoff": cutoff}) is good
    for kind, commitment, good in (
        ("none", None, True),
        ("none", digest("x"), False),
        ("public", None, False),
        ("private", digest("x"), True),
    ):
        assert verifier._held_out({"kind": kind, "commitment": commitment}) is good


def test_a_budget_pays_for_what_was_taken_before_it() -> None:
    """Debits and holds, of this charter and of others; and what comes later."""
    account, price = Account(), (((1.0, 20.0), 2),)
    account.debits = [({}, EVENT, True), ({}, (1.0, 30.0, 1), False), ({}, None, True)]
    account.take(EVENT, 2, True)
    account.take((1.0, 30.0, 1), 1, False)
    account.take(None, 3, False)
    assert account.spent() == {(1.0, 20.0): 2, (1.0, 30.0): 1}
    assert (account.spent(own=True), account.spent(own=False)) == ({(1.0, 20.0): 2}, {(1.0, 30.0): 1})
    account.fix(HELD)
    assert account.debited is not None
    assert account.charged is not None
    assert account.debited.epsilon() == filter_epsilon(HELD, (*price, ((1.0, 30.0), 1)))
    assert account.charged.epsilon() == filter_epsilon(HELD, (((1.0, 20.0), 6), ((1.0, 30.0), 2)))
    account.take(EVENT, 1, False)
    assert account.charged.epsilon() == filter_epsilon(HELD, (((1.0, 20.0), 8), ((1.0, 30.0), 2)))


def test_what_pays_for_a_hold() -> None:
    partner, account = partner_of(), Account()
    with bad("hidden", "before any other charter"):
        partner._holds(account, [(EVENT, 1)], False)
    for fixed in (False, True):
        if fixed:
            account.fix(HELD)
            partner._holds(account, [(EVENT, 1)], True)
        else:
            with bad("no_budget", "none set"):
                partner._holds(account, [(EVENT, 1)], True)
    partner._holds(account, [(None, 5)], True)
    partner.others = 1
    partner._holds(account, [(EVENT, 1)], False)
    account.unbounded = 3
    with bad("no_budget", "unprotected"):
        partner._holds(account, [(EVENT, 1)], True)
    partner._holds(account, [(None, 1)], True)
    assert account.pools == {True: {EVENT: 3, None: 6}, False: {EVENT: 2}}


def test_a_debit_takes_what_was_held_for_it() -> None:
    """What only the other side has held is said to be so; what nobody has is not held; both are charged all the same."""
    partner, account = partner_of(), Account()
    account.fix(HELD)
    assert account.charged is not None
    account.take(EVENT, 1, True)
    before = account.charged.epsilon()
    partner._takes(Entry(5, "debit", None, EARLY, partner.terms.sha256), account, EVENT, True)
    assert account.charged.epsilon() == before
    assert account.pools[True][EVENT] == 0
    for own in (True, False):
        with bad("not_held", "a debit of what is not held"):
            partner._takes(Entry(6, "debit", None), account, EVENT, own)
    account.take(EVENT, 1, False)
    with bad("not_held", "a debit of what is not held"):
        partner._takes(Entry(7, "debit", None), account, EVENT, True)
    account.take(EVENT, 1, True)
    partner._takes(Entry(8, "debit", None), account, EVENT, False)
    with bad("hidden", "that only a hold of this charter covers"):
        partner._takes(Entry(9, "debit", None), account, EVENT, False)
    assert account.charged.epsilon() == filter_epsilon(HELD, (((1.0, 20.0), 14),))  # six debits and a hold
    spent = [filter_epsilon(HELD, (((1.0, 20.0), 2 * n),)) for n in range(1, 7)]
    points = [point for point, _, _ in account.debits]
    assert [point["epsilon_filter"] for point in points] == spent
    assert [point["entry"] for point in points] == [5, 6, 6, 7, 8, 9]
    assert [point["charter"] for point in points] == ["this", "this", "other", "this", "other", "other"]
    assert account.unbounded is None
    account.take(None, 2, True)
    for line in (10, 11):
        partner._takes(Entry(line, "debit", None), account, None, True)
        assert account.unbounded == 10
        assert account.debits[-1][0]["epsilon_filter"] is None
    assert Account().spent() == {}
    bare = Account()
    bare.take(EVENT, 1, True)
    partner._takes(Entry(3, "debit", None), bare, EVENT, True)
    assert bare.debits[0][0]["epsilon_filter"] is None  # no budget, no filter


def test_what_headers_say_of_lineages() -> None:
    partner = partner_of()
    for privacy, code in (
        ({"lineage": X, "open": "first"}, None),
        ({"lineage": X, "open": "first"}, "lineage"),
        ({"lineage": Y, "open": "first"}, "lineage"),
        ({"lineage": digest("z")[:32], "open": "disjoint"}, None),
        ({"lineage": digest("w")[:32], "open": "version"}, "unknown"),
        ({"lineage": digest("v")[:32], "debit": FIELDS}, "lineage"),
        ({"lineage": X, "give": FIELDS}, "unknown"),
        ({"lineage": X}, "unknown"),
        ({"lineage": X, "debit": FIELDS, "hold": []}, "unknown"),
        ({"lineage": "x", "hold": []}, "unknown"),
        ({"hold": []}, "unknown"),
        ({"lineage": X, "release": []}, None),
        ({"lineage": X, "budget": {}}, "layout"),
    ):
        with bad(code) if code else nullcontext():
            partner._header(Entry(1, verifier.HIDDEN, privacy))
    with bad("lineage", "every later one 'disjoint'"):
        partner_of()._header(Entry(1, verifier.HIDDEN, {"lineage": X, "open": "disjoint"}))
    assert partner.others == 0
    partner._header(Entry(1, "charter", None, EARLY))
    assert partner.others == 0
    partner._header(Entry(1, verifier.HIDDEN, None))
    assert partner.others == 1


def test_a_budget_is_fixed_once() -> None:
    partner, account = partner_of(), Account()
    partner._fixes(Entry(4, "budget", None), account, budget_fields(), True)
    assert (account.budget, account.agreed) == (Budget.parse(budget_fields()), budget_fields())
    assert (account.budget_line, account.budget_own) == (4, True)
    with bad("budget", "a second budget"):
        partner._fixes(Entry(5, "budget", None), account, budget_fields(epsilon="9.0"), True)
    assert account.budget_line == 4


def test_what_charges_nothing_has_no_charge_in_its_header() -> None:
    for shown, kind, wrong in ((True, "refuse", True), (True, "hold", False), (False, "refuse", False)):
        for privacy in (None, {"lineage": X, "release": []}):
            partner = partner_of()
            with nullcontext() if not shown else pytest.raises(Bad):
                partner._body(Entry(2, kind if shown else verifier.HIDDEN, privacy, EARLY if shown else None, "x"))
            assert said(partner.report) == [("privacy_differs", 2)] * (wrong and privacy is not None)


def test_when_the_rows_of_a_disjoint_data_set_were_collected() -> None:
    """On the day on which the latest was registered, or later; and not after its own day."""

    def declare(partner: Partner, name: str, time: str, kind: str, cutoff: str | None, **other: Any) -> None:
        declared = {"kind": kind, "of": other.pop("of", None), "cutoff": cutoff}
        b = {
            "dataset": digest(name)[:32],
            "lineage": digest(name)[:32],
            "commitment": digest(name),
            "declared": declared,
        } | other
        opens = {"lineage": b["lineage"], "open": kind} if kind in ("first", "disjoint") else None
        partner._dataset(Entry(len(partner.datasets) + 2, "dataset", opens, time), b)

    def fresh_one() -> Partner:
        partner = partner_of()
        declare(partner, "a", "2026-11-22T01:50:00Z", "first", None)
        return partner

    for cutoff, time in (
        ("2026-11-22", "2026-11-22T23:00:00Z"),
        ("2026-11-22", "2026-11-30T00:00:00Z"),
        ("2026-11-30", "2026-11-30T00:00:00Z"),
    ):
        partner = fresh_one()
        declare(partner, "b", time, "disjoint", cutoff)
        assert [one["day"] for one in partner.datasets.values()] == ["2026-11-22", time[:10]]
        assert [one["line"] for one in partner.datasets.values()] == [2, 3]
    for cutoff, time, words in (
        ("2026-11-21", "2026-11-30T00:00:00Z", "an earlier data set was registered on 2026-11-22"),
        ("2026-11-23", "2026-11-22T23:59:59Z", "that day is yet to come"),
    ):
        with bad("lineage", words):
            declare(fresh_one(), "b", time, "disjoint", cutoff)
    partner = fresh_one()
    declare(partner, "b", EARLY, "version", None, of=digest("a")[:32], lineage=digest("a")[:32], commitment=digest("a"))
    with bad("repeated", "registered before"):
        declare(partner, "b", EARLY, "version", None, of=digest("a")[:32], lineage=digest("a")[:32])
    for lineage, of in (("a", "nowhere"), ("b", "a")):
        with bad("lineage", "not in its lineage, or not there"):
            declare(fresh_one(), "c", EARLY, "overlap", None, of=digest(of)[:32], lineage=digest(lineage)[:32])
    with bad("lineage", "the rows of a data set of another lineage"):
        declare(fresh_one(), "d", "2026-11-30T00:00:00Z", "disjoint", "2026-11-30", commitment=digest("a"))


@pytest.mark.parametrize("debits", [1, 2, 3, 7, 8, 25, 40])
def test_the_first_debit_above_the_charters_epsilon_is_named(debits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By halves; with more than 16 kinds only all of them are looked at tightly."""
    asked: list[tuple[int, bool]] = []

    def cost(_: Partner, __: Any, history: verifier.History, tight: bool = True) -> float:
        asked.append((sum(n for _, n in history), tight))
        return float(asked[-1][0])

    monkeypatch.setattr(Partner, "_cost", cost)
    for fit in {0, 1, debits // 2, debits - 1, debits}:
        for kinds in (1, 16, 17):
            partner, account = partner_of(epsilon=float(fit)), Account()
            account.debits = [
                ({"entry": 10 + n}, (1.0, 2.0 + n % kinds, 1), True) for n in range(debits) for _ in range(1)
            ]
            account.debits[1:1] = [({"entry": 99 + n}, (1.0, 50.0 + n, 5), False) for n in range(20)]
            asked.clear()
            partner._finish_lineage(account)
            assert said(partner.report) == ([("over_charter", 10 + fit)] if fit < debits else [])
            few = min(kinds, debits) <= 16
            assert {tight for n, tight in asked if n < debits} <= {few}
            assert [tight for n, tight in asked if n == debits] == [True]
            assert [w["line"] for w in partner.report.warnings] == [99]


def test_whose_budget_it_is_is_told() -> None:
    for own, told in ((True, []), (False, [("other_charter", 6)])):
        partner, account = partner_of(), Account()
        account.fix(HELD)
        account.budget_line, account.budget_own = 6, own
        partner._finish_lineage(account)
        assert [(w["code"], w["line"]) for w in partner.report.warnings] == told
    partner_of()._finish_lineage(Account())


def test_what_only_the_end_of_a_ledger_shows() -> None:
    """Only if it is there: an open hold, a debit without a commit."""
    for whole in (True, False):
        partner = partner_of()
        partner.whole = whole
        for name, is_open in (("a", False), ("b", True)):
            partner.holds[name] = Hold(X, X, [], "", {}, is_open)
        for name, line in (("r", 8), ("s", 9)):
            partner.acts["debit"][name] = Act(line, {})
        partner.acts["commit"]["r"] = Act(10, {})
        partner.accounts = {X: Account(used=True), Y: Account()}
        for number, (lineage, kind) in enumerate(((X, "first"), (Y, "disjoint"), (X, "disjoint"))):
            partner.datasets[str(number)] = {
                "lineage": lineage,
                "line": number,
                "declared": {"kind": kind, "cutoff": "c"},
            }
        partner.finish()
        assert partner.report.violations == []
        told = [(w["code"], w["line"]) for w in partner.report.warnings]
        assert told == [("uncommitted", 9), ("unreleased", None)] * whole + [("disjoint", 2)]
        assert not whole or "run b " in partner.report.warnings[1]["what"]


def test_a_hold_on_a_data_set_that_is_not_shown_is_billed_all_the_same() -> None:
    """Its header says on which lineage."""
    partner = partner_of()
    partner.accounts = {X: Account(), Y: Account()}
    plan = [{"purpose": "train", "count": 1, "event": FIELDS}]
    b = {"run_id": "x", "request_id": "r", "dataset": digest("w")[:32], "plan": plan, "plan_sha256": digest("p")}
    with bad("hidden", "that no entry shown here registers"):
        partner._hold(Entry(4, "hold", {"lineage": Y, "hold": []}, EARLY, data=b), b)
    assert set(partner.used()) == {Y}
    assert partner.holds["x"].lineage == Y


def test_a_backup_holds_less_than_stands_before_its_entry() -> None:
    partner = partner_of()
    for length in (1, 6):
        partner._restored(Entry(7, "restored", None), {"length": length})
    assert [(w["code"], w["line"]) for w in partner.report.warnings] == [("restored", 7)] * 2
    for length in (7, 8):
        with bad("run_order", f"names {length} entries, 6 stand before it"):
            partner._restored(Entry(7, "restored", None), {"length": length})


def test_over_its_budget_is_who_has_one_that_still_bounds() -> None:
    """After an unprotected round no figure is claimed, so none is too large; and a population is no other."""
    for unbounded in (None, 5):
        partner, account = partner_of(epsilon=1e9), Account(unbounded=unbounded)
        account.debits = [({}, (1.0, 1.0, 9), True)]
        account.fix(HELD)
        partner.accounts = {X: account, Y: Account(unbounded=unbounded)}
        partner.finish()
        book = Population(Report(), replace(terms_of(CLIENTS), epsilon=1e9))
        book.plans["x"] = {"train": (1, (1.0, 1.0, 9))}
        book._count("debit", {"run_id": "x", "round": 1, "purpose": "train", "clients": [[0, 0]]})
        book.unbounded = unbounded
        book.finish()
        assert book.report.violations == []
        book.budget = HELD
        book.finish()
        wanted = [] if unbounded else [("over_budget", None)]
        assert (said(partner.report), said(book.report)) == (wanted, wanted)


# -- what a coordinator records ------------------------------------------------------------------------------


def coordinator_of(shape: Shape = SMALL, **terms: Any) -> Coordinator:
    book = Coordinator(Report(), replace(terms_of(shape), **terms))
    book._run(Entry(3, "run", None, EARLY), {"run_id": "x"})
    return book


def test_the_rounds_and_the_end_of_a_run() -> None:
    def end(rounds: int, model: str | None, why: str, played: int = 3) -> None:
        book = coordinator_of(rounds=3)
        book.runs["x"].rounds = [{"round": n, "model_sha256": str(n)} for n in range(1, played + 1)]
        book._close(Entry(9, "close", None), {"run_id": "x", "rounds": rounds, "model_sha256": model, "why": why})
        assert book.runs["x"].closed_at == 9
        with bad("record", "no open run"):
            book._open({"run_id": "x"})

    end(3, "3", "completed")
    end(2, "2", "refused", 2)
    end(0, None, "refused", 0)
    for rounds, model, why, played in (
        (2, "3", "completed", 3),
        (3, "2", "completed", 3),
        (3, "1", "completed", 3),
        (1, "1", "refused", 0),
        (0, "1", "refused", 0),
    ):
        with bad("record", "not the number of rounds"):
            end(rounds, model, why, played)
    for rounds, why in ((3, "refused"), (2, "completed"), (1, "completed")):
        with bad("record", f"at round {rounds} of 3"):
            end(rounds, str(rounds), why, rounds)
    book = coordinator_of(rounds=3)
    with bad("record", "no open run"):
        book._open({"run_id": "y"})
    with bad("repeated", "exists"):
        book._run(Entry(4, "run", None), {"run_id": "x"})
    book._folded = lambda *_: None  # type: ignore[method-assign]
    for number in (1, 1, 2, 3, 3):
        book._round(Entry(5, "round", None), {"run_id": "x", "round": number})
    assert [b["round"] for b in book.runs["x"].rounds] == [1, 2, 3]
    for number in (1, 2):
        with bad("record", "not the next round"):
            book._round(Entry(6, "round", None), {"run_id": "x", "round": number})
    with bad("record", "not the next round"):
        book._round(Entry(6, "round", None), {"run_id": "x", "round": 3, "metrics": {}})
    with bad("terms", "round 4"):
        book._round(Entry(6, "round", None), {"run_id": "x", "round": 4})
    with bad("record", "not the next round"):
        coordinator_of(rounds=3)._round(Entry(6, "round", None), {"run_id": "x", "round": 2})


def test_what_is_asked_and_answered() -> None:
    book, one = coordinator_of(), {"request_id": "r", "request_sha256": digest("r")}
    asks: list[tuple[int, str, dict[str, Any], str | None]] = [
        (0, "open", {P0: one}, None),
        (0, "open", {P0: one}, None),
        (0, "open", {P0: one, P1: one}, "record"),
        (1, "open", {P0: one}, "record"),
        (0, "train", {P0: one}, "record"),
        (1, "train", {P0: one, P1: one}, None),
        (1, "evaluate", {P1: one}, None),
        (2, "train", {P0: one}, "terms"),
        (1, "train", {C: one}, "record"),
        (1, "train", {P0: {"request_id": "r"}}, "layout"),
    ]
    for number, purpose, requests, code in asks:
        with bad(code) if code else nullcontext():
            book._ask(Entry(4, "ask", None), {"run_id": "x", "round": number, "purpose": purpose, "requests": requests})
    with bad("terms", "no evaluation"):
        coordinator_of(SMALL, evaluation="none")._ask(
            Entry(4, "ask", None), {"run_id": "x", "round": 1, "purpose": "evaluate", "requests": {P0: one}}
        )
    coordinator_of(SMALL, evaluation="none")._ask(
        Entry(4, "ask", None), {"run_id": "x", "round": 1, "purpose": "train", "requests": {P0: one}}
    )
    reply = digest("reply")
    answers: list[tuple[int, str, str, str, str | None, str | None]] = [
        (0, "open", "r", "ok", reply, None),
        (0, "open", "r", "failed", reply, "record"),
        (0, "open", "r", "refused: budget", reply, None),
        (1, "train", "r", "failed", reply, None),
        (1, "train", "r", "ok", reply, None),
        (1, "train", "r", "ok", reply, None),
        (1, "train", "r", "ok", digest("another"), "record"),
        (1, "train", "r", "refused: x", reply, None),
        (1, "train", "r", "refused: x", digest("another"), None),
        (1, "train", "s", "ok", reply, "record"),
        (1, "train", "r", "timeout", None, None),
        (1, "train", "r", "invalid", None, None),
        (1, "train", "r", "timeout", reply, "record"),
        (1, "train", "r", "ok", None, "record"),
        (1, "train", "r", "maybe", reply, "layout"),
        (1, "evaluate", "r", "ok", reply, "record"),  # P0 was not asked that
        (7, "train", "r", "ok", reply, "terms"),
    ]
    for number, purpose, request, outcome, sha256, code in answers:
        replies = {P0: {"request_id": request, "outcome": outcome, "reply_sha256": sha256}}
        with bad(code) if code else nullcontext():
            book._answers(
                Entry(5, "answers", None), {"run_id": "x", "round": number, "purpose": purpose, "replies": replies}
            )
    with bad("record", "not asked"):
        coordinator_of()._answers(
            Entry(5, "answers", None), {"run_id": "x", "round": 1, "purpose": "train", "replies": {}}
        )


def test_whose_updates_a_round_counts() -> None:
    run = Run(
        1, outcomes={(1, "train", None): {P0: {"ok": "x"}, P1: {"ok": "x", "failed": "x"}, "z": {"timeout": None}}}
    )
    for partners, quorum, words in (
        ([P0], 1, None),
        (None, 1, "a round counts with 1"),
        ([], 1, "a round counts with 1"),
        ([P0], 2, "a round counts with 2"),
        ([P0, P0], 2, "a round counts with 2"),
        ([P0, "z"], 1, "gave no ok answer"),
        ([P0, "y"], 1, "gave no ok answer"),
        ([P0, P1], 1, "whose answer was that it failed"),
    ):
        with bad("record", words) if words else nullcontext():
            coordinator_of(quorum=quorum)._folded(run, {"round": 1, "partners": partners})


Books = tuple[Coordinator, dict[str, Partner]]


def crossing(evaluation: str = "public") -> Books:
    """A coordinator and two partners of one run that tell the same; the first did all, the second refused."""
    book, partners = coordinator_of(evaluation=evaluation), {}
    book.whole = True
    run = book.runs["x"]
    for number, purpose in ((0, "open"), (1, "train"), (1, "evaluate")):
        asks = {name: {"request_id": name + purpose, "request_sha256": digest(name, purpose)} for name in (P0, P1)}
        run.asks[number, purpose, None] = asks
        run.outcomes[number, purpose, None] = {
            P0: {"ok": digest("reply", purpose)},
            P1: {"refused: budget": digest("no")},
        }
    for name in (P0, P1):
        partners[name] = partner = Partner(Report(), book.terms, name)
        partner.whole = True
    second = "commit" if evaluation == "private" else "public"
    acts = [("hold", "open", 4), ("debit", "train", 5), ("commit", "train", 6), (second, "evaluate", 8)]
    for kind, purpose, line in [*acts, *([("debit", "evaluate", 7)] if evaluation == "private" else [])]:
        request = {"request_id": P0 + purpose, "request_sha256": digest(P0, purpose), "run_id": "x"}
        body = request | {"reply_sha256": digest("reply", purpose), "purpose": purpose}
        partners[P0].acts[kind][P0 + purpose] = Act(line, body | ({} if kind == "hold" else {"round": 1}))
    for purpose in ("open", "train", "evaluate"):
        body = {"request_id": P1 + purpose, "request_sha256": digest(P1, purpose), "run_id": "x", "reason": "budget"}
        partners[P1]._refuse(Entry(9, "refuse", None), body)
    return book, partners


def refuses(books: Books, **other: str) -> None:
    body = {"request_id": "z", "request_sha256": digest("z"), "run_id": "x", "reason": "budget"} | other
    books[1][P1]._refuse(Entry(11, "refuse", None), body)


L1 = f"partners/{P1}/ledger.jsonl"
CROSSED: list[tuple[str, Callable[[Books], Any], list[tuple[str, str, int | None]], list[int]]] = [
    ("nothing", lambda b: None, [], []),
    ("no_hold", lambda b: b[1][P0].acts["hold"].clear(), [("not_done", L0, None)], []),
    ("no_commit", lambda b: b[1][P0].acts["commit"].clear(), [("not_done", L0, None)], []),
    ("no_public", lambda b: b[1][P0].acts["public"].clear(), [("not_done", L0, None)], []),
    ("no_debit", lambda b: b[1][P0].acts["debit"].clear(), [], []),  # of a commit's debit its own ledger tells
    ("not_whole", lambda b: (b[1][P0].acts["commit"].clear(), setattr(b[1][P0], "whole", False)), [], []),
    ("other_reply", lambda b: b[1][P0].acts["commit"][P0 + "train"].body.update(reply_sha256="x"), [("not_done", L0, 6)], []),
    ("other_public", lambda b: b[1][P0].acts["public"][P0 + "evaluate"].body.update(reply_sha256="x"), [("not_done", L0, 8)], []),
    ("hold_has_no_reply", lambda b: b[1][P0].acts["hold"][P0 + "open"].body.pop("reply_sha256"), [], []),
    ("failed", lambda b: b[0].runs["x"].outcomes[1, "train", None].update({P0: {"failed": digest("reply", "train")}}), [], []),
    ("late_then_ok", lambda b: b[0].runs["x"].outcomes[1, "train", None].update({P0: {"timeout": None, "ok": "x"}}), [("not_done", L0, 6)], []),
    ("late", lambda b: b[0].runs["x"].outcomes[1, "train", None].update({P0: {"timeout": None, "invalid": None}}), [], [6]),
    ("never_seen", lambda b: b[0].runs["x"].outcomes.pop((1, "train", None)), [], [6]),
    ("said_refused", lambda b: b[0].runs["x"].outcomes[1, "train", None].update({P0: {"refused: budget": "x"}}), [("not_done", L0, None), ("not_asked", L0, 6)], []),
    ("late_then_refused", lambda b: b[0].runs["x"].outcomes[1, "train", None].update({P1: {"timeout": None, "refused: budget": "x"}}), [], []),
    ("refused_otherwise", lambda b: b[0].runs["x"].outcomes[1, "train", None].update({P1: {"refused: lost": "x"}}), [("not_done", L1, None)], []),
    ("other_request", lambda b: b[1][P0].acts["hold"][P0 + "open"].body.update(request_sha256="x"), [("not_asked", L0, 4)], []),
    ("other_run", lambda b: b[1][P0].acts["debit"][P0 + "train"].body.update(run_id="y"), [("not_asked", L0, 5)], []),
    ("other_round", lambda b: b[1][P0].acts["commit"][P0 + "train"].body.update(round=2), [("not_asked", L0, 6)], []),
    ("other_purpose", lambda b: b[1][P0].acts["debit"][P0 + "train"].body.update(purpose="evaluate"), [("not_asked", L0, 5)], []),
    ("public_round", lambda b: b[1][P0].acts["public"][P0 + "evaluate"].body.update(round=2), [("not_asked", L0, 8)], []),
    ("not_asked", lambda b: b[1][P1].acts["hold"].update(z=Act(3, {"request_id": "z", "run_id": "x", "request_sha256": "z"})), [("not_asked", L1, 3)], []),
    ("asked_by_halves", lambda b: (b[1][P1].acts["hold"].update(z=Act(3, {"request_id": "z", "run_id": "x", "request_sha256": "z"})), setattr(b[0], "whole", False)), [], []),
    ("one_id_twice", lambda b: b[0].runs["x"].asks[1, "train", None][P1].update(request_id=P1 + "open"), [("record", COORD, 3), ("not_done", L1, None), ("not_asked", L1, 9)], []),
    ("refuses_nothing", refuses, [("not_asked", L1, 11)], []),
    ("refuses_elsewhere", lambda b: refuses(b, run_id="y"), [], []),
    ("refuses_again", lambda b: refuses(b, request_id=P1 + "open"), [], []),
]  # fmt: skip


@pytest.mark.parametrize("row", CROSSED, ids=[row[0] for row in CROSSED])
def test_the_two_sides_of_a_request(row: tuple[str, Callable[[Books], Any], list[Any], list[int]]) -> None:
    _, damage, wrong, warned = row
    book, partners = crossing()
    damage((book, partners))
    report = Report()
    verifier._cross_check(report, book, partners)
    assert [(v["code"], v["file"], v["line"]) for v in report.violations] == wrong
    assert [(w["code"], w["file"], w["line"]) for w in report.warnings] == [("unanswered", L0, line) for line in warned]


def test_the_two_sides_of_a_private_evaluation() -> None:
    """It is a debit and a commit, as training is."""
    for damage, wrong in (
        (lambda acts: None, []),
        (lambda acts: acts["commit"].pop(P0 + "evaluate"), [("not_done", None)]),
        (lambda acts: acts["debit"][P0 + "evaluate"].body.update(purpose="train"), [("not_asked", 7)]),
        (lambda acts: acts["commit"][P0 + "evaluate"].body.update(round=2), [("not_asked", 8)]),
        (lambda acts: acts["public"].update({P0 + "evaluate": acts["commit"].pop(P0 + "evaluate")}), [("not_done", None), ("not_asked", 8)]),
    ):  # fmt: skip
        book, partners = crossing("private")
        damage(partners[P0].acts)
        report = Report()
        verifier._cross_check(report, book, partners)
        assert said(report) == wrong
        assert report.warnings == []


def cohorts() -> Population:
    """A population of ten clients in a run that holds one unprotected round, and a private evaluation."""
    book = Population(Report(), replace(terms_of(CLIENTS), clients=10, quorum=2, clip_norm=None))
    book._run(Entry(3, "run", None), {"run_id": "x"})
    book.plans["x"] = {"train": (1, None), "evaluate": (1, EVENT)}
    return book


def test_from_when_on_a_population_has_no_bound() -> None:
    book = cohorts()
    b = {"run_id": "x", "round": 1, "clip_norm": None, "declared_records": 100, "clients": [[0, 3]]}
    for line, purpose, event, unbounded in (
        (5, "evaluate", FIELDS, None),
        (6, "train", NONE, 6),
        (7, "train", NONE, 6),
    ):
        book._cohort_debit(Entry(line, "cohort-debit", None, EARLY), b | {"purpose": purpose, "event": event})
        assert (book.unbounded, book.last_debit) == (unbounded, line)
    plan = [{"purpose": "train", "count": 1, "event": FIELDS}]
    book.budget, book.terms = HELD, replace(book.terms, plan={"train": EVENT}, rounds=1)
    book._run(Entry(8, "run", None), {"run_id": "y"})
    with bad("no_budget"):
        book._cohort_hold(Entry(9, "cohort-hold", None, EARLY), {"run_id": "y", "plan": plan})
    for purpose, event in (("train", FIELDS), ("evaluate", NONE)):
        with bad("not_held"):
            book._cohort_debit(Entry(10, "cohort-debit", None, EARLY), b | {"purpose": purpose, "event": event})


def test_a_round_counts_who_trained() -> None:
    book = cohorts()
    for purpose, clients, committed in (("evaluate", [[0, 9]], 0), ("train", [[2, 4]], 3), ("evaluate", [[0, 9]], 3)):
        book.cohort["x", purpose] = (1, [[0, 9]])
        b = {"run_id": "x", "round": 1, "purpose": purpose, "clients": clients}
        book._cohort_commit(Entry(6, "cohort-commit", None), b)
        assert book.committed["x", 1] == committed


def test_a_populations_runs_are_a_hundred_at_most() -> None:
    """Each is compared with all histories before it."""
    terms = terms_of(CLIENTS)
    book = Population(Report(), terms)
    plan = [{"purpose": "train", "count": terms.rounds, "event": FIELDS | {"q": "0.2", "sigma": "3.0", "steps": 1}}]
    book.terms = replace(terms, plan={"train": (0.2, 3.0, 1)})
    book.budget = replace(HELD, epsilon=1e9)
    for number in range(102):
        book._run(Entry(3, "run", None), {"run_id": str(number)})
        with nullcontext() if number < 100 else bad("repeated", "more than 100 runs"):
            book._cohort_hold(Entry(4, "cohort-hold", None, EARLY), {"run_id": str(number), "plan": plan})
    fewer = Population(Report(), book.terms)
    fewer.budget = book.budget
    fewer._run(Entry(3, "run", None), {"run_id": "x"})
    fewer._cohort_hold(Entry(4, "cohort-hold", None, EARLY), {"run_id": "x", "plan": plan})
    with bad("repeated", "held before"):
        fewer._cohort_hold(Entry(5, "cohort-hold", None, EARLY), {"run_id": "x", "plan": plan})


# -- who vouches ---------------------------------------------------------------------------------------------


class Ledger:
    """As much of a ledger as heads and checkpoints are compared with."""

    def __init__(self, length: int, whole: bool = True) -> None:
        self.file, self.whole, self.length, self.ledger_id, self.report = "f", whole, length, "id", Report()
        self.chain = SimpleNamespace(roots=[str(n) for n in range(length + 1)])

    def wrong(self, code: str, line: int | None, what: str) -> None:
        self.report.wrong(code, self.file, line, what)


def witnesses_of(ledger: Ledger, *others: str) -> Witnesses:
    """Of P0's ledger, under a charter of P0, others and the coordinator."""
    terms = replace(terms_of(SMALL), keys={name: name for name in (P0, *others, C)})
    return Witnesses(Report(), terms, {P0: ledger})  # type: ignore[dict-item]


def statement(length: int, *signers: str, root: str | None = None, **other: Any) -> Statement:
    return Statement(P0, length, str(length) if root is None else root, (P0, *signers), "h", **other)


@pytest.mark.parametrize(
    ("statements", "length", "by", "closing"),
    [
        ([], 0, [], None),
        ([statement(9)], 0, [], None),
        ([statement(9, C)], 0, [], None),
        ([statement(9, C, "a")], 0, [], None),  # two partners beside the coordinator, where there are two
        ([statement(9, C, "a", "b")], 9, ["a", "b", C], None),
        ([statement(9, C, "a"), statement(7, C, "b"), statement(5, C, "c")], 7, ["a", "b", C], None),
        ([statement(5, C, "c"), statement(7, "b"), statement(9, "a")], 5, ["a", "b", "c", C], None),
        ([statement(9, C, "a", "b", "c"), statement(4, C, "a", "b", "c", closing="r")], 9, ["a", "b", "c", C], None),
        ([statement(4, C, "a", "b", "c", closing="r"), statement(9, C)], 4, ["a", "b", "c", C], "r"),
        ([statement(n, C, "a", "b", "c", closing=f"r{n}") for n in (6, 3)], 6, ["a", "b", "c", C], "r6"),
        ([statement(1, C, "a", "b", "c", closing="r")], 1, ["a", "b", "c", C], "r"),
        ([statement(10, C, "a", "b", "c", closing="r")], 10, ["a", "b", "c", C], "r"),
    ],
)
def test_how_much_others_vouch_for(
    statements: list[Statement], length: int, by: list[str], closing: str | None
) -> None:
    for whole in (True, False):
        others = witnesses_of(Ledger(10, whole), "a", "b", "c")
        others.statements[P0] = statements
        found = others.witnessed(P0)
        assert found == {
            "witnessed": {"length": length, "by": by, "closing": closing},
            "tail": 10 - length,
            "missing": 0,
            "beyond": [],
        }
        told = [(w["code"], w["line"]) for w in others.report.warnings]
        assert told == [("tail", length + 1)] * (whole and length < 10)


def test_one_other_partner_is_enough_where_there_is_one() -> None:
    others = witnesses_of(Ledger(10), "a")
    others.statements[P0] = [statement(9, C, "a"), statement(10, C)]
    assert others.witnessed(P0)["witnessed"] == {"length": 9, "by": ["a", C], "closing": None}
    empty = {"witnessed": {"length": 0, "by": [], "closing": None}, "tail": 0, "missing": 0, "beyond": []}
    assert witnesses_of(Ledger(0, False), "a").witnessed(P0) == empty
    alone = witnesses_of(Ledger(10))
    alone.statements[P0] = [statement(8, C)]
    assert alone.witnessed(P0)["witnessed"] == {"length": 8, "by": [C], "closing": None}


@pytest.mark.parametrize(
    ("length", "statements", "agreed", "found", "missing"),
    [
        (10, [statement(10), statement(3)], 0, [], 0),
        (10, [statement(12)], 0, [("entries_missing", 1)], 2),
        (10, [statement(12), statement(4), statement(11)], 0, [("entries_missing", 5)], 2),
        (10, [statement(12), statement(4)], 7, [("entries_missing", 8)], 2),
        (10, [statement(12), statement(10)], 0, [("entries_missing", 11)], 2),
        (10, [statement(12), statement(9)], 0, [("entries_missing", 10)], 2),
        (10, [statement(6, root="x")], 0, [("entry_differs", 1)], 0),
        (
            10,
            [statement(6, root="x"), statement(7, root="x"), statement(4), statement(9)],
            0,
            [("entry_differs", 5)],
            0,
        ),
        (10, [statement(6, root="x")], 5, [("entry_differs", 6)], 0),
        (10, [statement(6, root="x")], 6, [("entry_differs", 1)], 0),
        (10, [statement(4, ledger_id="other")], 0, [("entry_differs", 1)], 0),
        (10, [statement(4, ledger_id="id")], 0, [], 0),
        (10, [statement(1, root="x"), statement(11)], 0, [("entry_differs", 1), ("entries_missing", 1)], 1),
    ],
)
def test_what_signed_statements_show_of_a_ledger(
    length: int, statements: list[Statement], agreed: int, found: list[tuple[str, int]], missing: int
) -> None:
    for whole in (True, False):
        ledger = Ledger(length, whole)
        others = witnesses_of(ledger, "a")
        others.statements[P0], others.agreed[P0] = list(statements), agreed
        others.compare()
        assert said(ledger.report) == [one for one in found if whole or one[0] != "entries_missing"]
        assert ledger.whole is (whole and not missing)
        good = [one for one in statements if one.length <= length and one.root == str(one.length)]
        good = [one for one in good if one.ledger_id in (None, "id")]
        assert others.statements[P0] == sorted(good, key=lambda one: one.length)
        assert others.report.checked["proofs"] == sum(one.length <= length for one in statements)  # those that could be
        assert others.witnessed(P0)["missing"] == missing
        for v in ledger.report.violations:
            if v["code"] == "entries_missing":
                assert ("(or as many from" in v["what"]) is (v["line"] <= length)
                assert (f"entries {length + 1} to" if missing > 1 else f"entry {length + 1} is missing") in v["what"]


def test_two_histories_of_one_length_contradict_each_other() -> None:
    others = witnesses_of(Ledger(3), "a")
    others.statements[P0] = [
        statement(5, root="x", line=1),
        statement(4, line=2),
        statement(5, root="y", line=3),
        statement(5, root="x", line=4),
    ]
    others.compare()
    assert said(others.report) == [("contradiction", 3)]


def test_a_copy_and_the_ledger_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is longer, where they part, and how much of the copy is good."""
    good, why = 6, ""

    class Copied:
        def __init__(self, *_: object) -> None:
            self.roots = ["0"]

        @property
        def length(self) -> int:
            return len(self.roots) - 1

        def take(self, line: bytes) -> None:
            if self.length == good:
                raise Bad(why, "x")
            self.roots.append(line.decode())

    monkeypatch.setattr(verifier, "Chain", Copied)
    for lines, at, code, agreed, longer, fork, warned in (
        ([1, 2, 3], 6, "", 3, 3, None, []),
        ([1, 2, 3, 4, 5], 6, "", 4, 5, None, []),
        ([1, 2, 9, 4, 5], 6, "", 0, None, 3, []),
        ([9], 6, "", 0, None, 1, []),
        ([1, 2, 3, 4, 5], 2, "layout", 2, 2, None, [("copy", 3)]),
        ([1, 2, 3, 4, 5], 2, "torn", 2, 2, None, []),
        ([1], 0, "layout", 0, 0, None, [("copy", 1)]),
    ):
        good, why = at, code
        monkeypatch.setattr(verifier, "_lines", lambda *_, lines=lines: (str(n).encode() for n in lines))
        ledger = Ledger(4)
        ledger.owner = P0  # type: ignore[attr-defined]
        others = witnesses_of(ledger, "a")
        others._ledger(Path(), "x", "x", ledger)  # type: ignore[arg-type]
        assert said(ledger.report) == ([("fork", fork)] if fork else [])
        assert others.agreed[P0] == agreed
        assert others.longer.get(P0, (None, ""))[0] == longer
        assert [(w["code"], w["line"]) for w in others.report.warnings] == warned
        assert others.report.checked["proofs"] == 1
        assert (others.used > 0) is (at > 0)


@pytest.mark.parametrize("length", [0, 1])
def test_no_head_or_checkpoint_is_of_an_empty_ledger(tmp_path: Path, length: int) -> None:
    made = fresh(SMALL)
    made.heads = [Kept(P1, P0, length, (P0, P1))]
    made.closings[0][2][P0] = length
    found = {("head", f"heads/{P1}.jsonl", 1), ("closing", "closing/run-1.json", 1)}
    verdict = verdict_of(made.write(tmp_path / "b"))
    codes = {(v["code"], v["file"], v["line"]) for v in verdict["violations"] if v["code"] != "closing_missing"}
    assert codes == (set() if length else found)


@pytest.mark.parametrize("version", [0, 1, 2, 3])
def test_of_which_version_heads_and_checkpoints_are(version: int) -> None:
    made = fresh(SMALL)
    others = witnesses_of(Ledger(3))
    others.terms, others.names = terms_of(SMALL), {key: name for name, key in terms_of(SMALL).keys.items()}
    line = made.head(P0, 1, digest("x"), (P0, P1), v=version)
    with nullcontext() if version == 1 else bad("layout"):
        assert others._head(line, "f", 1, False) is not None


def test_heads_behind_somebody_elses_are_read_too(tmp_path: Path) -> None:
    """In a file that is given: a head of another charter, a bad one, a good one."""
    made, file = fresh(SMALL), tmp_path / "heads.jsonl"
    terms = terms_of(SMALL)
    others = Witnesses(Report(), terms, {P0: Ledger(3), C: Ledger(3)})  # type: ignore[dict-item]
    named = made.head(P0, 1, digest("x"), (P0,), owner="somebody")  # by our key, under another name
    made.people["mallory"], made.books["mallory"] = identity("mallory"), made.books[P0]
    foreign = made.head("mallory", 1, digest("x"), ("mallory", P0))
    good = made.head(P0, 2, digest("y"), (P0, P1))
    for line in (named, foreign):
        assert others._head(line, "f", 1, True) is None
        with bad("head"):
            others._head(line, "f", 1, False)
    file.write_bytes(b"".join(line + b"\n" for line in (named, foreign, b"{}", good, good)))
    others.read_heads(tmp_path, file.name, "x", "x", given=True)
    assert [(w["code"], w["line"]) for w in others.report.warnings] == [("unrelated", 1), ("unrelated", 2), ("copy", 3)]
    assert [(one.length, one.signers, one.line) for one in others.statements[P0]] == [
        (2, (P0, P1), 4),
        (2, (P0, P1), 5),
    ]
    assert others.report.checked["heads"] == len(others.heads) == 2


def test_why_a_copy_is_no_evidence(tmp_path: Path) -> None:
    """What is wrong with it where that is known, and what it came from where it is not."""
    others = witnesses_of(Ledger(3))
    for data, words in (
        (b"{", "not valid JSON: "),
        (b"{}", "neither a ledger, nor"),
        (b'{"envelope":1}', "malformed ("),
        (b"[]", "malformed ("),
    ):
        (tmp_path / "x").write_bytes(data)
        others._copy(tmp_path, "x", "label")
        warning = others.report.warnings.pop()
        assert (warning["code"], warning["file"], warning["line"]) == ("copy", "label", 1)
        assert warning["what"].startswith(words)
    assert others.report.warnings == []
    assert others.used == 0


def test_a_closing_file_that_is_not_good_is_named_by_its_line(tmp_path: Path) -> None:
    folder = fresh(TWO_RUNS).write(tmp_path / "b")
    (folder / "closing/run-2.json").rename(folder / "closing/run-0.json")
    (folder / "closing/x").mkdir()
    assert places(verdict_of(folder)) == {
        ("closing", "closing/run-0.json", 1),
        ("file", "closing/x", 1),
        ("closing_missing", "closing/run-2.json", None),
    }


def test_which_checkpoints_close_a_run() -> None:
    """Those that reach at least to where the coordinator's ledger closes it, with its model."""
    for at, reaches, model, whole, good in (
        (5, 5, "m", True, True),
        (5, 6, "m", True, True),
        (6, 5, "m", True, False),
        (6, 5, "m", False, True),  # what was cut off may say so
        (5, 5, "n", True, False),
        (5, 5, "n", False, False),
        (None, 5, "m", True, False),
        (None, 5, "m", False, True),
    ):
        ledger = Ledger(9, whole)
        others = witnesses_of(ledger)
        others.books = {C: ledger}  # type: ignore[dict-item]
        point = {"run_id": "x", "model_sha256": model, "ledgers": [{"owner": C, "length": reaches}]}
        others.closings = [point]
        run = Run(3) if at is None else Run(3, close={"model_sha256": "m"}, closed_at=at)
        others.check_closings({"x": run})
        assert others.closings == ([point] if good else [])
        wanted = [] if good else [("closing", 1)]
        if at is not None and not good:
            wanted.append(("closing_missing", None))
        assert said(others.report) == wanted
        told = [(w["code"], w["line"]) for w in others.report.warnings]
        assert told == ([("open_run", 3)] if at is None and whole else [])
    for whole in (True, False):
        others = witnesses_of(Ledger(9, whole))
        others.books = {C: Ledger(9, whole)}  # type: ignore[dict-item]
        others.check_closings({})
        assert [w["code"] for w in others.report.warnings] == ["no_runs"] * whole


def test_only_so_many_signatures_are_looked_at() -> None:
    """Twice as many as there are people."""
    others, payload = witnesses_of(Ledger(1)), b"x"
    others.names = {key: name for name, key in terms_of(SMALL).keys.items()}
    one = identity(P0)
    good, wrong = (one.key, one.sign(verifier.HEAD_TYPE, payload)), (one.key, b"x" * 64)
    stranger = ("0" * 64, b"x" * 64)
    for before in range(8):
        for junk in (wrong, stranger):
            signers = others._good(verifier.HEAD_TYPE, payload, [*[junk] * before, good, good])
            assert signers == ((P0,) if before < 6 else ())


def test_what_looks_like_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its first 64 KiB; and what cannot be looked at might be."""
    file, words = tmp_path / "file", [b'"envelope":', verifier.HEAD_TYPE.encode(), verifier.CLOSING_TYPE.encode()]
    for word in words:
        for before, ours in ((0, True), (2**16 - len(word), True), (2**16 - len(word) + 1, False), (2**17, False)):
            file.write_bytes(b" " * before + word + b"x")
            assert verifier._like_ours(tmp_path, "file") is ours
    file.write_bytes(b"")
    assert not verifier._like_ours(tmp_path, "file")
    assert verifier._like_ours(tmp_path, "nowhere")

    def fails(_: int) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(verifier, "_open", lambda *_: nullcontext(SimpleNamespace(read=fails)))
    assert verifier._like_ours(tmp_path, "file")


# -- the bill, the result and the verdict --------------------------------------------------------------------


def test_what_a_bill_says_without_a_budget_or_a_bound() -> None:
    terms, plain = replace(terms_of(SMALL), epsilon=3.0), terms_of(PLAIN)
    nothing = {
        "epsilon": 0.0,
        "epsilon_filter": 0.0,
        "epsilon_cap": terms.epsilon,
        "delta": terms.delta,
        "unbounded": False,
    }
    unknown = nothing | {"epsilon": None, "epsilon_filter": None}
    bill = verifier._Bill(terms, Report())
    spent = {(1.0, 20.0): 2}
    assert bill.of(L0, [P0], None, False, {}) == nothing
    assert bill.of(L0, [P0], None, False, spent) == unknown
    assert bill.of(L0, [P0], None, True, {}) == unknown | {"unbounded": True}
    assert verifier._Bill(plain, Report()).of(L0, [P0], None, False, {})["epsilon"] is None
    known = bill.of(L0, [P0], HELD, False, spent)
    exact = filter_epsilon(HELD, tuple(spent.items()))
    assert known["epsilon_filter"] == exact
    assert 0 < known["epsilon"] <= exact
    assert (known["epsilon_cap"], known["delta"], known["unbounded"]) == (HELD.epsilon, HELD.delta, False)
    assert bill.of(L0, [P0], HELD, True, spent) == known | {"epsilon": None, "epsilon_filter": None, "unbounded": True}
    assert bill.of(L0, [P0], HELD, False, {}) == known | {"epsilon": 0.0, "epsilon_filter": 0.0}
    own = bill.of_charter(L0, [P0], HELD, False, spent)
    assert terms.epsilon is not None
    assert terms.delta is not None
    assert own["epsilon_filter"] == filter_epsilon(HELD.at(terms.epsilon, terms.delta), tuple(spent.items()))
    assert own["cap"] == terms.epsilon != HELD.epsilon
    for part in ("epsilon", "delta"):  # a charter that has no bound is read at the budget's own
        bill.terms = replace(terms, **{part: None})
        assert bill.of_charter(L0, [P0], HELD, False, spent)["epsilon_filter"] == exact


def test_no_bound_is_more_than_any() -> None:
    for values, most in (([], None), ([0.5], 0.5), ([0.5, 2.0, 1.0], 2.0), ([0.5, None], None), ([None], None)):
        assert verifier._most(values) == most


def test_a_partners_figures_are_the_most_of_any_lineage() -> None:
    """And each lineage has what this charter's debits alone cost there."""
    terms = terms_of(SMALL)
    for order in (1, -1):
        partner, own = partner_of(), {X: (1, 8), Y: (4, 2)}
        for lineage in [X, Y][::order]:
            account = Account(used=True)
            account.fix(HELD)
            account.agreed = {"of": lineage}
            for number in range(own[lineage][0] + own[lineage][1]):
                ours = number < own[lineage][0]
                point = {"entry": len(partner.acts["debit"]), "epsilon_filter": None, "epsilon": None}
                account.debits.append((point, EVENT, ours))
                partner.acts["debit"][f"{lineage}/{number}"] = Act(1, {})
            partner.accounts[lineage] = account
        partner.accounts["unused"] = Account()
        partner.acts["commit"]["elsewhere"] = partner.acts["commit"][f"{X}/0"] = Act(1, {})
        partner.datasets = {n: {"lineage": of, "declared": n} for n, of in (("a", X), ("b", Y), ("c", X))}
        bill = verifier._Bill(terms, Report())
        made = verifier._partner_summary(partner, bill)
        for lineage, (ours, all_of_it) in {X: (1, 9), Y: (4, 6)}.items():
            one = made["lineages"][lineage]
            assert one["epsilon_filter"] == filter_epsilon(HELD, (((1.0, 20.0), 2 * all_of_it),))
            assert terms.epsilon is not None
            assert terms.delta is not None
            at = HELD.at(terms.epsilon, terms.delta)
            assert one["charter_epsilon"]["epsilon_filter"] == filter_epsilon(at, (((1.0, 20.0), 2 * ours),))
        assert made["epsilon_filter"] == made["lineages"][X]["epsilon_filter"] > made["lineages"][Y]["epsilon_filter"]
        assert made["charter_epsilon"] == made["lineages"][Y]["charter_epsilon"]
        assert [d["dataset"] for d in made["lineages"][X]["datasets"]] == ["a", "c"]
        assert (made["debits"], made["uncommitted_debits"], made["unbounded"]) == (15, 14, False)
        assert made["budget"] == {"of": [X, Y][::order][0]}
        assert len(made["trajectory"]) == 15
        partner.accounts[Y].debits.append(({"entry": 99, "epsilon_filter": None}, None, False))
        partner.accounts[Y].unbounded = 99
        made = verifier._partner_summary(partner, bill)
        assert (made["unbounded"], made["epsilon"], made["lineages"][X]["unbounded"]) == (True, None, False)
        assert made["charter_epsilon"]["epsilon"] is not None  # the unprotected one is another charter's
        partner.accounts[Y].debits.append(({"entry": 100, "epsilon_filter": None}, None, True))
        assert verifier._partner_summary(partner, bill)["charter_epsilon"]["epsilon"] is None


def test_the_figures_of_who_did_nothing() -> None:
    made = verifier._partner_summary(partner_of(), verifier._Bill(terms_of(SMALL), Report()))
    assert (made["epsilon"], made["epsilon_filter"], made["unbounded"], made["debits"]) == (0.0, 0.0, False, 0)
    assert made["charter_epsilon"] == {"epsilon": 0.0, "epsilon_filter": 0.0, "cap": terms_of(SMALL).epsilon}
    assert (made["epsilon_cap"], made["delta"]) == (terms_of(SMALL).epsilon, terms_of(SMALL).delta)


def test_what_a_claim_says_of_evaluation() -> None:
    assert verifier._claim(terms_of(SMALL), {}).endswith("rows declared public are outside it.")
    for shape in (PRIVATE, Shape(partners=2, rounds=1, sigma=20.0, evaluation="none")):
        assert verifier._claim(terms_of(shape), {}).endswith("whoever receives the model.")
    assert verifier._claim(terms_of(PLAIN), {}).startswith("There is no differential privacy guarantee")


def test_lost_answers_of_clients_are_counted(tmp_path: Path) -> None:
    made = fresh(Shape(clients=200, rounds=1, evaluation="none", sigma=30.0))
    made.entry(C, "cohort-debit")["clients"] = [[2, 9]]
    made.entry(C, "cohort-commit")["clients"] = [[2, 6]]
    verdict = verdict_of(made.write(tmp_path / "b"))
    assert verdict["violations"] == []
    (told,) = [w["what"] for w in verdict["warnings"] if w["code"] == "uncommitted"]
    assert "(3)" in told
    events = verdict["partners"]["client-0003"]["events"]
    assert [(one["charter"], one["count"]) for one in events] == [("this", 1)]
    assert verdict["partners"]["client-0003"]["rounds"] == 1
    assert verdict["partners"]["client-0009"]["rounds"] == 0
    assert len(verdict["partners"]) == 200
    debits = [verdict["partners"][f"client-{number:04d}"]["debits"] for number in (0, 1, 2, 9, 10, 199)]
    assert debits == [0, 0, 1, 1, 0, 0]


def test_runs_that_are_open_and_ledgers_that_are_cut(tmp_path: Path) -> None:
    made = fresh(TWO_RUNS)
    made.closings.pop()
    made.drop(C, made.index(C, "close", 1))
    folder = made.write(tmp_path / "b")
    verdict = verdict_of(folder)
    assert verdict["open_runs"] == ["run-2"]
    assert len(verdict["limits"]) == len(verifier.LIMITS) + 2
    data = (folder / L0).read_bytes()
    (folder / L0).write_bytes(data[:-1])
    verdict = verdict_of(folder)
    assert (verdict["verified"], verdict["claim"]) == (False, None)
    assert f"ledgers of {P0}: figures are of what was read" in verdict["limits"][-2]
    data = (folder / COORD).read_bytes()
    (folder / COORD).write_bytes(data[:-1])
    verdict = verdict_of(folder)
    assert (verdict["open_runs"], verdict["coordinator"]["whole"]) == ([], False)
    assert verdict["coordinator"]["witnessed"]["length"] > 0


def test_all_of_a_bundle_is_looked_at(tmp_path: Path) -> None:
    """Folders of strangers, what a ledger's end shows, and both sides of a request; and as of when the bill is complete."""
    made = fresh(TWO_RUNS)
    made.drop(P0, made.index(P0, "release", 1))
    made.entry(P1, "commit")["reply_sha256"] = digest("another")
    folder = made.write(tmp_path / "b")
    (folder / "partners/mallory").mkdir()
    (folder / "heads").mkdir(exist_ok=True)
    (folder / f"heads/{P0}").write_bytes(b"")
    verdict = verdict_of(folder)
    assert places(verdict) == {
        ("stranger", "partners/mallory", None),
        ("stranger", f"heads/{P0}", None),
        ("not_done", L1, made.index(P1, "commit") + 1),
    }
    assert places(verdict, "warnings") == {("unreleased", L0, None)}
    assert (
        "The bill is complete as of the newest closing checkpoint in this bundle, run run-2," in verdict["limits"][-2]
    )
    made = fresh(PLAIN)
    made.closings.clear()
    assert verdict_of(made.write(tmp_path / "b"))["limits"][-2].startswith(
        "No good closing checkpoint is in this bundle"
    )


Damage = Callable[[dict[str, Any]], Any]
WRONG: list[Damage] = [
    lambda r: r.update(charter_sha256=digest("x")),
    lambda r: r.pop("charter_sha256"),
    lambda r: r.update(privacy=[]),
    lambda r: r.pop("privacy"),
    lambda r: r["privacy"].update(kind="none"),
    lambda r: r["privacy"].update(epsilon=99.0),
    lambda r: r["privacy"].update(delta=0.5),
    lambda r: r["privacy"].update(noise_multiplier=99.0),
    lambda r: r["privacy"].update(clip_norm=99.0),
    lambda r: r["privacy"].pop("clip_norm"),
    lambda r: r.update(partners=[P0, P1]),
    lambda r: r["partners"].pop(P1),
    lambda r: r["partners"].update(x=r["partners"][P0]),
    lambda r: r["partners"].update({P1: []}),
    lambda r: r["partners"][P1].pop("rounds"),
    lambda r: r["partners"][P1].update(rounds=1),
    lambda r: r["partners"][P1].update(declared_records=1),
    lambda r: r["partners"][P1].update(epsilon_cap=99.0),
    lambda r: r["partners"][P1].update(epsilon_filter=99.0),
    lambda r: r["partners"][P1].update(delta=0.5),
    lambda r: r["partners"][P1].update(delta=r["partners"][P1]["delta"] * 1.001),
    lambda r: r["partners"][P1].update(epsilon_filter=r["partners"][P1]["epsilon_filter"] * 1.001),
    lambda r: r["partners"][P1].update(epsilon=r["partners"][P1]["epsilon"] * 1.01),
    lambda r: r["partners"][P1].update(epsilon=99.0),
    lambda r: r.update(run_id="run-2"),
    lambda r: r.update(rounds={}),
    lambda r: r["rounds"].pop(),
    lambda r: r["rounds"].append(r["rounds"][-1]),
    lambda r: r["rounds"].reverse(),
    lambda r: r["rounds"].__setitem__(0, []),
    lambda r: r["rounds"][0].update(round=True),
    lambda r: r["rounds"][0].update(round=1.0),
    lambda r: r["rounds"][0].update(metrics={}),
    lambda r: r["rounds"][1].pop("metrics"),
    lambda r: r["rounds"][1]["metrics"].update(auc=0.1),
    lambda r: r.update(final=r["rounds"][0]["metrics"]),
    lambda r: r.update(final={}),
    lambda r: r.update(refusals={}),
    lambda r: r["refusals"].pop(),
    lambda r: r["refusals"].append(r["refusals"][0]),
    lambda r: r["refusals"].append(r["refusals"][0] | {"partner": "x"}),
    lambda r: r["refusals"].append(r["refusals"][0] | {"partner": []}),
    lambda r: r["refusals"].append(7),
    lambda r: r["refusals"].append({}),
    lambda r: r["refusals"][0].update(reason="another"),
    lambda r: r["refusals"][0].update(round=7),
    lambda r: r["refusals"][0].update(run_id="run-1"),
    lambda r: r["refusals"][0].update(partner=P1),
]


def test_every_part_of_a_result_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thing at a time; and nothing about a ledger that is not whole."""
    made, asked = fresh(FULL), list[tuple[Any, ...]]()
    monkeypatch.setattr(verifier, "_check_result", lambda *about: asked.append(about))
    folder = made.write(tmp_path / "b")
    right = result_for(made, verdict_of(folder))
    monkeypatch.undo()
    ((root, _, terms, book, refusals, partners, coarse),) = asked
    assert len(right["refusals"]) == len(right["rounds"]) - 1 == 1

    def found(result: object, **other: Any) -> list[dict[str, Any]]:
        (folder / "result.json").write_text(result if isinstance(result, str) else json.dumps(result))
        report = Report()
        about = {"book": book, "partners": partners, "coarse": coarse} | other
        verifier._check_result(root, report, terms, about["book"], refusals, about["partners"], about["coarse"])
        assert report.warnings == []
        assert {(v["code"], v["file"], v["line"]) for v in report.violations} <= {("result", "result.json", None)}
        return report.violations

    assert found(right) == []
    for number, damage in enumerate(WRONG):
        result = copy.deepcopy(right)
        damage(result)
        assert len(found(result)) == 1, number
    for nonsense in ([], None, 7, "", "{", '{"a":NaN}', "\ufeff{}"):
        assert len(found(nonsense)) == 1
    result = copy.deepcopy(right)
    del result["partners"][P1]["epsilon_filter"]  # not every result tells it
    result["partners"][P1]["epsilon"] *= 1.001  # another odometer's
    assert found(result) == []
    # what is not whole is not compared, and what is only bounded is not, as far as epsilon goes
    result = copy.deepcopy(right)
    result["partners"][P1] |= dict.fromkeys(result["partners"][P1], 7)
    assert len(found(result)) == 6
    cut = partners | {P1: partners[P1] | {"whole": False}}
    assert found(result, partners=cut) == []
    result = copy.deepcopy(right)
    result["partners"][P1]["epsilon"] = 7
    assert found(result, coarse={P1}) == []
    assert len(found(result, coarse={P0})) == 1
    result["partners"][P1]["delta"] = 0.5
    assert len(found(result, coarse={P1})) == 1
    result = copy.deepcopy(right)
    result["run_id"] = "x"
    assert found(result, book=SimpleNamespace(whole=False, runs={})) == []
    result = copy.deepcopy(right)
    result["refusals"] = []
    cut = partners | {right["refusals"][0]["partner"]: partners[P0] | {"whole": False}}
    assert found(result, partners=cut) == []


def test_the_rounds_of_a_result_are_of_the_first_completed_run() -> None:
    def run(why: str | None, *numbers: int) -> Run:
        rounds = [{"round": n, "metrics": {"auc": f"0.{n}"}} for n in numbers]
        return Run(1, rounds=rounds, close=None if why is None else {"why": why})

    def said_of(run_id: str | None, *numbers: int) -> dict[str, Any]:
        rounds = [{"round": n, "metrics": {"auc": n / 10}} for n in numbers]
        return {"run_id": run_id, "rounds": rounds, "final": rounds[-1]["metrics"] if rounds else {}}

    for runs, good in (
        ({"a": run("completed", 1, 2), "b": run("completed", 1)}, said_of("a", 1, 2)),
        ({"a": run("refused"), "b": run("completed", 1, 2), "c": run(None, 1)}, said_of("b", 1, 2)),
        ({"a": run(None, 1), "b": run("refused")}, said_of("a", 1)),
        ({"a": run("refused")}, said_of("a")),
        ({}, said_of(None)),
    ):
        verifier._check_rounds(good, runs)
        with bad("result", "run_id is"):
            verifier._check_rounds(good | {"run_id": "z"}, runs)
        with bad("result", "rounds are not the"):
            verifier._check_rounds(good | {"rounds": [*good["rounds"], good]}, runs)
        with bad("result", "final: "):
            verifier._check_rounds(good | {"final": {"auc": 0.9}}, runs)


def test_what_a_broken_disk_is_blamed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file, where that is told; else the bundle."""
    for about, file in (
        ((5, "Input/output error", "some file"), "some file"),
        ((5, "Input/output error"), str(tmp_path)),
    ):

        def fails(*_: object, about: tuple[Any, ...] = about) -> dict[str, Any]:
            raise OSError(*about)

        monkeypatch.setattr(verifier, "_verdict", fails)
        with pytest.raises(Unreadable, match="cannot be read: Input/output error") as caught:
            verifier.verify_bundle(tmp_path)
        assert (caught.value.file, caught.value.line) == (file, None)


def test_how_the_command_is_called(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(fresh(SMALL).write(tmp_path / "b"))
    one, other = f"{folder}/{L0}", f"{folder}/{COORD}"
    for arguments in (["-h"], ["--help"], ["-h", "x"]):
        assert verifier.main(arguments) == 0
        assert capsys.readouterr().out.startswith("`python verifier.py BUNDLE")
    for arguments in (
        [], [""], [folder, "--against"], [folder, one], [folder, "--with", one], [folder, "--against", one, "--with", other],
        [folder, "--against", one, "--against"], [folder, one, "--against"],
    ):  # fmt: skip
        assert verifier.main(arguments) == 2
        out, err = capsys.readouterr()
        assert (out, err) == ("", "usage: python verifier.py BUNDLE [--against PATH ...]\n")
    for arguments in ([folder], [folder, "--against", one], [folder, "--against", one, "--against", other]):
        assert verifier.main(arguments) == 0
        out, err = capsys.readouterr()
        assert (out, err) == (json.dumps(json.loads(out), indent=2) + "\n", "")
        assert json.loads(out)["checked"]["proofs"] == 3 + len(arguments) // 2
    assert verifier.main([folder, "--against", one, "--against", f"{folder}/nowhere"]) == 2
    assert capsys.readouterr().err == f"{folder}/nowhere: not there, so nothing can be compared with it\n"
    (Path(folder) / "model.safetensors").write_bytes(b"x")
    assert verifier.main([folder]) == 1


def test_words_for_entries_and_models() -> None:
    assert (verifier._entries(3, 3), verifier._entries(3, 5)) == ("entry 3 is", "entries 3 to 5 are")
    assert verifier._model({"model_sha256": digest("x")}) == digest("x")[:16]


def test_the_newest_completed_run_is_the_last_of_any_number() -> None:
    runs: dict[str, Run] = {}
    for number in range(1, 5):
        runs[str(number)] = Run(1, rounds=[{"of": number}, {"of": -number}], close={"why": "completed"})
        assert verifier._last(runs) == {"of": -number}
