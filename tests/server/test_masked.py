"""The coordinator's side of secure aggregation, with real nodes: who drops out when, what a crash interrupts, and what a run comes to."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hansa.common import secagg
from hansa.common.errors import RunFailed
from hansa.common.flower import Message
from hansa.common.ledger import Ledger
from hansa.common.noise import SecureNoise
from hansa.server.rounds import Outcome
from hansa.server.strategies import ServerOptimizer
from hansa.simulations.federation import Simulation
from masked_support import HOSPITALS, Asked, Between, Plain, Sums, simulation
from support import HEART, NO_PRIVACY, Killed, same_arrays

KINDS = ("train", "agree", "reveal")
Lost = Callable[[Asked], str | None]
"""How a request is lost: "asked" before the node has it, "answered" after, "silent" without a word; None: not at all."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Plain:
    return Plain.watch(monkeypatch)


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> Sums:
    return Sums.watch(monkeypatch)


def losing(made: Simulation, patch: pytest.MonkeyPatch, lost: Lost) -> Between:
    def hook(asked: Asked, honest: Callable[[], Message]) -> Message | None:
        how = lost(asked)
        if how in ("answered", "silent"):
            honest()
        return honest() if how is None else None if how == "silent" else asked.lost()

    return Between(made, hook, patch)


def by(*names: str, kind: str, how: str, number: int = 1, attempt: int = 0) -> Lost:
    where = (kind, number, attempt)
    return lambda asked: how if asked.to in names and (asked.kind, asked.round, asked.attempt) == where else None


def nothing(_: Asked) -> str | None:
    return None


def run(
    out: Path, patch: pytest.MonkeyPatch, lost: Lost = nothing, *, resume: bool = False, **changes: Any
) -> tuple[Outcome, Simulation]:
    """To its end, or to whatever it raises; the simulation is closed, its ledgers can be read."""
    with contextlib.closing(simulation(out, resume, **changes)) as made:
        losing(made, patch, lost)
        return made.run(), made


def spent(out: Path, **changes: Any) -> tuple[Counter[tuple[str, int, int]], list[tuple[str, str]]]:
    """(partner, round, attempt) of every debit, and (partner, agreement) of every list that was signed, as ledgers have them."""
    debits: Counter[tuple[str, int, int]] = Counter()
    lists = []
    with contextlib.closing(simulation(out, True, **changes)) as made:
        for name, gate in made.gates.items():
            for entry in gate.ledger.of("debit"):
                debits[name, entry.body["round"], entry.body["masked"]["attempt"]] += 1
            lists += [(name, entry.body["agreement"]) for entry in gate.ledger.of("survivors")]
    return debits, lists


def opened(plain: Plain, sums: Sums, at: int, names: tuple[str, ...], number: int = 1, attempt: int = 0) -> None:
    """The `at`-th sum is that of these partners' vectors in that attempt, exactly."""
    found, summed = sums.seen[at]
    assert (found, tuple(summed.survivors)) == (number, names)
    assert [int(v) for v in summed.total] == plain.sum(names, number, attempt)


ONE = {"colluding": 1, "retries": 1}
TWO = {"rounds": 2, "local": {"steps": 1, "optimizer": {"lr": 0.2}}}
GONE, REST = HOSPITALS[1], (HOSPITALS[0], *HOSPITALS[2:])


# -- who drops out ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["asked", "answered", "silent"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_who_drops_out_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: Plain, sums: Sums, kind: str, how: str
) -> None:
    """Three of four are the quorum. Whose vector came is in the sum, whatever becomes of him after; the next round is everybody's."""
    outcome, _ = run(tmp_path / "out", monkeypatch, by(GONE, kind=kind, how=how), algorithm=TWO)
    assert outcome.why == "completed"
    names = REST if kind == "train" else HOSPITALS
    assert [h["partners"] for h in outcome.history] == [len(names), 4]
    opened(plain, sums, 0, names)
    opened(plain, sums, 1, HOSPITALS, 2)
    debits, lists = spent(tmp_path / "out", algorithm=TWO)
    expected = {(name, number, 0): 1 for name in HOSPITALS for number in (1, 2)}
    if (kind, how) == ("train", "asked"):
        del expected[GONE, 1, 0]
    assert debits == expected
    assert len(set(lists)) == len(lists) == (7 if kind == "train" or (kind, how) == ("agree", "asked") else 8)


WORDS = {
    "train": "too few masked vectors came",
    "agree": "too few agreed on who is in the sum",
    "reveal": "only 2 revealed what opens the sum, needed are 3",
}


@pytest.mark.parametrize(("kind", "how"), [*((kind, "asked") for kind in KINDS), *((k, "silent") for k in KINDS)])
def test_below_the_quorum_the_run_fails_and_goes_on_when_they_are_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: Plain, sums: Sums, kind: str, how: str
) -> None:
    terms = {"secure_aggregation": ONE}  # of two nobody asks again
    with pytest.raises(RunFailed) as caught:
        run(tmp_path / "out", monkeypatch, by(GONE, HOSPITALS[3], kind=kind, how=how), **terms)
    assert caught.match(
        f"(?s)round 1: {WORDS[kind]}; 2 went along, the quorum is 3, and 0 of the run's 1 retries are used"
        r".*Nothing was learned but sums over the quorum.*--resume\.$"
    )
    assert sums.seen == []
    outcome, made = run(tmp_path / "out", monkeypatch, resume=True, **terms)
    assert outcome.why == "completed"
    opened(plain, sums, 0, HOSPITALS)
    debits, lists = spent(tmp_path / "out", **terms)
    assert debits == dict.fromkeys(((name, 1, 0) for name in HOSPITALS), 1), "nobody paid twice"
    assert len(plain.seen) == 4, "nor masked twice"
    assert len(set(lists)) == len(lists) == 4
    # the same bytes, the same list
    asks = [e.body for e in made.run_ledger.of("ask") if e.body["purpose"] in KINDS[:2]]
    for purpose in KINDS[:2]:
        said = [ask["requests"] for ask in asks if ask["purpose"] == purpose]
        assert all(one == said[0] for one in said)


def test_a_run_that_failed_can_be_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = by(GONE, HOSPITALS[3], kind="agree", how="asked")
    with pytest.raises(RunFailed):
        run(tmp_path / "out", monkeypatch, lost, algorithm=TWO)
    with contextlib.closing(simulation(tmp_path / "out", True, algorithm=TWO)) as made:
        losing(made, monkeypatch, nothing)
        outcome = made.coordinator.run(made.grid, made.run_id, give_up=True)
        assert (outcome.why, outcome.history) == ("refused", [])
        for gate in made.gates.values():
            assert [e.body["why"] for e in gate.ledger.of("release")] == ["closed"]
            assert len(gate.ledger.of("debit")) == 1


# -- retries -----------------------------------------------------------------------------------------------------------------


def dying(kind: str, number: int = 1) -> Lost:
    """The coordinator is killed when the first one answers this."""

    def lost(asked: Asked) -> str | None:
        if (asked.kind, asked.round) == (kind, number):
            raise Killed
        return None

    return lost


def test_a_retry_is_of_those_who_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: Plain, sums: Sums
) -> None:
    """Four are listed, then the coordinator dies, and one does not come back: his vector is gone, and the sum with him."""
    terms = {"secure_aggregation": ONE}
    with pytest.raises(Killed):
        run(tmp_path / "out", monkeypatch, dying("reveal"), **terms)
    told: list[dict[str, Any]] = []
    with contextlib.closing(simulation(tmp_path / "out", True, **terms)) as made:
        grid = losing(made, monkeypatch, lambda asked: "silent" if asked.to == GONE and asked.kind in KINDS else None)
        made.coordinator._notify = lambda event, **facts: told.append(facts) if event == "retry" else None
        assert made.run().why == "completed"
    assert told == [{"round": 1, "attempt": 1, "partners": list(REST), "why": "too few masked vectors came"}]
    opened(plain, sums, 0, REST, attempt=1)
    for name in REST:
        assert (plain.of(name, 1, 0) != plain.of(name, 1, 1)).any()
    assert {one.kind for one in grid.asked if one.attempt == 0} & set(KINDS) == {"train"}, (
        "of the first, nothing was opened"
    )
    debits, lists = spent(tmp_path / "out", **terms)
    assert debits == {**dict.fromkeys(((n, 1, 0) for n in HOSPITALS), 1), **dict.fromkeys(((n, 1, 1) for n in REST), 1)}
    assert len(set(lists)) == len(lists) == 4 + 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_retry_that_was_interrupted_goes_on_with_its_own_roster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: Plain, sums: Sums, kind: str
) -> None:
    """He who was away is back by then, and is not asked: the retry is not his."""
    rest = REST[::-1]
    terms = {"secure_aggregation": ONE, "partners": {name: HEART[name] for name in HOSPITALS[::-1]}}
    with pytest.raises(Killed):
        run(tmp_path / "out", monkeypatch, dying("reveal"), **terms)
    away, dies = by(GONE, kind="train", how="asked"), dying(kind)
    with pytest.raises(Killed):
        run(
            tmp_path / "out",
            monkeypatch,
            lambda asked: away(asked) or (dies(asked) if asked.attempt else None),
            resume=True,
            **terms,
        )
    with contextlib.closing(simulation(tmp_path / "out", True, **terms)) as made:
        grid = losing(made, monkeypatch, nothing)
        assert made.run().why == "completed"
    assert {(one.to, one.attempt) for one in grid.asked if one.kind in KINDS} == {(name, 1) for name in rest}
    opened(plain, sums, 0, rest, attempt=1)
    debits, lists = spent(tmp_path / "out", **terms)
    assert sum(debits.values()) == len(debits) == 4 + 3
    assert len(set(lists)) == len(lists) == 4 + 3


def test_when_retries_are_used_up_the_run_fails_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: Plain, sums: Sums
) -> None:
    """The one retry went into the first round; the second one waits for who is away, and is then completed with him."""
    terms = {"secure_aggregation": ONE, "algorithm": TWO}
    away = lambda number: by(GONE, kind="train", how="asked", number=number)  # noqa: E731
    with pytest.raises(Killed):
        run(tmp_path / "out", monkeypatch, dying("reveal", 1), **terms)
    with pytest.raises(Killed):
        run(
            tmp_path / "out",
            monkeypatch,
            lambda asked: away(1)(asked) or dying("reveal", 2)(asked),
            resume=True,
            **terms,
        )
    with pytest.raises(
        RunFailed, match=r"round 2: too few masked vectors came; 3 went along, .* 1 of the run's 1 retries"
    ):
        run(tmp_path / "out", monkeypatch, away(2), resume=True, **terms)
    outcome, _ = run(tmp_path / "out", monkeypatch, resume=True, **terms)
    assert [h["partners"] for h in outcome.history] == [3, 4]
    opened(plain, sums, 0, REST, attempt=1)
    opened(plain, sums, 1, HOSPITALS, 2)
    debits, _ = spent(tmp_path / "out", **terms)
    assert set(debits.values()) == {1}
    assert sum(debits.values()) == 4 + 3 + 4


def test_without_retries_who_is_listed_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: Plain, sums: Sums
) -> None:
    with pytest.raises(Killed):
        run(tmp_path / "out", monkeypatch, dying("agree"))
    with pytest.raises(RunFailed, match="3 went along, the quorum is 3, and 0 of the run's 0 retries are used"):
        run(tmp_path / "out", monkeypatch, by(GONE, kind="train", how="asked"), resume=True)
    assert run(tmp_path / "out", monkeypatch, resume=True)[0].why == "completed"
    opened(plain, sums, 0, HOSPITALS)


def test_who_comes_after_the_list_was_signed_is_not_in_the_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: Plain, sums: Sums
) -> None:
    """His vector is there when the coordinator goes on; the others have signed that he dropped out."""
    lost = by(GONE, kind="train", how="answered")
    with pytest.raises(Killed):
        run(tmp_path / "out", monkeypatch, lambda asked: lost(asked) or dying("reveal")(asked))
    assert run(tmp_path / "out", monkeypatch, resume=True)[0].why == "completed"
    opened(plain, sums, 0, REST)
    assert set(spent(tmp_path / "out")[0].values()) == {1}


# -- killed ------------------------------------------------------------------------------------------------------------------


def test_a_coordinator_killed_between_any_two_steps_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: Plain, sums: Sums
) -> None:
    """Killed after every entry of its ledger, and with every answer in its hand, one after the other, each time further on.

    Answers come in any order, and the charter's order of partners is not that of their names, which is all that a ledger keeps.
    """
    real, seen, out = Ledger.append, set[tuple[str, ...]](), tmp_path / "out"
    order, names = random.Random(0), HOSPITALS[::-1]
    terms = {"partners": {name: HEART[name] for name in names}}

    def step(*what: str) -> None:
        if what not in seen:
            seen.add(what)
            raise Killed

    def append(self: Ledger, kind: str, body: Any, **more: Any) -> Any:
        entry = real(self, kind, body, **more)
        if self.entries[0].body["owner"] == "coordinator" and kind in ("ask", "answers", "round"):
            step(kind, body.get("purpose", ""))
        return entry

    def hook(asked: Asked, honest: Callable[[], Message]) -> Message:
        reply = honest()
        if asked.kind in KINDS:
            step(asked.kind, asked.to)
        return reply

    monkeypatch.setattr(Ledger, "append", append)
    outcome = None
    while outcome is None:
        with contextlib.closing(simulation(out, bool(seen), **terms)) as made, contextlib.suppress(Killed):
            Between(made, hook, monkeypatch).shuffled = order
            outcome = made.run()
    assert len(seen) == 2 + 3 * (2 + 4) + 1, "when it was opened; each exchange and each answer; the round"
    assert (outcome.why, [h["partners"] for h in outcome.history]) == ("completed", [4])
    assert all(number == 1 for number, _ in sums.seen)
    for at in range(len(sums.seen)):
        opened(plain, sums, at, names)
    assert Counter(name for name, *_ in plain.seen) == dict.fromkeys(HOSPITALS, 1)
    debits, lists = spent(out, **terms)
    assert debits == dict.fromkeys(((name, 1, 0) for name in HOSPITALS), 1)
    assert len(set(lists)) == len(lists) == 4
    said = {ask["purpose"]: set[str]() for ask in (e.body for e in made.run_ledger.of("ask"))}
    for ask in (e.body for e in made.run_ledger.of("ask")):
        said[ask["purpose"]].add(str(ask))
    assert {purpose: len(said[purpose]) for purpose in ("train", "agree", "reveal")} == dict.fromkeys(KINDS, 1)
    assert [e.body["round"] for e in made.run_ledger.of("round")] == [1]


# -- what a run comes to -------------------------------------------------------------------------------------------------------


def model_of(outcome: Outcome) -> dict[str, Any]:
    assert outcome.model is not None
    return dict(outcome.model)


def test_masks_change_no_bit_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same run with every mask replaced by nothing, also where somebody dropped out; and the masks were there."""
    terms = {"privacy": NO_PRIVACY, "algorithm": {"rounds": 3, "local": {"steps": 2, "optimizer": {"lr": 0.2}}}}
    lost = by(GONE, kind="train", how="asked", number=2)
    masked, _ = run(tmp_path / "masked", monkeypatch, lost, **terms)
    calls: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(secagg, "_add_stream", lambda values, *_: calls.append(len(values)))
        unmasked, _ = run(tmp_path / "unmasked", monkeypatch, lost, **terms)
    same_arrays(model_of(masked), model_of(unmasked))
    assert [h["partners"] for h in masked.history] == [h["partners"] for h in unmasked.history] == [4, 3, 4]
    # masked: one's own, and one with each of three peers; opened: survivors' own, and theirs with him who dropped out
    assert len(calls) == (4 + 3 + 4) * 4 + (4 + 3 + 4) + 3
    assert any(v.any() for v in model_of(masked).values())


STRATEGIES: list[tuple[dict[str, Any], str]] = [
    ({"name": "fedavg"}, "declared"),
    ({"name": "fedavg"}, "uniform"),
    ({"name": "fedprox", "proximal_mu": 0.1}, "declared"),
    ({"name": "fedavgm", "server_momentum": 0.9}, "uniform"),
    ({"name": "fedadam", "eta": 0.01}, "declared"),
]


@pytest.mark.parametrize(("strategy", "weighting"), STRATEGIES, ids=[f"{s['name']}-{w}" for s, w in STRATEGIES])
def test_local_noise_under_secure_aggregation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: dict[str, Any], weighting: str
) -> None:
    """With the noise off, the model is that of the run without secure aggregation, to the grid's fineness."""
    monkeypatch.setattr(SecureNoise, "gaussian", lambda self, shape, std: np.zeros(shape))
    local = {"steps": 2, "optimizer": {"lr": 0.2}}
    terms: dict[str, Any] = {
        "algorithm": {"rounds": 2, "strategy": strategy, "weighting": weighting, "local": local},
        "privacy": {"kind": "local", "epsilon": 100.0, "delta": 1e-3, "clip_norm": 1.0, "noise_multiplier": 10.0},
    }
    lost = by(GONE, kind="train", how="asked")
    masked, made = run(tmp_path / "masked", monkeypatch, lost, **terms)
    plainly, _ = run(tmp_path / "plain", monkeypatch, lost, **terms, secure_aggregation=None)
    assert [h["partners"] for h in masked.history] == [h["partners"] for h in plainly.history] == [3, 4]
    for name, value in model_of(plainly).items():
        assert np.abs(value).max() > 1e-3
        np.testing.assert_allclose(model_of(masked)[name], value, rtol=0, atol=1e-5)
    kinds = {e.body["event"]["mechanism"] for e in made.gates[GONE].ledger.of("debit")}
    assert kinds == {"poisson-gaussian/1"}


def test_shared_noise_without_noise_is_one_gradient_step_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean of everybody's clipped gradients by declared records, with its sign: against local steps without noise."""
    monkeypatch.setattr(SecureNoise, "gaussian", lambda self, shape, std: np.zeros(shape))
    monkeypatch.setattr(SecureNoise, "discrete_gaussian", lambda self, size, std: np.zeros(size, np.int64))
    privacy = {"epsilon": 100.0, "delta": 1e-3, "clip_norm": 1.0, "noise_multiplier": 50.0}
    lost = by(GONE, kind="train", how="asked")
    shared, _ = run(tmp_path / "shared", monkeypatch, lost, algorithm=TWO, privacy={"noise": "shared", **privacy})
    terms: dict[str, Any] = {"algorithm": TWO, "privacy": {"kind": "local", **privacy}, "secure_aggregation": None}
    local, _ = run(tmp_path / "local", monkeypatch, lost, **terms)
    for name, value in model_of(local).items():
        assert np.abs(value).max() > 1e-3
        np.testing.assert_allclose(model_of(shared)[name], value, rtol=0, atol=1e-5)


# -- the mean of the last models -------------------------------------------------------------------------------------------------


def averaged(last: float, rounds: int, evaluation: dict[str, Any] | None = None) -> dict[str, Any]:
    algorithm = {"rounds": rounds, "average_last": last, "local": {"steps": 1, "optimizer": {"lr": 0.2}}}
    return {"privacy": NO_PRIVACY, "algorithm": algorithm} | ({"evaluation": evaluation} if evaluation else {})


@pytest.mark.parametrize(("last", "first"), [(0.5, 3), (0.2, 5), (1.0, 1), (0.21, 4)])
def test_the_result_is_the_mean_of_the_last_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: float, first: int
) -> None:
    models: list[dict[str, Any]] = []
    real = ServerOptimizer.step

    def step(self: ServerOptimizer, number: int, *args: Any) -> Any:
        new = real(self, number, *args)
        models.append({name: value.copy() for name, value in new.items()})
        return new

    monkeypatch.setattr(ServerOptimizer, "step", step)
    outcome, made = run(tmp_path / "out", monkeypatch, **averaged(last, 5))
    assert len(models) == 5
    for name, value in model_of(outcome).items():
        assert value.dtype == np.float32
        expected = np.mean([m[name].astype(np.float64) for m in models[first - 1 :]], axis=0)
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-8)
    named = [e.body["model_sha256"] for e in made.run_ledger.of("round")]
    assert len(set(named)) == 5
    assert named[-1] == made.run_ledger.of("close")[0].body["model_sha256"]


MEASURED = averaged(0.6, 3, {"kind": "public", "every": 1})  # of rounds 2 and 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Of a run that nothing interrupted: what another one comes to, as there is no noise."""
    with pytest.MonkeyPatch.context() as patch:
        return run(tmp_path_factory.mktemp("whole") / "out", patch, **MEASURED)[0]


@pytest.mark.parametrize(
    "dies",
    [
        ("train", 2),
        ("train", 3),
        ("evaluate", 2),
        ("evaluate", 3),
        ("close", 4),
    ],
    ids=lambda dies: f"{dies[0]}-{dies[1]}",
)
def test_the_mean_survives_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Outcome, dies: tuple[str, int]
) -> None:
    """Killed when the second partner is asked: to the last bit the model of the run that was not, and the same metrics."""
    seen = 0

    def lost(asked: Asked) -> str | None:
        nonlocal seen
        seen += (asked.kind, asked.round) == dies
        if seen == 2:
            raise Killed
        return None

    with pytest.raises(Killed):
        run(tmp_path / "out", monkeypatch, lost, **MEASURED)
    outcome, _ = run(tmp_path / "out", monkeypatch, resume=True, **MEASURED)
    same_arrays(model_of(outcome), model_of(whole))
    assert outcome.refusals == []
    assert outcome.history == whole.history
