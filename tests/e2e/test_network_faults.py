"""What goes wrong on a real network, and how it ends: with a verified audit, and nothing lost or paid twice.

One coordinator and four hospitals as processes over mutual TLS, most of them forked (network_support.py). Where a fault happens
is said to a process in HANSA_FAULT (faulty/sitecustomize.py).

`make test` runs the chains, in which one run meets many faults one after the other; `make soak` runs each fault alone.
"""

from __future__ import annotations

import contextlib
import os
import queue
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from e2e_support import (
    HOSPITALS,
    call,
    entries,
    environment,
    federation,
    ledgers,
    of_type,
    resize_disk,
    small_disk,
    whole_lines,
    write,
)
from hansa.common import link_pb2 as pb
from hansa.common.charter import SignedCharter
from hansa.common.connection_ca import ConnectionCA
from hansa.common.flower import Array, ArrayRecord, RecordDict
from hansa.common.frames import METHOD, PROTOCOL, blocks, length_of, take_apart
from hansa.common.home import Home
from hansa.common.messages import Manifest, SignedWire
from hansa.common.verifier import verify_bundle
from hansa.simulations.network import COORDINATOR
from network_support import Network, Zygote

HERE = Path(__file__).resolve().parent
ROUNDS = 2
CONFIG = federation(rounds=ROUNDS)
EVERYONE = (*HOSPITALS, COORDINATOR)
RUN = "faulty"
DEADLINE_S = 6
"""Where a test has to wait until a request's time is over."""
HASTY = federation(
    rounds=ROUNDS,
    evaluation="{kind: none}",
    data={n: (f"package:heart-disease/{n}.csv", d) for n, d in zip(HOSPITALS, (300, 295, 125, 200), strict=True)},
    more=f"round_deadline_s: {DEADLINE_S}\n",
)
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")

slow = pytest.mark.slow
soak = pytest.mark.soak


# -- networks ----------------------------------------------------------------------------------------------------------


Make = Callable[..., Network]


@pytest.fixture(scope="module")
def templates(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Keys, certificates, a signed charter and registered data, made once for each configuration."""
    made: dict[str, Path] = {}

    def template(text: str) -> Path:
        if text not in made:
            root = tmp_path_factory.mktemp("template")
            with Network(zygote, write(root / "c.yaml", text), root / "net", {}) as net:
                net.set_up()
            made[text] = root / "net"
        return made[text]

    return template


@pytest.fixture
def network(zygote: Zygote, templates: Callable[[str], Path], tmp_path: Path) -> Iterator[Make]:
    """Makes a network that is set up and does not run yet."""
    with contextlib.ExitStack() as stack:

        def make(text: str = CONFIG, **server: Any) -> Network:
            template = templates(text)
            net = Network(zygote, write(tmp_path / "c.yaml", text), tmp_path / "net", server)
            stack.enter_context(net)
            net.copy(template)
            return net

        yield make


# -- a run with faults, and what must be true of it ----------------------------------------------------------------------


@dataclass
class Trial:
    """A run of a network in which things go wrong.

    Attributes:
        faults: who -> faults; each start of that process gets the next one. {name} stands for a process's pid file.
        lines: acknowledged ledger lines, as they stood whenever a process had died.
    """

    net: Network
    faults: dict[str, list[str]] = field(default_factory=dict)
    env: dict[str, dict[str, str]] = field(default_factory=dict)
    lines: dict[str, list[bytes]] = field(default_factory=dict)
    given: Counter[str] = field(default_factory=Counter)
    starts: Counter[str] = field(default_factory=Counter)

    def start(self, *names: str) -> None:
        for name in names:
            self.starts[name] += 1
            env = dict(self.env.get(name, {}))
            if self.faults.get(name):
                fault = self.faults[name].pop(0).format(**{n: self.net.pid_file(n) for n in EVERYONE})
                self.given.update(fault.split(";"))
                env |= {"HANSA_FAULT": fault, "HANSA_FAULT_LOG": str(self.log), "PYTHONPATH": str(HERE / "faulty")}
            if name == COORDINATOR:
                self.net.start_server(RUN, resume=self.starts[name] > 1, env=env)
            else:
                self.net.start_node(name, env=env)

    @property
    def log(self) -> Path:
        return self.net.out / "logs" / "faults"

    def happened(self) -> Counter[str]:
        return Counter(self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else [])

    def died(self, name: str) -> int | None:
        """How a process ended, if it did; what its ledger holds must be there for ever."""
        code: int | None = self.net.process(name).poll()
        if code is not None:
            self.remember(name)
        return code

    def remember(self, name: str) -> None:
        book = self.book(name)
        if book.exists():
            lines = whole_lines(book)
            known = self.lines.get(name, [])
            assert lines[: len(known)] == known, f"acknowledged lines of {name} are gone or changed"
            self.lines[name] = lines

    def book(self, name: str) -> Path:
        inner = "coordinator/ledger.jsonl" if name == COORDINATOR else "ledger.jsonl"
        return self.net.folder(name) / "state" / inner

    def wrote(self, name: str, kind: str) -> bool:
        """Whether a ledger, which need not be there yet, has an entry of that type."""
        return self.book(name).exists() and bool(of_type(self.book(name), kind))

    def carry_on(self, until_s: float = 90.0) -> None:
        """Start whoever is not running, again and again, until the run is closed. Nobody dies but by its fault."""
        self.start(*(name for name in EVERYONE if name not in self.net._processes))
        end = time.monotonic() + until_s
        while True:
            for name in EVERYONE:
                code = self.died(name)
                if name == COORDINATOR and code == 0:
                    return
                if code is not None:
                    assert code == -signal.SIGKILL, self.told(f"{name} ended with {code}")
                    self.start(name)
            assert time.monotonic() < end, self.told("the run is not closed")
            time.sleep(0.01)

    def until(self, true: Callable[[], object], what: str, timeout_s: float = 60.0) -> None:
        end = time.monotonic() + timeout_s
        while not true():
            assert time.monotonic() < end, self.told(f"it did not happen: {what}")
            time.sleep(0.01)

    def told(self, why: str) -> str:
        logs = "".join(f"\n--- {name}\n{self.net.log(name)[-3000:]}" for name in EVERYONE)
        missing = self.given - self.happened()
        return f"{why}; faults that did not happen: {dict(missing)}{logs}"

    def request(self, name: str, number: int) -> str:
        """The link's name for that round's request to train, of those that a node took."""
        took = re.findall(r'request coordinator="coordinator" request="(\w+)" kind="train"', self.net.log(name))
        return list(dict.fromkeys(took))[number - 1]

    def logged(self, name: str, event: str, number: int) -> int:
        """How often a node logged that event of that request."""
        return self.net.log(name).count(f'{event} coordinator="coordinator" request="{self.request(name, number)}"')

    def ends_well(self, paid: Mapping[str, Mapping[int, str]] | None = None) -> dict[str, Path]:
        """The audit, the bills and the models, now that the run is closed; everyone's ledger.

        Args:
            paid: partner -> round -> "debited" (no answer was ever committed) or "nothing", where that is not the whole.
        """
        self.net.stop()
        assert not self.given - self.happened(), self.told("not all faults happened")
        assert not any(self.faults.values()), self.told(f"left: {self.faults}")
        for name in EVERYONE:
            self.remember(name)
        bundle = self.net.bundle()
        call("audit", bundle).expect(0).says("VERIFIED")
        verdict = verify_bundle(bundle)
        assert (verdict["verified"], verdict["violations"]) == (True, [])
        for name in HOSPITALS:
            self._paid_exactly(bundle, name, dict((paid or {}).get(name, {})))
        models = self.net.models()
        assert {model["verified"] for model in models.values()} == {True}
        assert len({model["sha256"] for model in models.values()}) == 1
        (whole,) = {p.read_bytes() for p in self.net.out.glob(f"*/state/models/{RUN}/model.safetensors")}
        assert whole == (bundle / "model.safetensors").read_bytes()
        assert not list(self.net.out.rglob(".hansa-tmp-*")), "half-written files are left"
        return ledgers(bundle)

    def _paid_exactly(self, bundle: Path, name: str, unusual: dict[int, str]) -> None:
        """One debit for each planned round, each for one request, and one answer for each debit."""
        book = ledgers(bundle)[name]
        debits, commits = of_type(book, "debit"), of_type(book, "commit")
        assert max(Counter(d["request_id"] for d in debits).values(), default=1) == 1, f"{name}: paid twice"
        assert max(Counter(c["request_id"] for c in commits).values(), default=1) == 1, f"{name}: answered twice"
        wanted = {("train", r) for r in range(1, ROUNDS + 1) if unusual.get(r) != "nothing"}
        assert Counter((d["purpose"], d["round"]) for d in debits) == dict.fromkeys(wanted, 1), name
        committed = {(("train", c["round"])) for c in commits}
        assert committed == {(what, r) for what, r in wanted if unusual.get(r) != "debited"}, name
        holds = 1 if wanted else 0
        assert len(of_type(book, "hold")) == holds, name
        assert [r["why"] for r in of_type(book, "release")] == ["closed"] * holds, name


def answers(book: Path, purpose: str, number: int) -> dict[str, str]:
    """What a coordinator's ledger says of a round: partner -> outcome."""
    last = [a for a in of_type(book, "answers") if (a["purpose"], a["round"]) == (purpose, number)][-1]
    return {name: reply["outcome"] for name, reply in last["replies"].items()}


def in_round(book: Path, number: int) -> list[str]:
    (found,) = [r for r in of_type(book, "round") if r["round"] == number]
    return sorted(found["partners"])


# -- the life of a request (docs/link.md) --------------------------------------------------------------------------------


NUMBERS = {name: number for number, name in enumerate(HOSPITALS, start=1)}


def becomes(state: str, partner: str, kind: str = "train", number: int | None = 1) -> str:
    """The moment at which the coordinator's request to that partner becomes `state`."""
    only = f"self.node={NUMBERS[partner]},self.message.metadata.message_type={kind}"
    only += "" if number is None else f",self.message.metadata.group_id={number}"
    return f"hansa.server.requests:Request.state={state}[{only}]"


TRANSITIONS = ("queued", "sent", "acknowledged", "replied", "folded")


@slow
def test_coordinator_killed_around_every_transition(network: Make) -> None:
    """Ten kills of one run: before and after each transition of one request."""
    moments = [(state, when) for state in TRANSITIONS for when in ("before", "after")]
    trial = Trial(network(), {COORDINATOR: [f"{becomes(s, 'hungary')}:{w}:1:kill" for s, w in moments]})
    trial.carry_on()
    trial.ends_well()
    assert trial.starts == dict.fromkeys(HOSPITALS, 1) | {COORDINATOR: 11}
    # What has arrived is found in the spool, and what the node has is not sent again, however often the coordinator dies.
    assert trial.logged("hungary", "sent", 1) == trial.logged("hungary", "request", 1) == 1


@slow
def test_node_killed_around_every_transition(network: Make) -> None:
    """Ten kills of one run: when the coordinator's request to it becomes this or that. Two nodes, so that each is back."""
    faults = [
        f"{becomes(state, partner, number=number)}:{when}:1:kill:{{{partner}}}"
        for number, when in ((1, "before"), (2, "after"))
        for partner, states in (("cleveland", ("queued", "acknowledged", "folded")), ("hungary", ("sent", "replied")))
        for state in states
    ]
    trial = Trial(network(), {COORDINATOR: [";".join(faults)]})
    trial.carry_on()
    trial.ends_well()
    assert trial.starts == {"cleveland": 7, "hungary": 5, "switzerland": 1, "va-long-beach": 1, COORDINATOR: 1}
    # What it has in its inbox is not sent to it again, however often it dies.
    assert trial.logged("cleveland", "request", 1) == trial.logged("cleveland", "request", 2) == 1


@soak
@pytest.mark.parametrize("kind", ["train", "evaluate", "query.open", "query.close", "query.sign", "query.deliver"])
@pytest.mark.parametrize("state", TRANSITIONS)
@pytest.mark.parametrize("who", ["node", "coordinator", "both"])
def test_killed_around_one_transition(who: str, state: str, kind: str, network: Make) -> None:
    """Every kind of request. A node is killed once in a run; a coordinator before and, when it is back, after."""
    kills = {"node": ["kill:{hungary}"], "coordinator": ["kill"], "both": ["kill:{hungary}", "kill"]}[who]
    before, after = (
        ";".join(f"{becomes(state, 'hungary', kind, None)}:{when}:1:{kill}" for kill in kills)
        for when in ("before", "after")
    )
    for faults in ([before], [after]) if who == "node" else ([before, after],):
        trial = Trial(network(), {COORDINATOR: list(faults)})
        trial.carry_on()
        trial.ends_well()
        assert trial.starts["hungary"] == 1 + (0 if who == "coordinator" else len(faults))
        assert trial.starts[COORDINATOR] == 1 + (0 if who == "node" else len(faults))
        trial.net.__exit__(None, None, None)


EXPIRED = becomes("expired", "switzerland")
ASLEEP = f"hansa.clients.app:train_locally:before:1:sleep:{DEADLINE_S + 3}"
"""A round of training that takes longer than anybody waits for; the next one is in time again."""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("who", ["node", "coordinator", "both"])
@soak
def test_killed_around_expiry(who: str, when: str, network: Make) -> None:
    kills = {"node": ["kill:{switzerland}"], "coordinator": ["kill"], "both": ["kill:{switzerland}", "kill"]}[who]
    fault = ";".join(f"{EXPIRED}:{when}:1:{kill}" for kill in kills)
    trial = Trial(network(HASTY), {COORDINATOR: [fault], "switzerland": [ASLEEP]})
    trial.carry_on()
    # The round is over a little before the request is. A coordinator that dies in between asks again, as if it were not.
    outcome = answers(trial.book(COORDINATOR), "train", 1)["switzerland"]
    assert outcome == "timeout" or (outcome == "ok" and who != "node")
    # A node that died has an answer to finish that nobody wants any more: its debit bought nothing.
    books = trial.ends_well({"switzerland": {1: "debited"}} if outcome == "timeout" and who != "coordinator" else None)
    assert in_round(books[COORDINATOR], 1) == sorted(
        {*HOSPITALS} - ({"switzerland"} if outcome == "timeout" else set())
    )
    assert in_round(books[COORDINATOR], 2) == sorted(HOSPITALS)


# -- killed nodes, killed coordinators -----------------------------------------------------------------------------------


LINK = "hansa.clients.link:NodeLink"
NODE_POINTS = {
    "cleveland": [  # the request arrives
        f"{LINK}._announced[head.message_type=train]:before:1:kill",
        f"{LINK}._announced[head.message_type=train]:after:1:kill",
        "hansa.common.frames:Spool.finish[self.head.message_type=train]:before:1:kill",
        "hansa.common.frames:Spool.finish[self.head.message_type=train]:after:1:kill",
    ],
    "hungary": [  # before training and in the middle of it
        "hansa.clients.gate:Gate.debit:before:1:kill",
        "hansa.clients.gate:Gate.debit:after:1:kill",
        "hansa.clients.app:train_locally:before:1:kill",
        "hansa.common.noise:SecureNoise.gaussian:before:2:kill",
    ],
    "switzerland": [  # after training
        "hansa.clients.app:train_locally:after:1:kill",
        "hansa.clients.outbox:Outbox.put:before:1:kill",
        "hansa.clients.outbox:Outbox.put:after:1:kill",
        "hansa.clients.gate:Gate.commit:before:1:kill",
    ],
    "va-long-beach": [  # the answer leaves
        "hansa.clients.gate:Gate.commit:after:1:kill",
        f"{LINK}._offer[job.request.head.message_type=train]:before:1:kill",
        f"{LINK}._offer[job.request.head.message_type=train]:after:1:kill",
        f"{LINK}._forget:before:1:kill",
        f"{LINK}._forget:after:1:kill",
    ],
}


@slow
def test_nodes_killed_before_during_and_after_training(network: Make) -> None:
    """Seventeen kills of one run: each node dies at the one place after the other."""
    trial = Trial(network(), {name: list(points) for name, points in NODE_POINTS.items()})
    trial.carry_on()
    trial.ends_well()
    assert trial.starts == {name: 1 + len(points) for name, points in NODE_POINTS.items()} | {COORDINATOR: 1}


@soak
@pytest.mark.parametrize("point", [point for points in NODE_POINTS.values() for point in points])
def test_node_killed_at_one_point(point: str, network: Make) -> None:
    trial = Trial(network(), {"hungary": [point]})
    trial.carry_on()
    trial.ends_well()


KINDS = ("query.open", "train", "evaluate", "query.close", "query.sign", "query.deliver")


def amid(kind: str) -> str:
    """Two of four have answered."""
    return f"hansa.server.requests:Request.state=replied[self.message.metadata.message_type={kind}]:after:2:"


@slow
def test_coordinator_killed_in_each_phase(network: Make) -> None:
    """Six kills of one run: in opening, training, evaluating, closing, signing and delivering."""
    trial = Trial(network(), {COORDINATOR: [f"{amid(kind)}kill" for kind in KINDS]})
    trial.carry_on()
    trial.ends_well()
    assert trial.starts == dict.fromkeys(HOSPITALS, 1) | {COORDINATOR: 7}


@slow
def test_everyone_killed_at_once(network: Make) -> None:
    """The coordinator and all nodes, in training, and again in closing."""
    everyone = [*(f"kill:{{{name}}}" for name in HOSPITALS), "kill"]
    faults = [";".join(amid(kind) + kill for kill in everyone) for kind in ("train", "query.close")]
    trial = Trial(network(), {COORDINATOR: faults})
    trial.carry_on()
    trial.ends_well()
    assert trial.starts == dict.fromkeys(EVERYONE, 3)


@soak
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alone", [True, False], ids=["coordinator", "everyone"])
def test_killed_in_one_phase(alone: bool, kind: str, network: Make) -> None:
    kills = ["kill"] if alone else [*(f"kill:{{{name}}}" for name in HOSPITALS), "kill"]
    deliver = f"hansa.server.rounds:Coordinator._deliver[message_type={kind}]"
    faults = [
        ";".join(place + k for k in kills) for place in (f"{deliver}:before:1:", amid(kind), f"{deliver}:after:1:")
    ]
    trial = Trial(network(), {COORDINATOR: faults})
    trial.carry_on()
    trial.ends_well()


@soak
@pytest.mark.parametrize(
    "place",
    [
        "hansa.server.checkpoint:Checkpoint.save",
        "hansa.server.records:LedgerRecords.run",
        "hansa.server.records:LedgerRecords.asked",
        "hansa.server.records:LedgerRecords.answered",
        "hansa.server.records:LedgerRecords.round",
        "hansa.server.records:LedgerRecords.close",
        "hansa.server.rounds:write_whole",
        "hansa.server.service:write_model",
    ],
)
def test_coordinator_killed_around_what_it_writes(place: str, network: Make) -> None:
    trial = Trial(network(), {COORDINATOR: [f"{place}:{when}:1:kill" for when in ("before", "after")]})
    trial.carry_on()
    trial.ends_well()


@soak
@pytest.mark.parametrize("turn", range(5))
def test_killed_at_random(turn: int, network: Make) -> None:
    """Thirty kills at any time, of one or several; which, chance decides anew each time."""
    trial, kills = Trial(network()), 0
    ended = threading.Event()

    def killer() -> None:
        nonlocal kills
        while kills < 30 and not ended.wait(random.uniform(0.05, 0.7)):
            for name in random.sample(EVERYONE, random.choice([1, 1, 1, 2, 5])):
                with contextlib.suppress(ProcessLookupError, KeyError):
                    os.kill(trial.net.process(name).pid, signal.SIGKILL)
                    kills += 1

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        trial.carry_on(300)
    finally:
        ended.set()
        thread.join()
    print(f"\n{kills} kills; starts: {dict(trial.starts)}")
    trial.carry_on(60)  # the last kill may have met a node after the end
    trial.ends_well()


# -- clocks --------------------------------------------------------------------------------------------------------------


def clock(offset: str) -> dict[str, str]:
    """The environment of a process whose clock is wrong."""
    if not FAKETIME.exists():
        pytest.skip(f"no {FAKETIME.name}: make data, or apt-get install faketime")
    # Only the time of day: timers run on.
    still = {"FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1"}
    return {"LD_PRELOAD": str(FAKETIME), "FAKETIME": offset, **still}


@pytest.mark.parametrize(
    "clocks",
    [
        pytest.param({"cleveland": "+1h", "hungary": "-1h"}, marks=slow),
        pytest.param({"cleveland": "+1h"}, marks=soak),
        pytest.param({"cleveland": "-1h"}, marks=soak),
        pytest.param({COORDINATOR: "+1h"}, marks=soak),
        pytest.param({COORDINATOR: "-1h"}, marks=soak),
        pytest.param({COORDINATOR: "-1h", "cleveland": "+1h"}, marks=soak),
    ],
    ids=str,
)
def test_clocks_are_off_by_an_hour(clocks: dict[str, str], network: Make) -> None:
    """Nobody minds: spans travel, never times of day, and certificates are forgiving of a clock that is behind."""
    trial = Trial(network(), env={name: clock(offset) for name, offset in clocks.items()})
    began = datetime.now(UTC)
    trial.carry_on()
    books = trial.ends_well()
    for name, book in books.items():
        first = datetime.fromisoformat(entries(book)[0]["time"])
        off_h = {"+1h": 1, "-1h": -1}.get(clocks.get(name, ""), 0)
        assert abs(first - began - timedelta(hours=off_h)) < timedelta(minutes=5), "the clock was not wrong"
    assert in_round(books[COORDINATOR], 1) == in_round(books[COORDINATOR], 2) == sorted(HOSPITALS)


# -- a full disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pages", [pytest.param(n, marks=slow if n == 3 else soak) for n in range(8)])
def test_disk_full_at_the_node(pages: int, network: Make) -> None:
    """The node's disk has room for so many pages more; it waits or stops, and goes on when there is room again."""
    trial = Trial(network())
    state = trial.net.folder("cleveland") / "state"
    with contextlib.ExitStack() as stack:
        shutil.copytree(state, kept := trial.net.out / "logs" / "state")
        try:
            stack.enter_context(small_disk(state, 256))
        except OSError as err:
            pytest.skip(f"this user may not mount a file system: {err}")
        stack.callback(trial.net.stop)  # before the disk goes away
        shutil.copytree(kept, state, dirs_exist_ok=True)
        fill(state / "ballast", pages)
        trial.start(*EVERYONE)
        trial.until(lambda: hit(trial), "the disk is full")
        time.sleep(3)  # long enough to try again, and to fail again
        assert trial.died(COORDINATOR) is None, trial.told("the coordinator gave up")
        code = trial.died("cleveland")
        last = trial.net.log("cleveland").splitlines()[-3:]
        print(f"\n{pages} pages: {'it stopped' if code is not None else 'it waits'}", *last, sep="\n    ")
        assert code in (None, 2), trial.told(f"cleveland ended with {code}")
        resize_disk(state, 1024)
        if code is not None:
            trial.start("cleveland")
        trial.carry_on()
        books = trial.ends_well()
    assert in_round(books[COORDINATOR], 1) == in_round(books[COORDINATOR], 2) == sorted(HOSPITALS)


def fill(ballast: Path, pages: int) -> None:
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    os.truncate(ballast, ballast.stat().st_size - 4096 * pages)


def hit(trial: Trial) -> bool:
    told = trial.net.log("cleveland")
    return trial.died("cleveland") is not None or "disk full" in told or "OSError" in told or "disk is full" in told


# -- slow --------------------------------------------------------------------------------------------------------------


@slow
def test_a_slow_node_is_not_waited_for(network: Make) -> None:
    trial = Trial(network(HASTY), {"switzerland": [ASLEEP]})
    trial.carry_on()
    books = trial.ends_well()  # it debited both rounds, and committed both answers
    others = ["cleveland", "hungary", "va-long-beach"]
    assert answers(books[COORDINATOR], "train", 1) == {"switzerland": "timeout"} | dict.fromkeys(others, "ok")
    assert in_round(books[COORDINATOR], 1) == others
    assert in_round(books[COORDINATOR], 2) == sorted(HOSPITALS)
    # What it had for the first round was never handed over.
    assert (trial.logged("switzerland", "sent", 1), trial.logged("switzerland", "sent", 2)) == (0, 1)
    spool = trial.net.folder(COORDINATOR) / "state" / "spool"
    assert not list(spool.glob(f"*{trial.request('switzerland', 1)}*"))


# -- certificates --------------------------------------------------------------------------------------------------------


@slow
def test_a_revoked_partner_is_thrown_out_and_comes_back_with_a_renewal(network: Make) -> None:
    """The run goes on without it, but cannot be closed without it: it renews, and the run is resumed."""
    net = network(HASTY)
    # The first round lasts as long as it takes to revoke.
    trial = Trial(net, {"hungary": ["hansa.clients.app:train_locally:before:1:sleep:4"]})
    trial.start(*EVERYONE)
    trial.until(lambda: trial.wrote("cleveland", "commit"), "cleveland's first answer")
    net.command(COORDINATOR, "identity", "revoke", "cleveland", "--yes")
    trial.until(lambda: "is revoked" in net.log(COORDINATOR), "the server notices", 5)
    trial.until(lambda: "cleveland" not in connected(net), "cleveland is thrown out", 5)
    assert net.wait(60) == 1, net.log(COORDINATOR)
    told = " ".join(net.log(COORDINATOR).split())
    assert "the run cannot be closed: cleveland: timeout" in told
    assert "with --resume to close it" in told
    assert "PERMISSION_DENIED" in net.log("cleveland")
    renew(net, "cleveland")
    trial.remember(COORDINATOR)
    trial.start(COORDINATOR)
    trial.carry_on()
    books = trial.ends_well({"cleveland": {2: "nothing"}})
    assert in_round(books[COORDINATOR], 1) == sorted(HOSPITALS)
    assert in_round(books[COORDINATOR], 2) == ["hungary", "switzerland", "va-long-beach"]
    assert answers(books[COORDINATOR], "train", 2)["cleveland"] == "timeout"
    assert trial.starts["cleveland"] == 1, "a renewal needs no restart"


@slow
def test_an_expired_and_a_self_signed_certificate_stay_outside(network: Make) -> None:
    """The two others are the quorum. What was not trained is not paid for; closing needs everyone, who renew and resume."""
    net = network(HASTY, wait_for_nodes_s=4)
    ca = ConnectionCA.load(net.folder(COORDINATOR) / "ca")
    home = Home(net.folder("cleveland"))
    home.install(ca.issue((home.path / "cleveland.csr").read_bytes(), 1 / 86400))  # type: ignore[arg-type]  one second
    time.sleep(1.5)
    own = Home(net.folder("hungary"))
    write_self_signed(own)
    trial = Trial(net)
    trial.start(*HOSPITALS, COORDINATOR)
    assert net.wait(60) == 1, net.log(COORDINATOR)
    told = " ".join(net.log(COORDINATOR).split())
    assert "the run cannot be closed: cleveland: timeout; hungary: timeout" in told
    for name in ("cleveland", "hungary"):
        assert " connected " not in net.log(name)
        assert f'connected partner="{name}"' not in told
    for name in ("cleveland", "hungary"):
        renew(net, name)
    trial.remember(COORDINATOR)
    trial.start(COORDINATOR)
    trial.carry_on()
    nothing = {1: "nothing", 2: "nothing"}
    books = trial.ends_well({"cleveland": nothing, "hungary": nothing})
    assert in_round(books[COORDINATOR], 1) == in_round(books[COORDINATOR], 2) == ["switzerland", "va-long-beach"]


def connected(net: Network) -> list[str]:
    status = net.status() or {"partners": {}}
    return [name for name, partner in status["partners"].items() if partner.get("connected")]


def renew(net: Network, name: str) -> None:
    """A new TLS key and its certificate, by the commands, while the node runs."""
    net.command(name, "identity", "renew", "--home", ".")
    request = net.folder(COORDINATOR) / "requests" / f"{name}.csr"
    shutil.copyfile(net.folder(name) / f"{name}.csr", request)
    net.command(COORDINATOR, "identity", "issue", f"requests/{name}.csr", "--out", f"issued/{name}.crt", "--yes")
    shutil.copyfile(net.folder(COORDINATOR) / "issued" / f"{name}.crt", net.folder(name) / f"{name}.crt")
    net.command(name, "identity", "install", f"{name}.crt", "--home", ".")


def write_self_signed(home: Home) -> None:
    """The certificate that its owner's own TLS key signed, with everything else as it was; the CA's stays beside it."""
    old, ca = x509.load_pem_x509_certificates((home.path / "tls.crt").read_bytes())
    key = serialization.load_pem_private_key(home.tls_key_pem(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    builder = x509.CertificateBuilder(old.subject, old.subject, key.public_key(), old.serial_number)
    builder = builder.not_valid_before(old.not_valid_before_utc).not_valid_after(old.not_valid_after_utc)
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    made = builder.sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    (home.path / "tls.crt").write_bytes(made.public_bytes(pem) + ca.public_bytes(pem))


# -- hostile peers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stalls", [pytest.param(False, marks=slow), pytest.param(True, marks=soak)])
def test_hostile_peers_of_a_real_run(stalls: bool, network: Make) -> None:
    """With 1,000 silent connections, and in the place of a partner one that speaks garbage, sends huge messages, announces
    10 TB or stops half-way: the others train on, the server's memory stays, and the partner's own node finishes the run."""
    net = network()
    net.executed.add(COORDINATOR)  # of a forked process the memory is its parent's, too
    victim, others = "va-long-beach", HOSPITALS[:3]
    arrives = f"{LINK}._announced[head.message_type=train]:before:1:kill"
    trial = Trial(net, {victim: [arrives]})
    trial.start(*EVERYONE)
    trial.until(lambda: trial.died(victim) == -signal.SIGKILL, "the node dies")
    server = net.process(COORDINATOR).pid
    before = peak_kb(server)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(1000):
            stack.enter_context(socket.create_connection(address(net)))
        ends = Counter(hostile(net, victim, attack) for attack in ("garbage", "huge", "other") for _ in range(5))
        if stalls:
            ends[stalling(net, victim)] += 1
        for name in others:  # meanwhile
            assert of_type(trial.book(name), "commit"), name
        # The last one is an answer, and no good one: the round is over for this partner, but not its place in the run.
        ends[hostile(net, victim, "10 TB")] += 1
        after = peak_kb(server)
        trial.carry_on()
    print(f"\nserver's VmHWM: {before} kB before, {after} kB after; {dict(ends)}")
    assert after - before < 64 * 1024
    wanted = {"INVALID_ARGUMENT": 10, "RESOURCE_EXHAUSTED": 5, "refused": 1} | (
        {"DEADLINE_EXCEEDED": 1} if stalls else {}
    )
    assert ends == wanted
    books = trial.ends_well({victim: {1: "nothing"}})
    assert answers(books[COORDINATOR], "train", 1) == {victim: "invalid"} | dict.fromkeys(others, "ok")
    assert in_round(books[COORDINATOR], 2) == sorted(HOSPITALS)


def address(net: Network) -> tuple[str, int]:
    host, _, port = net.address.rpartition(":")
    return host, int(port)


def peak_kb(pid: int) -> int:
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1])  # type: ignore[index]


@contextlib.contextmanager
def speaking(net: Network, name: str) -> Iterator[tuple[Any, Callable[..., None]]]:
    """A stream in a partner's name, with its keys: (call, send)."""
    home = Home(net.folder(name))
    out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    credentials = grpc.ssl_channel_credentials(home.ca_certificate(), home.tls_key_pem(), home.tls_certificate())
    options = [("grpc.ssl_target_name_override", COORDINATOR), ("grpc.max_send_message_length", -1)]
    with grpc.secure_channel(net.address, credentials, options) as channel:
        call = channel.stream_stream(METHOD, lambda b: b, pb.FromServer.FromString)(iter(out.get, None))

        def send(data: bytes = b"", **body: Any) -> None:
            out.put(data or pb.FromNode(**body).SerializeToString())

        send(hello=pb.Hello(protocol=PROTOCOL, software="hostile", credit=4))
        try:
            yield call, send
        finally:
            out.put(None)
            call.cancel()


def asked(call: Any) -> pb.Head:
    """The request that the coordinator sends first."""
    return next(message.request for message in call if message.WhichOneof("body") == "request")


def hostile(net: Network, name: str, attack: str) -> str:
    """Attack, and see how it ends."""
    with speaking(net, name) as (call, send):
        request = asked(call)
        records, _ = take_apart(RecordDict({"a": ArrayRecord({"w": Array(np.zeros(2))})}))
        match attack:
            case "garbage":
                send(b"\xff" * 50)
            case "huge":
                send(bytes(50_000_000))
            case "other":
                send(block=pb.Block(data=b"x" * 100_000))
            case "10 TB":
                send(offer=pb.Head(id=request.id, records=records, lengths=[10 * 2**40]))
                return "refused" if any(m.WhichOneof("body") == "done" for m in call) else "ended"
        with contextlib.suppress(grpc.RpcError):
            for _ in call:
                pass
        return str(call.code().name)


def stalling(net: Network, name: str) -> str:
    """Offer an answer that is signed as it must be, and stop in the middle of it."""
    home, signed = Home(net.folder(name)), SignedCharter.load(net.folder(name) / "charter.json")
    about = Manifest("update", name, COORDINATOR, signed.sha256, RUN, 1, f"{RUN}.1.train.{name}", "0" * 64, {})
    wire = SignedWire(home.identity(None), {}, signed.sha256)
    answer, _ = wire.encode(about, wire.pack({"w": np.zeros(300_000)}))
    records, arrays = take_apart(answer)
    with speaking(net, name) as (call, send):
        send(offer=pb.Head(id=asked(call).id, records=records, lengths=[length_of(a) for a in arrays]))
        assert any(m.WhichOneof("body") == "grant" for m in call)
        send(block=pb.Block(data=next(blocks(arrays))))
        with contextlib.suppress(grpc.RpcError):
            for _ in call:
                pass
        return str(call.code().name)


# -- the faults themselves -----------------------------------------------------------------------------------------------


def meets(fault: str, code: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    env = environment(PYTHONPATH=str(HERE / "faulty"), HANSA_FAULT=fault, HANSA_FAULT_LOG=str(tmp_path / "faults"))
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    "fault",
    [
        "hansa.common.errors:LedgerError:before:1:die",
        "hansa.common.errors:nothing:before:1:kill",
        "hansa.common.errors:HansaError.nothing:before:1:kill",
        "hansa.common.errors:HansaError.nothing=1:before:1:kill",
        "hansa.common.errors:Refusal:before:1:kill",
        "hansa.common.error:HansaError.__init__:before:1:kill",
    ],
)
def test_a_fault_that_cannot_happen_is_loud(fault: str, tmp_path: Path) -> None:
    done = meets(fault, "import hansa.common.errors", tmp_path)
    assert done.returncode == 86
    assert "HANSA_FAULT: " in done.stderr
    assert not (tmp_path / "faults").exists()


def test_a_fault_happens_where_and_when_it_should(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import asyncio, dataclasses, time\n"
        "@dataclasses.dataclass\n"
        "class A:\n"
        "    n: int\n"
        "    state: str = 'new'\n"
        "    async def go(self, times=1):\n"
        "        return self.n * times\n"
    )
    prelude = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from own import *\n"

    def ends(fault: str, code: str) -> tuple[int, str]:
        (tmp_path / "faults").unlink(missing_ok=True)
        done = meets(fault, prelude + code, tmp_path)
        assert (tmp_path / "faults").exists() == (done.returncode != 0), done.stderr
        return done.returncode, done.stdout

    go = "for n in (1, 2, 2): print(asyncio.run(A(n).go(n)), flush=True)"
    assert ends("own:A.go:before:2:kill", go) == (-signal.SIGKILL, "1\n")
    assert ends("own:A.go[times=2]:before:2:kill", go) == (-signal.SIGKILL, "1\n4\n")
    assert ends("own:A.go[self.n=2]:after:2:enospc", go) == (1, "1\n4\n")
    assert ends("own:A.go:before:4:kill", go) == (0, "1\n4\n4\n")
    become = "a = A(1)\nfor s in ('old', 'old', 'new', 'old'): a.state = s; print(s, flush=True)"
    assert ends("own:A.state=old:after:1:kill", become) == (-signal.SIGKILL, "")
    assert ends("own:A.state=old:before:2:kill", become) == (-signal.SIGKILL, "old\nold\nnew\n")
    assert ends("own:A.state=new[self.n=1]:after:2:kill", become) == (-signal.SIGKILL, "old\nold\n")
