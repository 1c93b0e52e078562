"""The in-process Grid keeps the contract of Flower's Grid: what Flower wrote runs over it unmodified."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.clientapp.mod import arrays_size_mod

from hansa.common.errors import LedgerError, MessageError, OutputError
from hansa.common.flower import (
    Array,
    ArrayRecord,
    ClientApp,
    ConfigRecord,
    Context,
    Grid,
    Message,
    MetricRecord,
    RecordDict,
    empty_run,
    strategies,
)
from hansa.simulations.grid import InProcessGrid


def context(node: int) -> Context:
    return Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})


def grid_of(handler: Callable[[Message, Context], Message], nodes: int = 3) -> InProcessGrid:
    app = ClientApp()
    app.train()(handler)
    app.evaluate()(handler)
    return InProcessGrid(app, nodes, context)


def content(value: float = 0.0) -> RecordDict:
    return RecordDict(
        {"arrays": ArrayRecord({"w": Array(np.full(2, value, np.float32))}), "config": ConfigRecord({"a": [1]})}
    )


def echo(message: Message, c: Context) -> Message:
    return Message(RecordDict({"who": ConfigRecord({"node": c.node_id})}), reply_to=message)


def ask(grid: Grid, node: int, value: float = 0.0) -> Message:
    return grid.create_message(content(value), "train", node, "1")


def test_it_is_a_grid_with_all_nodes() -> None:
    grid = grid_of(echo)
    assert isinstance(grid, Grid)
    assert list(grid.get_node_ids()) == [1, 2, 3]
    assert [n.node_id for n in grid.get_nodes()] == [1, 2, 3]
    run = empty_run()
    grid.set_run(run)
    assert grid.run is run


def test_replies_name_their_node_and_their_question() -> None:
    grid = grid_of(echo)
    ids = list(grid.push_messages(ask(grid, node) for node in (3, 1, 2)))  # an iterator
    assert len(set(ids)) == 3
    replies = list(grid.pull_messages(iter(ids)))
    assert [r.metadata.reply_to_message_id for r in replies] == ids
    assert [r.metadata.src_node_id for r in replies] == [3, 1, 2]
    assert [r.content["who"]["node"] for r in replies] == [3, 1, 2]


def test_each_reply_comes_once() -> None:
    ran: list[int] = []

    def count(message: Message, c: Context) -> Message:
        ran.append(c.node_id)
        return echo(message, c)

    grid = grid_of(count)
    ids = list(grid.push_messages([ask(grid, 1), ask(grid, 2)]))
    assert len(list(grid.pull_messages([ids[0], ids[0]]))) == 1
    assert list(grid.pull_messages([ids[0]])) == []
    assert list(grid.pull_messages(["unknown"])) == []
    assert list(grid.pull_messages([])) == []
    assert ran == [1]
    assert len(list(grid.pull_messages(ids))) == 1
    assert ran == [1, 2]


def test_a_client_runs_when_its_reply_is_taken() -> None:
    """So memory does not grow with the number of clients."""
    ran: list[int] = []

    def count(message: Message, c: Context) -> Message:
        ran.append(c.node_id)
        return echo(message, c)

    grid = grid_of(count)
    ids = grid.push_messages(ask(grid, node) for node in (1, 2, 3))
    assert ran == []
    replies = grid.pull_messages(ids)
    next(iter(replies))
    assert ran == [1]
    next(iter(replies))
    replies.close()  # a deadline: who was not asked for can be asked for later
    assert ran == [1, 2]
    assert [r.metadata.src_node_id for r in grid.pull_messages(ids)] == [3]


def test_unknown_nodes_get_an_error_reply() -> None:
    grid = grid_of(echo)
    replies = list(grid.send_and_receive([ask(grid, node) for node in (0, 1, 4, -1)]))
    assert [r.has_error() for r in replies] == [True, False, True, True]
    assert replies[2].error.reason == "no node 4"
    assert replies[2].metadata.src_node_id == 4


def test_a_failing_client_is_an_error_reply_without_its_words(caplog: pytest.LogCaptureFixture) -> None:
    def fail(message: Message, c: Context) -> Message:
        if c.node_id == 2:
            raise ValueError("record 4711")
        if c.node_id == 3:
            raise MessageError("forged 4711")
        return echo(message, c)

    grid = grid_of(fail)
    with caplog.at_level(logging.ERROR, "hansa.node"):
        replies = list(grid.send_and_receive([ask(grid, node) for node in (1, 2, 3)]))
    assert [r.has_error() for r in replies] == [False, True, True]
    assert "4711" not in str(replies[1].error) + str(replies[2].error)
    assert replies[1].error.reason == "the node failed", "not even its kind: it may depend on records"
    assert "4711" not in caplog.text, "logs are shipped and kept: no record value in them either"
    assert "node 2 failed: ValueError at simulations/test_grid.py:" in caplog.text


@pytest.mark.parametrize("error", [OutputError("full"), LedgerError("torn")])
def test_a_client_that_cannot_record_stops_everything(error: Exception) -> None:
    def fail(message: Message, c: Context) -> Message:
        raise error

    grid = grid_of(fail)
    with pytest.raises(type(error)):
        list(grid.send_and_receive([ask(grid, 1)]))


def _assign(message: Message) -> None:
    message.content["arrays"]["w"] = Array(np.full(2, 9, np.float32))


def _attribute(message: Message) -> None:
    message.content["arrays"]["w"].data = Array(np.full(2, 9, np.float32)).data


def _delete(message: Message) -> None:
    del message.content["arrays"]["w"]


def _replace(message: Message) -> None:
    message.content["arrays"] = ArrayRecord({"w": Array(np.full(2, 9, np.float32))})


def _in_place(message: Message) -> None:
    message.content["arrays"]["w"].numpy()[...] = 9


def _config(message: Message) -> None:
    message.content["config"]["a"].append(2)


def _config_key(message: Message) -> None:
    message.content["config"]["b"] = 2


@pytest.mark.parametrize("spoil", [_assign, _attribute, _delete, _replace, _in_place, _config, _config_key])
def test_clients_cannot_change_each_others_messages(spoil: Callable[[Message], None]) -> None:
    """Flower's strategies put one record into every message of a round."""
    seen: list[tuple[Any, Any]] = []

    def handler(message: Message, c: Context) -> Message:
        config = {key: list(value) for key, value in message.content["config"].items()}
        seen.append((message.content["arrays"]["w"].numpy().tolist(), config))
        assert message.content["config"]["a"] == [1]
        spoil(message)
        return echo(message, c)

    grid, shared = grid_of(handler), content(1.0)
    messages = [grid.create_message(shared, "train", node, "1") for node in (1, 2, 3)]
    assert not any(r.has_error() for r in grid.send_and_receive(messages))
    assert seen == [([1.0, 1.0], {"a": [1]})] * 3
    assert shared["arrays"]["w"].numpy().tolist() == [1.0, 1.0]


def _plain_flower_app() -> ClientApp:
    """As a Flower user writes it."""
    app = ClientApp()

    @app.train()
    def train(message: Message, c: Context) -> Message:
        arrays = message.content["arrays"]
        assert message.content["config"]["server-round"] >= 1
        moved = {n: Array(a.numpy() + np.float32(c.node_id)) for n, a in arrays.items()}
        metrics = MetricRecord({"num-examples": c.node_id, "loss": 1.0 / c.node_id})
        return Message(RecordDict({"arrays": ArrayRecord(moved), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, c: Context) -> Message:
        value = float(message.content["arrays"]["w"].numpy()[0])
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1, "w": value})}), reply_to=message)

    return app


def test_flowers_own_fedavg_runs_unmodified() -> None:
    """By hand: nodes 1, 2, 3 add 1, 2, 3, weighted 1, 2, 3: (1 + 4 + 9) / 6 a round."""
    grid = InProcessGrid(_plain_flower_app(), 3, context)
    result = strategies.FedAvg().start(
        grid=grid, initial_arrays=ArrayRecord({"w": Array(np.zeros(2, np.float32))}), num_rounds=3
    )
    np.testing.assert_allclose(result.arrays["w"].numpy(), np.full(2, 3 * 14 / 6), rtol=1e-6)
    assert [round(m["w"], 4) for m in result.evaluate_metrics_clientapp.values()] == [2.3333, 4.6667, 7.0]


def test_flowers_own_fedadam_goes_on_when_one_client_fails() -> None:
    app = _plain_flower_app()

    class Sick(InProcessGrid):
        def _deliver(self, message: Message) -> Message:
            if message.metadata.dst_node_id == 3:
                message.metadata.dst_node_id = 99
            return super()._deliver(message)

    grid = Sick(app, 3, context)
    result = strategies.FedAdam().start(
        grid=grid, initial_arrays=ArrayRecord({"w": Array(np.zeros(2, np.float32))}), num_rounds=2
    )
    assert np.isfinite(result.arrays["w"].numpy()).all()
    assert (result.arrays["w"].numpy() > 0).all()


def test_a_flower_mod_runs() -> None:
    app = ClientApp(mods=[arrays_size_mod])
    app.train()(echo)
    (reply,) = InProcessGrid(app, 1, context).send_and_receive([ask(InProcessGrid(app, 1, context), 1)])
    assert not reply.has_error()


def test_an_unknown_type_is_an_error_reply() -> None:
    grid = grid_of(echo)
    (reply,) = grid.send_and_receive([grid.create_message(content(), "query.surprise", 1, "1")])
    assert reply.has_error()
