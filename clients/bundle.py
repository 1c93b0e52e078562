"""A partner's part of a bundle for an auditor of one charter: its own ledger and key, and what it keeps of everyone's.

Of what this node did under other charters the bundle has what it did to a budget, and not whose it was (docs/ledger-format.md,
Disclosure).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..common.charter import SignedCharter
from ..common.closing import read_closing
from ..common.errors import ConfigError, LedgerError, MessageError, OutputError
from ..common.home import Home
from ..common.identity import public_pem, write_whole
from ..common.ledger import Entry, read_ledger, redacted
from .models import CLOSING, charter_of
from .settings import NodeSettings


def export(settings: NodeSettings, to: Path, charter: Path | None = None) -> list[str]:
    """Write ledger, key, countersigned heads and closing checkpoints into a bundle's folder, whoever else wrote into it before.

    The node may be running.

    Args:
        charter: for an auditor of which one; None: the bundle's, or the only one that the node serves.

    Returns:
        The paths in the bundle that were written.

    Raises:
        ConfigError: which charter is meant is not said.
        CharterError, IdentityError, LedgerError: there is nothing to export.
        OutputError: the folder holds another charter's bundle, a ledger of this name that is not an earlier part of this one, or
            another closing checkpoint of a run; or it cannot be written.
    """
    home = Home(settings.home)
    name, key = home.name(), home.key()
    signed = _charter(settings, to, charter)
    try:
        # Whole lines only: what stands behind the last one was never acknowledged.
        lines = settings.ledger.read_bytes().rpartition(b"\n")[0] + b"\n"
    except OSError as err:
        raise LedgerError(f"{settings.ledger}: {err.strerror}", "Its node makes it when it first starts.") from err
    entries, _ = read_ledger(settings.ledger, key)
    used = _used(entries, signed.sha256)

    def disclose(entry: Entry) -> bool:
        if entry.type == "dataset":
            return entry.body["dataset"] in used
        return entry.charter in (None, signed.sha256)

    try:
        ledger = redacted(lines, disclose, key)
    except MessageError as err:
        raise LedgerError(f"{settings.ledger}: {err.message}", "See: hansa node check") from err
    place = f"partners/{name}/ledger.jsonl"
    _refuse_other_ledger(to / place, entries, key)
    files = {place: ledger, f"keys/{name}.pem": public_pem(key)}
    kept = settings.heads / f"{signed.sha256}.jsonl"
    heads = kept.read_bytes() if kept.exists() else b""
    if heads := heads[: heads.rfind(b"\n") + 1]:
        files[f"heads/{name}.jsonl"] = heads
        _refuse_longer(to / f"heads/{name}.jsonl", heads)
    for path, sealed in _closings(settings, signed):
        if (to / path).exists() and (to / path).read_bytes() != sealed:
            raise OutputError(
                f"{to / path}: is another closing checkpoint than the one that this node keeps",
                "Everyone signed one of a run: show both to an auditor. Give another --out.",
            )
        files[path] = sealed
    for path, data in files.items():
        write_whole(to / path, data)
    return list(files)


def _charter(settings: NodeSettings, to: Path, charter: Path | None) -> SignedCharter:
    listed = {signed.sha256: signed for signed in (SignedCharter.load(e.charter) for e in settings.federations)}
    there = SignedCharter.load(to / "charter.json") if (to / "charter.json").exists() else None
    if there is not None and there.sha256 not in listed:
        raise OutputError(f"{to}: holds the bundle of a charter that this node does not serve", "Give another --out.")
    if charter is not None:
        signed = SignedCharter.load(charter)
        if signed.sha256 not in listed:
            raise ConfigError(
                f"{charter}: not a charter that node.yaml lists", "Give one of its files, or list it there."
            )
        if there is not None and there.sha256 != signed.sha256:
            raise OutputError(f"{to}: holds the bundle of another charter", "Give another --out.")
        return signed
    if there is not None:
        return there
    if len(listed) > 1:
        raise ConfigError("node.yaml lists several charters", "Say for whose auditor this is: --charter FILE")
    (only,) = listed.values()
    return only


def _used(entries: Sequence[Entry], charter_sha256: str) -> set[str]:
    """The data sets that runs under one charter were held on, what those are versions of or overlap with, and what opened their
    lineages. Others in the same lineage are other charters' business: for which task, and since when.
    """
    about = {entry.body["dataset"]: entry.body for entry in entries if entry.type == "dataset"}
    wanted = [e.body["dataset"] for e in entries if e.type in ("hold", "debit") and e.charter == charter_sha256]
    lineages = {about[one]["lineage"] for one in wanted}
    wanted += [n for n, b in about.items() if b["lineage"] in lineages and b["declared"]["of"] is None]
    used: set[str] = set()
    while wanted:
        one = wanted.pop()
        if one is not None and one not in used:
            used.add(one)
            wanted.append(about[one]["declared"]["of"])
    return used


def _closings(settings: NodeSettings, signed: SignedCharter) -> list[tuple[str, bytes]]:
    """The closing checkpoints that this node keeps of the charter's runs; each was verified when it came, and is again."""
    found = []
    for path in sorted(settings.models.glob(f"*/{CLOSING}")):
        if charter_of(path) == signed.sha256:
            sealed = path.read_bytes()
            try:
                body = read_closing(sealed, signed.charter.keys(), signed.sha256)
            except MessageError as err:
                raise OutputError(
                    f"{path}: {err.message}",
                    "It was edited or damaged: have the coordinator deliver it again (--resume).",
                ) from err
            found.append((f"closing/{body['run_id']}.json", sealed))
    return found


def _refuse_other_ledger(path: Path, entries: list[Entry], key: str) -> None:
    """Raise unless what is there is an earlier part of this ledger, whatever of it is disclosed."""
    if not path.exists():
        return
    try:
        there, torn = read_ledger(path, key)
    except LedgerError as err:
        raise OutputError(
            f"{path}: is not an earlier part of what would be written: {err.message}", "Give another --out."
        ) from err
    if torn or [entry.leaf for entry in there] != [entry.leaf for entry in entries[: len(there)]]:
        raise OutputError(f"{path}: is not an earlier part of what would be written", "Give another --out.")


def _refuse_longer(path: Path, data: bytes) -> None:
    if path.exists() and not data.startswith(path.read_bytes()):
        raise OutputError(f"{path}: is not an earlier part of what would be written", "Give another --out.")
