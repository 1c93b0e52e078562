"""An organisation's home folder: keys that stay, certificates that fit, renewals that a crash does not spoil."""

from __future__ import annotations

import base64
import os
import re
import socket
import ssl
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from certificate_support import ADA, ADA_CSR, BEN, BEN_TLS, DAY, NOW, endorsed, forged, tls, wrapped
from hansa.common.certificates import (
    PeerCertificate,
    check_peer,
    make_request,
    read_certificate,
    read_request,
    split_chain,
)
from hansa.common.connection_ca import ConnectionCA
from hansa.common.errors import HansaError, IdentityError
from hansa.common.home import Home
from hansa.common.identity import Identity, key_from_pem, write_private_key, write_whole

# -- its keys and its name -------------------------------------------------------------------------------------------


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


# -- its certificate -------------------------------------------------------------------------------------------------


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


# -- other software --------------------------------------------------------------------------------------------------


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
