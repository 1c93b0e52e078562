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


PINNED: list[tuple[float, float, tuple[float, int] | None, str]] = [
    (0.0001, 1e-05, None, "2048:31.25 2049:31.25 4096:437.5 g:500"),
    (0.02, 1e-05, None, "241:32.25 242:32.25 532:451.5 g:484"),
    (0.2, 1e-07, None, "56:50.25 77:251.2 113:502.5 g:196"),
    (0.5, 1e-05, None, "16:42.87 24:214.4 35:428.7 g:314"),
    (1.0, 1e-12, None, "26:606.9 30:182.1 49:182.1 g:29"),
    (3.0, 1e-05, None, "5:245.9 6:344.3 8:196.7 g:213"),
    (8.0, 0.01, None, "2:534.6 3:38.19 4:38.19 g:389"),
    (30.0, 1e-05, None, "2:835.6 3:59.69 4:59.69 g:45"),
    (100.0, 1e-05, None, "2:866.2 3:61.87 4:61.87 g:10"),
    (299.6, 1e-06, None, "2:866.2 3:61.87 4:61.87 g:10"),
    (400.0, 1e-06, None, "2:866.2 3:61.87 4:61.87 g:10"),
    (1.0, 0.4, None, "2:437.5 3:31.25 4:31.25 g:500"),
    (1.0, 1e-05, (0.01, 100), "9:8.594 11:725 20:128.9 g:137.5"),
    (1.0, 1e-05, (0.001, 10), "9:3.875 10:876 20:58.12 g:62"),
    (0.5, 1e-06, (0.5, 3), "24:384.5 30:144.2 44:240.3 g:231"),
    (8.0, 1e-05, (0.01, 20), "2:53.69 3:751.6 4:53.69 g:141"),
    (1.0, 1e-05, (1.0, 100), "9:45.12 11:451.2 20:225.6 g:278"),
    (60.0, 1e-05, (0.02, 2), "2:861.9 3:61.56 4:61.56 g:15"),
    (0.1, 1e-05, (0.01, 50), "87:634 119:11.44 150:171.6 g:183"),
    (2.0, 1e-300, (0.01, 100), "368:742.5 467:61.87 694:185.6 g:10"),
    (250.0, 0.1, (0.5, 4), "2:859.2 3:61.37 4:61.37 g:18"),
]
"""(ε, δ, plan, thousandths of δ by order, and of the Gaussian branch). Other shares would be as valid: the filter's proof is for any.
But whoever creates the same budget shall get the same one, and the efficiency that is measured (`make bench`) is that of these."""


@pytest.mark.parametrize(("epsilon", "delta", "plan", "wanted"), PINNED)
def test_the_shares_at_the_ends_of_every_range(
    epsilon: float, delta: float, plan: tuple[float, int] | None, wanted: str
) -> None:
    made = Budget.create(epsilon, delta, plan)
    shares = [f"{alpha}:{share / delta * 1000:.4g}" for alpha, share in made.orders]
    assert " ".join([*shares, f"g:{made.gaussian_delta / delta * 1000:.4g}"]) == wanted
