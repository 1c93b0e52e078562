"""Noise that partners share under secure aggregation: what one draws, and what a step costs.

One step: every partner clips each record's gradient to norm C, sums, rounds the sum to a grid of step γ, adds discrete Gaussian noise of
variance σ²C²/(N_min − t), in units of γ, and sends it masked; the coordinator learns the sum over N_min partners or more. At most t partners
collude with the coordinator and subtract their own noise: N_min − t shares are certain, with variance σ²C² together, and more are
independent of them.

**What it costs** is what one unsampled Gaussian step of the noise multiplier

    σ' = √(σ²C² − 16γ²) / (C + γ√d)

(rounded down by 10⁻¹²) costs, in every accountant:

1. *Sensitivity.* A record adds a vector of norm at most C; rounding to the nearest point of the grid moves each of d coordinates by at
   most γ/2, with and without it. So the sum on the grid differs by at most C + γ√d, by whole numbers of γ.
2. *A sum of shares is one discrete Gaussian.* With X ~ N_Z(0, a²) and Y ~ N_Z(0, b²), P[X + Y = z] is ρ_s(z)·Σ_k ρ_h(k − cz) over a constant, with
   s² = a² + b² and h = ab/s. By Poisson summation Σ_k ρ_h(k − u) = h√2π·(1 + E), |E| ≤ e(h) = 2Σ_j exp(−2π²h²j²) for every u. Both are
   distributions, so their ratio is within (1 ± e(h))/(1 ∓ e(h)); likewise for each further share (Kairouz, Liu & Steinke 2102.06387, section 3,
   use the same for their τ). With shares of at least 8 steps h is at least 8/√2, and e(h) below 10⁻²⁷³.
3. *A discrete Gaussian is what is made of a continuous one.* Let x ~ N(m, s² − η²) for a whole number m, and then z ~ N_Z(x, η²), whose
   weights are normalised for that x. Averaged over x, P[z] is between (1 − e(s))/(1 + e(η)) and (1 + e(s))/(1 − e(η)) times that of N_Z(m, s²). So
   whoever sees the discrete sum sees a post-processing of a continuous one of variance s² − η² (the argument of Peikert 2010, theorem 3.1, in one
   dimension, but with ratios: statistical distance would not be enough). Here η = 4, and both together are within e^±κ, κ < 2·10⁻¹³⁷ a coordinate.
4. *The factor is less than what σ' is rounded down by, for one step, before sampling.* Let a pair of distributions be within e^±k of what is made of
   N(0, 1) and N(μ, 1). Then its δ(ε) is at most e^k·δ_μ(ε − 2k), and 1 − δ(ε) at least e^−k·(1 − δ_μ(ε)). As ∂δ_μ/∂μ = φ(z) with z = μ/2 − ε/μ, and what
   k costs is at most kφ(z)(M(|z|) + M(μ − z)), M Mills' ratio, at most 1.26, the first (z < 0) or the second (z ≥ 0) is below δ_μ'(ε) for every ε
   once k ≤ (μ' − μ)/3. Here μ is 10⁻⁹ to 1/0.3 and μ' 10⁻¹² larger: k may be 3·10⁻²², and is below 10⁻¹²⁷ for 10⁹ coordinates. So by Blackwell's
   theorem a step is, without any factor, made of the continuous one of σ', in both directions.
5. *Sampling.* Given who else was drawn, a step is (1 − q)Q + qR against Q with (Q, R) as in 4, and a shift of less than C + γ√d is made of the whole
   one; joint convexity of hockey-stick divergences over the others' draws gives the pair of the accountants. Any number of steps, chosen by whoever
   saw the ones before: theirs.

So the exact Gaussian branch of the filter and the tight odometer hold for shared noise, too. ADR 15 compares this with the bound of 2102.06387.

What it is not about: a person with records at k partners moves one and the same sum k times as far: ledgers of different partners are not to be composed
as if they were about different releases. The unit is one record of one partner. And masks are computational: so is all of this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .accounting import PrivacyEvent, check_keys, decimal_of
from .errors import ConfigError, LedgerError, Refused

MECHANISM = "shared-gaussian/1"
ETA = 4.0
"""Standard deviation, in steps of the grid, of what is given away for the noise being discrete."""
LEAST_SHARE = 8.0
"""A share has at least this standard deviation, in steps of the grid."""
_EDITED = "The ledger was edited; do not rely on it."
FINE = 256
"""γ√d is C over this: what the grid adds to the sensitivity is 0.4 %."""


def grid_for(clip_norm: float, dimension: int) -> float:
    """The step of the grid γ that a charter fixes: a power of two, so that multiples of it are exact floats; at most C/(256√d)."""
    # Not by a logarithm, which rounds up just below a power of two.
    return math.ldexp(1.0, math.frexp(clip_norm / (FINE * math.sqrt(dimension)))[1] - 1)


def charged_as(noise_multiplier: float, clip_norm: float, grid: float, dimension: int) -> float:
    """σ', the noise multiplier that shared noise is charged as: see the top of this module."""
    step = grid / clip_norm  # in this unit nothing underflows
    noise = math.sqrt((noise_multiplier - ETA * step) * (noise_multiplier + ETA * step))
    return noise / (1 + step * math.sqrt(dimension)) * (1 - 1e-12)


@dataclass(frozen=True)
class SharedGaussian:
    """`steps` steps of shared noise on one partner's dataset.

    Args:
        sampling_rate: q in (0, 1], with which a record joins a step.
        noise_multiplier: σ: the standard deviation of N_min − t shares together, divided by C; at least 0.3.
        clip_norm: C.
        grid: γ, the step of the grid.
        dimension: d, how many coordinates are summed.
        quorum: N_min, of how many partners a sum is at least.
        colluding: t, how many of them may know their own noise and tell the coordinator. quorum − colluding is at least 2.
        steps: 1 to 10⁹.

    Raises:
        ConfigError, Refused: anything out of range; a grid so coarse that a share has less than 8 steps of it.
    """

    sampling_rate: float
    noise_multiplier: float
    clip_norm: float
    grid: float
    dimension: int
    quorum: int
    colluding: int
    steps: int

    def __post_init__(self) -> None:
        PrivacyEvent(self.sampling_rate, self.noise_multiplier, self.steps)  # checks these
        for name in ("clip_norm", "grid"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ConfigError(f"{name} {value!r} is not a positive number", "Give a plain decimal number.")
            object.__setattr__(self, name, float(value))
        if self.grid / self.clip_norm == 0:
            raise ConfigError(f"a grid of {self.grid:g} for a clip of {self.clip_norm:g}", "Take a coarser one.")
        for name, least in (("dimension", 1), ("colluding", 0), ("quorum", self.colluding + 2)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= 10**9:
                raise ConfigError(
                    f"{name} {value!r} is not a whole number from {least}",
                    "At least two partners that do not collude must add noise: one alone would see the other's sum.",
                )
        if not self.share_std >= LEAST_SHARE:
            raise ConfigError(
                f"a grid of {self.grid:g} is too coarse: a partner's noise has a standard deviation of {self.share_std:g} of its steps",
                f"Take a grid of at most {self.share_std / LEAST_SHARE * self.grid:g}.",
            )
        _ = self.charged  # refuses what comes to less than 0.3

    @property
    def share_std(self) -> float:
        """Standard deviation of one partner's share, in steps of the grid."""
        return self.noise_multiplier / (self.grid / self.clip_norm * math.sqrt(self.quorum - self.colluding))

    @property
    def charged(self) -> PrivacyEvent:
        """What it costs (see the top of this module): never more noise than there is."""
        return PrivacyEvent(
            self.sampling_rate, charged_as(self.noise_multiplier, self.clip_norm, self.grid, self.dimension), self.steps
        )

    def factor(self, partners: int) -> float:
        """How many times larger the standard deviation of the noise of so many partners is than that which is charged: √(n/(N_min − t))."""
        return math.sqrt(partners / (self.quorum - self.colluding))

    def to_fields(self) -> dict[str, str | int]:
        """The event as ledger fields; reals as decimal strings that read back to the same float."""
        reals = {"q": self.sampling_rate, "sigma": self.noise_multiplier, "clip": self.clip_norm, "grid": self.grid}
        whole = {"dimension": self.dimension, "quorum": self.quorum, "colluding": self.colluding, "steps": self.steps}
        return {"mechanism": MECHANISM, **{key: repr(value) for key, value in reals.items()}, **whole}

    @classmethod
    def from_fields(cls, fields: Mapping[str, object]) -> SharedGaussian:
        """Inverse of `to_fields`.

        Raises:
            LedgerError: another mechanism, missing or extra keys, non-canonical numbers, values out of range.
        """
        whole = ("dimension", "quorum", "colluding", "steps")
        check_keys(fields, {"mechanism", "q", "sigma", "clip", "grid", *whole}, "privacy event")
        if fields["mechanism"] != MECHANISM:
            raise LedgerError(
                f"privacy event of an unknown mechanism {fields['mechanism']!r}", "A newer hansa may know it."
            )
        q, sigma, clip, grid = (decimal_of(fields[key], key) for key in ("q", "sigma", "clip", "grid"))
        dimension, quorum, colluding, steps = (fields[key] for key in whole)
        # One by one, so that whoever reads this sees them to be whole numbers; a bool is none.
        if (
            type(dimension) is not int
            or type(quorum) is not int
            or type(colluding) is not int
            or type(steps) is not int
        ):
            raise LedgerError("privacy event: a count that is no whole number", _EDITED)
        try:
            return cls(q, sigma, clip, grid, dimension, quorum, colluding, steps)
        except (ConfigError, Refused) as error:
            raise LedgerError(f"privacy event: {error.message}", _EDITED) from error
