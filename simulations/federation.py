"""One federation in this process and one output folder: the parts that real nodes run, wired together.

    OUT/           the bundle: charter, public keys, ledgers, closing checkpoints, model, result; an auditor gets this
    OUT.private/   what never enters the bundle: private keys (0600), dataset registrations, outboxes, checkpoints

Every step of setting up can be repeated, so a run that was killed anywhere goes on with `resume`.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..clients.app import Node, make_client_app
from ..clients.datasets import RegisteredDataset, Split, csv_source, split_rows
from ..clients.gate import Gate
from ..clients.outbox import Outbox
from ..clients.training import check_model
from ..common.charter import SignedCharter, SimulatedClients, draft
from ..common.config import SIGNED_PARTNERS_MAX, Federation, check_delta
from ..common.errors import CharterError, ConfigError, DataError, OutputError, Refused, TaskError
from ..common.flower import Context, RecordDict
from ..common.identity import Identity, canonical, public_pem, sha256, write_whole
from ..common.ledger import Ledger
from ..common.messages import PlainWire, SignedWire
from ..common.plan import SOFTWARE, calibrated
from ..common.tasks import Task, code_sha256, load_task
from ..server.app import make_server_app
from ..server.checkpoint import Arrays, model_bytes
from ..server.records import LedgerRecords, Records
from ..server.rounds import Coordinator, Outcome
from . import partitions, sources
from .grid import InProcessGrid
from .population import PopulationGate, PopulationRecords, client_name

COORDINATOR = "coordinator"
DEMO_MARK = ".demo"
"""In the private folder: the next demo may replace this run."""
Notify = Callable[..., None]
# What `write_whole` and its like name the file that they then rename: only a killed process leaves one behind.
_UNFINISHED = re.compile(r"\.(.+\.[a-z0-9_]{8}|.+\.[0-9]+\.tmp|dataset-[a-z0-9_]{8})")


def private_folder(out: Path) -> Path:
    """Where a run keeps what never enters its bundle."""
    out = out.resolve() if out.name in ("", "..") else out
    if not out.name:
        raise OutputError(f"{out}: a run needs a folder of its own", "Give another --out.")
    return out.with_name(out.name + ".private")


def holds_anything(folder: Path) -> bool:
    """Whether there is more in a folder than a demo's mark and what a killed process had not finished writing."""
    return folder.exists() and any(not _UNFINISHED.fullmatch(p.name) and p.name != DEMO_MARK for p in folder.iterdir())


@dataclass
class Part:
    """One partner's data and what it declares."""

    source: Callable[[], Split]
    declared_records: int
    allow_single_class: bool = False


def parts_of(config: Federation, base: Path, task: Task) -> dict[str, Part]:
    """Every partner's data, by name. Files are read later, populations now.

    Args:
        base: the folder that relative data paths start from.

    Raises:
        ConfigError, DataError: a source that does not exist or does not fit.
    """
    evaluation, seed = config.evaluation, config.seed
    fraction = evaluation.test_fraction if evaluation.kind != "none" else 0.0
    if config.partners is not None:
        parts = {}
        for name, entry in config.partners.items():
            path = sources.packaged(entry.data) if entry.data.startswith("package:") else base / entry.data
            source = csv_source(path, task, fraction, seed)
            parts[name] = Part(source, entry.declared_records, entry.allow_single_class)
        return parts
    assert config.population is not None
    rows, test = sources.population(config.population.dataset)
    if config.population.clients > len(rows):
        raise ConfigError(
            f"population.clients is {config.population.clients}, the data set has {len(rows)} rows",
            "Every client needs at least one row.",
        )
    rng = np.random.default_rng(seed)
    chosen = config.population.partition
    labels, clients = rows.y.numpy(), config.population.clients
    match chosen.kind:
        case "iid":
            dealt = partitions.iid(labels, clients, rng)
        case "dirichlet":
            dealt = partitions.dirichlet(labels, clients, chosen.alpha or 1.0, rng, chosen.min_records)
        case "quantity":
            dealt = partitions.quantity_skew(labels, clients, chosen.alpha or 1.0, rng, chosen.min_records)
    held = np.array_split(rng.permutation(len(test)), clients) if test is not None and fraction else None
    parts = {}
    for number, index in enumerate(dealt):
        mine = rows.take(torch.from_numpy(index))
        if held is not None and test is not None:
            split = Split(mine, test.take(torch.from_numpy(held[number])))
        else:
            split = split_rows(mine, fraction, seed)
        # Two significant digits: a declared size is agreed and public, and need not be exact.
        size = len(split.train)
        declared = round(size, 2 - len(str(size))) if size > 99 else size
        parts[client_name(number)] = Part(lambda split=split: split, declared, allow_single_class=True)  # type: ignore[misc]
    return parts


@dataclass
class Simulation:
    """A federation set up in `out`; `run` it, then `close` it.

    Raises (on creation):
        OutputError: `out` holds another run.
        ConfigError, DataError, TaskError, Refused: what was asked for cannot be run; nothing was trained.
    """

    config: Federation
    base: Path
    out: Path
    resume: bool = False
    notify: Notify = lambda *_, **__: None
    nodes: dict[str, Node] = field(default_factory=dict)
    gates: dict[str, Gate] = field(default_factory=dict)
    _ledgers: list[Ledger] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.private = private_folder(self.out)
        self.task = load_task(self.config.task)
        fresh = not (self.private / "run.json").exists()
        self._state = self._claim()
        try:
            self._set_up()
        except BaseException as err:
            self.close()
            if isinstance(err, ConfigError | DataError | TaskError | CharterError | Refused) and fresh:
                # Bad input: nothing was asked or spent, so the folder is free for the corrected one.
                shutil.rmtree(self.out, ignore_errors=True)
                shutil.rmtree(self.private, ignore_errors=True)
            raise

    @property
    def run_id(self) -> str:
        """The first run's identifier."""
        return str(self._state["runs"][0])

    def run(self, run_id: str | None = None, only: list[str] | None = None) -> Outcome:
        """Run (or go on with) the first run, or another one under the same charter.

        Raises:
            RunFailed: it cannot go on; see its words.
        """
        outcomes: list[Outcome] = []
        app = make_server_app(self.coordinator, run_id or self.run_id, outcomes.append, only)
        app(self.grid, _context(1))
        return outcomes[0]

    def another_run(self) -> str:
        """A run identifier for one more run under this charter, kept for `resume`."""
        if len(self._state["runs"]) < 2:
            self._state["runs"].append(secrets.token_hex(8))
            self._keep_state()
        return str(self._state["runs"][1])

    def save_model(self, model: Arrays) -> None:
        """Write the final model into the bundle."""
        write_whole(self.out / "model.safetensors", model_bytes(model))

    def close(self) -> None:
        """Let go of every ledger."""
        for ledger in self._ledgers:
            ledger.close()

    # -- setting up --------------------------------------------------------------------------------------------------

    def _claim(self) -> dict[str, Any]:
        """Make the output folder ours, or find our earlier run in it."""
        path = self.private / "run.json"
        mine = sha256(canonical(json.loads(self.config.model_dump_json(), parse_float=str)))
        try:
            state = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
            taken = holds_anything(self.out) or holds_anything(self.private)
        except (OSError, ValueError) as err:
            raise OutputError(f"{path}: {err}", "Give another --out.") from err
        if state is None and taken:
            raise OutputError(f"{self.out}: not empty, and not a run of ours", "Give another --out, or empty this one.")
        if state is not None and not self.resume:
            raise OutputError(
                f"{self.out}: holds another run",
                "Go on with it: --resume. Or give another --out, or delete this folder and its .private one.",
            )
        if state is not None and state.get("config_sha256") != mine:
            raise OutputError(
                f"{self.out}: holds a run of another configuration", "Give the configuration it began with."
            )
        if state is None:
            state = {"config_sha256": mine, "runs": [secrets.token_hex(8)]}
            self._state = state
            self._keep_state()
        return dict(state)

    def _keep_state(self) -> None:
        write_whole(self.private / "run.json", json.dumps(self._state).encode(), mode=0o600)

    def _set_up(self) -> None:
        # Clients run one after the other on models that are mostly small: one thread each is several times faster
        # than torch's threads waiting for one another (5 s against 28 s for configs/digits.yaml on two busy cores).
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)
        parts = parts_of(self.config, self.base, self.task)
        model = initial_model(self.task, self.config.seed)
        check_model(model)
        initial = {n: p.detach().numpy().copy() for n, p in model.named_parameters() if p.requires_grad}
        signed_form = len(parts) <= SIGNED_PARTNERS_MAX
        me = self._identity(COORDINATOR)
        who = {name: self._identity(name) for name in parts} if signed_form else {}
        self.signed = self._charter(parts, me, who)
        charter = self.signed.charter
        self.datasets = {}
        for name, part in parts.items():
            try:
                self.datasets[name] = RegisteredDataset.register(
                    self.task,
                    part.source,
                    self.private / name if signed_form else None,
                    part.allow_single_class,
                    public=charter.evaluation.kind == "public",
                )
            except DataError as err:
                raise type(err)(f"{name}: {err.message}", err.hint) if type(err) is DataError else err from err
        genesis = {"owner": COORDINATOR, "role": "coordinator" if signed_form else "population", "dataset": None}
        ledger = self.run_ledger = self._ledger(self.out / "coordinator" / "ledger.jsonl", me, genesis)
        if not ledger.of("charter"):
            agreed = {
                "charter_sha256": self.signed.sha256,
                "name": charter.name,
                "expires": charter.expires.isoformat(),
            }
            ledger.append("charter", agreed)
        if signed_form:
            records: Records = LedgerRecords(ledger)
            for name in parts:
                self._partner(name, who[name], model)
            wire: Any = SignedWire(me, {m.name: m.key for m in charter.partners}, self.signed.sha256)
        else:
            population = PopulationRecords(ledger, self.signed)
            records, wire = population, PlainWire()
            for name, dataset in self.datasets.items():
                gate = PopulationGate(name, charter, population)
                self.nodes[name] = Node(self.task, model, dataset, gate, wire)
        in_order = list(self.nodes.values())
        self.grid = InProcessGrid(make_client_app(lambda c: in_order[c.node_id - 1]), len(in_order), _context)
        self.coordinator = Coordinator(
            self.signed,
            me,
            self.task,
            wire,
            {name: number for number, name in enumerate(parts, start=1)},
            records,
            initial,
            self.private / COORDINATOR,
            self.out / "closing",
            self.notify,
        )
        # The ledgers' locks say that nobody else writes here, so these are a killed process's.
        for path in (*self.out.rglob(".*"), *self.private.rglob(".*")):
            if _UNFINISHED.fullmatch(path.name) and path.is_file():
                path.unlink()

    def _partner(self, name: str, identity: Identity, model: torch.nn.Module) -> None:
        charter, dataset = self.signed.charter, self.datasets[name]
        genesis = {
            "owner": name,
            "role": "partner",
            "dataset": dataset.describe(),
        }
        ledger = self._ledger(self.out / "partners" / name / "ledger.jsonl", identity, genesis)
        gate = Gate(
            name,
            identity.key,
            dataset,
            ledger,
            code_sha256(self.task.name),
            simulated=True,
            # The configuration that asks for no privacy is written by the owner of all this simulated data.
            allow_unprotected=charter.privacy.kind == "none",
        )
        try:
            gate.accept(self.signed)
        except Refused as err:
            raise Refused(err.reason, f"{name}: {err.detail}", err.hint) from err
        self.gates[name] = gate
        self.nodes[name] = Node(
            self.task,
            model,
            dataset,
            gate,
            SignedWire(identity, {COORDINATOR: charter.coordinator.key}, self.signed.sha256),
            outbox=Outbox(self.private / name / "outbox"),
            identity=identity,
        )

    def _ledger(self, path: Path, identity: Identity, genesis: Mapping[str, Any]) -> Ledger:
        about = {"ledger_id": secrets.token_hex(16), "simulated": True, "software": SOFTWARE}
        ledger = Ledger(path, identity, {**genesis, **about})
        self._ledgers.append(ledger)
        if ledger.recovered:
            self.notify("recovered", ledger=path, torn_bytes=ledger.recovered)
        return ledger

    def _identity(self, name: str) -> Identity:
        path = self.private / name / "identity.key"
        if path.exists():
            identity = Identity.load(name, path)
        else:
            identity = Identity.generate(name)
            identity.save(path)
        write_whole(self.out / "keys" / f"{name}.pem", public_pem(identity.key))
        return identity

    def _charter(self, parts: Mapping[str, Part], me: Identity, who: Mapping[str, Identity]) -> SignedCharter:
        """The charter of this folder, drafted and signed by everyone if there is none yet."""
        path = self.out / "charter.json"
        if path.exists():
            signed = SignedCharter.load(path)
            signed.verify()
            return signed
        sizes = {name: part.declared_records for name, part in parts.items()}
        try:
            check_delta(self.config.privacy.delta, max(sizes.values()))
        except ValueError as err:
            raise ConfigError(str(err)) from err
        population = None
        if not who:
            mean = max(1, round(float(np.mean(list(sizes.values())))))
            population = SimulatedClients(clients=len(parts), declared_records=mean)
        charter = draft(
            self.config,
            task_sha256=code_sha256(self.task.name),
            coordinator_key=me.key,
            partner_keys={name: identity.key for name, identity in who.items()},
            noise_multiplier=calibrated(self.config.algorithm, self.config.privacy, self.config.evaluation),
            simulated=True,
            population=population,
            declared=sizes,
        )
        signed = SignedCharter.unsigned(charter)
        for identity in (*who.values(), me):
            signed = signed.sign(identity)
        signed.verify()
        signed.save(path)
        return signed


def initial_model(task: Task, seed: int) -> torch.nn.Module:
    """The model that everyone starts from; the seed is public and used for nothing else."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return task.build_model()


def _context(node: int) -> Context:
    return Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})
