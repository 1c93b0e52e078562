"""One client's side of an exchange in virtual seconds, by chance; who of them answers in time, and how long that takes.

Pure functions of a configuration's `system`, a seed, clients, rounds and the virtual time: nothing is remembered between calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..common.config import System

ANSWERED, UNAVAILABLE, DROPPED_OUT, TOO_LATE, NOT_NEEDED = FATES = (
    "answered",
    "unavailable",
    "dropped out",
    "too late",
    "not needed",
)
_TRAITS, _MOMENT = 1, 2  # so that no two purposes share a stream


@dataclass(frozen=True)
class Timeline:
    """One client's side of an exchange; seconds from its begin.

    Attributes:
        down, up: bytes of the request and of the reply.
        down_s, up_s: how long they take, latency included.
        work_s: between them.
        there: it can be reached; who cannot gets no request.
        stays: it answers at all.
    """

    down: int
    up: int
    down_s: float
    work_s: float
    up_s: float
    there: bool = True
    stays: bool = True

    @property
    def arrival_s(self) -> float:
        """When its reply is there; infinite for one that never comes."""
        return self.down_s + self.work_s + self.up_s if self.there and self.stays else math.inf

    def moved(self, end_s: float) -> tuple[float, float]:
        """Bytes down and up until the exchange was over. Who drops out does so before it uploads."""
        if self.arrival_s <= end_s < math.inf:  # all of them: differences of floats might lose the last
            return self.down, self.up
        down = self.down * _share(end_s, self.down_s) if self.there else 0.0
        left = end_s - self.down_s - self.work_s
        return down, self.up * _share(left, self.up_s) if self.arrival_s < math.inf else 0.0


def _share(passed_s: float, whole_s: float) -> float:
    return min(max(passed_s / whole_s, 0.0), 1.0) if whole_s > 0 else float(passed_s >= 0)


@dataclass(frozen=True)
class Settled:
    """What an exchange comes to.

    Attributes:
        fates: one of FATES a timeline, in order.
        seconds: how long it lasts.
        down, up: bytes on all wires until then.
    """

    fates: list[str]
    seconds: float
    down: float
    up: float


def settle(timelines: Sequence[Timeline], wanted: int, deadline_s: float) -> Settled:
    """Who answers in time: the first `wanted` of those that arrive by the deadline, ties in the order given.

    The exchange ends with the last of them, or at the deadline when fewer arrive: nobody is told that the others never will.
    """
    arriving = enumerate(t.arrival_s for t in timelines)
    arrivals = sorted((at, index) for index, at in arriving if at <= deadline_s and at < math.inf)
    answering = arrivals[:wanted]
    enough = len(answering) == min(wanted, len(timelines))
    end_s = max((at for at, _ in answering), default=0.0) if enough else deadline_s
    fates = [TOO_LATE if t.arrival_s < math.inf else DROPPED_OUT if t.there else UNAVAILABLE for t in timelines]
    for _, index in arrivals:
        fates[index] = NOT_NEEDED
    for _, index in answering:
        fates[index] = ANSWERED
    if enough:  # the deadline never came: who would have missed it was not waited for either
        fates = [NOT_NEEDED if fate == TOO_LATE else fate for fate in fates]
    moved = [t.moved(end_s) for t in timelines]
    return Settled(fates, end_s, math.fsum(d for d, _ in moved), math.fsum(u for _, u in moved))


class Draws:
    """What chance makes of clients: the same for the same seed, whoever else is asked and in whatever order.

    Every number is drawn whether it is needed or not, so that one setting changed leaves the others' chances as they are.
    """

    def __init__(self, system: System, seed: int) -> None:
        self._system, self._seed = system, seed

    def traits(self, client: int) -> tuple[float, float]:
        """By which factors a client computes and transfers more slowly than the median: exp(σ z), for all of a run."""
        z = np.random.default_rng((_TRAITS, self._seed, client)).standard_normal(2)
        return math.exp(self._system.compute.spread * z[0]), math.exp(self._system.network.spread * z[1])

    def moment(self, client: int, number: int, attempt: int, at_s: float) -> tuple[bool, bool, float]:
        """In one round: whether it is there at `at_s` of the virtual clock, whether it drops out, its slowdown."""
        u = np.random.default_rng((_MOMENT, self._seed, client, number, attempt)).random(3)
        straggling = self._system.stragglers
        slowdown = straggling.slowdown if u[2] < straggling.share else 1.0
        return bool(u[0] < available(self._system, at_s)), bool(u[1] < self._system.dropout), slowdown


def available(system: System, at_s: float) -> float:
    """With which probability a client is there at this second of the virtual clock."""
    a = system.availability
    return a.share * (1 + a.daily_swing * math.cos(2 * math.pi * (at_s / 3600 - a.peak_hour) / 24))
