"""`result.json`: what a run did, in numbers that its ledgers can confirm."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ..common.accounting import PrivacyEvent, odometer
from ..common.charter import Charter
from ..common.identity import write_whole
from ..common.plan import budget_of, event_from
from ..server.rounds import Outcome, Refusing
from .federation import Simulation
from .population import client_name
from .realism import told


def make_result(
    simulation: Simulation, outcome: Outcome, refusals: list[Refusing], timings: Mapping[str, Any]
) -> dict[str, Any]:
    """The contents of `result.json`, without baselines.

    ε is the odometer's (PLD, never below the truth), `epsilon_filter` what the enforcing filter counts; both over every
    debit on the partner's dataset, at the charter's δ and unit, add-or-remove-one, with the charter's noise. None: unbounded.
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
        "engine": simulation.engine,
        "execution": crew.to_fields() if (crew := simulation.crew) is not None else None,
        **told(simulation.grid),
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
            else f"epsilon {p['epsilon']:g}, delta {p['delta']:g}, {p.get('unit', 'record')} level, {p['noise']} noise"
        )
        rows[f"federated, {how}"] = result["final"]
    for name, metrics in (found.get("local") or {}).items():
        rows[f"{name} alone, no privacy"] = metrics
    return rows


def rows_title(result: Mapping[str, Any]) -> str:
    """How they were measured, and what the baselines have of the configuration."""
    how = {"public": "measured on all partners' public test rows", "private": "measured by noisy private histograms"}
    told = how.get(result["evaluation"]["kind"], "not measured")
    compared = result.get("baselines") and result["privacy"]["kind"] != "none"
    return told + ("; rows without privacy: same lr and momentum, without clipping" if compared else "")


def _public_rows(simulation: Simulation) -> int | None:
    """How many public rows the scores are of; private held-out sizes are not told."""
    if simulation.signed.charter.evaluation.kind != "public":
        return None
    return sum(len(simulation.datasets[name].open().held_out) for name in simulation.roster.measuring)


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


LISTED = 1000
"""Clients that are listed one by one; of more, those with one history are one item, under the name of the first."""


def _population(simulation: Simulation) -> dict[str, Any]:
    """Clients with the same history share the same bill, which is computed once. `clients` says how many they are, above LISTED."""
    charter, entries = simulation.signed.charter, simulation.run_ledger.of("cohort-debit", "cohort-commit")
    assert charter.population is not None
    clients = charter.population.clients
    # What counts is how often each event was debited, how many rounds were trained, and what was committed; not when.
    columns: dict[str, np.ndarray[Any, np.dtype[np.int32]]] = {}
    events: dict[str, PrivacyEvent | None] = {}
    seen = set()
    for entry in entries:
        body = entry.body
        if (at := (entry.type, body["run_id"], body["round"], body["purpose"])) in seen:
            continue  # the same again, after a crash
        seen.add(at)
        kinds = ["commits"] + ["rounds"] * (body["purpose"] == "train")
        if entry.type == "cohort-debit":
            kinds = [str(body["event"])]
            events[kinds[0]] = event_from(body["event"])
        ends = np.asarray(body["clients"], dtype=np.int64).reshape(-1, 2)
        for kind in kinds:
            # Differences between neighbours; ranges do not overlap.
            steps = columns.setdefault(kind, np.zeros(clients + 1, np.int32))
            steps[ends[:, 0]] += 1
            steps[ends[:, 1] + 1] -= 1
    histories = np.zeros(clients, np.int64)
    counts = {kind: np.cumsum(steps)[:clients] for kind, steps in columns.items()}
    for column in counts.values():
        histories = np.unique(histories * (int(column.max()) + 1) + column, return_inverse=True)[1]
    firsts, sizes = np.unique(histories, return_index=True, return_counts=True)[1:]
    bills = []
    for first in firsts:
        mine = [events[kind] for kind in events for _ in range(counts[kind][first])]
        rounds = int(counts["rounds"][first]) if "rounds" in counts else 0
        bounded = [event for event in mine if event is not None]
        bills.append(_bill(charter, charter.population.declared_records, bounded, rounds, len(bounded) < len(mine)))
    if clients <= LISTED:
        return {client_name(number, clients): bills[history] for number, history in enumerate(histories)}
    found = sorted(zip(firsts, sizes, bills, strict=True), key=lambda one: int(one[0]))
    return {client_name(int(first), clients): {**bill, "clients": int(size)} for first, size, bill in found}
