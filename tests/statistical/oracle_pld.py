"""An independent lower bound for the exact ε of composed, Poisson-subsampled Gaussian steps.

Shares no code and no discretisation with hansa or dp_accounting. Each step is a pair (P, Q) of one-dimensional
distributions; `remove`: P = (1−q)·N(0, σ²) + q·N(1, σ²), Q = N(0, σ²); `add`: the two swapped. What is computed errs
below the truth at every turn, so an accountant that reports less than this is wrong:

1. Outcomes are merged into cells whose loss ln(dP/dQ) lies in ((j − ½)h, (j + ½)h). Merging outcomes is
   post-processing, so it can only lower ε. A cell's loss is exactly x = ln(P(cell)/Q(cell)); outcomes in the far tails
   are dropped (their loss becomes −∞).
2. x is written as jh + d, |d| ≤ h/2. The grid part is composed by FFT. The remainders are independent: their sum
   falls short of its mean by more than B with probability at most η (Bernstein), so
   δ(ε) ≥ E[(1 − e^(ε − jh − mean + B))₊] − η.
3. η and a bound for the FFT's rounding come off as well.

Source of the two ingredients: hockey-stick divergence of a privacy loss distribution, Sommer, Meiser & Mohammadi 2019;
rounding errors that concentrate, Gopi, Lee & Wutschitz 2106.02848.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.special import ndtr, ndtri

Step = tuple[float, float, int]  # q, σ, how many


class _Cells(NamedTuple):
    first: int  # index of the first cell; cell i is centred at (first + i)·h
    mass: NDArray[np.float64]  # under P; sums to just below 1
    mean: float  # of the remainder d
    variance: float


def optimistic_epsilon(history: Sequence[Step], delta: float, interval: float) -> float:
    """A lower bound for the smallest ε of the history at δ, add-or-remove-one; tight as the interval goes to 0."""
    return max(_one_direction(history, delta, interval, add) for add in (False, True))


def _interval_mass(edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard normal mass between neighbouring edges, without cancellation in either tail."""
    below, above = ndtr(edges), ndtr(-edges)
    return np.where(edges[:-1] > 0, above[:-1] - above[1:], below[1:] - below[:-1])


def _cells(q: float, sigma: float, h: float, add: bool, tails: float) -> _Cells:
    def loss(x: float) -> float:
        return float(np.logaddexp(math.log1p(-q) if q < 1 else -math.inf, math.log(q) + (x - 0.5) / sigma**2))

    first, last = math.floor(loss(-tails * sigma) / h + 0.5), math.ceil(loss(1 + tails * sigma) / h - 0.5)
    borders = (np.arange(first, last + 2) - 0.5) * h
    with np.errstate(divide="ignore"):
        ratio = np.exp(borders) if q == 1 else np.maximum(np.expm1(borders) + q, 0.0)
        x = sigma**2 * np.log(ratio / q) + 0.5  # −inf below the smallest loss, ln(1 − q)
    without = _interval_mass(x / sigma)
    joined = (1 - q) * without + q * _interval_mass((x - 1) / sigma)
    kept = (without > 0) & (joined > 0)
    centres = np.arange(first, last + 1) * h
    d = np.zeros_like(centres)
    d[kept] = np.clip(np.log(joined[kept] / without[kept]) - centres[kept], -h / 2, h / 2)
    mass = np.where(kept, joined, 0.0)
    if add:
        first, mass, d = -last, np.where(kept, without, 0.0)[::-1], -d[::-1]
    mean = float(mass @ d / mass.sum())
    return _Cells(first, mass, mean, float(mass @ (d - mean) ** 2 / mass.sum()))


def _range(cells: Sequence[_Cells], counts: Sequence[int], h: float, strength: float) -> tuple[int, int]:
    """Cells of the composition outside of which there is at most 2·e^−strength (Chernoff, on blocks of cells)."""
    blocks = []
    for c in cells:
        block = max(1, len(c.mass) // 4096)
        starts = np.arange(0, len(c.mass), block)
        low = (c.first + starts) * h
        blocks.append((low, low + (block - 1) * h, np.add.reduceat(c.mass, starts)))
    mean = sum(n * (low @ p) for n, (low, _, p) in zip(counts, blocks, strict=True))
    best_low, best_high = -math.inf, math.inf
    for rate in np.geomspace(1e-3, 1e6, 70):
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            up = down = strength
            for n, (low, high, p) in zip(counts, blocks, strict=True):
                up += n * (rate * high.max() + math.log(p @ np.exp(rate * (high - high.max()))))
                down += n * (-rate * low.min() + math.log(p @ np.exp(-rate * (low - low.min()))))
        best_high, best_low = min(best_high, up / rate), max(best_low, -down / rate)
    assert best_low <= mean <= best_high + 1e-9 + abs(mean) * 1e-3
    return math.floor(best_low / h) - 1, math.ceil(best_high / h) + 1


def _one_direction(history: Sequence[Step], delta: float, h: float, add: bool) -> float:
    counts = [n for _, _, n in history]
    tails = float(-ndtri(1e-4 * delta / sum(counts)))  # standard deviations of noise that are kept
    cells = [_cells(q, sigma, h, add, tails) for q, sigma, _ in history]
    low, high = _range(cells, counts, h, 12 - math.log(delta))
    size = fft.next_fast_len(max(high - low + 1, *(len(c.mass) for c in cells)), real=True)
    spectrum = np.ones(size // 2 + 1, dtype=complex)
    for c, n in zip(cells, counts, strict=True):
        frequency = fft.rfft(c.mass, size)
        seen = np.abs(frequency) > math.exp(-45 / n)  # elsewhere the power is below e⁻⁴⁵
        spectrum[~seen] = 0
        spectrum[seen] *= frequency[seen] ** n
    start = sum(n * c.first for c, n in zip(cells, counts, strict=True))
    composed = np.roll(fft.irfft(spectrum, size), start - low)  # entry i is the loss (low + i)·h

    eta = 1e-3 * delta
    lost = 1.1 * eta + 1e-14 + 2e-16 * sum(counts)  # 0.1·η: what lies outside the range and wraps around
    log_eta = -math.log(eta)
    variance = sum(n * c.variance for c, n in zip(cells, counts, strict=True))
    bernstein = h * log_eta / 3 + math.sqrt((h * log_eta / 3) ** 2 + 2 * variance * log_eta)
    mean = sum(n * c.mean for c, n in zip(cells, counts, strict=True))
    shift = max(mean - bernstein, -sum(counts) * h / 2)
    losses = (low + np.arange(size)) * h + shift

    # δ(ε) = A − e^ε·B with A, B the suffix sums of P and Q from the first loss above ε. B is kept relative to the
    # loss where A falls to δ, near the answer; far below it the exponent is clipped (the answer is checked).
    first = int(np.searchsorted(losses, 0.0))
    losses, composed = losses[first:], composed[first:]
    upper = np.cumsum(composed[::-1])[::-1]
    target = delta + lost
    above = np.flatnonzero(upper > target)
    if not len(above):
        return 0.0
    pivot = losses[above[-1]]
    lower = np.cumsum((composed * np.exp(np.minimum(pivot - losses, 600.0)))[::-1])[::-1]
    with np.errstate(over="ignore"):
        exceeds = np.flatnonzero(upper - np.exp(losses - pivot) * lower > target)
    after = int(exceeds[-1]) + 1 if len(exceeds) else 0  # the answer lies before losses[after]
    epsilon = max(0.0, pivot + math.log((upper[after] - target) / lower[after])) if upper[after] > target else 0.0
    exact = composed[after:] @ -np.expm1(np.minimum(0.0, epsilon - losses[after:]))
    assert epsilon == 0.0 or abs(exact - target) < 1e-3 * delta
    return float(epsilon)
