"""The parts of a partner's node, put together from node.yaml, and the daemon that runs them.

    state/datasets/       what is registered (registry.py)  state/outbox/       finished replies, until their run closes
    state/ledger.jsonl    everything decided and spent      state/counter       how long the ledger must be
    state/inbox/          requests that are worked on       state/models/       final models, one folder a run
    state/control/        what commands tell the daemon     state/heads/        heads of ledgers that were countersigned
    state/masks/          keys of secure aggregation, until their run ends

One gate and ledger for all data sets; for each charter one ClientApp with a wire of its own, so that no coordinator can speak
under another's charter.
"""

from __future__ import annotations

import resource
import secrets
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..common.charter import SignedCharter
from ..common.errors import CharterError, ConfigError, LedgerError, LinkError, Refused
from ..common.events import EventLog
from ..common.flower import ClientApp, Context, RecordDict
from ..common.heads import KeptHeads
from ..common.home import Home
from ..common.identity import Identity, drop_unfinished
from ..common.ledger import Counter, Ledger
from ..common.messages import SignedWire
from ..common.plan import SOFTWARE
from ..common.tasks import code_sha256, initial_model
from .app import Node, make_client_app
from .gate import Gate
from .law import Control, SiteLaw
from .outbox import Outbox
from .registrations import serving
from .registry import Registered, Registry
from .run_keys import RunKeys
from .settings import FederationEntry, NodeSettings
from .training import check_task

if TYPE_CHECKING:
    from .link import NodeLink


@dataclass(frozen=True)
class Joined:
    """One federation that this node serves."""

    signed: SignedCharter
    entry: FederationEntry
    wire: SignedWire
    app: ClientApp

    @property
    def coordinator(self) -> tuple[str, str]:
        """Name and identity key, as the charter has them."""
        return self.signed.charter.coordinator.name, self.signed.charter.coordinator.key


@dataclass(frozen=True)
class Site:
    """A node that is put together and not connected. It holds the ledger's lock until `close`."""

    identity: Identity
    gate: Gate
    ledger: Ledger
    joined: tuple[Joined, ...]
    heads: tuple[KeptHeads, ...]

    def close(self) -> None:
        """Let go of the ledger, and of the heads that are kept."""
        self.ledger.close()
        for heads in self.heads:
            heads.close()


# -- putting it together -------------------------------------------------------------------------------------------------


def assemble(settings: NodeSettings, passphrase: str | None, log: EventLog) -> Site:
    """Everything but the connections. Reads no data.

    A charter that does not fit is logged and not joined; the others are. What only the site's law refuses is joined: each
    of its runs is refused with the reason, which the coordinator then sees, and runs from before can be closed.

    Raises:
        ConfigError, IdentityError, DataError, TaskError, LedgerError, OutputError: the node cannot work at all.
        CharterError: no charter is left, or a file is none.
    """
    home = Home(settings.home)
    identity = home.identity(passphrase)
    known = Registry(settings.state).some()
    charters = [(entry, SignedCharter.load(entry.charter)) for entry in settings.federations]
    if len({signed.sha256 for _, signed in charters}) < len(charters):
        raise ConfigError("two entries of federations are the same charter", "List each charter once.")
    tasks = {one.task.name: one.task for one in known}
    for name, task in tasks.items():
        of_it = [s.charter for _, s in charters if s.charter.task.name == name]
        check_task(task, protected=any(charter.privacy.kind != "none" for charter in of_it))
    models = {name: initial_model(task, 0) for name, task in tasks.items()}  # their weights come with each request
    law = SiteLaw(settings.site, Control(settings.control), models)
    ledger = _ledger(settings, identity, known)
    kept: list[KeptHeads] = []
    try:
        # The ledger's lock is ours now: nobody else writes these.
        for folder in (settings.state, *(settings.state / "models").glob("*/")):
            drop_unfinished(folder)
        if ledger.recovered:
            log.log("ledger recovered", partner=identity.name, bytes=ledger.recovered)
        gate = Gate(
            identity.name,
            identity.key,
            [one.dataset for one in known],
            ledger,
            simulated=settings.simulated,
            law=law,
            log=log,
        )
        run_keys = RunKeys(settings.state / "masks")
        run_keys.keep_only(gate.open_runs())
        joined, refused = [], []
        for entry, signed in charters:
            about = {"federation": signed.charter.name, "charter": signed.sha256}
            try:
                served = serving(known, signed.charter.task.name, entry.dataset)
                gate.accept(signed, served.dataset, code_sha256(served.task.name))
            except (CharterError, Refused) as err:
                reason = err.reason.value if isinstance(err, Refused) else err.message
                log.log("charter refused", reason=reason, **about)
                refused.append(f"{entry.charter}: {err.message}")
                continue
            log.log("charter joined", coordinator=signed.charter.coordinator.name, **about)
            try:
                law.agree(signed.charter)
            except Refused as err:
                log.log("runs will be refused", reason=err.reason.value, **about)
            wire = SignedWire(
                identity, {signed.charter.coordinator.name: signed.charter.coordinator.key}, signed.sha256
            )
            heads = KeptHeads(settings.heads / f"{signed.sha256}.jsonl", identity, signed.charter.keys())
            kept.append(heads)
            node = Node(
                served.task,
                models[served.task.name],
                served.dataset,
                gate,
                wire,
                coordinator=signed.charter.coordinator.name,
                outbox=Outbox(settings.state / "outbox" / signed.sha256),
                identity=identity,
                keep=settings.models,
                heads=heads,
                keys=run_keys,
            )
            joined.append(Joined(signed, entry, wire, make_client_app(_always(node))))
        if not joined:
            raise CharterError("no charter can be joined:\n  " + "\n  ".join(refused), "See: hansa node check")
    except BaseException:
        ledger.close()
        for heads in kept:
            heads.close()
        raise
    return Site(identity, gate, ledger, tuple(joined), tuple(kept))


def _ledger(settings: NodeSettings, identity: Identity, known: list[Registered]) -> Ledger:
    begun = settings.counter.exists() or any(one.dataset.bound for one in known)
    if begun and not settings.ledger.exists():
        # Before a new one is made: nothing could be restored over that.
        raise LedgerError(
            f"{settings.ledger}: missing, and it holds what the registered data has spent",
            "Restore it: hansa node restore BACKUP",
        )
    genesis = {
        "owner": identity.name,
        "role": "partner",
        "ledger_id": secrets.token_hex(16),
        "simulated": settings.simulated,
        "software": SOFTWARE,
    }
    return Ledger(settings.ledger, identity, genesis, Counter(settings.counter))


def _always(node: Node) -> Callable[[Context], Node]:
    return lambda _: node


# -- the daemon ----------------------------------------------------------------------------------------------------------


def run(settings: NodeSettings, passphrase: str | None, log: EventLog) -> None:
    """Serve every federation until SIGTERM or SIGINT. A request that is worked on then is finished first.

    Raises:
        As `assemble`; LinkError: the connections ended by themselves.
        LedgerError, OutputError: this node can no longer record what it does.
    """
    from .link import run_links  # gRPC, which nothing else here needs

    log.capture()
    limit(settings)
    site = assemble(settings, passphrase, log)
    try:
        made = links(site, settings, passphrase, log)
        with _until_signal() as stop:
            log.log("started", partner=site.identity.name, version=SOFTWARE)
            run_links(made, stop)
            if not stop.is_set():
                raise LinkError("the connections ended by themselves", "This is a fault in Hansa; start it again.")
            log.log("stopped", partner=site.identity.name)
    finally:
        site.close()


def links(site: Site, settings: NodeSettings, passphrase: str | None, log: EventLog) -> list[NodeLink]:
    """A link for each federation. What its coordinator did not sign is refused as it arrives, and told why."""
    from .link import NodeLink

    return [
        NodeLink(
            one.entry.server,
            one.entry.proxy,
            Home(settings.home),
            passphrase,
            *one.coordinator,
            one.app,
            _context,
            # A folder each: a link takes whatever it finds in its inbox for a request of its own coordinator.
            settings.state / "inbox" / one.signed.sha256,
            settings.revoked,
            log,
            one.wire.inspect,
        )
        for one in site.joined
    ]


def limit(settings: NodeSettings) -> None:
    """Hold this process to the site's CPU threads and memory."""
    torch.set_num_threads(settings.site.threads)
    if settings.site.memory_mb is not None:
        most = settings.site.memory_mb * 1024 * 1024
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        if hard != resource.RLIM_INFINITY:
            most = min(most, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


@contextmanager
def _until_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set; a second signal ends the process at once, which is as safe as a crash."""
    stop = threading.Event()

    def asked(*_: object) -> None:
        stop.set()
        for number in before:
            signal.signal(number, signal.SIG_DFL)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, asked)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _context() -> Context:
    return Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
