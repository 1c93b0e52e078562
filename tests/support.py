"""What the tests of the core share: fixed identities, a tiny task, charters, gates and a federation in memory."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hansa.clients.app import Node
from hansa.clients.datasets import RegisteredDataset, Rows, Split
from hansa.clients.gate import Gate
from hansa.clients.law import Control, SiteLaw
from hansa.clients.outbox import Outbox
from hansa.clients.settings import SiteSettings
from hansa.common.charter import Charter, SignedCharter
from hansa.common.config import SIGNED_PARTNERS_MAX, Federation
from hansa.common.heads import KeptHeads
from hansa.common.identity import Identity
from hansa.common.ledger import Counter, Ledger
from hansa.common.messages import Manifest, SignedWire
from hansa.common.tasks import Task
from hansa.common.tasks.schema import ArraySchema
from hansa.common.verifier import verify_bundle
from hansa.server.rounds import Outcome
from hansa.simulations.execution import Execution
from hansa.simulations.federation import Simulation
from hansa.simulations.result import make_result, save_result

CODE = "c" * 64
SIGMA = 4.0
EXPIRES = datetime.now(UTC).replace(microsecond=0) + timedelta(days=30)  # once: equal charters have equal bytes


def identity(name: str) -> Identity:
    """The same key for the same name, always."""
    return Identity(name, Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"test {name}".encode()).digest()))


def terms(**changes: Any) -> dict[str, Any]:
    """The JSON of a charter between three partners, as a dict to be changed (dotted keys go down)."""
    made: dict[str, Any] = {
        "format": "hansa-charter/1",
        "name": "test",
        "purpose": "",
        "task": {"name": "tiny", "code_sha256": CODE},
        "coordinator": {"name": "coordinator", "key": identity("coordinator").key},
        "partners": [{"name": n, "key": identity(n).key, "declared_records": 40} for n in ("ada", "ben", "cy")],
        "algorithm": {"rounds": 3, "local": {"steps": 1, "optimizer": {"lr": 0.5}}},
        "privacy": {"epsilon": 2.0, "delta": 1e-3, "clip_norm": 1.0, "noise_multiplier": SIGMA},
        "evaluation": {"kind": "none"},
        "quorum": 2,
        "round_deadline_s": 60.0,
        "declared_tolerance": 0.1,
        "benefit": "Every partner receives the model.",
        "model_seed": 0,
        "created": datetime(2026, 1, 1, tzinfo=UTC),
        "expires": EXPIRES,
        "simulated": True,
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        place = made
        for part in path:
            place = place[part]
        place[last] = value
    return made


def charter(**changes: Any) -> SignedCharter:
    """A charter that everyone has signed."""
    signed = SignedCharter.unsigned(Charter.model_validate(terms(**changes)))
    holders = {identity(name).key: identity(name) for name in ("ada", "ben", "cy", "coordinator", "eve")}
    for key in signed.charter.keys().values():
        signed = signed.sign(holders[key])
    return signed


NO_PRIVACY = {"kind": "none"}


def tiny_task(classes: int = 2) -> Task:
    """Three features, one linear layer."""
    return Task(
        name="tiny",
        title="tiny",
        schema=ArraySchema(shape=(3,), value_range=(-1.0, 1.0)),
        classes=tuple("abcdefgh"[:classes]),
        build_model=lambda: torch.nn.Linear(3, classes),
    )


def rows(n: int, seed: int = 0) -> Rows:
    """n random records of the tiny task, both classes in turn."""
    x = np.random.default_rng(seed).uniform(-1, 1, (n, 3)).astype(np.float32)
    return Rows(torch.from_numpy(x), torch.arange(n) % 2)


class Source:
    """Rows that can be counted, spoilt or forbidden."""

    def __init__(self, n: int = 40, held_out: int = 8, seed: int = 0) -> None:
        self.split = Split(rows(n, seed), rows(held_out, seed + 1000))
        self.reads = 0
        self.hook: Callable[[], None] = lambda: None

    def __call__(self) -> Split:
        self.reads += 1
        self.hook()
        return self.split


def forbidden() -> None:
    """A hook for `Source` where nothing may be read."""
    raise AssertionError("data was read")


@dataclass
class Site:
    """One partner: its folder outlives every restart of its gate."""

    name: str
    folder: Path
    source: Source
    simulated: bool = True
    allow_unprotected: bool = False
    public: bool = True
    ledger: Ledger | None = None
    heads: KeptHeads | None = None
    rules: Mapping[str, Any] = field(default_factory=dict)

    @property
    def control(self) -> Control:
        """What `hansa node` commands write to."""
        return Control(self.folder / "control")

    def and_after_a_restart(self, gate: Gate, *charters: SignedCharter) -> Iterator[Gate]:
        """This gate, and then the node's next."""
        yield gate
        yield self.gate(*charters)

    def gate(self, *charters: SignedCharter, code: str = CODE) -> Gate:
        """(Re)start the node: everything but the files is forgotten."""
        if self.ledger is not None:
            self.ledger.close()
        me = identity(self.name)
        read = self.source.hook
        self.source.hook = lambda: None  # registering reads; that is before anything is asked
        self.dataset = RegisteredDataset.register(tiny_task(), self.source, self.folder / "data", public=self.public)
        self.source.hook = read
        genesis = {"owner": self.name, "role": "partner", "ledger_id": "0" * 32, "software": "test"}
        self.ledger = Ledger(
            self.folder / "ledger.jsonl",
            me,
            {**genesis, "simulated": self.simulated},
            Counter(self.folder / "counter"),
        )
        made = Gate(
            self.name,
            me.key,
            [self.dataset],
            self.ledger,
            simulated=self.simulated,
            law=SiteLaw(
                SiteSettings(**{"allow_unprotected": self.allow_unprotected, **self.rules}), self.control, ("tiny",)
            ),
        )
        for signed in charters:
            made.accept(signed, self.dataset, code)
        return made

    def node(self, *charters: SignedCharter) -> Node:
        """A node of the tiny task around a fresh gate."""
        gate = self.gate(*charters)
        if self.heads is not None:
            self.heads.close()
        self.heads = KeptHeads(self.folder / "heads.jsonl", identity(self.name), charters[0].charter.keys())
        return Node(
            tiny_task(),
            torch.nn.Linear(3, 2),
            self.dataset,
            gate,
            SignedWire(identity(self.name), {"coordinator": identity("coordinator").key}, charters[0].sha256),
            outbox=Outbox(self.folder / "outbox"),
            identity=identity(self.name),
            keep=self.folder / "models",
            heads=self.heads,
        )

    def kinds(self) -> list[str]:
        """The types of this ledger's entries, in order."""
        assert self.ledger is not None
        return [entry.type for entry in self.ledger.entries]


def request(
    signed: SignedCharter, kind: str, round_number: int, to: str = "ada", run: str = "run-1", **changes: Any
) -> Manifest:
    """What the coordinator asks, as `rounds.py` names it."""
    made: dict[str, Any] = {
        "kind": kind,
        "sender": "coordinator",
        "recipient": to,
        "charter_sha256": signed.sha256,
        "run_id": run,
        "round": round_number,
        "request_id": f"{run}.{round_number}.{kind}.{to}",
        "in_reply_to": "",
        "fields": {},
    }
    return Manifest(**{**made, **changes})


def weights(value: float = 0.0) -> dict[str, np.ndarray]:
    """A model of the tiny task."""
    return {"weight": np.full((2, 3), value, np.float32), "bias": np.full((2,), value, np.float32)}


HEART = {
    name: {"data": f"package:heart-disease/{name}.csv", "declared_records": n}
    for name, n in (("cleveland", 240), ("hungary", 235), ("switzerland", 100), ("va-long-beach", 160))
}


def config(**changes: Any) -> Federation:
    """Four hospitals, two steps a round, without privacy; sections are replaced whole."""
    made: dict[str, Any] = {
        "name": "heart",
        "task": "heart-disease",
        "partners": HEART,
        "algorithm": {"rounds": 3, "local": {"steps": 2, "optimizer": {"lr": 0.2}}},
        "privacy": NO_PRIVACY,
        "evaluation": {"kind": "public"},
        "quorum": 3,
    }
    return Federation.model_validate({k: v for k, v in {**made, **changes}.items() if v is not None})


def digest(value: object) -> str:
    """64 hex digits that stand for something."""
    return hashlib.sha256(repr(value).encode()).hexdigest()


def unwrapped(data: bytes) -> bytes:
    """The bytes and, behind them, whatever in them is base64, decoded: a search that stops at envelopes finds nothing."""
    inside = re.findall(rb"[A-Za-z0-9+/]{8,}={0,2}", data)
    return data + b"\n" + b"\n".join(base64.b64decode(part) for part in inside if len(part) % 4 == 0)


def same_arrays(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Equal to the last bit."""
    assert sorted(a) == sorted(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name


def sixty_clients(steps: int = 2, **changes: Any) -> Federation:
    """Sixty clients that share the digits, half of them in each of three rounds, without privacy: engines are compared on it."""
    local = {"steps": steps, "sampling_rate": 0.5, "optimizer": {"lr": 0.2}}
    made = {
        "name": "digits",
        "task": "digits",
        "partners": None,
        "population": {"dataset": "digits", "clients": 60, "partition": {"kind": "iid", "min_records": 2}},
        "algorithm": {"rounds": 3, "participation": 0.5, "local": local},
        "evaluation": {"kind": "public", "every": 3, "test_fraction": 0.2},
        "privacy": NO_PRIVACY,
        "quorum": 20,
    }
    return config(**{**made, **changes})


class Killed(BaseException):
    """What stands for SIGKILL here: nothing in Hansa catches it (tests/e2e has the real one)."""


def run(settings: Federation, out: Path, resume: bool = False, die_at: int | None = None) -> tuple[Outcome, int]:
    """Run to the end, or to the `die_at`-th notification; the outcome and how many notifications there were."""
    count = 0

    def notify(*_: object, **__: object) -> None:
        nonlocal count
        count += 1
        if count == die_at:
            raise Killed

    # What a trial finds fastest differs from time to time, and so would the last bits.
    execution = Execution(batched=True, chunk=8, workers=0) if settings.size > SIGNED_PARTNERS_MAX else None
    simulation = Simulation(settings, Path(), out, resume=resume, notify=notify, execution=execution)
    try:
        outcome = simulation.run()
        if outcome.model is not None:
            simulation.save_model(outcome.model)
        save_result(out, make_result(simulation, outcome, outcome.refusals, {}))
    finally:
        simulation.close()
    return outcome, count


def verified(out: Path) -> dict[str, Any]:
    """The verdict on a bundle that must verify."""
    verdict = verify_bundle(out)
    assert verdict["violations"] == []
    return verdict
