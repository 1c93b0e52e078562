"""The agreed terms as privacy events: what one run will cost each partner, before any of it is spent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from .accounting import MAX_STEPS, Budget, PrivacyEvent
from .config import Algorithm, Evaluation, Privacy
from .identity import canonical, sha256

SOFTWARE = f"hansa {version('hansa')}"
UNPROTECTED = {"mechanism": "none/1"}


@dataclass(frozen=True)
class PlanItem:
    """`count` times an event for one purpose ("train" or "evaluate"); event None: unprotected, ε is unbounded."""

    purpose: str
    count: int
    event: PrivacyEvent | None

    def to_fields(self) -> dict[str, Any]:
        """As a ledger has it."""
        return {"purpose": self.purpose, "count": self.count, "event": event_fields(self.event)}


def event_fields(event: PrivacyEvent | None) -> dict[str, Any]:
    """An event as a ledger has it."""
    return dict(UNPROTECTED) if event is None else dict(event.to_fields())


def event_from(fields: dict[str, Any]) -> PrivacyEvent | None:
    """Back from `event_fields`.

    Raises:
        LedgerError: an event of an unknown kind or version.
    """
    return None if fields == UNPROTECTED else PrivacyEvent.from_fields(fields)


def evaluated_rounds(rounds: int, every: int) -> list[int]:
    """The rounds after which the model is measured: every `every`-th and the last."""
    return [r for r in range(1, rounds + 1) if r % every == 0 or r == rounds]


def plan_of(algorithm: Algorithm, privacy: Privacy, evaluation: Evaluation) -> tuple[PlanItem, ...]:
    """What one partner does in a whole run, at most (with partial participation it may do less)."""
    train = None
    if privacy.kind == "local":
        assert privacy.noise_multiplier is not None
        train = PrivacyEvent(algorithm.local.sampling_rate, privacy.noise_multiplier, algorithm.local.steps)
    return (PlanItem("train", algorithm.rounds, train), *_evaluations(algorithm, evaluation))


def _evaluations(algorithm: Algorithm, evaluation: Evaluation) -> tuple[PlanItem, ...]:
    if evaluation.kind != "private":
        return ()
    assert evaluation.noise_multiplier is not None
    count = -(-algorithm.rounds // evaluation.every)  # as many as `evaluated_rounds` has
    return (PlanItem("evaluate", count, PrivacyEvent(1.0, evaluation.noise_multiplier, 1)),)


def plan_sha256(plan: Iterable[PlanItem]) -> str:
    """The name of a plan."""
    return sha256(canonical([item.to_fields() for item in plan]))


def events_of(plan: Iterable[PlanItem]) -> list[PrivacyEvent]:
    """The protected events of a plan, equal ones merged."""
    return [
        PrivacyEvent(i.event.sampling_rate, i.event.noise_multiplier, i.event.steps * i.count)
        for i in plan
        if i.event is not None and i.count
    ]


Caps = Mapping[str, tuple[Budget, Sequence[PrivacyEvent]]]
"""Caps that must all hold: what each is called -> its filter, and what was spent and is held under it already."""


def stopped_by(caps: Caps, asked: Sequence[PrivacyEvent]) -> list[str]:
    """The caps that do not admit `asked` after what was taken, each decided as a node's gate does; none: it fits."""
    return [name for name, (budget, taken) in caps.items() if not budget.admits([*taken, *asked])]


def largest(admitted: Callable[[int], bool], most: int) -> int:
    """The largest count from 1 to `most` that is admitted, where fewer of an admitted count are; 0 if none is."""
    low, high = 0, 1
    while high <= most and admitted(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if admitted(middle) else (low, middle)
    return low


def calibrated(algorithm: Algorithm, privacy: Privacy, evaluation: Evaluation) -> float | None:
    """The noise multiplier that a charter fixes: the one that was given, else the least at which its own filter admits all rounds.

    What a data set spent before does not enter: every partner signs the same noise, and no ledger but its own tells a node
    what is left.

    Raises:
        Refused: no noise is enough for this ε.
    """
    if privacy.kind == "none" or privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    steps = algorithm.rounds * algorithm.local.steps
    before = evaluations_of(algorithm, evaluation)
    return budget_of(privacy, algorithm).calibrate(algorithm.local.sampling_rate, steps, before)


def evaluations_of(algorithm: Algorithm, evaluation: Evaluation) -> list[PrivacyEvent]:
    """The protected events of a plan that do not train: they cost what they cost, at whatever noise the training has."""
    return events_of(_evaluations(algorithm, evaluation))


def budget_of(privacy: Privacy, algorithm: Algorithm) -> Budget:
    """The filter that a charter's ε and δ create, with branches that serve the charter's own plan."""
    assert privacy.epsilon is not None
    assert privacy.delta is not None
    local = algorithm.local
    steps = min(algorithm.rounds * local.steps, MAX_STEPS)
    return Budget.create(privacy.epsilon, privacy.delta, (local.sampling_rate, steps))
