"""node.yaml: whose node this is, which federations it serves, and the site's own law, which can only tighten a charter."""

from __future__ import annotations

from datetime import time
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from ..common.config import Name, Section, load_yaml


def _address(value: str) -> str:
    host, colon, port = value.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not colon or not bare or (":" in bare) != (host != bare) or any(c.isspace() or c == "/" for c in host):
        raise ValueError("HOST:PORT is allowed, for instance coordinator.example:8440 or [::1]:8440")
    if not (port.isascii() and port.isdecimal() and 1 <= int(port) <= 65535):
        raise ValueError(f"port {port} is not one from 1 to 65535")
    return value


def _proxy(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/") or parts.query:
        raise ValueError("http://HOST:PORT is allowed")
    return value


def _key(value: str) -> str:
    plain = value.replace(" ", "").lower()
    if len(plain) not in (40, 64) or not set(plain) <= set("0123456789abcdef"):
        raise ValueError("an identity key (64 hex digits) or its fingerprint (40, as Hansa shows it) is allowed")
    return plain


def _hours(value: str) -> str:
    start, end = window(value)
    if start == end:
        raise ValueError("a window that is never or always open; leave hours out for always")
    return value


def window(hours: str) -> tuple[time, time]:
    """ "20:00-06:00" as two times of day.

    Raises:
        ValueError: anything else.
    """
    start, dash, end = hours.partition("-")
    if not dash or any(len(part) != 5 or part[2] != ":" for part in (start, end)):
        raise ValueError("HH:MM-HH:MM (UTC) is allowed")
    try:
        return time.fromisoformat(start), time.fromisoformat(end)
    except ValueError as err:
        raise ValueError("HH:MM-HH:MM (UTC) is allowed") from err


class FederationEntry(Section):
    """One federation: the charter that this partner signed, and where its coordinator's server is.

    Attributes:
        server: HOST:PORT; the node dials out, nothing dials in.
        dataset: name of the registered data set to train on, or of one that it is a version of; needed when several fit the
            charter's task.
        proxy: http://HOST:PORT of an HTTP proxy to dial through; without it the environment's (https_proxy, no_proxy).
    """

    charter: Path
    server: Annotated[str, AfterValidator(_address)]
    proxy: Annotated[str, AfterValidator(_proxy)] | None = None
    dataset: Name | None = None


class SiteSettings(Section):
    """The site's own law. Whatever it says, the charters hold as well: it can refuse more and allow nothing more.

    Attributes:
        tasks: the only tasks that may run here; default: those of the registered data sets.
        coordinators: the only coordinators, by identity key or fingerprint; default: those of the listed charters.
        epsilon_cap: over everything ever spent and held on one lineage of data sets, at the asking charter's delta, record
            level, by the filter; checked when a run is accepted.
        hours: when runs may begin and rounds be trained, "HH:MM-HH:MM" in UTC, end excluded; it may wrap midnight. A
            round that began within them is finished.
        threads: CPU threads for training.
        memory_mb: what the process may hold in data (RLIMIT_DATA, MiB); training that needs more fails, and the node
            may have to be started again.
        approval: each run must be approved by hand before: hansa node approve RUN.
        minimum_cohort: a charter's quorum must be at least this.
        allow_unprotected: charters without privacy may train here. Never together with epsilon_cap.
    """

    tasks: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    coordinators: Annotated[tuple[Annotated[str, AfterValidator(_key)], ...], Field(min_length=1)] | None = None
    epsilon_cap: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = None
    hours: Annotated[str, AfterValidator(_hours)] | None = None
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    memory_mb: Annotated[int, Field(ge=512)] | None = None
    approval: bool = False
    minimum_cohort: Annotated[int, Field(ge=1)] = 1
    allow_unprotected: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.allow_unprotected and self.epsilon_cap is not None:
            raise ValueError("epsilon_cap and allow_unprotected contradict each other: without privacy no cap holds")
        return self


class NodeSettings(Section):
    """What node.yaml says. Relative paths start at its folder; `load_settings` makes them absolute.

    Attributes:
        home: the folder of `hansa identity new`.
        state: ledger, registrations, inbox, outbox, models, and what `hansa node` commands tell the daemon.
        simulated: for demos and tests: such a node accepts only simulated charters, and no other does.
        federations: a data set's budget holds over all of them.
        log: json for one line an event, or text.
    """

    home: Path = Path()
    state: Path = Path("state")
    simulated: bool = False
    federations: Annotated[tuple[FederationEntry, ...], Field(min_length=1)]
    site: SiteSettings = SiteSettings()
    log: Literal["json", "text"] = "text"

    @model_validator(mode="after")
    def _once(self) -> Self:
        charters = [entry.charter for entry in self.federations]
        if len(set(charters)) < len(charters):
            raise ValueError("federations: a charter stands in it twice")
        return self

    @property
    def ledger(self) -> Path:
        """This node's ledger."""
        return self.state / "ledger.jsonl"

    @property
    def counter(self) -> Path:
        """How long this node's ledger must be at least."""
        return self.state / "counter"

    @property
    def heads(self) -> Path:
        """Heads of ledgers that this node countersigned, one file a charter."""
        return self.state / "heads"

    @property
    def control(self) -> Path:
        """What `hansa node` commands tell the daemon."""
        return self.state / "control"

    @property
    def models(self) -> Path:
        """Final models with their closing checkpoints, one folder a run."""
        return self.state / "models"

    @property
    def revoked(self) -> Path:
        """The revocation list of the connection CA, if this partner keeps one."""
        return self.home / "revoked.crl"


def load_settings(path: Path) -> NodeSettings:
    """Read and check node.yaml.

    Raises:
        ConfigError: naming file, line, key, the value found and what is allowed.
    """
    found = load_yaml(path, NodeSettings, "Write one: hansa node init --charter charter.json --server HOST:PORT")
    base = path.absolute().parent
    entries = tuple(e.model_copy(update={"charter": base / e.charter}) for e in found.federations)
    return found.model_copy(update={"home": base / found.home, "state": base / found.state, "federations": entries})


TEMPLATE = """\
# A partner's node. Relative paths start at this file's folder.
home: .                     # the folder of `hansa identity new`
state: state                # ledger, registrations, outbox, models: back it up with `hansa node backup`
federations:                # one or several; a data set's budget holds over all
  - charter: {charter}
    server: {server}
    # dataset: heart-disease  # which one, when several registered data sets fit the charter's task
    # proxy: http://proxy.example:3128
site:                       # this site's own law: it can only tighten the charters
  threads: 1                # CPU threads for training
  approval: false           # true: each run waits for `hansa node approve RUN`
  # epsilon_cap: 1.0        # over everything ever spent on one lineage of data sets, at the charter's delta
  # hours: "20:00-06:00"    # UTC; may wrap midnight
  # memory_mb: 4096
  # minimum_cohort: 3       # a charter's quorum must be at least this
  # coordinators: ["..."]   # identity keys or fingerprints; default: those of the charters
  # tasks: [heart-disease]  # default: those of the registered data sets
  # allow_unprotected: false
log: text                   # or json: one line an event
"""
"""What `hansa node init` writes."""
