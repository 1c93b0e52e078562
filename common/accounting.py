"""Privacy accounting: events -> the filter that decides, the odometer that reports, calibration.

What is bounded, everywhere in this module: (ε, δ)-DP of one dataset's whole history under add-or-remove-one adjacency,
at the unit (record or client) whose contribution to a step has L2 norm at most C. A *history* is any collection of
`PrivacyEvent`; its order does not matter.

* `Budget` is a privacy **filter**: it stays valid when every next event is chosen by someone who has seen all results
  so far. It calibrates, plans and caps.
* `odometer` is the tight numerical ε of a history taken as fixed. It is shown beside the cap and never decides:
  a PLD over an adaptively chosen history is not a valid filter.

| edge case | answer |
| --- | --- |
| no events | spent 0.0, odometer 0.0 |
| q = 1 | exact Gaussian composition in both |
| σ < 0.3 | Refused before anything is computed |
| σ above 10⁹ | charged as σ = 10⁹ (dearer, never cheaper) |
| too many kinds or steps for a tight odometer | rounded up, or a Rényi bound; the reading says so |
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, pairwise, product

import numpy as np
from numpy.typing import NDArray

from .curves import gaussian_epsilon, gaussian_log_delta, renyi_epsilon, renyi_offset, renyi_step
from .errors import ConfigError, LedgerError, Refusal, Refused
from .privacy_loss import Reading, read

__all__ = ["MAX_STEPS", "MIN_NOISE_MULTIPLIER", "Budget", "PrivacyEvent", "Reading", "odometer", "odometer_reading"]

MIN_NOISE_MULTIPLIER = 0.3
"""Smaller noise multipliers are refused before accounting at all."""

MAX_STEPS = 10**9
"""More steps are no event."""

_MECHANISM = "poisson-gaussian/1"
_MAX_SIGMA = 1e9  # more noise is charged as this much, so that 1/σ² cannot vanish in a float
_MIN_RATE = 1e-30  # less is charged as this much: far below it a sum of 4,096 orders loses more than its slack
_MAX_ORDER = 4096


@dataclass(frozen=True)
class PrivacyEvent:
    """`steps` Poisson-subsampled Gaussian steps on one dataset.

    In each step every record joins independently with probability q, and N(0, (σC)²) is added to every coordinate of
    a sum whose L2 sensitivity to one record is C. C itself does not matter to the accounting.

    Args:
        sampling_rate: q in (0, 1]; 1 means that every record joins every step.
        noise_multiplier: σ, standard deviation of the noise divided by C; finite, at least 0.3.
        steps: number of such steps, 1 to 10⁹.

    Raises:
        Refused: `Refusal.NOISE`, σ below 0.3.
        ConfigError: anything else out of range.
    """

    sampling_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        for name in ("sampling_rate", "noise_multiplier"):
            object.__setattr__(self, name, _real(getattr(self, name), name))
        if not 0.0 < self.sampling_rate <= 1.0:
            raise ConfigError(
                f"sampling rate {self.sampling_rate!r} is not in (0, 1]",
                "It is the probability with which a record joins a step; 1 takes every record.",
            )
        if self.noise_multiplier < MIN_NOISE_MULTIPLIER:
            raise Refused(
                Refusal.NOISE,
                f"σ = {self.noise_multiplier!r}",
                "Take a noise multiplier of at least 0.3; less protects nobody, whatever ε says.",
            )
        if type(self.steps) is not int or not 1 <= self.steps <= MAX_STEPS:
            raise ConfigError(
                f"steps {self.steps!r} is not a whole number from 1 to 10^9",
                "Count optimiser steps (rounds x local steps), not epochs.",
            )

    def to_fields(self) -> dict[str, str | int]:
        """The event as ledger fields; reals as decimal strings that read back to the same float."""
        return {
            "mechanism": _MECHANISM,
            "q": repr(self.sampling_rate),
            "sigma": repr(self.noise_multiplier),
            "steps": self.steps,
        }

    @classmethod
    def from_fields(cls, fields: Mapping[str, object]) -> PrivacyEvent:
        """Inverse of `to_fields`.

        Raises:
            LedgerError: unknown mechanism or version, missing or extra keys, non-canonical numbers, values out of
                range.
        """
        check_keys(fields, {"mechanism", "q", "sigma", "steps"}, "privacy event")
        if fields["mechanism"] != _MECHANISM:
            raise LedgerError(
                f"privacy event of an unknown mechanism {fields['mechanism']!r}",
                f"This version accounts for {_MECHANISM} only; a newer hansa may know it.",
            )
        steps = fields["steps"]
        if type(steps) is not int:
            raise LedgerError(f"privacy event: steps is {steps!r}, not a whole number", _EDITED)
        try:
            return cls(decimal_of(fields["q"], "q"), decimal_of(fields["sigma"], "sigma"), steps)
        except (ConfigError, Refused) as error:
            raise LedgerError(f"privacy event: {error.message}", _EDITED) from error


@dataclass(frozen=True)
class Budget:
    """A privacy filter, fixed when a dataset's budget is created.

    A history is admitted while **any** of these branches holds for the whole of it (spent, held and asked):

    * Rényi branch (α, δ_α):  Σ ρ(α) ≤ ε − ln(1 − 1/α) + ln(δ_α·α)/(α − 1),  with ρ(α) the Rényi divergence of one
      step (Mironov, Talwar & Zhang 1908.10530, Sec. 3.3) and the conversion of Canonne, Kamath & Steinke 2004.00010,
      Prop. 12.
    * Gaussian branch: μ² = Σ steps/σ², admitted while δ(ε; μ) ≤ gaussian_delta, with δ(ε; μ) the exact curve of the
      Gaussian mechanism (Balle & Wang 1805.06530, Thm 8). A subsampled step pays its unsampled price here; no
      central-limit approximation is ever made.

    Formal guarantee: everything that is released from one dataset, as long as every history extended by the next event
    was admitted before that event's data was read, is (ε, δ)-DP under add-or-remove-one adjacency, also when the
    events are chosen adaptively (sampling rate, noise and number of steps, and whether to go on, may depend on every
    earlier result). It assumes real Poisson sampling, noise drawn as declared, and a sum whose sensitivity is C.

    Why, branch by branch. *Rényi*: at a fixed order α, stopping before Σ ρ(α) would pass a fixed cap gives (α, cap)-RDP
    (Feldman & Zrnic 2008.11193, Thm 3.1; Lécuyer 2103.01379, Thm 1). *Gaussian*: stopping before Σ μ_i² would pass μ²
    gives μ-GDP, so no price is paid for adaptivity (Smith & Thakurta 2210.17520; Koskela, Tobaben & Honkela
    2209.15596). A Poisson step belongs there too: with P = (1−p)·N(0, σ²) + p·N(1, σ²) against N(0, σ²), joint
    convexity of hockey-stick divergences, in both directions, makes it no more distinguishable than N(1, σ²) (that is,
    p·G_μ + (1−p)·Id ≥ G_μ), so it is 1/σ-GDP.

    *Any of several branches*: let E_b be the transcripts at whose end b is the first branch (in a fixed order) not yet
    overdrawn; an admitted history leaves at least one, so the E_b partition the transcripts. Prices are non-negative,
    so on E_b branch b was never overdrawn, and there the process has the same density as the one that b alone would
    have stopped. That one is (ε, δ_b)-DP, hence P(S) = Σ_b P_b(S ∩ E_b) ≤ Σ_b [e^ε Q_b(S ∩ E_b) + δ_b] ≤ e^ε Q(S) + δ.

    *Direction*: ρ(α) is D_α(P‖N(0, σ²)), which is at least D_α(N(0, σ²)‖P) (1908.10530, Thm 5), so it bounds
    both adding and removing.

    Args:
        epsilon: the cap, positive and finite.
        delta: in (0, 1).
        orders: 3 to 5 pairs (α, δ_α), α strictly increasing integers from 2 to 4096, δ_α > 0.
        gaussian_delta: the Gaussian branch's share, > 0. All shares together are at most delta.

    Raises:
        ConfigError: any of them out of range.
    """

    epsilon: float
    delta: float
    orders: tuple[tuple[int, float], ...]
    gaussian_delta: float

    def __post_init__(self) -> None:
        for name in ("epsilon", "delta", "gaussian_delta"):
            object.__setattr__(self, name, _real(getattr(self, name), name))
        _check_epsilon(self.epsilon)
        _check_delta(self.delta)
        alphas = [alpha for alpha, _ in self.orders]
        shares = [*(_real(share, "share") for _, share in self.orders), self.gaussian_delta]
        if (
            not 3 <= len(alphas) <= 5
            or any(type(alpha) is not int or not 2 <= alpha <= _MAX_ORDER for alpha in alphas)
            or any(low >= high for low, high in pairwise(alphas))
        ):
            raise ConfigError(
                f"orders {alphas} are not 3 to 5 increasing whole numbers from 2 to {_MAX_ORDER}",
                "Let Budget.create choose them.",
            )
        # In exact arithmetic: a rounded sum may hide a share too many.
        if min(shares) <= 0.0 or sum(map(Fraction, shares)) > Fraction(self.delta):
            raise ConfigError(
                f"the shares of delta {shares} are not positive or sum to more than {self.delta!r}",
                "Let Budget.create choose them.",
            )

    @classmethod
    def create(cls, epsilon: float, delta: float, plan: tuple[float, int] | None = None) -> Budget:
        """The filter for a cap of (ε, δ), its branches' shares of δ chosen for common histories.

        At ε = 0.5, 1, 2, 8, δ = 1e-5 and 1e-4, q = 0.01, 0.1, 1 and 100 to 10,000 steps it admits at least 85 % of
        exact composition (unsampled steps) and 80 % of one best Rényi order with all of δ (tests/bench), except for
        so few and so loud sampled steps (q = 0.01, 100 steps, ε ≤ 2) that their order needs δ nearly for itself.

        Args:
            epsilon: the cap, positive and finite.
            delta: in (0, 1).
            plan: (sampling rate, steps) that the budget will mostly be spent on. Given, such a plan is admitted at
                80 % too; where that takes a share of δ of its own, other kinds get less. Whatever is planned, the
                filter is valid for every history.

        Raises:
            ConfigError: ε not positive and finite, δ not in (0, 1), a plan out of range.
        """
        epsilon, delta = _check_epsilon(epsilon), _check_delta(delta)
        if plan is not None:
            event = PrivacyEvent(plan[0], 1.0, plan[1])  # checks both
            plan = event.sampling_rate, event.steps
        orders, gaussian_delta = _choose(epsilon, delta, plan)
        return cls(epsilon, delta, orders, gaussian_delta)

    def to_fields(self) -> dict[str, object]:
        """The filter as ledger fields; reals as decimal strings that read back to the same float."""
        return {
            "epsilon": repr(self.epsilon),
            "delta": repr(self.delta),
            "orders": [[alpha, repr(share)] for alpha, share in self.orders],
            "gaussian_delta": repr(self.gaussian_delta),
        }

    @classmethod
    def from_fields(cls, fields: Mapping[str, object]) -> Budget:
        """Inverse of `to_fields`.

        Raises:
            LedgerError: missing or extra keys, non-canonical numbers, values out of range, shares that sum to more
                than delta.
        """
        check_keys(fields, {"epsilon", "delta", "orders", "gaussian_delta"}, "budget")
        orders = fields["orders"]
        if not isinstance(orders, list) or not all(isinstance(o, list) and len(o) == 2 for o in orders):
            raise LedgerError(f"budget: orders {orders!r} is not a list of pairs", _EDITED)
        try:
            return cls(
                decimal_of(fields["epsilon"], "epsilon"),
                decimal_of(fields["delta"], "delta"),
                tuple((alpha, decimal_of(share, "share of delta")) for alpha, share in orders),
                decimal_of(fields["gaussian_delta"], "gaussian_delta"),
            )
        except ConfigError as error:
            raise LedgerError(f"budget: {error.message}", _EDITED) from error

    def admits(self, events: Iterable[PrivacyEvent]) -> bool:
        """Whether the whole history (spent + held + asked) stays within the cap; exactly `spent(events) <= epsilon`."""
        return self.spent(events) <= self.epsilon

    def spent(self, events: Iterable[PrivacyEvent]) -> float:
        """The smallest ε' at which this filter, with the same orders and shares, would admit the history.

        0.0 for no events. Never falls when events are added; depends on neither their order nor how steps are split
        into events. Rounded up: float errors count against the history.
        """
        history = _merge(events)
        if not history:
            return 0.0
        branches = [renyi_epsilon(_total(history, alpha), alpha, share) for alpha, share in self.orders]
        # Next point of a grid of 2⁻²⁰ in ln μ²: its neighbours' ε differ by far more than the root finder errs, so ε
        # is monotone to the last bit.
        mu_squared = math.exp(math.ceil(math.log(_mu_squared(history)) * 2**20) / 2**20)
        return min(*branches, gaussian_epsilon(mu_squared, self.gaussian_delta))

    def calibrate(self, sampling_rate: float, steps: int, spent: Iterable[PrivacyEvent] = ()) -> float:
        """The smallest noise multiplier at which `steps` more steps are admitted after `spent`.

        Searched among the numbers of four significant digits from 0.3 to 10⁴; the one returned was itself admitted.

        Raises:
            Refused: `Refusal.BUDGET` when not even σ = 10⁴ is admitted.
            ConfigError: sampling rate or steps out of range.
        """
        before = list(spent)

        def admitted(index: int) -> bool:
            return self.admits([*before, PrivacyEvent(sampling_rate, _four_digits(index), steps)])

        low, high = _FOUR_DIGITS_LOW - 1, _FOUR_DIGITS_HIGH  # low is refused (or too little), high admitted
        if not admitted(high):
            raise Refused(
                Refusal.BUDGET,
                f"{steps} steps at sampling rate {sampling_rate:g} do not fit into ε = {self.epsilon:g} "
                f"(δ = {self.delta:g}, {self.spent(before):.4g} already spent), whatever the noise",
                "Plan fewer steps or a smaller sampling rate, or agree on a larger ε.",
            )
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if admitted(middle) else (middle, high)
        return _four_digits(high)

    def most_steps(self, sampling_rate: float, noise_multiplier: float, spent: Iterable[PrivacyEvent] = ()) -> int:
        """How many such steps still fit after `spent`; 0 if none, at most 10⁹.

        Raises:
            Refused, ConfigError: as `PrivacyEvent`.
        """
        before = list(spent)

        def admitted(steps: int) -> bool:
            return self.admits([*before, PrivacyEvent(sampling_rate, noise_multiplier, steps)])

        low, high = 0, MAX_STEPS + 1  # low fits, high does not, or is no event
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if admitted(middle) else (low, middle)
        return low


def odometer(events: Iterable[PrivacyEvent], delta: float) -> float:
    """The tight ε of a history, for reports: `odometer_reading` without its particulars."""
    return odometer_reading(events, delta).epsilon


def odometer_reading(events: Iterable[PrivacyEvent], delta: float) -> Reading:
    """The tight ε of a history, for reports: never below the truth, and how it was found.

    q = 1 throughout: the exact curve of the Gaussian mechanism. Otherwise privacy loss distributions, discretised
    pessimistically and composed by FFT, the larger of adding and removing a record (privacy_loss.py: the method, its
    sources and why each rounding is on the safe side).

    Formal guarantee: the mechanisms of the history, run non-adaptively, are (ε, δ)-DP under add-or-remove-one
    adjacency for the returned ε. For a history whose events were chosen adaptively it is a report, not a bound.

    Within 10⁻³·max(1, ε) of the truth for histories of up to 50 kinds and 10⁶ steps (measured against an oracle in
    tests/statistical). Beyond, the reading says what rounding and discretising still cost, or that it is only a Rényi
    bound.

    Args:
        events: the history, in any order.
        delta: in (0, 1).

    Returns:
        ε ≥ 0, never NaN; 0.0 for no events.

    Raises:
        ConfigError: delta out of range.
    """
    return read(_merge(events), _check_delta(delta))


def _merge(events: Iterable[PrivacyEvent]) -> Counter[tuple[float, float]]:
    """(q, σ) -> steps, in a fixed order."""
    history: Counter[tuple[float, float]] = Counter()
    for event in events:
        history[max(event.sampling_rate, _MIN_RATE), min(event.noise_multiplier, _MAX_SIGMA)] += event.steps
    return Counter(dict(sorted(history.items())))


def _mu_squared(history: Mapping[tuple[float, float], int]) -> float:
    return math.fsum(steps / sigma**2 for (_, sigma), steps in history.items())


def _total(history: Mapping[tuple[float, float], int], alpha: int) -> float:
    """Σ ρ(α); fsum rounds once, so the sum depends on no order and never falls."""
    return math.fsum(steps * renyi_step(q, sigma, alpha) for (q, sigma), steps in history.items())


_SAMPLED = (
    (0.01, 1000),
    (0.01, 10_000),
    (0.1, 100),
    (0.1, 1000),
    (0.1, 10_000),
)  # (q, steps) that create() provides for
_SHORT = ((0.01, 100), (0.01, 300))  # and those for which it does what is left to do
_RENYI_AIM, _GAUSSIAN_AIM = 0.825, 0.865  # of one best order, of exact composition; a little above what is promised


def _choose(
    epsilon: float, delta: float, plan: tuple[float, int] | None
) -> tuple[tuple[tuple[int, float], ...], float]:
    """(orders with their δ, the Gaussian branch's δ).

    The Gaussian branch gets the least share with which it admits `_GAUSSIAN_AIM` of what all of δ would, three orders
    the rest. A plan for which that is not enough gets an order of its own with the share it needs; the Gaussian
    branch, up to half, and two orders share what is left.
    What it costs: tests/bench/test_accounting.py prints the table.
    """
    epsilon = min(max(epsilon, 1e-3), 300.0)  # beyond, any choice is as good as another
    best = max(_grid(2, _MAX_ORDER, 400), key=lambda alpha: _room(epsilon, alpha, delta) / alpha)
    gaussian = _gaussian_share(epsilon, delta)
    orders = _split(epsilon, delta, 1 - gaussian, _near(best, set()), 3)
    if plan is not None and plan[0] < 1.0 and delta > 1e-300:  # less has no parts in a float
        every = sorted({*_grid(2, min(max(2 * best, 6), _MAX_ORDER), 60), *orders})
        needs = _needs(*plan, epsilon, delta, every)
        shared = {alpha: _room(epsilon, alpha, delta * share) for alpha, share in orders.items()}
        if not any(shared.get(a, 0.0) >= _RENYI_AIM * n for a, n in zip(every, needs, strict=True)):
            logs = [
                (_RENYI_AIM * n - epsilon - renyi_offset(a, delta)) * (a - 1) for a, n in zip(every, needs, strict=True)
            ]
            own = min(_thousandths(math.exp(min(logs))), 0.95)
            alpha = every[logs.index(min(logs))]
            gaussian = min(gaussian, (1 - own) / 2)
            orders = _split(epsilon, delta, 1 - own - gaussian, _near(best, {alpha}), 2) | {alpha: own}
    # Rounded down, so that the shares cannot sum to more than δ.
    delta *= 1 - 1e-12
    return tuple((alpha, delta * share) for alpha, share in sorted(orders.items())), delta * gaussian


def _near(best: int, without: set[int]) -> list[int]:
    """Orders near the best for much noise (ρ(α) ∝ α): less δ wants a larger one, less noise a smaller one."""
    low, high = max(2, round(0.5 * best)), min(max(round(1.4 * best), 6), _MAX_ORDER)
    return [alpha for alpha in _grid(low, high, 14) if alpha not in without]


def _split(epsilon: float, delta: float, share: float, candidates: Sequence[int], count: int) -> dict[int, float]:
    """`count` of the candidates and their parts of `share`.

    Those with which the worst of `_SAMPLED` gets up to `_RENYI_AIM` of the steps that one best order with all of δ
    admits, and then the sum over all kinds is largest.
    """
    needs = np.array([_needs(q, steps, epsilon, delta, candidates) for q, steps in (*_SAMPLED, *_SHORT)])
    sixteenths = range(1, 17)
    reached = np.array(  # (part, order, kind)
        [
            [_room(epsilon, a, delta * share * part / 16) / needs[:, i] for i, a in enumerate(candidates)]
            for part in sixteenths
        ]
    )
    chosen = np.array(list(combinations(range(len(candidates)), count)))
    parts = np.array([p for p in product(sixteenths, repeat=count) if sum(p) == 16])
    # (parts, chosen, kind): the most steps that one of the orders admits
    most = np.max([reached[parts[:, k, None] - 1, chosen[None, :, k]] for k in range(count)], axis=0)
    worst = most[:, :, : len(_SAMPLED)].min(axis=2)
    score = 100 * np.minimum(worst, _RENYI_AIM) + np.minimum(most, 1.0).sum(axis=2)
    row, column = np.unravel_index(int(score.round(6).argmax()), score.shape)
    return {candidates[i]: share * float(part) / 16 for i, part in zip(chosen[column], parts[row], strict=True)}


def _grid(low: int, high: int, size: int) -> list[int]:
    return sorted({round(a) for a in np.geomspace(low, high, size)} | set(range(low, min(high, low + 4) + 1)))


def _room(epsilon: float, alpha: int, delta: float) -> float:
    """What Σ ρ(α) may reach."""
    return max(0.0, epsilon + renyi_offset(alpha, delta))


def _needs(q: float, steps: int, epsilon: float, delta: float, alphas: Sequence[int]) -> NDArray[np.float64]:
    """`steps` times ρ(α), at the least σ for which one of these orders, with all of δ, admits so many."""
    room = np.array([_room(epsilon, a, delta) for a in alphas])

    def price(log_sigma: float) -> NDArray[np.float64]:
        return steps * np.array([renyi_step(q, math.exp(log_sigma), a) for a in alphas])

    low, high = math.log(MIN_NOISE_MULTIPLIER), math.log(1e4)
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if np.any(room >= price(middle)) else (middle, high)
    return price(high)


def _gaussian_share(epsilon: float, delta: float) -> float:
    """The least share of δ with which the Gaussian branch admits `_GAUSSIAN_AIM` of the μ² that all of δ would."""
    low, high = 1e-6, 1e3
    while high / low > 1 + 1e-9:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if gaussian_log_delta(epsilon, middle) > math.log(delta) else (middle, high)
    share = math.exp(gaussian_log_delta(epsilon, math.sqrt(_GAUSSIAN_AIM) * low) - math.log(delta))
    return min(max(_thousandths(share), 0.01), 0.5)


def _thousandths(share: float) -> float:
    """Rounded up: whoever creates the same budget, on whatever machine, gets the same shares."""
    return math.ceil(share * 1000 - 1e-6) / 1000


_FOUR_DIGITS_LOW = 2000  # 0.3000
_FOUR_DIGITS_HIGH = 9000 * 5  # 10000


def _four_digits(index: int) -> float:
    """The index-th number of four significant digits, counted from 0.1000."""
    exponent, mantissa = divmod(index, 9000)
    return float(f"{1000 + mantissa}e{exponent - 4}")


_EDITED = "The ledger was edited, or written by something else; do not rely on it."


def _real(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{name} {value!r} is not a finite number", "Give a plain decimal number.")
    return float(value)


def _check_epsilon(epsilon: float) -> float:
    epsilon = _real(epsilon, "epsilon")
    if not epsilon > 0.0:
        raise ConfigError(f"epsilon {epsilon!r} is not positive", "Common caps are 0.5 to 8.")
    return epsilon


def _check_delta(delta: float) -> float:
    delta = _real(delta, "delta")
    if not 0.0 < delta < 1.0:
        raise ConfigError(f"delta {delta!r} is not between 0 and 1", "It must be well below 1/n, for example 1e-5.")
    return delta


def decimal_of(value: object, name: str) -> float:
    """A ledger's real, as `repr` writes it: one spelling for one value.

    Raises:
        LedgerError: written otherwise, or no real.
    """
    try:
        if isinstance(value, str) and repr(number := float(value)) == value:
            return number
    except ValueError:
        pass
    raise LedgerError(f"{name} is {value!r}, not a canonical decimal string", _EDITED)


def check_keys(fields: Mapping[str, object], wanted: set[str], what: str) -> None:
    """Return when a ledger's fields are exactly these.

    Raises:
        LedgerError: they are not.
    """
    if set(fields) != wanted:
        raise LedgerError(f"{what} has the keys {sorted(fields)}, not {sorted(wanted)}", _EDITED)
