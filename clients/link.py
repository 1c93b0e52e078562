"""A node's side of the link: dial out, take requests, work on them one at a time, hand answers back.

A request is whole in the inbox before it is acknowledged, and stays there until the coordinator has the answer: that file is
the node's memory of it. The answer to a request that was committed before a crash comes from the app's own outbox. Nothing
is worked on that the coordinator did not ask for, or confirm, on a connection of this process. docs/link.md has the states.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import random
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from ..common import link_pb2 as pb
from ..common.errors import HansaError, LedgerError, MessageError, OutputError
from ..common.events import EventLog
from ..common.flower import CLIENT_APP_FAILED, ClientApp, Context, Message, RecordDict, addressed, grpc
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
    length_of,
    take_apart,
)
from ..common.home import Home
from ..common.identity import drop_unfinished
from ..common.plan import SOFTWARE
from .dial import CONNECT_S, proxy_for, server_certificate

CREDIT = 8
"""So many unanswered requests are taken at once."""
MOST_UNREAD = 256
"""Short messages that may wait for the coordinator to read them."""
LONGEST_PAUSE_S = 10.0
"""Between two attempts to connect, at most."""
RETRY_S = 2.0
"""After a full disk a request is tried again so much later."""


@dataclass(eq=False)
class _Job:
    """A request in the inbox."""

    request: Spooled
    deadline: float  # time.monotonic
    working: bool = False
    reply: Message | None = None
    failure: str | None = None

    @property
    def id(self) -> str:
        return str(self.request.head.id)

    @property
    def question(self) -> bool:
        """Whether it is about how things are, and not work whose answer stands."""
        return str(self.request.head.message_type).startswith("query")

    @property
    def done(self) -> bool:
        return self.reply is not None or self.failure is not None


@dataclass(eq=False)
class _Stream:
    """One connection, as long as it lasts."""

    call: Any
    out: asyncio.Queue[pb.FromNode | tuple[str, Message]] = field(default_factory=asyncio.Queue)
    incoming: Spool | None = None
    incoming_s: float = 0.0  # when it began, time.monotonic
    passing: int = 0  # bytes of a refused request that are still to come

    def tell(self, **body: Any) -> None:
        self.out.put_nowait(pb.FromNode(**body))


class NodeLink:
    """The link to one coordinator.

    Args:
        address: HOST:PORT of the coordinator's server.
        proxy: HTTP proxy to dial through (http://host:port); None: what the environment says.
        coordinator, coordinator_key: name and identity key (hex), as the charter has them.
        app: answers requests.
        inbox: folder for requests that are not answered yet.
        crl: revocation list of the CA, if this node keeps one.
        inspect: what a request's arrays must hash to, from its signed manifest, or MessageError; None takes any request.
    """

    def __init__(
        self,
        address: str,
        proxy: str | None,
        home: Home,
        passphrase: str | None,
        coordinator: str,
        coordinator_key: str,
        app: ClientApp,
        context: Callable[[], Context],
        inbox: Path,
        crl: Path | None,
        log: EventLog,
        inspect: Inspect | None = None,
    ) -> None:
        self.address = address
        self._proxy = proxy_for(address, proxy)
        self._home = home
        self._passphrase = passphrase
        self._coordinator = coordinator
        self._key = coordinator_key
        self._app = app
        self._context = context
        self._inbox = inbox
        self._crl = crl
        self._log = log
        self._inspect = inspect
        self._jobs: dict[str, _Job] = {}
        self._stream: _Stream | None = None
        self._work: Callable[[NodeLink, str], None] = lambda *_: None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self, work: Callable[[NodeLink, str], None], stop: asyncio.Event) -> None:
        """Stay connected until `stop`; `work` puts a request on the worker's list."""
        self._work, self._loop = work, asyncio.get_running_loop()
        self._recover()
        failures = 0
        while not stop.is_set():
            began = time.monotonic()
            session = asyncio.create_task(self._session())
            ending = asyncio.create_task(stop.wait())
            await asyncio.wait([session, ending], return_when=asyncio.FIRST_COMPLETED)
            ending.cancel()
            if stop.is_set():
                session.cancel()
            why = ""
            try:
                why = await session
            except asyncio.CancelledError:
                return
            except HansaError as err:
                why = err.message
            except Exception as err:  # whatever gRPC or the network raise: wait, and try again
                why = type(err).__name__
            failures = 0 if time.monotonic() - began > LONGEST_PAUSE_S else failures + 1
            pause = min(LONGEST_PAUSE_S, 0.25 * 2.0 ** min(failures, 8)) * random.uniform(0.5, 1.0)  # noqa: S311
            self._log.log("disconnected", coordinator=self._coordinator, address=self.address, reason=why)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), pause)

    # -- the stream --------------------------------------------------------------------------------------------------

    async def _session(self) -> str:
        """One connection from hello to its end; why it ended."""
        certificate = await asyncio.to_thread(
            server_certificate, self.address, self._proxy, self._home, self._coordinator, self._key, self._crl
        )
        files = self._tls_files()
        credentials = grpc.ssl_channel_credentials(certificate.pem, files[0], files[1])
        options: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", FRAME_BYTES),
            ("grpc.max_send_message_length", FRAME_BYTES),
            ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
            ("grpc.keepalive_timeout_ms", KEEPALIVE_S * 1000),
            ("grpc.http2.ping_timeout_ms", KEEPALIVE_S * 1000),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.ssl_target_name_override", self._coordinator),
            ("grpc.enable_http_proxy", int(self._proxy is not None)),
            *([("grpc.http_proxy", self._proxy)] if self._proxy is not None else []),
        ]
        async with grpc.aio.secure_channel(self.address, credentials, options=options) as channel:
            attach = channel.stream_stream(
                METHOD, request_serializer=pb.FromNode.SerializeToString, response_deserializer=None
            )
            call = attach()
            hello = pb.Hello(protocol=PROTOCOL, software=SOFTWARE, have=list(self._jobs), credit=CREDIT)
            stream = _Stream(call)
            try:
                await asyncio.wait_for(call.write(pb.FromNode(hello=hello)), CONNECT_S)
                first = await asyncio.wait_for(self._read(stream), CONNECT_S)
                if first is None or first.WhichOneof("body") != "welcome":
                    return await self._why(call)
                self._log.log("connected", coordinator=self._coordinator, version=first.welcome.software[:100])
                self._stream = stream
                tasks = [
                    asyncio.create_task(self._receive(stream)),
                    asyncio.create_task(self._send(stream)),
                    asyncio.create_task(self._renewed(files)),
                ]
                try:
                    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        task.result()
                    return "certificate renewed" if tasks[2] in done else await self._why(call)
                finally:
                    for task in tasks:
                        task.cancel()
            except grpc.aio.AioRpcError:
                return await self._why(call)
            except (DecodeError, MessageError) as err:
                return f"the coordinator's server sent what this link does not know: {err}"
            finally:
                self._stream = None
                if stream.incoming is not None:
                    stream.incoming.drop()
                call.cancel()

    async def _why(self, call: Any) -> str:
        code, details = await call.code(), await call.details()
        return f"{code.name}: {details}"[:300]

    async def _read(self, stream: _Stream) -> pb.FromServer | None:
        raw = await stream.call.read()
        return pb.FromServer.FromString(raw) if isinstance(raw, bytes) else None

    async def _renewed(self, files: tuple[bytes, bytes]) -> None:
        """Return when `hansa identity install` brought another certificate: the next connection shows that one."""
        while True:
            await asyncio.sleep(5)
            with contextlib.suppress(HansaError):  # half-way through the renewal
                if self._tls_files() != files:
                    return

    def _tls_files(self) -> tuple[bytes, bytes]:
        return self._home.tls_key_pem(self._passphrase), self._home.tls_certificate()

    async def _receive(self, stream: _Stream) -> None:
        while (message := await self._read(stream)) is not None:
            match message.WhichOneof("body"):
                case "request":
                    self._announced(stream, message.request)
                case "block":
                    self._block(stream, message.block.data)
                case "want":
                    self._wanted(stream, message.want)
                case "grant":
                    job = self._jobs.get(message.grant.id)
                    if job is not None and job.reply is not None:
                        stream.out.put_nowait((job.id, job.reply))
                case "done":
                    if stream.incoming is not None and stream.incoming.head.id == message.done.id:
                        stream.incoming.drop()
                        stream.incoming = None
                    self._forget(message.done.id)
                case _:
                    raise MessageError("a message out of order")

    def _announced(self, stream: _Stream, head: pb.Head) -> None:
        """A request begins. One that is not the coordinator's own is refused by its head; its bytes are let pass."""
        if len(self._jobs) >= 2 * CREDIT:
            self._make_room()
        if stream.incoming is not None or len(self._jobs) >= 2 * CREDIT:
            raise MessageError("a request out of order")
        if stream.out.qsize() >= MOST_UNREAD:
            raise MessageError("requests, but nobody who reads the answers")
        records = check_head(head)
        stream.passing = 0
        try:
            size, held = sum(head.lengths), sum(sum(job.request.head.lengths) for job in self._jobs.values())
            # Half of the room is the ledger's, whatever a coordinator sends. What does not fit all the same is tried again.
            if held + size > (held + shutil.disk_usage(self._inbox).free) / 2:
                self._log.log("disk full", coordinator=self._coordinator, request=head.id[:64], bytes=size)
                raise MessageError("this node's disk has no room for it")
            expected = self._inspect(records, self._coordinator) if self._inspect is not None else None
            stream.incoming = Spool(self._inbox / f"{_safe(head.id)}.request", head, expected)
        except MessageError as err:
            self._refuse(stream, head, err, sum(head.lengths))
            return
        stream.incoming_s = time.monotonic()
        if not stream.incoming.missing:
            self._whole(stream)

    def _block(self, stream: _Stream, data: bytes) -> None:
        if stream.incoming is None:
            stream.passing -= len(data)
            if stream.passing < 0:
                raise MessageError("a message out of order")
            return
        incoming = stream.incoming
        left = incoming.missing - len(data)
        try:
            incoming.write(data)
        except MessageError as err:
            stream.incoming = None
            incoming.drop()
            self._refuse(stream, incoming.head, err, left)
            return
        if not incoming.missing:
            self._whole(stream)

    def _refuse(self, stream: _Stream, head: pb.Head, err: MessageError, passing: int) -> None:
        self._log.log("refused", coordinator=self._coordinator, request=head.id[:64], reason=err.message)
        stream.passing = passing
        failure = pb.Failure(code=CLIENT_APP_FAILED, reason=_told(err))
        stream.tell(offer=pb.Head(id=head.id, failure=failure))

    async def _send(self, stream: _Stream) -> None:
        while True:
            item = await stream.out.get()
            if isinstance(item, pb.FromNode):
                await stream.call.write(item)
                continue
            name, reply = item
            for data in blocks(take_apart(reply.content)[1]):
                await stream.call.write(pb.FromNode(block=pb.Block(data=data)))
            self._log.log("sent", coordinator=self._coordinator, request=name)

    # -- requests ----------------------------------------------------------------------------------------------------

    def _recover(self) -> None:
        """What an earlier process of this node left in the inbox; worked on only when the coordinator still wants it."""
        self._inbox.mkdir(parents=True, exist_ok=True)
        drop_unfinished(self._inbox)
        for path in sorted(self._inbox.glob("*.request"), key=lambda p: p.stat().st_mtime, reverse=True):
            try:
                request = Spooled.load(path, self._expect if self._inspect is not None else None)
                if len(self._jobs) >= CREDIT or _safe(request.head.id) != path.stem:
                    raise MessageError("not wanted")
                self._jobs[request.head.id] = _Job(request, time.monotonic() + request.head.remaining_s)
            except MessageError:
                path.unlink(missing_ok=True)  # torn by a power cut: it will be sent again

    def _expect(self, records: RecordDict) -> Expected:
        assert self._inspect is not None
        return self._inspect(records, self._coordinator)

    def _whole(self, stream: _Stream) -> None:
        assert stream.incoming is not None
        request, stream.incoming = stream.incoming.finish(), None
        job = _Job(request, stream.incoming_s + request.head.remaining_s)
        self._jobs[job.id] = job
        stream.tell(have=pb.Have(id=job.id))
        self._log.log("request", coordinator=self._coordinator, request=job.id, kind=request.head.message_type)
        self._begin(job)

    def _wanted(self, stream: _Stream, want: pb.Want) -> None:
        job = self._jobs.get(want.id)
        if job is None:
            raise MessageError("a request that this node does not have")
        job.deadline = time.monotonic() + want.remaining_s
        if job.done and not job.question:
            self._offer(job)
            return
        if job.done:  # asked anew: what was true then need not be true now
            job.reply, job.failure, job.working = None, None, False
        self._begin(job)

    def _begin(self, job: _Job) -> None:
        if not job.working:
            job.working = True
            self._work(self, job.id)

    def answer(self, name: str) -> None:
        """Work on a request; called on the worker's thread.

        Raises:
            LedgerError: this node cannot record what it does; it must stop.
        """
        job = self._jobs.get(name)
        if job is None:
            return
        if time.monotonic() >= job.deadline:
            self._later(self._forget, name)  # too late to be of use: nothing is spent on it
            return
        head = job.request.head
        try:
            message = addressed(  # a type of message that Flower does not know is an error, too
                job.request.content(checked=self._inspect is not None),
                head.message_type,
                1,
                head.group_id,
                max(1.0, job.deadline - time.monotonic()),
                head.id,
                time.time(),
            )
            reply = self._app(message, self._context())
            if not reply.has_content():
                job.failure = "the node failed"
            else:
                job.reply = reply
        except OutputError:
            # A full disk: nothing was answered, and what was debited stays good for this request. Try again until it expires.
            self._log.log("disk full", request=name)
            job.working = False
            self._later(self._again, job)
            return
        except LedgerError:
            raise
        except MessageError as err:
            # About the request alone: what goes wrong in the work itself, the app answers.
            self._log.log("refused", coordinator=self._coordinator, request=name, reason=err.message)
            job.failure = _told(err)
        except Exception as err:
            # The words may hold record values; so only the kind of error, and nothing of it to the coordinator.
            self._log.failed("failed", err, request=name)
            job.failure = "the node failed"
        self._later(self._offer, job)

    def _later(self, call: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the link has ended; the inbox has the request
            self._loop.call_soon_threadsafe(call, *arguments)

    def _again(self, job: _Job) -> None:
        assert self._loop is not None
        self._loop.call_later(RETRY_S, lambda: self._begin(job) if job.id in self._jobs else None)

    def _offer(self, job: _Job) -> None:
        """Tell the coordinator that an answer is ready; without a connection it is told on the next one."""
        if self._stream is None or job.id not in self._jobs:
            return
        if job.reply is None:
            failure = pb.Failure(code=CLIENT_APP_FAILED, reason=job.failure or "the node failed")
            self._stream.tell(offer=pb.Head(id=job.id, failure=failure))
            return
        records, arrays = take_apart(job.reply.content)
        self._stream.tell(offer=pb.Head(id=job.id, records=records, lengths=[length_of(a) for a in arrays]))

    def _make_room(self) -> None:
        """Forget requests whose time is over, but not what is being worked on.

        The coordinator says `done` of what it gave up, but not to a node that was away then, nor of what it forgot when it
        was restarted: such requests would stay for ever.
        """
        now = time.monotonic()
        for job in list(self._jobs.values()):
            if now >= job.deadline and (job.done or not job.working):
                self._forget(job.id)

    def _forget(self, name: str) -> None:
        job = self._jobs.pop(name, None)
        if job is not None:
            job.request.path.unlink(missing_ok=True)


def run_links(links: list[NodeLink], stop: threading.Event) -> None:
    """Keep every link until `stop` is set. All requests of all links are worked on by this one thread, one at a time.

    Raises:
        LedgerError: this node can no longer record what it does.
    """
    jobs: queue.SimpleQueue[tuple[NodeLink, str]] = queue.SimpleQueue()
    loop_stop: list[Callable[[], object]] = []
    ready = threading.Event()

    async def live() -> None:
        ending = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop_stop.append(lambda: loop.call_soon_threadsafe(ending.set))
        ready.set()
        await asyncio.gather(*(link.run(lambda a, b: jobs.put((a, b)), ending) for link in links))

    thread = threading.Thread(target=lambda: asyncio.run(live()), name="hansa-link", daemon=True)
    thread.start()
    ready.wait()
    try:
        while not stop.is_set() and thread.is_alive():
            with contextlib.suppress(queue.Empty):
                link, name = jobs.get(timeout=0.2)
                link.answer(name)
    finally:
        with contextlib.suppress(RuntimeError):
            loop_stop[0]()
        thread.join(5)


def _told(err: MessageError) -> str:
    """What the coordinator hears of a request that is refused."""
    return f"request refused: {err.message}"[:200]


def _safe(name: str) -> str:
    """A request's name as a file name; ours are hex already."""
    if not name.isalnum() or not name.isascii() or len(name) > 64:
        raise MessageError("a request with an unusual name")
    return name
