"""Organisations with TLS keys, and requests and certificates as an attacker makes them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from hansa.common.certificates import (
    ENDORSEMENT_OID,
    RevocationList,
    check_peer,
    endorse,
    make_request,
    read_certificate,
    spki_sha256,
)
from hansa.common.connection_ca import ConnectionCA
from hansa.common.errors import IdentityError
from hansa.common.identity import Identity

ADA, BEN, EVE = (Identity.generate(name) for name in ("ada", "ben", "eve"))
KEYS = {"ada": ADA.key, "ben": BEN.key}
NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
PEM = serialization.Encoding.PEM


def tls() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


ADA_TLS, BEN_TLS = tls(), tls()
ADA_CSR = make_request(ADA, ADA_TLS, 30)


def spki(key: Any) -> str:
    return spki_sha256(key.public_key())


def endorsed(who: Identity, key: Any, *, before: datetime = NOW - DAY, after: datetime = NOW + DAY) -> bytes:
    return endorse(who, spki(key), before, after)


def wrapped(envelope: bytes) -> x509.UnrecognizedExtension:
    return x509.UnrecognizedExtension(ENDORSEMENT_OID, b"\x0c\x82" + len(envelope).to_bytes(2, "big") + envelope)


def common(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])


def request(name: str, key: Any, extension: x509.UnrecognizedExtension | None, alternative: list[str]) -> bytes:
    """A request as an attacker makes one, without our code."""
    made = x509.CertificateSigningRequestBuilder().subject_name(common(name))
    if alternative:
        names = [x509.DNSName(n) for n in alternative]
        made = made.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if extension is not None:
        made = made.add_extension(extension, critical=False)
    return made.sign(key, hashes.SHA256()).public_bytes(PEM)


def forged(
    name: str,
    key: Any,
    extension: x509.UnrecognizedExtension | None,
    ca: ConnectionCA | None,
    *,
    before: datetime = NOW - DAY,
    after: datetime = NOW + DAY,
) -> bytes:
    """A certificate as the holder of the CA's key can always make one; without a CA a self-signed one."""
    made = (
        x509.CertificateBuilder()
        .subject_name(common(name))
        .issuer_name(ca._x509.subject if ca else common(name))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(before)
        .not_valid_after(after)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    )
    if extension is not None:
        made = made.add_extension(extension, critical=False)
    return made.sign(ca._key if ca else key, hashes.SHA256()).public_bytes(PEM) + (ca.certificate if ca else b"")


def refused(words: str, pem: bytes, now: datetime = NOW, crl: RevocationList | None = None) -> None:
    with pytest.raises(IdentityError, match=words):
        check_peer(read_certificate(pem), KEYS, now, crl)
