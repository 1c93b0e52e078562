"""The discrete Gaussian: exact against its probability mass function, by tests that reject one that is a tenth off."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import chi2, chisquare

from hansa.common import noise
from hansa.common.errors import ConfigError
from hansa.common.noise import SecureNoise

FALSE_ALARM = 1e-7


def probabilities(std: float, reach: int) -> NDArray[np.float64]:
    """P[k] for k from −reach to reach, of the discrete Gaussian."""
    k = np.arange(-reach, reach + 1)
    weights = np.exp(-(k**2) / (2 * std**2))
    return weights / weights.sum()


def fit(sample: NDArray[np.int64], std: float) -> float:
    """p-value of a sample being of this distribution (chi-squared over the values that are common enough)."""
    reach = int(12 * std) + 12
    expected = probabilities(std, reach) * len(sample)
    seen = np.bincount(np.clip(sample, -reach, reach) + reach, minlength=2 * reach + 1)
    common = expected >= 25
    rest = expected[~common].sum()
    e = np.append(expected[common], rest) if rest > 0.01 else expected[common]
    s = np.append(seen[common], seen[~common].sum()) if rest > 0.01 else seen[common]
    return float(chisquare(s, e * s.sum() / e.sum()).pvalue)


@pytest.mark.parametrize("std", [0.2, 0.5, 1.0, 1.5, 3.7, 20.0, 1 / 3])
def test_values_have_their_probabilities(std: float) -> None:
    sample = SecureNoise().discrete_gaussian(200_000, std)
    assert sample.dtype == np.int64
    assert fit(sample, std) > FALSE_ALARM
    if std >= 0.5:
        assert fit(sample, 1.05 * std) < FALSE_ALARM  # 10 % more variance, and less, are noticed
        assert fit(sample, 0.95 * std) < FALSE_ALARM


def test_rounded_normal_values_are_another_distribution() -> None:
    """The negative control of the one above: what floats would give."""
    rng = np.random.default_rng(0)
    assert fit(np.rint(rng.normal(0, 1.0, 200_000)).astype(np.int64), 1.0) < FALSE_ALARM


@pytest.mark.parametrize("std", [300.0, 1e6, 2.0**31 + 0.3, 2.0**40])
def test_the_variance_of_large_noise(std: float) -> None:
    n = 100_000
    sample = SecureNoise().discrete_gaussian(n, std).astype(float)
    statistic = float((sample**2).sum()) / std**2  # as of a normal distribution: that is what it is, to 10⁻⁶ and less
    low, high = chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], n)
    assert low < statistic < high
    assert not low < 0.9 * statistic < high
    assert abs(sample.mean()) < 6 * std / math.sqrt(n)
    quarters = np.quantile(sample / std, [0.25, 0.75])
    assert np.allclose(quarters, [-0.6745, 0.6745], atol=0.03)


def test_a_sum_of_shares_has_the_planned_variance() -> None:
    """σ²/m each, of m partners: together σ², and one share less is noticed."""
    std, partners, n = 40.0, 4, 60_000
    shares = [SecureNoise().discrete_gaussian(n, std / math.sqrt(partners)) for _ in range(partners)]
    low, high = chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], n)
    together = float((np.sum(shares, axis=0).astype(float) ** 2).sum()) / std**2
    assert low < together < high
    assert not low < 0.9 * together < high
    assert not low < float((np.sum(shares[1:], axis=0).astype(float) ** 2).sum()) / std**2 < high
    assert abs(np.corrcoef(shares[0], shares[1])[0, 1]) < 6 / math.sqrt(n)


def _stream(seed: int) -> Callable[[int], NDArray[np.uint64]]:
    rng = np.random.default_rng(seed)
    return lambda count: rng.integers(0, 2**64, count, dtype=np.uint64)


@pytest.mark.parametrize("std", [0.5, 1.0, 7.3, 1e5])
def test_floats_decide_as_whole_numbers_do(monkeypatch: pytest.MonkeyPatch, std: float) -> None:
    """Every comparison made exactly, with more bits than the floats saw: the same values of the same stream."""
    by_float, exact = [], []
    for margin, kept in ((noise._MARGIN, by_float), (4.0, exact)):
        monkeypatch.setattr(noise, "_MARGIN", margin)
        for seed in range(6):
            monkeypatch.setattr(noise, "_keystream", lambda seed=seed: _stream(seed))
            if margin == 4.0:
                # what decides further bits must not take them from the stream that both read
                monkeypatch.setattr(noise._Real, "less", _never_undecided)
            kept.append(SecureNoise().discrete_gaussian(20, std))
    assert all((a == b).all() for a, b in zip(by_float, exact, strict=True))


def _never_undecided(real: noise._Real, x: Fraction) -> bool:
    low, high = noise._exp(x, 128)
    value = Fraction(real._bits, 1 << real._size)
    assert value + Fraction(1, 1 << real._size) <= low or value >= high
    return value < low


def test_a_comparison_that_64_bits_leave_open_takes_more() -> None:
    drawn: list[int] = []

    def draw(count: int) -> NDArray[np.uint64]:
        drawn.append(count)
        return np.zeros(count, np.uint64) if len(drawn) < 3 else np.full(count, 2**64 - 1, np.uint64)

    low, _ = noise._exp(Fraction(1), 300)
    begins = int(low * 2**64)  # the first 64 bits of 1/e: the next ones decide
    assert noise._Real(begins, draw).less(Fraction(1))  # followed by zeros it is below
    assert drawn == [1]
    assert not noise._Real(begins, lambda count: np.full(count, 2**64 - 1, np.uint64)).less(Fraction(1))
    assert noise._Real(begins - 1, draw).less(Fraction(1))
    assert not noise._Real(begins + 1, draw).less(Fraction(1))
    assert drawn == [1]


@pytest.mark.parametrize(
    "x", [Fraction(0), Fraction(1, 3), Fraction(1), Fraction(700), Fraction(10**6), Fraction(1, 10**30)]
)
def test_exponentials_are_bracketed(x: Fraction) -> None:
    low, high = noise._exp(x, 200)
    assert high - low <= Fraction(1, 1 << 200)
    assert float(low) <= math.exp(-x) * (1 + 1e-15) + 1e-60
    assert float(high) >= math.exp(-x) * (1 - 1e-15)
    finer_low, finer_high = noise._exp(x, 400)
    assert low <= finer_low <= finer_high <= high


def test_small_words_and_edges() -> None:
    words = noise._Words(_stream(3))
    assert set(words.below(5000, 3)) == {0, 1, 2}
    assert chisquare(np.bincount(words.below(60_000, 7), minlength=7)).pvalue > FALSE_ALARM
    k = words.exponents(100_000)
    expected = [math.exp(-j) * (1 - math.exp(-1)) for j in range(8)]
    seen = [int((k == j).sum()) for j in range(8)]
    assert (
        chisquare([*seen, len(k) - sum(seen)], [*(len(k) * e for e in expected), len(k) * math.exp(-8)]).pvalue
        > FALSE_ALARM
    )
    zero = noise._Words(lambda count: np.zeros(count, np.uint64) if count > 1 else np.full(1, 2**64 - 1, np.uint64))
    assert list(zero.exponents(2)) == [44, 44]  # 64 zeros and 64 ones: between e^-45 and e^-44
    assert len(SecureNoise().discrete_gaussian(0, 1.0)) == 0


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, math.inf, 2.0**41])
def test_what_is_no_parameter(std: Any) -> None:
    with pytest.raises(ConfigError, match="parameter of discrete noise"):
        SecureNoise().discrete_gaussian(3, std)
