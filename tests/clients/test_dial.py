"""Dialling out through a proxy: which one, what it is told, and what is said when it fails."""

from __future__ import annotations

import base64
import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hansa.clients.dial import proxy_for, server_certificate
from hansa.common.errors import LinkError
from hansa.common.flower import ClientApp
from link_support import Keys, Net

TO = "coordinator.example:8440"
PASSWORD = "p@ss word"
IN_URL = "p%40ss%20word"


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


def dial(keys: Keys, address: str, proxy: str | None) -> str:
    """The error's whole text, with its hint."""
    boss = keys.home("coordinator").key()
    with pytest.raises(LinkError) as caught:
        server_certificate(address, proxy, keys.home("ada"), "coordinator", boss, None)
    return str(caught.value)


@contextlib.contextmanager
def proxy_that_wants(user: str) -> Iterator[tuple[int, list[str]]]:
    """An HTTP proxy that lets through who sends `user` (user:password), and the heads of the requests it got."""
    wanted = f"Proxy-Authorization: Basic {base64.b64encode(user.encode()).decode()}".lower()
    heads: list[str] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(a: socket.socket, b: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := a.recv(65536):
                b.sendall(data)
            b.shutdown(socket.SHUT_WR)

    def serve(near: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head and (more := near.recv(1000)):
            head += more
        heads.append(head.decode())
        if wanted not in heads[-1].lower():
            near.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
            near.close()
            return
        host, port = head.split()[1].decode().rsplit(":", 1)
        far = socket.create_connection((host, int(port)))
        near.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        for a, b in ((near, far), (far, near)):
            threading.Thread(target=pump, args=(a, b), daemon=True).start()

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1], heads
    finally:
        listener.close()


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("proxy.example:3129", "http://proxy.example:3129"),
        ("http://proxy.example:3129", "http://proxy.example:3129"),
        ("proxy.example", "http://proxy.example:3128"),
        ("http://proxy.example/", "http://proxy.example:3128"),
        ("user:pw@proxy.example", "http://user:pw@proxy.example:3128"),
        ("http://[::1]", "http://[::1]:3128"),
    ],
)
def test_the_environment_s_proxy_may_lack_scheme_and_port(
    monkeypatch: pytest.MonkeyPatch, said: str, meant: str
) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("https_proxy", said)
    assert proxy_for(TO, None) == meant
    assert proxy_for(TO, "http://other:1") == "http://other:1"
    monkeypatch.setenv("no_proxy", "coordinator.example")
    assert proxy_for(TO, None) is None


def test_a_node_gets_through_a_proxy_that_wants_a_password(keys: Keys) -> None:
    net = Net(keys, ("ada",))
    net.start()
    try:
        with proxy_that_wants("user:secret") as (port, heads):
            net.node("ada", ClientApp(), proxy=f"http://user:secret@127.0.0.1:{port}")
            net.until_connected("ada")
        assert len(heads) >= 2  # the look at the certificate, and the link
        assert "secret" not in net.log.getvalue()
    finally:
        net.close()


def test_signs_in_a_password_are_decoded(keys: Keys) -> None:
    with proxy_that_wants("another:one") as (port, heads):
        dial(keys, TO, f"http://user:{IN_URL}@127.0.0.1:{port}")
    assert f"Basic {base64.b64encode(f'user:{PASSWORD}'.encode()).decode()}\r\n" in heads[0]


def test_a_proxy_that_fails_is_named_and_its_password_is_not(keys: Keys) -> None:
    with proxy_that_wants("user:other") as (port, _):
        told = dial(keys, TO, f"http://user:{IN_URL}@127.0.0.1:{port}")
        assert f"{TO}: the proxy 127.0.0.1:{port}: " in told
        assert "407" in told
    gone = dial(keys, TO, f"http://user:{IN_URL}@127.0.0.1:{port}")
    assert f"the proxy 127.0.0.1:{port}: " in gone
    assert not {w for w in (PASSWORD, IN_URL, "user:") if w in told + gone}


@pytest.mark.parametrize(
    "proxy",
    [
        "https://u:hush@p:1",
        "http://u:hush/x@p:1",
        "http://u:7#hush@p:1",
        "http://u:7/hush@p:1",
        "http://",
        "http://u:hush@p:x",
    ],
)
def test_what_is_no_http_proxy_is_refused_without_showing_it(keys: Keys, proxy: str) -> None:
    told = dial(keys, TO, proxy_for(TO, proxy))
    assert "http://HOST:PORT" in told
    assert "hush" not in told
