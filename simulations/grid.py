"""Flower Grids within one machine.

`InProcessGrid` calls the ClientApp in this process, one client after the other, as replies are pulled. Nothing is queued but the
requests: a client runs when its reply is asked for, so memory does not grow with the number of clients. Requests of one round may
share their records; `deliver` hands every client a message of its own over the same immutable bytes.

`CohortGrid` is the same, but has requests to train answered by whoever trains many clients at once.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..clients.app import Doorkeeper, without_words
from ..common.errors import LedgerError, OutputError, Refusal, Refused
from ..common.flower import (
    CLIENT_APP_FAILED,
    MESSAGE_UNAVAILABLE,
    NODE_UNAVAILABLE,
    Array,
    ArrayRecord,
    ClientApp,
    Context,
    Error,
    Grid,
    Message,
    RecordDict,
    Run,
    addressed,
    empty_run,
)
from ..common.messages import Handed, Tensors, Wire
from .trainer import Outcome

_log = logging.getLogger("hansa.node")


class InProcessGrid(Grid):
    """Calls `app(message, context)` for node ids 1..nodes.

    Args:
        context: a node's Context, which the Grid keeps no copy of.
    """

    def __init__(self, app: ClientApp, nodes: int, context: Callable[[int], Context]) -> None:
        self._app = app
        self._nodes = nodes
        self._context = context
        self._run = empty_run()
        self._queue: dict[str, Message] = {}
        self._count = 0

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
        self._count += 1
        return addressed(content, message_type, dst_node_id, group_id, ttl or 3600.0, f"m{self._count}")

    def get_node_ids(self) -> Iterable[int]:
        """All nodes are always there."""
        return range(1, self._nodes + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; their clients run when the replies are pulled."""
        pushed = []
        for message in messages:
            identifier = message.metadata.message_id
            if not identifier:  # made by a strategy, not by create_message
                self._count += 1
                identifier = f"m{self._count}"
                meta = message.metadata
                message = addressed(
                    message.content, meta.message_type, meta.dst_node_id, meta.group_id, meta.ttl, identifier
                )
            self._queue[identifier] = message
            pushed.append(identifier)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Run the clients of these messages, in the order of `message_ids` pushed, each when its reply is taken."""
        wanted = set(message_ids)
        for identifier in [i for i in self._queue if i in wanted]:
            yield self._deliver(self._queue.pop(identifier))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push, then pull until all is there or the time is over; a client that has begun is waited for."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        for reply in self.pull_messages(self.push_messages(messages)):
            if time.monotonic() < end:
                replies.append(reply)
            else:
                break
        return replies

    def _deliver(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        if not 1 <= node <= self._nodes:
            return Message(Error(NODE_UNAVAILABLE, f"no node {node}"), reply_to=message)
        began = time.monotonic()
        try:
            reply = self._app(_own(message), self._context(node))
            if time.monotonic() - began >= message.metadata.ttl:
                return Message(Error(MESSAGE_UNAVAILABLE, "no answer in time"), reply_to=message)
            return reply
        except (OutputError, LedgerError):
            raise  # this process cannot record what it does: stop everything
        except Exception as err:
            _log.error("node %s failed: %s", node, without_words(err))
            return Message(Error(CLIENT_APP_FAILED, "the node failed"), reply_to=message)


def _own(message: Message) -> Message:
    """The same message in records of its own: clients may write into theirs. The bytes are immutable and shared."""
    content = RecordDict()
    for name, record in message.content.items():
        if isinstance(record, ArrayRecord):
            arrays = {key: Array(a.dtype, a.shape, a.stype, a.data) for key, a in record.items()}
            content[name] = ArrayRecord(arrays)
        elif isinstance(record, Handed):  # nobody can write into it
            content[name] = record
        else:  # deepcopy would take ten times as long, a thousand times a round
            values = {key: list(value) if isinstance(value, list) else value for key, value in record.items()}
            kind: Any = type(record)
            content[name] = kind(values)
    meta = message.metadata
    return addressed(content, meta.message_type, meta.dst_node_id, meta.group_id, meta.ttl, meta.message_id)


class Executor(Protocol):
    """Who trains the clients of a round; see `workers.py`."""

    def train(
        self, number: int, weights: npt.NDArray[np.float32], chunks: Sequence[Sequence[int]]
    ) -> Iterator[tuple[Sequence[int], npt.NDArray[np.float32], list[Outcome]]]:
        """Clients, updates [clients, parameters] and outcomes, chunk by chunk in order."""

    def phases(self) -> dict[str, float]:
        """Seconds by phase since the last call."""


class CohortGrid(InProcessGrid):
    """Requests to train are answered chunk by chunk, in the order in which they were sent; all others by the ClientApp.

    The requests of a round have the same model, so it is read from the first. Node ids are the clients' numbers plus one.

    Args:
        shapes: names and shapes of the tensors of a model, in order.
        wire: how messages are read and written; both ends are here.
        gate: of a client; asked before any of its rows are read.
        coordinator: who may ask.
    """

    def __init__(
        self,
        app: ClientApp,
        nodes: int,
        context: Callable[[int], Context],
        executor: Executor,
        chunk: int,
        shapes: Sequence[tuple[str, tuple[int, ...]]],
        wire: Wire,
        gate: Callable[[int], Doorkeeper],
        coordinator: str,
    ) -> None:
        super().__init__(app, nodes, context)
        self._executor, self._chunk, self._shapes = executor, chunk, list(shapes)
        self._wire, self._gate, self._coordinator = wire, gate, coordinator

    def profile(self) -> dict[str, float]:
        """Seconds that training took since the last call, by phase, added up over processes."""
        return self._executor.phases()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Replies in the order in which the requests were pushed. Training begins when the first of them is taken."""
        wanted = set(message_ids)
        here = [i for i in self._queue if i in wanted]
        training = [i for i in here if self._is_training(self._queue[i])]
        yield from super().pull_messages(wanted.difference(training))
        if training:
            yield from self._train([self._queue.pop(i) for i in training])

    def _is_training(self, message: Message) -> bool:
        meta = message.metadata
        return meta.message_type == "train" and 1 <= meta.dst_node_id <= self._nodes and "plain" in message.content

    def _train(self, messages: list[Message]) -> Iterator[Message]:
        first, tensors, _ = self._wire.decode(messages[0].content, self._coordinator)
        if [(name, t.shape) for name, t in tensors.items()] != self._shapes:
            refused = Refused(Refusal.NUMERIC, "the model's tensors are not those of the task")
            yield from (self._reply(m, "refused", reason=refused.reason.value, detail=refused.detail) for m in messages)
            return
        weights = np.concatenate([np.asarray(t, np.float32).reshape(-1) for t in tensors.values()])
        admitted = []
        for message in messages:
            client = message.metadata.dst_node_id - 1
            request, _, digest = self._wire.decode(message.content, self._coordinator)
            try:
                self._gate(client).debit(request, digest, "train")
            except Refused as refused:
                yield self._reply(message, "refused", reason=refused.reason.value, detail=refused.detail)
                continue
            admitted.append(message)
        clients = [message.metadata.dst_node_id - 1 for message in admitted]
        chunks = [clients[at : at + self._chunk] for at in range(0, len(clients), self._chunk)]
        waiting = iter(admitted)
        for _, updates, outcomes in self._executor.train(first.round, weights, chunks):
            for update, outcome in zip(updates, outcomes, strict=True):
                message = next(waiting)
                if outcome.refused is not None:
                    reason, detail = outcome.refused
                    yield self._reply(message, "refused", reason=reason, detail=detail)
                elif outcome.failed:
                    yield self._reply(message, "failed")
                else:
                    yield self._reply(message, "update", self._by_name(update))
            del updates  # a worker writes the next ones there

    def _by_name(self, update: npt.NDArray[np.float32]) -> Tensors:
        made, at = {}, 0
        for name, shape in self._shapes:
            end = at + math.prod(shape)
            made[name] = update[at:end].reshape(shape)
            at = end
        return made

    def _reply(self, message: Message, kind: str, tensors: Tensors | None = None, **fields: Any) -> Message:
        request, _, digest = self._wire.decode(message.content, self._coordinator)
        records, _ = self._wire.encode(request.reply(kind, digest, **fields), self._wire.pack(tensors or {}))
        return Message(records, reply_to=message)
