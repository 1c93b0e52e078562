"""TLS keys endorsed by identity keys: which peer is admitted, and bytes that are none."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import stat
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from hypothesis import given, settings
from hypothesis import strategies as st

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
    common,
    endorsed,
    forged,
    refused,
    spki,
    tls,
    wrapped,
)
from hansa.common.certificates import (
    ENDORSEMENT_TYPE,
    SKEW,
    RevocationList,
    check_chain,
    check_peer,
    read_certificate,
    read_endorsement,
    read_request,
    split_chain,
)
from hansa.common.connection_ca import ConnectionCA
from hansa.common.errors import IdentityError
from hansa.common.identity import Envelope, Identity, canonical, write_envelope

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
