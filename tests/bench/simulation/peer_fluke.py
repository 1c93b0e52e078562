"""fluke: FedAVG and DPFedAVG (Opacus), FastDataLoader without shuffling, models and messages in memory, no evaluation.

    .peers/fluke/bin/python peer_fluke.py --workload w1

Rounds are timed by its own observers, inside `run`.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import cpu_torchvision  # noqa: F401  fluke imports torchvision
import harness
from fluke import DDict, FlukeENV
from fluke.algorithms.dpfedavg import DPFedAVG
from fluke.algorithms.fedavg import FedAVG
from fluke.data import FastDataLoader
from fluke.utils import FederationObserver
from torch import Tensor, nn
from workloads import CLIP_NORM, NOISE_MULTIPLIER, Rows, Workload, loss


class _Loss(nn.Module):
    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        return loss(output, y)


class _Splitter:
    """Hands every client its rows."""

    def __init__(self, clients: list[Rows]) -> None:
        self._clients = clients

    def assign(self, n_clients: int, batch_size: int) -> tuple[tuple[list[FastDataLoader], list[None]], None]:
        loaders = [
            FastDataLoader(*rows, num_labels=0, batch_size=batch_size, shuffle=False, skip_singleton=False)
            for rows in self._clients
        ]
        return (loaders, [None] * n_clients), None


class _Ticks(FederationObserver):
    def __init__(self, watch: harness.Stopwatch) -> None:
        self._watch = watch

    def start_round(self, round: int, global_model: Any) -> None:
        if round == 1:
            self._watch.tick()

    def end_round(self, round: int) -> None:
        self._watch.tick()


def run(workload: Workload, watch: harness.Stopwatch, options: argparse.Namespace) -> Mapping[str, Tensor]:
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    warnings.filterwarnings("ignore", message="Secure RNG turned off")
    clients = workload.data()
    environment = FlukeENV()
    environment.set_inmemory(True)
    environment.set_eval_cfg(pre_fit=False, post_fit=False, locals=False, server=False)
    private = {"noise_mul": NOISE_MULTIPLIER, "max_grad_norm": CLIP_NORM} if workload.private else {}
    algorithm = (DPFedAVG if workload.private else FedAVG)(
        len(clients),
        _Splitter(clients),
        DDict(
            model=workload.model(),
            client=DDict(
                batch_size=workload.batch,
                local_epochs=1,
                loss=_Loss,
                optimizer=DDict(name="SGD", lr=workload.lr),
                scheduler=DDict(name="StepLR", step_size=1, gamma=1),
                **private,
            ),
            server=DDict(weighted=True),
        ),
    )
    numbers = iter(range(watch.rounds))
    algorithm.server.get_eligible_clients = lambda _: [
        algorithm.clients[i] for i in workload.cohort(next(numbers), len(clients))
    ]
    algorithm.set_callbacks([_Ticks(watch)])
    algorithm.run(watch.rounds, min(1.0, workload.cohort_size / len(clients)))
    state = algorithm.server.model.state_dict()
    return {name.removeprefix("_module."): value for name, value in state.items()}


if __name__ == "__main__":
    harness.main("fluke", lambda: version("fluke-fl"), run)
