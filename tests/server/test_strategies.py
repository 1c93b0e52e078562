"""Flower's strategies, fed the mean as one virtual reply, do what they do when fed every reply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hansa.common.config import Strategy
from hansa.common.errors import RunFailed
from hansa.common.flower import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MetricRecord,
    RecordDict,
    strategies,
)
from hansa.server.checkpoint import Checkpoint
from hansa.server.strategies import ServerOptimizer, _OneNode
from support import same_arrays

CHOSEN = {
    "fedavg": Strategy(name="fedavg"),
    "fedprox": Strategy(name="fedprox", proximal_mu=0.1),
    "fedavgm": Strategy(name="fedavgm", server_momentum=0.9, server_learning_rate=0.7),
    "fedavgm without momentum": Strategy(name="fedavgm", server_learning_rate=0.5),
    "fedavgm plain": Strategy(name="fedavgm"),
    "fedadam": Strategy(name="fedadam", eta=0.05, beta_1=0.8, beta_2=0.95, tau=0.01),
    "fedyogi": Strategy(name="fedyogi", eta=0.05),
    "fedadagrad": Strategy(name="fedadagrad", eta=0.05),
}
FLOWER = {
    "fedavg": strategies.FedAvg,
    "fedprox": strategies.FedProx,
    "fedavgm": strategies.FedAvgM,
    "fedadam": strategies.FedAdam,
    "fedyogi": strategies.FedYogi,
    "fedadagrad": strategies.FedAdagrad,
}
Arrays = dict[str, Any]


class _Nodes(_OneNode):
    def __init__(self, count: int) -> None:
        self.count = count

    def get_node_ids(self) -> Any:
        return range(1, self.count + 1)


def start() -> Arrays:
    # Not in the order of the alphabet, of several shapes, one that broadcasts against another.
    return {
        "weight": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
        "bias": np.zeros(4, np.float32),
        "scale": np.array(1.0, np.float32),
    }


def updates(number: int, clients: int) -> list[Arrays]:
    """Updates whose values and sums are exact in float32 (small multiples of 1/64), so that order does not matter."""
    rng = np.random.default_rng(number)
    return [
        {n: np.asarray(rng.integers(-64, 64, v.shape) / 64, dtype=np.float32) for n, v in start().items()}
        for _ in range(clients)
    ]


def mean(many: list[Arrays]) -> Arrays:
    return {n: np.asarray(np.mean([u[n].astype(np.float64) for u in many], axis=0)) for n in start()}


class Flowers:
    """The strategy itself, with one reply a client."""

    def __init__(self, chosen: Strategy, clients: int) -> None:
        self.made: Any = FLOWER[chosen.name](**chosen.parameters())
        self.clients = clients

    def step(self, number: int, arrays: Arrays, many: list[Arrays]) -> Arrays:
        record = ArrayRecord({n: Array(np.asarray(arrays[n])) for n in sorted(arrays)})
        asked = self.made.configure_train(number, record, ConfigRecord(), _Nodes(self.clients))
        replies = []
        for message, update in zip(asked, many, strict=True):
            trained = ArrayRecord({n: Array(np.asarray(arrays[n] + update[n])) for n in sorted(arrays)})
            content = RecordDict({"arrays": trained, "metrics": MetricRecord({"num-examples": 10})})
            replies.append(Message(content, reply_to=message))
        made, _ = self.made.aggregate_train(number, replies)
        return {n: np.asarray(made[n].numpy(), dtype=np.float32) for n in arrays}


@pytest.mark.parametrize("name", list(CHOSEN))
@pytest.mark.parametrize("clients", [2, 4])
def test_the_mean_as_one_reply_is_every_reply(name: str, clients: int) -> None:
    """Equal weights, and counts that are powers of two: Flower's own float32 mean is exact as well."""
    ours, flowers = ServerOptimizer(CHOSEN[name]), Flowers(CHOSEN[name], clients)
    a, b = _grid(start()), _grid(start())
    for number in range(1, 5):
        many = updates(number, clients)
        a, b = ours.step(number, a, mean(many)), flowers.step(number, b, many)
        same_arrays(a, b)
        # Back on the grid on which sums are exact; the moments go on as they are.
        a, b = _grid(a), _grid(b)
    assert any(np.any(a[n] != start()[n]) for n in a)


def _grid(arrays: Arrays) -> Arrays:
    return {n: np.asarray(np.round(v * 64) / 64, dtype=np.float32) for n, v in arrays.items()}


def _through_a_file(folder: Path, model: Arrays, optimizer: ServerOptimizer) -> tuple[Arrays, Arrays]:
    path = folder / "c.checkpoint"
    Checkpoint("r", 1, model, optimizer.state()).save(path)
    saved = Checkpoint.load(path)
    assert saved is not None
    return saved.model, saved.strategy


@pytest.mark.parametrize("name", list(CHOSEN))
@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_run_that_stopped_goes_on_bit_by_bit(tmp_path: Path, name: str, stop: int) -> None:
    whole, parted = ServerOptimizer(CHOSEN[name]), ServerOptimizer(CHOSEN[name])
    a, b = start(), start()
    for number in range(1, 7):
        many = mean([{n: u * np.float32(0.37) for n, u in one.items()} for one in updates(number, 3)])
        a, b = whole.step(number, a, dict(many)), parted.step(number, b, many)
        if number == stop:
            b, state = _through_a_file(tmp_path, b, parted)
            parted = ServerOptimizer(CHOSEN[name])
            parted.restore(state)
    same_arrays(a, b)
    same_arrays(whole.state(), parted.state())


def test_the_state_matters() -> None:
    """Forgetting it would show: the test above can fail."""
    for name in ("fedavgm", "fedadam", "fedyogi", "fedadagrad"):
        whole, parted = ServerOptimizer(CHOSEN[name]), ServerOptimizer(CHOSEN[name])
        a = b = start()
        for number in range(1, 4):
            a, b = whole.step(number, a, mean(updates(number, 2))), parted.step(number, b, mean(updates(number, 2)))
            parted = ServerOptimizer(CHOSEN[name])
        assert a["weight"].tobytes() != b["weight"].tobytes(), name


def test_every_attribute_that_changes_is_in_the_state() -> None:
    """A new version of Flower may keep more from round to round; then `state` must learn of it."""
    kept = {"m_t", "v_t", "momentum_vector", "current_arrays"}
    for name, chosen in CHOSEN.items():
        optimizer = ServerOptimizer(chosen)
        if optimizer._strategy is None:
            continue  # FedAvg and FedProx keep nothing
        before = {k: repr(v) for k, v in vars(optimizer._strategy).items()}
        optimizer.step(1, start(), mean(updates(1, 2)))
        changed = {k for k, v in vars(optimizer._strategy).items() if repr(v) != before.get(k)}
        assert changed <= kept, name


@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_what_is_made_without_flower_is_what_flower_makes(name: str) -> None:
    """Bit by bit, for values of every size: Flower's class, given the one virtual reply as the other strategies are."""
    rng = np.random.default_rng(4)
    shapes = {"weight": (300, 40), "bias": (7,), "scale": (), "none": (0, 4)}

    def values(shape: tuple[int, ...], low: float, high: float) -> Any:
        made = rng.choice([-1.0, 1.0], shape) * 2.0 ** rng.uniform(low, high, shape)
        return np.where(rng.random(shape) < 0.05, rng.choice([0.0, -0.0], shape), made)

    for number in range(1, 4):
        arrays = {n: np.asarray(values(s, -140, 100), np.float32) for n, s in shapes.items()}
        update = {n: np.asarray(values(s, -160, 100)) for n, s in shapes.items()}
        strategy = FLOWER[name](
            min_train_nodes=1, min_available_nodes=1, min_evaluate_nodes=1, **CHOSEN[name].parameters()
        )
        record = ArrayRecord({n: Array(arrays[n]) for n in sorted(arrays)})
        (request,) = strategy.configure_train(number, record, ConfigRecord(), _OneNode())
        trained = {n: np.asarray(arrays[n] + update[n], dtype=np.float32) for n in sorted(arrays)}
        content = RecordDict(
            {
                "arrays": ArrayRecord({n: Array(v) for n, v in trained.items()}),
                "metrics": MetricRecord({"num-examples": 1}),
            }
        )
        made, _ = strategy.aggregate_train(number, [Message(content, reply_to=request)])
        assert made is not None
        flowers = {n: np.asarray(made[n].numpy(), dtype=np.float32) for n in arrays}
        same_arrays(ServerOptimizer(CHOSEN[name]).step(number, arrays, update), flowers)


@pytest.mark.parametrize("name", list(CHOSEN))
def test_a_step_lets_go_of_the_mean(name: str) -> None:
    """The mean is twice the model; with a strategy that is no more than it, the new model is where the old one was."""
    arrays, update = start(), mean(updates(1, 2))
    new = ServerOptimizer(CHOSEN[name]).step(1, arrays, update)
    assert update == {}
    if name in ("fedavg", "fedprox"):
        assert all(np.shares_memory(new[n], arrays[n]) for n in arrays)


def test_fedavg_adds_the_mean() -> None:
    many = updates(1, 2)
    made = ServerOptimizer(CHOSEN["fedavg"]).step(1, start(), mean(many))
    for n, value in start().items():
        np.testing.assert_array_equal(made[n], np.float32(value + (many[0][n] + many[1][n]) / 2))
    assert list(made) == list(start()), "the order of tensors is part of the bytes of a request"


def test_fedadam_by_hand() -> None:
    """Reddi et al. 2003.00295, with Flower's bias correction (round + 1): one number, two rounds."""
    optimizer = ServerOptimizer(CHOSEN["fedadam"])
    x, m, v = np.float64(0), 0.0, 0.0
    arrays = {"x": np.zeros(1, np.float32)}
    for number, delta in ((1, 0.5), (2, -0.25)):
        arrays = optimizer.step(number, arrays, {"x": np.array([delta])})
        m, v = 0.8 * m + 0.2 * delta, 0.95 * v + 0.05 * delta**2
        x += 0.05 * np.sqrt(1 - 0.95 ** (number + 1)) / (1 - 0.8 ** (number + 1)) * m / (np.sqrt(v) + 0.01)
        np.testing.assert_allclose(arrays["x"], [x], rtol=1e-5)


@pytest.mark.parametrize("name", list(CHOSEN))
def test_a_model_that_is_no_longer_finite(name: str) -> None:
    huge = {n: np.full(v.shape, 1e300) for n, v in start().items()}
    words = r"(?s)round 1: the model is no longer finite.*learning rate"
    with np.errstate(all="ignore"), pytest.raises(RunFailed, match=words):
        ServerOptimizer(CHOSEN[name]).step(1, start(), huge)


def test_a_strategy_cannot_send_messages_of_its_own() -> None:
    node = _OneNode()
    for call in (node.push_messages, node.pull_messages, node.send_and_receive):
        with pytest.raises(RunFailed, match="of its own"):
            call([])
