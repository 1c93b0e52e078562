"""Randomness that protects people: Gaussian noise and Poisson sampling from a cryptographic generator.

Neither may come from a seeded generator: whoever knows the seed subtracts the noise, and amplification by
sampling assumes that nobody knows who was sampled. Seeds from a configuration are for initialisation and
partitions only.
"""

from __future__ import annotations

import decimal
import itertools
import math
import os
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from .errors import ConfigError

_DRAWS = 4
_QUICK = 2**15
_BLOCK = 4096  # values worked on at a time; even, and small enough for the temporaries to stay in the cache


def _keystream() -> Callable[[int], NDArray[np.uint64]]:
    """A stream of uniform 64-bit words: AES-256-CTR under a fresh key from the operating system.

    A new key for every call of a public method (11 µs): no state lives on that a fork would duplicate (two
    processes drawing the same noise), that a memory dump would turn into past noise, or that could be logged.
    """
    encryptor = Cipher(algorithms.AES256(os.urandom(32)), modes.CTR(bytes(16))).encryptor()
    return lambda count: np.frombuffer(encryptor.update(bytes(8 * count)), dtype=np.uint64)


def _check_std(std: float) -> None:
    if not (math.isfinite(std) and std >= 0):
        raise ConfigError(f"the standard deviation of noise is {std}", "It must be finite and not negative.")


class SecureNoise:
    """Noise and sampling that nobody can predict or repeat; it has no seed and keeps no state.

    *Formal guarantees.* Under AES-CTR as a pseudorandom generator, `gaussian` gives independent normal values
    up to the resolution of float64, and `bernoulli` independent coins whose probability never exceeds q.

    Floating-point noise leaks through its low bits: the values that one draw can take are sparse, so that an
    observed sum tells which ones are possible (Mironov 2012). Each value is therefore the sum of four
    Box-Muller draws over two, each from its own pair of 53-bit uniforms, as Holohan & Braghin (2107.10138,
    section 5.1) propose and as Opacus' secure mode does: inverting it means searching the combinations. That
    is a mitigation, not a proof; the discrete Gaussian has one. Tails end at 17.1 standard deviations
    (probability < 1e-60).
    """

    def gaussian(self, shape: int | Sequence[int], std: float) -> NDArray[np.float64]:
        """Independent normal values of mean 0.

        Args:
            shape: shape of the result.
            std: standard deviation, in the unit of what it is added to.

        Returns:
            float64 of that shape.

        Raises:
            ConfigError: std is negative or not finite.
        """
        _check_std(std)
        values = np.empty(shape, dtype=np.float64)
        flat = values.reshape(-1)
        words = _keystream()
        for start in range(0, flat.size, _BLOCK):
            part = flat[start : start + _BLOCK]
            part[:] = _block(words, part.size + part.size % 2)[: part.size]
        values *= std / math.sqrt(_DRAWS)
        return values

    def quick_gaussian(self, shape: int | Sequence[int], std: float) -> NDArray[np.float32]:
        """As `gaussian`, in float32 and one draw a value: a sixth of the time, for simulations.

        Nobody's records are protected by it: low bits of float32 leak (see the class), and tails end at 6.7 standard deviations
        (probability 2e-11). Still no seed tells the noise, and no two calls or processes draw the same.

        Raises:
            ConfigError: std is negative or not finite.
        """
        _check_std(std)
        values = np.empty(shape, dtype=np.float32)
        flat = values.reshape(-1)
        words = _keystream()
        for start in range(0, flat.size, _QUICK):
            part = flat[start : start + _QUICK]
            half = -(-part.size // 2)
            bits = words(half).view(np.uint32)
            radius = bits[:half].astype(np.float32)
            radius += np.float32(0.5)
            radius *= np.float32(2.0**-32)  # in (0, 1]
            np.log(radius, out=radius)
            radius *= np.float32(-2)
            np.sqrt(radius, out=radius)
            radius *= np.float32(std)
            angle = bits[half:].astype(np.float32)
            angle *= np.float32(2 * math.pi * 2.0**-32)
            np.multiply(radius, np.cos(angle), out=part[:half])
            rest = part.size - half
            np.multiply(radius[:rest], np.sin(angle[:rest]), out=part[half:])
        return values

    def discrete_gaussian(self, n: int, std: float) -> NDArray[np.int64]:
        """Independent draws from the discrete Gaussian: P[k] proportional to exp(−k²/(2·std²)), k an integer.

        Exact: no float rounds a probability (Canonne, Kamath & Steinke 2004.00010, algorithms 1 to 3). Where they toss a coin of
        probability exp(−x), the first 64 bits of a uniform real are compared with a float that is known to 2⁻⁴⁰; when these do not
        decide, more bits and digits are taken until they do.

        Args:
            n: how many.
            std: the parameter σ, as exactly the rational number that this float is. The variance is at most σ².

        Returns:
            int64 [n].

        Raises:
            ConfigError: std is not above 0, or is above 2⁴⁰.
        """
        if not 0 < std <= 2**40:
            raise ConfigError(f"the parameter of discrete noise is {std}", "It must lie above 0 and at most 2^40.")
        variance = Fraction(std) ** 2
        scale = math.isqrt(variance.numerator // variance.denominator) + 1
        centre, words = float(variance / scale), _Words(_keystream())
        made, have = np.empty(n, np.int64), 0
        while have < n:
            drawn = _discrete_laplace(words, 2 * (n - have) + 64, scale)
            size = np.abs(drawn)
            x = (size - centre) ** 2 / (2 * float(variance))

            def exactly(i: int, size: NDArray[np.int64] = size) -> Fraction:
                return (int(size[i]) - variance / scale) ** 2 / (2 * variance)

            accepted = drawn[words.coins(x, exactly)][: n - have]
            made[have : have + len(accepted)] = accepted
            have += len(accepted)
        return made

    def bernoulli(self, n: int, q: float | NDArray[np.float64]) -> NDArray[np.bool_]:
        """Who takes part in a step: n independent coins (Poisson sampling).

        Args:
            n: number of records.
            q: probability that the accountant charges for, 0 to 1; of all records, or of each [n].

        Returns:
            bool [n]. A coin is heads when a uniform 64-bit integer is below floor(q·2⁶⁴): rounded *down*, so
            the realised rate never exceeds q (and equals it exactly for every float q ≥ 2⁻¹²).

        Raises:
            ConfigError: q is outside 0 to 1.
        """
        if isinstance(q, np.ndarray):
            if not ((q >= 0) & (q <= 1)).all():
                raise ConfigError("a sampling rate is not in 0 to 1", "It must lie between 0 and 1.")
            sure = q == 1
            heads: NDArray[np.bool_] = _keystream()(n) < np.where(sure, 0.0, q * 2.0**64).astype(np.uint64)
            heads |= sure
            return heads
        if not 0 <= q <= 1:
            raise ConfigError(f"the sampling rate is {q}", "It must lie between 0 and 1.")
        if q == 1:
            return np.ones(n, dtype=np.bool_)  # the threshold 2⁶⁴ does not fit in 64 bits
        return _keystream()(n) < np.uint64(int(q * 2.0**64))


_MARGIN = 2.0**-40
"""What a float's probability may be off, relatively. Its true error is below 2⁻⁴³ where the probability is above 2⁻⁶²; below that the
absolute slack decides, exactly."""


class _Words:
    """Uniform 64-bit words, each the beginning of a uniform real number in [0, 1) whose other bits are drawn when they matter."""

    def __init__(self, draw: Callable[[int], NDArray[np.uint64]]) -> None:
        self._draw = draw

    def below(self, n: int, limit: int) -> NDArray[np.int64]:
        """n uniform integers from 0 to limit − 1."""
        whole = 2**64 // limit * limit
        made = self._draw(n)
        while len(odd := np.flatnonzero(made > np.uint64(whole - 1))):
            made = made.copy()
            made[odd] = self._draw(len(odd))
        return (made % np.uint64(limit)).astype(np.int64)

    def coins(self, x: NDArray[np.float64], exactly: Callable[[int], Fraction]) -> NDArray[np.bool_]:
        """Coins that are heads with probability exp(−x).

        Args:
            x: [n], from 0, as floats.
            exactly: index -> the same as a rational number.
        """
        begins = self._draw(len(x))
        share, likely = begins.astype(np.float64) * 2.0**-64, np.exp(-x)
        slack = _MARGIN * likely + 2.0**-52 * share + 2.0**-62
        heads: NDArray[np.bool_] = share < likely
        for i in np.flatnonzero(np.abs(share - likely) <= slack):
            heads[i] = self._less(int(begins[i]), exactly(int(i)))
        return heads

    def exponents(self, n: int) -> NDArray[np.int64]:
        """n integers k with P[k ≥ j] = exp(−j): how often a coin of probability 1/e is heads before it is tails."""
        begins = self._draw(n)
        found = -np.log((begins.astype(np.float64) + 0.5) * 2.0**-64)
        whole = np.floor(found)
        near = np.abs(found - np.rint(found)) <= _MARGIN * (1 + found)
        made = whole.astype(np.int64)
        for i in np.flatnonzero(near | (begins < np.uint64(2**42))):
            real = _Real(int(begins[i]), self._draw)
            made[i] = next(j for j in itertools.count() if not real.less(Fraction(j + 1)))
        return made

    def signs(self, n: int) -> NDArray[np.bool_]:
        """n fair coins."""
        return np.unpackbits(self._draw(-(-n // 64)).view(np.uint8))[:n].astype(np.bool_)

    def _less(self, begins: int, x: Fraction) -> bool:
        return _Real(begins, self._draw).less(x)


class _Real:
    """A uniform real number in [0, 1), of which as many bits are drawn as are asked for."""

    def __init__(self, begins: int, draw: Callable[[int], NDArray[np.uint64]]) -> None:
        self._bits, self._size, self._draw = begins, 64, draw

    def less(self, x: Fraction) -> bool:
        """Whether it is below exp(−x)."""
        while True:
            low, high = _exp(x, self._size + 16)
            if Fraction(self._bits + 1, 1 << self._size) <= low:
                return True
            if Fraction(self._bits, 1 << self._size) >= high:
                return False
            self._bits, self._size = self._bits << 64 | int(self._draw(1)[0]), self._size + 64


def _exp(x: Fraction, bits: int) -> tuple[Fraction, Fraction]:
    """Rational numbers around exp(−x), x from 0, at most 2^−bits apart."""
    with decimal.localcontext() as context:
        context.prec = bits // 3 + 30 + len(str(int(x)))
        context.Emin = decimal.MIN_EMIN
        # The quotient and its exponential are correctly rounded: each off by less than a unit of its last digit.
        middle = Fraction((-decimal.Decimal(x.numerator) / decimal.Decimal(x.denominator)).exp())
    slack = Fraction(1, 1 << (bits + 2))
    return middle - slack, middle + slack


def _discrete_laplace(words: _Words, n: int, scale: int) -> NDArray[np.int64]:
    """At most n draws with P[k] proportional to exp(−|k|/scale) (2004.00010, algorithm 2); those that it rejects are left out."""
    rest = words.below(n, scale)
    rest = rest[words.coins(rest / scale, lambda i: Fraction(int(rest[i]), scale))]
    made = rest + scale * words.exponents(len(rest))
    negative = words.signs(len(made))
    kept: NDArray[np.bool_] = ~(negative & (made == 0))  # one zero, not two
    return np.where(negative, -made, made)[kept].astype(np.int64, copy=False)


def _block(words: Callable[[int], NDArray[np.uint64]], size: int) -> NDArray[np.float64]:
    """`size` (even) sums of four standard normal draws: Box-Muller on 2·size pairs of uniforms."""
    bits = words(_DRAWS * size) >> np.uint64(11)
    radius = (bits[: 2 * size] + np.uint64(1)) * 2.0**-53  # in (0, 1]: its logarithm is finite
    np.log(radius, out=radius)
    radius *= -2
    np.sqrt(radius, out=radius)
    angle = bits[2 * size :] * (2 * math.pi * 2.0**-53)
    a = (radius * np.cos(angle)).reshape(2, size)
    b = (radius * np.sin(angle)).reshape(2, size)
    # a[i] and b[i] share a pair. b is reversed (size is even, so no value meets itself): the four draws of
    # every value come from four pairs. r·cos + r·sin of one pair would only be a single draw, turned by 45
    # degrees.
    total: NDArray[np.float64] = a[0] + a[1] + b[0, ::-1] + b[1, ::-1]
    return total
