"""The site's own law: what this organisation refuses beyond what its charters refuse. It can allow nothing.

What the steward says while the node runs (approve, pause, withdraw) are files in one folder, read at each check: the
commands write them, the daemon obeys at its next request. A file that cannot be read stops the request, never the law.

    control/paused                  nothing new is answered until `resume`
    control/approved/CHARTER-ID.json
                                    one run under one charter: the first digits of its SHA-256, and the SHA-256 of the
                                    run's name, which a peer chose
    control/withdrawn/all, SHA256   for good: from every charter, or from one
    control/restored.json           the state came from a backup and nobody has proved that nothing is missing (custody.py)
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from datetime import UTC, datetime
from pathlib import Path

from ..common.accounting import Budget, PrivacyEvent
from ..common.charter import Charter
from ..common.errors import Refusal, Refused
from ..common.identity import canonical, fingerprint, sha256, write_whole
from .settings import SiteSettings, window


class Control:
    """The folder through which commands talk to the daemon."""

    def __init__(self, folder: Path) -> None:
        self._paused = folder / "paused"
        self._approved = folder / "approved"
        self._withdrawn = folder / "withdrawn"
        self.restored = folder / "restored.json"

    def pause(self) -> None:
        """Answer nothing new until `resume`."""
        write_whole(self._paused, b"", mode=0o600)

    def resume(self) -> None:
        """Undo `pause`; fine when it is not paused."""
        self._paused.unlink(missing_ok=True)

    def paused(self) -> bool:
        """Whether `pause` holds."""
        return self._paused.exists()

    def withdraw(self, charter_sha256: str | None = None) -> None:
        """Leave one charter, or all that there are and ever will be. There is no way back but another state folder."""
        write_whole(self._withdrawn / (charter_sha256 or "all"), b"", mode=0o600)

    def withdrawn(self, charter_sha256: str) -> bool:
        """Whether this charter was left."""
        return any((self._withdrawn / name).exists() for name in ("all", charter_sha256))

    def approve(self, run_id: str, charter_sha256: str) -> None:
        """Allow one run under one charter: another coordinator may choose the same name."""
        body = {"run_id": run_id, "charter_sha256": charter_sha256}
        write_whole(self._place(run_id, charter_sha256), canonical(body), mode=0o600)

    def approved(self, run_id: str, charter_sha256: str) -> bool:
        """Whether exactly this run was approved."""
        try:
            found = json.loads(self._place(run_id, charter_sha256).read_bytes())
        except (FileNotFoundError, ValueError):
            return False
        return bool(found == {"run_id": run_id, "charter_sha256": charter_sha256})

    def _place(self, run_id: str, charter_sha256: str) -> Path:
        return self._approved / f"{charter_sha256[:16]}-{sha256(run_id.encode())}.json"


class SiteLaw:
    """Refuses with a typed reason; what it says depends on settings, clock and folder, never on records.

    Args:
        tasks: what data sets are registered for.
    """

    def __init__(self, site: SiteSettings, control: Control, tasks: Collection[str]) -> None:
        self._site = site
        self._control = control
        self._tasks = set(tasks) if site.tasks is None else set(tasks) & set(site.tasks)

    def agree(self, charter: Charter) -> None:
        """Return when this site may train under that charter at all.

        Raises:
            Refused: TASK, COORDINATOR, COHORT or UNPROTECTED.
        """
        site, name, key = self._site, charter.task.name, charter.coordinator.key
        if name not in self._tasks:
            raise Refused(
                Refusal.TASK, f"the charter's task is {name}", "Is it in site.tasks, and data registered for it?"
            )
        if site.coordinators is not None and not {key, fingerprint(key).replace(" ", "")} & set(site.coordinators):
            raise Refused(
                Refusal.COORDINATOR,
                f"the charter's coordinator has the key {fingerprint(key)}",
                "If it is theirs (compare by phone), add it to site.coordinators.",
            )
        if charter.quorum < site.minimum_cohort:
            raise Refused(
                Refusal.COHORT,
                f"the charter's quorum is {charter.quorum}, this site wants at least {site.minimum_cohort}",
                "Agree on a larger quorum in a new charter, or lower site.minimum_cohort.",
            )
        if charter.privacy.kind == "none" and not site.allow_unprotected:
            raise Refused(Refusal.UNPROTECTED, "this site does not allow training without privacy")

    def permit(self, charter_sha256: str, run_id: str) -> None:
        """Return when something of this run may be held or released from data right now.

        Raises:
            Refused: WITHDRAWN, RESTORED, PAUSED, HOURS or NOT_APPROVED.
        """
        control, site = self._control, self._site
        if control.withdrawn(charter_sha256):
            raise Refused(Refusal.WITHDRAWN, "this partner withdrew from the charter")
        if control.restored.exists():
            raise Refused(
                Refusal.RESTORED,
                "the budget is treated as exhausted",
                "Prove that nothing is missing: hansa node restore --prove CLOSING.json",
            )
        if control.paused():
            raise Refused(Refusal.PAUSED, "this node is paused", "Go on with: hansa node resume")
        if site.hours is not None and not _within(site.hours):
            raise Refused(Refusal.HOURS, f"this site trains {site.hours} UTC")
        if site.approval and not control.approved(run_id, charter_sha256):
            raise Refused(
                Refusal.NOT_APPROVED, "this site approves each run by hand", f"Approve it: hansa node approve {run_id}"
            )

    def afford(self, charter: Charter, events: Iterable[PrivacyEvent]) -> None:
        """Return when everything spent, held and asked stays within the site's own cap.

        Raises:
            Refused: BUDGET. Its words tell the cap, and of what others took only that the rest does not pay.
        """
        cap, delta = self._site.epsilon_cap, charter.privacy.delta
        if cap is None or delta is None:
            return
        if not Budget.create(cap, delta).admits(events):
            raise Refused(
                Refusal.BUDGET,
                f"what is left of this site's own cap does not pay for this run; "
                f"cap {cap:g} (delta {delta:g}, record level, filter)",
            )

    def withdrawn(self, charter_sha256: str) -> bool:
        """Whether this partner left that charter."""
        return self._control.withdrawn(charter_sha256)

    def distrust(self, length: int, signed: tuple[int, str]) -> bool:
        """From now on the state counts as restored from a backup: a head that this node signed says more than its ledger does.

        Args:
            length: of the ledger as it is.
            signed: length and root of that head.

        Returns:
            Whether this is new.
        """
        marker = self._control.restored
        if marker.exists():
            return False
        write_whole(marker, canonical({"length": length, "counted": list(signed)}), mode=0o600)
        return True

    def restored_at(self) -> int | None:
        """Length of the ledger when it was restored and nothing was proved; None where there is nothing to prove."""
        marker = self._control.restored
        return restored_length(marker) if marker.exists() else None


def restored_length(marker: Path) -> int:
    """Entries of the ledger when it was restored; a marker that is damaged stands for none, which nothing can prove."""
    try:
        return int(json.loads(marker.read_bytes())["length"])
    except (ValueError, KeyError, TypeError):
        return 0


def restored_counted(marker: Path) -> tuple[int, str]:
    """Length and root that the machine had counted before it was restored; (0, "") where it knew nothing."""
    try:
        length, root = json.loads(marker.read_bytes())["counted"]
        return int(length), str(root)
    except (ValueError, KeyError, TypeError):
        return 0, ""


def _within(hours: str) -> bool:
    now = datetime.now(UTC).time()
    start, end = window(hours)
    return start <= now < end if start < end else now >= start or now < end
