"""The virtual clock's chances and its arithmetic: distributions are what they say, a round ends when its policy says."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hansa.common.config import System
from hansa.simulations.timelines import (
    ANSWERED,
    DROPPED_OUT,
    FATES,
    NOT_NEEDED,
    TOO_LATE,
    UNAVAILABLE,
    Draws,
    Timeline,
    available,
    settle,
)

# Few different durations, so that ties happen.
seconds = st.one_of(st.sampled_from([0.0, 1.0, 2.0]), st.floats(0, 50))
timelines = st.builds(
    Timeline,
    down=st.integers(0, 10**6),
    up=st.integers(0, 10**6),
    down_s=seconds,
    work_s=seconds,
    up_s=seconds,
    there=st.booleans(),
    stays=st.booleans(),
)
cohorts = st.lists(timelines, min_size=1, max_size=12)
deadlines = st.one_of(st.just(math.inf), st.floats(0.5, 100))


@given(cohorts, st.integers(1, 12), deadlines)
def test_fates_partition_the_cohort_by_their_reasons(cohort: list[Timeline], wanted: int, deadline_s: float) -> None:
    settled = settle(cohort, wanted, deadline_s)
    assert len(settled.fates) == len(cohort)
    assert sum(settled.fates.count(fate) for fate in FATES) == len(cohort)
    in_time = sum(t.arrival_s <= deadline_s for t in cohort if t.arrival_s < math.inf)
    assert settled.fates.count(ANSWERED) == min(wanted, in_time)
    for t, fate in zip(cohort, settled.fates, strict=True):
        assert (fate == UNAVAILABLE) == (not t.there)
        assert (fate == DROPPED_OUT) == (t.there and not t.stays)
        if fate == ANSWERED:
            assert t.arrival_s <= min(settled.seconds, deadline_s)
        if fate == TOO_LATE:
            assert t.arrival_s > deadline_s
            assert settled.seconds == deadline_s
        if fate == NOT_NEEDED:
            assert t.arrival_s >= settled.seconds


@given(cohorts, st.integers(1, 12), deadlines)
def test_a_round_lasts_until_the_kth_arrival_or_the_deadline(
    cohort: list[Timeline], wanted: int, deadline_s: float
) -> None:
    arrivals = sorted(t.down_s + t.work_s + t.up_s if t.there and t.stays else math.inf for t in cohort)
    kth = arrivals[min(wanted, len(cohort)) - 1]
    assert settle(cohort, wanted, deadline_s).seconds == min(kth, deadline_s)


@given(cohorts, cohorts, st.integers(1, 12), deadlines)
def test_asking_more_never_lengthens_a_round(
    cohort: list[Timeline], more: list[Timeline], wanted: int, deadline_s: float
) -> None:
    wanted = min(wanted, len(cohort))
    assert settle(cohort + more, wanted, deadline_s).seconds <= settle(cohort, wanted, deadline_s).seconds


@example([Timeline(0, 1, 0.0, 1.0, 1e-140)], 1, 1.0)  # 1 + 1e-140 is 1: nothing of the upload is left to see
@given(cohorts, st.integers(1, 12), st.floats(0.5, 100))
def test_bytes_are_those_that_crossed_before_the_end(cohort: list[Timeline], wanted: int, deadline_s: float) -> None:
    settled = settle(cohort, wanted, deadline_s)
    answered = [t for t, fate in zip(cohort, settled.fates, strict=True) if fate == ANSWERED]
    assert sum(t.down for t in answered) - 1e-3 <= settled.down <= sum(t.down for t in cohort if t.there) + 1e-3
    assert sum(t.up for t in answered) - 1e-3 <= settled.up
    assert settled.up <= sum(t.up for t in cohort if t.there and t.stays) + 1e-3


def test_a_round_by_hand() -> None:
    """Two of five are wanted within 10 s: the second arrives at 6 s, when the third has sent half of its reply."""
    base = Timeline(down=100, up=100, down_s=2, work_s=1, up_s=2)
    cohort = [
        replace(base, work_s=2),  # at 6 s
        replace(base, there=False),
        base,  # at 5 s
        replace(base, stays=False),  # was sent the model, never answers
        replace(base, work_s=3),  # would be there at 7 s; at 6 s half of its upload is through
    ]
    settled = settle(cohort, 2, 10)
    assert settled.fates == [ANSWERED, UNAVAILABLE, ANSWERED, DROPPED_OUT, NOT_NEEDED]
    assert (settled.seconds, settled.down, settled.up) == (6, 400, 250)
    # Four are wanted, and one is not there: the deadline passes, though nobody was late.
    assert settle(cohort, 4, 10).seconds == 10
    assert settle(cohort, 4, 6.5).fates == [ANSWERED, UNAVAILABLE, ANSWERED, DROPPED_OUT, TOO_LATE]


def system(**sections: object) -> System:
    return System.model_validate(sections)


CLIENTS = 4000


@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_speeds_and_lines_are_lognormal_with_median_one(sigma: float) -> None:
    draws = Draws(system(compute={"spread": sigma}, network={"spread": 2 * sigma}), 7)
    found = np.log([draws.traits(client) for client in range(CLIENTS)])

    def fits(logs: np.ndarray, s: float) -> bool:
        # Five standard errors of the mean, of the standard deviation, and of the 90 % quantile.
        error = s / math.sqrt(CLIENTS)
        return (
            abs(logs.mean()) < 5 * error
            and abs(logs.std() - s) < 5 * error / math.sqrt(2)
            and abs(np.quantile(logs, 0.9) - 1.2816 * s) < 5 * 1.71 * error
        )

    assert fits(found[:, 0], sigma)
    assert fits(found[:, 1], 2 * sigma)
    assert not fits(found[:, 0], 1.1 * sigma), "the negative control: a tenth more is noticed"
    assert not fits(found[:, 0] + 0.1 * sigma, sigma), "and so is another median"
    assert abs(np.corrcoef(found.T)[0, 1]) < 5 / math.sqrt(CLIENTS), "fast computers need not have fast lines"


def test_shares_are_what_they_say() -> None:
    settings = system(availability={"share": 0.7}, dropout=0.08, stragglers={"share": 0.2, "slowdown": 5})
    draws = Draws(settings, 3)
    found = np.array([draws.moment(client, 1, 0, 0.0) for client in range(CLIENTS)])

    def is_share(values: np.ndarray, p: float) -> bool:
        return bool(abs(values.mean() - p) < 5 * math.sqrt(p * (1 - p) / CLIENTS))

    assert is_share(found[:, 0], 0.7)
    assert is_share(found[:, 1], 0.08)
    assert is_share(found[:, 2] == 5, 0.2)
    assert set(found[:, 2]) == {1, 5}
    assert not is_share(found[:, 0], 0.76), "the negative control"
    assert not is_share(found[:, 1], 0.11)
    # Independent: of each other, of the round and of the attempt.
    other = np.array([draws.moment(client, 2, 0, 0.0)[0] for client in range(CLIENTS)])
    again = np.array([draws.moment(client, 1, 1, 0.0)[0] for client in range(CLIENTS)])
    for a, b in ((found[:, 0], found[:, 1]), (found[:, 0], found[:, 2]), (found[:, 0], other), (found[:, 0], again)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(CLIENTS)


def test_availability_follows_the_hour() -> None:
    night = system(availability={"share": 0.5, "daily_swing": 0.6, "peak_hour": 2})
    assert available(night, 2 * 3600) == pytest.approx(0.8)
    assert available(night, 14 * 3600) == pytest.approx(0.2)  # a quarter, as in 1902.01046
    assert available(night, 26 * 3600) == pytest.approx(0.8)
    assert available(night, 8 * 3600) == pytest.approx(0.5)
    draws = Draws(night, 0)
    at_noon = np.mean([draws.moment(client, 1, 0, 14 * 3600)[0] for client in range(CLIENTS)])
    assert abs(at_noon - 0.2) < 5 * math.sqrt(0.16 / CLIENTS)


def test_one_setting_changed_leaves_the_other_chances() -> None:
    one = Draws(system(dropout=0.5, compute={"spread": 1}), 5)
    two = Draws(system(dropout=0.5, stragglers={"share": 0.5, "slowdown": 3}, network={"spread": 1}), 5)
    three = Draws(system(dropout=0.5), 6)
    drops = [[d.moment(client, 1, 0, 0.0)[1] for client in range(200)] for d in (one, two, three)]
    assert drops[0] == drops[1] != drops[2]


def test_a_client_far_out_costs_what_the_first_costs() -> None:
    """Nothing is made for the others: client 999,999 of a million is drawn by itself, and again the same."""
    draws = Draws(system(compute={"spread": 1}), 1)
    assert draws.traits(999_999) == draws.traits(999_999) != draws.traits(999_998)
    assert vars(draws).keys() == {"_system", "_seed"}
