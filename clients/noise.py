"""Randomness that protects people: Gaussian noise and Poisson sampling from a cryptographic generator.

Neither may come from a seeded generator: whoever knows the seed subtracts the noise, and amplification by
sampling assumes that nobody knows who was sampled. Seeds from a configuration are for initialisation and
partitions only.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from ..common.errors import ConfigError

_DRAWS = 4
_BLOCK = 4096  # values worked on at a time; even, and small enough for the temporaries to stay in the cache


def _keystream() -> Callable[[int], NDArray[np.uint64]]:
    """A stream of uniform 64-bit words: AES-256-CTR under a fresh key from the operating system.

    A new key for every call of a public method (11 µs): no state lives on that a fork would duplicate (two
    processes drawing the same noise), that a memory dump would turn into past noise, or that could be logged.
    """
    encryptor = Cipher(algorithms.AES256(os.urandom(32)), modes.CTR(bytes(16))).encryptor()
    return lambda count: np.frombuffer(encryptor.update(bytes(8 * count)), dtype=np.uint64)


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
        if not (math.isfinite(std) and std >= 0):
            raise ConfigError(f"the standard deviation of noise is {std}", "It must be finite and not negative.")
        values = np.empty(shape, dtype=np.float64)
        flat = values.reshape(-1)
        words = _keystream()
        for start in range(0, flat.size, _BLOCK):
            part = flat[start : start + _BLOCK]
            part[:] = _block(words, part.size + part.size % 2)[: part.size]
        values *= std / math.sqrt(_DRAWS)
        return values

    def bernoulli(self, n: int, q: float) -> NDArray[np.bool_]:
        """Who takes part in a step: n independent coins (Poisson sampling).

        Args:
            n: number of records.
            q: probability that the accountant charges for, 0 to 1.

        Returns:
            bool [n]. A coin is heads when a uniform 64-bit integer is below floor(q·2⁶⁴): rounded *down*, so
            the realised rate never exceeds q (and equals it exactly for every float q ≥ 2⁻¹²).

        Raises:
            ConfigError: q is outside 0 to 1.
        """
        if not 0 <= q <= 1:
            raise ConfigError(f"the sampling rate is {q}", "It must lie between 0 and 1.")
        if q == 1:
            return np.ones(n, dtype=np.bool_)  # the threshold 2⁶⁴ does not fit in 64 bits
        return _keystream()(n) < np.uint64(int(q * 2.0**64))


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
