"""Honest bundles, written from docs/ledger-format.md, and the means to make dishonest ones that are properly signed.

A `Draft` holds every ledger as a list of (type, body). `write` seals, chains and countersigns whatever stands there,
so a test changes a body first and gets a bundle in which everything fits but that.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hansa.common.accounting import Budget
from hansa.common.charter import SignedCharter, SimulatedClients, draft
from hansa.common.config import Federation
from hansa.common.identity import Envelope, Identity, canonical, public_pem, real, sha256, write_envelope
from hansa.common.ledger import ENTRY_TYPE

CLOSING_TYPE = "application/vnd.hansa.closing+json"
EPOCH = datetime(2026, 11, 22, 1, 50, tzinfo=UTC)
MODEL = b"not really a model"


def identity(name: str, seed: int = 0) -> Identity:
    """The same name and seed give the same key: never use one outside tests."""
    return Identity(name, Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"{name}/{seed}".encode()).digest()))


def digest(*parts: object) -> str:
    """Some hash."""
    return sha256(repr(parts).encode())


@dataclass
class Draft:
    """A bundle before it is signed; change anything in it, then `write` it."""

    signed: SignedCharter
    people: dict[str, Identity]
    books: dict[str, list[tuple[str, dict[str, Any]]]]  # owner -> entries
    closings: list[tuple[str, str | None, dict[str, int]]] = field(default_factory=list)  # run, model, lengths
    result: dict[str, Any] | None = None
    model: bytes | None = MODEL
    start: datetime = EPOCH

    def entry(self, owner: str, kind: str, nth: int = 0) -> dict[str, Any]:
        """The body of the nth entry of that type."""
        return [body for name, body in self.books[owner] if name == kind][nth]

    def index(self, owner: str, kind: str, nth: int = 0) -> int:
        """Its place in the ledger."""
        return [i for i, (name, _) in enumerate(self.books[owner]) if name == kind][nth]

    def insert(self, owner: str, at: int, kind: str, body: dict[str, Any]) -> None:
        """One more entry; every checkpoint after it is of the longer ledger."""
        self.books[owner].insert(at, (kind, body))
        for _, _, lengths in self.closings:
            lengths[owner] += lengths[owner] > at or at < 0

    def drop(self, owner: str, at: int) -> None:
        """One entry less, as if it had never been."""
        del self.books[owner][at]
        for _, _, lengths in self.closings:
            lengths[owner] -= lengths[owner] > at

    def file(self, owner: str) -> str:
        """Where a ledger stands."""
        return "coordinator/ledger.jsonl" if owner == "coordinator" else f"partners/{owner}/ledger.jsonl"

    def write(self, folder: Path) -> Path:
        """The bundle in a new folder (an old one is replaced)."""
        shutil.rmtree(folder, ignore_errors=True)
        lines = {owner: self._lines(owner) for owner in self.books}
        files = {"charter.json": self.signed.to_bytes()}
        files |= {f"keys/{name}.pem": public_pem(person.key) for name, person in self.people.items()}
        files |= {self.file(owner): b"".join(line + b"\n" for line in made) for owner, made in lines.items()}
        for run_id, model, lengths in self.closings:
            heads = [{"owner": o, "length": n, "head": sha256(lines[o][n - 1])} for o, n in lengths.items()]
            files[f"closing/{run_id}.json"] = self.closing(run_id, model, heads)
        if self.model is not None:
            files["model.safetensors"] = self.model
        if self.result is not None:
            files["result.json"] = json.dumps(self.result).encode()
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        return folder

    def closing(self, run_id: str, model: str | None, heads: list[dict[str, Any]], signers: Any = None) -> bytes:
        """A checkpoint, signed by all."""
        body = {"v": 1, "run_id": run_id, "charter_sha256": self.signed.sha256, "model_sha256": model, "ledgers": heads}
        payload = canonical(body)
        people = self.people.values() if signers is None else signers
        made = tuple((person.key, person.sign(CLOSING_TYPE, payload)) for person in people)
        return write_envelope(Envelope(CLOSING_TYPE, payload, made)) + b"\n"

    def _lines(self, owner: str) -> list[bytes]:
        lines: list[bytes] = []
        prev = "0" * 64
        for seq, (kind, body) in enumerate(self.books[owner]):
            time = (self.start + timedelta(seconds=seq)).strftime("%Y-%m-%dT%H:%M:%SZ")
            payload = canonical({"v": 1, "seq": seq, "prev": prev, "time": time, "type": kind, "body": body})
            lines.append(self.people[owner].seal(ENTRY_TYPE, payload))
            prev = sha256(lines[-1])
        return lines


@dataclass
class Shape:
    """What an honest bundle looks like."""

    partners: int = 3
    rounds: int = 2
    q: float = 1.0
    steps: int = 2
    kind: str = "local"
    evaluation: str = "public"
    refused_run: bool = False
    crashes: int | None = None  # seed of crashes at random places
    sigma: float | None = None  # else calibrated: the run spends the whole budget
    clients: int = 0  # a population
    participation: float = 1.0
    seed: int = 0


def signed_charter(shape: Shape) -> tuple[SignedCharter, dict[str, Identity]]:
    """A charter that everyone signed, and everyone's keys (partners in order, then the coordinator)."""
    names = [] if shape.clients else [f"hospital-{i}" for i in range(shape.partners)]
    people = {name: identity(name, shape.seed) for name in [*names, "coordinator"]}
    privacy = {"kind": "none"} if shape.kind == "none" else {"epsilon": 1.0, "delta": 1e-4, "clip_norm": 0.5}
    config: dict[str, Any] = {
        "name": "test",
        "task": "heart-disease",
        "algorithm": {
            "rounds": shape.rounds,
            "local": {"steps": shape.steps, "sampling_rate": shape.q, "optimizer": {"lr": 0.1}},
        },
        "privacy": privacy,
        "evaluation": {"kind": shape.evaluation}
        | ({"noise_multiplier": 50.0, "every": 2} if shape.evaluation == "private" else {}),
        "quorum": 1,
    }
    if shape.clients:
        config["population"] = {"dataset": "digits", "clients": shape.clients}
    else:
        config["partners"] = {n: {"data": f"{n}.csv", "declared_records": 200 + 10 * i} for i, n in enumerate(names)}
    sigma = shape.sigma
    if sigma is None and shape.kind == "local":
        steps = shape.steps * shape.rounds
        if shape.evaluation == "private":
            steps += 1
        sigma = Budget.create(1.0, 1e-4).calibrate(shape.q, steps) * (1.1 if shape.evaluation == "private" else 1)
    charter = draft(
        Federation.model_validate(config),
        task_sha256=digest("task"),
        coordinator_key=people["coordinator"].key,
        partner_keys={name: people[name].key for name in names},
        noise_multiplier=sigma,
        simulated=True,
        population=SimulatedClients(clients=shape.clients, declared_records=100) if shape.clients else None,
    ).model_copy(update={"created": EPOCH, "expires": EPOCH + timedelta(days=365)})
    signed = SignedCharter.unsigned(charter)
    for person in people.values():
        signed = signed.sign(person)
    return signed, people


def honest(shape: Shape | None = None) -> Draft:
    """A whole run by honest parties, with the crashes that were asked for."""
    shape = shape or Shape()
    signed, people = signed_charter(shape)
    made = Draft(signed, people, {})
    genesis = {"ledger_id": "x", "simulated": True, "software": "hansa 0.1.0"}
    for name, person in people.items():
        role = "partner" if name != "coordinator" else "population" if shape.clients else "coordinator"
        some = shape.evaluation != "none"
        held_out = {"kind": shape.evaluation, "commitment": digest(name, "held out") if some else None}
        data = {"id": f"{name}/train", "commitment": digest(name), "held_out": held_out} if role == "partner" else None
        made.books[name] = [
            ("genesis", {**genesis, "owner": name, "role": role, "key": person.key, "dataset": data}),
            (
                "charter",
                {"charter_sha256": signed.sha256, "name": "test", "expires": signed.charter.expires.isoformat()},
            ),
        ]
    if shape.clients:
        _population(made, shape)
    else:
        _Honest(made, shape).play()
    return made


class _Honest:
    def __init__(self, made: Draft, shape: Shape) -> None:
        self.made, self.shape = made, shape
        self.names = [name for name in made.people if name != "coordinator"]
        self.crash = random.Random(shape.crashes) if shape.crashes is not None else None
        self.rng = random.Random(shape.seed)

    def happens(self) -> bool:
        return self.crash is not None and self.crash.random() < 0.15

    def add(self, owner: str, kind: str, **body: Any) -> None:
        self.made.books[owner].append((kind, body))
        if self.happens():
            self.made.books[owner].append(("recovered", {"torn_bytes": 17, "torn_sha256": digest("torn")}))

    def exchange(self, run: str, number: int, purpose: str, names: list[str], act: Any) -> list[str]:
        """Ask, let each partner act, record answers; a crash asks again. Returns who answered ok."""
        requests = {
            n: {"request_id": f"{run}-{number}-{purpose}-{n}", "request_sha256": digest(run, number, purpose, n)}
            for n in names
        }
        body = {"run_id": run, "round": number, "purpose": purpose}
        answered: dict[str, dict[str, Any]] = {}
        while True:
            self.add("coordinator", "ask", **body, requests=requests)
            for name in names:
                request = {**requests[name], "run_id": run}
                if self.happens() and len(answered) > 1:  # its answer is lost; what it did before still stands
                    outcome, reply = "timeout", None
                else:
                    outcome, reply = act(name, request)
                if outcome == "crashed":
                    outcome, reply = "timeout", None
                answered[name] = {"request_id": request["request_id"], "outcome": outcome, "reply_sha256": reply}
            if self.happens():
                continue  # crashed before the answers were recorded
            self.add("coordinator", "answers", **body, replies=answered)
            ok = [name for name in names if answered[name]["outcome"] == "ok"]
            refused = [name for name in names if answered[name]["outcome"].startswith("refused")]
            if (ok or refused) and not self.happens():
                return ok

    def known(self, name: str, kind: str, request: dict[str, Any]) -> dict[str, Any] | None:
        bodies = [b for k, b in self.made.books[name] if k == kind and b["request_id"] == request["request_id"]]
        return bodies[0] if bodies else None

    def open(self, name: str, request: dict[str, Any]) -> tuple[str, str | None]:
        signed, charter = self.made.signed, self.made.signed.charter
        reply = digest("reply", request)
        if self.known(name, "hold", request):
            return "ok", reply
        book = self.made.books[name]
        if charter.privacy.kind == "local" and not any(kind == "budget" for kind, _ in book):
            budget = Budget.create(charter.privacy.epsilon, charter.privacy.delta).to_fields()
            self.add(
                name,
                "budget",
                dataset=f"{name}/train",
                charter_sha256=signed.sha256,
                unit="record",
                adjacency="add-or-remove-one",
                budget=budget,
            )
        if any(kind == "hold" for kind, _ in book):
            if not self.known(name, "refuse", request):
                self.add(name, "refuse", **request, round=None, reason="budget", detail="spent")
            return "refused: budget", reply
        self.add(
            name,
            "hold",
            **request,
            charter_sha256=signed.sha256,
            dataset=f"{name}/train",
            plan=plan_fields(self.shape, signed),
            plan_sha256=plan_sha256(self.shape, signed),
            software="hansa test",
        )
        return "ok", reply

    def work(self, name: str, request: dict[str, Any], number: int, purpose: str) -> tuple[str, str | None]:
        charter = self.made.signed.charter
        reply = digest("reply", request)
        if purpose == "evaluate" and self.shape.evaluation == "public":
            if not self.known(name, "public", request):
                self.add(name, "public", **request, round=number, reply_sha256=reply)
            return "ok", reply
        event = {item["purpose"]: item["event"] for item in plan_fields(self.shape, self.made.signed)}[purpose]
        if not self.known(name, "debit", request):
            member = charter.member(name)
            assert member is not None
            clip = charter.privacy.clip_norm if purpose == "train" else None
            self.add(
                name,
                "debit",
                **request,
                round=number,
                purpose=purpose,
                charter_sha256=self.made.signed.sha256,
                plan_sha256=plan_sha256(self.shape, self.made.signed),
                dataset=f"{name}/train",
                event=event,
                clip_norm=None if clip is None else real(clip),
                declared_records=member.declared_records,
            )
            if self.happens():
                return "crashed", None
        if not self.known(name, "commit", request):
            self.add(name, "commit", **request, round=number, reply_sha256=reply)
        if self.happens():
            return "crashed", None
        return "ok", reply

    def close(self, run: str, rounds: int, why: str) -> None:
        model = sha256(MODEL) if rounds else None
        self.add("coordinator", "close", run_id=run, rounds=rounds, model_sha256=model, why=why)
        for name in self.names:
            if any(kind == "hold" and body["run_id"] == run for kind, body in self.made.books[name]):
                self.add(name, "release", run_id=run, why="closed")
        self.made.closings.append((run, model, {owner: len(book) for owner, book in self.made.books.items()}))

    def play(self) -> None:
        self.add("coordinator", "run", run_id="run-1", charter_sha256=self.made.signed.sha256)
        held = self.exchange("run-1", 0, "open", self.names, self.open)
        for number in range(1, self.shape.rounds + 1):
            cohort = sorted(self.rng.sample(held, max(1, round(self.shape.participation * len(held)))))
            ok = self.exchange("run-1", number, "train", cohort, lambda n, r, i=number: self.work(n, r, i, "train"))
            if self.shape.evaluation == "public" or (
                self.shape.evaluation == "private" and number == self.shape.rounds
            ):
                self.exchange("run-1", number, "evaluate", held, lambda n, r, i=number: self.work(n, r, i, "evaluate"))
            last = number == self.shape.rounds
            body = {
                "run_id": "run-1",
                "round": number,
                "model_sha256": sha256(MODEL) if last else digest("model", number),
                "partners": ok,
                "metrics": {"auc": real(0.7 + number / 100)} if self.shape.evaluation != "none" else {},
            }
            for _ in range(1 + self.happens()):
                self.add("coordinator", "round", **body)
        self.close("run-1", self.shape.rounds, "completed")
        if self.shape.refused_run:
            self.add("coordinator", "run", run_id="run-2", charter_sha256=self.made.signed.sha256)
            self.exchange("run-2", 0, "open", self.names[:1], self.open)
            self.close("run-2", 0, "refused")


def plan_fields(shape: Shape, signed: SignedCharter) -> list[dict[str, Any]]:
    """The plan of one run as a hold has it."""
    sigma = signed.charter.privacy.noise_multiplier
    event: dict[str, Any] = {"mechanism": "none/1"}
    if sigma is not None:
        event = {"mechanism": "poisson-gaussian/1", "q": real(shape.q), "sigma": real(sigma), "steps": shape.steps}
    plan = [{"purpose": "train", "count": shape.rounds, "event": event}]
    if shape.evaluation == "private":
        noise = {"mechanism": "poisson-gaussian/1", "q": "1.0", "sigma": "50.0", "steps": 1}
        plan.append({"purpose": "evaluate", "count": 1, "event": noise})
    return plan


def plan_sha256(shape: Shape, signed: SignedCharter) -> str:
    """The hash that holds and debits carry."""
    return hashlib.sha256(canonical(plan_fields(shape, signed))).hexdigest()


def _ranges(numbers: list[int]) -> list[list[int]]:
    found: list[list[int]] = []
    for n in sorted(numbers):
        if found and found[-1][1] == n - 1:
            found[-1][1] = n
        else:
            found.append([n, n])
    return found


def _population(made: Draft, shape: Shape) -> None:
    rng, charter = random.Random(shape.seed), made.signed.charter
    crash = random.Random(shape.crashes) if shape.crashes is not None else None
    book = made.books["coordinator"]
    plan = plan_fields(shape, made.signed)
    book.append(("run", {"run_id": "run-1", "charter_sha256": made.signed.sha256}))
    if charter.privacy.kind == "local":
        budget = {
            "dataset": None,
            "charter_sha256": made.signed.sha256,
            "unit": "record",
            "adjacency": "add-or-remove-one",
            "clients": shape.clients,
            "budget": Budget.create(charter.privacy.epsilon, charter.privacy.delta).to_fields(),
        }
        book.append(("budget", budget))
    book.append(("cohort-hold", {"run_id": "run-1", "plan": plan}))
    for number in range(1, shape.rounds + 1):
        cohort = rng.sample(range(shape.clients), max(2, round(shape.participation * shape.clients)))
        at = {"run_id": "run-1", "round": number, "purpose": "train"}
        clip = charter.privacy.clip_norm
        debit = at | {
            "event": dict(plan[0]["event"]),
            "clip_norm": None if clip is None else real(clip),
            "declared_records": 100,
            "clients": _ranges(cohort),
        }
        for _ in range(2 if crash and crash.random() < 0.4 else 1):
            book.append(("cohort-debit", dict(debit)))
            book.append(("cohort-commit", at | {"clients": _ranges(cohort[: max(1, len(cohort) - 1)])}))
        last = number == shape.rounds
        model = sha256(MODEL) if last else digest("model", number)
        book.append(
            (
                "round",
                {
                    "run_id": "run-1",
                    "round": number,
                    "model_sha256": model,
                    "partners": None,
                    "metrics": {"auc": "0.7"},
                },
            )
        )
    book.append(
        ("close", {"run_id": "run-1", "rounds": shape.rounds, "model_sha256": sha256(MODEL), "why": "completed"})
    )
    made.closings.append(("run-1", sha256(MODEL), {"coordinator": len(book)}))


def result_for(made: Draft, verdict: dict[str, Any]) -> dict[str, Any]:
    """The part of result.json that an audit compares."""
    keys = ("epsilon", "epsilon_filter", "epsilon_cap", "delta", "rounds")
    charter = made.signed.charter
    declared = {m.name: m.declared_records for m in charter.partners}
    rounds = {b["round"]: b["metrics"] for kind, b in made.books["coordinator"] if kind == "round"}
    listed = [
        {"round": n, "metrics": {name: float(value) for name, value in metrics.items()}}
        for n, metrics in rounds.items()
    ]
    fields = ("run_id", "round", "reason", "detail")
    return {
        "run_id": "run-1",
        "charter_sha256": made.signed.sha256,
        "privacy": {
            key: getattr(charter.privacy, key) for key in ("kind", "epsilon", "delta", "noise_multiplier", "clip_norm")
        },
        "partners": {
            name: {"declared_records": declared.get(name, 100), **{key: p[key] for key in keys}}
            for name, p in verdict["partners"].items()
        },
        "rounds": listed,
        "final": listed[-1]["metrics"],
        "refusals": [
            {"partner": name, **{field: body[field] for field in fields}}
            for name, book in made.books.items()
            for kind, body in book
            if kind == "refuse"
        ],
    }
