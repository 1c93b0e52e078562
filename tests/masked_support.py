"""Secure aggregation against whoever cheats: four real nodes and a coordinator that asks what it likes; and a Grid that loses and lies.

Nodes are put together from their node.yaml (tests/node_support.py); requests are handed to their ClientApp in process.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from attack_support import SPENDING, payload_of
from hansa.clients import app as app_module
from hansa.clients.node import Site
from hansa.clients.registrations import DataFiles
from hansa.clients.registry import Registry, Rules
from hansa.common.charter import SignedCharter, draft
from hansa.common.config import Federation, threshold_of
from hansa.common.errors import Refusal
from hansa.common.flower import Error, Message, RecordDict, addressed
from hansa.common.identity import Identity
from hansa.common.masking import (
    Told,
    asked_fields,
    by_name,
    fixed_point,
    revealed_from,
    sent_from,
)
from hansa.common.messages import Manifest, SignedWire
from hansa.common.model import model_sha256
from hansa.common.plan import calibrated
from hansa.common.secagg import Agreement, Revealed, Ring, Sent, Sum, from_ring, read_keys
from hansa.common.tasks import code_sha256, initial_model, load_task, sized
from hansa.server import rounds
from hansa.server.masked import MaskedRounds, Summed
from hansa.simulations.federation import Simulation
from hansa.simulations.grid import InProcessGrid
from node_support import ROWS, TASK, Realm, context
from support import config, request

NAMES = ("ada", "ben", "cy", "dee")
QUORUM = 3
ROUNDS = 2
RETRIES = 2
Answer = tuple[Manifest, dict[str, Any], RecordDict]


# -- four nodes ----------------------------------------------------------------------------------------------------------


@dataclass
class Town(Realm):
    """Four partners of some charters: shared noise and one of them may collude, or none (and batches are sampled); one without secure
    aggregation; one to be left."""

    run_ids: Iterator[str] = field(default_factory=lambda: (f"run-{n}" for n in itertools.count(1)))

    def charter(self, name: str, coordinator: str = "coordinator", **changes: Any) -> SignedCharter:
        terms: dict[str, Any] = {
            "name": name,
            "task": TASK,
            "partners": {n: {"data": "x", "declared_records": ROWS} for n in NAMES},
            "algorithm": {"rounds": ROUNDS, "local": {"steps": 1, "optimizer": {"lr": 0.2}}},
            "privacy": {"noise": "shared", "epsilon": 100.0, "delta": 1e-3, "clip_norm": 1.0, "noise_multiplier": 50.0},
            "secure_aggregation": {"colluding": 1, "retries": RETRIES},
            "evaluation": {"kind": "public"},
            "quorum": QUORUM,
        }
        config = sized(Federation.model_validate({**terms, **changes}))
        signed = SignedCharter.unsigned(
            draft(
                config,
                task_sha256=code_sha256(TASK),
                coordinator_key=self.keys.home("coordinator", coordinator).key(),
                partner_keys={n: self.keys.home(n).key() for n in NAMES},
                noise_multiplier=calibrated(config),
                simulated=True,
            )
        )
        for home in ("coordinator", *NAMES):
            signed = signed.sign(self.keys.home(home, coordinator if home == "coordinator" else None).identity())
        return signed

    @cached_property
    def charters(self) -> dict[str, SignedCharter]:
        sampled = {"rounds": ROUNDS, "local": {"steps": 1, "sampling_rate": 0.5, "optimizer": {"lr": 0.2}}}
        local = {"kind": "local", "epsilon": 100.0, "delta": 1e-3, "clip_norm": 1.0, "noise_multiplier": 50.0}
        return {
            "one": self.signed,
            "none": self.charter("none", secure_aggregation={"colluding": 0, "retries": RETRIES}, algorithm=sampled),
            "plain": self.charter("plain", privacy=local, secure_aggregation=None),
            "left": self.charter("left"),
        }

    def data(self, name: str, number: int | None = None) -> Path:
        """The fifth part of the rows is everybody's held-out part."""
        return super().data(name, NAMES.index(name) if number is None else number)

    def register(self, name: str, held_out: Path | None = None) -> None:
        files = DataFiles(TASK, self.data(name), held_out or self.data(name, len(NAMES)))
        Registry(self.settings(name).state).add(files, Rules(public=True))

    def start(self, name: str, *charters: SignedCharter) -> Site:
        settings = self.settings(name, *charters or self.charters.values())
        if not Registry(settings.state).all():
            self.register(name)
        return super().start(name, *charters or self.charters.values())

    def plot(self, charter: str = "one") -> Plot:
        """A run of the malicious coordinator, which everybody accepted."""
        made = Plot(self, self.charters[charter], next(self.run_ids))
        made.open()
        return made

    def ledger(self, name: str) -> list[Any]:
        return list(self.sites[name].ledger.entries)

    @contextlib.contextmanager
    def nothing_spent(self) -> Iterator[None]:
        """Nobody's ledger says, after this, anything else about spending than before."""
        before = {name: [e for e in self.ledger(name) if e.type in SPENDING] for name in NAMES}
        yield
        assert before == {name: [e for e in self.ledger(name) if e.type in SPENDING] for name in NAMES}

    @contextlib.contextmanager
    def nothing_recorded(self) -> Iterator[None]:
        before = {name: self.ledger(name) for name in NAMES}
        yield
        assert before == {name: self.ledger(name) for name in NAMES}


@dataclass
class Plot:
    """A run as a malicious coordinator leads it: it has the real identity key, and asks whom it likes what it likes."""

    town: Town
    signed: SignedCharter
    run: str
    envelopes: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.boss: Identity = self.town.keys.home("coordinator").identity()
        self.identities = {n: self.town.keys.home(n).key() for n in NAMES}
        self.wire = SignedWire(self.boss, self.identities, self.signed.sha256)
        made = initial_model(load_task(TASK), 0)
        self.model = {n: p.detach().numpy() for n, p in made.named_parameters() if p.requires_grad}

    def ask(self, kind: str, number: int, to: str, **changes: Any) -> Manifest:
        return request(self.signed, kind, number, to, self.run, **changes)

    def records(self, ask: Manifest, tensors: Any = None) -> RecordDict:
        return self.wire.encode(ask, self.wire.pack(tensors or {}))[0]

    def push(self, ask: Manifest, records: RecordDict) -> RecordDict:
        """Hand a request to the real node; what it answers."""
        kind = ask.kind if ask.kind in ("train", "evaluate") else f"query.{ask.kind}"
        message = addressed(records, kind, 1, str(ask.round), 60.0, "m1")
        site = self.town.sites[ask.recipient]
        (joined,) = (one for one in site.joined if one.signed.sha256 == self.signed.sha256)
        return joined.app(message, context()).content  # type: ignore[no-any-return]

    def send(self, ask: Manifest, tensors: Any = None) -> Answer:
        """A signed request, and its signed answer."""
        content = self.push(ask, self.records(ask, tensors))
        manifest, found, _ = self.wire.decode(content, ask.recipient)
        return manifest, found, content

    def refused(
        self, ask: Manifest, reason: Refusal, words: str, tensors: Any = None, *, also: tuple[str, ...] = ()
    ) -> None:
        """The answer is that no and nothing else, and the node's ledger has it and nothing else new, but entries of types `also`."""
        before = self.town.ledger(ask.recipient)
        reply, found, _ = self.send(ask, tensors)
        assert (reply.kind, reply.fields.get("reason"), found) == ("refused", reason.value, {}), reply
        assert set(reply.fields) == {"reason", "detail"}
        assert words in reply.fields["detail"], reply.fields
        new = self.town.ledger(ask.recipient)[len(before) :]
        assert [e.type for e in new] == [*also, "refuse"]
        said = new[-1].body
        assert (said["request_id"], said["reason"], said["detail"]) == (
            ask.request_id,
            reason.value,
            reply.fields["detail"],
        )

    def open(self) -> None:
        for name in NAMES:
            reply, _, _ = self.send(self.ask("open", 0, name))
            assert reply.kind == "accepted", reply
            self.envelopes[name] = base64.b64decode(reply.fields.get("key", ""))

    def close(self) -> None:
        """Free what the run holds, with whoever is up."""
        for name in self.town.sites:
            self.send(self.ask("close", ROUNDS + 1, name))

    def attempt(self, number: int = 1, attempt: int = 0, **changes: Any) -> Attempt:
        """An attempt at a round; `changes`: of its roster (names), envelopes, model or terms."""
        return Attempt(self, number, attempt, **changes)

    def kinds(self, name: str) -> list[str]:
        """What a node's ledger has of this run."""
        return [e.type for e in self.town.ledger(name) if e.body.get("run_id") == self.run and e.type != "refuse"]


@dataclass
class Attempt:
    """One attempt at a masked sum, each exchange asked of whom one likes, with whatever one likes changed."""

    plot: Plot
    number: int
    attempt: int
    roster: tuple[str, ...] = NAMES
    keys: Mapping[str, bytes] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    terms: Mapping[str, Any] = field(default_factory=dict)
    vectors: dict[str, Ring] = field(default_factory=dict)
    sent: dict[str, Sent] = field(default_factory=dict)
    signatures: dict[str, bytes] = field(default_factory=dict)
    revealed: dict[str, Revealed] = field(default_factory=dict)

    def __post_init__(self) -> None:
        charter, plot = self.plot.signed.charter, self.plot
        secure = charter.secure_aggregation
        assert secure is not None
        self.model = self.model or plot.model
        self.envelopes = {name: {**plot.envelopes, **self.keys}[name] for name in self.roster}
        told = Told(
            self.attempt,
            self.envelopes,
            threshold_of(len(NAMES), secure.colluding),
            charter.quorum,
            fixed_point(charter).bits,
            secure.dimension or 0,
        )
        self.told = replace(told, **self.terms)

    @property
    def fields(self) -> dict[str, Any]:
        """What every request of it says of the attempt."""
        named = self.told.agreement("", "", 0, "", dict.fromkeys(self.roster, ""))
        return asked_fields(named, self.envelopes)

    @cached_property
    def agreed(self) -> Agreement:
        """The attempt, where its keys are good."""
        plot = self.plot
        keys = read_keys(self.envelopes, plot.signed.sha256, plot.run, plot.identities)
        return self.told.agreement(plot.signed.sha256, plot.run, self.number, model_sha256(self.model), keys)

    def ask(self, kind: str, to: str, **fields: Any) -> Manifest:
        which = fields.pop("request_id", f"{self.plot.run}.{self.number}.{kind}.{self.attempt}.{to}")
        return self.plot.ask(kind, self.number, to, fields={"masked": self.fields, **fields}, request_id=which)

    def ask_agree(self, to: str, survivors: Iterable[str] | Mapping[str, bytes], **more: Any) -> Manifest:
        """Survivors by name, or the words that are to be theirs."""
        words = survivors if isinstance(survivors, Mapping) else {name: self.sent[name].word for name in survivors}
        return self.ask("agree", to, words=by_name(words), model_sha256=model_sha256(self.model), **more)

    def ask_reveal(
        self,
        to: str,
        survivors: Iterable[str],
        signatures: Mapping[str, bytes] | None = None,
        shares: Mapping[str, bytes] | None = None,
        **more: Any,
    ) -> Manifest:
        given = {name: self.sent[name].shares[to] for name in survivors} if shares is None else shares
        signed = by_name(self.signatures if signatures is None else signatures)
        said = {"signatures": signed, "shares": by_name(given), "model_sha256": model_sha256(self.model)}
        return self.ask("reveal", to, **said, **more)

    def train(self, *names: str) -> Attempt:
        for name in names or self.roster:
            reply, tensors, _ = self.plot.send(self.ask("train", name), self.model)
            assert (reply.kind, list(tensors)) == ("masked", ["masked"]), reply
            self.vectors[name], self.sent[name] = tensors["masked"], sent_from(reply.fields["sent"])
        return self

    def agree(self, *names: str, survivors: Iterable[str] | None = None) -> Attempt:
        listed = list(self.sent if survivors is None else survivors)
        for name in names or listed:
            reply, _, _ = self.plot.send(self.ask_agree(name, listed))
            assert reply.kind == "survivors", reply
            self.signatures[name] = base64.b64decode(reply.fields["signature"])
        return self

    def reveal(self, *names: str, survivors: Iterable[str] | None = None) -> Attempt:
        listed = list(self.sent if survivors is None else survivors)
        for name in names or listed:
            reply, _, _ = self.plot.send(self.ask_reveal(name, listed))
            assert reply.kind == "shares", reply
            self.revealed[name] = revealed_from(reply.fields["revealed"])
        return self

    def open(self, survivors: Iterable[str] | None = None) -> list[int]:
        """The sum that came of it, as an honest coordinator opens it."""
        total = Sum(self.agreed)
        for name in self.sent if survivors is None else survivors:
            total.add(name, self.vectors[name], self.sent[name], self.plot.identities[name])
        opened = total.open(self.revealed)
        assert not total.liars
        return [int(v) for v in from_ring(opened)]


@dataclass
class Plain:
    """What nodes masked, in the order in which they did, as nobody but them has it."""

    seen: list[tuple[str, Agreement, Ring, Sent]] = field(default_factory=list)

    @classmethod
    def watch(cls, patch: pytest.MonkeyPatch) -> Plain:
        made, real = cls(), app_module.mask

        def spy(agreement: Agreement, identity: Identity, private: bytes, values: Ring) -> tuple[Ring, Sent]:
            masked, sent = real(agreement, identity, private, values)
            made.seen.append((identity.name, agreement, values.copy(), sent))
            return masked, sent

        patch.setattr(app_module, "mask", spy)
        return made

    def of(self, name: str, number: int, attempt: int = 0) -> Ring:
        """The last vector that a partner masked for an attempt."""
        return [v for n, a, v, _ in self.seen if (n, a.round, a.attempt) == (name, number, attempt)][-1]

    def sum(self, names: Iterable[str], number: int, attempt: int = 0) -> list[int]:
        """By Python's own integers."""
        chosen = [from_ring(self.of(name, number, attempt)) for name in names]
        return [sum(int(v[i]) for v in chosen) for i in range(len(chosen[0]))]


@dataclass
class Sums:
    """What rounds of an honest coordinator came to, in order: (round, sum and who is in it)."""

    seen: list[tuple[int, Summed]] = field(default_factory=list)

    @classmethod
    def watch(cls, patch: pytest.MonkeyPatch) -> Sums:
        made, real = cls(), MaskedRounds.sum

        def spy(self: MaskedRounds, number: int, *args: Any) -> Summed:
            found = real(self, number, *args)
            made.seen.append((number, found))
            return found

        patch.setattr(MaskedRounds, "sum", spy)
        return made


# -- a Grid that loses, and partners that lie ------------------------------------------------------------------------------

HOSPITALS = ("cleveland", "hungary", "switzerland", "va-long-beach")


def simulation(out: Path, resume: bool = False, **changes: Any) -> Simulation:
    """One round of four hospitals, of which one may collude, with shared noise and no retries; sections are replaced whole."""
    terms: dict[str, Any] = {
        "algorithm": {"rounds": 1, "local": {"steps": 1, "optimizer": {"lr": 0.2}}},
        "privacy": {"noise": "shared", "epsilon": 100.0, "delta": 1e-3, "clip_norm": 1.0, "noise_multiplier": 50.0},
        "secure_aggregation": {"colluding": 1, "retries": 0},
        "evaluation": {"kind": "none"},
        "declared_tolerance": 0.5,
    }
    return Simulation(config(**{**terms, **changes}), Path(), out, resume=resume)


Hook = Callable[["Asked", Callable[[], Message]], "Message | None"]
"""(what is asked, the honest node's answer) -> what the coordinator gets; None: nothing, ever."""


@dataclass(frozen=True)
class Asked:
    """A request as the coordinator sent it."""

    to: str
    kind: str
    round: int
    attempt: int
    message: Message

    def lost(self) -> Message:
        """What a broken connection gives."""
        return Message(Error(0, "lost"), reply_to=self.message)


class Between(InProcessGrid):
    """Everything passes by `hook`. Whoever waits for what does not come is told at once that its deadline has passed."""

    def __init__(self, simulation: Simulation, hook: Hook, patch: pytest.MonkeyPatch) -> None:
        inner = simulation.grid
        super().__init__(inner._app, inner._nodes, inner._context)
        self.hook, self.asked = hook, list[Asked]()
        self._names = list(simulation.nodes)
        self._ahead = 0.0
        self.shuffled: random.Random | None = None  # answers come in any order
        clock = SimpleNamespace(
            monotonic=lambda: time.monotonic() + self._ahead, perf_counter=time.perf_counter, sleep=time.sleep
        )
        patch.setattr(rounds, "time", clock)
        simulation.grid = self

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        waiting = [i for i in self._queue if i in set(message_ids)]
        if self.shuffled is not None:
            self.shuffled.shuffle(waiting)
        for identifier in waiting:
            message = self._queue.pop(identifier)
            body = json.loads(payload_of(message.content))
            attempt = body["fields"].get("masked", {}).get("attempt", 0)
            asked = Asked(body["recipient"], body["kind"], body["round"], attempt, message)
            self.asked.append(asked)
            reply = self.hook(asked, lambda message=message: self._deliver(message))  # type: ignore[misc]
            if reply is not None:
                yield reply

    def wait(self, timeout_s: float) -> None:
        self._ahead += timeout_s

    def withdraw(self, message_ids: Iterable[str]) -> None:
        pass


def retold(
    simulation: Simulation,
    name: str,
    asked: Asked,
    honest: Message,
    change: Callable[[dict[str, Any], dict[str, Any]], object],
) -> Message:
    """The answer that `name` signs after `change` of its fields and tensors (both may be written into)."""
    sha = simulation.signed.sha256
    reply, tensors, _ = simulation.coordinator._wire.decode(honest.content, name)
    fields = json.loads(json.dumps(dict(reply.fields)))
    made = {key: np.array(value) for key, value in tensors.items()}
    change(fields, made)
    wire = SignedWire(simulation._identity(name), {}, sha)
    return Message(wire.encode(replace(reply, fields=fields), wire.pack(made))[0], reply_to=asked.message)
