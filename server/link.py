"""The gRPC link's face: a Flower Grid for partner nodes, which dial in over mutual TLS.

Any thread may use the Grid; the streams (`streams`) live on an event loop of their own, and both meet at one table of requests
(`requests`). docs/link.md describes the protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..common import link_pb2 as pb
from ..common.errors import HansaError, LinkError
from ..common.events import EventLog
from ..common.flower import DEFAULT_TTL, Grid, Message, RecordDict, Run, addressed, empty_run, grpc
from ..common.frames import FRAME_BYTES, KEEPALIVE_S, METHOD, Inspect, request_id
from ..common.home import Home
from .requests import Requests, State
from .streams import Streams

_OPTIONS = [
    # HTTP/2 holds a sender back after so many bytes. gRPC's own estimate grows to tens of megabytes a stream when this process
    # is busy; this is 10 MB/s from each node over a line of 100 ms.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1024 * 1024),
    ("grpc.max_receive_message_length", FRAME_BYTES),
    ("grpc.max_send_message_length", FRAME_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_S * 1000),
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_S * 1000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.max_concurrent_streams", 4),  # of one connection; a node needs one
    ("grpc.max_connection_idle_ms", 30_000),  # a connection without a stream
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.so_reuseport", 0),  # a second server on this port is an error, not a silent rival
]


class GrpcGrid(Grid):
    """Flower's Grid for partner nodes.

    Args:
        listen: HOST:PORT; port 0 takes a free one (see `port`).
        home: the coordinator's keys and certificates.
        keys: partner name -> identity key (hex), as the charter has them: who may connect.
        roster: partner name -> the Grid's node id.
        inspect: what a reply's arrays must hash to, from its signed manifest, or MessageError; None takes any reply.
        spool: folder for replies that are on their way or not folded yet.
        crl: revocation list; read again whenever the file changes.
        uploads: so many replies are received at once; memory is a few MB for each.
    """

    def __init__(
        self,
        listen: str,
        home: Home,
        passphrase: str | None,
        keys: Mapping[str, str],
        roster: Mapping[str, int],
        spool: Path,
        log: EventLog,
        inspect: Inspect | None = None,
        crl: Path | None = None,
        uploads: int = 4,
    ) -> None:
        self._listen = listen
        self._home = home
        self._passphrase = passphrase
        self._log = log
        self._run = empty_run()
        self._requests = Requests(spool, roster, inspect)
        self._streams = Streams(self._requests, keys, roster, inspect, home, crl, uploads, log)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stop: asyncio.Event | None = None
        self._failed: BaseException | None = None
        self.port = 0

    # -- from any thread ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen.

        Raises:
            LinkError: the address cannot be listened on.
            IdentityError: keys or certificates are missing or do not fit.
        """
        self._requests.open_spool()
        self._streams.read_revocations()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._live, args=(ready,), name="hansa-link", daemon=True)
        self._thread.start()
        ready.wait()
        if self._failed is not None:
            self._thread.join()
            raise self._failed

    def stop(self) -> None:
        """Close every stream; nodes reconnect when the Grid is started again."""
        if self._thread is not None and self._loop is not None and self._stop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended by itself
                self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    def connected(self) -> dict[str, dict[str, str]]:
        """Partner name -> since when, from where, with which software and TLS version it is connected."""
        return {
            p.name: {
                "since": p.since.isoformat(timespec="seconds"),
                "address": p.address,
                "version": p.version,
                "tls": p.tls,
            }
            for p in self._streams.connected()
        }

    def wait(self, timeout_s: float) -> None:
        """Return when a reply may be there, a peer came or went, or the time is over."""
        self._requests.wait(timeout_s)

    def withdraw(self, message_ids: Iterable[str]) -> None:
        """Nobody waits for these any more: nodes are told, and the arrays are let go of before this returns."""
        if found := self._requests.withdraw(message_ids):
            self._soon(self._streams.expired, found)

    def state(self, message_id: str) -> State | None:
        """Where a request is; None when it was never pushed or is long forgotten."""
        request = self._requests.get(message_id)
        return request.state if request else None

    # -- Flower's Grid -----------------------------------------------------------------------------------------------

    def set_run(self, run: Run) -> None:
        """Set the run that messages belong to."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message to one node."""
        name = request_id(content) or uuid.uuid4().hex
        return addressed(content, message_type, dst_node_id, group_id, ttl or DEFAULT_TTL, name, time.time())

    def get_node_ids(self) -> Iterable[int]:
        """The nodes that are connected now."""
        return sorted(peer.node for peer in self._streams.connected())

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; each goes out when its node is there and has credit for it.

        A signed request keeps its name after a crash, so one whose reply is in the spool already is not sent again.
        """
        pushed = []
        self._requests.forget_folded()
        for message in messages:
            meta = message.metadata
            if not meta.message_id:  # made by a strategy, not by create_message
                message = self.create_message(
                    message.content, meta.message_type, meta.dst_node_id, meta.group_id, meta.ttl
                )
            pushed.append(str(message.metadata.message_id))
            if (request := self._requests.push(message)) is not None:
                self._soon(self._streams.queued, request)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """The replies that are there, one at a time: each is folded before the next is looked at."""
        return self._requests.pull(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push, then wait for every reply, or until the time is over."""
        missing = set(self.push_messages(messages))
        end = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while missing and (end is None or time.monotonic() < end):
            for reply in self.pull_messages(list(missing)):
                missing.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
            if missing:
                self.wait(1.0 if end is None else max(0.0, min(1.0, end - time.monotonic())))
        return replies

    def _soon(self, call: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None, "the Grid is not started"
        self._loop.call_soon_threadsafe(call, *arguments)

    # -- on the event loop -------------------------------------------------------------------------------------------

    def _live(self, ready: threading.Event) -> None:
        try:
            asyncio.run(self._serve(ready))
        except BaseException as err:
            self._failed = err
        finally:
            ready.set()
            self._streams.lost()

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = grpc.aio.server(options=_OPTIONS)
        method = grpc.stream_stream_rpc_method_handler(
            self._streams.attach, request_deserializer=None, response_serializer=pb.FromServer.SerializeToString
        )
        _, service, call = METHOD.split("/")
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {call: method}),))
        try:
            self.port = server.add_secure_port(self._listen, self._credentials())
        except RuntimeError as err:
            raise LinkError(
                f"cannot listen on {self._listen}", "Is another server running there? Give another `listen`."
            ) from err
        await server.start()
        self._log.log("listening", address=f"{self._listen.rpartition(':')[0]}:{self.port}")
        watch = asyncio.create_task(self._streams.watch())
        ready.set()
        try:
            await self._stop.wait()
        finally:
            watch.cancel()
            for peer in self._streams.connected():
                peer.end(grpc.StatusCode.UNAVAILABLE, "the coordinator stops")
            await server.stop(2.0)

    def _credentials(self) -> grpc.ServerCredentials:
        """Credentials that follow the files, so that a renewed certificate needs no restart."""
        last: list[Any] = [None, None]

        def fetch() -> grpc.ssl_server_certificate_configuration | None:
            chain, ca = self._home.tls_certificate(), self._home.ca_certificate()
            if last[0] == (chain, ca):
                return None
            pair = (self._home.tls_key_pem(self._passphrase), chain)
            last[0] = (chain, ca)
            return grpc.ssl_server_certificate_configuration([pair], root_certificates=ca)

        def renewed() -> grpc.ssl_server_certificate_configuration | None:
            try:
                return fetch()
            except HansaError:
                return None  # half-way through a renewal; the old one stays

        return grpc.dynamic_ssl_server_credentials(fetch(), renewed, require_client_authentication=True)
