"""Typed, signed round messages <-> Flower records.

A message is a small signed manifest (who, to whom, under which charter, run, round and request; fields; for each tensor
its name, dtype, shape and chunk hashes) plus raw chunks. The manifest's SHA-256 is what ledgers name. Over any Grid the
manifest travels as one ConfigRecord and the chunks as byte arrays, which are read only when they are needed: from the
model in memory on the way out, from the file that a link spooled them to on the way in.

`SignedWire` is the form between partners; `PlainWire` hands tensors over in process, unsigned, and exists for simulations
of more than 100 clients only.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .errors import MessageError, counted
from .flower import Array, ArrayRecord, ConfigRecord, RecordDict
from .identity import Envelope, Identity, canonical, read_envelope, sha256, strict_json

MESSAGE_TYPE = "application/vnd.hansa.message+json"
CHUNK_BYTES = 4 * 1024 * 1024
MAX_MESSAGE_BYTES = 8 * 1024**3
PIECE = 2**18
"""Values of a tensor that are computed with at a time: of an update, 1 MB, and 2 MB once they are weighted."""
DTYPES = ("float32", "float64", "int64", "uint8", "uint32", "uint64")

_DTYPES = frozenset(np.dtype(name) for name in DTYPES)

Tensors = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Manifest:
    """What a message says besides its tensors.

    Attributes:
        kind: open, train, agree, reveal, evaluate, close or sign; a reply: accepted, update, masked, survivors, shares, scores,
            histogram, head, signature, refused.
        request_id: names the exchange; a reply repeats it.
        in_reply_to: for a reply, the SHA-256 of the request's manifest; else empty.
        fields: JSON without floats.
    """

    kind: str
    sender: str
    recipient: str
    charter_sha256: str
    run_id: str
    round: int
    request_id: str
    in_reply_to: str
    fields: Mapping[str, Any]

    def reply(self, kind: str, sha256_of_this: str, **fields: Any) -> Manifest:
        """The manifest of an answer to this request."""
        return Manifest(
            kind=kind,
            sender=self.recipient,
            recipient=self.sender,
            charter_sha256=self.charter_sha256,
            run_id=self.run_id,
            round=self.round,
            request_id=self.request_id,
            in_reply_to=sha256_of_this,
            fields=fields,
        )


class LazyArray(Array):
    """A Flower Array whose bytes are read when they are asked for: from memory that somebody else owns, or from a file.

    Attributes:
        length: number of bytes.
        place: (file, offset) of its first byte; None when it is in memory.
        checked: its hash was compared with that of a signed manifest when it was written to the file.
    """

    def __init__(
        self,
        dtype: str,
        shape: tuple[int, ...],
        stype: str,
        source: memoryview | tuple[Path, int],
        length: int,
        checked: bool = False,
    ) -> None:
        # Not Array's own: it would set `data`, which is read here.
        self.dtype, self.shape, self.stype = dtype, shape, stype
        self.length = length
        self.place = None if isinstance(source, memoryview) else source
        self.checked = checked
        self._view = source if isinstance(source, memoryview) else None

    @classmethod
    def of_file(cls, like: Array, path: Path, offset: int, length: int, *, checked: bool) -> LazyArray:
        """The array `like`, whose bytes are in a file."""
        return cls(like.dtype, tuple(like.shape), like.stype, (path, offset), length, checked)

    def read(self, at: int, size: int) -> bytes:
        """Some of its bytes.

        Raises:
            MessageError: the file is gone or shorter than it was.
        """
        if self._view is not None:
            return bytes(self._view[at : at + size])
        assert self.place is not None
        path, offset = self.place
        try:
            with open(path, "rb") as file:
                data = os.pread(file.fileno(), size, offset + at)
        except OSError as err:
            raise MessageError("a spooled message that is gone") from err
        if len(data) != size:
            raise MessageError("a spooled message that was cut off")
        return data

    @property
    def data(self) -> bytes:  # type: ignore[override]  # a field of Array's; here it is read each time
        """All of its bytes."""
        return self.read(0, self.length)


def as_they_are(arrays: Mapping[str, Array]) -> ArrayRecord:
    """A record of exactly these arrays: ArrayRecord's own constructor would read each and copy it."""
    record = ArrayRecord()
    for key, array in arrays.items():
        record[key] = array
    return record


@dataclass(frozen=True)
class Packed:
    """Tensors made ready to cross: chunks (which read the tensors: change none of them meanwhile), or as they are; and as the manifest
    describes them."""

    content: ArrayRecord | Tensors
    specs: list[dict[str, Any]]


class Wire(Protocol):
    """How messages cross a Grid."""

    def pack(self, tensors: Tensors) -> Packed:
        """Tensors made ready once, for any number of messages that share them."""

    def encode(self, manifest: Manifest, packed: Packed) -> tuple[RecordDict, str]:
        """Records and the SHA-256 of the manifest (empty where nothing is hashed)."""

    def decode(self, records: RecordDict, sender: str) -> tuple[Manifest, dict[str, npt.NDArray[Any]], str]:
        """Manifest, tensors and the manifest's SHA-256, verified as coming from `sender`. Arrays may be read-only.

        Raises:
            MessageError: malformed, forged, or by or for somebody else.
        """


class SignedWire:
    """Signed manifests and hashed chunks, between identities that stand in one charter, about that charter alone.

    Args:
        keys: the others' public keys, by name, as the charter has them.
        charter_sha256: a message under another charter is refused: its keys need not be these.
    """

    def __init__(self, identity: Identity, keys: Mapping[str, str], charter_sha256: str) -> None:
        self._identity = identity
        self._keys = dict(keys)
        self._charter_sha256 = charter_sha256

    def pack(self, tensors: Tensors) -> Packed:
        """See `Wire`."""
        chunks: dict[str, Array] = {}
        specs = []
        for index, (name, tensor) in enumerate(tensors.items()):
            data = _bytes(tensor).toreadonly()
            parts = [data[i : i + CHUNK_BYTES] for i in range(0, len(data), CHUNK_BYTES)]
            for number, part in enumerate(parts):
                key = f"{index:05d}.{number:06d}"
                chunks[key] = LazyArray("uint8", (len(part),), "hansa.chunk", part, len(part))
            about = {"name": name, "dtype": tensor.dtype.name, "shape": list(tensor.shape)}
            specs.append({**about, "chunks": [sha256(part) for part in parts]})
        return Packed(as_they_are(chunks), specs)

    def encode(self, manifest: Manifest, packed: Packed) -> tuple[RecordDict, str]:
        """See `Wire`."""
        body = canonical({"v": 1, **_plain(manifest), "tensors": packed.specs})
        sealed = self._identity.seal(MESSAGE_TYPE, body)
        assert isinstance(packed.content, ArrayRecord)
        record = ConfigRecord({"sealed": sealed})
        return RecordDict({"manifest": record, "chunks": packed.content}), sha256(body)

    def decode(self, records: RecordDict, sender: str) -> tuple[Manifest, dict[str, npt.NDArray[Any]], str]:
        """See `Wire`. Tensors of a spooled message are read-only maps of its file."""
        manifest, specs, digest = self._open(records, sender)
        return manifest, _gather(specs, _record(records, "chunks", ArrayRecord)), digest

    def inspect(self, records: RecordDict, sender: str) -> list[str]:
        """What the arrays of a message must hash to, before their bytes are there: nothing else need be taken.

        Args:
            records: the message, its arrays empty.

        Returns:
            SHA-256 by array, in the order of the records.

        Raises:
            MessageError: malformed, forged, by or for somebody else, too large, or with arrays that it does not name.
        """
        _, specs, _ = self._open(records, sender)
        named = {key: expected for _, _, _, parts in _specified(specs) for key, _, expected in parts}
        chunks = _record(records, "chunks", ArrayRecord)
        if set(records) != {"manifest", "chunks"} or list(chunks) != list(named):
            raise MessageError("a message with other chunks than its manifest names")
        return list(named.values())

    def _open(self, records: RecordDict, sender: str) -> tuple[Manifest, object, str]:
        if sender not in self._keys:
            raise MessageError(f"a message from {sender!r}, who does not stand in the charter")
        sealed = _record(records, "manifest", ConfigRecord).get("sealed")
        if not isinstance(sealed, bytes):
            raise MessageError("a message without a manifest")
        envelope: Envelope = read_envelope(sealed, MESSAGE_TYPE)
        if len(envelope.signatures) != 1:
            raise MessageError("a message has exactly one signature")
        envelope.signed_by(self._keys[sender])
        body = strict_json(envelope.payload)
        if not isinstance(body, dict) or body.pop("v", None) != 1 or canonical({"v": 1, **body}) != envelope.payload:
            raise MessageError("a manifest of an unknown version or layout")
        specs = body.pop("tensors", None)
        manifest = _manifest(body)
        if manifest.sender != sender or manifest.recipient != self._identity.name:
            raise MessageError(f"a message from {manifest.sender} for {manifest.recipient}, delivered as {sender}'s")
        if manifest.charter_sha256 != self._charter_sha256:
            raise MessageError(f"a message from {sender} under another charter")
        return manifest, specs, sha256(envelope.payload)


class Handed(ConfigRecord):
    """A message as it is, from one part of this process to another: nothing is serialised."""

    def __init__(self, manifest: Manifest, tensors: Tensors) -> None:
        super().__init__()
        self.manifest, self.tensors = manifest, tensors


class PlainWire:
    """Tensors as they are: nothing is copied, hashed or signed. Both ends are this process; who gets
    them cannot write into them."""

    def pack(self, tensors: Tensors) -> Packed:
        """See `Wire`."""
        shown = {name: tensor.view() for name, tensor in tensors.items()}
        for tensor in shown.values():
            tensor.flags.writeable = False
        return Packed(shown, [])

    def encode(self, manifest: Manifest, packed: Packed) -> tuple[RecordDict, str]:
        """See `Wire`."""
        assert not isinstance(packed.content, ArrayRecord)
        return RecordDict({"plain": Handed(manifest, packed.content)}), ""

    def decode(self, records: RecordDict, sender: str) -> tuple[Manifest, dict[str, npt.NDArray[Any]], str]:
        """See `Wire`."""
        record = _record(records, "plain", Handed)
        return record.manifest, dict(record.tensors), ""


def is_finite(tensors: Tensors) -> bool:
    """Whether no value is NaN or infinite."""
    # A sum of squares is finite only if every value is, and takes a quarter of the time; it may overflow, so a no is
    # looked at again.
    return all(np.isfinite(squares(t)) or np.isfinite(t).all() for t in tensors.values())


def squares(tensor: npt.NDArray[Any]) -> float:
    """The sum of a tensor's squares, piece by piece in its own type; NaN or infinite if a value is."""
    total = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for _, piece in pieces(tensor):
            total += float(np.dot(piece, piece))
    return total


def pieces(tensor: npt.NDArray[Any]) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """A tensor's values in flat pieces, each with the place of its first value.

    Of a tensor that is a map of a spool file no more than a piece stays in memory: a reply need not be there as a whole.
    """
    flat = tensor.reshape(-1)
    mapped = getattr(tensor, "_mmap", None)  # as numpy.memmap has it
    for at in range(0, len(flat), PIECE):
        yield at, flat[at : at + PIECE]
        if mapped is not None:
            mapped.madvise(mmap.MADV_DONTNEED)


def manifest_sha256(records: RecordDict) -> str:
    """The SHA-256 by which ledgers name a signed message. Its signature is not looked at.

    Raises:
        MessageError: no signed message.
    """
    sealed = _record(records, "manifest", ConfigRecord).get("sealed")
    if not isinstance(sealed, bytes):
        raise MessageError("a message without a manifest")
    return sha256(read_envelope(sealed, MESSAGE_TYPE).payload)


def to_bytes(records: RecordDict) -> bytes:
    """A signed message as one byte string, for a node's outbox."""
    sealed = _record(records, "manifest", ConfigRecord)["sealed"]
    assert isinstance(sealed, bytes)
    chunks = _record(records, "chunks", ArrayRecord)
    parts = [b"hansa-message/1\n", struct.pack("<Q", len(sealed)), sealed]
    for key, array in chunks.items():
        data = array.data
        parts += [key.encode().ljust(16), struct.pack("<Q", len(data)), data]
    return b"".join(parts)


def from_bytes(data: bytes) -> RecordDict:
    """Back from `to_bytes`; nothing is verified here.

    Raises:
        MessageError: not such bytes.
    """
    head = b"hansa-message/1\n"
    try:
        if not data.startswith(head):
            raise MessageError("not a stored message")
        at = len(head)
        (size,) = struct.unpack_from("<Q", data, at)
        at += 8
        sealed = data[at : at + size]
        at += size
        chunks: dict[str, Array] = {}
        while at < len(data):
            key = data[at : at + 16].decode().rstrip()
            (size,) = struct.unpack_from("<Q", data, at + 16)
            at += 24
            chunks[key] = Array("uint8", (size,), "hansa.chunk", data[at : at + size])
            at += size
        if at != len(data):
            raise MessageError("a stored message that was cut off")
    except (struct.error, UnicodeDecodeError) as err:
        raise MessageError("a stored message that is damaged") from err
    return RecordDict({"manifest": ConfigRecord({"sealed": sealed}), "chunks": ArrayRecord(chunks)})


def _bytes(tensor: npt.NDArray[Any]) -> memoryview:
    if tensor.dtype not in _DTYPES:
        raise MessageError(f"tensors of type {tensor.dtype} do not travel; only {', '.join(DTYPES)}")
    # `cast` needs at least one byte and one dimension.
    flat = np.ascontiguousarray(tensor).reshape(-1)
    return flat.data.cast("B") if flat.size else memoryview(b"")


def _plain(manifest: Manifest) -> dict[str, Any]:
    return {
        "kind": manifest.kind,
        "sender": manifest.sender,
        "recipient": manifest.recipient,
        "charter_sha256": manifest.charter_sha256,
        "run_id": manifest.run_id,
        "round": manifest.round,
        "request_id": manifest.request_id,
        "in_reply_to": manifest.in_reply_to,
        "fields": dict(manifest.fields),
    }


_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,199}")  # what ledgers take: a peer must not spoil ours
_TEXT = ("kind", "sender", "recipient", "charter_sha256", "run_id", "request_id", "in_reply_to")


def _manifest(body: object) -> Manifest:
    if not isinstance(body, dict) or set(body) != {*_TEXT, "round", "fields"}:
        raise MessageError("a manifest with missing or unknown fields")
    good = all(isinstance(body[name], str) and len(body[name]) <= 200 for name in _TEXT)
    if not good or type(body["round"]) is not int or not isinstance(body["fields"], dict):
        raise MessageError("a manifest with fields of the wrong type")
    if not (_ID.fullmatch(body["run_id"]) and _ID.fullmatch(body["request_id"]) and 0 <= body["round"] <= 10**9):
        raise MessageError("a manifest whose run, round or request is not named as ledgers can have it")
    return Manifest(**body)


def _record(records: RecordDict, name: str, kind: type[Any]) -> Any:
    record = records.get(name)
    if not isinstance(record, kind):
        raise MessageError(f"a message without {name}")
    return record


def _specified(specs: object) -> Iterator[tuple[str, str, list[int], list[tuple[str, int, str]]]]:
    """Name, dtype, shape and chunks (key, bytes, SHA-256) of each tensor; sizes are checked before any is allocated."""
    if not isinstance(specs, list):
        raise MessageError("a manifest without tensors")
    seen: set[str] = set()
    total = 0
    for index, spec in enumerate(specs):
        if not isinstance(spec, dict) or set(spec) != {"name", "dtype", "shape", "chunks"}:
            raise MessageError("a malformed tensor in the manifest")
        name, dtype, shape, hashes = spec["name"], spec["dtype"], spec["shape"], spec["chunks"]
        if not isinstance(name, str) or name in seen or dtype not in DTYPES or not isinstance(hashes, list):
            raise MessageError("a malformed tensor in the manifest")
        if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**40 for n in shape) or len(shape) > 16:
            raise MessageError(f"tensor {name!r}: malformed shape")
        if math.prod(n for n in shape if n) > MAX_MESSAGE_BYTES:  # also where a zero makes it empty
            raise MessageError(f"tensor {name!r}: too large")
        size = math.prod(shape) * np.dtype(dtype).itemsize
        total += size
        if total > MAX_MESSAGE_BYTES or len(hashes) != -(-size // CHUNK_BYTES):
            raise MessageError(f"tensor {name!r}: {size} bytes do not fit its {counted(len(hashes), 'chunk')}")
        seen.add(name)
        yield (
            name,
            dtype,
            shape,
            [
                (f"{index:05d}.{number:06d}", min(CHUNK_BYTES, size - number * CHUNK_BYTES), expected)
                for number, expected in enumerate(hashes)
            ],
        )


def _gather(specs: object, chunks: ArrayRecord) -> dict[str, npt.NDArray[Any]]:
    """Tensors from verified chunks."""
    tensors: dict[str, npt.NDArray[Any]] = {}
    named = 0
    for name, dtype, shape, parts in _specified(specs):
        named += len(parts)
        mapped = _mapped(parts, chunks)
        if mapped is not None:
            path, offset = mapped
            tensors[name] = np.memmap(path, dtype, "r", offset, tuple(shape))
            continue
        found = []
        for number, (key, length, expected) in enumerate(parts):
            array = chunks.get(key)
            data = array.data if array is not None else b""
            if len(data) != length or sha256(data) != expected:
                raise MessageError(f"tensor {name!r}: chunk {number} is missing or was altered")
            found.append(data)
        joined = found[0] if len(found) == 1 else b"".join(found)
        tensors[name] = np.frombuffer(joined, dtype=dtype).reshape(shape)
    if len(chunks) != named:
        raise MessageError("chunks that the manifest does not name")
    return tensors


def _mapped(parts: Sequence[tuple[str, int, str]], chunks: ArrayRecord) -> tuple[Path, int] | None:
    """Where a tensor stands in a spool file, if it does: its chunks one behind the other, all of them checked."""
    first = None
    at = 0
    for key, length, _ in parts:
        array = chunks.get(key)
        if not isinstance(array, LazyArray) or not array.checked or array.place is None or array.length != length:
            return None
        first = first or array.place
        if array.place != (first[0], first[1] + at):
            return None
        at += length
    return first
