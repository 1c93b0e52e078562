"""What shared noise costs, against sums of its probabilities: an oracle that knows nothing of Gaussians."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.signal import fftconvolve

from hansa.common.accounting import Budget, PrivacyEvent, odometer
from hansa.common.curves import gaussian_epsilon
from hansa.common.errors import ConfigError, LedgerError, Refused
from hansa.common.shared_noise import ETA, LEAST_SHARE, SharedGaussian, grid_for

EVENT = SharedGaussian(1.0, 2.0, 1.0, 2.0**-9, 36, 4, 1, 1)


def share(std: float) -> NDArray[np.float64]:
    """P[k] of one discrete Gaussian share, k from −reach to reach; what is beyond is below 10⁻³⁰."""
    reach = math.ceil(12 * std)
    k = np.arange(-reach, reach + 1)
    weights = np.exp(-(k**2) / (2 * std**2))
    return weights / weights.sum()


def summed(std: float, shares: int) -> NDArray[np.float64]:
    """P[k] of a sum of shares, by convolution."""
    one = made = share(std)
    for _ in range(shares - 1):
        made = np.convolve(made, one)
    return made


def delta(noise: NDArray[np.float64], shift: int, epsilon: float) -> float:
    """δ(ε) between the noise and the noise moved by `shift`: Σ max(0, P − e^ε Q), plainly."""
    p = np.concatenate([noise, np.zeros(shift)])
    q = np.concatenate([np.zeros(shift), noise])
    return float(np.maximum(0.0, p - math.exp(epsilon) * q).sum())


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Balle & Wang 1805.06530, theorem 8."""
    from scipy.stats import norm

    return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu))


@pytest.mark.parametrize("std", [LEAST_SHARE + 1e-6, 11.3, 25.0])
@pytest.mark.parametrize("shares", [2, 3, 7])
def test_one_coordinate_costs_no_more_than_is_charged(std: float, shares: int) -> None:
    """d = 1, C = γ·(shift − 1): the sum on the grid moves by `shift` at most."""
    noise = summed(std, shares)
    total = std * math.sqrt(shares)
    for shift in (2, 9, int(total), int(2 * total)):
        clip = float(shift - 1)
        event = SharedGaussian(1.0, max(0.3, total / clip), clip, 1.0, 1, shares, 0, 1)
        if event.share_std > std * (1 + 1e-9):
            continue  # σ below 0.3 is refused
        mu = 1 / event.charged.noise_multiplier
        for epsilon in (0.0, 0.05, 0.3, 1.0, 3.0):
            true = delta(noise, shift, epsilon)
            assert true <= gaussian_delta(mu, epsilon) + 1e-13
            # and it is not charged much more than it costs: 4 steps of the grid, once, and 1 of the clip
            less = math.sqrt(2) * ETA / total**2 + 2 / shift
            assert gaussian_delta(mu * (1 - less), epsilon) <= true + 1e-13


def test_the_oracle_notices_noise_that_is_a_tenth_smaller() -> None:
    """The negative control: with a tenth less noise the same figures would not hold."""
    noise, shift = summed(20.0 * math.sqrt(0.9), 4), 40
    event = SharedGaussian(1.0, 40 / 39, 39.0, 1.0, 1, 4, 0, 1)
    assert event.share_std == pytest.approx(20.0, rel=1e-9)
    mu = 1 / event.charged.noise_multiplier
    assert delta(noise, shift, 1.0) > 1.1 * gaussian_delta(mu, 1.0)
    # one share less, as when one more partner colludes than was agreed
    assert delta(summed(20.0, 3), shift, 1.0) > 1.2 * gaussian_delta(mu, 1.0)


def test_two_coordinates_and_two_steps_cost_no_more_than_is_charged() -> None:
    """Losses of coordinates and steps add up: by convolution of the loss, on a grid, rounded down (so δ is too small)."""
    std, shares = 9.0, 3
    noise = summed(std, shares)
    for shifts, clip in (((6, 8), 10.0), ((10, 0), 10.0), ((7, 7), 10.0)):
        event = SharedGaussian(1.0, std * math.sqrt(shares) / clip, clip, 1.0, 2, shares, 0, 1)
        step = 1e-4
        losses = np.zeros(1)
        begins = 0
        for shift in (*shifts, *shifts):  # two steps
            if not shift:
                continue
            p, q = noise[shift:], noise[: len(noise) - shift]
            loss = np.floor(np.log(p / q) / step).astype(int)
            counts = np.bincount(loss - loss.min(), weights=p)
            losses, begins = (
                fftconvolve(losses, counts) if begins or len(losses) > 1 else counts,
                begins + int(loss.min()),
            )
        at = (begins + np.arange(len(losses))) * step
        mu = math.sqrt(2) / event.charged.noise_multiplier
        for epsilon in (0.2, 1.0, 2.0):
            true = float((np.maximum(0.0, 1 - np.exp(epsilon - at)) * np.maximum(losses, 0)).sum())
            assert true <= gaussian_delta(mu, epsilon) + 1e-9


@settings(deadline=None)
@given(
    st.floats(0.303, 100),
    st.floats(1e-3, 1e3),
    st.integers(1, 10**7),
    st.integers(0, 10),
    st.integers(2, 30),
    st.integers(1, 1000),
)
def test_an_event_is_charged_as_less_noise_than_there_is(
    sigma: float, clip: float, dimension: int, colluding: int, honest: int, steps: int
) -> None:
    grid = grid_for(clip, dimension)
    event = SharedGaussian(1.0, sigma, clip, grid, dimension, honest + colluding, colluding, steps)
    charged = event.charged
    assert charged.steps == steps
    assert charged.noise_multiplier < sigma
    assert charged.noise_multiplier > 0.99 * sigma  # the grid costs less than 1 %
    assert math.isclose(event.share_std**2 * (honest * grid**2), (sigma * clip) ** 2, rel_tol=1e-9)
    assert SharedGaussian.from_fields(event.to_fields()) == event
    assert grid * math.sqrt(dimension) <= clip / 256
    assert math.frexp(grid)[0] == 0.5  # a power of two


def test_more_partners_give_more_noise_than_is_charged() -> None:
    assert SharedGaussian(1.0, 2.0, 1.0, 2.0**-12, 36, 3, 1, 1).factor(4) == math.sqrt(2)
    assert SharedGaussian(1.0, 2.0, 1.0, 2.0**-12, 36, 4, 0, 1).factor(4) == 1.0


def test_what_is_no_event() -> None:
    wrong: list[tuple[dict[str, object], str]] = [
        ({"quorum": 2}, "quorum 2 is not a whole number from 3"),
        ({"colluding": -1}, "colluding -1"),
        ({"colluding": 3}, "quorum 4 is not a whole number from 5"),
        ({"dimension": 0}, "dimension 0"),
        ({"dimension": 1.5}, "dimension 1.5"),
        ({"clip_norm": 0.0}, "clip_norm 0.0"),
        ({"grid": math.nan}, "grid nan"),
        ({"grid": 0.5}, "too coarse"),
        ({"steps": 0}, "steps 0"),
        ({"sampling_rate": 0.0}, "sampling rate 0.0"),
    ]
    for changes, what in wrong:
        with pytest.raises(ConfigError, match=what):
            replace(EVENT, **changes)  # type: ignore[arg-type]
    for sigma in (0.2, 0.3001):  # the second comes to less than 0.3 once the grid is paid for
        with pytest.raises(Refused, match=r"0\.2"):
            replace(EVENT, noise_multiplier=sigma)
    fields = EVENT.to_fields()
    for changes in (
        {"mechanism": "poisson-gaussian/1"},
        {"mechanism": "shared-gaussian/2"},
        {"sigma": "2"},
        {"grid": 0.5},
        {"quorum": "4"},
        {"colluding": True},
        {"dimension": 36.0},
        {"more": 1},
        {"grid": "0.5"},
    ):
        with pytest.raises(LedgerError):
            SharedGaussian.from_fields({**fields, **changes})
    for key in fields:
        with pytest.raises(LedgerError):
            SharedGaussian.from_fields({k: v for k, v in fields.items() if k != key})


def test_the_same_epsilon_needs_much_less_noise_than_local_noise_does() -> None:
    """Heart disease: four hospitals, 60 full-batch steps; noise in units of one clipped record, over the sum of all."""
    budget = Budget.create(1.0, 1e-4, (1.0, 60))
    sigma = budget.calibrate(1.0, 60)
    shared = next(
        s / 1000
        for s in range(1000, 10**6)
        if budget.admits([SharedGaussian(1.0, s / 1000, 1.0, grid_for(1.0, 36), 36, 4, 0, 60).charged])
    )
    assert 1.0 < shared / sigma < 1.005
    events = [SharedGaussian(1.0, shared, 1.0, grid_for(1.0, 36), 36, 4, 0, 60).charged]
    assert budget.spent(events) <= 1.0
    assert odometer(events, 1e-4) < 0.97
    exact = gaussian_epsilon(60 / events[0].noise_multiplier ** 2, 1e-4)
    assert odometer(events, 1e-4) == pytest.approx(exact, rel=1e-6)
    assert isinstance(events[0], PrivacyEvent)


def test_probabilities_of_a_sum_are_those_of_one_discrete_gaussian() -> None:
    """Step 2 of the argument, as far as floats can see."""
    for std, shares in ((LEAST_SHARE, 2), (LEAST_SHARE, 5), (20.0, 3)):
        found = summed(std, shares)
        reach = len(found) // 2
        k = np.arange(-reach, reach + 1)
        weights = np.exp(-(k**2) / (2 * shares * std**2))
        middle = np.abs(k) < 6 * std
        assert np.allclose(found[middle], (weights / weights.sum())[middle], rtol=1e-11)
    # and where shares are small they are not: the bound on them matters
    small = [np.convolve(share(0.4), share(0.4)), share(0.4 * math.sqrt(2))]
    centre = [one[len(one) // 2 - 1 : len(one) // 2 + 2] for one in small]
    assert not np.allclose(*centre, rtol=1e-3)


def test_the_grid_just_below_a_power_of_two() -> None:
    """A logarithm rounds up to the power, which would be too coarse (and not what an auditor computes)."""
    for clip in (math.nextafter(32.0, 0), 32.0, math.nextafter(32.0, 64)):
        grid = grid_for(clip, 1)
        assert grid <= clip / 256 < 2 * grid
