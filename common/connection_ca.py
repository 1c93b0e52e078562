"""The CA that admits connections, no more: it issues certificates, keeps what it issued, and revokes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from .certificates import (
    RENEW,
    SKEW,
    PeerCertificate,
    RevocationList,
    common_name,
    endorsement_extension,
    read_ca,
    read_certificate,
    read_crl,
    read_request,
    reading,
    spki_sha256,
)
from .errors import IdentityError
from .identity import read_file, read_private_key, write_private_key, write_whole

CA_DAYS = 3650


class ConnectionCA:
    """Admits connections, no more: ca.key, ca.crt, issued/SERIAL.crt and revoked.crl in one folder.

    Attributes:
        folder: where it lives.
        certificate: its own certificate, PEM.
    """

    def __init__(self, folder: Path, key: ec.EllipticCurvePrivateKey, certificate: bytes) -> None:
        self.folder = folder
        self.certificate = certificate
        self._key = key
        self._x509 = read_ca(certificate)

    @classmethod
    def exists(cls, folder: Path) -> bool:
        """Whether the folder holds a CA, or what is left of one."""
        return any((folder / name).exists() for name in ("ca.key", "ca.crt", "revoked.crl", "issued"))

    @classmethod
    def create(cls, folder: Path, passphrase: str | None = None) -> ConnectionCA:
        """A new CA, valid for ten years, that has revoked nothing.

        Raises:
            IdentityError: the folder holds one.
            OutputError: it cannot be written.
        """
        if cls.exists(folder):
            raise IdentityError(f"{folder}: holds a CA", "Give another folder; a CA is never overwritten.")
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC).replace(microsecond=0)
        subject = common_name(f"Hansa connection CA {spki_sha256(key.public_key())[:16]}")
        usage = _key_usage(key_cert_sign=True, crl_sign=True)
        made = (
            _builder(subject, subject, key.public_key(), key.public_key(), now, now + timedelta(days=CA_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(key, hashes.SHA256())
        )
        ca = cls(folder, key, made.public_bytes(serialization.Encoding.PEM))
        write_private_key(folder / "ca.key", key, passphrase)
        ca._write_list([], 1, now)
        write_whole(folder / "ca.crt", ca.certificate)
        return ca

    @classmethod
    def load(cls, folder: Path, passphrase: str | None = None) -> ConnectionCA:
        """Open a CA.

        Raises:
            IdentityError: missing, incomplete, its key readable by others or not to be opened, or key and certificate
                do not fit.
        """
        if not cls.exists(folder):
            raise IdentityError(f"{folder}: no CA here", "Run: hansa identity issue NAME.csr --ca FOLDER")
        certificate = read_file(folder / "ca.crt", "Restore the CA's folder from a backup.")
        key = read_private_key(folder / "ca.key", passphrase)
        with reading("CA certificate"):
            ca = x509.load_pem_x509_certificate(certificate)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != ca.public_key():
            raise IdentityError(f"{folder}: ca.key and ca.crt do not fit", "Restore the CA's folder from a backup.")
        return cls(folder, key, certificate)

    def issue(self, csr_pem: bytes, days: int) -> bytes:
        """A certificate for both ends of a connection, recorded under issued/: PEM of the leaf, then of the CA.

        Args:
            days: its lifetime; it ends earlier where the endorsement or the CA does.

        Raises:
            IdentityError: a request that does not fit together, or for a TLS key that was revoked.
            OutputError: it cannot be recorded.
        """
        request = read_request(csr_pem)
        now = datetime.now(UTC).replace(microsecond=0)
        spki, until = request.endorsement.spki_sha256, request.endorsement.not_after
        if now >= until:
            raise IdentityError(f"the endorsement in the request of {request.name} expired", RENEW)
        if now + SKEW < request.endorsement.not_before:
            raise IdentityError(f"the request of {request.name} is from the future", "Is one of the clocks wrong?")
        revoked = self.revoked().revoked
        if any(c.serial in revoked and c.spki_sha256 == spki for c in self.issued()):
            raise IdentityError(f"the TLS key of {request.name} was revoked", RENEW)
        not_after = min(now + timedelta(days=days), until, self._valid_until(now))
        name, own = common_name(request.name), self._key.public_key()
        leaf = (
            _builder(name, self._x509.subject, request.tls_key, own, now, not_after)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(request.name)]), critical=False)
            .add_extension(endorsement_extension(request.envelope), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        pem = leaf.public_bytes(serialization.Encoding.PEM) + self.certificate
        write_whole(self.folder / "issued" / f"{leaf.serial_number:x}.crt", pem)
        return pem

    def issued(self) -> tuple[PeerCertificate, ...]:
        """Every certificate on record, oldest first.

        Raises:
            IdentityError: a record that is unreadable.
        """
        found = [read_certificate(read_file(p, "Restore it.")) for p in (self.folder / "issued").glob("[0-9a-f]*.crt")]
        return tuple(sorted(found, key=lambda c: (c.not_before, c.serial)))

    def revoked(self) -> RevocationList:
        """What this CA revoked.

        Raises:
            IdentityError: the list is missing (it would un-revoke everything), malformed or edited.
        """
        return RevocationList.parse(self._list(), self.certificate)

    def matching(self, which: str) -> tuple[PeerCertificate, ...]:
        """What `revoke` would revoke: one certificate by serial (hex), or all unexpired ones in a name.

        Raises:
            IdentityError: there is none that is not revoked already.
        """
        now, done = datetime.now(UTC), self.revoked().revoked
        serial = which.lower().replace(":", "").lstrip("0")  # as `openssl x509 -serial` and -text show it, too
        issued = self.issued()
        found = [c for c in issued if f"{c.serial:x}" == serial] or [
            c for c in issued if c.name == which and c.not_after > now
        ]
        found = [c for c in found if c.serial not in done]
        if not found:
            known = ", ".join(sorted({c.name for c in issued})) or "nobody"
            raise IdentityError(
                f"{self.folder}: no certificate of {which} to revoke (or revoked already)",
                f"It issued certificates to: {known}.",
            )
        return tuple(found)

    def revoke(self, which: str) -> tuple[PeerCertificate, ...]:
        """Add to revoked.crl what `matching` finds; the certificates.

        Raises:
            IdentityError: nothing to revoke.
            OutputError: the list cannot be written; the old one is untouched.
        """
        now = datetime.now(UTC).replace(microsecond=0)
        with _locked(self.folder):  # of two at once neither may be lost
            found = self.matching(which)
            old = read_crl(self._list(), self._x509)
            with reading("list of revoked certificates"):
                entries = [(entry.serial_number, entry.revocation_date_utc) for entry in old]
                number = old.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
            self._write_list([*entries, *((c.serial, now) for c in found)], number + 1, now)
        return found

    def _list(self) -> bytes:
        return read_file(
            self.folder / "revoked.crl", "Restore it from a backup: without it all that was revoked is valid."
        )

    def _write_list(self, entries: Sequence[tuple[int, datetime]], number: int, now: datetime) -> None:
        # X.509 wants a next update. The list changes when something is revoked, not by the calendar.
        crl = x509.CertificateRevocationListBuilder(self._x509.subject, now, self._valid_until(now))
        for serial, when in entries:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(when).build()
            crl = crl.add_revoked_certificate(entry)
        signed = (
            crl.add_extension(x509.CRLNumber(number), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        write_whole(self.folder / "revoked.crl", signed.public_bytes(serialization.Encoding.PEM))

    def _valid_until(self, now: datetime) -> datetime:
        end = self._x509.not_valid_after_utc
        if now >= end:
            raise IdentityError(
                f"{self.folder}: this CA expired on {end:%Y-%m-%d}", "Make a new one in another folder."
            )
        return end


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    by: ec.EllipticCurvePublicKey,
    now: datetime,
    not_after: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)  # the TLS stack of a partner whose clock is behind allows nothing
        .not_valid_after(not_after)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(by), critical=False)
    )


def _key_usage(**used: bool) -> x509.KeyUsage:
    no = dict.fromkeys(
        ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
         "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"), False,
    )  # fmt: skip
    return x509.KeyUsage(**(no | used))
