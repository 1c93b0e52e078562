"""An append-only, hash-chained, signed log: tamper-evident, and durable before anything that it records happens.

The format is docs/ledger-format.md. One process writes at a time (an exclusive lock on the file). `append` returns after
fsync, so an entry that was acknowledged survives a crash; a torn last line was never acknowledged and is cut off, and the
cut itself recorded, when the ledger is next opened for writing.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .errors import LedgerError, MessageError, OutputError
from .identity import (
    Identity,
    canonical,
    fingerprint,
    fsync_folder,
    output_error,
    read_envelope,
    sha256,
    strict_json,
)

ENTRY_TYPE = "application/vnd.hansa.entry+json"
GENESIS_PREV = "0" * 64


@dataclass(frozen=True)
class Entry:
    """One verified line."""

    seq: int
    time: str
    type: str
    body: Mapping[str, Any]
    sha256: str


def read_ledger(path: Path, key: str | None = None) -> tuple[list[Entry], bytes]:
    """Read and verify a whole ledger: layout, signature, sequence, chain.

    Args:
        key: whose signature each line must bear (hex); None takes the key that the genesis entry names.

    Returns:
        The entries, and the bytes of a torn last line (empty when there is none).

    Raises:
        LedgerError: with file and line of the first thing that is wrong.
    """
    try:
        data = path.read_bytes()
    except OSError as err:
        raise LedgerError(f"{path}: {err.strerror}", "Give the path of a ledger.jsonl.") from err
    *lines, torn = data.split(b"\n")
    entries: list[Entry] = []
    prev = GENESIS_PREV
    for number, line in enumerate(lines, start=1):
        try:
            if key is None:
                key = _genesis_key(line)
            entry = _parse(line, number - 1, prev, key)
        except MessageError as err:
            raise LedgerError(
                f"{path}:{number}: {err.message}",
                "This ledger was edited or damaged. Compare it with another copy or its countersigned head.",
            ) from err
        entries.append(entry)
        prev = entry.sha256
    return entries, torn


class Ledger:
    """A ledger open for writing.

    Attributes:
        entries: every verified entry so far.
        recovered: the number of bytes of a torn last line that was cut off on opening; 0 when there was none.
    """

    def __init__(self, path: Path, identity: Identity, genesis: Mapping[str, Any]) -> None:
        """Open `path`, or create it with a genesis entry.

        Raises:
            LedgerError: another process writes it, it belongs to another key, or it does not verify.
            OutputError: it cannot be written.
        """
        self._path = path
        self._identity = identity
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            new = not path.exists()
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115  held open: the lock lives with it
            if new:
                fsync_folder(path.parent)
        except OSError as err:
            raise output_error(path, err) from err
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            self._file.close()
            raise LedgerError(
                f"{path}: another process is writing this ledger",
                "Wait for it to finish, or stop it; two writers would fork the ledger.",
            ) from err
        try:
            self.entries, torn = read_ledger(path, identity.key)
            self._size = path.stat().st_size - len(torn)
            self.recovered = len(torn)
            if torn:
                self._truncate()
            if not self.entries:
                self.append("genesis", {**genesis, "key": identity.key})
            if torn:
                self.append("recovered", {"torn_bytes": len(torn), "torn_sha256": sha256(torn)})
        except BaseException:
            self._file.close()
            raise

    @property
    def length(self) -> int:
        """Number of entries."""
        return len(self.entries)

    @property
    def head(self) -> str:
        """Hash of the last entry."""
        return self.entries[-1].sha256 if self.entries else GENESIS_PREV

    def append(self, kind: str, body: Mapping[str, Any]) -> Entry:
        """Write one entry and return when it is on disk.

        Raises:
            OutputError: it could not be written; the ledger is as it was before.
        """
        time = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        seq = self.length
        payload = canonical({"v": 1, "seq": seq, "prev": self.head, "time": time, "type": kind, "body": body})
        line = self._identity.seal(ENTRY_TYPE, payload)
        if self._file.closed:
            raise LedgerError(f"{self._path}: is closed, or could not be written before", "Open it again.")
        try:
            view = memoryview(line + b"\n")
            while view:  # an unbuffered write may be short (a signal, a nearly full disk)
                view = view[self._file.write(view) :]
            os.fsync(self._file.fileno())
        except OSError as err:
            try:
                self._truncate()
            except OutputError:
                self.close()  # the file may end in half an entry: nothing may be written behind it
            raise output_error(self._path, err) from err
        self._size += len(line) + 1
        entry = Entry(seq, time, kind, strict_json(payload)["body"], sha256(line))
        self.entries.append(entry)
        return entry

    def of(self, *kinds: str) -> list[Entry]:
        """The entries of these types, in order."""
        return [entry for entry in self.entries if entry.type in kinds]

    def close(self) -> None:
        """Let go of the lock."""
        self._file.close()

    def _truncate(self) -> None:
        """Cut the file back to its last acknowledged entry."""
        try:
            os.ftruncate(self._file.fileno(), self._size)
            os.fsync(self._file.fileno())
        except OSError as err:
            raise output_error(self._path, err) from err


def _genesis_key(line: bytes) -> str:
    body = strict_json(read_envelope(line, ENTRY_TYPE).payload)
    try:
        return str(body["body"]["key"])
    except (KeyError, TypeError) as err:
        raise MessageError("the first entry names no key") from err


def _parse(line: bytes, seq: int, prev: str, key: str) -> Entry:
    envelope = read_envelope(line, ENTRY_TYPE)
    if len(envelope.signatures) != 1:
        raise MessageError("an entry has exactly one signature")
    envelope.signed_by(key)
    payload = strict_json(envelope.payload)
    if not isinstance(payload, dict) or set(payload) != {"v", "seq", "prev", "time", "type", "body"}:
        raise MessageError("an entry with other fields than v, seq, prev, time, type, body")
    if type(payload["v"]) is not int or payload["v"] != 1:
        raise MessageError(f"an entry of an unknown version ({payload['v']!r})")
    if not (isinstance(payload["body"], dict) and all(isinstance(payload[k], str) for k in ("type", "time"))):
        raise MessageError("an entry with fields of the wrong type")
    if type(payload["seq"]) is not int or payload["seq"] != seq:
        raise MessageError(f"sequence number {payload['seq']!r}, wanted {seq}: entries are missing or out of order")
    if payload["prev"] != prev:
        raise MessageError("does not follow the line above it: entries were edited, dropped or reordered")
    if canonical(payload) != envelope.payload:
        raise MessageError("a payload in an unusual layout")
    return Entry(seq, payload["time"], payload["type"], payload["body"], sha256(line))


def owner_line(entry: Entry) -> str:
    """Whose ledger this is, in words, from its genesis entry."""
    return f"{entry.body.get('owner')} ({entry.body.get('role')}), key {fingerprint(str(entry.body.get('key')))}"
