"""The streams of the gRPC link: one a node, over mutual TLS, all of them on one event loop.

Who a peer is follows from its TLS key, which the charter's identity key endorsed, and from nothing that it says. A reply is
taken only when there is a slot for it (so memory does not grow with the number of nodes), and is compared with its signed
manifest block by block.
"""

from __future__ import annotations

import asyncio
import math
import shutil
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from ..common import link_pb2 as pb
from ..common.certificates import PeerCertificate, RevocationList, check_peer, read_certificate
from ..common.errors import IdentityError, MessageError
from ..common.events import EventLog
from ..common.flower import (
    CLIENT_APP_FAILED,
    Error,
    grpc,
)
from ..common.frames import (
    PROTOCOL,
    Expected,
    Inspect,
    Spool,
    Spooled,
    blocks,
    check_head,
)
from ..common.home import Home
from ..common.plan import SOFTWARE
from .requests import Request, Requests, State

STALL_S = 20.0
"""A granted reply must make progress, and a new stream must say hello, within this time."""
RECHECK_S = 30.0
"""How often connected certificates are looked at again: one may have expired."""
SPARE_BYTES = 256 * 1024 * 1024
"""A reply is granted only if so much of the disk stays free behind it."""
MOST_UNREAD = 256
"""Short messages that may wait for a node to read them."""
MOST_CREDIT = 64
"""The most unanswered requests that a node is sent at once, whatever it offers."""


@dataclass(eq=False)
class Peer:
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
        """Send a short message, before whatever is waiting. Who does not read them is hung up on."""
        if len(self.control) >= MOST_UNREAD:
            self.end(grpc.StatusCode.RESOURCE_EXHAUSTED, "this node does not read what it is told")
            return
        self.control.append(pb.FromServer(**body))
        self.wake.set()

    def end(self, code: grpc.StatusCode, why: str) -> None:
        """End the stream; the node is told why."""
        if not self.ended.done():
            self.ended.set_result((code, why))


class Streams:
    """All streams of a coordinator. Only `connected` may be called from another thread than the event loop's.

    Args:
        keys: partner name -> identity key (hex), as the charter has them: who may connect.
        roster: partner name -> the Grid's node id.
        home: the coordinator's; its CA signs the revocation list.
        crl: revocation list; read again whenever the file changes.
        slots: so many replies are received at once; memory is a few MB for each.
    """

    def __init__(
        self,
        requests: Requests,
        keys: Mapping[str, str],
        roster: Mapping[str, int],
        inspect: Inspect | None,
        home: Home,
        crl: Path | None,
        slots: int,
        log: EventLog,
    ) -> None:
        self._requests = requests
        self._keys = dict(keys)
        self._roster = dict(roster)
        self._inspect = inspect
        self._home = home
        self._crl = crl
        self._slots = slots
        self._log = log
        self._peers: dict[str, Peer] = {}
        self._revoked: RevocationList | None = None

    def connected(self) -> list[Peer]:
        """The nodes that are connected now."""
        with self._requests.changed:
            return list(self._peers.values())

    def lost(self) -> None:
        """The event loop has ended, and every stream with it."""
        with self._requests.changed:
            self._peers.clear()
            self._requests.changed.notify_all()

    # -- one stream --------------------------------------------------------------------------------------------------

    async def attach(self, _: Any, context: grpc.aio.ServicerContext) -> None:
        """One node's stream."""
        certificate, name = await self._admit(context)
        hello = await self._hello(context)
        tls = context.auth_context().get("ssl_tls_version", [b"unknown"])[0].decode()
        peer = Peer(
            name,
            self._roster[name],
            certificate,
            context.peer(),
            tls,
            hello.software[:100],
            max(1, min(hello.credit, MOST_CREDIT)),
            set(hello.have[:MOST_CREDIT]),
        )
        # The newest wins: an older one may be dead, and not know it.
        while (older := self._peers.get(name)) is not None:
            older.end(grpc.StatusCode.ABORTED, "another connection of this partner took over")
            await older.gone.wait()
        with self._requests.changed:
            self._peers[name] = peer
            self._requests.requeue(peer.node)
        self._log.log("connected", partner=name, address=peer.address, version=peer.version)
        tasks = [asyncio.create_task(work) for work in (self._write(peer, context), self._read(peer, context))]
        waited: list[asyncio.Future[Any]] = [*tasks, peer.ended]
        code, why = grpc.StatusCode.INTERNAL, "the coordinator failed"
        try:
            done, _ = await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if peer.ended in done:
                code, why = peer.ended.result()
            else:
                for task in done:
                    task.result()  # the first that failed says why
                code, why = grpc.StatusCode.OK, "closed by the node"
        except (DecodeError, MessageError) as err:
            code, why = grpc.StatusCode.INVALID_ARGUMENT, str(err) or "not a message of this link"
        except TimeoutError:
            code, why = grpc.StatusCode.DEADLINE_EXCEEDED, f"no progress within {STALL_S:g} s"
        except OSError as err:
            code, why = grpc.StatusCode.RESOURCE_EXHAUSTED, f"the coordinator's disk: {err.strerror}"
        except asyncio.CancelledError:
            why = "connection lost"
            raise
        except Exception as err:  # a mistake of ours that one peer met is not the others' end
            self._log.failed("failed", err, partner=name)
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

    def _gone(self, peer: Peer, why: str) -> None:
        if peer.upload is not None:
            peer.upload.drop()
            peer.upload = None
            self._slots += 1
        with self._requests.changed:
            if self._peers.get(peer.name) is peer:
                del self._peers[peer.name]
                self._requests.requeue(peer.node)
        peer.gone.set()
        self._log.log("disconnected", partner=peer.name, reason=why)
        self._grant()

    def queued(self, request: Request) -> None:
        """There is something to send."""
        for peer in self._peers.values():
            if peer.node == request.node:
                peer.wake.set()

    # -- towards a node ----------------------------------------------------------------------------------------------

    async def _write(self, peer: Peer, context: grpc.aio.ServicerContext) -> None:
        while True:
            peer.wake.clear()
            while peer.control:
                await context.write(peer.control.popleft())
            request = self._requests.next_for(peer.node, peer.credit)
            if request is not None:
                await self._send(peer, request, context)
            elif not peer.control:
                await peer.wake.wait()

    async def _send(self, peer: Peer, request: Request, context: grpc.aio.ServicerContext) -> None:
        self._requests.to(request, State.SENT)
        head = request.head()
        if request.id in peer.have:
            await context.write(pb.FromServer(want=pb.Want(id=request.id, remaining_s=head.remaining_s)))
            self._requests.to(request, State.ACKNOWLEDGED)
            return
        await context.write(pb.FromServer(request=head))
        for data in blocks(request.arrays):
            if not request.open:
                return  # expired meanwhile: `done` follows, and the node drops what it has of it
            await context.write(pb.FromServer(block=pb.Block(data=data)))

    # -- from a node -------------------------------------------------------------------------------------------------

    async def _read(self, peer: Peer, context: grpc.aio.ServicerContext) -> None:
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
                        self._requests.to(request, State.ACKNOWLEDGED)
                case "offer":
                    self._offered(peer, message.offer)
                case "block":
                    self._block(peer, message.block.data)
                case _:
                    raise MessageError("a message out of order")

    def _offered(self, peer: Peer, head: pb.Head) -> None:
        """A node has an answer. Its head is checked now, its bytes are asked for when there is a slot for them."""
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

    def _expected(self, peer: Peer, head: pb.Head) -> Expected | None:
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

    def _begin(self, peer: Peer, request: Request, head: pb.Head) -> None:
        size = sum(head.lengths)
        coming = sum(other.upload.missing for other in self._peers.values() if other.upload is not None)
        if size and shutil.disk_usage(self._requests.spool).free < coming + size + SPARE_BYTES:
            raise OSError(28, "not enough space for this answer")
        spool = Spool(self._requests.path(request), head, self._expected(peer, head))
        if not size:
            self._answered(peer, request, spooled=spool.finish())
            return
        self._slots -= 1
        peer.upload = spool
        peer.tell(grant=pb.Grant(id=head.id))

    def _block(self, peer: Peer, data: bytes) -> None:
        if peer.upload is None:
            raise MessageError("bytes that were not asked for")
        peer.upload.write(data)
        if peer.upload.missing:
            return
        spooled, peer.upload = peer.upload.finish(), None
        self._slots += 1
        request = self._requests.get(spooled.head.id)
        if request is not None and request.open:
            self._answered(peer, request, spooled=spooled)
        else:
            spooled.path.unlink(missing_ok=True)
            peer.tell(done=pb.Done(id=spooled.head.id))
        self._grant()

    def _answered(
        self, peer: Peer, request: Request, spooled: Spooled | None = None, error: Error | None = None
    ) -> None:
        self._requests.answered(request, spooled, error)
        peer.have.discard(request.id)
        peer.offers.pop(request.id, None)
        peer.tell(done=pb.Done(id=request.id))

    # -- what time brings --------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Expire requests, and throw out whom the CA revoked or whose certificate expired, for ever."""
        seen, checked = self._crl_stamp(), time.monotonic()
        while True:
            await asyncio.sleep(0.25)
            self.expired(self._requests.expire())
            if (stamp := self._crl_stamp()) != seen:
                seen, checked = stamp, -math.inf
                try:
                    self.read_revocations()
                except IdentityError as err:  # the last good one stays in force
                    self._log.log("revocation list not read", reason=err.message)
            if time.monotonic() < checked + RECHECK_S:
                continue
            checked = time.monotonic()
            for peer in list(self._peers.values()):
                try:
                    self._check(peer.certificate)
                except IdentityError as err:  # revoked, or expired, while it was connected
                    self._log.log("refused", partner=peer.name, reason=err.message)
                    peer.end(grpc.StatusCode.PERMISSION_DENIED, err.message)

    def expired(self, late: list[Request]) -> None:
        """Tell the nodes that these are not wanted any more."""
        for request in late:
            for peer in self._peers.values():
                if peer.node == request.node:
                    peer.have.discard(request.id)
                    peer.offers.pop(request.id, None)
                    peer.tell(done=pb.Done(id=request.id))
                    if peer.upload is not None and peer.upload.head.id == request.id:
                        # Its slot is for those whose answers still count; the node comes back at once.
                        peer.end(grpc.StatusCode.DEADLINE_EXCEEDED, "the answer was not here in time")

    def _crl_stamp(self) -> tuple[int, int] | None:
        if self._crl is None:
            return None
        try:
            found = self._crl.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size

    def read_revocations(self) -> None:
        """Take the list as it is now.

        Raises:
            IdentityError: it cannot be read, is not this CA's, or does not name who was revoked before; nobody comes back.
        """
        if self._crl is None:
            return
        found = RevocationList.load(self._crl, self._home.ca_certificate())
        if self._revoked is not None and not self._revoked.revoked <= found.revoked:
            raise IdentityError(
                "the list is gone, or older than the one in force: it does not name all that were revoked",
                "Put the CA's newest revoked.crl back.",
            )
        self._revoked = found
