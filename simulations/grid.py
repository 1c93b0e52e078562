"""A Flower Grid that calls the ClientApp in this process, one client after the other, as replies are pulled.

Nothing is queued but the requests: a client runs when its reply is asked for, so memory does not grow with the number of
clients. Requests of one round may share their records; `deliver` hands every client a message of its own over the same
immutable bytes.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..clients.app import without_words
from ..common.errors import LedgerError, OutputError
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
        else:  # deepcopy would take ten times as long, a thousand times a round
            values = {key: list(value) if isinstance(value, list) else value for key, value in record.items()}
            kind: Any = type(record)
            content[name] = kind(values)
    meta = message.metadata
    return addressed(content, meta.message_type, meta.dst_node_id, meta.group_id, meta.ttl, meta.message_id)
