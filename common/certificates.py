"""Endorsed TLS keys, the connection CA, the list of revoked certificates, and an organisation's home folder.

The root of trust is the charter: there stands each organisation's Ed25519 identity key. That key *endorses* the
organisation's TLS key (ECDSA P-256) for a lifetime. The endorsement is one signed envelope; it travels inside the
certificate request and the certificate as an extension that other software ignores. A CA certificate only admits a
connection: whoever runs the CA can issue a valid certificate in anybody's name, but cannot endorse its key. So `check_peer`
believes the endorsement and nothing else.

Only public halves leave a home folder: `NAME.csr`, `NAME.pem`, certificates.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from pydantic import TypeAdapter, ValidationError

from .config import Name
from .errors import IdentityError, MessageError
from .identity import (
    Identity,
    canonical,
    fsync_folder,
    public_pem,
    read_envelope,
    read_private_key,
    sha256,
    strict_json,
    write_private_key,
    write_whole,
)

ENDORSEMENT_TYPE = "application/vnd.hansa.endorsement+json"
ENDORSEMENT_OID = x509.ObjectIdentifier("2.25.151277365957606221743317446433421328108")
"""From the arc of UUIDs (ITU-T X.667), which needs no registration."""
SKEW = timedelta(hours=25)
"""How far a partner's clock may be behind, a wrong time zone included; it never lengthens a lifetime."""
CA_DAYS = 3650


# -- endorsements ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Endorsement:
    """What an identity key says about a TLS key. Whether `key` is anybody's, the charter knows.

    Attributes:
        key: the identity key that signed it (64 hex digits).
        spki_sha256: SHA-256 of the TLS key's SubjectPublicKeyInfo (64 hex digits).
        not_before, not_after: UTC; valid before `not_after`, not at it.
    """

    key: str
    name: str
    spki_sha256: str
    not_before: datetime
    not_after: datetime


def endorse(identity: Identity, spki: str, not_before: datetime, not_after: datetime) -> bytes:
    """One envelope: this identity's TLS key is the one with that SHA-256, for that time."""
    said = {"name": identity.name, "not_after": _text(not_after), "not_before": _text(not_before), "spki_sha256": spki}
    return identity.seal(ENDORSEMENT_TYPE, canonical({"v": 1, **said}))


def read_endorsement(envelope: bytes) -> Endorsement:
    """Parse an endorsement and check the signature by the key that it names.

    Raises:
        IdentityError: malformed, edited, or not signed by exactly one key.
    """
    try:
        read = read_envelope(envelope, ENDORSEMENT_TYPE)
        if len(read.signatures) != 1:
            raise IdentityError("an endorsement that is not signed by exactly one key")
        key = read.signatures[0][0]
        read.signed_by(key)
        said = strict_json(read.payload)
        found = Endorsement(key, said["name"], said["spki_sha256"], _time(said["not_before"]), _time(said["not_after"]))
        lasting = {"not_after": _text(found.not_after), "not_before": _text(found.not_before)}
        whole = canonical(
            {"v": 1, "name": _NAME.validate_python(found.name), "spki_sha256": found.spki_sha256, **lasting}
        )
        if whole != read.payload or not re.fullmatch("[0-9a-f]{64}", found.spki_sha256):
            raise IdentityError("an endorsement in an unusual layout")
    except MessageError as err:
        raise IdentityError(f"the endorsement is no good: {err.message}") from err
    except (KeyError, TypeError, ValueError) as err:
        raise IdentityError("the endorsement does not say what an endorsement says") from err
    return found


_NAME: TypeAdapter[str] = TypeAdapter(Name)
_TIME = "%Y-%m-%dT%H:%M:%SZ"


def _text(time: datetime) -> str:
    return time.astimezone(UTC).strftime(_TIME)


def _time(text: str) -> datetime:
    return datetime.strptime(text, _TIME).replace(tzinfo=UTC)


def spki_sha256(key: PublicKeyTypes) -> str:
    """SHA-256 of a public key's SubjectPublicKeyInfo in DER, as 64 hex digits."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return sha256(key.public_bytes(serialization.Encoding.DER, form))


def grouped(digest: str) -> str:
    """The first 20 bytes of a hex digest in groups of four digits, as people read fingerprints out."""
    return " ".join(digest[i : i + 4] for i in range(0, 40, 4))


# -- requests and certificates ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """A certificate request whose parts fit together: same name, same TLS key, endorsed by `endorsement.key`."""

    name: str
    endorsement: Endorsement
    envelope: bytes
    tls_key: ec.EllipticCurvePublicKey


def make_request(identity: Identity, tls_key: ec.EllipticCurvePrivateKey, days: int) -> bytes:
    """A certificate request (PEM) with the endorsement of its own key for `days` from now."""
    now = datetime.now(UTC).replace(microsecond=0)
    envelope = endorse(identity, spki_sha256(tls_key.public_key()), now, now + timedelta(days=days))
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(_common_name(identity.name))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(identity.name)]), critical=False)
        .add_extension(_extension(envelope), critical=False)
        .sign(tls_key, hashes.SHA256())
    )
    return request.public_bytes(serialization.Encoding.PEM)


def read_request(pem: bytes) -> Request:
    """Parse a certificate request and check that its endorsement fits it.

    Raises:
        IdentityError: malformed, edited, another kind of key, or an endorsement of another key or name.
    """
    with _reading("certificate request"):
        request = x509.load_pem_x509_csr(pem)
        tls_key = request.public_key()
        if not isinstance(tls_key, ec.EllipticCurvePublicKey) or not isinstance(tls_key.curve, ec.SECP256R1):
            raise IdentityError("a request for another kind of TLS key", "TLS keys are ECDSA P-256.")
        if not request.is_signature_valid:
            raise IdentityError("the request is not signed by its own TLS key (edited?)", "Ask for the file again.")
        name = _named(request.subject, request.extensions)
        envelope = _envelope_in(request.extensions)
    if not envelope:
        raise IdentityError(f"the request of {name} has no endorsement", "Make it with: hansa identity new")
    endorsement = read_endorsement(envelope)
    if endorsement.name != name:
        raise IdentityError(f"a request in the name {name} with the endorsement of {endorsement.name}", _REFUSE)
    if endorsement.spki_sha256 != spki_sha256(tls_key):
        raise IdentityError(f"the request of {name} carries an endorsement for another TLS key", _REFUSE)
    return Request(name, endorsement, envelope, tls_key)


@dataclass(frozen=True)
class PeerCertificate:
    """What a certificate says. Nothing of it is believed before `check_peer`.

    Attributes:
        name: from the subject alternative name; the common name says the same.
        spki_sha256: of its TLS key, 64 hex digits.
        endorsement: the envelope; empty when there is none.
        fingerprint: SHA-256 of the certificate in DER, 64 hex digits.
        pem: the leaf alone.
    """

    name: str
    spki_sha256: str
    serial: int
    not_before: datetime
    not_after: datetime
    issuer: str
    endorsement: bytes
    fingerprint: str
    pem: bytes


def read_certificate(pem: bytes) -> PeerCertificate:
    """Parse the first certificate of a PEM file; no signature is checked here.

    Raises:
        IdentityError: malformed, or not in one organisation's name.
    """
    with _reading("certificate"):
        leaf = x509.load_pem_x509_certificates(pem)[0]
        return PeerCertificate(
            name=_named(leaf.subject, leaf.extensions),
            spki_sha256=spki_sha256(leaf.public_key()),
            serial=leaf.serial_number,
            not_before=leaf.not_valid_before_utc,
            not_after=leaf.not_valid_after_utc,
            issuer=leaf.issuer.rfc4514_string(),
            endorsement=_envelope_in(leaf.extensions),
            fingerprint=leaf.fingerprint(hashes.SHA256()).hex(),
            pem=leaf.public_bytes(serialization.Encoding.PEM),
        )


def check_peer(certificate: PeerCertificate, keys: Mapping[str, str], now: datetime, crl: RevocationList | None) -> str:
    """The charter name of the peer that a TLS handshake authenticated with this certificate.

    TLS has shown that the peer holds the certificate's key and that the CA admits it; this shows whose key it is.

    Args:
        keys: name -> identity key (64 hex digits), from the charter.
        crl: what the CA revoked; None leaves revocation out.

    Raises:
        IdentityError: why this peer is refused.
    """
    name = certificate.name
    if not certificate.endorsement:
        raise IdentityError(f"the certificate of {name} has no endorsement", _REFUSE)
    endorsement = read_endorsement(certificate.endorsement)
    if name not in keys:
        raise IdentityError(f"{name} does not stand in the charter", "Only who stands in the charter may connect.")
    if endorsement.key != keys[name] or endorsement.name != name:
        raise IdentityError(
            f"a valid certificate in {name}'s name, but its TLS key is not endorsed by {name}'s identity key", _REFUSE
        )
    if endorsement.spki_sha256 != certificate.spki_sha256:
        raise IdentityError(f"the certificate of {name} carries an endorsement for another TLS key", _REFUSE)
    for what, span in (("certificate", certificate), ("endorsement", endorsement)):
        if now + SKEW < span.not_before:
            when = f"{span.not_before:%Y-%m-%d %H:%M} UTC"
            raise IdentityError(f"the {what} of {name} is valid only from {when}", "Is one of the clocks wrong?")
        if now >= span.not_after:
            when = f"{span.not_after:%Y-%m-%d %H:%M} UTC"
            raise IdentityError(f"the {what} of {name} expired on {when}", f"{name} renews it: hansa identity renew")
    if crl is not None and certificate.serial in crl.revoked:
        raise IdentityError(f"the certificate of {name} (serial {certificate.serial:x}) is revoked", _RENEW)
    return name


def check_chain(pem: bytes, ca_pem: bytes, now: datetime) -> PeerCertificate:
    """The first certificate of a PEM file, if that CA issued it.

    Raises:
        IdentityError: malformed, issued by another CA or by itself, or the CA expired.
    """
    found = read_certificate(pem)
    ca = _ca(ca_pem)
    with _reading("certificate"):
        leaf = x509.load_pem_x509_certificate(found.pem)
        try:
            leaf.verify_directly_issued_by(ca)
        except (ValueError, TypeError, InvalidSignature) as err:
            raise IdentityError(
                f"the certificate of {found.name} was not issued by {ca.subject.rfc4514_string()}",
                "Ask the coordinator for the certificate and its CA again.",
            ) from err
    if now >= ca.not_valid_after_utc:
        raise IdentityError("the CA's own certificate expired", "The coordinator makes a new CA and issues again.")
    return found


def split_chain(pem: bytes) -> tuple[bytes, bytes]:
    """A PEM file of `ConnectionCA.issue` as (leaf, CA certificate).

    Raises:
        IdentityError: malformed, or not exactly these two.
    """
    with _reading("certificate"):
        parts = [c.public_bytes(serialization.Encoding.PEM) for c in x509.load_pem_x509_certificates(pem)]
    if len(parts) != 2:
        raise IdentityError(
            f"a file with {len(parts)} certificate(s), wanted the organisation's and the CA's",
            "Use the file that `hansa identity issue` wrote.",
        )
    return parts[0], parts[1]


_REFUSE = "Do not accept it; ask the coordinator and the organisation by phone what happened."
_RENEW = "For a new one its owner makes a new TLS key: hansa identity renew"
_MALFORMED = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.UnsupportedGeneralNameType,
)
"""What `cryptography` raises over bytes of a peer."""


@contextmanager
def _reading(what: str) -> Iterator[None]:
    try:
        yield
    except _MALFORMED as err:
        raise IdentityError(f"not a {what} of Hansa in PEM form: {err}", "Ask for the file again.") from err


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _named(subject: x509.Name, extensions: x509.Extensions) -> str:
    alternative = list(extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    if len(alternative) != 1 or not isinstance(alternative[0], x509.DNSName):
        raise ValueError("it is not in exactly one name")
    name = alternative[0].value
    if subject != _common_name(name):
        raise ValueError("its common name is not its alternative name")
    return check_name(name)


def check_name(name: str) -> str:
    """The name, if an organisation may have it.

    Raises:
        IdentityError: it may not.
    """
    try:
        return _NAME.validate_python(name)
    except ValidationError as err:
        hint = "Lowercase letters, digits and hyphens; at most 63; no hyphen at either end."
        raise IdentityError(f"not a name of an organisation: {name!r}", hint) from err


def _extension(envelope: bytes) -> x509.UnrecognizedExtension:
    """The envelope as a DER UTF8String; envelopes have 256 to 65,535 bytes, so its length has one form."""
    return x509.UnrecognizedExtension(ENDORSEMENT_OID, b"\x0c\x82" + len(envelope).to_bytes(2, "big") + envelope)


def _envelope_in(extensions: x509.Extensions) -> bytes:
    for extension in extensions:
        if extension.oid == ENDORSEMENT_OID and isinstance(extension.value, x509.UnrecognizedExtension):
            envelope = extension.value.value[4:]
            if len(envelope) > 0xFFFF or not envelope or _extension(envelope) != extension.value:
                raise ValueError("its endorsement is not encoded as one")
            return envelope
    return b""


def _ca(pem: bytes) -> x509.Certificate:
    with _reading("CA certificate"):
        ca = x509.load_pem_x509_certificate(pem)
        if not ca.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            raise ValueError("it is not a CA's")
        return ca


# -- revocation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RevocationList:
    """Serial numbers of the certificates that a CA revoked."""

    revoked: frozenset[int] = frozenset()

    @classmethod
    def parse(cls, data: bytes, ca_cert_pem: bytes) -> RevocationList:
        """Read a CRL (PEM) and check the CA's signature.

        Raises:
            IdentityError: malformed, edited, or of another CA.
        """
        return cls(frozenset(serial for serial, _ in _entries(_crl(data, _ca(ca_cert_pem)))))

    @classmethod
    def load(cls, path: Path, ca_cert_pem: bytes) -> RevocationList:
        """Read a CRL file; where there is none, nothing is revoked.

        Raises:
            IdentityError: unreadable, malformed, edited, or of another CA.
        """
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return cls()
        except OSError as err:
            raise IdentityError(f"{path}: {err.strerror}", "Give the revoked.crl that the CA wrote.") from err
        try:
            return cls.parse(data, ca_cert_pem)
        except IdentityError as err:
            raise IdentityError(f"{path}: {err.message}", err.hint) from err


def _crl(data: bytes, ca: x509.Certificate) -> x509.CertificateRevocationList:
    with _reading("list of revoked certificates"):
        crl = x509.load_pem_x509_crl(data)
        key = ca.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise ValueError("its CA is not one of Hansa")
        if crl.issuer != ca.subject or not crl.is_signature_valid(key):
            raise IdentityError(
                "a list of revoked certificates that this CA did not sign",
                "Get revoked.crl from the coordinator again.",
            )
        return crl


def _entries(crl: x509.CertificateRevocationList) -> list[tuple[int, datetime]]:
    with _reading("list of revoked certificates"):
        return [(entry.serial_number, entry.revocation_date_utc) for entry in crl]


# -- the CA ----------------------------------------------------------------------------------------------------------


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
        self._x509 = _ca(certificate)

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
        subject = _common_name(f"Hansa connection CA {spki_sha256(key.public_key())[:16]}")
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
        certificate = _read(folder / "ca.crt", "Restore the CA's folder from a backup.")
        key = read_private_key(folder / "ca.key", passphrase)
        with _reading("CA certificate"):
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
            raise IdentityError(f"the endorsement in the request of {request.name} expired", _RENEW)
        if now + SKEW < request.endorsement.not_before:
            raise IdentityError(f"the request of {request.name} is from the future", "Is one of the clocks wrong?")
        revoked = self.revoked().revoked
        if any(c.serial in revoked and c.spki_sha256 == spki for c in self.issued()):
            raise IdentityError(f"the TLS key of {request.name} was revoked", _RENEW)
        not_after = min(now + timedelta(days=days), until, self._valid_until(now))
        name, own = _common_name(request.name), self._key.public_key()
        leaf = (
            _builder(name, self._x509.subject, request.tls_key, own, now, not_after)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(request.name)]), critical=False)
            .add_extension(_extension(request.envelope), critical=False)
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
        found = [read_certificate(_read(p, "Restore it.")) for p in (self.folder / "issued").glob("[0-9a-f]*.crt")]
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
            old = _crl(self._list(), self._x509)
            with _reading("list of revoked certificates"):
                number = old.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
            self._write_list([*_entries(old), *((c.serial, now) for c in found)], number + 1, now)
        return found

    def _list(self) -> bytes:
        return _read(self.folder / "revoked.crl", "Restore it from a backup: without it all that was revoked is valid.")

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


def _read(path: Path, hint: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as err:
        raise IdentityError(f"{path}: {err.strerror}", hint) from err


# -- an organisation's home ------------------------------------------------------------------------------------------


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
            spki = read_certificate(_read(installed, _ASK)).spki_sha256
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
        pem = _read(self.path / "tls.crt", self._install_hint())
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
        return _read(self.path / "ca.crt", self._install_hint())

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
            said: Any = strict_json(_read(path, "Restore it from a backup."))
            public_pem(said["key"])
            found = {"name": check_name(said["name"]), "key": said["key"]}
        except (MessageError, KeyError, TypeError, ValueError) as err:
            raise IdentityError(f"{path}: does not name an identity", "Restore it from a backup.") from err
        return found


_ASK = "Ask the coordinator for the certificate of the NAME.csr in this folder."
