"""The private halves of secure aggregation's keys: one file a run, from its acceptance to its end."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..common.errors import OutputError, Refusal, Refused
from ..common.identity import output_error, sha256, write_whole
from ..common.secagg import KEY, new_key


class RunKeys:
    """One file a run, readable by its owner only. A key is of one charter and run, and is never shared or sent."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def make(self, charter_sha256: str, run_id: str) -> bytes:
        """The run's key: the one that is there, or a new one, which is then on disk.

        Raises:
            OutputError: it cannot be written or read.
        """
        path = self._path(charter_sha256, run_id)
        if not path.exists():
            write_whole(path, new_key(), mode=0o600)
        return self._read(path)

    def get(self, charter_sha256: str, run_id: str) -> bytes:
        """The run's key.

        Raises:
            Refused: there is none: the run is not open here, or was opened before a restore; or it is damaged.
        """
        path = self._path(charter_sha256, run_id)
        if not path.exists():
            raise Refused(Refusal.NOT_HELD, "this node has no key for secure aggregation in this run")
        return self._read(path)

    def keep_only(self, runs: Iterable[tuple[str, str]]) -> None:
        """Forget the keys of all runs but these (charter, run).

        Raises:
            OutputError: one cannot be deleted.
        """
        wanted = {self._path(charter, run) for charter, run in runs}
        for path in self._folder.glob("*"):
            if path not in wanted:
                try:
                    path.unlink(missing_ok=True)
                except OSError as err:
                    raise output_error(path, err) from err

    @staticmethod
    def _read(path: Path) -> bytes:
        try:
            found = path.read_bytes()
        except OSError as err:
            raise OutputError(f"{path}: {err.strerror}", "Close this run, and begin another.") from err
        if len(found) != KEY:
            raise Refused(Refusal.NOT_HELD, "this node's key for secure aggregation in this run is damaged")
        return found

    def _path(self, charter_sha256: str, run_id: str) -> Path:
        # A peer chose the run's name: hash it rather than trust it as a file's.
        return self._folder / sha256(f"{charter_sha256} {run_id}".encode())[:32]
