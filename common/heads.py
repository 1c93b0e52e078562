"""Signed heads and their witnesses (docs/ledger-format.md): what shows a rollback or a fork to who holds one copy.

A ledger's owner signs where it stands; others sign the same bytes when that extends what they signed before, and keep them. Pure
functions, and one file of kept heads.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import LedgerError, MessageError
from .identity import (
    Envelope,
    Identity,
    canonical,
    fsync_folder,
    output_error,
    read_envelope,
    sha256,
    strict_json,
    write_envelope,
)
from .ledger import Ledger
from .merkle import verify_consistency

HEAD_TYPE = "application/vnd.hansa.head+json"
MAX_PROOF = 128
"""Hashes in a consistency proof; one of 2^60 entries has fewer."""


@dataclass(frozen=True)
class Head:
    """Where a ledger stood, signed by its owner and perhaps by witnesses.

    Attributes:
        sealed: the envelope's bytes, without a line break.
        signers: public keys, the owner's first.
    """

    owner: str
    ledger_id: str
    length: int
    root: str
    sealed: bytes
    signers: tuple[str, ...]

    def countersigned(self, identity: Identity) -> Head:
        """With one signature more; nothing changes where it has it already."""
        if identity.key in self.signers:
            return self
        envelope = read_envelope(self.sealed, HEAD_TYPE)
        return self.with_signature(identity.key, identity.sign(HEAD_TYPE, envelope.payload))

    def with_signature(self, key: str, signature: bytes) -> Head:
        """With a signature that somebody else made.

        Raises:
            MessageError: it is bad.
        """
        if key in self.signers:
            return self
        envelope = read_envelope(self.sealed, HEAD_TYPE)
        made = Envelope(HEAD_TYPE, envelope.payload, (*envelope.signatures, (key, signature)))
        made.signed_by(key)
        return Head(self.owner, self.ledger_id, self.length, self.root, write_envelope(made), (*self.signers, key))

    def signature(self, key: str) -> bytes:
        """The signature of one of its signers."""
        return dict(read_envelope(self.sealed, HEAD_TYPE).signatures)[key]

    def extends(self, earlier: Head, proof: Sequence[str]) -> None:
        """Return when this ledger extends what `earlier` states of it.

        Raises:
            LedgerError: it does not, or this is not shown: rolled back, forked, or another ledger.
            MessageError: a malformed proof.
        """
        if (self.owner, self.ledger_id) != (earlier.owner, earlier.ledger_id):
            raise LedgerError(f"{self.owner} began another ledger")
        try:
            path = [bytes.fromhex(step) for step in proof]
            first, second = bytes.fromhex(earlier.root), bytes.fromhex(self.root)
        except (TypeError, ValueError) as err:
            raise MessageError("a malformed consistency proof") from err
        if len(path) > MAX_PROOF:
            raise MessageError("a consistency proof that is too long")
        verify_consistency(earlier.length, first, self.length, second, path)


def sign_head(identity: Identity, ledger: Ledger) -> Head:
    """The head of a ledger as it is now, signed by its owner."""
    ledger_id, head = str(ledger.entries[0].body["ledger_id"]), ledger.head()
    payload = canonical({"v": 1, "owner": identity.name, "ledger_id": ledger_id, **head})
    sealed = identity.seal(HEAD_TYPE, payload)
    return Head(identity.name, ledger_id, head["length"], head["root"], sealed, (identity.key,))


def read_head(sealed: bytes, keys: Mapping[str, str]) -> Head:
    """A signed head, if its owner stands among `keys` (name -> public key), and everyone who signed it does too.

    Raises:
        MessageError: malformed, a bad signature, or a stranger's.
    """
    envelope = read_envelope(sealed, HEAD_TYPE)
    body = strict_json(envelope.payload)
    if not isinstance(body, dict) or set(body) != {"v", "owner", "ledger_id", "length", "root"}:
        raise MessageError("a malformed head")
    owner, ledger_id, length, root = body["owner"], body["ledger_id"], body["length"], body["root"]
    if type(body["v"]) is not int or body["v"] != 1 or type(length) is not int or length < 1:
        raise MessageError("a head of an unknown version or length")
    if not all(isinstance(text, str) and len(text) <= 200 for text in (owner, ledger_id, root)) or len(root) != 64:
        raise MessageError("a malformed head")
    if canonical(body) != envelope.payload or set(root) - set("0123456789abcdef"):
        raise MessageError("a head in an unusual layout")
    signers = tuple(key for key, _ in envelope.signatures)
    if owner not in keys or signers[:1] != (keys[owner],) or len(set(signers)) != len(signers):
        raise MessageError("a head that its owner did not sign first")
    for key in signers:
        if key not in keys.values():
            raise MessageError("a head signed by a key that does not stand in the charter")
        envelope.signed_by(key)
    return Head(owner, ledger_id, length, root, sealed, signers)


class KeptHeads:
    """The heads that one holder keeps: a file of lines, only ever appended to, and the newest of each ledger in memory.

    Two heads that contradict one another may both be in it: that is the proof against their owner.
    """

    def __init__(self, path: Path, keys: Mapping[str, str]) -> None:
        """Read what is kept; a torn last line was never acknowledged and is cut off.

        Raises:
            MessageError: a line that is no head of these keys.
            OutputError: the file cannot be written.
        """
        self._path = path
        self._keys = dict(keys)
        self._newest: dict[str, Head] = {}
        self._known: set[str] = set()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            new = not path.exists()
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115  held open: one writer
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if new:
                fsync_folder(path.parent)
            whole, _, torn = path.read_bytes().rpartition(b"\n")
            if torn:
                os.ftruncate(self._file.fileno(), len(whole) + 1 if whole else 0)
        except BlockingIOError as err:
            raise LedgerError(f"{path}: another process is writing it", "Stop it first.") from err
        except OSError as err:
            raise output_error(path, err) from err
        for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
            try:
                self._take(read_head(line, keys))
            except MessageError as err:
                raise MessageError(
                    f"{path}:{number}: {err.message}", "Move the file away and keep it: it is evidence."
                ) from err

    def newest(self, owner: str) -> Head | None:
        """The longest head of this owner's ledger that is kept."""
        return self._newest.get(owner)

    def keep(self, heads: Iterable[Head]) -> None:
        """Add heads; on disk when this returns.

        Raises:
            OutputError: they cannot be written.
        """
        fresh = [head for head in heads if sha256(head.sealed) not in self._known]
        if not fresh:
            return
        size = os.fstat(self._file.fileno()).st_size
        try:
            view = memoryview(b"".join(head.sealed + b"\n" for head in fresh))
            while view:
                view = view[self._file.write(view) :]
            os.fsync(self._file.fileno())
        except OSError as err:
            os.ftruncate(self._file.fileno(), size)
            raise output_error(self._path, err) from err
        for head in fresh:
            self._take(head)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _take(self, head: Head) -> None:
        self._known.add(sha256(head.sealed))
        before = self._newest.get(head.owner)
        if before is None or head.length > before.length:
            self._newest[head.owner] = head


def head_fields(head: Head, proof: Sequence[str]) -> dict[str, Any]:
    """A head and the proof that it extends an earlier one, as fields of a message."""
    return {"head": head.sealed.decode(), "proof": list(proof)}


def from_fields(fields: object, keys: Mapping[str, str]) -> tuple[Head, list[str]]:
    """Back from `head_fields`; the proof is not checked yet.

    Raises:
        MessageError: malformed.
    """
    if not isinstance(fields, dict) or set(fields) != {"head", "proof"} or not isinstance(fields["head"], str):
        raise MessageError("a malformed head")
    proof = fields["proof"]
    if not isinstance(proof, list) or len(proof) > MAX_PROOF or not all(isinstance(step, str) for step in proof):
        raise MessageError("a malformed consistency proof")
    return read_head(fields["head"].encode(), keys), proof
