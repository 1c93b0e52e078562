"""TLS keys endorsed by identity keys, the CA that only admits, revocation, and an organisation's home folder."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import socket
import ssl
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from hansa.common.certificates import (
    ENDORSEMENT_OID,
    ENDORSEMENT_TYPE,
    SKEW,
    PeerCertificate,
    RevocationList,
    check_chain,
    check_peer,
    endorse,
    make_request,
    read_certificate,
    read_endorsement,
    read_request,
    spki_sha256,
    split_chain,
)
from hansa.common.connection_ca import ConnectionCA
from hansa.common.errors import HansaError, IdentityError
from hansa.common.home import Home
from hansa.common.identity import (
    Envelope,
    Identity,
    canonical,
    key_from_pem,
    write_envelope,
    write_private_key,
    write_whole,
)

ADA, BEN, EVE = (Identity.generate(name) for name in ("ada", "ben", "eve"))
KEYS = {"ada": ADA.key, "ben": BEN.key}
NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
PEM = serialization.Encoding.PEM
needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")


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


@pytest.fixture
def ca(tmp_path: Path) -> ConnectionCA:
    return ConnectionCA.create(tmp_path / "ca")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> ConnectionCA:
    """For what changes nothing in it."""
    return ConnectionCA.create(tmp_path_factory.mktemp("ca") / "ca")


def refused(words: str, pem: bytes, now: datetime = NOW, crl: RevocationList | None = None) -> None:
    with pytest.raises(IdentityError, match=words):
        check_peer(read_certificate(pem), KEYS, now, crl)


# -- the honest way --------------------------------------------------------------------------------------------------


def test_an_issued_certificate_is_admitted(ca: ConnectionCA) -> None:
    pem = ca.issue(ADA_CSR, 10)
    leaf, root = split_chain(pem)
    assert root == ca.certificate
    found = check_chain(pem, ca.certificate, NOW)
    assert found == read_certificate(leaf)
    assert check_peer(found, KEYS, datetime.now(UTC), ca.revoked()) == "ada"
    assert (found.name, found.spki_sha256, found.pem) == ("ada", spki(ADA_TLS), leaf)
    assert found.not_after - found.not_before == 10 * DAY + SKEW
    assert 0 <= (datetime.now(UTC) - found.not_before - SKEW).total_seconds() < 60
    assert ca.issued() == (found,)
    assert stat.S_IMODE((ca.folder / "ca.key").stat().st_mode) == 0o600
    said = read_endorsement(found.endorsement)
    assert (said.key, said.name, said.spki_sha256) == (ADA.key, "ada", spki(ADA_TLS))
    assert read_request(ADA_CSR).endorsement == said


def test_the_profile_of_a_certificate(ca: ConnectionCA) -> None:
    leaf, root = x509.load_pem_x509_certificates(ca.issue(ADA_CSR, 10))
    other, _ = x509.load_pem_x509_certificates(ca.issue(ADA_CSR, 10))
    assert leaf.serial_number != other.serial_number
    assert leaf.serial_number.bit_length() > 64

    def said(of: x509.Certificate, kind: Any) -> Any:
        return of.extensions.get_extension_for_class(kind).value

    assert not said(leaf, x509.BasicConstraints).ca
    assert said(root, x509.BasicConstraints) == x509.BasicConstraints(ca=True, path_length=0)
    oid = x509.oid.ExtendedKeyUsageOID
    assert set(said(leaf, x509.ExtendedKeyUsage)) == {oid.SERVER_AUTH, oid.CLIENT_AUTH}
    assert said(leaf, x509.KeyUsage).digital_signature
    assert not said(leaf, x509.KeyUsage).key_cert_sign
    assert (said(root, x509.KeyUsage).key_cert_sign, said(root, x509.KeyUsage).crl_sign) == (True, True)
    authority = said(leaf, x509.AuthorityKeyIdentifier).key_identifier
    assert authority == said(root, x509.SubjectKeyIdentifier).digest != said(leaf, x509.SubjectKeyIdentifier).digest
    extension = leaf.extensions.get_extension_for_oid(x509.ObjectIdentifier(ENDORSEMENT_OID.dotted_string))
    assert not extension.critical
    # A certificate of version 1 must be found by every later version.
    assert ENDORSEMENT_OID.dotted_string == "2.25.151277365957606221743317446433421328108"


def test_a_certificate_never_outlives_the_endorsement(ca: ConnectionCA) -> None:
    found = read_certificate(ca.issue(ADA_CSR, 3000))
    assert found.not_after == read_endorsement(found.endorsement).not_after < NOW + 31 * DAY


def test_a_ca_is_loaded_and_never_overwritten(ca: ConnectionCA, tmp_path: Path) -> None:
    again = ConnectionCA.load(ca.folder)
    check_chain(again.issue(ADA_CSR, 1), ca.certificate, NOW)
    with pytest.raises(IdentityError, match="never overwritten"):
        ConnectionCA.create(ca.folder)
    with pytest.raises(IdentityError, match="no CA here"):
        ConnectionCA.load(tmp_path)
    (ca.folder / "ca.key").chmod(0o644)
    with pytest.raises(IdentityError, match="readable by others"):
        ConnectionCA.load(ca.folder)
    write_private_key(ca.folder / "ca.key", tls())
    with pytest.raises(IdentityError, match="do not fit"):
        ConnectionCA.load(ca.folder)
    (ca.folder / "ca.crt").unlink()
    with pytest.raises(IdentityError, match="backup"):
        ConnectionCA.load(ca.folder)
    with pytest.raises(IdentityError, match="holds a CA"):
        ConnectionCA.create(ca.folder)  # half a CA is none to build over


def test_an_encrypted_ca(tmp_path: Path) -> None:
    ConnectionCA.create(tmp_path / "ca", "sesame")
    assert b"ENCRYPTED" in (tmp_path / "ca" / "ca.key").read_bytes()
    for wrong in (None, "", "wrong"):
        with pytest.raises(IdentityError, match="passphrase"):
            ConnectionCA.load(tmp_path / "ca", wrong)
    ConnectionCA.load(tmp_path / "ca", "sesame").issue(ADA_CSR, 1)


# -- attacks on the CA -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pem", "words"),
    [
        (request("ben", BEN_TLS, wrapped(endorsed(ADA, ADA_TLS)), ["ben"]), "in the name ben with the endorsement of ada"),
        (request("ada", BEN_TLS, wrapped(endorsed(ADA, ADA_TLS)), ["ada"]), "for another TLS key"),
        (request("ada", ADA_TLS, None, ["ada"]), "has no endorsement"),
        (request("ada", ADA_TLS, wrapped(endorsed(ADA, ADA_TLS)), ["ada", "ben"]), "exactly one name"),
        (request("ada", ADA_TLS, wrapped(endorsed(ADA, ADA_TLS)), []), "certificate request"),
        (request("ben", ADA_TLS, wrapped(endorsed(ADA, ADA_TLS)), ["ada"]), "common name"),
        (request("*.org", ADA_TLS, wrapped(endorsed(ADA, ADA_TLS)), ["*.org"]), "not a name"),
        (request("ada", ADA_TLS, x509.UnrecognizedExtension(ENDORSEMENT_OID, endorsed(ADA, ADA_TLS)), ["ada"]), "encoded"),
        (request("ada", ADA_TLS, x509.UnrecognizedExtension(ENDORSEMENT_OID, b"\x0c"), ["ada"]), "encoded"),
        (request("ada", ADA_TLS, wrapped(endorsed(ADA, ADA_TLS, after=NOW)), ["ada"]), "expired"),
        (request("ada", ADA_TLS, wrapped(endorsed(ADA, ADA_TLS, before=NOW + 2 * DAY, after=NOW + 3 * DAY)), ["ada"]), "from the future"),
        (make_request(ADA, ec.generate_private_key(ec.SECP384R1()), 1), "another kind of TLS key"),
        (make_request(ADA, rsa.generate_private_key(65537, 2048), 1), "another kind of TLS key"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_requests_that_are_refused(shared: ConnectionCA, pem: bytes, words: str) -> None:
    with pytest.raises(IdentityError, match=words):
        shared.issue(pem, 1)
    assert shared.issued() == ()


def test_an_endorsement_with_another_signature_is_refused(shared: ConnectionCA) -> None:
    """Eve puts ada's key on an endorsement that she signed herself."""
    envelope = endorsed(Identity("ada", EVE._private), BEN_TLS).replace(EVE.key.encode(), ADA.key.encode())
    with pytest.raises(IdentityError, match="bad signature"):
        shared.issue(request("ada", BEN_TLS, wrapped(envelope), ["ada"]), 1)


def test_a_request_proves_that_its_sender_has_the_tls_key(shared: ConnectionCA) -> None:
    """Ada's request with its signature changed: whoever sends it has not got the key."""
    der = bytearray(x509.load_pem_x509_csr(ADA_CSR).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    pem = x509.load_der_x509_csr(bytes(der)).public_bytes(PEM)
    with pytest.raises(IdentityError, match="not signed by its own TLS key"):
        shared.issue(pem, 1)


# -- attacks on a peer -----------------------------------------------------------------------------------------------


def test_the_coordinators_own_ca_cannot_speak_for_a_partner(shared: ConnectionCA) -> None:
    mine = tls()
    not_endorsed = "a valid certificate in ada's name, but its TLS key is not endorsed by ada's identity key"
    as_ada = Identity("ada", EVE._private)
    refused(not_endorsed, forged("ada", mine, wrapped(endorsed(as_ada, mine)), shared))
    refused(not_endorsed, forged("ada", mine, wrapped(endorsed(BEN, mine)), shared))
    refused(not_endorsed, forged("ada", mine, wrapped(endorsed(Identity("ada", BEN._private), mine)), shared))
    refused(not_endorsed, forged("ada", mine, wrapped(endorsed(Identity("ben", ADA._private), mine)), shared))
    refused("has no endorsement", forged("ada", mine, None, shared))
    refused("eve does not stand in the charter", forged("eve", mine, wrapped(endorsed(EVE, mine)), shared))


def test_an_endorsement_cannot_be_replayed_for_another_tls_key(shared: ConnectionCA) -> None:
    hers = read_certificate(shared.issue(ADA_CSR, 1)).endorsement
    refused("for another TLS key", forged("ada", tls(), wrapped(hers), shared))


def test_a_self_signed_certificate_is_refused(shared: ConnectionCA) -> None:
    pem = forged("ada", BEN_TLS, wrapped(endorsed(Identity("ada", BEN._private), BEN_TLS)), None)
    refused("not endorsed by ada's", pem)
    for chain in (pem, forged("ada", ADA_TLS, wrapped(endorsed(ADA, ADA_TLS)), None)):
        with pytest.raises(IdentityError, match="was not issued by"):
            check_chain(chain + shared.certificate, shared.certificate, NOW)


def test_another_ca_of_the_same_name_is_another_ca(shared: ConnectionCA, ca: ConnectionCA) -> None:
    pem = ca.issue(ADA_CSR, 1)
    with pytest.raises(IdentityError, match="was not issued by"):
        check_chain(pem, shared.certificate, NOW)
    key = tls()
    double = (
        x509.CertificateBuilder(ca._x509.subject, ca._x509.subject, key.public_key(), 1, NOW - DAY, NOW + DAY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(PEM)
    )
    with pytest.raises(IdentityError, match="was not issued by"):
        check_chain(pem, double, NOW)
    with pytest.raises(IdentityError, match="not a CA's"):
        check_chain(pem, split_chain(pem)[0], NOW)  # a partner's certificate is no CA
    with pytest.raises(IdentityError, match="CA's own certificate expired"):
        check_chain(pem, ca.certificate, NOW + 3651 * DAY)


def test_time(shared: ConnectionCA) -> None:
    second = timedelta(seconds=1)
    for what, pem in (
        ("certificate", forged("ada", ADA_TLS, wrapped(endorsed(ADA, ADA_TLS, before=NOW - 9 * DAY, after=NOW + 9 * DAY)), shared)),
        ("endorsement", forged("ada", ADA_TLS, wrapped(endorsed(ADA, ADA_TLS)), shared, before=NOW - 9 * DAY, after=NOW + 9 * DAY)),
    ):  # fmt: skip
        found = read_certificate(pem)
        for now in (NOW - DAY - SKEW, NOW, NOW + DAY - second):
            assert check_peer(found, KEYS, now, None) == "ada"
        refused(f"{what} of ada is valid only from", pem, NOW - DAY - SKEW - second)
        for now in (NOW + DAY, NOW + DAY + SKEW):
            refused(f"(?s){what} of ada expired.*identity renew", pem, now)


@pytest.mark.parametrize(
    "change",
    [
        {"v": 2}, {"v": True}, {"v": "1"}, {"extra": 1}, {"name": 7}, {"name": "Ada"}, {"name": ""}, {"spki_sha256": 5},
        {"spki_sha256": "AB" * 32}, {"spki_sha256": "ab"}, {"not_after": "2999-1-1T0:0:0Z"}, {"not_after": None},
        {"not_after": "2999-01-01T00:00:00+00:00"}, {"not_before": "0001-01-01T00:00:00Z"}, {"not_before": 0},
    ],
    ids=str,
)  # fmt: skip
def test_an_endorsement_has_one_reading(change: dict[str, Any]) -> None:
    said = {**json.loads(read_payload(endorsed(ADA, ADA_TLS))), **change}
    with pytest.raises(IdentityError):
        read_endorsement(ADA.seal(ENDORSEMENT_TYPE, canonical(said)))


def read_payload(envelope: bytes) -> bytes:
    return base64.b64decode(json.loads(envelope)["payload"])


def test_what_is_no_endorsement() -> None:
    payload = read_payload(endorsed(ADA, ADA_TLS))
    read_endorsement(ADA.seal(ENDORSEMENT_TYPE, payload))
    both = tuple((who.key, who.sign(ENDORSEMENT_TYPE, payload)) for who in (ADA, BEN))
    for bad in (
        ADA.seal("application/vnd.hansa.charter+json", payload),
        ADA.seal(ENDORSEMENT_TYPE, b" " + payload),
        ADA.seal(ENDORSEMENT_TYPE, b"[]"),
        ADA.seal(ENDORSEMENT_TYPE, b'"name"'),
        write_envelope(Envelope(ENDORSEMENT_TYPE, payload, both)),
        write_envelope(Envelope(ENDORSEMENT_TYPE, payload, ())),
        write_envelope(Envelope(ENDORSEMENT_TYPE, payload, (both[0], both[0]))),
        b"",
    ):
        with pytest.raises(IdentityError):
            read_endorsement(bad)


# -- revocation ------------------------------------------------------------------------------------------------------


def test_a_revoked_certificate_is_refused(ca: ConnectionCA) -> None:
    first, second, bens = (ca.issue(csr, 10) for csr in (ADA_CSR, ADA_CSR, make_request(BEN, BEN_TLS, 30)))
    path = ca.folder / "revoked.crl"
    assert RevocationList.load(path, ca.certificate).revoked == frozenset()
    serial = f"{read_certificate(first).serial:X}"
    colons = ":".join(serial.zfill(40)[i : i + 2] for i in range(0, 40, 2))  # as openssl prints it
    assert ca.revoke(colons) == (read_certificate(first),)
    now = datetime.now(UTC)
    crl = RevocationList.load(path, ca.certificate)
    refused(f"certificate of ada .*{serial.lower()}.* is revoked", first, now, crl)
    assert check_peer(read_certificate(second), KEYS, now, crl) == "ada"
    assert ca.revoke("ada") == (read_certificate(second),)
    crl = RevocationList.load(path, ca.certificate)
    assert crl.revoked == {read_certificate(pem).serial for pem in (first, second)}
    assert check_peer(read_certificate(bens), KEYS, now, crl) == "ben"
    for nothing in ("ada", serial, "eve", "", "../ca"):
        with pytest.raises(IdentityError, match=r"(?s)to revoke.*ada, ben"):
            ca.revoke(nothing)


def test_what_expired_is_not_revoked_with_a_name_but_by_its_serial(ca: ConnectionCA) -> None:
    old = forged("ada", ADA_TLS, wrapped(endorsed(ADA, ADA_TLS)), ca, after=NOW - timedelta(hours=1))
    serial = read_certificate(old).serial
    write_whole(ca.folder / "issued" / f"{serial:x}.crt", old)
    with pytest.raises(IdentityError, match="no certificate of ada to revoke"):
        ca.revoke("ada")
    assert [c.serial for c in ca.revoke(f"{serial:x}")] == [serial]


def test_a_revoked_tls_key_gets_no_other_certificate(ca: ConnectionCA) -> None:
    ca.issue(ADA_CSR, 10)
    ca.revoke("ada")
    with pytest.raises(IdentityError, match=r"(?s)TLS key of ada was revoked.*identity renew"):
        ca.issue(ADA_CSR, 10)
    fresh = ca.issue(make_request(ADA, tls(), 10), 10)
    assert check_peer(read_certificate(fresh), KEYS, datetime.now(UTC), ca.revoked()) == "ada"


def test_of_revocations_at_once_none_is_lost(ca: ConnectionCA) -> None:
    serials = [read_certificate(ca.issue(ADA_CSR, 10)).serial for _ in range(8)]
    barrier = threading.Barrier(len(serials))

    def one(serial: int) -> None:
        mine = ConnectionCA.load(ca.folder)
        barrier.wait()
        mine.revoke(f"{serial:x}")

    with ThreadPoolExecutor(len(serials)) as pool:
        list(pool.map(one, serials))
    assert ca.revoked().revoked == frozenset(serials)
    crl = x509.load_pem_x509_crl((ca.folder / "revoked.crl").read_bytes())
    assert crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number == 9


def test_a_list_of_another_ca_is_refused(ca: ConnectionCA, shared: ConnectionCA) -> None:
    with pytest.raises(IdentityError, match=r"revoked\.crl.*did not sign"):
        RevocationList.load(shared.folder / "revoked.crl", ca.certificate)
    same_name = x509.CertificateRevocationListBuilder(ca._x509.subject, NOW, NOW + DAY).sign(tls(), hashes.SHA256())
    with pytest.raises(IdentityError, match="did not sign"):
        RevocationList.parse(same_name.public_bytes(PEM), ca.certificate)
    other_name = x509.CertificateRevocationListBuilder(common("x"), NOW, NOW + DAY).sign(ca._key, hashes.SHA256())
    with pytest.raises(IdentityError, match="did not sign"):
        RevocationList.parse(other_name.public_bytes(PEM), ca.certificate)


def test_an_edited_list_is_refused_wherever_it_is_edited(ca: ConnectionCA) -> None:
    ca.issue(ADA_CSR, 10)
    ca.revoke("ada")
    crl = x509.load_pem_x509_crl((ca.folder / "revoked.crl").read_bytes())
    der, signed = crl.public_bytes(serialization.Encoding.DER), crl.tbs_certlist_bytes
    start, accepted = der.index(signed), set()
    for place in range(len(der)):
        for bit in range(8):
            changed = der[:place] + bytes([der[place] ^ 1 << bit]) + der[place + 1 :]
            with contextlib.suppress(IdentityError):
                assert RevocationList.parse(pem_of(changed, "X509 CRL"), ca.certificate) == ca.revoked()
                accepted.add(place)
    # One byte says how many bits of the signature's last byte do not count, and the library does not look at it.
    assert accepted <= {start + len(signed) + 14}


def test_the_ca_does_not_sign_over_an_edited_or_missing_list(ca: ConnectionCA, shared: ConnectionCA) -> None:
    ca.issue(ADA_CSR, 10)
    path = ca.folder / "revoked.crl"
    before = path.read_bytes()
    path.write_bytes((shared.folder / "revoked.crl").read_bytes())
    for call in (lambda: ca.revoke("ada"), lambda: ca.issue(ADA_CSR, 10)):
        with pytest.raises(IdentityError, match="did not sign"):
            call()
    path.unlink()
    for call in (lambda: ca.revoke("ada"), lambda: ca.issue(ADA_CSR, 10)):
        with pytest.raises(IdentityError, match="all that was revoked is valid"):
            call()
    path.write_bytes(before)
    ca.revoke("ada")


def test_where_no_list_is_nothing_is_revoked(tmp_path: Path, shared: ConnectionCA) -> None:
    assert RevocationList.load(tmp_path / "none", shared.certificate).revoked == frozenset()
    with pytest.raises(IdentityError, match="Is a directory"):
        RevocationList.load(tmp_path, shared.certificate)


# -- any bytes -------------------------------------------------------------------------------------------------------


def pem_of(der: bytes, label: str) -> bytes:
    return f"-----BEGIN {label}-----\n{base64.encodebytes(der).decode()}-----END {label}-----\n".encode()


def readers(ca: ConnectionCA) -> dict[str, tuple[bytes, Callable[[bytes], object]]]:
    """PEM label -> something valid in DER, and all that reads such a thing."""
    der = serialization.Encoding.DER
    leaf = x509.load_pem_x509_certificate(forged("ada", ADA_TLS, wrapped(endorsed(ADA, ADA_TLS)), ca)).public_bytes(der)

    def certificate(pem: bytes) -> None:
        check_peer(read_certificate(pem), KEYS, NOW, RevocationList())
        check_chain(pem, ca.certificate, NOW)

    return {
        "CERTIFICATE": (leaf, certificate),
        "X509 CRL": (
            x509.load_pem_x509_crl((ca.folder / "revoked.crl").read_bytes()).public_bytes(der),
            lambda pem: RevocationList.parse(pem, ca.certificate),
        ),
        "CERTIFICATE REQUEST": (x509.load_pem_x509_csr(ADA_CSR).public_bytes(der), lambda pem: ca.issue(pem, 1)),
    }


@given(st.binary(max_size=400))
def test_any_bytes_raise_identity_errors_only(data: bytes) -> None:
    ca = _any_ca()
    for label, (_, read) in _readers.items():
        for attempt in (data, pem_of(data, label), pem_of(b"\x30\x82" + len(data).to_bytes(2, "big") + data, label)):
            with pytest.raises(IdentityError):
                read(attempt)
    for read_ca in (lambda: RevocationList.parse(b"", data), lambda: check_chain(ca.certificate, data, NOW)):
        with pytest.raises(IdentityError):
            read_ca()
    with pytest.raises(IdentityError):
        read_endorsement(data)


@settings(max_examples=300)
@given(st.data())
def test_a_valid_thing_with_some_bytes_changed_raises_identity_errors_only(data: st.DataObject) -> None:
    _any_ca()
    label = data.draw(st.sampled_from(sorted(_readers)))
    der, read = _readers[label]
    changed = bytearray(der)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(der) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(IdentityError):
        read(pem_of(bytes(changed), label))


_made: list[ConnectionCA] = []
_readers: dict[str, tuple[bytes, Callable[[bytes], object]]] = {}


def _any_ca() -> ConnectionCA:
    """One for all examples of Hypothesis."""
    if not _made:
        _made.append(ConnectionCA.create(Path(tempfile.mkdtemp()) / "ca"))
        _readers.update(readers(_made[0]))
    return _made[0]


@pytest.fixture(scope="module", autouse=True)
def _no_ca_left_behind() -> Any:
    yield
    for ca in _made:
        shutil.rmtree(ca.folder.parent)
    _made.clear()


def test_extensions_that_the_library_refuses_are_identity_errors(shared: ConnectionCA) -> None:
    edi_party_name = bytes.fromhex("3006a504a1020c00")  # in a subject alternative name: no kind that it knows
    odd: list[list[x509.ExtensionType]] = [
        [x509.UnrecognizedExtension(x509.oid.ExtensionOID.SUBJECT_ALTERNATIVE_NAME, edi_party_name)],
        [x509.SubjectAlternativeName([x509.DNSName("ada")])] * 2,
    ]
    for extensions in odd:
        listed = [x509.Extension(e.oid, False, e) for e in extensions]
        leaf = x509.CertificateBuilder(
            shared._x509.subject, common("ada"), ADA_TLS.public_key(), 1, NOW - DAY, NOW + DAY, listed
        ).sign(shared._key, hashes.SHA256())
        asked = x509.CertificateSigningRequestBuilder(common("ada"), listed).sign(ADA_TLS, hashes.SHA256())
        for call in (
            lambda leaf=leaf: read_certificate(leaf.public_bytes(PEM)),
            lambda asked=asked: shared.issue(asked.public_bytes(PEM), 1),
        ):
            with pytest.raises(IdentityError, match="in PEM form"):
                call()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_chain_is_two_certificates(shared: ConnectionCA, count: int) -> None:
    with pytest.raises(IdentityError):
        split_chain(shared.certificate * count)


# -- other software --------------------------------------------------------------------------------------------------


def openssl(*arguments: object) -> str:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=False)
    return f"{done.returncode}\n{done.stdout}{done.stderr}"


@needs_openssl
def test_openssl_reads_all_of_it(ca: ConnectionCA, tmp_path: Path) -> None:
    csr, crt, crl = tmp_path / "ada.csr", tmp_path / "ada.crt", ca.folder / "revoked.crl"
    csr.write_bytes(ADA_CSR)
    crt.write_bytes(ca.issue(ADA_CSR, 5))
    shown = openssl("req", "-in", csr, "-noout", "-text", "-verify")
    for word in ("0\n", "CN = ada", "DNS:ada", ENDORSEMENT_OID.dotted_string, ENDORSEMENT_TYPE, "prime256v1"):
        assert word in shown
    assert f"{ENDORSEMENT_OID.dotted_string}: \n" in openssl("x509", "-in", crt, "-noout", "-text")
    verify = ["verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", ca.folder / "ca.crt"]
    assert openssl(*verify, crt).startswith("0\n")
    assert openssl(*verify, "-crl_check", "-CRLfile", crl, crt).startswith("0\n")
    ca.revoke("ada")
    assert "certificate revoked" in openssl(*verify, "-crl_check", "-CRLfile", crl, crt)
    write_private_key(tmp_path / "e.key", ADA_TLS, "sesame")
    assert openssl("pkey", "-in", tmp_path / "e.key", "-passin", "pass:sesame", "-noout").startswith("0\n")


def context(purpose: ssl.Purpose, home: Home) -> ssl.SSLContext:
    made = ssl.create_default_context(purpose, cadata=home.ca_certificate().decode())
    made.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
    made.verify_mode = ssl.CERT_REQUIRED
    made.load_cert_chain(home.path / "tls.crt", home.path / "tls.key")
    return made


def test_a_tls_handshake_of_both_ends(tmp_path: Path, ca: ConnectionCA) -> None:
    homes = {name: Home.create(tmp_path / name, name, 30) for name in ("ada", "coordinator")}
    for name, home in homes.items():
        home.install(ca.issue((home.path / f"{name}.csr").read_bytes(), 5))
    keys = {name: home.key() for name, home in homes.items()}
    ours, theirs = socket.socketpair()
    with ours, theirs, ThreadPoolExecutor(1) as pool:
        server = pool.submit(
            context(ssl.Purpose.CLIENT_AUTH, homes["coordinator"]).wrap_socket, theirs, server_side=True
        )
        client = context(ssl.Purpose.SERVER_AUTH, homes["ada"]).wrap_socket(ours, server_hostname="coordinator")
        seen = {"coordinator": client.getpeercert(True), "ada": server.result(10).getpeercert(True)}
        client.close()
        server.result().close()
    for name, der in seen.items():
        assert der is not None
        peer = read_certificate(ssl.DER_cert_to_PEM_cert(der).encode())
        assert check_peer(peer, keys, datetime.now(UTC), ca.revoked()) == name


def test_grpc_takes_what_a_home_gives(tmp_path: Path, ca: ConnectionCA) -> None:
    grpc = pytest.importorskip("grpc", reason="needs the extra 'train'")
    homes = {name: Home.create(tmp_path / name, name, 30, "sesame") for name in ("ada", "coordinator")}
    for name, home in homes.items():
        home.install(ca.issue((home.path / f"{name}.csr").read_bytes(), 5), "sesame")
    peers: list[PeerCertificate] = []

    class Handler(grpc.GenericRpcHandler):  # type: ignore[misc, name-defined, unused-ignore]
        def service(self, _: object) -> Any:
            def answer(asked: bytes, session: Any) -> bytes:
                peers.append(read_certificate(session.auth_context()["x509_pem_cert"][0]))
                return asked

            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.server(ThreadPoolExecutor(1), handlers=[Handler()])
    one, other = homes["coordinator"], homes["ada"]
    credentials = grpc.ssl_server_credentials(
        [(one.tls_key_pem("sesame"), one.tls_certificate())], one.ca_certificate(), require_client_auth=True
    )
    port = server.add_secure_port("localhost:0", credentials)
    server.start()
    try:
        mine = grpc.ssl_channel_credentials(
            other.ca_certificate(), other.tls_key_pem("sesame"), other.tls_certificate()
        )
        named = [("grpc.ssl_target_name_override", "coordinator")]
        with grpc.secure_channel(f"localhost:{port}", mine, options=named) as channel:
            assert channel.unary_unary("/x/y")(b"hello", timeout=20) == b"hello"
    finally:
        server.stop(0).wait(10)
    assert check_peer(peers[0], {"ada": other.key()}, datetime.now(UTC), None) == "ada"


# -- a home ----------------------------------------------------------------------------------------------------------


def test_a_new_home(tmp_path: Path) -> None:
    home = Home.create(tmp_path / "h", "ada", 30)
    files = {p.name: stat.S_IMODE(p.stat().st_mode) for p in home.path.iterdir()}
    assert files == {
        "identity.key": 0o600, "tls.key": 0o600, "ada.pem": 0o644, "ada.csr": 0o644, "identity.json": 0o644
    }  # fmt: skip
    assert key_from_pem((home.path / "ada.pem").read_bytes()) == home.key() == home.identity().key
    asked = read_request((home.path / "ada.csr").read_bytes())
    assert (asked.name, asked.endorsement.key) == ("ada", home.key())
    assert asked.endorsement.not_after - asked.endorsement.not_before == 30 * DAY
    before = {p: p.read_bytes() for p in home.path.iterdir()}
    with pytest.raises(IdentityError, match="never overwritten"):
        Home.create(home.path, "ben", 30)
    assert {p: p.read_bytes() for p in home.path.iterdir()} == before
    for name in ("Ada", "", "a/b", "../x", "-", "a" * 64, "a.b", "a\n"):
        with pytest.raises(IdentityError, match="not a name"):
            Home.create(tmp_path / "other", name, 30)
    assert not (tmp_path / "other").exists()


def test_private_keys_are_in_no_file_that_is_sent(tmp_path: Path, ca: ConnectionCA) -> None:
    home = Home.create(tmp_path / "h", "ada", 30)
    home.install(ca.issue((home.path / "ada.csr").read_bytes(), 5))
    secrets = [home.identity()._private.private_bytes_raw()]
    key = serialization.load_pem_private_key(home.tls_key_pem(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    secrets.append(key.private_numbers().private_value.to_bytes(32, "big"))
    for path in [*home.path.iterdir(), *ca.folder.rglob("*.cr*")]:
        if path.suffix != ".key":
            data = path.read_bytes()
            for block in x509_blocks(data):
                assert not any(secret in block for secret in secrets), path
            assert b"PRIVATE" not in data


def x509_blocks(data: bytes) -> list[bytes]:
    return [data] + [base64.b64decode(b) for b in re.findall(rb"-----\n([A-Za-z0-9+/=\n]+)-----END", data)]


@pytest.mark.parametrize("file", ["identity.key", "tls.key"])
def test_keys_that_others_may_read_are_refused(tmp_path: Path, file: str) -> None:
    home = Home.create(tmp_path / "h", "ada", 30)
    (home.path / file).chmod(0o644)
    with pytest.raises(IdentityError, match=r"(?s)readable by others.*chmod 600"):
        home.identity() if file == "identity.key" else home.tls_key_pem()


def test_an_encrypted_home(tmp_path: Path, ca: ConnectionCA) -> None:
    home = Home.create(tmp_path / "h", "ada", 30, "sesame")
    pem = ca.issue((home.path / "ada.csr").read_bytes(), 5)
    for path in (home.identity_key, home.tls_key):
        assert b"BEGIN ENCRYPTED" in path.read_bytes()
    for call in (
        home.identity,
        home.tls_key_pem,
        lambda word=None: home.install(pem, word),
        lambda w=None: home.renew(9, w),
    ):
        with pytest.raises(IdentityError, match=r"(?s)encrypted.*HANSA_PASSPHRASE"):
            call()
        with pytest.raises(IdentityError, match="this passphrase does not open it"):
            call("wrong")
    assert not (home.path / "tls.crt").exists()
    home.install(pem, "sesame")
    assert home.identity("sesame").key == home.key()
    assert b"ENCRYPTED" not in home.tls_key_pem("sesame")
    home.renew(9, "sesame")
    assert b"BEGIN ENCRYPTED" in home.pending_key.read_bytes()


def test_a_passphrase_for_a_key_that_needs_none_and_one_that_is_not_utf8(tmp_path: Path) -> None:
    ADA.save(tmp_path / "plain.key")
    assert Identity.load("ada", tmp_path / "plain.key", "sesame").key == ADA.key
    odd = os.fsdecode(b"caf\xe9")
    ADA.save(tmp_path / "odd.key", odd)
    assert Identity.load("ada", tmp_path / "odd.key", odd).key == ADA.key
    (tmp_path / "odd.key").chmod(0o640)
    with pytest.raises(IdentityError, match="readable by others"):
        Identity.load("ada", tmp_path / "odd.key", odd)


def test_what_is_missing_says_what_to_run(tmp_path: Path, ca: ConnectionCA) -> None:
    home = Home(tmp_path / "h")
    for call in (home.name, home.key, home.identity, home.tls_key_pem, home.tls_certificate, home.ca_certificate):
        with pytest.raises(IdentityError, match=r"(?s)no identity here.*hansa identity new"):
            call()
    home = Home.create(tmp_path / "h", "ada", 30)
    for call in (home.tls_certificate, home.ca_certificate):
        with pytest.raises(IdentityError, match=r"(?s)missing.*hansa identity install NAME.crt --home .*h"):
            call()
    home.install(ca.issue((home.path / "ada.csr").read_bytes(), 5))
    home.tls_key.unlink()
    with pytest.raises(IdentityError, match=r"(?s)tls.key: missing.*hansa identity renew"):
        home.tls_key_pem()
    home.identity_key.unlink()
    with pytest.raises(IdentityError, match=r"(?s)identity.key: missing.*backup"):
        home.identity()
    write_private_key(home.identity_key, BEN._private)
    with pytest.raises(IdentityError, match="not the key that"):
        home.identity()
    write_private_key(home.tls_key, ed25519.Ed25519PrivateKey.generate())
    with pytest.raises(IdentityError, match="not an ECDSA P-256 key"):
        home.tls_key_pem()
    for bad in (b"", b"{}", b"[]", b'{"name":"ada","key":"00"}', b'{"name":"A","key":"' + ADA.key.encode() + b'"}'):
        (home.path / "identity.json").write_bytes(bad)
        with pytest.raises(HansaError, match=r"not name an identity|not a name"):
            home.name()


def test_an_expired_certificate_is_not_offered(tmp_path: Path, ca: ConnectionCA) -> None:
    home = Home.create(tmp_path / "h", "ada", 30)
    key = serialization.load_pem_private_key(home.tls_key_pem(), None)
    old = forged("ada", key, wrapped(endorsed(home.identity(), key)), ca, before=NOW - 2 * DAY, after=NOW - DAY)
    write_whole(home.path / "tls.crt", old)
    with pytest.raises(IdentityError, match=r"(?s)expired on .*hansa identity renew"):
        home.tls_certificate()


def test_a_certificate_that_does_not_fit_is_not_installed(tmp_path: Path, ca: ConnectionCA) -> None:
    home = Home.create(tmp_path / "h", "ada", 30)
    good = ca.issue((home.path / "ada.csr").read_bytes(), 5)
    leaf, _ = split_chain(good)
    mine = serialization.load_pem_private_key(home.tls_key_pem(), None)
    other_ca = ConnectionCA.create(tmp_path / "other")
    envelope = wrapped(endorsed(home.identity(), mine))
    for pem, words in (
        (ca.issue(make_request(BEN, BEN_TLS, 9), 5), "a certificate of ben; this is the home of ada"),
        (ca.issue(ADA_CSR, 5), "not endorsed by ada's identity key"),
        (ca.issue(make_request(home.identity(), tls(), 9), 5), "a TLS key that is not here"),
        (leaf, "wanted the organisation's and the CA's"),
        (leaf + other_ca.certificate, "was not issued by"),
        (ca.certificate + leaf, "certificate"),
        (forged("ada", mine, envelope, None) + ca.certificate, "was not issued by"),
        (forged("ada", mine, None, ca), "no endorsement"),
        (forged("ada", mine, envelope, ca, after=NOW - timedelta(hours=1)), "expired"),
        (b"", "certificate"),
    ):
        with pytest.raises(IdentityError, match=words):
            home.install(pem)
        assert not (home.path / "tls.crt").exists()
        assert not (home.path / "ca.crt").exists()
    assert home.install(good) == read_certificate(leaf)
    assert home.tls_certificate() == good
    assert home.ca_certificate() == ca.certificate


def test_a_renewal_swaps_key_and_certificate_only_when_installed(tmp_path: Path, ca: ConnectionCA) -> None:
    home = Home.create(tmp_path / "h", "ada", 30)
    request_file = home.path / "ada.csr"
    first = ca.issue(request_file.read_bytes(), 5)
    home.install(first)
    key, charter_key = home.tls_key_pem(), home.key()
    home.renew(40)
    assert (home.tls_key_pem(), home.tls_certificate()) == (key, first)
    assert stat.S_IMODE(home.pending_key.stat().st_mode) == 0o600
    second = ca.issue(request_file.read_bytes(), 5)
    home.install(first)  # the old one once more: the renewal still waits
    assert home.pending_key.exists()
    home.install(second)
    assert not home.pending_key.exists()
    assert stat.S_IMODE(home.tls_key.stat().st_mode) == 0o600
    assert home.tls_key_pem() != key
    assert home.tls_certificate() == second
    assert check_peer(read_certificate(second), {"ada": charter_key}, datetime.now(UTC), ca.revoked()) == "ada"
    with pytest.raises(IdentityError, match="TLS key that is not here"):
        home.install(first)


def test_a_crash_in_the_swap_is_seen_and_healed(tmp_path: Path, ca: ConnectionCA, monkeypatch: Any) -> None:
    home = Home.create(tmp_path / "h", "ada", 30)
    home.install(ca.issue((home.path / "ada.csr").read_bytes(), 5))
    home.renew(40)
    second = ca.issue((home.path / "ada.csr").read_bytes(), 5)
    replace = os.replace

    def dies(source: Any, target: Any) -> None:
        if Path(target).name == "tls.key":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            home.install(second)
    with pytest.raises(IdentityError, match=r"(?s)tls.key and tls.crt do not fit.*hansa identity install"):
        home.tls_key_pem()
    home.install(second)
    assert home.tls_key_pem()
    assert home.tls_certificate() == second
