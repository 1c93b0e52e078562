"""Dialling out: through an HTTP proxy where there is one, to the coordinator of the charter and to nobody else."""

from __future__ import annotations

import base64
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

PROXY_PORT = 3128
"""Of a proxy for which none is said."""


def server_certificate(
    address: str, proxy: str | None, home: Home, name: str, key: str, crl: Path | None
) -> PeerCertificate:
    """The certificate that the coordinator at `address` shows, if the charter's coordinator endorsed its TLS key.

    gRPC tells a client nothing of its peer, so the certificate is fetched first, checked, and then the only one that the
    link trusts: whoever answers must hold exactly this key.

    Args:
        name, key: the coordinator's name and identity key (hex), as the charter has them.

    Raises:
        LinkError: nobody answers, or not with TLS 1.3; or the proxy, which it then names, did not let us through.
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
        with _connect(address, host.strip("[]"), int(port), proxy) as plain, tls.wrap_socket(plain) as connection:
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


def _connect(address: str, host: str, port: int, proxy: str | None) -> socket.socket:
    if proxy is None:
        return socket.create_connection((host, port), CONNECT_S)
    where = _parts(proxy)
    if where is None:  # its text may hold a password, wherever that ends: none of it is shown
        raise LinkError(
            f"{address}: the proxy is not of the form http://HOST:PORT",
            "Correct `proxy` in node.yaml, or https_proxy in the environment; in a password, write @ as %40 and so on.",
        )
    headers = {}
    if where.username is not None:
        user = f"{urllib.parse.unquote(where.username)}:{urllib.parse.unquote(where.password or '')}"
        headers["Proxy-Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
    tunnel = http.client.HTTPConnection(where.hostname or "", where.port or PROXY_PORT, timeout=CONNECT_S)
    tunnel.set_tunnel(host, port, headers)
    try:
        tunnel.connect()
    except (OSError, http.client.HTTPException) as err:
        raise LinkError(
            f"{address}: the proxy {where.hostname}:{where.port or PROXY_PORT}: {err}",
            "Is the proxy of node.yaml or of the environment (https_proxy) right, and does it let this node through?",
        ) from err
    assert tunnel.sock is not None
    return tunnel.sock


def proxy_for(address: str, configured: str | None) -> str | None:
    """The HTTP proxy to dial through: the configured one, else the environment's (https_proxy, no_proxy).

    With scheme and port, which the environment's may lack, so that gRPC dials where we do. It may hold a password.
    """
    proxy = configured
    if proxy is None:
        host = address.rpartition(":")[0]
        proxy = None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get("https")
    if proxy is None:
        return None
    if "://" not in proxy:
        proxy = f"http://{proxy}"
    where = _parts(proxy)
    return proxy if where is None or where.port else f"http://{where.netloc.rstrip(':')}:{PROXY_PORT}"


def _parts(proxy: str) -> urllib.parse.SplitResult | None:
    """What the proxy's URL says; None where it is none of an HTTP proxy."""
    try:
        where = urllib.parse.urlsplit(proxy)
        good = where.hostname and where.port != 0
    except ValueError:
        return None
    plain = where.scheme == "http" and where.path in ("", "/") and not where.query and not where.fragment
    return where if good and plain else None
