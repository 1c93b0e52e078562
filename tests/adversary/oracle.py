"""What a history of Poisson-subsampled Gaussian steps really costs; no code of Hansa or dp-accounting has a part in it.

Add-or-remove-one. A history is {(q, σ): steps}. Three answers:

  `surely_within`   True is a proof that the history is (ε, δ)-DP: by the exact curve of the Gaussian mechanism (which a subsampled
                    step never exceeds), by Rényi divergences of both directions, integrated numerically, at some forty orders each
                    with the whole δ, or by a privacy loss distribution with every loss rounded up
  `surely_beyond`   True is a proof that it is not: by tests/statistical/oracle_pld.py, which errs below the truth at every turn
  `verdict`         of both, on finer and finer grids; what stays undecided counts as overspent

Sources: Balle & Wang 1805.06530 (Thm 8); Canonne, Kamath & Steinke 2004.00010 (Prop. 12); Sommer, Meiser & Mohammadi 2019.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.special import log_ndtr, logsumexp, ndtr

from statistical.oracle_pld import optimistic_epsilon

History = Mapping[tuple[float, float], int]

ORDERS = tuple(float(a) for a in np.round(np.geomspace(1.15, 130.0, 44), 3))
_TINY = 1e-9  # relative: of quadrature and rounding, against the history


def verdict(history: History, epsilon: float, delta: float) -> bool:
    """Whether more was released than (ε, δ) allows."""
    if not history or surely_within(history, epsilon, delta):
        return False
    for finer in (500, 2000, 8000):
        interval = epsilon / finer
        if pessimistic_delta(history, epsilon, interval) <= delta:
            return False
        if surely_beyond(history, epsilon, delta, interval):
            return True
    return True


def surely_within(history: History, epsilon: float, delta: float) -> bool:
    """By closed forms and quadrature; False says nothing."""
    if gaussian_delta(math.sqrt(sum(n / sigma**2 for (_, sigma), n in history.items())), epsilon) <= delta:
        return True
    orders = np.array(ORDERS)
    rho = sum((n * _divergences(q, sigma) for (q, sigma), n in history.items()), np.zeros(len(orders)))
    with np.errstate(invalid="ignore"):
        logs = (orders - 1) * (rho * (1 + _TINY) - epsilon + np.log1p(-1 / orders)) - np.log(orders)
    return bool(np.nanmin(logs) <= math.log(delta))


def surely_beyond(history: History, epsilon: float, delta: float, interval: float) -> bool:
    """By a lower bound of the true ε; False says nothing."""
    return true_epsilon(history, delta, interval) > epsilon


def true_epsilon(history: History, delta: float, interval: float) -> float:
    """The true ε at δ, from below."""
    return optimistic_epsilon([(q, sigma, n) for (q, sigma), n in sorted(history.items())], delta, interval)


def gaussian_delta(mu: float, epsilon: float) -> float:
    """δ(ε) of the Gaussian mechanism with sensitivity over noise μ, rounded up."""
    first = float(ndtr(mu / 2 - epsilon / mu))
    second = math.exp(epsilon + float(log_ndtr(-mu / 2 - epsilon / mu)))
    return first - second + _TINY * first


def filter_admits(history: History, budget: Mapping[str, Any]) -> bool:
    """The published filter (docs/ledger-format.md) on what left, with its orders and shares of δ; integrated, not summed.

    Finer than the truth: it knows when one step more left than was paid for, even where that is still (ε, δ)-DP.
    """
    epsilon = float(budget["epsilon"]) * (1 + _TINY)
    mu = math.sqrt(sum(n / sigma**2 for (_, sigma), n in history.items()))
    if not history or gaussian_delta(mu, epsilon) * (1 - 1e-6) <= float(budget["gaussian_delta"]):
        return True
    for alpha, share in budget["orders"]:
        rho = sum(n * _divergence(q, sigma, float(alpha)) for (q, sigma), n in history.items())
        if rho * (1 - 1e-6) <= epsilon - math.log1p(-1 / alpha) + math.log(float(share) * alpha) / (alpha - 1):
            return True
    return False


def _divergences(q: float, sigma: float) -> NDArray[np.float64]:
    """At `ORDERS`."""
    return np.array([_divergence(q, sigma, alpha) for alpha in ORDERS])


@lru_cache(maxsize=65536)
def _divergence(q: float, sigma: float, alpha: float) -> float:
    """The larger of both directions' Rényi divergences; infinite where too fine a grid would be needed.

    With r(x) = 1 − q + q·e^((2x−1)/2σ²) and x ~ N(0, σ²): E[r^α] and E[r^(1−α)] (the trapezoid rule on the whole line converges
    faster than any power of the step for such integrands).
    """
    if q == 1.0:
        return alpha / (2 * sigma**2)
    step = min(sigma / 25, sigma**2 / (8 * alpha))
    low, high = -14 * sigma, alpha + 14 * sigma
    if (high - low) / step > 2_000_000:
        return math.inf
    x = np.arange(low, high, step)
    density = -(x**2) / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi)) + math.log(step)
    ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * x - 1) / (2 * sigma**2))
    both = max(float(logsumexp(density + alpha * ratio)), float(logsumexp(density + (1 - alpha) * ratio)))
    return max(0.0, both) / (alpha - 1) + 1e-13


def pessimistic_delta(history: History, epsilon: float, interval: float) -> float:
    """An upper bound of δ(ε): losses are rounded up to a multiple of the interval, tails count as infinite losses."""
    return max(_one_direction(history, epsilon, interval, add) for add in (False, True))


def _one_direction(history: History, epsilon: float, h: float, add: bool) -> float:
    lost = 1e-15 * (1000 + sum(history.values()))  # of the FFT, a composition
    parts = []
    for (q, sigma), steps in history.items():
        first, mass, tail = _rounded_up(q, sigma, h, add)
        parts.append((first, mass, steps))
        lost += steps * tail
    # Chernoff: outside of [low, high] there is at most 2·e^-50, which wraps around into the window.
    low, high = -math.inf, math.inf
    for rate in np.geomspace(1e-6, 1.0, 40):
        up = down = 50.0
        for first, mass, steps in parts:
            index = first + np.arange(len(mass))
            logs = np.log(np.maximum(mass, 1e-300))
            up += steps * float(logsumexp(logs + rate * index))
            down += steps * float(logsumexp(logs - rate * index))
        low, high = max(low, -down / rate), min(high, up / rate)
    lost += 2 * math.exp(-50)
    start, size = math.floor(low) - 1, fft.next_fast_len(math.ceil(high) - math.floor(low) + 3, real=True)
    size = max(size, fft.next_fast_len(max(len(mass) for _, mass, _ in parts), real=True))
    spectrum = np.ones(size // 2 + 1, dtype=complex)
    for _, mass, steps in parts:
        spectrum *= fft.rfft(mass, size) ** steps
    total = np.roll(fft.irfft(spectrum, size), sum(n * first for first, _, n in parts) - start)
    losses = (start + np.arange(size)) * h
    above = losses > epsilon
    return float(np.maximum(total[above], 0.0) @ -np.expm1(epsilon - losses[above])) + lost


@lru_cache(maxsize=512)
def _rounded_up(q: float, sigma: float, h: float, add: bool) -> tuple[int, NDArray[np.float64], float]:
    """(first index, mass of each loss, mass of infinite losses) of one step, losses rounded up to multiples of h.

    `remove`: x ~ (1−q)·N(0, σ²) + q·N(1, σ²), loss ln r(x). `add`: x ~ N(0, σ²), loss −ln r(x).
    """

    def loss(x: float) -> float:
        if q == 1.0:
            return (2 * x - 1) / (2 * sigma**2)
        return float(np.logaddexp(math.log1p(-q), math.log(q) + (2 * x - 1) / (2 * sigma**2)))

    # P(loss <= jh) at every border: exact, so that the masses are differences of a distribution function.
    low, high = math.floor(loss(-9.5 * sigma) / h) - 1, math.ceil(loss(1 + 9.5 * sigma) / h) + 1
    borders = np.arange(low, high + 1) * h
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.exp(borders) if q == 1.0 else np.maximum(np.expm1(borders) + q, 0.0)
        x = sigma**2 * np.log(ratio / q) + 0.5
    if not add:  # mass below each border under the mixture
        below = (1 - q) * ndtr(x / sigma) + q * ndtr((x - 1) / sigma)
        above = (1 - q) * ndtr(-x / sigma) + q * ndtr((1 - x) / sigma)
        mass = np.where(x[1:] > 0, above[:-1] - above[1:], below[1:] - below[:-1])
        mass = np.maximum(np.concatenate([[below[0]], mass]), 0.0)  # up to the border above
        return low, mass, float(above[-1])
    below, above = ndtr(x / sigma), ndtr(-x / sigma)
    mass = np.where(x[1:] > 0, above[:-1] - above[1:], below[1:] - below[:-1])
    # loss −ln r in [−borders[i+1], −borders[i]] is rounded up to −borders[i]; beyond the last border to −borders[-1].
    mass = np.maximum(np.concatenate([mass, [above[-1]]]), 0.0)[::-1]
    return -high, mass, float(below[0])
