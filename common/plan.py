"""The agreed terms as privacy events: what one run will cost each partner, before any of it is spent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol

from .accounting import MAX_STEPS, Budget, PrivacyEvent
from .config import Algorithm, Evaluation, Privacy, SecureAggregation
from .errors import Refusal, Refused
from .identity import canonical, sha256
from .shared_noise import MECHANISM as SHARED
from .shared_noise import SharedGaussian, charged_as, grid_for

SOFTWARE = f"hansa {version('hansa')}"
UNPROTECTED = {"mechanism": "none/1"}

Event = PrivacyEvent | SharedGaussian
"""What can be planned and debited. `charged` is what it costs."""


class Terms(Protocol):
    """What a charter and a configuration agree on, as far as it costs something."""

    @property
    def algorithm(self) -> Algorithm:
        """How the model is trained."""

    @property
    def privacy(self) -> Privacy:
        """With the noise multiplier, where a plan is to be made of it."""

    @property
    def evaluation(self) -> Evaluation:
        """How the model is measured."""

    @property
    def secure_aggregation(self) -> SecureAggregation | None:
        """With the dimension."""

    @property
    def quorum(self) -> int:
        """The least number of partners in a round."""


@dataclass(frozen=True)
class PlanItem:
    """`count` times an event for one purpose ("train" or "evaluate"); event None: unprotected, ε is unbounded."""

    purpose: str
    count: int
    event: Event | None

    def to_fields(self) -> dict[str, Any]:
        """As a ledger has it."""
        return {"purpose": self.purpose, "count": self.count, "event": event_fields(self.event)}


def event_fields(event: Event | None) -> dict[str, Any]:
    """An event as a ledger has it."""
    return dict(UNPROTECTED) if event is None else dict(event.to_fields())


def event_from(fields: dict[str, Any]) -> PrivacyEvent | None:
    """What an event in a ledger is charged as.

    Raises:
        LedgerError: an event of an unknown kind or version.
    """
    if fields == UNPROTECTED:
        return None
    if (
        isinstance(fields, dict) and fields.get("mechanism") == SHARED
    ):  # in a ledger that is not ours it may be anything
        return SharedGaussian.from_fields(fields).charged
    return PrivacyEvent.from_fields(fields)


def charged(event: Event) -> PrivacyEvent:
    """The Gaussian steps that an event costs as much as."""
    return event.charged if isinstance(event, SharedGaussian) else event


def evaluated_rounds(rounds: int, every: int) -> list[int]:
    """The rounds after which the model is measured: every `every`-th and the last."""
    return [r for r in range(1, rounds + 1) if r % every == 0 or r == rounds]


def first_averaged(algorithm: Algorithm) -> int:
    """The first round whose model is in the mean that is the result; one more than there are rounds where it is the last model."""
    return algorithm.rounds + 1 - math.ceil((algorithm.average_last or 0.0) * algorithm.rounds)


def plan_of(terms: Terms) -> tuple[PlanItem, ...]:
    """What one partner does in a whole run, at most (with partial participation it may do less)."""
    return (PlanItem("train", attempts(terms), training_of(terms)), *_evaluations(terms))


def attempts(terms: Terms) -> int:
    """How often a partner trains in one run, at most: its rounds and, under secure aggregation, those asked again."""
    secure = terms.secure_aggregation
    return terms.algorithm.rounds + (secure.retries if secure is not None else 0)


def training_of(terms: Terms) -> Event | None:
    """What one round of training costs. None: unprotected."""
    privacy, local = terms.privacy, terms.algorithm.local
    if privacy.kind == "none":
        return None
    assert privacy.noise_multiplier is not None
    if privacy.kind in ("local", "central"):
        rate, steps = sampled(terms)
        return PrivacyEvent(rate, privacy.noise_multiplier, steps)
    secure = terms.secure_aggregation
    assert secure is not None
    assert secure.dimension is not None
    assert privacy.clip_norm is not None
    return SharedGaussian(
        sampling_rate=local.sampling_rate,
        noise_multiplier=privacy.noise_multiplier,
        clip_norm=privacy.clip_norm,
        grid=grid_for(privacy.clip_norm, secure.dimension),
        dimension=secure.dimension,
        quorum=terms.quorum,
        colluding=secure.colluding,
        steps=1,
    )


def sampled(terms: Terms) -> tuple[float, int]:
    """With what probability one unit (a record, or a client) joins a step, and how many steps a round has."""
    if terms.privacy.unit == "client":
        return terms.algorithm.participation, 1
    return terms.algorithm.local.sampling_rate, terms.algorithm.local.steps


def charged_training(terms: Terms) -> PrivacyEvent:
    """What one round of protected training is charged as."""
    event = training_of(terms)
    assert event is not None
    return charged(event)


def _evaluations(terms: Terms) -> tuple[PlanItem, ...]:
    evaluation = terms.evaluation
    if evaluation.kind != "private":
        return ()
    assert evaluation.noise_multiplier is not None
    count = -(-terms.algorithm.rounds // evaluation.every)  # as many as `evaluated_rounds` has
    return (PlanItem("evaluate", count, PrivacyEvent(1.0, evaluation.noise_multiplier, 1)),)


def plan_sha256(plan: Iterable[PlanItem]) -> str:
    """The name of a plan."""
    return sha256(canonical([item.to_fields() for item in plan]))


def events_of(plan: Iterable[PlanItem]) -> list[PrivacyEvent]:
    """What the protected events of a plan cost, equal ones merged."""
    costs = [(charged(i.event), i.count) for i in plan if i.event is not None and i.count]
    return [PrivacyEvent(e.sampling_rate, e.noise_multiplier, e.steps * count) for e, count in costs]


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


def calibrated(terms: Terms) -> float | None:
    """The noise multiplier that a charter fixes: the one that was given, else the least at which its own filter admits all rounds.

    What a data set spent before does not enter: every partner signs the same noise, and no ledger but its own tells a node
    what is left.

    Raises:
        Refused: no noise is enough for this ε.
    """
    if terms.privacy.kind == "none" or terms.privacy.noise_multiplier is not None:
        return terms.privacy.noise_multiplier
    budget, evaluations = budget_of(terms), evaluations_of(terms)
    try:
        return least_noise(terms, {"": (budget, evaluations)})
    except Refused as err:
        if err.reason is not Refusal.BUDGET or not evaluations:
            raise
        raise Refused(
            Refusal.BUDGET,
            f"no training fits into ε = {budget.epsilon:g} (δ = {budget.delta:g}), whatever its noise: the plan's private evaluations "
            f"alone cost {budget.spent(evaluations):.4g}",
            "Evaluate less often (evaluation.every) or with more noise (evaluation.noise_multiplier), plan fewer rounds, or agree on a "
            "larger ε.",
        ) from err


def least_noise(terms: Terms, caps: Caps) -> float:
    """The least noise multiplier at which all rounds are admitted under every cap, after what was taken.

    Raises:
        Refused: no noise is enough.
    """
    rate, steps = sampled(terms)
    needed = max(b.calibrate(rate, attempts(terms) * steps, taken) for b, taken in caps.values())
    if terms.privacy.kind != "shared":
        return needed
    # Shared noise is charged as a little less than it is: the least of four significant digits that is charged as so much.
    secure, clip = terms.secure_aggregation, terms.privacy.clip_norm
    assert secure is not None
    assert secure.dimension is not None
    assert clip is not None
    sigma = needed
    while charged_as(sigma, clip, grid_for(clip, secure.dimension), secure.dimension) < needed:
        sigma = float(f"{sigma + 10.0 ** (math.floor(math.log10(sigma)) - 3):.4g}")
    return sigma


def evaluations_of(terms: Terms) -> list[PrivacyEvent]:
    """The protected events of a plan that do not train: they cost what they cost, at whatever noise the training has."""
    return events_of(_evaluations(terms))


def budget_of(terms: Terms) -> Budget:
    """The filter that a charter's ε and δ create, with branches that serve the charter's own plan."""
    privacy = terms.privacy
    assert privacy.epsilon is not None
    assert privacy.delta is not None
    rate, steps = sampled(terms)
    return Budget.create(privacy.epsilon, privacy.delta, (rate, min(attempts(terms) * steps, MAX_STEPS)))
