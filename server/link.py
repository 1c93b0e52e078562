"""The gRPC link: a Flower Grid over one mutual-TLS stream a node.

Nodes dial in; who a peer is follows from its TLS key, which the charter's identity key endorsed, and from nothing that it
says. Any thread may use the Grid; the streams live on an event loop of their own. The life of a request is in docs/link.md:

    queued -> sent -> acknowledged -> replied -> folded        or at any time before: expired

A reply is taken only when there is a slot for it (so memory does not grow with the number of nodes), is compared with its
signed manifest block by block, and stands in one file until it was folded.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from ..common import link_pb2 as pb
from ..common.certificates import Home, PeerCertificate, RevocationList, check_peer, read_certificate
from ..common.errors import HansaError, IdentityError, LinkError, MessageError
from ..common.events import EventLog
from ..common.flower import (
    CLIENT_APP_FAILED,
    DEFAULT_TTL,
    MESSAGE_UNAVAILABLE,
    NODE_UNAVAILABLE,
    Array,
    Error,
    Grid,
    Message,
    RecordDict,
    Run,
    addressed,
    empty_run,
    grpc,
)
from ..common.frames import (
    FRAME_BYTES,
    KEEPALIVE_S,
    METHOD,
    PROTOCOL,
    Expected,
    Inspect,
    Spool,
    Spooled,
    blocks,
    check_head,
    drop_unfinished,
    length_of,
    request_id,
    take_apart,
)
from ..common.plan import SOFTWARE

STALL_S = 20.0
"""A granted reply must make progress, and a new stream must say hello, within this time."""
RECHECK_S = 30.0
"""How often connected certificates are looked at again: one may have expired."""
SPARE_BYTES = 256 * 1024 * 1024
"""A reply is granted only if so much of the disk stays free behind it."""
MOST_CREDIT = 64
"""The most unanswered requests that a node is sent at once, whatever it offers."""

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


class State(StrEnum):
    """Where a request is; docs/link.md."""

    QUEUED = "queued"
    SENT = "sent"
    ACKNOWLEDGED = "acknowledged"
    REPLIED = "replied"
    FOLDED = "folded"
    EXPIRED = "expired"


@dataclass(eq=False)
class _Request:
    message: Message
    node: int
    records: bytes
    arrays: list[Array]
    deadline: float  # time.monotonic
    state: State = State.QUEUED
    spooled: Spooled | None = None
    error: Error | None = None

    @property
    def id(self) -> str:
        return str(self.message.metadata.message_id)

    @property
    def open(self) -> bool:
        return self.state in (State.QUEUED, State.SENT, State.ACKNOWLEDGED)

    @property
    def repeatable(self) -> bool:
        """Whether an earlier reply to it is still the reply: a query is asked anew, work is answered once."""
        return not self.message.metadata.message_type.startswith("query")

    def head(self) -> pb.Head:
        meta = self.message.metadata
        return pb.Head(
            id=self.id,
            message_type=meta.message_type,
            group_id=meta.group_id,
            remaining_s=self.deadline - time.monotonic(),
            records=self.records,
            lengths=[length_of(a) for a in self.arrays],
        )


@dataclass(eq=False)
class _Peer:
    """A node's stream, as long as it lasts."""

    name: str
    node: int
    certificate: PeerCertificate
    address: str
    tls: str
    version: str
    credit: int
    have: set[str]
    since: datetime = field(default_factory=lambda: datetime.now(UTC))
    control: deque[pb.FromServer] = field(default_factory=deque)
    offers: dict[str, pb.Head] = field(default_factory=dict)  # not granted yet
    upload: Spool | None = None
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Future[tuple[grpc.StatusCode, str]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def tell(self, **body: Any) -> None:
        self.control.append(pb.FromServer(**body))
        self.wake.set()

    def end(self, code: grpc.StatusCode, why: str) -> None:
        if not self.ended.done():
            self.ended.set_result((code, why))


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
        self._keys = dict(keys)
        self._roster = dict(roster)
        self._inspect = inspect
        self._spool = spool
        self._log = log
        self._crl = crl
        self._revoked: RevocationList | None = None
        self._slots = uploads
        self._run = empty_run()
        self._requests: dict[str, _Request] = {}
        self._peers: dict[str, _Peer] = {}
        # Guards requests' states and `_requests`; told whenever a reply is there or a peer came or went.
        self._changed = threading.Condition()
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
        self._spool.mkdir(parents=True, exist_ok=True)
        drop_unfinished(self._spool)
        self._read_revocations()
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
        with self._changed:
            peers = list(self._peers.values())
        return {
            p.name: {
                "since": p.since.isoformat(timespec="seconds"),
                "address": p.address,
                "version": p.version,
                "tls": p.tls,
            }
            for p in peers
        }

    def wait(self, timeout_s: float) -> None:
        """Return when a reply may be there, a peer came or went, or the time is over."""
        with self._changed:
            if not any(r.state in (State.REPLIED, State.EXPIRED) for r in self._requests.values()):
                self._changed.wait(timeout_s)

    def withdraw(self, message_ids: Iterable[str]) -> None:
        """Nobody waits for these any more: nodes are told, and the arrays are let go of before this returns."""
        with self._changed:
            found = [self._requests.pop(name) for name in message_ids if name in self._requests]
            for request in found:
                request.state, request.arrays = State.EXPIRED, []
        if found:
            self._soon(self._tell_expired, found)

    def state(self, message_id: str) -> State | None:
        """Where a request is; None when it was never pushed or is long forgotten."""
        with self._changed:
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
        with self._changed:
            return sorted(peer.node for peer in self._peers.values())

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; each goes out when its node is there and has credit for it.

        A signed request keeps its name after a crash, so one whose reply is in the spool already is not sent again.
        """
        pushed = []
        self._forget_folded()
        for message in messages:
            meta = message.metadata
            if not meta.message_id:  # made by a strategy, not by create_message
                message = self.create_message(
                    message.content, meta.message_type, meta.dst_node_id, meta.group_id, meta.ttl
                )
            pushed.append(str(message.metadata.message_id))
            self._push(message)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """The replies that are there, one at a time: each is folded before the next is looked at."""
        for name in list(message_ids):
            with self._changed:
                request = self._requests.get(name)
                if request is None or request.state not in (State.REPLIED, State.EXPIRED):
                    continue
                expired = request.state is State.EXPIRED
                request.state = State.FOLDED
                if expired:
                    del self._requests[name]
            if request.error is not None:
                yield Message(request.error, reply_to=request.message)
            else:
                assert request.spooled is not None
                content = request.spooled.content(checked=self._inspect is not None)
                yield Message(content, reply_to=request.message)

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

    def _push(self, message: Message) -> None:
        meta = message.metadata
        records, arrays = take_apart(message.content)
        # Without its content: the arrays may be those of a whole model, which must not live longer than it is sent.
        bare = addressed(
            RecordDict(), meta.message_type, meta.dst_node_id, meta.group_id, meta.ttl, meta.message_id, time.time()
        )
        request = _Request(bare, meta.dst_node_id, records, arrays, time.monotonic() + meta.ttl)
        with self._changed:
            before = self._requests.get(request.id)
            if before is not None and before.open:
                before.deadline = request.deadline
                return
            if meta.dst_node_id not in self._roster.values():
                request.error = Error(NODE_UNAVAILABLE, f"no node {meta.dst_node_id}")
                request.state = State.REPLIED
            elif request.repeatable and (found := self._find(request)) is not None:
                request.spooled, request.state = found, State.REPLIED
            self._requests[request.id] = request
            if request.state is State.REPLIED:
                self._changed.notify_all()
                return
        self._soon(self._queued, request)

    def _find(self, request: _Request) -> Spooled | None:
        """An answer that arrived before a crash, or before this request was pushed again."""
        path = self._spool / f"{request.id}.reply"
        if not path.exists():
            return None
        name = self._name(request.node)
        inspect = self._inspect
        try:
            return Spooled.load(path, None if inspect is None else lambda records: inspect(records, name))
        except MessageError:
            path.unlink(missing_ok=True)  # torn by a power cut: the node still has it
            return None

    def _forget_folded(self) -> None:
        """Drop what was folded before: a coordinator pushes again only once it has written down what it folded.

        And what came, or expired, and nobody pulled before its time was over.
        """
        now = time.monotonic()
        with self._changed:
            for request in [
                r for r in self._requests.values() if r.state is State.FOLDED or (not r.open and now >= r.deadline)
            ]:
                del self._requests[request.id]
                if request.spooled is not None:
                    request.spooled.path.unlink(missing_ok=True)

    def _name(self, node: int) -> str:
        return next(name for name, number in self._roster.items() if number == node)

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
            with self._changed:
                self._peers.clear()
                self._changed.notify_all()

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = grpc.aio.server(options=_OPTIONS)
        method = grpc.stream_stream_rpc_method_handler(
            self._attach, request_deserializer=None, response_serializer=pb.FromServer.SerializeToString
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
        watch = asyncio.create_task(self._watch())
        ready.set()
        try:
            await self._stop.wait()
        finally:
            watch.cancel()
            for peer in list(self._peers.values()):
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

    async def _attach(self, _: Any, context: grpc.aio.ServicerContext) -> None:
        """One node's stream."""
        certificate, name = await self._admit(context)
        hello = await self._hello(context)
        tls = context.auth_context().get("ssl_tls_version", [b"unknown"])[0].decode()
        peer = _Peer(
            name,
            self._roster[name],
            certificate,
            context.peer(),
            tls,
            hello.software[:100],
            max(1, min(hello.credit, MOST_CREDIT)),
            set(hello.have[:MOST_CREDIT]),
        )
        while (
            older := self._peers.get(name)
        ) is not None:  # the newest wins: an older one may be dead, and not know it
            older.end(grpc.StatusCode.ABORTED, "another connection of this partner took over")
            await older.gone.wait()
        with self._changed:
            self._peers[name] = peer
            for request in self._of(peer):
                # Whatever was on its way on an earlier stream is lost; what the node has on disk is not.
                request.state = State.QUEUED
            self._changed.notify_all()
        self._log.log("connected", partner=name, address=peer.address, version=peer.version)
        tasks = [asyncio.create_task(work) for work in (self._write(peer, context), self._read(peer, context))]
        waited: list[asyncio.Future[Any]] = [*tasks, peer.ended]
        code, why = grpc.StatusCode.OK, "closed by the node"
        try:
            done, _ = await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if peer.ended in done:
                code, why = peer.ended.result()
            else:
                for task in done:
                    task.result()  # the first that failed says why
        except (DecodeError, MessageError) as err:
            code, why = grpc.StatusCode.INVALID_ARGUMENT, str(err) or "not a message of this link"
        except TimeoutError:
            code, why = grpc.StatusCode.DEADLINE_EXCEEDED, f"no progress within {STALL_S:g} s"
        except OSError as err:
            code, why = grpc.StatusCode.RESOURCE_EXHAUSTED, f"the coordinator's disk: {err.strerror}"
        except asyncio.CancelledError:
            why = "connection lost"
            raise
        finally:
            for task in tasks:
                task.cancel()
            self._gone(peer, why)
        if code is not grpc.StatusCode.OK:
            await context.abort(code, why)

    async def _admit(self, context: grpc.aio.ServicerContext) -> tuple[PeerCertificate, str]:
        """Who this is, by its TLS key; nothing that it says is asked."""
        pem = context.auth_context().get("x509_pem_cert", [b""])[0]
        try:
            certificate = read_certificate(pem)
            return certificate, self._check(certificate)
        except IdentityError as err:
            self._log.log("refused", address=context.peer(), reason=err.message)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, err.message)
            raise AssertionError("abort raises") from err

    def _check(self, certificate: PeerCertificate) -> str:
        return check_peer(certificate, self._keys, datetime.now(UTC), self._revoked)

    async def _hello(self, context: grpc.aio.ServicerContext) -> pb.Hello:
        try:
            raw = await asyncio.wait_for(context.read(), STALL_S)
            message = pb.FromNode.FromString(raw if isinstance(raw, bytes) else b"")
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "no hello")
        except DecodeError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not a message of this link")
        if message.WhichOneof("body") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message is hello")
        hello = message.hello
        if hello.protocol != PROTOCOL:
            why = (
                f"link protocol {PROTOCOL} ({SOFTWARE}) here, {hello.protocol} ({hello.software[:100]}) there; "
                "both sides must speak the same"
            )
            self._log.log("refused", address=context.peer(), reason=why)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, why)
        await context.write(pb.FromServer(welcome=pb.Welcome(protocol=PROTOCOL, software=SOFTWARE)))
        return hello

    def _gone(self, peer: _Peer, why: str) -> None:
        if peer.upload is not None:
            peer.upload.drop()
            peer.upload = None
            self._slots += 1
        with self._changed:
            if self._peers.get(peer.name) is peer:
                del self._peers[peer.name]
                for request in self._of(peer):
                    request.state = State.QUEUED
            self._changed.notify_all()
        peer.gone.set()
        self._log.log("disconnected", partner=peer.name, reason=why)
        self._grant()

    def _of(self, peer: _Peer) -> list[_Request]:
        """The node's open requests. Under the lock."""
        return [r for r in self._requests.values() if r.node == peer.node and r.open]

    def _queued(self, request: _Request) -> None:
        for peer in self._peers.values():
            if peer.node == request.node:
                peer.wake.set()

    # -- towards a node ----------------------------------------------------------------------------------------------

    async def _write(self, peer: _Peer, context: grpc.aio.ServicerContext) -> None:
        while True:
            peer.wake.clear()
            while peer.control:
                await context.write(peer.control.popleft())
            request = self._next(peer)
            if request is not None:
                await self._send(peer, request, context)
            elif not peer.control:
                await peer.wake.wait()

    def _next(self, peer: _Peer) -> _Request | None:
        with self._changed:
            mine = self._of(peer)
            under_way = sum(r.state is not State.QUEUED for r in mine)
            return next((r for r in mine if r.state is State.QUEUED), None) if under_way < peer.credit else None

    async def _send(self, peer: _Peer, request: _Request, context: grpc.aio.ServicerContext) -> None:
        self._to(request, State.SENT)
        head = request.head()
        if request.id in peer.have:
            await context.write(pb.FromServer(want=pb.Want(id=request.id, remaining_s=head.remaining_s)))
            self._to(request, State.ACKNOWLEDGED)
            return
        await context.write(pb.FromServer(request=head))
        for data in blocks(request.arrays):
            if not request.open:
                return  # expired meanwhile: `done` follows, and the node drops what it has of it
            await context.write(pb.FromServer(block=pb.Block(data=data)))

    def _to(self, request: _Request, state: State) -> None:
        with self._changed:
            if request.open:
                request.state = state

    # -- from a node -------------------------------------------------------------------------------------------------

    async def _read(self, peer: _Peer, context: grpc.aio.ServicerContext) -> None:
        while True:
            patience = STALL_S if peer.upload is not None else None
            raw = await asyncio.wait_for(context.read(), patience)
            if not isinstance(raw, bytes):
                return  # the node closed its side
            message = pb.FromNode.FromString(raw)
            match message.WhichOneof("body"):
                case "have":
                    request = self._requests.get(message.have.id)
                    if request is not None and request.node == peer.node and request.state is State.SENT:
                        peer.have.add(request.id)
                        self._to(request, State.ACKNOWLEDGED)
                case "offer":
                    self._offered(peer, message.offer)
                case "block":
                    self._block(peer, message.block.data)
                case _:
                    raise MessageError("a message out of order")

    def _offered(self, peer: _Peer, head: pb.Head) -> None:
        """A node has an answer. Its head is checked now, its bytes are asked for when there is a slot for them."""
        with self._changed:
            request = self._requests.get(head.id)
            if request is None:
                return  # a restarted coordinator may push it yet; then the node hears that it is wanted, and offers it again
            if request.node != peer.node:
                raise MessageError("an answer to another node's request")
            if not request.open:
                peer.tell(done=pb.Done(id=head.id))
                return
        if head.HasField("failure"):
            code = head.failure.code if 0 < head.failure.code < 1000 else CLIENT_APP_FAILED
            self._answered(peer, request, error=Error(code, head.failure.reason[:200]))
            return
        try:
            self._expected(peer, head)
        except MessageError as err:
            self._log.log("refused", partner=peer.name, reason=err.message)
            self._answered(peer, request, error=Error(CLIENT_APP_FAILED, f"invalid answer: {err.message}"[:300]))
            return
        peer.offers[head.id] = head
        self._grant()

    def _expected(self, peer: _Peer, head: pb.Head) -> Expected | None:
        records = check_head(head)
        return None if self._inspect is None else self._inspect(records, peer.name)

    def _grant(self) -> None:
        """Give free slots to the nodes that wait, the longest connected first; one a node."""
        for peer in list(self._peers.values()):
            if self._slots < 1:
                return
            if peer.upload is not None:
                continue
            for name, head in list(peer.offers.items()):
                with self._changed:
                    request = self._requests.get(name)
                if request is None:
                    continue
                del peer.offers[name]
                if not request.open:
                    peer.tell(done=pb.Done(id=name))
                    continue
                try:
                    self._begin(peer, request, head)
                except OSError as err:
                    peer.end(grpc.StatusCode.RESOURCE_EXHAUSTED, f"the coordinator's disk: {err.strerror}")
                break

    def _begin(self, peer: _Peer, request: _Request, head: pb.Head) -> None:
        size = sum(head.lengths)
        if size and shutil.disk_usage(self._spool).free < size + SPARE_BYTES:
            raise OSError(28, "not enough space for this answer")
        spool = Spool(self._spool / f"{request.id}.reply", head, self._expected(peer, head))
        if not size:
            self._answered(peer, request, spooled=spool.finish())
            return
        self._slots -= 1
        peer.upload = spool
        peer.tell(grant=pb.Grant(id=head.id))

    def _block(self, peer: _Peer, data: bytes) -> None:
        if peer.upload is None:
            raise MessageError("bytes that were not asked for")
        peer.upload.write(data)
        if peer.upload.missing:
            return
        spooled, peer.upload = peer.upload.finish(), None
        self._slots += 1
        with self._changed:
            request = self._requests.get(spooled.head.id)
        if request is not None and request.open:
            self._answered(peer, request, spooled=spooled)
        else:
            spooled.path.unlink(missing_ok=True)
            peer.tell(done=pb.Done(id=spooled.head.id))
        self._grant()

    def _answered(
        self, peer: _Peer, request: _Request, spooled: Spooled | None = None, error: Error | None = None
    ) -> None:
        with self._changed:
            if request.open:
                request.spooled, request.error, request.state = spooled, error, State.REPLIED
                request.arrays = []
                self._changed.notify_all()
        peer.have.discard(request.id)
        peer.offers.pop(request.id, None)
        peer.tell(done=pb.Done(id=request.id))

    # -- what time brings --------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        seen, checked = self._crl_stamp(), time.monotonic()
        while True:
            await asyncio.sleep(0.25)
            self._expire()
            if (stamp := self._crl_stamp()) != seen:
                seen, checked = stamp, -math.inf
                self._read_revocations()
            if time.monotonic() < checked + RECHECK_S:
                continue
            checked = time.monotonic()
            for peer in list(self._peers.values()):
                try:
                    self._check(peer.certificate)
                except IdentityError as err:  # revoked, or expired, while it was connected
                    self._log.log("refused", partner=peer.name, reason=err.message)
                    peer.end(grpc.StatusCode.PERMISSION_DENIED, err.message)

    def _expire(self) -> None:
        now = time.monotonic()
        with self._changed:
            late = [r for r in self._requests.values() if r.open and now >= r.deadline]
            for request in late:
                request.state, request.arrays = State.EXPIRED, []
                request.error = Error(MESSAGE_UNAVAILABLE, "no answer in time")
            if late:
                self._changed.notify_all()
        self._tell_expired(late)

    def _tell_expired(self, late: list[_Request]) -> None:
        for request in late:
            for peer in self._peers.values():
                if peer.node == request.node:
                    peer.have.discard(request.id)
                    peer.offers.pop(request.id, None)
                    peer.tell(done=pb.Done(id=request.id))

    def _crl_stamp(self) -> tuple[int, int] | None:
        if self._crl is None:
            return None
        try:
            found = self._crl.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size

    def _read_revocations(self) -> None:
        """Read the list; one that cannot be read leaves the last good one in force."""
        if self._crl is None:
            return
        try:
            self._revoked = RevocationList.load(self._crl, self._home.ca_certificate())
        except IdentityError as err:
            if self._loop is None:  # at the start: say it at once
                raise
            self._log.log("revocation list not read", reason=err.message)
