"""What mutation testing found that no other test notices (docs/mutation-testing.md): edges of the filter and of its calibration."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from hansa.common.accounting import Budget, PrivacyEvent, _four_digits
from hansa.common.curves import gaussian_epsilon, gaussian_log_delta, renyi_epsilon, renyi_step
from hansa.common.errors import ConfigError

SHARES = ((2, 0.0625), (4, 0.0625), (8, 0.0625), (16, 0.0625), (32, 0.0625))


@pytest.mark.parametrize("count", [3, 4, 5])
def test_three_to_five_orders(count: int) -> None:
    assert len(Budget(1.0, 0.5, SHARES[:count], 0.125).orders) == count
    for wrong in (SHARES[:2], (*SHARES, (64, 0.0625)), ()):
        with pytest.raises(ConfigError, match="3 to 5"):
            Budget(1.0, 0.5, wrong, 0.0625)


def test_shares_may_be_all_of_delta_and_no_more() -> None:
    assert Budget(1.0, 0.3125, SHARES[:4], 0.0625).delta == 0.3125
    with pytest.raises(ConfigError, match="shares"):
        Budget(1.0, math.nextafter(0.3125, 0), SHARES[:4], 0.0625)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "1.0", None])
@pytest.mark.parametrize("name", ["epsilon", "delta", "gaussian_delta"])
def test_a_budget_is_of_finite_numbers(name: str, value: Any) -> None:
    good: dict[str, Any] = {"epsilon": 1.0, "delta": 0.5, "gaussian_delta": 0.125}
    with pytest.raises(ConfigError, match="not a finite number"):
        Budget(**{**good, name: value}, orders=SHARES[:3])


def test_whole_numbers_are_kept_as_reals() -> None:
    """Two budgets that are equal have equal fields, which are signed."""
    budget = Budget(2, 0.5, SHARES[:3], 0.125)
    assert budget.to_fields()["epsilon"] == "2.0"
    assert PrivacyEvent(1, 2, 3).to_fields() == {
        "mechanism": "poisson-gaussian/1",
        "q": "1.0",
        "sigma": "2.0",
        "steps": 3,
    }


@pytest.mark.parametrize("epsilon", [0.0, -0.0, -0.5, -1e-300])
def test_no_budget_without_epsilon(epsilon: float) -> None:
    with pytest.raises(ConfigError, match="not positive"):
        Budget.create(epsilon, 1e-5)
    with pytest.raises(ConfigError, match="not positive"):
        Budget(epsilon, 0.5, SHARES[:3], 0.125)


def test_noise_multipliers_of_four_digits() -> None:
    """No gap, no repetition, from 0.3 to 10⁴."""
    assert [_four_digits(n) for n in (2000, 2001, 8999, 9000, 17999, 18000, 45000)] == [
        0.3, 0.3001, 0.9999, 1.0, 9.999, 10.0, 10_000.0,
    ]  # fmt: skip
    known = [_four_digits(n) for n in range(2000, 45001)]
    assert all(low < high for low, high in itertools.pairwise(known))


def test_a_gaussian_mechanism_that_hardly_differs_has_no_delta() -> None:
    assert gaussian_log_delta(1.0, 1e-9) == -math.inf
    assert gaussian_log_delta(50.0, 1e-3) == -math.inf
    assert gaussian_log_delta(0.0, 1.0) == pytest.approx(math.log(math.erf(0.5 / math.sqrt(2))))


def test_few_steps_fit_exactly() -> None:
    """The last step that fits, by trying it and the next."""
    budget = Budget.create(1.0, 1e-5)
    found = []
    for q, sigma in ((1.0, 4.0), (1.0, 4.8), (1.0, 6.0), (1.0, 7.0), (0.1, 2.0), (0.5, 20.0)):
        most = budget.most_steps(q, sigma)
        found.append(most)
        assert most == 0 or budget.admits([PrivacyEvent(q, sigma, most)])
        assert not budget.admits([PrivacyEvent(q, sigma, most + 1)])
    assert found[:4] == [0, 1, 2, 3]
    assert min(found[4:]) > 3


def test_an_order_by_hand() -> None:
    """ρ(2) of a sampled step is ln(1 + q²(e^(1/σ²) − 1)) (1908.10530); ε by Prop. 12 of 2004.00010."""
    for q, sigma in ((0.5, 1.0), (0.01, 2.0), (1.0, 3.0)):
        wanted = math.log1p(q**2 * math.expm1(1 / sigma**2))
        assert renyi_step(q, sigma, 2) == pytest.approx(wanted, rel=1e-12)
        assert renyi_epsilon(wanted, 2, 1e-3) == pytest.approx(wanted + math.log(0.5) - math.log(2e-3), rel=1e-9)
    q, s = 0.3, 1.5
    third = (
        math.log(
            (1 - q) ** 3 + 3 * (1 - q) ** 2 * q + 3 * (1 - q) * q**2 * math.exp(1 / s**2) + q**3 * math.exp(3 / s**2)
        )
        / 2
    )
    assert renyi_step(q, s, 3) == pytest.approx(third, rel=1e-12)


def test_results_are_rounded_up() -> None:
    """By 10⁻¹⁰, absolutely and of the sum: float errors count against the history."""
    exact = 0.5 - (-math.log1p(-1 / 8) + (math.log(1e-5) + math.log(8)) / 7)
    assert exact + 1.4e-10 < renyi_epsilon(0.5, 8, 1e-5) < exact + 1.6e-10
    assert renyi_epsilon(0.0, 8, 0.9) == 0.0
    for mu in (0.1, 1.0, 5.0):
        epsilon = gaussian_epsilon(mu**2, 1e-5)
        unrounded = (epsilon - 1e-10) / (1 + 1e-10)
        assert gaussian_log_delta(epsilon, mu) < math.log(1e-5)
        assert gaussian_log_delta(unrounded, mu) == pytest.approx(math.log(1e-5), abs=1e-9)
