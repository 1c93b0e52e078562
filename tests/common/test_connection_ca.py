"""The CA that only admits: what it issues, refuses and revokes."""

from __future__ import annotations

import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from certificate_support import (
    ADA,
    ADA_CSR,
    ADA_TLS,
    BEN,
    BEN_TLS,
    DAY,
    EVE,
    KEYS,
    NOW,
    PEM,
    endorsed,
    forged,
    refused,
    request,
    tls,
    wrapped,
)
from hansa.common.certificates import (
    ENDORSEMENT_OID,
    ENDORSEMENT_TYPE,
    RevocationList,
    check_chain,
    check_peer,
    make_request,
    read_certificate,
    read_endorsement,
)
from hansa.common.connection_ca import ConnectionCA
from hansa.common.errors import IdentityError
from hansa.common.identity import Identity, write_private_key, write_whole

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")


# -- what it issues --------------------------------------------------------------------------------------------------


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


# -- its folder ------------------------------------------------------------------------------------------------------


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
