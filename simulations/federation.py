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
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..clients.app import Dataset, Node, make_client_app
from ..clients.datasets import RegisteredDataset, Split, csv_source
from ..clients.gate import Gate
from ..clients.outbox import Outbox
from ..clients.run_keys import RunKeys
from ..clients.training import check_records_apart
from ..common.charter import SignedCharter, SimulatedClients, draft
from ..common.config import SIGNED_PARTNERS_MAX, Federation, check_delta
from ..common.errors import CharterError, ConfigError, DataError, OutputError, Refused, RunFailed, TaskError
from ..common.flower import Context, Grid, RecordDict
from ..common.heads import KeptHeads
from ..common.identity import TEMPORARY, Identity, canonical, output_error, public_pem, sha256, write_whole
from ..common.ledger import Ledger
from ..common.messages import PlainWire, SignedWire, Wire
from ..common.model import Arrays, write_model
from ..common.plan import SOFTWARE, calibrated
from ..common.tasks import Task, check_model, code_sha256, initial_model, load_task, sized
from ..server.app import make_server_app
from ..server.masked import GIVE_UP
from ..server.records import LedgerRecords, Records
from ..server.roster import Roster
from ..server.rounds import Coordinator, Outcome
from ..server.witness import Witnessing
from . import sources
from .clients import ClientDatasets, clients_of
from .crew import Crew
from .execution import Execution
from .grid import CohortGrid, InProcessGrid
from .population import PopulationGate, PopulationRecords, PopulationRoster, client_name
from .ray_engine import RayEngine
from .realism import over_sampled, realistic

COORDINATOR = "coordinator"
NODES, COHORT, RAY = "nodes", "cohort", "ray"
"""Engines."""
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


def holds_sweep(out: Path, private: Path) -> bool:
    """Whether it is a sweep's folder: of runs in folders of their own."""
    return (out / "sweep.json").exists() or any(private.glob("*/run.json"))


def config_sha256(config: Federation) -> str:
    """What a configuration with its sizes (`sized`) is recognised by when a run goes on."""
    return sha256(canonical(json.loads(config.model_dump_json(), parse_float=str)))


def inputs_of(config: Federation, base: Path) -> dict[str, str]:
    """Digests of what else decides a run: its task's code, and its data."""
    return {"task_sha256": code_sha256(config.task), "data_sha256": sources.data_sha256(config, base)}


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
    clients = clients_of(config, base, task)
    return {
        client_name(number, len(clients)): Part(
            partial(clients.open, number), clients.declared(number), allow_single_class=True
        )
        for number in range(len(clients))
    }


@dataclass
class Simulation:
    """A federation set up in `out`; `run` it, then `close` it. Until then nobody else can work in its folders.

    Args:
        kind: which command's run it is. A "demo" replaces an earlier demo, and nothing else.
        private_root: the private folder, when it is not the one beside `out`.
        engine: NODES (a node, keys and a ledger for each partner), COHORT (a population's clients, with one ledger, many at once) or
            RAY (the same, trained by Ray's processes, on this machine or on a cluster); empty: NODES up to SIGNED_PARTNERS_MAX partners.
        execution: how COHORT and RAY compute; None: what a short trial finds fastest.
        workers: so many processes, whatever the plan says.

    Attributes:
        roster: all partners or clients.
        datasets: by name.
        crew: who trains a population.
        records: a population's one ledger.
        fresh: there was no run to go on with.
        inputs: digests of what else decides it.

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
    engine: str = ""
    execution: Execution | None = None
    workers: int | None = None
    nodes: dict[str, Node] = field(default_factory=dict)
    gates: dict[str, Gate] = field(default_factory=dict)
    datasets: Mapping[str, Dataset] = field(default_factory=dict)
    crew: Crew | None = None
    records: PopulationRecords | None = None
    _open: list[Ledger | KeptHeads | Crew | RayEngine] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.private = self.private_root or private_folder(self.out)
        self.task = load_task(self.config.task)
        check_model(self.task)
        self.config = sized(self.config)
        self._choose_engine()
        self.inputs = inputs_of(self.config, self.base)
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
        try:
            app(self.grid, _context(1))
        except RunFailed as err:
            raise RunFailed(err.message, err.hint.removesuffix(GIVE_UP)) from err
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
        for one in reversed(self._open):
            one.close()
        self._held.close()

    def _choose_engine(self) -> None:
        if not self.engine:
            few = self.config.size <= SIGNED_PARTNERS_MAX and self.config.privacy.kind != "central"
            self.engine = NODES if few else COHORT
        wrong = None
        if self.engine == NODES and self.config.size > SIGNED_PARTNERS_MAX:
            wrong = f"the engine nodes is for at most {SIGNED_PARTNERS_MAX} partners"
        elif self.engine == NODES and self.config.privacy.kind == "central":
            wrong = "the engine nodes has no central noise: a partner trusts nobody with its update"
        elif self.engine != NODES and self.config.population is None:
            wrong = f"the engine {self.engine} is for a population"
        elif self.engine != NODES and self.config.secure_aggregation is not None:
            wrong = f"the engine {self.engine} has no secure aggregation: its clients have no keys"
        if wrong:
            raise ConfigError(wrong, "Leave --engine out: it is chosen by the number of partners.")
        if self.engine == NODES and (self.execution or self.workers):
            raise ConfigError(
                "the engine nodes trains one partner after the other: it has no execution plan and no workers",
                "Leave --execution and --workers out, or give --engine cohort, which is for populations.",
            )

    # -- setting up --------------------------------------------------------------------------------------------------

    def _refuse_foreign(self) -> None:
        """Raise OutputError when there is something in the folders, and no run."""
        try:
            if not (self.private / "run.json").exists() and (holds_anything(self.out) or holds_anything(self.private)):
                what = "an earlier demo" if self.kind == "demo" else "a run of ours"
                if self.kind != "demo" and holds_sweep(self.out, self.private):
                    raise OutputError(
                        f"{self.out}: holds a sweep",
                        "Go on with it: --resume, with the --sweep and --seeds it had. Or give another --out.",
                    )
                if self.kind != "demo" and (self.out / "charter.json").exists() and not holds_anything(self.private):
                    raise OutputError(
                        f"{self.out}: holds a run, and its private folder {self.private} is missing",
                        "Put it back to go on with that run, or give another --out.",
                    )
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
        again = "ive another --out, or delete this folder and its .private one."
        if state is not None and state.get("config_sha256") != mine:
            began = "Give the configuration it began with. Or g" if self.resume else "G"
            raise OutputError(f"{self.out}: holds a run of another configuration", began + again)
        if state is not None and not self.resume:
            if (self.out / "result.json").exists():
                raise OutputError(f"{self.out}: holds another run, which is finished", "To run it again g" + again)
            raise OutputError(
                f"{self.out}: holds another run, which is not finished", "Go on with it: --resume. Or g" + again
            )
        if state is not None and state.get("engine", NODES) != self.engine:
            raise OutputError(
                f"{self.out}: holds a run of the engine {state.get('engine', NODES)}",
                "Give the --engine it began with.",
            )
        if self.engine != NODES:  # which check it by their charter and what they registered
            self._refuse_other_inputs(state or {})
        if state is None:
            made = {"config_sha256": mine, **self.inputs}
            state = {"kind": self.kind, "engine": self.engine, **made, "runs": [secrets.token_hex(8)]}
            self._state = state
            self._keep_state()
        return dict(state)

    def _refuse_other_inputs(self, state: Mapping[str, Any]) -> None:
        """Raise OutputError if the run began with other code or data: what is signed of it would be of two."""
        for name, what in (("task_sha256", "code of its task"), ("data_sha256", "data")):
            if state.get(name, self.inputs[name]) != self.inputs[name]:
                raise OutputError(f"{self.out}: holds a run with other {what}", "Restore it, or give another --out.")

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
        self._model = initial_model(self.task, self.config.seed)
        if self.engine == NODES:
            self._set_up_nodes()
        else:
            self._set_up_population()
        # The lock says that nobody else writes here, so these are a killed process's.
        for path in (*self.out.rglob(".*"), *self.private.rglob(".*")):
            if _UNFINISHED.fullmatch(path.name) and path.is_file():
                path.unlink()

    def _set_up_nodes(self) -> None:
        """A node, its keys and its ledger for each partner."""
        if self.config.privacy.kind != "none":
            check_records_apart(self._model, self.task.loss, self.task.schema.shape)
        parts = parts_of(self.config, self.base, self.task)
        me = self._identity(COORDINATOR)
        who = {name: self._identity(name) for name in parts}
        sizes = {name: part.declared_records for name, part in parts.items()}
        if empty := [name for name, size in sizes.items() if not size]:
            raise ConfigError(
                f"{empty[0]} has no training row left", "Fewer clients, or a smaller evaluation.test_fraction."
            )
        self.signed = self._charter(max(sizes.values()), sizes, None, me, who)
        charter = self.signed.charter
        registered = {}
        for name, part in parts.items():
            try:
                registered[name] = RegisteredDataset.register(
                    self.task,
                    part.source,
                    self.private / name,
                    part.allow_single_class,
                    public=charter.evaluation.kind == "public",
                )
            except DataError as err:
                raise type(err)(f"{name}: {err.message}", err.hint) if type(err) is DataError else err from err
        self.datasets = registered
        ledger = self._run_ledger(me, "coordinator")
        for name, dataset in registered.items():
            self._partner(name, who[name], dataset)
        in_order = list(self.nodes.values())
        grid = InProcessGrid(make_client_app(lambda c: in_order[c.node_id - 1]), len(in_order), _context)
        wire = SignedWire(me, {m.name: m.key for m in charter.partners}, self.signed.sha256)
        witnessing = Witnessing(me, ledger, self._kept_heads(me), charter.keys(), self.notify)
        roster = Roster({name: number for number, name in enumerate(parts, start=1)})
        by_node = list(sizes.values())
        self.grid = self._in_real_time(grid, lambda node: by_node[node - 1])
        self._coordinate(me, wire, roster, LedgerRecords(ledger, self.signed.sha256), witnessing)

    def _set_up_population(self) -> None:
        """Clients without keys, one ledger for all of them, and whoever trains many of them at once."""
        clients = clients_of(self.config, self.base, self.task)
        self.datasets = ClientDatasets(clients)
        me = self._identity(COORDINATOR)
        population = SimulatedClients(clients=len(clients), declared_records=clients.declared_records)
        self.signed = self._charter(clients.largest, {}, population, me, {})
        charter = self.signed.charter
        records = self.records = PopulationRecords(self._run_ledger(me, "population"), self.signed)
        wire = PlainWire()

        def gate(number: int) -> PopulationGate:
            return PopulationGate(client_name(number, len(clients)), charter, records)

        def node(context: Context) -> Node:
            number = context.node_id - 1
            return Node(self.task, self._model, self.datasets[client_name(number, len(clients))], gate(number), wire)

        ray = None
        if self.engine == RAY:
            ray = RayEngine(self.signed, self.config, clients, self.base, self.workers)
            self._open.append(ray)
        crew = self.crew = Crew(
            self.task, clients, charter, self.private / "execution.json", self.execution, self.workers, ray
        )
        self._open.append(crew)
        self.notify("execution", crew=crew)
        grid = CohortGrid(
            make_client_app(node),
            len(clients),
            _context,
            crew.executor,
            crew.plan.chunk,
            crew.shapes,
            wire,
            gate,
            COORDINATOR,
        )
        self.grid = self._in_real_time(grid, lambda node: clients.declared(node - 1))
        self._coordinate(me, wire, PopulationRoster(len(clients), clients.evaluated), records, None)

    def _in_real_time(self, grid: Grid, declared: Callable[[int], int]) -> Grid:
        """The Grid as the configuration's system would have it, on a virtual clock; itself where there is none."""
        shapes = {name: value.shape for name, value in self._initial().items()}
        classes, clock = len(self.task.classes), self.private / "virtual-clock.jsonl"
        return realistic(grid, self.config, self.signed.charter, shapes, classes, declared, clock)

    def _run_ledger(self, me: Identity, role: str) -> Ledger:
        ledger = self.run_ledger = self._ledger(
            self.out / "coordinator" / "ledger.jsonl", me, {"owner": COORDINATOR, "role": role}
        )
        if not ledger.of("charter"):
            charter = self.signed.charter
            agreed = {"name": charter.name, "expires": charter.expires.isoformat()}
            ledger.append("charter", agreed, charter=self.signed.sha256)
        return ledger

    def _coordinate(
        self, me: Identity, wire: Wire, roster: Roster, records: Records, witnessing: Witnessing | None
    ) -> None:
        self.roster = roster
        self.coordinator = Coordinator(
            self.signed,
            me,
            self.task,
            wire,
            roster,
            records,
            self._initial,
            self.private / COORDINATOR,
            self.out / "closing",
            self.notify,
            witnessing,
        )

    def _initial(self) -> Arrays:
        model = initial_model(self.task, self.config.seed)  # of its own: nodes train on theirs
        return {name: p.detach().numpy() for name, p in model.named_parameters() if p.requires_grad}

    def _partner(self, name: str, identity: Identity, dataset: RegisteredDataset) -> None:
        charter = self.signed.charter
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
            self._model,
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
        self._open.append(kept)
        return kept

    def _ledger(self, path: Path, identity: Identity, genesis: Mapping[str, Any]) -> Ledger:
        about = {"ledger_id": secrets.token_hex(16), "simulated": True, "software": SOFTWARE}
        ledger = Ledger(path, identity, {**genesis, **about})
        self._open.append(ledger)
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

    def _charter(
        self,
        largest: int,
        sizes: dict[str, int],
        population: SimulatedClients | None,
        me: Identity,
        who: Mapping[str, Identity],
    ) -> SignedCharter:
        """The charter of this folder, drafted and signed by everyone if there is none yet.

        Args:
            largest: what any partner or client declares at most.
            sizes: by partner, what it declares.
        """
        path = self.out / "charter.json"
        if path.exists():
            signed = SignedCharter.load(path)
            signed.verify()
            return signed
        try:
            check_delta(self.config.privacy.delta, largest if self.config.privacy.unit == "record" else 0)
        except ValueError as err:
            raise ConfigError(
                str(err), f"Write a smaller one: {10 ** math.floor(math.log10(0.999 / largest)):g}."
            ) from err
        config = over_sampled(self.config)
        charter = draft(
            config,
            task_sha256=code_sha256(self.task.name),
            coordinator_key=me.key,
            partner_keys={name: identity.key for name, identity in who.items()},
            noise_multiplier=calibrated(config),
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
