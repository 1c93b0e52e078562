"""`result.json`: what a run did, in numbers that its ledgers can confirm."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..common.accounting import PrivacyEvent, odometer
from ..common.charter import Charter
from ..common.identity import write_whole
from ..common.plan import budget_of, event_from
from ..server.rounds import Outcome, Refusing
from .federation import Simulation
from .population import client_name


def make_result(
    simulation: Simulation, outcome: Outcome, refusals: list[Refusing], timings: Mapping[str, Any]
) -> dict[str, Any]:
    """The contents of `result.json`, without baselines.

    ε is the odometer's (PLD, never below the truth), `epsilon_filter` what the enforcing filter counts; both over every
    debit on the partner's dataset, at the charter's δ, record level, add-or-remove-one, with the charter's noise. None: unbounded.
    """
    charter = simulation.signed.charter
    privacy = charter.privacy
    return {
        "run_id": outcome.run_id,
        "name": charter.name,
        "task": charter.task.name,
        "charter_sha256": simulation.signed.sha256,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "simulated": charter.simulated,
        "rounds": [{"round": h["round"], "metrics": h["metrics"]} for h in outcome.history],
        "final": outcome.history[-1]["metrics"] if outcome.history else {},
        "evaluation": {"kind": charter.evaluation.kind, "rows": _public_rows(simulation)},
        "privacy": {
            "kind": privacy.kind,
            "unit": privacy.unit,
            "adjacency": "add-or-remove-one",
            "epsilon": privacy.epsilon,
            "delta": privacy.delta,
            "noise": privacy.kind,
            "noise_multiplier": privacy.noise_multiplier,
            "clip_norm": privacy.clip_norm,
            "adversary": charter.adversary,
        },
        "partners": _partners(simulation),
        "refusals": _refusals(simulation, refusals),
        "timings": dict(timings),
    }


def save_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Write `result.json`, whole or not at all."""
    write_whole(folder / "result.json", json.dumps(result, indent=1).encode() + b"\n")


def score_rows(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What is compared, by row of the table."""
    found = result.get("baselines") or {}
    rows: dict[str, dict[str, float]] = {}
    if found.get("pooled"):
        rows["all data pooled, no privacy"] = found["pooled"]
    if found.get("federated_without_privacy"):
        rows["federated, no privacy"] = found["federated_without_privacy"]
    if result["final"]:
        p = result["privacy"]
        how = (
            "no privacy"
            if p["kind"] == "none"
            else f"epsilon {p['epsilon']:g}, delta {p['delta']:g}, record level, {p['noise']} noise"
        )
        rows[f"federated, {how}"] = result["final"]
    for name, metrics in (found.get("local") or {}).items():
        rows[f"{name} alone, no privacy"] = metrics
    return rows


def rows_title(result: Mapping[str, Any]) -> str:
    """How they were measured."""
    e = result["evaluation"]
    if e["kind"] == "public":
        return "measured on all partners' public test rows"
    return "measured by noisy private histograms" if e["kind"] == "private" else "not measured"


def _public_rows(simulation: Simulation) -> int | None:
    """How many public rows the scores are of; private held-out sizes are not told."""
    if simulation.signed.charter.evaluation.kind != "public":
        return None
    return sum(len(d.open().held_out) for d in simulation.datasets.values())


def _refusals(simulation: Simulation, seen: list[Refusing]) -> list[dict[str, Any]]:
    """From the partners' ledgers, which also remember what was refused before a resume; else what this process saw."""
    fields = ("run_id", "round", "reason", "detail")
    if simulation.gates:
        entries = [(name, e.body) for name, gate in simulation.gates.items() for e in gate.ledger.of("refuse")]
        return [{"partner": name, **{field: body[field] for field in fields}} for name, body in entries]
    return [{"partner": r.partner, **{field: getattr(r, field) for field in fields}} for r in seen]


def _partners(simulation: Simulation) -> dict[str, Any]:
    charter = simulation.signed.charter
    if charter.population is None:
        found = {}
        for member in charter.partners:
            gate = simulation.gates[member.name]
            trained = {d.body["request_id"] for d in gate.ledger.of("debit") if d.body["purpose"] == "train"}
            rounds = {
                (e.body["run_id"], e.body["round"]) for e in gate.ledger.of("commit") if e.body["request_id"] in trained
            }
            found[member.name] = _bill(charter, member.declared_records, gate.spent(), len(rounds), gate.unbounded())
        return found
    return _population(simulation)


def _bill(charter: Charter, declared: int, spent: list[PrivacyEvent], rounds: int, unbounded: bool) -> dict[str, Any]:
    privacy = charter.privacy
    bounded = privacy.kind != "none" and not unbounded
    return {
        "declared_records": declared,
        "epsilon": odometer(spent, privacy.delta) if bounded and privacy.delta is not None else None,
        "epsilon_filter": budget_of(charter).spent(spent) if bounded else None,
        "epsilon_cap": privacy.epsilon,
        "delta": privacy.delta,
        "rounds": rounds,
    }


def _population(simulation: Simulation) -> dict[str, Any]:
    """Clients with the same history share the same bill, which is computed once."""
    charter = simulation.signed.charter
    assert charter.population is not None
    ledger = simulation.run_ledger
    debits: list[list[Any]] = [[] for _ in range(charter.population.clients)]
    rounds = [0] * charter.population.clients
    for index, entry in enumerate(ledger.of("cohort-debit")):
        for first, last in entry.body["clients"]:
            for number in range(first, last + 1):
                debits[number].append(index)
    committed: set[tuple[int, str, int]] = set()
    for entry in ledger.of("cohort-commit"):
        for first, last in entry.body["clients"] if entry.body["purpose"] == "train" else ():
            for number in range(first, last + 1):
                key = (number, entry.body["run_id"], entry.body["round"])
                rounds[number] += key not in committed
                committed.add(key)
    events = [event_from(e.body["event"]) for e in ledger.of("cohort-debit")]
    bills: dict[tuple[Any, ...], dict[str, Any]] = {}
    found = {}
    for number in range(charter.population.clients):
        # What counts is how often each event was debited, not when.
        history = (*sorted(str(events[i]) for i in debits[number]), rounds[number])
        if history not in bills:
            mine = [events[i] for i in debits[number]]
            bills[history] = _bill(
                charter,
                charter.population.declared_records,
                [e for e in mine if e is not None],
                rounds[number],
                any(e is None for e in mine),
            )
        found[client_name(number)] = bills[history]
    return found
