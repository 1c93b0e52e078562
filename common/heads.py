"""Signed heads and their witnesses (docs/ledger-format.md): what shows a rollback or a fork to who holds one copy.

A ledger's owner signs where it stands; others sign the same bytes when that extends what they signed before, and keep them. Pure
functions, and one file of kept heads.
"""

from __future__ import annotations

import fcntl
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import LedgerError, MessageError
from .identity import (
    Envelope,
    Identity,
    canonical,
    fsync_folder,
    make_folder,
    output_error,
    read_envelope,
    sha256,
    strict_json,
    verify,
    write_envelope,
)
from .ledger import Ledger
from .merkle import verify_consistency

HEAD_TYPE = "application/vnd.hansa.head+json"
MAX_UNSIGNED = 16
"""Heads of one owner that are kept though they do not extend what was signed; two are proof enough."""
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
        return self._with(identity.key, identity.sign(HEAD_TYPE, read_envelope(self.sealed, HEAD_TYPE).payload))

    def with_signature(self, key: str, signature: bytes) -> Head:
        """With a signature that somebody else made.

        Raises:
            MessageError: it is bad.
        """
        if key in self.signers:
            return self
        verify(key, HEAD_TYPE, read_envelope(self.sealed, HEAD_TYPE).payload, signature)
        return self._with(key, signature)

    def joined(self, other: Head) -> Head:
        """With the signatures of both; they state the same.

        Raises:
            MessageError: they do not.
        """
        if read_envelope(self.sealed, HEAD_TYPE).payload != read_envelope(other.sealed, HEAD_TYPE).payload:
            raise MessageError("signatures under different heads")
        made = self
        for key in other.signers:
            made = made if key in made.signers else made._with(key, other.signature(key))
        return made

    def _with(self, key: str, signature: bytes) -> Head:
        envelope = read_envelope(self.sealed, HEAD_TYPE)
        made = Envelope(HEAD_TYPE, envelope.payload, (*envelope.signatures, (key, signature)))
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
        if (self.length, self.root) == (earlier.length, earlier.root):
            return
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
    """The heads that one holder keeps: a file of lines, only ever appended to.

    It signs only what extends the last one that it signed. Heads that contradict one another may both be in the file: that is the
    proof against their owner.

    Args:
        keys: name -> public key of everyone in the charter.
    """

    def __init__(self, path: Path, identity: Identity, keys: Mapping[str, str]) -> None:
        """Read what is kept; a torn last line was never acknowledged and is cut off.

        Raises:
            LedgerError: another process writes it, or a line is no head of these keys.
            OutputError: the file cannot be written.
        """
        self._path = path
        self._identity = identity
        self._newest: dict[tuple[str, str], Head] = {}  # by owner and signer
        self._known: set[str] = set()
        self._unsigned: Counter[str] = Counter()  # by owner, heads that were not countersigned here
        try:
            make_folder(path.parent)
            new = not path.exists()
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115  held open: one writer
            if new:
                fsync_folder(path.parent)
        except OSError as err:
            raise output_error(path, err) from err
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            whole, found, torn = path.read_bytes().rpartition(b"\n")
            if torn:
                os.ftruncate(self._file.fileno(), len(whole) + len(found))
            for number, line in enumerate(whole.split(b"\n") if found else [], start=1):
                try:
                    head = read_head(line, keys)
                    self._unsigned[head.owner] += self._identity.key not in head.signers
                    self._take(head)
                except MessageError as err:
                    raise LedgerError(
                        f"{path}:{number}: {err.message}", "Move the file away, and keep it for an auditor."
                    ) from err
        except BaseException as error:
            self._file.close()
            if isinstance(error, BlockingIOError):
                raise LedgerError(f"{path}: another process is writing it", "Stop it first.") from error
            if isinstance(error, OSError):
                raise output_error(path, error) from error
            raise

    def newest(self, owner: str, signer: str | None = None) -> Head | None:
        """The longest head of this owner's ledger that `signer` (a public key) signed; None: that its holder did."""
        return self._newest.get((owner, signer or self._identity.key))

    def witness(self, offers: Iterable[tuple[Head, Sequence[str]]]) -> dict[str, Head]:
        """Countersign the heads (each with a proof) that extend the last one of their owner that was signed here; keep them.

        Returns:
            By owner, those that were signed, on disk. What is not among them does not extend what was signed before, or the
            proof does not show it; of these a few for each owner are kept.

        Raises:
            OutputError: they cannot be written.
        """
        signed: dict[str, Head] = {}
        kept = []
        for head, proof in offers:
            before = signed.get(head.owner) or self.newest(head.owner)
            try:
                if before is not None:
                    head.extends(before, proof)
            except (LedgerError, MessageError):
                self._unsigned[head.owner] += 1
                if (
                    self._unsigned[head.owner] <= MAX_UNSIGNED
                ):  # whoever signs heads by the thousand shall not fill this disk
                    kept.append(head)
            else:
                signed[head.owner] = head.countersigned(self._identity)
                kept.append(signed[head.owner])
        self.keep(kept)
        return signed

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
        for signer in head.signers:
            before = self._newest.get((head.owner, signer))
            if before is None or head.length > before.length:
                self._newest[head.owner, signer] = head
