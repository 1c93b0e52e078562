"""A real node between two coordinators, and what left it.

Real: `clients.node.assemble` from a registry of data sets, gate, ledger with counter, outbox, kept heads, site law, custody; signed
messages. Not real: training and evaluation return at once and number their draws. What a draw cost is what the training
function was called with, or what noise the evaluation asked for, and on whose rows, not what the ledger says of it.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import io
import itertools
import json
import logging
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hansa.clients import app as app_module
from hansa.clients import gate as gate_module
from hansa.clients import node as node_module
from hansa.clients import registry as registry_module
from hansa.clients.datasets import Rows, Split
from hansa.clients.law import Control
from hansa.clients.node import Site, assemble
from hansa.clients.registrations import DataFiles
from hansa.clients.registry import Registry, Relation, Rules
from hansa.clients.settings import FederationEntry, NodeSettings, SiteSettings
from hansa.common import charter as charter_module
from hansa.common import heads as heads_module
from hansa.common import ledger as ledger_module
from hansa.common.accounting import Budget
from hansa.common.charter import Charter, SignedCharter
from hansa.common.errors import HansaError, LedgerError, MessageError, OutputError
from hansa.common.events import EventLog
from hansa.common.flower import Context, RecordDict, addressed
from hansa.common.heads import HEAD_TYPE
from hansa.common.home import Home
from hansa.common.identity import read_envelope, sha256, strict_json
from hansa.common.messages import MESSAGE_TYPE, Manifest, SignedWire, from_bytes
from hansa.common.tasks import Task
from support import CODE, terms, tiny_task
from support import identity as made_identity

from .disk import Crash, Disk, use, watching

identity = lru_cache(maxsize=16)(made_identity)
NODE, PEER = "ada", "ben"
COORDINATORS = ("coordinator", "hanna")
DECLARED = 40
END = datetime(2090, 1, 1, tzinfo=UTC)
"""Of all charters: a fixed day, so that a seed gives the same stream again."""
CAP_CHANGED = "a lineage's cap was changed, or is nobody's"
BEYOND = 40_000
"""Days from now until after that."""
TYPES = {"open": "query.open", "train": "train", "evaluate": "evaluate", "close": "query.close", "sign": "query.sign"}
TASK: Task = tiny_task()


@dataclass(frozen=True)
class Draw:
    """One use of data: what it cost, and whose rows it saw."""

    q: float
    sigma: float
    steps: int
    rows: str
    protected: bool


@dataclass(frozen=True)
class Release:
    """Content that left the node."""

    draw: int
    charter: str
    run: str
    request: str
    request_sha256: str
    kind: str


@dataclass
class World:
    """One node's folder and memory, and the record of what left.

    Attributes:
        lineage_of: rows -> whose budget they are, as the owner declared it; known here from what was registered.
        releases: by the SHA-256 of the reply's manifest: the same bytes again are no second release.
        kept: heads that left, signed by the node: what a coordinator or a peer can hold.
        newest: the head that an honest coordinator shows: the longest of those that extend one another.
        behind: by kind, what left a node whose ledger was no longer what that head says.
        hidden: draws that stand in an outbox that was read after a crash.
    """

    folder: Path
    rng: random.Random
    site_cap: float | None = None
    charters: list[SignedCharter] = field(default_factory=list)
    served: list[str] = field(default_factory=list)
    lineage_of: dict[str, str] = field(default_factory=dict)
    draws: list[Draw] = field(default_factory=list)
    releases: dict[str, Release] = field(default_factory=dict)
    kept: dict[tuple[int, str], bytes] = field(default_factory=dict)
    newest: tuple[int, str] | None = None
    behind: Counter[str] = field(default_factory=Counter)
    hidden: set[int] = field(default_factory=set)
    answers: Counter[str] = field(default_factory=Counter)
    stopped: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    caps: dict[str, tuple[float, float]] = field(default_factory=dict)
    filters: dict[str, dict[str, Any]] = field(default_factory=dict)
    crashes: int = 0
    starts: int = 0
    actions: int = 0
    site: Site | None = None
    mood: str = "good"
    clock_days: int = 0

    def __post_init__(self) -> None:
        self.disk = Disk(self.folder / "state", self.rng)
        self.log = EventLog("json", io.StringIO())

    # -- before it starts --------------------------------------------------------------------------------------------

    @property
    def settings(self) -> NodeSettings:
        """As node.yaml would say it."""
        return NodeSettings(
            home=home(),
            state=self.folder / "state",
            simulated=True,
            federations=tuple(
                FederationEntry(charter=self.folder / f"{signed.sha256}.json", server="127.0.0.1:1", dataset=name)
                for signed, name in zip(self.charters, self.served, strict=True)
            ),
            site=SiteSettings(epsilon_cap=self.site_cap),
        )

    def register(self, name: str, relation: Relation = Relation()) -> None:
        """Add a data set of its own rows, as its owner says."""
        number = len(self.lineage_of)
        path = f"rows-{number}.csv"
        if relation.collected_from is None:
            Registry(self.folder / "state").add(DataFiles("tiny", Path(path), None), Rules(), name, relation)
        else:  # its records were collected later: no clock is turned forward for that
            place = self.folder / "state" / "datasets" / name
            files = DataFiles("tiny", Path(path), None)
            files.save(place)
            registry_module.RegisteredDataset.register(
                TASK,
                files.source(TASK),
                place,
                declared=registry_module.Declaration("disjoint", None, relation.collected_from),
            )
        known = {one.name: one for one in Registry(self.folder / "state").all()}
        self.lineage_of[path] = known[name].dataset.lineage
        if relation.version_of is not None or relation.overlaps:
            other = known[relation.version_of or relation.overlaps[0]]
            self.lineage_of[path] = self.lineage_of[str(other.files.data)]

    def join(self, signed: SignedCharter, dataset: str) -> None:
        """One more charter in node.yaml; from the next start on."""
        signed.save(self.folder / f"{signed.sha256}.json")
        self.charters.append(signed)
        self.served.append(dataset)

    # -- its life ----------------------------------------------------------------------------------------------------

    def start(self) -> bool:
        """Put the node together from its files; whether it works. What stops it is counted."""
        self.stop()
        self.starts += 1
        try:
            with use(self.disk):
                self.site = assemble(self.settings, None, self.log)
        except Crash:
            self.fall()
        except HansaError as err:
            self.stopped[f"{type(err).__name__}: {words(err.message)}"] += 1
        self._look()
        return self.site is not None

    def stop(self) -> None:
        """End the process in good order: nothing is flushed by that."""
        if self.site is not None:
            with contextlib.suppress(Crash, HansaError, OSError):
                self.site.close()
            self.site = None

    def fall(self) -> None:
        """The process is gone, and this is what the disk has."""
        self.crashes += 1
        self.stop()
        assert self.disk.image is not None
        self.disk.put(self.disk.image)
        self.disk.image = None
        for name, data in self.disk.live().items():
            if name.startswith("outbox/") and data:
                self._read_outbox(data)

    def send(self, number: int, message: RecordDict, kind: str) -> Manifest | None:
        """Hand a message to the app of one charter; the reply, if one left."""
        self.actions += 1
        if self.site is None:
            return None
        joined = {one.signed.sha256: one for one in self.site.joined}.get(self.charters[number].sha256)
        if joined is None:
            self.answers["charter not joined"] += 1
            return None
        sent = addressed(message, TYPES[kind], 1, "1", 3600.0, "m1")
        before = len(self.draws)
        try:
            with use(self.disk):
                reply = joined.app(sent, context())
        except Crash:
            self.fall()
            return None
        except MessageError as err:
            self.answers[f"nothing: {words(err.message)}"] += 1
        except OutputError:
            self.answers["nothing: the disk failed"] += 1
        except LedgerError as err:
            self.answers[f"stops: {words(err.message)}"] += 1
            self.stop()
        except MemoryError:
            self.answers["nothing: no memory"] += 1
        else:
            made = self._left(reply.content, before)
            self._look()
            return made
        self._look()
        return None

    # -- what left ---------------------------------------------------------------------------------------------------

    def _left(self, records: RecordDict, before: int) -> Manifest:
        payload = read_envelope(records["manifest"]["sealed"], MESSAGE_TYPE).payload
        said = strict_json(payload)
        tensors = said.pop("tensors")
        said.pop("v")
        manifest = Manifest(**said)
        self.answers[manifest.fields["reason"] if manifest.kind == "refused" else manifest.kind] += 1
        if manifest.kind in ("update", "histogram", "failed", "scores"):
            name = sha256(payload)
            if name not in self.releases:
                self._release(name, manifest, tensors, records, before)
        elif tensors:
            self.faults.append(f"tensors in a reply of kind {manifest.kind}")
        if isinstance(head := manifest.fields.get("head"), dict):
            self._keep_head(head["head"].encode())
        return manifest

    def _release(self, name: str, manifest: Manifest, tensors: list[Any], records: RecordDict, before: int) -> None:
        if tensors:
            first = next(iter(records["chunks"].values()))
            kind = np.dtype(tensors[0]["dtype"])
            draw = int(np.frombuffer(first.data, kind, 1)[0])
        else:  # that it failed is one bit of what was drawn just now
            draw = len(self.draws) - 1
        if not 0 <= draw < len(self.draws) or (not tensors and draw < before):
            self.faults.append(f"a {manifest.kind} that no draw made")
            return
        if (
            Control(self.settings.control).restored.exists() and draw >= before
        ):  # what was committed before may be sent again
            self.faults.append("data was used while a restore was in doubt")
        twice = [
            one
            for one in self.releases.values()
            if one.draw == draw or (one.charter, one.request) == (manifest.charter_sha256, manifest.request_id)
        ]
        if twice:
            self.faults.append("one request, or one draw, was answered twice")
        if not self._in_line():
            self.behind[manifest.kind] += 1
        self.releases[name] = Release(
            draw,
            manifest.charter_sha256,
            manifest.run_id,
            manifest.request_id,
            manifest.in_reply_to,
            manifest.kind,
        )

    def _read_outbox(self, data: bytes) -> None:
        with contextlib.suppress(MessageError):
            records = from_bytes(data)
            chunks = list(records["chunks"].values())
            if chunks:
                tensors = strict_json(read_envelope(records["manifest"]["sealed"], MESSAGE_TYPE).payload)["tensors"]
                self.hidden.add(int(np.frombuffer(chunks[0].data, np.dtype(tensors[0]["dtype"]), 1)[0]))

    def _keep_head(self, sealed: bytes) -> None:
        said = strict_json(read_envelope(sealed, HEAD_TYPE).payload)
        made = said["length"], said["root"]
        self.kept[made] = sealed
        if self._in_line() and (self.newest is None or made > self.newest):
            self.newest = made

    def _in_line(self) -> bool:
        """Whether the ledger is what the newest head says."""
        assert self.site is not None
        return self.newest is None or self.site.ledger.states(*self.newest)

    def _look(self) -> None:
        """Which cap the node took for each lineage: it must be one that a charter has, and stay."""
        if self.site is None:
            return
        agreed = {(s.charter.privacy.epsilon, s.charter.privacy.delta) for s in self.charters}
        for entry in self.site.ledger.of("budget"):
            self.filters.setdefault(entry.body["lineage"], dict(entry.body["budget"]))
            cap = float(entry.body["budget"]["epsilon"]), float(entry.body["budget"]["delta"])
            if cap not in agreed or self.caps.setdefault(entry.body["lineage"], cap) != cap:
                self.faults.append(CAP_CHANGED)

    # -- what the node is made to do -----------------------------------------------------------------------------------

    def draw(self, q: float, sigma: float | None, steps: int, rows: str) -> int:
        """Number a use of data."""
        self.draws.append(Draw(q, sigma or 0.0, steps, rows, sigma is not None))
        mood, self.mood = self.mood, "good"
        if mood == "fails":
            raise ValueError("made to fail")
        if mood == "memory":
            raise MemoryError
        if mood == "dies":
            self.disk.image = self.disk.live()
            raise Crash
        return len(self.draws) - 1

    def close(self) -> None:
        """Forget it all."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


# -- fixtures of the process -----------------------------------------------------------------------------------------------

_world: World | None = None


def words(message: str) -> str:
    """A message without what differs each time."""
    kept = [w for w in message.split() if not any(c.isdigit() or c == "/" for c in w)]
    return " ".join(kept)[:70]


def context() -> Context:
    """What Flower hands to an app."""
    return Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})


@lru_cache(maxsize=1)
def _home_folder() -> Path:
    made = Path(tempfile.mkdtemp(prefix="hansa-adversary-", dir=place()))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def place() -> Path:
    """Where files cost nothing."""
    fast = Path("/dev/shm")
    return fast if fast.is_dir() else Path(tempfile.gettempdir())


@lru_cache(maxsize=1)
def home() -> Path:
    """The node's keys; no stream touches them."""
    folder = _home_folder() / "home"
    made = Home.create(folder, NODE, 365)
    identity(NODE).save(folder / "identity.key")
    (folder / "identity.json").write_text(json.dumps({"key": identity(NODE).key, "name": NODE}, separators=(",", ":")))
    assert made.identity().key == identity(NODE).key
    return folder


@lru_cache(maxsize=64)
def rows_of(path: str) -> Split:
    """The rows of one data set: others than any other's, and known by how many are held out."""
    number = int(path.removeprefix("rows-").removesuffix(".csv"))
    x = np.random.default_rng(number).uniform(-1, 1, (DECLARED + 20, 3)).astype(np.float32)
    y = np.arange(DECLARED + 20) % 2
    train = Rows(torch.from_numpy(x[:DECLARED]), torch.from_numpy(y[:DECLARED]))
    few = 2 + number
    return Split(train, Rows(torch.from_numpy(x[DECLARED : DECLARED + few]), torch.from_numpy(y[:few])))


def _whose(rows: Any) -> str:
    for number in itertools.count():
        split = rows_of(f"rows-{number}.csv")
        if split.train is rows or len(split.held_out) == (len(rows) if isinstance(rows, np.ndarray) else -1):
            return f"rows-{number}.csv"
    raise AssertionError


def _train(model: Any, loss: Any, weights: Any, rows: Rows, settings: Any, declared: int, *, seed: Any) -> Any:
    assert _world is not None
    number = _world.draw(settings.sampling_rate, settings.noise_multiplier, settings.steps, _whose(rows))
    return {name: np.full(array.shape, number, np.float32) for name, array in weights.items()}


class _Noise:
    """Numbers a histogram instead of hiding it."""

    def gaussian(self, shape: tuple[int, ...], deviation: float) -> Any:
        assert _world is not None
        return np.full(shape, _world.draw(1.0, deviation, 1, _labels[-1]), np.float64)


_labels: list[str] = []


def _histogram(scores: Any, labels: Any, bins: int, *, binary: bool) -> Any:
    _labels[:] = [_whose(labels)]
    return np.zeros((2, bins), np.float64)


class _Clock(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
        return datetime.now(tz) + timedelta(days=_world.clock_days if _world is not None else 0)


@lru_cache(maxsize=4096)
def _created(epsilon: float, delta: float, plan: tuple[float, int] | None) -> Budget:
    return _create(epsilon, delta, plan)


_create = Budget.create


@contextlib.contextmanager
def laboratory() -> Iterator[None]:
    """The process in which worlds live: work is replaced, what writes is watched, and what is pure is remembered.

    Within another one it changes nothing.
    """
    if app_module.train_locally is _train:
        yield
        return
    changes = [
        (app_module, "train_locally", _train),
        (app_module, "SecureNoise", _Noise),
        (app_module, "score_histogram", _histogram),
        (gate_module, "datetime", _Clock),
        (node_module, "code_sha256", lambda _: CODE),
        (node_module, "initial_model", lambda _, __: _model()),
        (registry_module, "load_task", lambda _: TASK),
        (DataFiles, "source", lambda self, _: lambda: rows_of(str(self.data))),
        # Pure functions of bytes, and slow; a node that restarts reads the same ones again.
        (ledger_module, "read_entry", lru_cache(maxsize=1024)(ledger_module.read_entry)),
        (charter_module, "verify", lru_cache(maxsize=256)(charter_module.verify)),
        (SignedCharter, "parse", staticmethod(lru_cache(maxsize=64)(SignedCharter.parse))),
        (Home, "identity", lru_cache(maxsize=4)(lambda self, passphrase=None: identity(self.name()))),
        (Budget, "create", staticmethod(lambda epsilon, delta, plan=None: _created(epsilon, delta, plan))),
    ]
    before = [(owner, name, owner.__dict__[name]) for owner, name, _ in changes]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging_off = _quiet()
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        with watching((ledger_module, heads_module)):
            yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
        torch.set_num_threads(threads)
        logging_off()


def _quiet() -> Any:
    logger = logging.getLogger("hansa.node")
    level, logger.level = logger.level, logging.CRITICAL
    logger.setLevel(logging.CRITICAL)
    return lambda: logger.setLevel(level)


@lru_cache(maxsize=1)
def _model() -> torch.nn.Module:
    return torch.nn.Linear(3, 2)


@contextlib.contextmanager
def world(rng: random.Random, **about: Any) -> Iterator[World]:
    """A fresh world; training and noise number their draws in it."""
    global _world
    made = World(Path(tempfile.mkdtemp(prefix="stream-", dir=_home_folder())), rng, **about)
    _world = made
    try:
        yield made
    finally:
        _world = None
        made.close()


# -- what coordinators write ---------------------------------------------------------------------------------------------


def charter(name: str, coordinator: str, **changes: Any) -> SignedCharter:
    """Signed by both partners and its own coordinator."""
    said = terms(
        name=name,
        coordinator={"name": coordinator, "key": identity(coordinator).key},
        partners=[{"name": n, "key": identity(n).key, "declared_records": DECLARED} for n in (NODE, PEER)],
        expires=END,
        quorum=1,
        **changes,
    )
    signed = SignedCharter.unsigned(Charter.model_validate(said))
    for who in (NODE, PEER, coordinator):
        signed = signed.sign(identity(who))
    return signed


def message(
    signed: SignedCharter, kind: str, run: str, number: int, request: str, fields: Any, tensors: Any
) -> RecordDict:
    """A request, signed by the charter's coordinator."""
    who = signed.charter.coordinator.name
    wire = SignedWire(identity(who), {NODE: identity(NODE).key}, signed.sha256)
    made = Manifest(kind, who, NODE, signed.sha256, run, number, request, "", fields)
    return wire.encode(made, wire.pack(tensors))[0]


def encoded(data: bytes) -> str:
    """Base64."""
    return base64.b64encode(data).decode()
