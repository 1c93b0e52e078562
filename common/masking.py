"""What secure aggregation needs of a charter, and how what it exchanges stands in messages. For both sides; no I/O.

Numbers on a grid: of shared noise that of its event; otherwise updates, weighted and in steps of 2⁻²², which is as fine as float32
is around 1.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .charter import Charter
from .errors import ConfigError, MessageError
from .plan import Terms, attempts, training_of
from .secagg import RINGS, Agreement, Revealed, Sent, ring_for
from .shared_noise import SharedGaussian

GRID = 2.0**-22
"""Of updates that are private by themselves, or not protected."""
LIMIT = 500.0
"""No value of such an update is larger: with weights that sum to 1 a sum then fits into 32 bits."""


@dataclass(frozen=True)
class FixedPoint:
    """How real numbers stand in the ring.

    Attributes:
        grid: one step.
        bits: of the ring.
        log2_wrap: of a bound on the probability that any sum of a run wraps.
    """

    grid: float
    bits: int
    log2_wrap: float

    def to_grid(self, update: npt.NDArray[np.float64], weight: float) -> npt.NDArray[np.int64]:
        """An update that is private by itself, weighted and rounded.

        Raises:
            MessageError: it has a value that is not finite or beyond LIMIT.
        """
        if not (np.abs(update) <= LIMIT).all():  # also where it is NaN
            raise MessageError(f"an update with a value that is not finite, or beyond {LIMIT:g}")
        return np.rint(update * (weight / self.grid)).astype(np.int64)

    def from_grid(self, total: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Back from a sum."""
        return np.multiply(total, self.grid, dtype=np.float64)


def fixed_point(charter: Charter) -> FixedPoint:
    """The grid, and the smallest ring in which the sums of a whole run wrap with probability 2⁻⁴⁰ at most.

    Raises:
        ConfigError: no ring is large enough.
    """
    return fixed_point_of(charter, [m.declared_records for m in charter.partners], charter.declared_tolerance)


def fixed_point_of(terms: Terms, declared: Sequence[int], tolerance: float) -> FixedPoint:
    """The same before there is a charter.

    Args:
        declared: every partner's declared number of records, which its real one exceeds by `tolerance` at most.
    """
    event = training_of(terms)
    if not isinstance(event, SharedGaussian):
        return FixedPoint(GRID, RINGS[0], -math.inf)
    # Every gradient may be its clip, in one coordinate and one direction: nothing is assumed of the data.
    records = sum(math.floor(size * (1 + tolerance)) for size in declared)
    bound = records * event.clip_norm / event.grid + len(declared)
    if bound * 1024 > 2**53:  # a partner adds up whole numbers of 1/1024 of the grid, in float64
        raise ConfigError(
            f"secure aggregation of {records} records and {event.dimension} parameters: their sum is not exact in float64",
            "Declare fewer records, or train a smaller model.",
        )
    std = event.share_std * math.sqrt(len(declared))
    try:
        bits, chance = ring_for(bound, std, attempts(terms) * event.dimension)
    except ValueError as err:
        raise ConfigError(f"secure aggregation: {err}", "Declare fewer records or lower the noise.") from err
    return FixedPoint(event.grid, bits, chance)


def weights_of(charter: Charter) -> dict[str, float]:
    """Each partner's share in the mean of updates, from agreed and public sizes; they sum to 1. They apply after the noise."""
    uniform = charter.algorithm.weighting == "uniform"
    sizes = {m.name: 1 if uniform else m.declared_records for m in charter.partners}
    return {name: size / sum(sizes.values()) for name, size in sizes.items()}


# -- in messages ---------------------------------------------------------------------------------------------------------


def asked_fields(agreed: Agreement, envelopes: Mapping[str, bytes]) -> dict[str, Any]:
    """What the coordinator tells of an attempt; what is not here everybody has: charter, run, round and model."""
    return {
        "attempt": agreed.attempt,
        "keys": [[name, _text(envelopes[name])] for name in agreed.roster],
        "threshold": agreed.threshold,
        "quorum": agreed.quorum,
        "bits": agreed.bits,
        "length": agreed.length,
    }


@dataclass(frozen=True)
class Told:
    """What was told of an attempt, with nothing checked but its layout."""

    attempt: int
    envelopes: Mapping[str, bytes]
    threshold: int
    quorum: int
    bits: int
    length: int

    @classmethod
    def parse(cls, fields: object) -> Told:
        """Back from `asked_fields`.

        Raises:
            MessageError: malformed.
        """
        numbers = ("attempt", "threshold", "quorum", "bits", "length")
        if not isinstance(fields, dict) or set(fields) != {*numbers, "keys"}:
            raise MessageError("a request that does not say what its attempt at secure aggregation is")
        if not all(type(fields[name]) is int and 0 <= fields[name] <= 10**9 for name in numbers):
            raise MessageError("an attempt at secure aggregation with a number that is none")
        pairs = fields["keys"]
        if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise MessageError("an attempt at secure aggregation without a roster")
        envelopes = {_name(name): _bytes(key) for name, key in pairs}
        if len(envelopes) != len(pairs):
            raise MessageError("a roster with one partner twice")
        return cls(envelopes=envelopes, **{name: fields[name] for name in numbers})

    def agreement(
        self, charter_sha256: str, run_id: str, number: int, model_sha256: str, keys: Mapping[str, str]
    ) -> Agreement:
        """What the attempt comes to, with the keys as `read_keys` found them. To be checked (`Agreement.check`)."""
        return Agreement(
            charter_sha256,
            run_id,
            number,
            self.attempt,
            model_sha256,
            {name: keys[name] for name in self.envelopes},
            self.threshold,
            self.quorum,
            self.bits,
            self.length,
        )


def sent_fields(sent: Sent) -> dict[str, Any]:
    """What goes with a masked vector."""
    return {
        "word": _text(sent.word),
        "shares": {name: _text(share) for name, share in sent.shares.items()},
        "commitments": dict(sent.commitments),
    }


def sent_from(fields: object) -> Sent:
    """Back from `sent_fields`.

    Raises:
        MessageError: malformed.
    """
    if not isinstance(fields, dict) or set(fields) != {"word", "shares", "commitments"}:
        raise MessageError("a masked vector without what goes with it")
    commitments = fields["commitments"]
    if not isinstance(commitments, dict) or not all(isinstance(one, str) for one in commitments.values()):
        raise MessageError("a masked vector without commitments")
    return Sent(_bytes(fields["word"]), bytes_by_name(fields["shares"]), commitments)


def revealed_fields(revealed: Revealed) -> dict[str, Any]:
    """What a survivor reveals."""
    return {
        "own": by_name(revealed.own),
        "dropped": by_name(revealed.dropped),
        "between": [[one, other, _text(share)] for (one, other), share in revealed.between.items()],
    }


def revealed_from(fields: object) -> Revealed:
    """Back from `revealed_fields`.

    Raises:
        MessageError: malformed.
    """
    if not isinstance(fields, dict) or set(fields) != {"own", "dropped", "between"}:
        raise MessageError("an answer that reveals nothing")
    triples = fields["between"]
    if not isinstance(triples, list) or not all(isinstance(one, list) and len(one) == 3 for one in triples):
        raise MessageError("shares between partners that are malformed")
    between = {(_name(one), _name(other)): _bytes(share) for one, other, share in triples}
    return Revealed(bytes_by_name(fields["own"]), bytes_by_name(fields["dropped"]), between)


def by_name(given: Mapping[str, bytes]) -> dict[str, str]:
    """Bytes by partner, as text."""
    return {name: _text(one) for name, one in given.items()}


def bytes_by_name(fields: object) -> dict[str, bytes]:
    """Back from `by_name`.

    Raises:
        MessageError: malformed.
    """
    if not isinstance(fields, dict):
        raise MessageError("no bytes by partner")
    return {_name(name): _bytes(one) for name, one in fields.items()}


def _name(value: object) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= 63:
        raise MessageError("a partner without a name")
    return value


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(value: object) -> bytes:
    if not isinstance(value, str):
        raise MessageError("bytes that are no text")
    try:
        return base64.b64decode(value, validate=True)
    except ValueError as err:
        raise MessageError("bytes that are not base64") from err
