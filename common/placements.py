"""What secure aggregation comes to before a run, and what noise that is shared buys against noise that is local. For `hansa plan`.

Both need the configuration with its dimension (`tasks.sized`).
"""

from __future__ import annotations

import math
from typing import Any, Literal

from .accounting import odometer
from .charter import adversary_of
from .config import Federation, check_secure, threshold_of
from .errors import Refusal, Refused
from .masking import fixed_point_of
from .plan import attempts, budget_of, calibrated, events_of, plan_of, training_of
from .shared_noise import SharedGaussian

Placement = Literal["shared", "local", "central"]
PLACEMENTS: tuple[Placement, ...] = ("shared", "local")


def secure_figures(federation: Federation) -> dict[str, Any] | None:
    """Who must be in a sum, how its numbers stand in the ring, and what is paid for; None without secure aggregation.

    Args:
        federation: with its noise.

    Raises:
        ConfigError: no ring is large enough.
    """
    secure = federation.secure_aggregation
    if secure is None:
        return None
    assert secure.dimension is not None
    # Simulated clients declare their sizes when their rows are dealt; until then there is no ring for their sums.
    declared = [entry.declared_records for entry in (federation.partners or {}).values()]
    fixed = fixed_point_of(federation, declared, federation.declared_tolerance)
    known = bool(declared)
    return {
        "partners": federation.size,
        "asked": federation.cohort,
        "quorum": federation.quorum,
        "colluding": secure.colluding,
        "threshold": threshold_of(federation.size, secure.colluding),
        "dimension": secure.dimension,
        "grid": fixed.grid,
        "ring_bits": fixed.bits if known else None,
        "log2_wrap": fixed.log2_wrap if known and math.isfinite(fixed.log2_wrap) else None,
        "vector_bytes": secure.dimension * fixed.bits // 8 if known else None,
        "rounds": federation.algorithm.rounds,
        "retries": secure.retries,
        "rounds_paid_for": attempts(federation),
    }


def placed(federation: Federation) -> tuple[dict[Placement, Federation], dict[Placement, str]]:
    """The same federation with its noise in either place, to be calibrated for the same cap; and why it cannot be in one.

    Without secure aggregation there is nothing to choose: noise is where the configuration has it.
    """
    found: dict[Placement, Federation] = {}
    missing: dict[Placement, str] = {}
    for kind in PLACEMENTS if federation.secure_aggregation is not None else (federation.privacy.kind,):
        assert kind != "none"
        privacy = federation.privacy.model_copy(update={"kind": kind, "noise_multiplier": None})
        try:
            check_secure(
                federation.secure_aggregation, federation.size, federation.quorum, federation.algorithm, privacy
            )
        except ValueError as err:
            missing[kind] = str(err)
        else:
            found[kind] = federation.model_copy(update={"privacy": privacy})
    return found, missing


def compared(federation: Federation) -> dict[str, Any] | None:
    """Shared noise beside local noise, each calibrated for the configuration's cap, rounds and steps; None where there is no choice."""
    if federation.secure_aggregation is None or federation.privacy.kind == "none":
        return None
    found, missing = placed(federation)
    return {"rows": [_row(terms) for terms in found.values()], "missing": missing}


def _row(terms: Federation) -> dict[str, Any]:
    row: dict[str, Any] = {"noise": terms.privacy.kind, "adversary": adversary_of(terms)}
    figures = ("noise_multiplier", "epsilon_filter", "epsilon", "std_of_sum", "noise_factor")
    try:
        sigma = calibrated(terms)
    except Refused as err:
        if err.reason is not Refusal.BUDGET:
            raise
        return {**row, **dict.fromkeys(figures)}
    assert sigma is not None
    assert terms.privacy.delta is not None
    made = terms.with_noise(sigma)
    events, event = events_of(plan_of(made)), training_of(made)
    everybody = terms.cohort
    factor = event.factor(everybody) if isinstance(event, SharedGaussian) else math.sqrt(everybody)
    values = (sigma, budget_of(terms).spent(events), odometer(events, terms.privacy.delta), sigma * factor, factor)
    return {**row, **dict(zip(figures, values, strict=True))}
