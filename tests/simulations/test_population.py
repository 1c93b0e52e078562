"""Above 100 clients: one ledger for all, which an auditor can still add up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hansa.common.charter import SignedCharter
from hansa.common.config import Federation
from hansa.common.errors import Refusal, Refused
from hansa.common.ledger import Ledger, read_ledger
from hansa.server.checkpoint import Checkpoint
from hansa.server.records import Answer
from hansa.simulations.clients import EVALUATED
from hansa.simulations.federation import private_folder
from hansa.simulations.population import (
    PopulationGate,
    PopulationRecords,
    PopulationRoster,
    _ranges,
    client_name,
    client_number,
)
from population_support import population as in_memory
from population_support import same_update, terms_of
from support import NO_PRIVACY, Killed, charter, config, identity, request, run, same_arrays, verified

CLIENTS = 101
LOCAL = {"epsilon": 4.0, "delta": 1e-3, "clip_norm": 1.0}
PRIVATE = {"kind": "private", "noise_multiplier": 20.0, "every": 2}


def population(**changes: Any) -> Federation:
    """101 clients that share the digits; a third of them takes part in each of two rounds."""
    local = {"steps": 1, "optimizer": {"lr": 0.2}}
    made = {
        "name": "digits",
        "task": "digits",
        "partners": None,
        "population": {"dataset": "digits", "clients": CLIENTS, "partition": {"kind": "iid", "min_records": 2}},
        "algorithm": {"rounds": 2, "participation": 0.3, "local": local},
        "evaluation": {"kind": "public", "every": 2, "test_fraction": 0.2},
        "quorum": 20,
    }
    return config(**{**made, **changes})


def entries(out: Path) -> list[Any]:
    return read_ledger(out / "coordinator" / "ledger.jsonl")[0]


def test_it_runs_and_verifies(tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome, _ = run(population(privacy=LOCAL), out)
    assert [h["partners"] for h in outcome.history] == [30, 30]
    verdict = verified(out)
    debits = dict.fromkeys(map(client_name, range(CLIENTS)), 0)
    for entry in entries(out):
        if entry.type == "cohort-debit":
            for first, last in entry.body["clients"]:
                for number in range(first, last + 1):
                    debits[client_name(number)] += 1
    assert sum(debits.values()) == 60
    assert {name: bill["debits"] for name, bill in verdict["partners"].items()} == debits
    assert {name: bill["rounds"] for name, bill in verdict["partners"].items()} == debits
    charged = {n: {b["epsilon_filter"] for c, b in verdict["partners"].items() if debits[c] == n} for n in (0, 1, 2)}
    assert charged[0] == {0.0}
    assert 0 < max(charged[1]) < max(charged[2]) <= 4.0
    ledger: Any = SimpleNamespace(of=lambda *kinds: [e for e in entries(out) if e.type in kinds])
    records = PopulationRecords(ledger, SignedCharter.load(out / "charter.json"))
    assert records.most_spent() == records.most_spent() == pytest.approx(max(charged[2]))
    assert entries(out)[0].body["simulated"] is True
    assert entries(out)[0].body["role"] == "population"
    assert not (out / "partners").exists()
    assert [p.name for p in (out / "keys").iterdir()] == ["coordinator.pem"]


@pytest.mark.parametrize("clients", [40, CLIENTS])
def test_with_clients_as_the_unit_there_are_no_identities_however_few(tmp_path: Path, clients: int) -> None:
    """Up to 100 clients, too: partners with keys have local or shared noise."""
    out = tmp_path / "out"
    algorithm = {**population().model_dump()["algorithm"], "weighting": "uniform"}
    settings = population(
        privacy={**LOCAL, "kind": "central", "unit": "client"},
        population={"dataset": "digits", "clients": clients, "partition": {"kind": "iid", "min_records": 2}},
        algorithm=algorithm,
        quorum=0,
    )
    run(settings, out)
    verdict = verified(out)
    assert (verdict["unit"], len(verdict["partners"])) == ("client", clients)
    assert [p.name for p in (out / "keys").iterdir()] == ["coordinator.pem"]


def test_without_privacy_a_killed_run_ends_in_the_same_model(tmp_path: Path) -> None:
    settings = population(algorithm={**population().model_dump()["algorithm"], "strategy": {"name": "fedadam"}})
    reference, total = run(settings, tmp_path / "whole")
    verified(tmp_path / "whole")
    assert reference.model is not None
    for die_at in (3, total // 2, total):
        out = tmp_path / str(die_at)
        with pytest.raises(Killed):
            run(settings, out, die_at=die_at)
        outcome, _ = run(settings, out, resume=True)
        assert outcome.model is not None
        same_arrays(outcome.model, reference.model)
        verified(out)


@pytest.mark.parametrize("evaluation", [{"kind": "none"}, PRIVATE], ids=["none", "private"])
def test_killed_after_every_entry_with_privacy_it_verifies(tmp_path: Path, evaluation: dict[str, Any]) -> None:
    """Noise is drawn again here (there are no outboxes): what the ledger named may not change for it."""
    settings = population(privacy=LOCAL, evaluation=evaluation)
    original, out, deaths = Ledger.append, tmp_path / "out", 0
    died: set[tuple[str, object, object]] = set()

    def append(self: Ledger, kind: str, body: Any, **more: Any) -> Any:
        entry = original(self, kind, body, **more)
        here = (kind, body.get("round"), body.get("purpose"))
        if here not in died:
            died.add(here)
            raise Killed
        return entry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "append", append)
        while True:
            try:
                run(settings, out, resume=deaths > 0)
                break
            except Killed:
                deaths += 1
    assert deaths == len(died) > 10
    verified(out)
    kinds = [e.type for e in entries(out)]
    assert [kinds.count(k) for k in ("genesis", "charter", "run", "budget", "cohort-hold", "close")] == [1] * 6
    assert kinds.count("round") == 2
    debits = [(e.body["round"], e.body["purpose"]) for e in entries(out) if e.type == "cohort-debit"]
    assert len(debits) == len(set(debits)) == (2 if evaluation["kind"] == "none" else 3)


def test_killed_before_the_checkpoint_it_verifies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, died = Checkpoint.save, set[tuple[int, bool]]()

    def save(self: Checkpoint, path: Path) -> None:
        if (self.round, self.trained) not in died:
            died.add((self.round, self.trained))
            raise Killed
        original(self, path)

    monkeypatch.setattr(Checkpoint, "save", save)
    out, settings = tmp_path / "out", population(privacy=LOCAL, evaluation={"kind": "none"})
    for attempt in range(2):  # one step a round: nobody is asked, nothing is measured
        with pytest.raises(Killed):
            run(settings, out, resume=attempt > 0)
    run(settings, out, resume=True)
    verified(out)


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    out, settings = tmp_path / "out", population(privacy=LOCAL)
    run(settings, out)
    before = (out / "coordinator" / "ledger.jsonl").read_bytes()
    run(settings, out, resume=True)
    assert (out / "coordinator" / "ledger.jsonl").read_bytes() == before
    verified(out)


def test_a_thousand_fsyncs_are_not_needed(tmp_path: Path) -> None:
    """A round is a debit, a commit and a round entry, however many clients there are."""
    out = tmp_path / "out"
    run(population(privacy=LOCAL, evaluation={"kind": "none"}), out)
    kinds = [e.type for e in entries(out)]
    one = ["cohort-debit", "cohort-commit", "round"]
    assert kinds == ["genesis", "charter", "run", "budget", "cohort-hold", *one, *one, "close"]
    assert not list(private_folder(out).rglob("outbox"))


# -- parts -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(tmp_path / "l", identity("coordinator"), {"owner": "coordinator"})
    yield made
    made.close()


def records(ledger: Ledger, **changes: Any) -> PopulationRecords:
    many = {"partners": [], "population": {"clients": 200, "declared_records": 9}, "privacy__delta": 1e-3}
    signed = charter(**{**many, **changes})
    if not ledger.of("charter"):
        ledger.append("charter", {"name": "c"}, charter=signed.sha256)
    return PopulationRecords(ledger, signed)


@pytest.mark.parametrize("clients", [101, 9999, 10_000, 10_001, 1_000_000])
def test_names_are_unique_and_sort_as_numbers(clients: int) -> None:
    numbers = sorted({0, 1, 9, 10, 99, 100, clients // 2, clients - 2, clients - 1})
    names = [client_name(n, clients) for n in numbers]
    assert names == sorted(set(names))
    assert [client_number(name) for name in names] == numbers
    assert len({len(name) for name in names}) == 1


@pytest.mark.parametrize("clients", [1, 101, 1_000_000])
def test_a_roster_is_a_list_of_names_without_the_list(clients: int) -> None:
    roster = PopulationRoster(clients)
    assert (len(roster), roster.asked) == (clients, False)
    for number in {0, clients // 2, clients - 1}:
        name = roster[number]
        assert name == client_name(number, clients)
        assert roster.name(roster.node(name)) == name
        assert roster.node(name) == number + 1
        assert name in roster
    assert roster.name(0) is None
    assert roster.name(clients + 1) is None
    for stranger in (
        "coordinator",
        "client-",
        "client--001",
        "client-1",
        client_name(clients, clients),
        "client-٣٣٣٣",
        3,
    ):
        assert stranger not in roster
        if isinstance(stranger, str):
            with pytest.raises(KeyError):
                roster.node(stranger)
    with pytest.raises(IndexError):
        roster[clients]
    assert list(roster.measuring) == [roster[n] for n in range(min(clients, EVALUATED))]
    assert client_name(clients - 1, clients) in roster.measuring or clients > EVALUATED


def test_of_many_clients_bills_are_by_history(tmp_path: Path) -> None:
    """Nobody is asked to open, only the first measure, and no list of all names is anywhere."""
    signed, out = terms_of(20_000, rounds=4, cohort=2000), tmp_path / "out"
    with in_memory(out, signed, same_update(0.01)) as made:
        made.run()
    assert {int(n.removeprefix("client-")) for n in made.datasets.opened} == set(range(EVALUATED))
    debits = [0] * 20_000
    for entry in made.run_ledger.of("cohort-debit"):
        for first, last in entry.body["clients"]:
            for number in range(first, last + 1):
                debits[number] += 1
    bills = made.result["partners"]
    assert {bill["rounds"]: bill["clients"] for bill in bills.values()} == {n: debits.count(n) for n in set(debits)}
    assert all(debits[client_number(name)] == bill["rounds"] for name, bill in bills.items())
    verdict = verified(out)
    assert {n: (b["clients"], b["debits"]) for n, b in verdict["partners"].items()} == {
        n: (b["clients"], b["rounds"]) for n, b in bills.items()
    }
    state = Checkpoint.load(made.folder / "run-1.checkpoint")
    assert state is not None
    assert state.accepted is None


def test_ranges() -> None:
    assert _ranges([]) == []
    assert _ranges(client_name(n) for n in (5, 1, 2, 3, 9)) == [[1, 3], [5, 5], [9, 9]]
    assert _ranges(client_name(n) for n in range(12000)) == [[0, 11999]]


def test_a_plan_beyond_the_cap_is_refused_before_anything_is_held(ledger: Ledger) -> None:
    made = records(ledger, privacy__noise_multiplier=0.5)
    with pytest.raises(Refused, match="the cap is 2") as caught:
        made.run("r")
    assert caught.value.reason is Refusal.BUDGET
    assert not ledger.of("budget", "cohort-hold")


def test_a_client_works_only_when_its_round_was_debited(ledger: Ledger) -> None:
    made = records(ledger)
    made.run("run-1")
    signed = charter()
    gate = PopulationGate("client-0001", signed.charter, made)
    ask = request(signed, "train", 1, to="client-0001")
    with pytest.raises(Refused, match="round 1 was not debited"):
        gate.debit(ask, "", "train")
    made.asked("run-1", 1, "train", {client_name(n): ("q", "") for n in (1, 2, 7)})
    assert gate.debit(ask, "", "train") is None
    assert ledger.entries[-1].body["clients"] == [[1, 2], [7, 7]]
    for wrong in (request(signed, "train", 2), request(signed, "train", 1, run="run-2")):
        with pytest.raises(Refused, match="not debited"):
            gate.debit(wrong, "", "train")
    with pytest.raises(Refused):
        gate.debit(ask, "", "evaluate")


def test_after_a_crash_the_same_debit_pays(ledger: Ledger) -> None:
    for _ in range(2):
        made = records(ledger)
        made.run("r")
        made.asked("r", 1, "train", {client_name(1): ("q", "")})
        made.answered("r", 1, "train", {client_name(1): Answer("q", "ok"), client_name(2): Answer("q", "timeout")})
    kinds = [e.type for e in ledger.entries[2:]]
    assert kinds == ["run", "budget", "cohort-hold", "cohort-debit", "cohort-commit"]
    assert ledger.entries[-1].body["clients"] == [[1, 1]]


def test_what_costs_nothing_is_not_debited(ledger: Ledger) -> None:
    made = records(ledger, evaluation={"kind": "public"})
    made.run("r")
    length = ledger.length
    for purpose in ("open", "evaluate"):
        made.asked("r", 0, purpose, {client_name(1): ("q", "")})
        made.answered("r", 0, purpose, {client_name(1): Answer("q", "ok")})
    assert ledger.length == length


def test_without_privacy_it_says_so(ledger: Ledger) -> None:
    made = records(ledger, privacy=NO_PRIVACY)
    made.run("r")
    made.asked("r", 1, "train", {client_name(1): ("q", "")})
    assert not ledger.of("budget")
    assert ledger.entries[-1].body["event"] == {"mechanism": "none/1"}
    assert ledger.entries[-1].body["clip_norm"] is None
