"""`hansa node check`: everything that would stop the node, found before it starts, each with what to do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from ..common.certificates import RevocationList, check_chain, check_peer, read_endorsement
from ..common.charter import SignedCharter
from ..common.errors import ConfigError, HansaError, LedgerError, OutputError
from ..common.home import Home
from ..common.ledger import read_ledger
from ..common.tasks import code_sha256, load_task
from .datasets import RegisteredDataset
from .dial import proxy_for, server_certificate
from .gate import check_charter
from .law import Control, SiteLaw
from .node import DataFiles
from .settings import FederationEntry, NodeSettings

RENEW_BEFORE = timedelta(days=14)
"""A certificate or charter that ends sooner is a warning."""
CLOCK = timedelta(minutes=5)
"""A clock that is further behind than this is a warning: hours and expiry depend on it. Peers bear more."""
FREE_BYTES = 256 * 1024 * 1024
"""The state folder's disk must have so much left: requests, replies and models pass through it."""


@dataclass(frozen=True)
class Finding:
    """One line: `state` is ok, warn or FAIL; `fix` says what to do."""

    name: str
    state: str
    what: str
    fix: str = ""


def check(settings: NodeSettings, passphrase: str | None) -> list[Finding]:
    """Look at everything that the node needs. Changes nothing, and works while the node runs. Reads the data."""
    report = _Report()
    home = Home(settings.home)
    with report.about("keys"):
        identity = home.identity(passphrase)
        home.tls_key_pem(passphrase)
        report.ok("keys", f"identity and TLS key of {identity.name}; nobody else can read them")
    began: list[tuple[str, datetime]] = []
    with report.about("certificate"):
        began += _certificate(report, settings, home)
    dataset = None
    with report.about("data"):
        dataset = _data(report, settings)
    with report.about("ledger"):
        _ledger(report, settings, home, dataset)
    for entry in settings.federations:
        with report.about(f"charter {entry.charter.name}"):
            began += _charter(report, settings, home, entry, dataset)
    now = datetime.now(UTC)
    if late := [what for what, time in began if time > now + CLOCK]:
        said = f"this machine says {now:%Y-%m-%d %H:%M} UTC, and the {late[0]} was made later"
        report.found.append(Finding("clock", "warn", said, "Set the clock (NTP), or ask who made it about theirs."))
    else:
        report.ok("clock", f"{now:%Y-%m-%d %H:%M} UTC")
    with report.about("disk"):
        _disk(report, settings)
    _control(report, settings)
    return report.found


@dataclass
class _Report:
    found: list[Finding] = field(default_factory=list)

    @contextmanager
    def about(self, name: str) -> Iterator[None]:
        try:
            yield
        except HansaError as err:
            self.found.append(Finding(name, "FAIL", err.message, err.hint))

    def ok(self, name: str, what: str) -> None:
        self.found.append(Finding(name, "ok", what))

    def until(self, name: str, what: str, end: datetime, fix: str) -> None:
        """Fine, or a warning when it ends soon."""
        soon = end - datetime.now(UTC) < RENEW_BEFORE
        said = f"{what} until {end:%Y-%m-%d %H:%M} UTC"
        self.found.append(Finding(name, "warn" if soon else "ok", said, fix if soon else ""))


def _certificate(report: _Report, settings: NodeSettings, home: Home) -> list[tuple[str, datetime]]:
    now = datetime.now(UTC)
    ca = home.ca_certificate()
    found = check_chain(home.tls_certificate(), ca, now)
    check_peer(found, {home.name(): home.key()}, now, RevocationList.load(settings.revoked, ca))
    end = min(found.not_after, read_endorsement(found.endorsement).not_after)
    report.until(
        "certificate", "admitted by the CA and endorsed by the identity key", end, "Renew: hansa identity renew"
    )
    return [("certificate", found.not_before)]


def _data(report: _Report, settings: NodeSettings) -> RegisteredDataset:
    files = DataFiles.load(settings.state)
    task = load_task(files.task)
    dataset = RegisteredDataset.load(task, files.source(task), settings.state)
    dataset.open()
    report.ok("data", f"registered for {task.name}, unchanged since")
    return dataset


def _ledger(report: _Report, settings: NodeSettings, home: Home, dataset: RegisteredDataset | None) -> None:
    if not settings.ledger.exists():
        if dataset is not None and dataset.bound:
            raise LedgerError(f"{settings.ledger}: missing", "Restore it: hansa node restore BACKUP")
        report.ok("ledger", "none yet; the node makes it when it first starts")
        return
    entries, torn = read_ledger(settings.ledger, home.key())
    report.ok(
        "ledger", f"{len(entries)} entries, signed and chained" + (", the last one torn by a crash" if torn else "")
    )


def _charter(
    report: _Report, settings: NodeSettings, home: Home, entry: FederationEntry, dataset: RegisteredDataset | None
) -> list[tuple[str, datetime]]:
    name = f"charter {entry.charter.name}"
    signed = SignedCharter.load(entry.charter)
    charter = signed.verify(now=datetime.now(UTC))
    report.until(name, f"{charter.name}: signed by everyone, valid", charter.expires, "Agree on a new charter in time.")
    if dataset is not None:
        with report.about(f"{name}: node"):
            check_charter(
                charter, home.name(), home.key(), dataset, code_sha256(dataset.task), simulated=settings.simulated
            )
            report.ok(f"{name}: node", "this partner's key, the installed task and the size of the data fit it")
        with report.about(f"{name}: site"):
            SiteLaw(settings.site, Control(settings.control), dataset.task).agree(charter)
            report.ok(f"{name}: site", "nothing in it that this site's law refuses")
    with report.about(f"server {entry.server}"):
        who = charter.coordinator
        server_certificate(
            entry.server, proxy_for(entry.server, entry.proxy), home, who.name, who.key, settings.revoked
        )
        report.ok(f"server {entry.server}", f"answers, with a key that {who.name} endorsed")
    return [(name, charter.created)]


def _disk(report: _Report, settings: NodeSettings) -> None:
    place = next((p for p in (settings.state, *settings.state.parents) if p.exists()), None)
    if place is None:
        raise ConfigError(f"{settings.state}: no such disk", "Correct `state` in node.yaml.")
    free = shutil.disk_usage(place).free
    if free < FREE_BYTES:
        wanted = f"at least {FREE_BYTES >> 20} MB are needed"
        raise OutputError(f"{settings.state}: {free >> 20} MB are free, {wanted}", "Free some space.")
    report.ok("disk", f"{free >> 20} MB free")


def _control(report: _Report, settings: NodeSettings) -> None:
    control = Control(settings.control)
    if control.restored.exists():
        what = "restored from a backup, spending not proved: every run is refused"
        report.found.append(Finding("steward", "warn", what, "hansa node restore --prove CLOSING.json"))
    if control.paused():
        report.found.append(Finding("steward", "warn", "paused: every run is refused", "hansa node resume"))
