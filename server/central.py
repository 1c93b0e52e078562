"""Central noise: one sum of clipped updates a round, of a secret sample of the clients, with noise once (client-level DP).

McMahan et al. (1710.06963) with a fixed divisor: each client takes part with probability q, its update, one vector over all tensors,
is clipped to L2 norm C, and (Σ + N(0, σ²C²)) / (q·N) is the round's mean. Rules that are easy to get wrong, and kept here:

- the sample comes from the cryptographic generator: amplification by sampling holds only while nobody knows who was in it;
- the divisor is q times the *registered* number of clients, whatever came: a realised size would depend on one client;
- who failed, refused or sent what is not finite adds exactly zero; an empty cohort is noise alone; a round in which somebody's
  slowness kept others out is not used at all;
- no round is given up because few came: who is in a cohort would show in which rounds are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..common.accounting import PrivacyEvent
from ..common.charter import Charter
from ..common.errors import MessageError
from ..common.messages import Tensors, pieces
from ..common.model import Arrays, zeros_like
from ..common.noise import SecureNoise
from ..common.plan import training_of

_ROUNDING = 1e-9
"""What float64 may err in a norm, relatively, by far: clipped updates are shorter by so much, so that none is longer than C."""


@dataclass(frozen=True)
class CentralNoise:
    """What one round of client-level training is; the event that is accounted and what is drawn come from this object.

    Args:
        clients: N, how many are registered; public.
        event: q and σ, one step.
        clip_norm: C, the L2 norm of one client's update.
    """

    clients: int
    event: PrivacyEvent
    clip_norm: float

    @classmethod
    def of(cls, charter: Charter) -> CentralNoise:
        """As a charter with central noise has it."""
        event = training_of(charter)
        assert isinstance(event, PrivacyEvent)
        assert charter.population is not None
        assert charter.privacy.clip_norm is not None
        return cls(charter.population.clients, event, charter.privacy.clip_norm)

    def cohort(self, clients: Sequence[str]) -> list[str]:
        """A fresh secret sample, in order."""
        drawn = np.flatnonzero(SecureNoise().bernoulli(len(clients), self.event.sampling_rate))
        return [clients[int(i)] for i in drawn]


class ClippedSum:
    """The sum over one round's updates, which leaves with its noise only.

    *Formal guarantees.* With `clients` drawn by `CentralNoise.cohort` and each added once or not at all, `noised` is the result of
    `CentralNoise.event` on the set of registered clients, post-processed: one client changes the sum by a vector of norm at most C,
    in float64 (clipping, sum and noise). Not covered: that float64 noise is not exactly normal (see `SecureNoise`), and how long a
    round took.

    Args:
        model: whose tensors every update has.
    """

    def __init__(self, terms: CentralNoise, model: Arrays) -> None:
        self._terms = terms
        self._shapes = {name: value.shape for name, value in model.items()}
        self._total: dict[str, npt.NDArray[np.float64]] | None = zeros_like(model, np.float64)

    def add(self, update: Tensors) -> None:
        """Clip an update and add it; one that is not finite adds zero.

        Raises:
            MessageError: its tensors are not the model's; nothing was added.
        """
        assert self._total is not None, "it left already"
        if {n: v.shape for n, v in update.items()} != self._shapes or any(
            v.dtype != np.float32 for v in update.values()
        ):
            raise MessageError("an update with other tensors than the model")
        scale = clipping(update, self._terms.clip_norm)
        if scale == 0.0:
            return  # also what is not finite, which times zero is not zero
        for name, value in update.items():
            to = self._total[name].reshape(-1)
            for at, piece in pieces(value):
                to[at : at + len(piece)] += np.multiply(piece, scale, dtype=np.float64)

    def noised(self) -> dict[str, npt.NDArray[np.float64]]:
        """(Σ + N(0, σ²C²)) / (q·N), float64 by name; once, so that no sum leaves under two noises."""
        total, self._total = self._total, None
        assert total is not None, "it left already"
        event, noise = self._terms.event, SecureNoise()
        for value in total.values():
            value += noise.gaussian(value.shape, event.noise_multiplier * self._terms.clip_norm)
            value /= event.sampling_rate * self._terms.clients
        return total


def clipping(update: Mapping[str, npt.NDArray[Any]], clip_norm: float) -> float:
    """What an update is multiplied by to have L2 norm at most `clip_norm` over all its tensors; 0.0 if a value is not finite."""
    squared = 0.0
    for value in update.values():
        for _, piece in pieces(value):
            wide = piece.astype(np.float64)  # squares of float32 overflow in float32, not here
            squared += float(np.dot(wide, wide))
    norm = math.sqrt(squared) * (1 + _ROUNDING) if math.isfinite(squared) else math.inf
    if not math.isfinite(norm):
        return 0.0
    return 1.0 if norm <= clip_norm else clip_norm / norm
