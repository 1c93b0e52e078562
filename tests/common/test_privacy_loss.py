"""The odometer's machinery against closed forms, and against numbers of the integrating oracle (statistical/)."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from hansa.common import privacy_loss
from hansa.common.curves import gaussian_epsilon, renyi_step
from hansa.common.privacy_loss import read

# ------------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize(
    ("mu", "steps", "delta"),
    [
        (1.0, 1, 1e-5),
        (0.1, 1, 1e-5),
        (0.5, 7, 1e-9),
        (3.0, 50, 1e-5),
        (0.02, 5, 1e-3),
        (1.0, 9, 1e-14),
        (1.0, 9, 1e-200),
    ],
)
def test_composition_is_just_above_the_exact_gaussian(mu: float, steps: int, delta: float) -> None:
    worst = privacy_loss._compose({(1.0, 1 / mu): steps}, delta)
    found, step = worst.epsilon, worst.step
    exact = gaussian_epsilon(mu**2 * steps, delta)
    assert exact * (1 - 1e-9) <= found <= exact + 5e-5 * max(1.0, exact)
    assert 0.0 < step <= 1e-4 * max(1.0, found)


def _one_step_delta(epsilon: float, q: float, sigma: float, add: bool) -> float:
    """Hockey-stick divergence of one sampled step in closed form: the loss crosses ε at one point."""
    sign = -1 if add else 1
    ratio = (math.exp(sign * epsilon) - 1 + q) / q
    x = sigma**2 * math.log(ratio) + 0.5 if ratio > 0 else -math.inf
    tail = norm.cdf if add else norm.sf
    without, joined = tail(x / sigma), (1 - q) * tail(x / sigma) + q * tail((x - 1) / sigma)
    upper, lower = (without, joined) if add else (joined, without)
    return float(upper - math.exp(epsilon) * lower)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(
    ("q", "sigma", "delta"), [(0.01, 0.5, 1e-5), (0.1, 1.0, 1e-5), (0.5, 2.0, 1e-3), (0.9, 0.4, 1e-7)]
)
def test_one_sampled_step_is_just_above_the_exact_one(q: float, sigma: float, delta: float, add: bool) -> None:
    direction = privacy_loss._Direction({(q, sigma): 1}, delta, add, 9.0)
    bound = direction.epsilon
    while direction.refine():
        pass
    assert _one_step_delta(direction.epsilon + 1e-9, q, sigma, add) <= delta
    # Adding has a greatest loss, −ln(1 − q): there discretising costs an interval, not its square.
    assert _one_step_delta(direction.epsilon - (4e-4 if add else 1e-4), q, sigma, add) > delta
    assert direction.epsilon <= bound


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("q", "sigma"), [(0.01, 0.5), (0.3, 1.0), (1.0, 2.0)])
def test_discretised_step_dominates_and_touches_at_its_points(q: float, sigma: float, add: bool) -> None:
    first, step = privacy_loss._lattice(q, sigma, add, 9.0, 0.1)
    assert step.losses[0] == pytest.approx(first * 0.1)
    assert step.mass.sum() + step.lost == pytest.approx(1.0, abs=1e-13)
    for epsilon in np.arange(-0.35, 3.0, 0.05):
        if first * 0.1 < epsilon < step.losses[-1]:
            mine = float(np.sum(step.mass * np.maximum(0.0, -np.expm1(epsilon - step.losses)))) + step.lost
            exact = _one_step_delta(float(epsilon), q, sigma, add)
            assert mine >= exact * (1 - 1e-9) - 1e-18
            if abs(epsilon / 0.1 - round(epsilon / 0.1)) < 1e-9:
                assert mine == pytest.approx(exact, rel=1e-6, abs=1e-15)
            elif exact > 1e-6:
                assert mine > exact * (1 + 1e-6)


@given(st.floats(0.0, 1.0, exclude_min=True), st.floats(0.3, 100.0), st.floats(-5, 5))
def test_loss_and_output_are_inverse(q: float, sigma: float, x: float) -> None:
    loss = privacy_loss._loss(q, sigma, np.array([x * sigma]))
    ratio = 1 - q + q * math.exp((x * sigma - 0.5) / sigma**2)
    assert loss[0] == pytest.approx(math.log(ratio), rel=1e-6, abs=1e-14)
    if q > 0.01:
        back = privacy_loss._output(q, sigma, loss)[0]
        assert privacy_loss._loss(q, sigma, np.array([back]))[0] == pytest.approx(loss[0], rel=1e-9, abs=1e-14)


def test_scan_gives_the_renyi_divergence() -> None:
    """The direction that removes a record has D_α(P‖Q), which has a closed form at whole orders; the other is less."""
    for q, sigma in ((0.01, 1.0), (0.3, 0.7), (1e-4, 2.0), (1.0, 3.0)):
        thetas = np.array([1.0, 4.0, 9.0])
        moments = [
            privacy_loss._log_moments(privacy_loss._scan(q, sigma, add, 25.0, 4096), thetas) for add in (False, True)
        ]
        for i, theta in enumerate(thetas):
            assert moments[0][i] == pytest.approx(theta * renyi_step(q, sigma, int(theta) + 1), rel=2e-3)
            assert moments[1][i] <= moments[0][i] * (1 + 1e-9)


def test_weight_is_the_greatest_of_its_kind() -> None:
    y = np.linspace(0, 50, 500_001)
    for theta in (0.1, 1.0, 7.5):
        assert privacy_loss._weight(theta) == pytest.approx(float(np.max(np.exp(-theta * y) * -np.expm1(-y))), rel=1e-6)


# -------------------------------------------------------------------------------------------------- the window's bound


def test_blocks_keep_mass_and_mean_and_only_spread() -> None:
    rng = np.random.default_rng(1)
    for size, top in ((5, 0), (5, 4), (3000, 40), (3000, 2990), (1, 0)):
        mass = rng.random(size) * np.exp(-np.abs(np.arange(size) - top) / 20)
        mass /= mass.sum()
        blocks = privacy_loss._blocks(3, top, mass)
        offsets = np.arange(size) - top
        mean = float(mass @ offsets)
        assert blocks.steps == 3
        assert blocks.mass.sum() == pytest.approx(1.0)
        assert float(blocks.mass @ blocks.ends) == pytest.approx(mean, abs=1e-9)
        exact = float(mass @ (offsets - mean) ** 2)
        assert exact * (1 - 1e-9) <= blocks.variance <= 1.05 * exact + 1e-12
        for rate in (-0.02, 0.02):
            assert float(blocks.mass @ np.exp(rate * blocks.ends)) >= float(mass @ np.exp(rate * offsets)) * (1 - 1e-9)


def test_window_leaves_as_little_outside_as_it_says_and_not_much_less() -> None:
    mass = np.full(11, 1 / 11)  # 100 dice
    low, high = privacy_loss._window([privacy_loss._blocks(100, 5, mass)]) or (0, 0)
    sums = np.array([1.0])
    for _ in range(100):
        sums = np.convolve(sums, mass)
    assert sums[high + 501 :].sum() <= 1e-10
    assert sums[: low + 500].sum() <= 1e-10
    assert sums[high + 501 - 25 :].sum() > 1e-10
    assert low == -high
    assert privacy_loss._window([privacy_loss._blocks(2, 5, mass)]) == (-10, 10)
    assert privacy_loss._window([privacy_loss._blocks(2, 0, np.array([1.0]))]) is None


# --------------------------------------------------------------------------------------------------------- whole answers

# ε by statistical/oracle_integral.py: exact_epsilon, which shares nothing with hansa.
GOLDEN = [
    ({(0.01, 1.0): 1000}, 1e-5, 1.828237),
    ({(0.1, 2.0): 100, (1.0, 30.0): 50}, 1e-5, 2.534661),
    ({(0.001, 0.5): 5000}, 1e-6, 5.435249),
    ({(0.1, 0.5): 1000}, 1e-5, 126.166564),
    ({(0.5, 4.0): 5000}, 1e-5, 76.817039),
    ({(0.01, 1.0): 100}, 1e-14, 3.398011),
    ({(0.01, 1.0): 1000}, 1e-200, 57.781782),
    ({(0.5, 0.5): 5}, 1e-5, 21.476080),
]


@pytest.mark.parametrize(("history", "delta", "exact"), GOLDEN)
def test_golden_values_of_the_oracle(history: privacy_loss.History, delta: float, exact: float) -> None:
    reading = read(history, delta)
    assert exact - 2e-6 * max(1.0, exact) <= reading.epsilon <= exact + 1e-4 * max(1.0, exact)
    assert reading.method == "loss distribution"
    assert reading.step <= 1e-4 * max(1.0, reading.epsilon)
    assert reading.rounding_cost < 1e-12


def test_short_answers() -> None:
    assert read({}, 1e-5) == privacy_loss.Reading(0.0, 0.0, 0.0, "none")
    mu_squared = 3 / 400 + 2 / 25
    assert read({(1.0, 20.0): 3, (1.0, 5.0): 2}, 1e-5) == privacy_loss.Reading(
        gaussian_epsilon(mu_squared, 1e-5), 0.0, 0.0, "gaussian"
    )
    # A record is noticed with q·(2Φ(1/2σ) − 1) at most.
    noticed = 1e-3 * (2 * norm.cdf(0.5) - 1)
    assert read({(1e-3, 1.0): 1}, noticed * 1.001) == privacy_loss.Reading(0.0, 0.0, 0.0, "unnoticed")
    assert read({(1e-3, 1.0): 1}, noticed * 0.99).epsilon > 0.0
    assert read({(1e-3, 1.0): 2}, noticed * 1.001).epsilon > 0.0


def test_what_is_hardly_noticed_is_taken_off_delta_and_not_composed() -> None:
    loud = {(0.01, 1.0): 1000}
    alone, together = read(loud, 1e-5), read({**loud, (1e-18, 0.3): 10**6, (5e-324, 0.3): 10**9}, 1e-5)
    assert alone.epsilon <= together.epsilon <= alone.epsilon + 1e-4
    assert together.method == "loss distribution"


def test_negligible_kinds_are_priced_unsampled() -> None:
    loud = {(0.1, 1.0): 100}
    alone, together = read(loud, 1e-5), read({**loud, **{(0.9 - i / 100, 1e9): 10**9 for i in range(50)}}, 1e-5)
    assert alone.epsilon <= together.epsilon <= alone.epsilon + 1e-4
    assert 0.0 < together.rounding_cost < 1e-4


@pytest.mark.parametrize(
    ("history", "delta"),
    [
        ({(0.5, 0.3): 10**9, (1.0, 0.3): 10**9, (1e-8, 1e3): 5}, 1e-5),
        ({(0.01, 1.0): 10**9}, 1e-5),
        ({(0.01, 1.0): 100}, 1e-300),
        ({(1 - 1e-16, 0.3): 50, (0.5, 1e9): 1}, 1e-6),
    ],
)
def test_beyond_what_can_be_composed_a_renyi_bound_is_finite(history: privacy_loss.History, delta: float) -> None:
    reading = read(history, delta)
    assert 0.0 < reading.epsilon < math.inf
    unsampled = math.fsum(n / s**2 for (_, s), n in history.items())
    assert reading.epsilon <= gaussian_epsilon(unsampled, delta)


def test_huge_histories_are_within_a_percent() -> None:
    """ε ≈ T·KL(P‖Q) with ten thousand times less beside it; KL by integration."""
    q, sigma, steps = 0.5, 0.5, 10**9
    x = np.linspace(-12, 13, 200_001)
    mixed = (1 - q) * norm.pdf(x, 0, sigma) + q * norm.pdf(x, 1, sigma)
    loss = np.logaddexp(math.log1p(-q), math.log(q) + (x - 0.5) / sigma**2)
    kl = float(mixed @ loss) * (x[1] - x[0])
    reading = read({(q, sigma): steps}, 1e-5)
    assert reading.method == "renyi"
    assert reading.step == math.inf
    assert steps * kl < reading.epsilon < 1.01 * steps * kl


# Each allowance, made large enough to be seen, must come off δ.


def test_what_is_lost_above_the_grid_is_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy_loss, "_LOST", 0.5)
    # No more than δ/2 is left for the rest, and not much less is there to be charged.
    found = privacy_loss._compose({(1.0, 2.0): 1}, 1e-3).epsilon
    assert gaussian_epsilon(0.25, 1e-3) < found < gaussian_epsilon(0.25, 2.5e-4)


def test_what_is_left_out_comes_off_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy_loss, "_UNNOTICED", 0.5)
    history = {(0.01, 1.0): 1000, (1e-9, 1.0): 5000}  # the second is noticed with 0.19 of δ
    found = read(history, 1e-5).epsilon
    monkeypatch.undo()
    half = read({(0.01, 1.0): 1000}, 0.5e-5).epsilon
    assert found == pytest.approx(half, abs=2e-4)
    assert half > read(history, 1e-5).epsilon + 1e-2


def test_what_wraps_around_the_window_is_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    before = read({(0.01, 1.0): 1000}, 1e-5).epsilon
    monkeypatch.setattr(privacy_loss, "_OUTSIDE", 1e-3)
    assert before + 1e-3 < read({(0.01, 1.0): 1000}, 1e-5).epsilon < before + 0.1


# -------------------------------------------------------------------------------------------------------------- rounding


@given(st.floats(1e-12, 1.0, exclude_max=True), st.floats(0.3, 1e9), st.sampled_from([64, 4, 1, 0.25, 0.02]))
def test_grid_points_are_dearer_and_near(q: float, sigma: float, m: float) -> None:
    up, down = privacy_loss._grid_point(q, sigma, m)
    assert q <= up < 1.0
    assert 0.3 <= down <= sigma
    assert up <= q * 2 ** (1 / m) * (1 + 1e-9)
    assert down >= sigma / 2 ** (1 / m) * (1 - 1e-9)


def _many(count: int) -> dict[tuple[float, float], int]:
    rng = np.random.default_rng(7)
    return {
        (float(10 ** rng.uniform(-3, -1)), float(rng.uniform(0.8, 6))): int(rng.integers(1, 10)) for _ in range(count)
    }


def test_too_many_kinds_are_rounded_at_a_stated_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    history = _many(120)
    exact = read(history, 1e-5)
    assert exact.rounding_cost == 0.0
    monkeypatch.setattr(privacy_loss, "_MAX_KINDS", 64)
    rounded = privacy_loss._round(history, 8)
    assert 32 < len(rounded) <= 64
    assert sum(rounded.values()) == sum(history.values())
    assert sum(kind in history for kind in rounded) >= 32
    reading = read(history, 1e-5)
    assert exact.epsilon < reading.epsilon
    assert 0.5 * reading.rounding_cost < reading.epsilon - exact.epsilon < 1.5 * reading.rounding_cost + 1e-3


def test_unsampled_steps_become_one_mechanism() -> None:
    rounded = privacy_loss._round({(1.0, 2.0): 4, (1.0, 4.0): 16, (0.1, 1.0): 3}, 8)
    assert rounded == {(0.1, 1.0): 3, (1.0, math.sqrt(0.5)): 1}
    loud = privacy_loss._round({(1.0, 0.3): 9, (0.1, 1.0): 3}, 8)  # 100 = 25 x 4
    assert loud == {(0.1, 1.0): 3, (1.0, 0.5): 25}


def test_steps_computed_twice_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    history = {(0.01, 1.0): 100, (0.1, 3.0): 10}
    before = read(history, 1e-5)
    monkeypatch.setattr(privacy_loss, "_MAX_STORED", 0)
    assert read(history, 1e-5) == before


@pytest.mark.parametrize("name", ["_MAX_POINTS", "_MAX_WORK"])
def test_a_grid_too_large_leaves_the_renyi_bound(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    history = {(0.01, 1.0): 1000}
    tight = read(history, 1e-5)
    monkeypatch.setattr(privacy_loss, name, 200)
    reading = read(history, 1e-5)
    assert reading.method == "renyi"
    assert 1.05 * tight.epsilon < reading.epsilon < 1.2 * tight.epsilon


KINDS = st.tuples(st.floats(1e-4, 1.0), st.floats(0.4, 20.0))


@given(st.dictionaries(KINDS, st.integers(1, 300), min_size=1, max_size=3), KINDS, st.floats(1, 2))
@settings(max_examples=8, deadline=None)
def test_more_steps_more_often_with_less_noise_never_cost_less(
    history: dict[tuple[float, float], int], kind: tuple[float, float], factor: float
) -> None:
    def epsilon(more: tuple[float, float]) -> float:
        return read({**history, more: history.get(more, 0) + 5}, 1e-6).epsilon

    q, sigma = kind
    before, base = read(history, 1e-6).epsilon, epsilon(kind)
    tolerance = 3e-4 * max(1.0, base)
    assert base >= before - tolerance
    assert epsilon((min(1.0, q * factor), sigma)) >= base - tolerance
    assert epsilon((q, max(0.3, sigma / factor))) >= base - tolerance
