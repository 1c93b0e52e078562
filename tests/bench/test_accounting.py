"""Measured figures of the accounting: `make bench`."""

from __future__ import annotations

import math
import time

import pytest

from hansa.common import accounting
from hansa.common.accounting import Budget, PrivacyEvent, odometer

pytestmark = pytest.mark.bench

DELTA = 1e-5


def _timed(call: object) -> float:
    accounting._renyi_step.cache_clear()
    accounting._gaussian_epsilon.cache_clear()
    start = time.perf_counter()
    call()  # type: ignore[operator]
    return time.perf_counter() - start


def test_calibration_and_admission_times() -> None:
    budget = Budget.create(1.0, DELTA)
    print()
    for q in (1.0, 0.1, 0.01):
        seconds = _timed(lambda q=q: budget.calibrate(q, 1000))
        print(f"calibrate, 1,000 rounds, q = {q:g}: {seconds * 1e3:.1f} ms -> σ = {budget.calibrate(q, 1000)}")
        assert seconds < 1.0
    events = [PrivacyEvent(q, 5.0, 10) for q in (1.0, 0.1, 0.01)] * 300
    print(f"admits, 3 kinds, 900 events, cold: {_timed(lambda: budget.admits(events)) * 1e3:.2f} ms")
    few = events[:3]
    print(f"admits, 3 kinds, cold: {_timed(lambda: budget.admits(few)) * 1e3:.2f} ms")
    for history in ([PrivacyEvent(0.01, 1.0, 1000)], [PrivacyEvent(1e-4, 1.0, 10**5)], few):
        print(f"odometer {history}: {_timed(lambda h=history: odometer(h, DELTA)):.2f} s")


def _best_single_order(q: float, sigma: float, epsilon: float) -> float:
    return max(
        (epsilon + accounting._renyi_offset(alpha, DELTA)) / accounting._renyi_step(q, sigma, alpha)
        for alpha in range(2, 100)
    )


def test_share_of_a_single_best_order() -> None:
    """Steps admitted against one best Rényi order with all of δ, at the noise for which that order admits T steps."""
    print(f"\nsteps admitted / steps of one best order (δ = {DELTA:g}); in brackets σ")
    for epsilon in (0.5, 1.0, 2.0, 8.0):
        budget = Budget.create(epsilon, DELTA)
        print(f"ε = {epsilon:g}, orders {[(a, round(s / DELTA, 4)) for a, s in budget.orders]}")
        for q in (0.01, 0.1, 1.0):
            cells = []
            for steps in (100, 1000, 10_000, 100_000):
                low, high = 0.3, 1e4
                for _ in range(25):
                    middle = math.sqrt(low * high)
                    low, high = (low, middle) if _best_single_order(q, middle, epsilon) > steps else (middle, high)
                ratio = budget.most_steps(q, high) / _best_single_order(q, high, epsilon)
                cost = budget.calibrate(q, steps) / high
                cells.append(f"T={steps}: {ratio:.2f} (σ {high:.2f}, noise x{cost:.2f})")
            print(f"  q = {q:<5g}" + "  ".join(cells))
