"""What the coordinator asked of its nodes, and where each of these requests is: queued, sent, acknowledged, replied, folded or
expired (docs/link.md). One table under one lock; a reply stands in one file of the spool from `replied` until it was folded.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ..common import link_pb2 as pb
from ..common.errors import MessageError
from ..common.flower import MESSAGE_UNAVAILABLE, NODE_UNAVAILABLE, Array, Error, Message, RecordDict, addressed
from ..common.frames import Inspect, Spooled, length_of, take_apart
from ..common.identity import drop_unfinished


class State(StrEnum):
    """Where a request is; docs/link.md."""

    QUEUED = "queued"
    SENT = "sent"
    ACKNOWLEDGED = "acknowledged"
    REPLIED = "replied"
    FOLDED = "folded"
    EXPIRED = "expired"


@dataclass(eq=False)
class Request:
    """A message to one node, and its reply once that is there. Its state changes under the table's lock."""

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
        """The message's id: of a signed request the hash of its manifest."""
        return str(self.message.metadata.message_id)

    @property
    def open(self) -> bool:
        """Whether a reply still counts."""
        return self.state in (State.QUEUED, State.SENT, State.ACKNOWLEDGED)

    @property
    def repeatable(self) -> bool:
        """Whether an earlier reply to it is still the reply: a query is asked anew, work is answered once."""
        return not self.message.metadata.message_type.startswith("query")

    def head(self) -> pb.Head:
        """What announces it to its node."""
        meta = self.message.metadata
        return pb.Head(
            id=self.id,
            message_type=meta.message_type,
            group_id=meta.group_id,
            remaining_s=self.deadline - time.monotonic(),
            records=self.records,
            lengths=[length_of(a) for a in self.arrays],
        )


class Requests:
    """The table; any thread may use it.

    Args:
        spool: folder for replies that are on their way or not folded yet.
        roster: partner name -> the Grid's node id.
        inspect: what a reply's arrays must hash to, from its signed manifest, or MessageError; None takes any reply.
    """

    def __init__(self, spool: Path, roster: Mapping[str, int], inspect: Inspect | None) -> None:
        self.spool = spool
        self._names = {node: name for name, node in roster.items()}
        self._inspect = inspect
        self._table: dict[str, Request] = {}
        # Also told when a peer comes or goes: whoever waits for replies looks at both.
        self.changed = threading.Condition()

    def open_spool(self) -> None:
        """Make the folder, and drop what an earlier process had not received whole."""
        self.spool.mkdir(parents=True, exist_ok=True)
        drop_unfinished(self.spool)

    # -- whoever asks ------------------------------------------------------------------------------------------------

    def push(self, message: Message) -> Request | None:
        """Enter a message; the request if it must be sent, None where it is under way or its reply is there already."""
        meta = message.metadata
        records, arrays = take_apart(message.content)
        # Without its content: the arrays may be those of a whole model, which must not live longer than it is sent.
        bare = addressed(
            RecordDict(), meta.message_type, meta.dst_node_id, meta.group_id, meta.ttl, meta.message_id, time.time()
        )
        request = Request(bare, meta.dst_node_id, records, arrays, time.monotonic() + meta.ttl)
        with self.changed:
            before = self._table.get(request.id)
            if before is not None and before.open:
                before.deadline = request.deadline
                return None
            if request.node not in self._names:
                request.error = Error(NODE_UNAVAILABLE, f"no node {request.node}")
                request.state = State.REPLIED
            elif request.repeatable and (found := self._spooled(request)) is not None:
                request.spooled, request.state = found, State.REPLIED
            self._table[request.id] = request
            if request.state is State.REPLIED:
                self.changed.notify_all()
                return None
        return request

    def _spooled(self, request: Request) -> Spooled | None:
        """An answer that arrived before a crash, or before this request was pushed again."""
        path = self.path(request)
        if not path.exists():
            return None
        name, inspect = self._names[request.node], self._inspect
        try:
            return Spooled.load(path, None if inspect is None else lambda records: inspect(records, name))
        except MessageError:
            path.unlink(missing_ok=True)  # torn by a power cut: the node still has it
            return None

    def pull(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """The replies that are there, one at a time: each is folded before the next is looked at."""
        for name in list(message_ids):
            with self.changed:
                request = self._table.get(name)
                if request is None or request.state not in (State.REPLIED, State.EXPIRED):
                    continue
                if request.state is State.EXPIRED:
                    del self._table[name]
                request.state = State.FOLDED
            if request.error is not None:
                yield Message(request.error, reply_to=request.message)
            else:
                assert request.spooled is not None
                content = request.spooled.content(checked=self._inspect is not None)
                yield Message(content, reply_to=request.message)

    def forget_folded(self) -> None:
        """Drop what was folded before: a coordinator pushes again only once it has written down what it folded.

        And what came, or expired, and nobody pulled before its time was over.
        """
        now = time.monotonic()
        with self.changed:
            over = [r for r in self._table.values() if r.state is State.FOLDED or (not r.open and now >= r.deadline)]
            for request in over:
                del self._table[request.id]
                if request.spooled is not None:
                    request.spooled.path.unlink(missing_ok=True)

    def withdraw(self, message_ids: Iterable[str]) -> list[Request]:
        """Take out what nobody waits for any more; arrays and spooled replies are let go of before this returns."""
        with self.changed:
            found = [self._table.pop(name) for name in message_ids if name in self._table]
            for request in found:
                request.state, request.arrays = State.EXPIRED, []
                if request.spooled is not None:
                    request.spooled.path.unlink(missing_ok=True)
        return found

    def wait(self, timeout_s: float) -> None:
        """Return when a reply may be there, a peer came or went, or the time is over."""
        with self.changed:
            if not any(r.state in (State.REPLIED, State.EXPIRED) for r in self._table.values()):
                self.changed.wait(timeout_s)

    # -- the streams -------------------------------------------------------------------------------------------------

    def get(self, message_id: str) -> Request | None:
        """A request by its name; None when it was never pushed or is long forgotten."""
        with self.changed:
            return self._table.get(message_id)

    def path(self, request: Request) -> Path:
        """Where its reply is spooled."""
        return self.spool / f"{request.id}.reply"

    def next_for(self, node: int, credit: int) -> Request | None:
        """What is to be sent to a node now, if it has credit left."""
        with self.changed:
            mine = self._of(node)
            under_way = sum(r.state is not State.QUEUED for r in mine)
            return next((r for r in mine if r.state is State.QUEUED), None) if under_way < credit else None

    def requeue(self, node: int) -> None:
        """A node's stream began or ended: what was on its way is lost; what the node has on disk is not."""
        with self.changed:
            for request in self._of(node):
                request.state = State.QUEUED
            self.changed.notify_all()

    def _of(self, node: int) -> list[Request]:
        return [r for r in self._table.values() if r.node == node and r.open]

    def to(self, request: Request, state: State) -> None:
        """Move on a request that is still open."""
        with self.changed:
            if request.open:
                request.state = state

    def answered(self, request: Request, spooled: Spooled | None = None, error: Error | None = None) -> None:
        """Its reply, or why there is none; what comes after another reply, or too late, does not count."""
        with self.changed:
            if request.open:
                request.spooled, request.error, request.state = spooled, error, State.REPLIED
                request.arrays = []
                self.changed.notify_all()

    def expire(self) -> list[Request]:
        """Those whose time is over by now."""
        now = time.monotonic()
        with self.changed:
            late = [r for r in self._table.values() if r.open and now >= r.deadline]
            for request in late:
                request.state, request.arrays = State.EXPIRED, []
                request.error = Error(MESSAGE_UNAVAILABLE, "no answer in time")
            if late:
                self.changed.notify_all()
        return late
