"""An organisation's home folder: its keys, its name, its certificate; a renewal that a crash cannot spoil.

Only public halves leave it: `NAME.csr`, `NAME.pem`, certificates.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from .certificates import (
    PeerCertificate,
    check_chain,
    check_name,
    check_peer,
    make_request,
    read_certificate,
    spki_sha256,
    split_chain,
)
from .errors import IdentityError, MessageError
from .identity import (
    Identity,
    canonical,
    fsync_folder,
    public_pem,
    read_file,
    read_private_key,
    strict_json,
    write_private_key,
    write_whole,
)


@dataclass(frozen=True)
class Home:
    """An organisation's folder: its keys, its name and, once installed, its certificate and the CA's.

    A renewal keeps the new TLS key in tls.key.new until the certificate for it is installed; what runs goes on with the
    old pair. A crash in between is healed by installing again.
    """

    path: Path

    @classmethod
    def create(cls, path: Path, name: str, days: int, passphrase: str | None = None) -> Home:
        """A new identity and a request for its first certificate.

        Args:
            days: how long the identity key endorses the TLS key.

        Raises:
            IdentityError: the folder holds an identity, or the name is none.
            OutputError: it cannot be written.
        """
        home = cls(path)
        identity = Identity.generate(check_name(name))
        if any((path / file).exists() for file in ("identity.key", "identity.json", "tls.key")):
            raise IdentityError(f"{path}: holds an identity", "Give another --home; an identity is never overwritten.")
        identity.save(path / "identity.key", passphrase)
        write_whole(path / f"{name}.pem", public_pem(identity.key))
        home._new_tls_key(path / "tls.key", identity, days, passphrase)
        write_whole(path / "identity.json", canonical({"name": name, "key": identity.key}) + b"\n")
        return home

    def renew(self, days: int, passphrase: str | None = None) -> None:
        """A new TLS key, endorsed by the same identity key, and its request; what is installed stays in use.

        Raises:
            IdentityError: no identity here, or its key cannot be opened.
            OutputError: it cannot be written.
        """
        self._new_tls_key(self.pending_key, self.identity(passphrase), days, passphrase)

    def _new_tls_key(self, path: Path, identity: Identity, days: int, passphrase: str | None) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        write_private_key(path, key, passphrase)
        write_whole(self.path / f"{identity.name}.csr", make_request(identity, key, days))

    def install(self, pem: bytes, passphrase: str | None = None) -> PeerCertificate:
        """Check the file that `ConnectionCA.issue` made and put it to use, with the TLS key that it is for.

        Raises:
            IdentityError: why it does not fit this home.
            OutputError: it cannot be written.
        """
        now = datetime.now(UTC)
        leaf, ca_pem = split_chain(pem)
        found = check_chain(leaf, ca_pem, now)
        if found.name != self.name():
            raise IdentityError(f"a certificate of {found.name}; this is the home of {self.name()}", _ASK)
        check_peer(found, {self.name(): self.key()}, now, None)
        fits = [
            path
            for path in (self.tls_key, self.pending_key)
            if path.exists() and spki_sha256(self._tls_key(path, passphrase).public_key()) == found.spki_sha256
        ]
        if not fits:
            raise IdentityError(f"{self.path}: the certificate is for a TLS key that is not here", _ASK)
        write_whole(self.path / "ca.crt", ca_pem)
        write_whole(self.path / "tls.crt", pem)
        if fits == [self.pending_key]:
            os.replace(self.pending_key, self.tls_key)
            fsync_folder(self.path)
        return found

    @property
    def identity_key(self) -> Path:
        """The file of the private identity key."""
        return self.path / "identity.key"

    @property
    def tls_key(self) -> Path:
        """The file of the private TLS key in use."""
        return self.path / "tls.key"

    @property
    def pending_key(self) -> Path:
        """The file of the TLS key of a renewal that waits for its certificate; mostly there is none."""
        return self.path / "tls.key.new"

    def name(self) -> str:
        """The organisation's name.

        Raises:
            IdentityError: no identity here.
        """
        return self._named()["name"]

    def key(self) -> str:
        """The public identity key, 64 hex digits.

        Raises:
            IdentityError: no identity here.
        """
        return self._named()["key"]

    def identity(self, passphrase: str | None = None) -> Identity:
        """The name with its private identity key.

        Raises:
            IdentityError: no identity here, its key cannot be opened, or it is another one.
        """
        self._must_exist(self.identity_key, "Restore it from a backup: nobody else has it.")
        identity = Identity.load(self.name(), self.identity_key, passphrase)
        if identity.key != self.key():
            raise IdentityError(f"{self.identity_key}: not the key that identity.json names", "Restore both.")
        return identity

    def tls_key_pem(self, passphrase: str | None = None) -> bytes:
        """The private TLS key, not encrypted, as gRPC takes it. Keep it in memory.

        Raises:
            IdentityError: no identity here, the key cannot be opened, or it is not the installed certificate's.
        """
        self._must_exist(self.tls_key, f"Run: hansa identity renew --home {self.path}")
        key = self._tls_key(self.tls_key, passphrase)
        installed = self.path / "tls.crt"
        if installed.exists():
            spki = read_certificate(read_file(installed, _ASK)).spki_sha256
            if spki != spki_sha256(key.public_key()):
                raise IdentityError(f"{self.path}: tls.key and tls.crt do not fit", self._install_hint())
        form = serialization.PrivateFormat.PKCS8
        return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())

    def tls_certificate(self) -> bytes:
        """The installed certificate, then the CA's, as gRPC takes them.

        Raises:
            IdentityError: no identity here, nothing installed, or it expired.
        """
        self._must_exist(self.path / "tls.crt", self._install_hint())
        pem = read_file(self.path / "tls.crt", self._install_hint())
        until = read_certificate(pem).not_after
        if datetime.now(UTC) >= until:
            when = f"{until:%Y-%m-%d %H:%M} UTC"
            raise IdentityError(
                f"{self.path}: the certificate expired on {when}", f"Run: hansa identity renew --home {self.path}"
            )
        return pem

    def ca_certificate(self) -> bytes:
        """The certificate of the CA that admits connections.

        Raises:
            IdentityError: no identity here, or nothing installed.
        """
        self._must_exist(self.path / "ca.crt", self._install_hint())
        return read_file(self.path / "ca.crt", self._install_hint())

    def _install_hint(self) -> str:
        return f"Run: hansa identity install NAME.crt --home {self.path}   (NAME.crt comes from the coordinator)"

    def _must_exist(self, path: Path, hint: str) -> None:
        self._named()  # where there is no identity at all, that is what to say
        if not path.exists():
            raise IdentityError(f"{path}: missing", hint)

    def _tls_key(self, path: Path, passphrase: str | None) -> ec.EllipticCurvePrivateKey:
        key: PrivateKeyTypes = read_private_key(path, passphrase)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
            raise IdentityError(f"{path}: not an ECDSA P-256 key", "TLS keys are P-256: hansa identity renew")
        return key

    def _named(self) -> dict[str, str]:
        path = self.path / "identity.json"
        if not path.exists():
            raise IdentityError(
                f"{self.path}: no identity here",
                "Run: hansa identity new --name NAME   (or give --home, or HANSA_HOME)",
            )
        try:
            said: Any = strict_json(read_file(path, "Restore it from a backup."))
            public_pem(said["key"])
            found = {"name": check_name(said["name"]), "key": said["key"]}
        except (MessageError, KeyError, TypeError, ValueError) as err:
            raise IdentityError(f"{path}: does not name an identity", "Restore it from a backup.") from err
        return found


_ASK = "Ask the coordinator for the certificate of the NAME.csr in this folder."
