"""The tight ε of a history taken as fixed: privacy loss distributions, composed in the tilted Fourier domain.

A history is a mapping (q, σ) -> steps of Poisson-subsampled Gaussian steps, q in (0, 1], σ in [0.3, 10⁹]. The answer
is for add-or-remove-one adjacency: the larger of the two directions. Everything here is rounded against the history:
ε is never below the truth.

How, for one direction with the pair (P, Q) and the loss L = ln dP/dQ:

1. *Discretise*. Between two neighbouring grid points, P's and Q's mass are kept and moved to the ends. The new pair
   dominates the old one, and no other pair on that grid is smaller (Connect the Dots: Doroshenko, Ghazi, Kamath, Kumar &
   Manurangsi 2207.04380). Domination survives composition (Zhu, Dong & Wang 2106.08567). What lies above the
   last grid point, 10⁻⁶ of δ in all, is charged as certain loss; what lies below the first is moved up.
2. *Tilt*. With K(θ) = ln E_P[e^{θL}], summed over steps, and P_θ(l) = P(l)·e^{θl − K(θ)},

       δ(ε) = e^{K(θ) − θε} · E_θ[e^{−θ(L−ε)} (1 − e^{−(L−ε)})₊].

   The bracket is at most w = θ^θ/(θ+1)^(θ+1), which alone is the Rényi bound of order θ + 1 (Canonne, Kamath & Steinke
   2004.00010, Prop. 12); the expectation is what that bound gives away. θ is the best order's, so P_θ has its bulk
   near ε, and an error η of the expectation costs at most the share η of the Rényi bound, however small δ is
   (exponential tilting: Alghamdi et al. 2208.09595).
3. *Compose* by FFT on a window outside of which P_θ has at most 2·10⁻¹⁰ (Chernoff). That, and the FFT's rounding, is
   added to the expectation.
4. *Halve* the interval until ε moves by less than 10⁻⁴·max(1, ε).

Rounding q up or σ down only increases the loss: with r = q'/q ≤ 1, replacing the output by fresh N(0, σ²) with
probability 1 − r turns rate q into q' and leaves N(0, σ²) alone; adding N(0, σ'² − σ²) turns σ into σ'. Both are
post-processing, which no hockey-stick divergence survives larger, in either direction; composition as above.

| edge case | answer |
| --- | --- |
| no steps | 0.0 |
| q = 1 throughout | the exact curve, no discretisation |
| a joining record is noticed with probability at most δ in all | 0.0 |
| kinds that are noticed with 10⁻⁴ of δ in all | left out, and taken off δ |
| more than 1024 kinds | the cheaper half of them rounded to a grid |
| δ below 10⁻²⁸⁰, grids beyond 2²¹ points | the best Rényi bound |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

from .curves import gaussian_epsilon, renyi_epsilon, renyi_step

__all__ = ["History", "Reading", "read"]

History = Mapping[tuple[float, float], int]
"""(q, σ) -> steps."""

_Floats = NDArray[np.float64]

_MAX_KINDS = 1024
_MAX_POINTS = 2**21  # of one composition's grid: about a second of work a direction
_MAX_WORK = 2**25  # kinds x points
_MAX_STORED = 2**22  # points of single steps that are remembered, not computed twice
_FIRST_POINTS = 128  # to one standard deviation of the tilted composition
_TOLERANCE = 1e-4
_OUTSIDE = 1e-10  # of the tilted composition, on either side of the window
_LOST = 1e-6  # of δ: losses above the grids
_UNNOTICED = 1e-4  # of δ: kinds left out
_NEGLIGIBLE = 1e-6  # of the variance: kinds whose q is rounded up to 1
_ORDERS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096)
_SLACK = 1e-10  # float rounding, relative and absolute


@dataclass(frozen=True)
class Reading:
    """What an odometer says.

    Args:
        epsilon: ε at the δ asked for; never below the truth.
        rounding_cost: how much of it came in by rounding kinds to a grid: by so much rounding moved the Rényi bound
            of the order that fits best. 0.0 where nothing was rounded.
        step: by how much ε last moved when the discretisation interval was halved, an estimate of what discretising
            still costs. 0.0 where nothing was discretised, infinite for a Rényi bound, which was not refined.
        method: "none" (no steps), "unnoticed", "gaussian" (exact), "loss distribution" or "renyi".
    """

    epsilon: float
    rounding_cost: float
    step: float
    method: str


def read(history: History, delta: float) -> Reading:
    """The tight ε of the history at δ in (0, 1)."""
    history = {kind: history[kind] for kind in sorted(history)}
    if not history:
        return Reading(0.0, 0.0, 0.0, "none")
    if all(q == 1.0 for q, _ in history):
        return Reading(gaussian_epsilon(_mu_squared(history), delta), 0.0, 0.0, "gaussian")
    # A joining record changes the output at all with at most this probability: ε = 0 if δ covers it.
    noticed = {(q, s): n * q * math.erf(1 / (math.sqrt(8) * s)) for (q, s), n in history.items()}
    if math.fsum(noticed.values()) * (1 + 1e-12) <= delta:
        return Reading(0.0, 0.0, 0.0, "unnoticed")

    whole, asked = history, delta
    allowed = _UNNOTICED * delta / len(history)
    history = {kind: steps for kind, steps in history.items() if noticed[kind] > allowed}
    delta *= 1 - _UNNOTICED
    alpha, bound = _best_order(history, delta)
    bound = min(bound, gaussian_epsilon(_mu_squared(whole), asked))
    if bound > _TOLERANCE and delta > 1e-280:
        rounded = _round(history, alpha)
        worst = _compose(rounded, delta)
        if worst.epsilon <= bound:
            method = "loss distribution" if worst.step < math.inf else "renyi"
            return Reading(worst.epsilon * (1 + _SLACK) + _SLACK, worst.above(history), worst.step, method)
    return Reading(bound, 0.0, math.inf, "renyi")


def _mu_squared(history: History) -> float:
    return math.fsum(steps / sigma**2 for (_, sigma), steps in history.items())


def _rho(history: History, alpha: int) -> float:
    return math.fsum(steps * renyi_step(q, sigma, alpha) for (q, sigma), steps in history.items())


def _best_order(history: History, delta: float) -> tuple[int, float]:
    """(α, ε) of the best whole Rényi order."""
    orders = _ORDERS if len(history) <= 2 * _MAX_KINDS else _ORDERS[::2]  # a question of time
    epsilon, alpha = min((renyi_epsilon(_rho(history, a), a, delta), a) for a in orders)
    return alpha, epsilon


# ------------------------------------------------------------------------------------------------------------ rounding


def _round(history: History, alpha: int) -> dict[tuple[float, float], int]:
    """At most `_MAX_KINDS` sampled kinds and one unsampled, of no smaller loss.

    The kinds that matter least (by their share of Σρ(α)) give way: first q is rounded up to 1 where even that is
    negligible; then, if need be, the cheaper ones of the others are put on the finest grid q = 2^(−i/m),
    σ = 2^(j/m) that has few enough points.
    """
    rest = dict(history)
    unsampled = [steps / sigma**2 for (q, sigma), steps in history.items() if q == 1.0]
    spread = _rho(history, 2)
    spent = 0.0
    for (q, sigma), steps in sorted(history.items(), key=lambda item: (item[1] / item[0][1] ** 2, item[0])):
        spent += steps / sigma**2
        if q < 1.0 and spent > _NEGLIGIBLE * spread:
            break
        unsampled.extend([steps / sigma**2] * (q < 1.0))
        del rest[q, sigma]
    rest = {kind: steps for kind, steps in rest.items() if kind[0] < 1.0}
    if len(rest) > _MAX_KINDS:
        by_price = sorted(rest, key=lambda kind: (-rest[kind] * renyi_step(*kind, alpha), kind))
        kept = {kind: rest[kind] for kind in by_price[: _MAX_KINDS // 2]}
        for m in (64, 32, 16, 8, 4, 2, 1, 0.5, 0.25, 0.1, 0.02):
            rounded = dict(kept)
            for kind in by_price[_MAX_KINDS // 2 :]:
                on_grid = _grid_point(*kind, m)
                rounded[on_grid] = rounded.get(on_grid, 0) + rest[kind]
            if len(rounded) <= _MAX_KINDS:
                break
        rest = rounded
    if unsampled:  # together one Gaussian mechanism, exactly; in steps of moderate loss, which exp() holds
        mu_squared = math.fsum(unsampled)
        steps = math.ceil(mu_squared / 4)
        rest[1.0, math.sqrt(steps / mu_squared)] = steps
    return rest


def _grid_point(q: float, sigma: float, m: float) -> tuple[float, float]:
    up = 2.0 ** (math.ceil(math.log2(q) * m) / m)
    down = 2.0 ** (math.floor(math.log2(sigma) * m) / m)
    # min and max: against rounding of the powers, and no grid point may leave the range
    return min(max(up, q), math.nextafter(1.0, 0.0)), max(min(down, sigma), 0.3)


# ---------------------------------------------------------------------------------------------------------- one step


class _Mass(NamedTuple):
    """P's losses, discretised: `mass` at `losses`; `lost` is charged as certain loss."""

    losses: _Floats
    mass: _Floats
    lost: float


def _loss(q: float, sigma: float, x: _Floats | float) -> _Floats:
    """ln((1−q) + q·e^((x−½)/σ²)) of the output x: the loss of removing a record; adding has its negative."""
    exponent = (np.asarray(x) - 0.5) / sigma**2
    if q == 1.0:
        return exponent
    # As ln(1 + q·(e^t − 1)) where that keeps the digits of a small q.
    with np.errstate(over="ignore"):
        return np.where(
            exponent < 1, np.log1p(q * np.expm1(exponent)), np.logaddexp(math.log1p(-q), math.log(q) + exponent)
        )


def _output(q: float, sigma: float, loss: _Floats) -> _Floats:
    """Inverse of `_loss`; −∞ for losses below its least, ln(1−q)."""
    if q == 1.0:
        return sigma**2 * loss + 0.5
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = np.log1p(np.maximum(np.expm1(loss) / q, -1.0))
    return sigma**2 * ratio + 0.5


def _between(edges: _Floats) -> tuple[_Floats, _Floats]:
    """Standard normal mass between neighbouring edges, without cancellation in either tail; and by how much it errs."""
    below, above = ndtr(edges), ndtr(-edges)
    mass = np.where(edges[:-1] > 0, above[:-1] - above[1:], below[1:] - below[:-1])
    return mass, 4e-16 * np.minimum(above[:-1], below[1:])


def _dots(q: float, sigma: float, add: bool, losses: _Floats, outputs: _Floats) -> _Mass:
    """Connect the dots at the given increasing losses, which lie at the given outputs (decreasing for add)."""
    rising = outputs[::-1] if add else outputs
    (nothing, error), (joined, joined_error) = _between(rising / sigma), _between((rising - 1) / sigma)
    error = error + joined_error
    if add:
        nothing, joined, error = nothing[::-1], joined[::-1], error[::-1]
        growth = np.exp(losses[:-1])
        mass, excess = nothing, q * growth * (nothing - joined)
        lower, upper = ndtr(-outputs[0] / sigma), ndtr(outputs[-1] / sigma)
    else:
        growth = np.ones(len(losses) - 1)
        mass, excess = (1 - q) * nothing + q * joined, q * (joined - nothing)
        lower = (1 - q) * ndtr(outputs[0] / sigma) + q * ndtr((outputs[0] - 1) / sigma)
        upper = (1 - q) * ndtr(-outputs[-1] / sigma) + q * ndtr((1 - outputs[-1]) / sigma)
    # dP − e^l·dQ with l the lower end; this over 1 − e^−width is what moves to the upper end. Rounded up.
    fall = -np.expm1(losses[:-1])
    error = 1e-14 * (np.abs(fall) * nothing + q * growth * (nothing + joined)) + (np.abs(fall) + q * growth) * error
    moved = np.clip((fall * nothing + excess + error) / -np.expm1(losses[:-1] - losses[1:]), 0.0, mass)
    result = np.zeros(len(losses))
    result[:-1] = mass - moved
    result[1:] += moved
    result[0] += lower
    return _Mass(losses, result, float(upper))


def _ends(q: float, sigma: float, add: bool, reach: float) -> tuple[float, float]:
    """Outputs of the least and the greatest loss that are looked at, `reach` standard deviations of noise away."""
    return (reach * sigma, -reach * sigma) if add else (-reach * sigma, 1 + reach * sigma)


def _scan(q: float, sigma: float, add: bool, reach: float, size: int) -> _Mass:
    """One step on `size` losses spaced as its outputs are: for Rényi divergences, not for composing."""
    outputs = np.linspace(*_ends(q, sigma, add, reach), size)
    losses = np.asarray(-_loss(q, sigma, outputs) if add else _loss(q, sigma, outputs))
    rising = np.concatenate([[True], np.diff(np.maximum.accumulate(losses)) > 0])
    return _dots(q, sigma, add, losses[rising], outputs[rising])


def _lattice(q: float, sigma: float, add: bool, reach: float, interval: float) -> tuple[int, _Mass]:
    """One step on multiples of the interval, and the first multiple."""
    low, high = (float(_loss(q, sigma, x)) * (-1 if add else 1) for x in _ends(q, sigma, add, reach))
    first, last = math.floor(low / interval), math.floor(high / interval) + 1
    losses = np.arange(first, last + 1, dtype=np.float64) * interval
    return first, _dots(q, sigma, add, losses, _output(q, sigma, -losses if add else losses))


def _log_moments(step: _Mass, thetas: _Floats) -> _Floats:
    """ln E_P[e^{θL}] for each θ, without what is lost."""
    some = step.mass > 0
    exponents = np.log(step.mass[some]) + thetas[:, None] * step.losses[some]
    top = exponents.max(axis=1)
    return np.asarray(top + np.log(np.exp(exponents - top[:, None]).sum(axis=1)))


# --------------------------------------------------------------------------------------------------------- composition


def _compose(history: History, delta: float) -> _Direction:
    """The worse direction, refined as far as it will go; the other need only be seen to be less."""
    reach = float(-ndtri(_LOST * delta / sum(history.values())))
    directions = [_Direction(history, delta, add, reach) for add in (False, True)]
    while True:
        worst = max(directions, key=lambda d: d.epsilon)
        if not worst.refine():
            return worst


class _Direction:
    """Adding, or removing, one record: an upper bound of its ε that `refine` lowers."""

    def __init__(self, history: History, delta: float, add: bool, reach: float) -> None:
        self._history, self._delta, self._add, self._reach = history, delta, add, reach
        self.step = math.inf
        self._limit = min(_MAX_POINTS, _MAX_WORK // len(history))
        counts = np.array(list(history.values()), dtype=np.float64)
        size = max(256, min(4096, 2**18 // len(history)))
        steps = [_scan(q, sigma, add, reach, size) for q, sigma in history]
        thetas = np.geomspace(1e-6, 4096, max(60, min(240, 2**13 // len(history))))
        log_moments = np.array([_log_moments(step, thetas) for step in steps])
        total = counts @ log_moments
        left = delta - float(counts @ [step.lost for step in steps])
        alphas = thetas + 1
        bounds = total / thetas + np.log(thetas / alphas) - np.log(left * alphas) / thetas
        best = int(bounds.argmin())
        self._theta = float(thetas[best])
        rounding = 1e-15 * float(counts.sum()) * self._size(steps) / self._theta
        self.epsilon = self._bound = max(0.0, float(bounds[best]) + rounding)
        spreads = []  # variance of each kind's tilted loss
        for step, k in zip(steps, log_moments[:, best], strict=True):
            tilted = step.mass * np.exp(self._theta * step.losses - k)
            spreads.append(float(tilted @ (step.losses - float(tilted @ step.losses)) ** 2))
        deviation = math.sqrt(float(counts @ spreads))
        self._interval = min(2 * deviation / _FIRST_POINTS, 1.0)
        # On the finest grid there can be, discretising moves the mean of one step by about this: if that is more in
        # all than what the Rényi bound gives away, there is no point in trying.
        finest = 16 * deviation / self._limit
        moved = float(counts @ np.minimum(finest**2 / 8, 0.4 * finest * np.sqrt(spreads)))
        self._hopeless = not moved < 0.5 * deviation
        self._found = math.inf

    def above(self, history: History) -> float:
        """By how much the Rényi bound of this order is above that of a history of which this is a rounding up."""
        if all(self._history.get(kind) == steps for kind, steps in history.items() if kind[0] < 1.0):
            return 0.0
        theta, mine, less = np.array([self._theta]), 0.0, 0.0
        for (q, sigma), steps in self._history.items():
            mine += steps * float(_log_moments(_scan(q, sigma, self._add, self._reach, 1024), theta)[0])
        for (q, sigma), steps in history.items():
            if q < 1.0:
                less += steps * float(_log_moments(_scan(q, sigma, self._add, self._reach, 1024), theta)[0])
            else:
                less += steps * self._theta * (self._theta + 1) / (2 * sigma**2)
        return max(0.0, (mine - less) / self._theta)

    @staticmethod
    def _size(steps: Sequence[_Mass]) -> float:
        return 1.0 + max(float(np.abs(step.losses).max()) for step in steps)

    def refine(self) -> bool:
        """Halve the interval, until ε no longer moves or the grid gets too large; whether there was anything to do."""
        if self._hopeless or self.epsilon <= _TOLERANCE or self.step <= _TOLERANCE * max(1.0, self.epsilon):
            return False
        self._interval /= 2
        found = self._at(self._interval)
        if found is None:
            return False
        if found < math.inf:
            self.step = abs(self._found - found) if self._found < math.inf else math.inf
        self._found = min(found, self._found)
        self.epsilon = min(self._found, self._bound)
        if self.epsilon == self._bound:
            self.step = math.inf
        return True

    def _at(self, interval: float) -> float | None:
        """ε with the losses on multiples of the interval; None if they are too many."""
        theta, limit = self._theta, self._limit
        lost = log_moment = moved = 0.0
        origin = stored = 0
        steps: list[tuple[_Tilted, NDArray[np.float64] | None]] = []
        blocks: list[_Blocks] = []
        for kind, n in self._history.items():
            low, high = (float(_loss(*kind, x)) for x in _ends(*kind, False, self._reach))
            if (high - low) / interval > limit:
                return None
            one = self._tilted(kind, interval)
            lost += n * one.lost
            log_moment += n * one.log_moment
            moved += n * one.moved
            origin += n * (one.first + one.top)  # the sum's grid point if every step has its most probable loss
            blocks.append(_blocks(n, one.top, one.mass))
            stored += len(one.mass)
            steps.append((one, one.mass) if stored <= _MAX_STORED else (one._replace(mass=np.empty(0)), None))
        window = _window(blocks)
        if window is None or window[1] - window[0] >= limit:
            return None
        start = window[0]
        size = int(fft.next_fast_len(window[1] - start + 1, real=True))
        logs, angles = np.zeros(size // 2 + 1), np.zeros(size // 2 + 1)
        for (kind, n), (one, mass) in zip(self._history.items(), steps, strict=True):
            if mass is None:
                mass = self._tilted(kind, interval).mass
            change = np.bincount((np.arange(len(mass)) - one.top) % size, weights=mass, minlength=size)
            # The transform is 1 + that of the change, so that small probabilities keep their digits.
            change[0] = 0.0
            change[0] = -change.sum()
            changed = fft.rfft(change)
            a, b = changed.real, changed.imag
            with np.errstate(divide="ignore"):
                logs += n * 0.5 * np.log1p(np.maximum(a * (2 + a) + b * b, -1.0))
            angles += n * np.arctan2(b, 1 + a)
        composed = np.roll(fft.irfft(np.exp(logs) * np.exp(1j * angles), size), -start)
        # What lies outside wraps around; and an FFT errs by some 10⁻¹⁶ of its input's norm, n times for n steps.
        error = 2 * _OUTSIDE + 8 * 2.3e-16 * math.log2(size) * math.sqrt(size) * (1.0 + moved)
        losses = (origin + start) * interval + np.arange(size, dtype=np.float64) * interval
        return _solve(losses, np.maximum(composed, 0.0), theta, log_moment, error, self._delta - lost)

    def _tilted(self, kind: tuple[float, float], interval: float) -> _Tilted:
        theta = self._theta
        first, step = _lattice(*kind, self._add, self._reach, interval)
        log_moment = float(_log_moments(step, np.array([theta]))[0])
        some = step.mass > 0
        mass = np.zeros(len(step.mass))
        mass[some] = np.exp(np.log(step.mass[some]) + theta * step.losses[some] - log_moment)
        top = int(mass.argmax())
        mass[top] = 0.0
        moved = float(mass.sum())
        mass[top] = max(0.0, 1.0 - moved)
        log_moment += 1e-15 * (1 + theta * float(np.abs(step.losses).max()))
        return _Tilted(first, top, mass, moved, step.lost, log_moment)


class _Tilted(NamedTuple):
    first: int  # grid point of mass[0]
    top: int  # index of the most probable loss
    mass: _Floats  # tilted; sums to 1
    moved: float  # mass elsewhere than at top
    lost: float  # not tilted; charged as certain loss
    log_moment: float  # K(θ), rounded up


class _Blocks(NamedTuple):
    steps: int
    ends: _Floats  # grid points relative to the most probable one
    mass: _Floats
    variance: float


def _blocks(steps: int, top: int, mass: _Floats) -> _Blocks:
    """A step's tilted losses on fewer points, which only increases E[e^{tL}], for every t.

    The cells are taken together in blocks that grow with the distance from the most probable one; a block's mass is
    moved to its ends with its mean kept.
    """
    out = np.unique(np.geomspace(1, max(len(mass), 2), 200).round()).astype(np.int64)
    edges = np.unique(np.clip(np.concatenate([top - out, [top], top + out]), 0, len(mass) - 1))
    ends = edges - float(top)
    # Each block is [edge, next edge); the last edge stands alone.
    total = np.add.reduceat(mass, edges)
    first = np.add.reduceat(mass * (np.arange(len(mass)) - float(top)), edges)
    up = np.clip((first - total * ends) / np.append(np.diff(ends), 1.0), 0.0, total)
    up[-1] = 0.0
    split = total - up
    split[1:] += up[:-1]
    return _Blocks(steps, ends, split, float(split @ (ends - float(split @ ends)) ** 2))


def _window(kinds: Sequence[_Blocks]) -> tuple[int, int] | None:
    """Grid points, relative to the most probable ones' sum, below and above which there is at most `_OUTSIDE`.

    Chernoff: P(S ≥ s) ≤ E[e^{tS}]·e^{−ts}. None where numbers get too large.
    """
    variance = math.fsum(kind.steps * kind.variance for kind in kinds)
    if not 0.0 < variance < math.inf:
        return None
    rates = 2.0 ** np.arange(-6, 7, 0.5) / math.sqrt(variance)
    above, below = np.full((2, len(rates)), -math.log(_OUTSIDE))
    with np.errstate(over="ignore", invalid="ignore"):
        for kind in kinds:
            above += kind.steps * np.log1p(np.expm1(np.outer(rates, kind.ends)) @ kind.mass)
            below += kind.steps * np.log1p(np.expm1(np.outer(-rates, kind.ends)) @ kind.mass)
        high = float(np.min(np.nan_to_num(above, nan=math.inf) / rates))
        low = -float(np.min(np.nan_to_num(below, nan=math.inf) / rates))
    if not -1e15 < low <= high < 1e15:
        return None
    least = sum(kind.steps * int(kind.ends[0]) for kind in kinds)
    greatest = sum(kind.steps * int(kind.ends[-1]) for kind in kinds)
    return max(least, math.floor(low)), min(greatest, math.ceil(high))


def _solve(losses: _Floats, mass: _Floats, theta: float, log_moment: float, error: float, delta: float) -> float:
    """Least ε with e^{K − θε}·(E_θ[…] + error·w) ≤ δ, to 10⁻⁸ of itself, rounded up."""
    worst = _weight(theta)

    def excess(epsilon: float) -> float:
        start, stop = np.searchsorted(losses, (epsilon, epsilon + 60 / theta))
        beyond = losses[start:stop] - epsilon  # past the end the weight is below e⁻⁶⁰
        expected = float(mass[start:stop] @ (np.exp(-theta * beyond) * -np.expm1(-beyond))) + error * worst + 1e-26
        return log_moment - theta * epsilon + math.log(expected / delta)

    if excess(0.0) <= 0.0:
        return 0.0
    # The Rényi bound, which cannot be exceeded.
    high = (log_moment + math.log((worst * (float(mass.sum()) + error) + 1e-26) / delta)) / theta * (1 + 1e-12)
    margin = 1e-9 * high
    return float(brentq(excess, 0.0, high, xtol=margin)) + 2 * margin


def _weight(theta: float) -> float:
    """max over y ≥ 0 of e^{−θy}·(1 − e^{−y})."""
    return math.exp(theta * math.log(theta) - (theta + 1) * math.log1p(theta))
