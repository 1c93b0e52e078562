"""What the last passes of mutation testing found that no quick test of the verifier notices (docs/mutation-testing.md)."""

from __future__ import annotations

import math
import random
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest

from hansa.common import accounting, verifier
from hansa.common.identity import Envelope, write_envelope
from hansa.common.verifier import Odometer, Reading, Report

sys.path.insert(0, str(Path(__file__).parent))
from bundles import identity
from test_verifier import P0, P1, SMALL, fresh, verdict_of
from test_verifier_mutants import SAMPLED, composed, curve, places, terms_of

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
