"""Backup and restore of a node: one file with its identity and state, and the rule that a restore is a rollback.

A backup is as old as it is. Whatever the node debited after it was taken is missing from the ledger in it, and a node that
went on from there would spend that budget twice. So `restore` marks the state, and the node's law refuses to hold, debit or
release anything (`Refusal.RESTORED`: the budget is treated as exhausted) until closing checkpoints that *peers* hold prove
that nothing is missing (docs/adr/0008-restore-is-a-rollback.md):

  1. every checkpoint that is given is signed by everyone in a charter of this node, and names this ledger at a length and
     head that it has: one that it has not shows that entries are lost;
  2. behind the newest of them, the ledger that was restored has nothing but refusals, accepted charters and repairs;
  3. no run was open in it;
  4. each charter under which it ever held a run is represented: every federation was asked;
  5. neither the models that this node kept, nor its counter, know of entries that are not there.

What that proves: when the newest of these runs was closed, this ledger was all there was, and nothing was spent in what was
restored since. What it does not prove: that no run was opened and debited after that checkpoint, of which the backup knows
nothing and the peers who were asked keep silent. Only the coordinator, and the other partners' ledgers, know of such a run:
ask them all. And it binds a steward who lost a disk, not one who edits files: an auditor sees those, where two signed entries
have the same number.

A checkpoint from after the restore proves nothing: the marker keeps where the ledger ended then, and before the node states
anything of its ledger again it records the restore in it, so every later statement is of a greater length.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ..common.charter import Charter, SignedCharter
from ..common.closing import CLOSING_TYPE, read_closing
from ..common.errors import DataError, IdentityError, LedgerError, MessageError, OutputError
from ..common.home import Home
from ..common.identity import (
    TEMPORARY,
    canonical,
    fsync_folder,
    make_folder,
    output_error,
    read_envelope,
    strict_json,
    write_whole,
)
from ..common.ledger import Counter, Entry, read_ledger
from .law import Control, restored_counted, restored_length
from .settings import NodeSettings
from .standing import SPENDS_NOTHING, Standing

_HOME = re.compile(
    r"identity\.key|identity\.json|tls\.key|tls\.key\.new|tls\.crt|ca\.crt|revoked\.crl|[a-z0-9-]+\.(csr|pem)"
)
"""Files of an identity; its folder may hold anything else."""
_PASSING = ("inbox", "counter", "datasets.lock", "masks")
"""What of a state folder is of this machine alone: the counter of a restored ledger is written anew, and a run's key for secure
aggregation, which would open what was masked, must be gone when the run is."""
_LEDGER = "state/ledger.jsonl"
_MARKER = "state/control/restored.json"


# -- backup --------------------------------------------------------------------------------------------------------------


def backup(settings: NodeSettings, to: Path) -> None:
    """Write identity and state into one tar file, mode 0600, whole or not at all. The node may be running.

    The ledger goes first, up to its last whole line, and the outbox after it: a reply is in the outbox before its commit is
    on the ledger, so every commit in the backup has its reply there, unless its run was closed meanwhile. The inbox is left
    out: the coordinator asks again. Neither the data nor node.yaml is in it. Whoever has this file and its passphrase (or
    the file, where keys have none) is this partner: keep it like the keys.

    Raises:
        IdentityError, LedgerError: there is nothing to keep yet.
        OutputError: it exists, or cannot be written.
    """
    Home(settings.home).name()
    if to.exists():
        raise OutputError(f"{to}: exists", "Give another name; a backup is never overwritten.")
    try:
        ledger = settings.ledger.read_bytes().rpartition(b"\n")[0] + b"\n"
    except OSError as err:
        raise LedgerError(
            f"{settings.ledger}: {err.strerror}", "Nothing was spent yet; back up after the first start."
        ) from err
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=to.absolute().parent, prefix=f"{TEMPORARY}{to.name}.")  # mode 0600
        with os.fdopen(handle, "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
            _add(tar, _LEDGER, io.BytesIO(ledger), len(ledger))
            for name, path in _files(settings):
                with contextlib.suppress(FileNotFoundError), path.open("rb") as source:  # a run was closed meanwhile
                    _add(tar, name, source, os.fstat(source.fileno()).st_size)
            tar.close()
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, to)
        fsync_folder(to.absolute().parent)
    except OSError as err:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        raise output_error(to, err) from err


def _files(settings: NodeSettings) -> Iterator[tuple[str, Path]]:
    for path in sorted(settings.home.iterdir()):
        if _HOME.fullmatch(path.name) and path.is_file():
            yield f"home/{path.name}", path
    for path in sorted(settings.state.rglob("*")):
        relative = path.relative_to(settings.state)
        passing = relative.parts[0] in _PASSING or any(part.startswith(TEMPORARY) for part in relative.parts)
        if path.is_file() and not path.is_symlink() and not passing and path != settings.ledger:
            yield f"state/{relative.as_posix()}", path


def _add(tar: tarfile.TarFile, name: str, source: BinaryIO, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o600
    tar.addfile(info, source)


# -- restore -------------------------------------------------------------------------------------------------------------


def restore(settings: NodeSettings, archive: Path, closings: Sequence[Path]) -> str | None:
    """Put a backup back, marked as a rollback; then prove by `closings`, if there are any, that it is none.

    Nothing in the folders is deleted: what a steward withdrew stays withdrawn.

    Returns:
        Why the budget is treated as exhausted; None when it is proved that nothing is missing.

    Raises:
        DataError: not a backup.
        IdentityError, LedgerError: of another partner or dataset; its ledger is damaged; or the folder has a longer or
            another ledger, or is in use.
        OutputError: it cannot be written.
    """
    charters = _charters(settings)
    try:
        make_folder(settings.state)
        make_folder(settings.home)
        with tempfile.TemporaryDirectory(dir=settings.state, prefix=TEMPORARY) as temporary, _unused(settings.ledger):
            staged = Path(temporary)
            names = _unpack(archive, staged)
            entries = _fitting(settings, staged, archive)
            markers = [m for m in (staged / _MARKER, Control(settings.control).restored) if m.exists()]
            # A backup of a state that was never proved is no better than what was restored then.
            length = min([len(entries), *(restored_length(marker) for marker in markers)])
            counted = max([_here(settings), *(restored_counted(marker) for marker in markers)])
            said = {"length": length, "counted": list(counted)}
            write_whole(Control(settings.control).restored, canonical(said), mode=0o600)
            for name in [*sorted(names - {_MARKER, _LEDGER}), _LEDGER]:
                if not _is_newer_here(staged / name, settings, name):
                    _place(staged / name, settings, PurePosixPath(name))
            # It counts from what was restored: that this may be too little is what the marker says.
            Counter(settings.counter).renew(entries)
    except OSError as err:
        raise output_error(settings.state, err) from err
    return _settle(settings, charters, closings)


def prove(settings: NodeSettings, closings: Sequence[Path]) -> str | None:
    """Prove by checkpoints that peers hold that an earlier restore lost nothing. The node may be running.

    Returns:
        Why the budget stays exhausted; None when it is proved, and when there was nothing to prove.

    Raises:
        CharterError, LedgerError, MessageError: charters, ledger or checkpoints that are no good.
    """
    return _settle(settings, _charters(settings), closings)


def _settle(settings: NodeSettings, charters: Mapping[str, Charter], closings: Sequence[Path]) -> str | None:
    marker = Control(settings.control).restored
    if not marker.exists():
        return None
    home = Home(settings.home)
    entries, _ = read_ledger(settings.ledger, home.key())
    given = [_statement(path, charters, home.name()) for path in closings]
    kept = []
    for path in sorted(settings.models.glob("*/closing.json")):
        with contextlib.suppress(MessageError):  # of a charter that node.yaml no longer lists: it cannot be read
            kept.append(_statement(path, charters, home.name()))
    doubt = doubts(entries, restored_length(marker), given, kept, restored_counted(marker))
    if doubt is None:
        marker.unlink()
        fsync_folder(marker.parent)
    return doubt


Statement = tuple[str, int, str]
"""What a closing checkpoint says of one ledger: under which charter, its length, its head."""


def doubts(
    entries: Sequence[Entry],
    at: int,
    given: Sequence[Statement],
    kept: Sequence[Statement] = (),
    counted: tuple[int, str] = (0, ""),
) -> str | None:
    """Why the first `at` entries, as they were restored, may not be all; None when they are, by the rules above.

    Args:
        entries: the ledger as it is now.
        given: from peers.
        kept: this node's own; they can only speak against it.
        counted: length and root that this machine counted before the restore; they can only speak against it, too.
    """
    if at > len(entries):
        return "the restore was not finished: restore the same backup again"
    length, head = counted
    if length and not (length <= len(entries) and entries[length - 1].root == head):
        return (
            f"this machine had counted {length} entries, and these are not they: entries are lost; restore the backup that has "
            "them, into another state folder"
        )
    for _, length, head in (*given, *kept):
        if not (1 <= length <= len(entries) and entries[length - 1].root == head):
            return (
                f"everyone signed for a head of this ledger at {length} entries that it does not have: entries are lost; "
                "restore the backup that has it"
            )
    before = [(length, charter) for charter, length, _ in given if length <= at]
    if not before:
        return "no closing checkpoint from before the restore was given"
    newest, restored = max(before)[0], Standing(entries[:at])
    if any(entry.type not in SPENDS_NOTHING for entry in entries[newest:at]):
        return f"the newest checkpoint covers {newest} of {at} entries, and something was held or spent behind it"
    if open_runs := [hold.run_id for hold in restored.holds.values() if hold.open]:
        return f"run {open_runs[-1]} was open when the backup was taken: what it spent since is unknown"
    unheard = {hold.charter_sha256 for hold in restored.holds.values()} - {charter for _, charter in before}
    if unheard:
        names = ", ".join(sorted(restored.charters[sha][0] for sha in unheard))
        return f"no checkpoint of {names} was given, under which runs were held as well"
    return None


def _statement(path: Path, charters: Mapping[str, Charter], owner: str) -> Statement:
    try:
        sealed = path.read_bytes()
        said = strict_json(read_envelope(sealed.removesuffix(b"\n"), CLOSING_TYPE).payload)
        sha = said.get("charter_sha256") if isinstance(said, dict) else None
        if not isinstance(sha, str) or sha not in charters:
            raise MessageError("a closing checkpoint under a charter that node.yaml does not list")
        body = read_closing(sealed, charters[sha].keys(), sha)
    except OSError as err:
        raise MessageError(f"{path}: {err.strerror}", "Give the closing/RUN.json files of your peers.") from err
    except MessageError as err:
        raise MessageError(f"{path}: {err.message}", "Give the closing/RUN.json files of your peers.") from err
    mine = next((item for item in body["ledgers"] if item["owner"] == owner), None)
    if mine is None or type(mine["length"]) is not int:
        raise MessageError(f"{path}: says nothing of {owner}'s ledger")
    return sha, mine["length"], str(mine["root"])


def _charters(settings: NodeSettings) -> dict[str, Charter]:
    found = [SignedCharter.load(entry.charter) for entry in settings.federations]
    return {signed.sha256: signed.verify() for signed in found}


# -- unpacking -----------------------------------------------------------------------------------------------------------


def _unpack(archive: Path, to: Path) -> set[str]:
    """Copy the members into `to`, as new files of ours with mode 0600; their names.

    Nothing but the bytes of plain files is taken from the archive, and a name that a backup does not write is refused, so
    links, devices, absolute paths and `..` never reach the disk (which is stricter than tarfile's own data filter).
    """
    names: set[str] = set()
    try:
        with tarfile.open(archive, mode="r:") as tar:
            for member in tar:
                plain = member.isreg() and not member.issparse()  # holes would make of a few bytes as many as one likes
                if not (plain and _expected(member.name)) or member.name in names:
                    raise DataError(f"{archive}: holds {member.name[:100]!r}, which no backup does", _NOT_OURS)
                source = tar.extractfile(member)
                assert source is not None
                place = to / member.name
                place.parent.mkdir(parents=True, exist_ok=True)
                with os.fdopen(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                    shutil.copyfileobj(source, file)
                    file.flush()
                    os.fsync(file.fileno())
                names.add(member.name)
    except (tarfile.TarError, ValueError, MemoryError) as err:  # the last two: of sizes that no file can have
        raise DataError(f"{archive}: not a backup, or cut off: {err}", _NOT_OURS) from err
    except FileNotFoundError as err:
        raise DataError(f"{archive}: {err.strerror}", _NOT_OURS) from err
    return names


_NOT_OURS = "Give a file that `hansa node backup` wrote. Nothing was restored."


def _expected(name: str) -> bool:
    folder, *rest = name.split("/")
    whole = bool(rest) and all(part not in ("", ".", "..") and "\0" not in part for part in rest)
    if folder == "home":
        return whole and len(rest) == 1 and _HOME.fullmatch(rest[0]) is not None
    return whole and folder == "state" and rest[0] not in _PASSING


def _fitting(settings: NodeSettings, staged: Path, archive: Path) -> list[Entry]:
    """The backup's ledger, if the backup is whole and may go where it shall."""
    kept = Home(staged / "home")
    try:
        name, key = kept.name(), kept.key()
        entries, torn = read_ledger(staged / _LEDGER, key)
    except (IdentityError, LedgerError) as err:
        raise DataError(f"{archive}: not a whole backup: {err.message}", _NOT_OURS) from err
    if torn or not entries or entries[0].body.get("owner") != name:
        raise DataError(f"{archive}: its ledger is not whole, or not {name}'s", _NOT_OURS)
    here = Home(settings.home)
    if (settings.home / "identity.json").exists() and here.key() != key:
        raise IdentityError(f"{settings.home}: holds another identity than the backup of {name}", "Give another home.")
    theirs = {path.parent.name: _dataset(path) for path in (staged / "state" / "datasets").glob("*/dataset.json")}
    recorded = {entry.body["dataset"] for entry in entries if entry.type == "dataset"}
    if not recorded <= set(theirs.values()):
        raise DataError(f"{archive}: not a whole backup: a registration is missing", _NOT_OURS)
    for path in (settings.state / "datasets").glob("*/dataset.json"):
        if theirs.get(path.parent.name, _dataset(path)) != _dataset(path):
            raise LedgerError(
                f"{path.parent}: another data set is registered there", "Restore into another state folder."
            )
    if settings.ledger.exists():
        there, _ = read_ledger(settings.ledger, key)
        if len(there) > len(entries):
            raise LedgerError(
                f"{settings.ledger}: is longer ({len(there)} entries) than the backup's ({len(entries)})",
                "It knows more of what was spent: keep it. To lose only the rest, restore into another state folder.",
            )
        if there and there[-1].root != entries[len(there) - 1].root:
            raise LedgerError(
                f"{settings.ledger}: is another ledger than the backup's, not an earlier part of it",
                "Both were signed: show them to an auditor, and restore into another state folder.",
            )
    return entries


def _dataset(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())["dataset_id"]
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise DataError(f"{path}: not a registration that can be read", "Restore another backup.") from err


def _here(settings: NodeSettings) -> tuple[int, str]:
    """What this machine counted of its ledger; nothing where the counter is lost as well."""
    return Counter(settings.counter).counted() or (0, "")


def _is_newer_here(staged: Path, settings: NodeSettings, name: str) -> bool:
    """Whether this folder has more of a file to which is only ever added, heads that were countersigned."""
    parts = PurePosixPath(name).parts
    here = settings.state.joinpath(*parts[1:])
    return parts[:2] == ("state", "heads") and here.exists() and here.stat().st_size >= staged.stat().st_size


def _place(staged: Path, settings: NodeSettings, name: PurePosixPath) -> None:
    target = (settings.home if name.parts[0] == "home" else settings.state).joinpath(*name.parts[1:])
    if name.parts[0] == "home":  # may be on another disk
        write_whole(target, staged.read_bytes(), mode=0o600)
        return
    make_folder(target.parent)
    os.replace(staged, target)
    fsync_folder(target.parent)


@contextlib.contextmanager
def _unused(ledger: Path) -> Iterator[None]:
    """Hold the lock on a ledger, if there is one: no node runs on it meanwhile."""
    if not ledger.exists():
        yield
        return
    with ledger.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            raise LedgerError(f"{ledger}: a node is running on it", "Stop it first.") from err
        yield
