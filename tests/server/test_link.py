"""The link under honest and hostile peers: real gRPC, real certificates, real files; `tests/e2e` kills its processes."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from h2.connection import H2Connection

from hansa.clients import link as node_link
from hansa.common import frames
from hansa.common import link_pb2 as pb
from hansa.common.errors import LinkError, OutputError
from hansa.common.flower import Array, ArrayRecord, ClientApp, ConfigRecord, Context, Message, RecordDict
from hansa.common.frames import METHOD, PROTOCOL, take_apart
from hansa.common.home import Home
from hansa.common.identity import Identity
from hansa.common.messages import Manifest, SignedWire
from hansa.server import streams as server_streams
from hansa.server.link import GrpcGrid
from hansa.server.requests import Request, State
from link_support import Keys, Net, model, net, plain_app, until

CHARTER = "c" * 64


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Net]:
    with net(tmp_path, "ada", "ben") as made:
        yield made


def ask(made: Net, node: int = 1, value: float = 0.0, kind: str = "train", ttl: float = 30.0) -> str:
    assert made.grid is not None
    return next(iter(made.grid.push_messages([made.grid.create_message(model(value), kind, node, "1", ttl)])))


def answer(made: Net, name: str, timeout: float = 15.0) -> Message:
    assert made.grid is not None
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        for reply in made.grid.pull_messages([name]):
            return reply
        made.grid.wait(0.2)
    raise AssertionError(f"no answer to {name}; {made.grid.state(name)}\n{made.log.getvalue()}")


def first(reply: Message) -> float:
    return float(reply.content["arrays"]["w"].numpy()[0])


# -- a request's life ------------------------------------------------------------------------------------------------


def test_a_message_waits_for_its_node(pair: Net) -> None:
    name = ask(pair, value=4.0)
    assert pair.grid is not None
    assert pair.grid.state(name) is State.QUEUED
    pair.node("ada", plain_app())
    assert first(answer(pair, name)) == 5.0
    assert pair.grid.state(name) is State.FOLDED


def test_tls_is_1_3_and_the_certificate_is_who(pair: Net) -> None:
    pair.node("ada", plain_app())
    pair.until_connected("ada")
    assert pair.grid is not None
    assert pair.grid.connected()["ada"]["tls"] == "TLSv1.3"
    assert list(pair.grid.get_node_ids()) == [1]


def test_a_node_that_was_away_gets_what_is_still_wanted_and_nothing_twice(pair: Net) -> None:
    calls: list[tuple[str, str]] = []
    pair.node("ada", plain_app(calls))
    pair.until_connected("ada")
    pair.halt("ada")
    assert pair.grid is not None
    until(lambda: "ada" not in pair.grid.connected())  # type: ignore[union-attr]
    late, wanted = ask(pair, ttl=0.5), ask(pair, value=1.0)
    until(lambda: pair.grid.state(late) is State.EXPIRED)  # type: ignore[union-attr]
    pair.node("ada", plain_app(calls))
    assert first(answer(pair, wanted)) == 2.0
    assert answer(pair, late).has_error()
    assert [name for _, name in calls] == [wanted]


def test_a_restarted_coordinator_gets_the_answer_that_was_ready(tmp_path: Path) -> None:
    """It dies while a node works; asks again with the same bytes; the node has the request and its answer already."""
    calls: list[str] = []
    gate = threading.Event()
    with net(tmp_path, "ada") as made:
        app, wire, request = signed(made, "ada", calls, gate)
        made.node("ada", app)
        made.until_connected("ada")
        name = push_signed(made, wire, request)
        until(lambda: calls)
        assert made.grid is not None
        made.grid.stop()
        gate.set()
        made.start()
        assert push_signed(made, wire, request) == name
        reply = answer(made, name)
        assert wire.decode(reply.content, "ada")[0].kind == "update"
        assert len(calls) == 1


def test_an_answer_in_the_spool_is_folded_again_after_a_crash_and_a_query_is_not(tmp_path: Path) -> None:
    calls: list[str] = []
    with net(tmp_path, "ada") as made:
        app, wire, request = signed(made, "ada", calls)
        made.node("ada", app)
        made.until_connected("ada")
        name = push_signed(made, wire, request)
        assert made.grid is not None
        until(lambda: made.grid.state(name) is State.REPLIED)  # type: ignore[union-attr]
        made.halt("ada")
        made.grid.stop()
        made.start(inspect=wire.inspect)
        push_signed(made, wire, request)
        assert wire.decode(answer(made, name).content, "ada")[0].kind == "update"  # nobody is connected
        assert len(calls) == 1
        spool = next((tmp_path / "spool").glob("*.reply"))
        made.grid.stop()
        damaged = bytearray(spool.read_bytes())
        damaged[-1] ^= 1
        spool.write_bytes(damaged)
        made.start(inspect=wire.inspect)
        push_signed(made, wire, request)
        assert made.grid.state(name) is State.QUEUED  # a damaged one is asked for again
        made.grid.stop()
        made.start(inspect=wire.inspect)
        push_signed(made, wire, request, "query")
        assert made.grid.state(name) is State.QUEUED


def test_a_request_in_the_inbox_is_worked_on_only_when_it_is_still_wanted(tmp_path: Path) -> None:
    calls: list[tuple[str, str]] = []
    with net(tmp_path, "ada") as made:
        hold = threading.Event()
        app = ClientApp()

        @app.train()
        def _wait(message: Message, context: Any) -> Message:
            hold.wait(20)
            raise OutputError("the disk is full")

        made.node("ada", app)
        made.until_connected("ada")
        dropped, wanted = ask(made, ttl=6.0), ask(made, value=7.0)
        inbox = tmp_path / "inbox-ada"
        until(lambda: len(list(inbox.glob("*.request"))) == 2)
        made.running["ada"][0].set()
        hold.set()
        made.halt("ada")
        assert made.grid is not None
        until(lambda: made.grid.state(dropped) is State.EXPIRED)  # type: ignore[union-attr]
        made.node("ada", plain_app(calls))
        assert first(answer(made, wanted)) == 8.0
        assert [name for _, name in calls] == [wanted]
        until(lambda: [p.stem for p in inbox.glob("*.request")] in ([], [dropped]))


def test_what_nobody_asks_for_any_more_makes_room_in_the_inbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator that is restarted and asks for something else says `done` of nothing that went before."""
    monkeypatch.setattr(node_link, "LONGEST_PAUSE_S", 0.2)
    go, app = threading.Semaphore(0), plain_app()

    @app.query("late")
    def _late(message: Message, context: Any) -> Message:
        go.acquire()
        return Message(RecordDict(), reply_to=message)

    with net(tmp_path, "ada") as made:
        made.node("ada", app)
        most = 2 * node_link.CREDIT

        def whole() -> int:
            return len(list((tmp_path / "inbox-ada").glob("[0-9a-f]*.request")))

        for number in range(1, most + 1):
            made.until_connected()
            ask(made, kind="query.late", ttl=5.0)
            until(lambda n=number: whole() == n)  # type: ignore[misc]
            assert made.grid is not None
            made.grid.stop()
            go.release()
            made.start()
        time.sleep(5)  # their time is over
        made.until_connected()
        assert whole() == most
        assert first(answer(made, ask(made))) == 1.0
        until(lambda: whole() == 0)


def test_a_full_disk_at_the_node_is_tried_again(pair: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_link, "RETRY_S", 0.1)
    tries: list[int] = []
    real = plain_app()
    app = ClientApp()

    @app.train()
    def _train(message: Message, context: Any) -> Message:
        tries.append(1)
        if len(tries) < 3:
            raise OutputError("the disk is full")
        return real(message, context)

    pair.node("ada", app)
    assert first(answer(pair, ask(pair))) == 1.0
    assert len(tries) == 3
    assert '"disk full"' in pair.log.getvalue()


def test_large_arrays_cross_in_blocks(pair: Net) -> None:
    pair.node("ada", plain_app())
    assert pair.grid is not None
    content = RecordDict(
        {"arrays": ArrayRecord({"w": Array(np.arange(3_000_000, dtype=np.float32)), "e": Array(np.zeros((0, 3)))})}
    )
    (reply,) = pair.grid.send_and_receive([pair.grid.create_message(content, "train", 1, "1", 30)], timeout=30)
    assert np.array_equal(reply.content["arrays"]["w"].numpy(), np.arange(3_000_000, dtype=np.float32) + 1)
    assert reply.content["arrays"]["e"].numpy().shape == (0, 3)


def test_a_second_connection_of_a_partner_replaces_the_first(pair: Net) -> None:
    pair.node("ada", plain_app())
    pair.until_connected("ada")
    with raw(pair, "ada") as (call, _send):
        assert next(call).WhichOneof("body") == "welcome"
        until(lambda: "another connection" in pair.log.getvalue())
        pair.halt("ada")


def test_a_dead_peer_is_noticed_within_10_s(pair: Net) -> None:
    """A connection whose packets go nowhere: a proxy that stops forwarding, without closing anything."""
    with frozen_proxy(pair.port) as (port, freeze):
        pair.node("ada", plain_app(), address=f"127.0.0.1:{port}")
        pair.until_connected("ada")
        freeze.set()
        began = time.monotonic()
        until(lambda: "ada" not in pair.grid.connected(), 15)  # type: ignore[union-attr]
        assert time.monotonic() - began < 10
        until(lambda: pair.log.getvalue().count('"event": "disconnected", "coordinator"'), 10)


def test_a_renewed_certificate_is_used_without_a_restart(pair: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.node("ada", plain_app())
    pair.until_connected("ada")
    for name in ("ada", "coordinator"):
        home = pair.keys.home(name)
        home.renew(365)
        home.install(pair.keys.ca.issue((home.path / f"{name}.csr").read_bytes(), 90))
    assert pair.grid is not None
    seen = pair.grid.connected()["ada"]["since"]
    until(lambda: pair.grid.connected().get("ada", {}).get("since", seen) != seen, 20)  # type: ignore[union-attr]
    assert first(answer(pair, ask(pair))) == 1.0


# -- who may connect -------------------------------------------------------------------------------------------------


def refused(made: Net, name: str, home: Home, **changes: Any) -> str:
    """Try to connect; what the log says of it."""
    made.node(name, plain_app(), home=home, **changes)
    until(lambda: '"reason"' in made.log.getvalue(), 15)
    time.sleep(0.3)
    assert made.grid is not None
    assert name not in made.grid.connected()
    made.halt(name)
    return made.log.getvalue()


def test_a_valid_certificate_in_a_partners_name_with_another_key(pair: Net) -> None:
    told = refused(pair, "ada", pair.keys.home("ada", "impostor"))
    assert "not endorsed by ada's identity key" in told


def test_a_valid_certificate_of_somebody_else(pair: Net) -> None:
    assert "eve does not stand in the charter" in refused(pair, "eve", pair.keys.home("eve"))


def test_a_certificate_of_another_ca(pair: Net, tmp_path: Path) -> None:
    other = Keys(tmp_path / "other")
    home = pair.keys.home("ada")
    foreign = Home.create(tmp_path / "foreign", "ada", 365)
    foreign.install(other.ca.issue((foreign.path / "ada.csr").read_bytes(), 90))
    (foreign.path / "ca.crt").write_bytes(home.ca_certificate())  # it trusts the right server, and shows its own
    told = refused(pair, "ada", foreign)
    assert '"event": "connected"' not in told


def test_a_coordinator_that_the_charter_does_not_name(pair: Net) -> None:
    told = refused(pair, "ada", pair.keys.home("ada"), coordinator_key=Identity.generate("x").key)
    assert "not endorsed by coordinator's identity key" in told


def test_no_certificate_at_all(pair: Net) -> None:
    tls = ssl.create_default_context(cafile=str(pair.keys.home("ada").path / "ca.crt"))
    tls.check_hostname = False

    def talk() -> None:
        with socket.create_connection(("127.0.0.1", pair.port)) as plain, tls.wrap_socket(plain) as connection:
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            while connection.recv(1000):
                pass
            raise ConnectionResetError  # in TLS 1.3 the refusal comes after the handshake

    with pytest.raises((ssl.SSLError, ConnectionError)):
        talk()


def test_revocation_ends_the_stream_and_keeps_it_out(tmp_path: Path) -> None:
    with net(tmp_path, "ada", "ben", crl=tmp_path / "ca" / "revoked.crl") as made:
        for name in ("ada", "ben"):
            made.node(name, plain_app())
        made.until_connected()
        made.keys.ca.revoke("ada")
        assert made.grid is not None
        grid = made.grid
        until(lambda: "ada" not in grid.connected(), 5)
        assert "is revoked" in made.log.getvalue()
        time.sleep(1.5)
        assert set(grid.connected()) == {"ben"}
        (reply,) = grid.send_and_receive([grid.create_message(model(), "train", 2, "1", 30)], timeout=20)
        assert first(reply) == 1.0


def test_an_expired_certificate_ends_the_stream(pair: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    from datetime import UTC, datetime, timedelta

    pair.node("ada", plain_app())
    pair.until_connected("ada")

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(UTC) + timedelta(days=91)

    monkeypatch.setattr(server_streams, "datetime", Later)
    assert pair.grid is not None
    monkeypatch.setattr(server_streams, "RECHECK_S", 0.0)
    until(lambda: "ada" not in pair.grid.connected(), 5)  # type: ignore[union-attr]
    assert "expired" in pair.log.getvalue()


def test_another_protocol_version_is_refused_naming_both(pair: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_link, "PROTOCOL", 7)
    told = refused(pair, "ada", pair.keys.home("ada"))
    assert f"link protocol {PROTOCOL}" in told
    assert "7 (hansa" in told
    assert "FAILED_PRECONDITION" in told  # the node's log names both as well


# -- hostile peers with a good certificate ---------------------------------------------------------------------------


@contextlib.contextmanager
def raw(
    made: Net, name: str, hello: bool = True, more: tuple[tuple[str, int], ...] = ()
) -> Iterator[tuple[Any, Callable[..., None]]]:
    """A stream of ada's that says what a test wants; (call, send). Bytes are sent as they are."""
    import queue

    home = made.keys.home(name)
    out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    credentials = grpc.ssl_channel_credentials(home.ca_certificate(), home.tls_key_pem(), home.tls_certificate())
    options = [("grpc.ssl_target_name_override", "coordinator"), ("grpc.max_send_message_length", -1), *more]
    with grpc.secure_channel(f"127.0.0.1:{made.port}", credentials, options) as channel:
        call = channel.stream_stream(METHOD, lambda b: b, pb.FromServer.FromString)(iter(out.get, None))

        def send(data: bytes = b"", **body: Any) -> None:
            out.put(data or pb.FromNode(**body).SerializeToString())

        if hello:
            send(hello=pb.Hello(protocol=PROTOCOL, software="raw", credit=4))
        try:
            yield call, send
        finally:
            out.put(None)
            call.cancel()


def ended(call: Any) -> tuple[grpc.StatusCode, str]:
    with contextlib.suppress(grpc.RpcError):
        for _ in call:
            pass
    return call.code(), call.details()


def test_garbage(pair: Net) -> None:
    for data in (b"\xff" * 50, os.urandom(1000)):
        with raw(pair, "ada", hello=False) as (call, send):
            send(data)
            assert ended(call)[0] is grpc.StatusCode.INVALID_ARGUMENT
        with raw(pair, "ada") as (call, send):
            send(data)
            assert ended(call)[0] in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.ABORTED)
    with socket.create_connection(("127.0.0.1", pair.port)) as plain:
        plain.sendall(os.urandom(10_000))
    unaffected(pair)


def unaffected(made: Net) -> None:
    """Another node works as ever."""
    if "ben" not in made.running:
        made.node("ben", plain_app())
    assert first(answer(made, ask(made, 2))) == 1.0


def test_a_message_of_four_gigabytes_is_refused_by_its_length_prefix(pair: Net) -> None:
    """HTTP/2 by hand: only the prefix is ever sent, so that whoever allocates by it is caught."""
    before = peak_kb()
    with raw(pair, "ada") as (call, send):
        send(b"\0" * 6_000_000)
        assert ended(call)[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    home = pair.keys.home("ada")
    context = ssl.create_default_context(cafile=str(home.path / "ca.crt"))
    context.check_hostname = False
    context.load_cert_chain(home.path / "tls.crt", home.path / "tls.key")
    context.set_alpn_protocols(["h2"])
    with socket.create_connection(("127.0.0.1", pair.port)) as plain, context.wrap_socket(plain) as tls:
        connection = H2Connection()
        connection.initiate_connection()
        headers = [(":method", "POST"), (":scheme", "https"), (":path", METHOD), (":authority", "coordinator"),
                   ("content-type", "application/grpc"), ("te", "trailers")]  # fmt: skip
        connection.send_headers(1, headers)
        connection.send_data(1, b"\0" + (2**32 - 1).to_bytes(4, "big") + b"x" * 1000)
        tls.sendall(connection.data_to_send())
        tls.settimeout(10)
        got = b""
        with contextlib.suppress(TimeoutError, OSError):
            while b"larger" not in got and (data := tls.recv(65536)):
                got += data
    assert peak_kb() - before < 100_000
    unaffected(pair)


def peak_kb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_bytes_that_nobody_granted(pair: Net) -> None:
    with raw(pair, "ada") as (call, send):
        send(block=pb.Block(data=b"x" * 100))
        assert ended(call) == (grpc.StatusCode.INVALID_ARGUMENT, "bytes that were not asked for")


def test_more_bytes_than_announced(pair: Net) -> None:
    name = ask(pair)
    with raw(pair, "ada") as (call, send):
        records, _ = take_apart(model())
        send(offer=pb.Head(id=name, records=records, lengths=[8, 8]))
        assert any(m.WhichOneof("body") == "grant" for m in call)
        send(block=pb.Block(data=b"x" * 17))
        assert ended(call) == (grpc.StatusCode.INVALID_ARGUMENT, "more bytes than the message announced")
    pair.node("ada", plain_app())
    assert first(answer(pair, name)) == 1.0  # the request is still good


def test_ten_terabytes_announced(pair: Net) -> None:
    name = ask(pair)
    with raw(pair, "ada") as (_call, send):
        records, _ = take_apart(model())
        send(offer=pb.Head(id=name, records=records, lengths=[10 * 2**40, 8]))
        reply = answer(pair, name)
    assert reply.has_error()
    assert "at most" in str(reply.error.reason)


def test_the_answer_to_another_nodes_request(pair: Net) -> None:
    name = ask(pair, node=2)
    with raw(pair, "ada") as (call, send):
        records, _ = take_apart(model())
        send(offer=pb.Head(id=name, records=records, lengths=[8, 8]))
        assert ended(call) == (grpc.StatusCode.INVALID_ARGUMENT, "an answer to another node's request")
    pair.node("ben", plain_app())
    assert first(answer(pair, name)) == 1.0


def test_a_peer_that_stalls_half_way_loses_its_slot(pair: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_streams, "STALL_S", 1.0)
    assert pair.grid is not None
    pair.grid._streams._slots = 1
    name = ask(pair)
    with raw(pair, "ada") as (call, send):
        records, _ = take_apart(model())
        send(offer=pb.Head(id=name, records=records, lengths=[1000, 8]))
        assert any(m.WhichOneof("body") == "grant" for m in call)
        send(block=pb.Block(data=b"x" * 10))
        assert ended(call)[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    unaffected(pair)
    assert not list((pair.keys.root / "spool").glob(".hansa-tmp-*"))


def test_a_peer_that_never_says_hello(pair: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_streams, "STALL_S", 0.5)
    with raw(pair, "ada", hello=False) as (call, _):
        assert ended(call)[0] is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_thousand_connections(pair: Net) -> None:
    """Without certificates, silent: the server's memory stays, and an honest node gets in."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    before = peak_kb()
    opened = []
    try:
        for _ in range(1000):
            opened.append(socket.create_connection(("127.0.0.1", pair.port)))
        unaffected(pair)
        assert peak_kb() - before < 200_000
    finally:
        for connection in opened:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_address_is_taken(pair: Net) -> None:
    other = Net(pair.keys, ("ada",), port=pair.port)
    with pytest.raises(LinkError, match="cannot listen"):
        other.start()


def test_through_an_http_proxy(pair: Net) -> None:
    with connect_proxy() as (port, seen):
        pair.node("ada", plain_app(), proxy=f"http://127.0.0.1:{port}")
        assert first(answer(pair, ask(pair))) == 1.0
    assert set(seen) == {f"127.0.0.1:{pair.port}"}
    assert len(seen) >= 2  # the look at the certificate, and the link


# -- signed messages on the link -------------------------------------------------------------------------------------


def signed(
    made: Net, name: str, calls: list[str], gate: threading.Event | None = None
) -> tuple[ClientApp, SignedWire, Manifest]:
    """An app that answers signed requests, the coordinator's wire, and a request."""
    boss, me = made.keys.home("coordinator").identity(), made.keys.home(name).identity()
    mine = SignedWire(me, {"coordinator": boss.key}, CHARTER)
    app = ClientApp()

    def answer_it(message: Message, context: Any) -> Message:
        request, tensors, digest = mine.decode(message.content, "coordinator")
        calls.append(request.request_id)
        if gate is not None:
            gate.wait(20)
        update = {n: np.asarray(t) + 1 for n, t in tensors.items()}
        return Message(mine.encode(request.reply("update", digest), mine.pack(update))[0], reply_to=message)

    app.train()(answer_it)
    app.query()(answer_it)
    request = Manifest("train", "coordinator", name, CHARTER, "run-1", 1, "run-1.1", "", {})
    return app, SignedWire(boss, {n: made.keys.home(n).key() for n in made.names}, CHARTER), request


def push_signed(made: Net, wire: SignedWire, request: Manifest, kind: str = "train", size: int = 5) -> str:
    assert made.grid is not None
    content, _ = wire.encode(request, wire.pack({"w": np.zeros(size, np.float32)}))
    return next(iter(made.grid.push_messages([made.grid.create_message(content, kind, 1, "1", 30)])))


def test_an_edited_model_is_refused_before_it_is_whole(tmp_path: Path) -> None:
    """Somebody between: the manifest is the coordinator's, the bytes are not. The app never sees it."""
    calls: list[str] = []
    with net(tmp_path, "ada") as made:
        app, wire, request = signed(made, "ada", calls)
        mine = SignedWire(
            made.keys.home("ada").identity(), {"coordinator": made.keys.home("coordinator").key()}, CHARTER
        )
        made.node("ada", app, inspect=mine.inspect)
        content, _ = wire.encode(request, wire.pack({"w": np.zeros(5, np.float32)}))
        edited = wire.pack({"w": np.ones(5, np.float32)}).content
        assert made.grid is not None
        forged = RecordDict({"manifest": content["manifest"], "chunks": edited})
        name = next(iter(made.grid.push_messages([made.grid.create_message(forged, "train", 1, "1", 30)])))
        reply = answer(made, name)
        assert "not the one that the manifest names" in str(reply.error.reason)
        assert calls == []
        assert '"refused"' in made.log.getvalue()
        other = Manifest(**{**vars(request), "request_id": "run-1.2"})
        assert wire.decode(answer(made, push_signed(made, wire, other)).content, "ada")[0].request_id == "run-1.2"


def test_an_unsigned_request_never_reaches_the_app(tmp_path: Path) -> None:
    calls: list[str] = []
    with net(tmp_path, "ada") as made:
        app, _wire, request = signed(made, "ada", calls)
        stranger = SignedWire(Identity.generate("coordinator"), {"ada": made.keys.home("ada").key()}, CHARTER)
        mine = SignedWire(
            made.keys.home("ada").identity(), {"coordinator": made.keys.home("coordinator").key()}, CHARTER
        )
        made.node("ada", app, inspect=mine.inspect)
        reply = answer(made, push_signed(made, stranger, request))
        assert "not signed by" in str(reply.error.reason)
        assert calls == []


def test_a_forged_answer_does_not_keep_the_request_from_being_asked_again(tmp_path: Path) -> None:
    with net(tmp_path, "ada") as made:
        _, wire, request = signed(made, "ada", [])
        assert made.grid is not None
        made.grid.stop()
        made.start(inspect=wire.inspect)
        app = ClientApp()

        @app.train()
        def _train(message: Message, context: Any) -> Message:
            return Message(model(), reply_to=message)  # no signed message

        made.node("ada", app)
        name = push_signed(made, wire, request)
        assert "invalid answer" in str(answer(made, name).error.reason)
        assert '"refused"' in made.log.getvalue()


# -- little helpers --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def frozen_proxy(target: int) -> Iterator[tuple[int, threading.Event]]:
    """A TCP proxy that forwards until it is frozen; then it swallows, and closes nothing."""
    freeze, stop = threading.Event(), threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(a: socket.socket, b: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while not stop.is_set() and (data := a.recv(65536)):
                if not freeze.is_set():
                    b.sendall(data)
            if not freeze.is_set():
                b.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", target))
                for a, b in ((near, far), (far, near)):
                    threading.Thread(target=pump, args=(a, b), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1], freeze
    finally:
        stop.set()
        listener.close()


@contextlib.contextmanager
def connect_proxy() -> Iterator[tuple[int, list[str]]]:
    """An HTTP proxy that knows CONNECT, and the targets it was asked for."""
    seen: list[str] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(a: socket.socket, b: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := a.recv(65536):
                b.sendall(data)
            b.shutdown(socket.SHUT_WR)

    def serve(near: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += near.recv(1000)
        target = head.split()[1].decode()
        seen.append(target)
        host, port = target.rsplit(":", 1)
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
        yield listener.getsockname()[1], seen
    finally:
        listener.close()


def test_openssl_sees_what_we_say(pair: Net) -> None:
    """An outsider's look: TLS 1.3, an ECDSA certificate of our CA with the coordinator's name."""
    ca = pair.keys.home("ada").path / "ca.crt"
    shown = subprocess.run(
        ["openssl", "s_client", "-connect", f"127.0.0.1:{pair.port}", "-alpn", "h2", "-CAfile", str(ca), "-brief"],
        input=b"", capture_output=True, timeout=20, check=False,
    ).stderr.decode()  # fmt: skip
    assert "TLSv1.3" in shown
    assert "coordinator" in shown


def test_the_generated_code_is_that_of_the_proto_file() -> None:
    """`make proto` writes link_pb2.py; whoever edits link.proto and forgets it is told here."""
    text = (Path(pb.__file__).parent / "link.proto").read_text()
    for name, body in re.findall(r"^message (\w+) \{(.*?)\}\n(?=\n|message|$)", text, re.S | re.M):
        fields = {f: int(n) for f, n in re.findall(r"(\w+) = (\d+);", body)}
        assert {f.name: f.number for f in getattr(pb, name).DESCRIPTOR.fields} == fields, name


def test_what_nobody_waits_for_is_withdrawn(pair: Net) -> None:
    """A request that was not begun is not begun; one that is under way is not offered any more; memory is let go of."""
    hold, calls = threading.Event(), []
    app = ClientApp()

    @app.train()
    def _train(message: Message, context: Any) -> Message:
        calls.append(message.metadata.message_id)
        hold.wait(20)
        return plain_app()(message, context)

    pair.node("ada", app)
    pair.until_connected("ada")
    begun, waiting = ask(pair), ask(pair)
    until(lambda: calls and len(list((pair.keys.root / "inbox-ada").glob("*.request"))) == 2)
    assert pair.grid is not None
    pair.grid.withdraw([begun, waiting])
    assert pair.grid.state(begun) is pair.grid.state(waiting) is None
    until(lambda: not list((pair.keys.root / "inbox-ada").glob("*.request")))
    hold.set()
    assert first(answer(pair, ask(pair, value=2.0))) == 3.0
    assert calls[0] == begun
    assert waiting not in calls


# -- found by review -----------------------------------------------------------------------------------------------------


def test_a_full_disk_costs_the_coordinator_no_slot_and_no_partner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with net(tmp_path, "ada", "ben", uploads=1) as made:
        for name in ("ada", "ben"):
            made.node(name, plain_app())
        made.until_connected()
        real = frames._private

        def full(path: str, flags: int) -> int:  # ENOSPC by the kernel, at the flush
            return os.open("/dev/full", os.O_WRONLY) if "/spool/" in path else real(path, flags)

        monkeypatch.setattr(frames, "_private", full)
        assert made.grid is not None
        large = made.grid.create_message(model(1.0, size=500_000), "train", 1, "1", ttl=30)
        (name,) = made.grid.push_messages([large])
        until(lambda: "No space left on device" in made.log.getvalue())
        monkeypatch.setattr(frames, "_private", real)
        assert first(answer(made, name)) == 2.0
        assert first(answer(made, ask(made, node=2))) == 1.0


def test_a_partner_that_does_not_read_is_hung_up_on(pair: Net) -> None:
    def told() -> bool:
        return "does not read what it is told" in pair.log.getvalue()

    pair.node("ben", plain_app())
    # A window that does not grow: what is on the way to somebody who does not read is little.
    with raw(pair, "ada", more=(("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 16))) as (_, send):
        name = ask(pair)
        send(offer=pb.Head(id=name, failure=pb.Failure(code=1, reason="no")))
        again = pb.FromNode(offer=pb.Head(id=name, failure=pb.Failure(code=1, reason="no"))).SerializeToString()
        for _i in range(400):  # each would be answered by `done`; nobody reads `call`
            for _j in range(500):
                send(again)
            time.sleep(0.05)
            if told():
                break
        until(told, 60)
    assert first(answer(pair, ask(pair, node=2))) == 1.0


def test_a_trickle_holds_no_slot_beyond_its_requests_time(tmp_path: Path) -> None:
    with net(tmp_path, "ada", "ben", uploads=1) as made, raw(made, "ada") as (call, send):
        made.node("ben", plain_app())
        made.until_connected()
        assert made.grid is not None
        (name,) = made.grid.push_messages([made.grid.create_message(model(), "train", 1, "1", ttl=3)])
        records, _ = take_apart(model())
        send(offer=pb.Head(id=name, records=records, lengths=[10**6, 8]))
        assert any(m.WhichOneof("body") == "grant" for m in call)
        send(block=pb.Block(data=b"x"))
        (reply,) = made.grid.send_and_receive([made.grid.create_message(model(), "train", 2, "1", 15)], timeout=15)
        assert first(reply) == 1.0
        assert ended(call) == (grpc.StatusCode.DEADLINE_EXCEEDED, "the answer was not here in time")


def test_a_list_of_revoked_that_vanishes_or_grows_old_brings_nobody_back(tmp_path: Path) -> None:
    crl = tmp_path / "ca" / "revoked.crl"
    with net(tmp_path, "ada", "ben", crl=crl) as made:
        old = crl.read_bytes()
        made.node("ada", plain_app())
        made.until_connected("ada")
        made.keys.ca.revoke("ada")
        assert made.grid is not None
        grid = made.grid
        until(lambda: not grid.connected(), 5)
        for change in (crl.unlink, lambda: crl.write_bytes(old)):
            seen = made.log.getvalue().count("revocation list not read")
            change()
            until(lambda seen=seen: made.log.getvalue().count("revocation list not read") > seen, 5)  # type: ignore[misc]
        time.sleep(2.5)
        assert not grid.connected()


@pytest.mark.parametrize("kind", ["bogus", ""])
def test_a_type_of_message_that_nobody_knows_is_an_error_and_not_the_nodes_end(
    kind: str, pair: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.node("ada", plain_app())
    real = Request.head

    def head(self: Request) -> pb.Head:
        made = real(self)
        made.message_type = kind
        return made

    monkeypatch.setattr(Request, "head", head)
    assert answer(pair, ask(pair)).error.reason == "the node failed"
    monkeypatch.setattr(Request, "head", real)
    assert first(answer(pair, ask(pair))) == 1.0


def test_a_question_is_asked_anew_after_a_restart(tmp_path: Path) -> None:
    said = iter(["refused: not approved", "accepted"])
    begun, go = threading.Event(), threading.Event()
    app = ClientApp()

    @app.query("open")
    def _open(message: Message, context: Context) -> Message:
        word = next(said)
        begun.set()
        go.wait(10)
        return Message(RecordDict({"said": ConfigRecord({"a": word})}), reply_to=message)

    def question(grid: GrpcGrid) -> Message:
        sealed = RecordDict({"manifest": ConfigRecord({"sealed": b"the same bytes"}), "chunks": ArrayRecord()})
        return grid.create_message(sealed, "query.open", 1, "0", ttl=60)

    with net(tmp_path, "ada") as made:
        made.node("ada", app)
        made.until_connected()
        assert made.grid is not None
        list(made.grid.push_messages([question(made.grid)]))
        assert begun.wait(10)
        made.grid.stop()
        go.set()
        made.start()
        made.until_connected()
        (reply,) = made.grid.send_and_receive([question(made.grid)], timeout=20)
        assert reply.content["said"]["a"] == "accepted"


def test_a_node_takes_no_request_that_its_disk_has_no_room_for(pair: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.node("ada", plain_app())
    monkeypatch.setattr("hansa.clients.link.shutil.disk_usage", lambda _: SimpleNamespace(free=20))
    assert answer(pair, ask(pair)).error.reason == "request refused: this node's disk has no room for it"
    monkeypatch.undo()
    assert first(answer(pair, ask(pair))) == 1.0
