"""What mutation testing found that no other test notices (docs/mutation-testing.md): edges of the filter and of its calibration."""

from __future__ import annotations

import itertools
import math
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
from scipy import special

from hansa.common import accounting, verifier
from hansa.common.accounting import MAX_STEPS, Budget, PrivacyEvent, _four_digits, _grid, _room, _thousandths
from hansa.common.curves import gaussian_epsilon, gaussian_log_delta, renyi_epsilon, renyi_step
from hansa.common.errors import ConfigError, Refusal, Refused

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


def test_what_was_agreed_cannot_be_changed() -> None:
    """Nor what was recorded: who holds a budget or an event holds what was signed."""
    with pytest.raises(FrozenInstanceError):
        Budget.create(1.0, 1e-5).epsilon = 2.0  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        PrivacyEvent(0.1, 1.0, 10).steps = 1  # type: ignore[misc]


def test_calibration_searches_up_to_ten_thousand_and_no_further() -> None:
    budget = Budget.create(1.0, 1e-5)
    most = budget.most_steps(1.0, 1e4)
    assert most > 1e4  # so that the next number of four digits below admits fewer
    assert budget.calibrate(1.0, most) == 1e4
    with pytest.raises(Refused) as caught:
        budget.calibrate(1.0, most + 1)
    assert caught.value.reason is Refusal.BUDGET


def test_noise_is_charged_as_it_is_up_to_a_thousand_million() -> None:
    """And more of it as that. So long a history, as less leaves no trace in the last digits of so small a price."""
    budget = Budget(1.0, 0.5, ((2, 0.125), (3, 0.125), (4096, 0.125)), 1e-300)

    def spent(sigma: float) -> float:
        return budget.spent([PrivacyEvent(1.0, sigma, MAX_STEPS)] * 1000)

    assert spent(1e9 - 0.5) > spent(1e9) == spent(1e9 + 0.5) > 0.0


@pytest.mark.parametrize(("epsilon", "delta"), [(0.02, 1e-2), (0.02, 6e-4), (2.2, 9e-4), (1.0, 1e-5)])
def test_a_plan_of_unsampled_steps_changes_nothing(epsilon: float, delta: float) -> None:
    """The Gaussian branch is theirs: no Rényi order is taken from the others for them."""
    plain = Budget.create(epsilon, delta)
    assert all(Budget.create(epsilon, delta, (1.0, steps)) == plain for steps in (1, 20, 5000))


def test_shares_of_delta_are_rounded_up_to_thousandths() -> None:
    """What already is so many thousandths stays it, whatever the last digits of a float are on another machine."""
    for n in range(1001):
        share = n / 1000
        for same in (share, math.nextafter(share, -1.0), math.nextafter(share, 2.0), share * (1 + 1e-12)):
            assert _thousandths(same) == share
        assert _thousandths(share + 1e-8) == _thousandths(share + 9.9e-4) == (n + 1) / 1000


def test_an_order_that_no_history_fits_has_no_room_rather_than_less() -> None:
    """The other side of the conversion: what fits just spends all of ε; where even ρ = 0 costs more, nothing fits."""
    for epsilon, alpha, delta in itertools.product((1e-3, 0.5, 8.0), (2, 3, 40, 4096), (1e-300, 1e-12, 1e-5, 0.5)):
        room = _room(epsilon, alpha, delta)
        assert room >= 0.0
        if room > 0.0:
            assert renyi_epsilon(room, alpha, delta) == pytest.approx(epsilon, rel=1e-6)
        else:
            assert renyi_epsilon(0.0, alpha, delta) > epsilon
    assert _room(0.5, 2, 1e-5) == 0.0 < _room(0.5, 40, 1e-5)


def test_candidate_orders_stay_within_their_range() -> None:
    """From low to high by one factor, and the first ones above low, where neighbours differ most; never above high."""
    assert _grid(10, 1000, 3) == [10, 11, 12, 13, 14, 100, 1000]
    assert _grid(2, 4, 3) == [2, 3, 4]
    for low, high in ((2, 6), (20, 56), (2048, 4096)):
        grid = _grid(low, high, 14)
        assert (grid[0], grid[-1]) == (low, high)
        assert all(a < b for a, b in itertools.pairwise(grid))


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


@pytest.mark.parametrize(("q", "sigma", "alpha"), [(0.01, 1.0, 2), (0.5, 0.3, 64), (1e-9, 30.0, 7), (0.999, 1e3, 4096)])
def test_no_term_of_a_step_is_infinite(q: float, sigma: float, alpha: int) -> None:
    """Every weight is a probability and every excess positive: no logarithm of 0, no pole of the gamma function."""
    renyi_step.cache_clear()
    with np.errstate(divide="raise", invalid="raise", over="raise"), special.errstate(all="raise"):
        assert 0.0 < renyi_step(q, sigma, alpha) <= renyi_step(1.0, sigma, alpha) * (1 + 1e-12)


def test_what_was_computed_is_kept() -> None:
    """A node asks about its history before every round; only what is new in it is to be computed."""
    budget, history = Budget.create(1.0, 1e-5), [PrivacyEvent(0.01, 2.0, 10), PrivacyEvent(0.02, 3.0, 10)]
    spent = budget.spent(history)
    steps, curves = renyi_step.cache_info().misses, gaussian_epsilon.cache_info().misses
    assert budget.spent(history) == spent
    assert (renyi_step.cache_info().misses, gaussian_epsilon.cache_info().misses) == (steps, curves)
    budget.spent([*history, PrivacyEvent(0.03, 4.0, 1)])
    assert renyi_step.cache_info().misses <= steps + len(budget.orders)


@pytest.mark.parametrize("mu", [1e-5, 1e-3, 0.1, 1.0, 3.0])
def test_a_gaussian_mechanism_costs_nothing_exactly_where_delta_covers_all_of_it(mu: float) -> None:
    """δ(0; μ) = 2Φ(μ/2) − 1 = erf(μ/√8), the total variation distance."""
    distance = math.erf(mu / math.sqrt(8))
    assert gaussian_epsilon(mu**2, distance * (1 + 1e-9)) == 0.0
    assert gaussian_epsilon(mu**2, (1 + distance) / 2) == 0.0
    # dδ/dε = −Φ(−μ/2) at 0: that much more of ε is needed for a δ that is so little less.
    for less in (1e-6, 1e-4):
        expected = less * distance / (math.erfc(mu / math.sqrt(8)) / 2)
        assert gaussian_epsilon(mu**2, distance * (1 - less)) == pytest.approx(expected, rel=0.05, abs=3e-10)


@pytest.mark.parametrize("mu", [1e-8, 1e-12, 1e-17, 1e-30, 1e-150])
def test_a_mechanism_too_faint_for_the_curves_digits_still_costs_something(mu: float) -> None:
    """Between its distance, erf(μ/√8), and δ = 0 there is an ε above 0, even where Φ(μ/2) and Φ(−μ/2) are one float."""
    distance = math.erf(mu / math.sqrt(8))
    for delta in (0.9 * distance, 1e-3 * distance, 1e-100 * distance):
        assert gaussian_epsilon(mu**2, delta) > mu * 1e-2 > 0.0
        assert gaussian_epsilon(mu**2, delta) >= gaussian_epsilon(mu**2, 2 * delta)
    assert gaussian_epsilon(mu**2, 1e-3) == 0.0


def test_a_delta_that_is_just_enough_is_enough() -> None:
    """The least ε with δ(ε) ≤ δ: not only below it."""
    met = 0
    for mu in (n / 64 for n in range(1, 200)):
        at_zero = gaussian_log_delta(0.0, mu)
        if math.log(delta := math.exp(at_zero)) == at_zero:
            met += 1
            assert gaussian_epsilon(mu**2, delta) == 0.0
    assert met > 10


@pytest.mark.parametrize("mu", [1e-3, 0.3, 2.0, 40.0, 1e4])
@pytest.mark.parametrize("delta", [1e-300, 1e-12, 1e-5, 0.3])
def test_gaussian_epsilon_is_found_to_the_digits_that_its_curve_has(mu: float, delta: float) -> None:
    """Without what it is raised by, the curve there is δ: from the faintest to the loudest history, and far below 10⁻¹⁰."""
    raised = gaussian_epsilon(mu**2, delta)
    if raised == 0.0:
        assert delta >= math.erf(mu / math.sqrt(8)) * (1 - 1e-9)
        return
    found = (raised - 1e-10) / (1 + 1e-10)
    assert gaussian_log_delta(found * (1 + 1e-9) + 1e-14, mu) < math.log(delta)
    assert gaussian_log_delta(found * (1 - 1e-9) - 1e-14, mu) > math.log(delta)


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


def test_hardly_any_sampling_is_charged_as_a_little() -> None:
    """Far below 10⁻³⁰ the sum over 4,096 orders loses more digits than its slack gives (found against 60 digits)."""
    for rate, charged in ((5e-324, 1e-30), (1e-100, 1e-30), (1e-30, 1e-30), (1.1e-30, 1.1e-30), (1.0, 1.0)):
        assert accounting._merge([PrivacyEvent(rate, 0.3, 2)]) == {(charged, 0.3): 2}
    fields = {"mechanism": "poisson-gaussian/1", "q": "1e-100", "sigma": "0.3", "steps": 1}
    assert verifier._event(fields) == (1e-30, 0.3, 1)
