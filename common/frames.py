"""A Flower message as it crosses the link: a small head, and the bytes of its arrays in blocks behind it.

Both sides of the link share this. Arrays are read when they are needed: on the way out from wherever they are (a model in
memory, a file), on the way in from the one file that the message was spooled to. So memory holds a block of a message, not
the message.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from google.protobuf.message import DecodeError

from . import link_pb2 as pb
from .errors import MessageError
from .flower import Array, ArrayRecord, RecordDict, records_from_bytes, records_to_bytes
from .identity import TEMPORARY, sha256
from .messages import MAX_MESSAGE_BYTES, LazyArray, as_they_are

PROTOCOL = 1
"""Version of the link protocol (`link.proto` and docs/link.md); both sides must speak the same."""
BLOCK_BYTES = 1024 * 1024
FRAME_BYTES = 4 * 1024 * 1024
"""The largest gRPC message of the link (a head has 67 bytes for every 4 MiB of tensors); gRPC refuses a larger one from its length prefix, before it is read."""
METHOD = "/hansa.link.v1.Link/Attach"
KEEPALIVE_S = 3
"""How often a silent connection is tried, and how long an answer may take: a dead peer is noticed within twice that."""

Expected = Sequence[str]
"""SHA-256 of each array of a message, in order, as its signed manifest has them."""
Inspect = Callable[[RecordDict, str], Expected]
"""(records with empty arrays, sender) -> what the arrays must hash to, or MessageError: see `SignedWire.inspect`."""


def take_apart(content: RecordDict) -> tuple[bytes, list[Array]]:
    """The records with empty arrays, as bytes, and the arrays in order."""
    arrays: list[Array] = []
    bare = RecordDict()
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            arrays += record.values()
            bare[name] = ArrayRecord({key: Array(a.dtype, a.shape, a.stype, b"") for key, a in record.items()})
        else:
            bare[name] = record
    return records_to_bytes(bare), arrays


def length_of(array: Array) -> int:
    """Bytes of an array, without reading it."""
    return array.length if isinstance(array, LazyArray) else len(array.data)


def blocks(arrays: Sequence[Array]) -> Iterator[bytes]:
    """The bytes of arrays, one after the other, none of them in one block with another."""
    for array in arrays:
        if isinstance(array, LazyArray):
            for at in range(0, array.length, BLOCK_BYTES):
                yield array.read(at, min(BLOCK_BYTES, array.length - at))
        else:
            view = memoryview(array.data)
            for at in range(0, len(view), BLOCK_BYTES):
                yield bytes(view[at : at + BLOCK_BYTES])


def check_head(head: pb.Head) -> RecordDict:
    """The records of a peer's head with empty arrays; sizes are looked at before anything is allocated.

    Raises:
        MessageError: malformed, or larger than any message may be.
    """
    records = records_from_bytes(head.records)
    arrays = sum(len(record) for record in records.values() if isinstance(record, ArrayRecord))
    if arrays != len(head.lengths):
        raise MessageError(f"a message with {arrays} arrays and {len(head.lengths)} lengths")
    if sum(head.lengths) > MAX_MESSAGE_BYTES:
        raise MessageError(f"a message of {sum(head.lengths)} bytes; at most {MAX_MESSAGE_BYTES} are taken")
    return records


def request_id(content: RecordDict) -> str | None:
    """The name of a signed request: the same after a crash, since all of its bytes are. None for other messages."""
    record = content.get("manifest")
    sealed = record.get("sealed") if record is not None else None
    return sha256(sealed)[:32] if isinstance(sealed, bytes) else None


@dataclass(frozen=True)
class Spooled:
    """A message that is whole on the disk."""

    path: Path
    head: pb.Head
    body: int  # where the first array begins

    @classmethod
    def load(cls, path: Path, expect: Callable[[RecordDict], Expected] | None = None) -> Spooled:
        """A message that an earlier process spooled.

        Args:
            expect: the hashes that its arrays must have; they are checked.

        Raises:
            MessageError: damaged, cut off, or not what was expected.
        """
        try:
            with open(path, "rb") as file:
                (size,) = struct.unpack("<I", file.read(4))
                if size > FRAME_BYTES:
                    raise MessageError(f"{path.name}: a damaged spool file")
                head = pb.Head.FromString(file.read(size))
                records = check_head(head)
                if path.stat().st_size != _body(size) + sum(head.lengths):
                    raise MessageError(f"{path.name}: a spool file that was cut off")
                file.seek(_body(size))
                if expect is not None:
                    check = _Check(head.lengths, expect(records))
                    while data := file.read(BLOCK_BYTES):
                        check.add(data)
        except (OSError, struct.error, DecodeError) as err:
            raise MessageError(f"{path.name}: a damaged spool file") from err
        return cls(path, head, _body(size))

    def content(self, *, checked: bool) -> RecordDict:
        """The records; arrays are read from the file when they are needed.

        Args:
            checked: the arrays' hashes were compared with those of a manifest, so nobody needs to do it again.
        """
        records = check_head(self.head)
        at, lengths = self.body, iter(self.head.lengths)
        for name, record in list(records.items()):
            if isinstance(record, ArrayRecord):
                made: dict[str, Array] = {}
                for key, array in record.items():
                    length = next(lengths)
                    made[key] = LazyArray.of_file(array, self.path, at, length, checked=checked)
                    at += length
                records[name] = as_they_are(made)
        return records


class Spool:
    """A message on its way in, written to one file as its blocks come."""

    def __init__(self, path: Path, head: pb.Head, expected: Expected | None) -> None:
        """Begin `path`; it appears when the message is whole.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        self._path = path
        self._part = path.with_name(TEMPORARY + path.name)
        self.head = head
        self._check = _Check(head.lengths, expected)
        raw = head.SerializeToString()
        self._body = _body(len(raw))
        self._file: BinaryIO = open(self._part, "wb", opener=_private)  # noqa: SIM115  closed by finish or drop
        try:
            self._file.write((struct.pack("<I", len(raw)) + raw).ljust(self._body, b"\0"))
        except OSError:
            self.drop()
            raise

    @property
    def missing(self) -> int:
        """Bytes that have not come yet."""
        return self._check.missing

    def write(self, data: bytes) -> None:
        """Take the next bytes.

        Raises:
            MessageError: more than were announced, or not what the manifest has.
            OSError: the disk is full.
        """
        self._check.add(data)
        self._file.write(data)

    def finish(self) -> Spooled:
        """Give the whole message its name. Not fsynced: what a power cut takes is asked for again (docs/link.md)."""
        self._file.close()
        os.replace(self._part, self._path)
        return Spooled(self._path, self.head, self._body)

    def drop(self) -> None:
        """Forget it, whatever the disk says: a full one would refuse even to write out what is thrown away."""
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._part.unlink(missing_ok=True)


class _Check:
    """Compares bytes, as they come, with the lengths and the hashes of the arrays that they belong to."""

    def __init__(self, lengths: Sequence[int], expected: Expected | None) -> None:
        if expected is not None and len(expected) != len(lengths):
            raise MessageError("a message with other arrays than its manifest names")
        self._lengths = list(lengths)
        self._expected = expected
        self._index = 0
        self._digest = hashlib.sha256()
        self._left = self._lengths[0] if self._lengths else 0
        self.missing = sum(lengths)
        self._step()

    def add(self, data: bytes) -> None:
        view = memoryview(data)
        if len(view) > self.missing:
            raise MessageError("more bytes than the message announced")
        self.missing -= len(view)
        while view:
            part = view[: self._left]
            if self._expected is not None:
                self._digest.update(part)
            self._left -= len(part)
            view = view[len(part) :]
            self._step()

    def _step(self) -> None:
        """Go on to the next array that has bytes, when this one is complete."""
        while self._index < len(self._lengths) and self._left == 0:
            if self._expected is not None:
                if self._digest.hexdigest() != self._expected[self._index]:
                    raise MessageError(f"array {self._index} is not the one that the manifest names")
                self._digest = hashlib.sha256()
            self._index += 1
            if self._index < len(self._lengths):
                self._left = self._lengths[self._index]


def _body(size: int) -> int:
    """Where the arrays begin behind a head of `size` bytes: aligned, or numpy would copy each whole to compute with it."""
    return -(-(4 + size) // 64) * 64


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
