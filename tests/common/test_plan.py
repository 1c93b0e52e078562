"""What a run will cost, before any of it is spent."""

from __future__ import annotations

import pytest

from hansa.common.accounting import Budget, PrivacyEvent
from hansa.common.charter import Charter
from hansa.common.errors import LedgerError
from hansa.common.plan import (
    PlanItem,
    budget_of,
    calibrated,
    evaluated_rounds,
    event_fields,
    event_from,
    events_of,
    largest,
    plan_of,
    plan_sha256,
    stopped_by,
)
from support import NO_PRIVACY, charter

PRIVATE = {"kind": "private", "noise_multiplier": 20.0, "every": 2}


def _plan(c: Charter) -> tuple[PlanItem, ...]:
    return plan_of(c.algorithm, c.privacy, c.evaluation)


def test_evaluated_rounds_end_with_the_last() -> None:
    assert evaluated_rounds(5, 2) == [2, 4, 5]
    assert evaluated_rounds(4, 2) == [2, 4]
    assert evaluated_rounds(3, 10) == [3]


@pytest.mark.parametrize(("rounds", "every"), [(5, 2), (4, 2), (3, 10), (1, 1), (7, 7)])
def test_as_many_evaluations_are_planned_as_there_are(rounds: int, every: int) -> None:
    c = charter(algorithm__rounds=rounds, evaluation={**PRIVATE, "every": every}).charter
    assert _plan(c)[1].count == len(evaluated_rounds(rounds, every))


def test_a_plan_is_rounds_and_evaluations() -> None:
    c = charter(algorithm__rounds=5, algorithm__local__steps=7, evaluation=PRIVATE).charter
    assert _plan(c) == (
        PlanItem("train", 5, PrivacyEvent(1.0, 4.0, 7)),
        PlanItem("evaluate", 3, PrivacyEvent(1.0, 20.0, 1)),
    )
    assert events_of(_plan(c)) == [PrivacyEvent(1.0, 4.0, 35), PrivacyEvent(1.0, 20.0, 3)]


def test_public_evaluation_costs_nothing_and_no_privacy_is_said() -> None:
    c = charter(privacy=NO_PRIVACY, evaluation={"kind": "public"}).charter
    assert _plan(c) == (PlanItem("train", 3, None),)
    assert events_of(_plan(c)) == []
    assert _plan(c)[0].to_fields()["event"] == {"mechanism": "none/1"}


def test_events_read_back() -> None:
    for event in (None, PrivacyEvent(0.1, 1.5, 6)):
        assert event_from(event_fields(event)) == event
    with pytest.raises(LedgerError):
        event_from({"mechanism": "none/2"})
    with pytest.raises(LedgerError):
        event_from({"mechanism": "none/1", "q": "1.0"})


def test_the_hash_of_a_plan_is_of_its_terms() -> None:
    one, two = _plan(charter().charter), _plan(charter(algorithm__rounds=4).charter)
    assert plan_sha256(one) == plan_sha256(_plan(charter().charter)) != plan_sha256(two)


def test_what_is_calibrated_is_what_the_gate_admits() -> None:
    """The least noise at which the enforcing filter takes the whole plan, private evaluation included."""
    c = charter(algorithm__rounds=10, algorithm__local__steps=6, evaluation=PRIVATE).charter
    privacy = c.privacy.model_copy(update={"noise_multiplier": None})
    sigma = calibrated(c.algorithm, privacy, c.evaluation)
    assert sigma is not None

    def admitted(noise: float) -> bool:
        p = privacy.model_copy(update={"noise_multiplier": noise})
        return budget_of(p, c.algorithm).admits(events_of(plan_of(c.algorithm, p, c.evaluation)))

    assert admitted(sigma)
    assert not admitted(sigma * 0.999)


def test_given_noise_is_kept_and_none_stays_none() -> None:
    c = charter().charter
    assert calibrated(c.algorithm, c.privacy, c.evaluation) == 4.0
    off = charter(privacy=NO_PRIVACY).charter
    assert calibrated(off.algorithm, off.privacy, off.evaluation) is None


def test_what_stops_a_run_is_every_cap_that_does_not_admit_it() -> None:
    loud = [PrivacyEvent(1.0, 0.5, 1)]
    caps = {
        "a": (Budget.create(1.0, 1e-4), []),
        "b": (Budget.create(100.0, 1e-4), loud),
        "c": (Budget.create(1.0, 1e-4), loud),
    }
    assert stopped_by(caps, []) == ["c"]
    assert stopped_by(caps, loud) == ["a", "c"]
    assert stopped_by({}, loud) == []


@pytest.mark.parametrize("most", [1, 2, 7, 8, 100])
@pytest.mark.parametrize("true", [0, 1, 2, 5, 7, 8, 9, 1000])
def test_largest(true: int, most: int) -> None:
    assert largest(lambda n: n <= true, most) == min(true, most)
