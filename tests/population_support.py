"""A population in memory, of any size: round loop, Grid, ClientApp, gate and run ledger, with clients made when they are asked."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from hansa.clients.app import Node, make_client_app
from hansa.clients.datasets import Split
from hansa.common.charter import SignedCharter
from hansa.common.flower import Context, RecordDict
from hansa.common.identity import public_pem, write_whole
from hansa.common.ledger import Ledger
from hansa.common.messages import PlainWire
from hansa.common.model import write_model
from hansa.server.rounds import Coordinator, Outcome
from hansa.simulations.grid import InProcessGrid
from hansa.simulations.population import PopulationGate, PopulationRecords, PopulationRoster, client_name
from hansa.simulations.result import make_result, save_result
from support import charter, identity, rows, tiny_task, weights

DECLARED = 20


def terms_of(clients: int, rounds: int = 3, cohort: int = 1000, **changes: Any) -> SignedCharter:
    """A charter of so many clients, `cohort` of which train in a round."""
    made: dict[str, Any] = {
        "partners": [],
        "population": {"clients": clients, "declared_records": DECLARED},
        "algorithm": {
            "rounds": rounds,
            "participation": min(1.0, cohort / clients),
            "local": {"steps": 1, "optimizer": {"lr": 0.5}},
        },
        "privacy": {"epsilon": 8.0, "delta": 1e-7, "clip_norm": 1.0, "noise_multiplier": 60.0},
        "evaluation": {"kind": "public", "every": 2},
        "quorum": 1,
    }
    return charter(**{**made, **changes})


class Datasets:
    """Every client's rows, made when they are asked for."""

    def __init__(self, measuring: int) -> None:
        self.measuring, self.opened = measuring, set[str]()

    def __getitem__(self, name: str) -> Any:
        def split() -> Split:
            self.opened.add(name)
            seed = int(name.removeprefix("client-"))
            return Split(rows(DECLARED, seed), rows(2 if seed < self.measuring else 0, seed + 1))

        return SimpleNamespace(open=split)


class Population:
    """One run in `out`, as simulations/federation.py wires it.

    Args:
        train: called instead of local training: client name, model -> update.
    """

    engine, crew = "cohort", None  # as result.json asks

    def __init__(
        self,
        out: Path,
        signed: SignedCharter,
        train: Callable[[str, Any], Any] | None = None,
        notify: Callable[..., None] = lambda *_, **__: None,
    ) -> None:
        self.out, self.signed, self.crew = out, signed, None
        me, charter = identity("coordinator"), signed.charter
        assert charter.population is not None
        (out / "keys").mkdir(parents=True, exist_ok=True)
        signed.save(out / "charter.json")
        write_whole(out / "keys" / "coordinator.pem", public_pem(me.key))
        genesis = {"owner": "coordinator", "role": "population", "simulated": True, "ledger_id": "0" * 32}
        self.run_ledger = Ledger(out / "coordinator" / "ledger.jsonl", me, {**genesis, "software": "test"})
        if not self.run_ledger.of("charter"):
            agreed = {"name": charter.name, "expires": charter.expires.isoformat()}
            self.run_ledger.append("charter", agreed, charter=signed.sha256)
        clients = charter.population.clients
        self.roster, self.gates = PopulationRoster(clients), dict[str, Any]()
        records = PopulationRecords(self.run_ledger, signed)
        self.datasets = Datasets(len(self.roster.measuring))
        task, model, wire = tiny_task(), torch.nn.Linear(3, 2), PlainWire()

        def node(context: Context) -> Node:
            name = client_name(context.node_id - 1, clients)
            gate = PopulationGate(name, charter, records)
            made = Node(task, model, self.datasets[name], gate, wire)
            if train is not None:
                made.train = lambda request, digest, tensors: (  # type: ignore[method-assign]
                    gate.debit(request, digest, "train"),
                    wire.encode(request.reply("update", digest), wire.pack(train(name, tensors)))[0],
                )[1]
            return made

        def context(number: int) -> Context:
            return Context(run_id=1, node_id=number, node_config={}, state=RecordDict(), run_config={})

        self.grid = InProcessGrid(make_client_app(node), clients, context)
        self.folder = out.with_name(out.name + ".private")
        self.coordinator = Coordinator(
            signed, me, task, wire, self.roster, records, weights, self.folder, out / "closing", notify
        )

    def run(self, run_id: str = "run-1") -> Outcome:
        """Run it to the end, and write what a bundle has."""
        outcome = self.coordinator.run(self.grid, run_id)
        if outcome.model is not None:
            write_model(self.out / "model.safetensors", outcome.model)
        simulation: Any = self
        self.result = make_result(simulation, outcome, outcome.refusals, {})
        save_result(self.out, self.result)
        return outcome


@contextmanager
def population(*args: Any, **more: Any) -> Iterator[Population]:
    """Closed at the end."""
    made = Population(*args, **more)
    try:
        yield made
    finally:
        made.run_ledger.close()


def same_update(value: float) -> Callable[[str, Any], Any]:
    """Every client's update is this."""
    return lambda _, tensors: {name: np.full(t.shape, value, np.float32) for name, t in tensors.items()}


def main(folder: str, clients: str, rounds: str, cohort: str) -> None:
    """Seconds and megabytes, in a process of its own."""
    import json

    from hansa.common.verifier import verify_bundle
    from hansa.simulations.report import write_report

    def peak() -> int:
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)

    said: dict[str, Any] = {"before_mb": peak()}
    seconds: list[float] = []
    began = time.perf_counter()
    signed = terms_of(int(clients), int(rounds), int(cohort))
    out = Path(folder) / "out"
    with population(
        out, signed, same_update(0.01), lambda event, **facts: seconds.append(facts.get("seconds", 0.0))
    ) as p:
        said["start_up_s"], at = time.perf_counter() - began, time.perf_counter()
        p.run()
        said |= {"run_s": time.perf_counter() - at, "run_mb": peak(), "rounds_s": [s for s in seconds if s][:5]}
        said["histories"] = len(p.result["partners"])
    at = time.perf_counter()
    verdict = verify_bundle(out)
    said |= {"verify_s": time.perf_counter() - at, "verified": verdict["verified"], "verify_mb": peak()}
    write_report(Path(folder) / "report.html", p.result, verdict, "")
    said |= {"bundle_mb": sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) / 1e6}
    print(json.dumps({**said, "violations": verdict["violations"][:3]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
