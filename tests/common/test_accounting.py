"""The filter, the odometer and calibration; the numbers themselves are checked in statistical/."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from hansa.common import accounting, curves
from hansa.common.accounting import MIN_NOISE_MULTIPLIER, Budget, PrivacyEvent, odometer
from hansa.common.errors import ConfigError, LedgerError, Refusal, Refused

BUDGET = Budget.create(1.0, 1e-4)
EVENTS = st.builds(
    PrivacyEvent,
    st.one_of(st.just(1.0), st.floats(1e-6, 1.0)),
    st.floats(MIN_NOISE_MULTIPLIER, 1e5),
    st.integers(1, 10**9),
)
HISTORIES = st.lists(EVENTS, max_size=6)
BUDGETS = st.deferred(
    lambda: st.sampled_from([Budget.create(e, d) for e in (0.01, 0.5, 1.0, 8.0) for d in (1e-4, 1e-8)])
)

# ------------------------------------------------------------------------------------------------------------- events


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0.0, 1.0, 1), "not in (0, 1]"),
        ((-0.1, 1.0, 1), "not in (0, 1]"),
        ((1.0001, 1.0, 1), "not in (0, 1]"),
        ((math.nan, 1.0, 1), "not a finite number"),
        ((True, 1.0, 1), "not a finite number"),
        ((0.1, math.nan, 1), "not a finite number"),
        ((0.1, math.inf, 1), "not a finite number"),
        ((0.1, "1.0", 1), "not a finite number"),
        ((0.1, 1.0, 0), "whole number"),
        ((0.1, 1.0, True), "whole number"),
        ((0.1, 1.0, 2.0), "whole number"),
        ((0.1, 1.0, 10**9 + 1), "whole number"),
    ],
)
def test_event_refuses_nonsense(arguments: tuple[float, float, int], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PrivacyEvent(*arguments)
    assert words in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("sigma", [0.0, -1.0, 0.29999])
def test_too_little_noise_is_refused_before_accounting(sigma: float) -> None:
    with pytest.raises(Refused, match=r"noise multiplier below 0\.3") as caught:
        PrivacyEvent(0.1, sigma, 1)
    assert caught.value.reason is Refusal.NOISE
    with pytest.raises(Refused):
        BUDGET.most_steps(0.1, sigma)


@given(EVENTS)
def test_event_fields_round_trip(event: PrivacyEvent) -> None:
    assert PrivacyEvent.from_fields(event.to_fields()) == event


GOOD_EVENT = {"mechanism": "poisson-gaussian/1", "q": "0.01", "sigma": "1.5", "steps": 7}


@pytest.mark.parametrize(
    "change",
    [
        {"mechanism": "poisson-gaussian/2"},
        {"mechanism": None},
        {"extra": 1},
        {"q": 0.01},
        {"q": "0.010"},
        {"q": "1e-2"},
        {"q": " 0.01"},
        {"q": "nan"},
        {"q": "inf"},
        {"q": "0.0"},
        {"q": "x"},
        {"sigma": "1.50"},
        {"sigma": "0.2"},
        {"sigma": None},
        {"steps": "7"},
        {"steps": 7.0},
        {"steps": True},
        {"steps": 0},
        {"steps": 10**10},
    ],
)
def test_event_from_a_ledger_is_strict(change: dict[str, object]) -> None:
    assert PrivacyEvent.from_fields(GOOD_EVENT) == PrivacyEvent(0.01, 1.5, 7)
    with pytest.raises(LedgerError) as caught:
        PrivacyEvent.from_fields({**GOOD_EVENT, **change})
    assert caught.value.hint


@pytest.mark.parametrize("key", GOOD_EVENT)
def test_event_from_a_ledger_needs_every_key(key: str) -> None:
    with pytest.raises(LedgerError):
        PrivacyEvent.from_fields({k: v for k, v in GOOD_EVENT.items() if k != key})


# ------------------------------------------------------------------------------------------------------------- budget


@pytest.mark.parametrize(
    ("epsilon", "delta"),
    [
        *((epsilon, 1e-5) for epsilon in (0.0, -1.0, math.nan, math.inf, True)),
        *((1.0, delta) for delta in (0.0, 1.0, -1e-5, math.nan, math.inf)),
    ],
)
def test_budget_refuses_nonsense(epsilon: float, delta: float) -> None:
    with pytest.raises(ConfigError) as caught:
        Budget.create(epsilon, delta)
    assert caught.value.hint


@given(st.floats(1e-4, 1e3), st.floats(1e-12, 0.5))
@example(1e-300, 1e-5)
@example(1e300, 0.999)
@example(1.0, 1e-320)
@settings(max_examples=25, deadline=None)
def test_shares_never_exceed_delta_and_budget_round_trips(epsilon: float, delta: float) -> None:
    budget = Budget.create(epsilon, delta)
    assert sum(map(Fraction, (*(s for _, s in budget.orders), budget.gaussian_delta))) <= Fraction(delta)
    assert 0.0 < budget.gaussian_delta <= delta / 2
    assert 3 <= len(budget.orders) <= 5
    assert Budget.from_fields(budget.to_fields()) == budget


GOOD_BUDGET = BUDGET.to_fields()


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": "1"},
        {"epsilon": 1.0},
        {"epsilon": "0.0"},
        {"delta": "2e-05"},  # the shares now sum to more than δ
        {"gaussian_delta": "6e-05"},
        {"gaussian_delta": "0.0"},
        {"gaussian_delta": "-1e-05"},
        {"orders": []},
        {"orders": "none"},
        {"orders": [[10, "1e-05"], [11, "1e-05"]]},
        {"orders": [[10, "1e-05"], [11, "1e-05"], [11, "1e-05"]]},
        {"orders": [[12, "1e-05"], [11, "1e-05"], [13, "1e-05"]]},
        {"orders": [[1, "1e-05"], [11, "1e-05"], [13, "1e-05"]]},
        {"orders": [[2.5, "1e-05"], [11, "1e-05"], [13, "1e-05"]]},
        {"orders": [[True, "1e-05"], [11, "1e-05"], [13, "1e-05"]]},
        {"orders": [[10, 1e-5], [11, "1e-05"], [13, "1e-05"]]},
        {"orders": [[10, "1e-05", 0], [11, "1e-05"], [13, "1e-05"]]},
        {"orders": [[2, "1e-05"], [11, "1e-05"], [10**7, "1e-05"]]},
        {"orders": [[a, "1e-06"] for a in range(2, 8)]},
        {"orders": [[2, "-1e-05"], [11, "1e-05"], [13, "1e-05"]]},
        {"extra": 0},
    ],
)
def test_budget_from_a_ledger_is_strict(change: dict[str, object]) -> None:
    assert Budget.from_fields(GOOD_BUDGET) == BUDGET
    with pytest.raises(LedgerError) as caught:
        Budget.from_fields({**GOOD_BUDGET, **change})
    assert caught.value.hint


def test_shares_are_summed_exactly() -> None:
    """In floats the third order's share would vanish beside the others."""
    delta = 1e-4
    with pytest.raises(ConfigError, match="sum to more"):
        Budget(1.0, delta, ((2, delta / 4), (3, delta / 4), (4, 1e-30)), delta / 2)
    assert Budget(1.0, delta, ((2, delta / 4), (3, delta / 8), (4, delta / 8)), delta / 2).epsilon == 1.0


# ------------------------------------------------------------------------------------------------------------- filter


def test_nothing_costs_nothing() -> None:
    assert BUDGET.spent([]) == 0.0
    assert BUDGET.admits([])
    assert odometer([], 1e-5) == 0.0


@given(BUDGETS, HISTORIES, EVENTS)
@settings(deadline=None)
def test_more_events_never_cost_less(budget: Budget, history: list[PrivacyEvent], event: PrivacyEvent) -> None:
    assert budget.spent([*history, event]) >= budget.spent(history)
    assert budget.admits(history) or not budget.admits([*history, event])


@given(BUDGETS, EVENTS)
@settings(deadline=None)
def test_one_more_step_never_costs_less(budget: Budget, event: PrivacyEvent) -> None:
    one = PrivacyEvent(event.sampling_rate, event.noise_multiplier, 1)
    assert budget.spent([event, one]) >= budget.spent([event])


@given(BUDGETS, HISTORIES, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_order_and_splitting_do_not_matter(budget: Budget, history: list[PrivacyEvent], rng: object) -> None:
    shuffled = list(history)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    split = [
        PrivacyEvent(e.sampling_rate, e.noise_multiplier, steps)
        for e in shuffled
        for steps in (e.steps // 3, e.steps - e.steps // 3)
        if steps
    ]
    assert budget.spent(history) == budget.spent(shuffled) == budget.spent(split)


@given(BUDGETS, HISTORIES, st.floats(1e-3, 1e3))
@settings(deadline=None)
def test_admits_exactly_when_spent_is_within_the_cap(budget: Budget, history: list[PrivacyEvent], cap: float) -> None:
    spent = budget.spent(history)
    for epsilon in (cap, spent, math.nextafter(spent, 0.0), math.nextafter(spent, math.inf)):
        if 0.0 < epsilon < math.inf:
            fixed = Budget(epsilon, budget.delta, budget.orders, budget.gaussian_delta)
            assert fixed.spent(history) == spent  # same orders and shares: the cap plays no part in the price
            assert fixed.admits(history) == (spent <= epsilon)


def test_each_branch_can_be_the_one_that_admits() -> None:
    """Otherwise its share of δ would be wasted; and a history may use the branch that suits it."""
    full, sampled = [PrivacyEvent(1.0, 30.0, 50)], [PrivacyEvent(0.01, 1.5, 800)]
    gaussian = curves.gaussian_epsilon(50 / 900, BUDGET.gaussian_delta)
    assert gaussian < BUDGET.spent(full) == pytest.approx(gaussian, rel=1e-5)
    assert BUDGET.spent(sampled) < 0.1 * curves.gaussian_epsilon(800 / 2.25, BUDGET.gaussian_delta)


def test_renyi_conversion_is_the_published_one() -> None:
    """2004.00010 Prop. 12, written out apart from the code."""
    alpha, rho, delta = 12, 0.3, 1e-6
    published = rho + (math.log(1 / delta) + (alpha - 1) * math.log(1 - 1 / alpha) - math.log(alpha)) / (alpha - 1)
    assert curves.renyi_epsilon(rho, alpha, delta) == pytest.approx(published, abs=1e-9)
    assert curves.renyi_epsilon(rho, alpha, delta) > published


@pytest.mark.parametrize(("q", "sigma", "alpha"), [(0.01, 1.0, 8), (0.3, 0.7, 3), (1e-4, 2.0, 20), (0.9, 4.0, 11)])
def test_renyi_divergence_agrees_with_direct_integration(q: float, sigma: float, alpha: int) -> None:
    # The trapezoid rule converges faster than any power on such integrands.
    x = np.linspace(-14 * sigma, alpha + 14 * sigma, 200_001)
    weight = norm.pdf(x, scale=sigma) * (x[1] - x[0])
    log_ratio = np.log(1 - q + q * np.exp((2 * x - 1) / (2 * sigma**2)))

    def excess(order: int) -> float:
        """E[ratio^order] − 1 under N(0, σ²), less the linear term, whose mean is zero but which would cost digits."""
        return float((np.expm1(order * log_ratio) - order * np.expm1(log_ratio)) @ weight)

    mine = math.expm1((alpha - 1) * curves.renyi_step(q, sigma, alpha))
    assert mine == pytest.approx(excess(alpha), rel=1e-6)
    assert mine > excess(1 - alpha)  # the other direction, D_α(Q‖P), is no larger


def test_tiny_rates_keep_their_digits() -> None:
    """ρ(2) = ln(1 + q²(e^(1/σ²) − 1)); a sum that is not arranged for it returns 0 or noise here."""
    assert curves.renyi_step(1e-9, 1.0, 2) == pytest.approx(1e-18 * math.expm1(1), rel=1e-9)


@pytest.mark.parametrize(("mu", "epsilon"), [(1.0, 1.0), (0.1, 0.2), (5.0, 30.0), (1e-3, 1e-3)])
def test_gaussian_epsilon_inverts_the_exact_curve(mu: float, epsilon: float) -> None:
    delta = float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu))
    found = curves.gaussian_epsilon(mu**2, delta)
    assert found == pytest.approx(epsilon, rel=1e-6)


def test_full_batch_admits_enough_of_exact_composition() -> None:
    """At least 0.85 of μ² is promised; the share of δ is chosen for 0.865."""

    def largest(fits: object) -> float:
        low, high = 0.0, 10.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle) else (low, middle)  # type: ignore[operator]
        return low

    exact = largest(lambda mu: curves.gaussian_epsilon(mu**2, 1e-4) <= 1.0)
    admitted = largest(lambda mu: 1 / mu > 0.3 and BUDGET.admits([PrivacyEvent(1.0, 1 / mu, 1)]))
    assert (admitted / exact) ** 2 == pytest.approx(0.865, abs=0.002)


def _best_order(epsilon: float, delta: float, q: float, steps: int) -> float:
    """The σ at which one best whole order, with all of δ, admits just `steps`."""
    low, high = 0.3, 1e3
    while high / low > 1 + 1e-6:
        middle = math.sqrt(low * high)
        enough = any(
            epsilon + math.log1p(-1 / a) * -1 + math.log(delta * a) / (a - 1) >= steps * curves.renyi_step(q, middle, a)
            for a in range(2, 60)
        )
        low, high = (low, middle) if enough else (middle, high)
    return high


@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 1e-5), (1.0, 1e-4), (2.0, 1e-5), (8.0, 1e-4)])
def test_filter_admits_four_fifths_of_one_best_order(epsilon: float, delta: float) -> None:
    """The whole grid is in bench/."""
    budget = Budget.create(epsilon, delta)
    for q, steps in ((0.01, 1000), (0.1, 100), (0.1, 10_000), (1.0, 1000)):
        assert budget.most_steps(q, _best_order(epsilon, delta, q, steps)) >= 0.8 * steps


@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 1e-5), (1.0, 1e-4), (2.0, 1e-5)])
def test_a_plan_that_cannot_share_gets_an_order_of_its_own(epsilon: float, delta: float) -> None:
    plan = (0.01, 100)
    sigma = _best_order(epsilon, delta, *plan)
    plain, planned = Budget.create(epsilon, delta), Budget.create(epsilon, delta, plan)
    assert plain.most_steps(0.01, sigma) < 80
    assert 80 <= planned.most_steps(0.01, sigma) <= 84
    assert len(planned.orders) == 3
    assert max(share for _, share in planned.orders) > 0.6 * delta
    # What is left still serves the others.
    for q, steps in ((0.01, 1000), (1.0, 1000)):
        assert planned.most_steps(q, _best_order(epsilon, delta, q, steps)) >= 0.55 * steps


@pytest.mark.parametrize("plan", [(1.0, 100), (0.01, 1000), (0.1, 10_000)])
def test_a_plan_that_is_served_anyway_changes_nothing(plan: tuple[float, int]) -> None:
    assert Budget.create(1.0, 1e-5, plan) == Budget.create(1.0, 1e-5)


@pytest.mark.parametrize("plan", [(0.0, 10), (1.1, 10), (0.1, 0), (0.1, 2.0), (math.nan, 1), (0.1, 10**9 + 1)])
def test_a_plan_out_of_range_is_refused(plan: tuple[float, int]) -> None:
    with pytest.raises(ConfigError):
        Budget.create(1.0, 1e-5, plan)


@pytest.mark.parametrize("epsilon", [1e-300, 0.01, 300.0, 1e300])
@pytest.mark.parametrize("delta", [1e-320, 1e-12, 0.5])
@pytest.mark.parametrize("plan", [(1e-300, 1), (1 - 1e-15, 10**9), (0.01, 3)])
def test_any_plan_gives_a_valid_budget(epsilon: float, delta: float, plan: tuple[float, int]) -> None:
    budget = Budget.create(epsilon, delta, plan)
    assert sum(map(Fraction, (*(s for _, s in budget.orders), budget.gaussian_delta))) <= Fraction(delta)
    assert Budget.from_fields(budget.to_fields()) == budget


def test_chosen_shares_are_pinned() -> None:
    """Charters are calibrated to them: a change of how they are chosen is a change of what every plan costs."""

    def shares(budget: Budget) -> list[tuple[int, float]]:
        return [(a, round(s / budget.delta, 4)) for a, s in (*budget.orders, (0, budget.gaussian_delta))]

    assert shares(Budget.create(1.0, 1e-4)) == [(7, 0.0391), (10, 0.1562), (14, 0.4297), (0, 0.375)]
    assert shares(Budget.create(8.0, 1e-5)) == [(2, 0.0537), (3, 0.7516), (4, 0.0537), (0, 0.141)]
    assert shares(Budget.create(0.5, 1e-5, (0.01, 100))) == [(19, 0.782), (26, 0.0068), (38, 0.1022), (0, 0.109)]


def test_more_noise_than_the_largest_is_charged_as_that() -> None:
    budget = Budget.create(1.0, 1e-12)
    at_most = budget.spent([PrivacyEvent(0.5, 1e9, 10**9)])
    assert budget.spent([PrivacyEvent(0.5, 1e300, 10**9)]) == at_most
    assert 0.0 < at_most < budget.spent([PrivacyEvent(0.5, 0.9e9, 10**9)])


# -------------------------------------------------------------------------------------------------------- calibration


@given(
    BUDGETS,
    st.one_of(st.just(1.0), st.floats(1e-4, 1.0)),
    st.integers(1, 10**4),
    st.one_of(st.just([]), st.just([PrivacyEvent(1.0, 200.0, 3)])),
)
@settings(max_examples=40, deadline=None)
def test_calibration_is_admitted_and_one_percent_less_is_not(
    budget: Budget, q: float, steps: int, spent: list[PrivacyEvent]
) -> None:
    if not budget.admits([*spent, PrivacyEvent(q, 1e4, steps)]):
        with pytest.raises(Refused) as caught:
            budget.calibrate(q, steps, spent)
        assert caught.value.reason is Refusal.BUDGET
        return
    sigma = budget.calibrate(q, steps, spent)
    assert budget.admits([*spent, PrivacyEvent(q, sigma, steps)])
    assert sigma == float(f"{sigma:.3e}")
    less = 0.99 * sigma
    assert less < MIN_NOISE_MULTIPLIER or not budget.admits([*spent, PrivacyEvent(q, less, steps)])
    assert budget.most_steps(q, sigma, spent) >= steps


def test_calibration_refuses_what_no_noise_pays() -> None:
    used_up = [PrivacyEvent(1.0, BUDGET.calibrate(1.0, 10), 10)]
    with pytest.raises(Refused, match="already spent") as caught:
        BUDGET.calibrate(1.0, 10**6, used_up)
    assert caught.value.reason is Refusal.BUDGET
    assert "fewer steps" in caught.value.hint


def test_calibration_never_goes_below_the_least_noise() -> None:
    assert Budget.create(500.0, 1e-2).calibrate(1e-3, 1) == MIN_NOISE_MULTIPLIER


@pytest.mark.parametrize(("q", "sigma"), [(1.0, 40.0), (0.01, 1.5), (0.1, 5.0)])
def test_most_steps_is_the_last_that_fits(q: float, sigma: float) -> None:
    steps = BUDGET.most_steps(q, sigma)
    assert steps > 0
    assert BUDGET.admits([PrivacyEvent(q, sigma, steps)])
    assert not BUDGET.admits([PrivacyEvent(q, sigma, steps + 1)])
    assert BUDGET.most_steps(q, sigma, [PrivacyEvent(q, sigma, steps)]) == 0
    assert BUDGET.most_steps(q, sigma, [PrivacyEvent(q, sigma, steps - 3)]) == 3


def test_most_steps_ends_even_when_nothing_is_spent() -> None:
    assert Budget.create(8.0, 1e-5).most_steps(1e-9, 1e6) == 10**9


# ----------------------------------------------------------------------------------------------------------- odometer


def test_odometer_is_exact_for_unsampled_steps() -> None:
    found = odometer([PrivacyEvent(1.0, 20.0, 40), PrivacyEvent(1.0, 10.0, 5)], 1e-5)
    mu = math.sqrt(40 / 400 + 5 / 100)

    def delta(e: float) -> float:
        return float(norm.cdf(mu / 2 - e / mu) - math.exp(e) * norm.cdf(-mu / 2 - e / mu))

    assert delta(found) <= 1e-5 < delta(found * (1 - 1e-6))


@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0, math.nan, True])
def test_odometer_refuses_nonsense(delta: float) -> None:
    with pytest.raises(ConfigError):
        odometer([PrivacyEvent(0.1, 1.0, 1)], delta)


@pytest.mark.parametrize(
    ("event", "delta"),
    [
        (PrivacyEvent(0.01, 1.0, 100), 1e-14),  # below what the FFT resolves
        (PrivacyEvent(0.01, 1.0, 100), 1e-300),
        (PrivacyEvent(1e-300, 1e300, 10**9), 1e-9),
        (PrivacyEvent(1 - 1e-12, 0.3, 50), 1e-6),
        (PrivacyEvent(1e-4, 0.3, 1000), 1e-6),
        (PrivacyEvent(0.9, 0.3, 1000), 1e-6),
    ],
)
def test_odometer_has_a_finite_answer_at_the_edges(event: PrivacyEvent, delta: float) -> None:
    epsilon = odometer([event], delta)
    assert 0.0 <= epsilon < math.inf


def test_odometer_never_reports_more_than_the_filter_charges() -> None:
    kinds = [PrivacyEvent(1.0, 30.0, 20), PrivacyEvent(0.02, 1.1, 200), PrivacyEvent(0.2, 3.0, 30)]
    for history in itertools.chain.from_iterable(itertools.combinations(kinds, n) for n in (1, 2, 3)):
        assert odometer(history, BUDGET.delta) <= BUDGET.spent(history)


def test_public_names() -> None:
    assert sorted(accounting.__all__) == [
        "Budget",
        "MAX_STEPS",
        "MIN_NOISE_MULTIPLIER",
        "PrivacyEvent",
        "Reading",
        "odometer",
        "odometer_reading",
    ]
