"""Identity keys, signed envelopes, canonical bytes, and files that are written whole or not at all.

An envelope is DSSE (https://github.com/secure-systems-lab/dsse): the signature covers the exact payload bytes and
their type, so nothing is re-serialised before it is verified. We write envelopes in one layout only and refuse any
other, so that no byte of a file is free to change.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import InternalError, InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from .errors import IdentityError, MessageError, OutputError

MAX_DEPTH = 16
"""How deep JSON from a peer may nest; ours stays below 8."""
TEMPORARY = ".hansa-tmp-"
"""How `write_whole` begins the name of a file that is not finished; only a killed process leaves one behind."""
PASSPHRASE = "HANSA_PASSPHRASE"  # noqa: S105 (its name, not a secret)
"""The environment variable in which programs give the passphrase of encrypted key files; people are asked."""


def canonical(value: object) -> bytes:
    """JSON bytes with sorted keys, no spaces, UTF-8.

    Raises:
        TypeError: for a float (reals travel as decimal strings, see `real`) or anything that JSON has no word for.
    """
    _refuse_floats(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def real(value: float) -> str:
    """A real number as the shortest decimal string that reads back as the same float64."""
    return repr(float(value))


def sha256(data: bytes | memoryview) -> str:
    """SHA-256 as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def strict_json(data: bytes) -> Any:
    """Parse JSON from an untrusted peer: no duplicate keys, no floats, no NaN, no deep nesting, only Unicode text.

    So whatever comes back has canonical bytes.

    Raises:
        MessageError: whatever is wrong with it.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({k for k, _ in items}) != len(items):
            raise ValueError("a key is given twice")
        return dict(items)

    def no_float(text: str) -> float:
        raise ValueError(f"the number {text} is not an integer; reals travel as strings")

    try:
        value = json.loads(data.decode(), object_pairs_hook=pairs, parse_float=no_float, parse_constant=no_float)
        _plain_json(value, MAX_DEPTH)
    except (ValueError, RecursionError) as err:
        raise MessageError(f"not valid JSON: {err}") from err
    return value


@dataclass(frozen=True)
class Identity:
    """A name and its Ed25519 private key."""

    name: str
    _private: Ed25519PrivateKey = field(repr=False)

    @classmethod
    def generate(cls, name: str) -> Identity:
        """A new key from the operating system's generator."""
        return cls(name, Ed25519PrivateKey.generate())

    @property
    def key(self) -> str:
        """The public key: 32 raw bytes as 64 hex digits."""
        raw = self._private.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        return raw.hex()

    def sign(self, payload_type: str, payload: bytes) -> bytes:
        """Ed25519 signature (64 bytes) over the DSSE pre-authentication encoding."""
        return self._private.sign(_pae(payload_type, payload))

    def seal(self, payload_type: str, payload: bytes) -> bytes:
        """One envelope with this identity's signature."""
        return write_envelope(Envelope(payload_type, payload, ((self.key, self.sign(payload_type, payload)),)))

    def save(self, path: Path, passphrase: str | None = None) -> None:
        """Write the private key as PKCS#8 PEM, mode 0600, encrypted when there is a passphrase.

        Raises:
            OutputError: when the file cannot be written.
        """
        write_private_key(path, self._private, passphrase)

    @classmethod
    def load(cls, name: str, path: Path, passphrase: str | None = None) -> Identity:
        """Read a private key; the passphrase is used only where the file is encrypted.

        Raises:
            IdentityError: missing, malformed, another kind of key, readable by others, or not this passphrase.
        """
        key = read_private_key(path, passphrase)
        if not isinstance(key, Ed25519PrivateKey):
            raise IdentityError(f"{path}: not an Ed25519 key", "Identity keys are Ed25519.")
        return cls(name, key)


def write_private_key(path: Path, key: PrivateKeyTypes, passphrase: str | None = None) -> None:
    """Write any private key as PKCS#8 PEM, mode 0600, encrypted when there is a passphrase.

    Raises:
        OutputError: when the file cannot be written.
    """
    encryption = serialization.BestAvailableEncryption(_secret(passphrase)) if passphrase else None
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption or serialization.NoEncryption()
    )
    write_whole(path, pem, mode=0o600)


def read_private_key(path: Path, passphrase: str | None = None) -> PrivateKeyTypes:
    """Read any private key; the passphrase is used only where the file is encrypted.

    Raises:
        IdentityError: missing, malformed, readable by others, or not this passphrase.
    """
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise IdentityError(f"{path}: private key is readable by others", f"Run: chmod 600 {path}")
            pem = file.read()
    except OSError as err:
        raise IdentityError(f"{path}: {err.strerror}", "Give the path of this identity's private key.") from err
    encrypted = _ENCRYPTED in pem
    if encrypted and not passphrase:
        raise IdentityError(
            f"{path}: encrypted, so not a private key in PEM form that can be read without its passphrase",
            f"Set {PASSPHRASE} for programs; on a terminal the commands ask.",
        )
    try:
        return serialization.load_pem_private_key(pem, _secret(passphrase) if passphrase and encrypted else None)
    except (ValueError, TypeError, UnsupportedAlgorithm, InternalError) as err:
        if encrypted:
            raise IdentityError(
                f"{path}: this passphrase does not open it", f"Give the right one (in {PASSPHRASE}, or when asked)."
            ) from err
        raise IdentityError(f"{path}: not a private key in PEM form", "Restore it from a backup.") from err


def is_encrypted(path: Path) -> bool:
    """Whether a key file needs a passphrase. A file that cannot be read does not: `read_private_key` says why."""
    try:
        return _ENCRYPTED in path.read_bytes()
    except OSError:
        return False


_ENCRYPTED = b"-----BEGIN ENCRYPTED PRIVATE KEY-----"


def _secret(passphrase: str) -> bytes:
    return passphrase.encode("utf-8", "surrogateescape")  # bytes in the environment need not be UTF-8


def public_pem(key: str) -> bytes:
    """A public key (64 hex digits) as PEM."""
    public = Ed25519PublicKey.from_public_bytes(_raw_key(key))
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def key_from_pem(pem: bytes) -> str:
    """The 64 hex digits of an Ed25519 public key in exactly the PEM form that `public_pem` writes.

    Raises:
        IdentityError: anything else.
    """
    try:
        public = serialization.load_pem_public_key(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm, InternalError) as err:
        raise IdentityError("not a public key in PEM form") from err
    if not isinstance(public, Ed25519PublicKey):
        raise IdentityError("not an Ed25519 public key")
    key = public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()
    if public_pem(key) != pem:
        raise IdentityError("a public key in an unusual form of PEM; write it again with Hansa")
    return key


def fingerprint(key: str) -> str:
    """What people compare by phone: SHA-256 of the raw public key, first 20 bytes in groups of four digits.

    Raises:
        MessageError: it is no public key: in a ledger that somebody else wrote, say.
    """
    return grouped(sha256(_raw_key(key)))


def grouped(digest: str) -> str:
    """The first 20 bytes of a hex digest in groups of four digits, as people read fingerprints out."""
    return " ".join(digest[i : i + 4] for i in range(0, 40, 4))


@dataclass(frozen=True)
class Envelope:
    """A payload, its type, and signatures as (public key hex, 64 bytes) pairs."""

    payload_type: str
    payload: bytes
    signatures: tuple[tuple[str, bytes], ...]

    def signed_by(self, key: str) -> None:
        """Return when `key` made one of the signatures.

        Raises:
            MessageError: it did not, or the signature is bad.
        """
        _raw_key(key)
        for keyid, signature in self.signatures:
            if keyid == key:
                verify(key, self.payload_type, self.payload, signature)
                return
        raise MessageError(f"not signed by {fingerprint(key)}")


def verify(key: str, payload_type: str, payload: bytes, signature: bytes) -> None:
    """Check one signature.

    Raises:
        MessageError: the signature is bad or the key is none.
    """
    try:
        Ed25519PublicKey.from_public_bytes(_raw_key(key)).verify(signature, _pae(payload_type, payload))
    except InvalidSignature as err:
        raise MessageError(f"bad signature by {fingerprint(key)}") from err


def write_envelope(envelope: Envelope) -> bytes:
    """The one layout: canonical JSON of payload, payloadType and signatures (in the order given)."""
    return canonical(
        {
            "payload": base64.b64encode(envelope.payload).decode(),
            "payloadType": envelope.payload_type,
            "signatures": [{"keyid": key, "sig": base64.b64encode(sig).decode()} for key, sig in envelope.signatures],
        }
    )


def read_envelope(data: bytes, payload_type: str) -> Envelope:
    """Parse an envelope; no signature is checked here.

    Raises:
        MessageError: malformed, of another type, or not in the one layout.
    """
    parsed = strict_json(data)
    try:
        signatures = tuple(
            (_raw_key(item["keyid"]).hex(), base64.b64decode(item["sig"], validate=True))
            for item in parsed["signatures"]
        )
        envelope = Envelope(str(parsed["payloadType"]), base64.b64decode(parsed["payload"], validate=True), signatures)
        same = write_envelope(envelope) == data
    except (KeyError, TypeError, ValueError, binascii.Error) as err:
        raise MessageError("not a signed envelope") from err
    if envelope.payload_type != payload_type:
        raise MessageError(f"an envelope of type {envelope.payload_type!r}, wanted {payload_type!r}")
    if not same:
        raise MessageError("an envelope in an unusual layout (edited?)")
    return envelope


def read_file(path: Path, hint: str) -> bytes:
    """The bytes of a file that belongs to an identity, or what to do without it.

    Raises:
        IdentityError: missing or unreadable, with this hint.
    """
    try:
        return path.read_bytes()
    except OSError as err:
        raise IdentityError(f"{path}: {err.strerror}", hint) from err


def write_whole(path: Path, data: bytes | Iterable[bytes | memoryview], mode: int = 0o644) -> None:
    """Write a file so that a crash or a full disk leaves either the old bytes or the new ones.

    Args:
        data: all of it, or one part after the other.

    Raises:
        OutputError: with what went wrong; the old file is untouched.
    """
    temporary = None
    try:
        make_folder(path.parent)
        if path.exists() and not (path.is_file() or path.is_dir()):  # a folder is refused below; a link is replaced
            raise OutputError(f"{path}: is no ordinary file, and would be replaced", "Give the name of a file.")
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{TEMPORARY}{path.name}.")
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, mode)
            for part in (data,) if isinstance(data, bytes) else data:
                file.write(part)
            file.flush()
            os.fsync(handle)
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except BaseException as err:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        if isinstance(err, OSError):
            raise output_error(path, err) from err
        raise


def check_writable(path: Path) -> None:
    """Find out now what `write_whole` would find out after the work: make a file beside `path`, and delete it.

    Raises:
        OutputError: `path` cannot be written there.
    """
    try:
        if path.exists() and not path.is_file():
            raise OutputError(f"{path}: is no ordinary file, and would be replaced", "Give the name of a file.")
        folder = next(one for one in path.absolute().parents if one.exists())
        handle, temporary = tempfile.mkstemp(
            dir=folder, prefix=f"{TEMPORARY}{path.name}."
        )  # a name as long as the real one
        os.close(handle)
        os.unlink(temporary)
    except OSError as err:
        raise output_error(path, err) from err


def drop_unfinished(folder: Path) -> None:
    """Delete the files directly in `folder` that a killed process had not finished writing."""
    for path in folder.glob(TEMPORARY + "*"):
        if path.is_file():  # a restore's is a folder, and may be another process's
            with contextlib.suppress(OSError):  # it is in nobody's way
                path.unlink()


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, so that their names survive a power cut, too."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in missing:
        fsync_folder(one.parent)


def fsync_folder(folder: Path) -> None:
    """Make a rename or a new file in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def output_error(path: Path, err: OSError) -> OutputError:
    """An OSError while writing, in words."""
    if err.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"{path}: the disk is full; nothing that was recorded is lost",
            "Free some space and run the same command again; a run goes on with --resume.",
        )
    return OutputError(f"{path}: {err.strerror or err}", "Give a folder that this user may write to.")


def _pae(payload_type: str, payload: bytes) -> bytes:
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _raw_key(key: str) -> bytes:
    try:
        raw = bytes.fromhex(key)
    except (TypeError, ValueError) as err:
        raise MessageError(f"not a public key: {key!r}") from err
    if len(raw) != 32 or raw.hex() != key:
        raise MessageError(f"not a public key: {key!r}")
    return raw


def _plain_json(value: object, depth: int) -> None:
    if isinstance(value, str):
        value.encode()  # a lone surrogate is no text; the UnicodeEncodeError is a ValueError
    elif isinstance(value, dict | list):
        if not depth:
            raise ValueError("nested too deeply")
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            _plain_json(item, depth - 1)


def _refuse_floats(value: object) -> None:
    if isinstance(value, float):
        raise TypeError(f"a float ({value!r}) has no canonical bytes; use real()")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"a key that is not text: {key!r}")
            _refuse_floats(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_floats(item)
