"""Flower's server strategies, given one virtual reply a round: the mean.

A strategy asks "its" Grid for nodes, makes one training message a node and aggregates the replies. Ours sees one virtual
node: its training message is the request for the whole cohort, and the mean of the cohort's updates is its reply. So any
strategy that works on the mean runs unmodified, and none ever holds every reply in memory.

FedAvg and FedProx give back the one reply that they get, bit by bit, so that reply is made here without them: through
Flower's serialisation it would stand in memory five times.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..common.config import Strategy
from ..common.errors import RunFailed
from ..common.flower import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Grid,
    Message,
    MetricRecord,
    RecordDict,
    Run,
    addressed,
    empty_run,
    strategies,
)
from ..common.messages import is_finite, pieces
from ..common.model import Arrays, zeros_like

_IDENTITIES = ("fedavg", "fedprox")
_CLASSES = {
    "fedavgm": strategies.FedAvgM,
    "fedadam": strategies.FedAdam,
    "fedyogi": strategies.FedYogi,
    "fedadagrad": strategies.FedAdagrad,
}


class ServerOptimizer:
    """A Flower strategy as a step: global arrays and the mean of updates in, new global arrays out."""

    def __init__(self, chosen: Strategy) -> None:
        self._strategy: Any = None
        if chosen.name not in _IDENTITIES:
            self._strategy = _CLASSES[chosen.name](
                min_train_nodes=1, min_available_nodes=1, min_evaluate_nodes=1, **chosen.parameters()
            )

    def step(self, round_number: int, arrays: Arrays, mean_update: dict[str, npt.NDArray[np.float64]]) -> Arrays:
        """New global arrays, float32, in the order of `arrays`.

        Args:
            arrays: in C order; with a strategy that is no more than the mean, the new ones overwrite them.
            mean_update: float64; emptied, so that it is gone from memory once it was used.

        Raises:
            RunFailed: the strategy gave no model, or one that is not finite.
        """
        mean = arrays if self._strategy is None else zeros_like(arrays, np.float32)
        for name, value in arrays.items():
            to = mean[name].reshape(-1)
            update = mean_update.pop(name).reshape(-1)
            for at, piece in pieces(value):
                to[at : at + len(piece)] = piece + update[at : at + len(piece)]  # in float64, rounded once
        new = mean if self._strategy is None else self._aggregate(round_number, arrays, mean)
        if not is_finite(new):
            raise RunFailed(
                f"round {round_number}: the model is no longer finite",
                "Lower the learning rate (local or server).",
            )
        return new

    def _aggregate(self, round_number: int, arrays: Arrays, mean: Arrays) -> Arrays:
        names = sorted(arrays)  # FedAvgM matches its momentum to arrays by place; a checkpoint keeps no order
        record = ArrayRecord({name: Array(np.asarray(arrays[name])) for name in names})
        (request,) = self._strategy.configure_train(round_number, record, ConfigRecord(), _OneNode())
        content = RecordDict(
            {
                "arrays": ArrayRecord({name: Array(mean.pop(name)) for name in names}),
                "metrics": MetricRecord({"num-examples": 1}),
            }
        )
        made, _ = self._strategy.aggregate_train(round_number, [Message(content, reply_to=request)])
        if not made:
            raise RunFailed(f"round {round_number}: the strategy gave no model")
        return {name: np.asarray(made[name].numpy(), dtype=np.float32) for name in arrays}

    def state(self) -> Arrays:
        """Everything that the strategy carries from round to round, by name."""
        found: Arrays = {}
        for attribute in ("m_t", "v_t"):
            for name, value in (getattr(self._strategy, attribute, None) or {}).items():
                found[f"{attribute}/{name}"] = value
        for index, value in enumerate(getattr(self._strategy, "momentum_vector", None) or []):
            found[f"momentum_vector/{index}"] = value
        current = getattr(self._strategy, "current_arrays", None)
        if isinstance(current, ArrayRecord):  # FedAvgM keeps its own copy of the model; FedOpt gets it every round
            for name, array in current.items():
                found[f"current_arrays/{name}"] = array.numpy()
        return found

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Back from `state`."""
        groups: dict[str, Arrays] = {}
        for key, value in state.items():
            attribute, name = key.split("/", 1)
            groups.setdefault(attribute, {})[name] = value
        for attribute, values in groups.items():
            match attribute:
                case "momentum_vector":
                    made: Any = [values[str(index)] for index in range(len(values))]
                case "current_arrays":
                    made = ArrayRecord({name: Array(values[name]) for name in sorted(values)})
                case _:
                    made = values
            setattr(self._strategy, attribute, made)


class _OneNode(Grid):
    """What a strategy sees instead of the cohort."""

    def set_run(self, run: Run) -> None:
        """There is one run."""

    @property
    def run(self) -> Run:
        """An empty run."""
        return empty_run()

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message to the virtual node."""
        return addressed(content, message_type, dst_node_id, group_id, ttl or 60.0, "virtual")

    def get_node_ids(self) -> Iterable[int]:
        """The virtual node."""
        return [1]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Never called by configure or aggregate."""
        raise RunFailed("a strategy that sends messages of its own is not supported")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Never called by configure or aggregate."""
        raise RunFailed("a strategy that receives messages of its own is not supported")

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Never called by configure or aggregate."""
        raise RunFailed("a strategy that exchanges messages of its own is not supported")
