"""Closed forms that filter and odometer share: the Rényi divergence of a sampled step, the Gaussian mechanism's curve.

Add-or-remove-one adjacency, one record (or client) whose contribution has L2 norm at most C, noise of σC. All results
are rounded up: float errors count against the history.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from scipy.special import gammaln, log_ndtr, logsumexp

__all__ = ["gaussian_epsilon", "gaussian_log_delta", "renyi_epsilon", "renyi_offset", "renyi_step"]

# Every ε is raised by this much against float rounding (relative to the RDP sum, and absolute).
_SLACK = 1e-10


@lru_cache(maxsize=65536)
def renyi_step(q: float, sigma: float, alpha: int) -> float:
    """ρ(α) of one subsampled Gaussian step, exact for integer α (1908.10530, Sec. 3.3).

    (α−1)·ρ = ln Σ_k C(α,k) (1−q)^(α−k) q^k e^(k(k−1)/2σ²). The terms' weights sum to 1, so this is
    ln(1 + Σ_{k≥2} weight·(e^x − 1)): all terms positive, hence no cancellation however small q is. dp_accounting's
    own sum is private and loses those digits.
    """
    if q == 1.0:
        return alpha / (2 * sigma**2)
    k = np.arange(2, alpha + 1, dtype=np.float64)
    x = k * (k - 1) / (2 * sigma**2)
    weights = gammaln(alpha + 1) - gammaln(k + 1) - gammaln(alpha - k + 1)
    weights += (alpha - k) * math.log1p(-q) + k * math.log(q)
    excess = logsumexp(weights + x + np.log(-np.expm1(-x)))
    return float(np.logaddexp(0.0, excess)) / (alpha - 1)


def renyi_epsilon(rho: float, alpha: int, delta: float) -> float:
    """ε of (α, ρ)-RDP at δ (2004.00010, Prop. 12), rounded up."""
    return max(0.0, rho * (1 + _SLACK) + _SLACK - renyi_offset(alpha, delta))


def renyi_offset(alpha: int, delta: float) -> float:
    """−ln(1 − 1/α) + ln(δα)/(α − 1): what Σ ρ(α) may reach beyond ε (below zero, as a rule)."""
    return -math.log1p(-1 / alpha) + (math.log(delta) + math.log(alpha)) / (alpha - 1)


def gaussian_log_delta(epsilon: float, mu: float) -> float:
    """ln δ(ε; μ) of the Gaussian mechanism (Balle & Wang 1805.06530, Thm 8); −∞ where it has no digits left."""
    upper = float(log_ndtr(mu / 2 - epsilon / mu))
    lower = epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))
    return upper + math.log(-math.expm1(lower - upper)) if lower < upper else -math.inf


@lru_cache(maxsize=65536)
def gaussian_epsilon(mu_squared: float, delta: float) -> float:
    """Smallest ε with δ(ε; μ) = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ) ≤ δ, by bisection, rounded up."""
    mu = max(math.sqrt(mu_squared), 1e-6)  # below, the difference of the two terms has no digits left

    def too_much(epsilon: float) -> bool:
        return gaussian_log_delta(epsilon, mu) > math.log(delta)

    if not too_much(0.0):
        return 0.0
    low, high = 0.0, mu * (mu / 2 + math.sqrt(-2 * math.log(delta)))  # Gaussian tail: δ(high) <= δ
    # It ends: far above the least floats, the curve is in floats what it is at 0, so high stays up there.
    while high - low > 1e-14 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if too_much(middle) else (low, middle)
    return high * (1 + _SLACK) + _SLACK
