"""One federation in this process and one output folder: the parts that real nodes run, wired together.

    OUT/           the bundle: charter, public keys, ledgers, closing checkpoints, model, result; an auditor gets this
    OUT.private/   what never enters the bundle: private keys (0600), dataset registrations, outboxes, checkpoints, and the
                   model as each partner verified and kept it

Every step of setting up can be repeated, so a run that was killed anywhere goes on with `resume`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from ..clients.app import Node, make_client_app
from ..clients.datasets import RegisteredDataset, Split, csv_source, split_rows
from ..clients.gate import Gate
from ..clients.outbox import Outbox
from ..clients.run_keys import RunKeys
from ..clients.training import check_model
from ..common.charter import SignedCharter, SimulatedClients, draft
from ..common.config import SIGNED_PARTNERS_MAX, Federation, check_delta
from ..common.errors import CharterError, ConfigError, DataError, OutputError, Refused, TaskError
from ..common.flower import Context, RecordDict
from ..common.heads import KeptHeads
from ..common.identity import TEMPORARY, Identity, canonical, output_error, public_pem, sha256, write_whole
from ..common.ledger import Ledger
from ..common.messages import PlainWire, SignedWire
from ..common.model import Arrays, write_model
from ..common.plan import SOFTWARE, calibrated
from ..common.tasks import Task, code_sha256, initial_model, load_task, sized
from ..server.app import make_server_app
from ..server.records import LedgerRecords, Records
from ..server.rounds import Coordinator, Outcome
from ..server.witness import Witnessing
from . import partitions, sources
from .grid import InProcessGrid
from .population import PopulationGate, PopulationRecords, client_name

COORDINATOR = "coordinator"
LOCK = "hansa.lock"
"""In the private folder: who holds its lock works in both folders."""
Notify = Callable[..., None]
# What a killed process had not finished writing: by `write_whole`, and by `write_report`.
_UNFINISHED = re.compile(re.escape(TEMPORARY) + r".+")
# Every file of a bundle, by its path in it: nothing else in OUT is ever deleted.
_BUNDLE = re.compile(
    r"charter\.json|model\.safetensors|result\.json|report\.html|keys/[^/]+\.pem|closing/[^/]+\.json"
    r"|heads/[^/]+\.jsonl|coordinator/ledger\.jsonl|partners/[^/]+/ledger\.jsonl"
)


def private_folder(out: Path) -> Path:
    """Where a run keeps what never enters its bundle."""
    out = out.resolve() if out.name in ("", "..") else out
    if not out.name:
        raise OutputError(f"{out}: a run needs a folder of its own", "Give another --out.")
    return out.with_name(out.name + ".private")


def holds_anything(folder: Path) -> bool:
    """Whether there is more in a folder than our lock and what a killed process had not finished writing."""
    return folder.exists() and any(not _UNFINISHED.fullmatch(p.name) and p.name != LOCK for p in folder.iterdir())


def config_sha256(config: Federation) -> str:
    """What a configuration with its sizes (`sized`) is recognised by when a run goes on."""
    return sha256(canonical(json.loads(config.model_dump_json(), parse_float=str)))


def _lock(private: Path) -> BinaryIO:
    """The lock on a run's folders, held until the file is closed."""
    path = private / LOCK
    try:
        private.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab", opener=lambda p, flags: os.open(p, flags, 0o600))  # noqa: SIM115  the lock lives with it
    except OSError as err:
        raise output_error(path, err) from err
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever held it may have deleted it meanwhile: then this is a lock on nothing.
        if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise FileNotFoundError(path)
    except OSError as err:
        file.close()
        raise OutputError(
            f"another hansa process is working in {private}",
            "Wait for it to finish, or stop it, or give another --out.",
        ) from err
    return file


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _foreign(out: Path) -> list[str]:
    """What is in an output folder and not part of a bundle."""
    files = [p for p in out.rglob("*") if not _is_folder(p)]
    names = [p.relative_to(out).as_posix() for p in files if not _UNFINISHED.fullmatch(p.name)]
    return sorted(name for name in names if not _BUNDLE.fullmatch(name))


def _remove(out: Path, private: Path, keep: tuple[str, ...] = ()) -> None:
    """Delete a bundle's files, and what the private folder holds but these; folders only when that empties them."""
    for path in sorted(out.rglob("*"), reverse=True):  # what is inside before its folder
        if _is_folder(path):
            with contextlib.suppress(OSError):
                path.rmdir()
        elif _BUNDLE.fullmatch(path.relative_to(out).as_posix()) or _UNFINISHED.fullmatch(path.name):
            path.unlink()
    for path in private.iterdir():
        if _is_folder(path):
            shutil.rmtree(path)
        elif path.name not in keep:
            path.unlink()


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
    """A federation set up in `out`; `run` it, then `close` it. Until then nobody else can work in its folders.

    Args:
        kind: which command's run it is. A "demo" replaces an earlier demo, and nothing else.
        private_root: the private folder, when it is not the one beside `out`.

    Attributes:
        fresh: there was no run to go on with.

    Raises (on creation):
        OutputError: `out` holds another run, or another process works in it.
        ConfigError, DataError, TaskError, Refused: what was asked for cannot be run; nothing was trained.
    """

    config: Federation
    base: Path
    out: Path
    resume: bool = False
    notify: Notify = lambda *_, **__: None
    kind: str = "simulate"
    private_root: Path | None = None
    nodes: dict[str, Node] = field(default_factory=dict)
    gates: dict[str, Gate] = field(default_factory=dict)
    _ledgers: list[Ledger | KeptHeads] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.private = self.private_root or private_folder(self.out)
        self.config = sized(self.config)
        self.task = load_task(self.config.task)
        self._refuse_foreign()  # before anything is written
        made = [folder for folder in (self.out, self.private) if not folder.exists()]
        self._held = _lock(self.private)
        try:
            self._state = self._claim()
            try:
                self._set_up()
            except (ConfigError, DataError, TaskError, CharterError, Refused):
                if self.fresh:
                    # Bad input: nothing was asked or spent, and both folders were empty, so they are free again.
                    with contextlib.suppress(OSError):
                        _remove(self.out, self.private)
                    for folder in made:
                        with contextlib.suppress(OSError):
                            folder.rmdir()
                raise
        except BaseException:
            self.close()
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
        write_model(self.out / "model.safetensors", model)

    def close(self) -> None:
        """Let go of every ledger, and of the folders."""
        for ledger in self._ledgers:
            ledger.close()
        self._held.close()

    # -- setting up --------------------------------------------------------------------------------------------------

    def _refuse_foreign(self) -> None:
        """Raise OutputError when there is something in the folders, and no run."""
        try:
            if not (self.private / "run.json").exists() and (holds_anything(self.out) or holds_anything(self.private)):
                what = "an earlier demo" if self.kind == "demo" else "a run of ours"
                raise OutputError(f"{self.out}: not empty, and not {what}", "Give another --out, or empty this one.")
        except OSError as err:
            raise OutputError(f"{self.out}: {err.strerror}", "Give another --out.") from err

    def _claim(self) -> dict[str, Any]:
        """Make the output folder ours, or find our earlier run in it. What run.json says is whose folder it is."""
        path = self.private / "run.json"
        mine = config_sha256(self.config)
        try:
            state = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
            if path.exists() and not isinstance(state, dict):
                raise ValueError("not what a run wrote")
        except (OSError, ValueError) as err:
            raise OutputError(f"{path}: {err}", "Give another --out.") from err
        self._refuse_foreign()  # again, now that nobody else can claim it
        self.fresh = state is None
        if state is not None and self.kind == "demo":
            self._clear_demo(state)
            state = None
        if state is not None and state.get("kind") == "demo":
            raise OutputError(f"{self.out}: holds a run of `hansa demo`", "Give another --out.")
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
            state = {"kind": self.kind, "config_sha256": mine, "runs": [secrets.token_hex(8)]}
            self._state = state
            self._keep_state()
        return dict(state)

    def _clear_demo(self, state: dict[str, Any]) -> None:
        """Delete an earlier demo, and nothing else. Its run.json stays: a demo that dies here is still one."""
        if state.get("kind") != "demo":
            raise OutputError(f"{self.out}: not empty, and not an earlier demo", "Give another --out.")
        if foreign := _foreign(self.out):
            raise OutputError(
                f"{self.out}: holds files that are not a demo's: {', '.join(foreign[:5])}",
                "Nothing was deleted. Move them away, or give another --out.",
            )
        try:
            _remove(self.out, self.private, keep=("run.json", LOCK))
        except OSError as err:
            raise output_error(self.out, err) from err

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
        genesis = {"owner": COORDINATOR, "role": "coordinator" if signed_form else "population"}
        ledger = self.run_ledger = self._ledger(self.out / "coordinator" / "ledger.jsonl", me, genesis)
        if not ledger.of("charter"):
            agreed = {"name": charter.name, "expires": charter.expires.isoformat()}
            ledger.append("charter", agreed, charter=self.signed.sha256)
        if signed_form:
            records: Records = LedgerRecords(ledger, self.signed.sha256)
            for name in parts:
                self._partner(name, who[name], model)
            wire: Any = SignedWire(me, {m.name: m.key for m in charter.partners}, self.signed.sha256)
            witnessing = Witnessing(me, ledger, self._kept_heads(me), charter.keys(), self.notify)
        else:
            population = PopulationRecords(ledger, self.signed)
            records, wire, witnessing = population, PlainWire(), None
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
            self._initial,
            self.private / COORDINATOR,
            self.out / "closing",
            self.notify,
            witnessing,
        )
        # The lock says that nobody else writes here, so these are a killed process's.
        for path in (*self.out.rglob(".*"), *self.private.rglob(".*")):
            if _UNFINISHED.fullmatch(path.name) and path.is_file():
                path.unlink()

    def _initial(self) -> Arrays:
        model = initial_model(self.task, self.config.seed)  # of its own: nodes train on theirs
        return {name: p.detach().numpy() for name, p in model.named_parameters() if p.requires_grad}

    def _partner(self, name: str, identity: Identity, model: torch.nn.Module) -> None:
        charter, dataset = self.signed.charter, self.datasets[name]
        genesis = {"owner": name, "role": "partner"}
        ledger = self._ledger(self.out / "partners" / name / "ledger.jsonl", identity, genesis)
        gate = Gate(
            name,
            identity.key,
            [dataset],
            ledger,
            simulated=True,
        )
        try:
            gate.accept(self.signed, dataset, code_sha256(self.task.name))
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
            keep=self.private / name / "models",
            keys=RunKeys(self.private / name / "masks"),
            heads=self._kept_heads(identity),
        )

    def _kept_heads(self, identity: Identity) -> KeptHeads:
        kept = KeptHeads(self.out / "heads" / f"{identity.name}.jsonl", identity, self.signed.charter.keys())
        self._ledgers.append(kept)
        return kept

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
            noise_multiplier=calibrated(self.config),
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


def _context(node: int) -> Context:
    return Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})
