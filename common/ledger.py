"""An append-only, signed log under a Merkle tree: tamper-evident, and durable before anything that it records happens.

The format is docs/ledger-format.md. One process writes at a time (an exclusive lock on the file). `append` returns after
fsync, so an entry that was acknowledged survives a crash; a torn last line was never acknowledged and is cut off, and the
cut itself recorded, when the ledger is next opened for writing.

A ledger that an auditor gets may have entries whose bodies stay with its owner (`redacted`): of these a reader sees what they do to
a budget, and that they are signed and in the tree.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .errors import LedgerError, MessageError, OutputError
from .identity import (
    Envelope,
    Identity,
    canonical,
    fingerprint,
    fsync_folder,
    make_folder,
    output_error,
    read_envelope,
    sha256,
    strict_json,
    write_envelope,
    write_whole,
)
from .merkle import Tree, leaf_hash

ENTRY_TYPE = "application/vnd.hansa.entry.v2+json"
VERSION = 2
UNDISCLOSED = "undisclosed"
"""The type of an entry whose body stays with its owner."""


@dataclass(frozen=True)
class Entry:
    """One verified line.

    Attributes:
        charter: SHA-256 of the charter that it is about; None for what is about none, and where it is undisclosed.
        body: its data; empty where it is undisclosed (`type` says so).
        privacy: what it does to the budget of a lineage; None: nothing.
        leaf: hash of its leaf in the tree.
        before: root of the tree before it, as its header has it.
        root: of the tree that ends with it: with its length, the head of the ledger then.
    """

    seq: int
    time: str
    type: str
    charter: str | None
    body: Mapping[str, Any]
    privacy: Mapping[str, Any] | None
    leaf: bytes = field(repr=False)
    before: str = field(repr=False)
    root: str


@dataclass(frozen=True)
class Scan:
    """A ledger's file as far as it verifies.

    Attributes:
        entries: of all lines before the first bad one.
        torn: the bytes behind the last line break; empty when the file ends in one.
        bad: number (from 1) of the first line that is wrong, and what is wrong with it; None: all are good.
        rest: how many lines there are from the first bad one on.
    """

    entries: list[Entry]
    torn: bytes
    bad: tuple[int, str] | None
    rest: int


def scan_ledger(path: Path, key: str | None = None) -> Scan:
    """Read a ledger up to the first line that is wrong: layout, signatures, sequence, tree.

    Each entry signs for all before it, so what stands before a bad line is good.

    Args:
        key: whose signature each line must bear (hex); None takes the key that the genesis entry names.

    Raises:
        LedgerError: the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as err:
        raise LedgerError(f"{path}: {err.strerror}", "Give the path of a ledger.jsonl.") from err
    *lines, torn = data.split(b"\n")
    entries: list[Entry] = []
    tree = Tree()
    for number, line in enumerate(lines, start=1):
        try:
            if key is None:
                key = _genesis_key(line)
            entries.append(_parse(line, tree, key))
        except MessageError as err:
            return Scan(entries, torn, (number, err.message), len(lines) - number + 1)
    return Scan(entries, torn, None, 0)


def looks_like_ledger(data: bytes) -> bool:
    """Whether any line is written as an entry is: where none is, the file is of another kind, and no ledger that was edited."""
    return any(line.startswith((b'{"body":', b'{"envelope":')) for line in data.split(b"\n"))


def read_ledger(path: Path, key: str | None = None) -> tuple[list[Entry], bytes]:
    """Read and verify a whole ledger: layout, signatures, sequence, tree.

    Args:
        key: whose signature each line must bear (hex); None takes the key that the genesis entry names.

    Returns:
        The entries, and the bytes of a torn last line (empty when there is none).

    Raises:
        LedgerError: with file and line of the first thing that is wrong.
    """
    scan = scan_ledger(path, key)
    if scan.bad is not None:
        number, what = scan.bad
        raise LedgerError(
            f"{path}:{number}: {what}",
            "This ledger was edited or damaged. Compare it with another copy or its countersigned head.",
        )
    return scan.entries, scan.torn


class Ledger:
    """A ledger open for writing.

    Args:
        counter: a file that remembers how long the ledger is: an older copy of it is then refused. None in simulations.

    Attributes:
        entries: every verified entry so far.
        recovered: the number of bytes of a torn last line that was cut off on opening; 0 when there was none.
    """

    def __init__(
        self, path: Path, identity: Identity, genesis: Mapping[str, Any], counter: Counter | None = None
    ) -> None:
        """Open `path`, or create it with a genesis entry.

        Raises:
            LedgerError: another process writes it, it belongs to another key, it does not verify, or it is an older copy
                than its counter knows.
            OutputError: it cannot be written.
        """
        self._path = path
        self._identity = identity
        self._counter = counter
        try:
            make_folder(path.parent)
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
            if any(entry.type == UNDISCLOSED for entry in self.entries):
                raise LedgerError(
                    f"{path}: is a copy for an auditor, with entries that are not disclosed",
                    "Restore the node's own ledger: hansa node restore BACKUP",
                )
            self._tree = Tree()
            for entry in self.entries:
                self._tree.append(entry.leaf)
            if counter is not None:
                counter.check(self.entries)
            self._size = path.stat().st_size - len(torn)
            self.recovered = len(torn)
            if torn:
                self._truncate()
            if not self.entries:
                self.append("genesis", {**genesis, "key": identity.key})
            if torn:
                self.append("recovered", {"torn_bytes": len(torn), "torn_sha256": sha256(torn)})
        except BaseException:
            self.close()
            raise

    @property
    def length(self) -> int:
        """Number of entries."""
        return len(self.entries)

    @property
    def root(self) -> str:
        """Root of the tree over all entries."""
        return self._tree.root().hex()

    def head(self) -> dict[str, Any]:
        """{"length", "root"}: what a checkpoint states of this ledger."""
        return {"length": self.length, "root": self.root}

    def states(self, length: object, root: object) -> bool:
        """Whether this ledger has, or had, this root at this length."""
        return type(length) is int and 1 <= length <= self.length and self.entries[length - 1].root == root

    def consistency(self, first: int) -> list[str]:
        """A proof (hex) that this ledger extends its own first `first` entries.

        Raises:
            LedgerError: it has fewer.
        """
        return [h.hex() for h in self._tree.consistency(first)]

    def append(
        self,
        kind: str,
        body: Mapping[str, Any],
        *,
        charter: str | None = None,
        privacy: Mapping[str, Any] | None = None,
        at_once: bool = True,
    ) -> Entry:
        """Write one entry and return when it is on disk.

        Args:
            charter: SHA-256 of the charter that it is about.
            privacy: what it does to a budget, as docs/ledger-format.md has it: this is told to every auditor.
            at_once: False for what may be on disk with the next entry only: if the machine stops before, it is as if it had not
                been written.

        Raises:
            OutputError: it could not be written; the ledger is as it was before.
            LedgerError: see `check_open`.
        """
        time = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        salt = secrets.token_hex(16)
        whole = canonical({"salt": salt, "time": time, "type": kind, "charter": charter, "data": body})
        header = canonical(
            {"v": VERSION, "seq": self.length, "root": self.root, "body_sha256": sha256(whole), "privacy": privacy}
        )
        line = _line(self._identity.seal(ENTRY_TYPE, header), whole)
        self.check_open()
        try:
            view = memoryview(line + b"\n")
            while view:  # an unbuffered write may be short (a signal, a nearly full disk)
                view = view[self._file.write(view) :]
            if at_once:
                os.fsync(self._file.fileno())
        except OSError as err:
            try:
                self._truncate()
            except OutputError:
                self.close()  # the file may end in half an entry: nothing may be written behind it
            raise output_error(self._path, err) from err
        self._size += len(line) + 1
        leaf, before = leaf_hash(header), self.root
        self._tree.append(leaf)
        data = strict_json(whole)["data"]
        entry = Entry(self.length, time, kind, charter, data, strict_json(header)["privacy"], leaf, before, self.root)
        self.entries.append(entry)
        if self._counter is not None and at_once:
            try:
                self._counter.advance(entry)
            except OutputError:
                self.close()  # the entry stands in the ledger, but nobody here acts on it: nothing more may follow
                raise
        return entry

    def check_open(self) -> None:
        """Return when entries may follow.

        Raises:
            LedgerError: it was closed, or an entry could not be written whole.
        """
        if self._file.closed:
            raise LedgerError(f"{self._path}: is closed, or could not be written before", "Open it again.")

    def of(self, *kinds: str) -> list[Entry]:
        """The entries of these types, in order."""
        return [entry for entry in self.entries if entry.type in kinds]

    def close(self) -> None:
        """Let go of the lock."""
        self._file.close()
        if self._counter is not None:
            self._counter.close()

    def _truncate(self) -> None:
        """Cut the file back to its last acknowledged entry."""
        try:
            os.ftruncate(self._file.fileno(), self._size)
            os.fsync(self._file.fileno())
        except OSError as err:
            raise output_error(self._path, err) from err


class Counter:
    """A small file beside a ledger that only counts up: how long the ledger was, and its root then.

    It binds whoever restores or edits a ledger by itself; who puts the whole disk back to an earlier day puts the counter back
    with it, and only heads that others hold can show that.

    Two slots are written in turn, each with its own hash, so that a crash in mid-write leaves the other one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: int | None = None

    def check(self, entries: list[Entry]) -> None:
        """Return when the ledger with these entries is the one that was counted, or goes on from it; from then on it counts.

        Raises:
            LedgerError: it is an older copy, another one, or the counter is missing or damaged.
            OutputError: the counter cannot be written.
        """
        self._compare(entries)
        try:
            new = not self._path.exists()
            self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if new:
                fsync_folder(self._path.parent)
        except OSError as err:
            raise output_error(self._path, err) from err
        if entries:
            self.advance(entries[-1])

    def _compare(self, entries: list[Entry]) -> None:
        """Return when the ledger with these entries is the one that was counted, or goes on from it. Changes nothing.

        Raises:
            LedgerError: it is an older copy, another one, or the counter is missing or damaged.
        """
        hint = "Restore the ledger with its newest entries: hansa node restore BACKUP"
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            if entries:
                raise LedgerError(f"{self._path}: missing, and it says how long the ledger must be", hint) from None
            return
        except OSError as err:
            raise LedgerError(f"{self._path}: {err.strerror}", hint) from err
        if data:
            if (counted := self.counted()) is None:
                raise LedgerError(f"{self._path}: damaged; it says how long the ledger must be", hint)
            length, root = counted
            if length > len(entries):
                raise LedgerError(
                    f"the ledger has {len(entries)} entries and had {length} before: it is an older copy, or was cut",
                    hint,
                )
            if entries[length - 1].root != root:
                raise LedgerError(f"the ledger's first {length} entries are not those that were there before", hint)
        elif len(entries) > 1:  # it is empty only until the first entry was counted
            raise LedgerError(f"{self._path}: empty, and it says how long the ledger must be", hint)

    def advance(self, entry: Entry) -> None:
        """Count an entry that is on disk.

        Raises:
            OutputError: it cannot be written.
        """
        assert self._handle is not None
        try:
            os.pwrite(self._handle, _record(entry), (entry.seq % 2) * _SLOT)
            os.fdatasync(self._handle)
        except OSError as err:
            raise output_error(self._path, err) from err

    def counted(self) -> tuple[int, str] | None:
        """Length and root that were counted last; None when there is nothing that can be read."""
        try:
            data = self._path.read_bytes()
        except OSError:
            return None
        return max(
            (found for at in range(2) if (found := self._slot(data[at * _SLOT : (at + 1) * _SLOT]))), default=None
        )

    def renew(self, entries: list[Entry]) -> None:
        """Forget what was counted, and count from here: for a ledger that comes from a backup, and is marked so.

        Raises:
            OutputError: it cannot be written.
        """
        slots = b"".join(
            _record(entry) if entry.seq % 2 == at else b" " * _SLOT for at in range(2) for entry in entries[-1:]
        )
        write_whole(self._path, slots, mode=0o600)

    def close(self) -> None:
        """Let go of the file."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    @staticmethod
    def _slot(data: bytes) -> tuple[int, str] | None:
        try:
            text, digest = data.decode("ascii").rstrip()[:86], data.decode("ascii").rstrip()[86:]
            if sha256(text.encode()) == digest:
                return int(text[:20]), text[21:85]
        except (UnicodeDecodeError, ValueError):
            pass
        return None


_SLOT = 256


def _record(entry: Entry) -> bytes:
    text = f"{entry.seq + 1:020d} {entry.root} "
    return (text + sha256(text.encode())).encode().ljust(_SLOT - 1) + b"\n"


# -- lines ---------------------------------------------------------------------------------------------------------------


def redacted(data: bytes, disclose: Callable[[Entry], bool], key: str) -> bytes:
    """A ledger's whole lines, with the bodies of those entries left out that `disclose` says no to.

    Args:
        key: the owner's.

    Raises:
        MessageError: not a ledger of that key.
    """
    tree = Tree()
    made = []
    for line in data.split(b"\n")[:-1]:  # what follows the last line break is torn
        entry = _parse(line, tree, key)
        made.append(line if disclose(entry) else _line(write_envelope(_split(line)[0]), None))
    return b"".join(line + b"\n" for line in made)


def owner_line(entry: Entry) -> str:
    """Whose ledger this is, in words, from its genesis entry."""
    return f"{entry.body.get('owner')} ({entry.body.get('role')}), key {fingerprint(str(entry.body.get('key')))}"


def _line(envelope: bytes, body: bytes | None) -> bytes:
    """Canonical JSON of both, which they are already."""
    return b'{"envelope":' + envelope + b"}" if body is None else b'{"body":' + body + b',"envelope":' + envelope + b"}"


def _split(line: bytes) -> tuple[Envelope, bytes | None]:
    """The envelope and the body's canonical bytes; nothing is verified but the layout."""
    whole = strict_json(line)
    if not isinstance(whole, dict) or not {"envelope"} <= set(whole) <= {"envelope", "body"}:
        raise MessageError("not an entry")
    body = canonical(whole["body"]) if "body" in whole else None
    envelope = read_envelope(canonical(whole["envelope"]), ENTRY_TYPE)
    if _line(write_envelope(envelope), body) != line:
        raise MessageError("an entry in an unusual layout (edited?)")
    return envelope, body


def _genesis_key(line: bytes) -> str:
    try:
        return str(strict_json(line)["body"]["data"]["key"])
    except (KeyError, TypeError) as err:
        raise MessageError("the first entry names no key") from err


def read_entry(line: bytes, key: str) -> Entry:
    """One entry by itself: its owner signed it, and the body, where there is one, is the one that was signed.

    Its place is what its header says; `root` is empty: only the tree can tell.

    Raises:
        MessageError: it is not so.
    """
    envelope, whole = _split(line)
    if len(envelope.signatures) != 1:
        raise MessageError("an entry has exactly one signature")
    envelope.signed_by(key)
    header = strict_json(envelope.payload)
    if not isinstance(header, dict) or set(header) != {"v", "seq", "root", "body_sha256", "privacy"}:
        raise MessageError("an entry with other fields than v, seq, root, body_sha256, privacy")
    if type(header["v"]) is not int or header["v"] != VERSION:
        raise MessageError(f"an entry of an unknown version ({header['v']!r})")
    seq, privacy = header["seq"], header["privacy"]
    if type(seq) is not int or seq < 0:
        raise MessageError(f"sequence number {seq!r}")
    if not (privacy is None or isinstance(privacy, dict)) or canonical(header) != envelope.payload:
        raise MessageError("a header in an unusual layout")
    leaf = leaf_hash(envelope.payload)
    if whole is None:
        return Entry(seq, "", UNDISCLOSED, None, {}, privacy, leaf, header["root"], "")
    if sha256(whole) != header["body_sha256"]:
        raise MessageError("another body than was signed")
    body = strict_json(whole)
    if not isinstance(body, dict) or set(body) != {"salt", "time", "type", "charter", "data"}:
        raise MessageError("a body with other fields than salt, time, type, charter, data")
    time, kind, charter, data = body["time"], body["type"], body["charter"], body["data"]
    texts = isinstance(time, str) and isinstance(kind, str) and isinstance(body["salt"], str)
    if not (texts and isinstance(data, dict) and (charter is None or isinstance(charter, str))):
        raise MessageError("a body with fields of the wrong type")
    if kind == UNDISCLOSED:
        raise MessageError("an entry of no type")
    return Entry(seq, time, kind, charter, data, privacy, leaf, header["root"], "")


def _parse(line: bytes, tree: Tree, key: str) -> Entry:
    """The next entry of a ledger; `tree` grows by it."""
    entry = read_entry(line, key)
    if entry.seq != tree.size:
        raise MessageError(f"sequence number {entry.seq}, wanted {tree.size}: entries are missing or out of order")
    if entry.before != tree.root().hex():
        raise MessageError("does not follow the lines above it: entries were edited, dropped or reordered")
    tree.append(entry.leaf)
    return replace(entry, root=tree.root().hex())
