"""The agreed terms as privacy events: what one run will cost each partner, before any of it is spent."""

from __future__ import annotations

from collections.abc import Iterable
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
    count = len(evaluated_rounds(algorithm.rounds, evaluation.every))
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


def calibrated(
    algorithm: Algorithm, privacy: Privacy, evaluation: Evaluation, spent: Iterable[PrivacyEvent] = ()
) -> float | None:
    """The noise multiplier of a run: the one that was given, else the least that the filter admits for all its rounds.

    Raises:
        Refused: no noise is enough for what is left of the budget.
    """
    if privacy.kind == "none" or privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    steps = algorithm.rounds * algorithm.local.steps
    before = [*spent, *events_of(_evaluations(algorithm, evaluation))]
    return budget_of(privacy, algorithm).calibrate(algorithm.local.sampling_rate, steps, before)


def budget_of(privacy: Privacy, algorithm: Algorithm) -> Budget:
    """The filter that a charter's ε and δ create, with branches that serve the charter's own plan."""
    assert privacy.epsilon is not None
    assert privacy.delta is not None
    local = algorithm.local
    steps = min(algorithm.rounds * local.steps, MAX_STEPS)
    return Budget.create(privacy.epsilon, privacy.delta, (local.sampling_rate, steps))
