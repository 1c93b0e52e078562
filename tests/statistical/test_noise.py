"""What leaves a node is protected only if the noise is what the ledger says. Every test rejects a wrong generator.

Significance 1e-6 a test: a false alarm once in a million runs, while the wrong generators are rejected with certainty.
"""

from __future__ import annotations

import math
import os
from multiprocessing import get_context

import numpy as np
import pytest
from scipy import stats

from hansa.common import noise
from hansa.common.errors import ConfigError
from hansa.common.noise import SecureNoise

ALPHA = 1e-6
N = 200_000


def accepts_std(values: np.ndarray, std: float) -> bool:
    """Two-sided χ² test of the variance, mean known to be zero."""
    statistic = float(np.sum((values / std) ** 2))
    return ALPHA / 2 < stats.chi2.cdf(statistic, values.size) < 1 - ALPHA / 2


def accepts_mean_zero(values: np.ndarray, std: float) -> bool:
    return abs(values.mean()) < std / math.sqrt(values.size) * stats.norm.isf(ALPHA / 2)


def accepts_normal(values: np.ndarray, std: float) -> bool:
    return stats.kstest(values / std, "norm").pvalue > ALPHA


def correlated(a: np.ndarray, b: np.ndarray) -> bool:
    return abs(np.corrcoef(a, b)[0, 1]) > stats.norm.isf(ALPHA / 2) / math.sqrt(a.size)


def accepts_independent(a: np.ndarray, b: np.ndarray) -> bool:
    """No correlation of values, of squares (a shared radius) or of signs."""
    return not (correlated(a, b) or correlated(a**2, b**2) or correlated(np.sign(a), np.sign(b)))


@pytest.mark.parametrize("std", [1e-3, 1.0, 40.0])
def test_standard_deviation_is_the_stated_one(std):
    values = SecureNoise().gaussian(N, std)
    assert accepts_std(values, std)
    assert not accepts_std(values, std * 2 / 3)
    assert not accepts_std(values, std * 3 / 2)
    assert not accepts_std(values * 1.02, std)


def test_mean_is_zero():
    values = SecureNoise().gaussian(N, 3.0)
    assert accepts_mean_zero(values, 3.0)
    assert not accepts_mean_zero(values + 0.05, 3.0)


def test_values_are_normal():
    values = SecureNoise().gaussian(N, 2.0)
    assert accepts_normal(values, 2.0)
    uniform = np.random.default_rng(0).uniform(-1, 1, N) * 2 * math.sqrt(3)  # same mean and variance
    laplace = np.random.default_rng(0).laplace(size=N) * 2 / math.sqrt(2)
    assert not accepts_normal(uniform, 2.0)
    assert not accepts_normal(laplace, 2.0)


def test_tails_are_there():
    """A sum of few uniforms would pass KS at small n but has no tails."""
    values = SecureNoise().gaussian(1_000_000, 1.0)
    beyond_4 = int((np.abs(values) > 4).sum())  # 63 expected

    def accepts(count: int) -> bool:
        return stats.binomtest(count, 1_000_000, 2 * stats.norm.sf(4)).pvalue > ALPHA

    irwin_hall = np.random.default_rng(0).random((1_000_000, 4)).sum(1) - 2
    assert accepts(beyond_4)
    assert not accepts(int((np.abs(irwin_hall) > 4 * math.sqrt(1 / 3)).sum()))


@pytest.mark.parametrize("lag", [1, 2, 7, noise._BLOCK // 2, noise._BLOCK])
def test_values_are_independent_within_a_call(lag):
    values = SecureNoise().gaussian(N, 1.0)
    assert accepts_independent(values[:-lag], values[lag:])
    smeared = values[lag:] + 0.05 * values[:-lag]
    assert not accepts_independent(smeared, values[:-lag])


def test_values_that_share_uniforms_are_independent():
    """Value i and value size−1−i of a block come from the same uniforms."""
    block = noise._BLOCK
    values = SecureNoise().gaussian(50 * block, 1.0).reshape(50, block)
    first, mirrored = values[:, : block // 2].ravel(), values[:, block // 2 :][:, ::-1].ravel()
    assert accepts_independent(first, mirrored)
    radius = np.sqrt(-2 * np.log(np.random.default_rng(0).random(N)))
    angle = np.random.default_rng(1).random(N)
    assert not accepts_independent(radius * angle, radius * (1 - angle))  # a shared radius shows


def test_calls_and_instances_are_independent():
    one = SecureNoise()
    a, b, c = one.gaussian(N, 1.0), one.gaussian(N, 1.0), SecureNoise().gaussian(N, 1.0)
    assert accepts_independent(a, b)
    assert accepts_independent(a, c)
    assert not accepts_independent(a, a)
    assert not np.intersect1d(a, b).size


def _draw(_: int) -> bytes:
    return _shared.gaussian(4, 1.0).tobytes()


_shared = SecureNoise()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_processes_do_not_draw_the_same_noise():
    _shared.gaussian(4, 1.0)
    with get_context("fork").Pool(2) as pool:
        drawn = pool.map(_draw, range(8), chunksize=1)
    assert len({*drawn, _draw(0)}) == 9


@pytest.mark.parametrize("size", [1, 2, 3, 5, 4095, 4096, 4097, 8193])
def test_every_size_has_unit_variance_and_its_last_value_is_noise(size):
    draws = np.array([SecureNoise().gaussian(size, 1.0)[[0, -1]] for _ in range(300)])
    assert accepts_std(draws[:, 0], 1.0)
    assert accepts_std(draws[:, 1], 1.0)
    assert len(np.unique(draws[:, 1])) == 300


def test_shapes():
    assert SecureNoise().gaussian((2, 3, 4), 1.0).shape == (2, 3, 4)
    assert SecureNoise().gaussian((), 1.0).shape == ()
    assert SecureNoise().gaussian((0, 3), 1.0).shape == (0, 3)
    assert SecureNoise().gaussian(5, 1.0).dtype == np.float64
    assert not SecureNoise().gaussian(5, 0.0).any()


def low_bits(values: np.ndarray) -> np.ndarray:
    """How often each of the 8 lowest bits of the mantissa is set."""
    bits = np.ascontiguousarray(values).view(np.uint64)
    return np.array([((bits >> np.uint64(k)) & np.uint64(1)).mean() for k in range(8)])


def accepts_low_bits(values: np.ndarray) -> bool:
    limit = stats.norm.isf(ALPHA / 16) * 0.5 / math.sqrt(values.size)
    return bool((np.abs(low_bits(values) - 0.5) < limit).all())


def test_low_bits_are_covered():
    values = SecureNoise().gaussian(N, 1.0)
    # Sums of float64 of different size carry trailing zeros when the sum is small: look at where the mantissa is full.
    full = values[np.abs(values) > 1]
    assert accepts_low_bits(full * 1.1)
    coarse = np.random.default_rng(0).standard_normal(N).astype(np.float32).astype(np.float64)
    assert not accepts_low_bits(coarse)


def test_every_value_is_the_sum_of_four_draws_from_eight_uniforms(monkeypatch):
    """Flip one uniform and see which values move: all four pairs of a value, and no value from one pair alone."""
    size = 64
    words = np.random.default_rng(0).integers(0, 2**64, 4 * size, dtype=np.uint64)

    def drawn(changed: int | None = None) -> np.ndarray:
        some = words.copy()
        if changed is not None:
            some[changed] ^= np.uint64(1 << 63)
        return noise._block(lambda count: some[:count], size)

    base = drawn()
    moved = np.array([drawn(k) != base for k in range(4 * size)])  # [uniform, value]
    assert (moved.sum(axis=0) == 8).all()  # four pairs of uniforms each
    assert (moved.sum(axis=1) == 2).all()


# ------------------------------------------------------------------------------------------------- sampling


def accepts_poisson(batches: np.ndarray, q: float) -> bool:
    """Rate, spread of the batch size, rate of each record, independence of neighbours and of batches.

    Args:
        batches: bool [batches, records].
        q: the stated rate.
    """
    times, n = batches.shape
    sizes = batches.sum(axis=1)
    rate = stats.binomtest(int(sizes.sum()), times * n, q).pvalue
    spread = float(((sizes - n * q) ** 2).sum() / (n * q * (1 - q)))  # about χ² with `times` degrees of freedom
    spread_fits = ALPHA / 2 < stats.chi2.cdf(spread, times) < 1 - ALPHA / 2
    by_record = float(((batches.sum(axis=0) - times * q) ** 2).sum() / (times * q * (1 - q)))
    records_fit = ALPHA / 2 < stats.chi2.cdf(by_record, n) < 1 - ALPHA / 2
    x = batches.astype(np.float64)
    dependent = correlated(x[:, :-1].ravel(), x[:, 1:].ravel()) or correlated(x[:-1].ravel(), x[1:].ravel())
    return rate > ALPHA and spread_fits and records_fit and not dependent


def test_batches_are_poisson_and_fixed_or_shuffled_ones_are_rejected():
    n, q, times = 500, 0.1, 1000
    source = SecureNoise()
    assert accepts_poisson(np.array([source.bernoulli(n, q) for _ in range(times)]), q)

    rng = np.random.default_rng(0)
    fixed = np.zeros((times, n), dtype=bool)
    for row in fixed:
        row[rng.choice(n, 50, replace=False)] = True
    assert not accepts_poisson(fixed, q)
    epochs = np.concatenate([np.eye(10, dtype=bool)[:, rng.permutation(n) % 10] for _ in range(times // 10)])
    assert not accepts_poisson(epochs, q)
    assert not accepts_poisson(rng.random((times, n)) < q * 1.05, q)
    once = rng.random(n) < q
    assert not accepts_poisson(np.broadcast_to(once, (times, n)), q)


def test_the_realised_rate_never_exceeds_the_accounted_one(monkeypatch):
    """The number of 64-bit integers below the threshold, exactly."""

    def heads(q: float, word: int) -> bool:
        monkeypatch.setattr(noise, "_keystream", lambda: lambda n: np.full(n, word, dtype=np.uint64))
        one = bool(SecureNoise().bernoulli(1, q)[0])
        assert SecureNoise().bernoulli(3, np.array([0.0, q, 1.0])).tolist() == [False, one, True]  # each record's own
        return one

    for q in (0.5, 0.1, 1 / 3, 1e-4, 1e-9, 2.0**-63, 1 - 2.0**-53, 1e-17):
        exact = int(q * 2**64)  # a float times a power of two is exact; int() floors
        assert exact <= q * 2**64
        assert not heads(q, exact)
        assert heads(q, exact - 1)
    assert not heads(2.0**-65, 0)
    assert not heads(0.0, 0)
    assert heads(1.0, 2**64 - 1)


@pytest.mark.parametrize("std", [1e-30, 1e30])
def test_quick_noise_has_any_size_that_float32_has(std):
    made = SecureNoise().quick_gaussian(10_000, std).astype(np.float64) / std
    assert abs(made.std() - 1) < 0.05


def test_out_of_range_is_refused():
    for q in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match="sampling rate"):
            SecureNoise().bernoulli(3, q)
        with pytest.raises(ConfigError, match="sampling rate"):
            SecureNoise().bernoulli(2, np.array([0.5, q]))
    for std in (-1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="standard deviation"):
            SecureNoise().gaussian(3, std)
