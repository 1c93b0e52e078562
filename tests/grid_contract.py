"""What every Grid must do, as plain functions: they run in a test (in process, gRPC) and in a ServerApp (SuperLink).

Each takes a Grid and the ids of its nodes, which run `link_support.plain_app`-like apps: `train` adds one to every array,
`query` names the node, raises when the content has a record "fail", and takes as long as the record "slow" says.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import numpy as np

from hansa.common.flower import Array, ArrayRecord, ConfigRecord, Grid, Message, RecordDict, strategies

UNKNOWN_NODE = 987654321
PACE = float(os.environ.get("HANSA_TEST_PACE", "1"))
"""How slow the Grid is, about: a stock SuperLink takes 9 to 13 s for what ours does in milliseconds."""
Check = Callable[[Grid, list[int]], None]


def _model(value: float) -> RecordDict:
    return RecordDict({"arrays": ArrayRecord({"w": Array(np.full(3, value, np.float32))})})


def _arrays() -> ArrayRecord:
    return ArrayRecord({"w": Array(np.zeros(3, np.float32))})


def _train(grid: Grid, node: int, value: float, ttl: float = 60) -> Message:
    return grid.create_message(_model(value), "train", node, "1", ttl)


def _query(grid: Grid, node: int, ttl: float = 60, **records: float) -> Message:
    content = RecordDict({name: ConfigRecord({"value": value}) for name, value in records.items()})
    return grid.create_message(content, "query", node, "1", ttl)


def _pull(grid: Grid, wanted: list[str], timeout: float = 60) -> dict[str, Message]:
    """Pull until all are there; by the id of the request."""
    found: dict[str, Message] = {}
    end = time.monotonic() + timeout
    while len(found) < len(wanted) and time.monotonic() < end:
        for reply in grid.pull_messages([w for w in wanted if w not in found]):
            assert reply.metadata.reply_to_message_id not in found, "the same reply twice"
            found[reply.metadata.reply_to_message_id] = reply
        time.sleep(0.02)
    return found


def ordering(grid: Grid, nodes: list[int]) -> None:
    """Identifiers come in the order of the messages, and each reply names its request and its node."""
    asked = [(node, float(value)) for value in range(4) for node in nodes]
    ids = list(grid.push_messages([_train(grid, node, value) for node, value in asked]))
    assert len(set(ids)) == len(asked)
    replies = _pull(grid, ids)
    for name, (node, value) in zip(ids, asked, strict=True):
        assert replies[name].metadata.src_node_id == node
        assert replies[name].content["arrays"]["w"].numpy().tolist() == [value + 1] * 3


def duplicates(grid: Grid, nodes: list[int]) -> None:
    """A reply is given once."""
    ids = list(grid.push_messages([_train(grid, nodes[0], 1.0)]))
    assert set(_pull(grid, ids)) == set(ids)
    again = [m for m in grid.pull_messages(ids) if m.has_content()]
    assert again == []


def partial_pulls(grid: Grid, nodes: list[int]) -> None:
    """Pulling some leaves the others."""
    ids = list(grid.push_messages([_train(grid, node, 0.0) for node in nodes]))
    last, others = ids[-1:], ids[:-1]
    assert set(_pull(grid, last)) == set(last)
    assert list(grid.pull_messages([])) == []
    assert set(_pull(grid, others)) == set(others)


def iterator_inputs(grid: Grid, nodes: list[int]) -> None:
    """Generators will do, for messages and for identifiers."""

    def messages() -> Iterator[Message]:
        yield from (_train(grid, node, 5.0) for node in nodes)

    ids = list(grid.push_messages(messages()))
    assert len(ids) == len(nodes)
    found = list(grid.pull_messages(iter(ids)))
    rest = _pull(grid, [i for i in ids if i not in {m.metadata.reply_to_message_id for m in found}])
    assert len(found) + len(rest) == len(nodes)


def error_replies(grid: Grid, nodes: list[int]) -> None:
    """An app that raises is an error reply, which tells nothing of what it saw; other nodes' replies come."""
    replies = list(grid.send_and_receive([_query(grid, nodes[0], fail=1.0), _query(grid, nodes[1])], timeout=60))
    assert sorted(m.has_error() for m in replies) == [False, True]
    bad = next(m for m in replies if m.has_error())
    assert bad.metadata.src_node_id == nodes[0]
    assert "4711" not in str(bad.error.reason)


def timeouts(grid: Grid, nodes: list[int]) -> None:
    """`send_and_receive` returns what is there when its time is over."""
    began = time.monotonic()
    messages = [_query(grid, nodes[1]), _query(grid, nodes[0], slow=4.0 * PACE)]
    replies = list(grid.send_and_receive(messages, timeout=2.0 * PACE))
    assert time.monotonic() - began < 5.5 * PACE  # in process a client that has begun is waited for
    assert [m.metadata.src_node_id for m in replies if m.has_content()] == [nodes[1]]


def ttl(grid: Grid, nodes: list[int]) -> None:
    """What is answered after its time to live does not count."""
    ids = list(grid.push_messages([_query(grid, nodes[0], ttl=1.0 * PACE, slow=2.0 * PACE)]))
    time.sleep(3.0 * PACE)
    replies = _pull(grid, ids, timeout=2.0)
    assert not any(m.has_content() for m in replies.values())


def unknown_nodes(grid: Grid, nodes: list[int]) -> None:
    """A message to nobody gets no content, and keeps nobody else's from arriving."""
    ids = list(grid.push_messages([_train(grid, UNKNOWN_NODE, 0.0), _train(grid, nodes[0], 0.0)]))
    known = [i for i in ids if i]
    replies = _pull(grid, known, timeout=15)
    assert [m.metadata.src_node_id for m in replies.values() if m.has_content()] == [nodes[0]]


def fedavg(grid: Grid, nodes: list[int]) -> None:
    """Flower's own FedAvg, unmodified, on a ClientApp that is not ours."""
    made = strategies.FedAvg(min_available_nodes=len(nodes)).start(grid, _arrays(), num_rounds=3, timeout=120)
    assert made.arrays["w"].numpy().tolist() == [3.0, 3.0, 3.0]
    assert made.evaluate_metrics_clientapp[3]["accuracy"] == 0.75


def fedadam(grid: Grid, nodes: list[int]) -> None:
    """Flower's own FedAdam: each round moves by about its step, since every client agrees on the direction."""
    made = strategies.FedAdam(min_available_nodes=len(nodes), eta=0.1).start(grid, _arrays(), num_rounds=2, timeout=120)
    w = made.arrays["w"].numpy()
    assert ((w > 0.05) & (w < 0.5)).all(), w


CONTRACT: tuple[Check, ...] = (
    ordering,
    duplicates,
    partial_pulls,
    iterator_inputs,
    error_replies,
    unknown_nodes,
    fedavg,
    fedadam,
    ttl,
    timeouts,  # last: it leaves a node busy
)
