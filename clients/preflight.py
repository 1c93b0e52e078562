"""`hansa node check`: everything that would stop the node, found before it starts, each with what to do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from ..common.certificates import RevocationList, check_chain, check_peer, read_endorsement
from ..common.charter import SignedCharter
from ..common.errors import ConfigError, DataError, HansaError, LedgerError, OutputError
from ..common.home import Home
from ..common.ledger import Counter, read_ledger
from ..common.tasks import code_sha256
from .dial import proxy_for, server_certificate
from .gate import check_charter
from .law import Control, SiteLaw
from .registrations import serving, superseded
from .registry import Registered, Registry
from .settings import FederationEntry, NodeSettings
from .standing import Standing
from .training import check_task

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
    known: list[Registered] = []
    with report.about("data"):
        known = Registry(settings.state).some()
    for one in known:
        _data(report, one, known)
    with report.about("ledger"):
        _ledger(report, settings, home, known)
    for entry in settings.federations:
        with report.about(f"charter {entry.charter.name}"):
            began += _charter(report, settings, home, entry, known)
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


def _data(report: _Report, one: Registered, known: list[Registered]) -> None:
    """The rows are as they were registered. Of an old version they need not be there: then no data set can be declared later."""
    name = f"data {one.name}"
    try:
        one.dataset.open()
    except DataError as err:
        if not superseded(known, one):
            report.found.append(Finding(name, "FAIL", err.message, err.hint))
        else:
            what = f"an old version, and {err.message}"
            fix = "Put the file back, if data shall ever be registered that was collected later."
            report.found.append(Finding(name, "warn", what, fix))
    else:
        old = ", an old version" if superseded(known, one) else ""
        report.ok(name, f"registered for {one.task.name}, unchanged since{old}")


def _ledger(report: _Report, settings: NodeSettings, home: Home, known: list[Registered]) -> None:
    if not settings.ledger.exists():
        if settings.counter.exists() or any(one.dataset.bound for one in known):
            raise LedgerError(f"{settings.ledger}: missing", "Restore it: hansa node restore BACKUP")
        report.ok("ledger", "none yet; the node makes it when it first starts")
        return
    counted = Counter(settings.counter).counted()  # first: a node that runs appends meanwhile
    entries, torn = read_ledger(settings.ledger, home.key())
    Standing(entries)
    if counted is None or not (counted[0] <= len(entries) and entries[counted[0] - 1].root == counted[1]):
        raise LedgerError(
            f"{settings.ledger}: not the ledger that {settings.counter} counted, or nothing there can be read",
            "Restore the ledger with its newest entries: hansa node restore BACKUP",
        )
    report.ok(
        "ledger",
        f"{len(entries)} entries, signed and chained"
        + (" (behind them a torn last line, which the node cuts off when it starts)" if torn else ""),
    )
    recorded = {entry.body["dataset"] for entry in entries if entry.type == "dataset"}
    if lost := recorded - {one.dataset.dataset_id for one in known}:
        raise LedgerError(
            f"the registration of data set {min(lost)} is missing", "Restore it: hansa node restore BACKUP"
        )
    if fresh := [one.name for one in known if one.dataset.dataset_id not in recorded]:
        what = f"not in the ledger yet: {', '.join(fresh)}"
        report.found.append(Finding("registered", "warn", what, "The node records it when it next starts: restart it."))


def _charter(
    report: _Report, settings: NodeSettings, home: Home, entry: FederationEntry, known: list[Registered]
) -> list[tuple[str, datetime]]:
    name = f"charter {entry.charter.name}"
    signed = SignedCharter.load(entry.charter)
    charter = signed.verify(now=datetime.now(UTC))
    report.until(name, f"{charter.name}: signed by everyone, valid", charter.expires, "Agree on a new charter in time.")
    if known:
        with report.about(f"{name}: node"):
            one = serving(known, charter.task.name, entry.dataset)
            check_charter(
                charter, home.name(), home.key(), one.dataset, code_sha256(one.task.name), simulated=settings.simulated
            )
            check_task(one.task, protected=charter.privacy.kind != "none")
            what = f"this partner's key, the installed task and the size of the data set {one.name} fit it"
            report.ok(f"{name}: node", what)
        with report.about(f"{name}: site"):
            SiteLaw(settings.site, Control(settings.control), {one.task.name for one in known}).agree(charter)
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
