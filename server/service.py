"""A coordinator's side of one charter: everything that a run needs but a Grid, and a run over the link.

`Service` is independent of the engine: whoever has a Grid and a roster calls `Service.coordinator(roster).run(grid, ...)`;
`Service.run` does it over our own link. One process works in a state folder: it holds the lock of the ledger in it.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..common.charter import SignedCharter
from ..common.errors import CharterError, ConfigError, IdentityError, LedgerError, OutputError, RunFailed, TaskError
from ..common.heads import KeptHeads
from ..common.home import Home
from ..common.identity import fingerprint
from ..common.ledger import Ledger
from ..common.messages import SignedWire
from ..common.model import Arrays, write_model
from ..common.plan import SOFTWARE
from ..common.tasks import check_model, code_sha256, initial_model, load_task
from .bundle import is_finished, runs_of
from .records import LedgerRecords
from .rounds import Coordinator, Outcome
from .settings import ServerSettings
from .status import WAITING, Status, read_status
from .witness import Witnessing

if TYPE_CHECKING:
    from ..common.events import EventLog
    from .link import GrpcGrid

Notify = Callable[..., None]
RUN_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


class Service:
    """Charter, identity, task, ledger, wire and initial model of a coordinator; close it when done.

    Args:
        passphrase: of the identity's key file, where it is encrypted.

    Raises (on creation):
        CharterError: not signed by everyone, or it does not name this coordinator.
        IdentityError: a home whose keys cannot be read.
        TaskError: the task is not installed here, or is not the code that was agreed.
        LedgerError: another process works in the state folder, or its ledger is another's.
    """

    def __init__(self, settings: ServerSettings, passphrase: str | None = None) -> None:
        self.settings = settings
        self.signed = SignedCharter.load(settings.charter)
        charter = self.charter = self.signed.verify()  # expiry counts where a run begins
        if charter.population is not None:
            raise CharterError("the charter of a simulated population has no partners to serve", "Use hansa simulate.")
        self.home = Home(settings.home)
        self.passphrase = passphrase
        self.identity = self.home.identity(passphrase)
        me = charter.coordinator
        if (self.identity.name, self.identity.key) != (me.name, me.key):
            raise IdentityError(
                f"{settings.home} is {self.identity.name}, key {fingerprint(self.identity.key)}; the charter's coordinator "
                f"is {me.name}, key {fingerprint(me.key)}",
                "Give the coordinator's own home in server.yaml.",
            )
        self.task = load_task(charter.task.name)
        if (installed := code_sha256(charter.task.name)) != charter.task.code_sha256:
            raise TaskError(
                f"the charter pins task code {charter.task.code_sha256[:16]}, installed is {installed[:16]}",
                "Install the version of the task that was agreed.",
            )
        check_model(self.task)
        self.wire = SignedWire(self.identity, {m.name: m.key for m in charter.partners}, self.signed.sha256)
        genesis = {"owner": me.name, "role": "coordinator", "simulated": charter.simulated}
        about = {"ledger_id": secrets.token_hex(16), "software": SOFTWARE}
        self.ledger = Ledger(settings.ledger, self.identity, {**genesis, **about})
        try:
            self._join()
            self._heads = KeptHeads(settings.heads(self.signed.sha256), self.identity, charter.keys())
        except BaseException:
            self.ledger.close()
            raise

    def _join(self) -> None:
        """Write the charter down, once."""
        if self.ledger.entries[0].body["simulated"] != self.charter.simulated:
            raise LedgerError(
                f"{self.settings.ledger}: of simulated {not self.charter.simulated}, the charter is not",
                "A simulation and the real thing never share a ledger: give another state folder.",
            )
        if not any(e.charter == self.signed.sha256 for e in self.ledger.of("charter")):
            body = {"name": self.charter.name, "expires": self.charter.expires.isoformat()}
            self.ledger.append("charter", body, charter=self.signed.sha256)

    def __enter__(self) -> Service:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the state folder."""
        self._heads.close()
        self.ledger.close()

    @property
    def roster(self) -> dict[str, int]:
        """Partner -> the node id that our own link knows it by."""
        return {member.name: number for number, member in enumerate(self.charter.partners, start=1)}

    def coordinator(self, roster: Mapping[str, int], notify: Notify = lambda *_, **__: None) -> Coordinator:
        """The round loop, for any Grid on which the partners have these node ids."""
        return Coordinator(
            self.signed,
            self.identity,
            self.task,
            self.wire,
            roster,
            LedgerRecords(self.ledger, self.signed.sha256),
            self._initial,
            self.settings.checkpoints,
            self.settings.closing,
            notify,
            Witnessing(self.identity, self.ledger, self._heads, self.charter.keys(), notify),
        )

    def _initial(self) -> Arrays:
        model = initial_model(self.task, self.charter.model_seed)
        return {name: p.detach().numpy() for name, p in model.named_parameters() if p.requires_grad}

    def choose(self, name: str | None, resume: bool) -> str:
        """The run that is meant: a new one, or with `resume` one to go on with.

        Raises:
            ConfigError: a name that is no name, of a run that began without `resume`, or nothing to resume.
            CharterError: a new run under a charter that has expired.
        """
        if name is not None and not RUN_NAME.fullmatch(name):
            raise ConfigError(f"--run {name!r}: not a name", "Lowercase letters, digits and hyphens; at most 63.")
        runs = runs_of(self.ledger.entries, self.signed.sha256)
        known = [run.run_id for run in runs]
        everywhere = [entry.body["run_id"] for entry in self.ledger.of("run")]
        if resume and name is None:
            name = next((r.run_id for r in reversed(runs) if not is_finished(r, self.settings)), self._unrecorded())
            if name is None:
                raise ConfigError("nothing to resume: every run is closed", "Start a new run: without --resume.")
        name = name or f"{datetime.now(UTC):%Y%m%d}-{secrets.token_hex(4)}"
        if name in everywhere and name not in known:
            raise ConfigError(f"run {name} was under another charter", "Give another --run.")
        if name in known and not resume:
            done = "is closed" if any(r.run_id == name and is_finished(r, self.settings) for r in runs) else "began"
            raise ConfigError(f"run {name} {done} already", "Give another --run, or go on with it: --resume.")
        if name not in known:
            self.signed.verify(now=datetime.now(UTC))
        return name

    def _unrecorded(self) -> str | None:
        """A run that ended before its first entry, while it waited for partners."""
        with suppress(OutputError):
            last = read_status(self.settings.status)
            began = any(entry.body["run_id"] == last.get("run") for entry in self.ledger.of("run"))
            if last.get("charter_sha256") == self.signed.sha256 and not began and RUN_NAME.fullmatch(str(last["run"])):
                return str(last["run"])
        return None

    def link(self, log: EventLog) -> GrpcGrid:
        """Our own link, not yet started."""
        from .link import GrpcGrid

        settings = self.settings
        if settings.revoked is not None and not settings.revoked.exists():
            raise ConfigError(
                f"{settings.revoked}: no such revocation list", "It stands in the CA's folder: revoked.crl"
            )
        return GrpcGrid(
            listen=settings.listen,
            home=self.home,
            passphrase=self.passphrase,
            keys={member.name: member.key for member in self.charter.partners},
            roster=self.roster,
            inspect=self.wire.inspect,
            spool=settings.state / "spool",
            crl=settings.revoked,
            uploads=settings.uploads,
            log=log,
        )

    def status(self, run_id: str, grid: GrpcGrid) -> Status:
        """What `hansa server status` will read about this run."""
        about = {
            "run": run_id,
            "charter": self.charter.name,
            "charter_sha256": self.signed.sha256,
            "rounds": self.charter.algorithm.rounds,
            "quorum": self.charter.quorum,
            "address": self.settings.listen,
        }
        return Status(self.settings.status, about, list(self.roster), grid.connected)

    def run(
        self,
        grid: GrpcGrid,
        run_id: str,
        status: Status,
        notify: Notify = lambda *_, **__: None,
        *,
        give_up: bool = False,
    ) -> Outcome:
        """Run, or go on with, a run over our link, and write its model.

        `grid` is started and stopped here; `status` is being kept by the caller. A signal may interrupt it anywhere, like
        a crash: the run goes on with --resume.

        Raises:
            RunFailed: too few partners connected or answered; the run can go on later.
        """

        def both(event: str, **facts: Any) -> None:
            status.notify(event, **facts)
            notify(event, **facts)

        grid.start()
        try:
            host = self.settings.listen.rpartition(":")[0]
            status.about(address=f"{host}:{grid.port}")
            status.phase(WAITING)
            wait_s = self.settings.wait_for_nodes_s
            notify("waiting", partners=list(self.roster), wait_s=wait_s, port=grid.port)

            def look(left_s: float) -> list[str]:
                if set(self.roster) - set(grid.connected()):
                    grid.wait(min(left_s, 1.0))
                return [name for name in self.roster if name not in grid.connected()]

            hint = "Their operators look with `hansa node check`; then run again with --resume."
            self.gather(look, "connected", hint)
            status.phase("opening")
            outcome = self.coordinator(self.roster, both).run(grid, run_id, give_up=give_up)
            if outcome.model is not None:
                write_model(self.settings.model(run_id), outcome.model)
            status.phase(outcome.why)
            return outcome
        finally:
            grid.stop()

    def gather(self, look: Callable[[float], list[str]], what: str, hint: str) -> None:
        """Return when all partners are there, or a quorum is and the time for the others is over.

        Args:
            look: who is missing; it waits for a change, so many seconds at most.
            what: what the partners did who are there, for the error's words; with `hint`.

        Raises:
            RunFailed: too few came.
        """
        wait_s = self.settings.wait_for_nodes_s
        deadline = time.monotonic() + wait_s
        while missing := look(max(0.0, deadline - time.monotonic())):
            if time.monotonic() < deadline:
                continue
            here = len(self.roster) - len(missing)
            if here < self.charter.quorum:
                raise RunFailed(
                    f"{here} of {len(self.roster)} partners {what} within {wait_s:g} s, the quorum is "
                    f"{self.charter.quorum}; missing: {', '.join(missing)}",
                    f"Nothing was spent. {hint}",
                )
            return
