"""What a run will cost, before any of it is spent."""

from __future__ import annotations

import pytest

from hansa.common.accounting import Budget, PrivacyEvent
from hansa.common.charter import Charter
from hansa.common.errors import LedgerError, Refused
from hansa.common.plan import (
    PlanItem,
    budget_of,
    calibrated,
    charged,
    charged_training,
    evaluated_rounds,
    event_fields,
    event_from,
    events_of,
    first_averaged,
    largest,
    plan_of,
    plan_sha256,
    stopped_by,
)
from hansa.common.shared_noise import SharedGaussian, grid_for
from support import NO_PRIVACY, charter

PRIVATE = {"kind": "private", "noise_multiplier": 20.0, "every": 2}


def noisy(c: Charter, noise_multiplier: float | None) -> Charter:
    return c.model_copy(update={"privacy": c.privacy.model_copy(update={"noise_multiplier": noise_multiplier})})


def test_evaluated_rounds_end_with_the_last() -> None:
    assert evaluated_rounds(5, 2) == [2, 4, 5]
    assert evaluated_rounds(4, 2) == [2, 4]
    assert evaluated_rounds(3, 10) == [3]


@pytest.mark.parametrize(("rounds", "every"), [(5, 2), (4, 2), (3, 10), (1, 1), (7, 7)])
def test_as_many_evaluations_are_planned_as_there_are(rounds: int, every: int) -> None:
    c = charter(algorithm__rounds=rounds, evaluation={**PRIVATE, "every": every}).charter
    assert plan_of(c)[1].count == len(evaluated_rounds(rounds, every))


def test_a_plan_is_rounds_and_evaluations() -> None:
    c = charter(algorithm__rounds=5, algorithm__local__steps=7, evaluation=PRIVATE).charter
    assert plan_of(c) == (
        PlanItem("train", 5, PrivacyEvent(1.0, 4.0, 7)),
        PlanItem("evaluate", 3, PrivacyEvent(1.0, 20.0, 1)),
    )
    assert events_of(plan_of(c)) == [PrivacyEvent(1.0, 4.0, 35), PrivacyEvent(1.0, 20.0, 3)]


def test_public_evaluation_costs_nothing_and_no_privacy_is_said() -> None:
    c = charter(privacy=NO_PRIVACY, evaluation={"kind": "public"}).charter
    assert plan_of(c) == (PlanItem("train", 3, None),)
    assert events_of(plan_of(c)) == []
    assert plan_of(c)[0].to_fields()["event"] == {"mechanism": "none/1"}


def test_events_read_back() -> None:
    for event in (None, PrivacyEvent(0.1, 1.5, 6)):
        assert event_from(event_fields(event)) == event
    with pytest.raises(LedgerError):
        event_from({"mechanism": "none/2"})
    with pytest.raises(LedgerError):
        event_from({"mechanism": "none/1", "q": "1.0"})


def test_the_hash_of_a_plan_is_of_its_terms() -> None:
    one, two = plan_of(charter().charter), plan_of(charter(algorithm__rounds=4).charter)
    assert plan_sha256(one) == plan_sha256(plan_of(charter().charter)) != plan_sha256(two)


def test_what_is_calibrated_is_what_the_gate_admits() -> None:
    """The least noise at which the enforcing filter takes the whole plan, private evaluation included."""
    c = charter(algorithm__rounds=10, algorithm__local__steps=6, evaluation=PRIVATE).charter
    sigma = calibrated(noisy(c, None))
    assert sigma is not None

    def admitted(noise: float) -> bool:
        return budget_of(c).admits(events_of(plan_of(noisy(c, noise))))

    assert admitted(sigma)
    assert not admitted(sigma * 0.999)


def test_given_noise_is_kept_and_none_stays_none() -> None:
    assert calibrated(charter().charter) == 4.0
    assert calibrated(charter(privacy=NO_PRIVACY).charter) is None


SHARED = {"kind": "shared", "epsilon": 2.0, "delta": 1e-3, "clip_norm": 1.0, "noise_multiplier": 8.0}
SECURE = {"colluding": 1, "retries": 2, "dimension": 8}


def test_shared_noise_is_planned_with_its_retries_and_charged_as_less_than_it_is() -> None:
    c = charter(privacy=SHARED, secure_aggregation=SECURE, quorum=3, evaluation=PRIVATE).charter
    event = SharedGaussian(1.0, 8.0, 1.0, grid_for(1.0, 8), 8, 3, 1, 1)
    assert plan_of(c)[0] == PlanItem("train", 5, event)
    assert plan_of(c)[1].count == 2, "a round that is asked again is measured once"
    assert 7.9 < event.charged.noise_multiplier < 8.0
    assert events_of(plan_of(c))[0] == PrivacyEvent(1.0, event.charged.noise_multiplier, 5)
    fields = event_fields(event)
    assert (fields["mechanism"], fields["quorum"], fields["colluding"]) == ("shared-gaussian/1", 3, 1)
    assert event_from(fields) == charged(event) == event.charged == charged_training(c)
    assert charged(PrivacyEvent(1.0, 4.0, 1)) == PrivacyEvent(1.0, 4.0, 1)


def test_retries_of_local_noise_under_masks_are_paid_for_too() -> None:
    c = charter(secure_aggregation=SECURE, quorum=3).charter
    assert plan_of(c) == (PlanItem("train", 5, PrivacyEvent(1.0, 4.0, 1)),)
    assert calibrated(noisy(c, None)) == calibrated(noisy(charter(algorithm__rounds=5).charter, None))


def test_shared_noise_is_the_least_of_four_digits_that_is_admitted() -> None:
    c = charter(privacy=SHARED, secure_aggregation=SECURE, quorum=3).charter
    sigma = calibrated(noisy(c, None))
    local = calibrated(noisy(charter(algorithm__rounds=5).charter, None))
    assert sigma is not None
    assert local is not None
    assert local < sigma < 1.02 * local
    assert budget_of(c).admits(events_of(plan_of(noisy(c, sigma))))
    assert not budget_of(c).admits(events_of(plan_of(noisy(c, float(f"{sigma - 0.0015:.4g}")))))


@pytest.mark.parametrize(("share", "first"), [(None, 11), (0.05, 10), (0.1, 10), (0.5, 6), (0.51, 5), (1.0, 1)])
def test_the_rounds_that_are_averaged(share: float | None, first: int) -> None:
    assert first_averaged(charter(algorithm__rounds=10, algorithm__average_last=share).charter.algorithm) == first


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


def test_evaluations_that_alone_cost_too_much_are_named() -> None:
    c = charter(algorithm__rounds=50, evaluation={**PRIVATE, "noise_multiplier": 1.0})
    unknown = c.charter.privacy.model_copy(update={"noise_multiplier": None})
    with pytest.raises(Refused, match="the plan's private evaluations alone cost") as caught:
        calibrated(c.charter.model_copy(update={"privacy": unknown}))
    assert "evaluation.every" in caught.value.hint
