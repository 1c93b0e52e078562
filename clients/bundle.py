"""A partner's part of a bundle for an auditor: its own ledger and its public key."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ..common.charter import SignedCharter
from ..common.errors import LedgerError, OutputError
from ..common.home import Home
from ..common.identity import public_pem, write_whole
from .settings import NodeSettings


def export(settings: NodeSettings, to: Path) -> list[str]:
    """Write ledger and key into a bundle's folder, whoever else wrote into it before. The node may be running.

    Returns:
        The paths in the bundle that were written.

    Raises:
        IdentityError, LedgerError: there is nothing to export.
        OutputError: the folder holds another federation's bundle, or a ledger of this name that is not an earlier part of
            this one; or it cannot be written.
    """
    home = Home(settings.home)
    name, pem = home.name(), public_pem(home.key())
    try:
        # Whole lines only: what stands behind the last one was never acknowledged.
        ledger = settings.ledger.read_bytes().rpartition(b"\n")[0] + b"\n"
    except OSError as err:
        raise LedgerError(f"{settings.ledger}: {err.strerror}", "Its node makes it when it first starts.") from err
    _refuse_another(to, {SignedCharter.load(entry.charter).sha256 for entry in settings.federations})
    files = {f"partners/{name}/ledger.jsonl": ledger, f"keys/{name}.pem": pem}
    for path, data in files.items():
        if (to / path).exists() and not data.startswith((to / path).read_bytes()):
            raise OutputError(f"{to / path}: is not an earlier part of what would be written", "Give another --out.")
    for path, data in files.items():
        write_whole(to / path, data)
    return list(files)


def _refuse_another(to: Path, charters: Collection[str]) -> None:
    there = to / "charter.json"
    if there.exists() and SignedCharter.load(there).sha256 not in charters:
        raise OutputError(f"{to}: holds the bundle of a charter that this node does not serve", "Give another --out.")
