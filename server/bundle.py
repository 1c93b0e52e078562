"""Which runs a coordinator's ledger knows, and the coordinator's part of an auditor's bundle."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..common.charter import SignedCharter
from ..common.errors import OutputError
from ..common.identity import public_pem, sha256, write_whole
from ..common.ledger import Entry, read_ledger, redacted
from .settings import ServerSettings


@dataclass(frozen=True)
class Run:
    """A run as the ledger has it; `why` and `model_sha256` are None until it is closed."""

    run_id: str
    why: str | None = None
    model_sha256: str | None = None


def runs_of(entries: Iterable[Entry], charter_sha256: str) -> list[Run]:
    """The runs under one charter, in the order in which they began."""
    found: dict[str, Run] = {}
    for entry in entries:
        body = entry.body
        if entry.charter != charter_sha256:
            continue
        if entry.type == "run":
            found.setdefault(body["run_id"], Run(body["run_id"]))
        elif entry.type == "close" and body["run_id"] in found:
            found[body["run_id"]] = Run(body["run_id"], body["why"], body["model_sha256"])
    return list(found.values())


def is_finished(run: Run, settings: ServerSettings) -> bool:
    """Closed, countersigned by everyone, and its model written."""
    closed = (settings.closing / f"{run.run_id}.json").exists()
    return closed and (run.model_sha256 is None or settings.model(run.run_id).exists())


def export(settings: ServerSettings, to: Path) -> list[str]:
    """Write charter, public keys, own ledger, closing checkpoints and the newest completed run's model into a bundle.

    Partners add their own part to the same folder, before or after.

    Returns:
        The paths in the bundle that were written.

    Raises:
        CharterError, LedgerError: there is nothing good to export.
        OutputError: the folder holds another charter's bundle, a run is not closed, or something cannot be written.
    """
    signed = SignedCharter.load(settings.charter)
    charter = signed.verify()
    entries, _ = read_ledger(settings.ledger, charter.coordinator.key)
    runs = runs_of(entries, signed.sha256)
    if unfinished := [run.run_id for run in runs if run.why is not None and not is_finished(run, settings)]:
        raise OutputError(
            f"run {unfinished[-1]} is closed here, but not countersigned by everyone: no auditor could verify this bundle",
            f"Finish it: hansa server run --run {unfinished[-1]} --resume",
        )
    if not runs:
        raise OutputError(f"{settings.ledger}: no run yet under this charter", "Start one: hansa server run")
    files = {"charter.json": signed.to_bytes()}
    files |= {f"keys/{name}.pem": public_pem(key) for name, key in charter.keys().items()}
    done_runs = [run for run in runs if run.why is not None]
    files |= {f"closing/{run.run_id}.json": _read(settings.closing / f"{run.run_id}.json") for run in done_runs}
    # Of other charters' entries no more than an auditor of this one needs: that they are there.
    files["coordinator/ledger.jsonl"] = redacted(
        _read(settings.ledger), lambda entry: entry.charter in (None, signed.sha256), charter.coordinator.key
    )
    if (kept := settings.heads(signed.sha256)).exists():
        files[f"heads/{charter.coordinator.name}.jsonl"] = _whole_lines(_read(kept))
    if done := [run for run in runs if run.why == "completed"]:
        files["model.safetensors"] = _model(settings.model(done[-1].run_id), done[-1])
    _refuse_another(to, signed)
    for name, data in files.items():
        write_whole(to / name, data)
    return list(files)


def _whole_lines(data: bytes) -> bytes:
    """What stands behind the last line break was never acknowledged."""
    return data[: data.rfind(b"\n") + 1]


def _refuse_another(to: Path, signed: SignedCharter) -> None:
    there = to / "charter.json"
    if there.exists() and there.read_bytes() != signed.to_bytes():
        raise OutputError(f"{to}: holds the bundle of another charter", "Give another --out.")


def _model(path: Path, run: Run) -> bytes:
    data = _read(path)
    if sha256(data) != run.model_sha256:
        raise OutputError(
            f"{path}: not the model that run {run.run_id} ended with",
            f"Write it again: hansa server run --run {run.run_id} --resume",
        )
    return data


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as err:
        raise OutputError(f"{path}: {err.strerror}", "Restore it from a backup.") from err
