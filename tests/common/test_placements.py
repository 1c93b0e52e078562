"""What secure aggregation comes to before a run, and shared noise beside local noise: from the formulas, recomputed here."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hansa.common.accounting import Budget, PrivacyEvent
from hansa.common.charter import adversary
from hansa.common.config import Federation
from hansa.common.placements import compared, placed, secure_figures
from hansa.common.plan import calibrated
from support import NO_PRIVACY, config

PRIVACY = {"epsilon": 1.0, "delta": 1e-4, "clip_norm": 2.0}
ONE_STEP = {"rounds": 20, "local": {"steps": 1, "optimizer": {"lr": 0.2}}}


def agreed(kind: str = "shared", colluding: int = 0, retries: int = 1, quorum: int = 3, **changes: Any) -> Federation:
    secure = {"colluding": colluding, "retries": retries, "dimension": 72}
    made = {"algorithm": ONE_STEP, "privacy": {**PRIVACY, "kind": kind}, "secure_aggregation": secure, "quorum": quorum}
    return config(**{**made, **changes})


@pytest.mark.parametrize("kind", ["shared", "local"])
@pytest.mark.parametrize(("quorum", "colluding"), [(4, 0), (3, 0), (3, 1), (4, 2)])
def test_both_placements_are_calibrated_for_one_cap(kind: str, quorum: int, colluding: int) -> None:
    found = compared(agreed(kind, colluding, quorum=quorum))
    assert found is not None
    assert found["missing"] == {}
    shared, local = found["rows"]
    assert (shared["noise"], local["noise"]) == ("shared", "local")
    assert (shared["adversary"], local["adversary"]) == (adversary(colluding), adversary(None))
    # 21 steps are paid for: 20 rounds and one that is asked again.
    budget = Budget.create(1.0, 1e-4, (1.0, 21))
    assert local["noise_multiplier"] == budget.calibrate(1.0, 21)
    assert local["epsilon_filter"] == budget.spent([PrivacyEvent(1.0, local["noise_multiplier"], 21)])
    assert local["noise_multiplier"] < shared["noise_multiplier"] < 1.02 * local["noise_multiplier"]
    for row in found["rows"]:
        assert 0.9 < row["epsilon"] < row["epsilon_filter"] <= 1.0
    assert shared["noise_factor"] == math.sqrt(4 / (quorum - colluding))
    assert shared["std_of_sum"] == shared["noise_multiplier"] * math.sqrt(4 / (quorum - colluding))
    assert local["std_of_sum"] == 2 * local["noise_multiplier"]


def test_the_sum_is_of_those_who_are_asked() -> None:
    found = compared(agreed(algorithm={**ONE_STEP, "participation": 0.75}))
    assert found is not None
    assert [row["noise_factor"] for row in found["rows"]] == [1.0, math.sqrt(3)]


def test_noise_that_was_given_is_set_aside_to_compare() -> None:
    given = agreed(privacy={**PRIVACY, "kind": "shared", "noise_multiplier": 50.0})
    assert compared(given) == compared(agreed())


def test_where_shared_noise_cannot_be_it_is_told_why() -> None:
    several = {"rounds": 20, "local": {"steps": 2, "optimizer": {"lr": 0.2}}}
    local = agreed("local", algorithm=several)
    found = compared(local)
    assert found is not None
    assert [row["noise"] for row in found["rows"]] == ["local"]
    assert found["missing"]["shared"].startswith("algorithm.local.steps must be 1")
    assert list(placed(local)[0]) == ["local"]


def test_without_secure_aggregation_or_privacy_there_is_nothing_to_compare() -> None:
    local = config(privacy={**PRIVACY, "kind": "local"})
    assert compared(local) is None
    assert secure_figures(local) is None
    assert [terms.privacy.kind for terms in placed(local)[0].values()] == ["local"]
    assert compared(agreed(privacy=NO_PRIVACY)) is None


def test_a_cap_that_no_noise_meets_is_a_row_without_figures() -> None:
    found = compared(agreed(privacy={**PRIVACY, "kind": "shared", "epsilon": 1e-7}))
    assert found is not None
    assert [(row["noise"], row["noise_multiplier"]) for row in found["rows"]] == [("shared", None), ("local", None)]


def test_what_secure_aggregation_comes_to() -> None:
    terms = agreed()
    sigma = calibrated(terms)
    assert sigma is not None
    figures = secure_figures(terms.with_noise(sigma))
    assert figures is not None
    wrap = figures.pop("log2_wrap")
    # C / (256 sqrt(d)) = 2 / 2172, and the next power of two below.
    assert figures == {
        "partners": 4, "asked": 4, "quorum": 3, "colluding": 0, "threshold": 3, "dimension": 72, "grid": 2.0**-11, "ring_bits": 32,
        "vector_bytes": 288, "rounds": 20, "retries": 1, "rounds_paid_for": 21,
    }  # fmt: skip
    # 735 declared records, a tenth more, each with its clip of 4096 steps of the grid, and half a step of rounding a partner.
    room = 2**31 - 1 - (264 + 258 + 110 + 176) * 2 * 2**11 - 4
    std = sigma * 2 * 2**11 * math.sqrt(4 / 3)
    assert wrap == pytest.approx(1 + math.log2(21 * 72) - (room / std) ** 2 / 2 / math.log(2))
    assert wrap <= -40


@pytest.mark.parametrize("kind", ["local", "none"])
def test_updates_that_need_no_sum_to_be_private_have_a_fixed_grid(kind: str) -> None:
    terms = agreed(privacy={**PRIVACY, "kind": kind, "noise_multiplier": 9.0} if kind == "local" else NO_PRIVACY)
    figures = secure_figures(terms)
    assert figures is not None
    assert (figures["grid"], figures["ring_bits"], figures["log2_wrap"]) == (2.0**-22, 32, None)
