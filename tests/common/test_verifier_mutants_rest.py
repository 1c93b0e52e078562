"""What the last passes of mutation testing found that no quick test of the verifier notices (docs/mutation-testing.md)."""

from __future__ import annotations

import math
import random
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
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
    filter_epsilon,
)

sys.path.insert(0, str(Path(__file__).parent))
from bundles import Shape, digest, identity
from test_verifier import CLIENTS, P0, P1, SMALL, C, fresh, verdict_of
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
            account.debits[1:1] = [({"entry": 99}, (1.0, 50.0 + n, 5), False) for n in range(20)]
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
    run = Run(1, outcomes={(1, "train"): {P0: {"ok": "x"}, P1: {"ok": "x", "failed": "x"}, "z": {"timeout": None}}})
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
