"""The filter against those who see everything and choose the next event by it; judged by integration, not by hansa."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import norm

from hansa.common.accounting import Budget, PrivacyEvent
from statistical.oracle_integral import Step, exact_epsilon

Floats = NDArray[np.float64]


def _delta_of_one(epsilon: Floats, q: float, sigma: float, add: bool) -> Floats:
    """Hockey-stick divergence of one step at any real ε, in closed form: the loss crosses ε at one point."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = np.maximum((np.exp(-epsilon if add else epsilon) - 1 + q) / q, 0.0)
        x = sigma**2 * np.log(ratio) + 0.5
        tail = norm.cdf if add else norm.sf
        without, joined = tail(x / sigma), (1 - q) * tail(x / sigma) + q * tail((x - 1) / sigma)
        upper, lower = (without, joined) if add else (joined, without)
        return np.maximum(upper - np.where(lower > 0, np.exp(epsilon) * lower, 0.0), 0.0)


def _adaptive_delta(epsilon: float, first: PrivacyEvent, seconds: list[PrivacyEvent], add: bool) -> float:
    """δ(ε) of one step followed by whichever second step does most harm to what the first one showed."""
    q, sigma = first.sampling_rate, first.noise_multiplier
    x = np.linspace(-12 * sigma, 1 + 12 * sigma, 40_001)
    nothing = norm.pdf(x, 0, sigma)
    loss = np.log(1 - q + q * np.exp((x - 0.5) / sigma**2))
    density = nothing if add else nothing * np.exp(loss)
    left = epsilon - (-loss if add else loss)
    worst = np.max(
        [_delta_of_one(left, s.sampling_rate, s.noise_multiplier, add) for s in seconds]
        + [np.maximum(0.0, -np.expm1(left))],  # or to stop
        axis=0,
    )
    return float((density * worst).sum() * (x[1] - x[0]))


def _cheapest_admitted(budget: Budget, before: list[PrivacyEvent], q: float) -> PrivacyEvent | None:
    """The loudest single step at rate q that the filter still admits."""
    low, high = 0.3, 1e4
    if not budget.admits([*before, PrivacyEvent(q, high, 1)]):
        return None
    while high / low > 1 + 1e-6:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if budget.admits([*before, PrivacyEvent(q, middle, 1)]) else (middle, high)
    return PrivacyEvent(q, high, 1)


@pytest.mark.parametrize("epsilon", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("delta", [1e-2, 1e-5])
def test_second_step_chosen_by_the_first_ones_result_never_overspends(epsilon: float, delta: float) -> None:
    """Every branch is in play at once: what is chosen after one result may use another branch than after the next."""
    for plan in (None, (0.01, 100)):
        budget = Budget.create(epsilon, delta, plan)
        for q in (1.0, 0.3, 0.02):
            loudest = _cheapest_admitted(budget, [], q)
            assert loudest is not None
            for share in (1.0, 1.2, 1.5, 3.0):
                first = PrivacyEvent(q, loudest.noise_multiplier * share, 1)
                seconds = [s for r in (1.0, 0.5, 0.1, 0.01, 1e-3) if (s := _cheapest_admitted(budget, [first], r))]
                found = max(_adaptive_delta(epsilon, first, seconds, add) for add in (False, True))
                assert found <= delta, (budget, first, seconds, found)


def test_the_adversary_would_catch_a_filter_without_a_union_bound() -> None:
    """Control: with all of δ for every branch, the same adversary overspends."""
    caught = 0
    for delta in (1e-2, 1e-5):
        epsilon = 2.0
        honest = Budget.create(epsilon, delta)
        # Shares of a budget for a larger δ, as if they need not sum to δ.
        greedy = Budget(epsilon, 6 * delta, tuple((a, delta) for a, _ in honest.orders), delta)
        for q in (1.0, 0.3, 0.02):
            loudest = _cheapest_admitted(greedy, [], q)
            assert loudest is not None
            for share in (1.0, 1.2, 1.5, 3.0):
                first = PrivacyEvent(q, loudest.noise_multiplier * share, 1)
                seconds = [s for r in (1.0, 0.5, 0.1, 0.01, 1e-3) if (s := _cheapest_admitted(greedy, [first], r))]
                caught += any(_adaptive_delta(epsilon, first, seconds, add) > delta for add in (False, True))
    assert caught


@pytest.mark.slow
@pytest.mark.parametrize("seed", [*range(12), *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(12, 24))])
def test_greedy_streams_stay_below_the_cap(seed: int) -> None:
    """Of five random events it always takes the one with most exact ε for its price, until nothing more is admitted."""
    rng = random.Random(f"greedy {seed}")
    epsilon, delta = rng.choice((0.5, 1.0, 2.0, 8.0)), rng.choice((1e-4, 1e-5, 1e-7))
    budget = Budget.create(epsilon, delta, rng.choice((None, (0.01, 100))))
    history: list[PrivacyEvent] = []

    def exact(events: list[PrivacyEvent]) -> float:
        merged: dict[tuple[float, float], int] = {}
        for e in events:
            kind = e.sampling_rate, e.noise_multiplier
            merged[kind] = merged.get(kind, 0) + e.steps
        steps: list[Step] = [(q, sigma, n) for (q, sigma), n in merged.items()]
        return exact_epsilon(steps, delta)

    for _ in range(4):
        offers = []
        for _ in range(4):
            q, sigma = rng.choice((1.0, 0.3, 0.1, 0.03)), math.exp(rng.uniform(math.log(1.5), math.log(60)))
            fits = budget.most_steps(q, sigma, history)
            if fits >= 20:
                offers.append(PrivacyEvent(q, sigma, min(rng.randint(fits // 3 + 1, fits), 10**5)))
        if offers:
            history.append(max(offers, key=lambda e: exact([*history, e]) / budget.spent([*history, e])))
    if not history:
        pytest.skip("nothing was offered that fits")
    last = history[-1]
    more = budget.most_steps(last.sampling_rate, last.noise_multiplier, history)
    if more:
        history.append(PrivacyEvent(last.sampling_rate, last.noise_multiplier, min(more, 10**6)))
    assert budget.admits(history)
    found = exact(history)
    assert found <= epsilon
    assert found <= budget.spent(history) + 2e-5
