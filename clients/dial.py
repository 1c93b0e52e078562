"""Dialling out: through an HTTP proxy where there is one, to the coordinator of the charter and to nobody else."""

from __future__ import annotations

import http.client
import socket
import ssl
import urllib.parse
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

from ..common.certificates import PeerCertificate, RevocationList, check_chain, check_peer
from ..common.errors import LinkError
from ..common.home import Home

CONNECT_S = 10.0
"""A connection is up within this time, or it is tried again."""


def server_certificate(
    address: str, proxy: str | None, home: Home, name: str, key: str, crl: Path | None
) -> PeerCertificate:
    """The certificate that the coordinator at `address` shows, if the charter's coordinator endorsed its TLS key.

    gRPC tells a client nothing of its peer, so the certificate is fetched first, checked, and then the only one that the
    link trusts: whoever answers must hold exactly this key.

    Args:
        name, key: the coordinator's name and identity key (hex), as the charter has them.

    Raises:
        LinkError: nobody answers, or not with TLS 1.3.
        IdentityError: it is not the coordinator's certificate, or it is revoked or expired.
    """
    host, _, port = address.rpartition(":")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Before TLS 1.3 a server would ask for our certificate first. What the handshake shows is checked below.
    tls.minimum_version = ssl.TLSVersion.TLSv1_3
    tls.check_hostname = False
    tls.verify_mode = ssl.CERT_NONE
    tls.set_alpn_protocols(["h2"])
    try:
        with _connect(host.strip("[]"), int(port), proxy) as plain, tls.wrap_socket(plain) as connection:
            der = connection.getpeercert(binary_form=True)
    except (OSError, ValueError, http.client.HTTPException) as err:
        raise LinkError(
            f"{address}: {err}", "Is the coordinator's server running? Is the address in node.yaml right?"
        ) from err
    ca = home.ca_certificate()
    now = datetime.now(UTC)
    certificate = check_chain(ssl.DER_cert_to_PEM_cert(der or b"").encode(), ca, now)
    check_peer(certificate, {name: key}, now, RevocationList.load(crl, ca) if crl is not None else None)
    return certificate


def _connect(host: str, port: int, proxy: str | None) -> socket.socket:
    if proxy is None:
        return socket.create_connection((host, port), CONNECT_S)
    where = urllib.parse.urlsplit(proxy)
    tunnel = http.client.HTTPConnection(where.hostname or "", where.port or 3128, timeout=CONNECT_S)
    tunnel.set_tunnel(host, port)
    tunnel.connect()
    assert tunnel.sock is not None
    return tunnel.sock


def proxy_for(address: str, configured: str | None) -> str | None:
    """The HTTP proxy to dial through: the configured one, else the environment's (https_proxy, no_proxy)."""
    if configured is not None:
        return configured
    host = address.rpartition(":")[0]
    return None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get("https")
