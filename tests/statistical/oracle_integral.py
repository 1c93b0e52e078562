"""The exact ε of composed, Poisson-subsampled Gaussian steps, by numerical integration alone.

Shares no code, no grid of losses and no FFT with hansa, dp_accounting or oracle_pld. For a pair (P, Q) and the loss L of
the whole history, with K(z) = ln E_P[e^{zL}] and any θ > 0,

    δ(ε) = E_P[(1 − e^{ε−L})₊] = 1/2πi ∫ e^{K(z) − zε} / (z(z+1)) dz    along  z = θ + it

(Laplace inversion: the integral of e^{z(L−ε)}/(z(z+1)) closes to the left on the poles 0 and −1 if L > ε, and to nothing
on the right if not). K is the sum of the steps' own, each E_P[e^{zL}] one integral over the output x. Both
integrals are trapezoid sums, which converge faster than any power on such integrands; both are refined until ε
stands still. The result is neither an upper nor a lower bound but the number itself, to about 1e-5. Few steps at a
small rate have a loss whose transform hardly falls off: that is refused (ArithmeticError).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

Step = tuple[float, float, int]  # q, σ, how many


def exact_epsilon(history: Sequence[Step], delta: float) -> float:
    """ε of the history at δ, add-or-remove-one: the larger of the two directions; 0 where δ(0) ≤ δ."""
    return max(_direction(history, delta, add) for add in (False, True))


def _losses(q: float, sigma: float, add: bool, dx: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Losses on an even grid of outputs, and the logarithm of P's mass there."""
    x = np.arange(-40 * sigma, 1 + 40 * sigma, dx)
    nothing = -(x**2) / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi) / dx)
    shift = (2 * x - 1) / (2 * sigma**2)
    loss = shift if q == 1 else np.logaddexp(math.log1p(-q), math.log(q) + shift)
    return (-loss, nothing) if add else (loss, nothing + loss)


def _log_moments(steps: Sequence[Step], add: bool, z: NDArray[np.complex128], dx: float) -> NDArray[np.complex128]:
    """Σ ln E_P[e^{zL}]; the logarithms' branch does not matter, as the number of steps is whole."""
    total = np.zeros(len(z), dtype=np.complex128)
    for q, sigma, n in steps:
        loss, weight = _losses(q, sigma, add, dx * sigma)
        top = float((weight + z[0].real * loss).max())
        kept = weight + z[0].real * loss > top - 45
        loss, weight = loss[kept], weight[kept]
        for part in range(0, len(z), 512):
            some = z[part : part + 512]
            values = np.exp(np.outer(some, loss) + (weight - top)).sum(axis=1)
            total[part : part + 512] += n * (top + np.log(values))
    return total


def _direction(history: Sequence[Step], delta: float, add: bool) -> float:
    def real_moment(theta: float) -> float:
        return float(_log_moments(history, add, np.array([theta + 0j]), 0.02)[0].real)

    # The order whose Rényi bound is least: the saddle is near it.
    thetas = np.geomspace(1e-3, 2000, 100)
    bounds = [(real_moment(t) - math.log(delta * (1 + t)) - t * math.log1p(1 / t)) / t for t in thetas]
    theta = float(thetas[int(np.argmin(bounds))])
    highest = float(min(bounds)) + 1e-3
    nudge = 1e-3 * theta
    variance = (real_moment(theta + nudge) + real_moment(theta - nudge) - 2 * real_moment(theta)) / nudge**2
    scale = 1 / math.sqrt(variance)

    def at(dt: float, end: float, dx: float) -> float:
        return _epsilon(history, delta, add, theta, highest, (dt * scale, end * scale, dx))

    # How far and how finely: each until the answer stands still.
    dt, end, dx = 0.1, 16.0, 0.05
    found = at(dt, end, dx)
    while end / dt < 3e4:
        end, dt, dx = 2 * end, dt / 1.5, dx / 1.2
        before, found = found, at(dt, end, dx)
        if abs(found - before) < 1e-5 * max(1.0, found):
            return found
    raise ArithmeticError(f"no convergence: {history}, {delta}, {found}, {before}")


def _epsilon(
    history: Sequence[Step], delta: float, add: bool, theta: float, highest: float, grid: tuple[float, float, float]
) -> float:
    dt, end, dx = grid
    z = theta + 1j * np.arange(0.0, end, dt)
    moments = _log_moments(history, add, z, dx)
    weights = np.full(len(z), dt / math.pi)  # the half line twice: the integrand at −t is the conjugate
    weights[0] /= 2

    def excess(epsilon: float) -> float:
        with np.errstate(over="ignore", invalid="ignore"):
            found = float((np.exp(moments - z * epsilon) / (z * (z + 1)) * weights).sum().real) / delta - 1
        return found if math.isfinite(found) else 1e300  # far below the answer

    # Far below the answer the sum over t repeats itself: come down to it from the Rényi bound.
    low, gap = highest, 1e-3 * max(1.0, highest)
    while low > 0.0 and excess(low) <= 0:
        low, gap = max(0.0, low - gap), 1.3 * gap
    if low == highest:
        return math.nan  # above a bound that holds: not fine enough yet
    return float(brentq(excess, low, highest, xtol=1e-9)) if excess(low) > 0 else 0.0
