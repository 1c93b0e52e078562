"""Finished replies on the node's disk: what leaves is what was committed, however often it is asked for."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..common.errors import MessageError
from ..common.flower import RecordDict
from ..common.identity import sha256, write_whole
from ..common.messages import from_bytes, to_bytes


class Outbox:
    """One file a reply, under the folder of its run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, run_id: str, request_id: str, reply: RecordDict) -> None:
        """Store a reply; returns when it is on disk.

        Raises:
            OutputError: it could not be written.
        """
        write_whole(self._path(run_id, request_id), to_bytes(reply), mode=0o600)

    def get(self, run_id: str, request_id: str) -> RecordDict:
        """The stored reply.

        Raises:
            MessageError: it is no longer there (its run was closed) or damaged.
        """
        try:
            return from_bytes(self._path(run_id, request_id).read_bytes())
        except OSError as err:
            raise MessageError(f"the reply to {request_id} is no longer in the outbox") from err

    def drop(self, run_id: str) -> None:
        """Forget a closed run's replies."""
        shutil.rmtree(self._path(run_id, "").parent, ignore_errors=True)

    def _path(self, run_id: str, request_id: str) -> Path:
        # Identifiers come from a peer: hash them rather than trust them as file names.
        return self._folder / sha256(run_id.encode())[:32] / sha256(request_id.encode())[:32]
