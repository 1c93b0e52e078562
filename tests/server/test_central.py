"""Central noise: one client changes the sum by at most C, the noise is what was planned, and nobody can know the sample."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from hansa.clients.app import local_settings
from hansa.common.accounting import PrivacyEvent, odometer
from hansa.common.errors import MessageError, Refused, RunFailed
from hansa.common.noise import SecureNoise
from hansa.common.plan import events_of, plan_of
from hansa.common.verifier import verify_bundle
from hansa.server.central import CentralNoise, ClippedSum, clipping
from hansa.server.checkpoint import Checkpoint
from hansa.simulations.population import PopulationRoster
from population_support import Population, population, terms_of
from support import Killed, weights

CLIENTS, RATE, SIGMA, CLIP = 400, 0.05, 2.0, 0.7


def central(rounds: int = 3, clients: int = CLIENTS, rate: float = RATE, **privacy: Any) -> Any:
    """A charter with central noise."""
    made = {"kind": "central", "unit": "client", "epsilon": 8.0, "delta": 1e-4, "clip_norm": CLIP}
    local = {"steps": 1, "optimizer": {"lr": 0.5}}
    return terms_of(
        clients,
        privacy={**made, "noise_multiplier": SIGMA, **privacy},
        algorithm={"rounds": rounds, "participation": rate, "weighting": "uniform", "local": local},
        evaluation={"kind": "none"},
        quorum=0,
    )


def noise(clients: int = CLIENTS, rate: float = RATE) -> CentralNoise:
    return CentralNoise.of(central(clients=clients, rate=rate).charter)


def update(scale: float, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.normal(size=w.shape)).astype(np.float32) for name, w in weights().items()}


def norm(tensors: Any) -> float:
    """Over all tensors, exactly."""
    return math.sqrt(math.fsum(float(v) ** 2 for t in tensors.values() for v in np.asarray(t, np.float64).reshape(-1)))


class Silent(SecureNoise):
    """No noise: what is left is the sum."""

    def gaussian(self, shape: Any, std: float) -> Any:
        return np.zeros(shape)


@pytest.fixture
def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hansa.server.central.SecureNoise", Silent)


# -- clipping --------------------------------------------------------------------------------------------------------

FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True)


@settings(max_examples=300, deadline=None)
@given(arrays(np.float32, (2, 3), elements=FLOATS), arrays(np.float32, 2, elements=FLOATS), st.floats(1e-6, 1e6))
def test_no_update_is_longer_than_the_clip(a: Any, b: Any, clip: float) -> None:
    """Whatever its values: one vector over all tensors, and not finite means zero."""
    scale = clipping({"weight": a, "bias": b}, clip)
    if not all(np.isfinite(t).all() for t in (a, b)):
        assert scale == 0.0
        return
    assert 0 < scale <= 1
    scaled = {"weight": a.astype(np.float64) * scale, "bias": b.astype(np.float64) * scale}
    assert norm(scaled) <= clip
    assert scale == 1.0 or norm(scaled) >= clip * (1 - 1e-8)


@pytest.mark.usefixtures("no_noise")
def test_what_is_not_finite_adds_zero() -> None:
    for bad in (np.nan, np.inf, -np.inf):
        total = ClippedSum(noise(), weights())
        spoilt = update(1.0)
        spoilt["bias"][0] = bad
        total.add(update(0.01))
        total.add(spoilt)
        expected = {n: v.astype(np.float64) / (RATE * CLIENTS) for n, v in update(0.01).items()}
        assert all(np.array_equal(v, expected[n]) for n, v in total.noised().items())


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e20, 1e38])
def test_one_client_changes_the_sum_by_the_clip_at_most(scale: float) -> None:
    honest = [update(0.3, seed) for seed in range(20)]
    sums = []
    for everyone in (honest, [*honest, update(scale, 99)]):
        total = ClippedSum(noise(), weights())
        for one in everyone:
            total.add(one)
        sums.append(total.noised())
    change = {n: (sums[1][n] - sums[0][n]) * RATE * CLIENTS for n in sums[0]}
    assert norm(change) <= CLIP * (1 + 1e-9)


def test_other_tensors_add_nothing() -> None:
    total = ClippedSum(noise(), weights())
    for wrong in ({}, {"weight": weights()["weight"]}, {n: v.astype(np.float64) for n, v in weights().items()}):
        with pytest.raises(MessageError, match="other tensors"):
            total.add(wrong)


def test_a_sum_leaves_once() -> None:
    total = ClippedSum(noise(), weights())
    total.noised()
    with pytest.raises(AssertionError, match="left already"):
        total.noised()
    with pytest.raises(AssertionError, match="left already"):
        total.add(update(1.0))


# -- noise and sample, with what must fail -----------------------------------------------------------------------------


def big() -> dict[str, Any]:
    return {"weight": np.zeros((200, 500), np.float32)}


def is_planned(values: Any, std: float) -> bool:
    """Whether normal values of mean 0 have this standard deviation (two-sided, 10⁻⁶)."""
    n = values.size
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], n)
    return bool(low <= float(np.sum(values**2)) / std**2 <= high)


def drawn() -> Any:
    """What an empty cohort comes to: noise alone, in the unit of the sum."""
    return ClippedSum(noise(), big()).noised()["weight"].reshape(-1) * RATE * CLIENTS


def test_the_noise_is_as_planned_also_when_nobody_came() -> None:
    values = drawn()
    assert is_planned(values, SIGMA * CLIP)
    assert stats.kstest(values / (SIGMA * CLIP), "norm").pvalue > 1e-6


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_a_tenth_more_or_less_noise_is_noticed(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(SecureNoise):
        def gaussian(self, shape: Any, std: float) -> Any:
            return super().gaussian(shape, factor * std)

    monkeypatch.setattr("hansa.server.central.SecureNoise", Wrong)
    assert not is_planned(drawn(), SIGMA * CLIP)


def test_noise_and_sample_do_not_follow_the_seed() -> None:
    """The charter's seed is public: two runs of the same charter share neither."""
    np.random.seed(0)
    one, first = drawn(), noise().cohort(PopulationRoster(CLIENTS))
    np.random.seed(0)
    other, second = drawn(), noise().cohort(PopulationRoster(CLIENTS))
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.02
    assert first != second  # equal with probability below 10⁻³⁰


def is_binomial(sizes: list[int], n: int, q: float) -> bool:
    """Whether mean and variance are a binomial's (each two-sided, 10⁻⁶)."""
    count, mean, variance = len(sizes), n * q, n * q * (1 - q)
    z = (np.mean(sizes) - mean) / math.sqrt(variance / count)
    spread = float(np.sum((np.array(sizes) - mean) ** 2)) / variance
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], count)
    return bool(abs(z) < 4.9 and low <= spread <= high)


def test_cohorts_are_binomial() -> None:
    terms, roster = noise(), PopulationRoster(CLIENTS)
    cohorts = [terms.cohort(roster) for _ in range(2000)]
    assert is_binomial([len(c) for c in cohorts], CLIENTS, RATE)
    often = np.array([sum(name in c for c in map(set, cohorts)) for name in list(roster)[:40]])
    assert is_binomial(list(often), 2000, RATE)
    # What a sampler of fixed size, or of another rate, would give is noticed.
    assert not is_binomial([round(CLIENTS * RATE)] * 2000, CLIENTS, RATE)
    rng = np.random.default_rng(0)
    for rate in (0.9 * RATE, 1.1 * RATE):
        assert not is_binomial(list(rng.binomial(CLIENTS, rate, 2000)), CLIENTS, RATE)


# -- through the round loop --------------------------------------------------------------------------------------------


def ran(out: Path, signed: Any, train: Callable[[str, Any], Any] | None = None) -> Population:
    with population(out, signed, train) as made:
        made.run()
    return made


def test_it_runs_verifies_and_names_nobody(tmp_path: Path) -> None:
    made = ran(tmp_path / "out", central())
    verdict = verify_bundle(tmp_path / "out")
    assert verdict["violations"] == []
    assert (verdict["noise"], verdict["unit"]) == ("central", "client")
    assert "not the coordinator" in verdict["adversary"]
    assert "for one client" in verdict["claim"]
    assert any("Central noise is the coordinator's word" in limit for limit in verdict["limits"])
    bills = verdict["partners"].values()
    assert len(bills) == CLIENTS
    event = PrivacyEvent(RATE, SIGMA, 1)
    exact = odometer([PrivacyEvent(RATE, SIGMA, 3)], 1e-4)
    assert {b["debits"] for b in bills} == {3}
    assert all(abs(b["epsilon"] - exact) < 2e-3 * exact for b in bills)
    assert events_of(plan_of(made.signed.charter)) == [PrivacyEvent(RATE, SIGMA, 3)]
    for entry in made.run_ledger.of("cohort-debit", "cohort-commit"):
        assert entry.body["clients"] == [[0, CLIENTS - 1]]
    assert made.run_ledger.of("cohort-debit")[0].body["event"] == event.to_fields()
    for path in (*made.out.rglob("*"), *made.folder.rglob("*")):
        if path.is_file() and path.name != "result.json":
            assert b"client-0" not in path.read_bytes(), path
    state = Checkpoint.load(next(made.folder.glob("*.checkpoint")))
    assert state is not None
    assert state.folded == []
    assert [h["partners"] for h in state.history] == [0, 0, 0]


def test_the_bill_is_as_an_accountant_of_others_computes_it() -> None:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant()
    accountant.compose(SelfComposedDpEvent(PoissonSampledDpEvent(RATE, GaussianDpEvent(SIGMA)), 50))
    mine = odometer(events_of(plan_of(central(50).charter)), 1e-4)
    assert mine == pytest.approx(accountant.get_epsilon(1e-4), rel=2e-3)


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("huge", [1e4, 1e30, math.nan])
def test_a_hostile_client_moves_the_model_by_the_clip_at_most(tmp_path: Path, huge: float) -> None:
    """The same cohort (everybody) twice: with a client that sends something huge, and with one that sends zero."""
    models = []
    for which, sent in enumerate((0.0, huge)):

        def train(name: str, tensors: Any, sent: float = sent) -> Any:
            value = sent if name.endswith("0007") else 0.01
            return {n: np.full(t.shape, value, np.float32) for n, t in tensors.items()}

        signed = central(1, rate=1.0)
        made = Population(tmp_path / str(which), signed, train)
        outcome = made.coordinator.run(made.grid, "run-1")
        made.run_ledger.close()
        models.append(outcome.model)
    moved = {n: models[1][n].astype(np.float64) - models[0][n] for n in models[0]}
    most = CLIP / CLIENTS
    assert norm(moved) <= most * (1 + 1e-5)  # models are float32
    assert norm(moved) == 0 if math.isnan(huge) else norm(moved) > 0.999 * most


def test_empty_cohorts_and_clients_that_fail_are_noise_and_count(tmp_path: Path) -> None:
    def fails(name: str, tensors: Any) -> Any:
        raise RuntimeError("no")

    for which, (signed, train) in enumerate(((central(rate=1e-9), None), (central(), fails))):
        made = ran(tmp_path / str(which), signed, train)
        verdict = verify_bundle(made.out)
        assert verdict["violations"] == []
        assert {b["debits"] for b in verdict["partners"].values()} == {3}
        assert made.result["refusals"] == []


def test_a_round_that_was_interrupted_is_done_again_under_its_debit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its checkpoint nothing has left: a fresh sample and fresh noise; after it, the same model."""
    original, cohorts, died = Checkpoint.save, [], []
    draw = CentralNoise.cohort

    def cohort(self: CentralNoise, clients: Any) -> list[str]:
        cohorts.append(draw(self, clients))
        return cohorts[-1]

    def save(self: Checkpoint, path: Path) -> None:
        if not died:
            died.append(1)
            raise Killed
        original(self, path)

    monkeypatch.setattr(CentralNoise, "cohort", cohort)
    monkeypatch.setattr(Checkpoint, "save", save)
    out, signed = tmp_path / "out", central()
    with pytest.raises(Killed):
        ran(out, signed)
    made = ran(out, signed)
    assert len(cohorts) == 4
    assert cohorts[0] != cohorts[1]
    assert len(made.run_ledger.of("cohort-debit")) == 3
    assert verify_bundle(out)["violations"] == []


def test_a_round_that_takes_too_long_is_not_used(tmp_path: Path) -> None:
    """One slow client would decide which others are in the sum."""

    def slow(name: str, tensors: Any) -> Any:
        time.sleep(0.05)
        return {n: np.zeros(t.shape, np.float32) for n, t in tensors.items()}

    signed = central(rate=0.5)
    late = terms_of(
        CLIENTS,
        **{
            **signed.charter.model_dump(include={"privacy", "algorithm", "evaluation", "quorum"}),
            "round_deadline_s": 0.2,
        },
    )
    with population(tmp_path / "out", late, slow) as made, pytest.raises(RunFailed, match="nothing of it is used"):
        made.run()
    assert not made.run_ledger.of("cohort-commit", "round")


def test_local_work_has_no_clip_and_no_noise_of_its_own() -> None:
    settings = local_settings(central().charter)
    assert (settings.clip_norm, settings.noise_multiplier, settings.event) == (None, None, None)


def test_a_plan_beyond_the_cap_is_refused(tmp_path: Path) -> None:
    with population(tmp_path / "out", central(epsilon=0.1)) as made, pytest.raises(Refused, match=r"the cap is 0\.1"):
        made.run()
    assert not made.run_ledger.of("cohort-debit")
