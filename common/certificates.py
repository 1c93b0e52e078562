"""Certificate requests and certificates whose TLS key an identity key endorsed: made, read, and checked before belief.

The root of trust is the charter: there stands each organisation's Ed25519 identity key. That key *endorses* the
organisation's TLS key (ECDSA P-256) for a lifetime. The endorsement is one signed envelope; it travels inside the
certificate request and the certificate as an extension that other software ignores. A CA certificate only admits a
connection: whoever runs the CA can issue a valid certificate in anybody's name, but cannot endorse its key. So `check_peer`
believes the endorsement and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InternalError, InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.x509.oid import NameOID
from pydantic import TypeAdapter, ValidationError

from .config import Name
from .errors import IdentityError, MessageError, counted
from .identity import Identity, canonical, read_envelope, sha256, strict_json

ENDORSEMENT_TYPE = "application/vnd.hansa.endorsement+json"
ENDORSEMENT_OID = x509.ObjectIdentifier("2.25.151277365957606221743317446433421328108")
"""From the arc of UUIDs (ITU-T X.667), which needs no registration."""
SKEW = timedelta(hours=25)
"""How far a partner's clock may be behind, a wrong time zone included; it never lengthens a lifetime."""
RENEW = "For a new one its owner makes a new TLS key: hansa identity renew"


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
        .subject_name(common_name(identity.name))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(identity.name)]), critical=False)
        .add_extension(endorsement_extension(envelope), critical=False)
        .sign(tls_key, hashes.SHA256())
    )
    return request.public_bytes(serialization.Encoding.PEM)


def read_request(pem: bytes) -> Request:
    """Parse a certificate request and check that its endorsement fits it.

    Raises:
        IdentityError: malformed, edited, another kind of key, or an endorsement of another key or name.
    """
    with reading("certificate request"):
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
    with reading("certificate"):
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
        raise IdentityError(f"the certificate of {name} (serial {certificate.serial:x}) is revoked", RENEW)
    return name


def check_chain(pem: bytes, ca_pem: bytes, now: datetime) -> PeerCertificate:
    """The first certificate of a PEM file, if that CA issued it.

    Raises:
        IdentityError: malformed, issued by another CA or by itself, or the CA expired.
    """
    found = read_certificate(pem)
    ca = read_ca(ca_pem)
    with reading("certificate"):
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
    with reading("certificate"):
        parts = [c.public_bytes(serialization.Encoding.PEM) for c in x509.load_pem_x509_certificates(pem)]
    if len(parts) != 2:
        raise IdentityError(
            f"a file with {counted(len(parts), 'certificate')}, wanted the organisation's and the CA's",
            "Use the file that `hansa identity issue` wrote.",
        )
    return parts[0], parts[1]


_REFUSE = "Do not accept it; ask the coordinator and the organisation by phone what happened."
_MALFORMED = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    InternalError,  # OpenSSL, of a key of another kind than it says
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.UnsupportedGeneralNameType,
)
"""What `cryptography` raises over bytes of a peer."""


@contextmanager
def reading(what: str) -> Iterator[None]:
    """What `cryptography` raises over bytes of another becomes an IdentityError, which calls them `what`."""
    try:
        yield
    except _MALFORMED as err:
        raise IdentityError(f"not a {what} of Hansa in PEM form: {err}", "Ask for the file again.") from err


def common_name(name: str) -> x509.Name:
    """The one form of subject and issuer that Hansa writes and takes."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _named(subject: x509.Name, extensions: x509.Extensions) -> str:
    alternative = list(extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    if len(alternative) != 1 or not isinstance(alternative[0], x509.DNSName):
        raise ValueError("it is not in exactly one name")
    name = alternative[0].value
    if subject != common_name(name):
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


def endorsement_extension(envelope: bytes) -> x509.UnrecognizedExtension:
    """The envelope as a DER UTF8String; envelopes have 256 to 65,535 bytes, so its length has one form."""
    return x509.UnrecognizedExtension(ENDORSEMENT_OID, b"\x0c\x82" + len(envelope).to_bytes(2, "big") + envelope)


def _envelope_in(extensions: x509.Extensions) -> bytes:
    for extension in extensions:
        if extension.oid == ENDORSEMENT_OID and isinstance(extension.value, x509.UnrecognizedExtension):
            envelope = extension.value.value[4:]
            if len(envelope) > 0xFFFF or not envelope or endorsement_extension(envelope) != extension.value:
                raise ValueError("its endorsement is not encoded as one")
            return envelope
    return b""


def read_ca(pem: bytes) -> x509.Certificate:
    """Parse a CA's own certificate.

    Raises:
        IdentityError: malformed, or not a CA's.
    """
    with reading("CA certificate"):
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
        with reading("list of revoked certificates"):
            return cls(frozenset(entry.serial_number for entry in read_crl(data, read_ca(ca_cert_pem))))

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


def read_crl(data: bytes, ca: x509.Certificate) -> x509.CertificateRevocationList:
    """Parse a CRL (PEM) and check the CA's signature.

    Raises:
        IdentityError: malformed, edited, or of another CA.
    """
    with reading("list of revoked certificates"):
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
